"""Hybrid experts for a plain Trainer of Transformers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kt_sft import patches
from kt_sft.experts import hybrid_experts_of
from kt_sft.loading.config import HybridExpertsConfig
from kt_sft.loading.in_memory import hybridize
from kt_sft.training.accumulation import WaitingGradients
from kt_sft.training.guard import RunGuard
from kt_sft.training.health import RunHealth
from kt_sft.training.metrics import HybridExpertsMetrics
from kt_sft.training.report import RunReport
from kt_sft.training.residents import ResidentExperts


def register() -> None:
    """Prepares every Trainer of the process for models with hybrid experts; idempotent."""
    patches.install("trainer")


def with_our_callbacks(stock: list) -> list:
    """`DEFAULT_CALLBACKS` with ours, which run before the trackers'.

    The list itself: PPO and others have imported it by its name.
    """
    ours = (
        *(HybridExpertsMetrics, RunGuard, RunHealth),
        *(WaitingGradients, ResidentExperts, RunReport),
    )
    stock += [c for c in ours if c not in stock]
    return stock


class HybridExpertsCallback(TrainerCallback):
    """`Trainer(model=..., callbacks=[HybridExpertsCallback(config)])` is enough by itself.

    A model that was loaded without kt_sft has its experts moved to packed host memory when the
    Trainer is built, before its optimizer exists. With a PeftModel whose target modules include
    gate_proj, up_proj or down_proj, the experts train LoRA.

    The Trainer moves a model to the accelerator before any callback is asked. One that does not fit
    there must be made hybrid earlier: `from_pretrained(..., quantization_config=config)` or
    `hybridize(model, config)`; the callback then finds nothing left to move.
    """

    def __init__(self, config: HybridExpertsConfig | None = None) -> None:
        self.config = config or HybridExpertsConfig()
        register()

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Replaces stock experts, if there are any."""
        if model is not None and not hybrid_experts_of(model):
            hybridize(model, self.config)
