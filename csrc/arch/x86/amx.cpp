// AMX: int8 and bf16 tiles over the stored weights, everything else as in avx512_bf16.
//
// A tile of activations is 16 rows by 64 bytes straight from the packed rows, a tile of weights 16
// rows of 64 bytes straight from the panel. Two by two accumulators make 32 rows by 32 outputs.
// Tiles are configured and released in every call: a few dozen cycles against thousands, and no
// state that other code on the thread (oneDNN) could disturb.
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

constexpr int kTileRows = 16;
constexpr int64_t kOutStride = kPanelCols * 4;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0, 1: activations of the upper and lower rows; 2, 3: weights of the left and right outputs;
// 4, 5: sums of the upper rows; 6, 7: of the lower.
inline void configure(int upper, int lower) {
  TileConfig config;
  const int rows[8] = {upper, lower, kTileRows, kTileRows, upper, upper, lower, lower};
  for (int t = 0; t < 8; ++t) {
    config.bytes_per_row[t] = rows[t] ? 64 : 0;
    config.rows[t] = static_cast<uint8_t>(rows[t]);
  }
  // gcc 12 believes that the instruction reads 8 bytes and drops the other stores.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// The weights of one product: where the two tiles of step s of a block lie.
struct Int8Tiles {
  static constexpr int64_t kBlockBytes = kTileBytesInt8;
  static constexpr int kSteps = 1;         // tiles along a block
  static constexpr int64_t kStride = 64;   // bytes between rows of a tile
  static constexpr int64_t kRight = 1024;  // bytes to the outputs 16 to 31
};
struct Bf16Tiles {
  static constexpr int64_t kBlockBytes = kTileBytesBf16;
  static constexpr int kSteps = 2;
  static constexpr int64_t kStride = 128;
  static constexpr int64_t kRight = 64;
};

// gcc needs literal tile numbers, so the product is a macro: signed activations by unsigned
// weights, or bf16 by bf16.
#define KT_DOT_TILES(NAME, TILES, PRODUCT)                                               \
  void NAME(int rows, int64_t blocks, const char* a, int64_t stride, const char* panel,  \
            bool accumulate, char* c, const Prefetch& next) {                            \
    const int upper = rows < kTileRows ? rows : kTileRows, lower = rows - upper;         \
    char* c_lower = c + kTileRows * kOutStride;                                          \
    const char* a_lower = a + kTileRows * stride;                                        \
    configure(upper, lower);                                                             \
    if (accumulate) {                                                                    \
      _tile_loadd(4, c, kOutStride);                                                     \
      _tile_loadd(5, c + 64, kOutStride);                                                \
      if (lower) {                                                                       \
        _tile_loadd(6, c_lower, kOutStride);                                             \
        _tile_loadd(7, c_lower + 64, kOutStride);                                        \
      }                                                                                  \
    } else {                                                                             \
      _tile_zero(4);                                                                     \
      _tile_zero(5);                                                                     \
      if (lower) {                                                                       \
        _tile_zero(6);                                                                   \
        _tile_zero(7);                                                                   \
      }                                                                                  \
    }                                                                                    \
    int64_t prefetched = 0;                                                              \
    for (int64_t b = 0; b < blocks; ++b) {                                               \
      const int64_t target = next.count * (b + 1) / blocks;                              \
      prefetch_some(next, prefetched, target);                                           \
      prefetched = target;                                                               \
      for (int s = 0; s < TILES::kSteps; ++s) {                                          \
        const char* w = panel + b * TILES::kBlockBytes + s * kTileRows * TILES::kStride; \
        const int64_t at = (b * TILES::kSteps + s) * 64;                                 \
        _tile_loadd(2, w, TILES::kStride);                                               \
        _tile_loadd(3, w + TILES::kRight, TILES::kStride);                               \
        _tile_loadd(0, a + at, stride);                                                  \
        PRODUCT(4, 0, 2);                                                                \
        PRODUCT(5, 0, 3);                                                                \
        if (lower) {                                                                     \
          _tile_loadd(1, a_lower + at, stride);                                          \
          PRODUCT(6, 1, 2);                                                              \
          PRODUCT(7, 1, 3);                                                              \
        }                                                                                \
      }                                                                                  \
    }                                                                                    \
    _tile_stored(4, c, kOutStride);                                                      \
    _tile_stored(5, c + 64, kOutStride);                                                 \
    if (lower) {                                                                         \
      _tile_stored(6, c_lower, kOutStride);                                              \
      _tile_stored(7, c_lower + 64, kOutStride);                                         \
    }                                                                                    \
    _tile_release();                                                                     \
  }

KT_DOT_TILES(dot_int8_tiles, Int8Tiles, _tile_dpbsud)
KT_DOT_TILES(dot_bf16_tiles, Bf16Tiles, _tile_dpbf16ps)

void dot_int(int rows, int terms, int64_t blocks, const void* a, int64_t row_bytes,
             const void* panel, bool accumulate, int32_t* c, const Prefetch& next) {
  dot_int8_tiles(rows * terms, blocks, static_cast<const char*>(a), row_bytes / terms,
                 static_cast<const char*>(panel), accumulate, reinterpret_cast<char*>(c), next);
}

void dot_float(int rows, int64_t blocks, const void* a, int64_t row_bytes, const void* panel,
               bool accumulate, float* c, const Prefetch& next) {
  dot_bf16_tiles(rows, blocks, static_cast<const char*>(a), row_bytes,
                 static_cast<const char*>(panel), accumulate, reinterpret_cast<char*>(c), next);
}

// Four accumulators, so that no product waits for the one before it.
#define KT_BURN_TILES(NAME, PRODUCT, OPERATIONS) \
  int64_t NAME(int64_t rounds) {                 \
    configure(kTileRows, kTileRows);             \
    _tile_zero(0);                               \
    _tile_zero(1);                               \
    _tile_zero(2);                               \
    _tile_zero(3);                               \
    _tile_zero(4);                               \
    _tile_zero(5);                               \
    _tile_zero(6);                               \
    _tile_zero(7);                               \
    for (int64_t r = 0; r < rounds; ++r) {       \
      PRODUCT(4, 0, 2);                          \
      PRODUCT(5, 0, 3);                          \
      PRODUCT(6, 1, 2);                          \
      PRODUCT(7, 1, 3);                          \
    }                                            \
    _tile_release();                             \
    return rounds * 4 * (OPERATIONS);            \
  }

KT_BURN_TILES(burn_int, _tile_dpbsud, int64_t{16} * 16 * 64 * 2)
KT_BURN_TILES(burn_bf16, _tile_dpbf16ps, int64_t{16} * 16 * 32 * 2)

}  // namespace

const KernelTable kAmxKernels = KT_TABLE("amx", "dot_s8u8_32x32 (tdpbsud)",
                                         "dot_bf16_32x32 (tdpbf16ps)", kU8, kBf16, 32, 16, 32);

}  // namespace kt
