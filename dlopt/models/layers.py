"""Tables of what layers can be made of; to add an activation or an initialisation, add a line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Activation = Literal["relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid"]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}

Init = Literal["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "normal", "small_normal"]
INITS: dict[str, Callable[[Tensor], Tensor]] = {
    "xavier_uniform": nn.init.xavier_uniform_,  # variance 2 / (fan_in + fan_out): Glorot, Bengio 2010
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": lambda weight: nn.init.kaiming_uniform_(weight, nonlinearity="relu"),  # variance 2 / fan_in: He et al. 2015
    "kaiming_normal": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
    "normal": lambda weight: nn.init.normal_(weight, std=1.0),
    "small_normal": lambda weight: nn.init.normal_(weight, std=0.01),
}


EMBEDDING_STD = 0.05
"""How embeddings start: normal with this deviation, whatever rule is named for the weights, since their fans mean nothing."""


def initialize(module: nn.Module, init: Init) -> None:
    """Fill every weight by the named rule, every bias with zeros, and every embedding with small normal numbers."""
    with torch.no_grad():
        for layer in module.modules():
            for parameter in layer.parameters(recurse=False):
                if isinstance(layer, nn.Embedding):
                    nn.init.normal_(parameter, std=EMBEDDING_STD)
                elif parameter.dim() > 1:
                    INITS[init](parameter)
                else:
                    parameter.zero_()
