"""The table of experts modules: what differs between model families, as data.

A module with gate_up_proj [E, 2F, D] and down_proj [E, D, F] that is called with (hidden, index,
weights) needs no row, nor does one with up_proj [E, F, D] instead of gate_up_proj. Names on disk
are those of Transformers' own conversion table. docs/add-a-family.md tells how to add a row.

Legend: E experts, D hidden size, F intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kt_sft.errors import UnsupportedModelError
from kt_sft.kernels import ACTIVATIONS, Gate


@dataclass(frozen=True)
class Part:
    """Where a projection lies: the tensor's name below the stock module and which outputs of it.

    rows: all, first or second (half), even or odd.
    transposed: one expert is [inputs, outputs]; None means that the shapes tell.
    flat: the experts lie below one another in a matrix [E * rows, columns].
    """

    tensor: str
    rows: str = "all"
    transposed: bool | None = None
    flat: bool = False


@dataclass(frozen=True)
class ExpertsClass:
    """One row: a class of stock modules that keep routed experts.

    parts: projection -> where its weights lie; biases: the same for biases [E, outputs].
    gate: computes the Gate from the stock module.
    call: how it is called, a name of families/calls.py.
    top_k: attribute with K, where the module itself chooses the experts.
    child: where the hybrid experts go below the stock module; empty: they take its place.
    more_on_disk: checkpoints may hold experts beyond the last, which are of no use.
    applies: for classes that changed between versions of Transformers.
    """

    parts: Mapping[str, Part]
    gate: Callable[[Any], Gate]
    biases: Mapping[str, Part]
    call: str = "routed"
    top_k: str = ""
    child: str = ""
    more_on_disk: bool = False
    applies: Callable[[Any], bool] = lambda module: True


def attribute(module: Any, path: str) -> Any:
    """The attribute at a dotted path below a module, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


# Classes and functions of activations in Transformers and torch, by their names.
_ACTIVATION_CLASSES: Mapping[str, str] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "silu": "silu",
    "QuickGELUActivation": "quick_gelu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_new",
    "GELUTanh": "gelu_pytorch_tanh",
    "PytorchGELUTanh": "gelu_pytorch_tanh",
    "FastGELUActivation": "gelu_fast",
    "ReLU": "relu",
    "relu": "relu",
    "ReLUSquaredActivation": "relu2",
}


def activation(path: str = "act_fn") -> Callable[[Any], Gate]:
    """The gate of the activation at `path`, or else of the configuration's `hidden_act`."""

    def gate(module: Any) -> Gate:
        found = attribute(module, path)
        if found is None:
            name = getattr(getattr(module, "config", None), "hidden_act", None)
        else:
            shown = getattr(found, "__name__", type(found).__name__)
            name = _ACTIVATION_CLASSES.get(shown, shown)
        if name is not None and name in ACTIVATIONS:
            return ACTIVATIONS[name]
        raise UnsupportedModelError(
            f"activation {name!r} has no kernel; supported are {', '.join(ACTIVATIONS)}"
        )

    return gate


def _clamped(limit: str, alpha: str = "", up_offset: float = 0.0) -> Callable[[Any], Gate]:
    """A clamped swish gate whose constants are attributes of the module."""

    def gate(module: Any) -> Gate:
        factor = float(getattr(module, alpha)) if alpha else 1.0
        return Gate("swish", alpha=factor, limit=float(getattr(module, limit)), up_offset=up_offset)

    return gate


def halves(
    gate_up: str = "gate_up_proj",
    down: str = "down_proj",
    rows: tuple[str, str] = ("first", "second"),
    transposed: bool | None = None,
) -> dict[str, Part]:
    """Gate and up in one tensor."""
    return {
        "gate_proj": Part(gate_up, rows[0], transposed),
        "up_proj": Part(gate_up, rows[1], transposed),
        "down_proj": Part(down, "all", transposed),
    }


_NO_BIAS: dict[str, Part] = {}
_PARALLEL = ExpertsClass(
    halves("input_linear.weight", "output_linear.weight", transposed=False),
    activation("activation"),
    _NO_BIAS,
    call="parallel_experts",
    child="experts",
)


def _gpt_oss_row(rows: tuple[str, str]) -> ExpertsClass:
    return ExpertsClass(
        halves(rows=rows, transposed=True),
        _clamped("limit", "alpha", up_offset=1.0),
        halves("gate_up_proj_bias", "down_proj_bias", rows=rows),
    )


def _default_layout(gate: Callable[[Any], Gate]) -> ExpertsClass:
    return ExpertsClass(halves(), gate, _NO_BIAS)


def _dbrx_row(swapped: bool) -> ExpertsClass:
    """Transformers 5.6 exchanges hidden and intermediate size, later versions do not."""

    def applies(module: Any) -> bool:
        try:
            one_row = torch.zeros(1, 2), *[torch.zeros(3, 2)] * 3
            module.mlp.forward(*one_row)
        except RuntimeError:
            return swapped
        return not swapped

    return ExpertsClass(
        {
            "gate_proj": Part("mlp.w1", transposed=swapped, flat=True),
            "up_proj": Part("mlp.v1", transposed=swapped, flat=True),
            "down_proj": Part("mlp.w2", transposed=not swapped, flat=True),
        },
        activation("mlp.activation_fn"),
        _NO_BIAS,
        call="batched",
        applies=applies,
    )


# By the name of the class in Transformers; the first row that applies.
EXPERTS_CLASSES: Mapping[str, tuple[ExpertsClass, ...]] = {
    "DbrxExperts": (_dbrx_row(True), _dbrx_row(False)),
    "GptOssExperts": (_gpt_oss_row(("even", "odd")),),
    "OpenAIPrivacyFilterExperts": (_gpt_oss_row(("first", "second")),),
    "MiniMaxM3VLExperts": (_default_layout(_clamped("swiglu_limit", "swiglu_alpha", 1.0)),),
    "DeepseekV4Experts": (_default_layout(_clamped("limit")),),
    "Glm5NextTextExperts": (_default_layout(_clamped("swiglu_limit")),),
    "HYV4Experts": (_default_layout(_clamped("swiglu_limit")),),
    # Liger's stand-in for families with SiLU, which has the activation in its kernel.
    "LigerExperts": (_default_layout(lambda module: ACTIVATIONS["silu"]),),
    "BeamExperts": (_default_layout(activation()),),
    "LongcatFlashExperts": (
        ExpertsClass(
            halves(transposed=False),
            activation(),
            _NO_BIAS,
            call="with_identity_experts",
            more_on_disk=True,
        ),
    ),
    "AriaExperts": (
        ExpertsClass(
            halves("fc1.weight", "fc2.weight", transposed=True),
            lambda module: Gate("swish"),
            _NO_BIAS,
            call="from_router_logits",
            top_k="config.moe_topk",
        ),
    ),
    "Llama4TextMoe": (
        ExpertsClass(
            halves("experts.gate_up_proj", "experts.down_proj", transposed=True),
            activation("experts.act_fn"),
            _NO_BIAS,
            call="weighted_inputs",
            child="experts",
        ),
    ),
    "GraniteMoeMoE": (_PARALLEL,),
    "GraniteMoeHybridMoE": (_PARALLEL,),
    "GraniteMoeSharedMoE": (_PARALLEL,),
    "JetMoeMoE": (_PARALLEL,),
}

# What configurations call the number of experts per token.
TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "experts_per_token",
)

DEFAULT = _default_layout(activation())
UNGATED = ExpertsClass(
    {"up_proj": Part("up_proj"), "down_proj": Part("down_proj")}, activation(), _NO_BIAS
)

# Names of routed experts' tensors in the stock models and in their checkpoints. A hybrid model has
# none by these names: who asks for LoRA on them means its projections.
STOCK_EXPERT_NAMES = frozenset(
    {
        name
        for row in (DEFAULT, UNGATED, *(r for rows in EXPERTS_CLASSES.values() for r in rows))
        for part in row.parts.values()
        for name in part.tensor.removesuffix(".weight").split(".")[-1:]
    }
    | {"experts", "w1", "w2", "w3"}
) - {"up_proj", "down_proj"}

# Families that have experts which cannot be computed here, with the reason.
REFUSED: Mapping[str, str] = {
    "switch_transformers": "its experts drop activations between their two layers while training",
    "nllb-moe": "its experts drop activations between their two layers while training",
    "doge": "its experts are single rows of an embedding, not matrices",
}


def parameter(module: Any, path: str) -> torch.nn.Parameter | None:
    """The parameter at a dotted path below a module, or None."""
    found = attribute(module, path)
    return found if isinstance(found, torch.nn.Parameter) else None
