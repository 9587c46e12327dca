"""Which tensors of a checkpoint make up each parameter of a model, as Transformers maps them.

Published checkpoints keep one tensor per expert, or fused ones under other names than the model's;
Transformers' conversion table tells which. It is read here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from kt_sft.checkpoint.published import PublishedCheckpoint
from kt_sft.checkpoint.sources import Stack
from kt_sft.checkpoint.untrusted import reading
from kt_sft.errors import CheckpointError

# The conversions that gather experts. Transpose is settled by shapes, which must be known anyway.
_GATHERING = {"MergeModulelist", "Concatenate", "Transpose", "_IdentityOp"}
# One list of experts that belongs to two modules in equal parts.
_SPLITTING = "ErnieFuseAndSplitTextVisionExperts"


class ModelKeys:
    """The mapping from keys on disk to parameters, for a model before its experts are swapped."""

    def __init__(self, model: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._parameters: dict[str, Any] = dict(model.state_dict())
        self._by_pattern = {p: c for c in self._converters for p in c.source_patterns}

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        """Of a parameter of the model, or None where it has none of that name."""
        found = self._parameters.get(parameter)
        return None if found is None else tuple(found.shape)

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
