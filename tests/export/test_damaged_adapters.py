"""Damaged and hostile adapters: typed errors that say what is wrong, and nothing else happens."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import opened, trained
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kt_sft.errors import AdapterMismatchError, CheckpointError, KtSftError, SettingsError
from kt_sft.export.adapter import Adapter
from kt_sft.export.adapter_file import AdapterFile
from kt_sft.export.command import export_adapter


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    trained(folder, "deepseek_v3")
    return folder


@pytest.fixture
def place(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "here")
    return tmp_path / "here"


def change_config(place: Path, **changes: Any) -> None:
    file = place / "adapter" / "adapter_config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps(config))


def change_tensors(place: Path, change: Callable[[dict], None]) -> None:
    file = place / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


_P = "base_model.model.model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"r": "8"}, CheckpointError, r"r: got '8', expected 1 to 65536"),
        ({"r": -1}, CheckpointError, r"r: got -1"),
        ({"r": True}, CheckpointError, r"r: got True"),
        ({"lora_alpha": "__import__('os')"}, CheckpointError, r"lora_alpha: got \"__import__"),
        ({"lora_alpha": float("nan")}, CheckpointError, r"lora_alpha: got nan"),
        ({"rank_pattern": {"q": "x"}}, CheckpointError, r"rank_pattern: q: got 'x'"),
        ({"alpha_pattern": [1]}, CheckpointError, r"alpha_pattern: got list, expected an object"),
        ({"target_modules": 7}, CheckpointError, r"target_modules: got '7', expected a list"),
        ({"target_parameters": "x"}, CheckpointError, r"target_parameters: got 'x'"),
        ({"peft_type": "IA3"}, SettingsError, r"only plain LoRA .* got peft_type IA3"),
        ({"use_dora": True}, SettingsError, r"use_dora True"),
        ({"bias": "all"}, SettingsError, r"bias all"),
        ({"lora_alpha": 0}, CheckpointError, r"lora_alpha: got 0, expected a number, not 0"),
        ({"lora_alpha": 10**400}, CheckpointError, r"lora_alpha: got 1000"),
        ({"alpha_pattern": {"(q": 4}}, CheckpointError, r"'\(q' is no pattern"),
        ({"rank_pattern": {r"((\w|\.)+)+!": 4}}, CheckpointError, r"is no pattern"),
        ({"alora_invocation_tokens": [1]}, SettingsError, r"alora_invocation_tokens: the kernels"),
        ({"layer_replication": [[0, 2]]}, SettingsError, r"layer_replication: is more than LoRA"),
        ({"init_lora_weights": "olora"}, SettingsError, r"'olora' replaced the base's weights"),
    ],
)
def test_settings(place: Path, changes: dict, error: type[KtSftError], message: str) -> None:
    change_config(place, **changes)
    with pytest.raises(error, match=message):
        opened(place)


def _drop(*keys: str) -> Callable[[dict], None]:
    return lambda tensors: [tensors.pop(key) for key in keys] and None


def _set(key: str, value: torch.Tensor) -> Callable[[dict], None]:
    return lambda tensors: tensors.__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_drop(f"{_P}.3.up_proj.lora_A.weight"), CheckpointError, "has lora_B only"),
        (
            _drop(f"{_P}.3.up_proj.lora_A.weight", f"{_P}.3.up_proj.lora_B.weight"),
            AdapterMismatchError, "got 7 experts, expected 8",
        ),
        (
            _set(f"{_P}.0.up_proj.lora_A.weight", torch.zeros(4, 65)),
            AdapterMismatchError, r"the adapter is for a weight of \(72, 65\), the base has",
        ),
        (
            _set(f"{_P}.0.up_proj.lora_A.weight", torch.zeros(5, 64)),
            AdapterMismatchError, r"lora_A \(5, 64\) and lora_B \(72, 4\) do not belong together",
        ),
        (
            _set(f"{_P}.0.up_proj.lora_A.weight", torch.zeros(4, 64, dtype=torch.int8)),
            CheckpointError, "got I8, expected one of F64",
        ),
        (
            _set("base_model.model.transformer.h.0.attn.lora_A.weight", torch.zeros(4, 64)),
            CheckpointError, r"transformer\.h\.0\.attn has lora_A only",
        ),
        (
            _set("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 300)),
            SettingsError, "LoRA of embeddings, which kt_sft does not read; merge",
        ),
        (
            _set("base_model.model.model.layers.99.lm.weight", torch.zeros(4)),
            AdapterMismatchError, r"layers\.99\.lm\.weight: the base has no such parameter",
        ),
        (
            _set("base_model.model.../../../etc/passwd.weight", torch.zeros(4)),
            AdapterMismatchError, "the base has no such parameter",
        ),
    ],
)  # fmt: skip
def test_tensors(place: Path, change: Callable, error: type[KtSftError], message: str) -> None:
    change_tensors(place, change)
    with pytest.raises(error, match=message):
        opened(place)


def test_an_adapter_of_another_family(good: Path, tmp_path: Path) -> None:
    trained(tmp_path, "mixtral")
    with pytest.raises(AdapterMismatchError, match="has no such module") as caught:
        Adapter(tmp_path / "adapter", opened(good).base)
    assert "and " in str(caught.value) and "more\nGive the base that" in str(caught.value)


def test_cut_files(place: Path) -> None:
    file = place / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
            opened(place)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors there"):
        opened(place)


def test_pickles_are_never_read(place: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path(place / "ran").write_text, ("x",))

    adapter = place / "adapter"
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"a pickle, adapter_model\.bin, could run code"):
        opened(place)
    assert not (place / "ran").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "{" * 20000, '{"r": 1e400}'])
def test_settings_that_are_none(place: Path, text: str) -> None:
    (place / "adapter" / "adapter_config.json").write_text(text)
    with pytest.raises(KtSftError):
        AdapterFile(place / "adapter")


def test_a_base_that_is_not_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("../../nowhere", "some/model-that-is-not", "a/b/c/d", ""):
        change_config(place, base_model_name_or_path=name)
        with pytest.raises(SettingsError, match="--base: "):
            export_adapter(place / "adapter", "vllm", place / "out")
    with pytest.raises(CheckpointError, match=r"no config\.json there"):
        export_adapter(place / "adapter", "vllm", place / "out", base=str(place))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_flipped_bytes_are_read_or_refused(good: Path, data: st.DataObject) -> None:
    """Headers and settings with any bytes changed: our errors, or an adapter that fits."""
    copy = good.parent / "flipped"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(good / "adapter", copy)
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    raw = bytearray((copy / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, min(len(raw), 3000) - 1))] = data.draw(st.integers(0, 255))
    (copy / name).write_bytes(raw)
    try:
        adapter = Adapter(copy, _base(good))
        adapter.ranks()
    except KtSftError:
        pass


_BASES: dict[Path, Any] = {}


def _base(folder: Path) -> Any:
    if folder not in _BASES:
        _BASES[folder] = opened(folder).base
    return _BASES[folder]
