"""A trained network as one ONNX graph.

Categories are strings in it: nodes LabelEncoder (of the operators ai.onnx.ml) before the traced network turn them into codes.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from dlopt.export.base import Compute
from dlopt.export.coding import Coding, put_in
from dlopt.export.trained import Graph, Trained, examples, unsaid
from dlopt.models import Network
from dlopt.part import DloptError, Feature, Signature

OPSET, ML_OPSET = 18, 2
LEAST = 64
"""Numbers that a tensor has at least for it to be worth a node that makes float32 of it."""
LARGEST = 2**31 - 1
"""An ONNX file is one protobuf message, which cannot have more bytes."""


def written(trained: Trained, precision: str = "float32", strings: bool = True) -> bytes:
    """A trained model as an ONNX file, its weights kept as compression has left them. strings: whether categories are looked up in it, or
    given as their codes. Raises DloptError."""
    quantized = "model.onnx" in trained.model.manifest.files
    if quantized and not strings and any(feature.dtype == "string" for feature in trained.signature.inputs):
        raise DloptError("export: the model is quantized in ONNX with its categories: export it as onnx, pickle, joblib or triton")
    if quantized and precision == "float32":
        return trained.model.read("model.onnx")
    if precision != "float32" and (trained.coding or quantized):
        raise DloptError(f"export: precision {precision}: the model is compressed: take compress out, or use precision: float32")
    return onnx_file(trained.network, trained.signature, trained.model.manifest.digest, precision, trained.coding, strings)


def opset_of(content: bytes) -> int:
    """The version of ONNX's own operators in a file."""
    return next(int(opset.version) for opset in onnx.load_from_string(content).opset_import if not opset.domain)


def onnx_file(
    network: Network,
    signature: Signature,
    digest: str,
    precision: str = "float32",
    coding: Coding | None = None,
    strings: bool = True,
) -> bytes:
    """The network as an ONNX file: traced, then with the lookup of categories before it, unless they come as codes (strings). coding: how
    weights are kept, by their names in the network. Raises DloptError."""
    refuse_too_large(network)
    graph = Graph(network, signature, torch.float16 if precision == "float16" else None).eval()
    try:
        model = onnx.load_from_string(_traced(graph, signature))
    except Exception as error:  # what torch.onnx and own code raise is of many types
        raise unsaid("ONNX", error, graph, signature) from error
    for index, feature in enumerate(signature.inputs):
        if feature.dtype == "string" and strings:
            _look_up(model, index, feature, free_prefix(f"{feature.name} codes", [other.name for other in signature.inputs]))
    if coding:
        model = put_in(model, coding)
    if precision == "bfloat16":
        keep_as(model, TensorProto.BFLOAT16, LEAST)
    helper.set_model_props(model, {"signature": signature.model_dump_json(), "model_digest": digest})
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _traced(graph: Graph, signature: Signature) -> bytes:
    """By tracing: the exporter that goes through torch.export takes seconds for the same graph."""
    names, output, file = [feature.name for feature in signature.inputs], signature.target.output, io.BytesIO()
    lengths = {feature.name: {0: "rows", 1: f"{feature.name} length"} for feature in signature.inputs if feature.holds == "tokens"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing being deprecated; what a trace could get wrong, `compare` sees
        torch.onnx.export(
            graph,
            examples(signature),
            file,  # type: ignore[arg-type]  # a buffer will do when tracing
            input_names=names,
            output_names=[output],
            dynamic_axes={name: {0: "rows"} for name in (*names, output)} | lengths,
            opset_version=OPSET,
            dynamo=False,
        )
    return file.getvalue()


def session_of(content: bytes, signature: Signature, threads: int = 0, exact: bool = False) -> Compute:
    """A file in onnxruntime. threads: 0 for as many as there are cores. exact: as the graph stands, whole numbers become float32 before
    they are multiplied; otherwise onnxruntime rounds what they are multiplied with to 8 bits. Raises DloptError when it does not take the
    file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if exact:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise unsaid("ONNX", error) from error
    return lambda tensors: session.run([signature.target.output], tensors)[0]


def keep_as(model: onnx.ModelProto, kind: int, least: int) -> None:
    """Keep float32 tensors of at least so many numbers in another type, and make float32 of them as the graph begins."""
    nodes = []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type == TensorProto.FLOAT and values.size >= least:
            nodes.append(helper.make_node("Cast", [f"{tensor.name} kept"], [tensor.name], to=TensorProto.FLOAT))
            rounded = values.astype(helper.tensor_dtype_to_np_dtype(kind))
            tensor.CopyFrom(numpy_helper.from_array(rounded, f"{tensor.name} kept"))
    put_first(model, nodes)


def put_first(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Nodes before all others."""
    kept = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *kept])


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
    put_first(model, nodes)
    if all(opset.domain != "ai.onnx.ml" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("ai.onnx.ml", ML_OPSET))


def _encoder(strings: str, codes: str, known: tuple[str, ...], missing: int) -> onnx.NodeProto:
    """Value i of a vocabulary to i + 1, "" to the code of missing values, anything else to 0."""
    table = {value: code for code, value in enumerate(known, start=1)} | {"": missing}
    keys, values = list(table), list(table.values())
    return helper.make_node(
        "LabelEncoder", [strings], [codes], domain="ai.onnx.ml", keys_strings=keys, values_int64s=values, default_int64=0
    )


def refuse_too_large(network: nn.Module) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    if size > LARGEST:
        raise DloptError(f"export: the model has {size / 2**30:.1f} GiB, and one ONNX file holds less than 2: make it smaller")
