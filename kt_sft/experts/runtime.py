"""What the hybrid experts of one model share: settings, engine and meter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kt_sft.config import HybridExpertsSettings
from kt_sft.engines.choose import choose_engine
from kt_sft.errors import SettingsError
from kt_sft.experts.meter import ExpertsMeter
from kt_sft.experts.recompute import KeptActivations
from kt_sft.experts.watch import FiniteWatch
from kt_sft.machine.cpus import place_among_ranks, ranks_everywhere
from kt_sft.machine.memory import available_memory_bytes
from kt_sft.scheduling.profile import RoutingProfile
from kt_sft.scheduling.residents import ResidentBudget

# Part of the free memory that activations may take between forward and backward.
_KEEPS = 0.8


class ExpertsRuntime:
    """One per model; a deep copy of the model shares it, as it shares the weights."""

    def __init__(self, settings: HybridExpertsSettings) -> None:
        self.settings = settings
        _, ranks = place_among_ranks()
        if settings.adapters == "host" and ranks_everywhere() > 1:
            raise SettingsError(
                f"adapters: got host with {ranks_everywhere()} ranks, expected device or auto; "
                "DDP and DeepSpeed take parameters of one kind of device only"
            )
        self.engine = choose_engine(settings)
        # Whether the experts' LoRA stays on the host; the memory plan may decide it.
        self.adapters_on_host = settings.adapters == "host"
        # What the memory plan says that this process takes, and what it had when it was made.
        self.planned: tuple[int, int] | None = None
        # (name, place, bytes) of every part of the plan.
        self.planned_parts: tuple[tuple[str, str, int], ...] = ()
        # What tells the model from others of its shape; None until it is loaded.
        self.base_identity: dict[str, Any] | None = None
        # Folders of adapters: those that can be switched off, and those that are in the model.
        self.adapters_loaded: list[str] = []
        self.adapters_merged: list[str] = []
        # Called before each forward pass: raises where the weights cannot be used any more.
        self.require_weights: Callable[[], None] = lambda: None
        # Whether gradients of LoRA on an accelerator may wait for the next backward.
        self.gradients_may_wait: Callable[[], bool] = lambda: False
        # Called when a layer's forward or backward begins, where experts come from the disk.
        self.read_ahead: Callable[[str, str], None] = lambda direction, path: None
        self.meter = ExpertsMeter()
        # How many rows each expert gets, the file that remembers it, and how many experts may be
        # in an accelerator's memory; the memory plan decides `gpu_experts: auto`.
        self.routing = RoutingProfile()
        self.routing_file: Path | None = None
        self.resident_budget = ResidentBudget.of(settings.gpu_experts)
        self.watch = FiniteWatch()
        self.kept = KeptActivations(lambda: int(_KEEPS * available_memory_bytes()) // ranks)

    def unload_adapters(self, merge: bool) -> None:
        """PEFT takes its adapters away; merge: as a part of the model."""
        if merge:
            self.adapters_merged += self.adapters_loaded
        self.adapters_loaded = []

    def __deepcopy__(self, memo: dict) -> ExpertsRuntime:
        return self
