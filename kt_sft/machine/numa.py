"""The machine's memory nodes and their CPUs."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)


def numa_nodes(
    *, cpus: set[int] | None = None, sysfs: Path = Path("/sys/devices/system/node")
) -> list[set[int]]:
    """The usable CPUs of each node that has any; one node when the system does not tell.

    The paths are arguments so that trees of other machines can be tested.
    """
    cpus = set(os.sched_getaffinity(0)) if cpus is None else cpus
    nodes = []
    for folder in sorted(sysfs.glob("node[0-9]*"), key=lambda p: int(p.name[4:])):
        try:
            own = _cpu_list((folder / "cpulist").read_text()) & cpus
        except (OSError, ValueError):
            logger.warning("NUMA: %s cannot be read; using one node", folder)
            return [cpus]
        if own:
            nodes.append(own)
    if not nodes or set().union(*nodes) != cpus:
        if nodes:
            logger.warning("NUMA: the nodes do not cover the usable CPUs; using one node")
        return [cpus]
    return nodes


def _cpu_list(text: str) -> set[int]:
    """The CPUs of "0-3,8,10-11"."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def cpus_of_rank(nodes: Sequence[set[int]], rank: int, ranks: int) -> set[int] | None:
    """The CPUs of the nodes that one of a machine's ranks works on.

    None where the nodes cannot be dealt out evenly: the system then places the threads.
    """
    if len(nodes) < 2 or (ranks % len(nodes) and len(nodes) % ranks):
        return None
    if ranks >= len(nodes):
        return nodes[rank * len(nodes) // ranks]
    each = len(nodes) // ranks
    return set().union(*nodes[rank * each : (rank + 1) * each])
