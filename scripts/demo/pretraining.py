"""Pre-training of a small mixture-of-experts language model on a CPU within a time budget."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from padded_experts import padded_experts_forward
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func


@dataclass(frozen=True)
class Recipe:
    """How to train: everything but the model and the text."""

    seconds: float = 220.0
    """Wall time of the training loop; the learning rate follows the share of it that has passed."""
    sequence_length: int = 256
    """Tokens of a packed sequence."""
    batch_size: int = 4
    """Packed sequences of an optimizer step."""
    learning_rate: float = 3e-3
    warmup: float = 0.05
    """Share of the time in which the learning rate rises; then it falls along a cosine to zero."""
    weight_decay: float = 0.1
    balance_weight: float = 0.01
    """Weight of the router's load-balancing loss."""
    seed: int = 0


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of held-out documents."""

    nats_per_token: float
    bits_per_byte: float
    busiest_expert: float
    """Largest load of any expert in any layer, as a multiple of an even share."""
    idlest_expert: float
    """Smallest load of any expert in any layer, as a multiple of an even share."""


def prepare(model: Qwen3MoeForCausalLM) -> None:
    """Initialise the embeddings for fast training and choose how `model` computes its experts.

    With embeddings as small as the other weights, the layers' output drowns them in the first
    steps, all tokens look alike to the routers, and most experts starve.
    """
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    if _computes_in_bfloat16():
        ALL_EXPERTS_FUNCTIONS.register("padded", padded_experts_forward)
        model.config._experts_implementation = "padded"


def pretrain(model: Qwen3MoeForCausalLM, documents: list[list[int]], recipe: Recipe) -> int:
    """Train `model` in place on `documents` (token ids) and return the number of tokens seen."""
    optimizer = torch.optim.AdamW(_parameter_groups(model, recipe), betas=(0.9, 0.95), fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    batches = _batches(documents, recipe)
    model.train()
    tokens = 0
    smoothed = math.log(model.config.vocab_size)
    start = time.monotonic()
    with tqdm(total=100, unit="%", desc="pre-training", bar_format=_BAR_FORMAT) as bar:
        while (progress := (time.monotonic() - start) / recipe.seconds) < 1.0:
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * _schedule(progress, recipe.warmup)
            batch = next(batches)
            loss, router_logits = _forward(model, batch)
            (loss + recipe.balance_weight * _imbalance(model, router_logits)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            tokens += batch.numel()
            smoothed += 0.02 * (loss.item() - smoothed)
            bar.set_postfix_str(f"loss {smoothed:.2f}, {tokens / 1e6:.2f} M tokens", refresh=False)
            bar.update(100 * progress - bar.n)
        bar.update(100 - bar.n)
    return tokens


@torch.no_grad()
def evaluate(
    model: Qwen3MoeForCausalLM, documents: list[list[int]], num_bytes: int, recipe: Recipe
) -> Evaluation:
    """Measure `model` on `documents` (token ids), packed as in training; `num_bytes` is their size."""
    model.eval()
    losses, loads = [], []
    for batch in _pack(documents, recipe.sequence_length).split(recipe.batch_size):
        loss, router_logits = _forward(model, batch)
        losses.append(loss.item() * len(batch))
        loads.append(_loads(model, router_logits) * len(batch))
    ...
