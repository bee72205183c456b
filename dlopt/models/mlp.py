"""A multi-layer perceptron over all inputs, put side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from dlopt.models.depth import Residual
from dlopt.models.encoder import Chain, Encoder, Headed, initialized
from dlopt.models.layers import Activation, Dropout, Init, activation, dropout, widening
from dlopt.models.norms import Norm, bias_before, norm
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
    norm: Norm = "none"
    """What normalises each hidden layer's outputs, before the activation."""
    residual: bool = False
    """Whether each hidden layer that is as wide as the one before adds to what it was given, instead of replacing it."""
    residual_scale: float | None = Field(0.1, ge=0)
    """Of residual layers: where the learned number starts that what a layer adds is multiplied by; null leaves it out."""
    init: Init = "xavier_uniform"
    """How weights start; biases start at 0, embeddings at small normal numbers."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Share of each hidden layer's units that is dropped in training."""
    dropout_kind: Dropout = "standard"
    """How they are dropped."""
    embedding: int = Field(64, ge=1)
    """Of texts: width of each token's embedding. That of a category follows from how many values it has."""

    def build(self, signature: Signature) -> nn.Module:
        return initialized(Headed(self._encoder(signature), signature.num_outputs), self.init)

    def encoder(self, signature: Signature) -> Encoder:
        """The last hidden layer's units, or the inputs side by side when there is none."""
        return initialized(self._encoder(signature), self.init)

    def _encoder(self, signature: Signature) -> Encoder:
        rows = Rows(signature, lambda feature: Bag(feature.tokens, self.embedding))
        return tower(
            rows,
            self.hidden,
            self.activation,
            self.dropout,
            dropout_kind=self.dropout_kind,
            norm=self.norm,
            residual=self.residual,
            residual_scale=self.residual_scale,
        )


def tower(
    rows: Encoder,
    hidden: Sequence[int],
    activation: Activation,
    dropout: float,
    *,
    dropout_kind: Dropout = "standard",
    norm: Norm = "none",
    residual: bool = False,
    residual_scale: float | None = None,
) -> Encoder:
    """Hidden layers over the vector of a row, their weights as torch makes them; (rows, units of the last one)."""
    layers: dict[str, nn.Module] = {"rows": rows}
    for number, (before, after) in enumerate(pairwise([rows.width, *hidden]), start=1):
        layer: nn.Module = hidden_layer(before, after, activation, dropout, dropout_kind, norm)
        if residual and before == after:
            layer = Residual(layer, scale=residual_scale)
        layers[f"hidden{number}"] = layer
    return Chain(hidden[-1] if hidden else rows.width, layers)


def hidden_layer(before: int, after: int, name: Activation, p: float, kind: Dropout, by: Norm) -> nn.Module:
    """(rows, before) to (rows, after)."""
    wide = after * widening(name)
    layers = nn.Sequential()
    layers.add_module("linear", nn.Linear(before, wide, bias=bias_before(by)))
    if by != "none":
        layers.add_module("norm", norm(by, wide, dims=2))
    layers.add_module("activation", activation(name))
    layers.add_module("dropout", dropout(kind, p))
    return layers
