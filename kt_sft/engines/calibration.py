"""What a layer's experts cost on the host, on an accelerator and on the way there: measured.

Some seconds at the first start with a form of layer on a machine; kept in a file beside the stores.

Legend: T tokens, D hidden size, E experts, r LoRA rank.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kt_sft import __version__
from kt_sft.config import HybridExpertsSettings
from kt_sft.device.block import Limits, compute_dtype
from kt_sft.engines.cpu import CpuEngine
from kt_sft.engines.host import HostExperts
from kt_sft.engines.protocol import ExpertsEngine, Share
from kt_sft.engines.share import DeviceShare, aside
from kt_sft.errors import SettingsError, StoreFolderError
from kt_sft.files import durable
from kt_sft.kernels import (
    PROJECTIONS,
    Call,
    Engine,
    ExpertWeights,
    Gate,
    Inputs,
    LoraFactors,
    WeightLayout,
    requested_isa,
)
from kt_sft.machine.accelerator import device_name
from kt_sft.machine.cpus import place_among_ranks, threads_of
from kt_sft.machine.report import cpu_name
from kt_sft.scheduling.assignment import Assignment
from kt_sft.scheduling.costs import Curve, LayerCosts, PassCosts
from kt_sft.store.library import default_folder

logger = logging.getLogger(__name__)

FILE_NAME = "calibration.json"
# Rows of one expert, and of how many experts together, that are timed: with few experts the threads
# wait for each other more than in a layer.
_CASES = ((1, 32), (8, 32), (32, 32), (128, 16), (512, 8))
_REPEATS = 5
_RANK = 8
_TOGETHER_SECONDS = 0.3
_SOME_EXPERTS = 32
# Of a plan, which is to take some seconds: experts that no cache holds, what is timed only once,
# and when there is enough.
_FEWEST_EXPERTS, _BEYOND_CACHES = 4, 256 << 20
_LONG_SECONDS, _STRAIGHT, _QUICK_SECONDS = 0.1, 128, 2.0


class Calibrations:
    """The measured costs of layers, from the file or made now."""

    def __init__(self, settings: HybridExpertsSettings) -> None:
        self._settings = settings

    @property
    def path(self) -> Path | None:
        """Of the file; None where there is no folder for it."""
        try:
            given = self._settings.store
            return (default_folder() if given in ("auto", "memory") else Path(given)) / FILE_NAME
        except StoreFolderError:
            return None

    def costs(self, layer: MeasuredLayer, engine: ExpertsEngine) -> LayerCosts:
        """Of a layer's form. engine: that of the host."""
        key = json.dumps(self._setting(layer, engine), sort_keys=True)
        known = self._known(self._read(), key)
        if known is not None:
            return known
        start = time.perf_counter()
        found = measure(layer, self._settings.compute, bool(self._settings.expert_lora))
        logger.info(
            "measured what experts cost on the host, on the link and on %s in %.1f s",
            layer.device,
            time.perf_counter() - start,
        )
        return self._remember(key, found)

    def _setting(self, layer: MeasuredLayer, engine: ExpertsEngine) -> dict[str, Any]:
        """What a measurement is good for."""
        device, layout = layer.device, layer.host.layout
        return {
            "kt_sft": __version__,
            "torch": torch.__version__,
            "cpu": cpu_name(),
            "device": device_name(device),
            "engine": type(engine).__name__,
            "disk_tier": self._settings.disk_tier,
            "threads": engine.threads,
            "isa": engine.isa,
            # Ranks measure while the others do, each for itself.
            "rank": place_among_ranks(),
            "compute": layout.arithmetic or self._settings.compute,
            "lora": bool(self._settings.expert_lora),
            "layout": _form(layout),
        }

    def _read(self) -> dict[str, Any]:
        path = self.path
        try:
            found = json.loads(path.read_text()) if path is not None else {}
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _remember(self, key: str, costs: LayerCosts) -> LayerCosts:
        """Those that the file has from now on."""
        path = self.path
        if path is None:
            return costs
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                known = self._read()
                found = self._known(known, key)
                if found is None:
                    known[key] = costs.as_dict()
                    durable.write_whole(path, json.dumps(known, indent=1).encode())
        except OSError as error:
            logger.warning("%s: %s; the next start measures again", path, error)
            return costs
        return found or costs

    def _known(self, known: dict[str, Any], key: str) -> LayerCosts | None:
        try:
            return LayerCosts.from_dict(known[key]) if key in known else None
        except (KeyError, TypeError, ValueError) as error:
            logger.warning("%s: %s; measuring again", self.path, error)
            return None


@dataclass(frozen=True)
class MeasuredLayer:
    """A layer that is packed, as the host computes it and as the accelerator reads it."""

    host: HostExperts
    weights: ExpertWeights
    device: torch.device


def _form(layout: WeightLayout) -> str:
    """What a layer's costs depend on: not on how many experts it has. The same in every process."""
    parts = [f"{layout.hidden} x {layout.intermediate}", layout.weights]
    parts += [str(layout.coding)] * (layout.coding is not None)
    parts += ["gated"] * layout.gated + [f"bias of {p}" for p in sorted(layout.biased)]
    return ", ".join(parts)


def find_costs(path: Path, layout: WeightLayout) -> tuple[LayerCosts, dict[str, Any]]:
    """The latest costs for a layer's form in a file of another machine, and what they are of.

    Raises SettingsError.
    """
    try:
        found = json.loads(path.read_text())
        settings = [(json.loads(key), values) for key, values in found.items()]
        fitting = [(s, v) for s, v in settings if s["layout"] == _form(layout)]
        if fitting:
            setting, values = fitting[-1]
            return LayerCosts.from_dict(values), setting
        known = sorted({s["layout"] for s, _ in settings})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{path}: is no calibration of kt_sft ({error})") from error
    raise SettingsError(
        f"{path}: has nothing of {_form(layout)}; it has {'; '.join(known) or 'nothing'}. "
        "`kt-sft plan RECIPE` measures it there"
    )


def measured_layer(
    settings: HybridExpertsSettings, layout: WeightLayout, device: torch.device
) -> LayerCosts:
    """Of a layer's form, without a model: from the file, or measured with some random experts."""
    engine, weights = _random_experts(settings, layout, min(layout.experts, _SOME_EXPERTS))
    layer = MeasuredLayer(engine.on(weights), weights, device)
    return Calibrations(settings).costs(layer, engine)


def measured_host(
    settings: HybridExpertsSettings,
    layout: WeightLayout,
    top_k: int,
    rank: int,
    adapted: Sequence[str] = PROJECTIONS,
) -> tuple[tuple[Curve, float], tuple[Curve, float]]:
    """Of a layer's form on the host alone, measured with random experts in a few seconds.

    top_k: experts of a token. rank: of LoRA, 0 for none; adapted: the projections that have it. For
    forward and backward: seconds of one expert by its rows, and of a call without any.
    """
    each = layout.nbytes // layout.experts
    count = min(layout.experts, _SOME_EXPERTS, max(_FEWEST_EXPERTS, _BEYOND_CACHES // each))
    engine, weights = _random_experts(settings, layout, count)
    layer = MeasuredLayer(engine.on(weights), weights, torch.device("cpu"))
    bench = _Bench(layer, settings.compute, rank, adapted, top_k=min(top_k, count), quick=True)
    forward, backward = bench.curves(bench.on_host)
    return forward, backward


def _random_experts(
    settings: HybridExpertsSettings, layout: WeightLayout, count: int
) -> tuple[CpuEngine, ExpertWeights]:
    """Some experts of a layer's form, packed from one matrix."""
    engine = CpuEngine(Engine(threads_of(settings.threads), requested_isa(settings.isa)))
    some = replace(layout, experts=count)
    weights = ExpertWeights(some)
    if layout.coding is None:
        one = torch.randn(some.shape("up_proj"), generator=torch.Generator().manual_seed(0))
        for expert in range(some.experts):
            for projection in some.projections:
                matrix = one.T if projection == "down_proj" else one
                weights.pack(engine.packer, expert, projection, matrix.contiguous())
    return engine, weights


def measure(layer: MeasuredLayer, compute: str, lora: bool) -> LayerCosts:
    """Of a layer. compute: of the settings; lora: with LoRA."""
    bench = _Bench(layer, compute, _RANK if lora else 0)
    host = bench.curves(bench.on_host)
    there = bench.curves(bench.on_device)
    stream, contention = bench.together()
    forward, backward = (
        PassCosts(h, d, h_fixed, d_fixed, stream, contention)
        for (h, h_fixed), (d, d_fixed) in zip(host, there, strict=True)
    )
    return LayerCosts(forward, backward)


# Seconds of forward and backward.
_Times = tuple[float, float]


class _Bench:
    """Times calls of one layer. Experts take turns, so that weights come from memory."""

    def __init__(
        self,
        layer: MeasuredLayer,
        compute: str,
        rank: int,
        adapted: Sequence[str] = PROJECTIONS,
        *,
        top_k: int = 1,
        quick: bool = False,
    ) -> None:
        self._host, self._device, layout = layer.host, layer.device, layer.host.layout
        self._layout = layout
        self._call = Call(layout.arithmetic or compute, Gate(gated=layout.gated))
        self._rank, self._adapted = rank, adapted
        self._turn = 0
        self._weights, self._quick, self._top_k = layer.weights, quick, top_k

    @cached_property
    def _share(self) -> DeviceShare:
        share = DeviceShare(self._weights)
        share.place(range(min(self._layout.experts, max(n for _, n in _CASES))))
        return share

    def _inputs(self, rows: int, chosen: Sequence[int], device: torch.device) -> Inputs:
        layout = self._layout
        each = math.gcd(self._top_k, len(chosen))
        index = torch.tensor(chosen).repeat(rows).reshape(-1, each)
        lora: list[LoraFactors | None] = [None, None, None]
        if self._rank:  # one pair for all costs what pairs cost, and takes no memory
            for i, projection in enumerate(PROJECTIONS):
                if projection in layout.projections and projection in self._adapted:
                    outputs, inputs = layout.shape(projection)
                    a, b = torch.zeros(1, self._rank, inputs), torch.zeros(1, outputs, self._rank)
                    lora[i] = LoraFactors(a.to(device), b.to(device), 1.0)
        # The model's own random numbers are not for this.
        drawn = torch.randn(len(index), layout.hidden, generator=torch.Generator().manual_seed(0))
        hidden_TD = drawn.bfloat16()
        return Inputs(
            hidden_TD.to(device),
            index.to(device),
            torch.ones(index.shape, device=device),
            (lora[0], lora[1], lora[2]),
        )

    def _chosen(self, count: int, of: int) -> list[int]:
        first, self._turn = self._turn, self._turn + count
        return [(first + i) % of for i in range(count)]

    def on_host(self, rows: int, count: int) -> _Times:
        """With so many rows for each of so many experts."""
        chosen = self._chosen(count, self._layout.experts)
        inputs = self._inputs(rows, chosen, torch.device("cpu"))
        start = time.perf_counter()
        done = self._host.forward(self._call, inputs, None, keep=True)
        middle = time.perf_counter()
        assert done.context is not None
        self._host.backward(done.context, done.out_TD, None)
        return middle - start, time.perf_counter() - middle

    def on_device(self, rows: int, count: int) -> _Times:
        """The same of experts that are resident."""
        chosen = self._chosen(count, len(self._share.resident))
        inputs = self._inputs(rows, chosen, self._device)
        share = Share(Assignment(tuple(chosen)), (rows,) * count)
        self._wait()
        start = time.perf_counter()
        total_TD = self._share.forward(self._call, share, inputs).result()
        self._wait()
        middle = time.perf_counter()
        self._share.backward(self._call, share, inputs, total_TD).result()
        self._wait()
        return middle - start, time.perf_counter() - middle

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def curves(self, case: Callable[[int, int], _Times]) -> list[tuple[Curve, float]]:
        """Of forward and backward: seconds of an expert by its rows, and of a call without any."""
        most = self._layout.experts

        def median(rows: int, count: int) -> _Times:
            repeats = _REPEATS
            if sum(case(rows, count)) > _LONG_SECONDS and self._quick:
                repeats = 2
            times = [case(rows, count) for _ in range(repeats)]
            forward, backward = zip(*times, strict=True)
            # Of two, the one that nothing else on the machine has delayed.
            return statistics.median_low(forward), statistics.median_low(backward)

        start = time.perf_counter()
        alone = median(1, 1)
        cases, times = [], []
        for rows, count in _CASES:
            # Whole tokens, each with all of its experts, of which there may be more.
            whole = max(1, min(count, most) // self._top_k) * self._top_k
            cases.append((rows, whole))
            times.append(median(*cases[-1]))
            # From some rows on it is a straight line.
            if self._quick and rows >= _STRAIGHT and time.perf_counter() - start > _QUICK_SECONDS:
                break
        found = []
        for which in (0, 1):
            first, count = times[0][which], cases[0][1]
            each = max(0.0, first - alone[which]) / max(1, count - 1)
            fixed = max(0.0, alone[which] - each)
            seconds = [
                max(0.0, t[which] - fixed) / n for t, (_, n) in zip(times, cases, strict=True)
            ]
            # More rows never take less: what says so is noise.
            rising = [max(seconds[: i + 1]) for i in range(len(seconds))]
            found.append((Curve(tuple(rows for rows, _ in cases), tuple(rising)), fixed))
        return found

    def together(self) -> tuple[float, float]:
        """Seconds of the link for one expert while the host computes, and the part by which that
        slows the host down."""
        if self._device.type == "cpu":
            return 0.0, 0.0
        layout = self._layout
        limits = Limits.within(layout, compute_dtype(torch.bfloat16))
        at_a_time = self._share.streamed_at_a_time(layout.experts, limits)
        moved, stop = [0, 0.0], threading.Event()

        def stream() -> None:
            start = time.perf_counter()
            while not stop.is_set():
                chosen = list(range(layout.experts))
                moved[0] += self._share.stream(chosen, self._device, at_a_time)
            self._wait()
            moved[1] = time.perf_counter() - start

        rows, count = _CASES[2]
        alone = statistics.median(sum(self.on_host(rows, count)) for _ in range(_REPEATS))
        self._share.stream([0], self._device, at_a_time)
        working = aside(self._device, stream)
        try:
            times: list[float] = []
            end = time.perf_counter() + _TOGETHER_SECONDS
            while time.perf_counter() < end or len(times) < _REPEATS:
                times.append(sum(self.on_host(rows, count)))
        finally:
            stop.set()
            working.result()
        return moved[1] / max(1, moved[0]), max(0.0, statistics.median(times) / alone - 1.0)
