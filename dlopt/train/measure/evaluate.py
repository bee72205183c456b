"""A trained network over a split: its metrics, and what it says of every row.

predictions.parquet, in the order of the test split's rows, has of each row
    row (int64)       its place in the split
    loss (float32)    its loss, without class weights and label smoothing
and, by the kind of the target,
    category       label, predicted (int64)            indices of classes among the target's labels; predicted by its threshold, if any
                   probability (float32)               of the predicted class
                   score (float32)                     of two classes: the probability of the positive one
    multi_label    labels, predicted (list<int64>)     indices of the labels that the row has, and that it is given
                   probabilities (fixed list<float32>) of every label; predicted are those above a half, or from their thresholds on
    number         target.{column} (float32)           of each number, in the data's units; float64 where the target has offsets
                   predicted.{column} (float32)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from dlopt.data.feed.batches import moved, shortened
from dlopt.data.prepared import RowGroup, Split
from dlopt.models import Network
from dlopt.part import Target
from dlopt.train.loop.losses import LossPart, loss_of, unsmoothed
from dlopt.train.measure.metrics import Metrics, Tally, activated, decided, tally
from dlopt.train.measure.thresholds import Threshold, Tuned, fixed, tuned

BATCH_BYTES = 2**26, 2**22
"""Of the rows of a batch, of at most 1,024: on an accelerator, and on a CPU."""


def evaluate(
    network: Network,
    split: Split,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    in_step: bool = False,
    *,
    loss: LossPart | None = None,
    thresholds: tuple[float, ...] = (),
) -> Metrics:
    """Metrics of a split that has rows; each worker computes its part of the chunks, and all of them get the whole.

    in_step: whether all call the network equally often, at last with no rows. loss: the one that is trained. thresholds: of the target,
    from which on a row is positive, or is given each label.
    """
    target = _with(split.signature.target, thresholds)
    tallied, losses = tally(target, network.output, len(split), device), loss_of(unsmoothed(loss), target, network.output)
    calls = max(_calls(split, device, split.chunks[one::world]) for one in range(world)) if in_step else 0
    for outputs, wanted in _outputs(network, split, device, split.chunks[rank::world], calls):
        tallied.add(outputs, wanted, losses(outputs, wanted, "none"))
    if world > 1:
        _gather(tallied, split, world)
    return tallied.metrics(len(split))


def predict(network: Network, split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """Probabilities, or numbers less the target's offsets, float64 (rows, outputs), and the targets of a whole split, in row order."""
    target = split.signature.target
    pairs = [(activated(target, outputs).cpu(), wanted.cpu()) for outputs, wanted in _outputs(network, split, device, split.chunks)]
    return torch.cat([outputs for outputs, _ in pairs]), torch.cat([wanted for _, wanted in pairs])


def thresholds_of(threshold: Threshold | None, network: Network, validation: Split, device: torch.device) -> tuple[float, ...]:
    """The thresholds of a trained network, as its signature is to have them: those that the job gives, or the best ones on a validation
    split that has rows."""
    target = validation.signature.target
    if not isinstance(threshold, Tuned):
        return fixed(threshold, target)
    tallied = tally(target, network.output, len(validation), device)
    for outputs, wanted in _outputs(network, validation, device, validation.chunks):
        tallied.add(outputs, wanted, outputs.new_zeros(len(wanted)))
    return tuned(threshold, tallied.curves())


def write_predictions(
    path: Path | None,
    network: Network,
    split: Split,
    device: torch.device,
    *,
    loss: LossPart | None = None,
    thresholds: tuple[float, ...] = (),
) -> Metrics:
    """Metrics of a split; and if a path is given, a parquet file of what the network says of every row, as above, a batch at a time."""
    target, start = _with(split.signature.target, thresholds), 0
    tallied, losses_of = tally(target, network.output, len(split), device), loss_of(unsmoothed(loss), target, network.output)
    with ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for outputs, wanted in _outputs(network, split, device, split.chunks):
            losses = losses_of(outputs, wanted, "none")
            tallied.add(outputs, wanted, losses)
            if path is None:
                continue
            rows = {"row": pa.array(range(start, start + len(wanted)), pa.int64())}
            columns = _columns(target, activated(target, outputs).cpu(), wanted.cpu())
            table = pa.table(rows | columns | {"loss": losses.float().cpu().numpy()})
            writer = writer or stack.enter_context(pq.ParquetWriter(path, table.schema))
            writer.write_table(table)
            start += len(wanted)
    return tallied.metrics(len(split))


def _with(target: Target, thresholds: tuple[float, ...]) -> Target:
    return target.model_copy(update={"thresholds": thresholds})


def _columns(target: Target, outputs: Tensor, wanted: Tensor) -> dict[str, pa.Array]:
    """What the model says of some rows, beside what is so."""
    if target.kind == "category":
        predicted = decided(target, outputs)
        columns = {"label": wanted, "predicted": predicted, "probability": outputs.gather(1, predicted[:, None])[:, 0].float()}
        columns |= {"score": outputs[:, target.positive_index].float()} if target.size == 2 else {}
        return {name: pa.array(values.numpy()) for name, values in columns.items()}
    if target.kind == "multi_label":
        flat = pa.array(outputs.float().numpy().reshape(-1))
        probabilities = pa.FixedSizeListArray.from_arrays(flat, target.size)
        return {"labels": _indices(wanted > 0), "predicted": _indices(decided(target, outputs)), "probabilities": probabilities}
    columns, outputs = {}, outputs.float()
    if target.offsets:
        wanted, outputs = (values.double() + torch.tensor(target.offsets, dtype=torch.float64) for values in (wanted, outputs))
    for index, name in enumerate(target.columns):
        columns |= {f"target.{name}": wanted[:, index], f"predicted.{name}": outputs[:, index]}
    return {name: pa.array(values.numpy()) for name, values in columns.items()}


def _indices(chosen: Tensor) -> pa.Array:
    """bool (rows, labels) as lists of the indices that are true."""
    ends = np.concatenate([[0], chosen.sum(dim=1).cumsum(0).numpy()])
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(chosen.nonzero()[:, 1].numpy()))


def _gather(tallied: Tally, split: Split, world: int) -> None:
    """Add up the sums of all workers, and put their scores one after the other."""
    dist.all_reduce(tallied.sums)
    if tallied.bins:
        dist.all_reduce(tallied.bins.counts)
    mine = torch.cat(tallied.scores)
    if tallied.bins or not mine.shape[2]:
        return
    sizes = [sum(chunk.rows for chunk in split.chunks[rank::world]) for rank in range(world)]
    padded = torch.zeros(max(sizes), *mine.shape[1:], device=mine.device)
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    tallied.scores = [part[:size] for part, size in zip(parts, sizes, strict=True)]


@torch.no_grad()
def _outputs(
    network: Network, split: Split, device: torch.device, chunks: tuple[RowGroup, ...], calls: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs as float64 and targets, a batch at a time; the network is put back into the mode it was in. calls: so often it is called, at
    least, with no rows once there are no more."""
    training, size, groups = network.training, _batch_size(split, device), _groups(split, device, chunks)
    network.eval()
    for some in groups:
        rows = {name: torch.from_numpy(values.copy()) for name, values in split.read(some).items()}
        target = rows.pop(split.signature.target.name)
        for start in range(0, len(target), size):
            yield _called(network, split, device, rows, start, size), moved(target[start : start + size], device)
    for _ in range(_calls(split, device, chunks), calls):
        _called(network, split, device, {name: torch.from_numpy(values) for name, values in split.read([]).items()}, 0, size)
    network.train(training)


def _called(network: Network, split: Split, device: torch.device, rows: dict[str, Tensor], start: int, size: int) -> Tensor:
    part = shortened({name: values[start : start + size] for name, values in rows.items()}, split.signature.inputs)
    return network({name: moved(values, device) for name, values in part.items()}).double()


def _calls(split: Split, device: torch.device, chunks: tuple[RowGroup, ...]) -> int:
    """How often the network is called for the rows of some chunks."""
    return sum(-(-sum(chunk.rows for chunk in some) // _batch_size(split, device)) for some in _groups(split, device, chunks))


def _batch_size(split: Split, device: torch.device) -> int:
    return max(1, min(1024, BATCH_BYTES[device.type == "cpu"] // split.row_bytes))


def _groups(split: Split, device: torch.device, chunks: tuple[RowGroup, ...]) -> list[list[RowGroup]]:
    """Chunks that are read together: on an accelerator as many as a batch has room for."""
    most, groups = 1 if device.type == "cpu" else _batch_size(split, device), list[list[RowGroup]]()
    for chunk in chunks:
        if groups and sum(one.rows for one in groups[-1]) + chunk.rows <= most:
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return groups
