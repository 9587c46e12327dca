"""Recipes that run in a child process, through the function that `llamafactory-cli` calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llamafactory.hparams.parser as parser
import llamafactory.model.loader as loader
import llamafactory.train.tuner as tuner
import torch
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from llamafactory.train.kto.trainer import CustomKTOTrainer
from transformers import AutoModelForCausalLM

STEPS = 3


@dataclass
class Recipe:
    """What a child does: `change` prepares it, then the recipe runs."""

    folder: str
    values: dict[str, Any]
    change: Callable[[], None] | None = None
    command: str = "train"
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self) -> None:
        torch.set_num_threads(1)
        if self.change is not None:
            self.change()
        {"train": tuner.run_exp, "export": tuner.export_model}[self.command](self.values)


def no_cuda_by_name() -> None:
    """LLaMA-Factory's `use_unsloth_gc` brings hidden states to "cuda", whatever the device is."""
    stock = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return stock(self, *("cpu" if a == "cuda" else a for a in args), **kwargs)

    torch.Tensor.to = to  # type: ignore[method-assign]


def allow_pure_bf16() -> None:
    """LLaMA-Factory admits it with an accelerator only; everything behind that runs without."""
    parser.is_torch_bf16_gpu_available = lambda: True


@dataclass
class OtherHub:
    """LLaMA-Factory's download from ModelScope or Openmind, which is not reached: a name's folder.

    Only what asks by the name finds it.
    """

    name: str
    folder: str

    def __call__(self) -> None:
        def found(model_args: Any) -> str:
            return self.folder if model_args.model_name_or_path == self.name else stock(model_args)

        stock = loader.try_download_model_from_other_hub
        loader.try_download_model_from_other_hub = found


@dataclass
class CompareReference:
    """Writes, for every step, how far the reference's log-probabilities are from the stock base's.

    `file` gets a list of [largest difference from the base, largest difference from the policy].
    """

    base: str
    file: str

    def __call__(self) -> None:
        stock = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        for trainer in (CustomDPOTrainer, CustomKTOTrainer):
            self._watch(trainer, stock)

    def _watch(self, trainer: Any, stock: torch.nn.Module) -> None:
        reference, forward = trainer.compute_reference_log_probs, trainer.concatenated_forward
        rows: list[list[float]] = []

        def compute_reference_log_probs(self_: Any, model: Any, batch: Any) -> Any:
            got = reference(self_, model, batch)
            with torch.no_grad():
                want = _log_probabilities(forward(self_, stock, batch))
                policy = _log_probabilities(forward(self_, model, batch))
            rows.append([_largest(got, want), _largest(got, policy)])
            Path(self.file).write_text(json.dumps(rows))
            return got

        trainer.compute_reference_log_probs = compute_reference_log_probs


def _log_probabilities(result: Any) -> list[torch.Tensor]:
    if isinstance(result, dict):
        return [result["chosen_logps"], result["rejected_logps"]]
    # KTO puts the log-probability of its mismatched pairs fifth.
    return [result[0], result[1], *([result[4]] if len(result) > 5 else [])]


def _largest(got: Any, want: list[torch.Tensor]) -> float:
    pairs = zip(got, want, strict=False)
    return max(float((a - b).abs().max()) for a, b in pairs if a is not None and a.numel())
