"""Threads, kernels and temporary memory of the compiled core."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

import kt_sft.kernels._core as _core
from kt_sft.errors import ThreadsError
from kt_sft.kernels.checks import refuse_pickling
from kt_sft.machine.cgroups import cgroup_folders


def _limits_of_threads() -> Iterator[str]:
    """What the system says that it allows."""
    for name, number in (
        ("processes of this user (ulimit -u)", resource.RLIMIT_NPROC),
        ("address space (ulimit -v)", resource.RLIMIT_AS),
    ):
        soft = resource.getrlimit(number)[0]
        if soft != resource.RLIM_INFINITY:
            yield f"{name} {soft}"
    for folder in cgroup_folders("pids"):
        try:
            limit = (folder / "pids.max").read_text().strip()
        except OSError:
            continue
        if limit != "max":
            yield f"{folder}/pids.max {limit}"


class Engine:
    """Threads, kernels and temporary memory, shared by all layers of a model.

    Calls from several Python threads are serialized; a call in a forked child raises
    ForkedProcess.
    """

    def __init__(
        self, threads: int, isa: str = "auto", *, cpu_flags: Mapping[str, bool] | None = None
    ) -> None:
        """`cpu_flags` stands in for the machine's own, in tests.

        Raises ThreadsError where the system does not give so many.
        """
        try:
            self.handle = _core.Engine(threads, isa, None if cpu_flags is None else dict(cpu_flags))
        except _core.ThreadsUnavailable as error:
            raise ThreadsError(
                f"threads: {error}; limits: {', '.join(_limits_of_threads()) or 'none that show'}. "
                "Set threads: to a smaller number, or raise the limit"
            ) from error

    def __deepcopy__(self, memo: dict) -> Engine:
        return self

    __reduce__ = refuse_pickling

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self.handle.isa

    @property
    def threads(self) -> int:
        """Threads that compute, the caller's included."""
        return self.handle.threads

    @property
    def cached_bytes(self) -> int:
        """Bytes of temporary memory that are kept for the next call and not in use."""
        return self.handle.cached_bytes

    def trim(self) -> int:
        """Gives unused temporary memory back to the system; returns the bytes."""
        return self.handle.trim()

    def empty(self, *shape: int) -> Tensor:
        """An fp32 tensor from the engine's reusable memory; contents undefined."""
        count = 1
        for n in shape:
            count *= n
        if count == 0:
            return torch.empty(shape, dtype=torch.float32)
        buffer = self.handle.buffer(4 * count)
        return torch.frombuffer(buffer, dtype=torch.float32, count=count).view(shape)
