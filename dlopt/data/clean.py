"""Cleaning of rows. Rows arrive sorted by their 128-bit key, so equal rows stand side by side."""

from __future__ import annotations

from typing import Literal

import numpy as np

from dlopt.part import Part


class DropDuplicates(Part):
    """Keep one of the rows that are equal in every input and in the target; being equal, it does not matter which."""

    kind: Literal["drop_duplicates"] = "drop_duplicates"

    def keep(self, keys: np.ndarray) -> np.ndarray:
        """Which rows stay, as bool of shape (rows,). keys: uint64 of shape (rows, 2), sorted."""
        keep = np.ones(len(keys), dtype=bool)
        keep[1:] = (keys[1:] != keys[:-1]).any(axis=1)
        return keep


Clean = DropDuplicates
"""The list of what there is; becomes a union by `kind` with the second one."""
