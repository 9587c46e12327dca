#include "cpu_features.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <sstream>
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

// The flags of a row of KT_ISAS, "a, b, c".
std::vector<CpuFlag> flags_named(const std::string& list) {
  std::vector<CpuFlag> out;
  std::istringstream names(list);
  for (std::string name; std::getline(names >> std::ws, name, ',');)
    for (const CpuFlag& flag : cpu_flags())
      if (flag.name == name) out.push_back(flag);
  return out;
}

// Linux hands out the 8 KB of tile state on demand, once for the process.
bool ask_for_amx() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

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
  const bool tiles = (saved & 0x60000) == 0x60000;
  f.fma = ymm && (c & (1u << 12));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  const uint32_t max_subleaf = a;
  f.avx2 = ymm && (b & (1u << 5));
  f.avx512f = zmm && (b & (1u << 16));
  f.avx512dq = zmm && (b & (1u << 17));
  f.avx512bw = zmm && (b & (1u << 30));
  f.avx512vl = zmm && (b & (1u << 31));
  f.avx512_vnni = zmm && (c & (1u << 11));
  f.amx_bf16 = tiles && (d & (1u << 22));
  f.amx_tile = tiles && (d & (1u << 24));
  f.amx_int8 = tiles && (d & (1u << 25));
  f.amx_permission = f.amx_tile && ask_for_amx();
  if (max_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    f.avx_vnni = ymm && (a & (1u << 4));
    f.avx512_bf16 = zmm && (a & (1u << 5));
  }
  return f;
}

const std::vector<CpuFlag>& cpu_flags() {
  static const std::vector<CpuFlag> flags = {
#define KT_FLAG(name) {#name, &CpuFeatures::name},
      KT_CPU_FLAGS(KT_FLAG)
#undef KT_FLAG
  };
  return flags;
}

std::vector<std::string> IsaEntry::missing(const CpuFeatures& features) const {
  std::vector<std::string> out;
  for (const CpuFlag& flag : needs)
    if (!(features.*flag.value)) out.push_back(flag.name);
  return out;
}

const std::vector<IsaEntry>& isa_entries() {
  static const std::vector<IsaEntry> entries = {
#define KT_TEXT(...) #__VA_ARGS__
#define KT_ENTRY(symbol, name, ...) {&symbol, flags_named(KT_TEXT(__VA_ARGS__))},
      KT_ISAS(KT_ENTRY)
#undef KT_ENTRY
#undef KT_TEXT
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
