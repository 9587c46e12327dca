"""Which modules of a model a recipe's `lora_target` means, before the adapter is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from kt_sft.kernels import PROJECTIONS

EVERYTHING = "all"


@dataclass(frozen=True)
class LoraTargets:
    """Names of layers, each a module's name or the end of its path; `all` for every Linear layer.

    not_within: parts of paths that get no LoRA. anywhere: a name counts wherever it is in a path,
    which is LLaMA-Factory's rule for models of several parts; else it ends the path, PEFT's rule.
    """

    names: frozenset[str]
    not_within: frozenset[str] = frozenset()
    anywhere: bool = False

    @classmethod
    def of(cls, *names: str) -> LoraTargets:
        """By names alone."""
        return cls(frozenset(names))

    @property
    def everything(self) -> bool:
        """Whether every Linear layer but the head is meant."""
        return self.names == {EVERYTHING}

    def means(self, path: str) -> bool:
        """Whether a Linear layer at `path` is one of them."""
        if any(part in path for part in self.not_within):
            return False
        if self.everything:
            return True
        if self.anywhere:
            return any(name in path for name in self.names)
        return any(path == name or path.endswith(f".{name}") for name in self.names)

    def modules(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The Linear layers of a hybrid model that are meant, its experts' projections included."""
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        for path, module in model.named_modules():
            linear = "Linear" in type(module).__name__
            if linear and self.means(path) and not (self.everything and module is head):
                yield path, module

    def may_mean_experts(self) -> bool:
        """Before there is a model: whether routed experts are named, shared ones not counted."""
        return self.everything or any(map(_names_experts, self.names))


def _names_experts(target: str) -> bool:
    path, _, name = target.rpartition(".")
    return name in PROJECTIONS and path.rpartition(".")[2] in ("", "experts")
