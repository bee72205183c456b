"""Clients that know nothing of us, unchanged, in an environment of their own: Triton's and KServe's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from dlopt.artifact import Artifact
from tests.conftest import missing
from tests.served import Server, make_export

pytestmark = pytest.mark.slow
IMAGES = np.random.default_rng(11).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_export(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def server(export: Artifact) -> Iterator[Server]:
    made = Server(export, '{"drain_seconds": 0}', host="", ray=False, rpc=True)
    try:
        yield made.wait()
    finally:
        made.stop()


def said(package: str, script: str, server: Server, folder: Path) -> dict[str, object]:
    """What a script prints in a fresh environment with one package: an object in JSON."""
    subprocess.run([sys.executable, "-m", "venv", folder / "side"], check=True, timeout=300)
    python = folder / "side" / "bin" / "python"
    installed = subprocess.run([python, "-m", "pip", "install", "-q", package], capture_output=True, text=True, timeout=600)
    if installed.returncode:
        missing(f"{package} cannot be installed: {installed.stderr[-300:]}")
    np.save(folder / "images.npy", IMAGES)
    arguments = [python, "-c", script, str(server.rpc_port if package.endswith("[grpc]") else server.port), str(folder / "images.npy")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def expected(export: Artifact) -> np.ndarray:
    (outputs,) = onnxruntime.InferenceSession(export.path / "model.onnx").run(None, {"image": IMAGES})
    return np.asarray(outputs)


TRITON = """
import itertools, json, sys
import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

client, images = triton.InferenceServerClient(f"127.0.0.1:{sys.argv[1]}"), np.load(sys.argv[2])
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("digits") and not client.is_model_ready("none")
assert client.is_model_ready("digits", "1")
asked = {"metadata": client.get_model_metadata("digits"), "config": client.get_model_config("digits")}
assert client.get_server_metadata()["name"] == "dlopt"
found = []
for binary, back, packed in itertools.product((True, False), (True, False), (None, "gzip", "deflate")):
    tensor = triton.InferInput("image", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, binary_data=binary)
    outputs = [triton.InferRequestedOutput(name, binary_data=back) for name in ("probabilities", "label")]
    reply = client.infer("digits", [tensor], outputs=outputs, request_id="7", request_compression_algorithm=packed,
                         response_compression_algorithm=packed)
    assert reply.get_response()["id"] == "7"
    found.append([reply.as_numpy("probabilities").tolist(), reply.as_numpy("label").tolist()])
reply = client.infer("digits", [tensor], model_version="1")
found.append([reply.as_numpy("probabilities").tolist(), reply.as_numpy("label").tolist()])
errors = []
for name, shape in (("digits", [5, 28, 27, 1]), ("none", list(images.shape))):
    tensor = triton.InferInput("image", shape, "UINT8")
    tensor.set_data_from_numpy(np.zeros(shape, np.uint8))
    try:
        client.infer(name, [tensor])
    except InferenceServerException as error:
        errors.append(error.message())
client.unload_model("digits")
assert not client.is_model_ready("digits")
client.load_model("digits")
assert client.is_model_ready("digits")
print(json.dumps({"found": found, "errors": errors, "index": client.get_model_repository_index(), **asked}))
"""


def test_tritonclient(server: Server, export: Artifact, tmp_path: Path) -> None:
    told = said("tritonclient[http]", TRITON, server, tmp_path)
    wanted = expected(export)
    assert len(told["found"]) == 13  # type: ignore[arg-type]
    for probabilities, labels in told["found"]:  # type: ignore[attr-defined]
        np.testing.assert_allclose(probabilities, wanted, atol=1e-6)
        assert labels == wanted.argmax(axis=1).tolist()
    assert told["errors"] == [
        "image: shape [5, 28, 27, 1] where [5, 28, 28, 1] is needed",
        "Servable not found for request: Latest(none)",
    ]
    assert told["index"] == [{"name": "digits", "version": "1", "state": "READY", "reason": ""}]


TRITON_GRPC = """
import json, sys
import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

client, images = triton.InferenceServerClient(f"127.0.0.1:{sys.argv[1]}"), np.load(sys.argv[2])
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("digits") and not client.is_model_ready("none")
assert client.is_model_ready("digits", "1") and client.get_server_metadata().name == "dlopt"
metadata = client.get_model_metadata("digits", as_json=True)
found = []
for packed in (None, "gzip", "deflate"):
    tensor = triton.InferInput("image", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images)
    outputs = [triton.InferRequestedOutput(name) for name in ("probabilities", "label")]
    reply = client.infer("digits", [tensor], outputs=outputs, request_id="7", compression_algorithm=packed)
    assert reply.get_response().id == "7"
    found.append([reply.as_numpy("probabilities").tolist(), reply.as_numpy("label").tolist()])
answers = []
client.async_infer("digits", [tensor], lambda result, error: answers.append(error or result), model_version="1")
while not answers:
    pass
found.append([answers[0].as_numpy("probabilities").tolist(), answers[0].as_numpy("label").tolist()])
errors = []
for name, shape in (("digits", [5, 28, 27, 1]), ("none", list(images.shape))):
    tensor = triton.InferInput("image", shape, "UINT8")
    tensor.set_data_from_numpy(np.zeros(shape, np.uint8))
    try:
        client.infer(name, [tensor])
    except InferenceServerException as error:
        errors.append([error.status(), error.message()])
client.unload_model("digits")
assert not client.is_model_ready("digits")
client.load_model("digits")
assert client.is_model_ready("digits")
index = client.get_model_repository_index(as_json=True)
print(json.dumps({"found": found, "errors": errors, "index": index, "metadata": metadata}))
"""


def test_tritonclient_over_grpc(server: Server, export: Artifact, tmp_path: Path) -> None:
    told = said("tritonclient[grpc]", TRITON_GRPC, server, tmp_path)
    wanted = expected(export)
    assert len(told["found"]) == 4  # type: ignore[arg-type]
    for probabilities, labels in told["found"]:  # type: ignore[attr-defined]
        np.testing.assert_allclose(probabilities, wanted, atol=1e-6)
        assert labels == wanted.argmax(axis=1).tolist()
    assert told["errors"] == [
        ["StatusCode.INVALID_ARGUMENT", "image: shape [5, 28, 27, 1] where [5, 28, 28, 1] is needed"],
        ["StatusCode.NOT_FOUND", "Servable not found for request: Latest(none)"],
    ]
    assert told["index"] == {"models": [{"name": "digits", "version": "1", "state": "READY"}]}
    assert told["metadata"]["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": ["-1", "28", "28", "1"]}]  # type: ignore[index]


KSERVE = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

url, images = f"http://127.0.0.1:{sys.argv[1]}", np.load(sys.argv[2])


async def main():
    v1, v2 = (InferenceRESTClient(RESTConfig(protocol=protocol, retries=1)) for protocol in ("v1", "v2"))
    assert await v2.is_server_live(url) and await v2.is_server_ready(url) and await v2.is_model_ready(url, "digits")
    assert await v1.is_model_ready(url, "digits")
    found = []
    for binary in (False, True):
        tensor = InferInput("image", list(images.shape), "UINT8")
        tensor.set_data_from_numpy(images, binary_data=binary)
        reply = await v2.infer(url, InferRequest(model_name="digits", infer_inputs=[tensor]), model_name="digits")
        output = next(one for one in reply.outputs if one.name == "probabilities")
        found.append(np.asarray(output.as_numpy()).reshape(len(images), -1).tolist())
    rows = (await v1.infer(url, {"instances": images[..., 0].tolist()}, model_name="digits"))["predictions"]
    found.append([row["probabilities"] for row in rows])
    print(json.dumps({"found": found}))


asyncio.run(main())
"""


def test_kserve(server: Server, export: Artifact, tmp_path: Path) -> None:
    told = said("kserve", KSERVE, server, tmp_path)
    for probabilities in told["found"]:  # type: ignore[attr-defined]
        np.testing.assert_allclose(probabilities, expected(export), atol=1e-6)
