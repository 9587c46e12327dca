"""How many CPU threads this process may keep busy: affinity, container quota, physical cores."""

from __future__ import annotations

import os
from pathlib import Path

from kt_sft.machine.cgroups import OF_PROCESS, ROOT, cgroup_folders


def available_threads(
    *,
    cpus: set[int] | None = None,
    cgroup_root: Path = ROOT,
    proc_cgroup: Path = OF_PROCESS,
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
    return max(1, limit // (local_ranks or place_among_ranks()[1]))


def threads_of(setting: int | str) -> int:
    """The threads that a setting means: a number, or auto."""
    return available_threads() if setting == "auto" else int(setting)


def machine_cpus() -> int:
    """Logical CPUs of the machine, whatever this process may use of them."""
    return os.cpu_count() or 1


def place_among_ranks() -> tuple[int, int]:
    """(rank on this machine, ranks on this machine), as torchrun tells them; (0, 1) without."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return int(os.environ.get("LOCAL_RANK") or 0), max(1, ranks)


def ranks_everywhere() -> int:
    """Ranks on all machines, as torchrun tells them; 1 without."""
    return max(1, int(os.environ.get("WORLD_SIZE") or 1))


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
    folders = cgroup_folders("cpu", root=root, proc_cgroup=proc_cgroup)
    quotas = [quota for quota in map(_folder_quota, folders) if quota is not None]
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
