"""The memory plan: its numbers, what it refuses, and what a run really takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from llamafactory.model.model_utils.misc import find_all_linear_modules
from llamafactory.model.model_utils.visual import patch_target_modules
from peft import LoraConfig, get_peft_model
from tiny_configs import build
from tiny_models import make_model
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import memory_plan

from kt_sft import HybridExpertsConfig, hybridize
from kt_sft.config import HybridExpertsSettings
from kt_sft.device.block import WORKING_BYTES
from kt_sft.engines.link import pinned_size
from kt_sft.errors import MemoryPlanError
from kt_sft.experts import hybrid_experts_of
from kt_sft.experts.runtime import ExpertsRuntime
from kt_sft.families.finding import find_experts
from kt_sft.kernels import (
    Call,
    Engine,
    ExpertWeights,
    Gate,
    Inputs,
    LoraFactors,
    WeightLayout,
    backward,
    backward_bytes,
    forward,
)
from kt_sft.loading import quantizer as transformers
from kt_sft.loading.swap import swap_experts
from kt_sft.machine import allocator
from kt_sft.planning import outline as memory
from kt_sft.planning.lora_targets import LoraTargets
from kt_sft.planning.outline import TrainingOutline
from kt_sft.planning.plan import (
    Arithmetic,
    LayerNeeds,
    MemoryPlan,
    OnDevice,
    RestOfModel,
    Workload,
    crossing_bytes,
    held_bytes,
    lora_parameters,
    plan_memory,
    staged_bytes,
    workspace_bytes,
)
from kt_sft.plugin.modes import outline_of

SCRIPT = Path(memory_plan.__file__)
LAYER = LayerNeeds(WeightLayout(128, 2048, 768, "int8"), top_k=8)
WORK = Workload(tokens=4096, rank=8)
EXACT = Arithmetic("exact", "portable", threads=8)
REST = RestOfModel(
    nbytes=3_000_000_000,
    hidden=2048,
    layers=48,
    vocabulary=151_936,
    element_bytes=2,
    on_host=False,
)


def plan(work: Workload | None = WORK, rest: RestOfModel = REST, **changes: object) -> MemoryPlan:
    settings = {"arithmetic": EXACT, "keeps": True, "mapped": True, "ranks": 1, **changes}
    return plan_memory([LAYER] * 48, rest, work, **settings)  # type: ignore[arg-type]


def test_numbers_of_a_layer() -> None:
    """Qwen3-30B-A3B, by hand."""
    assert lora_parameters(LAYER, 8) == 128 * 8 * 3 * (2048 + 768)
    assert lora_parameters(replace(LAYER, shared_lora=True), 8) == 8 * 3 * (2048 + 768)
    rows = 4096 * 8
    assert held_bytes(LAYER, WORK, 2) == rows * (2 * 768 + 24) * 4 + rows * 8 + 4096 * 2048 * 2
    without = workspace_bytes(LAYER, replace(WORK, rank=0), EXACT, REST)
    by_hand = rows * 2 * (2048 + 1536) + 4 * (rows * (1536 + 2048) + 2 * 4096 * 2048)
    assert 1.0 < without / by_hand < 1.06, "scales and sums of rows, and threads' own, beside them"
    with_lora = workspace_bytes(LAYER, WORK, EXACT, REST)
    assert with_lora > without + 4 * lora_parameters(LAYER, 8) + 4 * rows * (768 + 24)
    # Two buffers in each direction, and LoRA is larger than hidden states, indices and weights.
    assert 4 * lora_parameters(LAYER, 8) > 4096 * (2048 * 2 + 8 * 12)
    assert crossing_bytes([LAYER] * 3, WORK, 2, lora=True) == 4 * lora_parameters(LAYER, 8)
    assert crossing_bytes([LAYER] * 3, WORK, 2, lora=False) == 4096 * (2048 * 2 + 8 * 12)
    for adapters, largest in (
        ("device", 4 * lora_parameters(LAYER, 8)),
        ("host", 4096 * (2048 * 2 + 8 * 12)),
    ):
        parts = {c.name: c.nbytes for c in plan(adapters=adapters).components}
        assert parts["pinned memory of the link"] == 4 * pinned_size(largest)
        assert parts["tensors on the link"] == 2 * largest
    assert [pinned_size(n) for n in (1, 1 << 20, (1 << 20) + 1)] == [1 << 20, 1 << 20, 1 << 21]


@pytest.mark.parametrize("weights", ["int8", "bf16", "int4_g32"])
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_core_counts_what_it_takes(weights: str, rank: int, threads: int) -> None:
    """A fresh engine keeps what one backward took, and nothing else."""
    layout = WeightLayout(6, 200, 136, weights)
    experts = ExpertWeights(layout)
    index = torch.arange(600).remainder(6).reshape(300, 2)
    one = LoraFactors(torch.randn(6, rank, 200), torch.randn(6, 136, rank), 1.0) if rank else None
    inputs = Inputs(torch.randn(300, 200).bfloat16(), index, torch.rand(300, 2), (None, one, None))
    call = Call(layout.arithmetic or "exact", Gate())
    _, kept, _ = forward(Engine(1, "portable"), experts, call, inputs, keep=True)
    assert kept is not None
    engine = Engine(threads, "portable")
    gradients = backward(engine, experts, call, inputs, inputs.hidden_TD, kept)[0].lora
    lora = sum(t.nbytes for pair in gradients if pair for t in pair)
    del gradients
    counted = backward_bytes(
        layout, "exact", 300, 2, torch.bfloat16, [0, rank, 0],
        shared=False, isa="portable", threads=threads,
    )  # fmt: skip
    assert 0 <= engine.cached_bytes - counted - lora <= 0.05 * counted + 2 * (1 << 16)


def test_what_changes_the_plan() -> None:
    experts = 48 * LAYER.layout.nbytes
    parts = {c.name: c for c in plan().components}
    assert parts["routed experts"].place == "machine"
    assert parts["routed experts"].nbytes == experts
    assert parts["other weights"].place == "device"
    assert parts["expert LoRA and its optimizer"].nbytes == 48 * lora_parameters(LAYER, 8) * 16
    # Kept activations are those of all layers, recomputed ones those of one.
    one = {c.name: c for c in plan(keeps=False).components}["experts' activations"]
    assert parts["experts' activations"].nbytes == 48 * one.nbytes
    # Ranks share the file and nothing else.
    two = plan(ranks=2)
    assert two.host_bytes == experts + 2 * plan().of("host")
    assert plan(mapped=False, ranks=2).host_bytes == two.host_bytes + experts
    # A reference model is loaded later, and counted now.
    reference = plan(replace(WORK, frozen_models=1))
    assert reference.host_bytes == plan().host_bytes + experts
    assert reference.of("device") == plan().of("device") + REST.nbytes
    # Without training only the weights are there.
    assert plan(None).host_bytes == experts and plan(None).of("device") == REST.nbytes
    assert plan(rest=replace(REST, on_host=True)).of("device") == 0


def test_refused_before_it_is_exhausted(caplog: pytest.LogCaptureFixture) -> None:
    needed = plan().host_bytes
    plan().require(int(needed * 1.05) + (512 << 20), None, enforce=True)
    with pytest.raises(
        MemoryPlanError, match=r"(?s)host: needs .* GB, free are .*routed experts"
    ) as e:
        plan().require(needed, None, enforce=True)
    assert "memory_check: false starts all the same" in str(e.value)
    with pytest.raises(MemoryPlanError, match="device: needs"):
        plan().require(1 << 50, 1 << 30, enforce=True)
    plan().require(needed, None, enforce=False)
    assert "not enough memory" in caplog.text


def test_experts_on_the_disk() -> None:
    """Where the rest fits, mapped experts may come from the disk; never less than two layers."""
    experts, rest = 48 * LAYER.layout.nbytes, plan().of("host")
    free = int((rest + experts // 2) * 1.05) + (512 << 20)
    over = plan().from_disk(free)
    assert 0.3 * experts < over < 0.6 * experts
    assert plan().from_disk(1 << 50) == 0
    plan().require(free, None, enforce=True, disk_tier=True)
    with pytest.raises(MemoryPlanError, match="disk_tier: true goes on with less memory") as e:
        plan().require(free, None, enforce=True)
    assert f"{over / 1e9:.1f} GB of experts from the disk" in str(e.value)
    two = 2 * LAYER.layout.nbytes
    enough = int((rest + two) * 1.05) + (512 << 20)
    plan().require(enough, None, enforce=True, disk_tier=True)
    with pytest.raises(MemoryPlanError) as e:
        plan().require(enough - 2 * two, None, enforce=True, disk_tier=True)
    assert "disk_tier" not in str(e.value)
    # Experts in this process's memory stay there.
    with pytest.raises(MemoryPlanError):
        plan(mapped=False).require(free, None, enforce=True, disk_tier=True)


def test_experts_on_the_device() -> None:
    """What `schedule` and `gpu_experts` take."""

    def parts(on_device: OnDevice | None, work: Workload = WORK, **changes: object) -> dict:
        found = plan(work, on_device=on_device, **changes).components
        return {c.name: (c.place, c.nbytes) for c in found}

    assert "resident experts" not in parts(None)
    shared = OnDevice(resident_bytes=5_000_000_000)
    found = parts(shared)
    assert found["resident experts"] == ("device", 5_000_000_000)
    working, one = found["working memory of experts"][1], 4096 * 2048
    # Sums of out in fp32, forward and backward, within a bounded rest.
    assert 8 * one < working - WORKING_BYTES < 8 * one + (600 << 20)
    assert 0 < found["pinned memory of experts"][1] < 600 << 20
    # A checkpointed layer holds its output, unless it is computed again.
    kept = "outputs of experts there"
    assert found[kept][1] == 48 * one * 2
    assert parts(shared, replace(WORK, checkpointing=False))[kept][1] == 0
    assert parts(shared, keeps=False)[kept][1] == 0
    # Of LoRA's gradients, sums and what the parameters get.
    assert found["gradients of experts there"][1] == 2 * 4 * lora_parameters(LAYER, 8)
    # A reference model has residents of its own.
    reference = parts(shared, replace(WORK, frozen_models=1))
    assert reference["resident experts"][1] == 2 * 5_000_000_000
    assert plan(on_device=shared).resident_bytes == 5_000_000_000
    on_host = plan(rest=replace(REST, on_host=True), on_device=shared)
    assert on_host.of("device") == 0 == on_host.resident_bytes


def test_loading_asks_before_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_model("qwen3_moe").save_pretrained(tmp_path)
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 1 << 20)
    placed: list[object] = []
    monkeypatch.setattr(transformers, "place_experts", lambda *a: placed.append(a))

    def load(**settings: object) -> None:
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=HybridExpertsConfig(**settings), dtype=torch.float32
        )

    with pytest.raises(MemoryPlanError, match="not enough memory"):
        load()
    assert not placed
    with caplog.at_level("INFO"):
        load(memory_check=False)
    assert placed and "memory plan:" in caplog.text


def test_outline_of_a_recipe() -> None:
    assert outline_of({"do_train": False}) is None
    recipe = {"do_train": True, "per_device_train_batch_size": 2, "cutoff_len": 512}
    assert outline_of(recipe) == TrainingOutline(1024, 8, LoraTargets.of("all"), length=512)
    more = {
        **recipe, "gradient_accumulation_steps": 4, "use_unsloth_gc": True, "deepspeed": "z2.json",
        "enable_liger_kernel": True,
    }  # fmt: skip
    outline = outline_of(more, "qwen3_moe")
    assert outline == TrainingOutline(
        1024,
        8,
        LoraTargets.of("all"),
        accumulates=True,
        offloads=True,
        fused_loss=True,
        one_kind=True,
        length=512,
    )
    # LLaMA-Factory has no fused loss for it.
    assert not outline_of(more, "deepseek_v3").fused_loss
    preference = outline_of({**recipe, "stage": "dpo", "lora_target": "q_proj, experts.up_proj"})
    assert preference == TrainingOutline(
        2048, 8, LoraTargets.of("q_proj", "experts.up_proj"), length=512, references=1
    )
    for stage, loss, references in (("dpo", "orpo", 0), ("dpo", "ipo", 1), ("kto", None, 1)):
        asked = outline_of({**recipe, "stage": stage, **({"pref_loss": loss} if loss else {})})
        assert asked is not None and asked.references == references
    for kind, attention, eager in (
        ("qwen3_moe", "sdpa", False), ("qwen3_moe", "disabled", True), ("gpt_oss", "auto", True),
        ("gpt_oss", "fa3", False),
    ):  # fmt: skip
        asked = outline_of({**recipe, "flash_attn": attention}, kind)
        assert asked is not None and asked.eager == eager
    reference = outline_of({**recipe, "stage": "dpo", "ref_model": "other"})
    assert reference is not None and reference.frozen_models == 1
    other = outline_of(
        {**recipe, "additional_target": "gate", "disable_gradient_checkpointing": True}
    )
    assert other is not None and other.trained == {"gate"} and not other.checkpointing


def test_parameters_beside_the_experts_are_counted() -> None:
    model = hybridize(make_model("qwen3_moe"))
    attention = model.model.layers[0].self_attn.q_proj
    outline = TrainingOutline(64, 4, LoraTargets.of("q_proj"), frozenset({"lm_head"}))
    lora = len(model.model.layers) * 4 * (attention.in_features + attention.out_features)
    assert outline.workload(model) == Workload(64, 0, True, lora + model.lm_head.weight.numel())
    everything = replace(outline, targets=LoraTargets.of("all"))
    assert everything.workload(model).rank == 4
    without = hybridize(make_model("qwen3_moe"), HybridExpertsConfig(expert_lora=False))
    assert everything.workload(without).rank == 0


# The targets of a recipe, and whether they are of routed experts for what is known before loading.
TARGETS = (
    (("all",), True),
    (("gate_proj", "up_proj", "down_proj"), True),
    (("mlp.experts.up_proj",), True),
    (("experts.gate_proj", "experts.down_proj"), True),
    (("model.layers.1.mlp.experts.up_proj",), True),
    (("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"), False),
    (("self_attn.q_a_proj", "o_proj"), False),
)


@pytest.mark.parametrize(("names", "of_experts"), TARGETS, ids=lambda v: str(v))
def test_targets_are_those_of_peft(names: tuple[str, ...], of_experts: bool) -> None:
    """What is planned for is what trains: modules by the ends of their paths."""
    model = hybridize(make_model("deepseek_v3"))
    targets = LoraTargets.of(*names)
    assert targets.may_mean_experts() == of_experts
    outline = TrainingOutline(64, 4, targets)
    work, adapted = outline.workload(model), outline.adapted(model)
    planned = work.other_trained + sum(
        lora_parameters(
            LayerNeeds(module.weights.layout, 2, adapted=adapted.get(path, ())), work.rank
        )
        for path, module in hybrid_experts_of(model).items()
    )
    modules = "all-linear" if names == ("all",) else list(names)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=modules))
    assert planned == sum(p.numel() for p in peft.parameters() if p.requires_grad) > 0


@pytest.mark.parametrize(
    ("settings", "tower", "experts"),
    [
        ({}, False, True),
        ({"freeze_language_model": True, "freeze_vision_tower": False}, True, False),
        ({"freeze_vision_tower": False, "lora_target": "q_proj,qkv"}, True, False),
        ({"lora_target": "experts"}, False, True),
    ],
)
def test_targets_of_a_model_with_a_vision_tower(
    settings: dict[str, object], tower: bool, experts: bool
) -> None:
    """The same modules that LLaMA-Factory's own functions name, which take whole paths."""
    model = hybridize(build("qwen3_vl_moe"))
    recipe = {"do_train": True, "lora_target": "all", **settings}
    outline = outline_of(recipe, model.config.model_type)
    assert outline is not None
    got = {path for path, _ in outline.targets.modules(model)}
    arguments = SimpleNamespace(
        freeze_vision_tower=recipe.get("freeze_vision_tower", True),
        freeze_multi_modal_projector=True,
        freeze_language_model=recipe.get("freeze_language_model", False),
    )
    names = str(recipe["lora_target"]).split(",")
    if names == ["all"]:
        names = find_all_linear_modules(model, arguments.freeze_vision_tower)
    stock = patch_target_modules(model, arguments, names)
    assert got == {n for n in stock if "Linear" in type(model.get_submodule(n)).__name__}
    assert any("visual" in path for path in got) == tower
    assert any(".experts." in path for path in got) == experts


@pytest.mark.parametrize(("free", "asked"), [(10.0, False), (1.5, True)])
def test_freed_memory_goes_back_where_it_is_short(
    free: float, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    monkeypatch.setattr(allocator, "return_freed_blocks", lambda: calls.append(None) or True)
    allocator.settle(1 << 30, int(free * (1 << 30)))
    assert bool(calls) == asked


_HOLD = """
import ctypes, sys
from kt_sft.machine import allocator
from kt_sft.machine.memory import anonymous_memory_bytes
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
allocator.return_freed_blocks()
free(malloc(32 << 20))  # glibc keeps blocks below the largest that was freed
blocks = []
for _ in range(100):
    blocks.append(malloc(1 << 20))
    ctypes.memset(blocks[-1], 1, 1 << 20)
held = anonymous_memory_bytes()
for block in blocks[:-1]:
    free(block)
print((held - anonymous_memory_bytes()) >> 20)
"""


@pytest.mark.parametrize(("environment", "least", "most"), [
    ({}, 90, 105), ({"MALLOC_MMAP_THRESHOLD_": "33554432"}, -10, 10),
])  # fmt: skip
def test_freed_blocks_go_back_unless_a_person_decided(
    environment: dict[str, str], least: int, most: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HOLD],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert least <= int(done.stdout.splitlines()[-1]) <= most


def test_copies_of_a_device_are_counted() -> None:
    """Without checkpointing those of every layer lie on the host until backward; LoRA always."""

    def copied(work: Workload, rest: RestOfModel = REST, adapters: str = "device") -> int:
        parts = plan(work, rest, adapters=adapters).components
        (part,) = [c for c in parts if c.name == "copies for the host"]
        assert part.place == "host"
        return part.nbytes

    one = 4096 * 2048 * 2 + 4096 * 8 * 12
    lora = 48 * lora_parameters(LAYER, 8) * 4
    assert copied(WORK) == one + lora
    assert copied(replace(WORK, checkpointing=False)) == 48 * one + lora
    assert copied(replace(WORK, accumulates=True)) == one + 2 * lora
    assert copied(WORK, adapters="host") == one
    on_host = replace(REST, on_host=True)
    assert copied(WORK, on_host) == copied(replace(WORK, checkpointing=False), on_host) == 0


def test_adapters_on_the_host_are_planned_there() -> None:
    there, here = plan(WORK), plan(WORK, adapters="host")
    states = 4 * 4 * 48 * lora_parameters(LAYER, 8)
    # A layer's factors are packed there too, and its gradients land there.
    linked = 2 * (4 * lora_parameters(LAYER, 8) - staged_bytes(LAYER, WORK, 2))
    assert there.of("device") - here.of("device") == states + linked
    assert (there.adapters, here.adapters) == ("device", "host")
    assert here.of("host") > there.of("host"), "it went somewhere"


@pytest.mark.parametrize(
    "setting, free, expected",
    [
        ("auto", 1 << 40, "device"),
        ("auto", "between", "host"),
        ("auto", 1 << 20, "device"),
        ("auto", None, "device"),
        ("device", "between", "device"),
        ("host", 1 << 40, "host"),
    ],
)
def test_auto_puts_adapters_where_they_fit(
    monkeypatch: pytest.MonkeyPatch, setting: str, free: int | str | None, expected: str
) -> None:
    monkeypatch.setattr(memory, "has_accelerator", lambda: True)
    model = make_model("qwen3_moe")
    layers = find_experts(model)
    settings = HybridExpertsSettings(adapters=setting)
    swap_experts(model, layers, ExpertsRuntime(settings))
    outline = TrainingOutline(64, 512, LoraTargets.of("all"))

    def planned(free: int | None, settings: HybridExpertsSettings = settings) -> MemoryPlan:
        monkeypatch.setattr(memory, "free_device_memory", lambda: free)
        return memory.plan_of(model, layers, lambda _: None, settings, outline)  # type: ignore[arg-type]

    if free == "between":
        sizes = [
            planned(None, replace(settings, adapters=a)).of("device") for a in ("device", "host")
        ]
        # What is handed out leaves half a gigabyte out.
        free = sum(sizes) // 2 + (512 << 20)
    assert planned(free).adapters == expected  # type: ignore[arg-type]


def test_auto_keeps_activations_where_they_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_model("qwen3_moe").save_pretrained(tmp_path)

    def loaded(free: int) -> ExpertsRuntime:
        for module in (memory, transformers):
            monkeypatch.setattr(module, "available_memory_bytes", lambda: free)
        config = HybridExpertsConfig(store="memory", threads=1)
        config.outline = TrainingOutline(4096, 4, LoraTargets.of("all"))
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
        return next(iter(hybrid_experts_of(model).values())).runtime

    assert loaded(1 << 40).kept.limit_is() > 1 << 31
    # Three layers' activations are some 25 MB; half a gigabyte is never handed out.
    with caplog.at_level("INFO", "kt_sft"):
        tight = loaded((512 << 20) + (85 << 20))
    assert 0 <= tight.kept.limit_is() < 30 << 20
    assert "activations: host memory is too small for those of all layers" in caplog.text
    with pytest.raises(MemoryPlanError):
        loaded((512 << 20) + (20 << 20))


# Those of the quickest models; all of them are `make test-full`.
QUICK = ("recomputed", "lora", "not_checkpointed", "no_expert_lora")


@pytest.mark.parametrize(
    "shape",
    [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in memory_plan.SHAPES],
)
def test_a_run_takes_what_was_planned(shape: str) -> None:
    """Within 10 %, and never much more than planned."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--shape", shape], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    got = json.loads(done.stdout.splitlines()[-1])
    assert 0.9 <= got["measured"] / got["planned"] <= 1.1, got
