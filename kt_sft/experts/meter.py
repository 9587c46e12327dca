"""What the CPU experts did since the last reading: time, arithmetic, balance."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Literal

from kt_sft.engines.link import Traffic
from kt_sft.engines.protocol import Report
from kt_sft.kernels import WeightLayout


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
    traffic: Traffic
    rows: int = 0
    device_rows: int = 0

    @property
    def device_share(self) -> float:
        """Part of the routed rows that an accelerator has computed."""
        return self.device_rows / self.rows if self.rows else 0.0

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


@dataclass
class _Sums:
    since: float = field(default_factory=time.perf_counter)
    tokens: int = 0
    forward: float = 0.0
    backward: float = 0.0
    flops: float = 0.0
    imbalance: float = 0.0
    balanced: int = 0
    forward_calls: int = 0
    backward_calls: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    rows: int = 0
    device_rows: int = 0


@dataclass(frozen=True)
class MeterMark:
    """What a meter had counted at a moment, to go back to."""

    at: float
    sums: _Sums


class ExpertsMeter:
    """Counts calls; shared by all layers of a model. Not locked: readings are for people."""

    def __init__(self) -> None:
        self._sums = _Sums()

    def record(
        self,
        direction: Literal["forward", "backward"],
        report: Report,
        layout: WeightLayout,
        counted_tokens: int,
    ) -> None:
        """One call. `counted_tokens` is nonzero for one layer only, in backward.

        A token passes each layer once in backward, however often its forward is recomputed.
        """
        sums = self._sums
        if direction == "forward":
            sums.forward += report.seconds
            sums.forward_calls += 1
        else:
            sums.backward += report.seconds
            sums.backward_calls += 1
        # Multiply-adds of the three frozen products, counted twice each.
        sums.flops += 6.0 * report.rows * layout.hidden * layout.intermediate
        sums.tokens += counted_tokens
        sums.rows += report.rows
        sums.device_rows += report.device_rows
        sums.traffic = sums.traffic + report.traffic
        if report.rows:
            sums.imbalance += report.max_rows * layout.experts / report.rows
            sums.balanced += 1

    def record_traffic(self, report: Report) -> None:
        """Of a call that computed nothing."""
        self._sums.traffic = self._sums.traffic + report.traffic

    def mark(self) -> MeterMark:
        """This moment, for `leave_out`."""
        return MeterMark(time.perf_counter(), replace(self._sums))

    def leave_out(self, begin: MeterMark) -> None:
        """Takes what happened since `begin` out of the interval, its time too."""
        passed = time.perf_counter() - begin.at
        self._sums = replace(begin.sums, since=begin.sums.since + passed)

    def read(self) -> ExpertsReading:
        """The sums since the last call of `read`."""
        sums, self._sums = self._sums, _Sums()
        return ExpertsReading(
            elapsed=self._sums.since - sums.since,
            tokens=sums.tokens,
            forward=sums.forward,
            backward=sums.backward,
            flops=sums.flops,
            load_max_over_mean=sums.imbalance / sums.balanced if sums.balanced else 0.0,
            forward_calls=sums.forward_calls,
            backward_calls=sums.backward_calls,
            traffic=sums.traffic,
            rows=sums.rows,
            device_rows=sums.device_rows,
        )
