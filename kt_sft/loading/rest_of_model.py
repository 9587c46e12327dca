"""The weights beside the routed experts: whether a checkpoint has them, in the right shapes.

Transformers compares no shape where a quantizer is at work, and starts what it does not find from
random values with a warning. Either would train a broken model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from transformers import PreTrainedModel

from kt_sft.checkpoint.published import PublishedCheckpoint
from kt_sft.checkpoint.sources import Stack
from kt_sft.errors import CheckpointError

# A long list of problems has one reason; the first few tell it.
_SHOWN = 8

Shapes = dict[str, tuple[int, ...]]


def shapes_of(model: PreTrainedModel) -> Shapes:
    """Every parameter and persistent buffer of a model whose experts are swapped."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def refuse_misfits(
    model: PreTrainedModel,
    wanted: Shapes,
    stacks: Mapping[str, Stack],
    checkpoint: PublishedCheckpoint,
) -> None:
    """Before anything is read: CheckpointError that lists what is missing or has another shape.

    What Transformers puts together from several tensors is compared afterwards, by
    `refuse_loaded_misfits`.
    """
    problems = [*_missing(model, wanted, stacks)]
    for name, want in wanted.items():
        stack = stacks.get(name)
        keys = stack.keys() if stack is not None else []
        if stack is None or len(keys) != 1 or stack.converted:
            continue
        got = checkpoint.shape(keys[0])
        if got != want:
            problems.append(_misfit(keys[0], got, want))
    _raise(problems)


def refuse_loaded_misfits(model: PreTrainedModel, wanted: Shapes) -> None:
    """After loading: the same for everything that was put together from several tensors."""
    found = shapes_of(model)
    _raise([_misfit(n, found[n], want) for n, want in wanted.items() if found.get(n, want) != want])


def _missing(model: PreTrainedModel, wanted: Shapes, stacks: Mapping[str, Stack]) -> Iterator[str]:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    optional = [
        re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    ]
    # A new head on a base model is meant to start from random values.
    whole = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    prefix = f"{model.base_model_prefix}."
    for name in wanted:
        there = name in stacks or tied.get(name) in stacks or any(p.search(name) for p in optional)
        if not there and (whole or name.startswith(prefix)):
            yield f"{name}: no tensor of the checkpoint belongs to it"


def _misfit(name: str, got: tuple[int, ...], want: tuple[int, ...]) -> str:
    return f"{name}: got shape {got}, the model's configuration says {want}"


def _raise(problems: list[str]) -> None:
    if not problems:
        return
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    raise CheckpointError(
        "config.json and the weights do not belong together:\n"
        + "\n".join(f"  - {p}" for p in [*problems[:_SHOWN], *more])
        + "\nDownload the checkpoint again, or correct config.json."
    )
