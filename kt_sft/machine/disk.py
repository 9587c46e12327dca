"""A disk: how fast it reads a file, and how much room it has."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

_STEP = 8 << 20


def read_rate(path: Path, nbytes: int = 256 << 20, seconds: float = 1.0) -> float | None:
    """Bytes a second of reading a file past the page cache; None where the system cannot.

    Reads at most so many bytes, and for about so long.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # of memory, or of a network
        return None
    buffer = mmap.mmap(-1, _STEP)  # begins at a page, which such reads need
    size, done, start = path.stat().st_size, 0, time.perf_counter()
    try:
        while done < min(nbytes, size) and time.perf_counter() - start < seconds:
            count = os.preadv(file, [buffer], done)
            done += count
            if count < _STEP:
                break
    except OSError:
        return None
    finally:
        os.close(file)
    return done / (time.perf_counter() - start) if done else None


def existing(folder: Path) -> Path:
    """The folder, or the nearest around it that is there."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())


def free_bytes(folder: Path) -> int:
    """What a person may still write where the folder is, or would be."""
    state = os.statvfs(existing(folder))
    return state.f_bavail * state.f_frsize
