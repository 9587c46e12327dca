"""One run, or several side by side, as one HTML file that needs nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2.utils import markupsafe

from kt_sft import __version__
from kt_sft.report import charts
from kt_sft.report.record import Run, Sample

FILE_NAME = "report.html"


@cache
def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html.j2")


def render(runs: Sequence[Run], samples: Sequence[Sample] = ()) -> str:
    """The page of one run, or of several that are compared."""
    first = runs[0]
    one = len(runs) == 1
    base = Path(first.record.base).name or "model"
    return _template().render(
        title=f"{base}: {first.name}" if one else f"{len(runs)} runs",
        subtitle=_subtitle(first) if one else ", ".join(run.name for run in runs),
        cards=[(show(first), what) for what, show in _NUMBERS.items() if one and show(first)],
        compared=None if one else _compared(runs),
        charts=[(h, note, markupsafe.Markup(chart)) for h, note, chart in _charts(runs)],
        memory=_memory(first) if one else [],
        totals=list(_totals(first)) if one else [],
        samples=samples,
        serving=_serving(first) if one else [],
        tables=list(_tables(first)) if one else [],
        release=__version__,
    )


def _subtitle(run: Run) -> str:
    experts, record = run.record.experts, run.record
    machine = experts.get("machine", {})
    words = [
        f"{experts.get('layers', '?')} layers of {experts.get('experts_per_layer', '?')} experts",
        f"{experts.get('weights', '?')}, {experts.get('compute', '?')}",
        f"{experts.get('threads', '?')} threads with {experts.get('isa', '?')}",
        str(machine.get("cpu", "")),
        str(machine.get("accelerator") or "no accelerator"),
        record.ended[:16].replace("T", " ") + " UTC" if record.ended else "",
    ]
    return " · ".join(word for word in words if word)


def _gb(nbytes: float | None) -> str:
    if not nbytes:
        return ""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.3g} MB"


def _time(seconds: float | None) -> str:
    if not seconds:
        return ""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def _value(name: str, pattern: str = "{:.4g}") -> Callable[[Run], str]:
    def show(run: Run) -> str:
        found = run.last(name)
        return "" if found is None else pattern.format(found)

    return show


def _steps(run: Run) -> str:
    return f"{run.record.steps:,}" if run.record.steps else ""


def _speed(run: Run) -> str:
    found = run.mean("tokens_per_second")
    return "" if found is None else f"{found:,.0f}"


# What the head of a page shows, and a comparison row by row.
_NUMBERS: dict[str, Callable[[Run], str]] = {
    "loss at the end": _value("loss"),
    "evaluation loss": _value("eval_loss"),
    "steps": _steps,
    "tokens a second": _speed,
    "training time": lambda run: _time(run.record.seconds),
    "host memory taken": lambda run: _gb(run.record.taken.get("host")),
    "device memory taken": lambda run: _gb(run.record.taken.get("device")),
}
_SETTINGS = ("weights", "compute", "expert_lora", "adapters", "activations", "schedule")


def _compared(runs: Sequence[Run]) -> dict[str, Any]:
    rows = [(what, [show(run) or "-" for run in runs]) for what, show in _NUMBERS.items()]
    rows += [(key, [str(run.record.experts.get(key, "-")) for run in runs]) for key in _SETTINGS]
    told = [{**run.record.recipe, **run.record.training} for run in runs]
    for key in sorted({key for one in told for key in one} - {"output_dir"}):
        values = [str(one.get(key, "-")) for one in told]
        if len(set(values)) > 1:
            rows.append((key, values))
    return {"names": [run.name for run in runs], "rows": [r for r in rows if set(r[1]) != {"-"}]}


def _charts(runs: Sequence[Run]) -> Iterator[tuple[str, str, str]]:
    """(heading, note, SVG); one that has nothing to show is empty."""
    if len(runs) > 1:
        for heading, name in (("Loss", "loss"), ("Evaluation loss", "eval_loss"),
                              ("Tokens a second", "tokens_per_second")):  # fmt: skip
            yield heading, "", charts.lines(heading, {run.name: run.series(name) for run in runs})
        return
    (run,) = runs
    loss = run.series("loss")
    curves = {"loss": loss, "evaluation loss": run.series("eval_loss")}
    if len(loss) > 20:
        curves = {"loss": loss, "its running mean": charts.smooth(loss), **curves}
    yield "Loss", "", charts.lines("Loss by step", curves)
    yield from _times(run)
    rows = {_layer(path): shares for path, shares in run.shares.items()}
    note = (
        "Each row is a layer, each cell an expert: the darker, the more of the layer's rows it got."
    )
    yield "Where the rows went", note, charts.heatmap("Load of the experts by layer", rows)
    yield (
        "Load imbalance",
        "The busiest expert's rows over the mean.",
        charts.lines(
            "Load of the busiest expert over the mean",
            {"max over mean": run.series("experts_load_max_over_mean")},
        ),
    )
    yield (
        "Tokens a second",
        "",
        charts.lines(
            "Tokens a second by step", {"tokens a second": run.series("tokens_per_second")}
        ),
    )


def _times(run: Run) -> Iterator[tuple[str, str, str]]:
    forward, backward = (run.mean(f"experts_{way}_ms") for way in ("forward", "backward"))
    share = run.mean("experts_time_share")
    if not (forward is not None and backward is not None and share):
        return
    step = (forward + backward) / share
    parts = {
        "experts, forward": forward,
        "experts, backward": backward,
        "everything else": max(0.0, step - forward - backward),
    }
    yield "Time of a step", "", charts.bar("Time of a step by part", parts, "ms")


def _layer(path: str) -> str:
    return path.split("layers.")[-1].partition(".")[0]


def _memory(run: Run) -> list[tuple[str, str, str]]:
    parts = run.record.memory
    least = 1e-3 * max((size for _, _, size in parts), default=0)
    return [(name, place, _gb(size)) for name, place, size in parts if size >= least]


def _totals(run: Run) -> Iterator[tuple[str, str, str]]:
    for place, places in (("host", ("host", "machine")), ("device", ("device",))):
        planned = sum(size for _, there, size in run.record.memory if there in places)
        if planned:
            yield place, _gb(planned), _gb(run.record.taken.get(place))


def _serving(run: Run) -> list[tuple[str, str]]:
    folder = shlex.quote(str(run.record.training.get("output_dir") or run.name))
    base = shlex.quote(run.record.base)
    return [
        (
            "PEFT, as it is: attention and experts in one adapter that this package reads",
            "llamafactory-cli chat recipe.yaml  # with adapter_name_or_path and the kt_sft section",
        ),
        (
            "vLLM",
            f"kt-sft export {folder} --to vllm --out {folder}-vllm\n"
            f"vllm serve {base} --enable-lora --lora-modules mine={folder}-vllm",
        ),
        ("One checkpoint, merged", f"kt-sft export {folder} --to merged --out {folder}-merged"),
    ]


def _tables(run: Run) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    record = run.record
    machine = record.experts.get("machine", {})
    section = {k: v for k, v in record.experts.items() if k != "machine"}
    for heading, values in (
        ("Settings of the experts", section),
        ("Recipe", record.recipe),
        ("Training", record.training),
        ("Machine", machine),
        ("Versions", record.versions),
    ):
        if values:
            yield heading, _rows(values)


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (key, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
        for key, value in values.items()
        if value not in (None, "", [], ())
    ]
