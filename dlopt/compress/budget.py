"""A bound on size and metric in place of knobs."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import Field

from dlopt.compress.base import Compressor
from dlopt.part import DloptError

if TYPE_CHECKING:
    from dlopt.compress.model import Model

SPARSITIES = (0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
"""Shares of zeros that are tried."""
WORKS = (0.5, 0.35, 0.25)
"""Shares of the multiplications that are tried where speed counts."""
MOST_LEFT = 3
"""Layers that may be left as they are, the most sensitive first."""


class Tried(NamedTuple):
    """A chain, and what has come of it."""

    parts: tuple[Compressor, ...]
    model: Model
    bytes: int
    """Packed by zlib."""
    share: float
    """Of the packed bytes of the float32 file."""
    value: float | None
    """The metric on the validation split, and what of it was lost."""
    lost: float
    speed: float
    """How many times as fast as float32; 0 where it was not measured."""

    @property
    def chain(self) -> str:
        """As in a job."""
        return ", ".join(f"{{{', '.join(f'{name}: {value}' for name, value in _told(part))}}}" for part in self.parts)

    def __str__(self) -> str:
        fast = f", {self.speed:.2f} times as fast" if self.speed else ""
        return f"{self.chain}: {self.share:.3f} of the bytes, {self.lost:.4f} lost{fast}"


class Budget(Compressor):
    """Finds the cheapest chain that stays within a drop of the metric and a size, and is as fast as is asked: what needs no training comes
    first, then what has few zeros, or, where speed counts, fewer channels. The layers that lose most by being rounded are left as they are,
    if that suffices."""

    keeps: ClassVar[bool] = True

    kind: Literal["budget"] = "budget"
    drop: float = Field(0.005, ge=0)
    """How much of accuracy (or micro F1, or relatively of RMSE) may be lost on the validation split."""
    size: float = Field(0.3, gt=0, le=1)
    """Share of the float32 file's bytes that the file may have, both packed by zlib."""
    speed: float = Field(0.0, ge=0)
    """How many times as fast as in float32 it must be measured to be, by onnxruntime on one thread, both files in turn; 0 for any."""
    batch: int = Field(1, ge=1)
    """How many rows at once that is measured with."""
    epochs: int = Field(3, ge=0)
    """Passes over the training split for each chain that trains on."""
    rate: float = Field(0.3, gt=0)
    """Share of the job's peak rate that they begin with."""

    @property
    def last(self) -> bool:
        return self.speed > 0

    def apply(self, model: Model) -> None:
        tried: list[Tried] = []
        plain = len(zlib.compress(model.onnx(), 9))
        for parts in self._chains(model, plain):
            try:
                one = self._try(model, parts, plain, len(tried))
            except DloptError as error:
                if not any(part.kind == "structured" for part in parts):
                    raise
                model.progress("compress", None, f"{error}")  # a package that is missing, or a network that is not cut so
                continue
            tried.append(one)
            model.progress("compress", None, f"{one}")
            if one.share <= self.size and one.lost <= self.drop and one.speed >= self.speed:
                model.network, model.coding, model.graph = one.model.network, one.model.coding, one.model.graph
                return
            model.tried.append({"chain": one.chain, "bytes": one.bytes, "value": one.value, "speed": one.speed or None})
        least = min(tried, key=self._beyond)
        within = f"size {self.size:g} and drop {self.drop:g}" + (f" at {self.speed:g} times the speed" if self.speed else "")
        raise DloptError(f"compress: budget: nothing that was tried stays within {within}; the nearest is {least}")

    def _beyond(self, one: Tried) -> float:
        """How far from what is asked for."""
        slow = self.speed / one.speed - 1 if self.speed else 0.0
        return max(one.share / self.size - 1, 0) + max(one.lost - self.drop, 0) / max(self.drop, 0.001) + max(slow, 0)

    def _chains(self, model: Model, plain: int) -> Iterator[tuple[Compressor, ...]]:
        """From the cheapest on. One that cannot be small enough is not tried, but for the smallest."""
        from dlopt.compress.prune import Prune
        from dlopt.compress.quantize import Quantize
        from dlopt.compress.share import Share
        from dlopt.compress.structured import Structured

        for bits in (8, 4):
            whole = Quantize(bits=bits, leave=self.leave)
            if self._share(model, (whole,), plain) <= self.size or (bits == 4 and self.size >= 0.2):
                yield (whole,)
                yield from (((whole.model_copy(update={"leave": (*self.leave, *left)})),) for left in self._sensitive(model, whole, plain))
        static = Quantize(mode="static", per_channel=True, leave=self.leave)
        for work in (1.0, *WORKS) if self.speed else ():
            cut = (Structured(work=work, leave=self.leave, epochs=self.epochs, rate=self.rate),) if work < 1 else ()
            yield from (one for one in (cut, (*cut, static)) if one)
        if self.speed > 1:
            return  # runtimes multiply with zeros, and with few different numbers, as with any
        small = [sparsity for sparsity in SPARSITIES if self._share(model, (Prune(sparsity=sparsity), Share(bits=5)), plain) <= self.size]
        for sparsity in small or SPARSITIES[-1:]:
            shared = Share(bits=5, leave=self.leave, epochs=int(self.epochs > 1), rate=self.rate / 10)
            yield (Prune(sparsity=sparsity, scope="lamp", leave=self.leave, epochs=self.epochs, rate=self.rate), shared)

    def _sensitive(self, model: Model, whole: Compressor, plain: int) -> Iterator[tuple[str, ...]]:
        """Layers to be left as they are, more and more of them: those first that lose most when they alone are rounded."""
        from dlopt.train.tuning import weights_of

        names = list(weights_of(model.network, self.leave))
        if len(names) < 2:
            return
        alone = {name: whole.model_copy(update={"leave": tuple(other for other in names if other != name)}) for name in names}
        lost = {name: self._try(model, (part,), plain, 0, timed=False).lost for name, part in alone.items()}
        order = sorted(names, key=lambda name: -lost[name])
        yield from (tuple(order[:count]) for count in range(1, min(MOST_LEFT, len(order) - 1) + 1))

    def _share(self, model: Model, parts: Sequence[Compressor], plain: int) -> float:
        """Of the bytes, without any training."""
        other = _copy(model)
        for part in parts:
            part.apply(other)
        return len(zlib.compress(other.onnx(), 9)) / plain

    def _try(self, model: Model, parts: tuple[Compressor, ...], plain: int, place: int, timed: bool = True) -> Tried:
        from dlopt.compress.measure import decisive, in_turn, rows_of
        from dlopt.export.graph import session_of
        from dlopt.export.proof import loss_of_metric

        other = _copy(model)
        for step, part in enumerate(parts):
            other.out = model.scratch(f"{place}-{step}")
            part.apply(other)
        other.settle()
        files, speed = {"float32": model.onnx(), "compressed": other.onnx()}, 0.0
        if self.speed and timed:
            times = in_turn({name: session_of(one, model.signature, threads=1) for name, one in files.items()}, rows_of(model, self.batch))
            speed = times["float32"] / times["compressed"]
        size, (name, before, after) = len(zlib.compress(files["compressed"], 9)), decisive(other)
        return Tried(parts, other, size, size / plain, after, loss_of_metric(name, before, after), speed)


def _copy(model: Model) -> Model:
    return replace(model, network=copy.deepcopy(model.network), coding=dict(model.coding), graph=None)


def _told(part: Compressor) -> list[tuple[str, object]]:
    return [("kind", part.kind), *((name, value) for name, value in part.model_dump(exclude_defaults=True).items() if name != "kind")]
