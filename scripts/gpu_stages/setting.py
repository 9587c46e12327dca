"""Where a stage runs, and where its rows go."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# "ok" of a row is the result of a comparison; without it the row only measures.
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """The device, the folder of the results, and whether sizes are those of a test."""

    device: str
    out: Path
    small: bool

    def words(self) -> list[str]:
        """For the command line of a stage."""
        device = ["--device", self.device] if self.device else []
        return [*device, "--out", str(self.out), *(["--small"] if self.small else [])]

    def begin(self, stage: str) -> None:
        """In the process of a stage, before torch is used."""
        self._rows(stage).write_text("")
        os.environ["KT_SFT_GPU_STAGE"] = stage
        prepare(self.place())

    def place(self) -> str:
        """The device's type: the given one, or what torch finds."""
        if self.device:
            return self.device
        import torch

        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        return found.type if found is not None else "cpu"

    def _rows(self, stage: str) -> Path:
        return self.out / f"{stage}.jsonl"

    def say(self, **row: Any) -> None:
        """A row, at once."""
        with self._rows(os.environ["KT_SFT_GPU_STAGE"]).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows_of(self, stage: str) -> list[Row]:
        """What a stage has said."""
        path = self._rows(stage)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def prepare(device: str) -> None:
    """Loads the simulated device; turns off what makes fp32 on a GPU less exact than on the CPU."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if device == "simulated":
        sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "accelerator"))
        from simulated_device import SimulatedDevice

        SimulatedDevice.for_trainers()
