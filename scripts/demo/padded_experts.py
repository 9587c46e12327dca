"""A routed-experts forward pass for bfloat16 CPUs, as one padded batched product per projection.

Transformers' `grouped_mm` multiplies expert by expert on a CPU. As every expert sees another number
of tokens in every step, oneDNN compiles a new bfloat16 kernel for nearly every product, which takes
longer than the product. Padding all experts to one rounded capacity leaves a handful of shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

_CAPACITY_MULTIPLE = 32


def padded_experts_forward(
    experts: Qwen3MoeExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return the experts' weighted sum for each token; same interface as Transformers' own.

    `hidden_states` is (tokens, hidden); `top_k_index` and `top_k_weights` are (tokens, k).
    No token is dropped: the capacity follows the busiest expert.
    """
    tokens, k = top_k_index.shape
    expert = top_k_index.flatten()
    order = expert.argsort(stable=True)
    counts = expert.bincount(minlength=experts.num_experts)
    capacity = -(-int(counts.max()) // _CAPACITY_MULTIPLE) * _CAPACITY_MULTIPLE
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel()) - (counts.cumsum(0) - counts)[expert[order]]
    slot = expert * capacity + rank

    # Unused slots read token 0; nothing reads what they compute.
    source = slot.new_zeros(experts.num_experts * capacity)
    source[slot] = torch.arange(tokens).repeat_interleave(k)
    padded = hidden_states.index_select(0, source).view(experts.num_experts, capacity, -1)
    gate, up = (padded @ experts.gate_up_proj.mT).chunk(2, dim=-1)
    down = (experts.act_fn(gate) * up) @ experts.down_proj.mT
    chosen = down.flatten(0, 1).index_select(0, slot).view(tokens, k, -1)
    return (chosen * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype)
