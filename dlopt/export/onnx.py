"""The export stage: the trained network as one ONNX file, proven equal to it on the whole test split."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from dlopt.artifact import Artifact, Stage, write_atomically
from dlopt.data.prepared import Split
from dlopt.export import Onnx
from dlopt.models import Network
from dlopt.part import OUTPUT, DloptError, Signature
from dlopt.progress import Progress, silent
from dlopt.train.evaluate import probabilities
from dlopt.train.section import Fit
from dlopt.train.worker import load_network

MODEL, OPSET = "model.onnx", 18
LARGEST = 2**31 - 1
"""An ONNX file is one protobuf message, which cannot have more bytes."""
TIE = 1e-6
"""Two classes whose probabilities in torch are as close as float32 rounds: either is the label, as the order of a sum has it."""


def export(section: Onnx, out: Path, model: Artifact, data: Artifact, *, progress: Progress = silent) -> dict[str, Any]:
    """Write model.onnx and signature.json; returns the largest difference from torch, in probability.

    Raises RuntimeError when the file's outputs differ from torch's by more than the tolerance, are not finite, or give another
    label on a row that is no tie.
    """
    progress("export", None, "writing ONNX")
    signature = Signature.model_validate_json(model.read("signature.json"))
    network = trained_network(model, data)
    name, split = next((name, split) for name in ("test", "validation", "train") if len(split := Split.open(data, name)))
    expected, _ = probabilities(network, split, torch.device("cpu"))
    content = _graph(network.float(), signature, model.manifest.digest)
    progress("export", None, f"comparing {len(expected):,} rows with torch")
    largest, other_labels = compare(content, signature, split, expected.numpy())
    if other_labels or not largest <= section.tolerance:
        raise RuntimeError(
            f"export refused: on the {name} split the ONNX file differs from torch by up to {largest:.2g} (export.tolerance is "
            f"{section.tolerance:g}) and gives another label on {other_labels} of {len(expected)} rows"
        )
    write_atomically(out / MODEL, content)
    write_atomically(out / "signature.json", model.read("signature.json"))
    return {
        "largest_difference": largest,
        "split": name,
        "rows": len(expected),
        "opset": OPSET,
        "bytes": len(content),
    }


EXPORT = Stage("export", export)


def trained_network(model: Artifact, data: Artifact) -> Network:
    """The network of a model artifact with its trained weights, ready to predict."""
    network = load_network(Fit.model_validate(model.manifest.section), data)
    network.load_state_dict(load_tensors(model.read("weights.safetensors")))
    return network.eval()


def compare(content: bytes, signature: Signature, split: Split, expected: np.ndarray) -> tuple[float, int]:
    """Run the file on a split: the largest difference in probability, NaN when an output is, and how many rows get another label.

    expected: torch's probabilities, float64 (rows, classes).
    """
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest, other_labels, start = 0.0, 0, 0
    for chunk in split.chunks:
        rows = split.read([chunk])
        (found,) = session.run([OUTPUT], {feature.name: rows[feature.name] for feature in signature.inputs})
        part = expected[start : start + len(found)]
        largest = float(np.maximum(largest, np.abs(found - part).max()))  # Python's max would lose a NaN
        other_labels += _other_labels(found, part)
        start += len(found)
    return largest, other_labels


def _other_labels(found: np.ndarray, expected: np.ndarray) -> int:
    """Rows to which `found` gives a label that `expected` does not, be it as one of a tie."""
    given = np.take_along_axis(expected, found.argmax(axis=1)[:, None], axis=1)[:, 0]
    return int((expected.max(axis=1) - given > TIE).sum())


class _Graph(nn.Module):
    """Tensors in the order of the signature to probabilities, as the file has them."""

    def __init__(self, network: Network, signature: Signature) -> None:
        super().__init__()
        self.network, self.names = network, [feature.name for feature in signature.inputs]

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(dict(zip(self.names, inputs, strict=True)))
        return logits.softmax(dim=1)


def _graph(network: Network, signature: Signature, digest: str) -> bytes:
    """The network as an ONNX file, by tracing: the exporter that goes through torch.export takes seconds for the same graph."""
    _refuse_too_large(network)
    names, file = [feature.name for feature in signature.inputs], io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing being deprecated; what a trace could get wrong, `compare` sees
        torch.onnx.export(
            _Graph(network, signature).eval(),
            tuple(torch.zeros(2, *feature.shape, dtype=getattr(torch, feature.dtype)) for feature in signature.inputs),
            file,  # type: ignore[arg-type]  # a buffer will do when tracing
            input_names=names,
            output_names=[OUTPUT],
            dynamic_axes={name: {0: "rows"} for name in (*names, OUTPUT)},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load_from_string(file.getvalue())
    onnx.helper.set_model_props(model, {"signature": signature.model_dump_json(), "model_digest": digest})
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _refuse_too_large(network: nn.Module) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    if size > LARGEST:
        raise DloptError(f"export: the model has {size / 2**30:.1f} GiB, and one ONNX file holds less than 2: make it smaller")
