"""Categories: values of a small set, each a code of a vocabulary that the training split makes, or of a hash."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from dlopt.data.counter import string_words
from dlopt.data.kinds.base import Bound, Cells, InputKind, RawColumns, lists_of, no_column_twice, words_of_texts
from dlopt.data.stats import column as profile
from dlopt.data.types.arrow import pa, pc
from dlopt.data.types.canonical import ColumnType, as_text
from dlopt.data.types.tensors import piece_column
from dlopt.data.types.values import Reasons, texts
from dlopt.part import DloptError, Feature

MISSING, UNKNOWN = "missing", "unknown"
MOST_DISTINCT = 2_000_000
"""More different values in a column than this are not counted: no vocabulary would hold them."""


class CategoryInput(InputKind):
    """Columns of categories, put together as one input of the model; each column has a vocabulary of its own."""

    holds = "codes"
    textual = removable = True
    ranked = False
    checks = ("identifier", "constant", "blanks", "imbalance", "new")

    kind: Literal["category"] = "category"
    columns: tuple[str, ...] = Field(min_length=1)
    """The columns: strings, whole numbers, true and false."""
    name: str = "categories"
    """The name of the model's input."""
    fill: Literal["category", "most_frequent"] = "category"
    """What a missing value is: a category of its own (the unknown one, if training has none), or the most frequent one."""
    min_count: int = Field(1, ge=1)
    """Values that are rarer than this in the training split count as unknown."""
    max_values: int = Field(10_000, ge=1)
    """So many of the most frequent values are told apart; the others count as unknown."""
    hash_buckets: int | None = Field(None, ge=2)
    """For columns with very many values: each value's code is its hash, modulo this, and no vocabulary is kept."""

    @field_validator("columns")
    @classmethod
    def columns_differ(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        return no_column_twice(columns)

    @model_validator(mode="after")
    def hashes_have_no_vocabulary(self) -> Self:
        given = [name for name in ("fill", "max_values", "min_count") if getattr(self, name) != type(self).model_fields[name].default]
        if self.hash_buckets and given:
            raise ValueError(f"{given[0]} needs a vocabulary, and hash_buckets keeps none: leave out one of them")
        return self

    @property
    def tensor(self) -> str:
        """The name of the model's input."""
        return self.name

    @property
    def vocabulary_columns(self) -> tuple[str, ...]:
        return () if self.hash_buckets else self.columns

    def feature(self, table: pa.Table) -> Feature:
        hashes = self.hash_buckets is not None
        return Feature(
            name=self.name,
            kind="category",
            dtype="int32" if hashes else "string",
            shape=(len(self.columns),),
            columns=self.columns,
            vocabularies=() if hashes else (("",),) * len(self.columns),
            missing=() if hashes else (0,) * len(self.columns),
            buckets=self.hash_buckets or 0,
        )

    def read(self, table: pa.Table, feature: Feature) -> tuple[dict[str, pa.Array], Reasons]:
        """A column of texts for each column, "" where missing."""
        return {piece_column(feature.name, column): texts(table[column]) for column in feature.columns}, {}

    def observe(self, table: pa.Table, feature: Feature, bounds: Any) -> Categories:
        """How often training rows have each value."""
        if self.hash_buckets:
            return Categories(())
        return Categories(tuple(_counted(table[piece_column(feature.name, column)]) for column in feature.columns))

    def fit(
        self, seen: Categories, feature: Feature, features: Mapping[str, Feature], bounds: Mapping[str, Bound] = {}
    ) -> tuple[Feature, None]:
        """The vocabularies: the most frequent value first."""
        if self.hash_buckets:
            return feature, None
        vocabularies, missing = [], []
        for column, counts in zip(feature.columns, seen.counts, strict=True):
            _refuse_too_many(column, counts)
            ranked = sorted(counts, key=lambda value: (-counts[value], value))
            if self.fill == "most_frequent":
                ranked = [value for value in ranked if value]
            known = tuple(value for value in ranked if counts[value] >= self.min_count)[: self.max_values]
            vocabularies.append(known)
            missing.append(known.index("") + 1 if "" in known else int(self.fill == "most_frequent" and len(known) > 0))
        return feature.model_copy(update={"vocabularies": tuple(vocabularies), "missing": tuple(missing)}), None

    def finish(self, table: pa.Table, feature: Feature) -> np.ndarray:
        """Codes, int32 (rows, columns)."""
        codes = np.empty((len(table), len(feature.columns)), dtype=np.int32)
        for index, column in enumerate(feature.columns):
            values = table[piece_column(feature.name, column)].combine_chunks()
            codes[:, index] = hashed(values, feature.buckets) if feature.buckets else _looked_up(values, feature, index)
        return codes

    def served(self, table: pa.Table, feature: Feature) -> np.ndarray:
        """Texts, which the exported model looks up itself; codes where they are hashed."""
        if feature.buckets:
            return self.finish(table, feature)
        found = np.empty((len(table), len(feature.columns)), dtype=object)
        for index, column in enumerate(feature.columns):
            values = table[piece_column(feature.name, column)].combine_chunks().dictionary_encode()
            found[:, index] = np.array(values.dictionary.to_pylist(), dtype=object)[values.indices.to_numpy()]
        return found

    @staticmethod
    def pieces(feature: Feature) -> list[str]:
        return [piece_column(feature.name, column) for column in feature.columns]

    @staticmethod
    def names(feature: Feature) -> tuple[str, ...]:
        return feature.columns

    @staticmethod
    def words(feature: Feature, table: pa.Table) -> list[np.ndarray]:
        return [words_of_texts(table[name].combine_chunks()) for name in CategoryInput.pieces(feature)]

    @staticmethod
    def comparable(feature: Feature, table: pa.Table) -> list[np.ndarray]:
        return [table[name].combine_chunks().dictionary_encode().indices.to_numpy() for name in CategoryInput.pieces(feature)]

    @staticmethod
    def absent(feature: Feature, table: pa.Table) -> dict[str, int]:
        empty = {column: pc.equal(table[piece_column(feature.name, column)], "") for column in feature.columns}
        return {column: pc.sum(values).as_py() or 0 for column, values in empty.items()}

    @classmethod
    def profiled(cls, feature: Feature, table: pa.Table) -> dict[str, tuple[str, Any]]:
        return {column: ("category", values) for column, values in cls.readable(feature, table).items()}

    @staticmethod
    def readable(feature: Feature, table: pa.Table) -> dict[str, Any]:
        return {column: table[piece_column(feature.name, column)] for column in feature.columns}

    @classmethod
    def encode(cls, feature: Feature, columns: RawColumns) -> np.ndarray:
        """Texts, object (rows, columns), or int32 codes where they are hashed."""
        found = []
        for name, values in lists_of(feature, columns).items():
            kind = feature.type_of(name)
            found.append([_text(name, index, value, kind, feature.markers) for index, value in enumerate(values)])
        if feature.buckets:
            return np.stack([_bucket(string_words(values), feature.buckets) for values in found], axis=1)
        return np.array(found, dtype=object).T.reshape(len(found[0]), len(found))

    @classmethod
    def told(cls, feature: Feature) -> Sequence[str]:
        """Texts; of codes nobody knows what they were."""
        return () if feature.buckets else feature.columns

    @classmethod
    def measured(cls, feature: Feature, values: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(cls.told(feature), values.T, strict=False))

    @staticmethod
    def example(feature: Feature, place: int) -> Any:
        known = [value for value in feature.vocabularies[place] if value] if feature.vocabularies else []
        return known[0] if known else "a"

    @staticmethod
    def describe(feature: Feature) -> str:
        return f"{len(feature.columns)} categor{'ies' if len(feature.columns) > 1 else 'y'}"

    @staticmethod
    def cells(feature: Feature, values: np.ndarray) -> Cells:
        """The names of codes; of hashed ones there are none."""
        if feature.buckets:
            return [[f"#{code}" for code in row] for row in values.tolist()]
        names = [[UNKNOWN, *(value or MISSING for value in known)] for known in feature.vocabularies]
        return [[known[code] for known, code in zip(names, row, strict=True)] for row in values.tolist()]

    @staticmethod
    def widgets(feature: Feature) -> list[dict[str, Any]]:
        known = feature.vocabularies or ((),) * len(feature.columns)
        return [
            {"column": column, "widget": "choice", "values": [value for value in values if value]}
            for column, values in zip(feature.columns, known, strict=True)
        ]

    @staticmethod
    def summary(column: Any, step: int, points: int) -> profile.Column:
        return profile.of_texts("category", column, step)[0]

    @staticmethod
    def sampled(column: Any) -> np.ndarray:
        return profile.text_codes(column)


@dataclass(frozen=True)
class Categories:
    """How often each value was seen, for each column."""

    counts: tuple[Counter[str], ...]

    def merge(self, other: Categories) -> Categories:
        return Categories(tuple(mine + yours for mine, yours in zip(self.counts, other.counts, strict=True)))


def _counted(column: pa.ChunkedArray) -> Counter[str]:
    found = pc.value_counts(column.combine_chunks())
    return Counter(dict(zip(found.field(0).to_pylist(), found.field(1).to_pylist(), strict=True)))


def _text(name: str, index: int, value: Any, kind: ColumnType, missing: tuple[str, ...]) -> str:
    if value is not None and not isinstance(value, (str, int, float, date)):
        raise DloptError(f"row {index}: {name}: give a string, a number, true, false or null")
    return as_text(value, kind, missing)


def hashed(values: pa.Array, buckets: int) -> np.ndarray:
    """The code of each text, int32 (rows,)."""
    codes = values.dictionary_encode()
    return _bucket(string_words(codes.dictionary.to_pylist()), buckets)[codes.indices.to_numpy()]


def _bucket(words: np.ndarray, buckets: int) -> np.ndarray:
    """A hash modulo `buckets`, int32."""
    return (words % np.uint64(buckets)).astype(np.int32)


def _looked_up(values: pa.Array, feature: Feature, index: int) -> np.ndarray:
    codes = pc.index_in(values, pa.array(feature.vocabularies[index], pa.string())).fill_null(-1).to_numpy(zero_copy_only=False) + 1
    if feature.missing[index]:
        codes[pc.equal(values, "").to_numpy(zero_copy_only=False)] = feature.missing[index]
    return codes


def _refuse_too_many(column: str, counts: Mapping[str, int]) -> None:
    if len(counts) > MOST_DISTINCT:
        raise DloptError(f"data.inputs: column {column!r} has {len(counts):,} different values: use hash_buckets, or leave it out")
