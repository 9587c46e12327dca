"""Fidelity on real weights: the demo's language model, 692 M parameters, against stock.

Needs the registry, for the package that holds the weights. The demo's folder is used where it was
made already.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from llamafactory_runs import BIN, RECIPE, Workplace, environment, run, serve
from peft import LoraConfig, get_peft_model
from stock_models import take_effective_weights
from tiny_models import stock_loss
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kt_sft import HybridExpertsConfig
from kt_sft.machine.cpus import available_threads

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "demo"))
import base_model
import cards
import upcycle
from functions import documented_functions, language_reference

pytestmark = pytest.mark.slow

MODEL = Path(__file__).parents[2] / ".cache" / "demo" / "smollm2"

QUESTIONS = 8
STEPS = 20
EXPERTS = {"weights": "int8"}
PROSE = "It is a function of Python, and does what its name says."


@pytest.fixture(scope="module")
def real() -> Iterator[Path]:
    """The upcycled model's folder; torch has the cores to itself, as these tests are few."""
    threads = torch.get_num_threads()
    torch.set_num_threads(available_threads())
    if not base_model.is_made(MODEL):
        base_model.make(MODEL)
    yield MODEL
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def effective(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in fp32 with the weights that int8 storage makes of its experts.

    In bf16, rounding would decide between answers that are nearly as good, and merging round once
    more.
    """
    folder = tmp_path_factory.mktemp("effective") / "model"
    hybrid = AutoModelForCausalLM.from_pretrained(
        real, quantization_config=HybridExpertsConfig(**EXPERTS), dtype=torch.float32
    )
    stock = AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)
    take_effective_weights(stock, hybrid)
    stock.save_pretrained(folder)
    AutoTokenizer.from_pretrained(real).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(effective: Path, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Recipes on the real model, with reference cards to learn and questions to answer."""
    folder = tmp_path_factory.mktemp("real")
    data = folder / "data"
    data.mkdir()
    sets = cards.split(cards.cards(documented_functions()))
    pairs = [
        {"instruction": e["instruction"], "chosen": e["output"], "rejected": PROSE}
        for e in sets["demo_train"][:40]
    ]
    files = {
        "cards": sets["demo_train"][: 8 * STEPS],
        "questions": sets["demo_predict"][:QUESTIONS],
        "pairs": pairs,
    }
    for name, rows in files.items():
        (data / f"{name}.json").write_text(json.dumps(rows))
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info: dict[str, Any] = {name: {"file_name": f"{name}.json"} for name in files}
    info["pairs"].update(ranking=True, columns=columns)
    (data / "dataset_info.json").write_text(json.dumps(info))
    (folder / "model").symlink_to(effective)
    return Workplace(folder)


THREADS = {"OMP_NUM_THREADS": str(available_threads()), "OMP_WAIT_POLICY": "PASSIVE"}
SETTINGS = {"template": "smollm2", "cutoff_len": 192, "kt_sft": EXPERTS, "dataset": "cards"}
# Chat, API and export know the model's settings alone.
INFERENCE = {k: None for k in (*RECIPE, "output_dir", "dataset_dir", "dataset") if k != "template"}


@pytest.fixture(scope="module")
def trained(place: Workplace) -> Path:
    """An adapter on attention and every expert."""
    place.train(
        "trained", **SETTINGS, max_steps=STEPS, lora_rank=8, per_device_train_batch_size=8,
        disable_gradient_checkpointing=True, env=THREADS,
    )  # fmt: skip
    losses = place.losses("trained")
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])
    return place.folder / "trained"


@pytest.fixture(scope="module")
def questions(place: Workplace) -> list[str]:
    rows = json.loads((place.folder / "data" / "questions.json").read_text())
    return [row["instruction"] for row in rows]


@pytest.fixture(scope="module")
def answers(place: Workplace, trained: Path) -> list[str]:
    """What the recipe's prediction answers to the questions."""
    place.train(
        "predicted", **{**SETTINGS, "dataset": None}, do_train=None, do_predict=True,
        predict_with_generate=True, eval_dataset="questions", max_new_tokens=80,
        adapter_name_or_path=str(trained), do_sample=False, per_device_eval_batch_size=1,
        env=THREADS,
    )  # fmt: skip
    lines = (place.folder / "predicted" / "generated_predictions.jsonl").read_text().splitlines()
    found = [json.loads(line)["predict"].strip() for line in lines]
    assert sum(answer.startswith('{"module": "') for answer in found) >= QUESTIONS - 1
    return found


def test_upcycling_preserves_the_function(real: Path, tmp_path: Path) -> None:
    gguf = base_model.download(tmp_path)
    source = {"gguf_file": gguf.name}
    dense = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    tokenizer = AutoTokenizer.from_pretrained(real)
    ids = tokenizer(language_reference()[:4000], return_tensors="pt").input_ids[:, :512]
    with torch.no_grad():
        want = dense(ids, labels=ids)
        sparse = AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)(ids, labels=ids)
    # The folder keeps bf16, the dense model here what the GGUF file says.
    assert float(sparse.loss) == pytest.approx(float(want.loss), abs=5e-3)
    exact = upcycle.upcycled(dense, experts=8, top_k=2)
    with torch.no_grad():
        torch.testing.assert_close(exact(ids).logits, want.logits, rtol=1e-3, atol=2e-3)
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_merged_model_answers_the_same_in_stock_transformers(
    place: Workplace,
    trained: Path,
    questions: list[str],
    answers: list[str],
) -> None:
    recipe = place.recipe(
        "exporting", **{**INFERENCE, "template": "smollm2"}, kt_sft=EXPERTS,
        adapter_name_or_path=str(trained), export_dir=str(place.folder / "merged"),
    )  # fmt: skip
    run(["llamafactory-cli", "export", str(recipe)], THREADS)
    merged = AutoModelForCausalLM.from_pretrained(place.folder / "merged", dtype="auto")
    assert merged.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "merged")
    equal = 0
    for question, answer in zip(questions, answers, strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True,
            return_tensors="pt", return_dict=True,
        ).input_ids  # fmt: skip
        mask = torch.ones_like(ids)
        out = merged.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=80)
        equal += (
            tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == answer
        )
        # A rounding may tip a router, and so a token that another is as good as: no other.
        ours = tokenizer(f"{answer}<|im_end|>", return_tensors="pt").input_ids
        assert worst_choice(merged, ids, ours) < 0.25, answer
    assert equal >= QUESTIONS - 2


@torch.no_grad()
def worst_choice(model: Any, prompt: Tensor, answer: Tensor) -> float:
    """By how much the model prefers another token to one of the answer's, at most."""
    logits = model(torch.cat([prompt, answer], 1)).logits[0, prompt.shape[1] - 1 : -1]
    chosen = logits.gather(1, answer[0][:, None])[:, 0]
    return float((logits.amax(-1) - chosen).max())


def test_predict_chat_and_api_answer_alike(
    place: Workplace, trained: Path, questions: list[str], answers: list[str]
) -> None:
    recipe = place.recipe(
        "asking", **{**INFERENCE, "template": "smollm2"}, kt_sft=EXPERTS,
        adapter_name_or_path=str(trained), infer_backend="huggingface",
        do_sample=False, max_new_tokens=80,
    )  # fmt: skip
    assert chatted(recipe, questions) == answers
    assert list(served(recipe, questions)) == answers


def chatted(recipe: Path, questions: list[str]) -> list[str]:
    """The answers that `llamafactory-cli chat` prints, its history cleared in between."""
    typed = "".join(f"{question}\nclear\n" for question in questions) + "exit\n"
    done = subprocess.run(
        [str(BIN / "llamafactory-cli"), "chat", str(recipe)],
        input=typed, capture_output=True, text=True, env=environment(THREADS), timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    parts = done.stdout.split("Assistant: ")[1:]
    return [part.split("\n\nUser: ")[0].strip() for part in parts]


def served(recipe: Path, questions: list[str]) -> Iterator[str]:
    """The answers of `llamafactory-cli api`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = {**THREADS, "API_HOST": "127.0.0.1", "API_PORT": str(port)}
    with serve(["llamafactory-cli", "api", str(recipe)], where, port):
        for question in questions:
            body = {"model": "ours", "messages": [{"role": "user", "content": question}]}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/chat/completions",
                data=json.dumps(body).encode(),
                headers={"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=120) as response:
                yield json.load(response)["choices"][0]["message"]["content"].strip()


def test_dpo_raises_the_margin(place: Workplace) -> None:
    place.train(
        "preferred", **{**SETTINGS, "dataset": "pairs"}, stage="dpo", pref_beta=0.1, max_steps=5,
        learning_rate=5.0e-4, lr_scheduler_type="constant", env=THREADS,
    )  # fmt: skip
    logs = place.logs("preferred")
    margins = [entry["rewards/margins"] for entry in logs]
    assert len(margins) == 5
    assert logs[0]["loss"] == pytest.approx(0.6931, abs=2e-3) and abs(margins[0]) < 0.02
    assert margins[-1] > 0.5 and margins[-1] > margins[2] > margins[0]
    assert logs[-1]["rewards/accuracies"] == 1.0


def test_twenty_steps_follow_stock(real: Path, place: Workplace) -> None:
    """LoRA on attention and experts, AdamW; stock: W + scaling B A in its expert parameters.

    The last of the module, since the C library keeps the 16 GB that it takes.
    """
    tokenizer = AutoTokenizer.from_pretrained(real)
    rows = json.loads((place.folder / "data" / "cards.json").read_text())
    batches = [batch(tokenizer, rows[4 * i : 4 * i + 4]) for i in range(STEPS)]
    attention, routed = ["q_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]

    base = AutoModelForCausalLM.from_pretrained(
        real, quantization_config=HybridExpertsConfig(**EXPERTS), dtype=torch.float32
    )
    torch.manual_seed(0)
    ours = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=attention + routed))
    stock_base = AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)
    take_effective_weights(stock_base, ours)
    stock = get_peft_model(stock_base, LoraConfig(r=8, lora_alpha=16, target_modules=attention))
    start = {n: p.detach().clone() for n, p in ours.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in stock.named_parameters():
            if p.requires_grad:
                p.copy_(start[name])
    lora = {
        name.removesuffix(".default"): p.requires_grad_()
        for name, p in start.items()
        if ".experts." in name
    }
    trained = [p for p in stock.parameters() if p.requires_grad]
    assert len(trained) + len(lora) == len(start) and len(lora) == 30 * 3 * 2

    def curve(model: Any, parameters: Iterable[Tensor], loss_of: Callable) -> list[float]:
        model.train()
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        losses = []
        for inputs in batches:
            loss = loss_of(inputs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    parameters = (p for p in ours.parameters() if p.requires_grad)
    curves = [curve(ours, parameters, partial(_hybrid_loss, ours))]
    del base, ours, parameters
    loss_of = partial(_stock_loss, stock, lora)
    curves.append(curve(stock, [*trained, *lora.values()], loss_of))
    assert sum(curves[1][-4:]) < 0.75 * sum(curves[1][:4])
    # bf16 keeps 8 bits, 4e-3 of a number.
    for step, (a, b) in enumerate(zip(*curves, strict=True)):
        assert abs(a - b) < 4e-3 * b, f"step {step}: ours {a}, stock {b}"


def batch(tokenizer: Any, rows: list[dict[str, str]]) -> dict[str, Tensor]:
    """Padded on the right; the loss is on all tokens that are there."""
    texts = [
        tokenizer.apply_chat_template(
            [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ],
            tokenize=False,
        )
        for row in rows
    ]
    found = tokenizer(texts, return_tensors="pt", padding=True)
    labels = found.input_ids.masked_fill(found.attention_mask == 0, -100)
    return {"input_ids": found.input_ids, "labels": labels}


def _hybrid_loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).loss


def _stock_loss(stock: Any, lora: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    embeds = stock.get_input_embeddings()(inputs["input_ids"])
    return stock_loss(stock, lora, embeds, inputs["labels"], scaling=2.0)[0]
