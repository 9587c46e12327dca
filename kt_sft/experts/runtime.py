"""What the hybrid experts of one model share: settings, engine and meter."""

from __future__ import annotations

from kt_sft.config import HybridExpertsSettings
from kt_sft.cpu_budget import available_threads
from kt_sft.experts.meter import ExpertsMeter
from kt_sft.kernels import Engine, requested_isa


class ExpertsRuntime:
    """One per model; a deep copy of the model shares it, as it shares the weights."""

    def __init__(self, settings: HybridExpertsSettings) -> None:
        self.settings = settings
        threads = available_threads() if settings.threads == "auto" else int(settings.threads)
        self.engine = Engine(threads, requested_isa(settings.isa))
        self.meter = ExpertsMeter()

    def __deepcopy__(self, memo: dict) -> ExpertsRuntime:
        return self
