"""The plain Trainer on an accelerator: steps, saving, resuming."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from children import finish
from device_child import DEVICE
from simulated_device import SimulatedDevice
from tiny_training import Change, Training, adapter, curve
from torch import nn
from transformers import Trainer

from kt_sft.training.accumulation import WaitingGradients

EXPERTS = ["gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass
class TrainingOnDevice(Training):
    """A training on the simulated device, whose jobs begin late."""

    def __call__(self) -> None:
        device = SimulatedDevice.for_trainers()
        with device.delays(compute=10, down=300, up=300):
            super().__call__()
        seen = dataclasses.asdict(device.observed())
        (Path(self.folder) / "observed.json").write_text(json.dumps(seen))


def run(
    folder: Path,
    resume: bool = False,
    adapters: str = "device",
    change: Change | None = None,
    experts: dict[str, Any] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """What the device saw of a training in a child."""
    # Numbers that the device draws are not among what the Trainer saves of devices unknown to it:
    # with attention's dropout a resumed run would drop others.
    work = TrainingOnDevice(
        str(folder),
        resume=resume,
        change=change,
        targets=EXPERTS,
        arguments={"use_cpu": False, **arguments},
        experts={"adapters": adapters, **(experts or {})},
    )
    code, output = finish(work, seconds=300)
    assert code == 0, output
    return json.loads((folder / "observed.json").read_text())


def _nothing_waits(model: nn.Module, trainer: Trainer) -> None:
    trainer.remove_callback(WaitingGradients)


def _interrupted(model: nn.Module, trainer: Trainer) -> None:
    """Ctrl-C within a step, and then a loop of one's own."""
    stock, calls = trainer.training_step, []

    def step(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return stock(*args, **kwargs)

    trainer.training_step = step  # type: ignore[method-assign]
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train()
    trainer.training_step = stock  # type: ignore[method-assign]
    model.zero_grad()
    ids = torch.arange(9, device=DEVICE)[None]
    model(ids, labels=ids).loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == [], without
    model.zero_grad()


def test_gradients_wait_for_the_last_micro_batch(tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 4, "max_steps": 2}
    less = run(tmp_path / "waiting", **settings)
    more = run(tmp_path / "not", change=_nothing_waits, **settings)
    assert curve(tmp_path / "waiting") == curve(tmp_path / "not")
    assert adapter(tmp_path / "waiting") == adapter(tmp_path / "not")
    lora = 3 * 3 * 8 * 4 * (64 + 72) * 4
    assert more["bytes_up"] - less["bytes_up"] == 2 * 3 * lora


def test_nothing_waits_after_a_training_that_was_interrupted(tmp_path: Path) -> None:
    run(tmp_path, change=_interrupted, gradient_accumulation_steps=4, max_steps=2)


def losses(folder: Path) -> list[float]:
    return [float.fromhex(loss) for loss in curve(folder)]


def on_cpu(folder: Path, **arguments: Any) -> list[float]:
    code, output = finish(Training(str(folder), targets=EXPERTS, arguments=arguments))
    assert code == 0, output
    return losses(folder)


both_places = pytest.mark.parametrize("adapters", ["device", "host"])


@both_places
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_steps": 3},
        {"gradient_checkpointing": True, "max_steps": 3},
        {"optim": "adamw_torch", "max_grad_norm": 0.1, "max_steps": 3},
    ],
    ids=["fused", "accumulating", "checkpointing", "clipping"],
)
def test_a_training_follows_the_one_on_the_cpu(
    tmp_path: Path, arguments: dict[str, Any], adapters: str
) -> None:
    seen = run(tmp_path / "device", adapters=adapters, **arguments)
    assert seen["violations"] == [] and seen["bytes_down"] > 0
    want = on_cpu(tmp_path / "cpu", **arguments)
    assert losses(tmp_path / "device") == pytest.approx(want, rel=2e-4)
    assert len(set(want)) == len(want)


def test_a_training_in_bf16_follows_the_one_on_the_cpu(tmp_path: Path) -> None:
    run(tmp_path / "device", bf16=True, max_steps=4)
    want = on_cpu(tmp_path / "cpu", bf16=True, max_steps=4)
    assert losses(tmp_path / "device") == pytest.approx(want, rel=3e-2)


@both_places
def test_a_resumed_training_is_the_same_to_the_bit(tmp_path: Path, adapters: str) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    constant = {"lr_scheduler_type": "constant", "adapters": adapters}
    run(whole, **constant)
    run(parts, max_steps=4, **constant)
    run(parts, resume=True, **constant)
    assert curve(parts) == curve(whole)
    assert adapter(parts) == adapter(whole)


schedules = pytest.mark.parametrize(
    "experts",
    [
        {"schedule": "resident", "gpu_experts": 3},
        {"schedule": "auto", "gpu_experts": 1},
        {"schedule": "device"},
    ],
    ids=["resident", "auto", "device"],
)


@schedules
def test_a_training_whose_device_has_experts(tmp_path: Path, experts: dict[str, Any]) -> None:
    """Follows the one on the CPU, and resumes with the same experts in the same places."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    constant = {"lr_scheduler_type": "constant", "gradient_checkpointing": True}
    seen = run(whole, experts=experts, **constant)
    assert seen["violations"] == []
    want = on_cpu(tmp_path / "cpu", **constant)
    assert losses(whole) == pytest.approx(want, rel=3e-4)
    run(parts, max_steps=4, experts=experts, **constant)
    run(parts, resume=True, experts=experts, **constant)
    assert curve(parts) == curve(whole)
    assert adapter(parts) == adapter(whole)
    profile = json.loads((whole / "kt_sft_routing.json").read_text())
    assert profile["passes"] > 0 and len(profile["rows"]) == 3
    assert (whole / "checkpoint-8" / "kt_sft_routing.json").is_file()
    count = experts.get("gpu_experts", 0)
    assert all(len(chosen) == count for chosen in profile["placement"]["residents"].values())
    assert profile["placement"]["schedule"] == experts["schedule"]
    for path, chosen in profile["placement"]["residents"].items():
        rows = profile["rows"][path]
        # By the latest choice, at step 4 of 8; no other expert got clearly more since.
        assert all(rows[e] * 2 >= max(rows) / 2 for e in chosen)
