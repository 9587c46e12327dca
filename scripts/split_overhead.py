"""What parting a layer costs when the accelerator's twin is the CPU: medians of interleaved calls.

    python scripts/split_overhead.py [--tokens N] [--rounds N] [--threads N]

One layer of Qwen3-30B-A3B's shape, int8, LoRA of rank 8, forward and backward: the host's engine
alone; the same behind a policy that leaves everything to it; and with one expert of 32 computed by
torch on the CPU, whose arithmetic is not meant to be fast there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

from kt_sft.engines.cpu import CpuEngine
from kt_sft.engines.protocol import PlacedExperts
from kt_sft.engines.split import PartedEngine
from kt_sft.kernels import Call, Engine, ExpertWeights, Gate, Inputs, LoraFactors, WeightLayout
from kt_sft.machine.cpus import available_threads
from kt_sft.scheduling.assignment import Assignment, Policy
from kt_sft.scheduling.costs import Curve, EndsFirst, LayerCosts, PassCosts

LAYOUT = WeightLayout(32, 2048, 768, "int8")
TOP_K, RANK = 8, 8


class One:
    """Implements Policy: expert 0 is streamed."""

    def assign(self, *_: object) -> Assignment:
        """See Policy."""
        return Assignment(streamed=(0,))


def step_of(experts: PlacedExperts, inputs: Inputs) -> Callable[[], None]:
    """A forward and its backward."""
    call = Call("exact", Gate())

    def step() -> None:
        done = experts.forward(call, inputs, None, keep=True)
        assert done.context is not None
        experts.backward(done.context, done.out_TD, None)

    return step


def main(argv: Sequence[str] | None = None) -> int:
    """A Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=available_threads())
    arguments = parser.parse_args(argv)
    engine, drawn = CpuEngine(Engine(arguments.threads)), torch.Generator().manual_seed(0)
    weights = ExpertWeights(LAYOUT)
    for expert in range(LAYOUT.experts):
        for p in LAYOUT.projections:
            matrix = torch.randn(LAYOUT.shape(p), generator=drawn) * 0.02
            weights.pack(engine.packer, expert, p, matrix)
    lora = [
        LoraFactors(
            torch.randn(LAYOUT.experts, RANK, i, generator=drawn) * 0.02,
            torch.randn(LAYOUT.experts, o, RANK, generator=drawn) * 0.02,
            1.0,
        )
        for o, i in map(LAYOUT.shape, LAYOUT.projections)
    ]
    tokens = arguments.tokens
    inputs = Inputs(
        torch.randn(tokens, LAYOUT.hidden, generator=drawn).bfloat16(),
        torch.rand(tokens, LAYOUT.experts, generator=drawn).topk(TOP_K).indices,
        torch.rand(tokens, TOP_K, generator=drawn),
        (lora[0], lora[1], lora[2]),
    )
    free = Curve((1, 512), (1e-9, 1e-9))
    host_wins = PassCosts(free, Curve((1, 512), (1.0, 1.0)), 0.0, 1.0, stream=1.0)
    all_here: Policy = EndsFirst(LayerCosts(host_wins, host_wins))
    ways = {
        "host": step_of(engine.on(weights), inputs),
        "parted, all on the host": step_of(
            PartedEngine(engine, lambda *_: all_here).on(weights), inputs
        ),
        "parted, one expert by torch": step_of(
            PartedEngine(engine, lambda *_: One()).on(weights), inputs
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds + 1):
        for name, step in ways.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["host"][1:])
    lines = [f"{tokens} tokens, {arguments.threads} threads", "| | ms | ratio |", "|---|---|---|"]
    for name, times in seconds.items():
        median = statistics.median(times[1:])
        lines.append(f"| {name} | {1e3 * median:.1f} | {median / base:.3f} |")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
