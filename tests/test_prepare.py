"""The prepare stage on Ray Data: what comes out of sets with planted faults, whatever blocks they come in, and what is refused."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
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
from dlopt.data.clean import DropDuplicates
from dlopt.data.inputs import CategoryTarget, ImageInput, NumberInput
from dlopt.data.prepare import PREPARE
from dlopt.data.prepared import Split
from dlopt.data.section import Data
from dlopt.data.sources import Csv, Images, Parquet, Sample
from dlopt.data.split import RandomSplit, StratifiedSplit
from dlopt.part import DloptError

pytestmark = pytest.mark.usefixtures("ray_cluster")

NO_TEST = RandomSplit(train=0.8, validation=0.2, test=0)
SPLITS = ("train", "validation", "test")


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
    return once(PREPARE, section, home, found=[section.source.found(), section.test.found() if section.test else None])


def rows_of(data: Artifact, name: str) -> dict[str, np.ndarray]:
    return Split.open(data, name).read()


def files_of(data: Artifact) -> dict[str, str]:
    return {name: file.sha256 for name, file in data.manifest.files.items() if not name.startswith("bad/")}


def refused(section: Data, home: Path) -> str:
    """The one line that a run is refused with; nothing sealed is left."""
    with pytest.raises(DloptError) as error:
        prepared(section, home)
    assert not list(home.rglob("manifest.json"))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[pa.Table, np.ndarray]:
    """600 good rows, 20 of them twice and one five times; 3 broken images, 2 that are none, 2 rows without a label."""
    data, pixels, labels = digits(600)
    rows: list[tuple[bytes | None, int | None]] = list(zip(data, labels, strict=True))
    rows += rows[:20] + rows[30:31] * 4
    rows += [(b"nonsense", 1), (b"nonsense", 1), (data[0][:50], 2), (None, 0), (None, 0), (data[1], None), (None, None)]
    return pa.table({"image": [row[0] for row in rows], "label": pa.array([row[1] for row in rows], pa.int32())}), pixels


def planted_section(source: Parquet) -> Data:
    return images(source, clean=(DropDuplicates(),), most_bad=0.02, split=StratifiedSplit())


@pytest.fixture(scope="module")
def first(planted: tuple[pa.Table, np.ndarray], ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("planted")
    return prepared(planted_section(write(folder / "raw", planted[0])), folder / "home")


def test_planted_faults_are_counted_exactly(first: Artifact) -> None:
    assert first.info["counts"] == {"read": 631, "bad": 7, "duplicates": 24, "train": 480, "validation": 60, "test": 60}
    assert first.info["labels"] == {
        "train": {"0": 160, "1": 160, "2": 160},
        "validation": {"0": 20, "1": 20, "2": 20},
        "test": {"0": 20, "1": 20, "2": 20},
    }


def test_bad_rows_are_kept_as_they_were_read_with_their_reason(first: Artifact, planted: tuple[pa.Table, np.ndarray]) -> None:
    bad = pa.concat_tables([pq.read_table(file) for file in sorted((first.path / "bad").rglob("*.parquet"))])
    expected = planted[0].slice(624)
    assert Counter(map(str, bad.select(["image", "label"]).to_pylist())) == Counter(map(str, expected.to_pylist()))
    for row in bad.to_pylist():
        assert row["reason"].startswith(
            "no image" if row["image"] is None else "label: no label" if row["label"] is None else "not an image: "
        )
    assert first.info["bad_reasons"] == dict(Counter(bad["reason"].to_pylist()))


def test_every_good_row_is_in_one_split_once(first: Artifact, planted: tuple[pa.Table, np.ndarray]) -> None:
    found = {name: rows_of(first, name) for name in SPLITS}
    pixels = np.concatenate([rows["image"] for rows in found.values()])[..., 0]
    labels = np.concatenate([rows["label"] for rows in found.values()])
    expected = {planted[1][row].tobytes(): row % 3 for row in range(600)}
    assert {one.tobytes(): int(label) for one, label in zip(pixels, labels, strict=True)} == expected
    assert len(pixels) == 600


def test_statistics_are_of_the_training_rows(first: Artifact) -> None:
    pixels = rows_of(first, "train")["image"].astype(np.float64)
    found = json.loads(first.read("statistics.json"))["image"]
    assert (found["count"], found["min"], found["max"]) == (480 * 30, [pixels.min()], [pixels.max()])
    assert np.allclose([found["mean"][0], found["std"][0]], [pixels.mean(), pixels.std()], rtol=1e-9)


def test_the_artifact_is_the_same_from_other_files_blocks_and_orders(
    first: Artifact, planted: tuple[pa.Table, np.ndarray], tmp_path: Path
) -> None:
    order = np.random.default_rng(4).permutation(631)
    again = prepared(planted_section(write(tmp_path / "raw", planted[0].take(pa.array(order)), files=7)), tmp_path / "home")
    assert files_of(again) == files_of(first)
    assert {name: value for name, value in again.info.items() if name != "seconds"} == {
        name: value for name, value in first.info.items() if name != "seconds"
    }


def test_many_ranges_hold_the_rows_that_one_holds(
    first: Artifact, planted: tuple[pa.Table, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "PART_BYTES", 8 * 2**10)
    made = prepared(planted_section(write(tmp_path / "raw", planted[0], files=3)), tmp_path / "home")
    assert [file.name for file in sorted((made.path / "train").glob("*"))] == [f"part-{number:05d}.parquet" for number in range(4)]
    for name in SPLITS:
        one, many = rows_of(first, name), rows_of(made, name)
        assert all((one[column] == many[column]).all() for column in one)
    assert made.info["counts"] == first.info["counts"]
    one, many = (json.loads(data.read("statistics.json"))["image"] for data in (first, made))
    assert all(np.allclose(one[name], many[name], rtol=1e-12) for name in one)


def test_more_bad_rows_than_allowed_stop_the_run_and_mending_the_input_goes_on(
    planted: tuple[pa.Table, np.ndarray], tmp_path: Path
) -> None:
    source = write(tmp_path / "raw", planted[0])
    section = planted_section(source).model_copy(update={"most_bad": 0.01})
    line = refused(section, tmp_path / "home")
    assert "data: 7 of 631 rows cannot be read (1.1%, data.most_bad allows 1.0%): no image (3); " in line
    folder = Path(line.rsplit("they are in ", 1)[1])
    assert sum(pq.read_metadata(file).num_rows for file in folder.rglob("*.parquet")) == 7
    pq.write_table(planted[0].slice(0, 624), tmp_path / "raw/0.parquet")
    mended = prepared(section, tmp_path / "home")
    assert mended.info["counts"]["bad"] == 0 and not (mended.path / "bad").exists()


def test_a_block_of_bad_rows_only_is_set_aside(tmp_path: Path) -> None:
    data, _, labels = digits(60)
    source = write(tmp_path / "raw", pa.table({"image": data + [b""] * 20, "label": labels + [0] * 20}), files=4)
    assert prepared(images(source, most_bad=0.5), tmp_path / "home").info["counts"]["bad"] == 20


def test_a_set_without_a_good_row_is_refused_with_the_reason(tmp_path: Path) -> None:
    source = write(tmp_path / "raw", pa.table({"a": [1.0, 2.0], "label": pa.array([None, None], pa.int64())}))
    assert refused(table_of(("a",), source=source, most_bad=1), tmp_path / "home").startswith(
        "data.source: none of its 2 rows can be read: label: no label (2); they are in "
    )


@pytest.mark.parametrize(
    ("labels", "split", "line"),
    [
        ([5] * 40, RandomSplit(), "data.target: column 'label' has one class only (5): there is nothing to learn"),
        (["a"] * 20 + ["b"], StratifiedSplit(), "data.split: class 'b' has 1 row(s), too few for 3 stratified splits: "),
        ([0, 1], RandomSplit(), "data.split: the "),
    ],
)
def test_sets_that_cannot_be_learned_from_are_refused(labels: list[Any], split: Any, line: str, tmp_path: Path) -> None:
    table = pa.table({"a": np.arange(len(labels)) * 1.0, "label": labels})
    assert refused(table_of(("a",), source=write(tmp_path / "raw", table), split=split), tmp_path / "home").startswith(line)


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "raw", pa.table({"a": pa.array([], pa.float64()), "label": pa.array([], pa.int64())}))
    assert refused(table_of(("a",), source=source), tmp_path / "home") == "data.source: is empty"


def test_a_label_in_the_test_source_only_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    train = write(tmp_path / "train", pa.table({"a": np.arange(40.0), "label": ["x", "y"] * 20}))
    test = write(tmp_path / "test", pa.table({"a": [1.0, 2.0], "label": ["x", "zebra"]}))
    section = table_of(("a",), source=train, test=test, split=NO_TEST)
    assert refused(section, tmp_path / "home").startswith("data.test: label 'zebra' is not in data.source, so it cannot be learned: ")
    assert not list((tmp_path / "home").rglob("*.parquet"))


def test_a_test_source_is_the_test_split_and_moves_no_statistics(tmp_path: Path) -> None:
    train = write(tmp_path / "train", pa.table({"a": np.arange(100.0), "b": np.arange(100) % 7, "label": ["x", "y"] * 50}))
    made = []
    for number, shift in enumerate((0.0, 1e6)):
        table = pa.table({"a": np.arange(30.0) + shift, "b": np.arange(30), "label": ["y"] * 30})
        test = write(tmp_path / f"test{number}", table)
        made.append(prepared(table_of(("a", "b"), source=train, test=test, split=NO_TEST), tmp_path / "home"))
        rows = rows_of(made[-1], "test")
        assert sorted(rows["numbers"][:, 0].tolist()) == (np.arange(30.0) + shift).tolist()
        assert rows["label"].tolist() == [1] * 30
    assert made[0].read("statistics.json") == made[1].read("statistics.json")
    counts = made[0].info["counts"]
    assert counts["train"] + counts["validation"] == 100 and counts["test"] == 30
    numbers = rows_of(made[0], "train")["numbers"].astype(np.float64)
    found = json.loads(made[0].read("statistics.json"))["numbers"]
    assert np.allclose(found["mean"], numbers.mean(axis=0), rtol=1e-9) and np.allclose(found["std"], numbers.std(axis=0), rtol=1e-9)
    assert json.loads(made[0].read("signature.json"))["target"]["labels"] == ["x", "y"]


def test_no_validation_share_leaves_no_validation_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "raw", pa.table({"a": np.arange(100.0), "label": [0, 1] * 50}))
    data = prepared(table_of(("a",), source=source, split=RandomSplit(train=0.7, validation=0, test=0.3)), tmp_path / "home")
    assert data.info["counts"]["validation"] == 0 and len(Split.open(data, "validation")) == 0
    assert data.info["counts"]["train"] + data.info["counts"]["test"] == 100
    assert rows_of(data, "validation")["numbers"].shape == (0, 1)


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
    assert json.loads(data.read("signature.json"))["target"]["labels"] == [0, 1, 2]
    values = np.concatenate([rows_of(data, name)["numbers"][:, 0] for name in SPLITS])
    assert np.isnan(values).sum() == 2
    assert np.nansum(values.astype(np.float64)) == sum(range(39_000)) + sum(row + 0.5 for row in range(39_003, 39_999))


def test_parquet_of_any_ending_is_read_whole(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": np.arange(50.0), "label": [0, 1] * 25}), tmp_path / "raw.pq")
    assert prepared(table_of(("a",), source=Parquet(path=str(tmp_path / "raw.pq"))), tmp_path / "home").info["counts"]["read"] == 50


def test_a_file_that_breaks_in_the_middle_is_said_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": np.arange(50_000.0), "label": [0, 1] * 25_000}), tmp_path / "raw.parquet", compression="snappy")
    content = bytearray((tmp_path / "raw.parquet").read_bytes())
    content[20_000:20_050] = bytes(50)
    (tmp_path / "raw.parquet").write_bytes(content)
    line = refused(table_of(("a",), source=Parquet(path=str(tmp_path / "raw.parquet"))), tmp_path / "home")
    assert line.startswith("data.source: ") and "raw.parquet" in line


def test_a_folder_of_images_with_a_broken_file(tmp_path: Path) -> None:
    for row, data in enumerate(digits(100)[0]):
        path = tmp_path / "raw" / ("cat" if row % 2 else "dog") / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[:50] if row == 7 else data)
    data = prepared(images(Images(path=str(tmp_path / "raw"))), tmp_path / "home")
    assert data.info["counts"]["read"] == 100 and data.info["counts"]["bad"] == 1
    assert json.loads(data.read("signature.json"))["target"]["labels"] == ["cat", "dog"]
    (file,) = (data.path / "bad").rglob("*.parquet")
    assert pq.read_table(file)["path"].to_pylist() == [str(tmp_path / "raw/cat/7.png")]


def test_duplicates_stay_when_no_one_asks_to_drop_them(tmp_path: Path) -> None:
    source = write(
        tmp_path / "raw", pa.table({"a": [1.0, 2.0] * 50 + [float(row) for row in range(3, 100)], "label": [0, 1] * 50 + [0] * 97})
    )
    data = prepared(table_of(("a",), source=source), tmp_path / "home")
    counts = data.info["counts"]
    assert counts["duplicates"] == 0 and sum(counts[name] for name in SPLITS) == 197
    assert sum(bool((rows_of(data, name)["numbers"] == 1).any()) for name in SPLITS) == 1


def test_the_sample_digits_have_the_counts_of_a_stratified_split(mnist: None, tmp_path: Path) -> None:
    data = prepared(images(Sample(), clean=(DropDuplicates(),), split=StratifiedSplit()), tmp_path / "home")
    assert data.info["counts"] == {"read": 5000, "bad": 0, "duplicates": 0, "train": 4000, "validation": 500, "test": 500}
    assert data.info["labels"] == {
        name: {str(digit): rows for digit in range(10)} for name, rows in (("train", 400), ("validation", 50), ("test", 50))
    }
    assert rows_of(data, "train")["image"].shape == (4000, 28, 28, 1)
