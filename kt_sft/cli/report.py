"""`kt-sft report`: the page of a run again, or several runs side by side."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_sft.cli.help_text import sentence
from kt_sft.errors import ReportError

if TYPE_CHECKING:
    from kt_sft.report.record import Run


def add(commands: Any) -> None:
    """Adds the command to the parser of `kt-sft`."""
    text = "draw the report of a run again, or compare runs side by side"
    report = commands.add_parser("report", help=text, description=sentence(text))
    report.set_defaults(run=run)
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run")
    report.add_argument(
        "--out", type=Path, metavar="FILE", help="default: report.html in the run, or here for more"
    )
    report.add_argument(
        "--before",
        type=Path,
        metavar="FOLDER",
        help="with --after: output_dir of a prediction without the adapter, to show some answers",
    )
    report.add_argument(
        "--after", type=Path, metavar="FOLDER", help="output_dir of a prediction with it"
    )


def _told_apart(runs: list[Run], folders: list[Path]) -> list[Run]:
    """Runs of folders with one name get the way to them."""
    names = [run.name for run in runs]
    return [
        replace(run, name=str(folder)) if names.count(run.name) > 1 else run
        for run, folder in zip(runs, folders, strict=True)
    ]


def run(arguments: argparse.Namespace) -> int:
    """Runs `kt-sft report`. Raises ReportError."""
    from kt_sft.files import durable
    from kt_sft.report.page import FILE_NAME, render
    from kt_sft.report.record import Run, read_samples

    if (arguments.before is None) != (arguments.after is None):
        raise ReportError("report: got one of --before and --after, expected both or none")
    samples = (
        read_samples(arguments.before, arguments.after) if arguments.before is not None else []
    )
    folders = [run.parent if run.is_file() else run for run in arguments.runs]
    runs = _told_apart([Run.read(folder) for folder in folders], folders)
    default = folders[0] / FILE_NAME if len(runs) == 1 else Path(FILE_NAME)
    out: Path = arguments.out or default
    try:
        durable.write_whole(out, render(runs, samples).encode())
    except OSError as error:
        raise ReportError(f"--out: {out}: {error.strerror}") from error
    sys.stdout.write(f"{out}\n")
    return 0
