"""Killed, interrupted, poisoned, out of disk: what a training leaves behind always resumes."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from children import finish, output
from tiny_training import (
    STEPS,
    AtStep,
    CrashAt,
    Training,
    adapter,
    curve,
    experts_of,
)
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from kt_sft.errors import CheckpointError
from kt_sft.training.savepoints import (
    MANIFEST,
    checkpoints_of,
    damage,
    newest_valid,
    require_writable,
    rotate,
    sweep,
    write_manifest,
)

SAVING = "kt_sft.training.saving"
FILES = "kt_sft.training.savepoints"
# Where a saving can be cut off, in the order of its steps.
CRASHES = {
    "before the folder": CrashAt(FILES, "StagedCheckpoint.open"),
    "folder made": CrashAt(FILES, "StagedCheckpoint.open", after=True),
    "adapter written": CrashAt("transformers.trainer", "Trainer.save_model", after=True),
    "optimizer written": CrashAt(
        "transformers.trainer", "Trainer._save_optimizer_and_scheduler", after=True
    ),
    "random state written": CrashAt("transformers.trainer", "Trainer._save_rng_state", after=True),
    "all written": CrashAt(FILES, "StagedCheckpoint.publish"),
    "first file synced": CrashAt("kt_sft.files.durable", "sync", after=True),
    "before the manifest": CrashAt("kt_sft.files.durable", "sync", after=True),
    "manifest written": CrashAt(FILES, "write_manifest", after=True),
    "before the name": CrashAt(FILES, "Path.rename", count=2),
    "named": CrashAt(FILES, "Path.rename", count=2, after=True),
    "published": CrashAt(FILES, "StagedCheckpoint.publish", after=True),
    "before the rotation": CrashAt(SAVING, "rotate"),
    "in the rotation": CrashAt(FILES, "shutil.rmtree", count=2),
    "rotated": CrashAt(SAVING, "rotate", after=True),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, text = finish(Training(str(folder)))
    assert code == 0, text
    return folder


def assert_resumes(folder: Path, whole: Path) -> None:
    """Every checkpoint that is visible is whole, and the rest of the run is the same to the bit."""
    for checkpoint in checkpoints_of(folder):
        assert damage(checkpoint) is None
        assert (checkpoint / MANIFEST).is_file(), "a folder with the final name is complete"
    found = newest_valid(folder)
    code, text = finish(Training(str(folder), resume=found is not None))
    assert code == 0, text
    assert curve(folder) == curve(whole)
    assert adapter(folder) == adapter(whole)
    assert list(folder.glob(".checkpoint-*")) == []


@pytest.mark.parametrize("name", CRASHES)
def test_killed_at_each_point_of_saving(name: str, whole: Path, tmp_path: Path) -> None:
    """At the third checkpoint, so that the rotation of the first one is part of it."""
    point = CRASHES[name]
    files = len(list((whole / "checkpoint-8").iterdir())) - 1
    # Synced are each file and their folder, the manifest and its folder, the run's folder.
    # The third save is the first one that rotates.
    per_save = {"Path.rename": 2, "sync": files + 4}
    in_save = files if name == "before the manifest" else point.count
    count = 2 * per_save.get(point.function, 1) + in_save
    crash = CrashAt(point.module, point.function, point.after, count)
    code, text = finish(Training(str(tmp_path), crash=crash))
    assert code == -signal.SIGKILL, f"{name} was not reached:\n{text}"
    assert len(checkpoints_of(tmp_path)) >= 2
    assert_resumes(tmp_path, whole)


@dataclass
class KillAfterCalls:
    """Ends the training some calls after its beginning, as SIGKILL does, and a moment later.

    Calls, and not seconds, so that it falls into the training on every machine; the moment, so that
    it falls into compiled code too. SIGALRM is not handled by anybody.
    """

    calls: int
    seconds: float

    def __call__(self, model: nn.Module, trainer: Trainer) -> None:
        left = [self.calls]

        def count(*unused: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                sys.setprofile(None)
                signal.setitimer(signal.ITIMER_REAL, self.seconds)

        sys.setprofile(count)


class CountCalls(TrainerCallback):
    """Writes at the end of a training how many calls there were."""

    made = 0

    def __call__(self, model: nn.Module, trainer: Trainer) -> None:
        trainer.add_callback(self)
        sys.setprofile(self.count)

    def count(self, *unused: object) -> None:
        self.made += 1

    def on_train_end(
        self, args: TrainingArguments, state: object, control: object, **more: Any
    ) -> None:
        sys.setprofile(None)
        Path(args.output_dir, "calls").write_text(str(self.made))


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Of a whole training, its last checkpoint with it."""
    folder = tmp_path_factory.mktemp("counted")
    code, text = finish(Training(str(folder), change=CountCalls()))
    assert code == 0, text
    return int((folder / "calls").read_text())


def kill_at_random(folder: Path, whole: Path, calls: int, seed: int) -> None:
    draw = random.Random(seed)
    # The count is not exact: what is left of the training is enough to be killed in.
    kill = KillAfterCalls(draw.randrange(1, calls * 19 // 20), draw.uniform(1e-6, 3e-3))
    code, text = finish(Training(str(folder), change=kill))
    assert code == -signal.SIGALRM, text
    assert_resumes(folder, whole)


def test_killed_at_random_times(whole: Path, calls: int, tmp_path: Path) -> None:
    for seed in range(6):
        kill_at_random(tmp_path / str(seed), whole, calls, seed)


@pytest.mark.slow
def test_killed_at_many_random_times(whole: Path, calls: int, tmp_path: Path) -> None:
    """60 kills, wherever they fall."""
    for seed in range(60):
        kill_at_random(tmp_path / str(seed), whole, calls, 1000 + seed)


def test_a_finished_run_that_is_resumed_trains_no_more(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "adapter_model.safetensors").unlink()  # killed between the last checkpoint and the end
    assert_resumes(run, whole)


def test_killed_again_and_again(whole: Path, tmp_path: Path) -> None:
    """One run that gets through although it is killed in each saving."""
    for _ in range(3):
        crash = CrashAt(FILES, "StagedCheckpoint.publish", count=2)
        resume = newest_valid(tmp_path) is not None
        code, _ = finish(Training(str(tmp_path), resume=resume, crash=crash))
        assert code == -signal.SIGKILL
    assert_resumes(tmp_path, whole)


# Damage


def damaged_copies(whole: Path, folder: Path) -> list[tuple[str, Path]]:
    """Copies of a run whose newest checkpoint is damaged in one way each."""
    copies = []

    def copy(name: str) -> Path:
        shutil.copytree(whole, folder / name)
        copies.append((name, folder / name))
        return folder / name / "checkpoint-8"

    size = (whole / "checkpoint-8" / "adapter_model.safetensors").stat().st_size
    for cut in (0, 7, 8, 100, size // 2, size - 1):
        file = copy(f"cut at {cut}") / "adapter_model.safetensors"
        os.truncate(file, cut)
    for name in ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json"):
        for place in (0.01, 0.5, 0.99):
            file = copy(f"{name} flipped at {place}") / name
            content = bytearray(file.read_bytes())
            content[int(place * len(content))] ^= 1
            file.write_bytes(content)
    file = copy("zero tail") / "optimizer.pt"
    content = file.read_bytes()
    file.write_bytes(content[:-512] + bytes(512))
    (copy("missing") / "optimizer.pt").unlink()
    (copy("manifest cut") / MANIFEST).write_text("{")
    (copy("manifest nested") / MANIFEST).write_text('{"a":' * 100_000)
    (copy("state nested") / MANIFEST).unlink()
    (copies[-1][1] / "checkpoint-8" / "trainer_state.json").write_text("[" * 100_000)
    change_manifest(copy("manifest of the future"), lambda m: m.update(version=2))
    change_manifest(copy("manifest without version"), lambda m: m.pop("version"))
    change_manifest(copy("manifest of nothing"), lambda m: m.update(files={}))
    change_manifest(copy("a file that is not listed"), lambda m: m["files"].pop("scheduler.pt"))
    # What was saved badly has the digest that was taken of it.
    bad = copy("optimizer that cannot be loaded")
    os.truncate(bad / "optimizer.pt", 3000)
    write_manifest(bad)
    return copies


def change_manifest(checkpoint: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    change(manifest)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def test_damage_is_named_and_passed_over(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, run in damaged_copies(whole, tmp_path):
        caplog.clear()
        assert newest_valid(run) == str(run / "checkpoint-6"), name
        assert "checkpoint-8 is damaged and is passed over" in caplog.text


def test_a_pickle_in_place_of_the_optimizer_runs_nothing(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with (run / "checkpoint-8" / "optimizer.pt").open("wb") as file:
        pickle.dump(_Bomb(str(tmp_path / "exploded")), file)
    write_manifest(run / "checkpoint-8")
    assert newest_valid(run) == str(run / "checkpoint-6")
    assert not (tmp_path / "exploded").exists()


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(self.path),)


def test_an_interrupted_removal_does_not_stop_the_next(whole: Path, tmp_path: Path) -> None:
    """Its left-over has files in it, which a rename does not replace."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    left = run / ".checkpoint-6.tmp-removed"
    left.mkdir()
    (left / "optimizer.pt").touch()
    rotate(run / "checkpoint-8", 1, None)
    assert [p.name for p in checkpoints_of(run)] == ["checkpoint-8"]
    sweep(run)
    assert not list(run.glob(".checkpoint*"))


def test_what_cannot_be_removed_is_warned_of(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    rotate(run / "checkpoint-8", 1, None)
    assert len(checkpoints_of(run)) == 2
    assert "checkpoint-6 is not removed, as save_total_limit asks" in caplog.text


def test_sweeping_does_not_follow_links(tmp_path: Path) -> None:
    other, run = tmp_path / "other", tmp_path / "run"
    (other / "replaced").mkdir(parents=True)
    run.mkdir()
    (run / ".checkpoint-8.tmp-x").symlink_to(other)
    sweep(run)
    assert [p.name for p in other.iterdir()] == ["replaced"]
    assert not (run / "checkpoint-8").exists()


def test_an_output_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_writable(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file is not a folder, so that nothing would be"):
        require_writable(tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be written by this user.*set output_dir"):
        require_writable(tmp_path / "a" / "b")


def test_a_damaged_checkpoint_that_is_named_is_refused(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    os.truncate(run / "checkpoint-8" / "optimizer.pt", 1000)
    named = str(run / "checkpoint-8")
    code, text = finish(Training(str(run), arguments={"resume_from": named}))
    assert code == 1
    assert "optimizer.pt: got 1000 bytes, expected" in text
    assert f"resume from {run / 'checkpoint-6'}, which is whole" in text


def test_no_whole_checkpoint_is_an_error_and_not_a_new_start(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for checkpoint in checkpoints_of(run):
        (checkpoint / "scheduler.pt").unlink()
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole"):
        newest_valid(run)


def test_checkpoints_of_stock_programs_count_when_they_can_be_read(
    whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "checkpoint-8" / MANIFEST).unlink()
    assert newest_valid(run) == str(run / "checkpoint-8")
    os.truncate(run / "checkpoint-8" / "adapter_model.safetensors", 5000)
    assert newest_valid(run) == str(run / "checkpoint-6")


def test_a_manifest_cannot_point_outside(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    manifest = json.loads((run / "checkpoint-8" / MANIFEST).read_text())
    manifest["files"]["../checkpoint-6/optimizer.pt"] = {"size": 1, "digest": "0"}
    (run / "checkpoint-8" / MANIFEST).write_text(json.dumps(manifest))
    assert "lies outside" in (damage(run / "checkpoint-8") or "")


def test_the_staging_folder_of_a_living_run_is_left_alone(tmp_path: Path) -> None:
    from kt_sft.training.savepoints import StagedCheckpoint

    mine = StagedCheckpoint(tmp_path, "checkpoint-4", "living")
    mine.open()
    dead = tmp_path / ".checkpoint-2.tmp-dead"
    dead.mkdir()
    sweep(tmp_path)
    assert mine.folder.is_dir() and not dead.exists()
    mine.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_rotation_that_is_cut_off_leaves_no_half_of_a_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)

    def killed(folder: Path, ignore_errors: bool) -> None:
        next(p for p in folder.iterdir() if p.is_file()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kt_sft.training.savepoints.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            rotate(run / "checkpoint-8", 1, None)
    assert [p.name for p in checkpoints_of(run)] == ["checkpoint-8"]
    sweep(run)
    assert list(run.glob(".*")) == []


def test_the_best_and_the_newest_checkpoint_are_kept(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.copytree(run / "checkpoint-6", run / "checkpoint-2")
    rotate(run / "checkpoint-8", 0, None)
    assert len(checkpoints_of(run)) == 3
    rotate(run / "checkpoint-8", 1, str(run / "checkpoint-2"))
    assert [p.name for p in checkpoints_of(run)] == ["checkpoint-8", "checkpoint-2"]


def test_a_checkpoint_moved_aside_comes_back(whole: Path, tmp_path: Path) -> None:
    """Killed between the two renames that replace a checkpoint of the same step."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    aside = run / ".checkpoint-8.tmp-dead"
    aside.mkdir()
    (run / "checkpoint-8").rename(aside / "replaced")
    sweep(run)
    assert newest_valid(run) == str(run / "checkpoint-8")


# A full disk


class SmallFiles:
    """No file may grow over a limit from a step on."""

    def __init__(self, step: int, limit: int) -> None:
        self.step, self.limit = step, limit

    def __call__(self, model: nn.Module, trainer: Trainer) -> None:
        def shrink(model: nn.Module) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))

        trainer.add_callback(AtStep(self.step, shrink))


@pytest.mark.parametrize("limit", [20_000, 250_000], ids=["adapter", "optimizer"])
def test_a_full_disk_keeps_the_former_checkpoint(limit: int, whole: Path, tmp_path: Path) -> None:
    code, text = finish(Training(str(tmp_path), change=SmallFiles(5, limit)))
    assert code == 1
    assert "checkpoint-6: not saved: the disk is full or a limit" in text
    assert "older checkpoints are whole" in text
    assert [p.name for p in checkpoints_of(tmp_path)] == ["checkpoint-4", "checkpoint-2"]
    assert_resumes(tmp_path, whole)


def no_space(model: nn.Module, trainer: Trainer) -> None:
    from kt_sft.training import savepoints as checkpoints

    def usage(path: object) -> object:
        return type("Usage", (), {"free": 1 << 20})

    trainer.add_callback(AtStep(4, lambda model: setattr(checkpoints.shutil, "disk_usage", usage)))


def test_space_is_looked_for_before_anything_is_written(tmp_path: Path, whole: Path) -> None:
    code, text = finish(Training(str(tmp_path), change=no_space))
    assert code == 1
    assert "a checkpoint needs" in text and "nothing was written" in text
    assert [p.name for p in checkpoints_of(tmp_path)] == ["checkpoint-2"]
    assert_resumes(tmp_path, whole)


# Signals


class SignalAt:
    """The process signals itself in the middle of something."""

    def __init__(self, place: str, number: int, times: int = 1, pause: float = 0.0) -> None:
        self.place, self.number, self.times, self.pause = place, number, times, pause

    def send(self, *unused: object) -> None:
        for i in range(self.times):
            time.sleep(self.pause if i else 0)
            os.kill(os.getpid(), self.number)

    def __call__(self, model: nn.Module, trainer: Trainer) -> None:
        if self.place == "save":
            stock = trainer._save_optimizer_and_scheduler

            def saving(folder: str) -> None:
                trainer._save_optimizer_and_scheduler = stock  # type: ignore[method-assign]
                self.send()
                stock(folder)

            trainer._save_optimizer_and_scheduler = saving  # type: ignore[method-assign]
            return
        experts = experts_of(model)
        hook = {
            "forward": experts.register_forward_hook,
            "backward": experts.register_full_backward_hook,
        }[self.place]
        # The hook of step 3: one call in each step without checkpointing.
        calls = [0]

        def count(*unused: object) -> None:
            calls[0] += 1
            if calls[0] == 3:
                self.send()

        hook(count)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", ["forward", "backward", "save"])
def test_a_signal_stops_after_the_step(
    place: str, number: int, whole: Path, tmp_path: Path
) -> None:
    code, text = finish(Training(str(tmp_path), change=SignalAt(place, number)))
    assert code == 128 + number, text
    assert "finishing this step, then saving and stopping" in text
    # Within step 3, or while step 2 is saved, after which step 3 is the one that is finished.
    assert newest_valid(tmp_path) == str(tmp_path / "checkpoint-3")
    code, text = finish(Training(str(tmp_path), resume=True))
    assert code == 0, text
    assert curve(tmp_path) == curve(whole) and adapter(tmp_path) == adapter(whole)


def test_the_second_signal_stops_at_once(whole: Path, tmp_path: Path) -> None:
    twice = SignalAt("forward", signal.SIGTERM, times=2, pause=2.2)
    code, _ = finish(Training(str(tmp_path), change=twice))
    assert code == -signal.SIGTERM
    assert newest_valid(tmp_path) == str(tmp_path / "checkpoint-2")
    assert_resumes(tmp_path, whole)


def test_one_request_that_arrives_several_times(tmp_path: Path) -> None:
    code, text = finish(
        Training(str(tmp_path), change=SignalAt("forward", signal.SIGTERM, times=3, pause=0.1))
    )
    assert code == 128 + signal.SIGTERM, text
    assert newest_valid(tmp_path) == str(tmp_path / "checkpoint-3")


# NaN and Inf


def poison(what: str, model: nn.Module) -> None:
    experts = experts_of(model)
    if what.startswith("lora"):
        name = {"lora A": "lora_A", "lora B": "lora_B"}[what]
        with torch.no_grad():
            # Of every expert: the first one that is routed to is named.
            getattr(experts.gate_proj, name)["default"][:, 0, 0] = float("nan")
    elif what == "hidden":
        experts.register_forward_pre_hook(
            lambda m, inputs: (_poisoned_row(inputs[0], 3), *inputs[1:])
        )
    elif what == "routing":
        experts.register_forward_pre_hook(
            lambda m, inputs: (*inputs[:2], _poisoned_row(inputs[2], 4))
        )
    elif what == "gradient":
        experts.register_full_backward_pre_hook(lambda m, grads: (_poisoned_row(grads[0], 6),))
    elif what == "attention":
        with torch.no_grad():
            first = next(
                p for n, p in model.named_parameters() if "layers.0" in n and "o_proj" in n
            )
            first.fill_(float("inf"))


def _poisoned_row(tensor: torch.Tensor, row: int) -> torch.Tensor:
    copy = tensor.clone()
    copy[row] = float("nan")
    return copy


class PoisonAt:
    """One thing becomes NaN when step 4 begins."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, model: nn.Module, trainer: Trainer) -> None:
        trainer.add_callback(AtStep(4, lambda m: poison(self.what, m)))


@pytest.mark.parametrize(
    "what, place",
    [
        ("lora A", "layers.1.mlp.experts: in gate_proj.lora_A of expert 0"),
        ("lora B", "layers.1.mlp.experts: in gate_proj.lora_B of expert 0"),
        ("hidden", "layers.1.mlp.experts: in the hidden states that reach the experts, token 3"),
        ("routing", "layers.1.mlp.experts: in the routing weights that reach the experts, token 4"),
        ("gradient", "layers.1.mlp.experts: in the gradient of its output, token 6"),
        ("attention", "layers.0.mlp.experts: in the hidden states that reach the experts, token"),
    ],
)
def test_nan_is_named_and_not_saved(what: str, place: str, whole: Path, tmp_path: Path) -> None:
    code, text = finish(Training(str(tmp_path), change=PoisonAt(what)))
    assert code == 1
    assert f"step 4: NaN or Inf, first seen at model.{place}" in text
    assert [p.name for p in checkpoints_of(tmp_path)] == ["checkpoint-2"]
    assert_resumes(tmp_path, whole)


def poison_after_the_step(model: nn.Module, trainer: Trainer) -> None:
    """A parameter goes bad where no gradient tells, as under an optimizer that overflows."""
    stock = trainer.create_optimizer

    def create(*args: object) -> object:
        optimizer = stock(*args)
        step = optimizer.step
        calls = [0]

        def stepping(*a: object, **k: object) -> object:
            calls[0] += 1
            result = step(*a, **k)
            if calls[0] == 4:
                with torch.no_grad():
                    next(p for p in model.parameters() if p.requires_grad).fill_(float("inf"))
            return result

        optimizer.step = stepping
        return optimizer

    trainer.create_optimizer = create  # type: ignore[method-assign]


def test_a_poisoned_parameter_is_not_saved(whole: Path, tmp_path: Path) -> None:
    code, text = finish(Training(str(tmp_path), change=poison_after_the_step))
    assert code == 1
    assert "step 4: " in text and "holds NaN or Inf, so that nothing is saved" in text
    assert_resumes(tmp_path, whole)


# Processes


def test_workers_of_the_data_loader(whole: Path, tmp_path: Path) -> None:
    """They are forked while the pool of the experts exists; the curve stays the same."""
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    code, text = finish(Training(str(tmp_path), arguments=workers))
    assert code == 0, text
    assert curve(tmp_path) == curve(whole)


def test_activations_do_not_change_the_curve(whole: Path, tmp_path: Path) -> None:
    for kept in ("keep", "recompute"):
        arguments = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        }
        run = tmp_path / kept
        code, text = finish(Training(str(run), arguments=arguments, experts={"activations": kept}))
        assert code == 0, text
        assert curve(run) == curve(whole) and len(curve(run)) == STEPS
        assert f"'experts_forwards_per_backward': '{1 if kept == 'keep' else 2}'" in output(run)
