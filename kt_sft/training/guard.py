"""What ends a training early: a signal, which is obeyed after the step, and NaN or Inf."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kt_sft.errors import NonFiniteError
from kt_sft.experts import hybrid_experts_of
from kt_sft.experts.watch import FiniteWatch
from kt_sft.training import wandb_run
from kt_sft.training.stop_signals import StopSignals


class RunGuard(TrainerCallback):
    """Stops a training of hybrid experts on SIGTERM, SIGINT, and on gradients that are not finite.

    A signal on any rank stops all of them after the same step, which is saved; the exit status is
    128 plus the signal's number. Gradients are looked at before the optimizer takes them.
    """

    def __init__(self) -> None:
        self._signals = StopSignals()
        self._watch: FiniteWatch | None = None
        self.stopped_by = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Starts to listen."""
        self.stopped_by = 0
        experts = hybrid_experts_of(model) if model is not None else {}
        self._watch = next((m.runtime.watch for m in experts.values()), None)
        if self._watch is not None:
            self._signals.install()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What an evaluation before left behind says nothing about this step."""
        if self._watch is not None:
            self._watch.clear()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Raises NonFiniteError; in fp16 the loss scaler deals with it."""
        if self._watch is None or model is None or args.fp16:
            return
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        poisoned = not _all_finite(list(gradients.values()))
        if _largest_of_ranks(int(poisoned), args.device):
            bad = next((n for n, g in gradients.items() if not _all_finite([g])), None)
            where = f"in the gradient of {bad}" if bad else "on another rank"
            raise _poisoned(state.global_step + 1, self._watch.first, where)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops where a rank was asked to; DeepSpeed has stepped without asking us before."""
        if self._watch is None:
            return
        if args.deepspeed and self._watch.first is not None and not args.fp16:
            raise _poisoned(state.global_step, self._watch.first, "")
        self.stopped_by = _largest_of_ranks(self._signals.received, args.device)
        if self.stopped_by:
            control.should_training_stop = True
            control.should_save = True
            control.should_evaluate = False

    def close(self) -> None:
        """Gives the signals back."""
        self._signals.restore()


def _all_finite(gradients: list[torch.Tensor]) -> bool:
    """In one wait for the device; of sharded gradients, this rank's parts."""
    parts = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    return bool(torch.isfinite(get_total_norm(parts, norm_type=math.inf)))


def _poisoned(step: int, first: str | None, otherwise: str) -> NonFiniteError:
    where = f"at {first}" if first else otherwise
    text = (
        f"step {step}: NaN or Inf, first seen {where}; nothing was saved from it. Look at the "
        "data of this step, lower learning_rate, or resume from the last checkpoint"
    )
    wandb_run.alert("kt_sft: NaN or Inf", text)
    return NonFiniteError(text)


def _largest_of_ranks(value: int, device: torch.device) -> int:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    box = torch.tensor([value], device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box.item())
