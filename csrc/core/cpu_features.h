// Which instruction sets this machine has, and which kernel table to use.
#pragma once

#include <string>
#include <vector>

#include "../kernels/kernel_table.h"

namespace kt {

// CPU flags that the tables depend on, already masked by what the OS saves on a context switch.
struct CpuFeatures {
  bool avx2 = false, fma = false;
  bool avx512f = false, avx512bw = false, avx512vl = false, avx512dq = false;
  bool avx512_vnni = false, avx512_bf16 = false;
};

struct IsaEntry {
  const KernelTable* table;
  // Names of the missing CPU flags; empty when the table can run.
  std::vector<std::string> (*missing)(const CpuFeatures&);
};

CpuFeatures detect_cpu_features();

// Best first; the portable table is last and always runs.
const std::vector<IsaEntry>& isa_entries();

// The table named `isa`, or the best one for "auto". Throws std::invalid_argument that lists the
// valid names, or names the CPU flags that are missing.
const KernelTable& select_kernels(const std::string& isa, const CpuFeatures& features);

}  // namespace kt
