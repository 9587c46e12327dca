"""The documentation says what there is: its links, names of settings and errors, and its tables."""

from __future__ import annotations

import argparse
import inspect
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pages
import pytest
from llamafactory.hparams import (
    DataArguments,
    FinetuningArguments,
    GeneratingArguments,
    ModelArguments,
    TrainingArguments,
)

from kt_sft import errors
from kt_sft.cli.main import whole_parser
from kt_sft.config import HybridExpertsSettings, shipped_folder

DOCS = pages.ROOT / "docs"
_LLAMAFACTORY = {
    field.name
    for kind in (
        ModelArguments, DataArguments, TrainingArguments, FinetuningArguments, GeneratingArguments
    )
    for field in fields(kind)
}  # fmt: skip
_OURS = {field.name for field in fields(HybridExpertsSettings)}


def name_of(page: Path) -> str:
    return str(page.relative_to(pages.ROOT))


@pytest.mark.parametrize("page", pages.PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in pages.links(page):
        path, _, anchor = target.partition("#")
        found = page if not path else (page.parent / path).resolve()
        assert found.exists(), target
        if anchor:
            assert anchor in pages.anchors(found), target


def test_every_error_has_its_entry() -> None:
    kinds = {
        name for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, errors.KtSftError)
    }  # fmt: skip
    text = (DOCS / "troubleshooting.md").read_text()
    entries = set(re.findall(r"^### (\w+)$", text, re.MULTILINE))
    assert entries == kinds
    for name in entries:
        body = text.partition(f"### {name}\n")[2].partition("\n#")[0].strip()
        assert len(body) > 60, name


def test_settings_to_migrate_to_exist() -> None:
    """Every key on the right of the tables is LLaMA-Factory's or the section's."""
    checked = 0
    for line in (DOCS / "migrating.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| ") or len(cells) != 2:
            continue
        for code in re.findall(r"`([^`]+)`", cells[1]):
            key = code.partition(":")[0]
            if key.startswith("kt_sft."):
                assert key.removeprefix("kt_sft.") in _OURS, code
            elif re.fullmatch(r"[a-z_]+", key) and (":" in code or "_" in key):
                known = key in _LLAMAFACTORY or f"{key}:" in cells[1].replace(code, "")
                value = key in _VALUES or key.endswith("_proj")
                assert known or value, code
            checked += 1
    assert checked > 60


# Values and files that stand alone between backticks.
_VALUES = {"dataset_info", "kt_sft"}


def test_every_recipe_is_in_the_table() -> None:
    text = (DOCS / "recipes.md").read_text()
    rows = dict(re.findall(r"^\| \[(\w+)\.yaml\]\([^)]*\) \| (.+) \|$", text, re.MULTILINE))
    shipped = {f.stem for f in (shipped_folder() / "recipes").glob("*.yaml")}
    assert set(rows) == {name for name in shipped if not name.startswith("demo")}
    for name, row in rows.items():
        head = (shipped_folder() / "recipes" / f"{name}.yaml").read_text()
        _, hardware, memory, speed = (cell.strip() for cell in row.split(" | "))
        if hardware != "-":
            assert f"planned for {hardware}\n" in head
            assert f"planned: {memory}, one process" in head
            assert f"estimated: {speed} tokens a second" in head


# What stands in commands for something else.
_PLACEHOLDERS = {"PROGRAM": "vllm", "PEER": "torch", "T": "8", "C": "exact", "I": "auto"}


def parsed(command: str) -> None:
    """Raises where the parser does not take a command, or does not know what is only named."""
    plain = re.sub(r"\[[^\]]*\]", "", command)
    words = [_PLACEHOLDERS.get(word, word) for word in shlex.split(plain)[1:]]
    if all(re.fullmatch(r"[a-z]+", word) for word in words):
        with pytest.raises(SystemExit, match="0"):  # named, not given
            whole_parser().parse_args([*words, "--help"])
    else:
        whole_parser().parse_args(words)


@pytest.mark.parametrize("page", pages.PAGES, ids=name_of)
def test_commands_can_be_given(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands of ours are parsed; recipes, scripts and targets of make are there."""

    def fails(parser: argparse.ArgumentParser, message: str) -> None:
        raise AssertionError(message)

    monkeypatch.setattr(argparse.ArgumentParser, "error", fails)
    makefile = (pages.ROOT / "Makefile").read_text()
    for command in pages.commands(page):
        program, *words = shlex.split(command)
        if program == "kt-sft":
            # Several commands in one, or less than one, are not written to be given.
            if not re.search(r"[|()]|\.\.\.|--to \w+$", command):
                parsed(re.split(r"\s[>&]", command)[0])
        elif program == "make":
            for target in (word for word in words if "=" not in word):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), command
        elif program == "python":
            assert (pages.ROOT / words[0]).is_file(), command
        elif words[1:] and words[1].startswith("recipes/"):
            assert (pages.ROOT / words[1]).is_file(), command


def test_a_wrong_command_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(parser: argparse.ArgumentParser, message: str) -> None:
        raise AssertionError(message)

    monkeypatch.setattr(argparse.ArgumentParser, "error", fails)
    for command in ("kt-sft plans", "kt-sft plan --modle X", "kt-sft export A --to moon --out B"):
        with pytest.raises(AssertionError):
            parsed(command)
