"""The demo's task: a call goes in, a reference card in JSON comes out.

    Describe `textwrap.shorten(text, width, **kwargs)`.

    {"module": "textwrap", "function": "shorten", "parameters": ["text", "width", "**kwargs"],
     "summary": "Collapse and truncate the given text to fit in the given width."}

The base model never answers in this form, so that right cards can be counted: module, function and
parameters are in the question, and an exact answer repeats them. The summary is not; it is compared
with the documented one by ROUGE-L.

Writes LLaMA-Factory's alpaca format: `demo_train.json`, `demo_eval.json` (for the evaluation loss),
`demo_predict.json` (for the cards), the `dataset_info.json` that names them, and
`language_reference.txt`, a text to measure losses on. No function is in two of them.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from functions import Function, documented_functions, language_reference
from rouge_chinese import Rouge

EVAL_CARDS = 32
PREDICT_CARDS = 32

_SUMMARY_WORDS = range(4, 26)
_MAX_SIGNATURE = 80
_EXACT = ("module", "function", "parameters")


@dataclass(frozen=True)
class Score:
    """How one answer compares with the documented card."""

    exact: bool
    """It is a JSON object whose module, function and parameters are right."""
    rouge_l: float
    """ROUGE-L F of its summary, or of the whole answer where it is no card; 0 to 1."""


def cards(functions: Iterable[Function]) -> list[dict[str, str]]:
    """One alpaca-format example for each function that has a short summary and signature."""
    examples = []
    for function in functions:
        summary, parameters = first_sentence(function.text), parameter_names(function.signature)
        if not summary or parameters is None or len(function.signature) > _MAX_SIGNATURE:
            continue
        module = "" if function.module == "builtins" else f"{function.module}."
        card = {
            "module": function.module,
            "function": function.name,
            "parameters": parameters,
            "summary": summary,
        }
        examples.append(
            {
                "instruction": f"Describe `{module}{function.name}{function.signature}`.",
                "input": "",
                "output": json.dumps(card, ensure_ascii=False),
            }
        )
    return examples


def first_sentence(text: str) -> str:
    """The sentence that opens `text`, on one line; empty where no prose of fit length does."""
    paragraph = re.split(r"\n\s*\n", text)[0]
    # Indented lines are code, tables or lists; a colon announces one.
    if re.search(r"^(\s+\S|>>>|[-*+=~]|\.\. )|:\s*$|::|\(.*\) ->", paragraph, re.MULTILINE):
        return ""
    sentence = re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(paragraph.split()))[0]
    return sentence if len(sentence.split()) in _SUMMARY_WORDS else ""


def parameter_names(signature: str) -> list[str] | None:
    """The names in `(src, /, *args, key=None)`, stars included; None where it is not Python."""
    try:
        parameters = ast.parse(f"def _{signature}: ...").body[0].args  # type: ignore[attr-defined]
    except SyntaxError:
        return None
    names = [a.arg for a in (*parameters.posonlyargs, *parameters.args)]
    if parameters.vararg:
        names.append(f"*{parameters.vararg.arg}")
    names += [a.arg for a in parameters.kwonlyargs]
    return names + ([f"**{parameters.kwarg.arg}"] if parameters.kwarg else [])


def score(answer: str, documented: str) -> Score:
    """Compares an answer with the documented card (JSON)."""
    want, got = json.loads(documented), _object(answer)
    summary = str(got.get("summary", "")) if got else answer
    return Score(
        exact=all(got.get(name) == want[name] for name in _EXACT),
        rouge_l=_rouge_l(summary, want["summary"]),
    )


def _object(answer: str) -> dict[str, object]:
    try:
        found = json.loads(answer)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _rouge_l(answer: str, documented: str) -> float:
    words = [" ".join(re.findall(r"\w+", text.lower())) for text in (answer, documented)]
    if not all(words):
        return 0.0
    return float(Rouge(metrics=["rouge-l"]).get_scores(*words)[0]["rouge-l"]["f"])


def split(examples: Sequence[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """The data sets: an order that depends on nothing but each question, and three parts of it."""
    order = sorted(examples, key=lambda e: hashlib.sha256(e["instruction"].encode()).digest())
    held_out = PREDICT_CARDS + EVAL_CARDS
    return {
        "demo_predict": order[:PREDICT_CARDS],
        "demo_eval": order[PREDICT_CARDS:held_out],
        "demo_train": order[held_out:],
    }


def main() -> None:
    """Writes the data sets to the folder that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the data sets")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    datasets = split(cards(documented_functions()))
    for name, examples in datasets.items():
        text = json.dumps(examples, ensure_ascii=False, indent=1)
        (out / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")
    info = {name: {"file_name": f"{name}.json"} for name in datasets}
    (out / "dataset_info.json").write_text(f"{json.dumps(info, indent=2)}\n", encoding="utf-8")
    (out / "language_reference.txt").write_text(language_reference(), encoding="utf-8")
    sizes = ", ".join(f"{name}: {len(examples)}" for name, examples in datasets.items())
    print(f"{out}: {sizes} reference cards")


if __name__ == "__main__":
    main()
