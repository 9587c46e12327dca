"""Layers that are asked for before they are computed."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_packed_file import LAYERS, write

from kt_sft.machine.disk import read_rate
from kt_sft.store import packed_file
from kt_sft.store.packed_file import PackedFile
from kt_sft.store.read_ahead import ReadAhead

PATHS = [layer.path for layer in LAYERS]


@pytest.fixture
def store(tmp_path: Path) -> PackedFile:
    write(tmp_path / "x.safetensors")
    return PackedFile(tmp_path / "x.safetensors")


def eventually(condition: Any) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(condition())


def watched(store: PackedFile, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(store, "bring", lambda begin, end: asked.append((begin, end)))
    return asked


def test_the_next_layer_up_and_down(store: PackedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, ahead = watched(store, monkeypatch), ReadAhead(store)
    cases = (
        ("forward", 0, [1, 2]), ("forward", 1, [2]), ("backward", 2, [1, 0]), ("backward", 1, [0]),
    )  # fmt: skip
    for direction, at, wanted in cases:
        asked.clear()
        ahead(direction, PATHS[at])
        whole = [part for place in wanted for part in store.ranges(PATHS[place])]
        assert eventually(lambda whole=whole: len(asked) == len(whole)) and asked == whole
    asked.clear()
    ahead("forward", PATHS[2])
    ahead("backward", PATHS[0])
    time.sleep(0.05)
    assert asked == []
    assert ahead.nbytes == sum(
        end - begin
        for *_, wanted in cases
        for place in wanted
        for begin, end in store.ranges(PATHS[place])
    )


def test_a_checkpointed_layer_is_computed_on_the_way_down(
    store: PackedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead, wanted = ReadAhead(store), []
    monkeypatch.setattr(ahead, "_want", lambda places: wanted.append(places[0]))
    for direction, at in (
        ("forward", 0), ("forward", 1), ("forward", 2),
        ("forward", 2), ("backward", 2), ("forward", 1), ("backward", 1), ("forward", 0),
        ("backward", 0), ("forward", 0),
    ):  # fmt: skip
        ahead(direction, PATHS[at])
    assert wanted == [1, 2, 3, 1, 1, 0, 0, -1, -1, 1]


def test_a_layer_that_is_not_next_any_more_is_left(
    store: PackedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on, asked = threading.Event(), threading.Event(), []

    def slow(begin: int, end: int) -> None:
        asked.append((begin, end))
        began.set()
        go_on.wait(10)

    monkeypatch.setattr(store, "bring", slow)
    ahead = ReadAhead(store)
    ahead("forward", PATHS[0])
    assert began.wait(10)
    ahead("forward", PATHS[1])
    go_on.set()
    assert len(store.ranges(PATHS[1])) > 1
    want = store.ranges(PATHS[1])[:1] + store.ranges(PATHS[2])
    assert eventually(lambda: len(asked) == len(want)) and asked == want


def test_a_disk_that_fails_is_no_reason_to_stop(
    store: PackedFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(begin: int, end: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store, "bring", fails)
    ahead = ReadAhead(store)
    with caplog.at_level("WARNING"):
        ahead("forward", PATHS[0])
        assert eventually(lambda: "reading ahead failed" in caplog.text)
        ahead("forward", PATHS[1])


def test_its_thread_ends_with_it(store: PackedFile) -> None:
    ahead = ReadAhead(store)
    ahead("forward", PATHS[0])
    thread = ahead._thread
    assert thread is not None
    del ahead
    thread.join(10)
    assert not thread.is_alive()


def cached(store: PackedFile, begin: int, end: int) -> bool:
    """Whether every page of a range is in memory."""
    first = begin // mmap.PAGESIZE * mmap.PAGESIZE
    pages = -(-(end - first) // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    base = packed_file._read_only(store._map, 0, 1).data_ptr()
    libc = ctypes.CDLL(None)
    assert libc.mincore(ctypes.c_void_p(base + first), ctypes.c_size_t(end - first), found) == 0
    return all(page & 1 for page in found)


@pytest.mark.parametrize("supported", [True, False])
def test_what_is_brought_is_in_memory(
    tmp_path: Path, supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:  # larger than what the system reads ahead by itself
        file.write(os.urandom(64 << 20))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    monkeypatch.setattr(PackedFile, "_read_header", lambda self: ({}, 0))
    monkeypatch.setattr(
        PackedFile, "_read_manifest", lambda *_: {"identity": {}, "digests": {}, "layers": []}
    )
    monkeypatch.setattr(PackedFile, "_check_tensors", lambda *_: {})
    store = PackedFile(path, verify=False)
    if not supported:
        monkeypatch.setattr(packed_file, "_POPULATE_READ", 9999)
    begin, end = (20 << 20) + 123, (40 << 20) + 5
    if cached(store, begin, end):
        pytest.skip("this file system keeps what it is told to drop")
    store.bring(begin, end)
    assert cached(store, begin, end) and not cached(store, 50 << 20, 60 << 20)


def test_the_rate_of_a_disk(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(os.urandom(32 << 20))
    rate = read_rate(path)
    if rate is None:
        pytest.skip("no direct reading on this file system")
    assert 1e6 < rate < 1e12
    assert read_rate(Path("/proc/cpuinfo")) is None
    assert read_rate(tmp_path / "nothing") is None
