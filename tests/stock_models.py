"""The stock side of a comparison: expert weights written into it, LoRA folded into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kt_sft.experts import hybrid_experts_of
from kt_sft.families.finding import FoundExperts, find_experts
from kt_sft.families.table import Part, parameter


def expert_tensors(model: nn.Module) -> list[str]:
    """The names of all parameters that hold routed experts of a stock model."""
    return [
        layer.tensor_path(part)
        for layer in find_experts(model)
        for part in (*layer.kind.parts.values(), *layer.kind.biases.values())
    ]


def _view(layer: FoundExperts, part: Part, whole: Tensor, expert: int) -> Tensor:
    return layer.part(part, expert).of(whole)


def take_effective_weights(stock: nn.Module, hybrid: nn.Module) -> None:
    """Gives the stock model the weights that the hybrid one computes with."""
    sources = {p.removeprefix("base_model.model."): m for p, m in hybrid_experts_of(hybrid).items()}
    layers = find_experts(stock)
    assert {layer.hybrid_path for layer in layers} == set(sources)
    with torch.no_grad():
        for layer in layers:
            weights = sources[layer.hybrid_path].weights
            for projection, part in layer.kind.parts.items():
                whole = parameter(layer.module, part.tensor)
                for e in range(layer.shape.experts):
                    _view(layer, part, whole, e).copy_(weights.unpack(e, projection))


def with_lora(stock: nn.Module, lora: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The expert parameters W + scaling * B A; `lora` by "<path>.<projection>.lora_A"."""
    changed: dict[str, Tensor] = {}
    for layer in find_experts(stock):
        for projection, part in layer.kind.parts.items():
            path = f"{layer.hybrid_path}.{projection}"
            name = layer.tensor_path(part)
            whole = parameter(layer.module, part.tensor)
            delta = changed.get(name)
            if delta is None:
                delta = changed[name] = torch.zeros_like(whole)
            product = scaling * lora[f"{path}.lora_B"] @ lora[f"{path}.lora_A"]
            for e in range(layer.shape.experts):
                _view(layer, part, delta, e).add_(product[e])
    return {name: stock.get_parameter(name).detach() + delta for name, delta in changed.items()}


def run_stock(
    stock: nn.Module, lora: Mapping[str, Tensor], scaling: float, inputs: Mapping[str, Any]
) -> Any:
    """The output of the stock model with LoRA in its expert parameters."""
    return functional_call(stock, with_lora(stock, lora, scaling), kwargs=dict(inputs))


def lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """("<path>.<projection>.lora_A", parameter) of a PeftModel's expert LoRA."""
    for name, p in model.named_parameters():
        if "lora_" in name:
            yield name.removeprefix("base_model.model.").removesuffix(".default"), p
