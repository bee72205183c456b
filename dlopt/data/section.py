"""The `data` section of a job: all that `prepare` reads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Self

from pydantic import Field, model_validator

from dlopt.data.clean import Clean, DropColumns, ExactDuplicates, NearDuplicateImages, Outliers
from dlopt.data.kinds import AnyTarget, Input
from dlopt.data.sources import Source
from dlopt.data.table.split import AnySplit, Fold, GivenSplit, RandomSplit, StratifiedSplit, TimeSplit
from dlopt.data.types.tensors import SEPARATOR
from dlopt.part import Part


class Data(Part):
    """Where the rows come from, what is done to them, and which columns mean what."""

    source: Source
    """The rows to train on."""
    validation: Source | None = None
    """A source of its own for the validation split; then split.validation is 0."""
    test: Source | None = None
    """A source of its own for the test split; then split.test is 0."""
    clean: tuple[Clean, ...] = ()
    """Cleaning, in this order; but rules for a single row come before what compares rows, and outliers come last."""
    most_bad: float = Field(0.01, ge=0, le=1)
    """Rows that cannot be read are set aside with their reason; a larger share than this stops the run."""
    inputs: tuple[Input, ...] = Field(min_length=1)
    """What the model sees."""
    target: AnyTarget
    """What the model predicts."""
    split: AnySplit = RandomSplit()
    """Which rows are for training, validation and test."""
    profile: bool = True
    """Whether columns are described, for the report and to warn of suspicious ones; without it, tables of thousands of columns are prepared
    in a fraction of the time."""
    fold: Fold | None = None
    """Of a cross-validation: which of several equal parts is the validation split; train.folds sets it for each in turn."""

    @model_validator(mode="after")
    def each_split_comes_from_one_place(self) -> Self:
        for name in ("validation", "test"):
            share = getattr(self.split, name)
            if getattr(self, name) is not None and share > 0:
                raise ValueError(f"split.{name} is {share:g} but data.{name} names a source: set split.{name} to 0 and raise split.train")
        return self

    @model_validator(mode="after")
    def names_differ(self) -> Self:
        names = [part.tensor for part in self.inputs]
        names += [column for part in self.inputs if part.alone for column in part.columns]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"inputs: two of them are called {name!r}: give a `name` to one")
        for column, part, name in self._made():
            if name in (*names, self.target.name, *self.target.columns):
                raise ValueError(f"inputs: the {part} of {column!r} is called {name!r}, as another column is: rename that column")
        columns = [column for part in self.inputs for column in part.columns]
        for column in (self.target.name, *self.target.columns):
            if column in names or column in columns:
                raise ValueError(f"target.column {column!r} is among the inputs: take it out")
        return self

    @model_validator(mode="after")
    def names_are_free(self) -> Self:
        for part in self.inputs:
            if part.tensor.startswith("__") or SEPARATOR in part.tensor:
                raise ValueError(f"inputs: {part.tensor!r} is a name that dlopt needs itself: give this input another `name`")
        return self

    def _made(self) -> Iterator[tuple[str, str, str]]:
        """Column, part, and what that part is called in the profile and in quarantine."""
        return chain.from_iterable(part.made() for part in self.inputs)

    @property
    def split_by(self) -> tuple[str, ...]:
        """The columns that the split follows, and the parts of dates among them."""
        return (*self.split.columns, *(name for column, _, name in self._made() if column in self.split.columns))

    @model_validator(mode="after")
    def folds_are_cut_by_a_hash(self) -> Self:
        if self.fold and (isinstance(self.split, (TimeSplit, GivenSplit)) or self.validation is not None):
            raise ValueError("fold: folds need a split of kind random, stratified or group, and no data.validation")
        return self

    @model_validator(mode="after")
    def only_classes_are_stratified(self) -> Self:
        if isinstance(self.split, StratifiedSplit) and not self.target.classes:
            raise ValueError(f"split.kind: stratified needs classes, and target.kind is {self.target.kind}: use random")
        return self

    @model_validator(mode="after")
    def groups_are_categories(self) -> Self:
        categories = {column for part in self.inputs for column in part.vocabulary_columns}
        for part in self.inputs:
            if part.fill_by is not None and part.fill_by not in categories:
                raise ValueError(f"inputs: fill.by {part.fill_by!r} must be a column of a category input that keeps a vocabulary")
        return self

    @model_validator(mode="after")
    def each_column_has_one_kind_of_outliers(self) -> Self:
        parts = [part for part in self.clean if isinstance(part, Outliers)]
        named = [column for part in parts for column in part.columns]
        for column in named:
            if named.count(column) > 1:
                raise ValueError(f"clean: outliers are looked for in {column!r} twice: name it in one of them")
        for number in self.inputs:
            actions = {part.action for part in parts if set(part.columns) & set(number.bounded)}
            if {"cap", "missing"} <= actions:
                raise ValueError(
                    f"clean: outliers of the input {number.tensor!r} are both capped and missing: make two inputs of its columns"
                )
        return self

    @property
    def compared(self) -> tuple[str, ...]:
        """The raw columns whose values are compared as texts: of categories, texts, labels, groups, and those that cleaning looks at."""
        inputs = [column for part in self.inputs if part.textual for column in part.columns]
        labels = self.target.columns if self.target.textual else ()
        split = () if isinstance(self.split, TimeSplit) else self.split.columns
        return tuple(dict.fromkeys([*inputs, *labels, *split, *(column for part in self.clean for column in cleaned_columns(part))]))

    @property
    def columns(self) -> tuple[str, ...]:
        """The raw columns that are read, each once."""
        cleaning = [column for part in self.clean for column in cleaned_columns(part)]
        all_of_them = [column for part in self.inputs for column in part.columns]
        return tuple(dict.fromkeys([*all_of_them, *self.target.columns, *self.split.columns, *cleaning]))


def cleaned_columns(part: Clean) -> tuple[str, ...]:
    """The raw columns that a cleaning part looks at."""
    if isinstance(part, DropColumns):
        return ()
    if isinstance(part, NearDuplicateImages):
        return (part.column,)
    return (*part.columns, part.order_by) if isinstance(part, ExactDuplicates) and part.order_by else part.columns
