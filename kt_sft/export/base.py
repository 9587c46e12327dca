"""The base checkpoint of an adapter: its parameters, and the names that it was published with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from kt_sft.adapters.base_identity import identity_of
from kt_sft.checkpoint.folder import BaseModel, sizes_of, sources_of
from kt_sft.checkpoint.published import PublishedCheckpoint
from kt_sft.checkpoint.sources import CheckpointSource, Stack
from kt_sft.checkpoint.untrusted import read_json, refuse_more_layers
from kt_sft.errors import CheckpointError
from kt_sft.families.finding import FoundExperts
from kt_sft.files.safetensors import SafetensorsCheckpoint, checkpoint_files


@dataclass(frozen=True)
class Base:
    """A checkpoint's folder, opened; no weight is read."""

    folder: Path
    model: BaseModel
    checkpoint: PublishedCheckpoint
    stacks: Mapping[str, Stack]
    sources: Mapping[str, CheckpointSource]

    @classmethod
    def open(cls, folder: str | Path) -> Base:
        """Raises CheckpointError, UnsupportedModelError."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder}: no config.json there; give the folder of the base checkpoint (--base)"
            )
        files = SafetensorsCheckpoint(checkpoint_files(folder))
        config = folder / "config.json"
        refuse_more_layers(read_json(config), len(list(files)), str(config))
        model = BaseModel.of(folder)
        checkpoint = PublishedCheckpoint(files, model.published)
        stacks = model.keys.stacks(checkpoint)
        return cls(folder, model, checkpoint, stacks, sources_of(checkpoint, model.layers, stacks))

    @cached_property
    def layers(self) -> dict[str, FoundExperts]:
        """The routed experts by the path of their hybrid ones, in the order of the model."""
        return {layer.hybrid_path: layer for layer in self.model.layers}

    def on_disk(self, parameter: str) -> str | None:
        """The one tensor on disk that is this parameter of the model, if there is one."""
        stack = self.stacks.get(parameter)
        keys = stack.keys() if stack is not None else []
        return keys[0] if len(keys) == 1 else None

    def published_module(self, module: str) -> str:
        """The name of a module in the checkpoint, where it has one of its own."""
        key = self.on_disk(f"{module}.weight")
        return key.removesuffix(".weight") if key and key.endswith(".weight") else module

    def published_expert(self, layer: str, projection: str, expert: int) -> str | None:
        """The same for one expert's projection; None where experts share a tensor on disk."""
        key, part = self.sources[layer].place(projection, expert)
        alone = part.expert is None and part.rows == "all" and key.endswith(".weight")
        return key.removesuffix(".weight") if alone else None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What tells it from another base; see adapters/base_identity.py."""

        def weight(parameter: str) -> Tensor | None:
            stack, key = self.stacks.get(parameter), self.on_disk(parameter)
            if key is None or stack is None or stack.converted:
                return None
            found = self.checkpoint.get(key)
            return found if isinstance(found, Tensor) else None

        return identity_of(
            self.model.config, sizes_of(self.model.layers), self.model.telling, weight
        )

    @cached_property
    def by_published_name(self) -> dict[str, tuple[str, str, int]]:
        """Module of one expert on disk -> (layer, projection, expert)."""
        return {name: place for name, place in self._published_experts() if name is not None}

    @cached_property
    def modules_by_published_name(self) -> dict[str, str]:
        """Module on disk -> module of the model, where their names differ."""
        found = {}
        for parameter in self.stacks:
            module = parameter.removesuffix(".weight")
            if module != parameter and (name := self.published_module(module)) != module:
                found[name] = module
        return found

    def _published_experts(self) -> Iterator[tuple[str | None, tuple[str, str, int]]]:
        for path, layer in self.layers.items():
            for projection in layer.shape.projections:
                for expert in range(layer.shape.experts):
                    yield (
                        self.published_expert(path, projection, expert),
                        (path, projection, expert),
                    )
