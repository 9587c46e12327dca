"""PPO, with the trl that LLaMA-Factory's PPO asks for, against stock on the same weights."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from llamafactory_runs import RECIPE, Workplace, effective_workplace, environment

EXPERTS = {"weights": "int8", "threads": 1}
PPO = {
    "stage": "ppo", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
    "max_new_tokens": 8, "top_k": 0, "top_p": 1.0, "max_steps": 4, "learning_rate": 5e-3,
}  # fmt: skip
CHILD = Path(__file__).with_name("ppo_child.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """With a reward model whose LoRA is on attention, and one that is on the experts too."""
    folder = tmp_path_factory.mktemp("ppo")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target",
         str(folder / "trl"), "trl==0.9.6"], check=True,
    )  # fmt: skip
    place = effective_workplace(folder)
    reward = {"stage": "rm", "dataset": "pairs", "per_device_train_batch_size": 2, "max_steps": 2}
    place.train("reward", lora_target="q_proj,v_proj", **reward)
    place.train("reward-experts", kt_sft=EXPERTS, **reward)
    return place


def train(place: Workplace, name: str, **settings: Any) -> list[list[float]]:
    """[loss, reward] of each step."""
    values = {
        **RECIPE, "model_name_or_path": str(place.folder / "model"),
        "dataset_dir": str(place.folder / "data"), "output_dir": str(place.folder / name),
        **PPO, **settings,
    }  # fmt: skip
    # As a model of its own: with `lora`, LLaMA-Factory itself leaves the policy's LoRA frozen.
    values["reward_model_type"] = "full"
    values["reward_model_adapters"] = str(place.folder / values["reward_model"])
    values["reward_model"] = values["model_name_or_path"]
    recipe = place.folder / f"{name}.json"
    recipe.write_text(json.dumps(values))
    paths = [str(place.folder / "trl"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, CHILD, recipe, place.folder / "model", place.folder / f"{name}-report"],
        env=environment(
            {"DISABLE_VERSION_CHECK": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        ),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return [[entry["loss"], entry["reward"]] for entry in place.logs(name)]


def assert_reference_is_the_base(place: Workplace, name: str, moved: float = 0.05) -> None:
    rows = json.loads((place.folder / f"{name}-report").read_text())
    assert len(rows) == PPO["max_steps"]
    assert max(base for base, _ in rows) < 5e-3, rows
    assert rows[0][1] < 5e-3 < moved < rows[-1][1], rows


@pytest.mark.slow
def test_ppo_follows_stock_and_its_reference_is_the_base(place: Workplace) -> None:
    # Small steps: Adam makes much of rounding in gradients near zero, and a token is soon another.
    attention = {"lora_target": "q_proj,v_proj", "reward_model": "reward", "learning_rate": 1e-3}
    stock = train(place, "stock", **attention)
    hybrid = train(place, "hybrid", kt_sft={**EXPERTS, "expert_lora": False}, **attention)
    assert len(stock) == PPO["max_steps"]
    for a, b in zip(chain(*stock), chain(*hybrid), strict=True):
        assert math.isfinite(b) and abs(a - b) <= 5e-3 * max(1.0, abs(a)), (stock, hybrid)
    assert_reference_is_the_base(place, "stock", moved=0.01)
    assert_reference_is_the_base(place, "hybrid", moved=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_ppo_of_the_experts_has_the_base_as_reference(place: Workplace, dropout: float) -> None:
    name = f"experts-{dropout}"
    rows = train(place, name, kt_sft=EXPERTS, reward_model="reward-experts", lora_dropout=dropout)
    assert all(map(math.isfinite, chain(*rows)))
    assert_reference_is_the_base(place, name)
