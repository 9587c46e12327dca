"""Experts on the host, on the device, and parted between them: parity, then speed and memory.

Four layers of Qwen3-30B-A3B's shape. The same packed model runs under every schedule, in turns at
each length; beside it stand the whole of the experts in bf16 on the device, by the grouped products
of Transformers, without LoRA on them, which is what a GPU does that is large enough.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from gpu_stages.layers import ATTENTION, RANK, SHAPE, SMALL, build_model, measure, say, stock
from gpu_stages.parity import CHECKPOINTING, build, compared
from gpu_stages.parity import step as parity_step
from gpu_stages.setting import Setting
from kt_sft.device.block import Limits
from kt_sft.device.products import has_grouped_products
from kt_sft.engines.policies import policies
from kt_sft.engines.split import DeviceExperts, PartedExperts, PolicyOf
from kt_sft.engines.streaming import stream_of
from kt_sft.experts import HybridExperts, hybrid_experts_of
from kt_sft.scheduling.assignment import AllOnDevice, HostOnly, ResidentOnly

_SETTINGS = (
    {"schedule": "device"},
    {"schedule": "device", "gpu_experts": 4},
    {"schedule": "resident", "gpu_experts": 4},
    {"schedule": "auto", "gpu_experts": 2},
)


def _parity(setting: Setting) -> None:
    """Every schedule against the host's, plain and checkpointed."""
    device = setting.place()
    families = ["qwen3_moe"] if setting.small else ["qwen3_moe", "deepseek_v3", "mixtral"]
    for family, dtype in itertools.product(families, (torch.float32, torch.bfloat16)):
        want = parity_step(build(family, "cpu", dtype), "cpu")
        for settings, kind in itertools.product(_SETTINGS, CHECKPOINTING):
            model = build(family, device, dtype, **settings)
            setting.say(
                case=f"{family}, {str(dtype).removeprefix('torch.')}",
                schedule=", ".join(map(str, settings.values())),
                checkpointing=kind,
                **compared(parity_step(model, device, CHECKPOINTING[kind]), want, dtype),
            )


def _use(
    experts: Sequence[HybridExperts], kind: type[PartedExperts], policy_of: PolicyOf, part: float
) -> None:
    """The same packed weights under another schedule, with that part of them resident."""
    for module in experts:
        placed = module.weights
        assert isinstance(placed, PartedExperts)
        changed = kind(placed.inner, policy_of)
        assert changed.share is not None
        changed.share.place(range(int(part * module.shape.experts)))
        module.weights = changed


def _grouped(setting: Setting) -> nn.Module:
    """All experts in bf16 on the device."""
    model = stock(SMALL if setting.small else SHAPE).to(setting.place())
    if setting.place() == "cuda":
        model.set_experts_implementation("grouped_mm")
    return get_peft_model(model, LoraConfig(r=RANK, target_modules=ATTENTION)).train()


def _link(setting: Setting, model: nn.Module) -> None:
    """The rate at which packed experts reach the device, beside a plain copy of pinned memory."""
    device = torch.device(setting.place(), 0)
    module = next(iter(hybrid_experts_of(model).values()))
    placed = module.weights
    assert isinstance(placed, PartedExperts) and placed.share is not None
    share, chosen = placed.share, list(range(module.shape.experts))
    limits = Limits.within(placed.layout, torch.bfloat16)
    at_a_time = share.streamed_at_a_time(len(chosen), limits)

    def rate(work: Callable[[], int]) -> float:
        work()
        torch.accelerator.synchronize()
        start, done = time.perf_counter(), work()
        torch.accelerator.synchronize()
        return done / (time.perf_counter() - start) / 1e9

    pinned = torch.empty(1 << (16 if setting.small else 28), dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(pinned, device=device)

    def plain() -> int:
        there.copy_(pinned, non_blocking=True)
        return pinned.nbytes

    streamed = rate(lambda: share.stream(chosen, device, at_a_time) * share.expert_bytes)
    copied = rate(plain)
    setting.say(
        case="packed experts to the device",
        gb_per_s=round(streamed, 2),
        pinned_gb_per_s=round(copied, 2),
        part=round(streamed / copied, 2),
        at_a_time=at_a_time,
        buffers_mb=round(stream_of(device).nbytes / 1e6, 1),
        grouped_products=has_grouped_products(device, torch.bfloat16),
    )


def run(setting: Setting) -> None:
    """Parity, the link, then a row for each schedule and length."""
    _parity(setting)
    model = build_model(setting, "device", schedule="auto")
    experts = list(hybrid_experts_of(model).values())
    runtime = experts[0].runtime
    measured = policies(runtime.settings, runtime.engine)
    _link(setting, model)
    ways: list[tuple[str, type[PartedExperts], PolicyOf, float]] = [
        ("host", PartedExperts, lambda *_: HostOnly(), 0.0),
        ("resident 25 %", PartedExperts, lambda *_: ResidentOnly(), 0.25),
        ("resident 50 %", PartedExperts, lambda *_: ResidentOnly(), 0.5),
        ("all streamed", DeviceExperts, lambda *_: AllOnDevice(), 0.0),
        ("all resident", DeviceExperts, lambda *_: AllOnDevice(), 1.0),
        ("auto", PartedExperts, measured, 0.0),
        ("auto, 25 % resident", PartedExperts, measured, 0.25),
    ]
    lengths = (32, 48) if setting.small else (512, 2048, 8192)
    for tokens in lengths:
        for name, kind, policy_of, part in ways:
            _use(experts, kind, policy_of, part)
            _, seconds = measure(setting, model, tokens)
            say(setting, name, model, tokens, seconds)
    del model, experts
    whole = _grouped(setting)
    for tokens in lengths:
        _, seconds = measure(setting, whole, tokens)
        say(setting, "bf16 on the device, no LoRA on experts", whole, tokens, seconds)
