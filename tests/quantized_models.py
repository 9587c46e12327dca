"""Tiny models whose sizes suit the groups of every published format, quantized by each of them."""

from __future__ import annotations

from pathlib import Path

import torch
from quantized_checkpoints import QUANTIZED_FORMATS
from tiny_configs import TINY_FAMILIES
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

# Sizes that every format's groups divide; 192 ends in half a block of 128.
_SIZES = {
    "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
_CHANGES = {
    "qwen3_moe": {**_SIZES, "moe_intermediate_size": 192, "intermediate_size": 256},
    "mixtral": {**_SIZES, "intermediate_size": 192},
    "gpt_oss": {**_SIZES, "intermediate_size": 192},
    "deepseek_v3": {
        "hidden_size": 128,
        "moe_intermediate_size": 192,
        "intermediate_size": 256,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    },
}  # fmt: skip
_WIDTH = {
    "qwen3_moe": "moe_intermediate_size", "deepseek_v3": "moe_intermediate_size",
    "mixtral": "intermediate_size", "gpt_oss": "intermediate_size",
}  # fmt: skip


def cases() -> list[tuple[str, str]]:
    return [
        (name, family) for name, known in QUANTIZED_FORMATS.items() for family in known.families
    ]


def make(name: str, family: str) -> nn.Module:
    torch.manual_seed(0)
    tiny = TINY_FAMILIES[family]
    changes = _CHANGES[family]
    if not name.startswith(("fp8", "mxfp4", "int8")) or name == "int8_packed":
        changes = {**changes, _WIDTH[family]: 256}
    config = AutoConfig.for_model(tiny.model_type, **{**tiny.config, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.dim() >= 2 and "embed" not in path:
                p.normal_(0, p.shape[-1] ** -0.5)
    return model


def write(tmp_path: Path, name: str, family: str) -> Path:
    make(name, family).save_pretrained(tmp_path / "plain")
    QUANTIZED_FORMATS[name].write(tmp_path / "plain", tmp_path / name)
    return tmp_path / name
