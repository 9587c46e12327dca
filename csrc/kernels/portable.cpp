// Plain C++ for any x86-64 machine, and the readable statement of what every other ISA computes.
#include "kernel_table.h"

#define KT_VEC_BYTES 16
#define KT_STREAM(p, v) store(p, v)
#define KT_PROJECT_ROWS 2
#define KT_EXPAND_ROWS 1
#define KT_OUTER_RANKS 2
#define KT_OUTER_PARTS 4

namespace kt {
namespace {

constexpr bool kS16Rows = false;
constexpr bool kF32Rows = false;

#include "row_kernels.inl"

void dot_int(int rows, int terms, int64_t blocks, const void* a, int64_t row_bytes,
             const void* panel, bool accumulate, int32_t* c, const Prefetch&) {
  const int64_t stride = row_bytes / terms;
  for (int m = 0; m < rows * terms; ++m) {
    int32_t* out = c + m * kPanelCols;
    for (int j = 0; j < kPanelCols && !accumulate; ++j) out[j] = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int8_t* x = static_cast<const int8_t*>(a) + m * stride + b * kBlock;
      const uint8_t* block = static_cast<const uint8_t*>(panel) + b * kTileBytesInt8;
      for (int k4 = 0; k4 < 16; ++k4)
        for (int j = 0; j < kPanelCols; ++j) {
          const uint8_t* w = block + (j / 16) * 1024 + k4 * 64 + (j % 16) * 4;
          for (int kk = 0; kk < 4; ++kk) out[j] += static_cast<int32_t>(w[kk]) * x[k4 * 4 + kk];
        }
    }
  }
}

void dot_float(int rows, int64_t blocks, const void* a, int64_t row_bytes, const void* panel,
               bool accumulate, float* c, const Prefetch&) {
  for (int m = 0; m < rows; ++m) {
    const uint16_t* x =
        reinterpret_cast<const uint16_t*>(static_cast<const char*>(a) + m * row_bytes);
    float* out = c + m * kPanelCols;
    for (int j = 0; j < kPanelCols && !accumulate; ++j) out[j] = 0.0f;
    for (int64_t k2 = 0; k2 < blocks * 32; ++k2) {
      const float x0 = float_from_bf16(x[k2 * 2]), x1 = float_from_bf16(x[k2 * 2 + 1]);
      const uint16_t* w = static_cast<const uint16_t*>(panel) + k2 * 64;
      for (int j = 0; j < kPanelCols; ++j)
        out[j] += float_from_bf16(w[2 * j]) * x0 + float_from_bf16(w[2 * j + 1]) * x1;
    }
  }
}

int64_t burn_fp32(int64_t rounds) {
  VecF a = splat(1.0f), b = a, c = a, d = a;
  const VecF factor = splat(0.999f), term = splat(0.001f);
  for (int64_t r = 0; r < rounds; ++r) {
    a = a * factor + term;
    b = b * factor + term;
    c = c * factor + term;
    d = d * factor + term;
    asm volatile("" : "+x"(a), "+x"(b), "+x"(c), "+x"(d));  // or equal chains become one
  }
  return rounds * 4 * kLanes * 2;
}
// Without instructions for either, both are fp32 arithmetic.
int64_t burn_int(int64_t rounds) { return burn_fp32(rounds); }
int64_t burn_bf16(int64_t rounds) { return burn_fp32(rounds); }

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

#include "placements.inl"

}  // namespace

const KernelTable kPortableKernels =
    KT_TABLE("portable", "dot_u8s8 (scalar)", "dot_bf16 (scalar)", kU8, kBf16, 14, 7, 14);

}  // namespace kt
