"""Loading: every way experts lie on disk, bounded memory, and refusals that say what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import make_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from kt_sft import HybridExpertsConfig
from kt_sft.checkpoint.configuration import read_config
from kt_sft.checkpoint.folder import checkpoint_experts
from kt_sft.errors import CheckpointError, SettingsError, UnsupportedModelError
from kt_sft.experts import hybrid_experts_of
from kt_sft.files.safetensors import checkpoint_files


def load(folder: Path, **settings):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=HybridExpertsConfig(**settings), dtype=torch.float32
    )


def unpacked(model) -> list[torch.Tensor]:
    return [
        module.weights.unpack(e, p)
        for module in hybrid_experts_of(model).values()
        for e in range(module.shape.experts)
        for p in ("gate_proj", "up_proj", "down_proj")
    ]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(unpacked(a), unpacked(b), strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model("qwen3_moe").save_pretrained(tmp_path / "single")
    return tmp_path / "single"


def test_sharded_equals_single(folder: Path, tmp_path: Path) -> None:
    make_model("qwen3_moe").save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(checkpoint_files(tmp_path / "sharded")) > 3
    assert same(load(folder), load(tmp_path / "sharded"))


def test_fused_equals_per_expert(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    fused = {k: v for k, v in tensors.items() if ".experts." not in k}
    for layer in range(3):
        path = f"model.layers.{layer}.mlp.experts"

        def stacked(name: str, path: str = path) -> torch.Tensor:
            return torch.stack([tensors[f"{path}.{e}.{name}.weight"] for e in range(8)])

        fused[f"{path}.gate_up_proj"] = torch.cat([stacked("gate_proj"), stacked("up_proj")], 1)
        fused[f"{path}.down_proj"] = stacked("down_proj")
    other = tmp_path / "fused"
    other.mkdir()
    save_file(fused, other / "model.safetensors", metadata={"format": "pt"})
    (other / "config.json").write_text((folder / "config.json").read_text())
    assert same(load(folder), load(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_checkpoints(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    make_model("qwen3_moe").to(dtype).save_pretrained(tmp_path / "half")
    half = load(tmp_path / "half", weights="bf16" if dtype == torch.bfloat16 else "int8")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    source = tensors["model.layers.1.mlp.experts.5.up_proj.weight"].float()
    got = hybrid_experts_of(half)["model.layers.1.mlp.experts"].weights.unpack(5, "up_proj")
    if dtype == torch.bfloat16:
        assert torch.equal(got, source)
    else:
        assert (got - source).abs().max() <= source.abs().max() / 127 * 0.51


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModelError, match=r"'llama' has no routed experts.*GptOssExperts"
    ):
        load(tmp_path)


def test_unknown_activation_is_refused(tmp_path: Path) -> None:
    make_model("qwen3_moe", hidden_act="tanh").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="'Tanh' has no kernel; supported are silu"):
        load(tmp_path)


def test_missing_expert_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 of 8 .*layers\.2\.mlp\.experts\.3\.up"):
        load(folder)


def test_wrong_shape_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.experts.0.up_proj.weight"] = torch.zeros(8, 8)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.0\.up_proj.*\(8, 8\).*\(72, 64\)"):
        load(folder)


def with_config(folder: Path, **changes: object) -> Path:
    """The checkpoint under a configuration that says something else."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("experts", [6, 9])
def test_another_number_of_experts_is_refused(folder: Path, experts: int) -> None:
    with pytest.raises(CheckpointError, match=rf"{experts}"):
        load(with_config(folder, num_local_experts=experts))


def test_another_number_of_fused_experts_is_refused(tmp_path: Path) -> None:
    make_model("qwen3_moe").save_pretrained(tmp_path, save_original_format=False)
    with pytest.raises(CheckpointError, match=r"\(8, 64\).*\(6, 64\)"):
        load(with_config(tmp_path, num_local_experts=6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 290}, r"embed_tokens.weight: got shape \(300, 64\).*\(290, 64\)"),
        ({"num_attention_heads": 2}, r"q_proj.weight: got shape \(64, 64\).*\(32, 64\)"),
    ],
)
def test_other_shapes_beside_the_experts_are_refused(
    folder: Path, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(with_config(folder, **changes))


def test_a_router_of_another_size_is_refused(folder: Path) -> None:
    name = "model.layers.1.mlp.gate.weight"
    with pytest.raises(CheckpointError, match=rf"{name}: got shape \(6, 64\).*\(8, 64\)"):
        load(with_tensors(folder, lambda t: t.update({name: t[name][:6].clone()})))


@pytest.mark.parametrize(
    "name", ["model.layers.2.self_attn.k_norm.weight", "model.norm.weight", "lm_head.weight"]
)
def test_missing_weights_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name}: no tensor"):
        load(with_tensors(folder, lambda t: t.pop(name)))


def test_a_missing_buffer_is_refused(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    make_model("deepseek_v3").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"{name}: no tensor"):
        load(with_tensors(tmp_path, lambda t: t.pop(name)))


def test_a_tied_head_and_a_new_head_may_be_missing(tmp_path: Path) -> None:
    make_model("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=HybridExpertsConfig(store="memory"), num_labels=3
    )


def test_layers_beyond_the_last_are_left_alone(folder: Path) -> None:
    """Multi-token prediction: a layer of its own, with another number of experts."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        extra = {k.replace("layers.2", "layers.3"): v for k, v in tensors.items() if ".2." in k}
        more = {k.replace("experts.7", "experts.8"): v for k, v in extra.items() if ".7." in k}
        tensors.update({k: v.clone() for k, v in {**extra, **more}.items()})

    expected = load(folder)
    assert same(load(with_tensors(folder, add)), expected)


def test_nan_in_the_checkpoint_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.6.down_proj.weight"][2, 3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1.*down_proj of expert 6.*\[2, 3\]"):
        load(folder)


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "a\\b", "x\0"]
)
def test_shard_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": []}'])
def test_broken_index_is_a_named_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="not a shard index"):
        checkpoint_files(tmp_path)


def sharded(folder: Path, to: Path, **index: object) -> Path:
    """A copy in one shard of another name, with an index."""
    shutil.copytree(folder, to)
    (to / "model.safetensors").rename(to / "shard.safetensors")
    names = dict.fromkeys(load_file(to / "shard.safetensors"), "shard.safetensors")
    (to / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names, **index}))
    return to


def test_an_index_without_metadata_is_named(folder: Path, tmp_path: Path) -> None:
    load(sharded(folder, tmp_path / "with", metadata={}))
    for read in (load, checkpoint_experts):
        with pytest.raises(CheckpointError, match=r'index.json: has no "metadata".*add'):
            read(sharded(folder, tmp_path / read.__name__))


def test_a_left_over_index_is_passed_over(folder: Path, tmp_path: Path) -> None:
    """As by Transformers, whose files and ours are the same ones then."""
    model = sharded(folder, tmp_path / "model", metadata={})
    (model / "shard.safetensors").rename(model / "model.safetensors")
    assert checkpoint_files(model) == [model / "model.safetensors"]
    load(model)
    checkpoint_experts(model)


def test_files_without_metadata(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    save_file(load_file(model / "model.safetensors"), model / "model.safetensors")
    load(model)
    checkpoint_experts(model)


_MODELLING = """
from torch import nn
from transformers import DeepseekV3Config, PreTrainedModel

class DeepseekV3ForCausalLM(PreTrainedModel):
    config_class = DeepseekV3Config
    def __init__(self, config):
        raise RuntimeError("remote code")
"""


@pytest.mark.parametrize("model_type", ["deepseek_v3", "kimi_k2"])
def test_a_checkpoint_with_its_own_modelling_file(tmp_path: Path, model_type: str) -> None:
    """Transformers' own class computes it, whatever the recipe says of remote code."""
    make_model("deepseek_v3").save_pretrained(tmp_path)
    plain = load(tmp_path)
    (tmp_path / "modeling_deepseek.py").write_text(_MODELLING)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = model_type
    config["auto_map"] = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        config=read_config(str(tmp_path)),
        quantization_config=HybridExpertsConfig(),
        dtype=torch.float32,
        trust_remote_code=True,
    )
    ids = torch.arange(12).view(1, -1)
    assert torch.equal(model(ids).logits, plain(ids).logits) and hybrid_experts_of(model)
    assert checkpoint_experts(tmp_path).layers


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("kimi_k25", r"got 'kimi_k25'.*transformers 5\.\S+ does not have.*from 5\.17 on"),
        ("kimi_k9", r"got 'kimi_k9'.*does not have: upgrade it.*modelling code is never used"),
        (None, "got None"),
        ([1], r"got \[1\]"),
    ],
)
def test_a_type_that_transformers_does_not_have(
    folder: Path, tmp_path: Path, model_type: object, message: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    config = json.loads((model / "config.json").read_text())
    config["model_type"] = model_type
    (model / "config.json").write_text(json.dumps(config))
    for read in (read_config, checkpoint_experts):
        with pytest.raises(UnsupportedModelError, match=message):
            read(str(model))


_MEMORY_PROBE = """
import gc, json, sys, threading, time
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
import kt_sft
from kt_sft.experts import hybrid_experts_of
from kt_sft.machine.memory import anonymous_memory_bytes
config = kt_sft.HybridExpertsConfig(weights=sys.argv[2])
AutoModelForCausalLM.from_pretrained(sys.argv[3], quantization_config=config)  # imports, pools
gc.collect()
before = anonymous_memory_bytes()
peak, done = [before], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous_memory_bytes())
        time.sleep(0.002)
watcher = threading.Thread(target=watch); watcher.start()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
done.set(); watcher.join()
experts = hybrid_experts_of(model)
stored = sum(m.weights.nbytes for m in experts.values())
rest = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps({"before": before, "peak": peak[0], "stored": stored, "rest": rest,
                  "layers": len(experts)}))
"""


@pytest.mark.parametrize("weights", ["int8", "bf16"])
def test_peak_memory_of_loading(tmp_path: Path, weights: str) -> None:
    """An 830 MB checkpoint: at most the store, the other weights, 1.2 layers and a constant."""
    big, small = tmp_path / "big", tmp_path / "small"
    with torch.device("meta"):
        shape = make_model(
            "qwen3_moe", hidden_size=512, moe_intermediate_size=512, num_experts=64,
            num_hidden_layers=8, num_attention_heads=8, head_dim=64,
        )  # fmt: skip
    shape.config.save_pretrained(big)
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for name, p in shape.named_parameters():
        if name.endswith("gate_up_proj") or name.endswith("experts.down_proj"):
            continue
        state[name] = torch.zeros(p.shape, dtype=torch.bfloat16)
    block = torch.randn(512, 512, generator=generator).bfloat16()
    for layer in range(8):
        for e in range(64):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                state[f"model.layers.{layer}.mlp.experts.{e}.{projection}.weight"] = block.clone()
    save_file(state, big / "model.safetensors", metadata={"format": "pt"})
    size = (big / "model.safetensors").stat().st_size
    assert size >= 800e6
    del state
    make_model("qwen3_moe").to(torch.bfloat16).save_pretrained(small)

    done = subprocess.run(
        [sys.executable, "-c", _MEMORY_PROBE, str(big), weights, str(small)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    got = json.loads(done.stdout.strip().splitlines()[-1])
    layer = got["stored"] / got["layers"]
    limit = got["stored"] + got["rest"] + 1.2 * layer + 64e6
    assert got["stored"] >= (0.5 if weights == "int8" else 1.0) * 800e6
    assert got["peak"] - got["before"] <= limit, got


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=1000, suppress_health_check=list(HealthCheck))
@given(value=_JSON | st.fixed_dictionaries({"weight_map": _JSON}), single=st.booleans())
def test_any_index_is_read_or_refused(tmp_path: Path, value: object, single: bool) -> None:
    """Whatever it says, the files are inside of the folder and exist."""
    (tmp_path / "model-1.safetensors").touch()
    if single:
        value = {"weight_map": {"a": "model-1.safetensors", "b": value}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(value))
    try:
        files = checkpoint_files(tmp_path)
    except CheckpointError:
        return
    assert all(file.parent == tmp_path and file.is_file() for file in files)


def test_shards_of_several_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    outside = tmp_path / "outside"
    outside.mkdir()
    (model / "model.safetensors").rename(outside / "model.safetensors")
    (model / "other.safetensors").write_bytes((outside / "model.safetensors").read_bytes())
    keys = list(load_file(outside / "model.safetensors"))
    names = dict.fromkeys(keys, "other.safetensors") | {keys[0]: "../outside/model.safetensors"}
    index = {"metadata": {}, "weight_map": names}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"outside/model\.safetensors' is not a plain file name"
    ):
        load(model)


def test_a_table_on_the_host_is_no_parameter(tmp_path: Path) -> None:
    make_model("qwen3_moe").save_pretrained(tmp_path / "plain")
    make_model("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")

    def load(name: str, **settings: str) -> nn.Module:
        config = HybridExpertsConfig(threads=1, **settings)
        return AutoModelForCausalLM.from_pretrained(tmp_path / name, quantization_config=config)

    model, plain = load("plain", embeddings="host"), load("plain")
    assert "model.embed_tokens.weight" not in dict(model.named_parameters())
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, plain(ids).logits)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    back = PeftModel.from_pretrained(load("plain", embeddings="host"), tmp_path / "adapter")
    assert torch.equal(back(ids).logits, adapted(ids).logits)
    with pytest.raises(SettingsError, match="output head is the same table"):
        load("tied", embeddings="host")
