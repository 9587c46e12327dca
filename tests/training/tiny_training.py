"""A short training of a tiny hybrid model in a child process, which a test may kill."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  the Trainer imports these when it is built
import torch
import wandb  # noqa: F401
from peft import LoraConfig, get_peft_model
from tiny_models import make_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from kt_sft import HybridExpertsCallback, HybridExpertsConfig, hybridize
from kt_sft.experts import hybrid_experts_of

STEPS = 8
TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
_IDS = torch.randint(0, 300, (64, 9), generator=torch.Generator().manual_seed(4))

# change(model, trainer) in the child, before it trains
Change = Callable[[nn.Module, Trainer], None]


class _Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(_IDS)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": _IDS[i], "labels": _IDS[i]}


@dataclass
class CrashAt:
    """SIGKILL when a function is called (or has returned) for the `count`-th time."""

    module: str
    function: str
    after: bool = False
    count: int = 1

    def plant(self) -> None:
        owner: Any = importlib.import_module(self.module)
        *outer, name = self.function.split(".")
        for part in outer:
            owner = getattr(owner, part)
        stock, left = getattr(owner, name), [self.count]

        def crashing(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = stock(*args, **kwargs)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, crashing)


@dataclass
class Training:
    """What a child does."""

    folder: str
    resume: bool = False
    crash: CrashAt | None = None
    change: Change | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    experts: dict[str, Any] = field(default_factory=dict)
    targets: list[str] = field(default_factory=lambda: list(TARGETS))

    def __call__(self) -> None:
        torch.set_num_threads(1)
        model = hybridize(make_model("qwen3_moe"), HybridExpertsConfig(threads=1, **self.experts))
        torch.manual_seed(1)
        model = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules=self.targets)
        )
        values: dict[str, Any] = {
            "output_dir": self.folder, "max_steps": STEPS, "logging_steps": 1, "save_steps": 2,
            "save_strategy": "steps", "save_total_limit": 2, "report_to": "none", "use_cpu": True,
            "learning_rate": 1e-2, "per_device_train_batch_size": 2, "seed": 7,
            "disable_tqdm": True,
        }  # fmt: skip
        values.update(self.arguments)
        resume_from = values.pop("resume_from", None)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**values),
            train_dataset=_Rows(),
            callbacks=[HybridExpertsCallback()],
        )
        if self.crash is not None:
            self.crash.plant()
        if self.change is not None:
            self.change(model, trainer)
        trainer.train(resume_from_checkpoint=resume_from or (True if self.resume else None))
        trainer.save_model()
        trainer.save_state()


def curve(folder: str | Path) -> list[str]:
    """The loss of every step, exactly."""
    state = json.loads((Path(folder) / "trainer_state.json").read_text())
    return [e["loss"].hex() for e in state["log_history"] if "loss" in e]


def adapter(folder: str | Path) -> str:
    """The digest of the adapter's file."""
    return hashlib.sha256((Path(folder) / "adapter_model.safetensors").read_bytes()).hexdigest()


class AtStep(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step: int, work: Callable[[nn.Module], None]) -> None:
        self.step, self.work = step, work

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step + 1 == self.step:
            self.work(model)


def experts_of(model: nn.Module, layer: int = 1) -> Any:
    """One layer of experts."""
    return list(hybrid_experts_of(model).values())[layer]
