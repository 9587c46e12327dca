"""An adapter as the pairs of matrices that a program reads, in its layout.

Legend: E experts, R rank of a pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kt_sft.export import fused
from kt_sft.export.adapter import Adapter
from kt_sft.export.programs import FUSED, FUSED_0_18, PUBLISHED, SHARED, Program

_STACKED = (FUSED, FUSED_0_18)


@dataclass(frozen=True)
class Item:
    """One pair of the file, and zeros by itself.

    path: before `.lora_A`. target: the module or parameter that it belongs to.
    rank, scaling: of the pair, or of each of the E that lie in it. rows: of lora_B. columns: of
    lora_A. experts: E of a stacked parameter, 1 elsewhere.
    """

    path: str
    target: str
    rank: int
    scaling: float
    rows: int
    columns: int
    experts: int = 1

    def read(self, adapter: Adapter, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B in fp32, with zeros up to a rank, and b for another scaling."""
        wide = rank * self.experts
        return torch.zeros(wide, self.columns), torch.zeros(self.rows, wide)


@dataclass(frozen=True)
class ModuleItem(Item):
    """LoRA of a layer beside the experts, `target`."""

    def read(self, adapter: Adapter, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        """See Item."""
        lora = adapter.linear(self.target)
        return _padded(lora.a, lora.b, rank, lora.scaling / scaling)


@dataclass(frozen=True, kw_only=True)
class ExpertItem(Item):
    """LoRA of one expert's projection."""

    layer: str
    projection: str
    expert: int

    def read(self, adapter: Adapter, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        """See Item."""
        lora = adapter.experts(self.layer, self.projection).of(self.expert)
        return _padded(lora.a, lora.b, rank, lora.scaling / scaling)


@dataclass(frozen=True, kw_only=True)
class StackedItem(Item):
    """LoRA of a parameter of all experts; projections: those of it that have some."""

    layer: str
    slot: fused.Slot
    projections: tuple[str, ...]
    layout: str

    def read(self, adapter: Adapter, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        """See Item."""
        experts = self.slot.layer.shape.experts
        pairs, missing = {}, rank - self.rank
        if adapter.undivided(self.slot):
            whole = adapter.fused_pair(self.slot)
            factor = adapter.experts(self.layer, self.projections[0]).scaling / scaling
            pair = fused.Pair(*_padded(whole.a, whole.b, rank, factor))
            return fused.whole_to_peft(self.slot, pair, self.layout)
        for projection in self.projections:
            lora = adapter.experts(self.layer, projection)
            a, b = _padded(lora.a, lora.b, lora.a.shape[1] + missing, lora.scaling / scaling)
            pairs[projection] = fused.Pair(a.expand(experts, -1, -1), b.expand(experts, -1, -1))
            missing = 0  # behind the first
        return fused.to_peft(self.slot, pairs, self.layout)


def _padded(a: Tensor, b: Tensor, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    """a [..., R, inputs] and b [..., outputs, R] at a rank, b times a factor."""
    missing = rank - a.shape[-2]
    return pad(a, (0, 0, 0, missing)), pad(b if factor == 1 else b * factor, (0, missing))


class Form:
    """The items of an adapter for a program."""

    def __init__(self, adapter: Adapter, program: Program) -> None:
        self._adapter, self._base, self._program = adapter, adapter.base, program
        self.layout = program.layout(adapter)

    @property
    def published(self) -> bool:
        """Whether modules have the checkpoint's names."""
        return self.layout == PUBLISHED

    @property
    def stacked(self) -> bool:
        """Whether experts are in PEFT's form for stacked parameters."""
        return self.layout in _STACKED

    def items(self) -> Iterator[Item]:
        """In the order of the model: the experts, then the other modules."""
        adapter = self._adapter
        whole = self._program.whole and bool(adapter.expert_layers)
        for layer in self._base.layers if whole else adapter.expert_layers:
            have = adapter.projections(layer)
            if self.stacked:
                yield from self._stacked(layer, have, whole)
                continue
            every = self._base.layers[layer].shape.projections
            for projection in every if whole else have:
                yield from self._of_experts(layer, projection, projection in have)
        for module in adapter.linear_modules:
            path = self._base.published_module(module) if self.published else module
            yield ModuleItem(path, module, *adapter.linear_shape(module))
        yield from self._siblings()

    def _of_experts(self, layer: str, projection: str, there: bool) -> Iterator[Item]:
        adapter, shape = self._adapter, self._base.layers[layer].shape
        rank, scaling = adapter.expert_rank(layer, projection)
        rows, columns = shape.of(projection)
        target = f"{layer}.{projection}"
        if self.layout == SHARED and there and adapter.is_shared(layer, projection):
            yield ExpertItem(
                target, target, rank, scaling, rows, columns,
                layer=layer, projection=projection, expert=0,
            )  # fmt: skip
            return
        for expert in range(shape.experts):
            path = f"{layer}.{expert}.{projection}"
            if self.published:
                path = self._base.published_expert(layer, projection, expert) or path
            if there:
                yield ExpertItem(
                    path, target, rank, scaling, rows, columns,
                    layer=layer, projection=projection, expert=expert,
                )  # fmt: skip
            else:
                yield Item(path, target, rank, scaling, rows, columns)

    def _stacked(self, layer: str, have: list[str], whole: bool) -> Iterator[Item]:
        adapter, layout = self._adapter, str(self.layout)
        slots = fused.slots_of(self._base.layers[layer])
        present = [s for s in slots if whole or any(p in have for p in s.parts)]
        for path, slot in fused.key_paths(present):
            projections = tuple(p for p in slot.parts if p in have)
            ranks = [adapter.expert_rank(layer, p) for p in projections or slot.parts]
            outputs, inputs = slot.sizes()
            rows, columns = (inputs, outputs) if slot.a_holds_outputs(layout) else (outputs, inputs)
            rank = ranks[0][0] if adapter.undivided(slot) else sum(rank for rank, _ in ranks)
            of_slot = rank, ranks[0][1], rows, columns, slot.experts
            if projections:
                yield StackedItem(
                    path, slot.parameter, *of_slot,
                    layer=layer, slot=slot, projections=projections, layout=layout,
                )  # fmt: skip
            else:
                yield Item(path, slot.parameter, *of_slot)

    def _siblings(self) -> Iterator[Item]:
        """Zeros for modules that the program needs beside those that have LoRA."""
        adapter = self._adapter
        have = set(adapter.linear_modules)
        for group in self._program.together:
            found = (m.rpartition(".") for m in adapter.linear_modules)
            for parent in sorted({parent for parent, _, leaf in found if leaf in group}):
                like = next(f"{parent}.{n}" for n in group if f"{parent}.{n}" in have)
                rank, scaling, _, _ = adapter.linear_shape(like)
                for module in (f"{parent}.{name}" for name in group):
                    shape = self._base.model.keys.shape(f"{module}.weight")
                    if module not in have and shape is not None:
                        yield Item(module, module, rank, scaling, *shape)
