// The contract between the experts block and an instruction set: one table of functions per ISA,
// declared, filled, tested and reported from the rows of KT_KERNELS.
//
// Legend (shared with the Python package): T tokens, D hidden size, F intermediate size, E experts,
// K top-k, R = T*K routed rows, M rows of one expert, r LoRA rank. Every D and F below is padded to
// a multiple of 64, padding is zero in activations and a zero weight in panels.
//
// Stored weights. A super tile is 32 outputs n by 64 inputs k:
//   int8: [2 halves][16 k4][16 n][4 kk] bytes q + 128                          (2048 bytes)
//   int4: [2 halves][8 k4][16 n][4 kk] bytes, low nibble of k4, high nibble that of k4 + 8, with
//         one multiplier m in 1..16 per output and group of k: q = m * c, c = nibble - 8, or
//         nibble - 7 where the multiplier is marked kInt4Raised                 (1024 bytes)
//   bf16: [32 k2][32 n][2 kk]                                                   (4096 bytes)
//   coded, 8 bits: [32 k2][32 n][2 kk], a code each                             (2048 bytes)
//   coded, 4 bits: [16 k2][32 n][2 kk], low nibble k2, high nibble k2 + 16      (1024 bytes)
//
// Panels are what the dot products read: 32 outputs by the contraction, in blocks of 64, in the
// form that suits the ISA (PanelForm). Forward panels that have the stored form are read in place;
// all others, and every backward panel (the same shape with n and k exchanged), are built by the
// place_* kernels in a thread's buffer.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../arch/cpu.h"

namespace kt {

constexpr int64_t kPanelCols = 32;          // outputs of one panel
constexpr int64_t kBlock = 64;              // contraction length of one super tile
constexpr int64_t kTileBytesInt8 = 2048;    // one stored super tile, int8
constexpr int64_t kTileBytesInt4 = 1024;    // one stored super tile, int4
constexpr int64_t kTileBytesBf16 = 4096;    // one stored super tile, bf16
constexpr int64_t kTileBytesCode8 = 2048;   // one stored super tile of 8-bit codes
constexpr int64_t kTileBytesCode4 = 1024;   // one stored super tile of 4-bit codes
constexpr uint8_t kInt4Raised = 0x80;       // with a multiplier: levels are -7..8, not -8..7
constexpr int kMaxDotRows = 32;             // the tallest tile of any ISA: two AMX tiles
constexpr float kExactLevels = 32639.0f;    // 127 * 256 + 127: the largest |256 * hi + lo|
constexpr int64_t kMaxContraction = 65536;  // longest row of a product: int32 sums stay exact

enum class Activation : int { kSwish = 0, kGeluErf, kGeluTanh, kRelu, kRelu2 };
constexpr int kActivationCount = 5;

enum class FloatType : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// What a code of a published format stands for, before its group's zero point and scale:
// fp8 (OCP E4M3, no infinities), fp4 (OCP E2M1), unsigned integers of 8 and 4 bits.
enum class CodeKind : int { kE4m3 = 0, kE2m1, kUint8, kUint4 };
constexpr bool is_four_bit(CodeKind kind) {
  return kind == CodeKind::kE2m1 || kind == CodeKind::kUint4;
}

// The groups that a coded super tile meets: for its k < 32 and k >= 32, one value for each of
// [32 n][2 kk], equal for both kk.
struct CodeScales {
  float scale[2][64];
  float zero[2][64];
};

// h = act(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset); without a gate it is
// act(min(up, limit)).
// Swish is x * sigmoid(alpha * x): SiLU for alpha 1, the quick GELU for 1.702.
struct Gate {
  Activation activation = Activation::kSwish;
  bool gated = true;
  float alpha = 1.0f;
  float limit = __builtin_inff();
  float up_offset = 0.0f;
};

// One block of a panel, 64 of the contraction by 32 outputs, and the activations that go with it.
enum class PanelForm : int {
  kU8 = 0,    // [2 halves][16 k4][16 n][4 kk], q + 128; rows in int8, one for each term
  kS16 = 1,   // [32 k2][32 n][2 kk], q; rows in int16, both terms in one
  kBf16 = 2,  // [32 k2][32 n][2 kk]; rows in bf16
  kF32 = 3,   // [64 k][32 n]; rows in fp32
};
constexpr int64_t kPanelBlockBytes[] = {2048, 4096, 4096, 8192};

// Cache lines to bring into L2 while a panel is computed: `count` lines of 64 bytes; line i lies at
// base + (i / tile_lines) * tile_stride + (i % tile_lines) * 64, tile_lines = 2^tile_shift.
struct Prefetch {
  const char* base = nullptr;
  int64_t tile_stride = 0;
  int tile_shift = 0;
  int64_t first = 0;
  int64_t count = 0;
};

struct DropoutKey {
  uint32_t row_key = 0;     // mixes seed, projection and routed row
  uint32_t threshold = 0;   // an element is dropped when its hash is below this
  float keep_scale = 1.0f;  // 1 / (1 - p)
};

// What gate_forward and gate_backward touch: `rows` rows of 32 columns. Pointers point at the first
// column of the first row; `ld` is the distance of rows in elements.
struct GateForward {
  int rows;
  const float* gate;  // tile [rows][32]; null without a gate
  const float* up;    // tile [rows][32]
  float* h;
  int64_t ldh;
  float* keep_gate;  // null: nothing is kept
  float* keep_up;
  int64_t ldk;
  bool stream;  // write past the caches
};
struct GateBackward {
  int rows;
  const float* weight;  // [rows] routing weights
  const float* dh;      // tile [rows][32], not yet weighted
  const float* gate;    // null without a gate
  const float* up;
  int64_t ldk;
  float* dgate;
  float* dup;
  int64_t ldd;
  float* h;  // null: not wanted
  int64_t ldh;
  float* d_weight;  // [rows] += <dh, h>, `ldw` apart
  int64_t ldw;
  bool stream;
};

// clang-format off
// One row per kernel: result, name, arguments. Contracts:
//
// dot_int      c = sum over k of panel[k][j] * a[m][k], exactly, m < rows <= max_int_rows[terms-1].
//              kU8: c[m * terms + t] takes term t of row m, with weights q + 128.
//              kS16: one term: c[m]; two: 256 * c[2m] + c[2m+1] is the sum.
//              `accumulate` adds to c. Rows are row_bytes apart.
// dot_float    the same in fp32: c[m][j] (+)= sum over k of panel[k][j] * a[m][k].
// scale_tile   y[m][j] = row_scale[m] * col_scale[j] * (sum over terms t of 256^(terms-1-t) *
//              (c[m*terms+t][j] - 128 * row_sum[m*terms+t])); col_scale null means 1.
// place_int_forward    half a stored int8 super tile (16 n) into its half of a panel block.
// place_int_backward   the same tile into four pieces, one per 16 k: kU8 [4 n4][16 k][4 nn] each,
//                      kS16 [8 n2][16 k][2 nn] with rows 128 bytes apart.
// place_float_forward  one stored bf16 super tile into a panel block.
// place_float_backward one stored bf16 super tile into two pieces, one per 32 k:
//                      kBf16 [16 n2][32 k][2 nn], kF32 [32 n][32 k].
// unpack_int4  half an int4 super tile into half an int8 one; multipliers of the 16 outputs for
//              k < 32 and for k >= 32.
// decode_tile  a coded super tile into a bf16 one: (value(code) - zero) * scale in fp32, rounded to
//              nearest even.
// pack_int_row one row to terms: q = rint(x * fold * levels / absmax), levels 127 or 32639, as int8
//              terms at out and out + n (kU8; sums[t] = sum of term t) or int16 (kS16; sums 0). A
//              row with NaN or Inf gets scale NaN, so that it comes out as NaN; a zero row 0.
// pack_float_row       x * fold in the float panel's type. fold null means 1 in both.
// absmax_row   the largest |x|; NaN or Inf when there is one in the row.
// quantize_weight_row  scale = absmax / 127, out = rint(w / scale) + 128.
// quantize_int4_row    groups of `group` weights: w = scale * m * c as above; nibbles as bytes.
// gate_forward, gate_backward   see Gate; d_gate = weight * dh * (up + offset) * act'(gate) and
//              d_up = weight * dh * act(gate), zero where the clamp holds.
// add_row      y[m][j] += bias[j], j < 32.
// store_tile   out[m * ld + j] = tile[m][j], j < 32.
// rank_project p[m * ldp + j] = scaling * sum_i x[m][i] * a[j][i], m < rows, j < rank.
// rank_expand  y[m][j] += sum_q p[m * ldp + q] * bt[q][j], j < 32.
// rank_outer   g[q][j] += sum_m p[m * ldp + q] * x[m][j], q < rank, j < cols (a multiple of 32).
// dropout_row  y[j] = x[j] * keep(j) / (1 - p), j in [first, first + n); x and y start at `first`.
// weighted_sum out[j] = sum_k weight[k] * rows[k][j].
// dot_row      sum_j a[j] * b[j].
// burn_*       runs `rounds` rounds of the fastest arithmetic that the ISA has for integers, for
//              bf16 and for fp32, in registers only; returns the operations done (2 a product).
// read_row     sum of n floats, n a multiple of 64.
#define KT_KERNELS(ROW)                                                                            \
  ROW(void, dot_int, (int rows, int terms, int64_t blocks, const void* a, int64_t row_bytes,       \
                      const void* panel, bool accumulate, int32_t* c, const Prefetch& next))       \
  ROW(void, dot_float, (int rows, int64_t blocks, const void* a, int64_t row_bytes,                \
                        const void* panel, bool accumulate, float* c, const Prefetch& next))       \
  ROW(void, scale_tile, (int rows, int terms, const int32_t* c, const float* row_scale,            \
                         const int32_t* row_sum, const float* col_scale, float* y))                \
  ROW(void, place_int_forward, (const uint8_t* tile, void* block_half))                            \
  ROW(void, place_int_backward, (const uint8_t* tile, void* const pieces[4]))                      \
  ROW(void, place_float_forward, (const uint16_t* tile, void* block))                              \
  ROW(void, place_float_backward, (const uint16_t* tile, void* const pieces[2]))                   \
  ROW(void, unpack_int4, (const uint8_t* nibbles, const uint8_t* const multiplier[2],              \
                          uint8_t* tile))                                                          \
  ROW(void, decode_tile, (CodeKind kind, const uint8_t* codes, const CodeScales& groups,           \
                          uint16_t* tile))                                                         \
  ROW(void, pack_int_row, (int terms, int64_t n, const float* x, const float* fold, void* out,     \
                           float* scale, int32_t* sums))                                           \
  ROW(void, pack_float_row, (int64_t n, const float* x, const float* fold, void* out))             \
  ROW(void, to_bf16_row, (int64_t n, const float* x, uint16_t* out))                               \
  ROW(void, to_float_row, (int64_t n, FloatType type, const void* x, float* out))                  \
  ROW(void, from_float_row, (int64_t n, FloatType type, const float* x, void* out))                \
  ROW(float, absmax_row, (int64_t n, const float* x))                                              \
  ROW(void, quantize_weight_row, (int64_t n, const float* w, uint8_t* out, float* scale))          \
  ROW(void, quantize_int4_row, (int64_t n, int64_t group, const float* w, uint8_t* out,            \
                                uint8_t* multiplier, float* scale))                                \
  ROW(void, gate_forward, (const Gate& gate, const GateForward& io))                               \
  ROW(void, gate_backward, (const Gate& gate, const GateBackward& io))                             \
  ROW(void, add_row, (int rows, const float* bias, float* y))                                      \
  ROW(void, store_tile, (int rows, const float* tile, float* out, int64_t ld, bool stream))        \
  ROW(void, rank_project, (int rows, int rank, int64_t n, const float* const* x, const float* a,   \
                           int64_t lda, float scaling, float* p, int64_t ldp))                     \
  ROW(void, rank_expand, (int rows, int rank, const float* p, int64_t ldp, const float* bt,        \
                          int64_t ldb, float* y))                                                  \
  ROW(void, rank_outer, (int rows, int rank, int64_t cols, const float* p, int64_t ldp,            \
                         const float* const* x, float* g, int64_t ldg))                            \
  ROW(void, dropout_row, (const DropoutKey& key, int64_t first, int64_t n, const float* x,         \
                          float* y))                                                               \
  ROW(void, weighted_sum, (int count, int64_t n, const float* weight, const float* const* rows,    \
                           float* out))                                                            \
  ROW(float, dot_row, (int64_t n, const float* a, const float* b))                                 \
  ROW(int64_t, burn_int, (int64_t rounds))                                                         \
  ROW(int64_t, burn_bf16, (int64_t rounds))                                                        \
  ROW(int64_t, burn_fp32, (int64_t rounds))                                                        \
  ROW(float, read_row, (int64_t n, const float* x))
// clang-format on

struct KernelTable {
  const char* name;
  const char* int_dot;    // operation, types, tile and instruction of dot_int
  const char* float_dot;  // and of dot_float
  PanelForm int_panel;
  PanelForm float_panel;
  int max_int_rows[2];  // of one dot_int call, for one and two terms
  int max_float_rows;

#define KT_DECLARE(result, name, arguments) result(*name) arguments;
  KT_KERNELS(KT_DECLARE)
#undef KT_DECLARE
};

// One row per instruction set, best first: symbol, name, CPU flags that it needs. The machine's own
// are in csrc/arch; the portable table is last and always runs.
#define KT_ISAS(ROW) KT_ARCH_ISAS(ROW) ROW(kPortableKernels, "portable")

#define KT_DECLARE(symbol, ...) extern const KernelTable symbol;
KT_ISAS(KT_DECLARE)
#undef KT_DECLARE

}  // namespace kt
