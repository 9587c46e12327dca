"""Running `llamafactory-cli` and `kt-sft` in processes of their own, as a user does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


def _environment(more: dict[str, str] | None) -> dict[str, str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **(more or {})}


def run(
    command: list[str],
    env: dict[str, str] | None = None,
    check: bool = True,
    cwd: Path | None = None,
) -> str:
    """Output of one command of this environment, both streams."""
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        env=_environment(env),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout[-6000:]}")
    return done.stdout


@contextmanager
def serve(command: list[str], env: dict[str, str], port: int) -> Iterator[Path]:
    """Runs a server until the block ends; yields its log once the port answers."""
    with tempfile.NamedTemporaryFile("w", suffix=".log") as sink:
        server = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            env=_environment(env),
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
        log = Path(sink.name)
        try:
            deadline = time.monotonic() + 120
            while not _answers(port):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"{command} does not serve:\n{log.read_text()[-6000:]}")
                time.sleep(0.3)
            yield log
        finally:
            server.terminate()
            server.wait(timeout=30)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


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
