"""Merged checkpoints: quantized bases in bf16, chains of adapters, side files, bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_cases import adapted, distance, logits, randomize, scale_trained, stock
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from quantized_checkpoints import QUANTIZED_FORMATS
from quantized_models import cases, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stock_models import lora_parameters, with_lora
from tiny_configs import build
from tiny_models import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from kt_sft import HybridExpertsConfig
from kt_sft.errors import AdapterMismatchError, CheckpointError, SettingsError
from kt_sft.export.command import export_adapter
from kt_sft.export.merge import export_merged
from kt_sft.files.safetensors_writer import Entry, write_safetensors

TARGETS = ["o_proj", "gate_proj", "up_proj", "down_proj"]


def trained_on(folder: Path, out: Path) -> PeftModel:
    """An adapter of a quantized checkpoint, whose codes the experts keep."""
    hybrid = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=HybridExpertsConfig(weights="bf16", store="memory"),
        dtype=torch.float32,
    )  # fmt: skip
    model = get_peft_model(hybrid, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    randomize(model)
    model.save_pretrained(out)
    return model.eval()


@pytest.mark.parametrize(("name", "family"), cases())
def test_a_quantized_base_is_written_in_bf16(tmp_path: Path, name: str, family: str) -> None:
    """Stock Transformers reads it, and it computes what the hybrid model with its adapter does."""
    folder = write(tmp_path, name, family)
    model = trained_on(folder, tmp_path / "adapter")
    with pytest.raises(SettingsError, match=r"write them in bf16 with .* --to merged --dequantize"):
        export_merged(folder, [tmp_path / "adapter"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = export_merged(folder, [tmp_path / "adapter"], tmp_path / "out", dequantize=True)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    with safe_open(out / "model.safetensors", "pt") as file:
        kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    assert kinds <= {"BF16", "F32"}
    merged = stock(out)
    plain = stock(export_merged(folder, [], tmp_path / "alone", dequantize=True))
    want = {name: p.detach().double() for name, p in plain.named_parameters()}
    lora = dict(lora_parameters(model))
    want |= {n: w.detach().double() for n, w in with_lora(plain, lora, 2.0).items()}
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLinear):
            want[f"{path}.weight"] += module.get_delta_weight("default").detach().double()
    changed = 0
    for path, p in merged.named_parameters():
        # Both sides are rounded to bf16 once, ours with the LoRA in it and theirs before.
        torch.testing.assert_close(p.double(), want[path], rtol=2**-7, atol=2**-7)
        changed += not torch.equal(p, plain.get_parameter(path))
    assert changed >= 6


def test_dequantized_weights_are_those_of_the_codes(tmp_path: Path) -> None:
    """Without an adapter: the published values, rounded to bf16."""
    folder = write(tmp_path, "fp8_block", "deepseek_v3")
    out = export_merged(folder, [], tmp_path / "out", dequantize=True)
    codes, got = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    stems = [k.removesuffix(".weight_scale_inv") for k in codes if k.endswith(".weight_scale_inv")]
    assert len(stems) > 40 and not any(k.endswith("_scale_inv") for k in got)
    for stem in stems:
        want = QUANTIZED_FORMATS["fp8_block"].dequantize(codes, stem).bfloat16()
        assert torch.equal(got[f"{stem}.weight"], want)


def test_shards_stay_and_the_index_follows(tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path / "base", max_shard_size="300KB")
    adapted(build("qwen3_moe")).save_pretrained(tmp_path / "adapter")
    out = export_merged(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    names = sorted(p.name for p in (tmp_path / "base").glob("*.safetensors"))
    assert len(names) > 3 and names == sorted(p.name for p in out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for key, name in index["weight_map"].items():
        with safe_open(out / name, "pt") as file:
            assert key in file.keys()  # noqa: SIM118 - not a mapping
    sizes = sum(t.nbytes for name in names for t in load_file(out / name).values())
    assert index["metadata"]["total_size"] == sizes
    stock(out)


def test_a_chain_of_adapters(tmp_path: Path) -> None:
    """The second was trained on top of the first, its head in full: both, in their order."""
    base = build("qwen3_moe")
    base.save_pretrained(tmp_path / "base")
    adapted(base).save_pretrained(tmp_path / "first")
    one = export_merged(tmp_path / "base", [tmp_path / "first"], tmp_path / "one")
    model = adapted(stock(one), r=2, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    model.save_pretrained(tmp_path / "second")
    two = export_merged(one, [tmp_path / "second"], tmp_path / "two")
    both = [tmp_path / "first", tmp_path / "second"]
    out = export_merged(tmp_path / "base", both, tmp_path / "both")
    assert distance(logits(stock(out)), logits(stock(two))) < 1e-5
    assert distance(logits(stock(one)), logits(stock(two))) > 0.05


def test_lora_on_what_an_earlier_adapter_trained_in_full(tmp_path: Path) -> None:
    base = build("qwen3_moe")
    base.save_pretrained(tmp_path / "base")
    first = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["o_proj"]))
    scale_trained(first)
    first.save_pretrained(tmp_path / "first")
    one = export_merged(tmp_path / "base", [tmp_path / "first"], tmp_path / "one")
    second = get_peft_model(stock(one), LoraConfig(r=2, target_modules=["o_proj"]))
    randomize(second)
    second.save_pretrained(tmp_path / "second")
    both = export_merged(
        tmp_path / "base", [tmp_path / "first", tmp_path / "second"], tmp_path / "both"
    )
    assert distance(logits(stock(both)), logits(second.eval())) < 1e-5
    assert distance(logits(stock(one)), logits(second)) > 0.01


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_of_different_sizes_are_refused(tmp_path: Path, tied: bool) -> None:
    """What stock Transformers could not load."""
    base = build("qwen3_moe")
    base.config.tie_word_embeddings = tied
    if tied:
        base.tie_weights()
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(310)
    trained = "embed_tokens" if tied else "lm_head"
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=[trained])
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(AdapterMismatchError, match=r"would differ in rows .* 310.*train both"):
        export_merged(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")


def test_a_tied_head_that_is_on_the_disk(tmp_path: Path) -> None:
    """Some checkpoints hold it all the same; with a trained embedding it is tied no more."""
    base = build("qwen3_moe")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path / "base", max_shard_size="200KB")
    index = tmp_path / "base" / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    first = sorted(set(where["weight_map"].values()))[0]
    tensors = load_file(tmp_path / "base" / first)
    tensors["lm_head.weight"] = base.get_input_embeddings().weight.detach().clone()
    save_file(tensors, tmp_path / "base" / first, metadata={"format": "pt"})
    where["weight_map"]["lm_head.weight"] = first
    index.write_text(json.dumps(where))
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = get_peft_model(base, config)
    scale_trained(model)
    model.save_pretrained(tmp_path / "adapter")
    out = export_merged(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert not json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    merged = stock(out)
    apart = merged.get_input_embeddings().weight - 1.5 * merged.get_output_embeddings().weight
    assert float(apart.abs().max()) < 1e-6


def test_lora_on_the_head(tmp_path: Path) -> None:
    """PEFT saves the head's own weight beside it."""
    base = build("qwen3_moe")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("lm_head.base_layer" in key for key in keys)
    out = export_merged(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert distance(logits(stock(out)), logits(model.eval())) < 1e-5


def test_where_a_merged_model_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("qwen3_moe").save_pretrained(tmp_path / "base")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SettingsError, match="is a file; give a new folder"):
        export_merged(tmp_path / "base", [], tmp_path / "file")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert export_merged(tmp_path / "base", [], tmp_path / "link") == tmp_path / "real"
    assert (tmp_path / "link" / "model.safetensors").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_merged(tmp_path / "base", [], ".")
    assert (tmp_path / "here" / "model.safetensors").is_file()


def test_flat_experts_are_merged(tmp_path: Path) -> None:
    """DBRX keeps all experts of a projection below one another in a matrix."""
    base = build("dbrx")
    base.save_pretrained(tmp_path / "base")
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    merged = stock(export_merged(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out"))
    lora = dict(lora_parameters(model))
    plain = stock(tmp_path / "base")
    for name, want in with_lora(plain, lora, 2.0).items():
        torch.testing.assert_close(merged.get_parameter(name), want, rtol=1e-5, atol=1e-6)
        assert not torch.equal(want, plain.get_parameter(name))


def test_lora_on_a_router(tmp_path: Path) -> None:
    """Where it is a Linear layer, which PEFT can adapt."""
    base = build("afmoe")
    base.save_pretrained(tmp_path / "base")
    routers = [n for n, m in base.named_modules() if n.endswith("router.gate")]
    assert routers
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["router.gate", "q_proj"]))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    out = export_merged(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    merged = stock(out)
    assert distance(logits(merged), logits(model.eval())) < 1e-5
    before = stock(tmp_path / "base").get_submodule(routers[0]).weight
    assert not torch.equal(merged.get_submodule(routers[0]).weight, before)


def test_the_tokenizer_of_the_training_comes_along(tmp_path: Path) -> None:
    """With the tokens that were added, and the chat template."""
    base = build("qwen3_moe")
    base.save_pretrained(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    adapted(base).save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<new>"])
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    for to in ("merged", "vllm", "kt_sft"):
        export_adapter(tmp_path / "adapter", to, tmp_path / to, base=str(tmp_path / "base"))
        found = AutoTokenizer.from_pretrained(tmp_path / to)
        assert len(found("<new>")["input_ids"]) == 1 and found.chat_template == "{{ messages }}"


def test_dequantize_is_for_quantized_bases(tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path / "base")
    with pytest.raises(SettingsError, match="are not quantized; leave it out"):
        export_merged(tmp_path / "base", [], tmp_path / "out", dequantize=True)


def test_the_head_of_a_reward_model_comes_along(tmp_path: Path) -> None:
    base = build("qwen3_moe")
    base.save_pretrained(tmp_path / "base")
    adapted(base).save_pretrained(tmp_path / "adapter")
    save_file(
        {"v_head.summary.weight": torch.ones(1, 64)}, tmp_path / "adapter/value_head.safetensors"
    )
    out = export_merged(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert load_file(out / "value_head.safetensors")["v_head.summary.weight"].sum() == 64


def test_the_writer_writes_what_it_announced(tmp_path: Path) -> None:
    """As the library reads it; a tensor of another size, or none, is an error."""
    tensors = {
        "a": torch.randn(3, 5, dtype=torch.float64), "b": torch.randn(7).bfloat16(),
        "empty": torch.zeros(0, 4), "scalar": torch.tensor(3, dtype=torch.int64),
    }  # fmt: skip
    entries = {k: Entry(tuple(t.shape), t.dtype) for k, t in tensors.items()}
    pieces = [(k, [t[:1], t[1:]] if k == "a" else [t]) for k, t in tensors.items()]
    write_safetensors(tmp_path / "x.safetensors", entries, pieces)
    got = load_file(tmp_path / "x.safetensors")
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[k], t) and got[k].dtype == t.dtype for k, t in tensors.items())
    for wrong in (pieces[:3], [("a", [tensors["a"][:2]])], [("b", [tensors["b"]])]):
        with pytest.raises(CheckpointError, match=r"was announced and never came|expected a"):
            write_safetensors(tmp_path / "y.safetensors", entries, wrong)


_MERGE_LARGE = """
import resource, sys
from pathlib import Path
from kt_sft.export.command import export_adapter
from kt_sft.export.merge import export_merged
base, adapter, out = map(Path, sys.argv[1:])
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(l for l in lines if l.startswith("RssAnon")).split()[1]) * 1024
import threading, time
peak, start, done = 0, anonymous(), False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.01)
watcher = threading.Thread(target=watch)
watcher.start()
begin = time.perf_counter()
export_merged(base, [adapter], out)
seconds = time.perf_counter() - begin
done = True
watcher.join()
size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
print(peak - start, size, size / seconds)
"""


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_memory_is_bounded(tmp_path: Path, fused: bool) -> None:
    """A checkpoint of over 800 MB, experts alone or stacked: far less than it is taken."""
    family = "qwen3_5_moe_text" if fused else "qwen3_moe"
    import tiny_configs

    wide = {
        "hidden_size": 1024, "moe_intermediate_size": 512, "num_experts": 64, "vocab_size": 4096,
        "num_hidden_layers": 4 if not fused else 2,
    }  # fmt: skip
    entry = tiny_configs.TINY_FAMILIES[family]
    large = tiny_configs.TinyFamily(entry.model_type, {**entry.config, **wide})
    before = tiny_configs.TINY_FAMILIES
    tiny_configs.TINY_FAMILIES = {"large": large}
    try:
        build("large").save_pretrained(tmp_path / "base", max_shard_size="2GB")
        adapted(build("large")).save_pretrained(tmp_path / "adapter")
    finally:
        tiny_configs.TINY_FAMILIES = before
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            _MERGE_LARGE,
            *(str(tmp_path / n) for n in ("base", "adapter", "out")),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, size, rate = map(float, done.stdout.split()[-3:])
    sys.stdout.write(f"{size / 1e6:.0f} MB at {rate / 1e9:.2f} GB/s, {peak / 1e6:.0f} MB taken\n")
    assert size > 800e6 and peak < 0.12 * size
