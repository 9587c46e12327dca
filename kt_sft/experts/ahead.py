"""Shared experts ahead of the routed ones, so that an accelerator has work while the host computes.

Many blocks call their routed experts first, and then their shared ones on the block's own input.
Such a second call gets the result of an earlier one: made between the routed experts' inputs
leaving and the wait for their result. Whether a block is one of these is read from its forward, so
that every pass, a recomputation too, does the same things in the same order.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import threading
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class _Early:
    """A result, and what it was made of."""

    made_of: Tensor
    version: int
    result: Any


@dataclass
class _BlockCall:
    """A block whose forward runs in this thread: its input, and what it has got early."""

    block: nn.Module
    given: Any
    early: dict[str, _Early] = field(default_factory=dict)


class _Running(threading.local):
    def __init__(self) -> None:
        self.calls: list[_BlockCall] = []


_running = _Running()


def _enter(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    calls = _running.calls
    # Left by a call that an interrupt ended, after which torch runs no hooks.
    for number, call in enumerate(calls):
        if call.block is block:
            del calls[number:]
            break
    calls.append(_BlockCall(block, args[0] if args else next(iter(kwargs.values()), None)))


def _leave(*_: Any) -> None:
    if _running.calls:
        _running.calls.pop()


class _SharedExperts(nn.Module):
    """What a block's shared experts become a subclass of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """An early result, or one of now."""
        call = _running.calls[-1] if _running.calls else None
        if call is not None and len(args) == 1 and not kwargs:
            # By its name: another module may have taken its place, as PEFT's copies do.
            for name in list(call.early):
                early = call.early[name]
                holder = call.block.get_submodule(name)
                if self in holder.modules() and early.made_of is args[0]:
                    del call.early[name]
                    if args[0]._version == early.version:
                        return early.result
        return super().forward(*args, **kwargs)


@functools.cache
def called_after(block: type[nn.Module], experts: str, children: frozenset[str]) -> tuple[str, ...]:
    """Children that a block's forward calls after its child `experts`, on its own input.

    Read from the source; only what is called by a statement of the forward itself counts.
    """
    try:
        source = textwrap.dedent(inspect.getsource(block.forward))
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return ()
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) < 2:
        return ()
    this, given_name = (argument.arg for argument in function.args.args[:2])
    inputs = {given_name}  # names of the block's input
    found, routed = [], False
    for statement in function.body:
        for node in ast.walk(statement):
            name = _called_child(node, this)
            if name == experts:
                routed = True
            elif routed and name in children and _gets_one_of(node, inputs):
                found.append(name)
        _follow(statement, inputs)
    return tuple(found)


def _called_child(node: ast.AST, this: str) -> str:
    """The name of a call of `this.<name>(...)`; empty for anything else."""
    function = node.func if isinstance(node, ast.Call) else None
    own = isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
    return function.attr if own and function.value.id == this else ""  # type: ignore[union-attr]


def _gets_one_of(node: ast.AST, names: set[str]) -> bool:
    """Whether a call's only argument has one of these names."""
    alone = isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords
    return alone and isinstance(node.args[0], ast.Name) and node.args[0].id in names  # type: ignore[attr-defined]


def _follow(statement: ast.stmt, inputs: set[str]) -> None:
    """Names that are given the input, and those that are given something else."""
    same = (
        isinstance(statement, ast.Assign)
        and isinstance(statement.value, ast.Name)
        and statement.value.id in inputs
    )
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            (inputs.add if same else inputs.discard)(node.id)


def _children(block: nn.Module) -> frozenset[str]:
    return frozenset(n for n, _ in block.named_children() if "shared" in n and "gate" not in n)


def let_shared_go_ahead(block: nn.Module, experts: str) -> None:
    """Prepares a block that holds routed experts by that name, and may hold shared ones."""
    names = called_after(type(block), experts, _children(block))  # type: ignore[arg-type]
    if not names:
        return
    block.register_forward_pre_hook(_enter, with_kwargs=True)
    block.register_forward_hook(_leave, always_call=True)
    for name in names:
        child = block.get_submodule(name)
        stock = type(child)
        child.__class__ = type(stock.__name__, (_SharedExperts, stock), {})


def _is_plain(child: nn.Module) -> bool:
    """Whether calling it early is the same as calling it: hooks would see two calls."""
    return not (child._forward_hooks or child._forward_pre_hooks or "forward" in vars(child))


def run_ahead(experts: nn.Module) -> None:
    """Calls what the block around `experts` calls after them."""
    call = _running.calls[-1] if _running.calls else None
    if call is None or not isinstance(call.given, Tensor) or call.given.is_inference():
        return
    own = next((name for name, child in call.block.named_children() if child is experts), None)
    if own is None:
        return
    block = call.block
    for name in called_after(type(block), own, _children(block)):  # type: ignore[arg-type]
        child = block.get_submodule(name)
        if _is_plain(child):
            given = call.given
            call.early[name] = _Early(given, given._version, child(given))
