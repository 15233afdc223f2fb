// Products of int8 activations with packed trits (AVX-512 VNNI): sums of integers, exact.
#pragma once

#include <algorithm>

#include "tiles.h"

namespace smelter {

constexpr int CHUNK = 256;  // inputs in 64 bytes of packed weights
constexpr int OUTPUTS = 4;  // computed together
constexpr int TOGETHER = 4;  // rows computed together

// Layers that read the same input, one below the other.
struct Linear {
  const std::uint8_t* packed;  // [outputs, rounded up to 4][chunks][64]: byte j has inputs j, 64 + j, ... as trit + 1
  const float* scales;         // of each output
  std::int64_t outputs, inputs;
};

inline int chunks_of(std::int64_t inputs) { return int((inputs + CHUNK - 1) / CHUNK); }

// The numbers a row has for a product: integers, their scales and sums, of the row or of each chunk.
struct Activations {
  std::int8_t* q;      // [rows, chunks * 256]
  float* scales;       // [rows, chunks]
  std::int32_t* sums;  // [rows, chunks]
  int stride;          // chunks that a row has room for

  std::int8_t* of(int row) const { return q + std::size_t(row) * stride * CHUNK; }
};

// x [size] as int8, one scale for all or one for each chunk.
inline void quantize(const float* x, int size, bool in_blocks, const Activations& to, int row) {
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

}  // namespace smelter
