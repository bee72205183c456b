"""Nearly equal images, by a perceptual hash: which of the slow waves in an image are strong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, partial
from typing import Literal

import numpy as np
from pydantic import Field

from dlopt.data.clean.near import NearDuplicates, clusters, least_of_equal
from dlopt.data.counter import GAMMA, mix

SIDE, WAVES = 32, 16
"""An image is made grey and SIDE x SIDE; of its cosine transform the WAVES x WAVES slowest are looked at."""
SCALE = 2**16
"""Weights are whole numbers of 1/SCALE, so that sums are exact and every machine finds the same hash."""
RED, GREEN, BLUE = 19595, 38470, 7471
"""Weights of grey in 1/65,536 (ITU-R 601), as in Pillow."""
LANCZOS = 3
CHUNK = 2**22
"""Pixels that are hashed at a time."""


class NearDuplicateImages(NearDuplicates):
    """Images that look the same: resized, compressed again, a little brighter.

    Each is a hash of 256 bits (the pHash of Zauner 2010; 64 bits do not tell digits apart), and hashes that differ in few bits are near.
    """

    kind: Literal["near_duplicate_images"] = "near_duplicate_images"
    column: str = "image"
    """The column of the image input that is compared."""
    distance: int = Field(6, ge=0, le=16)
    """The most bits, of 256, in which the hashes of two images differ that are taken for the same."""

    @property
    def title(self) -> str:
        return f"near_duplicate_images of {self.column}"

    def sketch(self, images: np.ndarray) -> np.ndarray:
        """The hash of every image, uint64 of shape (rows, 4), for uint8 (rows, height, width, channels)."""
        rows, height, width = images.shape[:3]
        step = max(1, CHUNK // (height * width))
        pieces = [_hashes(images[start : start + step]) for start in range(0, rows, step)]
        return np.concatenate(pieces) if pieces else np.zeros((0, 4), dtype=np.uint64)

    def losers(self, sketches: np.ndarray, keys: np.ndarray) -> np.ndarray:
        heads = least_of_equal(sketches, keys)
        found = sketches[heads]
        labels = clusters(
            len(heads),
            _bands(found, self.distance),
            lambda order: partial(_near, found[order], self.distance),
        )
        lost = np.ones(len(sketches), dtype=bool)
        lost[heads[labels == np.arange(len(heads))]] = False
        return lost


def _hashes(images: np.ndarray) -> np.ndarray:
    height, width = images.shape[1:3]
    waves = _transform(height) @ _grey(images) @ _transform(width).T
    waves = waves.reshape(len(images), WAVES * WAVES)
    strong = waves > np.median(waves, axis=1, keepdims=True)
    return np.packbits(strong, axis=1).view(">u8").astype(np.uint64)


def _grey(images: np.ndarray) -> np.ndarray:
    """float64 (rows, height, width) of whole numbers."""
    if images.shape[3] < 3:
        return images[..., 0].astype(np.float64)
    red, green, blue = (images[..., channel].astype(np.uint32) for channel in range(3))
    return ((red * RED + green * GREEN + blue * BLUE + 0x8000) >> 16).astype(np.float64)


@cache
def _transform(size: int) -> np.ndarray:
    """Resizing to SIDE pixels and then the cosine transform (type II), along one axis: (WAVES, size) of whole numbers."""
    wave, pixel = np.arange(WAVES)[:, None], np.arange(SIDE)[None, :]
    cosines = np.cos(math.pi * wave * (2 * pixel + 1) / (2 * SIDE))
    return np.rint(cosines @ _resampling(size) * SCALE)


def _resampling(size: int) -> np.ndarray:
    """Weights (SIDE, size) of the Lanczos filter, wide enough to leave no pixel out, as in Pillow."""
    ratio = size / SIDE
    stretch = max(ratio, 1.0)
    centers = (np.arange(SIDE)[:, None] + 0.5) * ratio
    distance = (np.arange(size)[None, :] + 0.5 - centers) / stretch
    weights = np.where(np.abs(distance) < LANCZOS, np.sinc(distance) * np.sinc(distance / LANCZOS), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _bands(hashes: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """Bands of bits, each as one word, uint64 of shape (rows,): hashes that differ in `distance` bits agree in one of distance + 1."""
    if distance:  # else there is nothing but equal hashes
        for band in range(distance + 1):
            chosen = [bit for bit in range(WAVES * WAVES) if bit % (distance + 1) == band]
            masks = [np.uint64(sum(1 << bit % 64 for bit in chosen if bit // 64 == word)) for word in range(hashes.shape[1])]
            words = np.zeros(len(hashes), dtype=np.uint64)
            for word, mask in enumerate(masks):
                with np.errstate(over="ignore"):
                    words = mix(words * GAMMA + (hashes[:, word] & mask) + GAMMA)
            yield words


def _near(hashes: np.ndarray, distance: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return _ones(hashes[left] ^ hashes[right]) <= distance


def _ones(values: np.ndarray) -> np.ndarray:
    """How many bits are set in each row of uint64 (rows, words)."""
    values = values - ((values >> np.uint64(1)) & np.uint64(0x5555555555555555))
    values = (values & np.uint64(0x3333333333333333)) + ((values >> np.uint64(2)) & np.uint64(0x3333333333333333))
    values = (values + (values >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    with np.errstate(over="ignore"):
        return ((values * np.uint64(0x0101010101010101)) >> np.uint64(56)).sum(axis=1)
