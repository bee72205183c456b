"""A trained network on its way into a format, and what it says of the rows that a format is compared on."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Self

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dlopt.artifact import Artifact
from dlopt.data.prepared import Rows, Split
from dlopt.export.base import Compute
from dlopt.export.coding import FILE, Coding, Whole, read
from dlopt.models import Model, Network, Units, build_network
from dlopt.part import DloptError, Feature, Signature, Statistics, Target
from dlopt.train.job import Fit
from dlopt.train.measure.evaluate import predict
from dlopt.train.measure.metrics import activated
from dlopt.train.start import fit_of, trained_network


@dataclass(frozen=True)
class Trained:
    """The network in float32, and torch's outputs in the precision that it was trained in."""

    network: Network
    signature: Signature
    model: Artifact
    split: Split
    """The test split, or the next best that has rows."""
    split_name: str
    outputs: np.ndarray
    """Probabilities, or numbers less the target's offsets, float64 (rows, outputs)."""
    targets: Tensor

    @classmethod
    def of(cls, model: Artifact, data: Artifact) -> Self:
        """Of a model's artifact."""
        network = trained_network(model, data)
        signature = Signature.model_validate_json(model.read("signature.json"))
        name, split = next((name, split) for name in ("test", "validation", "train") if len(split := Split.open(data, name)))
        outputs, targets = predict(network, split, torch.device("cpu"))
        found = outputs.numpy() if "model.onnx" not in model.manifest.files else of_graph(model, signature, split)
        return cls(network.float(), signature, model, split, name, found, targets)

    @cached_property
    def fit(self) -> Fit:
        """The section that it was fitted by."""
        return fit_of(self.model)

    @cached_property
    def whole(self) -> bool:
        """Whether an ONNX graph of it has weights that are whole numbers, which onnxruntime computes with in its own way."""
        return any(isinstance(code, Whole) for code in self.coding.values())

    @cached_property
    def coding(self) -> Coding:
        """How its weights are kept, by name."""
        return read(self.model.read(FILE)) if FILE in self.model.manifest.files else {}

    @cached_property
    def unit(self) -> np.ndarray | float:
        """What a difference is measured in: each number's standard deviation, (outputs,); probabilities are what they are."""
        return self.network.output.std.double().numpy() if isinstance(self.network.output, Units) else 1.0

    @cached_property
    def graph(self) -> Graph:
        """The whole of it as one module, ready to be traced."""
        return Graph(self.network, self.signature).eval()


def of_graph(model: Artifact, signature: Signature, split: Split) -> np.ndarray:
    """Outputs of a model whose ONNX file says what torch cannot, since it was quantized there."""
    from dlopt.export.graph import session_of
    from dlopt.export.proof import compare

    nothing = np.zeros((len(split), signature.target.size))
    return compare(session_of(model.read("model.onnx"), signature), signature, split, nothing).outputs.astype(np.float64)


class Graph(nn.Module):
    """Tensors in the order of the signature to probabilities or numbers, as a file has them: what has offsets as float64 in the data's
    units, of which the network sees the difference from the offset (as dlopt.data.types.exact.shifted computes it), in float32.

    half: the type that the layers between preprocessing and output compute in, where that is not float32.
    """

    def __init__(self, network: Network, signature: Signature, half: torch.dtype | None = None) -> None:
        super().__init__()
        self.preprocess, self.output = network.preprocess, network.output
        self.body = copy.deepcopy(network.body).to(half) if half else network.body
        self.inputs, self.target, self.narrow = signature.inputs, signature.target, half

    def forward(self, *inputs: Tensor) -> Tensor:
        given = {feature.name: _shifted(values, feature) for feature, values in zip(self.inputs, inputs, strict=True)}
        found = self.preprocess(given)
        if self.narrow:
            found = {name: values.to(self.narrow) if values.is_floating_point() else values for name, values in found.items()}
        outputs = activated(self.target, self.output(self.body(found).float() if self.narrow else self.body(found)))
        return outputs.double() + _double(self.target) if self.target.offsets else outputs


def examples(signature: Signature, rows: int = 2) -> tuple[Tensor, ...]:
    """Inputs of a graph, zeros."""
    return tuple(torch.zeros(rows, *feature.shape, dtype=traced_type(feature)) for feature in signature.inputs)


def traced_type(feature: Feature) -> torch.dtype:
    """The type of an input as a graph takes it before categories are looked up."""
    found: torch.dtype = getattr(torch, feature.dtype if feature.offsets else feature.stored)
    return found


def _shifted(values: Tensor, feature: Feature) -> Tensor:
    return (values - torch.tensor(feature.offsets, dtype=torch.float64)).float() if feature.offsets else values


def _double(target: Target) -> Tensor:
    return torch.tensor(target.offsets, dtype=torch.float64)


def unsaid(form: str, error: Exception, graph: Graph | None = None, signature: Signature | None = None) -> DloptError:
    """That a format cannot say what a network does, in one line, with the layer if an operator is named: exporters tell long stories."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]
    found = re.search(r"aten::(\w+)", said)
    layer = layer_of(graph, signature, found[1]) if found and graph is not None and signature is not None else None
    where = f" (layer {layer})" if layer else ""
    return DloptError(f"export: the model cannot be written as {form}: {type(error).__name__}: {said}{where}")


def layer_of(graph: Graph, signature: Signature, operator: str) -> str | None:
    """The innermost layer of a graph that calls an operator of torch, by its name in the network."""
    within: list[str] = []
    callers: list[str] = []

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.overloadpacket.__name__ == operator:
                callers.append(within[-1])
            return function(*args, **(kwargs or {}))

    def enter(name: str, *_: Any) -> None:
        within.append(name)

    def leave(*_: Any) -> None:
        within.pop()

    hooks = []
    for name, module in graph.named_modules():
        hooks += [module.register_forward_pre_hook(partial(enter, name)), module.register_forward_hook(leave)]
    try:
        with torch.no_grad(), Listening():
            graph(*examples(signature))
    except Exception:  # it is already a story of what went wrong
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return callers[0] if callers and callers[0] else None


def called(module: nn.Module, signature: Signature) -> Compute:
    """A module of torch that takes tensors in the order of the signature."""

    def compute(rows: Rows) -> np.ndarray:
        with torch.no_grad():
            found: Tensor = module(*(torch.from_numpy(np.ascontiguousarray(rows[feature.name])) for feature in signature.inputs))
        return found.numpy()

    return compute


def built_of(config: dict[str, Any]) -> Network:
    """The network that a config.json tells of, its weights not yet loaded."""
    model: Any = TypeAdapter(Model).validate_python(config["model"])
    statistics = {name: Statistics.model_validate(found) for name, found in config["statistics"].items()}
    return build_network(model, Signature.model_validate(config["signature"]), statistics, config["seed"]).eval()
