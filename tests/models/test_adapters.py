"""Adapters: the portable form, switching, and refusal on a base that does not match."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from comparators import assert_matches
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny_models import FAMILY_CONFIGS, make_model
from torch import nn
from transformers import AutoModelForCausalLM

from kt_sft import HybridExpertsConfig, hybridize
from kt_sft.errors import AdapterMismatchError, CheckpointError, SettingsError
from kt_sft.experts import hybrid_experts_of
from kt_sft.export.merge import export_merged

TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(0, 300, (2, 11), generator=torch.Generator().manual_seed(4))


def base(family: str = "qwen3_moe", expert_lora: bool | str = True, **changes) -> nn.Module:
    return hybridize(
        make_model(family, **changes), HybridExpertsConfig(expert_lora=expert_lora)
    ).eval()


def adapted(model: nn.Module, seed: int = 0, name: str = "default", **config) -> PeftModel:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **config}
    peft_model = get_peft_model(model, LoraConfig(**settings), adapter_name=name)
    randomize(peft_model, seed, name)
    return peft_model


def randomize(model: nn.Module, seed: int, name: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    for key, p in model.named_parameters():
        if "lora_B" in key and f".{name}" in key:
            p.data = torch.randn(p.shape, generator=generator).to(p) * 0.2


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapted(base()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_saved_form_is_portable(saved: Path) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.experts.7"
    assert tensors[f"{prefix}.gate_proj.lora_A.weight"].shape == (4, 64)
    assert tensors[f"{prefix}.gate_proj.lora_B.weight"].shape == (72, 4)
    assert tensors[f"{prefix}.down_proj.lora_A.weight"].shape == (4, 72)
    assert tensors[f"{prefix}.down_proj.lora_B.weight"].shape == (64, 4)
    # 3 layers: 8 experts x 3 projections and q, v; two matrices each.
    assert len(tensors) == 3 * (8 * 3 + 2) * 2
    config = json.loads((saved / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(TARGETS)
    assert config["r"] == 4 and not config["rank_pattern"] and not config["use_rslora"]


def test_save_and_load_give_the_same_model(saved: Path) -> None:
    want = logits(adapted(base()))
    loaded = PeftModel.from_pretrained(base(), str(saved))
    assert torch.equal(logits(loaded), want)


@pytest.mark.parametrize("family", sorted(FAMILY_CONFIGS))
def test_round_trip_of_each_family(family: str, tmp_path: Path) -> None:
    model = adapted(base(family))
    want = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(family), str(tmp_path))), want)


def test_disabled_is_the_base(saved: Path) -> None:
    want = logits(base())
    model = PeftModel.from_pretrained(base(), str(saved))
    assert not torch.allclose(logits(model), want, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), want)


def test_two_adapters_switch_and_add(tmp_path: Path) -> None:
    single = {seed: logits(adapted(base(), seed)) for seed in (1, 2)}
    model = adapted(base(), 1, "default")
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS))
    assert torch.equal(logits(model), single[1])
    model.set_adapter("second")
    randomize(model, 7, "second")
    second = logits(model)
    assert not torch.allclose(second, single[1], atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(logits(model), single[1])
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.allclose(both, single[1], atol=1e-3)
    assert not torch.allclose(both, second, atol=1e-3)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), single[1])


def test_expert_lora_false_adapts_the_rest_only() -> None:
    model = adapted(base(expert_lora=False), target_modules=["q_proj", "v_proj"])
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable and not any("experts" in n for n in trainable)


def test_only_the_named_projections_train() -> None:
    model = adapted(base(), target_modules=["down_proj"])
    trainable = {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"down_proj"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 4}, r"got 8 experts, expected 4; unknown 4, 5, 6, 7"),
        ({"num_experts": 16}, r"got 8 experts, expected 16; missing 8, 9"),
        ({"moe_intermediate_size": 136}, r"got shape \(72, 4\).*expected \(136, 4\)"),
        ({"num_hidden_layers": 2}, r"layers\.2\.mlp\.experts: in the adapter, not in this model"),
        ({"num_hidden_layers": 5}, r"layers\.3\.mlp\.experts: in this model, not in the adapter"),
    ],
)
def test_other_bases_are_refused(saved: Path, changes: dict, message: str) -> None:
    with pytest.raises(AdapterMismatchError, match=message):
        PeftModel.from_pretrained(base(**changes), str(saved))


def test_other_rank_is_refused(saved: Path) -> None:
    file = saved / "adapter_config.json"
    config = json.loads(file.read_text())
    config["r"] = 8
    file.write_text(json.dumps(config))
    with pytest.raises(AdapterMismatchError, match=r"got shape \(4, 64\).*expected \(8, 64\)"):
        PeftModel.from_pretrained(base(), str(saved))


class Bomb:
    """Opens a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_pickles_are_not_run(tmp_path: Path) -> None:
    """As the weights of an adapter and of a base."""
    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()
    mark.unlink()
    adapted(base()).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"x": Bomb(mark)}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        PeftModel.from_pretrained(base(), tmp_path / "adapter")
    stock = make_model("qwen3_moe")
    stock.config.save_pretrained(tmp_path / "base")
    torch.save({"x": Bomb(mark)}, tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"got a \.bin file, expected \.safetensors"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=HybridExpertsConfig(), dtype=torch.float32
        )
    assert not mark.exists()


def test_missing_expert_is_refused(saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_B.weight"]
    save_file(tensors, file)
    with pytest.raises(AdapterMismatchError, match=r"up_proj lora_B: got 7 experts.*missing 3"):
        PeftModel.from_pretrained(base(), str(saved))


def test_expert_lora_on_a_model_without_it_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterMismatchError, match=r"expert_lora: false"):
        PeftModel.from_pretrained(base(expert_lora=False), str(saved))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"r": 513}, "expected 1 to 512"),
    ],
)
def test_variants_without_kernels_are_refused(config: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        adapted(base(), target_modules=["gate_proj"], **config)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    model = adapted(base(), use_rslora=True)
    layer = next(iter(hybrid_experts_of(model).values())).gate_proj
    assert layer.scaling["default"] == pytest.approx(8 / 4**0.5)


def test_unload_restores_the_base() -> None:
    want = logits(base())
    with pytest.raises(NotImplementedError, match="kt-sft export"):
        adapted(base()).merge_adapter()
    assert torch.equal(logits(adapted(base()).unload()), want)


def test_a_merged_adapter_stays_beside_the_packed_weights() -> None:
    model = adapted(base(), init_lora_weights=False)
    want, without = logits(model), logits(base())
    merged = model.merge_and_unload()
    assert (want - without).abs().max() > 0.1
    assert torch.allclose(logits(merged), want, atol=2e-3)
    # The next adapter is switched alone, and no dropout may touch what is merged.
    second = adapted(merged, init_lora_weights=False)
    assert not torch.allclose(logits(second), want, atol=1e-2)
    with second.disable_adapter():
        assert torch.allclose(logits(second), want, atol=2e-3)
    dropping = adapted(second.unload(), lora_dropout=0.1).train()
    with pytest.raises(SettingsError, match="beside an adapter that was merged"):
        dropping(IDS)


def test_adapters_together_have_a_largest_rank() -> None:
    model = adapted(base(), r=300).merge_and_unload()
    with pytest.raises(SettingsError, match="together have rank 600, expected at most"):
        logits(adapted(model, r=300))


def test_shared_lora_gets_the_gradients_of_all_experts(tmp_path: Path) -> None:
    """From equal values, the gradient of the shared pair is the sum of those of the experts."""
    shared = adapted(base(expert_lora="shared"), init_lora_weights=False)
    shared.save_pretrained(tmp_path)
    single = PeftModel.from_pretrained(base(), str(tmp_path), is_trainable=True)
    for model in (shared, single):
        model(IDS, labels=IDS).loss.backward()
    pairs = zip(hybrid_experts_of(shared).values(), hybrid_experts_of(single).values(), strict=True)
    for one, many in pairs:
        for name in ("gate_proj", "up_proj", "down_proj"):
            for factor in ("lora_A", "lora_B"):
                got, each = (getattr(getattr(m, name), factor)["default"].grad for m in (one, many))
                want = each.sum(0, keepdim=True)
                assert got.shape == want.shape and want.abs().max() > 0
                assert float((got - want).norm() / want.norm()) < 1e-5


def test_an_adapter_of_one_pair_per_expert_does_not_load_as_a_shared_one(tmp_path: Path) -> None:
    adapted(base(), init_lora_weights=False).save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatchError, match="expert_lora: shared; set expert_lora: true"):
        PeftModel.from_pretrained(base(expert_lora="shared"), str(tmp_path))


def test_a_deep_copy_shares_the_frozen_weights_only() -> None:
    model = adapted(base())
    want = logits(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), want)
    randomize(copied, 5, "default")
    assert not torch.equal(logits(copied), want)
    assert torch.equal(logits(model), want)
    ours, theirs = (next(iter(hybrid_experts_of(m).values())) for m in (model, copied))
    assert ours.weights is theirs.weights


def test_frozen_weights_are_not_pickled() -> None:
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(base())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"experts.gate_proj": 32}, "rank_pattern": {"experts.down_proj": 2}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_export_adds_the_adapter_to_the_original_weights(
    family: str, fused: bool, config: dict, tmp_path: Path
) -> None:
    """Every tensor is W + scaling B A, rounded once, with the scaling that trained."""
    make_model(family).save_pretrained(tmp_path / "base")
    if fused:
        fuse(tmp_path / "base" / "model.safetensors", family)
    model = adapted(base(family), **config)
    model.save_pretrained(tmp_path / "adapter")
    out = export_merged(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")

    # The truth from the live modules, on the stock parameters in fp64.
    want = {n: p.detach().double() for n, p in make_model(family).named_parameters()}
    changed = set()
    for path, module in model.base_model.model.named_modules():
        if not isinstance(module, LoraLayer) or not module.lora_A:
            continue
        a, b = module.lora_A["default"], module.lora_B["default"]
        stacked = isinstance(a, nn.Parameter)
        delta = module.scaling["default"] * (
            b.double() @ a.double() if stacked else b.weight.double() @ a.weight.double()
        )
        if not stacked:
            name, rows = f"{path}.weight", slice(None)
        else:
            experts, _, projection = path.rpartition(".")
            name = f"{experts}.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"
            half = want[name].shape[1] // 2
            rows = {"gate_proj": slice(0, half), "up_proj": slice(half, None)}.get(
                projection, slice(None)
            )
        (want[name][:, rows] if stacked else want[name]).add_(delta.detach())
        changed.add(name)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    got = dict(merged.named_parameters())
    original = dict(make_model(family).named_parameters())
    assert sum("experts" in n for n in changed) >= 4
    for name, tensor in want.items():
        torch.testing.assert_close(got[name].double(), tensor, rtol=1e-6, atol=1e-6)
        assert torch.equal(got[name], original[name]) == (name not in changed)


def test_export_refuses_adapters_of_a_residual(saved: Path, tmp_path: Path) -> None:
    """PiSSA and its like trained on another base than the one that lies on disk."""
    file = saved / "adapter_config.json"
    config = json.loads(file.read_text())
    config["init_lora_weights"] = "pissa"
    file.write_text(json.dumps(config))
    make_model("qwen3_moe").save_pretrained(tmp_path / "base")
    with pytest.raises(SettingsError, match=r"'pissa' replaced the base's weights"):
        export_merged(tmp_path / "base", [saved], tmp_path / "merged")


def test_active_adapters_may_differ_in_dropout_in_evaluation() -> None:
    model = adapted(base(), lora_dropout=0.1)
    model.add_adapter(
        "second", LoraConfig(r=2, lora_alpha=6, lora_dropout=0.05, target_modules=TARGETS)
    )
    model.base_model.set_adapter(["default", "second"])
    logits(model)
    with pytest.raises(SettingsError, match="the active adapters differ"):
        model.train()(IDS)


def fuse(file: Path, family: str) -> None:
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    tensors = load_file(file)
    fused = {k: v for k, v in tensors.items() if ".experts." not in k or "shared" in k}
    for path in {k.split(".experts.")[0] + ".experts" for k in tensors if k not in fused}:
        count = len({k.split(".experts.")[1].split(".")[0] for k in tensors if k.startswith(path)})

        def stacked(name: str, path: str = path, count: int = count) -> torch.Tensor:
            return torch.stack([tensors[f"{path}.{e}.{name}.weight"] for e in range(count)])

        fused[f"{path}.gate_up_proj"] = torch.cat([stacked(names[0]), stacked(names[1])], dim=1)
        fused[f"{path}.down_proj"] = stacked(names[2])
    save_file(fused, file, metadata={"format": "pt"})


def test_export_refuses_an_adapter_of_another_base(saved: Path, tmp_path: Path) -> None:
    make_model("qwen3_moe", num_experts=4).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterMismatchError, match=r"got 8 experts, expected 4"):
        export_merged(tmp_path / "other", [saved], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob("*.partial*"))


def test_an_export_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and the folder are synced, then renamed, then the name itself is synced."""
    make_model("qwen3_moe").save_pretrained(tmp_path / "base")
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_sync(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def note_rename(self: Path, target: Path) -> Path:
        events.append(f"-> {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    out = export_merged(tmp_path / "base", [], tmp_path / "out")
    *before, published, after = events
    written = {p.name for p in out.iterdir()}
    assert published == "-> out" and after == tmp_path.name
    assert written | {before[-1]} == set(before) and before[-1].startswith("out.partial")


def trained_vocabulary(tied: bool, targets: list[str], grown: int, folder: Path) -> nn.Module:
    """A hybrid model with attention LoRA whose embedding, head or both were trained and saved."""
    stock = make_model("qwen3_moe", tie_word_embeddings=tied)
    stock.save_pretrained(folder / "base", max_shard_size="200KB")
    torch.manual_seed(1)
    hybrid = load_hybrid(folder / "base")
    if grown:
        hybrid.resize_token_embeddings(300 + grown)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=targets)
    model = get_peft_model(hybrid, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * (0.1 if "lora" in name else 0.02))
    model.save_pretrained(folder / "adapter")
    return model.eval()


def load_hybrid(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=HybridExpertsConfig(store="memory"), dtype=torch.float32
    )


@pytest.mark.parametrize("grown", [0, 20])
@pytest.mark.parametrize(
    ("tied", "targets"),
    [
        (False, ["embed_tokens", "lm_head"]),
        (True, ["embed_tokens", "lm_head"]),
        (True, ["embed_tokens"]),
        (True, ["lm_head"]),
        (False, ["embed_tokens"]),
    ],
)
def test_trained_embeddings_and_heads_are_exported(
    tied: bool, targets: list[str], grown: int, tmp_path: Path
) -> None:
    """Tied or not, resized or not: the exported model computes what the trained one does."""
    model = trained_vocabulary(tied, targets, grown, tmp_path)
    out = export_merged(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert plain.config.vocab_size == plain.get_input_embeddings().num_embeddings == 300 + grown
    assert plain.config.tie_word_embeddings == (tied and not targets)
    ids = torch.arange(40).reshape(2, 20) * 7 % (300 + grown)
    with torch.no_grad():
        want, got = model(ids).logits, load_hybrid(out)(ids).logits
    assert_matches(got, want, 1e-4, "logits")
