// AVX-512 without VNNI and BF16 (Skylake): int8 weights are widened to 16 bits, bf16 to fp32.
#include <immintrin.h>

#include "../../kernels/kernel_table.h"

#define KT_VEC_BYTES 64
#define KT_STREAM(p, v) _mm512_stream_ps(p, reinterpret_cast<__m512>(v))
#define KT_PROJECT_ROWS 4
#define KT_EXPAND_ROWS 7
#define KT_OUTER_RANKS 8
#define KT_OUTER_PARTS 2

namespace kt {
namespace {

constexpr bool kS16Rows = true;
constexpr bool kF32Rows = true;

#include "../../kernels/row_kernels.inl"
#include "avx512_transposes.inl"
#include "../../kernels/placements.inl"
#include "../../kernels/burn.inl"
#include "../../kernels/vector_dots.inl"
#include "../../kernels/s16_dot.inl"
#include "../../kernels/f32_dot.inl"

}  // namespace

const KernelTable kAvx512Kernels = KT_TABLE("avx512", "dot_s16s16_12x32 (vpmaddwd)",
                                            "dot_f32_14x32 (vfmadd231ps)", kS16, kF32, 12, 12, 14);

}  // namespace kt
