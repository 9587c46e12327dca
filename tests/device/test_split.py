"""Layers that are parted between the host and a device, whose twin is the CPU here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from comparators import assert_matches
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from test_block import SILU, Block, gradient_of, inputs
from test_models_on_device import FP32, assert_close, qwen, step

from kt_sft.config import HybridExpertsSettings
from kt_sft.engines import choose
from kt_sft.engines.calibration import Calibrations, MeasuredLayer, measure
from kt_sft.engines.choose import choose_engine
from kt_sft.engines.cpu import CpuEngine, CpuExperts
from kt_sft.engines.nodes import NodeEngines
from kt_sft.engines.protocol import PlacedExperts
from kt_sft.engines.split import DeviceExperts, PartedEngine, PartedExperts
from kt_sft.experts import hybrid_experts_of
from kt_sft.kernels import PROJECTIONS, Call, Engine, ExpertWeights, Inputs, LoraFactors
from kt_sft.scheduling.assignment import AllOnDevice, Assignment, HostOnly, Policy, ResidentOnly
from kt_sft.scheduling.costs import EndsFirst, LayerCosts

E, K, D, F, T = 4, 2, 72, 40, 29


class Fixed:
    """Implements Policy."""

    def __init__(self, resident: Sequence[int], streamed: Sequence[int]) -> None:
        self.places = Assignment(tuple(resident), tuple(streamed))

    def assign(self, *_: object) -> Assignment:
        return self.places


def parted(
    weights: ExpertWeights, policy: Policy, kind: type[PartedExperts] = PartedExperts
) -> PartedExperts:
    experts = PartedEngine(CpuEngine(Engine(2)), lambda *_: policy, kind).on(weights)
    assert experts.share is not None
    experts.share.place([0, 1, 2])
    return experts


def results(
    experts: PlacedExperts,
    block: Block,
    dtype: torch.dtype = torch.float32,
    *,
    dropout: float = 0.2,
    lora: list[LoraFactors | None] | None = None,
    second_run: bool = False,
) -> list[Tensor]:
    """out, and all gradients, with one choice skipped."""
    x, index, weight = inputs(T, D, E, K)
    index[3, 1] = E
    x = x.to(dtype)
    call = Call("exact", SILU, dropout, dropout_seed=77)
    taken = Inputs(x, index, weight, tuple(block.lora if lora is None else lora))
    done = experts.forward(call, taken, experts.send(taken), keep=True, hold=second_run)
    assert (done.report.rows, sum(done.report.expert_rows)) == (T * K - 1, T * K - 1)
    if second_run and done.held is not None:
        again = experts.resume(call, taken, None, done.held)
        assert again is not None and torch.equal(again.out_TD, done.out_TD)
        elsewhere = index.clone()
        elsewhere[0] = elsewhere[0].flip(0)
        moved = Inputs(x, elsewhere, weight, taken.lora)
        assert experts.resume(call, moved, None, done.held) is None
        done = again
    assert done.context is not None
    found, report = experts.backward(done.context, gradient_of(x).to(dtype), None)
    assert report.rows == T * K - 1
    tensors = [done.out_TD, found.hidden_TD, found.weight_TK]
    return tensors + [t for t in found.lora if t is not None]


PLACES = {
    "all places": (PartedExperts, Fixed([1], [3, 0])),
    "residents": (PartedExperts, Fixed([0, 2], [])),
    "streamed": (PartedExperts, Fixed([], [3, 1])),
    "nothing there": (PartedExperts, Fixed([], [])),
    "nothing here": (PartedExperts, Fixed([2, 0], [1, 3])),
    "device": (DeviceExperts, AllOnDevice()),
}


@pytest.mark.parametrize("second_run", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", PLACES)
def test_parts_are_the_whole(name: str, dtype: torch.dtype, bound: float, second_run: bool) -> None:
    block = Block.shared(E, D, F, "int8", 3, biased=True)
    kind, policy = PLACES[name]
    want = results(CpuExperts(Engine(2), block.weights), block, dtype)
    got = results(parted(block.weights, policy, kind), block, dtype, second_run=second_run)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype
        assert_matches(a, b, bound, f"result {i}")


@pytest.mark.parametrize("name", ["all places", "device"])
def test_a_second_run_gives_the_same_gradients(name: str) -> None:
    block = Block.shared(E, D, F, "int8", 3)
    kind, policy = PLACES[name]
    for dtype in (torch.float32, torch.bfloat16):
        experts = parted(block.weights, policy, kind)
        once, twice = (results(experts, block, dtype, second_run=run) for run in (False, True))
        assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize("name", ["all places", "device"])
def test_shared_lora(name: str) -> None:
    block = Block.shared(E, D, F, "int8", 3)
    lora = [f and LoraFactors(f.a[:1], f.b[:1], f.scaling) for f in block.lora]
    kind, policy = PLACES[name]
    want = results(CpuExperts(Engine(2), block.weights), block, lora=lora)
    got = results(parted(block.weights, policy, kind), block, lora=lora)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_matches(a, b, 3e-4, f"result {i}")


def test_memory_nodes_share_with_a_device() -> None:
    block = Block.shared(E, D, 200, "int8", 3)
    cpus = {0}
    engine = PartedEngine(NodeEngines([cpus, cpus], 2), lambda *_: Fixed([], [1, 2]))
    experts = engine.new_experts(block.weights.layout)
    assert experts.share is None
    experts.take_channels(block.weights)
    assert experts.share is not None and len(experts.inner.parts) == 2
    want = results(CpuExperts(Engine(2), block.weights), block)
    for i, (a, b) in enumerate(zip(results(experts, block), want, strict=True)):
        assert_matches(a, b, 3e-4, f"result {i}")
    # Packed one by one, nobody has the whole layer: the host computes it.
    alone = engine.new_experts(block.weights.layout)
    for e in range(E):
        for p in PROJECTIONS:
            alone.pack(e, p, block.weights.unpack(e, p))
    for i, (a, b) in enumerate(zip(results(alone, block), want, strict=True)):
        assert_matches(a, b, 2e-2, f"result {i}")


@pytest.mark.parametrize("name", ["all places", "device"])
def test_an_expert_that_is_not_there_is_refused(name: str) -> None:
    block = Block.shared(E, D, F, "int8", 3)
    kind, policy = PLACES[name]
    for experts in (CpuExperts(Engine(2), block.weights), parted(block.weights, policy, kind)):
        for wrong in (-1, E + 1):
            x, index, weight = inputs(T, D, E, K)
            index[5, 1] = wrong
            with pytest.raises(ValueError, match=f"token 5 names expert {wrong}"):
                experts.forward(Call("exact", SILU), Inputs(x, index, weight), None, keep=False)


def test_an_error_of_either_side_comes_out_when_both_have_ended() -> None:
    block = Block.shared(E, D, F, "int8", 3)
    experts = parted(block.weights, Fixed([], [1, 2]))
    x, index, weight = inputs(T, D, E, K)
    with pytest.raises(ValueError, match="compute"):
        experts.forward(Call("bf16", SILU), Inputs(x, index, weight), None, keep=False)
    share = experts.share
    assert share is not None
    share._host = share._host.take([0])
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        experts.forward(Call("exact", SILU), Inputs(x, index, weight), None, keep=False)


@pytest.mark.parametrize("name", ["all places", "device"])
def test_a_pass_that_is_on_its_way_keeps_its_places(name: str) -> None:
    """Resident experts may have gone when its backward comes."""
    block = Block.shared(E, D, F, "int8", 3)
    kind, policy = PLACES[name]
    x, index, weight = inputs(T, D, E, K)
    taken, call = Inputs(x, index, weight, tuple(block.lora)), Call("exact", SILU)
    found = []
    for changes in (False, True):
        experts = parted(block.weights, policy, kind)
        assert experts.share is not None
        done = experts.forward(call, taken, None, keep=True)
        if changes:
            experts.share.place([3])
        assert done.context is not None
        gradients, _ = experts.backward(done.context, gradient_of(x), None)
        found.append([gradients.hidden_TD, gradients.weight_TK, *gradients.lora])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Alternates:
    """Implements Policy: another split at every call, as a routing that differs may lead to."""

    def __init__(self) -> None:
        self.calls = 0

    def assign(self, rows: Sequence[int], resident: Sequence[int], _: bool) -> Assignment:
        self.calls += 1
        busy = [e for e, n in enumerate(rows) if n]
        return Assignment((), tuple(busy[self.calls % 3 :: 3]))


@pytest.mark.parametrize("kind", [PartedExperts, DeviceExperts])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_a_recomputed_layer_is_parted_anew(
    kind: type[PartedExperts], activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd takes the tensors of a layer's second run, and so must we take its split."""
    policy: Policy = Alternates() if kind is PartedExperts else AllOnDevice()
    monkeypatch.setattr(choose, "policies", lambda *_: lambda *_: policy)

    def gradients(schedule: str) -> dict[str, Tensor]:
        model = qwen(schedule=schedule, activations=activations).train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if schedule != "host":  # nothing is admitted: all is computed again
            for module in hybrid_experts_of(model).values():
                module.runtime.kept.limit_is = lambda: 0
        return step(model)

    want = gradients("host")
    assert_close(gradients("device" if kind is DeviceExperts else "auto"), want, FP32)


def test_places_change_between_passes() -> None:
    """A pass that is on its way keeps its places."""
    block = Block.shared(E, D, F, "int8", 3)
    experts = parted(block.weights, ResidentOnly())
    want = results(CpuExperts(Engine(2), block.weights), block)
    assert experts.share is not None
    for chosen in ([0], [3, 1], [], [0, 1, 2, 3]):
        experts.share.place(chosen)
        assert experts.share.resident == tuple(sorted(chosen))
        for a, b in zip(results(experts, block), want, strict=True):
            assert_matches(a, b, 3e-4)


@pytest.mark.parametrize(
    "settings, kind, policy",
    [
        ({"schedule": "device"}, DeviceExperts, HostOnly),
        ({"schedule": "resident", "gpu_experts": 2}, PartedExperts, HostOnly),
        ({"schedule": "auto"}, PartedExperts, HostOnly),
    ],
)
def test_settings_choose(settings: dict[str, Any], kind: type, policy: type) -> None:
    """Without an accelerator the host computes, whatever they say."""
    block = Block.shared(E, D, F, "int8", 3)
    experts = choose_engine(HybridExpertsSettings(threads=1, **settings)).on(block.weights)
    assert type(experts) is kind
    assert isinstance(experts._policy_of(experts, torch.device("cpu")), policy)
    want = results(CpuExperts(Engine(1), block.weights), block)
    assert all(torch.equal(a, b) for a, b in zip(results(experts, block), want, strict=True))


def measured() -> MeasuredLayer:
    block = Block.shared(E, D, F, "int8", 3)
    return MeasuredLayer(CpuExperts(Engine(1), block.weights), block.weights, torch.device("cpu"))


def test_costs_are_measured() -> None:
    costs = measure(measured(), "exact", lora=True)
    for one in (costs.forward, costs.backward):
        for curve in (one.host, one.device):
            assert list(curve.seconds) == sorted(curve.seconds) and curve.seconds[-1] > 0
        assert one.host_fixed >= 0 and one.device_fixed >= 0
    assert LayerCosts.from_dict(costs.as_dict()) == costs
    assert isinstance(EndsFirst(costs).assign([1, 0, 900, 3], [2], True), Assignment)


def test_a_form_reads_the_same_in_every_process() -> None:
    """Costs are found again by it; a set's own text changes from process to process."""
    program = (
        "from kt_sft.engines.calibration import _form; from kt_sft.kernels import *;"
        "print(_form(WeightLayout(4, 64, 72, 'int8', biased=frozenset(PROJECTIONS))))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.splitlines()[-1]
        for seed in ("1", "2", "5")
    }  # fmt: skip
    assert found == {"64 x 72, int8, gated, bias of down_proj, bias of gate_proj, bias of up_proj"}


def test_measured_costs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, times = CpuEngine(Engine(1)), []
    stock = measure

    def counted(*arguments: Any) -> LayerCosts:
        times.append(1)
        return stock(*arguments)

    monkeypatch.setattr("kt_sft.engines.calibration.measure", counted)
    settings = HybridExpertsSettings(threads=1, store=str(tmp_path / "new" / "stores"))
    first = Calibrations(settings).costs(measured(), engine)
    assert Calibrations(settings).costs(measured(), engine) == first and len(times) == 1
    other = CpuEngine(Engine(2))
    Calibrations(settings).costs(measured(), other)
    assert len(times) == 2
    path = Calibrations(settings).path
    assert path is not None and path.is_file()
    for damaged in (b"{", b"[]", path.read_bytes().replace(b'"rows"', b'"lines"')):
        path.write_bytes(damaged)
        Calibrations(settings).costs(measured(), engine)
    assert len(times) == 5
    # A folder that cannot be written is no reason to stop.
    (tmp_path / "file").write_text("")
    nowhere = HybridExpertsSettings(threads=1, store=str(tmp_path / "file"))
    Calibrations(nowhere).costs(measured(), engine)
    assert len(times) == 6
