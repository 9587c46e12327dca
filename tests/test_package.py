"""The package as a stranger gets it: dependencies, version, contents, what its build refuses."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import kt_sft
from kt_sft.config import read_section, shipped_folder

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Where a distribution's name is not that of its module.
_DISTRIBUTIONS = {"yaml": "pyyaml"}
# Imports that only a part of the package makes: module -> extra that brings it.
_OPTIONAL = {
    "llamafactory": "llamafactory",
    "huggingface_hub": "llamafactory",
    "matplotlib": "bench",
}
# In an environment of its own, made by the user for a measurement.
_PEERS = {"kt_kernel"}


def imported() -> Iterator[str]:
    for file in (ROOT / "kt_sft_autoload.py", *(ROOT / "kt_sft").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~ ]", r)[0].lower() for r in requirements}


def test_declared_is_imported() -> None:
    own = {"kt_sft", "kt_sft_autoload", *sys.stdlib_module_names}
    found = {n for n in imported() if n not in own} - _PEERS
    needed = {_DISTRIBUTIONS.get(n, n) for n in found - set(_OPTIONAL)}
    assert needed == names(PROJECT["dependencies"])
    for module, extra in _OPTIONAL.items():
        assert module in found
        assert module in names(PROJECT["optional-dependencies"][extra])


def test_the_tested_set_is_within_what_is_declared() -> None:
    from packaging.requirements import Requirement

    pins = dict(
        line.lower().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    extras = PROJECT["optional-dependencies"].values()
    every = [*PROJECT["dependencies"], *(r for extra in extras for r in extra)]
    checked = 0
    for requirement in map(Requirement, every):
        version = pins.get(requirement.name.lower())
        if version is not None:
            assert requirement.specifier.contains(version.split(" ")[0]), requirement
            checked += 1
    assert checked > 12


def test_one_source_of_the_version() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", kt_sft.__version__)


def test_sources_list_what_a_build_needs() -> None:
    manifest = (ROOT / "MANIFEST.in").read_text()
    for name in ("csrc", "recipes", "configs", "docs", "tests", "LICENSE", "kt_sft_autoload.py"):
        assert re.search(rf"\b{re.escape(name)}\b", manifest), name
        assert (ROOT / name).exists()


def test_settings_that_come_with_the_package_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_section("configs/experts_bf16.yaml").weights == "bf16"
    recipes = sorted((shipped_folder() / "recipes").glob("*.yaml"))
    assert len(recipes) >= 6


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py, which builds nothing when it is imported."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        spec = importlib.util.spec_from_file_location("setup_of_kt_sft", ROOT / "setup.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        os.chdir(before)
    return module


@pytest.mark.parametrize(
    ("system", "machine"), [("darwin", "arm64"), ("linux", "aarch64"), ("win32", "AMD64")]
)
def test_other_machines_are_told(build: ModuleType, system: str, machine: str) -> None:
    build.refuse_other_machines("linux", "x86_64")
    with pytest.raises(SystemExit, match=rf"got {system} on {machine}, expected Linux on x86-64"):
        build.refuse_other_machines(system, machine)


def test_old_compilers_are_told(build: ModuleType, tmp_path: Path) -> None:
    """A g++ that does not know one of the flags, as gcc 10 does not."""
    from setuptools._distutils.ccompiler import new_compiler

    compiler = new_compiler()
    build.refuse_old_compilers(compiler)
    old = tmp_path / "g++"
    old.write_text(
        '#!/bin/sh\ncase "$*" in *-mavxvnni*) echo "unrecognized option" >&2; exit 1;; esac\n'
        'exec g++ "$@"\n'
    )
    old.chmod(0o755)
    for name in ("compiler", "compiler_so", "compiler_cxx", "compiler_so_cxx"):
        if hasattr(compiler, name):
            setattr(compiler, name, [str(old)])
    with pytest.raises(SystemExit, match=r"cannot build for AVX-VNNI and AMX.*expected g\+\+ 11"):
        build.refuse_old_compilers(compiler)


@pytest.mark.parametrize(
    ("newer", "rebuilt"), [("source", True), ("header", True), ("setup", True), ("object", False)]
)
def test_what_makes_an_object_stale(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newer: str, rebuilt: bool
) -> None:
    files = {}
    for i, name in enumerate(("source", "header", "setup", "object")):
        files[name] = tmp_path / name
        files[name].touch()
        os.utime(files[name], (1000 + i, 1000 + i))
    os.utime(files[newer], (2000, 2000))
    monkeypatch.setattr(build, "HEADERS", [str(files["header"])])
    monkeypatch.setattr(build, "__file__", str(files["setup"]))
    assert build.needs_recompile(str(files["object"]), str(files["source"])) == rebuilt
