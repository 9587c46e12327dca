"""Child processes from a fork server that has imported everything, so that one takes a second."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

_PRELOAD = ["tiny_training", "recipe_runs", "command_runs", "preloaded"]
_context = multiprocessing.get_context("forkserver")


class Work(Protocol):
    """What a child does; `folder` is where it writes."""

    folder: str

    def __call__(self) -> None: ...


def own_folder() -> str:
    """A new one for a child that has no other; it goes with the test run."""
    return tempfile.mkdtemp(dir=os.environ["KT_SFT_TEST_CHILDREN"])


@functools.cache
def _fork_server() -> None:
    """Started once; it does not take over sys.path by itself."""
    former = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    _context.set_forkserver_preload(_PRELOAD)
    forkserver.ensure_running()
    if former is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = former


def start(work: Work) -> BaseProcess:
    """A child that does `work`; its exit code tells how it ended."""
    Path(work.folder).mkdir(parents=True, exist_ok=True)
    _fork_server()
    process = _context.Process(target=_run, args=(work,))
    process.start()
    return process


def _run(work: Work) -> None:
    # Errors go to a file: what a test asserts on is their text.
    with (Path(work.folder) / "output.txt").open("a") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        work()


def finish(work: Work, seconds: float = 120) -> tuple[int, str]:
    """(exit code, output) of a child that runs to its end."""
    process = start(work)
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"the training hangs:\n{output(work.folder)}")
    assert process.exitcode is not None
    return process.exitcode, output(work.folder)


def output(folder: str | Path) -> str:
    """What the children wrote."""
    return (Path(folder) / "output.txt").read_text()
