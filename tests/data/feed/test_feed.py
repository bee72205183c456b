"""Two feeds, one order: both give every worker the same batches, to the bit, and refuse damaged files by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from dlopt.artifact import Artifact, Stage, once
from dlopt.data.augment import (
    Augmentation,
    CutMix,
    FeatureDropout,
    FeatureNoise,
    GaussianBlur,
    MixUp,
    RandAugment,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomInsertion,
    RandomReplacement,
    RandomRotation,
)
from dlopt.data.feed.batches import Batch, Mixed, RemoteDealer, Resident, Stream, shortened
from dlopt.data.feed.dealer import PICK, READ_BYTES, Dealer, Reader, ReadPlan
from dlopt.data.feed.order import row_of
from dlopt.data.feed.sampler import Sampler
from dlopt.data.prepared import Split, as_table, write_part
from dlopt.part import DloptError, Feature, Part, Signature, Statistics, Target
from tests.cases import few

CPU = torch.device("cpu")
WIDTH = 9
INPUTS = (
    Feature(name="image", kind="image", dtype="uint8", shape=(10, 9, 3), columns=("image",)),
    Feature(name="numbers", kind="number", dtype="float32", shape=(2,), columns=("a", "b")),
    Feature(name="codes", kind="category", dtype="string", shape=(1,), columns=("c",), vocabularies=(("x", "y"),)),
    Feature(name="text", kind="text", dtype="int32", shape=(WIDTH,), columns=("text",), tokens=30),
)
TARGETS = {
    "category": Target(name="label", labels=(0, 1, 2)),
    "multi_label": Target(name="label", kind="multi_label", labels=("u", "v", "w")),
    "number": Target(name="label", kind="number", columns=("y", "z")),
}
STATISTICS = {
    "numbers": Statistics(count=1, missing=(0, 0), min=(0, 0), max=(0, 0), mean=(0, 0), std=(2.0, 0.0), shift=(0, 0), scale=(1, 1)),
}
AUGMENT = (
    RandomCrop(padding=2),
    RandomHorizontalFlip(),
    RandomRotation(degrees=15),
    RandAugment(),
    RandomErasing(),
    GaussianBlur(),
    RandomInsertion(p=0.2),
    RandomReplacement(p=0.2),
    FeatureNoise(),
)
MIX = (MixUp(alpha=0.5), CutMix(p=0.5))


class Rows(Part):
    """Rows of each file of a random training split."""

    files: tuple[int, ...]
    target: Literal["category", "multi_label", "number"] = "category"


def values(rows: int, start: int, target: str) -> dict[str, np.ndarray]:
    """The second number tells rows apart, and so do targets of numbers; classes 0, 1 and 2 are as frequent as 6 : 3 : 1."""
    random = np.random.default_rng(start)
    numbers = random.normal(size=(rows, 2)).astype(np.float32)
    numbers[:, 1] = np.arange(start, start + rows)
    numbers[::5, 0] = np.nan
    length = np.where(np.arange(rows) % 4 == 0, WIDTH, 3)[:, None]
    text = np.where(np.arange(WIDTH) < length, random.integers(1, 30, (rows, WIDTH)), 0)
    targets = {
        "category": random.choice(3, rows, p=(0.6, 0.3, 0.1)),
        "multi_label": random.integers(0, 2, (rows, 3), dtype=np.uint8),
        "number": np.stack((numbers[:, 1], -numbers[:, 1]), axis=1),
    }
    images = random.integers(0, 256, (rows, 10, 9, 3), dtype=np.uint8)
    codes = random.integers(0, 3, (rows, 1), dtype=np.int32)
    return {"image": images, "numbers": numbers, "codes": codes, "text": text.astype(np.int32), "label": targets[target]}


def make(section: Rows, out: Path) -> dict[str, Any]:
    signature = Signature(inputs=INPUTS, target=TARGETS[section.target])
    starts = np.cumsum(section.files) - section.files
    for number, (rows, start) in enumerate(zip(section.files, starts.tolist(), strict=True)):
        table = as_table(signature, values(rows, start, section.target))
        write_part(table, signature, out / "train" / f"part-{number:05d}.parquet")
    (out / "signature.json").write_text(signature.model_dump_json())
    return {}


@pytest.fixture
def data(tmp_path: Path) -> Artifact:
    return made(tmp_path)


def made(
    home: Path, target: Literal["category", "multi_label", "number"] = "category", files: tuple[int, ...] = (3700, 700, 3)
) -> Artifact:
    return once(Stage("data", make), Rows(files=files, target=target), home)


def sampler(
    data: Artifact,
    rank: int = 0,
    world: int = 1,
    batch_size: int = 96,
    parts: tuple[Augmentation, ...] = AUGMENT,
    window: int = 23,
    sampling: Literal["shuffle", "balanced"] = "shuffle",
) -> Sampler:
    """A sampler whose order has several windows, as a large set's has."""
    found = Sampler.of(Split.open(data, "train"), 7, batch_size, rank, world, parts, sampling, STATISTICS)
    return replace(found, order=replace(found.order, window=window))


class Here(Dealer):
    """A dealer without Ray, whose tasks run when their rows are asked for."""

    def _blocks(self) -> Iterator[tuple[Any, int]]:
        reader = Reader(self.plan)
        for task in range(len(self.plan)):
            for block in reader({"id": np.array([task])}):
                yield block, len(block)

    def tables(self, rank: int) -> Iterator[pa.Table]:
        while True:
            for block, begin, end in self.take(rank):
                yield block.slice(begin, end - begin)


def tensors(batch: Batch) -> dict[str, Tensor]:
    """All that a batch holds, NaN replaced."""
    mixed = {} if batch.mixed is None else {"mixed target": batch.mixed.target, "share": batch.mixed.share}
    return {name: value.nan_to_num(-1) for name, value in (batch.inputs | {"target": batch.target} | mixed).items()}


def same(one: list[Batch], two: list[Batch]) -> bool:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.total == b.total and a.first == b.first and np.array_equal(a.rows, b.rows)
        of_a, of_b = tensors(a), tensors(b)
        assert of_a.keys() == of_b.keys()
        for name in of_a:
            assert of_a[name].dtype == of_b[name].dtype and torch.equal(of_a[name], of_b[name]), name
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
    batches = list(Resident(sampler(data), CPU).epoch(1))
    assert [len(batch.target) for batch in batches] == [96] * 45 + [83]
    assert sorted(torch.cat([batch.inputs["numbers"][:, 1] for batch in batches]).tolist()) == list(range(4403))


@pytest.mark.parametrize(("world", "sampling"), [(2, "balanced"), (3, "shuffle"), (5, "balanced")])
def test_the_batches_of_one_worker_are_shared_out_to_several_to_the_bit(
    world: int, sampling: Literal["shuffle", "balanced"], tmp_path: Path
) -> None:
    data, parts = made(tmp_path, files=(900, 303)), AUGMENT + MIX
    whole = Resident(sampler(data, parts=parts, sampling=sampling, window=5), CPU)
    others = [Resident(sampler(data, rank, world, parts=parts, sampling=sampling, window=5), CPU) for rank in range(world)]
    for one, *pieces in zip(whole.epoch(2), *(other.epoch(2) for other in others), strict=True):
        assert all(piece.total == one.total == len(one.target) for piece in pieces)
        places = [place for piece in pieces for place in range(piece.first, piece.first + len(piece.target))]
        assert places == list(range(one.total)) and one.first == 0
        width = one.inputs["text"].shape[1]
        for name, value in tensors(one).items():
            mine = [tensors(piece)[name] for piece in pieces]
            if name == "text":
                mine = [torch.nn.functional.pad(text, (0, width - text.shape[1])) for text in mine]
            assert torch.equal(torch.cat(mine), value), name


def test_a_batch_of_fewer_rows_than_workers_leaves_some_without_any(data: Artifact) -> None:
    samplers = [sampler(data, rank, 64, batch_size=4402, parts=AUGMENT + MIX) for rank in range(64)]
    sizes = [found.sizes()[-1] for found in samplers]
    assert all(total == 1 for _, total in sizes) and sorted(mine for mine, _ in sizes) == [0] * 63 + [1]
    empty = list(Resident(samplers[63], CPU).epoch(1))[-1]
    assert {name: tuple(value.shape) for name, value in tensors(empty).items()} == {
        "image": (0, 10, 9, 3),
        "numbers": (0, 2),
        "codes": (0, 1),
        "text": (0, 1),
        "target": (0,),
        "mixed target": (0,),
        "share": (0,),
    }


def in_order(batches: list[Batch]) -> dict[str, Tensor]:
    """All rows of an epoch in the order of the split, texts at their full width."""
    order = torch.cat([batch.inputs["numbers"][:, 1] for batch in batches]).argsort()
    found = [tensors(batch) for batch in batches]
    for batch in found:
        batch["text"] = torch.nn.functional.pad(batch["text"], (0, WIDTH - batch["text"].shape[1]))
    return {name: torch.cat([batch[name] for batch in found])[order] for name in found[0]}


def test_images_texts_and_noisy_numbers_change_with_the_epoch_and_the_rest_of_the_row_stays(data: Artifact) -> None:
    feed = Resident(sampler(data), CPU)
    one, two = (in_order(list(feed.epoch(epoch))) for epoch in (1, 2))
    given = Split.open(data, "train").read()
    for name, least in (("image", 0.95), ("text", 0.7), ("numbers", 0.79)):
        assert (one[name] != two[name]).flatten(1).any(dim=1).float().mean() > least, name
    assert torch.equal(one["numbers"][::5, 0], two["numbers"][::5, 0])  # missing
    for found in (one, two):
        assert np.array_equal(found["target"], given["label"]) and np.array_equal(found["codes"], given["codes"])


def test_without_augmentation_rows_are_those_of_the_split(data: Artifact) -> None:
    found = in_order(list(Resident(sampler(data, parts=()), CPU).epoch(1)))
    given = Split.open(data, "train").read()
    assert all(np.array_equal(found[name], np.nan_to_num(given[name], nan=-1)) for name in ("image", "numbers", "codes", "text"))


def test_texts_are_as_wide_as_the_longest_of_a_batch(data: Artifact) -> None:
    batches = list(Resident(sampler(data, parts=(), batch_size=3), CPU).epoch(1))
    widths = [batch.inputs["text"].shape[1] for batch in batches]
    longest = [max(1, int((batch.inputs["text"] != 0).sum(dim=1).max())) for batch in batches]
    assert widths == longest and set(widths) == {3, WIDTH}
    empty = shortened({"text": torch.zeros((4, WIDTH), dtype=torch.int32)}, INPUTS[3:])
    assert empty["text"].shape == (4, 1)


@pytest.mark.parametrize("target", ["category", "multi_label", "number"])
def test_a_mixed_row_has_a_second_target_of_another_row_and_its_share(
    target: Literal["category", "multi_label", "number"], tmp_path: Path
) -> None:
    data = made(tmp_path, target, (700,))
    plain, feed = (Resident(sampler(data, parts=parts, window=1000), CPU) for parts in ((), (MixUp(alpha=1),)))
    type_of = {"category": torch.int64, "multi_label": torch.uint8, "number": torch.float32}[target]
    before, after = list(plain.epoch(1)), list(feed.epoch(1))
    assert all(batch.mixed is None for batch in before)
    firsts, seconds = [], []
    for one, two in zip(before, after, strict=True):
        assert isinstance(two.mixed, Mixed) and two.mixed.target.shape == two.target.shape and two.target.dtype == type_of
        assert two.mixed.target.dtype == type_of and two.mixed.share.dtype == torch.float32
        assert torch.equal(one.target, two.target)
        mine, mixed, weight = one.inputs["numbers"][:, 1], two.inputs["numbers"][:, 1], two.mixed.share
        firsts += mine.tolist()
        other = (mixed - weight * mine) / (1 - weight)
        seconds += torch.where(weight < 0.99, other, torch.nan).tolist()
        if target == "number":  # the second target is that of the row that was mixed in
            expected = weight * two.target[:, 0] + (1 - weight) * two.mixed.target[:, 0]
            assert torch.allclose(mixed, expected, atol=1e-2)
    known = np.array(seconds)[~np.isnan(seconds)]
    assert len(known) > 600 and len(np.unique(np.rint(known))) > 0.9 * len(known)  # a permutation, but for rounding
    assert (np.abs(np.rint(seconds) - np.array(firsts))[~np.isnan(seconds)] >= 1).all()


def test_partners_look_as_they_do_in_their_own_place(tmp_path: Path) -> None:
    """With all weight on the partner, an epoch is the same augmented images in another order."""
    data = made(tmp_path, files=(700,))
    parts = (RandomRotation(degrees=40), CutMix(alpha=100))
    whole = sampler(data, parts=parts)
    picks, partners = whole.picks(1, 0)
    assert partners is not None
    given = {"image": torch.from_numpy(Split.open(data, "train").read()["image"])}
    mine, theirs = (whole.augmented({"image": given["image"][rows]}, rows, 1) for rows in (picks, partners))
    place = {pick: index for index, pick in enumerate(picks.tolist())}
    assert torch.equal(theirs["image"], mine["image"][[place[partner] for partner in partners.tolist()]])
    batch = torch.cat([batch.inputs["image"] for batch in Resident(whole, CPU).epoch(1)])
    assert torch.equal(batch, whole.mixed(mine, theirs, picks, 1)[0]["image"])


def test_balanced_batches_have_each_class_equally_often_and_repeated_rows_look_different(data: Artifact) -> None:
    feed = Resident(sampler(data, parts=(RandomRotation(degrees=90),), sampling="balanced"), CPU)
    for epoch in (1, 2):
        batches = list(feed.epoch(epoch))
        assert sum(len(batch.target) for batch in batches) == 4403
        counts = torch.bincount(torch.cat([batch.target for batch in batches]))
        assert (counts - 4403 / 3).abs().max() < 100
        rows = torch.cat([batch.inputs["numbers"][:, 1] for batch in batches])
        images = torch.cat([batch.inputs["image"] for batch in batches]).flatten(1)
        rare, often = rows.unique(return_counts=True)
        again = images[rows == rare[often.argmax()]]
        assert len(again) >= 3 and len(again.unique(dim=0)) == len(again)


def test_balanced_sampling_is_of_classes(tmp_path: Path) -> None:
    with pytest.raises(DloptError, match=r"^train\.sampling: balanced needs a target of classes; 'label' is of kind number$"):
        sampler(made(tmp_path, "number", (70,)), sampling="balanced")


def test_parts_that_are_one_resampling_with_different_fills_are_refused_before_training(data: Artifact) -> None:
    with pytest.raises(DloptError, match="same fill"):
        sampler(data, parts=(RandomCrop(fill=3), RandomRotation()))


def streams(samplers: list[Sampler], first: int, last: int, start: int = 0, read_bytes: int = READ_BYTES) -> list[Stream]:
    """Of all workers of a group, in this process."""
    dealer = RemoteDealer.start(ReadPlan(samplers[0], first, last, start, read_bytes))
    return [Stream(sampler, first, last, CPU, start, dealer) for sampler in samplers]


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 5))])
def test_a_stream_gives_the_resident_batches_to_the_bit(world: int, data: Artifact, ray_cluster: None) -> None:
    parts, sampling = (AUGMENT, "shuffle") if world == 2 else ((*AUGMENT, FeatureDropout(), *MIX), "balanced")
    samplers = [sampler(data, rank, world, parts=parts, sampling=sampling) for rank in range(world)]
    for stream, resident in zip(streams(samplers, 1, 2), [Resident(sampler, CPU) for sampler in samplers], strict=True):
        for epoch in (1, 2):
            assert same(list(stream.epoch(epoch)), list(resident.epoch(epoch)))


@pytest.mark.parametrize("target", ["multi_label", pytest.param("number", marks=pytest.mark.slow)])
def test_a_stream_goes_on_from_any_epoch(target: Literal["multi_label", "number"], tmp_path: Path, ray_cluster: None) -> None:
    data = made(tmp_path, target)
    stream = Stream(sampler(data, parts=MIX), 4, 4, CPU)
    assert same(list(stream.epoch(4)), list(Resident(sampler(data, parts=MIX), CPU).epoch(4)))
    with pytest.raises(ValueError, match="in order"):
        next(stream.epoch(4))


@pytest.mark.parametrize("parts", [(), AUGMENT + MIX], ids=["plain", "augmented and mixed"])
@pytest.mark.parametrize("sampling", ["shuffle", "balanced"])
def test_an_epoch_begins_at_any_batch_with_the_same_rest(
    parts: tuple[Augmentation, ...], sampling: Literal["shuffle", "balanced"], tmp_path: Path
) -> None:
    data = made(tmp_path, files=(600, 303))
    for rank, world in ((0, 1), (2, 3)):
        feed = Resident(sampler(data, rank, world, parts=parts, sampling=sampling, window=4), CPU)
        whole = list(feed.epoch(2))
        for start in range(len(whole) + 1):
            assert same(list(feed.epoch(2, start)), whole[start:])


@pytest.mark.slow
@pytest.mark.parametrize(("world", "start", "sampling"), [(3, 9, "balanced"), (1, 3, "balanced"), (2, 4, "shuffle"), (2, 10, "shuffle")])
def test_a_stream_begins_at_any_batch_and_goes_on_to_whole_epochs(
    world: int, start: int, sampling: Literal["shuffle", "balanced"], tmp_path: Path, ray_cluster: None
) -> None:
    data, parts = made(tmp_path, files=(600, 303)), AUGMENT + MIX
    samplers = [sampler(data, rank, world, parts=parts, sampling=sampling, window=4) for rank in range(world)]
    for stream, resident in zip(streams(samplers, 2, 3, start), [Resident(sampler, CPU) for sampler in samplers], strict=True):
        assert same(list(stream.epoch(2, start)), list(resident.epoch(2))[start:])
        assert same(list(stream.epoch(3)), list(resident.epoch(3)))


@pytest.mark.parametrize("seed", few(2, range(12)))
def test_uneven_ends_lose_no_row_and_count_none_twice(seed: int, tmp_path: Path) -> None:
    """Random sizes of files, batches, windows, tasks and groups of workers, begun anywhere: both feeds give the rows of the order."""
    random = np.random.default_rng(seed)
    files = tuple(random.integers(1, 400, random.integers(1, 7)).tolist())
    sampling: Literal["shuffle", "balanced"] = "balanced" if seed % 2 else "shuffle"
    settings: dict[str, Any] = {"batch_size": int(random.integers(1, 200)), "window": int(random.integers(1, 9)), "sampling": sampling}
    settings["parts"] = MIX if seed % 3 == 0 else ()
    data = made(tmp_path, files=files)
    for world in (1, int(random.integers(2, 9))):
        samplers = [sampler(data, rank, world, **settings) for rank in range(world)]
        order = samplers[0].order
        start = int(random.integers(0, order.batches + 1))
        dealer = Here(ReadPlan(samplers[0], 3, 4, start, read_bytes=int(random.integers(1, 10**6))))
        feeds = [(Stream(found, 3, 4, CPU, start, dealer), Resident(found, CPU)) for found in samplers]
        epochs = [[same_batches(stream, resident, epoch, first) for epoch, first in ((3, start), (4, 0))] for stream, resident in feeds]
        for number, (epoch, first) in enumerate(((3, start), (4, 0))):
            wanted = row_of(np.concatenate([order.picks(epoch, window) for window in range(order.windows)]))
            batches = [np.concatenate(parts) for parts in zip(*(of_rank[number] for of_rank in epochs), strict=True)]
            assert [len(batch) for batch in batches] == [
                min(order.batch_size, order.rows - at) for at in range(0, order.rows, order.batch_size)
            ][first:]
            assert np.concatenate([wanted[:0], *batches]).tolist() == wanted[first * order.batch_size :].tolist()
            assert sampling == "balanced" or first or sorted(np.concatenate(batches).tolist()) == list(range(sum(files)))


def same_batches(one: Stream, two: Resident, epoch: int, start: int) -> list[np.ndarray]:
    """The rows of each batch of two feeds that give the same."""
    batches = list(one.epoch(epoch, start))
    assert same(batches, list(two.epoch(epoch, start)))
    return [batch.rows for batch in batches if batch.rows is not None]


def test_the_rest_of_a_window_reads_only_the_files_that_it_needs(tmp_path: Path) -> None:
    data = made(tmp_path, files=(30,) * 40)
    found = sampler(data, window=1000, parts=())
    last = found.order.batches - 1
    expected = list(Resident(found, CPU).epoch(1, last))
    needed = set((expected[0].rows // 30).tolist())
    for number in set(range(40)) - needed:
        (data.path / f"train/part-{number:05d}.parquet").unlink()
    assert len(needed) < 40
    plan = ReadPlan(found, 1, 1, last)
    blocks = [block for task in range(len(plan)) for block in Reader(plan)({"id": np.array([task])})]
    assert sorted(np.concatenate([block[PICK].to_numpy() for block in blocks])) == sorted(expected[0].rows)


def test_batches_tell_which_rows_they_hold(data: Artifact) -> None:
    for batch in Resident(sampler(data), CPU).epoch(1, 40):
        assert batch.rows is not None and batch.rows.tolist() == batch.inputs["numbers"][:, 1].tolist()


def test_balanced_sampling_refuses_damage_by_name(data: Artifact) -> None:
    path = data.path / "train/part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DloptError, match=r"^\S+part-00001\.parquet: damaged \(.+\): delete the folder \S+ and run the job again$"):
        sampler(data, sampling="balanced")


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
    for position in range(0, len(content), 29):
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
    return Stream(sampler(data), 1, 1, CPU)


def damaged_resident(data: Artifact) -> Resident:
    return Resident(sampler(data), CPU)


def test_damage_is_refused_by_the_resident_feed(data: Artifact) -> None:
    flip(data.path / "train/part-00001.parquet", 50_000)
    with pytest.raises(DloptError, match=r"^\S+part-00001\.parquet: damaged \(.+\): delete the folder \S+ and run the job again$"):
        damaged_resident(data)


def test_damage_is_refused_by_the_stream(data: Artifact, ray_cluster: None) -> None:
    flip(data.path / "train/part-00001.parquet", 50_000)
    with pytest.raises(DloptError, match=r"^\S+part-00001\.parquet: damaged \(.+\): delete the folder \S+ and run the job again$"):
        list(damaged_stream(data).epoch(1))
