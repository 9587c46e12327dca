// The contract between the experts block and an instruction set: one table of functions per ISA.
//
// Legend (shared with the Python package): T tokens, D hidden size, F intermediate size, E experts,
// K top-k, R = T*K routed rows, M rows of one expert, r LoRA rank. Every D and F below is padded to
// a multiple of 64, padding is zero in activations and a zero weight in panels.
//
// Weight panels. A panel holds 32 outputs. It is a sequence of super tiles, each 32 outputs by 64
// inputs of the contraction:
//   int8: [2 halves][16 k4][16 n][4 kk] bytes, stored as q + 128 (2048 bytes)
//   bf16: [32 k2][32 n][2 kk]                                    (4096 bytes)
// Forward panels lie in the store as they are. Backward panels have the same shape with the roles
// of n and k exchanged and are made by `transpose_*` from the stored tiles.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace kt {

constexpr int64_t kPanelCols = 32;        // outputs of one panel
constexpr int64_t kBlock = 64;            // contraction length of one super tile
constexpr int64_t kTileBytesInt8 = 2048;  // one super tile, int8
constexpr int64_t kTileBytesBf16 = 4096;  // one super tile, bf16
constexpr int kMaxDotRows = 14;           // 14 x 2 accumulators + 2 weights + 1 broadcast <= 32 zmm
constexpr float kExactLevels = 32639.0f;  // 127 * 256 + 127: the largest |256 * hi + lo|
constexpr int64_t kMaxFoldedRow = 65536;  // longest contraction of a backward product

enum class Activation : int { kSilu = 0, kGeluErf = 1, kGeluTanh = 2, kQuickGelu = 3 };
constexpr int kActivationCount = 4;

enum class FloatType : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// Cache lines to bring into L2 while a panel is computed: `count` lines of 64 bytes; line i lies at
// base + (i >> tile_shift) * tile_stride + (i & (2^tile_shift - 1)) * 64.
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

struct KernelTable {
  const char* name;

  // c[m][j] = sum_k u8(panel[k][j]) * s8(a[m][k]) in int32, m < rows <= kMaxDotRows, j < 32.
  // Exact while 255 * 128 * 64 * blocks < 2^31, that is for contractions up to 65,792.
  void (*dot_u8s8)(int rows, int64_t blocks, const int8_t* a, int64_t lda, const uint8_t* panel,
                   int32_t* c, const Prefetch& next);
  // c[m][j] = sum_k panel[k][j] * a[m][k], bf16 products, fp32 accumulation.
  void (*dot_bf16)(int rows, int64_t blocks, const uint16_t* a, int64_t lda, const uint16_t* panel,
                   float* c, const Prefetch& next);

  // One stored int8 tile [16 k4][16 n][4 kk] into four pieces [4 n4][16 k][4 nn], one per 16 k.
  void (*transpose_u8)(const uint8_t* tile, uint8_t* const pieces[4]);
  // One stored bf16 super tile [32 k2][32 n][2 kk] into two pieces [16 n2][32 k][2 nn].
  void (*transpose_bf16)(const uint16_t* tile, uint16_t* const pieces[2]);

  // y[m][j] = row_scale[m] * col_scale[j] * (sum over terms of 256^(terms-1-t) *
  //           (c[m*terms+t][j] - 128 * row_sum[m*terms+t])); col_scale null means 1.
  void (*scale_tile)(int rows, int terms, const int32_t* c, const float* row_scale,
                     const int32_t* row_sum, const float* col_scale, float* y);

  // One row to int8 terms: terms == 1: q = rint(x * 127 / absmax);
  // terms == 2: q = rint(x * 32639 / absmax) = 256 * hi + lo, hi at out, lo at out + n.
  // `fold`, if not null, multiplies x first. A row with NaN or Inf gets scale NaN, so that it comes
  // out as NaN; a zero row gets scale 0.
  void (*quantize_row)(int terms, int64_t n, const float* x, const float* fold, int8_t* out,
                       float* scale, int32_t* sums);
  void (*to_bf16_row)(int64_t n, const float* x, uint16_t* out);
  void (*to_float_row)(int64_t n, FloatType type, const void* x, float* out);
  void (*from_float_row)(int64_t n, FloatType type, const float* x, void* out);

  // The largest |x|; NaN or Inf when there is one in the row.
  float (*absmax_row)(int64_t n, const float* x);
  // Weights of one output channel: scale = absmax / 127, out = rint(w / scale) + 128.
  void (*quantize_weight_row)(int64_t n, const float* w, uint8_t* out, float* scale);

  // h = act(gate) * up over n elements.
  void (*gate_forward)(Activation act, int64_t n, const float* gate, const float* up, float* h);
  // h = act(gate) * up; dgate = w * dh * up * act'(gate); dup = w * dh * act(gate), over n
  // elements, a multiple of 32. Returns <dh, h>, this piece's share of the gradient of w.
  float (*gate_backward)(Activation act, int64_t n, float weight, const float* dh,
                         const float* gate, const float* up, float* dgate, float* dup, float* h);

  // p[m][j] = scaling * sum_i x[m][i] * a[j][i], m < rows, j < rank.
  void (*rank_project)(int rows, int rank, int64_t n, const float* const* x, const float* a,
                       int64_t lda, float scaling, float* p);
  // y[m][j] += sum_q p[m][q] * bt[q][j], j < 32.
  void (*rank_expand)(int rows, int rank, const float* p, const float* bt, int64_t ldb, float* y);
  // g[q][j] += sum_m p[m][q] * x[m][j], q < rank, j < cols (a multiple of 32).
  void (*rank_outer)(int rows, int rank, int64_t cols, const float* p, const float* const* x,
                     float* g, int64_t ldg);

  // y[j] = x[j] * keep(j) / (1 - p), j in [first, first + n) of a row; x and y start at `first`.
  void (*dropout_row)(const DropoutKey& key, int64_t first, int64_t n, const float* x, float* y);
  // out[j] = sum_k weight[k] * rows[k][j]
  void (*weighted_sum)(int count, int64_t n, const float* weight, const float* const* rows,
                       float* out);
};

extern const KernelTable kPortableKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;

}  // namespace kt
