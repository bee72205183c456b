"""A small convolutional network for one image input."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from dlopt.models.encoder import Chain, Encoder, Headed, Only, initialized, only_image
from dlopt.models.layers import Activation, Dropout, Init, activation, dropout, widening
from dlopt.models.mlp import hidden_layer
from dlopt.models.norms import Norm, bias_before, norm
from dlopt.part import DloptError, Part, Signature


class Cnn(Part):
    """Blocks of a convolution, 2x2 max pooling, norm and activation, then one hidden fully connected layer.

    Pooling comes before the activation, since it is the same for a rising one, and leaves a quarter of the work.
    """

    kind: Literal["cnn"] = "cnn"
    channels: tuple[Annotated[int, Field(ge=1)], ...] = Field((16, 32), min_length=1)
    """Channels of each block; every block halves height and width."""
    kernel: int = Field(3, ge=1)
    """Height and width of the filters of each convolution."""
    padding: Literal["same", "valid"] = "same"
    """same: a convolution keeps height and width, with zeros around (kernel must be odd); valid: it sees whole neighbourhoods alone.
    LeNet-5 as Caffe has it is {channels: [20, 50], kernel: 5, padding: valid, hidden: 500}."""
    hidden: int = Field(128, ge=1)
    """Units of the fully connected layer."""
    activation: Activation = "relu"
    """What follows each block and the fully connected layer."""
    norm: Norm = "none"
    """What normalises each block's and the fully connected layer's outputs, before the activation."""
    init: Init = "kaiming_uniform"
    """How weights start; biases start at 0."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Share of the hidden layer's units that is dropped in training."""
    block_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of each block's outputs that is dropped in training: whole channels where dropout_kind is channel."""
    dropout_kind: Dropout = "standard"
    """How both are dropped."""

    @model_validator(mode="after")
    def same_padding_needs_a_middle(self) -> Self:
        if self.padding == "same" and self.kernel % 2 == 0:
            raise ValueError(f"kernel: {self.kernel} is even, and padding: same needs an odd one: use {self.kernel + 1}, or padding: valid")
        return self

    def build(self, signature: Signature) -> nn.Module:
        return initialized(Headed(self._encoder(signature), signature.num_outputs), self.init)

    def encoder(self, signature: Signature) -> Encoder:
        """The units of the fully connected layer."""
        return initialized(self._encoder(signature), self.init)

    def _encoder(self, signature: Signature) -> Encoder:
        image = only_image(signature, self.kind)
        height, width, channels = image.shape
        self._refuse_too_small(height, width)
        layers: dict[str, nn.Module] = {"image": Only(image.name)}
        for number, after in enumerate(self.channels, start=1):
            layers[f"block{number}"] = self._block(channels, after)
            height, width, channels = self._after(height), self._after(width), after
        size = channels * height * width
        layers["flat"] = nn.Flatten()
        layers["hidden"] = hidden_layer(size, self.hidden, self.activation, self.dropout, self.dropout_kind, self.norm)
        return Chain(self.hidden, layers)

    def _block(self, before: int, after: int) -> nn.Sequential:
        """(rows, before, height, width) to (rows, after, half of the height, half of the width)."""
        wide = after * widening(self.activation)
        layers = nn.Sequential()
        around = self.kernel // 2 if self.padding == "same" else 0
        layers.add_module("convolution", nn.Conv2d(before, wide, self.kernel, padding=around, bias=bias_before(self.norm)))
        layers.add_module("pooling", nn.MaxPool2d(2))
        if self.norm != "none":
            layers.add_module("norm", norm(self.norm, wide, dims=4))
        layers.add_module("activation", activation(self.activation))
        if self.block_dropout:
            layers.add_module("dropout", dropout(self.dropout_kind, self.block_dropout))
        return layers

    def _after(self, size: int) -> int:
        """Height or width after a block."""
        return (size if self.padding == "same" else size - self.kernel + 1) // 2

    def _refuse_too_small(self, height: int, width: int) -> None:
        least, most = min(height, width), 0
        while most < len(self.channels) and (least := self._after(least)) >= 1:
            most += 1
        if most < len(self.channels):
            raise DloptError(f"model.channels: {len(self.channels)} blocks halve {height}x{width} to nothing: at most {most}")
