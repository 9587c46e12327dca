"""Writes golden_plans.json: what the plan says of published models on described machines.

    python tests/forecast/golden_plans.py

Look at the difference before it is committed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kt_sft.cli.plan import question_of
from kt_sft.forecast.forecast import ask
from kt_sft.forecast.text import as_dict

HERE = Path(__file__).parent
MACHINES = {
    "workstation": "16 cores avx512_vnni, 128 GB, 24 GB gpu",
    "server": "2x64 cores amx, 1 TB, 48 GB gpu",
    "without a GPU": "2x32 cores avx512_vnni, 256 GB, no gpu",
}
RECIPE = {
    "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_target": "all",
    "cutoff_len": 4096, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8,
    "bf16": True, "kt_sft": {"weights": "int8"},
}  # fmt: skip
FILE = HERE / "golden_plans.json"


def models() -> list[str]:
    """Names of the published configurations."""
    return sorted(file.stem for file in (HERE / "published").glob("*.json"))


def folder_of(model: str, parent: Path) -> Path:
    """A folder with the configuration alone, as a person has who has not downloaded weights."""
    folder = parent / model
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text((HERE / "published" / f"{model}.json").read_text())
    return folder


def plans_of(model: str, parent: Path) -> dict[str, Any]:
    """What the plan says of each machine, rounded: megabytes and milliseconds."""
    recipe = {**RECIPE, "model_name_or_path": str(folder_of(model, parent))}
    found = {}
    for name, machine in MACHINES.items():
        said = as_dict(ask(question_of(recipe, None, machine)))
        found[name] = {
            "verdict": said["verdict"],
            "memory_mb": {
                f"{part['name']} ({part['place']})": round(part["bytes"] / 1e6)
                for part in said["memory"]
                if part["bytes"] >= 500_000
            },
            "step_ms": {part: round(1e3 * s) for part, s in said["step_seconds"].items()},
            "largest_micro_batch_tokens": said["largest_micro_batch_tokens"],
            "changes": said["changes"],
            "limit": said["limit"],
        }
    return found


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as parent:
        document = {model: plans_of(model, Path(parent)) for model in models()}
    FILE.write_text(json.dumps(document, indent=1) + "\n")
