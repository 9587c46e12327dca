#include "packed_experts.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace kt {
namespace {

const char* const kProjectionNames[] = {"gate_proj", "up_proj", "down_proj"};

int64_t element_bytes(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

// Byte offset of weight (n, k) within its 32 x 64 super tile, in elements of the format.
int64_t int8_index(int64_t n, int64_t k) { return n / 16 * 1024 + k / 4 * 64 + n % 16 * 4 + k % 4; }
int64_t bf16_index(int64_t n, int64_t k) { return k / 2 * 64 + n * 2 + k % 2; }

[[noreturn]] void refuse_row(int64_t expert, Projection projection, int64_t n,
                             const std::vector<float>& row) {
  size_t k = 0;
  while (std::isfinite(row[k])) ++k;
  throw std::invalid_argument(std::string("weights: ") +
                              kProjectionNames[static_cast<int>(projection)] + " of expert " +
                              std::to_string(expert) + " has " + std::to_string(row[k]) + " at [" +
                              std::to_string(n) + ", " + std::to_string(k) + "]");
}

}  // namespace

PackedExperts::PackedExperts(int64_t experts, int64_t hidden, int64_t intermediate,
                             WeightFormat format)
    : experts_(experts), hidden_(hidden), intermediate_(intermediate), format_(format) {
  if (experts < 1 || hidden < 1 || intermediate < 1)
    throw std::invalid_argument("experts, hidden and intermediate must be positive, got " +
                                std::to_string(experts) + ", " + std::to_string(hidden) + ", " +
                                std::to_string(intermediate));
  if (hidden_padded() > kMaxFoldedRow || 2 * intermediate_padded() > kMaxFoldedRow)
    throw std::invalid_argument("hidden " + std::to_string(hidden) + " and intermediate " +
                                std::to_string(intermediate) + " must be at most " +
                                std::to_string(kMaxFoldedRow) + " and " +
                                std::to_string(kMaxFoldedRow / 2));
  weights_ = LargeBuffer(static_cast<size_t>(experts * kProjectionCount * matrix_bytes()));
  if (format == WeightFormat::kInt8)
    scales_ = LargeBuffer(static_cast<size_t>(
        experts * (2 * intermediate_padded() + hidden_padded()) * int64_t{sizeof(float)}));
}

int64_t PackedExperts::matrix_bytes() const {
  return hidden_padded() * intermediate_padded() * (format_ == WeightFormat::kInt8 ? 1 : 2);
}

uint8_t* PackedExperts::mutable_tiles(int64_t expert, Projection projection) const {
  return weights_.data() +
         (expert * kProjectionCount + static_cast<int64_t>(projection)) * matrix_bytes();
}

float* PackedExperts::mutable_scales(int64_t expert, Projection projection) const {
  if (format_ != WeightFormat::kInt8) return nullptr;
  const int64_t per_expert = 2 * intermediate_padded() + hidden_padded();
  return reinterpret_cast<float*>(scales_.data()) + expert * per_expert +
         static_cast<int64_t>(projection) * intermediate_padded();
}

const uint8_t* PackedExperts::tiles(int64_t expert, Projection projection) const {
  return mutable_tiles(expert, projection);
}

const float* PackedExperts::scales(int64_t expert, Projection projection) const {
  return mutable_scales(expert, projection);
}

void PackedExperts::pack(ThreadPool& pool, const KernelTable& kernels, int64_t expert,
                         Projection projection, FloatType type, const void* weight,
                         int64_t row_stride) {
  const int64_t n_real = outputs(projection), k_real = inputs(projection);
  const int64_t n_panels = padded(n_real) / kPanelCols, k_blocks = padded(k_real) / kBlock;
  uint8_t* out = mutable_tiles(expert, projection);
  float* scales = mutable_scales(expert, projection);
  const char* source = static_cast<const char*>(weight);

  pool.run(n_panels, [&](int64_t panel, int) {
    const int64_t k_padded = k_blocks * kBlock;
    std::vector<float> row(static_cast<size_t>(k_padded), 0.0f);
    std::vector<uint8_t> quantized(static_cast<size_t>(k_padded));
    std::vector<uint16_t> rounded(static_cast<size_t>(k_padded));
    uint8_t* tiles = out + panel * k_blocks * tile_bytes();
    for (int64_t j = 0; j < kPanelCols; ++j) {
      const int64_t n = panel * kPanelCols + j;
      if (n < n_real) {
        kernels.to_float_row(k_real, type, source + n * row_stride * element_bytes(type),
                             row.data());
        if (!std::isfinite(kernels.absmax_row(k_real, row.data())))
          refuse_row(expert, projection, n, row);
      } else {
        std::fill(row.begin(), row.end(), 0.0f);
      }
      if (format_ == WeightFormat::kInt8) {
        kernels.quantize_weight_row(k_padded, row.data(), quantized.data(), &scales[n]);
        for (int64_t k = 0; k < k_padded; k += 4)
          std::memcpy(tiles + k / kBlock * kTileBytesInt8 + int8_index(j, k % kBlock),
                      quantized.data() + k, 4);
      } else {
        kernels.to_bf16_row(k_padded, row.data(), rounded.data());
        for (int64_t k = 0; k < k_padded; k += 2)
          std::memcpy(tiles + k / kBlock * kTileBytesBf16 + bf16_index(j, k % kBlock) * 2,
                      rounded.data() + k, 4);
      }
    }
  });
}

void PackedExperts::unpack(int64_t expert, Projection projection, float* weight) const {
  process_.require_owner();
  const int64_t n_real = outputs(projection), k_real = inputs(projection);
  const int64_t k_blocks = padded(k_real) / kBlock;
  const uint8_t* tiles = mutable_tiles(expert, projection);
  const float* scales = mutable_scales(expert, projection);
  for (int64_t n = 0; n < n_real; ++n) {
    const uint8_t* panel = tiles + n / kPanelCols * k_blocks * tile_bytes();
    for (int64_t k = 0; k < k_real; ++k) {
      const uint8_t* tile = panel + k / kBlock * tile_bytes();
      if (format_ == WeightFormat::kInt8) {
        const int q = static_cast<int>(tile[int8_index(n % kPanelCols, k % kBlock)]) - 128;
        weight[n * k_real + k] = static_cast<float>(q) * scales[n];
      } else {
        uint16_t half;
        std::memcpy(&half, tile + 2 * bf16_index(n % kPanelCols, k % kBlock), 2);
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        std::memcpy(&weight[n * k_real + k], &bits, 4);
      }
    }
  }
}

}  // namespace kt
