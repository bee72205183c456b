"""Random numbers of a row as pure functions of (seed, epoch, pick), so that a row looks the same in whatever batch, process or
machine it is made. A pick is a row and how often it has come before in the epoch, as one integer (see `dlopt.data.feed.order`).

Every pick has a 64-bit key; each part of the job, and each number that it draws, goes on from that key as SplitMix64 does.
"""

from __future__ import annotations

import functools
from statistics import NormalDist

import numpy as np

from dlopt.data.counter import GAMMA, bits, mix

PURPOSE = 3
"""Keeps these numbers apart from those that order rows."""
_S11 = np.uint64(11)


class Draw:
    """The random numbers of some picks. keys: uint64 (n,)."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = keys

    @classmethod
    def of(cls, picks: np.ndarray, seed: int, epoch: int) -> Draw:
        return cls(bits(picks, seed, epoch, PURPOSE))

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, index: int) -> Draw:
        """Numbers of their own for the part at this place in the list."""
        return Draw(self._stream(index))

    def uniform(self, number: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """float64 (n,), uniform in [low, high). number: which of the part's numbers."""
        return low + (high - low) * _fraction(self._stream(number))

    def uniforms(self, number: int, count: int) -> np.ndarray:
        """float64 (n, count), uniform in [0, 1)."""
        return _fraction(self._words(number, count))

    def normals(self, number: int, count: int) -> np.ndarray:
        """float32 (n, count), standard normal: each of 65,536 equally likely values, the outermost at 4.32."""
        places = self._words(number, -(-count // 4)).astype("<u8", copy=False).view("<u2")
        return normal_table().take(places[:, :count])

    def _stream(self, number: int) -> np.ndarray:
        with np.errstate(over="ignore"):
            return mix(self.keys + GAMMA * np.uint64(number + 1))

    def _words(self, number: int, count: int) -> np.ndarray:
        with np.errstate(over="ignore"):
            return mix(self._stream(number)[:, None] + GAMMA * np.arange(1, count + 1, dtype=np.uint64))


def _fraction(words: np.ndarray) -> np.ndarray:
    return (words >> _S11).astype(np.float64) * 2.0**-53


@functools.cache
def normal_table() -> np.ndarray:
    """float32 (65536,): the standard normal's quantiles in the middle of as many equal steps of probability."""
    quantile = NormalDist().inv_cdf
    upper = np.array([quantile((index + 0.5) / 2**16) for index in range(2**15, 2**16)], dtype=np.float32)
    return np.concatenate((-upper[::-1], upper))
