"""The file of packed experts: damage is named, hostile headers are refused, all is shared."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from kt_sft.errors import StoreError
from kt_sft.kernels import PROJECTIONS, Coding, Engine, ExpertWeights, WeightLayout
from kt_sft.kernels.formats import CodedMatrix
from kt_sft.store.packed_file import PackedFile, StoredLayer, StoreWriter, digest

ENGINE = Engine(1, "auto")
CODING = Coding("e2m1", "e8m0", 1, 32)
LAYERS = [
    StoredLayer("model.layers.0.mlp.experts", WeightLayout(2, 96, 70, "int8")),
    StoredLayer(
        "model.layers.1.mlp.experts",
        WeightLayout(2, 96, 70, "coded", biased=frozenset(PROJECTIONS), coding=CODING),
    ),
    StoredLayer("model.layers.2.mlp.experts", WeightLayout(2, 96, 70, "int4_g128", gated=False)),
]


def packed(layer: StoredLayer, seed: int) -> ExpertWeights:
    g = torch.Generator().manual_seed(seed)
    weights = ExpertWeights(layer.layout)
    for e in range(2):
        for p in weights.projections:
            outputs, inputs = weights.shape(p)
            if layer.layout.coding:
                codes = torch.randint(0, 16, (outputs, inputs), generator=g).to(torch.uint8)
                scales = torch.full((outputs, -(-inputs // 32)), 120, dtype=torch.uint8)
                weights.pack_codes(ENGINE, e, p, CodedMatrix(CODING, codes, scales))
                weights.set_bias(e, p, torch.randn(outputs, generator=g))
            else:
                weights.pack(ENGINE, e, p, torch.randn(outputs, inputs, generator=g))
    return weights


def write(path: Path) -> list[ExpertWeights]:
    writer = StoreWriter(path, LAYERS, {"files": []})
    weights = [packed(layer, i) for i, layer in enumerate(LAYERS)]
    for layer, w in zip(LAYERS, weights, strict=True):
        writer.add(layer, w)
    writer.finish()
    return weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("store") / "x.safetensors"
    write(path)
    return path.read_bytes()


def header_length(data: bytes) -> int:
    return struct.unpack("<Q", data[:8])[0]


def refused(path: Path, data: bytes, message: str = "") -> None:
    path.write_bytes(data)
    with pytest.raises(StoreError, match=message) as caught:
        PackedFile(path)
    assert str(path) in str(caught.value) and "builds it again" in str(caught.value)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    written = write(path)
    store = PackedFile(path, threads=2)
    assert store.layers == LAYERS and store.identity == {"files": []}
    for layer, before in zip(LAYERS, written, strict=True):
        after = store.weights(layer.path)
        for e in range(2):
            for p in before.projections:
                assert torch.equal(before.unpack(e, p), after.unpack(e, p))
    with pytest.raises(StoreError, match="has no layer model"):
        store.weights("model.layers.9")


def test_any_safetensors_reader_opens_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path)
    with safe_open(str(path), framework="pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    assert sizes == {n: size for layer in LAYERS for n, size in layer.tensors()}


def test_cut_files_are_named(tmp_path: Path, whole: bytes) -> None:
    length = header_length(whole)
    cuts = [0, 7, 8, 8 + length - 1, 8 + length, (8 + length + len(whole)) // 2, len(whole) - 1]
    for cut in cuts:
        refused(tmp_path / "x.safetensors", whole[:cut])
    refused(tmp_path / "x.safetensors", whole + b"\0", "added to")
    zeroed = whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2)
    refused(tmp_path / "x.safetensors", zeroed, "is damaged")


def test_a_flipped_byte_is_found_wherever_it_is(tmp_path: Path, whole: bytes) -> None:
    start = 8 + header_length(whole)
    text = whole[8:start].rstrip()
    places = [0, 3, 8, 9, 8 + len(text) // 2, 8 + len(text) - 1, start, len(whole) - 1]
    places += list(range(10, 8 + len(text), 97)) + list(range(start, len(whole), 9973))
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 0x01
        refused(tmp_path / "x.safetensors", bytes(damaged))


def test_verification_can_be_left_for_later_but_not_lost(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    store = PackedFile(path, verify=False)
    with pytest.raises(StoreError, match=r"model.layers.2.mlp.experts.tiles is damaged"):
        store.verify(2)


def changed(data: bytes, change) -> bytes:
    """The file with another header whose manifest digest is right again."""
    length = header_length(data)
    header = json.loads(data[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["manifest"])
    change(header, manifest)
    if "__metadata__" in header and "manifest" in header["__metadata__"]:
        text = json.dumps(manifest)
        header["__metadata__"]["manifest"] = text
        header["__metadata__"].setdefault("manifest_digest", "")
        if header["__metadata__"]["manifest_digest"] != "keep":
            header["__metadata__"]["manifest_digest"] = digest(text.encode())
    new = json.dumps(header).encode()
    padded = -(-(8 + len(new)) // 4096) * 4096 - 8
    return struct.pack("<Q", padded) + new.ljust(padded) + data[8 + length :]


_TILES = "model.layers.0.mlp.experts.tiles"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, m: h.pop("__metadata__"), "no metadata"),
        (lambda h, m: h["__metadata__"].update(format="other"), "not a store of kt_sft"),
        (lambda h, m: m.update(version=99), "version 99, this kt_sft reads"),
        (lambda h, m: m.pop("layers"), "malformed manifest"),
        (lambda h, m: m.update(layers={"a": 1}), "malformed manifest"),
        (lambda h, m: m["layers"][0].update(experts=-1), "malformed manifest"),
        (lambda h, m: m["layers"][0].update(experts=1 << 62), "malformed manifest"),
        (lambda h, m: m["layers"][0].update(hidden=True), "malformed manifest"),
        (lambda h, m: m["layers"][0].update(weights="int3"), "malformed manifest"),
        (lambda h, m: m["layers"][0].update(extra=1), "malformed manifest"),
        (lambda h, m: m["layers"][1].update(coding={"codes": "e9"}), "malformed manifest"),
        (
            lambda h, m: m["layers"][1]["coding"].update(group_outputs=2**63 - 1),
            "malformed manifest",
        ),
        (
            lambda h, m: m["layers"][1]["coding"].update(group_inputs=2**63 - 32),
            "malformed manifest",
        ),
        (lambda h, m: m["layers"].append(m["layers"][0]), "got|twice|layers"),
        (lambda h, m: m["layers"].pop(), "beside its layers"),
        (lambda h, m: m["digests"].pop(_TILES), "beside its layers"),
        (lambda h, m: h.pop(_TILES), "got None"),
        (lambda h, m: h[_TILES].update(dtype="F32"), "got .*F32"),
        (lambda h, m: h[_TILES].update(shape=[1 << 60]), "got"),
        (lambda h, m: h[_TILES].update(data_offsets=[64, 128]), "got"),
        (lambda h, m: h.update({"../../etc/passwd": h[_TILES]}), "beside its layers"),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, whole: bytes, change, message: str) -> None:
    refused(tmp_path / "x.safetensors", changed(whole, change), message)


@settings(max_examples=150, deadline=2000, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=400), length=st.integers(0, 2**64 - 1))
def test_any_bytes_are_a_store_error(tmp_path: Path, data: bytes, length: int) -> None:
    for content in (data, struct.pack("<Q", length) + data, struct.pack("<Q", len(data)) + data):
        refused(tmp_path / "x.safetensors", content)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=150, deadline=2000, suppress_health_check=list(HealthCheck))
@given(value=_JSON, where=st.sampled_from(["version", "identity", "digests", "layers", "layer"]))
def test_any_manifest_is_read_or_refused(tmp_path: Path, whole: bytes, value, where: str) -> None:
    def change(header, manifest) -> None:
        if where == "layer":
            manifest["layers"][0] = value
        else:
            manifest[where] = value

    path = tmp_path / "x.safetensors"
    path.write_bytes(changed(whole, change))
    begin = time.perf_counter()
    try:
        store = PackedFile(path)
    except StoreError:
        pass
    else:
        assert store.layers == LAYERS
    assert time.perf_counter() - begin < 1


def test_deeply_nested_headers_are_refused(tmp_path: Path) -> None:
    nested = b'{"a":' * 100_000
    refused(tmp_path / "x.safetensors", struct.pack("<Q", len(nested)) + nested)
    surrogate = json.dumps(
        {"__metadata__": {"format": "kt_sft.store", "manifest": "\ud800", "manifest_digest": ""}}
    ).encode()
    refused(tmp_path / "x.safetensors", struct.pack("<Q", len(surrogate)) + surrogate)
    twice = b'{"__metadata__":{},"__metadata__":{}}'
    refused(tmp_path / "x.safetensors", struct.pack("<Q", len(twice)) + twice, "there twice")


def test_mapped_memory_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(path)
    store = PackedFile(path)
    weights = store.weights(LAYERS[0].path)
    with pytest.raises(ValueError, match="read only"):
        weights.pack(ENGINE, 0, "up_proj", torch.zeros(70, 96))
    before = path.read_bytes()
    assert os.access(path, os.R_OK) and before == path.read_bytes()
