"""What the hybrid experts of one model share: settings, engine and meter."""

from __future__ import annotations

import os
from typing import Any

from kt_sft.config import HybridExpertsSettings
from kt_sft.cpu_budget import available_threads
from kt_sft.experts.activations import KeptActivations
from kt_sft.experts.finite import FiniteWatch
from kt_sft.experts.meter import ExpertsMeter
from kt_sft.host import available_memory_bytes
from kt_sft.kernels import Engine, NodeEngines, numa_nodes, requested_isa

# Part of the free memory that activations may take between forward and backward.
_KEEPS = 0.8


class ExpertsRuntime:
    """One per model; a deep copy of the model shares it, as it shares the weights."""

    def __init__(self, settings: HybridExpertsSettings) -> None:
        self.settings = settings
        threads = available_threads() if settings.threads == "auto" else int(settings.threads)
        isa = requested_isa(settings.isa)
        # A mapped file lies where the system put it: nodes share the work on copies only.
        may_copy = settings.resident is not False
        nodes = numa_nodes() if settings.numa == "auto" and may_copy else []
        # Several ranks on a machine have few threads each, and the system places them.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        split = 1 < len(nodes) <= threads and ranks == 1
        self.engine: Any = NodeEngines(nodes, threads, isa) if split else Engine(threads, isa)
        self.meter = ExpertsMeter()
        self.watch = FiniteWatch()
        self.kept = KeptActivations(lambda: int(_KEEPS * available_memory_bytes()) // ranks)

    def __deepcopy__(self, memo: dict) -> ExpertsRuntime:
        return self
