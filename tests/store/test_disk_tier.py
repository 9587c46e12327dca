"""A training with half of the memory that its experts take."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from disk_tier import memory_limit

SCRIPT = Path(__file__).parents[2] / "scripts" / "disk_tier.py"


def has_groups() -> bool:
    """Whether this user may limit memory here."""
    try:
        with memory_limit(1 << 30):
            return True
    except OSError:
        return False


@pytest.mark.slow
def test_a_model_larger_than_memory_trains(tmp_path: Path) -> None:
    """The losses are those with enough memory, though most weights come from the disk each time."""
    if not has_groups():
        pytest.skip("no control groups for this user")
    words = [sys.executable, str(SCRIPT), "--folder", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "losses are the same" in done.stdout
    experts, limit = map(
        float, re.findall(r"experts ([\d.]+) GB, limit ([\d.]+) GB", done.stdout)[0]
    )
    assert experts > 2 * limit
    read = re.findall(r"\| limited, reading ahead \| [\d.]+ \| ([\d.]+)", done.stdout)
    # Forward, forward again and backward: what memory cannot hold comes at least twice.
    assert float(read[0]) > experts - limit
