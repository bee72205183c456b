"""A multi-layer perceptron over all inputs, put side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from dlopt.models.layers import ACTIVATIONS, Activation, Init, initialize
from dlopt.models.rows import Bag, Rows
from dlopt.part import Part, Signature


class Mlp(Part):
    """Fully connected layers; with its defaults, the network of the classic MNIST tutorial (784-128-10, dropout 0.2).

    Takes any mix of inputs: images flattened, an embedding for each column of categories, the mean embedding of a text's tokens.
    """

    kind: Literal["mlp"] = "mlp"
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (128,)
    """Units of each hidden layer; none is logistic regression."""
    activation: Activation = "relu"
    """What follows each hidden layer."""
    init: Init = "xavier_uniform"
    """How weights start; biases start at 0, embeddings at small normal numbers."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Share of each hidden layer's units that is dropped in training."""
    embedding: int = Field(64, ge=1)
    """Of texts: width of each token's embedding. That of a category follows from how many values it has."""

    def build(self, signature: Signature) -> nn.Module:
        rows = Rows(signature, lambda feature: Bag(feature.tokens, self.embedding))
        return perceptron(rows, self.hidden, self.activation, self.init, self.dropout, signature.num_outputs)


def perceptron(rows: Rows, hidden: Sequence[int], activation: Activation, init: Init, dropout: float, outputs: int) -> nn.Sequential:
    """Fully connected layers over the vector of a row."""
    sizes = [rows.width, *hidden]
    layers: list[nn.Module] = [rows]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), ACTIVATIONS[activation](), nn.Dropout(dropout)]
    body = nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))
    initialize(body, init)
    return body
