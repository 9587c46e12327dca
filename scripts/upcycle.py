"""A Mixture-of-Experts model out of a dense one that computes the same (sparse upcycling).

    python scripts/upcycle.py MODEL OUT --experts 8 --top-k 2
    python scripts/upcycle.py folder/model.gguf OUT --noise 0.02

MODEL is a checkpoint of Llama or Mistral: a folder or a Hub name, or a GGUF file (needs the package
`gguf`). Each layer's MLP becomes every one of its experts; a token's weights over its top-k experts
add up to 1, so that whatever the router, which is random, chooses, their sum is the dense layer's
output. OUT is a Mixtral. --noise breaks the symmetry between experts, for trainings that should
tell them apart: their weights are multiplied by 1 + noise * N(0, 1), which costs some loss.

Source: Komatsuzaki et al., Sparse Upcycling, 2022 (arXiv 2212.05055).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# What a Llama and a Mixtral configuration have in common.
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "rope_parameters", "sliding_window", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
# Other model types have the same names of tensors and another arithmetic (Gemma, Granite, SmolLM3).
_KINDS = ("llama", "mistral")
# Settings of a Llama that a Mixtral does not have, and the value that changes nothing.
_ABSENT = {"attention_bias": False, "mlp_bias": False}
# A published Mixtral's names of an expert's projections, and a Llama's.
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_ROUTER_STD = 0.02


def upcycled(
    dense: PreTrainedModel, experts: int, top_k: int, noise: float = 0.0, seed: int = 0
) -> MixtralForCausalLM:
    """A Mixtral in the dense model's dtype; what is not an MLP shares the dense model's memory.

    Raises ValueError for a model that is not of the Llama kind, and for impossible numbers.
    """
    config = dense.config
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: got {top_k}, expected 1 to {experts}, the number of experts")
    wrong = [n for n, plain in _ABSENT.items() if getattr(config, n, plain) not in (None, plain)]
    if config.model_type not in _KINDS or wrong:
        raise ValueError(
            f"model type {config.model_type!r}{' with ' if wrong else ''}{', '.join(wrong)} cannot "
            f"become a Mixtral: expected {' or '.join(_KINDS)} without biases"
        )
    shared = {name: getattr(config, name) for name in _SHARED if hasattr(config, name)}
    random = torch.Generator().manual_seed(seed)
    tensors = dict(dense.state_dict())
    for i in range(config.num_hidden_layers):
        router_ED = torch.randn(experts, config.hidden_size, generator=random) * _ROUTER_STD
        moe = f"model.layers.{i}.block_sparse_moe"
        tensors[f"{moe}.gate.weight"] = router_ED.to(dense.dtype)
        for published, name in _PROJECTIONS.items():
            weight_OI = tensors.pop(f"model.layers.{i}.mlp.{name}.weight")
            for e in range(experts):
                tensors[f"{moe}.experts.{e}.{published}.weight"] = _varied(weight_OI, noise, random)
    # From a state dict nothing is drawn at random first, which takes longer than all the rest.
    model, found = MixtralForCausalLM.from_pretrained(
        None,
        config=MixtralConfig(**shared, num_local_experts=experts, num_experts_per_tok=top_k),
        state_dict=tensors,
        dtype=dense.dtype,
        output_loading_info=True,
    )
    lost, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if lost or unexpected or found["mismatched_keys"]:
        raise ValueError(
            f"model type {config.model_type!r} cannot become a Mixtral: it has {unexpected[:3]}, "
            f"and lacks {lost[:3]}"
        )
    model.generation_config = dense.generation_config
    return model


def _varied(weight_OI: Tensor, noise: float, random: torch.Generator) -> Tensor:
    if not noise:
        return weight_OI
    factor_OI = 1 + noise * torch.randn(weight_OI.shape, generator=random)
    return (weight_OI * factor_OI).to(weight_OI.dtype)


def gguf_tokenizer(folder: str, file: str, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """A GGUF file's tokenizer, whose ends are those of the file's configuration.

    Transformers gives it other ones for some files, with which an answer would never end.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    for token in ("bos", "eos", "pad"):
        number = getattr(config, f"{token}_token_id", None)
        if isinstance(number, int) and 0 <= number < len(tokenizer):
            setattr(tokenizer, f"{token}_token", tokenizer.convert_ids_to_tokens(number))
    return tokenizer


def main() -> None:
    """Reads, changes, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder, a Hub name or a .gguf file")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args()
    if options.out.exists() and any(options.out.iterdir()):
        raise SystemExit(f"upcycle: {options.out} is not empty; give a new folder")
    name, gguf = options.model, ""
    if name.endswith(".gguf"):
        name, gguf = str(Path(name).parent), Path(name).name
    dense = AutoModelForCausalLM.from_pretrained(
        name, dtype=getattr(torch, options.dtype), gguf_file=gguf or None
    )
    try:
        model = upcycled(dense, options.experts, options.top_k, options.noise)
    except ValueError as error:
        raise SystemExit(f"upcycle: {error}") from None
    model.save_pretrained(options.out)
    tokenizer = (
        gguf_tokenizer(name, gguf, dense.config) if gguf else AutoTokenizer.from_pretrained(name)
    )
    tokenizer.save_pretrained(options.out)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{options.out}: {parameters / 1e6:.0f} M parameters, {options.experts} experts a layer")


if __name__ == "__main__":
    main()
