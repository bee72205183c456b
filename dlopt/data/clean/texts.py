"""Nearly equal texts, by MinHash: of each of 128 hash functions, the least value over the pieces of a text. Two texts agree in one
with the probability of their Jaccard similarity, the share of their pieces that they have in common (Broder 1997)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from dlopt.data.clean.base import ColumnCleaning
from dlopt.data.clean.near import NearDuplicates, clusters, least_of_equal
from dlopt.data.counter import GAMMA, bits, mix, row_keys, string_words
from dlopt.data.types.values import texts, without_empty

HASHES, FIRST = 128, 16
NOTHING = np.uint32(0xFFFFFFFF)
"""The sketch of a text without any piece; such texts are not near each other."""
RECALL = 0.99
"""Of pairs at the threshold, so many at least agree in a band and are compared."""
PIECES, CHARACTERS, ROWS = 2**10, 2**22, 2**16
"""Shingles that are hashed at a time (their hashes fit a processor's cache), characters and rows that are cut at a time."""
WORD = r"[^\p{L}\p{M}\p{N}]+"
"""What stands between words: anything but letters, their accents, and digits."""


class NearDuplicateTexts(ColumnCleaning, NearDuplicates):
    """Texts that share most of their pieces, whatever their case, spacing and punctuation. Rows without a text stay."""

    kind: Literal["near_duplicate_texts"] = "near_duplicate_texts"
    threshold: float = Field(0.8, ge=0.3, le=1)
    """The least Jaccard similarity of two texts that are taken for the same; it is estimated to within about 0.04."""
    shingles: Literal["words", "characters"] = "words"
    """What the pieces are runs of; characters for short texts, and for languages that do not part their words."""
    size: int = Field(3, ge=1, le=32)
    """How many words or characters make a piece; a shorter text is one piece."""

    def texts(self, table: pa.Table) -> pa.Array:
        """The texts of the raw columns, joined; "" where there is none."""
        columns = [without_empty(texts(table[name])).fill_null("") for name in self.columns]
        return columns[0] if len(columns) == 1 else pc.binary_join_element_wise(*columns, " ")

    def sketch(self, values: pa.Array) -> np.ndarray:
        """The hashes of every text, uint32 of shape (rows, 128)."""
        sketches = np.full((len(values), HASHES), NOTHING)
        for start, stop in _portions(values):
            plain = pc.utf8_lower(pc.utf8_normalize(values.slice(start, stop - start).fill_null(""), "NFKC"))
            units, counts = _words(plain) if self.shingles == "words" else _characters(plain)
            _minima(*_pieces(units, counts, self.size), sketches[start:stop])
        return sketches

    def losers(self, sketches: np.ndarray, keys: np.ndarray) -> np.ndarray:
        there = np.flatnonzero((sketches[:, :4] != NOTHING).any(axis=1))
        heads = there[least_of_equal(_digests(sketches, there), keys[there])]
        labels = clusters(
            len(heads),
            _bands(sketches, heads, self.threshold),
            lambda order: lambda left, right: _agree(sketches, heads[order[left]], heads[order[right]], self.threshold),
        )
        lost = np.zeros(len(sketches), dtype=bool)
        lost[there] = True
        lost[heads[labels == np.arange(len(heads))]] = False
        return lost


def bands_for(threshold: float) -> tuple[int, int]:
    """How many bands of how many hashes: as long as they can be, so that few pairs that are not near agree in one, but still such
    that of pairs at the threshold a share of at least RECALL does."""
    found = max(hashes for hashes in range(1, HASHES + 1) if 1 - (1 - threshold**hashes) ** (HASHES // hashes) >= RECALL)
    return HASHES // found, found


def _bands(sketches: np.ndarray, rows: np.ndarray, threshold: float) -> Iterator[np.ndarray]:
    """The hashes of each band of these rows as one word, uint64 of shape (rows,)."""
    bands, hashes = bands_for(threshold)
    factors = bits(np.arange(hashes), 23)
    for band in range(bands):
        yield sketches[rows, band * hashes : (band + 1) * hashes] @ factors


def _agree(sketches: np.ndarray, left: np.ndarray, right: np.ndarray, threshold: float) -> np.ndarray:
    """Whether pairs of rows agree in a share of at least `threshold` of their hashes; a pair that agrees in far fewer of the first ones
    is not looked at further."""
    few = FIRST * threshold - 3.5 * (FIRST * threshold * (1 - threshold)) ** 0.5
    near = (sketches[left, :FIRST] == sketches[right, :FIRST]).sum(axis=1) >= few
    left, right = left[near], right[near]
    near[near] = (sketches[left] == sketches[right]).sum(axis=1) >= threshold * HASHES - 1e-6
    return near


def _digests(sketches: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """128 bits of each of these sketches, uint64 of shape (rows, 2)."""
    found = np.empty((len(rows), 2), dtype=np.uint64)
    for start in range(0, len(rows), ROWS):
        found[start : start + ROWS] = row_keys([sketches[rows[start : start + ROWS]]])
    return found


def _portions(values: pa.Array) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are small enough to be cut into pieces at once; a row is never divided."""
    ends = np.cumsum(pc.binary_length(values).fill_null(0).to_numpy(zero_copy_only=False))
    start = 0
    while start < len(values):
        before = ends[start - 1] if start else 0
        stop = int(np.searchsorted(ends, before + CHARACTERS, side="right"))
        stop = min(max(stop, start + 1), start + ROWS)
        yield start, stop
        start = stop


def _words(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """A hash of every word of all texts, uint64, and how many words each text has."""
    spaced = pc.utf8_trim_whitespace(pc.replace_substring_regex(values, WORD, " "))
    lists = pc.utf8_split_whitespace(spaced)
    empty = pc.equal(spaced, "").to_numpy(zero_copy_only=False)
    counts = np.where(empty, 0, pc.list_value_length(lists).to_numpy(zero_copy_only=False))
    found = lists.flatten()
    codes = found.filter(pc.not_equal(found, "")).dictionary_encode()
    return string_words(codes.dictionary.to_pylist())[codes.indices.to_numpy()], counts.astype(np.int64)


def _characters(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Every character of all texts as a number, uint64, runs of space being one; and how many each text has."""
    spaced = pc.utf8_trim_whitespace(pc.replace_substring_regex(values, r"\s+", " "))
    counts = pc.utf8_length(spaced).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.frombuffer("".join(spaced.to_pylist()).encode("utf-32-le"), dtype="<u4").astype(np.uint64), counts


def _pieces(units: np.ndarray, counts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A hash of each run of `size` units within a text, uint32, and how many of them each text has."""
    runs = np.where(counts > size, counts - size + 1, np.minimum(counts, 1))
    before = np.cumsum(runs) - runs
    shift = np.repeat(np.cumsum(counts) - counts - before, runs)
    first = np.arange(len(shift)) + shift
    left = np.repeat(counts, runs) if (counts < size).any() else None
    word = np.zeros(len(first), dtype=np.uint64)
    for place in range(size):
        with np.errstate(over="ignore"):
            inside = slice(None) if left is None else left > place
            word[inside] = mix(word[inside] * GAMMA + units[first[inside] + place] + GAMMA)
    return (word >> np.uint64(32)).astype(np.uint32), runs


def _minima(pieces: np.ndarray, counts: np.ndarray, sketches: np.ndarray) -> None:
    """Put the least of every hash function over each text's pieces into sketches (rows, HASHES), which is full of NOTHING."""
    masks, factors = _FUNCTIONS
    rows = np.flatnonzero(counts)
    ends = np.cumsum(counts[rows])
    for start in range(0, len(pieces), PIECES):
        stop = min(start + PIECES, len(pieces))
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        values = (pieces[start:stop, None] ^ masks) * factors
        begins = np.maximum(ends[first : last + 1] - counts[rows[first : last + 1]] - start, 0)
        where = rows[first : last + 1]
        sketches[where] = np.minimum(sketches[where], np.minimum.reduceat(values, begins, axis=0))


def _functions() -> tuple[np.ndarray, np.ndarray]:
    """A mask and an odd factor for each hash function, uint32 of shape (HASHES,)."""
    random = bits(np.arange(HASHES), 19)
    return (random >> np.uint64(32)).astype(np.uint32), random.astype(np.uint32) | np.uint32(1)


_FUNCTIONS = _functions()
