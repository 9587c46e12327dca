"""An adapter's folder as it lies on the disk: its settings, checked, and its tensors by key.

Which module of a base model a key belongs to is the business of adapter.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from kt_sft.adapters import names
from kt_sft.adapters.layer import variants_without_kernels
from kt_sft.checkpoint.untrusted import read_json, reading
from kt_sft.errors import CheckpointError, SettingsError
from kt_sft.files.safetensors import SafetensorsCheckpoint
from kt_sft.files.safetensors_writer import DTYPES
from kt_sft.kernels import PROJECTIONS

# Where KTransformers keeps the experts' factors, all experts of a projection in one tensor.
STACKED_FILE = "fused_expert_lora.safetensors"
_STACKED_KEYS = {
    f"{projection.removesuffix('_proj')}_lora_{factor[-1].lower()}": (projection, factor)
    for projection in PROJECTIONS
    for factor in ("lora_A", "lora_B")
}
# What PEFT saves of a layer that has LoRA itself, as the base has it.
_OF_BASE = (".base_layer.weight", ".base_layer.bias")
# Parts of keys of what is no plain LoRA.
_OTHER_KINDS = {
    "lora_embedding_": "LoRA of embeddings",
    "trainable_tokens_": "single trained tokens",
    "lora_magnitude": "DoRA",
    "lora_A.bias": "LoRA with a bias",
    "lora_B.bias": "LoRA with a bias",
}
# Settings of LoraConfig under which B A is not all that is computed.
_OTHER_SETTINGS = ("layer_replication", "trainable_token_indices")
# Ways to begin that leave the base's weights as they are.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_LARGEST_ALPHA = 1e9
# Patterns of modules' names, without what can make matching take for ever.
_PATTERN = re.compile(r"[\w.\-*+?^$|\\()\[\]]{1,512}")
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
# Of a fused pair, which other programs may have made.
_LARGEST_RANK = 1 << 16
_FLOATS = ("F64", "F32", "F16", "BF16")


def is_foreign(folder: Path) -> bool:
    """Whether an adapter's expert LoRA is in a form that hybrid models cannot load as it is."""
    if (folder / STACKED_FILE).is_file():
        return True
    file = folder / CONFIG_NAME
    if not file.is_file():
        return False
    targets = read_json(file).get("target_parameters")
    return bool(targets)


class AdapterFile:
    """Plain LoRA, and modules that were trained in full. Tensors are read when asked for.

    lora: the path before `.lora_A`, without PEFT's prefix -> the keys of a and b.
    stacked: (layer number, projection) -> the same in KTransformers' file of experts.
    full: parameters that were trained in full -> their keys.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises SettingsError for another method, CheckpointError for a damaged folder."""
        self.folder = Path(folder)
        self.config, self.peft_version = _config(self.folder)
        files = [self.folder / SAFETENSORS_WEIGHTS_NAME]
        if not files[0].is_file():
            raise CheckpointError(
                f"{folder}: no {SAFETENSORS_WEIGHTS_NAME} there; give the folder of an adapter in "
                "safetensors (a pickle, adapter_model.bin, could run code and is never read)"
            )
        if (self.folder / STACKED_FILE).is_file():
            files.append(self.folder / STACKED_FILE)
        self._tensors = SafetensorsCheckpoint(files)
        self.lora: dict[str, tuple[str, str]] = {}
        self.stacked: dict[tuple[int, str], tuple[str, str]] = {}
        self.full: dict[str, str] = {}
        self._sort()

    def pair(self, keys: tuple[str, str]) -> tuple[Tensor, Tensor]:
        """A and B, in fp32."""
        a, b = (self._tensors.get(key).float() for key in keys)
        return a, b

    def shapes(self, keys: tuple[str, str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B, from the header only."""
        return self._tensors.shape(keys[0]), self._tensors.shape(keys[1])

    def get(self, key: str) -> Tensor:
        """A tensor as it is stored."""
        return self._tensors.get(key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Its shape."""
        return self._tensors.shape(key)

    def stored_dtype(self, key: str) -> str:
        """The name of its dtype in safetensors."""
        return self._tensors.dtype(key)

    def lora_numbers(self) -> int:
        """How many numbers its LoRA has."""
        pairs = [*self.lora.values(), *self.stacked.values()]
        return sum(math.prod(self._tensors.shape(key)) for pair in pairs for key in pair)

    @property
    def dtype(self) -> torch.dtype:
        """That of the LoRA; of the first pair, where they differ."""
        pairs = [*self.lora.values(), *self.stacked.values()]
        return DTYPES[self._tensors.dtype(pairs[0][0])] if pairs else torch.float32

    def _sort(self) -> None:
        factors: dict[str, dict[str, str]] = {}
        stacked: dict[tuple[int, str], dict[str, str]] = {}
        for key in self._tensors:
            if self._tensors.dtype(key) not in _FLOATS:
                raise CheckpointError(
                    f"{self.folder}: {key}: got {self._tensors.dtype(key)}, expected one of "
                    f"{', '.join(_FLOATS)}; the file is damaged or no adapter"
                )
            path = key.removeprefix(names.FILE_PREFIX)
            if (found := _stacked_key(key)) is not None:
                layer, projection, factor = found
                stacked.setdefault((layer, projection), {})[factor] = key
            elif (split := names.factor_of(path)) is not None:
                known = factors.setdefault(split[0], {})
                if split[1] in known:
                    raise CheckpointError(
                        f"{self.folder}: {known[split[1]]} and {key} are of one module; save the "
                        "adapters one by one"
                    )
                known[split[1]] = key
            elif (kind := next((k for k in _OTHER_KINDS if k in key), None)) is not None:
                raise SettingsError(
                    f"{self.folder}: {key}: {_OTHER_KINDS[kind]}, which kt_sft does not read; "
                    "merge the adapter with PEFT"
                )
            else:
                inside = names.wrapped(path)
                if path.endswith(_OF_BASE):
                    continue
                if inside is not None:
                    path, trained = inside
                    # With a resized vocabulary PEFT also saves what its wrapper holds inside.
                    if not trained or f"{names.FILE_PREFIX}{path}" in self._tensors:
                        continue
                self.full[path] = key
        self.lora = {path: self._both(path, found) for path, found in factors.items()}
        self.stacked = {
            place: self._both(f"layer {place[0]} {place[1]}", found)
            for place, found in stacked.items()
        }
        if not self.lora and not self.full and not self.stacked:
            raise CheckpointError(f"{self.folder}: the adapter is empty; save it again")

    def _both(self, path: str, found: Mapping[str, str]) -> tuple[str, str]:
        if len(found) != 2:
            raise CheckpointError(
                f"{self.folder}: {path} has {' and '.join(found)} only, expected lora_A and "
                "lora_B; the file is not whole, copy it again"
            )
        return found["lora_A"], found["lora_B"]


def _stacked_key(key: str) -> tuple[int, str, str] | None:
    """(layer, projection, factor) of `layers.<n>.experts.gate_lora_a` and its like."""
    parts = key.split(".")
    if len(parts) != 4 or parts[0] != "layers" or parts[2] != "experts":
        return None
    found = _STACKED_KEYS.get(parts[3])
    return (int(parts[1]), *found) if found and parts[1].isdecimal() else None


def _config(folder: Path) -> tuple[LoraConfig, str]:
    """The settings, of plain LoRA only, and the release of PEFT that wrote them, if it says so.

    Raises SettingsError, CheckpointError.
    """
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise CheckpointError(f"{folder}: no {CONFIG_NAME} there; give the folder of an adapter")
    raw = read_json(file)
    problems = list(_config_problems(raw))
    if problems:
        raise CheckpointError(f"{file}:\n" + "\n".join(f"  - {p}" for p in problems))
    with reading(str(file)):
        known = {k: v for k, v in raw.items() if k in LoraConfig.__dataclass_fields__}
        config = LoraConfig(**known)
    if raw.get("peft_type") != "LORA" or config.use_dora or config.bias != "none":
        raise SettingsError(
            f"{folder}: only plain LoRA can be read by kt_sft, got peft_type "
            f"{raw.get('peft_type')}, use_dora {config.use_dora}, bias {config.bias}"
        )
    other = [f"{name}: is more than LoRA" for name in _OTHER_SETTINGS if raw.get(name)]
    if listed := [*variants_without_kernels(raw), *other]:
        raise SettingsError(
            f"{folder}: not read by kt_sft\n" + "\n".join(f"  - {p}" for p in listed)
        )
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise SettingsError(
            f"{folder}: init_lora_weights {config.init_lora_weights!r} replaced the base's "
            "weights by a residual before training, so the original ones cannot take the "
            "adapter; merge it with the program that made the residual"
        )
    written_by = raw.get("peft_version")
    return config, written_by if isinstance(written_by, str) and written_by[:1].isdigit() else ""


def _config_problems(raw: Mapping[str, Any]) -> list[str]:
    """What would be computed with, and is no number, or none that LoRA has."""
    problems = []
    if not _is_rank(raw.get("r", 8)):
        problems.append(f"r: got {raw.get('r')!r}, expected 1 to {_LARGEST_RANK}")
    if not _is_alpha(raw.get("lora_alpha", 8)):
        problems.append(f"lora_alpha: got {raw.get('lora_alpha')!r}, expected a number, not 0")
    for name, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        patterns = raw.get(name) or {}
        if not isinstance(patterns, dict):
            problems.append(f"{name}: got {type(patterns).__name__}, expected an object {{...}}")
            continue
        problems += [f"{name}: {k}: got {v!r}" for k, v in patterns.items() if not fits(v)]
        problems += [f"{name}: {k[:60]!r} is no pattern" for k in patterns if not _is_pattern(k)]
    for name in ("target_modules", "target_parameters", "modules_to_save"):
        given = raw.get(name)
        listed = isinstance(given, list) and all(isinstance(n, str) for n in given)
        if not (given is None or listed or (name == "target_modules" and isinstance(given, str))):
            problems.append(f"{name}: got {str(given)[:60]!r}, expected a list of names")
    return problems


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST_RANK


def _is_alpha(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < abs(value) <= _LARGEST_ALPHA


def _is_pattern(value: str) -> bool:
    """Whether PEFT can match names with it, in bounded time."""
    if not _PATTERN.fullmatch(value) or _REPEATED_GROUP.search(value):
        return False
    try:
        re.compile(value)
    except re.error:
        return False
    return True
