"""The instruction sets that the tests run here, AMX under emulation where the CPU lacks it.

With KT_SFT_TEST_ISAS=two (`make quick`) they are the best that the CPU has, and the portable one.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

from kt_sft.kernels import Engine, isa_report

_EMULATOR_SOURCE = Path(__file__).parent / "amx_emulator" / "amx_emulator.c"
_BUILD = Path(__file__).parents[2] / ".cache" / "tests"
_EVERY_FLAG = dict.fromkeys({flag for _, missing in isa_report({}) for flag in missing}, True)
_USABLE = [name for name, missing in isa_report() if not missing]
_WANTED = os.environ.get("KT_SFT_TEST_ISAS", "all")
if _WANTED not in ("all", "two"):
    raise ValueError(f"KT_SFT_TEST_ISAS: got {_WANTED!r}, expected all or two")
NATIVE = _USABLE if _WANTED == "all" else [_USABLE[0], "portable"]


def _load_emulator() -> ctypes.CDLL:
    """Builds the library when its source is newer, and installs its SIGILL handler."""
    library = _BUILD / "libamx_emulator.so"
    if not library.exists() or library.stat().st_mtime < _EMULATOR_SOURCE.stat().st_mtime:
        _BUILD.mkdir(parents=True, exist_ok=True)
        command = ["gcc", "-O2", "-shared", "-fPIC", str(_EMULATOR_SOURCE), "-o", str(library)]
        subprocess.run(command, check=True)
    emulator = ctypes.CDLL(str(library))
    emulator.amx_emulator_instructions.restype = ctypes.c_uint64
    if emulator.amx_emulator_install() != 0:
        raise RuntimeError("the AMX emulator needs AVX2 and FMA")
    return emulator


# The kernels around the AMX products are AVX-512 with VNNI and BF16, which nothing emulates.
EMULATED = ["amx"] if _WANTED == "all" and "amx" not in NATIVE and "avx512_bf16" in NATIVE else []
EMULATOR = _load_emulator() if EMULATED else None
ISAS = [*EMULATED, *NATIVE]


def make_engine(threads: int, isa: str) -> Engine:
    """An engine that believes in AMX where it is emulated."""
    return Engine(threads, isa, cpu_flags=_EVERY_FLAG if isa in EMULATED else None)
