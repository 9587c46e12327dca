"""A forecast for people, line by line, and as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kt_sft.errors import StoreFolderError
from kt_sft.forecast.forecast import FITS, MOST, Forecast
from kt_sft.forecast.machines import Machine
from kt_sft.machine.disk import free_bytes
from kt_sft.planning.outline import PART_OF_SPARE
from kt_sft.planning.plan import MemoryPlan
from kt_sft.store.library import default_folder

_NAME = 34
_SMALL_BYTES, _SMALL_PARAMETERS = 10_000_000, 100_000_000


def lines(forecast: Forecast, samples: int | None = None) -> Iterator[str]:
    """Everything. samples: of one epoch, where they are known."""
    yield from _question(forecast)
    yield ""
    yield from _memory(forecast)
    yield ""
    yield from _time(forecast, samples)
    yield ""
    yield from _verdict(forecast)


def as_dict(forecast: Forecast, samples: int | None = None) -> dict[str, Any]:
    """The same for programs; bytes and seconds."""
    question, plan, step = forecast.question, forecast.plan, forecast.step
    return {
        "verdict": forecast.verdict,
        "model": question.subject.name,
        "parameters": question.subject.parameters,
        "parameters_in_routed_experts": question.subject.in_experts,
        "machine": question.machine.name,
        "measured": question.machine.measured,
        "memory": [{"name": c.name, "place": c.place, "bytes": c.nbytes} for c in plan.components],
        "host_bytes": plan.host_bytes,
        "device_bytes": plan.of("device"),
        "shortages": forecast.shortages,
        "changes": [str(change) for change in forecast.changes],
        "largest_micro_batch_tokens": forecast.longest,
        "adapters": plan.adapters,
        "keeps_activations": plan.keeps,
        "step_tokens": step.tokens,
        "step_seconds": dict(step.parts),
        "tokens_per_second": step.tokens_per_second,
        "other_layers_counted": forecast.counted,
        "limit": forecast.limit,
        "samples": samples,
    }


def _question(forecast: Forecast) -> Iterator[str]:
    question = forecast.question
    subject, layers = question.subject, question.subject.layers
    shape = layers[-1].shape
    top_k = forecast.plan.layers[-1].top_k
    yield (
        f"{subject.name}: {_parameters(subject.parameters)} parameters, "
        f"{_parameters(subject.in_experts)} of them in {len(layers)} layers of {shape.experts} "
        f"routed experts ({shape.hidden} x {shape.intermediate}), {top_k} for each token"
    )
    outline = question.outline
    if outline is None:
        yield f"no training; prompts of {question.length:,} tokens"
    else:
        sequences = outline.tokens // question.length
        pairs = f" ({question.samples} pairs)" if sequences > question.samples else ""
        without = "" if question.settings.expert_lora else ", but no routed experts"
        names = ", ".join(sorted(outline.targets.names))
        yield (
            f"LoRA of rank {outline.rank} on {names}{without}; "
            f"micro batches of {sequences} x {question.length:,} tokens{pairs}, "
            f"{question.micro_batches} a step; one process"
        )
    yield _machine(question.machine)


def _machine(machine: Machine) -> str:
    parts = [f"{machine.threads} threads with {machine.isa}", f"{machine.host_free / 1e9:.0f} GB"]
    device = machine.device
    if device is None:
        parts.append("no accelerator")
    elif device.free is None:
        parts.append(f"{device.name}, which does not tell its memory")
    else:
        parts.append(f"{device.name} with {device.free / 1e9:.0f} GB")
    how = "free and measured now" if machine.measured else "described, rates assumed"
    return f"on {machine.name}: {', '.join(parts)} ({how})"


def _memory(forecast: Forecast) -> Iterator[str]:
    plan, machine = forecast.plan, forecast.question.machine
    on_device = machine.device is not None
    yield f"{'memory':<{_NAME}} {'host':>11}" + (f" {'device':>11}" if on_device else "")
    for component in plan.components:
        if not component.nbytes:
            continue
        there = component.place == "device"
        yield f"  {component.name:<{_NAME - 2}} " + _cells(
            0 if there else component.nbytes, component.nbytes if there else 0, on_device
        )
    yield f"  {'together':<{_NAME - 2}} " + _cells(plan.host_bytes, plan.of("device"), on_device)
    device = machine.device
    free = 0 if device is None or device.free is None else device.free
    yield f"  {'there is':<{_NAME - 2}} " + _cells(machine.host_free, free, on_device)
    yield f"  {_choices(plan, forecast)}"
    if machine.nodes > 1:
        each = plan.of("machine") / machine.nodes / 1e9
        yield f"  on each of {machine.nodes} memory nodes about {each:.1f} GB of experts"
    yield from _disk(forecast)


def _disk(forecast: Forecast) -> Iterator[str]:
    """Where the packed experts go, if they are not there yet."""
    needed, store = forecast.plan.of("machine"), forecast.question.settings.store
    if not needed:
        return
    if not forecast.question.machine.measured:
        yield f"  and {needed / 1e9:.1f} GB of disk for the packed experts"
        return
    try:
        folder = default_folder() if store == "auto" else Path(store)
    except StoreFolderError:
        return
    free = free_bytes(folder)
    short = "" if free > needed else "; set store: to another folder, or to memory"
    yield (
        f"  and {needed / 1e9:.1f} GB of disk for the packed experts, if they are not there: "
        f"{folder} has {free / 1e9:.0f} GB{short}"
    )


def _cells(host: int, device: int, on_device: bool) -> str:
    cells = (host, device) if on_device else (host,)
    return " ".join(f"{_bytes(n):>11}" for n in cells).rstrip()


def _bytes(n: int) -> str:
    """Of small models in MB, nothing where there is nothing."""
    if not n:
        return ""
    return f"{n / 1e9:.2f} GB" if n >= _SMALL_BYTES else f"{n / 1e6:.2f} MB"


def _parameters(n: int) -> str:
    return f"{n / 1e9:.1f} B" if n >= _SMALL_PARAMETERS else f"{n / 1e6:.1f} M"


def _choices(plan: MemoryPlan, forecast: Forecast) -> str:
    settings = forecast.question.settings
    words = [f"weights: {settings.weights}"]
    if forecast.question.outline is not None:
        if forecast.question.machine.device is not None:
            words.append(f"adapters on the {plan.adapters}")
        words.append("activations kept" if plan.keeps else "activations recomputed")
    return "with " + ", ".join(words)


def _time(forecast: Forecast, samples: int | None) -> Iterator[str]:
    step, question = forecast.step, forecast.question
    what = "a step" if question.outline is not None else "reading a prompt"
    how = ", other layers counted, not measured" if forecast.counted else ""
    yield f"time (estimated; {'full sequences, ' if question.outline else ''}even routing{how})"
    for name, seconds in sorted(step.parts.items(), key=lambda part: -part[1]):
        yield f"  {name:<{_NAME - 2}} {_seconds(seconds):>11} {seconds / step.seconds:5.0%}"
    yield (
        f"  {what:<{_NAME - 2}} {_seconds(step.seconds):>11}   "
        f"{step.tokens:,} tokens, {step.tokens_per_second:,.0f} a second"
    )
    if samples and question.outline is not None:
        epoch = samples / (question.samples * question.micro_batches) * step.seconds
        yield f"  {f'an epoch of {samples:,} samples':<{_NAME - 2}} {_seconds(epoch):>11}"
    yield f"  most of it: {forecast.limit}"
    if question.settings.schedule != "host":
        yield f"  this is of schedule: host; --explain says what {question.settings.schedule} gives"


def _seconds(seconds: float) -> str:
    units = ((86_400, "days"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"))
    size, unit = next((u for u in units[:-1] if seconds >= 2 * u[0]), units[-1])
    return f"{seconds / size:,.1f} {unit}"


def _verdict(forecast: Forecast) -> Iterator[str]:
    question = forecast.question
    yield forecast.verdict
    yield from (f"  {line}" for line in forecast.shortages)
    if forecast.changes:
        yield f"  fits with {', '.join(map(str, forecast.changes))}"
    elif forecast.shortages:
        yield "  no settings of kt_sft are enough; take a smaller model or a larger machine"
    if forecast.longest:
        many = forecast.longest // question.length
        about = "at least" if forecast.longest >= MOST else "about"
        yield (
            f"  largest micro batch that fits: {about} {forecast.longest:,} tokens"
            + (f" ({many} sequences of {question.length:,})" if many > 1 else "")
        )
    yield from (f"  {line}" for line in _better(forecast))


def _better(forecast: Forecast) -> Iterator[str]:
    """What would be as well or better where it fits."""
    question = forecast.question
    if forecast.verdict != FITS:
        return
    if question.settings.weights.startswith("int4"):
        more = question.changed({"weights": "int8"}, {})
        if not more.shortages():
            yield "weights: int8 fits, too, and loses nothing that is seen (docs: which format)"
    device = question.machine.device
    if device is not None and device.free is not None and question.settings.schedule == "host":
        spare = forecast.plan.spare_device_bytes(device.free)
        layers = forecast.plan.layers
        each = sum(layer.layout.nbytes // layer.layout.experts for layer in layers)
        count = min(layers[-1].layout.experts, int(PART_OF_SPARE["training"] * spare / each))
        if count > 0:
            yield (
                f"the accelerator has room for about {count} experts of each layer: schedule: auto "
                "with gpu_experts: auto (not yet run on a GPU)"
            )
