"""Where predictions lie while they are made: a file a part, whole or not there, and one file of all of them in the end.

Parts that stay are parquet. Those that become one file are Arrow's own, which costs next to nothing to write, and nothing to read again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from dlopt.artifact import write_atomically
from dlopt.part import DloptError

RECORD, LOCK = "predict.json", "lock"
"""What the parts of a folder are of; and a file that keeps others out."""
NOTE = b"dlopt"
"""In the metadata of a part: what is known of its rows."""
TEXT = pa.large_string()
FORMATS = (".parquet", ".csv", ".jsonl")
Write = Callable[[pa.Table], None]


@dataclass(frozen=True)
class Parts:
    """The parts in a folder, in order of their task, and of their number within it."""

    folder: Path
    stay: bool
    """Whether they are what is asked for."""

    def path(self, task: int, number: int) -> Path:
        """Where a part lies."""
        return self.folder / f"{task:06}-{number:06}.{'parquet' if self.stay else 'arrow'}"

    def write(self, table: pa.Table, path: Path, note: dict[str, Any]) -> None:
        """A part: whole or not at all. note: what is known of its rows."""
        table = table.replace_schema_metadata({NOTE: json.dumps(note | {"rows": len(table)}).encode()})
        part = path.with_suffix(f".{os.getpid()}.tmp")
        if self.stay:
            pq.write_table(table, part, use_dictionary=_repeating(table.schema))
        else:
            with pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, table.schema) as sink:
                sink.write_table(table)
        part.replace(path)

    def read(self, path: Path) -> pa.Table:
        """A part's rows."""
        if self.stay:
            return pq.read_table(path).replace_schema_metadata(None)
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all().replace_schema_metadata(None)

    def notes(self) -> list[dict[str, Any]]:
        """What is known of each part that is there, its `rows` too."""
        return [json.loads(self._schema(path).metadata[NOTE]) for path in sorted(self.folder.glob(self._pattern))]

    def finish(self, task: int, count: int) -> None:
        """Note that a task has so many parts, all of them there."""
        write_atomically(self.folder / f"{task:06}.done", str(count))

    def finished(self, task: int) -> list[Path] | None:
        """All parts of a finished task; None of one that is not."""
        try:
            count = int((self.folder / f"{task:06}.done").read_text())
        except (OSError, ValueError):
            return None
        paths = [self.path(task, number) for number in range(count)]
        return paths if all(path.is_file() for path in paths) else None

    @property
    def _pattern(self) -> str:
        return f"*-*.{'parquet' if self.stay else 'arrow'}"

    def _schema(self, path: Path) -> pa.Schema:
        if self.stay:
            return pq.read_schema(path)
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).schema

    @contextmanager
    def ours(self, identity: dict[str, Any]) -> Iterator[None]:
        """The folder, to which nobody else writes meanwhile. identity: what parts depend on, by its name; those of another one must not be
        mixed with ours. Raises DloptError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DloptError(f"-o: cannot write to {self.folder}: {error.strerror or error}") from None
        with open(self.folder / LOCK, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise DloptError(f"-o: another dlopt predict is writing to {self.folder}") from None
            record = self.folder / RECORD
            if record.is_file():
                before = json.loads(record.read_bytes())
                if changed := " and ".join(name for name, value in identity.items() if before.get(name) != value):
                    raise DloptError(f"-o: {self.folder} holds predictions of another {changed}: remove it, or give another name")
            elif any(self.folder.glob(self._pattern)):
                raise DloptError(f"-o: {self.folder} holds other files: give a folder of its own")
            else:
                write_atomically(record, json.dumps(identity))
            for left in self.folder.glob("*.tmp"):
                left.unlink(missing_ok=True)
            yield


@contextmanager
def joined(parts: Parts, out: Path) -> Iterator[Callable[[Iterable[Path]], None]]:
    """What adds parts to the end of one file, in a thread of its own; the file is there when all of them are. Raises DloptError."""
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    adding: list[Future[None]] = []
    file = _File(temporary, out.suffix.lower())

    def add(paths: Iterable[Path]) -> None:
        adding.extend(thread.submit(lambda path=path: file.write(parts.read(path))) for path in paths)  # type: ignore[misc]

    try:
        with ThreadPoolExecutor(1, "join") as thread:
            try:
                yield add
                for one in adding:
                    one.result()
            finally:
                thread.shutdown(cancel_futures=True)
                file.close()
        temporary.replace(out)
    except OSError as error:
        raise DloptError(f"-o: cannot write {out}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


class _File:
    """One that tables are written to, one below the other."""

    def __init__(self, path: Path, ending: str) -> None:
        self.path, self.ending = path, ending
        self.sink: Any = None
        self.schema: pa.Schema | None = None

    def write(self, table: pa.Table) -> None:
        if self.schema is None:
            self._open(table.schema)
        if self.ending == ".jsonl":
            self.sink.write(lines_of(table))
        else:
            self.sink.write_table(_flat(table, self.schema) if self.ending == ".csv" else table)

    def _open(self, schema: pa.Schema) -> None:
        if self.ending == ".parquet":
            self.sink = pq.ParquetWriter(self.path, schema, compression="zstd", use_dictionary=_repeating(schema))
        elif self.ending == ".csv":
            schema = pa.schema([(field.name, pa.string() if pa.types.is_nested(field.type) else field.type) for field in schema])
            self.sink = pa.csv.CSVWriter(self.path, schema)
        else:
            self.sink = open(self.path, "wb")  # noqa: SIM115
        self.schema = schema

    def close(self) -> None:
        if self.sink is not None:
            self.sink.close()


def _repeating(schema: pa.Schema) -> list[str]:
    """Columns whose values are worth a dictionary; of a million different numbers, making one takes longer than writing them."""
    return [field.name for field in schema if not (pa.types.is_floating(field.type) or pa.types.is_integer(field.type))]


def _flat(table: pa.Table, schema: pa.Schema | None) -> pa.Table:
    """With JSON's text for each list."""
    columns = [_json_texts(column, None) if pa.types.is_nested(column.type) else column for column in table.columns]
    return pa.table(columns, schema=schema)


def lines_of(table: pa.Table) -> bytes:
    """An object of JSON a line."""
    if not len(table):
        return b""
    pieces: list[Any] = []
    for place, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
        before = pa.scalar(f"{', ' if place else '{'}{json.dumps(name)}: ", TEXT)
        pieces += [before, _json_texts(column, "null").cast(TEXT)]
    lines = pc.binary_join_element_wise(*pieces, pa.scalar("}\n", TEXT), pa.scalar("", TEXT)).combine_chunks()
    return b"".join(_bytes(chunk) for chunk in (lines.chunks if isinstance(lines, pa.ChunkedArray) else [lines]))


def _bytes(texts: pa.LargeStringArray) -> memoryview:
    """All texts, one after the other, as they lie in memory."""
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return memoryview(data)[ends[0] : ends[-1]]


def _json_texts(column: pa.ChunkedArray, null: str | None) -> pa.ChunkedArray:
    """JSON's text of each value; each different one is spelled once, and numbers are by Arrow."""
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or (pa.types.is_floating(kind) and _all_finite(column)):
        texts = column.cast(pa.string())
    elif pa.types.is_nested(kind):
        texts = pa.chunked_array([[None if value is None else json.dumps(value, default=str) for value in column.to_pylist()]], pa.string())
    else:
        codes = column.combine_chunks().dictionary_encode()
        spelled = pa.array([json.dumps(value, default=str) for value in codes.dictionary.to_pylist()], pa.string())
        texts = pa.chunked_array([spelled.take(codes.indices)])
    return texts if null is None else pc.fill_null(texts, null)


def _all_finite(column: pa.ChunkedArray) -> bool:
    return bool(pc.all(pc.is_finite(column)).as_py() is not False)
