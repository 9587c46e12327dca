"""The engine that a model's settings mean on this machine."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from kt_sft.config import HybridExpertsSettings
from kt_sft.engines.cpu import CpuEngine
from kt_sft.engines.nodes import NodeEngines
from kt_sft.engines.policies import policies
from kt_sft.engines.protocol import ExpertsEngine
from kt_sft.engines.split import DeviceExperts, PartedEngine, PartedExperts
from kt_sft.kernels import Engine, requested_isa
from kt_sft.machine.cpus import place_among_ranks, threads_of
from kt_sft.machine.numa import cpus_of_rank, numa_nodes


def choose_engine(settings: HybridExpertsSettings) -> ExpertsEngine:
    """For this process. Raises ThreadsError, and ValueError for an instruction set."""
    host = _host_engine(settings)
    if settings.schedule == "host":
        return host
    kind = DeviceExperts if settings.schedule == "device" else PartedExperts
    return PartedEngine(host, policies(settings, host), kind)


def _host_engine(settings: HybridExpertsSettings) -> CpuEngine | NodeEngines:
    threads = threads_of(settings.threads)
    isa = requested_isa(settings.isa)
    nodes = numa_nodes() if settings.numa == "auto" else []
    rank, ranks = place_among_ranks()
    if ranks > 1:
        # Ranks keep one copy of the experts between them, and stay out of each other's way.
        cpus = cpus_of_rank(nodes, rank, ranks)
        return CpuEngine(Engine(threads, isa) if cpus is None else engine_on(cpus, threads, isa))
    # A mapped file lies where the system put it: nodes share the work on copies only. Where all is
    # computed on an accelerator, nobody has it, and what comes from the disk has no copies.
    on_host = settings.schedule != "device" and not settings.disk_tier
    if 1 < len(nodes) <= threads and settings.resident is not False and on_host:
        return NodeEngines(nodes, threads, isa)
    return CpuEngine(Engine(threads, isa))


def engine_on(cpus: set[int], threads: int, isa: str = "auto") -> Engine:
    """An engine whose own threads stay on some CPUs; the calling thread is left alone."""
    with ThreadPoolExecutor(1, "kt-sft-bound", os.sched_setaffinity, (0, cpus)) as bound:
        return bound.submit(Engine, threads, isa).result()
