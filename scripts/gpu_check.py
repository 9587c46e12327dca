"""Checks hybrid experts with the rest of the model on an accelerator, and prints a table.

Each family's tiny model runs on the device with its experts on the host, and once more wholly on
the CPU; logits, loss and LoRA gradients must agree. Without an accelerator the CPU part runs alone.

    python scripts/gpu_check.py [--device cuda] [--markdown]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import kt_sft
from kt_sft.experts import hybrid_experts_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from tiny_models import FAMILY_CONFIGS, make_model

# fp32 on both sides; the experts' own arithmetic is the same host code in both.
AGREEMENT = 2e-3


@dataclass
class Row:
    """One line of the table."""

    case: str
    device: str
    worst_difference: float
    tokens_per_second: float
    peak_device_mb: float

    @property
    def verdict(self) -> str:
        """ok, FAIL, or alone when there was nothing to compare with."""
        if self.worst_difference != self.worst_difference:
            return "alone"
        return "ok" if self.worst_difference <= AGREEMENT else "FAIL"


def build(family: str, device: str, dtype: torch.dtype) -> nn.Module:
    """A tiny LoRA model with nonzero B, its experts on the host."""
    base = kt_sft.hybridize(make_model(family).to(dtype), kt_sft.HybridExpertsConfig())
    targets = ["gate_proj", "up_proj", "down_proj", "o_proj"]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model.to(device)


def step(model: nn.Module, ids: Tensor, device: str) -> dict[str, Tensor]:
    """Logits, loss and gradients of one training step, on the CPU."""
    model.zero_grad()
    out = model(ids.to(device), labels=ids.to(device))
    out.loss.backward()
    found = {"logits": out.logits, "loss": out.loss[None]}
    found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: t.detach().float().cpu() for n, t in found.items()}


def difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest relative Frobenius difference of any tensor."""
    assert got.keys() == want.keys()
    return max(float((got[n] - t).norm() / t.norm().clamp_min(1e-12)) for n, t in want.items())


def check(family: str, device: str, dtype: torch.dtype) -> Row:
    """One family on one device, against the CPU where that is another device."""
    ids = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(1))
    on_device = device != "cpu"
    if on_device:
        torch.cuda.reset_peak_memory_stats()
    model = build(family, device, dtype)
    assert all(m.weights is not None for m in hybrid_experts_of(model).values())
    lora_devices = {p.device.type for n, p in model.named_parameters() if "lora_" in n}
    assert lora_devices == {torch.device(device).type}, lora_devices
    got = step(model, ids, device)
    start = time.perf_counter()
    for _ in range(5):
        step(model, ids, device)
    speed = 5 * ids.numel() / (time.perf_counter() - start)
    worst = float("nan")
    if on_device and dtype == torch.float32:
        worst = difference(got, step(build(family, "cpu", dtype), ids, "cpu"))
    peak = torch.cuda.max_memory_allocated() / 1e6 if on_device else 0.0
    name = f"{family} {str(dtype).removeprefix('torch.')}"
    return Row(name, device, worst, speed, peak)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 when a comparison failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args(argv).device
    if device != "cpu":
        # TF32 would differ from the CPU's fp32 by 1e-3.
        torch.backends.cuda.matmul.allow_tf32 = False
    rows = [check(f, device, d) for f in FAMILY_CONFIGS for d in (torch.float32, torch.bfloat16)]
    lines = ["| case | device | largest difference to the CPU | tokens/s | peak device MB | |"]
    lines.append("|---|---|---|---|---|---|")
    for r in rows:
        shown = "-" if r.verdict == "alone" else f"{r.worst_difference:.1e}"
        lines.append(
            f"| {r.case} | {r.device} | {shown} | {r.tokens_per_second:,.0f} "
            f"| {r.peak_device_mb:.0f} | {r.verdict} |"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    if device == "cpu":
        sys.stdout.write("No accelerator: the CPU part ran alone, nothing was compared.\n")
    return 1 if any(r.verdict == "FAIL" for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
