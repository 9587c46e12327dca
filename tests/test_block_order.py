"""Reading in which order a block's forward calls its experts, and making it again."""

from __future__ import annotations

import functools
import traceback

import pytest
import torch
from torch import Tensor, nn

from kt_sft.experts.order import order_of

SHARED = frozenset({"shared"})


class _Block(nn.Module):
    """Children that write down who was called with what."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def experts(self, hidden: Tensor) -> Tensor:
        self.log.append("experts")
        return hidden * 2

    def shared(self, hidden: Tensor) -> Tensor:
        self.log.append("shared")
        return hidden.sum(-1, keepdim=True) + hidden

    def gate(self, hidden: Tensor) -> Tensor:
        self.log.append("gate")
        return hidden.mean()


class _First(_Block):
    def forward(self, hidden: Tensor) -> Tensor:
        shape = hidden.shape
        early = self.shared(hidden).view(shape)
        hidden = hidden.view(-1, shape[-1])
        scale = self.gate(hidden)
        routed = self.experts(hidden) * scale
        return early + routed.view(shape)


class _Conditional(_Block):
    def forward(self, hidden: Tensor) -> Tensor:
        if self.shared is not None:
            early = self.shared(hidden)
        return self.finish(hidden, early)

    def finish(self, hidden: Tensor, early: Tensor) -> Tensor:
        return self.experts(hidden) + early


class _InConditional(_Block):
    def forward(self, hidden: Tensor) -> Tensor:
        if self.shared is not None:
            early = self.shared(hidden)
        routed = self.experts(hidden)
        return routed + early


class _Last(_Block):
    def forward(self, hidden: Tensor) -> Tensor:
        residual = hidden
        hidden = hidden.reshape(-1, hidden.shape[-1])
        routed = self.experts(hidden).view(residual.shape)
        return routed + self.shared(residual)


class _OneExpression(_Block):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.experts(hidden) + self.shared(hidden)


class _OneExpressionFirst(_Block):
    def forward(self, hidden: Tensor) -> Tensor:
        return self.shared(hidden) + self.experts(hidden)


class _ReadBetween(_Block):
    def forward(self, hidden: Tensor) -> Tensor:
        early = self.shared(hidden)
        hidden = hidden + early
        return self.experts(hidden)


class _WrittenBetween(_Block):
    def forward(self, hidden: Tensor) -> Tensor:
        early = self.shared(hidden)
        hidden = hidden.mul_(0.5)
        routed = self.experts(hidden)
        return routed + early


class _AddedBetween(_Block):
    def forward(self, hidden: Tensor) -> Tensor:
        early = self.shared(hidden)
        hidden += 1
        routed = self.experts(hidden)
        return routed + early


class _OutBetween(_Block):
    def forward(self, hidden: Tensor) -> Tensor:
        early = self.shared(hidden)
        torch.mul(hidden, 0, out=hidden)
        routed = self.experts(hidden)
        return routed + early


class _InplaceBetween(_Block):
    def forward(self, hidden: Tensor) -> Tensor:
        early = self.shared(hidden)
        hidden = nn.functional.relu(hidden, inplace=True)
        routed = self.experts(hidden)
        return routed + early


class _AttributeBetween(_Block):
    def forward(self, hidden: Tensor) -> Tensor:
        early = self.shared(hidden)
        self.scale = 2.0
        routed = self.experts(hidden) * self.scale
        return routed + early


class _Inherited(_First):
    def forward(self, hidden: Tensor) -> Tensor:
        early = self.shared(hidden)
        routed = self.experts(hidden)
        return routed + early + super().forward(hidden)


class _Wrapped(_Block):
    @functools.wraps(_First.forward)
    def forward(self, *args: Tensor) -> Tensor:
        return _First.forward(self, *args) + 1


class _ScaleChanges(_Block):
    def forward(self, hidden: Tensor) -> Tensor:
        scale = 2.0
        early = self.shared(hidden) * scale
        scale = 3.0
        routed = self.experts(hidden) * scale
        return routed + early


class _OtherInput(_Block):
    def forward(self, hidden: Tensor) -> Tensor:
        routed = self.experts(hidden)
        return routed + self.shared(hidden.detach())


class _Returns(_Block):
    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.numel() == 0:
            return self.shared(hidden)
        return self.experts(hidden)


def _ran(block: _Block, forward: object) -> tuple[list[str], Tensor]:
    block.log.clear()
    out = forward(block, torch.arange(12.0).view(2, 2, 3))  # type: ignore[operator]
    return list(block.log), out


@pytest.mark.parametrize("kind", [_First, _InConditional])
def test_routed_experts_come_first(kind: type[_Block]) -> None:
    """The same result, in the other order."""
    order = order_of(kind, "experts", SHARED)
    assert order.shared_after == ("shared",) and order.routed_first is not None
    stock, want = _ran(kind(), kind.forward)
    moved, got = _ran(kind(), order.routed_first)
    assert stock.index("shared") < stock.index("experts")
    assert moved.index("shared") > moved.index("experts")
    assert sorted(moved) == sorted(stock) and torch.equal(got, want)


@pytest.mark.parametrize(
    "kind, names",
    [
        (_Last, ("shared",)),
        (_OneExpression, ("shared",)),
        (_OneExpressionFirst, ()),
        (_Conditional, ()),
        (_ReadBetween, ()),
        (_WrittenBetween, ()),
        (_AddedBetween, ()),
        (_OutBetween, ()),
        (_InplaceBetween, ()),
        (_AttributeBetween, ()),
        (_Inherited, ()),
        (_Wrapped, ()),
        (_ScaleChanges, ()),
        (_OtherInput, ()),
        (_Returns, ()),
        (nn.Identity, ()),
    ],
)
def test_what_stays_as_it_is(kind: type[nn.Module], names: tuple[str, ...]) -> None:
    """Shared experts that are last already, and those that cannot wait."""
    order = order_of(kind, "experts", SHARED)
    assert order.shared_after == names and order.routed_first is None


def test_a_traceback_shows_the_stock_source() -> None:
    order = order_of(_First, "experts", SHARED)
    assert order.routed_first is not None
    with pytest.raises(AttributeError) as caught:
        order.routed_first(object(), torch.zeros(1, 2, 3))
    last = traceback.extract_tb(caught.tb)[-1]
    assert last.filename == __file__ and "self.gate(hidden)" in (last.line or "")
