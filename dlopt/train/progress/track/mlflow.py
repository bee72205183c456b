"""Training metrics in MLflow: a run for each model, with its settings as parameters, on a tracking server or in a database file."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dlopt.part import DloptError, Part
from dlopt.train.progress.track.tracker import Line, Tracker, curves_of_epoch, curves_of_speed, curves_of_step, refuse_missing

if TYPE_CHECKING:
    from mlflow import MlflowClient

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # else it tells its makers
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # else a server that is not there is one for four minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""What MLflow reads, unless the user has set it."""
DIGEST = "dlopt.digest"
"""The tag by which a run that was interrupted is found again."""
PARAMETERS, METRICS, LONGEST = 100, 1000, 6000
"""The most of a request, and the longest value of a parameter, in characters."""
SPEED_SECONDS = 10.0
"""Between two points of the curves of speed."""
ENDED = {True: "FINISHED", False: "FAILED"}


class MLflow(Part):
    """Log training metrics to MLflow. Needs `pip install 'dlopt[mlflow]'`. A user name and a password are taken from
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, a token from MLFLOW_TRACKING_TOKEN, never from a job file."""

    kind: Literal["mlflow"] = "mlflow"
    uri: str | None = None
    """A tracking server, http://host:5000, or a database, sqlite:////folder/mlflow.db; without it what MLFLOW_TRACKING_URI says, else
    mlflow.db in the current folder, which is where `mlflow ui` looks."""
    experiment: str = "dlopt"
    """Name of the experiment that the run belongs to; it is made if it is not there."""

    def check(self) -> None:
        """Raises DloptError when the package is not there."""
        refuse_missing("mlflow", "mlflow")

    def open(self, out: Path, settings: Mapping[str, Any]) -> Tracker:
        """Raises DloptError when the store does not answer."""
        self.check()
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            return Logged(MlflowClient(tracking_uri=self.uri), self.experiment, out, settings)
        except Exception as error:  # of MLflow, of the library that asks servers, or of that of databases
            said = str(error).strip().splitlines()[0]
            raise DloptError(f"resources.track: mlflow: {self.uri or 'its store'} does not take the run: {said}") from None


class Logged(Tracker):
    """One run of MLflow. MLflow takes nothing back: steps that training has undone stay beside those that came in their place."""

    def __init__(self, client: MlflowClient, experiment: str, out: Path, settings: Mapping[str, Any]) -> None:
        self.client = client
        self.points: list[tuple[str, float, int, int]] = []
        self.spoke = 0.0
        known = client.get_experiment_by_name(experiment)
        where = known.experiment_id if known else client.create_experiment(experiment)
        self.run = self._interrupted(where, out.name) or self._new(where, out, settings)
        self.there = self._latest()

    def _interrupted(self, where: str, digest: str) -> str | None:
        """The run of this model that has not finished."""
        wanted = f"tags.`{DIGEST}` = '{digest}' and attributes.status != 'FINISHED'"
        runs = self.client.search_runs([where], wanted, max_results=1)
        if not runs:
            return None
        run: str = runs[0].info.run_id
        self.client.set_terminated(run, "RUNNING")
        return run

    def _new(self, where: str, out: Path, settings: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        run: str = self.client.create_run(where, run_name=out.name, tags={DIGEST: out.name, "dlopt.model": str(out)}).info.run_id
        flat = [Param(name, value[:LONGEST]) for name, value in flattened(settings)]
        for start in range(0, len(flat), PARAMETERS):
            self.client.log_batch(run, params=flat[start : start + PARAMETERS])
        return run

    def _latest(self) -> dict[str, int]:
        """For each curve: the last step that it has."""
        curves = self.client.get_run(self.run).data.metrics
        return {name: max(point.step for point in self.client.get_metric_history(self.run, name)) for name in curves}

    def step(self, line: Line) -> None:
        self._add(curves_of_step(line), line)

    def epoch(self, line: Line) -> None:
        self._add(curves_of_epoch(line), line)

    def speed(self, line: Line) -> None:
        if line["time"] - self.spoke >= SPEED_SECONDS:
            self.spoke = line["time"]
            self._add(curves_of_speed(line), line)

    def undone(self, line: Line) -> None:
        self.there = {name: min(step, line["step"] - 1) for name, step in self.there.items()}

    def flush(self) -> None:
        """What is not taken stays for the next time."""
        from mlflow.entities import Metric

        while few := self.points[:METRICS]:
            self.client.log_batch(self.run, metrics=[Metric(name, value, when, step) for name, value, when, step in few])
            del self.points[: len(few)]

    def close(self, finished: bool) -> None:
        self.client.set_terminated(self.run, ENDED[finished])

    def _add(self, values: Mapping[str, float], line: Line) -> None:
        when = round(1000 * line.get("time", time.time()))
        for name, value in values.items():
            if line["step"] > self.there.get(name, -1):
                self.points.append((name, value, when, line["step"]))
                self.there[name] = line["step"]


def flattened(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """("train.optimizer.lr", "0.001") and so on; what is None is left out, a list is told by places: augment.0.kind."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{before}{name}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(inner, Mapping) for inner in value):
            yield from flattened({str(index): inner for index, inner in enumerate(value)}, f"{before}{name}.")
        elif value is not None:
            yield f"{before}{name}", str(value)
