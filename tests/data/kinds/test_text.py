"""Tokenizers: ids against words counted by hand and the library's own trainer, whatever the order of the texts."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dlopt.data.kinds.text import TextInput
from dlopt.data.kinds.tokenizer import Tokens, count_words, join_texts, tokenizer_of, tokens_of, train_tokenizer, vocabulary_size
from dlopt.part import DloptError, Feature

ROOT = Path(__file__).parents[3]
KINDS = ["word", "bpe", "char"]


def part(**given: Any) -> TextInput:
    return TextInput.model_validate({"kind": "text", "column": "text", "min_frequency": 1, "max_length": 16} | given)


def corpus(rows: int = 400) -> list[str]:
    """Texts of words that share pieces and whose counts have many ties."""
    draw = random.Random(5)
    words = [first + middle + last for first in ("un", "re", "") for middle in ("do", "lock", "ply") for last in ("ing", "ed", "s", "")]
    return [" ".join(draw.choices([*words, "Ünïque", "!!", "0845", "日本"], k=draw.randint(0, 9))) for _ in range(rows)]


def ids(tokenizer: str, *texts: str, length: int = 16) -> list[list[int]]:
    """What is before the padding."""
    return [row[row != 0].tolist() for row in Tokens(tokenizer, length).encode(texts)]


def test_words_have_ids_by_falling_frequency_and_then_by_the_alphabet() -> None:
    tokenizer = train_tokenizer(["b a, b", "c a b", "d"], part())
    # [PAD] 0, [UNK] 1, b 2 (three times), a 3 (twice), "," 4, c 5, d 6
    assert ids(tokenizer, "a b c d , e", "B!") == [[3, 2, 5, 6, 4, 1], [2, 1]]
    assert vocabulary_size(tokenizer) == 7


def test_a_row_is_its_ids_and_zeros_to_the_end() -> None:
    tokenizer = train_tokenizer(["a b"], part())
    values = Tokens(tokenizer, 4).encode(["a", "", "a b a b a b", "  "])
    assert values.dtype == np.int32
    assert values.tolist() == [[2, 0, 0, 0], [0, 0, 0, 0], [2, 3, 2, 3], [0, 0, 0, 0]]
    assert Tokens(tokenizer, 4).encode([]).shape == (0, 4)


@pytest.mark.parametrize(("truncation", "left"), [("right", [2, 3, 4]), ("left", [4, 5, 6])])
def test_a_long_text_is_cut_at_the_end_that_the_job_names(truncation: str, left: list[int]) -> None:
    tokenizer = train_tokenizer(["a a a a a b b b b c c c d d e"], part(truncation=truncation, max_length=3))
    assert ids(tokenizer, "a b c d e", length=3) == [left]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_texts_in_any_order_give_the_same_tokenizer(kind: str) -> None:
    given, texts = part(tokenizer=kind, vocab_size=290), corpus()
    first = train_tokenizer(texts, given)
    for seed in range(3):
        random.Random(seed).shuffle(texts)
        assert train_tokenizer(iter(texts), given) == first


@pytest.mark.parametrize("kind", KINDS)
def test_another_process_makes_the_same_tokenizer(kind: str) -> None:
    """The library counts in tables whose order differs from process to process."""
    code = f"from tests.data.kinds.test_text import *; print(train_tokenizer(corpus()[::-1], part(tokenizer={kind!r}, vocab_size=290)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", cwd=ROOT, check=True)
    assert done.stdout.strip() == train_tokenizer(corpus(), part(tokenizer=kind, vocab_size=290))


@pytest.mark.parametrize("kind", KINDS)
def test_counts_of_parts_of_the_texts_add_up_to_the_same_tokenizer(kind: str) -> None:
    given, texts = part(tokenizer=kind, vocab_size=280), corpus()
    counts: Counter[str] = sum((count_words(texts[start : start + 90], given) for start in range(0, 400, 90)), Counter())
    assert tokenizer_of(dict(reversed(counts.items())), given) == train_tokenizer(texts, given)


def test_words_are_those_of_the_librarys_own_trainer() -> None:
    reference = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    reference.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    reference.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]"]
    reference.train_from_iterator(corpus(), trainers.WordLevelTrainer(vocab_size=20, min_frequency=2, special_tokens=special))
    found = Tokenizer.from_str(train_tokenizer(corpus(), part(vocab_size=20, min_frequency=2)))
    assert found.get_vocab() == reference.get_vocab() and found.get_vocab_size() == 20


def test_pieces_are_those_of_the_librarys_own_trainer() -> None:
    reference = Tokenizer(models.BPE())
    reference.normalizer, reference.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["[PAD]", "[UNK]"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    reference.train_from_iterator(corpus(), trainer)
    found = Tokenizer.from_str(train_tokenizer(corpus(), part(tokenizer="bpe", vocab_size=300, min_frequency=1)))
    assert [found.encode(text).tokens for text in corpus(50)] == [reference.encode(text).tokens[:16] for text in corpus(50)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_json_is_all_that_the_library_needs(kind: str) -> None:
    given = part(tokenizer=kind, vocab_size=300, strip_accents=True, digits="zero", truncation="left", max_length=6)
    tokenizer = train_tokenizer(corpus(), given)
    plain = Tokenizer.from_str(tokenizer)
    assert ids(tokenizer, *corpus(), length=6) == [plain.encode(text).ids for text in corpus()]


SAME = [
    ("Free CALL", "free call", "lowercase", True, False),
    ("\ufb01ne \uff46\uff52\uff45\uff45", "fine free", "unicode", "nfkc", "none"),
    ("e\u0301te\u0301", "\u00e9t\u00e9", "unicode", "nfkc", "none"),
    ("été", "ete", "strip_accents", True, False),
    ("0845 12", "9911 88", "digits", "zero", "keep"),
]


@pytest.mark.parametrize(("one", "other", "field", "same", "different"), SAME)
@pytest.mark.parametrize("kind", KINDS)
def test_normalisation_makes_spellings_one_where_the_job_asks_for_it(
    one: str, other: str, field: str, same: Any, different: Any, kind: str
) -> None:
    for value, equal in ((same, True), (different, False)):
        tokenizer = train_tokenizer([one, other], part(tokenizer=kind, **{field: value}))
        first, second = ids(tokenizer, one, other)
        assert (first == second) == equal


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_has_the_id_of_padding_in_it(kind: str) -> None:
    texts = ["[PAD] a [PAD]", "[pad][UNK]", "\x00 \ufeff"]
    given = part(tokenizer=kind, lowercase=False, max_length=40)
    row = Tokens(train_tokenizer(texts, given), 40).encode(texts)
    ends = (row != 0).sum(axis=1)
    assert (row[:2, 0] != 0).all() and ends[:2].min() > 1
    assert all((row[index, :end] != 0).all() for index, end in enumerate(ends))


def test_pieces_write_every_text_and_give_it_back() -> None:
    tokenizer = train_tokenizer(corpus(), part(tokenizer="bpe", vocab_size=320, max_length=400))
    plain, decoder = Tokenizer.from_str(tokenizer), decoders.ByteLevel()
    for text in ("undoing relocked", "日本 emoji 🎉 ñ", "a\tb\n c"):
        (row,) = ids(tokenizer, text, length=400)
        assert 1 not in row
        assert decoder.decode([str(plain.id_to_token(index)) for index in row]) == " " + " ".join(text.split())
    assert max(map(len, ids(tokenizer, "undoing undoing"))) < len("undoingundoing")


def test_characters_are_the_tokens_of_a_char_tokenizer() -> None:
    tokenizer = train_tokenizer(["aab  b"], part(tokenizer="char"))
    assert ids(tokenizer, "ab \n ba", "x") == [[2, 3, 4, 3, 2], [1]]  # a b blank b a


@pytest.mark.parametrize(("kind", "left"), [("word", [2, 3, 1]), ("char", [3, 2, 4, 2, 1])])
def test_the_most_frequent_stay_where_there_is_no_room_for_all(kind: str, left: list[int]) -> None:
    tokenizer = train_tokenizer(["a a a b b c"], part(tokenizer=kind, vocab_size=len(set(left)) + 1))
    assert vocabulary_size(tokenizer) == len(set(left)) + 1
    assert ids(tokenizer, "a b c") == [left]


def test_rare_words_are_unknown() -> None:
    assert ids(train_tokenizer(["a a b"], part(min_frequency=2)), "a b") == [[2, 1]]
    assert vocabulary_size(train_tokenizer(["ab ab ab", "cd"], part(tokenizer="bpe", min_frequency=3))) == 258 + 2  # " a" and " ab"


def test_ids_go_up_to_the_size_of_the_vocabulary() -> None:
    for kind in KINDS:
        tokenizer = train_tokenizer(corpus(), part(tokenizer=kind, vocab_size=300))
        known = Tokenizer.from_str(tokenizer).get_vocab()
        assert sorted(known.values()) == list(range(vocabulary_size(tokenizer)))
        assert known["[PAD]"] == 0 and known["[UNK]"] == 1


def test_many_texts_at_once_are_each_text_alone() -> None:
    tokens = Tokens(train_tokenizer(corpus(), part()), 5)
    texts = corpus(9000)
    every = tokens.encode(texts)
    assert all(np.array_equal(every[index], tokens.encode([texts[index]])[0]) for index in (0, 4095, 4096, 5000, 8999))
    assert np.array_equal(np.concatenate([tokens.encode(texts[:4100]), tokens.encode(texts[4100:])]), every)


def test_half_a_character_is_taken_for_a_question_mark() -> None:
    tokenizer = train_tokenizer(["a ? \ud83d"], part())
    assert ids(tokenizer, "\ud83d a", "? a") == [[2, 3], [2, 3]]


def test_columns_are_joined_in_their_order_and_missing_ones_are_empty() -> None:
    assert join_texts([["a", None, "b"]]) == ["a", "", "b"]
    assert join_texts([["a", None, "b"], ["x", "y", None]]) == ["a x", " y", "b "]
    assert join_texts([[], []]) == []


def test_a_tokenizer_of_the_signature_is_parsed_once() -> None:
    tokenizer = train_tokenizer(["a b"], part())
    feature = Feature(name="text", kind="text", dtype="int32", shape=(3,), columns=("text",), tokenizer=tokenizer, tokens=4)
    assert tokens_of(feature) is tokens_of(feature.model_copy())
    assert tokens_of(feature).encode(["b a a a"]).tolist() == [[3, 2, 2]]
    assert tokens_of(feature.model_copy(update={"shape": (2,)})).encode(["b a a a"]).tolist() == [[3, 2]]


def test_texts_without_a_frequent_word_are_refused() -> None:
    wanted = r"^data\.inputs: text: no word comes 2 times in the training split: lower min_frequency$"
    with pytest.raises(DloptError, match=wanted):
        train_tokenizer(["a b", "c", ""], part(min_frequency=2))


def test_the_column_may_be_one_or_several() -> None:
    assert TextInput.model_validate({"kind": "text", "column": "a"}) == TextInput(columns=("a",))
    given = TextInput(columns=("title", "description"), name="project")
    assert TextInput.model_validate(given.model_dump()) == given


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "name either one `column` or several `columns`"),
        ({"column": "a", "columns": ["b"]}, "name either one `column` or several `columns`"),
        ({"columns": ["a", "a"]}, "column 'a' is named twice"),
        ({"column": "a", "tokenizer": "bpe", "vocab_size": 257}, "at least 258"),
        ({"column": "a", "vocab_size": 2}, "greater than or equal to 3"),
        ({"column": "a", "tokenizer": "sentence"}, "must be word, bpe or char, not"),
        ({"column": "a", "max_length": 0}, "greater than or equal to 1"),
        ({"column": 3}, "must be a text, not 3"),
    ],
)
def test_a_text_input_of_nonsense_is_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(DloptError, match=why):
        TextInput.model_validate(given)


def test_without_the_library_the_module_loads_light_and_says_what_to_install() -> None:
    code = """
import sys
sys.modules["tokenizers"] = None
from dlopt.data.kinds.tokenizer import train_tokenizer
from dlopt.data.kinds.text import TextInput
assert not {"torch", "ray"} & set(sys.modules)
try:
    train_tokenizer(["a"], TextInput(column="text"))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "DloptError data.inputs: text needs the package tokenizers: pip install 'dlopt[text]'"
