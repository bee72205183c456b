"""Residual networks for one image input of any size."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dlopt.models.depth import Residual, residual_end, rising
from dlopt.models.encoder import Chain, Encoder, Headed, Only, initialized, only_image
from dlopt.models.layers import Activation, Dropout, Init, activation, dropout, widening
from dlopt.models.norms import Norm, bias_before, norm
from dlopt.part import DloptError, Part, Signature

Positive = Annotated[int, Field(ge=1)]
EXPANSION = 4
"""How many times a bottleneck block's 3x3 convolution is narrower than what the block gives."""


class StridedConv2d(nn.Conv2d):
    """A 1x1 convolution with a stride, as one without a stride over the places that count: the same sums.

    oneDNN's own, in torch 2.13, writes beyond its memory in the backward pass where channels lie last in memory and there are fewer of
    them than numbers in a vector register (oneDNN issue 6035).
    """

    def forward(self, input: Tensor) -> Tensor:
        down, right = self.stride
        last = input.is_contiguous(memory_format=torch.channels_last)
        places = input[..., ::down, ::right].contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        return nn.functional.conv2d(places, self.weight, self.bias)


class Resnet(Part):
    """Stages of residual blocks, each stage but the first halving height and width, then the mean over all places (He et al. 2016).

    ResNet-18 is {stem: large, blocks: [2, 2, 2, 2], widths: [64, 128, 256, 512]}; ResNet-50 is {stem: large, block: bottleneck,
    blocks: [3, 4, 6, 3], widths: [256, 512, 1024, 2048]}, its strides in the 3x3 convolutions, as torchvision has it.
    """

    kind: Literal["resnet"] = "resnet"
    stem: Literal["small", "large"] = "small"
    """What comes before the blocks: a 3x3 convolution for small images; a 7x7 convolution and 3x3 max pooling, which each halve height
    and width, for large ones."""
    block: Literal["basic", "bottleneck"] = "basic"
    """Two 3x3 convolutions, or a 3x3 one between two 1x1 ones, which makes its channels four times fewer."""
    blocks: tuple[Positive, ...] = Field((2, 2, 2), min_length=1)
    """Blocks of each stage."""
    widths: tuple[Positive, ...] = Field((16, 32, 64), min_length=1)
    """Channels that the blocks of each stage give."""
    activation: Activation = "relu"
    """What follows each norm; of a block's last one, what follows the sum."""
    norm: Norm = "batch"
    """What follows each convolution."""
    stochastic_depth: float = Field(0.0, ge=0, lt=1)
    """How often the last block's branch is left out for a row in training; those of earlier blocks linearly less (Huang et al. 2016)."""
    residual_scale: float | None = Field(None, ge=0)
    """Where a learned number starts that each branch is multiplied by; null leaves it out."""
    zero_residual_ends: bool = True
    """Whether the last norm of each branch, or its last convolution where there is no norm, starts at 0, so that the branch adds
    nothing at first (Goyal et al. 2017)."""
    init: Init = "kaiming_normal"
    """How weights start; biases start at 0."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the vector before the output layer that is dropped in training."""
    dropout_kind: Dropout = "standard"
    """How it is dropped."""

    @model_validator(mode="after")
    def every_stage_has_blocks_and_a_width(self) -> Self:
        if len(self.blocks) != len(self.widths):
            raise ValueError(f"widths: {len(self.widths)} of them for {len(self.blocks)} stages of blocks: give one for each stage")
        return self

    @model_validator(mode="after")
    def a_bottleneck_is_a_quarter_of_the_width(self) -> Self:
        if self.block == "bottleneck" and any(width % EXPANSION for width in self.widths):
            raise ValueError(f"widths: a bottleneck takes multiples of {EXPANSION}, not {list(self.widths)}")
        return self

    def build(self, signature: Signature) -> nn.Module:
        return initialized(Headed(self._encoder(signature), signature.num_outputs), self.init, self.zero_residual_ends)

    def encoder(self, signature: Signature) -> Encoder:
        """The means of the last block's channels."""
        return initialized(self._encoder(signature), self.init, self.zero_residual_ends)

    def _encoder(self, signature: Signature) -> Encoder:
        image = only_image(signature, self.kind)
        height, width, channels = image.shape
        self._refuse_too_small(height, width)
        layers: dict[str, nn.Module] = {"image": Only(image.name), "stem": self._stem(channels)}
        before, left_out = self._stem_width, iter(rising(self.stochastic_depth, sum(self.blocks)))
        for number, (blocks, after) in enumerate(zip(self.blocks, self.widths, strict=True), start=1):
            stage = nn.Sequential()
            for place in range(blocks):
                stride = 2 if number > 1 and place == 0 else 1
                stage.append(self._block(before, after, stride, next(left_out)))
                before = after
            layers[f"stage{number}"] = stage
        layers |= {"mean": _Mean(), "dropout": dropout(self.dropout_kind, self.dropout)}
        return Chain(before, layers)

    @property
    def _stem_width(self) -> int:
        return self.widths[0] if self.block == "basic" else self.widths[0] // EXPANSION

    def _stem(self, channels: int) -> nn.Sequential:
        size, stride = (3, 1) if self.stem == "small" else (7, 2)
        stem = self._convolution(channels, self._stem_width * widening(self.activation), size, stride)
        stem.add_module("activation", activation(self.activation))
        if self.stem == "large":
            stem.add_module("pooling", nn.MaxPool2d(3, stride=2, padding=1))
        return stem

    def _block(self, before: int, after: int, stride: int, leave_out: float) -> nn.Sequential:
        """(rows, before, height, width) to (rows, after, height / stride, width / stride), halves rounded up."""
        wide = after * widening(self.activation)  # a gated activation follows the sum, which has to be as wide as its input
        branch = self._basic(before, after, wide, stride) if self.block == "basic" else self._bottleneck(before, after, wide, stride)
        residual_end(list(branch[-1].children())[-1])  # the norm, or the convolution where there is none
        shortcut = None if before == wide and stride == 1 else self._convolution(before, wide, 1, stride)
        block = nn.Sequential()
        block.add_module("residual", Residual(branch, shortcut, self.residual_scale, leave_out))
        block.add_module("activation", activation(self.activation))
        return block

    def _basic(self, before: int, after: int, wide: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            self._convolution(before, wide, 3, stride),
            activation(self.activation),
            self._convolution(after, wide, 3),
        )

    def _bottleneck(self, before: int, after: int, wide: int, stride: int) -> nn.Sequential:
        narrow = after // EXPANSION
        gated = narrow * widening(self.activation)
        return nn.Sequential(
            self._convolution(before, gated, 1),
            activation(self.activation),
            self._convolution(narrow, gated, 3, stride),
            activation(self.activation),
            self._convolution(narrow, wide, 1),
        )

    def _convolution(self, before: int, after: int, size: int, stride: int = 1) -> nn.Sequential:
        """A convolution that keeps height and width but for its stride, and the norm after it."""
        kind = StridedConv2d if size == 1 and stride > 1 else nn.Conv2d
        convolution = kind(before, after, size, stride, padding=size // 2, bias=bias_before(self.norm))
        layers = nn.Sequential()
        layers.add_module("convolution", convolution)
        if self.norm != "none":
            layers.add_module("norm", norm(self.norm, after, dims=4))
        return layers

    def _refuse_too_small(self, height: int, width: int) -> None:
        """Each stage needs a pixel that is not all padding."""
        shrinks = 2 ** (len(self.blocks) - 1) * (4 if self.stem == "large" else 1)
        if min(height, width) < shrinks:
            other = " or stem: small" if self.stem == "large" else ""
            raise DloptError(
                f"model.blocks: {len(self.blocks)} stages after a {self.stem} stem shrink {height}x{width} by {shrinks} to less than a "
                f"pixel: use fewer stages{other}"
            )


class _Mean(nn.Module):
    """(rows, channels, height, width) to the means of the channels, (rows, channels)."""

    def forward(self, values: Tensor) -> Tensor:
        return values.mean(dim=(2, 3))
