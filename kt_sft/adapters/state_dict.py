"""Expert LoRA in state dicts: one pair of matrices per expert and projection, see names.py.

Factors that all experts share are one pair there too, under the name of the projection; adapters
that repeat them for every expert are taken as well, where all of them are equal.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn, stack

from kt_sft.adapters import names
from kt_sft.errors import AdapterMismatchError


def spread_expert_factors(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """State-dict hook of HybridExperts: stacked factors to one pair per expert (views)."""
    for key in [k for k in state_dict if k.startswith(prefix)]:
        found = names.stacked(key[len(prefix) :])
        if found is None:
            continue
        factors = state_dict.pop(key)
        layer = getattr(module, found.projection)
        if layer.shared:
            state_dict[prefix + names.shared_key(*found)] = factors[0]
            continue
        for expert, matrix in enumerate(factors.unbind(0)):
            state_dict[prefix + names.expert_key(expert, *found)] = matrix


def collect_expert_factors(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Load hook of HybridExperts: one pair per expert to stacked factors.

    Raises AdapterMismatchError that lists what does not fit this layer.
    """
    groups: dict[tuple[str, str, str | None], dict[int, Tensor]] = {}
    for key in [k for k in state_dict if k.startswith(prefix)]:
        shared = names.shared(key[len(prefix) :])
        if shared is not None:
            projection, factor, adapter = shared
            adapter = adapter or _last_made(module, projection)
            experts = range(module.shape.experts)  # type: ignore[arg-type, union-attr]
            groups[projection, factor, adapter] = dict.fromkeys(experts, state_dict.pop(key))
            continue
        found = names.of_expert(key[len(prefix) :])
        if found is None or found.path:
            continue
        which = found.projection, found.factor, found.adapter
        groups.setdefault(which, {})[found.expert] = state_dict.pop(key)
    for projection, factor, adapter in [key for key in groups if key[2] is None]:
        # Experts that this model does not have, beside those that it has.
        others = [key for key in groups if key[:2] == (projection, factor) and key[2]]
        unnamed = groups.pop((projection, factor, adapter))
        if len(others) == 1:
            groups[others[0]].update(unnamed)
        else:
            groups[projection, factor, _last_made(module, projection)] = unnamed
    problems: list[str] = []
    for (projection, factor, adapter), matrices in groups.items():
        problems.extend(_misfits(module, projection, factor, adapter, matrices))
        if problems:
            continue
        shared = getattr(module, projection).shared
        stacked = stack([matrices[e] for e in range(1 if shared else len(matrices))])
        state_dict[prefix + names.stacked_key(projection, factor, adapter)] = stacked
    if problems:
        raise AdapterMismatchError(
            f"the adapter does not fit {prefix.rstrip('.')} of this base model:\n"
            + "\n".join(f"  - {p}" for p in problems)
            + "\nLoad it on the base model it was trained on."
        )


def _last_made(module: nn.Module, projection: str) -> str | None:
    """The adapter that is being loaded, where a key does not name it."""
    made = getattr(getattr(module, projection, None), "lora_A", {})
    return next(reversed(list(made)), None)


def refuse_other_layers(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any
) -> None:
    """Load hook of a hybrid model: expert LoRA must be for exactly its layers of experts.

    `load_state_dict` of PEFT drops keys that it does not know and leaves missing ones at their
    initial values, both without an error. Raises AdapterMismatchError.
    """
    here = {
        path
        for path, module in model.named_modules()
        if getattr(module, "holds_expert_factors", False)
    }
    keys = [k[len(prefix) :] for k in state_dict if k.startswith(prefix)]
    found = {expert.path for expert in map(names.of_expert, keys) if expert is not None}
    # Of a pair for all experts the name alone does not tell that it is of experts.
    found |= {path for path in map(names.owner, keys) if path in here or path.endswith(".experts")}
    if not found:
        return
    problems = [f"{path}: in the adapter, not in this model" for path in sorted(found - here)]
    problems += [f"{path}: in this model, not in the adapter" for path in sorted(here - found)]
    if problems:
        raise AdapterMismatchError(
            f"the adapter has expert LoRA for {len(found)} layers, this base model has {len(here)}:"
            + "".join(f"\n  - {p}" for p in problems[:8])
            + ("\n  - ..." if len(problems) > 8 else "")
            + "\nLoad it on the base model it was trained on."
        )


def refuse_other_vocabulary(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any
) -> None:
    """Load hook of a hybrid model: what was trained in full must have the shapes of this model.

    Raises AdapterMismatchError where torch would list sizes without what to do.
    """
    own = {
        prefix + name: p.shape
        for name, p in model.named_parameters()
        if names.is_trained_in_full(name)
    }
    problems = [
        f"{key}: got {tuple(state_dict[key].shape)}, this model has {tuple(shape)}"
        for key, shape in own.items()
        if key in state_dict and state_dict[key].shape != shape
    ]
    if problems:
        raise AdapterMismatchError(
            "the adapter holds layers of other sizes than this model:"
            + "".join(f"\n  - {p}" for p in problems)
            + "\nWhere the vocabulary grew in training, give every later command the same "
            "add_tokens, add_special_tokens and resize_vocab"
        )


def _misfits(
    module: nn.Module,
    projection: str,
    factor: str,
    adapter: str | None,
    matrices: dict[int, Tensor],
) -> list[str]:
    layer = getattr(module, projection, None)
    if layer is None:
        return [f"{projection}: the adapter has expert LoRA, the model has expert_lora: false"]
    if adapter is None or adapter not in layer.lora_A:
        return [f"{projection}: the adapter has factors, its target_modules do not name it"]
    name = f"{projection} {factor}"
    problems = []
    expected = set(range(layer.experts))
    if set(matrices) != expected:
        lacking, extra = sorted(expected - set(matrices)), sorted(set(matrices) - expected)
        problems.append(
            f"{name}: got {len(matrices)} experts, expected {layer.experts}"
            + (f"; missing {_few(lacking)}" if lacking else "")
            + (f"; unknown {_few(extra)}" if extra else "")
        )
    shape = tuple(getattr(layer, factor)[adapter].shape[1:])
    wrong = {e: tuple(m.shape) for e, m in matrices.items() if tuple(m.shape) != shape}
    if wrong:
        expert = min(wrong)
        problems.append(
            f"{name}: got shape {wrong[expert]} (expert {expert}), expected {shape} "
            "(rank and width)"
        )
    elif layer.shared and any(not m.equal(matrices[min(matrices)]) for m in matrices.values()):
        problems.append(
            f"{name}: differs from expert to expert, expected one matrix for all with "
            "expert_lora: shared; set expert_lora: true"
        )
    return problems


def _few(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return shown + (", ..." if len(numbers) > 5 else "")
