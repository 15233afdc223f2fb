// A trained ternary model reads and writes tokens: all its layers in one call, in float32, beside a cache of keys.
//
// What takes the time is reading weights, so they lie packed, four trits a byte, and are unpacked in registers. The
// products are sums of integers (AVX-512 VNNI) and exact. Rows are independent: a row's numbers do not depend on which
// others are computed with it, nor on the number of threads.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>

#include "tiles.h"

namespace smelter {
namespace {

constexpr int CHUNK = 256;  // inputs in 64 bytes of packed weights
constexpr int OUTPUTS = 4;  // computed together
constexpr int TOGETHER = 4;  // rows computed together

}  // namespace

// Layers that read the same input, one below the other.
struct Linear {
  const std::uint8_t* packed;  // [outputs, rounded up to 4][chunks][64]: byte j has inputs j, 64 + j, ... as trit + 1
  const float* scales;         // of each output
  std::int64_t outputs, inputs;
};

struct DecoderLayer {
  Linear qkv, out, gate_up, down;
  const float *attention_norm, *query_norm, *key_norm, *attention_sub_norm, *mlp_norm, *mlp_sub_norm;  // or null
};

struct Decoder {
  const DecoderLayer* layers;
  const float *embedding, *norm, *cos, *sin;  // [V, C], [C], [T, D], [T, D]
  std::int64_t num_layers, size, heads, kv_heads, dim, inner, blocks;  // blocks: activations have a scale per 256
  float eps, cap;
};

namespace {

int chunks_of(std::int64_t inputs) { return int((inputs + CHUNK - 1) / CHUNK); }

// Where the threads of a team wait for one another, a hundred times a token. OpenMP's own barriers put threads to sleep
// as soon as a process has more of them than cores, and waking one takes longer than most steps.
class Barrier {
 public:
  void wait(int threads) {
    const int turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
      if (spins < 20000) {
        _mm_pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  std::atomic<int> arrived_{0}, turn_{0};
};

// e to the x, relative error 2e-7; 0 far below.
inline __m512 exp_of(__m512 x) {
  const __m512 y = _mm512_mul_ps(_mm512_max_ps(x, all(-100.0f)), all(1.44269504f));
  const __m512 whole = _mm512_roundscale_ps(y, 0);
  const __m512 part = _mm512_sub_ps(y, whole);
  __m512 p = all(1.54035304e-4f);
  for (const float c : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f}) {
    p = _mm512_fmadd_ps(p, part, all(c));
  }
  return _mm512_scalef_ps(p, whole);
}

// The numbers a row has for a product: integers, their scales and sums, of the row or of each chunk.
struct Activations {
  std::int8_t* q;      // [rows, chunks * 256]
  float* scales;       // [rows, chunks]
  std::int32_t* sums;  // [rows, chunks]
  int stride;          // chunks that a row has room for

  std::int8_t* of(int row) const { return q + std::size_t(row) * stride * CHUNK; }
};

// x [size] over its root mean square, times a gain.
void rms_norm(float* x, const float* gain, int size, float eps) {
  __m512 sum = all(0.0f);
  for (int i = 0; i < size; i += LANES) {
    const __m512 v = _mm512_loadu_ps(x + i);
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  const __m512 factor = all(1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / size + eps));
  for (int i = 0; i < size; i += LANES) {
    const __m512 unit = _mm512_mul_ps(_mm512_loadu_ps(x + i), factor);
    _mm512_storeu_ps(x + i, _mm512_mul_ps(unit, _mm512_loadu_ps(gain + i)));
  }
}

// x [size] as int8, one scale for all or one for each chunk.
void quantize(const float* x, int size, bool in_blocks, const Activations& to, int row) {
  const int chunks = chunks_of(size), step = in_blocks ? CHUNK : chunks * CHUNK;
  std::int8_t* q = to.of(row);
  std::memset(q + size, 0, std::size_t(chunks) * CHUNK - size);
  for (int start = 0, index = 0; start < size; start += step, ++index) {
    const int end = std::min(start + step, size);
    __m512 largest = all(0.0f);
    for (int i = start; i < end; i += LANES) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
    const float scale = std::max(_mm512_reduce_max_ps(largest), 1e-5f) / 127.0f;
    __m512i sum = _mm512_setzero_si512();
    for (int i = start; i < end; i += LANES) {
      const __m512i whole = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_loadu_ps(x + i), all(scale)));
      sum = _mm512_add_epi32(sum, whole);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), _mm512_cvtepi32_epi8(whole));
    }
    to.scales[row * to.stride + index] = scale;
    to.sums[row * to.stride + index] = _mm512_reduce_add_epi32(sum);
  }
}

// Products of 4 outputs with COUNT rows. Weights count as trit + 1, so the sum of the activations is taken off.
template <bool IN_BLOCKS, int COUNT>
void multiply_tile(const Linear& linear, int output, const Activations& x, int row, float (&y)[OUTPUTS][TOGETHER]) {
  const int chunks = chunks_of(linear.inputs);
  const std::uint8_t* weights = linear.packed + std::size_t(output) * chunks * 64;
  const __m512i low = _mm512_set1_epi8(3);
  // Outputs in turns of two where each chunk has a scale: there are float32 sums besides.
  constexpr int TURN = IN_BLOCKS ? 2 : OUTPUTS;
  for (int first = 0; first < OUTPUTS; first += TURN) {
    __m512i sums[TURN][COUNT];
    __m512 scaled[TURN][COUNT];
#pragma GCC unroll 4
    for (int o = 0; o < TURN; ++o) {
#pragma GCC unroll 4
      for (int r = 0; r < COUNT; ++r) sums[o][r] = _mm512_setzero_si512(), scaled[o][r] = all(0.0f);
    }
    for (int chunk = 0; chunk < chunks; ++chunk) {
      __m512i packed[TURN];
#pragma GCC unroll 4
      for (int o = 0; o < TURN; ++o) {
        packed[o] = _mm512_loadu_si512(weights + (std::size_t(first + o) * chunks + chunk) * 64);
      }
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        __m512i q[COUNT];
#pragma GCC unroll 4
        for (int r = 0; r < COUNT; ++r) q[r] = _mm512_loadu_si512(x.of(row + r) + chunk * CHUNK + part * 64);
#pragma GCC unroll 4
        for (int o = 0; o < TURN; ++o) {
          const __m512i codes = _mm512_and_si512(_mm512_srli_epi16(packed[o], 2 * part), low);
#pragma GCC unroll 4
          for (int r = 0; r < COUNT; ++r) sums[o][r] = _mm512_dpbusd_epi32(sums[o][r], codes, q[r]);
        }
      }
      if (IN_BLOCKS) {
#pragma GCC unroll 4
        for (int o = 0; o < TURN; ++o) {
#pragma GCC unroll 4
          for (int r = 0; r < COUNT; ++r) {
            const __m512 scale = all(x.scales[(row + r) * x.stride + chunk]);
            scaled[o][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[o][r]), scale, scaled[o][r]);
            sums[o][r] = _mm512_setzero_si512();
          }
        }
      }
    }
    for (int r = 0; r < COUNT; ++r) {
      const float* scales = x.scales + (row + r) * x.stride;
      const std::int32_t* taken = x.sums + (row + r) * x.stride;
      float off = 0.0f;
      if (IN_BLOCKS) {
        for (int chunk = 0; chunk < chunks; ++chunk) off += scales[chunk] * float(taken[chunk]);
      }
      for (int o = 0; o < TURN; ++o) {
        const float scale = linear.scales[output + first + o];
        y[first + o][r] = IN_BLOCKS ? (_mm512_reduce_add_ps(scaled[o][r]) - off) * scale
                                    : float(_mm512_reduce_add_epi32(sums[o][r]) - taken[0]) * (scales[0] * scale);
      }
    }
  }
}

template <bool IN_BLOCKS>
void multiply_rows(const Linear& linear, int output, const Activations& x, int row, int count,
                   float (&y)[OUTPUTS][TOGETHER]) {
  switch (count) {
    case 1: return multiply_tile<IN_BLOCKS, 1>(linear, output, x, row, y);
    case 2: return multiply_tile<IN_BLOCKS, 2>(linear, output, x, row, y);
    case 3: return multiply_tile<IN_BLOCKS, 3>(linear, output, x, row, y);
    default: return multiply_tile<IN_BLOCKS, 4>(linear, output, x, row, y);
  }
}

// y [rows, outputs] = (ADD: +=) x times the weights. Called by every thread of a team, which does not wait at the end.
template <bool ADD>
void multiply(const Linear& linear, const Activations& x, int rows, bool in_blocks, float* y) {
  const int outputs = int(linear.outputs);
#pragma omp for schedule(static) nowait
  for (int output = 0; output < outputs; output += OUTPUTS) {
    for (int row = 0; row < rows; row += TOGETHER) {
      const int count = std::min(TOGETHER, rows - row);
      float made[OUTPUTS][TOGETHER];
      if (in_blocks) {
        multiply_rows<true>(linear, output, x, row, count, made);
      } else {
        multiply_rows<false>(linear, output, x, row, count, made);
      }
      for (int r = 0; r < count; ++r) {
        for (int o = 0; o < std::min(OUTPUTS, outputs - output); ++o) {
          float& to = y[std::size_t(row + r) * outputs + output + o];
          to = ADD ? to + made[o][r] : made[o][r];
        }
      }
    }
  }
}

// RoPE in the half-split layout.
void rotate(float* x, const float* cos, const float* sin, int dim) {
  for (int i = 0; i < dim / 2; i += LANES) {
    const __m512 left = _mm512_loadu_ps(x + i), right = _mm512_loadu_ps(x + dim / 2 + i);
    const __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
    _mm512_storeu_ps(x + i, _mm512_fnmadd_ps(right, s, _mm512_mul_ps(left, c)));
    _mm512_storeu_ps(x + dim / 2 + i, _mm512_fmadd_ps(left, s, _mm512_mul_ps(right, c)));
  }
}

// One query's attention to keys and values [length, D]: out [D]. `weights`: room for `length`, rounded up to 16.
void attend(const float* query, const float* keys, const float* values, int length, int dim, float cap, float* weights,
            float* out) {
  const float scale = 1.0f / std::sqrt(float(dim));
  for (int key = 0; key < length; ++key) {
    __m512 sum = all(0.0f);
    for (int d = 0; d < dim; d += LANES) {
      sum = _mm512_fmadd_ps(_mm512_loadu_ps(query + d), _mm512_loadu_ps(keys + std::size_t(key) * dim + d), sum);
    }
    weights[key] = _mm512_reduce_add_ps(sum);
  }
  const int rounded = (length + LANES - 1) / LANES * LANES;
  for (int key = length; key < rounded; ++key) weights[key] = 0.0f;
  __m512 highest = all(-INFINITY);
  for (int key = 0; key < rounded; key += LANES) {
    __m512 logit = _mm512_mul_ps(_mm512_loadu_ps(weights + key), all(scale));
    if (cap != 0.0f) {  // tanh(x) = 1 - 2 / (exp(2 x) + 1)
      const __m512 e = exp_of(_mm512_min_ps(_mm512_mul_ps(logit, all(2.0f / cap)), all(40.0f)));
      const __m512 tanh = _mm512_sub_ps(all(1.0f), _mm512_div_ps(all(2.0f), _mm512_add_ps(e, all(1.0f))));
      logit = _mm512_mul_ps(tanh, all(cap));
    }
    const int left = length - key;
    if (left < LANES) logit = _mm512_mask_mov_ps(all(-INFINITY), __mmask16((1u << left) - 1), logit);
    _mm512_storeu_ps(weights + key, logit);
    highest = _mm512_max_ps(highest, logit);
  }
  const __m512 most = all(_mm512_reduce_max_ps(highest));
  __m512 total = all(0.0f);
  for (int key = 0; key < rounded; key += LANES) {
    const __mmask16 there = length - key < LANES ? __mmask16((1u << (length - key)) - 1) : __mmask16(0xffff);
    const __m512 e = _mm512_maskz_mov_ps(there, exp_of(_mm512_sub_ps(_mm512_loadu_ps(weights + key), most)));
    _mm512_storeu_ps(weights + key, e);
    total = _mm512_add_ps(total, e);
  }
  const __m512 inverse = all(1.0f / _mm512_reduce_add_ps(total));
  for (int d = 0; d < dim; d += LANES) {
    __m512 sum = all(0.0f);
    for (int key = 0; key < length; ++key) {
      sum = _mm512_fmadd_ps(all(weights[key]), _mm512_loadu_ps(values + std::size_t(key) * dim + d), sum);
    }
    _mm512_storeu_ps(out + d, _mm512_mul_ps(sum, inverse));
  }
}

// to [inner] = silu(gate) * up.
void swiglu(const float* gate, const float* up, int inner, float* to) {
  for (int i = 0; i < inner; i += LANES) {
    const __m512 g = _mm512_loadu_ps(gate + i);
    const __m512 e = exp_of(_mm512_min_ps(_mm512_sub_ps(all(0.0f), g), all(80.0f)));
    const __m512 silu = _mm512_div_ps(g, _mm512_add_ps(all(1.0f), e));
    _mm512_storeu_ps(to + i, _mm512_mul_ps(silu, _mm512_loadu_ps(up + i)));
  }
}

}  // namespace
}  // namespace smelter

extern "C" {

// hidden [rows, C], after the last norm, of `rows` tokens. Each goes to a position of a slot of the cache, keys and
// values [layers, slots, G, max_len, D], whose earlier positions have been read before or are read by the same call.
void smelter_decode(const smelter::Decoder* decoder, const std::int64_t* tokens, const std::int64_t* slots,
                    const std::int64_t* positions, int rows, float* keys, float* values, std::int64_t num_slots,
                    std::int64_t max_len, int threads, float* hidden) {
  using namespace smelter;
  const Decoder& model = *decoder;
  const int size = int(model.size), dim = int(model.dim), inner = int(model.inner);
  const int heads = int(model.heads), kv_heads = int(model.kv_heads), sharing = heads / kv_heads;
  const int width = (heads + 2 * kv_heads) * dim;
  const int chunks = std::max({chunks_of(size), chunks_of(heads * dim), chunks_of(inner)});
  const bool in_blocks = model.blocks != 0;
  const std::size_t of_kv = std::size_t(kv_heads) * max_len * dim;  // a slot of a layer
  const std::size_t wide = std::size_t(rows) * std::max(width, 2 * inner);
  const std::size_t narrow = std::size_t(rows) * std::max({heads * dim, inner, size});
  Scratch shared(std::size_t(rows) * chunks * (CHUNK + 8) + sizeof(float) * (wide + narrow) + 1024);
  const Activations x{shared.take<std::int8_t>(std::size_t(rows) * chunks * CHUNK),
                      shared.take<float>(std::size_t(rows) * chunks),
                      shared.take<std::int32_t>(std::size_t(rows) * chunks), chunks};
  float *made = shared.take<float>(wide), *between = shared.take<float>(narrow);
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads();
    const auto wait = [&barrier, team] { barrier.wait(team); };
    Scratch own(sizeof(float) * (max_len + LANES));
    float* weights = own.take<float>(max_len + LANES);
#pragma omp for schedule(static) nowait
    for (int row = 0; row < rows; ++row) {  // each by the thread that goes on with it
      std::memcpy(hidden + std::size_t(row) * size, model.embedding + tokens[row] * size, sizeof(float) * size);
    }
    for (int index = 0; index < model.num_layers; ++index) {
      const DecoderLayer& layer = model.layers[index];
      float *layer_keys = keys + index * num_slots * of_kv, *layer_values = values + index * num_slots * of_kv;
#pragma omp for schedule(static) nowait
      for (int row = 0; row < rows; ++row) {
        float* normed = between + std::size_t(row) * size;
        std::memcpy(normed, hidden + std::size_t(row) * size, sizeof(float) * size);
        rms_norm(normed, layer.attention_norm, size, model.eps);
        quantize(normed, size, in_blocks, x, row);
      }
      wait();
      multiply<false>(layer.qkv, x, rows, in_blocks, made);
      wait();
#pragma omp for schedule(static) nowait
      for (int row = 0; row < rows; ++row) {
        float* of_row = made + std::size_t(row) * width;
        const float *cos = model.cos + positions[row] * dim, *sin = model.sin + positions[row] * dim;
        for (int head = 0; head < heads + kv_heads; ++head) {
          const float* gain = head < heads ? layer.query_norm : layer.key_norm;
          if (gain != nullptr) rms_norm(of_row + head * dim, gain, dim, model.eps);
          rotate(of_row + head * dim, cos, sin, dim);
        }
        for (int head = 0; head < kv_heads; ++head) {
          const std::size_t at = slots[row] * of_kv + (head * max_len + positions[row]) * dim;
          std::memcpy(layer_keys + at, of_row + (heads + head) * dim, sizeof(float) * dim);
          std::memcpy(layer_values + at, of_row + (heads + kv_heads + head) * dim, sizeof(float) * dim);
        }
      }
      wait();
#pragma omp for collapse(2) schedule(static, 1) nowait
      for (int row = 0; row < rows; ++row) {
        for (int head = 0; head < kv_heads; ++head) {
          const std::size_t at = slots[row] * of_kv + head * max_len * dim;
          for (int query = head * sharing; query < (head + 1) * sharing; ++query) {
            attend(made + std::size_t(row) * width + query * dim, layer_keys + at, layer_values + at,
                   int(positions[row]) + 1, dim, model.cap, weights, between + (std::size_t(row) * heads + query) * dim);
          }
        }
      }
      wait();
#pragma omp for schedule(static) nowait
      for (int row = 0; row < rows; ++row) {
        float* out = between + std::size_t(row) * heads * dim;
        if (layer.attention_sub_norm != nullptr) rms_norm(out, layer.attention_sub_norm, heads * dim, model.eps);
        quantize(out, heads * dim, in_blocks, x, row);
      }
      wait();
      multiply<true>(layer.out, x, rows, in_blocks, hidden);
      wait();
#pragma omp for schedule(static) nowait
      for (int row = 0; row < rows; ++row) {
        float* normed = between + std::size_t(row) * size;
        std::memcpy(normed, hidden + std::size_t(row) * size, sizeof(float) * size);
        rms_norm(normed, layer.mlp_norm, size, model.eps);
        quantize(normed, size, in_blocks, x, row);
      }
      wait();
      multiply<false>(layer.gate_up, x, rows, in_blocks, made);
      wait();
#pragma omp for schedule(static) nowait
      for (int row = 0; row < rows; ++row) {
        float *gate = made + std::size_t(row) * 2 * inner, *to = between + std::size_t(row) * inner;
        swiglu(gate, gate + inner, inner, to);
        if (layer.mlp_sub_norm != nullptr) rms_norm(to, layer.mlp_sub_norm, inner, model.eps);
        quantize(to, inner, in_blocks, x, row);
      }
      wait();
      multiply<true>(layer.down, x, rows, in_blocks, hidden);
      wait();
    }
#pragma omp for schedule(static) nowait
    for (int row = 0; row < rows; ++row) rms_norm(hidden + std::size_t(row) * size, model.norm, size, model.eps);
  }
}
}
