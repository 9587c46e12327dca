"""A Trainer that says what spoils a run while it can still be mended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kt_sft.experts import HybridExperts, hybrid_experts_of
from kt_sft.machine.memory import swapped_bytes
from kt_sft.machine.throttling import throttled_seconds
from kt_sft.planning.outline import top_k_of
from kt_sft.training import wandb_run

logger = logging.getLogger(__name__)

# Of the rows that the busiest expert could get at most, and for how many logs in a row.
_COLLAPSED, _LOGS = 0.9, 3
_SWAPPED = 1e9
# Part of the time that a group waits for its quota.
_THROTTLED = 0.2


class RunHealth(TrainerCallback):
    """Warns once of each: routing that collapses, memory in swap, a quota that holds the CPU back.

    As a warning in the log, and as an alert of W&B's run.
    """

    def __init__(self) -> None:
        self._experts: dict[str, HybridExperts] = {}
        self._said: set[str] = set()
        self._uneven, self._top_k = 0, 1
        self._since = (0.0, 0.0)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Forgets the run before."""
        self._experts = hybrid_experts_of(model) if model is not None else {}
        self._said, self._uneven = set(), 0
        first = next(iter(self._experts.values()), None)
        config = getattr(model, "config", None)
        self._top_k = 0
        if first is not None and config is not None:
            self._top_k = top_k_of(config, first.shape.experts)
        self._since = (time.monotonic(), throttled_seconds())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Looks at a training log, which the metrics have extended."""
        if not self._experts or logs is None or "loss" not in logs:
            return
        checks: Mapping[str, Callable[[Mapping[str, float]], str]] = {
            "routing collapses": self._collapse,
            "memory is in swap": self._swap,
            "the CPU is held back": self._throttling,
        }
        for title, check in checks.items():
            text = check(logs) if title not in self._said else ""
            if text:
                self._said.add(title)
                logger.warning("%s: %s", title, text)
                if state.is_world_process_zero:
                    wandb_run.alert(f"kt_sft: {title}", f"step {state.global_step}: {text}")

    def _collapse(self, logs: Mapping[str, float]) -> str:
        if not self._top_k:
            return ""
        most = next(iter(self._experts.values())).shape.experts / self._top_k
        uneven = logs.get("experts_load_max_over_mean", 0.0) >= _COLLAPSED * most > 1
        self._uneven = self._uneven + 1 if uneven else 0
        if self._uneven < _LOGS:
            return ""
        return (
            "in most layers one expert gets nearly every token. Lower learning_rate, do not train "
            "the router (additional_target: gate), or set moe_aux_loss_coef"
        )

    def _swap(self, logs: Mapping[str, float]) -> str:
        swapped = swapped_bytes()
        if swapped < _SWAPPED:
            return ""
        return (
            f"{swapped / 1e9:.1f} GB of this process are in swap, and each step waits for the "
            "disk. Set weights: int4, activations: recompute or a smaller batch, or end what else "
            "takes memory"
        )

    def _throttling(self, logs: Mapping[str, float]) -> str:
        started, before = self._since
        seconds, held = time.monotonic() - started, throttled_seconds() - before
        threads = next(iter(self._experts.values())).runtime.engine.threads
        part = held / (seconds * threads) if seconds else 0.0
        if part < _THROTTLED:
            return ""
        return (
            f"the container's quota makes its threads wait {part:.0%} of the time. Give it more "
            "CPUs, or set threads: to what it has"
        )
