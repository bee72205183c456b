"""Three machines that share neither a disk nor loopback: network namespaces, with runs in an object store. The result is that of one."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.commands import ROOT, dlopt
from tests.netns import BIN, NET, SWITCH, TOKEN, Network, network
from tests.packages import package

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("mnist")]
HOME = "s3://bucket/runs"
JOB = ("jobs/mnist.yaml", "train.epochs=3", "serve.replicas=2", "serve.drain_seconds=0")
WORKERS = "resources.workers=3"


class Machines:
    """A head without CPUs on machine 1, and nodes of one CPU on machines 1 to 3."""

    def __init__(self, net: Network) -> None:
        self.net = net
        self.names = [net.join(number) for number in (1, 2, 3)]
        net.start(net.switch, [BIN / "python", "-m", "moto.server", "-H", SWITCH, "-p", "5000"], "store.log")
        ray = ["--num-cpus=1", f"--object-store-memory={120 * 2**20}", "--disable-usage-stats", "--block"]
        head = ["--head", f"--node-ip-address={NET}1", f"--dashboard-host={NET}1", f"--temp-dir={net.folder}/ray", *ray]
        self.nodes = {1: net.start(self.names[0], [BIN / "ray", "start", *head], "1.log", host="one")}
        self.wait(lambda: self.asked("api/version") is not None, "the head")
        for number in (2, 3):
            self.add(number)
        self.wait(lambda: len(self.alive()) == 3, "three nodes")
        files = self.at(1, "python", "-c", MAKE_BUCKET)
        assert files.returncode == 0, files.stderr

    def add(self, number: int) -> None:
        """Start Ray on a machine, whose disks are empty."""
        words = [BIN / "ray", "start", f"--address={NET}1:6379", f"--node-ip-address={NET}{number}", "--num-cpus=1", "--block"]
        host = {2: "two", 3: "three"}[number]
        self.nodes[number] = self.net.start(self.names[number - 1], [*words, "--disable-usage-stats"], f"{number}.log", host=host)

    def at(self, number: int, *words: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """A program on a machine, ended."""
        command = ["ip", "netns", "exec", self.names[number - 1], *map(str, words)]
        outside = self.net.environment(XDG_CACHE_HOME=str(self.net.folder / "own"))
        return subprocess.run(command, env=outside, cwd=ROOT, capture_output=True, text=True, timeout=timeout)

    def asked(self, path: str) -> Any:
        """What the head's dashboard says."""
        code = f"import httpx; print(httpx.get('http://{NET}1:8265/{path}', headers={{'Authorization': 'Bearer {TOKEN}'}}, timeout=5).text)"
        ended = self.at(1, "python", "-c", code)
        return json.loads(ended.stdout) if ended.returncode == 0 else None

    def alive(self) -> list[str]:
        found = self.asked("nodes?view=summary") or {}
        summary = found.get("data", {}).get("summary", [])
        return [node["ip"] for node in summary if node["raylet"].get("state") == "ALIVE"]

    def submit(self, *words: str) -> subprocess.Popen[Any]:
        """Of a job, as a client on machine 1 does it."""
        command = [BIN / "dlopt", "submit", *JOB, WORKERS, *words, "--address", f"http://{NET}1:8265", "--home", HOME, "--json"]
        return self.net.start(self.names[0], command, "submit.log", host="", XDG_CACHE_HOME=str(self.net.folder / "own"))

    def ended(self, process: subprocess.Popen[Any], seconds: float = 420) -> dict[str, Any]:
        """What a job said last."""
        log = self.net.folder / "submit.log"
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(log.read_text()) from None
        assert process.returncode == 0, log.read_text()
        return dict(json.loads(log.read_text().splitlines()[-1]))

    def wait(self, until: Callable[[], object], what: str, seconds: float = 120) -> float:
        """How long it took."""
        began = time.monotonic()
        while not until():
            logs = "\n".join(path.read_text()[-2000:] for path in self.net.folder.glob("*.log"))
            assert time.monotonic() - began < seconds, f"{what}: not in {seconds} s\n{logs}"
            time.sleep(0.5)
        return time.monotonic() - began


MAKE_BUCKET = """
import os, pyarrow.fs as fs
at = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
fs.S3FileSystem(endpoint_override=at, scheme="http", access_key="test", secret_key="test", allow_bucket_creation=True).create_dir("bucket")
"""


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    package("moto.server", "test")
    with tempfile.TemporaryDirectory(prefix="dl", dir="/tmp") as folder, network(Path(folder)) as net:  # sockets have short paths
        yield Machines(net)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same job in one process, without a cluster."""
    home = tmp_path_factory.mktemp("alone")
    ended = dlopt("run", *JOB, "resources.workers=0", "--home", home)
    assert ended.returncode == 0, ended.stderr
    return weights(Path(ended.stdout.strip()) / "weights.safetensors")


def weights(path: Path) -> dict[str, Any]:
    return load_file(path)


def fetched(machines: Machines, run: str) -> dict[str, Any]:
    """The weights of a run in the store, as a fourth machine gets them."""
    code = (
        "import sys; from dlopt import runs; from pathlib import Path; "
        "folder = runs.find(sys.argv[1], Path('.')); print(runs.artifact(folder, runs.read(folder), 'model').check('weights.safetensors'))"
    )
    ended = machines.at(1, "python", "-c", code, run)
    assert ended.returncode == 0, ended.stderr
    return weights(Path(ended.stdout.strip()))


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float(abs(one[name].astype("float64") - other[name].astype("float64")).max()) for name in one)


def test_three_machines_train_the_model_of_one(machines: Machines, alone: dict[str, Any], record_property: Any) -> None:
    """Prepare, train with three workers, export; a second submission is all cache."""
    found = machines.ended(machines.submit())
    assert found["status"] == "SUCCEEDED" and found["run"].startswith(f"{HOME}/mnist-")
    largest = difference(fetched(machines, found["run"]), alone)
    record_property("three machines: largest difference of a weight", largest)
    assert largest < 1e-5
    again = machines.ended(machines.submit())
    assert (again["run"], again["made"]) == (found["run"], [])


def test_a_machine_that_is_lost_costs_nothing(machines: Machines, record_property: Any) -> None:
    """T6 and N1: a cable out for 3 seconds is waited out; a machine that dies is replaced, and training goes on from a checkpoint."""
    given = ("train.epochs=60", "train.precision=float64")
    process = machines.submit(*given, "resources.checkpoint={every: {steps: 50}}")
    say = machines.net.folder / "submit.log"

    def epoch() -> int:
        return max(map(int, re.findall(r"epoch (\d+)/60", say.read_text())), default=0)

    machines.wait(lambda: epoch() >= 2, "the second epoch", 240)
    machines.net.plug(3, False)
    time.sleep(3)
    machines.net.plug(3, True)
    reached = epoch()
    machines.wait(lambda: epoch() > reached, "the next epoch", 120)
    assert "was lost" not in say.read_text()
    machines.net.kill(machines.names[2])
    machines.wait(lambda: "was lost" in say.read_text(), "notice of the loss", 90)
    machines.add(3)
    seconds = machines.wait(lambda: "training goes on from step" in say.read_text(), "recovery", 120)
    record_property("T6 on three machines: seconds from a machine's return to training", round(seconds, 1))
    found = machines.ended(process)
    undisturbed = dlopt("run", *JOB, *given, "resources.workers=0", "--home", machines.net.folder / "undisturbed")
    largest = difference(fetched(machines, found["run"]), weights(Path(undisturbed.stdout.strip()) / "weights.safetensors"))
    record_property("T6 on three machines: largest difference of a weight", largest)
    assert largest < 1e-6
