"""What prepare does with each range of keys, once it is a file: look for duplicates, look at positions, observe the
training rows, write. Each is a function of a plan and a range's number, so ranges can be worked on anywhere, in any order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dlopt import remote
from dlopt.data.clean import ExactDuplicates, NearDuplicates, NearDuplicateTexts, Outliers
from dlopt.data.kinds import InputKind, kinds
from dlopt.data.kinds.number import QUARTILES
from dlopt.data.prepared import as_table, write_part
from dlopt.data.stats import moments, summary
from dlopt.data.stats.moments import Moments
from dlopt.data.stats.quantiles import Quantiles
from dlopt.data.stats.repeats import Repeats, repeats
from dlopt.data.stats.summary import Summary
from dlopt.data.table.plan import KEEP, Plan, Selected, lost_rows
from dlopt.data.table.ranges import ORIGIN
from dlopt.data.table.spill import HIGH, LOW, REASON, SIDE, TARGET, TIE, free_name, identity_column, open_rows, order_column, write_rows
from dlopt.data.table.split import NAMES, Hashed
from dlopt.data.types.exact import raw_values, values_of, widened
from dlopt.data.types.tensors import array_of
from dlopt.part import Feature, Signature

BINS = 2**16
"""Into how many bins positions in [0, 1) are counted at first, to find where a class is to be cut."""


SAMPLE_ROWS, FEWEST = 4096, 64
"""Rows that tell how far from 0 a column lies, and how many different ones there must be among them."""


@dataclass(frozen=True)
class Observed:
    """What the rows of one range, or of several together, say."""

    counts: dict[str, int]
    """Rows of each split."""
    labels: dict[str, Counter[int]]
    """split to label's index to rows."""
    dropped: Counter[int]
    """Rows that each part of `clean` has dropped here, by its place."""
    across: Counter[str]
    """Rows of validation and test that equal one of train, and those of train that equal another one."""
    repeats: Repeats | None
    """How often rows repeat, from ranges where some are in two splits."""
    inputs: tuple[Any, ...] | None
    """What the training rows say of each input; None without training rows."""
    target: Moments | None
    """And of a target of numbers."""
    profile: dict[str, Summary]
    """What each split that has rows looks like, for the profile and the warnings; nothing where the job asks for none."""

    def by_chance(self, given: Collection[str]) -> dict[str, float]:
        """How many rows of validation and test may equal one of train though nobody copied them. given: splits that come from a source
        of their own, whose rows should be in train as seldom as those of train are twice."""
        if self.repeats is None:
            return {}
        train = self.counts["train"]
        found = {name: self.repeats.expected(self.counts[name], train) for name in NAMES[1:]}
        again = self.across["train"] / max(train, 1)
        return {name: min(rows, again * self.counts[name]) if name in given else rows for name, rows in found.items()}

    def merge(self, other: Observed) -> Observed:
        """Both together; in a fixed order, so that sums are the same to the last bit."""
        pairs = zip(self.inputs, other.inputs, strict=True) if self.inputs and other.inputs else ()
        return Observed(
            {name: self.counts[name] + other.counts[name] for name in NAMES},
            {name: self.labels[name] + other.labels[name] for name in NAMES},
            self.dropped + other.dropped,
            self.across + other.across,
            self.repeats.merge(other.repeats) if self.repeats and other.repeats else self.repeats or other.repeats,
            tuple(mine.merge(yours) for mine, yours in pairs) or self.inputs or other.inputs,
            self.target.merge(other.target) if self.target and other.target else self.target or other.target,
            {
                name: self.profile[name].merge(other.profile[name])
                if name in self.profile and name in other.profile
                else self.profile.get(name) or other.profile[name]
                for name in NAMES
                if name in self.profile or name in other.profile
            },
        )


def observe(plan: Plan, number: int) -> Observed:
    """Look at a range: count, and sum up what the training rows say of every column."""
    found = plan.select(number, [*_columns(plan), TARGET])
    splits = {name: rows for index, name in enumerate(NAMES) if len(rows := found.of(index))}
    inputs = target = None
    if (train := splits.get("train")) is not None:
        caps = plan.caps
        inputs = tuple(part.observe(train, feature, caps) for part, feature in zip(plan.parts, plan.features, strict=True))
        target = plan.section.target.observe(train[TARGET], plan.target)
    sizes = np.bincount(found.split[found.split >= 0], minlength=len(NAMES)).tolist()
    across, kept = found.across, np.flatnonzero(found.split >= 0)
    leaks = any(across.get(name) for name in NAMES[1:])
    return Observed(
        dict(zip(NAMES, sizes, strict=True)),
        {name: _label_counts(plan, found.table[TARGET].combine_chunks(), found.split == index) for index, name in enumerate(NAMES)},
        Counter(found.dropped[found.dropped != KEEP].tolist()),
        Counter(across),
        repeats(found.table, plan.features, kept, found.keys[kept]) if leaks else None,
        inputs,
        target,
        {name: _summary(plan, rows, name == "train") for name, rows in splits.items()} if plan.section.profile else {},
    )


def _summary(plan: Plan, rows: pa.Table, is_train: bool) -> Summary:
    """What some rows of a split look like; those of training are also asked what each column says of the target."""
    columns, kinds, targets = summary.prepared_columns(plan.features, plan.target, rows, rows[TARGET])
    return summary.summarise(columns, kinds, targets if is_train else ())


def columns_of_outliers(plan: Plan) -> list[str]:
    """The columns that outliers are looked for in, each once."""
    parts = [part for part in plan.section.clean if isinstance(part, Outliers)]
    return list(dict.fromkeys(column for part in parts for column in part.columns if column not in plan.left_out))


@dataclass(frozen=True)
class Spread:
    """Moments and quantiles of some columns."""

    moments: Moments
    quantiles: Quantiles

    def merge(self, other: Spread) -> Spread:
        return Spread(self.moments.merge(other.moments), self.quantiles.merge(other.quantiles))


@dataclass(frozen=True)
class Absent:
    """How many training rows there are, and in how many of them each column is missing."""

    rows: int
    missing: Counter[str]

    def merge(self, other: Absent) -> Absent:
        return Absent(self.rows + other.rows, self.missing + other.missing)

    def share(self, column: str) -> float:
        return self.missing[column] / max(self.rows, 1)


def absent(plan: Plan, number: int) -> Absent:
    """Count the missing values among a range's training rows, in each column that can be left out."""
    train = plan.select(number, _columns(plan)).of(0)
    missing: Counter[str] = Counter()
    for part, feature in zip(plan.parts, plan.features, strict=True):
        missing.update(part.absent(feature, train))
    return Absent(len(train), missing)


def learn(plan: Plan, part: InputKind, feature: Feature, numbers: range) -> Feature:
    """An input with what all training rows teach, which pass by range after range."""
    return part.learn((plan.select(number, part.pieces(feature)).of(0) for number in numbers), feature)


def least_keys(plan: Plan, columns: Mapping[str, int], rows: int) -> pa.Table | None:
    """Some columns of numbers, so many each, of the rows of data.source with the least keys, about SAMPLE_ROWS of so many rows: the same
    ones however they came, and as good as drawn by lot. All of the rows where there are few different ones; None where ranges hold
    float32 alone."""
    ranges = [open_rows(path) for path in plan.ranges] if columns else []
    if all(table.schema.field(name).type.byte_width == 4 * width for table in ranges for name, width in columns.items()):
        return None
    for share in (SAMPLE_ROWS / max(rows, 1), 1.0):
        last, found = np.uint64(min(int(share * 2**64), 2**64 - 1)), []
        for table in ranges:
            end = int(np.searchsorted(table[HIGH].to_numpy(), last, side="right"))
            found.append(table.slice(0, end).select([*columns, HIGH]).filter(pc.equal(table[ORIGIN].slice(0, end), 0)))
            if end < len(table):
                break
        together = pa.concat_tables(widened(found)).combine_chunks()
        if share >= 1 or pc.count_distinct(together[HIGH]).as_py() >= FEWEST:
            break
    return together


def spread(plan: Plan, number: int) -> Spread | None:
    """Moments and quantiles, over a range's training rows, of the columns that outliers are looked for in."""
    columns = columns_of_outliers(plan)
    matrices = [feature for part, feature in zip(plan.parts, plan.features, strict=True) if set(columns) & set(part.bounded)]
    train = plan.select(number, [feature.name for feature in matrices]).of(0)
    found: dict[str, np.ndarray] = {}
    for feature in matrices:
        values = values_of(train[feature.name], feature)
        found |= {column: values[:, index] for index, column in enumerate(feature.columns)}
    matrix = np.stack([found[column] for column in columns], axis=1)
    wanted = {p for part in plan.section.clean if isinstance(part, Outliers) for p in (*QUARTILES, part.low, part.high)}
    return Spread(moments.of_values(matrix), Quantiles.of(matrix, sorted(wanted))) if len(matrix) else None


def positions(plan: Plan, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a range's rows that stay and whose split is open: class index and position in [0, 1), both (rows,)."""
    found = plan.select(number, [TARGET])
    rows = np.flatnonzero((found.dropped == KEEP) & _open(plan, found))
    codes = pc.index_in(found.table[TARGET].combine_chunks(), pa.array(plan.target.labels, found.table[TARGET].type))
    split = plan.section.split
    assert isinstance(split, Hashed)
    copies = None if found.copies is None else found.copies[rows]
    return codes.to_numpy(zero_copy_only=False)[rows], split.position(found.keys[rows, 0], copies)


def binned(plan: Plan, number: int, bins: int) -> np.ndarray:
    """How many of those rows each class has in each of so many bins of positions, int64 (classes, bins)."""
    codes, position = positions(plan, number)
    place = codes * bins + np.minimum((position * bins).astype(np.int64), bins - 1)
    return np.bincount(place, minlength=plan.target.size * bins).reshape(plan.target.size, bins)


def within_bins(plan: Plan, number: int, bins: int, wanted: Sequence[tuple[int, int]]) -> dict[tuple[int, int], np.ndarray]:
    """The positions that lie in some bins of some classes: (class, bin) to positions, of those that have any."""
    codes, position = positions(plan, number)
    place = codes * bins + np.minimum((position * bins).astype(np.int64), bins - 1)
    rows = np.flatnonzero(np.isin(place, [code * bins + one for code, one in wanted]))
    rows = rows[np.argsort(place[rows], kind="stable")]
    cells, starts = np.unique(place[rows], return_index=True)
    return {divmod(cell, bins): part for cell, part in zip(cells.tolist(), np.split(position[rows], starts)[1:], strict=True)}


def times(plan: Plan, number: int) -> Quantiles:
    """Of the sides of a range's rows that stay and whose split is open."""
    found = plan.select(number, [SIDE])
    rows = (found.dropped == KEEP) & _open(plan, found)
    return Quantiles.of(found.table[SIDE].to_numpy()[rows].reshape(-1, 1), [])


def write(plan: Plan, number: int, *, signature: Signature, out: Path) -> tuple[int, list[Path]]:
    """Write a range's rows into their splits, and those that were dropped into quarantine; how many were written, and all files."""
    found, files = plan.select(number, [*_columns(plan), TARGET]), list[Path]()
    for index, name in enumerate(NAMES):
        rows = found.of(index)
        if len(rows):
            arrays = {feature.name: part.finish(rows, feature) for part, feature in zip(plan.parts, signature.inputs, strict=True)}
            arrays[signature.target.name] = plan.section.target.finish(rows[TARGET].combine_chunks(), signature.target)
            files.append(out / name / f"part-{number:05d}.parquet")
            write_part(as_table(signature, arrays), signature, files[-1])
    if (found.dropped != KEEP).any():
        files.append(out / "quarantine" / f"cleaned-{number:05d}.parquet")
        _write_dropped(plan, found, files[-1])
    for file in files:
        remote.give_spread(file)
    return int((found.split >= 0).sum()), files


def compared(plan: Plan, number: int, *, place: int, buckets: int, folder: Path) -> str:
    """Write what a part of `clean` compares of a range's rows that are left, sorted by the bucket that they fall into."""
    clean = plan.section.clean[place]
    names = [] if isinstance(clean, ExactDuplicates) and not clean.columns else [identity_column(place)]
    names += [order_column(place)] if isinstance(clean, ExactDuplicates) and clean.order_by else []
    table = open_rows(plan.ranges[number]).select([HIGH, LOW, TIE, ORIGIN, *names])
    rows = np.flatnonzero(lost_rows(plan.losers, number, len(table)) == KEEP)
    bucket = _identity(table, place, clean)[rows, 0] % np.uint64(buckets) if buckets > 1 else np.zeros(len(rows), np.uint64)
    order = np.argsort(bucket, kind="stable")
    chosen = table.take(pa.array(rows[order]))
    more = {"bucket": bucket[order], "range": np.full(len(rows), number), "row": rows[order]}
    return write_rows(pa.table({**dict(zip(chosen.column_names, chosen.columns, strict=True)), **more}), folder)


def duplicates(plan: Plan, place: int, files: Sequence[str], bucket: int, *, folder: Path) -> tuple[int, str]:
    """Find the rows that a part of `clean` drops among those of a bucket; its place, and the file that names them. files: what `compared`
    has written, range after range."""
    parts = []
    for file in files:
        rows = open_rows(file)
        start, stop = np.searchsorted(rows["bucket"].to_numpy(), [bucket, bucket + 1])
        parts.append(rows.slice(start, stop - start))
    table = pa.concat_tables(parts).combine_chunks()
    order = np.argsort(table[TIE].to_numpy(), kind="stable")  # of rows of one key the same one stays whatever the order of blocks
    keys, origin = np.stack([table[HIGH].to_numpy(), table[LOW].to_numpy()], axis=1), table[ORIGIN].to_numpy()
    losers = np.zeros(len(table), dtype=bool)
    for one in np.unique(origin):  # rows of different sources are not duplicates of each other
        mine = order[origin[order] == one]
        losers[mine] = _losers(plan.section.clean[place], place, table.take(pa.array(mine)), keys[mine])
    return place, write_rows(table.select(["range", "row"]).filter(pa.array(losers)), folder)


def _losers(clean: Any, place: int, table: pa.Table, keys: np.ndarray) -> np.ndarray:
    if isinstance(clean, NearDuplicates):
        dtype = "uint32" if isinstance(clean, NearDuplicateTexts) else "uint64"
        width = table.schema.field(identity_column(place)).type.byte_width // np.dtype(dtype).itemsize
        return clean.losers(array_of(table[identity_column(place)], dtype, (width,)), keys)
    order = table[order_column(place)].to_numpy() if order_column(place) in table.column_names else None
    return clean.losers(_identity(table, place, clean), order, keys)


def _identity(table: pa.Table, place: int, clean: Any) -> np.ndarray:
    if identity_column(place) not in table.column_names:
        return np.stack([table[HIGH].to_numpy(), table[LOW].to_numpy()], axis=1)
    return array_of(table[identity_column(place)], "uint64", (2,))


def _columns(plan: Plan) -> list[str]:
    """The columns of a piece that hold the inputs."""
    return [name for feature in plan.features for name in kinds[feature.kind].pieces(feature)]


def _open(plan: Plan, found: Selected) -> np.ndarray:
    """Rows whose split is for `data.split` to decide, not settled by their source."""
    settled = [index for index, origin in enumerate(plan.origins) if origin.split]
    return ~np.isin(found.origin, settled)


def _label_counts(plan: Plan, values: pa.Array, chosen: np.ndarray) -> Counter[int]:
    if not plan.target.labels:
        return Counter()
    values = values.filter(pa.array(chosen))
    values = values.flatten() if pa.types.is_list(values.type) else values
    codes = pc.index_in(values, pa.array(plan.target.labels, values.type)).to_numpy(zero_copy_only=False)
    return Counter(dict(enumerate(np.bincount(codes, minlength=plan.target.size).tolist())))


def _write_dropped(plan: Plan, found: Selected, path: Path) -> None:
    """Rows that cleaning dropped, as columns that people can read, with the reason."""
    rows = np.flatnonzero(found.dropped != KEEP)
    table = found.table.take(pa.array(rows))
    columns: dict[str, Any] = {}
    for feature in plan.features:
        columns |= kinds[feature.kind].readable(feature, table)
    target = table[TARGET].combine_chunks()
    if pa.types.is_fixed_size_binary(target.type):
        matrix = raw_values(target, plan.target.size)
        columns |= {name: matrix[:, index] for index, name in enumerate(plan.target.columns)}
    else:
        columns[plan.target.name] = target
    titles = [clean.title for clean in plan.section.clean]
    path.parent.mkdir(parents=True, exist_ok=True)
    columns[free_name(REASON, columns)] = pa.array([titles[place] for place in found.dropped[rows].tolist()])
    pq.write_table(pa.table(columns), path)
