"""What a model is made of: an encoder, which turns a row into a vector, and a head, which turns the vector into the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from dlopt.models.layers import Init, initialize
from dlopt.part import DloptError, Feature, Signature

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class Encoder(nn.Module):
    """What preprocessing leaves of rows, {name: tensor}, to a vector each, (rows, `width`)."""

    width: int


class Chain(nn.Sequential, Encoder):
    """An encoder of layers that follow each other by their names: the first takes {name: tensor}, the last gives (rows, width)."""

    def __init__(self, width: int, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.width = width
        for name, layer in layers.items():
            self.add_module(name, layer)


class Headed(nn.Module):
    """An encoder and a fully connected layer after it: {name: tensor} to (rows, outputs)."""

    def __init__(self, encoder: Encoder, outputs: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.width, outputs)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = self.head(self.encoder(inputs))
        return outputs


def initialized(module: AnyModule, init: Init, zero_residual_ends: bool = False) -> AnyModule:
    """The same module, its weights filled by the named rule: all at once, so that an encoder's numbers are drawn before its head's."""
    initialize(module, init, zero_residual_ends)
    return module


class Only(nn.Module):
    """The input of this name, as preprocessing leaves it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return inputs[self.name]


def only_image(signature: Signature, kind: str) -> Feature:
    """The one input of a model of images; its shape is (height, width, channels)."""
    if len(signature.inputs) != 1 or signature.inputs[0].holds != "pixels":
        raise DloptError(f"model: {kind} takes exactly one input, an image: use kind: mlp or joint for other inputs")
    return signature.inputs[0]
