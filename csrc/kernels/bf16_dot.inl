// dot_float from bf16 pairs: vdpbf16ps.

KT_DEFINE_STEP(Bf16Step, 14, 6, 32, 128, 64, 64, 4096, KT_PRODUCTS_BF16)

void dot_float(int rows, int64_t blocks, const void* a, int64_t row_bytes, const void* panel,
               bool accumulate, float* c, const Prefetch& next) {
  dot_any<Bf16Step>(rows, blocks, static_cast<const char*>(a), row_bytes,
                    static_cast<const char*>(panel), accumulate, c, next);
}

KT_BURN(burn_bf16, "vdpbf16ps %[x], %[w], %[c]", 4)
