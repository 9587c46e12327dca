"""What was found: one line each, how bad it is, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "problem"
# Exit status of the command by the worst level.
STATUS = {OK: 0, NOTE: 0, WARNING: 1, PROBLEM: 2}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    value: what it is, for people. level: ok; note (as it is, nothing to do); warning (kt_sft works,
    slower or untested); problem (it does not work). hint: what to do about the last two. data: the
    same as `value` for programs, in the units that its keys name.
    """

    section: str
    name: str
    value: str
    level: str = OK
    hint: str = ""
    data: Any = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def exit_status(findings: Iterable[Finding]) -> int:
    """0: everything works; 1: it works, with a warning; 2: something does not work."""
    return max((STATUS[f.level] for f in findings), default=0)
