"""Which of LLaMA-Factory's chat templates a model goes with."""

from __future__ import annotations

from pathlib import Path

# By the type in config.json, where LLaMA-Factory does not know the model's name.
_BY_TYPE = {
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek3",
    "ernie4_5_moe": "ernie_nothink",
    "gemma4": "gemma4",
    "glm4_moe": "glm4_moe",
    "glm4v_moe": "glm4_5v",
    "gpt_oss": "gpt_oss",
    "granitemoe": "granite3",
    "kimi_k2": "moonlight",
    "llama4": "llama4",
    "minimax": "minimax1",
    "minimax_m2": "minimax2",
    "mixtral": "mistral",
    "qwen2_moe": "qwen",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_moe": "qwen3",
    "qwen3_next": "qwen3",
    "qwen3_vl_moe": "qwen3_vl",
}


def template_of(name: str, model_type: str) -> str | None:
    """By the last part of a folder's or the Hub's name, then by the type; None if unknown.

    A base model has none: LLaMA-Factory then takes `default`.
    """
    try:
        from llamafactory.extras.constants import DEFAULT_TEMPLATE, SUPPORTED_MODELS
    except ImportError:
        return _BY_TYPE.get(model_type)
    wanted = Path(name).name.lower()
    for known, places in SUPPORTED_MODELS.items():
        if any(str(place).rpartition("/")[2].lower() == wanted for place in places.values()):
            return DEFAULT_TEMPLATE.get(known)
    return _BY_TYPE.get(model_type)
