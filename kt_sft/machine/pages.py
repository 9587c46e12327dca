"""Huge pages and swap, as the system has them."""

from __future__ import annotations

from pathlib import Path

from kt_sft.machine.memory import named_number

_SYSFS = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def transparent_huge_pages(setting: Path = _SYSFS) -> str:
    """always, madvise or never; "unknown" where the system does not tell."""
    try:
        words = setting.read_text().split()
    except OSError:
        return "unknown"
    return next((w[1:-1] for w in words if w.startswith("[")), "unknown")


def swap_bytes(meminfo: Path = Path("/proc/meminfo")) -> tuple[int, int]:
    """(used, all) bytes of swap."""
    total = named_number(meminfo, "SwapTotal:") * 1024
    return total - named_number(meminfo, "SwapFree:") * 1024, total
