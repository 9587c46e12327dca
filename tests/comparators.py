"""Comparing kernel results with the fp64 reference; each check has tests that it can fail."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative rounding of one activation, as a fraction of its row's largest value (int modes) or of
# itself (bf16). A uniform rounding error of step s has a standard deviation of s / sqrt(12).
_STEP = {"exact": 1 / 32639, "int8": 1 / 127, "bf16": 2**-8}
_FP32 = 2.0**-23


def tolerance(mode: str, crest: float, stages: int) -> float:
    """Bound of the relative Frobenius error of `stages` products after each other.

    Errors of independent roundings add in squares, and a product keeps the relative error of its
    activations. Rounded rows have an error of crest * step / sqrt(12) of their norm, with crest
    the largest value of a row over its root mean square; bf16 rounds each value by itself. The
    factor 3.5 covers few, noisy rows; fp32 accumulation adds its own share.
    """
    unit = _STEP[mode] / 12**0.5 * (1.0 if mode == "bf16" else crest)
    return 3.5 * stages**0.5 * unit + 64 * _FP32


def crest_factor(*tensors: Tensor) -> float:
    """Largest |value| over root mean square, the worst row of all tensors."""
    worst = 1.0
    for t in tensors:
        rows = t.double().reshape(-1, t.shape[-1])
        rms = rows.pow(2).mean(1).sqrt()
        ratio = (rows.abs().amax(1) / rms.clamp_min(1e-300))[rms > 0]
        if ratio.numel():
            worst = max(worst, float(ratio.max()))
    return worst


def assert_matches(
    got: Tensor,
    want: Tensor,
    bound: float,
    name: str = "result",
    typical: Tensor | None = None,
) -> None:
    """`got` equals `want` within `bound` of its norm, and no element strays by itself.

    `typical` is what the elements would be if nothing cancelled by chance: few inner products may
    come out far below it, but their errors do not.

    NaN and Inf must be where the reference has them. A reference that is mostly zero proves
    nothing and is refused unless both are all zero.
    """
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} != {tuple(want.shape)}"
    if want.numel() == 0:
        return
    finite = torch.isfinite(want)
    assert torch.equal(torch.isfinite(got), finite), f"{name}: NaN or Inf in other places"
    if typical is not None:
        typical = typical[finite]
    got, want = got[finite], want[finite]
    norm = want.norm()
    if norm == 0:
        assert torch.count_nonzero(got) == 0, f"{name}: expected zeros"
        return
    assert torch.count_nonzero(want) * 20 >= want.numel(), f"{name}: reference is mostly zero"
    if typical is not None:
        norm = torch.maximum(norm, typical.norm())
    error = float((got - want).norm() / norm)
    assert error <= bound, f"{name}: relative error {error:.2e} > {bound:.2e}"
    rms = norm / want.numel() ** 0.5
    # A single element may be off by more than the mean: 8 standard deviations, plus its own size.
    stray = ((got - want).abs() / (8 * bound * (rms + want.abs()))).max()
    assert stray <= 1, f"{name}: one element is off by {float(stray):.1f} times the bound"
