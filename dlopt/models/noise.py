"""The random numbers of training as pure functions of (seed, step, layer, row of the whole batch, place in the row): the same bits on any
device, of any number of workers, in micro batches, computed again on the way back, compiled.

The loop takes each step within `step`; before each forward pass the objective calls `part`, with which rows of the whole batch it is of.
A row of a step has a 64-bit key, from which each layer's numbers go on as SplitMix64 does (Steele, Lea, Flood 2014, as in
`dlopt.data.counter`): the finalizer of key + layer's stream + index * gamma, in integer tensor operations. Each result is four numbers of
16 bits. The index of a place in a row has 21 bits for each dimension, so that it does not depend on how long the longest text is.

Outside of steps, as in a test of a layer, keys come from torch's generator. To add a layer that draws: a class of `Noisy`.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GAMMA, _M1, _M2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
PURPOSE = 6
"""Keeps these numbers apart from those of rows' order and of augmentation."""
AGAIN = 0xD1342543DE82EF95
"""What the stream of a layer is moved by when it is called again in the same forward pass."""
LANES, LEVELS = 2**16, 2**16 - 1
DIMENSION = 21
"""Bits of the index for each dimension of a row but the last, whose places come four to an index."""
KEPT = 2**16
"""About how many keys, of as many steps as that is, are made at once; and of how many places in a row their indices are kept."""
SELU = 1.7580993408473766
"""alpha * scale of selu, which alpha dropout sets numbers to the negative of."""


@dataclass
class Now:
    """What is drawn in this process now."""

    step: tuple[int, int] | None = None
    """The seed, and how many steps there were before this one; None outside of steps."""
    keys: Tensor | None = None
    """Of the forward pass, int64: that of all rows together, and then of each row of the whole batch."""
    rows: Tensor | None = None
    """Those of the rows of this part, int64 (rows,)."""
    calls: dict[int, int] = field(default_factory=dict)
    """How often a layer, by its stream, has been called in the forward pass: of layers that may be more than once."""


now = Now()


@contextmanager
def step(seed: int, before: int) -> Iterator[None]:
    """Within it is a step of training, before which there were so many."""
    now.step = seed, before
    try:
        yield
    finally:
        now.step = now.keys = now.rows = None


def part(first: int, rows: int, device: torch.device) -> None:
    """A forward pass begins, of so many rows from place `first` of the whole batch on. Of the same rows it draws the same again."""
    if now.step is not None:
        seed, before = now.step
        count = 1 << (first + rows).bit_length()
        steps = max(1, KEPT // count)
        now.keys = _keys(seed, before // steps, steps, count, device)[before % steps]
        now.rows, now.calls = now.keys[first + 1 : first + 1 + rows], {}


@functools.lru_cache(4)
def _keys(seed: int, block: int, steps: int, count: int, device: torch.device) -> Tensor:
    """int64 (steps, count), of some steps one after the other."""
    numbers = torch.arange(block * steps, (block + 1) * steps, device=device)
    of_steps = _mix(numbers.mul_(_signed(GAMMA)).add_(_signed(stream(seed, PURPOSE))))
    return _mix(of_steps[:, None] + torch.arange(count, device=device).mul_(_signed(GAMMA)))


def stream(*numbers: int) -> int:
    """One 64-bit number from a few integers, as `dlopt.data.counter.stream` has it."""
    state = 0
    for number in numbers:
        state = (state * GAMMA + number + GAMMA) % 2**64
        state = ((state ^ (state >> 30)) * _M1) % 2**64
        state = ((state ^ (state >> 27)) * _M2) % 2**64
        state ^= state >> 31
    return state


class Noisy(nn.Module):
    """A layer that draws in training. Rows are the first dimension of what it is given, or its first dimension is some places of the
    first row, then as many of the second, and so on; where it is neither, all rows and workers have the same numbers."""

    stream: int = 0
    """Its own 64 bits; see `key`."""
    counted: bool = False
    """Whether it may be called several times in a forward pass, and is to draw anew each time."""

    def lanes(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Random 16-bit integers of this shape, int16, uniform from -32768 to 32767."""
        if 0 in shape:
            return torch.zeros(shape, dtype=torch.int16, device=device)
        rows, sizes = _rows_of(shape, device)
        *outer, last = sizes if len(sizes) < 4 else (*sizes[:2], math.prod(sizes[2:]))
        small = not torch.compiler.is_compiling() and math.prod(sizes) <= KEPT
        places = (_kept_places if small else _places)(self._stream(), (*outer, -(-last // 4)), device)
        drawn = _mix(rows.view(-1, *[1] * places.dim()) + places).view(torch.int16)
        return (drawn if last % 4 == 0 else drawn[..., :last]).reshape(shape)

    def kept(self, shape: Sequence[int], p: float, device: torch.device) -> Tensor:
        """Which of so many numbers are not dropped, bool: each is dropped with probability p, in steps of 1 / 65536."""
        return self.lanes(shape, device) >= min(round(p * LANES), LEVELS) - LANES // 2

    def _stream(self) -> int:
        if not self.counted:
            return self.stream
        before = now.calls.get(self.stream, 0)
        now.calls[self.stream] = before + 1
        return self.stream + before * AGAIN % 2**64


class Dropout(Noisy):
    """Each number, or with `channels` each unit or channel along `dim` of a row, is 0 with probability p, else divided by 1 - p; with
    `alpha` it is -1.758 instead of 0, and all is scaled and moved so that mean 0 and deviation 1 stay (Klambauer et al. 2017)."""

    alpha: bool = False
    channels: bool = False
    dim: int = 1

    def __init__(self, p: float, *, alpha: bool = False, channels: bool = False) -> None:
        super().__init__()
        self.p, self.alpha, self.channels = p, alpha, channels

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return values
        if self.p == 1:
            return values * 0
        kept = self._kept(values).to(values.dtype)
        if not self.alpha:
            return values * kept.mul_(1 / (1 - self.p))
        scale = 1 / math.sqrt((SELU**2 * self.p + 1) * (1 - self.p))
        return values * (kept * scale) + (kept - 1 + self.p).mul_(SELU * scale)

    def _kept(self, values: Tensor) -> Tensor:
        if not self.channels:
            return self.kept(values.shape, self.p, values.device)
        across = [size if place in (0, self.dim % values.dim()) else 1 for place, size in enumerate(values.shape)]
        return self.kept((across[0], values.shape[self.dim]), self.p, values.device).view(across)


class GaussianDropout(Noisy):
    """Multiply each number by one of N(1, p / (1 - p)), which has the mean and the variance of dropout's 0 or 1 / (1 - p)."""

    normals: Tensor

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.register_buffer("normals", normals(), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return values
        normal = self.normals.take(self.lanes(values.shape, values.device).long().add_(LANES // 2))
        return values * (1 + math.sqrt(self.p / (1 - self.p)) * normal).to(values.dtype)


class RReLU(Noisy):
    """x, or below 0 a x, a drawn from [lower, upper] in training, one of 65,536 values; their mean after it."""

    lower: float
    upper: float

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = 1 / 8, 1 / 3

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return F.rrelu(values, self.lower, self.upper, training=False)
        share = self.lanes(values.shape, values.device).to(values.dtype).add_(LANES / 2 + 0.5).mul_(1 / LANES)
        return torch.where(values >= 0, values, values * share.mul_(self.upper - self.lower).add_(self.lower))


TORCHS: dict[type[nn.Module], tuple[type[Noisy], dict[str, bool]]] = {
    nn.Dropout: (Dropout, {}),
    nn.Dropout1d: (Dropout, {"channels": True}),
    nn.Dropout2d: (Dropout, {"channels": True}),
    nn.Dropout3d: (Dropout, {"channels": True}),
    nn.AlphaDropout: (Dropout, {"alpha": True}),
    nn.FeatureAlphaDropout: (Dropout, {"alpha": True, "channels": True}),
    nn.RReLU: (RReLU, {}),
}
"""What becomes of torch's own layers in a user's network, and the attributes that it then has."""


def key(network: nn.Module) -> None:
    """Give each layer that draws its own numbers, by its name in the network. Layers of torch's that draw become ours, in place."""
    for name, layer in network.named_modules():
        if type(layer) in TORCHS:
            kind, settings = TORCHS[type(layer)]
            layer.__class__ = kind
            vars(layer).update(settings, counted=True)
        if isinstance(layer, Noisy):
            layer.stream = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@functools.cache
def normals() -> Tensor:
    """float32 (65536,): the standard normal's quantiles in the middle of as many equal steps of probability."""
    quantile = NormalDist().inv_cdf
    upper = torch.tensor([quantile((index + 0.5) / LANES) for index in range(LANES // 2, LANES)], dtype=torch.float32)
    return torch.cat((-upper.flip(0), upper))


def _rows_of(shape: Sequence[int], device: torch.device) -> tuple[Tensor, Sequence[int]]:
    """Keys (rows,), and the sizes of each row, of which there is at least one."""
    rows = now.rows if now.rows is not None else torch.randint(-(2**63), 2**63 - 1, (shape[0],), device=device)
    count, times = len(rows), shape[0] // max(len(rows), 1)
    if count == shape[0]:
        return rows, shape[1:] or (1,)
    if count and count * times == shape[0]:
        return rows, (times, *shape[1:])
    assert now.keys is not None
    return now.keys[:1], shape


def _places(stream: int, sizes: Sequence[int], device: torch.device) -> Tensor:
    """What is added to the key of a row for the words of so many places, of which the stream is the first, int64 of these sizes."""
    *outer, last = sizes
    places = torch.arange(last, device=device).mul_(_signed(GAMMA)).add_(_signed(stream))
    for level, size in enumerate(reversed(outer), start=1):
        apart = torch.arange(size, device=device).mul_(_signed(GAMMA << DIMENSION * level))
        places = apart.view(-1, *[1] * level) + places
    return places


_kept_places = functools.lru_cache(64)(_places)


def _mix(values: Tensor) -> Tensor:
    """The finalizer of SplitMix64, in place. An int64's shift to the right brings in its sign, which has to go."""
    values.bitwise_xor_((values >> 30).bitwise_and_(2**34 - 1)).mul_(_signed(_M1))
    values.bitwise_xor_((values >> 27).bitwise_and_(2**37 - 1)).mul_(_signed(_M2))
    return values.bitwise_xor_((values >> 31).bitwise_and_(2**33 - 1))


def _signed(number: int) -> int:
    """The int64 of the same 64 bits."""
    return (number + 2**63) % 2**64 - 2**63
