"""`kt-sft plan --explain` and `kt-sft profile`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import make_model

from kt_sft.cli.main import main
from kt_sft.config import HybridExpertsSettings
from kt_sft.engines import calibration
from kt_sft.kernels import WeightLayout
from kt_sft.planning.schedule import expected_rows, explain, picture, table
from kt_sft.scheduling.costs import Curve, LayerCosts, PassCosts
from kt_sft.scheduling.profile import FILE_NAME, Placement, RoutingProfile

LAYOUT = WeightLayout(8, 64, 72, "int8")
HOST = Curve((1, 8, 512), (1e-3, 2e-3, 60e-3))
DEVICE = Curve((1, 512), (1e-4, 2e-4))
ONE = PassCosts(HOST, DEVICE, host_fixed=1e-4, device_fixed=5e-4, stream=2e-3)
COSTS = LayerCosts(ONE, ONE)


@pytest.mark.parametrize(
    "shares, tokens, top_k, want",
    [
        ([0.25] * 4, 10, 2, [5, 5, 5, 5]),
        ([0.5, 0.3, 0.2, 0.0], 10, 1, [5, 3, 2, 0]),
        ([0.9, 0.1, 0.0, 0.0], 10, 2, None),  # nobody gets more rows than there are tokens
        ([1.0, 1.0, 1.0], 1, 2, None),
        ([1.0, 1.0], 0, 2, [0, 0]),
    ],
)
def test_expected_rows(
    shares: list[float], tokens: int, top_k: int, want: list[int] | None
) -> None:
    rows = expected_rows(shares, tokens, top_k)
    assert sum(rows) == tokens * top_k and max(rows) <= tokens
    assert want is None or rows == want


def test_what_is_explained_adds_up() -> None:
    found = explain(COSTS, [1 / 8] * 8, tokens=256, top_k=2, resident=[0, 1])
    assert set(found) == {"host", "device", "auto"}
    assert found["host"].on_host == 8 and found["device"].on_host == 0
    auto = found["auto"]
    assert auto.seconds <= min(found["host"].seconds, found["device"].seconds)
    assert auto.on_host + len(auto.places.on_device) == 8 and auto.places.resident == (0, 1)
    lines = list(table([(2, found)]))
    assert len(lines) == 2 and f"{1e3 * auto.seconds:.2f} ms" in lines[1]
    drawn = list(picture(auto, LAYOUT))
    places = [line.split()[0] for line in drawn[1:4]]
    assert len(drawn) == 8 and places == ["host", "link", "device"]
    rows = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) rows", "\n".join(drawn[:4]))]
    assert sum(rows) == 512
    longest = max(line.count("█") for line in drawn)
    assert 30 <= longest <= 40


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model's folder, a recipe and a calibration."""
    make_model("qwen3_moe").save_pretrained(tmp_path / "model")
    recipe = {
        "model_name_or_path": str(tmp_path / "model"), "stage": "sft", "do_train": True,
        "finetuning_type": "lora", "output_dir": str(tmp_path / "run"), "cutoff_len": 128,
        "per_device_train_batch_size": 2, "kt_sft": {"schedule": "auto", "gpu_experts": 2},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    setting = {"cpu": "a CPU", "device": "a GPU", "layout": calibration._form(LAYOUT)}
    known = {json.dumps(setting): COSTS.as_dict()}
    (tmp_path / "calibration.json").write_text(json.dumps(known))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert main(list(map(str, words))) == 0
    return capsys.readouterr().out


def test_plan_explains_a_recipe(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--explain", "--calibration", place / "calibration.json"
    plan = "plan", place / "recipe.yaml"
    out = run(capsys, *plan, *words)
    assert "8 experts of 64 x 72 in int8, 2 for each token" in out
    assert "measured on a CPU and a GPU" in out and "no profile yet" in out
    assert "      256         2 " in out and "schedule: auto with 2 resident experts" in out
    assert "backward, 256 tokens:" in out
    assert "with 3 resident experts" in run(capsys, *plan, "kt_sft.gpu_experts=3", *words)
    assert "says schedule: device" in run(capsys, *plan, "kt_sft.schedule=device", *words)
    assert "█" not in run(capsys, *plan)
    # A setting of the recipe, and a profile of its run.
    (place / "run").mkdir()
    profile = RoutingProfile()
    for layer in range(3):
        profile.record(f"model.layers.{layer}.mlp.experts", [9, 0, 0, 0, 5, 0, 0, 2])
    profile.save(place / "run" / FILE_NAME)
    out = run(capsys, *plan, "cutoff_len=64", *words)
    assert "      128         2 " in out and f"by the profile {place / 'run' / FILE_NAME}" in out
    (place / "recipe.yaml").write_text(
        (place / "recipe.yaml").read_text().replace("gpu_experts: 2", "gpu_experts: 100 KB")
    )
    each = LAYOUT.nbytes // 8 * 3
    assert f"with {100_000 // each} resident experts" in run(capsys, *plan, *words)


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert main(list(map(str, words))) == 2
    return capsys.readouterr().err


def test_what_a_plan_cannot_say(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, known = place / "recipe.yaml", place / "calibration.json"
    plan, explain = ("plan", recipe), ("plan", recipe, "--explain")
    assert "no accelerator here" in refused(capsys, *explain)
    other_weights = "kt_sft={schedule: auto, weights: bf16}"
    assert "has nothing of 64 x 72, bf16" in refused(
        capsys, *plan, other_weights, "--explain", "--calibration", known
    )
    other = place / "other.json"
    other.write_text("[]")
    assert "is no calibration" in refused(capsys, *explain, "--calibration", other)
    assert "got 'nowhere', which is no folder here" in refused(
        capsys, *plan, "model_name_or_path=nowhere", "--explain"
    )
    assert "has no such section" in refused(capsys, *plan, "kt_sft=false", "--explain")
    assert "no file" in refused(capsys, "plan", place / "none.yaml", "--explain")
    assert "write kt_sft.gpu_experts=4" in refused(capsys, *plan, "gpu_experts=4")
    assert "is no section" in refused(capsys, *plan, "stage.x=4")
    assert "is no YAML" in refused(capsys, *plan, "stage={")
    assert "--profile: no file" in refused(
        capsys, *explain, "--calibration", known, "--profile", place / "nothing"
    )
    for damage in ('"contention": -5', '"contention": NaN', '"contention": 1e300'):
        other.write_text(known.read_text().replace('"contention": 0.0', damage))
        assert "is no calibration" in refused(capsys, *explain, "--calibration", other)
    recipe.write_text("a: b: c")
    assert "is no YAML" in refused(capsys, *explain)
    assert "is no YAML" in refused(capsys, "profile", recipe)
    recipe.write_text("- a list")
    assert "expected a recipe's settings" in refused(capsys, *explain)


def test_a_profile_is_drawn(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "a training writes it when it ends" in refused(capsys, "profile", place / "recipe.yaml")
    profile = RoutingProfile()
    profile.record("model.layers.0.mlp.experts", [8, 0, 4, 0, 0, 0, 2, 2])
    profile.record("model.layers.11.mlp.experts", [1] * 8)
    (place / "run").mkdir()
    profile.save(place / "run" / FILE_NAME, Placement({"model.layers.0.mlp.experts": (0, 2)}))
    outputs = {
        run(capsys, "profile", source)
        for source in (place / "recipe.yaml", place / "run", place / "run" / FILE_NAME)
    }
    assert len(outputs) == 1
    lines = outputs.pop().splitlines()
    first, second = lines[2].split(), lines[3].split()
    assert first == ["0", "50.0%", "75.0%", "100.0%", "4.00", "75.0%"]
    assert second[0] == "11" and second[4:] == ["1.00", "0.0%"]
    assert lines[-2] == " 0 █ ▒   ░░" and lines[-1] == "11 ████████"
    (place / "run" / FILE_NAME).write_text("{}")
    assert "holds no rows" in refused(capsys, "profile", place / "run")


def test_a_layer_is_measured_without_its_model(tmp_path: Path) -> None:
    """With the costs of a model's own layer, whatever number of experts that has."""
    import torch

    settings = HybridExpertsSettings(threads=1, store=str(tmp_path))
    costs = calibration.measured_layer(settings, LAYOUT, torch.device("cpu"))
    path = calibration.Calibrations(settings).path
    assert path is not None
    more = WeightLayout(99, 64, 72, "int8")
    found, setting = calibration.find_costs(path, more)
    assert found == costs and setting["device"] == "cpu"
