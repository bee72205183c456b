"""One worker's share of every batch, and how a process of Ray Data reads it. Imports torch only to augment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from dlopt.data.order import Order
from dlopt.data.prepared import Rows, Split, as_table

if TYPE_CHECKING:
    from torch import Tensor

    from dlopt.data.augment import Augmentation

EPOCH, WINDOW = "epoch", "window"
BLOCK_BYTES = 4 * 2**20
"""About how many bytes a reader hands over at a time."""


@dataclass(frozen=True)
class Share:
    """Which part of every batch of a split worker `rank` of `world` computes, and what is done to its rows."""

    split: Split
    order: Order
    rank: int
    world: int
    augmentations: tuple[Augmentation, ...]

    @classmethod
    def of(cls, split: Split, seed: int, batch_size: int, rank: int, world: int, augmentations: Sequence[Augmentation] = ()) -> Share:
        order = Order.of(seed, [chunk.rows for chunk in split.chunks], batch_size, split.row_bytes)
        return cls(split, order, rank, world, tuple(augmentations))

    def sizes(self) -> list[tuple[int, int]]:
        """(rows of this worker, rows of all workers) for each batch of an epoch."""
        low, high = self.order.slots(self.rank, self.world)
        size, rows = self.order.batch_size, self.order.rows
        totals = [min(size, rows - start) for start in range(0, rows, size)]
        return [(min(high, total) - min(low, total), total) for total in totals]

    def rows(self, epoch: int, window: int) -> np.ndarray:
        """Numbers of this worker's rows in a window, batch after batch."""
        rows = self.order.window_rows(epoch, window)
        low, high = self.order.slots(self.rank, self.world)
        slot = np.arange(len(rows)) % self.order.batch_size
        return rows[(slot >= low) & (slot < high)]

    def augmented(self, images: Tensor, rows: np.ndarray, epoch: int) -> Tensor:
        """uint8 images (rows, height, width, channels) as they look in this epoch."""
        from dlopt.data.augment import augment

        return augment(images, rows, self.order.seed, epoch, self.augmentations)

    @property
    def augmented_inputs(self) -> list[str]:
        """Names of the inputs that are augmented: the images, if there is anything to do."""
        return [feature.name for feature in self.split.signature.inputs if feature.kind == "image"] if self.augmentations else []


class Reader:
    """A task of Ray Data: read the chunks of a window that the share uses, put their rows in order, augment, hand over."""

    def __init__(self, share: Share) -> None:
        self.share = share

    def __call__(self, task: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        epoch, window = int(task[EPOCH][0]), int(task[WINDOW][0])
        rows = self.share.rows(epoch, window)
        split = self.share.split
        starts = np.array([chunk.start for chunk in split.chunks])
        chunk_of_row = np.searchsorted(starts, rows, side="right") - 1
        used = np.unique(chunk_of_row)
        values = split.read([split.chunks[index] for index in used])
        sizes = np.array([split.chunks[index].rows for index in used])
        offset = np.zeros(len(starts), dtype=np.int64)
        offset[used] = np.cumsum(sizes) - sizes - starts[used]
        place = rows + offset[chunk_of_row]
        step = max(1, BLOCK_BYTES // split.row_bytes)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            yield as_table(split.signature, self._augment({name: array[place[part]] for name, array in values.items()}, rows[part], epoch))

    def _augment(self, values: Rows, rows: np.ndarray, epoch: int) -> Rows:
        if not self.share.augmented_inputs:
            return values
        import torch

        torch.set_num_threads(1)  # Ray gave this task one CPU
        images = {name: self.share.augmented(torch.from_numpy(values[name]), rows, epoch).numpy() for name in self.share.augmented_inputs}
        return values | images
