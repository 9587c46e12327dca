// Transposes of stored tiles with 512-bit vectors.

// One stored int8 tile [16 k4][16 n][4 kk] into four pieces [4 n4][16 k][4 nn], one per 16 k.
void transpose_u8(const uint8_t* tile, uint8_t* const pieces[4]) {
  const __m512i order =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int g = 0; g < 4; ++g) {
    const uint8_t* source = tile + g * 256;
    const __m512i r0 = _mm512_loadu_si512(source);
    const __m512i r1 = _mm512_loadu_si512(source + 64);
    const __m512i r2 = _mm512_loadu_si512(source + 128);
    const __m512i r3 = _mm512_loadu_si512(source + 192);
    // 4 x 4 transpose of 128-bit lanes, then 4 x 4 transpose of bytes inside each lane.
    const __m512i low01 = _mm512_shuffle_i32x4(r0, r1, 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(r0, r1, 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(r2, r3, 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(r2, r3, 0xee);
    uint8_t* out = pieces[g];
    _mm512_storeu_si512(out, _mm512_shuffle_epi8(_mm512_shuffle_i32x4(low01, low23, 0x88), order));
    _mm512_storeu_si512(out + 64,
                        _mm512_shuffle_epi8(_mm512_shuffle_i32x4(low01, low23, 0xdd), order));
    _mm512_storeu_si512(out + 128,
                        _mm512_shuffle_epi8(_mm512_shuffle_i32x4(high01, high23, 0x88), order));
    _mm512_storeu_si512(out + 192,
                        _mm512_shuffle_epi8(_mm512_shuffle_i32x4(high01, high23, 0xdd), order));
  }
}

// 8 x 8 transpose of 64-bit units, each 2 n by 2 k, whose middle two values swap.
inline void transpose_units(const uint16_t* source, uint16_t* out) {
  const __m512i swap =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
  __m512i r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(source + i * 64), swap);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_epi64(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi64(r[i], r[i + 1]);
  }
  for (int i = 0; i < 2; ++i)
    for (int h = 0; h < 2; ++h) {
      const __m512i a = t[4 * h + i], b = t[4 * h + 2 + i];
      r[4 * h + i] = _mm512_shuffle_i32x4(a, b, 0x88);      // columns i and i + 4
      r[4 * h + 2 + i] = _mm512_shuffle_i32x4(a, b, 0xdd);  // columns i + 2 and i + 6
    }
  for (int i = 0; i < 2; ++i)
    for (int h = 0; h < 2; ++h) {
      const __m512i a = r[2 * h + i], b = r[4 + 2 * h + i];
      _mm512_storeu_si512(out + (2 * h + i) * 64, _mm512_shuffle_i32x4(a, b, 0x88));
      _mm512_storeu_si512(out + (4 + 2 * h + i) * 64, _mm512_shuffle_i32x4(a, b, 0xdd));
    }
}

// One stored bf16 super tile [32 k2][32 n][2 kk] into two pieces [16 n2][32 k][2 nn].
void transpose_bf16(const uint16_t* tile, uint16_t* const pieces[2]) {
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; k += 8)
      for (int n = 0; n < 16; n += 8)
        transpose_units(tile + (half * 16 + k) * 64 + n * 4, pieces[half] + n * 64 + k * 4);
}
