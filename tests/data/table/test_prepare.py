"""The prepare stage: what comes out of sets with planted faults, whatever order and blocks they come in, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dlopt.artifact import Artifact, once
from dlopt.data import prepare as stage
from dlopt.data import rows as reading
from dlopt.data.clean import (
    Allowed,
    DropColumns,
    DropDuplicates,
    DropMissing,
    Length,
    NearDuplicateImages,
    NearDuplicateTexts,
    Outliers,
    Range,
    Unique,
)
from dlopt.data.kinds import (
    CategoryInput,
    CategoryTarget,
    DateInput,
    ImageInput,
    MultiLabelTarget,
    NumberInput,
    NumberTarget,
    TextInput,
)
from dlopt.data.kinds.number import GroupMedian
from dlopt.data.prepare import PREPARE
from dlopt.data.prepared import Split
from dlopt.data.section import Data
from dlopt.data.sources import Csv, Images, Parquet, Sample
from dlopt.data.table.spill import Read, Spill, from_json
from dlopt.data.table.split import GivenSplit, GroupSplit, RandomSplit, StratifiedSplit, TimeSplit
from dlopt.part import DloptError
from tests.arranged import (
    SPLITS,
    arranged,
    feature_of,
    files_of,
    quarantine_of,
    refused,
    rows_of,
    section_of,
    shuffled,
    signature_of,
    splits_of,
    statistics_of,
)
from tests.cases import few
from tests.planted import CLEAN, LABELS, REASONS, Planted
from tests.planted import planted as planted_faults

NO_TEST = RandomSplit(train=0.8, validation=0.2, test=0)
ID = NumberInput(columns=("id",), name="ids")
"""Names each row, so that it can be found again."""
RANDOM = np.random.default_rng(12)


def png(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def digits(rows: int, seed: int = 0) -> tuple[list[bytes], np.ndarray, list[int]]:
    """Encoded random images of 6x5, their pixels, and labels 0 to 2."""
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, 6, 5), dtype=np.uint8)
    return [png(one) for one in pixels], pixels, [row % 3 for row in range(rows)]


def write(folder: Path, table: pa.Table, files: int = 1) -> Parquet:
    folder.mkdir(parents=True)
    bounds = np.linspace(0, len(table), files + 1).astype(int)
    for number, (start, stop) in enumerate(pairwise(bounds)):
        pq.write_table(table.slice(start, stop - start), folder / f"{number}.parquet", row_group_size=max(1, (stop - start) // 3))
    return Parquet(path=str(folder))


def images(source: Any, **more: Any) -> Data:
    return Data(source=source, inputs=(ImageInput(),), target=CategoryTarget(), **more)


def table_of(columns: tuple[str, ...], **more: Any) -> Data:
    return Data(inputs=(NumberInput(columns=columns),), target=CategoryTarget(), **more)


def prepared(section: Data, home: Path) -> Artifact:
    """By Ray."""
    return once(PREPARE, section, home, found=[source.found() for source in reading.sources(section).values()])


def refused_by_ray(section: Data, home: Path) -> str:
    with pytest.raises(DloptError) as error:
        prepared(section, home)
    assert not list(home.rglob("manifest.json"))
    assert "\n" not in str(error.value)
    return str(error.value)


def without_seconds(data: Artifact) -> dict[str, Any]:
    return {name: value for name, value in data.info.items() if name != "seconds"}


def ids_of(data: Artifact) -> list[float]:
    """Of all rows that were kept."""
    return sorted(value for name in SPLITS for value in rows_of(data, name)["ids"][:, 0].tolist())


def set_aside(data: Artifact) -> dict[float, str]:
    """The reason for each row that was set aside."""
    return {row["id"]: row["reason"] for row in quarantine_of(data)}


# Planted faults in images


@pytest.fixture(scope="module")
def planted() -> tuple[pa.Table, np.ndarray]:
    """600 good rows, 20 of them twice and one five times; 3 broken images, 2 that are none, 2 rows without a label."""
    data, pixels, labels = digits(600)
    rows: list[tuple[bytes | None, int | None]] = list(zip(data, labels, strict=True))
    rows += rows[:20] + rows[30:31] * 4
    rows += [(b"nonsense", 1), (b"nonsense", 1), (data[0][:50], 2), (None, 0), (None, 0), (data[1], None), (None, None)]
    return pa.table({"image": [row[0] for row in rows], "label": pa.array([row[1] for row in rows], pa.int32())}), pixels


PLANTED = section_of(ImageInput(), clean=[DropDuplicates()], most_bad=0.02, split=StratifiedSplit())


@pytest.fixture(scope="module")
def first(planted: tuple[pa.Table, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return arranged(PLANTED, planted[0], tmp_path_factory.mktemp("planted"))


def test_planted_faults_are_counted_exactly(first: Artifact) -> None:
    counts = {"read": 631, "bad": 7, "dropped": 24, "duplicates": 24, "train": 480, "validation": 60, "test": 60}
    assert first.info["counts"] == counts
    assert first.info["cleaning"] == [{"kind": "drop_duplicates", "title": "drop_duplicates", "dropped": 24}]
    assert first.info["labels"] == {
        "train": {"0": 160, "1": 160, "2": 160},
        "validation": {"0": 20, "1": 20, "2": 20},
        "test": {"0": 20, "1": 20, "2": 20},
    }


def test_bad_rows_are_kept_as_they_were_read_with_their_reason(first: Artifact, planted: tuple[pa.Table, np.ndarray]) -> None:
    bad = [row for row in quarantine_of(first) if row["reason"] != "drop_duplicates"]
    expected = planted[0].slice(624).to_pylist()
    assert Counter(str({name: row[name] for name in ("image", "label")}) for row in bad) == Counter(map(str, expected))
    for row in bad:
        begin = "no image" if row["image"] is None else "label: no label" if row["label"] is None else "not an image: "
        assert row["reason"].startswith(begin)
    assert first.info["bad_reasons"] == dict(Counter(row["reason"] for row in bad))


def test_dropped_images_can_be_looked_at(first: Artifact, planted: tuple[pa.Table, np.ndarray]) -> None:
    found = [row for row in quarantine_of(first) if row["reason"] == "drop_duplicates"]
    pixels = Counter(np.asarray(Image.open(io.BytesIO(row["image"]))).tobytes() for row in found)
    assert pixels == Counter([planted[1][row].tobytes() for row in [*range(20), *[30] * 4]])


def test_every_good_row_is_in_one_split_once(first: Artifact, planted: tuple[pa.Table, np.ndarray]) -> None:
    found = {name: rows_of(first, name) for name in SPLITS}
    pixels = np.concatenate([rows["image"] for rows in found.values()])[..., 0]
    labels = np.concatenate([rows["label"] for rows in found.values()])
    expected = {planted[1][row].tobytes(): row % 3 for row in range(600)}
    assert {one.tobytes(): int(label) for one, label in zip(pixels, labels, strict=True)} == expected
    assert len(pixels) == 600


def test_statistics_are_of_the_training_rows(first: Artifact) -> None:
    pixels = rows_of(first, "train")["image"].astype(np.float64)
    found = statistics_of(first, "image")
    assert (found.count, found.min, found.max) == (480 * 30, (pixels.min(),), (pixels.max(),))
    assert np.allclose([found.mean[0], found.std[0]], [pixels.mean(), pixels.std()], rtol=1e-9)


def test_without_a_profile_the_rows_are_the_same_and_leaks_are_still_said(tmp_path: Path) -> None:
    random = np.random.default_rng(5).random((200, 4))
    table = pa.table({**{f"x{column}": random[np.arange(400) % 200, column] for column in range(4)}, "label": ["a", "b"] * 200})
    section = section_of(NumberInput(columns=("x0", "x1", "x2", "x3")))
    with_it, without = (arranged(section.model_copy(update={"profile": wanted}), table, tmp_path) for wanted in (True, False))
    assert {name: digest for name, digest in files_of(with_it).items() if name != "profile.json"} == files_of(without)
    assert "profile.json" in files_of(with_it)
    for made in (with_it, without):
        assert [line.partition(":")[0] for line in made.info["warnings"] if "are in train as well" in line] == ["validation", "test"]


@pytest.mark.parametrize("ranges", [2, 8])
def test_many_ranges_hold_the_rows_that_one_holds(
    first: Artifact, planted: tuple[pa.Table, np.ndarray], ranges: int, tmp_path: Path
) -> None:
    made = arranged(PLANTED, shuffled(planted[0]), tmp_path, blocks=5, ranges=ranges)
    assert [file.name for file in sorted((made.path / "train").glob("*"))] == [f"part-{number:05d}.parquet" for number in range(ranges)]
    for name in SPLITS:
        one, many = rows_of(first, name), rows_of(made, name)
        assert all((one[column] == many[column]).all() for column in one)
    assert without_seconds(made) == without_seconds(first)
    one, many = (json.loads(data.read("statistics.json"))["image"] for data in (first, made))
    assert all(np.allclose(one[name], many[name], rtol=1e-12) for name in ("count", "min", "max", "mean", "std", "shift", "scale"))


def test_a_block_of_bad_rows_only_is_set_aside(tmp_path: Path) -> None:
    data, _, labels = digits(60)
    table = pa.table({"image": data + [b""] * 20, "label": labels + [0] * 20})
    made = arranged(section_of(ImageInput(), most_bad=0.5), table, tmp_path, blocks=4)
    assert made.info["counts"]["bad"] == len(quarantine_of(made)) == 20


# A table of all kinds, with all kinds of cleaning


WORDS = ["free", "entry", "call", "now", "prize", "text", "to", "win", "meet", "me", "at", "nine", "late", "home", "love", "tea"]


def rich_table(rows: int = 900) -> pa.Table:
    """Rows of all kinds of columns; a tenth are copies of others, exact or with one word more; some are broken."""
    random = np.random.default_rng(21)
    start = datetime(2024, 1, 1)
    table = pa.table(
        {
            "id": np.arange(float(rows)),
            "x": pa.array(np.where(random.random(rows) < 0.02, 1e4, random.normal(10, 3, rows)), mask=random.random(rows) < 0.1),
            "y": pa.array(random.exponential(5, rows), mask=random.random(rows) < 0.2),
            "empty": pa.array([None] * rows, pa.float64()),
            "carrier": pa.array(random.choice(["UA", "AA", "DL", "ü"], rows), mask=random.random(rows) < 0.1),
            "code": random.integers(0, 40, rows),
            "day": [(start + timedelta(hours=int(hour))).isoformat() for hour in random.integers(0, 9000, rows)],
            "title": [" ".join(random.choice(WORDS, 14)) for _ in range(rows)],
            "label": random.choice(["no", "yes"], rows, p=[0.7, 0.3]),
        }
    )
    again = table.slice(0, rows // 20)
    near = table.slice(rows // 2, rows // 20)
    near = near.set_column(7, "title", [[f"{title}!" for title in near["title"].to_pylist()]])
    near = near.set_column(0, "id", [near["id"].to_numpy() + 0.5])
    broken = table.slice(rows // 3, 5).set_column(6, "day", [["soon"] * 5]).set_column(0, "id", [np.arange(5) - 5.0])
    return pa.concat_tables([table, again, near, broken])


RICH = rich_table()


def rich(split: Any, **more: Any) -> Data:
    inputs = (
        ID,
        NumberInput(columns=("x", "y", "empty"), fill=GroupMedian(by="carrier"), normalize="robust", indicators=True),
        CategoryInput(columns=("carrier", "code"), min_count=2),
        DateInput(columns=("day",)),
        TextInput(column="title", max_length=20),
    )
    clean = [
        Range(columns=("y",), max=40),
        DropDuplicates(),
        NearDuplicateTexts(columns=("title",), threshold=0.7),
        DropColumns(share=0.9),
        Outliers(columns=("x",)),
    ]
    return section_of(*inputs, clean=clean, split=split, **more)


@pytest.mark.parametrize("split", few(2, [StratifiedSplit(), TimeSplit(column="day"), RandomSplit(), GroupSplit(column="code")]))
def test_the_artifact_follows_from_the_rows_alone(split: Any, tmp_path: Path) -> None:
    section = rich(split, most_bad=0.2)
    one = arranged(section, RICH, tmp_path / "one")
    assert files_of(arranged(section, shuffled(RICH), tmp_path / "blocks", blocks=9)) == files_of(one)
    assert [cleaning["dropped"] > 0 for cleaning in one.info["cleaning"]] == [True, True, True, False, True]
    assert one.info["left_out"] == ["empty"] and feature_of(one, "numbers").columns == ("x", "y")
    many = [arranged(section, shuffled(RICH, seed), tmp_path / f"{seed}", blocks=seed, ranges=4) for seed in (1, 6)]
    assert files_of(many[0]) == files_of(many[1])
    assert without_seconds(many[0]) == without_seconds(many[1]) == without_seconds(one)
    assert signature_of(many[0]) == signature_of(one)
    for name in SPLITS:
        mine, yours = rows_of(many[0], name), rows_of(one, name)
        assert all(np.array_equal(mine[column], yours[column], equal_nan=mine[column].dtype == np.float32) for column in mine)
    for name in ("numbers", "ids", "dates"):
        mine, yours = statistics_of(many[0], name), statistics_of(one, name)
        assert mine.count == yours.count and np.allclose(mine.mean, yours.mean, rtol=1e-12) and np.allclose(mine.std, yours.std, rtol=1e-12)
        assert np.allclose(mine.fill, yours.fill) and np.allclose(mine.shift, yours.shift) and np.allclose(mine.scale, yours.scale)


def test_all_statistics_are_numpys_of_the_training_rows(tmp_path: Path) -> None:
    made = arranged(rich(RandomSplit(), most_bad=0.2), RICH, tmp_path, ranges=4)
    rows = rows_of(made, "train")
    values = rows["numbers"].astype(np.float64)
    found = statistics_of(made)
    assert found.count == len(values) == made.info["counts"]["train"]
    assert np.allclose(found.mean, np.nanmean(values, axis=0), rtol=1e-9) and np.allclose(found.std, np.nanstd(values, axis=0), rtol=1e-9)
    low, high = np.nanquantile(values, [0.25, 0.75], axis=0)
    assert np.allclose(found.shift, np.nanmedian(values, axis=0), rtol=1e-9) and np.allclose(found.scale, 1 / (high - low), rtol=1e-9)
    codes = rows["categories"][:, 0]
    for code in range(1, feature_of(made, "categories").codes[0]):
        assert np.allclose(found.group_fill[code], np.nanmedian(values[codes == code], axis=0), rtol=1e-9)
    assert np.allclose(found.group_fill[0], np.nanmedian(values, axis=0), rtol=1e-9)
    days = rows["dates"].astype(np.float64)
    assert np.allclose(statistics_of(made, "dates").mean, days.mean(axis=0), rtol=1e-9)


def test_test_rows_move_nothing_that_is_fitted(tmp_path: Path) -> None:
    split = GivenSplit(column="split")
    names = RANDOM.choice(SPLITS, len(RICH), p=[0.6, 0.2, 0.2])
    table = RICH.append_column("split", pa.array(names))
    other = table.set_column(2, "y", [np.where(names == "train", table["y"].to_numpy(), 39.0)])
    other = other.set_column(5, "code", [np.where(names == "train", table["code"].to_numpy(), 7)])
    other = other.set_column(7, "title", [np.where(names == "train", np.array(table["title"].to_pylist()), "other words other words")])
    section = section_of(
        *rich(split).inputs[:2], *rich(split).inputs[2:], clean=[Outliers(columns=("y",), action="cap")], split=split, most_bad=1
    )
    one, two = arranged(section, table, tmp_path / "one"), arranged(section, other, tmp_path / "two")
    assert one.read("statistics.json") == two.read("statistics.json") and one.read("signature.json") == two.read("signature.json")
    assert (rows_of(one, "train")["text"] == rows_of(two, "train")["text"]).all()
    assert not (rows_of(one, "test")["text"] == rows_of(two, "test")["text"]).all()


# Cleaning


@pytest.fixture(params=[1, 4], ids=["one range", "four ranges"])
def ranges(request: pytest.FixtureRequest) -> Iterator[int]:
    yield request.param


def numbered(rows: int = 400, **columns: Any) -> pa.Table:
    return pa.table({"id": np.arange(float(rows)), "label": ["a", "b"] * (rows // 2)} | columns)


def cleaned(home: Path, table: pa.Table, *clean: Any, ranges: int = 1, inputs: Any = (ID,), **more: Any) -> Artifact:
    made = arranged(section_of(*inputs, clean=clean, **more), table, home, ranges=ranges)
    again = arranged(section_of(*inputs, clean=clean, **more), shuffled(table), home / "again", ranges=ranges, blocks=4)
    assert files_of(made) == files_of(again) and without_seconds(made) == without_seconds(again)
    return made


def dropped(data: Artifact) -> list[int]:
    found = [cleaning["dropped"] for cleaning in data.info["cleaning"]]
    assert sum(found) == data.info["counts"]["dropped"]
    return found


def test_duplicates_stay_when_no_one_asks_to_drop_them(ranges: int, tmp_path: Path) -> None:
    table = pa.table({"id": [1.0, 2.0] * 50 + [float(row) for row in range(3, 100)], "label": ["a", "b"] * 50 + ["a"] * 97})
    data = cleaned(tmp_path, table, ranges=ranges)
    assert data.info["counts"]["duplicates"] == 0 and len(ids_of(data)) == 197
    assert sum(int((rows_of(data, name)["ids"] == 1).sum()) for name in SPLITS) == 50


def test_of_rows_that_agree_in_chosen_columns_the_last_by_a_date_stays(ranges: int, tmp_path: Path) -> None:
    when = [(datetime(2026, 1, 1) + timedelta(days=int(day))).isoformat() for day in RANDOM.permutation(400)]
    table = numbered(key=[f"k{row % 250}" for row in range(400)], when=[None if row == 3 else day for row, day in enumerate(when)])
    data = cleaned(tmp_path, table, DropDuplicates(columns=("key",), order_by="when", keep="last"), ranges=ranges)
    stay = {row if row >= 150 else row if row != 3 and when[row] > when[row + 250] else row + 250 for row in range(250)}
    assert ids_of(data) == sorted(map(float, stay)) and dropped(data) == [150]
    assert set(set_aside(data).values()) == {"drop_duplicates of key"}
    assert sorted(set_aside(data)) == sorted(set(map(float, range(400))) - set(map(float, stay)))


@pytest.mark.parametrize("keep", ["first", "last"])
def test_of_rows_that_are_equal_in_all_the_first_by_a_column_stays(keep: Any, ranges: int, tmp_path: Path) -> None:
    table = numbered(version=np.arange(400))
    table = pa.concat_tables([table, table.slice(0, 100).set_column(2, "version", [np.arange(1000, 1100)])])
    split = TimeSplit(column="version")
    data = cleaned(tmp_path, table, DropDuplicates(order_by="version", keep=keep), ranges=ranges, split=split)
    assert dropped(data) == [100] and ids_of(data) == [float(row) for row in range(400)]
    found = splits_of(data, "ids")
    latest = {row for row in found if found[row] == "test"}
    assert latest == (set(map(float, range(360, 400))) if keep == "first" else set(map(float, range(60, 100))))


def test_which_of_two_rows_stays_follows_from_them_even_where_only_their_split_differs(tmp_path: Path) -> None:
    table = pa.concat_tables([numbered(group=[f"{part} {row}" for row in range(400)], key=np.arange(400)) for part in "pq"])
    for number, clean in enumerate((DropDuplicates(columns=("key",)), Unique(columns=("key",)), DropDuplicates())):
        for split in (GroupSplit(column="group"), RandomSplit()):
            data = cleaned(tmp_path / f"{number}{split.kind}", table, clean, split=split)
            assert dropped(data) == [400]
            assert ids_of(data) == [float(row) for row in range(400)]


@pytest.mark.parametrize(("conflict", "lost"), [("keep_one", 1), ("drop_all", 2)])
def test_keys_that_should_be_unique_are_made_so(conflict: Any, lost: int, ranges: int, tmp_path: Path) -> None:
    table = numbered(key=[None, None, *range(348), *range(50)])
    data = cleaned(tmp_path, table, Unique(columns=("key",), conflict=conflict), ranges=ranges)
    assert dropped(data) == [50 * lost] and {0.0, 1.0} <= set(ids_of(data))
    assert set(set_aside(data)) <= {*map(float, range(2, 52)), *map(float, range(350, 400))}
    kept = set(ids_of(data))
    keys = Counter(row["key"] for row in table.to_pylist() if row["id"] in kept and row["key"] is not None)
    assert set(keys.values()) == {1}


def test_texts_that_are_nearly_equal_are_dropped(ranges: int, tmp_path: Path) -> None:
    titles = [" ".join(RANDOM.choice(WORDS, 20)) for _ in range(300)]
    titles += [title.upper() + " !" for title in titles[:100]]
    data = cleaned(tmp_path, numbered(title=titles), NearDuplicateTexts(columns=("title",)), ranges=ranges)
    assert dropped(data) == [100] and data.info["counts"]["duplicates"] == 100
    kept = set(ids_of(data))
    assert all((row in kept) != (row + 300 in kept) for row in map(float, range(100)))


def test_images_that_are_nearly_equal_are_dropped(tmp_path: Path) -> None:
    smooth = np.kron(RANDOM.integers(0, 200, (60, 8, 8)), np.ones((1, 4, 4))).astype(np.uint8)
    brighter = smooth[:20] + 1
    table = pa.table(
        {
            "image": [png(one) for one in np.concatenate([smooth, brighter])],
            "label": [row % 2 for row in range(60)] + [row % 2 for row in range(20)],
        }
    )
    data = cleaned(tmp_path, table, NearDuplicateImages(), inputs=(ImageInput(),), ranges=2)
    assert dropped(data) == [20] and sum(len(rows_of(data, name)["image"]) for name in SPLITS) == 60


def test_duplicates_of_different_sources_are_counted_and_stay(ranges: int, tmp_path: Path) -> None:
    table = numbered()
    test = pa.concat_tables([table.slice(0, 30), numbered(60).set_column(0, "id", [np.arange(1000.0, 1060.0)]), table.slice(0, 3)])
    for number, clean in enumerate((DropDuplicates(), DropDuplicates(columns=("id",)), Unique(columns=("id",)))):
        data = arranged(section_of(ID, clean=[clean], split=NO_TEST, test=PLACE), table, tmp_path / f"{number}", test=test, ranges=ranges)
        train = set(rows_of(data, "train")["ids"][:, 0].tolist())
        assert dropped(data) == [3] and data.info["counts"]["test"] == 90
        assert data.info["across"] == {"validation": 0, "test": len(train & set(map(float, range(30))))}


PLACE = Parquet(path="elsewhere")


def test_across_counts_rows_that_equal_one_of_train(ranges: int, tmp_path: Path) -> None:
    table = numbered(given=["train"] * 300 + ["validation"] * 40 + ["test"] * 60)
    table = table.set_column(0, "id", [np.arange(400.0) % 310]).set_column(1, "label", [["a", "b"] * 150 + ["a", "b"] * 50])
    data = cleaned(tmp_path, table, split=GivenSplit(column="given"), ranges=ranges)
    assert data.info["across"] == {"validation": 30, "test": 60}
    other = cleaned(tmp_path / "other", numbered(), ranges=ranges)
    assert other.info["across"] == {"validation": 0, "test": 0}


@pytest.mark.parametrize(
    "options", [{"method": "zscore", "factor": 2}, {"method": "iqr"}, {"method": "quantile", "low": 0.05, "high": 0.9}]
)
@pytest.mark.parametrize("action", ["drop", "cap", "missing"])
def test_outliers_are_found_by_the_training_rows(options: dict[str, Any], action: Any, ranges: int, tmp_path: Path) -> None:
    x = RANDOM.normal(5, 2, 400).astype(np.float32)
    x[:10] = [100, -100, 50, 40, -30, 30, 25, 20, -20, 18]
    table = numbered(x=pa.array(x, mask=np.arange(400) % 11 == 10))
    clean = Outliers(columns=("x",), action=action, **options)
    inputs = (ID, NumberInput(columns=("x",), fill="median"))
    data = cleaned(tmp_path, table, clean, ranges=ranges, inputs=inputs)
    places = splits_of(arranged(section_of(*inputs), table, tmp_path / "plain"), "ids")
    values = np.where(np.arange(400) % 11 == 10, np.nan, x).astype(np.float64)
    train = np.array([values[int(row)] for row, name in sorted(places.items()) if name == "train"])
    q25, q75 = np.nanquantile(train, [0.25, 0.75])
    lower, upper = {
        "zscore": (np.nanmean(train) - 2 * np.nanstd(train), np.nanmean(train) + 2 * np.nanstd(train)),
        "iqr": (q25 - 1.5 * (q75 - q25), q75 + 1.5 * (q75 - q25)),
        "quantile": tuple(np.nanquantile(train, [0.05, 0.9])),
    }[options["method"]]
    outside = {float(row) for row in range(400) if values[row] < lower or values[row] > upper}
    assert len(outside) >= 8
    found = statistics_of(data)
    if action == "drop":
        assert set(set_aside(data)) == outside and dropped(data) == [len(outside)]
        assert set(set_aside(data).values()) == {clean.title}
        assert set(ids_of(data)) == set(map(float, range(400))) - outside and found.lower == ()
        kept = np.array([values[int(row)] for row, name in places.items() if name == "train" and row not in outside])
        assert np.allclose([found.mean[0], found.std[0]], [np.nanmean(kept), np.nanstd(kept)], rtol=1e-6)
        assert splits_of(data, "ids") == {row: name for row, name in places.items() if row not in outside}
    else:
        assert dropped(data) == [0] and len(ids_of(data)) == 400
        assert np.allclose([found.lower[0], found.upper[0]], [lower, upper], rtol=1e-6) and found.outside == action
        seen = train.clip(lower, upper) if action == "cap" else np.where((train < lower) | (train > upper), np.nan, train)
        assert np.allclose([found.mean[0], found.std[0], found.fill[0]], [np.nanmean(seen), np.nanstd(seen), np.nanmedian(seen)], rtol=1e-5)


def test_rules_set_rows_aside_as_they_were_read(ranges: int, tmp_path: Path) -> None:
    table = numbered(
        age=["-3" if row == 7 else "" if row == 8 else "old" if row == 9 else str(row % 90) for row in range(400)],
        state=["??" if row % 50 == 0 else "NY" for row in range(400)],
        note=["x" if row == 21 else "fine" for row in range(400)],
    )
    rules = (
        Range(columns=("age",), min=0),
        Allowed(columns=("state",), values=("NY", "CA")),
        DropMissing(columns=("age", "note")),
        Length(columns=("note",), min=2),
    )
    data = cleaned(tmp_path, table, *rules, ranges=ranges)
    expected = {7.0: "age: less than 0", 9.0: "age: not a number", 8.0: "age: missing", 21.0: "note: shorter than 2 characters"}
    expected |= {float(row): "state: not an allowed value" for row in range(0, 400, 50)}
    assert set_aside(data) == expected and dropped(data) == [2, 8, 1, 1]
    raw = {row["id"]: row for row in table.to_pylist()}
    assert all(row == raw[row["id"]] | {"reason": row["reason"]} for row in quarantine_of(data))
    assert data.info["counts"]["bad"] == 0 and len(ids_of(data)) == 388


def test_a_row_that_breaks_a_rule_is_not_counted_as_bad_as_well(tmp_path: Path) -> None:
    table = numbered(x=["far" if row < 4 else str(row) for row in range(400)])
    data = cleaned(tmp_path, table, Range(columns=("x",), min=0), inputs=(ID, NumberInput(columns=("x",))))
    assert (data.info["counts"]["bad"], dropped(data), data.info["bad_reasons"]) == (0, [4], {})


def test_columns_that_are_mostly_missing_are_left_out(ranges: int, tmp_path: Path) -> None:
    table = numbered(
        x=pa.array(np.arange(400.0), mask=np.arange(400) % 4 > 0),
        y=pa.array(np.arange(400.0), mask=np.arange(400) % 4 == 0),
        z=np.arange(400.0),
        tail=pa.array(["t", None, None, None] * 100),
        carrier=pa.array(["UA", None] * 200),
    )
    inputs = (ID, NumberInput(columns=("x", "y", "z")), CategoryInput(columns=("tail", "carrier")))
    data = cleaned(tmp_path, table, DropColumns(share=0.6), ranges=ranges, inputs=inputs)
    assert data.info["left_out"] == ["x", "tail"] and dropped(data) == [0]
    assert feature_of(data, "numbers").columns == ("y", "z") and feature_of(data, "categories").columns == ("carrier",)
    assert feature_of(data, "categories").vocabularies == (("", "UA"),) or feature_of(data, "categories").vocabularies == (("UA", ""),)
    rows = rows_of(data, "train")
    assert np.array_equal(rows["numbers"][:, 1], rows["ids"][:, 0]) and rows["categories"].shape == (len(rows["ids"]), 1)
    assert np.array_equal(np.isnan(rows["numbers"][:, 0]), rows["ids"][:, 0] % 4 == 0)


def test_an_input_whose_columns_are_all_left_out_is_gone(tmp_path: Path) -> None:
    table = numbered(x=pa.nulls(400, pa.float64()))
    inputs = (ID, NumberInput(columns=("x",)))
    data = cleaned(tmp_path, table, DropColumns(), Outliers(columns=("x", "id")), inputs=inputs)
    assert [feature.name for feature in signature_of(data).inputs] == ["ids"]
    line = refused(section_of(*inputs, clean=[DropColumns(most=0.4)]), table, tmp_path / "most")
    assert line == "data.clean: drop_columns would leave out 1 of 2 columns (x)"
    line = refused(section_of(inputs[1], clean=[DropColumns(most=1)]), table, tmp_path / "all")
    assert line == "data.clean: drop_columns would leave out every column: raise its share"


def test_a_text_stays_where_a_category_of_its_column_is_left_out(tmp_path: Path) -> None:
    table = numbered(title=[" ".join(WORDS) if row % 3 == 0 else None for row in range(400)])
    inputs = (ID, CategoryInput(columns=("title",)), TextInput(column="title", max_length=4))
    data = cleaned(tmp_path, table, DropColumns(share=0.6), inputs=inputs)
    assert [feature.name for feature in signature_of(data).inputs] == ["ids", "text"]
    rows = rows_of(data, "train")
    assert np.array_equal((rows["text"] > 0).all(axis=1), rows["ids"][:, 0] % 3 == 0)


def test_a_grouping_column_that_is_left_out_is_said(tmp_path: Path) -> None:
    table = numbered(x=np.arange(400.0), group=pa.array([None] * 399 + ["g"]))
    inputs = (ID, NumberInput(columns=("x",), fill=GroupMedian(by="group")), CategoryInput(columns=("group",)))
    line = refused(section_of(*inputs, clean=[DropColumns()]), table, tmp_path)
    assert (
        line == "data.clean: drop_columns would leave out 'group', which a fill of data.inputs goes by: raise its share or fill by another"
    )


def test_cleaning_in_several_steps_counts_each_row_once(ranges: int, tmp_path: Path) -> None:
    table = numbered(
        x=pa.array([1000.0 if row in (5, 6, 300) else float(row % 7) for row in range(400)]),
        key=[row % 390 for row in range(400)],
        y=[-1 if row in (6, 395) else 1 for row in range(400)],
    )
    clean = (Range(columns=("y",), min=0), Unique(columns=("key",)), Outliers(columns=("x",)), DropDuplicates())
    data = cleaned(tmp_path, table, *clean, ranges=ranges, inputs=(ID, NumberInput(columns=("x",))))
    # 6 and 395 break the rule; of the ten pairs of keys (0, 390) to (9, 399) those of 5 and 6 have one row left each
    assert dropped(data)[:2] == [2, 8] and dropped(data)[3] == 0
    assert dropped(data)[2] == 2 and {5.0, 300.0} <= set(set_aside(data))
    assert len(ids_of(data)) + len(quarantine_of(data)) == 400 and len(set(ids_of(data)) | set(set_aside(data))) == 400


def test_a_column_called_reason_is_kept_beside_the_reason(tmp_path: Path) -> None:
    table = numbered(
        reason=[row % 5 + (500.0 if row == 3 else 0.0) for row in range(400)], x=[str(row) if row != 9 else "?" for row in range(400)]
    )
    inputs = (ID, NumberInput(columns=("reason", "x")))
    data = cleaned(tmp_path, table, Outliers(columns=("reason",), method="zscore"), inputs=inputs)
    assert [(row["id"], row["reason"]) for row in quarantine_of(data) if "reason_" in row and row["reason_"].startswith("outliers")] == [
        (3.0, 503.0)
    ]
    assert [row["reason"] for row in quarantine_of(data) if row["reason_"].startswith("x:")] == [4.0]


# Planted faults of every kind


def judge_planted(faults: Planted, data: Artifact) -> None:
    """Exactly the planted rows are set aside, each with its reason, and the others are as they were, to the bit."""
    kinds = {row: kind for kind, rows in faults.faults.items() for row in rows}
    twins = Counter(faults.pixels[row].tobytes() for row in faults.faults["duplicate"])
    found: Counter[str] = Counter()
    for row in quarantine_of(data):
        if row["reason"] == "drop_duplicates":
            pixels = np.asarray(Image.open(io.BytesIO(row["image"])))
            assert twins[pixels.tobytes()] == 1 and row["label"] in LABELS
            twins[pixels.tobytes()] -= 1
            found["duplicate"] += 1
        else:
            assert re.search(REASONS[kinds[row["id"]]], row["reason"]), row
            found[kinds.pop(row["id"])] += 1  # which fails for a row that is set aside twice
    assert found == {kind: len(rows) for kind, rows in faults.faults.items()}
    labels = signature_of(data).target.labels
    by_pixels = {faults.pixels[row].tobytes(): row for row in faults.good}
    kept = []
    for name in SPLITS:
        rows = rows_of(data, name)
        ids = [by_pixels[pixels.tobytes()] for pixels in rows["image"]]
        assert np.array_equal(rows["numbers"][:, 0], faults.amounts[ids]) and rows["numbers"].dtype == np.float32
        assert np.array_equal(rows["numbers"][:, 1].view(np.uint32), faults.weights[ids].view(np.uint32))
        assert [labels[code] for code in rows["label"].tolist()] == faults.labels[ids].tolist()
        kept += ids
    assert sorted(kept) == sorted(faults.good)


PLANTED_INPUTS = (ImageInput(), NumberInput(columns=("amount", "weight")))


def test_exactly_the_planted_faults_are_set_aside_in_any_number_of_ranges(ranges: int, tmp_path: Path) -> None:
    faults = planted_faults(seed=5)
    section = section_of(*PLANTED_INPUTS, clean=CLEAN, most_bad=0.05)
    judge_planted(faults, arranged(section, faults.table, tmp_path, blocks=6, ranges=ranges))


@pytest.mark.usefixtures("ray_cluster")
def test_exactly_the_planted_faults_are_set_aside_by_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PART_BYTES", 2**15)
    faults = planted_faults()
    section = section_of(*PLANTED_INPUTS, source=write(tmp_path / "raw", faults.table, files=5), clean=CLEAN, most_bad=0.05)
    data = prepared(section, tmp_path / "home")
    judge_planted(faults, data)
    assert data.info["counts"] | dict.fromkeys(SPLITS, 0) == {
        "read": 2000,
        "bad": 40,
        "dropped": 100,
        "duplicates": 20,
        **dict.fromkeys(SPLITS, 0),
    }
    assert len(list((data.path / "train").glob("*"))) > 1


# Limits and refusals


def test_a_part_that_drops_more_than_it_may_stops_the_run(tmp_path: Path) -> None:
    table = numbered(x=[0.0] * 350 + [float(row) for row in range(50)], key=[0] * 30 + list(range(370)))
    for clean, line in (
        (Range(columns=("x",), max=5, most=0.1), "data.clean.0: range of x drops 44 of 400 rows (11.0%, its `most` allows 10%)"),
        (Unique(columns=("key",), most=0.07), "data.clean.0: unique of key drops 30 of 400 rows (7.5%, its `most` allows 7%)"),
        (Outliers(columns=("id",), method="quantile", low=0.2, most=0.2), "data.clean.0: outliers (quantile) of id drops "),
    ):
        assert refused(section_of(ID, clean=[clean]), table, tmp_path / clean.kind).startswith(line)


def test_more_bad_rows_than_allowed_stop_the_run(planted: tuple[pa.Table, np.ndarray], tmp_path: Path) -> None:
    line = refused(PLANTED.model_copy(update={"most_bad": 0.01}), planted[0], tmp_path, blocks=3)
    assert "data: 7 of 631 rows cannot be read (1.1%, data.most_bad allows 1.0%): no image (3); " in line
    folder = Path(line.rsplit("they are in ", 1)[1])
    assert sum(pq.read_metadata(file).num_rows for file in folder.rglob("*.parquet")) == 7


@pytest.mark.parametrize(
    ("labels", "more", "line"),
    [
        ([5] * 40, {}, "data.target: column 'label' has one class only (5): there is nothing to learn"),
        (["a"] * 20 + ["b"], {"split": StratifiedSplit()}, "data.split: class 'b' has 1 row(s), too few for 3 stratified splits: "),
        ([0, 1], {}, "data.split: the "),
        (
            [0, 1],
            {"clean": [Outliers(columns=("id",))], "split": {"kind": "random", "train": 1e-9, "validation": 0, "test": 1 - 1e-9}},
            "data.split: the train split is empty",
        ),
        ([None, None], {"most_bad": 1}, "data.source: none of its 2 rows can be used: label: no label (2); they are in "),
        ([0, 1] * 20 + [2], {"clean": [Range(columns=("id",), max=39)]}, ""),
    ],
)
def test_sets_that_cannot_be_learned_from_are_refused(labels: list[Any], more: dict[str, Any], line: str, tmp_path: Path) -> None:
    table = pa.table({"id": np.arange(len(labels)) * 1.0, "label": pa.array(labels) if labels[0] is not None else pa.nulls(2, pa.int64())})
    if line:
        assert refused(section_of(ID, **more), table, tmp_path).startswith(line)
    else:
        assert signature_of(arranged(section_of(ID, **more), table, tmp_path)).target.labels == (0, 1)


def test_a_class_that_cleaning_drops_whole_is_refused(tmp_path: Path) -> None:
    table = pa.table({"id": [*map(float, range(100)), 1e6], "label": ["a", "b"] * 50 + ["c"]})
    section = section_of(ID, clean=[Outliers(columns=("id",))], split=StratifiedSplit(train=1, validation=0, test=0))
    assert refused(section, table, tmp_path) == "data: cleaning drops every row of label 'c': there is nothing to learn of it"


def test_a_label_that_training_has_not_is_refused(tmp_path: Path) -> None:
    split = GivenSplit(column="given", names={"train": "train", "test": "test"})
    table = pa.table({"id": np.arange(10.0), "label": ["a", "b"] * 4 + ["a", "c"], "given": ["train"] * 8 + ["test"] * 2})
    line = refused(section_of(ID, split=split), table, tmp_path)
    assert line == "data: label 'c' is in the test split but not in train: add rows, drop duplicates, or use a stratified split"
    labels = section_of(ID, split=split, target=MultiLabelTarget(column="label"))  # which no split is stratified by
    assert refused(labels, table, tmp_path) == "data: label 'c' is in the test split but not in train: add rows of it, or drop it"


def test_a_label_in_the_test_source_only_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    test = pa.table({"id": [1.0, 2.0], "label": ["a", "zebra"]})
    line = refused(section_of(ID, split=NO_TEST, test=PLACE), numbered(), tmp_path, test=test)
    assert line == "data.test: label 'zebra' is not in data.source, so it cannot be learned: drop it or add rows of it"
    assert not list(tmp_path.rglob("*.parquet"))


# Sources for one split


def test_sources_of_their_own_are_whole_splits_and_move_no_statistics(ranges: int, tmp_path: Path) -> None:
    train = numbered(b=np.arange(400) % 7)
    inputs = NumberInput(columns=("id", "b"))
    section = section_of(inputs, split=RandomSplit(train=1, validation=0, test=0), test=PLACE, validation=PLACE)
    made = []
    for shift in (0.0, 1e6):
        test = pa.table({"id": np.arange(30.0) + shift, "b": np.arange(30), "label": ["b"] * 30})
        validation = pa.table({"id": np.arange(20.0) - shift, "b": np.arange(20), "label": ["a"] * 20})
        made.append(arranged(section, train, tmp_path / f"{shift}", test=test, validation=validation, ranges=ranges))
        rows = rows_of(made[-1], "test")
        assert sorted(rows["numbers"][:, 0].tolist()) == (np.arange(30.0) + shift).tolist() and rows["label"].tolist() == [1] * 30
        assert sorted(rows_of(made[-1], "validation")["numbers"][:, 0].tolist()) == (np.arange(20.0) - shift).tolist()
    assert made[0].read("statistics.json") == made[1].read("statistics.json")
    assert made[0].info["counts"]["train"] == 400
    numbers, found = rows_of(made[0], "train")["numbers"].astype(np.float64), statistics_of(made[0])
    assert np.allclose(found.mean, numbers.mean(axis=0), rtol=1e-9) and np.allclose(found.std, numbers.std(axis=0), rtol=1e-9)


@pytest.mark.parametrize(
    "split", [NO_TEST, StratifiedSplit(train=0.8, validation=0.2, test=0), TimeSplit(column="id", train=0.8, validation=0.2, test=0)]
)
def test_a_test_source_moves_no_row_of_the_others(split: Any, tmp_path: Path) -> None:
    section = section_of(ID, split=split)
    alone = splits_of(arranged(section, numbered(), tmp_path / "alone"), "ids")
    test = numbered(50).set_column(0, "id", [np.arange(50.0) - 1000])
    section = section_of(ID, split=split, test=PLACE)
    both = splits_of(arranged(section, numbered(), tmp_path / "both", test=test), "ids")
    assert both == alone | dict.fromkeys((np.arange(50.0) - 1000).tolist(), "test")


def test_no_validation_share_leaves_no_validation_rows(tmp_path: Path) -> None:
    data = arranged(section_of(ID, split=RandomSplit(train=0.7, validation=0, test=0.3)), numbered(), tmp_path)
    assert data.info["counts"]["validation"] == 0 and len(Split.open(data, "validation")) == 0
    assert data.info["counts"]["train"] + data.info["counts"]["test"] == 400
    assert rows_of(data, "validation")["ids"].shape == (0, 1)


# Other targets


def test_numbers_to_predict_have_statistics_of_the_training_rows(ranges: int, tmp_path: Path) -> None:
    table = numbered(price=RANDOM.normal(300, 40, 400), tax=RANDOM.exponential(3, 400))
    one = cleaned(tmp_path / "one", table, target=NumberTarget(columns=("price",)), ranges=ranges)
    both = cleaned(tmp_path / "both", table, target=NumberTarget(columns=("price", "tax"), name="costs"), ranges=ranges)
    for data, name, columns in ((one, "price", ("price",)), (both, "costs", ("price", "tax"))):
        values = rows_of(data, "train")[name]
        assert values.dtype == np.float32 and values.shape == (data.info["counts"]["train"], len(columns))
        found = statistics_of(data, name)
        assert np.allclose(found.mean, values.astype(np.float64).mean(axis=0)) and np.allclose(
            found.std, values.astype(np.float64).std(axis=0)
        )
        assert found.shift == found.mean and np.allclose(found.scale, 1 / np.array(found.std)) and found.fill == ()
        assert signature_of(data).target.columns == columns and data.info["labels"] == {}
    raw = {row["id"]: np.float32(row["price"]) for row in table.to_pylist()}
    for name in SPLITS:
        rows = rows_of(one, name)
        assert [raw[row] for row in rows["ids"][:, 0].tolist()] == rows["price"][:, 0].tolist()


def test_labels_of_rows_are_written_and_counted(ranges: int, tmp_path: Path) -> None:
    table = numbered(tags=[["sea"] * (row % 2) + ["art"] * (row % 3 == 0) for row in range(400)])
    data = cleaned(tmp_path, table, target=MultiLabelTarget(column="tags", name="topics"), ranges=ranges)
    for name in SPLITS:
        rows = rows_of(data, name)
        numbers = rows["ids"][:, 0].astype(int)
        assert (rows["topics"] == np.stack([numbers % 3 == 0, numbers % 2], axis=1)).all() and rows["topics"].dtype == np.uint8
        assert data.info["labels"][name] == {"art": int((numbers % 3 == 0).sum()), "sea": int((numbers % 2).sum())}


def test_every_class_is_counted_in_every_split_even_where_it_has_no_row(ranges: int, tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": np.arange(403.0),
            "label": ["a", "b"] * 200 + ["c"] * 3,
            "given": ["train", "train", "test", "validation"] * 100 + ["train"] * 3,
        }
    )
    data = cleaned(tmp_path, table, split=GivenSplit(column="given"), ranges=ranges)
    assert data.info["labels"]["validation"] == {"a": 0, "b": 100, "c": 0} and data.info["labels"]["train"]["c"] == 3


# Pieces


def test_a_block_that_was_read_twice_counts_once(tmp_path: Path) -> None:
    section = section_of(ID)
    spill = Spill(section, (ID.feature(numbered()),), False, str(tmp_path / reading.SPILL))
    killed, again = ([from_json(row["piece"][0]) for row in spill(numbered())] for _ in range(2))
    assert killed[0].path != again[0].path and killed[0].rows == again[0].rows == 400
    read = {"source": Read.of(again)}
    plan = reading.sort_pieces(section, spill.features, read, tmp_path, map)  # type: ignore[arg-type]
    info = stage.arrange(plan, read, tmp_path, run=map)  # type: ignore[arg-type]
    assert sum(info["counts"][name] for name in SPLITS) == info["counts"]["read"] == 400


def test_a_block_is_cut_into_pieces_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlopt.data.table.spill.PIECE_BYTES", 100 * (4 + 64))
    spill = Spill(section_of(ID), (ID.feature(numbered()),), False, str(tmp_path))
    pieces = [from_json(row["piece"][0]) for row in spill(numbered(450))]
    assert [piece.rows for piece in pieces] == [100, 100, 100, 100, 50] and sum(piece.labels.total() for piece in pieces) == 450


def test_a_file_without_a_column_is_said(tmp_path: Path) -> None:
    spill = Spill(section_of(ID), (ID.feature(numbered()),), False, str(tmp_path))
    with pytest.raises(DloptError, match="one of the files has no column 'label'; its columns are id"):
        list(spill(pa.table({"id": [1.0]})))


# By Ray


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("part_bytes", few(1, [2**16, 2**26]))
def test_ray_makes_the_artifact_that_this_process_makes_whatever_the_files_and_workers(
    part_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.data import DataContext, ExecutionResources

    monkeypatch.setattr(reading, "PART_BYTES", part_bytes)
    one = write(tmp_path / "one", RICH)
    many = write(tmp_path / "many", shuffled(RICH), files=6)
    limits = DataContext.get_current().execution_options
    made = []
    for source, cpus in ((one, 1), (many, 4)):
        monkeypatch.setattr(limits, "resource_limits", ExecutionResources(cpu=cpus))
        made.append(prepared(rich(StratifiedSplit(), source=source, most_bad=0.2), tmp_path / f"home{cpus}"))
    assert files_of(made[0]) == files_of(made[1]) and without_seconds(made[0]) == without_seconds(made[1])
    here = arranged(rich(StratifiedSplit(), most_bad=0.2), RICH, tmp_path / "here")
    assert without_seconds(here) == without_seconds(made[0])
    assert len(list((made[0].path / "train").glob("*"))) == (1 if part_bytes == 2**26 else 4)
    if part_bytes == 2**26:
        assert files_of(here) == files_of(made[0])


@pytest.mark.usefixtures("ray_cluster")
def test_mending_the_input_goes_on(planted: tuple[pa.Table, np.ndarray], tmp_path: Path) -> None:
    source = write(tmp_path / "raw", planted[0])
    section = images(source, clean=(DropDuplicates(),), split=StratifiedSplit())
    assert "data: 7 of 631 rows cannot be read" in refused_by_ray(section, tmp_path / "home")
    assert list((tmp_path / "home").glob("data/*/quarantine/*")) and not list((tmp_path / "home").glob(f"data/*/{reading.SPILL}"))
    pq.write_table(planted[0].slice(0, 624), tmp_path / "raw/0.parquet")
    mended = prepared(section, tmp_path / "home")
    assert mended.info["counts"]["bad"] == 0 and mended.info["counts"]["duplicates"] == 24


@pytest.mark.usefixtures("ray_cluster")
def test_csv_becomes_numbers_whatever_its_first_rows_look_like(tmp_path: Path) -> None:
    path = tmp_path / "raw.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "note", "label"])
        for row in range(40_000):
            a = row if row < 39_000 else "" if row == 39_000 else "NA" if row == 39_001 else "junk" if row == 39_002 else row + 0.5
            writer.writerow(
                [a, 'a "quoted" note,\nof two lines that makes the file several blocks long', row % 3 if row != 39_999 else "what"]
            )
    data = prepared(table_of(("a",), source=Csv(path=str(path))), tmp_path / "home")
    assert data.info["counts"]["read"] == 40_000 and data.info["counts"]["bad"] == 2
    assert data.info["bad_reasons"] == {"a: 'junk' is not a number": 1, "label: 'what' is not a whole number": 1}
    assert signature_of(data).target.labels == (0, 1, 2)
    values = np.concatenate([rows_of(data, name)["numbers"][:, 0] for name in SPLITS])
    assert np.isnan(values).sum() == 2
    assert np.nansum(values.astype(np.float64)) == sum(range(39_000)) + sum(row + 0.5 for row in range(39_003, 39_999))


@pytest.mark.usefixtures("ray_cluster")
def test_parquet_of_any_ending_is_read_whole(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": np.arange(50.0), "label": [0, 1] * 25}), tmp_path / "raw.pq")
    assert prepared(table_of(("a",), source=Parquet(path=str(tmp_path / "raw.pq"))), tmp_path / "home").info["counts"]["read"] == 50


@pytest.mark.usefixtures("ray_cluster")
def test_a_file_that_breaks_in_the_middle_is_said_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": np.arange(50_000.0), "label": [0, 1] * 25_000}), tmp_path / "raw.parquet", compression="snappy")
    content = bytearray((tmp_path / "raw.parquet").read_bytes())
    content[20_000:20_050] = bytes(50)
    (tmp_path / "raw.parquet").write_bytes(content)
    line = refused_by_ray(table_of(("a",), source=Parquet(path=str(tmp_path / "raw.parquet"))), tmp_path / "home")
    assert line.startswith("data.source: ") and "raw.parquet" in line


@pytest.mark.usefixtures("ray_cluster")
def test_a_folder_of_images_with_a_broken_file(tmp_path: Path) -> None:
    for row, data in enumerate(digits(100)[0]):
        path = tmp_path / "raw" / ("cat" if row % 2 else "dog") / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[:50] if row == 7 else data)
    made = prepared(images(Images(path=str(tmp_path / "raw"))), tmp_path / "home")
    assert made.info["counts"]["read"] == 100 and made.info["counts"]["bad"] == 1
    assert signature_of(made).target.labels == ("cat", "dog")
    (row,) = quarantine_of(made)
    assert row["path"] == str(tmp_path / "raw/cat/7.png")


@pytest.mark.usefixtures("ray_cluster")
def test_missing_columns_and_empty_sets_are_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "train", pa.table({"a": np.arange(40.0), "label": ["x", "y"] * 20}))
    other = write(tmp_path / "other", pa.table({"b": [1.0], "label": ["x"]}))
    empty = write(tmp_path / "empty", pa.table({"a": pa.array([], pa.float64()), "label": pa.array([], pa.string())}))
    for section, line in (
        (table_of(("a", "c"), source=train), "data.source: has no column 'c'; its columns are a, label"),
        (table_of(("a",), source=train, test=other, split=NO_TEST), "data.test: has no column 'a'; its columns are b, label"),
        (table_of(("a",), source=train, clean=(Unique(columns=("key",)),)), "data.source: has no column 'key'; its columns are a, label"),
        (table_of(("a",), source=train, split=TimeSplit(column="when")), "data.source: has no column 'when'; its columns are a, label"),
        (table_of(("a",), source=empty), "data.source: is empty"),
        (table_of(("a",), source=train, test=empty, split=NO_TEST), "data.test: is empty"),
        (
            table_of(("a",), source=train, clean=(Outliers(columns=("label",)),)),
            "data.clean.0: outliers are looked for in number inputs, and 'label' is in none",
        ),
    ):
        assert refused_by_ray(section, tmp_path / "home") == line


@pytest.mark.usefixtures("ray_cluster")
def test_the_sample_digits_have_the_counts_of_a_stratified_split(mnist: None, tmp_path: Path) -> None:
    data = prepared(images(Sample(), clean=(DropDuplicates(),), split=StratifiedSplit()), tmp_path / "home")
    counts = {"read": 5000, "bad": 0, "dropped": 0, "duplicates": 0, "train": 4000, "validation": 500, "test": 500}
    assert data.info["counts"] == counts
    assert data.info["labels"] == {
        name: {str(digit): rows for digit in range(10)} for name, rows in (("train", 400), ("validation", 50), ("test", 50))
    }
    assert rows_of(data, "train")["image"].shape == (4000, 28, 28, 1)
