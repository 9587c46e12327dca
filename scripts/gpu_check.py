"""Checks and measures hybrid experts on a machine with an accelerator; a table after each stage.

    python scripts/gpu_check.py [--device cuda] [--only STAGE ...] [--out FOLDER] [--small]

The worthiest stages come first, each in a process of its own with a limit of time, nine minutes at
most together: parity (families against the CPU), recipe (LLaMA-Factory against itself on the CPU),
schedules (experts on the host, on the device and parted), layers (speed of Qwen3-30B-A3B's shape,
beside streaming the weights to the device) and host (instruction sets, kernels, speed of the CPU).
What a stage found stays when its time is up. The exit status is 1 where a comparison failed or a
stage did not end.

`--device simulated` is that of tests/accelerator, `--small` shrinks everything: for the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_stages.setting import Row, Setting

# Seconds that each stage may take, in their order.
LIMITS = {"parity": 100, "recipe": 100, "schedules": 150, "layers": 90, "host": 90}


@dataclass
class Outcome:
    """What a stage found, and what became of it: ended, its exit status, or time is up."""

    stage: str
    end: str
    seconds: float
    rows: list[Row]

    @property
    def failed(self) -> bool:
        """Whether it did not end, or a comparison in it failed."""
        return self.end != "ended" or any(row.get("ok") is False for row in self.rows)


def run_stage(stage: str, setting: Setting) -> Outcome:
    """In a process of its own, whose output goes to `<stage>.log`."""
    words = [sys.executable, __file__, "--stage", stage, *setting.words()]
    start = time.monotonic()
    with (setting.out / f"{stage}.log").open("w") as log:
        # A session of its own, so that what the stage has started ends with it.
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(LIMITS[stage])
            end = "ended" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            end = f"stopped after {LIMITS[stage]} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(stage, end, round(time.monotonic() - start, 1), setting.rows_of(stage))


def table(outcome: Outcome) -> str:
    """Markdown: a line for each row; a new head where the columns change."""
    lines = [f"## {outcome.stage}: {outcome.end}, {outcome.seconds} s"]
    columns: list[str] = []
    for row in outcome.rows:
        if list(row) != columns:
            columns = list(row)
            lines += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines.append(f"| {' | '.join(str(v).replace('|', '/') for v in row.values())} |")
    return "\n".join(lines) + "\n"


def write(outcomes: Sequence[Outcome], out: Path) -> None:
    """results.md and results.json with what there is so far."""
    (out / "results.md").write_text("\n".join(table(o) for o in outcomes))
    found = {o.stage: {"end": o.end, "seconds": o.seconds, "rows": o.rows} for o in outcomes}
    (out / "results.json").write_text(json.dumps(found, indent=1))


def main(argv: Sequence[str] | None = None) -> int:
    """1 where a comparison failed or a stage did not end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="", help="default: what torch finds, or cpu")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--out", type=Path, default=Path("gpu_check"))
    parser.add_argument("--small", action="store_true", help="sizes that prove nothing")
    parser.add_argument("--stage", choices=LIMITS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(arguments.device, arguments.out.resolve(), arguments.small)
    if arguments.stage:
        setting.begin(arguments.stage)
        importlib.import_module(f"gpu_stages.{arguments.stage}").run(setting)
        return 0
    outcomes: list[Outcome] = []
    for stage in arguments.only:
        outcomes.append(run_stage(stage, setting))
        write(outcomes, setting.out)
        sys.stdout.write(table(outcomes[-1]) + "\n")
        if outcomes[-1].end != "ended":
            sys.stdout.write((setting.out / f"{stage}.log").read_text()[-2000:] + "\n")
        sys.stdout.flush()
    return 1 if any(o.failed for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
