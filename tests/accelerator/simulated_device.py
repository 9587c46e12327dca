"""A simulated accelerator, `torch.device("simulated")`, that fails where a GPU would fail.

Its memory has no access for the host, its streams are served by threads, and it keeps count: of
what the host waited for, of bytes in each direction, and of accesses that no event puts in order.
Loading it changes the process for good (pinned memory, `torch.accelerator`): for children only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import subprocess
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NAME = "simulated"
_HERE = Path(__file__).parent
_BUILD = Path(__file__).parents[2] / ".cache" / "tests" / f"accelerator-{torch.__version__}"
_SOURCES = ("runtime", "backend", "operators", "control")
_KINDS = ("compute", "down", "up", "order")


@dataclass(frozen=True)
class Ran:
    """A job that ran, times in milliseconds."""

    stream: int
    kind: str
    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class Observed:
    """Since the last `clear`. waits: of the host, by their kind; violations: what went wrong."""

    waits: dict[str, int]
    copies_down: int
    copies_up: int
    bytes_down: int
    bytes_up: int
    violations: list[str]
    trace: list[Ran]


def build() -> Path:
    """Compiles what is older than its sources; one process at a time."""
    library = _BUILD / "libsimulated_device.so"
    _BUILD.mkdir(parents=True, exist_ok=True)
    with (_BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(f.stat().st_mtime for f in (*_HERE.glob("*.cpp"), *_HERE.glob("*.h")))
        if library.exists() and library.stat().st_mtime > newest:
            return library
        root = Path(torch.__file__).parent
        compiler = ["g++", "-std=c++20", "-O1", "-fPIC", f"-I{root}/include", "-c"]
        running = [
            subprocess.Popen([*compiler, f"{_HERE / name}.cpp", "-o", f"{_BUILD / name}.o"])
            for name in _SOURCES
        ]
        if any([process.wait() for process in running]):
            raise RuntimeError("the simulated device does not compile")
        objects = [str(_BUILD / f"{name}.o") for name in _SOURCES]
        link = [f"-L{root}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root}/lib", "-pthread"]
        unfinished = library.with_suffix(".unfinished")
        subprocess.run(["g++", "-shared", "-o", str(unfinished), *objects, *link], check=True)
        os.replace(unfinished, library)
    return library


class SimulatedDevice:
    """The device, loaded into this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
        self._library.simulated_report.restype = ctypes.c_char_p
        self._library.simulated_allocated.restype = ctypes.c_size_t
        self._library.simulated_peak.restype = ctypes.c_size_t
        torch.utils.rename_privateuse1_backend(NAME)
        torch._register_device_module(NAME, self._module())
        torch.utils.generate_methods_for_privateuse1_backend()

    @classmethod
    def for_trainers(cls) -> SimulatedDevice:
        """Taken by accelerate and Transformers too, which know devices by their names."""
        import transformers

        device = cls()
        os.environ["ACCELERATE_TORCH_DEVICE"] = NAME
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
        return device

    def clear(self) -> None:
        """Forgets what was observed."""
        torch.accelerator.synchronize()
        self._library.simulated_clear()

    def observed(self) -> Observed:
        """Since `clear`; waits for nothing."""
        found = json.loads(self._library.simulated_report())
        return Observed(**{**found, "trace": [Ran(*ran) for ran in found["trace"]]})

    @contextlib.contextmanager
    def delays(self, **microseconds: int) -> Iterator[None]:
        """Jobs of these kinds (compute, down, up) begin later."""
        try:
            self._set_delays(microseconds)
            yield
        finally:
            torch.accelerator.synchronize()
            self._set_delays(dict.fromkeys(microseconds, 0))

    def _set_delays(self, microseconds: dict[str, int]) -> None:
        for kind, duration in microseconds.items():
            self._library.simulated_delay(_KINDS.index(kind), duration)

    def _module(self) -> types.ModuleType:
        """What torch and other libraries look for as `torch.<name of the device>`."""
        library = self._library
        module: Any = types.ModuleType(f"torch.{NAME}")
        module.is_available = lambda: True
        module.is_initialized, module._initialized = lambda: True, True  # asked by checkpointing
        module.is_bf16_supported = lambda *_: True
        module._is_in_bad_fork = lambda: False
        module.device_count = lambda: 1
        module.current_device = lambda: 0
        module.set_device = lambda _: None
        module._lazy_init = lambda: None
        module.empty_cache = lambda: None
        module.synchronize = lambda *_: torch.accelerator.synchronize()
        module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16, torch.float32]
        module.memory_allocated = lambda *_: library.simulated_allocated()
        module.max_memory_allocated = lambda *_: library.simulated_peak()
        module.Stream, module.Event = torch.Stream, torch.Event
        module.current_stream = lambda *_: torch.accelerator.current_stream()
        module.device = lambda _: contextlib.nullcontext()

        def get_rng_state(*_: Any) -> torch.Tensor:
            state = torch.empty(16, dtype=torch.uint8)
            library.simulated_get_random_state(ctypes.c_void_p(state.data_ptr()))
            return state

        def set_rng_state(state: torch.Tensor, *_: Any) -> None:
            library.simulated_set_random_state(ctypes.c_void_p(state.contiguous().data_ptr()))

        def manual_seed(seed: int) -> None:
            set_rng_state(torch.tensor([seed, 0], dtype=torch.int64).view(torch.uint8))

        module.get_rng_state, module.set_rng_state = get_rng_state, set_rng_state
        module.get_rng_state_all = lambda: [get_rng_state()]
        module.set_rng_state_all = lambda states: set_rng_state(states[0])
        module.manual_seed = module.manual_seed_all = manual_seed
        return module
