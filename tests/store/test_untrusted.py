"""Attacks kept as tests: whatever a checkpoint says of itself, it loads or a typed error names it.

In bounded time and memory; what is read is never wrong without a word.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized_checkpoints import QUANTIZED_FORMATS
from safetensors.torch import load_file, save_file
from tiny_configs import TINY_FAMILIES
from tiny_models import make_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kt_sft import HybridExpertsConfig
from kt_sft.checkpoint.folder import checkpoint_experts
from kt_sft.errors import CheckpointError, KtSftError, UnsupportedModelError
from kt_sft.kernels import CodedMatrix
from kt_sft.machine.memory import peak_memory_bytes

_SECONDS = 20
_BYTES = 1 << 30
TYPED = (CheckpointError, UnsupportedModelError)


@contextmanager
def bounded() -> Iterator[None]:
    """Fails where the inside takes longer, or more memory, than any tiny checkpoint may."""

    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"still running after {_SECONDS} seconds")

    former = signal.signal(signal.SIGALRM, late)
    signal.alarm(_SECONDS)
    before = peak_memory_bytes()
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
    assert peak_memory_bytes() - before < _BYTES


def read_all(folder: Path) -> list[Tensor]:
    """Every expert of a checkpoint, in floats, as packing reads them."""
    found = checkpoint_experts(folder)
    matrices = []
    for layer in found.layers:
        source = found.sources[layer.hybrid_path]
        for expert in range(layer.shape.experts):
            for projection in layer.shape.projections:
                matrix = source.read(expert, projection)
                assert tuple(matrix.shape) == layer.shape.of(projection)
                coded = isinstance(matrix, CodedMatrix)
                matrices.append(matrix.dequantize() if coded else matrix.float())
    return matrices


def load(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=HybridExpertsConfig(store="memory"), dtype=torch.float32
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain checkpoint and one of each quantized kind."""
    root = tmp_path_factory.mktemp("bases")
    plain = root / "plain"
    # Widths that all formats have whole groups for.
    sizes = {"moe_intermediate_size": 128, "intermediate_size": 128, "hidden_size": 128,
             "head_dim": 32, "num_key_value_heads": 4}  # fmt: skip
    make_model("qwen3_moe", **sizes, num_hidden_layers=2).save_pretrained(plain)
    made = {"plain": plain}
    for name in ("fp8_block", "int4_packed", "gptq", "awq"):
        made[name] = root / name
        QUANTIZED_FORMATS[name].write(plain, made[name])
    gpt_oss = root / "gpt_oss"
    oss = TINY_FAMILIES["gpt_oss"]
    widths = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    config = AutoConfig.for_model(oss.model_type, **{**oss.config, **widths})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(gpt_oss)
    made["mxfp4"] = root / "mxfp4"
    QUANTIZED_FORMATS["mxfp4"].write(gpt_oss, made["mxfp4"])
    return made


def copy(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder / "model", dirs_exist_ok=True)
    return folder / "model"


def with_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    changed = change(config)
    file.write_text(json.dumps(config if changed is None else changed))
    return folder


def with_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, file, metadata={"format": "pt"})
    return folder


TEXTS = {
    "empty": "",
    "a list": "[]",
    "a number": "3",
    "binary": "\x00\x01\x02",
    "cut": '{"model_type": "qwen3_moe", ',
    "nested": '{"a":' * 100_000,
    "a number of 5,000 digits": '{"num_hidden_layers": ' + "9" * 5000 + "}",
    "no model": "{}",
    "an unknown model": '{"model_type": "nobody_knows", "architectures": ["Nobody"]}',
}
# A setting of the configuration, and a value that does not go with the weights or with anything.
SETTINGS: tuple[tuple[str, Any], ...] = (
    ("num_hidden_layers", 1_000_000),
    ("num_hidden_layers", 4096),
    ("num_hidden_layers", -1),
    ("num_hidden_layers", "2"),
    ("num_hidden_layers", [2]),
    ("num_local_experts", 1_000_000_000),
    ("num_local_experts", 65_536),
    ("num_local_experts", 0),
    ("num_local_experts", -8),
    ("num_local_experts", 7),
    ("num_local_experts", "8"),
    ("hidden_size", 1 << 40),
    ("hidden_size", 0),
    ("hidden_size", 64),
    ("hidden_size", "128"),
    ("moe_intermediate_size", 0),
    ("moe_intermediate_size", [72]),
    ("moe_intermediate_size", 1 << 30),
    ("architectures", []),
    ("architectures", [3]),
    ("architectures", "Qwen3MoeForCausalLM"),
    ("architectures", ["BertTokenizer"]),
    ("architectures", ["os"]),
    ("hidden_act", "tanh"),
    ("hidden_act", "no such thing"),
    ("hidden_act", ["silu"]),
    ("quantization_config", []),
    ("quantization_config", "fp8"),
    ("quantization_config", 8),
    ("quantization_config", {"quant_method": "of tomorrow"}),
    ("quantization_config", {"quant_method": ["fp8"]}),
)


@pytest.mark.parametrize("name", TEXTS)
def test_configurations_that_are_none(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = copy(bases["plain"], tmp_path)
    (folder / "config.json").write_text(TEXTS[name])
    with bounded(), pytest.raises(TYPED, match=r"config\.json|architecture"):
        read_all(folder)


@pytest.mark.parametrize(("name", "value"), SETTINGS, ids=str)
def test_settings_that_do_not_fit(
    bases: dict[str, Path], tmp_path: Path, name: str, value: Any
) -> None:
    folder = with_config(copy(bases["plain"], tmp_path), lambda c: c.update({name: value}))
    with bounded(), pytest.raises(TYPED):
        read_all(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_hidden_layers", 1_000_000), ("num_local_experts", 1_000_000_000), ("vocab_size", -3)],
)
def test_absurd_sizes_are_refused_before_anything_is_built(
    bases: dict[str, Path], tmp_path: Path, name: str, value: int
) -> None:
    folder = with_config(copy(bases["plain"], tmp_path), lambda c: c.update({name: value}))
    with bounded(), pytest.raises(KtSftError, match=f"got {value}"):
        load(folder)


INDICES = {
    "a list": "[]",
    "no map": "{}",
    "a map of numbers": '{"weight_map": {"a": 3}}',
    "a map of lists": '{"weight_map": {"a": ["x"]}}',
    "outside": '{"weight_map": {"a": "../x.safetensors"}}',
    "absolute": '{"weight_map": {"a": "/etc/passwd"}}',
    "NUL": '{"weight_map": {"a": "x\\u0000.safetensors"}}',
    "a folder": '{"weight_map": {"a": "sub"}}',
    "a long name": json.dumps({"weight_map": {"a": "x" * 5000}}),
    "empty": '{"weight_map": {}}',
    "nested": '{"weight_map":' * 50_000,
}


@pytest.mark.parametrize("name", INDICES)
def test_indices(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = copy(bases["plain"], tmp_path)
    (folder / "sub").mkdir()
    # Beside a model.safetensors an index is passed over.
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    (folder / "model.safetensors.index.json").write_text(INDICES[name])
    with bounded(), pytest.raises(CheckpointError, match="index"):
        read_all(folder)


@pytest.mark.parametrize("at", [0, 7, 8, 100, 0.5, -1])
def test_shards_that_are_cut(bases: dict[str, Path], tmp_path: Path, at: float) -> None:
    folder = copy(bases["plain"], tmp_path)
    file = folder / "model.safetensors"
    size = file.stat().st_size
    data = file.read_bytes()
    file.write_bytes(data[: int(at * size) if isinstance(at, float) else at % size])
    with bounded(), pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_all(folder)


def first(tensors: dict[str, Tensor], suffix: str) -> str:
    return next(k for k in sorted(tensors) if ".experts" in k and k.endswith(suffix))


# format, suffix of a tensor of the first expert, what becomes of it
DAMAGE: tuple[tuple[str, str, str], ...] = tuple(
    (form, suffix, change)
    for form, suffixes in (
        ("fp8_block", (".weight", ".weight_scale_inv")),
        ("int4_packed", (".weight_packed", ".weight_scale", ".weight_shape")),
        ("gptq", (".qweight", ".qzeros", ".scales", ".g_idx")),
        ("awq", (".qweight", ".qzeros", ".scales")),
        ("mxfp4", ("_blocks", "_scales")),
    )
    for suffix in suffixes
    for change in ("gone", "empty", "flat", "longer", "scalar", "of bytes", "huge values")
)


def damaged(tensor: Tensor, change: str) -> Tensor:
    if change == "empty":
        return tensor.new_empty(0, *tensor.shape[1:])
    if change == "flat":
        return tensor.flatten()
    if change == "longer":
        return torch.cat([tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor] * 2)
    if change == "scalar":
        return tensor.flatten()[0].clone()
    if change == "of bytes":
        return torch.zeros(tensor.shape, dtype=torch.uint8)
    if tensor.is_floating_point():
        return torch.full(tensor.shape, float("nan")).to(tensor.dtype)
    return torch.full_like(tensor, torch.iinfo(tensor.dtype).max)


@pytest.mark.parametrize(("form", "suffix", "change"), DAMAGE, ids=str)
def test_quantized_tensors_that_do_not_fit(
    bases: dict[str, Path], tmp_path: Path, form: str, suffix: str, change: str
) -> None:
    """Refused by name; where the change leaves something readable, it is read as what it is."""
    folder = copy(bases[form], tmp_path)
    key = ""

    def harm(tensors: dict[str, Tensor]) -> None:
        nonlocal key
        key = first(tensors, suffix)
        if change == "gone":
            del tensors[key]
        else:
            tensors[key] = damaged(tensors[key], change)

    with_tensors(folder, harm)
    with bounded():
        try:
            read_all(folder)
        except KtSftError as error:
            assert str(error).strip()
        else:
            assert change in ("huge values", "of bytes", "gone", "flat", "scalar"), "was read"


@pytest.mark.parametrize(
    ("form", "name", "value"),
    [
        ("fp8_block", "weight_block_size", [0, 0]),
        ("fp8_block", "weight_block_size", [128]),
        ("fp8_block", "weight_block_size", "128"),
        ("fp8_block", "weight_block_size", [[1], [2]]),
        ("gptq", "group_size", "a"),
        ("gptq", "group_size", [32]),
        ("gptq", "group_size", 7),
        ("gptq", "bits", "4"),
        ("gptq", "bits", 3),
        ("awq", "bits", None),
        ("awq", "group_size", True),
    ],
)
def test_settings_of_formats(
    bases: dict[str, Path], tmp_path: Path, form: str, name: str, value: Any
) -> None:
    folder = with_config(
        copy(bases[form], tmp_path), lambda c: c["quantization_config"].update({name: value})
    )
    with bounded(), pytest.raises(CheckpointError):
        read_all(folder)


@pytest.mark.parametrize("size", [10**9, -1, 0])
def test_groups_larger_than_the_weights_take_no_memory(
    bases: dict[str, Path], tmp_path: Path, size: int
) -> None:
    folder = with_config(
        copy(bases["fp8_block"], tmp_path),
        lambda c: c["quantization_config"].update(weight_block_size=[max(size, 1), 10**9]),
    )
    with bounded():
        try:
            read_all(folder)
        except CheckpointError as error:
            assert "scales" in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = (
    "num_hidden_layers", "num_local_experts", "num_experts_per_tok", "hidden_size", "vocab_size",
    "moe_intermediate_size", "hidden_act", "architectures", "quantization_config", "dtype",
    "mlp_only_layers", "decoder_sparse_step", "head_dim", "rope_parameters", "layer_types",
)  # fmt: skip


def _any_configuration(folder: Path, changes: dict[str, Any], original: str) -> None:
    with_config(folder, lambda c: c.update(changes))
    try:
        with bounded():
            read_all(folder)
    except KtSftError as error:
        assert str(error).strip()
    finally:
        (folder / "config.json").write_text(original)


def _attack(bases: dict[str, Path], folder: Path, examples: int) -> None:
    model = copy(bases["plain"], folder)
    original = (model / "config.json").read_text()

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=2))
    def any_configuration(changes: dict[str, Any]) -> None:
        _any_configuration(model, changes, original)

    any_configuration()


def test_any_configuration(bases: dict[str, Path], tmp_path: Path) -> None:
    _attack(bases, tmp_path, 60)


@pytest.mark.slow
def test_any_configuration_at_length(bases: dict[str, Path], tmp_path: Path) -> None:
    _attack(bases, tmp_path, 2000)
