"""Which tensors of a checkpoint make up each parameter of a model, as Transformers maps them.

Published checkpoints keep one tensor per expert, or fused ones under other names than the model's;
Transformers' conversion table tells which. It is read here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from kt_sft.errors import CheckpointError, UnsupportedModelError
from kt_sft.experts.finding import FoundExperts, find_experts
from kt_sft.integrations.configuration import read_config
from kt_sft.store.checkpoint import SafetensorsCheckpoint, checkpoint_files
from kt_sft.store.placing import CheckpointExperts
from kt_sft.store.published import PublishedCheckpoint, own_quantization
from kt_sft.store.sources import CheckpointSource, Stack
from kt_sft.store.untrusted import read_json, reading, refuse_absurd, refuse_more_layers

# The conversions that gather experts. Transpose is settled by shapes, which must be known anyway.
_GATHERING = {"MergeModulelist", "Concatenate", "Transpose", "_IdentityOp"}
# One list of experts that belongs to two modules in equal parts.
_SPLITTING = "ErnieFuseAndSplitTextVisionExperts"


@dataclass(frozen=True)
class BaseModel:
    """What a checkpoint's folder says of its model, without its weights."""

    keys: ModelKeys
    layers: list[FoundExperts]
    published: dict[str, Any]  # its quantization_config
    tied: dict[str, str]  # parameter -> the one that it is the same as
    vocabulary: frozenset[str]  # parameters with a row for each token

    @classmethod
    def of(cls, folder: str | Path) -> BaseModel:
        """From config.json alone. Raises UnsupportedModelError, CheckpointError."""
        file = Path(folder) / "config.json"
        config, model_class = _described(folder)
        published = own_quantization(getattr(config, "quantization_config", None))
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with reading(str(file)), torch.device("meta"):
            model = model_class._from_config(config)
        return cls(
            ModelKeys(model),
            find_experts(model),
            published,
            dict(getattr(model, "all_tied_weights_keys", None) or {}),
            frozenset(_vocabulary(model)),
        )


def model_class_of(folder: str | Path) -> type[PreTrainedModel]:
    """The class that config.json names. Raises UnsupportedModelError, CheckpointError."""
    return _described(folder)[1]


def _described(folder: str | Path) -> tuple[Any, type[PreTrainedModel]]:
    file = Path(folder) / "config.json"
    refuse_absurd(read_json(file), str(file))
    with reading(str(file)):
        config = read_config(str(folder))
    names = getattr(config, "architectures", None)
    names = names if isinstance(names, list) and names else ["none"]
    model_class = getattr(transformers, names[0], None) if isinstance(names[0], str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise UnsupportedModelError(
            f"{folder}: config.json names the architecture {names[0]!r}, which the installed "
            f"transformers {transformers.__version__} does not have; upgrade it"
        )
    return config, model_class


def _vocabulary(model: PreTrainedModel) -> Iterator[str]:
    """The parameters of the embedding and of the head."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    paths = {id(module): path for path, module in model.named_modules()}
    for module in modules:
        if module is not None:
            for name, _ in module.named_parameters(recurse=False):
                yield f"{paths[id(module)]}.{name}"


def checkpoint_experts(folder: str | Path) -> CheckpointExperts:
    """The experts of a checkpoint's folder. Raises CheckpointError, UnsupportedModelError."""
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json there; give the folder of a checkpoint")
    files = checkpoint_files(folder)
    config = Path(folder) / "config.json"
    refuse_more_layers(read_json(config), len(list(SafetensorsCheckpoint(files))), str(config))
    base = BaseModel.of(folder)

    def sources() -> dict[str, CheckpointSource]:
        checkpoint = PublishedCheckpoint(SafetensorsCheckpoint(files), base.published)
        stacks = base.keys.stacks(checkpoint)
        return {
            layer.hybrid_path: CheckpointSource(checkpoint, layer, stacks) for layer in base.layers
        }

    return CheckpointExperts(
        Path(folder).resolve().name, list(map(str, files)), base.layers, base.published, sources
    )


class ModelKeys:
    """The mapping from keys on disk to parameters, for a model before its experts are swapped."""

    def __init__(self, model: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._parameters: dict[str, Any] = dict(model.state_dict())
        self._by_pattern = {p: c for c in self._converters for p in c.source_patterns}

    def stacks(self, checkpoint: PublishedCheckpoint) -> dict[str, Stack]:
        """Parameter name -> the tensors on disk that make it up; keys of no parameter are left out.

        Raises CheckpointError for a conversion of expert weights that is not known here, and for
        a parameter in a form that cannot be read.
        """
        with reading("the checkpoint's keys"):
            checkpoint.refuse_unreadable(lambda key: self._rename(key)[0] in self._parameters)
            return self._stacks(checkpoint)

    def _stacks(self, keys: Iterable[str]) -> dict[str, Stack]:
        gathered: dict[str, dict[str | None, list[str]]] = {}
        for key in keys:
            name, pattern = self._rename(key)
            if name in self._parameters:
                gathered.setdefault(name, {}).setdefault(pattern, []).append(key)
        stacks: dict[str, Stack] = {}
        for name, by_pattern in gathered.items():
            stacks.update(self._stack(name, by_pattern))
        return stacks

    def _rename(self, key: str) -> tuple[str, str | None]:
        for transforms in ((self._renamings, self._converters), ([], [])):
            name, pattern = rename_source_key(key, *transforms, self._prefix, self._parameters)
            if name in self._parameters:
                return name, pattern
        return name, pattern

    def _stack(self, name: str, by_pattern: Mapping[str | None, list[str]]) -> dict[str, Stack]:
        pattern = next(iter(by_pattern))
        if pattern is None:
            keys = by_pattern[None]
            if len(keys) > 1:
                raise CheckpointError(
                    f"the checkpoint has {len(keys)} tensors for the parameter {name}: "
                    f"{', '.join(keys[:3])}; remove all but one"
                )
            return {name: Stack(((keys[0],),), per_expert=False, converted=False)}
        converter = self._by_pattern[pattern]
        operations = {type(o).__name__ for o in converter.operations}
        targets = converter.target_patterns
        if not operations <= {*_GATHERING, _SPLITTING}:
            unknown = Stack((), per_expert=True, conversion=", ".join(sorted(operations)))
            return {name.replace(targets[0], target): unknown for target in targets}
        # Pieces in the order that they are concatenated in: gate, then up.
        pieces = [
            sorted(by_pattern[p], key=dot_natural_key)
            for p in converter.source_patterns
            if p in by_pattern
        ]
        per_expert = bool(operations & {"MergeModulelist", _SPLITTING})
        if _SPLITTING not in operations:
            return {name: Stack(tuple(map(tuple, pieces)), per_expert)}
        return {
            name.replace(targets[0], target): Stack(
                tuple(tuple(_share(piece, i, len(targets))) for piece in pieces),
                per_expert,
                first=i * (len(pieces[0]) // len(targets)),
            )
            for i, target in enumerate(targets)
        }


def _share(keys: list[str], part: int, parts: int) -> list[str]:
    size = len(keys) // parts
    return keys[part * size : (part + 1) * size]
