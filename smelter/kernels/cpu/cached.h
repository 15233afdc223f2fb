// Attention of new queries to a cache of keys and values in float32, up to four queries for each key that is read.
#pragma once

#include <algorithm>
#include <cmath>

#include "tiles.h"

namespace smelter {

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

// The sums of 16 registers, one in each lane.
inline __m512 sums_of(__m512 (&x)[LANES]) {
  __m512 half[8], quarter[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    half[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = (__m512d)half[2 * i], b = (__m512d)half[2 * i + 1];
    quarter[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
  }
  // Now quarter[i] holds, in each of its four parts, a share of the sums of x[4 i] to x[4 i + 3].
  const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(quarter[0], quarter[1], 0x88),
                                   _mm512_shuffle_f32x4(quarter[0], quarter[1], 0xdd));
  const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(quarter[2], quarter[3], 0x88),
                                    _mm512_shuffle_f32x4(quarter[2], quarter[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

// The scores of COUNT queries, side by side in registers: weights [COUNT, stride] = queries times keys [length, D].
template <int COUNT>
void score(const float* const (&queries)[COUNT], const float* keys, int length, int dim, int stride, float* weights) {
  constexpr int KEYS = LANES / COUNT;
  for (int key = 0; key < length; key += KEYS) {
    const int last = std::min(KEYS, length - key) - 1;  // takes the place of those that are none
    __m512 sums[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) sums[i] = all(0.0f);
    for (int d = 0; d < dim; d += LANES) {
#pragma GCC unroll 16
      for (int i = 0; i < KEYS; ++i) {
        const __m512 k = _mm512_loadu_ps(keys + std::size_t(key + std::min(i, last)) * dim + d);
#pragma GCC unroll 4
        for (int q = 0; q < COUNT; ++q) {
          sums[q * KEYS + i] = _mm512_fmadd_ps(_mm512_loadu_ps(queries[q] + d), k, sums[q * KEYS + i]);
        }
      }
    }
    alignas(64) float made[LANES];
    _mm512_store_ps(made, sums_of(sums));
#pragma GCC unroll 4
    for (int q = 0; q < COUNT; ++q) std::memcpy(weights + q * stride + key, made + q * KEYS, sizeof(float) * KEYS);
  }
}

// Turns the scores of a query that sees `length` keys into exponentials, 0 up to `rounded`. Returns 1 / their sum.
inline float exponentiate(float* weights, int length, int rounded, float scale, float cap) {
  const auto seen = [length](int key) {
    const int left = length - key;
    return left >= LANES ? __mmask16(0xffff) : left <= 0 ? __mmask16(0) : __mmask16((1u << left) - 1);
  };
  __m512 highest = all(-INFINITY);
  for (int key = 0; key < length; key += LANES) {
    __m512 logit = _mm512_mul_ps(_mm512_loadu_ps(weights + key), all(scale));
    if (cap != 0.0f) {  // tanh(x) = 1 - 2 / (exp(2 x) + 1)
      const __m512 e = exp_of(_mm512_min_ps(_mm512_mul_ps(logit, all(2.0f / cap)), all(40.0f)));
      const __m512 tanh = _mm512_sub_ps(all(1.0f), _mm512_div_ps(all(2.0f), _mm512_add_ps(e, all(1.0f))));
      logit = _mm512_mul_ps(tanh, all(cap));
    }
    _mm512_storeu_ps(weights + key, logit);
    highest = _mm512_mask_max_ps(highest, seen(key), highest, logit);
  }
  const __m512 most = all(_mm512_reduce_max_ps(highest));
  __m512 total = all(0.0f);
  for (int key = 0; key < rounded; key += LANES) {
    const __m512 e = _mm512_maskz_mov_ps(seen(key), exp_of(_mm512_sub_ps(_mm512_loadu_ps(weights + key), most)));
    _mm512_storeu_ps(weights + key, e);
    total = _mm512_add_ps(total, e);
  }
  return 1.0f / _mm512_reduce_add_ps(total);
}

// outs [COUNT] from d on, WIDTH vectors each = factors times weights [COUNT, stride] times values [length, D]. Each sum
// runs over the keys in their order, whatever COUNT and WIDTH.
template <int COUNT, int WIDTH>
void average(const float* weights, int stride, const float* values, int length, int dim, int d,
             const float (&factors)[COUNT], float* const (&outs)[COUNT]) {
  __m512 sums[COUNT][WIDTH];
#pragma GCC unroll 4
  for (int q = 0; q < COUNT; ++q) {
#pragma GCC unroll 4
    for (int n = 0; n < WIDTH; ++n) sums[q][n] = all(0.0f);
  }
  for (int key = 0; key < length; ++key) {
    __m512 v[WIDTH];
#pragma GCC unroll 4
    for (int n = 0; n < WIDTH; ++n) v[n] = _mm512_loadu_ps(values + std::size_t(key) * dim + d + n * LANES);
#pragma GCC unroll 4
    for (int q = 0; q < COUNT; ++q) {
      const __m512 weight = all(weights[q * stride + key]);
#pragma GCC unroll 4
      for (int n = 0; n < WIDTH; ++n) sums[q][n] = _mm512_fmadd_ps(weight, v[n], sums[q][n]);
    }
  }
  for (int q = 0; q < COUNT; ++q) {
    for (int n = 0; n < WIDTH; ++n) {
      _mm512_storeu_ps(outs[q] + d + n * LANES, _mm512_mul_ps(sums[q][n], all(factors[q])));
    }
  }
}

// Attention of COUNT queries to keys and values [.., D] of which they see `lengths`. weights: room [COUNT, stride].
template <int COUNT>
void attend(const float* const (&queries)[COUNT], const int (&lengths)[COUNT], const float* keys, const float* values,
            int dim, float cap, int stride, float* weights, float* const (&outs)[COUNT]) {
  const int length = *std::max_element(lengths, lengths + COUNT), rounded = (length + LANES - 1) / LANES * LANES;
  score<COUNT>(queries, keys, length, dim, stride, weights);
  float factors[COUNT];
  for (int q = 0; q < COUNT; ++q) {
    factors[q] = exponentiate(weights + q * stride, lengths[q], rounded, 1.0f / std::sqrt(float(dim)), cap);
  }
  constexpr int WIDTH = COUNT == 4 ? 2 : 4;
  int d = 0;
  for (; d + WIDTH * LANES <= dim; d += WIDTH * LANES) {
    average<COUNT, WIDTH>(weights, stride, values, length, dim, d, factors, outs);
  }
  if (d < dim) average<COUNT, 2>(weights, stride, values, length, dim, d, factors, outs);
}

// Attention of all queries of `rows` neighbouring rows of one slot that share a key head, four at a time.
struct Attention {
  const float* made;  // [rows, width]: queries first
  const std::int64_t* positions;
  float* out;  // [rows, heads * D]
  int width, heads, sharing, dim, stride;
  float cap;
  float* weights;  // room [4, stride]

  void of(int row, int rows, int kv_head, const float* keys, const float* values) const {
    const int total = rows * sharing;
    for (int first = 0; first < total; first += 4) {
      const int count = std::min(4, total - first);
      if (count == 1) {
        some<1>(row, first, count, kv_head, keys, values);
      } else if (count == 2) {
        some<2>(row, first, count, kv_head, keys, values);
      } else {
        some<4>(row, first, count, kv_head, keys, values);
      }
    }
  }

 private:
  template <int COUNT>
  void some(int row, int first, int count, int kv_head, const float* keys, const float* values) const {
    const float* queries[COUNT];
    float* outs[COUNT];
    int lengths[COUNT];
    for (int q = 0; q < COUNT; ++q) {
      const int index = first + std::min(q, count - 1), of_row = row + index / sharing;  // three are made four
      const int head = kv_head * sharing + index % sharing;
      queries[q] = made + std::size_t(of_row) * width + head * dim;
      outs[q] = out + (std::size_t(of_row) * heads + head) * dim;
      lengths[q] = int(positions[of_row]) + 1;
    }
    attend<COUNT>(queries, lengths, keys, values, dim, cap, stride, weights, outs);
  }
};

}  // namespace smelter
