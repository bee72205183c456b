"""Rows of a prepared split as a person would write them: categories by their names, texts as text, images as pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dlopt.artifact import Artifact
from dlopt.data.prepared import Rows, Split
from dlopt.part import DloptError, Feature, Signature
from dlopt.report import plots
from dlopt.report.words import figure

MOST_COLUMNS = 40
"""Columns that are shown of a row."""
MOST_LETTERS = 400
"""Of a text, so many are shown."""
MISSING, UNKNOWN = "missing", "unknown"
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MOST_CLASSES, EXAMPLES, LOOKED_AT = 20, 8, 8
"""Image examples: so many of at most so many classes, found in at most so many row groups."""


def read_rows(data: Artifact, name: str, rows: np.ndarray) -> Rows:
    """These rows of a split, in this order; only the chunks that have them are read, from files checked against their seal."""
    split = Split.open(data, name)
    chunk_of_row = np.searchsorted([chunk.start for chunk in split.chunks], rows, side="right") - 1
    used = [split.chunks[index] for index in np.unique(chunk_of_row)]
    for file in {chunk.file for chunk in used}:
        data.check(str(Path(file).relative_to(data.path.resolve())))
    numbers = np.concatenate([np.arange(chunk.start, chunk.start + chunk.rows) for chunk in used] or [rows])
    return {name: values[np.searchsorted(numbers, rows)] for name, values in split.read(used).items()}


class Column(NamedTuple):
    """What a cell of a row is called, and whether a number stands in it."""

    name: str
    number: bool


def columns(signature: Signature) -> list[Column]:
    """The columns of `cells`; images are pictures and no cells."""
    return [Column(name, feature.kind == "number") for feature in signature.inputs for name in _columns(feature)]


def cells(signature: Signature, rows: Rows) -> list[list[str]]:
    """The cells of each row."""
    parts = [CELLS[feature.kind](feature, rows[feature.name]) for feature in signature.inputs if feature.kind != "image"]
    count = len(next(iter(rows.values())))
    return [[cell for part in parts for cell in part[row]] for row in range(count)]


def pictures(signature: Signature, rows: Rows) -> list[list[str]]:
    """The images of each row, as data URIs."""
    images = [rows[feature.name] for feature in signature.inputs if feature.kind == "image"]
    count = len(next(iter(rows.values())))
    return [[plots.picture(values[row]) for values in images] for row in range(count)]


def examples(data: Artifact, signature: Signature) -> list[tuple[str, list[str]]]:
    """A few training images of each class or label, the first ones that come; none without images. Of numbers, just a few."""
    names = [feature.name for feature in signature.inputs if feature.kind == "image"]
    if not names:
        return []
    found = _first_rows(data)
    values, target = found[names[0]], found[signature.target.name]
    if signature.target.kind == "number":
        return [("training images", [plots.picture(image) for image in values[:EXAMPLES]])]
    shown = []
    for index, label in enumerate(signature.target.labels[:MOST_CLASSES]):
        has = target == index if signature.target.kind == "category" else target[:, index] > 0
        shown.append((str(label), [plots.picture(image) for image in values[has][:EXAMPLES]]))
    return shown


def _first_rows(data: Artifact) -> Rows:
    chunks = Split.open(data, "train").chunks[:LOOKED_AT]
    return read_rows(data, "train", np.arange(chunks[-1].start + chunks[-1].rows))


def _columns(feature: Feature) -> Sequence[str]:
    if feature.kind == "image":
        return ()
    return [" + ".join(feature.columns)] if feature.kind == "text" else feature.columns


def _numbers(feature: Feature, values: np.ndarray) -> list[list[str]]:
    values = values + np.array(feature.offsets) if feature.offsets else values
    return [[MISSING if value != value else figure(value, 6) for value in row] for row in values.tolist()]


def _dates(feature: Feature, values: np.ndarray) -> list[list[str]]:
    """A date a column, of the parts that the model sees: 2026-11-24 08:30 where they make one, else each part by its name."""
    values = (values + np.array(feature.offsets) if feature.offsets else values).reshape(len(values), len(feature.columns), -1)
    return [[_date(dict(zip(feature.parts, parts, strict=True))) for parts in row] for row in values.tolist()]


def _date(parts: dict[str, float]) -> str:
    if any(value != value for value in parts.values()):
        return MISSING
    if "days" in parts:
        return f"{datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=parts['days']):%Y-%m-%d %H:%M}".removesuffix(" 00:00")
    whole = {name: round(value) for name, value in parts.items()}
    if {"year", "month", "day"} <= set(whole):
        day = f"{whole['year']}-{whole['month']:02}-{whole['day']:02}"
        return f"{day} {whole['hour']:02}:{whole.get('minute', 0):02}" if "hour" in whole else day
    return ", ".join(f"{name} {WEEKDAYS[value] if name == 'weekday' else value}" for name, value in whole.items())


def _categories(feature: Feature, codes: np.ndarray) -> list[list[str]]:
    """The names of codes (rows, columns); of hashed ones there are none."""
    if feature.buckets:
        return [[f"#{code}" for code in row] for row in codes.tolist()]
    names = [[UNKNOWN, *(value or MISSING for value in known)] for known in feature.vocabularies]
    return [[known[code] for known, code in zip(names, row, strict=True)] for row in codes.tolist()]


def _texts(feature: Feature, ids: np.ndarray) -> list[list[str]]:
    """What the model has seen of each text; the bare ids where the tokenizer is not installed."""
    try:
        from dlopt.data.tokenizer import tokens_of

        tokenizer = tokens_of(feature).tokenizer
    except DloptError:
        return [[_cut(" ".join(str(word) for word in row if word))] for row in ids.tolist()]
    pieces = type(tokenizer.pre_tokenizer).__name__
    written = [[tokenizer.id_to_token(word) or "" for word in row if word] for row in ids.tolist()]
    return [[_cut(JOINED.get(pieces, " ".join)(row))] for row in written]


def _from_bytes(tokens: list[str]) -> str:
    from tokenizers.decoders import ByteLevel

    return str(ByteLevel().decode(tokens))


JOINED: dict[str, Callable[[list[str]], str]] = {"ByteLevel": _from_bytes, "Split": "".join}
"""How tokens make a text, where it is not words with blanks between them."""
CELLS: dict[str, Callable[[Feature, np.ndarray], list[list[str]]]] = {
    "number": _numbers,
    "date": _dates,
    "category": _categories,
    "text": _texts,
}
"""kind of input: its values (rows, *shape) as the cells of each row."""


def _cut(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS].rstrip()}…"
