"""The folder of stores: one file for each checkpoint and format, built once, then shared.

Processes that want the same file take turns on a lock, which the system frees when its holder
dies; the first builds, the others find the file. A file appears complete or not at all.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from kt_sft.errors import StoreError, StoreFolderError
from kt_sft.files import durable
from kt_sft.files.identity import is_foreign
from kt_sft.store.packed_file import (
    VERSION,
    Outline,
    PackedFile,
    StoredLayer,
    StoreWriter,
    digest,
    file_bytes,
)

logger = logging.getLogger(__name__)

Build = Callable[[StoreWriter, list[StoredLayer]], None]


def default_folder() -> Path:
    """KT_SFT_STORE, or kt_sft/stores in the user's cache folder.

    Raises StoreFolderError for a user without a home.
    """
    given = os.environ.get("KT_SFT_STORE")
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        base = Path(cache) if cache else Path.home() / ".cache"
    except RuntimeError as error:
        raise StoreFolderError(
            f"store: auto needs the cache folder of a user, and user {os.geteuid()} has no home; "
            "set KT_SFT_STORE, XDG_CACHE_HOME or HOME to a folder that can be written"
        ) from error
    return base / "kt_sft" / "stores"


@dataclass(frozen=True)
class WantedStore:
    """The store of a checkpoint's experts in a format.

    identity: all that decides what it holds. outline: what is known of its layers before anything
    is read, with None for the format where only the checkpoint tells. layers: the layers of a store
    that is built now, which may read the checkpoint.
    """

    model: str
    weights: str
    identity: Mapping[str, Any]
    outline: list[Outline]
    layers: Callable[[], list[StoredLayer]]

    @property
    def file_name(self) -> str:
        """Holds a digest of all that decides the content."""
        text = json.dumps([VERSION, self.weights, self.identity], sort_keys=True)
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", self.model).strip("._-")[-60:] or "model"
        return f"{name}-{self.weights}-{digest(text.encode())[:16]}.safetensors"

    def difference(self, packed: PackedFile) -> str | None:
        """What a store holds that is not wanted, or None: a file's name proves nothing."""
        if packed.identity != json.loads(json.dumps(self.identity)):
            return "it was made from another checkpoint than its name says"
        found = [layer.outline(self.outline[0].weights is not None) for layer in packed.layers]
        if found != self.outline:
            wrong = [pair for pair in zip_longest(found, self.outline) if pair[0] != pair[1]]
            return f"it holds {wrong[0][0]}, expected {wrong[0][1]}"
        return None


class StoreLibrary:
    """Finds and builds stores in one folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def get(self, wanted: WantedStore, build: Build, threads: int) -> tuple[PackedFile, bool]:
        """The store, built now if it is not there, and whether it was there.

        A damaged file, or one that holds something else, raises StoreError; nothing is replaced
        silently. What another user has put in its place is left alone, and not used.
        """
        path = self.folder / wanted.file_name
        try:
            found = self._find(path, wanted, threads)
            if found is None and path.exists():
                path = path.with_name(f"{path.stem}-{os.geteuid()}{path.suffix}")
                found = self._find(path, wanted, threads)
            if found is not None:
                return found, True
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(path):
                found = self._find(path, wanted, threads)
                if found is not None:
                    return found, True
                self._build(path, wanted.identity, wanted.layers(), build)
        except OSError as error:
            raise StoreFolderError(_explain(error, path)) from error
        return PackedFile(path, verify=False), False

    def _find(self, path: Path, wanted: WantedStore, threads: int) -> PackedFile | None:
        """The store if it is there and ours to use; StoreError if it is damaged or another one."""
        if not path.exists():
            return None
        packed, wrong = None, None
        try:
            packed = PackedFile(path, threads=threads)
            wrong = wanted.difference(packed)
        except StoreError as error:
            if not is_foreign(path):
                raise
            wrong = str(error)
        if wrong is None:
            return packed
        if is_foreign(path):
            logger.warning("%s: %s; it belongs to another user and is left alone", path, wrong)
            return None
        raise StoreError(
            f"{path}: {wrong}; remove the file, and the next start, or `kt-sft pack`, builds it"
        )

    def _build(
        self, path: Path, identity: Mapping[str, Any], layers: list[StoredLayer], build: Build
    ) -> None:
        # Whoever wrote these is dead: a living builder holds the lock.
        for stale in self.folder.glob(f"{path.name}.tmp-*"):
            logger.warning("removing %s, left by a builder that was stopped", stale)
            with suppress(PermissionError):  # of another user, in a folder that all may write
                stale.unlink()
        durable.require_space(
            self.folder,
            file_bytes(layers),
            f"{path}: the packed experts need",
            "free some, set `store:` to a folder on another disk, or `store: memory`",
            StoreError,
        )
        partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        writer = StoreWriter(partial, layers, identity)
        try:
            build(writer, layers)
            writer.finish()
            durable.publish(partial, path)
        except BaseException:
            writer.abandon()
            raise

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        lock = _open_lock(f"{path}.lock")
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another process packs %s; waiting for it", path.name)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _open_lock(path: str) -> int:
    """A lock can be held through a file that only another user may write."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _explain(error: OSError, path: Path) -> str:
    if durable.is_full(error):
        return (
            f"{path}: {durable.FULL} ({error.strerror}); "
            "nothing was left behind. Free some space, set `store:` to a folder on another disk, "
            "or `store: memory`"
        )
    return (
        f"{path}: {error.strerror or error}; set `store:` to a folder that can be written, or "
        "`store: memory`"
    )
