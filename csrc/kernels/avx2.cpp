// AVX2 and FMA. Bytes are widened to 16 bits because vpmaddubsw saturates.
#include <immintrin.h>

#include "kernel_table.h"

#define KT_VEC_BYTES 32
#define KT_PROJECT_ROWS 2
#define KT_EXPAND_ROWS 2
#define KT_OUTER_RANKS 4
#define KT_OUTER_PARTS 2

namespace kt {
namespace {

#include "row_kernels.inl"

// Four signed activation bytes as four 16-bit values in every 64-bit lane.
inline __m256i broadcast_activation(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four)));
}

// Each accumulator holds 4 outputs as two partial sums; two of them make 8 outputs.
inline __m256i join_partials(__m256i a, __m256i b) {
  return _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), _MM_SHUFFLE(3, 1, 2, 0));
}

template <int kRows>
inline void dot_rows_u8s8(int64_t blocks, const int8_t* a, int64_t lda, const uint8_t* half,
                          int32_t* c) {
  __m256i acc[kRows][4];
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < 4; ++v) acc[m][v] = _mm256_setzero_si256();
  for (int64_t b = 0; b < blocks; ++b)
    for (int k4 = 0; k4 < 16; ++k4) {
      const uint8_t* w = half + b * kTileBytesInt8 + k4 * 64;
      __m256i weight[4];
      for (int v = 0; v < 4; ++v)
        weight[v] =
            _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + v * 16)));
      for (int m = 0; m < kRows; ++m) {
        const __m256i x = broadcast_activation(a + m * lda + b * kBlock + k4 * 4);
        for (int v = 0; v < 4; ++v)
          acc[m][v] = _mm256_add_epi32(acc[m][v], _mm256_madd_epi16(weight[v], x));
      }
    }
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < 2; ++v)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + m * kPanelCols + v * 8),
                          join_partials(acc[m][2 * v], acc[m][2 * v + 1]));
}

void dot_u8s8(int rows, int64_t blocks, const int8_t* a, int64_t lda, const uint8_t* panel,
              int32_t* c, const Prefetch& next) {
  for (int m = 0; m < rows; m += 2) {
    prefetch_some(next, next.count * m / rows, next.count * (m + 2 < rows ? m + 2 : rows) / rows);
    for (int half = 0; half < 2; ++half) {
      const int8_t* x = a + m * lda;
      int32_t* out = c + m * kPanelCols + half * 16;
      if (m + 2 <= rows)
        dot_rows_u8s8<2>(blocks, x, lda, panel + half * 1024, out);
      else
        dot_rows_u8s8<1>(blocks, x, lda, panel + half * 1024, out);
    }
  }
}

template <int kRows>
inline void dot_rows_bf16(int64_t blocks, const uint16_t* a, int64_t lda, const uint16_t* panel,
                          float* c) {
  const __m256i high_mask = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
  __m256 acc[kRows][2];
  for (int m = 0; m < kRows; ++m) acc[m][0] = acc[m][1] = _mm256_setzero_ps();
  for (int64_t k2 = 0; k2 < blocks * 32; ++k2) {
    __m256 even[2], odd[2];
    for (int v = 0; v < 2; ++v) {
      const __m256i w =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + k2 * 64 + v * 16));
      even[v] = _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
      odd[v] = _mm256_castsi256_ps(_mm256_and_si256(w, high_mask));
    }
    for (int m = 0; m < kRows; ++m) {
      int32_t pair;
      __builtin_memcpy(&pair, a + m * lda + k2 * 2, 4);
      const __m256i x = _mm256_set1_epi32(pair);
      const __m256 x0 = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
      const __m256 x1 = _mm256_castsi256_ps(_mm256_and_si256(x, high_mask));
      for (int v = 0; v < 2; ++v)
        acc[m][v] = _mm256_fmadd_ps(odd[v], x1, _mm256_fmadd_ps(even[v], x0, acc[m][v]));
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < 2; ++v) _mm256_storeu_ps(c + m * kPanelCols + v * 8, acc[m][v]);
}

void dot_bf16(int rows, int64_t blocks, const uint16_t* a, int64_t lda, const uint16_t* panel,
              float* c, const Prefetch& next) {
  prefetch_some(next, 0, next.count);
  int m = 0;
  for (; m + 3 <= rows; m += 3)
    for (int half = 0; half < 2; ++half)
      dot_rows_bf16<3>(blocks, a + m * lda, lda, panel + half * 32, c + m * kPanelCols + half * 16);
  for (; m < rows; ++m)
    for (int half = 0; half < 2; ++half)
      dot_rows_bf16<1>(blocks, a + m * lda, lda, panel + half * 32, c + m * kPanelCols + half * 16);
}

void transpose_u8(const uint8_t* tile, uint8_t* const pieces[4]) {
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int g = 0; g < 4; ++g)
    for (int q = 0; q < 4; ++q)
      for (int n4 = 0; n4 < 4; ++n4) {
        const __m128i four =
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + (4 * g + q) * 64 + n4 * 16));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(pieces[g] + n4 * 64 + q * 16),
                         _mm_shuffle_epi8(four, order));
      }
}

void transpose_bf16(const uint16_t* tile, uint16_t* const pieces[2]) {
  // Units of 64 bits hold 2 n by 2 k; a transposed unit swaps its middle two values.
  for (int k2 = 0; k2 < 32; ++k2)
    for (int n2 = 0; n2 < 16; ++n2) {
      uint64_t unit;
      __builtin_memcpy(&unit, tile + k2 * 64 + n2 * 4, 8);
      unit = (unit & 0xffff00000000ffffull) | (unit >> 16 & 0xffff0000ull) |
             (unit & 0xffff0000ull) << 16;
      __builtin_memcpy(pieces[k2 / 16] + n2 * 64 + (k2 % 16) * 4, &unit, 8);
    }
}

}  // namespace

const KernelTable kAvx2Kernels = KT_TABLE("avx2");

}  // namespace kt
