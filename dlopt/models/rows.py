"""What preprocessing leaves of a row, {name: tensor}, as one vector a row: the first layer of every model that takes all kinds of inputs.

A text counts to its last token, never to the end of its padding: the same text has the same vector in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.models.encoder import Encoder
from dlopt.models.layers import Dropout
from dlopt.models.layers import dropout as drop
from dlopt.models.preprocess import Preprocess
from dlopt.part import Feature, Signature

MOST_WIDTH = 64
"""The widest embedding of a category."""
PRIME = 2**31 - 1
"""Where the hash of an n-gram of ids stays below, so that it never leaves 64 bits, in torch and in ONNX alike."""
FACTOR = 1_000_003

Pooling = Literal["mean", "max", "mean_max"]


class Rows(Encoder):
    """{name: (rows, ...)} to (rows, width): the inputs side by side, in the order of the signature.

    Numbers as they are, images flattened, categories through an embedding a column, texts through the layer that `text` makes
    for each, which turns int32 (rows, length) into (rows, its `width`).
    """

    def __init__(self, signature: Signature, text: Callable[[Feature], TextLayer]) -> None:
        super().__init__()
        self.names = [feature.name for feature in signature.inputs]
        self.layers = nn.ModuleList(_layer(feature, text) for feature in signature.inputs)  # a dict takes not all names
        self.width = sum(_width(feature, layer) for feature, layer in zip(signature.inputs, self.layers, strict=True))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        flat = [layer(inputs[name]) for name, layer in zip(self.names, self.layers, strict=True)]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


class TextLayer(nn.Module):
    """Token ids, int32 (rows, length) with 0 at the end of shorter ones, to (rows, width)."""

    width: int


class Categories(nn.Module):
    """Codes, int32 (rows, columns), to an embedding for each column, side by side.

    An embedding of n codes is 1.6 n^0.56 wide (fast.ai's rule of thumb), and no wider than 64. Code 0 stands for all that is unknown.
    """

    def __init__(self, codes: Sequence[int]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, embedding_width(size)) for size in codes)
        self.width = sum(embedding_width(size) for size in codes)

    def forward(self, codes: Tensor) -> Tensor:
        return torch.cat([table(codes[:, index]) for index, table in enumerate(self.tables)], dim=1)


class Bag(TextLayer):
    """Token ids, and hashes of their n-grams, to the mean or the maximum of their embeddings.

    An n-gram has one of `buckets` embeddings, by a hash that is computed in the graph (Joulin et al. 2017).
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        pooling: Pooling = "mean",
        ngrams: int = 1,
        buckets: int = 1,
        dropout: float = 0.0,
        kind: Dropout = "standard",
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.ngrams = nn.ModuleList(nn.Embedding(buckets, width) for _ in range(ngrams - 1))
        self.dropout, self.pooling, self.buckets = drop(kind, dropout, dim=-1), pooling, buckets
        self.width = width * 2 if pooling == "mean_max" else width

    def forward(self, ids: Tensor) -> Tensor:
        ids = F.pad(ids, (0, 1))  # so that there is a token to look at when every text is empty
        values, there = [self.tokens(ids)], [ids != 0]
        for order, table in enumerate(self.ngrams, start=2):
            values.append(table(hashed(ids, order) % self.buckets))
            there.append(shifted(ids, order - 1) != 0)
        if self.training:  # all at once, yet so that the place of a token does not depend on the length: (rows, orders, length, width)
            values = list(self.dropout(torch.stack(values, dim=1)).unbind(1))
        return self._pooled(torch.cat(values, dim=1), torch.cat(there, dim=1))

    def _pooled(self, values: Tensor, there: Tensor) -> Tensor:
        """values: (rows, length, width); there: (rows, length), false where nothing is."""
        if self.pooling == "mean":
            return masked_mean(values, there)
        if self.pooling == "max":
            return masked_max(values, there)
        return torch.cat([masked_mean(values, there), masked_max(values, there)], dim=1)


class Convolutions(TextLayer):
    """Token ids to the maxima over the text of convolutions of several sizes (Kim 2014), which see nothing behind its end.

    widening: how many convolutions the activation needs for each of `channels`.
    """

    def __init__(
        self,
        tokens: int,
        embedding: int,
        channels: int,
        sizes: Sequence[int],
        activation: nn.Module,
        dropout: float,
        kind: Dropout = "standard",
        widening: int = 1,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, embedding)
        self.convolutions = nn.ModuleList(nn.Conv1d(embedding, channels * widening, size) for size in sizes)
        self.dropout, self.activation = drop(kind, dropout, dim=-1), activation
        self.sizes, self.width = tuple(sizes), channels * len(sizes)

    def forward(self, ids: Tensor) -> Tensor:
        ids = F.pad(ids, (0, max(self.sizes)))  # a window begins at every token, and there is one when every text is empty
        there = ids != 0
        values = self.dropout(self.tokens(ids))
        values = (values * there[:, :, None].to(values.dtype)).transpose(1, 2)
        windows = [convolution(values).transpose(1, 2) for convolution in self.convolutions]
        maxima = [masked_max(some, there[:, : some.shape[1]]) for some in windows]  # but of those that begin behind the text
        return self.activation(torch.cat(maxima, dim=1))  # the same after the maximum as before it, if it rises, and less work


def embedding_width(codes: int) -> int:
    """How wide the embedding of a category with so many codes is."""
    return min(MOST_WIDTH, round(1.6 * codes**0.56))


def masked_mean(values: Tensor, there: Tensor) -> Tensor:
    """(rows, length, width) and (rows, length) to (rows, width); 0 where nothing is there."""
    weights = there.to(values.dtype)
    total = torch.bmm(weights[:, None], values).squeeze(1)
    return total / weights.sum(dim=1, keepdim=True).clamp(min=1)


def masked_max(values: Tensor, there: Tensor) -> Tensor:
    """(rows, length, width) and (rows, length) to (rows, width); 0 where nothing is there."""
    greatest = values.masked_fill(~there[:, :, None], torch.finfo(values.dtype).min).amax(dim=1)
    return greatest * there[:, :1].to(values.dtype)  # a text begins at its first place, so nothing is there when that is empty


def shifted(ids: Tensor, places: int) -> Tensor:
    """The id so many places further on, 0 beyond the end."""
    return F.pad(ids, (0, places))[:, places:]


def hashed(ids: Tensor, order: int) -> Tensor:
    """A number from 0 to 2^31 - 2 for the n-gram of `order` ids that begins at each place, int64 (rows, length)."""
    ids = ids.long()
    value = ids
    for place in range(1, order):
        value = (value * FACTOR + shifted(ids, place)) % PRIME
    return value


def _layer(feature: Feature, text: Callable[[Feature], TextLayer]) -> nn.Module:
    if feature.holds == "codes":
        return Categories(feature.codes)
    return text(feature) if feature.holds == "tokens" else nn.Flatten()


def _width(feature: Feature, layer: nn.Module) -> int:
    if isinstance(layer, Categories | TextLayer):
        return layer.width
    return Preprocess.width(feature) if feature.holds == "numbers" else feature.size
