"""The pages of the documentation as the tests read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def fences(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of every fenced block."""
    yield from _FENCE.findall(page.read_text())


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def commands(page: Path) -> Iterator[str]:
    """Every command of kt-sft, llamafactory-cli, make and python scripts: in blocks a line each,
    and in prose what stands in one pair of backticks."""
    lines = [line for _, text in fences(page) for line in text.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", prose(page))
    for line in lines:
        words = re.sub(r"\s#.*$", "", line.strip().removeprefix("$ "))
        words = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", words)
        if re.match(r"(?:kt-sft|llamafactory-cli|make) |python scripts/\S+", words):
            yield words


def anchors(page: Path) -> set[str]:
    """What headings are linked by, as GitHub and MkDocs make them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w -]", "", plain).strip().replace(" ", "-"))
    return found


def links(page: Path) -> Iterator[str]:
    """The targets of every link that is not of the web."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"https?:|mailto:", target):
            yield target
