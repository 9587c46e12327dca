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


def train(
    place: Workplace,
    name: str,
    on_device: bool,
    adapters: str,
    experts: dict[str, Any] | None = None,
    **settings: Any,
) -> str:
    """Its output."""
    recipe = {
        **RECIPE,
        "model_name_or_path": str(place.folder / "model"),
        "dataset_dir": str(place.folder / "data"),
        "output_dir": str(place.folder / name),
        "max_steps": 3,
        # On the host together, as on a device that is too small for either.
        "kt_sft": {
            "threads": 1,
            "adapters": adapters,
            "embeddings": adapters,
            **(experts or {}),
        },
        **settings,
        "use_cpu": not on_device,
    }
    change = on_simulated_device if on_device else None
    code, text = finish(Recipe(str(place.folder / name), recipe, change), seconds=300)
    assert code == 0, text[-5000:]
    return text


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


def test_a_recipe_whose_device_has_experts(place: Workplace) -> None:
    """Planned, placed by the earlier run's profile, logged, and the profile kept again."""
    train(place, "plain", False, "device", **MODES["sft"])
    experts = {"schedule": "auto", "gpu_experts": 3, "store": str(place.folder / "stores")}
    for name in ("first", "second"):
        text = train(place, name, True, "device", experts, **MODES["sft"])
        assert place.losses(name) == pytest.approx(place.losses("plain"), rel=2e-3)
        assert "resident experts" in text and "working memory of experts" in text
        assert (place.folder / name / "kt_sft_routing.json").is_file()
    (kept,) = (place.folder / "stores").glob("*.routing.json")
    assert kept.read_text() == (place.folder / "second" / "kt_sft_routing.json").read_text()
    assert (place.folder / "stores" / "calibration.json").is_file()
    # What a device has at once is what the last run had found.
    resident = {"schedule": "resident", "gpu_experts": 3, "store": experts["store"]}
    train(place, "third", True, "device", resident, **MODES["sft"])
    log = place.logs("third")[-1]
    assert 0.3 < log["experts_device_share"] < 1
