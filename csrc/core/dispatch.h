// Which instruction sets this machine has, and which kernel table to use.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../arch/cpu.h"
#include "../kernels/kernel_table.h"

namespace kt {

// A flag for each that the machine's kernel tables depend on.
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

// Of this machine; in csrc/arch.
CpuFeatures detect_cpu_features();

// The rows of KT_ISAS: best first; the portable table is last and always runs.
const std::vector<IsaEntry>& isa_entries();

// The table named `isa`, or the best one for "auto". Throws std::invalid_argument that lists the
// valid names, or names the CPU flags that are missing.
const KernelTable& select_kernels(const std::string& isa, const CpuFeatures& features);

// The same whether or not it runs here, for what is counted of another machine.
const KernelTable& describe_kernels(const std::string& isa);

}  // namespace kt
