"""The settings as Transformers takes them: a quantization configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from kt_sft.checkpoint.published import own_quantization
from kt_sft.config import HybridExpertsSettings
from kt_sft.loading.quantized_rest import rest_config
from kt_sft.planning.outline import TrainingOutline

METHOD = "kt_sft"


@register_quantization_config(METHOD)
class HybridExpertsConfig(QuantizationConfigMixin):
    """`from_pretrained(path, quantization_config=HybridExpertsConfig(weights="int8"))`.

    Takes the settings of `HybridExpertsSettings`, and as `rest` a BitsAndBytesConfig for what is
    beside the routed experts. Raises SettingsError that lists every problem.
    """

    def __init__(self, **settings: Any) -> None:
        settings.pop("quant_method", None)
        self.quant_method = METHOD  # type: ignore[assignment]
        # The quantization_config of the checkpoint's own config.json.
        self.published: dict[str, Any] = settings.pop("published", None) or {}
        rest = settings.pop("rest", None)
        self.rest: BitsAndBytesConfig | None = rest_config(rest) if rest else None
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
        """The settings, our method's name, the rest's and the checkpoint's own quantization."""
        more = {"published": self.published, "rest": self.rest and self.rest.to_dict()}
        given = {name: value for name, value in more.items() if value}
        return {"quant_method": METHOD, **self.settings.as_dict(), **given}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings})"


def merging_ours(stock: Callable) -> Callable:
    """`merge_quantization_configs` for a checkpoint that is quantized already: ours reads it."""

    def merge(cls: type, found: Any, given: Any) -> Any:
        if not isinstance(given, HybridExpertsConfig):
            return stock(cls, found, given)
        given.published = own_quantization(found)
        return given

    return merge
