"""Time of one layer of routed experts, forward and backward, alone or against a peer.

Legend: T tokens, D hidden size, F intermediate size, E experts, K top-k, r LoRA rank.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kt_sft.bench.torch_peer import TorchExpertsLoop, keep_freed_memory
from kt_sft.cpu_budget import available_threads
from kt_sft.host import cpu_name
from kt_sft.kernels import PROJECTIONS, Engine, ExpertWeights, Gate, LoraFactors

# forward() then backward(), each timed.
Runner = tuple[Callable[[], Any], Callable[[], Any]]


@dataclass(frozen=True)
class LayerCase:
    """What is measured."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    tokens: int
    rank: int
    weights: str
    compute: str
    threads: int
    isa: str
    rounds: int
    seed: int = 0

    @property
    def arithmetic(self) -> str:
        """The kernels' compute mode."""
        return "bf16" if self.weights == "bf16" else self.compute

    @property
    def flops(self) -> float:
        """Of one direction: three frozen products of T * K rows."""
        return 6.0 * self.tokens * self.top_k * self.hidden * self.intermediate


@dataclass(frozen=True)
class LayerData:
    """The same inputs for everyone."""

    hidden_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    d_out_TD: Tensor
    lora: list[LoraFactors | None]

    @classmethod
    def make(cls, case: LayerCase) -> LayerData:
        """Gaussian activations in bf16, each token's experts drawn without replacement."""
        generator = torch.Generator().manual_seed(case.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        scores = torch.rand(case.tokens, case.experts, generator=generator)
        lora: list[LoraFactors | None] = [None, None, None]
        if case.rank:
            widths = [(case.intermediate, case.hidden)] * 2 + [(case.hidden, case.intermediate)]
            lora = [
                LoraFactors(
                    normal(case.experts, case.rank, inputs) / inputs**0.5,
                    normal(case.experts, outputs, case.rank) * 0.05,
                    2.0,
                )
                for outputs, inputs in widths
            ]
        return cls(
            hidden_TD=normal(case.tokens, case.hidden).bfloat16(),
            index_TK=scores.topk(case.top_k).indices,
            weight_TK=torch.rand(case.tokens, case.top_k, generator=generator),
            d_out_TD=normal(case.tokens, case.hidden).bfloat16(),
            lora=lora,
        )


def _weights(case: LayerCase) -> dict[str, Tensor]:
    """One expert's projections; all experts share the values, not the memory."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    wide = (case.intermediate, case.hidden)
    shapes = {"gate_proj": wide, "up_proj": wide, "down_proj": wide[::-1]}
    return {
        name: (torch.randn(*shape, generator=generator) / shape[1] ** 0.5).bfloat16()
        for name, shape in shapes.items()
    }


def _our_runner(case: LayerCase, data: LayerData, phases: dict[str, Any]) -> tuple[Runner, float]:
    engine = Engine(case.threads, case.isa)
    weights = ExpertWeights(case.experts, case.hidden, case.intermediate, case.weights)
    one = _weights(case)
    for expert in range(case.experts):
        for name in PROJECTIONS:
            weights.pack(engine, expert, name, one[name])
    arguments: dict[str, Any] = {
        "compute": case.arithmetic,
        "gate": Gate(),
        "lora": data.lora,
    }
    state: dict[str, Any] = {}

    def forward() -> None:
        _, state["kept"], report = engine.forward(
            weights, data.hidden_TD, data.index_TK, data.weight_TK, keep=True, **arguments
        )
        phases["forward"] = report.phase_ms

    def backward() -> None:
        *_, report = engine.backward(
            weights,
            data.hidden_TD,
            data.index_TK,
            data.weight_TK,
            data.d_out_TD,
            state.pop("kept"),
            **arguments,
        )
        phases["backward"] = report.phase_ms

    count = 3 * case.experts * case.hidden * case.intermediate
    return (forward, backward), weights.nbytes / count


def _time(runner: Runner) -> tuple[float, float]:
    start = time.perf_counter()
    runner[0]()
    middle = time.perf_counter()
    runner[1]()
    return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)


def _rounds(case: LayerCase, runners: dict[str, Runner]) -> dict[str, tuple[float, float]]:
    """Median (forward, backward) milliseconds; one warm-up, then all runners in turn."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    for runner in runners.values():
        _time(runner)
    for _ in range(case.rounds):
        for name, runner in runners.items():
            times[name].append(_time(runner))
    return {
        name: (statistics.median(t[0] for t in ts), statistics.median(t[1] for t in ts))
        for name, ts in times.items()
    }


def measure_layer(case: LayerCase, versus: str | None = None) -> dict[str, Any]:
    """One JSON-ready result. `versus` "torch": a per-expert loop in bf16 with the same LoRA.

    The peer is timed with malloc as it is and with malloc told to keep freed memory; the ratio is
    claimed against the better.
    """
    data = LayerData.make(case)
    phases: dict[str, Any] = {}
    ours, bytes_per_weight = _our_runner(case, data, phases)
    runners = {"kt_sft": ours}
    if versus == "torch":
        torch.set_num_threads(case.threads)
        peer = TorchExpertsLoop(
            _weights(case), case.experts, data.index_TK, data.weight_TK, data.lora
        )
        runners["torch"] = peer.runner(data.hidden_TD, data.d_out_TD)
    medians = _rounds(case, runners)
    forward, backward = medians["kt_sft"]
    result: dict[str, Any] = {
        **{
            name: getattr(case, name)
            for name in ("hidden", "intermediate", "experts", "top_k", "tokens", "rank")
        },
        "weights": case.weights,
        "compute": case.arithmetic,
        "forward_ms": round(forward, 3),
        "backward_ms": round(backward, 3),
        "forward_tflops": round(case.flops / forward / 1e9, 4),
        "backward_tflops": round(case.flops / backward / 1e9, 4),
        "bytes_per_weight": round(bytes_per_weight, 4),
        "isa": Engine(1, case.isa).isa,
        "threads": case.threads,
        "rounds": case.rounds,
        "cpu": cpu_name(),
        "phase_ms": {
            direction: {name: round(ms, 2) for name, ms in named.items()}
            for direction, named in phases.items()
        },
    }
    if versus == "torch":
        plain = medians["torch"]
        result["torch"] = {"forward_ms": round(plain[0], 1), "backward_ms": round(plain[1], 1)}
        keep_freed_memory()
        tuned = _rounds(case, runners)
        result["torch_keeping_freed_memory"] = {
            "forward_ms": round(tuned["torch"][0], 1),
            "backward_ms": round(tuned["torch"][1], 1),
        }
        ratios = [sum(m["torch"]) / sum(m["kt_sft"]) for m in (medians, tuned)]
        result["ratio_to_torch"] = round(min(ratios), 2)
    return result


def default_threads() -> int:
    """Threads when the command line does not say."""
    return available_threads(local_ranks=1)
