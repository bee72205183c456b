"""Rows of many pieces put together by ranges of keys: one file a range, its rows in the order of their keys.

A range is all rows whose keys begin with the same bits: the same rows in the same order however the source was cut into blocks. Pieces
are sorted, so a range is a slice of each. Of many pieces, groups are first cut into bins, in as many steps as it takes: no task opens more
than MOST_OPEN files, and what is opened grows with the pieces, not with pieces times ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dlopt.data.table.spill import HIGH, LOW, TIE, open_rows, write_rows
from dlopt.data.types.exact import widened

ORIGIN = "__origin"
"""The column of a range's file that says which source a row is from, by its place among the sources."""
MOST_OPEN = 64
"""Files that one task puts together."""
SORTED_BYTES = 256 * 2**20
"""Files that are no larger together are sorted as one before they are cut."""
BITS = 6
"""Of the keys by which bins are cut in one step."""

Sorted = tuple[str, int]
"""A file of rows in the order of their keys, and the source that they are from; of files that say so themselves it does not count."""
Run = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]
"""Works on tasks and gives what each has found, in their order."""


def in_ranges(pieces: Sequence[Sorted], power: int, folder: Path, run: Run) -> list[str]:
    """The files of 2**power ranges, of pieces of which there is at least one. run: works on tasks; results in their order."""
    bins: list[Sequence[Sorted]] = [pieces]
    bits = 0
    while bits < power and max(map(len, bins)) > MOST_OPEN:
        step = min(BITS, power - bits)
        groups = [(number, some[start : start + MOST_OPEN]) for number, some in enumerate(bins) for start in range(0, len(some), MOST_OPEN)]
        finer: list[list[Sorted]] = [[] for _ in range(2 ** (bits + step))]
        for children in run(partial(cut, bits=bits, step=step, folder=folder), groups):
            for child, path in children.items():
                finer[child].append((path, 0))
        bins, bits = [some or pieces[:1] for some in finer], bits + step
    tasks = [(number, bins[number >> (power - bits)]) for number in range(2**power)]
    return list(run(partial(gather, power=power, folder=folder), tasks))


def cut(group: tuple[int, Sequence[Sorted]], bits: int, step: int, folder: Path) -> dict[int, str]:
    """Cut the files of a bin, whose number is the first bits of its keys, into bins by some more bits; those that have rows."""
    number, files = group
    opened = [_opened(file) for file in files]
    if sum(rows.nbytes for rows, _ in opened) <= SORTED_BYTES:  # of small files a slice for each bin would cost more than its rows
        rows = _together(opened, number, bits)
        opened = [(rows, rows[HIGH].to_numpy())]
    found = {}
    for child in range(number << step, (number + 1) << step):
        rows = _together(opened, child, bits + step)
        if len(rows):
            found[child] = write_rows(rows, folder)
    return found


def gather(task: tuple[int, Sequence[Sorted]], power: int, folder: Path) -> str:
    """Write a range, of which there may be no row; its file."""
    number, files = task
    return write_rows(_together([_opened(file) for file in files], number, power), folder)


def _opened(file: Sorted) -> tuple[pa.Table, np.ndarray]:
    """The rows of a file with their source, and the first words of their keys."""
    path, origin = file
    rows = open_rows(path)
    if ORIGIN not in rows.column_names:
        rows = rows.append_column(ORIGIN, pa.array(np.full(len(rows), origin, np.int8)))
    return rows, rows[HIGH].to_numpy()


def _together(opened: Sequence[tuple[pa.Table, np.ndarray]], number: int, bits: int) -> pa.Table:
    """The rows whose keys begin with these bits, in order."""
    low, high = number << (64 - bits), (number + 1) << (64 - bits)
    slices = []
    for rows, words in opened:
        start = int(np.searchsorted(words, np.uint64(low)))
        stop = len(words) if high == 2**64 else int(np.searchsorted(words, np.uint64(high)))
        slices.append(rows.slice(start, stop - start))
    together = pa.concat_tables(widened([some for some in slices if len(some)] or slices[:1])).combine_chunks()
    order = _in_order(together)
    return together if (order[1:] > order[:-1]).all() else together.take(pa.array(order))


def _in_order(rows: pa.Table) -> np.ndarray:
    """The order of rows by key, then source, then what tells rows of one key apart. Keys that begin alike are rare, so the
    second word is looked at only where it matters."""
    high = rows[HIGH].to_numpy()
    order = np.argsort(high, kind="stable")
    same = high[order][1:] == high[order][:-1]
    if not same.any():
        return order
    group = np.zeros(len(order), dtype=bool)
    group[1:] |= same
    group[:-1] |= same
    places = np.flatnonzero(group)
    some = order[places]
    by = [rows[name].to_numpy()[some] for name in (TIE, ORIGIN, LOW, HIGH) if name in rows.column_names]
    order[places] = some[np.lexsort(by)]
    return order
