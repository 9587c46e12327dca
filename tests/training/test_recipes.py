"""Every recipe that is shipped, tried as a tiny twin: its own lines, a small model of its family.

What is changed is where things lie and how much is done; everything else is what a person gets. The
headers' numbers are what `kt-sft plan` says of the published model.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from children import finish
from command_runs import Command, run_together
from llamafactory_runs import run
from recipe_runs import Recipe
from safetensors.torch import load_file
from test_images import make_place
from tiny_configs import TINY_FAMILIES
from tiny_models import make_dataset, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "forecast"))
import golden_plans

from kt_sft.cli.plan import question_of
from kt_sft.config import shipped_folder
from kt_sft.forecast.forecast import FITS, ask

FOLDER = shipped_folder() / "recipes"
# What a template's words take beyond the tokenizer's own entries.
_ROOM = 400


@dataclass(frozen=True)
class Twin:
    """family: of tests/tiny_configs. published: the configuration of the real model."""

    family: str
    published: str
    changes: dict[str, Any] = field(default_factory=dict)


TWINS = {
    "deepseek_v2_lite_lora": Twin("deepseek_v2", "DeepSeek-V2-Lite"),
    "deepseek_v3_fp8_lora": Twin("deepseek_v3", "DeepSeek-V3"),
    "deepseek_v3_small_gpu_lora": Twin("deepseek_v3", "DeepSeek-V3"),
    "glm_4_5_air_lora": Twin("glm4_moe", "GLM-4.5-Air"),
    "gpt_oss_120b_lora": Twin("gpt_oss", "gpt-oss-120b"),
    "kimi_k2_lora": Twin("deepseek_v3", "Kimi-K2-Instruct"),
    "mixtral_8x7b_lora": Twin("mixtral", "Mixtral-8x7B-v0.1"),
    "olmoe_lora": Twin("olmoe", "OLMoE-1B-7B-0924"),
    "qwen3_235b_a22b_lora": Twin("qwen3_moe", "Qwen3-235B-A22B"),
    "qwen3_30b_a3b_dpo": Twin("qwen3_moe", "Qwen3-30B-A3B"),
    "qwen3_30b_a3b_kto": Twin("qwen3_moe", "Qwen3-30B-A3B"),
    "qwen3_30b_a3b_lora": Twin("qwen3_moe", "Qwen3-30B-A3B"),
    "qwen3_30b_a3b_pt": Twin("qwen3_moe", "Qwen3-30B-A3B"),
    "qwen3_30b_a3b_zero2": Twin("qwen3_moe", "Qwen3-30B-A3B"),
    "qwen3_5_35b_a3b_lora": Twin("qwen3_5_moe", "Qwen3.5-35B-A3B"),
    "qwen3_vl_30b_a3b_lora": Twin("qwen3_vl_moe", "Qwen3-VL-30B-A3B-Instruct"),
}
# Run with the adapter that the first one's twin has trained.
AFTER = ("qwen3_30b_a3b_eval", "qwen3_30b_a3b_chat", "qwen3_30b_a3b_export")
# Those of `make demo`, which is a test of its own.
DEMO = ("demo", "demo_chat", "demo_predict")
DATASETS = {
    "alpaca_en_demo": "sft", "dpo_en_demo": "pairs", "kto_en_demo": "labelled",
    "c4_demo": "texts", "mllm_demo": "seen",
}  # fmt: skip
WITH_IMAGES = ("qwen3_vl_moe", "qwen3_5_moe")


def content(name: str) -> dict[str, Any]:
    """A recipe as it is shipped."""
    found: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return found


def test_every_recipe_has_a_twin() -> None:
    shipped = {file.stem for file in FOLDER.glob("*.yaml")}
    assert shipped == {*TWINS, *AFTER, *DEMO}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model for each family, once it is asked for."""
    return tmp_path_factory.mktemp("twins")


def place_of(family: str, models: Path) -> Path:
    """The folder of a family's tiny model and of its data."""
    place = models / family
    if place.exists():
        return place
    if family in WITH_IMAGES:
        make_place(place, family)
    else:
        tokenizer = make_tokenizer(place / "model")
        tiny = TINY_FAMILIES[family]
        sizes = {**tiny.config, "vocab_size": len(tokenizer) + _ROOM}
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config = AutoConfig.for_model(tiny.model_type, **{**sizes, **ids})
        AutoModelForCausalLM.from_config(config).save_pretrained(place / "model")
        make_dataset(place / "data")
    if family == "qwen3_5_moe":  # the recipe trains on text
        info = json.loads((place / "data" / "dataset_info.json").read_text())
        make_dataset(place / "data")
        rest = json.loads((place / "data" / "dataset_info.json").read_text())
        (place / "data" / "dataset_info.json").write_text(json.dumps({**rest, **info}))
    return place


def twin_of(name: str, place: Path, out: Path) -> dict[str, Any]:
    """The recipe with what a tiny model and this machine need."""
    recipe = content(name)
    data = {key: DATASETS[recipe[key]] for key in ("dataset", "eval_dataset") if key in recipe}
    section = recipe["kt_sft"]
    if isinstance(section, str):
        section = yaml.safe_load((shipped_folder() / section).read_text())
    recipe |= {
        **data,
        "model_name_or_path": str(place / "model"),
        "dataset_dir": str(place / "data"),
        "output_dir": str(out),
        "cutoff_len": 256,
        "preprocessing_num_workers": 1,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "use_cpu": True,
        "kt_sft": {**section, "threads": 1, "store": "memory"},
    }
    if recipe.get("do_train"):
        recipe |= {"max_steps": 2, "logging_steps": 1, "save_strategy": "no",
                   "gradient_accumulation_steps": 1, "plot_loss": False}  # fmt: skip
    if recipe.get("use_unsloth_gc"):
        # LLaMA-Factory brings hidden states to "cuda", whatever the device is.
        del recipe["use_unsloth_gc"]
    return recipe


def logs(out: Path) -> list[dict[str, Any]]:
    state = json.loads((out / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize("name", [n for n in TWINS if n != "qwen3_30b_a3b_zero2"])
def test_a_twin_trains(name: str, models: Path, tmp_path: Path) -> None:
    place = place_of(TWINS[name].family, models)
    out = models / "qwen3_30b_a3b_lora" if name == "qwen3_30b_a3b_lora" else tmp_path / "out"
    code, text = finish(Recipe(str(tmp_path), twin_of(name, place, out)))
    assert code == 0, text[-6000:]
    losses = [entry["loss"] for entry in logs(out)]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    trained = load_file(out / "adapter_model.safetensors")
    assert any(".experts." in key and "lora_B" in key for key in trained)
    moved = [key for key, value in trained.items() if "lora_B" in key and value.any()]
    assert len(moved) > len(trained) // 4, "LoRA begins with B of zeros"


def test_the_twin_with_ranks_trains(models: Path, tmp_path: Path) -> None:
    place = place_of("qwen3_moe", models)
    recipe = twin_of("qwen3_30b_a3b_zero2", place, tmp_path / "out")
    recipe["deepspeed"] = str(shipped_folder() / recipe["deepspeed"])
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    text = run(
        ["llamafactory-cli", "train", str(file)],
        {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "DS_ACCELERATOR": "cpu"},
        seconds=300,
    )
    assert len(logs(tmp_path / "out")) == 2, text[-3000:]


@pytest.fixture(scope="module")
def adapter(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = models / "qwen3_30b_a3b_lora"
    if not out.exists():
        place = place_of("qwen3_moe", models)
        work = Recipe(
            str(tmp_path_factory.mktemp("adapter")), twin_of("qwen3_30b_a3b_lora", place, out)
        )
        code, text = finish(work)
        assert code == 0, text[-6000:]
    return out


def test_the_twin_of_evaluation(adapter: Path, models: Path, tmp_path: Path) -> None:
    recipe = twin_of("qwen3_30b_a3b_eval", place_of("qwen3_moe", models), tmp_path / "out")
    recipe |= {"adapter_name_or_path": str(adapter), "max_samples": 4, "max_new_tokens": 4}
    code, text = finish(Recipe(str(tmp_path), recipe))
    assert code == 0, text[-6000:]
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert "predict_rouge-1" in results
    answers = (tmp_path / "out" / "generated_predictions.jsonl").read_text().splitlines()
    assert len(answers) == 4
    # What the header says gives the loss.
    recipe |= {"do_predict": False, "predict_with_generate": False, "do_eval": True}
    code, text = finish(Recipe(str(tmp_path), {**recipe, "output_dir": str(tmp_path / "loss")}))
    assert code == 0, text[-6000:]
    results = json.loads((tmp_path / "loss" / "all_results.json").read_text())
    assert results["eval_loss"] > 0


def test_the_twin_of_chat(adapter: Path, models: Path, tmp_path: Path) -> None:
    recipe = content("qwen3_30b_a3b_chat")
    recipe |= {
        "model_name_or_path": str(place_of("qwen3_moe", models) / "model"),
        "adapter_name_or_path": str(adapter), "max_new_tokens": 4,
        "kt_sft": {"threads": 1, "store": "memory"},
    }  # fmt: skip
    file = tmp_path / "chat.yaml"
    file.write_text(yaml.safe_dump(recipe))
    command = Command(["llamafactory-cli", "chat", str(file)], change=_say_hello)
    (code,), text = run_together([command], 120)
    assert code == 0, text[-4000:]
    assert "Assistant:" in text


def _say_hello() -> None:
    import io

    sys.stdin = io.StringIO("hello\nexit\n")


def test_the_twin_of_export(adapter: Path, models: Path, tmp_path: Path) -> None:
    recipe = content("qwen3_30b_a3b_export")
    recipe |= {
        "model_name_or_path": str(place_of("qwen3_moe", models) / "model"),
        "adapter_name_or_path": str(adapter), "export_dir": str(tmp_path / "merged"),
    }  # fmt: skip
    code, text = finish(Recipe(str(tmp_path), recipe, command="export"))
    assert code == 0, text[-4000:]
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize("name", TWINS)
def test_the_header_says_what_the_plan_says(name: str, tmp_path: Path) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    machine = re.search(r"^# Hardware:  planned for (.+)$", text, re.MULTILINE)
    memory = re.search(
        r"^# Memory:    planned: host (\d+) GB(?:, GPU ([\d.]+) GB)?, one process", text, re.M
    )
    speed = re.search(r"^# Speed:     estimated: ([\d,]+) tokens a second", text, re.MULTILINE)
    assert machine and memory and speed
    folder = golden_plans.folder_of(TWINS[name].published, tmp_path)
    recipe = {**content(name), "model_name_or_path": str(folder)}
    forecast = ask(question_of(recipe, FOLDER.parent, machine[1]))
    assert forecast.verdict == FITS
    assert f"{forecast.plan.host_bytes / 1e9:.0f}" == memory[1]
    assert f"{forecast.plan.of('device') / 1e9:.1f}" == (memory[2] or "0.0")
    assert f"{forecast.step.tokens_per_second:,.0f}" == speed[1]


@pytest.mark.parametrize("name", [*TWINS, *AFTER])
def test_a_header_says_what_is_needed(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    head = lines[: lines.index("")]
    assert all(line.startswith("#") and len(line) <= 120 for line in head), head
    said = "\n".join(head)
    assert f"recipes/{name}.yaml" in said and "Run:" in said
    if content(name).get("quantization_bit"):
        assert "quantized" in said
