"""The experts' measurements in what TensorBoard, MLflow and SwanLab keep, read by the packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from llamafactory_runs import Workplace, effective_workplace

STEPS = 3
NAMES = ("loss", "tokens_per_second", "experts_forward_ms", "experts_tflops", "host_memory_gb",
         "experts_load_max_over_mean")  # fmt: skip


@dataclass(frozen=True)
class Tracker:
    """How one is run and read. packages: beside the tested set, with which they do not go, and
    each without what it asks for; `{run}` in the variables is a folder of its own; read: a program
    that gets the run's folder and prints [[name, step, value], ...]."""

    read: str
    environment: dict[str, str]
    packages: tuple[str, ...] = ()
    prefix: str = "train/"


TRACKERS = {
    "tensorboard": Tracker(
        """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(str(next(folder.rglob("events.*")).parent))
events.Reload()
points = [(n, p.step, p.value) for n in events.Tags()["scalars"] for p in events.Scalars(n)]
""",
        {"TENSORBOARD_LOGGING_DIR": "{run}"},
    ),
    "mlflow": Tracker(
        """
from mlflow import MlflowClient
client = MlflowClient(folder.as_uri())
(found,) = client.search_runs(["0"])
points = [
    (name, p.step, p.value)
    for name in found.data.metrics
    for p in client.get_metric_history(found.info.run_id, name)
]
""",
        {"MLFLOW_TRACKING_URI": "file://{run}", "MLFLOW_ALLOW_FILE_STORE": "true"},
        (
            "mlflow-skinny<4", "cachetools", "databricks-sdk", "google-auth", "opentelemetry-api",
            "opentelemetry-proto", "opentelemetry-sdk", "opentelemetry-semantic-conventions",
            "sqlparse", "importlib_metadata<9", "zipp", "gitpython", "gitdb", "smmap",
            "python-dotenv",
        ),
        prefix="",
    ),
    "swanlab": Tracker(
        """
from swanlab.data.porter.datastore import DataStore
store = DataStore()
store.open_for_scan(str(next(folder.rglob("backup.swanlab"))))
found = [r["data"] for r in map(json.loads, store) if r["model_type"] == "Scalar"]
points = [(r["key"], r["step"], r["metric"]["data"]) for r in found]
""",
        {"SWANLAB_MODE": "offline", "SWANLAB_LOG_DIR": "{run}"},
        # Transformers' callback knows no later one.
        (
            "swanlab<0.8", "swankit", "nvidia-ml-py", "platformdirs", "pyecharts", "prettytable",
            "simplejson", "wrapt", "boto3", "botocore", "jmespath", "s3transfer",
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return effective_workplace(tmp_path_factory.mktemp("trackers"))


def _points(tracker: Tracker, run: Path, environment: dict[str, str]) -> list[Any]:
    program = f"import json, pathlib, sys\nfolder = pathlib.Path(sys.argv[1])\n{tracker.read}"
    found = subprocess.run(
        [sys.executable, "-c", f"{program}\nprint(json.dumps(points))", str(run)],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    return list(json.loads(found.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if t.packages else []) for n, t in TRACKERS.items()],
)
def test_a_tracker_keeps_what_the_trainer_logs(name: str, place: Workplace, tmp_path: Path) -> None:
    tracker, run, packages = TRACKERS[name], tmp_path / "kept", tmp_path / "packages"
    environment = {key: value.format(run=run) for key, value in tracker.environment.items()}
    if tracker.packages:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*pip, str(packages), *tracker.packages], check=True)
        environment["PYTHONPATH"] = str(packages)
    place.train_by_command(
        name, environment, kt_sft={"weights": "int8"}, max_steps=STEPS, report_to=name
    )
    points, logs = _points(tracker, run, environment), place.logs(name)
    for key in NAMES:
        kept = [(step, value) for found, step, value in points if found == tracker.prefix + key]
        assert [step for step, _ in kept] == list(range(1, STEPS + 1)), key
        assert [value for _, value in kept] == pytest.approx([e[key] for e in logs]), key
