"""Models: torch only. The union at the end is the list of what a job can name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from dlopt.models.cnn import Cnn
from dlopt.models.custom import Custom
from dlopt.models.joint import Joint
from dlopt.models.linear import Linear
from dlopt.models.mlp import Mlp
from dlopt.models.noise import key
from dlopt.models.preprocess import Preprocess
from dlopt.models.resnet import Resnet
from dlopt.models.table import FtTransformer, TableResnet
from dlopt.models.text import TextBag, TextCnn
from dlopt.models.transformer import TextTransformer
from dlopt.models.vit import Vit
from dlopt.part import Signature, Statistics

Model = Annotated[
    Linear | Mlp | Cnn | Resnet | Vit | TextBag | TextCnn | TextTransformer | TableResnet | FtTransformer | Joint | Custom,
    Field(discriminator="kind"),
]


class Network(nn.Module):
    """Preprocessing, model and output: raw tensors, {name: (rows, *shape)}, to logits of classes or labels, or numbers in the data's
    units, (rows, outputs)."""

    def __init__(self, preprocess: Preprocess, body: nn.Module, output: Units | nn.Identity) -> None:
        super().__init__()
        self.preprocess, self.body, self.output = preprocess, body, output

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = self.output(self.body(self.preprocess(inputs)))
        return outputs


class Units(nn.Module):
    """Standardised outputs to numbers in the data's units, less the target's offsets: values * std + mean, by its training rows."""

    mean: Tensor
    std: Tensor

    def __init__(self, statistics: Statistics) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(statistics.shift, dtype=torch.float64))
        std = torch.tensor(statistics.std, dtype=torch.float64)
        self.register_buffer("std", torch.where(std > 0, std, 1.0))  # of a number that is always the same

    def forward(self, values: Tensor) -> Tensor:
        return values * self.std + self.mean


def build_network(
    model: Model, signature: Signature, statistics: Mapping[str, Statistics], seed: int, dtype: torch.dtype = torch.float32
) -> Network:
    """The network of a job; the same seed gives the same weights, whatever was drawn before. Sizes come from the signature."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = Units(statistics[signature.target.name]) if signature.target.kind == "number" else nn.Identity()
        network = Network(Preprocess(signature, statistics), model.build(signature), output)
    key(network)
    return network.to(dtype)
