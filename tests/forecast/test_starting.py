"""`kt-sft init`, `schema` and `completion`: what they write is right, and takes effect."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import golden_plans
import pytest
import yaml
from llamafactory.data.template import TEMPLATES

from kt_sft.cli import main
from kt_sft.cli.schema import recipe_schema, section_schema
from kt_sft.config import HybridExpertsSettings, choices, shipped_folder
from kt_sft.errors import SettingsError
from kt_sft.plugin import templates
from kt_sft.plugin.templates import template_of

SMALL = "2x64 cores amx, 512 GB, 24 GB gpu"


def made(tmp_path: Path, model: str, *words: str) -> tuple[str, dict[str, Any]]:
    """The text and the content of a recipe."""
    out = tmp_path / f"{model}.yaml"
    folder = golden_plans.folder_of(model, tmp_path)
    assert main(["init", str(folder), "--out", str(out), "--machine", SMALL, *words]) == 0
    return out.read_text(), yaml.safe_load(out.read_text())


# In CI those that differ most: formats, sizes, a vision tower.
_OFTEN = ("DeepSeek-V3", "Kimi-K2-Instruct", "Qwen3-30B-A3B", "Qwen3.5-35B-A3B", "gpt-oss-120b")


@pytest.mark.parametrize(
    "model",
    [
        name if name in _OFTEN else pytest.param(name, marks=pytest.mark.slow)
        for name in golden_plans.models()
    ],
)
def test_a_recipe_fits_what_it_was_made_for(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if model == "Kimi-K2-Instruct":  # a terabyte: no settings are enough
        folder = golden_plans.folder_of(model, tmp_path)
        out = str(tmp_path / "made.yaml")
        smaller = "16 cores avx512_vnni, 32 GB, 8 GB gpu"
        assert main(["init", str(folder), "--out", out, "--machine", smaller]) == 2
        assert "does not fit '16 cores avx512" in capsys.readouterr().err
        assert not Path(out).exists()
        return
    text, recipe = made(tmp_path, model)
    assert main(["plan", str(tmp_path / f"{model}.yaml"), "--machine", SMALL]) == 0
    plan = capsys.readouterr().out
    # What the header says is what the plan says.
    together = next(line for line in plan.splitlines() if line.startswith("  together"))
    host, device = (float(word) for word in together.split() if word[0].isdigit())
    assert f"planned: host {host:.0f} GB, accelerator {device:.1f} GB" in text
    assert recipe["template"] in TEMPLATES or recipe["template"] == "default"
    assert "template: default" not in text or model in ("Mixtral-8x7B-v0.1", "OLMoE-1B-7B-0924",
                                                        "DeepSeek-V2-Lite")  # fmt: skip


def test_what_a_small_machine_needs_is_written(tmp_path: Path) -> None:
    _, recipe = made(tmp_path, "DeepSeek-V3")
    assert recipe["quantization_bit"] == 4 and recipe["kt_sft"] == {"weights": "int4"}
    _, plain = made(tmp_path, "Qwen3-30B-A3B")
    assert "quantization_bit" not in plain and plain["kt_sft"] == {"weights": "int8"}


@pytest.mark.parametrize("goal", ["sft", "dpo", "kto", "pt"])
def test_goals(goal: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, recipe = made(tmp_path, "Qwen3-30B-A3B", "--goal", goal, "--rank", "4", "--length", "512")
    assert (recipe["stage"], recipe["lora_rank"], recipe["cutoff_len"]) == (goal, 4, 512)
    assert ("template" in recipe) == (goal != "pt")
    assert "--rank 4" in text.splitlines()[2], "the header says how it was made"
    assert recipe["per_device_train_batch_size"] == 1, "of pairs, where there are pairs"
    assert main(["plan", str(tmp_path / "Qwen3-30B-A3B.yaml"), "--machine", SMALL, "--json"]) == 0
    host = json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))["host_bytes"]
    assert f"planned: host {host / 1e9:.0f} GB" in text


def test_a_file_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there.yaml").write_text("mine")
    words = ["init", "nowhere", "--out", str(tmp_path / "there.yaml")]
    assert main(words) == 2
    assert "is there; give another name, or --force" in capsys.readouterr().err
    assert (tmp_path / "there.yaml").read_text() == "mine"
    assert main(["init", "nowhere", "--rank", "0", "--out", str(tmp_path / "x.yaml")]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_templates_are_those_of_llamafactory() -> None:
    assert set(templates._BY_TYPE.values()) <= set(TEMPLATES)
    assert template_of("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3_moe") == "qwen3_nothink"
    assert template_of("/models/Qwen3-30B-A3B", "qwen3_moe") == "qwen3"
    assert template_of("/models/mine", "kimi_k2") == "moonlight"
    assert template_of("mistralai/Mixtral-8x7B-v0.1", "mixtral") is None
    assert template_of("/models/mine", "unheard_of") is None


def test_kimi_gets_its_own_template(tmp_path: Path) -> None:
    """Its type is read as DeepSeek-V3's, whose template is another one."""
    (tmp_path / "mine").mkdir()
    published = golden_plans.HERE / "published" / "Kimi-K2-Instruct.json"
    (tmp_path / "mine" / "config.json").write_text(published.read_text())
    out = tmp_path / "kimi.yaml"
    machine = "2x64 cores amx, 2 TB, 80 GB gpu"
    assert main(["init", str(tmp_path / "mine"), "--out", str(out), "--machine", machine]) == 0
    assert yaml.safe_load(out.read_text())["template"] == "moonlight"


def test_the_schema_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(recipe_schema()))
    properties = section_schema()["properties"]
    assert set(properties) == {field.name for field in fields(HybridExpertsSettings)}
    plain = HybridExpertsSettings().as_dict()
    for name, described in properties.items():
        assert len(described["description"]) > 20, name
        default = described["default"]
        assert (tuple(default) if isinstance(default, list) else default) == plain[name]
    for name, offers in choices().items():
        assert properties[name]["enum"] == list(offers)
        for value in offers:
            try:
                HybridExpertsSettings(**{name: value})
            except SettingsError as error:  # for what it does not go together with
                assert f"{name}: got {value!r}, expected" not in str(error)


def test_shipped_settings_are_of_the_schema() -> None:
    properties = section_schema()["properties"]
    files = sorted((shipped_folder() / "configs").glob("*.yaml"))
    assert len(files) >= 5
    for file in files:
        for name, value in yaml.safe_load(file.read_text()).items():
            assert value in properties[name].get("enum", [value]), file


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    words = ("doctor", "plan") if shell == "tcsh" else ("doctor", "plan", "--machine", "layer")
    assert all(word in script for word in words)
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        assert subprocess.run([shell, "-n", str(tmp_path / "script")]).returncode == 0
