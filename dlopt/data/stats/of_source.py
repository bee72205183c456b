"""The profile of a whole source, read by Ray Data: each block is summed up where it lies, and only summaries travel."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyarrow as pa

from dlopt.data.kinds import column_kinds
from dlopt.data.sources import Source
from dlopt.data.stats.guess import name_of
from dlopt.data.stats.pairwise import merged
from dlopt.data.stats.summary import Summary, summarise
from dlopt.data.types.columns import Columns
from dlopt.part import DloptError
from dlopt.progress import BLOCK, Progress, silent
from dlopt.session import data_context

EVERY = 2.0
"""Seconds between two words on how far it is."""


def profile_source(
    source: Source, kinds: Mapping[str, str], targets: Sequence[str] = (), rows: int | None = None, progress: Progress = silent
) -> Summary:
    """Summary of all rows of a source, or of the first `rows`. Raises DloptError when there are none, or a file cannot be read."""
    data_context(preserve_order=True, reserve=False)
    if left_out := source.left_out():
        progress("profile", None, BLOCK + left_out)
    progress("profile", None, "reading")
    with _saying():
        dataset = source.read() if rows is None else source.read().limit(rows)
        found = dataset.map_batches(_Summarise(kinds, targets, source.meaning()), batch_format="pyarrow", batch_size=None).iter_rows()
        total = merged(_counted((Summary.from_json(row["summary"]) for row in found), progress))
    if total is None:
        raise DloptError(f"{name_of(source)}: is empty")
    return total


def _counted(parts: Iterator[Summary], progress: Progress) -> Iterator[Summary]:
    """The parts that have rows; says now and then how many there are."""
    done, said = 0, time.monotonic()
    for part in parts:
        done += part.rows
        if time.monotonic() - said > EVERY:
            said = time.monotonic()
            progress("profile", None, f"{done:,} rows")
        if part.rows:
            yield part


class _Summarise:
    """A block's summary, as a table of one row."""

    def __init__(self, kinds: Mapping[str, str], targets: Sequence[str], meaning: Columns) -> None:
        self.kinds, self.targets, self.meaning = kinds, targets, meaning

    def __call__(self, table: pa.Table) -> pa.Table:
        table = self.meaning.canonical(table, [name for name, kind in self.kinds.items() if not column_kinds[kind].ranked])
        there = dict(zip(table.column_names, table.columns, strict=True))
        columns = {name: there[name] if name in there else pa.nulls(len(table)) for name in self.kinds}
        return pa.table({"summary": [summarise(columns, self.kinds, self.targets).to_json()]})


@contextmanager
def _saying() -> Iterator[None]:
    """A file that Ray cannot read is the user's to mend, so it is said in one line."""
    try:
        yield
    except (DloptError, OSError, ValueError) as error:  # Ray's errors are of their cause's class as well
        lines = str(getattr(error, "cause", error)).splitlines()
        place = [line.split(" after ")[0] for line in lines[1:2] if line.startswith("Failed to read")]
        raise DloptError("; ".join([*lines[:1], *place])) from None
