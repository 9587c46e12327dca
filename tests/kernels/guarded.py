"""Buffers for single kernels: misaligned on request, between canaries that must survive."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_CANARY = 0xA5
_GUARD = 256  # bytes on either side; enough for four vectors


class Guarded:
    """An array whose neighbours in memory are checked; `offset` bytes off a 64-byte boundary."""

    def __init__(self, shape: Sequence[int] | int, dtype: np.dtype | type, offset: int = 0) -> None:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._raw = np.full(size + 2 * _GUARD + 64, _CANARY, dtype=np.uint8)
        start = _GUARD + (-(self._raw.ctypes.data + _GUARD)) % 64 + offset % 64
        self._start, self._size = start, size
        self.array = self._raw[start : start + size].view(dtype).reshape(shape)

    @classmethod
    def of(cls, values: np.ndarray, offset: int = 0) -> Guarded:
        """A guarded copy."""
        out = cls(values.shape, values.dtype, offset)
        out.array[...] = values
        return out

    @property
    def address(self) -> int:
        """Of the first element."""
        return self._raw.ctypes.data + self._start

    def assert_intact(self) -> None:
        """Nothing was written outside the array."""
        assert (self._raw[: self._start] == _CANARY).all(), "written before the array"
        assert (self._raw[self._start + self._size :] == _CANARY).all(), "written after the array"


def addresses(arrays: Sequence[Guarded]) -> np.ndarray:
    """A C array of pointers; keep it alive during the call."""
    return np.array([a.address for a in arrays], dtype=np.uint64)
