"""One fully connected layer: linear and logistic regression."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from dlopt.models.encoder import Chain, Encoder, Headed, initialized
from dlopt.models.layers import Dropout, Init, dropout
from dlopt.models.rows import Bag, Rows
from dlopt.part import Part, Signature


class Linear(Part):
    """A weighted sum of the inputs for each output: what every other model has to beat.

    Takes any mix of inputs: pixels, an embedding for each column of categories, the mean embedding of a text's tokens.
    """

    kind: Literal["linear"] = "linear"
    init: Init = "small_normal"
    """How weights start; biases start at 0, embeddings at small normal numbers."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of a row's inputs that is dropped in training."""
    dropout_kind: Dropout = "standard"
    """How they are dropped."""
    embedding: int = Field(64, ge=1)
    """Of texts: width of each token's embedding. That of a category follows from how many values it has."""

    def build(self, signature: Signature) -> nn.Module:
        return initialized(Headed(self._encoder(signature), signature.num_outputs), self.init)

    def encoder(self, signature: Signature) -> Encoder:
        """The inputs side by side."""
        return initialized(self._encoder(signature), self.init)

    def _encoder(self, signature: Signature) -> Encoder:
        rows = Rows(signature, lambda feature: Bag(feature.tokens, self.embedding))
        return Chain(rows.width, {"rows": rows, "dropout": dropout(self.dropout_kind, self.dropout)})
