"""Running `llamafactory-cli` and `kt-sft`: in processes of their own, as a user does, or forked."""

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

import psutil
import torch
import yaml
from command_runs import Command, run_together
from tiny_models import make_dataset, make_model, make_tokenizer, take_effective_weights
from transformers import AutoModelForCausalLM

from kt_sft import HybridExpertsConfig

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


def environment(more: dict[str, str] | None) -> dict[str, str]:
    """The variables of a child process."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **(more or {})}


def run(
    command: list[str],
    env: dict[str, str] | None = None,
    check: bool = True,
    cwd: Path | None = None,
    seconds: float = 600,
) -> str:
    """Output of one command of this environment, both streams; it is killed when it hangs."""
    process = subprocess.Popen(
        [str(BIN / command[0]), *command[1:]],
        env=environment(env),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        # torchrun gives its ranks sessions of their own: a group would not reach them.
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
        output, _ = process.communicate()
        raise AssertionError(f"{command} hangs:\n{output[-6000:]}") from None
    if check and process.returncode:
        raise AssertionError(f"{command} ended with {process.returncode}:\n{output[-6000:]}")
    return output


@contextmanager
def serve(command: list[str], env: dict[str, str], port: int) -> Iterator[Path]:
    """Runs a server until the block ends; yields its log once the port answers."""
    with tempfile.NamedTemporaryFile("w", suffix=".log") as sink:
        server = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            env=environment(env),
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


def run_forked(
    words: list[str],
    env: dict[str, str] | None = None,
    check: bool = True,
    cwd: Path | None = None,
    seconds: float = 120,
) -> str:
    """As `run`, in a child that need not start."""
    command = Command(words, {"OMP_NUM_THREADS": "1", **(env or {})}, cwd and str(cwd))
    (code,), text = run_together([command], seconds)
    if check and code:
        raise AssertionError(f"{words} ended with {code}:\n{text[-6000:]}")
    return text


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
        self,
        name: str,
        env: dict[str, str] | None = None,
        check: bool = True,
        **settings: Any,
    ) -> str:
        """One `llamafactory-cli train`, forked."""
        return run_forked(
            ["llamafactory-cli", "train", str(self.recipe(name, **settings))], env, check
        )

    def train_by_command(
        self,
        name: str,
        env: dict[str, str] | None = None,
        check: bool = True,
        **settings: Any,
    ) -> str:
        """One `llamafactory-cli train`, started as a user does."""
        return run(["llamafactory-cli", "train", str(self.recipe(name, **settings))], env, check)

    def logs(self, name: str) -> list[dict[str, Any]]:
        """The training entries of a run's log history."""
        state = json.loads((self.folder / name / "trainer_state.json").read_text())
        return [entry for entry in state["log_history"] if "loss" in entry]

    def losses(self, name: str) -> list[float]:
        """The training losses of a run."""
        return [entry["loss"] for entry in self.logs(name)]


def effective_workplace(folder: Path) -> Workplace:
    """With a model in fp32 whose experts are exactly what int8 storage makes of them.

    Quantizing them again changes nothing, so the stock path trains the same function.
    """
    tokenizer = make_tokenizer(folder / "model")
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    stock = make_model("qwen3_moe", **special)
    stock.save_pretrained(folder / "raw")
    hybrid = AutoModelForCausalLM.from_pretrained(
        folder / "raw", quantization_config=HybridExpertsConfig(), dtype=torch.float32
    )
    take_effective_weights(stock, hybrid)
    stock.save_pretrained(folder / "model")
    make_dataset(folder / "data")
    return Workplace(folder)
