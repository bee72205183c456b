"""Sources on servers: an object store that speaks S3 and a web server, both on this machine."""

from __future__ import annotations

import functools
import gzip
import http.server
import os
import pickle
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from dlopt.data.sources import Arrow, Csv, Images, ImageTable, JsonLines, Parquet, Texts
from dlopt.data.sources.places import SETTINGS, place_of
from dlopt.part import DloptError
from tests.data.sources.test_sources import png
from tests.packages import package


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """The address of an object store with the bucket `data`."""
    server = package("moto.server", "test").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    files = pyarrow.fs.S3FileSystem(
        endpoint_override=f"{host}:{port}", scheme="http", access_key="testing", secret_key="testing", allow_bucket_creation=True
    )
    files.create_dir("data")
    for name, rows in (("tables/x/one.parquet", [1, 2]), ("tables/two.parquet", [3])):
        pq.write_table(pa.table({"a": rows, "label": rows}), f"data/{name}", filesystem=files)
    for name, content in CONTENTS.items():
        with files.open_output_stream(f"data/{name}", compression=None) as sink:
            sink.write(content)
    yield f"http://{host}:{port}"
    server.stop()


CONTENTS = {
    "tables/notes.txt": b"no data",
    "lines/a.csv": b"a,label\n1,x\n2,y\n",
    "lines/b.csv.gz": gzip.compress(b"a,label\n3,z\n"),
    "lines/c.jsonl": b'{"a": 1, "label": "x"}\n',
    "lines/list.csv": b"file,label\ncat/1.png,cat\ndog/2.png,dog\ndog/gone.png,dog\n",
    "images/cat/1.png": png(1),
    "images/dog/2.png": png(2),
    "images/dog/deeper/3.png": png(3),
    "images/dog/.ipynb_checkpoints/2.png": png(9),
    "texts/ham/1.txt": b"hello",
    "broken.parquet": b"PAR1 nonsense",
    "broken.csv": b"a,b\n1,2\n1\n",
}


@pytest.fixture
def s3(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process knows the object store; Ray's workers, which are there before, do not."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", store)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")


def test_a_path_in_an_object_store_is_a_file_a_folder_or_a_glob(s3: None) -> None:
    one, two = "s3://data/tables/x/one.parquet", "s3://data/tables/two.parquet"
    assert Parquet(path=one).files() == [one]
    for path in ("s3://data/tables", "s3://data/tables/", "s3://data/**/t*/**/*.parquet", (one, two)):
        assert Parquet(path=path).files() == [two, one]
    assert Parquet(path="s3://data/tables/*.parquet").files() == [two]
    assert Parquet(path="s3://data/*/?/one.[!x]arquet").files() == [one]
    assert Parquet(path=one).peek(1).to_pylist() == [{"a": 1, "label": 1}]
    assert Csv(path="s3://data/lines/[ab].csv*").files() == ["s3://data/lines/a.csv", "s3://data/lines/b.csv.gz"]


def test_all_kinds_of_files_are_read_from_an_object_store(s3: None) -> None:
    assert Csv(path="s3://data/lines/b.csv.gz").peek(9).to_pylist() == [{"a": 3, "label": "z"}]
    assert JsonLines(path="s3://data/lines/").peek(9).to_pylist() == [{"a": 1, "label": "x"}]
    assert Images(path="s3://data/images").peek(9).to_pylist() == [
        {"image": png(1), "label": "cat", "path": "s3://data/images/cat/1.png"},
        {"image": png(2), "label": "dog", "path": "s3://data/images/dog/2.png"},
        {"image": png(3), "label": "dog", "path": "s3://data/images/dog/deeper/3.png"},
    ]
    hidden = "files left out: 1 hidden, by names that begin with . or _ (dog/.ipynb_checkpoints/2.png)"
    assert Images(path="s3://data/images").left_out() == hidden
    assert Texts(path="s3://data/texts").peek(9)["text"].to_pylist() == ["hello"]
    made = ImageTable(table=Csv(path="s3://data/lines/list.csv"), column="file", folder="s3://data/images")
    assert made.peek(9)["file"].to_pylist() == [png(1), png(2), b""]
    assert made.found()[1] == 3


def test_a_changed_object_is_new_data(s3: None, store: str) -> None:
    place, _ = place_of("s3://data/new")
    made = Csv(path="s3://data/new.csv")
    found = []
    for content in (b"a\n1\n", b"a\n1\n2\n"):
        with place.filesystem.open_output_stream("data/new.csv") as sink:
            sink.write(content)
        found.append(made.found())
    assert found[0][0][:2] == ["s3://data/new.csv", 4] and found[1][0][:2] == ["s3://data/new.csv", 6]


def test_a_store_may_be_named_in_the_path(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    host = store.removeprefix("http://")
    made = Csv(path=f"s3://data/lines/?.csv?endpoint_override={host}&scheme=http")
    assert made.files() == ["s3://data/lines/a.csv"] and made.peek(1).to_pylist() == [{"a": 1, "label": "x"}]
    with pytest.raises(DloptError, match=rf"'endpoint' is no setting of an object store: {', '.join(SETTINGS)}$"):
        Csv(path=f"s3://data/lines/a.csv?endpoint={host}").files()


def test_a_store_travels_with_its_settings_and_its_keys_are_said_nowhere(s3: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-told")
    place, path = place_of("s3://data/lines/a.csv")
    packed = pickle.dumps(place)
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert pickle.loads(packed).read(path) == CONTENTS["lines/a.csv"]
    assert "not-to-be-told" not in repr(place)


def test_what_an_object_store_does_not_have_is_said_in_one_line(s3: None) -> None:
    for path, said in (
        ("s3://data/nowhere.csv", r"s3://data/nowhere\.csv: no such file; workers read it"),
        ("s3://data/x/*.csv", "no such file"),
        ("s3://nobucket/x.csv", "no such file"),
        ("s3://data/tables", r"s3://data/tables: this folder holds no \.csv or \.tsv file"),
        ("ftp://data/x.csv", "ftp:// is not known; known are file://, s3://, gs://"),
    ):
        with pytest.raises(DloptError, match=said) as error:
            Csv(path=path).peek(1)
        assert "\n" not in str(error.value)
    with pytest.raises(DloptError, match=r"^s3://data/broken\.parquet: cannot be read: "):
        Parquet(path="s3://data/broken.parquet").peek(1)
    with pytest.raises(DloptError, match="the files of one source must lie in one place"):
        Csv(path=("s3://data/lines/a.csv", __file__)).files()
    with pytest.raises(DloptError, match=r"^s3://data/nothing: no such folder"):
        Images(path="s3://data/nothing").files()


def test_an_object_store_that_does_not_answer_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DloptError, match=r"^s3://data/x\.csv: cannot be read: ") as error:
        Csv(path="s3://data/x.csv").peek(1)
    assert "\n" not in str(error.value)


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store that speaks Google Cloud Storage's protocol, with the bucket `data`."""
    create_server = package("gcp_storage_emulator.server", "test").create_server
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="data")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    for name in ("lines/a.csv", "images/cat/1.png"):
        url = f"http://127.0.0.1:{port}/upload/storage/v1/b/data/o?uploadType=media&name={name}"
        urllib.request.urlopen(urllib.request.Request(url, data=CONTENTS[name], method="POST")).close()
    yield
    server.stop()


def test_files_are_read_from_google_cloud_storage(google: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("gs://data/lines/a.csv", "gs://data/lines", "gs://data/*/*.csv"):
        made = Csv(path=path)
        assert made.files() == ["gs://data/lines/a.csv"] and made.peek(9).to_pylist() == [{"a": 1, "label": "x"}, {"a": 2, "label": "y"}]
    assert made.found()[0][:2] == ["gs://data/lines/a.csv", 16] and made.found()[0][2] is not None
    assert Images(path="gs://data/images").peek(1).to_pylist() == [{"image": png(1), "label": "cat", "path": "gs://data/images/cat/1.png"}]
    with pytest.raises(DloptError, match=r"^gs://data/nowhere\.csv: no such file"):
        Csv(path="gs://data/nowhere.csv").files()
    packed = pickle.dumps(place_of("gs://data/lines/a.csv"))
    monkeypatch.delenv("STORAGE_EMULATOR_HOST")
    place, inside = pickle.loads(packed)
    assert place.read(inside) == CONTENTS["lines/a.csv"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server, which knows no ranges of bytes."""
    for name, content in CONTENTS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.table({"a": range(100), "label": [0, 1] * 50}), tmp_path / "x.parquet", row_group_size=40)
    pa.feather.write_feather(pa.table({"a": [1]}), str(tmp_path / "x.feather"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_files_are_read_from_a_web_server(web: str, tmp_path: Path) -> None:
    assert Csv(path=f"{web}/lines/a.csv?version=2").peek(9).to_pylist() == [{"a": 1, "label": "x"}, {"a": 2, "label": "y"}]
    made = Csv(path=(f"{web}/lines/a.csv", f"{web}/lines/b.csv.gz"))
    assert sum(len(rows) for _, rows in made.load(*made.pieces())) == 3
    parquet = Parquet(path=f"{web}/x.parquet")
    assert len(parquet.pieces()[1]) == 3 and parquet.peek(2).to_pylist() == [{"a": 0, "label": 0}, {"a": 1, "label": 1}]
    assert Arrow(path=f"{web}/x.feather").peek(1).to_pylist() == [{"a": 1}]
    table = ImageTable(table=Csv(path=f"{web}/lines/list.csv"), column="file", folder=f"{web}/images")
    assert table.peek(9)["file"].to_pylist() == [png(1), png(2), b""]
    before = made.found()
    (tmp_path / "lines/a.csv").write_bytes(b"a,label\n1,x\n")
    assert made.found() != before and before[0][0] == f"{web}/lines/a.csv" and before[0][1] == 16


def test_a_web_file_larger_than_what_is_read_at_once_is_whole(web: str, tmp_path: Path) -> None:
    (tmp_path / "large.csv").write_bytes(b"a\n" + b"%d\n" * 900_000 % tuple(range(900_000)))
    made = Csv(path=f"{web}/large.csv")
    rows = pa.concat_tables(rows for _, rows in made.load(*made.pieces()))
    assert rows["a"].cast(pa.int64()).to_pylist() == list(range(900_000))


def test_what_a_web_server_does_not_have_is_said_in_one_line(web: str) -> None:
    for made, said in (
        (Csv(path=f"{web}/nowhere.csv"), r"/nowhere\.csv: no such file"),
        (Csv(path="http://127.0.0.1:9/x.csv"), r"127\.0\.0\.1:9/x\.csv: cannot be read: "),
        (Csv(path=f"{web}/broken.csv"), r"/broken\.csv: cannot be read: line 3 has 1 values where 2 are expected"),
        (Images(path=f"{web}/images"), "http cannot list folders: copy the files, or list them in a table"),
    ):
        with pytest.raises(DloptError, match=said) as error:
            made.peek(9)
        assert "\n" not in str(error.value)


def test_workers_read_an_object_store_that_only_this_process_knows(ray_cluster: None, s3: None) -> None:
    import ray

    assert not ray.get(ray.remote(lambda: os.environ.get("AWS_ENDPOINT_URL")).remote())
    assert sorted(row["a"] for row in Parquet(path="s3://data/tables").read().take_all()) == [1, 2, 3]
    rows = Csv(path=("s3://data/lines/a.csv", "s3://data/lines/b.csv.gz")).read().take_all()
    assert sorted((row["a"], row["label"]) for row in rows) == [("1", "x"), ("2", "y"), ("3", "z")]
    assert sorted(row["label"] for row in Images(path="s3://data/images").read().take_all()) == ["cat", "dog", "dog"]


def test_workers_read_from_a_web_server(ray_cluster: None, web: str) -> None:
    assert sum(row["a"] for row in Parquet(path=f"{web}/x.parquet").read().take_all()) == sum(range(100))
