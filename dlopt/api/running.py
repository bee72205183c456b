"""Running a job from Python, and what is there afterwards."""

from __future__ import annotations

import copy
import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlopt import runs
from dlopt.api.home import home_of
from dlopt.api.notebook import shown
from dlopt.api.page import Page
from dlopt.artifact import Artifact
from dlopt.part import DloptError, Signature
from dlopt.progress import Progress

if TYPE_CHECKING:
    import numpy as np

    from dlopt.api.predict import Model
    from dlopt.api.server import Server
    from dlopt.models import Network
    from dlopt.spec import Job


class Run(runs.Outcome):
    """A finished run: its metrics, its report, and its model. In a notebook it shows its metrics."""

    @property
    def report(self) -> Page:
        """The report; a notebook shows it inline, `run.report.open()` in a browser."""
        return Page(self.folder / runs.REPORT)

    @property
    def job(self) -> Job:
        """The job that was run, with all its defaults."""
        from dlopt import spec

        return spec.load(self.folder / runs.JOB)

    @cached_property
    def signature(self) -> Signature:
        """The model's inputs and outputs."""
        return Signature.model_validate_json(self._artifact("model").read("signature.json"))

    def predict(self, data: Any) -> Any:
        """What the model says, by onnxruntime: a DataFrame for a DataFrame, else a list, as the server's predictions are.

        data: a DataFrame (pandas or polars) or Table with the inputs' columns; a list of rows (dicts); images as an array (rows, height,
        width[, channels]) or a list of arrays, Pillow images, encoded bytes or paths. Raises DloptError naming the row and the column.
        """
        return self._predictor(data)

    def predict_proba(self, data: Any) -> np.ndarray:
        """Probabilities in the order of `signature.target.labels`, or numbers, (rows, outputs)."""
        return self._predictor.outputs(data)

    @property
    def predictions(self) -> Any:
        """What the model said of every row of the test split, as a Table (see dlopt/train/measure/evaluate.py). Raises DloptError."""
        import pyarrow.parquet as pq

        model = self._artifact("model")
        if "predictions.parquet" not in model.manifest.files:
            raise DloptError(f"{self.folder}: there is no test split, and so there are no predictions of it")
        return pq.read_table(model.check("predictions.parquet"))

    @cached_property
    def model(self) -> Network:
        """The trained network in torch, compressed where it was, in eval mode: {name: tensor} as prepared data have them, to logits or
        numbers."""
        from dlopt.train.start import trained_network

        small = "compress" in runs.read(self.folder)["artifacts"]
        return trained_network(self._artifact("compress" if small else "model"), self._artifact("data"))

    def export(self, path: str | Path | None = None, kind: str = "onnx", **fields: Any) -> Path:
        """The model in a format, made now if the run does not have it yet: copied to a file, or with its signature into a folder that is
        there, or without a path where the run keeps it. fields: of the format, as precision="float16". Returns where it is."""
        from dlopt.api.exporting import export

        return export(self.folder, kind, fields, Path(path) if path is not None else None)

    def compress(self, *parts: str | Mapping[str, Any], progress: Progress | bool | None = None) -> Run:
        """A run of its own whose model is this one made small: parts as a job's `compress` has them, or bare kinds. Raises DloptError."""
        from dlopt.api.compressing import compress, parts_of

        with shown(self.name, progress) as told:
            return Run(**vars(compress(self.folder, parts_of(parts), told)))

    def serve(self, port: int = 8000, host: str = "127.0.0.1") -> Server:
        """Serve the model over HTTP in a process of its own, until `stop()`, the end of a `with`, or of this program."""
        from dlopt.api.server import start

        return start(self.folder, host, port)

    @cached_property
    def _predictor(self) -> Model:
        from dlopt.api.predict import Model

        return Model.load(runs.exported(self.folder)[1])

    def _artifact(self, name: str) -> Artifact:
        return runs.artifact(self.folder, runs.read(self.folder), name)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made anew when it is asked for, of which a session cannot be pickled."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        names = list(dict.fromkeys(name for found in self.metrics.values() for name in found))
        head = "".join(f"<th>{html.escape(split)}</th>" for split in self.metrics)
        lines = []
        for name in names:
            values = [found.get(name) for found in self.metrics.values()]
            cells = "".join(f"<td>{'' if value is None else f'{value:.4f}'}</td>" for value in values)
            lines.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
        title = f"<b>{html.escape(self.name)}</b> <code>{html.escape(str(self.folder))}</code>"
        return f"{title}<table><tr><th></th>{head}</tr>{''.join(lines)}</table>"


def run(
    job: str | Path | Mapping[str, Any] | Job | None = None,
    *,
    data: Any = None,
    target: str | Sequence[str] = (),
    home: str | Path | None = None,
    address: str | None = None,
    fresh: bool = False,
    progress: Progress | bool | None = None,
    **overrides: Any,
) -> Run:
    """Make what a job asks for and is not there yet, as `dlopt run` does, and hand back the run.

    job: a job file, the same as nested dicts, or a Job; without one, `data` and `target` begin one.
    data: what the job's source is to be: a DataFrame, Table, dict of arrays or list of dicts, which is written into the home, or a path.
    target: the column to predict, where there is no job. home: the folder of runs ($DLOPT_HOME, else `runs`).
    address: a Ray cluster. fresh: train from the start. progress: a function, or False for silence.
    overrides: values to set, `train__epochs=3` or `**{"train.epochs": 3}`. Raises DloptError, with a line for each mistake.
    """
    from dlopt.session import set_environment

    set_environment(address or os.environ.get("RAY_ADDRESS"))
    from dlopt import pipeline

    made = job_from(job, data, target, home, overrides)
    pipeline.check(made)
    with shown(made.name, progress) as told:
        done = pipeline.run(made, home_of(home), address, told, fresh)
    return Run(**vars(done))


def job_from(
    job: str | Path | Mapping[str, Any] | Job | None,
    data: Any,
    target: str | Sequence[str],
    home: str | Path | None,
    overrides: Mapping[str, Any],
) -> Job:
    """One of a file, of dicts, of a Job, or begun from data. Raises DloptError."""
    from dlopt import spec
    from dlopt.api.data import source_from
    from dlopt.spec import Job

    if job is None:
        from dlopt.api.begun import begin

        if data is None:
            raise DloptError("run: give a job, or data and target to begin one")
        job = begin(data, target, home=home).job
    elif target:
        raise DloptError("run: target: the job names its target: leave out target, or the job")
    if isinstance(job, Job) and data is None and not overrides:
        return job
    if not isinstance(job, (str, os.PathLike, Mapping, Job)):
        raise DloptError(f"run: job: must be a path, a dict or a Job, not {type(job).__name__}")
    file = Path(job) if isinstance(job, (str, os.PathLike)) else None
    given = spec.read(file) if file else job.model_dump(mode="json") if isinstance(job, Job) else copy.deepcopy(dict(job))  # type: ignore[arg-type]
    if data is not None:
        source = source_from(data, home)
        spec.put(given, "data.source", {"kind": source.kind} | source.model_dump(mode="json", exclude_unset=True))
    for name, value in overrides.items():
        spec.put(given, name.replace("__", "."), value)
    made = spec.validated(given, f"{file}: " if file else "run: ")
    if file:
        spec.refuse_beside(made, file)
    return made


def load(run: Run | str | Path, *, home: str | Path | None = None) -> Run:
    """A run that is there already, by its folder, or by its job's name for the newest one in the home. Raises DloptError."""
    if isinstance(run, Run):
        return run
    if not isinstance(run, (str, os.PathLike)):
        raise DloptError(f"load: run: must be a run's folder or a job's name, not {type(run).__name__}")
    folder = runs.find(str(run), home_of(home))
    record = runs.read(folder)
    return Run(folder.resolve(), str(record["name"]), record["metrics"], record.get("spread", {}))
