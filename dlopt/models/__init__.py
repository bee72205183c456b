"""Models: torch only. The union at the end is the list of what a job can name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from dlopt.models.cnn import Cnn
from dlopt.models.mlp import Mlp
from dlopt.models.preprocess import Preprocess
from dlopt.part import Signature, Statistics

Model = Annotated[Mlp | Cnn, Field(discriminator="kind")]


class Network(nn.Module):
    """Preprocessing and model: raw tensors, {name: (rows, *shape)}, to logits, (rows, classes)."""

    def __init__(self, preprocess: Preprocess, body: nn.Module) -> None:
        super().__init__()
        self.preprocess, self.body = preprocess, body

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.body(self.preprocess(inputs))
        return logits


def build_network(
    model: Model, signature: Signature, statistics: Mapping[str, Statistics], seed: int, dtype: torch.dtype = torch.float32
) -> Network:
    """The network of a job; the same seed gives the same weights, whatever was drawn before. Sizes come from the signature."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(Preprocess(signature, statistics), model.build(signature))
    return network.to(dtype)
