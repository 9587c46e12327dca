"""The layers beside the routed experts, run alone to see what they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import golden_plans
import pytest
import torch
from tiny_configs import TINY_FAMILIES, build
from torch import nn

from kt_sft.experts.module import HybridExperts
from kt_sft.forecast import probe
from kt_sft.forecast.probe import RestTimes, Sample, measured_rest
from kt_sft.forecast.subject import Subject, attention_channels
from kt_sft.planning.lora_targets import LoraTargets
from kt_sft.planning.outline import TrainingOutline

CPU = torch.device("cpu")
# One with latent attention, dense layers and shared experts; one with linear attention; with sinks;
# of text and images; of which no layer can be taken alone, which has kinds that config derives.
QUICK = ("deepseek_v3", "qwen3_next", "gpt_oss", "qwen3_vl_moe", "jamba")
ESTIMATED = {"jamba"}
KINDS = {
    "DeepSeek-V3": {0: 3, 3: 58},
    "Qwen3-30B-A3B": {0: 48},
    "Qwen3.5-35B-A3B": {0: 30, 3: 10},
    "gpt-oss-120b": {0: 18, 1: 18},
}


def subject_of(family: str, folder: Path) -> Subject:
    model: Any = build(family)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return Subject.of(str(folder), torch.bfloat16)


def rest_of(
    subject: Subject, sample: Sample, targets: str = "all", **outline: Any
) -> RestTimes | None:
    given = TrainingOutline(sample.tokens, 8, LoraTargets.of(targets), **outline)
    return measured_rest(subject, given, sample, CPU)


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_ENOUGH_SECONDS", 0.0)


@pytest.mark.parametrize("targets", ["all", "q_proj"])
@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in QUICK else [pytest.mark.slow]) for f in TINY_FAMILIES],
)
def test_every_family_is_measured(
    family: str, targets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its experts called and LoRA where the plan counts it, and the model left as it was."""
    subject = subject_of(family, tmp_path)
    trained: list[int] = []
    called: list[int] = []
    stock = probe._Layers._alone

    def alone(layers: Any, index: int) -> Any:
        decoder = stock(layers, index)
        trained.append(sum(p.numel() for p in decoder.parameters() if p.requires_grad))
        for module in decoder.modules():
            if isinstance(module, HybridExperts):
                compute = module.compute
                module.compute = lambda *a, c=compute: (called.append(1), c(*a))[1]  # type: ignore
        return decoder

    monkeypatch.setattr(probe._Layers, "_alone", alone)
    found = rest_of(subject, Sample(64, 32), targets)
    assert (found is None) == (family in ESTIMATED)
    assert all(p.device.type == "meta" for p in subject.model.parameters())
    if found is None:
        return
    assert found.forward > 0 and found.training > 0 and called
    layers = probe._Layers(subject, None, CPU)
    assert sum(layers.kinds.values()) == len(layers.all)
    counted = TrainingOutline(64, 8, LoraTargets.of(targets)).workload(subject.model).other_trained
    everything = dict(zip(layers.kinds, trained, strict=True))
    if "_vl" not in family and not outside(subject, layers):
        assert sum(everything[k] * n for k, n in layers.kinds.items()) == counted


def outside(subject: Subject, layers: Any) -> bool:
    """Whether Linear layers that get LoRA are not in the decoder's layers."""
    within = {id(m) for layer in layers.all for m in layer.modules()}
    targets = LoraTargets.of("all").modules(subject.model)
    return any(isinstance(m, nn.Linear) and id(m) not in within for _, m in targets)


@pytest.mark.parametrize("model", KINDS)
def test_kinds_of_layers(model: str, tmp_path: Path) -> None:
    subject = Subject.of(str(golden_plans.folder_of(model, tmp_path)))
    assert probe._Layers(subject, None, CPU).kinds == KINDS[model]


def test_what_is_measured_is_made_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a microsecond is that of a token of a layer, and half of one what is around them."""
    subject = subject_of("qwen3_moe", tmp_path)
    layers = len(probe._Layers(subject, None, CPU).all)
    sizes: list[tuple[int, ...]] = []

    def forward(decoder: Any, hidden_BLD: torch.Tensor) -> None:
        sizes.append((*hidden_BLD.shape[:2], len(decoder.layers)))

    def seconds(work: Any, device: torch.device) -> float:
        work()
        batch, length, count = sizes[-1]
        return (count + 0.5) * 1e-6 * batch * length

    for name in ("_forward", "_both"):
        monkeypatch.setattr(probe, name, forward)
    monkeypatch.setattr(probe, "_seconds", seconds)
    monkeypatch.setattr(probe, "_loss_seconds", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(probe, "_attention_seconds", lambda *_: (1e-9, 3e-9))
    monkeypatch.setattr(probe, "_PASS_SECONDS", 1.5e-3)
    whole = rest_of(subject, Sample(600, 300))
    assert whole is not None and sizes[-1] == (2, 300, 0)
    assert whole.forward == pytest.approx((layers + 0.5) * 600e-6) == whole.training
    # Beyond a thousand tokens a pass takes too long: of a longer sequence a part is measured, and
    # attention to what is before it is added; forward twice where layers are computed again.
    long = rest_of(subject, Sample(4000, 4000))
    assert long is not None and sizes[-1] == (1, 1000, 0)
    beyond = layers * 4000 * 3000 * attention_channels(subject.config) * 1e-9
    seconds = (layers + 0.5) * 4000e-6
    assert long.forward == pytest.approx(seconds + beyond)
    assert long.training == pytest.approx(seconds + 5 * beyond)
    plain = rest_of(subject, Sample(4000, 4000), checkpointing=False)
    assert plain is not None
    assert plain.training == pytest.approx(seconds + 4 * beyond)


def test_checkpointing_and_lora_cost_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted as calls of Linear layers, which do not depend on the machine."""
    subject, calls = subject_of("qwen3_moe", tmp_path), []
    stock = nn.Linear.forward

    def counting(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return stock(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    counts = []
    for settings in ({}, {"checkpointing": False}, {"targets": "q_proj"}):
        calls.clear()
        assert rest_of(subject, Sample(64, 32), **settings) is not None
        counts.append(len(calls))
    assert counts[0] > counts[1] > 0 and counts[0] > counts[2]


def test_what_trains_in_full_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router: its gradients are products, too."""
    subject = subject_of("qwen3_moe", tmp_path)
    seen: set[str] = set()
    stock = probe._both

    def both(decoder: Any, hidden_BLD: torch.Tensor) -> None:
        stock(decoder, hidden_BLD)
        seen.update(n for n, p in decoder.named_parameters() if p.grad is not None)

    monkeypatch.setattr(probe, "_both", both)
    trained = frozenset({"gate", "lm_head"})
    assert rest_of(subject, Sample(64, 32), "q_proj", trained=trained) is not None
    assert any(name.endswith("mlp.gate.weight") for name in seen)
    assert all("lora_" in name or ".gate." in name for name in seen)


def test_a_larger_sample_without_room_leaves_the_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of("qwen3_moe", tmp_path)
    stock = probe._both

    def both(decoder: Any, hidden_BLD: torch.Tensor) -> None:
        if hidden_BLD[..., 0].numel() > 64:
            raise torch.OutOfMemoryError("no room")
        stock(decoder, hidden_BLD)

    monkeypatch.setattr(probe, "_both", both)
    assert rest_of(subject, Sample(256, 64)) is not None
