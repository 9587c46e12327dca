"""Types of the compiled core; block.py and weights.py check what the addresses point to."""

from typing import Any, overload

class ForkedProcess(RuntimeError): ...
class ThreadsUnavailable(RuntimeError): ...
class Buffer: ...

SECTIONS: list[str]
OWN_FORMATS: list[str]

class PackedLayout:
    section_bytes: dict[str, int]
    matrix_bytes: dict[str, list[int]]
    is_float: bool
    channel_granule: int
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
    def take_experts(self, engine: Engine, source: PackedExperts, experts: list[int]) -> None: ...
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

class Gate:
    def __init__(
        self, *, activation: str, gated: bool, alpha: float, limit: float, up_offset: float
    ) -> None: ...

class Lora:
    @overload
    def __init__(self) -> None: ...
    @overload
    def __init__(self, *, rank: int, a: int, b: int, scaling: float, shared: bool) -> None: ...

class LoraGradient:
    @overload
    def __init__(self) -> None: ...
    @overload
    def __init__(self, *, a: int, b: int) -> None: ...

class KeptActivations:
    @overload
    def __init__(self) -> None: ...
    @overload
    def __init__(self, *, gate: int, up: int, lora_down: list[int]) -> None: ...

class BlockInput:
    def __init__(
        self,
        *,
        weights: PackedExperts,
        compute: str,
        gate: Gate,
        tokens: int,
        top_k: int,
        dtype: str,
        hidden: int,
        index: int,
        routing_weight: int,
        lora: list[Lora],
        dropout: float,
        dropout_seed: int,
        first_channel: int,
        max_rows: int,
    ) -> None: ...

class Engine:
    isa: str
    threads: int
    cached_bytes: int
    def __init__(
        self, threads: int, isa: str, cpu_flags: dict[str, bool] | None = None
    ) -> None: ...
    def buffer(self, bytes: int) -> Any: ...
    def trim(self) -> int: ...
    def forward(self, input: BlockInput, *, out: int, kept: KeptActivations) -> dict[str, Any]: ...
    def backward(
        self,
        input: BlockInput,
        *,
        d_out: int,
        kept: KeptActivations,
        d_hidden: int,
        d_weight: int,
        d_lora: list[LoraGradient],
    ) -> dict[str, Any]: ...

single: Any

def isa_report(cpu_flags: dict[str, bool] | None = None) -> list[tuple[str, list[str]]]: ...
def kernel_rows() -> list[tuple[str, str, str]]: ...
def select_isa(isa: str, cpu_flags: dict[str, bool] | None = None) -> str: ...
def backward_bytes(
    *,
    isa: str,
    threads: int,
    layout: PackedLayout,
    compute: str,
    tokens: int,
    top_k: int,
    dtype: str,
    ranks: list[int],
    shared: bool,
    max_rows: int,
) -> int: ...
