"""What one column looks like: a summary that is bounded in size, travels as JSON and merges to that of the whole column.

Rows, missing values, extremes, mean and spread are exact. The rest comes from three sketches, each exact while a column has few
different values: sorted points with weights for quantiles and histograms, counts of the most frequent values, and HyperLogLog for how
many there are. What a kind of column adds to this is in its file in `dlopt.data.kinds`.
"""

from __future__ import annotations

import base64
import math
import zlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from dlopt.data.counter import bits, mix
from dlopt.data.types.arrow import pa, pc
from dlopt.data.types.values import plain, texts

LOOK_BYTES = 2**25
"""Bytes of texts or of decoded images that are looked at of a piece."""
HASHED, HASHED_BYTES = 2**13, 2**20
"""Strings that are hashed at a time, and about how many bytes of them: what lies in between is 34 times as large."""
FEW = 2**15
"""So many numbers are sorted, more are hashed."""
MOST_VALUES = 1000
"""Different values that are counted exactly."""
SHOWN = 60
"""Characters of a value that are kept."""
PRECISION = 12
"""HyperLogLog has 2^12 registers: a standard error of 1.04 / 2^6 = 1.6 %."""


@dataclass(frozen=True)
class Column:
    """What is known of a column. Its numbers are the values of a number, seconds since 1970 of a date, the characters of a text,
    the mean brightness of an image; of categories there are none."""

    kind: str
    """That of an input or, of a target, multi_label."""
    numeric: bool = False
    """Whether its values are numbers themselves, which `points` holds, and not counted in `counts`."""
    kept: int = MOST_VALUES
    """How many of the most frequent values stay in `counts` when there are more than MOST_VALUES."""
    rows: int = 0
    """All rows."""
    missing: int = 0
    """Rows without a value; among those that are counted as missing are the unreadable ones."""
    unreadable: int = 0
    """Rows that have a value which is not of this kind."""
    seen: int = 0
    """Values that were looked at closely (see summary.LOOK_CELLS): what follows from `points`, `counts` and `sketch` is of these."""
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
    points: bytes = b""
    """float64 (2, points): sorted numbers and how many values each stands for."""
    thinned: bool = False
    """Whether points were thinned out: else they are all the values there are."""
    counts: dict[str, int] = field(default_factory=dict)
    """How often each category, text, label or shape of an image occurs; long ones are cut, with a hash to tell them apart."""
    missed: int = 0
    """A value that is not in `counts`, or not as often, occurs at most so many times more."""
    sketch: bytes = b""
    """uint8 (4096,): registers of HyperLogLog, over the values."""
    spaceless: int = 0
    """Of texts and categories: values that have no white space."""

    @property
    def std(self) -> float:
        """Population standard deviation of the numbers."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    @property
    def exact(self) -> bool:
        """Whether `distinct` is exact rather than an estimate with a standard error of 1.6 %."""
        return not self.thinned if self.numeric else self.missed == 0

    @property
    def distinct(self) -> int:
        """How many different values there are among those looked at; of images, how many shapes."""
        if self.exact or not self.sketch:
            return self.weighted()[0].size if self.numeric else len(self.counts)
        return min(round(cardinality(np.frombuffer(self.sketch, np.uint8))), self.seen)

    def weighted(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted different numbers, and how many values each stands for."""
        return self._weighted

    @cached_property
    def _weighted(self) -> tuple[np.ndarray, np.ndarray]:
        values, weights = np.frombuffer(self.points, np.float64).reshape(2, -1)
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
        if not self.numeric:
            return sorted(self.counts.items(), key=lambda pair: (-pair[1], pair[0]))[:most]
        values, weights = self.weighted()
        order = np.lexsort((values, -weights))[:most]
        found = [(float(values[index]), round(weights[index])) for index in order]
        least = 2 * weights.sum() / max(len(weights), 1) if self.thinned else 0
        return [pair for pair in found if pair[1] > least]


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


def moments(values: np.ndarray) -> dict[str, Any]:
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


def moment(seconds: float) -> str:
    """A date, with its time unless that is midnight."""
    return str(np.datetime64(int(seconds), "s")).removesuffix("T00:00:00")


def counted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different numbers, sorted, and how often each occurs; hashing is faster than sorting where many are equal."""
    if len(values) <= FEW:
        ordered = np.sort(values)
        starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)])
        return ordered[starts], np.diff(np.append(starts, len(ordered)))
    found = pc.value_counts(pa.array(values, pa.float64()))
    different, counts = found.field(0).to_numpy(zero_copy_only=False), found.field(1).to_numpy()
    order = np.argsort(different)
    return different[order], counts[order]


def thinned(values: np.ndarray, weights: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` of the sorted values: those in the middle of so many shares of equal weight, put together where they are equal."""
    if len(values) <= points:
        return values, weights
    share = weights.sum() / points
    picked = np.searchsorted(np.cumsum(weights), (np.arange(points) + 0.5) * share).clip(0, len(values) - 1)
    starts = np.flatnonzero(np.append(True, picked[1:] != picked[:-1]))
    return values[picked[starts]], np.diff(np.append(starts, len(picked))) * share


def measured(found: Column, values: np.ndarray, points: int) -> Column:
    """A column with what is measured of its values, float64 (values,) without NaN."""
    different, counts = counted(values)
    kept, weights = thinned(different, counts.astype(np.float64), points)
    return replace(found, **moments(values), points=np.stack([kept, weights]).tobytes())


def of_texts(kind: str, column: Any, step: int, most: int = MOST_VALUES) -> tuple[Column, pa.Array, np.ndarray]:
    """What all kinds of texts have in common; and the different values looked at, with their counts. most: of these that are kept."""
    array = plain(column if isinstance(column, (pa.Array, pa.ChunkedArray)) else pa.array(column))
    values = texts(array)
    missing = pc.sum(pc.equal(values, "")).as_py() or 0
    step = max(step, math.ceil(values.nbytes / LOOK_BYTES))
    coded = (values if step == 1 else values[::step]).dictionary_encode()
    counts = np.bincount(coded.indices.to_numpy(), minlength=len(coded.dictionary))
    there = np.flatnonzero(pc.not_equal(coded.dictionary, "").to_numpy(zero_copy_only=False))
    different, counts = coded.dictionary.take(pa.array(there)), counts[there]
    hashes = string_hashes(different)
    kept, missed = _most_frequent(different, counts, hashes, most)
    spaced = pc.match_substring_regex(different, r"\s").to_numpy(zero_copy_only=False).astype(bool)
    found = Column(
        kind,
        kept=most,
        rows=len(values),
        missing=missing,
        seen=int(counts.sum()),
        counts=kept,
        missed=missed,
        sketch=registers(hashes).tobytes(),
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


def text_codes(column: Any) -> np.ndarray:
    array = pa.array(column) if isinstance(column, np.ndarray) else column
    if pa.types.is_nested(array.type):
        return np.zeros(len(array), np.uint32)  # several labels are not compared
    coded = texts(array).dictionary_encode()
    words = (string_hashes(coded.dictionary) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    missing = pc.equal(coded.dictionary, "").to_numpy(zero_copy_only=False).astype(bool)
    return np.where(missing, np.uint32(0), words)[coded.indices.to_numpy()]


def merge_columns(a: Column, b: Column, points: int) -> Column:
    """Two pieces of a column; means and squares by Chan, Golub, LeVeque 1983, eq. 2.1."""
    count, difference = a.count + b.count, b.mean - a.mean
    counts, missed = _merge_counts(a, b)
    (values, weights), fewer = _merge_points(a, b, points)
    return Column(
        a.kind,
        a.numeric,
        a.kept,
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
        points=np.stack([values, weights]).tobytes(),
        thinned=fewer,
        counts=counts,
        missed=missed,
        sketch=_most(a.sketch, b.sketch) if a.sketch and b.sketch else b"",
        spaceless=a.spaceless + b.spaceless,
    )


def _most(a: bytes, b: bytes) -> bytes:
    return np.maximum(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)).tobytes()


def _merge_counts(a: Column, b: Column) -> tuple[dict[str, int], int]:
    total = dict(a.counts)
    for value, count in b.counts.items():
        total[value] = total.get(value, 0) + count
    missed = a.missed + b.missed
    if len(total) <= MOST_VALUES:
        return total, missed
    ordered = sorted(total.items(), key=lambda pair: (-pair[1], pair[0]))
    return dict(ordered[: a.kept]), missed + ordered[a.kept][1]


def _merge_points(a: Column, b: Column, points: int) -> tuple[tuple[np.ndarray, np.ndarray], bool]:
    values, weights = (np.concatenate(pair) for pair in zip(a.weighted(), b.weighted(), strict=True))
    different, place = np.unique(values, return_inverse=True)
    kept = thinned(different, np.bincount(place, weights=weights, minlength=len(different)), points)
    return kept, a.thinned or b.thinned or len(kept[0]) < len(different)


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


def number_hashes(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return mix(values.astype(np.float64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15))


def registers(hashes: np.ndarray) -> np.ndarray:
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


def pack(content: bytes) -> str:
    """As it stands in JSON."""
    return base64.b64encode(zlib.compress(content, 1)).decode() if content else ""


def unpack(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text)) if text else b""
