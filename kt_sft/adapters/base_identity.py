"""What tells the base model of an adapter from another one of the same shape.

Sizes, and samples of weights that are floats in most releases of a model, quantized experts or not:
input embeddings, and the first and last router, norm and layer beside the experts. Training changes
some of them, merged LoRA of attention too; another format of the experts changes none. It lies
beside an adapter, and is looked at where one is loaded or exported.
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
_SPACED = 64
_VALUES = 4
# What went through fp16, which has less range than bf16, is compared by its values.
_RELATIVE, _ABSOLUTE = 2**-7, 1e-6
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Read by people and compared, by the names that configurations use.
_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")


# (E, hidden, intermediate) of a layer's experts by their path.
Layers = Mapping[str, tuple[int, int, int]]


def telling_parameters(model: nn.Module, experts: Layers) -> list[str]:
    """The names of the parameters that are sampled.

    The model is a stock one or a hybrid one, before any adapter.
    """
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    kinds: dict[str, list[str]] = {"embedding": [], "router": [], "norm": [], "layer": []}
    blocks = {path.rpartition(".")[0]: shape[0] for path, shape in experts.items()}
    layers = tuple(f"{block.rpartition('.')[0]}." for block in blocks)
    inside_experts = tuple(f"{path}." for path in experts)
    for name, parameter in model.named_parameters():
        if name.startswith(inside_experts):
            continue
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if embedding is not None and parameter is embedding.weight:
            kinds["embedding"].append(name)
        elif parameter.dim() == 1 and "norm" in name:
            kinds["norm"].append(name)
        elif parameter.dim() == 2 and block is not None and parameter.shape[0] == blocks[block]:
            kinds["router"].append(name)
        elif parameter.dim() == 2 and block is None and name.startswith(layers):
            kinds["layer"].append(name)
    return [name for found in kinds.values() for name in dict.fromkeys(found[:1] + found[-1:])]


def _sample(weight: Tensor, rounded: bool) -> dict[str, Any]:
    """A digest of up to 64 by 64 values in bf16, and 16 of them, evenly spaced.

    rounded: it has been in fp16, so that its values count.
    """

    def chosen(count: int) -> Tensor:
        matrix = weight.detach().reshape(weight.shape[0], -1)
        rows, columns = (
            torch.linspace(0, size - 1, min(count, size)).long().to(matrix.device)
            for size in matrix.shape
        )
        return matrix[rows][:, columns].cpu()

    bits = chosen(_SPACED).to(torch.bfloat16).contiguous().view(torch.uint8)
    return {
        "rounded": rounded or weight.dtype == torch.float16,
        "digest": xxhash.xxh3_64_hexdigest(bits.numpy().tobytes()),
        "values": chosen(_VALUES).float().flatten().tolist(),
    }


def identity_of(
    config: Any,
    experts: Layers,
    parameters: Iterable[str],
    weight: Callable[[str], Tensor | None],
    rounded: bool = False,
) -> dict[str, Any]:
    """weight: a parameter by its name, or None where it cannot be sampled.

    rounded: the weights have been in fp16 before they got what dtype they have.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    sizes = {name: getattr(text, name, None) for name in _SIZES}
    shapes = sorted(set(experts.values()))
    samples = {}
    for name in parameters:
        found = weight(name)
        if found is not None and found.dtype in _PLAIN and found.device.type != "meta":
            samples[name] = _sample(found, rounded)
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
    kind = _differing(trained_on, here, "model_type") if trained_on else ()
    return sorted(kind) + sorted(
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
        if not _same(theirs[name], ours[name])
    )


def _same(one: Any, two: Any) -> bool:
    """Whether two samples are of one weight; what cannot be compared counts as the same."""
    if not isinstance(one, Mapping) or not isinstance(two, Mapping):
        return True
    if one.get("digest") == two.get("digest"):
        return True
    if not (one.get("rounded") or two.get("rounded")):
        return False
    theirs, ours = _numbers(one), _numbers(two)
    return len(theirs) == len(ours) > 0 and all(
        abs(x - y) <= _RELATIVE * abs(x) + _ABSOLUTE for x, y in zip(theirs, ours, strict=True)
    )


def _numbers(sample: Mapping[str, Any]) -> list[float]:
    found = sample.get("values")
    numbers = isinstance(found, list) and all(isinstance(x, int | float) for x in found)
    return found if numbers and isinstance(found, list) else []


def earlier_adapters(adapter: Path) -> list[str]:
    """The folders of the adapters that were part of the model when this one was trained."""
    found = (read_identity(adapter) or {}).get("on_top_of")
    return [p for p in found if isinstance(p, str)] if isinstance(found, list) else []


def refuse(adapter: Path, base: str, found: list[str], force: str) -> None:
    """Raises AdapterMismatchError that lists what was found.

    base: the one that it is loaded on. force: how to go on all the same; empty where one cannot.
    """
    if found:
        raise AdapterMismatchError(
            f"{adapter}: the adapter was trained on another base model than {base}:"
            + "".join(f"\n  - {line}" for line in found)
            + "\nLoad it on the base it was trained on"
            + (f"; {force} takes this one all the same" if force else "")
        )


def _part(identity: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = identity.get(name)
    return found if isinstance(found, Mapping) else {}


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any], *names: str) -> Iterator[str]:
    for name in names or theirs.keys() & ours.keys():
        if theirs.get(name) != ours.get(name):
            yield f"{name}: {theirs.get(name)}, here {ours.get(name)}"
