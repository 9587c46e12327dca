#include "cpu_features.h"

#include <cpuid.h>

#include <stdexcept>

namespace kt {
namespace {

uint64_t extended_control_register() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

std::string joined(const std::vector<std::string>& names) {
  std::string out;
  for (const std::string& name : names) out += (out.empty() ? "" : ", ") + name;
  return out;
}

std::vector<std::string> missing_for_avx512(const CpuFeatures& f) {
  std::vector<std::string> out;
  if (!f.fma) out.push_back("fma");
  if (!f.avx512f) out.push_back("avx512f");
  if (!f.avx512bw) out.push_back("avx512bw");
  if (!f.avx512vl) out.push_back("avx512vl");
  if (!f.avx512dq) out.push_back("avx512dq");
  if (!f.avx512_vnni) out.push_back("avx512_vnni");
  if (!f.avx512_bf16) out.push_back("avx512_bf16");
  return out;
}

std::vector<std::string> missing_for_avx2(const CpuFeatures& f) {
  std::vector<std::string> out;
  if (!f.avx2) out.push_back("avx2");
  if (!f.fma) out.push_back("fma");
  return out;
}

std::vector<std::string> missing_for_portable(const CpuFeatures&) { return {}; }

}  // namespace

CpuFeatures detect_cpu_features() {
  CpuFeatures f;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool os_saves_registers = c & (1u << 27);
  if (!os_saves_registers) return f;
  const uint64_t saved = extended_control_register();
  const bool ymm = (saved & 0x6) == 0x6;
  const bool zmm = (saved & 0xe6) == 0xe6;
  f.fma = ymm && (c & (1u << 12));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  const uint32_t max_subleaf = a;
  f.avx2 = ymm && (b & (1u << 5));
  f.avx512f = zmm && (b & (1u << 16));
  f.avx512dq = zmm && (b & (1u << 17));
  f.avx512bw = zmm && (b & (1u << 30));
  f.avx512vl = zmm && (b & (1u << 31));
  f.avx512_vnni = zmm && (c & (1u << 11));
  if (max_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d))
    f.avx512_bf16 = zmm && (a & (1u << 5));
  return f;
}

const std::vector<IsaEntry>& isa_entries() {
  static const std::vector<IsaEntry> entries = {
      {&kAvx512Kernels, missing_for_avx512},
      {&kAvx2Kernels, missing_for_avx2},
      {&kPortableKernels, missing_for_portable},
  };
  return entries;
}

const KernelTable& select_kernels(const std::string& isa, const CpuFeatures& features) {
  std::vector<std::string> names = {"auto"};
  for (const IsaEntry& entry : isa_entries()) {
    const std::vector<std::string> missing = entry.missing(features);
    names.push_back(entry.table->name);
    if (isa == "auto" && missing.empty()) return *entry.table;
    if (isa != entry.table->name) continue;
    if (missing.empty()) return *entry.table;
    throw std::invalid_argument("isa: " + isa + " cannot run on this CPU, which lacks " +
                                joined(missing) + "; use isa: auto");
  }
  throw std::invalid_argument("isa: got '" + isa + "', expected one of " + joined(names));
}

}  // namespace kt
