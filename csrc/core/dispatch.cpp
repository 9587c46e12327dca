#include "dispatch.h"

#include <sstream>
#include <stdexcept>

namespace kt {
namespace {

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

}  // namespace

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

const KernelTable& describe_kernels(const std::string& isa) {
  for (const IsaEntry& entry : isa_entries())
    if (isa == entry.table->name) return *entry.table;
  return select_kernels(isa, detect_cpu_features());
}

}  // namespace kt
