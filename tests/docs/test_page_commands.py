"""The first fine-tune, as its page has it: every command of it, in order, on a tiny model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

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


# What stands in a command of the pages, and what it is here; `{...}` are places of the fixture.
_HERE = {
    "MODEL": "{model}", "Qwen/Qwen3-30B-A3B": "{model}", "ADAPTER": "{run}",
    "saves/adapter": "{run}", "FIRST,SECOND": "{run},{run}", "RECIPE": "{recipe}",
    "recipe.yaml": "{recipe}", "first.yaml": "{recipe}", "my.yaml": "{recipe}",
    "recipes/qwen3_30b_a3b_lora.yaml": "{recipe}", "RUN": "{run}", "outputs/first": "{run}",
    "outputs/my": "{run}", "FILE": "{text}", "DIR": "{new}", "saves/adapter-vllm": "{new}",
    "outputs/first-vllm": "{new}", "PROGRAM": "vllm", "T": "8", "C": "exact", "PEER": "torch",
}  # fmt: skip
_TINY_LAYER = [
    *("--hidden", "64", "--intermediate", "64", "--experts", "4", "--top-k", "2", "--rounds", "1"),
]
# Not run here, and where what they do is tested.
_ELSEWHERE = {
    "chat": "needs a person: tests/training/test_recipes.py",
    "api": "serves for ever: tests/training/test_llamafactory.py",
    "sweep": "takes minutes: tests/bench",
    "kt-kernel": "needs an environment of its own: tests/bench",
    "--explain": "needs an accelerator or its calibration: tests/scheduling",
    "demo": "downloads a model: make demo",
}


_ALONE = ("kt-sft doctor", "kt-sft schema", "kt-sft bench peak")


def given() -> list[str]:
    """Every command of kt-sft and llamafactory-cli that a page gives, once."""
    found = {}
    for page in pages.PAGES:
        for command in pages.commands(page):
            plain = re.split(r"\s[>&]", re.sub(r"\s*\[[^\]]*\]", "", command))[0].strip()
            words = shlex.split(plain)
            named = all(re.fullmatch(r"[a-z]+", word) for word in words[1:])
            partial = re.search(r"[|()]|\.\.\.|--to \w+$", plain)
            ours = words[0] in ("kt-sft", "llamafactory-cli") and not partial
            # What is only named is run where it needs nothing more.
            if ours and (not named or plain in _ALONE):
                found[plain] = None
    return [c for c in found if not any(word in _ELSEWHERE for word in shlex.split(c))]


@pytest.fixture(scope="module")
def stands_for(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model, a recipe, a run of it, a text and the file of packed experts."""
    folder = tmp_path_factory.mktemp("commands")
    place = effective_workplace(folder)
    section = {"weights": "int8", "threads": 1, "store": str(folder / "stores")}
    recipe = place.recipe("run", kt_sft=section, max_steps=1)
    place.train("run", kt_sft=section, max_steps=1)
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    (store,) = (folder / "stores").glob("*.safetensors")
    return {
        "model": str(folder / "model"), "recipe": str(recipe), "run": str(folder / "run"),
        "text": str(text), "store": str(store),
    }  # fmt: skip


def _marked(command: str) -> Any:
    """Exports and measurements have tests of their own; with those of the pages CI takes longer."""
    often = command.startswith(("kt-sft export", "kt-sft bench", "kt-sft errors", "kt-sft pack"))
    return pytest.param(command, marks=pytest.mark.slow) if often else command


@pytest.mark.parametrize("command", map(_marked, given()))
def test_a_command_of_the_pages(
    command: str, stands_for: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KT_SFT_STORE", str(tmp_path / "stores"))
    places = {**stands_for, "new": str(tmp_path / "new")}
    if "--verify" in command:
        places["text"] = places["store"]
    words = [_HERE.get(word, word).format(**places) for word in shlex.split(command)]
    if words[1:3] == ["bench", "layer"]:
        words += _TINY_LAYER
    if words[:2] == ["kt-sft", "errors"]:
        words += ["--weights", "bf16", "int8"] + (["--context", "64"] if "--text" in words else [])
    if words[1] == "init":
        words = [*words[:3], "--out", "made.yaml"]
    if words[:2] == ["llamafactory-cli", "export"]:
        words[2] = _export(Path(words[2]), tmp_path, places["run"])
    if words[1] == "train":
        words += [f"output_dir={tmp_path / 'trained'}"]
    run(words, tmp_path)


def _export(recipe: Path, folder: Path, adapter: str) -> str:
    found = yaml.safe_load(recipe.read_text())
    kept = {key: found[key] for key in ("model_name_or_path", "template", "kt_sft")}
    file = folder / "export.yaml"
    merged = {"finetuning_type": "lora", "export_dir": str(folder / "merged")}
    file.write_text(yaml.safe_dump({**kept, **merged, "adapter_name_or_path": adapter}))
    return str(file)


def test_pages_give_commands() -> None:
    assert len(given()) > 20
