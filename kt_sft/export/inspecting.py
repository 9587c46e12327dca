"""What is in an adapter: for people, and for scripts that want an exit status.

Legend: E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from kt_sft.adapters.base_identity import (
    earlier_adapters,
    other_shape,
    other_weights,
    read_identity,
)
from kt_sft.export.adapter import Adapter, Lora
from kt_sft.export.command import open_base

_LAYER = re.compile(r"(.*?\.(\d+))\.")


def describe(folder: Path, base: str | None = None) -> list[str]:
    """Settings and contents of an adapter, a line each. Raises KtSftError."""
    adapter = Adapter(folder, open_base(folder, base))
    config, ranks = adapter.file.config, adapter.ranks()
    experts = [
        f"{layer}.{p}" for layer in adapter.expert_layers for p in adapter.projections(layer)
    ]
    numbers = adapter.file.lora_numbers()
    return [
        f"base        {config.base_model_name_or_path or 'not named'} "
        f"({adapter.base.model.config.model_type})",
        f"identity    {_identity(folder, adapter)}",
        f"rank        {', '.join(map(str, sorted(set(ranks.values()))))}; alpha {config.lora_alpha}"
        + (", rsLoRA" if config.use_rslora else "")
        + (f", dropout {config.lora_dropout}" if config.lora_dropout else ""),
        f"experts     {len(adapter.expert_layers)} of {len(adapter.base.layers)} layers"
        + (f", {', '.join(sorted(adapter.layouts))}" if experts else ""),
        f"layers      {len(adapter.linear_modules)} beside the experts: "
        + (", ".join(sorted({m.rpartition(".")[2] for m in adapter.linear_modules})) or "none"),
        f"in full     {', '.join(adapter.full) or 'nothing'}",
        f"size        {numbers / 1e6:.3g} million numbers in {str(adapter.file.dtype)[6:]}",
    ]


def check(folder: Path, base: str | None = None) -> tuple[list[str], list[str]]:
    """(a table of norms by layer, what is wrong). Raises KtSftError where it does not fit."""
    adapter = Adapter(folder, open_base(folder, base))
    problems = _other_base(folder, adapter)
    rows: dict[str, dict[str, float]] = {}
    zero = 0
    for name, lora in _all(adapter):
        kind = _kind(adapter, name)
        if not bool(torch.isfinite(lora.a).all() and torch.isfinite(lora.b).all()):
            problems.append(f"{name}: holds NaN or Inf")
            continue
        zero += not bool(lora.b.any())
        row = rows.setdefault(_layer(name), {})
        row[kind] = row.get(kind, 0.0) + _square(adapter, name, lora)
    total = len(adapter.ranks())
    if zero == total and total:
        problems.append("every lora_B is zero: the adapter changes nothing, it was not trained")
    lines = [f"{zero} of {total} pairs are zero; norms of scaling B A:", *_table(rows)]
    if not problems:
        lines.append("fits its base, every number is finite")
    return lines, problems


def compare(folder: Path, other: Path, base: str | None = None) -> list[str]:
    """How far two adapters are apart: norms of both and of the difference, by layer."""
    opened = open_base(folder, base)
    one, two = Adapter(folder, opened), Adapter(other, opened)
    lines = ["norms of scaling B A, and of the difference:"]
    notes = [read_identity(path) or {} for path in (folder, other)]
    if all(notes) and (found := other_shape(*notes) + other_weights(*notes)):
        lines.insert(0, f"they were trained on different bases: {'; '.join(found)}")
    known = {column: adapter.ranks() for column, adapter in (("first", one), ("second", two))}
    names = list(dict.fromkeys([*known["first"], *known["second"]]))
    for column, path in (("first", folder), ("second", other)):
        lacking = sorted(set(names) - known[column].keys())
        if lacking:
            lines.append(f"{path}: has no LoRA on {len(lacking)} modules, the first {lacking[0]}")
    rows: dict[str, dict[str, float]] = {}
    for name in names:
        row = rows.setdefault(_layer(name), dict.fromkeys((*known, "difference"), 0.0))
        loras = {
            column: _read(adapter, name)
            for column, adapter in (("first", one), ("second", two))
            if name in known[column]
        }
        for column, lora in loras.items():
            row[column] += _square(one, name, lora)
        both = list(loras.values())
        row["difference"] += _square(one, name, _minus(*both) if len(both) == 2 else both[0])
    return [*lines, *_table(rows)]


def _identity(folder: Path, adapter: Adapter) -> str:
    if read_identity(folder) is None:
        return "not noted with the adapter"
    found = _other_base(folder, adapter)
    if earlier := earlier_adapters(folder):
        found.append(f"trained on top of {', '.join(earlier)}")
    return "; ".join(found) if found else "the base is the one that it was trained on"


def _other_base(folder: Path, adapter: Adapter) -> list[str]:
    theirs = read_identity(folder)
    if theirs is None:
        return []
    here = adapter.base.identity
    return [f"other base: {d}" for d in other_shape(theirs, here) + other_weights(theirs, here)]


def _all(adapter: Adapter) -> Iterator[tuple[str, Lora]]:
    for name in adapter.ranks():
        yield name, _read(adapter, name)


def _read(adapter: Adapter, name: str) -> Lora:
    layer, _, projection = name.rpartition(".")
    if layer in adapter.base.layers:
        return adapter.experts(layer, projection)
    return adapter.linear(name)


def _kind(adapter: Adapter, name: str) -> str:
    return "experts" if name.rpartition(".")[0] in adapter.base.layers else "others"


def _layer(name: str) -> str:
    match = _LAYER.match(f"{name}.")
    return match[1] if match else name


def _square(adapter: Adapter, name: str, lora: Lora) -> float:
    """The squared Frobenius norm of scaling * B A, of all experts together: tr(A A' B' B)."""
    a, b = lora.a.double(), lora.b.double()
    gram = (a @ a.mT) * (b.mT @ b)
    layer = adapter.base.layers.get(name.rpartition(".")[0])
    times = layer.shape.experts if layer is not None and a.shape[0] == 1 else 1
    # Of a difference of equals rounding leaves either sign.
    return max(0.0, float(gram.sum())) * lora.scaling**2 * times


def _minus(one: Lora, two: Lora) -> Lora:
    """The difference as LoRA of the summed rank."""
    copies = max(one.a.shape[0], two.a.shape[0]) if one.a.dim() == 3 else 0

    def wide(t: torch.Tensor) -> torch.Tensor:
        return t.expand(copies, -1, -1) if copies else t

    a = torch.cat([wide(one.a), wide(two.a)], dim=-2)
    b = torch.cat([wide(one.b) * one.scaling, wide(two.b) * -two.scaling], dim=-1)
    return Lora(a, b, 1.0)


def _numbered(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Norms, a line for each layer."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    width = max((len(name) for name in rows), default=5)
    lines = ["layer".ljust(width) + "".join(name.rjust(12) for name in columns)]
    for name, row in sorted(rows.items(), key=lambda row: _numbered(row[0])):
        cells = (f"{row[c] ** 0.5:12.4g}" if c in row else "-".rjust(12) for c in columns)
        lines.append(name.ljust(width) + "".join(cells))
    return lines
