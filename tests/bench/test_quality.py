"""`kt-sft errors`: errors of the weights by layer, and the loss on text of every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantized_checkpoints import QUANTIZED_FORMATS
from tiny_models import make_model, make_tokenizer, stock_experts
from torch import nn
from transformers import AutoModelForCausalLM

from kt_sft.bench import quality
from kt_sft.cli.main import main
from kt_sft.errors import SettingsError

TEXT = "the quick brown fox jumps over the lazy dog, and the lazy dog sleeps on. " * 12
CONTEXT = 48


def tiny(sign: float = 1.0) -> nn.Module:
    """A Qwen3-MoE, one of whose experts has its down projection times `sign`."""
    model = make_model("qwen3_moe", moe_intermediate_size=96)
    with torch.no_grad():
        for layer in stock_experts(model).values():
            layer.down_proj.mul_(2)
            layer.down_proj[1].mul_(sign)
    # Values that bf16 holds, computed in fp32: bf16 rounds otherwise on each kind of processor.
    return model.bfloat16().float()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality") / "model"
    tiny().save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(model: Path) -> Path:
    file = model.parent / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def run(model: Path, text: Path, tmp_path: Path) -> Callable[..., dict[tuple[str, str], dict]]:
    """Runs the command on a folder, and returns its JSON rows by format and compute mode."""

    def command(*options: str, folder: Path = model) -> dict[tuple[str, str], dict]:
        out = tmp_path / "quality.json"
        small = ["--tokens", "192", "--context", str(CONTEXT)]
        arguments = ["errors", str(folder), "--text", str(text), *small, "--out", str(out)]
        assert main([*arguments, *options]) == 0
        document = json.loads(out.read_text())
        assert document["machine"] and document["measured"]
        return {(row["weights"], row["compute"]): row for row in document["rows"]}

    return command


def test_by_layer(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "errors.json"
    assert main(["errors", str(model), "--out", str(out)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "experts |" in line]
    assert len(lines) == 3
    for line in lines:
        bf16, int8, int4_g32, int4_g128, kept = map(float, line.split("|")[2:-1])
        assert kept == bf16 == 0 < int8 < 1 < int4_g32 < int4_g128 < 13
    saved = json.loads(out.read_text())["weight_errors"]
    assert saved["bf16"] and 0.02 < min(saved["int4_g32"].values()) < 0.13


def test_the_reference_is_the_stock_models_loss(
    model: Path, text: Path, run: Callable[..., dict]
) -> None:
    rows = run("--weights", "bf16")
    assert list(rows) == [("bf16", "bf16")]
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    windows = quality.windows_of(model, text.read_text(), 192, CONTEXT)
    assert windows.shape == (4, CONTEXT)
    with torch.no_grad():
        losses = [float(stock(w[None], labels=w[None]).loss) for w in windows]
    row = rows["bf16", "bf16"]
    assert row["loss"] == pytest.approx(sum(losses) / len(losses), abs=5e-3)
    assert row["weight_error"] == 0 and row["excess"] is None
    assert row["bytes_per_weight"] == pytest.approx(2, rel=0.4)  # tiles are padded
    assert row["tokens_per_second"] > 0


def test_formats_cost_as_much_as_they_err(
    run: Callable[..., dict], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run()
    printed = capsys.readouterr().out
    assert list(rows) == [
        ("bf16", "bf16"), ("int8", "exact"), ("int8", "int8"), ("int4_g32", "exact"),
        ("int4_g32", "int8"), ("int4_g128", "exact"), ("int4_g128", "int8"),
    ]  # fmt: skip
    for (weights, compute), row in rows.items():
        assert f"| {weights} | {compute} |" in printed
        if weights != "bf16":
            assert row["loss"] - rows["bf16", "bf16"]["loss"] == pytest.approx(row["excess"])
            assert row["excess_error"] > 0
    agreement = [rows[w, "exact"]["same_choice"] for w in ("int8", "int4_g32")]
    assert 0.9 < agreement[0] <= 1 and agreement[1] < agreement[0]
    # What rounding does to a loss has no sign; its size grows with the error of the weights.
    spread = {w: rows[w, "exact"]["excess_error"] for w in ("int8", "int4_g32", "int4_g128")}
    assert 1.5 * spread["int8"] < min(spread["int4_g32"], spread["int4_g128"])
    errors = [rows[w, "exact"]["weight_error"] for w in spread]
    assert errors == sorted(errors)
    assert rows["int8", "int8"]["loss"] != rows["int8", "exact"]["loss"]
    sizes = [rows[w, "exact"]["bytes_per_weight"] for w in ("int8", "int4_g32", "int4_g128")]
    assert sizes == sorted(sizes, reverse=True)


def test_a_quantized_copy_is_compared_with_its_origin(
    model: Path, run: Callable[..., dict], tmp_path: Path
) -> None:
    copy = tmp_path / "int4"
    QUANTIZED_FORMATS["int4_packed"].write(model, copy)
    alone = run("--weights", "checkpoint", folder=copy)["checkpoint", "bf16"]
    # Kept codes are multiplied once more by nothing but the rounding of their products to bf16.
    assert alone["weight_error"] < 2e-3 and alone["excess"] == pytest.approx(0, abs=1e-6)
    rows = run("--weights", "checkpoint", "bf16", "--against", str(model), folder=copy)
    assert list(rows) == [("checkpoint", "bf16"), ("bf16", "bf16")]
    for row in rows.values():
        assert 0.05 < row["weight_error"] < 0.15 and abs(row["excess"]) > 0
    kept = rows["checkpoint", "bf16"]
    assert kept["loss"] == pytest.approx(rows["bf16", "bf16"]["loss"], abs=5e-3)
    assert kept["bytes_per_weight"] < 0.5 * rows["bf16", "bf16"]["bytes_per_weight"]


def test_a_wrong_expert_is_seen(model: Path, run: Callable[..., dict], tmp_path: Path) -> None:
    """The measurement itself: one expert's sign turned in a copy."""
    wrong = tmp_path / "wrong"
    tiny(sign=-1.0).save_pretrained(wrong)
    make_tokenizer(wrong)
    row = run("--weights", "int8", "--against", str(model), folder=wrong)["int8", "exact"]
    clean = run("--weights", "int8")["int8", "exact"]
    assert row["weight_error"] > 0.2 > clean["weight_error"]
    assert row["excess_error"] > 3 * clean["excess_error"]
    assert row["same_choice"] < clean["same_choice"]


def test_a_reference_that_does_not_fit_leaves_its_columns_empty(
    run: Callable[..., dict], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    readings = quality._readings

    def too_large(folder, windows_WT, weights, store):
        if weights == "bf16":
            raise SettingsError("too large")
        return readings(folder, windows_WT, weights, store)

    monkeypatch.setattr(quality, "_readings", too_large)
    rows = run("--weights", "bf16", "int8")
    assert list(rows) == [("int8", "exact"), ("int8", "int8")]
    assert rows["int8", "exact"]["excess"] is None and rows["int8", "exact"]["loss"] > 0
    assert "is not measured: too large" in caplog.text


def test_windows(model: Path) -> None:
    ids = quality.windows_of(model, TEXT, 10**6, 10**6)
    assert ids.shape[0] == 1  # a short text is one window
    ids = ids[0]
    spread = quality.windows_of(model, TEXT, 30, 10)
    assert spread.shape == (3, 10)
    assert torch.equal(spread[0], ids[:10])
    third = 10 * (2 * (len(ids) // 10) // 3)
    assert torch.equal(spread[2], ids[third : third + 10])


def test_bos_begins_every_window(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = quality.AutoTokenizer.from_pretrained(model)

    def with_bos(text, **options):
        found = stock(text, **options)
        begin = torch.tensor([[7]])
        return replace_ids(found, torch.cat([begin, found.input_ids], 1))

    def replace_ids(found, ids):
        found["input_ids"] = ids
        return found

    tokenizer = type("Tokenizer", (), {"__call__": staticmethod(with_bos), "bos_token_id": 7})()
    monkeypatch.setattr(quality.AutoTokenizer, "from_pretrained", lambda _: tokenizer)
    windows = quality.windows_of(model, TEXT, 30, 10)
    assert windows.shape == (3, 10) and (windows[:, 0] == 7).all()
    plain = stock(TEXT, return_tensors="pt").input_ids[0]
    assert torch.equal(windows[0, 1:], plain[:9])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "1"], "expected a context of at least 2"),
        (["--tokens", "10", "--context", "20"], "as many tokens as one context"),
        (["--experts", "0"], "--experts: got 0"),
        (["--text", "no/such.txt"], "no/such.txt cannot be read as text"),
    ],
)
def test_wrong_options(
    model: Path, text: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["errors", str(model), "--text", str(text), *options]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_text_and_no_tokenizer(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text"
    for content, message in (
        (b"\xff\xfe\x00", "cannot be read as text"),
        (b"", "0 tokens of 0 characters"),
    ):
        file.write_bytes(content)
        assert main(["errors", str(model), "--text", str(file)]) == 2
        assert message in capsys.readouterr().err
    tiny().save_pretrained(tmp_path / "bare")
    file.write_text(TEXT)
    assert main(["errors", str(tmp_path / "bare"), "--text", str(file)]) == 2
    assert "or a folder with a tokenizer" in capsys.readouterr().err


def test_a_line_of_the_table() -> None:
    row = quality.FormatQuality("int8", "exact", 1.003, 0.0085, 2.5, 0.01, 0.002, 0.97, 1234.5)
    assert quality.table_line(row) == (
        "| int8 | exact | 1.003 | 0.85% | 2.5000 | +0.0100 ± 0.0020 | 97.0% | 1,234 |\n"
    )
    unknown = replace(row, excess=None, excess_error=None, same_choice=None)
    assert "| 2.5000 |  |  | 1,234 |" in quality.table_line(unknown)
    assert quality.table_head().count("|") == 2 * quality.table_line(row).count("|")


def test_what_a_format_cannot_keep_leaves_the_other_rows(
    model: Path, run: Callable[..., dict], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "act_order"
    QUANTIZED_FORMATS["gptq_desc_act"].write(model, copy, group_size=32)
    rows = run("--weights", "checkpoint", "int8", "--against", str(model), folder=copy)
    assert list(rows) == [("int8", "exact"), ("int8", "int8")]
    assert "checkpoint is not measured: weights: checkpoint cannot keep" in caplog.text


def test_another_model_is_no_origin(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model("qwen3_moe", moe_intermediate_size=72)
    other.save_pretrained(tmp_path / "other")
    for options in (["--text", str(text)], []):
        against = ["--against", str(tmp_path / "other")]
        assert main(["errors", str(model), *options, *against]) == 2
        assert "has other experts or another vocabulary" in capsys.readouterr().err


def test_nothing_to_measure(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--tokens", "96", "--context", "48"]
    arguments = ["errors", str(model), "--text", str(text), "--weights", "checkpoint", *small]
    assert main(arguments) == 2  # it is no quantized one
    assert "nothing was measured" in capsys.readouterr().err
