"""What the system or a caller does to the kernels' face: few threads, forks, wrong values."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from layer_calls import run_forward

from kt_sft import HybridExpertsSettings
from kt_sft.errors import KernelArgumentError, SettingsError
from kt_sft.kernels import (
    CodedMatrix,
    Coding,
    Engine,
    ExpertWeights,
    Gate,
    LoraFactors,
    WeightLayout,
)
from kt_sft.kernels._core import ForkedProcess

_FEW_THREADS = """
import resource, sys, torch
from kt_sft.errors import ThreadsError
from kt_sft.kernels import Engine
pages = int(open("/proc/self/statm").read().split()[0])
# Room for a few stacks of threads, 8 MB each.
room = pages * resource.getpagesize() + (100 << 20)
resource.setrlimit(resource.RLIMIT_AS, (room, room))
for attempt in range(3):
    try:
        Engine(500)
    except ThreadsError as error:
        print(error)
print(Engine(2).threads)
"""


def test_threads_that_the_system_does_not_give() -> None:
    """An error, not an end or a hang; what had started is gone, so a smaller engine works."""
    done = subprocess.run(
        [sys.executable, "-c", _FEW_THREADS], capture_output=True, text=True, timeout=60
    )
    *errors, last = done.stdout.splitlines()
    assert done.returncode == 0 and last == "2", done.stderr
    assert len(errors) == 3
    for error in errors:
        assert "of 500 threads from the system (Resource temporarily unavailable)" in error
        assert "address space (ulimit -v)" in error and "Set threads: to a smaller number" in error


def test_more_threads_than_cpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KT_SFT_OVERSUBSCRIBE", raising=False)
    cpus = os.cpu_count() or 1
    assert HybridExpertsSettings(threads=cpus).threads == cpus
    with pytest.raises(SettingsError, match=f"threads: got {cpus + 1}, this machine has {cpus}"):
        HybridExpertsSettings(threads=cpus + 1)
    monkeypatch.setenv("KT_SFT_OVERSUBSCRIBE", "1")
    assert HybridExpertsSettings(threads=cpus + 1).threads == cpus + 1


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(1)


@pytest.fixture(scope="module")
def weights(engine: Engine) -> ExpertWeights:
    made = ExpertWeights(WeightLayout(2, 64, 64, "int8"))
    for expert in range(2):
        for projection in made.projections:
            made.pack(engine, expert, projection, torch.randn(64, 64))
    return made


def forward(engine: Engine, weights: ExpertWeights, **changes):
    call = {"compute": "exact", "gate": Gate(), "keep": True, **changes}
    index = torch.tensor([[0, 1], [1, 0], [0, 1]])
    return run_forward(engine, weights, torch.randn(3, 64), index, torch.rand(3, 2), **call)


def in_a_fork(work: Callable[[], object]) -> str:
    """The exception of `work` in a forked child, or how the child ended."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, repr(work()).encode())
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(pid, 0)
    text = os.read(read, 4096).decode()
    os.close(read)
    return text if status == 0 else f"ended by signal {os.WTERMSIG(status)}"


def test_memory_of_the_parent_is_refused_in_a_fork(engine: Engine, weights: ExpertWeights) -> None:
    _, kept, _ = forward(engine, weights)
    assert kept is not None
    uses: dict[str, Callable[[], object]] = {
        "sections": lambda: bytes(weights.sections()["tiles"])[:4],
        "kept": lambda: [float(t.sum()) for t in kept.tensors()],
        "kept up": lambda: float(kept.up.sum()),
        "unpack": lambda: weights.unpack(0, "up_proj"),
        "forward": lambda: forward(engine, weights),
    }
    for name, use in uses.items():
        use()
        text = in_a_fork(use)
        assert text.startswith("ForkedProcess: ") and str(os.getpid()) in text, f"{name}: {text}"
    assert ForkedProcess.__name__ == "ForkedProcess"


@pytest.mark.parametrize("largest", [15, 16, 255])
def test_codes_beyond_four_bits_are_refused(engine: Engine, largest: int) -> None:
    coding = Coding("uint4", "float32", 1, 32)
    weights = ExpertWeights(WeightLayout(1, 64, 64, "coded", coding=coding))
    codes = torch.randint(0, 16, (64, 64), dtype=torch.uint8)
    codes[5, 7] = largest
    matrix = CodedMatrix(coding, codes, torch.rand(64, 2), None)
    if largest == 15:
        weights.pack_codes(engine, 0, "up_proj", matrix)
        return
    with pytest.raises(KernelArgumentError, match=f"up_proj codes: got {largest}, expected 0..15"):
        weights.pack_codes(engine, 0, "up_proj", matrix)


@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), -float("inf")])
def test_scaling_must_be_a_number(engine: Engine, weights: ExpertWeights, scaling: float) -> None:
    lora = LoraFactors(torch.randn(2, 4, 64), torch.randn(2, 64, 4), 2.0)
    forward(engine, weights, lora=[lora, None, None])
    with pytest.raises(KernelArgumentError, match="gate_proj: got scaling"):
        forward(engine, weights, lora=[replace(lora, scaling=scaling), None, None])


def test_first_channel_must_not_be_negative(engine: Engine, weights: ExpertWeights) -> None:
    forward(engine, weights, first_channel=64)
    with pytest.raises(KernelArgumentError, match="first_channel: got -1"):
        forward(engine, weights, first_channel=-1)
