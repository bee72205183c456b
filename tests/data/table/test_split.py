"""Splits by a hash, by a group, by time and by a column: their shares, and that a row's split follows from the rows alone."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dlopt.artifact import Artifact
from dlopt.data.counter import row_keys
from dlopt.data.kinds import CategoryTarget, NumberInput
from dlopt.data.section import Data
from dlopt.data.table.split import Fold, GivenSplit, GroupSplit, RandomSplit, StratifiedSplit, TimeSplit, shares_of
from dlopt.part import DloptError
from tests.arranged import SPLITS, arranged, files_of, refused, rows_of, section_of, shuffled, splits_of

ROWS = np.random.default_rng(3).integers(0, 256, (20_000, 12), dtype=np.uint8)
START = datetime(2020, 1, 1)


def table_of(rows: int, first: int = 0) -> pa.Table:
    """Rows with a number of their own, one of five classes of different sizes, a group of about ten rows, a time, a split that is given."""
    number = np.arange(first, first + rows)
    random = np.random.default_rng(9).permutation(10**5)[number]  # the same for the same row, wherever it is
    return pa.table(
        {
            "id": number.astype(np.float64),
            "label": np.array(["a", "b", "c", "d", "e"])[np.minimum(number % 13, 4)],
            "group": [f"patient {value}" for value in random % max(rows // 10, 1)],
            "time": [START + timedelta(seconds=int(value)) for value in random],
            "day": [(START + timedelta(days=int(value % 50))).strftime("%d.%m.%Y") for value in random],
            "given": np.array(["fit", "fit", "fit", "look", "measure"])[random % 5],
        }
    )


TABLE = table_of(2000)
KINDS = [
    RandomSplit(seed=3),
    StratifiedSplit(train=0.6, validation=0.15, test=0.25),
    GroupSplit(column="group"),
    TimeSplit(column="time"),
    TimeSplit(column="day", form="%d.%m.%Y", train=0.5, validation=0.3, test=0.2),
    GivenSplit(column="given", names={"fit": "train", "look": "validation", "measure": "test"}),
]


def section(split: Any, **more: Any) -> Data:
    return section_of(NumberInput(columns=("id",)), target=CategoryTarget(), split=split, **more)


def made(split: Any, table: pa.Table, home: Path, blocks: int = 1, ranges: int = 1, **more: Any) -> Artifact:
    return arranged(section(split, **more), table, home, blocks=blocks, ranges=ranges)


def counts(found: dict[float, str]) -> dict[str, int]:
    return {name: list(found.values()).count(name) for name in SPLITS}


@pytest.mark.parametrize(("split", "ranges"), zip(KINDS, (4, 16, 4, 16, 4, 4), strict=True))
def test_the_same_row_falls_into_the_same_split_whatever_the_order_the_blocks_and_the_ranges(
    split: Any, ranges: int, tmp_path: Path
) -> None:
    first = made(split, TABLE, tmp_path / "first")
    assert len(splits_of(first)) == 2000
    again = made(split, shuffled(TABLE), tmp_path / "again", blocks=7)
    assert files_of(again) == files_of(first)
    many = made(split, shuffled(TABLE, seed=ranges), tmp_path / "many", blocks=3, ranges=ranges)
    assert len(list((many.path / "train").glob("*.parquet"))) == ranges
    assert splits_of(many) == splits_of(first) and many.info["labels"] == first.info["labels"]
    for name in SPLITS:
        mine, yours = rows_of(many, name), rows_of(first, name)
        assert all(np.array_equal(mine[column], yours[column]) for column in mine)


@pytest.mark.parametrize("split", [RandomSplit(), GroupSplit(column="group"), KINDS[-1]])
def test_a_row_stays_in_its_split_when_others_come_or_go(split: Any, tmp_path: Path) -> None:
    before = splits_of(made(split, TABLE, tmp_path / "before"))
    more = pa.concat_tables([table_of(700, first=2000).set_column(2, "group", [["someone else"] * 700]), TABLE])
    after = splits_of(made(split, more, tmp_path / "after"))
    assert {row: after[row] for row in before} == before and len(after) == 2700
    few = splits_of(made(split, TABLE.slice(100, 300), tmp_path / "few"))
    assert few == {row: before[row] for row in few} and len(few) == 300


def test_random_shares_are_met_within_chance(tmp_path: Path) -> None:
    split = RandomSplit(train=0.7, validation=0.2, test=0.1)
    position = split.position(row_keys([ROWS])[:, 0])
    found = np.bincount(np.searchsorted(split.edges(None), position, side="right"), minlength=3)
    for count, share in zip(found, (0.7, 0.2, 0.1), strict=True):
        assert abs(count - share * 20_000) < 4 * np.sqrt(20_000 * share * (1 - share))
    sizes = counts(splits_of(made(split, TABLE, tmp_path)))
    for name, share in zip(SPLITS, (0.7, 0.2, 0.1), strict=True):
        assert abs(sizes[name] - share * 2000) < 4 * np.sqrt(2000 * share * (1 - share))


def test_another_seed_is_another_split(tmp_path: Path) -> None:
    one, two = (splits_of(made(RandomSplit(seed=seed), TABLE, tmp_path / str(seed))) for seed in (0, 1))
    agree = np.mean([one[row] == two[row] for row in one])
    assert abs(agree - (0.8**2 + 2 * 0.1**2)) < 0.04  # as often as by chance


@pytest.mark.parametrize("split", [RandomSplit(group="content"), StratifiedSplit(group="content")])
def test_equal_rows_are_never_in_two_splits_where_copies_are_one_group(split: Any, tmp_path: Path) -> None:
    repeated = pa.concat_tables([TABLE.slice(0, 200)] * 10)
    data = made(split, repeated, tmp_path)
    ids = [set(rows_of(data, name)["numbers"][:, 0].tolist()) for name in SPLITS]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 200
    assert data.info["across"] == {"validation": 0, "test": 0}
    assert sum(data.info["counts"][name] for name in SPLITS) == 2000


@pytest.mark.parametrize("count", [1, 16])
def test_stratified_shares_are_exact_in_every_class(tmp_path: Path, count: int) -> None:
    labels = np.repeat(["a", "b", "c", "d"], [1000, 500, 30, 3])
    table = pa.table({"id": np.arange(1533.0), "label": labels})
    data = made(StratifiedSplit(), shuffled(table), tmp_path, ranges=count)
    assert data.info["labels"] == {
        "train": {"a": 800, "b": 400, "c": 24, "d": 1},
        "validation": {"a": 100, "b": 50, "c": 3, "d": 1},
        "test": {"a": 100, "b": 50, "c": 3, "d": 1},
    }


@pytest.mark.parametrize(("split", "sizes"), [((0.7, 0.3, 0), (1400, 600, 0)), ((0.7, 0, 0.3), (1400, 0, 600)), ((1, 0, 0), (2000, 0, 0))])
def test_a_split_without_a_share_is_empty(split: tuple[float, ...], sizes: tuple[int, ...], tmp_path: Path) -> None:
    shares = dict(zip(SPLITS, split, strict=True))
    for kind, slack in ((RandomSplit, 100), (StratifiedSplit, 3), (TimeSplit, 1), (GroupSplit, 200)):
        options = {"column": "time"} if kind is TimeSplit else {"column": "group"} if kind is GroupSplit else {}
        found = counts(splits_of(made(kind(**shares, **options), TABLE, tmp_path / kind.__name__)))
        for name, size in zip(SPLITS, sizes, strict=True):
            assert found[name] == 0 if size == 0 else abs(found[name] - size) <= slack


def test_a_class_too_small_for_its_splits_is_refused_by_name(tmp_path: Path) -> None:
    table = pa.table({"id": np.arange(21.0), "label": ["dog"] * 20 + ["cat"]})
    assert refused(section(StratifiedSplit()), table, tmp_path) == (
        "data.split: class 'cat' has 1 row(s), too few for 3 stratified splits: add rows, drop the class, or use kind: random"
    )


def test_a_group_is_never_in_two_splits(tmp_path: Path) -> None:
    found = splits_of(made(GroupSplit(column="group"), TABLE, tmp_path))
    group = dict(zip(TABLE["id"].to_pylist(), TABLE["group"].to_pylist(), strict=True))
    where: dict[str, set[str]] = {}
    for row, name in found.items():
        where.setdefault(group[row], set()).add(name)
    assert len(where) == 200 and all(len(names) == 1 for names in where.values())
    groups = Counter(next(iter(names)) for names in where.values())
    assert set(groups) == set(SPLITS) and abs(groups["train"] - 160) < 4 * np.sqrt(200 * 0.8 * 0.2)


def test_groups_are_compared_as_texts_and_a_row_without_one_is_set_aside(tmp_path: Path) -> None:
    numbers = pa.table({"id": np.arange(100.0), "label": ["a", "b"] * 50, "group": np.arange(100.0) // 5})
    texts = numbers.set_column(2, "group", [[str(row // 5) for row in range(100)]])
    split = GroupSplit(column="group", train=0.6, validation=0.2, test=0.2)
    assert splits_of(made(split, numbers, tmp_path / "numbers")) == splits_of(made(split, texts, tmp_path / "texts"))
    missing = numbers.set_column(2, "group", [[None, *range(99)]])
    data = made(split, missing, tmp_path / "missing")
    assert data.info["bad_reasons"] == {"group: no group to split by": 1} and 0.0 not in splits_of(data)


def test_the_earliest_rows_are_for_training_and_the_latest_for_testing(tmp_path: Path) -> None:
    found = splits_of(made(TimeSplit(column="time", train=0.7, validation=0.2, test=0.1), TABLE, tmp_path))
    order = [row for _, row in sorted(zip(TABLE["time"].to_pylist(), TABLE["id"].to_pylist(), strict=True))]
    names = [found[row] for row in order]
    assert names == ["train"] * 1400 + ["validation"] * 400 + ["test"] * 200


@pytest.mark.parametrize("form", ["text", "timestamp", "date", "number"])
def test_rows_of_one_moment_stay_together_and_times_may_be_of_any_type(form: str, tmp_path: Path) -> None:
    days = TABLE["day"].to_pylist()
    moments = [datetime.strptime(day, "%d.%m.%Y") for day in days]
    columns: dict[str, Any] = {
        "text": [moment.isoformat() for moment in moments],
        "timestamp": pa.array(moments, pa.timestamp("ms")),
        "date": pa.array([moment.date() for moment in moments]),
        "number": [moment.timestamp() for moment in moments],
    }
    table = pa.table({"id": TABLE["id"], "label": TABLE["label"], "when": columns[form]})
    found = splits_of(made(TimeSplit(column="when"), table, tmp_path))
    place = {name: {moments[int(row)] for row in found if found[row] == name} for name in SPLITS}
    assert max(place["train"]) < min(place["validation"]) <= max(place["validation"]) < min(place["test"])
    sizes = counts(found)
    for name, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True):
        assert abs(sizes[name] - share * 2000) <= 2000 / 50 + 1  # up to one day


def test_a_row_without_a_time_is_set_aside(tmp_path: Path) -> None:
    table = TABLE.select(["id", "label"]).append_column("day", [["soon", None, *TABLE["day"].to_pylist()[2:]]])
    data = made(TimeSplit(column="day", form="%d.%m.%Y"), table, tmp_path)
    assert data.info["bad_reasons"] == {"day: 'soon' is not a date such as %d.%m.%Y": 1, "day: no time to split by": 1}


def test_a_column_says_which_split_a_row_is_in(tmp_path: Path) -> None:
    found = splits_of(made(KINDS[-1], TABLE, tmp_path / "all"))
    name = {"fit": "train", "look": "validation", "measure": "test"}
    assert found == {row: name[given] for row, given in zip(TABLE["id"].to_pylist(), TABLE["given"].to_pylist(), strict=True)}
    some = TABLE.select(["id", "label"]).append_column("given", [[None, "?", *TABLE["given"].to_pylist()[2:]]])
    data = made(KINDS[-1], some, tmp_path / "some")
    assert data.info["bad_reasons"] == {"given: '' names no split": 1, "given: '?' names no split": 1}


def test_a_given_split_without_a_row_is_refused_with_its_column(tmp_path: Path) -> None:
    table = TABLE.set_column(5, "given", [["train", "test"] * 1000])
    line = refused(section(GivenSplit(column="given")), table, tmp_path / "default")
    assert line == "data.split: the validation split is empty: no row has 'validation' in column 'given': leave it out of split.names"
    made(GivenSplit(column="given", names={"train": "train", "test": "test"}), table, tmp_path / "named")


@pytest.mark.parametrize(
    "split",
    [RandomSplit(seed=1), StratifiedSplit(), GroupSplit(column="group"), RandomSplit(train=1, validation=0, test=0, seed=2)],
)
def test_every_row_that_is_not_for_testing_is_validated_on_once(split: Any, tmp_path: Path) -> None:
    folds = [splits_of(made(split, TABLE, tmp_path / str(index), fold=Fold(index=index, of=5))) for index in range(5)]
    tested = [{row for row in fold if fold[row] == "test"} for fold in folds]
    assert all(rows == tested[0] for rows in tested) and (len(tested[0]) > 100) == (split.test > 0)
    for row in folds[0].keys() - tested[0]:
        assert sorted(fold[row] for fold in folds) == ["train"] * 4 + ["validation"]
    sizes = [counts(fold)["validation"] for fold in folds]
    slack = {"random": 80, "stratified": 5, "group": 160}[split.kind]
    assert max(sizes) - min(sizes) <= slack


@pytest.mark.parametrize("split", [RandomSplit(seed=1), GroupSplit(column="group")])
def test_the_folds_test_on_the_rows_that_the_split_alone_tests_on(split: Any, tmp_path: Path) -> None:
    alone = splits_of(made(split, TABLE, tmp_path / "alone"))
    fold = splits_of(made(split, TABLE, tmp_path / "fold", fold=Fold(index=0, of=4)))
    assert {row for row in alone if alone[row] == "test"} == {row for row in fold if fold[row] == "test"}


def test_folds_of_a_class_with_too_few_rows_are_refused(tmp_path: Path) -> None:
    table = pa.table({"id": np.arange(44.0), "label": ["dog"] * 40 + ["cat"] * 4})
    line = refused(section(StratifiedSplit(), fold=Fold(index=0, of=5)), table, tmp_path)
    assert line.startswith("data.split: class 'cat' has 4 row(s), too few for 6 stratified splits: ")


@pytest.mark.parametrize("split", [TimeSplit(column="time"), GivenSplit(column="given")])
def test_times_and_given_splits_have_no_folds(split: Any) -> None:
    with pytest.raises(DloptError, match="folds need a split of kind random, stratified or group"):
        section(split, fold=Fold(index=0, of=3))
    with pytest.raises(DloptError, match="index 3 must be less than of, 3"):
        Fold(index=3, of=3)


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.1), (0.34, 0.33, 0.33), (0.98, 0.01, 0.01), (0.5, 0.5, 0.0), (0.01, 0.98, 0.01)])
def test_shares_of_rows_sum_up_and_leave_none_empty(shares: tuple[float, ...]) -> None:
    for rows in range(3, 200):
        found = shares_of(rows, shares)
        assert sum(found) == rows
        assert all((count > 0) == (share > 0) for count, share in zip(found, shares, strict=True))
        off = [abs(count - max(rows * share, 1)) for count, share in zip(found, shares, strict=True)]
        *others, largest = sorted(off)
        assert max(others) <= 0.5 and largest < 2  # but for rounding, and the largest share takes the rest


def test_shares_that_do_not_sum_to_one_are_refused() -> None:
    with pytest.raises(DloptError, match=r"sum to 1\.1: make them sum to 1"):
        RandomSplit(train=0.9, validation=0.1, test=0.1)


def test_a_ranks_error_is_that_of_its_class() -> None:
    with pytest.raises(DloptError, match="class 7 has 2 row"):
        StratifiedSplit().wanted(7, 2, None)
