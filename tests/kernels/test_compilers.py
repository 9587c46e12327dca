"""The core compiles without warnings with every compiler that is here."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parents[2]
INCLUDES = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
# A note for users of these intrinsics in gcc's own header; clang does not know the flag.
GCC_ONLY = "-Wno-uninitialized"


def build_flags() -> dict[str, list[str]]:
    """Source -> flags, as setup.py has them."""
    build = runpy.run_path(str(ROOT / "setup.py"))  # from the working directory
    common = build["COMMON_FLAGS"]
    return {source: [*common, *build["ISA_FLAGS"].get(source, [])] for source in build["SOURCES"]}


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_no_warnings(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    monkeypatch.chdir(ROOT)
    flags = build_flags()
    assert len(flags) > 10
    for source, options in flags.items():
        wanted = [o for o in options if o != GCC_ONLY or compiler == "g++"]
        command = [compiler, "-std=c++17", "-fPIC", "-Werror", "-fsyntax-only"]
        if compiler == "g++":
            # Some of gcc's warnings come from the optimizer only.
            command = [compiler, "-std=c++17", "-fPIC", "-Werror", "-c", "-o", "/dev/null"]
        done = subprocess.run(
            [*command, *wanted, *INCLUDES, source], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{source}:\n{done.stderr[:2000]}"


@pytest.mark.slow
def test_clang_builds_the_same_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inline assembly and the tile intrinsics survive the other compiler's code generator."""
    if shutil.which("clang++") is None:
        pytest.skip("clang++ is not installed")
    monkeypatch.chdir(ROOT)
    for source, options in build_flags().items():
        if not {"kernels", "arch"} & {*Path(source).parts} or source.endswith("/cpu.cpp"):
            continue
        object_file = tmp_path / (Path(source).stem + ".o")
        wanted = [o for o in options if o != GCC_ONLY]
        subprocess.run(
            ["clang++", "-std=c++17", "-fPIC", "-c", *wanted, source, "-o", str(object_file)],
            check=True,
        )
        listing = subprocess.run(
            ["nm", str(object_file)], capture_output=True, text=True, check=True
        ).stdout
        weak = [line for line in listing.splitlines() if line.split()[-2:-1] in (["W"], ["V"])]
        assert not weak, f"{source} defines weak symbols: {weak[:3]}"
