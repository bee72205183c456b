"""For the tests of models: a network on random rows of a signature, what torch says of them and what the exported graph says."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import onnxruntime
import torch
from torch import nn

from dlopt.data.prepared import Rows, Split
from dlopt.export.graph import onnx_file, session_of
from dlopt.export.proof import compare, fed
from dlopt.models import Model, Network, build_network
from dlopt.part import Signature
from dlopt.train.measure.metrics import activated
from tests import sets


def built(model: Model, found: Signature, seed: int = 1, dtype: torch.dtype = torch.float32) -> Network:
    """A network with its first weights, ready to predict."""
    known = {feature.name: sets.fitted(feature) for feature in found.inputs if feature.kind in ("image", "number", "date")}
    if found.target.kind == "number":
        known[found.target.name] = sets.spread(np.random.default_rng(0).normal(size=(50, found.target.size)))
    return build_network(model, found, known, seed, dtype).eval()


def tensors(rows: Rows) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values) for name, values in rows.items()}


def said(network: Network, found: Signature, rows: Rows) -> np.ndarray:
    """Probabilities or numbers, float64 (rows, outputs), as torch has them."""
    with torch.no_grad():
        return activated(found.target, network(tensors(rows)).double()).numpy()


def graph(network: Network, found: Signature) -> Callable[[Rows], np.ndarray]:
    """The same from the exported graph, which is fed with strings and with texts as long as the longest."""
    session = onnxruntime.InferenceSession(onnx_file(network, found, "digest"), providers=["CPUExecutionProvider"])

    def run(rows: Rows) -> np.ndarray:
        count = len(next(iter(rows.values())))
        given = fed(found, rows if count else sets.inputs_of(found, 1))
        (output,) = session.run([found.target.output], {name: values[:count] for name, values in given.items()})
        return np.asarray(output)

    return run


def compared(content: bytes, found: Signature, split: Split, expected: np.ndarray, unit: np.ndarray | float = 1.0) -> tuple[float, int]:
    """The largest difference of an ONNX file from torch, and how many rows get other labels."""
    return compare(session_of(content, found), found, split, expected, unit)[:2]


def beyond_rounding(found: np.ndarray, network: Network, signature: Signature, rows: Rows) -> float:
    """By how much the graph differs from torch, at most, beyond 1e-6 (of numbers, 1e-5 of their deviation) and beyond four times what
    float32 itself costs torch on these rows; equal within that when it is not above 0."""
    least = 1e-5 if signature.target.kind == "number" else 1e-6
    expected, exact = said(network, signature, rows), said(copy.deepcopy(network).double(), signature, rows)
    assert found.shape == expected.shape
    rounding = np.abs(expected - exact).max(initial=0)
    assert rounding < 1e-5
    return float(np.abs(found - expected).max(initial=0) - max(least, 4 * rounding))


def without_gradient(network: Network, found: Signature, rows: int = 200) -> list[str]:
    """Parameters that a step of training does not reach."""
    network.train()
    torch.manual_seed(1)
    outputs = network(tensors(sets.inputs_of(found, rows, seed=3)))
    (outputs * torch.randn(outputs.shape)).sum().backward()
    return [name for name, value in network.named_parameters() if value.grad is None or not value.grad.abs().max() > 1e-7]


def fitted(network: Network, inputs: dict[str, torch.Tensor], labels: torch.Tensor, steps: int, rate: float = 3e-3) -> float:
    """The share of rows that it tells right after so many steps on all of them."""
    optimizer = torch.optim.Adam(network.parameters(), rate)
    torch.manual_seed(0)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs), labels).backward()
        optimizer.step()
    with torch.no_grad():
        return float((network.eval()(inputs).argmax(dim=1) == labels).double().mean())
