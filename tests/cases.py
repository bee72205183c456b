"""Which cases of a test run by default."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import product
from typing import Any

import pytest


def few(count: int, values: Collection[Any], several: bool = False) -> list[Any]:
    """So many of the values by default; the others are slow. several: each is what several parameters are."""
    marks = [() if place < count else pytest.mark.slow for place, _ in enumerate(values)]
    return [pytest.param(*(value if several else (value,)), marks=mark) for value, mark in zip(values, marks, strict=True)]


def crossed(*axes: Sequence[Any], ids: Sequence[Sequence[str]] | None = None) -> list[Any]:
    """All combinations of values. Each value is in at least one that is not slow, as many as the longest axis has; the others are."""
    places = [range(len(axis)) for axis in axes]
    usual = {tuple(number % len(axis) for axis in axes) for number in range(max(map(len, axes)))}
    names = ids or [list(map(str, place)) for place in places]
    return [
        pytest.param(
            *(axis[at] for axis, at in zip(axes, chosen, strict=True)),
            id="-".join(each[at] for each, at in zip(names, chosen, strict=True)),
            marks=() if chosen in usual else pytest.mark.slow,
        )
        for chosen in product(*places)
    ]
