"""LLaMA-Factory's recipes on the simulated device, against the same ones on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
from children import finish
from llamafactory_runs import RECIPE, Workplace, effective_workplace
from recipe_runs import Recipe
from simulated_device import SimulatedDevice

MODES: dict[str, dict[str, Any]] = {
    "sft": {
        "loraplus_lr_ratio": 16.0, "gradient_accumulation_steps": 2, "do_eval": True,
        "val_size": 0.2, "eval_strategy": "steps", "eval_steps": 2,
    },
    "dpo": {"stage": "dpo", "dataset": "pairs", "per_device_train_batch_size": 2},
}  # fmt: skip


def on_simulated_device() -> None:
    """In a child, before its recipe runs."""
    SimulatedDevice.for_trainers()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return effective_workplace(tmp_path_factory.mktemp("device"))


def train(place: Workplace, name: str, on_device: bool, adapters: str, **settings: Any) -> None:
    recipe = {
        **RECIPE,
        "model_name_or_path": str(place.folder / "model"),
        "dataset_dir": str(place.folder / "data"),
        "output_dir": str(place.folder / name),
        "max_steps": 3,
        # On the host together, as on a device that is too small for either.
        "kt_sft": {"threads": 1, "adapters": adapters, "embeddings": adapters},
        **settings,
        "use_cpu": not on_device,
    }
    change = on_simulated_device if on_device else None
    code, text = finish(Recipe(str(place.folder / name), recipe, change), seconds=300)
    assert code == 0, text[-5000:]


@pytest.mark.parametrize("mode", MODES)
def test_recipes_follow_those_on_the_cpu(place: Workplace, mode: str) -> None:
    train(place, mode, False, "device", **MODES[mode])
    want = place.losses(mode)
    crossed = {}
    for adapters in ("device", "host"):
        name = f"{mode}-{adapters}"
        train(place, name, True, adapters, **MODES[mode])
        assert place.losses(name) == pytest.approx(want, rel=2e-3)
        log = place.logs(name)[-1]
        assert log["experts_mb_down"] > 0 and log["experts_host_waited_ms"] >= 0
        crossed[adapters] = log["experts_mb_up"]
    # Gradients of LoRA of rank 4, fp32, 3 layers of 8 experts: once a step, or not at all.
    lora = 4 * 3 * 8 * 3 * 4 * (64 + 72) / 1e6
    assert crossed["device"] - crossed["host"] == pytest.approx(lora, rel=0.02)
