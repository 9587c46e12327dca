"""Single kernels of every instruction set against numpy: integer stages to the last bit."""

import numpy as np
import pytest

from kt_sft.kernels import isa_report
from kt_sft.kernels._core import single

ISAS = [name for name, missing in isa_report() if not missing]
RNG = np.random.default_rng(0)


def test_some_isa_beside_portable_runs_here() -> None:
    assert "portable" in ISAS
    assert len(ISAS) >= 2, "this machine runs the portable kernels only; nothing is compared"


def panel_u8(blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """(packed bytes, weights [64 * blocks, 32] as q + 128)."""
    weights = RNG.integers(0, 256, (64 * blocks, 32), dtype=np.uint8)
    # [blocks][2 halves][16 k4][16 n][4 kk]
    packed = weights.reshape(blocks, 16, 4, 2, 16).transpose(0, 3, 1, 4, 2)
    return np.ascontiguousarray(packed).reshape(-1), weights


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", range(1, 15))
def test_dot_u8s8_is_exact(isa: str, rows: int) -> None:
    for blocks in (1, 3, 8):
        packed, weights = panel_u8(blocks)
        a = RNG.integers(-128, 128, (rows, 64 * blocks), dtype=np.int8)
        want = a.astype(np.int64) @ weights.astype(np.int64)
        assert np.array_equal(single.dot_u8s8(isa, a, packed), want)


@pytest.mark.parametrize("isa", ISAS)
def test_dot_u8s8_extremes_do_not_saturate(isa: str) -> None:
    blocks = 1028  # the longest contraction that the contract allows
    packed = np.full(blocks * 2048, 255, dtype=np.uint8)
    a = np.full((2, blocks * 64), -128, dtype=np.int8)
    want = -128 * 255 * 64 * blocks
    assert want > -(2**31)
    assert np.all(single.dot_u8s8(isa, a, packed) == want)


def bf16(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(h: np.ndarray) -> np.ndarray:
    return (h.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", range(1, 15))
def test_dot_bf16(isa: str, rows: int) -> None:
    for blocks in (1, 5):
        k = 64 * blocks
        weights = bf16(RNG.standard_normal((k, 32)))
        packed = np.ascontiguousarray(weights.reshape(k // 2, 2, 32).transpose(0, 2, 1))
        a = bf16(RNG.standard_normal((rows, k)))
        got = single.dot_bf16(isa, a, packed.reshape(-1))
        x, w = from_bf16(a).astype(np.float64), from_bf16(weights).astype(np.float64)
        # fp32 accumulation of k products.
        bound = 2.0**-24 * (k + 1) * (np.abs(x) @ np.abs(w))
        assert np.all(np.abs(got - x @ w) <= bound)


@pytest.mark.parametrize("isa", ISAS)
def test_transposes(isa: str) -> None:
    tile = RNG.integers(0, 256, 1024, dtype=np.uint8)
    weights = tile.reshape(16, 16, 4)  # k4, n, kk
    by_kn = weights.transpose(0, 2, 1).reshape(64, 16)
    want = by_kn.reshape(4, 16, 4, 4).transpose(0, 2, 1, 3)  # piece, n4, k, nn
    assert np.array_equal(single.transpose_u8(isa, tile), want.reshape(4, 256))

    tile16 = RNG.integers(0, 65536, 2048, dtype=np.uint16)
    by_kn = tile16.reshape(32, 32, 2).transpose(0, 2, 1).reshape(64, 32)
    want = by_kn.reshape(2, 32, 16, 2).transpose(0, 2, 1, 3)
    assert np.array_equal(single.transpose_bf16(isa, tile16), want.reshape(2, 1024))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("terms", [1, 2])
def test_quantize_row(isa: str, terms: int) -> None:
    levels = np.float32(127 if terms == 1 else 32639)
    for scale in (1e-20, 1.0, 3e20):
        x = (RNG.standard_normal(192) * scale).astype(np.float32)
        absmax = np.abs(x).max()
        want = np.rint(x * (levels / absmax)).astype(np.int64)
        q, s, sums = single.quantize_row(isa, terms, x)
        q = q.astype(np.int64)
        got = q[0] if terms == 1 else 256 * q[0] + q[1]
        assert np.array_equal(got, want)
        assert np.array_equal(sums, q.sum(axis=1))
        assert s == pytest.approx(absmax / levels, rel=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_quantize_row_hands_on_what_is_not_finite(isa: str, terms: int, bad: float) -> None:
    x = np.ones(64, dtype=np.float32)
    x[17] = bad
    q, scale, sums = single.quantize_row(isa, terms, x)
    assert np.isnan(scale)
    assert not q.any() and not sums.any()


@pytest.mark.parametrize("isa", ISAS)
def test_quantize_zero_row(isa: str) -> None:
    q, scale, sums = single.quantize_row(isa, 2, np.zeros(64, dtype=np.float32))
    assert scale == 0 and not q.any() and not sums.any()


@pytest.mark.parametrize("isa", ISAS)
def test_conversions(isa: str) -> None:
    x = np.concatenate(
        [
            RNG.standard_normal(256) * 10.0 ** RNG.integers(-8, 8, 256),
            [0.0, -0.0, np.inf, -np.inf, np.nan, 65504.0, 65520.0, 6e-8, 2.9e-8, 1e-45, 3.4e38],
        ]
    ).astype(np.float32)
    half, back = single.convert(isa, "float16", x)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    assert np.array_equal(half.view(np.float16), want, equal_nan=True)
    assert np.array_equal(back, want.astype(np.float32), equal_nan=True)
    half, back = single.convert(isa, "bfloat16", x)
    number = ~np.isnan(x)
    assert np.array_equal(half[number], bf16(x[number]))
    assert np.isnan(back[~number]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "quick_gelu"])
def test_activations(isa: str, name: str) -> None:
    import torch
    from reference import activation

    x = np.linspace(-30, 30, 4096, dtype=np.float32)
    value, slope = single.activate(isa, name, x)
    x64 = torch.from_numpy(x).double().requires_grad_()
    want = activation(name, x64)
    (want_slope,) = torch.autograd.grad(want.sum(), x64)
    # The polynomials of exp and erf are good to a few 1e-7 of |x|, or of 1 for the slope.
    assert np.abs(value - want.detach().numpy()).max() < 3e-7 * 30
    assert np.abs(value - want.detach().numpy())[np.abs(x) < 2].max() < 1e-6
    assert np.abs(slope - want_slope.numpy()).max() < 2e-6


@pytest.mark.parametrize("isa", ISAS)
def test_dropout_is_the_same_everywhere_and_keeps_the_mean(isa: str) -> None:
    kept = single.dropout_keep(isa, 12345, 0.25, 0, 65536)
    assert np.array_equal(kept, single.dropout_keep("portable", 12345, 0.25, 0, 65536))
    # 65,536 draws: 5 standard deviations of the mean.
    assert abs(kept.mean() - 1) < 5 * (0.25 / 0.75 / 65536) ** 0.5
    part = single.dropout_keep(isa, 12345, 0.25, 640, 64)
    assert np.array_equal(part, kept[640:704])
    assert not np.array_equal(kept, single.dropout_keep(isa, 12346, 0.25, 0, 65536))


def test_wrong_dtypes_are_refused_not_converted() -> None:
    with pytest.raises(TypeError):
        single.quantize_row("portable", 1, np.ones(64, dtype=np.float64))
    with pytest.raises(TypeError):
        single.dot_u8s8(
            "portable", np.ones((1, 64), dtype=np.int32), np.zeros(2048, dtype=np.uint8)
        )
    with pytest.raises(ValueError):
        single.dot_u8s8("portable", np.ones((1, 60), dtype=np.int8), np.zeros(2048, dtype=np.uint8))
