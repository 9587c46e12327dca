"""What adapters change in the tensors of a checkpoint: W + scaling * B A, in fp32, rounded once.

Several adapters are applied in their order, as they were trained on top of one another. Experts in
a tensor [E, ., .] come one at a time, so that it is never whole in memory in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kt_sft.errors import AdapterMismatchError
from kt_sft.export.adapter import Adapter, Lora
from kt_sft.export.base import Base
from kt_sft.families.finding import TensorPart
from kt_sft.files.safetensors_writer import DTYPES, Entry
from kt_sft.kernels import CodedMatrix


@dataclass(frozen=True)
class _Full:
    """A parameter that was trained in full: its key in the adapter's file."""

    adapter: Adapter
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        """As it was trained."""
        return self.adapter.file.shape(self.key)

    def read(self) -> Tensor:
        """As it was trained."""
        return self.adapter.file.get(self.key)


@dataclass(frozen=True)
class _Change:
    """LoRA of a tensor on disk, or of a part of it.

    module: of the model; of a layer's experts where there is a projection.
    """

    adapter: Adapter
    key: str
    module: str
    projection: str = ""
    expert: int = 0
    part: TensorPart | None = None

    def read(self) -> Lora:
        """Its matrices."""
        if self.projection:
            return self.adapter.experts(self.module, self.projection).of(self.expert)
        return self.adapter.linear(self.module)


class Delta:
    """The tensors of a base checkpoint with adapters in them, by their keys on disk.

    dtype: what quantized weights become. Raises AdapterMismatchError for an adapter that changes
    what the checkpoint does not have.
    """

    def __init__(
        self, base: Base, adapters: Sequence[Adapter], dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self._base, self._dtype = base, dtype
        self._lora: dict[str, list[_Change]] = {}
        self._full: dict[str, _Full] = {}
        for adapter in adapters:
            for parameter, stored in adapter.full.items():
                key = self._key_of(parameter)
                # In the place of what came before it.
                self._full[key] = _Full(adapter, stored)
                self._lora.pop(key, None)
            for change in self._changes(adapter):
                self._lora.setdefault(change.key, []).append(change)
        self._transposed = set(_transposed(base))
        self._vocabulary = {self._written_as(name) for name in base.model.vocabulary}
        self._tied_to = self._untie()
        self._check_vocabulary()

    def _key_of(self, parameter: str) -> str:
        """The tensor that a parameter is, or will be where it is tied to another one."""
        key = self._base.on_disk(parameter)
        if key is not None:
            return key
        if parameter in self._base.model.tied:
            return parameter
        raise AdapterMismatchError(
            f"{parameter}: was trained and is no tensor of {self._base.folder}; export with the "
            "base that it was trained on"
        )

    def _written_as(self, parameter: str) -> str:
        return self._base.on_disk(parameter) or parameter

    def _untie(self) -> dict[str, str]:
        """Tensors to write beside the base's, whose embeddings are tied no more -> the base's."""
        found = {}
        self.untied = False
        for name, source in self._base.model.tied.items():
            sides = self._written_as(name), self._written_as(source)
            if not any(side in self._full or side in self._lora for side in sides):
                continue
            self.untied = True
            if sides[0] not in self._base.checkpoint:
                found[sides[0]] = sides[1]
        return found

    def _check_vocabulary(self) -> None:
        rows = {
            key: self.entry(key).shape[0]
            for key in self._vocabulary
            if key in self._base.checkpoint or key in self._tied_to
        }
        if len(set(rows.values())) > 1:
            listed = ", ".join(f"{key} {count}" for key, count in sorted(rows.items()))
            raise AdapterMismatchError(
                f"the embedding and the head would differ in rows ({listed}); where the vocabulary "
                "grows, train both, by additional_target"
            )

    @property
    def vocabulary(self) -> int | None:
        """Rows of a trained embedding or head, which may be more than the base has."""
        return next(
            (self._full[key].shape[0] for key in self._vocabulary & self._full.keys()), None
        )

    @property
    def added(self) -> list[str]:
        """Tensors to write beside those of the base."""
        return [*self._tied_to]

    def entry(self, key: str) -> Entry:
        """What a tensor will be."""
        checkpoint = self._base.checkpoint
        source = self._tied_to.get(key, key)
        shape = checkpoint.shape(source)
        if key in self._full:
            trained = self._full[key].shape
            grown = trained[1:] == shape[1:] and key in self._vocabulary
            if trained != shape and not grown:
                raise AdapterMismatchError(
                    f"{key}: the adapter has shape {trained}, the base {shape}; export it with the "
                    "base it was trained on"
                )
            shape = trained
        elif key in self._transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        if checkpoint.is_quantized(source):
            return Entry(shape, self._dtype)
        return Entry(shape, DTYPES[checkpoint.dtype(source)])

    def pieces(self, key: str) -> Iterator[Tensor]:
        """A tensor, in pieces along its first dimension."""
        checkpoint, lora = self._base.checkpoint, key in self._lora
        source = self._tied_to.get(key, key)
        if key in self._full:
            trained = self._full[key].read()
            yield self._changed(key, trained) if lora else trained
        elif not checkpoint.is_quantized(source) and not lora:
            yield _plain(checkpoint.get(source))
        elif len(checkpoint.shape(source)) == 3:
            for expert in range(checkpoint.shape(source)[0]):
                matrix = self._changed(key, checkpoint.get(source, expert), expert)
                yield (matrix.T if key in self._transposed else matrix).unsqueeze(0)
        else:
            yield self._changed(key, checkpoint.get(source))

    def _changed(self, key: str, stored: Tensor | CodedMatrix, expert: int | None = None) -> Tensor:
        """A matrix, or one expert of a stacked tensor, with its LoRA."""
        if isinstance(stored, CodedMatrix):
            weight = stored.dequantize()
        else:
            weight = stored.to(torch.float32, copy=True)
        for change in self._lora.get(key, []):
            part = change.part
            if expert is not None and part is not None and part.expert != expert:
                continue
            lora = change.read()
            view = weight
            if part is not None:
                view = part.of(weight) if expert is None else part.within(weight)
            view.addmm_(lora.b, lora.a, alpha=lora.scaling)
        return weight

    def _changes(self, adapter: Adapter) -> Iterator[_Change]:
        base = self._base
        for module in adapter.linear_modules:
            yield _Change(adapter, self._key_of(f"{module}.weight"), module)
        for layer in adapter.expert_layers:
            for projection in adapter.projections(layer):
                for expert in range(base.layers[layer].shape.experts):
                    key, part = base.sources[layer].place(projection, expert)
                    yield _Change(adapter, key, layer, projection, expert, part)


def _plain(stored: Tensor | CodedMatrix) -> Tensor:
    assert isinstance(stored, Tensor)
    return stored


def _transposed(base: Base) -> Iterator[str]:
    """Stacked tensors in codes that lie the other way round than the model's parameters."""
    for path, layer in base.layers.items():
        for projection, part in layer.kind.parts.items():
            key, place = base.sources[path].place(projection, 0)
            stacked = place.expert is not None and base.checkpoint.is_quantized(key)
            if stacked and bool(part.transposed) != place.transposed:
                yield key
