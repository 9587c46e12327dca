"""Prints the errors of every weight format and compute mode as a Markdown table.

    python scripts/error_table.py

Relative Frobenius norms: of the packed weights against the given ones, and of a layer's output and
input gradient against fp64 on the packed weights. The outliers are 4 channels of weights,
activations and output gradients made 100 times larger.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from kt_sft.kernels import PROJECTIONS, Engine, ExpertWeights, Gate, WeightLayout

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from layer_calls import run_backward, run_forward
from reference import Experts64

FORMATS = {
    "int8": ("exact", "int8"),
    "int4_g32": ("exact", "int8"),
    "int4_g128": ("exact", "int8"),
    "bf16": ("bf16",),
}
EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, TOP_K = 4, 1024, 512, 128, 2


def relative(got: Tensor, want: Tensor) -> float:
    """The norm of the difference over the norm."""
    want = want.detach()
    return float((got.double() - want).norm() / want.norm())


def measure(stored: str, compute: str, outliers: bool) -> tuple[float, float, float]:
    """Errors of weights, output and input gradient."""
    g = torch.Generator().manual_seed(0)
    engine = Engine(2)
    weights = ExpertWeights(WeightLayout(EXPERTS, HIDDEN, INTERMEDIATE, stored))
    dense, original = [], []
    for projection in PROJECTIONS:
        outputs, inputs = weights.shape(projection)
        w = torch.randn(EXPERTS, outputs, inputs, generator=g) / inputs**0.5
        if outliers:
            w[:, :, :: inputs // 4] *= 100
        for expert in range(EXPERTS):
            weights.pack(engine, expert, projection, w[expert])
        original.append(w.double().flatten())
        dense.append(torch.stack([weights.unpack(e, projection) for e in range(EXPERTS)]).double())
    hidden_TD, d_out_TD = (torch.randn(TOKENS, HIDDEN, generator=g) for _ in range(2))
    if outliers:
        hidden_TD[:, :: HIDDEN // 4] *= 100
        d_out_TD[:, :: HIDDEN // 4] *= 100
    index_TK = torch.rand(TOKENS, EXPERTS, generator=g).topk(TOP_K).indices
    weight_TK = torch.rand(TOKENS, TOP_K, generator=g)
    arguments = {"compute": compute, "gate": Gate()}
    out, kept, _ = run_forward(
        engine, weights, hidden_TD, index_TK, weight_TK, keep=True, **arguments
    )
    d_hidden, *_ = run_backward(
        engine, weights, hidden_TD, index_TK, weight_TK, d_out_TD, kept, **arguments
    )
    x64 = hidden_TD.double().requires_grad_()
    want = Experts64(tuple(dense))(x64, index_TK, weight_TK.double())
    (want_d,) = torch.autograd.grad(want, x64, d_out_TD.double())
    packed = torch.cat([d.flatten() for d in dense])
    return relative(packed, torch.cat(original)), relative(out, want), relative(d_hidden, want_d)


def main() -> None:
    """One line for each format and mode."""
    sys.stdout.write(
        "| weights, compute | weights | output | d_hidden "
        "| weights, outliers | output, outliers | d_hidden, outliers |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    for stored, modes in FORMATS.items():
        for compute in modes:
            errors = [e for outliers in (False, True) for e in measure(stored, compute, outliers)]
            cells = " | ".join(f"{e:.1e}" for e in errors)
            sys.stdout.write(f"| {stored}, {compute} | {cells} |\n")


if __name__ == "__main__":
    main()
