"""The demo from beginning to end: base model, data, fine-tuning, answers, summary.

Model and data are cached in .cache/demo; results go to outputs/demo.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(".cache/demo")
OUTPUTS = Path("outputs/demo")
BIN = Path(sys.executable).parent


def run_step(title: str, command: Sequence[str], log: Path | None = None) -> None:
    """Runs one command; with `log`, its output goes there and a bar shows that it lives.

    Raises SystemExit with the end of the log when it fails.
    """
    sys.stdout.write(f"\n== {title}\n   {' '.join(command)}\n")
    sys.stdout.flush()
    env = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(OUTPUTS),
        "WANDB_SILENT": "true",
        "HF_HUB_OFFLINE": "1",
        # Without a GPU, torch and the experts share the cores: waiting threads must not spin.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if log is None:
        if subprocess.run(command, env=env).returncode:
            raise SystemExit(f"demo: step failed: {title}")
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as sink:
        process = subprocess.Popen(command, env=env, stdout=sink, stderr=subprocess.STDOUT)
        with tqdm(desc=f"   output in {log}", bar_format="{desc} [{elapsed}]") as bar:
            while process.poll() is None:
                time.sleep(0.5)
                bar.update()
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise SystemExit(f"demo: step failed: {title}\n{tail}")


def llamafactory(recipe: str, *overrides: str) -> list[str]:
    """The command line of one LLaMA-Factory run."""
    return [str(BIN / "llamafactory-cli"), "train", f"recipes/{recipe}.yaml", *overrides]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs every step and prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrain-seconds", type=int, default=None, help="base model's budget")
    arguments = parser.parse_args(argv)
    os.chdir(ROOT)
    begin = time.monotonic()
    shutil.rmtree(OUTPUTS, ignore_errors=True)
    python = sys.executable
    budget = ["--seconds", str(arguments.pretrain_seconds)] if arguments.pretrain_seconds else []
    run_step(
        "1/5 Base model: a small Qwen3-MoE, trained on the standard library's documentation",
        [python, "scripts/demo/base_model.py", "--out", str(CACHE / "model"), *budget],
    )
    run_step(
        "2/5 Data: questions and answers from the same documentation",
        [python, "scripts/demo/instructions.py", "--out", str(CACHE / "data")],
    )
    run_step(
        "3/5 Answers of the base model to held-out questions",
        llamafactory(
            "demo_predict",
            "adapter_name_or_path=null",
            f"output_dir={OUTPUTS / 'answers_before'}",
        ),
        OUTPUTS / "logs" / "answers_before.log",
    )
    run_step(
        "4/5 Fine-tuning: LoRA on attention and every expert, experts in int8 on the CPU",
        llamafactory("demo"),
    )
    run_step(
        "5/5 Answers of the fine-tuned model",
        llamafactory("demo_predict", f"output_dir={OUTPUTS / 'answers_after'}"),
        OUTPUTS / "logs" / "answers_after.log",
    )
    from summary import summarize

    sys.stdout.write(summarize(CACHE, OUTPUTS, time.monotonic() - begin))


if __name__ == "__main__":
    main()
