"""Packed experts in torch's operations: on the same bytes as the kernels, against fp64."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from comparators import assert_matches
from reference import dropout_keep
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from test_block import CODINGS, GATES, SILU, Block, gradient_of, inputs, reference_of

from kt_sft.device import products
from kt_sft.device.block import DeviceBlock, Gradients, Limits
from kt_sft.device.dropout import dropped
from kt_sft.device.packed import PackedPiece
from kt_sft.device.products import Groups, has_grouped_products, outer, times
from kt_sft.kernels import PROJECTIONS, Call, Gate, Inputs, WeightLayout

STORED = ["int8", "bf16", "int4_g32", "int4_g128", *CODINGS]
SIZES = [(72, 40), (64, 64), (1, 1), (63, 65), (130, 33), (192, 320)]
# fp32 from end to end; and of each product's operands and results in bf16.
FP32, BF16 = 3e-6, 1.6e-2
# Gates whose slope jumps, so that rounding moves single values from one side to the other.
KINKED = [name for name, gate in GATES.items() if "relu" in name or gate.limit < 10]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("stored", STORED)
def test_weights_are_those_of_the_kernels(stored: str, gated: bool) -> None:
    for hidden, intermediate in SIZES:
        block = Block.make(3, hidden, intermediate, stored, 0, is_gated=gated, biased=True)
        piece = PackedPiece.of(block.weights)
        for projection in block.weights.projections:
            want = torch.stack([block.weights.unpack(e, projection) for e in range(3)])
            assert torch.equal(piece.weights(projection, torch.float32), want)
            some = piece.take([2, 0])
            assert torch.equal(some.weights(projection, torch.float32), want[[2, 0]])
            assert torch.equal(some.weights(projection, torch.bfloat16), want[[2, 0]].bfloat16())
            bias = block.bias[PROJECTIONS.index(projection)]
            assert bias is not None and torch.equal(some.bias(projection), bias[[2, 0]].float())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 12345678901234567, 2**64 - 1])
def test_dropout_is_that_of_the_kernels(p: float, seed: int) -> None:
    keep, slots = dropout_keep(seed, p), torch.tensor([0, 5, 77, 2**31 + 5])
    call = Call("exact", SILU, p, seed)
    for which, name in enumerate(PROJECTIONS):
        got = dropped(call, slots, name, torch.ones(4, 300))
        torch.testing.assert_close(got.double(), keep(which, slots, 300), rtol=1e-6, atol=0)
    # Channels of a layer that is split begin elsewhere, for down alone.
    shifted = Call("exact", SILU, p, seed, first_channel=64)
    x = torch.ones(4, 100)
    for name, first in (("gate_proj", 0), ("down_proj", 64)):
        want = dropped(call, slots, name, torch.ones(4, 300))[:, first : first + 100]
        assert torch.equal(dropped(shifted, slots, name, x), want)


def run(
    block: Block,
    hidden_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    call: Call,
    order: Sequence[int],
    *,
    limits: Limits = Limits(2, 7, 16),  # noqa: B008 - frozen
    keep: bool = True,
) -> tuple[Tensor, Gradients]:
    layout, piece = block.weights.layout, PackedPiece.of(block.weights)
    taken = Inputs(hidden_TD, index_TK, weight_TK, tuple(block.lora))
    counts = [int((index_TK == e).sum()) for e in order]
    experts = DeviceBlock(layout, call, taken, order, counts, limits)

    def pieces() -> list[tuple[int, PackedPiece]]:
        step = limits.experts
        return [(i, piece.take(order[i : i + step])) for i in range(0, len(order), step)]

    out_TD = experts.forward(pieces())
    d_out_TD = gradient_of(hidden_TD).to(hidden_TD.dtype)
    return out_TD, experts.backward(pieces(), d_out_TD)


def check(
    block: Block,
    gate: Gate = SILU,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    order: Sequence[int] = (3, 1, 0, 2),
    bound: float = FP32,
) -> None:
    x, index, weight = inputs(29, block.weights.hidden, 4, 2)
    index[3, 1] = 4  # skipped
    x = x.to(dtype).float()
    call = Call("exact", gate, dropout, dropout_seed=77)
    out, found = run(block, x.to(dtype), index, weight, call, order)
    want, grads, typical = reference_of(block, x, index, weight, gate, dropout, 77)
    assert_matches(out, want, bound, "out")
    assert_matches(found.hidden_TD, grads[0], bound, "d_hidden")
    assert_matches(found.weight_TK, grads[1], bound, "d_weight", typical)
    got = [t for pair in found.lora if pair for t in pair]
    for i, (g, w) in enumerate(zip(got, grads[2:], strict=True)):
        assert_matches(g, w[list(order)], bound, f"LoRA gradient {i}")


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("stored", STORED)
def test_every_format_and_gate(stored: str, name: str) -> None:
    gate = GATES[name]
    block = Block.shared(4, 72, 40, stored, 3, is_gated=gate.gated, biased=True)
    for dropout in (0.0, 0.3):
        check(block, gate, dropout)
    if name not in KINKED:
        check(block, gate, 0.3, torch.bfloat16, bound=BF16)
        check(block, gate, 0.0, torch.float16, bound=BF16)


@pytest.mark.parametrize("rank", [0, 1, 8, 17, 64])
def test_ranks(rank: int) -> None:
    check(Block.shared(4, 96, 80, "int8", rank))


@pytest.mark.parametrize("which", range(3))
def test_lora_on_one_projection_only(which: int) -> None:
    block = Block.make(4, 96, 80, "int8", 4)
    block.lora = [f if i == which else None for i, f in enumerate(block.lora)]
    check(block)


def test_some_of_the_experts_are_a_part_of_the_sum() -> None:
    block = Block.shared(4, 72, 40, "int8", 3, biased=True)
    x, index, weight = inputs(29, 72, 4, 2)
    call = Call("exact", SILU, 0.2, dropout_seed=7)
    whole, of_whole = run(block, x, index, weight, call, [0, 1, 2, 3])
    parts = [run(block, x, index, weight, call, order) for order in ([2], [3, 0], [1], [])]
    torch.testing.assert_close(sum(out for out, _ in parts), whole, rtol=1e-5, atol=1e-5)
    for name in ("hidden_TD", "weight_TK"):
        total = sum(getattr(found, name) for _, found in parts)
        torch.testing.assert_close(total, getattr(of_whole, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_limits_change_nothing(dtype: torch.dtype) -> None:
    """But the order in which LoRA's gradients are summed, where an expert's rows are cut."""
    block = Block.shared(4, 72, 40, "int8", 8)
    x, index, weight = inputs(61, 72, 4, 2)
    call = Call("exact", SILU, 0.2, dropout_seed=7)
    bound = 1e-6 if dtype == torch.float32 else 5e-3
    x = x.to(dtype)
    want, of_want = run(block, x, index, weight, call, range(4), limits=Limits(4, 999, 999))
    for limits in (Limits(1, 999, 999), Limits(3, 5, 5), Limits(2, 1, 3), Limits(4, 40, 45)):
        got, of_got = run(block, x, index, weight, call, range(4), limits=limits)
        assert_matches(got, want, 1e-6, f"{limits}")
        assert_matches(of_got.hidden_TD, of_want.hidden_TD, bound)
        for a, b in zip(of_got.lora, of_want.lora, strict=True):
            assert_matches(a[0], b[0], bound)
            assert_matches(a[1], b[1], bound)


def test_idle_experts_get_zeros() -> None:
    block = Block.shared(4, 72, 40, "int8", 3)
    x, _, weight = inputs(9, 72, 4, 2)
    index = torch.tensor([[1, 1]] * 9)  # twice the same
    call = Call("exact", SILU)
    out, found = run(block, x, index, weight, call, [0, 1, 2, 3])
    want, grads, _ = reference_of(block, x, index, weight, SILU, 0.0, 0)
    assert_matches(out, want, FP32)
    for pair, (a, b) in zip(found.lora, (grads[2:4], grads[4:6], grads[6:8]), strict=True):
        assert_matches(pair[0], a, FP32)
        assert_matches(pair[1], b, FP32)
        assert all(torch.count_nonzero(t[[0, 2, 3]]) == 0 for t in pair)


def test_nothing_to_compute() -> None:
    block = Block.shared(4, 72, 40, "int8", 3)
    none = torch.full((5, 2), 4), torch.rand(5, 2)
    for x, index, weight in (
        (torch.randn(5, 72), *none),
        (torch.zeros(0, 72), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)),
    ):
        for order in ([], [2, 0]):
            out, found = run(block, x, index, weight, Call("exact", SILU), order)
            assert out.shape == x.shape and torch.count_nonzero(out) == 0
            assert torch.count_nonzero(found.weight_TK) == 0


def test_working_memory_is_bounded() -> None:
    small = WeightLayout(128, 2048, 768, "int8")
    limits = Limits.within(small, torch.bfloat16)
    assert limits.experts >= 8 and limits.rows >= 2048 and limits.waiting >= limits.rows
    large = Limits.within(WeightLayout(256, 7168, 2048, "int4_g32"), torch.bfloat16)
    assert 1 <= large.experts < limits.experts and large.rows < limits.rows
    tight = Limits.within(small, torch.bfloat16, nbytes=1)
    assert (tight.experts, tight.rows) == (1, 1)


@pytest.mark.parametrize("counts", [(3, 0, 13), (16, 0, 0), (0, 0, 16), (5, 6, 5)])
def test_grouped_products(counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's, where it has them, and ours; operands that it does not take, too."""
    groups = Groups.of(counts, torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    seen = []
    for inner, outputs in ((16, 24), (16, 20), (13, 8)):
        x = torch.randn(16, inner, generator=g).bfloat16()
        w = torch.randn(3, outputs, inner, generator=g).bfloat16()
        d = torch.randn(16, outputs, generator=g).bfloat16()
        rows = groups.slices()
        want = (
            torch.cat([x[r].float() @ m.float().T for r, m in zip(rows, w, strict=True)]),
            torch.cat([d[r].float() @ m.float() for r, m in zip(rows, w, strict=True)]),
            torch.stack([d[r].float().T @ x[r].float() for r in rows]),
        )
        for there in (True, False):
            stock = has_grouped_products
            monkeypatch.setattr(products, "has_grouped_products", lambda *a: there and stock(*a))  # noqa: B023
            found = times(x, w.transpose(1, 2), groups), times(d, w, groups), outer(d, x, groups)
            for f, t in zip(found, want, strict=True):
                torch.testing.assert_close(f.float(), t, rtol=1e-2, atol=1e-2)
            seen.append(there)
            monkeypatch.undo()
    assert has_grouped_products(torch.device("cpu"), torch.bfloat16)
    assert not has_grouped_products(torch.device("cpu"), torch.float32)
    spread = groups.spread(torch.tensor([1, 2, 3]))
    assert spread.bincount(minlength=4)[1:].tolist() == list(counts)
