"""A Trainer that leaves a report of its run beside the adapter."""

from __future__ import annotations

import logging
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kt_sft.doctor.installation import installed
from kt_sft.experts import hybrid_experts_of
from kt_sft.files import durable
from kt_sft.machine.accelerator import peak_device_memory
from kt_sft.machine.memory import peak_memory_bytes
from kt_sft.report.page import FILE_NAME, render
from kt_sft.report.record import Run, RunRecord
from kt_sft.training import wandb_run
from kt_sft.training.metrics import describe

logger = logging.getLogger(__name__)

_ARGUMENTS = (
    "output_dir",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay", "max_grad_norm",
    "optim", "bf16", "fp16", "seed", "world_size",
)  # fmt: skip
_LORA = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
_PACKAGES = ("kt_sft", "torch", "transformers", "peft", "accelerate", "llamafactory", "trl")


class RunReport(TrainerCallback):
    """Writes kt_sft_run.json and report.html into the run's folder, and the page into W&B's run.

    A report that cannot be written is a warning: the run is done.
    """

    def __init__(self) -> None:
        self._start = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        self._start = time.monotonic()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes both files; whatever goes wrong with them, the adapter is still to be saved."""
        if not state.is_world_process_zero or model is None or not hybrid_experts_of(model):
            return
        try:
            self._write(args, state, model)
        except Exception as error:
            logger.warning(
                "%s: there is no report of this run: %s: %s",
                args.output_dir,
                type(error).__name__,
                error,
            )

    def _write(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        folder = Path(str(args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        record = self._record(args, state, model)
        record.save(folder)
        runtime = next(iter(hybrid_experts_of(model).values())).runtime
        run = Run(folder.resolve().name, record, record.history, runtime.routing.shares())
        page = render([run])
        durable.write_whole(folder / FILE_NAME, page.encode())
        logger.info("report: %s", folder / FILE_NAME)
        wandb_run.log_page("report", page)
        wandb_run.log_heatmap("expert_load", list(run.shares.values()))

    def _record(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> RunRecord:
        runtime = next(iter(hybrid_experts_of(model).values())).runtime
        _, before = runtime.planned or (0, 0)
        taken = {"host": peak_memory_bytes() - before}
        device = peak_device_memory()
        if device:
            taken["device"] = device
        return RunRecord(
            base=str(getattr(getattr(model, "config", None), "_name_or_path", "") or "model"),
            training={
                **_chosen(args, _ARGUMENTS),
                # LLaMA-Factory switches it on by itself.
                "gradient_checkpointing": bool(getattr(model, "is_gradient_checkpointing", False)),
                **_lora(model),
            },
            experts=describe(model),
            memory=runtime.planned_parts,
            taken=taken,
            versions={name: found for name in _PACKAGES if (found := installed(name))},
            seconds=time.monotonic() - self._start,
            ended=datetime.now(UTC).isoformat(timespec="seconds"),
            history=list(state.log_history),
            steps=state.global_step,
            recipe=_recipe(),
        )


def _recipe() -> dict[str, Any]:
    """The one that the command line names; empty without, and where it cannot be read."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
    if file.suffix not in (".yaml", ".yml") or not file.is_file():
        return {}
    found = yaml.safe_load(file.read_text("utf-8"))
    return {str(k): v for k, v in found.items()} if isinstance(found, dict) else {}


def _chosen(owner: Any, names: tuple[str, ...]) -> dict[str, Any]:
    found = {name: getattr(owner, name, None) for name in names}
    return {k: getattr(v, "value", v) for k, v in found.items() if v not in (None, "")}


def _lora(model: Any) -> dict[str, Any]:
    """The configuration of the adapter that trains, if it is one of PEFT's."""
    config = next(iter(getattr(model, "peft_config", {}).values()), None)
    found = _chosen(config, _LORA) if config is not None else {}
    if isinstance(found.get("target_modules"), set):
        found["target_modules"] = sorted(found["target_modules"])
    return {f"lora_{key.removeprefix('lora_')}": value for key, value in found.items()}
