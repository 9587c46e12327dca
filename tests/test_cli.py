"""The command `kt-sft`: what it says, and what it sets before torch is loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kt_sft
from kt_sft.cli import main

KT_SFT = Path(sys.executable).parent / "kt-sft"


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main(arguments)
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(["--version"], capsys) == f"kt-sft {kt_sft.__version__}\n"


@pytest.mark.parametrize("command", ["train", "chat", "api", "webchat"])
def test_a_missing_recipe_is_named(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = said([command], capsys)
    assert f"usage: kt-sft {command} [-h] recipe [key=value ...]" in text
    assert text.endswith("the following arguments are required: recipe\n")


@pytest.mark.parametrize("command", ["train", "webchat", "pack", "errors", "doctor", "bench layer"])
def test_descriptions_keep_the_capitals_of_names(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said([*command.split(), "--help"], capsys)
    description = re.split(r"\n\n", text)[1]
    assert description[0].isupper() and description.endswith(".")
    assert "llama-factory" not in text and "openai" not in text and "qwen" not in text


def test_waiting_threads_of_torch_sleep() -> None:
    """OpenMP reads its policy when torch loads it, which must not come before it is set."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [str(KT_SFT), "doctor"],
        env={**environment, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1)
    counts = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    assert counts and set(counts) == {"0"}
