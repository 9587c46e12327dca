"""Shared experts ahead of the routed ones, so that an accelerator has work while the host computes.

In the forward of a block whose shared experts come after the routed ones (order.py), their call
gets the result of an earlier one: made between the routed experts' inputs leaving and the wait for
their result. What a block does is decided when it is prepared, so that every pass, a recomputation
too, does the same things in the same order.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from kt_sft.experts.order import Order, order_of


@dataclass
class _Early:
    """A result, and what it was made of."""

    made_of: Tensor
    version: int
    result: Tensor

    def serves(self, given: Tensor) -> bool:
        """Whether a call with this input is the same one; a view in another shape counts."""
        made_of = self.made_of
        return (
            given is made_of
            or (given.data_ptr(), given.numel(), given.dtype, given.shape[-1])
            == (made_of.data_ptr(), made_of.numel(), made_of.dtype, made_of.shape[-1])
        ) and given._version == self.version


@dataclass
class _BlockCall:
    """A block whose forward runs in this thread: its input, and what it has got early."""

    block: _Block
    given: Tensor
    early: dict[str, _Early] = field(default_factory=dict)


class _Running(threading.local):
    def __init__(self) -> None:
        self.calls: list[_BlockCall] = []


_running = _Running()


class _Block(nn.Module):
    """What a block becomes a subclass of."""

    order: ClassVar[Order]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock forward; on an accelerator with the routed experts first."""
        given = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(given, Tensor) or given.device.type == "cpu":
            return super().forward(*args, **kwargs)
        _running.calls.append(_BlockCall(self, given))
        try:
            stock: Any = super().forward
            # Whoever has replaced the class's forward since is called.
            if self.order.routed_first is None or stock.__func__ is not self.order.stock:
                return stock(*args, **kwargs)
            return self.order.routed_first(self, *args, **kwargs)
        finally:
            _running.calls.pop()


class _SharedExperts(nn.Module):
    """What a block's shared experts become a subclass of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """An early result, or one of now."""
        call = _running.calls[-1] if _running.calls else None
        if call is not None and len(args) == 1 and not kwargs:
            # By its name: another module may have taken its place, as PEFT's copies do.
            for name, early in call.early.items():
                if self in call.block.get_submodule(name).modules() and early.serves(args[0]):
                    del call.early[name]
                    return early.result.view(*args[0].shape[:-1], -1)
        return super().forward(*args, **kwargs)


def let_shared_go_ahead(block: nn.Module, experts: str) -> None:
    """Prepares a block that holds routed experts by that name, and may hold shared ones."""
    children = (name for name, _ in block.named_children())
    shared = frozenset(name for name in children if "shared" in name and "gate" not in name)
    order = order_of(type(block), experts, shared)  # type: ignore[arg-type]
    if not order.shared_after:
        return
    _derive(block, _Block, {"order": order})
    for name in order.shared_after:
        _derive(block.get_submodule(name), _SharedExperts, {})


def _derive(module: nn.Module, mixin: type[nn.Module], attributes: dict[str, Any]) -> None:
    stock = type(module)
    module.__class__ = type(stock.__name__, (mixin, stock), attributes)


def _is_plain(child: nn.Module) -> bool:
    """Whether calling it early is the same as calling it: hooks would see two calls."""
    return not (child._forward_hooks or child._forward_pre_hooks or "forward" in vars(child))


def run_ahead(experts: nn.Module) -> None:
    """Calls what the block around `experts` calls after them."""
    call = _running.calls[-1] if _running.calls else None
    if call is None or call.given.is_inference() or not call.given.is_contiguous():
        return
    block, given = call.block, call.given
    if not any(child is experts for child in block.children()):
        return
    for name in block.order.shared_after:
        child = block.get_submodule(name)
        if _is_plain(child):
            call.early[name] = _Early(given, given._version, child(given))
