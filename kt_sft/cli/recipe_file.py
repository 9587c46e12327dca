"""A recipe as the commands read it: a YAML file, and overrides after it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from kt_sft.errors import SettingsError


def read_recipe(path: str, overrides: list[str]) -> dict[str, Any]:
    """A recipe with its overrides. Raises SettingsError, FileNotFoundError."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"recipe: no file {path}")
    try:
        recipe = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: is no YAML: {error}") from error
    if not isinstance(recipe, dict):
        what = "an empty file" if recipe is None else f"a {type(recipe).__name__}"
        raise SettingsError(f"{path}: got {what}, expected a recipe's settings, key: value")
    for text in overrides:
        override(recipe, text)
    return recipe


def override(recipe: dict[str, Any], given: str) -> None:
    """Takes in `key=value`, or `kt_sft.key=value` for a setting of the section. SettingsError."""
    from kt_sft.config import HybridExpertsSettings

    name, equals, text = given.partition("=")
    if not equals:
        raise SettingsError(f"{given}: expected key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{given}: is no YAML: {error}") from error
    first, dot, inner = name.partition(".")
    if name in {field.name for field in fields(HybridExpertsSettings)}:
        raise SettingsError(f"{name}: is a setting of the section; write kt_sft.{given}")
    if dot:
        section = recipe.setdefault(first, {})
        if not isinstance(section, dict):
            raise SettingsError(f"{name}: {first} of the recipe is no section but {section!r}")
        section[inner] = value
    else:
        recipe[name] = value
