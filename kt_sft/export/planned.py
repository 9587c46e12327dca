"""The adapter that a recipe would make, so that a program's limits are known before it trains."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from kt_sft.errors import SettingsError
from kt_sft.export.base import Base
from kt_sft.export.fused import Slot
from kt_sft.export.programs import PROGRAMS, limits


@dataclass(frozen=True)
class PlannedAdapter:
    """What a recipe says of its adapter.

    means: whether a module at a path gets LoRA. trained: names of modules trained in full.
    """

    base: Base
    rank: int
    means: Callable[[str], bool]
    trained: Collection[str] = ()
    expert_lora: bool = True
    full: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        modules = self.base.model.modules
        found = {m: "" for m in modules if m.rpartition(".")[2] in self.trained}
        object.__setattr__(self, "full", found)

    @cached_property
    def linear_modules(self) -> list[str]:
        """Modules with LoRA beside the experts."""
        inside = tuple(f"{path}." for path in self.base.layers)
        linear = self.base.model.linear
        return [m for m in linear if self.means(m) and not m.startswith(inside)]

    def ranks(self) -> dict[str, int]:
        """As of an adapter that is there."""
        experts = [
            f"{path}.{projection}"
            for path, layer in self.base.layers.items()
            for projection in layer.shape.projections
            if self.expert_lora and self.means(f"{path}.{projection}")
        ]
        return dict.fromkeys([*experts, *self.linear_modules], self.rank)

    def undivided(self, slot: Slot) -> bool:
        """Ours never are."""
        return False


def refuse_unread(adapter: PlannedAdapter, programs: Collection[str]) -> None:
    """Raises SettingsError that lists what the programs could not read of a recipe's adapter."""
    problems = [
        f"{name}: {problem.replace('use --to ', 'use ')}"
        for name in programs
        if name in PROGRAMS
        for problem in limits(PROGRAMS[name], adapter)
    ]
    if problems:
        raise SettingsError(
            "export_for: the recipe makes an adapter that cannot be read by what is named there\n"
            + "\n".join(f"  - {p}" for p in problems)
        )


def local_base(folder: str | Path) -> Base | None:
    """The base of a recipe where it is on the disk already."""
    return Base.open(folder) if Path(folder).is_dir() else None
