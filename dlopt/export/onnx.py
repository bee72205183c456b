"""The export stage: the trained network as one ONNX file, proven equal to it on the whole test split.

Categories are strings in the graph: nodes LabelEncoder (of the operators ai.onnx.ml) before the traced network turn them into codes.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from dlopt.artifact import Artifact, Stage, write_atomically
from dlopt.data.prepared import Rows, Split
from dlopt.export import Onnx
from dlopt.models import Network, Units
from dlopt.part import DloptError, Feature, Signature, Target
from dlopt.progress import Progress, silent
from dlopt.train.measure.evaluate import predict
from dlopt.train.measure.metrics import activated
from dlopt.train.start import trained_network

MODEL, OPSET, ML_OPSET = "model.onnx", 18, 2
LARGEST = 2**31 - 1
"""An ONNX file is one protobuf message, which cannot have more bytes."""
TIE = 1e-6
"""Two classes whose probabilities in torch are as close as float32 rounds: either is the label, as the order of a sum has it."""
MOST_TOGETHER, MOST_ALONE, SMALLER = 64, 16, 7
"""Rows that are run in several ways to see whether they mix."""
UNKNOWN = "?"
"""Stands for a string that is in no vocabulary; doubled until it is in none."""


def export(section: Onnx, out: Path, model: Artifact, data: Artifact, *, progress: Progress = silent) -> dict[str, Any]:
    """Write model.onnx and signature.json; returns the largest difference from torch: of a probability, or of a number in standard
    deviations.

    Raises RuntimeError when the file's outputs differ from torch's by more than the tolerance, are not finite, or give another
    class or label on a row that is no tie; DloptError when rows change each other's outputs, or ONNX cannot say what the model does.
    """
    progress("export", None, "writing ONNX")
    signature = Signature.model_validate_json(model.read("signature.json"))
    network = trained_network(model, data)
    name, split = next((name, split) for name in ("test", "validation", "train") if len(split := Split.open(data, name)))
    expected = predict(network, split, torch.device("cpu"))[0].numpy()
    content = _graph(network.float(), signature, model.manifest.digest)
    progress("export", None, f"comparing {len(expected):,} rows with torch")
    unit = _unit(network)
    largest, other_labels = compare(content, signature, split, expected, unit)
    if other_labels or not largest <= section.tolerance:
        other = f" and gives another label on {other_labels} of {len(expected)} rows" if signature.target.kind != "number" else ""
        raise RuntimeError(
            f"export refused: on the {name} split the ONNX file differs from torch by up to {largest:.2g} (export.tolerance is "
            f"{section.tolerance:g}){other}"
        )
    refuse_mixing(content, signature, split, section.tolerance, unit)
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


def _unit(network: Network) -> np.ndarray | float:
    """What a difference is measured in: each number's standard deviation, (outputs,); probabilities are what they are."""
    return network.output.std.double().numpy() if isinstance(network.output, Units) else 1.0


def compare(content: bytes, signature: Signature, split: Split, expected: np.ndarray, unit: np.ndarray | float = 1.0) -> tuple[float, int]:
    """Run the file on a split: the largest difference in units, NaN when an output is, and how many rows get other labels.

    expected: torch's probabilities or numbers less the target's offsets, float64 (rows, outputs).
    """
    session = _session(content)
    largest, other_labels, start = 0.0, 0, 0
    offsets = np.array(signature.target.offsets or 0.0)
    for chunk in split.chunks:
        (found,) = session.run([signature.target.output], fed(signature, split.read([chunk])))
        found, part = found - offsets if signature.target.offsets else found, expected[start : start + len(found)]
        largest = float(np.maximum(largest, _differences(found, part, signature, unit).max()))  # Python's max would lose a NaN
        other_labels += _other_labels(found, part, signature.target) if signature.target.kind != "number" else 0
        start += len(found)
    return largest, other_labels


def refuse_mixing(content: bytes, signature: Signature, split: Split, tolerance: float, unit: np.ndarray | float = 1.0) -> None:
    """Run rows of a split together, alone, in another order and in other batches: what a row gets must not depend on its neighbours, which
    are strangers' when the model is served. Raises DloptError."""
    session = _session(content)
    rows = {name: values[:MOST_TOGETHER] for name, values in split.read(split.chunks[:1]).items()}
    count = len(next(iter(rows.values())))

    def run(places: np.ndarray) -> np.ndarray:
        (found,) = session.run([signature.target.output], fed(signature, {name: values[places] for name, values in rows.items()}))
        return np.asarray(found) - np.array(signature.target.offsets or 0.0)

    order = np.arange(count)
    together = run(order)
    ways = {
        "alone": np.concatenate([run(order[[place]]) for place in order[:MOST_ALONE]]),
        "in another order": run(order[::-1])[::-1],
        "in smaller batches": np.concatenate([run(part) for part in np.array_split(order, range(SMALLER, count, SMALLER))]),
    }
    for way, found in ways.items():
        difference = float(_differences(found, together[: len(found)], signature, unit).max())
        if not difference <= tolerance:
            raise DloptError(
                f"export: the model mixes rows: {way}, a row gets another answer (by {difference:.2g}) than among {count}, so a client's "
                "rows would change another's: compute means and the like over a row's own values, and over a batch only in training"
            )


def _session(content: bytes) -> onnxruntime.InferenceSession:
    """Raises DloptError when onnxruntime does not take the file."""
    try:
        return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise _not_onnx(error) from error


def _not_onnx(error: Exception) -> DloptError:
    """In one line: exporters tell long stories."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return DloptError(f"export: the model cannot be written as ONNX: {type(error).__name__}: {said[:300]}")


def _differences(found: np.ndarray, expected: np.ndarray, signature: Signature, unit: np.ndarray | float) -> np.ndarray:
    """In units; of numbers, whose size has nothing to do with their spread, what is beyond the two last places of float32."""
    difference = np.abs(found - expected)
    if signature.target.kind == "number":
        rounding = 2 * np.spacing(np.abs(expected).astype(np.float32)) + np.spacing(np.abs(signature.target.offsets or 0.0))
        difference = np.maximum(difference - rounding, 0)
    return np.asarray(difference / unit)


def _other_labels(found: np.ndarray, expected: np.ndarray, target: Target) -> int:
    """Rows to which `found` gives a label that `expected` does not, be it as one of a tie or of one that is as close to its threshold."""
    if target.kind == "category" and not target.thresholds:
        given = np.take_along_axis(expected, found.argmax(axis=1)[:, None], axis=1)[:, 0]
        return int((expected.max(axis=1) - given > TIE).sum())
    if target.kind == "category":
        found, expected = found[:, [target.positive_index]], expected[:, [target.positive_index]]
    least = np.array(target.thresholds or 0.5)
    other = ((found >= least) != (expected >= least)) & (np.abs(expected - least) > TIE)
    return int(other.any(axis=1).sum())


def fed(signature: Signature, rows: Rows) -> Rows:
    """Prepared rows as the graph takes them: codes of categories as strings again, numbers with their offsets, and texts as long as the
    longest of them."""
    return {feature.name: _fed(feature, rows[feature.name]) for feature in signature.inputs}


def _fed(feature: Feature, values: np.ndarray) -> np.ndarray:
    if feature.dtype == "string":
        return _strings(feature, values)
    if feature.offsets:
        return values + np.array(feature.offsets)
    return values[:, : max(1, int(np.count_nonzero(values, axis=1).max()))] if feature.holds == "tokens" else values


def _strings(feature: Feature, codes: np.ndarray) -> np.ndarray:
    """Codes (rows, columns) to strings that have them: of the code that stands for missing values, "" in every second row."""
    columns = []
    for column, (known, missing) in enumerate(zip(feature.vocabularies, feature.missing, strict=True)):
        unknown = UNKNOWN
        while unknown in known:
            unknown += UNKNOWN
        strings = np.array([unknown, *known], dtype=object)[codes[:, column]]
        strings[(codes[:, column] == missing) & (np.arange(len(codes)) % 2 == 0)] = ""
        columns.append(strings)
    return np.stack(columns, axis=1)


class _Graph(nn.Module):
    """Tensors in the order of the signature to probabilities or numbers, as the file has them: what has offsets as float64 in the data's
    units, of which the network sees the difference from the offset (as dlopt.data.types.exact.shifted computes it), in float32."""

    def __init__(self, network: Network, signature: Signature) -> None:
        super().__init__()
        self.network, self.inputs, self.target = network, signature.inputs, signature.target

    def forward(self, *inputs: Tensor) -> Tensor:
        given = {feature.name: _shifted(values, feature) for feature, values in zip(self.inputs, inputs, strict=True)}
        outputs = activated(self.target, self.network(given))
        return outputs.double() + _double(self.target.offsets) if self.target.offsets else outputs


def _shifted(values: Tensor, feature: Feature) -> Tensor:
    return (values - _double(feature.offsets)).float() if feature.offsets else values


def _double(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _graph(network: Network, signature: Signature, digest: str) -> bytes:
    """The network as an ONNX file: traced, then with the lookup of categories before it."""
    _refuse_too_large(network)
    try:
        model = onnx.load_from_string(_traced(network, signature))
    except Exception as error:  # what torch.onnx and own code raise is of many types
        raise _not_onnx(error) from error
    for index, feature in enumerate(signature.inputs):
        if feature.dtype == "string":
            _look_up(model, index, feature, free_prefix(f"{feature.name} codes", [other.name for other in signature.inputs]))
    helper.set_model_props(model, {"signature": signature.model_dump_json(), "model_digest": digest})
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _traced(network: Network, signature: Signature) -> bytes:
    """By tracing: the exporter that goes through torch.export takes seconds for the same graph."""
    names, output, file = [feature.name for feature in signature.inputs], signature.target.output, io.BytesIO()
    lengths = {feature.name: {0: "rows", 1: f"{feature.name} length"} for feature in signature.inputs if feature.holds == "tokens"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing being deprecated; what a trace could get wrong, `compare` sees
        torch.onnx.export(
            _Graph(network, signature).eval(),
            tuple(torch.zeros(2, *feature.shape, dtype=getattr(torch, _traced_type(feature))) for feature in signature.inputs),
            file,  # type: ignore[arg-type]  # a buffer will do when tracing
            input_names=names,
            output_names=[output],
            dynamic_axes={name: {0: "rows"} for name in (*names, output)} | lengths,
            opset_version=OPSET,
            dynamo=False,
        )
    return file.getvalue()


def _traced_type(feature: Feature) -> str:
    return feature.dtype if feature.offsets else feature.stored


def free_prefix(prefix: str, names: Sequence[str]) -> str:
    """The prefix, or a longer one where a name begins with it."""
    while any(name.startswith(prefix) for name in names):
        prefix += "'"
    return prefix


def _look_up(model: onnx.ModelProto, index: int, feature: Feature, codes: str) -> None:
    """Make the graph's input `index`, of codes, one of strings (rows, columns): each column through a LabelEncoder of its vocabulary.
    codes: what the names of what comes between begin with."""
    graph, name = model.graph, feature.name
    for node in graph.node:
        for place, given in enumerate(node.input):
            if given == name:
                node.input[place] = codes
    graph.input[index].CopyFrom(helper.make_tensor_value_info(name, TensorProto.STRING, ["rows", len(feature.columns)]))
    columns = [f"{codes} {column}" for column in range(len(feature.columns))]
    nodes = [helper.make_node("Split", [name], [f"{column} string" for column in columns], axis=1, num_outputs=len(columns))]
    for column, known, missing in zip(columns, feature.vocabularies, feature.missing, strict=True):
        nodes.append(_encoder(f"{column} string", column, known, missing))
    nodes.append(helper.make_node("Concat", columns, [f"{codes} int64"], axis=1))
    nodes.append(helper.make_node("Cast", [f"{codes} int64"], [codes], to=TensorProto.INT32))
    kept = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *kept])
    if all(opset.domain != "ai.onnx.ml" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("ai.onnx.ml", ML_OPSET))


def _encoder(strings: str, codes: str, known: tuple[str, ...], missing: int) -> onnx.NodeProto:
    """Value i of a vocabulary to i + 1, "" to the code of missing values, anything else to 0."""
    table = {value: code for code, value in enumerate(known, start=1)} | {"": missing}
    keys, values = list(table), list(table.values())
    return helper.make_node(
        "LabelEncoder", [strings], [codes], domain="ai.onnx.ml", keys_strings=keys, values_int64s=values, default_int64=0
    )


def _refuse_too_large(network: nn.Module) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    if size > LARGEST:
        raise DloptError(f"export: the model has {size / 2**30:.1f} GiB, and one ONNX file holds less than 2: make it smaller")
