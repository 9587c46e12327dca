"""Every stage and way of training, against stock LLaMA-Factory on the same effective weights.

The stock run and the hybrid one adapt the attention, so that they train the same function and
their losses must follow each other; a third run adapts the experts too.
"""

from __future__ import annotations

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from children import finish
from llamafactory_runs import RECIPE, Workplace, effective_workplace
from recipe_runs import (
    STEPS,
    CompareReference,
    OtherHub,
    Recipe,
    allow_pure_bf16,
    no_cuda_by_name,
)
from safetensors.torch import load_file
from tiny_models import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

EXPERTS = {"weights": "int8", "threads": 1}
FROZEN = {**EXPERTS, "expert_lora": False}
PAIRS = {"dataset": "pairs", "per_device_train_batch_size": 2}
DPO = {"stage": "dpo", **PAIRS}
KTO = {"stage": "kto", "dataset": "labelled"}
AUX = {"moe_aux_loss_coef": 0.5, "use_reentrant_gc": False}
# More than the embedding of the tiny models has room for.
ADDED = {"add_tokens": ",".join(f"<t{i}>" for i in range(40)), "resize_vocab": True}
MODES: dict[str, dict[str, Any]] = {
    "sft": {},
    "pt": {"stage": "pt", "dataset": "texts", "template": None},
    "rm": {"stage": "rm", **PAIRS},
    "dpo sigmoid": DPO,
    "dpo hinge": {**DPO, "pref_loss": "hinge"},
    "dpo ipo": {**DPO, "pref_loss": "ipo"},
    "dpo kto_pair": {**DPO, "pref_loss": "kto_pair"},
    "dpo orpo": {**DPO, "pref_loss": "orpo"},
    "dpo simpo": {**DPO, "pref_loss": "simpo"},
    "dpo ftx, bco": {**DPO, "pref_ftx": 0.5, "pref_bco_weight": 0.3},
    "dpo reference": {**DPO, "ref_model": "other"},
    "kto": KTO,
    "kto reference": {**KTO, "ref_model": "other"},
    "reentrant": {"use_reentrant_gc": True},
    "non-reentrant": {"use_reentrant_gc": False},
    "no checkpointing": {"disable_gradient_checkpointing": True},
    "packing": {"packing": True},
    "batch size found": {"auto_find_batch_size": True},
    "neat packing": {"neat_packing": True},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "clipping": {"max_grad_norm": 0.05},
    "neftune": {"neftune_noise_alpha": 5},
    "dropout": {"lora_dropout": 0.3},
    "rslora": {"use_rslora": True},
    "lora+": {"loraplus_lr_ratio": 16.0},
    "router": {"additional_target": "gate"},
    "embeddings": {"additional_target": "embed_tokens,lm_head"},
    "added tokens": ADDED,
    "added special tokens": {"add_special_tokens": ADDED["add_tokens"], "resize_vocab": True},
    "auxiliary loss": AUX,
    "auxiliary loss, router": {**AUX, "additional_target": "gate"},
    "bf16": {"bf16": True},
    "bf16, non-reentrant": {
        "bf16": True,
        "use_reentrant_gc": False,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    },
    "pure_bf16": {"pure_bf16": True},
    # Of everything but the experts, whose weights are no linear layers for bitsandbytes either.
    "4 bits": {"quantization_bit": 4},
    "4 bits, bf16": {"quantization_bit": 4, "bf16": True, "double_quantization": False},
    "8 bits": {"quantization_bit": 8},
    "unsloth": {"use_unsloth_gc": True},
}
# Not on the experts: refused there, and the same as stock on the rest.
BESIDE_EXPERTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "pissa": {"pissa_init": True},
    "muon": {"use_muon": True, "lora_target": "q_proj,v_proj"},
    "oft": {"finetuning_type": "oft", "oft_block_size": 16, "oft_rank": 0, "lora_target": "q_proj"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = effective_workplace(tmp_path_factory.mktemp("modes"))
    other = make_model("qwen3_moe", seed=5)
    other.save_pretrained(place.folder / "other")
    for file in (place.folder / "model").glob("*token*"):
        (place.folder / "other" / file.name).write_bytes(file.read_bytes())
    return place


def values(place: Workplace, name: str, **settings: Any) -> dict[str, Any]:
    """A recipe as the function takes it; None removes a default."""
    recipe = {
        **RECIPE, "model_name_or_path": str(place.folder / "model"),
        "dataset_dir": str(place.folder / "data"), "output_dir": str(place.folder / name),
        "max_steps": STEPS, "learning_rate": 5e-3, "lora_target": "q_proj,v_proj", **settings,
    }  # fmt: skip
    for key in ("ref_model",):
        if key in recipe:
            recipe[key] = str(place.folder / recipe[key])
    return {k: v for k, v in recipe.items() if v is not None}


def train(place: Workplace, name: str, change: Any = None, **settings: Any) -> list[float]:
    """The losses of one run."""
    name = name.replace(" ", "-").replace(",", "")
    recipe = Recipe(str(place.folder / name), values(place, name, **settings), change)
    code, text = finish(recipe)
    assert code == 0, text[-6000:]
    return place.losses(name)


def refused(place: Workplace, name: str, **settings: Any) -> str:
    code, text = finish(
        Recipe(str(place.folder / name), values(place, name, **settings)), seconds=60
    )
    assert code == 1, text[-3000:]
    return text


def assert_follows(stock: list[float], hybrid: list[float], tolerance: float) -> None:
    assert len(stock) == len(hybrid) == STEPS
    for a, b in zip(stock, hybrid, strict=True):
        assert math.isfinite(b) and abs(a - b) <= tolerance * max(1.0, abs(a)), (stock, hybrid)


@pytest.mark.parametrize("name", MODES)
def test_mode_follows_stock(name: str, place: Workplace) -> None:
    settings = MODES[name]
    change = {"pure_bf16": allow_pure_bf16, "unsloth": no_cuda_by_name}.get(name)
    stock = train(place, f"{name} stock", change, **settings)
    hybrid = train(place, f"{name} hybrid", change, kt_sft=FROZEN, **settings)
    assert_follows(stock, hybrid, 2e-2 if "bf16" in name else 2e-3)
    experts = train(
        place, f"{name} experts", change, kt_sft=EXPERTS, **settings | {"lora_target": "all"}
    )
    # At the first step no LoRA has an effect yet. Noise and a new value head are drawn after LoRA.
    if name not in ("neftune", "rm"):
        assert abs(experts[0] - stock[0]) <= (2e-2 if "bf16" in name else 2e-3) * max(1, stock[0])
    assert all(map(math.isfinite, experts))
    assert experts[-1] != hybrid[-1], "LoRA on the experts has no effect"


@pytest.mark.parametrize("name", BESIDE_EXPERTS)
def test_variants_that_need_the_weights_train_beside_the_experts(
    name: str, place: Workplace
) -> None:
    settings = BESIDE_EXPERTS[name]
    text = refused(place, f"{name}-refused", kt_sft=EXPERTS, **settings | {"lora_target": "all"})
    assert "not possible with hybrid experts" in text and "expert_lora: false" in text
    stock = train(place, f"{name} stock", **settings)
    assert_follows(stock, train(place, f"{name} hybrid", kt_sft=FROZEN, **settings), 2e-3)


@pytest.mark.parametrize("kind", ["full", "freeze"])
def test_full_fine_tuning_is_refused_with_what_is_possible(kind: str, place: Workplace) -> None:
    text = refused(place, kind, kt_sft=EXPERTS, finetuning_type=kind)
    assert f"finetuning_type: {kind}: the routed experts' weights are frozen" in text
    assert "additional_target: gate" in text


@pytest.mark.parametrize("mode", ["dpo", "kto"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_the_reference_is_the_base(mode: str, reentrant: bool, place: Workplace) -> None:
    """At every step, with expert LoRA and dropout that the reference must not see."""
    file = place.folder / f"reference-{mode}-{reentrant}.json"
    compare = CompareReference(str(place.folder / "model"), str(file))
    losses = train(
        place, f"reference {mode} {reentrant}", compare, kt_sft=EXPERTS, lora_target="all",
        lora_dropout=0.3, use_reentrant_gc=reentrant, **(DPO if mode == "dpo" else KTO),
    )  # fmt: skip
    rows = json.loads(file.read_text())
    assert len(rows) == STEPS
    assert max(from_base for from_base, _ in rows) < 5e-3
    assert min(from_policy for _, from_policy in rows[1:]) > 0.05, rows
    if mode == "dpo":
        # Policy and reference agree before the first update.
        assert losses[0] == pytest.approx(math.log(2), abs=2e-4)
        assert losses[-1] < losses[0] - 1e-3


def test_the_auxiliary_loss_reaches_the_router(place: Workplace) -> None:
    """Reentrant checkpointing would lose its gradient; it is switched, and said."""
    settings = {"lora_target": "q_proj", "additional_target": "gate", "kt_sft": FROZEN}
    train(place, "router-alone", **settings)
    train(place, "router-aux", moe_aux_loss_coef=5.0, **settings)
    text = (place.folder / "router-aux" / "output.txt").read_text()
    assert "use_reentrant_gc is set to false" in text
    alone, with_loss = (
        load_file(place.folder / name / "adapter_model.safetensors")
        for name in ("router-alone", "router-aux")
    )
    gates = [k for k in alone if "mlp.gate" in k]
    assert len(gates) == 3
    assert all((alone[k] - with_loss[k]).abs().max() > 1e-4 for k in gates)


@pytest.mark.parametrize(
    "target, trained",
    [
        ("gate_proj,up_proj,down_proj", {"experts"}),
        ("q_proj,v_proj", {"attention"}),
        ("q_proj,down_proj", {"attention", "experts"}),
    ],
)
def test_what_is_named_is_what_trains(target: str, trained: set[str], place: Workplace) -> None:
    name = f"target-{target.replace(',', '-')}"
    train(place, name, kt_sft=EXPERTS, lora_target=target)
    adapter = load_file(place.folder / name / "adapter_model.safetensors")
    kinds = {"experts" if ".experts." in key else "attention" for key in adapter}
    assert kinds == trained
    moved = [k for k, v in adapter.items() if "lora_B" in k and v.abs().max() > 0]
    assert {"experts" if ".experts." in key else "attention" for key in moved} == trained
    projections = {key.split(".lora_")[0].rpartition(".")[2] for key in adapter}
    assert projections == set(target.split(","))


# Adapters on adapters

NEXT = {"kt_sft": EXPERTS, "lora_target": "all", "seed": 11}


@pytest.fixture(scope="module")
def first(place: Workplace) -> Path:
    train(place, "first", kt_sft=EXPERTS, lora_target="all", learning_rate=2e-2)
    return place.folder / "first"


def evaluate(place: Workplace, name: str, **settings: Any) -> float:
    """The evaluation loss of a recipe that does not train."""
    recipe = values(
        place, name, do_train=None, do_eval=True, eval_dataset="sft", dataset=None, max_steps=None,
        **settings,
    )  # fmt: skip
    code, text = finish(Recipe(str(place.folder / name), recipe))
    assert code == 0, text[-6000:]
    return json.loads((place.folder / name / "eval_results.json").read_text())["eval_loss"]


def test_an_adapter_is_continued(place: Workplace, first: Path) -> None:
    losses = train(place, "continued", adapter_name_or_path=str(first), **NEXT)
    again = train(place, "continued-stock-start", **NEXT)
    assert losses[0] < again[0] - 0.1, "training began at the base"
    assert not (place.folder / "continued" / "default").exists()


def test_a_new_adapter_on_a_frozen_one(place: Workplace, first: Path) -> None:
    """`create_new_adapter`: the first one is part of the base, for a reference too."""
    settings = {"adapter_name_or_path": str(first), "create_new_adapter": True, **NEXT}
    losses = train(place, "second", **settings)
    start = train(place, "second-continued", adapter_name_or_path=str(first), **NEXT)[0]
    assert losses[0] == pytest.approx(start, abs=2e-3)
    before, after = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (first, place.folder / "second")
    )
    assert set(before) == set(after)
    # Experts that no token reached stay zero in both.
    trained = [k for k in before if "lora_B" in k and before[k].abs().max() > 0]
    assert trained and all(not before[k].equal(after[k]) for k in trained), "it is a new one"
    # The two together are what was trained: a first run with both starts where the last one ended.
    both = f"{first},{place.folder / 'second'}"
    shared = {"kt_sft": EXPERTS, "lora_target": "all"}
    alone = evaluate(place, "eval-first", adapter_name_or_path=str(first), **shared)
    together = evaluate(place, "eval-both", adapter_name_or_path=both, **shared)
    assert together < alone
    # Preference training compares with the first adapter's model.
    file = place.folder / "reference-second.json"
    compare = CompareReference(str(place.folder / "model"), str(file))
    train(place, "second-dpo", compare, **settings, **DPO)
    rows = json.loads(file.read_text())
    assert min(from_base for from_base, _ in rows) > 0.05, "the reference lost the first adapter"
    assert rows[0][1] < 1e-4, "the reference is not what training began with"


def test_a_model_of_another_hub(place: Workplace, first: Path, tmp_path: Path) -> None:
    """Trained and exported by its name there; Hugging Face's has no such model."""
    hub = OtherHub("somebody/model", str(place.folder / "model"))
    name = {"model_name_or_path": hub.name}
    losses = train(place, "by name", hub, kt_sft=EXPERTS, **name)
    assert losses == train(place, "by folder", kt_sft=EXPERTS)
    export = {
        **name, "adapter_name_or_path": str(first), "template": "qwen3_nothink",
        "finetuning_type": "lora", "export_dir": str(tmp_path / "out"), "kt_sft": EXPERTS,
    }  # fmt: skip
    code, text = finish(Recipe(str(tmp_path), export, hub, "export"))
    assert code == 0 and (tmp_path / "out" / "model.safetensors").is_file(), text[-3000:]


def test_the_best_checkpoint_is_what_stays(place: Workplace) -> None:
    """With the largest loss called the best, the first of the checkpoints is."""
    train(
        place, "best", kt_sft=EXPERTS, lora_target="all", max_steps=6, val_size=8,
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, save_total_limit=1, metric_for_best_model="eval_loss",
        greater_is_better=True,
    )  # fmt: skip
    folder = place.folder / "best"
    state = json.loads((folder / "trainer_state.json").read_text())
    losses = {e["step"]: e["eval_loss"] for e in state["log_history"] if "eval_loss" in e}
    best = Path(state["best_model_checkpoint"])
    assert best == folder / f"checkpoint-{max(losses, key=losses.__getitem__)}" and best.is_dir()
    assert best.name != "checkpoint-6"
    name = "adapter_model.safetensors"
    assert (best / name).read_bytes() == (folder / name).read_bytes()
    last = folder / "checkpoint-6" / name
    assert not last.exists() or last.read_bytes() != (best / name).read_bytes()


def test_a_modelling_file_of_the_checkpoint_is_not_used(place: Workplace) -> None:
    """`trust_remote_code: true`, which every DeepSeek and Kimi recipe has."""
    plain = train(place, "own code", kt_sft=EXPERTS)
    remote = place.folder / "remote"
    shutil.copytree(place.folder / "model", remote)
    config = json.loads((remote / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Qwen3MoeForCausalLM"}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "modeling.py").write_text('raise RuntimeError("the code of the checkpoint ran")')
    with_code = train(
        place, "remote code", kt_sft=EXPERTS, model_name_or_path=str(remote), trust_remote_code=True
    )
    assert [x.hex() for x in with_code] == [x.hex() for x in plain]


def test_export_is_spoken_of_before_training(place: Workplace, first: Path) -> None:
    settings = {"adapter_name_or_path": str(first), "create_new_adapter": True, **NEXT}
    recipe = Recipe(str(place.folder), values(place, "warned", max_steps=1, **settings))
    code, text = finish(recipe)
    assert code == 0 and "load and export them together, in this order" in text


def test_the_value_head_of_a_reward_model_is_exported(place: Workplace) -> None:
    train(place, "reward", kt_sft=EXPERTS, stage="rm", lora_target="all", **PAIRS)
    out = place.folder / "reward-merged"
    recipe = {
        "model_name_or_path": str(place.folder / "model"), "template": "qwen3_nothink",
        "adapter_name_or_path": str(place.folder / "reward"), "stage": "rm",
        "finetuning_type": "lora", "export_dir": str(out), "kt_sft": EXPERTS,
    }  # fmt: skip
    code, text = finish(Recipe(str(place.folder / "export"), recipe, command="export"))
    assert code == 0, text[-4000:]
    head = load_file(place.folder / "reward" / "value_head.safetensors")
    exported = load_file(out / "value_head.safetensors")
    assert all(torch.equal(head[k], exported[k]) for k in head)
    assert (out / "Modelfile").is_file()


# Shared LoRA


def test_shared_lora_is_one_pair_and_saved_as_one(place: Workplace) -> None:
    shared = {**EXPERTS, "expert_lora": "shared"}
    name = "shared"
    losses = train(place, name, kt_sft=shared, lora_target="all", save_steps=2,
                   save_strategy="steps")  # fmt: skip
    assert all(map(math.isfinite, losses))
    adapter = load_file(place.folder / name / "adapter_model.safetensors")
    experts = {k: v for k, v in adapter.items() if ".experts." in k}
    layers = {key.partition(".experts.")[0] for key in experts}
    assert len(layers) > 1 and len(experts) == len(layers) * 3 * 2
    assert any(matrix.abs().max() > 0 for key, matrix in experts.items() if "lora_B" in key)
    # Read back as shared and as one pair per expert, it is the same function.
    there = {"adapter_name_or_path": str(place.folder / name), "lora_target": "all"}
    as_shared = evaluate(place, "eval-shared", kt_sft=shared, **there)
    per_expert = evaluate(place, "eval-per-expert", kt_sft=EXPERTS, **there)
    assert as_shared == pytest.approx(per_expert, abs=1e-6)
    resumed = Recipe(
        str(place.folder / name),
        values(place, name, kt_sft=shared, lora_target="all", max_steps=STEPS, save_steps=2,
               save_strategy="steps", overwrite_output_dir=False,
               resume_from_checkpoint=str(place.folder / name / "checkpoint-2")),
    )  # fmt: skip
    code, text = finish(resumed)
    assert code == 0, text[-4000:]
    assert place.losses(name) == losses


# Shapes of batches


@pytest.mark.parametrize("length", [1, 2, 31, 8192])
def test_sequence_lengths(length: int) -> None:
    compare_with_stock(torch.arange(length)[None] * 7 % 300, None)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(side: str) -> None:
    ids = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 5, 11)):
        mask[row, slice(0, padding) if side == "left" else slice(12 - padding, 12)] = 0
    compare_with_stock(ids, mask)


def compare_with_stock(ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Loss and the gradient of the embeddings, hybrid against stock."""
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    follows_stock(
        make_model("qwen3_moe"), make_model("qwen3_moe"), ids, labels, attention_mask=mask
    )


def follows_stock(
    stock: Any, other: Any, ids: torch.Tensor, labels: torch.Tensor, **inputs: Any
) -> None:
    from tiny_models import take_effective_weights

    from kt_sft import HybridExpertsConfig, hybridize

    hybrid = hybridize(other, HybridExpertsConfig(threads=1))
    take_effective_weights(stock, hybrid)
    results = []
    for model in (stock, hybrid):
        torch.manual_seed(3)
        logits = model(input_ids=ids, **inputs).logits
        # A sequence of one token has no next one to predict.
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100
        )
        loss.backward()
        results.append((loss.item(), model.get_input_embeddings().weight.grad))
    (a, grad_a), (b, grad_b) = results
    assert abs(a - b) < 1e-3
    assert float((grad_a - grad_b).norm() / grad_a.norm()) < 1e-2


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_noise_before_the_router(reentrant: bool | None) -> None:
    """Mixtral's jitter is drawn again, and the same, when a checkpointed layer is recomputed."""
    models = []
    for _ in range(2):
        model = make_model("mixtral").train()
        for layer in model.model.layers:
            layer.mlp.jitter_noise = 0.3
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        models.append(model)
    ids = torch.randint(0, 300, (2, 33), generator=torch.Generator().manual_seed(1))
    follows_stock(*models, ids, ids)


def test_two_trainings_at_once(place: Workplace) -> None:
    """On one machine, with one store: neither waits for the other or changes it."""
    alone = train(place, "alone", kt_sft=EXPERTS, lora_target="all")
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(train, place, f"beside-{i}", kt_sft=EXPERTS, lora_target="all")
            for i in range(2)
        ]
    for run in runs:
        assert [x.hex() for x in run.result()] == [x.hex() for x in alone]


def test_added_tokens_resume_predict_and_export(place: Workplace, tmp_path: Path) -> None:
    """The recipe's two lines, in every command; the export has the larger vocabulary."""
    steps = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lora_dropout": 0.1}
    whole = train(place, "grown", kt_sft=EXPERTS, lora_target="all", **ADDED, **steps)
    cut = str(place.folder / "grown" / "checkpoint-2")
    resumed = train(
        place, "grown-again", kt_sft=EXPERTS, lora_target="all", resume_from_checkpoint=cut,
        **ADDED, **steps,
    )  # fmt: skip
    assert [x.hex() for x in resumed] == [x.hex() for x in whole]
    adapter = str(place.folder / "grown")
    train_file = values(
        place, "grown-predicted", kt_sft=EXPERTS, adapter_name_or_path=adapter, do_train=None,
        do_predict=True, predict_with_generate=True, eval_dataset="sft", max_samples=4,
        dataset=None, max_new_tokens=4, **ADDED,
    )  # fmt: skip
    code, text = finish(Recipe(str(place.folder / "grown-predicted"), train_file))
    assert code == 0, text[-4000:]
    for line in ADDED:
        del train_file[line]
    code, text = finish(Recipe(str(place.folder / "grown-forgotten"), train_file))
    assert code == 1 and "add_tokens, add_special_tokens and resize_vocab" in text
    export = {
        "model_name_or_path": str(place.folder / "model"), "adapter_name_or_path": adapter,
        "template": "qwen3_nothink", "finetuning_type": "lora", "export_dir": str(tmp_path / "out"),
        "kt_sft": EXPERTS, **ADDED,
    }  # fmt: skip
    code, text = finish(Recipe(str(tmp_path), export, command="export"))
    assert code == 0 and "export with the add_tokens" not in text, text[-4000:]
    without = {k: v for k, v in export.items() if k not in ADDED}
    without["export_dir"] = str(tmp_path / "without")
    code, text = finish(Recipe(str(tmp_path), without, command="export"))
    assert code == 0 and "export with the add_tokens" in text, text[-4000:]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    size = exported.config.vocab_size
    assert 300 < len(tokenizer) <= size == exported.get_input_embeddings().num_embeddings
    assert tokenizer.convert_tokens_to_ids("<t39>") == len(tokenizer) - 1
    trained = load_file(Path(adapter) / "adapter_model.safetensors")
    embedding = trained["base_model.model.model.embed_tokens.weight"]
    assert torch.equal(exported.get_input_embeddings().weight, embedding)
