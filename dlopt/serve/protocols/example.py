"""A row that a model takes, to show what one looks like: in the line for curl, and in the description of the server."""

from __future__ import annotations

from typing import Any

from dlopt.data.kinds import kinds
from dlopt.part import Signature


def example_row(signature: Signature) -> dict[str, Any]:
    """A row that the model takes."""
    row: dict[str, Any] = {}
    for feature in signature.inputs:
        for place, name in enumerate(feature.columns):
            row.setdefault(name, kinds[feature.kind].example(feature, place))
    return row
