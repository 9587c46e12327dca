"""Two bases of one shape are told apart, wherever an adapter is loaded or exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from export_cases import FUSED, adapted, logits, opened, stock
from peft import PeftModel
from tiny_configs import TINY_FAMILIES, build
from torch import nn
from transformers import AutoModelForCausalLM

from kt_sft import HybridExpertsConfig, hybridize
from kt_sft.adapters.base_identity import IDENTITY_FILE, other_weights, read_identity
from kt_sft.errors import AdapterMismatchError, SettingsError
from kt_sft.export.base import Base
from kt_sft.export.command import export_adapter


def hybrid(family: str = "qwen3_moe", seed: int = 0, **settings: object) -> nn.Module:
    return hybridize(build(family, seed), HybridExpertsConfig(threads=1, **settings))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapted(build("qwen3_moe")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_another_base_of_the_same_shape_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterMismatchError) as caught:
        PeftModel.from_pretrained(hybrid(seed=1), str(saved))
    text = str(caught.value)
    assert "trained on another base model" in text and "mlp.gate.weight: other weights" in text
    assert "adapter_base: any in the kt_sft section" in text
    anyway = PeftModel.from_pretrained(hybrid(seed=1, adapter_base="any"), str(saved))
    assert any(p.abs().sum() for n, p in anyway.named_parameters() if "lora_B" in n)
    model = PeftModel.from_pretrained(hybrid(), str(saved), adapter_name="first")
    with pytest.raises(AdapterMismatchError, match="another base model"):
        PeftModel.from_pretrained(hybrid(seed=1), str(saved), adapter_name="second")
    model.load_adapter(str(saved), "second")


def test_an_adapter_without_a_note_is_taken(saved: Path) -> None:
    """Those of earlier versions, and of other programs."""
    (saved / IDENTITY_FILE).unlink()
    PeftModel.from_pretrained(hybrid(seed=1), str(saved))


@pytest.mark.parametrize("damage", ["", "[1]", '{"samples": 3, "sizes": []}', "{" * 5000])
def test_a_damaged_note_is_no_reason_to_refuse(saved: Path, damage: str) -> None:
    (saved / IDENTITY_FILE).write_text(damage)
    if not damage.startswith('{"'):
        assert read_identity(saved) is None or damage == "[1]"
        PeftModel.from_pretrained(hybrid(), str(saved))
    else:
        with pytest.raises(AdapterMismatchError, match="model_type: None, here qwen3_moe"):
            PeftModel.from_pretrained(hybrid(), str(saved))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_vl_moe", "jamba"])
def test_memory_and_disk_tell_the_same(family: str, tmp_path: Path) -> None:
    """The note of a model in memory, of one read from disk in bf16, and of the folder itself."""
    base = build(family)
    base.save_pretrained(tmp_path / "base")
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    note = read_identity(tmp_path / "adapter")
    assert note is not None and len(note["samples"]) >= 4
    folder = Base.open(tmp_path / "base").identity
    assert folder["sizes"] == note["sizes"] and not other_weights(note, folder)
    assert len(folder["samples"].keys() & note["samples"].keys()) >= 4
    if TINY_FAMILIES[family].auto_class == "AutoModelForCausalLM":
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", dtype=torch.bfloat16,
            quantization_config=HybridExpertsConfig(store="memory", threads=1),
        )  # fmt: skip
        PeftModel.from_pretrained(loaded, str(tmp_path / "adapter"))


def test_export_looks_too(saved: Path, tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path / "base")
    build("qwen3_moe", seed=1).save_pretrained(tmp_path / "other")
    for to in ("vllm", "merged"):
        with pytest.raises(AdapterMismatchError, match="--force takes this one all the same"):
            export_adapter(saved, to, tmp_path / "out", base=str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()
    export_adapter(saved, "vllm", tmp_path / "out", base=str(tmp_path / "other"), force=True)
    export_adapter(saved, FUSED, tmp_path / "own", base=str(tmp_path / "base"))
    assert read_identity(tmp_path / "own") == Base.open(tmp_path / "base").identity
    loaded = PeftModel.from_pretrained(stock(tmp_path / "base"), str(tmp_path / "own"))
    assert not torch.equal(logits(loaded.eval()), logits(stock(tmp_path / "base")))


def test_every_adapter_of_a_model_gets_the_note(tmp_path: Path) -> None:
    model = adapted(build("qwen3_moe"))
    model.add_adapter("second", model.peft_config["default"])
    model.save_pretrained(tmp_path)
    assert (tmp_path / IDENTITY_FILE).is_file() and (tmp_path / "second" / IDENTITY_FILE).is_file()
    model.save_pretrained(tmp_path / "elsewhere", is_main_process=False)
    assert not (tmp_path / "elsewhere" / IDENTITY_FILE).exists()


def test_a_grown_vocabulary_is_the_same_base(tmp_path: Path) -> None:
    base = hybrid()
    base.resize_token_embeddings(320)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    note = json.loads((tmp_path / "adapter" / IDENTITY_FILE).read_text())
    build("qwen3_moe").save_pretrained(tmp_path / "base")
    assert not other_weights(note, Base.open(tmp_path / "base").identity)
    lines = export_adapter(tmp_path / "adapter", "merged", tmp_path / "out",
                           base=str(tmp_path / "base"))  # fmt: skip
    assert len(lines) == 2 and stock(tmp_path / "out").config.vocab_size == 320
    opened(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_one_base_are_one_base(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """fp16 has less range than bf16; a release in it, and a load, are the same model."""
    base = build("qwen3_moe").to(dtype)
    base.save_pretrained(tmp_path / "base")
    note = read_identity(saved)
    assert note is not None and not other_weights(note, Base.open(tmp_path / "base").identity)
    for loaded_as in (torch.float16, torch.bfloat16):
        hybrid = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", dtype=loaded_as,
            quantization_config=HybridExpertsConfig(store="memory", threads=1),
        )  # fmt: skip
        PeftModel.from_pretrained(hybrid, str(saved))
    build("qwen3_moe", seed=1).to(dtype).save_pretrained(tmp_path / "other")
    assert len(other_weights(note, Base.open(tmp_path / "other").identity)) >= 4


def test_a_merged_model_is_another_base(saved: Path, tmp_path: Path) -> None:
    """So that nothing is merged twice, unseen."""
    build("qwen3_moe").save_pretrained(tmp_path / "base")
    export_adapter(saved, "merged", tmp_path / "merged", base=str(tmp_path / "base"))
    with pytest.raises(AdapterMismatchError, match=r"o_proj\.weight: other weights|q_proj"):
        export_adapter(saved, "merged", tmp_path / "twice", base=str(tmp_path / "merged"))


@pytest.mark.parametrize("name", ["fp8_block", "gptq"])
def test_a_quantized_release_is_the_same_base(name: str, tmp_path: Path) -> None:
    """What it holds in codes is not compared, on disk and when it is loaded."""
    from quantized_models import write

    folder = write(tmp_path, name, "qwen3_moe")
    plain, codes = Base.open(tmp_path / "plain").identity, Base.open(folder).identity
    assert len(codes["samples"]) >= 4 and not other_weights(plain, codes)
    hybrid = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16,
        quantization_config=HybridExpertsConfig(store="memory", threads=1),
    )  # fmt: skip
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj", "up_proj"])
    get_peft_model(hybrid, config).save_pretrained(tmp_path / "adapter")
    note = read_identity(tmp_path / "adapter")
    assert note is not None and not other_weights(note, plain)
    export_adapter(tmp_path / "adapter", "vllm", tmp_path / "out", base=str(tmp_path / "plain"))


def test_a_subfolder_is_looked_at_too(saved: Path) -> None:
    with pytest.raises(AdapterMismatchError, match="another base model"):
        PeftModel.from_pretrained(hybrid(seed=1), str(saved.parent), subfolder=saved.name)


@pytest.mark.parametrize("expert_lora", [True, False])
def test_a_chain_is_noted_and_not_exported_alone(tmp_path: Path, expert_lora: bool) -> None:
    """The second adapter was trained on the base with the first one in it."""
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", *(["up_proj"] if expert_lora else [])]
    build("qwen3_moe").save_pretrained(tmp_path / "base")
    adapted(build("qwen3_moe"), expert_lora, target_modules=names).save_pretrained(
        tmp_path / "first"
    )
    model = PeftModel.from_pretrained(hybrid(expert_lora=expert_lora), str(tmp_path / "first"))
    model.save_pretrained(tmp_path / "continued")
    assert "on_top_of" not in (read_identity(tmp_path / "continued") or {})
    merged = model.merge_and_unload()
    config = LoraConfig(r=2, target_modules=names)
    get_peft_model(merged, config).save_pretrained(tmp_path / "second")
    note = read_identity(tmp_path / "second")
    assert note is not None and note["on_top_of"] == [str(tmp_path / "first")]
    where = {"base": str(tmp_path / "base")}
    for to in ("merged", "vllm"):
        with pytest.raises(SettingsError, match=r"on top of .*first; merge them together"):
            export_adapter(tmp_path / "second", to, tmp_path / "out", **where)
    both = [tmp_path / "first", tmp_path / "second"]
    export_adapter(both, "merged", tmp_path / "out", **where)
    with pytest.raises(SettingsError, match="got 2 adapters, expected one; several are one model"):
        export_adapter(both, "vllm", tmp_path / "served", **where)
    model = PeftModel.from_pretrained(hybrid(expert_lora=expert_lora), str(tmp_path / "first"))
    model = model.unload()
    get_peft_model(model, config).save_pretrained(tmp_path / "third")
    assert "on_top_of" not in (read_identity(tmp_path / "third") or {})


def test_what_was_forced_is_said(saved: Path, tmp_path: Path) -> None:
    build("qwen3_moe", seed=1).save_pretrained(tmp_path / "other")
    export_adapter(saved, "vllm", tmp_path / "out", base=str(tmp_path / "other"), force=True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "other")
    assert json.loads((tmp_path / "out" / "kt_sft_export.json").read_text())["forced"] is True
