"""Hybrid experts in the place of the stock ones, without weights yet."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from kt_sft import patches
from kt_sft.adapters.state_dict import refuse_other_layers, refuse_other_vocabulary
from kt_sft.errors import UnsupportedModelError
from kt_sft.experts import ExpertsRuntime, HybridExperts
from kt_sft.experts.ahead import let_shared_go_ahead
from kt_sft.experts.recompute import keep_activations
from kt_sft.families.calls import redirect_block
from kt_sft.families.finding import FoundExperts
from kt_sft.families.table import attribute


def swap_experts(
    model: Any, found: list[FoundExperts], runtime: ExpertsRuntime
) -> dict[str, tuple[HybridExperts, FoundExperts]]:
    """Puts hybrid experts where the stock ones are; returns them by path."""
    swapped: dict[str, tuple[HybridExperts, FoundExperts]] = {}
    for layer in found:
        path = layer.hybrid_path
        parent = model.get_submodule(path.rpartition(".")[0])
        kind = layer.kind
        hybrid = HybridExperts(
            layer.shape,
            runtime,
            path,
            parent,
            counts_tokens=not swapped,
            call="routed" if kind.child else kind.call,
            top_k=attribute(layer.module, kind.top_k) if kind.top_k else None,
        )
        if kind.child:
            for part in kind.parts.values():
                layer.module._modules.pop(part.tensor.partition(".")[0], None)
            redirect_block(layer.module, kind.call)
        setattr(parent, path.rpartition(".")[2], hybrid)
        let_shared_go_ahead(parent, path.rpartition(".")[2])
        # Some families initialize the stock experts' parameters from their block, by name.
        parent._is_hf_initialized = True
        swapped[path] = (hybrid, layer)
    model.register_load_state_dict_pre_hook(refuse_other_layers)
    model.register_load_state_dict_pre_hook(refuse_other_vocabulary)
    patches.install_on(model, "model")
    if runtime.settings.activations != "recompute":
        keep_activations(model)
    # PEFT takes our empty LoRA layers for an adapter that is already there.
    warnings.filterwarnings(
        "ignore", message="You are trying to modify a model with PEFT for a second time"
    )
    return swapped


def refusing_to_save(model: Any) -> Callable:
    """What stands for save_pretrained, which would write a checkpoint without experts."""
    return _refuse_saving


def _refuse_saving(*args: Any, **kwargs: Any) -> None:
    raise UnsupportedModelError(
        "save_pretrained: the packed experts of a hybrid model are not written to a checkpoint. "
        "Save the adapter, with save_pretrained of the PeftModel; merge it into the original "
        "checkpoint with `kt-sft export recipe.yaml`"
    )
