"""An adapter in any layout (layouts.py): LoRA of a base model's experts, of its layers, the rest.

Legend: E experts, r rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from kt_sft.adapters import names
from kt_sft.errors import AdapterMismatchError, CheckpointError, UnsupportedModelError
from kt_sft.export import fused
from kt_sft.export.adapter_file import AdapterFile
from kt_sft.export.base import Base
from kt_sft.export.layouts import (
    Fused,
    FusedPairs,
    Keys,
    Place,
    Reader,
    Separate,
    Stacked,
    misfit,
)

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


class Adapter:
    """What an adapter changes in a base model. Tensors are read when asked for."""

    def __init__(self, folder: str | Path, base: Base) -> None:
        """Raises AdapterMismatchError with what does not fit, CheckpointError, SettingsError."""
        self.base = base
        self.file = AdapterFile(folder)
        self.layouts: set[str] = set()
        self._experts: dict[Place, Reader] = {}
        self._linear: dict[str, tuple[str, Keys]] = {}  # module -> (path in the file, keys)
        self._fused = FusedPairs(self.file)
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
        return reader.rank, self._scaling(reader.whole_rank, reader.names)

    def is_shared(self, layer: str, projection: str) -> bool:
        """Whether one pair is for all experts."""
        return self._experts[layer, projection].shared

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
            scaling = self._scaling(reader.whole_rank, reader.names)
            self._read[projection] = Lora(*reader.read(), scaling)
        return self._read[projection]

    def linear(self, module: str) -> Lora:
        """The LoRA of another module."""
        path, keys = self._linear[module]
        a, b = self.file.pair(keys)
        return Lora(a, b, self._scaling(a.shape[0], [module, f"{module}.weight", path]))

    def fused_pair(self, slot: fused.Slot) -> fused.Pair:
        """The pair of a whole stacked parameter."""
        return self._fused.pair(slot)

    def undivided(self, slot: fused.Slot) -> bool:
        """Whether gate and up were trained as one, with an A of both."""
        return slot in self._fused and len(slot.parts) == 2 and not self._fused.halved

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
                default = Separate(self.file, (layer, projection))
                reader = self._experts.setdefault((layer, projection), default)
                if not isinstance(reader, Separate) or reader.shared or expert in reader.keys:
                    self._claimed(path, f"{layer}.{projection}")
                    continue
                reader.keys[expert] = keys
                reader.paths.append(path)
                self.layouts.add("per expert")
            elif (shared := self._shared_of(path)) is not None:
                reader = Separate(self.file, shared, True, {0: keys}, [path])
                self._claim(shared, reader, "shared")
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
            self._claim(of_layer, Stacked(self.file, of_layer, keys), "stacked")

    def _claim(self, place: Place, reader: Reader, layout: str) -> None:
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
                    self._fused.add(slot, left.pop(path))
                    for projection in slot.parts:
                        reader = Fused(self._fused, slot, projection)
                        self._claim((layer, projection), reader, "fused")

    def _targeted(self, slots: list[fused.Slot]) -> list[fused.Slot]:
        """The one parameter that was adapted, where the keys do not tell."""
        if len(slots) == 1:
            return slots
        targets = self.file.config.target_parameters or []
        return [s for s in slots if any(f".{s.parameter}".endswith(f".{t}") for t in targets)][:1]

    # Whether it fits

    def _check(self) -> None:
        self._problems += self._fused.problems()
        for (layer, projection), reader in self._experts.items():
            shape = self.base.layers[layer].shape
            if projection in shape.projections:
                self._problems += reader.problems(shape)
            else:
                self._problems.append(f"{layer}.{projection}: these experts have no {projection}")
        shapes_of = self.base.model.keys.shape
        for module, (_, keys) in self._linear.items():
            self._problems += misfit(module, shapes_of(f"{module}.weight"), self.file.shapes(keys))
        for parameter in self.full:
            if shapes_of(parameter) is None and parameter not in self.base.model.tied:
                self._problems.append(f"{parameter}: the base has no such parameter")
