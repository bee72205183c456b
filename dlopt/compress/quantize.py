"""Whole numbers in place of floating ones."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from dlopt.compress.base import Tuned
from dlopt.part import DloptError

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from dlopt.compress.model import Model

LEAST_ROWS = 16
"""Fewer rows tell nothing of the range of an activation."""
BATCH = 32
METHODS = {"min_max": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
BODY = "/body/"
"""What the names of the network's own nodes begin with in the graph: preprocessing stays float32."""


class Quantize(Tuned):
    """Whole numbers of 8 or 4 bits for weights, and, with static, for what is between the layers. With epochs, weights are
    trained on while layers compute as they will (quantization-aware training)."""

    keeps = fills = True

    kind: Literal["quantize"] = "quantize"
    mode: Literal["weights", "static"] = "weights"
    """weights: they alone, with a scale for each unit: no rows are needed, nothing between the layers is rounded, and matrices are
    multiplied as they are, fast where few rows come at a time. static: also what is between the layers, unsigned, its ranges from
    training rows, for convolutions and large batches. Ranges from each batch are not offered: a row's answer would depend on the others."""
    bits: Literal[8, 4] = 8
    """Of weights; 4 with mode: weights alone."""
    rows: int = Field(512, ge=1)
    """Of static: how many training rows tell the ranges."""
    method: Literal["min_max", "entropy", "percentile"] = "min_max"
    """Of static: what the range of some numbers is: from the least to the greatest, the one that loses least information, or all but the
    most extreme ones (99.999 %)."""
    per_channel: bool = False
    """Of static: whether each unit has a scale of its own; more exact, and on small networks not always as fast."""
    reduce_range: bool = True
    """Of static: weights of 7 bits, so that the file says the same on every processor. Without VNNI, as where there is only AVX2, sums of
    8-bit products overflow; false is a little more exact where all that serve it have VNNI."""

    @model_validator(mode="after")
    def four_bits_are_for_weights(self) -> Self:
        if self.bits == 4 and self.mode != "weights":
            raise ValueError(f"bits: 4 is for mode: weights, and it is {self.mode}: use 8")
        return self

    @property
    def last(self) -> bool:
        return self.mode != "weights"

    def apply(self, model: Model) -> None:
        from dlopt.export.coding import Whole
        from dlopt.train.tuning import Rounded

        if self.epochs:
            model.tune(self, Rounded(bits=self.bits, inputs=self.mode != "weights", leave=self.leave))
        if self.mode == "weights":
            model.keep(partial(Whole.of, bits=self.bits, whole=self.epochs > 0), self.leave, matrices=True)
            return
        model.graph = self._graph(model)

    def _graph(self, model: Model) -> bytes:
        """The ONNX file, its own nodes quantized."""
        import onnx
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        plain = model.onnx()
        with tempfile.TemporaryDirectory(prefix="dlopt-") as folder:
            before, ready, after = (Path(folder) / name for name in ("before.onnx", "ready.onnx", "after.onnx"))
            before.write_bytes(activation_first(onnx.load_from_string(plain)).SerializeToString())
            quant_pre_process(str(before), str(ready), skip_optimization=True, skip_symbolic_shape=True)
            left = self._left(onnx.load(ready))
            quantize_static(
                ready,
                after,
                _reader(model, self.rows),
                quant_format=QuantFormat.QDQ,
                nodes_to_exclude=left,
                per_channel=self.per_channel,
                reduce_range=self.reduce_range,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=getattr(CalibrationMethod, METHODS[self.method]),
            )
            return after.read_bytes()

    def _left(self, graph: onnx.ModelProto) -> list[str]:
        """The names of nodes that stay float32."""
        weights = {tensor.name: tensor.name.removeprefix("body.") for tensor in graph.graph.initializer}
        patterns = [pattern.removeprefix("body.") for pattern in self.leave]
        left = []
        for node in graph.graph.node:
            mine = [weights[name] for name in node.input if name in weights]
            if not node.name.startswith(BODY) or any(fnmatch(name, pattern) for name in mine for pattern in patterns):
                left.append(node.name)
        return left


def activation_first(model: onnx.ModelProto) -> onnx.ModelProto:
    """Each ReLU that follows max pooling before it, which is the same, since it rises: a convolution of whole numbers then has it within,
    and pooling is of whole numbers as well, where it would be of float32 between two conversions."""
    nodes = list(model.graph.node)
    users = Counter(name for node in nodes for name in node.input)
    pools = {node.output[0]: place for place, node in enumerate(nodes) if node.op_type == "MaxPool" and len(node.output) == 1}
    for place, node in enumerate(nodes):
        pooled = pools.get(node.input[0]) if node.op_type == "Relu" else None
        if pooled is None or users[node.input[0]] > 1:
            continue
        pool = nodes[pooled]
        before, between, after = pool.input[0], pool.output[0], node.output[0]
        node.input[0], node.output[0], pool.input[0], pool.output[0] = before, between, between, after
        nodes[pooled], nodes[place] = node, pool
    ordered = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(ordered)
    return model


def _reader(model: Model, most: int) -> Any:
    """Training rows as the graph takes them, a batch at a time. Raises DloptError where there are too few."""
    from onnxruntime.quantization import CalibrationDataReader

    from dlopt.data.prepared import Split
    from dlopt.export.proof import fed

    split = Split.open(model.data, "train")
    if min(len(split), most) < LEAST_ROWS:
        raise DloptError(f"compress: quantize: {min(len(split), most)} training rows tell no ranges: at least {LEAST_ROWS} are needed")

    def batches() -> Iterator[dict[str, np.ndarray]]:
        there = 0
        for chunk in split.chunks:
            rows = fed(model.signature, split.read([chunk]))
            count = len(next(iter(rows.values())))
            for start in range(0, count, BATCH):
                if there >= most:
                    return
                stop = min(start + BATCH, count, start + most - there)
                there += stop - start
                yield {name: values[start:stop] for name, values in rows.items()}

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = batches()

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rest, None)

    return Reader()
