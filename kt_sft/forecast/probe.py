"""What a pass takes beside the routed experts: measured with one layer of each kind, on the device.

The layers are those of the model with weights that mean nothing; experts give back what they get.

Legend: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from kt_sft.experts.module import HybridExperts
from kt_sft.forecast.subject import Subject, attention_channels
from kt_sft.machine.accelerator import free_device_memory, release_device_memory
from kt_sft.machine.memory import available_memory_bytes
from kt_sft.planning.outline import TrainingOutline

logger = logging.getLogger(__name__)

# A measurement begins with so many tokens and goes on to more while a pass of one layer takes less.
_FEW_TOKENS, _PASS_SECONDS = 64, 0.4
_REPEATS, _ENOUGH_SECONDS = 5, 0.3
_MOST_KINDS = 4
_LOSS_TOKENS, _SOME_VOCABULARY = 512, 8192
_ATTENTION_LENGTH, _ATTENTION_HEADS = 1024, 8
# Parameters of the tensors that an optimizer is timed with: LoRA has many small ones.
_TRAINED = (1 << 14,) * 24 + (1 << 20,) * 12
# Nothing is nearly zero, which is slow, or overflows.
_WEIGHT = 0.01
_DENSE = "eager"


@dataclass(frozen=True)
class RestTimes:
    """Seconds of a micro batch beside the routed experts.

    forward: without gradients. training: forward and backward, with what checkpointing computes
    again. optimizer_host, optimizer_device: of a step, for each parameter in either place.
    """

    forward: float
    training: float
    optimizer_host: float
    optimizer_device: float


@dataclass(frozen=True)
class Sample:
    """One micro batch: tokens in sequences of `length`."""

    tokens: int
    length: int

    def of(self, tokens: int) -> Sample:
        """With so many tokens, or fewer where sequences are to be whole."""
        if tokens <= self.length:
            return Sample(tokens, tokens)
        return Sample(tokens // self.length * self.length, self.length)


def measured_rest(
    subject: Subject, outline: TrainingOutline | None, sample: Sample, device: torch.device
) -> RestTimes | None:
    """Of a micro batch on this machine; None where the model's layers cannot be run alone.

    outline: None without a training. device: of everything but the experts.
    """
    try:
        layers = _Layers(subject, outline, device)
        forward = training = 0.0
        for kind, count in layers.kinds.items():
            (ahead, both), around = layers.seconds(kind, sample)
            forward, training = forward + count * ahead, training + count * both
        # A pass does that once, whatever the kinds of its layers.
        forward, training = forward + around[0], training + around[1]
        host = there = 0.0
        if outline is not None:
            ahead, both = _loss_seconds(subject, outline, sample, device)
            forward, training = forward + ahead, training + both
            host = there = _optimizer_seconds(torch.device("cpu"))
            if device.type != "cpu":
                there = _optimizer_seconds(device)
    except Exception as error:
        # Whatever a model's code says to being run in parts, there are estimates.
        logger.info("layers of %s cannot be measured alone: %s", subject.name, error)
        return None
    finally:
        release_device_memory()
    return RestTimes(forward, training, host, there)


# Seconds of a forward, and of forward and backward.
_Times = tuple[float, float]


class _Layers:
    """The layers of a model, and those of them that stand for all."""

    def __init__(
        self, subject: Subject, outline: TrainingOutline | None, device: torch.device
    ) -> None:
        self._subject, self._outline, self._device = subject, outline, device
        parts = subject.layers[-1].hybrid_path.split(".")
        at = next(i for i, part in enumerate(parts) if part.isdigit())
        self._path = ".".join(parts[:at])
        self._decoder: Any = subject.model.get_submodule(".".join(parts[: at - 1]))
        self._name = parts[at - 1]
        self.all = list(getattr(self._decoder, self._name))
        types = getattr(self._decoder.config, "layer_types", None)
        self._types = types or ["full_attention"] * len(self.all)
        self.kinds = self._kinds()
        if len(self.kinds) > _MOST_KINDS:
            raise ValueError(f"there are {len(self.kinds)} kinds of them")

    def _kinds(self) -> dict[int, int]:
        """First layer of each kind -> how many there are."""
        found: dict[Any, list[int]] = {}
        for i, (layer, kind) in enumerate(zip(self.all, self._types, strict=True)):
            shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
            found.setdefault((type(layer), kind, shapes), []).append(i)
        return {alike[0]: len(alike) for alike in found.values()}

    def _alone(self, index: int) -> Any:
        """A decoder with this layer only, on the device."""
        layer = self.all[index]
        on_device = free_device_memory() if self._device.type != "cpu" else None
        free = available_memory_bytes() if on_device is None else on_device
        if 2 * sum(p.nbytes for p in layer.parameters()) > free:
            raise MemoryError("one of them is too large")
        memo: dict[int, Any] = {}
        only = nn.ModuleList([copy.deepcopy(layer, memo)])
        memo[id(getattr(self._decoder, self._name))] = only
        memo[id(self._subject.model.get_input_embeddings())] = nn.Identity()
        decoder = copy.deepcopy(self._decoder, memo)
        config = decoder.config
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[index]]
        config.num_hidden_layers = 1
        if self._outline is not None and self._outline.eager:
            config._attn_implementation = _DENSE
        decoder.to_empty(device=self._device)
        for tensor in (*decoder.parameters(), *decoder.buffers()):
            tensor.detach().fill_(_WEIGHT if tensor.is_floating_point() else 0)
        decoder.requires_grad_(False)
        for module in decoder.modules():
            if isinstance(module, HybridExperts):
                module.compute = _weighted  # type: ignore[method-assign]
        return decoder.eval() if self._outline is None else self._training(decoder, index)

    def _training(self, decoder: Any, index: int) -> Any:
        """With LoRA where the model gets it, and checkpointed as it is."""
        outline = self._outline
        assert outline is not None
        within = f"{self._path}.{index}."
        names = [
            f"{self._name}.0.{path.removeprefix(within)}"
            for path, module in outline.targets.modules(self._subject.model)
            if path.startswith(within)
            and isinstance(module, nn.Linear)
            and path.rpartition(".")[2] not in outline.trained
        ]
        if names:
            inject_adapter_in_model(LoraConfig(r=outline.rank, target_modules=names), decoder)
        for path, module in decoder.named_modules():
            if path.rpartition(".")[2] in outline.trained:
                module.requires_grad_(True)
        for parameter in decoder.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        # As LLaMA-Factory has it, which trains without where a model cannot.
        if outline.checkpointing and decoder.supports_gradient_checkpointing:
            decoder.gradient_checkpointing_enable({"use_reentrant": False})
        return decoder.train()

    def seconds(self, index: int, sample: Sample) -> tuple[_Times, _Times]:
        """Of a layer, and of what is around the layers."""
        decoder = self._alone(index)
        some, found = self._as_much_as_time_allows(decoder, sample)
        setattr(decoder, self._name, nn.ModuleList())
        decoder.config.num_hidden_layers = 0
        around = self._measure(decoder, some)
        scale = sample.tokens / some.tokens
        layer = [scale * max(0.0, x - y) for x, y in zip(found, around, strict=True)]
        if sample.length > some.length:
            dense = decoder.config._attn_implementation == _DENSE
            channels = attention_channels(decoder.config)
            if not dense and self._types[index] != "full_attention":
                channels = 0.0
            beyond = sample.tokens * (sample.length - some.length) * channels
            ahead, back = _attention_seconds(
                decoder.config, self._subject.dtype, dense, self._device
            )
            again = 1 + int(self._outline is not None and self._outline.checkpointing)
            layer[0] += beyond * ahead
            layer[1] += beyond * (again * ahead + back)
        return (layer[0], layer[1]), (scale * around[0], scale * around[1])

    def _as_much_as_time_allows(self, decoder: Any, sample: Sample) -> tuple[Sample, _Times]:
        some = sample.of(min(sample.tokens, _FEW_TOKENS))
        found = self._measure(decoder, some)
        while some.tokens < sample.tokens:
            most = int(some.tokens * _PASS_SECONDS / max(found))
            more = sample.of(min(sample.tokens, most))
            if more.tokens < 2 * some.tokens and more.tokens < sample.tokens:
                break
            try:
                some, found = more, self._measure(decoder, more)
            except RuntimeError as error:  # the device's memory
                logger.info("%d tokens are measured: %s", some.tokens, error)
                break
        return some, found

    def _measure(self, decoder: Any, some: Sample) -> _Times:
        device = self._device
        shape = (some.tokens // some.length, some.length, decoder.config.hidden_size)
        hidden_BLD = torch.randn(shape, device=device).to(self._subject.dtype)
        forward = _seconds(lambda: _forward(decoder, hidden_BLD), device)
        if self._outline is None:
            return forward, 0.0
        return forward, _seconds(lambda: _both(decoder, hidden_BLD), device)


def _weighted(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """In the place of the experts: the router learns from it."""
    return hidden_states * top_k_weights.sum(-1, keepdim=True).to(hidden_states.dtype)


def _precision(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """As a Trainer has it for weights in half precision."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def _forward(decoder: Any, hidden_BLD: Tensor) -> None:
    with torch.no_grad(), _precision(hidden_BLD.dtype, hidden_BLD.device):
        decoder(inputs_embeds=hidden_BLD, use_cache=False)


def _both(decoder: Any, hidden_BLD: Tensor) -> None:
    learning = hidden_BLD.detach().requires_grad_()
    with _precision(hidden_BLD.dtype, hidden_BLD.device):
        out = decoder(inputs_embeds=learning, use_cache=False).last_hidden_state
    out.backward(torch.ones_like(out))


def _loss_seconds(
    subject: Subject, outline: TrainingOutline, sample: Sample, device: torch.device
) -> _Times:
    """Of the head and the loss, with some of the vocabulary."""
    text = subject.config.get_text_config()
    vocabulary = min(text.vocab_size, _SOME_VOCABULARY)
    tokens = min(sample.tokens, _LOSS_TOKENS)
    head_VD = torch.full((vocabulary, text.hidden_size), _WEIGHT, device=device).to(subject.dtype)
    hidden_TD = torch.randn(tokens, text.hidden_size, device=device).to(subject.dtype)
    head: Any = subject.model.get_output_embeddings()
    trained = {path.rpartition(".")[2] for path, m in subject.model.named_modules() if m is head}
    head_VD.requires_grad_(bool(trained & outline.trained))
    labels_T = torch.zeros(tokens, dtype=torch.int64, device=device)

    def loss(hidden: Tensor) -> Tensor:
        with _precision(subject.dtype, device):
            logits_TV = functional.linear(hidden, head_VD)
        return functional.cross_entropy(logits_TV.float(), labels_T)

    scale = text.vocab_size / vocabulary * sample.tokens / tokens
    both = _seconds(lambda: loss(hidden_TD.detach().requires_grad_()).backward(), device)
    with torch.no_grad():
        return scale * _seconds(lambda: loss(hidden_TD), device), scale * both


def _attention_seconds(
    text: Any, dtype: torch.dtype, dense: bool, device: torch.device
) -> tuple[float, float]:
    """Of attention for a pair of tokens and a channel; forward, and backward. dense: by matrices of
    all pairs."""
    heads = int(getattr(text, "num_attention_heads", 1) or 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    some = min(heads, _ATTENTION_HEADS)
    given = torch.randn(1, some, _ATTENTION_LENGTH, width, device=device).to(dtype)

    def attention(same: Tensor) -> Tensor:
        if dense:
            return (same @ same.mT).softmax(-1, dtype=torch.float32).to(dtype) @ same
        return functional.scaled_dot_product_attention(same, same, same, is_causal=True)

    def both() -> None:
        out = attention(given.detach().requires_grad_())
        out.backward(torch.ones_like(out))

    work = _ATTENTION_LENGTH**2 * some * width
    with torch.no_grad():
        forward = _seconds(lambda: attention(given), device)
    return forward / work, max(0.0, _seconds(both, device) - forward) / work


def _optimizer_seconds(device: torch.device) -> float:
    """Of AdamW and the norm of its gradients, for a parameter."""
    trained = [nn.Parameter(torch.full((n,), _WEIGHT, device=device)) for n in _TRAINED]
    for parameter in trained:
        parameter.grad = torch.full_like(parameter, _WEIGHT)
    optimizer = torch.optim.AdamW(trained, fused=True)  # what Transformers takes

    def step() -> None:
        clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return _seconds(step, device) / sum(_TRAINED)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median of some calls after the first, or the first, where it takes long."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    first = once()
    if first > _ENOUGH_SECONDS:
        return first
    begin, found = time.perf_counter(), [once()]
    while len(found) < _REPEATS and time.perf_counter() - begin < _ENOUGH_SECONDS:
        found.append(once())
    return statistics.median(found)
