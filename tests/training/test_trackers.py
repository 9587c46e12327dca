"""The experts' measurements in what TensorBoard, MLflow and SwanLab keep, read by the packages.

The tested set has TensorBoard alone: the others ask for older packages than it has.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from llamafactory_runs import Workplace, effective_workplace

STEPS = 3
NAMES = ("loss", "tokens_per_second", "experts_forward_ms", "experts_tflops", "host_memory_gb",
         "experts_load_max_over_mean")  # fmt: skip
# name -> (step, value) of every point, from the run's folder
Points = Callable[[Path, str], list[tuple[int, float]]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return effective_workplace(tmp_path_factory.mktemp("trackers"))


def tensorboard(run: Path, name: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (folder,) = (run / "runs").iterdir()
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(f"train/{name}")]


def mlflow(run: Path, name: str) -> list[tuple[int, float]]:
    client = pytest.importorskip("mlflow").MlflowClient((run.parent / "mlruns").as_uri())
    (found,) = client.search_runs(["0"])
    return [(point.step, point.value) for point in client.get_metric_history(found.info.run_id, name)]


READERS: dict[str, Points] = {"tensorboard": tensorboard, "mlflow": mlflow}


@pytest.mark.parametrize("tracker", READERS)
def test_a_tracker_keeps_what_the_trainer_logs(tracker: str, place: Workplace) -> None:
    pytest.importorskip(tracker)
    environment = {
        "MLFLOW_TRACKING_URI": (place.folder / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true",
    }  # fmt: skip
    place.train_by_command(
        tracker, environment, kt_sft={"weights": "int8"}, max_steps=STEPS, report_to=tracker
    )
    logs = place.logs(tracker)
    for name in NAMES:
        points = READERS[tracker](place.folder / tracker, name)
        assert [step for step, _ in points] == list(range(1, STEPS + 1)), name
        assert [value for _, value in points] == pytest.approx([e[name] for e in logs]), name
