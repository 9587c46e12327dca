"""Tiny models of each family on the device, against the same models wholly on the CPU."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILY_CONFIGS, make_model
from torch import Tensor, nn

from gpu_stages.setting import Setting
from kt_sft import HybridExpertsConfig, hybridize

# Relative, of any tensor in fp32; of the loss alone in bf16, where a router may choose otherwise.
FP32, BF16 = 2e-3, 3e-2
TARGETS = ["gate_proj", "up_proj", "down_proj", "o_proj"]
CHECKPOINTING = {"none": None, "reentrant": True, "saved tensors": False}


def build(family: str, device: str, dtype: torch.dtype, **settings: Any) -> nn.Module:
    """A tiny LoRA model with nonzero B and hybrid experts."""
    base = hybridize(make_model(family).to(dtype), HybridExpertsConfig(**settings))
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model.to(device).train()


def step(model: nn.Module, device: str, kind: bool | None = None) -> dict[str, Tensor]:
    """Logits, loss and gradients of one training step, on the CPU."""
    if kind is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": kind})
    ids = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(1)).to(device)
    out = model(ids, labels=ids)
    out.loss.backward()
    found = {"logits": out.logits, "loss": out.loss[None]}
    found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: t.detach().float().cpu() for n, t in found.items()}


def difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest relative Frobenius difference of any tensor; infinite where one is missing."""
    if got.keys() != want.keys():
        return float("inf")
    worst = [float((got[n] - t).norm() / t.norm().clamp_min(1e-12)) for n, t in want.items()]
    return max(d if d == d else float("inf") for d in worst)


def compared(
    got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, str | bool]:
    """The end of a row: in fp32 every tensor counts, in bf16 the loss."""
    exact = dtype == torch.float32
    worst = difference(got, want) if exact else difference(
        {"loss": got["loss"]}, {"loss": want["loss"]}
    )  # fmt: skip
    return {
        "difference": f"{worst:.1e}",
        "of": "any tensor" if exact else "loss",
        "ok": worst <= (FP32 if exact else BF16),
    }


def run(setting: Setting) -> None:
    """A row for each family, dtype, place of the adapters and kind of checkpointing."""
    device = setting.place()
    families = ["deepseek_v3"] if setting.small else list(FAMILY_CONFIGS)
    for family, dtype in itertools.product(families, (torch.float32, torch.bfloat16)):
        want = step(build(family, "cpu", dtype), "cpu")
        for adapters, kind in itertools.product(("device", "host"), CHECKPOINTING):
            model = build(family, device, dtype, adapters=adapters)
            setting.say(
                case=f"{family}, {str(dtype).removeprefix('torch.')}",
                adapters=adapters,
                checkpointing=kind,
                **compared(step(model, device, CHECKPOINTING[kind]), want, dtype),
            )
