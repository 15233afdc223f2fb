// From a tile of scores to logits and their exponentials; which scores count.
#pragma once

#include <algorithm>
#include <climits>

#include "tiles.h"

namespace smelter {

constexpr float LOG2E = 1.4426950408889634f;
constexpr float HIDDEN = -1e30f;  // a logit whose exponential is 0 beside any other

// tanh as a ratio of polynomials (Lambert's continued fraction), off by at most 1e-4, where it is held at |x| = 4.97.
// One step of Newton's takes the reciprocal from 14 bits to 28: at the cap, 1 - tanh^2 is to be nearly 0.
inline __m512 tanh_of(__m512 x) {
  x = _mm512_range_ps(x, all(4.97f), 0b0010);  // the smaller magnitude, with the sign of x
  const __m512 y = _mm512_mul_ps(x, x);
  const __m512 above = _mm512_fmadd_ps(y, _mm512_fmadd_ps(y, _mm512_add_ps(y, all(378)), all(17325)), all(135135));
  const __m512 cubic = _mm512_fmadd_ps(y, _mm512_fmadd_ps(y, all(28), all(3150)), all(62370));
  const __m512 below = _mm512_fmadd_ps(y, cubic, all(135135));
  const __m512 about = _mm512_rcp14_ps(below);
  const __m512 inverse = _mm512_mul_ps(about, _mm512_fnmadd_ps(below, about, all(2.0f)));
  return _mm512_mul_ps(_mm512_mul_ps(x, above), inverse);
}

// 2 to the x: a Taylor polynomial between -1/2 and 1/2 (relative error 4e-5), then the exponent. 0 far below.
inline __m512 exp2_of(__m512 x) {
  const __m512 part = _mm512_reduce_ps(x, 0);  // x less its nearest integer
  __m512 y = _mm512_fmadd_ps(part, all(0.00961812911f), all(0.0555041087f));
  y = _mm512_fmadd_ps(part, y, all(0.240226507f));
  y = _mm512_fmadd_ps(part, y, all(0.693147181f));
  y = _mm512_fmadd_ps(part, y, all(1.0f));
  return _mm512_scalef_ps(y, _mm512_sub_ps(x, part));
}

// cap * tanh(scale * score / cap) in units of log 2, or scale * score without a cap.
template <bool HAS_CAP>
struct Logits {
  float scale, cap;

  // tanh, or the scores as they are.
  __m512 inner(__m512 scores) const { return HAS_CAP ? tanh_of(_mm512_mul_ps(scores, all(scale / cap))) : scores; }
  __m512 factor() const { return all((HAS_CAP ? cap : scale) * LOG2E); }
  // `scale` times the cap's slope, times weights.
  __m512 slope(__m512 inner, __m512 weights) const {
    const __m512 scaled = _mm512_mul_ps(weights, all(scale));
    return HAS_CAP ? _mm512_fnmadd_ps(_mm512_mul_ps(scaled, inner), inner, scaled) : scaled;
  }
};

// Which keys queries see: none that come later, and with documents (numbers [T], or null) none of another.
class Visibility {
 public:
  Visibility(const std::int32_t* docs, int length) : docs_(docs), length_(length) {}

  // Of a block of queries and one of keys, by where they start: none at all.
  bool none(int queries, int keys) const {
    if (docs_ == nullptr) return false;
    const Span q = span(queries), k = span(keys);
    return k.high < q.low || q.high < k.low;
  }

  // Every one.
  bool every(int queries, int keys) const {
    if (queries == keys) return false;
    if (docs_ == nullptr) return true;
    const Span q = span(queries), k = span(keys);
    return q.low == q.high && k.low == k.high && q.low == k.low;
  }

  // Which of the 16 queries from `query` on see `key`.
  __mmask16 of(int query, int key) const {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __mmask16 earlier = _mm512_cmple_epi32_mask(_mm512_set1_epi32(key - query), lane);
    if (docs_ == nullptr || key >= length_) return earlier;
    const int left = length_ - query;
    const __mmask16 there = left >= LANES ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
    const __m512i numbers = _mm512_maskz_loadu_epi32(there, docs_ + query);
    return earlier & _mm512_mask_cmpeq_epi32_mask(there, _mm512_set1_epi32(docs_[key]), numbers);
  }

 private:
  struct Span {
    std::int32_t low, high;
  };

  Span span(int start) const {
    Span found{INT_MAX, INT_MIN};
    for (int i = start; i < std::min(start + BLOCK, length_); ++i) {
      found.low = std::min(found.low, docs_[i]);
      found.high = std::max(found.high, docs_[i]);
    }
    return found;
  }

  const std::int32_t* docs_;
  int length_;
};

}  // namespace smelter
