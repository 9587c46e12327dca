"""Several ranks against one rank with the same global batch, and what goes wrong with them.

The ranks are forked with the variables that torchrun sets; the test of a signal to the launcher
runs LLaMA-Factory's own torchrun.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_runs import FaultAtStep, SlowAtItsEnd, free_port, ranks_of, run_together
from llamafactory_runs import BIN, Workplace, effective_workplace, environment
from safetensors.torch import load_file

from kt_sft.plugin.launching import LauncherSubprocess
from kt_sft.training.savepoints import checkpoints_of, newest_valid

ONE_RANK = {
    "kt_sft": {"weights": "int8"}, "max_steps": 4, "lora_target": "all", "lora_dropout": 0.0,
    "disable_shuffling": True,
}  # fmt: skip
SETTINGS: dict[str, Any] = {**ONE_RANK, "ddp_backend": "gloo"}
CONFIGS = Path(__file__).parents[2] / "configs"
FSDP2 = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3MoeDecoderLayer"]},
}
# How the work of the ranks is put together; ZeRO by a stage and where its optimizer is.
MODES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero1": {"deepspeed": (1, None)},
    "zero2": {"deepspeed": (2, None)},
    "zero2 offload": {"deepspeed": (2, {"device": "cpu"})},
    "fsdp2": FSDP2,
    # Each rank computes its experts by the arithmetic of an accelerator; see `on_a_twin`.
    "ddp device": {"kt_sft": {"weights": "int8", "schedule": "device"}},
    "zero2 device": {
        "kt_sft": {"weights": "int8", "schedule": "device"}, "deepspeed": (2, None),
    },
}  # fmt: skip
# The quick ones; the others run with the slow tests.
QUICK = [("ddp", 2), ("zero2", 2), ("ddp", 4), ("ddp device", 2)]
ALL = [(mode, ranks) for mode in MODES for ranks in (2, 4)]


def on_a_twin() -> None:
    """In a rank: the CPU is taken for an accelerator."""
    from kt_sft.engines import policies
    from kt_sft.scheduling.assignment import AllOnDevice

    policies.HostOnly = AllOnDevice  # type: ignore[assignment, misc]


def train(
    place: Workplace,
    name: str,
    ranks: int = 2,
    faults: dict[int, Callable[[], None]] | None = None,
    seconds: float = 120,
    patience: float = 30,
    **settings: Any,
) -> tuple[list[int], str]:
    """(exit codes, output) of a run of several ranks, some of them with a fault."""
    recipe = place.recipe(name, per_device_train_batch_size=4 // ranks, **settings)
    return run_together(ranks_of([str(recipe)] * ranks, ranks, faults or {}), seconds, patience)


def train_whole(place: Workplace, name: str, ranks: int = 2, **settings: Any) -> str:
    """The output of a run that every rank ends well."""
    codes, text = train(place, name, ranks, **settings)
    assert codes == [0] * ranks, text[-6000:]
    return text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = effective_workplace(tmp_path_factory.mktemp("ranks"))
    place.train("one", **ONE_RANK)
    return place


def settings_of(place: Workplace, mode: str) -> dict[str, Any]:
    settings = {**SETTINGS, **MODES[mode]}
    if "deepspeed" in settings:
        stage, offload = settings["deepspeed"]
        config = json.loads((CONFIGS / "ds_z2.json").read_text())
        config["zero_optimization"]["stage"] = stage
        if offload:
            config["zero_optimization"]["offload_optimizer"] = offload
        file = place.folder / f"{mode.replace(' ', '-')}.json"
        file.write_text(json.dumps(config))
        settings["deepspeed"] = str(file)
    return settings


@pytest.mark.parametrize(
    "mode, ranks",
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in ALL],
)
def test_ranks_equal_one(mode: str, ranks: int, place: Workplace) -> None:
    name = f"{mode.replace(' ', '-')}-{ranks}"
    faults = {rank: on_a_twin for rank in range(ranks)} if "device" in mode else None
    text = train_whole(place, name, ranks, faults=faults, **settings_of(place, mode))
    for a, b in zip(place.logs("one"), place.logs(name), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-3 * a["loss"]
        # Adam does not see the size of a gradient, the logged norm does: a mean, not a sum.
        assert abs(a["grad_norm"] - b["grad_norm"]) < 0.02 * a["grad_norm"]
    one, several = (
        load_file(place.folder / run / "adapter_model.safetensors") for run in ("one", name)
    )
    assert set(one) == set(several)
    moved = [k for k in one if "lora_B" in k and one[k].abs().max() > 1e-4]
    assert len([k for k in moved if ".experts." in k]) > 20
    for key in moved:
        # Adam divides by the size of a gradient, so noise shows where it is next to nothing.
        assert float((one[key] - several[key]).norm() / one[key].norm()) < 0.2, key
    # One store, mapped by all of them, and no rank takes the others' cores.
    threads = [int(n) for n in re.findall(r"(\d+) threads", text)]
    assert threads, "no rank says how many threads it has"
    assert all(n <= max(1, (os.cpu_count() or 1) // ranks) for n in threads)


def test_zero3_is_refused_with_the_reason(place: Workplace) -> None:
    settings = settings_of(place, "zero2")
    config = json.loads(Path(settings["deepspeed"]).read_text())
    config["zero_optimization"] = {"stage": 3}
    file = place.folder / "zero3.json"
    file.write_text(json.dumps(config))
    codes, text = train(place, "zero3", **{**settings, "deepspeed": str(file)})
    assert codes == [1, 1]
    assert "DeepSpeed ZeRO-3 partitions parameters while the model is built" in text
    assert "use ZeRO-2" in text


def test_two_machines(place: Workplace) -> None:
    """Two ranks that meet at one port and are each the first of a machine."""
    recipes = [
        str(place.recipe(f"node-{rank}", per_device_train_batch_size=2, **SETTINGS))
        for rank in range(2)
    ]
    codes, text = run_together(ranks_of(recipes, per_machine=1))
    assert codes == [0, 0], text[-6000:]
    assert text.count("3 layers of 8 experts as int8") == 2, "the first of a machine speaks"
    for a, b in zip(place.losses("one"), place.losses("node-0"), strict=True):
        assert abs(a - b) < 1e-3 * a


# What goes wrong


@pytest.mark.parametrize(
    "number, said",
    [(None, "data of this rank is broken"), (signal.SIGKILL, "")],
    ids=["raises", "killed"],
)
def test_one_rank_ends_all(number: int | None, said: str, place: Workplace) -> None:
    """The other one waits for its gradients, and does not keep the run from ending."""
    name = f"rank-{number}"
    codes, text = train(place, name, faults={1: FaultAtStep(3, number)}, **SETTINGS)
    assert codes[1] == (1 if number is None else -number) and codes[0] != 0
    assert said in text
    assert not (place.folder / name / "adapter_model.safetensors").exists()


def test_the_launcher_fails_with_its_ranks() -> None:
    """What stands for `subprocess` in LLaMA-Factory's launcher reports as that does."""
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    launcher = LauncherSubprocess()
    with pytest.raises(subprocess.CalledProcessError) as failed:
        launcher.run(command, env=dict(os.environ), check=True)
    assert failed.value.returncode == 3
    assert launcher.run(command, env=dict(os.environ), check=False).returncode == 3


SAVES = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 3, "max_steps": 6}


@pytest.mark.parametrize("mode", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_killed_run_of_two_ranks_resumes_to_the_bit(mode: str, place: Workplace) -> None:
    settings = {**settings_of(place, mode), **SAVES, "lora_dropout": 0.1,
                "overwrite_output_dir": False}  # fmt: skip
    whole, name = f"whole-{mode}", f"killed-{mode}"
    train_whole(place, whole, **settings)
    codes, _ = train(place, name, faults={0: FaultAtStep(3, signal.SIGKILL)}, **settings)
    assert codes[0] == -signal.SIGKILL
    assert newest_valid(place.folder / name) == str(place.folder / name / "checkpoint-2")
    train_whole(place, name, **settings)
    want, got = ([x.hex() for x in place.losses(run)] for run in (whole, name))
    assert len(want) == 6 and got == want
    adapters = [
        load_file(place.folder / run / "adapter_model.safetensors") for run in (whole, name)
    ]
    assert adapters[0].keys() == adapters[1].keys() and len(adapters[0]) > 20
    assert all(adapters[0][key].equal(adapters[1][key]) for key in adapters[0])


def test_a_signal_to_one_rank_stops_all_after_the_same_step(place: Workplace) -> None:
    name = "one-signalled"
    settings = {**SETTINGS, **SAVES, "save_steps": 1000, "max_steps": 5000}
    # The launcher ends who is still there when the first one has ended.
    faults = {0: SlowAtItsEnd(report=8.0, exit=1.0), 1: FaultAtStep(3, signal.SIGTERM)}
    codes, text = train(place, name, faults=faults, patience=6, **settings)
    assert codes == [128 + signal.SIGTERM] * 2, text[-6000:]
    assert "finishing this step, then saving and stopping" in text
    assert newest_valid(place.folder / name) == str(place.folder / name / "checkpoint-3")
    assert (place.folder / name / "report.html").is_file()


def test_a_signal_to_the_launcher_saves_and_stops(place: Workplace) -> None:
    """SIGTERM to `llamafactory-cli` alone, as `kill` and most schedulers send it."""
    name = "stopped"
    recipe = place.recipe(
        name, per_device_train_batch_size=2, **{**SETTINGS, **SAVES, "max_steps": 5000,
                                                "save_steps": 1000},
    )  # fmt: skip
    with (place.folder / "stopped.log").open("w") as sink:
        launcher = subprocess.Popen(
            [str(BIN / "llamafactory-cli"), "train", str(recipe)],
            env=environment(
                {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port())}
            ),
            stdout=sink, stderr=subprocess.STDOUT,
        )  # fmt: skip
    log = place.folder / "stopped.log"
    try:
        deadline = time.monotonic() + 90
        while "'loss'" not in log.read_text():
            assert launcher.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        launcher.send_signal(signal.SIGTERM)
        code = launcher.wait(60)
        left = processes_of(recipe)
    finally:
        for process in processes_of(recipe):
            os.kill(process, signal.SIGKILL)
    text = log.read_text()
    assert code == 128 + signal.SIGTERM, text[-3000:]
    assert "finishing this step, then saving and stopping" in text
    assert len(checkpoints_of(place.folder / name)) == 1
    assert newest_valid(place.folder / name) is not None
    assert left == [], "processes of the run are left"


def processes_of(recipe: Path) -> list[int]:
    """Those that name the recipe on their command line."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if str(recipe).encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found
