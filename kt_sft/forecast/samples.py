"""How many samples an epoch of a recipe has, where its datasets are files here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LARGEST = 512 << 20
_INFO = "dataset_info.json"


def samples_of(recipe: Mapping[str, Any]) -> int | None:
    """Of all datasets that LLaMA-Factory's dataset_info.json names; None where one is elsewhere."""
    folder = Path(str(recipe.get("dataset_dir", "data")))
    names = recipe.get("dataset")
    names = names.split(",") if isinstance(names, str) else names
    if not names or recipe.get("streaming"):
        return None
    try:
        known = json.loads((folder / _INFO).read_text())
        counts = [_count(folder / known[str(name).strip()]["file_name"]) for name in names]
        most = int(recipe.get("max_samples") or max(counts))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sum(min(count, most) for count in counts)


def _count(file: Path) -> int:
    """Raises OSError, ValueError."""
    if file.stat().st_size > _LARGEST:
        raise ValueError(f"{file}: too large to be counted")
    if file.suffix == ".jsonl":
        with file.open() as lines:
            return sum(bool(line.strip()) for line in lines)
    return len(json.loads(file.read_text()))
