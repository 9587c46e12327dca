"""Merging an adapter into the original checkpoint, shard by shard, without building the model.

The merge takes the published full-precision weights, not the quantized ones of training, so the
result is as good as the adapter allows: W + scaling * B A, rounded once to the dtype of W.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from kt_sft.errors import AdapterMismatchError, CheckpointError, SettingsError
from kt_sft.export.adapter import Adapter, Lora
from kt_sft.export.base import Base
from kt_sft.families.finding import TensorPart
from kt_sft.files import durable
from kt_sft.files.safetensors import INDEX_NAME, SafetensorsCheckpoint, checkpoint_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Change:
    """LoRA of a tensor on disk, or of a part of it.

    module: of the model; of a layer's experts where there is a projection.
    """

    key: str
    module: str
    projection: str = ""
    expert: int = 0
    part: TensorPart | None = None

    def read(self, adapter: Adapter) -> Lora:
        """Its matrices."""
        if self.projection:
            return adapter.experts(self.module, self.projection).of(self.expert)
        return adapter.linear(self.module)

    def of(self, tensor: Tensor) -> Tensor:
        """What changes of its tensor, [outputs, inputs], a view."""
        return tensor if self.part is None else self.part.of(tensor)


class LoraDelta:
    """The changes that an adapter makes to the tensors of a checkpoint, by their keys on disk."""

    def __init__(self, adapter: Adapter) -> None:
        base = adapter.base
        self._adapter, self._checkpoint, self._tied = adapter, base.checkpoint, base.model.tied
        self._on_disk = base.on_disk
        self._lora: dict[str, list[_Change]] = {}
        self._replaced: dict[str, str] = {}
        self._resizable = {base.on_disk(name) for name in base.model.vocabulary}
        # Tensors that a checkpoint with tied embeddings does not have: name -> the adapter's
        # parameter, or the base's tensor that it was tied to.
        self._untied: dict[str, tuple[str, bool]] = {}
        lost = []
        for change in self._changes():
            self._lora.setdefault(change.key, []).append(change)
        for parameter in (*(f"{m}.weight" for m in adapter.linear_modules), *adapter.full):
            if base.on_disk(parameter) is None and parameter not in base.model.tied:
                lost.append(parameter)
        for parameter in adapter.full:
            if (on_disk := base.on_disk(parameter)) is not None:
                self._replaced[on_disk] = parameter
            elif parameter in base.model.tied:
                self._untied[parameter] = parameter, True
        if lost:
            raise AdapterMismatchError(
                f"{adapter.file.folder}: {len(lost)} modules of the adapter are not in the base "
                f"checkpoint, the first is {lost[0]}; export it with the base it was trained on"
            )

        # Where only one side of a tied pair was trained, the other is as it was.
        for name, source in self._tied.items():
            on_disk = self._on_disk(source)
            if name not in self._untied and on_disk is not None and on_disk in self._replaced:
                self._untied[name] = on_disk, False

    @property
    def vocabulary(self) -> int | None:
        """Rows of the trained embedding or head, which may be more than the base has."""
        rows = {
            self._adapter.file.shape(self._adapter.full[key])[0]
            for on_disk, key in self._replaced.items()
            if on_disk in self._resizable
        } | {
            self._adapter.file.shape(self._adapter.full[key])[0]
            for key, trained in self._untied.values()
            if trained
        }
        if len(rows) > 1:
            raise AdapterMismatchError(
                f"the adapter's embedding and head have {sorted(rows)} rows; train both, by "
                "additional_target, where the vocabulary grows"
            )
        return next(iter(rows), None)

    def untied(self) -> dict[str, Tensor]:
        """Tensors to write beside those of the base, whose embeddings are tied no more."""
        found = {}
        for name, (key, trained) in self._untied.items():
            source = self._on_disk(self._tied[name])
            assert source is not None
            like = self._checkpoint.get(source)
            tensor = self._full(key) if trained else self._checkpoint.get(key)
            assert isinstance(tensor, Tensor) and isinstance(like, Tensor)
            found[name] = tensor.to(like.dtype)
        return found

    def apply(self, key: str, weight: Tensor) -> Tensor:
        """The merged tensor for `key`, in the dtype of `weight`."""
        if key in self._replaced:
            trained = self._full(self._replaced[key])
            same = trained.shape[1:] == weight.shape[1:] and key in self._resizable
            if trained.shape != weight.shape and not same:
                raise AdapterMismatchError(
                    f"{key}: the adapter has shape {tuple(trained.shape)}, the base "
                    f"{tuple(weight.shape)}; export it with the base it was trained on"
                )
            return trained.to(weight.dtype)
        if key not in self._lora:
            return weight
        merged = weight.to(torch.float32, copy=True)
        for change in self._lora[key]:
            lora = change.read(self._adapter)
            view = change.of(merged)
            view.addmm_(lora.b, lora.a, alpha=lora.scaling)
        return merged.to(weight.dtype)

    def _full(self, parameter: str) -> Tensor:
        return self._adapter.file.get(self._adapter.full[parameter])

    def _changes(self) -> Iterator[_Change]:
        base = self._adapter.base
        for module in self._adapter.linear_modules:
            key = base.on_disk(f"{module}.weight")
            if key is not None:
                yield _Change(key, module)
        for layer in self._adapter.expert_layers:
            for projection in self._adapter.projections(layer):
                for expert in range(base.layers[layer].shape.experts):
                    key, part = base.sources[layer].place(projection, expert)
                    yield _Change(key, layer, projection, expert, part)


def export_merged(base: str | Path, adapter: str | Path | None, out: str | Path) -> Path:
    """Writes a full-precision checkpoint of base + adapter that stock Transformers loads.

    Keeps the shards of the base; holds one shard in memory. The folder appears complete or not at
    all. Raises CheckpointError, AdapterMismatchError, SettingsError.
    """
    base, out = Path(base), Path(out)
    if out.exists() and any(out.iterdir()):
        raise SettingsError(f"export_dir: {out} is not empty; give a new folder or remove it")
    files = checkpoint_files(base)
    needed = sum(f.stat().st_size for f in files)
    out.parent.mkdir(parents=True, exist_ok=True)
    durable.require_space(
        out.parent,
        int(needed * 1.02),
        f"{out}: the merged model needs",
        "free some, or set export_dir to a folder on another disk",
        CheckpointError,
    )
    opened = Base.open(base)
    if opened.checkpoint.quantized or opened.model.published:
        raise SettingsError(
            f"{base}: its weights are quantized, and merging would quantize them again; serve "
            "the adapter beside the base, or export with a bf16 version of it"
        )
    delta = LoraDelta(Adapter(adapter, opened)) if adapter else None
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.mkdir()
    added: dict[str, Tensor] = {}
    try:
        for file in tqdm(files, desc="Merging", unit="shard"):
            shard = SafetensorsCheckpoint([file])
            tensors = {}
            for key in shard:
                weight = shard.get(key)
                tensors[key] = (delta.apply(key, weight) if delta else weight).contiguous()
            if delta is not None and file == files[-1]:
                added = {name: t.contiguous() for name, t in delta.untied().items()}
                tensors.update(added)
            save_file(tensors, str(partial / file.name), metadata={"format": "pt"})
        _copy_side_files(base, partial)
        if delta is not None:
            _update_config(partial, delta.vocabulary, untied=bool(added))
            _update_index(partial, files[-1].name, added)
        durable.sync_tree(partial)
        if out.exists():
            out.rmdir()
        durable.publish(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    logger.info("merged %s and %s into %s", base, adapter, out)
    return out


def _update_config(folder: Path, vocabulary: int | None, untied: bool) -> None:
    """The size of the vocabulary and that embeddings are tied no more, wherever it says so."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        if vocabulary is not None and "vocab_size" in part:
            part["vocab_size"] = vocabulary
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    file.write_text(json.dumps(config, indent=2) + "\n")


def _update_index(folder: Path, shard: str, added: dict[str, Tensor]) -> None:
    """Lists the tensors that the base has none of."""
    file = folder / INDEX_NAME
    if not added or not file.exists():
        return
    index = json.loads(file.read_text())
    index["weight_map"].update(dict.fromkeys(added, shard))
    total = index.get("metadata", {}).get("total_size")
    if isinstance(total, int):
        index["metadata"]["total_size"] = total + sum(t.nbytes for t in added.values())
    file.write_text(json.dumps(index, indent=2) + "\n")


def _copy_side_files(base: Path, out: Path) -> None:
    """Configuration, tokenizer and index: every file beside the weights."""
    for file in base.iterdir():
        is_weight = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
        if file.is_file() and not is_weight and (file.name == INDEX_NAME or file.suffix != ".png"):
            shutil.copyfile(file, out / file.name)
