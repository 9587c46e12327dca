"""Shared experts ahead of the routed ones, so that an accelerator has work while the host computes.

Many blocks call their routed experts first and what does not depend on them afterwards, when the
host is done. A block that did so once gets the second call's result from an earlier one: made
between the copy of the routed experts' inputs and the wait for their result, on the same tensors.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class _Early:
    """A result, and what it was made of."""

    made_of: Tensor
    version: int
    result: Any

    def serves(self, given: Tensor) -> bool:
        """Whether the module would compute the same of `given`."""
        return _is_view_of(given, self.made_of) and given._version == self.version


@dataclass
class _BlockCall:
    """A block whose forward runs in this thread: its input, and what it has got early."""

    block: nn.Module
    given: Any
    routed_called: bool = False
    early: dict[str, _Early] = field(default_factory=dict)


class _Running(threading.local):
    def __init__(self) -> None:
        self.calls: list[_BlockCall] = []


_running = _Running()
# Of a block: children that it calls after its routed experts, and the form of what they get.
_called_after: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()


def _is_view_of(given: Tensor, other: Tensor) -> bool:
    return given is other or (
        given.shape == other.shape
        and given.data_ptr() == other.data_ptr()
        and given.stride() == other.stride()
    )


def _enter(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    _running.calls.append(_BlockCall(block, args[0] if args else next(iter(kwargs.values()), None)))


def _leave(*_: Any) -> None:
    _running.calls.pop()


class _SharedExperts(nn.Module):
    """What a block's shared experts become a subclass of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """An early result, or one of now."""
        call = _running.calls[-1] if _running.calls else None
        if call is None or len(args) != 1 or kwargs:
            return super().forward(*args, **kwargs)
        name = next((n for n, m in call.block.named_children() if _holds(m, self)), None)
        early = call.early.pop(name, None) if name else None
        if early is not None and early.serves(args[0]):
            return early.result
        if call.routed_called and name and isinstance(call.given, Tensor):
            flat = call.given.reshape(-1, call.given.shape[-1])
            for form, view in (("as given", call.given), ("flat", flat)):
                if _is_view_of(args[0], view):
                    # By its name: another module may take its place, as PEFT's copies do.
                    _called_after.setdefault(call.block, {})[name] = form
        return super().forward(*args, **kwargs)


def _holds(child: nn.Module, wanted: nn.Module) -> bool:
    return any(module is wanted for module in child.modules())


def let_shared_go_ahead(block: nn.Module) -> None:
    """Prepares a block that holds routed experts and may hold shared ones."""
    shared = [
        child for name, child in block.named_children() if "shared" in name and "gate" not in name
    ]
    if not shared:
        return
    block.register_forward_pre_hook(_enter, with_kwargs=True)
    block.register_forward_hook(_leave, always_call=True)
    for child in shared:
        stock = type(child)
        child.__class__ = type(stock.__name__, (_SharedExperts, stock), {})


def run_ahead(experts: nn.Module) -> None:
    """Calls what the block around `experts` is known to call after them."""
    call = _running.calls[-1] if _running.calls else None
    if call is None or not any(child is experts for child in call.block.children()):
        return
    for name, form in _called_after.get(call.block, {}).items():
        given = call.given if form == "as given" else call.given.reshape(-1, call.given.shape[-1])
        early = _Early(given, given._version, None)
        early.result = call.block.get_submodule(name)(given)
        call.early[name] = early
    call.routed_called = True
