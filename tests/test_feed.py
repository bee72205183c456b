"""Two feeds, one order: both give every worker the same batches, to the bit, and refuse damaged files by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from dlopt.artifact import Artifact, Stage, once
from dlopt.data.augment import RandomCrop, RandomHorizontalFlip, RandomRotation
from dlopt.data.feed import Batch, Feed, Resident, Stream
from dlopt.data.order import Order
from dlopt.data.prepared import Split, feature_columns, write_part
from dlopt.data.share import Share
from dlopt.part import DloptError, Feature, Part, Signature, Target

CPU = torch.device("cpu")
SIGNATURE = Signature(
    inputs=(
        Feature(name="image", kind="image", dtype="uint8", shape=(10, 9, 3), columns=("image",)),
        Feature(name="numbers", kind="number", dtype="float32", shape=(2,), columns=("a", "b")),
    ),
    target=Target(name="label", labels=(0, 1, 2)),
)
AUGMENT = (RandomCrop(padding=2), RandomHorizontalFlip(), RandomRotation(degrees=15))


class Rows(Part):
    """Rows of each file of a random training split."""

    files: tuple[int, ...]


def columns(rows: int, start: int) -> dict[str, pa.Array]:
    random = np.random.default_rng(start)
    images = random.integers(0, 256, (rows, 10, 9, 3), dtype=np.uint8)
    numbers = random.normal(size=(rows, 2)).astype(np.float32)
    numbers[:, 1] = np.arange(start, start + rows)  # tells rows apart
    numbers[::5, 0] = np.nan
    return (
        feature_columns(SIGNATURE.inputs[0], images)
        | feature_columns(SIGNATURE.inputs[1], numbers)
        | {"label": pa.array(np.arange(rows) % 3)}
    )


def make(section: Rows, out: Path) -> dict[str, Any]:
    starts = np.cumsum(section.files) - section.files
    for number, (rows, start) in enumerate(zip(section.files, starts.tolist(), strict=True)):
        write_part(pa.table(columns(rows, start)), SIGNATURE, out / "train" / f"part-{number:05d}.parquet")
    (out / "signature.json").write_text(SIGNATURE.model_dump_json())
    return {}


@pytest.fixture
def data(tmp_path: Path) -> Artifact:
    return once(Stage("data", make), Rows(files=(3700, 700, 3)), tmp_path)


def share(data: Artifact, rank: int = 0, world: int = 1, batch_size: int = 96, augment: bool = True, window: int = 23) -> Share:
    """A share whose order has several windows, as a large set's has."""
    found = Share.of(Split.open(data, "train"), 7, batch_size, rank, world, AUGMENT if augment else ())
    order = Order(found.order.seed, found.order.chunk_rows, batch_size, window)
    return Share(found.split, order, rank, world, found.augmentations)


def same(one: list[Batch], two: list[Batch]) -> bool:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.total == b.total and a.inputs.keys() == b.inputs.keys()
        assert torch.equal(a.target, b.target)
        for name in a.inputs:
            assert a.inputs[name].dtype == b.inputs[name].dtype
            assert torch.equal(a.inputs[name].nan_to_num(-1), b.inputs[name].nan_to_num(-1))
    return True


def test_prepared_rows_are_read_as_they_were_written(data: Artifact) -> None:
    split = Split.open(data, "train")
    assert len(split) == 4403 and len(split.chunks) > 3
    rows = split.read()
    assert rows["numbers"][:, 1].tolist() == list(range(4403))
    some = split.read(split.chunks[1:3])
    assert some["numbers"][0, 1] == split.chunks[1].start
    assert (some["image"] == rows["image"][split.chunks[1].start : split.chunks[3].start]).all()


def test_every_row_comes_once_an_epoch_in_batches_of_the_size_asked_for(data: Artifact) -> None:
    batches = list(Resident(share(data), CPU).epoch(1))
    assert [len(batch.target) for batch in batches] == [96] * 45 + [83]
    assert sorted(torch.cat([batch.inputs["numbers"][:, 1] for batch in batches]).tolist()) == list(range(4403))


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_batches_of_one_worker_are_shared_out_to_several_to_the_bit(world: int, data: Artifact) -> None:
    whole = Resident(share(data), CPU)
    parts = [Resident(share(data, rank, world), CPU) for rank in range(world)]
    for epoch in (1, 2):
        for one, *pieces in zip(whole.epoch(epoch), *(part.epoch(epoch) for part in parts), strict=True):
            assert all(piece.total == one.total == len(one.target) for piece in pieces)
            for name in one.inputs:
                together = torch.cat([piece.inputs[name] for piece in pieces])
                assert torch.equal(together.nan_to_num(-1), one.inputs[name].nan_to_num(-1))
            assert torch.equal(torch.cat([piece.target for piece in pieces]), one.target)


def test_a_batch_of_fewer_rows_than_workers_leaves_some_without_any(data: Artifact) -> None:
    sizes = [share(data, rank, 64, batch_size=4402).sizes()[-1] for rank in range(64)]
    assert all(total == 1 for _, total in sizes) and sorted(mine for mine, _ in sizes) == [0] * 63 + [1]


def test_images_change_with_the_epoch_and_the_rest_of_the_row_stays(data: Artifact) -> None:
    feed = Resident(share(data), CPU)
    found = []
    for epoch in (1, 2):
        batches = list(feed.epoch(epoch))
        order = torch.cat([batch.inputs["numbers"][:, 1] for batch in batches]).argsort()
        found.append([torch.cat([batch.inputs[name] for batch in batches])[order] for name in ("image", "numbers")])
    assert (found[0][0] != found[1][0]).flatten(1).any(dim=1).float().mean() > 0.95
    assert torch.equal(found[0][1].nan_to_num(-1), found[1][1].nan_to_num(-1))


@pytest.mark.parametrize("world", [1, 2])
def test_a_stream_gives_the_resident_batches_to_the_bit(world: int, data: Artifact, ray_cluster: None) -> None:
    for rank in range(world):
        feeds: list[Feed] = [Resident(share(data, rank, world), CPU), Stream(share(data, rank, world), 1, 2, CPU)]
        for epoch in (1, 2):
            assert same(*(list(feed.epoch(epoch)) for feed in feeds))


def test_a_stream_goes_on_from_any_epoch(data: Artifact, ray_cluster: None) -> None:
    stream = Stream(share(data, augment=False), 4, 4, CPU)
    assert same(list(stream.epoch(4)), list(Resident(share(data, augment=False), CPU).epoch(4)))
    with pytest.raises(ValueError, match="in order"):
        next(stream.epoch(4))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


def read_all(data: Artifact) -> dict[str, np.ndarray]:
    return Split.open(data, "train").read()


def test_a_flipped_bit_anywhere_is_refused_by_name_or_changes_nothing(data: Artifact) -> None:
    path = data.path / "train/part-00002.parquet"
    content, before = path.read_bytes(), read_all(data)
    refused = 0
    for position in range(0, len(content), 11):
        flip(path, position)
        try:
            found = read_all(data)
        except DloptError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert all(np.array_equal(found[name], before[name], equal_nan=name == "numbers") for name in before), position
        path.write_bytes(content)
    assert refused > 10


def damaged_stream(data: Artifact) -> Stream:
    return Stream(share(data), 1, 1, CPU)


def damaged_resident(data: Artifact) -> Resident:
    return Resident(share(data), CPU)


def test_damage_is_refused_by_the_resident_feed(data: Artifact) -> None:
    flip(data.path / "train/part-00001.parquet", 50_000)
    with pytest.raises(DloptError, match=r"^\S+part-00001\.parquet: damaged \(.+\): delete the folder \S+ and run the job again$"):
        damaged_resident(data)


def test_damage_is_refused_by_the_stream(data: Artifact, ray_cluster: None) -> None:
    flip(data.path / "train/part-00001.parquet", 50_000)
    with pytest.raises(DloptError, match=r"^\S+part-00001\.parquet: damaged \(.+\): delete the folder \S+ and run the job again$"):
        list(damaged_stream(data).epoch(1))
