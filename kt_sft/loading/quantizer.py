"""Loading through Transformers: a quantizer that swaps the experts before any weight is read."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from kt_sft.checkpoint.folder import CheckpointExperts, sources_of
from kt_sft.checkpoint.keys import ModelKeys
from kt_sft.checkpoint.layouts import layout_of
from kt_sft.checkpoint.published import COMPANION_KEYS, PublishedCheckpoint
from kt_sft.checkpoint.sources import CheckpointSource, Stack
from kt_sft.checkpoint.untrusted import refuse_absurd, refuse_more_layers
from kt_sft.errors import CheckpointError, UnsupportedModelError
from kt_sft.experts import ExpertsRuntime, hybrid_experts_of
from kt_sft.experts.residents import place_residents
from kt_sft.families.finding import FoundExperts, find_experts
from kt_sft.files.safetensors import (
    INDEX_NAME,
    SINGLE_NAME,
    SafetensorsCheckpoint,
    checkpoint_files,
)
from kt_sft.kernels import WeightLayout
from kt_sft.kernels.formats import AS_PUBLISHED
from kt_sft.loading import peft_injection
from kt_sft.loading.adapter_folders import identify_base
from kt_sft.loading.config import METHOD, HybridExpertsConfig
from kt_sft.loading.host_embeddings import move_embeddings, require_table
from kt_sft.loading.placing import place_experts
from kt_sft.loading.quantized_rest import QuantizedRest
from kt_sft.loading.rest_of_model import Shapes, refuse_loaded_misfits, refuse_misfits, shapes_of
from kt_sft.loading.swap import swap_experts
from kt_sft.machine.memory import available_memory_bytes, host_memory_bytes
from kt_sft.planning.outline import check_memory, plan_of
from kt_sft.scheduling.residents import ResidentBudget

logger = logging.getLogger(__name__)


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
        rest = quantization_config.rest
        self._rest = QuantizedRest(rest) if rest is not None else None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """What the quantizer of the rest needs. Raises ImportError."""
        if self._rest is not None:
            self._rest.quantizer.validate_environment(*args, **kwargs)

    def update_device_map(self, device_map: Any) -> Any:
        """As the quantizer of the rest wants it."""
        if self._rest is None:
            return super().update_device_map(device_map)
        return self._rest.quantizer.update_device_map(device_map)

    def adjust_max_memory(self, max_memory: Any) -> Any:
        """As the quantizer of the rest wants it."""
        return (
            max_memory if self._rest is None else self._rest.quantizer.adjust_max_memory(max_memory)
        )

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Of the rest; the experts are not read with the model."""
        rest = self._rest
        return rest is not None and rest.quantizer.param_needs_quantization(model, param_name)

    def get_quantize_ops(self) -> Any:
        """Of the rest."""
        assert self._rest is not None
        return self._rest.quantizer.get_quantize_ops()

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes of an element."""
        if self._rest is None:
            return super().param_element_size(model, param_name, param)
        return self._rest.quantizer.param_element_size(model, param_name, param)

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
        swap_experts(model, self._layers, runtime)
        self._shapes = shapes_of(model)
        refuse_misfits(model, self._shapes, self._stacks, self._checkpoint)
        outline = self.quantization_config.outline
        if outline is not None:
            peft_injection.refuse_targets(model, outline.targets, outline.rank)
        if settings.embeddings == "host":
            require_table(model)
        rest_bytes = None
        if self._rest is not None:
            self._rest.replace_layers(model, kwargs.get("device_map"))
            size = max((p.element_size() for p in model.parameters()), default=2)
            rest_bytes = self._rest.parameter_bytes(model, size)
        plan = plan_of(model, self._layers, self._published, settings, outline, rest_bytes)
        check_memory(plan, settings)
        runtime.adapters_on_host = plan.adapters == "host"
        if settings.gpu_experts == "auto":
            runtime.resident_budget = ResidentBudget(nbytes=plan.resident_bytes)
        if settings.activations == "auto" and not plan.keeps:
            spare = max(0, plan.spare_host_bytes(available_memory_bytes()))
            runtime.kept.limit_is = lambda: spare
            logger.info(
                "activations: host memory is too small for those of all layers; %.2f GB hold as "
                "many as fit, the others are recomputed",
                spare / 1e9,
            )
        runtime.planned = plan.of("machine") + plan.of("host"), host_memory_bytes()
        runtime.planned_parts = tuple(
            (part.name, part.place, part.nbytes) for part in plan.components if part.nbytes
        )
        # The experts' keys have no parameter any more; they are not an accident to warn of.
        unexpected = _expert_keys(model, self._layers)
        if self._checkpoint.quantized:
            unexpected += [COMPANION_KEYS]
            # Weights in codes go by other names on disk; they are filled in after loading.
            weights = [rf"^{re.escape(name)}$" for name in self._quantized_rest()]
            _ignore(model, "_keys_to_ignore_on_load_missing", weights)
        _ignore(model, "_keys_to_ignore_on_load_unexpected", unexpected)
        return model

    def _published(self, layer: FoundExperts) -> WeightLayout:
        return layout_of(self._source(layer), AS_PUBLISHED)

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
        coded = self._rest.names(model) if self._rest is not None else set()
        readable = {n: s for n, s in self._shapes.items() if n not in coded}
        refuse_loaded_misfits(model, readable)
        from_codes = self._quantized_rest()
        for name, key in from_codes.items():
            if self._rest is not None and name in coded:
                self._rest.fill(model, name, checkpoint.dequantized(key))
                continue
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
            lambda: sources_of(checkpoint, layers, stacks),
        )
        hybrid = hybrid_experts_of(model)
        place_experts(hybrid, experts)
        place_residents(hybrid)
        self._layers, self._stacks, self._checkpoint = [], {}, None
        identify_base(model, from_codes, stored_in_fp16="F16" in checkpoint.plain_dtypes)
        if self._rest is not None:
            self._rest.finish(model)
        if self.quantization_config.settings.embeddings == "host":
            move_embeddings(model)
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
