// The dot products of the vector ISAs: up to Step::kRows rows of activations by two vectors of
// outputs in registers, one broadcast of 4 bytes of a row per step. The inner step is inline
// assembly because gcc otherwise moves the broadcasts ahead and spills accumulators, which halves
// the speed.

inline VecI load_bits(const char* p) { return *reinterpret_cast<const VecI*>(p); }
inline void store_bits(char* p, VecI v) { *reinterpret_cast<VecI*>(p) = v; }

// By shifts, since a mask would take the register that an accumulator needs.
inline VecI low_byte(VecI v) {
  return reinterpret_cast<VecI>(reinterpret_cast<VecU>(v << 24) >> 24);
}

// A tile row is 128 bytes of fp32 or int32. Two vectors of 64 bytes cover it at once, of 32 bytes
// in two halves.
constexpr int kHalves = kWholeRow ? 1 : 2;
constexpr int64_t kRowBytes = 128;

// Row m of the activations is group m / 5 plus (m % 5) strides, which x86 addressing forms for
// free from three group pointers, the stride and three times the stride.
#define KT_STEP(ADDRESS, PRODUCTS)                                        \
  asm volatile("vpbroadcastd " ADDRESS ", %[x]\n\t" PRODUCTS              \
               : [c0] "+v"(c0), [c1] "+v"(c1), [x] "=&v"(x), [t] "=&v"(t) \
               : [w0] "v"(w0), [w1] "v"(w1), [p] "r"(group), [s] "r"(stride), [s3] "r"(stride3))

#define KT_STEP_ROW(PRODUCTS)           \
  if constexpr (kRow % 5 == 0) {        \
    KT_STEP("(%[p])", PRODUCTS);        \
  } else if constexpr (kRow % 5 == 1) { \
    KT_STEP("(%[p],%[s])", PRODUCTS);   \
  } else if constexpr (kRow % 5 == 2) { \
    KT_STEP("(%[p],%[s],2)", PRODUCTS); \
  } else if constexpr (kRow % 5 == 3) { \
    KT_STEP("(%[p],%[s3])", PRODUCTS);  \
  } else {                              \
    KT_STEP("(%[p],%[s],4)", PRODUCTS); \
  }

// kRows: of the tallest tile that leaves room for weights, broadcast and products among 32 or 16
// registers. A step consumes 4 bytes of each row. kSteps: steps in a block; kWeightStep: bytes
// between their weights; kSecond: to the second vector of a step; kHalf: to the second half of the
// outputs.
#define KT_DEFINE_STEP(NAME, ROWS_WHOLE, ROWS_HALF, STEPS, WEIGHT_STEP, SECOND_WHOLE, HALF,     \
                       BLOCK_BYTES, PRODUCTS)                                                   \
  struct NAME {                                                                                 \
    static constexpr int kRows = kWholeRow ? ROWS_WHOLE : ROWS_HALF;                            \
    static constexpr int kSteps = STEPS;                                                        \
    static constexpr int64_t kWeightStep = WEIGHT_STEP;                                         \
    static constexpr int64_t kSecond = kWholeRow ? SECOND_WHOLE : 32;                           \
    static constexpr int64_t kHalf = HALF;                                                      \
    static constexpr int64_t kBlockBytes = BLOCK_BYTES;                                         \
    template <int kRow>                                                                         \
    static inline __attribute__((always_inline)) void row(VecI& c0, VecI& c1, VecI w0, VecI w1, \
                                                          const char* group, int64_t stride,    \
                                                          int64_t stride3) {                    \
      VecI x, t;                                                                                \
      KT_STEP_ROW(PRODUCTS)                                                                     \
    }                                                                                           \
  };

// The weights are the unsigned operand of vpdpbusd, the middle one in AT&T order.
#define KT_PRODUCTS_VNNI(PREFIX) \
  PREFIX "vpdpbusd %[x], %[w0], %[c0]\n\t" PREFIX "vpdpbusd %[x], %[w1], %[c1]"
#define KT_PRODUCTS_S16                                          \
  "vpmaddwd %[x], %[w0], %[t]\n\tvpmaddwd %[x], %[w1], %[x]\n\t" \
  "vpaddd %[t], %[c0], %[c0]\n\tvpaddd %[x], %[c1], %[c1]"
#define KT_PRODUCTS_BF16 "vdpbf16ps %[x], %[w0], %[c0]\n\tvdpbf16ps %[x], %[w1], %[c1]"
#define KT_PRODUCTS_F32 "vfmadd231ps %[x], %[w0], %[c0]\n\tvfmadd231ps %[x], %[w1], %[c1]"

// The accumulators of rows 0 to kRows - 1 as nested members: gcc keeps members in registers, but
// not elements of an array that is passed on by reference.
template <class Step, int kRows>
struct Accumulators {
  Accumulators<Step, kRows - 1> before;
  VecI c0, c1;

  inline __attribute__((always_inline)) void clear() {
    before.clear();
    c0 = c1 = VecI{};
  }
  inline __attribute__((always_inline)) void read(const char* out) {
    before.read(out);
    c0 = load_bits(out + (kRows - 1) * kRowBytes);
    c1 = load_bits(out + (kRows - 1) * kRowBytes + KT_VEC_BYTES);
  }
  inline __attribute__((always_inline)) void step(VecI w0, VecI w1, const char* g0, const char* g1,
                                                  const char* g2, int64_t stride, int64_t stride3) {
    before.step(w0, w1, g0, g1, g2, stride, stride3);
    constexpr int kRow = kRows - 1;
    const char* group = kRow < 5 ? g0 : kRow < 10 ? g1 : g2;
    Step::template row<kRow>(c0, c1, w0, w1, group, stride, stride3);
  }
  inline __attribute__((always_inline)) void write(char* out) const {
    before.write(out);
    store_bits(out + (kRows - 1) * kRowBytes, c0);
    store_bits(out + (kRows - 1) * kRowBytes + KT_VEC_BYTES, c1);
  }
  // Adds to rows 2m and 2m + 1 of `out` the upper 24 bits and the lower 8 of row m.
  inline __attribute__((always_inline)) void split_into(char* out) const {
    before.split_into(out);
    char* high = out + 2 * (kRows - 1) * kRowBytes;
    char* low = high + kRowBytes;
    store_bits(high, load_bits(high) + (c0 >> 8));
    store_bits(high + KT_VEC_BYTES, load_bits(high + KT_VEC_BYTES) + (c1 >> 8));
    store_bits(low, load_bits(low) + low_byte(c0));
    store_bits(low + KT_VEC_BYTES, load_bits(low + KT_VEC_BYTES) + low_byte(c1));
  }
};
template <class Step>
struct Accumulators<Step, 0> {
  inline void clear() {}
  inline void read(const char*) {}
  inline void step(VecI, VecI, const char*, const char*, const char*, int64_t, int64_t) {}
  inline void write(char*) const {}
  inline void split_into(char*) const {}
};

// How a product ends: in the accumulators as they are, or split in two rows before they overflow.
enum class Drain { kWhole, kSplit };
// A pair of 16-bit products is at most 2 * 32639 * 128; 256 of them stay below 2^31.
constexpr int64_t kSplitBlocks = 8;

template <class Step, Drain kDrain, int kRows>
void dot_rows(int64_t blocks, const char* a, int64_t stride, const char* panel, bool accumulate,
              char* c, const Prefetch& next) {
  if (kDrain == Drain::kSplit && !accumulate)
    for (int m = 0; m < 2 * kRows; ++m)
      for (int v = 0; v < 2; ++v) store_bits(c + m * kRowBytes + v * KT_VEC_BYTES, VecI{});
  const char* g0 = a;
  const char* g1 = kRows > 5 ? a + 5 * stride : a;
  const char* g2 = kRows > 10 ? a + 10 * stride : a;
  const int64_t stride3 = 3 * stride;
  const int64_t most = kDrain == Drain::kSplit ? kSplitBlocks : blocks;
  int64_t prefetched = 0;
  for (int64_t first = 0; first < blocks; first += most) {
    const int64_t last = first + most < blocks ? first + most : blocks;
    Accumulators<Step, kRows> acc;
    acc.clear();
    if (kDrain == Drain::kWhole && accumulate) acc.read(c);
    for (int64_t b = first; b < last; ++b) {
      const int64_t target = next.count * (b + 1) / blocks;
      prefetch_some(next, prefetched, target);
      prefetched = target;
      const char* w = panel + b * Step::kBlockBytes;
      for (int s = 0; s < Step::kSteps; ++s) {
        const VecI w0 = load_bits(w);
        const VecI w1 = load_bits(w + Step::kSecond);
        acc.step(w0, w1, g0, g1, g2, stride, stride3);
        w += Step::kWeightStep;
        g0 += 4;
        g1 += 4;
        g2 += 4;
      }
    }
    if (kDrain == Drain::kSplit)
      acc.split_into(c);
    else
      acc.write(c);
  }
}

template <class Step, Drain kDrain, int kRows = Step::kRows>
inline void dot_piece(int rows, int64_t blocks, const char* a, int64_t stride, const char* panel,
                      bool accumulate, char* c, const Prefetch& next) {
  if constexpr (kRows > 1)
    if (rows < kRows)
      return dot_piece<Step, kDrain, kRows - 1>(rows, blocks, a, stride, panel, accumulate, c,
                                                next);
  dot_rows<Step, kDrain, kRows>(blocks, a, stride, panel, accumulate, c, next);
}

// Rows in nearly equal pieces that fit the registers; prefetches are shared out among the pieces.
template <class Step, Drain kDrain = Drain::kWhole>
inline void dot_any(int rows, int64_t blocks, const char* a, int64_t stride, const char* panel,
                    bool accumulate, void* c, const Prefetch& next) {
  constexpr int kOutRows = kDrain == Drain::kSplit ? 2 : 1;
  const int pieces = (rows + Step::kRows - 1) / Step::kRows;
  for (int i = 0; i < pieces; ++i) {
    const int begin = rows * i / pieces, end = rows * (i + 1) / pieces;
    for (int half = 0; half < kHalves; ++half) {
      const int64_t part = i * kHalves + half, parts = pieces * kHalves;
      Prefetch share = next;
      share.first = next.first + next.count * part / parts;
      share.count = next.first + next.count * (part + 1) / parts - share.first;
      dot_piece<Step, kDrain>(
          end - begin, blocks, a + begin * stride, stride, panel + half * Step::kHalf, accumulate,
          static_cast<char*>(c) + begin * kOutRows * kRowBytes + half * kRowBytes / 2, share);
    }
  }
}
