"""Random numbers and hashes as pure functions of integers, so that nothing depends on who computes them or when.

The mixing function is the finalizer of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

GAMMA = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
CACHED = 2**17
"""Bytes of rows that are hashed at a time, so that what is in between stays in the processor's cache."""
_S27, _S30, _S31, _S11 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(11)


def mix(value: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers in which every bit of the result depends on every bit of the value."""
    with np.errstate(over="ignore"):
        value = (value ^ (value >> _S30)) * _M1
        value = (value ^ (value >> _S27)) * _M2
    return value ^ (value >> _S31)


def stream(*numbers: int) -> np.uint64:
    """One 64-bit stream number from a few integers (seed, epoch, purpose, ...)."""
    state = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        with np.errstate(over="ignore"):
            state = mix(state * GAMMA + np.uint64(number % 2**64) + GAMMA)
    return np.uint64(state[0])


def bits(counter: np.ndarray, *numbers: int) -> np.ndarray:
    """A random 64-bit integer for each counter (a row's number), from the stream of `numbers`."""
    with np.errstate(over="ignore"):
        return mix(counter.astype(np.uint64) * GAMMA ^ stream(*numbers))


def uniform(counter: np.ndarray, *numbers: int) -> np.ndarray:
    """A random float64 in [0, 1) for each counter, from the stream of `numbers`."""
    return (bits(counter, *numbers) >> _S11).astype(np.float64) * 2.0**-53


def row_keys(columns: Sequence[np.ndarray]) -> np.ndarray:
    """A 128-bit hash of every row, as uint64 of shape (rows, 2).

    columns: arrays of shape (rows, ...) of fixed-size values; a row is its values' bytes, whatever block it came in.
    Each 64-bit word is mixed with a key of its position and added up, twice with other keys, so equal rows have equal keys
    and others collide with a probability of about rows squared over 2^129.
    """
    words = [_words(column) for column in columns]
    width, rows = sum(word.shape[1] for word in words), len(words[0])
    place = np.arange(width)
    keys = np.empty((rows, 2), dtype=np.uint64)
    step = max(1, CACHED // (8 * max(width, 1)))
    for start in range(0, rows, step):
        part = np.concatenate([word[start : start + step] for word in words], axis=1)
        for lane in range(2):
            with np.errstate(over="ignore"):
                total = mix(part + bits(place, 11, lane)).sum(axis=1, dtype=np.uint64)
            keys[start : start + step, lane] = mix(total ^ stream(13, lane, width))
    return keys


def string_words(values: Sequence[str]) -> np.ndarray:
    """A 64-bit integer for each string, the same on every machine."""
    return np.array(
        [int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little") for value in values], dtype=np.uint64
    )


def _words(column: np.ndarray) -> np.ndarray:
    """The bytes of each row, padded with zeros to whole 64-bit words."""
    width = math.prod(column.shape[1:])
    raw = np.ascontiguousarray(column).reshape(len(column), width).view(np.uint8).reshape(len(column), width * column.itemsize)
    padding = -raw.shape[1] % 8
    return np.pad(raw, ((0, 0), (0, padding))).view(np.uint64) if padding else raw.view(np.uint64)
