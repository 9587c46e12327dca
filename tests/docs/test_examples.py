"""The programs of examples/, as a person starts them, on a tiny model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pages
import pytest
from llamafactory_runs import environment
from tiny_models import make_model, make_tokenizer

EXAMPLES = pages.ROOT / "examples"


def run(name: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *words],
        env=environment({"CUDA_VISIBLE_DEVICES": ""}),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("example") / "model"
    tokenizer = make_tokenizer(folder)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    make_model("qwen3_moe", **ids).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the first example, whose loss falls."""
    out = tmp_path_factory.mktemp("adapter")
    said = run("trainer_alone", model, "--out", str(out), "--steps", "6")
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", said)]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert (out / "report.html").is_file()
    return out


def test_a_trainer_alone(adapter: Path) -> None:
    assert (adapter / "adapter_model.safetensors").is_file()


def test_trl(model: str, tmp_path: Path) -> None:
    said = run("trl_sft", model, "--out", str(tmp_path), "--steps", "4")
    assert said.count("mean_token_accuracy") == 4
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_model_in_memory(model: str) -> None:
    said = run("hybridize_loaded_model", model)
    apart = re.search(r"int8: logits differ by ([\d.]+)%", said)
    assert apart and 0 < float(apart[1]) < 5


def test_an_adapter_in_stock_peft(model: str, adapter: Path, tmp_path: Path) -> None:
    said = run("adapter_to_peft", model, str(adapter), "--out", str(tmp_path / "peft"))
    apart = re.search(r"differ by ([\d.]+)%", said)
    assert apart and float(apart[1]) < 2


def test_a_prefix_is_read_once(model: str, adapter: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "prefix.txt"
    prefix.write_text("the quick brown fox jumps over the lazy dog " * 4)
    words = ["--prefix", str(prefix), "--prompt", "the fox", "--prompt", "a dog", "--tokens", "8"]
    said = run("prefix_cache", model, "--adapter", str(adapter), *words)
    assert said.count("whose answer is the same") == 2, said


def test_an_adapter_for_vllm(model: str, adapter: Path, tmp_path: Path) -> None:
    said = run("serve_with_vllm", model, str(adapter), "--out", str(tmp_path / "vllm"))
    assert "vllm serve" in said
    assert (tmp_path / "vllm" / "adapter_config.json").is_file()


def test_the_list_is_whole() -> None:
    text = (EXAMPLES / "README.md").read_text()
    assert {f.name for f in EXAMPLES.glob("*.py")} == set(re.findall(r"\]\((\w+\.py)\)", text))
