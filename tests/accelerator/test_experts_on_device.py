"""Experts that the simulated device computes, alone or with the host, against the host alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from device_child import DEVICE, on_device
from simulated_device import SimulatedDevice
from test_models_on_device import (
    BF16,
    FP32,
    IDS,
    assert_close,
    family_step,
    late,
    placed,
    qwen,
    step,
)
from tiny_configs import TINY_FAMILIES
from torch import nn

from kt_sft.engines import policies, share
from kt_sft.engines.split import DeviceExperts, PartedExperts
from kt_sft.experts import hybrid_experts_of
from kt_sft.scheduling.assignment import Assignment
from kt_sft.scheduling.costs import Curve, LayerCosts, PassCosts

SCHEDULES: dict[str, dict[str, Any]] = {
    "device": {"schedule": "device"},
    "device_residents": {"schedule": "device", "gpu_experts": 3},
    "resident": {"schedule": "resident", "gpu_experts": 3},
    "auto": {"schedule": "auto", "gpu_experts": 2},
}


class Thirds:
    """A policy that gives every place a third, resident ones to the device."""

    def assign(
        self, rows: Sequence[int], resident: Sequence[int], backward_follows: bool
    ) -> Assignment:
        busy = [e for e, n in enumerate(rows) if n and e not in resident]
        return Assignment(tuple(e for e in resident if rows[e]), tuple(busy[::2]))


def by_thirds() -> None:
    """`schedule: auto` without measuring."""
    curve = Curve((1,), (1.0,))
    one = PassCosts(curve, curve, host_fixed=0.0, device_fixed=0.0, stream=1.0)
    policies.EndsFirst = lambda costs: Thirds()
    policies.Calibrations.costs = lambda *_: LayerCosts(one, one)


def _one(device: SimulatedDevice, name: str, dtype: torch.dtype, bound: float) -> None:
    by_thirds()
    with late(device):
        model = placed(qwen(dtype, **SCHEDULES[name]), DEVICE)
        got = step(model)
    assert_close(got, step(qwen(dtype)), bound)
    kind = DeviceExperts if name.startswith("device") else PartedExperts
    assert all(type(m.weights) is kind for m in hybrid_experts_of(model).values())


@pytest.mark.parametrize("dtype, bound", [(torch.float32, FP32), (torch.bfloat16, BF16)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str, dtype: torch.dtype, bound: float) -> None:
    on_device(_one, name, dtype, bound)


def _families(device: SimulatedDevice, *names: str) -> None:
    """Gates, biases, layouts and calls of every family, with LoRA on the experts."""
    by_thirds()
    for name in names:
        with late(device):
            got = family_step(name, DEVICE, schedule="auto", gpu_experts=1)
        assert_close(got, family_step(name, "cpu"), FP32)


_NAMES = sorted(TINY_FAMILIES)


@pytest.mark.parametrize("first", range(0, len(_NAMES), 17))
def test_families(first: int) -> None:
    on_device(_families, *_NAMES[first : first + 17])


# Whatever else decides how a step goes.
_STEPS = {
    "autocast": {},
    "shared LoRA": {"expert_lora": "shared"},
    "LoRA on the host": {"adapters": "host"},
    "int4": {"weights": "int4_g32"},
    "bf16 weights": {"weights": "bf16"},
}


def _steps(device: SimulatedDevice, schedule: str) -> None:
    by_thirds()
    for name, settings in _STEPS.items():

        def run(settings: dict[str, Any], name: str = name) -> dict[str, torch.Tensor]:
            model = placed(qwen(dropout=0.4, **settings), DEVICE).train()
            torch.manual_seed(5)  # attention's dropout is the device's own
            with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=name == "autocast"):
                return step(model)

        with late(device):
            got = run(settings | SCHEDULES[schedule])
        bound = BF16 if name in ("autocast", "bf16 weights") else FP32
        assert_close(got, run(settings), bound)


@pytest.mark.parametrize("schedule", ["auto", "device"])
def test_steps(schedule: str) -> None:
    on_device(_steps, schedule)


def _checkpointing(device: SimulatedDevice, schedule: str) -> None:
    by_thirds()
    for reentrant, activations in itertools.product((True, False), ("keep", "recompute")):
        model = qwen(dropout=0.3, activations=activations, **SCHEDULES[schedule])
        model = placed(model, DEVICE).train()
        with late(device):
            torch.manual_seed(5)
            plain = step(model)
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            torch.manual_seed(5)
            again = step(model)
        differ = {n for n, t in plain.items() if not torch.equal(t, again[n])}
        assert differ == set(), (reentrant, activations)


@pytest.mark.parametrize("schedule", ["auto", "device"])
def test_checkpointing_changes_nothing(schedule: str) -> None:
    on_device(_checkpointing, schedule)


def _inference(device: SimulatedDevice) -> None:
    """generate, evaluation, a copy of the model, and a training after inference mode."""
    by_thirds()
    model = placed(qwen(**SCHEDULES["auto"]), DEVICE).eval()
    stock = qwen().eval()

    def generated(of: nn.Module) -> list[list[int]]:
        ids = IDS[:, :5].to(of.device)
        return of.generate(input_ids=ids, max_new_tokens=6, do_sample=False).tolist()

    with late(device):
        with torch.inference_mode():
            model(IDS.to(DEVICE))
        assert generated(model) == generated(stock)
        copied = copy.deepcopy(model)
        with model.disable_adapter():
            model(IDS.to(DEVICE))  # as DPO's reference does
        got, again = step(model.train()), step(copied.train())
    want = step(stock.train())
    assert_close(got, want, FP32)
    assert_close(again, want, FP32)


def test_inference() -> None:
    on_device(_inference)


def _traffic(device: SimulatedDevice) -> None:
    """Weights go up once a pass; what is there stays there; the host waits as before."""
    by_thirds()
    model = placed(qwen(**SCHEDULES["auto"]), DEVICE).train()
    step(model)
    modules = hybrid_experts_of(model)
    torch.accelerator.synchronize()
    device.clear()
    runtime = next(iter(modules.values())).runtime
    runtime.meter.read()
    step(model)
    seen, read = device.observed(), runtime.meter.read()
    assert seen.violations == []
    of_experts = 0
    for module in modules.values():
        share = module.weights.share
        rows = runtime.routing.shares()[module.path]
        streamed = len(Thirds().assign(rows, share.resident, True).streamed)
        assert len(share.resident) == 2 and streamed >= 2
        of_experts += 2 * streamed * share.expert_bytes
    plain = placed(qwen(), DEVICE).train()
    step(plain)
    other = next(iter(hybrid_experts_of(plain).values())).runtime.meter
    other.read()
    torch.accelerator.synchronize()
    device.clear()
    step(plain)
    of_plain = device.observed()
    assert read.traffic.bytes_up == other.read().traffic.bytes_up + of_experts
    # The step brings its tokens up and the test its results down, with or without experts there.
    assert {**seen.waits, "event": 0} == {**of_plain.waits, "event": 0}


def test_traffic() -> None:
    on_device(_traffic)


def _measured(device: SimulatedDevice) -> None:
    """`schedule: auto` with costs that are measured, kept and found again."""
    model = placed(qwen(schedule="auto"), DEVICE).train()
    got = step(model)
    assert_close(got, step(qwen()), FP32)
    (path,) = policies.Calibrations(
        next(iter(hybrid_experts_of(model).values())).runtime.settings
    ).path.parent.glob("calibration.json")
    before = path.read_bytes()
    again = placed(qwen(schedule="auto"), DEVICE).train()
    assert {n for n, t in step(again).items() if not torch.equal(t, got[n])} == set()
    assert path.read_bytes() == before


def test_auto_measures_once() -> None:
    on_device(_measured)


def _many_pieces(device: SimulatedDevice) -> None:
    """More of them in a pass than there are buffers: none is refilled before it was used."""
    share._PIECE_BYTES = 1
    model = placed(qwen(schedule="device"), DEVICE)
    with late(device):
        got = step(model)
    assert_close(got, step(qwen()), FP32)


def test_many_pieces() -> None:
    on_device(_many_pieces)


def _nan(device: SimulatedDevice, schedule: str) -> None:
    """What an accelerator makes is named by the layer that it reaches."""
    by_thirds()
    model = placed(qwen(**SCHEDULES[schedule]), DEVICE).train()
    name = "base_model.model.model.layers.0.mlp.experts.down_proj.lora_B.default"
    with torch.no_grad():
        dict(model.named_parameters())[name].fill_(float("nan"))
    step(model)
    first = next(iter(hybrid_experts_of(model).values())).runtime.watch.first
    assert first is not None and "layers.1.mlp.experts: in the hidden states" in first, first


def test_nan_is_named() -> None:
    on_device(_nan, "device")
