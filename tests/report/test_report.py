"""`report.html`: what it holds, and how it looks in a browser; `kt-sft report`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest

from kt_sft.cli import main
from kt_sft.errors import ReportError
from kt_sft.report import charts
from kt_sft.report.page import render
from kt_sft.report.record import ANSWERS_NAME, STATE_NAME, Run, RunRecord, read_samples
from kt_sft.scheduling.profile import RoutingProfile

HISTORY = [
    {
        "step": step, "loss": 3.0 / step, "tokens_per_second": 100.0 + step,
        "experts_forward_ms": 200.0, "experts_backward_ms": 300.0, "experts_time_share": 0.5,
        "experts_load_max_over_mean": 2.0,
    }
    for step in range(1, 31)
]  # fmt: skip


def record(**changes: Any) -> RunRecord:
    values: dict[str, Any] = {
        "base": "models/<Tiny & Small>", "training": {"learning_rate": 1e-4, "seed": 7},
        "experts": {
            "weights": "int8", "compute": "exact", "threads": 2, "isa": "avx2", "layers": 3,
            "experts_per_layer": 8, "machine": {"cpu": "a CPU", "accelerator": None},
        },
        "memory": [("routed experts", "machine", 3_000_000_000), ("other", "device", 9_000_000)],
        "taken": {"host": 2_900_000_000}, "versions": {"torch": "2.11"}, "seconds": 3700.0,
        "ended": "2026-11-30T10:00:00+00:00", "history": HISTORY,
    }  # fmt: skip
    return RunRecord(**{**values, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run that has ended."""
    run = tmp_path / "run"
    run.mkdir()
    record().save(run)
    profile = RoutingProfile()
    for layer in (0, 11):
        profile.record(f"model.layers.{layer}.mlp.experts", [8, 0, 4, 0, 0, 0, 2, 2])
    profile.save(run / "kt_sft_routing.json")
    return run


def page_of(folder: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["report", str(folder), *words]) == 0
    return Path(capsys.readouterr().out.strip()).read_text()


def test_a_page_says_what_a_run_was(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = page_of(folder, capsys=capsys)
    for text in (
        "&lt;Tiny &amp; Small&gt;: run", "1 h 1 min", "3.00 GB, taken 2.90 GB", "2.90 GB",
        "everything else: 500 ms (50%)", "layer 11, expert 0: 4.00 times the mean",
        "vllm serve", "kt-sft export run --to merged", "learning_rate", "no accelerator",
    ):  # fmt: skip
        assert text in page, text
    assert "None" not in page and ">nan" not in page
    # Nothing is asked of a network.
    assert not re.search(r"(?:src|href)=|url\(|@import|<script", page)
    assert len(page) < 200_000


def test_answers_before_and_after(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [{"prompt": f"question {i}", "label": f"wanted {i}"} for i in range(12)]
    for name, answer in (("before", "<b>no</b>"), ("after", "yes")):
        (folder.parent / name).mkdir()
        rows = [{**row, "predict": answer if i else "same"} for i, row in enumerate(asked)]
        text = "\n".join(map(json.dumps, rows))
        (folder.parent / name / ANSWERS_NAME).write_text(text)
    before, after = (str(folder.parent / name) for name in ("before", "after"))
    page = page_of(folder, "--before", before, "--after", after, capsys=capsys)
    assert "&lt;b&gt;no&lt;/b&gt;" in page and "wanted 1" in page
    assert "question 0" not in page, "what did not change is not shown"
    assert page.count("<b>after</b>") == 8
    rows = [json.dumps({"prompt": "other", "predict": "", "label": ""})]
    (folder.parent / "after" / ANSWERS_NAME).write_text("\n".join(rows))
    with pytest.raises(ReportError, match="are answers to different questions"):
        read_samples(Path(before), Path(after))


def test_runs_side_by_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = folder.parent / "other"
    other.mkdir()
    slower = [{**entry, "tokens_per_second": 50.0} for entry in HISTORY]
    record(training={"learning_rate": 3e-4, "seed": 7}, history=slower).save(other)
    out = folder.parent / "both.html"
    page = page_of(folder, str(other), "--out", str(out), capsys=capsys)
    cells = dict(re.findall(r"<tr><td>([^<]+)</td>(.*?)</tr>", page))
    assert re.findall(r">([^<]+)</td>", cells["tokens a second"]) == ["116", "50"]
    assert "learning_rate" in cells and "seed" not in cells, "what differs is shown"
    assert "device memory taken" not in cells, "what no run has is not"


def test_the_log_after_the_training_counts(folder: Path) -> None:
    later = [*HISTORY, {"step": 30, "eval_loss": 0.25}]
    (folder / STATE_NAME).write_text(json.dumps({"log_history": later}))
    assert Run.read(folder).last("eval_loss") == 0.25


def test_what_cannot_be_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert main(["report", *words]) == 2
        return capsys.readouterr().err

    assert "writes it when it ends" in refused(str(folder.parent))
    assert "got one of --before and --after" in refused(str(folder), "--before", "x")
    assert "do_predict" in refused(str(folder), "--before", "x", "--after", "y")
    assert "--out: /no/where" in refused(str(folder), "--out", "/no/where/x.html")
    file = folder / "kt_sft_run.json"
    for damage in ("{", "[]", '{"version": 1}', '{"version": 9}'):
        file.write_text(damage)
        assert "kt_sft_run.json" in refused(str(folder))


def test_curves_stay_within_their_frame() -> None:
    series = {"a": [(1.0, 5.0), (2.0, float("nan")), (3.0, -2.0)], "empty": []}
    drawn = charts.lines("a title", series)
    xs = [float(x) for x in re.findall(r'cx="([\d.]+)"', drawn)]
    ys = [float(y) for y in re.findall(r'cy="([\d.]+)"', drawn)]
    assert len(xs) == 2 and xs[0] < xs[1] and ys[0] < ys[1], "up is up"
    assert all(58 <= x <= 708 for x in xs) and all(12 <= y <= 226 for y in ys)
    assert "nan" not in drawn and "empty" not in drawn
    assert charts.lines("a", {"b": []}) == charts.heatmap("a", {}) == charts.bar("a", {}, "s") == ""
    assert "polyline" in charts.lines("one", {"b": [(1.0, 1.0)]})


def test_smoothing_keeps_a_constant() -> None:
    assert charts.smooth([(float(i), 2.0) for i in range(50)])[-1] == (49.0, 2.0)


def test_many_experts_share_cells() -> None:
    drawn = charts.heatmap("load", {"0": [1 / 384] * 384})
    assert drawn.count('class="heat"') == 128 and "experts 0" not in drawn
    assert "expert 381 to 383: 1.00 times the mean" in drawn


def _luminance(color: str) -> float:
    def part(value: float) -> float:
        return value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4

    red, green, blue = (part(int(n) / 255) for n in re.findall(r"\d+", color)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.fixture(scope="module")
def tab() -> Iterator[browser.Page]:
    with browser.open_page() as page:
        yield page


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(
    width: int, dark: bool, folder: Path, tab: browser.Page, capsys: pytest.CaptureFixture[str]
) -> None:
    page_of(folder, capsys=capsys)
    tab.show(folder / "report.html", width, 900, dark=dark)
    assert tab.problems == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
    # Every chart is there, with a size, within the page.
    boxes = tab.evaluate(
        "[...document.querySelectorAll('svg')].map(s => [s.getBoundingClientRect().left, "
        "s.getBoundingClientRect().right, s.getBoundingClientRect().height])"
    )
    assert len(boxes) == 5
    assert all(0 <= left < right <= width and height > 5 for left, right, height in boxes)
    colors = tab.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    text, background = map(_luminance, colors)
    assert (text > background) == dark
    light, less = max(text, background), min(text, background)
    assert (light + 0.05) / (less + 0.05) > 7, "the text can be read"
    headings = tab.evaluate("[...document.querySelectorAll('h2')].map(h => h.innerText)")
    assert headings[:3] == ["Loss", "Time of a step", "Where the rows went"]
    assert tab.picture().startswith(b"\x89PNG")


def test_a_page_without_a_log() -> None:
    run = Run("run", record(history=(), memory=(), taken={}), (), {})
    page = render([run])
    assert "Loss by step" not in page and "Memory" not in page


def test_runs_of_one_name_are_told_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twin = folder.parent / "other" / "run"
    twin.mkdir(parents=True)
    record().save(twin)
    page = page_of(folder, str(twin), "--out", str(folder / "x.html"), capsys=capsys)
    loss = page.partition("<h2>Loss</h2>")[2].partition("<h2>")[0]
    assert loss.count("<polyline") == 2


def test_many_runs_have_colours(folder: Path) -> None:
    runs = [Run(f"run {i}", record(), HISTORY, {}) for i in range(7)]
    assert set(re.findall(r"series-(\d+)", render(runs))) == set("01234")


def test_absurd_numbers_are_left_out() -> None:
    drawn = charts.lines("loss", {"a": [(1.0, 1e308), (2.0, -1e308), (3.0, 1.0), (4.0, 2.0)]})
    assert drawn.count("<circle") == 2


def test_answers_may_hold_any_character(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, answer in (("before", "a\u2028b"), ("after", "c\u0085d")):
        (folder.parent / name).mkdir()
        row = json.dumps({"prompt": "q", "predict": answer, "label": "w"}, ensure_ascii=False)
        (folder.parent / name / ANSWERS_NAME).write_text(row + "\n", "utf-8")
    before, after = (str(folder.parent / name) for name in ("before", "after"))
    assert "wanted: w" in page_of(folder, "--before", before, "--after", after, capsys=capsys)


@pytest.mark.parametrize("name", ["history", "experts", "taken", "seconds", "memory"])
def test_a_damaged_record_is_named(name: str, folder: Path) -> None:
    found = json.loads((folder / "kt_sft_run.json").read_text())
    (folder / "kt_sft_run.json").write_text(json.dumps({**found, name: [1, "x"]}))
    with pytest.raises(ReportError, match="is damaged"):
        Run.read(folder)


def test_commands_can_be_copied_whatever_the_names() -> None:
    run = Run("my run", record(base="a; rm -rf b"), HISTORY, {})
    page = render([run])
    assert "kt-sft export &#39;my run&#39;" in page and "serve &#39;a; rm -rf b&#39;" in page
