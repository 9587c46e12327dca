"""The quantized formats of published checkpoints, recognized by the tensors that lie side by side.

A quantized tensor appears under the name of the weight it stands for, "x.weight" or
"x.gate_up_proj", and is read as a CodedMatrix: codes and scales as they were published.

Sources: DeepSeek-V3's weights file description (fp8 in blocks), the compressed-tensors library
(fp8, int8 and packed integers), gpt-oss (mxfp4), AutoGPTQ and AutoAWQ (int4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kt_sft.checkpoint.untrusted import reading
from kt_sft.errors import CheckpointError
from kt_sft.files.safetensors import SafetensorsCheckpoint
from kt_sft.kernels import CodedMatrix, Coding

_SCALE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
# The column that nibble i of an AWQ word holds, of its eight.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class PublishedFormat:
    """One row: how the tensors of one weight are named and read.

    companions: suffix -> whether it must be there; the weight's own suffix is the first. weight:
    what takes the suffix's place in the name of the weight. shape and read get the checkpoint, the
    stem and the expert within a tensor over all experts, or None.
    """

    name: str
    companions: Mapping[str, bool]
    weight: str
    applies: Callable[[SafetensorsCheckpoint, str, Mapping[str, Any]], bool]
    shape: Callable[[SafetensorsCheckpoint, str], tuple[int, ...]]
    read: Callable[[SafetensorsCheckpoint, str, int | None, Mapping[str, Any]], CodedMatrix]


# Values of quant_method whose tensors are those of FORMATS.
_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4", "gptq", "awq", "auto-round")
# How AutoRound packs, after the "auto_round:" of its packing_format -> the method that packs so.
_PACKED_AS = {"gptq": "gptq", "auto_gptq": "gptq", "awq": "awq", "auto_awq": "awq"}
# Formats that are not read: name, a suffix of a key, what lies beside it or "", its dtypes or none.
_UNREAD: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("NVFP4", ".weight_packed", ".weight_global_scale", ()),
    ("NVFP4", ".weight", ".weight_scale_2", ("U8",)),
    ("MXFP4 of compressed-tensors", ".weight_packed", ".weight_scale", ("U8",)),
    ("MXFP4 of DeepSeek-V4", ".weight", ".scale", ("I8", "U8")),
    ("FP8 with scales that are powers of two", ".weight", ".scale", ("F8_E4M3",)),
    ("MXFP8", ".weight_scale_inv", ".weight", ("U8",)),
    ("MXFP8", ".weight_scale", ".weight", ("U8",)),
)


def own_quantization(config: Any) -> dict[str, Any]:
    """A checkpoint's own quantization_config, also from a config.json that we have written.

    Raises CheckpointError for what is no mapping.
    """
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        raise CheckpointError(
            f"config.json: quantization_config: got {type(config).__name__}, expected a mapping"
        )
    if config.get("quant_method") == "kt_sft":
        return own_quantization(config.get("published"))
    return dict(config)


def _method(config: Mapping[str, Any]) -> str | None:
    """Whose tensors these are, by quantization_config. Raises CheckpointError."""
    found = config.get("quant_method")
    method = None if found is None else str(getattr(found, "value", found))
    if method == "auto-round":
        packing = str(config.get("packing_format"))
        method = _PACKED_AS.get(packing.rpartition(":")[2])
        if method is None:
            raise CheckpointError(
                f"config.json: quantization_config: packing_format: got {packing}, expected one of "
                f"{', '.join(f'auto_round:{p}' for p in _PACKED_AS)}"
            )
    if method is not None and method not in _METHODS:
        raise CheckpointError(
            f"the checkpoint is quantized with {method!r}, which kt_sft does not read; "
            f"it reads {', '.join(_METHODS)}"
        )
    return method


def _unread(file: SafetensorsCheckpoint, key: str) -> str | None:
    """The name of the format that a key is of, where it is one that is not read."""
    for name, own, beside, dtypes in _UNREAD:
        stem = key.removesuffix(own)
        if stem == key or f"{stem}{beside}" not in file:
            continue
        if not dtypes or file.dtype(key) in dtypes:
            return name
    return None


def _setting(config: Mapping[str, Any], *names: str, default: int) -> int:
    """A whole number of quantization_config, by the first of its names that is there."""
    name = next((n for n in names if n in config), None)
    value = default if name is None else config[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(
            f"config.json: quantization_config: {name}: got {value!r}, expected a whole number"
        )
    return value


def _unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """int32 words to uint8 values along `dim`, the first in the lowest bits."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    last = words.movedim(dim, -1)
    values = (last.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return values.flatten(-2).to(torch.uint8).movedim(-1, dim)


def _scale_name(tensor: Tensor, stem: str) -> str:
    if tensor.dtype not in _SCALE_NAMES:
        raise CheckpointError(f"{stem}: got scales in {tensor.dtype}, expected a float type")
    return _SCALE_NAMES[tensor.dtype]


def _grouped(
    stem: str, codes: Tensor, scales: Tensor, kind: str, block: tuple[int, int]
) -> CodedMatrix:
    """Codes [outputs, inputs] whose scales' shape tells the groups: one, per output, or blocks."""
    outputs, inputs = codes.shape
    # A block that is larger than the weights is one that holds them.
    block = min(block[0], max(outputs, 1)), min(block[1], max(inputs, 1))
    name = _scale_name(scales, stem)
    if scales.numel() == 1:
        scales = scales.reshape(1, 1).expand(outputs, 1)
    rows, columns = scales.shape if scales.dim() == 2 else (scales.shape[0], 1)
    scales = scales.reshape(rows, columns)
    blocks = (-(-outputs // block[0]), -(-inputs // block[1]))
    if (rows, columns) == (outputs, 1):
        coding = Coding(kind, name, 1, 0)
    elif (rows, columns) == blocks:
        coding = Coding(kind, name, *block)
    elif rows == outputs and columns and inputs % columns == 0:
        coding = Coding(kind, name, 1, inputs // columns)
    else:
        raise CheckpointError(
            f"{stem}: got scales of shape {(rows, columns)} for weights {(outputs, inputs)}, "
            f"expected (1,), {(outputs, 1)}, {blocks} in blocks of {block} or whole groups"
        )
    return CodedMatrix(coding, codes, scales)


def _block(config: Mapping[str, Any]) -> tuple[int, int]:
    found = config.get("weight_block_size")
    if found is None:
        return 128, 128
    sizes = list(found) if isinstance(found, list | tuple) else []
    if len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
        raise CheckpointError(
            f"config.json: quantization_config: weight_block_size: got {found!r}, expected two "
            "positive numbers"
        )
    return sizes[0], sizes[1]


def _eight_bits(
    suffix: str,
) -> Callable[[SafetensorsCheckpoint, str, int | None, Mapping[str, Any]], CodedMatrix]:
    """fp8 or int8 in `weight`, its scales under `suffix`."""

    def read(
        file: SafetensorsCheckpoint, stem: str, expert: int | None, config: Mapping[str, Any]
    ) -> CodedMatrix:
        weight, scales = file.part(f"{stem}.weight", expert), file.part(f"{stem}{suffix}", expert)
        codes = weight.contiguous().view(torch.uint8)
        is_int8 = weight.dtype == torch.int8
        kind = "uint8" if is_int8 else "e4m3"
        matrix = _grouped(stem, codes ^ 0x80 if is_int8 else codes, scales, kind, _block(config))
        key = f"{stem}.weight_zero_point"
        zeros = file.part(key, expert).float() if key in file else torch.zeros(1)
        if not zeros.any():
            return matrix
        if not is_int8 or zeros.numel() not in (1, matrix.scales.numel()):
            raise CheckpointError(f"{key}: zero points of this kind are not known to kt_sft")
        shifted = (zeros + 128).to(torch.uint8).reshape(-1, 1)
        return replace(
            matrix,
            coding=replace(matrix.coding, zeros=True),
            zeros=shifted.expand(matrix.scales.numel(), 1).reshape(matrix.scales.shape),
        )

    return read


def _is_eight_bits(file: SafetensorsCheckpoint, stem: str, config: Mapping[str, Any]) -> bool:
    return file.dtype(f"{stem}.weight") in ("F8_E4M3", "I8")


def _read_packed(
    file: SafetensorsCheckpoint, stem: str, expert: int | None, config: Mapping[str, Any]
) -> CodedMatrix:
    """compressed-tensors' packed integers; values and zero points have 2^(b-1) added."""
    outputs, inputs = _packed_shape(file, stem)
    words, scales = file.get(f"{stem}.weight_packed"), file.get(f"{stem}.weight_scale")
    # With 4 bits a word holds 8 weights, with 8 bits 4; the last one may hold fewer.
    bits = next(
        (b for b in (4, 8) if words.dim() == 2 and -(-inputs * b // 32) == words.shape[1]), 0
    )
    if not bits or words.shape[0] != outputs:
        raise CheckpointError(
            f"{stem}: got {tuple(words.shape)} words for weights {(outputs, inputs)}, expected "
            "4 or 8 bits a weight"
        )
    codes = _unpack(words, bits, 1)[:, :inputs]
    if scales.dim() not in (1, 2) or scales.shape[0] != outputs:
        raise CheckpointError(
            f"{stem}.weight_scale: got {tuple(scales.shape)}, expected {outputs} rows"
        )
    groups = scales.reshape(outputs, -1)
    if not groups.shape[1] or inputs % groups.shape[1]:
        raise CheckpointError(f"{stem}: {groups.shape[1]} groups do not divide {inputs} inputs")
    size = inputs // groups.shape[1]
    zeros = None
    if f"{stem}.weight_zero_point" in file:
        zeros = _unpack(file.get(f"{stem}.weight_zero_point"), bits, 0)[:outputs]
    coding = Coding(
        f"uint{bits}",
        _scale_name(scales, stem),
        1,
        size,
        zeros is not None,
    )
    return _by_order(file, f"{stem}.weight_g_idx", CodedMatrix(coding, codes, groups, zeros))


def _by_order(file: SafetensorsCheckpoint, key: str, matrix: CodedMatrix) -> CodedMatrix:
    """`key` gives the group of each input; where they lie apart each input gets its own copy."""
    if key not in file:
        return matrix
    group_of, size = file.get(key).long(), matrix.coding.group_inputs
    unused = bool((group_of < 0).all())
    groups = matrix.scales.shape[1]
    if group_of.shape != matrix.shape[1:] or (
        not unused and not 0 <= int(group_of.min()) <= int(group_of.max()) < groups
    ):
        raise CheckpointError(
            f"{key}: got {tuple(group_of.shape)} groups up to {int(group_of.max())}, expected one "
            f"of 0 to {groups - 1} for each of {matrix.shape[1]} inputs"
        )
    if unused or torch.equal(group_of, torch.arange(matrix.shape[1]) // size):
        return matrix
    return CodedMatrix(
        replace(matrix.coding, group_inputs=1),
        matrix.codes,
        matrix.scales[:, group_of],
        None if matrix.zeros is None else matrix.zeros[:, group_of],
    )


def _packed_shape(file: SafetensorsCheckpoint, stem: str) -> tuple[int, int]:
    found = file.get(f"{stem}.weight_shape")
    sizes = [int(n) for n in found.flatten()[:3]]
    if found.is_floating_point() or len(sizes) != 2 or not all(0 < n < 1 << 24 for n in sizes):
        raise CheckpointError(f"{stem}.weight_shape: got {sizes}, expected two positive numbers")
    return sizes[0], sizes[1]


def _read_mxfp4(
    file: SafetensorsCheckpoint, stem: str, expert: int | None, config: Mapping[str, Any]
) -> CodedMatrix:
    """[outputs, groups, 16] bytes, the even input of a pair in the low nibble."""
    shapes = file.shape(f"{stem}_blocks"), file.shape(f"{stem}_scales")
    if shapes[0][:-1] != shapes[1]:
        raise CheckpointError(f"{stem}_scales: got {shapes[1]}, expected {shapes[0][:-1]}")
    blocks, scales = file.part(f"{stem}_blocks", expert), file.part(f"{stem}_scales", expert)
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(1)
    return CodedMatrix(Coding("e2m1", "e8m0", 1, 32), codes, scales)


def _mxfp4_shape(file: SafetensorsCheckpoint, stem: str) -> tuple[int, ...]:
    experts, outputs, groups, half = file.shape(f"{stem}_blocks")
    return experts, outputs, groups * half * 2


def _four_bits_only(stem: str, config: Mapping[str, Any]) -> None:
    bits = _setting(config, "bits", "w_bit", default=4)
    if bits != 4:
        raise CheckpointError(f"{stem}: got {bits} bits a weight, expected 4")


def _read_gptq(
    file: SafetensorsCheckpoint, stem: str, expert: int | None, config: Mapping[str, Any]
) -> CodedMatrix:
    """qweight [inputs / 8, outputs], packed along inputs; version 1 stores zero points less 1."""
    _four_bits_only(stem, config)
    codes = _unpack(file.get(f"{stem}.qweight"), 4, 0).T
    zeros = _unpack(file.get(f"{stem}.qzeros"), 4, 1).T
    if config.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = (zeros + 1) & 15
    scales = file.get(f"{stem}.scales").T
    size = _group_size(stem, config, codes.shape[1], scales.shape[1])
    matrix = CodedMatrix(_int4_coding(stem, scales, size), codes, scales, zeros)
    return _by_order(file, f"{stem}.g_idx", matrix)


def _group_size(stem: str, config: Mapping[str, Any], inputs: int, groups: int) -> int:
    """As config.json says, -1 for whole rows; the last group may be shorter."""
    said = _setting(config, "group_size", "q_group_size", default=-(-inputs // max(groups, 1)))
    size = inputs if said <= 0 else min(said, inputs)
    if groups < 1 or -(-inputs // size) != groups:
        raise CheckpointError(
            f"{stem}: got {groups} groups of scales for {inputs} inputs, expected groups of {size}"
        )
    return size


def _int4_coding(stem: str, scales: Tensor, size: int) -> Coding:
    return Coding("uint4", _scale_name(scales, stem), 1, size, zeros=True)


def _gptq_shape(file: SafetensorsCheckpoint, stem: str) -> tuple[int, ...]:
    words, outputs = file.shape(f"{stem}.qweight")
    return outputs, words * 8


def _read_awq(
    file: SafetensorsCheckpoint, stem: str, expert: int | None, config: Mapping[str, Any]
) -> CodedMatrix:
    """qweight [inputs, outputs / 8], packed along the outputs in AWQ's order."""
    _four_bits_only(stem, config)
    place = torch.tensor(_AWQ_ORDER).argsort()

    def ordered(words: Tensor) -> Tensor:
        nibbles = _unpack(words, 4, 1)
        return nibbles.view(words.shape[0], -1, 8)[..., place].flatten(1).T

    codes, zeros = ordered(file.get(f"{stem}.qweight")), ordered(file.get(f"{stem}.qzeros"))
    scales = file.get(f"{stem}.scales").T
    size = _group_size(stem, config, codes.shape[1], scales.shape[1])
    return CodedMatrix(_int4_coding(stem, scales, size), codes, scales, zeros)


def _awq_shape(file: SafetensorsCheckpoint, stem: str) -> tuple[int, ...]:
    inputs, words = file.shape(f"{stem}.qweight")
    return words * 8, inputs


def _weight_shape(file: SafetensorsCheckpoint, stem: str) -> tuple[int, ...]:
    return file.shape(f"{stem}.weight")


def _always(file: SafetensorsCheckpoint, stem: str, config: Mapping[str, Any]) -> bool:
    return True


def _is_awq(file: SafetensorsCheckpoint, stem: str, config: Mapping[str, Any]) -> bool:
    return config.get("quant_method") == "awq"


_INT4_COMPANIONS = {".qweight": True, ".qzeros": True, ".scales": True, ".g_idx": False}

FORMATS: tuple[PublishedFormat, ...] = (
    PublishedFormat(
        "fp8 in blocks",
        {".weight": True, ".weight_scale_inv": True, ".input_scale": False},
        ".weight",
        _is_eight_bits,
        _weight_shape,
        _eight_bits(".weight_scale_inv"),
    ),
    PublishedFormat(
        "fp8 or int8",
        {
            ".weight": True,
            ".weight_scale": True,
            ".weight_zero_point": False,
            ".input_scale": False,
        },
        ".weight",
        _is_eight_bits,
        _weight_shape,
        _eight_bits(".weight_scale"),
    ),
    PublishedFormat(
        "packed integers",
        {
            ".weight_packed": True,
            ".weight_scale": True,
            ".weight_shape": True,
            ".weight_zero_point": False,
            ".weight_g_idx": False,
        },
        ".weight",
        _always,
        _packed_shape,
        _read_packed,
    ),
    PublishedFormat(
        "mxfp4", {"_blocks": True, "_scales": True}, "", _always, _mxfp4_shape, _read_mxfp4
    ),
    PublishedFormat("awq", _INT4_COMPANIONS, ".weight", _is_awq, _awq_shape, _read_awq),
    PublishedFormat("gptq", _INT4_COMPANIONS, ".weight", _always, _gptq_shape, _read_gptq),
)


# Keys that belong to a quantized weight and are no parameters of a model.
COMPANION_KEYS = (
    r"(\.(weight_scale_inv|weight_scale|input_scale|weight_packed|weight_shape|weight_zero_point"
    r"|qweight|qzeros|scales|g_idx|weight_g_idx)|_blocks|_scales)$"
)


# Parts of a quantized weight that must not be left over.
_LONELY = (".weight_packed", ".weight_scale", ".weight_scale_inv", ".qweight", "_blocks")


def _weight_of(key: str) -> str:
    """The name of the weight that a part of it belongs to."""
    own = next((suffix for suffix in _LONELY if key.endswith(suffix)), "")
    return f"{key.removesuffix(own)}{'.weight' if own.startswith('.') else ''}"


def _require_groups(key: str, matrix: CodedMatrix) -> None:
    """Raises CheckpointError where scales or zero points are not those of the codes' groups."""
    coding, codes = matrix.coding, matrix.codes
    want = coding.groups(*codes.shape)[::-1] if codes.dim() == 2 and codes.numel() else None
    for name, found in (("scales", matrix.scales), ("zero points", matrix.zeros)):
        if found is not None and tuple(found.shape) != want:
            raise CheckpointError(
                f"{key}: got {name} of shape {tuple(found.shape)} for codes {tuple(codes.shape)}, "
                f"expected {want}"
            )


class PublishedCheckpoint:
    """A checkpoint by the names of its weights, whatever form each is stored in."""

    def __init__(
        self, file: SafetensorsCheckpoint, config: Mapping[str, Any] | None = None
    ) -> None:
        """`config`: the quantization_config of config.json. Raises CheckpointError."""
        self._file, self._config = file, dict(config or {})
        method = _method(self._config)
        if method is not None:
            self._config["quant_method"] = method
        # Name of a weight -> why it cannot be read. Only what the model has is a reason to refuse:
        # layers for multi-token prediction may lie beside in any form.
        self.unreadable: dict[str, str] = {}
        for key in file:
            if unread := _unread(file, key):
                self.unreadable[_weight_of(key)] = f"{key}: {unread}, which kt_sft does not read"
        self._quantized: dict[str, tuple[PublishedFormat, str]] = {}
        hidden: set[str] = set()
        for key in file:
            for known in FORMATS:
                own = next(iter(known.companions))
                stem = key.removesuffix(own)
                weight = f"{stem}{known.weight}"
                if not key.endswith(own) or key in hidden or weight in self.unreadable:
                    continue
                needed = [f"{stem}{s}" for s, must in known.companions.items() if must]
                if all(k in file for k in needed) and known.applies(file, stem, self._config):
                    self._quantized[weight] = (known, stem)
                    hidden.update(f"{stem}{s}" for s in known.companions)
                    break
        self._plain = [key for key in file if key not in hidden]
        self.plain_dtypes: set[str] = set()  # of what is stored in floats, by safetensors' names
        for key in self._plain:
            dtype = file.dtype(key)
            self.plain_dtypes.add(dtype)
            codes = dtype.startswith(("F8_", "F4")) or (
                dtype in ("I8", "U8") and key.endswith("weight")
            )
            if codes or key.endswith(_LONELY):
                self.unreadable.setdefault(
                    _weight_of(key),
                    f"{key}: {dtype} that goes with no scales, or scales with no weight, that "
                    "kt_sft knows",
                )
        self.hidden_keys = frozenset(hidden)

    def refuse_unreadable(self, is_needed: Callable[[str], bool]) -> None:
        """Raises CheckpointError for the first weight that is needed and cannot be read."""
        for weight, why in self.unreadable.items():
            if is_needed(weight):
                raise CheckpointError(f"{why}; formats are {', '.join(f.name for f in FORMATS)}")

    def __iter__(self) -> Iterator[str]:
        yield from self._plain
        yield from self._quantized

    def __contains__(self, key: str) -> bool:
        return key in self._quantized or (key in self._file and key not in self.hidden_keys)

    @property
    def quantized(self) -> list[str]:
        """The names of all weights that are stored in codes."""
        return list(self._quantized)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of the weight, [..., outputs, inputs]."""
        if key in self._quantized:
            known, stem = self._quantized[key]
            with reading(f"{key} as {known.name}"):
                return known.shape(self._file, stem)
        return self._file.shape(key)

    def is_quantized(self, key: str) -> bool:
        """Whether a weight is stored in codes."""
        return key in self._quantized

    def dtype(self, key: str) -> str:
        """The name of a plain tensor's dtype in safetensors."""
        return self._file.dtype(key)

    def file_of(self, key: str) -> str:
        """The name of the file that holds a weight; of its codes, where there are some."""
        if key in self._quantized:
            known, stem = self._quantized[key]
            key = f"{stem}{next(iter(known.companions))}"
        return self._file.file_of(key)

    def get(self, key: str, index: int | None = None) -> Tensor | CodedMatrix:
        """A tensor, or one expert of it, as it is stored."""
        if key not in self._quantized:
            return self._file.part(key, index)
        known, stem = self._quantized[key]
        with reading(f"{key} as {known.name}"):
            matrix = known.read(self._file, stem, index, self._config)
            _require_groups(key, matrix)
        return matrix

    def get_rows(self, key: str, block: int, rows: int) -> Tensor:
        """Rows `block * rows` to `(block + 1) * rows` of a plain tensor."""
        return self._file.get_rows(key, block, rows)

    def dequantized(self, key: str) -> Tensor:
        """A whole weight in floats."""
        found = self.get(key) if len(self.shape(key)) < 3 else None
        if found is None:
            parts = [self.get(key, i) for i in range(self.shape(key)[0])]
            return torch.stack([p.dequantize() if isinstance(p, CodedMatrix) else p for p in parts])
        return found.dequantize() if isinstance(found, CodedMatrix) else found
