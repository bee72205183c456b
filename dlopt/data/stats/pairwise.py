"""Merging what many parts say, as it comes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, Self, TypeVar


class Mergeable(Protocol):
    def merge(self, other: Self) -> Self: ...


Part = TypeVar("Part", bound=Mergeable)


def merged(parts: Iterable[Part]) -> Part | None:
    """All parts together, merged in their order, two of equally many at a time: errors of sketches grow with log2(parts) only, and no more
    than so many are held. None without any."""
    held: list[tuple[int, Part]] = []
    for part in parts:
        size = 1
        while held and held[-1][0] == size:
            part, size = held.pop()[1].merge(part), 2 * size
        held.append((size, part))
    total = held.pop()[1] if held else None
    while held and total is not None:
        total = held.pop()[1].merge(total)
    return total
