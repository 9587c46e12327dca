// AVX2 and FMA: int8 weights are widened to 16 bits, since vpmaddubsw saturates; bf16 to fp32.
#include <immintrin.h>

#include "../../kernels/kernel_table.h"

#define KT_VEC_BYTES 32
#define KT_STREAM(p, v) _mm256_stream_ps(p, reinterpret_cast<__m256>(v))
#define KT_PROJECT_ROWS 2
#define KT_EXPAND_ROWS 2
#define KT_OUTER_RANKS 4
#define KT_OUTER_PARTS 2

namespace kt {
namespace {

constexpr bool kS16Rows = true;
constexpr bool kF32Rows = true;

#include "../../kernels/row_kernels.inl"
#include "avx2_transposes.inl"
#include "../../kernels/placements.inl"
#include "../../kernels/burn.inl"
#include "../../kernels/vector_dots.inl"
#include "../../kernels/s16_dot.inl"
#include "../../kernels/f32_dot.inl"

}  // namespace

const KernelTable kAvx2Kernels = KT_TABLE("avx2", "dot_s16s16_5x16 (vpmaddwd)",
                                          "dot_f32_6x16 (vfmadd231ps)", kS16, kF32, 10, 10, 12);

}  // namespace kt
