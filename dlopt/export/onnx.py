"""The export stage: the trained network as one ONNX file, proven equal to it on the whole test split."""

from __future__ import annotations

import logging
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
from dlopt.part import DloptError, Signature
from dlopt.progress import Progress, silent
from dlopt.train.evaluate import probabilities
from dlopt.train.section import Fit
from dlopt.train.worker import load_network

MODEL, OUTPUT = "model.onnx", "probabilities"
LARGEST = 2**31 - 1
"""An ONNX file is one protobuf message, which cannot have more bytes."""


def export(section: Onnx, out: Path, model: Artifact, data: Artifact, *, progress: Progress = silent) -> dict[str, Any]:
    """Write model.onnx and signature.json; returns the largest difference from torch, in probability.

    Raises RuntimeError when the file's outputs differ from torch's by more than the tolerance, or give another label.
    """
    progress("export", None, "writing ONNX")
    signature = Signature.model_validate_json(model.read("signature.json"))
    network = trained_network(model, data)
    expected_from = next(split for name in ("test", "validation", "train") if len(split := Split.open(data, name)))
    expected, _ = probabilities(network, expected_from, torch.device("cpu"))
    content = _graph(network.float(), signature, model.manifest.digest)
    progress("export", None, f"comparing {len(expected):,} rows with torch")
    largest, other_labels = compare(content, signature, expected_from, expected.numpy())
    if largest > section.tolerance or other_labels or not np.isfinite(largest):
        raise RuntimeError(
            f"export refused: the ONNX file differs from torch by up to {largest:.2g} (export.tolerance is {section.tolerance:g}) "
            f"and gives another label on {other_labels} of {len(expected)} rows"
        )
    write_atomically(out / MODEL, content)
    write_atomically(out / "signature.json", model.read("signature.json"))
    return {
        "largest_difference": largest,
        "rows": len(expected),
        "opset": onnx.load_from_string(content).opset_import[0].version,
        "bytes": len(content),
    }


EXPORT = Stage("export", export)


def trained_network(model: Artifact, data: Artifact) -> Network:
    """The network of a model artifact with its trained weights, ready to predict."""
    network = load_network(Fit.model_validate(model.manifest.section), data)
    network.load_state_dict(load_tensors(model.read("weights.safetensors")))
    return network.eval()


def compare(content: bytes, signature: Signature, split: Split, expected: np.ndarray) -> tuple[float, int]:
    """Run the file on a split: the largest difference in probability, and how many rows get another label."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest, other_labels, start = 0.0, 0, 0
    for chunk in split.chunks:
        rows = split.read([chunk])
        (found,) = session.run([OUTPUT], {feature.name: rows[feature.name] for feature in signature.inputs})
        part = expected[start : start + len(found)]
        largest = max(largest, float(np.abs(found - part).max()))
        other_labels += int((found.argmax(axis=1) != part.argmax(axis=1)).sum())
        start += len(found)
    return largest, other_labels


class _Graph(nn.Module):
    """Tensors in the order of the signature to probabilities, as the file has them."""

    def __init__(self, network: Network, signature: Signature) -> None:
        super().__init__()
        self.network, self.names = network, [feature.name for feature in signature.inputs]

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(dict(zip(self.names, inputs, strict=True)))
        return logits.softmax(dim=1)


def _graph(network: Network, signature: Signature, digest: str) -> bytes:
    rows = torch.export.Dim("rows")
    example = tuple(torch.zeros(2, *feature.shape, dtype=getattr(torch, feature.dtype)) for feature in signature.inputs)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Graph(network, signature).eval(),
            example,
            input_names=[feature.name for feature in signature.inputs],
            output_names=[OUTPUT],
            dynamic_shapes=(tuple({0: rows} for _ in example),),
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    file = program.model_proto
    if file.ByteSize() > LARGEST:
        raise DloptError("export: the model has over 2 GiB, more than one ONNX file can hold: make it smaller")
    onnx.helper.set_model_props(file, {"signature": signature.model_dump_json(), "model_digest": digest})
    onnx.checker.check_model(file)
    return bytes(file.SerializeToString())
