"""The names and numbers of an adapter: the one place that knows its keys, ranks and scaling.

In a model the LoRA of all experts is stacked, `<experts>.gate_proj.lora_A.<adapter>` [E, r, in]. In
a state dict and in a file every expert has matrices of its own,
`<experts>.<e>.gate_proj.lora_A.<adapter>.weight` [r, in] (a file leaves the adapter's name out),
the keys that vLLM, SGLang, llama.cpp and PEFT read.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from peft.utils.other import get_pattern_key

from kt_sft.kernels import PROJECTIONS

# Before every key of a PeftModel's file.
FILE_PREFIX = "base_model.model."

_PROJECTION = f"({'|'.join(PROJECTIONS)})"
_STACKED = re.compile(rf"{_PROJECTION}\.(lora_[AB])\.([^.]+)$")
# Without an adapter's name where PEFT knows no parameter of this model for the key (0.21 on).
_OF_EXPERT = re.compile(rf"(\d+)\.{_PROJECTION}\.(lora_[AB])(?:\.([^.]+))?\.weight$")
_SHARED = re.compile(rf"{_PROJECTION}\.(lora_[AB])(?:\.([^.]+))?\.weight$")
_OF_ALL = re.compile(rf"(.+)\.{_PROJECTION}\.lora_[AB](?:\.[^.]+)?\.weight$")
_FACTOR = re.compile(r"(.+)\.(lora_[AB])(?:\.[^.]+)?\.weight")
_EXPERT_MODULE = re.compile(rf"(.+)\.(\d+)\.{_PROJECTION}$")
_IN_FULL = re.compile(r"(.*)\.(modules_to_save|original_module)\.(?:\w+\.)?(\w+)")


class Stacked(NamedTuple):
    """A key of a hybrid module's own parameters."""

    projection: str
    factor: str
    adapter: str


class OfExpert(NamedTuple):
    """A key of one expert's matrix, and the path of its experts as far as the key has one."""

    path: str
    expert: int
    projection: str
    factor: str
    adapter: str | None


class ExpertModule(NamedTuple):
    """The projection of one expert, as other programs name it."""

    path: str
    expert: int
    projection: str


def stacked(key: str) -> Stacked | None:
    """The parts of a key below its experts, or None for another one."""
    match = _STACKED.fullmatch(key)
    return Stacked(*match.groups()) if match else None


def stacked_key(projection: str, factor: str, adapter: str | None) -> str:
    """The way back."""
    return f"{projection}.{factor}.{adapter}"


def shared(key: str) -> tuple[str, str, str | None] | None:
    """(projection, factor, adapter) of a key, below its experts, of a pair that all of them share.

    None for another key.
    """
    match = _SHARED.fullmatch(key)
    return (match[1], match[2], match[3]) if match else None


def shared_key(projection: str, factor: str, adapter: str) -> str:
    """The way back."""
    return f"{projection}.{factor}.{adapter}.weight"


def of_expert(key: str) -> OfExpert | None:
    """The parts of a key, whatever precedes it, or None for another one."""
    match = _OF_EXPERT.search(key)
    if match is None:
        return None
    expert, projection, factor, adapter = match.groups()
    return OfExpert(key[: match.start()].rstrip("."), int(expert), projection, factor, adapter)


def factor_of(path: str) -> tuple[str, str] | None:
    """(module, lora_A or lora_B) of any module's key, with an adapter's name or without one."""
    match = _FACTOR.fullmatch(path)
    return (match[1], match[2]) if match else None


def owner(key: str) -> str:
    """The path before a projection's LoRA, whatever the projection is of; empty for other keys."""
    match = _OF_ALL.fullmatch(key)
    return match[1] if match else ""


def expert_key(expert: int, projection: str, factor: str, adapter: str) -> str:
    """The key of one expert's matrix below its experts."""
    return f"{expert}.{projection}.{factor}.{adapter}.weight"


def expert_module(module: str) -> ExpertModule | None:
    """The parts of a module's path, or None where it is no expert's projection by its name."""
    match = _EXPERT_MODULE.fullmatch(module)
    return ExpertModule(match[1], int(match[2]), match[3]) if match else None


def is_trained_in_full(name: str) -> bool:
    """Whether a parameter belongs to a module that PEFT trains beside its adapters."""
    return ".modules_to_save." in f".{name}"


def wrapped(path: str) -> tuple[str, bool] | None:
    """(path in the model, whether it is the trained copy) of what lies inside of PEFT's wrapper."""
    match = _IN_FULL.fullmatch(path)
    return (f"{match[1]}.{match[3]}", match[2] == "modules_to_save") if match else None


def rank_of(config: Any, module: str) -> int:
    """The rank that a LoraConfig gives a module, by its path in the model that trained."""
    return _by_pattern(config.rank_pattern, module, config.r)


def alpha_of(config: Any, module: str) -> float:
    """The alpha that a LoraConfig gives a module."""
    return _by_pattern(config.alpha_pattern, module, config.lora_alpha)


def matched(patterns: dict[str, Any] | None, name: str) -> Any:
    """The value of the pattern that a name matches, or None."""
    return patterns.get(get_pattern_key([*patterns], name)) if patterns else None


def _by_pattern(patterns: dict[str, Any], module: str, otherwise: Any) -> Any:
    found = matched(patterns, module)
    return otherwise if found is None else found


def scaling(rank: int, alpha: float, use_rslora: bool) -> float:
    """What B A is multiplied by."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)
