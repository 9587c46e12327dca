"""What of a hybrid model trains, counted with the packed experts, which torch does not see."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from kt_sft.experts import hybrid_experts_of


@dataclass(frozen=True)
class Trained:
    """The trained parameters of one kind: how many modules, how many numbers."""

    kind: str
    modules: int
    parameters: int


def trained_by_kind(model: nn.Module) -> list[Trained]:
    """LoRA on routed experts, LoRA beside them, and what trains in full; none where nothing does.

    A module is what LoRA is attached to: for experts one projection of a layer.
    """
    inside = {id(p) for m in hybrid_experts_of(model).values() for p in m.parameters()}
    found: dict[str, tuple[set[str], int]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, lora, _ = name.partition(".lora_")
        if id(parameter) in inside:
            kind = "LoRA on routed experts"
        elif lora:
            kind = "LoRA beside them"
        else:
            kind, owner = "in full", name.rpartition(".")[0]
        owners, count = found.get(kind, (set(), 0))
        found[kind] = owners | {owner}, count + parameter.numel()
    return [Trained(kind, len(owners), count) for kind, (owners, count) in found.items()]


def packed_weights(model: nn.Module) -> int:
    """The number of weights in the packed experts."""
    return sum(m.shape.weights for m in hybrid_experts_of(model).values())


def summary(model: nn.Module) -> str:
    """One line for the log."""
    kinds = trained_by_kind(model)
    packed = packed_weights(model)
    total = packed + sum(p.numel() for p in model.parameters())
    share = 100 * sum(k.parameters for k in kinds) / total
    parts = [f"{k.kind}: {k.parameters:,} in {k.modules} modules" for k in kinds] or ["nothing"]
    return (
        f"trains {'; '.join(parts)}; {share:.4f} % of {total:,} parameters, of which {packed:,} "
        "are packed experts"
    )
