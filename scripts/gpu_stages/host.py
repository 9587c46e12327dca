"""What the host's CPU is, whether its kernels are right there, and how fast they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from gpu_stages.setting import Setting
from kt_sft.kernels import isa_report
from kt_sft.kernels.report import machine_description

_BENCH = (
    "import sys; sys.argv = ['kt-sft', 'bench', *sys.argv[1:]]; from kt_sft.cli import main; main()"
)
_TINY = [
    "--hidden",
    "64",
    "--intermediate",
    "64",
    "--experts",
    "4",
    "--top-k",
    "2",
    "--rounds",
    "1",
]
_AMX_TESTS = ["tests/kernels/test_block.py", "tests/kernels/test_limits.py"]
ROOT = Path(__file__).resolve().parents[2]


def _run(words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)


def _bench(setting: Setting, *words: str) -> None:
    done = _run([sys.executable, "-c", _BENCH, *words, "--json"])
    ok = done.returncode == 0
    found = json.loads(done.stdout) if ok else {}
    shown = {k: v for k, v in found.items() if isinstance(v, int | float | str)}
    setting.say(case=f"bench {' '.join(words[:3])}", ok=ok, **shown)
    (setting.out / f"bench_{'_'.join(words[:3]).replace('--', '')}.json").write_text(
        done.stdout if ok else done.stderr
    )


def run(setting: Setting) -> None:
    """Rows: the CPU, the tests of the AMX kernels where there is AMX, peak and layers."""
    usable = [name for name, missing in isa_report() if not missing]
    setting.say(case="machine", **machine_description(), isa=", ".join(usable))
    small = setting.small
    if "amx" in usable or small:
        words = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", "amx", *_AMX_TESTS]
        done = _run([*words, *(["--collect-only"] if small else [])])
        last = (done.stdout.strip().splitlines() or [""])[-1]
        # 5: there are none, where nothing emulates AMX.
        ok = done.returncode == 0 or (small and done.returncode == 5)
        setting.say(case="tests of the AMX kernels", ok=ok, result=last)
    _bench(setting, "peak")
    for tokens in ("512", "2048"):
        _bench(setting, "layer", "--tokens", "8" if small else tokens, *(_TINY if small else []))
