"""Gradient accumulation of expert LoRA on the host, so that less of it crosses the link."""

from __future__ import annotations

from typing import Any

from accelerate.state import GradientState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from kt_sft.errors import SettingsError
from kt_sft.experts import HybridExperts, hybrid_experts_of


class WaitingGradients(TrainerCallback):
    """Lets gradients of expert LoRA on an accelerator wait for the last micro batch of a step.

    Only in a single process: the hooks of DDP, FSDP and DeepSpeed want each gradient at once.
    """

    def __init__(self) -> None:
        self._experts: list[HybridExperts] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """From now on. Raises SettingsError for LoRA on the host beside what wants it elsewhere."""
        self.close()
        experts = list(hybrid_experts_of(model).values()) if model is not None else []
        alone = args.parallel_mode == ParallelMode.NOT_PARALLEL
        engine = "deepspeed" if args.deepspeed else "fsdp" if getattr(args, "fsdp", None) else ""
        if engine and any(module.runtime.adapters_on_host for module in experts):
            raise SettingsError(
                f"adapters: got host with {engine}, expected device or auto; it takes parameters "
                "of one kind of device only"
            )
        if alone and not engine and args.gradient_accumulation_steps > 1:
            self._experts = experts
        for module in self._experts:
            module.runtime.gradients_may_wait = _more_follow

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What an interrupted step left belongs to no other."""
        for experts in self._experts:
            if experts.weights is not None:
                experts.weights.forget_gradients()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Not any more."""
        self.close()

    def close(self) -> None:
        """Nothing waits any more, however the training ended."""
        for module in self._experts:
            module.runtime.gradients_may_wait = lambda: False
            if module.weights is not None:
                module.weights.forget_gradients()
        self._experts = []


def _more_follow() -> bool:
    """Whether this micro batch is not the last one of its step."""
    return not GradientState().sync_gradients
