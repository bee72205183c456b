"""The pipeline: a job to a run, a folder that names its artifacts and holds the report. It reads as its own diagram."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from dlopt import remote
from dlopt.artifact import Artifact, Stage, digest_of, discard, is_sealed, once, place, write_atomically
from dlopt.compress.base import Compressor
from dlopt.data.section import Data
from dlopt.data.table.split import Fold
from dlopt.export.base import ExportFormat
from dlopt.part import DloptError
from dlopt.progress import WARNING, Progress, silent
from dlopt.runs import JOB, REPORT, RUN, Outcome, artifact, read
from dlopt.session import address_of, connected
from dlopt.spec import Job

RESULTS = (
    "weights.safetensors",
    "signature.json",
    "metrics.jsonl",
    "health.jsonl",
    "predictions.parquet",
    "profile.json",
    "statistics.json",
)
"""Files of the data and of the model that a run's folder shows; of exports it shows all."""


def check(job: Job) -> None:
    """What can be said of a job without Ray: its files and columns are there, the model can be built, and trackers are installed."""
    from dlopt.data.rows import peek

    for tracker in job.resources.track:
        tracker.check()
    job.model.build(peek(job.data))


def prepare(job: Job, home: Path, address: str | None = None, progress: Progress = silent) -> Artifact:
    """The first stage alone: clean, split, encoded rows. Raises DloptError."""
    with _steps(job, home, address, progress) as steps:
        return _prepared(job, steps, None)


def prepared(job: Job, home: Path) -> Artifact | None:
    """The prepared data of a job, if they are in the home already; starts no Ray."""
    from dlopt.data.prepare import PREPARE

    path = place(PREPARE, job.data, home.resolve(), (), _found(job))
    return Artifact.open(path) if is_sealed(path) else None


def run(job: Job, home: Path, address: str | None = None, progress: Progress = silent, fresh: bool = False) -> Outcome:
    """Make what the job asks for and is not there yet. Ray is started only if a stage needs it. Raises DloptError.

    fresh: train from the start, whatever there is of a model or of checkpoints; prepared data stay.
    """
    began = time.monotonic()
    home = home.resolve()
    with _steps(job, home, address, progress) as steps:
        data, *parts = _all_prepared(job, steps)
        model = _fitted(job, steps, data, fresh)
        folds = [_fitted(job, _of_fold(job, steps, index), part, fresh) for index, part in enumerate(parts)]
    return _finished(job, steps, data, model, folds, began)


def _finished(job: Job, steps: _Steps, data: Artifact, model: Artifact, folds: list[Artifact], began: float) -> Outcome:
    """What comes after training."""
    small = _compressed(job, steps, data, model)
    exports = _exported(job.export, steps, small or model, data)
    made, digests = steps.made, [job.name, data.path.name, model.path.name, [fold.path.name for fold in folds]]
    folder = steps.home / f"{job.name}-{digest_of([*digests, small.path.name] if small else digests)[:8]}"
    remote.take(*(folder / name for name in (JOB, REPORT, RUN)))
    if made or not is_run(folder) or (folder / JOB).read_text() != as_yaml(job):
        steps.progress("report", None, "drawing")
        named = {"data": data, "model": model} | ({"compress": small} if small else {})
        _write_run(folder, job, named | _exports_of(folder) | exports, folds, made)
    table = tuple(small.info["table"]) if small else ()
    return Outcome(folder, job.name, model.info["metrics"], spread(folds), round(time.monotonic() - began, 3), tuple(made), table)


def compress(folder: Path, parts: Sequence[Compressor], progress: Progress = silent) -> Outcome:
    """A run whose model is that of another run, made small by some parts after those that have done so before. Raises DloptError."""
    from dlopt.spec import load

    began, record, job = time.monotonic(), read(folder), load(folder / JOB)
    data, model = (artifact(folder, record, name) for name in ("data", "model"))
    steps = _Steps(model.path.parent.parent, progress, lambda idle: None)
    job = job.model_copy(update={"compress": (*job.compress, *parts)})
    return _finished(job, steps, data, model, _folds_of(folder, record), began)


def _compressed(job: Job, steps: _Steps, data: Artifact, model: Artifact) -> Artifact | None:
    """What the job's compressors leave, one after the other; None without any."""
    from dlopt.compress.stage import COMPRESS, Compress

    small = None
    for part in job.compress:
        section = Compress(fit=job.fit, part=part)
        given = {"original": model, "resources": job.resources}
        small = steps.local(COMPRESS, section, small or model, data, found=part.found(), **given)
    return small


def export(folder: Path, part: ExportFormat, progress: Progress = silent) -> Artifact:
    """A run's model in one more format, which the run has from then on. Raises DloptError."""
    from dlopt.spec import load

    record = read(folder)
    named = {name: artifact(folder, record, name) for name in ("data", "model", "compress") if name in record["artifacts"]}
    steps = _Steps(named["model"].path.parent.parent, progress, lambda idle: None)
    made = _exported([part], steps, named.get("compress", named["model"]), named["data"])
    (found,) = made.values()
    if f"export.{part.name}" not in record["artifacts"] or steps.made:
        named |= _exports_of(folder) | made
        _write_run(folder, load(folder / JOB), named, _folds_of(folder, record), record["seconds"] | steps.made)
    return found


def _folds_of(folder: Path, record: dict[str, Any]) -> list[Artifact]:
    return [Artifact.open((folder / fold["model"]).resolve()) for fold in record["folds"]]


def _exported(parts: Sequence[ExportFormat], steps: _Steps, model: Artifact, data: Artifact) -> dict[str, Artifact]:
    """A model in formats, by the names that a run gives them."""
    from dlopt.export.stage import EXPORT

    return {f"export.{part.name}": steps.local(EXPORT, part, model, data) for part in parts}


def _exports_of(folder: Path) -> dict[str, Artifact]:
    """What a run's folder names already: all of a folder is of one model."""
    if not is_run(folder):
        return {}
    record = read(folder)
    return {name: artifact(folder, record, name) for name in record["artifacts"] if name.startswith("export.")}


def spread(folds: Sequence[Artifact]) -> dict[str, dict[str, dict[str, float]]]:
    """Of the folds' models: split to metric to its mean and standard deviation (ddof 1) over the folds."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for split in ("validation", "test"):
        each = [fold.info["metrics"][split] for fold in folds if split in fold.info["metrics"]]
        for name in each[0] if each else ():
            values = [metrics[name] for metrics in each if metrics.get(name) is not None]
            if len(values) > 1:
                found.setdefault(split, {})[name] = {"mean": statistics.mean(values), "std": statistics.stdev(values)}
    return found


@contextmanager
def _steps(job: Job, home: Path, address: str | None, progress: Progress) -> Iterator[_Steps]:
    """What runs stages in a home, with Ray from the first time that one needs it."""
    from dlopt.train.stage import local_cpus
    from dlopt.train.start import import_ahead

    home = home.resolve()
    _refuse_unwritable(home)
    with ExitStack() as stack:
        there = False

        def need_ray(idle: bool) -> None:
            nonlocal there
            if not there:
                progress("ray", None, f"joining {address_of(address)}" if address_of(address) else "starting on this machine")
                import_ahead(job.resources.workers in (0, "auto"))
                stack.enter_context(connected(address, local_cpus(job.resources), idle))
                there = True

        yield _Steps(home, progress, need_ray, joins=bool(address_of(address)))


def _prepared(job: Job, steps: _Steps, fold: Fold | None, rows: Artifact | None = None) -> Artifact:
    from dlopt.data.prepare import PREPARE

    return steps.ray(PREPARE, _section(job, fold), found=_found(job), rows=rows)


def _section(job: Job, fold: Fold | None) -> Data:
    return job.data.model_copy(update={"fold": fold or job.data.fold})


def _all_prepared(job: Job, steps: _Steps) -> list[Artifact]:
    """The job's own split, then each fold of a cross-validation; the sources are read once for all of them."""
    from dlopt.data.prepare import PREPARE
    from dlopt.data.rows import ROWS

    if not job.train.folds:
        return [_prepared(job, steps, None)]
    folds = [None, *(Fold(index=index, of=job.train.folds) for index in range(job.train.folds))]
    found = _found(job)
    if all(is_sealed(place(PREPARE, _section(job, fold), steps.home, (), found)) for fold in folds):
        return [_prepared(job, steps, fold) for fold in folds]
    rows = steps.ray(ROWS, job.data, found=found)
    prepared = [_prepared(job, steps if fold is None else _of_fold(job, steps, fold.index), fold, rows) for fold in folds]
    discard(rows.path)
    return prepared


def _fitted(job: Job, steps: _Steps, data: Artifact, fresh: bool) -> Artifact:
    from dlopt.train.checkpoint.stores import store_of
    from dlopt.train.stage import FIT, needs_ray

    path = place(FIT, job.fit, steps.home, (data,))
    if job.resources.profile and is_sealed(path) and not fresh:
        steps.progress("fit", None, f"{WARNING}resources.profile: nothing is measured, since this model is trained already: add --fresh")
    if fresh:
        discard(path)
        store_of(path, job.resources.checkpoint).clear()
    run = steps.ray if steps.joins or needs_ray(job.resources, data) else steps.local
    return run(FIT, job.fit, data, resources=job.resources)


def _of_fold(job: Job, steps: _Steps, index: int) -> _Steps:
    """What runs the stages of one of the folds, and says so."""
    said = f"fold {index + 1} of {job.train.folds}"
    return replace(steps, progress=lambda stage, share, text: steps.progress(stage, share, f"{said}: {text}"), suffix=f".{said}")


@dataclass
class _Steps:
    """Runs stages in a home and remembers which of them had anything to do, and for how long."""

    home: Path
    progress: Progress
    need_ray: Callable[[bool], None]
    """Told whether the stage has tasks for all CPUs at once."""
    joins: bool = False
    """Whether there is a cluster to be joined."""
    suffix: str = ""
    """Tells the stages of a fold from those of the job's own split."""
    made: dict[str, float] = field(default_factory=dict)

    def ray(self, stage: Stage, section: BaseModel, *parents: Artifact, found: Any = None, **context: Any) -> Artifact:
        """A stage that computes on Ray, which is started now if there is something to compute."""
        if not is_sealed(place(stage, section, self.home, parents, found)):
            self.need_ray(stage.name in ("rows", "data"))
        return self.local(stage, section, *parents, found=found, **context)

    def local(self, stage: Stage, section: BaseModel, *parents: Artifact, found: Any = None, **context: Any) -> Artifact:
        before = is_sealed(place(stage, section, self.home, parents, found))
        artifact = once(stage, section, self.home, *parents, found=found, progress=self.progress, **context)
        if not before:
            self.made[stage.name + self.suffix] = artifact.manifest.seconds
            self.progress(stage.make.__name__, 1.0, f"done in {artifact.manifest.seconds:.1f} s")
        return artifact


def _found(job: Job) -> Any:
    """What the data stage depends on beside its section: the state of the source's files."""
    from dlopt.data.rows import sources

    return {name: source.found() for name, source in sources(job.data).items()}


def is_run(folder: Path) -> bool:
    """Whether all files of a run are there."""
    return all((folder / name).is_file() for name in (RUN, JOB, REPORT))


def as_yaml(job: Job) -> str:
    """A job with all its defaults."""
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _write_run(folder: Path, job: Job, artifacts: dict[str, Artifact], folds: list[Artifact], made: dict[str, float]) -> None:
    """job.yaml, report.html and run.json, which makes it a run, last."""
    from dlopt.report import page
    from dlopt.report.card import CARD, card
    from dlopt.report.importance import importance
    from dlopt.report.samples import samples

    folder.mkdir(parents=True, exist_ok=True)
    text = as_yaml(job)
    write_atomically(folder / JOB, text)
    exports = {name.removeprefix("export."): found for name, found in artifacts.items() if name.startswith("export.")}
    about = card(job.name, job.license, artifacts["data"], artifacts["model"], exports, artifacts.get("compress"))
    write_atomically(folder / CARD, about)
    page.write(
        folder / REPORT,
        name=job.name,
        job_yaml=text,
        data=artifacts["data"],
        model=artifacts["model"],
        exports=exports,
        card=about,
        compress=artifacts.get("compress"),
        samples=samples(artifacts["data"], job.fit),
        importance=importance(artifacts["model"], artifacts["data"]),
        folds=[fold.info["metrics"]["validation"] for fold in folds],
    )
    record = {
        "name": job.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "artifacts": {name: os.path.relpath(found.path, folder) for name, found in artifacts.items()},
        "metrics": artifacts["model"].info["metrics"],
        "folds": [{"model": os.path.relpath(fold.path, folder), "metrics": fold.info["metrics"]} for fold in folds],
        "spread": spread(folds),
        "seconds": made,
    }
    _link_results(folder, artifacts)
    write_atomically(folder / RUN, json.dumps(record, indent=1))
    remote.give(folder / JOB, folder / CARD, folder / REPORT, folder / RUN)


def _link_results(folder: Path, artifacts: dict[str, Artifact]) -> None:
    """The results under plain names: links to the artifacts' files, or copies on a disk that knows no links."""
    for name, found in artifacts.items():
        for file in found.manifest.files:
            if (
                "/" in file
                or name == "compress"
                or (name != "model" and file == "signature.json")
                or (file not in RESULTS and not name.startswith("export."))
            ):
                continue
            link = folder / plain_name(name, file)
            remote.copy(found.path / file, link)
            link.unlink(missing_ok=True)
            try:
                link.symlink_to(os.path.relpath(found.path / file, folder.resolve()))
            except OSError:
                shutil.copyfile(found.path / file, link)


def plain_name(artifact: str, file: str) -> str:
    """What a file of an artifact is called in a run's folder: model.float16.onnx of export.onnx.float16."""
    _, _, variant = artifact.removeprefix("export.").partition(".")
    return f"{Path(file).stem}.{variant}{Path(file).suffix}" if variant else file


def _refuse_unwritable(home: Path) -> None:
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DloptError(f"--home: cannot write to {home}: {error.strerror}") from None
    if not os.access(home, os.W_OK):
        raise DloptError(f"--home: {home} cannot be written to")
    remote.refuse_unwritable(home)
