"""Checks the installed wheel: its files, its commands, and that its kernels load. Needs no torch.

    python scripts/check_wheel.py

Run by `make wheel` and by cibuildwheel, in an environment that holds the wheel alone.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from importlib.metadata import distribution
from pathlib import Path

EXPECTED = (
    "kt_sft/py.typed",
    "kt_sft/kernels/_core.pyi",
    "kt_sft/constraints.txt",
    "kt_sft/report/page.html.j2",
    "kt_sft_autoload.py",
    *(
        f"kt_sft/{folder.name}/{file.name}"
        for folder in (Path(__file__).parents[1] / "recipes", Path(__file__).parents[1] / "configs")
        for file in folder.iterdir()
    ),
)


def main() -> None:
    """Raises SystemExit with what is wrong."""
    installed = distribution("kt_sft")
    files = {str(file): Path(str(file.locate())) for file in installed.files or ()}
    missing = [name for name in EXPECTED if name not in files or not files[name].is_file()]
    if not any(name.endswith("LICENSE") for name in files):
        missing.append("LICENSE")
    commands = {(e.group, e.name) for e in installed.entry_points}
    for command in (("console_scripts", "kt-sft"), ("torch.backends", "kt_sft")):
        if command not in commands:
            missing.append(f"entry point {command}")
    cores = [path for name, path in files.items() if name.startswith("kt_sft/kernels/_core.c")]
    if not cores:
        missing.append("kt_sft/kernels/_core.*.so")
    if missing:
        raise SystemExit(f"check_wheel: the wheel lacks {', '.join(missing)}")

    # Loaded by its path, because the package around it imports torch.
    loader = importlib.machinery.ExtensionFileLoader("_core", str(cores[0]))
    spec = importlib.util.spec_from_loader("_core", loader)
    assert spec is not None
    core = importlib.util.module_from_spec(spec)
    loader.exec_module(core)
    sets = [isa for isa, _, _ in core.kernel_rows()]
    if len(sets) < 7 or core.select_isa("auto", None) not in sets:
        raise SystemExit(f"check_wheel: got kernels for {sets}, expected seven instruction sets")
    sys.stdout.write(
        f"kt_sft {installed.version}: {len(files)} files, {core.select_isa('auto', None)} here\n"
    )


if __name__ == "__main__":
    main()
