// See cpu.h.
#pragma once

#if defined(__x86_64__)
#include "x86/wait.h"
#endif
