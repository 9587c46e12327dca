// Everything of a kernel table but the dot products and the transposes, written once on compiler
// vectors of KT_VEC_BYTES and compiled by each instruction set's file with that file's flags.
// Included inside `namespace kt { namespace {`: nothing here may have external or weak linkage.

typedef float VecF __attribute__((vector_size(KT_VEC_BYTES), aligned(4), may_alias));
constexpr int kLanes = KT_VEC_BYTES / 4;

inline VecF load(const float* p) { return *reinterpret_cast<const VecF*>(p); }
inline void store(float* p, VecF v) { *reinterpret_cast<VecF*>(p) = v; }
inline VecF splat(float x) { return x - VecF{}; }

inline float horizontal_sum(VecF v) {
  // Pairwise, so that the order is the same for every length.
  float lane[kLanes];
  __builtin_memcpy(lane, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
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

// Value and derivative of each activation, as functors so that one loop serves all of them.
struct Silu {
  static inline float value(float x) { return x * sigmoid(x); }
  static inline void both(float x, float& value, float& slope) {
    const float s = sigmoid(x);
    value = x * s;
    slope = s + value * (1.0f - s);
  }
};
struct GeluErf {
  static inline float value(float x) { return 0.5f * x * (1.0f + fast_erf(x * kInvSqrt2)); }
  static inline void both(float x, float& value, float& slope) {
    const float half = 0.5f * (1.0f + fast_erf(x * kInvSqrt2));
    value = x * half;
    slope = half + x * kInvSqrt2Pi * fast_exp(-0.5f * x * x);
  }
};
struct GeluTanh {
  // 0.5 * (1 + tanh(z)) = sigmoid(2 z)
  static inline float value(float x) {
    return x * sigmoid(2.0f * kGeluTanhOuter * (x + kGeluTanhInner * x * x * x));
  }
  static inline void both(float x, float& value, float& slope) {
    const float s = sigmoid(2.0f * kGeluTanhOuter * (x + kGeluTanhInner * x * x * x));
    const float inner = 2.0f * kGeluTanhOuter * (1.0f + 3.0f * kGeluTanhInner * x * x);
    value = x * s;
    slope = s + value * (1.0f - s) * inner;
  }
};
struct QuickGelu {
  static inline float value(float x) { return x * sigmoid(1.702f * x); }
  static inline void both(float x, float& value, float& slope) {
    const float s = sigmoid(1.702f * x);
    value = x * s;
    slope = s + 1.702f * value * (1.0f - s);
  }
};

template <class Act>
void gate_forward_as(int64_t n, const float* __restrict__ gate, const float* __restrict__ up,
                     float* __restrict__ h) {
  for (int64_t i = 0; i < n; ++i) h[i] = Act::value(gate[i]) * up[i];
}

// Pieces of kPanelCols, so that the compiler knows the length and vectorizes without checks.
template <class Act>
float gate_backward_as(int64_t n, float weight, const float* __restrict__ dh,
                       const float* __restrict__ gate, const float* __restrict__ up,
                       float* __restrict__ dgate, float* __restrict__ dup, float* __restrict__ h) {
  VecF d_weight = {};
  for (int64_t start = 0; start < n; start += kPanelCols) {
    for (int64_t i = start; i < start + kPanelCols; ++i) {
      float value, slope;
      Act::both(gate[i], value, slope);
      const float weighted = weight * dh[i];
      h[i] = value * up[i];
      dgate[i] = weighted * up[i] * slope;
      dup[i] = weighted * value;
    }
    for (int64_t i = start; i < start + kPanelCols; i += kLanes)
      d_weight += load(dh + i) * load(h + i);
  }
  return horizontal_sum(d_weight);
}

void gate_forward(Activation act, int64_t n, const float* gate, const float* up, float* h) {
  switch (act) {
    case Activation::kSilu:
      return gate_forward_as<Silu>(n, gate, up, h);
    case Activation::kGeluErf:
      return gate_forward_as<GeluErf>(n, gate, up, h);
    case Activation::kGeluTanh:
      return gate_forward_as<GeluTanh>(n, gate, up, h);
    case Activation::kQuickGelu:
      return gate_forward_as<QuickGelu>(n, gate, up, h);
  }
}

float gate_backward(Activation act, int64_t n, float weight, const float* dh, const float* gate,
                    const float* up, float* dgate, float* dup, float* h) {
  switch (act) {
    case Activation::kSilu:
      return gate_backward_as<Silu>(n, weight, dh, gate, up, dgate, dup, h);
    case Activation::kGeluErf:
      return gate_backward_as<GeluErf>(n, weight, dh, gate, up, dgate, dup, h);
    case Activation::kGeluTanh:
      return gate_backward_as<GeluTanh>(n, weight, dh, gate, up, dgate, dup, h);
    case Activation::kQuickGelu:
      return gate_backward_as<QuickGelu>(n, weight, dh, gate, up, dgate, dup, h);
  }
  return 0.0f;
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

inline uint32_t absmax_bits(int64_t n, const float* x) {
  uint32_t best = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t u = float_bits(x[i]) & 0x7fffffff;
    best = u > best ? u : best;
  }
  return best;
}

void quantize_terms(int terms, int64_t n, const float* x, int8_t* out, float* scale,
                    int32_t* sums) {
  const uint32_t bits = absmax_bits(n, x);
  const bool finite = bits < 0x7f800000;
  const float levels = terms == 1 ? 127.0f : kExactLevels;
  const float absmax = finite ? bits_float(bits) : 0.0f;
  // Below 2^-100 the reciprocal overflows; such a row is zero for every purpose.
  const float inverse = absmax > 0x1p-100f ? levels / absmax : 0.0f;
  *scale = finite ? (inverse > 0.0f ? absmax / levels : 0.0f) : __builtin_nanf("");
  if (!finite) {
    __builtin_memset(out, 0, static_cast<size_t>(n * terms));
    for (int t = 0; t < terms; ++t) sums[t] = 0;
    return;
  }
  int32_t sum0 = 0, sum1 = 0;
  if (terms == 1) {
    for (int64_t i = 0; i < n; ++i) {
      const int32_t q = static_cast<int32_t>(__builtin_rintf(x[i] * inverse));
      out[i] = static_cast<int8_t>(q);
      sum0 += q;
    }
    sums[0] = sum0;
    return;
  }
  int8_t* low = out + n;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t q = static_cast<int32_t>(__builtin_rintf(x[i] * inverse));
    const int32_t hi = (q + 128) >> 8;
    const int32_t lo = q - 256 * hi;
    out[i] = static_cast<int8_t>(hi);
    low[i] = static_cast<int8_t>(lo);
    sum0 += hi;
    sum1 += lo;
  }
  sums[0] = sum0;
  sums[1] = sum1;
}

void quantize_row(int terms, int64_t n, const float* x, const float* fold, int8_t* out,
                  float* scale, int32_t* sums) {
  if (!fold) return quantize_terms(terms, n, x, out, scale, sums);
  float folded[kMaxFoldedRow];
  for (int64_t i = 0; i < n; ++i) folded[i] = x[i] * fold[i];
  quantize_terms(terms, n, folded, out, scale, sums);
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

float absmax_row(int64_t n, const float* x) { return bits_float(absmax_bits(n, x)); }

void quantize_weight_row(int64_t n, const float* w, uint8_t* out, float* scale) {
  const float absmax = bits_float(absmax_bits(n, w));
  const float inverse = absmax > 0x1p-100f ? 127.0f / absmax : 0.0f;
  *scale = inverse > 0.0f ? absmax / 127.0f : 0.0f;
  for (int64_t i = 0; i < n; ++i)
    out[i] = static_cast<uint8_t>(static_cast<int32_t>(__builtin_rintf(w[i] * inverse)) + 128);
}

template <int kRows, int kRanks>
inline void project_block(int64_t n, const float* const* x, const float* a, int64_t lda,
                          float scaling, float* p, int ldp) {
  VecF acc[kRows][kRanks] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    VecF row[kRows];
    for (int m = 0; m < kRows; ++m) row[m] = load(x[m] + i);
    for (int j = 0; j < kRanks; ++j) {
      const VecF factor = load(a + j * lda + i);
      for (int m = 0; m < kRows; ++m) acc[m][j] += row[m] * factor;
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int j = 0; j < kRanks; ++j) p[m * ldp + j] = scaling * horizontal_sum(acc[m][j]);
}

template <int kRows>
inline void project_rows(int rank, int64_t n, const float* const* x, const float* a, int64_t lda,
                         float scaling, float* p) {
  int j = 0;
  for (; j + 4 <= rank; j += 4)
    project_block<kRows, 4>(n, x, a + j * lda, lda, scaling, p + j, rank);
  for (; j < rank; ++j) project_block<kRows, 1>(n, x, a + j * lda, lda, scaling, p + j, rank);
}

void rank_project(int rows, int rank, int64_t n, const float* const* x, const float* a, int64_t lda,
                  float scaling, float* p) {
  int m = 0;
  for (; m + KT_PROJECT_ROWS <= rows; m += KT_PROJECT_ROWS)
    project_rows<KT_PROJECT_ROWS>(rank, n, x + m, a, lda, scaling, p + m * rank);
  for (; m < rows; ++m) project_rows<1>(rank, n, x + m, a, lda, scaling, p + m * rank);
}

template <int kRows>
inline void expand_rows(int rank, const float* p, const float* bt, int64_t ldb, float* y) {
  constexpr int kParts = kPanelCols / kLanes;
  VecF acc[kRows][kParts];
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kParts; ++v) acc[m][v] = load(y + m * kPanelCols + v * kLanes);
  for (int q = 0; q < rank; ++q) {
    VecF factor[kParts];
    for (int v = 0; v < kParts; ++v) factor[v] = load(bt + q * ldb + v * kLanes);
    for (int m = 0; m < kRows; ++m) {
      const VecF weight = splat(p[m * rank + q]);
      for (int v = 0; v < kParts; ++v) acc[m][v] += weight * factor[v];
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kParts; ++v) store(y + m * kPanelCols + v * kLanes, acc[m][v]);
}

void rank_expand(int rows, int rank, const float* p, const float* bt, int64_t ldb, float* y) {
  int m = 0;
  for (; m + KT_EXPAND_ROWS <= rows; m += KT_EXPAND_ROWS)
    expand_rows<KT_EXPAND_ROWS>(rank, p + m * rank, bt, ldb, y + m * kPanelCols);
  for (; m < rows; ++m) expand_rows<1>(rank, p + m * rank, bt, ldb, y + m * kPanelCols);
}

template <int kRanks>
inline void outer_block(int rows, int rank, int64_t col, const float* p, const float* const* x,
                        float* g, int64_t ldg) {
  constexpr int kParts = KT_OUTER_PARTS;
  VecF acc[kRanks][kParts];
  for (int q = 0; q < kRanks; ++q)
    for (int v = 0; v < kParts; ++v) acc[q][v] = load(g + q * ldg + col + v * kLanes);
  for (int m = 0; m < rows; ++m) {
    VecF row[kParts];
    for (int v = 0; v < kParts; ++v) row[v] = load(x[m] + col + v * kLanes);
    for (int q = 0; q < kRanks; ++q) {
      const VecF weight = splat(p[m * rank + q]);
      for (int v = 0; v < kParts; ++v) acc[q][v] += weight * row[v];
    }
  }
  for (int q = 0; q < kRanks; ++q)
    for (int v = 0; v < kParts; ++v) store(g + q * ldg + col + v * kLanes, acc[q][v]);
}

void rank_outer(int rows, int rank, int64_t cols, const float* p, const float* const* x, float* g,
                int64_t ldg) {
  for (int64_t col = 0; col < cols; col += KT_OUTER_PARTS * kLanes) {
    int q = 0;
    for (; q + KT_OUTER_RANKS <= rank; q += KT_OUTER_RANKS)
      outer_block<KT_OUTER_RANKS>(rows, rank, col, p + q, x, g + q * ldg, ldg);
    for (; q < rank; ++q) outer_block<1>(rows, rank, col, p + q, x, g + q * ldg, ldg);
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

#define KT_TABLE(NAME)                                                                             \
  {                                                                                                \
    NAME, dot_u8s8, dot_bf16, transpose_u8, transpose_bf16, scale_tile, quantize_row, to_bf16_row, \
        to_float_row, from_float_row, absmax_row, quantize_weight_row, gate_forward,               \
        gate_backward, rank_project, rank_expand, rank_outer, dropout_row, weighted_sum            \
  }
