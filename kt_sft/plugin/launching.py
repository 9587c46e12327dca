"""Signals to `llamafactory-cli train`, which waits for torchrun, and how they reach the ranks.

The stock launcher ends on SIGTERM and leaves its ranks running, and torchrun gives its ranks 30
seconds, which can be less than a step. So the ranks themselves are signalled, once each; they stop
after the same step, save, and end, and torchrun and the launcher end after them.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class LauncherSubprocess:
    """Stands for the module `subprocess` in the launcher; other names are those of the module."""

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    def run(self, command: Sequence[str], *, env: dict[str, str], check: bool) -> Any:
        """Waits for the ranks; raises CalledProcessError, or SystemExit(128 + signal)."""
        received: list[int] = []
        # A session of its own: a terminal's signals come here only, and are passed on once.
        launched = subprocess.Popen(command, env=env, start_new_session=True)

        def pass_on(number: int, frame: Any) -> None:
            received.append(number)
            # The first signal of a terminal that closes, too, is to save and stop.
            for rank in _children(launched.pid) or [launched.pid]:
                os.kill(rank, signal.SIGTERM if number == signal.SIGHUP else number)

        former = {number: signal.signal(number, pass_on) for number in _SIGNALS}
        try:
            code = launched.wait()
        except BaseException:
            launched.kill()
            raise
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
        if received:
            raise SystemExit(128 + received[0])
        if check and code:
            raise subprocess.CalledProcessError(code, command)
        return subprocess.CompletedProcess(command, code)


def _children(pid: int) -> list[int]:
    """The processes that `pid` has started and that still run."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # "pid (name) state parent ...", and the name may hold anything.
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(folder.name))
    return found
