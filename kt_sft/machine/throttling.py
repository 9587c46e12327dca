"""How long the container's CPU quota has held this process's group back."""

from __future__ import annotations

from pathlib import Path

from kt_sft.machine.cgroups import OF_PROCESS, ROOT, cgroup_folders
from kt_sft.machine.memory import named_number

# (name in cpu.stat, seconds of its unit): version 2 and version 1.
_NAMES = (("throttled_usec", 1e-6), ("throttled_time", 1e-9))


def throttled_seconds(*, cgroup_root: Path = ROOT, proc_cgroup: Path = OF_PROCESS) -> float:
    """Since the group began, summed over its CPUs; the most of it and the groups around it.

    0 without a quota.
    """
    folders = cgroup_folders("cpu", root=cgroup_root, proc_cgroup=proc_cgroup)
    return max(
        (
            named_number(folder / "cpu.stat", name) * unit
            for folder in folders
            for name, unit in _NAMES
        ),
        default=0.0,
    )
