"""What adapters change in the tensors of a checkpoint: W + scaling * B A, in fp32, rounded once.

Several adapters are applied in their order, as they were trained on top of one another. Stacked
experts come one at a time, so that a tensor of all of them is never in memory in fp32.
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
        self._full: dict[str, tuple[Adapter, str]] = {}  # parameter -> the last that trained it
        for adapter in adapters:
            for change in self._changes(adapter):
                self._lora.setdefault(change.key, []).append(change)
            for parameter in adapter.full:
                self._full[parameter] = adapter, adapter.full[parameter]
        tied = base.model.tied
        self._replaced: dict[str, str] = {}  # key on disk -> parameter
        # Tensors that a checkpoint with tied embeddings does not have: name -> the adapter's
        # parameter, or the base's tensor that it was tied to.
        self._untied: dict[str, tuple[str, bool]] = {}
        for parameter in self._full:
            if (on_disk := base.on_disk(parameter)) is not None:
                self._replaced[on_disk] = parameter
            elif parameter in tied:
                self._untied[parameter] = parameter, True
            else:
                raise AdapterMismatchError(
                    f"{parameter}: was trained in full and is no tensor of {base.folder}; export "
                    "with the base that it was trained on"
                )
        # Where only one side of a tied pair was trained, the other is as it was.
        for name, source in tied.items():
            on_disk = base.on_disk(source)
            if name not in self._untied and on_disk is not None and on_disk in self._replaced:
                self._untied[name] = on_disk, False
        self._resizable = {base.on_disk(name) for name in base.model.vocabulary}
        self._transposed = set(_transposed(base))

    @property
    def vocabulary(self) -> int | None:
        """Rows of the trained embedding or head, which may be more than the base has."""
        trained = [p for key, p in self._replaced.items() if key in self._resizable]
        trained += [name for name, (_, own) in self._untied.items() if own]
        rows = {self._full_shape(parameter)[0] for parameter in trained}
        if len(rows) > 1:
            raise AdapterMismatchError(
                f"the adapter's embedding and head have {sorted(rows)} rows; train both, by "
                "additional_target, where the vocabulary grows"
            )
        return next(iter(rows), None)

    @property
    def untied(self) -> list[str]:
        """Tensors to write beside those of the base, whose embeddings are tied no more."""
        return [*self._untied]

    def entry(self, key: str) -> Entry:
        """What a tensor will be."""
        checkpoint = self._base.checkpoint
        if key in self._untied:
            source = self._base.on_disk(self._base.model.tied[key])
            assert source is not None
            name, own = self._untied[key]
            shape = self._full_shape(name) if own else checkpoint.shape(name)
            return Entry(shape, DTYPES[checkpoint.dtype(source)])
        shape = checkpoint.shape(key)
        if key in self._replaced:
            trained = self._full_shape(self._replaced[key])
            same = trained[1:] == shape[1:] and key in self._resizable
            if trained != shape and not same:
                raise AdapterMismatchError(
                    f"{key}: the adapter has shape {trained}, the base {shape}; export it with the "
                    "base it was trained on"
                )
            shape = trained
        if checkpoint.is_quantized(key):
            if key in self._transposed:
                shape = (*shape[:-2], shape[-1], shape[-2])
            return Entry(shape, self._dtype)
        return Entry(shape, DTYPES[checkpoint.dtype(key)])

    def pieces(self, key: str) -> Iterator[Tensor]:
        """A tensor, in pieces along its first dimension."""
        checkpoint = self._base.checkpoint
        if key in self._untied:
            name, own = self._untied[key]
            yield self._trained(name) if own else _plain(checkpoint.get(name))
        elif key in self._replaced:
            yield self._trained(self._replaced[key])
        elif not checkpoint.is_quantized(key) and key not in self._lora:
            yield _plain(checkpoint.get(key))
        elif len(checkpoint.shape(key)) == 3:
            for expert in range(checkpoint.shape(key)[0]):
                matrix = self._changed(key, checkpoint.get(key, expert), expert)
                yield (matrix.T if key in self._transposed else matrix).unsqueeze(0)
        else:
            yield self._changed(key, checkpoint.get(key))

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

    def _trained(self, parameter: str) -> Tensor:
        adapter, key = self._full[parameter]
        return adapter.file.get(key)

    def _full_shape(self, parameter: str) -> tuple[int, ...]:
        adapter, key = self._full[parameter]
        return adapter.file.shape(key)

    def _changes(self, adapter: Adapter) -> Iterator[_Change]:
        base = self._base
        for module in adapter.linear_modules:
            key = base.on_disk(f"{module}.weight")
            if key is None:
                raise AdapterMismatchError(
                    f"{module}: has LoRA and is no tensor of {base.folder}; export with the base "
                    "that it was trained on"
                )
            yield _Change(adapter, key, module)
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
