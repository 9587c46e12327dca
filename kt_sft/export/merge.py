"""Merging adapters into the original checkpoint, tensor by tensor, without building the model.

The merge takes the published full-precision weights, not the quantized ones of training, so the
result is as good as the adapter allows. Where only quantized ones are published, they are written
in bf16 on request.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from kt_sft.errors import CheckpointError, SettingsError
from kt_sft.export.adapter import Adapter
from kt_sft.export.base import Base
from kt_sft.export.delta import Delta
from kt_sft.export.texts import copy_texts
from kt_sft.files import durable
from kt_sft.files.progress import Progress
from kt_sft.files.safetensors import INDEX_NAME, checkpoint_files
from kt_sft.files.safetensors_writer import Entry, write_safetensors

logger = logging.getLogger(__name__)

# Heads of reward models, which LLaMA-Factory keeps beside the weights.
VALUE_HEADS = ("value_head.safetensors", "value_head.bin")
# What says elsewhere than in config.json how weights are coded.
_OF_CODES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def export_merged(
    base: str | Path | Base,
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    dequantize: bool = False,
    option: str = "export_dir",
) -> Path:
    """Writes a full-precision checkpoint of base + adapters that stock Transformers loads.

    Keeps the shards of the base; holds one tensor in memory, of stacked experts one expert. The
    adapters are merged in their order. base: its folder, or opened. dequantize: a quantized base is
    written in bf16. The folder appears complete or not at all.
    Raises CheckpointError, AdapterMismatchError, SettingsError.
    """
    out = durable.new_folder(Path(out), option, SettingsError)
    opened = base if isinstance(base, Base) else Base.open(base)
    base = opened.folder
    quantized = bool(opened.checkpoint.quantized or opened.model.published)
    if quantized and not dequantize:
        raise SettingsError(
            f"{base}: its weights are quantized, and merging would quantize them again; write them "
            "in bf16 with `kt-sft export ADAPTER --to merged --dequantize`, merge into a bf16 "
            "version of it, or serve the adapter beside the base"
        )
    if dequantize and not quantized:
        raise SettingsError(f"--dequantize: the weights of {base} are not quantized; leave it out")
    if quantized:
        opened.checkpoint.refuse_unreadable(lambda key: True)
    delta = Delta(opened, [Adapter(adapter, opened) for adapter in adapters])
    shards = _shards(opened, delta)
    needed = sum(entry.nbytes for entries in shards.values() for entry in entries.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    durable.require_space(
        out.parent,
        int(needed * 1.02),
        f"{out}: the merged model needs",
        f"free some, or set {option} to a folder on another disk",
        CheckpointError,
    )
    with durable.whole_folder(out) as partial:
        with Progress("Merging", needed) as progress:
            for name, entries in shards.items():
                write_safetensors(partial / name, entries, _tensors(delta, entries, progress))
        _copy_side_files(base, partial, quantized)
        for adapter in adapters:
            copy_texts(Path(adapter), partial, whole=True)
            _copy_value_head(Path(adapter), partial)
        _update_config(partial, delta.vocabulary, delta.untied, quantized)
        _write_index(partial, shards)
    logger.debug("merged %s and %s into %s", base, ", ".join(map(str, adapters)), out)
    return out


def _shards(base: Base, delta: Delta) -> dict[str, dict[str, Entry]]:
    """The files of the result, named as those of the base, and what each will hold."""
    files = checkpoint_files(base.folder)
    shards: dict[str, dict[str, Entry]] = {file.name: {} for file in files}
    for key in base.checkpoint:
        shards[base.checkpoint.file_of(key)][key] = delta.entry(key)
    for key in delta.added:
        shards[files[-1].name][key] = delta.entry(key)
    return {name: entries for name, entries in shards.items() if entries}


def _tensors(
    delta: Delta, entries: dict[str, Entry], progress: Progress
) -> Iterator[tuple[str, Iterator[Tensor]]]:
    for key, entry in entries.items():
        yield key, delta.pieces(key)
        progress.update(entry.nbytes)


def _update_config(folder: Path, vocabulary: int | None, untied: bool, dequantized: bool) -> None:
    """What config.json says of the vocabulary, of tied embeddings and of codes."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    parts = [config, *(v for v in config.values() if isinstance(v, dict))]
    text = config.get("text_config") or config
    known = text.get("vocab_size") if isinstance(text, dict) else None
    for part in parts:
        # Parts for other things than text have vocabularies of their own.
        if vocabulary is not None and part.get("vocab_size") == known:
            part["vocab_size"] = vocabulary
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        if dequantized:
            part.pop("quantization_config", None)
            part.pop("compression_config", None)
    if dequantized:
        config.pop("torch_dtype", None)
        config["dtype"] = "bfloat16"
    file.write_text(json.dumps(config, indent=2) + "\n")


def _write_index(folder: Path, shards: dict[str, dict[str, Entry]]) -> None:
    """Where each tensor is; a single file needs none."""
    file = folder / INDEX_NAME
    if not file.exists():
        return
    index = {
        "metadata": {"total_size": sum(e.nbytes for es in shards.values() for e in es.values())},
        "weight_map": {key: name for name, entries in shards.items() for key in entries},
    }
    file.write_text(json.dumps(index, indent=2) + "\n")


def _copy_side_files(base: Path, out: Path, dequantized: bool) -> None:
    """Configuration, tokenizer and index: every file beside the weights."""
    for file in base.iterdir():
        if dequantized and file.name in _OF_CODES:
            continue
        is_weight = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
        if file.is_file() and not is_weight and (file.name == INDEX_NAME or file.suffix != ".png"):
            shutil.copyfile(file, out / file.name)


def _copy_value_head(adapter: Path, out: Path) -> None:
    """The head of a reward model."""
    for name in VALUE_HEADS:
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, out / name)
