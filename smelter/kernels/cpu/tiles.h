// Products of bf16 matrices in tiles of 4 x 64 float32 sums, held in registers, and the layouts that they read.
//
// The instruction (AVX-512 BF16's VDPBF16PS) multiplies pairs: 16 sums each take a[2p] * b[2p] + a[2p + 1] * b[2p + 1].
// A left matrix is read as it lies in memory, two neighbours of a row at a time. A right matrix [K, 64] must lie as a
// panel, [K / 2, 64, 2]: rows 2p and 2p + 1 side by side. `interleave` makes a panel of rows, `transpose` (of 32 bits,
// each a pair) one of a transposed matrix.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace smelter {

using bf16 = std::uint16_t;

constexpr int BLOCK = 64;                // columns of a panel
constexpr int LANES = 16;                // float32 in a register
constexpr int VECTORS = BLOCK / LANES;   // registers in a row of a tile
constexpr int ROWS = 4;                  // of a tile
constexpr int PANEL_ROW = 2 * BLOCK;     // bf16 in a row of a panel

using Tile = __m512[ROWS][VECTORS];

// Memory that lasts as long as this, handed out in parts that begin at cache lines.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes)
      : memory_(std::aligned_alloc(64, rounded(bytes)), &std::free), next_(static_cast<char*>(memory_.get())) {
    if (next_ != nullptr) return;
    std::fprintf(stderr, "smelter: out of memory: %zu bytes\n", bytes);
    std::abort();  // no exception may leave a parallel region
  }

  template <class T>
  T* take(std::size_t count) {
    T* part = reinterpret_cast<T*>(next_);
    next_ += rounded(count * sizeof(T));
    return part;
  }

  static std::size_t rounded(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  std::unique_ptr<void, decltype(&std::free)> memory_;
  char* next_;
};

inline __m512 all(float value) { return _mm512_set1_ps(value); }

inline __m512 floats(const bf16* from) {
  return _mm512_cvtpbh_ps((__m256bh)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline void store_bf16(bf16* to, __m512 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(values));
}

// A row's part of a panel, returned and stored: to[2c] = even[c], to[2c + 1] = odd[c], 16 columns.
inline __m512bh store_pairs(bf16* to, __m512 even, __m512 odd) {
  alignas(64) static const std::uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  const __m512i pairs = _mm512_permutexvar_epi16(_mm512_load_si512(order), both);
  _mm512_storeu_si512(to, pairs);
  return (__m512bh)pairs;
}

inline void clear(Tile& tile) {
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) tile[r][n] = _mm512_setzero_ps();
  }
}

// tile [4, 64] += a [4, 2 * pairs], rows `stride` apart, times a panel.
inline __attribute__((always_inline)) void multiply(Tile& tile, const bf16* a, int stride, const bf16* panel,
                                                    int pairs) {
  for (int p = 0; p < pairs; ++p) {
    __m512bh b[VECTORS];
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) b[n] = (__m512bh)_mm512_loadu_si512(panel + p * PANEL_ROW + n * 2 * LANES);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      int pair;
      std::memcpy(&pair, a + r * stride + 2 * p, sizeof pair);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int n = 0; n < VECTORS; ++n) tile[r][n] = _mm512_dpbf16_ps(tile[r][n], x, b[n]);
    }
  }
}

// sums [rows, 64], `width` apart, += a [rows, 2 * pairs], `stride` apart, times a panel; rows in fours.
inline void multiply_add(float* sums, int width, int rows, const bf16* a, int stride, const bf16* panel, int pairs) {
  for (int row = 0; row < rows; row += ROWS) {
    Tile tile;
    float* to = sums + row * width;
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < VECTORS; ++n) tile[r][n] = _mm512_loadu_ps(to + r * width + n * LANES);
    }
    multiply(tile, a + row * stride, stride, panel, pairs);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < VECTORS; ++n) _mm512_storeu_ps(to + r * width + n * LANES, tile[r][n]);
    }
  }
}

// 16 x 16 of 32 bits, in registers.
inline void transpose_registers(__m512i (&x)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    x[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    x[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    x[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // Now x[4 g + c] holds rows 4 g to 4 g + 3 of columns c, 4 + c, 8 + c and 12 + c, 128 bits each.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i even_low = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88);
    const __m512i even_high = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xdd);
    const __m512i odd_high = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = t[i];
}

// to [columns, all_rows] = from [rows, columns] transposed, in 32 bits; columns and all_rows are multiples of 16. Rows
// from `rows` on are taken for zeros.
inline void transpose(const void* from, int stride, int rows, int columns, int all_rows, void* to) {
  const auto* source = static_cast<const std::int32_t*>(from);
  auto* target = static_cast<std::int32_t*>(to);
  for (int row = 0; row < all_rows; row += LANES) {
    for (int column = 0; column < columns; column += LANES) {
      __m512i x[LANES];
      for (int i = 0; i < LANES; ++i) {
        const std::ptrdiff_t at = std::ptrdiff_t(row + i) * stride + column;
        x[i] = row + i < rows ? _mm512_loadu_si512(source + at) : _mm512_setzero_si512();
      }
      transpose_registers(x);
      for (int i = 0; i < LANES; ++i) _mm512_storeu_si512(target + (column + i) * all_rows + row, x[i]);
    }
  }
}

// Panel [32, 64, 2] of from [64, 64], `stride` apart; rows from `rows` on are taken for zeros.
inline void interleave(const bf16* from, int stride, int rows, bf16* panel) {
  alignas(64) static const std::uint16_t order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(order), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int p = 0; p < BLOCK / 2; ++p) {
    for (int column = 0; column < BLOCK; column += 2 * LANES) {
      const bf16* at = from + std::ptrdiff_t(2 * p) * stride + column;
      const __m512i even = 2 * p < rows ? _mm512_loadu_si512(at) : _mm512_setzero_si512();
      const __m512i odd = 2 * p + 1 < rows ? _mm512_loadu_si512(at + stride) : _mm512_setzero_si512();
      bf16* to = panel + p * PANEL_ROW + 2 * column;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_storeu_si512(to + 2 * LANES, _mm512_permutex2var_epi16(even, high, odd));
    }
  }
}

// to [64, 64] = from [64, 64], `stride` apart, transposed; rows from `rows` on are zeros. `panel`: room for a panel.
inline void transpose_bf16(const bf16* from, int stride, int rows, bf16* panel, bf16* to) {
  interleave(from, stride, rows, panel);
  transpose(panel, BLOCK, BLOCK / 2, BLOCK, BLOCK / 2, to);
}

// to [size, D], `stride` apart, in bf16 = sums [D, 64] transposed, times a factor for each of the 64.
inline void store_transposed(const float* sums, int dim, int size, const __m512 (&factors)[VECTORS], bf16* to,
                             int stride) {
  for (int d = 0; d < dim; d += LANES) {
    for (int n = 0; n < VECTORS; ++n) {
      __m512i x[LANES];
      for (int i = 0; i < LANES; ++i) {
        x[i] = (__m512i)_mm512_mul_ps(factors[n], _mm512_loadu_ps(sums + (d + i) * BLOCK + n * LANES));
      }
      transpose_registers(x);
      for (int i = 0; i < LANES && n * LANES + i < size; ++i) {
        store_bf16(to + std::ptrdiff_t(n * LANES + i) * stride + d, (__m512)x[i]);
      }
    }
  }
}

}  // namespace smelter
