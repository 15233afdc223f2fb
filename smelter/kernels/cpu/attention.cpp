// Causal soft-capped grouped-query attention in bf16 and its gradients, a tile of scores at a time.
//
// FlashAttention (Dao et al., arXiv 2205.14135; the backward pass in the order of 2307.08691): scores are made, turned
// into weights and multiplied on while they are in registers and the first cache. Everything is computed transposed,
// keys by queries, so that what belongs to a query (its sum, its maximum, its norm) lies in a vector's lanes.
//
// q [B, H, T, D], k and v [B, G, T, D], contiguous; D a multiple of 64; docs [B, T] or null.
#include <cmath>

#include "scores.h"

namespace smelter {
namespace {

struct Shape {
  int batch, heads, kv_heads, length, dim, threads;

  int blocks() const { return (length + BLOCK - 1) / BLOCK; }
  std::size_t padded() const { return std::size_t(blocks()) * BLOCK * dim; }  // a head with its last block filled up
  std::size_t head(int index) const { return std::size_t(index) * length * dim; }
  int size(int block) const { return std::min(BLOCK, length - block * BLOCK); }
  int kv_head(int head) const { return head / heads * kv_heads + head % heads / (heads / kv_heads); }
};

// Rows [64, D] of a block: where they lie, or, where there are fewer, a copy filled up with zeros.
const bf16* filled_up(const bf16* rows, int size, int dim, bf16* room) {
  if (size == BLOCK) return rows;
  std::memcpy(room, rows, sizeof(bf16) * size * dim);
  std::memset(room + size * dim, 0, sizeof(bf16) * (BLOCK - size) * dim);
  return room;
}

// Adds up exponentials as they are multiplied, in bf16, so that weights sum to 1 whatever the rounding.
inline void add_pairs(__m512& total, __m512bh pairs) {
  total = _mm512_dpbf16_ps(total, pairs, (__m512bh)_mm512_set1_epi16(0x3f80));  // ones
}

// Turns the logits [64 keys, 64 queries] of a block into exponentials above the highest logit so far; what was summed
// before is scaled to a new highest one.
void exponentials_above(const float* logits, int dim, __m512 (&highest)[VECTORS], __m512 (&totals)[VECTORS],
                        float* sums, bf16* weights) {
  for (int n = 0; n < VECTORS; ++n) {
    __m512 now = highest[n];
    for (int key = 0; key < BLOCK; ++key) now = _mm512_max_ps(now, _mm512_loadu_ps(logits + key * BLOCK + n * LANES));
    if (_mm512_cmpneq_ps_mask(now, highest[n])) {
      const __m512 change = exp2_of(_mm512_sub_ps(highest[n], now));
      totals[n] = _mm512_mul_ps(totals[n], change);
      for (int d = 0; d < dim; ++d) {
        float* at = sums + d * BLOCK + n * LANES;
        _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), change));
      }
      highest[n] = now;
    }
    for (int key = 0; key < BLOCK; key += 2) {
      const float* at = logits + key * BLOCK + n * LANES;
      const __m512 even = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(at), now));
      const __m512 odd = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(at + BLOCK), now));
      add_pairs(totals[n], store_pairs(weights + key / 2 * PANEL_ROW + n * 2 * LANES, even, odd));
    }
  }
}

// out [B, H, T, D] and lse [B, H, T], the logarithm of the sum of exponentials. Without a bound on the logits
// (NEEDS_MAX) they are taken relative to the highest.
template <bool HAS_CAP, bool NEEDS_MAX>
void forward(const bf16* q, const bf16* k, const bf16* v, const std::int32_t* docs, bf16* out, float* lse,
             const Shape& shape, Logits<HAS_CAP> logits_of) {
  const int dim = shape.dim, length = shape.length, blocks = shape.blocks();
  const int kv_heads = shape.batch * shape.kv_heads, heads = shape.batch * shape.heads;
  Scratch shared(sizeof(bf16) * shape.padded() * kv_heads);
  bf16* values = shared.take<bf16>(shape.padded() * kv_heads);  // [B * G, block, D, 64]: transposed
#pragma omp parallel num_threads(shape.threads)
  {
    Scratch own((2 * sizeof(bf16) + sizeof(float)) * BLOCK * dim + (2 * sizeof(bf16) + sizeof(float)) * BLOCK * BLOCK);
    bf16 *queries = own.take<bf16>(BLOCK * dim), *room = own.take<bf16>(BLOCK * dim);
    float* sums = own.take<float>(BLOCK * dim);                                           // [D, 64 queries]
    bf16 *weights = own.take<bf16>(BLOCK * BLOCK), *panel = own.take<bf16>(BLOCK * BLOCK);  // keys by queries
    float* logits = own.take<float>(BLOCK * BLOCK);
#pragma omp for collapse(2)
    for (int head = 0; head < kv_heads; ++head) {
      for (int block = 0; block < blocks; ++block) {
        const bf16* from = v + shape.head(head) + std::size_t(block) * BLOCK * dim;
        bf16* to = values + head * shape.padded() + std::size_t(block) * BLOCK * dim;
        for (int d = 0; d < dim; d += BLOCK) transpose_bf16(from + d, dim, shape.size(block), panel, to + d * BLOCK);
      }
    }
    // The longest first, so that none is left alone at the end.
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (int from_last = 0; from_last < blocks; ++from_last) {
      for (int head = 0; head < heads; ++head) {
        const int block = blocks - 1 - from_last, start = block * BLOCK, size = shape.size(block);
        const int kv_head = shape.kv_head(head);
        const Visibility visible(docs == nullptr ? nullptr : docs + std::size_t(head / shape.heads) * length, length);
        transpose(q + shape.head(head) + std::size_t(start) * dim, dim / 2, size, dim / 2, BLOCK, queries);
        std::memset(sums, 0, sizeof(float) * BLOCK * dim);
        __m512 totals[VECTORS], highest[VECTORS];
        for (int n = 0; n < VECTORS; ++n) totals[n] = all(0.0f), highest[n] = all(NEEDS_MAX ? HIDDEN : 0.0f);
        for (int key_block = 0; key_block <= block; ++key_block) {
          const int first_key = key_block * BLOCK;
          if (visible.none(start, first_key)) continue;
          const bool is_masked = !visible.every(start, first_key);
          const bf16* keys = filled_up(k + shape.head(kv_head) + std::size_t(first_key) * dim, shape.size(key_block),
                                       dim, room);
          for (int row = 0; row < BLOCK; row += ROWS) {
            Tile tile;
            clear(tile);
            multiply(tile, keys + row * dim, dim, queries, dim / 2);
#pragma GCC unroll 2
            for (int r = 0; r < ROWS; r += 2) {
#pragma GCC unroll 4
              for (int n = 0; n < VECTORS; ++n) {
                __m512 e[2];
#pragma GCC unroll 2
                for (int i = 0; i < 2; ++i) {
                  const __m512 logit = _mm512_mul_ps(logits_of.inner(tile[r + i][n]), logits_of.factor());
                  __mmask16 seen = 0xffff;
                  if (is_masked) seen = visible.of(start + n * LANES, first_key + row + r + i);
                  if (NEEDS_MAX) {
                    e[i] = _mm512_mask_mov_ps(all(HIDDEN), seen, logit);
                    _mm512_storeu_ps(logits + (row + r + i) * BLOCK + n * LANES, e[i]);
                  } else {
                    e[i] = _mm512_maskz_mov_ps(seen, exp2_of(logit));
                  }
                }
                if (NEEDS_MAX) continue;
                bf16* to = weights + (row + r) / 2 * PANEL_ROW + n * 2 * LANES;
                add_pairs(totals[n], store_pairs(to, e[0], e[1]));
              }
            }
          }
          // A query that has seen no key yet counts hidden ones; at its first, all that is scaled to nothing.
          if (NEEDS_MAX) exponentials_above(logits, dim, highest, totals, sums, weights);
          const bf16* block_values = values + kv_head * shape.padded() + std::size_t(first_key) * dim;
          multiply_add(sums, BLOCK, dim, block_values, BLOCK, weights, BLOCK / 2);
        }
        alignas(64) float total[BLOCK], high[BLOCK];
        __m512 inverse[VECTORS];
        for (int n = 0; n < VECTORS; ++n) {
          _mm512_store_ps(total + n * LANES, totals[n]);
          _mm512_store_ps(high + n * LANES, highest[n]);
          inverse[n] = _mm512_div_ps(all(1.0f), totals[n]);
        }
        const std::size_t row = std::size_t(head) * length + start;
        store_transposed(sums, dim, size, inverse, out + row * dim, dim);
        for (int i = 0; i < size; ++i) lse[row + i] = std::log(total[i]) + high[i] / LOG2E;
      }
    }
  }
}

// What the backward pass of a query head reads, by blocks of queries, in the layouts that its products want.
struct QueryHead {
  bf16 *queries, *grads;          // transposed panels [D / 2, 64, 2]
  bf16 *query_rows, *grad_rows;   // panels [D / 64, 32, 64, 2]
  float *norm, *delta;            // of a query: -log2 of its sum of exponentials; output times its gradient

  void lay_out(const bf16* q, const bf16* grad, const bf16* out, const float* lse, int head, const Shape& shape) const {
    const int dim = shape.dim;
    for (int block = 0; block < shape.blocks(); ++block) {
      const int start = block * BLOCK, size = shape.size(block);
      const std::size_t at = shape.head(head) + std::size_t(start) * dim, to = std::size_t(start) * dim;
      transpose(q + at, dim / 2, size, dim / 2, BLOCK, queries + to);
      transpose(grad + at, dim / 2, size, dim / 2, BLOCK, grads + to);
      for (int d = 0; d < dim; d += BLOCK) {
        interleave(q + at + d, dim, size, query_rows + to + d * BLOCK);
        interleave(grad + at + d, dim, size, grad_rows + to + d * BLOCK);
      }
      for (int row = 0; row < BLOCK; ++row) {
        __m512 sum = all(0.0f);
        for (int d = 0; row < size && d < dim; d += LANES) {
          const std::size_t from = at + std::size_t(row) * dim + d;
          sum = _mm512_fmadd_ps(floats(grad + from), floats(out + from), sum);
        }
        delta[start + row] = _mm512_reduce_add_ps(sum);
        norm[start + row] = row < size ? -LOG2E * lse[std::size_t(head) * shape.length + start + row] : 0.0f;
      }
    }
  }
};

// The softmax weights of a block and the gradients of its scores, as its products read them.
struct Weights {
  bf16 *weights, *grads;  // [64 keys, 64 queries]
  bf16* grad_pairs;       // the latter as a panel
  float* slopes;          // [4, 64]

  template <bool HAS_CAP>
  void make(const bf16* keys, const bf16* values, const QueryHead& of, int start, int first_key, int dim,
            const Visibility& visible, const Logits<HAS_CAP>& logits_of) const {
    const bool is_masked = !visible.every(start, first_key);
    const std::size_t at = std::size_t(start) * dim;
    for (int row = 0; row < BLOCK; row += ROWS) {
      Tile tile;
      clear(tile);
      multiply(tile, keys + row * dim, dim, of.queries + at, dim / 2);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int n = 0; n < VECTORS; ++n) {
          const __m512 inner = logits_of.inner(tile[r][n]);
          const __m512 norm = _mm512_loadu_ps(of.norm + start + n * LANES);
          __m512 weight = exp2_of(_mm512_fmadd_ps(inner, logits_of.factor(), norm));
          if (is_masked) weight = _mm512_maskz_mov_ps(visible.of(start + n * LANES, first_key + row + r), weight);
          store_bf16(weights + (row + r) * BLOCK + n * LANES, weight);
          _mm512_storeu_ps(slopes + r * BLOCK + n * LANES, logits_of.slope(inner, weight));
        }
      }
      clear(tile);
      multiply(tile, values + row * dim, dim, of.grads + at, dim / 2);
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; r += 2) {
#pragma GCC unroll 4
        for (int n = 0; n < VECTORS; ++n) {
          __m512 grad[2];
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) {
            const __m512 less = _mm512_sub_ps(tile[r + i][n], _mm512_loadu_ps(of.delta + start + n * LANES));
            grad[i] = _mm512_mul_ps(_mm512_loadu_ps(slopes + (r + i) * BLOCK + n * LANES), less);
            store_bf16(grads + (row + r + i) * BLOCK + n * LANES, grad[i]);
          }
          store_pairs(grad_pairs + (row + r) / 2 * PANEL_ROW + n * 2 * LANES, grad[0], grad[1]);
        }
      }
    }
  }
};

// Gradients [B, H, T, D] of q; [B, G, T, D] of k and v, summed over the query heads that share a key head.
template <bool HAS_CAP>
void backward(const bf16* grad, const bf16* q, const bf16* k, const bf16* v, const bf16* out, const float* lse,
              const std::int32_t* docs, bf16* grad_q, bf16* grad_k, bf16* grad_v, const Shape& shape,
              Logits<HAS_CAP> logits_of) {
  const int dim = shape.dim, length = shape.length, blocks = shape.blocks(), heads = shape.batch * shape.heads;
  const std::size_t padded = shape.padded();
  Scratch shared(2 * sizeof(float) * padded * heads);
  float *sums_k = shared.take<float>(padded * heads), *sums_v = shared.take<float>(padded * heads);
  const __m512 ones[VECTORS] = {all(1.0f), all(1.0f), all(1.0f), all(1.0f)};
#pragma omp parallel num_threads(shape.threads)
  {
    Scratch own((4 * sizeof(bf16) + sizeof(float)) * padded + 3 * sizeof(bf16) * BLOCK * (dim + BLOCK) +
                sizeof(bf16) * BLOCK * BLOCK + sizeof(float) * BLOCK * (2 * blocks + ROWS));
    const QueryHead of{own.take<bf16>(padded),          own.take<bf16>(padded),
                       own.take<bf16>(padded),          own.take<bf16>(padded),
                       own.take<float>(blocks * BLOCK), own.take<float>(blocks * BLOCK)};
    const Weights made{own.take<bf16>(BLOCK * BLOCK), own.take<bf16>(BLOCK * BLOCK), own.take<bf16>(BLOCK * BLOCK),
                       own.take<float>(ROWS * BLOCK)};
    float* sums_q = own.take<float>(padded);  // [block, D, 64 queries]
    bf16 *key_room = own.take<bf16>(BLOCK * dim), *value_room = own.take<bf16>(BLOCK * dim);
    bf16 *keys_transposed = own.take<bf16>(BLOCK * dim), *panel = own.take<bf16>(BLOCK * BLOCK);
#pragma omp for schedule(dynamic, 1)
    for (int head = 0; head < heads; ++head) {
      const Visibility visible(docs == nullptr ? nullptr : docs + std::size_t(head / shape.heads) * length, length);
      of.lay_out(q, grad, out, lse, head, shape);
      std::memset(sums_q, 0, sizeof(float) * padded);
      for (int key_block = 0; key_block < blocks; ++key_block) {
        const int first_key = key_block * BLOCK;
        const std::size_t at = shape.head(shape.kv_head(head)) + std::size_t(first_key) * dim;
        const bf16* keys = filled_up(k + at, shape.size(key_block), dim, key_room);
        const bf16* values = filled_up(v + at, shape.size(key_block), dim, value_room);
        for (int d = 0; d < dim; d += BLOCK) transpose_bf16(keys + d, dim, BLOCK, panel, keys_transposed + d * BLOCK);
        float* sum_k = sums_k + head * padded + std::size_t(first_key) * dim;
        float* sum_v = sums_v + head * padded + std::size_t(first_key) * dim;
        std::memset(sum_k, 0, sizeof(float) * BLOCK * dim);
        std::memset(sum_v, 0, sizeof(float) * BLOCK * dim);
        for (int block = key_block; block < blocks; ++block) {
          const int start = block * BLOCK;
          if (visible.none(start, first_key)) continue;
          made.make(keys, values, of, start, first_key, dim, visible, logits_of);
          for (int d = 0; d < dim; d += BLOCK) {
            const std::size_t rows = std::size_t(start) * dim + d * BLOCK;
            multiply_add(sum_v + d, dim, BLOCK, made.weights, BLOCK, of.grad_rows + rows, BLOCK / 2);
            multiply_add(sum_k + d, dim, BLOCK, made.grads, BLOCK, of.query_rows + rows, BLOCK / 2);
          }
          float* sum_q = sums_q + std::size_t(start) * dim;
          multiply_add(sum_q, BLOCK, dim, keys_transposed, BLOCK, made.grad_pairs, BLOCK / 2);
        }
      }
      for (int block = 0; block < blocks; ++block) {
        const std::size_t start = std::size_t(block) * BLOCK * dim;
        store_transposed(sums_q + start, dim, shape.size(block), ones, grad_q + shape.head(head) + start, dim);
      }
    }
    const int sharing = shape.heads / shape.kv_heads;
#pragma omp for collapse(2)
    for (int kv_head = 0; kv_head < shape.batch * shape.kv_heads; ++kv_head) {
      for (int row = 0; row < length; ++row) {
        for (int d = 0; d < dim; d += LANES) {
          __m512 of_k = all(0.0f), of_v = all(0.0f);
          for (int head = kv_head * sharing; head < (kv_head + 1) * sharing; ++head) {
            const std::size_t from = head * padded + std::size_t(row) * dim + d;
            of_k = _mm512_add_ps(of_k, _mm512_loadu_ps(sums_k + from));
            of_v = _mm512_add_ps(of_v, _mm512_loadu_ps(sums_v + from));
          }
          const std::size_t to = shape.head(kv_head) + std::size_t(row) * dim + d;
          store_bf16(grad_k + to, of_k);
          store_bf16(grad_v + to, of_v);
        }
      }
    }
  }
}

}  // namespace
}  // namespace smelter

extern "C" {

using smelter::bf16;

// needs_max: whether logits may be too large to exponentiate as they are. cap 0: none.
void smelter_attention_forward(const bf16* q, const bf16* k, const bf16* v, const std::int32_t* docs, bf16* out,
                               float* lse, int batch, int heads, int kv_heads, int length, int dim, int threads,
                               float scale, float cap, int needs_max) {
  const smelter::Shape shape{batch, heads, kv_heads, length, dim, threads};
  const smelter::Logits<true> capped{scale, cap};
  if (cap == 0.0f) {
    smelter::forward<false, true>(q, k, v, docs, out, lse, shape, {scale, cap});
  } else if (needs_max) {
    smelter::forward<true, true>(q, k, v, docs, out, lse, shape, capped);
  } else {
    smelter::forward<true, false>(q, k, v, docs, out, lse, shape, capped);
  }
}

void smelter_attention_backward(const bf16* grad, const bf16* q, const bf16* k, const bf16* v, const bf16* out,
                                const float* lse, const std::int32_t* docs, bf16* grad_q, bf16* grad_k, bf16* grad_v,
                                int batch, int heads, int kv_heads, int length, int dim, int threads, float scale,
                                float cap) {
  const smelter::Shape shape{batch, heads, kv_heads, length, dim, threads};
  if (cap == 0.0f) {
    smelter::backward<false>(grad, q, k, v, out, lse, docs, grad_q, grad_k, grad_v, shape, {scale, cap});
  } else {
    smelter::backward<true>(grad, q, k, v, out, lse, docs, grad_q, grad_k, grad_v, shape, {scale, cap});
  }
}
}
