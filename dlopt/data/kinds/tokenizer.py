"""Texts as token ids: normalisation and a tokenizer that is trained on the training split and kept, whole, as JSON in the signature.

`prepare` and the server's replica read the same JSON, so a text is the same ids in training and in service. Imports neither torch nor Ray.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from dlopt.part import DloptError, Feature

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from dlopt.data.kinds.text import TextInput

PADDING, UNKNOWN = 0, 1
"""The ids of what fills a row up, and of a word that the tokenizer does not know."""
SPECIAL = ["[PAD]", "[UNK]"]
"""How they stand in the vocabulary. No text is ever cut so that it has one of them."""
SEPARATOR = " "
"""What stands between the columns of a text that is made of several."""
BYTES = 256
"""A tokenizer of pieces knows every byte, so it can write any text."""
MOST_REPEATED = 1000
"""How often a word is written at a time, where the library counts for itself."""
BATCH = 4096
"""Texts that are tokenized at a time: what the library keeps of each is many times its ids."""


def join_texts(columns: Sequence[Sequence[str | None]]) -> list[str]:
    """One text a row out of the columns of it, each (rows,); a missing value is an empty one."""
    if len(columns) == 1:
        return [value or "" for value in columns[0]]
    return [SEPARATOR.join(value or "" for value in row) for row in zip(*columns, strict=True)]


def count_words(texts: Iterable[str], part: TextInput) -> Counter[str]:
    """How often each word is in the texts, as the tokenizer cuts and writes them; counts of parts of the texts add up."""
    tokenizer = _untrained(part)
    normalize, cut = tokenizer.normalizer.normalize_str, tokenizer.pre_tokenizer.pre_tokenize_str
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update([word for word, _ in cut(normalize(_whole(text)))])
    return counts


def tokenizer_of(counts: Mapping[str, int], part: TextInput) -> str:
    """The tokenizer for words that are so frequent, as JSON of the library `tokenizers`; the same counts in any order give the same.

    Words have ids by falling frequency and then by the alphabet. Pieces have them in the order of their merging; the library breaks
    ties there by chance once pieces carry a prefix or suffix, so words are told apart by the space before them instead. Raises DloptError.
    """
    tokenizer = _untrained(part)
    tokenizer.model = _pieces(counts, part) if part.tokenizer == "bpe" else _words(counts, part)
    if tokenizer.get_vocab_size() == len(SPECIAL):
        raise DloptError(f"data.inputs: {part.name}: no word comes {part.min_frequency} times in the training split: lower min_frequency")
    tokenizer.enable_truncation(part.max_length, direction=part.truncation)
    return str(tokenizer.to_str())


def train_tokenizer(texts: Iterable[str], part: TextInput) -> str:
    """The tokenizer of these texts, as JSON; the same texts in any order give the same. Memory goes with the number of different words."""
    return tokenizer_of(count_words(texts, part), part)


def vocabulary_size(tokenizer: str) -> int:
    """How many ids a tokenizer has, given as JSON: from 0 to one less."""
    return len(json.loads(tokenizer)["model"]["vocab"])


class Tokens:
    """A tokenizer, ready for use."""

    def __init__(self, tokenizer: str, max_length: int) -> None:
        self.max_length = max_length
        self.tokenizer: Tokenizer = _library().Tokenizer.from_str(tokenizer)
        self.tokenizer.enable_truncation(max_length, direction=self.tokenizer.truncation["direction"])

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """The ids of each text and then 0 to the end: int32 (texts, max_length)."""
        values = np.zeros((len(texts), self.max_length), dtype=np.int32)
        for start in range(0, len(texts), BATCH):
            ids = [row.ids for row in self.tokenizer.encode_batch_fast([_whole(text) for text in texts[start : start + BATCH]])]
            lengths = np.fromiter(map(len, ids), np.int64, len(ids))
            flat = np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(lengths.sum()))
            values[start : start + len(ids)][np.arange(self.max_length) < lengths[:, None]] = flat
        return values


def tokens_of(feature: Feature) -> Tokens:
    """The tokenizer of an input of the signature; parsed once in a process."""
    return _parsed(feature.tokenizer, feature.shape[0])


_parsed = lru_cache(maxsize=16)(Tokens)


@cache
def _library() -> ModuleType:
    try:
        import tokenizers
    except ImportError:
        raise DloptError("data.inputs: text needs the package tokenizers: pip install 'dlopt[text]'") from None
    return tokenizers


def _whole(text: str) -> str:
    """JSON can spell half of a character, which the library does not take; it becomes a question mark."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _untrained(part: TextInput) -> Tokenizer:
    """How a text is normalised and cut into words, without a vocabulary."""
    library = _library()
    pre = library.pre_tokenizers
    tokenizer: Tokenizer = library.Tokenizer(library.models.WordLevel(unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer = library.normalizers.Sequence(_normalizers(part))
    tokenizer.pre_tokenizer = {
        "word": pre.Whitespace,  # \w+|[^\w\s]+
        "bpe": pre.ByteLevel,  # words with the space before them, numbers, punctuation; each byte written as one character
        "char": lambda: pre.Split(library.Regex(r"[\s\S]"), "isolated"),
    }[part.tokenizer]()
    return tokenizer


def _normalizers(part: TextInput) -> list[Any]:
    """In the order in which they run."""
    library = _library()
    rules = library.normalizers
    found = [rules.NFKC()] if part.unicode == "nfkc" else []
    if part.lowercase:
        found.append(rules.Lowercase())
    if part.strip_accents:
        found += [rules.NFD(), rules.StripAccents(), rules.NFC()]
    if part.digits == "zero":
        found.append(rules.Replace(library.Regex(r"\d"), "0"))
    if part.tokenizer != "word":
        found.append(rules.Replace(library.Regex(r"\s+"), " "))
    return found


def _words(counts: Mapping[str, int], part: TextInput) -> Any:
    """Each frequent word, or character, has an id."""
    frequent = sorted((word for word in counts if counts[word] >= part.min_frequency), key=lambda word: (-counts[word], word))
    known = [*SPECIAL, *frequent[: part.vocab_size - len(SPECIAL)]]
    return _library().models.WordLevel({word: index for index, word in enumerate(known)}, unk_token=SPECIAL[UNKNOWN])


def _pieces(counts: Mapping[str, int], part: TextInput) -> Any:
    """Bytes and the most frequent pieces. Trained apart, since the trainer would make its special ids words that a text may have."""
    library = _library()
    trained = library.Tokenizer(library.models.BPE())
    trained.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()  # a word written in bytes has no space in it
    trained.train_from_iterator(
        (" ".join([word] * min(MOST_REPEATED, counts[word] - start)) for word in counts for start in range(0, counts[word], MOST_REPEATED)),
        library.trainers.BpeTrainer(
            vocab_size=part.vocab_size,
            min_frequency=part.min_frequency,
            special_tokens=SPECIAL,
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model = json.loads(trained.to_str())["model"]
    return library.models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]])
