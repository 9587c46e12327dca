"""Files and folders that are on the disk before they get the name that others look for."""

from __future__ import annotations

import os
from pathlib import Path


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


def publish(partial: Path, final: Path) -> None:
    """Gives what is on the disk its name, for good."""
    partial.rename(final)
    sync(final.parent)
