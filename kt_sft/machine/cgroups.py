"""The control groups that this process is in, for what they limit."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OF_PROCESS = Path("/proc/self/cgroup")


def cgroup_folders(
    controller: str, *, root: Path = ROOT, proc_cgroup: Path = OF_PROCESS
) -> list[Path]:
    """The folders of this process's group and of all groups around it; version 2 and version 1.

    A limit of any of them holds. Some of the folders may not exist: a container sees its own group
    as the root. The paths are arguments so that trees of other machines can be tested.
    """
    try:
        lines = proc_cgroup.read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        relative = Path(path.lstrip("/"))
        if controllers == "":
            bases = [root]
        elif controller in controllers.split(","):
            bases = [root / controllers, root / controller]
        else:
            continue
        folders += [base / part for base in bases for part in (relative, *relative.parents)]
    return folders
