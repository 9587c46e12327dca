// Waiting for another thread in a loop. Apart from cpu.h, which the files of the instruction sets
// include: what is inline there could be linked in as they are compiled.
#pragma once

#include <immintrin.h>

namespace kt {

inline void relax() { _mm_pause(); }

}  // namespace kt
