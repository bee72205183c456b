"""About how many rows there will be to train on, for who asks before anything is prepared: without Ray, and without reading much."""

from __future__ import annotations

import pyarrow.parquet as pq

from dlopt.data.section import Data
from dlopt.data.sources import Arrow, Csv, HuggingFace, Images, ImageTable, JsonLines, Parquet, Sample, Source, Texts
from dlopt.data.sources.places import COMPRESSED, reading
from dlopt.data.sources.tables import MOST_OPENED
from dlopt.data.table.split import GivenSplit

MOST_BYTES = 256 * 2**20
"""Files of rows that have to be read to be counted are, as long as they are not larger together."""
ALL = 2**62


def training_rows(section: Data) -> int | None:
    """The training split's share of the source's rows; cleaning may leave fewer. None where only reading all of it would tell.
    Raises DloptError."""
    rows = None if isinstance(section.split, GivenSplit) else source_rows(section.source)
    if rows is None:
        return None
    shares, names = section.split.parts(section.fold)
    share = sum(share for share, name in zip(shares, names, strict=True) if name == "train")
    return max(1, round(rows * share))


def source_rows(source: Source) -> int | None:
    """All rows of a source; None where they would have to be read and are many."""
    match source:
        case Sample():
            return len(source.peek(ALL))
        case ImageTable():
            return source_rows(source.table)
        case Images() | Texts():
            return len(source.files())
        case HuggingFace():
            return source.pieces()[1][-1].stop
        case Parquet():
            return _parquet_rows(source)
    place, pieces = source.pieces()
    if sum(piece.bytes for piece in pieces) > MOST_BYTES:
        return None
    return sum(len(table) for _, table in source.load(place, pieces))


def most_rows(source: Source) -> int | None:
    """As many rows as a source can have at most, by what its files say or by their sizes; None where these do not tell."""
    match source:
        case ImageTable():
            return most_rows(source.table)
        case Csv() | JsonLines():
            files = source.located()[1]
            least = len(source.layout().names) if isinstance(source, Csv) else len("{},")
            packed = any(file.name.lower().endswith(COMPRESSED) for file in files)
            return None if packed else sum(file.size + 1 for file in files) // max(least, 1)
        case Parquet():
            return _parquet_rows(source) if len(source.files()) <= MOST_OPENED else None
        case Arrow():
            return None
    return source_rows(source)


def _parquet_rows(source: Parquet) -> int:
    place, files = source.located()
    rows = 0
    for file in files:
        with reading(file.name), place.file(file.path) as opened, pq.ParquetFile(opened) as parquet:
            rows += parquet.metadata.num_rows
    return rows
