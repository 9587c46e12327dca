"""An adapter in any known layout, as LoRA of a base model's experts, of its layers, and the rest.

Layouts of the experts that are read (export/programs.py has those that are written):

    per expert     <experts>.<e>.gate_proj.lora_A.weight [r, in], by the model's names or by those
                   of the checkpoint (Mixtral: block_sparse_moe.experts.<e>.w1)
    shared         <experts>.gate_proj.lora_A.weight [r, in], one pair for all experts
    fused          PEFT's target_parameters, of releases up to 0.18 and later (fused.py); Unsloth
                   and ms-swift write them too
    stacked        KTransformers' file beside the adapter, [E, r, in] and [E, out, r]

Legend: E experts, r rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor

from kt_sft.adapters import names
from kt_sft.errors import AdapterMismatchError, CheckpointError, UnsupportedModelError
from kt_sft.export import fused
from kt_sft.export.adapter_file import AdapterFile
from kt_sft.export.base import Base

Keys = tuple[str, str]
Place = tuple[str, str]  # path of a layer's hybrid experts, projection

_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Lora:
    """scaling * b @ a: [r, inputs] and [outputs, r], or the same stacked, [E or 1, ...]."""

    a: Tensor
    b: Tensor
    scaling: float

    def of(self, expert: int) -> Lora:
        """One expert's of stacked ones."""
        index = expert if self.a.shape[0] > 1 else 0
        return Lora(self.a[index], self.b[index], self.scaling)


class _Reader(Protocol):
    """A projection of a layer's experts in some layout."""

    @property
    def names(self) -> list[str]:
        """What patterns were matched against."""

    def read(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """a [E or 1, r, inputs] and b [E or 1, outputs, r]."""

    def rank(self, adapter: Adapter) -> int:
        """The rank that its scaling is made with."""


@dataclass
class _Separate:
    """Matrices of their own for each expert, or one pair for all."""

    place: Place
    keys: dict[int, Keys]
    paths: list[str]  # in the file
    shared: bool = False

    @property
    def names(self) -> list[str]:
        return [".".join(self.place), *self.paths]

    def read(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        pairs = [adapter.file.pair(self.keys[e]) for e in sorted(self.keys)]
        return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])

    def rank(self, adapter: Adapter) -> int:
        return adapter.file.shapes(next(iter(self.keys.values())))[0][0]


@dataclass
class _Stacked:
    """One tensor [E, ., .] for each factor."""

    place: Place
    keys: Keys

    @property
    def names(self) -> list[str]:
        return [".".join(self.place)]

    def read(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        return adapter.file.pair(self.keys)

    def rank(self, adapter: Adapter) -> int:
        return adapter.file.shapes(self.keys)[0][1]


@dataclass
class _Fused:
    """A part of a stacked parameter's pair."""

    slot: fused.Slot
    projection: str
    keys: Keys

    @property
    def names(self) -> list[str]:
        return [self.slot.parameter]

    def read(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        halved = adapter.halved and len(self.slot.parts) == 2
        whole = adapter.fused_pair(self.slot)
        pair = fused.part_of(self.slot, whole, self.projection, halved)
        return pair.a, pair.b

    def rank(self, adapter: Adapter) -> int:
        return adapter.file.shapes(self.keys)[0][0] // self.slot.experts


class Adapter:
    """What an adapter changes in a base model. Tensors are read when asked for."""

    def __init__(self, folder: str | Path, base: Base) -> None:
        """Raises AdapterMismatchError with what does not fit, CheckpointError, SettingsError."""
        self.base = base
        self.file = AdapterFile(folder)
        self.layouts: set[str] = set()
        self._experts: dict[Place, _Reader] = {}
        self._linear: dict[str, tuple[str, Keys]] = {}  # module -> (path in the file, keys)
        self._fused: dict[str, tuple[fused.Slot, Keys]] = {}
        self._layer = ""
        self._read: dict[str, Lora] = {}  # projection -> of that layer
        self._problems: list[str] = []
        self._sort()
        self._check()
        if self._problems:
            shown = self._problems[:8]
            raise AdapterMismatchError(
                f"{folder}: the adapter does not fit the base {base.folder}:"
                + "".join(f"\n  - {p}" for p in shown)
                + (f"\n  - and {len(self._problems) - 8} more" if len(self._problems) > 8 else "")
                + "\nGive the base that it was trained on"
            )

    # What it holds

    @property
    def expert_layers(self) -> list[str]:
        """The paths of the hybrid experts that have LoRA, in the order of the model."""
        return [path for path in self.base.layers if any(p == path for p, _ in self._experts)]

    def projections(self, layer: str) -> list[str]:
        """Those of a layer's experts that have LoRA."""
        every = self.base.layers[layer].shape.projections
        return [p for p in every if (layer, p) in self._experts]

    @property
    def linear_modules(self) -> list[str]:
        """The paths of the other modules with LoRA."""
        return [*self._linear]

    @cached_property
    def full(self) -> dict[str, str]:
        """Parameters of the model that were trained in full -> their keys."""
        known = self.base.modules_by_published_name
        found = {}
        for path, key in self.file.full.items():
            module, _, own = path.rpartition(".")
            found[f"{known.get(module, module)}.{own}"] = key
        return found

    def ranks(self) -> dict[str, int]:
        """The rank of every module with LoRA, all experts of a layer being one."""
        found = {f"{layer}.{p}": self.expert_rank(layer, p)[0] for layer, p in self._experts}
        return found | {m: self.file.shapes(keys)[0][0] for m, (_, keys) in self._linear.items()}

    def expert_rank(self, layer: str, projection: str) -> tuple[int, float]:
        """Rank and scaling of a projection of a layer's experts; those of the adapter's first
        experts where it has no LoRA."""
        place = layer, projection
        if place not in self._experts:
            place = next(iter(self._experts))
        reader = self._experts[place]
        rank = reader.rank(self)
        scaling = self._scaling(rank, reader.names)
        both = isinstance(reader, _Fused) and len(reader.slot.parts) == 2
        return rank // 2 if both and self.halved else rank, scaling

    def is_shared(self, layer: str, projection: str) -> bool:
        """Whether one pair is for all experts."""
        reader = self._experts[layer, projection]
        return isinstance(reader, _Separate) and reader.shared

    def linear_shape(self, module: str) -> tuple[int, float, int, int]:
        """Rank, scaling, outputs and inputs of another module's LoRA."""
        path, keys = self._linear[module]
        a, b = self.file.shapes(keys)
        return a[0], self._scaling(a[0], [module, f"{module}.weight", path]), b[0], a[1]

    # Its tensors, in fp32

    def experts(self, layer: str, projection: str) -> Lora:
        """The LoRA of a projection of all experts; that of the last layer asked for is kept."""
        if layer != self._layer:
            self._layer, self._read = layer, {}
        if projection not in self._read:
            reader = self._experts[layer, projection]
            a, b = reader.read(self)
            scaling = self._scaling(reader.rank(self), reader.names)
            self._read[projection] = Lora(a, b, scaling)
        return self._read[projection]

    def linear(self, module: str) -> Lora:
        """The LoRA of another module."""
        path, keys = self._linear[module]
        a, b = self.file.pair(keys)
        return Lora(a, b, self._scaling(a.shape[0], [module, f"{module}.weight", path]))

    def fused_pair(self, slot: fused.Slot) -> fused.Pair:
        """The pair of a whole stacked parameter."""
        _, keys = self._fused[slot.parameter]
        return fused.from_peft(slot, *self.file.pair(keys), self._fused_layout)

    def undivided(self, slot: fused.Slot) -> bool:
        """Whether gate and up were trained as one, with an A of both."""
        return slot.parameter in self._fused and len(slot.parts) == 2 and not self.halved

    @cached_property
    def halved(self) -> bool:
        """Whether gate and up have halves of their own in every pair that they share."""
        together = [found for found in self._fused.values() if len(found[0].parts) == 2]
        return bool(together) and all(
            fused.is_block_diagonal(slot, self.fused_pair(slot)) for slot, _ in together
        )

    def _scaling(self, rank: int, trained_as: list[str]) -> float:
        """By the patterns that any of the names matches. Raises CheckpointError."""
        config = self.file.config
        found = {names.matched(config.alpha_pattern, name) for name in trained_as} - {None}
        if len(found) > 1:
            raise CheckpointError(
                f"{self.file.folder}: alpha_pattern: {trained_as[0]} gets {sorted(found)}, "
                "expected one alpha for all experts of a projection; train it so, or merge it with "
                "the program that trained it"
            )
        return names.scaling(rank, found.pop() if found else config.lora_alpha, config.use_rslora)

    # Where its keys belong

    def _sort(self) -> None:
        base, left = self.base, dict(self.file.lora)
        for layer in base.layers:
            self._take_fused(layer, left)
        for path, keys in left.items():
            place = self._expert_of(path)
            if place is not None:
                layer, projection, expert = place
                default = _Separate((layer, projection), {}, [])
                reader = self._experts.setdefault((layer, projection), default)
                if not isinstance(reader, _Separate) or reader.shared or expert in reader.keys:
                    self._claimed(path, f"{layer}.{projection}")
                    continue
                reader.keys[expert] = keys
                reader.paths.append(path)
                self.layouts.add("per expert")
            elif (shared := self._shared_of(path)) is not None:
                self._claim(shared, _Separate(shared, {0: keys}, [path], shared=True), "shared")
            else:
                module = base.modules_by_published_name.get(path, path)
                if module in self._linear:
                    self._claimed(path, module)
                self._linear[module] = path, keys
        by_number = {int(_NUMBER.findall(f".{path}.")[0]): path for path in base.layers}
        for (number, projection), keys in self.file.stacked.items():
            if number not in by_number:
                self._problems.append(f"layer {number}: has no routed experts in this base")
                continue
            of_layer = by_number[number], projection
            self._claim(of_layer, _Stacked(of_layer, keys), "stacked")

    def _claim(self, place: Place, reader: _Reader, layout: str) -> None:
        if place in self._experts:
            self._claimed(f"its {layout} LoRA", ".".join(place))
        self._experts[place] = reader
        self.layouts.add(layout)

    def _claimed(self, path: str, module: str) -> None:
        self._problems.append(f"{path}: {module} has LoRA under another name too")

    def _expert_of(self, path: str) -> tuple[str, str, int] | None:
        found = names.expert_module(path)
        if found is not None and found.path in self.base.layers:
            return found.path, found.projection, found.expert
        return self.base.by_published_name.get(path)

    def _shared_of(self, path: str) -> Place | None:
        layer, _, projection = path.rpartition(".")
        there = self.base.layers.get(layer)
        return (layer, projection) if there and projection in there.shape.projections else None

    def _take_fused(self, layer: str, left: dict[str, Keys]) -> None:
        """Moves what lies in PEFT's form out of what is left."""
        try:
            slots = fused.slots_of(self.base.layers[layer])
        except UnsupportedModelError:
            return
        for owner in dict.fromkeys(slot.owner for slot in slots):
            nested = [slot for slot in slots if slot.owner == owner]
            present = [s for s in nested if f"{owner}.base_layer" in left] or self._targeted(nested)
            for path, slot in fused.key_paths(present):
                if path in left:
                    keys = left.pop(path)
                    self._fused[slot.parameter] = slot, keys
                    for projection in slot.parts:
                        self._claim((layer, projection), _Fused(slot, projection, keys), "fused")

    def _targeted(self, slots: list[fused.Slot]) -> list[fused.Slot]:
        """The one parameter that was adapted, where the keys do not tell."""
        if len(slots) == 1:
            return slots
        targets = self.file.config.target_parameters or []
        return [s for s in slots if any(f".{s.parameter}".endswith(f".{t}") for t in targets)][:1]

    @cached_property
    def _fused_layout(self) -> str:
        """As the shapes of all pairs tell. Raises CheckpointError where they do not."""
        fitting = [
            layout
            for layout in fused.LAYOUTS
            if all(
                fused.fits(slot, *self.file.shapes(keys), layout)
                for slot, keys in self._fused.values()
            )
        ]
        if len(fitting) > 1 and any(
            slot.a_holds_outputs(fitting[0]) != slot.a_holds_outputs(fitting[1])
            for slot, _ in self._fused.values()
        ):
            if not self.file.peft_version:
                raise CheckpointError(
                    f"{self.file.folder}: the shapes of its fused expert LoRA fit the form of PEFT "
                    f"up to 0.18 and the later one; write the release that saved it into its "
                    f'{CONFIG_NAME}, as in "peft_version": "0.18.1"'
                )
            fitting = [fused.layout_of(self.file.peft_version)]
        return fitting[0] if fitting else ""

    # Whether it fits

    def _check(self) -> None:
        if self._fused and not self._fused_layout:
            slot, keys = next(iter(self._fused.values()))
            shapes = " and ".join(map(str, self.file.shapes(keys)))
            self._problems.append(
                f"{slot.parameter}: got LoRA of shapes {shapes}, expected multiples of "
                f"{slot.experts} experts times rank, over {slot.sizes()}"
            )
        for (layer, projection), reader in self._experts.items():
            self._problems += self._expert_problems(layer, projection, reader)
        shapes_of = self.base.model.keys.shape
        for module, (_, keys) in self._linear.items():
            self._problems += _misfit(module, shapes_of(f"{module}.weight"), self.file.shapes(keys))
        for parameter in self.full:
            if shapes_of(parameter) is None and parameter not in self.base.model.tied:
                self._problems.append(f"{parameter}: the base has no such parameter")

    def _expert_problems(self, layer: str, projection: str, reader: _Reader) -> Iterator[str]:
        shape = self.base.layers[layer].shape
        name = f"{layer}.{projection}"
        if projection not in shape.projections:
            yield f"{name}: these experts have no {projection}"
        elif isinstance(reader, _Separate):
            if not reader.shared and reader.keys.keys() != set(range(shape.experts)):
                yield f"{name}: got {len(reader.keys)} experts, expected {shape.experts}"
            found = {self.file.shapes(keys) for keys in reader.keys.values()}
            for shapes in sorted(found):
                yield from _misfit(name, shape.of(projection), shapes)
            if len(found) > 1:
                yield f"{name}: its experts differ in rank"
        elif isinstance(reader, _Stacked):
            a, b = self.file.shapes(reader.keys)
            if len(a) != 3 or len(b) != 3 or a[0] != shape.experts or b[0] != shape.experts:
                yield f"{name}: got shapes {a} and {b}, expected [{shape.experts}, ., .]"
            else:
                yield from _misfit(name, shape.of(projection), (a[1:], b[1:]))


def _misfit(
    name: str, weight: tuple[int, ...] | None, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> Iterator[str]:
    a, b = shapes
    if weight is None:
        yield f"{name}: the base has no such module"
    elif len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        yield f"{name}: lora_A {a} and lora_B {b} do not belong together"
    elif (b[0], a[1]) != tuple(weight):
        yield f"{name}: the adapter is for a weight of {(b[0], a[1])}, the base has {tuple(weight)}"
