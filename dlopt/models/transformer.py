"""Self-attention (Vaswani et al. 2017): the blocks that transformers are made of, and the encoder of texts.

Every operation here is traced for any number of rows, none included, and any length; padding is seen by no token, so that the same
text has the same vector in every batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.models import noise
from dlopt.models.depth import residual_end
from dlopt.models.encoder import Encoder, Headed, initialized
from dlopt.models.layers import EMBEDDING_STD, Activation, Dropout, Init, activation, dropout, widening
from dlopt.models.mlp import tower
from dlopt.models.norms import norm
from dlopt.models.rows import Rows, TextLayer, masked_mean
from dlopt.models.text import refuse_no_text
from dlopt.part import Feature, Part, Signature

TokenNorm = Literal["layer", "rms"]
"""Norms of a token by itself; what looks at several tokens or rows would look at padding."""
LONGEST_WAVE = 10_000.0
"""Wave length of the slowest sinusoid of positions, over 2 pi."""


class TextTransformer(Part):
    """A small transformer encoder over the tokens of a text: attention and feed-forward layers in turn, each after a norm.

    Other inputs that a job has are put next to the vector of the text.
    """

    kind: Literal["text_transformer"] = "text_transformer"
    width: int = Field(64, ge=1)
    """Numbers that each token has throughout."""
    depth: int = Field(2, ge=1)
    """Blocks of attention and feed-forward layers."""
    heads: int = Field(4, ge=1)
    """Heads of attention, which share out the width."""
    mlp_ratio: float = Field(2.0, gt=0)
    """Units of a block's feed-forward layer, for each of the width."""
    positions: Literal["learned", "sinusoidal"] = "learned"
    """How a token knows its place: an embedding of each place, or sines and cosines of it (Vaswani et al. 2017)."""
    pooling: Literal["mean", "first"] = "mean"
    """What becomes of the tokens at the end: their mean, or a token put before the text that has seen all others (BERT's [CLS])."""
    activation: Activation = "gelu"
    """Within the feed-forward layers, and after each hidden layer."""
    norm: TokenNorm = "layer"
    """The norm before each layer, of every token by itself."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Units of each hidden layer after the text's vector."""
    init: Init = "xavier_uniform"
    """How weights start; biases start at 0, embeddings at small normal numbers."""
    zero_residual_ends: bool = False
    """Whether the last layer of each block's branches starts at 0, so that the blocks pass on what they get at first."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of the embeddings' numbers, of the feed-forward and hidden units and of what each branch adds that is dropped in training."""
    dropout_kind: Dropout = "standard"
    """How it is dropped; `channel` takes the same numbers out of all tokens of a text."""
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the attention weights that is dropped in training; more than 0 costs several times the time of attention."""

    @model_validator(mode="after")
    def heads_share_out_the_width(self) -> Self:
        refuse_uneven_heads(self.width, self.heads)
        return self

    def build(self, signature: Signature) -> nn.Module:
        return initialized(Headed(self._encoder(signature), signature.num_outputs), self.init, self.zero_residual_ends)

    def encoder(self, signature: Signature) -> Encoder:
        """The last hidden layer's units, or the text's vector beside the other inputs when there is none."""
        return initialized(self._encoder(signature), self.init, self.zero_residual_ends)

    def _encoder(self, signature: Signature) -> Encoder:
        refuse_no_text(signature, self.kind)
        return tower(Rows(signature, self._layer), self.hidden, self.activation, self.dropout, dropout_kind=self.dropout_kind)

    def _layer(self, feature: Feature) -> TextLayer:
        def drop() -> nn.Module:
            return dropout(self.dropout_kind, self.dropout, dim=-1)

        places = Learned(feature.size, self.width) if self.positions == "learned" else Sinusoidal(self.width)
        hidden = max(1, round(self.width * self.mlp_ratio))
        blocks = [
            Block(self.width, self.heads, hidden, self.activation, self.norm, self.attention_dropout, drop(), drop())
            for _ in range(self.depth)
        ]
        norms = norm(self.norm, self.width, 3), norm(self.norm, self.width, 3)
        return TextEncoder(nn.Embedding(feature.tokens, self.width), places, blocks, norms, drop(), self.pooling == "first")


class TextEncoder(TextLayer):
    """Token ids, int32 (rows, length) with 0 at the end of shorter ones, to (rows, width)."""

    def __init__(
        self,
        tokens: nn.Embedding,
        places: nn.Module,
        blocks: Sequence[Block],
        norms: tuple[nn.Module, nn.Module],
        drop: nn.Module,
        first: bool,
    ) -> None:
        super().__init__()
        self.tokens, self.places, self.drop, self.width = tokens, places, drop, tokens.embedding_dim
        self.before, self.after = norms
        self.blocks = nn.ModuleList(blocks)
        self.first = nn.Parameter(torch.randn(self.width) * EMBEDDING_STD) if first else None

    def forward(self, ids: Tensor) -> Tensor:
        return self._mean(ids) if self.first is None else self._first(ids, self.first)

    def _first(self, ids: Tensor, token: nn.Parameter) -> Tensor:
        before = token.expand(ids.shape[0], 1, self.width)
        values = self.drop(self.before(torch.cat((before, self.places(self.tokens(ids))), dim=1)))
        seen = F.pad(ids, (1, 0), value=1) != 0
        for block in self.blocks[:-1]:
            values = block(values, seen)
        return self.after(self.blocks[-1](values, seen, first=True)).squeeze(1)

    def _mean(self, ids: Tensor) -> Tensor:
        ids = F.pad(ids, (0, 1))  # so that there is a token to look at when every text is empty
        seen = F.pad(ids[:, 1:], (1, 0), value=1) != 0  # and one for attention when this text is, which the mean then leaves out
        values = self.drop(self.before(self.places(self.tokens(ids))))
        for block in self.blocks:
            values = block(values, seen)
        return masked_mean(self.after(values), ids != 0)


class Learned(nn.Module):
    """Add an embedding of its place to every token; places beyond the longest text of training have the last one's."""

    def __init__(self, longest: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(longest, width)

    def forward(self, values: Tensor) -> Tensor:
        places = torch.arange(values.shape[1], device=values.device).clamp(max=self.table.num_embeddings - 1)
        return values + self.table(places)


class Sinusoidal(nn.Module):
    """Add sin(p / 10000^(i / half)) and cos of it, i = 0 ... half - 1, to the token at place p, whose embedding counts sqrt(width)-fold."""

    rates: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = -(-width // 2)
        self.width = width
        self.register_buffer("rates", LONGEST_WAVE ** -(torch.arange(half, dtype=torch.float64) / half), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        places = torch.arange(values.shape[1], device=values.device).to(values.dtype)
        angles = places[:, None] * self.rates.to(values.dtype)
        return values * math.sqrt(self.width) + torch.cat((angles.sin(), angles.cos()), dim=1)[:, : self.width]


class Block(nn.Module):
    """Attention, then a feed-forward layer, each after a norm and added to what it was given (pre-norm: Xiong et al. 2020).

    values: (rows, length, width); seen: bool (rows, length), what attention may look at, at least one token of each row; all when
    it is None. first: only the first token is asked for, which gives (rows, 1, width) for a part of the work.
    norm_first: whether attention comes after a norm too.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        name: Activation,
        norms: TokenNorm,
        attention_dropout: float,
        drop_hidden: nn.Module,
        drop_branch: nn.Module,
        norm_first: bool = True,
    ) -> None:
        super().__init__()
        self.before_attention = norm(norms, width, 3) if norm_first else nn.Identity()
        self.attention = Attention(width, heads, attention_dropout)
        self.before_hidden = norm(norms, width, 3)
        self.hidden, self.activation = nn.Linear(width, hidden * widening(name)), activation(name, dim=-1)
        self.end = residual_end(nn.Linear(hidden, width))
        self.drop_hidden, self.drop_attended, self.drop_branch = drop_hidden, copy.deepcopy(drop_branch), drop_branch

    def forward(self, values: Tensor, seen: Tensor | None = None, first: bool = False) -> Tensor:
        normed = self.before_attention(values)
        if first:
            values = values[:, :1]
        values = values + self.drop_attended(self.attention(normed[:, :1] if first else normed, normed, seen))
        hidden = self.drop_hidden(self.activation(self.hidden(self.before_hidden(values))))
        return values + self.drop_branch(self.end(hidden))


class Attention(nn.Module):
    """Scaled dot-product attention of several heads: for each token that asks, what it makes of those that are seen.

    asking: (rows, asking, width), values: (rows, length, width), seen: bool (rows, length) or None, to (rows, asking, width).
    Keys have no bias: it would move all of a token's scores alike, which the softmax does not see.
    """

    def __init__(self, width: int, heads: int, dropped: float = 0.0) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.end = residual_end(nn.Linear(width, width))
        self.heads, self.each, self.drop = heads, width // heads, noise.Dropout(dropped)

    def forward(self, asking: Tensor, values: Tensor, seen: Tensor | None = None) -> Tensor:
        query, key, value = self._split(self.query(asking)), self._split(self.key(values)), self._split(self.value(values))
        mask = None if seen is None else seen[:, None, None, :]
        if self.training and self.drop.p:
            mixed = self._dropped(query, key, value, mask)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        joined: Tensor = self.end(mixed.transpose(1, 2).reshape(asking.shape))  # no -1, which no rows at all leave open in ONNX
        return joined

    def _dropped(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """The same with shares of attention dropped, which fused kernels of torch do by numbers of their own."""
        scores = query @ key.transpose(-2, -1) / math.sqrt(self.each)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        mixed: Tensor = self.drop(scores.softmax(dim=-1)) @ value
        return mixed

    def _split(self, values: Tensor) -> Tensor:
        """(rows, length, width) to (rows, heads, length, width of a head)."""
        return values.unflatten(2, (self.heads, self.each)).transpose(1, 2)


def refuse_uneven_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"heads: {heads} heads cannot share out a width of {width}: make width a multiple of heads")
