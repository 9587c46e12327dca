"""What the CPU experts did since the last reading: time, arithmetic, balance."""

from __future__ import annotations

import time
from dataclasses import dataclass

from kt_sft.kernels import BlockReport


@dataclass
class ExpertsReading:
    """Sums over all layers and calls of an interval; times in seconds."""

    elapsed: float
    tokens: int
    forward: float
    backward: float
    flops: float
    load_max_over_mean: float
    forward_calls: int
    backward_calls: int

    @property
    def share(self) -> float:
        """Part of the interval spent in the experts."""
        return (self.forward + self.backward) / self.elapsed if self.elapsed > 0 else 0.0

    @property
    def forwards_per_backward(self) -> float:
        """1 where no forward is computed twice; 0 without a backward."""
        return self.forward_calls / self.backward_calls if self.backward_calls else 0.0

    @property
    def tflops(self) -> float:
        """Arithmetic rate while in the experts."""
        busy = self.forward + self.backward
        return self.flops / busy / 1e12 if busy > 0 else 0.0


class ExpertsMeter:
    """Counts calls; shared by all layers of a model. Not locked: readings are for people."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._since = time.perf_counter()
        self._tokens = 0
        self._seconds = {"forward": 0.0, "backward": 0.0}
        self._flops = 0.0
        self._imbalance = 0.0
        self._balanced = 0
        self._calls = {"forward": 0, "backward": 0}

    def record(
        self,
        direction: str,
        seconds: float,
        flops: float,
        report: BlockReport,
        experts: int,
        counted_tokens: int,
    ) -> None:
        """One call. `counted_tokens` is nonzero for one layer only, in backward.

        A token passes each layer once in backward, however often its forward is recomputed.
        """
        self._seconds[direction] += seconds
        self._calls[direction] += 1
        self._flops += flops
        self._tokens += counted_tokens
        if report.rows:
            self._imbalance += report.max_rows * experts / report.rows
            self._balanced += 1

    def read(self) -> ExpertsReading:
        """The sums since the last call of `read`."""
        reading = ExpertsReading(
            elapsed=time.perf_counter() - self._since,
            tokens=self._tokens,
            forward=self._seconds["forward"],
            backward=self._seconds["backward"],
            flops=self._flops,
            load_max_over_mean=self._imbalance / self._balanced if self._balanced else 0.0,
            forward_calls=self._calls["forward"],
            backward_calls=self._calls["backward"],
        )
        self._clear()
        return reading
