"""A small vision transformer for one image input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dlopt.models.depth import StochasticDepth, rising
from dlopt.models.encoder import Chain, Encoder, Headed, Only, initialized, only_image
from dlopt.models.layers import Activation, Dropout, Init, dropout
from dlopt.models.norms import norm
from dlopt.models.transformer import Block, TokenNorm, refuse_uneven_heads
from dlopt.part import DloptError, Part, Signature

Pooling = Literal["mean", "class_token"]
STD = 0.02
"""How positions and the class token start: normal with this deviation, cut off at two of them."""


class Vit(Part):
    """Patches of the image as tokens, through blocks of attention and feed-forward layers, each after a norm (Dosovitskiy et al. 2021)."""

    kind: Literal["vit"] = "vit"
    patch: int = Field(4, ge=1)
    """Height and width of a patch, in pixels; those of the image are multiples of it."""
    width: int = Field(64, ge=1)
    """Numbers that each token has throughout."""
    depth: int = Field(4, ge=1)
    """Blocks of attention and feed-forward layers."""
    heads: int = Field(4, ge=1)
    """Heads of attention, which share out the width."""
    mlp_ratio: float = Field(2.0, gt=0)
    """Units of a block's feed-forward layer, for each of the width."""
    pooling: Pooling = "mean"
    """What becomes of the tokens at the end: their mean, or a learned token put before them that has seen them all."""
    activation: Activation = "gelu"
    """Within the feed-forward layers."""
    norm: TokenNorm = "layer"
    """The norm before each layer, of every token by itself."""
    stochastic_depth: float = Field(0.0, ge=0, lt=1)
    """How often each of the last block's two branches is left out for a row in training; of earlier blocks linearly less
    (Huang et al. 2016)."""
    zero_residual_ends: bool = False
    """Whether the last layer of each branch starts at 0, so that it adds nothing at first."""
    init: Init = "xavier_uniform"
    """How weights start; biases start at 0, positions and the class token at small normal numbers."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the tokens' numbers, of the feed-forward units and of what each branch adds that is dropped in training."""
    dropout_kind: Dropout = "standard"
    """How they are dropped; `channel` takes the same numbers out of all tokens of an image."""

    @model_validator(mode="after")
    def heads_share_out_the_width(self) -> Self:
        refuse_uneven_heads(self.width, self.heads)
        return self

    def build(self, signature: Signature) -> nn.Module:
        return initialized(Headed(self._encoder(signature), signature.num_outputs), self.init, self.zero_residual_ends)

    def encoder(self, signature: Signature) -> Encoder:
        """The mean of the tokens, or the class token."""
        return initialized(self._encoder(signature), self.init, self.zero_residual_ends)

    def _encoder(self, signature: Signature) -> Encoder:
        image = only_image(signature, self.kind)
        height, width, channels = image.shape
        self._refuse_uneven_patches(height, width)
        tokens = (height // self.patch) * (width // self.patch)
        layers: dict[str, nn.Module] = {
            "image": Only(image.name),
            "patches": nn.Conv2d(channels, self.width, self.patch, stride=self.patch),
            "tokens": _Tokens(tokens, self.width, self.pooling == "class_token"),
            "dropout": self._dropout(),
            "blocks": _Blocks([self._block(left_out) for left_out in rising(self.stochastic_depth, self.depth)], self.pooling),
            "norm": norm(self.norm, self.width, dims=2),
        }
        return Chain(self.width, layers)

    def _block(self, left_out: float) -> Block:
        branch = nn.Sequential(self._dropout(), StochasticDepth(left_out))
        units = round(self.width * self.mlp_ratio)
        return Block(self.width, self.heads, units, self.activation, self.norm, 0.0, self._dropout(), branch)

    def _dropout(self) -> nn.Module:
        return dropout(self.dropout_kind, self.dropout, dim=-1)

    def _refuse_uneven_patches(self, height: int, width: int) -> None:
        if height % self.patch or width % self.patch:
            fitting = [size for size in range(1, min(height, width) + 1) if height % size == 0 and width % size == 0]
            raise DloptError(
                f"model.patch: patches of {self.patch}x{self.patch} do not fill {height}x{width}: use one of {', '.join(map(str, fitting))}"
            )


class _Tokens(nn.Module):
    """Patches (rows, width, down, across) to tokens (rows, down * across, width), a learned position added to each; before them the
    class token, when there is one."""

    def __init__(self, places: int, width: int, class_token: bool) -> None:
        super().__init__()
        self.positions = nn.Parameter(_small(places, width))
        self.class_token = nn.Parameter(_small(width)) if class_token else None

    def forward(self, patches: Tensor) -> Tensor:
        rows, width = patches.shape[0], self.positions.shape[1]
        tokens = patches.reshape(rows, width, len(self.positions)).transpose(1, 2) + self.positions  # no -1: there may be no rows
        if self.class_token is None:
            return tokens
        return torch.cat((self.class_token.expand(rows, 1, width), tokens), dim=1)  # its position is in itself


class _Blocks(nn.Module):
    """Tokens (rows, places, width) to a vector for each row, (rows, width)."""

    def __init__(self, blocks: Sequence[Block], pooling: Pooling) -> None:
        super().__init__()
        self.blocks, self.pooling = nn.ModuleList(blocks), pooling

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks[:-1]:
            tokens = block(tokens)
        if self.pooling == "class_token":
            outputs: Tensor = self.blocks[-1](tokens, first=True)[:, 0]
            return outputs
        return self.blocks[-1](tokens).mean(dim=1)


def _small(*shape: int) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(*shape), std=STD, a=-2 * STD, b=2 * STD)
