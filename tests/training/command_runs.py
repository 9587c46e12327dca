"""`llamafactory-cli` and its ranks as children of the fork server, which has imported everything.

Such a child is the command without its start: the same function, arguments, environment, folder and
report of an error. What a start does (loading the plug-in with torch, variables that are read then,
torchrun) is tested with commands of `llamafactory_runs`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess

import llamafactory.hparams.parser as parser
import llamafactory.launcher as launcher
import llamafactory.train.tuner as tuner
import torch
from children import output, own_folder, start
from transformers import Trainer

from kt_sft.cli import main as kt_sft_main
from kt_sft.training.report import RunReport


def _rank() -> None:
    """What torchrun starts for each rank: launcher.py with a recipe."""
    tuner.run_exp()


# By the name of the program, the first of its words.
_PROGRAMS: dict[str, Callable[[], object]] = {
    "llamafactory-cli": launcher.launch,
    "launcher.py": _rank,
    "kt-sft": kt_sft_main,
}


@dataclass
class Command:
    """What a child does: the program that its first word names, as from a shell."""

    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    cwd: str | None = None
    change: Callable[[], None] | None = None
    folder: str = field(default_factory=own_folder)

    def __call__(self) -> None:
        os.environ.update(self.environment)
        if self.cwd is not None:
            os.chdir(self.cwd)
        sys.argv = list(self.words)
        torch.set_num_threads(1)
        assert hasattr(parser._parse_args, "kt_sft_stock"), "the plug-in is not loaded"
        if self.change is not None:
            self.change()
        try:
            code = _PROGRAMS[self.words[0]]()
        except Exception:
            # As the interpreter does; multiprocessing would not ask the hook.
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.exit(code)


def free_port() -> int:
    """Of this machine, for a meeting or a server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ranks_of(
    recipes: Sequence[str],
    per_machine: int,
    changes: Mapping[int, Callable[[], None]] | None = None,
) -> list[Command]:
    """The commands of a run's ranks with the variables of torchrun, a recipe for each rank."""
    world = len(recipes)
    port = str(free_port())
    return [
        Command(
            ["launcher.py", recipe],
            {
                "RANK": str(rank), "LOCAL_RANK": str(rank % per_machine),
                "GROUP_RANK": str(rank // per_machine), "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(per_machine), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
            },
            change=(changes or {}).get(rank),
        )
        for rank, recipe in enumerate(recipes)
    ]  # fmt: skip


def run_together(
    commands: Sequence[Command], seconds: float = 120, patience: float = 30
) -> tuple[list[int], str]:
    """(exit codes, output) of the ranks of a run; when one fails, torchrun's way ends the others.

    They get SIGTERM and, `patience` seconds later, SIGKILL.
    """
    processes = [start(command) for command in commands]
    try:
        deadline = time.monotonic() + seconds
        failed: float | None = None
        while any(p.is_alive() for p in processes):
            now = time.monotonic()
            if failed is None and any(p.exitcode for p in processes):
                failed = now
                _signal(processes, signal.SIGTERM)
            elif failed is not None and now > failed + patience:
                _signal(processes, signal.SIGKILL)
            assert now < deadline, "the ranks hang:\n" + _texts(commands)
            time.sleep(0.02)
    finally:
        _signal(processes, signal.SIGKILL)
        for process in processes:
            process.join()
    return [process.exitcode or 0 for process in processes], _texts(commands)


def _signal(processes: Sequence[BaseProcess], number: int) -> None:
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, number)


def _texts(commands: Sequence[Command]) -> str:
    return "\n".join(output(command.folder) for command in commands)[-20_000:]


@dataclass
class FaultAtStep:
    """At the beginning of a training step: a signal to the process, or an error without one."""

    step: int
    number: int | None

    def __call__(self) -> None:
        stock, steps = Trainer.training_step, [0]

        def training_step(trainer: Trainer, *args: object, **kwargs: object) -> object:
            steps[0] += 1
            if steps[0] == self.step:
                if self.number is None:
                    raise ValueError("the data of this rank is broken")
                os.kill(os.getpid(), self.number)
            return stock(trainer, *args, **kwargs)

        Trainer.training_step = training_step  # type: ignore[method-assign]


@dataclass
class SlowAtItsEnd:
    """A rank that is late with its report, and once more with what follows the training."""

    report: float  # seconds
    exit: float

    def __call__(self) -> None:
        write, run_exp = RunReport._write, tuner.run_exp

        def late_report(*args: object) -> None:
            time.sleep(self.report)
            write(*args)

        def late_exit() -> None:
            try:
                run_exp()
            finally:
                time.sleep(self.exit)

        RunReport._write = late_report  # type: ignore[method-assign]
        tuner.run_exp = late_exit
