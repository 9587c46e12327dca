"""What tells the base model of an adapter from another one of the same shape.

Sizes, and digests of samples of weights that every release of a model keeps as they are, quantized
or not: input embeddings, the first and last router and norm. A fine-tune changes them; another
format of the experts does not. It lies beside an adapter, and is looked at where one is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from kt_sft.errors import AdapterMismatchError

IDENTITY_FILE = "kt_sft_base.json"
_ROWS = _COLUMNS = 64
# Read by people and compared, by the names that configurations use.
_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")


# (E, hidden, intermediate) of a layer's experts by their path.
Layers = Mapping[str, tuple[int, int, int]]


def telling_parameters(model: nn.Module, experts: Layers) -> list[str]:
    """The names of the parameters that are sampled.

    The model is a stock one or a hybrid one, before any adapter.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    routers, norms, found = [], [], []
    blocks = {path.rpartition(".")[0]: (path, shape[0]) for path, shape in experts.items()}
    for name, parameter in model.named_parameters():
        for block, (path, count) in blocks.items():
            inside = name.startswith(f"{block}.") and not name.startswith(f"{path}.")
            if inside and parameter.dim() == 2 and parameter.shape[0] == count:
                routers.append(name)
        if parameter.dim() == 1 and "norm" in name:
            norms.append(name)
        if embedding is not None and parameter is embedding.weight:
            found.append(name)
    for ends in (routers, norms):
        found += dict.fromkeys(ends[:1] + ends[-1:])
    return found


def sample_digest(weight: Tensor) -> str:
    """XXH3-64 of up to 64 by 64 values, evenly spaced, in bf16, in hexadecimal."""
    matrix = weight.detach().reshape(weight.shape[0], -1)
    rows = torch.linspace(0, matrix.shape[0] - 1, min(_ROWS, matrix.shape[0])).long()
    columns = torch.linspace(0, matrix.shape[1] - 1, min(_COLUMNS, matrix.shape[1])).long()
    chosen = matrix[rows.to(matrix.device)][:, columns.to(matrix.device)]
    return xxhash.xxh3_64_hexdigest(
        chosen.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes()
    )


def identity_of(
    config: Any,
    experts: Layers,
    parameters: Iterable[str],
    weight: Callable[[str], Tensor | None],
) -> dict[str, Any]:
    """weight: a parameter by its name, or None where it cannot be sampled."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    sizes = {name: getattr(text, name, None) for name in _SIZES}
    shapes = sorted(set(experts.values()))
    samples = {}
    for name in parameters:
        found = weight(name)
        if found is not None and found.is_floating_point() and found.device.type != "meta":
            samples[name] = sample_digest(found)
    return {
        "model_type": config.model_type,
        "sizes": {name: size for name, size in sizes.items() if isinstance(size, int)}
        | {"expert layers": len(experts), "experts, hidden, intermediate": list(map(list, shapes))},
        "samples": samples,
    }


def read_identity(adapter: Path) -> dict[str, Any] | None:
    """What lies beside an adapter; None where there is none, or no such thing."""
    try:
        found = json.loads((adapter / IDENTITY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write_identity(adapter: Path, identity: Mapping[str, Any]) -> None:
    """Puts it beside an adapter."""
    text = json.dumps(identity, indent=2) + "\n"
    (adapter / IDENTITY_FILE).write_text(text, encoding="utf-8")


def other_shape(trained_on: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two models of different shapes, a line each."""
    return sorted(_differing(trained_on, here, "model_type")) + sorted(
        line
        for line in _differing(_part(trained_on, "sizes"), _part(here, "sizes"))
        if not line.startswith("vocab_size")  # which training may have changed
    )


def other_weights(trained_on: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The parameters that differ between two models, of those that both have samples of."""
    theirs, ours = _part(trained_on, "samples"), _part(here, "samples")
    return sorted(
        f"{name}: other weights"
        for name in theirs.keys() & ours.keys()
        if theirs[name] != ours[name]
    )


def refuse(adapter: Path, found: list[str], force: str) -> None:
    """Raises AdapterMismatchError that lists what was found; force: how to go on all the same."""
    if found:
        raise AdapterMismatchError(
            f"{adapter}: the adapter was trained on another base model:"
            + "".join(f"\n  - {line}" for line in found)
            + f"\nLoad it on the base it was trained on; {force} takes this one all the same"
        )


def _part(identity: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = identity.get(name)
    return found if isinstance(found, Mapping) else {}


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any], *names: str) -> Iterator[str]:
    for name in names or theirs.keys() & ours.keys():
        if theirs.get(name) != ours.get(name):
            yield f"{name}: {theirs.get(name)}, here {ours.get(name)}"
