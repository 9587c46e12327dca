#include "packed_layout.h"

#include "../formats/bf16.h"
#include "../formats/coded.h"
#include "../formats/int4.h"
#include "../formats/int8.h"

namespace kt {

const WeightForm& form_of(WeightFormat format) {
  switch (format) {
#define KT_ROW(identifier, name, Form) \
  case WeightFormat::identifier: {     \
    static const Form form;            \
    return form;                       \
  }
    KT_FORMATS(KT_ROW)
#undef KT_ROW
  }
  throw std::invalid_argument("weights: no such format");
}

bool PackedLayout::is_float() const { return form().is_float(); }

int64_t PackedLayout::tile_bytes() const { return form().tile_bytes(*this); }

int64_t PackedLayout::channel_granule() const { return form().channel_granule(*this); }

int64_t PackedLayout::matrix_bytes(Section section, Projection p) const {
  switch (section) {
    case Section::kTiles:
      return hidden_padded() * intermediate_padded() / (kPanelCols * kBlock) * tile_bytes();
    case Section::kBiases:
      return any_bias() ? 4 * padded(outputs(p)) : 0;
    default:
      return form().matrix_bytes(*this, section, p);
  }
}

void PackedLayout::check() const {
  if (experts < 1 || hidden < 1 || intermediate < 1)
    throw std::invalid_argument("experts, hidden and intermediate must be positive, got " +
                                std::to_string(experts) + ", " + std::to_string(hidden) + ", " +
                                std::to_string(intermediate));
  if (hidden > kMaxContraction || 2 * intermediate > kMaxContraction)
    throw std::invalid_argument("hidden " + std::to_string(hidden) + " and intermediate " +
                                std::to_string(intermediate) + " must be at most " +
                                std::to_string(kMaxContraction) + " and " +
                                std::to_string(kMaxContraction / 2));
  if (experts > kMaxContraction)
    throw std::invalid_argument("experts: got " + std::to_string(experts) + ", expected at most " +
                                std::to_string(kMaxContraction));
  constexpr int64_t kLargestGroup = int64_t{1} << 20;
  if (coding.group_outputs > kLargestGroup || coding.group_inputs > kLargestGroup)
    throw std::invalid_argument("groups: expected at most " + std::to_string(kLargestGroup));
  form().check(*this);
  if (!gated && biased[static_cast<size_t>(Projection::kGate)])
    throw std::invalid_argument("bias: these experts have no gate projection");
}

}  // namespace kt
