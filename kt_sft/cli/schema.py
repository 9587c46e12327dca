"""`kt-sft schema`: the recipe's section as a JSON schema, for editors."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import fields
from typing import Any

from kt_sft import __version__
from kt_sft.cli.help_text import sentence


def add(commands: Any) -> None:
    """Adds the command to the parser of `kt-sft`."""
    text = "print a JSON schema of recipes with a kt_sft section, by which editors complete it"
    schema = commands.add_parser("schema", help=text, description=sentence(text))
    schema.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs `kt-sft schema`."""
    sys.stdout.write(json.dumps(recipe_schema(), indent=1) + "\n")
    return 0


def recipe_schema() -> dict[str, Any]:
    """Of a whole recipe: only the section is described, LLaMA-Factory's settings are let be."""
    forms = [
        section_schema(),
        {"type": "string", "description": "the path of a YAML file that holds the section"},
        {"type": "boolean", "description": "true: every default; false: as if it was not there"},
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"LLaMA-Factory recipe with hybrid experts (kt_sft {__version__})",
        "type": "object",
        "properties": {"kt_sft": {"anyOf": forms}},
    }


def section_schema() -> dict[str, Any]:
    """Of the section: every setting with its values, default and description."""
    from kt_sft.config import HybridExpertsSettings, choices

    texts = _descriptions(HybridExpertsSettings)
    properties: dict[str, Any] = {}
    for field in fields(HybridExpertsSettings):
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        properties[field.name] = {
            "description": texts[field.name],
            "default": default,
            **_values(field.name, choices()),
        }
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _values(name: str, choices: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """What the setting takes."""
    from kt_sft.config import EXPORT_TARGETS

    if name in choices:
        return {"enum": list(choices[name])}
    count = {"type": "integer", "minimum": 0 if name == "gpu_experts" else 1}
    return {
        "export_for": {
            "anyOf": [
                {"type": "array", "items": {"enum": list(EXPORT_TARGETS)}},
                {"enum": list(EXPORT_TARGETS)},
            ]
        },
        "threads": {"anyOf": [{"const": "auto"}, count]},
        "gpu_experts": {"anyOf": [{"const": "auto"}, count, {"type": "string"}]},
    }.get(name, {"type": "string", "minLength": 1})


def _descriptions(of: type) -> dict[str, str]:
    """From the class's docstring, where each setting has a paragraph of its own."""
    found: dict[str, str] = {}
    for paragraph in re.split(r"\n(?=    \w+: )", of.__doc__ or "")[1:]:
        name, _, text = paragraph.strip().partition(": ")
        found[name] = " ".join(text.split())
    return found
