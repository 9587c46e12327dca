// Rows of activations: as fp32 of the caller's tokens, packed for the dot kernels, and summed back.
#pragma once

#include <algorithm>
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

// Routed rows in the form that the dot kernels read: one or two integer terms, or floats.
class ActivationRows {
 public:
  ActivationRows(const KernelTable& kernels, Compute compute, int64_t rows, int64_t width,
                 Scratch& scratch)
      : kernels_(kernels),
        integer_(compute != Compute::kBf16),
        terms_(compute == Compute::kExact ? 2 : 1),
        width_(width),
        element_bytes_(element_bytes(integer_ ? kernels.int_panel : kernels.float_panel)),
        row_bytes_(width * element_bytes_ * (byte_terms() ? terms_ : 1)),
        data_(scratch.bytes(rows * row_bytes_)) {
    if (!integer_) return;
    scale_ = scratch.floats(rows);
    sums_ = reinterpret_cast<int32_t*>(scratch.floats(rows * terms_));
  }

  int64_t row_bytes() const { return row_bytes_; }
  // Routed rows that one dot takes.
  int max_rows() const {
    return integer_ ? kernels_.max_int_rows[terms_ - 1] : kernels_.max_float_rows;
  }
  // Rows of a dot's result for each routed row.
  int sums_per_row() const { return integer_ ? terms_ : 1; }

  void pack(int64_t row, const float* x, const float* fold) {
    uint8_t* out = data_ + row * row_bytes_;
    if (integer_)
      kernels_.pack_int_row(terms_, width_, x, fold, out, scale_ + row, sums_ + row * terms_);
    else
      kernels_.pack_float_row(width_, x, fold, out);
  }
  void copy(int64_t from, int64_t to) {
    std::memcpy(data_ + to * row_bytes_, data_ + from * row_bytes_,
                static_cast<size_t>(row_bytes_));
    if (!integer_) return;
    scale_[to] = scale_[from];
    for (int t = 0; t < terms_; ++t) sums_[to * terms_ + t] = sums_[from * terms_ + t];
  }

  // sums[rows * sums_per_row][32] (+)= rows times `blocks` blocks of a panel, from block `first` of
  // the contraction; int32 for the integer products.
  void dot(int64_t row, int rows, int64_t first, int64_t blocks, const void* panel, bool accumulate,
           float* sums, const Prefetch& next) const {
    const uint8_t* a = data_ + row * row_bytes_ + first * kBlock * element_bytes_;
    if (integer_)
      kernels_.dot_int(rows, terms_, blocks, a, row_bytes_, panel, accumulate,
                       reinterpret_cast<int32_t*>(sums), next);
    else
      kernels_.dot_float(rows, blocks, a, row_bytes_, panel, accumulate, sums, next);
  }
  // y[m][j] = <row + m, output j of the panel>; returns where y lies, in `buffer` or in `sums`.
  float* finish(int64_t row, int rows, const float* col_scale, float* sums, float* buffer) const {
    if (!integer_) return sums;
    kernels_.scale_tile(rows, terms_, reinterpret_cast<const int32_t*>(sums), scale_ + row,
                        sums_ + row * terms_, col_scale, buffer);
    return buffer;
  }

 private:
  static int64_t element_bytes(PanelForm form) {
    return form == PanelForm::kU8 ? 1 : form == PanelForm::kF32 ? 4 : 2;
  }
  bool byte_terms() const { return integer_ && kernels_.int_panel == PanelForm::kU8; }

  const KernelTable& kernels_;
  bool integer_;
  int terms_;
  int64_t width_, element_bytes_, row_bytes_;
  uint8_t* data_;
  float* scale_ = nullptr;
  int32_t* sums_ = nullptr;
};

// The weighted sum of a token's routed rows, in the order of their experts, written in the caller's
// dtype. Experts may come in runs: what earlier ones have summed waits in fp32.
class TokenSum {
 public:
  // buffer: [D padded]. waiting: [T, D padded], null where there is one run.
  TokenSum(const KernelTable& kernels, float* buffer, float* waiting, const RunOfExperts& run,
           int64_t width, FloatType type)
      : kernels_(kernels),
        buffer_(buffer),
        waiting_(waiting),
        run_(run),
        width_(width),
        type_(type) {}

  void clear() { parts_.clear(); }
  void add(int64_t row, float weight, const float* values) {
    parts_.push_back({row, weight, values});
  }
  void write(void* out, int64_t token) {
    float* waiting = waiting_ ? waiting_ + token * padded(width_) : nullptr;
    if (parts_.empty() && !run_.first && !run_.last) return;
    // Rows are sorted by expert.
    std::sort(parts_.begin(), parts_.end(),
              [](const Part& a, const Part& b) { return a.row < b.row; });
    weights_.clear();
    rows_.clear();
    if (!run_.first) {
      weights_.push_back(1.0f);
      rows_.push_back(waiting);
    }
    for (const Part& part : parts_) {
      weights_.push_back(part.weight);
      rows_.push_back(part.values);
    }
    kernels_.weighted_sum(static_cast<int>(rows_.size()), padded(width_), weights_.data(),
                          rows_.data(), buffer_);
    if (run_.last) {
      const int64_t element = type_ == FloatType::kFloat32 ? 4 : 2;
      kernels_.from_float_row(width_, type_, buffer_,
                              static_cast<char*>(out) + token * width_ * element);
    } else {
      std::memcpy(waiting, buffer_, sizeof(float) * static_cast<size_t>(padded(width_)));
    }
  }

 private:
  struct Part {
    int64_t row;
    float weight;
    const float* values;
  };

  const KernelTable& kernels_;
  float* const buffer_;
  float* const waiting_;
  const RunOfExperts run_;
  const int64_t width_;
  const FloatType type_;
  std::vector<Part> parts_;
  std::vector<float> weights_;
  std::vector<const float*> rows_;
};

}  // namespace kt
