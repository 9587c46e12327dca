"""How many rows each expert gets: measured while a model runs, and kept beside its store.

Legend: E experts of a layer.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kt_sft.files import durable
from kt_sft.scheduling.residents import ResidentBudget

logger = logging.getLogger(__name__)

# Of a run's folder and of a checkpoint.
FILE_NAME = "kt_sft_routing.json"
_VERSION = 1
# What was counted before weighs so much after each pass: some hundred passes are remembered.
_DECAY = 0.99


@dataclass(frozen=True)
class Placement:
    """Which experts are in an accelerator's memory, layer by layer, and by which settings."""

    residents: dict[str, tuple[int, ...]] = field(default_factory=dict)
    schedule: str = "host"
    per_layer: int | None = None
    nbytes: int | None = None

    @property
    def budget(self) -> ResidentBudget:
        """How many there may be."""
        return ResidentBudget(self.per_layer, self.nbytes)

    @classmethod
    def of(cls, values: Mapping[str, Any], experts: Mapping[str, int]) -> Placement:
        """From JSON, of layers with so many experts each. Raises ValueError and TypeError."""
        found = {}
        for name, count in experts.items():
            chosen = [int(e) for e in values.get("residents", {}).get(name, ())]
            if all(0 <= e < count for e in chosen):
                found[name] = tuple(sorted({*chosen}))
        numbers = (values.get(name) for name in ("per_layer", "nbytes"))
        per_layer, nbytes = (None if n is None else int(n) for n in numbers)
        return cls(found, str(values.get("schedule", "host")), per_layer, nbytes)


class RoutingProfile:
    """Rows of every expert, layer by layer, the latest passes counting most."""

    def __init__(self) -> None:
        self.passes = 0
        self._rows: dict[str, list[float]] = {}

    def record(self, path: str, rows: Sequence[int]) -> None:
        """One pass through a layer."""
        known = self._rows.get(path)
        if known is None or len(known) != len(rows):
            self._rows[path] = [float(n) for n in rows]
        else:
            self._rows[path] = [_DECAY * a + n for a, n in zip(known, rows, strict=True)]
        self.passes += 1

    def shares(self) -> dict[str, list[float]]:
        """Layer -> the part of its rows that each expert gets, [E]; layers without rows are not
        there."""
        totals = {path: sum(rows) for path, rows in self._rows.items()}
        return {
            path: [n / totals[path] for n in rows]
            for path, rows in self._rows.items()
            if totals[path]
        }

    def save(self, path: Path, placement: Placement | None = None) -> None:
        """As JSON, with the places that experts have; the file appears whole. Raises OSError."""
        durable.write_whole(path, self.text(placement).encode())

    def text(self, placement: Placement | None = None) -> str:
        """The content of the file."""
        content: dict[str, Any] = {"version": _VERSION, "passes": self.passes, "rows": self._rows}
        if placement is not None:
            content["placement"] = asdict(placement)
        return json.dumps(content)

    @classmethod
    def load(cls, path: Path, experts: Mapping[str, int]) -> tuple[RoutingProfile, Placement]:
        """What was saved, of layers with so many experts each; what does not fit is left out, with
        a warning. Raises OSError."""
        profile = cls()
        try:
            found = json.loads(path.read_text())
            if found["version"] != _VERSION:
                raise ValueError(f"version {found['version']}, expected {_VERSION}")
            placement = Placement.of(found.get("placement", {}), experts)
            for name, count in experts.items():
                rows = [float(n) for n in found["rows"].get(name, ())]
                if len(rows) == count and all(math.isfinite(n) and n >= 0 for n in rows):
                    profile._rows[name] = rows
            profile.passes = int(found["passes"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            logger.warning("%s: is no routing profile (%s) and is left out", path, error)
            return cls(), Placement()
        if found["rows"] and len(profile._rows) < len(experts):
            known, layers = len(profile._rows), len(experts)
            logger.warning("%s: fits %d of the model's %d layers", path, known, layers)
        return profile, placement


def layers_of(path: Path) -> dict[str, int]:
    """The layers that a file speaks of, and their experts; none for one that is damaged."""
    try:
        return {str(name): len(rows) for name, rows in json.loads(path.read_text())["rows"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
