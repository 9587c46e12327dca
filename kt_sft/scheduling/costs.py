"""What a layer's experts cost in each place, and the split that ends first.

The host, the link and the device work at once: a pass takes as long as the one that ends last.

Legend: E experts of a layer with rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kt_sft.scheduling.assignment import STREAM_PIECES, Assignment

Seconds = NDArray[np.float64]

# No expert takes so many seconds.
_LONGEST = 1e6
# So few experts with rows that a split is looked for from several starts.
_FEW = 32


@dataclass(frozen=True)
class Curve:
    """Seconds that one expert takes by the rows that it gets, measured at some numbers of rows.

    Between them it is a straight line, beyond the last one the line of the last two, and below the
    first one the first: a few rows cost what reading the weights costs.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def __call__(self, rows: NDArray[np.int64]) -> Seconds:
        """Seconds for each of `rows`."""
        at, known = np.asarray(self.rows, float), np.asarray(self.seconds)
        found = np.interp(rows, at, known)
        if len(at) > 1:
            slope = max(0.0, (known[-1] - known[-2]) / (at[-1] - at[-2]))
            found = found + slope * np.maximum(0, rows - at[-1])
        return found


@dataclass(frozen=True)
class PassCosts:
    """Of one direction of a layer.

    host, device: one expert's seconds. host_fixed, device_fixed: of a place that gets any expert.
    stream: seconds of the link for the weights of one expert. contention: by which part of its time
    streaming slows the host down.
    """

    host: Curve
    device: Curve
    host_fixed: float
    device_fixed: float
    stream: float
    contention: float = 0.0

    def text(self, rows: int = 128) -> str:
        """What an expert with so many rows takes in each place."""
        at = np.asarray([rows])
        return (
            f"{rows} rows: {1e3 * self.host(at)[0]:.3f} ms on the host, "
            f"{1e3 * self.device(at)[0]:.3f} ms on the accelerator, "
            f"{1e3 * self.stream:.3f} ms on the link"
        )


@dataclass(frozen=True)
class LayerCosts:
    """Of a layer's form on a machine: forward, and backward, which streams the weights again."""

    forward: PassCosts
    backward: PassCosts

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerCosts:
        """The way back. Raises KeyError, TypeError and ValueError."""

        def time(value: float) -> float:
            if not 0 <= value < _LONGEST:
                raise ValueError(f"got {value} s, expected 0 to {_LONGEST:.0f}")
            return value

        def curve(of: Mapping[str, Any]) -> Curve:
            rows, seconds = tuple(map(int, of["rows"])), tuple(map(float, of["seconds"]))
            if len(rows) != len(seconds) or not rows or list(rows) != sorted(set(rows)):
                raise ValueError(f"rows: got {rows} with {len(seconds)} times")
            return Curve(rows, tuple(map(time, seconds)))

        def one(of: Mapping[str, Any]) -> PassCosts:
            names = ("host_fixed", "device_fixed", "stream", "contention")
            fixed = (time(float(of[name])) for name in names)
            return PassCosts(curve(of["host"]), curve(of["device"]), *fixed)

        return cls(one(values["forward"]), one(values["backward"]))


@dataclass(frozen=True)
class Estimate:
    """Seconds in which each place is busy; makespan: until the last one has ended."""

    host: float
    link: float
    device: float
    makespan: float


def estimate(costs: PassCosts, rows: Sequence[int], places: Assignment) -> Estimate:
    """Of one direction, for an assignment of the experts that get `rows`."""
    rows_E = np.asarray(rows, np.int64)
    on_device = list(places.on_device)
    there = np.isin(np.arange(len(rows_E)), on_device)
    host_rows = rows_E[~there & (rows_E > 0)]
    host = float(costs.host(host_rows).sum()) + (costs.host_fixed if len(host_rows) else 0.0)
    device = float(costs.device(rows_E[on_device]).sum()) + (costs.device_fixed if on_device else 0)
    link = costs.stream * len(places.streamed)
    return Estimate(host, link, device, float(_makespan(host, link, device, costs)))


def _makespan(host: Any, link: Any, device: Any, costs: PassCosts) -> Any:
    """The device cannot begin before the first piece has come, nor end with the last one's coming;
    the host is slowed down while the link works."""
    link = np.asarray(link)
    late = np.where(link > 0, np.maximum(costs.stream, link / STREAM_PIECES), 0.0)
    slowed = host + costs.contention * np.minimum(host, link)
    return np.maximum(slowed, np.maximum(link, device) + late)


@dataclass(frozen=True)
class EndsFirst:
    """Implements Policy: the split whose last place ends first.

    It begins with the best of those that give the device the experts with the most rows, of
    resident and of streamed ones, and then moves and exchanges single experts while that helps.
    """

    costs: LayerCosts

    def assign(
        self, rows: Sequence[int], resident: Sequence[int], backward_follows: bool
    ) -> Assignment:
        """See Policy."""
        rows_E = np.asarray(rows, np.int64)
        there_E = np.zeros(len(rows_E), bool)
        there_E[list(resident)] = True
        # Most rows first, of equal ones those that are there, of equal ones by their number.
        order = np.lexsort((np.arange(len(rows_E)), ~there_E, -rows_E))
        order = order[rows_E[order] > 0]
        there = there_E[order]
        on_device = _best(
            self.costs, tuple(rows_E[order].tolist()), there.tobytes(), backward_follows
        )
        return Assignment(
            tuple(order[on_device & there].tolist()), tuple(order[on_device & ~there].tolist())
        )


# Passes of single tokens are alike but for which experts they name: they need no second search.
@functools.lru_cache(maxsize=4096)
def _best(
    costs: LayerCosts, rows: tuple[int, ...], resident: bytes, backward_follows: bool
) -> NDArray[np.bool_]:
    """Which of these experts are on the device; not to be written to."""
    there = np.frombuffer(resident, bool)
    both = (costs.forward, costs.backward)
    split = _Split(both[: 1 + backward_follows], np.asarray(rows, np.int64), there)
    starts = [split.firsts()]
    if len(rows) <= _FEW:  # single experts weigh more, and one start may end in a dead end
        starts += [np.zeros_like(there), np.ones_like(there), there, ~there]
    return min((split.improved(start) for start in starts), key=split.span)


class _Split:
    """The experts that have rows, the busiest first, and what they cost in each pass [P, E]."""

    # Each step helps; there are few until none does.
    _STEPS = 64

    def __init__(
        self, passes: Sequence[PassCosts], rows_E: NDArray[np.int64], resident: NDArray[np.bool_]
    ) -> None:
        self._host = np.stack([costs.host(rows_E) for costs in passes])
        self._device = np.stack([costs.device(rows_E) for costs in passes])
        self._link = np.stack([np.where(resident, 0.0, costs.stream) for costs in passes])
        self._resident = resident
        self._passes = passes

    def _spans(self, host: Seconds, link: Seconds, device: Seconds, on: Any) -> Seconds:
        """Of all passes together; the sums of each place are [P, ...], on: experts on the device"""
        total = np.zeros(np.shape(on))
        for p, costs in enumerate(self._passes):
            busy = host[p] + np.where(on < self._host.shape[1], costs.host_fixed, 0.0)
            works = device[p] + np.where(on > 0, costs.device_fixed, 0.0)
            total = total + _makespan(busy, link[p], works, costs)
        return total

    def span(self, on_device: NDArray[np.bool_]) -> float:
        """Of a split."""
        host = self._host[:, ~on_device].sum(1)
        link, device = self._link[:, on_device].sum(1), self._device[:, on_device].sum(1)
        return float(self._spans(host, link, device, on_device.sum()))

    def firsts(self) -> NDArray[np.bool_]:
        """The best of the splits by rows alone: which experts are on the device."""
        mine, others = np.flatnonzero(self._resident), np.flatnonzero(~self._resident)

        def sums(of: Seconds) -> Seconds:
            """[P, m, n]: of the first m of mine and n of the others."""
            m, n = (
                np.concatenate((np.zeros((len(of), 1)), of[:, part].cumsum(1)), 1)
                for part in (mine, others)
            )
            return m[:, :, None] + n[:, None, :]

        on = np.add.outer(np.arange(len(mine) + 1), np.arange(len(others) + 1))
        host = self._host.sum(1)[:, None, None] - sums(self._host)
        spans = self._spans(host, sums(self._link), sums(self._device), on)
        # Of equal ones, that which leaves more to the host.
        m, n = np.unravel_index(int(np.argmin(spans)), spans.shape)
        found = np.zeros(len(self._resident), bool)
        found[mine[:m]] = found[others[:n]] = True
        return found

    def improved(self, on_device: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """With single experts moved or exchanged."""
        found = on_device.copy()
        costs = self._host, self._link, self._device
        for _ in range(self._STEPS):
            here, away = np.flatnonzero(~found), np.flatnonzero(found)
            # One expert leaves the device, or at the end none; one comes, or none.
            out, into = (
                [np.pad(of[:, part], ((0, 0), (0, 1))) for of in costs] for part in (away, here)
            )
            moved = [o[:, :, None] - i[:, None, :] for o, i in zip(out, into, strict=True)]
            leaves = np.append(np.ones(len(away), int), 0)
            comes = np.append(np.ones(len(here), int), 0)
            on = len(away) - leaves[:, None] + comes
            host = self._host[:, here].sum(1)[:, None, None] + moved[0]
            link, device = (
                of[:, away].sum(1)[:, None, None] - change
                for of, change in zip(costs[1:], moved[1:], strict=True)
            )
            spans = self._spans(host, link, device, on)
            i, j = np.unravel_index(int(np.argmin(spans)), spans.shape)
            if not spans[i, j] < spans[-1, -1] * (1 - 1e-9):
                break
            if leaves[i]:
                found[away[i]] = False
            if comes[j]:
                found[here[j]] = True
        return found
