"""Rows of a prepared split as a person would write them: categories by their names, texts as text, images as pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dlopt.artifact import Artifact
from dlopt.data.kinds import kinds
from dlopt.data.kinds.category import MISSING
from dlopt.data.prepared import Rows, Split
from dlopt.part import Signature
from dlopt.report import plots
from dlopt.report.words import figure

MOST_COLUMNS = 40
"""Columns that are shown of a row."""
MOST_LETTERS = 400
"""Of a text, so many are shown."""
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
    return [
        Column(name, feature.holds == "numbers" and not feature.is_vector and not feature.parts)
        for feature in signature.inputs
        for name in kinds[feature.kind].headings(feature)
    ]


def cells(signature: Signature, rows: Rows) -> list[list[str]]:
    """The cells of each row."""
    parts = [kinds[feature.kind].cells(feature, rows[feature.name]) for feature in signature.inputs]
    count = len(next(iter(rows.values())))
    return [[_written(cell) for part in parts for cell in part[row]] for row in range(count)]


def pictures(signature: Signature, rows: Rows) -> list[list[str]]:
    """The images of each row, as data URIs."""
    images = [rows[feature.name] for feature in signature.inputs if feature.holds == "pixels"]
    count = len(next(iter(rows.values())))
    return [[plots.picture(values[row]) for values in images] for row in range(count)]


def examples(data: Artifact, signature: Signature) -> list[tuple[str, list[str]]]:
    """A few training images of each class or label, the first ones that come; none without images. Of numbers, just a few."""
    names = [feature.name for feature in signature.inputs if feature.holds == "pixels"]
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


def _written(cell: str | float) -> str:
    if isinstance(cell, str):
        return _cut(cell)
    return MISSING if cell != cell else figure(cell, 6)


def _cut(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS].rstrip()}…"
