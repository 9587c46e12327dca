"""Hybrid models on an accelerator against the same models on the CPU.

Every job on the device begins late, so that whoever does not wait for it reads poison.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from device_child import DEVICE, on_device
from peft import LoraConfig, PeftModel, get_peft_model
from simulated_device import SimulatedDevice
from tiny_configs import TINY_FAMILIES, build, text_inputs
from tiny_models import make_model
from torch import nn

from kt_sft import HybridExpertsConfig, hybridize
from kt_sft.adapters.layer import HybridExpertsLinear
from kt_sft.experts import hybrid_experts_of

Tensors = dict[str, torch.Tensor]

EXPERTS = ["gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(4))
# Relative, of a whole tensor: the same arithmetic in another order, its activations in 16 bits.
FP32, BF16 = 2e-4, 5e-2


@contextlib.contextmanager
def late(device: SimulatedDevice) -> Iterator[None]:
    """Everything takes its time, and nothing may be out of order."""
    device.clear()
    with device.delays(compute=20, down=500, up=500):
        yield
    assert device.observed().violations == []


def lora(model: nn.Module, targets: list[str] | str, dropout: float = 0.0) -> PeftModel:
    """A seeded LoRA whose B is not zero."""
    torch.manual_seed(1)
    model = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=targets)
    )
    generator = torch.Generator().manual_seed(11)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def qwen(dtype: torch.dtype = torch.float32, dropout: float = 0.0, **settings: object) -> PeftModel:
    base = make_model("qwen3_moe").to(dtype)
    return lora(
        hybridize(base, HybridExpertsConfig(threads=1, **settings)), [*EXPERTS, "o_proj"], dropout
    )


def placed(model: PeftModel, device: str) -> PeftModel:
    """Moving a model to such a device makes new parameters, so that what was tied comes apart."""
    model.to(device)
    model.base_model.model.tie_weights()
    return model


def gradients(model: nn.Module) -> Tensors:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return on_cpu(found)


def on_cpu(tensors: Tensors) -> Tensors:
    return {n: t.detach().float().cpu() for n, t in tensors.items()}


def step(model: nn.Module, ids: torch.Tensor = IDS) -> Tensors:
    """Loss, logits and gradients, on the CPU."""
    ids = ids.to(next(model.parameters()).device)
    out = model(ids, labels=ids)
    out.loss.backward()
    return on_cpu({"loss": out.loss, "logits": out.logits}) | gradients(model)


def assert_close(got: Tensors, want: Tensors, bound: float) -> None:
    assert got.keys() == want.keys() and any("experts" in n for n in got)
    off = {n: float((got[n] - t).norm() / t.norm().clamp_min(1e-6)) for n, t in want.items()}
    assert {n: d for n, d in off.items() if not d <= bound} == {}


def family_step(name: str, place: str, **settings: object) -> Tensors:
    """Loss, logits and gradients of a family's model, of its inputs too, on the CPU."""
    base = hybridize(build(name), HybridExpertsConfig(threads=1, **settings)).eval()
    model = placed(lora(base, r".*\.experts\.(gate|up|down)_proj"), place)
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())
    inputs = text_inputs(name, model)
    embeds = inputs["inputs_embeds"].detach().to(place).requires_grad_()
    inputs = {k: v.to(place) if torch.is_tensor(v) else v for k, v in inputs.items()}
    out = model(**{**inputs, "inputs_embeds": embeds})
    out.loss.backward()
    found = {"loss": out.loss, "logits": out.logits, "d_embeds": embeds.grad}
    return on_cpu(found) | gradients(model)


def _family(device: SimulatedDevice, *names: str) -> None:
    for name in names:
        with late(device):
            got = family_step(name, DEVICE)
        assert_close(got, family_step(name, "cpu"), FP32)


_NAMES = sorted(TINY_FAMILIES)


@pytest.mark.parametrize("first", range(0, len(_NAMES), 13))
def test_families(first: int) -> None:
    on_device(_family, *_NAMES[first : first + 13])


def _dtype(device: SimulatedDevice, dtype: torch.dtype, bound: float) -> None:
    with late(device):
        got = step(placed(qwen(dtype), DEVICE))
    assert_close(got, step(qwen(dtype)), bound)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, FP32), (torch.bfloat16, BF16)])
def test_dtypes(dtype: torch.dtype, bound: float) -> None:
    on_device(_dtype, dtype, bound)


def _autocast(device: SimulatedDevice) -> None:
    def run(place: str) -> Tensors:
        model = placed(qwen(), place)
        with torch.autocast(place, dtype=torch.bfloat16):
            return step(model)

    with late(device):
        got = run(DEVICE)
    assert_close(got, run("cpu"), BF16)


def test_autocast() -> None:
    on_device(_autocast)


def _checkpointing(device: SimulatedDevice, reentrant: bool, activations: str) -> None:
    model = placed(qwen(dropout=0.3, activations=activations), DEVICE).train()
    with late(device):
        torch.manual_seed(5)
        plain = step(model)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        again = step(model)
    # With dropout: the recomputed forward drops what the first one dropped.
    assert {n for n, t in plain.items() if not torch.equal(t, again[n])} == set()
    reading = next(iter(hybrid_experts_of(model).values())).runtime.meter.read()
    assert (
        reading.forward_calls - reading.backward_calls == {"keep": 0, "recompute": 3}[activations]
    )


@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved tensors"])
def test_checkpointing_changes_nothing(reentrant: bool, activations: str) -> None:
    on_device(_checkpointing, reentrant, activations)


def _accumulation(device: SimulatedDevice) -> None:
    def run(place: str) -> Tensors:
        model = placed(qwen(), place)
        for part in IDS.split(1):
            ids = part.to(place)
            model(ids, labels=ids).loss.backward()
        return gradients(model)

    with late(device):
        got = run(DEVICE)
    assert_close(got, run("cpu"), FP32)


def test_gradients_accumulate() -> None:
    on_device(_accumulation)


def _adapters(device: SimulatedDevice) -> None:
    def run(place: str) -> Tensors:
        model = placed(qwen(), place)
        model.add_adapter(
            "second", LoraConfig(r=5, target_modules=EXPERTS, init_lora_weights=False)
        )
        generator = torch.Generator().manual_seed(3)
        for name, p in model.named_parameters():
            if ".second" in name:
                p.data = (torch.randn(p.shape, generator=generator) * 0.2).to(place)
                assert p.device.type == place
        found = {}

        def logits(name: str) -> None:
            found[f"experts, {name}"] = model(IDS.to(place)).logits

        with torch.no_grad():
            logits("default")
            model.set_adapter("second")
            logits("second")
            model.base_model.set_adapter(["default", "second"])
            logits("both")
            with model.disable_adapter():
                logits("none")
            model.set_adapter("default")
            for module in model.modules():
                if isinstance(module, HybridExpertsLinear):
                    module.to(torch.bfloat16)
            logits("in bf16")
            model.merge_and_unload()
            logits("merged")
        return on_cpu(found)

    with late(device):
        got = run(DEVICE)
    assert_close(got, run("cpu"), FP32)


def test_adapters_are_created_switched_cast_and_merged() -> None:
    on_device(_adapters)


def _moved(device: SimulatedDevice) -> None:
    with late(device):
        model = qwen()
        want = step(model)
        assert_close(step(placed(model, DEVICE)), want, FP32)
        back = step(placed(model, "cpu"))
    assert {n for n, t in want.items() if not torch.equal(t, back[n])} == set()


def test_a_model_moves_to_the_device_and_back() -> None:
    on_device(_moved)


def _embeddings(device: SimulatedDevice) -> None:
    with late(device):
        model = placed(qwen(embeddings="host"), DEVICE)
        table = model.get_input_embeddings().weight
        assert table.device.type == "cpu" and model.device.type == DEVICE
        assert not any(p.shape == table.shape for n, p in model.named_parameters() if "embed" in n)
        got = step(model)
        copied = copy.deepcopy(model)
        assert copied.get_input_embeddings().weight is table
        again = step(copied)
        model.enable_input_require_grads()
        required = step(model)
    want = step(qwen())
    for found in (got, again, required):
        assert_close(found, want, FP32)


def test_embeddings_on_the_host() -> None:
    on_device(_embeddings)


def _generate(device: SimulatedDevice) -> None:
    def run(place: str) -> list[list[int]]:
        model = placed(qwen(embeddings="host" if place == DEVICE else "device"), place).eval()
        ids = IDS[:, :5].to(place)
        return model.generate(input_ids=ids, max_new_tokens=8, do_sample=False).tolist()

    with late(device):
        got = run(DEVICE)
    assert got == run("cpu")


def test_generate() -> None:
    on_device(_generate)
