"""Adapters of earlier versions load, merge and compute what they did."""

from __future__ import annotations

import json
from pathlib import Path

import golden
import pytest
import torch
from export_cases import distance, stock
from peft import PeftModel
from safetensors.torch import load_file
from stock_models import take_effective_weights

from kt_sft import HybridExpertsConfig, hybridize
from kt_sft.adapters.base_identity import other_shape, other_weights, read_identity
from kt_sft.export.base import Base
from kt_sft.export.command import export_adapter

FOUND = sorted(p.parent for p in golden.FOLDER.glob("*/*/expected.safetensors"))


def test_they_are_there() -> None:
    assert {folder.name for folder in FOUND} >= golden.KINDS.keys()


@pytest.mark.parametrize("folder", FOUND, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_golden_adapters(folder: Path, tmp_path: Path) -> None:
    family, form, expert_lora = golden.KINDS[folder.name]
    base = golden.base_model(family)
    base.save_pretrained(tmp_path / "base")
    want = load_file(folder / "expected.safetensors")["logits"]
    assert distance(golden.logits(base), want) > 0.1
    note, here = read_identity(folder), Base.open(tmp_path / "base").identity
    assert note is not None and note["samples"].keys() >= here["samples"].keys()
    assert not other_weights(note, here) and not other_shape(note, here)
    where = {"base": str(tmp_path / "base")}
    export_adapter(folder, "merged", tmp_path / "merged", **where)
    assert distance(golden.logits(stock(tmp_path / "merged")), want) < 1e-5
    ours = folder
    if form != "adapter":
        ours = tmp_path / "ours"
        export_adapter(folder, "kt_sft", ours, **where)
    config = HybridExpertsConfig(expert_lora=expert_lora, threads=1, adapter_base="any")
    hybrid = hybridize(base, config)
    model = PeftModel.from_pretrained(hybrid, str(ours))
    own = golden.base_model(family)
    take_effective_weights(own, hybrid)
    own.save_pretrained(tmp_path / "effective")
    # Against the merge into the weights that the hybrid model computes with.
    where = {"base": str(tmp_path / "effective"), "force": True}
    export_adapter(folder, "merged", tmp_path / "again", **where)
    assert distance(golden.logits(model), golden.logits(stock(tmp_path / "again"))) < 2e-3


def test_numbers_of_the_base_do_not_change() -> None:
    """The counter behind the golden base, which must be the same on every machine."""
    found = golden.values("some.name", (2, 3))
    want = torch.tensor(json.loads((golden.FOLDER / "values.json").read_text()))
    assert torch.equal(found, want)
