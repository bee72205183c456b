"""How far what clients send, and what the model says of it, is from the training rows: the population stability index of each column over
the last minutes, against the profile that `prepare` wrote. Some rows a second are looked at, so it costs next to nothing.

PSI = sum over bins of (now - then) ln(now / then); by custom below 0.1 is little, above 0.25 is much.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlopt.data.kinds import kinds
from dlopt.part import Signature

BINS = 10
"""Bins of a column of numbers, of about equal shares of the training rows."""
LEAST_SHARE = 1e-4
"""What an empty bin counts as."""
ROWS_A_SECOND = 100
WINDOWS, WINDOW_SECONDS = 10, 60.0
"""The index is of so many stretches of so many seconds."""
FEWEST = 200
"""Rows without which it would be noise; until then it is 0."""
EVERY_SECONDS = 2.0
MOST_COLUMNS = 100
PREDICTION, INPUT = "prediction", "input"


class Column:
    """The training rows' shares of a column's bins; the last bin is for missing values."""

    def __init__(self, told: Mapping[str, Any], split: str) -> None:
        """told: of the profile."""
        figures = told["splits"][split]
        missing = figures["missing"] / max(figures["rows"], 1)
        self.edges: np.ndarray | None = None
        self.places: dict[str, int] = {}
        if told["histogram"] is not None:
            self.edges, shares = merged(np.array(told["histogram"]["edges"]), np.array(told["histogram"]["shares"][split]))
        else:
            values = told["frequent"]["values"]
            shares = np.array(told["frequent"]["shares"][split])
            self.places = {str(value): place for place, value in enumerate(values)}
            shares = np.append(shares, max(0.0, 1 - shares.sum()))
            self.places.setdefault("", len(shares))
        self.expected = np.append(shares * (1 - missing), missing)

    def count(self, values: np.ndarray) -> np.ndarray:
        """How many values fall into each bin."""
        size = len(self.expected)
        if self.edges is not None:
            places = np.searchsorted(self.edges, values, side="right")
            places[np.isnan(values)] = size - 1
        else:
            other = size - 2
            places = np.array([self.places.get(str(value), other) for value in values.tolist()], np.int64)
        return np.bincount(places, minlength=size)


def merged(edges: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inner edges of fewer bins, of at least 1 / BINS of the values each but for the last one, and their shares."""
    inner, found, held = list[float](), list[float](), 0.0
    for share, end in zip(shares.tolist(), edges[1:].tolist(), strict=True):
        held += share
        if held >= 1 / BINS - 1e-9 and end < edges[-1]:
            inner.append(end)
            found.append(held)
            held = 0.0
    return np.array(inner), np.array([*found, held])


def psi(counts: np.ndarray, expected: np.ndarray) -> float:
    """The index of counts of bins against expected shares."""
    now = np.maximum(counts / max(counts.sum(), 1), LEAST_SHARE)
    then = np.maximum(expected, LEAST_SHARE)
    return float(((now - then) * np.log(now / then)).sum())


class Drift:
    """Of one model in this process."""

    def __init__(self, signature: Signature, profile: Mapping[str, Any]) -> None:
        split = next(iter(profile["rows"]))
        told = profile["columns"]
        wanted = [(INPUT, name) for feature in signature.inputs for name in kinds[feature.kind].told(feature)][:MOST_COLUMNS]
        wanted += [(PREDICTION, name) for name in signature.target.names if signature.target.kind != "multi_label"]
        self.columns = {
            key: Column(told[key[1]], split)
            for key in wanted
            if key[1] in told and (told[key[1]]["histogram"] is not None or told[key[1]]["frequent"] is not None)
        }
        self.signature = signature
        self.windows: deque[tuple[float, dict[tuple[str, str], np.ndarray], int]] = deque(maxlen=WINDOWS)
        self.second, self.taken = 0.0, 0
        self.said = 0.0

    def note(self, tensors: Mapping[str, np.ndarray], outputs: np.ndarray, decided: Sequence[Sequence[int]]) -> None:
        """Look at rows that were run, unless enough were this second."""
        now = time.monotonic()
        if now - self.second >= 1:
            self.second, self.taken = now, 0
        rows = min(len(outputs), ROWS_A_SECOND - self.taken)
        if rows <= 0:
            return
        self.taken += rows
        if not self.windows or now - self.windows[-1][0] >= WINDOW_SECONDS:
            self.windows.append((now, {key: np.zeros(len(column.expected), np.int64) for key, column in self.columns.items()}, 0))
        start, counts, seen = self.windows[-1]
        for key, values in self._values(tensors, outputs, decided, rows).items():
            if key in self.columns:
                counts[key] += self.columns[key].count(values)
        self.windows[-1] = start, counts, seen + rows

    def _values(
        self, tensors: Mapping[str, np.ndarray], outputs: np.ndarray, decided: Sequence[Sequence[int]], rows: int
    ) -> dict[tuple[str, str], np.ndarray]:
        found = {}
        for feature in self.signature.inputs:
            for name, values in kinds[feature.kind].measured(feature, tensors[feature.name][:rows]).items():
                found[INPUT, name] = values
        target = self.signature.target
        if target.kind == "number":
            found |= {(PREDICTION, name): outputs[:rows, place].astype(np.float64) for place, name in enumerate(target.columns)}
        elif target.kind == "category":
            found[PREDICTION, target.name] = np.array([target.labels[row[0]] for row in decided[:rows]], dtype=object)
        return found

    def figures(self) -> dict[tuple[str, str], float] | None:
        """The index of each column, 0 while there are too few rows; None when it was asked for a moment ago."""
        now = time.monotonic()
        if now - self.said < EVERY_SECONDS:
            return None
        self.said = now
        while self.windows and now - self.windows[0][0] > WINDOWS * WINDOW_SECONDS:
            self.windows.popleft()
        if self.rows < FEWEST:
            return dict.fromkeys(self.columns, 0.0)
        return {key: psi(sum(counts[key] for _, counts, _ in self.windows), column.expected) for key, column in self.columns.items()}  # type: ignore[arg-type]

    @property
    def rows(self) -> int:
        """How many rows the index is of."""
        return sum(seen for _, _, seen in self.windows)
