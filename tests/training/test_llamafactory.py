"""The main job through stock LLaMA-Factory, by its command lines.

Commands whose start matters are started: the first training, one without the plug-in, `kt-sft` and
the server. The others are forked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from children import finish
from llamafactory.hparams import DataArguments, FinetuningArguments, ModelArguments
from llamafactory_runs import RECIPE, Workplace, effective_workplace, run, run_forked, serve
from PIL import Image
from quantized_checkpoints import QUANTIZED_FORMATS
from safetensors.torch import load_file, save_file
from tiny_models import (
    make_tokenizer,
    stock_loss,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from kt_sft import HybridExpertsConfig, HybridExpertsSettings
from kt_sft.errors import SettingsError
from kt_sft.plugin.modes import refuse_unsupported
from kt_sft.plugin.section import take_section

EXPERTS = {"weights": "int8", "compute": "exact"}
# Shared by the run that is resumed and the one that resumes it.
CHECKPOINTS = {
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 4,
    "val_size": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "lora_dropout": 0.1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return effective_workplace(tmp_path_factory.mktemp("llamafactory"))


@pytest.fixture(scope="module")
def trained(place: Workplace) -> str:
    """A run with expert LoRA, evaluation, checkpoints and W&B in offline mode."""
    return place.train_by_command(
        "trained",
        env={"WANDB_MODE": "offline", "WANDB_DIR": str(place.folder)},
        kt_sft=EXPERTS,
        **CHECKPOINTS,
        plot_loss=True,
        report_to="wandb",
    )


def sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_trains_saves_and_reports(place: Workplace, trained: str) -> None:
    out = place.folder / "trained"
    losses = place.losses("trained")
    assert len(losses) == 8 and losses[-1] < losses[0]
    keys = load_file(out / "adapter_model.safetensors")
    assert sum(".experts." in k for k in keys) == 3 * 8 * 3 * 2
    targets = json.loads((out / "adapter_config.json").read_text())["target_modules"]
    assert {"gate_proj", "up_proj", "down_proj", "q_proj"} <= set(targets)
    assert json.loads((out / "all_results.json").read_text())["eval_loss"] > 0
    assert (out / "training_loss.png").is_file()
    for entry in place.logs("trained"):
        assert entry["tokens_per_second"] > 0 and entry["experts_backward_ms"] > 0
    assert "3 layers of 8 experts as int8" in trained


def test_wandb_run_has_metrics_settings_and_machine(place: Workplace, trained: str) -> None:
    """The offline run is a log of protobuf records, whose strings are stored as they are."""
    (file,) = place.folder.glob("wandb/offline-run-*/*.wandb")
    written = file.read_bytes()
    for name in (b"loss", b"tokens_per_second", b"experts_tflops", b"experts_load_max_over_mean"):
        assert written.count(b"train/" + name) >= 8, "one for each step"
    for text in (
        *(b'"weights":"int8"', b'"usable_threads"', b'"experts_per_layer":8'),
        *(b'"memory_plan_gb"', b'"routed experts (machine)"', b'"machine:memory nodes"'),
    ):
        assert text in written.replace(b": ", b":"), text
    media = file.parent / "files" / "media"
    (page,) = media.glob("html/report_*.html")
    (image,) = media.glob("images/expert_load_*.png")
    assert "Loss by step" in page.read_text()
    with Image.open(image) as found:
        assert found.size == (8 * 6, 3 * 6), "experts by layers"


def test_the_adapter_is_an_artifact_where_it_is_asked_for(place: Workplace, trained: str) -> None:
    """By the usual variable; W&B keeps the files of an offline run."""
    folder = place.folder / "artifact"
    place.train_by_command(
        "artifact-run",
        env={"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_LOG_MODEL": "end",
             "WANDB_DATA_DIR": str(folder), "WANDB_CACHE_DIR": str(folder)},
        kt_sft=EXPERTS,
        max_steps=1,
        report_to="wandb",
    )  # fmt: skip
    written = next(folder.glob("wandb/offline-run-*/*.wandb")).read_bytes()
    assert b"adapter_model.safetensors" in written and b"adapter_config.json" in written


def test_a_report_lies_beside_the_adapter(place: Workplace, trained: str) -> None:
    out = place.folder / "trained"
    page = (out / "report.html").read_text()
    for text in ("Loss by step", "Load of the experts by layer", "taken", "routed experts",
                 "evaluation loss"):  # fmt: skip
        assert text in page, text
    record = json.loads((out / "kt_sft_run.json").read_text())
    assert record["training"]["lora_r"] == 4 and record["base"] == str(place.folder / "model")
    assert len([e for e in record["history"] if "loss" in e]) == 8


def test_resume_is_bit_identical(place: Workplace, trained: str) -> None:
    """From checkpoint-4, with dropout on: the same losses and the same adapter bytes."""
    shutil.copytree(place.folder / "trained", place.folder / "resumed")
    shutil.rmtree(place.folder / "resumed" / "checkpoint-8")
    (place.folder / "resumed" / "adapter_model.safetensors").unlink()
    place.train(
        "resumed",
        kt_sft=EXPERTS,
        **CHECKPOINTS,
        overwrite_output_dir=False,
        resume_from_checkpoint=str(place.folder / "resumed" / "checkpoint-4"),
    )
    want = [x.hex() for x in place.losses("trained")]
    got = [x.hex() for x in place.losses("resumed")]
    assert got == want
    adapter = "checkpoint-8/adapter_model.safetensors"
    assert sha(place.folder / "resumed" / adapter) == sha(place.folder / "trained" / adapter)


def test_thirty_steps_follow_the_stock_path(place: Workplace) -> None:
    """Attention LoRA over frozen experts: same weights, same data, same seeds."""
    settings = {
        "max_steps": 30,
        # At twice the rate a token comes to stand between two experts, which a last bit decides.
        "learning_rate": 5.0e-3,
        "lora_target": "q_proj,k_proj,v_proj,o_proj",
    }
    place.train("stock30", **settings)
    place.train("hybrid30", kt_sft={**EXPERTS, "expert_lora": False}, **settings)
    stock, hybrid = place.losses("stock30"), place.losses("hybrid30")
    assert len(stock) == 30 and sum(stock[-5:]) < 0.95 * sum(stock[:5])
    # exact arithmetic differs from fp32 by about 5e-5 a layer.
    for step, (a, b) in enumerate(zip(stock, hybrid, strict=True)):
        assert abs(a - b) < 2e-4 * max(1.0, a), f"step {step}: stock {a}, hybrid {b}"
    for a, b in zip(place.logs("stock30"), place.logs("hybrid30"), strict=True):
        assert abs(a["grad_norm"] - b["grad_norm"]) < 2e-3 * a["grad_norm"]


def test_expert_lora_follows_stock_transformers_with_equal_lora(place: Workplace) -> None:
    """30 AdamW steps of LoRA on every expert, ours against W + scaling B A on the stock model."""
    from peft import LoraConfig, get_peft_model

    targets = r".*\.experts\.(gate|up|down)_proj"
    base = AutoModelForCausalLM.from_pretrained(
        place.folder / "model", quantization_config=HybridExpertsConfig(), dtype=torch.float32
    )
    torch.manual_seed(0)
    ours = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    stock = AutoModelForCausalLM.from_pretrained(place.folder / "model", dtype=torch.float32)
    stock.requires_grad_(False)
    lora = {
        n.removeprefix("base_model.model.").removesuffix(".default"): p.detach()
        .clone()
        .requires_grad_()
        for n, p in ours.named_parameters()
        if p.requires_grad
    }
    mine = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-3)
    theirs = torch.optim.AdamW(lora.values(), lr=1e-3)
    generator = torch.Generator().manual_seed(5)
    data = torch.randint(0, 300, (2, 4, 24), generator=generator)
    curves: tuple[list[float], list[float]] = ([], [])
    for step in range(30):
        ids = data[step % 2]
        loss = ours(ids, labels=ids).loss
        mine.zero_grad()
        loss.backward()
        mine.step()
        curves[0].append(float(loss.detach()))
        loss, _ = stock_loss(stock, lora, stock.get_input_embeddings()(ids), ids, scaling=2.0)
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        curves[1].append(float(loss.detach()))
    assert curves[1][-1] < 0.9 * curves[1][0]
    for step, (a, b) in enumerate(zip(*curves, strict=True)):
        # Mostly 1e-6; a rounding may tip a close decision of a router for one token.
        assert abs(a - b) < 2e-3 * b, f"step {step}: ours {a}, stock {b}"


def test_predicts_with_the_adapter(place: Workplace, trained: str) -> None:
    place.train(
        "predicted", kt_sft=EXPERTS, do_train=None, do_predict=True, predict_with_generate=True,
        dataset=None, eval_dataset="sft", max_samples=6, max_new_tokens=6,
        adapter_name_or_path=str(place.folder / "trained"),
    )  # fmt: skip
    lines = (place.folder / "predicted" / "generated_predictions.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert all({"prompt", "predict", "label"} <= json.loads(line).keys() for line in lines)


# A change of a request, and what the error says.
WRONG_REQUESTS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"max_tokens": -1}, "max_tokens: got -1, expected 1 to 32768"),
    ({"max_tokens": 10**9}, "max_tokens: got 1000000000"),
    ({"n": 10_000}, "n: got 10000, expected 1 to 16"),
    ({"temperature": float("nan")}, "temperature: got nan, expected 0.0 to 2.0"),
    ({"top_p": 0}, "top_p: got 0, expected more than 0.0"),
    ({"presence_penalty": -1}, "presence_penalty: got -1"),
    ({"messages": [{"role": "user", "content": None}]}, r"messages\.0\.content: got null"),
    ({"messages": [{"role": "user", "content": "a b " * 2_500_000}]}, "got 10000000 characters"),
    ({"messages": [{"role": "user", "content": "a b " * 100_000}]}, r"got \d{5,} tokens"),
    ({"messages": [{"role": "nobody", "content": "x"}]}, r"messages\.0\.role: Input should be"),
    ({"messages": []}, "Invalid length"),
    ({"stream": True, "n": 2}, "n: does not go together with stream"),
)


def test_api_serves_the_adapter(place: Workplace, trained: str) -> None:
    """An OpenAI-style request to a server on loopback, answered on the hybrid path."""
    served = place.folder / "served"
    shutil.copytree(place.folder / "model", served)
    config = json.loads((served / "config.json").read_text())
    (served / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32768}))
    # It never ends by itself: the tokens that stop an answer have logits of zero.
    weights = load_file(served / "model.safetensors")
    weights["lm_head.weight"][:3] = 0
    save_file(weights, served / "model.safetensors", metadata={"format": "pt"})
    recipe = place.recipe(
        "serving", model_name_or_path=str(served), kt_sft=EXPERTS,
        adapter_name_or_path=str(place.folder / "trained"),
        infer_backend="huggingface", max_new_tokens=5, do_sample=False,
        **{k: None for k in (*RECIPE, "output_dir", "dataset_dir") if k not in ("template",)},
    )  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"API_HOST": "127.0.0.1", "API_PORT": str(port)}
    with serve(["llamafactory-cli", "api", str(recipe)], environment, port) as log:
        body = {"model": "ours", "messages": [{"role": "user", "content": "say one"}]}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert "3 layers of 8 experts as int8" in log.read_text()
        for change, message in WRONG_REQUESTS:
            request.data = json.dumps({**body, **change}).encode()
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=60)
            error = json.load(refused.value)["error"]
            assert refused.value.code == 400 and re.search(message, error["message"]), error
            assert error["type"] == "invalid_request_error"
        # Who has gone is not computed for: the next one in line has the model.
        long = {**body, "max_tokens": 30_000, "presence_penalty": 0, "stop": ["never"]}
        for stream in (False, True):
            data = json.dumps({**long, "stream": stream}).encode()
            with socket.create_connection(("127.0.0.1", port)) as cut:
                cut.sendall(
                    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
                    b"Content-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%s" % (len(data), data)
                )
                time.sleep(2)
            request.data = json.dumps({**body, "max_tokens": 2}).encode()
            with urllib.request.urlopen(request, timeout=20) as response:
                assert json.load(response)["usage"]["completion_tokens"] >= 1
    assert answer["usage"]["completion_tokens"] >= 1
    assert "content" in answer["choices"][0]["message"]


def test_export_command_merges(place: Workplace, trained: str, tmp_path: Path) -> None:
    """From another folder than the recipe's, whose section is a file beside it."""
    (place.folder / "beside.yaml").write_text("weights: int8\n")
    recipe = place.recipe(
        "exporting", kt_sft="beside.yaml", adapter_name_or_path=str(place.folder / "trained"),
        export_dir=str(place.folder / "merged"),
        **{k: None for k in (*RECIPE, "output_dir", "dataset_dir") if k not in ("template",)},
    )  # fmt: skip
    run_forked(["llamafactory-cli", "export", str(recipe)], cwd=tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(place.folder / "merged", dtype=torch.float32)
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(
        place.folder / "model", quantization_config=HybridExpertsConfig(), dtype=torch.float32
    )
    live = PeftModel.from_pretrained(base, str(place.folder / "trained")).eval()
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, live(ids).logits, rtol=1e-3, atol=2e-3)
    # The tokenizer carries the chat format of the recipe's template.
    saved = AutoTokenizer.from_pretrained(place.folder / "merged")
    assert "<|im_start|>" in saved.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    text = run_forked(["kt-sft", "export", str(recipe)], check=False)
    assert "is not empty; give a new folder" in text
    # The base that the adapter notes is looked at here too.
    note = place.folder / "trained" / "kt_sft_base.json"
    known = note.read_text()
    assert '"samples"' in known
    note.write_text(known.replace('"digest": "', '"digest": "another '))
    text = run_forked(["kt-sft", "export", str(recipe), "export_dir=elsewhere"], check=False)
    assert "was trained on another base model" in text and "adapter_base: any" in text
    note.write_text(known)


def test_an_adapter_that_a_named_program_could_not_read_is_refused(place: Workplace) -> None:
    settings = {"kt_sft": {**EXPERTS, "export_for": ["vllm", "peft"]}, "lora_target": "all"}
    text = place.train("unread", check=False, additional_target="lm_head", **settings)
    assert "export_for: the recipe makes an adapter that cannot be read" in text
    assert "vllm: 1 parameters were trained in full" in text and "Traceback" not in text
    assert not list((place.folder / "unread").glob("adapter*"))


def test_settings_that_load_the_model_another_way_are_refused(place: Workplace) -> None:
    text = place.train(
        "bits", check=False, kt_sft=EXPERTS, quantization_bit=4, quantization_method="hqq"
    )
    assert "does not go together with" in text and "quantization_method: hqq" in text
    text = place.train(
        "table", check=False, kt_sft={**EXPERTS, "embeddings": "host"}, add_tokens="<a>,<b>"
    )
    assert "embeddings: got host with add_tokens, expected device" in text


@dataclasses.dataclass
class TwoRecipes:
    """What a child does: reads a recipe with the section, and then the same without it."""

    folder: str
    recipe: str

    def __call__(self) -> None:
        from llamafactory.hparams import get_train_args
        from llamafactory.model import patcher

        recipe = yaml.safe_load(Path(self.recipe).read_text())
        get_train_args(dict(recipe))
        assert hasattr(patcher.configure_quantization, "kt_sft_stock")
        del recipe["kt_sft"]
        get_train_args(dict(recipe))
        assert not hasattr(patcher.configure_quantization, "kt_sft_stock")


def test_a_later_recipe_without_the_section_is_stock(place: Workplace, tmp_path: Path) -> None:
    """In one process: the section of the first recipe does not stick."""
    code, text = finish(TwoRecipes(str(tmp_path), str(place.recipe("sticky", kt_sft=EXPERTS))))
    assert code == 0, text


def test_section_as_a_file_and_overrides(place: Workplace) -> None:
    (place.folder / "experts.yaml").write_text("weights: bf16\n")
    recipe = place.recipe("file", kt_sft="experts.yaml", max_steps=1)
    text = run_forked(["llamafactory-cli", "train", str(recipe)])
    assert "3 layers of 8 experts as bf16" in text
    recipe = place.recipe("override", kt_sft=EXPERTS, max_steps=1)
    text = run_forked(["llamafactory-cli", "train", str(recipe), "kt_sft.weights=bf16"])
    assert "3 layers of 8 experts as bf16" in text


@pytest.mark.parametrize(
    ("value", "section"),
    [(None, None), (False, None), (True, True), ({}, {}), ("a.yaml", "a.yaml")],
)
def test_what_switches_the_section_on(value: object, section: object) -> None:
    recipe = {"stage": "sft", "kt_sft": value}
    assert take_section(recipe) == ({"stage": "sft"}, section)
    assert take_section({"stage": "sft"}) == ({"stage": "sft"}, None)
    assert "kt_sft" in recipe


@pytest.mark.parametrize("name", ["kt-sft", "ktsft", "KT_SFT", "Kt-Sft", "kt_stf", "kt_sfts"])
def test_a_section_by_another_name_is_named(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}.*did you mean kt_sft"):
        take_section({name: {}, "stage": "sft"})


def test_keys_of_llamafactory_are_no_section() -> None:
    fields = [f.name for kind in (ModelArguments, DataArguments, FinetuningArguments)
              for f in dataclasses.fields(kind)]  # fmt: skip
    assert "use_kt" in fields
    assert take_section(dict.fromkeys(fields)) == (dict.fromkeys(fields), None)


def test_the_section_is_switched_on_the_command_line(place: Workplace) -> None:
    recipe = str(place.recipe("switched", kt_sft=EXPERTS, max_steps=1))
    for word, on in (("null", False), ("false", False), ("true", True), ("{}", True)):
        text = run_forked(["llamafactory-cli", "train", recipe, f"kt_sft={word}"])
        assert ("layers of 8 experts as int8" in text) == on, word


@pytest.mark.parametrize("by_environment", [False, True])
def test_llamafactorys_own_kt_is_refused(by_environment: bool) -> None:
    settings = HybridExpertsSettings()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USE_KT", "1" if by_environment else "0")
        with pytest.raises(SettingsError, match=r"needs forks.*remove use_kt"):
            refuse_unsupported({} if by_environment else {"use_kt": True}, settings)


def test_wrong_settings_end_the_run_before_it_starts(place: Workplace) -> None:
    text = place.train("wrong", check=False, kt_sft={"weihgts": "int8", "compute": "fast"})
    assert "Traceback" not in text and text.count("2 problems") == 1
    recipe = place.recipe("wrong", kt_sft={"weihgts": "int8"}, max_steps=1)
    words, environment = ["llamafactory-cli", "train", str(recipe)], {"KT_SFT_TRACEBACK": "1"}
    assert "Traceback" in run_forked(words, environment, check=False)
    assert "2 problems in the settings" in text and "did you mean weights?" in text
    assert not (place.folder / "wrong").exists()


def test_switched_off_is_a_loud_refusal_and_kt_sft_works(place: Workplace) -> None:
    off = {"KT_SFT_DISABLE": "1"}
    text = place.train_by_command("off", env=off, check=False, kt_sft=EXPERTS)
    assert "kt_sft" in text and "not used" in text
    recipe = place.recipe("by_command", kt_sft=EXPERTS, max_steps=1)
    text = run(["kt-sft", "train", str(recipe), "max_steps=2"], off)
    assert "3 layers of 8 experts as int8" in text
    assert len(place.losses("by_command")) == 2


def test_without_the_section_nothing_changes(place: Workplace) -> None:
    """Plug-in on and off: the same losses and the same adapter, to the bit."""
    place.train("plain_on", max_steps=4)
    place.train_by_command("plain_off", env={"KT_SFT_DISABLE": "1"}, max_steps=4)
    on, off = ([x.hex() for x in place.losses(n)] for n in ("plain_on", "plain_off"))
    assert on == off
    files = [place.folder / n / "adapter_model.safetensors" for n in ("plain_on", "plain_off")]
    assert sha(files[0]) == sha(files[1])


@pytest.fixture(scope="module")
def unquantized(place: Workplace) -> str:
    """Three steps on the model as it was before it was quantized."""
    return place.train("unquantized", kt_sft=EXPERTS, max_steps=3)


@pytest.mark.parametrize("published", ["fp8_block", "gptq"])
def test_trains_on_a_published_quantized_checkpoint(
    place: Workplace, unquantized: str, published: str
) -> None:
    """Its own quantization_config stays in the folder and is read by us, in either format."""
    source = place.folder / "model"
    target = place.folder / published
    options = {"group_size": 8} if published == "gptq" else {}
    QUANTIZED_FORMATS[published].write(source, target, **options)
    make_tokenizer(target)
    weights = "checkpoint" if published == "fp8_block" else "int8"
    place.train(
        f"on_{published}",
        model_name_or_path=str(target),
        kt_sft={**EXPERTS, "weights": weights},
        max_steps=3,
    )
    losses, plain = place.losses(f"on_{published}"), place.losses("unquantized")
    assert len(losses) == 3
    # Codes of 4 bits in groups of 8 are about 8 % off, of 8 bits about 3 %.
    assert all(abs(a - b) < 0.1 * b for a, b in zip(losses, plain, strict=True))
