"""Expert LoRA in PEFT's form for stacked parameters, which it calls `target_parameters`.

A parameter [E, d1, d2] of all experts takes one pair of matrices of rank E * R:

    lora_A [E * R, x]    row e * R + r         the expert is the slowest index
    lora_B [y, R * E]    column r * E + e      and here the fastest

Up to PEFT 0.18 x is d1 and y is d2, whatever the model computes with them; from 0.19 on it is the
other way round, but for modules that say `is_transposed`. Gate and up that lie in one parameter
take the sum of their ranks, block-diagonal. Several parameters of one module nest: each but the
last, in the order of the module's parameters, has `.base_layer` once more in its path.

Legend: E experts, R rank of the pair.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from packaging import version
from torch import Tensor
from torch.nn.functional import pad

from kt_sft.errors import UnsupportedModelError
from kt_sft.families.finding import FoundExperts, output_rows
from kt_sft.families.table import Part, parameter

LAYOUTS = ("peft-0.18", "peft-0.19")
# The release that an adapter says it was written by, which decides where shapes do not.
WRITTEN_BY = dict(zip(LAYOUTS, ("0.18.1", "0.19.0"), strict=True))


def layout_of(peft_version: str) -> str:
    """The layout that a release of PEFT writes."""
    return LAYOUTS[version.parse(peft_version) >= version.parse("0.19.0.dev0")]


@dataclass(frozen=True)
class Pair:
    """LoRA of one projection of all experts: a [E, R, inputs], b [E, outputs, R]."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Slot:
    """One stacked parameter of a layer's experts, and the projections that lie in it."""

    layer: FoundExperts
    tensor: str  # below the stock module
    parts: dict[str, Part]  # projection -> where it lies

    @property
    def parameter(self) -> str:
        """Its name in the model."""
        return f"{self.layer.path}.{self.tensor}"

    @property
    def owner(self) -> str:
        """The module that holds it."""
        return self.parameter.rpartition(".")[0]

    @property
    def experts(self) -> int:
        """The first dimension of the parameter, which identity experts may belong to."""
        found = parameter(self.layer.module, self.tensor)
        assert found is not None
        return found.shape[0]

    def a_holds_outputs(self, layout: str) -> bool:
        """Whether PEFT's lora_A runs over the outputs of the experts, so that a and b change."""
        transposed = bool(next(iter(self.parts.values())).transposed)
        module = self.layer.module
        owner = self.tensor.rpartition(".")[0]
        holder = module.get_submodule(owner) if owner else module
        as_it_lies = layout == "peft-0.18" or bool(getattr(holder, "is_transposed", False))
        # A parameter [E, inputs, outputs] has its inputs first.
        return as_it_lies != transposed

    def sizes(self) -> tuple[int, int]:
        """(outputs, inputs) of the whole parameter."""
        outputs, inputs = self.layer.shape.of(next(iter(self.parts)))
        return outputs * (1 if len(self.parts) == 1 else 2), inputs


def slots_of(layer: FoundExperts) -> list[Slot]:
    """The stacked parameters of a layer, in the order of its module's parameters.

    Raises UnsupportedModelError where experts do not lie in parameters [E, ., .].
    """
    by_tensor: dict[str, dict[str, Part]] = {}
    for projection, part in layer.kind.parts.items():
        by_tensor.setdefault(part.tensor, {})[projection] = part
    for tensor, parts in by_tensor.items():
        found = parameter(layer.module, tensor)
        if found is None or found.dim() != 3 or any(p.flat for p in parts.values()):
            raise UnsupportedModelError(
                f"{layer.path}.{tensor}: is no parameter [experts, ., .], which PEFT's "
                "target_parameters need; use --to merged"
            )
    order = [name for name, _ in layer.module.named_parameters()]
    return [Slot(layer, t, by_tensor[t]) for t in sorted(by_tensor, key=order.index)]


def key_paths(slots: Collection[Slot]) -> Iterator[tuple[str, Slot]]:
    """(path before `.lora_A`, slot) of those parameters of a layer that PEFT was given."""
    for owner in dict.fromkeys(slot.owner for slot in slots):
        nested = [slot for slot in slots if slot.owner == owner]
        for depth, slot in enumerate(reversed(nested)):
            yield owner + ".base_layer" * depth, slot


def to_peft(slot: Slot, pairs: dict[str, Pair], layout: str) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of a parameter from the pairs of its projections."""
    outputs, _ = slot.sizes()
    rank = sum(pair.a.shape[1] for pair in pairs.values())
    first = next(iter(pairs.values()))
    a = torch.cat([pair.a for pair in pairs.values()], dim=1)
    b = first.b.new_zeros(first.b.shape[0], outputs, rank)
    start = 0
    for projection, pair in pairs.items():
        end = start + pair.a.shape[1]
        b[:, output_rows(slot.parts[projection].rows, outputs), start:end] = pair.b
        start = end
    return whole_to_peft(slot, Pair(a, b), layout)


def whole_to_peft(slot: Slot, pair: Pair, layout: str) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B from the pair of a whole parameter; idle experts of it get zeros."""
    a, b = pair.a, pair.b
    idle = slot.experts - a.shape[0]
    a, b = (pad(t, (0, 0, 0, 0, 0, idle)) for t in (a, b))
    if slot.a_holds_outputs(layout):
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return a.reshape(-1, a.shape[-1]).contiguous(), b.permute(1, 2, 0).flatten(1).contiguous()


def from_peft(slot: Slot, lora_a: Tensor, lora_b: Tensor, layout: str) -> Pair:
    """The pair of a whole parameter, b over all of its outputs."""
    used = slot.layer.shape.experts
    a = lora_a.view(slot.experts, -1, lora_a.shape[1])[:used]
    b = lora_b.view(lora_b.shape[0], -1, slot.experts).permute(2, 0, 1)[:used]
    return (
        Pair(b.transpose(1, 2), a.transpose(1, 2)) if slot.a_holds_outputs(layout) else Pair(a, b)
    )


def fits(slot: Slot, shape_a: tuple[int, ...], shape_b: tuple[int, ...], layout: str) -> bool:
    """Whether matrices of these shapes are of this parameter, in this layout."""
    outputs, inputs = slot.sizes()
    x, y = (outputs, inputs) if slot.a_holds_outputs(layout) else (inputs, outputs)
    rank = shape_a[0]
    return shape_a == (rank, x) and shape_b == (y, rank) and rank % slot.experts == 0


def is_block_diagonal(slot: Slot, pair: Pair) -> bool:
    """Whether the first half of the rank is the first projection's alone, and so on."""
    rank = pair.a.shape[1]
    if len(slot.parts) != 2 or rank % 2:
        return False
    outputs, _ = slot.sizes()
    first, second = (pair.b[:, output_rows(part.rows, outputs)] for part in slot.parts.values())
    return not bool(first[..., rank // 2 :].any()) and not bool(second[..., : rank // 2].any())


def part_of(slot: Slot, pair: Pair, projection: str, halved: bool) -> Pair:
    """One projection of a parameter's pair; halved: the parameter is block-diagonal."""
    rows = output_rows(slot.parts[projection].rows, slot.sizes()[0])
    rank = pair.a.shape[1]
    ranks = slice(None)
    if halved:
        place = list(slot.parts).index(projection)
        ranks = slice(place * rank // 2, (place + 1) * rank // 2)
    return Pair(pair.a[:, ranks], pair.b[:, rows, ranks])
