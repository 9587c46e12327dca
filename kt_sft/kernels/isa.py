"""Which instruction sets there are, which run here, and which one is meant."""

from __future__ import annotations

import os
from collections.abc import Mapping

import kt_sft.kernels._core as _core

ISA_VARIABLE = "KT_SFT_ISA"


def isa_report(cpu_flags: Mapping[str, bool] | None = None) -> list[tuple[str, list[str]]]:
    """Every instruction set, best first, with the CPU flags that it misses on this machine.

    `cpu_flags` stands in for the machine's own, in tests.
    """
    return _core.isa_report(None if cpu_flags is None else dict(cpu_flags))


def kernel_rows() -> list[tuple[str, str, str]]:
    """Every instruction set, best first, with its integer and its float dot product."""
    return _core.kernel_rows()


def select_isa(isa: str, cpu_flags: Mapping[str, bool] | None = None) -> str:
    """The name of the kernel table that `isa` means here.

    Raises ValueError with the valid names, or with the missing CPU flags.
    """
    return _core.select_isa(isa, None if cpu_flags is None else dict(cpu_flags))


def requested_isa(setting: str) -> str:
    """The table for a setting, unless the environment variable KT_SFT_ISA names another.

    Raises ValueError as `select_isa` does, and says so when the variable is to blame.
    """
    override = os.environ.get(ISA_VARIABLE)
    if not override:
        return select_isa(setting)
    try:
        return select_isa(override)
    except ValueError as error:
        raise ValueError(f"{error} (from the environment variable {ISA_VARIABLE})") from error
