"""The data profile, as JSON: what summaries of splits say of every column, with histograms that can be laid over each other.

{"rows": {split: rows}, "targets": [column, ...], "warnings": [line, ...], "columns": {column: {
    "kind", "unit" of its numbers, "splits": {split: figures}, "histogram": {"edges", "shares": {split: [...]}} or null,
    "frequent": {"values", "shares": {split: [...]}} or null, "drift": {split: index}, "alone": {"measure", "score", "base"} or null}}}
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from dlopt.data.kinds import column_kinds
from dlopt.data.stats import guard
from dlopt.data.stats.column import Column
from dlopt.data.stats.summary import Summary

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
BARS = 40
"""Bars of a histogram; whole numbers of a narrower range get one each."""
TAIL = 0.005
"""Share of the values beyond each end of a histogram, which its outer bars take in."""
FREQUENT = 10
"""Most frequent values that are listed."""


def describe(
    summaries: Mapping[str, Summary],
    targets: Sequence[str] = (),
    duplicates_across: Mapping[str, tuple[int, float]] | None = None,
    split_by: Collection[str] = (),
) -> dict[str, Any]:
    """The profile of a data set, by its splits or as a whole; see guard.findings for the arguments."""
    first = guard.first(summaries)
    train = summaries[first]
    summaries = {first: train, **summaries}
    scores = guard.alone(train, targets)
    columns = {}
    for name in train.columns:
        splits = {split: summary.columns[name] for split, summary in summaries.items() if summary.rows or summary is train}
        columns[name] = _column(splits) | {"alone": _alone(scores.get(name))}
    return {
        "rows": {split: summary.rows for split, summary in summaries.items()},
        "targets": list(targets),
        "warnings": [finding.text for finding in guard.findings(summaries, targets, duplicates_across, split_by, scores)],
        "columns": columns,
    }


def _column(splits: Mapping[str, Column]) -> dict[str, Any]:
    first = next(iter(splits.values()))
    others = {split: column for split, column in splits.items() if column is not first}
    return {
        "kind": first.kind,
        "unit": column_kinds[first.kind].unit,
        "splits": {split: _figures(column) for split, column in splits.items()},
        "histogram": _histogram(splits),
        "frequent": _frequent(first, splits),
        "drift": {split: round(guard.drift(first, column), 4) for split, column in others.items()},
    }


def _figures(column: Column) -> dict[str, Any]:
    """Figures of a column in one split."""
    numbers = column.count > 0
    return {
        "rows": column.rows,
        "missing": column.missing,
        "unreadable": column.unreadable,
        "seen": column.seen,
        "distinct": column.distinct,
        "exact": column.exact,
        "min": column.low,
        "max": column.high,
        "mean": column.mean if numbers else None,
        "std": column.std if numbers else None,
        "quantiles": {f"{p:g}": column.quantile(p) for p in QUANTILES} if numbers else {},
        "frequent": [[value, count] for value, count in column.frequent(FREQUENT)],
    }


def _alone(score: guard.Alone | None) -> dict[str, Any] | None:
    return None if score is None else {"measure": score.measure, "score": round(score.score, 6), "base": round(score.base, 6)}


def _frequent(first: Column, splits: Mapping[str, Column]) -> dict[str, Any] | None:
    """Shares of the most frequent categories of the first split, in all of them."""
    if column_kinds[first.kind].unit or not first.counts:
        return None
    values = [value for value, _ in first.frequent(FREQUENT)]
    shares = {split: [column.counts.get(value, 0) / max(column.seen, 1) for value in values] for split, column in splits.items()}
    return {"values": values, "shares": shares}


def _histogram(splits: Mapping[str, Column]) -> dict[str, Any] | None:
    """Shares of the values of each split between the same edges."""
    there = {split: column for split, column in splits.items() if column.count}
    if not there:
        return None
    edges = _edges(list(there.values()))
    shares = {}
    for split, column in there.items():
        values, weights = column.weighted()
        counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges, weights=weights)
        shares[split] = (counts / weights.sum()).tolist()
    return {"edges": edges.tolist(), "shares": shares}


def _edges(columns: Sequence[Column]) -> np.ndarray:
    """Bars of equal width over all but the far ends of the values; fewer where float64 has no more numbers between these."""
    low, high = (_end(columns, p) for p in (TAIL, 1 - TAIL))
    if all(column.whole for column in columns):
        width = max(1.0, np.ceil((high - low + 1) / BARS))
        edges = np.arange(math.ceil((high - low + 1) / width) + 1) * width + low - 0.5
    else:
        edges = np.linspace(low, high, BARS + 1) if low < high else np.array([low - 0.5, low + 0.5])
    edges = np.unique(edges)
    return edges if len(edges) > 1 else np.array([np.nextafter(low, -np.inf), np.nextafter(high, np.inf)])


def _end(columns: Sequence[Column], p: float) -> float:
    ends = [end for column in columns if (end := column.quantile(p)) is not None]
    return min(ends) if p < 0.5 else max(ends)
