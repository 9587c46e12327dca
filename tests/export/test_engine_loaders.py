"""What vLLM and SGLang make of exported adapters: their own reading code, no engine and no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_cases import PROJECTIONS, trained

from kt_sft.export.adapter import Adapter
from kt_sft.export.writing import write_adapter

pytestmark = pytest.mark.slow

_RUN = Path(__file__).with_name("engine_loaders.py")
# What each imports on the way to its reading code, besides what we have installed.
_PACKAGES = {
    "vllm": (
        "vllm", "cbor2", "pyzmq", "openai_harmony", "openai", "httpx2", "httpcore2", "truststore",
        "pybase64", "cachetools", "msgspec", "uvloop", "prometheus-client", "xgrammar",
        "apache-tvm-ffi", "partial_json_parser", "llguidance",
    ),
    "sglang": (
        "sglang", "pybase64", "msgspec", "pyzmq", "ipython", "traitlets", "apache-tvm-ffi",
        "compressed-tensors", "loguru",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Each in a folder of its own."""
    folder = tmp_path_factory.mktemp("engines")
    for name, packages in _PACKAGES.items():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*install, "--target", str(folder / name), *packages], check=True)
    return {name: str(folder / name) for name in _PACKAGES}


def read(engines: dict[str, str], name: str, folder: Path, *arguments: str) -> dict:
    out = folder.with_suffix(".pt")
    done = subprocess.run(
        [sys.executable, str(_RUN), name, str(folder), str(out), *arguments],
        env={**os.environ, "PYTHONPATH": engines[name], "KT_SFT_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


def expected(adapter: Adapter, layer: str, projection: str, expert: int) -> torch.Tensor:
    lora = adapter.experts(layer, projection).of(expert)
    return lora.scaling * lora.b @ lora.a


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe"])
def test_vllm_reads_experts_one_by_one(
    family: str, engines: dict[str, str], tmp_path: Path
) -> None:
    adapter = trained(tmp_path, family, use_rslora=True)
    write_adapter(adapter, "vllm", tmp_path / "out")
    of_experts = ("w1", "w3", "w2") if family == "mixtral" else PROJECTIONS
    experts = next(iter(adapter.base.layers.values())).shape.experts
    names = [f"experts.{e}.{n}" for e in range(experts) for n in of_experts]
    names += ["experts", *{m.rpartition(".")[2] for m in adapter.linear_modules}]
    found = read(engines, "vllm", tmp_path / "out", json.dumps(names), "0")
    seen = 0
    for layer in adapter.expert_layers:
        for name, projection in zip(of_experts, PROJECTIONS, strict=True):
            for expert in range(experts):
                module = adapter.base.published_expert(layer, projection, expert)
                a, b, scaling = found[module]
                want = expected(adapter, layer, projection, expert)
                torch.testing.assert_close(scaling * b @ a, want, rtol=1e-5, atol=1e-6)
                seen += module.endswith(name)
    assert seen == len(adapter.expert_layers) * 3 * experts
    for module in adapter.linear_modules:
        a, b, scaling = found[module]
        lora = adapter.linear(module)
        torch.testing.assert_close(
            scaling * b @ a, lora.scaling * lora.b @ lora.a, rtol=1e-5, atol=1e-6
        )
    assert len(found) == seen + len(adapter.linear_modules)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_5_moe_text", "qwen3_vl_moe"])
def test_vllm_stacks_fused_experts(family: str, engines: dict[str, str], tmp_path: Path) -> None:
    adapter = trained(tmp_path, family)
    write_adapter(adapter, "vllm", tmp_path / "out")
    experts = next(iter(adapter.base.layers.values())).shape.experts
    names = ["experts", *{m.rpartition(".")[2] for m in adapter.linear_modules}]
    found = read(engines, "vllm", tmp_path / "out", json.dumps(names), str(experts))
    for layer in adapter.expert_layers:
        (gate_up_a, down_a), (gate_up_b, down_b), scaling = found[layer]
        for expert in range(experts):
            down = scaling * down_b[expert] @ down_a[expert]
            want = expected(adapter, layer, "down_proj", expert)
            torch.testing.assert_close(down, want, rtol=1e-5, atol=1e-6)
            both = scaling * gate_up_b[expert] @ gate_up_a[expert]
            halves = both.chunk(2) if family != "gpt_oss" else (both[::2], both[1::2])
            for half, projection in zip(halves, ("gate_proj", "up_proj"), strict=True):
                want = expected(adapter, layer, projection, expert)
                torch.testing.assert_close(half, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_sglang_reads_every_expert(family: str, engines: dict[str, str], tmp_path: Path) -> None:
    """q, k and v come together, with zeros where they were not trained."""
    adapter = trained(tmp_path, family, use_rslora=True)
    write_adapter(adapter, "sglang", tmp_path / "out")
    found = read(engines, "sglang", tmp_path / "out", str(tmp_path / "base"))
    weights, scaling = found["weights"], found["scaling"]
    prefix = "base_model.model."
    for layer in adapter.expert_layers:
        for expert in range(adapter.base.layers[layer].shape.experts):
            path = f"{prefix}{layer}.{expert}"
            a, b = (weights[f"{path}.gate_up_proj.lora_{f}.weight"] for f in "AB")
            rank = a.shape[0] // 2
            for part, projection in ((0, "gate_proj"), (1, "up_proj")):
                rows = slice(part * b.shape[0] // 2, (part + 1) * b.shape[0] // 2)
                got = scaling * b[rows] @ a[part * rank : (part + 1) * rank]
                want = expected(adapter, layer, projection, expert)
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            a, b = (weights[f"{path}.down_proj.lora_{f}.weight"] for f in "AB")
            want = expected(adapter, layer, "down_proj", expert)
            torch.testing.assert_close(scaling * b @ a, want, rtol=1e-5, atol=1e-6)
    if family != "deepseek_v3":
        q = adapter.linear(next(m for m in adapter.linear_modules if m.endswith("q_proj")))
        name = next(k for k in weights if k.endswith("qkv_proj.lora_A.weight"))
        a, b = weights[name], weights[name.replace("lora_A", "lora_B")]
        rank = a.shape[0] // 3
        got = scaling * b[: q.b.shape[0]] @ a[:rank]
        torch.testing.assert_close(got, q.scaling * q.b @ q.a, rtol=1e-5, atol=1e-6)
        assert not b[q.b.shape[0] :].any()
