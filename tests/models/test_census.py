"""Every family of the installed Transformers is covered and tested, or refused for a reason."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from comparators import assert_matches
from reference import gated
from tiny_configs import TINY_FAMILIES, build
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from family_census import census, moe_types, verdict

from kt_sft.errors import UnsupportedModelError
from kt_sft.families.finding import find_experts
from kt_sft.families.table import ACTIVATIONS

# The version that the tiny configurations were written for: all of its families have one.
_PINNED = transformers.__version__.startswith("5.6.")
# Parts of a family that has a whole model here, and the whole model of one that has no forward.
_INSIDE = {"glm4v_moe_text", "qwen3_vl_moe_text", "qwen3_omni_moe"}


@pytest.fixture(scope="module")
def verdicts() -> dict[str, tuple[str, str]]:
    verdicts = census()
    assert len(verdicts) > 40
    return verdicts


def _of_state(verdicts: dict[str, tuple[str, str]], state: str) -> set[str]:
    return {name for name, (found, _) in verdicts.items() if found == state}


TESTED = {family.model_type for family in TINY_FAMILIES.values()}


def test_refused_families_have_a_reason_and_no_test(verdicts: dict[str, tuple[str, str]]) -> None:
    refused = _of_state(verdicts, "refused")
    assert refused and TESTED & refused == set()
    for name in refused:
        assert len(verdicts[name][1]) > 40, f"{name}: refused without a reason"


@pytest.mark.skipif(not _PINNED, reason="the tiny configurations are those of Transformers 5.6")
def test_every_family_of_the_tested_transformers_is_tested_or_refused(
    verdicts: dict[str, tuple[str, str]],
) -> None:
    refused = _of_state(verdicts, "refused")
    assert refused == {"doge", "switch_transformers", "nllb-moe"} & set(verdicts)
    dense = _of_state(verdicts, "dense") - TESTED
    assert set(verdicts) - refused - dense - _INSIDE - TESTED == set()


@pytest.mark.parametrize("model_type", ["switch_transformers", "nllb-moe", "doge"])
def test_what_cannot_be_mapped_is_refused_by_name(model_type: str) -> None:
    model_class = moe_types().get(model_type)
    if model_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    state, reason = verdict(model_type, model_class)
    assert state == "refused" and model_type in reason and "its experts" in reason


def _modules() -> list[tuple[str, nn.Module]]:
    """One experts module of every family that builds: tiny ones first, others by their defaults."""
    found = {
        type(layer.module).__name__: layer
        for name in TINY_FAMILIES
        for layer in find_experts(build(name))
    }
    for model_type, model_class in moe_types().items():
        if verdict(model_type, model_class)[0] != "covered":
            continue
        with torch.device("meta"):
            model = model_class._from_config(transformers.AutoConfig.for_model(model_type))
        for layer in find_experts(model):
            found.setdefault(type(layer.module).__name__, layer)
    return sorted(found.items())


def test_gates_compute_what_the_stock_modules_do() -> None:
    checked = 0
    for name, layer in _modules():
        apply_gate = getattr(layer.module, "_apply_gate", None)
        if apply_gate is None or "gate_proj" not in layer.kind.parts:
            continue
        generator = torch.Generator().manual_seed(3)
        gate_up = torch.randn(40, 2 * layer.shape.intermediate, generator=generator) * 6
        places = (layer.part(layer.kind.parts[p], 0) for p in ("gate_proj", "up_proj"))
        gate, up = (replace(p, transposed=False).within(gate_up.T).T for p in places)
        want = apply_gate(gate_up)
        got = gated(layer.shape.gate, gate.double(), up.double())
        assert_matches(got, want, 1e-5, name)
        checked += 1
    assert checked >= 30


class _Gated(nn.Module):
    """The default layout with something of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 16, 8))
        self.down_proj = nn.Parameter(torch.zeros(4, 8, 8))
        self.act_fn = nn.SiLU()

    def forward(self, hidden, index, weights):
        return hidden


class _OwnGate(_Gated):
    def _apply_gate(self, gate_up):
        return gate_up


class _OtherCall(_Gated):
    def forward(self, hidden):
        return hidden


class _ExtraNorm(_Gated):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)


class _OtherActivation(_Gated):
    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.Mish()


class _Misfit(_Gated):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(4, 8, 9))


def test_an_unknown_class_of_the_default_layout_needs_no_row() -> None:
    (layer,) = find_experts(nn.Sequential(_Gated()))
    assert (layer.shape.experts, layer.shape.hidden, layer.shape.intermediate) == (4, 8, 8)


def test_the_experts_of_liger_have_silu() -> None:
    """They hold no activation to look at: it is in their kernel."""
    liger = type("LigerExperts", (_Gated,), {})()
    del liger.act_fn
    (layer,) = find_experts(nn.Sequential(liger))
    assert layer.shape.gate == ACTIVATIONS["silu"]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (_OwnGate, "a gate of its own"),
        (_OtherCall, "is called with \\(hidden\\)"),
        (_ExtraNorm, "norm.weight"),
        (_OtherActivation, "Mish"),
        (_Misfit, "do not fit each other"),
    ],
)
def test_unknown_behaviour_is_refused_and_named(module: type[nn.Module], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        find_experts(nn.Sequential(module()))


@pytest.mark.parametrize(
    ("change", "message"),
    [("deleted", "has no _apply_gate"), ("renamed", "a gate of its own")],
)
def test_a_release_that_moves_the_gates_is_refused(
    change: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename must not make every gate look like the default one."""
    model = build("qwen3_moe")
    cls = type(find_experts(model)[0].module)
    if change == "deleted":
        monkeypatch.delattr(cls, "_apply_gate")
    else:
        monkeypatch.setattr(cls, "_apply_gate", lambda self, gate_up: gate_up)
    with pytest.raises(UnsupportedModelError, match=message):
        find_experts(model)
