"""Adapters that earlier versions have written, and the base that they belong to.

The base's weights come from a counter and the parameters' names, so that no library's start values
can change them. `python tests/export/golden.py VERSION` writes the adapters of this version; what
is there is never written again.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

FOLDER = Path(__file__).parent / "golden"
IDS = torch.arange(22).view(2, 11) * 5 % 32
_COMMON = {
    "vocab_size": 32, "hidden_size": 16, "moe_intermediate_size": 12, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
_CONFIGS = {
    "qwen3_moe": {**_COMMON, "intermediate_size": 24, "head_dim": 8, "num_experts": 4},
    "mixtral": {**_COMMON, "intermediate_size": 12, "head_dim": 8, "num_local_experts": 4},
    "deepseek_v3": {
        **_COMMON, "intermediate_size": 24, "n_routed_experts": 4, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    },
}  # fmt: skip
# name -> (family, form, expert_lora)
KINDS = {
    "qwen3_moe": ("qwen3_moe", "adapter", True),
    "qwen3_moe-shared": ("qwen3_moe", "adapter", "shared"),
    "deepseek_v3": ("deepseek_v3", "adapter", True),
    "deepseek_v3-peft-fused": ("deepseek_v3", "peft-fused", True),
    "qwen3_moe-peft-fused-0.18": ("qwen3_moe", "peft-fused-0.18", True),
    "mixtral-vllm": ("mixtral", "vllm", True),
}


def values(name: str, shape: tuple[int, ...]) -> Tensor:
    """The same numbers for a name and shape, for ever."""
    bits = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    flat = torch.from_numpy((bits >> 40).astype(np.float64) / 2**24 - 0.5).float()
    return flat.view(shape)


def base_model(family: str) -> nn.Module:
    """The stock model in fp32."""
    config = AutoConfig.for_model(family, **_CONFIGS[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if p.dim() >= 2:
                p.copy_(values(name, tuple(p.shape)) * 3 * p.shape[-1] ** -0.5)
            elif "norm" in name:
                p.copy_(1 + values(name, tuple(p.shape)) / 5)
    return model


def logits(model: nn.Module) -> Tensor:
    """What a model says to the golden tokens."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def write(version: str) -> None:
    """The adapters of this version, each with the logits of its merged model."""
    import tempfile

    from export_cases import adapted, stock

    from kt_sft.export.command import export_adapter
    from kt_sft.export.merge import export_merged

    for kind, (family, form, expert_lora) in KINDS.items():
        out = FOLDER / version / kind
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            base_model(family).save_pretrained(place / "base")
            model = adapted(base_model(family), expert_lora, r=2, lora_alpha=6)
            for key, p in model.named_parameters():
                if "lora_" in key:
                    p.data = values(key, tuple(p.shape)) * (0.8 if "lora_B" in key else 0.5)
            model.save_pretrained(place / "adapter")
            source = place / "adapter"
            if form != "adapter":
                export_adapter(source, form, place / "form", base=str(place / "base"))
                source = place / "form"
            out.mkdir()
            for file in source.iterdir():
                if file.suffix in (".json", ".safetensors"):
                    (out / file.name).write_bytes(file.read_bytes())
            merged = export_merged(place / "base", [place / "adapter"], place / "merged")
            save_file({"logits": logits(stock(merged))}, out / "expected.safetensors")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    write(sys.argv[1])
