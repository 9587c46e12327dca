"""The check for machines with a GPU: every stage runs here, on the simulated device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import gpu_check
from gpu_stages.setting import Setting

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


def test_every_stage_runs(tmp_path: Path) -> None:
    words = ["--device", "simulated", "--small", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert {stage: result["end"] for stage, result in found.items()} == dict.fromkeys(
        gpu_check.LIMITS, "ended"
    )
    compared = [row for result in found.values() for row in result["rows"] if "ok" in row]
    assert len(compared) > 15 and all(row["ok"] for row in compared)
    ours = [row for row in found["layers"]["rows"] if row["case"].startswith("ours")]
    assert all(row["tokens/s"] > 0 and row["mb_down"] > 0 for row in ours)
    # LoRA that stays on the host does not cross the link.
    assert ours[-1]["mb_up"] < 0.5 * ours[0]["mb_up"]
    assert any(row["case"].startswith("weights streamed") for row in found["layers"]["rows"])
    timed = {r["case"]: r for r in found["schedules"]["rows"] if "step_ms" in r}
    assert len(timed) == 8 and all(row["tokens/s"] > 0 for row in timed.values())
    # Streamed weights cross the link twice a step; resident ones do not.
    assert timed["all streamed"]["mb_up"] > timed["all resident"]["mb_up"]
    (link,) = (r for r in found["schedules"]["rows"] if "pinned_gb_per_s" in r)
    assert link["gb_per_s"] > 0
    assert (tmp_path / "trace.json.gz").stat().st_size > 1000
    assert (tmp_path / "results.md").read_text().count("\n## ") == len(gpu_check.LIMITS) - 1
    assert sum(gpu_check.LIMITS.values()) <= 540


def test_rows_stay_when_the_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu_check.LIMITS, "parity", 8)
    assert gpu_check.main(["--only", "parity", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "parity: stopped after 8 s" in capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())["parity"]
    assert found["rows"] == Setting("cpu", tmp_path, small=False).rows_of("parity")


@pytest.mark.parametrize(
    "end, ok, failed",
    [("ended", True, False), ("ended", None, False), ("ended", False, True), ("?", True, True)],
)
def test_what_failed_is_told(end: str, ok: bool | None, failed: bool) -> None:
    rows = [{"case": "a"}, {"case": "b"} if ok is None else {"case": "b", "ok": ok}]
    outcome = gpu_check.Outcome("parity", end, 1.0, rows)
    assert outcome.failed == failed
    assert "| b |" in gpu_check.table(outcome)


def test_a_difference_is_seen() -> None:
    import torch
    from gpu_stages.parity import difference

    want = {"a": torch.ones(4), "b": torch.ones(2)}
    assert difference(want, want) == 0
    assert difference({**want, "b": torch.tensor([1.0, 1.1])}, want) > 0.05
    assert difference({**want, "b": torch.tensor([1.0, float("nan")])}, want) == float("inf")
    assert difference({"a": want["a"]}, want) == float("inf")
