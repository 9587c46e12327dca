"""Training through the module: checkpointing, dropout, dtypes, the plain Trainer."""

from __future__ import annotations

import gc
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from layer_calls import run_forward
from llamafactory.hparams import FinetuningArguments
from llamafactory.train.trainer_utils import create_custom_optimizer
from peft import LoraConfig, get_peft_model
from tiny_models import make_model, stock_experts
from torch import nn
from transformers import Trainer, TrainingArguments

from kt_sft import HybridExpertsCallback, HybridExpertsConfig, hybridize
from kt_sft.errors import KernelArgumentError
from kt_sft.experts import hybrid_experts_of
from kt_sft.kernels import Engine, ExpertWeights, Gate, WeightLayout
from kt_sft.kernels._core import ForkedProcess

TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(0, 300, (2, 13), generator=torch.Generator().manual_seed(4))


def lora_model(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = hybridize(make_model("qwen3_moe").to(dtype), HybridExpertsConfig())
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=TARGETS)
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    for name, p in peft_model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator).to(p) * 0.1
    return peft_model.train()


def gradients(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    model(IDS, labels=IDS).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_nothing(reentrant: bool, dropout: float) -> None:
    """Recomputation sees the same dropout masks: gradients are equal to the last bit."""
    want = gradients(lora_model(dropout))
    model = lora_model(dropout)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients(model)
    assert got.keys() == want.keys() and any("experts" in n for n in got)
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_dropout_acts_in_training_only() -> None:
    model = lora_model(0.5)
    torch.manual_seed(0)
    first = model(IDS).logits
    second = model(IDS).logits
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    without = lora_model(0.0).eval()
    assert torch.equal(model(IDS).logits, without(IDS).logits)


def test_expert_dropout_alone_is_random_in_training() -> None:
    model = lora_model(0.5)
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "experts" not in name:
            module.p = 0.0
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_accumulated_gradients_are_the_sum() -> None:
    one = lora_model()
    want = gradients(one)
    one.zero_grad()
    for _ in range(2):
        one(IDS, labels=IDS).loss.backward()
    for name, p in one.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, 2 * want[name], rtol=1e-5, atol=1e-7)


def test_idle_experts_get_dense_zero_gradients() -> None:
    model = lora_model()
    model(IDS[:1, :1], labels=IDS[:1, :1])
    out = model(IDS[:1, :2], labels=IDS[:1, :2])
    out.loss.backward()
    for name, p in model.named_parameters():
        if "experts" in name and p.requires_grad:
            assert p.grad is not None and p.grad.shape == p.shape
            assert (p.grad.flatten(1).abs().amax(1) == 0).any()


@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
def test_bf16_model_keeps_the_dtype_of_its_lora(lora_dtype: torch.dtype) -> None:
    model = lora_model(dtype=torch.bfloat16)
    lora = {n: p for n, p in model.named_parameters() if "experts" in n and "lora" in n}
    assert all(p.dtype == torch.float32 for p in lora.values()), "fp32 unless asked"
    for p in lora.values():
        p.data = p.data.to(lora_dtype)
    got = gradients(model)
    assert all(got[n].dtype == lora_dtype for n in lora)
    assert model(IDS).logits.dtype == torch.bfloat16


def test_two_live_forwards_do_not_mix() -> None:
    model = lora_model()
    other = IDS.flip(1)
    want = []
    for ids in (IDS, other):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        want.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    first, second = (model(ids, labels=ids).loss for ids in (IDS, other))
    first.backward()
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(got, want[0], strict=True))
    model.zero_grad()
    second.backward()
    got = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(got, want[1], strict=True))


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": IDS[i % 2], "labels": IDS[i % 2]}


@pytest.mark.parametrize("workers", [0, 2])
def test_callback_alone_is_enough_for_a_plain_trainer(tmp_path: Path, workers: int) -> None:
    """A stock PeftModel with attention LoRA: the experts move and train too."""
    model = get_peft_model(
        make_model("qwen3_moe"), LoraConfig(r=2, target_modules=["q_proj", "gate_proj"])
    )
    assert stock_experts(model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, logging_steps=1, report_to="none",
            use_cpu=True, learning_rate=1e-2, save_strategy="steps", save_steps=3,
            per_device_train_batch_size=2, dataloader_num_workers=workers,
        ),
        train_dataset=Tokens(),
        callbacks=[HybridExpertsCallback(HybridExpertsConfig(weights="bf16"))],
    )  # fmt: skip
    assert hybrid_experts_of(model) and not stock_experts(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert any("experts" in n for n in before)
    trainer.train()
    after = dict(model.named_parameters())
    moved = {n for n, p in before.items() if not torch.equal(p, after[n])}
    assert any("experts.gate_proj.lora_B" in n for n in moved)
    assert any("q_proj.lora_B" in n for n in moved)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    for entry in logs:
        assert entry["tokens_per_second"] > 0
        assert entry["experts_forward_ms"] > 0 and entry["experts_backward_ms"] > 0
        assert 0 < entry["experts_time_share"] < 1
        assert 1 <= entry["experts_load_max_over_mean"] <= 8
        assert entry["host_memory_gb"] > 0.1
    saved = tmp_path / "checkpoint-3" / "adapter_model.safetensors"
    from safetensors import safe_open

    with safe_open(saved, "pt") as file:
        keys = list(file.keys())
    assert any(".experts.7.gate_proj.lora_A.weight" in k for k in keys)


class SlowTokens(Tokens):
    """Whose reading is most of an evaluation's time."""

    seconds = 1.0

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        time.sleep(self.seconds / len(self))
        return super().__getitem__(i)


def test_metrics_leave_evaluations_out(tmp_path: Path) -> None:
    """One before the first step, one between two logs, one that follows a step's log."""
    trainer = Trainer(
        model=get_peft_model(make_model("qwen3_moe"), LoraConfig(r=2, target_modules=["q_proj"])),
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=8, logging_steps=2, eval_strategy="steps",
            eval_steps=3, eval_on_start=True, report_to="none", use_cpu=True, save_strategy="no",
            per_device_train_batch_size=2,
        ),
        train_dataset=Tokens(),
        eval_dataset=SlowTokens(),
        callbacks=[HybridExpertsCallback(HybridExpertsConfig(weights="bf16"))],
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4
    for entry in logs:
        assert entry["experts_forwards_per_backward"] == 1
        assert entry["tokens_per_second"] > 4 * IDS.shape[-1] / SlowTokens.seconds


def test_metrics_leave_other_models_alone(tmp_path: Path) -> None:
    HybridExpertsCallback()  # registers the metrics for every Trainer of the process
    model = get_peft_model(make_model("qwen3_moe"), LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, logging_steps=1, report_to="none",
            use_cpu=True, save_strategy="no",
        ),
        train_dataset=Tokens(),
    )  # fmt: skip
    trainer.train()
    assert stock_experts(model)
    assert not any("tokens_per_second" in entry for entry in trainer.state.log_history)


def _forked(work) -> str:
    """What `work()` returns or raises in a forked child, which must end by itself."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def child() -> None:
        try:
            queue.put(str(work()))
        except ForkedProcess as error:
            queue.put(str(error))

    process = context.Process(target=child)
    process.start()
    message = queue.get(timeout=30)
    process.join(timeout=30)
    assert process.exitcode == 0
    return message


@pytest.mark.parametrize("tokens", [1, 512])
def test_a_forked_child_raises_and_does_not_hang(tokens: int) -> None:
    """With little work, which one thread does, and with much."""
    engine = Engine(2, "portable")
    weights = ExpertWeights(WeightLayout(1, 64, 64, "int8"))
    for p in ("gate_proj", "up_proj", "down_proj"):
        weights.pack(engine, 0, p, torch.ones(64, 64))
    inputs = torch.zeros(tokens, 64), torch.zeros(tokens, 1, dtype=torch.int64)

    def forward() -> None:
        run_forward(engine, weights, *inputs, torch.ones(tokens, 1), compute="exact", gate=Gate())

    forward()
    assert "forked child" in _forked(forward)
    assert "forked child" in _forked(lambda: weights.unpack(0, "gate_proj"))
    forward()


def test_a_forked_child_can_drop_an_engine() -> None:
    """Its destructor must neither join threads that are not there nor wait for them."""
    holder = [Engine(3, "portable")]
    holder.append(holder[0].empty(1 << 20))
    time.sleep(0.1)  # the workers sleep on their condition variable

    def drop() -> str:
        holder.clear()
        gc.collect()
        return "dropped"

    assert _forked(drop) == "dropped"


def test_reusable_memory_is_bounded() -> None:
    """Batches of changing length keep little more than the most that was in use at once."""
    engine = Engine(1, "portable")
    generator = torch.Generator().manual_seed(0)
    most = 0
    for _ in range(300):
        rows = int(torch.randint(32, 1024, (), generator=generator))
        held = [engine.empty(rows * 8, 768) for _ in range(4)]
        most = max(most, sum(4 * t.numel() for t in held))
        del held
    assert engine.cached_bytes <= 1.6 * most
    assert engine.trim() > 0
    assert engine.cached_bytes == 0


def test_engine_refuses_what_it_cannot_read() -> None:
    engine = Engine(1, "portable")
    weights = ExpertWeights(WeightLayout(2, 64, 64, "int8", biased=frozenset({"up_proj"})))
    hidden, index = torch.zeros(3, 64), torch.zeros(3, 2, dtype=torch.int64)
    weight = torch.ones(3, 2)
    good = {"compute": "exact", "gate": Gate()}
    cases = [
        ((hidden.double(), index, weight), "hidden: got dtype torch.float64"),
        ((hidden[:, :32], index, weight), r"hidden: got shape \(3, 32\), expected \(3, 64\)"),
        ((torch.zeros(64, 3).T, index, weight), "hidden: got strides"),
        ((hidden, index.int(), weight), "index: got dtype torch.int32"),
        ((hidden, index, weight.bfloat16()), "weight: got dtype torch.bfloat16"),
        ((hidden, index, weight[:2]), "weight: got shape"),
        ((hidden.to("meta"), index, weight), "hidden: got device meta"),
    ]
    for arguments, message in cases:
        with pytest.raises(KernelArgumentError, match=message):
            run_forward(engine, weights, *arguments, **good)
    for bad in (-1, 3):
        with pytest.raises(ValueError, match=f"token 1 names expert {bad}, expected 0 to 1"):
            run_forward(
                engine, weights, hidden, index.index_fill(0, torch.tensor([1]), bad), weight, **good
            )
    with pytest.raises(ValueError, match="compute: got 'fast', expected one of bf16, exact, int8"):
        run_forward(engine, weights, hidden, index, weight, compute="fast", gate=Gate())
    with pytest.raises(ValueError, match="bf16 goes with bf16 and coded weights"):
        run_forward(engine, weights, hidden, index, weight, compute="bf16", gate=Gate())
    with pytest.raises(ValueError, match="these experts have a gate projection"):
        run_forward(engine, weights, hidden, index, weight, compute="exact", gate=Gate(gated=False))
    with pytest.raises(ValueError, match="activation: got 'tanh', expected one of gelu"):
        run_forward(engine, weights, hidden, index, weight, compute="exact", gate=Gate("tanh"))
    ungated = ExpertWeights(WeightLayout(2, 64, 64, "int8", gated=False))
    with pytest.raises(KernelArgumentError, match="projection: got 'gate_proj', expected up_proj"):
        ungated.pack(engine, 0, "gate_proj", torch.ones(64, 64))
    with pytest.raises(ValueError, match="bias: up_proj of expert 1 has nan at"):
        weights.set_bias(1, "up_proj", torch.full((64,), float("nan")))
    with pytest.raises(KernelArgumentError, match=r"dropout: got 1\.0"):
        run_forward(engine, weights, hidden, index, weight, **good, dropout=1.0)


def test_lora_plus_takes_the_experts_factors_for_what_they_are(tmp_path: Path) -> None:
    """LLaMA-Factory sorts parameters by name: B of the experts learns faster, A does not."""
    model = lora_model()
    optimizer = create_custom_optimizer(
        model,
        TrainingArguments(str(tmp_path), learning_rate=1e-3, use_cpu=True, report_to="none"),
        FinetuningArguments(finetuning_type="lora", loraplus_lr_ratio=16.0),
    )
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    experts = {n: rates[id(p)] for n, p in trained.items() if ".experts." in n}
    assert len(rates) == len(trained) and experts
    assert all(rate == (16e-3 if "lora_B" in n else 1e-3) for n, rate in experts.items()), experts
