"""Packing the experts of a model."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from tqdm import tqdm

from kt_sft.errors import CheckpointError
from kt_sft.experts import HybridExperts
from kt_sft.kernels import WeightLayout
from kt_sft.store.sources import ExpertSource

logger = logging.getLogger(__name__)


def pack_experts(module: HybridExperts, source: ExpertSource) -> None:
    """Packs every expert of one layer. Raises CheckpointError for NaN and Inf."""
    shape, runtime = module.shape, module.runtime
    weights = runtime.engine.new_weights(
        WeightLayout(
            shape.experts,
            shape.hidden,
            shape.intermediate,
            runtime.settings.weights,
            gated=shape.gate.gated,
            biased=source.biased,
        )
    )
    for expert in range(shape.experts):
        for projection in shape.projections:
            try:
                weights.pack(runtime.engine, expert, projection, source.read(expert, projection))
                bias = source.bias(expert, projection)
                if bias is not None:
                    weights.set_bias(expert, projection, bias)
            except ValueError as error:
                raise CheckpointError(f"{module.path}: {error}") from error
    module.weights = weights


def pack_all(experts: Mapping[str, tuple[HybridExperts, ExpertSource]]) -> None:
    """Streams the experts of a model, one tensor at a time. Raises CheckpointError.

    Beyond the packed weights this holds one tensor of the source.
    """
    start = time.perf_counter()
    for module, source in tqdm(experts.values(), desc="Packing experts", unit="layer"):
        pack_experts(module, source)
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
