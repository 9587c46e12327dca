"""The machine: memory of this process, and a description for reports."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from kt_sft.cpu_budget import available_threads
from kt_sft.kernels import isa_report


def host_memory_bytes() -> int:
    """Resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_memory_bytes(
    *, meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int:
    """Memory that can still be taken without swapping, within the container's limit; bytes."""
    free = 0
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used))


def anonymous_memory_bytes() -> int:
    """Resident memory that is not a view of a file, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_name() -> str:
    """The processor's name, or its architecture when the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def machine_description() -> dict[str, Any]:
    """Processor, logical CPUs, usable threads, instruction sets and memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu_name(),
        "logical_cpus": os.cpu_count(),
        "usable_threads": available_threads(),
        "instruction_sets": [name for name, missing in isa_report() if not missing],
        "memory_gb": round(memory / 1e9, 1),
    }
