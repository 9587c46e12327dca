#include "packed_experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace kt {
namespace {

const char* const kProjectionNames[] = {"gate_proj", "up_proj", "down_proj"};

int64_t element_bytes(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

// Offset of weight (n, k) within its 32 x 64 super tile, in elements of the format.
int64_t int8_index(int64_t n, int64_t k) { return n / 16 * 1024 + k / 4 * 64 + n % 16 * 4 + k % 4; }
int64_t bf16_index(int64_t n, int64_t k) { return k / 2 * 64 + n * 2 + k % 2; }
// The byte that holds weights (n, k) and (n, k + 32), k < 32.
int64_t int4_index(int64_t n, int64_t k) { return n / 16 * 512 + k / 4 * 64 + n % 16 * 4 + k % 4; }

[[noreturn]] void refuse(const char* what, int64_t expert, Projection projection, float value,
                         const std::string& where) {
  throw std::invalid_argument(
      std::string(what) + ": " + kProjectionNames[static_cast<int>(projection)] + " of expert " +
      std::to_string(expert) + " has " + std::to_string(value) + " at [" + where + "]");
}

LargeBuffer floats(int64_t count) {
  return LargeBuffer(static_cast<size_t>(count * int64_t{sizeof(float)}));
}

}  // namespace

// The 32 output channels of a panel on their way into the tiles: each a row of units of 4 bytes,
// which the tiles hold side by side for all channels.
struct PackedExperts::PanelBuffers {
  PanelBuffers(int64_t width, int64_t units_per_row)
      : values(static_cast<size_t>(width)),
        quantized(static_cast<size_t>(width)),
        multipliers(static_cast<size_t>(width / 32)),
        units(static_cast<size_t>(kPanelCols * units_per_row)) {}
  std::vector<float> values;         // of one channel, padded
  std::vector<uint8_t> quantized;    // int4: one byte each
  std::vector<uint8_t> multipliers;  // int4
  std::vector<uint32_t> units;       // [32][units_per_row], each row with room at its end
};

PackedExperts::PackedExperts(int64_t experts, int64_t hidden, int64_t intermediate,
                             WeightFormat format, bool gated)
    : experts_(experts),
      hidden_(hidden),
      intermediate_(intermediate),
      format_(format),
      gated_(gated) {
  if (experts < 1 || hidden < 1 || intermediate < 1)
    throw std::invalid_argument("experts, hidden and intermediate must be positive, got " +
                                std::to_string(experts) + ", " + std::to_string(hidden) + ", " +
                                std::to_string(intermediate));
  if (hidden_padded() > kMaxContraction || 2 * intermediate_padded() > kMaxContraction)
    throw std::invalid_argument("hidden " + std::to_string(hidden) + " and intermediate " +
                                std::to_string(intermediate) + " must be at most " +
                                std::to_string(kMaxContraction) + " and " +
                                std::to_string(kMaxContraction / 2));
  weights_ = LargeBuffer(static_cast<size_t>(experts * projections() * matrix_bytes()));
  if (is_int4())
    multipliers_ = LargeBuffer(static_cast<size_t>(experts * projections() * matrix_multipliers()));
  if (!is_bf16()) scales_ = floats(experts * channels());
}

int64_t PackedExperts::matrix_bytes() const {
  return hidden_padded() * intermediate_padded() / (kPanelCols * kBlock) * tile_bytes();
}

int64_t PackedExperts::matrix_multipliers() const {
  // Groups of 128 may end in half a group on either side.
  return (hidden_padded() + kBlock) * (intermediate_padded() + kBlock) / int4_group();
}

int64_t PackedExperts::channels() const {
  return (projections() - 1) * intermediate_padded() + hidden_padded();
}

int64_t PackedExperts::first_channel(int64_t expert, Projection projection) const {
  return expert * channels() + slot(projection) * intermediate_padded();
}

uint8_t* PackedExperts::mutable_tiles(int64_t expert, Projection projection) const {
  return weights_.data() + (expert * projections() + slot(projection)) * matrix_bytes();
}

uint8_t* PackedExperts::mutable_multipliers(int64_t expert, Projection projection) const {
  return multipliers_.data() + (expert * projections() + slot(projection)) * matrix_multipliers();
}

const uint8_t* PackedExperts::tiles(int64_t expert, Projection projection) const {
  return mutable_tiles(expert, projection);
}

const float* PackedExperts::scales(int64_t expert, Projection projection) const {
  if (is_bf16()) return nullptr;
  return reinterpret_cast<const float*>(scales_.data()) + first_channel(expert, projection);
}

const float* PackedExperts::bias(int64_t expert, Projection projection) const {
  if (!has_bias_[static_cast<size_t>(projection)]) return nullptr;
  return reinterpret_cast<const float*>(biases_.data()) + first_channel(expert, projection);
}

// Groups of 32: [panel][block][2 halves][2 groups][16 n]; of 128: [panel][2 blocks][2 halves][16
// n].
int64_t PackedExperts::multiplier_offset(Projection projection, int64_t i, int64_t b,
                                         int64_t h) const {
  const int64_t blocks = padded(inputs(projection)) / kBlock;
  if (format_ == WeightFormat::kInt4Group32) return (i * blocks + b) * 64 + h * 32;
  return (i * ((blocks + 1) / 2) + b / 2) * 32 + h * 16;
}

std::array<const uint8_t*, 2> PackedExperts::multipliers(int64_t expert, Projection projection,
                                                         int64_t i, int64_t b, int64_t h) const {
  const uint8_t* first =
      mutable_multipliers(expert, projection) + multiplier_offset(projection, i, b, h);
  return {first, format_ == WeightFormat::kInt4Group32 ? first + 16 : first};
}

void PackedExperts::quantize_row(const KernelTable& kernels, PanelBuffers& panel, int64_t expert,
                                 Projection projection, int64_t n, uint32_t* units) const {
  const int64_t width = static_cast<int64_t>(panel.values.size()), j = n % kPanelCols;
  if (is_bf16()) {
    kernels.to_bf16_row(width, panel.values.data(), reinterpret_cast<uint16_t*>(units));
    return;
  }
  float* scale = reinterpret_cast<float*>(scales_.data()) + first_channel(expert, projection) + n;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(units);
  if (!is_int4()) {
    kernels.quantize_weight_row(width, panel.values.data(), bytes, scale);
    return;
  }
  const int64_t group = int4_group();
  kernels.quantize_int4_row(width, group, panel.values.data(), panel.quantized.data(),
                            panel.multipliers.data(), scale);
  uint8_t* multipliers = mutable_multipliers(expert, projection);
  for (int64_t k = 0; k < width; k += group == 32 ? 32 : 64)
    multipliers[multiplier_offset(projection, n / kPanelCols, k / kBlock, j / 16) +
                (group == 32 ? k % kBlock / 32 * 16 : 0) + j % 16] =
        panel.multipliers[static_cast<size_t>(k / group)];
  for (int64_t k = 0; k < width; k += kBlock)
    for (int64_t i = 0; i < 32; ++i) {
      const uint8_t* c = panel.quantized.data() + k + i;
      bytes[k / 2 + i] = static_cast<uint8_t>(c[0] | c[32] << 4);
    }
}

void PackedExperts::pack(ThreadPool& pool, const KernelTable& kernels, int64_t expert,
                         Projection projection, FloatType type, const void* weight,
                         int64_t row_stride) {
  const int64_t n_real = outputs(projection), k_real = inputs(projection);
  const int64_t k_blocks = padded(k_real) / kBlock;
  const int64_t units_per_block = tile_bytes() / (kPanelCols * 4);
  // A line more than the row: at a power of two, all channels would share a few sets of the cache.
  const int64_t units_per_row = k_blocks * units_per_block + 16;
  // Integer tiles come in two halves of 16 channels.
  const int64_t channels = is_bf16() ? kPanelCols : kPanelCols / 2;
  const char* source = static_cast<const char*>(weight);
  uint8_t* tiles = mutable_tiles(expert, projection);
  pool.run(padded(n_real) / kPanelCols, [&](int64_t i, int) {
    PanelBuffers panel(k_blocks * kBlock, units_per_row);
    for (int64_t j = 0; j < kPanelCols; ++j) {
      const int64_t n = i * kPanelCols + j;
      if (n < n_real) {
        kernels.to_float_row(k_real, type, source + n * row_stride * element_bytes(type),
                             panel.values.data());
        if (!std::isfinite(kernels.absmax_row(k_real, panel.values.data()))) {
          size_t k = 0;
          while (std::isfinite(panel.values[k])) ++k;
          refuse("weights", expert, projection, panel.values[k],
                 std::to_string(n) + ", " + std::to_string(k));
        }
      } else {
        std::fill(panel.values.begin(), panel.values.end(), 0.0f);
      }
      quantize_row(kernels, panel, expert, projection, n, panel.units.data() + j * units_per_row);
    }
    uint32_t* out = reinterpret_cast<uint32_t*>(tiles + i * k_blocks * tile_bytes());
    for (int64_t b = 0; b < k_blocks; ++b)
      for (int64_t first = 0; first < kPanelCols; first += channels)
        for (int64_t u = 0; u < units_per_block; ++u)
          for (int64_t j = 0; j < channels; ++j)
            *out++ = panel.units[static_cast<size_t>((first + j) * units_per_row +
                                                     b * units_per_block + u)];
  });
}

void PackedExperts::set_bias(int64_t expert, Projection projection, const float* bias) {
  process_.require_owner();
  const int64_t count = outputs(projection);
  for (int64_t n = 0; n < count; ++n)
    if (!std::isfinite(bias[n])) refuse("bias", expert, projection, bias[n], std::to_string(n));
  if (!biases_.size()) biases_ = floats(experts_ * channels());
  std::copy_n(bias, count,
              reinterpret_cast<float*>(biases_.data()) + first_channel(expert, projection));
  has_bias_[static_cast<size_t>(projection)] = true;
}

void PackedExperts::unpack(int64_t expert, Projection projection, float* weight) const {
  process_.require_owner();
  const int64_t n_real = outputs(projection), k_real = inputs(projection);
  const int64_t k_blocks = padded(k_real) / kBlock;
  const float* scales = this->scales(expert, projection);
  for (int64_t n = 0; n < n_real; ++n) {
    const int64_t panel = n / kPanelCols, j = n % kPanelCols;
    const uint8_t* tiles = this->tiles(expert, projection) + panel * k_blocks * tile_bytes();
    for (int64_t k = 0; k < k_real; ++k) {
      const uint8_t* tile = tiles + k / kBlock * tile_bytes();
      float& out = weight[n * k_real + k];
      if (is_bf16()) {
        uint16_t half;
        std::memcpy(&half, tile + 2 * bf16_index(j, k % kBlock), 2);
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        std::memcpy(&out, &bits, 4);
      } else if (is_int4()) {
        const bool high = k % kBlock >= 32;
        const int c = (tile[int4_index(j, k % 32)] >> (high ? 4 : 0) & 15) - 8;
        const int m = multipliers(expert, projection, panel, k / kBlock, j / 16)[high][j % 16];
        out = static_cast<float>(m * c) * scales[n];
      } else {
        const int q = static_cast<int>(tile[int8_index(j, k % kBlock)]) - 128;
        out = static_cast<float>(q) * scales[n];
      }
    }
  }
}

}  // namespace kt
