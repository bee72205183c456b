"""How the weights of a compressed network are kept in fewer bytes than float32 takes: what is written in files, and in ONNX as nodes that
make float32 of it again. The network itself has the very same numbers in float32, so that a file is compared with it as any other is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

FILE = "coding.safetensors"
OPSET_OF_INT4 = 21


class Code(ABC):
    """One weight, kept."""

    kind: ClassVar[str]

    @abstractmethod
    def values(self) -> np.ndarray:
        """float32, as whatever runs the file computes them."""

    @abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """What is kept."""

    @abstractmethod
    def nodes(self, name: str, transposed: bool) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
        """In a graph: tensors, and nodes that make the weight of that name of them, transposed or not."""


@dataclass(frozen=True)
class Whole(Code):
    """Whole numbers times a scale for each unit."""

    kind = "whole"
    codes: np.ndarray
    """int8, (units, ...); of 4 bits within -8 and 7."""
    scale: np.ndarray
    """float32 (units,)."""
    bits: int = 8

    @classmethod
    def of(cls, weight: np.ndarray, bits: int, whole: bool = False) -> Whole:
        """The nearest, symmetric around 0, with a scale for each unit: that of its largest number, or of few bits the one of least error
        among some that cut off the ends. whole: the ends stay in any case."""
        most, flat = 2 ** (bits - 1) - 1, weight.reshape(len(weight), -1)
        largest = np.abs(flat).max(axis=1, keepdims=True)
        shares = (1.0,) if bits == 8 or whole else np.linspace(0.5, 1.0, 21)
        best, error = np.ones((len(flat), 1), np.float32), np.full((len(flat), 1), np.inf)
        for share in shares:
            scale = (np.where(largest > 0, largest, 1.0) * share / most).astype(np.float32)
            apart = np.square(np.clip(np.round(flat / scale), -most, most) * scale - flat).sum(axis=1, keepdims=True)
            best, error = np.where(apart < error, scale, best), np.minimum(apart, error)
        codes = np.clip(np.round(flat / best), -most, most).astype(np.int8)
        return cls(codes.reshape(weight.shape), best[:, 0].astype(np.float32), bits)

    def values(self) -> np.ndarray:
        return self.codes.astype(np.float32) * self.scale.reshape(-1, *[1] * (self.codes.ndim - 1))

    def arrays(self) -> dict[str, np.ndarray]:
        return {"codes": self.codes, "scale": self.scale, "bits": np.array(self.bits)}

    def nodes(self, name: str, transposed: bool) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
        codes = self.codes.T if transposed else self.codes
        kind = TensorProto.INT8 if self.bits == 8 else TensorProto.INT4
        kept = helper.make_tensor(f"{name} codes", kind, codes.shape, packed(codes, self.bits), raw=True)
        scale = numpy_helper.from_array(self.scale, f"{name} scale")
        node = helper.make_node("DequantizeLinear", [kept.name, scale.name], [name], axis=1 if transposed else 0)
        return [kept, scale], [node]


def packed(codes: np.ndarray, bits: int) -> bytes:
    """Whole numbers as ONNX keeps them: two of 4 bits in a byte, the first one in its lower half."""
    flat = np.ascontiguousarray(codes).reshape(-1)
    if bits == 8:
        return flat.tobytes()
    flat = np.append(flat, np.zeros(len(flat) % 2, np.int8)).view(np.uint8) & 15
    return (flat[::2] | (flat[1::2] << 4)).astype(np.uint8).tobytes()


@dataclass(frozen=True)
class Codebook(Code):
    """Each number one of at most 256."""

    kind = "codebook"
    places: np.ndarray
    """uint8, of the weight's shape."""
    book: np.ndarray
    """float32."""

    @classmethod
    def of(cls, weight: np.ndarray) -> Codebook:
        """Of a weight with few different values: the most frequent first, so that 0 is zeros where a network is sparse."""
        values, places, counts = np.unique(weight, return_inverse=True, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return cls(rank[places].reshape(weight.shape).astype(np.uint8), values[order].astype(np.float32))

    def values(self) -> np.ndarray:
        return self.book[self.places]

    def arrays(self) -> dict[str, np.ndarray]:
        return {"places": self.places, "book": self.book}

    def nodes(self, name: str, transposed: bool) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
        places = self.places.T if transposed else self.places
        kept = [numpy_helper.from_array(np.ascontiguousarray(places), f"{name} places"), numpy_helper.from_array(self.book, f"{name} book")]
        cast = helper.make_node("Cast", [f"{name} places"], [f"{name} indices"], to=TensorProto.INT32)
        return kept, [cast, helper.make_node("Gather", [f"{name} book", f"{name} indices"], [name])]


@dataclass(frozen=True)
class Half(Code):
    """float16."""

    kind = "half"
    halves: np.ndarray

    @classmethod
    def of(cls, weight: np.ndarray) -> Half:
        return cls(weight.astype(np.float16))

    def values(self) -> np.ndarray:
        return self.halves.astype(np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"halves": self.halves}

    def nodes(self, name: str, transposed: bool) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
        halves = self.halves.T if transposed else self.halves
        kept = numpy_helper.from_array(np.ascontiguousarray(halves), f"{name} half")
        return [kept], [helper.make_node("Cast", [kept.name], [name], to=TensorProto.FLOAT)]


CODES: dict[str, type[Code]] = {code.kind: code for code in (Whole, Codebook, Half)}
Coding = Mapping[str, Code]
"""Name of a weight in the network to how it is kept."""


def write(coding: Coding) -> bytes:
    """As safetensors: KIND/WEIGHT/ARRAY."""
    from safetensors.numpy import save

    kept = ((f"{code.kind}/{name}", code.arrays()) for name, code in coding.items())
    return bytes(save({f"{where}/{key}": np.ascontiguousarray(value) for where, arrays in kept for key, value in arrays.items()}))


def read(content: bytes) -> dict[str, Code]:
    """The way back."""
    from safetensors.numpy import load

    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path, value in load(content).items():
        kind, name, key = path.split("/")
        found.setdefault((kind, name), {})[key] = value if value.ndim else value.item()
    return {name: CODES[kind](**kept) for (kind, name), kept in found.items()}


def put_in(model: onnx.ModelProto, coding: Coding) -> onnx.ModelProto:
    """Keep weights of a traced graph as the coding says, by the names that they have in it.

    A matrix of whole numbers is kept transposed, and Gemm becomes MatMul and Sub: onnxruntime then multiplies with the whole numbers
    themselves. (Of MatMul and Add it makes a Gemm again, and float32 of the matrix each time that it is run.)
    """
    if any(isinstance(code, Whole) and code.bits == 4 for code in coding.values()):
        model = version_converter.convert_version(model, OPSET_OF_INT4)
    there = {tensor.name: tensor for tensor in model.graph.initializer}
    names = {name: code for name, code in coding.items() if name in there}
    tensors: list[onnx.TensorProto] = []
    first: list[onnx.NodeProto] = []
    rest: list[onnx.NodeProto] = []
    for node in model.graph.node:
        code = names.get(node.input[1]) if node.op_type == "Gemm" else None
        if not isinstance(code, Whole) or not _is_linear(node):
            rest.append(node)
            continue
        turned, product = f"{node.input[1]} turned", f"{node.output[0]} product"
        biased = len(node.input) > 2
        result = product if biased else node.output[0]
        rest.append(helper.make_node("MatMul", [node.input[0], turned], [result], name=f"{node.name} MatMul"))
        if biased:
            rest.append(helper.make_node("Neg", [node.input[2]], [f"{product} bias"], name=f"{node.name} Neg"))
            rest.append(helper.make_node("Sub", [product, f"{product} bias"], [node.output[0]], name=f"{node.name} Sub"))
        if not any(turned in made.output for made in first):
            kept, made_by = code.nodes(turned, transposed=True)
            tensors, first = [*tensors, *kept], [*first, *made_by]
    used = {name for node in rest for name in node.input}
    for name in names.keys() & used:
        kept, made_by = names[name].nodes(name, transposed=False)
        tensors, first = [*tensors, *kept], [*first, *made_by]
    stay = [tensor for name, tensor in there.items() if name in used and name not in names]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend([*first, *rest])
    model.graph.initializer.extend([*stay, *tensors])
    return model


def _is_linear(node: onnx.NodeProto) -> bool:
    """Whether a Gemm is x times the transposed weight, plus a bias or not."""
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return given.get("transB", 0) == 1 and not given.get("transA", 0) and given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0
