"""Published quantized checkpoints: read to the last bit, kept as they are, attention too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantized_checkpoints import QUANTIZED_FORMATS, load_checkpoint
from quantized_models import cases, make, write
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kt_sft import HybridExpertsConfig
from kt_sft.checkpoint.published import PublishedCheckpoint
from kt_sft.errors import CheckpointError
from kt_sft.experts import hybrid_experts_of
from kt_sft.files.safetensors import SafetensorsCheckpoint
from kt_sft.kernels import CodedMatrix

# Formats whose codes `weights: checkpoint` keeps, with the bytes of a weight that may cost.
_KEPT = {
    "fp8_block": 1.05, "fp8_block_bf16": 1.05, "fp8_channel": 1.05, "fp8_tensor": 1.05,
    "int4_packed": 0.57, "int4_packed_128": 0.53, "int4_packed_asymmetric": 0.54, "int8": 1.05,
    "int8_packed": 1.03, "mxfp4": 0.54, "gptq": 0.54, "gptq_v2": 0.54, "awq": 0.54,
}  # fmt: skip


def opened(folder: Path) -> PublishedCheckpoint:
    config = AutoConfig.from_pretrained(folder)
    files = sorted(folder.glob("*.safetensors"))
    return PublishedCheckpoint(SafetensorsCheckpoint(files), config.quantization_config)


def load(folder: Path, **settings) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=HybridExpertsConfig(**settings), dtype=torch.bfloat16
    ).eval()


@pytest.mark.parametrize(("name", "family"), cases())
def test_read_to_the_last_bit(tmp_path: Path, name: str, family: str) -> None:
    folder = write(tmp_path, name, family)
    checkpoint, tensors = opened(folder), load_checkpoint(folder)
    assert checkpoint.quantized
    for key in checkpoint.quantized:
        want = QUANTIZED_FORMATS[name].dequantize(tensors, key.removesuffix(".weight"))
        assert tuple(want.shape) == checkpoint.shape(key)
        assert torch.equal(checkpoint.dequantized(key), want), key


@pytest.mark.parametrize(("name", "family"), cases())
def test_weights_checkpoint_keeps_what_was_published(
    tmp_path: Path, name: str, family: str
) -> None:
    folder = write(tmp_path, name, family)
    if name not in _KEPT:
        with pytest.raises(CheckpointError, match="in order of activations"):
            load(folder, weights="checkpoint")
        model = load(folder, weights="bf16")
    else:
        model = load(folder, weights="checkpoint")
    checkpoint = opened(folder)
    config = model.config
    state = {k: checkpoint.dequantized(k) for k in checkpoint}
    plain = tmp_path / "dense"
    plain.mkdir()
    del config.quantization_config
    config.save_pretrained(plain)
    if family == "gpt_oss":
        for key in [k for k in state if k.endswith(("gate_up_proj", "down_proj"))]:
            state[key] = state[key].transpose(1, 2)
    save_file(
        {k: v.to(torch.bfloat16).contiguous() for k, v in state.items()},
        plain / "model.safetensors",
        metadata={"format": "pt"},
    )
    dense = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).eval()
    exact = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=HybridExpertsConfig(weights="bf16"), dtype=torch.bfloat16
    ).eval()
    # Attention and all the rest, bit for bit.
    mine = dict(model.named_parameters())
    rest = [n for n, _ in dense.named_parameters() if ".experts." not in n]
    assert len(rest) > 10
    for path in rest:
        assert torch.equal(mine[path], dense.get_parameter(path)), path
    # Experts: what lies in the store is the bf16 value of what the reference makes of the codes.
    ours, theirs = hybrid_experts_of(model), hybrid_experts_of(exact)
    for path, module in ours.items():
        if name in _KEPT:
            layout = module.weights.layout
            assert layout.nbytes / layout.weight_count < _KEPT[name] * 1.7
        for p in module.shape.projections:
            for e in (0, module.shape.experts - 1):
                got, want = (m.weights.unpack(e, p) for m in (module, theirs[path]))
                if module.weights.layout.weights == "int8":
                    got = got.bfloat16().float()
                assert torch.equal(got, want), (path, p)
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        error = (model(ids).logits - exact(ids).logits).float().norm(dim=-1)
        assert float(error.median()) < 0.03 * float(exact(ids).logits.float().norm(dim=-1).median())


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    folder = write(tmp_path, "mxfp4", "gpt_oss")
    checkpoint, tensors = opened(folder), load_checkpoint(folder)
    assert len(checkpoint.quantized) == 4
    for key in checkpoint.quantized:
        theirs = _convert_moe_packed_tensors(tensors[f"{key}_blocks"], tensors[f"{key}_scales"])
        ours = checkpoint.dequantized(key).bfloat16().transpose(1, 2)
        assert torch.equal(ours, theirs)


_THEIRS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
folder, out = map(Path, sys.argv[1:])
tensors = load_file(folder / "model.safetensors")
given = json.loads((folder / "config.json").read_text())["quantization_config"]
config = QuantizationConfig.model_validate(given)
scheme = next(iter(config.config_groups.values()))
scheme.format = config.format
compressor = BaseCompressor.get_value_from_registry(config.format)
stems = sorted({k.rpartition(".")[0] for k in tensors if k.endswith("weight_scale")})
result = {}
for stem in stems:
    names = [n for n in compressor.compression_param_names(scheme) if f"{stem}.{n}" in tensors]
    state = {n: tensors[f"{stem}.{n}"] for n in names}
    result[f"{stem}.weight"] = compressor.decompress(state, scheme)["weight"].contiguous()
save_file(result, out)
print(len(stems))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["fp8_channel", "fp8_tensor", "int4_packed", "int4_packed_128", "int4_packed_asymmetric",
     "int8", "int8_packed"],
)  # fmt: skip
def test_compressed_tensors_makes_the_same_of_it(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The library's own decompressor, which multiplies in the dtype of the scales."""
    library = Path(tmp_path_factory.getbasetemp()) / "compressed-tensors"
    if not library.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*pip, str(library), "compressed-tensors", "loguru"], check=True)
    folder = write(tmp_path, name, "qwen3_moe")
    subprocess.run(
        [sys.executable, "-c", _THEIRS, str(folder), str(tmp_path / "theirs.safetensors")],
        env={**os.environ, "PYTHONPATH": str(library)},
        check=True,
    )
    theirs, checkpoint = load_file(tmp_path / "theirs.safetensors"), opened(folder)
    assert set(theirs) == set(checkpoint.quantized)
    for key, want in theirs.items():
        assert torch.equal(checkpoint.dequantized(key).to(want.dtype), want), key


def edit(folder: Path, change) -> None:
    """Changes the tensors of a checkpoint and its quantization_config in place."""
    tensors = load_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config.get("quantization_config", {}))
    (folder / "config.json").write_text(json.dumps(config))
    contiguous = {k: t.contiguous() for k, t in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


_UP = "model.layers.1.mlp.experts.2.up_proj"
_Q = "model.layers.0.self_attn.q_proj"


def test_another_quantization_config_is_another_store(tmp_path: Path) -> None:
    """It decides what the same bytes mean."""
    folder = write(tmp_path, "gptq_v2", "qwen3_moe")
    module = "model.layers.1.mlp.experts"
    first = hybrid_experts_of(load(folder, weights="bf16"))[module].weights.unpack(2, "up_proj")
    edit(folder, lambda t, c: c.update(checkpoint_format="gptq"))
    second = hybrid_experts_of(load(folder, weights="bf16"))[module].weights.unpack(2, "up_proj")
    assert not torch.equal(first, second)


def test_a_config_that_we_saved_keeps_the_original(tmp_path: Path) -> None:
    folder = write(tmp_path, "gptq_v2", "qwen3_moe")
    model = load(folder, weights="bf16", store="memory")
    model.config.save_pretrained(folder)
    again = load(folder, weights="bf16", store="memory")
    for path, module in hybrid_experts_of(model).items():
        there = hybrid_experts_of(again)[path].weights.unpack(1, "up_proj")
        assert torch.equal(module.weights.unpack(1, "up_proj"), there)
    assert torch.equal(model.get_parameter(f"{_Q}.weight"), again.get_parameter(f"{_Q}.weight"))


def test_zero_points_of_int8_count(tmp_path: Path) -> None:
    folder = write(tmp_path, "int8", "qwen3_moe")
    plain = opened(folder).dequantized(f"{_UP}.weight")
    scale = load_checkpoint(folder)[f"{_UP}.weight_scale"].float()
    zero = torch.full((scale.shape[0], 1), 5, dtype=torch.int8)
    edit(folder, lambda t, c: t.update({f"{_UP}.weight_zero_point": zero}))
    shifted = opened(folder).dequantized(f"{_UP}.weight")
    assert torch.allclose(shifted, plain - 5 * scale, atol=1e-6)


def test_groups_of_packed_integers_may_lie_apart(tmp_path: Path) -> None:
    folder = write(tmp_path, "int4_packed", "qwen3_moe")
    tensors = load_checkpoint(folder)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0)) // 32
    edit(folder, lambda t, c: t.update({f"{_UP}.weight_g_idx": order.int()}))
    got = opened(folder).dequantized(f"{_UP}.weight")
    words, scales = tensors[f"{_UP}.weight_packed"], tensors[f"{_UP}.weight_scale"].float()
    nibbles = (words.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15
    assert torch.equal(got, (nibbles.flatten(1).float() - 8) * scales[:, order])


def test_zero_points_of_gptq_wrap(tmp_path: Path) -> None:
    folder = write(tmp_path, "gptq", "qwen3_moe")
    edit(folder, lambda t, c: t[f"{_UP}.qzeros"].fill_(-1))  # all nibbles 15: zero points of 0
    found = opened(folder).get(f"{_UP}.weight")
    assert isinstance(found, CodedMatrix) and not found.zeros.any()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptq", lambda t, c: c.update(group_size=96), "expected groups of 96"),
        ("gptq", lambda t, c: c.update(bits=8), "got 8 bits"),
        ("gptq", lambda t, c: c.update(quant_method="bitsandbytes"), "quantized with 'bitsandb"),
        ("fp8_block", lambda t, c: t.pop(f"{_Q}.weight_scale_inv"), "F8_E4M3 that goes with no"),
        ("int8", lambda t, c: t.pop(f"{_Q}.weight_scale"), "I8 that goes with no scales"),
        ("int4_packed", lambda t, c: t.pop(f"{_UP}.weight_shape"), "scales with no weight"),
        ("fp8_block", lambda t, c: t.pop(f"{_UP}.weight"), "weight_scale_inv: F32"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, name: str, change, message: str) -> None:
    folder = write(tmp_path, name, "qwen3_moe")
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        opened(folder)
        load(folder)


def codes(kind: torch.dtype) -> torch.Tensor:
    return torch.zeros(128, 64, dtype=torch.uint8).view(kind)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "NVFP4",
            {
                "weight_packed": codes(torch.uint8),
                "weight_scale": torch.ones(128, 8).to(torch.float8_e4m3fn),
                "weight_global_scale": torch.ones(1),
            },
        ),
        (
            "NVFP4",
            {
                "weight": codes(torch.uint8),
                "weight_scale": torch.ones(128, 8).to(torch.float8_e4m3fn),
                "weight_scale_2": torch.ones(()),
                "input_scale": torch.ones(()),
            },
        ),
        (
            "MXFP4",
            {"weight_packed": codes(torch.uint8), "weight_scale": codes(torch.uint8)[:, :4]},
        ),
        ("MXFP4", {"weight": codes(torch.int8), "scale": codes(torch.float8_e8m0fnu)[:, :4]}),
        (
            "FP8 with scales that are powers of two",
            {"weight": codes(torch.float8_e4m3fn), "scale": codes(torch.float8_e8m0fnu)[:1, :1]},
        ),
        (
            "MXFP8",
            {"weight": codes(torch.float8_e4m3fn), "weight_scale_inv": codes(torch.uint8)[:, :2]},
        ),
        (
            "MXFP8",
            {"weight": codes(torch.float8_e4m3fn), "weight_scale": codes(torch.uint8)[:, :2]},
        ),
    ],
)
@pytest.mark.parametrize("layer", ["model.layers.1", "model.layers.3"])
def test_formats_that_are_not_read_are_named(
    tmp_path: Path, name: str, parts: dict[str, torch.Tensor], layer: str
) -> None:
    """Where the model needs them: beside it lie layers for multi-token prediction, 3 of 3 here."""
    folder = tmp_path
    make("fp8_block", "qwen3_moe").save_pretrained(folder)
    weight = f"{layer}.mlp.experts.0.up_proj"

    def replace(tensors: dict[str, torch.Tensor], config: dict) -> None:
        tensors.pop(f"{weight}.weight", None)
        tensors.update({f"{weight}.{part}": tensor for part, tensor in parts.items()})

    edit(folder, replace)
    if layer == "model.layers.3":
        load(folder)
        return
    with pytest.raises(CheckpointError, match=rf"{weight}\.weight.*: {name}"):
        load(folder)


@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:gptq", "auto_round:awq"])
def test_autoround_packs_as_others_do(tmp_path: Path, packing: str) -> None:
    """Its quantized router and head, too."""
    method = packing.rpartition("_")[2].rpartition(":")[2]
    folder = write(tmp_path, method, "qwen3_moe")
    stock = {key: opened(folder).dequantized(key) for key in opened(folder).quantized}

    def as_autoround(tensors: dict[str, torch.Tensor], config: dict) -> None:
        config.update(quant_method="auto-round", packing_format=packing, sym=True)
        config.pop("checkpoint_format", None)

    edit(folder, as_autoround)
    assert stock.keys() == set(opened(folder).quantized)
    assert all(torch.equal(opened(folder).dequantized(key), w) for key, w in stock.items())
    load(folder)
    edit(folder, lambda t, c: c.update(packing_format="auto_round:llm_compressor"))
    with pytest.raises(CheckpointError, match="packing_format: got auto_round:llm_compressor"):
        load(folder)


def test_offloaded_quantized_weights_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "fp8_block", "qwen3_moe")
    places = {"model.layers.0": "disk", "model.embed_tokens": "cpu", "model.layers.1": "cpu",
              "model.layers.2": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
              "lm_head": "cpu"}  # fmt: skip
    with pytest.raises(CheckpointError, match="offloaded by device_map"):
        AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=HybridExpertsConfig(),
            dtype=torch.bfloat16,
            device_map=places,
            offload_folder=str(tmp_path / "offload"),
        )
