"""The forecast of a recipe: memory, time, limits, the largest that fits, what else would fit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kt_sft.config import HybridExpertsSettings
from kt_sft.engines.calibration import measured_host
from kt_sft.forecast.machines import Machine
from kt_sft.forecast.probe import RestTimes, Sample, measured_rest
from kt_sft.forecast.subject import Subject
from kt_sft.forecast.timing import LayerTimes, Load, StepTime, time_of_step
from kt_sft.kernels import WeightLayout
from kt_sft.machine.accelerator import current_accelerator
from kt_sft.planning.outline import TrainingOutline, plan_of
from kt_sft.planning.plan import LayerNeeds, MemoryPlan

FITS, DOES_NOT_FIT, UNKNOWN = "fits", "does not fit", "cannot tell"
STATUS = {FITS: 0, DOES_NOT_FIT: 1, UNKNOWN: 2}


@dataclass(frozen=True)
class Change:
    """A setting of the recipe, `kt_sft.x` for one of the section, that takes less memory.

    training: what it means for the training, where it is LLaMA-Factory's.
    """

    key: str
    value: str | int | bool
    training: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def inner(self) -> str:
        """The name within the section; empty for a setting of the recipe."""
        return self.key.partition(".")[2]

    def __str__(self) -> str:
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return f"{self.key}: {value}{self.note}"


_BITS = "quantization_bit"
# What costs least comes first.
_CHANGES = (
    Change("use_unsloth_gc", True, {"offloads": True}),
    Change("kt_sft.embeddings", "host"),
    Change("kt_sft.adapters", "host"),
    Change("kt_sft.activations", "recompute"),
    Change("kt_sft.weights", "int8"),
    Change("kt_sft.expert_lora", "shared"),
    Change(_BITS, 4),
    Change("kt_sft.weights", "int4"),
    Change("kt_sft.disk_tier", True),
)
# Tokens; more are not looked for.
MOST = 1 << 20


@dataclass(frozen=True)
class Question:
    """A recipe's model, section and training, and a machine.

    outline: None where the recipe does not train. length: of one sequence (cutoff_len). samples: of
    a micro batch. times: what a layer takes with LoRA of a rank on its experts (0: none); measured,
    or assumed of a described machine. measures_rest: whether the other layers are run here to see
    what they take. fixed: changes that do not go with the recipe.
    """

    subject: Subject
    settings: HybridExpertsSettings
    outline: TrainingOutline | None
    machine: Machine
    length: int
    samples: int
    micro_batches: int
    times: Callable[[LayerNeeds, int], LayerTimes]
    measures_rest: bool = False
    fixed: frozenset[str] = frozenset()

    def plan(self) -> MemoryPlan:
        """Of memory."""
        return plan_of(
            self.subject.model,
            self.subject.layers,
            self.subject.published_layout,
            self.settings,
            self.outline,
            self.subject.rest_bytes,
            self.machine.surroundings(),
        )

    def rest(self, plan: MemoryPlan, load: Load) -> RestTimes | None:
        """What is beside the experts, measured; None where it is to be counted."""
        # Layers in 4 bits are not made here, and what does not fit is not tried.
        if not self.measures_rest or self.subject.rest_bytes is not None or self.shortages(plan):
            return None
        device = current_accelerator() if self.machine.device is not None else None
        sample = Sample(load.tokens, load.length)
        return measured_rest(self.subject, self.outline, sample, device or torch.device("cpu"))

    def shortages(self, plan: MemoryPlan | None = None) -> list[str]:
        """What does not fit, a line for each place. plan: ours, where it is made already."""
        device = self.machine.device
        free = None if device is None else device.free
        plan = plan or self.plan()
        return plan.shortages(self.machine.host_free, free, self.settings.disk_tier)

    def with_tokens(self, tokens: int) -> Question:
        """The same with another micro batch."""
        assert self.outline is not None
        return replace(self, outline=replace(self.outline, tokens=tokens))

    def changed(self, section: Mapping[str, Any], training: Mapping[str, Any]) -> Question:
        """The same with other settings of the section and of the training."""
        outline = self.outline and replace(self.outline, **training)
        settings = HybridExpertsSettings(**{**self.settings.as_dict(), **section})
        return replace(self, settings=settings, outline=outline)


@dataclass(frozen=True)
class Forecast:
    """The answer. longest: tokens of the largest micro batch that fits, 0 where none does; changes:
    settings with which it would fit, all of them together. counted: whether what is beside the
    experts was counted where it would have been measured."""

    question: Question
    plan: MemoryPlan
    shortages: list[str]
    step: StepTime
    longest: int
    changes: list[Change]
    counted: bool

    @property
    def verdict(self) -> str:
        """FITS, DOES_NOT_FIT or UNKNOWN."""
        if self.shortages:
            return DOES_NOT_FIT
        device = self.question.machine.device
        return UNKNOWN if device is not None and device.free is None else FITS

    @property
    def limit(self) -> str:
        """The part of a step that takes longest, and why."""
        name, _ = max(self.step.parts.items(), key=lambda part: part[1])
        if name.startswith("experts"):
            return f"{name}: {self._why_experts()}"
        where = "the accelerator" if self.question.machine.device is not None else "the CPU"
        reasons = {
            "other layers": f"products and attention of {where}",
            "link": "copies between host and accelerator",
            "optimizer": "memory that its states are read from and written to",
        }
        return f"{name}: {reasons[name]}"

    def _why_experts(self) -> str:
        """Reading weights or arithmetic, of the last layer."""
        layer = self.plan.layers[-1]
        tokens = self.step.tokens // self.question.micro_batches
        rows = max(1.0, tokens * layer.top_k / layer.layout.experts)
        work = self.plan.work
        curve, _ = self.question.times(layer, work.rank if work is not None else 0).forward
        few, some = (float(s) for s in curve([1, round(rows)]))  # type: ignore[arg-type]
        reading = some < 2 * few
        return "reading their weights from memory" if reading else "the CPU's arithmetic"


def ask(question: Question) -> Forecast:
    """Answers a question. Raises CheckpointError, SettingsError."""
    plan = question.plan()
    shortages = question.shortages(plan)
    tokens = question.outline.tokens if question.outline is not None else question.length
    references = question.outline.references if question.outline is not None else 0
    length = min(question.length, tokens)
    load = Load(tokens, length, question.micro_batches, references)
    rest = question.rest(plan, load)
    step = time_of_step(question.subject, question.machine, plan, question.times, load, rest)
    longest = _longest(question) if question.outline is not None else 0
    changes = _changes(question) if shortages else []
    counted = question.measures_rest and rest is None
    return Forecast(question, plan, shortages, step, longest, changes, counted)


def _longest(question: Question) -> int:
    """Tokens of the largest micro batch that fits, in steps of 1/32; 0 where none does."""

    def fits(tokens: int) -> bool:
        return not question.with_tokens(tokens).shortages()

    low, high = 0, 256
    while high <= MOST and fits(high):
        low, high = high, 2 * high
    if high > MOST:
        return MOST
    while high - low > max(64, low // 32):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _changes(question: Question) -> list[Change]:
    """Those of the settings with which it fits, none to spare; empty where all do not help."""
    taken: list[Change] = []
    before = _excess(question)
    for change in _CHANGES * 2:  # what moves memory helps once there is room elsewhere
        if change in taken or not before or not _applies(question, change):
            continue
        after = _excess(_with(question, [*taken, change]))
        if after < before:
            taken, before = [*taken, change], after
    if before:
        return []
    for change in reversed(_CHANGES):  # the costliest that can be spared first
        fewer = [one for one in taken if one != change]
        if change.inner == "weights" and any(one.inner == "disk_tier" for one in taken):
            continue  # fewer bytes in every pass
        if not _excess(_with(question, fewer)):
            taken = fewer
    found = _with(question, taken)
    if found.settings.disk_tier:
        over = found.plan().from_disk(question.machine.host_free) / 1e9
        note = f" (reads {over:.0f} GB from the disk in every pass)"
        taken = [replace(c, note=note) if c.inner == "disk_tier" else c for c in taken]
    return list({change.key: change for change in taken}.values())


def _with(question: Question, changes: list[Change]) -> Question:
    for change in changes:
        if change.key == _BITS:
            question = replace(question, subject=question.subject.in_four_bits)
            continue
        section = {change.inner: change.value} if change.inner else {}
        question = question.changed(section, change.training)
    return question


def _applies(question: Question, change: Change) -> bool:
    settings, outline = question.settings, question.outline
    on_device = question.machine.device is not None
    trains = outline is not None
    checkpointing = outline is not None and outline.checkpointing
    applies = {
        _BITS: on_device and question.subject.rest_bytes is None,
        "use_unsloth_gc": on_device and checkpointing,
        "kt_sft.embeddings": on_device,
        "kt_sft.adapters": on_device and outline is not None and not outline.one_kind,
        "kt_sft.activations": checkpointing,
        "kt_sft.weights": not settings.weights.startswith("int4"),
        "kt_sft.expert_lora": trains and settings.expert_lora is True,
        "kt_sft.disk_tier": settings.store != "memory" and settings.resident is not True,
    }
    return applies[change.key] and change.key not in question.fixed


def _excess(question: Question) -> int:
    """Bytes that are missing, in all places."""
    device, plan = question.machine.device, question.plan()
    missing = max(0, -plan.spare_host_bytes(question.machine.host_free))
    if question.settings.disk_tier and not plan.shortages(question.machine.host_free, None, True):
        missing = 0
    if device is not None and device.free is not None:
        missing += max(0, -plan.spare_device_bytes(device.free))
    return missing


def measured_times(settings: HybridExpertsSettings) -> Callable[[LayerNeeds, int], LayerTimes]:
    """Of this machine: each form of layer is measured once with each form of LoRA."""

    @functools.cache
    def of(layout: WeightLayout, top_k: int, rank: int, adapted: tuple[str, ...]) -> LayerTimes:
        return LayerTimes(*measured_host(settings, layout, top_k, rank, adapted))

    return lambda layer, rank: of(layer.layout, layer.top_k, rank, layer.factors)


def assumed_times(
    machine: Machine, settings: HybridExpertsSettings
) -> Callable[[LayerNeeds, int], LayerTimes]:
    """Of a machine that was described."""
    return lambda layer, rank: LayerTimes.assumed(machine, layer.layout, settings.compute)
