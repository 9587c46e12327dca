"""Writing a safetensors file tensor by tensor, of which only the current one is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from kt_sft.errors import CheckpointError

_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in _NAMES.items()}
# The header is padded to this, as the library does it, so that the data is aligned.
_ALIGNMENT = 8
_PART = 64 << 20


@dataclass(frozen=True)
class Entry:
    """What a tensor will be; the header is written before any of them is there."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def write_safetensors(
    file: Path,
    entries: Mapping[str, Entry],
    tensors: Iterable[tuple[str, Iterable[Tensor]]],
) -> None:
    """Writes tensors in the order of `entries`, each in pieces along its first dimension.

    Raises CheckpointError for a tensor that is not the announced one, OSError for a full disk.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.nbytes
        header[name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    expected = iter(entries.items())
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for name, pieces in tensors:
            want, entry = next(expected, ("none", Entry((), torch.uint8)))
            written = 0
            for piece in pieces:
                written += _write(target, piece.to(entry.dtype))
            if name != want or written != entry.nbytes:
                raise CheckpointError(
                    f"{file}: got {name} of {written} bytes, expected {want} {entry.shape} of "
                    f"{entry.nbytes}"
                )
    missing = next(expected, None)
    if missing is not None:
        raise CheckpointError(f"{file}: {missing[0]} was announced and never came")


def _write(target: BinaryIO, tensor: Tensor) -> int:
    """Writes the bytes of a tensor, a part at a time: a copy may be as large as it is."""
    if tensor.numel():
        data = tensor.contiguous().view(-1).view(torch.uint8)
        for begin in range(0, data.numel(), _PART):
            target.write(data[begin : begin + _PART].numpy().data)
    return tensor.nbytes
