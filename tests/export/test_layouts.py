"""What is written for each program is read back as the same LoRA, whatever layout it is in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from export_cases import OLD, PROJECTIONS, adapted, distance, logits, opened, trained
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny_configs import build

from kt_sft import HybridExpertsConfig, hybridize
from kt_sft.errors import AdapterMismatchError, CheckpointError, SettingsError
from kt_sft.export.adapter import Adapter
from kt_sft.export.programs import PROGRAMS, limits
from kt_sft.export.writing import MANIFEST, write_adapter

FAMILIES = ["qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss", "granitemoe", "qwen3_5_moe",
            "nemotron_h", "longcat_flash", "minimax_m2"]  # fmt: skip


def products(adapter: Adapter) -> dict[str, torch.Tensor]:
    """scaling * B A of every module, in fp64."""
    found = {}
    for name in adapter.ranks():
        layer, _, projection = name.rpartition(".")
        if layer in adapter.base.layers:
            lora = adapter.experts(layer, projection)
            experts = adapter.base.layers[layer].shape.experts
            product = (lora.b.double() @ lora.a.double()).expand(experts, -1, -1)
        else:
            lora = adapter.linear(name)
            product = lora.b.double() @ lora.a.double()
        found[name] = product * lora.scaling
    return found


def assert_same(got: Adapter, want: Adapter) -> None:
    """The same change of the base; modules of zeros may have come along."""
    changed, expected = products(got), products(want)
    assert expected.keys() <= changed.keys()
    for name, product in changed.items():
        if name in expected:
            torch.testing.assert_close(product, expected[name], rtol=1e-6, atol=1e-7)
        else:
            assert not product.any(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_is_read_back(family: str, tmp_path: Path) -> None:
    adapter = trained(tmp_path, family)
    written = 0
    for name, program in PROGRAMS.items():
        if not list(limits(program, adapter)):
            lines = write_adapter(adapter, name, tmp_path / name)
            assert_same(opened(tmp_path, name), adapter)
            assert len(lines) == 2 and str(tmp_path / name) in "".join(lines)
            written += 1
    assert written >= 2


@pytest.mark.parametrize("name", ["vllm", "sglang", "gguf"])
def test_programs_that_read_one_rank_and_alpha(name: str, tmp_path: Path) -> None:
    """Patterns, rsLoRA and missing projections become padded factors of one rank and alpha."""
    adapter = trained(
        tmp_path, "qwen3_moe", r=4, lora_alpha=6, use_rslora=True,
        target_modules=["q_proj", "o_proj", "gate_proj", "down_proj"],
        rank_pattern={"experts.down_proj": 2, "o_proj": 3}, alpha_pattern={"q_proj": 10},
    )  # fmt: skip
    write_adapter(adapter, name, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ranks = {t.shape[0] for k, t in tensors.items() if ".lora_A." in k}
    assert ranks == {config["r"]} == ({8} if name == "vllm" else {4})
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    assert isinstance(config["target_modules"], list)
    # 2 layers of 8 experts with all three projections, and attention.
    attention = (
        {"q_proj", "k_proj", "v_proj", "o_proj"} if name == "sglang" else {"q_proj", "o_proj"}
    )
    assert {k.split(".")[-3] for k in tensors} == {*PROJECTIONS, *attention}
    assert sum(".experts." in k for k in tensors) == 2 * 8 * 3 * 2
    assert_same(opened(tmp_path, "out"), adapter)
    folded = " ".join(json.loads((tmp_path / "out" / MANIFEST).read_text())["folded"])
    assert "rsLoRA" in folded and "padded with zeros" in folded and "multiplied" in folded


def test_names_of_the_checkpoint(tmp_path: Path) -> None:
    """Mixtral's experts are w1, w2, w3 for programs that read the checkpoint's names."""
    adapter = trained(tmp_path, "mixtral")
    for name in ("vllm", "gguf"):
        write_adapter(adapter, name, tmp_path / name)
        keys = load_file(tmp_path / name / "adapter_model.safetensors").keys()
        assert f"base_model.model.{_PREFIX}.0.w1.lora_A.weight" in keys
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert {"w1", "w2", "w3"} < set(config["target_modules"])


_PREFIX = "model.layers.0.block_sparse_moe.experts"


def test_a_shared_pair_is_stored_once(tmp_path: Path) -> None:
    """And expanded for programs that know pairs of single experts only."""
    want = logits(adapted(build("qwen3_moe"), "shared"))
    adapter = trained(tmp_path, "qwen3_moe", expert_lora="shared")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    first = "base_model.model.model.layers.1.mlp.experts.gate_proj.lora_A.weight"
    assert first in keys and sum(".experts." in k for k in keys) == 2 * 3 * 2
    assert adapter.layouts == {"shared"}
    for name, count in (("kt_sft", 2 * 3 * 2), ("vllm", 2 * 8 * 3 * 2)):
        write_adapter(adapter, name, tmp_path / name)
        written = load_file(tmp_path / name / "adapter_model.safetensors")
        assert sum(".experts." in k for k in written) == count
        assert_same(opened(tmp_path, name), adapter)
    for setting in ("shared", True):
        models = []
        for name in ("adapter", "kt_sft"):
            hybrid = hybridize(build("qwen3_moe"), HybridExpertsConfig(expert_lora=setting))
            models.append(PeftModel.from_pretrained(hybrid, str(tmp_path / name)).eval())
        assert torch.equal(*map(logits, models))
        assert distance(logits(models[0]), want) < 1e-4
    with pytest.raises(AdapterMismatchError, match="the model has expert_lora: false"):
        without = hybridize(build("qwen3_moe"), HybridExpertsConfig(expert_lora=False))
        PeftModel.from_pretrained(without, str(tmp_path / "adapter"))


def test_the_file_of_ktransformers(tmp_path: Path) -> None:
    """Its experts' factors lie stacked in a file of their own, by the number of the layer."""
    adapter = trained(tmp_path, "deepseek_v3")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    rest = {
        k: t
        for k, t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()
        if ".experts." not in k
    }
    save_file(rest, theirs / "adapter_model.safetensors")
    stacked = {}
    for layer in adapter.expert_layers:
        for projection in PROJECTIONS:
            lora = adapter.experts(layer, projection)
            short = f"layers.{layer.split('.')[2]}.experts.{projection[:-5]}_lora"
            stacked |= {f"{short}_a": lora.a.contiguous(), f"{short}_b": lora.b.contiguous()}
    save_file(stacked, theirs / "fused_expert_lora.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_a_proj"]}
    (theirs / "adapter_config.json").write_text(json.dumps(config))
    found = opened(tmp_path, "theirs")
    assert found.layouts == {"stacked"}
    assert_same(found, adapter)
    hybrid = hybridize(build("deepseek_v3"), HybridExpertsConfig(threads=1))
    with pytest.raises(AdapterMismatchError, match=r"kt-sft export .* --to kt_sft"):
        PeftModel.from_pretrained(hybrid, str(theirs))
    write_adapter(found, "kt_sft", tmp_path / "ours")
    got = PeftModel.from_pretrained(hybrid, str(tmp_path / "ours")).eval()
    own = hybridize(build("deepseek_v3"), HybridExpertsConfig(threads=1))
    want = PeftModel.from_pretrained(own, str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(got), logits(want))


def test_shapes_that_fit_both_forms_of_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where gate and up together are as wide as the hidden states, the release decides."""
    import tiny_configs

    family = tiny_configs.TINY_FAMILIES["qwen3_moe"]
    square = {**family.config, "moe_intermediate_size": 32}
    entry = tiny_configs.TinyFamily("qwen3_moe", square)
    monkeypatch.setattr(tiny_configs, "TINY_FAMILIES", {"square": entry})
    adapter = trained(tmp_path, "square", target_modules=["up_proj"])
    for name in ("peft-fused", "peft-fused-0.18"):
        write_adapter(adapter, name, tmp_path / name)
        assert_same(opened(tmp_path, name), adapter)
        file = tmp_path / name / "adapter_config.json"
        config = json.loads(file.read_text())
        del config["peft_version"]
        file.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r'"peft_version": "0\.18\.1"'):
            opened(tmp_path, name)


def test_dtypes_stay(tmp_path: Path) -> None:
    trained(tmp_path, "qwen3_moe")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({k: t.bfloat16() for k, t in load_file(file).items()}, file)
    adapter = opened(tmp_path)
    for name in ("peft-fused", "vllm"):
        write_adapter(adapter, name, tmp_path / name)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
        assert_same(opened(tmp_path, name), adapter)


def test_limits_name_what_would_have_met_them(tmp_path: Path) -> None:
    head = trained(tmp_path / "a", "qwen3_moe", modules_to_save=["lm_head"])
    with pytest.raises(SettingsError, match=r"train without additional_target .* --to merged"):
        write_adapter(head, "vllm", tmp_path / "out")
    wide = trained(tmp_path / "b", "qwen3_5_moe", r=300)
    with pytest.raises(SettingsError, match="has rank 600, vLLM admits up to 512; train with a"):
        write_adapter(wide, "vllm", tmp_path / "out")
    odd = trained(tmp_path / "c", "granitemoe")
    for name in ("vllm", "gguf"):
        with pytest.raises(SettingsError, match="has no form for expert LoRA of granitemoe"):
            write_adapter(odd, name, tmp_path / "out")
    ungated = trained(tmp_path / "d", "nemotron_h")
    with pytest.raises(SettingsError, match="experts without a gate"):
        write_adapter(ungated, "sglang", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    adapter = trained(tmp_path, "qwen3_moe")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(SettingsError, match="is not empty; give a new folder"):
        write_adapter(adapter, "peft-fused", tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "kept"


@pytest.mark.skipif(not OLD, reason="there the experts' layers have other names")
def test_targets_of_stock_configs_are_plain(tmp_path: Path) -> None:
    """Leaves where they mean the same modules; whole paths where others have the same name."""
    adapter = trained(tmp_path, "granitemoehybrid")
    write_adapter(adapter, "peft-fused-0.18", tmp_path / "out")
    config = LoraConfig.from_pretrained(str(tmp_path / "out"))
    assert "q_proj" in config.target_modules and "input_linear" not in config.target_modules
    assert any(t.endswith("shared_mlp.input_linear") for t in config.target_modules)


def _rename(folder: Path, change: dict[str, str]) -> None:
    """Renames parts of an adapter's keys."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for old, new in change.items():
        tensors = {key.replace(old, new): t for key, t in tensors.items()}
    save_file(tensors, file)


def _configure(folder: Path, **changes: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_patterns_by_the_names_of_the_file(tmp_path: Path) -> None:
    """Adapters of models whose experts are modules: w1, or a single expert's path."""
    adapter = trained(tmp_path, "mixtral")
    write_adapter(adapter, "vllm", tmp_path / "theirs")
    _configure(tmp_path / "theirs", alpha_pattern={"w1": 64})
    found = opened(tmp_path, "theirs")
    layer = found.expert_layers[0]
    assert found.experts(layer, "gate_proj").scaling == 64 / 8
    assert found.experts(layer, "up_proj").scaling == 16 / 8
    _configure(tmp_path / "theirs", alpha_pattern={"experts.3.w1": 64, "experts.2.w1": 32})
    with pytest.raises(CheckpointError, match=r"gets \[32, 64\], expected one alpha for all"):
        opened(tmp_path, "theirs").experts(layer, "gate_proj")


def test_two_claims_on_one_module(tmp_path: Path) -> None:
    """Nothing wins in silence."""
    adapter = trained(tmp_path, "mixtral")
    write_adapter(adapter, "vllm", tmp_path / "published")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    ours, theirs = load_file(file), load_file(tmp_path / "published/adapter_model.safetensors")
    save_file({**ours, **theirs}, file)
    with pytest.raises(AdapterMismatchError, match="gate_proj has LoRA under another name too"):
        opened(tmp_path)
    first = {key: t.clone() for key, t in ours.items() if ".experts.0." in key}
    shared = {key.replace(".experts.0.", ".experts."): t for key, t in first.items()}
    save_file({**ours, **shared}, file)
    with pytest.raises(AdapterMismatchError, match="has LoRA under another name too"):
        opened(tmp_path)
    named = {k.replace(".weight", ".default.weight"): t for k, t in ours.items()}
    save_file(named, file)
    assert_same(opened(tmp_path), adapter)
    save_file({**named, **first}, file)
    with pytest.raises(CheckpointError, match="are of one module; save the adapters one by one"):
        opened(tmp_path)


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "nemotron_h", "dbrx", "deepseek_v3"])
def test_an_adapter_without_experts_goes_everywhere(family: str, tmp_path: Path) -> None:
    """What a program cannot read of experts is no limit for others."""
    name = {"dbrx": "Wqkv", "deepseek_v3": "o_proj"}.get(family, "q_proj")
    adapter = trained(tmp_path, family, target_modules=[name])
    for to, program in PROGRAMS.items():
        assert not list(limits(program, adapter)), to
        write_adapter(adapter, to, tmp_path / to)
        assert_same(opened(tmp_path, to), adapter)


def test_ours_of_some_layers_loads_again(tmp_path: Path) -> None:
    """By whole paths, so that no other layer gets LoRA."""
    adapter = trained(tmp_path, "deepseek_v3", target_modules=["o_proj", "experts.up_proj"])
    write_adapter(adapter, "kt_sft", tmp_path / "ours")
    hybrid = hybridize(build("deepseek_v3"), HybridExpertsConfig(threads=1))
    model = PeftModel.from_pretrained(hybrid, str(tmp_path / "ours"))
    with_lora = {n.split(".lora_")[0] for n, _ in model.named_parameters() if "lora_" in n}
    assert len(with_lora) == 3 + 2 and not any("mlp.up_proj" in n for n in with_lora)


def test_lora_that_other_programs_ignore(tmp_path: Path) -> None:
    """llama.cpp multiplies with the low-rank matrices of latent attention without LoRA."""
    adapter = trained(tmp_path, "deepseek_v3")
    with pytest.raises(SettingsError, match=r"ignores LoRA of q_a_proj, q_b_proj \(6 layers\)"):
        write_adapter(adapter, "gguf", tmp_path / "out")


def test_one_pair_of_gate_and_up_stays_one(tmp_path: Path) -> None:
    """Trained as one, it is written as one, at its own rank."""
    from peft import get_peft_model

    base = build("qwen3_moe")
    base.save_pretrained(tmp_path / "base")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=parameters)
    model = get_peft_model(base, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    model.save_pretrained(tmp_path / "adapter")
    adapter = opened(tmp_path)
    for form in ("peft-fused", "peft-fused-0.18"):
        write_adapter(adapter, form, tmp_path / form)
        assert_same(opened(tmp_path, form), adapter)
        sizes = [
            sum(t.numel() for t in load_file(tmp_path / n / "adapter_model.safetensors").values())
            for n in ("adapter", form)
        ]
        assert sizes[0] == sizes[1]
