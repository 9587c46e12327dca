"""The packed layout that a setting means for the experts of a layer, as they were published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kt_sft.checkpoint.sources import ExpertSource
from kt_sft.errors import CheckpointError
from kt_sft.families.finding import FoundExperts
from kt_sft.families.shape import ExpertsShape
from kt_sft.kernels import CodedMatrix, Coding, WeightLayout
from kt_sft.kernels.formats import ALIASES, AS_PUBLISHED, INT8_CODING


def own_layout(found: FoundExperts, weights: str, coding: Coding | None = None) -> WeightLayout:
    """The layout of one layer in a format of our own, which needs no look at its tensors."""
    return WeightLayout(
        found.shape.experts,
        found.shape.hidden,
        found.shape.intermediate,
        ALIASES.get(weights, weights),
        gated=found.shape.gate.gated,
        biased=frozenset(found.kind.biases),
        coding=coding,
    )


def layout_of(source: ExpertSource, weights: str) -> WeightLayout:
    """The layout that `weights` of the settings means for one layer.

    Raises CheckpointError where `checkpoint` cannot keep what was published.
    """
    if weights != AS_PUBLISHED:
        return own_layout(source.found, weights)
    return own_layout(source.found, *_published(source.found.shape, source))


def _published(shape: ExpertsShape, source: ExpertSource) -> tuple[str, Coding | None]:
    """(format, coding) that keeps the experts of a layer as they are, judged by expert 0."""
    found = {p: source.read(0, p) for p in shape.projections}
    coded = [m for m in found.values() if isinstance(m, CodedMatrix)]
    if not coded:
        return "bf16", None
    # A matrix that is one group along its inputs takes part in whatever groups the others have;
    # where one was cut inside of a group of outputs, all get a scale for each output.
    widths = {m.coding.group_inputs for m in coded if m.scales.shape[1] > 1} or {0}
    heights = {m.coding.group_outputs for m in coded}
    coding = replace(
        coded[0].coding,
        group_inputs=max(widths),
        group_outputs=heights.pop() if len(heights) == 1 else 1,
    )
    narrow = [m.coding.group_inputs for m in coded if m.coding.group_inputs % 32]
    if narrow:
        raise CheckpointError(
            f"weights: checkpoint cannot keep scales for groups of {narrow[0]} inputs "
            "(quantized in order of activations, or in groups that are no multiple of 32); "
            "set weights: int8, int4 or bf16"
        )
    alike = all(m.fitted(coding).coding == coding for m in coded)
    if len(coded) < len(found) or not alike:
        raise CheckpointError(
            "weights: checkpoint needs one format for all experts of a layer, got "
            + ", ".join(
                f"{p} in {m.coding if isinstance(m, CodedMatrix) else m.dtype}"
                for p, m in found.items()
            )
            + "; set weights: int8, int4 or bf16"
        )
    if replace(coding, scales="float32") == INT8_CODING:
        return "int8", None
    return "coded", coding


def declared_layout(found: FoundExperts, published: Mapping[str, Any]) -> WeightLayout:
    """What `weights: checkpoint` means by the checkpoint's quantization_config alone.

    For plans: what is kept is decided by the tensors. Raises CheckpointError for a method whose
    form the configuration does not tell.
    """
    return own_layout(found, *_declared(published))


def _declared(published: Mapping[str, Any]) -> tuple[str, Coding | None]:
    method = published.get("quant_method")
    if method is None:
        return "bf16", None
    if method == "mxfp4":
        return "coded", Coding("e2m1", "e8m0", 1, 32)
    if method in ("fp8", "fbgemm_fp8"):
        outputs, inputs = published.get("weight_block_size") or (1, 0)
        return "coded", Coding("e4m3", "float32", int(outputs), int(inputs))
    size = published.get("group_size", published.get("q_group_size"))
    if method in ("gptq", "awq", "auto-round") and published.get("bits") == 4 and size is not None:
        return "coded", Coding("uint4", "float16", 1, max(0, int(size)), True)
    if method == "compressed-tensors":
        groups = published.get("config_groups") or {}
        weights = next((g.get("weights") or {} for g in groups.values()), {})
        width = max(0, int(weights.get("group_size") or 0))
        kind = weights.get("type"), weights.get("num_bits")
        if kind == ("float", 8):
            return "coded", Coding("e4m3", "bfloat16", 1, width)
        if kind == ("int", 8) and not width:
            return "int8", None
        if kind == ("int", 4):
            return "coded", Coding("uint4", "bfloat16", 1, width)
    raise CheckpointError(
        f"weights: checkpoint: config.json says quant_method {method!r} in a form that only the "
        "checkpoint's tensors tell; give a folder that has them, or set weights: int8"
    )
