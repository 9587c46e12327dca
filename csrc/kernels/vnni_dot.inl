// dot_int from bytes: vpdpbusd, the terms of a row as rows of their own.
#ifndef KT_VNNI_PREFIX
#define KT_VNNI_PREFIX
#endif

KT_DEFINE_STEP(VnniStep, 14, 6, 16, 64, 1024, 1024, 2048, KT_PRODUCTS_VNNI(KT_VNNI_PREFIX))

void dot_int(int rows, int terms, int64_t blocks, const void* a, int64_t row_bytes,
             const void* panel, bool accumulate, int32_t* c, const Prefetch& next) {
  dot_any<VnniStep>(rows * terms, blocks, static_cast<const char*>(a), row_bytes / terms,
                    static_cast<const char*>(panel), accumulate, c, next);
}

KT_BURN(burn_int, KT_VNNI_PREFIX "vpdpbusd %[x], %[w], %[c]", 8)
