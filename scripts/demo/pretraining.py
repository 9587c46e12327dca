"""Pre-training of a small mixture-of-experts language model on a CPU within a time budget."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from padded_experts import padded_experts_forward
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

_BAR_FORMAT = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} < {remaining}{postfix}"


@dataclass(frozen=True)
class Recipe:
    """How to train: everything but the model and the text."""

    seconds: float = 290.0
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
    """Measure `model` on `documents` (token ids of `num_bytes` of text), packed as in training."""
    model.eval()
    sequences = _pack(documents, recipe.sequence_length)
    loads = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    nats = 0.0
    for batch in sequences.split(recipe.batch_size):
        loss, router_logits = _forward(model, batch)
        nats += loss.item() * len(batch) / len(sequences)
        chosen = torch.stack(router_logits).topk(model.config.num_experts_per_tok).indices
        loads += F.one_hot(chosen, model.config.num_experts).sum(dim=(1, 2))
    relative = loads / loads.mean(dim=1, keepdim=True)
    tokens_per_byte = sum(map(len, documents)) / num_bytes
    return Evaluation(
        nats_per_token=nats,
        bits_per_byte=nats / math.log(2) * tokens_per_byte,
        busiest_expert=relative.max().item(),
        idlest_expert=relative.min().item(),
    )


def _forward(model: Qwen3MoeForCausalLM, batch: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the mean next-token loss (nats) and every layer's router logits (tokens, experts)."""
    with torch.autocast("cpu", torch.bfloat16, enabled=_computes_in_bfloat16()):
        output = model(input_ids=batch, output_router_logits=True, use_cache=False)
    loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
    return loss, output.router_logits


def _imbalance(model: Qwen3MoeForCausalLM, router_logits: tuple[Tensor, ...]) -> Tensor:
    # Transformers' own sum pools the layers, which lets each of them starve other experts.
    config = model.config
    losses = [
        load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok)
        for logits in router_logits
    ]
    return torch.stack([torch.as_tensor(loss) for loss in losses]).mean()


def _parameter_groups(model: Qwen3MoeForCausalLM, recipe: Recipe) -> list[dict[str, Any]]:
    """Return AdamW's groups: the embeddings, larger by their initialisation, learn faster."""
    embedding, routers, vectors, matrices = [], [], [], []
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            embedding.append(parameter)
        elif "mlp.gate." in name:
            routers.append(parameter)
        elif parameter.ndim == 1:
            vectors.append(parameter)
        else:
            matrices.append(parameter)
    rate = recipe.learning_rate
    return [
        {"params": embedding, "lr": 10 * rate, "weight_decay": 0.0},
        {"params": routers, "lr": 0.1 * rate, "weight_decay": recipe.weight_decay},
        {"params": vectors, "lr": rate, "weight_decay": 0.0},
        {"params": matrices, "lr": rate, "weight_decay": recipe.weight_decay},
    ]


def _schedule(progress: float, warmup: float) -> float:
    return min(1.0, progress / warmup) * 0.5 * (1 + math.cos(math.pi * progress))


def _batches(documents: list[list[int]], recipe: Recipe) -> Iterator[Tensor]:
    """Yield (batch, sequence) token ids without end, the documents in a new order every epoch."""
    shuffled = random.Random(recipe.seed)
    order = list(documents)
    while True:
        shuffled.shuffle(order)
        yield from _pack(order, recipe.sequence_length).split(recipe.batch_size)


def _pack(documents: list[list[int]], sequence_length: int) -> Tensor:
    """Join `documents` and cut them into (sequences, sequence_length); the rest is dropped."""
    tokens = torch.tensor(list(chain.from_iterable(documents)))
    return tokens[: len(tokens) // sequence_length * sequence_length].view(-1, sequence_length)


def _computes_in_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
