"""Which files of a folder are data, beside pyarrow.dataset and torchvision's rule for folders of classes; and what of them is read."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from dlopt.data.kinds import CategoryTarget, NumberInput
from dlopt.data.rows import look, meanings
from dlopt.data.section import Data
from dlopt.data.sources import Arrow, Csv, Images, JsonLines, Parquet, Texts
from dlopt.data.sources.places import Disk
from dlopt.data.stats.guess import source_of
from dlopt.part import DloptError
from dlopt.progress import BLOCK

HIDDEN = (".ipynb_checkpoints/a.parquet", "x/._b.parquet", "_delta_log/c.parquet", "x/.hidden/y/d.parquet", "_e.parquet")
SEEN = ("a.parquet", "x/b.parquet", "x/y/z/c.parquet", "x/y_/d_.parquet")


def write(folder: Path, *names: str, **columns: list[Any]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns or {"a": [name]}), folder / name)


def touched(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


# Hidden files and files of another kind


def test_the_files_of_a_folder_are_those_of_a_pyarrow_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "_mine" / ".data"  # what the path itself is called counts for nothing
    write(folder, *HIDDEN, *SEEN)
    source = Parquet(path=str(folder))
    assert source.files() == sorted(pyarrow.dataset.dataset(folder).files) == sorted(str(folder / name) for name in SEEN)
    assert source.left_out().startswith("files left out: 5 hidden, by names that begin with . or _ (")
    touched(folder, "_SUCCESS", "notes.txt", ".b.parquet.crc")
    said = source.left_out()
    assert "7 hidden" in said and said.endswith("; 1 of another kind (notes.txt)")


def test_nothing_is_said_where_nothing_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, *SEEN)
    assert Parquet(path=str(tmp_path)).left_out() == Parquet(path=str(tmp_path / "a.parquet")).left_out() == ""


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", ["a.parquet"]),
        ("**/*.parquet", list(SEEN)),
        ("_*", ["_e.parquet"]),
        ("_delta_log/*", ["_delta_log/c.parquet"]),
        ("*/._*", ["x/._b.parquet"]),
        (".ipynb_checkpoints/a.parquet", [".ipynb_checkpoints/a.parquet"]),
    ],
)
def test_a_wildcard_finds_what_is_hidden_only_where_it_begins_so_itself(pattern: str, names: list[str], tmp_path: Path) -> None:
    write(tmp_path, *HIDDEN, *SEEN)
    assert Parquet(path=str(tmp_path / pattern)).files() == sorted(str(tmp_path / name) for name in names)


def test_a_folder_of_hidden_files_alone_says_so(tmp_path: Path) -> None:
    write(tmp_path, "_a.parquet")
    with pytest.raises(DloptError, match=r"this folder holds no \.parquet file but 1 hidden, by names that begin with \. or _$"):
        Parquet(path=str(tmp_path)).files()


def image_folder(root: Path, endings: tuple[str, ...]) -> list[tuple[str, str]]:
    """(file, class) as torchvision.datasets.ImageFolder finds them, by its documentation: every folder of the root is a class, all files
    in it and below it that end so are its, and links are followed; sorted by class and path."""
    found = []
    for name in sorted(entry.name for entry in os.scandir(root) if entry.is_dir()):
        for folder, _, files in sorted(os.walk(root / name, followlinks=True)):
            found += [(str(Path(folder) / file), name) for file in sorted(files) if file.lower().endswith(endings)]
    return sorted(found)


def test_the_classes_of_a_folder_are_those_of_torchvision_without_what_is_hidden(tmp_path: Path) -> None:
    root, other = tmp_path / "images", tmp_path / "elsewhere"
    touched(root, "cat/1.png", "cat/2.JPG", "cat/deep/er/3.png", "dog/4.webp", "dog/notes.txt", "loose.png")
    touched(other, "5.png", "inside/6.png")
    (root / "fox").symlink_to(other)
    (root / "dog" / "again").symlink_to(root / "dog")  # a circle
    source = Images(path=str(root))
    table = source.peek(99)
    (root / "dog" / "again").unlink()
    found = list(zip(table["path"].to_pylist(), table["label"].to_pylist(), strict=True))
    assert found == image_folder(root, Images.endings) and len(found) == 6
    assert source.left_out() == "files left out: 1 of another kind (dog/notes.txt); 1 in no class's folder (loose.png)"
    touched(root, ".ipynb_checkpoints/1-checkpoint.png", "cat/._1.png", "_trash/x/9.png")
    assert source.peek(99).equals(table)
    assert "3 hidden, by names that begin with . or _" in source.left_out()


def test_texts_of_a_deeper_folder_are_of_the_class_above(tmp_path: Path) -> None:
    touched(tmp_path, "ham/2024/a.txt", "spam/b.txt")
    assert Texts(path=str(tmp_path)).peek(9)["label"].to_pylist() == ["ham", "spam"]


@pytest.mark.parametrize("change", ["content", "time", "more", "fewer", "name"])
def test_what_a_folder_of_images_is_found_to_be_changes_with_its_files(change: str, tmp_path: Path) -> None:
    touched(tmp_path, "a/1.png", "a/2.png", "b/3.png")
    source = Images(path=str(tmp_path))
    before = source.found()
    assert source.found() == before and before[:2] == [str(tmp_path), 3] and len(json.dumps(before)) < 200 + len(str(tmp_path))
    first = tmp_path / "a" / "1.png"
    match change:
        case "content":
            first.write_bytes(b"other")
            os.utime(first, ns=(1, (tmp_path / "a" / "2.png").stat().st_mtime_ns))
        case "time":
            os.utime(first, ns=(1, 1))
        case "more":
            touched(tmp_path, "b/4.png")
        case "fewer":
            first.unlink()
        case "name":
            first.rename(tmp_path / "b" / "1.png")
    assert source.found() != before


def test_files_of_folders_come_as_bytes_on_disk_in_the_order_of_their_names(tmp_path: Path) -> None:
    names = [f"{label}/{number}.png" for label in ("b", "a", "Ü", "a b") for number in range(40)]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes([number]))
    table = pa.concat_tables(Images(path=str(tmp_path)).tables())
    assert table["path"].to_pylist() == sorted(str(tmp_path / name) for name in names)
    assert dict(zip(table["path"].to_pylist(), table["image"].to_pylist(), strict=True)) == {
        str(tmp_path / name): bytes([number]) for number, name in enumerate(names)
    }
    assert pa.concat_tables(Images(path=str(tmp_path)).tables(["label"])).column_names == ["label"]


def test_a_name_that_is_no_text_is_said(tmp_path: Path) -> None:
    touched(tmp_path, "a/\udcff.png")
    with pytest.raises(DloptError, match=r"a/\\udcff\.png': the name of this file is not UTF-8: rename it$"):
        Images(path=str(tmp_path)).files()


def test_a_folder_without_classes_says_what_it_holds(tmp_path: Path) -> None:
    touched(tmp_path, "a.png")
    says = r"holds no CLASS/IMAGE files \(.*\): files left out: 1 in no class's folder \(a\.png\)$"
    with pytest.raises(DloptError, match=says):
        Images(path=str(tmp_path)).files()


def test_the_first_rows_of_a_folder_are_of_all_its_classes(tmp_path: Path) -> None:
    touched(tmp_path, *(f"{name}/{number:03}.png" for name in "abcd" for number in range(100)))
    labels = Images(path=str(tmp_path)).peek(1000)["label"].to_pylist()
    assert labels == sorted([*"abcd"] * 16)


def test_what_is_left_out_is_said_when_data_are_prepared(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", "_b.parquet", a=[1, 2], label=["x", "y"])
    section = Data(source=Parquet(path=str(tmp_path)), inputs=(NumberInput(columns=("a",)),), target=CategoryTarget(column="label"))
    said: list[tuple[str, float | None, str]] = []
    look(section, list(meanings(section)), lambda *words: said.append(words))
    assert said == [("prepare", None, f"{BLOCK}data.source: files left out: 1 hidden, by names that begin with . or _ (_b.parquet)")]


# Folders that name values


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_hive_partitions_are_columns_as_in_pyarrow(kind: str, tmp_path: Path) -> None:
    folders = ["year=2025/place=a%20b", "year=2026/place=c", "year=__HIVE_DEFAULT_PARTITION__/place=007"]
    for number, folder in enumerate(folders):
        (tmp_path / folder).mkdir(parents=True)
        table = pa.table({"a": [number, number]})
        if kind == "parquet":
            pq.write_table(table, tmp_path / folder / "x.parquet")
        else:
            with pa.ipc.new_file(tmp_path / folder / "x.arrow", table.schema) as sink:
                sink.write_table(table)
    expected = pyarrow.dataset.dataset(tmp_path, format=kind if kind == "parquet" else "ipc", partitioning="hive").to_table()
    source = {"parquet": Parquet, "arrow": Arrow}[kind](path=str(tmp_path))
    assert source.layout() == pa.schema([("a", pa.int64()), ("year", pa.int64()), ("place", pa.string())])
    found = pa.concat_tables([table.cast(source.layout()) for _, table in source.load(*source.pieces())])
    assert sorted(map(str, found.to_pylist())) == sorted(map(str, expected.to_pylist()))
    assert source.peek(1).column_names == ["a", "year", "place"]


def test_folders_that_name_values_of_text_files_are_said(tmp_path: Path) -> None:
    (tmp_path / "year=2026").mkdir()
    (tmp_path / "year=2026" / "a.csv").write_text("a\n1\n")
    assert Csv(path=str(tmp_path)).left_out().startswith("folders such as year=2026 make no columns of text files")


# Archives and homes


def packed(*files: tuple[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return sink.getvalue()


def test_a_zip_archive_of_one_text_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv.zip").write_bytes(packed(("in/a.csv", b"a,b\n1,x\n2,y\n"), ("__MACOSX/in/._a.csv", b"x")))
    assert Csv(path=str(tmp_path / "a.csv.zip")).peek(9).to_pylist() == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert Csv(path=str(tmp_path)).files() == [str(tmp_path / "a.csv.zip")]
    (tmp_path / "b.zip").write_bytes(packed(("b", b'{"a": 1}\n')))
    assert JsonLines(path=str(tmp_path / "b.zip")).peek(9).to_pylist() == [{"a": 1}]
    assert source_of(str(tmp_path / "a.csv.zip")) == Csv(path=str(tmp_path / "a.csv.zip"))


def test_other_archives_get_a_clear_answer(tmp_path: Path) -> None:
    file = tmp_path / "x.zip"
    file.write_bytes(packed(("a.csv", b"a\n1\n"), ("b.csv", b"a\n2\n")))
    with pytest.raises(DloptError, match=r"x\.zip: cannot be read: this zip archive holds 2 files, and one can be read: unpack it$"):
        Csv(path=str(file)).peek(1)
    for source in (Parquet, Images):
        with pytest.raises(DloptError, match=r"x\.zip: is a zip archive: unpack it$"):
            source(path=str(file)).files()
    with pytest.raises(DloptError, match=r"x\.zip: a zip archive that does not say what it holds: unpack it"):
        source_of(str(file))
    file.write_bytes(b"PK\3\4 no archive")
    with pytest.raises(DloptError, match=r"x\.zip: cannot be read: this is no zip archive$"):
        Csv(path=str(file)).peek(1)
    damaged = bytearray(packed(("a.csv", b"a\n" + b"1\n" * 1000)))
    damaged[40:48] = b"\xff" * 8
    file.write_bytes(damaged)
    with pytest.raises(DloptError, match=r"x\.zip: cannot be read: "):
        Csv(path=str(file)).peek(1)


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "data/a.parquet", a=[1])
    touched(tmp_path, "images/cat/1.png")
    assert Parquet(path="~/data").files() == Parquet(path="~/data/*.parquet").files() == [str(tmp_path / "data/a.parquet")]
    assert Images(path="~/images").files() == [str(tmp_path / "images/cat/1.png")]
    assert source_of("~/data/a.parquet").files() == [str(tmp_path / "data/a.parquet")]


# How much is read


class Counted(io.FileIO):
    """A file that counts the bytes that are read of all files like it."""

    read_bytes = 0

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(-1 if size is None else size)
        Counted.read_bytes += len(found or b"")
        return found or b""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    monkeypatch.setattr(Counted, "read_bytes", 0)
    monkeypatch.setattr(Disk, "file", lambda self, path: pa.PythonFile(Counted(path), mode="r"))
    monkeypatch.setattr(Disk, "stream", lambda self, path: pa.PythonFile(Counted(path), mode="r"))
    return Counted


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 MB of texts, and two small columns."""
    path = tmp_path_factory.mktemp("wide") / "wide.parquet"
    rows = 10_000
    texts = [os.urandom(1000).hex() for _ in range(rows)]
    pq.write_table(pa.table({"a": range(rows), "text": texts, "b.c": [float(row) for row in range(rows)]}), path, row_group_size=rows)
    return path


def test_of_a_parquet_file_only_the_columns_that_are_wanted_are_read(wide: Path, counted: type[Counted]) -> None:
    source = Parquet(path=str(wide))
    place, pieces = source.pieces()
    counted.read_bytes = 0
    found = pa.concat_tables([table for _, table in source.load(place, pieces, ["a", "b.c"]) if len(table)])
    ours, counted.read_bytes = counted.read_bytes, 0
    with pq.ParquetFile(pa.PythonFile(counted(str(wide)), mode="r")) as file:
        expected = file.read(["a", "b.c"])
    assert found.combine_chunks().equals(expected.combine_chunks())
    assert ours <= 1.5 * counted.read_bytes < 0.02 * wide.stat().st_size


def test_a_look_at_the_first_rows_of_a_large_row_group_reads_little_of_it(wide: Path, counted: type[Counted]) -> None:
    assert Parquet(path=str(wide)).peek(64).num_rows == 64  # once for the types of columns, and once for the rows
    assert counted.read_bytes < 0.3 * wide.stat().st_size
