"""Giving a model's hybrid experts their weights, from a store that is built if it is missing."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from kt_sft.checkpoint.folder import CheckpointExperts
from kt_sft.checkpoint.layouts import layout_of, own_layout
from kt_sft.engines.protocol import ExpertsEngine
from kt_sft.errors import StoreError, StoreFolderError
from kt_sft.experts import HybridExperts
from kt_sft.kernels import Engine
from kt_sft.kernels.formats import AS_PUBLISHED
from kt_sft.loading.packing import pack_in_memory, report, write_layers
from kt_sft.machine.disk import read_rate
from kt_sft.machine.memory import available_memory_bytes
from kt_sft.scheduling.profile import RoutingProfile
from kt_sft.store.library import StoreLibrary, WantedStore, default_folder
from kt_sft.store.packed_file import PackedFile, StoredLayer
from kt_sft.store.read_ahead import ReadAhead

logger = logging.getLogger(__name__)

# Part of the free memory that copies of the experts may take.
_FITS = 0.8


def store_of(
    experts: CheckpointExperts, weights: str, folder: str | Path, engine: Engine
) -> tuple[PackedFile, bool]:
    """The store of a checkpoint in a format, and whether it was there already.

    Raises StoreError and CheckpointError.
    """
    library = StoreLibrary(folder)
    as_published = weights == AS_PUBLISHED

    def layers() -> list[StoredLayer]:
        return [StoredLayer(p, layout_of(s, weights)) for p, s in experts.sources.items()]

    # Any format of our own has the sizes of the one that only the checkpoint's content decides.
    form = "bf16" if as_published else weights
    known = [StoredLayer(la.hybrid_path, own_layout(la, form)) for la in experts.layers]
    wanted = WantedStore(
        experts.model,
        weights,
        experts.identity(library.folder / "digests", engine.threads),
        [layer.outline(not as_published) for layer in known],
        layers,
    )
    return library.get(
        wanted,
        lambda writer, planned: write_layers(engine, writer, planned, experts.sources),
        engine.threads,
    )


def place_experts(modules: Mapping[str, HybridExperts], experts: CheckpointExperts) -> None:
    """Gives every module its weights, as its settings ask for. Raises StoreError, CheckpointError.

    With `store: auto`, a folder that cannot be used is warned of, and the experts are packed in
    this process's memory.
    """
    start = time.perf_counter()
    runtime = next(iter(modules.values())).runtime
    settings, engine = runtime.settings, runtime.engine
    if settings.store != "memory":
        try:
            folder = default_folder() if settings.store == "auto" else Path(settings.store)
            packed, there = store_of(experts, settings.weights, folder, engine.packer)
        except StoreFolderError as error:
            if settings.store != "auto":
                raise
            logger.warning("%s. Packing in memory for now", error)
        else:
            resident = _copy(settings.resident, packed, engine)
            if not resident:
                runtime.require_weights = packed.require_whole
                if settings.disk_tier:
                    runtime.read_ahead = ReadAhead(packed)
                    _say_what_to_expect(packed)
            for path, module in modules.items():
                mapped = packed.weights(path)
                if resident:
                    module.weights = engine.new_experts(mapped.layout)
                    module.weights.take_channels(mapped)
                else:
                    module.weights = engine.on(mapped)
            how = "mapped" if there else "packed and mapped"
            report(modules, f"{how} {packed.path}:", start)
            _remember_routing(modules, packed.path.with_suffix(".routing.json"))
            return
    pack_in_memory({path: (module, experts.sources[path]) for path, module in modules.items()})


def _remember_routing(modules: Mapping[str, HybridExperts], file: Path) -> None:
    """Where earlier runs have left which experts get many rows, and this one will."""
    runtime = next(iter(modules.values())).runtime
    runtime.routing_file = file
    if runtime.settings.schedule != "host" and file.is_file():
        counts = {path: module.shape.experts for path, module in modules.items()}
        try:
            runtime.routing, _ = RoutingProfile.load(file, counts)
        except OSError as error:
            logger.warning("%s: %s; the routing profile is left out", file, error)


def _say_what_to_expect(packed: PackedFile) -> None:
    """Of experts that may come from the disk."""
    rate, free = read_rate(packed.path), available_memory_bytes()
    logger.info(
        "disk_tier: %.2f GB of packed experts, %.2f GB of memory are free; what does not stay is "
        "read in each pass%s",
        packed.nbytes / 1e9,
        free / 1e9,
        f", at {rate / 1e9:.2f} GB/s all of it in {packed.nbytes / rate:.1f} s" if rate else "",
    )


def _copy(resident: str | bool, packed: PackedFile, engine: ExpertsEngine) -> bool:
    """Whether to copy the experts out of the mapped file; memory nodes need copies."""
    split = engine.needs_copies
    if resident == "auto":
        resident = split and packed.nbytes < _FITS * available_memory_bytes()
    if split and not resident:
        raise StoreError(
            f"{packed.path}: {packed.nbytes / 1e9:.1f} GB of experts do not fit "
            f"{available_memory_bytes() / 1e9:.1f} GB of free memory, which `numa: auto` needs; "
            "set numa: off"
        )
    return bool(resident)
