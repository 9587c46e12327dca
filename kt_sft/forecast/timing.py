"""How long a step takes, by part: the experts, the other layers, the link, the optimizer.

The experts' part comes from a measurement of the layer's own form, or of a described machine from
rates; the others are counted operations and bytes over measured rates. Routing is taken to be even,
every sequence to be as long as it may be.

Legend: T tokens of a micro batch, K top-k, D hidden size, F intermediate size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kt_sft.forecast.machines import BACKWARD, Machine
from kt_sft.forecast.probe import RestTimes
from kt_sft.forecast.subject import Subject, attention_channels
from kt_sft.kernels import WeightLayout
from kt_sft.planning.plan import LayerNeeds, MemoryPlan, lora_parameters
from kt_sft.planning.schedule import expected_rows
from kt_sft.scheduling.costs import Curve

# Reads and writes of a tensor [T, D] within a layer's forward beside its products (norms,
# rotations, residuals, the router, casts), and of the logits without a fused loss.
_TENSORS = 40
_LOGIT_TENSORS = 6
# Bytes an optimizer of the kind of Adam moves for a parameter in fp32.
_OPTIMIZER_BYTES = 36
_FLOAT = 4


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one expert by its rows, and of a call, forward and backward."""

    forward: tuple[Curve, float]
    backward: tuple[Curve, float]

    @classmethod
    def assumed(cls, machine: Machine, layout: WeightLayout, compute: str) -> LayerTimes:
        """Of a described machine: arithmetic or reading the weights, whichever takes longer."""
        assert machine.core_rates is not None
        rate = machine.threads * machine.core_rates[layout.arithmetic or compute]
        each = layout.nbytes / layout.experts / machine.bandwidth
        matrices = len(layout.projections)
        operations = 2.0 * matrices * layout.hidden * layout.intermediate / rate
        rows = (1, 8, 32, 128, 512)

        def curve(factor: float) -> Curve:
            return Curve(rows, tuple(max(each, factor * operations * n) for n in rows))

        return cls((curve(1.0), 0.0), (curve(BACKWARD), 0.0))

    def seconds(self, layout: WeightLayout, tokens: int, top_k: int) -> tuple[float, float]:
        """Of a layer's forward and backward with even routing."""
        rows = np.asarray(expected_rows([1 / layout.experts] * layout.experts, tokens, top_k))
        rows = rows[rows > 0]
        (ahead, first), (back, second) = self.forward, self.backward
        return float(ahead(rows).sum()) + first, float(back(rows).sum()) + second


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by part, and its tokens."""

    tokens: int
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        """All parts, one after the other."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Of one process."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Passes:
    """What is computed how often in a micro batch: forwards of experts and of the rest; crossings:
    tensors [T, D] of a layer that cross the link."""

    experts: int
    rest: int
    backward: bool
    crossings: int

    @classmethod
    def of(cls, plan: MemoryPlan, references: int) -> Passes:
        """references: forwards without backward beside those that train."""
        if plan.work is None:
            return cls(1, 1, False, 2)
        again = int(plan.work.checkpointing)
        experts = 1 + again * (not plan.keeps) + references
        # Down and up in each forward and in backward; kept results only come up again.
        crossings = 2 * experts + again * plan.keeps + 2
        return cls(experts, 1 + again + references, True, crossings)


def rest_operations(subject: Subject, length: int) -> tuple[float, float]:
    """Of one token's forward beside the routed experts, in sequences of this length: operations of
    products with weights, and of attention between tokens."""
    table: Any = subject.model.get_input_embeddings()
    embeddings = {id(table.weight)}
    head: Any = subject.model.get_output_embeddings()
    tied = head is not None and id(head.weight) in embeddings
    products = sum(
        p.numel()
        for name, p in subject.model.named_parameters()
        if p.dim() >= 2 and id(p) not in embeddings and not _sees_no_text(name)
    )
    products += head.weight.numel() if tied else 0
    return 2.0 * products, 2.0 * length * _attention_width(subject.config.get_text_config())


def _sees_no_text(name: str) -> bool:
    return any(part in name for part in ("visual.", "vision_tower.", "vision_model.", "audio"))


def _attention_width(text: Any) -> float:
    """Channels of queries and values over all layers that look at the whole sequence."""
    kinds = getattr(text, "layer_types", None)
    layers = text.num_hidden_layers
    if kinds:
        layers = sum(kind == "full_attention" for kind in kinds)
    return layers * attention_channels(text)


@dataclass(frozen=True)
class Load:
    """One optimizer step: micro batches of `tokens` in sequences of `length`; references: as of
    TrainingOutline."""

    tokens: int
    length: int
    micro_batches: int
    references: int = 0


def time_of_step(
    subject: Subject,
    machine: Machine,
    plan: MemoryPlan,
    times: Callable[[LayerNeeds, int], LayerTimes],
    load: Load,
    rest: RestTimes | None = None,
) -> StepTime:
    """Of an optimizer step; without a training, of one forward. rest: where it is measured."""
    text, work, device = subject.config.get_text_config(), plan.work, machine.device
    passes = Passes.of(plan, load.references)
    ahead = back = 0.0
    rank = 0 if work is None else work.rank
    for layer in plan.layers:
        found = times(layer, rank)
        forward, backward = found.seconds(layer.layout, load.tokens, layer.top_k)
        ahead, back = ahead + forward, back + backward
    parts = {"experts, forward": load.micro_batches * passes.experts * ahead}
    tensor = load.tokens * text.hidden_size * subject.dtype.itemsize
    other = 0 if work is None else work.other_trained
    if rest is None:
        rest = _counted_rest(subject, machine, plan, load, passes)
    crossing = passes.crossings * tensor * len(plan.layers)
    link = 0.0 if device is None else load.micro_batches * crossing / device.link
    if work is not None:
        parts["experts, backward"] = load.micro_batches * back
        trained = sum(lora_parameters(layer, work.rank) for layer in plan.layers)
        here = plan.adapters == "host"
        if device is not None and not here:  # LoRA down, its gradients up
            link += 2 * _FLOAT * trained / device.link
        each = rest.optimizer_host if here else rest.optimizer_device
        parts["optimizer"] = trained * each + other * rest.optimizer_device
    layers = rest.forward
    if work is not None:
        layers = rest.training + load.references * rest.forward
    parts |= {"other layers": load.micro_batches * layers, "link": link}
    return StepTime(load.micro_batches * load.tokens, {k: v for k, v in parts.items() if v})


def _counted_rest(
    subject: Subject, machine: Machine, plan: MemoryPlan, load: Load, passes: Passes
) -> RestTimes:
    """Counted operations and bytes over rates."""
    text, work, device = subject.config.get_text_config(), plan.work, machine.device
    rate, bandwidth = (
        (machine.rate, machine.bandwidth) if device is None else (device.rate, device.bandwidth)
    )
    moved = _TENSORS * load.tokens * text.hidden_size * subject.dtype.itemsize
    moved *= text.num_hidden_layers
    if work is None or not work.fused_loss:
        moved += _LOGIT_TENSORS * load.tokens * text.vocab_size * _FLOAT
    other = 0 if work is None else work.other_trained
    products, attention = rest_operations(subject, load.length)
    forward = load.tokens * (products + attention + 2.0 * other) / rate + moved / bandwidth
    # Backward of frozen weights is one product more, for the inputs; of attention and of what
    # trains two, for the gradients of both operands.
    ahead = passes.rest - load.references
    operations = (ahead + 1) * products + (ahead + 2) * (attention + 2.0 * other)
    training = load.tokens * operations / rate + (ahead + 1) * moved / bandwidth
    return RestTimes(
        forward, training, _OPTIMIZER_BYTES / machine.bandwidth, _OPTIMIZER_BYTES / bandwidth
    )
