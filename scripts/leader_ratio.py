"""Would one rank that computes the experts for all ranks of a machine be faster than each its own?

    python scripts/leader_ratio.py [--rounds 15]

Two processes compute half of the tokens each, at once, with half of the threads, against one
process with all threads and all tokens: what a leader would do, without its cost of collecting
tokens and handing back results. Each has a copy of the weights, many times larger than the
caches. The two take turns; printed are medians of forward and backward together and the ratio.
Above 1 the leader wins.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection

import torch

from kt_sft.bench.case import LayerCase, LayerData
from kt_sft.bench.layer import OurLayer
from kt_sft.machine.report import cpu_name

TOKENS = (2, 4, 8, 16, 64, 256, 2048)


def serve(case: LayerCase, orders: Connection) -> None:
    """A rank: answers every order with the seconds of one forward and backward."""
    torch.set_num_threads(1)
    layer = OurLayer(case, LayerData.make(case))
    orders.send(True)
    while orders.recv():
        start = time.perf_counter()
        layer.forward()
        layer.backward()
        orders.send(time.perf_counter() - start)


def main() -> None:
    """One line for each number of tokens of the machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2, help="of the machine")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")

    def start(tokens: int, threads: int, seed: int) -> Connection:
        ours, theirs = context.Pipe()
        case = LayerCase(tokens=tokens, threads=threads, seed=seed)
        context.Process(target=serve, args=(case, theirs), daemon=True).start()
        ours.recv()
        return ours

    print(f"{cpu_name()}, {arguments.threads} threads, medians of {arguments.rounds}")
    print("| tokens | each its own ms | leader ms | own / leader |\n|---|---|---|---|")
    for tokens in TOKENS:
        pair = [start(tokens // 2, arguments.threads // 2, seed) for seed in (0, 1)]
        leader = [start(tokens, arguments.threads, 0)]
        times: dict[str, list[float]] = {"own": [], "leader": []}
        for i in range(arguments.rounds + 2):
            for name, ranks in (("own", pair), ("leader", leader)):
                for rank in ranks:
                    rank.send(True)
                slowest = max(rank.recv() for rank in ranks)
                if i >= 2:
                    times[name].append(slowest)
        for rank in (*pair, *leader):
            rank.send(False)
        own, one = (statistics.median(times[name]) for name in ("own", "leader"))
        print(f"| {tokens} | {1e3 * own:.2f} | {1e3 * one:.2f} | {own / one:.2f} |")


if __name__ == "__main__":
    main()
