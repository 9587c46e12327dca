"""The first fine-tune, as its page has it: every command of it, in order, on a tiny model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pages
import pytest
import yaml
from command_runs import Command, run_together
from llamafactory_runs import effective_workplace

PAGE = pages.ROOT / "docs" / "first-fine-tune.md"


def run(words: list[str], folder: Path, *, fails: bool = False) -> str:
    (code,), text = run_together([Command(words, {"OMP_NUM_THREADS": "1"}, str(folder))], 200)
    assert (code != 0) == fails, text[-5000:]
    return text


def test_the_page_of_a_first_fine_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader does between the commands is done here: naming data, and the chat's recipe."""
    monkeypatch.setenv("KT_SFT_STORE", str(tmp_path / "stores"))
    place = effective_workplace(tmp_path)
    said: dict[str, str] = {}
    lines = [
        line for lang, text in pages.fences(PAGE) if lang == "sh" for line in text.splitlines()
    ]
    assert len(lines) >= 9
    for line in lines:
        command, _, target = line.replace("MODEL", str(place.folder / "model")).partition(" > ")
        words = shlex.split(command)
        if words[1] == "chat":
            _write_chat(tmp_path)
            assert "first_chat.yaml" in said_of_page()
            continue  # needs a person; its recipe is what the test of the recipes runs
        if words[0] == "llamafactory-cli":
            _name_data(tmp_path, place.folder)
        output = run(words, tmp_path)
        said[" ".join(words[:2])] = output
        if target:
            (tmp_path / target).write_text(output[output.index("{") :])
    assert (tmp_path / "outputs" / "first" / "adapter_model.safetensors").is_file()
    assert "Loss by step" in (tmp_path / "outputs" / "first" / "report.html").read_text()
    assert (tmp_path / "outputs" / "first-vllm" / "adapter_config.json").is_file()
    assert '"kt_sft"' in (tmp_path / "kt_sft.schema.json").read_text()
    assert re.search(r"^fits$", said["kt-sft plan"], re.MULTILINE)


def said_of_page() -> str:
    return PAGE.read_text()


def _name_data(folder: Path, place: Path) -> None:
    """As the page says, and as little of it as is enough."""
    recipe = yaml.safe_load((folder / "first.yaml").read_text())
    recipe |= {
        "dataset": "sft", "dataset_dir": str(place / "data"), "max_steps": 2, "logging_steps": 1,
        "gradient_accumulation_steps": 1, "cutoff_len": 64, "use_cpu": True, "bf16": False,
    }  # fmt: skip
    recipe["kt_sft"]["threads"] = 1
    (folder / "first.yaml").write_text(yaml.safe_dump(recipe))


def _write_chat(folder: Path) -> None:
    recipe = yaml.safe_load((folder / "first.yaml").read_text())
    kept = {key: recipe[key] for key in ("model_name_or_path", "template", "kt_sft")}
    chat = {**kept, "adapter_name_or_path": "outputs/first", "finetuning_type": "lora"}
    (folder / "first_chat.yaml").write_text(yaml.safe_dump(chat))
