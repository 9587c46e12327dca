"""The machine: memory of this process, and a description for reports."""

from __future__ import annotations

import os
from pathlib import Path

from kt_sft.machine.cgroups import OF_PROCESS, ROOT, cgroup_folders


def total_memory_bytes() -> int:
    """Memory of the machine, whatever the container may take of it."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def host_memory_bytes() -> int:
    """Resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory_bytes() -> int:
    """The largest resident memory that this process has had, in bytes."""
    return _status_bytes("VmHWM")


def available_memory_bytes(
    *,
    meminfo: Path = Path("/proc/meminfo"),
    cgroup_root: Path = ROOT,
    proc_cgroup: Path = OF_PROCESS,
) -> int:
    """Memory that can still be taken without swapping, within the container's limits; bytes.

    What a group uses as page cache can be taken: reading a checkpoint fills it.
    """
    free = named_number(meminfo, "MemAvailable:") * 1024
    for folder in cgroup_folders("memory", root=cgroup_root, proc_cgroup=proc_cgroup):
        left = _left_in_group(folder)
        if left is not None:
            free = min(free, left)
    return free


# (limit, use, prefix of the page cache's numbers in memory.stat) of version 2 and version 1.
_MEMORY_FILES = (
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


def _left_in_group(folder: Path) -> int | None:
    """Bytes; None where the folder sets no limit."""
    for limit_file, used_file, prefix in _MEMORY_FILES:
        try:
            limit = (folder / limit_file).read_text().strip()
            used = int((folder / used_file).read_text())
        except (OSError, ValueError):
            continue
        if limit == "max":
            return None
        cache = sum(
            named_number(folder / "memory.stat", f"{prefix}{name}_file")
            for name in ("active", "inactive")
        )
        return max(0, int(limit) - max(0, used - cache))
    return None


def named_number(file: Path, name: str) -> int:
    """The number that follows a name at the start of a line; 0 without."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(words[1]) for words in map(str.split, lines) if words[:1] == [name]), 0)


def anonymous_memory_bytes() -> int:
    """Resident memory that is not a view of a file, in bytes."""
    return _status_bytes("RssAnon")


def swapped_bytes() -> int:
    """Memory of this process that is in swap, in bytes."""
    return _status_bytes("VmSwap")


def _status_bytes(name: str) -> int:
    return named_number(Path("/proc/self/status"), f"{name}:") * 1024
