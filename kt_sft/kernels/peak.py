"""What this machine can do: arithmetic in registers and reading from memory, on all threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kt_sft.kernels._core import single
from kt_sft.kernels.isa import requested_isa
from kt_sft.machine.report import cpu_name

_SECONDS = 0.15  # of each measurement
_READ_BYTES = 1 << 30  # far beyond any cache


def _together(threads: int, work: Callable[[int], float]) -> float:
    """The sum of work(thread) over the seconds that all threads took together."""
    barrier = threading.Barrier(threads)
    done = [0.0] * threads
    spans: list[tuple[float, float]] = [(0.0, 0.0)] * threads

    def run(thread: int) -> None:
        barrier.wait()
        start = time.perf_counter()
        done[thread] = work(thread)
        spans[thread] = (start, time.perf_counter())

    workers = [threading.Thread(target=run, args=(t,)) for t in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(done) / (max(end for _, end in spans) - min(start for start, _ in spans))


def _rate(isa: str, threads: int, burn: Callable[[str, int], int]) -> float:
    """Operations per second."""
    rounds = 10_000
    start = time.perf_counter()
    burn(isa, rounds)
    rounds = int(rounds * _SECONDS / (time.perf_counter() - start))
    return _together(threads, lambda _: float(burn(isa, rounds)))


def int8_rate(isa: str, threads: int) -> float:
    """Integer operations per second, two for a product (16-bit where the ISA has no bytes)."""
    return _rate(isa, threads, single.burn_int)


def bf16_rate(isa: str, threads: int) -> float:
    """bf16 operations per second, two for a product (fp32 where the ISA has no bf16)."""
    return _rate(isa, threads, single.burn_bf16)


def exact_rate(isa: str, threads: int) -> float:
    """What the exact mode can reach: two byte passes, or one of 16 bits."""
    passes = 2 if single.geometry(isa)["int_panel"] == "u8" else 1
    return int8_rate(isa, threads) / passes


class ReadBandwidth:
    """Bytes per second of plain reads, each thread its own part of 1 GB."""

    def __init__(self, isa: str, threads: int) -> None:
        self.isa, self.threads = isa, threads
        self._data = np.empty(_READ_BYTES // 4, dtype=np.float32)
        part = len(self._data) // threads

        def touch(thread: int) -> float:
            self._data[thread * part : (thread + 1) * part] = 1.0
            return 0.0

        # Each thread its own part, so that every page is there, and on its own memory node.
        _together(threads, touch)

    def measure(self) -> float:
        """One pass over all of it."""
        part = len(self._data) // self.threads // 64 * 64

        def read(thread: int) -> float:
            single.read_row(self.isa, part, self._data.ctypes.data + 4 * part * thread)
            return 4.0 * part

        return _together(self.threads, read)


def measure_peak(threads: int, isa: str = "auto", repeats: int = 5) -> dict[str, Any]:
    """The best of `repeats`; rates in 1e12 operations and 1e9 bytes per second."""
    name = requested_isa(isa)
    bandwidth = ReadBandwidth(name, threads)
    best: dict[str, float] = {}
    for _ in range(repeats):
        for key, value in (
            ("bf16_tflops", bf16_rate(name, threads) / 1e12),
            ("int8_tops", int8_rate(name, threads) / 1e12),
            ("exact_tflops", exact_rate(name, threads) / 1e12),
            ("fp32_tflops", _rate(name, threads, single.burn_fp32) / 1e12),
            ("read_gb_s", bandwidth.measure() / 1e9),
        ):
            best[key] = max(best.get(key, 0.0), value)
    return {
        **{key: round(value, 4) for key, value in best.items()},
        "isa": name,
        "threads": threads,
        "cpu": cpu_name(),
    }
