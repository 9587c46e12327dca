"""The model of a recipe as its configuration describes it, on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from kt_sft.checkpoint.configuration import read_config
from kt_sft.checkpoint.folder import checkpoint_experts, class_named, described
from kt_sft.checkpoint.layouts import declared_layout, layout_of
from kt_sft.checkpoint.published import own_quantization
from kt_sft.checkpoint.untrusted import reading, refuse_absurd
from kt_sft.config import HybridExpertsSettings
from kt_sft.errors import CheckpointError, SettingsError
from kt_sft.experts import ExpertsRuntime
from kt_sft.families.finding import FoundExperts, find_experts
from kt_sft.files.safetensors import INDEX_NAME, SINGLE_NAME
from kt_sft.kernels import WeightLayout
from kt_sft.kernels.formats import AS_PUBLISHED
from kt_sft.loading.quantized_rest import QuantizedRest
from kt_sft.loading.swap import swap_experts


@dataclass(frozen=True)
class Subject:
    """A model with hybrid experts and without weights.

    name: as the recipe has it. layers: of its stock experts. parameters: of the stock model.
    rest_bytes: of what is beside the experts, where its parameters do not tell (quantization_bit).
    folder: of the checkpoint, if its weights are here. source: where the configuration was read.
    """

    name: str
    config: Any
    model: PreTrainedModel
    layers: list[FoundExperts]
    published: Mapping[str, Any]
    parameters: int
    rest_bytes: int | None
    folder: Path | None
    source: str | Path
    model_type: str

    @classmethod
    def of(
        cls,
        name: str,
        dtype: torch.dtype | None = None,
        bits: int | None = None,
        *,
        double: bool = True,
        expert_lora: bool | str = True,
    ) -> Subject:
        """From a folder with a config.json, such a file, or a name of the Hub.

        dtype: that of the checkpoint, if not given. bits: quantization_bit of the recipe; double:
        double_quantization. expert_lora: of the section. Raises UnsupportedModelError,
        CheckpointError, SettingsError.
        """
        path = Path(name)
        path = path.parent if path.name == "config.json" else path
        config, model_class = _from_hub(name) if not path.is_dir() else _from_folder(path)
        source = str(path) if path.is_dir() else name
        written, _ = PretrainedConfig.get_config_dict(source)
        model_type = str(written.get("model_type", config.model_type))
        published = own_quantization(getattr(config, "quantization_config", None))
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with reading(name), torch.device("meta"):
            dtype = dtype or getattr(config.get_text_config(), "dtype", None) or torch.bfloat16
            model = model_class._from_config(config, dtype=dtype)
        parameters = sum(p.numel() for p in model.parameters())
        layers = find_experts(model)
        settings = HybridExpertsSettings(expert_lora=expert_lora)
        swap_experts(model, layers, ExpertsRuntime(settings))
        here = any((path / file).is_file() for file in (INDEX_NAME, SINGLE_NAME))
        subject = cls(
            path.resolve().name if path.is_dir() else name,
            config,
            model,
            layers,
            published,
            parameters,
            None,
            path if here else None,
            path if path.is_dir() else name,
            model_type,
        )
        return subject if bits is None else subject.in_bits(bits, double=double)

    def in_bits(self, bits: int, *, double: bool = True) -> Subject:
        """The same with what is beside the experts in so many. Raises SettingsError."""
        # A copy: the layers are replaced in place.
        model = Subject.of(str(self.source), self.dtype).model
        quantized = QuantizedRest(_bits(bits, double))
        quantized.replace_layers(model, {"": 0})
        return replace(self, rest_bytes=quantized.parameter_bytes(model, self.dtype.itemsize))

    @cached_property
    def in_four_bits(self) -> Subject:
        """`in_bits(4)`, made once: many settings are tried with it."""
        return self.in_bits(4)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters beside the experts."""
        table: Any = self.model.get_input_embeddings()
        found: torch.dtype = table.weight.dtype
        return found

    @property
    def in_experts(self) -> int:
        """Parameters of all routed experts."""
        return self.parameters - sum(p.numel() for p in self.model.parameters())

    def published_layout(self, layer: FoundExperts) -> WeightLayout:
        """What `weights: checkpoint` means, by the files, or without them by config.json.

        Raises CheckpointError.
        """
        if self.folder is None:
            return declared_layout(layer, self.published)
        with torch.device("cpu"):
            source = checkpoint_experts(self.folder).sources[layer.hybrid_path]
            return layout_of(source, AS_PUBLISHED)


def attention_channels(text: Any) -> float:
    """Of queries and values of a layer, the mean of both; text: the configuration."""
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    width = getattr(text, "head_dim", None) or text.hidden_size // max(1, heads)
    if getattr(text, "qk_nope_head_dim", None):
        width = (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim) / 2
    return float(heads * width)


def _bits(bits: int, double: bool) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if bits == 4:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=double)
    raise SettingsError(f"quantization_bit: got {bits}, expected 4 or 8")


def _from_folder(folder: Path) -> tuple[Any, type[PreTrainedModel]]:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json there; give the folder of a checkpoint")
    return described(folder)


def _from_hub(name: str) -> tuple[Any, type[PreTrainedModel]]:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SettingsError(f"model: got {name!r}, there is no such folder")
    try:
        config = read_config(name)
    except OSError as error:
        raise SettingsError(
            f"model: got {name!r}, which is no folder here and cannot be read from the Hub "
            f"({str(error).splitlines()[0]}); give the folder of a checkpoint, or one that holds "
            "its config.json alone"
        ) from error
    refuse_absurd(config.to_dict(), name)
    return config, class_named(config, name)
