"""A tiny configuration of every Mixture-of-Experts family in Transformers 5.6.0, and its model.

Not here: switch_transformers, nllb_moe and doge (refused), vitpose_backbone (a vision model whose
experts are lists of Linear layers), and the talker of qwen3_omni_moe (predicts audio codes; the
whole model has no forward of its own, so its thinker stands for the family).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig

VOCAB = 300

_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_COMMON: dict[str, Any] = {
    **_IDS,
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# For families whose experts have the size `intermediate_size`.
_NARROW: dict[str, Any] = {**_COMMON, "intermediate_size": 72, "num_hidden_layers": 2}
_LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_ROUTED: dict[str, Any] = {
    "moe_intermediate_size": 72,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
}
_GROUPS: dict[str, Any] = {"n_group": 2, "topk_group": 1}
_DEEPSEEK: dict[str, Any] = {
    **_COMMON,
    **_LATENT_ATTENTION,
    **_ROUTED,
    **_GROUPS,
    "first_k_dense_replace": 1,
}
_GLM4: dict[str, Any] = {
    **_COMMON,
    **_ROUTED,
    **_GROUPS,
    "head_dim": 16,
    "first_k_dense_replace": 1,
}
_QWEN3: dict[str, Any] = {
    **_COMMON,
    "head_dim": 16,
    "moe_intermediate_size": 72,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
# One layer of linear attention and one of full attention.
_QWEN3_NEXT: dict[str, Any] = {
    **_QWEN3,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 80,
}
_QWEN3_5: dict[str, Any] = {
    **{k: v for k, v in _QWEN3_NEXT.items() if k not in ("intermediate_size", "norm_topk_prob")},
    # Eight of the 32 dimensions of a head rotate.
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}
_MROPE: dict[str, Any] = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [4, 2, 2],
    "mrope_interleaved": True,
}
_GRANITE: dict[str, Any] = {**_NARROW, "num_local_experts": 4, "num_experts_per_tok": 2}
_GPT_OSS: dict[str, Any] = {
    **_NARROW,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
}
_NEMOTRON: dict[str, Any] = {
    **_COMMON,
    **_ROUTED,
    **_GROUPS,
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "moe", "attention", "moe"],
    "head_dim": 16,
    "moe_shared_expert_intermediate_size": 80,
    "ssm_state_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 8,
    "use_mamba_kernels": False,
}
_LLAMA4: dict[str, Any] = {
    **_NARROW,
    "intermediate_size_mlp": 96,
    "head_dim": 16,
    "num_local_experts": 4,
    "attention_chunk_size": 64,
}
_ARIA: dict[str, Any] = {
    **_NARROW,
    "moe_num_experts": 4,
    "moe_topk": 2,
    "moe_num_shared_experts": 1,
}
_GEMMA4: dict[str, Any] = {
    **_COMMON,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "head_dim": 16,
    "global_head_dim": 16,
    "sliding_window": 8,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 72,
    # As in the published MoE model; it also lets the model run from inputs_embeds alone.
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCAB,
}
_PIXTRAL: dict[str, Any] = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


@dataclass(frozen=True)
class TinyFamily:
    """How to build one family: `AutoConfig.for_model(model_type, **config)` and a class."""

    model_type: str
    config: Mapping[str, Any]
    auto_class: str = "AutoModelForCausalLM"
    #: Number of routed-experts modules in the model.
    moe_layers: int = 2
    #: Experts multiply as `x @ w`: their 3-D tensors are [experts, in, out].
    transposed: bool = False
    notes: str = ""


_IMAGE_TEXT = "AutoModelForImageTextToText"

TINY_FAMILIES: Mapping[str, TinyFamily] = {
    "afmoe": TinyFamily(
        "afmoe",
        {
            **_COMMON,
            "head_dim": 16,
            "num_dense_layers": 1,
            "moe_intermediate_size": 72,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "num_shared_experts": 1,
            "route_scale": 1.5,
            "global_attn_every_n_layers": 2,
            "sliding_window": 8,
        },
    ),
    # Transformers 5.6.0 cannot run group_limited_greedy itself: its block lacks num_experts.
    "deepseek_v2": TinyFamily("deepseek_v2", {**_DEEPSEEK, "topk_method": "greedy"}),
    "deepseek_v3": TinyFamily("deepseek_v3", _DEEPSEEK),
    "dots1": TinyFamily("dots1", {**_GLM4, "norm_topk_prob": True}),
    "ernie4_5_moe": TinyFamily(
        "ernie4_5_moe",
        {
            **_COMMON,
            "moe_intermediate_size": 72,
            "moe_k": 2,
            "moe_num_experts": 8,
            "moe_num_shared_experts": 1,
        },
    ),
    "exaone_moe": TinyFamily(
        "exaone_moe",
        {
            **_COMMON,
            **_GROUPS,
            "head_dim": 16,
            "moe_intermediate_size": 72,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "sliding_window": 8,
            "sliding_window_pattern": 2,
        },
    ),
    "flex_olmo": TinyFamily("flex_olmo", {**_NARROW, "num_experts": 4, "num_experts_per_tok": 2}),
    "gemma4_text": TinyFamily(
        "gemma4_text",
        _GEMMA4,
        notes="experts beside a dense MLP in the layer itself: layers.N.experts, layers.N.router",
    ),
    "glm4_moe": TinyFamily("glm4_moe", {**_GLM4, "use_qk_norm": True}),
    "glm4_moe_lite": TinyFamily(
        "glm4_moe_lite", {**_COMMON, **_LATENT_ATTENTION, **_ROUTED, **_GROUPS}
    ),
    "glm_moe_dsa": TinyFamily(
        "glm_moe_dsa",
        {
            **_COMMON,
            **_LATENT_ATTENTION,
            **_ROUTED,
            **_GROUPS,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "index_topk": 4,
            "index_head_dim": 16,
            "index_n_heads": 2,
        },
    ),
    "hunyuan_v1_moe": TinyFamily(
        "hunyuan_v1_moe", {**_NARROW, "head_dim": 16, "num_experts": 4, "moe_topk": 2}
    ),
    "hy_v3": TinyFamily(
        "hy_v3",
        {
            **_COMMON,
            "head_dim": 16,
            "moe_intermediate_size": 72,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "num_shared_experts": 1,
        },
    ),
    "jamba": TinyFamily(
        "jamba",
        {
            **_NARROW,
            "num_hidden_layers": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "lfm2_moe": TinyFamily(
        "lfm2_moe",
        {
            **_COMMON,
            "moe_intermediate_size": 72,
            "num_dense_layers": 1,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "layer_types": ["conv", "full_attention", "conv"],
        },
    ),
    "minimax": TinyFamily(
        "minimax",
        {
            **_NARROW,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "block_size": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "minimax_m2": TinyFamily(
        "minimax_m2",
        {**_NARROW, "head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 3},
    ),
    # AutoModelForCausalLM of Transformers 5.6.0 does not know mistral4.
    "mistral4": TinyFamily("mistral4", _DEEPSEEK, auto_class="Mistral4ForCausalLM"),
    "mixtral": TinyFamily("mixtral", {**_NARROW, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": TinyFamily("olmoe", {**_NARROW, "num_experts": 8, "num_experts_per_tok": 2}),
    "phimoe": TinyFamily(
        "phimoe",
        {
            **_NARROW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            # With the default 0.01 nearly every weight is 1: no gradient to the router.
            "router_jitter_noise": 0.3,
        },
        notes="in train mode the router samples experts: call eval() for a repeatable forward",
    ),
    "qwen2_moe": TinyFamily(
        "qwen2_moe",
        {
            **_COMMON,
            "num_hidden_layers": 2,
            "moe_intermediate_size": 72,
            "shared_expert_intermediate_size": 80,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_moe": TinyFamily("qwen3_moe", {**_QWEN3, "mlp_only_layers": [0]}),
    "qwen3_next": TinyFamily("qwen3_next", _QWEN3_NEXT),
    "qwen3_5_moe_text": TinyFamily("qwen3_5_moe_text", _QWEN3_5),
    "solar_open": TinyFamily(
        "solar_open",
        {**_COMMON, **_ROUTED, **_GROUPS, "num_hidden_layers": 2, "head_dim": 16},
    ),
    "gpt_oss": TinyFamily(
        "gpt_oss",
        _GPT_OSS,
        transposed=True,
        notes="gate and up interleaved, biases, clamped activation",
    ),
    "openai_privacy_filter": TinyFamily(
        "openai_privacy_filter",
        {**_GPT_OSS, "num_labels": 5},
        auto_class="AutoModelForTokenClassification",
        transposed=True,
        notes="bidirectional; labels are classes of tokens",
    ),
    "nemotron_h": TinyFamily(
        "nemotron_h", _NEMOTRON, notes="experts without a gate: up_proj, relu2, down_proj"
    ),
    "nemotron_h-latent": TinyFamily(
        "nemotron_h",
        {**_NEMOTRON, "moe_latent_size": 32},
        notes="experts see a projection of the hidden states to 32 dimensions",
    ),
    "granitemoe": TinyFamily("granitemoe", _GRANITE),
    "granitemoehybrid": TinyFamily(
        "granitemoehybrid",
        {
            **_GRANITE,
            "shared_intermediate_size": 80,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
    ),
    "granitemoeshared": TinyFamily(
        "granitemoeshared", {**_GRANITE, "shared_intermediate_size": 80}
    ),
    "jetmoe": TinyFamily(
        "jetmoe",
        {
            **{k: v for k, v in _NARROW.items() if k != "num_attention_heads"},
            "kv_channels": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        notes="its attention has routed experts too (self_attention.experts), not counted here",
    ),
    "longcat_flash": TinyFamily(
        "longcat_flash",
        {
            **{k: v for k, v in _COMMON.items() if k != "intermediate_size"},
            **_LATENT_ATTENTION,
            "head_dim": 8,
            "num_layers": 2,
            "num_hidden_layers": 4,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 72,
            "n_routed_experts": 6,
            "zero_expert_num": 2,
            "moe_topk": 3,
            "routed_scaling_factor": 1.5,
        },
        notes="gate_up_proj has rows for the zero experts, down_proj has not",
    ),
    "aria_text": TinyFamily("aria_text", _ARIA, transposed=True),
    "dbrx": TinyFamily(
        "dbrx",
        {
            **_IDS,
            "vocab_size": VOCAB,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            # 5.6.0 reads rope_theta from attn_config too, which has no default for it.
            # Its attention clamps to clip_qkv even where that is the default None.
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            # The router takes ffn_hidden_size for its input size, so it must equal d_model.
            "ffn_config": {
                "hidden_size": 64,
                "ffn_hidden_size": 64,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            },
        },
        notes="w1, v1, w2 are 2-D, [experts * ffn, hidden]",
    ),
    "llama4_text": TinyFamily(
        "llama4_text", {**_LLAMA4, "num_experts_per_tok": 1}, transposed=True
    ),
    "llama4_text-top2": TinyFamily(
        "llama4_text",
        {**_LLAMA4, "num_experts_per_tok": 2},
        transposed=True,
        notes="scores scale the experts' inputs",
    ),
    "qwen3_vl_moe": TinyFamily(
        "qwen3_vl_moe",
        {
            "text_config": {
                **{k: v for k, v in _QWEN3.items() if k != "norm_topk_prob"},
                "num_hidden_layers": 2,
                "rope_parameters": _MROPE,
            },
            "vision_config": {
                **_QWEN_VISION,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            "image_token_id": 290,
            "video_token_id": 291,
            "vision_start_token_id": 292,
            "vision_end_token_id": 293,
        },
        auto_class=_IMAGE_TEXT,
    ),
    "qwen3_omni_moe_thinker": TinyFamily(
        "qwen3_omni_moe_thinker",
        {
            "text_config": {**_QWEN3, "num_hidden_layers": 2, "rope_parameters": _MROPE},
            "vision_config": {
                **_QWEN_VISION,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            "audio_config": {
                "num_mel_bins": 16,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "d_model": 32,
                "max_source_positions": 32,
                "n_window": 4,
                "n_window_infer": 8,
                "output_dim": 64,
                "downsample_hidden_size": 8,
            },
            "audio_token_id": 289,
            "image_token_id": 290,
            "video_token_id": 291,
            "audio_start_token_id": 292,
            "user_token_id": 293,
        },
        auto_class="Qwen3OmniMoeThinkerForConditionalGeneration",
        notes="the whole qwen3_omni_moe has no forward, only generate",
    ),
    "qwen3_5_moe": TinyFamily(
        "qwen3_5_moe",
        {
            "text_config": _QWEN3_5,
            "vision_config": {**_QWEN_VISION, "num_position_embeddings": 16},
            "image_token_id": 290,
            "video_token_id": 291,
            "vision_start_token_id": 292,
            "vision_end_token_id": 293,
        },
        auto_class=_IMAGE_TEXT,
    ),
    "glm4v_moe": TinyFamily(
        "glm4v_moe",
        {
            "text_config": {
                **_GLM4,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                    "mrope_section": [2, 1, 1],
                },
            },
            "vision_config": {**_QWEN_VISION, "image_size": 16},
            "image_token_id": 290,
            "video_token_id": 291,
            "image_start_token_id": 292,
            "image_end_token_id": 293,
            "video_start_token_id": 294,
            "video_end_token_id": 295,
        },
        auto_class=_IMAGE_TEXT,
    ),
    "ernie4_5_vl_moe": TinyFamily(
        "ernie4_5_vl_moe",
        {
            "text_config": {
                **_COMMON,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [3, 3, 2],
                },
                "moe_intermediate_size": [72, 40],
                "moe_k": 2,
                "moe_num_experts": 8,
                "moe_num_shared_experts": 1,
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "patch_size": 4,
            },
            "image_token_id": 290,
            "video_token_id": 291,
            "image_start_token_id": 292,
            "image_end_token_id": 293,
            "video_start_token_id": 294,
            "video_end_token_id": 295,
        },
        auto_class=_IMAGE_TEXT,
        moe_layers=4,
        notes="two experts modules a layer, of unequal size: text_moe and vision_moe",
    ),
    "mistral3-mistral4": TinyFamily(
        "mistral3",
        {
            "text_config": {"model_type": "mistral4", **_DEEPSEEK},
            "vision_config": _PIXTRAL,
            "image_token_index": 290,
            "tie_word_embeddings": False,
        },
        auto_class=_IMAGE_TEXT,
    ),
    "aria": TinyFamily(
        "aria",
        {
            "text_config": {"model_type": "aria_text", **_ARIA},
            "vision_config": {
                "model_type": "idefics3_vision",
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
            },
            "projector_patch_to_query_dict": {16: 4},
            "image_token_index": 290,
        },
        auto_class=_IMAGE_TEXT,
        transposed=True,
    ),
    "llama4": TinyFamily(
        "llama4",
        {
            "text_config": {**_LLAMA4, "num_experts_per_tok": 1},
            "vision_config": {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                # Pixel shuffle by 0.5 makes one token of four patches: 4 * 32.
                "intermediate_size": 128,
                "vision_output_dim": 32,
                "image_size": 16,
                "patch_size": 4,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
            "boi_token_index": 289,
            "eoi_token_index": 291,
            "image_token_index": 290,
        },
        auto_class=_IMAGE_TEXT,
        transposed=True,
    ),
    "gemma4": TinyFamily(
        "gemma4",
        {
            "text_config": _GEMMA4,
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "patch_size": 4,
                "position_embedding_size": 16,
            },
            "audio_config": None,
            "boi_token_id": 289,
            "eoi_token_id": 291,
            "image_token_id": 290,
            "video_token_id": 292,
            "boa_token_id": 293,
            "eoa_token_index": 294,
            "audio_token_id": 295,
        },
        auto_class=_IMAGE_TEXT,
    ),
}

# Parameters that each family initializes in its own way, or that are not matrices.
_OWN_START = ("A_log", "D", "dt_bias", "conv1d.weight", "conv.conv.weight")


def build(name: str, seed: int = 0) -> nn.Module:
    """The stock model of a family in fp32 whose experts matter: weights as large as trained ones.

    The configuration is a fresh copy for each call, and the weights follow from the seed alone.
    """
    family = TINY_FAMILIES[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family.model_type, **deepcopy(dict(family.config)))
    cls = getattr(transformers, family.auto_class)
    make = cls.from_config if family.auto_class.startswith("Auto") else cls._from_config
    model = make(config, dtype=torch.float32)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if "embed" in path or path.endswith(_OWN_START) or not p.requires_grad:
                continue
            if path.endswith("bias"):  # Also an expert's biases, [experts, out].
                p.normal_(0, 0.1)
            elif p.dim() == 3 and ".experts." in path and family.transposed:
                p.normal_(0, p.shape[-2] ** -0.5)
            elif p.dim() > 3:
                p.normal_(0, p[0].numel() ** -0.5)
            elif p.dim() >= 2:
                p.normal_(0, p.shape[-1] ** -0.5)
    return model


def text_inputs(name: str, model: nn.Module, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of a text-only forward that returns a loss.

    Embeddings of two rows of nine tokens, with requires_grad, and labels.
    """
    generator = torch.Generator().manual_seed(seed)
    width = model.get_input_embeddings().embedding_dim
    classes = TINY_FAMILIES[name].config.get("num_labels", VOCAB)
    inputs: dict[str, Any] = {
        "inputs_embeds": torch.randn(2, 9, width, generator=generator).requires_grad_(),
        "labels": torch.randint(0, classes, (2, 9), generator=generator),
    }
    if name == "ernie4_5_vl_moe":
        # Tokens 3 to 6 go to the vision experts, which text alone never reaches.
        inputs["moe_mm_token_type_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0]] * 2)
    return inputs
