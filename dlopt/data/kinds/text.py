"""Texts on their way through prepare; how they become tokens is in `dlopt.data.tokenizer`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dlopt.data import tokenizer as text
from dlopt.data.types.values import Reasons, texts
from dlopt.part import Feature


class TextInput(text.TextInput):
    __doc__ = text.TextInput.__doc__

    @property
    def tensor(self) -> str:
        """The name of the model's input."""
        return self.name

    def feature(self, table: pa.Table) -> Feature:
        return Feature(name=self.name, kind="text", dtype="int32", shape=(self.max_length,), columns=self.columns, tokens=len(text.SPECIAL))

    def read(self, table: pa.Table, feature: Feature) -> tuple[dict[str, pa.Array], Reasons]:
        """One column of texts, those of several columns joined."""
        columns = [texts(table[column]) for column in feature.columns]
        joined = columns[0] if len(columns) == 1 else pa.array(text.join_texts([column.to_pylist() for column in columns]), pa.string())
        return {feature.name: joined}, {}

    def observe(self, table: pa.Table, feature: Feature, bounds: Any) -> Nothing:
        return Nothing()

    def fit(self, seen: Nothing, feature: Feature, features: dict[str, Feature]) -> tuple[Feature, None]:
        return feature, None

    def learn(self, corpus: Iterator[pa.Table], feature: Feature) -> Feature:
        """Train the tokenizer on the texts of the training split, which pass by once, a table at a time."""
        words = (value for table in corpus for value in table[feature.name].to_pylist())
        tokenizer = text.train_tokenizer(words, self)
        return feature.model_copy(update={"tokenizer": tokenizer, "tokens": text.vocabulary_size(tokenizer)})

    def finish(self, table: pa.Table, feature: Feature) -> np.ndarray:
        """Token ids, int32 (rows, max_length)."""
        return text.tokens_of(feature).encode(table[feature.name].to_pylist())


@dataclass(frozen=True)
class Nothing:
    """A text has no statistics: its tokenizer is trained on its own."""

    def merge(self, other: Nothing) -> Nothing:
        return self
