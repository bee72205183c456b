"""Models for texts; other inputs that a job has besides are put next to what they find in the text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from dlopt.models.encoder import Encoder, Headed, initialized
from dlopt.models.layers import Activation, Dropout, Init, activation, widening
from dlopt.models.mlp import tower
from dlopt.models.rows import Bag, Convolutions, Pooling, Rows
from dlopt.part import DloptError, Feature, Part, Signature


class TextBag(Part):
    """The mean (or maximum) of the embeddings of a text's tokens and of their n-grams, then fully connected layers.

    fastText's classifier (Joulin et al. 2017) when nothing is hidden: little to compute, and hard to beat where the words decide.
    """

    kind: Literal["text_bag"] = "text_bag"
    embedding: int = Field(64, ge=1)
    """Width of each embedding."""
    ngrams: int = Field(1, ge=1, le=5)
    """Longest run of tokens that has an embedding of its own."""
    buckets: int = Field(2**14, ge=1)
    """How many embeddings the n-grams of each length share, by their hash."""
    pooling: Pooling = "mean"
    """What becomes of the embeddings of a text: their mean, their maximum, or both side by side."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Units of each hidden layer; none is logistic regression on the pooled embeddings."""
    activation: Activation = "relu"
    """What follows each hidden layer."""
    init: Init = "xavier_uniform"
    """How weights start; biases start at 0, embeddings at small normal numbers."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Share of the embeddings' numbers, and of each hidden layer's units, that is dropped in training."""

    dropout_kind: Dropout = "standard"
    """How they are dropped; `channel` takes the same numbers out of all embeddings of a text."""

    def build(self, signature: Signature) -> nn.Module:
        return initialized(Headed(self._encoder(signature), signature.num_outputs), self.init)

    def encoder(self, signature: Signature) -> Encoder:
        """The last hidden layer's units, or the pooled embeddings beside the other inputs when there is none."""
        return initialized(self._encoder(signature), self.init)

    def _encoder(self, signature: Signature) -> Encoder:
        refuse_no_text(signature, self.kind)
        rows = Rows(
            signature,
            lambda text: Bag(text.tokens, self.embedding, self.pooling, self.ngrams, self.buckets, self.dropout, self.dropout_kind),
        )
        return tower(rows, self.hidden, self.activation, self.dropout, dropout_kind=self.dropout_kind)


class TextCnn(Part):
    """Convolutions of several sizes over the tokens' embeddings and the maximum of each over the text (Kim 2014)."""

    kind: Literal["text_cnn"] = "text_cnn"
    embedding: int = Field(64, ge=1)
    """Width of each token's embedding."""
    sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field((3, 4, 5), min_length=1)
    """Tokens that a convolution sees at a time."""
    channels: int = Field(100, ge=1)
    """Convolutions of each size."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Units of each hidden layer after them."""
    activation: Activation = "relu"
    """What follows the maxima and each hidden layer."""
    init: Init = "xavier_uniform"
    """How weights start; biases start at 0, embeddings at small normal numbers."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Share of the embeddings' numbers, of the maxima, and of each hidden layer's units, that is dropped in training."""

    dropout_kind: Dropout = "standard"
    """How they are dropped; `channel` takes the same numbers out of all embeddings of a text."""

    def build(self, signature: Signature) -> nn.Module:
        return initialized(Headed(self._encoder(signature), signature.num_outputs), self.init)

    def encoder(self, signature: Signature) -> Encoder:
        """The last hidden layer's units, or the maxima beside the other inputs when there is none."""
        return initialized(self._encoder(signature), self.init)

    def _encoder(self, signature: Signature) -> Encoder:
        refuse_no_text(signature, self.kind)
        return tower(Rows(signature, self._layer), self.hidden, self.activation, self.dropout, dropout_kind=self.dropout_kind)

    def _layer(self, text: Feature) -> Convolutions:
        return Convolutions(
            text.tokens,
            self.embedding,
            self.channels,
            self.sizes,
            activation(self.activation),
            self.dropout,
            self.dropout_kind,
            widening(self.activation),
        )


def refuse_no_text(signature: Signature, kind: str) -> None:
    if all(feature.holds != "tokens" for feature in signature.inputs):
        raise DloptError(f"model: {kind} takes at least one text: use kind: mlp for other inputs")
