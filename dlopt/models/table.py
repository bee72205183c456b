"""Models for tables of numbers, parts of dates and categories: Gorishniy et al. 2021, Revisiting deep learning models for tabular data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dlopt.models.depth import Residual, residual_end
from dlopt.models.encoder import Chain, Encoder, Headed, initialized
from dlopt.models.layers import Activation, Dropout, Init, activation, dropout, widening
from dlopt.models.norms import Norm, norm
from dlopt.models.preprocess import Preprocess
from dlopt.models.rows import Rows, TextLayer
from dlopt.models.transformer import Block, TokenNorm, refuse_uneven_heads
from dlopt.part import DloptError, Feature, Part, Signature

TABLE = ("numbers", "codes")
"""Kinds of input that are columns of a table."""


class Embeddings(Part):
    """Numbers as they are and an embedding for each column of categories, side by side: what `mlp` sees of a table. For `joint`."""

    kind: Literal["embeddings"] = "embeddings"

    def encoder(self, signature: Signature) -> Encoder:
        return initialized(Rows(signature, _no_text), "xavier_uniform")  # embeddings, which start alike by every rule


class TableResnet(Part):
    """Residual blocks over numbers and the embeddings of categories: each adds to its input what two fully connected layers make of it.

    x + dropout(linear(dropout(activation(linear(norm(x)))))), and a norm and the activation at the end (Gorishniy et al. 2021).
    """

    kind: Literal["table_resnet"] = "table_resnet"
    width: int = Field(128, ge=1)
    """Numbers that a row has throughout."""
    depth: int = Field(2, ge=1)
    """Blocks."""
    ratio: float = Field(2.0, gt=0)
    """Units within a block, for each of the width."""
    activation: Activation = "relu"
    """Within each block, and at the end."""
    norm: Norm = "batch"
    """At the beginning of each block, and at the end."""
    init: Init = "kaiming_uniform"
    """How weights start; biases start at 0, embeddings at small normal numbers."""
    zero_residual_ends: bool = False
    """Whether the last layer of each block starts at 0, so that the blocks pass on what they get at first."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Share of the units within each block that is dropped in training."""
    residual_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of what each block adds that is dropped in training."""
    dropout_kind: Dropout = "standard"
    """How it is dropped."""

    def build(self, signature: Signature) -> nn.Module:
        return initialized(Headed(self._encoder(signature), signature.num_outputs), self.init, self.zero_residual_ends)

    def encoder(self, signature: Signature) -> Encoder:
        return initialized(self._encoder(signature), self.init, self.zero_residual_ends)

    def _encoder(self, signature: Signature) -> Encoder:
        _refuse_no_table(signature, self.kind)
        rows = Rows(signature, _no_text)
        layers: dict[str, nn.Module] = {"rows": rows, "widen": nn.Linear(rows.width, self.width)}
        layers |= {f"block{index}": self._block() for index in range(self.depth)}
        layers |= {"norm": norm(self.norm, self.width, 2), "activation": activation(self.activation)}
        return Chain(self.width // widening(self.activation), layers)

    @model_validator(mode="after")
    def gates_halve_the_width(self) -> Self:
        if self.width % widening(self.activation):
            raise ValueError(f"width: {self.activation} halves a width, and {self.width} is odd: make it even")
        return self

    def _block(self) -> nn.Module:
        hidden = max(1, round(self.width * self.ratio))
        layers = [
            norm(self.norm, self.width, 2),
            nn.Linear(self.width, hidden * widening(self.activation)),
            activation(self.activation),
            dropout(self.dropout_kind, self.dropout),
            residual_end(nn.Linear(hidden, self.width)),
            dropout(self.dropout_kind, self.residual_dropout),
        ]
        return Residual(nn.Sequential(*layers))


class FtTransformer(Part):
    """A transformer over the columns of a table: each number and each category of a row becomes a token (Gorishniy et al. 2021).

    A number x of column i is x * w_i + b_i, a category its embedding + b_i; a token put before them sees them all and gives the output.
    The paper's own sizes are width 192, depth 3, heads 8.
    """

    kind: Literal["ft_transformer"] = "ft_transformer"
    width: int = Field(64, ge=1)
    """Numbers that each token has throughout."""
    depth: int = Field(3, ge=1)
    """Blocks of attention and feed-forward layers."""
    heads: int = Field(8, ge=1)
    """Heads of attention, which share out the width."""
    mlp_ratio: float = Field(4 / 3, gt=0)
    """Units of a block's feed-forward layer, for each of the width."""
    activation: Activation = "reglu"
    """Within the feed-forward layers."""
    norm: TokenNorm = "layer"
    """The norm before each layer, of every token by itself; the first block's attention has none, as in the paper."""
    init: Init = "xavier_uniform"
    """How weights start; biases start at 0, those of tokens and embeddings at small normal numbers."""
    zero_residual_ends: bool = False
    """Whether the last layer of each block's branches starts at 0, so that the blocks pass on what they get at first."""
    attention_dropout: float = Field(0.2, ge=0, lt=1)
    """Share of the attention weights that is dropped in training; 0 makes attention several times faster."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of the feed-forward units that is dropped in training."""
    residual_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of what each branch adds that is dropped in training."""
    dropout_kind: Dropout = "standard"
    """How it is dropped; `channel` takes the same numbers out of all columns of a row."""

    @model_validator(mode="after")
    def heads_share_out_the_width(self) -> Self:
        refuse_uneven_heads(self.width, self.heads)
        return self

    def build(self, signature: Signature) -> nn.Module:
        return initialized(Headed(self._encoder(signature), signature.num_outputs), self.init, self.zero_residual_ends)

    def encoder(self, signature: Signature) -> Encoder:
        return initialized(self._encoder(signature), self.init, self.zero_residual_ends)

    def _encoder(self, signature: Signature) -> Encoder:
        _refuse_no_table(signature, self.kind)
        return ColumnEncoder(Columns(signature, self.width), [self._block(index) for index in range(self.depth)], self.norm)

    def _block(self, index: int) -> Block:
        return Block(
            self.width,
            self.heads,
            max(1, round(self.width * self.mlp_ratio)),
            self.activation,
            self.norm,
            self.attention_dropout,
            dropout(self.dropout_kind, self.dropout, dim=-1),
            dropout(self.dropout_kind, self.residual_dropout, dim=-1),
            norm_first=index > 0,
        )


class ColumnEncoder(Encoder):
    """Tokens of a row's columns through blocks of attention; the first token's norm and ReLU is the vector of the row."""

    def __init__(self, columns: Columns, blocks: Sequence[Block], name: TokenNorm) -> None:
        super().__init__()
        self.columns, self.blocks, self.width = columns, nn.ModuleList(blocks), columns.width
        self.after = norm(name, self.width, 2)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        values = self.columns(inputs)
        for block in self.blocks[:-1]:
            values = block(values)
        outputs: Tensor = self.blocks[-1](values, first=True).squeeze(1)
        return torch.relu(self.after(outputs))


class Columns(nn.Module):
    """{name: (rows, columns)} to tokens (rows, 1 + columns, width): the token of the row, those of the numbers, those of the categories,
    and one for each vector, which is a linear map of it.

    All categories share one table, in which each column has a part of its own.
    """

    starts: Tensor

    def __init__(self, signature: Signature, width: int) -> None:
        super().__init__()
        numbers = [feature for feature in signature.inputs if feature.holds == "numbers" and not feature.is_vector]
        vectors = [feature for feature in signature.inputs if feature.is_vector]
        categories = [feature for feature in signature.inputs if feature.holds == "codes"]
        self.numbers, self.categories = [feature.name for feature in numbers], [feature.name for feature in categories]
        self.width, codes = width, [size for feature in categories for size in feature.codes]
        scaled = sum(Preprocess.width(feature) for feature in numbers)
        self.scaled = nn.Embedding(scaled, width) if numbers else None
        self.table = nn.Embedding(sum(codes), width) if categories else None
        self.vectors = [feature.name for feature in vectors]
        self.mapped = nn.ModuleList(nn.Linear(Preprocess.width(feature), width, bias=False) for feature in vectors)
        self.added = nn.Embedding(1 + scaled + len(codes) + len(vectors), width)
        self.register_buffer(
            "starts", torch.tensor([sum(codes[:index]) for index in range(len(codes))], dtype=torch.int64), persistent=False
        )

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        tokens = []
        if self.scaled is not None:
            tokens.append(_beside(inputs, self.numbers)[:, :, None] * self.scaled.weight)
        if self.table is not None:
            tokens.append(self.table(_beside(inputs, self.categories) + self.starts))
        tokens += [layer(inputs[name])[:, None] for name, layer in zip(self.vectors, self.mapped, strict=True)]
        columns = torch.cat(tokens, dim=1) + self.added.weight[1:]
        row = self.added.weight[:1].expand(columns.shape[0], 1, self.width)  # not len, which a trace takes for a fixed number
        return torch.cat((row, columns), dim=1)


def _beside(inputs: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([inputs[name] for name in names], dim=1)


def _refuse_no_table(signature: Signature, kind: str) -> None:
    """Raises DloptError unless all inputs are columns of a table; nothing that a job has is left out in silence."""
    other = [feature for feature in signature.inputs if feature.holds not in TABLE]
    if len(other) == len(signature.inputs):
        raise DloptError(f"model: {kind} takes numbers, dates and categories, and there are none: use kind: mlp or joint for other inputs")
    if other:
        raise DloptError(f"model: {kind} takes numbers, dates and categories, and {other[0].name!r} is a {other[0].kind}: use kind: joint")


def _no_text(feature: Feature) -> TextLayer:
    raise DloptError(f"model: {feature.name!r} is a text, which is no column of a table: use kind: joint")
