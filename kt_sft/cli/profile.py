"""`kt-sft profile`: which experts get how many rows, as a run has measured it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kt_sft.cli.help_text import sentence
from kt_sft.cli.recipe_file import read_recipe
from kt_sft.errors import SettingsError

_SHADES = " ░▒▓█"
_COVERED = (0.125, 0.25, 0.5)


def add(commands: Any) -> None:
    """Adds the command to the parser of `kt-sft`."""
    text = "print and draw which experts get how many rows, as a training has measured it"
    profile = commands.add_parser("profile", help=text, description=sentence(text))
    profile.set_defaults(run=run)
    profile.add_argument(
        "source",
        metavar="RECIPE",
        help="a recipe that has been trained, the folder of its run or of a checkpoint, or a "
        "kt_sft_routing.json",
    )
    profile.add_argument("--width", type=int, default=100, help="columns of the drawing")


def run(arguments: argparse.Namespace) -> int:
    """Runs `kt-sft profile`. Raises KtSftError, FileNotFoundError."""
    file = _file(Path(arguments.source))
    shares, residents = _read(file)
    sys.stdout.writelines(f"{line}\n" for line in _lines(file, shares, residents, arguments.width))
    return 0


def _file(source: Path) -> Path:
    from kt_sft.scheduling.profile import FILE_NAME

    if source.suffix in (".yaml", ".yml"):
        source = Path(str(read_recipe(str(source), []).get("output_dir", "")))
    file = source
    if source.is_dir() or not source.suffix:
        ranks = sorted(source.glob(f"{Path(FILE_NAME).stem}_*.json"))
        file = next((f for f in (source / FILE_NAME, *ranks) if f.is_file()), source / FILE_NAME)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not there; a training writes it when it ends")
    return file


def _read(file: Path) -> tuple[dict[str, list[float]], Mapping[str, Sequence[int]]]:
    from kt_sft.scheduling.profile import RoutingProfile, layers_of

    profile, placement = RoutingProfile.load(file, layers_of(file))
    shares = profile.shares()
    if not shares:
        raise SettingsError(f"{file}: holds no rows of any layer")
    return shares, placement.residents


def _lines(
    file: Path,
    shares: Mapping[str, Sequence[float]],
    residents: Mapping[str, Sequence[int]],
    width: int,
) -> Iterator[str]:
    names = [path.split(".layers.")[-1].partition(".")[0] for path in shares]
    room = max(map(len, names))
    parts = " ".join(f"{f'top {part:.1%}':>10}" for part in _COVERED)
    yield f"{file}: {len(shares)} layers; part of the rows that so many of the experts get"
    yield f"{'layer':<{max(5, room)}} {parts} {'max/mean':>9} {'resident':>9}"
    for name, path in zip(names, shares, strict=True):
        row = sorted(shares[path], reverse=True)
        covered = (sum(row[: max(1, round(part * len(row)))]) for part in _COVERED)
        there = sum(shares[path][e] for e in residents.get(path, ()))
        yield (
            f"{name:<{max(5, room)}} {' '.join(f'{c:>10.1%}' for c in covered)} "
            f"{row[0] * len(row):>9.2f} {there:>9.1%}"
        )
    yield ""
    yield "each layer's experts, the busiest of a layer is dark:"
    for name, path in zip(names, shares, strict=True):
        yield f"{name:>{room}} {_drawn(shares[path], max(8, width - room - 1))}"


def _drawn(row: Sequence[float], width: int) -> str:
    """One character for each expert, or for some of them side by side: the busiest counts."""
    step = -(-len(row) // width)
    cells = [max(row[i : i + step]) for i in range(0, len(row), step)]
    most = max(cells)
    return "".join(_SHADES[round((len(_SHADES) - 1) * cell / most)] for cell in cells)
