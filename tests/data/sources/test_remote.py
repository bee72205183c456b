"""A home in an object store: artifacts and runs are there whole or not at all, whatever happens on the way, and are found by others.
Machines are folders here: each has a cache of its own."""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.fs as fs
import pytest
from pydantic import BaseModel

from dlopt import remote, runs
from dlopt.artifact import Artifact, Stage, is_sealed, once
from dlopt.part import DloptError
from dlopt.remote import Exchange, home_path, remote_of
from dlopt.train.checkpoint.stores import Bucket, Checkpointing, store_of
from tests.commands import here, printed, refused_here
from tests.packages import package

ADDRESS = "s3://bucket/runs"


class Front:
    """Between us and the store: what it does to a request, before it passes it on."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.fault: Callable[[BaseHTTPRequestHandler], bool] | None = None
        """Says whether it has dealt with the request itself."""
        self.puts: list[str] = []
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                if front.fault and front.fault(self):
                    self.close_connection = True
                    return
                body = self.body()
                left_out = ("transfer-encoding", "content-length", "expect")
                headers = {name: value for name, value in self.headers.items() if name.lower() not in left_out}
                store = http.client.HTTPConnection("127.0.0.1", front.port, timeout=30)
                store.request(self.command, self.path, body, headers)
                reply = store.getresponse()
                content = reply.read()
                if self.command == "PUT":
                    front.puts.append(self.path)
                self.send_response_only(reply.status)
                given = {name.lower(): value for name, value in reply.getheaders()}
                given |= {} if self.command == "HEAD" else {"content-length": str(len(content))}
                for name, value in given.items():
                    if name not in ("connection", "transfer-encoding"):
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def body(self) -> bytes:
                """As its head says how long it is, or piece by piece."""
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                pieces = list[bytes]()
                while size := int(self.rfile.readline().partition(b";")[0], 16):
                    pieces.append(self.rfile.read(size))
                    self.rfile.readline()
                while self.rfile.readline().strip():
                    continue
                return b"".join(pieces)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture(scope="module")
def store() -> Iterator[Front]:
    running = package("moto.server", "test").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    front = Front(running.get_host_and_port()[1])
    yield front
    front.server.shutdown()
    front.server.server_close()
    running.stop()


@pytest.fixture
def front(store: Front, monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    """An empty bucket behind it."""
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "ENDPOINT_URL": store.url, "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    store.fault, store.puts = None, []
    bucket = fs.S3FileSystem(access_key="test", secret_key="test", endpoint_override=store.url, scheme="http", allow_bucket_creation=True)
    bucket.create_dir("bucket")
    bucket.delete_dir_contents("bucket", missing_dir_ok=True)
    yield store
    store.fault = None
    os.environ.pop(remote.VARIABLE, None)


class Machine:
    """Which sees the store from a cache of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch

    def home(self, spread: bool = False) -> Path:
        self.monkeypatch.setenv("XDG_CACHE_HOME", str(self.folder))
        found = home_path(ADDRESS)
        if spread:
            remote.spread()
        return found


@pytest.fixture
def one(tmp_path: Path, front: Front, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path / "one", monkeypatch)


@pytest.fixture
def other(tmp_path: Path, front: Front, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path / "other", monkeypatch)


class Section(BaseModel):
    text: str = "x"


class Counted:
    """A stage that says how often it was made."""

    def __init__(self) -> None:
        self.made = 0
        self.stage = Stage("data", self.make)

    def make(self, section: Section, out: Path) -> dict[str, Any]:
        self.made += 1
        (out / "quarantine").mkdir()
        (out / "a.txt").write_text(section.text)
        (out / "quarantine" / "bad.txt").write_text("bad")
        return {"made": self.made}


def test_an_artifact_is_made_once_for_all_machines(one: Machine, other: Machine, front: Front) -> None:
    counted = Counted()
    made = once(counted.stage, Section(), one.home())
    assert [path.rpartition("/")[2].partition("?")[0] for path in front.puts][-1] == "manifest.json"  # last
    there = once(counted.stage, Section(), other.home())
    assert counted.made == 1 and there.path != made.path
    assert there.manifest == made.manifest
    assert there.read("a.txt") == b"x" and there.read("quarantine/bad.txt") == b"bad"


def test_a_put_that_fails_half_way_leaves_no_artifact_and_no_second_making(one: Machine, other: Machine, front: Front) -> None:
    def cut(request: BaseHTTPRequestHandler) -> bool:
        """Half of the body is read, and the connection closed."""
        if request.command != "PUT" or "bad.txt" not in request.path:
            return False
        request.rfile.read(1)
        return True

    front.fault, counted = cut, Counted()
    with pytest.raises(DloptError, match=r"--home: cannot write s3://bucket/runs/data/\w+/quarantine/bad.txt: "):
        once(counted.stage, Section(), one.home())
    front.fault = None
    (path,) = (one.home() / "data").glob("[!.]*")
    home = other.home()
    assert not is_sealed(home / "data" / path.name)
    with pytest.raises(DloptError, match=r"not a finished artifact"):
        Artifact.open(home / "data" / path.name)
    once(counted.stage, Section(), one.home())
    assert counted.made == 1 and is_sealed(other.home() / "data" / path.name)


def test_a_killed_machine_leaves_what_is_made_anew_elsewhere(one: Machine, other: Machine, front: Front) -> None:
    counted = Counted()
    path = once(counted.stage, Section(), one.home()).path
    found = remote_of(path)
    assert found
    found.filesystem.delete_file(found.key(path / "manifest.json"))  # as if it had been killed before the last put
    assert once(counted.stage, Section(), other.home()).info == {"made": 2}


def test_a_damaged_store_is_one_line(one: Machine, other: Machine, front: Front) -> None:
    path = once(Counted().stage, Section(), one.home()).path
    found = remote_of(path)
    assert found
    found.filesystem.delete_file(found.key(path / "a.txt"))
    place = other.home() / "data" / path.name
    with pytest.raises(DloptError, match=r"s3://bucket/runs/data/\w+/a.txt: missing: delete the folder"):
        Artifact.open(place)
    assert not (place / "manifest.json").exists()
    with found.filesystem.open_output_stream(found.key(path / "manifest.json")) as sink:
        sink.write(b"{half")
    with pytest.raises(DloptError, match=r"manifest.json: damaged: delete the folder s3://bucket/runs/data"):
        Artifact.open(place)


def test_checkpoints_lie_in_the_store(one: Machine) -> None:
    home = one.home()
    found = store_of(home / "model" / "abc", Checkpointing())
    assert isinstance(found, Bucket) and found.where() == "s3://bucket/runs/model/abc/checkpoints"
    found.write("000001-epoch-00000-batch-000001", [("state.json", [b"{}"])])
    assert found.names() == ["000001-epoch-00000-batch-000001"]


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("s3://nobucket/runs", "--home: s3://nobucket/runs: there is no bucket nobucket: make it"),
        (ADDRESS, "--home: s3://bucket/runs does not let you write: "),
        ("ftp://bucket/runs", "ftp:// is not known"),
    ],
    ids=["no-bucket", "denied", "scheme"],
)
def test_a_home_that_takes_nothing_is_one_line(address: str, says: str, front: Front, one: Machine) -> None:
    def deny(request: BaseHTTPRequestHandler) -> bool:
        if request.command != "PUT":
            return False
        request.send_response(403)
        text = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)
        return True

    front.fault = deny
    with pytest.raises(DloptError, match=says):
        remote.refuse_unwritable(home_path(address))


def test_a_listing_that_is_late_hides_a_run_and_loses_none(one: Machine, other: Machine, front: Front) -> None:
    home = one.home()
    for name in ("tiny-1", "tiny-2"):
        (home / name).mkdir(parents=True)
        for file in (runs.JOB, runs.REPORT, runs.RUN):
            (home / name / file).write_text(json.dumps({"name": "tiny", "created": name, "artifacts": {}}))
        remote.give(*(home / name / file for file in (runs.JOB, runs.REPORT, runs.RUN)))
    assert [record["run"].rpartition("/")[2] for record in runs.listing(other.home())] == ["tiny-2", "tiny-1"]
    front.fault = lambda request: "list-type" in request.path and empty(request)
    assert runs.listing(Machine(other.folder.parent / "third", other.monkeypatch).home()) == []
    assert runs.find(f"{ADDRESS}/tiny-1", Path("runs")).name == "tiny-1"
    with pytest.raises(DloptError, match=r"s3://bucket/runs/tiny-9: there is no run: `dlopt runs --home s3://bucket/runs`"):
        runs.find(f"{ADDRESS}/tiny-9", Path("runs"))


def empty(request: BaseHTTPRequestHandler) -> bool:
    """A listing of nothing."""
    text = b"<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>0</KeyCount></ListBucketResult>"
    request.send_response(200)
    request.send_header("Content-Length", str(len(text)))
    request.end_headers()
    request.wfile.write(text)
    return True


def test_machines_talk_by_files(one: Machine, other: Machine) -> None:
    """What a worker says comes to the driver, what the driver asks for to the worker; nobody takes back what is its own."""
    out = one.home(spread=True) / "model" / "a"
    driver = Exchange(remote_of(out), out, ["stop"], ["metrics.jsonl"])  # type: ignore[arg-type]
    far = other.home(spread=True) / "model" / "a"
    worker = Exchange(remote_of(far), far, ["metrics.jsonl"], ["stop"])  # type: ignore[arg-type]
    for folder in (out, far):
        folder.mkdir(parents=True)
    (far / "metrics.jsonl").write_text("1\n")
    worker.look()
    driver.look()
    assert (out / "metrics.jsonl").read_text() == "1\n"
    (far / "metrics.jsonl").write_text("1\n2\n")
    (out / "stop").touch()
    for exchange in (worker, driver, worker):
        exchange.look()
    assert (out / "metrics.jsonl").read_text() == "1\n2\n" and (far / "stop").exists()
    (out / "stop").unlink()
    driver.look()
    worker.look()
    assert not (far / "stop").exists()
    mine = Exchange(worker.found, far, [], ["metrics.jsonl"])
    (far / "metrics.jsonl").write_text("1\n2\n3\n")
    mine.look()
    assert (far / "metrics.jsonl").read_text() == "1\n2\n3\n"


def test_pieces_of_other_machines_are_fetched_by_name(one: Machine, other: Machine) -> None:
    """As the passes of prepare do on several nodes, of which each has a cache; the path is the driver's."""
    import pyarrow as pa

    from dlopt.data.table.spill import open_rows, write_rows

    home = one.home(spread=True)
    path = write_rows(pa.table({"x": [1, 2]}), home / "spill")
    Path(path).unlink()  # so that it is as on another machine
    assert open_rows(path).to_pydict() == {"x": [1, 2]}
    home = one.home()
    path = write_rows(pa.table({"x": [1]}), home / "spill")
    found = remote_of(home)
    assert found and not found.has(Path(path))  # of one machine alone nothing is sent that only it needs


TINY = """
name: tiny
data:
  source: {{kind: csv, path: {path}}}
  inputs: [{{kind: number, columns: [x]}}]
  target: {{kind: category, column: y}}
model: {{kind: linear}}
train: {{epochs: 2, batch_size: 16}}
resources: {{workers: 0}}
"""


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_in_a_store_is_all_cache_on_another_machine(
    one: Machine, other: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data.csv").write_text("x,y\n" + "".join(f"{n / 10},{'ab'[n % 2]}\n" for n in range(100)))
    (tmp_path / "tiny.yaml").write_text(TINY.format(path=tmp_path / "data.csv"))
    one.home()
    first = printed("run", tmp_path / "tiny.yaml", "--home", ADDRESS)
    assert first["run"].startswith("s3://bucket/runs/tiny-")
    other.home()
    began = time.monotonic()
    again = printed("run", tmp_path / "tiny.yaml", "--home", ADDRESS)
    assert again["run"] == first["run"] and again["metrics"] == first["metrics"]
    assert "all is done already" in again["said"], f"{time.monotonic() - began:.1f} s"
    listed = json.loads(here(capsys, "runs", "--home", ADDRESS, "--json").stdout)
    assert [(record["run"], record["metrics"]) for record in listed] == [(first["run"], first["metrics"])]
    folder = runs.find(first["run"], tmp_path)
    assert folder.is_relative_to(tmp_path / "other") and runs.exported(folder)[1].check("model.onnx").is_file()
    found = remote_of(folder)
    assert found
    assert {info.base_name for info in found.filesystem.get_file_info(fs.FileSelector(found.key(folder)))} >= {"report.html", "model.onnx"}
    assert "nothing is removed in an object store" in refused_here(capsys, "gc", "--home", ADDRESS)
