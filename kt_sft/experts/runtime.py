"""What the hybrid experts of one model share: settings, engine and meter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kt_sft.config import HybridExpertsSettings
from kt_sft.engines.nodes import NodeEngines, engine_on
from kt_sft.experts.meter import ExpertsMeter
from kt_sft.experts.recompute import KeptActivations
from kt_sft.experts.watch import FiniteWatch
from kt_sft.kernels import Engine, requested_isa
from kt_sft.machine.cpus import available_threads, place_among_ranks
from kt_sft.machine.memory import available_memory_bytes
from kt_sft.machine.numa import cpus_of_rank, numa_nodes

# Part of the free memory that activations may take between forward and backward.
_KEEPS = 0.8


class ExpertsRuntime:
    """One per model; a deep copy of the model shares it, as it shares the weights."""

    def __init__(self, settings: HybridExpertsSettings) -> None:
        self.settings = settings
        _, ranks = place_among_ranks()
        self.engine: Any = _engine(settings)
        # What the memory plan says that this process takes, and what it had when it was made.
        self.planned: tuple[int, int] | None = None
        # Called before each forward pass: raises where the weights cannot be used any more.
        self.require_weights: Callable[[], None] = lambda: None
        self.meter = ExpertsMeter()
        self.watch = FiniteWatch()
        self.kept = KeptActivations(lambda: int(_KEEPS * available_memory_bytes()) // ranks)

    def __deepcopy__(self, memo: dict) -> ExpertsRuntime:
        return self


def _engine(settings: HybridExpertsSettings) -> Engine | NodeEngines:
    threads = available_threads() if settings.threads == "auto" else int(settings.threads)
    isa = requested_isa(settings.isa)
    nodes = numa_nodes() if settings.numa == "auto" else []
    rank, ranks = place_among_ranks()
    if ranks > 1:
        # Ranks keep one copy of the experts between them, and stay out of each other's way.
        cpus = cpus_of_rank(nodes, rank, ranks)
        return Engine(threads, isa) if cpus is None else engine_on(cpus, threads, isa)
    # A mapped file lies where the system put it: nodes share the work on copies only.
    if 1 < len(nodes) <= threads and settings.resident is not False:
        return NodeEngines(nodes, threads, isa)
    return Engine(threads, isa)
