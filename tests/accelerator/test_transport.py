"""What crosses the link between the simulated device and the host, and who waits for it."""

from __future__ import annotations

import contextlib
import copy
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from device_child import DEVICE, on_device, outcome
from peft import LoraConfig, PeftModel
from simulated_device import Observed, SimulatedDevice
from test_models_on_device import FP32, IDS, assert_close, gradients, late, lora, placed, qwen, step
from tiny_configs import build
from torch import nn

import kt_sft.engines.host as host
import kt_sft.engines.link as link
import kt_sft.experts.ahead as ahead_module
from kt_sft import HybridExpertsConfig, hybridize
from kt_sft.engines.cpu import CpuExperts
from kt_sft.engines.link import BUFFERS, link_of
from kt_sft.experts import hybrid_experts_of
from kt_sft.kernels import PROJECTIONS

LAYERS, EXPERTS, RANK, HIDDEN, CHANNELS, TOP_K = 3, 8, 3, 64, 72, 2
TOKENS = IDS.numel()
FLOAT, INDEX = 4, 8
# Of one layer: A and B of gate, up and down.
LORA = 3 * EXPERTS * RANK * (HIDDEN + CHANNELS) * FLOAT
UP, BACK = TOKENS * HIDDEN * FLOAT, TOKENS * TOP_K * FLOAT
PATIENCE = 0.5
DOWN = UP + TOKENS * TOP_K * INDEX + BACK


def padded(*sizes: int) -> int:
    return sum(-(-size // 64) * 64 for size in sizes)


def watched(device: SimulatedDevice, model: nn.Module) -> tuple[Observed, Observed]:
    """What the device saw of a forward, and of its backward, without the labels' way up."""
    ids = IDS.to(DEVICE)
    torch.accelerator.synchronize()
    device.clear()
    loss = model(ids, labels=ids).loss
    forward = device.observed()
    torch.accelerator.synchronize()
    device.clear()
    loss.backward()
    return forward, device.observed()


def _steady(device: SimulatedDevice) -> None:
    model = placed(qwen(), DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watched(device, model)
    model.zero_grad()
    for changed in (False, True):
        if changed:
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            model.zero_grad()
        forward, backward = watched(device, model)
        lora = LORA if changed else 0
        assert forward.copies_down == (2 if changed else 1) * LAYERS
        per_layer = padded(UP, TOKENS * TOP_K * INDEX, BACK)
        assert forward.bytes_down == LAYERS * (per_layer + lora)
        assert (forward.copies_up, forward.bytes_up) == (LAYERS, LAYERS * UP)
        assert (backward.copies_down, backward.bytes_down) == (LAYERS, LAYERS * UP)
        assert (backward.copies_up, backward.bytes_up) == (
            2 * LAYERS,
            LAYERS * (padded(UP, BACK) + LORA),
        )
        # The host waits for its inputs only: an event for each layer and direction.
        for seen in (forward, backward):
            assert seen.waits == {**dict.fromkeys(seen.waits, 0), "event": LAYERS}
            assert seen.violations == []
    assert link_of(torch.device(DEVICE, 0)).pinned_bytes <= 2 * BUFFERS * (1 << 20)


def test_a_step_copies_and_waits_as_little_as_it_can() -> None:
    on_device(_steady)


def _changes(device: SimulatedDevice) -> None:
    """Whatever way LoRA changes, the host computes with what it is now."""
    model = placed(qwen(), DEVICE).eval()
    parameters = {n: p for n, p in model.named_parameters() if "experts" in n and "lora_B" in n}
    name, factor = next(iter(parameters.items()))

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(IDS.to(DEVICE)).logits.cpu()

    def written_through_data() -> None:
        # As DeepSpeed does it, whose optimizer steps first.
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0).step()
        factor.data.mul_(-2)

    def assigned() -> None:
        factor.data = factor.data * 3

    def loaded() -> None:
        model.load_state_dict({name: factor.detach().cpu() * 0.5}, strict=False)

    def in_place() -> None:
        with torch.no_grad():
            factor.add_(0.1)

    for change in (in_place, written_through_data, assigned, loaded):
        before = logits()
        change()
        after = logits()
        assert not torch.equal(before, after), change.__name__
        fresh = placed(qwen(), "cpu").eval()
        fresh.load_state_dict({n: p.detach().cpu() for n, p in model.named_parameters()}, False)
        with torch.no_grad():
            torch.testing.assert_close(after, fresh(IDS).logits, rtol=1e-3, atol=1e-3)
        device.clear()
        logits()
        assert device.observed().copies_down == LAYERS + 1, change.__name__


def test_changed_lora_is_fetched_once() -> None:
    on_device(_changes)


def _waiting(device: SimulatedDevice, dtype: torch.dtype) -> None:
    def accumulated(wait: bool) -> tuple[dict[str, torch.Tensor], int]:
        model = placed(qwen(), DEVICE).train()
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.to(dtype)
        runtime = next(iter(hybrid_experts_of(model).values())).runtime
        parts = [IDS, IDS.flip(0), IDS.flip(1)]
        device.clear()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            for i, part in enumerate(parts):
                last = i == len(parts) - 1
                runtime.gradients_may_wait = lambda last=last: wait and not last
                ids = part.to(DEVICE)
                model(ids, labels=ids).loss.backward()
                assert last or wait == all(
                    p.grad is None for n, p in model.named_parameters() if "experts" in n
                )
        return gradients(model), device.observed().bytes_up

    (together, less), (each, more) = accumulated(True), accumulated(False)
    assert {n for n, t in each.items() if not torch.equal(t, together[n])} == set()
    assert more - less == 2 * LAYERS * LORA * dtype.itemsize // FLOAT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_wait_are_the_same_to_the_bit(dtype: torch.dtype) -> None:
    on_device(_waiting, dtype)


def _forgotten(device: SimulatedDevice) -> None:
    model = placed(qwen(), DEVICE).train()
    want = step(model)
    experts = hybrid_experts_of(model).values()
    runtime = next(iter(experts)).runtime
    runtime.gradients_may_wait = lambda: True
    step(model, IDS.flip(1))
    for module in experts:
        module.weights.forget_gradients()
    runtime.gradients_may_wait = lambda: False
    got = step(model)
    assert {n for n, t in want.items() if not torch.equal(t, got[n])} == set()


def test_gradients_that_wait_can_be_dropped() -> None:
    on_device(_forgotten)


def _growing(device: SimulatedDevice) -> None:
    """Batches of other sizes, and two models in turns, share the link's memory."""
    models = [placed(qwen(), DEVICE), qwen()]
    other = placed(qwen(activations="recompute"), DEVICE)
    for length in (3, 17, 5, 17, 2):
        with late(device):
            got = step(models[0], IDS[:, :length])
            again = step(other, IDS[:, :length])
        want = step(models[1], IDS[:, :length])
        assert_close(got, want, FP32)
        assert_close(again, want, FP32)


def test_batches_of_any_size() -> None:
    on_device(_growing)


def plant(module: types.ModuleType, old: str, new: str) -> None:
    """Puts a fault into a module: into its classes, and into whoever imported its functions."""
    source = Path(module.__file__ or "").read_text()
    assert source.count(old) == 1, old
    before = dict(vars(module))
    exec(compile(source.replace(old, new), str(module.__file__), "exec"), vars(module))
    users = [m for name, m in sys.modules.items() if name.startswith("kt_sft.engines")]
    for name, stock in before.items():
        if getattr(stock, "__module__", None) != module.__name__:
            continue
        changed = vars(module)[name]
        if isinstance(stock, type):
            for member, value in vars(changed).items():
                if callable(value):
                    setattr(stock, member, value)
            vars(module)[name] = stock
            continue
        for user in users:
            if vars(user).get(name) is stock:
                setattr(user, name, changed)


_FAULTS = {
    "results are used before they are there": (
        link, "        link.current_stream().wait_event(self._sent)\n", ""
    ),
    "inputs are copied before they are made": (
        link, "        link.down_stream.wait_event(link.mark())\n", ""
    ),
    "the host does not wait for its inputs": (link, "        self._arrived.synchronize()\n", ""),
    "pinned memory is reused too early": (
        link, "give_back(self._buffer, self._sent)", "give_back(self._buffer, None)"
    ),
    "the device's tensors are read on the host": (
        host, "if arriving is not None:", "if arriving is None:"
    ),
    "what backward needs stays in the link's memory": (
        host, 'if inputs.hidden_TD.device.type != "cpu":  # the', "if False:  # the"
    ),
    "gradients of LoRA stay on the host": (
        host, "for i, sent in zip(places, landing.send(traffic), strict=True):",
        "for i, sent in zip(places, landing.tensors, strict=True):",
    ),
    "LoRA is fetched but once": (
        host, "copy = self._mirror.copy_of(factor)",
        "copy = self._mirror._of(factor).copy if factor in self._mirror._known else None",
    ),
}  # fmt: skip


def _overwritten(device: SimulatedDevice, fault: bool) -> None:
    """Memory for a result that earlier work of the current stream still reads."""
    if fault:
        plant(link, "        link.up_stream.wait_event(self._free)\n", "")
    there = link_of(torch.device(DEVICE, 0))
    with device.delays(compute=3000):
        read = torch.ones(4000, device=DEVICE)
        doubled = read * 2
        del read
        with there.landing((torch.Size([4000]), torch.float32)) as landing:
            landing.tensors[0].fill_(5)
            (sent,) = landing.send(link.Traffic())
        assert (doubled.tolist(), sent.tolist()) == ([2.0] * 4000, [5.0] * 4000) or fault
    assert bool(device.observed().violations) == fault


@pytest.mark.parametrize("fault", [False, True])
def test_results_do_not_overwrite_what_is_still_read(fault: bool) -> None:
    on_device(_overwritten, fault)


PLANTED = "the fault is planted"


def _check(device: SimulatedDevice, fault: str) -> None:
    if fault:
        plant(*_FAULTS[fault])
        sys.stderr.write(f"{PLANTED}\n")
    models = [placed(qwen(), DEVICE), qwen()]
    with late(device):
        first = step(models[0])
        for model in models:
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "experts" in name:
                        p.add_(0.05)
        got = step(models[0], IDS.flip(1))
    assert all(t.isfinite().all() for t in first.values())
    assert_close(got, step(models[1], IDS.flip(1)), FP32)


def test_without_a_fault() -> None:
    on_device(_check, "")


@pytest.mark.parametrize("fault", _FAULTS)
def test_a_fault_is_seen(fault: str) -> None:
    module, old, new = _FAULTS[fault]
    source = Path(module.__file__ or "").read_text()
    assert source.count(old) == 1
    compile(source.replace(old, new), str(module.__file__), "exec")
    code, output = outcome(_check, fault)
    assert code != 0 and PLANTED in output, output


def _on_host(device: SimulatedDevice) -> None:
    """LoRA of the experts that stays: nothing of it is on the device or crosses the link."""
    model = placed(qwen(adapters="host"), DEVICE).train()
    places = {n: p.device.type for n, p in model.named_parameters() if "lora_" in n}
    assert {n for n, place in places.items() if place == "cpu"} == {
        n for n in places if "experts" in n
    }
    with late(device):
        got = step(model)
    assert_close(got, step(qwen()), FP32)
    _, backward = watched(device, model)
    assert (backward.copies_up, backward.bytes_up) == (LAYERS, LAYERS * padded(UP, BACK))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n and "experts" in n).add_(1)
    forward, _ = watched(device, model)
    assert forward.copies_down == LAYERS
    model.to(torch.bfloat16)
    torch.accelerator.synchronize()
    device.clear()
    with torch.no_grad():
        model(IDS.to(DEVICE))
    # The tokens, which torch copies as it likes, and each layer's result.
    assert device.observed().copies_up <= LAYERS + 1
    model.add_adapter("late", LoraConfig(r=2, target_modules=["up_proj"]))
    later = {p.device.type for n, p in model.named_parameters() if ".late" in n}
    assert later == {"cpu"}
    assert {p.dtype for n, p in model.named_parameters() if "default" in n} == {torch.bfloat16}


def test_adapters_that_stay_on_the_host() -> None:
    on_device(_on_host)


def _watch_meanwhile(
    device: SimulatedDevice, name: str, enough: Callable[[list[str]], bool]
) -> list[list[str]]:
    """What the device computes between a call's way down and its arithmetic, for each call.

    The host's arithmetic begins when that is enough, at the latest after `PATIENCE` seconds.
    """
    stock, seen = getattr(CpuExperts, name), []

    def ran() -> list[str]:
        trace = device.observed().trace
        down = max(i for i, job in enumerate(trace) if job.kind == "down")
        return [job.name for job in trace[down:] if job.kind == "compute"]

    def watched(*args: Any) -> Any:
        end = time.monotonic() + PATIENCE
        while not enough(ran()) and time.monotonic() < end:
            time.sleep(0.005)
        seen.append(ran())
        return stock(*args)

    setattr(CpuExperts, name, watched)
    return seen


def _overlapping(device: SimulatedDevice, family: str, ahead: bool) -> None:
    def made() -> PeftModel:
        base = hybridize(build(family), HybridExpertsConfig(threads=1))
        return lora(base, [*PROJECTIONS, "o_proj"]).train()

    want = step(made())
    model = placed(made(), DEVICE)
    forward = _watch_meanwhile(device, "_forward", bool)
    backward = _watch_meanwhile(device, "_backward", lambda names: names.count("aten::mm") >= 3)
    layers = len(hybrid_experts_of(model))
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        forward.clear(), backward.clear()
        device.clear()
        with device.delays(compute=2000):
            got = step(model)
        assert_close(got, want, FP32)
        assert device.observed().violations == []
        assert [bool(names) for names in forward] == [ahead] * layers
        # In backward there are other gradients of the layer too, whatever the family.
        assert [names.count("aten::mm") >= 3 for names in backward] == [True] * layers or not ahead


@pytest.mark.parametrize(
    "family, ahead",
    [
        ("deepseek_v3", True),
        ("qwen3_next", True),  # called first in the stock block
        ("ernie4_5_moe", True),  # so, and in an `if`
        ("hunyuan_v1_moe", True),  # so, and the input's name is given to something else
        ("aria_text", True),  # on a view of the input
        ("llama4_text", True),  # a block forward of our own
        ("qwen3_moe", False),
    ],
)
def test_shared_experts_run_while_the_host_computes(family: str, ahead: bool) -> None:
    """Qwen3 has none, and so shows that the test can fail."""
    on_device(_overlapping, family, ahead)


def _ahead_is_safe(device: SimulatedDevice) -> None:
    """What was computed early is used for its own input only, also by copies and with hooks."""
    model = hybridize(build("deepseek_v3"), HybridExpertsConfig(threads=1)).to(DEVICE).eval()
    block = next(m for m in model.modules() if hasattr(m, "shared_experts"))
    hidden = torch.randn(2, 5, 64, device=DEVICE)
    with torch.no_grad():
        first = block(hidden)
        assert torch.equal(block(hidden), first)
        copied = copy.deepcopy(block)
        block.shared_experts.down_proj.weight.mul_(2)
        assert not torch.equal(block(hidden), first)
        assert torch.equal(copied(hidden), first) and torch.equal(copied(hidden), first)
        # Written into meanwhile, the input is not what the early result was made of.
        compute = copied.experts.compute
        shared, nothing = copied.shared_experts(hidden), copied.shared_experts(hidden * 0)

        def compute_and_write(*tensors: torch.Tensor) -> torch.Tensor:
            out = compute(*tensors)
            hidden.zero_()
            return out

        copied.experts.compute = compute_and_write
        torch.testing.assert_close(copied(hidden), first - shared + nothing)
    assert not ahead_module._running.calls
    fresh = hybridize(build("deepseek_v3"), HybridExpertsConfig(threads=1)).to(DEVICE).eval()
    block = next(m for m in fresh.modules() if hasattr(m, "shared_experts"))
    calls = []
    handle = block.shared_experts.register_forward_hook(lambda *_: calls.append(1))
    hidden = torch.randn(2, 5, 64, device=DEVICE)
    with torch.no_grad():
        first = block(hidden)
        assert len(calls) == 1
        handle.remove()
        assert torch.equal(block(hidden), first)
        # What an interrupt left is forgotten by the next call.
        compute = block.experts.compute
        block.experts.compute = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        with contextlib.suppress(KeyboardInterrupt):
            block(hidden)
        block.experts.compute = compute
        assert torch.equal(block(hidden), first) and not ahead_module._running.calls


def _inference(device: SimulatedDevice) -> None:
    """As LLaMA-Factory's chat does it; what is made there may be used by a training later."""
    for family in ("deepseek_v3", "qwen3_moe"):
        base = hybridize(build(family), HybridExpertsConfig(threads=1))
        model = placed(lora(base, [*PROJECTIONS, "o_proj"]), DEVICE).train()
        with torch.inference_mode():
            first = model(IDS.to(DEVICE)).logits
            assert torch.equal(model(IDS.to(DEVICE)).logits, first)
        step(model)
        with torch.inference_mode():
            assert torch.equal(model(IDS.to(DEVICE)).logits, first)


def test_inference_mode() -> None:
    on_device(_inference)


def _averages(device: SimulatedDevice) -> None:
    """Weights that are swapped in for an evaluation, and back, through `.data`."""
    model = placed(qwen(), DEVICE).train()
    reference = qwen().train()
    for m in (model, reference):
        m(IDS.to(m.device), labels=IDS.to(m.device))
        saved = {n: p.data.clone() for n, p in m.named_parameters() if "lora_" in n}
        m.eval()
        for n, p in m.named_parameters():
            if n in saved:
                p.data.copy_(saved[n] * 0.5)
        with torch.no_grad():
            m(IDS.to(m.device))
        m.train()
        for n, p in m.named_parameters():
            if n in saved:
                p.data.copy_(saved[n])
    assert_close(step(model), step(reference), FP32)


def test_averaged_weights_are_noticed() -> None:
    on_device(_averages)


def test_early_results_serve_their_input_only() -> None:
    on_device(_ahead_is_safe)
