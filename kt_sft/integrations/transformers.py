"""Loading through Transformers: a quantizer that swaps the experts before any weight is read."""

from __future__ import annotations

import warnings
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kt_sft.adapters.portable import refuse_other_layers
from kt_sft.config import HybridExpertsSettings
from kt_sft.errors import UnsupportedModelError
from kt_sft.experts import ExpertsRuntime, ExpertsShape, HybridExperts, hybrid_experts_of
from kt_sft.families import Family, family_of
from kt_sft.kernels import PROJECTIONS
from kt_sft.store.packing import pack_from_checkpoint, pack_from_module

METHOD = "kt_sft"


@register_quantization_config(METHOD)
class HybridExpertsConfig(QuantizationConfigMixin):
    """`from_pretrained(path, quantization_config=HybridExpertsConfig(weights="int8"))`.

    Takes the settings of `HybridExpertsSettings`. Raises SettingsError that lists every problem.
    """

    def __init__(self, **settings: Any) -> None:
        settings.pop("quant_method", None)
        self.quant_method = METHOD  # type: ignore[assignment]
        self.settings = HybridExpertsSettings.from_mapping(settings)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From the dictionary of a saved config.json."""
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The settings and our method's name."""
        return {"quant_method": METHOD, **self.settings.as_dict()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings})"


def _swap_experts(
    model: Any, runtime: ExpertsRuntime
) -> dict[str, tuple[HybridExperts, nn.Module]]:
    """Replaces each stock experts module; returns path -> (hybrid, stock)."""
    config = model.config.get_text_config()
    family = family_of(config.model_type)
    activation = getattr(config, "hidden_act", None) or ""
    stock = {
        path: module
        for path, module in model.named_modules()
        if type(module).__name__ in family.classes
    }
    if not stock:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} has no module of class "
            f"{' or '.join(family.classes)} here; is every layer of this model dense?"
        )
    swapped: dict[str, tuple[HybridExperts, nn.Module]] = {}
    for path, module in stock.items():
        parent = model.get_submodule(path.rpartition(".")[0])
        hybrid = HybridExperts(
            ExpertsShape.of(module, path, activation),
            runtime,
            path,
            parent,
            counts_tokens=not swapped,
        )
        setattr(parent, path.rpartition(".")[2], hybrid)
        swapped[path] = (hybrid, module)
    model.register_load_state_dict_pre_hook(refuse_other_layers)
    # PEFT takes our empty LoRA layers for an adapter that is already there.
    warnings.filterwarnings(
        "ignore", message="You are trying to modify a model with PEFT for a second time"
    )
    return swapped


@register_quantizer(METHOD)
class HybridExpertsQuantizer(HfQuantizer):
    """Keeps the experts' tensors from being read with the model and streams them afterwards."""

    requires_calibration = False

    quantization_config: HybridExpertsConfig

    def __init__(self, quantization_config: HybridExpertsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # Our own configuration inside a saved config.json does not mean quantized files.
        self.pre_quantized = False
        self._files: list[str] = []
        self._family: Family | None = None

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if not checkpoint_files:
            raise UnsupportedModelError(
                "from_pretrained was given a state dict, expected a checkpoint on disk; "
                "load the stock model and call kt_sft.hybridize(model, config)"
            )
        _refuse_zero3()
        self._files = list(checkpoint_files)
        self._family = family_of(model.config.get_text_config().model_type)
        _swap_experts(model, ExpertsRuntime(self.quantization_config.settings))
        # The experts' keys have no parameter any more; they are not an accident to warn of.
        ignored = list(model._keys_to_ignore_on_load_unexpected or [])
        model._keys_to_ignore_on_load_unexpected = [*ignored, r"\.experts\."]
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        assert self._family is not None
        pack_from_checkpoint(hybrid_experts_of(model), self._family, self._files)
        return model

    def is_serializable(self) -> bool:
        """The packed experts are not written by save_pretrained; `kt-sft export` writes a model."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Gradients flow through the experts to the hidden states, the router and LoRA."""
        return True


def _refuse_zero3() -> None:
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise UnsupportedModelError(
            "DeepSpeed ZeRO-3 partitions parameters while the model is built, which hybrid "
            "experts do not support; use ZeRO-2 (the experts are on the CPU already)"
        )


def hybridize(model: Any, config: HybridExpertsConfig | HybridExpertsSettings | None = None) -> Any:
    """Moves the routed experts of a model in memory to packed host memory, in place.

    `model` is a Transformers model or a PeftModel around one. With expert_lora and a PeftModel,
    the experts get the LoRA of every adapter whose target modules name them.
    Raises UnsupportedModelError. Returns the model.
    """
    if isinstance(config, HybridExpertsConfig):
        config = config.settings
    settings = config or HybridExpertsSettings()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hybrid_experts_of(base):
        return model
    swapped = _swap_experts(base, ExpertsRuntime(settings))
    for hybrid, stock in swapped.values():
        pack_from_module(hybrid, stock)
        # The stock weights go layer by layer, so that the peak is one copy and one layer.
        for name in ("gate_up_proj", "down_proj"):
            delattr(stock, name)
    if base is not model:
        _adapt_new_experts(model, [hybrid for hybrid, _ in swapped.values()])
    return model


def _adapt_new_experts(peft_model: Any, modules: list[HybridExperts]) -> None:
    """Gives the experts of an existing PeftModel the LoRA that its configuration asks for."""
    for adapter, config in peft_model.peft_config.items():
        for module in modules:
            for layer, name in zip(module.lora_layers(), PROJECTIONS, strict=True):
                path = f"{module.path}.{name}"
                if layer is None or not check_target_module_exists(config, path):
                    continue
                rank_key = get_pattern_key(config.rank_pattern.keys(), path)
                alpha_key = get_pattern_key(config.alpha_pattern.keys(), path)
                layer.update_layer(
                    adapter,
                    config.rank_pattern.get(rank_key, config.r),
                    config.alpha_pattern.get(alpha_key, config.lora_alpha),
                    config.lora_dropout,
                    config.init_lora_weights,
                    config.use_rslora,
                    use_dora=config.use_dora,
                    lora_bias=config.lora_bias,
                    inference_mode=config.inference_mode,
                )
                layer.set_adapter(peft_model.active_adapters, inference_mode=config.inference_mode)
