"""Packing the experts of a model."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from kt_sft.checkpoint.layouts import layout_of
from kt_sft.checkpoint.sources import ExpertSource
from kt_sft.engines.cpu import CpuExperts
from kt_sft.engines.protocol import PlacedExperts
from kt_sft.errors import CheckpointError
from kt_sft.experts import HybridExperts
from kt_sft.files.progress import Progress
from kt_sft.kernels import CodedMatrix, Engine, ExpertWeights
from kt_sft.kernels.formats import INT8_CODING
from kt_sft.store.packed_file import StoredLayer, StoreWriter, file_bytes

logger = logging.getLogger(__name__)


def pack_experts(placed: PlacedExperts, source: ExpertSource, where: str) -> None:
    """Packs every expert of one layer; raises CheckpointError for NaN, Inf."""
    for expert in range(placed.layout.experts):
        for projection in placed.layout.projections:
            try:
                pack_one(placed, expert, projection, source.read(expert, projection))
                bias = source.bias(expert, projection)
                if bias is not None:
                    placed.set_bias(expert, projection, bias)
            except ValueError as error:
                raise CheckpointError(f"{where}: {error}") from error


def pack_one(
    placed: PlacedExperts, expert: int, projection: str, matrix: Tensor | CodedMatrix
) -> None:
    """Packs one matrix, as published where the layout can hold that. Raises ValueError for NaN."""
    if isinstance(matrix, Tensor):
        placed.pack(expert, projection, matrix)
        return
    coding = placed.layout.coding
    if coding is None and placed.layout.weights == "int8":
        exact = replace(matrix.coding, scales="float32") == INT8_CODING
        if exact:
            coding = INT8_CODING
            matrix = replace(matrix, coding=coding, scales=matrix.scales.float())
    if coding is None:
        placed.pack(expert, projection, matrix.dequantize())
    else:
        placed.pack_codes(expert, projection, matrix.fitted(coding))


def new_layer(module: HybridExperts, source: ExpertSource) -> PlacedExperts:
    """Packed experts in this process's memory, as the module's settings ask for."""
    runtime = module.runtime
    placed = runtime.engine.new_experts(layout_of(source, runtime.settings.weights))
    pack_experts(placed, source, module.path)
    return placed


def pack_in_memory(experts: Mapping[str, tuple[HybridExperts, ExpertSource]]) -> None:
    """Packs the experts of a model, one tensor at a time. Raises CheckpointError.

    Beyond the packed weights this holds one tensor of the source.
    """
    start = time.perf_counter()
    with Progress("Packing experts", len(experts), "layer") as progress:
        for module, source in experts.values():
            module.weights = new_layer(module, source)
            progress.update(1)
    report({path: module for path, (module, _) in experts.items()}, "packed", start)


def write_layers(
    engine: Engine,
    writer: StoreWriter,
    layers: list[StoredLayer],
    source: Mapping[str, ExpertSource],
) -> None:
    """Packs layer by layer into a store, through one staging buffer. Raises CheckpointError."""
    staging: ExpertWeights | None = None
    total = file_bytes(layers)
    with Progress("Packing experts", total) as progress:
        for layer in layers:
            if staging is None or staging.layout != layer.layout:
                staging = None  # freed before the next is there
                staging = ExpertWeights(layer.layout)
            pack_experts(CpuExperts(engine, staging), source[layer.path], layer.path)
            writer.add(layer, staging)
            progress.update(sum(size for _, size in layer.tensors()))


def report(modules: Mapping[str, HybridExperts], what: str, start: float) -> None:
    """One line in the log: what the experts are, how large, how long it took."""
    layouts = [m.weights.layout for m in modules.values() if m.weights is not None]
    stored = sum(m.weights.nbytes for m in modules.values() if m.weights is not None)
    one = next(iter(modules.values()))
    settings, engine = one.runtime.settings, one.runtime.engine
    logger.info(
        "%s %d layers of %d experts as %s: %.3f GB of host memory (bf16 would be %.3f GB), "
        "%.1f s, %s kernels on %d threads",
        what,
        len(modules),
        one.shape.experts,
        settings.weights,
        stored / 1e9,
        2 * sum(layout.weight_count for layout in layouts) / 1e9,
        time.perf_counter() - start,
        engine.isa,
        engine.threads,
    )
    if settings.compute == "int8" and all(layout.arithmetic for layout in layouts):
        logger.warning(
            "compute: int8 has no effect: the checkpoint's own codes are multiplied in bf16"
        )
