"""The prepare stage: raw rows to clean, split, encoded rows and statistics of the training split, on Ray Data.

Two passes. The first decodes every row and gives it a 128-bit key, the hash of its content; rows that cannot be read go to
`bad/` with their reason. The second brings rows of one range of keys together, sorts them, drops duplicates, splits, writes
parquet and sums statistics. The keys alone decide where a row goes, so the artifact does not depend on blocks or workers.
A set that makes one range is brought together by one task; more ranges take a shuffle, whose workers are seconds in starting.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dlopt.artifact import Stage, write_atomically
from dlopt.data import moments
from dlopt.data.counter import row_keys, string_words
from dlopt.data.moments import Moments
from dlopt.data.prepared import columns_of, feature_columns, row_bytes, write_part
from dlopt.data.section import Data
from dlopt.data.sources import Source
from dlopt.data.split import NAMES, StratifiedSplit, Thresholds
from dlopt.part import DloptError, Feature, Signature, Target
from dlopt.progress import Progress, silent
from dlopt.session import data_context

if TYPE_CHECKING:
    from ray.data import Dataset

PART_BYTES = 64 * 2**20
"""About how many bytes of encoded rows one file gets; their number follows from the rows, not from the cluster."""
PEEK_ROWS = 64
LABEL, HIGH, LOW, RANGE = "__label", "__high", "__low", "__range"
REASON, RAW = "__reason", "__raw"
"""Why a row is bad, null for a good one, and the row as it was read, as a table of Arrow's stream format."""


def peek(section: Data) -> tuple[Feature, ...]:
    """The model's inputs, from the first rows, without Ray. Raises DloptError on missing files and columns."""
    return _look(section)[0]


def _look(section: Data) -> tuple[tuple[Feature, ...], bool]:
    """The model's inputs, and whether the classes are whole numbers."""
    first = _first_rows(section, "data.source", section.source)
    if section.test is not None:
        _first_rows(section, "data.test", section.test)
    return tuple(part.feature(first) for part in section.inputs), section.target.whole(first)


def _first_rows(section: Data, where: str, source: Source) -> pa.Table:
    try:
        table = source.peek(PEEK_ROWS)
    except DloptError as error:
        raise DloptError(f"{where}: {error}") from None
    for column in section.columns:
        if column not in table.column_names:
            raise DloptError(f"{where}: has no column {column!r}; its columns are {', '.join(table.column_names)}")
    if len(table) == 0:
        raise DloptError(f"{where}: is empty")
    return table


def prepare(section: Data, out: Path, *, progress: Progress = silent) -> dict[str, Any]:
    """Fill `out` with train/, validation/, test/ and bad/ parquet, signature.json and statistics.json; returns the counts."""
    data_context()
    clock = _Clock()
    features, whole = _look(section)
    progress("prepare", None, "decoding")
    encoder = _Encoder(section, features, whole)
    main = _Rows.encode("source", section.source, encoder, out / "bad", progress)
    test = _Rows.encode("test", section.test, encoder, out / "bad", progress) if section.test else None
    sources = [rows for rows in (main, test) if rows]
    clock.lap("decode")
    _refuse_bad(section, out / "bad", sources)
    signature = Signature(inputs=features, target=Target(name=section.target.column, labels=main.labels))
    if test:
        test.refuse_unknown_labels(main.labels)
    progress("prepare", None, "splitting and writing")
    done = main.write(section, signature, _assign(section, main), out, progress)
    if test:
        done += test.write(section, signature, dict.fromkeys(main.labels, (0.0, 0.0)), out, progress)
    clock.lap("write")
    _refuse_unlearnable(section, signature, done)
    statistics = {
        feature.name: moments.merge([part.moments[feature.name] for part in done if feature.name in part.moments]).statistics(source)
        for feature, source in zip(features, section.inputs, strict=True)
    }
    write_atomically(out / "signature.json", signature.model_dump_json(indent=1))
    write_atomically(out / "statistics.json", json.dumps({name: found.model_dump() for name, found in statistics.items()}, indent=1))
    return _info(signature, sources, done, clock.seconds)


PREPARE = Stage("data", prepare)


@dataclass(frozen=True)
class _Rows:
    """A source's rows, encoded, keyed, and held in Ray's object store; and what the driver knows of them."""

    dataset: Dataset
    rows: int
    """Bad ones included."""
    reasons: Counter[str]
    """Why rows are bad, and how many of them."""
    labels: tuple[Any, ...]
    """Classes, sorted."""
    keys: pa.Table
    """LABEL, HIGH and LOW of the good rows."""
    where: str

    @classmethod
    def encode(cls, name: str, source: Source, encoder: _Encoder, bad: Path, progress: Progress) -> _Rows:
        where = f"data.{name}"
        with _saying(where):
            dataset = source.read().map_batches(encoder, batch_format="pyarrow", batch_size=None).materialize()
        if (rows := dataset.count()) == 0:
            raise DloptError(f"{where}: is empty")
        reasons: Counter[str] = Counter()
        keys = []
        columns = dataset.select_columns([LABEL, HIGH, LOW, REASON, RAW])
        for number, table in enumerate(columns.iter_batches(batch_size=None, batch_format="pyarrow")):
            wrong = table.filter(pc.is_valid(table[REASON]))
            if len(wrong):
                reasons.update(wrong[REASON].to_pylist())
                _set_aside(wrong, bad / name / f"part-{number:05d}.parquet")
            keys.append(_good(table).drop_columns([REASON, RAW]))
        together = pa.concat_tables(keys)
        progress("prepare", None, f"{rows:,} rows decoded")
        return cls(dataset, rows, reasons, tuple(sorted(together[LABEL].unique().to_pylist())), together, where)

    @property
    def bad(self) -> int:
        return self.reasons.total()

    def positions(self, section: Data) -> dict[int | str, np.ndarray]:
        """label: where the rows of that class that cleaning leaves stand in [0, 1)."""
        keys, labels = _keys(self.keys), self.keys[LABEL].to_numpy()
        order = _cleaned(section, keys)
        position, labels = section.split.position(keys[order]), labels[order]
        return {label: position[labels == label] for label in self.labels}

    def refuse_unknown_labels(self, known: tuple[Any, ...]) -> None:
        for label in self.labels:
            if label not in known:
                raise DloptError(f"data.test: label {label!r} is not in data.source, so it cannot be learned: drop it or add rows of it")

    def write(self, section: Data, signature: Signature, thresholds: Thresholds, out: Path, progress: Progress) -> list[_Done]:
        """Bring each range of keys together and finish it; one _Done a range, in order."""
        good = self.rows - self.bad
        power = (good * row_bytes(signature) // PART_BYTES).bit_length()
        finisher = _Finisher(section, signature, thresholds, str(out))
        if power == 0:
            finished = self.dataset.map_batches(finisher, batch_format="pyarrow", batch_size=self.rows)
        else:
            ranged = self.dataset.map_batches(_RangeOf(power), batch_format="pyarrow", batch_size=None)
            groups = ranged.groupby(RANGE, num_partitions=min(2**power, 256))
            finished = groups.map_groups(lambda table: finisher(table), batch_format="pyarrow")  # Ray wants a function's __name__
        done = []
        for row in finished.iter_rows():
            done.append(_Done.from_row(row))
            progress("prepare", len(done) / 2**power, f"{self.where}: {sum(part.rows for part in done):,} rows written")
        if sum(part.rows + part.duplicates for part in done) != good or len({part.range for part in done}) != len(done):
            raise RuntimeError(f"{self.where}: {good} rows went in, but not each of them came out once: {done}")
        return sorted(done, key=lambda part: part.range)


class _Encoder:
    """First pass, on a block: encode, and key every row by its content. Bad rows stay, with their reason and their raw values."""

    def __init__(self, section: Data, features: tuple[Feature, ...], whole: bool) -> None:
        self.section, self.features, self.whole = section, features, whole

    def __call__(self, table: pa.Table) -> pa.Table:
        for column in self.section.columns:
            if column not in table.column_names:
                raise DloptError(f"one of the files has no column {column!r}; its columns are {', '.join(table.column_names)}")
        reasons: dict[int, str] = {}
        arrays = []
        for part, feature in zip(self.section.inputs, self.features, strict=True):
            values, wrong = part.encode(table, feature)
            arrays.append(values)
            reasons = wrong | reasons
        labels, wrong = self.section.target.encode(table, self.whole)
        reasons = wrong | reasons
        keys = row_keys([*(_hashable(values) for values in arrays), _label_words(labels)])
        columns: dict[str, pa.Array] = {}
        for feature, values in zip(self.features, arrays, strict=True):
            columns |= feature_columns(feature, values)
        columns |= {LABEL: labels, HIGH: pa.array(keys[:, 0]), LOW: pa.array(keys[:, 1])}
        return pa.table(
            columns | {REASON: _sparse(reasons, len(table), pa.string()), RAW: _sparse(_raw(table, reasons), len(table), pa.binary())}
        )


def _raw(table: pa.Table, rows: Iterable[int]) -> dict[int, bytes]:
    """Rows as they were read, each a table of its own."""
    found = {}
    for row in rows:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table.slice(row, 1))
        found[row] = sink.getvalue().to_pybytes()
    return found


def _sparse(values: Mapping[int, Any], rows: int, kind: pa.DataType) -> pa.Array:
    """A column that is null but for a few rows."""
    column: list[Any] = [None] * rows
    for row, value in values.items():
        column[row] = value
    return pa.array(column, kind)


def _set_aside(wrong: pa.Table, path: Path) -> None:
    """Write bad rows as they were read, with their reason."""
    raw = pa.concat_tables([pa.ipc.open_stream(value).read_all() for value in wrong[RAW].to_pylist()], promote_options="permissive")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(raw.append_column("reason", wrong[REASON]), path)


def _good(table: pa.Table) -> pa.Table:
    return table.filter(pc.is_null(table[REASON]))


def _keys(table: pa.Table) -> np.ndarray:
    """uint64 of shape (rows, 2)."""
    return np.stack([table[HIGH].to_numpy(), table[LOW].to_numpy()], axis=1)


def _cleaned(section: Data, keys: np.ndarray) -> np.ndarray:
    """Indices of the rows that cleaning leaves, in the order of their keys."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    for clean in section.clean:
        order = order[clean.keep(keys[order])]
    return order


class _RangeOf:
    """The range of keys that a good row belongs to: the first `power` bits of its key."""

    def __init__(self, power: int) -> None:
        self.power = power

    def __call__(self, table: pa.Table) -> pa.Table:
        table = _good(table)
        return table.append_column(RANGE, pa.array((table[HIGH].to_numpy() >> np.uint64(64 - self.power)).astype(np.int64)))


@dataclass(frozen=True)
class _Done:
    """What the second pass says of one range of keys."""

    range: int
    duplicates: int
    labels: dict[str, list[int]]
    """split to the number of its rows of each class."""
    moments: dict[str, Moments]

    @property
    def rows(self) -> int:
        return sum(sum(counts) for counts in self.labels.values())

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> _Done:
        found = json.loads(row["labels"])
        return cls(row["range"], row["duplicates"], found, {name: Moments(**m) for name, m in json.loads(row["moments"]).items()})


class _Finisher:
    """Second pass, on all rows of a range: sort by key, clean, split, write a file a split, and sum up."""

    def __init__(self, section: Data, signature: Signature, thresholds: Thresholds, out: str) -> None:
        self.section, self.signature, self.thresholds, self.out = section, signature, thresholds, out

    def __call__(self, table: pa.Table) -> pa.Table:
        table = _good(table)
        number = table[RANGE][0].as_py() if RANGE in table.column_names else 0
        keys = _keys(table)
        order = _cleaned(self.section, keys)
        duplicates = len(table) - len(order)
        table, keys = table.take(pa.array(order)), keys[order]
        codes = pc.index_in(table[LABEL], pa.array(self.signature.target.labels, table[LABEL].type)).combine_chunks().to_numpy()
        split = self._split(codes, self.section.split.position(keys))
        inputs = table.select([column for feature in self.signature.inputs for column in columns_of(feature)])
        table = inputs.append_column(self.signature.target.name, pa.array(codes.astype(np.int64)))
        labels, found = {}, {}
        for index, name in enumerate(NAMES):
            rows = np.flatnonzero(split == index)
            if len(rows):
                part = table.take(pa.array(rows))
                write_part(part, self.signature, Path(self.out) / name / f"part-{number:05d}.parquet")
                labels[name] = np.bincount(codes[rows], minlength=self.signature.num_outputs).tolist()
                if name == "train":
                    found = {feature.name: moments.of(feature, part) for feature in self.signature.inputs}
        return pa.table(
            {
                "range": [number],
                "duplicates": [duplicates],
                "labels": [json.dumps(labels)],
                "moments": [json.dumps({name: m.__dict__ for name, m in found.items()})],
            }
        )

    def _split(self, codes: np.ndarray, position: np.ndarray) -> np.ndarray:
        cuts = np.array([self.thresholds[label] for label in self.signature.target.labels])[codes]
        return (position >= cuts[:, 0]).astype(np.int64) + (position >= cuts[:, 1])


def _assign(section: Data, rows: _Rows) -> Thresholds:
    if isinstance(section.split, StratifiedSplit):
        return section.split.thresholds(rows.positions(section))
    return dict.fromkeys(rows.labels, section.split.cuts)


def _refuse_bad(section: Data, bad: Path, sources: list[_Rows]) -> None:
    for rows in sources:
        if rows.bad == rows.rows:
            raise DloptError(f"{rows.where}: none of its {rows.bad:,} rows can be read: {_say(rows.reasons)}; they are in {bad}")
    total, reasons = sum(rows.rows for rows in sources), _reasons(sources)
    if (wrong := reasons.total()) > section.most_bad * total:
        raise DloptError(
            f"data: {wrong:,} of {total:,} rows cannot be read ({wrong / total:.1%}, data.most_bad allows {section.most_bad:.1%}): "
            f"{_say(reasons)}; they are in {bad}"
        )
    labels = sources[0].labels
    if len(labels) < 2:
        raise DloptError(f"data.target: column {section.target.column!r} has one class only ({labels[0]!r}): there is nothing to learn")


def _refuse_unlearnable(section: Data, signature: Signature, done: list[_Done]) -> None:
    """A split that came out empty, or a class that is only in validation or test, is the user's to mend."""
    counts = _label_counts(signature, done)
    wanted = {"train": True, "validation": section.split.validation > 0, "test": section.split.test > 0 or section.test is not None}
    for name in NAMES:
        if wanted[name] and not any(counts.get(name, {}).values()):
            raise DloptError(f"data.split: the {name} split is empty: there are too few rows for its share")
    for name in NAMES:
        for label, count in counts.get(name, {}).items():
            if count and not counts["train"][label]:
                raise DloptError(
                    f"data: label {label!r} is in the {name} split but not in train: add rows, drop duplicates, or use a stratified split"
                )


def _label_counts(signature: Signature, done: list[_Done]) -> dict[str, dict[str, int]]:
    """split to class to rows, for the splits that have rows."""
    totals: dict[str, np.ndarray] = {}
    for part in done:
        for name, counts in part.labels.items():
            totals[name] = totals.get(name, 0) + np.array(counts)
    return {name: dict(zip(map(str, signature.target.labels), totals[name].tolist(), strict=True)) for name in NAMES if name in totals}


def _info(signature: Signature, sources: list[_Rows], done: list[_Done], seconds: dict[str, float]) -> dict[str, Any]:
    labels = _label_counts(signature, done)
    counts = {
        "read": sum(rows.rows for rows in sources),
        "bad": sum(rows.bad for rows in sources),
        "duplicates": sum(part.duplicates for part in done),
        **{name: sum(labels.get(name, {}).values()) for name in NAMES},
    }
    return {"counts": counts, "bad_reasons": dict(sorted(_reasons(sources).items())), "labels": labels, "seconds": seconds}


def _reasons(sources: list[_Rows]) -> Counter[str]:
    return sum((rows.reasons for rows in sources), Counter())


def _say(reasons: Counter[str]) -> str:
    """The most frequent reasons, in one line."""
    return "; ".join(f"{reason} ({count:,})" for reason, count in sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))[:3])


@contextmanager
def _saying(where: str) -> Iterator[None]:
    """A file that Ray cannot read is the user's to mend, so it is said in one line."""
    try:
        yield
    except (DloptError, OSError, ValueError) as error:  # Ray's errors are of their cause's class as well
        lines = str(getattr(error, "cause", error)).splitlines()
        place = [line.split(" after ")[0] for line in lines[1:2] if line.startswith("Failed to read")]
        raise DloptError(f"{where}: {'; '.join([*lines[:1], *place])}") from None


def _hashable(values: np.ndarray) -> np.ndarray:
    """All NaNs alike, and no negative zero."""
    return values if values.dtype == np.uint8 else np.where(np.isnan(values), np.nan, values + 0.0)


def _label_words(labels: pa.Array) -> np.ndarray:
    """A 64-bit word for each label; a bad row, which goes no further, may have none."""
    if pa.types.is_int64(labels.type):
        return labels.fill_null(0).to_numpy().reshape(-1, 1)
    encoded = labels.fill_null("").dictionary_encode()
    return string_words(encoded.dictionary.to_pylist())[encoded.indices.to_numpy()].reshape(-1, 1)


class _Clock:
    def __init__(self) -> None:
        self.start, self.seconds = time.monotonic(), dict[str, float]()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self.start = round(now - self.start, 3), now
