"""One affine map and one bilinear resampling a row, in integers: the same to the bit on every processor and device.

Places are multiples of 1/256 pixel. The four pixels around a place lie in the bytes of one 32-bit word, so that one look-up
fetches them and the blend works on two 16-bit halves at a time. Rounded once, to the nearest grey level.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Values = np.ndarray | float
"""A number for each row, (n,), or one for all."""
STEPS = 256
"""Places between two pixels."""
FAR = 2.0**20
"""Nothing is looked for further out than this, in pixels."""


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
    """uint8 (n, height, width, channels) images, moved; `fill` stands outside of them."""
    n, height, width, channels = images.shape
    x, y = (np.arange(size) - (size - 1) / 2 for size in (width, height))
    from_x = _places(images, _column(affine.xx, n) * x + _column(affine.x, n) + (width - 1) / 2, _column(affine.xy, n) * y)
    from_y = _places(images, _column(affine.yx, n) * x + _column(affine.y, n) + (height - 1) / 2, _column(affine.yy, n) * y)
    whole = not any(bool((table & (STEPS - 1)).any()) for table in (*from_x, *from_y))
    across, down = _sum(from_x, width), _sum(from_y, height)
    index = _index(across, down, height, width)
    across.bitwise_and_(STEPS - 1)
    down.bitwise_and_(STEPS - 1)
    found = torch.empty_like(images)
    for channel in range(channels):
        framed = _framed(images[..., channel], fill)
        plane = framed.index_select(0, index) if whole else _blend(_corners(framed, width + 2).index_select(0, index), across, down)
        found[..., channel] = plane.view(n, height, width)
    return found


def _column(values: Values, n: int) -> np.ndarray:
    """float64 (n, 1)."""
    return np.broadcast_to(np.asarray(values, dtype=np.float64), (n,))[:, None]


def _places(images: Tensor, along_x: np.ndarray, along_y: np.ndarray) -> tuple[Tensor, Tensor]:
    """A coordinate's two summands as whole steps, int32 (n, width) and (n, height); 1 is added for the frame."""
    tables = (np.rint(np.clip(table, -FAR, FAR) * STEPS).astype(np.int32) for table in (along_x + 1, along_y))
    one, two = (torch.from_numpy(table).to(images.device) for table in tables)
    return one, two


def _sum(tables: tuple[Tensor, Tensor], size: int) -> Tensor:
    """The coordinate of every pixel, int32 (n, height, width), no further out than the frame."""
    along_x, along_y = tables
    return (along_x[:, None, :] + along_y[:, :, None]).clamp_(0, (size + 1) * STEPS)


def _index(across: Tensor, down: Tensor, height: int, width: int) -> Tensor:
    """Where the upper left of the four pixels lies in the framed images, int32 (n * height * width,)."""
    frame = (height + 3) * (width + 2)
    start = torch.arange(0, len(across) * frame, frame, dtype=torch.int32, device=across.device)
    index = (down >> 8).mul_(width + 2).add_(across >> 8).add_(start[:, None, None])
    return index.view(-1)


def _framed(plane: Tensor, fill: int) -> Tensor:
    """One channel with a frame of `fill`: a pixel above, left and right, two below; uint8, flat, and one more at the very end."""
    n, height, width = plane.shape
    rows, columns = height + 3, width + 2
    framed = plane.new_full((n * rows * columns + 1,), fill)
    framed[:-1].view(n, rows, columns)[:, 1 : height + 1, 1 : width + 1] = plane
    return framed


def _corners(framed: Tensor, width: int) -> Tensor:
    """For each pixel but the last ones: itself, the one below, the one to the right and that one's below, a byte each, int32."""
    pixels = framed.int()
    pair = torch.add(pixels[:-1], pixels[1:], alpha=1 << 16)
    return torch.add(pair[:-width], pair[width:], alpha=1 << 8)


def _blend(corners: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """uint8 from the four corners, flat, and the steps across and down, (n, height, width). Down first: left and right at once."""
    upper = corners & 0x00FF00FF
    lower = corners.bitwise_right_shift_(8).bitwise_and_(0x00FF00FF)
    both = lower.sub_(upper).mul_(down.view(-1)).add_(upper, alpha=STEPS)
    left = both & 0xFFFF
    right = both.bitwise_right_shift_(16).bitwise_and_(0xFFFF)
    found = right.sub_(left).mul_(across.view(-1)).add_(left, alpha=STEPS)
    return found.add_(1 << 15).bitwise_right_shift_(16).to(torch.uint8)
