"""Builds the demo's base model: a small Qwen3-MoE pre-trained on Python's own documentation.

The folder holds a stock Transformers checkpoint in bfloat16, its tokenizer, and
`training_summary.json`, which also says what the model was built with: a folder built with the same
settings is left as it is.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from corpus import collect, is_held_out
from pretraining import Recipe, evaluate, prepare, pretrain
from tokenizer import encode_documents, train_tokenizer
from transformers import PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed

logger = logging.getLogger(__name__)

SUMMARY = "training_summary.json"
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 192,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
}


def build(out: Path, recipe: Recipe) -> dict[str, Any]:
    """Train the base model, save it to `out`, and return the summary saved beside it."""
    start = time.monotonic()
    set_seed(recipe.seed)
    entries = collect()
    train = [entry.document for entry in entries if not is_held_out(entry)]
    held_out = [entry.document for entry in entries if is_held_out(entry)]
    tokenizer = train_tokenizer(iter(train), ARCHITECTURE["vocab_size"])
    train_ids = encode_documents(tokenizer, train)
    held_out_ids = encode_documents(tokenizer, held_out)
    held_out_bytes = sum(len(document.encode()) for document in held_out)

    model = _new_model(tokenizer)
    prepare(model)
    before = evaluate(model, held_out_ids, held_out_bytes, recipe)
    pretraining_start = time.monotonic()
    tokens_seen = pretrain(model, train_ids, recipe)
    pretraining_seconds = time.monotonic() - pretraining_start
    after = evaluate(model, held_out_ids, held_out_bytes, recipe)

    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.bfloat16().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    summary = {
        "settings": settings(recipe),
        "parameters": model.num_parameters(),
        "active_parameters": _active_parameters(model),
        "corpus_documents": len(train),
        "corpus_tokens": sum(map(len, train_ids)),
        "tokens_seen": tokens_seen,
        "pretraining_seconds": round(pretraining_seconds, 1),
        "total_seconds": round(time.monotonic() - start, 1),
        "held_out_before": asdict(before),
        "held_out_after": asdict(after),
    }
    (partial / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    # Only a finished model takes the final name, so that a killed build is never taken for one.
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    return summary


def settings(recipe: Recipe) -> dict[str, Any]:
    """Return all that determines the model; the text depends on the version of Python."""
    return {
        "architecture": ARCHITECTURE,
        "recipe": asdict(recipe),
        "python": platform.python_version(),
    }


def is_built(out: Path, recipe: Recipe) -> bool:
    """Whether `out` holds a finished model built with the same settings."""
    summary = out / SUMMARY
    return summary.exists() and json.loads(summary.read_text())["settings"] == settings(recipe)


def _new_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        **ARCHITECTURE,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3MoeForCausalLM(config)


def _active_parameters(model: Qwen3MoeForCausalLM) -> int:
    """Return the number of parameters that one token uses, embeddings included."""
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = 1 - model.config.num_experts_per_tok / model.config.num_experts
    return model.num_parameters() - round(experts * idle)


def main() -> None:
    """Build the model that the command line describes, unless it is there already."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument(
        "--seconds", type=float, default=recipe.seconds, help="wall time of the training loop"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's own)")
    arguments = parser.parse_args()
    out: Path = arguments.out
    recipe = replace(recipe, seconds=arguments.seconds)
    if is_built(out, recipe):
        logger.info("%s is up to date", out)
        return
    if out.exists() and not (out / SUMMARY).exists():
        parser.error(f"{out} exists and is not a base model that this script built")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    summary = build(out, recipe)
    before, after = summary["held_out_before"], summary["held_out_after"]
    logger.info(
        "%s: %.1f M parameters, %.2f M tokens in %.0f s; held-out loss %.2f -> %.2f nats per token "
        "(%.2f -> %.2f bits per byte)",
        out,
        summary["parameters"] / 1e6,
        summary["tokens_seen"] / 1e6,
        summary["pretraining_seconds"],
        before["nats_per_token"],
        after["nats_per_token"],
        before["bits_per_byte"],
        after["bits_per_byte"],
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
