"""Everything beside the routed experts in 4 or 8 bits, by bitsandbytes: QLoRA for hybrid models.

Attention, shared experts and dense layers become bitsandbytes' layers, which PEFT adapts as usual.
Routers, norms, embeddings and the output head stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from kt_sft.errors import UnsupportedModelError
from kt_sft.experts import hybrid_experts_of

# Bytes of a scale in fp32 for each block of 64 weights in 4 bits; of one in 8 bits with
# `bnb_4bit_use_double_quant`, whose own scales are few.
_BLOCK = 64


def rest_config(given: BitsAndBytesConfig | Mapping[str, Any]) -> BitsAndBytesConfig:
    """A copy of its own, as what stays is written into it; or what a config.json holds of it."""
    if isinstance(given, BitsAndBytesConfig):
        return copy.deepcopy(given)
    return BitsAndBytesConfig(**given)


class QuantizedRest:
    """Transformers' quantizer of bitsandbytes, for a model whose routed experts are hybrid."""

    def __init__(self, config: BitsAndBytesConfig) -> None:
        if not (config.load_in_4bit or config.load_in_8bit):
            raise UnsupportedModelError("rest: got neither load_in_4bit nor load_in_8bit")
        self._config = config
        self.quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)

    def replace_layers(self, model: PreTrainedModel, device_map: Any) -> None:
        """On the meta device, after the experts are hybrid and before weights are read."""
        kept = self.quantizer.get_modules_to_not_convert(
            model, self._config.llm_int8_skip_modules, model._keep_in_fp32_modules
        )
        self._config.llm_int8_skip_modules = [*kept, *_routers(model)]
        self.quantizer._process_model_before_weight_loading(model, device_map=device_map)

    def names(self, model: nn.Module) -> set[str]:
        """The parameters in codes."""
        return {
            name
            for name, _ in model.named_parameters()
            if self.quantizer.param_needs_quantization(model, name)
        }

    def parameter_bytes(self, model: nn.Module, element_bytes: int) -> int:
        """Of all parameters of a model on the meta device, once they are read."""
        coded = self.names(model)
        total = 0.0
        for name, p in model.named_parameters():
            if name not in coded:
                total += p.numel() * element_bytes
            elif self._config.load_in_8bit:
                total += p.numel() + 4 * p.shape[0]
            else:
                scale = 1 if self._config.bnb_4bit_use_double_quant else 4
                total += p.numel() * (0.5 + scale / _BLOCK)
        return int(total)

    def fill(self, model: nn.Module, name: str, weight: torch.Tensor) -> None:
        """Quantizes a weight [outputs, inputs] that Transformers did not find in the checkpoint."""
        import bitsandbytes

        owner, _, own = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        config = self._config
        unread = getattr(module, own)
        if unread.is_floating_point():
            weight = weight.to(unread.dtype)
        made: Any
        if config.load_in_8bit:
            made = bitsandbytes.nn.Int8Params(
                weight, requires_grad=False, has_fp16_weights=config.llm_int8_has_fp16_weight
            )
        else:
            made = bitsandbytes.nn.Params4bit(
                weight,
                requires_grad=False,
                compress_statistics=config.bnb_4bit_use_double_quant,
                quant_type=config.bnb_4bit_quant_type,
                quant_storage=config.bnb_4bit_quant_storage,
                module=module,
            )
        setattr(module, own, made.to(unread.device))

    def finish(self, model: PreTrainedModel) -> None:
        """After the weights are read: what PEFT and the Trainer look at."""
        self.quantizer._process_model_after_weight_loading(model)


def _routers(model: nn.Module) -> list[str]:
    """Linear layers that score experts, or gate the shared ones."""
    found = []
    for path, experts in hybrid_experts_of(model).items():
        block = path.rpartition(".")[0]
        for name, module in model.get_submodule(block).named_children():
            scores = isinstance(module, nn.Linear) and module.out_features in (
                1,
                experts.shape.experts,
            )
            if scores:
                found.append(f"{block}.{name}")
    return found
