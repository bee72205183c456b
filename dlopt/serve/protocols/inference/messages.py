"""The messages of the Open Inference Protocol v2 over gRPC, from a table of their fields: nothing is generated, and nothing is added to
protobuf's own pool, where another client's stubs of the same names may be.

Numbers and types of fields are those of the protocol (github.com/kserve/open-inference-protocol) and of Triton's repository extension.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE, SERVICE = "inference", "inference.GRPCInferenceService"
REPEATED = "repeated "
MAP = "map of "
PARAMETERS = f"{MAP}InferParameter"
NAMED = {"name": (1, "string"), "version": (2, "string")}
TENSOR = {"name": (1, "string"), "datatype": (2, "string"), "shape": (3, f"{REPEATED}int64")}
FULL = TENSOR | {"parameters": (4, PARAMETERS), "contents": (5, "InferTensorContents")}
ANSWERED = {"model_name": (1, "string"), "model_version": (2, "string"), "id": (3, "string"), "parameters": (4, PARAMETERS)}
CHANGE = {"repository_name": (1, "string"), "model_name": (2, "string"), "parameters": (3, PARAMETERS)}
MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "InferParameter": {
        "bool_param": (1, "bool"),
        "int64_param": (2, "int64"),
        "string_param": (3, "string"),
        "double_param": (4, "double"),
        "uint64_param": (5, "uint64"),
    },
    "InferTensorContents": {
        "bool_contents": (1, f"{REPEATED}bool"),
        "int_contents": (2, f"{REPEATED}int32"),
        "int64_contents": (3, f"{REPEATED}int64"),
        "uint_contents": (4, f"{REPEATED}uint32"),
        "uint64_contents": (5, f"{REPEATED}uint64"),
        "fp32_contents": (6, f"{REPEATED}float"),
        "fp64_contents": (7, f"{REPEATED}double"),
        "bytes_contents": (8, f"{REPEATED}bytes"),
    },
    "ServerLiveRequest": {},
    "ServerLiveResponse": {"live": (1, "bool")},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": (1, "bool")},
    "ModelReadyRequest": NAMED,
    "ModelReadyResponse": {"ready": (1, "bool")},
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": NAMED | {"extensions": (3, f"{REPEATED}string")},
    "ModelMetadataRequest": NAMED,
    "ModelMetadataResponse.TensorMetadata": TENSOR,
    "ModelMetadataResponse": {
        "name": (1, "string"),
        "versions": (2, f"{REPEATED}string"),
        "platform": (3, "string"),
        "inputs": (4, f"{REPEATED}ModelMetadataResponse.TensorMetadata"),
        "outputs": (5, f"{REPEATED}ModelMetadataResponse.TensorMetadata"),
    },
    "ModelInferRequest.InferInputTensor": FULL,
    "ModelInferRequest.InferRequestedOutputTensor": {"name": (1, "string"), "parameters": (2, PARAMETERS)},
    "ModelInferRequest": ANSWERED
    | {
        "inputs": (5, f"{REPEATED}ModelInferRequest.InferInputTensor"),
        "outputs": (6, f"{REPEATED}ModelInferRequest.InferRequestedOutputTensor"),
        "raw_input_contents": (7, f"{REPEATED}bytes"),
    },
    "ModelInferResponse.InferOutputTensor": FULL,
    "ModelInferResponse": ANSWERED
    | {"outputs": (5, f"{REPEATED}ModelInferResponse.InferOutputTensor"), "raw_output_contents": (6, f"{REPEATED}bytes")},
    "RepositoryIndexRequest": {"repository_name": (1, "string"), "ready": (2, "bool")},
    "RepositoryIndexResponse.ModelIndex": NAMED | {"state": (3, "string"), "reason": (4, "string")},
    "RepositoryIndexResponse": {"models": (1, f"{REPEATED}RepositoryIndexResponse.ModelIndex")},
    "RepositoryModelLoadRequest": CHANGE,
    "RepositoryModelLoadResponse": {},
    "RepositoryModelUnloadRequest": CHANGE,
    "RepositoryModelUnloadResponse": {},
}
"""Message, and one within another by both names, to its fields: number and type."""
CHOICE = "InferParameter"
"""Of whose fields one is set."""
Field = descriptor_pb2.FieldDescriptorProto
NAMES = ("bool", "int32", "int64", "uint32", "uint64", "float", "double", "string", "bytes")
SCALARS = {name: getattr(Field, f"TYPE_{name.upper()}") for name in NAMES}


@cache
def messages() -> dict[str, Any]:
    """Classes by their names."""
    file = descriptor_pb2.FileDescriptorProto(name="inference.proto", package=PACKAGE, syntax="proto3")
    made: dict[str, Any] = {}
    for name in sorted(MESSAGES, key=lambda name: name.count(".")):
        outer, _, inner = name.rpartition(".")
        made[name] = made[outer].nested_type.add(name=inner) if outer else file.message_type.add(name=name)
        if name == CHOICE:
            made[name].oneof_decl.add(name="parameter_choice")
        for field, (number, kind) in MESSAGES[name].items():
            _add(made[name], name, field, number, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in MESSAGES}


def _add(message: Any, name: str, field: str, number: int, kind: str) -> None:
    repeated, kind = kind.startswith(REPEATED) or kind.startswith(MAP), kind.removeprefix(REPEATED)
    made = message.field.add(name=field, number=number, label=Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL)
    if kind.startswith(MAP):
        entry = f"{field.title()}Entry"
        pairs = message.nested_type.add(name=entry)
        pairs.options.map_entry = True
        _add(pairs, f"{name}.{entry}", "key", 1, "string")
        _add(pairs, f"{name}.{entry}", "value", 2, kind.removeprefix(MAP))
        kind = f"{name}.{entry}"
    if kind in SCALARS:
        made.type = SCALARS[kind]
    else:
        made.type, made.type_name = Field.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
    if name == CHOICE:
        made.oneof_index = 0
