"""`activations: keep`: the experts' forward runs once, and no other pass takes what it kept."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import make_model
from torch import nn

from kt_sft import HybridExpertsConfig, hybridize
from kt_sft.adapters.layer import HybridExpertsLinear
from kt_sft.experts import hybrid_experts_of
from kt_sft.experts.runtime import ExpertsRuntime

TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(0, 300, (2, 13), generator=torch.Generator().manual_seed(4))
OTHER = IDS.flip(1)
LAYERS = 3

both_kinds = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved tensors"])


def lora_model(activations: str = "keep", dropout: float = 0.3) -> nn.Module:
    model = hybridize(make_model("qwen3_moe"), HybridExpertsConfig(activations=activations))
    torch.manual_seed(1)
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=TARGETS)
    )
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    return model.train()


def checkpointed(reentrant: bool, **settings: Any) -> nn.Module:
    model = lora_model(**settings)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def runtime_of(model: nn.Module) -> ExpertsRuntime:
    return next(iter(hybrid_experts_of(model).values())).runtime


def loss_of(model: nn.Module, ids: torch.Tensor = IDS, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return model(ids, labels=ids).loss


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def gradients(model: nn.Module, ids: torch.Tensor = IDS) -> dict[str, torch.Tensor]:
    loss_of(model, ids).backward()
    return gradients_of(model)


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys() and any("experts" in n for n in got)
    assert [n for n in want if not torch.equal(got[n], want[n])] == []


@both_kinds
@pytest.mark.parametrize("activations, runs", [("keep", 1), ("recompute", 2)])
def test_forward_runs(reentrant: bool, activations: str, runs: int) -> None:
    model = checkpointed(reentrant, activations=activations)
    meter = runtime_of(model).meter
    meter.read()
    got = gradients(model)
    reading = meter.read()
    assert (reading.forward_calls, reading.backward_calls) == (runs * LAYERS, LAYERS)
    assert_equal(got, gradients(lora_model()))


@both_kinds
def test_what_is_kept_is_counted_and_freed(reentrant: bool) -> None:
    model = checkpointed(reentrant)
    kept = runtime_of(model).kept
    loss = loss_of(model)
    tokens, rows, rank, width = 26, 2 * 26, 4, 128  # the 72 channels are padded
    pre_activations, down_products = 2 * rows * width * 4, 3 * rows * rank * 4
    layer = pre_activations + down_products + rows * 8 + tokens * model.config.hidden_size * 4
    assert kept.nbytes == LAYERS * layer
    loss.backward()
    assert kept.nbytes == 0 and kept.peak == LAYERS * layer


@both_kinds
def test_a_forward_without_backward_leaves_nothing(reentrant: bool) -> None:
    model = checkpointed(reentrant)
    loss = loss_of(model)
    kept = runtime_of(model).kept
    assert kept.nbytes > 0
    del loss
    gc.collect()
    assert kept.nbytes == 0


def evaluate(model: nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        model(OTHER)
    model.train()


def reference_pass(model: nn.Module) -> None:
    """As DPO does it: in training mode, without gradients, with the adapter off."""
    with torch.no_grad(), model.disable_adapter():
        model(IDS, labels=IDS)


def same_batch(model: nn.Module) -> None:
    with torch.no_grad():
        model(IDS, labels=IDS)


def failing_forward(model: nn.Module) -> None:
    class Stop(Exception):
        pass

    def stop(*unused: Any) -> None:
        raise Stop

    last = list(hybrid_experts_of(model).values())[-1]
    handle = last.register_forward_pre_hook(stop)
    with contextlib.suppress(Stop):
        model(OTHER, labels=OTHER)
    handle.remove()


@both_kinds
@pytest.mark.parametrize("between", [evaluate, reference_pass, same_batch, failing_forward])
def test_a_pass_between_forward_and_backward(
    reentrant: bool, between: Callable[[nn.Module], None]
) -> None:
    want = gradients(lora_model())
    model = checkpointed(reentrant)
    kept = runtime_of(model).kept
    loss = loss_of(model)
    held = kept.nbytes
    between(model)
    gc.collect()
    assert kept.nbytes == held
    loss.backward()
    assert_equal(gradients_of(model), want)
    assert kept.nbytes == 0


@both_kinds
def test_a_forward_without_gradients_keeps_nothing(reentrant: bool) -> None:
    model = checkpointed(reentrant)
    with torch.no_grad():
        loss_of(model)
    assert runtime_of(model).kept.peak == 0


@both_kinds
def test_two_live_forwards(reentrant: bool) -> None:
    model = checkpointed(reentrant)
    want = [gradients(lora_model(), ids) for ids in (IDS, OTHER)]
    losses = [loss_of(model, ids) for ids in (IDS, OTHER)]
    for loss, expected in zip(losses, want, strict=True):
        loss.backward()
        assert_equal(gradients_of(model), expected)


@both_kinds
def test_an_exception_in_the_middle_leaves_nothing(reentrant: bool) -> None:
    model = checkpointed(reentrant)
    failing_forward(model)
    gc.collect()
    assert runtime_of(model).kept.nbytes == 0
    assert_equal(gradients(model), gradients(lora_model()))


@both_kinds
@pytest.mark.parametrize("layers", [0, 1])
def test_over_the_limit_the_rest_is_recomputed(
    reentrant: bool, layers: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = checkpointed(reentrant)
    runtime = runtime_of(model)
    probe = loss_of(model)
    each = runtime.kept.nbytes // LAYERS
    del probe
    gc.collect()
    runtime.kept._limit = layers * each
    runtime.meter.read()
    assert_equal(gradients(model), gradients(lora_model()))
    assert runtime.meter.read().forward_calls == 2 * LAYERS - layers
    assert caplog.text.count("have reached their limit") == 1


@both_kinds
def test_another_routing_is_computed_anew(reentrant: bool) -> None:
    """The rows that were kept are sorted by expert: they serve one routing only."""
    model = checkpointed(reentrant, dropout=0.0)
    runtime = runtime_of(model)
    changes = [0]

    def other_routing(module: nn.Module, inputs: tuple) -> tuple:
        hidden, index, weight = inputs
        changes[0] += 1
        # In the second runs the two choices of each token are exchanged, with their weights.
        return (hidden, index.flip(1), weight.flip(1)) if changes[0] > LAYERS else inputs

    for module in hybrid_experts_of(model).values():
        module.register_forward_pre_hook(other_routing)
    runtime.meter.read()
    got = gradients(model)
    assert runtime.meter.read().forward_calls == 2 * LAYERS
    if not reentrant:
        return  # its graph is that of the first run: with another routing it fits nothing
    for name, value in gradients(lora_model(dropout=0.0)).items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)


def test_backward_twice_computes_anew() -> None:
    model = checkpointed(reentrant=False)
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    first = gradients_of(model)
    loss.backward()
    assert_equal(gradients_of(model), first)


@both_kinds
def test_the_model_may_write_into_the_output(reentrant: bool) -> None:
    """Shared experts add to it in place: what is kept must not change with it."""

    def halve(module: nn.Module, inputs: tuple, out: torch.Tensor) -> torch.Tensor:
        return out.mul_(0.5)

    models = [checkpointed(reentrant), lora_model()]
    for model in models:
        for module in hybrid_experts_of(model).values():
            module.register_forward_hook(halve)
    assert_equal(*map(gradients, models))


@both_kinds
def test_checkpointing_that_was_on_before(reentrant: bool) -> None:
    stock = make_model("qwen3_moe")
    stock.train()
    stock.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model = hybridize(stock, HybridExpertsConfig())
    model.enable_input_require_grads()
    meter = runtime_of(model).meter
    meter.read()
    loss_of(model).backward()
    assert meter.read().forwards_per_backward == 1


def test_a_copied_model_has_its_own_checkpointing() -> None:
    import copy

    model = checkpointed(reentrant=True)
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_disable()
    assert model.get_base_model().is_gradient_checkpointing
    assert not twin.get_base_model().is_gradient_checkpointing


def test_joined_adapters_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several adapters are joined for each pass; a checkpointed layer joins them again."""
    model = checkpointed(False, dropout=0.0)
    model.add_adapter("second", LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    joined: list[weakref.ref] = []
    stock = HybridExpertsLinear._joined

    def recording(self: HybridExpertsLinear, names: list[str]) -> Any:
        made = stock(self, names)
        joined.extend(weakref.ref(t) for t in made or ())
        return made

    monkeypatch.setattr(HybridExpertsLinear, "_joined", recording)
    loss = loss_of(model)
    gc.collect()
    assert len(joined) == LAYERS * 6 and [r for r in joined if r() is not None] == []
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "second" in n)
