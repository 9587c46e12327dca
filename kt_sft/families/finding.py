"""Finding the routed experts of a model by the structure of its modules.

Legend: E experts, D hidden size, F intermediate size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor, nn

from kt_sft.errors import UnsupportedModelError
from kt_sft.families.shape import ExpertsShape
from kt_sft.families.table import (
    DEFAULT,
    EXPERTS_CLASSES,
    REFUSED,
    UNGATED,
    ExpertsClass,
    Part,
    parameter,
)
from kt_sft.kernels import CodedMatrix

_CONTRACT = "(hidden, top_k_index, top_k_weights)"


Rows = TypeVar("Rows", bound=Tensor | CodedMatrix)

_ROWS = {
    "all": lambda half: slice(None),
    "first": lambda half: slice(0, half),
    "second": lambda half: slice(half, None),
    "even": lambda half: slice(0, None, 2),
    "odd": lambda half: slice(1, None, 2),
}


def output_rows(rows: str, outputs: int) -> slice:
    """Which outputs of a tensor with so many a part has, by the rows of its Part."""
    return _ROWS[rows](outputs // 2)


@dataclass(frozen=True)
class TensorPart:
    """Where one expert's projection lies in a tensor.

    expert: None in a tensor of one expert alone. flat: the tensor is [E * rows, ...], not [E, ...].
    transposed: what lies there is [inputs, outputs]. rows: which of the outputs, a key of _ROWS.
    """

    experts: int
    expert: int | None
    flat: bool
    transposed: bool
    rows: str

    def of(self, tensor: Tensor) -> Tensor:
        """The projection [outputs, inputs], or its bias [outputs]; a view."""
        if self.expert is not None and self.flat:
            rows = tensor.shape[0] // self.experts
            tensor = tensor[self.expert * rows : (self.expert + 1) * rows]
        elif self.expert is not None:
            tensor = tensor[self.expert]
        return self.within(tensor)

    def within(self, matrix: Rows) -> Rows:
        """The same where only the expert's part of the tensor was read."""
        if self.transposed and isinstance(matrix, Tensor) and matrix.dim() == 2:
            matrix = matrix.T  # type: ignore[assignment]
        return matrix[output_rows(self.rows, matrix.shape[0])]  # type: ignore[return-value]


@dataclass(frozen=True)
class FoundExperts:
    """The routed experts of one layer of a stock model.

    path: of the stock module; kind: the row of the table, each part's layout settled.
    """

    path: str
    module: nn.Module
    kind: ExpertsClass
    shape: ExpertsShape

    @property
    def hybrid_path(self) -> str:
        """Where the hybrid experts go."""
        return f"{self.path}.{self.kind.child}" if self.kind.child else self.path

    def tensor_path(self, part: Part) -> str:
        """The name of a part's tensor in the model."""
        return f"{self.path}.{part.tensor}"

    def part(self, part: Part, expert: int) -> TensorPart:
        """Where one expert's part lies in the model's tensor."""
        return TensorPart(self.shape.experts, expert, part.flat, bool(part.transposed), part.rows)


def find_experts(model: nn.Module) -> list[FoundExperts]:
    """The routed experts of every layer.

    Raises UnsupportedModelError that names what cannot be mapped and why; never guesses.
    """
    found = list(_walk(model))
    if found:
        return found
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    reason = REFUSED.get(model_type)
    raise UnsupportedModelError(
        f"model type {model_type!r} is not supported: {reason}"
        if reason
        else f"model type {model_type!r} has no routed experts here: looked for modules with "
        f"gate_up_proj [E, 2F, D] and down_proj [E, D, F], and for "
        f"{', '.join(sorted(EXPERTS_CLASSES))}; is every layer of this model dense? "
        "Remove the kt_sft section to train it without us"
    )


def _walk(model: nn.Module) -> Iterator[FoundExperts]:
    claimed: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in claimed):
            continue
        kind = _kind_of(path, module)
        if kind is not None:
            claimed.append(path)
            yield _settle(path, module, kind)


def _kind_of(path: str, module: nn.Module) -> ExpertsClass | None:
    for row in EXPERTS_CLASSES.get(type(module).__name__, ()):
        there = all(parameter(module, p.tensor) is not None for p in row.parts.values())
        if there and row.applies(module):
            return row
    for kind in (DEFAULT, UNGATED):
        tensors = [parameter(module, p.tensor) for p in kind.parts.values()]
        # A separate gate_proj is of experts that see every token: Inkling's shared ones.
        separate = parameter(module, "gate_proj") is not None
        if not separate and all(t is not None and t.dim() == 3 for t in tensors):
            _refuse_unknown_behaviour(path, module, gated=kind is DEFAULT)
            return _with_biases(path, module, kind)
    return None


def _refuse_unknown_behaviour(path: str, module: nn.Module, gated: bool) -> None:
    """A module of the default layout must also compute and be called in the default way."""
    name = type(module).__name__
    gate = getattr(type(module), "_apply_gate", None)
    if gate is None and gated and type(module).__module__.startswith("transformers."):
        # A release that has moved the gates would make every own gate look like the default one.
        raise UnsupportedModelError(
            f"{path} ({name}): has no _apply_gate, by which kt_sft knows what the experts of a "
            "release of Transformers compute; use a release that kt_sft was tested with"
        )
    if gate is not None and gate.__name__ != "_default_apply_gate":
        raise UnsupportedModelError(
            f"{path} ({name}): has a gate of its own, {name}._apply_gate, that kt_sft does not "
            "know; see docs/add-a-family.md"
        )
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    variadic = any(n in ("args", "kwargs") for n in names)
    if len(names) != 3 and not variadic:
        raise UnsupportedModelError(
            f"{path} ({name}): is called with ({', '.join(names)}), expected {_CONTRACT}; "
            "see docs/add-a-family.md"
        )


def _with_biases(path: str, module: nn.Module, kind: ExpertsClass) -> ExpertsClass:
    """Biases [E, outputs] lie beside their weights under the same name with `_bias`."""
    biases = {
        projection: replace(part, tensor=f"{part.tensor}_bias")
        for projection, part in kind.parts.items()
        if parameter(module, f"{part.tensor}_bias") is not None
    }
    known = {p.tensor for p in (*kind.parts.values(), *biases.values())}
    others = sorted({name for name, _ in module.named_parameters()} - known)
    if others:
        raise UnsupportedModelError(
            f"{path} ({type(module).__name__}): has parameters that kt_sft does not know: "
            f"{', '.join(others)}; see docs/add-a-family.md"
        )
    return replace(kind, biases=biases)


def _settle(path: str, module: nn.Module, kind: ExpertsClass) -> FoundExperts:
    """Reads the shape; raises UnsupportedModelError when the tensors do not fit each other."""
    shapes = {p: tuple(parameter(module, part.tensor).shape) for p, part in kind.parts.items()}  # type: ignore[union-attr]
    parts = dict(kind.parts)
    if all(part.transposed is None for part in parts.values()):
        parts = {
            p: replace(part, transposed=_is_transposed(shapes, parts)) for p, part in parts.items()
        }
    try:
        gate = kind.gate(module)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path} ({type(module).__name__}): {error}") from None
    gate = replace(gate, gated="gate_proj" in parts)
    experts, sizes = _sizes(module, shapes, parts)
    shape = ExpertsShape(experts, *sizes["down_proj"], gate)
    if any(sizes[p] != shape.of(p) for p in shape.projections):
        raise UnsupportedModelError(
            f"{path} ({type(module).__name__}): the tensors "
            + ", ".join(f"{parts[p].tensor} {shapes[p]}" for p in shape.projections)
            + " do not fit each other as [E, 2F, D] and [E, D, F]"
        )
    return FoundExperts(path, module, replace(kind, parts=parts), shape)


def _is_transposed(shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, Part]) -> bool:
    """Whether experts are [inputs, outputs]: for a gated pair only one reading fits."""
    up, down = shapes["up_proj"], shapes["down_proj"]
    width = 1 if parts["up_proj"].rows == "all" else 2
    straight = up[1] == width * down[2] and up[2] == down[1]
    return not straight and up[2] == width * down[1] and up[1] == down[2]


def _sizes(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, Part]
) -> tuple[int, dict[str, tuple[int, int]]]:
    experts = shapes["down_proj"][0]
    if parts["down_proj"].flat:
        experts = module.num_experts  # type: ignore[assignment]
    sizes = {}
    for projection, part in parts.items():
        rows, columns = shapes[projection][-2:]
        if part.flat:
            rows //= experts
        outputs, inputs = (columns, rows) if part.transposed else (rows, columns)
        sizes[projection] = (outputs if part.rows == "all" else outputs // 2, inputs)
    return experts, sizes
