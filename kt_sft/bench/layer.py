"""Time of one layer of routed experts, forward and backward, alone or against a peer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kt_sft.bench.case import LayerCase, LayerData, Runner, one_expert, timed
from kt_sft.bench.peers import PEERS, keep_freed_memory
from kt_sft.kernels import (
    PROJECTIONS,
    Call,
    Engine,
    ExpertWeights,
    Gate,
    Kept,
    WeightLayout,
    backward,
    forward,
    requested_isa,
)
from kt_sft.kernels.peak import bf16_rate, exact_rate, int8_rate
from kt_sft.machine.cpus import available_threads
from kt_sft.machine.report import cpu_name

_PEAKS = {"bf16": bf16_rate, "exact": exact_rate, "int8": int8_rate}


class OurLayer:
    """The layer on our kernels, with the phases and bytes of its last run."""

    def __init__(self, case: LayerCase, data: LayerData) -> None:
        self.case, self.data = case, data
        self.engine = Engine(case.threads, requested_isa(case.isa))
        self.weights = ExpertWeights(
            WeightLayout(case.experts, case.hidden, case.intermediate, case.weights)
        )
        one = one_expert(case)
        for expert in range(case.experts):
            for name in PROJECTIONS:
                self.weights.pack(self.engine, expert, name, one[name])
        self.phases: dict[str, dict[str, float]] = {}
        self.active_experts = 0
        self._kept: Kept | None = None

    @property
    def _call(self) -> Call:
        return Call(self.case.arithmetic, Gate())

    def forward(self) -> Tensor:
        """Keeps what backward needs; returns out [T, D]."""
        out_TD, self._kept, report = forward(
            self.engine, self.weights, self._call, self.data.inputs, keep=True
        )
        self.phases["forward"] = report.phase_ms
        self.active_experts = report.active_experts
        return out_TD

    def backward(self) -> None:
        """Of the last forward."""
        assert self._kept is not None
        _, report = backward(
            self.engine,
            self.weights,
            self._call,
            self.data.inputs,
            self.data.d_out_TD,
            self._kept,
        )
        self._kept = None
        self.phases["backward"] = report.phase_ms

    @property
    def needs_forward(self) -> bool:
        """Whether backward has nothing to go on."""
        return self._kept is None

    @property
    def bytes_per_weight(self) -> float:
        """Scales included."""
        count = 3 * self.case.experts * self.case.hidden * self.case.intermediate
        return self.weights.nbytes / count

    @property
    def active_bytes(self) -> float:
        """Of the weights that one direction reads."""
        return self.weights.nbytes * self.active_experts / self.case.experts


# Runs this short feel what ran before them: threads still asleep, code not in the caches.
_SHORT_MS = 20.0


def _rounds(
    case: LayerCase, runners: Mapping[str, Runner], rest_seconds: float
) -> dict[str, tuple[float, float]]:
    """Median (forward, backward) of each; one warm-up, then all in turn, short ones twice.

    Each round begins with the next runner, so that nobody always follows the same neighbour.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    warm = {name: runner() for name, runner in runners.items()}
    names = list(runners)
    for i in range(case.rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            runner = runners[name]
            time.sleep(rest_seconds)
            if name != "peak" and sum(warm[name]) < _SHORT_MS:
                runner()
            times[name].append(runner())
    return {
        name: (statistics.median(t[0] for t in ts), statistics.median(t[1] for t in ts))
        for name, ts in times.items()
    }


def _best_ratios(
    plain: Mapping[str, tuple[float, float]], tuned: Mapping[str, tuple[float, float]] | None
) -> dict[str, float]:
    """Each peer's time over ours, in the run that is better for the peer."""
    ratios: dict[str, float] = {}
    for name in plain:
        if name in ("kt_sft", "peak"):
            continue
        runs = [plain] if tuned is None else [plain, tuned]
        ratios[name] = round(min(sum(run[name]) / sum(run["kt_sft"]) for run in runs), 2)
    return ratios


def measure_layer(
    case: LayerCase, versus: str | None = None, peer_environment: Path | None = None
) -> dict[str, Any]:
    """One JSON-ready result; the machine's peak is measured between the rounds.

    `versus` names a row of PEERS. Peers of this process are timed with malloc as it is and with
    malloc told to keep freed memory; ratios are claimed against the better.
    """
    isa = requested_isa(case.isa)
    data = LayerData.make(case)
    ours = OurLayer(case, data)
    peak = _PEAKS[case.arithmetic]

    def measure_peak() -> tuple[float, float]:
        rate = peak(isa, case.threads)
        return rate, rate

    runners: dict[str, Runner] = {
        "kt_sft": timed(ours.forward, ours.backward),
        "peak": measure_peak,
    }
    tuned = None
    rest = PEERS[versus].rest_seconds if versus else 0.0
    with ExitStack() as stack:
        if versus:
            torch.set_num_threads(case.threads)
            peers = stack.enter_context(PEERS[versus].start(case, data, peer_environment))
            runners.update(peers)
        medians = _rounds(case, runners, rest)
        if versus and PEERS[versus].in_process:
            keep_freed_memory()
            tuned = _rounds(case, runners, rest)
    result = _report(case, isa, ours, medians)
    if versus:
        result["peers_ms"] = {n: _rounded(t) for n, t in medians.items() if n in peers}
        if tuned is not None:
            result["peers_ms_keeping_freed_memory"] = {
                n: _rounded(t) for n, t in tuned.items() if n in peers
            }
        result["ratios"] = _best_ratios(medians, tuned)
    return result


def _rounded(times: tuple[float, float]) -> list[float]:
    return [round(t, 1) for t in times]


def _report(
    case: LayerCase, isa: str, ours: OurLayer, medians: Mapping[str, tuple[float, float]]
) -> dict[str, Any]:
    result: dict[str, Any] = {
        name: getattr(case, name)
        for name in ("hidden", "intermediate", "experts", "top_k", "tokens", "rank", "skew")
    }
    result |= {"weights": case.weights, "compute": case.arithmetic}
    peak = medians["peak"][0]
    for direction, milliseconds in zip(("forward", "backward"), medians["kt_sft"], strict=True):
        seconds = milliseconds / 1e3
        result[f"{direction}_ms"] = round(milliseconds, 3)
        result[f"{direction}_tflops"] = round(case.flops / seconds / 1e12, 4)
        result[f"{direction}_of_peak"] = round(case.flops / seconds / peak, 3)
        result[f"{direction}_gb_s"] = round(ours.active_bytes / seconds / 1e9, 1)
    result |= {
        "flops_per_byte": round(case.flops / ours.active_bytes, 4),
        "peak_tflops": round(peak / 1e12, 4),
        "bytes_per_weight": round(ours.bytes_per_weight, 4),
        "isa": isa,
        "threads": case.threads,
        "rounds": case.rounds,
        "cpu": cpu_name(),
        "phase_ms": {
            direction: {name: round(ms, 2) for name, ms in named.items()}
            for direction, named in ours.phases.items()
        },
    }
    return result


def default_threads() -> int:
    """Threads when the command line does not say."""
    return available_threads(local_ranks=1)
