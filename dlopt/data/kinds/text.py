"""Texts: raw columns, tokens, and what people read of them; tokenizers themselves are in `tokenizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from dlopt.data.kinds.base import Cells, InputKind, RawColumns, lists_of, no_column_twice, texts_of, words_of_texts
from dlopt.data.kinds.tokenizer import BYTES, SPECIAL, join_texts, tokens_of, train_tokenizer, vocabulary_size
from dlopt.data.stats import column as profile
from dlopt.data.types.arrow import pa, pc
from dlopt.data.types.values import Reasons, texts
from dlopt.part import DloptError, Feature

KEPT_VALUES = 100
"""Most frequent texts that the profile keeps."""


class TextInput(InputKind):
    """Columns of text as one row of token ids, by a tokenizer that is trained on the training split."""

    holds = "tokens"
    textual = rich = learns = True
    alone = together = ranked = False
    unit = "characters"
    checks = ("identifier", "words", "constant")

    kind: Literal["text"] = "text"
    columns: tuple[str, ...] = ()
    """The columns; several, as title and description, are put together in this order. `column: NAME` is short for one of them."""
    column: str | None = None
    """The column, where there is one."""
    name: str = "text"
    """The name of the model's input."""
    lowercase: bool = True
    """Whether `Free` and `free` are the same."""
    unicode: Literal["nfkc", "none"] = "nfkc"
    """Whether different spellings of a character are the same (Unicode's NFKC: wide letters, ligatures, composed accents)."""
    strip_accents: bool = False
    """Whether `é` becomes `e`."""
    digits: Literal["keep", "zero"] = "keep"
    """zero: every digit becomes 0, so that all numbers of a length are one word."""
    tokenizer: Literal["word", "bpe", "char"] = "word"
    """word: words, and runs of punctuation. bpe: frequent pieces of words by byte-pair encoding (Sennrich et al. 2016) of bytes,
    to which no word is unknown. char: characters."""
    vocab_size: int = Field(20_000, ge=3)
    """The most ids that the tokenizer has, padding and the unknown one included; the most frequent stay."""
    min_frequency: int = Field(2, ge=1)
    """A word, or a pair of pieces, that is rarer in the training split gets no id of its own."""
    max_length: int = Field(128, ge=1)
    """The most tokens of a text."""
    truncation: Literal["right", "left"] = "right"
    """Which end of a longer text is cut off: right keeps its beginning."""

    @model_validator(mode="before")
    @classmethod
    def one_column_is_short_for_a_list(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("column"), str) and not given.get("columns"):
            return {name: value for name, value in given.items() if name != "column"} | {"columns": [given["column"]]}
        return given

    @model_validator(mode="after")
    def columns_are_named_once(self) -> Self:
        if self.column is not None or not self.columns:
            raise ValueError("name either one `column` or several `columns`")
        no_column_twice(self.columns)
        return self

    @model_validator(mode="after")
    def pieces_have_room_for_every_byte(self) -> Self:
        if self.tokenizer == "bpe" and self.vocab_size < BYTES + len(SPECIAL):
            raise ValueError(f"vocab_size {self.vocab_size} is too small for bpe, which has an id for every byte: at least 258")
        return self

    @property
    def tensor(self) -> str:
        """The name of the model's input."""
        return self.name

    def feature(self, table: pa.Table) -> Feature:
        return Feature(name=self.name, kind="text", dtype="int32", shape=(self.max_length,), columns=self.columns, tokens=len(SPECIAL))

    def read(self, table: pa.Table, feature: Feature) -> tuple[dict[str, pa.Array], Reasons]:
        """One column of texts, those of several columns joined."""
        columns = [texts(table[column]) for column in feature.columns]
        joined = columns[0] if len(columns) == 1 else pa.array(join_texts([column.to_pylist() for column in columns]), pa.string())
        return {feature.name: joined}, {}

    def learn(self, corpus: Iterator[pa.Table], feature: Feature) -> Feature:
        """Train the tokenizer on the texts of the training split."""
        words = (value for table in corpus for value in table[feature.name].to_pylist())
        tokenizer = train_tokenizer(words, self)
        return feature.model_copy(update={"tokenizer": tokenizer, "tokens": vocabulary_size(tokenizer)})

    def finish(self, table: pa.Table, feature: Feature) -> np.ndarray:
        """Token ids, int32 (rows, max_length)."""
        return tokens_of(feature).encode(table[feature.name].to_pylist())

    def served(self, table: pa.Table, feature: Feature) -> np.ndarray:
        return _trimmed(self.finish(table, feature))

    @staticmethod
    def words(feature: Feature, table: pa.Table) -> list[np.ndarray]:
        return [words_of_texts(table[feature.name].combine_chunks())]

    @classmethod
    def encode(cls, feature: Feature, columns: RawColumns) -> np.ndarray:
        """Token ids with no more padding than the longest text needs."""
        ids = tokens_of(feature).encode(
            join_texts([texts_of(feature, name, values) for name, values in lists_of(feature, columns).items()])
        )
        return _trimmed(ids)

    @staticmethod
    def example(feature: Feature, place: int) -> Any:
        return "some text"

    @staticmethod
    def describe(feature: Feature) -> str:
        return f"up to {feature.size} tokens of {feature.tokens:,}"

    @classmethod
    def headings(cls, feature: Feature) -> Sequence[str]:
        return [" + ".join(feature.columns)]

    @staticmethod
    def cells(feature: Feature, values: np.ndarray) -> Cells:
        """What the model has seen of each text; the bare ids where the tokenizer is not installed."""
        try:
            tokenizer = tokens_of(feature).tokenizer
        except DloptError:
            return [[" ".join(str(word) for word in row if word)] for row in values.tolist()]
        joined = JOINED.get(type(tokenizer.pre_tokenizer).__name__, " ".join)
        return [[joined([tokenizer.id_to_token(word) or "" for word in row if word])] for row in values.tolist()]

    @staticmethod
    def widgets(feature: Feature) -> list[dict[str, Any]]:
        return [{"column": column, "widget": "text"} for column in feature.columns]

    @classmethod
    def begun(cls, kind: str, names: Sequence[str]) -> list[dict[str, Any]]:
        return [{"kind": kind, **({"name": name} if len(names) > 1 else {}), "column": name} for name in names]

    @staticmethod
    def summary(column: Any, step: int, points: int) -> profile.Column:
        found, different, counts = profile.of_texts("text", column, step, KEPT_VALUES)
        lengths = pc.utf8_length(different).to_numpy(zero_copy_only=False).astype(np.float64)
        return profile.measured(found, np.repeat(lengths, counts), points)

    @staticmethod
    def typical(figures: Mapping[str, Any]) -> str:
        return f"{figures['mean']:.0f} characters" if figures["mean"] is not None else ""

    @staticmethod
    def sampled(column: Any) -> np.ndarray:
        return profile.text_codes(column)


def _trimmed(ids: np.ndarray) -> np.ndarray:
    """Token ids (rows, tokens) with no more padding than the longest text needs."""
    return ids[:, : max(1, int((ids != 0).sum(axis=1).max()))] if len(ids) else ids


def _from_bytes(tokens: list[str]) -> str:
    from tokenizers.decoders import ByteLevel

    return str(ByteLevel().decode(tokens))


JOINED: dict[str, Callable[[list[str]], str]] = {"ByteLevel": _from_bytes, "Split": "".join}
"""How tokens make a text, where it is not words with blanks between them."""
