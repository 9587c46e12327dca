"""`kt-sft export` and `kt-sft adapter` as a person types them, and what a recipe may promise."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from export_cases import FUSED, distance, logits, stock, trained
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_configs import build

from kt_sft.cli import main
from kt_sft.config import EXPORT_TARGETS, HybridExpertsSettings
from kt_sft.errors import SettingsError
from kt_sft.export.base import Base
from kt_sft.export.planned import PlannedAdapter, refuse_unread
from kt_sft.export.programs import PROGRAMS
from kt_sft.planning.lora_targets import LoraTargets


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    trained(folder, "qwen3_moe")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(list(map(str, arguments)))
    return code, *capsys.readouterr()


def test_every_target_has_a_row() -> None:
    assert {*PROGRAMS, "merged"} == set(EXPORT_TARGETS)


@pytest.mark.parametrize("to", [t for t in EXPORT_TARGETS if t != "peft"])
def test_export_says_how_to_load_the_result(
    place: Path, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    base = ("--base", place / "base")
    code, said, _ = run(capsys, "export", place / "adapter", "--to", to, "--out", out, *base)
    first, *lines = said.splitlines()
    assert code == 0 and first == f"wrote {out}; load it with" and len(lines) == 2
    assert any(str(out) in line for line in lines)
    if to == "merged":
        merged = stock(out)
        assert distance(logits(merged), logits(stock(place / "base"))) > 0.05
    elif to == FUSED:
        scope: dict = {}
        exec("\n".join(line.strip() for line in lines), scope)
        assert isinstance(scope["model"], PeftModel)
    else:
        assert json.loads((out / "kt_sft_export.json").read_text())["to"] == to


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "--to: .* is an adapter's folder, expected --to with one of kt_sft, peft"),
        (["--to", "vllm"], "--out: is missing; give a new folder"),
        (["--to", "vllm", "--out", "x", "--dequantize"], "--dequantize: is for --to merged only"),
        (["a=b", "--to", "vllm", "--out", "x"], "got a=b, which is for recipes only"),
        (["--to", "peft", "--out", "x"], "use --to peft-fused"),
        (["--out", "x"], "--to: "),
    ],
)
def test_wrong_commands(
    place: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("--base", place / "base")
    code, _, complaint = run(capsys, "export", place / "adapter", *arguments, *base)
    assert code == 2 and re.search(message, complaint), complaint
    assert not Path("x").exists()


def test_info(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ("--base", place / "base")
    code, said, _ = run(capsys, "adapter", "info", place / "adapter", *base)
    facts = dict(line.split(maxsplit=1) for line in said.splitlines())
    assert code == 0
    assert facts["identity"] == "the base is the one that it was trained on"
    assert facts["rank"] == "4; alpha 8" and facts["experts"] == "2 of 2 layers, per expert"
    tensors = load_file(place / "adapter" / "adapter_model.safetensors")
    numbers = sum(t.numel() for t in tensors.values()) / 1e6
    assert facts["size"] == f"{numbers:.3g} million numbers in float32"


def test_check(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Norms are those of the products; what is wrong is said, and in the exit status."""
    base = ("--base", place / "base")
    code, said, _ = run(capsys, "adapter", "check", place / "adapter", *base)
    assert code == 0 and "problem" not in said
    tensors = load_file(place / "adapter" / "adapter_model.safetensors")
    want = 0.0
    for key, a in tensors.items():
        if "layers.1." in key and ".experts." in key and "lora_A" in key:
            product = 2 * tensors[key.replace("lora_A", "lora_B")].double() @ a.double()
            want += float(product.square().sum())
    row = next(line for line in said.splitlines() if line.startswith("model.layers.1"))
    assert float(row.split()[1]) == pytest.approx(want**0.5, rel=1e-3)

    copy = tmp_path / "adapter"
    copy.mkdir()
    for name in ("adapter_config.json", "kt_sft_base.json"):
        (copy / name).write_text((place / "adapter" / name).read_text())
    damaged = {k: t.clone() for k, t in tensors.items()}
    first = next(k for k in damaged if "experts.3.up_proj.lora_B" in k)
    damaged[first][0, 0] = torch.nan
    save_file(damaged, copy / "adapter_model.safetensors")
    code, said, _ = run(capsys, "adapter", "check", copy, *base)
    assert code == 1 and "experts.up_proj: holds NaN or Inf" in said
    untrained = {k: t * ("lora_A" in k) for k, t in tensors.items()}
    save_file(untrained, copy / "adapter_model.safetensors")
    build("qwen3_moe", seed=3).save_pretrained(tmp_path / "other")
    code, said, _ = run(capsys, "adapter", "check", copy, "--base", tmp_path / "other")
    assert code == 1 and "every lora_B is zero" in said and "problem: other base: " in said


def test_diff(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing between an adapter and itself in another form; and how far another one is."""
    base = ("--base", place / "base")
    run(capsys, "export", place / "adapter", "--to", "vllm", "--out", tmp_path / "same", *base)
    code, said, _ = run(capsys, "adapter", "diff", place / "adapter", tmp_path / "same", *base)
    _, _, *rows = said.splitlines()
    assert code == 0 and len(rows) >= 2
    for row in rows:
        _, first, second, apart = row.split()
        assert first == second and float(apart) < 1e-3 * float(first)
    trained(tmp_path / "c", "qwen3_moe", expert_lora="shared")
    to = ("--to", "vllm", "--out", tmp_path / "wide", *base)
    run(capsys, "export", tmp_path / "c/adapter", *to)
    _, said, _ = run(capsys, "adapter", "diff", tmp_path / "c/adapter", tmp_path / "wide", *base)
    for row in said.splitlines()[2:]:
        _, first, second, apart = row.split()
        assert first == second and float(apart) < 1e-3 * float(first)
    trained(tmp_path / "b", "qwen3_moe", target_modules=["up_proj"], alpha_pattern={"up_proj": 16})
    _, said, _ = run(capsys, "adapter", "diff", place / "adapter", tmp_path / "b/adapter", *base)
    assert "has no LoRA on" in said
    assert float(said.splitlines()[-1].split()[3]) > 0.1


def planned(folder: Path, rank: int = 8, trained: tuple[str, ...] = (), **kind: bool):
    targets = LoraTargets(frozenset({"all"}))
    return PlannedAdapter(Base.open(folder), rank, targets.means, trained, **kind)


def test_a_recipe_is_told_what_could_not_be_read(place: Path, tmp_path: Path) -> None:
    """`export_for` in the section, before anything is loaded."""
    refuse_unread(planned(place / "base"), ["vllm", "sglang", "gguf", "peft-fused", "merged"])
    with pytest.raises(SettingsError, match="vllm: 1 parameters were trained in full, the first"):
        refuse_unread(planned(place / "base", trained=("lm_head",)), ["vllm", "merged"])
    with pytest.raises(SettingsError, match="vllm: lora_rank: the largest pair has rank 513"):
        refuse_unread(planned(place / "base", rank=513), ["vllm", "sglang"])
    build("deepseek_v3").save_pretrained(tmp_path / "deepseek")
    with pytest.raises(SettingsError, match="peft: stock PEFT drops per-expert LoRA of deepseek"):
        refuse_unread(planned(tmp_path / "deepseek"), ["peft"])
    build("qwen3_5_moe").save_pretrained(tmp_path / "qwen")
    refuse_unread(planned(tmp_path / "qwen", rank=256), ["vllm"])
    with pytest.raises(SettingsError, match="has rank 514"):
        refuse_unread(planned(tmp_path / "qwen", rank=257), ["vllm"])
    refuse_unread(planned(tmp_path / "qwen", rank=257, expert_lora=False), ["vllm"])


def test_the_setting() -> None:
    found = HybridExpertsSettings.from_mapping({"export_for": ["vllm", "peft-fused"]})
    assert found.export_for == ("vllm", "peft-fused")
    assert HybridExpertsSettings(**found.as_dict()) == found
    assert HybridExpertsSettings.from_mapping({"export_for": "vllm"}).export_for == ("vllm",)
    for wrong in ("tgi", ["vllm", "tgi"], [3], None):
        with pytest.raises(SettingsError, match=r"export_for: got .* expected a list of kt_sft"):
            HybridExpertsSettings.from_mapping({"export_for": wrong})


def test_options_of_adapters_are_not_for_recipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text("export_dir: x\n")
    code, _, complaint = run(capsys, "export", tmp_path / "recipe.yaml", "--force")
    assert code == 2 and "--force: is for an adapter's folder and --to" in complaint
