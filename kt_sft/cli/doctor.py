"""`kt-sft doctor`: what this machine and this installation can do, tried out."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from kt_sft.cli.help_text import sentence
from kt_sft.cli.quiet import only_results

if TYPE_CHECKING:
    from kt_sft.doctor.findings import Finding

_MARKS = {"ok": " ", "note": " ", "warning": "!", "problem": "X"}
_CLOSING = {
    0: "everything works",
    1: "kt_sft works here; see the lines with !",
    2: "kt_sft does not work here; see the lines with X",
}
_NAME, _WIDTH = 20, 100


def add(commands: Any) -> None:
    """Adds the command to the parser of `kt-sft`."""
    text = (
        "look at this machine and this installation, try the kernels and a training step, and say "
        "what is wrong (exit status 0: nothing, 1: it works with a warning, 2: it does not work)"
    )
    doctor = commands.add_parser(
        "doctor",
        help="try out this machine and this installation, and say what is wrong",
        description=sentence(text),
    )
    doctor.add_argument("--json", action="store_true", help="print what was found as JSON")
    doctor.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs `kt-sft doctor`."""
    from kt_sft.doctor.findings import exit_status

    start = time.perf_counter()
    found: list[Finding] = []
    out, section = sys.stdout, ""
    with only_results():
        for finding in _examine():
            found.append(finding)
            if arguments.json:
                continue
            if finding.section != section:
                section = finding.section
                out.write(f"{section}\n")
            out.writelines(f"{line}\n" for line in _lines(finding))
            out.flush()
    status = exit_status(found)
    if arguments.json:
        document = {"status": status, "findings": [f.as_dict() for f in found]}
        out.write(json.dumps(document, indent=1) + "\n")
    else:
        out.write(f"\n{_CLOSING[status]} ({time.perf_counter() - start:.0f} s)\n")
    return status


def _lines(finding: Finding) -> Iterator[str]:
    margin = " " * (_NAME + 3)
    head = f"{_MARKS[finding.level]} {finding.name:<{_NAME}} "
    yield from _wrapped(head + finding.value, margin)
    if finding.hint:
        yield from _wrapped(f"{margin}-> {finding.hint}", f"{margin}   ")


def _wrapped(text: str, margin: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _examine() -> Iterator[Finding]:
    from kt_sft.doctor import installation

    yield from installation.packages()
    yield from installation.plugin()
    try:
        from kt_sft.doctor import accelerators, host, trials
    except ImportError as error:
        from kt_sft.doctor.findings import PROBLEM, Finding

        yield Finding(
            "tried",
            "kernels",
            f"do not load: {error}",
            PROBLEM,
            "install kt_sft again with this Python: pip install --force-reinstall --no-deps kt_sft "
            "(in a clone: make install)",
        )
        return
    parts: Iterable[Callable[[], Iterator[Finding]]] = (
        host.cpus,
        host.memory,
        host.disk,
        host.speed,
        host.instruction_sets,
        accelerators.accelerators,
        trials.kernels,
        trials.training_step,
        installation.patches,
    )
    for part in parts:
        yield from _survived(part)


def _survived(part: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a part finds; what ends it is a finding, too."""
    from kt_sft.doctor.findings import PROBLEM, Finding

    try:
        yield from part()
    except Exception as error:  # a machine that is not well is what this is asked about
        said = (str(error).splitlines() or [""])[0]
        yield Finding(
            "tried",
            part.__name__.replace("_", " "),
            f"ended with {type(error).__name__}: {said}",
            PROBLEM,
            "look whether other programs hold the memory of the machine or of the accelerator",
        )
