"""How stock models call their routed experts, and the way from there to (hidden, index, weights).

Most modules are called as `experts(hidden [T, D], index [T, K], weights [T, K])`. The rest is here:
conventions of the experts module itself, and of a block around it whose own forward must go.

Legend: T tokens, D hidden size, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# call(experts, *arguments of the stock module) -> its result
Call = Callable[..., Tensor]


def _routed(experts: Any, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    return experts.compute(hidden_TD, index_TK, weight_TK)


def _batched(experts: Any, hidden: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Dbrx: hidden is [B, S, D]."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return experts.compute(flat, index_TK, weight_TK).view(hidden.shape)


def _from_router_logits(experts: Any, hidden_TD: Tensor, logits_TE: Tensor) -> Tensor:
    """Aria: the module itself chooses, softmax over the chosen."""
    top, index_TK = torch.topk(logits_TE, k=experts.top_k, dim=1)
    return experts.compute(hidden_TD, index_TK, top.softmax(-1))


def _with_identity_experts(
    experts: Any, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    """LongCat-Flash: experts from E on return their input."""
    count = experts.shape.experts
    identity = index_TK >= count
    share_T1 = (weight_TK * identity).sum(1, keepdim=True)
    out = experts.compute(hidden_TD, index_TK.clamp(max=count), weight_TK)
    return out + (hidden_TD * share_T1).to(out.dtype)


CALLS: Mapping[str, Call] = {
    "routed": _routed,
    "batched": _batched,
    "from_router_logits": _from_router_logits,
    "with_identity_experts": _with_identity_experts,
}


def _parallel_experts(block: Any, layer_input: Tensor) -> Tensor:
    """Granite and JetMoE: the router returns tokens sorted by expert."""
    hidden_TD = layer_input.reshape(-1, layer_input.shape[-1])
    order_R, _, gate_R, expert_sizes, _ = block.router(hidden_TD)
    sizes = torch.as_tensor(expert_sizes, device=hidden_TD.device)
    experts_R = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    back_R = torch.argsort(order_R)
    shape = (hidden_TD.shape[0], -1)
    out = block.experts(hidden_TD, experts_R[back_R].view(shape), gate_R[back_R].view(shape))
    out = out.view(layer_input.shape)
    bias = getattr(block, "bias", None)
    return out if bias is None else out + bias


def _weighted_inputs(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Llama 4: the routing weight multiplies the expert's input, and every expert sees all tokens.

    A weight of zero gives an output of zero, so that the chosen experts are enough.
    """
    hidden_TD = hidden.reshape(-1, block.hidden_dim)
    scores_TE, logits_TE = block.router(hidden_TD)
    index_TK = torch.topk(logits_TE, block.top_k, dim=1).indices
    score_TK1 = scores_TE.gather(1, index_TK).unsqueeze(-1)
    inputs_RD = (hidden_TD.unsqueeze(1) * score_TK1).reshape(-1, hidden_TD.shape[1])
    ones_R1 = inputs_RD.new_ones(inputs_RD.shape[0], 1)
    routed_RD = block.experts(inputs_RD, index_TK.reshape(-1, 1), ones_R1)
    routed_TD = routed_RD.view(*index_TK.shape, -1).sum(1)
    return block.shared_expert(hidden_TD) + routed_TD, logits_TE


BLOCKS: Mapping[str, Callable[..., Any]] = {
    "parallel_experts": _parallel_experts,
    "weighted_inputs": _weighted_inputs,
}


def redirect_block(block: nn.Module, call: str) -> None:
    """Gives a stock block the forward of BLOCKS that works with its child `experts`.

    The block keeps its children, its hooks and its class, of which it becomes a subclass.
    """
    stock = type(block)
    block.__class__ = type(stock.__name__, (stock,), {"forward": BLOCKS[call]})
