"""Packing the experts of a model: from a checkpoint's files, or from stock modules in memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from tqdm import tqdm

from kt_sft.errors import CheckpointError
from kt_sft.experts import HybridExperts
from kt_sft.families import Family
from kt_sft.kernels import PROJECTIONS
from kt_sft.store.checkpoint import SafetensorsCheckpoint
from kt_sft.store.layout import ExpertsOnDisk

logger = logging.getLogger(__name__)

# read(expert, projection) -> [outputs, inputs]
Reader = Callable[[int, str], Tensor]


def pack_experts(module: HybridExperts, read: Reader) -> None:
    """Packs every expert of one layer. Raises CheckpointError for NaN and Inf."""
    shape, runtime = module.shape, module.runtime
    weights = runtime.engine.new_weights(
        shape.experts, shape.hidden, shape.intermediate, runtime.settings.weights
    )
    for expert in range(shape.experts):
        for projection in PROJECTIONS:
            try:
                weights.pack(runtime.engine, expert, projection, read(expert, projection))
            except ValueError as error:
                raise CheckpointError(f"{module.path}: {error}") from error
    module.weights = weights


def pack_from_checkpoint(
    modules: Mapping[str, HybridExperts], family: Family, files: list[str]
) -> None:
    """Streams the experts from safetensors files, one tensor at a time. Raises CheckpointError.

    Beyond the packed weights this holds one tensor of the mapped files.
    """
    start = time.perf_counter()
    checkpoint = SafetensorsCheckpoint(files)
    found = {
        path: ExpertsOnDisk.find(checkpoint, family, path, module.shape)
        for path, module in modules.items()
    }
    for path, module in tqdm(modules.items(), desc="Packing experts", unit="layer"):
        on_disk = found[path]

        def read(
            expert: int,
            projection: str,
            on_disk: ExpertsOnDisk = on_disk,
            intermediate: int = module.shape.intermediate,
        ) -> Tensor:
            return on_disk.read(checkpoint, expert, projection, intermediate)

        pack_experts(module, read)
    _report(modules, time.perf_counter() - start)


def pack_from_module(module: HybridExperts, stock: Any) -> None:
    """Packs the parameters gate_up_proj [E, 2F, D] and down_proj [E, D, F] of a stock module."""
    gate_up, down = stock.gate_up_proj.detach(), stock.down_proj.detach()
    middle = module.shape.intermediate

    def read(expert: int, projection: str) -> Tensor:
        if projection == "down_proj":
            return down[expert].cpu()
        rows = slice(0, middle) if projection == "gate_proj" else slice(middle, 2 * middle)
        return gate_up[expert, rows].cpu()

    pack_experts(module, read)


def _report(modules: Mapping[str, HybridExperts], seconds: float) -> None:
    stored = sum(m.weights.nbytes for m in modules.values() if m.weights)
    one = next(iter(modules.values()))
    count = sum(
        3 * m.shape.experts * m.shape.hidden * m.shape.intermediate for m in modules.values()
    )
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
