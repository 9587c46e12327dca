// The kernels that work on rows and tiles of floats, written once on compiler vectors of
// KT_VEC_BYTES and compiled by each instruction set's file with that file's flags.
// Included inside `namespace kt { namespace {`: nothing here may have external or weak linkage.
//
// The including file defines KT_VEC_BYTES, KT_STREAM(pointer, vector) for a store past the caches,
// and the register blocks KT_PROJECT_ROWS, KT_EXPAND_ROWS, KT_OUTER_RANKS and KT_OUTER_PARTS.

typedef float VecF __attribute__((vector_size(KT_VEC_BYTES), aligned(4), may_alias));
typedef uint32_t VecU __attribute__((vector_size(KT_VEC_BYTES), aligned(4), may_alias));
typedef int16_t VecS16 __attribute__((vector_size(KT_VEC_BYTES), aligned(4), may_alias));
typedef int32_t VecI __attribute__((vector_size(KT_VEC_BYTES), aligned(4), may_alias));
typedef uint16_t VecU16 __attribute__((vector_size(KT_VEC_BYTES), aligned(4), may_alias));
constexpr bool kWholeRow = KT_VEC_BYTES == 64;
constexpr int kLanes = KT_VEC_BYTES / 4;
constexpr int kTileParts = kPanelCols / kLanes;  // vectors of a tile's row

inline VecF load(const float* p) { return *reinterpret_cast<const VecF*>(p); }
inline void store(float* p, VecF v) { *reinterpret_cast<VecF*>(p) = v; }
inline VecF splat(float x) { return x - VecF{}; }

// `p` is aligned to the vector when `stream` is set.
inline void store_maybe_past_caches(float* p, VecF v, bool stream) {
  if (stream)
    KT_STREAM(p, v);
  else
    store(p, v);
}

// Halves are added pairwise, so that the order is the same for every length.
template <int kCount>
inline float pairwise_sum(const float* lane) {
  if constexpr (kCount == 1) {
    return lane[0];
  } else if constexpr (kCount >= 8) {
    typedef float Half __attribute__((vector_size(kCount * 2), aligned(4), may_alias));
    const Half sum =
        *reinterpret_cast<const Half*>(lane) + *reinterpret_cast<const Half*>(lane + kCount / 2);
    return pairwise_sum<kCount / 2>(reinterpret_cast<const float*>(&sum));
  } else {
    float sum[kCount / 2];
    for (int i = 0; i < kCount / 2; ++i) sum[i] = lane[i] + lane[i + kCount / 2];
    return pairwise_sum<kCount / 2>(sum);
  }
}
inline float horizontal_sum(VecF v) {
  return pairwise_sum<kLanes>(reinterpret_cast<const float*>(&v));
}

// Lines [begin, end) of `next.count` into L2.
inline void prefetch_some(const Prefetch& next, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t line = next.first + i;
    const int64_t in_tile = line & ((int64_t{1} << next.tile_shift) - 1);
    __builtin_prefetch(next.base + (line >> next.tile_shift) * next.tile_stride + in_tile * 64,
                       /*write=*/0, /*locality=*/2);
  }
}

inline uint32_t float_bits(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
inline float bits_float(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}
inline uint16_t bf16_from_float(float x) {
  const uint32_t u = float_bits(x);
  // NaN keeps its top bits and is made quiet; everything else rounds to nearest even.
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : rounded);
}
inline float float_from_bf16(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

inline float float_from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // 2^112 moves the exponent bias from 15 to 127 and makes subnormals exact.
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
}
inline uint16_t half_from_float(float x) {
  const uint32_t sign = (float_bits(x) >> 16) & 0x8000;
  const uint32_t u = float_bits(x) & 0x7fffffff;
  if (u > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (u >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (u < 0x38800000) {
    // Below 2^-14: adding 0.5 puts the subnormal's integer in the low bits, rounded to even.
    const uint32_t denormal = float_bits(bits_float(u) + 0.5f) - 0x3f000000;
    return static_cast<uint16_t>(sign | denormal);
  }
  return static_cast<uint16_t>(sign | ((u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13));
}

// exp(x) with about 1e-7 relative error; NaN stays NaN.
inline float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = __builtin_rintf(x * 1.44269504088896341f);
  float f = x - n * 0.693359375f;
  f = f - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  return p * bits_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}
inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

// erf by the rational approximation 7.1.26 of Abramowitz and Stegun, |error| < 1.5e-7.
inline float fast_erf(float x) {
  const float a = x < 0.0f ? -x : x;
  const float t = 1.0f / (1.0f + 0.3275911f * a);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float y = 1.0f - p * t * fast_exp(-a * a);
  return x < 0.0f ? -y : y;
}

constexpr float kInvSqrt2 = 0.70710678118654752f;
constexpr float kInvSqrt2Pi = 0.39894228040143268f;
constexpr float kGeluTanhOuter = 0.79788456080286536f;  // sqrt(2 / pi)
constexpr float kGeluTanhInner = 0.044715f;

// Value and slope of each activation, as functors so that one loop serves all of them.
struct Swish {
  static inline void both(float x, float alpha, float& value, float& slope) {
    const float s = sigmoid(alpha * x);
    value = x * s;
    slope = s + alpha * value * (1.0f - s);
  }
};
struct GeluErf {
  static inline void both(float x, float, float& value, float& slope) {
    const float half = 0.5f * (1.0f + fast_erf(x * kInvSqrt2));
    value = x * half;
    slope = half + x * kInvSqrt2Pi * fast_exp(-0.5f * x * x);
  }
};
struct GeluTanh {
  // 0.5 * (1 + tanh(z)) = sigmoid(2 z)
  static inline void both(float x, float, float& value, float& slope) {
    const float s = sigmoid(2.0f * kGeluTanhOuter * (x + kGeluTanhInner * x * x * x));
    const float inner = 2.0f * kGeluTanhOuter * (1.0f + 3.0f * kGeluTanhInner * x * x);
    value = x * s;
    slope = s + value * (1.0f - s) * inner;
  }
};
struct Relu {
  static inline void both(float x, float, float& value, float& slope) {
    value = x < 0.0f ? 0.0f : x;
    slope = x > 0.0f ? 1.0f : 0.0f;
  }
};
struct Relu2 {
  static inline void both(float x, float, float& value, float& slope) {
    const float positive = x < 0.0f ? 0.0f : x;
    value = positive * positive;
    slope = 2.0f * positive;
  }
};

// Comparisons are written so that NaN passes through.
inline float clamp_above(float x, float limit) { return x > limit ? limit : x; }
inline float clamp_both(float x, float limit) {
  return clamp_above(x < -limit ? -limit : x, limit);
}

template <class Act, bool kGated, bool kClamped>
void gate_forward_as(const Gate& kind, const GateForward& io) {
  const float alpha = kind.alpha, limit = kind.limit, offset = kind.up_offset;
  for (int m = 0; m < io.rows; ++m) {
    const float* gate = io.gate + (kGated ? m * kPanelCols : 0);
    const float* up = io.up + m * kPanelCols;
    alignas(64) float h[kPanelCols];
    for (int j = 0; j < kPanelCols; ++j) {
      const float g = kGated ? gate[j] : up[j];
      float value, slope;
      Act::both(kClamped ? clamp_above(g, limit) : g, alpha, value, slope);
      const float u = kClamped ? clamp_both(up[j], limit) : up[j];
      h[j] = kGated ? value * (u + offset) : value;
    }
    for (int v = 0; v < kTileParts; ++v) {
      const int j = v * kLanes;
      store_maybe_past_caches(io.h + m * io.ldh + j, load(h + j), io.stream);
      if (!io.keep_up) continue;
      store_maybe_past_caches(io.keep_up + m * io.ldk + j, load(up + j), io.stream);
      if (kGated) store_maybe_past_caches(io.keep_gate + m * io.ldk + j, load(gate + j), io.stream);
    }
  }
}

template <class Act, bool kGated, bool kClamped>
void gate_backward_as(const Gate& kind, const GateBackward& io) {
  const float alpha = kind.alpha, limit = kind.limit, offset = kind.up_offset;
  for (int m = 0; m < io.rows; ++m) {
    const float* gate = io.gate + (kGated ? m * io.ldk : 0);
    const float* up = io.up + m * io.ldk;
    const float* dh = io.dh + m * kPanelCols;
    const float weight = io.weight[m];
    alignas(64) float h[kPanelCols], dgate[kPanelCols], dup[kPanelCols];
    for (int j = 0; j < kPanelCols; ++j) {
      const float g = kGated ? gate[j] : up[j];
      const float weighted = weight * dh[j];
      float value, slope;
      Act::both(kClamped ? clamp_above(g, limit) : g, alpha, value, slope);
      if (kGated) {
        const float u = (kClamped ? clamp_both(up[j], limit) : up[j]) + offset;
        h[j] = value * u;
        const float d_gate = weighted * u * slope, d_up = weighted * value;
        dgate[j] = kClamped && g > limit ? 0.0f : d_gate;
        dup[j] = kClamped && (up[j] > limit || up[j] < -limit) ? 0.0f : d_up;
      } else {
        h[j] = value;
        dup[j] = kClamped && g > limit ? 0.0f : weighted * slope;
      }
    }
    VecF d_weight = {};
    for (int v = 0; v < kTileParts; ++v) {
      const int j = v * kLanes;
      d_weight += load(dh + j) * load(h + j);
      if (kGated) store_maybe_past_caches(io.dgate + m * io.ldd + j, load(dgate + j), io.stream);
      store_maybe_past_caches(io.dup + m * io.ldd + j, load(dup + j), io.stream);
      if (io.h) store_maybe_past_caches(io.h + m * io.ldh + j, load(h + j), io.stream);
    }
    io.d_weight[m * io.ldw] += horizontal_sum(d_weight);
  }
}

#define KT_GATE_VARIANTS(FUNCTION, ACT)                          \
  {                                                              \
    {FUNCTION<ACT, false, false>, FUNCTION<ACT, false, true>}, { \
      FUNCTION<ACT, true, false>, FUNCTION<ACT, true, true>      \
    }                                                            \
  }
// Indexed by activation, gated, clamped.
#define KT_GATE_TABLE(FUNCTION)                                                 \
  {                                                                             \
    KT_GATE_VARIANTS(FUNCTION, Swish), KT_GATE_VARIANTS(FUNCTION, GeluErf),     \
        KT_GATE_VARIANTS(FUNCTION, GeluTanh), KT_GATE_VARIANTS(FUNCTION, Relu), \
        KT_GATE_VARIANTS(FUNCTION, Relu2)                                       \
  }

void gate_forward(const Gate& gate, const GateForward& io) {
  using Function = void (*)(const Gate&, const GateForward&);
  static const Function table[kActivationCount][2][2] = KT_GATE_TABLE(gate_forward_as);
  table[static_cast<int>(gate.activation)][gate.gated][gate.limit < __builtin_inff()](gate, io);
}

void gate_backward(const Gate& gate, const GateBackward& io) {
  using Function = void (*)(const Gate&, const GateBackward&);
  static const Function table[kActivationCount][2][2] = KT_GATE_TABLE(gate_backward_as);
  table[static_cast<int>(gate.activation)][gate.gated][gate.limit < __builtin_inff()](gate, io);
}

void add_row(int rows, const float* bias, float* y) {
  for (int m = 0; m < rows; ++m)
    for (int v = 0; v < kTileParts; ++v) {
      float* part = y + m * kPanelCols + v * kLanes;
      store(part, load(part) + load(bias + v * kLanes));
    }
}

void store_tile(int rows, const float* tile, float* out, int64_t ld, bool stream) {
  for (int m = 0; m < rows; ++m)
    for (int v = 0; v < kTileParts; ++v)
      store_maybe_past_caches(out + m * ld + v * kLanes, load(tile + m * kPanelCols + v * kLanes),
                              stream);
}

void scale_tile(int rows, int terms, const int32_t* c, const float* row_scale,
                const int32_t* row_sum, const float* col_scale, float* y) {
  for (int m = 0; m < rows; ++m) {
    const int32_t* c0 = c + static_cast<int64_t>(m) * terms * kPanelCols;
    const int32_t offset0 = 128 * row_sum[m * terms];
    float* out = y + m * kPanelCols;
    const float scale = row_scale[m];
    if (terms == 1) {
      for (int j = 0; j < kPanelCols; ++j) out[j] = static_cast<float>(c0[j] - offset0) * scale;
    } else {
      const int32_t* c1 = c0 + kPanelCols;
      const int32_t offset1 = 128 * row_sum[m * terms + 1];
      for (int j = 0; j < kPanelCols; ++j)
        out[j] =
            (256.0f * static_cast<float>(c0[j] - offset0) + static_cast<float>(c1[j] - offset1)) *
            scale;
    }
    if (col_scale)
      for (int j = 0; j < kPanelCols; ++j) out[j] *= col_scale[j];
  }
}

template <bool kFold>
inline uint32_t absmax_bits(int64_t n, const float* x, const float* fold) {
  uint32_t best = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = float_bits(kFold ? x[i] * fold[i] : x[i]) & 0x7fffffff;
    best = u > best ? u : best;
  }
  return best;
}

template <bool kFold>
inline void pack_int_row_as(int terms, int64_t n, const float* x, const float* fold, void* out,
                            float* scale, int32_t* sums) {
  const uint32_t bits = absmax_bits<kFold>(n, x, fold);
  const bool finite = bits < 0x7f800000;
  const float levels = terms == 1 ? 127.0f : kExactLevels;
  const float absmax = finite ? bits_float(bits) : 0.0f;
  // Below 2^-100 the reciprocal overflows; such a row is zero for every purpose.
  const float inverse = absmax > 0x1p-100f ? levels / absmax : 0.0f;
  *scale = finite ? (inverse > 0.0f ? absmax / levels : 0.0f) : __builtin_nanf("");
  for (int t = 0; t < terms; ++t) sums[t] = 0;
  if (!finite) {
    __builtin_memset(out, 0, static_cast<size_t>(n) * (kS16Rows ? 2 : terms));
    return;
  }
  const auto quantized = [&](int64_t i) {
    return static_cast<int32_t>(__builtin_rintf((kFold ? x[i] * fold[i] : x[i]) * inverse));
  };
  int8_t* high = static_cast<int8_t*>(out);
  int32_t sum0 = 0, sum1 = 0;
  if constexpr (kS16Rows) {
    int16_t* wide = static_cast<int16_t*>(out);
    for (int64_t i = 0; i < n; ++i) wide[i] = static_cast<int16_t>(quantized(i));
  } else if (terms == 1) {
    for (int64_t i = 0; i < n; ++i) {
      const int32_t q = quantized(i);
      high[i] = static_cast<int8_t>(q);
      sum0 += q;
    }
    sums[0] = sum0;
  } else {
    int8_t* low = high + n;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t q = quantized(i);
      const int32_t hi = (q + 128) >> 8;
      const int32_t lo = q - 256 * hi;
      high[i] = static_cast<int8_t>(hi);
      low[i] = static_cast<int8_t>(lo);
      sum0 += hi;
      sum1 += lo;
    }
    sums[0] = sum0;
    sums[1] = sum1;
  }
}

void pack_int_row(int terms, int64_t n, const float* x, const float* fold, void* out, float* scale,
                  int32_t* sums) {
  if (fold)
    pack_int_row_as<true>(terms, n, x, fold, out, scale, sums);
  else
    pack_int_row_as<false>(terms, n, x, fold, out, scale, sums);
}

void pack_float_row(int64_t n, const float* x, const float* fold, void* out) {
  if constexpr (kF32Rows) {
    float* wide = static_cast<float*>(out);
    for (int64_t i = 0; i < n; ++i) wide[i] = fold ? x[i] * fold[i] : x[i];
  } else {
    uint16_t* half = static_cast<uint16_t*>(out);
    for (int64_t i = 0; i < n; ++i) half[i] = bf16_from_float(fold ? x[i] * fold[i] : x[i]);
  }
}

void to_bf16_row(int64_t n, const float* x, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = bf16_from_float(x[i]);
}

void to_float_row(int64_t n, FloatType type, const void* x, float* out) {
  const uint16_t* half = static_cast<const uint16_t*>(x);
  switch (type) {
    case FloatType::kFloat32:
      __builtin_memcpy(out, x, static_cast<size_t>(n) * 4);
      return;
    case FloatType::kBfloat16:
      for (int64_t i = 0; i < n; ++i) out[i] = float_from_bf16(half[i]);
      return;
    case FloatType::kFloat16:
      for (int64_t i = 0; i < n; ++i) out[i] = float_from_half(half[i]);
      return;
  }
}

void from_float_row(int64_t n, FloatType type, const float* x, void* out) {
  uint16_t* half = static_cast<uint16_t*>(out);
  switch (type) {
    case FloatType::kFloat32:
      __builtin_memcpy(out, x, static_cast<size_t>(n) * 4);
      return;
    case FloatType::kBfloat16:
      for (int64_t i = 0; i < n; ++i) half[i] = bf16_from_float(x[i]);
      return;
    case FloatType::kFloat16:
      for (int64_t i = 0; i < n; ++i) half[i] = half_from_float(x[i]);
      return;
  }
}

float absmax_row(int64_t n, const float* x) {
  return bits_float(absmax_bits<false>(n, x, nullptr));
}

void quantize_weight_row(int64_t n, const float* w, uint8_t* out, float* scale) {
  const float absmax = absmax_row(n, w);
  const float inverse = absmax > 0x1p-100f ? 127.0f / absmax : 0.0f;
  *scale = inverse > 0.0f ? absmax / 127.0f : 0.0f;
  for (int64_t i = 0; i < n; ++i)
    out[i] = static_cast<uint8_t>(static_cast<int32_t>(__builtin_rintf(w[i] * inverse)) + 128);
}

// A product that is rounded before it is added to anything, on ISAs with FMA too.
inline VecF rounded_product(VecF a, VecF b) {
  VecF product = a * b;
  asm("" : "+v"(product));
  return product;
}

// w / step rounded to the 16 levels from `lowest`, -8 or -7. Adding 1.5 * 2^23 leaves no fraction
// bits.
inline VecF int4_levels(VecF w, VecF inverse, float lowest) {
  const VecF magic = splat(0x1.8p23f);
  const VecF c = rounded_product(w, inverse) + magic - magic;
  const VecF low = splat(lowest), high = splat(lowest + 15.0f);
  const VecF above = c < low ? low : c;
  return above > high ? high : above;
}

// The squared error of n weights (a multiple of 32) with that step. In the same order and rounding
// on every ISA, so that all of them choose the same multipliers.
inline float int4_error(int64_t n, const float* w, float step, float lowest) {
  constexpr int kSums = 16;
  const VecF inverse = splat(step > 0.0f ? 1.0f / step : 0.0f);
  VecF error[kSums / kLanes] = {};
  for (int64_t i = 0; i < n; i += kSums)
    for (int v = 0; v < kSums / kLanes; ++v) {
      const VecF part = load(w + i + v * kLanes);
      const VecF off = part - rounded_product(int4_levels(part, inverse, lowest), splat(step));
      error[v] += rounded_product(off, off);
    }
  return pairwise_sum<kSums>(reinterpret_cast<const float*>(error));
}

void quantize_int4_row(int64_t n, int64_t group, const float* w, uint8_t* out, uint8_t* multiplier,
                       float* scale) {
  // 16 steps of the channel's scale make the largest group's step: its absmax is 8 levels.
  const float base = absmax_row(n, w) / (8.0f * 16.0f);
  *scale = base > 0x1p-100f ? base : 0.0f;
  for (int64_t start = 0, g = 0; start < n; start += group, ++g) {
    const int64_t count = n - start < group ? n - start : group;
    const float* part = w + start;
    const float ideal = *scale > 0.0f ? absmax_row(count, part) / 7.5f / *scale : 1.0f;
    // The best of the multiplier that covers the largest weight and some that clip it, with the
    // odd level on either side.
    int best = 1;
    float lowest = -8.0f, best_error = __builtin_inff();
    const int top = ideal < 15.0f ? static_cast<int>(ideal) + 1 : 16;
    for (int m = top > 4 ? top - 4 : 1; m <= top; ++m)
      for (float from = -8.0f; from <= -7.0f; from += 1.0f) {
        if (from == -7.0f && m == 16) continue;  // 8 * 16 is beyond int8
        const float error = int4_error(count, part, *scale * static_cast<float>(m), from);
        if (error < best_error) {
          best = m;
          lowest = from;
          best_error = error;
        }
      }
    multiplier[g] = static_cast<uint8_t>(best | (lowest == -7.0f ? kInt4Raised : 0));
    const float step = *scale * static_cast<float>(best);
    const VecF inverse = splat(step > 0.0f ? 1.0f / step : 0.0f);
    for (int64_t i = 0; i < count; i += kLanes) {
      const VecF c = int4_levels(load(part + i), inverse, lowest) - splat(lowest);
      for (int v = 0; v < kLanes; ++v) out[start + i + v] = static_cast<uint8_t>(c[v]);
    }
  }
}

// m * c + 128 = m * nibble + (128 - 8 * m), or 7 * m where the levels are raised. Two bytes
// multiply at once in 16 bits, since 16 * 15 = 240 does not carry into the upper byte.
void unpack_int4(const uint8_t* nibbles, const uint8_t* const multiplier[2], uint8_t* tile) {
  typedef uint8_t Multipliers __attribute__((vector_size(kLanes), aligned(1), may_alias));
  for (int v = 0; v < 64 / KT_VEC_BYTES; ++v) {
    VecU scale[2], offset[2];
    for (int g = 0; g < 2; ++g) {
      const VecU stored = __builtin_convertvector(
          *reinterpret_cast<const Multipliers*>(multiplier[g] + v * kLanes), VecU);
      const VecU m = stored & 31;
      const VecU byte = 128 - (8 - (stored >> 7)) * m;
      const VecU two = byte | byte << 8;
      scale[g] = m | m << 16;
      offset[g] = two | two << 16;
    }
    for (int k4 = 0; k4 < 8; ++k4) {
      const int at = k4 * 64 + v * KT_VEC_BYTES;
      const VecU both = *reinterpret_cast<const VecU*>(nibbles + at);
      const VecU half[2] = {both & 0x0f0f0f0f, both >> 4 & 0x0f0f0f0f};
      for (int g = 0; g < 2; ++g) {
        const VecU16 product =
            reinterpret_cast<VecU16>(half[g]) * reinterpret_cast<VecU16>(scale[g]);
        *reinterpret_cast<VecU*>(tile + g * 512 + at) = reinterpret_cast<VecU>(product) + offset[g];
      }
    }
  }
}

// Scalar code that compilers turn into vectors whole, widening from bytes and narrowing included.
template <CodeKind kKind>
inline float code_value(uint32_t c) {
  if constexpr (kKind == CodeKind::kUint8 || kKind == CodeKind::kUint4) {
    return static_cast<float>(static_cast<int32_t>(c));
  } else if constexpr (kKind == CodeKind::kE4m3) {
    const uint32_t magnitude = c & 0x7f, sign = (c & 0x80) << 24;
    // Below 8 there is no exponent: steps of 2^-9. Not by a subnormal fp32, which may be flushed.
    const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f;
    const uint32_t normal = (magnitude << 20) + (120u << 23);
    return bits_float((magnitude < 8 ? float_bits(small) : normal) | sign);
  } else {
    const uint32_t magnitude = c & 7, sign = (c & 8) << 28;
    // 1 and above are (2 + fraction) times a power of two; below are 0 and 0.5.
    const uint32_t normal = (magnitude << 22) + (126u << 23);
    const uint32_t small = magnitude ? 126u << 23 : 0u;
    return bits_float((magnitude < 2 ? small : normal) | sign);
  }
}

template <CodeKind kKind>
void decode_codes(const uint8_t* __restrict codes, const CodeScales& groups,
                  uint16_t* __restrict tile) {
  constexpr bool kNibbles = is_four_bit(kKind);
  constexpr bool kIntegers = kKind == CodeKind::kUint8 || kKind == CodeKind::kUint4;
  for (int half = 0; half < 2; ++half) {
    const float* __restrict scale = groups.scale[half];
    const float* __restrict zero = groups.zero[half];
    const int shift = kNibbles ? 4 * half : 0;
    for (int k2 = 0; k2 < 16; ++k2) {
      const uint8_t* __restrict from = codes + k2 * 64 + (kNibbles ? 0 : half * 1024);
      uint16_t* __restrict to = tile + half * 1024 + k2 * 64;
      for (int j = 0; j < 64; ++j) {
        const uint32_t byte = from[j];
        const float value = code_value<kKind>(kNibbles ? byte >> shift & 15 : byte);
        const uint32_t bits = float_bits((kIntegers ? value - zero[j] : value) * scale[j]);
        to[j] = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
      }
    }
  }
}

void decode_tile(CodeKind kind, const uint8_t* codes, const CodeScales& groups, uint16_t* tile) {
  switch (kind) {
    case CodeKind::kE4m3:
      return decode_codes<CodeKind::kE4m3>(codes, groups, tile);
    case CodeKind::kE2m1:
      return decode_codes<CodeKind::kE2m1>(codes, groups, tile);
    case CodeKind::kUint8:
      return decode_codes<CodeKind::kUint8>(codes, groups, tile);
    case CodeKind::kUint4:
      return decode_codes<CodeKind::kUint4>(codes, groups, tile);
  }
}

// Parts of the contraction whose rows and factors stay in the first-level cache together.
constexpr int64_t kProjectPart = 512;

// sums[m][j] (+)= the lanes of x[m] * a[j] over [begin, end).
template <int kRows, int kRanks>
inline void project_block(int64_t begin, int64_t end, const float* const* x, const float* a,
                          int64_t lda, VecF* sums, int64_t lds) {
  VecF acc[kRows][kRanks];
  for (int m = 0; m < kRows; ++m)
    for (int j = 0; j < kRanks; ++j) acc[m][j] = begin ? sums[m * lds + j] : VecF{};
  for (int64_t i = begin; i < end; i += kLanes) {
    VecF row[kRows];
    for (int m = 0; m < kRows; ++m) row[m] = load(x[m] + i);
    for (int j = 0; j < kRanks; ++j) {
      const VecF factor = load(a + j * lda + i);
      for (int m = 0; m < kRows; ++m) acc[m][j] += row[m] * factor;
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int j = 0; j < kRanks; ++j) sums[m * lds + j] = acc[m][j];
}

template <int kRows>
inline void project_rows(int rank, int64_t begin, int64_t end, const float* const* x,
                         const float* a, int64_t lda, VecF* sums, int64_t lds) {
  int j = 0;
  for (; j + 4 <= rank; j += 4)
    project_block<kRows, 4>(begin, end, x, a + j * lda, lda, sums + j, lds);
  for (; j < rank; ++j) project_block<kRows, 1>(begin, end, x, a + j * lda, lda, sums + j, lds);
}

void rank_project(int rows, int rank, int64_t n, const float* const* x, const float* a, int64_t lda,
                  float scaling, float* p, int64_t ldp) {
  constexpr int kMaxRows = 16, kMaxRanks = 8;
  VecF sums[kMaxRows * kMaxRanks];
  for (int row = 0; row < rows; row += kMaxRows)
    for (int first = 0; first < rank; first += kMaxRanks) {
      const int count = rows - row < kMaxRows ? rows - row : kMaxRows;
      const int ranks = rank - first < kMaxRanks ? rank - first : kMaxRanks;
      for (int64_t begin = 0; begin < n; begin += kProjectPart) {
        const int64_t end = n - begin < kProjectPart ? n : begin + kProjectPart;
        const float* factors = a + first * lda;
        int m = 0;
        for (; m + KT_PROJECT_ROWS <= count; m += KT_PROJECT_ROWS)
          project_rows<KT_PROJECT_ROWS>(ranks, begin, end, x + row + m, factors, lda,
                                        sums + m * kMaxRanks, kMaxRanks);
        for (; m < count; ++m)
          project_rows<1>(ranks, begin, end, x + row + m, factors, lda, sums + m * kMaxRanks,
                          kMaxRanks);
      }
      for (int m = 0; m < count; ++m)
        for (int j = 0; j < ranks; ++j)
          p[(row + m) * ldp + first + j] = scaling * horizontal_sum(sums[m * kMaxRanks + j]);
    }
}

template <int kRows>
inline void expand_rows(int rank, const float* p, int64_t ldp, const float* bt, int64_t ldb,
                        float* y) {
  VecF acc[kRows][kTileParts];
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kTileParts; ++v) acc[m][v] = load(y + m * kPanelCols + v * kLanes);
  for (int q = 0; q < rank; ++q) {
    VecF factor[kTileParts];
    for (int v = 0; v < kTileParts; ++v) factor[v] = load(bt + q * ldb + v * kLanes);
    for (int m = 0; m < kRows; ++m) {
      const VecF weight = splat(p[m * ldp + q]);
      for (int v = 0; v < kTileParts; ++v) acc[m][v] += weight * factor[v];
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kTileParts; ++v) store(y + m * kPanelCols + v * kLanes, acc[m][v]);
}

void rank_expand(int rows, int rank, const float* p, int64_t ldp, const float* bt, int64_t ldb,
                 float* y) {
  int m = 0;
  for (; m + KT_EXPAND_ROWS <= rows; m += KT_EXPAND_ROWS)
    expand_rows<KT_EXPAND_ROWS>(rank, p + m * ldp, ldp, bt, ldb, y + m * kPanelCols);
  for (; m < rows; ++m) expand_rows<1>(rank, p + m * ldp, ldp, bt, ldb, y + m * kPanelCols);
}

template <int kRanks>
inline void outer_block(int rows, int64_t col, const float* p, int64_t ldp, const float* const* x,
                        float* g, int64_t ldg) {
  constexpr int kParts = KT_OUTER_PARTS;
  VecF acc[kRanks][kParts];
  for (int q = 0; q < kRanks; ++q)
    for (int v = 0; v < kParts; ++v) acc[q][v] = load(g + q * ldg + col + v * kLanes);
  for (int m = 0; m < rows; ++m) {
    VecF row[kParts];
    for (int v = 0; v < kParts; ++v) row[v] = load(x[m] + col + v * kLanes);
    for (int q = 0; q < kRanks; ++q) {
      const VecF weight = splat(p[m * ldp + q]);
      for (int v = 0; v < kParts; ++v) acc[q][v] += weight * row[v];
    }
  }
  for (int q = 0; q < kRanks; ++q)
    for (int v = 0; v < kParts; ++v) store(g + q * ldg + col + v * kLanes, acc[q][v]);
}

void rank_outer(int rows, int rank, int64_t cols, const float* p, int64_t ldp,
                const float* const* x, float* g, int64_t ldg) {
  for (int64_t col = 0; col < cols; col += KT_OUTER_PARTS * kLanes) {
    int q = 0;
    for (; q + KT_OUTER_RANKS <= rank; q += KT_OUTER_RANKS)
      outer_block<KT_OUTER_RANKS>(rows, col, p + q, ldp, x, g + q * ldg, ldg);
    for (; q < rank; ++q) outer_block<1>(rows, col, p + q, ldp, x, g + q * ldg, ldg);
  }
}

// A 32-bit finalizer with full avalanche over (row key, column); the same on every ISA.
inline uint32_t dropout_hash(uint32_t row_key, uint32_t column) {
  uint32_t h = row_key + column * 0x9e3779b1u;
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  h ^= h >> 16;
  return h;
}

void dropout_row(const DropoutKey& key, int64_t first, int64_t n, const float* x, float* y) {
  const uint32_t row_key = key.row_key, threshold = key.threshold;
  const uint32_t start = static_cast<uint32_t>(first);
  const float keep = key.keep_scale;
  for (uint32_t j = 0; j < static_cast<uint32_t>(n); ++j)
    y[j] = dropout_hash(row_key, start + j) < threshold ? 0.0f : x[j] * keep;
}

void weighted_sum(int count, int64_t n, const float* weight, const float* const* rows, float* out) {
  for (int64_t j = 0; j < n; j += kLanes) {
    VecF acc = {};
    for (int k = 0; k < count; ++k) acc += splat(weight[k]) * load(rows[k] + j);
    store(out + j, acc);
  }
}

float dot_row(int64_t n, const float* a, const float* b) {
  VecF acc = {};
  for (int64_t i = 0; i < n; i += kLanes) acc += load(a + i) * load(b + i);
  return horizontal_sum(acc);
}

float read_row(int64_t n, const float* x) {
  // Four sums hide the latency of the additions behind the memory's.
  VecF acc[4] = {};
  for (int64_t i = 0; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int v = 0; v < 4; ++v) acc[v] += load(x + i + v * kLanes);
  return horizontal_sum(acc[0] + acc[1] + acc[2] + acc[3]);
}

#define KT_FIELD(result, name, arguments) name,
#define KT_TABLE(NAME, INT_DOT, FLOAT_DOT, INT_PANEL, FLOAT_PANEL, ROWS1, ROWS2, FLOAT_ROWS) \
  {                                                                                          \
    NAME, INT_DOT, FLOAT_DOT, PanelForm::INT_PANEL, PanelForm::FLOAT_PANEL, {ROWS1, ROWS2},  \
        FLOAT_ROWS, KT_KERNELS(KT_FIELD)                                                     \
  }
