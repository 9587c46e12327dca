"""What tells one checkpoint from another: the digest of all its bytes.

Names, sizes, headers and times are not enough: two fine-tunes of one model share them. A digest
once taken is remembered beside the stores for as long as the system says that the file is the same
(device, inode, size, times of change); the time of a change of the inode cannot be set by programs.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from kt_sft.errors import CheckpointError

_CHUNK = 1 << 20
# A file that changed just now may change again within one tick of the file system's clock.
_SETTLED_SECONDS = 0.1


def _stamp(found: os.stat_result) -> list[int]:
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def file_digest(path: Path) -> str:
    """XXH3-128 of a file in hexadecimal."""
    # Into one small buffer that stays in the processor's cache: as fast as memory is read.
    found, buffer = xxhash.xxh3_128(), bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.update(view[:count])
    return found.hexdigest()


def is_foreign(path: Path) -> bool:
    """Whether another user than this one and root owns a file."""
    return path.stat().st_uid not in (os.geteuid(), 0)


def _remembered(note: Path, stamp: list[int]) -> str | None:
    try:
        # What others can write proves nothing about a checkpoint.
        if is_foreign(note) or note.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return None
        known = json.loads(note.read_text())
        return str(known["digest"]) if known["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(note: Path, stamp: list[int], digest: str) -> None:
    if time.time() - stamp[-1] / 1e9 < _SETTLED_SECONDS:
        return
    partial = note.with_name(f"{note.name}.{os.getpid()}")
    # Without a note the digest is taken again.
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"stamp": stamp, "digest": digest}))
        partial.chmod(0o644)
        partial.rename(note)


def _file_identity(path: Path, notes: Path) -> dict[str, Any]:
    try:
        real = path.resolve(strict=True)
        stamp = _stamp(real.stat())
        note = notes / f"{xxhash.xxh3_64_hexdigest(str(real).encode())}.json"
        digest = _remembered(note, stamp)
        if digest is None:
            digest = file_digest(real)
            if _stamp(real.stat()) != stamp:
                raise CheckpointError(f"{path}: changed while it was read; wait until it is whole")
            _remember(note, stamp, digest)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return {"name": path.name, "size": stamp[2], "digest": digest}


def checkpoint_identity(
    files: Iterable[str | Path], notes: Path, threads: int = 1
) -> list[dict[str, Any]]:
    """Name, size and XXH3-128 of every file; `notes` is the folder of remembered digests.

    Raises CheckpointError.
    """
    paths = sorted(map(Path, files))
    with ThreadPoolExecutor(max(1, threads)) as pool:
        return list(pool.map(lambda path: _file_identity(path, notes), paths))
