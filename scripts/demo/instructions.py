"""The demo's instruction data: questions about the standard library with the documented answers.

Writes LLaMA-Factory's alpaca format: `demo_train.json`, `demo_eval.json` (for the evaluation loss),
`demo_predict.json` (for generation) and the `dataset_info.json` that names them. The last two ask
only about objects whose documentation the base model never saw either.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from corpus import Entry, collect, is_held_out

logger = logging.getLogger(__name__)

EVAL_PAIRS = 64
PREDICT_PAIRS = 16

_MAX_WORDS = 90
_MIN_WORDS = 5
_MAX_SIGNATURE = 160
_SHINGLE_WORDS = 3
_MAX_SIMILARITY = 0.6
_QUESTIONS = {
    "module": "What is the `{}` module for?",
    "class": "What is `{}`?",
    "property": "What is `{}`?",
    "function": "What does `{}` do?",
}
_CALL_QUESTION = "How is `{}` called?"


@dataclass(frozen=True)
class Pair:
    """One alpaca-format example."""

    instruction: str
    output: str
    input: str = ""


def build_pairs(entries: Iterable[Entry]) -> dict[str, list[Pair]]:
    """Return the pairs of each object, by the object's name.

    Only public objects are asked about, and none whose answer repeats, nearly word for word, that
    of an object earlier in `entries`.
    """
    described = [
        (entry, answer)
        for entry in entries
        if entry.kind in _QUESTIONS
        and entry.is_public
        and not entry.name.endswith("__")
        and (answer := summarize(entry.text))
    ]
    repeated = _near_duplicates([answer for _, answer in described])
    pairs = {}
    for index, (entry, answer) in enumerate(described):
        if index not in repeated:
            pairs[entry.name] = [Pair(_QUESTIONS[entry.kind].format(entry.name), answer)]
            if entry.signature.strip("()") and len(entry.signature) <= _MAX_SIGNATURE:
                call = f"`{entry.name}{entry.signature}`"
                pairs[entry.name].append(Pair(_CALL_QUESTION.format(entry.name), call))
    return pairs


def summarize(text: str) -> str:
    """Return the prose that opens `text` as one line of at most 90 words; empty if there is none.

    Whole paragraphs are taken as long as they fit; of a first one that does not, whole sentences.
    """
    words: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        if not _is_prose(paragraph):
            break
        added = paragraph.split()
        if len(words) + len(added) > _MAX_WORDS:
            if not words:
                words = _whole_sentences(added)
            break
        words += added
    return " ".join(words) if len(words) >= _MIN_WORDS else ""


def split(entries: Iterable[Entry]) -> dict[str, list[Pair]]:
    """Return the pairs of the data sets `demo_train`, `demo_eval` and `demo_predict`.

    No object is in two of them. `demo_predict` asks one question about each of its objects.
    """
    entries = list(entries)
    pairs = build_pairs(entries)
    held_out = sorted(
        (entry.name for entry in entries if is_held_out(entry) and entry.name in pairs),
        key=lambda name: hashlib.sha256(f"order {name}".encode()).digest(),
    )
    predict = [pairs.pop(name)[0] for name in held_out[:PREDICT_PAIRS]]
    evaluate = [pair for name in held_out[PREDICT_PAIRS:] for pair in pairs.pop(name)]
    train = [pair for of_object in pairs.values() for pair in of_object]
    return {"demo_train": train, "demo_eval": evaluate[:EVAL_PAIRS], "demo_predict": predict}


def _is_prose(paragraph: str) -> bool:
    # Indented lines are code, tables or lists; a colon announces one.
    return not re.search(r"^(\s+\S|>>>|[-*+=~]|\.\. )|:\s*$|::", paragraph, re.MULTILINE)


def _whole_sentences(words: list[str]) -> list[str]:
    ends = [index for index, word in enumerate(words[:_MAX_WORDS], 1) if word.endswith(".")]
    return words[: ends[-1]] if ends else []


def _near_duplicates(answers: list[str]) -> set[int]:
    """Return the indices of answers whose word triples mostly occur in one kept earlier answer."""
    repeated: set[int] = set()
    kept_with: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes: dict[int, int] = {}
    for index, answer in enumerate(answers):
        shingles = set(_shingles(answer))
        shared = Counter(kept for shingle in shingles for kept in kept_with[shingle])
        if any(
            count / (len(shingles) + sizes[kept] - count) > _MAX_SIMILARITY
            for kept, count in shared.items()
        ):
            repeated.add(index)
            continue
        sizes[index] = len(shingles)
        for shingle in shingles:
            kept_with[shingle].append(index)
    return repeated


def _shingles(answer: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"[a-z]+", answer.lower())
    for start in range(max(1, len(words) - _SHINGLE_WORDS + 1)):
        yield tuple(words[start : start + _SHINGLE_WORDS])


def main() -> None:
    """Write the data sets to the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the data sets")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    datasets = split(collect())
    for name, pairs in datasets.items():
        text = json.dumps([asdict(pair) for pair in pairs], ensure_ascii=False, indent=1)
        (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    info = {name: {"file_name": f"{name}.json"} for name in datasets}
    (out / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    sizes = ", ".join(f"{name}: {len(pairs)} pairs" for name, pairs in datasets.items())
    logger.info("%s in %s", sizes, out)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
