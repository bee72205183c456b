"""What a kind of input says of itself. All that is special about it is in its file; the rest asks `kinds[feature.kind]`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from dlopt.data.counter import string_words
from dlopt.data.stats import column as profile
from dlopt.data.types.arrow import pa
from dlopt.data.types.canonical import as_text
from dlopt.data.types.columns import Columns
from dlopt.data.types.exact import raw_values, values_of
from dlopt.data.types.values import Reasons
from dlopt.part import DloptError, Feature, Part, Statistics

RawColumns = Mapping[str, "Sequence[Any] | np.ndarray"]
"""Raw values by the name of their column; or, by the name of an input of several columns, these side by side: (rows, columns)."""
Cells = list[list[str | float]]
"""Of each row what people read of it; NaN where a number is missing."""
Field = dict[str, Any]
"""A column as the page to try the model asks for it: `column`, `widget`, and what that widget of `serve/protocols/page.html` needs."""


class Bound(Part):
    """Where the outliers of a column begin."""

    lower: float
    upper: float
    action: Literal["drop", "cap", "missing"]

    def apply(self, values: np.ndarray) -> np.ndarray:
        """What the model makes of values, float32: it never sees those that are dropped."""
        if self.action == "missing":
            return np.where((values < self.lower) | (values > self.upper), np.float32(np.nan), values)
        return values.clip(np.float32(self.lower), np.float32(self.upper)) if self.action == "cap" else values


class InputKind(Part):
    """Some columns as one input of the model. A kind is a subclass in a file of its own, and its name in the union of `dlopt.data.kinds`.

    `prepare` calls `feature` (the tensor, from the first rows), `read` (raw columns to columns of a piece, with reasons for rows that
    cannot be read), `observe` (what some training rows say; two of these merge), `fit` (the tensor and the statistics, from all
    training rows) and `finish` (the numbers that training reads); the server calls `encode`. Methods without `self` know the tensor
    alone, since a server has no job.
    """

    holds: ClassVar[Literal["pixels", "numbers", "codes", "tokens"]]
    """What is in the tensor, as `Feature.holds` says."""
    textual: ClassVar[bool] = False
    """Whether values are compared as texts, so that each has one text whatever way it comes."""
    marked: ClassVar[bool] = True
    """Whether texts may stand for a missing value."""
    alone: ClassVar[bool] = True
    """Whether its columns are in no other input."""
    removable: ClassVar[bool] = False
    """Whether `drop_columns` may leave out some of its columns."""
    rich: ClassVar[bool] = False
    """Whether values are told in so many ways that none repeats by chance."""
    learns: ClassVar[bool] = False
    """Whether all training rows are to pass once more, by `learn`, before it is fitted."""
    nested: ClassVar[bool] = False
    """Whether values may be lists or objects."""
    together: ClassVar[bool] = True
    """Whether several columns make one input of a job that is only begun, and not one each."""
    unit: ClassVar[str] = ""
    """What the profile measures of each value, as a number; "" for nothing."""
    countable: ClassVar[bool] = True
    """Whether it tells something how many different values there are."""
    moment: ClassVar[bool] = False
    """Whether what the profile measures are seconds since 1970."""
    ranked: ClassVar[bool] = True
    """Whether `sampled` gives numbers, whose order tells something, and no hashes."""
    checks: ClassVar[tuple[str, ...]] = ("constant",)
    """The leak guard's findings that mean something of such values."""

    if TYPE_CHECKING:

        @property
        def columns(self) -> tuple[str, ...]: ...

        @property
        def tensor(self) -> str:
            """The name of the model's input."""

    # what the rest of a job wants to know

    @property
    def shifts(self) -> bool:
        """Whether an offset may be subtracted before: not where the size of a number itself is what the model is to see."""
        return getattr(self, "normalize", "none") not in ("log", "max_abs", "none")

    @property
    def bounded(self) -> tuple[str, ...]:
        """The columns that outliers can be looked for in."""
        return ()

    @property
    def vocabulary_columns(self) -> tuple[str, ...]:
        """The columns that keep a vocabulary, by whose values others can be filled."""
        return ()

    @property
    def fill_by(self) -> str | None:
        """The column whose vocabulary must be known before this input can be fitted."""
        return None

    def made(self) -> Iterator[tuple[str, str, str]]:
        """Column, part, and name of each column that is made of one, where it stands alone: in the profile and in quarantine."""
        return iter(())

    def decided(self, table: pa.Table) -> str:
        """What the first rows have decided, in one line; "" when there was nothing to decide."""
        return ""

    # on the way through prepare

    def feature(self, table: pa.Table) -> Feature:
        """The tensor, from the first rows. Raises DloptError."""
        raise NotImplementedError

    def meant(self, feature: Feature, meaning: Columns) -> Feature:
        """The tensor with what training knows of its columns, so that requests are read alike."""
        types = tuple(meaning.type_of(column) for column in feature.columns) if self.textual else ()
        markers = tuple(marker for marker in meaning.missing if marker) if self.marked else ()
        return feature.model_copy(update={"types": types, "markers": markers})

    def read(self, table: pa.Table, feature: Feature) -> tuple[dict[str, pa.Array], Reasons]:
        """Columns of a piece (see `pieces`), and the reason for every row that cannot be read."""
        raise NotImplementedError

    def lost(self, raw: pa.Table, read: pa.Array) -> list[np.ndarray | None]:
        """Of each column what float64 does not hold of its numbers, or None; [] where there are none to lose."""
        return []

    def observe(self, table: pa.Table, feature: Feature, bounds: Mapping[str, Bound]) -> Any:
        """What some training rows say; has `merge`."""
        return Nothing()

    def learn(self, corpus: Iterator[pa.Table], feature: Feature) -> Feature:
        """The tensor with what all training rows teach, which pass by once, a table at a time."""
        return feature

    def fit(
        self, seen: Any, feature: Feature, features: Mapping[str, Feature], bounds: Mapping[str, Bound] = {}
    ) -> tuple[Feature, Statistics | None]:
        """The tensor and the statistics, from all training rows. features: those that are fitted already, by name."""
        return feature, None

    def finish(self, table: pa.Table, feature: Feature) -> np.ndarray:
        """The numbers that training reads, of `feature.stored` (rows, *shape)."""
        raise NotImplementedError

    def served(self, table: pa.Table, feature: Feature) -> np.ndarray:
        """What `read` has made of rows, as the exported model takes it, of `feature.dtype` (rows, *shape)."""
        return self.finish(table, feature)

    def narrowed(self, table: pa.Table, left_out: Sequence[str]) -> pa.Table:
        """Rows of pieces without some columns of this input."""
        return table

    # of a tensor

    @staticmethod
    def pieces(feature: Feature) -> list[str]:
        """The columns of a piece that hold it."""
        return [feature.name]

    @staticmethod
    def names(feature: Feature) -> tuple[str, ...]:
        """What stands beside each other in it."""
        return (feature.name,)

    @staticmethod
    def words(feature: Feature, table: pa.Table) -> list[np.ndarray]:
        """What values are hashed as for a row's key, (rows, ...): equal for equal values."""
        raise NotImplementedError

    @staticmethod
    def comparable(feature: Feature, table: pa.Table) -> list[np.ndarray]:
        """Codes that are equal where values are, (rows,) of each column; none of values that are rich."""
        return []

    @staticmethod
    def absent(feature: Feature, table: pa.Table) -> dict[str, int]:
        """How often each column that can be left out is missing."""
        return {}

    @classmethod
    def profiled(cls, feature: Feature, table: pa.Table) -> dict[str, tuple[str, Any]]:
        """What the profile tells of: name to kind of column, and values."""
        return {feature.name: (feature.kind, table[feature.name])}

    @staticmethod
    def readable(feature: Feature, table: pa.Table) -> dict[str, Any]:
        """Columns that people can read, of rows that cleaning dropped."""
        return {feature.name: table[feature.name]}

    @classmethod
    def encode(cls, feature: Feature, columns: RawColumns) -> np.ndarray:
        """Raw values of a request as the model's tensor (rows, *shape), of `feature.dtype`. Raises DloptError naming row and column."""
        raise NotImplementedError

    @classmethod
    def told(cls, feature: Feature) -> Sequence[str]:
        """The columns of the profile that `measured` gives the values of."""
        return ()

    @classmethod
    def measured(cls, feature: Feature, values: np.ndarray) -> dict[str, np.ndarray]:
        """Of what the model takes (rows, *shape), by column what the profile tells of it: float64 with NaN, or objects; (rows,) each."""
        return {}

    @staticmethod
    def sent(feature: Feature) -> tuple[str, tuple[int, ...]]:
        """What clients are told of each of its columns: type and shape of a value."""
        return "string", ()

    @staticmethod
    def example(feature: Feature, place: int) -> Any:
        """A value of column number `place`, as JSON has it."""
        return None

    # for people

    @staticmethod
    def describe(feature: Feature) -> str:
        """A few words on what it is."""
        raise NotImplementedError

    @classmethod
    def headings(cls, feature: Feature) -> Sequence[str]:
        """What the cells of a row are called."""
        return cls.names(feature)

    @staticmethod
    def cells(feature: Feature, values: np.ndarray) -> Cells:
        """Values (rows, *shape) of a prepared split as cells; of pixels there are none, which are shown as they are."""
        return [[] for _ in values]

    @staticmethod
    def widgets(feature: Feature) -> list[Field]:
        """The fields of the page to try the model."""
        raise NotImplementedError

    # columns as such, without a job

    @staticmethod
    def recognises(values: Sequence[Any]) -> bool:
        """Whether values that are bytes, lists or objects are of this kind."""
        return False

    @classmethod
    def begun(cls, kind: str, names: Sequence[str]) -> list[dict[str, Any]]:
        """Inputs that a job could begin with, as YAML has them, for columns that seem to be of this kind."""
        if not names:
            return []
        return [{"kind": kind, "columns": list(names)}] if cls.together else [{"kind": kind, "column": name} for name in names]

    @staticmethod
    def summary(column: Any, step: int, points: int) -> profile.Column:
        """What a piece of a column looks like. column: of `profiled`, or raw; step: look at every n-th value; points: to keep."""
        raise NotImplementedError

    @staticmethod
    def typical(figures: Mapping[str, Any]) -> str:
        """A word on what values are like, by the profile's figures of them; "" where there are none."""
        if not figures["frequent"]:
            return ""
        value, count = figures["frequent"][0]
        return f"{value} ({count / figures['seen']:.1%})"

    @staticmethod
    def sampled(column: Any) -> np.ndarray:
        """Values of some rows to compare with the target: float64 with NaN, or uint32 hashes, 0 where missing."""
        raise NotImplementedError


class Matrix(InputKind):
    """An input of numbers, a float32 each in the tensor and what the source says on the way to it (see `dlopt.data.types.exact`)."""

    holds = "numbers"

    @classmethod
    def profiled(cls, feature: Feature, table: pa.Table) -> dict[str, tuple[str, Any]]:
        matrix = raw_values(table[feature.name], feature.size)
        return {name: ("number", matrix[:, index]) for index, name in enumerate(cls.names(feature))}

    @classmethod
    def told(cls, feature: Feature) -> Sequence[str]:
        return cls.names(feature)

    @classmethod
    def measured(cls, feature: Feature, values: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(cls.names(feature), values.astype(np.float64).T, strict=True))

    @staticmethod
    def words(feature: Feature, table: pa.Table) -> list[np.ndarray]:
        return [raw_values(table[feature.name], feature.size).astype(np.float32, copy=False)]

    @staticmethod
    def comparable(feature: Feature, table: pa.Table) -> list[np.ndarray]:
        return list(raw_values(table[feature.name], feature.size).T)

    @classmethod
    def readable(cls, feature: Feature, table: pa.Table) -> dict[str, Any]:
        values = raw_values(table[feature.name], feature.size)
        return {name: values[:, index] for index, name in enumerate(cls.names(feature))}

    def finish(self, table: pa.Table, feature: Feature) -> np.ndarray:
        return values_of(table[feature.name], feature)

    def served(self, table: pa.Table, feature: Feature) -> np.ndarray:
        """With its offsets, which the exported model subtracts itself."""
        return raw_values(table[feature.name], feature.size).astype(feature.dtype, copy=False)

    @staticmethod
    def cells(feature: Feature, values: np.ndarray) -> Cells:
        return list((values + np.array(feature.offsets) if feature.offsets else values).tolist())


class Nothing:
    """What rows say of an input that has no statistics."""

    def merge(self, other: Nothing) -> Nothing:
        return self


def no_column_twice(columns: tuple[str, ...]) -> tuple[str, ...]:
    """Raises ValueError, as a pydantic validator does."""
    twice = [column for column in columns if columns.count(column) > 1]
    if twice:
        raise ValueError(f"column {twice[0]!r} is named twice")
    return columns


def words_of_texts(values: pa.Array) -> np.ndarray:
    """A 64-bit word for each text, (rows, 1)."""
    encoded = values.dictionary_encode()
    return string_words(encoded.dictionary.to_pylist())[encoded.indices.to_numpy()].reshape(-1, 1)


def side_by_side(feature: Feature, columns: RawColumns) -> Sequence[Any] | np.ndarray | None:
    """The columns of an input where they are given as one, (rows, columns); None where each is by itself. Raises DloptError."""
    together = columns.get(feature.name) if feature.name not in feature.columns else None
    if together is None and (lost := next((name for name in feature.columns if name not in columns), None)) is not None:
        raise DloptError(f"there is no column {lost!r}")
    return together


def lists_of(feature: Feature, columns: RawColumns) -> dict[str, list[Any]]:
    """The raw values of each column of an input."""
    together = side_by_side(feature, columns)
    given = {name: bare(columns[name]) for name in feature.columns} if together is None else _apart(feature, together)
    return {name: values.tolist() if isinstance(values, np.ndarray) else list(values) for name, values in given.items()}


def bare(values: Sequence[Any] | np.ndarray) -> Sequence[Any] | np.ndarray:
    """The values of one column, of which each may be in a list of its own."""
    if isinstance(values, np.ndarray):
        return values.reshape(len(values)) if values.ndim > 1 and values.size == len(values) else values
    return [value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value for value in values]


def _apart(feature: Feature, rows: Sequence[Any] | np.ndarray) -> dict[str, Sequence[Any] | np.ndarray]:
    check_width(feature, rows)
    if isinstance(rows, np.ndarray):
        return {name: rows[:, place] for place, name in enumerate(feature.columns)}
    return {name: [row[place] for row in rows] for place, name in enumerate(feature.columns)}


def check_width(feature: Feature, rows: Sequence[Any] | np.ndarray) -> None:
    wide = len(feature.columns)
    if isinstance(rows, np.ndarray):
        fits = rows.ndim == 2 and rows.shape[1] == wide
    else:
        fits = set(map(type, rows)) <= {list, tuple} and set(map(len, rows)) <= {wide}
    if not fits:
        raise DloptError(f"rows must be lists of {wide} values or objects with the columns {', '.join(feature.columns)}")


def no_rows(feature: Feature) -> np.ndarray:
    """The tensor of a request without rows."""
    return np.zeros((0, *feature.shape), dtype=feature.dtype if feature.dtype == "float64" else feature.stored)


def texts_of(feature: Feature, name: str, values: list[Any]) -> list[str]:
    """Texts of a request as they were trained on, "" where missing."""
    for index, value in enumerate(values):
        if value is not None and not isinstance(value, (str, int, float, date)):
            raise DloptError(f"row {index}: {name}: {value!r:.40} is not a text")
    return [as_text(value, feature.type_of(name), feature.markers) for value in values]
