"""A row that a model takes, to show what one looks like: in the line for curl, and in the description of the server."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np

from dlopt.data.encode import encode_png
from dlopt.part import Feature, Signature


def example_row(signature: Signature) -> dict[str, Any]:
    """A row that the model takes, to show what one looks like."""
    row: dict[str, Any] = {}
    for feature in signature.inputs:
        for place, name in enumerate(feature.columns):
            row.setdefault(name, EXAMPLES[feature.kind](feature, place))
    return row


def _image(feature: Feature, place: int) -> Any:
    height, width, channels = (1, 1, feature.shape[2]) if feature.resize else feature.shape
    return {"b64": base64.b64encode(encode_png(np.zeros((height, width, channels), np.uint8))).decode()}


def _category(feature: Feature, place: int) -> Any:
    known = [value for value in feature.vocabularies[place] if value] if feature.vocabularies else []
    return known[0] if known else "a"


def _date(feature: Feature, place: int) -> Any:
    moment = datetime(2026, 11, 30, 8, 30, tzinfo=UTC)
    return moment.strftime(feature.form) if feature.form else moment.date().isoformat()


EXAMPLES: dict[str, Callable[[Feature, int], Any]] = {
    "image": _image,
    "number": lambda feature, place: 1.5,
    "category": _category,
    "date": _date,
    "text": lambda feature, place: "some text",
}
