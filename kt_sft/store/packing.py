"""Packing the experts of a model."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from tqdm import tqdm

from kt_sft.errors import CheckpointError
from kt_sft.experts import ExpertsShape, HybridExperts
from kt_sft.kernels import CodedMatrix, Coding, WeightLayout
from kt_sft.kernels.formats import INT8_CODING
from kt_sft.store.sources import ExpertSource

logger = logging.getLogger(__name__)


def layout_of(module_shape: ExpertsShape, source: ExpertSource, weights: str) -> WeightLayout:
    """The layout that `weights` of the settings means for one layer.

    Raises CheckpointError where `checkpoint` cannot keep what was published.
    """
    coding = None
    if weights == "checkpoint":
        weights, coding = _published(module_shape, source)
    return WeightLayout(
        module_shape.experts,
        module_shape.hidden,
        module_shape.intermediate,
        {"int4": "int4_g32"}.get(weights, weights),
        gated=module_shape.gate.gated,
        biased=source.biased,
        coding=coding,
    )


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


def pack_experts(engine: Any, weights: Any, source: ExpertSource, where: str) -> None:
    """Packs every expert of one layer into empty `weights`; raises CheckpointError for NaN, Inf."""
    layout: WeightLayout = weights.layout
    for expert in range(layout.experts):
        for projection in layout.projections:
            try:
                _pack_one(engine, weights, expert, projection, source.read(expert, projection))
                bias = source.bias(expert, projection)
                if bias is not None:
                    weights.set_bias(expert, projection, bias)
            except ValueError as error:
                raise CheckpointError(f"{where}: {error}") from error


def _pack_one(
    engine: Any, weights: Any, expert: int, projection: str, matrix: Tensor | CodedMatrix
) -> None:
    if isinstance(matrix, Tensor):
        weights.pack(engine, expert, projection, matrix)
        return
    coding = weights.layout.coding
    if coding is None and weights.layout.weights == "int8":
        exact = replace(matrix.coding, scales="float32") == INT8_CODING
        if exact:
            coding = INT8_CODING
            matrix = replace(matrix, coding=coding, scales=matrix.scales.float())
    if coding is None:
        weights.pack(engine, expert, projection, matrix.dequantize())
    else:
        weights.pack_codes(engine, expert, projection, matrix.fitted(coding))


def pack_layer(module: HybridExperts, source: ExpertSource) -> Any:
    """New weights in this process's memory, as the module's settings ask for."""
    runtime = module.runtime
    weights = runtime.engine.new_weights(layout_of(module.shape, source, runtime.settings.weights))
    pack_experts(runtime.engine, weights, source, module.path)
    return weights


def pack_all(experts: Mapping[str, tuple[HybridExperts, ExpertSource]]) -> None:
    """Streams the experts of a model, one tensor at a time. Raises CheckpointError.

    Beyond the packed weights this holds one tensor of the source.
    """
    start = time.perf_counter()
    for module, source in tqdm(experts.values(), desc="Packing experts", unit="layer"):
        module.weights = pack_layer(module, source)
    _report({path: module for path, (module, _) in experts.items()}, time.perf_counter() - start)


def _report(modules: Mapping[str, HybridExperts], seconds: float) -> None:
    stored = sum(m.weights.nbytes for m in modules.values() if m.weights)
    one = next(iter(modules.values()))
    count = sum(m.shape.weights for m in modules.values())
    logger.info(
        "packed %d layers of %d experts as %s: %.3f GB in host memory (bf16 would be %.3f GB), "
        "%.1f s, %s kernels on %d threads",
        len(modules),
        one.shape.experts,
        one.runtime.settings.weights,
        stored / 1e9,
        2 * count / 1e9,
        seconds,
        one.runtime.engine.isa,
        one.runtime.engine.threads,
    )
