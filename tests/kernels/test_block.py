"""The whole experts block, forward and backward, against fp64 on the same packed bytes.

Legend: T tokens, D hidden size, F intermediate size, E experts, K top-k, r LoRA rank.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comparators import assert_matches, crest_factor, tolerance
from isas import ISAS, NATIVE, make_engine
from layer_calls import run_backward, run_forward
from reference import Experts64, dropout_keep
from torch import Tensor

from kt_sft.errors import KernelArgumentError
from kt_sft.kernels import (
    PROJECTIONS,
    Call,
    CodedMatrix,
    Coding,
    Engine,
    ExpertWeights,
    Gate,
    Inputs,
    LoraFactors,
    WeightLayout,
    backward,
    backward_bytes,
    forward,
)
from kt_sft.kernels.formats import SCALE_DTYPES

MODES = [
    ("int8", "exact"),
    ("int8", "int8"),
    ("int4_g32", "exact"),
    ("int4_g128", "int8"),
    ("bf16", "bf16"),
]
# Published codings; the first ones go through every test.
CODINGS = {
    "mxfp4": Coding("e2m1", "e8m0", 1, 32),
    "fp8_blocks": Coding("e4m3", "float32", 128, 128),
    "uint4_zeros": Coding("uint4", "float16", 1, 64, zeros=True),
    "fp8_channels": Coding("e4m3", "bfloat16", 1, 0),
    "int4_symmetric": Coding("uint4", "bfloat16", 1, 32),
    "int4_coarse": Coding("uint4", "bfloat16", 1, 128),
    "int8_groups": Coding("uint8", "float32", 1, 128),
    "int8_zeros": Coding("uint8", "float16", 1, 32, zeros=True),
}
MODES += [(name, "bf16") for name in ("mxfp4", "fp8_blocks", "uint4_zeros")]


def random_codes(coding: Coding, outputs: int, inputs: int, g: torch.Generator) -> CodedMatrix:
    """Any codes but NaN, with scales that make the weights about as large as trained ones."""
    codes = torch.randint(0, 1 << coding.bits, (outputs, inputs), generator=g).to(torch.uint8)
    if coding.codes == "e4m3":  # without exponents that leave all others behind
        codes = (codes & 0x8F) | 0x30
    along_inputs, along_outputs = coding.groups(outputs, inputs)
    shape = (along_outputs, along_inputs)
    zeros = None
    if coding.zeros:
        zeros = torch.randint(0, 1 << coding.bits, shape, generator=g).to(torch.uint8)
    unit = {"e4m3": 0.6, "e2m1": 3.0, "uint8": 74.0, "uint4": 4.6}[coding.codes]
    size = (1 + torch.rand(shape, generator=g)) / (1.5 * unit * inputs**0.5)
    if coding.scales == "e8m0":
        scales = (127 + size.log2().round()).to(torch.uint8)
    else:
        scales = size.to(SCALE_DTYPES[coding.scales])
    return CodedMatrix(coding, codes, scales, zeros)


ENGINES = {isa: make_engine(2, isa) for isa in ISAS}
MAX_ROWS = 2 * 32  # twice the tallest tile


SILU = Gate("swish")


@dataclass
class Block:
    weights: ExpertWeights
    dense: tuple[Tensor | None, ...]
    lora: list[LoraFactors | None]
    bias: tuple[Tensor | None, ...] = (None, None, None)
    references: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    @functools.lru_cache(maxsize=4)
    def shared(cls, *arguments: Any, **options: Any) -> Block:
        """A block that nobody changes: the instruction sets are compared with one reference."""
        return cls.make(*arguments, **options)

    @classmethod
    def make(
        cls, experts: int, hidden: int, intermediate: int, stored: str, rank: int, *,
        seed: int = 0, is_gated: bool = True, biased: bool = False,
        outliers: float = 0.0,
    ) -> Block:  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        coding = CODINGS.get(stored)
        weights = ExpertWeights(
            WeightLayout(
                experts, hidden, intermediate, "coded" if coding else stored, gated=is_gated,
                coding=coding,
                biased=frozenset(PROJECTIONS[not is_gated :] if biased else ()),
            )
        )  # fmt: skip
        engine = ENGINES["portable"]
        bias: dict[str, Tensor] = {}
        for p in weights.projections:
            outputs, inputs = weights.shape(p)
            for e in range(experts):
                if coding:
                    coded = random_codes(coding, outputs, inputs, g)
                    weights.pack_codes(engine, e, p, coded)
                    # One rounding to bf16, as the format's own library does.
                    dequantized = coded.dequantize().bfloat16().float()
                    assert torch.equal(weights.unpack(e, p), dequantized)
                    continue
                w = torch.randn(outputs, inputs, generator=g) / inputs**0.5
                if outliers:
                    w[:, :: inputs // 3] *= outliers
                weights.pack(engine, e, p, w)
            if biased:
                bias[p] = torch.randn(experts, outputs, generator=g)
                for e in range(experts):
                    weights.set_bias(e, p, bias[p][e])
        dense = tuple(
            torch.stack([weights.unpack(e, p) for e in range(experts)]).double()
            if p in weights.projections
            else None
            for p in PROJECTIONS
        )
        lora: list[LoraFactors | None] = [None] * 3
        if rank:
            lora = [
                LoraFactors(
                    torch.randn(experts, rank, i, generator=g) / i**0.5,
                    torch.randn(experts, o, rank, generator=g) / rank**0.5,
                    0.7,
                )
                if p in weights.projections
                else None
                for p, (o, i) in zip(PROJECTIONS, map(weights.shape, PROJECTIONS), strict=True)
            ]
        bias64 = tuple(bias[p].double() if p in bias else None for p in PROJECTIONS)
        return cls(weights, dense, lora, bias64)


def gradient_of(hidden: Tensor) -> Tensor:
    """The gradient of the output in every check."""
    return torch.randn(hidden.shape, generator=torch.Generator().manual_seed(9))


def reference_of(
    block: Block,
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    gate: Gate,
    dropout: float,
    seed: int,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Output, gradients and the size of those of the weights; computed once for every block."""
    bits = tuple(t.numpy().tobytes() for t in (hidden, index, weight))
    key = (bits, tuple(hidden.shape), tuple(index.shape), gate, dropout, seed)
    if key not in block.references:
        block.references[key] = compute_reference(block, hidden, index, weight, gate, dropout, seed)
    return block.references[key]


def compute_reference(
    block: Block,
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    gate: Gate,
    dropout: float,
    seed: int,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    d_out = gradient_of(hidden)
    lora64 = tuple(
        f and (f.a.double().requires_grad_(), f.b.double().requires_grad_(), f.scaling)
        for f in block.lora
    )
    x64 = hidden.double().requires_grad_()
    w64 = weight.double().requires_grad_()
    keep = dropout_keep(seed, dropout) if dropout else None
    want = Experts64(block.dense, gate, lora64, keep, block.bias)(x64, index, w64)
    leaves = [x64, w64, *(t for f in lora64 if f for t in f[:2])]
    grads = torch.autograd.grad(want, leaves, d_out.double(), allow_unused=True)
    grads = [
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)
    ]
    ones = torch.ones(len(index), 1, dtype=torch.float64)
    size_of_y = [
        Experts64(block.dense, gate, lora64, keep, block.bias)(x64, index[:, k : k + 1], ones)
        .norm(dim=1)
        .detach()
        for k in range(index.shape[1] if not dropout else 0)
    ]
    typical = None
    if size_of_y:
        size_of_d_out = d_out.double().norm(dim=1, keepdim=True)
        typical = torch.stack(size_of_y, 1) * size_of_d_out / hidden.shape[1] ** 0.5
    return want.detach(), grads, typical


def check(
    block: Block,
    isa: str,
    compute: str,
    hidden: Tensor,
    index: Tensor,
    weight: Tensor,
    gate: Gate = SILU,
    dropout: float = 0.0,
    seed: int = 0,
    bound_scale: float = 1.0,
) -> None:
    """Forward and every gradient of one call against the reference."""
    engine = ENGINES[isa]
    arguments = {
        "compute": compute,
        "gate": gate,
        "lora": block.lora,
        "dropout": dropout,
        "dropout_seed": seed,
    }
    out, kept, _ = run_forward(engine, block.weights, hidden, index, weight, keep=True, **arguments)
    assert kept is not None
    d_out = gradient_of(hidden)
    d_hidden, d_weight, d_lora, _ = run_backward(
        engine, block.weights, hidden, index, weight, d_out, kept, **arguments
    )

    want, grads, typical = reference_of(block, hidden, index, weight, gate, dropout, seed)

    # Worst rows: the inputs, and h, whose gated product is peakier than they are when narrow.
    crest = max(crest_factor(hidden, d_out), 4.0)
    bound = bound_scale * tolerance(compute, crest, 3)
    assert_matches(out, want, bound, "out")
    assert_matches(d_hidden, grads[0], bound, "d_hidden")
    assert_matches(d_weight, grads[1], bound, "d_weight", typical)
    got = [t for pair in d_lora if pair for t in pair]
    for i, (g, w) in enumerate(zip(got, grads[2:], strict=True)):
        used = w.flatten(1).abs().amax(1) > 0
        assert_matches(g[used], w[used], bound, f"LoRA gradient {i}")
        assert torch.count_nonzero(g[~used]) == 0, "idle experts must get zeros"


def inputs(tokens: int, hidden: int, experts: int, top_k: int, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=g)
    scores = torch.rand(tokens, experts, generator=g)
    return x, scores.topk(top_k).indices, torch.rand(tokens, top_k, generator=g) + 0.1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("stored", "compute"), MODES)
def test_every_row_count(isa: str, stored: str, compute: str) -> None:
    """One expert with 1 to twice the tile of rows, and a second with one."""
    block = Block.shared(3, 72, 40, stored, rank=4)
    ran = 0
    for rows in range(1, MAX_ROWS + 1):
        x, _, weight = inputs(rows, 72, 3, 1)
        index = torch.zeros(rows, 1, dtype=torch.int64)
        if rows > 1:
            index[rows // 2] = 2
        check(block, isa, compute, x, index, weight)
        ran += 1
    assert ran == MAX_ROWS


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("stored", "compute"), MODES)
@pytest.mark.parametrize(
    ("hidden", "intermediate"), [(64, 64), (1, 1), (63, 65), (130, 33), (192, 320)]
)
def test_tails(isa: str, stored: str, compute: str, hidden: int, intermediate: int) -> None:
    # With a seed for which the adapter does not nearly cancel the only channel.
    block = Block.shared(4, hidden, intermediate, stored, rank=3, seed=2)
    x, index, weight = inputs(37, hidden, 4, 2)
    # With one channel nothing averages: the largest error of three roundings, not three deviations.
    scale = 3.0 if hidden == 1 else 1.0
    check(block, isa, compute, x, index, weight, bound_scale=scale)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rank", [0, 1, 2, 5, 8, 16, 33, 64, 512])
def test_ranks(isa: str, rank: int) -> None:
    block = Block.shared(4, 96, 80, "int8", rank)
    x, index, weight = inputs(29, 96, 4, 2)
    check(block, isa, "exact", x, index, weight)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("which", range(3))
def test_lora_on_one_projection_only(isa: str, which: int) -> None:
    block = Block.make(4, 96, 80, "int8", 4)
    block.lora = [f if i == which else None for i, f in enumerate(block.lora)]
    x, index, weight = inputs(29, 96, 4, 2)
    check(block, isa, "exact", x, index, weight)


GATES = {
    "silu": SILU,
    "quick_gelu": Gate("swish", alpha=1.702),
    "gelu": Gate("gelu"),
    "gelu_tanh": Gate("gelu_tanh"),
    "relu": Gate("relu"),
    "relu2": Gate("relu2"),
    "gpt_oss": Gate("swish", alpha=1.702, limit=0.8, up_offset=1.0),
    "clamped_silu": Gate("swish", limit=0.8),
    "ungated_relu2": Gate("relu2", gated=False),
    "ungated_silu": Gate("swish", gated=False),
    "ungated_clamped_gelu": Gate("gelu", gated=False, limit=0.8),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_gates_and_biases(isa: str, name: str, biased: bool) -> None:
    gate = GATES[name]
    block = Block.shared(4, 64, 96, "int8", 2, is_gated=gate.gated, biased=biased)
    x, index, weight = inputs(21, 64, 4, 2)
    check(block, isa, "exact", x, index, weight, gate=gate)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("stored", "compute"), MODES)
def test_without_gate_in_every_format(isa: str, stored: str, compute: str) -> None:
    block = Block.shared(4, 200, 72, stored, 3, is_gated=False, biased=True)
    x, index, weight = inputs(70, 200, 4, 2)
    check(block, isa, compute, x, index, weight, gate=GATES["ungated_relu2"])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("stored", "compute"), MODES)
def test_experts_with_more_rows_than_the_cache_holds(isa: str, stored: str, compute: str) -> None:
    """Skewed: one expert's rows are cut in blocks, the others have few."""
    hidden, tokens = 4096, 330  # at one byte an activation, 160 rows fill the cache
    block = Block.shared(4, hidden, 64, stored, 4)
    x, _, weight = inputs(tokens, hidden, 4, 2)
    index = torch.full((tokens, 2), 1)
    index[:, 1] = 4
    index[:5, 1] = torch.tensor([0, 2, 0, 2, 2])
    check(block, isa, compute, x, index, weight)


@pytest.mark.parametrize("isa", [isa for isa in NATIVE if isa != "portable"])
def test_arrays_that_are_written_past_the_caches(isa: str) -> None:
    block = Block.shared(2, 64, 64, "int8", 0)
    x, index, weight = inputs(50_000, 64, 2, 2)
    check(block, isa, "exact", x, index, weight)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("stored", "compute"), MODES)
def test_outliers(isa: str, stored: str, compute: str) -> None:
    """A few channels 100 times larger, in weights, activations and gradients.

    The arithmetic must stay within what rounding each row to its largest value allows.
    """
    block = Block.shared(3, 192, 128, stored, 0, outliers=100.0)
    x, index, weight = inputs(40, 192, 3, 2)
    x[:, ::64] *= 100
    check(block, isa, compute, x, index, weight, bound_scale=8.0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stored", list(CODINGS))
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 64), (130, 97), (200, 330)])
def test_published_codings(isa: str, stored: str, hidden: int, intermediate: int) -> None:
    block = Block.shared(3, hidden, intermediate, stored, 3, biased=True)
    x, index, weight = inputs(37, hidden, 3, 2)
    check(block, isa, "bf16", x, index, weight)


def test_codes_that_are_no_numbers_are_refused() -> None:
    g = torch.Generator().manual_seed(0)
    for name, harm, message in (
        ("fp8_blocks", lambda m: m.codes[5, 70:71].fill_(0xFF), r"weights: .* nan at \[5, 70\]"),
        ("fp8_channels", lambda m: m.scales[3].fill_(float("inf")), "scales: .* inf at"),
        ("mxfp4", lambda m: m.scales[3, 1:2].fill_(255), "scales: up_proj of expert 1"),
    ):
        coding = CODINGS[name]
        weights = ExpertWeights(WeightLayout(2, 130, 70, "coded", coding=coding))
        matrix = random_codes(coding, 70, 130, g)
        harm(matrix)
        with pytest.raises(ValueError, match=message):
            weights.pack_codes(ENGINES["portable"], 1, "up_proj", matrix)


@pytest.mark.parametrize("stored", ["int8", "bf16", "int4_g32", "int4_g128", *CODINGS])
def test_channels_can_be_taken_out(stored: str) -> None:
    """What a NUMA node or a resident copy gets is what lies in the whole layer."""
    whole = Block.make(3, 130, 330, stored, 0, biased=True).weights
    granule = whole.layout.channel_granule
    for first, last in ((0, 330), (granule, 330), (granule, 2 * granule)):
        part = ExpertWeights(whole.layout.part(last - first, down_bias=first == 0))
        part.take_channels(ENGINES["portable"], whole, first)
        for e in range(3):
            for p in PROJECTIONS:
                want = whole.unpack(e, p)
                want = want[:, first:last] if p == "down_proj" else want[first:last]
                assert torch.equal(part.unpack(e, p), want)
    with pytest.raises(ValueError, match="inside a group"):
        part = ExpertWeights(whole.layout.part(64, down_bias=False))
        part.take_channels(ENGINES["portable"], whole, 32)


@pytest.mark.parametrize("stored", ["int8", "int4_g128", "mxfp4", "uint4_zeros"])
def test_packed_memory_may_lie_elsewhere(stored: str) -> None:
    block = Block.make(3, 130, 97, stored, 2, biased=True)
    copies = {
        name: torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for name, data in block.weights.sections().items()
    }
    assert set(copies) == set(block.weights.layout.section_bytes())
    there = ExpertWeights(block.weights.layout, copies)
    x, index, weight = inputs(20, 130, 3, 2)
    compute = "bf16" if stored in CODINGS else "exact"
    arguments = {"compute": compute, "gate": SILU, "lora": block.lora}
    engine = ENGINES[ISAS[0]]
    first, _, _ = run_forward(engine, block.weights, x, index, weight, **arguments)
    second, _, _ = run_forward(engine, there, x, index, weight, **arguments)
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="read only"):
        there.set_bias(0, "up_proj", torch.zeros(97))
    with pytest.raises(KernelArgumentError, match="got the sections"):
        ExpertWeights(block.weights.layout, {"tiles": copies["tiles"]})


def test_int4_is_what_it_says() -> None:
    """Every weight is scale[n] * m * c with m of its group in 1..16 and c in -8..7."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(40, 300, generator=g) * torch.rand(40, 1, generator=g)
    w[:, 64:96] *= 5
    for group, bound in ((32, 0.12), (128, 0.16)):
        weights = ExpertWeights(WeightLayout(1, 300, 40, f"int4_g{group}"))
        weights.pack(ENGINES["portable"], 0, "up_proj", w)
        got = weights.unpack(0, "up_proj")
        for row in got:
            for part in row.split(group):
                assert part.unique().numel() <= 16
        assert (got - w).norm() / w.norm() < bound
        layout = WeightLayout(1, 2048, 768, f"int4_g{group}")
        bytes_per_weight = layout.nbytes / layout.weight_count
        assert bytes_per_weight < {32: 0.56, 128: 0.53}[group]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("stored", "compute"), MODES)
def test_routing_extremes(isa: str, stored: str, compute: str) -> None:
    block = Block.shared(5, 64, 64, stored, 4)
    x, _, weight = inputs(40, 64, 5, 2)
    all_to_one = torch.full((40, 2), 3)
    all_to_one[:, 1] = 5  # the sentinel: skipped
    check(block, isa, compute, x, all_to_one, weight)
    same_twice = torch.full((40, 2), 1)
    check(block, isa, compute, x, same_twice, weight)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("stored", "compute"), MODES)
def test_work_that_is_shared_among_threads(isa: str, stored: str, compute: str) -> None:
    """Every phase above the size below which one thread does it alone."""
    block = Block.shared(6, 256, 192, stored, 16)
    x, index, weight = inputs(600, 256, 6, 3)
    check(block, isa, compute, x, index, weight)


@pytest.mark.parametrize("isa", ISAS)
def test_no_tokens_and_no_rows(isa: str) -> None:
    block = Block.make(3, 64, 64, "int8", 2)
    check(
        block, isa, "exact", torch.empty(0, 64), torch.empty(0, 2, dtype=torch.int64),
        torch.empty(0, 2),
    )  # fmt: skip
    x, _, weight = inputs(4, 64, 3, 2)
    skipped = torch.full((4, 2), 3)
    out, kept, report = run_forward(
        ENGINES[isa], block.weights, x, skipped, weight, compute="exact", gate=SILU, keep=True
    )
    assert report.rows == 0 and torch.count_nonzero(out) == 0
    d_hidden, d_weight, _, _ = run_backward(
        ENGINES[isa], block.weights, x, skipped, weight, x, kept, compute="exact", gate=SILU
    )
    assert torch.count_nonzero(d_hidden) == 0 and torch.count_nonzero(d_weight) == 0


@pytest.mark.parametrize("isa", ISAS)
def test_dropout_follows_its_formula(isa: str) -> None:
    block = Block.make(4, 96, 80, "int8", 4)
    x, index, weight = inputs(33, 96, 4, 2)
    check(block, isa, "exact", x, index, weight, dropout=0.3, seed=2**61 + 12345)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hidden_states(isa: str, dtype: torch.dtype) -> None:
    """Half inputs are exact in fp32; the result is rounded once."""
    block = Block.make(4, 100, 64, "int8", 4)
    x, index, weight = inputs(19, 100, 4, 2)
    half = x.to(dtype)
    arguments = {"compute": "exact", "gate": SILU, "lora": block.lora}
    out, _, _ = run_forward(ENGINES[isa], block.weights, half, index, weight, **arguments)
    wide, _, _ = run_forward(ENGINES[isa], block.weights, half.float(), index, weight, **arguments)
    assert out.dtype == dtype
    assert torch.equal(out, wide.to(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("stored", "compute"), MODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_come_out(isa: str, stored: str, compute: str, bad: float) -> None:
    """A token with NaN or Inf poisons its own output, whole, and no other."""
    block = Block.make(3, 64, 64, stored, 2)
    x, index, weight = inputs(9, 64, 3, 2)
    x[4, 10] = bad
    out, _, _ = run_forward(
        ENGINES[isa], block.weights, x, index, weight, compute=compute, gate=SILU, lora=block.lora
    )
    finite = torch.isfinite(out)
    assert not finite[4].any()
    assert finite[torch.arange(9) != 4].all()


@pytest.mark.parametrize("isa", ISAS)
def test_results_do_not_depend_on_threads_or_repetition(isa: str) -> None:
    block = Block.make(6, 256, 192, "int8", 16)
    x, index, weight = inputs(600, 256, 6, 3)
    arguments = {"compute": "exact", "gate": SILU, "lora": block.lora}
    results = []
    for threads in (1, 2, 5, 5):
        engine = make_engine(threads, isa)
        out, kept, _ = run_forward(engine, block.weights, x, index, weight, keep=True, **arguments)
        d_hidden, d_weight, d_lora, _ = run_backward(
            engine, block.weights, x, index, weight, out, kept, **arguments
        )
        results.append([out, d_hidden, d_weight, *(t for pair in d_lora for t in pair)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_packed_weights_are_the_same_on_every_isa() -> None:
    for stored in ("int8", "bf16", "int4_g32", "int4_g128"):
        unpacked = []
        for isa in ISAS:
            g = torch.Generator().manual_seed(3)
            weights = ExpertWeights(WeightLayout(1, 130, 70, stored))
            for p in PROJECTIONS:
                weights.pack(ENGINES[isa], 0, p, torch.randn(weights.shape(p), generator=g))
            unpacked.append([weights.unpack(0, p) for p in PROJECTIONS])
        for other in unpacked[1:]:
            assert all(torch.equal(a, b) for a, b in zip(unpacked[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantization_error_of_the_store(dtype: torch.dtype) -> None:
    """Half a step of absmax / 127 per output channel, for every input dtype and strided rows."""
    w = torch.randn(70, 260, generator=torch.Generator().manual_seed(0)).to(dtype)[:, :130]
    weights = ExpertWeights(WeightLayout(2, 130, 70, "int8"))
    weights.pack(ENGINES[ISAS[0]], 1, "gate_proj", w)
    step = w.float().abs().amax(1, keepdim=True) / 127
    error = (weights.unpack(1, "gate_proj") - w.float()).abs()
    assert (error <= step * 0.5001).all()
    exact = ExpertWeights(WeightLayout(2, 130, 70, "bf16"))
    exact.pack(ENGINES[ISAS[0]], 1, "gate_proj", w)
    assert torch.equal(exact.unpack(1, "gate_proj"), w.bfloat16().float())


def test_weights_that_are_not_finite_are_refused() -> None:
    weights = ExpertWeights(WeightLayout(2, 64, 64, "int8"))
    bad = torch.ones(64, 64)
    bad[3, 7] = float("nan")
    with pytest.raises(ValueError, match=r"up_proj of expert 1 has nan at \[3, 7\]"):
        weights.pack(ENGINES["portable"], 1, "up_proj", bad)


@pytest.mark.parametrize("isa", ISAS)
def test_adjoint_identity(isa: str) -> None:
    """<J v, g> = <v, J' g>: backward is the transpose of forward's derivative."""
    block = Block.make(4, 96, 64, "int8", 4)
    x, index, weight = inputs(25, 96, 4, 2)
    g = torch.randn(25, 96, generator=torch.Generator().manual_seed(5))
    v = torch.randn(25, 96, generator=torch.Generator().manual_seed(6))
    lora64 = tuple(f and (f.a.double(), f.b.double(), f.scaling) for f in block.lora)
    reference = Experts64(block.dense, SILU, lora64)
    _, jv = torch.autograd.functional.jvp(
        lambda t: reference(t, index, weight.double()), x.double(), v.double()
    )
    arguments = {"compute": "exact", "gate": SILU, "lora": block.lora}
    _, kept, _ = run_forward(ENGINES[isa], block.weights, x, index, weight, keep=True, **arguments)
    jtg, _, _, _ = run_backward(ENGINES[isa], block.weights, x, index, weight, g, kept, **arguments
    )  # fmt: skip
    left, right = float((jv * g.double()).sum()), float((v.double() * jtg.double()).sum())
    scale = float(jv.norm() * g.double().norm())
    assert abs(left - right) <= tolerance("exact", 6.0, 3) * scale


def test_reference_gradients_by_finite_differences() -> None:
    block = Block.make(3, 5, 4, "int8", 2)
    lora64 = [
        (f.a.double().requires_grad_(), f.b.double().requires_grad_(), f.scaling)
        for f in block.lora
        if f
    ]
    x, index, weight = inputs(4, 5, 3, 2)
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    leaves += [t for f in lora64 for t in f[:2]]

    def run(*tensors: Tensor) -> Tensor:
        lora = tuple(
            (tensors[2 + 2 * i], tensors[3 + 2 * i], lora64[i][2]) for i in range(len(lora64))
        )
        return Experts64(block.dense, SILU, lora)(tensors[0], index, tensors[1])

    assert torch.autograd.gradcheck(run, leaves)


def results_of(isa: str, block: Block, compute: str, x, index, weight, d_out, **extra) -> list:
    """out, d_hidden, d_weight and the LoRA gradients."""
    arguments = {"compute": compute, "gate": SILU, "lora": block.lora, **extra}
    engine = ENGINES[isa]
    out, kept, _ = run_forward(engine, block.weights, x, index, weight, keep=True, **arguments)
    d_hidden, d_weight, d_lora, _ = run_backward(
        engine, block.weights, x, index, weight, d_out, kept, **arguments
    )
    return [out, d_hidden, d_weight, *(t for pair in d_lora if pair for t in pair)]


VNNI = [isa for isa in ISAS if isa in ("amx", "avx512_bf16", "avx512_vnni")]


@pytest.mark.skipif(len(VNNI) < 2, reason="fewer than two instruction sets with byte products")
@pytest.mark.parametrize(
    ("stored", "compute"), [m for m in MODES if m[1] != "bf16"] + [("int4_g32", "int8")]
)
@pytest.mark.parametrize("tokens", [1, 5, 47])
def test_amx_equals_vnni_to_the_last_bit(stored: str, compute: str, tokens: int) -> None:
    block = Block.make(3, 130, 97, stored, 5)
    x, index, weight = inputs(tokens, 130, 3, 2)
    d_out = torch.randn(tokens, 130, generator=torch.Generator().manual_seed(4))
    first, *others = (
        results_of(isa, block, compute, x, index, weight, d_out, dropout=0.1, dropout_seed=5)
        for isa in VNNI
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("stored", "compute"), MODES)
def test_isas_pairwise(stored: str, compute: str) -> None:
    """Integer products are the same everywhere; what is left is fp32 rounding.

    bf16 weights meet activations in bf16 or in fp32, by ISA.
    """
    block = Block.make(4, 200, 130, stored, 3)
    x, index, weight = inputs(33, 200, 4, 2)
    d_out = torch.randn(33, 200, generator=torch.Generator().manual_seed(4))
    results = {
        isa: results_of(isa, block, compute, x, index, weight, d_out) for isa in ISAS
    }  # fmt: skip
    # A last-bit difference of an activation may move its rounding by one step.
    bound = {"exact": 1e-4, "int8": 5e-3, "bf16": 1e-2}[compute]
    names = list(results)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            for got, want in zip(results[a], results[b], strict=True):
                assert_matches(got, want, bound, f"{a} against {b}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("stored", "compute"), MODES)
def test_backward_is_linear(isa: str, stored: str, compute: str) -> None:
    """Doubling the output gradient doubles every gradient, bit for bit; sums add up."""
    block = Block.make(4, 96, 80, stored, 4)
    x, index, weight = inputs(25, 96, 4, 2)
    g = torch.Generator().manual_seed(4)
    first, second = (torch.randn(25, 96, generator=g) for _ in range(2))
    once = results_of(isa, block, compute, x, index, weight, first)[1:]
    twice = results_of(isa, block, compute, x, index, weight, 2 * first)[1:]
    assert all(torch.equal(2 * a, b) for a, b in zip(once, twice, strict=True))
    other = results_of(isa, block, compute, x, index, weight, second)[1:]
    both = results_of(isa, block, compute, x, index, weight, first + second)[1:]
    for a, b, c in zip(once, other, both, strict=True):
        assert_matches(c, a + b, 2 * tolerance(compute, 4.0, 3), "sum")


@pytest.mark.parametrize("isa", ISAS)
def test_permutations(isa: str) -> None:
    """Tokens in another order give outputs in that order; renamed experts change nothing."""
    block = Block.make(5, 96, 80, "int8", 4)
    x, index, weight = inputs(41, 96, 5, 2)
    d_out = torch.randn(41, 96, generator=torch.Generator().manual_seed(4))
    plain = results_of(isa, block, "exact", x, index, weight, d_out)
    order = torch.randperm(41, generator=torch.Generator().manual_seed(1))
    moved = results_of(
        isa, block, "exact", x[order], index[order], weight[order], d_out[order]
    )  # fmt: skip
    for a, b in zip(plain[:3], moved[:3], strict=True):
        assert torch.equal(a[order], b)
    for a, b in zip(plain[3:], moved[3:], strict=True):
        assert_matches(b, a, 1e-5, "LoRA gradient")

    names = torch.tensor([3, 0, 4, 1, 2])  # expert e is now called names[e]
    renamed = Block.make(5, 96, 80, "int8", 4)
    for e in range(5):
        for p in PROJECTIONS:
            renamed.weights.pack(
                ENGINES[isa], int(names[e]), p, block.weights.unpack(e, p)
            )  # fmt: skip
    renamed.lora = [
        LoraFactors(f.a[names.argsort()], f.b[names.argsort()], f.scaling) for f in block.lora if f
    ]
    again = results_of(isa, renamed, "exact", x, names[index], weight, d_out)
    for a, b in zip(plain[:3], again[:3], strict=True):
        assert_matches(b, a, 1e-5, "renamed")
    for a, b in zip(plain[3:], again[3:], strict=True):
        assert_matches(b[names], a, 1e-5, "renamed LoRA gradient")


@pytest.mark.parametrize("stored", ["int8", "bf16", "int4_g32", "int4_g128", *CODINGS])
def test_a_layer_is_the_sum_of_its_experts_in_two_parts(stored: str) -> None:
    """Each part sees the other's experts as skipped; what both give adds up to the whole."""
    block = Block.make(5, 130, 70, stored, 3, biased=stored not in CODINGS)
    engine, layout = ENGINES["portable"], block.weights.layout
    compute = layout.arithmetic or "exact"
    x, index, weight = inputs(23, 130, 5, 2)
    d_out = torch.randn(23, 130, generator=torch.Generator().manual_seed(8))
    whole = results_of("portable", block, compute, x, index, weight, d_out)
    sums = [torch.zeros_like(t) for t in whole]
    for chosen in ([3, 0], [1, 2, 4]):
        part = ExpertWeights(replace(layout, experts=len(chosen)))
        part.take_experts(engine, block.weights, chosen)
        for here, there in enumerate(chosen):
            for p in layout.projections:
                assert torch.equal(part.unpack(here, p), block.weights.unpack(there, p))
        place = torch.full((6,), len(chosen))
        place[torch.tensor(chosen)] = torch.arange(len(chosen))
        lora = [f and LoraFactors(f.a[chosen], f.b[chosen], f.scaling) for f in block.lora]
        own = Block(part, block.dense, lora)
        found = results_of("portable", own, compute, x, place[index], weight, d_out)
        for total, one in zip(sums[:3], found[:3], strict=True):
            total += one
        for total, one in zip(sums[3:], found[3:], strict=True):
            total[chosen] += one
    for total, want in zip(sums, whole, strict=True):
        assert_matches(total, want, 1e-5, "sum of the parts")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("stored", "compute"), MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_limit_of_rows_changes_no_bit(
    isa: str, stored: str, compute: str, dtype: torch.dtype
) -> None:
    """Whatever runs of experts it makes: of one expert, of some, with idle ones, of all."""
    block = Block.make(7, 130, 70, stored, 3)
    x, index, weight = inputs(41, 130, 7, 3)
    index[index == 4] = 7  # skipped, so that expert 4 is idle
    index[::2, 0] = 1  # more rows than any limit but the largest
    index[5] = 7
    d_out = torch.randn(41, 130, generator=torch.Generator().manual_seed(8))
    arguments = (isa, block, compute, x.to(dtype), index, weight, d_out.to(dtype))
    drops = {"dropout": 0.2, "dropout_seed": 9}
    whole = results_of(*arguments, **drops)
    assert all(t.float().abs().sum() > 0 for t in whole)
    for limit in (1, 13, 30, 60, 10_000):
        parts = results_of(*arguments, **drops, max_rows=limit)
        different = [
            n for n, (a, b) in enumerate(zip(whole, parts, strict=True)) if not torch.equal(a, b)
        ]
        assert different == [], limit


def test_a_limit_of_rows_bounds_temporary_memory() -> None:
    """What a fresh engine keeps afterwards is what the call took; it is counted beforehand."""
    block = Block.make(8, 192, 128, "int8", 4)
    x, index, weight = inputs(600, 192, 8, 4)
    d_out = torch.randn(600, 192)
    taken = []
    for limit in (0, 700):
        call = Call("exact", SILU, max_rows=limit)
        given = Inputs(x, index, weight, tuple(block.lora))
        _, kept, _ = forward(ENGINES["portable"], block.weights, call, given, keep=True)
        engine = Engine(2, "portable")
        found = backward(engine, block.weights, call, given, d_out, kept)
        lora = sum(t.nbytes for pair in found[0].lora if pair for t in pair)
        del found
        taken.append(engine.cached_bytes - lora)
        counted = backward_bytes(
            block.weights.layout, "exact", 600, 4, torch.float32, [f.rank for f in block.lora],
            shared=False, isa="portable", threads=2, max_rows=limit,
        )  # fmt: skip
        # Of rows as even as can be, which random ones are not.
        assert 0.7 * taken[-1] <= counted <= 1.3 * taken[-1]
    assert taken[1] < 0.6 * taken[0]


@pytest.mark.parametrize("groups", [(1, 96), (48, 32), (48, 96)])
def test_channels_are_cut_where_tiles_and_groups_begin(groups: tuple[int, int]) -> None:
    """At common multiples of 64 and the groups, and nowhere else."""
    layout = WeightLayout(1, 96, 384, "coded", coding=Coding("e4m3", "float32", *groups))
    assert layout.channel_granule == 192
    whole, g = ExpertWeights(layout), torch.Generator().manual_seed(2)
    for p in PROJECTIONS:
        assert layout.coding is not None
        codes = random_codes(layout.coding, *layout.shape(p), g)
        whole.pack_codes(ENGINES["portable"], 0, p, codes)
    part = ExpertWeights(layout.part(192, down_bias=False))
    part.take_channels(ENGINES["portable"], whole, 192)
    for p, cut in zip(PROJECTIONS, (whole.unpack(0, p) for p in PROJECTIONS), strict=True):
        want = cut[:, 192:] if p == "down_proj" else cut[192:]
        assert torch.equal(part.unpack(0, p), want)
    for first in (64, 96):
        with pytest.raises(ValueError, match=f"channel {first} is inside a group of 192"):
            part.take_channels(ENGINES["portable"], whole, first)


def test_experts_of_another_layer_are_not_taken() -> None:
    weights = Block.make(3, 64, 64, "int8", 0).weights
    engine = ENGINES["portable"]
    part = ExpertWeights(replace(weights.layout, experts=2))
    for source, chosen, message in (
        (weights, [0, 3], "got expert 3, expected 0 to 2"),
        (weights, [0], "differ in more than their number"),
        (Block.make(3, 64, 64, "bf16", 0).weights, [0, 1], "differ in more than their number"),
        (Block.make(3, 128, 64, "int8", 0).weights, [0, 1], "differ in more than their number"),
    ):
        with pytest.raises(ValueError, match=message):
            part.take_experts(engine, source, chosen)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("hidden", [64, 100])
def test_a_shared_pair_is_that_pair_for_every_expert(isa: str, hidden: int) -> None:
    """To the last bit; its gradients come for every expert."""
    block = Block.make(4, hidden, 80, "int8", 5)
    x, index, weight = inputs(29, hidden, 4, 2)
    d_out = torch.randn(29, hidden, generator=torch.Generator().manual_seed(4))
    shared = [f and LoraFactors(f.a[:1].clone(), f.b[:1].clone(), f.scaling) for f in block.lora]
    copies = [
        f and LoraFactors(f.a.repeat(4, 1, 1), f.b.repeat(4, 1, 1), f.scaling) for f in shared
    ]
    found = [
        results_of(isa, replace(block, lora=lora), "exact", x, index, weight, d_out, dropout=0.2)
        for lora in (shared, copies)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def threads_of_the_process() -> set[Path]:
    return set(Path("/proc/self/task").iterdir())


def ticks(threads: set[Path]) -> int:
    """Processor time of these threads, in hundredths of a second."""
    stats = [(t / "stat").read_text().rpartition(")")[2].split() for t in threads]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats)


def test_idle_threads_cost_nothing() -> None:
    """After a call the workers sleep: soon there is a quarter of a second without any of them."""
    block = Block.make(4, 96, 80, "int8", 4)
    x, index, weight = inputs(200, 96, 4, 2)
    others = threads_of_the_process()
    engine = make_engine(4, "portable")
    run_forward(
        engine, block.weights, x, index, weight, compute="exact", gate=SILU, lora=block.lora
    )
    workers = threads_of_the_process() - others
    assert len(workers) == 3, "the caller is the fourth"
    for _ in range(40):
        before = ticks(workers)
        time.sleep(0.25)
        if ticks(workers) == before:
            return
    raise AssertionError("threads without work take processor time")
