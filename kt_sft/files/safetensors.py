"""Reading single tensors of a safetensors checkpoint, sharded or not, without loading it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kt_sft.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class SafetensorsCheckpoint:
    """The tensors of a list of safetensors files by key. Tensors are views of mapped files."""

    def __init__(self, files: Iterable[str | Path]) -> None:
        self._handles: list[Any] = []
        self._by_key: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file in map(Path, files):
            if file.suffix != ".safetensors":
                raise CheckpointError(
                    f"{file}: got a {file.suffix or 'nameless'} file, expected .safetensors; "
                    "convert the checkpoint with save_pretrained of a recent transformers"
                )
            try:
                handle = safe_open(str(file), framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error
            self._handles.append(handle)
            for key in handle.keys():  # noqa: SIM118 - not a mapping
                if key in self._by_key:
                    raise CheckpointError(f"{file}: {key} is already in another shard")
                self._by_key[key] = handle
                self._file_of[key] = file.name

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_key)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header only."""
        return tuple(self._handle(key).get_slice(key).get_shape())

    def file_of(self, key: str) -> str:
        """The name of the file that holds a tensor."""
        return self._file_of[key]

    def get(self, key: str) -> Tensor:
        """One tensor. Raises CheckpointError when it is not there."""
        return self._handle(key).get_tensor(key)

    def dtype(self, key: str) -> str:
        """The name of a tensor's dtype in safetensors, from the header only."""
        return str(self._handle(key).get_slice(key).get_dtype())

    def part(self, key: str, index: int | None) -> Tensor:
        """The tensor, or `tensor[index]` along the first dimension, reading that part only."""
        return self.get(key) if index is None else self._handle(key).get_slice(key)[index]

    def get_rows(self, key: str, block: int, rows: int) -> Tensor:
        """Rows `block * rows` to `(block + 1) * rows`, reading that part only."""
        return self._handle(key).get_slice(key)[block * rows : (block + 1) * rows]

    def _handle(self, key: str) -> Any:
        if key not in self._by_key:
            raise CheckpointError(f"the checkpoint has no tensor {key}")
        return self._by_key[key]


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of their names.

    Shard names come from an index that anyone may have written: only plain names of regular
    files inside the folder are accepted. Raises CheckpointError.
    """
    folder = Path(folder)
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if single.is_file():
        # As Transformers takes them: an index beside it is left over from another saving.
        return [single]
    if not index.is_file():
        raise CheckpointError(
            f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME} is there; "
            "give the folder of a safetensors checkpoint"
        )
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
        names = set(found["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{index}: not a shard index: {error!r}") from error
    if not all(isinstance(name, str) for name in names) or not names:
        raise CheckpointError(f"{index}: not a shard index: expected names of files, some at least")
    files = []
    for name in sorted(names):
        file = folder / name
        if Path(name).name != name or "\\" in name or "\0" in name or len(name) > 255:
            raise CheckpointError(f"{index}: shard name {name!r} is not a plain file name")
        if not file.is_file():
            raise CheckpointError(f"{index}: shard {name} is missing in {folder}")
        files.append(file)
    if "metadata" not in found:
        raise CheckpointError(
            f'{index}: has no "metadata", which Transformers looks for; add "metadata": {{}} to it'
        )
    return files
