"""Measures the kernels against their targets and prints a Markdown table.

    python scripts/kernel_targets.py [--rounds 5] [--threads N]

Every fraction is of a rate measured between the rounds of the same run. The layer is
Qwen3-30B-A3B's; T = 2048 gives 128 rows for each expert, T = 512 gives 32.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator

# Before torch loads OpenMP, whose waiting threads would spin on the experts' cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from kt_sft.bench.case import LayerCase, LayerData, one_expert
from kt_sft.bench.layer import OurLayer, default_threads, measure_layer
from kt_sft.kernels import (
    Call,
    Engine,
    ExpertWeights,
    Gate,
    Inputs,
    WeightLayout,
    backward,
    forward,
    isa_report,
    requested_isa,
)
from kt_sft.kernels.peak import ReadBandwidth
from kt_sft.machine.report import cpu_name

# Row of the table: (what, changes of the case, forward target, backward target).
FRACTIONS = (
    ("exact, 128 rows, no LoRA", {"rank": 0}, 0.85, 0.82),
    ("exact, 128 rows, LoRA r=8", {}, 0.82, 0.77),
    ("exact, 32 rows, LoRA", {"tokens": 512}, 0.76, 0.68),
    ("int8 mode, 128 rows, no LoRA", {"rank": 0, "compute": "int8"}, 0.78, 0.74),
    ("int8 mode, 128 rows, LoRA", {"compute": "int8"}, 0.74, 0.68),
    ("bf16 weights, 128 rows, LoRA", {"weights": "bf16"}, 0.82, 0.75),
    ("int4 g128, exact, 128 rows, LoRA", {"weights": "int4_g128"}, 0.80, 0.75),
    ("int4 g32, exact, 128 rows, LoRA", {"weights": "int4_g32"}, None, None),
    ("AVX2, exact, 128 rows, LoRA", {"isa": "avx2"}, 0.6, 0.55),
    ("AVX-VNNI, exact, 128 rows, LoRA", {"isa": "avx_vnni"}, None, None),
    ("AVX-512 without VNNI, exact, LoRA", {"isa": "avx512"}, None, None),
)


def fractions(threads: int, rounds: int) -> Iterator[tuple[str, float, float | None]]:
    """(what, measured, target) of each direction."""
    usable = {name for name, missing in isa_report() if not missing}
    for what, changes, *targets in FRACTIONS:
        case = LayerCase(threads=threads, rounds=rounds, **changes)
        if case.isa not in usable | {"auto"}:
            continue
        result = measure_layer(case)
        for direction, target in zip(("forward", "backward"), targets, strict=True):
            what_ms = f"{what}: {direction}, of peak ({result[f'{direction}_ms']:.0f} ms)"
            yield what_ms, result[f"{direction}_of_peak"], target


def medians(rounds: int, *runs: Callable[[], float]) -> list[float]:
    """Of interleaved runs, after one warm-up of each."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for own, run in zip(times, runs, strict=True):
            own.append(run())
    return [statistics.median(own) for own in times]


def skew(threads: int, rounds: int) -> float:
    """Throughput with half of all rows at one expert, of that with balanced routing."""
    layers = []
    for share in (0.0, 0.5):
        case = LayerCase(threads=threads, skew=share)
        layers.append(OurLayer(case, LayerData.make(case)))

    def run(layer: OurLayer) -> float:
        start = time.perf_counter()
        layer.forward()
        layer.backward()
        return time.perf_counter() - start

    balanced, skewed = medians(rounds, lambda: run(layers[0]), lambda: run(layers[1]))
    return balanced / skewed


def transposed_copy(rows: int, compute: str, threads: int, rounds: int) -> float:
    """Time of a backward product over that of the same product from a transposed copy.

    Without a gate, down's forward product and up's backward product have the same shape: the first
    reads its weights as they lie, as a transposed copy of the second would be read.
    """
    experts, hidden, intermediate = 64, 2048, 768
    engine = Engine(threads)
    weights = ExpertWeights(WeightLayout(experts, hidden, intermediate, "int8", gated=False))
    one = one_expert(LayerCase())
    for expert in range(experts):
        for name in weights.projections:
            weights.pack(engine, expert, name, one[name])
    hidden_TD = torch.randn(experts * rows, hidden)
    index_TK = torch.arange(experts).repeat(rows).unsqueeze(1)
    weight_TK = torch.ones(experts * rows, 1)
    call = Call(compute, Gate("relu2", gated=False))
    inputs = Inputs(hidden_TD, index_TK, weight_TK)
    ratios = []
    for _ in range(rounds + 1):
        _, kept, there = forward(engine, weights, call, inputs, keep=True)
        _, back = backward(engine, weights, call, inputs, hidden_TD, kept)
        ratios.append(back.phase_ms["d_x"] / there.phase_ms["down"])
    return statistics.median(ratios[1:])


def decode(weights: str, threads: int, rounds: int) -> tuple[float, float]:
    """Bandwidth at T = 1, forward and backward, of that of plain reads of the same size.

    Other layers' weights are read in between, so that nothing comes from the caches.
    """
    case = LayerCase(tokens=1, rank=0, threads=threads, weights=weights, compute="int8")
    layers = [
        OurLayer(case, LayerData.make(LayerCase(tokens=1, rank=0, seed=seed))) for seed in range(16)
    ]
    reads = ReadBandwidth(requested_isa("auto"), threads)

    def sweep(direction: str) -> float:
        seconds = 0.0
        for layer in layers:
            if direction == "backward" and layer.needs_forward:
                layer.forward()
        for layer in layers:
            start = time.perf_counter()
            getattr(layer, direction)()
            seconds += time.perf_counter() - start
        return sum(layer.active_bytes for layer in layers) / seconds

    rates = medians(rounds * 4, lambda: sweep("forward"), lambda: sweep("backward"), reads.measure)
    return rates[0] / rates[2], rates[1] / rates[2]


def packing(threads: int, rounds: int) -> float:
    """Bandwidth of packing bf16 to int8 (3 bytes a weight), of that of copying (2 a byte)."""
    engine = Engine(threads)
    source = torch.randn(8192, 8192).bfloat16()
    weights = ExpertWeights(WeightLayout(1, 8192, 8192, "int8", gated=False))
    target = torch.empty_like(source)
    torch.set_num_threads(threads)

    def pack() -> float:
        start = time.perf_counter()
        weights.pack(engine, 0, "up_proj", source)
        return 3 * source.numel() / (time.perf_counter() - start)

    def copy() -> float:
        start = time.perf_counter()
        target.copy_(source)
        return 4 * source.numel() / (time.perf_counter() - start)

    packed, copied = medians(rounds, pack, copy)
    return packed / copied


def rows(threads: int, rounds: int) -> Iterator[tuple[str, float, float | None]]:
    """Every line of the table."""
    yield from fractions(threads, rounds)
    yield "half of all rows at one expert: throughput of balanced", skew(threads, rounds), 0.85
    for weights in ("int8", "bf16", "int4_g128"):
        forward, backward = decode(weights, threads, rounds)
        yield f"decode, {weights}: forward, of read bandwidth", forward, 0.9
        yield f"decode, {weights}: backward, of read bandwidth", backward, 0.8
    for compute in ("exact", "int8"):
        for count in (1, 8, 16, 32, 64, 128):
            ratio = transposed_copy(count, compute, threads, rounds)
            yield f"{compute}, {count} rows: transposed copy over ours", 1 / ratio, 1 / 1.15
    yield "packing, of copy bandwidth", packing(threads, rounds), 0.8


def main() -> None:
    """Prints the table line by line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=default_threads())
    arguments = parser.parse_args()
    sys.stdout.write(
        f"{cpu_name()}, {arguments.threads} threads, {requested_isa('auto')} kernels, "
        f"medians of {arguments.rounds} rounds\n\n| | measured | target |\n|---|---|---|\n"
    )
    for what, value, target in rows(arguments.threads, arguments.rounds):
        mark = "" if target is None else f"{target:.2f}" + (" missed" if value < target else "")
        sys.stdout.write(f"| {what} | {value:.2f} | {mark} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
