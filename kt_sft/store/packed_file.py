"""The store: one file of packed experts, mapped read-only. docs/store-format.md describes it.

The file is a safetensors file. A manifest in its metadata tells what the tensors are and holds a
digest of each, so that a flipped byte anywhere is found when the file is opened.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import struct
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from kt_sft.errors import KernelArgumentError, StoreError
from kt_sft.kernels import PROJECTIONS, Coding, ExpertWeights, WeightLayout

FORMAT = "kt_sft.store"
# Of the file and of the packed layout in it; another number means another file.
VERSION = 1
_ALIGNMENT = 4096
_MAX_HEADER = 64 << 20
# Of madvise: reads a mapping's pages as if they were touched.
_POPULATE_READ = 22
_READ_STEP = 4 << 20
_libc = ctypes.CDLL(None)
_BLANK_DIGEST = "0" * 32
_REBUILD = "remove the file; the next start, or `kt-sft pack`, builds it again"


def digest(data: Any) -> str:
    """XXH3-128 in hexadecimal: finds damage at the speed of memory, not an attacker's changes."""
    return xxhash.xxh3_128_hexdigest(data)


class Outline(NamedTuple):
    """What tells one layer of a store from another without its content."""

    path: str
    experts: int
    hidden: int
    intermediate: int
    gated: bool
    biased: frozenset[str]
    weights: str | None


@dataclass(frozen=True)
class StoredLayer:
    """One layer's experts: where they belong in the model, and what they are."""

    path: str
    layout: WeightLayout

    def tensors(self) -> Iterator[tuple[str, int]]:
        """(name, bytes) of each section in the order of the file."""
        for section, size in self.layout.section_bytes().items():
            yield f"{self.path}.{section}", size

    def outline(self, with_format: bool) -> Outline:
        """Of this layer; the format is None unless `with_format`."""
        layout = self.layout
        return Outline(
            self.path,
            layout.experts,
            layout.hidden,
            layout.intermediate,
            layout.gated,
            layout.biased,
            layout.weights if with_format else None,
        )

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        layout = self.layout
        return {
            "path": self.path,
            "experts": layout.experts,
            "hidden": layout.hidden,
            "intermediate": layout.intermediate,
            "weights": layout.weights,
            "gated": layout.gated,
            "biased": sorted(layout.biased),
            "coding": None if layout.coding is None else asdict(layout.coding),
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> StoredLayer:
        """Raises KeyError, TypeError, ValueError or KernelArgumentError for what is malformed."""
        keys = {"path", "experts", "hidden", "intermediate", "weights", "gated", "biased", "coding"}
        if set(entry) != keys or not isinstance(entry["path"], str):
            raise ValueError(f"layer with the keys {sorted(entry)}")
        sizes = [entry["experts"], entry["hidden"], entry["intermediate"]]
        if not all(type(n) is int for n in sizes) or not set(entry["biased"]) <= set(PROJECTIONS):
            raise ValueError(f"layer {entry['path']} with sizes {sizes}")
        coding = None if entry["coding"] is None else Coding(**entry["coding"])
        layout = WeightLayout(
            entry["experts"],
            entry["hidden"],
            entry["intermediate"],
            entry["weights"],
            bool(entry["gated"]),
            frozenset(entry["biased"]),
            coding,
        )
        return cls(entry["path"], layout)


def file_bytes(layers: list[StoredLayer]) -> int:
    """Size of the file of these layers, the header aside."""
    return sum(size for layer in layers for _, size in layer.tensors())


def _header(
    layers: list[StoredLayer], identity: Mapping[str, Any], digests: Mapping[str, str]
) -> bytes:
    """Length and JSON, padded so that the tensors begin at a page."""
    manifest = json.dumps(
        {
            "version": VERSION,
            "identity": identity,
            "layers": [layer.as_dict() for layer in layers],
            "digests": {
                name: digests.get(name, _BLANK_DIGEST)
                for layer in layers
                for name, _ in layer.tensors()
            },
        },
        sort_keys=True,
    )
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "manifest": manifest,
            "manifest_digest": digest(manifest.encode()),
        }
    }
    offset = 0
    for layer in layers:
        for name, size in layer.tensors():
            header[name] = {
                "dtype": "U8",
                "shape": [size],
                "data_offsets": [offset, offset + size],
            }
            offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // _ALIGNMENT) * _ALIGNMENT - 8
    return struct.pack("<Q", length) + text.ljust(length)


class StoreWriter:
    """Writes a store layer by layer; holds no more than the layer that is being written."""

    def __init__(self, path: Path, layers: list[StoredLayer], identity: Mapping[str, Any]) -> None:
        self._layers, self._identity = layers, dict(identity)
        self._digests: dict[str, str] = {}
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            header = _header(layers, self._identity, {})
            self._offset = len(header)
            self._write(header, 0)
        except BaseException:
            self.abandon()
            raise

    def add(self, layer: StoredLayer, weights: ExpertWeights) -> None:
        """Appends the next layer."""
        sections = weights.sections()
        with ThreadPoolExecutor(1) as pool:
            for name, size in layer.tensors():
                data = sections[name.rpartition(".")[2]]
                assert len(data) == size
                found = pool.submit(digest, data)
                self._write(data, self._offset)
                self._offset += size
                self._digests[name] = found.result()

    def finish(self) -> None:
        """Completes the header and brings everything to the disk; the caller renames the file."""
        assert len(self._digests) == sum(len(list(la.tensors())) for la in self._layers)
        self._write(_header(self._layers, self._identity, self._digests), 0)
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1

    def abandon(self) -> None:
        """Removes what was written."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        with suppress(OSError):
            self._path.unlink()

    def _write(self, data: Any, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file, view[: 64 << 20], offset)
            view, offset = view[written:], offset + written


class PackedFile:
    """A store, checked and mapped; every process that maps it shares the same memory."""

    def __init__(self, path: str | Path, *, verify: bool = True, threads: int = 1) -> None:
        """Opens a store. With `verify`, all of it is read and compared with its digests.

        Raises StoreError that names the file, what is wrong with it and what to do.
        """
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
                # Asked for here: another thread must not change how Python warns.
                self._address = _read_only(self._map, 0, 1).data_ptr() if len(self._map) else 0
                self._file = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._file)
        except FileNotFoundError:
            raise StoreError(f"{self.path}: no such file") from None
        except (OSError, ValueError) as error:
            raise self._error(f"cannot be mapped: {error}") from error
        header, self._start = self._read_header()
        manifest = self._read_manifest(header)
        self.identity: dict[str, Any] = manifest["identity"]
        self._digests: dict[str, str] = manifest["digests"]
        self.layers: list[StoredLayer] = manifest["layers"]
        self._places = self._check_tensors(header)
        if verify:
            self.verify(threads)

    def verify(self, threads: int = 1, progress: Callable[[int], None] | None = None) -> None:
        """Reads everything; raises StoreError for the first tensor that is not as written."""
        view = memoryview(self._map)

        def check(name: str) -> str | None:
            begin, end = self._places[name]
            wrong = digest(view[begin:end]) != self._digests[name]
            if progress is not None:
                progress(end - begin)
            return name if wrong else None

        try:
            with ThreadPoolExecutor(max(1, threads)) as pool:
                for wrong in pool.map(check, self._places):
                    if wrong is not None:
                        raise self._error(f"{wrong} is damaged: its digest is another")
        finally:
            view.release()

    def weights(self, path: str) -> ExpertWeights:
        """The experts of one layer, in the mapped memory. Raises StoreError."""
        for layer in self.layers:
            if layer.path == path:
                return ExpertWeights(layer.layout, dict(self._sections(layer)))
        raise self._error(f"has no layer {path}")

    def require_whole(self) -> None:
        """Raises StoreError for a file that was cut short since, whose use would be a SIGBUS."""
        if self._map.size() < len(self._map):
            raise self._error(
                f"has {self._map.size()} bytes, {len(self._map)} when it was opened: another "
                "program has cut it short"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self._map)

    def ranges(self, path: str) -> list[tuple[int, int]]:
        """Where one layer's experts begin and end in the file. Raises KeyError."""
        layer = next((la for la in self.layers if la.path == path), None)
        if layer is None:
            raise KeyError(path)
        return [self._places[name] for name, _ in layer.tensors()]

    def bring(self, begin: int, end: int) -> None:
        """Brings a part of the file into memory, without holding Python's lock. Raises OSError."""
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        address = ctypes.c_void_p(self._address + first)
        if _libc.madvise(address, ctypes.c_size_t(end - first), _POPULATE_READ) == 0:
            return
        # Systems before Linux 5.14: reading it has the same effect.
        for step in range(first, end, _READ_STEP):
            os.pread(self._file, min(_READ_STEP, end - step), step)

    def _sections(self, layer: StoredLayer) -> Iterator[tuple[str, Tensor]]:
        for name, size in layer.tensors():
            # torch has no read-only tensors; nobody writes to these.
            yield name.rpartition(".")[2], _read_only(self._map, self._places[name][0], size)

    def _error(self, what: str) -> StoreError:
        return StoreError(f"{self.path}: {what}; {_REBUILD}")

    def _read_header(self) -> tuple[dict[str, Any], int]:
        size = len(self._map)
        length = struct.unpack("<Q", self._map[:8])[0] if size >= 8 else 0
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise self._error(
                f"is no store: {size} bytes, and a header of {length} where at most "
                f"{min(max(size - 8, 0), _MAX_HEADER)} fit"
            )
        try:
            header = json.loads(self._map[8 : 8 + length], object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._error(f"has a damaged header: {error}") from error
        if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
            raise self._error("has a damaged header: no metadata")
        return header, 8 + length

    def _read_manifest(self, header: Mapping[str, Any]) -> dict[str, Any]:
        metadata = header["__metadata__"]
        if metadata.get("format") != FORMAT:
            raise self._error(f"is not a store of kt_sft: format {metadata.get('format')!r}")
        text = metadata.get("manifest")
        encoded = text.encode(errors="surrogatepass") if isinstance(text, str) else b""
        if not encoded or digest(encoded) != metadata.get("manifest_digest"):
            raise self._error("has a damaged manifest: its digest is another")
        try:
            manifest = json.loads(text, object_pairs_hook=_no_duplicates)
            if manifest["version"] != VERSION:
                raise self._error(
                    f"is of version {manifest['version']}, this kt_sft reads {VERSION}"
                )
            return {
                "identity": dict(manifest["identity"]),
                "digests": {str(k): str(v) for k, v in manifest["digests"].items()},
                "layers": [StoredLayer.from_dict(entry) for entry in manifest["layers"]],
            }
        except StoreError:
            raise
        except (
            ValueError, KeyError, TypeError, AttributeError, RecursionError, KernelArgumentError,
        ) as error:  # fmt: skip
            raise self._error(f"has a malformed manifest: {error!r}") from error

    def _check_tensors(self, header: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """Name -> (begin, end) in the file; exactly what the manifest's layouts make."""
        places: dict[str, tuple[int, int]] = {}
        offset = 0
        for layer in self.layers:
            for name, size in layer.tensors():
                want = {"dtype": "U8", "shape": [size], "data_offsets": [offset, offset + size]}
                if header.get(name) != want:
                    raise self._error(f"{name}: got {header.get(name)}, expected {want}")
                if name in places:
                    raise self._error(f"{name} is there twice")
                places[name] = (self._start + offset, self._start + offset + size)
                offset += size
        others = set(header) - set(places) - {"__metadata__"}
        if others or set(self._digests) != set(places):
            raise self._error(f"has tensors beside its layers: {sorted(others)[:3]}")
        if self._start % 64 or self._start + offset != len(self._map):
            raise self._error(
                f"has {len(self._map)} bytes, expected {self._start + offset}: it was cut short "
                "or added to"
            )
        return places


def _read_only(data: mmap.mmap, begin: int, size: int) -> Tensor:
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(data, dtype=torch.uint8, count=size, offset=begin)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is there twice")
    return found
