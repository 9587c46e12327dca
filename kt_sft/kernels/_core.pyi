"""Types of the compiled core; addresses are integers that `engine.py` has checked."""

from typing import Any

class ForkedProcess(RuntimeError): ...
class ThreadsUnavailable(RuntimeError): ...
class Buffer: ...

SECTIONS: list[str]

class PackedLayout:
    section_bytes: dict[str, int]
    def __init__(
        self,
        experts: int,
        hidden: int,
        intermediate: int,
        weights: str,
        gated: bool,
        biased: list[bool],
        coding: tuple[str, str, int, int, bool] | None,
    ) -> None: ...

class PackedExperts:
    nbytes: int
    sections: dict[str, tuple[int, int]]
    def __init__(self, layout: PackedLayout, packed: list[int] | None = None) -> None: ...
    def pack_codes(
        self,
        engine: Engine,
        expert: int,
        projection: str,
        codes: int,
        row_stride: int,
        scales: int,
        zeros: int,
    ) -> None: ...
    def take_channels(self, engine: Engine, source: PackedExperts, first: int) -> None: ...
    def pack(
        self,
        engine: Engine,
        expert: int,
        projection: str,
        dtype: str,
        weight: int,
        row_stride: int,
    ) -> None: ...
    def set_bias(self, expert: int, projection: str, bias: int) -> None: ...
    def unpack(self, expert: int, projection: str, out: int) -> None: ...

class Engine:
    isa: str
    threads: int
    cached_bytes: int
    def __init__(
        self, threads: int, isa: str, cpu_flags: dict[str, bool] | None = None
    ) -> None: ...
    def buffer(self, bytes: int) -> Any: ...
    def trim(self) -> int: ...
    def forward(self, *arguments: Any) -> dict[str, Any]: ...
    def backward(self, *arguments: Any) -> dict[str, Any]: ...

single: Any

def isa_report(cpu_flags: dict[str, bool] | None = None) -> list[tuple[str, list[str]]]: ...
def kernel_rows() -> list[tuple[str, str, str]]: ...
def select_isa(isa: str, cpu_flags: dict[str, bool] | None = None) -> str: ...
