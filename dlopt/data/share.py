"""One worker's share of every batch, and how a process of Ray Data reads it. Imports torch only to augment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlopt.data.order import Order, row_of
from dlopt.data.prepared import UNREADABLE, Rows, Split, as_table, column_of, damaged
from dlopt.part import DloptError, Feature, Statistics

if TYPE_CHECKING:
    from torch import Tensor

    from dlopt.data.augment import Augmentation

EPOCH, WINDOW, START = "epoch", "window", "start"
BLOCK_BYTES = 4 * 2**20
"""About how many bytes a reader hands over at a time."""
ROW, PARTNER, KEPT = "\x1frow", "\x1fpartner", "\x1fshare"
"""Columns of a block: the number of the row in the split and, where rows are mixed, the partner's target and the row's own share. No
column of data is called so."""


class Picks(NamedTuple):
    """What a worker computes of a window, batch after batch."""

    mine: np.ndarray
    """Picks (see `dlopt.data.order`), int64 (n,)."""
    partners: np.ndarray | None
    """With what each is mixed, if anything is."""


@dataclass(frozen=True)
class Share:
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
    ) -> Share:
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
        picks = self.order.picks(epoch, window)
        low, high = self.order.slots(self.rank, self.world)
        place = np.arange(len(picks))
        slot = place % self.order.batch_size
        mine = (slot >= low) & (slot < high) & (place >= start * self.order.batch_size)
        return Picks(picks[mine], self.order.partners(epoch, picks)[mine] if self.mixes else None)

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


class Reader:
    """A task of Ray Data: read the chunks of a window that the share uses, put their rows in order, augment, mix, hand over."""

    def __init__(self, share: Share) -> None:
        self.share = share

    def __call__(self, task: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        epoch, window, first = (int(task[name][0]) for name in (EPOCH, WINDOW, START))
        picks, partners = self.share.picks(epoch, window, first)
        values = _Values(self.share.split, row_of(picks if partners is None else np.concatenate([picks, partners])))
        step = max(1, BLOCK_BYTES // self.share.split.row_bytes)
        for start in range(0, len(picks), step):
            part = slice(start, start + step)
            yield self._block(values, picks[part], None if partners is None else partners[part], epoch)

    def _block(self, values: _Values, picks: np.ndarray, partners: np.ndarray | None, epoch: int) -> pa.Table:
        rows = values.of(row_of(picks))
        if not self.share.augmentations:
            return self._table(rows, picks)
        import torch

        torch.set_num_threads(1)  # Ray gave this task one CPU
        inputs, target = self._inputs(rows, picks, epoch)
        if partners is None:
            return self._table(_arrays(inputs) | target, picks)
        theirs, their_target = self._inputs(values.of(row_of(partners)), partners, epoch)
        inputs, share = self.share.mixed(inputs, theirs, picks, epoch)
        table = self._table(_arrays(inputs) | target, picks)
        return table.append_column(PARTNER, column_of(their_target[self.share.split.signature.target.name])).append_column(
            KEPT, column_of(share.numpy())
        )

    def _table(self, rows: Rows, picks: np.ndarray) -> pa.Table:
        return as_table(self.share.split.signature, rows).append_column(ROW, column_of(row_of(picks)))

    def _inputs(self, rows: Rows, picks: np.ndarray, epoch: int) -> tuple[dict[str, Tensor], Rows]:
        """Augmented inputs, and the target apart."""
        import torch

        name = self.share.split.signature.target.name
        inputs = {feature.name: torch.from_numpy(rows[feature.name]) for feature in self.share.split.signature.inputs}
        return self.share.augmented(inputs, picks, epoch), {name: rows[name]}


class _Values:
    """The chunks in which some rows lie, read."""

    def __init__(self, split: Split, rows: np.ndarray) -> None:
        self.starts = np.array([chunk.start for chunk in split.chunks])
        used = np.unique(self._chunk(rows))
        self.values = split.read([split.chunks[index] for index in used])
        sizes = np.array([split.chunks[index].rows for index in used])
        self.shift = np.zeros(len(self.starts), dtype=np.int64)
        self.shift[used] = np.cumsum(sizes) - sizes - self.starts[used]

    def of(self, rows: np.ndarray) -> Rows:
        """These rows of the split, copied."""
        place = rows + self.shift[self._chunk(rows)]
        return {name: values[place] for name, values in self.values.items()}

    def _chunk(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, rows, side="right") - 1


def _arrays(tensors: Mapping[str, Tensor]) -> Rows:
    return {name: values.numpy() for name, values in tensors.items()}


def _classes(split: Split) -> np.ndarray:
    """The class of every row of a split, in the smallest type that holds it. Reads nothing else."""
    target = split.signature.target
    if target.kind != "category":
        raise DloptError(f"train.sampling: balanced needs a target of classes; {target.name!r} is of kind {target.kind}")
    found = [np.zeros(0, dtype=np.min_scalar_type(max(0, target.size - 1)))]
    for file in dict.fromkeys(chunk.file for chunk in split.chunks):
        try:
            found.append(pq.read_table(file, columns=[target.name], page_checksum_verification=True)[target.name].to_numpy())
        except UNREADABLE as error:
            raise damaged(file, error) from None
    return np.concatenate([values.astype(found[0].dtype) for values in found])
