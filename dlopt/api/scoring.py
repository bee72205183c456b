"""Files of any size to predictions, part by part: whoever is killed in the middle goes on where it stopped.

What the source gives as one table is a part. Its predictions lie in a file of their own, whole or not at all, whose name says which part
it is; the source is cut in the same way each time, so a part that is there is passed over. A folder remembers what its parts are of, and
refuses another model or input. On a cluster Ray Data hands the tasks out; here threads do, without Ray.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import yaml
from pydantic import TypeAdapter

from dlopt import runs
from dlopt.api.compared import Sums, compare, merged, metrics
from dlopt.api.parts import FORMATS, Parts, joined
from dlopt.artifact import Artifact
from dlopt.data.kinds import AnyTarget, Input
from dlopt.data.sources import Source
from dlopt.data.sources.images import ImageFiles
from dlopt.data.sources.places import Place
from dlopt.data.sources.reading import Piece, Rows, block_bytes, grouped, wanted
from dlopt.data.stats.guess import source_of
from dlopt.data.types.columns import Columns
from dlopt.part import DloptError, Signature
from dlopt.progress import Progress, silent
from dlopt.serve.exchange import decisions
from dlopt.serve.models.model import Predictor

PARTS = ".parts"
"""What is added to OUT's name for the folder of its parts."""
TENSOR_BYTES = 32 * 2**20
"""Of rows that are decoded at a time."""
BATCH_ROWS = 2048
MOST_THREADS = 8


Add = Callable[[Iterable[Path]], None]
"""Takes the parts of a task, in the order of the tasks."""


class Scored(NamedTuple):
    """What was predicted."""

    path: Path
    """A file, or a folder of parts."""
    rows: int
    failed: int
    """Rows that could not be read; the column `error` says why."""
    compared: int
    """Rows that have a target."""
    metrics: dict[str, float]
    seconds: float
    """That this call took."""
    kept: int
    """Rows that were there from a call before."""


@dataclass(frozen=True)
class Work:
    """All that it takes to score any part; travels to the tasks."""

    export: Path
    inputs: tuple[Input, ...]
    target: AnyTarget
    source: Any
    place: Place | None
    schema: pa.Schema
    meaning: Columns
    keep: tuple[str, ...]
    """Columns of the input that are written again."""
    compares: bool
    """Whether the input has the target's columns."""
    parts: Parts

    @cached_property
    def predictor(self) -> Predictor:
        """The exported model, one thread for each of ours."""
        export = Artifact.open(self.export)
        return Predictor(export.read("model.onnx"), self.signature, 1, BATCH_ROWS)

    @cached_property
    def signature(self) -> Signature:
        """Its inputs and outputs."""
        return Signature.model_validate_json(Artifact.open(self.export).read("signature.json"))

    def tables(self, task: int, pieces: Sequence[Piece]) -> Iterator[pa.Table]:
        """The rows of a task, a table for each part."""
        whole = type(self.source).tables is not Rows.tables
        found = self.source.tables(self.schema.names) if whole else self.source.shaped(self.place, pieces, self.schema)
        return (table for number, table in enumerate(found) if len(table) or not (task or number))  # one at least, which tells the columns

    def score(self, raw: pa.Table) -> tuple[pa.Table, Sums]:
        """Rows with what the model says of them, and the sums of the part."""
        width = sum(feature.size * np.dtype(feature.stored).itemsize for feature in self.signature.inputs)
        step = max(1, TENSOR_BYTES // max(width, 1))
        found = [self._scored(raw.slice(start, step)) for start in range(0, max(len(raw), 1), step)]
        sums = merged([one for _, one, _ in found])
        return pa.concat_tables([table for table, _, _ in found]), {"failed": sum(failed for _, _, failed in found), "compared": sums}

    def _scored(self, raw: pa.Table) -> tuple[pa.Table, Sums, int]:
        target = self.signature.target
        textual = [column for part in (*self.inputs, self.target) if part.textual for column in part.columns]
        said = self.meaning.canonical(raw, textual)
        parts = {part.tensor: part for part in self.inputs}
        tensors, why = {}, dict[int, str]()
        for feature in self.signature.inputs:
            columns, wrong = parts[feature.name].read(said, feature)
            why = wrong | why
            tensors[feature.name] = parts[feature.name].served(pa.table(columns), feature)
        outputs = self.predictor(tensors) if len(raw) else np.zeros((0, target.size), np.float32)
        good: np.ndarray = np.asarray(np.isfinite(outputs).all(axis=1))
        why |= {row: "the model's output is not finite" for row in np.flatnonzero(~good).tolist() if row not in why}
        good[list(why)] = False
        decided = decisions(target, outputs)
        sums = compare(self.target, target, said, outputs, decided, good) if self.compares else {}
        columns = {name: raw[name] for name in self.keep} | _predictions(self.signature, outputs, decided, good)
        columns["error"] = pa.array([why.get(row) for row in range(len(raw))], pa.string()) if why else pa.nulls(len(raw), pa.string())
        return pa.table(columns), sums, len(why)

    def write(self, raw: pa.Table, path: Path) -> None:
        """Score rows, and write them as a part."""
        table, note = self.score(raw)
        self.parts.write(table, path, note)

    def run(self, task: int, pieces: Sequence[Piece], submit: Callable[..., Any]) -> tuple[int, list[Any]]:
        """Do what is left of a task; how many parts it has, and what `submit` gave for those that were left."""
        left, count = [], 0
        for count, table in enumerate(self.tables(task, pieces), 1):
            path = self.parts.path(task, count - 1)
            if not path.is_file():
                left.append(submit(self.write, table, path))
        return count, left


def _predictions(signature: Signature, outputs: np.ndarray, decided: list[list[int]], good: np.ndarray) -> dict[str, pa.Array]:
    """Columns of predictions, null where a row has none."""
    target, bad = signature.target, ~good
    if target.kind == "number":
        alone = len(target.columns) == 1
        names = ["predicted"] if alone else [f"predicted.{column}" for column in target.columns]
        return {name: pa.array(outputs[:, place], mask=bad) for place, name in enumerate(names)}
    chances = {f"probability.{label}": pa.array(outputs[:, place], mask=bad) for place, label in enumerate(target.labels)}
    labels = pa.array(list(target.labels))
    if target.kind == "category":
        best = np.array([row[0] for row in decided], np.int64)
        likely = outputs[np.arange(len(best)), best] if len(best) else np.zeros(0, np.float32)
        return {"predicted": labels.take(pa.array(best, mask=bad)), "probability": pa.array(likely, mask=bad), **chances}
    names = [str(label) for label in target.labels]
    lists = [[names[index] for index in row] if is_good else None for row, is_good in zip(decided, good.tolist(), strict=True)]
    return {"predicted": pa.array(lists, pa.list_(pa.string())), **chances}


def score(
    run: str | Path,
    data: str,
    out: Path,
    *,
    home: Path = Path("runs"),
    columns: Sequence[str] | None = None,
    address: str | None = None,
    progress: Progress = silent,
) -> Scored:
    """What a run's model says of every row of files, written to `out`: a .parquet, .csv or .jsonl file, or else a folder of parquet parts.

    columns: of the input, to be written beside the predictions; None is all that are no images or lists. address: a Ray cluster to work
    on; every node must see the files and `out`. Called again after it was ended in the middle, it does what is left. Raises DloptError.
    """
    start = time.monotonic()
    folder = runs.find(str(run), home)
    _, export = runs.exported(folder)
    whole_file = out.suffix.lower() in FORMATS
    if not whole_file and out.suffix and not out.is_dir():
        raise DloptError(f"-o: {out}: write a {', '.join(FORMATS)} file, or a folder without an ending")
    folder_of_parts = out.with_name(out.name + PARTS) if whole_file else out
    if whole_file and out.exists() and not folder_of_parts.exists():
        raise DloptError(f"-o: {out} is there already: remove it, or give another name")
    parts = Parts(folder_of_parts.resolve(), stay=not whole_file)
    work = _work(folder, export, data, parts, columns)
    place, tasks = _tasks(work.source)
    work = replace(work, place=place)
    with parts.ours(_identity(work, export)):
        kept = sum(note["rows"] for note in parts.notes())
        with joined(parts, out) if whole_file else nullcontext(_nowhere) as add:
            if address is None:
                _run_here(work, tasks, add, progress)
            else:
                _run_there(work, tasks, add, address, progress)
            progress("predict", 1.0, f"writing {out}" if whole_file else "all parts are there")
        found = _summed(work, out, kept, start)
    if whole_file:
        shutil.rmtree(parts.folder)
    return found


def _nowhere(paths: Iterable[Path]) -> None:
    """Parts that stay are where they belong."""


def _work(folder: Path, export: Artifact, data: str, parts: Parts, columns: Sequence[str] | None) -> Work:
    section = yaml.safe_load((folder / runs.JOB).read_text())["data"]
    signature = Signature.model_validate_json(export.read("signature.json"))
    inputs = TypeAdapter(tuple[Input, ...]).validate_python(section["inputs"])
    target: AnyTarget = TypeAdapter(AnyTarget).validate_python(section["target"])
    source = _source(data, TypeAdapter(Source).validate_python(section["source"]), signature)
    layout = source.layout()
    for column in dict.fromkeys(column for feature in signature.inputs for column in feature.columns):
        if column not in layout.names:
            raise DloptError(f"{data}: has no column {column!r}, which the model takes; its columns are {', '.join(layout.names)[:300]}")
    compares = all(column in layout.names for column in target.columns)
    keep = _kept(layout, columns, data)
    mine = {column for feature in signature.inputs for column in feature.columns} | set(keep) | set(target.columns if compares else ())
    schema = wanted(layout, [name for name in layout.names if name in mine])
    markers = {marker for feature in signature.inputs for marker in feature.markers}
    said = source.meaning()
    types = {column: feature.type_of(column) for feature in signature.inputs for column in feature.columns if feature.types}
    meaning = Columns({**said.types, **types}, tuple(dict.fromkeys(["", *said.missing, *sorted(markers)])))
    return Work(export.path.resolve(), inputs, target, source, None, schema, meaning, keep, compares, parts)


def _source(data: str, trained: Any, signature: Signature) -> Any:
    """What the words mean, read as training read its files where they are of the same kind; for a model of images alone they may be files
    of images. Raises DloptError."""
    if trained.kind == "image_table":
        return trained.model_copy(update={"table": _source(data, trained.table, signature)})
    found: Any
    try:
        found = source_of(data)
    except DloptError:
        if len(signature.inputs) > 1 or signature.inputs[0].holds != "pixels":
            raise
        found = ImageFiles(path=data, column=signature.inputs[0].columns[0])
        found.located()
    return trained.model_copy(update={"path": found.path}) if found.kind == trained.kind and hasattr(found, "path") else found


def _kept(layout: pa.Schema, columns: Sequence[str] | None, data: str) -> tuple[str, ...]:
    if columns is None:
        found = tuple(field.name for field in layout if not pa.types.is_nested(field.type) and not pa.types.is_binary(field.type))
    else:
        for column in columns:
            if column not in layout.names:
                raise DloptError(f"--columns: {data} has no column {column!r}; its columns are {', '.join(layout.names)[:300]}")
        found = tuple(dict.fromkeys(columns))
    for column in found:
        if column in ("predicted", "probability", "error") or column.startswith(("predicted.", "probability.")):
            raise DloptError(f"--columns: the input has a column {column!r}, as the predictions do: name the columns to keep without it")
    return found


def _tasks(source: Any) -> tuple[Place | None, list[list[Piece]]]:
    """Pieces that are read together; one task of all where the source is not made of pieces."""
    if type(source).tables is not Rows.tables:
        return None, [[]]
    place, pieces = source.pieces()
    return place, list(grouped(pieces, block_bytes(pieces)))


def _identity(work: Work, export: Artifact) -> dict[str, Any]:
    """What parts depend on: of another identity, they must not be mixed."""
    return {
        "model": export.manifest.digest,
        "input": json.loads(json.dumps(work.source.model_dump(mode="json"))),
        "files": json.loads(json.dumps(work.source.found())),
        "columns": list(work.keep),
    }


def _run_here(work: Work, tasks: list[list[Piece]], add: Add, progress: Progress) -> None:
    """Read in this thread, score in others, join in one more: onnxruntime, numpy and Arrow let go of Python's lock meanwhile."""
    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    sizes = [sum(piece.bytes for piece in pieces) for pieces in tasks]
    waiting: deque[Future[None]] = deque()
    begun: deque[tuple[int, int, list[Future[None]]]] = deque()
    _ = work.predictor  # once, and not in each thread
    with ThreadPoolExecutor(threads, "score") as pool:

        def submit(*call: Any) -> Future[None]:
            while len(waiting) > 2 * threads:
                waiting.popleft().result()
            waiting.append(pool.submit(*call))
            return waiting[-1]

        def mark(all_of_them: bool) -> None:
            while begun and (all_of_them or all(future.done() for future in begun[0][2])):
                task, count, left = begun.popleft()
                for future in left:
                    future.result()
                if work.parts.finished(task) is None:
                    work.parts.finish(task, count)
                add(work.parts.finished(task) or ())

        try:
            for task, pieces in enumerate(tasks):
                progress("predict", sum(sizes[:task]) / max(sum(sizes), 1), f"part {task + 1:,} of {len(tasks):,}")
                there = work.parts.finished(task)
                begun.append((task, *work.run(task, pieces, submit)) if there is None else (task, len(there), []))
                mark(False)
            mark(True)
        finally:
            pool.shutdown(cancel_futures=True)


class Scoring:
    """A worker of a cluster: does a task whole."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        task = int(row["task"])
        pieces = [Piece(**piece) for piece in json.loads(row["pieces"])]
        count, _ = self.work.run(task, pieces, lambda write, table, path: write(table, path))
        self.work.parts.finish(task, count)
        return {"task": task}


def _run_there(work: Work, tasks: list[list[Piece]], add: Add, address: str, progress: Progress) -> None:
    from dataclasses import asdict

    from dlopt.session import connected, data_context

    left = [
        {"task": task, "pieces": json.dumps([asdict(piece) for piece in pieces])}
        for task, pieces in enumerate(tasks)
        if work.parts.finished(task) is None
    ]
    if left:
        with connected(address):
            import ray

            data_context()
            cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
            done = ray.data.from_items(left, override_num_blocks=len(left)).map(
                Scoring, fn_constructor_args=(work,), concurrency=(1, min(cpus, len(left)))
            )
            for count, _ in enumerate(done.iter_rows(), len(tasks) - len(left) + 1):
                progress("predict", count / len(tasks), f"part {count:,} of {len(tasks):,}")
    for task in range(len(tasks)):
        add(work.parts.finished(task) or ())


def _summed(work: Work, out: Path, kept: int, start: float) -> Scored:
    notes, target = work.parts.notes(), work.signature.target
    together = merged([one["compared"] for one in notes])
    rows, failed = (sum(one[name] for one in notes) for name in ("rows", "failed"))
    return Scored(out, rows, failed, together.get("rows", 0), metrics(together, target), time.monotonic() - start, kept)
