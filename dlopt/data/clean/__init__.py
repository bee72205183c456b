"""What a job says of cleaning. A rule is a class in one of these files and its name in the union.

Their base class says when `prepare` uses them: a `RowRule` judges a row by itself, as it is read; `ExactDuplicates` and
`NearDuplicates` compare all rows, each by a few numbers that stand for it; `Outliers` need what the training rows say of a column.
No part knows of blocks, workers or Ray, and none depends on the order of the rows.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dlopt.data.clean.base import Cleaning
from dlopt.data.clean.duplicates import DropDuplicates, ExactDuplicates, Unique
from dlopt.data.clean.images import NearDuplicateImages
from dlopt.data.clean.near import NearDuplicates
from dlopt.data.clean.outliers import Outliers
from dlopt.data.clean.rules import Allowed, DropColumns, DropMissing, Length, Pattern, Range, RowRule
from dlopt.data.clean.texts import NearDuplicateTexts

Clean = Annotated[
    Range
    | Pattern
    | Allowed
    | DropMissing
    | Length
    | DropColumns
    | DropDuplicates
    | Unique
    | NearDuplicateImages
    | NearDuplicateTexts
    | Outliers,
    Field(discriminator="kind"),
]

__all__ = [
    "Allowed",
    "Clean",
    "Cleaning",
    "DropColumns",
    "DropDuplicates",
    "DropMissing",
    "ExactDuplicates",
    "Length",
    "NearDuplicateImages",
    "NearDuplicateTexts",
    "NearDuplicates",
    "Outliers",
    "Pattern",
    "Range",
    "RowRule",
    "Unique",
]
