"""Stores in their folder: built once, shared, complete or not there."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from children import finish, output, own_folder, start
from quantized_checkpoints import QUANTIZED_FORMATS
from safetensors.torch import load_file, save_file
from tiny_configs import build
from torch import nn
from transformers import AutoModelForCausalLM

from kt_sft import HybridExpertsConfig
from kt_sft.cli.main import main
from kt_sft.engines import choose
from kt_sft.engines.nodes import NodeExperts
from kt_sft.errors import CheckpointError, StoreError, StoreFolderError
from kt_sft.experts import hybrid_experts_of
from kt_sft.files.identity import checkpoint_identity
from kt_sft.loading import packing, placing
from kt_sft.machine.memory import available_memory_bytes
from kt_sft.store.library import WantedStore, default_folder
from kt_sft.store.packed_file import PackedFile, StoreWriter


@dataclass
class Loading:
    """What a child does: loads a checkpoint with a store, and tells how much of it was packed."""

    model: str
    stores: str
    dies: bool = False  # when it packs the second layer
    limit: int | None = None  # of the size of a file
    together: int = 1  # begins when so many have come to where the stores are
    holds: bool = False  # the store, until there is a file "look", and then another, "go"
    folder: str = field(default_factory=own_folder)

    def __call__(self) -> None:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
        if self.limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))
        packed: list[int] = []
        stock = packing.pack_experts

        def counting(*arguments: Any) -> Any:
            packed.append(1)
            if self.together > 1:
                time.sleep(0.5)  # time enough for the others to pack too, if they may
            if self.dies and len(packed) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return stock(*arguments)

        packing.pack_experts = counting
        self.meet()
        model = load(Path(self.model), store=self.stores)
        ids = torch.arange(18).reshape(2, 9) % 290 + 3
        with torch.no_grad():
            out = model(ids).logits
        if self.holds:
            self.tell("ready", {})
            self.wait_for("look")
            self.tell("seen", self.memory())
            self.wait_for("go")
        self.tell("result", {"packed": len(packed), "sum": float(out.double().sum())})

    def tell(self, name: str, values: dict[str, float]) -> None:
        """Writes a file; whoever waits for it finds all of it."""
        written = Path(self.folder) / f"{name}.tmp"
        written.write_text(json.dumps(values))
        written.rename(Path(self.folder) / name)

    def wait_for(self, name: str) -> dict[str, float]:
        file, deadline = Path(self.folder) / name, time.monotonic() + 120
        while not file.exists():
            assert time.monotonic() < deadline, f"no {name}:\n{output(self.folder)}"
            time.sleep(0.01)
        return json.loads(file.read_text())

    def meet(self) -> None:
        """Waits for the others."""
        meeting, deadline = Path(f"{self.stores}-met"), time.monotonic() + 120
        meeting.mkdir(exist_ok=True)
        (meeting / str(os.getpid())).touch()
        while len(list(meeting.iterdir())) < self.together:
            assert time.monotonic() < deadline, "the others do not come"
            time.sleep(0.01)

    def memory(self) -> dict[str, float]:
        """What the mapped store takes of this process, and of it alone."""
        total = {"Pss": 0, "Rss": 0}
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            name, _, rest = line.partition(":")
            if "-" in line.split(" ")[0] and ":" not in line.split(" ")[0]:
                inside = line.endswith(".safetensors") and self.stores in line
            elif inside and name in total:
                total[name] += int(rest.split()[0]) * 1024
        return {"pss": total["Pss"], "rss": total["Rss"]}


def result(work: Loading, process: BaseProcess) -> dict:
    process.join(120)
    assert process.exitcode == 0, output(work.folder)[-3000:]
    return work.wait_for("result")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny model")
    build("qwen3_moe").save_pretrained(folder)
    return folder


def load(folder: Path, **settings) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=HybridExpertsConfig(**settings), dtype=torch.float32
    ).eval()


def stores_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_eight_builders_build_once(model: Path, tmp_path: Path) -> None:
    works = [Loading(str(model), str(tmp_path), together=8) for _ in range(8)]
    results = [result(w, p) for w, p in [(work, start(work)) for work in works]]
    assert sorted(r["packed"] for r in results) == [0] * 7 + [2]
    assert len({r["sum"] for r in results}) == 1
    assert len(stores_in(tmp_path)) == 1 and not list(tmp_path.glob("*.tmp-*"))


def test_a_killed_builder_leaves_nothing_that_harms(model: Path, tmp_path: Path) -> None:
    code, _ = finish(Loading(str(model), str(tmp_path), dies=True))
    assert code == -signal.SIGKILL
    assert stores_in(tmp_path) == [] and len(list(tmp_path.glob("*.tmp-*"))) == 1
    work = Loading(str(model), str(tmp_path))
    assert result(work, start(work))["packed"] == 2
    assert len(stores_in(tmp_path)) == 1 and not list(tmp_path.glob("*.tmp-*"))


def test_two_processes_share_one_copy(model: Path, tmp_path: Path) -> None:
    finish(Loading(str(model), str(tmp_path)))
    holders = [Loading(str(model), str(tmp_path), holds=True) for _ in range(2)]
    processes = [start(holder) for holder in holders]
    for holder in holders:
        holder.wait_for("ready")
    seen = []
    for holder in holders:
        holder.tell("look", {})
        seen.append(holder.wait_for("seen"))
    for holder, process in zip(holders, processes, strict=True):
        holder.tell("go", {})
        result(holder, process)
    for one in seen:
        assert one["rss"] > 100_000
        # This test's own process may map the file too; each of n has an nth.
        assert one["pss"] < 0.6 * one["rss"]


def test_a_full_disk_is_explained_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    code, err = finish(Loading(str(model), str(tmp_path), limit=100_000))
    assert code == 1
    assert "the disk is full or a limit on file sizes" in err and "store: memory" in err
    assert stores_in(tmp_path) == [] and not list(tmp_path.glob("*.tmp-*"))


def test_disk_space_is_checked_before(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(StoreError, match=r"need 0\.\d+ GB, 0\.00 GB are free"):
        load(model, store=str(tmp_path))
    assert not list(tmp_path.glob("*.safetensors*tmp*"))


def test_a_folder_that_cannot_be_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Named where the user asked for it; where we chose it, memory does."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="set `store:` to a folder that can be written"):
        load(model, store=str(tmp_path / "file" / "stores"))
    monkeypatch.setenv("KT_SFT_STORE", str(tmp_path / "file" / "stores"))
    with caplog.at_level("WARNING"):
        assert hybrid_experts_of(load(model))
    assert "Packing in memory for now" in caplog.text


def test_memory_and_mapped_and_copied_are_the_same(model: Path, tmp_path: Path) -> None:
    models = [
        load(model, store="memory"),
        load(model, store=str(tmp_path)),
        load(model, store=str(tmp_path), resident=True),
    ]
    assert len(stores_in(tmp_path)) == 1
    ids = torch.arange(9).reshape(1, 9) + 3
    with torch.no_grad():
        outputs = [m(ids).logits for m in models]
    for path, module in hybrid_experts_of(models[0]).items():
        for other in models[1:]:
            there = hybrid_experts_of(other)[path].weights
            assert torch.equal(module.weights.unpack(5, "down_proj"), there.unpack(5, "down_proj"))
    assert all(torch.allclose(outputs[0], o, atol=1e-5) for o in outputs[1:])


def test_memory_nodes_get_copies_of_their_part(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pretended nodes on the same CPUs; intermediate size 72: channels 0 to 63, and 8 more."""
    cpus = os.sched_getaffinity(0)
    whole = load(model, store=str(tmp_path), numa="off")
    monkeypatch.setattr(choose, "numa_nodes", lambda: [cpus, cpus])
    split = load(model, store=str(tmp_path), threads=2)
    assert len(stores_in(tmp_path)) == 1
    ids = torch.arange(9).reshape(1, 9) + 3
    for path, module in hybrid_experts_of(split).items():
        assert isinstance(module.weights, NodeExperts) and len(module.weights.parts) == 2
        there = hybrid_experts_of(whole)[path].weights
        for p in module.shape.projections:
            assert torch.equal(module.weights.unpack(4, p), there.unpack(4, p))
    with torch.no_grad():
        assert torch.allclose(split(ids).logits, whole(ids).logits, atol=2e-3)
    mapped = load(model, store=str(tmp_path), threads=2, resident=False)
    assert not isinstance(hybrid_experts_of(mapped)[path].weights, NodeExperts)
    monkeypatch.setattr(placing, "available_memory_bytes", lambda: 1000)
    with pytest.raises(StoreError, match="set numa: off"):
        load(model, store=str(tmp_path), threads=2)


def test_another_checkpoint_or_format_is_another_store(model: Path, tmp_path: Path) -> None:
    """The same names, sizes, headers and times: one value differs."""
    copy, stores = tmp_path / "copy", tmp_path / "stores"
    shutil.copytree(model, copy)
    load(model, store=str(stores))
    load(copy, store=str(stores))
    assert len(stores_in(stores)) == 2  # other names of the folder: other names of the file
    file = copy / "model.safetensors"
    before = file.stat()
    tensors = load_file(file)
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[key][5, 7] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    changed = load(copy, store=str(stores))
    assert len(stores_in(stores)) == 3
    got = hybrid_experts_of(changed)["model.layers.1.mlp.experts"].weights.unpack(3, "up_proj")
    assert abs(float(got[5, 7]) - float(tensors[key][5, 7])) < 0.05
    load(copy, store=str(stores), weights="bf16")
    assert len(stores_in(stores)) == 4


def test_digests_are_remembered_and_forgotten(tmp_path: Path) -> None:
    file, notes = tmp_path / "a.safetensors", tmp_path / "notes"
    file.write_bytes(b"x" * 1000)
    time.sleep(0.15)
    first = checkpoint_identity([file], notes)
    (note,) = notes.iterdir()
    known = json.loads(note.read_text())
    note.write_text(json.dumps({**known, "digest": "remembered"}))
    assert checkpoint_identity([file], notes)[0]["digest"] == "remembered"
    file.write_bytes(b"y" * 1000)
    other = checkpoint_identity([file], notes)
    assert other[0]["digest"] not in ("remembered", first[0]["digest"])
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint_identity([tmp_path / "none.safetensors"], notes)


def test_a_damaged_store_is_not_replaced_silently(model: Path, tmp_path: Path) -> None:
    load(model, store=str(tmp_path))
    (store,) = stores_in(tmp_path)
    data = bytearray(store.read_bytes())
    data[-100] ^= 4
    store.write_bytes(data)
    with pytest.raises(StoreError, match=r"is damaged: its digest is another; remove the file"):
        load(model, store=str(tmp_path))
    store.unlink()
    load(model, store=str(tmp_path))


def test_a_store_that_is_cut_short_under_a_model(model: Path, tmp_path: Path) -> None:
    """An error in place of a SIGBUS; a copy in memory does not care."""
    mapped, copied = (load(model, store=str(tmp_path), resident=r) for r in (False, True))
    ids = torch.arange(9).reshape(1, 9) + 3
    with torch.no_grad():
        mapped(ids)
        os.truncate(stores_in(tmp_path)[0], 4096)
        with pytest.raises(StoreError, match=r"has 4096 bytes.*cut it short"):
            mapped(ids)
        copied(ids)


def test_pack_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(model), "--weights", "int4", "--out", str(tmp_path)]) == 0
    (store,) = stores_in(tmp_path)
    first = store.stat()
    assert f"store: {tmp_path}" in capsys.readouterr().out
    assert main(["pack", str(model), "--weights", "int4", "--out", str(tmp_path)]) == 0
    assert "was there already" in capsys.readouterr().out
    # A training run finds that very file.
    load(model, store=str(tmp_path), weights="int4")
    assert stores_in(tmp_path) == [store] and store.stat().st_mtime_ns == first.st_mtime_ns
    assert main(["pack", "--info", str(store)]) == 0
    out = capsys.readouterr().out
    assert "2 layers" in out and "int4_g32" in out and "bytes a weight" in out
    assert main(["pack", "--verify", str(store)]) == 0
    data = bytearray(store.read_bytes())
    data[-5] ^= 1
    store.write_bytes(data)
    assert main(["pack", "--verify", str(store)]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert main(["pack"]) == 2 and main(["pack", str(tmp_path)]) == 2
    assert "no config.json there" in capsys.readouterr().err


def test_pack_and_training_agree_on_quantized_checkpoints(model: Path, tmp_path: Path) -> None:
    folder, stores = tmp_path / "fp8", tmp_path / "stores"
    QUANTIZED_FORMATS["fp8_block"].write(model, folder)
    assert main(["pack", str(folder), "--weights", "checkpoint", "--out", str(stores)]) == 0
    load(folder, store=str(stores), weights="checkpoint")
    assert len(stores_in(stores)) == 1


@pytest.fixture
def free_memory(tmp_path: Path) -> Callable[..., int]:
    """Free memory where the machine has 2 GB and `files` is the tree of control groups."""
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:    2000000 kB\n")

    def free(group: str, files: dict[str, str]) -> int:
        for name, text in files.items():
            file = tmp_path / "cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        (tmp_path / "self").write_text(group + "\n")
        return available_memory_bytes(
            meminfo=tmp_path / "meminfo", cgroup_root=tmp_path / "cgroup",
            proc_cgroup=tmp_path / "self",
        )  # fmt: skip

    return free


def test_free_memory_is_that_of_the_container(free_memory: Callable[..., int]) -> None:
    assert free_memory("0::/", {}) == 2_048_000_000
    limited = {"memory.max": "1000000", "memory.current": "400000"}
    assert free_memory("0::/", limited) == 600_000
    # The page cache makes room.
    cache = {"memory.stat": "anon 1\ninactive_file 250000\nactive_file 50000\nfile 300000"}
    assert free_memory("0::/", {**limited, **cache}) == 900_000
    assert free_memory("0::/", {"memory.max": "max"}) == 2_048_000_000


def test_free_memory_of_nested_groups(free_memory: Callable[..., int]) -> None:
    outer = {"a/memory.max": "700000", "a/memory.current": "500000"}
    inner = {"a/b/memory.max": "max", "a/b/memory.current": "1000"}
    assert free_memory("0::/a/b", {**outer, **inner}) == 200_000
    assert free_memory("0::/c", {}) == 2_048_000_000


def test_free_memory_of_a_version_1_group(free_memory: Callable[..., int]) -> None:
    files = {
        "memory/x/memory.limit_in_bytes": "9223372036854771712",
        "memory/x/memory.usage_in_bytes": "500000",
        "memory/x/memory.stat": "inactive_file 7\ntotal_inactive_file 100000\ntotal_active_file 0",
    }
    assert free_memory("4:memory:/x", files) == 2_048_000_000
    files["memory/x/memory.limit_in_bytes"] = "900000"
    assert free_memory("4:memory:/x", files) == 500_000


def test_names_of_stores_are_plain() -> None:
    name = WantedStore("../we ird/..", "int8", {}, [], list).file_name
    assert "/" not in name and not name.startswith(".")


@contextmanager
def without_privileges() -> Iterator[None]:
    """As a user whom the system refuses what it refuses; root is refused nothing."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def let_all_read(*folders: Path) -> None:
    """What pytest has made for its own user only."""
    for folder in folders:
        for path in (*folder.glob("*.json"), *stores_in(folder), folder, *folder.parents):
            if path.is_relative_to(tempfile.gettempdir()) and path != Path(tempfile.gettempdir()):
                path.chmod(0o755)


def owned_by_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    else:
        own = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: own + 1)


def other_model(folder: Path) -> Path:
    """The same shapes and names, other weights."""
    build("qwen3_moe", seed=5).save_pretrained(folder)
    return folder


def planted(model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A folder with the store of another model under the name of this one's, and a right one."""
    other, right, stores = (tmp_path / name for name in ("other", "right", "stores"))
    load(model, store=str(right))
    load(other_model(other), store=str(stores))
    (name,) = stores_in(right)
    (wrong,) = stores_in(stores)
    wrong.rename(stores / name.name)
    return stores, name


def test_a_store_under_another_name_is_not_believed(model: Path, tmp_path: Path) -> None:
    stores, _ = planted(model, tmp_path)
    with pytest.raises(StoreError, match="made from another checkpoint than its name says"):
        load(model, store=str(stores))
    assert main(["pack", str(model), "--out", str(stores)]) == 2


def test_a_store_of_other_layers_is_not_believed(model: Path, tmp_path: Path) -> None:
    """The identity is right, the layers are those of a model with one layer more."""
    load(model, store=str(tmp_path))
    (store,) = stores_in(tmp_path)
    packed = PackedFile(store)
    more = [*packed.layers, replace(packed.layers[0], path="model.layers.9.mlp.experts")]
    writer = StoreWriter(tmp_path / "new", more, packed.identity)
    for layer in more:
        writer.add(layer, packed.weights(layer.path if "9" not in layer.path else more[0].path))
    writer.finish()
    (tmp_path / "new").rename(store)
    with pytest.raises(StoreError, match=r"it holds .*layers\.9.*expected None"):
        load(model, store=str(tmp_path))


def test_what_another_user_planted_is_left_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stores, right = planted(model, tmp_path)
    (wrong,) = stores_in(stores)
    before = wrong.read_bytes()
    owned_by_another(wrong, monkeypatch)
    with caplog.at_level("WARNING"):
        load(model, store=str(stores))
    assert "belongs to another user" in caplog.text
    own = next(s for s in stores_in(stores) if s != wrong)
    assert own.read_bytes() == right.read_bytes() and wrong.read_bytes() == before
    # What proves to be the right one is shared, whoever made it.
    owned_by_another(right, monkeypatch)
    load(model, store=str(right.parent))
    assert stores_in(right.parent) == [right]


def test_notes_of_others_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, notes = tmp_path / "a.safetensors", tmp_path / "notes"
    file.write_bytes(b"x" * 1000)
    time.sleep(0.15)
    first = checkpoint_identity([file], notes)
    (note,) = notes.iterdir()
    text = json.dumps({**json.loads(note.read_text()), "digest": "planted"})
    note.write_text(text)
    note.chmod(0o666)
    assert checkpoint_identity([file], notes) == first
    note.write_text(text)
    assert checkpoint_identity([file], notes)[0]["digest"] == "planted"
    owned_by_another(note, monkeypatch)
    assert checkpoint_identity([file], notes) == first


def test_a_folder_that_may_not_be_searched(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(0o000)
    let_all_read(model, tmp_path)
    monkeypatch.setenv("KT_SFT_STORE", str(closed / "stores"))
    with without_privileges(), caplog.at_level("WARNING"):
        assert hybrid_experts_of(load(model))
        with pytest.raises(StoreFolderError, match="Permission denied; set `store:`"):
            load(model, store=str(closed / "stores"))
    assert "Packing in memory for now" in caplog.text


def test_a_user_without_a_home(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("KT_SFT_STORE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 99999)  # of no entry in passwd
    with caplog.at_level("WARNING"):
        assert hybrid_experts_of(load(model))
    assert "has no home" in caplog.text and "Packing in memory for now" in caplog.text
    with pytest.raises(StoreFolderError, match="set KT_SFT_STORE"):
        default_folder()


def test_a_lock_of_another_user(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that all may write and where each owns what is its own."""
    right = tmp_path / "right"
    load(model, store=str(right))
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    lock = shared / f"{stores_in(right)[0].name}.lock"
    lock.touch(0o644)
    let_all_read(model, tmp_path)
    if os.geteuid() == 0:
        os.chown(lock, 12345, 12345)
    else:
        lock.chmod(0o444)
    with without_privileges():
        load(model, store=str(shared))
    assert stores_in(shared)
