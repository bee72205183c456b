"""One affine map and one bilinear resampling a row, the same to the bit on every processor and device.

Places are multiples of 1/256 pixel, and sizes are powers of two, so that whatever a bilinear blend of grey levels adds and
multiplies is exact in float32, in any order, fused or not. It is rounded once, to the nearest grey level.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Values = np.ndarray | float
"""A number for each row, (n,), or one for all."""
STEPS = 256
"""Places between two pixels."""
FAR = 2.0**14
"""Nothing is looked for further out than this, in pixels."""
BLOCK = 2**18
"""How many values are resampled at a time, so that what is in between stays in the processor's cache."""


class Affine(NamedTuple):
    """Takes a pixel of the result to where it comes from; coordinates in pixels from the centre of the image, x to the right."""

    xx: Values = 1.0
    xy: Values = 0.0
    x: Values = 0.0
    yx: Values = 0.0
    yy: Values = 1.0
    y: Values = 0.0

    def __matmul__(self, inner: Affine) -> Affine:
        """First `inner`, then this one; written out, since a matrix product rounds in an order of its own."""
        return Affine(
            self.xx * inner.xx + self.xy * inner.yx,
            self.xx * inner.xy + self.xy * inner.yy,
            self.xx * inner.x + self.xy * inner.y + self.x,
            self.yx * inner.xx + self.yy * inner.yx,
            self.yx * inner.xy + self.yy * inner.yy,
            self.yx * inner.x + self.yy * inner.y + self.y,
        )


def resample(images: Tensor, affine: Affine, fill: int = 0) -> Tensor:
    """uint8 (n, height, width, channels) images, moved; `fill` stands outside of them. In memory the channels lie apart, as models
    want them."""
    n, height, width, channels = images.shape
    columns, rows = (torch.from_numpy(table).to(images.device) for table in _places(affine, n, height, width))
    mode = "nearest" if _is_whole(affine) else "bilinear"
    found = images.new_empty((n, channels, height, width))
    step = max(1, BLOCK // (height * width * channels)) if images.device.type == "cpu" else n
    for start in range(0, n, step):
        part = slice(start, start + step)
        grid = torch.view_as_real(columns[part, None, :] + rows[part, :, None])
        found[part] = _sampled(images[part], grid, fill, mode).to(torch.int16)  # to uint8 in two steps: twice as fast
    return found.permute(0, 2, 3, 1)


def _is_whole(affine: Affine) -> bool:
    """Whether nothing but flips and shifts by whole pixels is done to any row, so that there is nothing to blend."""
    xx, xy, x, yx, yy, y = (np.asarray(values) for values in affine)
    flips = (np.abs(xx) == 1).all() and (np.abs(yy) == 1).all() and not xy.any() and not yx.any()
    return bool(flips and not (x % 1).any() and not (y % 1).any())


def _places(affine: Affine, n: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The two summands of every pixel's place, what its column and what its row adds: complex64 (n, width) and (n, height), x and y
    in one number for speed, as torch counts them: the canvas reaches from -1 to 1."""
    x, y = (np.arange(size) - (size - 1) / 2 for size in (width, height))
    xx, xy, to_x, yx, yy, to_y = (np.broadcast_to(np.asarray(values, dtype=np.float64), (n,))[:, None] for values in affine)
    columns, rows = np.empty((n, width), dtype=np.complex64), np.empty((n, height), dtype=np.complex64)
    columns.real = _steps(xx * x + to_x + (width - 1) / 2, width) + (1 / _canvas(width) - 1)
    columns.imag = _steps(yx * x + to_y + (height - 1) / 2, height) + (1 / _canvas(height) - 1)
    rows.real, rows.imag = _steps(xy * y, width), _steps(yy * y, height)
    return columns, rows


def _steps(pixels: np.ndarray, size: int) -> np.ndarray:
    """Pixels, rounded to steps, in halves of the canvas."""
    return np.rint(np.clip(pixels, -FAR, FAR) * STEPS) * (2 / STEPS / _canvas(size))


def _canvas(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def _sampled(images: Tensor, grid: Tensor, fill: int, mode: str) -> Tensor:
    """float32 (n, channels, height, width): grey levels and a half, to be cut off."""
    n, height, width, channels = images.shape
    canvas = torch.zeros((n, _canvas(height), _canvas(width), channels), device=images.device)
    canvas[:, :height, :width] = images
    if fill:
        canvas[:, :height, :width] -= fill
    return F.grid_sample(canvas.permute(0, 3, 1, 2), grid, mode=mode, padding_mode="zeros", align_corners=False).add_(fill + 0.5)
