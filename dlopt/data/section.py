"""The `data` section of a job: all that `prepare` reads."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from dlopt.data.clean import Clean
from dlopt.data.inputs import CategoryTarget, Input
from dlopt.data.sources import Source
from dlopt.data.split import RandomSplit, Split
from dlopt.part import Part


class Data(Part):
    """Where the rows come from, what is done to them, and which columns mean what."""

    source: Source
    """The rows to train on."""
    test: Source | None = None
    """A source of its own for the test split; `source` is then shared out between train and validation only."""
    clean: tuple[Clean, ...] = ()
    """Cleaning, in this order."""
    most_bad: float = Field(0.01, ge=0, le=1)
    """Rows that cannot be read are set aside with their reason; a larger share than this stops the run."""
    inputs: tuple[Input, ...] = Field(min_length=1)
    """What the model sees."""
    target: CategoryTarget
    """What the model predicts."""
    split: Split = RandomSplit()
    """Which rows are for training, validation and test."""

    @model_validator(mode="after")
    def test_comes_from_one_place(self) -> Self:
        if self.test is not None and self.split.test > 0:
            raise ValueError(f"split.test is {self.split.test:g} but data.test names a source: set split.test to 0 and raise split.train")
        return self

    @model_validator(mode="after")
    def names_differ(self) -> Self:
        names = [part.column if part.kind == "image" else part.name for part in self.inputs]
        names += [column for part in self.inputs if part.kind == "number" for column in part.columns]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"inputs: two of them are called {name!r}: give a `name` to one")
        if self.target.column in names:
            raise ValueError(f"target.column {self.target.column!r} is among the inputs: take it out")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The raw columns that are read."""
        return (*(column for part in self.inputs for column in part.columns), self.target.column)
