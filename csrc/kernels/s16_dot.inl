// dot_int from 16-bit pairs: vpmaddwd, both terms of a row in one pass.

KT_DEFINE_STEP(S16Step, 12, 5, 32, 128, 64, 64, 4096, KT_PRODUCTS_S16)

void dot_int(int rows, int terms, int64_t blocks, const void* a, int64_t row_bytes,
             const void* panel, bool accumulate, int32_t* c, const Prefetch& next) {
  const char* activations = static_cast<const char*>(a);
  const char* weights = static_cast<const char*>(panel);
  if (terms == 1)
    dot_any<S16Step>(rows, blocks, activations, row_bytes, weights, accumulate, c, next);
  else
    dot_any<S16Step, Drain::kSplit>(rows, blocks, activations, row_bytes, weights, accumulate, c,
                                    next);
}

KT_BURN(burn_int, "vpmaddwd %[x], %[w], %[t]\n\tvpaddd %[t], %[c], %[c]", 4)
