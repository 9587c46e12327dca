"""Measures one layer of Qwen3-30B-A3B's experts on a long sequence: time, and memory at its peak.

    python scripts/long_sequence.py [--tokens 131072] [--rank 8]

The process's own peak is read from the system: packed weights, the sequence, what forward keeps for
backward, gradients and temporary memory together.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from kt_sft.kernels import (
    Call,
    Engine,
    ExpertWeights,
    Gate,
    Inputs,
    LoraFactors,
    WeightLayout,
    backward,
    backward_bytes,
    forward,
    kept_bytes,
    requested_isa,
    rows_within,
)
from kt_sft.machine.cpus import available_threads
from kt_sft.machine.memory import host_memory_bytes, peak_memory_bytes

LAYOUT = WeightLayout(128, 2048, 768, "int8")
TOP_K = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--rank", type=int, default=8)
    arguments = parser.parse_args(argv)
    tokens, rank = arguments.tokens, arguments.rank
    engine = Engine(available_threads(), requested_isa("auto"))
    weights = ExpertWeights(LAYOUT)
    for expert in range(LAYOUT.experts):
        for projection in LAYOUT.projections:
            matrix = torch.randn(LAYOUT.shape(projection)) * LAYOUT.shape(projection)[1] ** -0.5
            weights.pack(engine, expert, projection, matrix)

    def lora(projection: str) -> LoraFactors:
        outputs, inputs = LAYOUT.shape(projection)
        a = torch.randn(LAYOUT.experts, rank, inputs) * inputs**-0.5
        return LoraFactors(a, torch.randn(LAYOUT.experts, outputs, rank) * 0.1, 2.0)

    gate, up, down = (lora(p) for p in LAYOUT.projections)
    hidden = torch.randn(tokens, LAYOUT.hidden, dtype=torch.bfloat16)
    index = torch.rand(tokens, LAYOUT.experts).topk(TOP_K, dim=1).indices
    inputs = Inputs(hidden, index, torch.full((tokens, TOP_K), 1 / TOP_K), (gate, up, down))
    before = host_memory_bytes()
    sys.stdout.write(f"{engine.isa}, {engine.threads} threads, {tokens:,} tokens\n\n")
    sys.stdout.write("| | value |\n|---|---|\n")
    call = Call("exact", Gate(), max_rows=rows_within(LAYOUT, "exact"))
    start = time.perf_counter()
    _, kept, _ = forward(engine, weights, call, inputs, keep=True)
    there = time.perf_counter()
    assert kept is not None
    backward(engine, weights, call, inputs, hidden, kept)
    end = time.perf_counter()
    rows = tokens * TOP_K
    counts = {
        max_rows: backward_bytes(
            LAYOUT, "exact", tokens, TOP_K, torch.bfloat16, [rank] * 3, shared=False,
            isa=engine.isa, threads=engine.threads, max_rows=max_rows,
        )
        for max_rows in (call.max_rows, 0)
    }  # fmt: skip
    table = {
        "forward": f"{there - start:.1f} s",
        "backward": f"{end - there:.1f} s",
        "routed rows at a time": f"{call.max_rows:,} of {rows:,}",
        "kept from forward to backward": f"{kept_bytes(LAYOUT, rows, [rank] * 3) / 1e9:.2f} GB",
        "temporary, counted": f"{counts[call.max_rows] / 1e9:.2f} GB",
        "temporary with all rows at once, counted": f"{counts[0] / 1e9:.2f} GB",
        "taken above weights, LoRA and sequence, at most": (
            f"{(peak_memory_bytes() - before) / 1e9:.2f} GB"
        ),
    }
    sys.stdout.write("".join(f"| {name} | {value} |\n" for name, value in table.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
