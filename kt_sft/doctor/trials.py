"""The kernels against fp64 on the same packed bytes, and a step of a tiny model, tried here.

Legend: T tokens, D hidden size, F intermediate size, E experts, K top-k, r LoRA rank.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kt_sft.config import HybridExpertsSettings
from kt_sft.doctor.findings import PROBLEM, Finding
from kt_sft.kernels import (
    PROJECTIONS,
    Call,
    Engine,
    ExpertWeights,
    Gate,
    Inputs,
    LoraFactors,
    WeightLayout,
    backward,
    forward,
    isa_report,
)
from kt_sft.machine.accelerator import current_accelerator

_SECTION = "tried"
_EXPERTS, _HIDDEN, _INTERMEDIATE, _TOP_K, _TOKENS, _RANK = 6, 192, 128, 2, 70, 4
# (weights, compute) -> the relative error that its roundings may make.
_CASES = {
    ("bf16", "bf16"): 2e-2,
    ("int8", "exact"): 2e-3,
    ("int8", "int8"): 8e-2,
    ("int4_g32", "exact"): 2e-3,
}
_REPORT = "please report it with this output"


def kernels() -> Iterator[Finding]:
    """Forward and backward of every instruction set that runs here."""
    for isa, missing in isa_report():
        if missing:
            continue
        errors = {f"{w}/{c}": kernel_error(isa, w, c) for w, c in _CASES}
        wrong = [
            name
            for (name, error), bar in zip(errors.items(), _CASES.values(), strict=True)
            if not error < bar
        ]
        yield Finding(
            _SECTION,
            f"kernels {isa}",
            "errors against fp64: " + ", ".join(f"{n} {e:.0e}" for n, e in errors.items()),
            PROBLEM if wrong else "ok",
            f"{', '.join(wrong)}: wrong results on this CPU; use another instruction set (isa: in "
            f"the section) and {_REPORT}"
            if wrong
            else "",
            errors,
        )


def kernel_error(isa: str, weights: str, compute: str) -> float:
    """The largest relative error of a small layer's output and gradients, LoRA on everything."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    engine = Engine(2, isa)
    packed = ExpertWeights(WeightLayout(_EXPERTS, _HIDDEN, _INTERMEDIATE, weights))
    shapes = {p: packed.shape(p) for p in PROJECTIONS}
    for expert in range(_EXPERTS):
        for p, shape in shapes.items():
            packed.pack(engine, expert, p, normal(*shape) / shape[1] ** 0.5)
    lora = [
        LoraFactors(normal(_EXPERTS, _RANK, n) / n**0.5, normal(_EXPERTS, outputs, _RANK), 0.5)
        for outputs, n in shapes.values()
    ]
    index_TK = torch.rand(_TOKENS, _EXPERTS, generator=generator).topk(_TOP_K).indices
    weight_TK = torch.rand(_TOKENS, _TOP_K, generator=generator)
    hidden_TD, d_out_TD = normal(_TOKENS, _HIDDEN), normal(_TOKENS, _HIDDEN)
    inputs = Inputs(hidden_TD, index_TK, weight_TK, (lora[0], lora[1], lora[2]))
    call = Call(compute, Gate())
    out_TD, kept, _ = forward(engine, packed, call, inputs, keep=True)
    assert kept is not None
    found, _ = backward(engine, packed, call, inputs, d_out_TD, kept)
    got = [out_TD, found.hidden_TD, found.weight_TK]
    got += [t for pair in found.lora if pair is not None for t in pair]
    expected = _reference(packed, inputs, d_out_TD)
    return max(
        float((g.double() - e).norm() / e.norm()) for g, e in zip(got, expected, strict=True)
    )


def _reference(packed: ExpertWeights, inputs: Inputs, d_out_TD: Tensor) -> list[Tensor]:
    """out, d_hidden, d_weight and the LoRA's gradients in fp64, by autograd."""
    hidden_TD = inputs.hidden_TD.double().requires_grad_()
    weight_TK = inputs.weight_TK.double().requires_grad_()
    lora = {
        p: (f.a.double().requires_grad_(), f.b.double().requires_grad_(), f.scaling)
        for p, f in zip(PROJECTIONS, inputs.lora, strict=True)
        if f is not None
    }

    def linear(p: str, expert: int, x: Tensor) -> Tensor:
        a, b, scaling = lora[p]
        y = functional.linear(x, packed.unpack(expert, p).double())
        return y + scaling * functional.linear(functional.linear(x, a[expert]), b[expert])

    out_TD = torch.zeros_like(hidden_TD)
    for expert in range(packed.experts):
        token, choice = torch.where(inputs.index_TK == expert)
        x = hidden_TD[token]
        gated = functional.silu(linear("gate_proj", expert, x)) * linear("up_proj", expert, x)
        y = linear("down_proj", expert, gated) * weight_TK[token, choice, None]
        out_TD = out_TD.index_add(0, token, y)
    leaves = [hidden_TD, weight_TK, *(t for a, b, _ in lora.values() for t in (a, b))]
    return [out_TD.detach(), *torch.autograd.grad(out_TD, leaves, d_out_TD.double())]


def training_step() -> Iterator[Finding]:
    """One step of a tiny model with and without hybrid experts, where a training would run."""
    device = current_accelerator() or torch.device("cpu")
    try:
        start = time.perf_counter()
        stock, hybrid = (_trained(device, hybrid=is_hybrid) for is_hybrid in (False, True))
        seconds = time.perf_counter() - start
    except Exception as error:  # whatever it is, a person wants to know before a long run
        yield Finding(
            _SECTION,
            f"training on {device.type}",
            f"failed: {type(error).__name__}: {error}",
            PROBLEM,
            f"the packages above may not fit together; if they are the tested ones, {_REPORT}",
        )
        return
    apart = max(abs(a - b) for a, b in zip(stock, hybrid, strict=True))
    right = apart < 1e-3 and stock[1] < stock[0]
    yield Finding(
        _SECTION,
        f"training on {device.type}",
        f"a tiny model's loss {hybrid[0]:.4f} -> {hybrid[1]:.4f} in one step, stock Transformers "
        f"and PEFT {stock[0]:.4f} -> {stock[1]:.4f}; {seconds:.1f} s",
        "ok" if right else PROBLEM,
        "" if right else f"the same step gives another result than stock; {_REPORT}",
        {"stock": stock, "hybrid": hybrid},
    )


def _trained(device: torch.device, *, hybrid: bool) -> tuple[float, float]:
    """Loss before and after one step of AdamW on the LoRA of attention."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from kt_sft.loading import hybridize

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    config = Qwen3MoeConfig(**sizes)
    with torch.random.fork_rng():
        base: Any = Qwen3MoeForCausalLM(config)
        for parameter in base.parameters():  # what bf16 experts hold is the same to the bit
            parameter.data = parameter.data.bfloat16().float()
        if hybrid:
            hybridize(base, HybridExpertsSettings(weights="bf16", expert_lora=False, threads=1))
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
        torch.manual_seed(1)
        model = get_peft_model(base, lora).to(device).train()
        ids = torch.arange(60, device=device)[None] % 97
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(2):
            loss = model(input_ids=ids, labels=ids).loss
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return losses[0], losses[1]
