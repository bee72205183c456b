"""What columns look like: summaries of pieces of a table that are bounded in size, travel as JSON and merge to that of the whole.

Rows, missing values, extremes, mean and spread are exact. The rest comes from three sketches, each exact while a column has few
different values: sorted points with weights for quantiles and histograms, counts of the most frequent values, and HyperLogLog for how
many there are. Of at most SAMPLE_ROWS random rows the values themselves are kept, so that columns can be compared with the target.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dlopt.data.counter import bits, mix, string_words
from dlopt.data.encode import decode_image
from dlopt.data.prepared import array_of, piece_column
from dlopt.data.stats.repeats import names_of
from dlopt.data.types.exact import merged, raw_values
from dlopt.data.types.values import DIGITS, TOO_LARGE, dates, doubles, lost_in_double, plain, texts
from dlopt.part import DloptError, Feature, Target

LOOK_CELLS = 2**20
"""A piece of more rows times columns is looked at in every n-th row only; what is exact is still of all rows."""
LOOK_IMAGES, LOOK_BYTES = 64, 2**25
"""Encoded images that are decoded of a piece, and bytes of texts or decoded images that are looked at."""
HASHED, HASHED_BYTES = 2**13, 2**20
"""Strings that are hashed at a time, and about how many bytes of them: what lies in between is 34 times as large."""
POINTS, MOST_POINTS = 2048, 2**17
"""Points that are kept of a column that has more different numbers, fewer for many columns; each thinning moves a rank by at most
half a point's share, and pieces merged pairwise are thinned log2(pieces) times: 1 % at 10^6 pieces."""
MOST_VALUES, KEPT_VALUES = 1000, {"category": 1000, "multi_label": 1000, "text": 100, "image": 100}
"""Values that are counted exactly, and how many of the most frequent ones are left when there are more."""
SHOWN = 60
"""Characters of a value that are kept."""
SAMPLE_ROWS, SAMPLE_CELLS = 4096, 2**20
"""Rows of the sample, fewer for many columns."""
PRECISION = 12
"""HyperLogLog has 2^12 registers: a standard error of 1.04 / 2^6 = 1.6 %."""
MEASURED = {"number": "value", "date": "seconds since 1970", "text": "characters", "image": "brightness, 0 to 255"}
"""Kinds of columns that have a number to each value, and what it is."""

Columns = Mapping[str, Any]
"""Columns by name: Arrow arrays (of a pa.Table), or numpy arrays of numbers (rows,) and of images (rows, height, width, channels)."""


@dataclass(frozen=True)
class Column:
    """What is known of a column. Its numbers are the values of a number, seconds since 1970 of a date, the characters of a text,
    the mean brightness of an image; of categories there are none."""

    kind: str
    """number, date, category, text, image or, of a target, multi_label."""
    rows: int = 0
    """All rows."""
    missing: int = 0
    """Rows without a value; among those that are counted as missing are the unreadable ones."""
    unreadable: int = 0
    """Rows that have a value which is not of this kind."""
    seen: int = 0
    """Values that were looked at closely (see LOOK_CELLS): what follows from `points`, `counts` and `sketch` is of these."""
    count: int = 0
    """Numbers that `low` to `squares` are of: all of a number or date; of texts and images, those looked at."""
    low: float | None = None
    high: float | None = None
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared deviations from the mean."""
    whole: bool = True
    """Whether all numbers are whole."""
    told: int = 0
    """Of numbers: how many different ones there are, summed over pieces."""
    merged: int = 0
    """How many of these are the same as another one of their piece in float32, be it less an offset, which is all that a model sees."""
    points: str = ""
    """Packed float64 (2, points): sorted numbers and how many values each stands for."""
    thinned: bool = False
    """Whether points were thinned out: else they are all the values there are."""
    counts: dict[str, int] = field(default_factory=dict)
    """How often each category, text, label or shape of an image occurs; long ones are cut, with a hash to tell them apart."""
    missed: int = 0
    """A value that is not in `counts`, or not as often, occurs at most so many times more."""
    sketch: str = ""
    """Packed registers of HyperLogLog, over the values."""
    spaceless: int = 0
    """Of texts and categories: values that have no white space."""

    @property
    def std(self) -> float:
        """Population standard deviation of the numbers."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    @property
    def exact(self) -> bool:
        """Whether `distinct` is exact rather than an estimate with a standard error of 1.6 %."""
        return not self.thinned if self.kind in ("number", "date") else self.missed == 0

    @property
    def distinct(self) -> int:
        """How many different values there are among those looked at; of images, how many shapes."""
        if self.exact or not self.sketch:
            return self.weighted()[0].size if self.kind in ("number", "date") else len(self.counts)
        return min(round(cardinality(_unpack(self.sketch, np.uint8))), self.seen)

    def weighted(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted different numbers, and how many values each stands for."""
        return self._weighted

    @cached_property
    def _weighted(self) -> tuple[np.ndarray, np.ndarray]:
        values, weights = _unpack(self.points, np.float64).reshape(2, -1) if self.points else np.zeros((2, 0))
        return values, weights

    def quantile(self, p: float) -> float | None:
        """The least number that at least a share p of the numbers does not exceed; None where there is none."""
        values, weights = self.weighted()
        if not len(values):
            return None
        reached = np.searchsorted(np.cumsum(weights), p * weights.sum() * (1 - 1e-12))
        return float(values[min(int(reached), len(values) - 1)])

    def frequent(self, most: int) -> list[tuple[Any, int]]:
        """The most frequent values with their counts, most frequent first; of numbers too many to count, those that stand out."""
        if self.kind not in ("number", "date"):
            return sorted(self.counts.items(), key=lambda pair: (-pair[1], pair[0]))[:most]
        values, weights = self.weighted()
        order = np.lexsort((values, -weights))[:most]
        found = [(float(values[index]), round(weights[index])) for index in order]
        least = 2 * weights.sum() / max(len(weights), 1) if self.thinned else 0
        return [pair for pair in found if pair[1] > least]


@dataclass(frozen=True)
class RowSample:
    """Random rows, those with the smallest random keys, so that samples of pieces merge to one of the whole."""

    names: list[str]
    keys: str
    """Packed uint64 (rows,), sorted."""
    values: str
    """Packed uint32 (columns, rows): numbers as float32, NaN where missing; hashes of categories and texts, 0 where missing."""

    def __len__(self) -> int:
        return len(_unpack(self.keys, np.uint64))

    def column(self, name: str, kind: str) -> np.ndarray:
        """Values of the rows, in the order of their keys: float64 with NaN, or uint32 of categories and texts."""
        values = self._matrix[self.names.index(name)]
        return values.view(np.float32).astype(np.float64) if _is_number(kind) else values

    def merge(self, other: RowSample) -> RowSample:
        keys = np.concatenate([_unpack(self.keys, np.uint64), _unpack(other.keys, np.uint64)])
        kept = np.argsort(keys, kind="stable")[: _sample_rows(len(self.names))]
        return RowSample(self.names, _pack(keys[kept]), _pack(np.concatenate([self._matrix, other._matrix], axis=1)[:, kept]))

    @cached_property
    def _matrix(self) -> np.ndarray:
        return _unpack(self.values, np.uint32).reshape(len(self.names), -1)


@dataclass(frozen=True)
class Summary:
    """What is known of a piece of a table, or of all of it."""

    rows: int
    columns: dict[str, Column]
    sample: RowSample | None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Summary:
        found = json.loads(text)
        sample = RowSample(**found["sample"]) if found["sample"] else None
        return cls(found["rows"], {name: Column(**column) for name, column in found["columns"].items()}, sample)

    def merge(self, other: Summary) -> Summary:
        points = _points(len(self.columns))
        columns = {name: _merge(column, other.columns[name], points) for name, column in self.columns.items()}
        sample = self.sample.merge(other.sample) if self.sample and other.sample else self.sample or other.sample
        return Summary(self.rows + other.rows, columns, sample)


def summarise(columns: Columns, kinds: Mapping[str, str], targets: Sequence[str] = ()) -> Summary:
    """Summary of a piece of a table.

    kinds: the columns to look at (the target's among them), each number, date, category, text, image or multi_label.
    targets: columns to compare the others with; without any, no rows are kept. The piece's rows may come in any order.
    """
    rows = len(columns[next(iter(kinds))])
    step = max(1, math.ceil(rows * len(kinds) / LOOK_CELLS))
    points = _points(len(kinds))
    found = {name: SUMMARISE[kind](columns[name], step, points) for name, kind in kinds.items()}
    return Summary(rows, found, _sampled(columns, kinds, found, rows) if targets and rows else None)


def prepared_columns(
    features: Sequence[Feature], target: Target, table: pa.Table, goal: pa.ChunkedArray
) -> tuple[dict[str, Any], dict[str, str], tuple[str, ...]]:
    """Columns, kinds and targets for `summarise`, from rows on their way through prepare (see dlopt.data.kinds).

    Numbers and categories are columns of their own again; of dates there are the parts, as numbers; goal: the targets, as they are read.
    """
    columns, kinds = dict[str, Any](), dict[str, str]()
    for feature in features:
        if feature.kind in ("number", "date"):
            names = names_of(feature)
            matrix = raw_values(table[feature.name], feature.size)
            columns |= {name: matrix[:, index] for index, name in enumerate(names)}
            kinds |= dict.fromkeys(names, "number")
        elif feature.kind == "category":
            columns |= {column: table[piece_column(feature.name, column)] for column in feature.columns}
            kinds |= dict.fromkeys(feature.columns, "category")
        else:
            image = feature.kind == "image"
            columns[feature.name] = array_of(table[feature.name], "uint8", feature.shape) if image else table[feature.name]
            kinds[feature.name] = feature.kind
    if target.kind != "number":
        return columns | {target.name: goal}, kinds | {target.name: target.kind}, (target.name,)
    matrix = raw_values(goal, target.size)
    columns |= {name: matrix[:, index] for index, name in enumerate(target.columns)}
    return columns, kinds | dict.fromkeys(target.columns, "number"), target.columns


def merge(*parts: Summary) -> Summary:
    """Summary of all parts together. They are merged in pairs, in their order, so that errors grow with log2(parts) only."""
    while len(parts) > 1:
        parts = tuple(parts[i].merge(parts[i + 1]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2))
    return parts[0]


def cardinality(registers: np.ndarray) -> float:
    """Estimate of how many different values were hashed into the registers of a HyperLogLog.

    The unbiased estimator of O. Ertl 2017, "New cardinality estimation algorithms for HyperLogLog sketches", algorithm 6.
    """
    m, q = len(registers), 64 - PRECISION
    counts = np.bincount(registers, minlength=q + 2)
    z = m * _tau(1 - counts[q + 1] / m)
    for k in range(q, 0, -1):
        z = 0.5 * (z + counts[k])
    z += m * _sigma(counts[0] / m)
    return m / (2 * math.log(2)) * m / z


def _numbers(column: Any, step: int, points: int) -> Column:
    values, unreadable = _as_numbers(column)
    there = values[~np.isnan(values)]
    looked = there if step == 1 else values[::step][~np.isnan(values[::step])]
    different, counts = _counted(looked)
    found = Column("number", rows=len(values), missing=len(values) - len(there), unreadable=unreadable, seen=len(looked))
    kept, weights = _thinned(different, counts.astype(np.float64), points)
    told = _told(column, step, different)
    return replace(
        found,
        **_moments(there),
        told=told,
        merged=told - len(different) + merged(different),
        whole=bool((different == np.rint(different)).all()),
        points=_pack(np.stack([kept, weights])),
        thinned=len(kept) < len(different),
        sketch=_pack(_registers(_number_hashes(different))),
    )


def _told(column: Any, step: int, different: np.ndarray) -> int:
    """How many different numbers a column says: more than as float64 where whole ones have more than 53 bits."""
    if isinstance(column, np.ndarray) or not len(different) or np.abs(different[[0, -1]]).max() < DIGITS:
        return len(different)
    array = plain(column)[::step]
    values, _ = doubles(array)
    rest = lost_in_double(array, values)
    there = np.abs(values) < TOO_LARGE
    return len(different) if rest is None else len(np.unique(np.stack([values[there], rest[there]]), axis=1).T)


def _dates(column: Any, step: int, points: int) -> Column:
    seconds, unreadable = _as_seconds(column)
    return replace(_numbers(seconds, step, points), kind="date", unreadable=unreadable)


def _categories(column: Any, step: int, points: int) -> Column:
    return _strings("category", column, step)[0]


def _texts(column: Any, step: int, points: int) -> Column:
    found, different, counts = _strings("text", column, step)
    lengths = pc.utf8_length(different).to_numpy(zero_copy_only=False).astype(np.float64)
    together = np.repeat(lengths, counts)
    sizes, occur = _counted(together)
    kept, weights = _thinned(sizes, occur.astype(np.float64), points)
    return replace(found, **_moments(together), points=_pack(np.stack([kept, weights])))


def _images(column: Any, step: int, points: int) -> Column:
    bright, shapes, missing, unreadable = _looked_at(column)
    values, counts = _counted(bright)
    kept, weights = _thinned(values, counts.astype(np.float64), points)
    found = Column("image", rows=len(column), missing=missing + unreadable, unreadable=unreadable, seen=len(bright), counts=shapes)
    return replace(found, **_moments(bright), whole=False, points=_pack(np.stack([kept, weights])))


def _labels(column: Any, step: int, points: int) -> Column:
    """Of a target of several labels, a column of lists; a row without any is not missing."""
    array = plain(column)[::step]
    found = _strings("multi_label", array.flatten(), 1)[0]
    return replace(found, rows=len(column), missing=array.null_count, seen=len(array) - array.null_count)


SUMMARISE: dict[str, Callable[[Any, int, int], Column]] = {
    "number": _numbers,
    "date": _dates,
    "category": _categories,
    "text": _texts,
    "image": _images,
    "multi_label": _labels,
}


def _strings(kind: str, column: Any, step: int) -> tuple[Column, pa.Array, np.ndarray]:
    """What all kinds of texts have in common; and the different values looked at, with their counts."""
    array = plain(column if isinstance(column, (pa.Array, pa.ChunkedArray)) else pa.array(column))
    values = texts(array)
    missing = pc.sum(pc.equal(values, "")).as_py() or 0
    step = max(step, math.ceil(values.nbytes / LOOK_BYTES))
    coded = (values if step == 1 else values[::step]).dictionary_encode()
    counts = np.bincount(coded.indices.to_numpy(), minlength=len(coded.dictionary))
    there = np.flatnonzero(pc.not_equal(coded.dictionary, "").to_numpy(zero_copy_only=False))
    different, counts = coded.dictionary.take(pa.array(there)), counts[there]
    hashes = string_hashes(different)
    kept, missed = _most_frequent(different, counts, hashes, KEPT_VALUES[kind])
    spaced = pc.match_substring_regex(different, r"\s").to_numpy(zero_copy_only=False).astype(bool)
    found = Column(
        kind,
        rows=len(values),
        missing=missing,
        seen=int(counts.sum()),
        counts=kept,
        missed=missed,
        sketch=_pack(_registers(hashes)),
        spaceless=int(counts[~spaced].sum()),
    )
    return found, different, counts


def _most_frequent(values: pa.Array, counts: np.ndarray, hashes: np.ndarray, kept: int) -> tuple[dict[str, int], int]:
    """All counts, or those of the `kept` most frequent values and the largest of the others."""
    order = np.lexsort((hashes, -counts))
    chosen = order if len(order) <= MOST_VALUES else order[:kept]
    named = zip(values.take(pa.array(chosen)).to_pylist(), hashes[chosen].tolist(), counts[chosen].tolist(), strict=True)
    return {_named(value, word): count for value, word, count in named}, int(counts[order[len(chosen)]]) if len(chosen) < len(order) else 0


def _named(value: str, word: int) -> str:
    return value if len(value) <= SHOWN else f"{value[:SHOWN]}… #{word:016x}"


def _looked_at(column: Any) -> tuple[np.ndarray, dict[str, int], int, int]:
    """Brightness of some images, how many have which shape (height, width, channels), and how many are missing or unreadable."""
    pixels = _as_pixels(column)
    if pixels is not None:
        some = pixels[:: max(1, math.ceil(pixels.nbytes / LOOK_BYTES))]
        return _brightness(some), {_shape(pixels.shape[1:]): len(some)} if len(some) else {}, 0, 0
    found, shapes, unreadable = [], dict[str, int](), 0
    array = plain(column)
    for value in array[:: max(1, math.ceil(len(array) / LOOK_IMAGES))].to_pylist():
        if value is None:
            continue
        try:
            image = _decoded(value)
        except DloptError:
            unreadable += 1
            continue
        found.append(image.mean())
        shapes[_shape(image.shape)] = shapes.get(_shape(image.shape), 0) + 1
    return np.array(found, dtype=np.float64), shapes, array.null_count, unreadable


def _decoded(value: Any) -> np.ndarray:
    """An image as Hugging Face data sets keep it, encoded, or as nested numbers. Raises DloptError when it is none."""
    value = value["bytes"] if isinstance(value, dict) and "bytes" in value else value
    if isinstance(value, bytes):
        return decode_image(value)
    try:
        pixels = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise DloptError("no image") from None
    if pixels.ndim not in (2, 3):
        raise DloptError("no image")
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _as_pixels(column: Any) -> np.ndarray | None:
    """(rows, height, width, channels) of numpy arrays and of nested lists of one size; else None."""
    if isinstance(column, np.ndarray):
        return column
    array, shape, rows = plain(column), list[int](), len(column)
    while pa.types.is_fixed_size_list(array.type) and array.null_count == 0:
        shape.append(array.type.list_size)
        array = array.flatten()
    if len(shape) not in (2, 3) or array.null_count or not pa.types.is_integer(array.type):
        return None
    pixels = array.to_numpy().reshape(rows, *shape)
    return pixels if len(shape) == 3 else pixels[..., None]


def _brightness(pixels: np.ndarray) -> np.ndarray:
    return pixels.reshape(len(pixels), -1).mean(axis=1, dtype=np.float64) if len(pixels) else np.zeros(0)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _as_numbers(column: Any) -> tuple[np.ndarray, int]:
    """float64 with NaN for what is missing, no number or beyond what float32 holds; and how many values are of the last two."""
    if isinstance(column, np.ndarray):
        values, wrong = column.astype(np.float64), 0
    else:
        values, reasons = doubles(column)
        wrong = len(reasons)
    infinite = np.abs(values) >= TOO_LARGE
    if infinite.any():
        values, wrong = np.where(infinite, np.nan, values), wrong + int(infinite.sum())
    return values + 0.0, wrong  # no negative zero


def _as_seconds(column: Any) -> tuple[np.ndarray, int]:
    """Seconds since 1970 with NaN, and how many values are no date."""
    if isinstance(column, np.ndarray) and column.dtype.kind == "f":
        return column, 0
    array = plain(column if isinstance(column, (pa.Array, pa.ChunkedArray)) else pa.array(column))
    if pa.types.is_floating(array.type):
        return array.to_numpy(zero_copy_only=False).astype(np.float64), 0
    found, reasons = dates(array, "")
    micros = found.cast(pa.int64())
    seconds = micros.fill_null(0).to_numpy() / 1e6
    return np.where(micros.is_null().to_numpy(zero_copy_only=False), np.nan, seconds), len(reasons)


def _is_number(kind: str) -> bool:
    return kind in ("number", "date", "image")


def _moments(values: np.ndarray) -> dict[str, Any]:
    if not len(values):
        return {}
    mean = float(values.mean())
    return {
        "count": len(values),
        "low": float(values.min()),
        "high": float(values.max()),
        "mean": mean,
        "squares": float(np.square(values - mean).sum()),
    }


def _counted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different numbers, sorted, and how often each occurs; hashing is faster than sorting where many are equal."""
    found = pc.value_counts(pa.array(values, pa.float64()))
    different, counts = found.field(0).to_numpy(zero_copy_only=False), found.field(1).to_numpy()
    order = np.argsort(different)
    return different[order], counts[order]


def _thinned(values: np.ndarray, weights: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` of the sorted values: those in the middle of so many shares of equal weight, put together where they are equal."""
    if len(values) <= points:
        return values, weights
    share = weights.sum() / points
    picked = np.searchsorted(np.cumsum(weights), (np.arange(points) + 0.5) * share).clip(0, len(values) - 1)
    kept, times = np.unique(picked, return_counts=True)
    return values[kept], times * share


def _points(columns: int) -> int:
    return max(128, min(POINTS, MOST_POINTS // columns))


def _merge(a: Column, b: Column, points: int) -> Column:
    """Two pieces of a column; means and squares by Chan, Golub, LeVeque 1983, eq. 2.1."""
    count, difference = a.count + b.count, b.mean - a.mean
    counts, missed = _merge_counts(a, b)
    (values, weights), thinned = _merge_points(a, b, points)
    return Column(
        a.kind,
        rows=a.rows + b.rows,
        missing=a.missing + b.missing,
        unreadable=a.unreadable + b.unreadable,
        seen=a.seen + b.seen,
        count=count,
        low=min((end for end in (a.low, b.low) if end is not None), default=None),
        high=max((end for end in (a.high, b.high) if end is not None), default=None),
        mean=a.mean + difference * b.count / max(count, 1) if a.count else b.mean,
        squares=a.squares + b.squares + difference**2 * a.count * b.count / max(count, 1),
        whole=a.whole and b.whole,
        told=a.told + b.told,
        merged=a.merged + b.merged,
        points=_pack(np.stack([values, weights])) if len(values) else "",
        thinned=thinned,
        counts=counts,
        missed=missed,
        sketch=_pack(np.maximum(_unpack(a.sketch, np.uint8), _unpack(b.sketch, np.uint8))) if a.sketch and b.sketch else "",
        spaceless=a.spaceless + b.spaceless,
    )


def _merge_counts(a: Column, b: Column) -> tuple[dict[str, int], int]:
    total = dict(a.counts)
    for value, count in b.counts.items():
        total[value] = total.get(value, 0) + count
    missed = a.missed + b.missed
    if len(total) <= MOST_VALUES:
        return total, missed
    ordered = sorted(total.items(), key=lambda pair: (-pair[1], pair[0]))
    kept = KEPT_VALUES.get(a.kind, MOST_VALUES)
    return dict(ordered[:kept]), missed + ordered[kept][1]


def _merge_points(a: Column, b: Column, points: int) -> tuple[tuple[np.ndarray, np.ndarray], bool]:
    values, weights = (np.concatenate(pair) for pair in zip(a.weighted(), b.weighted(), strict=True))
    different, place = np.unique(values, return_inverse=True)
    kept = _thinned(different, np.bincount(place, weights=weights, minlength=len(different)), points)
    return kept, a.thinned or b.thinned or len(kept[0]) < len(different)


def _sampled(columns: Columns, kinds: Mapping[str, str], found: Mapping[str, Column], rows: int) -> RowSample:
    """Random rows of a piece. The randomness comes from what the piece holds, so that pieces of one table have different keys."""
    (seed,) = string_words([repr([(c.mean, c.squares, c.sketch, c.missing, c.rows) for c in found.values()])])
    keys = bits(np.arange(rows), 19, int(seed))
    size = min(rows, _sample_rows(len(kinds)))
    chosen = np.argpartition(keys, size - 1)[:size]
    chosen = chosen[np.argsort(keys[chosen])]
    values = [_codes(_take(columns[name], chosen), kind) for name, kind in kinds.items()]
    return RowSample(list(kinds), _pack(keys[chosen]), _pack(np.stack(values)))


def _sample_rows(columns: int) -> int:
    return max(256, min(SAMPLE_ROWS, SAMPLE_CELLS // columns))


def _take(column: Any, rows: np.ndarray) -> Any:
    return column[rows] if isinstance(column, np.ndarray) else plain(column.take(pa.array(rows)))


def _codes(column: Any, kind: str) -> np.ndarray:
    """uint32 (rows,): numbers as the bits of a float32, hashes of texts; encoded images are not decoded for it, they are missing."""
    if kind == "image":
        pixels = _as_pixels(column)
        found = np.full(len(column), np.nan) if pixels is None else _brightness(pixels)
    elif kind in ("number", "date"):
        found, _ = _as_numbers(column) if kind == "number" else _as_seconds(column)
    else:
        return _text_codes(column)
    with np.errstate(over="ignore"):
        return found.astype(np.float32).view(np.uint32)


def _text_codes(column: Any) -> np.ndarray:
    array = pa.array(column) if isinstance(column, np.ndarray) else column
    if pa.types.is_nested(array.type):
        return np.zeros(len(array), np.uint32)  # several labels are not compared
    coded = texts(array).dictionary_encode()
    words = (string_hashes(coded.dictionary) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    missing = pc.equal(coded.dictionary, "").to_numpy(zero_copy_only=False).astype(bool)
    return np.where(missing, np.uint32(0), words)[coded.indices.to_numpy()]


def string_hashes(values: pa.Array) -> np.ndarray:
    """A 64-bit hash of each string, uint64 (rows,): its bytes times a random number of each place, summed up and mixed.

    Multilinear hashing (Carter and Wegman 1979), some strings at a time for the sake of memory.
    """
    parts, start = [], 0
    while start < len(values):
        some = values.slice(start, HASHED)
        ends = np.cumsum(pc.binary_length(some).to_numpy(zero_copy_only=False))
        some = some.slice(0, 1 + int(np.searchsorted(ends, HASHED_BYTES)))
        parts.append(_hashes(some))
        start += len(some)
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)


def _hashes(values: pa.Array) -> np.ndarray:
    array = values.cast(pa.large_string())
    ends = np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1]
    content = np.frombuffer(array.buffers()[2] or b"", np.uint8)[ends[0] : ends[-1]]
    lengths, ends = np.diff(ends), ends - ends[0]
    place = np.arange(len(content)) - np.repeat(ends[:-1], lengths)
    with np.errstate(over="ignore"):
        terms = (content.astype(np.uint64) + np.uint64(1)) * bits(np.arange(lengths.max()), 23)[place]
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
        return mix(sums[ends[1:]] - sums[ends[:-1]] + mix(lengths.astype(np.uint64)))


def _number_hashes(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return mix(values.astype(np.float64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15))


def _registers(hashes: np.ndarray) -> np.ndarray:
    """HyperLogLog: for each value of the first bits of a hash, the most zeros that the others begin with, plus 1; uint8 (4096,)."""
    registers = np.zeros(2**PRECISION, np.uint8)
    rest = hashes & np.uint64(2 ** (64 - PRECISION) - 1)
    ranks = (64 - PRECISION + 1) - np.frexp(rest.astype(np.float64))[1]
    np.maximum.at(registers, (hashes >> np.uint64(64 - PRECISION)).astype(np.int64), ranks.astype(np.uint8))
    return registers


def _sigma(x: float) -> float:
    if x == 1:
        return math.inf
    y, z, last = 1.0, x, -1.0
    while z != last:
        x, last = x * x, z
        z, y = z + x * y, 2 * y
    return z


def _tau(x: float) -> float:
    if x in (0, 1):
        return 0.0
    y, z, last = 1.0, 1 - x, -1.0
    while z != last:
        x, last, y = math.sqrt(x), z, y / 2
        z -= (1 - x) ** 2 * y
    return z / 3


def _pack(values: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(values).tobytes(), 1)).decode()


def _unpack(text: str, kind: Any) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), kind)
