"""Scripts and targets of make that the pages give: run with the least that they can do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pages
import pytest
from tiny_models import make_model, make_tokenizer

# Arguments with which each is run here; `{...}` are places of the test.
_RUN: dict[str, list[str]] = {
    "device_plan": [],
    "error_table": [],
    "kernel_targets": ["--rounds", "1"],
    "leader_ratio": ["--rounds", "1"],
    "long_sequence": ["--tokens", "2048"],
    "memory_plan": ["--shape", "wide"],
    "quality_table": ["{model}", "{text}", "--tokens", "256", "--context", "64"],
    "split_overhead": ["--rounds", "1", "--tokens", "64"],
    "step_forecast": ["--shape", "few tokens"],
    "step_ratio": ["--tokens", "64", "--layers", "1", "--rounds", "1"],
}
# And those that other tests run.
_ELSEWHERE = {
    "disk_tier": "store/test_disk_tier.py",
    "family_census": "models/test_newest_transformers.py",
    "gpu_check": "accelerator/test_gpu_check.py",
    "upcycle": "models/test_upcycle.py",
}


def given() -> set[str]:
    """Every script that a page names."""
    text = "".join(page.read_text() for page in pages.PAGES)
    return set(re.findall(r"scripts/(\w+)\.py", text)) - {"mutation_check"}


def test_every_script_of_the_pages_is_run() -> None:
    assert given() <= set(_RUN) | set(_ELSEWHERE)
    for script, file in _ELSEWHERE.items():
        assert script in (pages.ROOT / "tests" / file).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("script", _RUN)
def test_a_script_of_the_pages(script: str, tmp_path: Path) -> None:
    # Codes have groups of 128 inputs.
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128}
    tokenizer = make_tokenizer(tmp_path / "model")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    make_model("qwen3_moe", **ids, **sizes).save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 100)
    places = {"model": str(tmp_path / "model"), "text": str(text)}
    words = [word.format(**places) for word in _RUN[script]]
    done = subprocess.run(
        [sys.executable, str(pages.ROOT / "scripts" / f"{script}.py"), *words],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert re.search(r"\d", done.stdout), "it prints numbers"


def test_targets_of_make() -> None:
    """Make finds what each target needs; what they do is what CI does, or takes long."""
    targets = {
        command.split()[1]
        for page in pages.PAGES
        for command in pages.commands(page)
        if command.startswith("make ")
    }
    assert {"demo", "test", "quick", "wheel"} <= targets
    done = subprocess.run(
        ["make", "--dry-run", *sorted(targets)], capture_output=True, text=True, check=False,
        cwd=pages.ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
