"""Tiny checkpoints in the published quantized formats, and reference dequantizers of each.

A writer reads a folder as `save_pretrained` leaves it and writes one whose key names, dtypes,
shapes, byte layout and `quantization_config` are those of published checkpoints. A dequantizer
applies the format's formula in fp32. Every product of a stored value and its bf16 or fp16 scale is
exact in fp32, so rounding a reference to the scale's dtype gives the libraries' own result.

No dequantizer shares code with the writers, so that one error cannot hide another.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0

_ROUTED = re.compile(r"\.experts\.\d+\.")
_NOT_QUANTIZED = re.compile(
    r"(norm|embed_tokens|lm_head|\.gate|\.router|shared_expert_gate)\.weight$"
)
# Kimi-K2-Thinking's own list; its router is no nn.Linear and needs no entry.
_KIMI_IGNORE = [
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
]
_MXFP4_UNCONVERTED = [
    "model.layers.*.self_attn",
    "model.layers.*.mlp.router",
    "model.embed_tokens",
    "lm_head",
]
# Nibble i of an AWQ word holds column _AWQ_ORDER[i] of its eight.
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
_FP4_LEVELS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

Tensors = dict[str, Tensor]
# From a linear's stem and fp32 weight [outputs, inputs] to its stored tensors by suffix.
Quantizer = Callable[[str, Tensor], Tensors]


def load_checkpoint(folder: Path) -> Tensors:
    """All tensors of a checkpoint folder, whatever its shards."""
    tensors: Tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(shard))
    return tensors


def linear_stems(tensors: Iterable[str], routed_only: bool = False) -> list[str]:
    """Stems of the linears that releases quantize: attention, dense, shared and routed experts.

    Routers, norms, embeddings and the head are left out. `routed_only` keeps the routed experts.
    """
    stems = [
        name.removesuffix(".weight")
        for name in tensors
        if name.endswith("_proj.weight")
        or name.endswith("_proj_with_mqa.weight")
        or re.search(r"\.w[123]\.weight$", name)
    ]
    assert not any(_NOT_QUANTIZED.search(f"{s}.weight") for s in stems)
    return sorted(s for s in stems if not routed_only or _ROUTED.search(s))


def router_stems(tensors: Iterable[str]) -> list[str]:
    """Stems of the routers, in the order of the layers."""
    names = [
        n.removesuffix(".weight") for n in tensors if re.search(r"\.(gate|router)\.weight$", n)
    ]
    return sorted(names, key=lambda name: int(name.split(".layers.")[1].split(".")[0]))


def _write(source: Path, target: Path, tensors: Tensors, quantization: dict[str, Any]) -> None:
    """Writes tensors and config.json, and copies every other file that holds no weights."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copyfile(file, target / file.name)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    contiguous = {name: t.contiguous() for name, t in tensors.items()}
    save_file(contiguous, target / "model.safetensors", metadata={"format": "pt"})


def _quantized(tensors: Tensors, stems: Iterable[str], quantize: Quantizer) -> Tensors:
    """The checkpoint with the weights of the given linears replaced by their quantized tensors."""
    result = dict(tensors)
    for stem in stems:
        weight = result.pop(f"{stem}.weight").float()
        result.update({f"{stem}.{k}": t for k, t in quantize(stem, weight).items()})
    return result


def _demand(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _to_fp8(scaled: Tensor) -> Tensor:
    """Round to nearest even, saturating: a bare cast would turn overflow into NaN."""
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _to_int32(words: Tensor) -> Tensor:
    """int64 words in [0, 2^32) as the int32 of the same bits."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _pack_rows(values: Tensor, bits: int) -> Tensor:
    """Unsigned [n, m] to int32 [n, m * bits / 32], the first value in the lowest bits."""
    per_word = 32 // bits
    n, m = values.shape
    _demand(m % per_word == 0, f"{m} values do not fill int32 words of {per_word}")
    grouped = values.to(torch.int64).view(n, m // per_word, per_word)
    return _to_int32((grouped << (bits * torch.arange(per_word))).sum(-1))


def _group_minmax(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of every group and zero: [rows, groups] each."""
    rows, cols = weight.shape
    _demand(cols % group_size == 0, f"{cols} inputs are no multiple of group size {group_size}")
    groups = weight.view(rows, cols // group_size, group_size)
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def _spread(per_group: Tensor, group_size: int) -> Tensor:
    """[rows, groups] to [rows, groups * group_size]."""
    return per_group.repeat_interleave(group_size, dim=1)


# fp8 in blocks: DeepSeek-V3, Qwen3-*-FP8


def write_fp8_block(
    source: Path,
    target: Path,
    *,
    block_size: int = 128,
    scale_dtype: torch.dtype = torch.float32,
    list_unconverted: bool = False,
    routed_only: bool = False,
) -> None:
    """`weight` e4m3 [rows, cols], `weight_scale_inv` [ceil(rows/block), ceil(cols/block)].

    DeepSeek stores fp32 scales and lists no modules; Qwen stores bf16 scales and lists the head,
    routers and norms (`list_unconverted`). Transformers' loader demands whole blocks.
    """
    tensors = load_checkpoint(source)

    def quantize(stem: str, weight: Tensor) -> Tensors:
        rows, cols = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -cols % block_size, 0, -rows % block_size))
        blocks = padded.unflatten(1, (-1, block_size)).unflatten(0, (-1, block_size))
        scale = _nonzero((blocks.abs().amax(dim=(1, 3)) / FP8_MAX).to(scale_dtype))
        values = _to_fp8(blocks / scale.float()[:, None, :, None])
        return {
            "weight": values.view(padded.shape)[:rows, :cols],
            "weight_scale_inv": scale,
        }

    config: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [block_size, block_size],
    }
    if list_unconverted:
        norms = [
            n.removesuffix(".weight")
            for n in tensors
            if n.endswith("layernorm.weight") and "." in n
        ]
        config["modules_to_not_convert"] = ["lm_head", *sorted([*router_stems(tensors), *norms])]
    stems = linear_stems(tensors, routed_only)
    _write(source, target, _quantized(tensors, stems, quantize), config)


def dequantize_fp8_block(
    tensors: Mapping[str, Tensor], stem: str, *, block_size: int = 128
) -> Tensor:
    """`weight[r, c] * weight_scale_inv[r // block, c // block]` as fp32 [outputs, inputs]."""
    weight = tensors[f"{stem}.weight"]
    assert weight.dtype == FP8
    rows, cols = weight.shape
    scale = tensors[f"{stem}.weight_scale_inv"].float()
    expanded = scale[torch.arange(rows) // block_size][:, torch.arange(cols) // block_size]
    return weight.float() * expanded


# compressed-tensors


def _weight_args(bits: int, kind: str, strategy: str, **changes: Any) -> dict[str, Any]:
    """The `weights` entry of a config group, with the fields that releases carry."""
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": bits,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": strategy,
        "symmetric": True,
        "type": kind,
        **changes,
    }


def _compressed_tensors_config(
    form: str, weights: dict[str, Any], inputs: dict[str, Any] | None, ignore: list[str]
) -> dict[str, Any]:
    return {
        "config_groups": {
            "group_0": {
                "input_activations": inputs,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": weights,
            }
        },
        "format": form,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def write_fp8_channel(
    source: Path, target: Path, *, scale_dtype: torch.dtype = torch.bfloat16
) -> None:
    """FP8-dynamic releases: `weight` e4m3 [rows, cols], `weight_scale` [rows, 1]."""
    tensors = load_checkpoint(source)

    def quantize(stem: str, weight: Tensor) -> Tensors:
        scale = _nonzero((weight.abs().amax(1, keepdim=True) / FP8_MAX).to(scale_dtype))
        return {"weight": _to_fp8(weight / scale.float()), "weight_scale": scale}

    inputs = _weight_args(8, "float", "token", dynamic=True, observer=None)
    config = _compressed_tensors_config(
        "float-quantized",
        _weight_args(8, "float", "channel"),
        inputs,
        [*router_stems(tensors), "lm_head"],
    )
    _write(source, target, _quantized(tensors, linear_stems(tensors), quantize), config)


def write_fp8_tensor(
    source: Path,
    target: Path,
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
    static_activations: bool = True,
) -> None:
    """FP8 releases: `weight` e4m3 [rows, cols], `weight_scale` [1].

    Static ones also hold an `input_scale` [1] per linear, which plays no part in the weights.
    """
    tensors = load_checkpoint(source)

    def quantize(stem: str, weight: Tensor) -> Tensors:
        scale = _nonzero((weight.abs().amax().view(1) / FP8_MAX).to(scale_dtype))
        stored = {"weight": _to_fp8(weight / scale.float()), "weight_scale": scale}
        if static_activations:
            stored["input_scale"] = torch.full((1,), 0.03125, dtype=scale_dtype)
        return stored

    strategy = "tensor" if static_activations else "token"
    inputs = _weight_args(8, "float", strategy, dynamic=not static_activations)
    config = _compressed_tensors_config(
        "float-quantized",
        _weight_args(8, "float", "tensor"),
        inputs,
        [*router_stems(tensors), "lm_head"],
    )
    _write(source, target, _quantized(tensors, linear_stems(tensors), quantize), config)


def write_int8(source: Path, target: Path, *, scale_dtype: torch.dtype = torch.bfloat16) -> None:
    """W8A8 releases ("int-quantized"): `weight` int8 [rows, cols], `weight_scale` [rows, 1]."""
    tensors = load_checkpoint(source)

    def quantize(stem: str, weight: Tensor) -> Tensors:
        scale = _nonzero((weight.abs().amax(1, keepdim=True) / 127.5).to(scale_dtype))
        values = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
        return {"weight": values, "weight_scale": scale}

    inputs = _weight_args(8, "int", "token", dynamic=True, observer=None)
    config = _compressed_tensors_config(
        "int-quantized",
        _weight_args(8, "int", "channel"),
        inputs,
        [*router_stems(tensors), "lm_head"],
    )
    _write(source, target, _quantized(tensors, linear_stems(tensors), quantize), config)


def dequantize_scaled(tensors: Mapping[str, Tensor], stem: str) -> Tensor:
    """`weight * weight_scale` as fp32 [outputs, inputs]: fp8 or int8, scale [rows, 1] or [1]."""
    weight = tensors[f"{stem}.weight"]
    assert weight.dtype in (FP8, torch.int8)
    scale = tensors[f"{stem}.weight_scale"].float()
    assert scale.shape in ((weight.shape[0], 1), (1,), ())
    return weight.float() * scale


def dequantize_fp8_channel(tensors: Mapping[str, Tensor], stem: str) -> Tensor:
    """See `dequantize_scaled`."""
    return dequantize_scaled(tensors, stem)


def dequantize_fp8_tensor(tensors: Mapping[str, Tensor], stem: str) -> Tensor:
    """See `dequantize_scaled`."""
    return dequantize_scaled(tensors, stem)


def dequantize_int8(tensors: Mapping[str, Tensor], stem: str) -> Tensor:
    """See `dequantize_scaled`."""
    return dequantize_scaled(tensors, stem)


def _write_packed(
    source: Path,
    target: Path,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    routed_only: bool,
    scale_dtype: torch.dtype,
) -> None:
    """The "pack-quantized" format, per group or (None) per row."""
    tensors = load_checkpoint(source)
    half = 2 ** (bits - 1)

    def quantize(stem: str, weight: Tensor) -> Tensors:
        rows, cols = weight.shape
        size = group_size or cols
        low, high = _group_minmax(weight, size)
        if symmetric:
            scale = torch.maximum(-low, high) / ((2 * half - 1) / 2)
        else:
            scale = (high - low) / (2 * half - 1)
        scale = _nonzero(scale.to(scale_dtype))
        zero = torch.zeros_like(low)
        if not symmetric:
            zero = (-half - low / scale.float()).round().clamp(-half, half - 1)
        spread = weight / _spread(scale.float(), size) + _spread(zero, size)
        values = spread.round().clamp(-half, half - 1)
        stored = {
            "weight_packed": _pack_rows(values + half, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor([rows, cols]),
        }
        if not symmetric:
            stored["weight_zero_point"] = _pack_rows((zero + half).T, bits).T
        return stored

    strategy = "group" if group_size else "channel"
    config = _compressed_tensors_config(
        "pack-quantized",
        _weight_args(bits, "int", strategy, group_size=group_size, symmetric=symmetric),
        None,
        _KIMI_IGNORE if routed_only else [*router_stems(tensors), "lm_head"],
    )
    stems = linear_stems(tensors, routed_only)
    _write(source, target, _quantized(tensors, stems, quantize), config)


def write_int4_packed(
    source: Path,
    target: Path,
    *,
    group_size: int = 32,
    symmetric: bool = True,
    routed_only: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Kimi-K2-Thinking: `weight_packed` int32 [rows, cols/8], `weight_scale` [rows, cols/group].

    Also `weight_shape` int64 [2], and if asymmetric `weight_zero_point` int32 [rows/8, cols/group].
    Demands cols % group_size == 0 and cols % 8 == 0 (asymmetric: rows % 8 == 0). W4A16 releases
    quantize attention too: `routed_only=False`, group 128.
    """
    _write_packed(source, target, 4, group_size, symmetric, routed_only, scale_dtype)


def write_int8_packed(
    source: Path,
    target: Path,
    *,
    group_size: int | None = 128,
    routed_only: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """W8A16 releases: as `write_int4_packed` with `weight_packed` int32 [rows, cols/4].

    `group_size` None is the library's W8A16 preset: one scale per row, [rows, 1].
    """
    _write_packed(source, target, 8, group_size, True, routed_only, scale_dtype)


def dequantize_packed(tensors: Mapping[str, Tensor], stem: str) -> Tensor:
    """`(value - zero) * scale` as fp32 [outputs, inputs]; values and zeros are stored + 2^(b-1).

    Value c of a row lies in word c // (32/b) at bit b * (c % (32/b)); zeros are packed so along
    the rows. Bits and group size follow from the shapes.
    """
    rows, cols = tensors[f"{stem}.weight_shape"].tolist()
    packed = tensors[f"{stem}.weight_packed"]
    scale = tensors[f"{stem}.weight_scale"].float()
    assert packed.dtype == torch.int32 and packed.shape[0] == scale.shape[0] == rows
    bits = 32 * packed.shape[1] // cols
    assert bits in (4, 8)
    per_word, mask, half = 32 // bits, 2**bits - 1, 2 ** (bits - 1)
    column = torch.arange(cols)
    value = ((packed[:, column // per_word] >> (bits * (column % per_word))) & mask) - half
    group = column // (cols // scale.shape[1])
    if f"{stem}.weight_zero_point" in tensors:
        row = torch.arange(rows)
        zeros = tensors[f"{stem}.weight_zero_point"]
        zero = ((zeros[row // per_word] >> (bits * (row % per_word))[:, None]) & mask) - half
        value = value - zero[:, group]
    return value.float() * scale[:, group]


def dequantize_int4_packed(tensors: Mapping[str, Tensor], stem: str) -> Tensor:
    """See `dequantize_packed`."""
    return dequantize_packed(tensors, stem)


def dequantize_int8_packed(tensors: Mapping[str, Tensor], stem: str) -> Tensor:
    """See `dequantize_packed`."""
    return dequantize_packed(tensors, stem)


# mxfp4: gpt-oss


def mxfp4_codes(stem: str, weight_EOI: Tensor) -> Tensors:
    """`_blocks` [E, outputs, inputs/32, 16] and `_scales` [E, outputs, inputs/32] of fp32."""
    inputs = weight_EOI.shape[-1]
    _demand(inputs % 32 == 0, f"{inputs} inputs are no multiple of 32")
    groups = weight_EOI.unflatten(-1, (-1, 32))
    amax = groups.abs().amax(-1)
    # The least exponent at which nothing saturates at 6.
    exponent = torch.ceil(torch.log2(_nonzero(amax) / 6)).clamp(-126, 127)
    scaled = groups / torch.exp2(exponent)[..., None]
    levels = torch.tensor(_FP4_LEVELS)
    level = torch.bucketize(scaled.abs().contiguous(), (levels[1:] + levels[:-1]) / 2)
    code = (level + 8 * (scaled < 0)).to(torch.uint8)
    return {
        f"{stem}_blocks": code[..., 0::2] | (code[..., 1::2] << 4),
        f"{stem}_scales": (exponent + 127).to(torch.uint8),
    }


def write_mxfp4(source: Path, target: Path) -> None:
    """gpt-oss: the experts' `gate_up_proj` and `down_proj` become `_blocks` and `_scales`, both u8.

    From [E, inputs, outputs] to blocks [E, outputs, inputs/32, 16] and scales
    [E, outputs, inputs/32]; biases and all else stay. Demands inputs % 32 == 0.
    """
    tensors = load_checkpoint(source)
    result = dict(tensors)
    for name in tensors:
        if not re.search(r"\.experts\.(gate_up|down)_proj$", name):
            continue
        result.update(mxfp4_codes(name, result.pop(name).float().transpose(1, 2)))
    config = {"modules_to_not_convert": _MXFP4_UNCONVERTED, "quant_method": "mxfp4"}
    _write(source, target, result, config)


def dequantize_mxfp4(tensors: Mapping[str, Tensor], stem: str) -> Tensor:
    """`e2m1 * 2^(scale - 127)` as fp32 [experts, outputs, inputs], exact.

    Input 32 g + 2 b is the low nibble of byte b of block g, input 32 g + 2 b + 1 the high one.
    Outputs of `gate_up_proj` alternate gate, up.
    """
    blocks = tensors[f"{stem}_blocks"].int()
    scales = tensors[f"{stem}_scales"].int()
    assert blocks.shape[:-1] == scales.shape
    experts, outputs, groups, width = blocks.shape
    assert width == 16
    column = torch.arange(32 * groups)
    code = blocks.view(experts, outputs, -1)[:, :, column // 2] >> (4 * (column % 2)) & 15
    exponent, mantissa = (code >> 1) & 3, code & 1
    magnitude = torch.where(
        exponent == 0, 0.5 * mantissa, (1 + 0.5 * mantissa) * torch.exp2(exponent - 1.0)
    )
    sign = 1.0 - 2.0 * (code >> 3)
    return sign * magnitude * torch.exp2(scales[:, :, column // 32] - 127.0)


# GPTQ and AWQ


def write_gptq(
    source: Path,
    target: Path,
    *,
    group_size: int = 128,
    desc_act: bool = False,
    symmetric: bool = True,
    checkpoint_format: str = "gptq",
    routed_only: bool = False,
) -> None:
    """`qweight` int32 [in/8, out], `qzeros` int32 [groups, out/8], `scales` fp16 [groups, out].

    Also `g_idx` int32 [in]. Format "gptq" stores zero - 1, "gptq_v2" zero. Demands in % group == 0,
    in % 8 == 0, out % 8 == 0 (the libraries: multiples of 32).
    """
    _demand(checkpoint_format in ("gptq", "gptq_v2"), f"unknown format {checkpoint_format}")
    tensors = load_checkpoint(source)
    shift = int(checkpoint_format == "gptq")

    def quantize(stem: str, weight: Tensor) -> Tensors:
        inputs = weight.shape[1]
        order = torch.arange(inputs)
        if desc_act:
            order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))
        low, high = _group_minmax(weight[:, order], group_size)
        if symmetric:
            scale = _nonzero((2 * torch.maximum(-low, high) / 15).half())
            zero = torch.full_like(low, 8.0)
        else:
            scale = _nonzero(((high - low) / 15).half())
            # A zero of 0 would wrap in format "gptq".
            zero = (-low / scale.float()).round().clamp(shift, 15)
        group = torch.empty(inputs, dtype=torch.int64)
        group[order] = torch.arange(inputs) // group_size
        values = ((weight / scale.float()[:, group]).round() + zero[:, group]).clamp(0, 15)
        return {
            "qweight": _pack_rows(values, 4).T,
            "qzeros": _pack_rows(zero.T - shift, 4),
            "scales": scale.T,
            "g_idx": group.int(),
        }

    config = {
        "bits": 4,
        "checkpoint_format": checkpoint_format,
        "desc_act": desc_act,
        "group_size": group_size,
        "lm_head": False,
        "meta": {"damp_percent": 0.01, "quantizer": ["gptqmodel:2.2.0"], "true_sequential": True},
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": symmetric,
    }
    stems = linear_stems(tensors, routed_only)
    _write(source, target, _quantized(tensors, stems, quantize), config)


def dequantize_gptq(
    tensors: Mapping[str, Tensor], stem: str, *, checkpoint_format: str = "gptq"
) -> Tensor:
    """`(value - zero) * scales[g_idx]` as fp32 [outputs, inputs].

    Value of input i is nibble i % 8 of word i // 8, zero of output o nibble o % 8 of word o // 8,
    lowest first; in format "gptq" zero is that nibble + 1.
    """
    qweight, qzeros = tensors[f"{stem}.qweight"], tensors[f"{stem}.qzeros"]
    scales, g_idx = tensors[f"{stem}.scales"].float(), tensors[f"{stem}.g_idx"].long()
    inputs, outputs = torch.arange(8 * qweight.shape[0]), torch.arange(qweight.shape[1])
    value = (qweight[inputs // 8] >> (4 * (inputs % 8))[:, None]) & 15
    zero = (qzeros[:, outputs // 8] >> (4 * (outputs % 8))) & 15
    zero = zero + int(checkpoint_format == "gptq")
    return ((value - zero[g_idx]).float() * scales[g_idx]).T.contiguous()


def write_awq(
    source: Path,
    target: Path,
    *,
    group_size: int = 128,
    modules_to_not_convert: Sequence[str] | None = None,
    routed_only: bool = False,
) -> None:
    """AWQ's gemm version: `qweight` int32 [in, out/8], `qzeros` int32 [groups, out/8].

    Also `scales` fp16 [groups, out]. Demands in % group == 0 and out % 8 == 0. Entries of
    `modules_to_not_convert` are substrings of names; Mixtral's releases list "gate", which would
    match `gate_proj` elsewhere.
    """
    tensors = load_checkpoint(source)
    if modules_to_not_convert is None:
        mixtral = any(".block_sparse_moe." in name for name in tensors)
        modules_to_not_convert = ("gate",) if mixtral else ("mlp.gate.",)

    def pack(values: Tensor) -> Tensor:
        return _pack_rows(values.unflatten(1, (-1, 8))[..., _AWQ_ORDER].flatten(1), 4)

    def quantize(stem: str, weight: Tensor) -> Tensors:
        _demand(weight.shape[0] % 8 == 0, f"{weight.shape[0]} outputs are no multiple of 8")
        low, high = _group_minmax(weight, group_size)
        scale = _nonzero(((high - low) / 15).half())
        zero = (-low / scale.float()).round().clamp(0, 15)
        spread = (weight / _spread(scale.float(), group_size)).round() + _spread(zero, group_size)
        return {
            "qweight": pack(spread.clamp(0, 15).T),
            "qzeros": pack(zero.T),
            "scales": scale.T,
        }

    config = {
        "bits": 4,
        "group_size": group_size,
        "modules_to_not_convert": list(modules_to_not_convert),
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
    stems = linear_stems(tensors, routed_only)
    _write(source, target, _quantized(tensors, stems, quantize), config)


def dequantize_awq(tensors: Mapping[str, Tensor], stem: str) -> Tensor:
    """`(value - zero) * scale` as fp32 [outputs, inputs].

    Outputs 0 to 7 of a word lie in its nibbles 0, 4, 1, 5, 2, 6, 3, 7, counted from the lowest.
    """
    qweight, qzeros = tensors[f"{stem}.qweight"], tensors[f"{stem}.qzeros"]
    scales = tensors[f"{stem}.scales"].float()
    output = torch.arange(8 * qweight.shape[1])
    bit = 4 * (output % 8 // 2 + 4 * (output % 2))
    value = (qweight[:, output // 8] >> bit) & 15
    zero = (qzeros[:, output // 8] >> bit) & 15
    group = torch.arange(qweight.shape[0]) // (qweight.shape[0] // scales.shape[0])
    return ((value - zero[group]).float() * scales[group]).T.contiguous()


@dataclass(frozen=True)
class QuantizedFormat:
    """One published format.

    `bits_per_weight` counts values, scales and zeros at published sizes, per-row scales over 2048
    inputs, and no `g_idx`. `families` are the model types the writer applies to.
    """

    write: Callable[..., None]
    dequantize: Callable[[Mapping[str, Tensor], str], Tensor]
    bits_per_weight: float
    families: tuple[str, ...] = ("qwen3_moe", "deepseek_v3", "mixtral")


QUANTIZED_FORMATS: Mapping[str, QuantizedFormat] = {
    "fp8_block": QuantizedFormat(write_fp8_block, dequantize_fp8_block, 8 + 32 / 128**2),
    "fp8_block_bf16": QuantizedFormat(
        partial(write_fp8_block, scale_dtype=torch.bfloat16, list_unconverted=True),
        dequantize_fp8_block,
        8 + 16 / 128**2,
    ),
    "fp8_channel": QuantizedFormat(write_fp8_channel, dequantize_fp8_channel, 8 + 16 / 2048),
    "fp8_tensor": QuantizedFormat(write_fp8_tensor, dequantize_fp8_tensor, 8.0),
    "int4_packed": QuantizedFormat(write_int4_packed, dequantize_int4_packed, 4.5),
    "int4_packed_128": QuantizedFormat(
        partial(write_int4_packed, group_size=128, routed_only=False),
        dequantize_int4_packed,
        4 + 16 / 128,
    ),
    "int4_packed_asymmetric": QuantizedFormat(
        partial(write_int4_packed, group_size=128, symmetric=False, routed_only=False),
        dequantize_int4_packed,
        4 + 20 / 128,
    ),
    "int8": QuantizedFormat(write_int8, dequantize_int8, 8 + 16 / 2048),
    "int8_packed": QuantizedFormat(write_int8_packed, dequantize_int8_packed, 8 + 16 / 128),
    "mxfp4": QuantizedFormat(write_mxfp4, dequantize_mxfp4, 4.25, ("gpt_oss",)),
    "gptq": QuantizedFormat(write_gptq, dequantize_gptq, 4 + 20 / 128),
    "gptq_desc_act": QuantizedFormat(
        partial(write_gptq, desc_act=True), dequantize_gptq, 4 + 20 / 128
    ),
    "gptq_v2": QuantizedFormat(
        partial(write_gptq, checkpoint_format="gptq_v2"),
        partial(dequantize_gptq, checkpoint_format="gptq_v2"),
        4 + 20 / 128,
    ),
    "awq": QuantizedFormat(write_awq, dequantize_awq, 4 + 20 / 128),
}
