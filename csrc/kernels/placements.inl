// Stored tiles into panel blocks: copies where the panel has the stored form, widening to 16-bit
// integers or fp32 where the ISA's dot products want that. The including file provides
// transpose_u8 and transpose_bf16, and kS16Rows and kF32Rows.

// Four bytes of 16 outputs, [n][4 kk], as 16-bit pairs minus 128 in two rows [n][2 kk].
inline void widen_quads(const uint8_t* quads, int16_t* first, int16_t* second) {
  for (int v = 0; v < 64 / KT_VEC_BYTES; ++v) {
    const VecU q = *reinterpret_cast<const VecU*>(quads + v * KT_VEC_BYTES);
    const VecU low = (q & 0xff) | (q & 0xff00) << 8;
    const VecU high = (q >> 16 & 0xff) | (q >> 24) << 16;
    *reinterpret_cast<VecS16*>(first + v * 2 * kLanes) = reinterpret_cast<VecS16>(low) - 128;
    *reinterpret_cast<VecS16*>(second + v * 2 * kLanes) = reinterpret_cast<VecS16>(high) - 128;
  }
}

// A row of 32 bf16 pairs as two rows of 32 floats.
inline void widen_pairs(const uint16_t* pairs, float* first, float* second) {
  for (int v = 0; v < kTileParts; ++v) {
    const VecU w = *reinterpret_cast<const VecU*>(pairs + v * 2 * kLanes);
    *reinterpret_cast<VecU*>(first + v * kLanes) = w << 16;
    *reinterpret_cast<VecU*>(second + v * kLanes) = w & 0xffff0000;
  }
}

void place_int_forward(const uint8_t* tile, void* block_half) {
  if constexpr (kS16Rows) {
    int16_t* out = static_cast<int16_t*>(block_half);
    for (int k4 = 0; k4 < 16; ++k4)
      widen_quads(tile + k4 * 64, out + 2 * k4 * 64, out + (2 * k4 + 1) * 64);
  } else {
    __builtin_memcpy(block_half, tile, 1024);
  }
}

void place_int_backward(const uint8_t* tile, void* const pieces[4]) {
  if constexpr (kS16Rows) {
    alignas(64) uint8_t turned[4][256];
    uint8_t* const parts[4] = {turned[0], turned[1], turned[2], turned[3]};
    transpose_u8(tile, parts);
    for (int g = 0; g < 4; ++g) {
      int16_t* out = static_cast<int16_t*>(pieces[g]);
      for (int n4 = 0; n4 < 4; ++n4)
        widen_quads(turned[g] + n4 * 64, out + 2 * n4 * 64, out + (2 * n4 + 1) * 64);
    }
  } else {
    uint8_t* const parts[4] = {static_cast<uint8_t*>(pieces[0]), static_cast<uint8_t*>(pieces[1]),
                               static_cast<uint8_t*>(pieces[2]), static_cast<uint8_t*>(pieces[3])};
    transpose_u8(tile, parts);
  }
}

void place_float_forward(const uint16_t* tile, void* block) {
  if constexpr (kF32Rows) {
    float* out = static_cast<float*>(block);
    for (int k2 = 0; k2 < 32; ++k2)
      widen_pairs(tile + k2 * 64, out + 2 * k2 * kPanelCols, out + (2 * k2 + 1) * kPanelCols);
  } else {
    __builtin_memcpy(block, tile, kTileBytesBf16);
  }
}

void place_float_backward(const uint16_t* tile, void* const pieces[2]) {
  if constexpr (kF32Rows) {
    alignas(64) uint16_t turned[2][1024];
    uint16_t* const parts[2] = {turned[0], turned[1]};
    transpose_bf16(tile, parts);
    for (int h = 0; h < 2; ++h) {
      float* out = static_cast<float*>(pieces[h]);
      for (int n2 = 0; n2 < 16; ++n2)
        widen_pairs(turned[h] + n2 * 64, out + 2 * n2 * kPanelCols,
                    out + (2 * n2 + 1) * kPanelCols);
    }
  } else {
    uint16_t* const parts[2] = {static_cast<uint16_t*>(pieces[0]),
                                static_cast<uint16_t*>(pieces[1])};
    transpose_bf16(tile, parts);
  }
}
