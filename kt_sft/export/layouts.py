"""The layouts of expert LoRA in files, each read as a [E or 1, r, inputs], b [E or 1, outputs, r].

    per expert     <experts>.<e>.gate_proj.lora_A.weight [r, in], by the model's names or by those
                   of the checkpoint (Mixtral: block_sparse_moe.experts.<e>.w1)
    shared         <experts>.gate_proj.lora_A.weight [r, in], one pair for all experts
    fused          PEFT's target_parameters, of releases up to 0.18 and later (fused.py)
    stacked        KTransformers' file beside the adapter, [E, r, in] and [E, out, r]

Legend: E experts, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor

from kt_sft.errors import CheckpointError
from kt_sft.export import fused
from kt_sft.export.adapter_file import AdapterFile
from kt_sft.families.shape import ExpertsShape

Keys = tuple[str, str]
Place = tuple[str, str]  # path of a layer's hybrid experts, projection
Shapes = tuple[tuple[int, ...], tuple[int, ...]]


class Reader(Protocol):
    """A projection of a layer's experts."""

    shared: bool  # whether one pair is for all experts

    @property
    def names(self) -> list[str]:
        """What patterns were matched against."""

    @property
    def whole_rank(self) -> int:
        """The rank that its scaling is made with."""

    @property
    def rank(self) -> int:
        """r of what is read."""

    def read(self) -> tuple[Tensor, Tensor]:
        """a and b, in fp32."""

    def problems(self, shape: ExpertsShape) -> Iterator[str]:
        """What does not fit experts of this shape."""


@dataclass
class Separate:
    """Matrices of their own for each expert, or one pair for all."""

    file: AdapterFile
    place: Place
    shared: bool = False
    keys: dict[int, Keys] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)  # in the file

    @property
    def names(self) -> list[str]:
        """See Reader."""
        return [".".join(self.place), *self.paths]

    @property
    def whole_rank(self) -> int:
        """See Reader."""
        return self.file.shapes(next(iter(self.keys.values())))[0][0]

    @property
    def rank(self) -> int:
        """See Reader."""
        return self.whole_rank

    def read(self) -> tuple[Tensor, Tensor]:
        """See Reader."""
        pairs = [self.file.pair(self.keys[expert]) for expert in sorted(self.keys)]
        return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])

    def problems(self, shape: ExpertsShape) -> Iterator[str]:
        """See Reader."""
        name = ".".join(self.place)
        if not self.shared and self.keys.keys() != set(range(shape.experts)):
            yield f"{name}: got {len(self.keys)} experts, expected {shape.experts}"
        found = {self.file.shapes(keys) for keys in self.keys.values()}
        for shapes in sorted(found):
            yield from misfit(name, shape.of(self.place[1]), shapes)
        if len(found) > 1:
            yield f"{name}: its experts differ in rank"


@dataclass
class Stacked:
    """One tensor [E, ., .] for each factor."""

    file: AdapterFile
    place: Place
    keys: Keys
    shared: bool = False

    @property
    def names(self) -> list[str]:
        """See Reader."""
        return [".".join(self.place)]

    @property
    def whole_rank(self) -> int:
        """See Reader."""
        return self.file.shapes(self.keys)[0][1]

    @property
    def rank(self) -> int:
        """See Reader."""
        return self.whole_rank

    def read(self) -> tuple[Tensor, Tensor]:
        """See Reader."""
        return self.file.pair(self.keys)

    def problems(self, shape: ExpertsShape) -> Iterator[str]:
        """See Reader."""
        name = ".".join(self.place)
        a, b = self.file.shapes(self.keys)
        if len(a) != 3 or len(b) != 3 or a[0] != shape.experts or b[0] != shape.experts:
            yield f"{name}: got shapes {a} and {b}, expected [{shape.experts}, ., .]"
        else:
            yield from misfit(name, shape.of(self.place[1]), (a[1:], b[1:]))


@dataclass
class Fused:
    """A part of a stacked parameter's pair."""

    pairs: FusedPairs
    slot: fused.Slot
    projection: str
    shared: bool = False

    @property
    def names(self) -> list[str]:
        """See Reader."""
        return [self.slot.parameter]

    @property
    def whole_rank(self) -> int:
        """See Reader."""
        return self.pairs.rank(self.slot)

    @property
    def rank(self) -> int:
        """See Reader."""
        return self.whole_rank // (2 if self._halved else 1)

    @property
    def _halved(self) -> bool:
        return len(self.slot.parts) == 2 and self.pairs.halved

    def read(self) -> tuple[Tensor, Tensor]:
        """See Reader."""
        whole = self.pairs.pair(self.slot)
        pair = fused.part_of(self.slot, whole, self.projection, self._halved)
        return pair.a, pair.b

    def problems(self, shape: ExpertsShape) -> Iterator[str]:
        """See Reader; those of all pairs are FusedPairs'."""
        yield from ()


class FusedPairs:
    """The pairs of an adapter's stacked parameters, all in the layout of one release of PEFT."""

    def __init__(self, file: AdapterFile) -> None:
        self._file = file
        self._keys: dict[str, tuple[fused.Slot, Keys]] = {}

    def add(self, slot: fused.Slot, keys: Keys) -> None:
        """Takes the pair of a parameter."""
        self._keys[slot.parameter] = slot, keys

    def __contains__(self, slot: fused.Slot) -> bool:
        return slot.parameter in self._keys

    def rank(self, slot: fused.Slot) -> int:
        """R of a parameter's pair."""
        _, keys = self._keys[slot.parameter]
        return self._file.shapes(keys)[0][0] // slot.experts

    def pair(self, slot: fused.Slot) -> fused.Pair:
        """The pair of a whole parameter, in fp32."""
        _, keys = self._keys[slot.parameter]
        return fused.from_peft(slot, *self._file.pair(keys), self.layout)

    @cached_property
    def halved(self) -> bool:
        """Whether gate and up have halves of their own in every pair that they share."""
        together = [slot for slot, _ in self._keys.values() if len(slot.parts) == 2]
        return bool(together) and all(
            fused.is_block_diagonal(slot, self.pair(slot)) for slot in together
        )

    @cached_property
    def layout(self) -> str:
        """As the shapes of all pairs tell; empty where they fit none. Raises CheckpointError."""
        found = list(self._keys.values())
        fitting = [
            layout
            for layout in fused.LAYOUTS
            if all(fused.fits(slot, *self._file.shapes(keys), layout) for slot, keys in found)
        ]
        differ = any(len({slot.a_holds_outputs(f) for f in fitting}) > 1 for slot, _ in found)
        if not differ:
            return fitting[0] if fitting else ""
        if not self._file.peft_version:
            raise CheckpointError(
                f"{self._file.folder}: the shapes of its fused expert LoRA fit the form of PEFT "
                "up to 0.18 and the later one; write the release that saved it into its "
                f'{CONFIG_NAME}, as in "peft_version": "0.18.1"'
            )
        return fused.layout_of(self._file.peft_version)

    def problems(self) -> Iterator[str]:
        """What does not fit."""
        if self._keys and not self.layout:
            slot, keys = next(iter(self._keys.values()))
            shapes = " and ".join(map(str, self._file.shapes(keys)))
            yield (
                f"{slot.parameter}: got LoRA of shapes {shapes}, expected multiples of "
                f"{slot.experts} experts times rank, over {slot.sizes()}"
            )


def misfit(name: str, weight: tuple[int, ...] | None, shapes: Shapes) -> Iterator[str]:
    """What does not fit of A and B of these shapes to a weight [outputs, inputs]."""
    a, b = shapes
    if weight is None:
        yield f"{name}: the base has no such module"
    elif len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        yield f"{name}: lora_A {a} and lora_B {b} do not belong together"
    elif (b[0], a[1]) != tuple(weight):
        yield f"{name}: the adapter is for a weight of {(b[0], a[1])}, the base has {tuple(weight)}"
