"""The table of model families: where their routed experts are, in the model and on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kt_sft.errors import UnsupportedModelError

# Names of one expert's projections on disk, in the order gate, up, down.
_LLAMA_NAMES = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
_MIXTRAL_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclass(frozen=True)
class Family:
    """One row: everything that differs between families, as data.

    classes: names of the experts module in Transformers.
    projections: our projection name -> its name in per-expert keys on disk.
    disk_renames: (text in the module's path, text in the checkpoint's keys).
    """

    classes: tuple[str, ...]
    projections: Mapping[str, str] = field(default_factory=lambda: _LLAMA_NAMES)
    disk_renames: tuple[tuple[str, str], ...] = ()

    def disk_prefixes(self, module_path: str) -> list[str]:
        """Where the experts of the module `model.layers.N...experts` may lie in a checkpoint."""
        renamed = module_path
        for ours, theirs in self.disk_renames:
            renamed = renamed.replace(ours, theirs)
        return list(dict.fromkeys([renamed, module_path]))


FAMILIES: Mapping[str, Family] = {
    "qwen3_moe": Family(("Qwen3MoeExperts",)),
    "qwen2_moe": Family(("Qwen2MoeExperts",)),
    "olmoe": Family(("OlmoeExperts",)),
    "deepseek_v2": Family(("DeepseekV2Experts",)),
    "deepseek_v3": Family(("DeepseekV3NaiveMoe",)),
    "mixtral": Family(
        ("MixtralExperts",),
        projections=_MIXTRAL_NAMES,
        disk_renames=((".mlp.", ".block_sparse_moe."),),
    ),
}


def family_of(model_type: str) -> Family:
    """The row of a model type; raises UnsupportedModelError that lists what works."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    raise UnsupportedModelError(
        f"model type {model_type!r} is not supported; kt_sft works with "
        f"{', '.join(sorted(FAMILIES))}. Remove the kt_sft section to train it without us."
    )
