// Transposes of stored tiles with 256-bit vectors.

// One stored int8 tile [16 k4][16 n][4 kk] into four pieces [4 n4][16 k][4 nn], one per 16 k.
void transpose_u8(const uint8_t* tile, uint8_t* const pieces[4]) {
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int g = 0; g < 4; ++g)
    for (int q = 0; q < 4; ++q)
      for (int n4 = 0; n4 < 4; ++n4) {
        const __m128i four =
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + (4 * g + q) * 64 + n4 * 16));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(pieces[g] + n4 * 64 + q * 16),
                         _mm_shuffle_epi8(four, order));
      }
}

// One stored bf16 super tile [32 k2][32 n][2 kk] into two pieces [16 n2][32 k][2 nn]. Units of 64
// bits hold 2 n by 2 k; a transposed unit swaps its middle two values. Units move in 4 x 4 blocks.
void transpose_bf16(const uint16_t* tile, uint16_t* const pieces[2]) {
  const __m256i swap = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  for (int k2 = 0; k2 < 32; k2 += 4)
    for (int n2 = 0; n2 < 16; n2 += 4) {
      __m256i r[4];
      for (int i = 0; i < 4; ++i)
        r[i] = _mm256_shuffle_epi8(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + (k2 + i) * 64 + n2 * 4)),
            swap);
      const __m256i a = _mm256_unpacklo_epi64(r[0], r[1]), b = _mm256_unpackhi_epi64(r[0], r[1]);
      const __m256i c = _mm256_unpacklo_epi64(r[2], r[3]), d = _mm256_unpackhi_epi64(r[2], r[3]);
      const __m256i turned[4] = {
          _mm256_permute2x128_si256(a, c, 0x20), _mm256_permute2x128_si256(b, d, 0x20),
          _mm256_permute2x128_si256(a, c, 0x31), _mm256_permute2x128_si256(b, d, 0x31)};
      for (int i = 0; i < 4; ++i)
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(pieces[k2 / 16] + (n2 + i) * 64 + (k2 % 16) * 4), turned[i]);
    }
}
