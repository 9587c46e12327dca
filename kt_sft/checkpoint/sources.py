"""Where a layer's experts come from, read one matrix at a time: a checkpoint or a module in memory.

Legend: E experts, D hidden size, F intermediate size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kt_sft.checkpoint.published import PublishedCheckpoint
from kt_sft.checkpoint.untrusted import reading
from kt_sft.errors import CheckpointError
from kt_sft.families.finding import FoundExperts, TensorPart
from kt_sft.families.table import Part, parameter
from kt_sft.kernels import CodedMatrix

# The numbers in a key; the last is the expert's.
_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")


class ExpertSource(Protocol):
    """The experts of one layer."""

    @property
    def found(self) -> FoundExperts:
        """The layer that they belong to."""

    def read(self, expert: int, projection: str) -> Tensor | CodedMatrix:
        """One expert's projection, [outputs, inputs]."""

    def bias(self, expert: int, projection: str) -> Tensor | None:
        """Its bias [outputs], if it has one."""


@dataclass(frozen=True)
class Stack:
    """The tensors on disk that make up one parameter [E, ...] of the model.

    pieces: lists of keys, one list for each part that is concatenated along the outputs (gate,
        then up, or both in one). per_expert: a list has a key for each expert; otherwise one key
        of a tensor over all experts. first: the number in the keys of expert 0. conversion:
        operations that we cannot follow. converted: Transformers does more than rename one tensor.
    """

    pieces: tuple[tuple[str, ...], ...]
    per_expert: bool
    first: int = 0
    conversion: str = ""
    converted: bool = True

    def keys(self) -> list[str]:
        """All keys."""
        return [key for piece in self.pieces for key in piece]


class CheckpointSource:
    """Experts in safetensors files, one tensor per expert or fused."""

    def __init__(
        self,
        checkpoint: PublishedCheckpoint,
        found: FoundExperts,
        stacks: Mapping[str, Stack],
    ) -> None:
        """`stacks` by parameter name. Raises CheckpointError naming what lacks or does not fit."""
        self._checkpoint, self.found = checkpoint, found
        with reading(f"{found.path}: its tensors on disk"):
            self._stacks = {
                part.tensor: self._stack(part, stacks)
                for part in (*found.kind.parts.values(), *found.kind.biases.values())
            }
            self._transposed = self._is_transposed()
            self._check()

    def read(self, expert: int, projection: str) -> Tensor | CodedMatrix:
        """One expert's projection, [outputs, inputs], as it is stored."""
        key, part = self.place(projection, expert)
        matrix: Tensor | CodedMatrix
        if part.flat and part.expert is not None:
            matrix = self._checkpoint.get_rows(key, part.expert, self._flat_rows(key))
        else:
            matrix = self._checkpoint.get(key, part.expert)
        return part.within(matrix)

    def bias(self, expert: int, projection: str) -> Tensor | None:
        """The bias [outputs] of one expert's projection, or None."""
        part = self.found.kind.biases.get(projection)
        if part is None:
            return None
        key, place = self._place(part, expert)
        vector = self._checkpoint.get(key, place.expert)
        assert isinstance(vector, Tensor)
        return place.within(vector)

    @property
    def experts(self) -> int:
        """E."""
        return self.found.shape.experts

    def place(self, projection: str, expert: int) -> tuple[str, TensorPart]:
        """The key on disk, and where the projection lies in its tensor."""
        return self._place(self.found.kind.parts[projection], expert)

    def _stack(self, part: Part, stacks: Mapping[str, Stack]) -> Stack:
        name = self.found.tensor_path(part)
        stack = stacks.get(name)
        if stack is None:
            raise CheckpointError(
                f"{name}: no tensor of the checkpoint belongs to this parameter; "
                "config.json and the weights do not belong together"
            )
        if stack.conversion:
            raise CheckpointError(
                f"{name}: Transformers converts it with {stack.conversion}, which kt_sft does not "
                "know; load the stock model and call kt_sft.hybridize(model)"
            )
        if stack.per_expert:
            for piece in stack.pieces:
                self._check_numbers(name, piece, stack.first)
        return stack

    def _check_numbers(self, name: str, piece: tuple[str, ...], first: int) -> None:
        """The keys must be those of experts 0 to E - 1, whatever follows them."""
        experts = self.found.shape.experts
        numbers = [int(_NUMBER.findall(key)[-1]) - first for key in piece]
        missing = sorted(set(range(experts)) - set(numbers))
        if missing:
            start, end = list(_NUMBER.finditer(piece[0]))[-1].span()
            lacking = f"{piece[0][:start]}{missing[0] + first}{piece[0][end:]}"
            raise CheckpointError(
                f"{name}: the checkpoint lacks {len(missing)} of {experts} expert tensors, "
                f"the first is {lacking}; download it again"
            )
        if numbers[:experts] != list(range(experts)):
            raise CheckpointError(f"{name}: the checkpoint has two tensors for one expert")
        if len(numbers) > experts and not self.found.kind.more_on_disk:
            raise CheckpointError(
                f"{name}: the checkpoint has tensors of {len(numbers)} experts, config.json says "
                f"{experts}; they do not belong together"
            )

    def _place(self, part: Part, expert: int) -> tuple[str, TensorPart]:
        stack = self._stacks[part.tensor]
        separate = len(stack.pieces) == 2
        piece = stack.pieces[1 if separate and part.rows in ("second", "odd") else 0]
        key, index = (piece[expert], None) if stack.per_expert else (piece[0], expert)
        return key, TensorPart(
            self.found.shape.experts,
            index,
            part.flat,
            self._transposed.get(part.tensor, False),
            "all" if separate else part.rows,
        )

    def _flat_rows(self, key: str) -> int:
        return self._checkpoint.shape(key)[0] // self.found.shape.experts

    def _one_shape(self, part: Part) -> tuple[int, ...]:
        """Shape of one expert of the part's tensor on disk, both halves where they are separate."""
        stack = self._stacks[part.tensor]
        shape = self._checkpoint.shape(stack.pieces[0][0])
        if not stack.per_expert:
            shape = (self._flat_rows(stack.pieces[0][0]), *shape[1:]) if part.flat else shape[1:]
        return shape

    def _is_transposed(self) -> dict[str, bool]:
        """Whether each tensor holds [inputs, outputs]; fused tensors may, either way is published.

        The shapes of all projections together leave one reading.
        """
        parts, shape = self.found.kind.parts, self.found.shape
        settled = {part.tensor: bool(part.transposed) for part in parts.values() if part.flat}
        if settled:
            return settled
        tensors: dict[str, bool] = {}
        for transposed in (False, True):
            fits = True
            for projection, part in parts.items():
                outputs, inputs = shape.of(projection)
                if part.rows != "all" and len(self._stacks[part.tensor].pieces) == 1:
                    outputs *= 2
                want = (inputs, outputs) if transposed else (outputs, inputs)
                fits = fits and self._one_shape(part) == want
            if fits:
                tensors = {part.tensor: transposed for part in parts.values()}
                break
        return tensors or {part.tensor: False for part in parts.values()}

    def _check(self) -> None:
        found = self.found
        expected: dict[str, tuple[int, ...]] = {}
        for projection, part in found.kind.parts.items():
            expected.update(self._expected(part, found.shape.of(projection)))
        for projection, part in found.kind.biases.items():
            expected.update(self._expected(part, found.shape.of(projection)[:1]))
        for key, want in expected.items():
            got = self._checkpoint.shape(key)
            if got != want:
                raise CheckpointError(
                    f"{key}: got shape {got}, the model's configuration says {want}; "
                    "config.json and the weights do not belong together"
                )

    def _expected(self, part: Part, one: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        stack = self._stacks[part.tensor]
        if part.rows != "all" and len(stack.pieces) == 1:
            one = (2 * one[0], *one[1:])
        if len(one) == 2 and self._transposed[part.tensor]:
            one = one[::-1]
        experts = self.found.shape.experts
        if part.flat:
            one = (experts * one[0], *one[1:])
        elif not stack.per_expert:
            one = (experts, *one)
        keys = stack.keys()
        if stack.per_expert:  # experts beyond the last are of no use (identity experts)
            keys = [key for piece in stack.pieces for key in piece[:experts]]
        return dict.fromkeys(keys, one)


class ModuleSource:
    """Experts in the parameters of a stock module."""

    def __init__(self, found: FoundExperts) -> None:
        self.found = found
        parts = (*found.kind.parts.values(), *found.kind.biases.values())
        self._tensors = {part.tensor: parameter(found.module, part.tensor) for part in parts}

    def read(self, expert: int, projection: str) -> Tensor:
        """One expert's projection, [outputs, inputs]."""
        return self._read(self.found.kind.parts[projection], expert)

    def bias(self, expert: int, projection: str) -> Tensor | None:
        """The bias [outputs] of one expert's projection, or None."""
        part = self.found.kind.biases.get(projection)
        return None if part is None else self._read(part, expert)

    def release(self) -> None:
        """Frees the memory of the stock weights, whoever still refers to their module."""
        for tensor in self._tensors.values():
            if tensor is not None:
                tensor.data = tensor.data.new_empty(0)

    def _read(self, part: Part, expert: int) -> Tensor:
        tensor = self._tensors[part.tensor]
        assert tensor is not None
        return self.found.part(part, expert).of(tensor.detach()).cpu()
