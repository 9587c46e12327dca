"""The package as a stranger gets it: dependencies, version, contents, what its build refuses."""

from __future__ import annotations

import ast
import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kt_sft
from kt_sft.config import read_section, shipped_folder

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Where a distribution's name is not that of its module.
_DISTRIBUTIONS = {"yaml": "pyyaml"}
# Modules that only a part of the package imports, when it runs: module -> extra that brings it.
_OPTIONAL = {
    "llamafactory": "llamafactory",
    "huggingface_hub": "llamafactory",
    "matplotlib": "bench",
    "shtab": "completion",
    "bitsandbytes": "quantized",
}
# In an environment of its own, made by the user for a measurement.
_PEERS = {"kt_kernel"}
_OWN = {"kt_sft", "kt_sft_autoload", *sys.stdlib_module_names}


def imported(statements: Iterable[ast.AST]) -> Iterator[str]:
    """Top-level names of the modules that these import, relative imports left out."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for file in (ROOT / "kt_sft_autoload.py", *(ROOT / "kt_sft").rglob("*.py")):
        yield file, ast.parse(file.read_text())


def names(requirements: list[str]) -> set[str]:
    return {Requirement(r).name.lower() for r in requirements}


def test_declared_is_imported() -> None:
    found = {name for _, tree in modules() for name in imported(ast.walk(tree))} - _OWN - _PEERS
    needed = {_DISTRIBUTIONS.get(name, name) for name in found - set(_OPTIONAL)}
    assert needed == names(PROJECT["dependencies"])
    for module, extra in _OPTIONAL.items():
        assert module in found
        assert module in names(EXTRAS[extra])


def test_optional_packages_are_not_imported_with_the_package() -> None:
    for file, tree in modules():
        assert not set(imported(tree.body)) & set(_OPTIONAL), file


def test_the_tested_set_is_within_what_is_declared() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins[pin.name.lower()] = str(pin.specifier).removeprefix("==")
    required = [*PROJECT["dependencies"], *(r for extra in EXTRAS.values() for r in extra)]
    checked = set()
    for requirement in map(Requirement, required):
        version = pins.get(requirement.name.lower())
        if version is not None:
            assert requirement.specifier.contains(version), requirement
            checked.add(requirement.name.lower())
    assert checked >= names(PROJECT["dependencies"]) | names(EXTRAS["metrics"]) | {"llamafactory"}


def test_one_source_of_the_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", kt_sft.__version__)
    assert PROJECT["dynamic"] == ["version"]
    assert SETTINGS["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "kt_sft.__version__"}
    said = [p for p, _ in modules() if f'"{kt_sft.__version__}"' in p.read_text()]
    assert said == [ROOT / "kt_sft" / "__init__.py"]


def test_entry_points_lead_to_functions_of_the_wheel() -> None:
    backends = PROJECT["entry-points"]["torch.backends"]
    assert set(PROJECT["scripts"]) == {"kt-sft"}
    assert set(backends) == {"kt_sft"}
    for target in (*PROJECT["scripts"].values(), *backends.values()):
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert module.partition(".")[0] in {"kt_sft", *SETTINGS["tool"]["setuptools"]["py-modules"]}


def test_settings_that_come_with_the_package_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_section("configs/experts_bf16.yaml").weights == "bf16"
    recipes = sorted((shipped_folder() / "recipes").glob("*.yaml"))
    assert len(recipes) >= 6


def run_setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist of this tree, unpacked; made from a copy, so that nothing is written here."""
    copy = tmp_path_factory.mktemp("tree") / "kt_sft"
    copy.mkdir()
    # A clone's build outputs and caches, some of them gigabytes, have names that git ignores.
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("csrc", "recipes", "configs", "docs", "kt_sft", "tests", "scripts"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy2(file, copy)
    done = run_setup(copy, "-q", "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (copy / "dist").iterdir()
    assert archive.name == f"kt_sft-{kt_sft.__version__}.tar.gz"
    with tarfile.open(archive) as tar:
        tar.extractall(copy.parent, filter="data")
    return copy.parent / f"kt_sft-{kt_sft.__version__}"


def files_of(folder: Path, *parts: str) -> set[str]:
    return {
        str(path.relative_to(folder))
        for part in parts
        for path in (folder / part).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }


def test_the_sdist_holds_what_a_build_and_the_tests_need(sdist: Path) -> None:
    folders = ("csrc", "recipes", "configs", "docs", "kt_sft", "tests", "scripts")
    here = files_of(ROOT, *folders)
    assert len(here) > 150
    assert here - files_of(sdist, *folders) == set()
    top = {path.name for path in sdist.iterdir()}
    assert top >= {
        *("LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "RELEASE.md"),
        *("Makefile", "constraints.txt", "setup.py", "pyproject.toml", "kt_sft_autoload.py"),
    }


def test_a_wheel_from_the_sdist_holds_recipes_and_settings(sdist: Path, tmp_path: Path) -> None:
    done = run_setup(sdist, "-q", "build_py", "--build-lib", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "kt_sft", "recipes", "configs") == files_of(
        ROOT, "recipes", "configs"
    )
    for name in (
        *("kt_sft_autoload.py", "kt_sft/py.typed", "kt_sft/kernels/_core.pyi"),
        "kt_sft/constraints.txt",
    ):
        assert (tmp_path / name).is_file()


# Writes empty objects and notes its arguments; with LACKS it refuses that flag, as an old one does.
_COMPILER = """#!/bin/sh
echo "$*" >> "$COMPILER_LOG"
case "$*" in *"${LACKS:-no such flag}"*) echo "unrecognized option $LACKS" >&2; exit 1;; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


@pytest.fixture
def compiler(tmp_path: Path) -> dict[str, str]:
    """Environment of a compiler that only pretends."""
    script = tmp_path / "g++"
    script.write_text(_COMPILER)
    script.chmod(0o755)
    return {"CC": str(script), "CXX": str(script), "COMPILER_LOG": str(tmp_path / "log")}


def test_what_is_compiled_again(sdist: Path, compiler: dict[str, str]) -> None:
    """Nothing, all of it after a change of a header or of the flags, or the one file that changed.

    With a clock of its own: what was built is of the hour 1, what is touched of the hour 2.
    """
    log = Path(compiler["COMPILER_LOG"])

    def compiled() -> set[str]:
        log.write_text("")
        done = run_setup(sdist, "build_ext", "--inplace", **compiler)
        assert done.returncode == 0, done.stderr
        for built in (*(sdist / "build").rglob("*.o"), *sdist.rglob("*.so")):
            os.utime(built, (3600, 3600))
        return set(re.findall(r"-c (csrc/\S+)", log.read_text()))

    for file in (sdist / "setup.py", *(sdist / "csrc").rglob("*.*")):
        os.utime(file, (0, 0))
    every = {str(f.relative_to(sdist)) for f in (sdist / "csrc").rglob("*.cpp")}
    assert len(every) > 10
    assert compiled() == every
    assert compiled() == set()
    for touched, again in (
        ("setup.py", every),
        ("csrc/kernels/kernel_table.h", every),
        ("csrc/kernels/s16_dot.inl", every),
        ("csrc/arch/x86/amx.cpp", {"csrc/arch/x86/amx.cpp"}),
    ):
        os.utime(sdist / touched, (7200, 7200))
        assert compiled() == again, touched
        os.utime(sdist / touched, (0, 0))


@pytest.mark.parametrize("lacks", ["-mamx-int8", "-mavxvnni", "-mavx512bf16"])
def test_old_compilers_are_told(sdist: Path, compiler: dict[str, str], lacks: str) -> None:
    done = run_setup(sdist, "build_ext", "--force", LACKS=lacks, **compiler)
    assert done.returncode == 1
    assert "csrc/" not in Path(compiler["COMPILER_LOG"]).read_text()
    assert re.fullmatch(
        r"kt_sft: got a compiler that cannot build for .*expected g\+\+ 11 .*Install one .*",
        done.stderr.splitlines()[-1],
    )


def test_a_missing_compiler_is_told(sdist: Path) -> None:
    done = run_setup(sdist, "build_ext", "--force", CC="/no/gcc", CXX="/no/g++")
    assert done.returncode == 1
    assert re.search(r"kt_sft: got .*/no/g.*Install one \(Debian: apt-get install g", done.stderr)


@pytest.mark.parametrize(
    ("system", "machine"), [("darwin", "arm64"), ("linux", "aarch64"), ("win32", "AMD64")]
)
def test_other_machines_are_told(
    system: str, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the command looks for anything else, its compiler for one."""
    build_core = runpy.run_path(str(ROOT / "setup.py"))["BuildCore"]
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    said = rf"^kt_sft: got {system} on {machine}, expected Linux on x86-64.* Build it on such"
    with pytest.raises(SystemExit, match=said):
        build_core.build_extensions(None)
