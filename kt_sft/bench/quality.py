"""What a weight format costs on a real checkpoint: its error, bytes, loss on text, and speed.

Legend: W windows of T tokens, V vocabulary.
"""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from kt_sft.checkpoint.configuration import read_config
from kt_sft.checkpoint.folder import checkpoint_experts, model_class_of
from kt_sft.checkpoint.layouts import layout_of
from kt_sft.checkpoint.sources import ExpertSource
from kt_sft.engines.cpu import CpuEngine
from kt_sft.engines.protocol import PlacedExperts
from kt_sft.errors import CheckpointError, KtSftError, SettingsError
from kt_sft.experts import hybrid_experts_of
from kt_sft.families.shape import ExpertsShape
from kt_sft.files.progress import Progress
from kt_sft.kernels import CodedMatrix, Engine, requested_isa
from kt_sft.loading.config import HybridExpertsConfig
from kt_sft.loading.packing import pack_one
from kt_sft.machine.cpus import available_threads

logger = logging.getLogger(__name__)

REFERENCE = "bf16"
# Positions whose logits are made fp32 at a time.
_CHUNK = 256


@dataclass(frozen=True)
class FormatQuality:
    """One weight format in one compute mode.

    weight_error: relative Frobenius error of the sampled experts. loss: mean nats a token. excess:
    what of it the reference format does not have on the same tokens, and excess_error the standard
    error of that mean, from the windows' means. same_choice: part of the tokens where both find the
    same next one most likely. tokens_per_second: of the whole model's forward pass, median over the
    windows. None where there is no reference, or one window alone.
    """

    weights: str
    compute: str
    bytes_per_weight: float
    weight_error: float
    loss: float
    excess: float | None
    excess_error: float | None
    same_choice: float | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class _Reading:
    loss_WT: Tensor  # one less than the tokens of a window
    choice_WT: Tensor
    tokens_per_second: float


def windows_of(model: Path, text: str, tokens: int, context: int) -> Tensor:
    """[W, T] token ids: windows of `context`, spread evenly over `text`, of `tokens` in all.

    A text of fewer tokens is taken whole, cut to whole windows. Raises CheckpointError for a
    checkpoint without tokenizer, SettingsError for a text or numbers that are too small.
    """
    if context < 2 or tokens < context:
        raise SettingsError(
            f"--context, --tokens: got {context} and {tokens}, expected a context of at least 2 "
            "and as many tokens as one context"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model}: no tokenizer could be read there: {error}") from error
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < 2:
        raise SettingsError(
            f"--text: the tokenizer in {model} makes {len(ids)} tokens of {len(text)} characters, "
            "expected at least 2; give more text, or a folder with a tokenizer"
        )
    # Models that expect their first token expect it in each window.
    begin = ids[:1] if ids[0] == tokenizer.bos_token_id else ids[:0]
    ids = ids[len(begin) :]
    length = min(context - len(begin), len(ids))
    there = len(ids) // length
    chosen = min(tokens // context, there)
    starts = [length * (i * there // chosen) for i in range(chosen)]
    return torch.stack([torch.cat([begin, ids[s : s + length]]) for s in starts])


def measure_quality(
    model: Path,
    windows_WT: Tensor,
    formats: Sequence[str],
    *,
    against: Path | None = None,
    experts: int = 2,
    store: str = "memory",
) -> Iterator[FormatQuality]:
    """Yields a row for each format and each of its compute modes, the reference first.

    The reference is bf16 of `against`, or of the model itself; it is measured whether it is among
    `formats` or not. What cannot be measured (it does not fit, or a format cannot keep what was
    published) is a warning, and rows lack what needs it. Raises SettingsError where `against` is
    another model, KtSftError for a checkpoint that cannot be read.
    """
    require_experts(model, against)
    origin = against or model
    reference: _Reading | None = None
    try:
        for compute, size, reading in _readings(origin, windows_WT, REFERENCE, store):
            reference = reading
            if REFERENCE in formats and against is None:
                yield _row(REFERENCE, compute, size, reading, None, 0.0)
    except KtSftError as error:
        logger.warning("the reference, %s in bf16, is not measured: %s", origin, error)
    for weights in formats:
        if weights == REFERENCE and against is None:
            continue
        if weights == "checkpoint" and not _is_coded(model):
            logger.info("checkpoint: the experts of %s are no codes; it is the same as bf16", model)
            continue
        try:
            differs = _overall(weight_errors(model, weights, experts, against).values())
            for compute, size, reading in _readings(model, windows_WT, weights, store):
                yield _row(weights, compute, size, reading, reference, differs)
        except KtSftError as problem:
            logger.warning("%s is not measured: %s", weights, problem)


def require_experts(model: Path, against: Path | None) -> None:
    """Raises KtSftError where there are none, or other ones in `against`."""
    outline = _outline(model)
    if against is not None and _outline(against) != outline:
        raise SettingsError(
            f"--against: {against} has other experts or another vocabulary than {model}; expected "
            "the checkpoint that it is a quantized copy of"
        )


def _outline(folder: Path) -> tuple[list[tuple[str, ExpertsShape]], int | None]:
    layers = checkpoint_experts(str(folder)).layers
    vocabulary = getattr(read_config(str(folder)).get_text_config(), "vocab_size", None)
    return [(layer.hybrid_path, layer.shape) for layer in layers], vocabulary


def _row(
    weights: str,
    compute: str,
    bytes_per_weight: float,
    reading: _Reading,
    reference: _Reading | None,
    weight_error: float,
) -> FormatQuality:
    excess = error = same = None
    if reference is not None:
        means_W = (reading.loss_WT - reference.loss_WT).mean(1)
        excess = float(means_W.mean())
        error = float(means_W.std() / len(means_W) ** 0.5) if len(means_W) > 1 else None
        same = float((reading.choice_WT == reference.choice_WT).double().mean())
    return FormatQuality(
        weights,
        compute,
        bytes_per_weight,
        weight_error,
        float(reading.loss_WT.mean()),
        excess,
        error,
        same,
        reading.tokens_per_second,
    )


def _readings(
    folder: Path, windows_WT: Tensor, weights: str, store: str
) -> Iterator[tuple[str, float, _Reading]]:
    """(compute mode, bytes a weight, what was measured) of one model, loaded once."""
    config = HybridExpertsConfig(weights=weights, expert_lora=False, store=store)
    model = model_class_of(folder).from_pretrained(
        str(folder), quantization_config=config, dtype="auto"
    )
    available = torch.accelerator.is_available()
    model.eval().to(torch.accelerator.current_accelerator() if available else "cpu")
    hybrid = list(hybrid_experts_of(model).values())
    packed = [layer.weights for layer in hybrid if layer.weights is not None]
    count = sum(layer.shape.weights for layer in hybrid)
    bytes_per_weight = sum(w.nbytes for w in packed) / count
    runtime = hybrid[0].runtime
    fixed = packed[0].layout.arithmetic
    for compute in (fixed,) if fixed else ("exact", "int8"):
        if not fixed:
            runtime.settings = replace(runtime.settings, compute=compute)
        yield compute, bytes_per_weight, _read(model, windows_WT, f"{weights}, {compute}")
    del model, hybrid, packed, runtime
    gc.collect()


@torch.no_grad()
def _read(model: Any, windows_WT: Tensor, name: str) -> _Reading:
    losses, choices, seconds = [], [], []
    model(windows_WT[:1].to(model.device), use_cache=False)
    with Progress(name, len(windows_WT), "window") as progress:
        for ids_1T in windows_WT.split(1):
            begin = time.perf_counter()
            logits_TV = model(ids_1T.to(model.device), use_cache=False).logits[0]
            logits_TV[-1, 0].item()  # waits for an accelerator
            seconds.append(time.perf_counter() - begin)
            want_T = ids_1T[0, 1:].to(logits_TV.device)
            for some_TV, some_T in zip(
                logits_TV[:-1].split(_CHUNK), want_T.split(_CHUNK), strict=True
            ):
                losses.append(
                    cross_entropy(some_TV.float(), some_T, reduction="none").double().cpu()
                )
                choices.append(some_TV.argmax(-1).cpu())
            progress.update(1)
    windows = len(windows_WT)
    return _Reading(
        torch.cat(losses).view(windows, -1),
        torch.cat(choices).view(windows, -1),
        windows_WT.shape[1] / statistics.median(seconds),
    )


def _is_coded(model: Path) -> bool:
    found = checkpoint_experts(str(model))
    layer = found.layers[0]
    source = found.sources[layer.hybrid_path]
    return isinstance(source.read(0, layer.shape.projections[0]), CodedMatrix)


def weight_errors(
    model: Path, weights: str, experts: int, origin: Path | None = None
) -> Mapping[str, tuple[float, float]]:
    """Of each layer: (squared error of its first experts, squared norm of what they should be).

    What they should be is in `origin`, by default the model itself. A layer that the format cannot
    keep (checkpoint) is left out. Raises KtSftError.
    """
    found = checkpoint_experts(str(model))
    sources = found.sources
    origins = checkpoint_experts(str(origin)).sources if origin is not None else sources
    engine = CpuEngine(Engine(available_threads(), requested_isa("auto")))
    errors = {}
    for layer in found.layers:
        source = sources[layer.hybrid_path]
        try:
            packed = engine.new_experts(layout_of(source, weights))
        except CheckpointError:
            continue
        few = range(min(experts, layer.shape.experts))
        try:
            errors[layer.hybrid_path] = _error(
                packed, layer.shape, source, origins[layer.hybrid_path], few
            )
        except ValueError as error:
            raise CheckpointError(f"{layer.hybrid_path}: {error}") from error
    return errors


def _overall(errors: Iterable[tuple[float, float]]) -> float:
    wrong, total = (sum(part) for part in zip(*[(0.0, 0.0), *errors], strict=True))
    return float((wrong / total) ** 0.5) if total else 0.0


def _error(
    packed: PlacedExperts,
    shape: ExpertsShape,
    source: ExpertSource,
    origin: ExpertSource,
    experts: Iterable[int],
) -> tuple[float, float]:
    wrong = total = 0.0
    for expert in experts:
        for projection in shape.projections:
            matrix = source.read(expert, projection)
            pack_one(packed, expert, projection, matrix)
            exact = _floats(matrix if origin is source else origin.read(expert, projection))
            wrong += float((packed.unpack(expert, projection) - exact).square().sum())
            total += float(exact.square().sum())
    return wrong, total


def _floats(matrix: Tensor | CodedMatrix) -> Tensor:
    return matrix.dequantize() if isinstance(matrix, CodedMatrix) else matrix.to(torch.float32)


_COLUMNS = (
    "weights", "compute", "bytes a weight", "weight error", "loss", "over bf16", "same token",
    "tokens/s",
)  # fmt: skip


def table_head() -> str:
    """The first two lines of a Markdown table."""
    return f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}\n"


def table_line(row: FormatQuality) -> str:
    """The row's line of it."""
    excess = "" if row.excess is None else f"{row.excess:+.4f}"
    error = "" if row.excess_error is None else f" ± {row.excess_error:.4f}"
    same = "" if row.same_choice is None else f"{row.same_choice:.1%}"
    speed = "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
    return (
        f"| {row.weights} | {row.compute} | {row.bytes_per_weight:.3f} | {row.weight_error:.2%} "
        f"| {row.loss:.4f} | {excess}{error} | {same} | {speed} |\n"
    )
