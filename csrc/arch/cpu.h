// The machine that the core is built for. Another one is a folder beside x86/ with the same names.
#pragma once

#if defined(__x86_64__)
#include "x86/cpu.h"
#else
#error "kt_sft: there are no kernels for this machine; expected x86-64"
#endif
