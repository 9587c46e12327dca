"""Which Mixture-of-Experts families of the installed Transformers are covered, and why not all.

Every model whose source has routed experts is built with its default configuration on the meta
device, so that nothing of it takes memory, and searched for experts as loading would.

    python scripts/family_census.py [--json out.json]
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

from kt_sft.errors import KtSftError
from kt_sft.families.finding import find_experts
from kt_sft.families.table import EXPERTS_CLASSES

# Heads that can be trained or served as language models, best first.
_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)
_EXPERTS = re.compile(
    rf"^@use_experts_implementation|^class ({'|'.join(EXPERTS_CLASSES)})\(", re.MULTILINE
)
_MODELS = Path(transformers.__file__).parent / "models"
_REFUSALS = ("switch_transformers", "nllb-moe", "doge")


def moe_types() -> dict[str, type[PreTrainedModel]]:
    """model type -> class, for every model type whose source has routed experts."""
    found: dict[str, type[PreTrainedModel]] = {}
    for mapping in _MAPPINGS:
        for model_type, names in getattr(modeling_auto, mapping, {}).items():
            folder = _MODELS / model_type_to_module_name(model_type)
            text = "".join(f.read_text() for f in sorted(folder.glob("modeling_*.py")))
            if model_type in found or not (model_type in _REFUSALS or _EXPERTS.search(text)):
                continue
            model_class = getattr(transformers, names[0] if isinstance(names, tuple) else names)
            if inspect.isclass(model_class):
                found[model_type] = model_class
    return found


def verdict(model_type: str, model_class: type[PreTrainedModel]) -> tuple[str, str]:
    """("covered" | "refused" | "not built", what was found or why not)."""
    try:
        config = AutoConfig.for_model(model_type)
        with torch.device("meta"):
            model = model_class._from_config(config)
    except Exception as error:  # whatever the default configuration of a family runs into
        return "not built", f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    try:
        layers = find_experts(model)
    except KtSftError as error:
        reason = str(error)
        if "has no routed experts here" in reason:
            return "dense", "no routed experts in its default configuration"
        return "refused", reason
    kinds = sorted({type(layer.module).__name__ for layer in layers})
    return "covered", f"{len(layers)} layers of {', '.join(kinds)}"


def census() -> dict[str, tuple[str, str]]:
    """model type -> verdict."""
    return {name: verdict(name, cls) for name, cls in sorted(moe_types().items())}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the verdicts there")
    arguments = parser.parse_args()
    verdicts = census()
    write = sys.stdout.write
    write(f"transformers {transformers.__version__}\n\n| family | verdict | |\n|---|---|---|\n")
    for name, (state, reason) in verdicts.items():
        write(f"| {name} | {state} | {reason} |\n")
    counts: dict[str, Any] = {}
    for state, _ in verdicts.values():
        counts[state] = counts.get(state, 0) + 1
    write("\n" + ", ".join(f"{n} {state}" for state, n in sorted(counts.items())) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(verdicts, indent=1))


if __name__ == "__main__":
    main()
