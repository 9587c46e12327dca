"""`kt-sft plan`: memory and time of published and of tiny models, on this machine and on others."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import golden_plans
import pytest
import yaml
from tiny_models import make_model

from kt_sft.checkpoint.layouts import own_layout
from kt_sft.cli import main
from kt_sft.cli.plan import question_of
from kt_sft.config import HybridExpertsSettings
from kt_sft.engines.calibration import measured_host
from kt_sft.errors import CheckpointError, SettingsError
from kt_sft.forecast import forecast as forecasting
from kt_sft.forecast import machines, text
from kt_sft.forecast.forecast import DOES_NOT_FIT, FITS, UNKNOWN, Change, Question, ask
from kt_sft.forecast.machines import CORE_RATES, described
from kt_sft.forecast.samples import samples_of
from kt_sft.forecast.subject import Subject
from kt_sft.forecast.timing import rest_operations
from kt_sft.kernels import ExpertWeights, WeightLayout
from kt_sft.plugin.templates import template_of

# As their files have them, without what predicts further tokens (the MTP layers) and buffers.
PARAMETERS = {
    "DeepSeek-V2-Lite": 15_706_484_224,
    "DeepSeek-V3": 671_026_404_352,
    "GLM-4.5-Air": 106_852_245_504,
    "Kimi-K2-Instruct": 1_026_408_209_408,
    "MiniMax-M2": 228_689_748_992,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "OLMoE-1B-7B-0924": 6_919_161_856,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-VL-30B-A3B-Instruct": 31_070_754_032,
    "Qwen3.5-35B-A3B": 35_107_181_936,
    "Qwen3.5-397B-A17B": 396_802_360_816,
    "gpt-oss-120b": 116_829_156_672,
}
SERVER = golden_plans.MACHINES["server"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.mark.parametrize("model", golden_plans.models())
def test_published_models(model: str, folder: Path) -> None:
    """The number of parameters is the published one; the rest is as it was looked at."""
    subject = Subject.of(str(golden_plans.folder_of(model, folder)))
    assert subject.parameters == PARAMETERS[model]
    known = json.loads(golden_plans.FILE.read_text())
    found = json.loads(json.dumps(golden_plans.plans_of(model, folder)))
    for machine, plan in found.items():
        memory = plan.pop("memory_mb")
        assert memory == pytest.approx(known[model][machine].pop("memory_mb"), rel=1e-3, abs=1)
        assert plan.pop("step_ms") == pytest.approx(known[model][machine].pop("step_ms"), abs=2)
        assert plan == known[model][machine], machine
        if "(device)" not in "".join(memory):
            continue
        # By hand: a byte for each weight, and the others in bf16.
        experts = memory["routed experts (machine)"] * 1e6
        assert experts == pytest.approx(subject.in_experts, rel=0.02)
        others = memory["other weights (device)"] * 1e6
        assert others == pytest.approx(2 * (subject.parameters - subject.in_experts), rel=1e-3)


def question(
    folder: Path, machine: str = SERVER, model: str = "Qwen3-30B-A3B", **recipe: Any
) -> Question:
    where = str(golden_plans.folder_of(model, folder))
    return question_of(
        {**golden_plans.RECIPE, "model_name_or_path": where, **recipe}, None, machine
    )


def test_larger_is_longer_and_takes_more(folder: Path) -> None:
    plain = ask(question(folder))
    longer = ask(question(folder, cutoff_len=8192))
    assert longer.plan.of("device") > plain.plan.of("device")
    # Attention looks at twice as many tokens, so that each costs more.
    assert longer.step.tokens == 2 * plain.step.tokens
    assert longer.step.parts["other layers"] > 2 * plain.step.parts["other layers"]
    twice = ask(question(folder, gradient_accumulation_steps=16))
    assert twice.step.parts["optimizer"] == plain.step.parts["optimizer"]
    for part in ("experts, forward", "experts, backward", "other layers"):
        assert twice.step.parts[part] == pytest.approx(2 * plain.step.parts[part])
    again = ask(question(folder, kt_sft={"activations": "recompute"}))
    assert again.step.parts["experts, forward"] == pytest.approx(
        2 * plain.step.parts["experts, forward"]
    )
    assert again.plan.host_bytes < plain.plan.host_bytes
    host = ask(question(folder, kt_sft={"adapters": "host"}))
    assert host.step.parts["link"] < plain.step.parts["link"], "LoRA stays where it is"
    fewer = ask(question(folder, machine="8 cores avx512_vnni, 1 TB, 48 GB gpu"))
    assert fewer.step.parts["experts, forward"] > 8 * plain.step.parts["experts, forward"]
    assert "the CPU's arithmetic" in fewer.limit


def test_few_tokens_wait_for_memory(folder: Path) -> None:
    slow = "2x64 cores amx, 1 TB, 24 GB gpu, 40 GB/s memory, 60 GB/s link, 900 TFLOPS"
    forecast = ask(question(folder, machine=slow, cutoff_len=64))
    assert "reading their weights from memory" in forecast.limit
    # 48 layers' experts are read in each of 8 forwards.
    expected = 8 * 29.08e9 / 40e9
    assert forecast.step.parts["experts, forward"] == pytest.approx(expected, rel=0.1)


def test_the_largest_micro_batch_is_the_largest(folder: Path) -> None:
    asked = question(folder)
    longest = ask(asked).longest
    assert not asked.with_tokens(longest).shortages()
    assert asked.with_tokens(int(1.1 * longest)).shortages()


@pytest.mark.parametrize(
    ("model", "machine"),
    [
        ("DeepSeek-V3", "2x64 cores amx, 512 GB, 24 GB gpu"),
        ("Qwen3-30B-A3B", "16 cores avx2, 32 GB, 10 GB gpu"),
        ("Qwen3-235B-A22B", "16 cores avx512_vnni, 160 GB, no gpu"),
        ("MiniMax-M2", "16 cores avx512_vnni, 96 GB, 24 GB gpu"),
    ],
)
def test_with_the_changes_it_fits(model: str, machine: str, folder: Path) -> None:
    """Every change that is named is needed, and they are enough."""
    asked = question(folder, machine, model)
    forecast = ask(asked)
    assert forecast.verdict == DOES_NOT_FIT and forecast.changes

    def with_changes(changes: list[Change]) -> list[str]:
        recipe: dict[str, Any] = {"kt_sft": {"weights": "int8"}}
        for change in changes:
            (recipe["kt_sft"] if change.inner else recipe)[change.inner or change.key] = (
                change.value
            )
        return ask(question(folder, machine, model, **recipe)).shortages

    assert not with_changes(forecast.changes)
    for change in forecast.changes:
        if change.inner == "weights" and forecast.changes[-1].inner == "disk_tier":
            continue  # spares reading
        assert with_changes([c for c in forecast.changes if c != change]), str(change)


def test_no_change_is_enough(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = question(folder, "4 cores avx2, 8 GB, 4 GB gpu", "Kimi-K2-Instruct")
    forecast = ask(asked)
    assert (forecast.verdict, forecast.changes, forecast.longest) == (DOES_NOT_FIT, [], 0)
    model = str(golden_plans.folder_of("Kimi-K2-Instruct", folder))
    assert main(["plan", "--model", model, "--machine", "4 cores avx2, 8 GB, 4 GB gpu"]) == 1
    assert "no settings of kt_sft are enough" in capsys.readouterr().out


def test_a_device_that_does_not_tell_its_memory(folder: Path) -> None:
    asked = question(folder)
    assert asked.machine.device is not None
    silent = replace(asked.machine, device=replace(asked.machine.device, free=None))
    assert ask(replace(asked, machine=silent)).verdict == UNKNOWN


def test_the_other_layers_operations(folder: Path) -> None:
    """Of Qwen3-30B-A3B by hand: attention, router and head; each token sees half of the others."""
    subject = question(folder).subject
    attention = 2048 * (32 + 4 + 4) * 128 + 32 * 128 * 2048
    products = 48 * (attention + 2048 * 128) + 151_936 * 2048
    seen = 48 * 2 * 32 * 128 * 2 * (4096 / 2)
    assert rest_operations(subject, 4096) == pytest.approx((2 * products, seen), rel=1e-3)


@pytest.mark.parametrize("model", ["DeepSeek-V3", "gpt-oss-120b", "MiniMax-M2", "OLMoE-1B-7B-0924"])
def test_published_forms_without_their_files(model: str, folder: Path) -> None:
    """`weights: checkpoint` takes what the files have: fp8 and mxfp4 with their scales, or bf16."""
    bytes_a_weight = {"gpt-oss-120b": 17 / 32, "OLMoE-1B-7B-0924": 2.0}.get(model, 1.0)
    asked = question(folder, model=model, kt_sft={"weights": "checkpoint"})
    experts = next(c for c in asked.plan().components if c.name == "routed experts")
    assert experts.nbytes == pytest.approx(bytes_a_weight * asked.subject.in_experts, rel=0.02)


def test_a_form_that_only_the_tensors_tell(folder: Path) -> None:
    asked = question(folder)
    subject = replace(asked.subject, published={"quant_method": "gptq", "bits": 3})
    with pytest.raises(CheckpointError, match="only the checkpoint's tensors tell"):
        subject.published_layout(subject.layers[0])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("64 cores", "no host memory"),
        ("512 GB", "no cores"),
        ("64 cores, 512 GB, a dog", "'a dog': not understood"),
        ("64 cores, 32 cores, 512 GB", "'32 cores': said twice"),
        ("64 cores, 512 GB, 24 GB gpu, no gpu", "'no gpu' and a gpu"),
        ("64 cores, 512 GB, 24 GB gpu, 0 GB/s link", "'0 GB/s link': expected more than 0"),
        ("64 cores, 512 GB, 300 TFLOPS", "'300 TFLOPS': of no gpu"),
        ("64 cores mmx, 512 GB", "got instruction set 'mmx', expected one of amx"),
    ],
)
def test_a_description_that_is_not_understood(text: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match="--machine: got ") as raised:
        described(text)
    assert complaint in str(raised.value)


def test_descriptions() -> None:
    machine = described(
        "2x64 cores amx, 1.5 TB, 24 GB GPU, 400 GB/s memory, 50 GB/s link, 300 TFLOPS"
    )
    assert (machine.threads, machine.isa, machine.host_free) == (128, "amx", 1_500_000_000_000)
    assert (machine.bandwidth, machine.measured) == (4e11, False)
    device = machine.device
    assert device is not None and (device.free, device.link) == (24_000_000_000, 5e10)
    assert device.rate == 300e12 * machines._REACHED
    plain = described("8 cores,64 GB ram")
    assert (plain.isa, plain.device, plain.bandwidth) == ("avx2", None, machines._DESKTOP)
    assert described("8 cores avx512_vnni, 64 GB").isa == "avx512_vnni"
    assert all(rates.keys() == {"exact", "int8", "bf16"} for rates in CORE_RATES.values())


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A model with weights, and a recipe."""
    make_model("qwen3_moe").save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [{"instruction": "a", "output": "b"}] * 70
    (tmp_path / "data" / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "data" / "lines.jsonl").write_text("{}\n" * 30 + "\n")
    info = {"rows": {"file_name": "rows.json"}, "lines": {"file_name": "lines.jsonl"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    recipe = {
        "model_name_or_path": str(tmp_path / "model"), "stage": "sft", "do_train": True,
        "finetuning_type": "lora", "dataset": "rows, lines", "dataset_dir": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "run"), "cutoff_len": 64, "per_device_train_batch_size": 2,
        "kt_sft": {"threads": 1},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    yield tmp_path


def test_a_recipe_on_this_machine(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tiny / "recipe.yaml")]) == 0
    out = capsys.readouterr().out
    for said in ("micro batches of 2 x 64 tokens, 1 a step", "free and measured now", "\nfits\n",
                 "an epoch of 100 samples", "routed experts"):  # fmt: skip
        assert said in out, said
    assert main(["plan", str(tiny / "recipe.yaml"), "do_train=false", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] == FITS and said["measured"] and said["tokens_per_second"] > 0
    assert "experts, backward" not in said["step_seconds"]


def test_disk_and_memory_nodes_are_said(
    folder: Path, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(golden_plans.folder_of("Qwen3-30B-A3B", folder))
    assert main(["plan", "--model", model, "--machine", SERVER]) == 0
    out = capsys.readouterr().out
    assert "  on each of 2 memory nodes about 14.5 GB of experts\n" in out
    assert "  and 29.1 GB of disk for the packed experts\n" in out
    monkeypatch.setenv("KT_SFT_STORE", str(tiny / "stores" / "of mine"))
    assert main(["plan", str(tiny / "recipe.yaml")]) == 0
    assert f"{tiny / 'stores' / 'of mine'} has" in capsys.readouterr().out
    monkeypatch.setattr(text, "free_bytes", lambda _: 1000)
    assert main(["plan", str(tiny / "recipe.yaml")]) == 0
    assert "set store: to another folder, or to memory" in capsys.readouterr().out
    assert main(["plan", str(tiny / "recipe.yaml"), "kt_sft.store=memory"]) == 0
    assert "disk" not in capsys.readouterr().out


def test_the_plan_counts_what_is_packed(tiny: Path) -> None:
    """Byte for byte, from the configuration alone."""
    recipe = yaml.safe_load((tiny / "recipe.yaml").read_text())
    for weights in ("int8", "int4", "bf16"):
        asked = question_of({**recipe, "kt_sft": {"weights": weights}}, None, SERVER)
        experts = next(c for c in asked.plan().components if c.name == "routed experts")
        packed = [
            ExpertWeights(own_layout(layer, weights)).nbytes for layer in asked.subject.layers
        ]
        assert experts.nbytes == sum(packed)


def test_what_cannot_be_planned(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert main(["plan", *words]) == 2
        return capsys.readouterr().err

    recipe = str(tiny / "recipe.yaml")
    assert "got neither a recipe nor --model" in refused()
    assert "got a recipe and --model" in refused(recipe, "--model", "x")
    assert "no config.json there" in refused("--model", str(tiny))
    assert "quantization_bit: got 3, expected 4 or 8" in refused(recipe, "quantization_bit=3")
    assert "finetuning_type: full" in refused(recipe, "finetuning_type=full")
    (tiny / "model" / "config.json").write_text("{")
    assert "malformed" in refused(recipe)


def test_a_name_of_the_hub_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "someone/no-such-model"]) == 2
    assert "is no folder here and cannot be read from the Hub" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({}, 100),
        ({"max_samples": 40}, 70),
        ({"dataset": ["rows"]}, 70),
        ({"dataset": "rows,elsewhere"}, None),
        ({"dataset_dir": "nowhere"}, None),
        ({"streaming": True}, None),
        ({"dataset": None}, None),
    ],
)
def test_samples_of_an_epoch(change: dict[str, Any], count: int | None, tiny: Path) -> None:
    recipe = yaml.safe_load((tiny / "recipe.yaml").read_text())
    assert samples_of({**recipe, **change}) == count


def part(asked: Question, name: str) -> int:
    return next((c.nbytes for c in asked.plan().components if c.name == name), 0)


def test_without_lora_on_experts_there_is_none(folder: Path) -> None:
    name = "expert LoRA and its optimizer"
    assert part(question(folder), name) > 6e9
    assert part(question(folder, kt_sft={"expert_lora": False}), name) == 0
    shared = part(question(folder, kt_sft={"expert_lora": "shared"}), name)
    assert shared == pytest.approx(part(question(folder), name) / 128, rel=1e-3)


def test_pairs_cost_twice_and_a_reference_once_more(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, pairs = ask(question(folder)), ask(question(folder, stage="dpo"))
    assert pairs.step.tokens == 2 * plain.step.tokens
    ratio = pairs.step.parts["experts, forward"] / plain.step.parts["experts, forward"]
    assert 3.5 < ratio < 4.5, "two answers, each through the base, too"
    alone = ask(question(folder, stage="dpo", pref_loss="orpo"))
    assert alone.step.parts["experts, forward"] < 0.6 * pairs.step.parts["experts, forward"]
    # An epoch of so many pairs takes as many steps as one of so many samples.
    epoch = [line for line in text.lines(pairs, 800) if "epoch" in line]
    steps = 800 / 8
    assert text._seconds(steps * pairs.step.seconds) in epoch[0]
    assert "(1 pairs)" in next(line for line in text.lines(pairs) if "micro batches" in line)


def test_an_accelerator_that_is_not_used(folder: Path) -> None:
    asked = question(folder, use_cpu=True)
    assert asked.machine.device is None
    forecast = ask(asked)
    assert "link" not in forecast.step.parts and forecast.plan.of("device") == 0
    assert not any("accelerator has room" in line for line in text.lines(forecast))


def test_eager_attention_takes_squares(folder: Path) -> None:
    name = "eager attention (estimate)"
    short, long = (
        part(question(folder, model="gpt-oss-120b", cutoff_len=n), name) for n in (1024, 4096)
    )
    assert long == 16 * short == 6 * 64 * 4096 * 4096 * 2
    assert part(question(folder, model="gpt-oss-120b", flash_attn="fa3"), name) == 0
    assert part(question(folder), name) == 0
    assert part(question(folder, flash_attn="disabled"), name) > 0


def test_a_prompt_is_read_once(folder: Path) -> None:
    forecast = ask(question(folder, do_train=False, gradient_accumulation_steps=8))
    assert forecast.step.tokens == 4096


def test_another_schedule_is_said(folder: Path) -> None:
    forecast = ask(question(folder, kt_sft={"schedule": "device"}))
    assert any("this is of schedule: host" in line for line in text.lines(forecast))


def test_embeddings_stay_where_the_recipe_needs_them(folder: Path) -> None:
    """Tied, trained or resized tables cannot be on the host."""
    small = "16 cores avx512_vnni, 64 GB, 3 GB gpu"

    def proposed(**recipe: Any) -> str:
        return str(list(map(str, ask(question(folder, small, **recipe)).changes)))

    assert "embeddings" not in proposed(additional_target="embed_tokens")
    assert "embeddings" not in proposed(resize_vocab=True)
    with pytest.raises(SettingsError, match="output head is the same table"):
        question_of(
            {**golden_plans.RECIPE, "model_name_or_path": str(_tied(folder)),
             "kt_sft": {"embeddings": "host"}},
            None,
            small,
        )  # fmt: skip


def _tied(folder: Path) -> Path:
    found = folder / "tied"
    found.mkdir(exist_ok=True)
    config = json.loads(
        (golden_plans.folder_of("Qwen3-30B-A3B", folder) / "config.json").read_text()
    )
    (found / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("cutoff_len=null", "cutoff_len: got None"),
        ("cutoff_len=2k", "cutoff_len: got '2k'"),
        ("per_device_train_batch_size=0", "per_device_train_batch_size: got 0"),
        ("lora_rank=null", "lora_rank: got None"),
        ("use_unsloth=true", "use_unsloth: True"),
        # What LLaMA-Factory would refuse.
        ("lora_rnak=8", "lora_rnak; did you mean lora_rank?"),
        ("stage=sfft", "stage: sfft; did you mean sft?"),
        ("template=qwen33", "template: qwen33; did you mean qwen3?"),
    ],
)
def test_recipes_that_are_refused(
    change: str, said: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tiny / "recipe.yaml"), change]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0 cores, 64 GB", "0x8 cores, 64 GB", "8 cores, 1.2.3 GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(SettingsError, match="--machine: got "):
        described(text)


def test_without_llamafactory_a_plan_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llamafactory.model.model_utils.visual", "llamafactory.extras.constants"):
        monkeypatch.setitem(sys.modules, name, None)
    assert ask(question(folder)).verdict == FITS
    assert template_of("Qwen/Qwen3-30B-A3B", "qwen3_moe") == "qwen3"


def test_json_and_explain_do_not_go_together(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tiny / "recipe.yaml"), "--json", "--explain"]) == 2
    assert "expected one of them" in capsys.readouterr().err


def test_a_plan_says_what_it_has_counted(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["plan", str(tiny / "recipe.yaml")]
    assert main(words) == 0
    assert "other layers counted" not in capsys.readouterr().out
    monkeypatch.setattr(forecasting, "measured_rest", lambda *_: None)
    assert main(words) == 0
    assert "other layers counted, not measured" in capsys.readouterr().out


@pytest.mark.parametrize("top_k", [3, 10, 16])
def test_any_number_of_experts_per_token_is_measured(top_k: int) -> None:
    """Also more of them than some of the cases have experts."""
    layout = WeightLayout(16, 64, 64, "int8")
    settings = HybridExpertsSettings(threads=1)
    for curve, fixed in measured_host(settings, layout, top_k, rank=2, adapted=("up_proj",)):
        assert fixed >= 0 and all(seconds >= 0 for seconds in curve.seconds)


def test_a_folder_that_is_not_there_is_no_name_of_the_hub() -> None:
    with pytest.raises(SettingsError, match="no such folder"):
        Subject.of("/no/such/folder")
