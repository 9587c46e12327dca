"""Files and folders that are on the disk before they get the name that others look for."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kt_sft.errors import KtSftError

# Left free on the disk, so that a full one does not stop everything else.
_SPARE = 64 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = (
    "No space left",
    "File too large",
    "quota exceeded",
    "PytorchStreamWriter failed",
    "unexpected pos",  # torch, after a write that came out short
)
FULL = "the disk is full or a limit on file sizes was reached"


def require_space(
    folder: Path, needed: int, what: str, advice: str, error: type[KtSftError]
) -> None:
    """Raises `error` where so many bytes would fill the disk; the folder is there.

    what: names what is to be written, as in "the packed experts need".
    """
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE:
        raise error(f"{what} {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; {advice}")


def is_full(error: Exception) -> bool:
    """Whether a write failed for want of space.

    safetensors and torch report the system's error in the text of their own.
    """
    return getattr(error, "errno", None) in _FULL or any(s in str(error) for s in _FULL_TEXTS)


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Brings every file below a folder to the disk, then every folder, the outermost last."""
    inner = sorted(folder.rglob("*"), reverse=True)
    for path in (p for p in inner if p.is_file()):
        sync(path)
    for path in (*(p for p in inner if p.is_dir()), folder):
        sync(path)


def new_folder(path: Path, option: str, error: type[KtSftError]) -> Path:
    """The absolute path of a folder that is not there yet, or is empty; raises `error`."""
    found = path.resolve()
    if found.exists() and (not found.is_dir() or any(found.iterdir())):
        what = "is not empty" if found.is_dir() else "is a file"
        raise error(f"{option}: {path} {what}; give a new folder or remove it")
    return found


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when it is on the disk, and goes on an error."""
    partial = final.with_name(f"{final.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        sync_tree(partial)
        if final.exists():
            final.rmdir()
        publish(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Writes a small file, or leaves what was there. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(data)
        sync(partial)
        publish(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def publish(partial: Path, final: Path) -> None:
    """Gives what is on the disk its name, for good."""
    partial.rename(final)
    sync(final.parent)
