"""The prepare stage: raw rows to clean, split, encoded rows and statistics of the training split, on Ray Data.

Two passes. The first decodes every row and gives it a 128-bit key, the hash of its content; rows that cannot be read go to
`bad/` with their reason. The second brings rows of one range of keys together, sorts them, drops duplicates, splits, writes
parquet and sums statistics. The keys alone decide where a row goes, so the artifact does not depend on blocks or workers.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
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
from dlopt.data.prepared import feature_columns, write_part
from dlopt.data.section import Data
from dlopt.data.sources import Source
from dlopt.data.split import NAMES, StratifiedSplit, Thresholds
from dlopt.part import DloptError, Feature, Signature, Target
from dlopt.progress import Progress, silent
from dlopt.session import data_context

if TYPE_CHECKING:
    from ray.data import Dataset

PART_BYTES = 32 * 2**20
"""About how many bytes of encoded rows one file gets; their number follows from the rows, not from the cluster."""
PEEK_ROWS = 64
LABEL, HIGH, LOW, RANGE = "__label", "__high", "__low", "__range"


def peek(section: Data) -> tuple[Feature, ...]:
    """The model's inputs, from the first rows, without Ray. Raises DloptError on missing files and columns."""
    features: tuple[Feature, ...] = ()
    for where, source in (("data.source", section.source), ("data.test", section.test)):
        if source is None:
            continue
        table = source.peek(PEEK_ROWS)
        for column in section.columns:
            if column not in table.column_names:
                raise DloptError(f"{where}: has no column {column!r}; its columns are {', '.join(table.column_names)}")
        if len(table) == 0:
            raise DloptError(f"{where}: is empty")
        features = features or tuple(part.feature(table) for part in section.inputs)
    return features


def prepare(section: Data, out: Path, *, progress: Progress = silent) -> dict[str, Any]:
    """Fill `out` with train/, validation/, test/ and bad/ parquet, signature.json and statistics.json; returns the counts."""
    data_context()
    clock = _Clock()
    features = peek(section)
    progress("prepare", None, "decoding")
    main = _Rows.encode(section, section.source, features, out / "bad", progress)
    test = _Rows.encode(section, section.test, features, out / "bad", progress) if section.test else None
    clock.lap("decode")
    _refuse_bad(section, out / "bad", [rows for rows in (main, test) if rows])
    signature = Signature(inputs=features, target=Target(name=section.target.column, labels=main.labels))
    progress("prepare", None, "splitting and writing")
    done = main.write(section, signature, _assign(section, main), out, progress)
    if test:
        test.refuse_unknown_labels(main.labels)
        done += test.write(section, signature, dict.fromkeys(main.labels, (0.0, 0.0)), out, progress)
    clock.lap("write")
    _refuse_unlearnable(section, signature, done)
    statistics = {
        feature.name: moments.merge([part.moments[feature.name] for part in done if feature.name in part.moments]).statistics(source)
        for feature, source in zip(features, section.inputs, strict=True)
    }
    write_atomically(out / "signature.json", signature.model_dump_json(indent=1))
    write_atomically(out / "statistics.json", json.dumps({name: found.model_dump() for name, found in statistics.items()}, indent=1))
    return _info(signature, [rows for rows in (main, test) if rows], done, out / "bad", clock.seconds)


PREPARE = Stage("data", prepare)


@dataclass(frozen=True)
class _Rows:
    """A source's rows that could be read: encoded, keyed, and held in Ray's object store."""

    dataset: Dataset
    count: int
    bad: int
    labels: tuple[Any, ...]
    label_positions: Callable[[Any], dict[Any, np.ndarray]]
    where: str

    @classmethod
    def encode(cls, section: Data, source: Source, features: tuple[Feature, ...], bad: Path, progress: Progress) -> _Rows:
        where = "data.source" if source is section.source else "data.test"
        folder = bad / where.removeprefix("data.")
        encoder = _Encoder(section, features, str(folder))
        dataset = source.read().map_batches(encoder, batch_format="pyarrow", batch_size=None).materialize()
        count = dataset.count()
        if count == 0 and not folder.is_dir():
            raise DloptError(f"{where}: is empty")
        keys = dataset.select_columns([LABEL, HIGH, LOW]) if count else None
        blocks = list(keys.iter_batches(batch_size=None, batch_format="pyarrow")) if keys else []
        labels = sorted({label for table in blocks for label in table[LABEL].unique().to_pylist()})

        def positions(split: Any) -> dict[Any, np.ndarray]:
            everything = pa.concat_tables(blocks)
            found = np.stack([everything[HIGH].to_numpy(), everything[LOW].to_numpy()], axis=1)
            for clean in section.clean:
                order = np.lexsort((found[:, 1], found[:, 0]))
                keep = order[clean.keep(found[order])]
                everything, found = everything.take(pa.array(keep)), found[keep]
            names = everything[LABEL].to_numpy()
            return {label: split.position(found[names == label]) for label in labels}

        bad_rows = sum(pq.ParquetFile(file).metadata.num_rows for file in _parquets(folder))
        progress("prepare", None, f"{count:,} rows decoded")
        return cls(dataset, count, bad_rows, tuple(labels), positions, where)

    def refuse_unknown_labels(self, known: tuple[Any, ...]) -> None:
        for label in self.labels:
            if label not in known:
                raise DloptError(f"data.test: label {label!r} is not in data.source, so it cannot be learned: drop it or add rows of it")

    def write(self, section: Data, signature: Signature, thresholds: Thresholds, out: Path, progress: Progress) -> list[_Done]:
        """Bring each range of keys together and finish it; one _Done a range, in order."""
        row_bytes = sum(feature.size * np.dtype(feature.dtype).itemsize for feature in signature.inputs) + 8
        power = max(0, (self.count * row_bytes // PART_BYTES).bit_length())
        finisher = _Finisher(section, signature, thresholds, str(out))
        ranged = self.dataset.map_batches(_RangeOf(power), batch_format="pyarrow", batch_size=None)
        groups = ranged.groupby(RANGE, num_partitions=min(2**power, 256))
        finished = groups.map_groups(lambda table: finisher(table), batch_format="pyarrow")  # Ray wants a function's __name__
        done = []
        for row in finished.iter_rows():
            done.append(_Done.from_row(row))
            progress("prepare", len(done) / 2**power, f"{self.where}: {sum(part.rows for part in done):,} rows written")
        return sorted(done, key=lambda part: part.range)


class _Encoder:
    """First pass, on a block: encode, set bad rows aside, and key the rest by their content."""

    def __init__(self, section: Data, features: tuple[Feature, ...], bad: str) -> None:
        self.section, self.features, self.bad = section, features, bad

    def __call__(self, table: pa.Table) -> pa.Table:
        reasons: dict[int, str] = {}
        arrays = []
        for part, feature in zip(self.section.inputs, self.features, strict=True):
            values, wrong = part.encode(table, feature)
            arrays.append(values)
            reasons = wrong | reasons
        labels, wrong = self.section.target.encode(table)
        reasons = wrong | reasons
        if reasons:
            self._set_aside(table, reasons)
            good = np.setdiff1d(np.arange(len(table)), np.fromiter(reasons, dtype=np.int64))
            arrays, labels = [values[good] for values in arrays], labels.take(pa.array(good))
        keys = row_keys([*(_hashable(values) for values in arrays), _label_words(labels)])
        columns: dict[str, pa.Array] = {}
        for feature, values in zip(self.features, arrays, strict=True):
            columns |= feature_columns(feature, values)
        return pa.table(columns | {LABEL: labels, HIGH: pa.array(keys[:, 0]), LOW: pa.array(keys[:, 1])})

    def _set_aside(self, table: pa.Table, reasons: dict[int, str]) -> None:
        """Named by its content, so that a task which Ray runs twice writes one file."""
        rows = sorted(reasons)
        found = table.take(pa.array(rows)).append_column("reason", pa.array([reasons[row] for row in rows]))
        sink = pa.BufferOutputStream()
        pq.write_table(found, sink)
        content = sink.getvalue().to_pybytes()
        Path(self.bad).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(self.bad) / f"{blake2b(content, digest_size=8).hexdigest()}.parquet", content)


class _RangeOf:
    """The range of keys that a row belongs to: the first `power` bits of its key."""

    def __init__(self, power: int) -> None:
        self.power = power

    def __call__(self, table: pa.Table) -> pa.Table:
        high = table[HIGH].to_numpy()
        ranges = (high >> np.uint64(64 - self.power)).astype(np.int64) if self.power else np.zeros(len(high), dtype=np.int64)
        return table.append_column(RANGE, pa.array(ranges))


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
        number = table[RANGE][0].as_py()
        keys = np.stack([table[HIGH].to_numpy(), table[LOW].to_numpy()], axis=1)
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        for clean in self.section.clean:
            order = order[clean.keep(keys[order])]
        duplicates = len(table) - len(order)
        table, keys = table.take(pa.array(order)), keys[order]
        codes = pc.index_in(table[LABEL], pa.array(self.signature.target.labels, table[LABEL].type)).combine_chunks().to_numpy()
        split = self._split(codes, self.section.split.position(keys))
        table = table.drop_columns([LABEL, HIGH, LOW, RANGE]).append_column(self.signature.target.name, pa.array(codes.astype(np.int64)))
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
        return section.split.thresholds(rows.label_positions(section.split))
    return dict.fromkeys(rows.labels, section.split.cuts)


def _refuse_bad(section: Data, bad: Path, sources: list[_Rows]) -> None:
    total, wrong = sum(rows.count + rows.bad for rows in sources), sum(rows.bad for rows in sources)
    for rows in sources:
        if rows.count == 0:
            raise DloptError(f"{rows.where}: none of its {rows.bad:,} rows can be read: {_reasons(bad)}; see {bad}")
    if wrong > section.most_bad * total:
        raise DloptError(
            f"data: {wrong:,} of {total:,} rows cannot be read ({wrong / total:.1%}, data.most_bad allows {section.most_bad:.1%}): "
            f"{_reasons(bad)}; they are in {bad}"
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
        for label, count in counts.get(name, {}).items():
            if count and not counts["train"][label]:
                raise DloptError(
                    f"data: label {label!r} is in the {name} split but not in train: add rows of it, or use a stratified split"
                )


def _label_counts(signature: Signature, done: list[_Done]) -> dict[str, dict[str, int]]:
    """split to class to rows, for the splits that have rows."""
    totals: dict[str, np.ndarray] = {}
    for part in done:
        for name, counts in part.labels.items():
            totals[name] = totals.get(name, 0) + np.array(counts)
    return {name: dict(zip(map(str, signature.target.labels), totals[name].tolist(), strict=True)) for name in NAMES if name in totals}


def _info(signature: Signature, sources: list[_Rows], done: list[_Done], bad: Path, seconds: dict[str, float]) -> dict[str, Any]:
    labels = _label_counts(signature, done)
    counts = {
        "read": sum(rows.count + rows.bad for rows in sources),
        "bad": sum(rows.bad for rows in sources),
        "duplicates": sum(part.duplicates for part in done),
        **{name: sum(labels.get(name, {}).values()) for name in NAMES},
    }
    return {"counts": counts, "bad_reasons": dict(_count_reasons(bad)), "labels": labels, "seconds": seconds}


def _count_reasons(bad: Path) -> Counter[str]:
    return Counter(reason for file in _parquets(bad) for reason in pq.read_table(file, columns=["reason"])["reason"].to_pylist())


def _reasons(bad: Path) -> str:
    return "; ".join(f"{reason} ({count})" for reason, count in _count_reasons(bad).most_common(3))


def _parquets(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.parquet"))


def _hashable(values: np.ndarray) -> np.ndarray:
    """All NaNs alike, and no negative zero."""
    return values if values.dtype == np.uint8 else np.where(np.isnan(values), np.nan, values + 0.0)


def _label_words(labels: pa.Array) -> np.ndarray:
    if pa.types.is_int64(labels.type):
        return labels.to_numpy(zero_copy_only=False).reshape(-1, 1)
    encoded = labels.dictionary_encode()
    return string_words(encoded.dictionary.to_pylist())[encoded.indices.to_numpy()].reshape(-1, 1)


class _Clock:
    def __init__(self) -> None:
        self.start, self.seconds = time.monotonic(), dict[str, float]()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self.start = round(now - self.start, 3), now
