"""A multi-layer perceptron over all inputs, flattened and put side by side."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dlopt.models.layers import ACTIVATIONS, Activation, Init, initialize
from dlopt.part import Part, Signature


class Mlp(Part):
    """Fully connected layers; with its defaults, the network of the classic MNIST tutorial (784-128-10, dropout 0.2)."""

    kind: Literal["mlp"] = "mlp"
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (128,)
    """Units of each hidden layer; none is logistic regression."""
    activation: Activation = "relu"
    """What follows each hidden layer."""
    init: Init = "xavier_uniform"
    """How weights start; biases start at 0."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Share of each hidden layer's units that is dropped in training."""

    def build(self, signature: Signature) -> nn.Module:
        sizes = [signature.num_inputs, *self.hidden]
        layers: list[nn.Module] = [_Flatten()]
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), ACTIVATIONS[self.activation](), nn.Dropout(self.dropout)]
        body = nn.Sequential(*layers, nn.Linear(sizes[-1], signature.num_outputs))
        initialize(body, self.init)
        return body


class _Flatten(nn.Module):
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        flat = [values.flatten(1) for values in inputs.values()]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)
