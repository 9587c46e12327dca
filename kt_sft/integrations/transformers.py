"""Loading through Transformers: a quantizer that swaps the experts before any weight is read."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kt_sft.adapters.portable import refuse_other_layers, refuse_other_vocabulary
from kt_sft.config import HybridExpertsSettings
from kt_sft.errors import CheckpointError, UnsupportedModelError
from kt_sft.experts import ExpertsRuntime, HybridExperts, hybrid_experts_of
from kt_sft.experts.activations import keep_activations
from kt_sft.experts.conventions import redirect_block
from kt_sft.experts.finding import FoundExperts, find_experts
from kt_sft.families import attribute
from kt_sft.host import host_memory_bytes
from kt_sft.integrations import peft_injection
from kt_sft.integrations.checkpoint_keys import ModelKeys
from kt_sft.integrations.memory import TrainingOutline, check_memory, plan_of
from kt_sft.integrations.rest_of_model import (
    Shapes,
    refuse_loaded_misfits,
    refuse_misfits,
    shapes_of,
)
from kt_sft.kernels import PROJECTIONS
from kt_sft.store.checkpoint import (
    INDEX_NAME,
    SINGLE_NAME,
    SafetensorsCheckpoint,
    checkpoint_files,
)
from kt_sft.store.packing import new_layer
from kt_sft.store.placing import CheckpointExperts, place_experts
from kt_sft.store.published import COMPANION_KEYS, PublishedCheckpoint, own_quantization
from kt_sft.store.sources import CheckpointSource, ModuleSource, Stack
from kt_sft.store.untrusted import refuse_absurd, refuse_more_layers

METHOD = "kt_sft"

peft_injection.install()


@register_quantization_config(METHOD)
class HybridExpertsConfig(QuantizationConfigMixin):
    """`from_pretrained(path, quantization_config=HybridExpertsConfig(weights="int8"))`.

    Takes the settings of `HybridExpertsSettings`. Raises SettingsError that lists every problem.
    """

    def __init__(self, **settings: Any) -> None:
        settings.pop("quant_method", None)
        self.quant_method = METHOD  # type: ignore[assignment]
        # The quantization_config of the checkpoint's own config.json.
        self.published: dict[str, Any] = settings.pop("published", None) or {}
        # What the model is loaded for, where that is known: for the memory plan.
        self.outline: TrainingOutline | None = None
        self.settings = HybridExpertsSettings.from_mapping(settings)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From the dictionary of a saved config.json."""
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The settings, our method's name and the checkpoint's own quantization."""
        published = {"published": self.published} if self.published else {}
        return {"quant_method": METHOD, **self.settings.as_dict(), **published}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings})"


_merge_stock = AutoHfQuantizer.merge_quantization_configs


def _merge_configs(cls: type, found: Any, given: Any) -> Any:
    """A checkpoint that is quantized already: ours reads it, so ours is the one in force."""
    if not isinstance(given, HybridExpertsConfig):
        return _merge_stock(found, given)
    given.published = own_quantization(found)
    return given


# Transformers has no other place where one quantizer can take the checkpoint of another.
setattr(AutoHfQuantizer, "merge_quantization_configs", classmethod(_merge_configs))  # noqa: B010


def _swap_experts(
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
        # Some families initialize the stock experts' parameters from their block, by name.
        parent._is_hf_initialized = True
        swapped[path] = (hybrid, layer)
    model.register_load_state_dict_pre_hook(refuse_other_layers)
    model.register_load_state_dict_pre_hook(refuse_other_vocabulary)
    model.save_pretrained = _refuse_saving
    if runtime.settings.activations == "keep":
        keep_activations(model)
    # PEFT takes our empty LoRA layers for an adapter that is already there.
    warnings.filterwarnings(
        "ignore", message="You are trying to modify a model with PEFT for a second time"
    )
    return swapped


def _refuse_saving(*args: Any, **kwargs: Any) -> None:
    """Stands for save_pretrained, which would write a checkpoint without experts."""
    raise UnsupportedModelError(
        "save_pretrained: the packed experts of a hybrid model are not written to a checkpoint. "
        "Save the adapter, with save_pretrained of the PeftModel; merge it into the original "
        "checkpoint with `kt-sft export recipe.yaml`"
    )


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
        self._checkpoint: PublishedCheckpoint | None = None
        self._stacks: dict[str, Stack] = {}
        self._layers: list[FoundExperts] = []
        self._shapes: Shapes = {}

    def update_tp_plan(self, config: Any) -> Any:
        """Asked before anything is built: sizes that no model has would take minutes and memory.

        Raises CheckpointError.
        """
        sizes, where = config.to_dict(), str(getattr(config, "_name_or_path", "") or "config.json")
        refuse_absurd(sizes, where)
        if any((Path(where) / name).is_file() for name in (INDEX_NAME, SINGLE_NAME)):
            tensors = SafetensorsCheckpoint(checkpoint_files(where))
            refuse_more_layers(sizes, len(list(tensors)), where)
        return super().update_tp_plan(config)

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
        # Transformers takes shard names from an index as they are; nothing was opened yet.
        folders = {Path(file).parent for file in self._files}
        if len(folders) > 1:
            raise CheckpointError(
                f"the checkpoint's index names files in {len(folders)} folders: "
                f"{', '.join(sorted(map(str, folders)))}; expected plain names in one"
            )
        self._layers = find_experts(model)
        self._checkpoint = PublishedCheckpoint(
            SafetensorsCheckpoint(self._files), self.quantization_config.published
        )
        self._stacks = ModelKeys(model).stacks(self._checkpoint)
        settings = self.quantization_config.settings
        runtime = ExpertsRuntime(settings)
        _swap_experts(model, self._layers, runtime)
        self._shapes = shapes_of(model)
        refuse_misfits(model, self._shapes, self._stacks, self._checkpoint)
        outline = self.quantization_config.outline
        if outline is not None:
            peft_injection.refuse_targets(model, outline.targets, outline.rank)
        plan = plan_of(model, self._layers, self._source, settings, outline)
        check_memory(plan, settings)
        runtime.planned = plan.of("machine") + plan.of("host"), host_memory_bytes()
        # The experts' keys have no parameter any more; they are not an accident to warn of.
        unexpected = _expert_keys(model, self._layers)
        if self._checkpoint.quantized:
            unexpected += [COMPANION_KEYS]
            # Weights in codes go by other names on disk; they are filled in after loading.
            weights = [rf"^{re.escape(name)}$" for name in self._quantized_rest()]
            _ignore(model, "_keys_to_ignore_on_load_missing", weights)
        _ignore(model, "_keys_to_ignore_on_load_unexpected", unexpected)
        return model

    def _source(self, layer: FoundExperts) -> CheckpointSource:
        """How the experts of a layer are read."""
        assert self._checkpoint is not None
        return CheckpointSource(self._checkpoint, layer, self._stacks)

    def _quantized_rest(self) -> dict[str, str]:
        """Parameter -> key on disk of every weight in codes that is no routed expert's.

        Raises CheckpointError where Transformers would put such weights together.
        """
        assert self._checkpoint is not None
        coded = set(self._checkpoint.quantized)
        experts = {
            layer.tensor_path(part) for layer in self._layers for part in layer.kind.parts.values()
        }
        rest = {}
        for name, stack in self._stacks.items():
            keys = stack.keys()
            if name in experts or not coded.intersection(keys):
                continue
            if len(keys) != 1 or stack.conversion or stack.per_expert:
                raise CheckpointError(
                    f"{name}: made of {len(keys)} quantized tensors, which kt_sft cannot put "
                    "together; convert the checkpoint to bf16"
                )
            rest[name] = keys[0]
        return rest

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        checkpoint = self._checkpoint
        assert checkpoint is not None
        refuse_loaded_misfits(model, self._shapes)
        for name, key in self._quantized_rest().items():
            parameter = model.get_parameter_or_buffer(name)
            if parameter.device.type == "meta":
                raise CheckpointError(
                    f"{name}: is quantized in the checkpoint and offloaded by device_map, where it "
                    "cannot be filled in; leave it on a device, or use a bf16 checkpoint"
                )
            with torch.no_grad():
                parameter.copy_(checkpoint.dequantized(key))
        layers, stacks = self._layers, self._stacks
        experts = CheckpointExperts(
            Path(self._files[0]).parent.name,
            self._files,
            layers,
            self.quantization_config.published,
            lambda: {la.hybrid_path: CheckpointSource(checkpoint, la, stacks) for la in layers},
        )
        place_experts(hybrid_experts_of(model), experts)
        self._layers, self._stacks, self._checkpoint = [], {}, None
        return model

    def is_serializable(self) -> bool:
        """The packed experts are not written; `save_pretrained` is replaced by what says so."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Gradients flow through the experts to the hidden states, the router and LoRA."""
        return True


def _ignore(model: PreTrainedModel, attribute: str, patterns: list[str]) -> None:
    """Adds to a model's patterns of keys, a list in Transformers 5.6 and a set in later ones."""
    known = getattr(model, attribute)
    container = set if isinstance(known, set) else list
    setattr(model, attribute, container([*(known or []), *patterns]))


def _expert_keys(model: PreTrainedModel, layers: list[FoundExperts]) -> list[str]:
    """Patterns of the stock experts' parameters, with or without the base model's prefix."""
    patterns = set()
    for layer in layers:
        for part in (*layer.kind.parts.values(), *layer.kind.biases.values()):
            owner = layer.tensor_path(part).rpartition(".")[0]
            owner = re.escape(owner.removeprefix(f"{model.base_model_prefix}."))
            patterns.add(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", owner) + r"\.")
    return sorted(patterns)


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
    layers = find_experts(base)
    sources = {layer.hybrid_path: ModuleSource(layer) for layer in layers}
    swapped = _swap_experts(base, layers, ExpertsRuntime(settings))
    for path, (hybrid, _) in swapped.items():
        hybrid.weights = new_layer(hybrid, sources[path])
        # The stock weights go layer by layer, so that the peak is one copy and one layer.
        sources[path].release()
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
                    config=config,
                )
                layer.set_adapter(peft_model.active_adapters, inference_mode=config.inference_mode)
