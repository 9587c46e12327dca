"""The Hugging Face Trainer: hybrid experts for a plain Trainer, and their metrics in its logs."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kt_sft.doctor.looking import looked_at
from kt_sft.experts import ExpertsMeter, MeterMark, hybrid_experts_of
from kt_sft.kernels.report import machine_description
from kt_sft.machine.accelerator import peak_device_memory
from kt_sft.machine.memory import host_memory_bytes, peak_memory_bytes
from kt_sft.training import trained, wandb_run

logger = logging.getLogger(__name__)


class HybridExpertsMetrics(TrainerCallback):
    """Adds the experts' measurements to the Trainer's logs, and so to every tracker.

    Per logging step: tokens_per_second, experts_forward_ms and experts_backward_ms (per optimizer
    step), experts_tflops, experts_time_share, experts_forwards_per_backward (1 where nothing is
    computed twice), experts_load_max_over_mean, host_memory_gb. With an accelerator also
    device_memory_gb, experts_device_share (of the routed rows, where it computes any) and, for each
    optimizer step, experts_mb_down, experts_mb_up (from and to the
    device), experts_host_waited_ms and experts_device_waited_ms (one side for the other, at the
    experts). Evaluations between the steps are left out. Does nothing for a model without hybrid
    experts.
    """

    def __init__(self) -> None:
        self._meter: ExpertsMeter | None = None
        self._before_evaluation: MeterMark | None = None
        self._last_step = 0
        self._described = False

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Says what will train, by kind."""
        trains = model is not None and any(p.requires_grad for p in model.parameters())
        if model is not None and trains and hybrid_experts_of(model):
            logger.info("%s", trained.summary(model))

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Finds the model's meter and starts a new interval."""
        experts = hybrid_experts_of(model) if model is not None else {}
        self._meter = next((m.runtime.meter for m in experts.values()), None)
        self._last_step = state.global_step
        self._described = False
        if self._meter is not None:
            self._meter.read()
            self._before_evaluation = self._meter.mark()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Describes settings and machine once, when the trackers have started their runs."""
        if self._meter is None or model is None:
            return
        self._before_evaluation = self._meter.mark()
        if self._described:
            return
        self._described = True
        description = describe(model)
        if state.is_world_process_zero:
            logger.info("kt_sft: %s", description)
            wandb_run.update_config(lambda: {"kt_sft": {**description, **_surroundings(model)}})

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Leaves an evaluation, which comes after a step and its log, out of the interval."""
        if self._meter is not None and self._before_evaluation is not None:
            self._meter.leave_out(self._before_evaluation)
            self._before_evaluation = self._meter.mark()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Says what the run took of what was planned."""
        experts = hybrid_experts_of(model) if model is not None else {}
        runtime = next((m.runtime for m in experts.values()), None)
        if runtime is not None and runtime.planned is not None and state.is_world_process_zero:
            planned, before = runtime.planned
            logger.info(
                "host memory: planned %.3f GB, taken at most %.3f GB above the %.3f GB that the "
                "process had before the model",
                planned / 1e9,
                (peak_memory_bytes() - before) / 1e9,
                before / 1e9,
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Extends a training log; evaluation logs stay as they are."""
        if self._meter is None or logs is None or "loss" not in logs:
            return
        steps = max(1, state.global_step - self._last_step)
        self._last_step = state.global_step
        reading = self._meter.read()
        self._before_evaluation = self._meter.mark()
        metrics = {
            "tokens_per_second": round(reading.tokens / reading.elapsed, 1),
            "experts_forward_ms": round(1e3 * reading.forward / steps, 2),
            "experts_backward_ms": round(1e3 * reading.backward / steps, 2),
            "experts_tflops": round(reading.tflops, 4),
            "experts_time_share": round(reading.share, 4),
            "experts_forwards_per_backward": round(reading.forwards_per_backward, 3),
            "experts_load_max_over_mean": round(reading.load_max_over_mean, 3),
            "host_memory_gb": round(host_memory_bytes() / 1e9, 3),
        }
        if reading.device_rows:
            metrics["experts_device_share"] = round(reading.device_share, 4)
        device = peak_device_memory()
        if device is not None:
            # What crossed the link, and who waited for whom there.
            metrics |= {
                "device_memory_gb": round(device / 1e9, 3),
                "experts_mb_down": round(reading.traffic.bytes_down / steps / 1e6, 3),
                "experts_mb_up": round(reading.traffic.bytes_up / steps / 1e6, 3),
                "experts_host_waited_ms": round(1e3 * reading.traffic.host_waited / steps, 2),
                "experts_device_waited_ms": round(1e3 * reading.traffic.device_waited / steps, 2),
            }
        logs.update(metrics)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(metrics)


def describe(model: nn.Module) -> dict[str, Any]:
    """The resolved settings of a hybrid model, and the machine."""
    experts = hybrid_experts_of(model)
    first = next(iter(experts.values()))
    return {
        **first.runtime.settings.as_dict(),
        "threads": first.runtime.engine.threads,
        "isa": first.runtime.engine.isa,
        "layers": len(experts),
        "experts_per_layer": first.shape.experts,
        "experts_bytes": sum(m.weights.nbytes for m in experts.values() if m.weights),
        "machine": machine_description(),
    }


def _surroundings(model: nn.Module) -> dict[str, Any]:
    """The memory plan, and what `kt-sft doctor` finds without measuring, for a tracker."""
    runtime = next(iter(hybrid_experts_of(model).values())).runtime
    return {
        "memory_plan_gb": {
            f"{name} ({place})": round(size / 1e9, 3) for name, place, size in runtime.planned_parts
        },
        "doctor": {f"{finding.section}: {finding.name}": finding.value for finding in looked_at()},
    }
