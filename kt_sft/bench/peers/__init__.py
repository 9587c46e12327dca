"""What users would run instead, each as runners beside ours."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from kt_sft.bench.case import LayerCase, LayerData, Runner
from kt_sft.bench.peers import kt_kernel, torch_loop, transformers_experts

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory, as MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ do."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@dataclass(frozen=True)
class Peer:
    """start(case, data, environment) yields runners by name and stops what it started."""

    start: Callable[
        [LayerCase, LayerData, Path | None], AbstractContextManager[Mapping[str, Runner]]
    ]
    in_process: bool
    # Before every runner: threads of another process spin for a while after a call.
    rest_seconds: float = 0.0


PEERS: Mapping[str, Peer] = {
    "torch": Peer(torch_loop.start, in_process=True),
    "transformers": Peer(transformers_experts.start, in_process=True),
    "kt-kernel": Peer(kt_kernel.start, in_process=False, rest_seconds=0.3),
}
