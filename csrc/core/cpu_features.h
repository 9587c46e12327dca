// Which instruction sets this machine has, and which kernel table to use.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../kernels/kernel_table.h"

namespace kt {

// CPU flags that the tables depend on, already masked by what the OS saves on a context switch.
// amx_permission: the OS has granted this process the use of AMX tiles.
#define KT_CPU_FLAGS(FLAG) \
  FLAG(fma)                \
  FLAG(avx2)               \
  FLAG(avx_vnni)           \
  FLAG(avx512f)            \
  FLAG(avx512bw)           \
  FLAG(avx512vl)           \
  FLAG(avx512dq)           \
  FLAG(avx512_vnni)        \
  FLAG(avx512_bf16) FLAG(amx_tile) FLAG(amx_int8) FLAG(amx_bf16) FLAG(amx_permission)

struct CpuFeatures {
#define KT_FLAG(name) bool name = false;
  KT_CPU_FLAGS(KT_FLAG)
#undef KT_FLAG
};

struct CpuFlag {
  const char* name;
  bool CpuFeatures::* value;
};
const std::vector<CpuFlag>& cpu_flags();

struct IsaEntry {
  const KernelTable* table;
  std::vector<CpuFlag> needs;

  // Names of the CPU flags that are missing; empty when the table can run.
  std::vector<std::string> missing(const CpuFeatures& features) const;
};

// Asks the OS for the use of AMX where the CPU has it.
CpuFeatures detect_cpu_features();

// The rows of KT_ISAS: best first; the portable table is last and always runs.
const std::vector<IsaEntry>& isa_entries();

// The table named `isa`, or the best one for "auto". Throws std::invalid_argument that lists the
// valid names, or names the CPU flags that are missing.
const KernelTable& select_kernels(const std::string& isa, const CpuFeatures& features);

}  // namespace kt
