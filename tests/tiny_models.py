"""Tiny random models of each supported family, and a tokenizer and data for LLaMA-Factory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from kt_sft.experts import hybrid_experts_of

VOCAB = 300

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_DEEPSEEK: dict[str, Any] = {
    **_COMMON,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 72,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 2,
    "topk_group": 1,
}
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **_COMMON,
        "moe_intermediate_size": 72,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        **_COMMON,
        "moe_intermediate_size": 72,
        "shared_expert_intermediate_size": 80,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "olmoe": {**_COMMON, "num_experts": 8, "num_experts_per_tok": 2},
    "mixtral": {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    # Transformers 5.6.0 cannot run group_limited_greedy itself: its block lacks num_experts.
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": _DEEPSEEK,
}


def make_model(model_type: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A stock model in fp32 whose experts matter: weights of the size of trained ones."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**FAMILY_CONFIGS[model_type], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Transformers' initial 0.02 would leave the residual stream all but untouched.
            if p.dim() >= 2 and "embed" not in name:
                p.normal_(0, p.shape[-1] ** -0.5)
    return model


def stock_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The stock experts modules by path."""
    return {
        name: m
        for name, m in model.named_modules()
        if name.endswith(".experts") and hasattr(m, "gate_up_proj")
    }


def take_effective_weights(stock: nn.Module, hybrid: nn.Module) -> None:
    """Gives the stock model the weights that the hybrid one computes with."""
    sources = hybrid_experts_of(hybrid)
    targets = stock_experts(stock)
    assert targets.keys() == {n.removeprefix("base_model.model.") for n in sources}
    with torch.no_grad():
        for path, module in sources.items():
            target = targets[path.removeprefix("base_model.model.")]
            for e in range(module.shape.experts):
                gate, up = (module.weights.unpack(e, p) for p in ("gate_proj", "up_proj"))
                target.gate_up_proj[e] = torch.cat([gate, up])
                target.down_proj[e] = module.weights.unpack(e, "down_proj")


def stock_loss(
    stock: nn.Module, lora: dict[str, Tensor], embeds: Tensor, labels: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Loss and logits of the stock model with LoRA folded into its expert parameters."""
    parameters = {}
    for path, module in stock_experts(stock).items():
        delta = {
            p: scaling * lora[f"{path}.{p}.lora_B"] @ lora[f"{path}.{p}.lora_A"]
            for p in ("gate_proj", "up_proj", "down_proj")
        }
        parameters[f"{path}.gate_up_proj"] = module.gate_up_proj + torch.cat(
            [delta["gate_proj"], delta["up_proj"]], dim=1
        )
        parameters[f"{path}.down_proj"] = module.down_proj + delta["down_proj"]
    out = functional_call(stock, parameters, kwargs={"inputs_embeds": embeds, "labels": labels})
    return out.loss, out.logits


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of VOCAB entries with ChatML's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 4], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_dataset(folder: Path) -> None:
    """SFT, preference pairs, plain text and KTO labels in LLaMA-Factory's formats."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    sft = [
        {"instruction": f"say {words[i % 7]} {i % 5}", "input": "", "output": words[i % 7] * 3}
        for i in range(96)
    ]
    pairs = [
        {
            "instruction": row["instruction"],
            "input": "",
            "chosen": row["output"],
            "rejected": "no " * (i % 3 + 1),
        }
        for i, row in enumerate(sft)
    ]
    texts = [{"text": f"{row['instruction']} {row['output']}"} for row in sft]
    labelled = [
        {"instruction": row["instruction"], "output": row["output"], "label": i % 2 == 1}
        for i, row in enumerate(sft)
    ]
    (folder / "texts.json").write_text(json.dumps(texts))
    (folder / "labelled.json").write_text(json.dumps(labelled))
    (folder / "sft.json").write_text(json.dumps(sft))
    (folder / "pairs.json").write_text(json.dumps(pairs))
    info = {
        "sft": {"file_name": "sft.json"},
        "pairs": {
            "file_name": "pairs.json",
            "ranking": True,
            "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
        },
        "texts": {"file_name": "texts.json", "columns": {"prompt": "text"}},
        "labelled": {
            "file_name": "labelled.json",
            "columns": {"prompt": "instruction", "response": "output", "kto_tag": "label"},
        },
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
