"""kt-kernel's fine-tuning kernels, in a process and an environment of their own."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from kt_sft.bench.case import LORA_SCALING, LayerCase, LayerData, Runner
from kt_sft.errors import PeerError

logger = logging.getLogger(__name__)

_REQUIREMENT = "kt-kernel==0.7.2"
_DRIVER = Path(__file__).with_name("kt_kernel_driver.py")


def _python(environment: Path | None) -> Path:
    """The environment's interpreter; the environment is made on first use (7 GB)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    folder = environment or cache / "kt_sft" / "peers" / _REQUIREMENT.replace("==", "-")
    python = folder / "bin" / "python"
    ready = folder / "installed"
    if environment is None and not ready.exists():
        logger.info("installing %s into %s (about 2 minutes, 7 GB)", _REQUIREMENT, folder)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", _REQUIREMENT],
            check=True,
            stdout=sys.stderr,
        )
        ready.touch()
    if not python.is_file():
        raise PeerError(f"kt-kernel: no interpreter {python}; expected a virtual environment there")
    return python


@contextmanager
def _process(python: Path, case: LayerCase, precision: str) -> Iterator[Runner]:
    log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - lives as long as the process
    process = subprocess.Popen(
        # -P: this folder holds a module of the package's name.
        [str(python), "-P", str(_DRIVER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    requests, replies = process.stdin, process.stdout

    def ask(request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            requests.write(json.dumps(request) + "\n")
            requests.flush()
            line = replies.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            log.seek(0)
            last = "\n".join(log.read().splitlines()[-5:])
            raise PeerError(f"kt-kernel in {precision}: the process ended:\n{last}")
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(f"kt-kernel in {precision}: {reply['error']}")
        return reply

    def run() -> tuple[float, float]:
        reply = ask({"cmd": "run"})
        return reply["forward_ms"], reply["backward_ms"]

    try:
        shape = {n: getattr(case, n) for n in ("hidden", "intermediate", "experts", "top_k")}
        ask(
            {
                **shape,
                "tokens": case.tokens,
                "rank": case.rank,
                "alpha": LORA_SCALING * case.rank,
                "precision": precision,
                "threads": case.threads,
                "seed": case.seed,
            }
        )
        yield run
    finally:
        with suppress(BrokenPipeError):
            requests.close()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


@contextmanager
def start(
    case: LayerCase, data: LayerData, environment: Path | None
) -> Iterator[Mapping[str, Runner]]:
    """Runners for both of its precisions; it draws its own inputs of the same shape."""
    if not case.rank or case.skew:
        raise PeerError(
            f"kt-kernel: got rank {case.rank} and skew {case.skew}; it always has LoRA and draws "
            "its own balanced routing, so compare with a rank of at least 1 and no skew"
        )
    python = _python(environment)
    with ExitStack() as stack:
        yield {
            f"kt-kernel {precision}": stack.enter_context(_process(python, case, precision))
            for precision in ("bf16", "int8")
        }
