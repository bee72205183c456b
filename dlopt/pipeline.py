"""The pipeline: a job to a run, a folder that names its artifacts and holds the report. It reads as its own diagram."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from dlopt.artifact import Artifact, Stage, digest_of, is_sealed, once, place, write_atomically
from dlopt.part import DloptError
from dlopt.progress import Progress, silent
from dlopt.runs import JOB, REPORT, RUN, Run
from dlopt.session import address_of, connected
from dlopt.spec import Job


def check(job: Job) -> None:
    """What can be said of a job without Ray: its files and columns are there, and the model can be built on them."""
    from dlopt.data.prepare import peek
    from dlopt.part import Signature, Target

    signature = Signature(inputs=peek(job.data), target=Target(name=job.data.target.column, labels=(0, 1)))
    job.model.build(signature)


def run(job: Job, home: Path, address: str | None = None, progress: Progress = silent) -> Run:
    """Make what the job asks for and is not there yet. Ray is started only if a stage needs it. Raises DloptError."""
    from dlopt.data.prepare import PREPARE
    from dlopt.train.fit import FIT, local_cpus

    began = time.monotonic()
    home = home.resolve()
    _refuse_unwritable(home)
    with ExitStack() as stack:

        @cache
        def need_ray() -> None:
            progress("ray", None, f"joining {address_of(address)}" if address_of(address) else "starting on this machine")
            stack.enter_context(connected(address, local_cpus(job.resources)))

        steps = _Steps(home, progress, need_ray)
        data = steps.ray(PREPARE, job.data, found=_found(job))
        model = steps.ray(FIT, job.fit, data, resources=job.resources)
    exports = {part.kind: steps.local(_exporter(part), part, model, data) for part in job.export}
    made = steps.made
    folder = home / f"{job.name}-{digest_of([job.name, data.path.name, model.path.name])[:8]}"
    if made or not is_run(folder) or (folder / JOB).read_text() != _as_yaml(job):
        progress("report", None, "drawing")
        _write_run(folder, job, {"data": data, "model": model, **{f"export.{kind}": found for kind, found in exports.items()}}, made)
    metrics = model.info["metrics"]
    return Run(folder, job.name, metrics, round(time.monotonic() - began, 3), tuple(made))


@dataclass
class _Steps:
    """Runs stages in a home and remembers which of them had anything to do, and for how long."""

    home: Path
    progress: Progress
    need_ray: Callable[[], None]

    def __post_init__(self) -> None:
        self.made: dict[str, float] = {}

    def ray(self, stage: Stage, section: BaseModel, *parents: Artifact, found: Any = None, **context: Any) -> Artifact:
        """A stage that computes on Ray, which is started now if there is something to compute."""
        if not is_sealed(place(stage, section, self.home, parents, found)):
            self.need_ray()
        return self.local(stage, section, *parents, found=found, **context)

    def local(self, stage: Stage, section: BaseModel, *parents: Artifact, found: Any = None, **context: Any) -> Artifact:
        before = is_sealed(place(stage, section, self.home, parents, found))
        artifact = once(stage, section, self.home, *parents, found=found, progress=self.progress, **context)
        if not before:
            self.made[stage.name] = artifact.manifest.seconds
            self.progress(stage.make.__name__, 1.0, f"done in {artifact.manifest.seconds:.1f} s")
        return artifact


def _exporter(part: BaseModel) -> Stage:
    from dlopt.export.onnx import EXPORT

    return EXPORT


def _found(job: Job) -> Any:
    """What the data stage depends on beside its section: the state of the source's files."""
    return [job.data.source.found(), job.data.test.found() if job.data.test else None]


def is_run(folder: Path) -> bool:
    """Whether all files of a run are there."""
    return all((folder / name).is_file() for name in (RUN, JOB, REPORT))


def _as_yaml(job: Job) -> str:
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _write_run(folder: Path, job: Job, artifacts: dict[str, Artifact], made: dict[str, float]) -> None:
    """job.yaml, report.html and run.json, which makes it a run, last."""
    from dlopt.report import page
    from dlopt.report.samples import samples

    folder.mkdir(parents=True, exist_ok=True)
    text = _as_yaml(job)
    write_atomically(folder / JOB, text)
    page.write(
        folder / REPORT,
        name=job.name,
        job_yaml=text,
        data=artifacts["data"],
        model=artifacts["model"],
        exports={name.removeprefix("export."): found for name, found in artifacts.items() if name.startswith("export.")},
        samples=samples(artifacts["data"], job.fit),
    )
    record = {
        "name": job.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "artifacts": {name: os.path.relpath(found.path, folder) for name, found in artifacts.items()},
        "metrics": artifacts["model"].info["metrics"],
        "seconds": made,
    }
    write_atomically(folder / RUN, json.dumps(record, indent=1))


def _refuse_unwritable(home: Path) -> None:
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DloptError(f"--home: cannot write to {home}: {error.strerror}") from None
    if not os.access(home, os.W_OK):
        raise DloptError(f"--home: {home} cannot be written to")
