// The weight formats: a row for each. Names, the order of the enum, the forms that pack and read
// them, the bindings, Python's tables and the choices of the command line all come from here. A new
// format is a header beside this file, a row, and a test.
#pragma once

namespace kt {

// row(identifier, name, form)
#define KT_FORMATS(row)                                                                          \
  row(kInt8, "int8", Int8Form) row(kBf16, "bf16", Bf16Form)                                      \
      row(kInt4Group32, "int4_g32", Int4Form<32>) row(kInt4Group128, "int4_g128", Int4Form<128>) \
          row(kCoded, "coded", CodedForm)

enum class WeightFormat : int {
#define KT_ROW(identifier, name, form) identifier,
  KT_FORMATS(KT_ROW)
#undef KT_ROW
};

constexpr const char* kFormatNames[] = {
#define KT_ROW(identifier, name, form) name,
    KT_FORMATS(KT_ROW)
#undef KT_ROW
};

class WeightForm;
const WeightForm& form_of(WeightFormat format);

}  // namespace kt
