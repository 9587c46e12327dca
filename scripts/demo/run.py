"""The demo from beginning to end: base model, data, fine-tuning, answers, summary.

Model, data and the base model's answers are cached in .cache/demo; results go to outputs/demo.
DEMO_MODEL names a folder with another Mixture-of-Experts checkpoint, whose answers are not cached.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from base_model import MADE_OF
from summary import summarize
from tqdm import tqdm

import kt_sft

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


def chosen_model() -> tuple[Path, list[str]]:
    """The base model's folder, and what the recipes must be told about it.

    Raises SystemExit where DEMO_MODEL is no checkpoint.
    """
    named = os.environ.get("DEMO_MODEL")
    if not named:
        return CACHE / "smollm2", []
    folder = Path(named).expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise SystemExit(f"demo: DEMO_MODEL={named}: expected a folder with a config.json")
    # Without a template's name LLaMA-Factory takes the tokenizer's own; cards need no thoughts.
    return folder, [f"model_name_or_path={folder}", "template=null", "enable_thinking=false"]


def answer_before(model: Path, overrides: Sequence[str]) -> None:
    """The base model's answers, which a second run takes from the cache: nothing has trained it."""
    answers, kept = OUTPUTS / "answers_before", CACHE / "answers_before"
    asked = [CACHE / "data" / "demo_predict.json", ROOT / "recipes" / "demo_predict.yaml"]
    key = hashlib.sha256(b"".join(file.read_bytes() for file in asked)).hexdigest()
    made_of = "" if overrides else (model / MADE_OF).read_text()
    said = f"{kt_sft.__version__} {key} {made_of}"
    if not overrides and (kept / "key.txt").is_file() and (kept / "key.txt").read_text() == said:
        shutil.copytree(kept, answers)
        sys.stdout.write(f"\n== 3/5 Answers of the base model: kept in {kept}\n")
        return
    run_step(
        "3/5 Answers of the base model to held-out questions",
        llamafactory(
            "demo_predict", "adapter_name_or_path=null", f"output_dir={answers}", *overrides
        ),
        OUTPUTS / "logs" / "answers_before.log",
    )
    if not overrides:
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(answers, kept)
        (kept / "key.txt").write_text(said)


def _report() -> None:
    """The page of the run again, with answers before and after."""
    from kt_sft.cli import main as kt_sft

    answers = (f"--{when}={OUTPUTS / f'answers_{when}'}" for when in ("before", "after"))
    kt_sft(["report", str(OUTPUTS / "adapter"), *answers])


def main() -> None:
    """Runs every step and prints the summary."""
    model, overrides = chosen_model()
    os.chdir(ROOT)
    begin = time.monotonic()
    shutil.rmtree(OUTPUTS, ignore_errors=True)
    if not overrides:
        run_step(
            "1/5 Base model: SmolLM2-135M-Instruct as a Mixture of Experts, 8 in each layer",
            [sys.executable, "scripts/demo/base_model.py", "--out", str(model)],
            OUTPUTS / "logs" / "base_model.log",
        )
    run_step(
        "2/5 Data: reference cards of Python's standard library",
        [sys.executable, "scripts/demo/cards.py", "--out", str(CACHE / "data")],
    )
    answer_before(model, overrides)
    run_step(
        "4/5 Fine-tuning: LoRA on attention and every expert, experts in int8 on the CPU",
        llamafactory("demo", *overrides),
    )
    run_step(
        "5/5 Answers of the fine-tuned model",
        llamafactory("demo_predict", f"output_dir={OUTPUTS / 'answers_after'}", *overrides),
        OUTPUTS / "logs" / "answers_after.log",
    )
    _report()
    seconds = time.monotonic() - begin
    sys.stdout.write(summarize(model, CACHE / "data", OUTPUTS, overrides, seconds))


if __name__ == "__main__":
    main()
