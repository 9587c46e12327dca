// AVX2 with AVX-VNNI (Alder Lake and later clients, Zen 5): byte products without AVX-512.
#include <immintrin.h>

#include "../../kernels/kernel_table.h"

#define KT_VEC_BYTES 32
#define KT_STREAM(p, v) _mm256_stream_ps(p, reinterpret_cast<__m256>(v))
#define KT_PROJECT_ROWS 2
#define KT_EXPAND_ROWS 2
#define KT_OUTER_RANKS 4
#define KT_OUTER_PARTS 2
// The VEX encoding; braces are escaped from the asm dialects.
#define KT_VNNI_PREFIX "%{vex%} "

namespace kt {
namespace {

constexpr bool kS16Rows = false;
constexpr bool kF32Rows = true;

#include "../../kernels/row_kernels.inl"
#include "avx2_transposes.inl"
#include "../../kernels/placements.inl"
#include "../../kernels/burn.inl"
#include "../../kernels/vector_dots.inl"
#include "../../kernels/vnni_dot.inl"
#include "../../kernels/f32_dot.inl"

}  // namespace

const KernelTable kAvxVnniKernels = KT_TABLE("avx_vnni", "dot_u8s8_6x16 (vpdpbusd)",
                                             "dot_f32_6x16 (vfmadd231ps)", kU8, kF32, 12, 6, 12);

}  // namespace kt
