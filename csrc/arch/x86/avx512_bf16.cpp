// AVX-512 with VNNI and BF16: both products in one instruction.
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
constexpr bool kF32Rows = false;

#include "../../kernels/row_kernels.inl"
#include "avx512_transposes.inl"
#include "../../kernels/placements.inl"
#include "../../kernels/burn.inl"
#include "../../kernels/vector_dots.inl"
#include "../../kernels/vnni_dot.inl"
#include "../../kernels/bf16_dot.inl"

}  // namespace

const KernelTable kAvx512Bf16Kernels =
    KT_TABLE("avx512_bf16", "dot_u8s8_14x32 (vpdpbusd)", "dot_bf16_14x32 (vdpbf16ps)", kU8, kBf16,
             14, 7, 14);

}  // namespace kt
