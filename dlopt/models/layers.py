"""Tables of what layers can be made of; to add an activation, an initialisation or a kind of dropout, add a line and its name.

What `initialize` fills, and how:

| what                                                   | how it starts                                                       |
|--------------------------------------------------------|---------------------------------------------------------------------|
| weights of Linear, Conv1d, Conv2d, Conv3d              | by the named rule of INITS                                          |
| query, key and value projections of MultiheadAttention | each of the three by the rule, as the Linear layer that it is       |
| biases of all these                                    | 0                                                                   |
| Embedding, EmbeddingBag                                | normal, deviation 0.05, whatever the rule; the row of padding is 0  |
| weight and bias of a layer with residual_end = True    | 0 with `zero_residual_ends`, so that each block starts as identity  |
| norm layers                                            | as they are made: weight 1, bias 0                                  |
| PReLU                                                  | as it is made: slope 0.25                                           |
| anything else: class tokens, positions, layer scales   | as it is made                                                       |

With the rule lsuv the weights start orthogonal, and are scaled on a batch of data afterwards: `dlopt.models.lsuv`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlopt.models import noise

Activation = Literal[
    "linear", "sigmoid", "tanh", "relu", "leaky_relu", "prelu", "rrelu", "relu6", "relu_squared", "elu", "selu", "celu", "gelu",
    "gelu_tanh", "silu", "mish", "softplus", "softsign", "softshrink", "hardshrink", "tanhshrink", "hardsigmoid", "hardswish", "hardtanh",
    "logsigmoid", "threshold", "softmax", "log_softmax", "softmin", "glu", "geglu", "swiglu", "reglu",
]  # fmt: skip


class Elementwise(nn.Module):
    """A function of each number by itself."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: Tensor) -> Tensor:
        changed: Tensor = self.function(values)
        return changed


class Gated(nn.Module):
    """Half of the units, each times a function of its partner in the other half: a * f(b), where the input is a beside b along `dim`."""

    def __init__(self, gate: Callable[[Tensor], Tensor], dim: int = 1) -> None:
        super().__init__()
        self.gate, self.dim = gate, dim

    def forward(self, values: Tensor) -> Tensor:
        passed, gate = values.chunk(2, self.dim)
        return passed * self.gate(gate)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity,  # x
    "sigmoid": nn.Sigmoid,  # 1 / (1 + e^-x)
    "tanh": nn.Tanh,
    "relu": nn.ReLU,  # max(x, 0): Nair, Hinton 2010
    "leaky_relu": nn.LeakyReLU,  # x, or 0.01 x below 0: Maas et al. 2013
    "prelu": nn.PReLU,  # x, or below 0 a x, where a starts at 0.25 and is learned, one for a layer: He et al. 2015
    "rrelu": noise.RReLU,  # x, or below 0 a x, a drawn from [1/8, 1/3] in training, their mean after it: Xu et al. 2015
    "relu6": nn.ReLU6,  # min(max(x, 0), 6): Krizhevsky 2010
    "relu_squared": lambda: Elementwise(_relu_squared),  # max(x, 0)^2: So et al. 2021
    "elu": nn.ELU,  # x, or e^x - 1 below 0: Clevert et al. 2016
    "selu": nn.SELU,  # 1.0507 x, or 1.7581 (e^x - 1) below 0; wants init lecun_normal and alpha dropout: Klambauer et al. 2017
    "celu": nn.CELU,  # elu, whose derivative is continuous for any alpha; with alpha 1 they are the same: Barron 2017
    "gelu": nn.GELU,  # x P(N(0, 1) <= x): Hendrycks, Gimpel 2016
    "gelu_tanh": lambda: nn.GELU("tanh"),  # x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2, gelu to 3 digits
    "silu": nn.SiLU,  # x sigmoid(x), swish: Elfwing et al. 2018, Ramachandran et al. 2017
    "mish": nn.Mish,  # x tanh(softplus(x)): Misra 2019
    "softplus": nn.Softplus,  # log(1 + e^x): Dugas et al. 2001
    "softsign": nn.Softsign,  # x / (1 + |x|): Bergstra et al. 2009
    "softshrink": nn.Softshrink,  # x -/+ 0.5 towards 0, and 0 within [-0.5, 0.5]
    "hardshrink": nn.Hardshrink,  # x, and 0 within [-0.5, 0.5]
    "tanhshrink": nn.Tanhshrink,  # x - tanh(x)
    "hardsigmoid": nn.Hardsigmoid,  # min(max(x / 6 + 1/2, 0), 1): Courbariaux et al. 2015, with MobileNet's slope
    "hardswish": nn.Hardswish,  # x hardsigmoid(x): Howard et al. 2019
    "hardtanh": nn.Hardtanh,  # min(max(x, -1), 1)
    "logsigmoid": lambda: Elementwise(_logsigmoid),  # log(sigmoid(x))
    "threshold": lambda: Elementwise(_threshold),  # x above 1, else 0: Konda et al. 2015
    "softmax": lambda: nn.Softmax(dim=1),  # e^x over the sum of the units' e^x
    "log_softmax": lambda: nn.LogSoftmax(dim=1),
    "softmin": lambda: nn.Softmin(dim=1),  # softmax of -x
    "glu": lambda: Gated(torch.sigmoid),  # a sigmoid(b): Dauphin et al. 2017
    "geglu": lambda: Gated(F.gelu),  # this and the next: Shazeer 2020
    "swiglu": lambda: Gated(F.silu),
    "reglu": lambda: Gated(F.relu),
}


def activation(name: Activation, dim: int = 1) -> nn.Module:
    """The layer of that name. `dim` is where the units are, which those need that look at several: 1 of (rows, units) and of
    (rows, channels, height, width), -1 of (rows, length, width). A gated one halves that dimension: see `widening`.
    """
    layer = ACTIVATIONS[name]()
    if hasattr(layer, "dim"):
        layer.dim = dim  # type: ignore[assignment]  # a plain attribute
    return layer


def widening(name: Activation) -> int:
    """How many units the layer before needs for each that comes out: 2 for gated activations, else 1."""
    return 2 if isinstance(ACTIVATIONS[name](), Gated) else 1


def _relu_squared(values: Tensor) -> Tensor:
    return F.relu(values).square()


def _logsigmoid(values: Tensor) -> Tensor:
    """Not F.logsigmoid: the exporter makes that the logarithm of a sigmoid, which is off by 2e-5 at -6."""
    return -F.softplus(-values)


def _threshold(values: Tensor) -> Tensor:
    """Not nn.Threshold: the exporter refuses every threshold but 0."""
    return torch.where(values > 1, values, torch.zeros_like(values))


Init = Literal[
    "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "lecun_uniform", "lecun_normal", "normal", "small_normal",
    "truncated_normal", "uniform", "orthogonal", "sparse", "zeros", "lsuv",
]  # fmt: skip
INITS: dict[str, Callable[[Tensor], Tensor]] = {
    "xavier_uniform": nn.init.xavier_uniform_,  # variance 2 / (fan_in + fan_out): Glorot, Bengio 2010
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": lambda weight: nn.init.kaiming_uniform_(weight, nonlinearity="relu"),  # variance 2 / fan_in: He et al. 2015
    "kaiming_normal": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
    "lecun_uniform": lambda weight: nn.init.kaiming_uniform_(weight, nonlinearity="linear"),  # variance 1 / fan_in: LeCun et al. 1998
    "lecun_normal": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="linear"),
    "normal": lambda weight: nn.init.normal_(weight, std=1.0),
    "small_normal": lambda weight: nn.init.normal_(weight, std=0.01),
    "truncated_normal": lambda weight: nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04),  # as BERT: Devlin et al. 2019
    "uniform": lambda weight: _uniform(weight),  # within 1 / sqrt(fan_in): the heuristic in Glorot, Bengio 2010; torch's own
    "orthogonal": nn.init.orthogonal_,  # rows or columns, whichever are fewer, orthonormal: Saxe et al. 2014
    "sparse": lambda weight: _sparse(weight),  # 15 standard normal weights a unit, the others 0: Martens 2010
    "zeros": nn.init.zeros_,  # for a model without hidden layers: units that start alike stay alike
    "lsuv": nn.init.orthogonal_,  # then scaled on data: Mishkin, Matas 2016
}
SPARSE = 15
"""Weights that come into a unit of a sparse layer."""
EMBEDDING_STD = 0.05
"""How embeddings start: normal with this deviation, whatever rule is named for the weights, since their fans mean nothing."""


def initialize(module: nn.Module, init: Init, zero_residual_ends: bool = False) -> None:
    """Fill the weights by the named rule, as the table at the top of this file says; what else is in the module is left as it is.

    `zero_residual_ends`: layers with an attribute `residual_end` that is true (a Linear, a convolution, or the norm after it) get
    zeros, so that the branch they end adds nothing at first (Goyal et al. 2017); the numbers drawn for the others stay the same.
    """
    with torch.no_grad():
        for layer in module.modules():
            _fill(layer, INITS[init])
        if zero_residual_ends:
            for layer in module.modules():
                if getattr(layer, "residual_end", False):
                    for parameter in layer.parameters(recurse=False):
                        parameter.zero_()


def _fill(layer: nn.Module, rule: Callable[[Tensor], Tensor]) -> None:
    """This layer's own weights; those of the layers in it are filled when their turn comes."""
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        nn.init.normal_(layer.weight, std=EMBEDDING_STD)
        if layer.padding_idx is not None:
            layer.weight[layer.padding_idx].zero_()
    elif isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        rule(layer.weight)
        _zero(layer.bias)
    elif isinstance(layer, nn.MultiheadAttention):
        for weight in projections(layer):
            rule(weight)
        _zero(layer.in_proj_bias)


def projections(attention: nn.MultiheadAttention) -> tuple[Tensor, ...]:
    """The weights that make queries, keys and values; what joins the heads is a Linear layer by itself."""
    if attention.in_proj_weight is not None:
        return attention.in_proj_weight.chunk(3)
    return (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)


def _zero(bias: Tensor | None) -> None:
    if bias is not None:
        bias.zero_()


def _uniform(weight: Tensor) -> Tensor:
    bound = 1 / math.sqrt(weight[0].numel())
    return nn.init.uniform_(weight, -bound, bound)


def _sparse(weight: Tensor) -> Tensor:
    """Which weights of a unit are there is drawn unit by unit, so that each has the same number of them."""
    chosen = torch.rand(len(weight), weight[0].numel(), device=weight.device).topk(min(SPARSE, weight[0].numel()), dim=1).indices
    kept = torch.zeros(len(weight), weight[0].numel(), device=weight.device).scatter_(1, chosen, 1.0)
    return nn.init.normal_(weight).mul_(kept.view_as(weight))


Dropout = Literal["standard", "channel", "alpha", "feature_alpha", "gaussian"]


DROPOUTS: dict[str, Callable[[float], nn.Module]] = {
    "standard": noise.Dropout,  # each number 0 with probability p, else divided by 1 - p: Srivastava et al. 2014
    "channel": lambda p: noise.Dropout(p, channels=True),  # the same for whole channels: Tompson et al. 2015
    "alpha": lambda p: noise.Dropout(p, alpha=True),  # keeps mean 0 and deviation 1: for selu: Klambauer et al. 2017
    "feature_alpha": lambda p: noise.Dropout(p, alpha=True, channels=True),  # the same for whole channels
    "gaussian": noise.GaussianDropout,  # times N(1, p / (1 - p)): Srivastava et al. 2014, section 10
}


def dropout(kind: Dropout, p: float, dim: int = 1) -> nn.Module:
    """The layer of that kind; it does nothing outside of training. p: the share that is dropped; `dim`: where the channels are, 1 of
    (rows, units) and of (rows, channels, height, width), -1 of (rows, length, width).
    """
    layer = DROPOUTS[kind](p)
    if hasattr(layer, "dim"):
        layer.dim = dim  # type: ignore[assignment]  # a plain attribute
    return layer


@contextmanager
def buffers_kept(network: nn.Module) -> Iterator[None]:
    """What happens inside leaves no trace in the buffers."""
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
