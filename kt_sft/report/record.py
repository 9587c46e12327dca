"""The files of a run that tell what it was, and reading them back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kt_sft.errors import ReportError
from kt_sft.files import durable
from kt_sft.scheduling import profile

FILE_NAME = "kt_sft_run.json"
STATE_NAME = "trainer_state.json"
ANSWERS_NAME = "generated_predictions.jsonl"
_VERSION = 1
_MAPPINGS = ("training", "experts", "taken", "versions", "recipe")
_MOST_ANSWERS, _LONGEST = 8, 400
# Lines of a chat template that say who speaks.
_ROLES = ("system", "user", "assistant", "model")


@dataclass(frozen=True)
class RunRecord:
    """What a run notes of itself when it ends.

    base: path or name of the model. training: the Trainer's arguments that matter. experts: the
    resolved section, the engine and the machine. memory: (name, place, bytes) of the plan. taken:
    bytes at most, "host" beyond what the process had before the model, and "device". versions: of
    packages. seconds: of the training. history: the Trainer's log. steps: that were taken. recipe:
    of LLaMA-Factory, if one was run.
    """

    base: str
    training: Mapping[str, Any]
    experts: Mapping[str, Any]
    memory: Sequence[tuple[str, str, int]] = ()
    taken: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    ended: str = ""
    history: Sequence[Mapping[str, Any]] = ()
    steps: int = 0
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Beside the adapter. Raises OSError."""
        text = json.dumps({"version": _VERSION, **asdict(self)}, indent=1, default=str)
        durable.write_whole(folder / FILE_NAME, text.encode())

    @classmethod
    def load(cls, folder: Path) -> RunRecord:
        """Raises ReportError."""
        found = _json(folder / FILE_NAME)
        if found.pop("version", None) != _VERSION:
            raise ReportError(f"{folder / FILE_NAME}: is of another release; train again")
        try:
            found["memory"] = [(str(n), str(p), int(b)) for n, p, b in found.get("memory", ())]
            found["seconds"] = float(found.get("seconds", 0.0))
            mappings = *(found.get(n, {}) for n in _MAPPINGS), *found.get("history", ())
            if not all(isinstance(value, dict) for value in mappings):
                raise ValueError(f"expected objects in {', '.join((*_MAPPINGS, 'history'))}")
            return cls(**found)
        except (TypeError, ValueError) as error:
            raise ReportError(f"{folder / FILE_NAME}: is damaged: {error}") from error


@dataclass(frozen=True)
class Run:
    """All that a report shows. history: the Trainer's log. shares: layer -> part of its rows that
    each expert got."""

    name: str
    record: RunRecord
    history: Sequence[Mapping[str, Any]]
    shares: Mapping[str, Sequence[float]]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """From the folder of a run that has ended. Raises ReportError."""
        record = RunRecord.load(folder)
        history = record.history
        if (folder / STATE_NAME).is_file():  # which has the evaluation after a training, too
            later = _json(folder / STATE_NAME).get("log_history")
            history = later if isinstance(later, list) and len(later) > len(history) else history
        return cls(folder.resolve().name, record, history, read_shares(folder / profile.FILE_NAME))

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of everything that was logged by a name."""
        return [
            (float(entry["step"]), float(entry[name]))
            for entry in self.history
            if isinstance(entry.get(name), int | float) and isinstance(entry.get("step"), int)
        ]

    def last(self, name: str) -> float | None:
        """The last value of a name."""
        found = self.series(name)
        return found[-1][1] if found else None

    def mean(self, name: str) -> float | None:
        """Over the log, without its first entry where there are more: that one warms up."""
        values = [value for _, value in self.series(name)]
        values = values[1:] or values
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Sample:
    """One question, and what the model said before and after."""

    question: str
    before: str
    after: str
    wanted: str


def read_shares(file: Path) -> dict[str, list[float]]:
    """Of a routing profile; empty where there is none."""
    if not file.is_file():
        return {}
    found, _ = profile.RoutingProfile.load(file, profile.layers_of(file))
    return found.shares()


def read_samples(before: Path, after: Path) -> list[Sample]:
    """From the folders of two predictions of the same questions. Raises ReportError."""
    first, second = (_answers(folder) for folder in (before, after))
    if [row["prompt"] for row in first] != [row["prompt"] for row in second]:
        raise ReportError(f"{before} and {after}: are answers to different questions")
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    return [
        Sample(_question(a["prompt"]), a["predict"], b["predict"], a["label"])
        for a, b in pairs[:_MOST_ANSWERS]
    ]


def _question(prompt: str) -> str:
    """A prompt without the marks of its chat template, from its end as far as people read."""
    lines = re.sub(r"<\|[^|>]*\|>|<s>|</s>", "\n", prompt).splitlines()
    words = "\n".join(line for line in lines if line.strip() and line.strip() not in _ROLES)
    return words if len(words) <= _LONGEST else f"... {words[-_LONGEST:]}"


def _answers(folder: Path) -> list[dict[str, str]]:
    file = folder / ANSWERS_NAME if folder.is_dir() else folder
    try:
        # Not splitlines: answers may hold what else ends a line of text.
        lines = file.read_text("utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
        return [{key: str(row[key]) for key in ("prompt", "predict", "label")} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(
            f"{file}: cannot be read as the answers of a prediction ({error}); a recipe with "
            "do_predict and predict_with_generate writes them"
        ) from error


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ReportError(
            f"{file}: not there; a training with hybrid experts writes it when it ends"
        ) from error
    except (OSError, ValueError) as error:
        raise ReportError(f"{file}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ReportError(f"{file}: got {type(found).__name__}, expected an object")
    return found
