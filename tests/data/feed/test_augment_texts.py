"""What changes texts, against plain lists, one row at a time; and what changes tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dlopt.data.augment import (
    Augmentation,
    FeatureDropout,
    FeatureNoise,
    RandomCrop,
    RandomDeletion,
    RandomInsertion,
    RandomReplacement,
    RandomSwap,
    augment_rows,
)
from dlopt.data.augment.draw import Draw
from dlopt.part import Feature, Statistics

WIDTH, TOKENS = 12, 50
TEXT = Feature(name="text", kind="text", dtype="int32", shape=(WIDTH,), columns=("text",), tokens=TOKENS)
EDITS: list[Augmentation] = [RandomReplacement(p=0.3), RandomInsertion(p=0.3), RandomDeletion(p=0.3), RandomSwap(p=0.5)]


def texts(rows: int = 400) -> np.ndarray:
    """Ids of texts of 1 to WIDTH tokens, and of one without any."""
    random = np.random.default_rng(1)
    found = random.integers(1, TOKENS, (rows, WIDTH), dtype=np.int32)
    lengths = random.integers(1, WIDTH + 1, rows)
    lengths[0] = 0
    return np.where(np.arange(WIDTH) < lengths[:, None], found, 0).astype(np.int32)


def edited(given: np.ndarray, *parts: Augmentation, picks: np.ndarray | None = None) -> np.ndarray:
    picks = np.arange(len(given)) if picks is None else picks
    found = augment_rows({"text": torch.from_numpy(given.copy())}, (TEXT,), picks, 7, 3, parts, {})["text"]
    assert found.dtype == torch.int32
    return found.numpy()


def draw(rows: int) -> Draw:
    """The numbers of the first part for the first input."""
    return Draw.of(np.arange(rows), 7, 3).part(0).part(0)


def lists(given: np.ndarray) -> list[list[int]]:
    return [row[row != 0].tolist() for row in given]


def padded(rows: list[list[int]]) -> np.ndarray:
    return np.array([(row + [0] * WIDTH)[:WIDTH] for row in rows], dtype=np.int32)


def others(rows: int) -> np.ndarray:
    return np.floor(draw(rows).uniforms(1, WIDTH) * (TOKENS - 1)).astype(int) + 1


@pytest.mark.parametrize("part", EDITS, ids=lambda part: part.kind)
def test_texts_stay_texts(part: Augmentation) -> None:
    given = texts()
    for p in (0.0, 0.1, 0.5, 1.0):
        found = edited(given, part.model_copy(update={"p": p}))
        assert found.shape == given.shape and found.min() >= 0 and found.max() < TOKENS
        assert ((found != 0).cumprod(axis=1) == (found != 0)).all()  # padding only at the end
        assert ((found != 0).any(axis=1) == (given != 0).any(axis=1)).all()  # none gets empty
        if p == 0:
            assert (found == given).all()


def test_replaced_tokens_are_any_of_the_vocabulary() -> None:
    given = texts()
    fate, other = draw(400).uniforms(0, WIDTH), others(400)
    expected = [[other[i, j] if fate[i, j] < 0.3 else token for j, token in enumerate(row)] for i, row in enumerate(lists(given))]
    assert (edited(given, RandomReplacement(p=0.3)) == padded(expected)).all()
    every = edited(np.ones((4000, WIDTH), dtype=np.int32), RandomReplacement(p=1))
    counts = np.bincount(every.ravel(), minlength=TOKENS)
    assert counts[0] == 0 and ((counts[1:] - 48000 / 49) ** 2 / (48000 / 49)).sum() < 95  # chi-squared, 48 degrees of freedom


def test_inserted_tokens_push_the_rest_on_and_over_the_end() -> None:
    given = texts()
    fate, other = draw(400).uniforms(0, WIDTH), others(400)
    expected = [
        [new for j, token in enumerate(row) for new in ([int(other[i, j])] if fate[i, j] < 0.3 else []) + [token]]
        for i, row in enumerate(lists(given))
    ]
    assert max(map(len, expected)) > WIDTH
    assert (edited(given, RandomInsertion(p=0.3)) == padded(expected)).all()


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_deleted_tokens_are_gone_but_the_luckiest_stays(p: float) -> None:
    given = texts()
    fate = draw(400).uniforms(0, WIDTH)
    expected = []
    for i, row in enumerate(lists(given)):
        kept = [token for j, token in enumerate(row) if fate[i, j] >= p]
        expected.append(kept or [row[int(fate[i, : len(row)].argmax())]] if row else [])
    assert (edited(given, RandomDeletion(p=p)) == padded(expected)).all()


def test_swapped_tokens_change_places_among_themselves() -> None:
    given = texts()
    fate, order = draw(400).uniforms(0, WIDTH), draw(400).uniforms(1, WIDTH)
    expected = lists(given)
    for i, row in enumerate(expected):
        chosen = [j for j in range(len(row)) if fate[i, j] < 0.5]
        tokens = [row[j] for j in sorted(chosen, key=lambda j, i=i: order[i, j])]
        for j, token in zip(chosen, tokens, strict=True):
            row[j] = token
    found = edited(given, RandomSwap(p=0.5))
    assert (found == padded(expected)).all() and (np.sort(found, axis=1) == np.sort(given, axis=1)).all()
    assert (found != given).any(axis=1).mean() > 0.5


def test_a_text_is_edited_alike_in_every_batch_and_not_alike_in_every_epoch() -> None:
    given = texts(100)
    whole = edited(given, *EDITS)
    for start in range(0, 100, 9):
        rows = np.arange(start, min(start + 9, 100))
        assert (edited(given[rows], *EDITS, picks=rows) == whole[rows]).all()
    assert (edited(given, *EDITS, picks=np.arange(100) + 2**36) != whole).any(axis=1).mean() > 0.8
    again = edited(given, EDITS[0], EDITS[0])
    assert (again != edited(given, EDITS[0])).any()


A = Feature(name="a", kind="number", dtype="float32", shape=(3,), columns=("x", "y", "z"))
B = Feature(name="b", kind="date", dtype="float32", shape=(3,), columns=("d",), parts=("year", "month", "day"))
CODES = Feature(name="codes", kind="category", dtype="string", shape=(1,), columns=("c",), vocabularies=(("u", "v"),))


def statistics(*std: float) -> Statistics:
    many = (0.0,) * len(std)
    return Statistics(count=1, missing=(0,) * len(std), min=many, max=many, mean=many, std=std, shift=many, scale=many)


def table(rows: int = 4000) -> dict[str, Tensor]:
    random = np.random.default_rng(3)
    numbers = {name: random.normal(size=(rows, 3)).astype(np.float32) for name in "ab"}
    numbers["a"][::4, 0] = np.nan
    return {name: torch.from_numpy(values) for name, values in numbers.items()} | {"codes": torch.ones((rows, 1), dtype=torch.int32)}


def changed(given: dict[str, Tensor], *parts: Augmentation, picks: np.ndarray | None = None) -> dict[str, Tensor]:
    picks = np.arange(len(given["a"])) if picks is None else picks
    known = {"a": statistics(1.0, 10.0, 0.0), "b": statistics(2.0, 2.0, 2.0)}
    return augment_rows(given, (A, B, CODES), picks, 7, 3, parts, known)


def test_noise_is_in_deviations_of_its_column_and_independent_of_other_columns() -> None:
    given = table()
    found = changed(given, FeatureNoise(std=0.5), RandomCrop())
    noise = {name: (found[name] - given[name]).numpy().astype(np.float64) for name in "ab"}
    there = ~np.isnan(given["a"].numpy())
    assert (np.isnan(found["a"].numpy()) == ~there).all() and (noise["a"][:, 2] == 0).all()
    columns = [noise["a"][:, 0], noise["a"][:, 1] / 10, *(noise["b"].T / 2)]
    for column in columns:
        assert abs(np.nanmean(column)) < 0.04 and abs(np.nanstd(column) - 0.5) < 0.02
    full = there[:, 0]
    correlation = np.corrcoef(np.stack(columns)[:, full]) - np.eye(5)
    assert np.abs(correlation).max() < 0.07
    assert torch.equal(found["codes"], given["codes"])


def test_dropped_values_are_missing_and_the_rest_is_untouched() -> None:
    given = table()
    found = changed(given, FeatureDropout(p=0.2))
    for name in "ab":
        before, after = given[name].numpy(), found[name].numpy()
        assert (np.isnan(after) | (after == before)).all()
        dropped = (np.isnan(after) & ~np.isnan(before)).sum(axis=0) / (~np.isnan(before)).sum(axis=0)
        assert np.abs(dropped - 0.2).max() < 0.03
    assert torch.equal(found["codes"], given["codes"]) and not given["b"].isnan().any()


def test_a_row_of_a_table_is_changed_alike_in_every_batch() -> None:
    given, parts = table(100), (FeatureNoise(), FeatureDropout(), FeatureNoise(std=1))
    whole = changed(given, *parts)
    for start in range(0, 100, 13):
        rows = np.arange(start, min(start + 13, 100))
        some = changed({name: values[rows] for name, values in given.items()}, *parts, picks=rows)
        assert all(torch.equal(some[name].nan_to_num(-9), whole[name][rows].nan_to_num(-9)) for name in "ab")
