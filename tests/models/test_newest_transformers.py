"""The families' tests on the newest Transformers that the registry gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def newest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose Transformers is the newest; torch and PEFT are the installed ones."""
    folder = tmp_path_factory.mktemp("newest")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    subprocess.run([*install, "huggingface-hub", "tokenizers", "safetensors"], check=True)
    subprocess.run([*install, "--no-deps", "transformers"], check=True)
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.mark.slow
def test_families_on_the_newest_transformers(newest: dict[str, str]) -> None:
    tests = [str(_HERE / name) for name in ("test_families.py", "test_census.py")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env=newest,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    census = _HERE.parents[1] / "scripts" / "family_census.py"
    table = subprocess.run(
        [sys.executable, str(census)], env=newest, capture_output=True, text=True, check=True
    ).stdout
    assert "| qwen3_moe | covered |" in table
    sys.stdout.write(table)
