"""Merging an adapter into the original checkpoint, shard by shard, without building the model.

The merge takes the published full-precision weights, not the quantized ones of training, so the
result is as good as the adapter allows: W + scaling * B A, rounded once to the dtype of W.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from kt_sft.adapters.file import AdapterFile
from kt_sft.adapters.names import expert_module
from kt_sft.checkpoint.folder import BaseModel, sources_of
from kt_sft.checkpoint.published import PublishedCheckpoint
from kt_sft.errors import AdapterMismatchError, CheckpointError, SettingsError
from kt_sft.families.finding import TensorPart
from kt_sft.files import durable
from kt_sft.files.safetensors import INDEX_NAME, SafetensorsCheckpoint, checkpoint_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Target:
    """Where a module's matrices go: a tensor on disk, or a part of it.

    trained_as: training knows one module for all experts, which patterns were matched against.
    """

    key: str
    trained_as: str
    part: TensorPart | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The target in its tensor, [outputs, inputs], a view."""
        return tensor if self.part is None else self.part.of(tensor)


class LoraDelta:
    """The changes that an adapter makes to the tensors of a checkpoint, by their keys on disk."""

    def __init__(
        self, adapter: str | Path, checkpoint: PublishedCheckpoint, base: BaseModel
    ) -> None:
        self._adapter = AdapterFile(adapter)
        self._stacks = base.keys.stacks(checkpoint)
        self._sources = sources_of(checkpoint, base.layers, self._stacks)
        self._lora: dict[str, list[tuple[str, _Target]]] = {}
        self._replaced: dict[str, str] = {}
        self._resizable = {self._single(name) for name in base.vocabulary}
        # Tensors that a checkpoint with tied embeddings does not have: name -> the adapter's
        # parameter, or the base's tensor that it was tied to.
        self._untied: dict[str, tuple[str, bool]] = {}
        lost = []
        for module in self._adapter.lora_modules():
            target = self._target(module)
            if target is None:
                lost.append(module)
            else:
                self._lora.setdefault(target.key, []).append((module, target))
        for parameter in self._adapter.full_parameters():
            if (on_disk := self._single(parameter)) is not None:
                self._replaced[on_disk] = parameter
            elif parameter in base.tied:
                self._untied[parameter] = parameter, True
            else:
                lost.append(parameter)
        if lost:
            raise AdapterMismatchError(
                f"{adapter}: {len(lost)} modules of the adapter are not in the base checkpoint, "
                f"the first is {lost[0]}; export it with the base it was trained on"
            )

        # Where only one side of a tied pair was trained, the other is as it was.
        for name, source in base.tied.items():
            on_disk = self._single(source)
            if name not in self._untied and on_disk is not None and on_disk in self._replaced:
                self._untied[name] = on_disk, False
        self._checkpoint, self._tied = checkpoint, base.tied

    @property
    def vocabulary(self) -> int | None:
        """Rows of the trained embedding or head, which may be more than the base has."""
        rows = {
            self._adapter.full_shape(key)[0]
            for on_disk, key in self._replaced.items()
            if on_disk in self._resizable
        } | {self._adapter.full_shape(key)[0] for key, trained in self._untied.values() if trained}
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
            source = self._single(self._tied[name])
            assert source is not None
            like = self._checkpoint.get(source)
            tensor = self._adapter.full(key) if trained else self._checkpoint.get(key)
            assert isinstance(tensor, Tensor) and isinstance(like, Tensor)
            found[name] = tensor.to(like.dtype)
        return found

    def apply(self, key: str, weight: Tensor) -> Tensor:
        """The merged tensor for `key`, in the dtype of `weight`."""
        if key in self._replaced:
            trained = self._adapter.full(self._replaced[key])
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
        for module, target in self._lora[key]:
            view = target.of(merged)
            lora = self._adapter.matrices(module, target.trained_as)
            if (lora.b.shape[0], lora.a.shape[1]) != tuple(view.shape):
                raise AdapterMismatchError(
                    f"{module}: the adapter is for a weight of "
                    f"{(lora.b.shape[0], lora.a.shape[1])}, "
                    f"the base has {tuple(view.shape)}"
                )
            view.addmm_(lora.b, lora.a, alpha=lora.scaling)
        return merged.to(weight.dtype)

    def _target(self, module: str) -> _Target | None:
        expert = expert_module(module)
        source = self._sources.get(expert.path) if expert else None
        if expert is None or source is None:
            key = self._single(f"{module}.weight")
            return None if key is None else _Target(key, module)
        if expert.expert >= source.experts:
            return None
        key, part = source.place(expert.projection, expert.expert)
        return _Target(key, f"{expert.path}.{expert.projection}", part)

    def _single(self, parameter: str) -> str | None:
        """The one tensor on disk that is this parameter of the model, if there is one."""
        stack = self._stacks.get(parameter)
        keys = stack.keys() if stack is not None else []
        return keys[0] if len(keys) == 1 else None


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
    checkpoint = PublishedCheckpoint(SafetensorsCheckpoint(files))
    config = json.loads((base / "config.json").read_text())
    if checkpoint.quantized or config.get("quantization_config"):
        raise SettingsError(
            f"{base}: its weights are quantized, and merging would quantize them again; serve "
            "the adapter beside the base, or export with a bf16 version of it"
        )
    delta = LoraDelta(adapter, checkpoint, BaseModel.of(base)) if adapter else None
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
