"""Which rows of every batch a worker computes. Imports torch only to augment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from dlopt.data.feed.order import Arranged, Order, lanes
from dlopt.data.prepared import UNREADABLE, Split, damaged
from dlopt.part import DloptError, Feature, Statistics

if TYPE_CHECKING:
    from torch import Tensor

    from dlopt.data.augment import Augmentation


class Picks(NamedTuple):
    """What a worker computes of a window, batch after batch."""

    mine: np.ndarray
    """Picks (see `dlopt.data.feed.order`), int64 (n,)."""
    partners: np.ndarray | None
    """With what each is mixed, if anything is."""


@dataclass(frozen=True)
class Sampler:
    """Which part of every batch of a split worker `rank` of `world` computes, and what is done to its rows."""

    split: Split
    order: Order
    rank: int
    world: int
    augmentations: tuple[Augmentation, ...]
    statistics: Mapping[str, Statistics]

    @classmethod
    def of(
        cls,
        split: Split,
        seed: int,
        batch_size: int,
        rank: int,
        world: int,
        augmentations: Sequence[Augmentation] = (),
        sampling: Literal["shuffle", "balanced"] = "shuffle",
        statistics: Mapping[str, Statistics] | None = None,
    ) -> Sampler:
        """statistics: of the training split's inputs, for noise in units of their deviation. Balanced sampling reads the target once.
        Raises DloptError where augmentations contradict each other or balancing has no classes."""
        if augmentations:
            from dlopt.data.augment import fill_of

            fill_of(augmentations)
        classes = _classes(split) if sampling == "balanced" else None
        order = Order.of(seed, [chunk.rows for chunk in split.chunks], batch_size, split.row_bytes, classes)
        return cls(split, order, rank, world, tuple(augmentations), statistics or {})

    def sizes(self) -> list[tuple[int, int]]:
        """(rows of this worker, rows of all workers) for each batch of an epoch."""
        low, high = self.order.slots(self.rank, self.world)
        size, rows = self.order.batch_size, self.order.rows
        totals = [min(size, rows - start) for start in range(0, rows, size)]
        return [(min(high, total) - min(low, total), total) for total in totals]

    def picks(self, epoch: int, window: int, start: int = 0) -> Picks:
        """This worker's picks in a window, from the window's batch number `start` on."""
        found = self.order.arranged(epoch, window, *lanes(self.rank, self.world))
        to = self.destinations(found.places)
        low, high = self.order.slots(self.rank, self.world)
        mine = np.empty_like(found.picks)
        mine[to] = found.picks
        partners = None
        if self.mixes:
            partners = np.empty_like(mine)
            partners[to] = found.picks[self.order.partners(epoch, found)]
        left_out = start * (high - low)
        return Picks(mine[left_out:], partners if partners is None else partners[left_out:])

    def needed(self, epoch: int, window: int, start: int = 0) -> int:
        """How many of this worker's rows of a window the batches from its number `start` on need."""
        low, high = lanes(self.rank, self.world)
        if not start:
            bounds = self.order.bounds(window)
            return int(bounds[high] - bounds[low])
        found = self.order.arranged(epoch, window, low, high)
        return int(self.wanted(found, self.order.partners(epoch, found) if self.mixes else None, start).sum())

    def wanted(self, found: Arranged, partners: np.ndarray | None, start: int) -> np.ndarray:
        """Which rows of some whole lanes the window's batches from number `start` on need, bool (n,)."""
        wanted: np.ndarray = found.places >= start * self.order.batch_size
        if partners is not None:
            wanted[partners[wanted]] = True
        return wanted

    def destinations(self, places: np.ndarray) -> np.ndarray:
        """Where rows of this worker, at these places of a window, go among its own."""
        low, high = self.order.slots(self.rank, self.world)
        batch, slot = np.divmod(places, self.order.batch_size)
        return batch * (high - low) + slot - low

    @property
    def mixes(self) -> bool:
        """Whether rows are mixed with others."""
        if not self.augmentations:
            return False
        from dlopt.data.augment import mixes

        return mixes(self.augmentations)

    def augmented(self, values: Mapping[str, Tensor], picks: np.ndarray, epoch: int) -> dict[str, Tensor]:
        """Some inputs (name to values (n, *shape)) as they look in this epoch, before they are mixed; the rest of the values stays."""
        if not self.augmentations:
            return dict(values)
        from dlopt.data.augment import augment_rows

        return augment_rows(values, self._features(values), picks, self.order.seed, epoch, self.augmentations, self.statistics)

    def mixed(
        self, values: Mapping[str, Tensor], partners: Mapping[str, Tensor], picks: np.ndarray, epoch: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Augmented inputs mixed with those of partners, and how much of each row is its own, float32 (n,)."""
        from dlopt.data.augment import mix_rows

        return mix_rows(values, partners, self._features(values), picks, self.order.seed, epoch, self.augmentations)

    def _features(self, values: Mapping[str, Tensor]) -> list[Feature]:
        return [feature for feature in self.split.signature.inputs if feature.name in values]


def _classes(split: Split) -> np.ndarray:
    """The class of every row of a split, in the smallest type that holds it. Reads nothing else."""
    target = split.signature.target
    if target.kind != "category":
        raise DloptError(f"train.sampling: balanced needs a target of classes; {target.name!r} is of kind {target.kind}")
    found = [np.zeros(0, dtype=np.min_scalar_type(max(0, target.size - 1)))]
    for file in dict.fromkeys(chunk.file for chunk in split.chunks):
        try:
            values = pq.read_table(file, columns=[target.name], page_checksum_verification=True)[target.name].to_numpy()
        except UNREADABLE as error:
            raise damaged(file, error) from None
        found.append(values.astype(found[0].dtype))
    return np.concatenate(found)
