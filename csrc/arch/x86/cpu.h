// What the rest of the core asks of x86-64: its CPU flags and its kernel tables.
#pragma once

// CPU flags that the tables depend on, already masked by what the OS saves on a context switch.
// amx_permission: the OS has granted this process the use of AMX tiles.
// clang-format off
#define KT_CPU_FLAGS(FLAG)                                                                         \
  FLAG(fma) FLAG(avx2) FLAG(avx_vnni)                                                              \
  FLAG(avx512f) FLAG(avx512bw) FLAG(avx512vl) FLAG(avx512dq) FLAG(avx512_vnni) FLAG(avx512_bf16)   \
  FLAG(amx_tile) FLAG(amx_int8) FLAG(amx_bf16) FLAG(amx_permission)

// Rows of KT_ISAS; the tables are in the files beside this one.
#define KT_AVX512_FLAGS fma, avx512f, avx512bw, avx512vl, avx512dq
#define KT_ARCH_ISAS(ROW)                                                                          \
  ROW(kAmxKernels, "amx", KT_AVX512_FLAGS, avx512_vnni, avx512_bf16, amx_tile, amx_int8,           \
      amx_bf16, amx_permission)                                                                    \
  ROW(kAvx512Bf16Kernels, "avx512_bf16", KT_AVX512_FLAGS, avx512_vnni, avx512_bf16)                \
  ROW(kAvx512VnniKernels, "avx512_vnni", KT_AVX512_FLAGS, avx512_vnni)                             \
  ROW(kAvx512Kernels, "avx512", KT_AVX512_FLAGS)                                                   \
  ROW(kAvxVnniKernels, "avx_vnni", avx2, fma, avx_vnni)                                            \
  ROW(kAvx2Kernels, "avx2", avx2, fma)
// clang-format on
