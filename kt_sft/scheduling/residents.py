"""Which experts stay in an accelerator's memory: those that get the most rows.

Legend: E experts of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# An expert takes the place of a resident one where it gets so many times its rows.
_GAIN = 1.25
_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class ResidentBudget:
    """How many experts may be resident: of each layer, or bytes of all layers; neither: as many as
    the memory plan leaves room for."""

    per_layer: int | None = None
    nbytes: int | None = None

    @classmethod
    def of(cls, setting: int | str) -> ResidentBudget:
        """From `gpu_experts: 0 | auto | N | "6 GB"`. Raises ValueError."""
        most = 1 << 16
        if isinstance(setting, int) and not isinstance(setting, bool) and 0 <= setting <= most:
            return cls(per_layer=setting)
        if setting == "auto":
            return cls()
        text = str(setting).strip()
        found = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)\s*([KMG]i?B)", text, re.IGNORECASE)
        if found is None:
            raise ValueError(
                f"expected 0, auto, a number of experts per layer (at most {most}), or memory as "
                '"6 GB", "500 MB" or "6 GiB"'
            )
        nbytes = int(float(found[1]) * _UNITS[found[2].lower()])
        return cls(nbytes=nbytes) if nbytes else cls(per_layer=0)

    @property
    def decided(self) -> bool:
        """Whether it says a number by itself."""
        return self.per_layer is not None or self.nbytes is not None


def choose_residents(
    loads: Mapping[str, Sequence[float]],
    sizes: Mapping[str, int],
    budget: ResidentBudget,
    former: Mapping[str, Sequence[int]],
) -> dict[str, tuple[int, ...]]:
    """Layer -> its resident experts.

    loads: rows that each expert gets, E for every layer. sizes: bytes of one expert of a layer.
    former: those that are resident; they stay unless another gets clearly more.
    """
    there = {(path, e) for path, experts in former.items() for e in experts}

    def worth(path: str, expert: int) -> float:
        return loads[path][expert] * (_GAIN if (path, expert) in there else 1.0)

    # Rows for each byte; equal ones in the order of layers and experts.
    ranked = sorted(
        ((path, e) for path in loads for e in range(len(loads[path]))),
        key=lambda place: -worth(*place) / sizes[place[0]],
    )
    chosen: dict[str, list[int]] = {path: [] for path in loads}
    left = float("inf") if budget.nbytes is None else float(budget.nbytes)
    for path, expert in ranked:
        full = budget.per_layer is not None and len(chosen[path]) >= budget.per_layer
        if not full and sizes[path] <= left:
            chosen[path].append(expert)
            left -= sizes[path]
    return {path: tuple(sorted(experts)) for path, experts in chosen.items()}
