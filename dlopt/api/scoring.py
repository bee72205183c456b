"""Files of any size to predictions, part by part: whoever is killed in the middle goes on where it stopped.

What the source gives as one table is a part. Its predictions lie in a file of their own, whole or not at all, whose name says which part
it is; the source is cut in the same way each time, so a part that is there is passed over. A folder remembers what its parts are of, and
refuses another model or input. On a cluster Ray Data hands the tasks out; here threads do, without Ray.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import yaml
from pydantic import TypeAdapter

from dlopt import runs
from dlopt.api.compared import Sums, compare, merged, metrics
from dlopt.artifact import Artifact, write_atomically
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

PARTS, RECORD, LOCK = ".parts", "predict.json", "lock"
"""What is added to OUT's name for the folder of its parts; what they are of; and a file that keeps others out."""
TENSOR_BYTES = 32 * 2**20
"""Of rows that are decoded at a time."""
BATCH_ROWS = 2048
MOST_THREADS = 8
SUMS = b"dlopt"
"""In the metadata of a part: how many of its rows could not be read, and what a comparison with the target comes to."""
FORMATS = (".parquet", ".csv", ".jsonl")


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
    folder: Path
    """Of the parts."""

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

    def part(self, task: int, number: int) -> Path:
        """Where a part lies."""
        return self.folder / f"{task:06}-{number:06}.parquet"

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
        """Score rows, and write them as a part: whole or not at all."""
        table, sums = self.score(raw)
        part = path.with_suffix(f".{os.getpid()}.tmp")
        pq.write_table(table.replace_schema_metadata({SUMS: json.dumps(sums).encode()}), part, use_dictionary=_repeating(table.schema))
        part.replace(path)

    def run(self, task: int, pieces: Sequence[Piece], submit: Callable[..., Any]) -> tuple[int, list[Any]]:
        """Do what is left of a task; how many parts it has, and what `submit` gave for those that were left."""
        left, count = [], 0
        for count, table in enumerate(self.tables(task, pieces), 1):
            path = self.part(task, count - 1)
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
    parts = out.with_name(out.name + PARTS) if whole_file else out
    if whole_file and out.exists() and not parts.exists():
        raise DloptError(f"-o: {out} is there already: remove it, or give another name")
    work = _work(folder, export, data, parts, columns)
    place, tasks = _tasks(work.source)
    work = replace(work, place=place)
    with _folder_of_ours(parts, _identity(work, export)):
        kept = _rows_in(work.folder)
        if address is None:
            _run_here(work, tasks, progress)
        else:
            _run_there(work, tasks, address, progress)
        found = _summed(work, out, kept, start)
        if whole_file:
            progress("predict", None, f"writing {out}")
            _join(work, out)
    if whole_file:
        shutil.rmtree(parts)
    return found


def _work(folder: Path, export: Artifact, data: str, parts: Path, columns: Sequence[str] | None) -> Work:
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
    return Work(export.path.resolve(), inputs, target, source, None, schema, meaning, keep, compares, parts.resolve())


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


@contextmanager
def _folder_of_ours(folder: Path, identity: dict[str, Any]) -> Iterator[None]:
    """The folder of parts, which nobody else writes to meanwhile. Raises DloptError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DloptError(f"-o: cannot write to {folder}: {error.strerror or error}") from None
    with open(folder / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DloptError(f"-o: another dlopt predict is writing to {folder}") from None
        record = folder / RECORD
        if record.is_file():
            before = json.loads(record.read_bytes())
            changed = [name for name, value in identity.items() if before.get(name) != value]
            if changed:
                what = " and ".join(changed)
                raise DloptError(f"-o: {folder} holds predictions of another {what}: remove it, or give another name")
        elif any(folder.glob("*.parquet")):
            raise DloptError(f"-o: {folder} holds other files: give a folder of its own")
        else:
            write_atomically(record, json.dumps(identity))
        for left in folder.glob("*.tmp"):
            left.unlink(missing_ok=True)
        yield


def _run_here(work: Work, tasks: list[list[Piece]], progress: Progress) -> None:
    """Read in this thread, score in others: onnxruntime, numpy and Arrow let go of Python's lock meanwhile."""
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
                write_atomically(work.folder / f"{task:06}.done", str(count))

        try:
            for task, pieces in enumerate(tasks):
                progress("predict", sum(sizes[:task]) / max(sum(sizes), 1), f"part {task + 1:,} of {len(tasks):,}")
                if _parts_of(work, task) is None:
                    begun.append((task, *work.run(task, pieces, submit)))
                mark(False)
            mark(True)
        finally:
            pool.shutdown(cancel_futures=True)
    progress("predict", 1.0, "all parts are there")


class Scoring:
    """A worker of a cluster: does a task whole."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        task = int(row["task"])
        pieces = [Piece(**piece) for piece in json.loads(row["pieces"])]
        count, _ = self.work.run(task, pieces, lambda write, table, path: write(table, path))
        write_atomically(self.work.folder / f"{task:06}.done", str(count))
        return {"task": task}


def _run_there(work: Work, tasks: list[list[Piece]], address: str, progress: Progress) -> None:
    from dataclasses import asdict

    from dlopt.session import connected, data_context

    left = [
        {"task": task, "pieces": json.dumps([asdict(piece) for piece in pieces])}
        for task, pieces in enumerate(tasks)
        if _parts_of(work, task) is None
    ]
    if not left:
        return
    with connected(address):
        import ray

        data_context()
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        done = ray.data.from_items(left, override_num_blocks=len(left)).map(
            Scoring, fn_constructor_args=(work,), concurrency=(1, min(cpus, len(left)))
        )
        for count, _ in enumerate(done.iter_rows(), len(tasks) - len(left) + 1):
            progress("predict", count / len(tasks), f"part {count:,} of {len(tasks):,}")


def _parts_of(work: Work, task: int) -> int | None:
    """How many parts a finished task has; None of one that is not."""
    try:
        count = int((work.folder / f"{task:06}.done").read_text())
    except (OSError, ValueError):
        return None
    return count if all(work.part(task, number).is_file() for number in range(count)) else None


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-*.parquet"))


def _rows_in(folder: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in _files(folder))


def _summed(work: Work, out: Path, kept: int, start: float) -> Scored:
    rows, sums = 0, []
    for path in _files(work.folder):
        metadata = pq.read_metadata(path)
        rows += metadata.num_rows
        sums.append(json.loads(metadata.metadata[SUMS]))
    together, target = merged([one["compared"] for one in sums]), work.signature.target
    failed = sum(one["failed"] for one in sums)
    return Scored(out, rows, failed, together.get("rows", 0), metrics(together, target), time.monotonic() - start, kept)


def _join(work: Work, out: Path) -> None:
    """The parts in order as one file, whole or not at all."""
    files = _files(work.folder)
    schema = pq.read_schema(files[0]).remove_metadata()
    part = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        with _writer(out.suffix.lower(), part, schema) as write:
            for path in files:
                write(pq.read_table(path).replace_schema_metadata(None))
        part.replace(out)
    except OSError as error:
        raise DloptError(f"-o: cannot write {out}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _writer(ending: str, path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """What writes tables one after another."""
    if ending == ".parquet":
        with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=_repeating(schema)) as sink:
            yield sink.write_table
    elif ending == ".csv":
        flat = pa.schema([(field.name, pa.string() if pa.types.is_nested(field.type) else field.type) for field in schema])
        with pa.csv.CSVWriter(path, flat) as lines:
            yield lambda table: lines.write_table(_flat(table, flat))
    else:
        with open(path, "w") as file:
            yield lambda table: file.writelines(json.dumps(row, default=str) + "\n" for row in table.to_pylist())


def _repeating(schema: pa.Schema) -> list[str]:
    """Columns whose values are worth a dictionary; of a million different numbers, making one takes longer than writing them."""
    return [field.name for field in schema if not pa.types.is_floating(field.type)]


def _flat(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """With JSON's text for each list."""
    columns = [
        pa.array([None if value is None else json.dumps(value) for value in column.to_pylist()], pa.string())
        if pa.types.is_nested(column.type)
        else column
        for column in table.columns
    ]
    return pa.table(columns, schema=schema)
