"""What all cleaning has in common: what it is called in reports, and how much it may drop."""

from __future__ import annotations

from pydantic import Field, field_validator

from dlopt.part import Part


class Cleaning(Part):
    """A way of finding rows that had better not be learned from."""

    kind: str
    most: float = Field(0.5, ge=0, le=1)
    """A larger share of dropped rows than this stops the run."""

    @property
    def title(self) -> str:
        """What it is called in messages and reports."""
        return self.kind


class ColumnCleaning(Cleaning):
    """Cleaning that looks at columns of the user's choice."""

    columns: tuple[str, ...] = Field(min_length=1)
    """The columns of the raw data that it looks at."""

    @field_validator("columns")
    @classmethod
    def columns_differ(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        for column in columns:
            if columns.count(column) > 1:
                raise ValueError(f"column {column!r} is named twice")
        return columns

    @property
    def title(self) -> str:
        return f"{self.kind} of {', '.join(self.columns)}"
