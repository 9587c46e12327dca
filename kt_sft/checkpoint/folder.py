"""What a checkpoint's folder says of its model and its experts, before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from kt_sft.adapters.base_identity import telling_parameters
from kt_sft.checkpoint.configuration import read_config
from kt_sft.checkpoint.keys import ModelKeys
from kt_sft.checkpoint.published import PublishedCheckpoint, own_quantization
from kt_sft.checkpoint.sources import CheckpointSource, ExpertSource, Stack
from kt_sft.checkpoint.untrusted import read_json, reading, refuse_absurd, refuse_more_layers
from kt_sft.errors import CheckpointError, UnsupportedModelError
from kt_sft.families.finding import FoundExperts, find_experts
from kt_sft.files.identity import checkpoint_identity
from kt_sft.files.safetensors import SafetensorsCheckpoint, checkpoint_files


@dataclass(frozen=True)
class BaseModel:
    """What a checkpoint's folder says of its model, without its weights."""

    config: Any
    keys: ModelKeys
    layers: list[FoundExperts]
    published: dict[str, Any]  # its quantization_config
    tied: dict[str, str]  # parameter -> the one that it is the same as
    vocabulary: frozenset[str]  # parameters with a row for each token
    modules: tuple[str, ...]  # the paths of all modules
    linear: tuple[str, ...]  # those of Linear layers
    telling: tuple[str, ...]  # parameters that tell this base from another of its shape

    @classmethod
    def of(cls, folder: str | Path) -> BaseModel:
        """From config.json alone. Raises UnsupportedModelError, CheckpointError."""
        file = Path(folder) / "config.json"
        config, model_class = described(folder)
        published = own_quantization(getattr(config, "quantization_config", None))
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with reading(str(file)), torch.device("meta"):
            model = model_class._from_config(config)
        layers = find_experts(model)
        return cls(
            config,
            ModelKeys(model),
            layers,
            published,
            dict(getattr(model, "all_tied_weights_keys", None) or {}),
            frozenset(_vocabulary(model)),
            tuple(name for name, _ in model.named_modules() if name),
            tuple(n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)),
            tuple(telling_parameters(model, sizes_of(layers))),
        )


def model_class_of(folder: str | Path) -> type[PreTrainedModel]:
    """The class that config.json names. Raises UnsupportedModelError, CheckpointError."""
    return described(folder)[1]


def described(folder: str | Path) -> tuple[Any, type[PreTrainedModel]]:
    """config.json and the class that it names. Raises UnsupportedModelError, CheckpointError."""
    file = Path(folder) / "config.json"
    refuse_absurd(read_json(file), str(file))
    with reading(str(file)):
        config = read_config(str(folder))
    return config, class_named(config, str(folder))


def class_named(config: Any, where: str) -> type[PreTrainedModel]:
    """By a configuration's first architecture. Raises UnsupportedModelError."""
    names = getattr(config, "architectures", None)
    names = names if isinstance(names, list) and names else ["none"]
    model_class = getattr(transformers, names[0], None) if isinstance(names[0], str) else None
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise UnsupportedModelError(
            f"{where}: config.json names the architecture {names[0]!r}, which the installed "
            f"transformers {transformers.__version__} does not have; upgrade it"
        )
    return model_class


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

    def open_layers() -> dict[str, CheckpointSource]:
        checkpoint = PublishedCheckpoint(SafetensorsCheckpoint(files), base.published)
        return sources_of(checkpoint, base.layers, base.keys.stacks(checkpoint))

    name = Path(folder).resolve().name
    return CheckpointExperts(name, list(map(str, files)), base.layers, base.published, open_layers)


def sizes_of(layers: Iterable[FoundExperts]) -> dict[str, tuple[int, int, int]]:
    """(E, hidden, intermediate) of each layer's experts by their path."""
    return {layer.hybrid_path: layer.shape.sizes for layer in layers}


def sources_of(
    checkpoint: PublishedCheckpoint, layers: Iterable[FoundExperts], stacks: Mapping[str, Stack]
) -> dict[str, CheckpointSource]:
    """How each layer is read, by the path of its hybrid experts."""
    return {layer.hybrid_path: CheckpointSource(checkpoint, layer, stacks) for layer in layers}


@dataclass(frozen=True)
class CheckpointExperts:
    """The routed experts of a checkpoint: its files, the layers, and a way to read them.

    published: the quantization_config of its config.json, which decides how codes are read.
    open_layers: called once, when the experts are read, which is only where no store of them
    exists.
    """

    model: str
    files: list[str]
    layers: list[FoundExperts]
    published: Mapping[str, Any]
    open_layers: Callable[[], Mapping[str, ExpertSource]]

    @cached_property
    def sources(self) -> Mapping[str, ExpertSource]:
        """By the path of the hybrid experts. Raises CheckpointError."""
        return self.open_layers()

    def identity(self, notes: Path, threads: int) -> dict[str, Any]:
        """All that decides what a store of these experts holds. Raises CheckpointError."""
        return {
            "files": checkpoint_identity(self.files, notes, threads),
            "published": json.loads(json.dumps(self.published, sort_keys=True, default=str)),
            "layers": [
                [
                    layer.hybrid_path,
                    layer.shape.experts,
                    layer.shape.hidden,
                    layer.shape.intermediate,
                    *(
                        [projection, part.tensor, part.rows, part.transposed, part.flat]
                        for parts in (layer.kind.parts, layer.kind.biases)
                        for projection, part in parts.items()
                    ),
                ]
                for layer in self.layers
            ],
        }
