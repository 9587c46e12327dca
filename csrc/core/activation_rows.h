// Rows of activations: as fp32 of the caller's tokens, packed for the dot kernels, and summed back.
#pragma once

#include <cstring>
#include <vector>

#include "experts_block.h"
#include "scratch.h"

namespace kt {

// The rows [T, D] of a caller's tensor as fp32, D padded with zeros to a multiple of 64. Used in
// place when they are fp32 and need no padding.
class FloatRows {
 public:
  FloatRows(const void* source, FloatType type, int64_t rows, int64_t width, Scratch& scratch)
      : source_(static_cast<const char*>(source)),
        type_(type),
        width_(width),
        stride_(padded(width)) {
    if (type == FloatType::kFloat32 && stride_ == width)
      direct_ = static_cast<const float*>(source);
    else
      copy_ = scratch.floats(rows * stride_);
  }

  // Makes row `i` available to `row(i)` and returns it.
  const float* convert(const KernelTable& kernels, int64_t i) const {
    if (direct_) return row(i);
    const int64_t element = type_ == FloatType::kFloat32 ? 4 : 2;
    float* out = copy_ + i * stride_;
    kernels.to_float_row(width_, type_, source_ + i * width_ * element, out);
    std::fill(out + width_, out + stride_, 0.0f);
    return out;
  }
  const float* row(int64_t i) const { return (direct_ ? direct_ : copy_) + i * stride_; }

 private:
  const char* source_;
  FloatType type_;
  int64_t width_, stride_;
  const float* direct_ = nullptr;
  float* copy_ = nullptr;
};

// Routed rows in the form that the dot kernels read: one or two int8 terms, or bf16.
class ActivationRows {
 public:
  ActivationRows(Compute compute, int64_t rows, int64_t width, Scratch& scratch)
      : compute_(compute),
        terms_(compute == Compute::kExact ? 2 : 1),
        width_(width),
        row_bytes_(width * (compute == Compute::kInt8 ? 1 : 2)),
        data_(scratch.bytes(rows * row_bytes_)) {
    if (compute == Compute::kBf16) return;
    scale_ = scratch.floats(rows);
    sums_ = reinterpret_cast<int32_t*>(scratch.floats(rows * terms_));
  }

  // Rows of the integer product for each routed row.
  int terms() const { return terms_; }

  void pack(const KernelTable& kernels, int64_t row, const float* x, const float* fold) {
    uint8_t* out = data_ + row * row_bytes_;
    if (compute_ == Compute::kBf16)
      kernels.to_bf16_row(width_, x, reinterpret_cast<uint16_t*>(out));
    else
      kernels.quantize_row(terms_, width_, x, fold, reinterpret_cast<int8_t*>(out), scale_ + row,
                           sums_ + row * terms_);
  }
  void copy(int64_t from, int64_t to) {
    std::memcpy(data_ + to * row_bytes_, data_ + from * row_bytes_,
                static_cast<size_t>(row_bytes_));
    if (compute_ == Compute::kBf16) return;
    scale_[to] = scale_[from];
    for (int t = 0; t < terms_; ++t) sums_[to * terms_ + t] = sums_[from * terms_ + t];
  }

  // y[m][j] = <row + m, output j of the panel>, m < rows, in fp32.
  void dot(const KernelTable& kernels, int64_t row, int rows, const uint8_t* panel,
           const float* col_scale, const Prefetch& next, float* y) const {
    const int64_t blocks = width_ / kBlock;
    const uint8_t* a = data_ + row * row_bytes_;
    if (compute_ == Compute::kBf16) {
      kernels.dot_bf16(rows, blocks, reinterpret_cast<const uint16_t*>(a), width_,
                       reinterpret_cast<const uint16_t*>(panel), y, next);
      return;
    }
    int32_t c[kMaxDotRows * kPanelCols];
    kernels.dot_u8s8(rows * terms_, blocks, reinterpret_cast<const int8_t*>(a), width_, panel, c,
                     next);
    kernels.scale_tile(rows, terms_, c, scale_ + row, sums_ + row * terms_, col_scale, y);
  }

 private:
  Compute compute_;
  int terms_;
  int64_t width_, row_bytes_;
  uint8_t* data_;
  float* scale_ = nullptr;
  int32_t* sums_ = nullptr;
};

// The weighted sum of a token's routed rows, in a fixed order, written in the caller's dtype.
class TokenSum {
 public:
  TokenSum(float* buffer, int64_t top_k) : buffer_(buffer) {
    weights_.reserve(static_cast<size_t>(top_k));
    rows_.reserve(static_cast<size_t>(top_k));
  }

  void clear() {
    weights_.clear();
    rows_.clear();
  }
  void add(float weight, const float* row) {
    weights_.push_back(weight);
    rows_.push_back(row);
  }
  void write(const KernelTable& kernels, int64_t padded_width, int64_t width, FloatType type,
             void* out, int64_t token) {
    kernels.weighted_sum(static_cast<int>(rows_.size()), padded_width, weights_.data(),
                         rows_.data(), buffer_);
    const int64_t element = type == FloatType::kFloat32 ? 4 : 2;
    kernels.from_float_row(width, type, buffer_, static_cast<char*>(out) + token * width * element);
  }

 private:
  float* buffer_;
  std::vector<float> weights_;
  std::vector<const float*> rows_;
};

}  // namespace kt
