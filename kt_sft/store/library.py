"""The folder of stores: one file for each checkpoint and format, built once, then shared.

Processes that want the same file take turns on a lock, which the system frees when its holder
dies; the first builds, the others find the file. A file appears complete or not at all.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kt_sft.errors import StoreError
from kt_sft.store.packed_file import (
    VERSION,
    PackedFile,
    StoredLayer,
    StoreWriter,
    digest,
    file_bytes,
)

logger = logging.getLogger(__name__)

# Left free on the disk, so that a full one does not stop everything else.
_SPARE = 64 << 20

Build = Callable[[StoreWriter], None]


def default_folder() -> Path:
    """KT_SFT_STORE, or kt_sft/stores in the user's cache folder."""
    given = os.environ.get("KT_SFT_STORE")
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "kt_sft" / "stores"


class StoreLibrary:
    """Finds and builds stores in one folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, model: str, weights: str, identity: Mapping[str, Any]) -> Path:
        """The file of a checkpoint in a format; the name holds a digest of all that decides it."""
        text = json.dumps([VERSION, weights, identity], sort_keys=True)
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", model).strip("._-")[-60:] or "model"
        return self.folder / f"{name}-{weights}-{digest(text.encode())[:16]}.safetensors"

    def find(self, path: Path, threads: int) -> PackedFile | None:
        """The store if it is there; StoreError if it is damaged."""
        return PackedFile(path, threads=threads) if path.exists() else None

    def get(
        self,
        path: Path,
        identity: Mapping[str, Any],
        layers: Callable[[], list[StoredLayer]],
        build: Build,
        threads: int,
    ) -> PackedFile:
        """The store at `path`, built now if it is not there.

        A damaged file raises StoreError; nothing is replaced silently.
        """
        found = self.find(path, threads)
        if found is not None:
            return found
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(path):
                found = self.find(path, threads)
                if found is None:
                    self._build(path, identity, layers(), build)
        except OSError as error:
            raise StoreError(_explain(error, path)) from error
        return found or PackedFile(path, verify=False)

    def _build(
        self, path: Path, identity: Mapping[str, Any], layers: list[StoredLayer], build: Build
    ) -> None:
        # Whoever wrote these is dead: a living builder holds the lock.
        for stale in self.folder.glob(f"{path.name}.tmp-*"):
            logger.warning("removing %s, left by a builder that was stopped", stale)
            stale.unlink()
        needed = file_bytes(layers) + _SPARE
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise StoreError(
                f"{path}: the packed experts need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are "
                "free; free some, set `store:` to a folder on another disk, or `store: memory`"
            )
        partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        writer = StoreWriter(partial, layers, identity)
        try:
            build(writer)
            writer.finish()
            partial.rename(path)
        except BaseException:
            writer.abandon()
            raise
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another process packs %s; waiting for it", path.name)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _explain(error: OSError, path: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"{path}: the disk is full or a limit on file sizes was reached ({error.strerror}); "
            "nothing was left behind. Free some space, set `store:` to a folder on another disk, "
            "or `store: memory`"
        )
    return (
        f"{path}: {error.strerror or error}; set `store:` to a folder that can be written, or "
        "`store: memory`"
    )
