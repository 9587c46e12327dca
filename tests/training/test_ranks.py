"""Several ranks, by LLaMA-Factory's own torchrun, against one rank with the same global batch."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from llamafactory_runs import BIN, Workplace, effective_workplace, environment
from safetensors.torch import load_file

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
}
# The quick ones; the others run with the slow tests.
QUICK = [("ddp", 2), ("zero2", 2), ("ddp", 4)]
ALL = [(mode, ranks) for mode in MODES for ranks in (2, 4)]


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ranks_environment(ranks: int, **more: str) -> dict[str, str]:
    return {
        "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(ranks), "MASTER_PORT": str(port()), **more,
    }  # fmt: skip


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
    text = place.train(
        name, env=ranks_environment(ranks), per_device_train_batch_size=4 // ranks,
        **settings_of(place, mode),
    )  # fmt: skip
    for a, b in zip(place.logs("one"), place.logs(name), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-3 * a["loss"]
        # Adam does not see the size of a gradient, the logged norm does: a mean, not a sum.
        assert abs(a["grad_norm"] - b["grad_norm"]) < 0.02 * a["grad_norm"]
    one, several = (
        load_file(place.folder / run / "adapter_model.safetensors") for run in ("one", name)
    )
    assert set(one) == set(several)
    moved = [k for k in one if "lora_B" in k and one[k].abs().max() > 1e-4]
    assert len(moved) > 20
    for key in moved:
        # Adam divides by the size of a gradient, so noise shows where it is next to nothing.
        assert float((one[key] - several[key]).norm() / one[key].norm()) < 0.2, key
    # One store, mapped by all of them, and no rank takes the others' cores.
    threads = [int(n) for n in re.findall(r"(\d+) threads", text)]
    assert threads and all(n <= max(1, (os.cpu_count() or 1) // ranks) for n in threads)


def test_zero3_is_refused_with_the_reason(place: Workplace) -> None:
    settings = settings_of(place, "zero2")
    config = json.loads(Path(settings["deepspeed"]).read_text())
    config["zero_optimization"] = {"stage": 3}
    file = place.folder / "zero3.json"
    file.write_text(json.dumps(config))
    text = place.train(
        "zero3", ranks_environment(2), check=False, **{**settings, "deepspeed": str(file)}
    )
    assert "DeepSpeed ZeRO-3 partitions parameters while the model is built" in text
    assert "use ZeRO-2" in text


def test_two_machines(place: Workplace) -> None:
    """Two launchers that meet at one port, as on two machines; each has its own output."""
    meeting = str(port())

    def node(rank: int) -> str:
        env = {
            "FORCE_TORCHRUN": "1", "NNODES": "2", "NODE_RANK": str(rank), "NPROC_PER_NODE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": meeting,
        }  # fmt: skip
        return place.train(f"node-{rank}", env, per_device_train_batch_size=2, **SETTINGS)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(node, (0, 1)))
    for a, b in zip(place.losses("one"), place.losses("node-0"), strict=True):
        assert abs(a - b) < 1e-3 * a


# What goes wrong

# Put on the path of the ranks: something happens to one of them at a training step.
FAULT = """
import os
if os.environ.get("RANK") == os.environ["FAULTY_RANK"]:
    import signal
    from transformers import Trainer
    stock, steps = Trainer.training_step, [0]
    def training_step(self, *args, **kwargs):
        steps[0] += 1
        if steps[0] == 3:
            {fault}
        return stock(self, *args, **kwargs)
    Trainer.training_step = training_step
"""
FAULTS = {
    "raises": (
        "raise ValueError('the data of this rank is broken')",
        "data of this rank is broken",
    ),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "Signal 9 (SIGKILL)"),
}


def faulty(folder: Path, fault: str, rank: int) -> dict[str, str]:
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(FAULT.format(fault=fault))
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return ranks_environment(2, PYTHONPATH=path, FAULTY_RANK=str(rank))


@pytest.mark.parametrize("name", FAULTS)
def test_one_rank_ends_all(name: str, place: Workplace, tmp_path: Path) -> None:
    fault, expected = FAULTS[name]
    start = time.monotonic()
    text = place.train(
        f"rank-{name}", faulty(tmp_path / "fault", fault, 1), check=False,
        per_device_train_batch_size=2, **SETTINGS,
    )  # fmt: skip
    assert time.monotonic() - start < 120
    assert expected in text
    assert not (place.folder / f"rank-{name}" / "adapter_model.safetensors").exists()


SAVES = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 3, "max_steps": 6}


@pytest.mark.parametrize("mode", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_killed_run_of_two_ranks_resumes_to_the_bit(
    mode: str, place: Workplace, tmp_path: Path
) -> None:
    settings = {**settings_of(place, mode), **SAVES, "per_device_train_batch_size": 2,
                "lora_dropout": 0.1, "overwrite_output_dir": False}  # fmt: skip
    place.train(f"whole-{mode}", ranks_environment(2), **settings)
    name = f"killed-{mode}"
    env = faulty(tmp_path / "fault", "os.kill(os.getpid(), signal.SIGKILL)", 0)
    place.train(name, env, check=False, **settings)
    assert newest_valid(place.folder / name) == str(place.folder / name / "checkpoint-2")
    place.train(name, ranks_environment(2), **settings)
    want, got = ([x.hex() for x in place.losses(run)] for run in (f"whole-{mode}", name))
    assert len(want) == 6 and got == want
    digests = [
        load_file(place.folder / run / "adapter_model.safetensors")
        for run in (f"whole-{mode}", name)
    ]
    assert all(digests[0][key].equal(digests[1][key]) for key in digests[0])


def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    place: Workplace, tmp_path: Path
) -> None:
    name = "one-signalled"
    settings = {**SETTINGS, **SAVES, "save_steps": 1000, "max_steps": 5000}
    env = faulty(tmp_path / "fault", "os.kill(os.getpid(), signal.SIGTERM)", 1)
    text = place.train(
        name, env, check=False, seconds=120, per_device_train_batch_size=2, **settings
    )
    assert "finishing this step, then saving and stopping" in text
    assert newest_valid(place.folder / name) == str(place.folder / name / "checkpoint-3")


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
            env=environment(ranks_environment(2)), stdout=sink, stderr=subprocess.STDOUT,
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
