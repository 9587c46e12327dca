"""Running `llamafactory-cli` and `kt-sft` in processes of their own, as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

BIN = Path(sys.executable).parent

RECIPE: dict[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_target": "all",
    "lora_rank": 4,
    "dataset": "sft",
    "template": "qwen3_nothink",
    "cutoff_len": 64,
    "preprocessing_num_workers": 1,
    "dataloader_num_workers": 0,
    "overwrite_output_dir": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "per_device_train_batch_size": 4,
    "learning_rate": 2.0e-3,
    "max_steps": 6,
    "use_cpu": True,
    "seed": 7,
}


def run(command: list[str], env: dict[str, str] | None = None, check: bool = True) -> str:
    """Output of one command of this environment, both streams."""
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        env={
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            **(env or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout[-6000:]}")
    return done.stdout


class Workplace:
    """A folder with a model and data, where recipes are written and run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def recipe(self, name: str, **settings: Any) -> Path:
        """Writes a recipe; a setting of None removes the default."""
        values = {
            **RECIPE,
            "model_name_or_path": str(self.folder / "model"),
            "dataset_dir": str(self.folder / "data"),
            "output_dir": str(self.folder / name),
            **settings,
        }
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
        return file

    def train(
        self, name: str, env: dict[str, str] | None = None, check: bool = True, **settings: Any
    ) -> str:
        """One `llamafactory-cli train`."""
        recipe = self.recipe(name, **settings)
        return run(["llamafactory-cli", "train", str(recipe)], env, check)

    def logs(self, name: str) -> list[dict[str, Any]]:
        """The training entries of a run's log history."""
        state = json.loads((self.folder / name / "trainer_state.json").read_text())
        return [entry for entry in state["log_history"] if "loss" in entry]

    def losses(self, name: str) -> list[float]:
        """The training losses of a run."""
        return [entry["loss"] for entry in self.logs(name)]
