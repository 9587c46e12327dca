"""Making a model hybrid that is in memory already."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists

from kt_sft.adapters.names import alpha_of, rank_of
from kt_sft.checkpoint.sources import ModuleSource
from kt_sft.config import HybridExpertsSettings
from kt_sft.errors import SettingsError
from kt_sft.experts import ExpertsRuntime, HybridExperts, hybrid_experts_of
from kt_sft.experts.residents import place_residents
from kt_sft.families.finding import find_experts
from kt_sft.kernels import PROJECTIONS
from kt_sft.loading.adapter_folders import identify_base
from kt_sft.loading.config import HybridExpertsConfig
from kt_sft.loading.host_embeddings import move_embeddings
from kt_sft.loading.packing import new_layer
from kt_sft.loading.swap import swap_experts
from kt_sft.scheduling.residents import ResidentBudget


def hybridize(model: Any, config: HybridExpertsConfig | HybridExpertsSettings | None = None) -> Any:
    """Moves the routed experts of a model in memory to packed host memory, in place.

    `model` is a Transformers model or a PeftModel around one. With expert_lora and a PeftModel,
    the experts get the LoRA of every adapter whose target modules name them.
    Raises UnsupportedModelError, and SettingsError for `rest`. Returns the model.
    """
    if isinstance(config, HybridExpertsConfig):
        if config.rest is not None:
            raise SettingsError(
                "rest: a model in memory is not quantized; load it with "
                "from_pretrained(..., quantization_config=config)"
            )
        config = config.settings
    settings = config or HybridExpertsSettings()
    if settings.disk_tier:
        raise SettingsError(
            "disk_tier: a model in memory has no store that could be mapped; load it with "
            "from_pretrained(..., quantization_config=config)"
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hybrid_experts_of(base):
        return model
    layers = find_experts(base)
    sources = {layer.hybrid_path: ModuleSource(layer) for layer in layers}
    swapped = swap_experts(base, layers, ExpertsRuntime(settings))
    for path, (hybrid, _) in swapped.items():
        hybrid.weights = new_layer(hybrid, sources[path])
        # The stock weights go layer by layer, so that the peak is one copy and one layer.
        sources[path].release()
    hybrids = {path: hybrid for path, (hybrid, _) in swapped.items()}
    if hybrids and ResidentBudget.of(settings.gpu_experts).decided:
        # Otherwise a Trainer decides, once the model is on its device.
        place_residents(hybrids)
    if base is model:
        identify_base(base)
    if settings.embeddings == "host":
        move_embeddings(base)
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
                layer.update_layer(
                    adapter, rank_of(config, path), alpha_of(config, path), config=config
                )
                layer.set_adapter(peft_model.active_adapters, inference_mode=config.inference_mode)
