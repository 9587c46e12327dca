"""Training checkpoints that are whole or not there: staging, manifest, publishing, choosing.

A checkpoint is written into a hidden folder, `.checkpoint-8.tmp-<id>/checkpoint-8`. When every file
of it is on the disk, a manifest with the digest of each is written last, and the folder is renamed
to its place. Whatever kills the program before that leaves the former checkpoints as they were.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from kt_sft.errors import CheckpointError
from kt_sft.files import durable
from kt_sft.files.identity import file_digest

logger = logging.getLogger(__name__)

MANIFEST = "kt_sft_manifest.json"
_VERSION = 1
_STATE = "trainer_state.json"
_BY_TORCH = ("optimizer.pt", "scheduler.pt")
_LOCK = "lock"
_NAME = re.compile(r"checkpoint-(\d+)")
_STAGED = re.compile(r"\.checkpoint-\d+\.tmp-.+")
_READERS = 4
_MAKE_SPACE = "Free some space, or lower save_total_limit, and start again to resume"


class StagedCheckpoint:
    """One checkpoint on its way: `folder` is where its files are written."""

    def __init__(self, output_dir: Path, name: str, identity: str) -> None:
        """`identity` tells this run from others that may have died here."""
        self.output_dir = output_dir
        self.name = name
        self.root = output_dir / f".{name}.tmp-{identity}"
        self.folder = self.root / name
        self._lock: int | None = None

    def open(self) -> None:
        """Creates the folder and marks it as in use for as long as this process lives.

        Machines that share a file system open the same one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def publish(self) -> Path:
        """Makes the checkpoint durable and visible under its name, in place of a former one."""
        final = self.output_dir / self.name
        write_manifest(self.folder)
        if final.exists():
            final.rename(self.root / "replaced")
        durable.publish(self.folder, final)
        self.discard()
        return final

    def discard(self) -> None:
        """Removes what is left of the staging folder."""
        shutil.rmtree(self.root, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def write_manifest(folder: Path) -> None:
    """Brings every file of a checkpoint to the disk, then the manifest that lists them."""
    durable.sync_tree(folder)
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "digest": file_digest(path)}
        for path in _files(folder)
    }
    text = json.dumps({"version": _VERSION, "files": files}, indent=1)
    durable.write_whole(folder / MANIFEST, text.encode())


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None.

    With a manifest every byte is compared, and nothing may be there beside what it lists. Without
    one, which is how stock programs write, the state must be readable and the safetensors files
    whole. What torch has written must be readable in any case.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version = manifest["version"]
        files = {
            str(name): (int(f["size"]), str(f["digest"])) for name, f in manifest["files"].items()
        }
    except FileNotFoundError:
        return _damage_without_manifest(folder) or _unreadable(folder)
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
    ) as error:  # fmt: skip
        return f"{MANIFEST}: cannot be read: {error}"
    if version != _VERSION:
        return f"{MANIFEST}: is of version {version!r}, this kt_sft reads {_VERSION}"
    if _STATE not in files:
        return f"{MANIFEST}: does not list {_STATE}"
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda item: _differs(folder, item[0], *item[1]), files.items())
        wrong = next((wrong for wrong in found if wrong), None)
    there = (str(path.relative_to(folder)) for path in _files(folder))
    unlisted = (f"{name}: is not in {MANIFEST}" for name in there if name not in files)
    return wrong or next(unlisted, None) or _unreadable(folder)


def _unreadable(folder: Path) -> str | None:
    """Names the first of the optimizer's files that torch cannot take apart; reads no tensor."""
    for name in _BY_TORCH:
        path = folder / name
        try:
            if path.exists():
                torch.load(path, map_location="meta", mmap=True, weights_only=True)
        except Exception as error:  # whatever a damaged archive makes torch raise
            return f"{name}: torch cannot load it: {str(error).splitlines()[0] or repr(error)}"
    return None


def _differs(folder: Path, name: str, size: int, digest: str) -> str | None:
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"{name}: lies outside the checkpoint"
        found = path.stat().st_size
        if found != size:
            return f"{name}: got {found} bytes, expected {size}"
        if file_digest(path) != digest:
            return f"{name}: its bytes are not those that were saved (digest differs)"
    except OSError as error:
        return f"{name}: {error.strerror or error}"
    return None


def _damage_without_manifest(folder: Path) -> str | None:
    try:
        json.loads((folder / _STATE).read_text())
    except (OSError, ValueError, RecursionError) as error:
        return f"{_STATE}: cannot be read: {error}"
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "pt") as file:
                file.keys()
        except (OSError, SafetensorError) as error:
            return f"{path.name}: {error}"
    return None


def checkpoints_of(output_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, newest step first."""
    found = [
        (int(match.group(1)), path)
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if path.is_dir() and (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def newest_valid(output_dir: str | Path) -> str | None:
    """The newest checkpoint that is whole; each newer one that is not is named in a warning.

    None where there is none. Raises CheckpointError where there are some and none is whole: to
    start anew would write over them.
    """
    found = checkpoints_of(Path(output_dir))
    for path in found:
        wrong = damage(path)
        if wrong is None:
            return str(path)
        logger.warning("%s is damaged and is passed over: %s", path, wrong)
    if found:
        raise CheckpointError(
            f"{output_dir}: none of its {len(found)} checkpoints is whole ({found[0].name}: "
            f"{damage(found[0])}); move them away to start anew, or set another output_dir"
        )
    return None


def require_valid(folder: str | Path) -> None:
    """Raises CheckpointError for a checkpoint that was named and is damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"resume_from_checkpoint: no folder {folder}")
    wrong = damage(folder)
    if wrong is not None:
        others = [p for p in checkpoints_of(folder.parent) if p.name != folder.name]
        whole = next((p for p in others if damage(p) is None), None)
        advice = f"resume from {whole}, which is whole" if whole else "no other one is whole"
        raise CheckpointError(f"{folder} is damaged: {wrong}; {advice}")


def rotate(newest: Path, limit: int, best: str | None) -> None:
    """Removes the oldest checkpoints beside `newest` until `limit` are left; 0 keeps all.

    `newest` and `best` stay in any case. A folder loses its name before its files, so that what
    has the name of a checkpoint is whole at any time. What cannot be removed is warned of.
    """
    found = sorted(checkpoints_of(newest.parent), key=lambda path: path.stat().st_mtime_ns)
    protected = {newest, Path(best)} if best else {newest}
    surplus = len(found) - max(limit, len(protected)) if limit > 0 else 0
    removable = [path for path in found if path not in protected]
    for path in removable[: max(surplus, 0)]:
        # A name of its own: one of an interrupted removal may be there.
        hidden = path.parent / f".{path.name}.tmp-removed-{uuid.uuid4().hex[:12]}"
        try:
            path.rename(hidden)
        except OSError as error:
            logger.warning("%s is not removed, as save_total_limit asks: %s", path, error)
            continue
        shutil.rmtree(hidden, ignore_errors=True)


def sweep(output_dir: Path) -> None:
    """Removes the staging folders of runs that died; those of living runs are locked."""
    for root in output_dir.iterdir() if output_dir.is_dir() else ():
        # A link would lead to somebody else's files.
        if not _STAGED.fullmatch(root.name) or root.is_symlink() or not root.is_dir():
            continue
        with suppress(OSError):
            lock = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _restore_replaced(root, output_dir)
                logger.warning("removing %s, left by a run that was stopped while saving", root)
                shutil.rmtree(root, ignore_errors=True)
            finally:
                os.close(lock)


def _restore_replaced(root: Path, output_dir: Path) -> None:
    """A run died between moving a former checkpoint aside and putting the new one there."""
    name = root.name[1:].partition(".tmp-")[0]
    replaced = root / "replaced"
    if replaced.is_dir() and not (output_dir / name).exists():
        replaced.rename(output_dir / name)


def require_writable(output_dir: str | Path) -> None:
    """Raises CheckpointError where the folder cannot be made or written; makes nothing."""
    folder = Path(output_dir).absolute()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return
    reason = "cannot be written by this user" if there.is_dir() else "is not a folder"
    raise CheckpointError(
        f"output_dir: {output_dir}: {there} {reason}, so that nothing would be saved; set "
        "output_dir to a folder that can be written"
    )


def require_space(output_dir: Path, needed: int) -> None:
    """Raises CheckpointError where a checkpoint of so many bytes would fill the disk."""
    output_dir.mkdir(parents=True, exist_ok=True)
    what, advice = f"{output_dir}: a checkpoint needs", f"nothing was written. {_MAKE_SPACE}"
    durable.require_space(output_dir, needed, what, advice, CheckpointError)


def explain(error: Exception, what: Path) -> CheckpointError:
    """The error of a checkpoint that could not be written."""
    if durable.is_full(error):
        reason, advice = f"{durable.FULL} ({error})", _MAKE_SPACE
    else:
        reason, advice = str(error), "see that the folder can be written"
    return CheckpointError(f"{what}: not saved: {reason}; older checkpoints are whole. {advice}")


def _files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST)
