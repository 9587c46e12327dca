// AVX-512 with VNNI and without BF16 (Cascade Lake, Ice Lake): bf16 weights are widened to fp32.
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

constexpr bool kS16Rows = false;
constexpr bool kF32Rows = true;

#include "../../kernels/row_kernels.inl"
#include "avx512_transposes.inl"
#include "../../kernels/placements.inl"
#include "../../kernels/burn.inl"
#include "../../kernels/vector_dots.inl"
#include "../../kernels/vnni_dot.inl"
#include "../../kernels/f32_dot.inl"

}  // namespace

const KernelTable kAvx512VnniKernels =
    KT_TABLE("avx512_vnni", "dot_u8s8_14x32 (vpdpbusd)", "dot_f32_14x32 (vfmadd231ps)", kU8, kF32,
             14, 7, 14);

}  // namespace kt
