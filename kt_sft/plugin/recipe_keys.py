"""What LLaMA-Factory would say of a recipe's keys and names, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from kt_sft.errors import SettingsError

_STAGES = ("pt", "sft", "rm", "ppo", "dpo", "kto")


def refuse_unknown(recipe: Mapping[str, Any]) -> None:
    """Raises SettingsError that lists every key, stage and template that LLaMA-Factory lacks.

    Does nothing where LLaMA-Factory is not installed.
    """
    try:
        problems = list(_problems(recipe))
    except ImportError:
        return
    if problems:
        raise SettingsError(
            "the recipe: LLaMA-Factory does not know\n" + "\n".join(f"  - {p}" for p in problems)
        )


def _problems(recipe: Mapping[str, Any]) -> Iterator[str]:
    from llamafactory.data.template import TEMPLATES
    from llamafactory.hparams import (
        DataArguments,
        FinetuningArguments,
        GeneratingArguments,
        ModelArguments,
        TrainingArguments,
    )

    kinds: tuple[Any, ...] = (
        *(ModelArguments, DataArguments, TrainingArguments),
        *(FinetuningArguments, GeneratingArguments),
    )
    known = {field.name for kind in kinds for field in fields(kind)}
    for key in map(str, recipe):
        if key not in known:
            yield f"{key}{_meant(key, known)}"
    for key, values in (("stage", _STAGES), ("template", TEMPLATES)):
        value = recipe.get(key)
        if value is not None and value not in values:
            yield f"{key}: {value}{_meant(str(value), set(values))}"


def _meant(word: str, known: set[str]) -> str:
    near = get_close_matches(word, sorted(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
