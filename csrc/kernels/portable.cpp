// Plain C++ for any x86-64 machine, and the readable statement of what every other ISA computes.
#include "kernel_table.h"

#define KT_VEC_BYTES 16
#define KT_PROJECT_ROWS 2
#define KT_EXPAND_ROWS 1
#define KT_OUTER_RANKS 2
#define KT_OUTER_PARTS 4

namespace kt {
namespace {

#include "row_kernels.inl"

void dot_u8s8(int rows, int64_t blocks, const int8_t* a, int64_t lda, const uint8_t* panel,
              int32_t* c, const Prefetch&) {
  for (int m = 0; m < rows; ++m)
    for (int j = 0; j < kPanelCols; ++j) c[m * kPanelCols + j] = 0;
  for (int64_t b = 0; b < blocks; ++b)
    for (int m = 0; m < rows; ++m) {
      const int8_t* x = a + m * lda + b * kBlock;
      for (int k4 = 0; k4 < 16; ++k4)
        for (int j = 0; j < kPanelCols; ++j) {
          const uint8_t* w = panel + b * kTileBytesInt8 + (j / 16) * 1024 + k4 * 64 + (j % 16) * 4;
          int32_t sum = 0;
          for (int kk = 0; kk < 4; ++kk) sum += static_cast<int32_t>(w[kk]) * x[k4 * 4 + kk];
          c[m * kPanelCols + j] += sum;
        }
    }
}

void dot_bf16(int rows, int64_t blocks, const uint16_t* a, int64_t lda, const uint16_t* panel,
              float* c, const Prefetch&) {
  for (int m = 0; m < rows; ++m) {
    float* out = c + m * kPanelCols;
    for (int j = 0; j < kPanelCols; ++j) out[j] = 0.0f;
    for (int64_t b = 0; b < blocks; ++b)
      for (int k2 = 0; k2 < 32; ++k2) {
        const float x0 = float_from_bf16(a[m * lda + b * kBlock + k2 * 2]);
        const float x1 = float_from_bf16(a[m * lda + b * kBlock + k2 * 2 + 1]);
        const uint16_t* w = panel + (b * 32 + k2) * 64;
        for (int j = 0; j < kPanelCols; ++j)
          out[j] += float_from_bf16(w[2 * j]) * x0 + float_from_bf16(w[2 * j + 1]) * x1;
      }
  }
}

void transpose_u8(const uint8_t* tile, uint8_t* const pieces[4]) {
  for (int k = 0; k < 64; ++k)
    for (int n = 0; n < 16; ++n)
      pieces[k / 16][(n / 4) * 64 + (k % 16) * 4 + n % 4] = tile[(k / 4) * 64 + n * 4 + k % 4];
}

void transpose_bf16(const uint16_t* tile, uint16_t* const pieces[2]) {
  for (int k = 0; k < 64; ++k)
    for (int n = 0; n < 32; ++n)
      pieces[k / 32][(n / 2) * 64 + (k % 32) * 2 + n % 2] = tile[(k / 2) * 64 + n * 2 + k % 2];
}

}  // namespace

const KernelTable kPortableKernels = KT_TABLE("portable");

}  // namespace kt
