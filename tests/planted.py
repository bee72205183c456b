"""A table with planted faults, of which it is known, row by row, what must be set aside and why."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from dlopt.data.clean import Allowed, Clean, DropDuplicates, DropMissing, Range

LABELS = ("ä", "b", "c")
CLEAN: tuple[Clean, ...] = (
    DropMissing(columns=("amount",)),
    Range(columns=("amount",), min=0, max=1000),
    Allowed(columns=("label",), values=LABELS),
    DropDuplicates(order_by="id"),
)
"""The cleaning that finds the faults. Undecodable images and rows without a label are found without being asked for."""
REASONS = {
    "duplicate": r"^drop_duplicates$",
    "missing": r"^amount: missing$",
    "type": r"^amount: not a number$",
    "range": r"^amount: (less than 0|more than 1000)$",
    "image": r"(not an image: |no image)",
    "label": r"^label: not an allowed value$",
    "no label": r"^label: no label$",
}
"""Kind of fault to a regular expression for the reason that it is set aside with."""


@dataclass(frozen=True)
class Planted:
    """Columns of the table: id, image (PNG of 8x8 grey pixels), amount (numbers as text), weight (numbers, some missing), label.

    Amount, weight and image are inputs and label is the target; the id is none, it says which row is which.
    """

    table: pa.Table
    """Raw rows, shuffled."""
    faults: dict[str, frozenset[int]]
    """Kind of fault to the ids of the rows that must be set aside for it; no row has two faults."""
    pixels: np.ndarray
    """Of every id, uint8 (rows, 8, 8): what the image of a good row decodes to."""
    amounts: np.ndarray
    """Of every id, float32: what the amount of a good row is."""
    weights: np.ndarray
    """Of every id, float32: what the weight of a good row is; NaN where it is missing."""
    labels: np.ndarray
    """Of every id: what the label of a good row is."""

    @property
    def good(self) -> frozenset[int]:
        """The ids of the rows that stay."""
        return frozenset(range(len(self.table))) - frozenset().union(*self.faults.values())


def planted(rows: int = 2000, seed: int = 0, share: float = 0.01) -> Planted:
    """A table in which this share of the rows has each kind of fault; of the rest, many look odd but are good."""
    random = np.random.default_rng(seed)
    each = max(1, round(rows * share))
    ids = random.permutation(rows - each)  # the last ids are duplicates of others
    faults = {kind: frozenset(ids[place * each : (place + 1) * each].tolist()) for place, kind in enumerate(FAULTS)}
    pixels = random.integers(0, 256, (rows, 8, 8), dtype=np.uint8)
    amounts = random.choice([0.0, 1000.0, 0.5, 7.0, 1e-3, 999.25], rows).astype(np.float32)
    weights = np.where(random.random(rows) < 0.02, np.nan, random.normal(size=rows)).astype(np.float32)
    labels = np.array(LABELS)[random.integers(0, len(LABELS), rows)]
    twins = ids[len(FAULTS) * each :][:each]
    for values in (pixels, amounts, weights, labels):
        values[rows - each :] = values[twins]
    raw = [
        {"id": row, "image": _png(pixels[row]), "amount": f"{amounts[row]:g}", "weight": _or_none(weights[row]), "label": str(labels[row])}
        for row in range(rows)
    ]
    for kind, chosen in faults.items():
        for number, row in enumerate(sorted(chosen)):
            FAULTS[kind](raw[row], number)
    table = pa.Table.from_pylist([raw[row] for row in random.permutation(rows)], SCHEMA)
    return Planted(table, faults | {"duplicate": frozenset(range(rows - each, rows))}, pixels, amounts, weights, labels)


SCHEMA = pa.schema(
    {"id": pa.int64(), "image": pa.binary(), "amount": pa.string(), "weight": pa.float64(), "label": pa.string()}
)  # fmt: skip
Row = dict[str, object]


def _of(column: str, *values: object) -> Callable[[Row, int], None]:
    """A fault that puts one of these values into a column."""
    return lambda row, number: row.update({column: values[number % len(values)]})


def _undecodable(row: Row, number: int) -> None:
    image = row["image"]
    assert isinstance(image, bytes)
    row["image"] = (image[: len(image) // 2], b"", b"no image at all", None, image[8:])[number % 5]


FAULTS: dict[str, Callable[[Row, int], None]] = {
    "missing": _of("amount", None, "", "NA", "nan"),
    "type": _of("amount", "twelve", "1,5", "0x1F", "七", "7 apples"),
    "range": _of("amount", "-0.001", "1000.01", "1e9", "-inf"),
    "image": _undecodable,
    "label": _of("label", "z", "99", "a", "Ä", " b"),
    "no label": _of("label", None),
}
"""Kind of fault to what puts it into a row."""


def _png(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def _or_none(value: np.float32) -> float | None:
    return None if np.isnan(value) else float(value)
