"""What a checkpoint says of itself, which anyone may have written: bounded, and one kind of error.

Configurations are looked at before anything is built from them, and whatever reading a malformed
file runs into becomes a CheckpointError that says what was being read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kt_sft.errors import CheckpointError, KtSftError

# No published model comes near; what is built for less is built in seconds.
_MOST_LAYERS = 4096
_MOST_EXPERTS = 65_536
_WIDEST = 1 << 24
_LARGEST_CONFIG = 16 << 20
# Parts of the names of settings, and the most that is believed.
_LIMITS = (
    ("hidden_layers", _MOST_LAYERS),
    ("num_layers", _MOST_LAYERS),
    ("n_layer", _MOST_LAYERS),
    ("experts", _MOST_EXPERTS),
    ("vocab_size", _WIDEST),
    ("hidden_size", _WIDEST),
    ("intermediate_size", _WIDEST),
    ("num_attention_heads", _WIDEST),
    ("head_dim", _WIDEST),
)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Raises CheckpointError for whatever goes wrong inside, but for errors that are ours."""
    try:
        yield
    except KtSftError:
        raise
    except Exception as error:  # of any library that was handed what is malformed
        text = (str(error).splitlines() or [""])[0][:300]
        raise CheckpointError(
            f"{what}: malformed: {type(error).__name__}: {text}; download the checkpoint again"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of bounded size. Raises CheckpointError."""
    with reading(str(file)):
        size = file.stat().st_size
        if size > _LARGEST_CONFIG:
            raise CheckpointError(
                f"{file}: got {size} bytes, expected at most {_LARGEST_CONFIG} of a configuration"
            )
        found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: got {type(found).__name__}, expected an object {{...}}")
    return found


def refuse_absurd(config: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError that lists sizes that are no sizes, or beyond any model's."""
    problems = list(_absurd(config, ""))
    if problems:
        raise CheckpointError(f"{where}:\n" + "\n".join(f"  - {p}" for p in problems))


def _absurd(config: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            if not prefix:  # text_config, vision_config and the like
                yield from _absurd(value, f"{name}.")
            continue
        limit = next((most for part, most in _LIMITS if part in str(name)), None)
        if limit is None or value is None or isinstance(value, bool | list | tuple | str):
            continue
        if not isinstance(value, int) or not 0 <= value <= limit:
            yield f"{prefix}{name}: got {str(value)[:40]}, expected 0 to {limit}"


def refuse_more_layers(config: Mapping[str, Any], tensors: int, where: str) -> None:
    """Raises CheckpointError where there are fewer tensors on disk than layers."""
    for part in (config, *(v for v in config.values() if isinstance(v, Mapping))):
        layers = part.get("num_hidden_layers")
        if isinstance(layers, int) and layers > tensors:
            raise CheckpointError(
                f"{where}: num_hidden_layers: got {layers}, the checkpoint has {tensors} tensors; "
                "config.json and the weights do not belong together"
            )
