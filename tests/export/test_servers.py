"""The servers themselves, from environments of their own: $DLOPT_SIDE is a folder with triton and torchserve, each a virtual environment.

triton: Python 3.11, numpy==1.26.4 onnxruntime tritonclient[http], and `pip install --no-deps nvidia-pytriton==0.7.0`, which has the
server's binary with the backend python. torchserve: torchserve==0.12.0, torch and numpy, and Java.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlopt.artifact import once
from dlopt.export import TorchServe, Triton
from dlopt.export.stage import EXPORT
from dlopt.models import Mlp
from dlopt.train.start import trained_network
from tests import sets
from tests.export.test_export import torchs
from tests.export.test_platforms import TABLE
from tests.sets import inputs_of

SIDE = os.environ.get("DLOPT_SIDE", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SIDE, reason="DLOPT_SIDE names no folder of servers' environments")]

ASKING = """
import json, sys
import numpy as np
import tritonclient.http as triton
client = triton.InferenceServerClient(sys.argv[1])
given, found = dict(np.load(sys.argv[2], allow_pickle=True)), []
kinds = {one["name"]: one["datatype"] for one in client.get_model_metadata("model")["inputs"]}
for count in (1, 2, 40):
    inputs = [triton.InferInput(name, values[:count].shape, kinds[name]) for name, values in given.items()]
    for one, values in zip(inputs, given.values()):
        one.set_data_from_numpy(values[:count])
    answer = client.infer("model", inputs)
    found.append(answer.as_numpy(answer.get_response()["outputs"][0]["name"]).tolist())
print(json.dumps(found))
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def running(words: list[str], ready: str, log: Path, **more: Any) -> Iterator[None]:
    """A server, until it is of no more use."""
    with open(log, "w") as file:
        server = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, **more)
    try:
        end = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(ready, timeout=2):
                    break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(0.3)
        yield
    finally:
        server.terminate()
        server.wait(30)


def test_tritons_own_server_says_what_torch_says(tmp_path: Path) -> None:
    home = Path(SIDE) / "triton"
    data = sets.prepared(tmp_path, TABLE)
    weights = sets.trained(tmp_path, data, Mlp(hidden=(8,)))
    export = once(EXPORT, Triton(backend="python"), tmp_path, weights, data)
    server = next(home.glob("lib/python3*/site-packages/pytriton/tritonserver"))
    backends = tmp_path / "backends"
    shutil.copytree(server / "backends", backends)
    stubs = next(server.parent.rglob("python_backend_stubs/3.11/triton_python_backend_stub"))
    shutil.copy(stubs, backends / "python")
    (tmp_path / "repository").mkdir()
    shutil.copytree(export.path / "model", tmp_path / "repository" / "model")
    port = free_port()
    words = [str(server / "bin" / "tritonserver"), f"--model-repository={tmp_path / 'repository'}", f"--backend-directory={backends}"]
    words += ["--http-address=127.0.0.1", f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false"]
    environment = os.environ | {
        "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(server.parents[1] / "nvidia_pytriton.libs"),
    }
    rows = inputs_of(TABLE, 40, seed=9)
    from tests.export.test_export import strings

    given = tmp_path / "rows.npz"
    np.savez(given, **strings(TABLE, rows))
    with running(words, f"http://127.0.0.1:{port}/v2/models/model/ready", tmp_path / "log", env=environment):
        asked = [str(home / "bin" / "python"), "-c", ASKING, f"127.0.0.1:{port}", str(given)]
        done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = torchs(trained_network(weights, data), rows, TABLE.target)
    for found in json.loads(done.stdout):
        np.testing.assert_allclose(np.array(found), expected[: len(found)], atol=1e-5)


def test_torchserve_itself_says_what_torch_says(tmp_path: Path) -> None:
    home = Path(SIDE) / "torchserve"
    data = sets.prepared(tmp_path, TABLE)
    weights = sets.trained(tmp_path, data, Mlp(hidden=(8,)))
    export = once(EXPORT, TorchServe(), tmp_path, weights, data)
    ports = [free_port() for _ in range(3)]
    places = zip(("inference", "management", "metrics"), ports, strict=True)
    lines = [f"{name}_address=http://127.0.0.1:{port}" for name, port in places]
    lines += ["default_workers_per_model=1", "disable_token_authorization=true", "enable_envvars_config=false"]
    (tmp_path / "config.properties").write_text("\n".join(lines))
    words = [str(home / "bin" / "torchserve"), "--start", "--foreground", "--ncs", "--model-store", str(export.path)]
    words += ["--models", "model=model.mar", "--ts-config", str(tmp_path / "config.properties"), "--disable-token-auth"]
    environment = os.environ | {
        "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
        "LOG_LOCATION": str(tmp_path),
        "METRICS_LOCATION": str(tmp_path),
    }
    rows = [{"a": 1.5, "b": None, "c": "7", "carrier": "UA", "origin": None, "tail": "x", "flight": "AA1"}] * 2
    with running(words, f"http://127.0.0.1:{ports[1]}/models/model", tmp_path / "log", env=environment, cwd=tmp_path):
        answer = _posted(f"http://127.0.0.1:{ports[0]}/predictions/model", {"instances": rows})
        with pytest.raises(urllib.error.HTTPError) as refused:
            _posted(f"http://127.0.0.1:{ports[0]}/predictions/model", [1])
    assert refused.value.code == 400 and b"each row an object" in refused.value.read()
    from dlopt.api.predict import Model
    from dlopt.export import Onnx

    expected = Model(once(EXPORT, Onnx(), tmp_path, weights, data).read(Onnx.file), TABLE).outputs(rows)
    found = [list(row["probabilities"].values()) for row in answer["predictions"]]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def _posted(url: str, body: Any) -> Any:
    """The answer, once the server's worker is there: it says 503 until then."""
    end = time.monotonic() + 60
    while True:
        try:
            given = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
            with urllib.request.urlopen(given, timeout=30) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code not in (500, 503) or time.monotonic() > end:
                raise
            time.sleep(0.5)
