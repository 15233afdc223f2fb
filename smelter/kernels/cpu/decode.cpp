// A trained ternary model reads and writes tokens: all its layers in one call, in float32, beside a cache of keys.
//
// What takes the time is reading weights, so they lie packed, four trits a byte, and are unpacked in registers. The
// products are sums of integers (AVX-512 VNNI) and exact. Rows are independent: a row's numbers do not depend on which
// others are computed with it, nor on the number of threads.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>
#include <vector>

#include "cached.h"
#include "packed.h"

namespace smelter {

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

// Where the threads of a team wait for one another, a hundred times a token. OpenMP's own barriers put threads to sleep
// as soon as a process has more of them than cores, and waking one takes longer than most steps.
class Barrier {
 public:
  static constexpr int SPINS = 200;  // some 4 microseconds

  void wait(int threads) {
    const int turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      turn_.notify_all();
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
      if (spins < SPINS) {
        _mm_pause();
      } else {
        turn_.wait(turn, std::memory_order_acquire);  // on a busy machine: who sleeps is woken before who computes
      }
    }
  }

 private:
  std::atomic<int> arrived_{0}, turn_{0};
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

// The rows [rows, size], normalised, as the next product reads them. `room`: as large. Called by every thread of a team,
// which does not wait at the end.
void enter(const float* hidden, const float* gain, int rows, int size, float eps, bool in_blocks, const Activations& to,
           float* room) {
#pragma omp for schedule(static) nowait
  for (int row = 0; row < rows; ++row) {
    float* normed = room + std::size_t(row) * size;
    std::memcpy(normed, hidden + std::size_t(row) * size, sizeof(float) * size);
    rms_norm(normed, gain, size, eps);
    quantize(normed, size, in_blocks, to, row);
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
  std::vector<std::pair<int, int>> groups;  // first and number of up to four neighbouring rows of one slot
  for (int row = 0; row < rows; ++row) {
    const bool goes_on = row > 0 && slots[row] == slots[row - 1] && groups.back().second < 4;
    if (goes_on) {
      ++groups.back().second;
    } else {
      groups.push_back({row, 1});
    }
  }
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads();
    const auto wait = [&barrier, team] { barrier.wait(team); };
    const int stride = int(max_len) + LANES;
    Scratch own(4 * sizeof(float) * stride);
    float* weights = own.take<float>(4 * stride);
    const Attention attention{made, positions, between, width, heads, sharing, dim, stride, model.cap, weights};
#pragma omp for schedule(static) nowait
    for (int row = 0; row < rows; ++row) {  // each by the thread that goes on with it
      std::memcpy(hidden + std::size_t(row) * size, model.embedding + tokens[row] * size, sizeof(float) * size);
    }
    for (int index = 0; index < model.num_layers; ++index) {
      const DecoderLayer& layer = model.layers[index];
      float *layer_keys = keys + index * num_slots * of_kv, *layer_values = values + index * num_slots * of_kv;
      enter(hidden, layer.attention_norm, rows, size, model.eps, in_blocks, x, between);
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
      for (std::size_t group = 0; group < groups.size(); ++group) {
        for (int head = 0; head < kv_heads; ++head) {
          const auto [row, count] = groups[group];
          const std::size_t at = slots[row] * of_kv + head * max_len * dim;
          attention.of(row, count, head, layer_keys + at, layer_values + at);
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
      enter(hidden, layer.mlp_norm, rows, size, model.eps, in_blocks, x, between);
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
