"""Tables whose rows repeat: their splits are as unbiased as scikit-learn's, exact, and independent of how rows came; and only copies that
chance would not make are called a leak."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import OrdinalEncoder
from sklearn.tree import DecisionTreeClassifier

from dlopt.data.kinds import CategoryInput, CategoryTarget, NumberInput, TextInput
from dlopt.data.prepare import _edges
from dlopt.data.rows import first_plan, in_files
from dlopt.data.section import Data
from dlopt.data.table.over import Ranges, one_by_one
from dlopt.data.table.plan import Plan
from dlopt.data.table.spill import TARGET, Read, Spill, from_json
from dlopt.data.table.split import Fold, RandomSplit, StratifiedSplit
from dlopt.data.types.tensors import piece_column
from dlopt.progress import silent
from tests.arranged import SPLITS, arranged, rows_of, section_of, shuffled

RANDOM = np.random.default_rng(5)
SEEDS = range(8)


def noisy(label: np.ndarray, right: float, classes: int = 2) -> np.ndarray:
    """Labels, of which a share stays as it is and the rest are anything."""
    return np.where(RANDOM.random(len(label)) < right, label, RANDOM.integers(0, classes, len(label)))


def shop() -> dict[str, np.ndarray]:
    product = RANDOM.integers(0, 150, 3000)
    return {"product": product, "label": noisy(product % 2, 0.6)}


def survey() -> dict[str, np.ndarray]:
    answers = RANDOM.integers(1, 5, (1500, 4))
    names = {f"question {index}": answers[:, index] for index in range(4)}
    return names | {"label": noisy(answers.sum(axis=1) > 10, 0.7).astype(int)}


def skewed() -> dict[str, np.ndarray]:
    page = np.minimum(RANDOM.geometric(0.02, 2000), 400)
    return {"page": page, "hour": RANDOM.integers(0, 3, 2000), "label": noisy(page % 3, 0.5, 3)}


def rare() -> dict[str, np.ndarray]:
    code = RANDOM.integers(0, 60, 2500)
    return {"code": code, "label": (RANDOM.random(2500) < np.where(code < 10, 0.6, 0.02)).astype(int)}


def coin() -> dict[str, np.ndarray]:
    return {"side": RANDOM.integers(0, 30, 1500), "label": RANDOM.integers(0, 2, 1500)}


TABLES = {make.__name__: pa.table(make()) for make in (shop, survey, skewed, rare, coin)}


def section(table: pa.Table, split: Any, **more: Any) -> Data:
    names = tuple(name for name in table.column_names if name != "label")
    return section_of(CategoryInput(columns=names), target=CategoryTarget(), split=split, **more)


def spilled(table: pa.Table, data: Data, folder: Path) -> Plan:
    features = tuple(part.feature(table) for part in data.inputs)
    spill = Spill(data, features, data.target.whole(table), str(folder))
    read = {"source": Read.of(from_json(row) for found in spill(table) for row in found["piece"])}
    return in_files(first_plan(data, features, read), read, folder, Ranges(0, one_by_one, silent))


def cut(plan: Plan, split: Any, **more: Any) -> dict[str, pa.Table]:
    """The rows of each split, as the first pass has read them."""
    plan = replace(plan, section=plan.section.model_copy(update={"split": split, **more}))
    plan = replace(plan, edges=_edges(plan, Ranges(0, one_by_one, silent)))
    found = plan.select(0, [*(piece_column(feature.name, column) for feature in plan.features for column in feature.columns), TARGET])
    return {name: found.of(index) for index, name in enumerate(SPLITS)}


def accuracy(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> float:
    encoder = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1).fit(train[0])
    tree = DecisionTreeClassifier(random_state=0).fit(encoder.transform(train[0]), train[1])
    return float(tree.score(encoder.transform(test[0]), test[1]))


def as_arrays(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    inputs = [table[name].to_numpy() for name in table.column_names if name not in ("label", TARGET)]
    return np.stack(inputs, axis=1).astype(str), table[TARGET if TARGET in table.column_names else "label"].to_numpy()


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("kind", [RandomSplit, StratifiedSplit])
def test_splits_of_tables_with_few_distinct_rows_score_as_scikit_learns(kind: Any, name: str, tmp_path: Path) -> None:
    table = TABLES[name]
    plan = spilled(table, section(table, kind()), tmp_path)
    ours: dict[str, list[float]] = {"validation": [], "test": []}
    theirs = []
    for seed in SEEDS:
        parts = {which: as_arrays(rows) for which, rows in cut(plan, kind(seed=seed)).items()}
        for which, scores in ours.items():
            scores.append(accuracy(parts["train"], parts[which]))
        inputs, label = as_arrays(table)
        stratify = label if kind is StratifiedSplit else None
        left, right, wanted, truth = train_test_split(inputs, label, test_size=0.1, random_state=seed, stratify=stratify)
        theirs.append(accuracy((left[: int(0.8 * len(label))], wanted[: int(0.8 * len(label))]), (right, truth)))
    for scores in ours.values():
        error = np.sqrt((np.var(scores, ddof=1) + np.var(theirs, ddof=1)) / len(SEEDS))
        assert abs(np.mean(scores) - np.mean(theirs)) < 3.5 * error, (scores, theirs)


@pytest.mark.parametrize("ranges", [1, 4])
def test_shares_of_repeated_rows_are_exact_whatever_the_order_the_blocks_and_the_ranges(ranges: int, tmp_path: Path) -> None:
    table = pa.table({"word": ["a", "a", "b", "c"] * 50, "label": ["x", "y", "x", "y"] * 50})
    data = section(table, StratifiedSplit())
    first = arranged(data, table, tmp_path / "first")
    again = arranged(data, shuffled(table), tmp_path / "again", blocks=5, ranges=ranges)
    for made in (first, again):
        assert made.info["labels"] == {"train": {"x": 80, "y": 80}, "validation": {"x": 10, "y": 10}, "test": {"x": 10, "y": 10}}
    for name in SPLITS:
        mine, yours = (rows_of(made, name) for made in (first, again))
        pairs = [Counter(zip(rows["categories"][:, 0].tolist(), rows["label"].tolist(), strict=True)) for rows in (mine, yours)]
        assert pairs[0] == pairs[1] and (name != "train" or len(pairs[0]) == 4)


@pytest.mark.parametrize("kind", [RandomSplit, StratifiedSplit])
def test_copies_are_kept_together_where_a_job_says_so(kind: Any, tmp_path: Path) -> None:
    table = pa.table({"number": np.repeat(np.arange(200.0), 10), "label": np.repeat(["a", "b"] * 100, 10)})
    for group in (None, "content"):
        data = arranged(section_of(NumberInput(columns=("number",)), split=kind(group=group)), table, tmp_path / str(group))
        found = [set(rows_of(data, name)["numbers"][:, 0].tolist()) for name in SPLITS]
        assert (sum(map(len, found)) == 200) == (group == "content")
        assert sum(data.info["counts"][name] for name in SPLITS) == 2000


def test_the_first_of_several_copies_stays_where_it_was_without_the_others(tmp_path: Path) -> None:
    alone = pa.table({"word": [f"word {number}" for number in range(400)], "label": ["a", "b"] * 200})
    one, twice = (
        spilled(table, section(table, RandomSplit()), tmp_path / name)
        for name, table in {"one": alone, "twice": pa.concat_tables([alone, alone.slice(0, 100)])}.items()
    )
    before, after = (cut(plan, RandomSplit()) for plan in (one, twice))
    for name in SPLITS:
        words = [Counter(rows[piece_column("categories", "word")].to_pylist()) for rows in (before[name], after[name])]
        assert words[0] <= words[1]
    assert sum(len(rows) for rows in after.values()) == 500


def test_a_small_set_of_few_rows_is_not_refused_and_its_folds_are_even(tmp_path: Path) -> None:
    table = pa.table({"word": ["a", "b"] * 20, "label": ["x", "y"] * 20})
    counts = arranged(section(table, StratifiedSplit()), table, tmp_path / "small").info["counts"]
    assert {name: counts[name] for name in SPLITS} == {"train": 32, "validation": 4, "test": 4}
    plan = spilled(TABLES["shop"], section(TABLES["shop"], StratifiedSplit()), tmp_path / "folds")
    scores = []
    for index in range(4):
        parts = {name: as_arrays(rows) for name, rows in cut(plan, StratifiedSplit(), fold=Fold(index=index, of=4)).items()}
        scores.append(accuracy(parts["train"], parts["validation"]))
        assert abs(len(parts["validation"][0]) - 675) <= 2
    assert min(scores) > 0.72


def warned(data: Any) -> list[str]:
    return [line for line in data.info["warnings"] if "in train as well" in line]


@pytest.mark.parametrize("name", ["shop", "survey", "coin"])
def test_rows_that_repeat_because_there_are_few_are_no_leak(name: str, tmp_path: Path) -> None:
    table = TABLES[name]
    test = table.slice(0, len(table) // 5)
    data = arranged(section(table, RandomSplit()), table, tmp_path / "one")
    assert data.info["across"]["test"] > 0 and not warned(data)
    apart = RandomSplit(train=0.9, validation=0.1, test=0)
    data = arranged(section(table, apart, test={"kind": "parquet", "path": "x"}), table.slice(len(test)), tmp_path / "two", test=test)
    assert data.info["across"]["test"] > 0 and not warned(data)


def test_copies_of_rows_that_chance_does_not_repeat_are_a_leak(tmp_path: Path) -> None:
    numbers = np.random.default_rng(6).normal(size=(800, 5))
    label = (numbers[:, 0] > 0).astype(int)
    rich = pa.table({**{f"n{index}": numbers[:, index] for index in range(5)}, "label": label})
    inputs = NumberInput(columns=tuple(f"n{index}" for index in range(5)))
    assert not warned(arranged(section_of(inputs), rich, tmp_path / "apart"))
    data = arranged(section_of(inputs), pa.concat_tables([rich, rich.slice(0, 60)]), tmp_path / "copied")
    assert len(warned(data)) == 2 and "`group: content`" in warned(data)[0]
    together = section_of(inputs, split=RandomSplit(group="content"))
    assert not warned(arranged(together, pa.concat_tables([rich, rich.slice(0, 60)]), tmp_path / "together"))
    texts = pa.table({"text": [f"message {number} of {number % 7}" for number in range(600)], "label": ["a", "b"] * 300})
    data = arranged(section_of(TextInput(column="text")), pa.concat_tables([texts, texts.slice(0, 30)]), tmp_path / "texts")
    assert warned(data)


def test_a_test_file_that_holds_rows_of_the_training_file_is_a_leak_even_of_one_column(tmp_path: Path) -> None:
    table = pa.table({"number": np.arange(500.0), "label": ["a", "b"] * 250})
    split = RandomSplit(train=0.9, validation=0.1, test=0)
    data = section_of(NumberInput(columns=("number",)), split=split, test={"kind": "parquet", "path": "x"})
    (line,) = warned(arranged(data, table, tmp_path, test=table.slice(0, 40)))
    assert line.startswith("test: ") and "of its rows" in line
