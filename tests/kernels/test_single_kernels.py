"""Every kernel of every instruction set against numpy: integer stages to the last bit.

Buffers are off alignment and stand between canaries. `test_every_kernel_is_tested` fails when the
table gains a kernel that no test here calls.
"""

from __future__ import annotations

import inspect
import sys

import numpy as np
import pytest
import torch
from guarded import Guarded, addresses
from isas import EMULATOR, ISAS

from kt_sft.kernels._core import single

RNG = np.random.default_rng(0)
COLS = 32
FP32 = 2.0**-24
PANEL_BYTES = {"u8": 1, "s16": 2, "bf16": 2, "f32": 4}
IN_MEASUREMENTS_ONLY = {"burn_int", "burn_bf16", "burn_fp32"}


def test_some_isa_beside_portable_runs_here() -> None:
    assert "portable" in ISAS
    assert len(ISAS) >= 2, "this machine runs the portable kernels only; nothing is compared"


def test_every_kernel_is_tested() -> None:
    source = inspect.getsource(sys.modules[__name__])
    for name in single.KERNELS:
        assert f"single.{name}(" in source or name in IN_MEASUREMENTS_ONLY, f"{name} has no test"


def pack_panel(weights: np.ndarray, form: str) -> np.ndarray:
    """[64 * blocks, 32] integers or floats as a panel, from the description of PanelForm."""
    k = weights.shape[0]
    if form == "u8":
        by_quads = (weights + 128).astype(np.uint8).reshape(k // 64, 16, 4, 2, 16)
        return np.ascontiguousarray(by_quads.transpose(0, 3, 1, 4, 2)).reshape(-1)
    if form == "f32":
        return np.ascontiguousarray(weights.astype(np.float32)).reshape(-1)
    values = weights.astype(np.int16) if form == "s16" else bf16(weights)
    return np.ascontiguousarray(values.reshape(k // 2, 2, COLS).transpose(0, 2, 1)).reshape(-1)


def split_terms(q: np.ndarray) -> np.ndarray:
    """[rows, k] as high and low bytes, [rows, 2, k]."""
    high = (q + 128) >> 8
    return np.stack([high, q - 256 * high], axis=1).astype(np.int8)


def whole_sums(c: np.ndarray, rows: int, terms: int) -> np.ndarray:
    c = c.astype(np.int64).reshape(rows, terms, COLS)
    return c[:, 0] if terms == 1 else 256 * c[:, 0] + c[:, 1]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("terms", [1, 2])
def test_dot_int_is_exact(isa: str, terms: int) -> None:
    """Every row count, contractions of 1 to 17 blocks, in one go and in two."""
    geometry = single.geometry(isa)
    form, most = geometry["int_panel"], geometry["max_int_rows"][terms - 1]
    levels = 127 if terms == 1 else 32639
    ran = 0
    for rows in range(1, most + 1):
        for blocks in (1, 3, 17) if rows in (1, most) else (2,):
            k = 64 * blocks
            weights = RNG.integers(-128, 128, (k, COLS))
            q = RNG.integers(-levels, levels + 1, (rows, k))
            a = q.astype(np.int16) if form == "s16" else split_terms(q) if terms == 2 else q
            a = Guarded.of(a if form == "s16" else a.astype(np.int8), offset=rows)
            panel = Guarded.of(pack_panel(weights, form), offset=4)
            c = Guarded((rows * terms, COLS), np.int32, offset=4)
            row_bytes = a.array[0].nbytes
            first = blocks // 2
            element = 2 if form == "s16" else 1
            for part, (begin, end) in enumerate([(0, first), (first, blocks)]):
                if begin == end:
                    continue
                single.dot_int(
                    isa, rows, terms, end - begin, a.address + begin * 64 * element, row_bytes,
                    panel.address + begin * 2048 * PANEL_BYTES[form], part > 0 and first > 0,
                    c.address, None,
                )  # fmt: skip
            offset = 128 * q.sum(axis=1, keepdims=True) if form == "u8" else 0
            assert np.array_equal(whole_sums(c.array, rows, terms) - offset, q @ weights)
            for buffer in (a, panel, c):
                buffer.assert_intact()
            ran += 1
    assert ran >= most


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("weight", [-128, 127])
def test_dot_int_extremes_do_not_overflow(isa: str, terms: int, weight: int) -> None:
    form = single.geometry(isa)["int_panel"]
    blocks = 1024  # the longest contraction that the block admits
    k = 64 * blocks
    level = -127 if terms == 1 else -32639
    weights = np.full((k, COLS), weight)
    q = np.full((1, k), level)
    a = q.astype(np.int16) if form == "s16" else split_terms(q) if terms == 2 else q
    a = Guarded.of(a if form == "s16" else a.astype(np.int8))
    panel = Guarded.of(pack_panel(weights, form))
    c = Guarded((terms, COLS), np.int32)
    single.dot_int(
        isa, 1, terms, blocks, a.address, a.array.nbytes, panel.address, False, c.address, None
    )
    offset = 128 * level * k if form == "u8" else 0
    assert np.all(whole_sums(c.array, 1, terms) - offset == weight * level * k)


@pytest.mark.skipif("amx" not in ISAS, reason="this machine neither has AMX nor can emulate it")
def test_amx_instructions_were_executed() -> None:
    before = EMULATOR.amx_emulator_instructions() if EMULATOR else 0
    test_dot_int_is_exact("amx", 2)
    if EMULATOR:
        assert EMULATOR.amx_emulator_instructions() > before + 500


def bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(h: np.ndarray) -> np.ndarray:
    return (h.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("isa", ISAS)
def test_dot_float(isa: str) -> None:
    geometry = single.geometry(isa)
    form, most = geometry["float_panel"], geometry["max_float_rows"]
    for rows in range(1, most + 1):
        for blocks in (1, 5):
            k = 64 * blocks
            weights = from_bf16(bf16(RNG.standard_normal((k, COLS))))
            x = from_bf16(bf16(RNG.standard_normal((rows, k))))
            a = Guarded.of(x.astype(np.float32) if form == "f32" else bf16(x), offset=2 * rows)
            panel = Guarded.of(pack_panel(weights, form), offset=4)
            c = Guarded((rows, COLS), np.float32, offset=4)
            c.array[...] = 1000
            for accumulate in (False, True):
                single.dot_float(
                    isa, rows, blocks, a.address, a.array[0].nbytes, panel.address, accumulate,
                    c.address, None,
                )  # fmt: skip
            want = 2 * (x.astype(np.float64) @ weights.astype(np.float64))
            # fp32 accumulation of 2 k products.
            bound = FP32 * (2 * k + 1) * (np.abs(x) @ np.abs(weights)) * 2
            assert np.all(np.abs(c.array - want) <= bound)
            for buffer in (a, panel, c):
                buffer.assert_intact()


@pytest.mark.parametrize("isa", ISAS)
def test_place_int(isa: str) -> None:
    """A stored half tile, forward and transposed, in the form of the ISA's panel."""
    form = single.geometry(isa)["int_panel"]
    q = RNG.integers(-128, 128, (16, 64))  # n, k
    stored = (q + 128).astype(np.uint8).reshape(16, 16, 4).transpose(1, 0, 2)  # k4, n, kk
    tile = Guarded.of(np.ascontiguousarray(stored), offset=8)
    block = Guarded(2048 * PANEL_BYTES[form], np.uint8)
    single.place_int_forward(isa, tile.address, block.address)
    want = np.zeros((64, COLS), dtype=np.int64)
    want[:, :16] = q.T
    left = pack_panel(want, form)
    mask = pack_panel(np.pad(np.ones((64, 16), dtype=np.int64), ((0, 0), (0, 16))), form)
    used = mask != pack_panel(np.zeros((64, COLS), dtype=np.int64), form)
    got = block.array.view(left.dtype)
    assert np.array_equal(got[used], left[used])
    block.assert_intact()

    width = 256 if form == "u8" else 8 * 128
    pieces = [Guarded(width, np.uint8) for _ in range(4)]
    pointers = addresses(pieces)
    single.place_int_backward(isa, tile.address, pointers.ctypes.data)
    for g, piece in enumerate(pieces):
        part = q[:, 16 * g : 16 * g + 16]  # n, k
        if form == "u8":
            want_piece = (part + 128).astype(np.uint8).reshape(4, 4, 16).transpose(0, 2, 1)
            assert np.array_equal(piece.array.reshape(4, 16, 4), want_piece)
        else:
            want_piece = part.astype(np.int16).reshape(8, 2, 16).transpose(0, 2, 1)
            assert np.array_equal(piece.array.view(np.int16).reshape(8, 64)[:, :32].reshape(
                8, 16, 2), want_piece)  # fmt: skip
        piece.assert_intact()


@pytest.mark.parametrize("isa", ISAS)
def test_place_float(isa: str) -> None:
    form = single.geometry(isa)["float_panel"]
    w = from_bf16(bf16(RNG.standard_normal((64, COLS))))  # k, n
    stored = Guarded.of(pack_panel(w, "bf16"), offset=8)
    block = Guarded(2048 * PANEL_BYTES[form], np.uint8)
    single.place_float_forward(isa, stored.address, block.address)
    want = pack_panel(w, form)
    assert np.array_equal(block.array.view(want.dtype), want)
    pieces = [Guarded(1024 * PANEL_BYTES[form], np.uint8) for _ in range(2)]
    pointers = addresses(pieces)
    single.place_float_backward(isa, stored.address, pointers.ctypes.data)
    for h, piece in enumerate(pieces):
        turned = np.ascontiguousarray(w[32 * h : 32 * h + 32].T)  # n, k
        want = (
            turned.reshape(-1)
            if form == "f32"
            else bf16(turned).reshape(16, 2, 32).transpose(0, 2, 1).reshape(-1)
        )
        assert np.array_equal(piece.array.view(want.dtype), want)
        piece.assert_intact()


@pytest.mark.parametrize("isa", ISAS)
def test_unpack_int4(isa: str) -> None:
    c = RNG.integers(0, 16, (2, 8, 16, 4), dtype=np.uint8)  # group, k4, n, kk
    m = RNG.integers(1, 17, (2, 16), dtype=np.uint8)
    m[0, 0], m[1, 1], c[0, 0, 0, 0], c[0, 0, 0, 1] = 16, 1, 0, 15
    m[1, 3:9] = (m[1, 3:9] % 15 + 1) | 0x80  # levels -7..8
    nibbles = Guarded.of(c[0] | c[1] << 4, offset=4)
    multipliers = [Guarded.of(m[g], offset=1) for g in range(2)]
    tile = Guarded(1024, np.uint8)
    pointers = addresses(multipliers)
    single.unpack_int4(isa, nibbles.address, pointers.ctypes.data, tile.address)
    lowest = np.where(m & 0x80, 7, 8)[:, None, :, None]
    want = (m & 31)[:, None, :, None].astype(int) * (c.astype(int) - lowest) + 128
    assert np.array_equal(tile.array.reshape(2, 8, 16, 4), want)
    tile.assert_intact()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [0, 1, 2, 3], ids=["e4m3", "e2m1", "uint8", "uint4"])
def test_decode_tile(isa: str, kind: int) -> None:
    four_bit = kind in (1, 3)
    codes = np.arange(2048).astype(np.uint8).reshape(32, 64)  # k2, n and kk
    codes = codes & 15 if four_bit else np.where(codes & 0x7F == 0x7F, 1, codes)
    scale = (RNG.standard_normal((2, 64)) * 10.0 ** RNG.integers(-6, 6, (2, 64))).astype(np.float32)
    zero = RNG.integers(0, 16, (2, 64)).astype(np.float32) if kind >= 2 else np.zeros((2, 64), "f4")
    stored = codes[:16] | codes[16:] << 4 if four_bit else codes
    source = Guarded.of(stored, offset=1)
    groups = Guarded.of(np.concatenate([scale, zero]), offset=4)
    tile = Guarded(2048, np.uint16)
    single.decode_tile(isa, kind, source.address, groups.address, tile.address)
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = {
        0: lambda: torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).float().numpy(),
        1: lambda: np.where(codes & 8, -1, 1).astype(np.float32) * levels[codes & 7],
    }.get(kind, lambda: codes.astype(np.float32))()
    exact = (values.reshape(2, 16, 64) - zero[:, None]) * scale[:, None]
    want = torch.from_numpy(exact).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(tile.array.reshape(2, 16, 64), want)
    tile.assert_intact()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group", [32, 128])
def test_quantize_int4_row(isa: str, group: int) -> None:
    random = np.random.default_rng(5)
    for factor in (1e-3, 1.0, 0.0):
        w = (random.standard_normal(1344) * factor).astype(np.float32)
        w[64:96] *= 7
        row, out = Guarded.of(w, offset=4), Guarded(1344, np.uint8)
        count = -(-1344 // group)
        multiplier, scale = Guarded(count, np.uint8), Guarded(1, np.float32)
        single.quantize_int4_row(
            isa, 1344, group, row.address, out.address, multiplier.address, scale.address
        )
        raised, m = multiplier.array >> 7, multiplier.array.astype(int) & 31
        assert (m >= 1).all() and (m + raised <= 16).all() and (out.array <= 15).all()
        step = scale.array[0] * np.repeat(m, group)[:1344]
        got = step * (out.array.astype(int) - 8 + np.repeat(raised, group)[:1344])
        if factor and group == 32:
            assert raised.any()
        # The seven times larger weights spoil the rest of their group of 128.
        bound = 0.15 if group == 32 else 0.25
        assert np.linalg.norm(got - w) <= bound * np.linalg.norm(w)
        out.assert_intact()
        multiplier.assert_intact()


def quantized(isa: str, terms: int, x: np.ndarray, fold: np.ndarray | None = None):
    """(integers, scale, sums) of a row."""
    form = single.geometry(isa)["int_panel"]
    n = x.size
    source = Guarded.of(x.astype(np.float32), offset=4)
    factors = None if fold is None else Guarded.of(fold.astype(np.float32), offset=8)
    out = Guarded(n if form == "s16" else (terms, n), np.int16 if form == "s16" else np.int8)
    scale, sums = Guarded(1, np.float32), Guarded(terms, np.int32)
    single.pack_int_row(
        isa, terms, n, source.address, factors.address if factors else 0, out.address,
        scale.address, sums.address,
    )  # fmt: skip
    for buffer in (out, scale, sums):
        buffer.assert_intact()
    q = out.array.astype(np.int64)
    if form == "s16":
        assert not sums.array.any()
        return q, scale.array[0], None
    assert np.array_equal(sums.array, q.sum(axis=1))
    return (q[0] if terms == 1 else 256 * q[0] + q[1]), scale.array[0], sums.array


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("terms", [1, 2])
def test_pack_int_row(isa: str, terms: int) -> None:
    levels = np.float32(127 if terms == 1 else 32639)
    for factor in (1e-20, 1.0, 3e20):
        x = (RNG.standard_normal(192) * factor).astype(np.float32)
        for fold in (None, RNG.standard_normal(192).astype(np.float32)):
            folded = x if fold is None else x * fold
            absmax = np.abs(folded).max()
            q, scale, _ = quantized(isa, terms, x, fold)
            assert np.array_equal(q, np.rint(folded * (levels / absmax)).astype(np.int64))
            assert scale == pytest.approx(absmax / levels, rel=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_pack_int_row_hands_on_what_is_not_finite(isa: str, terms: int, bad: float) -> None:
    x = np.ones(64, dtype=np.float32)
    x[17] = bad
    q, scale, _ = quantized(isa, terms, x)
    assert np.isnan(scale) and not q.any()


@pytest.mark.parametrize("isa", ISAS)
def test_pack_zero_row(isa: str) -> None:
    q, scale, _ = quantized(isa, 2, np.zeros(64))
    assert scale == 0 and not q.any()


@pytest.mark.parametrize("isa", ISAS)
def test_pack_float_row_and_to_bf16(isa: str) -> None:
    form = single.geometry(isa)["float_panel"]
    x, fold = (Guarded.of(RNG.standard_normal(96).astype(np.float32), offset=4) for _ in range(2))
    for factors in (None, fold):
        out = Guarded(96, np.float32 if form == "f32" else np.uint16, offset=2)
        single.pack_float_row(isa, 96, x.address, factors.address if factors else 0, out.address)
        want = x.array * factors.array if factors else x.array
        assert np.array_equal(out.array, want if form == "f32" else bf16(want))
        out.assert_intact()
    half = Guarded(96, np.uint16, offset=2)
    single.to_bf16_row(isa, 96, x.address, half.address)
    assert np.array_equal(half.array, bf16(x.array))
    half.assert_intact()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("terms", [1, 2])
def test_scale_tile(isa: str, terms: int) -> None:
    rows = 5
    c = Guarded.of(RNG.integers(-(2**28), 2**28, (rows * terms, COLS)).astype(np.int32), offset=4)
    sums = Guarded.of(RNG.integers(-(2**18), 2**18, rows * terms).astype(np.int32))
    row_scale = Guarded.of(RNG.random(rows).astype(np.float32))
    col_scale = Guarded.of(RNG.random(COLS).astype(np.float32), offset=4)
    for columns in (None, col_scale):
        y = Guarded((rows, COLS), np.float32, offset=4)
        single.scale_tile(
            isa, rows, terms, c.address, row_scale.address, sums.address,
            columns.address if columns else 0, y.address,
        )  # fmt: skip
        exact = c.array.astype(np.float64) - 128.0 * sums.array[:, None]
        exact = exact.reshape(rows, terms, COLS)
        exact = exact[:, 0] if terms == 1 else 256 * exact[:, 0] + exact[:, 1]
        want = exact * row_scale.array[:, None] * (columns.array if columns else 1)
        size = np.abs(exact).max() * row_scale.array.max()
        assert np.abs(y.array - want).max() <= 8 * FP32 * size
        y.assert_intact()


@pytest.mark.parametrize("isa", ISAS)
def test_conversions(isa: str) -> None:
    x = np.concatenate(
        [
            RNG.standard_normal(256) * 10.0 ** RNG.integers(-8, 8, 256),
            [0.0, -0.0, np.inf, -np.inf, np.nan, 65504.0, 65520.0, 6e-8, 2.9e-8, 1e-45, 3.4e38],
        ]
    ).astype(np.float32)
    source = Guarded.of(x, offset=4)

    def both_ways(dtype: int, kind: type) -> tuple[np.ndarray, np.ndarray]:
        narrow, back = Guarded(x.size, kind, offset=2), Guarded(x.size, np.float32, offset=4)
        single.from_float_row(isa, x.size, dtype, source.address, narrow.address)
        single.to_float_row(isa, x.size, dtype, narrow.address, back.address)
        narrow.assert_intact()
        back.assert_intact()
        return narrow.array, back.array

    same, back = both_ways(0, np.float32)
    assert np.array_equal(same, x, equal_nan=True) and np.array_equal(back, x, equal_nan=True)
    half, back = both_ways(1, np.uint16)
    number = ~np.isnan(x)
    assert np.array_equal(half[number], bf16(x[number]))
    assert np.isnan(back[~number]).all()
    half, back = both_ways(2, np.float16)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    assert np.array_equal(half, want, equal_nan=True)
    assert np.array_equal(back, want.astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
def test_absmax_and_weight_rows(isa: str) -> None:
    w = RNG.standard_normal(200).astype(np.float32)
    row = Guarded.of(w, offset=4)
    assert single.absmax_row(isa, 200, row.address) == np.abs(w).max()
    out, scale = Guarded(200, np.uint8), Guarded(1, np.float32)
    single.quantize_weight_row(isa, 200, row.address, out.address, scale.address)
    inverse = np.float32(127) / np.abs(w).max()
    assert np.array_equal(out.array, np.rint(w * inverse).astype(int) + 128)
    assert scale.array[0] == pytest.approx(np.abs(w).max() / 127, rel=1e-6)
    out.assert_intact()
    row.array[7] = np.nan
    assert np.isnan(single.absmax_row(isa, 200, row.address))


def activate(isa: str, act: int, alpha: float, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Value and slope: up, dh and the routing weight are 1."""
    rows = x.size // COLS
    gate, one = Guarded.of(x, offset=4), Guarded.of(np.ones_like(x), offset=8)
    weight, d_weight = Guarded.of(np.ones(rows, np.float32)), Guarded.of(np.zeros(rows, np.float32))
    h, dgate, dup = (Guarded(x.shape, np.float32, offset=4) for _ in range(3))
    kind = (act, True, alpha, np.inf, 0.0)
    single.gate_forward(
        isa, kind, (rows, gate.address, one.address, h.address, COLS, 0, 0, 0, False)
    )
    value = h.array.copy()
    single.gate_backward(
        isa, kind,
        (rows, weight.address, one.address, gate.address, one.address, COLS, dgate.address,
         dup.address, COLS, h.address, COLS, d_weight.address, 1, False),
    )  # fmt: skip
    for buffer in (h, dgate, dup, d_weight):
        buffer.assert_intact()
    assert np.array_equal(value, h.array)
    assert np.allclose(d_weight.array, value.reshape(rows, COLS).sum(1), rtol=1e-5, atol=1e-4)
    assert np.array_equal(dup.array, value)
    return value, dgate.array


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("act", "name", "alpha"),
    [(0, "swish", 1.0), (0, "swish", 1.702), (1, "gelu", 1.0), (2, "gelu_tanh", 1.0),
     (3, "relu", 1.0), (4, "relu2", 1.0)],
)  # fmt: skip
def test_activations(isa: str, act: int, name: str, alpha: float) -> None:
    import torch
    from reference import activation

    from kt_sft.kernels import Gate

    x = np.linspace(-30, 30, 4096, dtype=np.float32)
    value, slope = activate(isa, act, alpha, x)
    x64 = torch.from_numpy(x).double().requires_grad_()
    want = activation(Gate(name, alpha=alpha), x64)
    (want_slope,) = torch.autograd.grad(want.sum(), x64)
    # The polynomials of exp and erf are good to a few 1e-7 of |x|, or of 1 for the slope.
    error = np.abs(value - want.detach().numpy())
    assert (error <= 3e-7 * np.maximum(30, want.detach().abs().numpy())).all()
    assert error[np.abs(x) < 2].max() < 1e-6
    assert np.abs(slope - want_slope.numpy()).max() < 4e-6


@pytest.mark.parametrize("isa", ISAS)
def test_rank_kernels(isa: str) -> None:
    for rows, rank, n in [(1, 1, 64), (5, 3, 192), (16, 8, 1088), (19, 12, 640), (33, 64, 64)]:
        x = [Guarded.of(RNG.standard_normal(n).astype(np.float32), 4 * m) for m in range(rows)]
        a = Guarded.of(RNG.standard_normal((rank, n)).astype(np.float32), offset=4)
        pointers = addresses(x)
        dense = np.stack([r.array for r in x]).astype(np.float64)
        ldp = rank + 3
        p = Guarded.of(np.full((rows, ldp), 7, np.float32), offset=4)
        single.rank_project(
            isa, rows, rank, n, pointers.ctypes.data, a.address, n, 0.5, p.address, ldp
        )
        size = np.abs(dense) @ np.abs(a.array.T)
        assert (np.abs(p.array[:, :rank] - 0.5 * dense @ a.array.T) <= FP32 * n * size).all()
        assert (p.array[:, rank:] == 7).all()
        p.assert_intact()

        y = Guarded.of(RNG.standard_normal((rows, COLS)).astype(np.float32), offset=4)
        before = y.array.astype(np.float64)
        single.rank_expand(isa, rows, rank, p.address, ldp, a.address, n, y.address)
        change = p.array[:, :rank].astype(np.float64) @ a.array[:, :COLS]
        size = np.abs(p.array[:, :rank]) @ np.abs(a.array[:, :COLS]) + np.abs(before)
        assert (np.abs(y.array - before - change) <= FP32 * (rank + 2) * size).all()
        y.assert_intact()

        g = Guarded.of(RNG.standard_normal((rank, n)).astype(np.float32), offset=4)
        before = g.array.astype(np.float64)
        single.rank_outer(isa, rows, rank, n, p.address, ldp, pointers.ctypes.data, g.address, n)
        change = p.array[:, :rank].astype(np.float64).T @ dense
        size = np.abs(p.array[:, :rank]).T @ np.abs(dense) + np.abs(before)
        assert (np.abs(g.array - before - change) <= FP32 * (rows + 2) * size).all()
        g.assert_intact()


@pytest.mark.parametrize("isa", ISAS)
def test_tiles_and_sums(isa: str) -> None:
    tile = Guarded.of(RNG.standard_normal((7, COLS)).astype(np.float32), offset=4)
    bias = Guarded.of(RNG.standard_normal(COLS).astype(np.float32), offset=4)
    want = tile.array + bias.array
    single.add_row(isa, 7, bias.address, tile.address)
    assert np.array_equal(tile.array, want)
    tile.assert_intact()
    for stream in (False, True):
        out = Guarded.of(np.zeros((7, 96), np.float32))
        single.store_tile(isa, 7, tile.address, out.address, 96, stream)
        assert np.array_equal(out.array[:, :COLS], want) and not out.array[:, COLS:].any()
        out.assert_intact()

    rows = [Guarded.of(RNG.standard_normal(192).astype(np.float32), 4 * k) for k in range(3)]
    weights = Guarded.of(RNG.standard_normal(3).astype(np.float32))
    pointers, out = addresses(rows), Guarded(192, np.float32, offset=4)
    single.weighted_sum(isa, 3, 192, weights.address, pointers.ctypes.data, out.address)
    exact = sum(w * r.array.astype(np.float64) for w, r in zip(weights.array, rows, strict=True))
    assert np.abs(out.array - exact).max() <= 20 * FP32
    out.assert_intact()
    got = single.dot_row(isa, 192, rows[0].address, rows[1].address)
    exact = rows[0].array.astype(np.float64) @ rows[1].array
    assert abs(got - exact) <= FP32 * 192 * (np.abs(rows[0].array) @ np.abs(rows[1].array))
    rows[2].array[...] = 1.0
    assert single.read_row(isa, 192, rows[2].address) == 192


def kept_by_dropout(isa: str, row_key: int, p: float, first: int, n: int) -> np.ndarray:
    one, out = Guarded.of(np.ones(n, np.float32), offset=4), Guarded(n, np.float32, offset=4)
    key = (row_key, int(p * 2**32), 1 / (1 - p))
    single.dropout_row(isa, key, first, n, one.address, out.address)
    out.assert_intact()
    return out.array


@pytest.mark.parametrize("isa", ISAS)
def test_dropout_is_the_same_everywhere_and_keeps_the_mean(isa: str) -> None:
    kept = kept_by_dropout(isa, 12345, 0.25, 0, 65536)
    assert np.array_equal(kept, kept_by_dropout("portable", 12345, 0.25, 0, 65536))
    # 65,536 draws: 5 standard deviations of the mean.
    assert abs(kept.mean() - 1) < 5 * (0.25 / 0.75 / 65536) ** 0.5
    part = kept_by_dropout(isa, 12345, 0.25, 640, 64)
    assert np.array_equal(part, kept[640:704])
    assert not np.array_equal(kept, kept_by_dropout(isa, 12346, 0.25, 0, 65536))
