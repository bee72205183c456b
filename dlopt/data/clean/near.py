"""Rows that are nearly the same, by a sketch of each: a few numbers that differ little where rows differ little.

Instead of all pairs, only rows that agree in one of several parts of their sketches are compared (locality-sensitive hashing).
Rows that are near each other, or joined by a chain of such rows, are one cluster, of which the row with the least key stays.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable

import numpy as np

from dlopt.data.clean.base import Cleaning

WINDOW = 32
"""In a crowd of rows that agree in a part, each is compared with so many neighbours, in the order of the part before, and not with all:
what is compared grows with the rows, not with their square. Real clusters are joined by neighbours, or by another part."""
PAIRS = 2**13
"""So many pairs are compared at a time."""

Near = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Two arrays of places to whether the row at the one is near that at the other, pair by pair."""


class NearDuplicates(Cleaning):
    """Of rows that are nearly the same, one stays: the one whose content has the least hash."""

    @abstractmethod
    def losers(self, sketches: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Which rows go, bool of shape (rows,).

        sketches: as `sketch` makes them, in any order of rows. keys: uint64 (rows, 2), the hash of each row's content.
        """


def least_of_equal(words: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """For each different row of words (rows, k), the row that has it and the least key; in the order of their keys."""
    place = np.lexsort((keys[:, 1], keys[:, 0], *words.T))
    first = np.ones(len(place), dtype=bool)
    first[1:] = (words[place[1:]] != words[place[:-1]]).any(axis=1)
    heads = place[first]
    return heads[np.lexsort((keys[heads, 1], keys[heads, 0]))]


def clusters(rows: int, parts: Iterable[np.ndarray], ordered: Callable[[np.ndarray], Near]) -> np.ndarray:
    """For each of the rows the first row of its cluster, int64 of shape (rows,).

    parts: what must agree, uint64 of shape (rows,), for one part of the sketches after the other.
    ordered: from an order of the rows to what says which places in it are near each other; places that are compared are close by.
    """
    labels, order = np.arange(rows), np.arange(rows)
    for words in parts:
        order = order[np.argsort(words[order], kind="stable")]  # rows that agree in this part stay in the order of the last one
        words = words[order]
        run, near = np.flatnonzero(words[1:] == words[:-1]), ordered(order)
        for step in range(1, WINDOW + 1):
            left = run[labels[order[run]] != labels[order[run + step]]]
            left = left[_in_pieces(near, left, left + step)]
            _join(labels, order[left], order[left + step])
            run = run[run + step + 1 < rows]
            run = run[words[run] == words[run + step + 1]]
            if not len(run):
                break
    return labels


def _in_pieces(near: Near, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    pieces = [near(left[start : start + PAIRS], right[start : start + PAIRS]) for start in range(0, len(left), PAIRS)]
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=bool)


def _join(labels: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Make one cluster of the two rows of every pair, in place: the greater of two labels becomes the less, until all pairs agree."""
    while len(left):
        mine, yours = labels[left], labels[right]
        np.minimum.at(labels, np.maximum(mine, yours), np.minimum(mine, yours))
        while (labels[labels] != labels).any():
            labels[:] = labels[labels]
        apart = labels[left] != labels[right]
        left, right = left[apart], right[apart]
