// AVX-512 with VNNI and BF16. The inner step is inline assembly because gcc otherwise moves the
// broadcasts ahead and spills accumulators, which halves the speed.
#include <immintrin.h>

#include "kernel_table.h"

#define KT_VEC_BYTES 64
#define KT_PROJECT_ROWS 4
#define KT_EXPAND_ROWS 7
#define KT_OUTER_RANKS 4
#define KT_OUTER_PARTS 4

namespace kt {
namespace {

#include "row_kernels.inl"

// Row m of the activations is group m / 5 plus (m % 5) strides, which x86 addressing forms for
// free from three group pointers, the stride and three times the stride.
#define KT_STEP(INSTRUCTION, ADDRESS)                                      \
  asm volatile("vpbroadcastd " ADDRESS ", %[x]\n\t" INSTRUCTION            \
               " %[x], %[w0], %[c0]\n\t" INSTRUCTION " %[x], %[w1], %[c1]" \
               : [c0] "+v"(c0), [c1] "+v"(c1), [x] "=&v"(x)                \
               : [w0] "v"(w0), [w1] "v"(w1), [p] "r"(group), [s] "r"(stride), [s3] "r"(stride3))

#define KT_STEP_ROW(INSTRUCTION)           \
  if constexpr (kRow % 5 == 0) {           \
    KT_STEP(INSTRUCTION, "(%[p])");        \
  } else if constexpr (kRow % 5 == 1) {    \
    KT_STEP(INSTRUCTION, "(%[p],%[s])");   \
  } else if constexpr (kRow % 5 == 2) {    \
    KT_STEP(INSTRUCTION, "(%[p],%[s],2)"); \
  } else if constexpr (kRow % 5 == 3) {    \
    KT_STEP(INSTRUCTION, "(%[p],%[s3])");  \
  } else {                                 \
    KT_STEP(INSTRUCTION, "(%[p],%[s],4)"); \
  }

struct Int8Step {
  static constexpr int kSteps = 16;           // of 4 inputs in a block
  static constexpr int64_t kWeightStep = 64;  // bytes between steps
  static constexpr int64_t kSecond = 1024;    // bytes to the second vector of outputs
  static constexpr int64_t kTileBytes = kTileBytesInt8;

  template <int kRow>
  static inline __attribute__((always_inline)) void row(__m512i& c0, __m512i& c1, __m512i w0,
                                                        __m512i w1, const char* group,
                                                        int64_t stride, int64_t stride3) {
    __m512i x;
    KT_STEP_ROW("vpdpbusd")
  }
};

struct Bf16Step {
  static constexpr int kSteps = 32;
  static constexpr int64_t kWeightStep = 128;
  static constexpr int64_t kSecond = 64;
  static constexpr int64_t kTileBytes = kTileBytesBf16;

  template <int kRow>
  static inline __attribute__((always_inline)) void row(__m512i& c0, __m512i& c1, __m512i w0,
                                                        __m512i w1, const char* group,
                                                        int64_t stride, int64_t stride3) {
    __m512i x;
    KT_STEP_ROW("vdpbf16ps")
  }
};

// The accumulators of rows 0 to kRows - 1 as nested members: gcc keeps members in registers, but
// not elements of an array that is passed on by reference.
template <class Step, int kRows>
struct Accumulators {
  Accumulators<Step, kRows - 1> before;
  __m512i c0, c1;

  inline __attribute__((always_inline)) void clear() {
    before.clear();
    c0 = c1 = _mm512_setzero_si512();
  }
  // vpdpbusd takes (unsigned, signed): in AT&T order the middle operand is the unsigned weight,
  // so the broadcast activation is named first.
  inline __attribute__((always_inline)) void step(__m512i w0, __m512i w1, const char* g0,
                                                  const char* g1, const char* g2, int64_t stride,
                                                  int64_t stride3) {
    before.step(w0, w1, g0, g1, g2, stride, stride3);
    constexpr int kRow = kRows - 1;
    const char* group = kRow < 5 ? g0 : kRow < 10 ? g1 : g2;
    Step::template row<kRow>(c0, c1, w0, w1, group, stride, stride3);
  }
  inline __attribute__((always_inline)) void write(char* out) const {
    before.write(out);
    _mm512_storeu_si512(out + (kRows - 1) * 128, c0);
    _mm512_storeu_si512(out + (kRows - 1) * 128 + 64, c1);
  }
};
template <class Step>
struct Accumulators<Step, 0> {
  inline void clear() {}
  inline void step(__m512i, __m512i, const char*, const char*, const char*, int64_t, int64_t) {}
  inline void write(char*) const {}
};

template <class Step, int kRows>
void dot_rows(int64_t blocks, const char* a, int64_t stride, const char* panel, void* c,
              const Prefetch& next) {
  Accumulators<Step, kRows> acc;
  acc.clear();
  const char* g0 = a;
  const char* g1 = kRows > 5 ? a + 5 * stride : a;
  const char* g2 = kRows > 10 ? a + 10 * stride : a;
  const int64_t stride3 = 3 * stride;
  int64_t prefetched = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t target = next.count * (b + 1) / blocks;
    prefetch_some(next, prefetched, target);
    prefetched = target;
    const char* w = panel + b * Step::kTileBytes;
    for (int s = 0; s < Step::kSteps; ++s) {
      const __m512i w0 = _mm512_loadu_si512(w);
      const __m512i w1 = _mm512_loadu_si512(w + Step::kSecond);
      acc.step(w0, w1, g0, g1, g2, stride, stride3);
      w += Step::kWeightStep;
      g0 += 4;
      g1 += 4;
      g2 += 4;
    }
  }
  acc.write(static_cast<char*>(c));
}

template <class Step>
inline void dot_any(int rows, int64_t blocks, const char* a, int64_t stride, const char* panel,
                    void* c, const Prefetch& next) {
  switch (rows) {
    case 1:
      return dot_rows<Step, 1>(blocks, a, stride, panel, c, next);
    case 2:
      return dot_rows<Step, 2>(blocks, a, stride, panel, c, next);
    case 3:
      return dot_rows<Step, 3>(blocks, a, stride, panel, c, next);
    case 4:
      return dot_rows<Step, 4>(blocks, a, stride, panel, c, next);
    case 5:
      return dot_rows<Step, 5>(blocks, a, stride, panel, c, next);
    case 6:
      return dot_rows<Step, 6>(blocks, a, stride, panel, c, next);
    case 7:
      return dot_rows<Step, 7>(blocks, a, stride, panel, c, next);
    case 8:
      return dot_rows<Step, 8>(blocks, a, stride, panel, c, next);
    case 9:
      return dot_rows<Step, 9>(blocks, a, stride, panel, c, next);
    case 10:
      return dot_rows<Step, 10>(blocks, a, stride, panel, c, next);
    case 11:
      return dot_rows<Step, 11>(blocks, a, stride, panel, c, next);
    case 12:
      return dot_rows<Step, 12>(blocks, a, stride, panel, c, next);
    case 13:
      return dot_rows<Step, 13>(blocks, a, stride, panel, c, next);
    case 14:
      return dot_rows<Step, 14>(blocks, a, stride, panel, c, next);
  }
}

void dot_u8s8(int rows, int64_t blocks, const int8_t* a, int64_t lda, const uint8_t* panel,
              int32_t* c, const Prefetch& next) {
  dot_any<Int8Step>(rows, blocks, reinterpret_cast<const char*>(a), lda,
                    reinterpret_cast<const char*>(panel), c, next);
}

void dot_bf16(int rows, int64_t blocks, const uint16_t* a, int64_t lda, const uint16_t* panel,
              float* c, const Prefetch& next) {
  dot_any<Bf16Step>(rows, blocks, reinterpret_cast<const char*>(a), 2 * lda,
                    reinterpret_cast<const char*>(panel), c, next);
}

void transpose_u8(const uint8_t* tile, uint8_t* const pieces[4]) {
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int g = 0; g < 4; ++g) {
    const uint8_t* source = tile + g * 256;
    const __m512i r0 = _mm512_loadu_si512(source);
    const __m512i r1 = _mm512_loadu_si512(source + 64);
    const __m512i r2 = _mm512_loadu_si512(source + 128);
    const __m512i r3 = _mm512_loadu_si512(source + 192);
    // 4 x 4 transpose of 128-bit lanes, then 4 x 4 transpose of bytes inside each lane.
    const __m512i low01 = _mm512_shuffle_i32x4(r0, r1, 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(r0, r1, 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(r2, r3, 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(r2, r3, 0xee);
    uint8_t* out = pieces[g];
    _mm512_storeu_si512(out, _mm512_shuffle_epi8(_mm512_shuffle_i32x4(low01, low23, 0x88), order));
    _mm512_storeu_si512(out + 64,
                        _mm512_shuffle_epi8(_mm512_shuffle_i32x4(low01, low23, 0xdd), order));
    _mm512_storeu_si512(out + 128,
                        _mm512_shuffle_epi8(_mm512_shuffle_i32x4(high01, high23, 0x88), order));
    _mm512_storeu_si512(out + 192,
                        _mm512_shuffle_epi8(_mm512_shuffle_i32x4(high01, high23, 0xdd), order));
  }
}

// 8 x 8 transpose of 64-bit units, each 2 n by 2 k, whose middle two values swap.
inline void transpose_units(const uint16_t* source, uint16_t* out) {
  const __m512i swap =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  __m512i r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(source + i * 64), swap);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_epi64(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi64(r[i], r[i + 1]);
  }
  for (int i = 0; i < 2; ++i)
    for (int h = 0; h < 2; ++h) {
      const __m512i a = t[4 * h + i], b = t[4 * h + 2 + i];
      r[4 * h + i] = _mm512_shuffle_i32x4(a, b, 0x88);      // columns i and i + 4
      r[4 * h + 2 + i] = _mm512_shuffle_i32x4(a, b, 0xdd);  // columns i + 2 and i + 6
    }
  for (int i = 0; i < 2; ++i)
    for (int h = 0; h < 2; ++h) {
      const __m512i a = r[2 * h + i], b = r[4 + 2 * h + i];
      _mm512_storeu_si512(out + (2 * h + i) * 64, _mm512_shuffle_i32x4(a, b, 0x88));
      _mm512_storeu_si512(out + (4 + 2 * h + i) * 64, _mm512_shuffle_i32x4(a, b, 0xdd));
    }
}

void transpose_bf16(const uint16_t* tile, uint16_t* const pieces[2]) {
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; k += 8)
      for (int n = 0; n < 16; n += 8)
        transpose_units(tile + (half * 16 + k) * 64 + n * 4, pieces[half] + n * 64 + k * 4);
}

}  // namespace

const KernelTable kAvx512Kernels = KT_TABLE("avx512");

}  // namespace kt
