"""In which order a block's forward calls its routed and its shared experts, read from its source.

Shared experts that are called after the routed ones can run while the host computes those. Where a
forward calls them first, it is made again with that statement behind the routed experts' one: what
the statement reads is kept under a name of its own, and nothing may read its result in between.

    shared = self.shared_expert(x)            input_of_shared_expert = x
    index, weights = self.gate(x)      ->     index, weights = self.gate(x)
    routed = self.experts(...)                routed = self.experts(...)
                                              shared = self.shared_expert(input_of_shared_expert)
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Order:
    """What a block's forward calls, and how.

    shared_after: children that it calls after the routed experts, on its own input or a reshaped
        view of it.
    routed_first: the forward in which these are called so; None where the stock one does it.
    stock: the forward that was read.
    """

    shared_after: tuple[str, ...]
    routed_first: Callable[..., Any] | None = None
    stock: Callable[..., Any] | None = None


@functools.cache
def order_of(block: type[nn.Module], experts: str, shared: frozenset[str]) -> Order:
    """The order of a class of blocks, whose children have these names.

    Only what a statement of the forward itself calls counts.
    """
    forward = block.forward
    function = _parsed(forward)
    if function is None:
        return Order(())
    moved = _move_behind(function, experts, shared)
    names = _called_after(function, experts, shared)
    return Order(names, _compiled(forward, function) if moved and names else None, forward)


def _parsed(forward: Any) -> ast.FunctionDef | None:
    """A forward that can be read and made again: plain, with an input.

    What wraps another function, or needs more than its module's names, cannot be.
    """
    if inspect.unwrap(forward) is not forward or getattr(forward, "__closure__", None):
        return None
    try:
        lines, first = inspect.getsourcelines(forward)
        function = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) < 2:
        return None
    if any(isinstance(node, ast.Name) and node.id == "super" for node in ast.walk(function)):
        return None
    ast.increment_lineno(function, first - 1)  # tracebacks show the stock source
    return function


def _compiled(forward: Any, function: ast.FunctionDef) -> Callable[..., Any]:
    tree = ast.fix_missing_locations(ast.Module([function], []))
    made: dict[str, Any] = {}
    exec(  # the stock function's own statements
        compile(tree, inspect.getsourcefile(forward) or "<forward>", "exec"),
        forward.__globals__,
        made,
    )
    return made[function.name]


@dataclass
class _Inputs:
    """Names that hold the block's input at a statement; `this` is the block."""

    this: str
    names: set[str]

    def holds(self, node: ast.expr) -> bool:
        """Whether an expression is the input, or a view of it in another shape."""
        while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr not in ("view", "reshape"):
                return False
            node = node.func.value
        return isinstance(node, ast.Name) and node.id in self.names

    def follow(self, statement: ast.stmt) -> None:
        """Names that a statement gives the input, and those that it gives something else."""
        same = isinstance(statement, ast.Assign) and self.holds(statement.value)
        for name in _names(statement, ast.Store):
            (self.names.add if same else self.names.discard)(name)

    def child_called(self, node: ast.AST) -> str:
        """The name of a call of `this.<name>(...)`; empty for anything else."""
        function = node.func if isinstance(node, ast.Call) else None
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            return function.attr if function.value.id == self.this else ""
        return ""

    def shared_calls(self, statement: ast.stmt, shared: frozenset[str]) -> list[ast.Call]:
        """Calls of shared experts with the input as the only argument."""
        return [
            node
            for node in ast.walk(statement)
            if isinstance(node, ast.Call)
            and self.child_called(node) in shared
            and len(node.args) == 1
            and not node.keywords
            and self.holds(node.args[0])
        ]

    def calls(self, statement: ast.stmt, child: str) -> bool:
        """Whether a statement calls this child."""
        return any(self.child_called(node) == child for node in ast.walk(statement))


def _names(statement: ast.AST, context: type[ast.expr_context]) -> Iterator[str]:
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, context):
            yield node.id


def _start(function: ast.FunctionDef) -> _Inputs:
    this, given = (argument.arg for argument in function.args.args[:2])
    return _Inputs(this, {given})


def _called_after(
    function: ast.FunctionDef, experts: str, shared: frozenset[str]
) -> tuple[str, ...]:
    inputs = _start(function)
    found, routed = [], False
    for statement in function.body:
        # In one statement, what is written first is called first.
        calls = [node for node in ast.walk(statement) if inputs.child_called(node)]
        early = inputs.shared_calls(statement, shared)
        for node in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):  # type: ignore[attr-defined]
            if inputs.child_called(node) == experts:
                routed = True
            elif routed and node in early:
                found.append(inputs.child_called(node))
        inputs.follow(statement)
    return tuple(dict.fromkeys(found))


def _move_behind(function: ast.FunctionDef, experts: str, shared: frozenset[str]) -> bool:
    """Moves statements of shared experts behind the one of the routed; whether there were any."""
    inputs = _start(function)
    body = function.body
    end = next((n for n, s in enumerate(body) if inputs.calls(s, experts)), None)
    if end is None or function.decorator_list:
        return False
    stay: list[ast.stmt] = []
    moved: list[ast.stmt] = []
    for number, statement in enumerate(body[:end]):
        calls = inputs.shared_calls(statement, shared)
        inputs.follow(statement)
        if not calls or not _can_wait(statement, calls, body[number + 1 : end + 1]):
            stay.append(statement)
            continue
        moved.append(statement)
        for call in calls:
            name = f"input_of_{inputs.child_called(call)}"
            keep = ast.Assign([ast.Name(name, ast.Store())], call.args[0])
            stay.append(ast.copy_location(keep, statement))
            call.args[0] = ast.Name(name, ast.Load())
    function.body = [*stay, body[end], *moved, *body[end + 1 :]]
    return bool(moved)


def _can_wait(statement: ast.stmt, calls: list[ast.Call], between: list[ast.stmt]) -> bool:
    """Whether a statement does the same behind those that follow it, its calls' inputs kept."""
    nodes = list(ast.walk(statement))
    targets = [node for node in nodes if isinstance(getattr(node, "ctx", None), ast.Store)]
    ends = any(isinstance(node, ast.Return | ast.Raise) for node in nodes)
    if (
        ends
        or not isinstance(statement, ast.Assign | ast.If)
        or not all(isinstance(target, ast.Name) for target in targets)
    ):
        return False
    kept = {id(node) for call in calls for node in ast.walk(call.args[0])}
    loads = [node for node in nodes if isinstance(node, ast.Name) and id(node) not in kept]
    uses = {node.id for node in loads}
    writes = set(_names(statement, ast.Store))
    return not any(
        _writes_in_place(other)
        or uses & set(_names(other, ast.Store))
        or writes & set(_names(other, ast.Load))
        for other in between
    )


def _writes_in_place(statement: ast.stmt) -> bool:
    """Whether a tensor or an attribute may change: by `+=`, `x[...] =`, `mul_` or `out=`."""
    for node in ast.walk(statement):
        if isinstance(node, ast.AugAssign):
            return True
        if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store):
            return True
        if isinstance(node, ast.keyword) and node.arg in ("out", "inplace"):
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            if name.endswith("_") and not name.endswith("__"):
                return True
    return False
