"""A LLaMA-Factory recipe in bf16 on the device and on the CPU; evaluation and generation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tiny_models import make_dataset, make_model, make_tokenizer

from gpu_stages.setting import Setting

# Relative difference of losses. Two runs in bf16 drift apart, the more the longer they train.
BOUND = 0.03
_RUN = """
import json, sys
sys.path[:0] = {paths!r}
from gpu_stages.setting import prepare
prepare({device!r})
from llamafactory.train.tuner import run_exp
run_exp(json.load(open(sys.argv[1])))
"""


def _run(recipe: dict[str, Any], folder: Path, name: str, device: str) -> str:
    """Empty, or the end of what went wrong."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**recipe, "output_dir": str(folder / name)}))
    environment = {**os.environ, "DISABLE_VERSION_CHECK": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment.pop("ACCELERATE_TORCH_DEVICE", None)
    code = _RUN.format(paths=sys.path[:3], device=device)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=environment
    )
    return "" if done.returncode == 0 else done.stderr[-2000:]


def _losses(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [e[key] for key in ("loss", "eval_loss") for e in log if key in e]


def run(setting: Setting) -> None:
    """Rows: the two trainings, a prediction that generates."""
    device = setting.place()
    steps = 3 if setting.small else 10
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model("qwen3_moe").to(torch.bfloat16).save_pretrained(folder / "model")
        make_tokenizer(folder / "model")
        make_dataset(folder / "data")
        shared = dict(
            model_name_or_path=str(folder / "model"), stage="sft", finetuning_type="lora",
            dataset_dir=str(folder / "data"), template="qwen3_nothink", cutoff_len=64,
            preprocessing_num_workers=1, dataloader_num_workers=0, report_to="none", bf16=True,
            flash_attn="sdpa", seed=1, kt_sft={"weights": "int8", "store": "memory"},
        )  # fmt: skip
        training = dict(
            shared, do_train=True, do_eval=True, dataset="sft", lora_target="all", lora_rank=8,
            learning_rate=5e-3, max_steps=steps, val_size=0.1, eval_strategy="epoch",
            logging_steps=1, save_steps=100, per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        curves = {}
        for place in dict.fromkeys((device, "cpu")):
            problem = _run({**training, "use_cpu": place == "cpu"}, folder, place, place)
            if problem:
                setting.say(case=f"training on {place}", ok=False, problem=problem)
                return
            curves[place] = _losses(folder / place)
        got, want = curves[device], curves["cpu"]
        worst = max(abs(a - b) / b for a, b in zip(got, want, strict=True))
        setting.say(
            case=f"SFT, bf16, {steps} steps",
            first_loss=round(got[0], 4),
            last_loss=round(got[steps - 1], 4),
            evaluation=round(got[-1], 4),
            difference=f"{worst:.1e}",
            ok=worst <= BOUND and got[steps - 1] < got[0],
        )
        prediction = dict(
            shared, do_predict=True, predict_with_generate=True, eval_dataset="sft",
            max_samples=4, max_new_tokens=8, adapter_name_or_path=str(folder / device),
            use_cpu=device == "cpu",
        )  # fmt: skip
        problem = _run(prediction, folder, "prediction", device)
        lines = folder / "prediction" / "generated_predictions.jsonl"
        count = len(lines.read_text().splitlines()) if lines.exists() else 0
        setting.say(case="prediction, generated", answers=count, ok=count == 4, problem=problem)
