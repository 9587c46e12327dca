"""Tiny bases with a trained-looking adapter beside them, for tests of what is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from packaging import version
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_configs import build
from torch import Tensor, nn

from kt_sft import HybridExpertsConfig, hybridize
from kt_sft.adapters.layer import HybridExpertsLinear
from kt_sft.export.adapter import Adapter
from kt_sft.export.base import Base

# The form that the installed PEFT reads.
OLD = version.parse(peft.__version__) < version.parse("0.19.0.dev0")
FUSED = "peft-fused-0.18" if OLD else "peft-fused"
IDS = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(4))
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_OTHERS = ("q_proj", "o_proj", "q_a_proj", "q_b_proj", "input_linear", "output_linear")


def randomize(model: nn.Module, seed: int = 1) -> None:
    """Gives every lora_B values as large as trained ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator).to(p) * 0.1


def scale_trained(model: nn.Module) -> None:
    """Changes what is trained in full."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.mul_(1.5)


def adapted(base: nn.Module, expert_lora: bool | str = True, **lora: Any) -> PeftModel:
    """A hybrid model with LoRA on experts, attention, shared and dense layers."""
    hybrid = hybridize(base, HybridExpertsConfig(threads=1, expert_lora=expert_lora))
    kinds: dict[str, list[bool]] = {}
    for name, module in hybrid.named_modules():
        plain = isinstance(module, nn.Linear | HybridExpertsLinear)
        kinds.setdefault(name.rpartition(".")[2], []).append(plain)
    targets = [name for name in (*PROJECTIONS, *_OTHERS) if all(kinds.get(name, [False]))]
    # Where other layers of these names take no LoRA, the experts' alone.
    targets += [f"experts.{n}" for n in PROJECTIONS if n in kinds and n not in targets]
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **lora})
    model = get_peft_model(hybrid, config).eval()
    randomize(model)
    return model


def trained(folder: Path, family: str, expert_lora: bool | str = True, **lora: Any) -> Adapter:
    """folder/base and folder/adapter, opened."""
    base = build(family)
    base.save_pretrained(folder / "base")
    adapted(base, expert_lora, **lora).save_pretrained(folder / "adapter")
    return opened(folder)


def opened(folder: Path, name: str = "adapter") -> Adapter:
    """An adapter of folder/base."""
    return Adapter(folder / name, Base.open(folder / "base"))


def stock(folder: Path) -> nn.Module:
    """A checkpoint in stock Transformers, all of whose tensors were found."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, found = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"], found
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return float((got - want).abs().max() / want.abs().max())
