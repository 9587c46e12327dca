"""The house: who may import whom, and that planted faults find what they change."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import kt_sft

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kt_sft"

# From the ground up. A module imports from its own room and from floors below, never from beside.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("patches", "machine", "files"),
    ("kernels",),
    ("scheduling", "device"),
    ("config", "families", "adapters", "store", "report"),
    ("engines", "checkpoint"),
    ("experts", "export"),
    ("planning",),
    ("loading",),
    ("bench", "doctor"),
    ("training",),
    ("plugin",),
    ("forecast",),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules(package: Path) -> dict[str, Path]:
    """Dotted name below the package -> file; a room's __init__ is the room's name."""
    found = {}
    for file in package.rglob("*.py"):
        parts = file.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of ours that a file imports, those inside of functions and for types included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            owner, _, module = node.module.partition(".")
            if owner == "kt_sft":
                for alias in node.names:
                    inner = f"{module}.{alias.name}".lstrip(".")
                    # The root's names are imported on first use, from where they are.
                    public = kt_sft._PUBLIC.get(alias.name, "") if not module else ""
                    yield inner if inner in known else public.removeprefix("kt_sft.") or module
        elif isinstance(node, ast.Import):
            yield from (
                a.name.removeprefix("kt_sft.") for a in node.names if a.name.startswith("kt_sft.")
            )
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: relative import"


def upward(package: Path) -> list[str]:
    """Imports that do not go down, as "module -> module"."""
    known = modules(package)
    wrong = []
    for name, file in known.items():
        room = name.partition(".")[0]
        for other in imports(file, known):
            target = other.partition(".")[0]
            # The version, which is all that else is in the root, is for all.
            if target not in ("", room) and FLOOR[target] >= FLOOR[room]:
                wrong.append(f"{name} -> {other}")
    return sorted(wrong)


def circles(package: Path) -> list[str]:
    """Modules that import each other, however far around."""
    known = modules(package)
    graph = {name: set(imports(file, known)) - {name} for name, file in known.items()}
    done: set[str] = set()
    found: list[str] = []

    def walk(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            found.append(" -> ".join((*path[path.index(name) :], name)))
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                walk(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        walk(name, ())
    return found


def test_imports_go_down() -> None:
    assert upward(PACKAGE) == []


def test_nothing_goes_in_a_circle() -> None:
    assert circles(PACKAGE) == []


def test_every_room_has_a_floor_and_says_what_it_is_for() -> None:
    rooms = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    loose = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"}
    assert rooms | loose == set(FLOOR)
    for room in rooms:
        says = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
        assert says and re.search(r"\bFor ", says), f"{room}: say why it exists and for whom"


def test_the_documentation_shows_the_rooms() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    named = set(re.findall(r"^\| `(\w+)(?:/|\.py)`", text, re.MULTILINE))
    assert named == set(FLOOR)


@pytest.mark.parametrize(
    ("file", "text", "finds"),
    [
        ("machine/cpus.py", "from kt_sft.kernels import Gate", "machine.cpus -> kernels"),
        ("machine/cpus.py", "def f():\n    import kt_sft.cli.main", "machine.cpus -> cli.main"),
        ("files/durable.py", "from kt_sft.machine import cpus", "files.durable -> machine.cpus"),
        ("machine/cpus.py", "from kt_sft import hybridize", "machine.cpus -> loading"),
    ],
    ids=["up", "up and lazy", "beside", "by a public name"],
)
def test_an_upward_import_is_found(tmp_path: Path, file: str, text: str, finds: str) -> None:
    for name in ("machine/cpus.py", "files/durable.py", "kernels/__init__.py", "cli/main.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / file).write_text(text)
    assert upward(tmp_path) == [finds]


def test_a_circle_is_found(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.py").write_text(f"def f():\n    from kt_sft import {other}\n")
    assert circles(tmp_path) == ["a -> b -> c -> a"]


def test_every_fault_can_be_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault whose text has changed tests nothing any more."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    for fault in importlib.import_module("mutation_check").FAULTS:
        text = (ROOT / fault.file).read_text()
        assert text.count(fault.old) == 1, (
            f"{fault.name}: {fault.file} has it {text.count(fault.old)} times"
        )
        for test in fault.tests:
            file, _, name = test.partition("::")
            assert (ROOT / file).exists(), test
            assert not name or f"def {name}(" in (ROOT / file).read_text(), test
