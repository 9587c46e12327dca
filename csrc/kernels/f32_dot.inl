// dot_float from bf16 weights widened to fp32: vfmadd231ps.

KT_DEFINE_STEP(F32Step, 14, 6, 64, 128, 64, 64, 8192, KT_PRODUCTS_F32)

void dot_float(int rows, int64_t blocks, const void* a, int64_t row_bytes, const void* panel,
               bool accumulate, float* c, const Prefetch& next) {
  dot_any<F32Step>(rows, blocks, static_cast<const char*>(a), row_bytes,
                   static_cast<const char*>(panel), accumulate, c, next);
}

int64_t burn_bf16(int64_t rounds) { return burn_fp32(rounds); }
