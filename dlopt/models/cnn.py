"""A small convolutional network for one image input."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from dlopt.models.layers import ACTIVATIONS, Activation, Init, initialize
from dlopt.part import DloptError, Part, Signature


class Cnn(Part):
    """Blocks of 3x3 convolution, 2x2 max pooling and activation, then one hidden fully connected layer.

    Pooling comes first, since it is the same for a rising activation and leaves it a quarter of the work.
    """

    kind: Literal["cnn"] = "cnn"
    channels: tuple[Annotated[int, Field(ge=1)], ...] = Field((16, 32), min_length=1)
    """Channels of each block; every block halves height and width."""
    hidden: int = Field(128, ge=1)
    """Units of the fully connected layer."""
    activation: Activation = "relu"
    """What follows each block and the fully connected layer."""
    init: Init = "kaiming_uniform"
    """How weights start; biases start at 0."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Share of the hidden layer's units that is dropped in training."""

    def build(self, signature: Signature) -> nn.Module:
        height, width, channels = self._image_shape(signature)
        layers: list[nn.Module] = [_Only()]
        for after in self.channels:
            layers += [nn.Conv2d(channels, after, 3, padding=1), nn.MaxPool2d(2), ACTIVATIONS[self.activation]()]
            height, width, channels = height // 2, width // 2, after
        layers += [nn.Flatten(), nn.Linear(channels * height * width, self.hidden), ACTIVATIONS[self.activation]()]
        body = nn.Sequential(*layers, nn.Dropout(self.dropout), nn.Linear(self.hidden, signature.num_outputs))
        initialize(body, self.init)
        return body

    def _image_shape(self, signature: Signature) -> tuple[int, ...]:
        images = [feature for feature in signature.inputs if feature.kind == "image"]
        if len(images) != 1 or len(signature.inputs) != 1:
            raise DloptError("model: cnn takes exactly one input, an image: use kind: mlp for other inputs")
        shape = images[0].shape
        if min(shape[:2]) < 2 ** len(self.channels):
            most = min(shape[:2]).bit_length() - 1
            raise DloptError(f"model.channels: {len(self.channels)} blocks halve {shape[0]}x{shape[1]} to nothing: at most {most}")
        return shape


class _Only(nn.Module):
    """The one input."""

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return next(iter(inputs.values()))
