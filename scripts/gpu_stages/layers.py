"""Steps of a few layers of Qwen3-30B-A3B's shape: speed, memory, where the time goes; a trace.

Beside it what one would do without computing on the host: the experts' weights in bf16 stay in
pinned memory and are brought to the device, layer by layer, forward and again for backward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from gpu_stages.setting import Setting
from kt_sft import HybridExpertsConfig, hybridize
from kt_sft.experts import hybrid_experts_of
from kt_sft.machine.accelerator import peak_device_memory

SHAPE = dict(
    vocab_size=32_000, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
    num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
    num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, max_position_embeddings=16_384,
)  # fmt: skip
SMALL = {
    **SHAPE, "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96,
    "moe_intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
RANK = 8
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["gate_proj", "up_proj", "down_proj"]


class StreamedExperts(nn.Module):
    """The stock experts' contract, with LoRA, on weights that come from pinned memory each time."""

    def __init__(self, stock: nn.Module, device: str) -> None:
        super().__init__()
        # Lists, so that the model's .to() leaves them.
        self._gate_up = [stock.gate_up_proj.detach().to(torch.bfloat16).pin_memory()]
        self._down = [stock.down_proj.detach().to(torch.bfloat16).pin_memory()]
        experts, width, hidden = self._gate_up[0].shape

        def factors(outputs: int, inputs: int) -> nn.ParameterList:
            a = torch.randn(experts, RANK, inputs, device=device) * inputs**-0.5
            return nn.ParameterList([a, torch.zeros(experts, outputs, RANK, device=device)])

        self.lora_gate_up = factors(width, hidden)
        self.lora_down = factors(hidden, width // 2)

    def forward(self, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """See above; the weights are brought again for backward."""
        return checkpoint(self._run, hidden_TD, index_TK, weight_TK, use_reentrant=False)

    def _run(self, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        gate_up = self._gate_up[0].to(hidden_TD.device, non_blocking=True)
        down = self._down[0].to(hidden_TD.device, non_blocking=True)
        out = torch.zeros_like(hidden_TD)
        order = index_TK.flatten().argsort()
        tokens = order // index_TK.shape[1]
        sizes = index_TK.flatten().bincount(minlength=len(down)).tolist()
        weights = weight_TK.flatten()[order].to(hidden_TD.dtype)
        parts = zip(tokens.split(sizes), weights.split(sizes), strict=True)
        for e, (rows, weight) in enumerate(parts):
            if len(rows) == 0:
                continue
            x = hidden_TD[rows]
            both = _lora(x, gate_up[e], self.lora_gate_up, e)
            gate, up = both.chunk(2, -1)
            y = _lora(nn.functional.silu(gate) * up, down[e], self.lora_down, e)
            out = out.index_add(0, rows, y * weight[:, None])
        return out


def _lora(x: Tensor, weight: Tensor, factors: nn.ParameterList, e: int) -> Tensor:
    a, b = (f[e].to(x.dtype) for f in factors)
    return x @ weight.T + 2.0 * (x @ a.T) @ b.T


def stock(sizes: dict[str, Any]) -> nn.Module:
    """Weights of the size of trained ones, the same numbers again and again: quick to make."""
    config = AutoConfig.for_model("qwen3_moe", **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    drawn = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # of a norm
                p.fill_(1)
                continue
            tile = (drawn * p.shape[-1] ** -0.5).to(p.dtype)
            for part in p.view(-1).split(len(tile)):
                part.copy_(tile[: len(part)])
    return model


def build_model(setting: Setting, adapters: str | None, **settings: Any) -> nn.Module:
    """LoRA everywhere; `adapters` of None is the streamed one."""
    torch.manual_seed(0)
    model = stock(SMALL if setting.small else SHAPE)
    device = setting.place()
    if adapters is None:
        for layer in model.model.layers:
            layer.mlp.experts = StreamedExperts(layer.mlp.experts, device)
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules=ATTENTION))
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)
    else:
        config = HybridExpertsConfig(weights="int8", store="memory", adapters=adapters, **settings)
        targets = [*ATTENTION, *EXPERTS]
        model = get_peft_model(hybridize(model, config), LoraConfig(r=RANK, target_modules=targets))
    return model.to(device).train()


def measure(setting: Setting, model: nn.Module, tokens: int) -> tuple[Callable[[], None], float]:
    """A step, and the median of its seconds."""
    device = setting.place()
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=True)

    def step() -> None:
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device != "cpu":
            torch.accelerator.synchronize()

    step()
    reset = getattr(torch.get_device_module(device), "reset_peak_memory_stats", None)
    if reset is not None:
        reset()
    for module in list(hybrid_experts_of(model).values())[:1]:
        module.runtime.meter.read()
    seconds = []
    for _ in range(2 if setting.small else 4):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return step, statistics.median(seconds)


def say(setting: Setting, name: str, model: nn.Module, tokens: int, seconds: float) -> None:
    """A row: the step's time, memory, and what the experts' meter has counted since `measure`."""
    layers = model.config.num_hidden_layers
    row = {
        "case": name,
        "tokens": tokens,
        "step_ms": round(1e3 * seconds, 1),
        "tokens/s": round(tokens / seconds),
        "layer_ms": round(1e3 * seconds / layers, 1),
        "device_gb": round((peak_device_memory() or 0) / 1e9, 2),
    }
    for module in list(hybrid_experts_of(model).values())[:1]:
        read = module.runtime.meter.read()
        steps = max(1, read.backward_calls // layers)
        row |= {
            "experts_ms": round(1e3 * (read.forward + read.backward) / steps, 1),
            "mb_down": round(read.traffic.bytes_down / steps / 1e6, 2),
            "mb_up": round(read.traffic.bytes_up / steps / 1e6, 2),
            "host_waited_ms": round(1e3 * read.traffic.host_waited / steps, 1),
            "device_waited_ms": round(1e3 * read.traffic.device_waited / steps, 1),
        }
    setting.say(**row)


def _trace(setting: Setting, step: Callable[[], None]) -> None:
    """A Chrome trace of one step, for chrome://tracing and Perfetto."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if setting.place() == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
    profile.export_chrome_trace(str(setting.out / "trace.json.gz"))
    shown = ("Synchronize", "Memcpy", "ExpertsBegin", "ExpertsEnd")
    for event in profile.key_averages():
        if any(part in event.key for part in shown):
            setting.say(
                case=f"trace: {event.key[:60]}",
                calls=event.count,
                host_ms=round(event.cpu_time_total / 1e3, 2),
                device_ms=round(getattr(event, "device_time_total", 0.0) / 1e3, 2),
            )


def run(setting: Setting) -> None:
    """Rows: ours with adapters on the device and on the host, a trace, the streamed baseline."""
    lengths = (32, 48) if setting.small else (2048, 8192)
    for adapters in ("device", "host"):
        model = build_model(setting, adapters)
        for tokens in lengths:
            step, seconds = measure(setting, model, tokens)
            say(setting, f"ours, adapters: {adapters}", model, tokens, seconds)
            if adapters == "device" and tokens == lengths[0]:
                _trace(setting, step)
        del model, step
    model = build_model(setting, None)
    for tokens in lengths:
        _, seconds = measure(setting, model, tokens)
        say(setting, "weights streamed to the device, bf16", model, tokens, seconds)
