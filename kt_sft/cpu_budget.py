"""How many CPU threads this process may keep busy: affinity, container quota, physical cores."""

from __future__ import annotations

import os
from pathlib import Path


def available_threads(
    *,
    cpus: set[int] | None = None,
    cgroup_root: Path = Path("/sys/fs/cgroup"),
    proc_cgroup: Path = Path("/proc/self/cgroup"),
    topology: Path = Path("/sys/devices/system/cpu"),
    local_ranks: int | None = None,
) -> int:
    """min(affinity, quota rounded down, physical cores) over the ranks of this machine, >= 1.

    The paths are arguments so that trees of other machines can be tested.
    """
    cpus = set(os.sched_getaffinity(0)) if cpus is None else cpus
    limit = _physical_cores(cpus, topology)
    quota = _cgroup_quota(cgroup_root, proc_cgroup)
    if quota is not None:
        limit = min(limit, int(quota))
    if local_ranks is None:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or "1")
    return max(1, limit // max(1, local_ranks))


def _physical_cores(cpus: set[int], topology: Path) -> int:
    """Cores among `cpus`, hyper-threads of one core counted once."""
    cores = set()
    for cpu in cpus:
        siblings = topology / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def _cgroup_quota(root: Path, proc_cgroup: Path) -> float | None:
    """The smallest CPU quota, in cores, of this process's cgroup and its parents; v2 then v1."""
    try:
        lines = proc_cgroup.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        relative = Path(path.lstrip("/"))
        if controllers == "":
            bases = [root]
        elif "cpu" in controllers.split(","):
            bases = [root / controllers, root / "cpu"]
        else:
            continue
        for base in bases:
            for folder in [relative, *relative.parents]:
                quota = _folder_quota(base / folder)
                if quota is not None:
                    quotas.append(quota)
    return min(quotas) if quotas else None


def _folder_quota(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if quota == "max" or int(quota) <= 0:
        return None
    return int(quota) / int(period)
