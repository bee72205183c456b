"""The leak guard: what is suspicious about the columns of a data set and its splits, said in a line each.

It is meant to be silent on sound data: a figure must be large in itself and beyond what chance makes of splits of this size.

| warning | when | source of the threshold |
|---|---|---|
| identifier | UNIQUE of the values are different (category; text without white space), or whole numbers fill their range | see UNIQUE |
| copies the target | one column leaves less than LEAK of the error that the target's most frequent class or its mean makes | see LEAK |
| blanks around values | any | |
| constant, mostly missing | one value at most; more than MOST_MISSING without a value | |
| drifts | population stability index above DRIFT and above chance; or new values in NEW of the rows | Siddiqi 2006; Yurdakul 2020 |
| cannot be told apart | MERGED of a column's different numbers are the same as others in float32, an offset subtracted | see exact.py |
| stands for no data | the least or greatest number is a mark such as -9999 or -3.4e38, farther off than others are apart | see _is_mark |
| imbalanced | a class has less than RARE of an equal share | Google's ML course: a minority of 1 to 20 % is moderate, below extreme |
| duplicates across splits | more than CHANCE standard deviations beyond what chance makes of rows that have few values | see repeats.py |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dlopt.data.kinds import column_kinds
from dlopt.data.stats.column import Column, moment
from dlopt.data.stats.summary import RowSample, Summary

UNIQUE = 0.9
"""Share of the values that are different from which a column is an identifier; 6 standard errors of the estimate below 1."""
DENSE = 0.5
"""Share of the whole numbers between least and greatest that occur from which a column of different ones is a counter."""
FEW_ROWS = 50
"""Of fewer rows no more is said than that a column is constant or missing."""
LEAK, LEAK_NUMBER = 0.03, 0.01
"""Share of the error that a copy leaves: of a class between the 1 to 2 % that a copy with 1 % of noise leaves and the 4 to 6 % of
the best honest columns of known data (petal width of iris 6 %, odour of mushrooms 3 %); of a number, of the variance of its ranks
(honest and close: distance for air time of nycflights13 3 %, carat for price of diamonds 7 %)."""
MOST_MISSING = 0.5
DRIFT = 0.25
"""Population stability index: above 0.25 "a significant shift" (N. Siddiqi 2006, "Credit Risk Scorecards", table of page 137)."""
CHANCE = 5.0
"""Standard deviations beyond which an index is no chance. By chance it is (1/n + 1/m) chi-squared with one degree of freedom less than
there are cells (B. Yurdakul and J. Naranjo 2020, "Statistical properties of the population stability index")."""
NEW = 0.02
"""Share of a split's rows whose values never occur in train, though they are too frequent for that to be chance."""
RARE = 0.1
"""Share of what a class would have if all were equally frequent, below which the classes are imbalanced: 5 % of two classes."""
MERGED = 0.05
"""Share of the different numbers; of 10^6 random ones 1 % are the same as another in float32, which is of no consequence."""
HUGE = 1e30
"""What lies beyond is no measure of anything; float32 ends at 3.4e38, and netCDF fills with 9.97e36."""
ENDS = (-(2.0**63), 2.0**63, -(2.0**31), 2.0**31 - 1, -(2.0**15))
"""Ends of whole numbers of 64, 32 and 16 bits."""
CELLS = 10
"""Cells of the index; the usual deciles."""
EACH = 5
"""Least rows that a cell should hold in the smaller split."""
BINS = (16, 256)
"""Into so many quantiles a number is cut to predict the target; the better one counts."""
MOST_CLASSES = 256
"""Classes of a target that are told apart."""
TRAIN, WHOLE = "train", "all"
"""The split that the others are compared with, and the name of a data set that has no splits."""


class Finding(NamedTuple):
    """Something suspicious."""

    what: str
    """identifier, leak, constant, missing, unreadable, blanks, merged, no_data, drift, imbalance or duplicates."""
    column: str
    """The column; of duplicates, the split."""
    text: str
    """One line: the column, the figure, what to do."""


@dataclass(frozen=True)
class Alone:
    """How well one column alone predicts the target, measured on rows that it was not fitted on."""

    measure: str
    """accuracy of the best class for each value or bin, or r2: share of the variance of the target's ranks that bin means explain."""
    score: float
    base: float
    """What the most frequent class, or the mean, scores."""
    rows: int

    @property
    def left(self) -> float:
        """Share of the base's error that is left."""
        return (1 - self.score) / (1 - self.base) if self.base < 1 else 1.0

    @property
    def leaks(self) -> bool:
        """Whether the target is all but a function of the column; of classes, not by the chance of a few rows."""
        if self.rows < FEW_ROWS or (1 - self.base) * self.rows < EACH:
            return False
        if self.measure == "r2":
            return self.left <= LEAK_NUMBER
        wrong, z2 = 1 - self.score, 4.0 / self.rows
        upper = (wrong + z2 / 2 + 2 * math.sqrt(wrong * (1 - wrong) / self.rows + z2 / (4 * self.rows))) / (1 + z2)
        return wrong == 0 or upper <= LEAK * (1 - self.base)


def warnings(
    summaries: Mapping[str, Summary],
    targets: Sequence[str] = (),
    duplicates_across: Mapping[str, tuple[int, float]] | None = None,
    split_by: Collection[str] = (),
) -> list[str]:
    """What is suspicious, most telling first; see `findings`."""
    return [finding.text for finding in findings(summaries, targets, duplicates_across, split_by)]


def findings(
    summaries: Mapping[str, Summary],
    targets: Sequence[str] = (),
    duplicates_across: Mapping[str, tuple[int, float]] | None = None,
    split_by: Collection[str] = (),
    scores: Mapping[str, Alone] | None = None,
) -> list[Finding]:
    """What is suspicious about a data set.

    summaries: of the splits train, validation, test; or of the whole set under any one name.
    duplicates_across: for a split, how many of its rows are in train as well, and how many may be by chance (see repeats.py).
    split_by: columns that the split follows (time, group), which differ between splits because they are meant to.
    scores: what `alone` says, where it has been asked already.
    """
    name = first(summaries)
    train = summaries[name]
    inputs = [column for column in train.columns if column not in targets]
    whole = {column: _all(summaries, column) for column in train.columns}
    found = [_identifier(column, whole[column]) for column in inputs]
    found += [_leak(column, score, targets) for column, score in (alone(train, targets) if scores is None else scores).items()]
    found += [_constant(column, train.columns[column], name) for column in train.columns]
    found += [_missing(column, train.columns[column], name) for column in train.columns]
    found += [check(column, whole[column]) for check in (_unreadable, _blanks, _merged, _no_data) for column in train.columns]
    named = {finding.column for finding in found if finding and finding.what in ("identifier", "constant")}
    drifting = [column for column in train.columns if column not in named and column not in split_by]
    found += [_drift(column, train, summaries[split], split) for split in summaries if split != name for column in drifting]
    found += [_imbalance(column, train.columns[column], name) for column in targets]
    found += [duplicates(split, *counts, summaries.get(split)) for split, counts in (duplicates_across or {}).items()]
    return [finding for finding in found if finding]


def first(summaries: Mapping[str, Summary]) -> str:
    """The name of the split that all others are compared with."""
    return TRAIN if TRAIN in summaries else next(iter(summaries))


def alone(summary: Summary, targets: Sequence[str]) -> dict[str, Alone]:
    """For each input: how well it alone predicts the target, the first of them where there are several."""
    sample = summary.sample
    if not targets or sample is None or len(sample) < 4:
        return {}
    target = summary.columns[targets[0]]
    if not (target.numeric or _checks(target, "imbalance")):
        return {}
    goal = sample.column(targets[0], target.kind)
    known = ~np.isnan(goal) if target.numeric else goal != 0
    score = _r2 if target.numeric else _accuracy
    found = {}
    for name, column in summary.columns.items():
        if name not in targets and column.seen:
            scored = score(_cuts(sample, name, column.kind, known), goal[known])
            if scored:
                found[name] = scored
    return found


def drift(train: Column, other: Column) -> float:
    """Population stability index between a column in two splits: the sum over cells of (p - q) ln(p / q). 0 where there is no value."""
    return _stability(train, other)[0]


def _all(summaries: Mapping[str, Summary], column: str) -> Column:
    """A column of all splits together."""
    parts = [Summary(summary.rows, {column: summary.columns[column]}, None) for summary in summaries.values()]
    together = parts[0]
    for part in parts[1:]:
        together = together.merge(part)
    return together.columns[column]


def _checks(column: Column, what: str) -> bool:
    """Whether a finding means something of such a column."""
    return what in column_kinds[column.kind].checks


def _identifier(name: str, column: Column) -> Finding | None:
    if column.seen < FEW_ROWS or column.distinct < UNIQUE * column.seen or not _checks(column, "identifier"):
        return None
    said = f"{name}: an identifier, {_about(column)} different values in {column.seen:,} rows"
    if column.numeric:
        places = (column.high or 0) - (column.low or 0) + 1
        if not column.whole or column.count < DENSE * places:
            return None
        said = f"{name}: a row counter, {_about(column)} different whole numbers from {column.low:,.0f} to {column.high:,.0f}"
    if _checks(column, "words") and column.spaceless < 0.99 * column.seen:
        return None  # texts that people write differ
    return Finding("identifier", name, f"{said}: a model can only learn the rows by heart from it; take it out of data.inputs")


def _leak(name: str, score: Alone, targets: Sequence[str]) -> Finding | None:
    if not score.leaks:
        return None
    if score.measure == "r2":
        said = f"explains {score.score:.1%} of the variance of its ranks"
    else:
        said = f"is right in {score.score:.1%} of the rows, where the most frequent class is in {score.base:.1%}"
    text = f"{name}: all but copies the target {targets[0]}: alone it {said}; take it out unless it is known before the target is"
    return Finding("leak", name, text)


def _constant(name: str, column: Column, split: str) -> Finding | None:
    if not _checks(column, "constant") or column.rows < EACH or column.distinct > 1:
        return None
    if not column.seen:
        return Finding("constant", name, f"{name}: none of {column.rows:,} rows{_of(split)} has a value: take it out")
    value, rows = shown(column.frequent(1)[0][0], column.kind), column.rows - column.missing
    text = f"{name}: constant, {value} in all {rows:,} rows{_of(split)} that have a value: take it out"
    return Finding("constant", name, text)


def _missing(name: str, column: Column, split: str) -> Finding | None:
    share = column.missing / max(column.rows, 1)
    if share <= MOST_MISSING or column.missing == column.rows:
        return None
    text = f"{name}: {share:.1%} of the rows{_of(split)} have no value: take it out, or set `indicators` so that the model sees which"
    return Finding("missing", name, text)


def _blanks(name: str, column: Column) -> Finding | None:
    padded = sorted(value for value in column.counts if value != value.strip()) if _checks(column, "blanks") else []
    if not padded:
        return None
    text = f"{name}: {len(padded):,} of its values have blanks around them, such as {padded[0]!r}, which is another value than "
    text += f"{padded[0].strip()!r}: strip them in the files, or set `trim` of a csv source"
    return Finding("blanks", name, text)


def _unreadable(name: str, column: Column) -> Finding | None:
    if not column.unreadable:
        return None
    text = (
        f"{name}: {column.unreadable:,} of {column.rows:,} rows hold no readable {column.kind}: mend them, or give the column another kind"
    )
    return Finding("unreadable", name, text)


def _merged(name: str, column: Column) -> Finding | None:
    if not _checks(column, "merged") or column.merged <= MERGED * column.told:
        return None
    text = (
        f"{name}: {column.merged / column.told:.0%} of its different numbers are the same as others in float32, which is all that a model "
        "sees: take it out if it names rows, else subtract or divide in the source what hides the differences"
    )
    return Finding("merged", name, text)


def _no_data(name: str, column: Column) -> Finding | None:
    values, weights = column.weighted()
    for end in (column.low, column.high) if _checks(column, "no_data") else ():
        others = values[values != end]
        if end is None or len(others) < 2 or not _is_mark(end) or np.abs(others - end).min() <= np.ptp(others):
            continue
        rows = int(weights[values == end].sum())
        text = (
            f"{name}: {end:.6g} in {max(rows, 1):,} rows, far from all others, which are from {others[0]:.6g} to {others[-1]:.6g}, "
            "stands for no data: make it a missing value in the source, or with "
            f"{{kind: outliers, columns: [{name}], action: missing}} in data.clean"
        )
        return Finding("no_data", name, text)
    return None


def _is_mark(number: float) -> bool:
    """Whether programs write the number for a missing value: nines with a sign or at least four, the end of a type, or a huge one."""
    digits = f"{abs(number):.0f}"
    nines = number == round(number) and set(digits) == {"9"} and len(digits) >= (2 if number < 0 else 4)
    return nines or number in ENDS or abs(number) >= HUGE


def _drift(name: str, train: Summary, other: Summary, split: str) -> Finding | None:
    a, b = train.columns[name], other.columns[name]
    if min(a.rows, b.rows) < EACH:
        return None
    index, chance = _stability(a, b)
    share, value = _unseen(a, b)
    if share >= NEW:
        text = f"{name}: {share:.1%} of the rows of {split} have values that train never has, such as {value!r}"
    elif index > max(DRIFT, chance):
        text = f"{name}: drifts, its population stability index between train and {split} is {index:.2f} (above {DRIFT} is a shift)"
    else:
        return None
    return Finding("drift", name, f"{text}: figures on {split} may not be those of train; check where the splits come from, or take it out")


def _imbalance(name: str, column: Column, split: str) -> Finding | None:
    classes = column.frequent(len(column.counts))
    if not _checks(column, "imbalance") or len(classes) < 2 or column.missed:
        return None
    value, count = classes[-1]
    if count * len(classes) >= RARE * column.seen:
        return None
    text = f"{name}: imbalanced, class {value} has {count:,} of {column.seen:,} rows{_of(split)} ({count / column.seen:.2%})"
    return Finding("imbalance", name, f"{text}: weigh the classes or sample them evenly, and judge by F1 or ROC AUC, not by accuracy")


def duplicates(split: str, count: int, chance: float, summary: Summary | None) -> Finding | None:
    """Whether more rows of a split are in train as well than may be by chance. summary: of the split."""
    if count <= chance + CHANCE * math.sqrt(chance):
        return None
    share = f" ({count / summary.rows:.1%})" if summary and summary.rows else ""
    text = f"{split}: {count:,} of its rows{share} are in train as well, so its figures flatter: add `drop_duplicates` to data.clean"
    return Finding("duplicates", split, f"{text}, or keep copies together with `group: content` in data.split")


def _about(column: Column) -> str:
    return f"{column.distinct:,}" if column.exact else f"about {column.distinct:,}"


def _of(split: str) -> str:
    return "" if split == WHOLE else f" of {split}"


def shown(value: Any, kind: str) -> str:
    """A value as a line of text has it."""
    if column_kinds[kind].moment:
        return moment(value)
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def _stability(a: Column, b: Column) -> tuple[float, float]:
    """The index between two splits of a column, and what it may come to by chance."""
    n, m = a.seen + _unseen_missing(a), b.seen + _unseen_missing(b)
    if not a.seen or not b.seen:
        return 0.0, math.inf
    cut = _number_cells if column_kinds[a.kind].unit else _category_cells
    p, q = cut(a, b, max(2, min(CELLS, int(min(n, m) // EACH))))
    if a.missing or b.missing:
        p, q = np.append(p, _unseen_missing(a)), np.append(q, _unseen_missing(b))
    p, q = ((cells + 0.5) / (cells + 0.5).sum() for cells in (p, q))
    degrees = max(len(p) - 1, 1)
    spread = 2 / (9 * degrees)
    chance = degrees * (1 - spread + CHANCE * math.sqrt(spread)) ** 3  # Wilson and Hilferty 1931
    return float(((p - q) * np.log(p / q)).sum()), chance * (1 / n + 1 / m)


def _unseen_missing(column: Column) -> float:
    """How many missing values there would be among as many rows as were looked at."""
    there = column.rows - column.missing
    return column.missing * column.seen / there if there else float(column.missing)


def _number_cells(a: Column, b: Column, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both between the quantiles of the first."""
    edges = np.unique([a.quantile(p) for p in np.arange(1, cells) / cells])
    values, weights = zip(a.weighted(), b.weighted(), strict=True)
    found = [np.bincount(np.searchsorted(edges, v), weights=w, minlength=len(edges) + 1) for v, w in zip(values, weights, strict=True)]
    return found[0], found[1]


def _category_cells(a: Column, b: Column, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both with each of the values that are frequent in either, and those with any other."""
    least = max(0.01, EACH / min(a.seen, b.seen))
    frequent = [value for value in sorted({*a.counts, *b.counts}) if _share(a, value) + _share(b, value) >= 2 * least]
    p, q = (np.array([float(column.counts.get(value, 0)) for value in frequent]) for column in (a, b))
    return np.append(p, max(a.seen - p.sum(), 0)), np.append(q, max(b.seen - q.sum(), 0))


def _share(column: Column, value: str) -> float:
    return column.counts.get(value, 0) / column.seen


def _unseen(a: Column, b: Column) -> tuple[float, str]:
    """Share of the second's rows whose values the first does not have, though by chance it would; and the most frequent of them."""
    if not _checks(a, "new") or not a.seen or not b.seen:
        return 0.0, ""
    chance = b.seen / (a.seen + b.seen)  # that one row with such a value is in the second
    least = max(2.0, math.log(1e-6 / max(len(b.counts), 1)) / math.log(chance), 10 * a.missed * b.seen / a.seen)
    new = {value: count for value, count in b.counts.items() if value not in a.counts and count >= least}
    return sum(new.values()) / b.seen, max(new, key=lambda value: new[value], default="")


def _cuts(sample: RowSample, name: str, kind: str, known: np.ndarray) -> list[np.ndarray]:
    """Ways of cutting a column into bins, each the bin of every row: its values, or quantiles and one bin for what is missing."""
    values = sample.column(name, kind)[known]
    if not column_kinds[kind].ranked:
        return [np.unique(values, return_inverse=True)[1]]
    there = values[~np.isnan(values)]
    if not len(there):
        return []
    edges = [np.unique(np.quantile(there, np.arange(1, bins) / bins, method="lower")) for bins in BINS]
    return [np.where(np.isnan(values), len(edge) + 1, np.searchsorted(edge, values)) for edge in edges]


def _accuracy(cuts: list[np.ndarray], goal: np.ndarray) -> Alone | None:
    """Of the best class of each bin."""
    names, classes, counts = np.unique(goal, return_inverse=True, return_counts=True)
    if not cuts or len(goal) < 4:
        return None
    rank = np.empty(len(names), int)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(names))
    classes = np.minimum(rank[classes], MOST_CLASSES - 1)
    score = max(_across(_best_class, bins, classes) for bins in cuts)
    return Alone("accuracy", float(score), float(counts.max() / len(goal)), len(goal))


def _r2(cuts: list[np.ndarray], goal: np.ndarray) -> Alone | None:
    """Of the mean of each bin; of the target's ranks, so that one far value does not decide."""
    values, place, counts = np.unique(goal, return_inverse=True, return_counts=True)
    if not cuts or len(values) < 2:
        return None
    ranks = (np.cumsum(counts) - counts / 2)[place]
    error = min(_across(_squared_error, bins, ranks) for bins in cuts)
    return Alone("r2", 1 - float(error) / float(np.var(ranks)), 0.0, len(goal))


def _across(score: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray], bins: np.ndarray, goal: np.ndarray) -> float:
    """Mean score of all rows, those of each half by what the other half says."""
    half = np.arange(len(goal)) % 2 == 0
    return float(np.mean([score(bins, goal, half)[~half].mean(), score(bins, goal, ~half)[half].mean()]))


def _best_class(bins: np.ndarray, classes: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """Whether each row is of the class that is most frequent in its bin, or in all where the bin is empty, among the rows to fit on."""
    width = int(classes.max()) + 1
    table = np.bincount(bins[fit] * width + classes[fit], minlength=(int(bins.max()) + 1) * width).reshape(-1, width)
    best = np.where(table.any(axis=1), table.argmax(axis=1), table.sum(axis=0).argmax())
    return best[bins] == classes


def _squared_error(bins: np.ndarray, goal: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """Of the mean of each row's bin, or of all where the bin is empty, among the rows to fit on."""
    size = int(bins.max()) + 1
    count, total = np.bincount(bins[fit], minlength=size), np.bincount(bins[fit], weights=goal[fit], minlength=size)
    return np.square(np.where(count, total / np.maximum(count, 1), goal[fit].mean())[bins] - goal)
