"""How fast an accelerator's link copies, each way."""

from __future__ import annotations

import time

import torch

_BYTES = 64 << 20
_REPEATS = 5


def copy_rates(device: torch.device, nbytes: int = _BYTES) -> tuple[float, float]:
    """(from the host, to the host) bytes a second of pinned memory; the best of some."""
    here = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.zeros(nbytes, dtype=torch.uint8, device=device)

    def best(target: torch.Tensor, source: torch.Tensor) -> float:
        seconds = []
        for _ in range(_REPEATS):
            torch.accelerator.synchronize(device)
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.accelerator.synchronize(device)
            seconds.append(time.perf_counter() - start)
        return nbytes / min(seconds)

    return best(there, here), best(here, there)
