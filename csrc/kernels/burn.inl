// The fastest arithmetic of a vector ISA, in registers only, to measure what the machine can do.

// 32 registers hold 24 chains of sums that do not depend on each other, 16 hold 12; either hides
// the latency of the product.
#define KT_BURN(NAME, PRODUCT, OPERATIONS)                                         \
  int64_t NAME(int64_t rounds) {                                                   \
    VecI c0{}, c1{}, c2{}, c3{}, c4{}, c5{}, c6{}, c7{}, c8{}, c9{}, c10{}, c11{}; \
    VecI d0{}, d1{}, d2{}, d3{}, d4{}, d5{}, d6{}, d7{}, d8{}, d9{}, d10{}, d11{}; \
    const VecI w{}, x{};                                                           \
    const auto step = [&](VecI & c) __attribute__((always_inline)) {               \
      VecI t;                                                                      \
      asm volatile(PRODUCT : [c] "+v"(c), [t] "=&v"(t) : [w] "v"(w), [x] "v"(x));  \
    };                                                                             \
    for (int64_t r = 0; r < rounds; ++r) {                                         \
      step(c0), step(c1), step(c2), step(c3), step(c4), step(c5);                  \
      step(c6), step(c7), step(c8), step(c9), step(c10), step(c11);                \
      if constexpr (kWholeRow) {                                                   \
        step(d0), step(d1), step(d2), step(d3), step(d4), step(d5);                \
        step(d6), step(d7), step(d8), step(d9), step(d10), step(d11);              \
      }                                                                            \
    }                                                                              \
    return rounds * (kWholeRow ? 24 : 12) * kLanes * (OPERATIONS);                 \
  }

KT_BURN(burn_fp32, "vfmadd231ps %[x], %[w], %[c]", 2)
