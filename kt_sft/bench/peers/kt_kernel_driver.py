"""Time one MoE layer with LoRA in the fine-tuning kernels of kt-kernel, CPU only.

Speaks JSON lines: requests on stdin, replies on stdout, everything else on stderr.

First request (all keys optional, defaults below), which builds the layer:
    {"hidden": 2048, "intermediate": 768, "experts": 128, "top_k": 8, "tokens": 2048,
     "rank": 8, "alpha": 16, "precision": "bf16", "threads": 2, "seed": 0}
    -> {"ready": true, "version": ..., "precision": ..., "kernel": ..., "load_s": ...}
Then any number of
    {"cmd": "run"}   -> {"forward_ms": ..., "backward_ms": ...}, the first one much slower
    {"cmd": "quit"}  -> ends (so does end of input)
A request that fails is answered {"error": ...}.

The extension classes are called directly (MOESFTConfig, AMXBF16_SFT_MOE or
AMXInt8_SFT_MOE, CPUInfer): despite the names they run on AVX-512 too, and the int8
one quantizes bf16 weights while loading, which the Python wrapper refuses to do.
The times are those of the queued task alone: no copies, no optimizer, no router.
The backward gives the gradients of input, routing weights and the six LoRA factors.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

# Keep the real stdout for replies; prints of any library, C++ too, go to stderr.
REPLIES = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

import kt_kernel  # noqa: E402
import torch  # noqa: E402
from kt_kernel import kt_kernel_ext as ext  # noqa: E402

KERNELS = {"bf16": "AMXBF16_SFT_MOE", "int8": "AMXInt8_SFT_MOE"}
PROJECTIONS = ("gate", "up", "down")
LORA_NAMES = tuple(f"{p}_lora_{ab}" for p in PROJECTIONS for ab in "ab")
MAX_LEN_STEP = 32  # the wrapper of the package rounds its longest batch up to this


@dataclass(frozen=True)
class Shape:
    """What to build; see the module docstring."""

    hidden: int = 2048
    intermediate: int = 768
    experts: int = 128
    top_k: int = 8
    tokens: int = 2048
    rank: int = 8
    alpha: float = 16.0
    precision: str = "bf16"
    threads: int = 2
    seed: int = 0


def gaussian(shape: tuple[int, ...], std: float) -> torch.Tensor:
    """Normal bf16 values, drawn slice by slice to keep the fp32 temporaries small."""
    out = torch.empty(shape, dtype=torch.bfloat16)
    for part in out:
        part.copy_(torch.randn(part.shape) * std)
    return out


class Layer:
    """The layer in kt-kernel, with its data and the buffers it writes to."""

    def __init__(self, shape: Shape) -> None:
        self.shape = s = shape
        kernel = getattr(ext.moe, KERNELS[s.precision])
        torch.manual_seed(s.seed)
        torch.set_num_threads(s.threads)
        self._make_data()

        pool = ext.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map = 1, [0]
        pool.subpool_thread_count = [s.threads]
        self.queue = ext.CPUInfer(pool)

        config = ext.moe.MOESFTConfig(s.experts, s.top_k, s.hidden, s.intermediate)
        config.pool = self.queue.backend_
        config.max_len = -(-s.tokens // MAX_LEN_STEP) * MAX_LEN_STEP
        config.max_cache_depth = 1
        # As the package's wrapper has it; without it three LoRA gradients add up over calls.
        config.authoritative_optimizer_grads = True
        config.lora_rank, config.lora_alpha = s.rank, s.alpha
        config.physical_to_logical_map = self.expert_map.data_ptr()
        names = [f"{p}_proj" for p in PROJECTIONS] + list(LORA_NAMES)
        for name, tensor in zip(names, self.weights + self.lora, strict=True):
            setattr(config, name, tensor.data_ptr())
        self.moe = kernel(config)
        self._do(self.moe.load_weights_task())
        self._do(self.moe.update_lora_weights_task(*(t.data_ptr() for t in self.lora)))
        self._do(self.moe.warm_up_task())

    def _make_data(self) -> None:
        s = self.shape
        e, h, i, r = s.experts, s.hidden, s.intermediate, s.rank
        ins, outs = (h, h, i), (i, i, h)
        self.weights = [gaussian((e, o, n), n**-0.5) for n, o in zip(ins, outs, strict=True)]
        self.lora: list[torch.Tensor] = []  # a: [experts, rank, in], b: [experts, out, rank]
        for n, o in zip(ins, outs, strict=True):
            self.lora.append(gaussian((e, r, n), n**-0.5))
            self.lora.append(gaussian((e, o, r), 0.1 * r**-0.5))
        self.lora_grads = [torch.zeros_like(t) for t in self.lora]
        self.expert_map = torch.arange(e, dtype=torch.int64)
        self.count = torch.tensor([s.tokens], dtype=torch.int32)
        # The largest top_k of uniform draws: k different experts, all equally likely.
        self.ids = torch.rand(s.tokens, e).topk(s.top_k, dim=1).indices.contiguous()
        self.routing = torch.softmax(torch.randn(s.tokens, s.top_k), dim=1)
        self.routing_grad = torch.zeros_like(self.routing)
        self.x, self.dy = (gaussian((s.tokens, h), 1.0) for _ in range(2))
        self.y, self.dx = (torch.zeros_like(self.x) for _ in range(2))

    def _do(self, task: tuple[int, int]) -> float:
        """Run one queued task to its end; the milliseconds it took."""
        start = time.perf_counter()
        self.queue.submit(task)
        self.queue.sync()
        return (time.perf_counter() - start) * 1e3

    def run(self) -> dict[str, float]:
        """One forward that keeps what the backward needs, then that backward."""
        forward = self.moe.forward_sft_task(
            self.count.data_ptr(),
            self.shape.top_k,
            self.ids.data_ptr(),
            self.routing.data_ptr(),
            self.x.data_ptr(),
            self.y.data_ptr(),
            True,
        )
        backward = self.moe.backward_task(
            self.dy.data_ptr(),
            self.dx.data_ptr(),
            *(t.data_ptr() for t in self.lora_grads),
            self.routing_grad.data_ptr(),
            0,
            0,
            0,
        )  # no gradients of the base weights
        return {"forward_ms": self._do(forward), "backward_ms": self._do(backward)}


def main() -> None:
    """Answer requests until told to quit or the input ends."""
    layer: Layer | None = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if request.get("cmd") == "quit":
                break
            if layer is None:
                start = time.perf_counter()
                layer = Layer(Shape(**request))
                reply: dict[str, Any] = {
                    "ready": True,
                    "version": kt_kernel.__version__,
                    "precision": layer.shape.precision,
                    "kernel": ext.__cpu_variant__,
                    "load_s": round(time.perf_counter() - start, 2),
                }
            elif request.get("cmd") == "run":
                reply = layer.run()
            else:
                raise ValueError(f"unknown request: {request}")
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        REPLIES.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
