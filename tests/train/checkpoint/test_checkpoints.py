"""Checkpoints: what is loaded goes on as if nothing had happened, what is damaged is told and not used, and they lie on a disk or in an
object store."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.fs as fs
import pytest
import torch
from torch import Tensor

from dlopt.data.sources.places import Place
from dlopt.models import Mlp
from dlopt.optim.optimizers import Adam, AdamW, Sgd
from dlopt.part import DloptError
from dlopt.train.checkpoint.checkpoints import Wanted, glance, newest, read
from dlopt.train.checkpoint.state import Packed, Record, TrainingState
from dlopt.train.checkpoint.stores import OWNER, RECORD, Bucket, Checkpointing, Disk, Every, Store, ends_epoch, said, store_of
from dlopt.train.checkpoint.writer import Writer
from tests.models.test_models import image, network
from tests.packages import package

WEIGHTS = "model.safetensors"

PARTS = [
    Sgd(lr=0.1),
    Sgd(lr=0.1, momentum=0.9),
    Sgd(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    Adam(weight_decay=0.01),
    AdamW(),
]


def fresh(part: Sgd | Adam | AdamW = PARTS[3], dtype: torch.dtype = torch.float32, seed: int = 1) -> TrainingState:
    model = network(Mlp(hidden=(5,)), image(4, 4), dtype=dtype, seed=seed)
    return TrainingState(model, part.build(list(model.parameters())), {}, Record())


def advance(state: TrainingState, steps: int, rate: float = 0.01) -> None:
    """Steps on gradients that follow from the number of the step."""
    for _ in range(steps):
        state.record.step += 1
        generator = torch.Generator().manual_seed(state.record.step)
        for parameter in state.model.parameters():
            parameter.grad = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.step()


def save(state: TrainingState, writer: Writer) -> None:
    writer.write(state.packed())
    writer.wait()


def name(serial: int, epoch: int, batch: int = 0) -> str:
    return f"{serial:06d}-epoch-{epoch:05d}-batch-{batch:06d}"


def checkpoint(store: Store, epochs: int, part: Sgd | Adam | AdamW = PARTS[3]) -> tuple[TrainingState, Writer]:
    """One for each epoch."""
    state, writer = fresh(part), Writer(store, 2, "me")
    for epoch in range(1, epochs + 1):
        advance(state, 2)
        state.record.epoch = epoch
        state.keep_best()
        save(state, writer)
    return state, writer


@pytest.fixture(scope="module")
def server() -> Iterator[fs.FileSystem]:
    """An object store with the bucket `runs`."""
    running = package("moto.server", "test").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    files = fs.S3FileSystem(
        endpoint_override=f"{host}:{port}", scheme="http", access_key="testing", secret_key="testing", allow_bucket_creation=True
    )
    files.create_dir("runs")
    yield files
    running.stop()


@pytest.fixture(params=["disk", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "disk":
        return Disk(tmp_path / "checkpoints")
    return Bucket(Place(request.getfixturevalue("server"), "s3://"), f"runs/{tmp_path.name}")


def weights(state: TrainingState) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]), key


def assert_same(one: TrainingState, other: TrainingState) -> None:
    mine, theirs = one.packed(), other.packed()
    assert mine.tensors.keys() == theirs.tensors.keys()
    for part, tensors in mine.tensors.items():
        assert_equal(tensors, theirs.tensors[part])
    assert (mine.record, mine.rest) == (theirs.record, theirs.rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_training_goes_on_from_a_checkpoint_to_the_bit(tmp_path: Path, part: Sgd | Adam | AdamW, before: int, dtype: torch.dtype) -> None:
    store, state = Disk(tmp_path), fresh(part, dtype)
    advance(state, before)
    state.keep_best()
    state.record.epoch, state.record.history, state.record.best_value = 7, [0.1 + 0.2, float("inf")], 1 / 3
    advance(state, before)
    save(state, Writer(store, 2, "me"))
    other = fresh(part, dtype, seed=99)
    advance(other, 2)  # what it was before must not matter
    found, damaged = newest(store)
    assert found is not None and not damaged
    found.load(other)
    assert other.record == state.record
    assert_equal(other.best, state.best)
    assert_same(other, state)
    advance(state, 5, rate=0.02)
    advance(other, 5, rate=0.02)
    assert_equal(weights(other), weights(state))
    assert_same(other, state)


def test_the_best_weights_stay_as_they_were_while_training_goes_on() -> None:
    state = fresh()
    state.keep_best()
    best = weights(state)
    advance(state, 3)
    assert_equal(state.best, best)
    assert any(not torch.equal(value, best[key]) for key, value in weights(state).items())


def test_a_checkpoint_is_of_the_step_at_which_it_was_asked_for_whatever_comes_while_it_is_written(tmp_path: Path) -> None:
    started, go = threading.Event(), threading.Event()

    class Slow(Disk):
        def write(self, name: str, files: Iterable[tuple[str, bytes]]) -> None:
            started.set()
            assert go.wait(10)
            super().write(name, files)

    state, writer = fresh(), Writer(Slow(tmp_path), 2, "me")
    advance(state, 3)
    expected = weights(state)
    writer.write(state.packed())
    assert started.wait(10)
    advance(state, 4)
    go.set()
    writer.close()
    found, _ = newest(Disk(tmp_path))
    assert found and found.record.step == 3
    other = fresh(seed=9)
    found.load(other)
    assert_equal(weights(other), expected)


def test_a_store_without_checkpoints_has_none(store: Store) -> None:
    assert newest(store) == (None, [])
    Writer(store, 2, "me")
    assert newest(store) == (None, [])


def test_the_last_ones_are_kept_and_the_last_one_at_the_end_of_an_epoch(store: Store) -> None:
    state, writer = checkpoint(store, 3)
    assert store.names() == [name(2, 2), name(3, 3)]
    for batch in range(1, 6):
        state.record.batch = batch
        save(state, writer)
    assert store.names() == [name(3, 3), name(7, 3, 4), name(8, 3, 5)]
    found, _ = newest(store)
    ended, _ = newest(store, epoch_ends=True)
    assert found and ended and (found.name, ended.name) == (name(8, 3, 5), name(3, 3))


def test_the_newest_is_the_one_written_last_also_after_going_back(tmp_path: Path) -> None:
    store = Disk(tmp_path)
    state, writer = checkpoint(store, 3)
    state.record.epoch, writer.serial = 1, 999_999
    save(state, writer)
    found, _ = newest(store)
    assert found and found.name == "1000000-epoch-00001-batch-000000"
    assert Writer(store, 2, "me").serial == 1_000_000


def test_what_a_killed_writer_left_is_not_looked_at_and_swept_up_by_the_next_one(store: Store) -> None:
    checkpoint(store, 1)
    if isinstance(store, Disk):
        half = store.folder / f".{name(2, 2)}"
        half.mkdir()
        (half / WEIGHTS).write_bytes(b"half")
        (store.folder / ".owner.77").write_bytes(b"")
    else:
        assert isinstance(store, Bucket)
        with store.place.filesystem.open_output_stream(f"{store.path}/{name(2, 2)}/{WEIGHTS}") as sink:
            sink.write(b"half")
    found, damaged = newest(store)
    assert found and found.name == name(1, 1) and not damaged
    writer = Writer(store, 2, "me")
    if isinstance(store, Disk):
        assert sorted(path.name for path in store.folder.iterdir()) == [name(1, 1), OWNER]
    else:
        assert isinstance(store, Bucket)
        assert store._folders(with_record=False) == []
    state = fresh()
    state.record.epoch = 2
    save(state, writer)
    assert store.names() == [name(1, 1), name(2, 2)]


def test_training_does_not_wait_for_a_slow_store_and_ends_of_epochs_are_not_lost(tmp_path: Path) -> None:
    """While the first is written, one in the midst of an epoch is left out, and of two ends of epochs the newer one follows."""
    go = threading.Event()

    class Slow(Disk):
        def write(self, name: str, files: Iterable[tuple[str, bytes]]) -> None:
            assert go.wait(10)
            super().write(name, files)

    state, writer = fresh(), Writer(Slow(tmp_path), 2, "me")
    assert writer.ready()
    for epoch in range(3):
        state.record.epoch = epoch
        writer.write(state.packed())
        assert not writer.ready()
    assert writer.as_json()["skipped_checkpoints"] == 4  # three times not ready, and the end of the first epoch
    go.set()
    writer.wait()
    assert Disk(tmp_path).names() == [name(1, 0), name(3, 2)]
    assert writer.ready()
    save(state, writer)
    assert Disk(tmp_path).names()[-1] == name(4, 2)
    writer.close()


def test_where_training_goes_on_is_told_without_reading_weights(tmp_path: Path) -> None:
    read: list[tuple[str, str]] = []

    class Noted(Disk):
        def read(self, name: str, file: str) -> bytes:
            read.append((name, file))
            return super().read(name, file)

    checkpoint(Disk(tmp_path), 2)
    (tmp_path / name(2, 2) / RECORD).write_text("{}")
    found = glance(Noted(tmp_path))
    assert found and found[0] == name(1, 1) and found[1].epoch == 1
    assert read == [(name(2, 2), RECORD), (name(1, 1), RECORD)]
    assert glance(Disk(tmp_path / "nowhere")) is None


def test_others_than_worker_0_read_no_best_weights(tmp_path: Path) -> None:
    checkpoint(Disk(tmp_path), 1)
    whole, few = (read(Disk(tmp_path), name(1, 1), Wanted(best=best)) for best in (True, False))
    assert whole.tensors["best"] and set(whole.tensors) - set(few.tensors) == {"best"}


WHOLE = {"long": torch.arange(21.0).view(7, 3), "short": torch.arange(2.0), "one": torch.tensor([5.0])}


def rows_of(rank: int, world: int) -> dict[str, Tensor]:
    """What one of several workers holds of WHOLE."""
    return {key: value[slice(*Wanted(rank, world, rows=True).span(len(value)))] for key, value in WHOLE.items()}


def packed(rank: int, world: int) -> Packed:
    """Its part of a checkpoint; of what all hold alike worker 0 has it."""
    mine, rest = rows_of(rank, world), {"dict": [[key, {"tensor": key}] for key in (*WHOLE, "count")]}
    alike = {"count": torch.tensor(3)} if rank == 0 else {}
    return Packed(
        asdict(Record(step=9)), {"model": rest}, {"model": mine | alike}, {"model": {key: len(value) for key, value in mine.items()}}
    )


def written(store: Store, world: int) -> None:
    """By so many workers."""
    first = Writer(store, 2, "me", 0, world)
    others = [Writer(store, 2, "me", rank, world, first.serial) for rank in range(1, world)]
    for rank, writer in enumerate((first, *others)):
        writer.write(packed(rank, world))
    for writer in (*others, first):
        writer.close()


@pytest.mark.parametrize("wrote", [2, 3, 8])
@pytest.mark.parametrize("reads", [1, 2, 3, 5])
def test_what_workers_write_of_their_rows_any_other_number_of_them_reads(wrote: int, reads: int, store: Store) -> None:
    written(store, wrote)
    assert store.names() == [name(1, 0)]
    for rank in range(reads):
        found, damaged = newest(store, wanted=Wanted(rank, reads, rows=reads > 1))
        assert found and not damaged and found.record.step == 9
        assert_equal(found.tensors["model"], (rows_of(rank, reads) if reads > 1 else WHOLE) | {"count": torch.tensor(3)})
        assert found.mine == (reads > 1)


def test_a_worker_reads_what_it_wrote_and_what_all_have_alike_and_no_more(tmp_path: Path) -> None:
    read: list[str] = []

    class Noted(Disk):
        def read(self, name: str, file: str) -> bytes:
            read.append(file)
            return super().read(name, file)

    written(Disk(tmp_path), 3)
    newest(Noted(tmp_path), wanted=Wanted(1, 3, rows=True))
    assert sorted(read) == ["model.00001.safetensors", "model.safetensors", "state.json"]


def test_what_another_worker_cannot_write_is_no_checkpoint_and_said(tmp_path: Path) -> None:
    class Full(Disk):
        def add(self, name: str, files: Iterable[tuple[str, Iterable[Any]]]) -> None:
            if next(iter(files))[0].startswith("model"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().add(name, files)

    first, second = Writer(Disk(tmp_path), 2, "me", 0, 2), Writer(Full(tmp_path), 2, "me", 1, 2, 0)
    first.write(packed(0, 2))
    second.write(packed(1, 2))
    with pytest.raises(DloptError, match="the checkpoint cannot be written: no space is left"):
        second.close()
    with pytest.raises(DloptError, match=r"the checkpoint cannot be written: worker 1: .*No space left"):
        first.close()
    assert Disk(tmp_path).names() == []


def test_what_is_cleared_is_gone(store: Store) -> None:
    store.clear()
    checkpoint(store, 2)
    store.clear()
    assert newest(store) == (None, [])


def test_who_lost_the_store_to_another_writes_no_more(store: Store) -> None:
    state, writer = checkpoint(store, 1)
    other = Writer(store, 2, "another")
    state.record.epoch = 2
    writer.write(state.packed())
    with pytest.raises(DloptError, match="another run of this job goes on from here"):
        writer.close()
    assert store.names() == [name(1, 1)]
    save(state, other)
    assert store.names() == [name(1, 1), name(2, 2)]


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing_half(tmp_path: Path) -> None:
    class Full(Disk):
        def write(self, name: str, files: Iterable[tuple[str, bytes]]) -> None:
            def few() -> Iterator[tuple[str, bytes]]:
                yield next(iter(files))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            super().write(name, few())

    state, _ = checkpoint(Disk(tmp_path), 1)
    writer = Writer(Full(tmp_path), 2, "me")
    state.record.epoch = 2
    writer.write(state.packed())
    with pytest.raises(DloptError, match=f"^{tmp_path}/?: the checkpoint cannot be written: no space is left: make room .* same command"):
        writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [name(1, 1), OWNER]


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def flip_number(path: Path) -> None:
    """Another step, in JSON that is as good as before."""
    content = path.read_bytes()
    changed = content.replace(b'"step": 4', b'"step": 5')
    assert changed != content
    path.write_bytes(changed)


def swap(path: Path, file: str) -> None:
    """The file of the checkpoint before, which is whole in itself."""
    shutil.copy(path.parent / name(1, 1) / file, path / file)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a bit of the weights": (WEIGHTS, lambda path: flip(path / WEIGHTS, -5)),
    "a bit of the header": (WEIGHTS, lambda path: flip(path / WEIGHTS, 20)),
    "weights cut short": (WEIGHTS, lambda path: os.truncate(path / WEIGHTS, 100)),
    "no weights": (WEIGHTS, lambda path: (path / WEIGHTS).unlink()),
    "weights of nothing": (WEIGHTS, lambda path: os.truncate(path / WEIGHTS, 0)),
    "weights of another": (WEIGHTS, lambda path: swap(path, WEIGHTS)),
    "best weights of another": ("best.safetensors", lambda path: swap(path, "best.safetensors")),
    "an optimizer's state of another": ("optimizer.safetensors", lambda path: swap(path, "optimizer.safetensors")),
    "no optimizer's state": ("optimizer.safetensors", lambda path: (path / "optimizer.safetensors").unlink()),
    "a number of the record": (RECORD, lambda path: flip_number(path / RECORD)),
    "record cut short": (RECORD, lambda path: os.truncate(path / RECORD, 50)),
    "record of another": (WEIGHTS, lambda path: swap(path, RECORD)),
    "no record": (RECORD, lambda path: (path / RECORD).unlink()),
    "a record that is none": (RECORD, lambda path: (path / RECORD).write_text("[]")),
    "a record of another version": (RECORD, lambda path: (path / RECORD).write_text(json.dumps({"record": {"x": 1}, "sha256": ""}))),
    "bytes that are no text": (RECORD, lambda path: (path / RECORD).write_bytes(b"\xff\xfe")),
    "an empty folder": (RECORD, lambda path: (shutil.rmtree(path), path.mkdir())),
}


@pytest.mark.parametrize(("file", "damage"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_told_and_the_older_one_is_used(tmp_path: Path, file: str, damage: Callable[[Path], object]) -> None:
    store = Disk(tmp_path)
    checkpoint(store, 2)
    damage(tmp_path / name(2, 2))
    found, damaged = newest(store)
    assert found and found.name == name(1, 1)
    assert damaged == [f"{tmp_path / name(2, 2) / file}: damaged checkpoint, not used"]
    state = fresh(seed=5)
    found.load(state)
    assert (state.record.epoch, state.record.step) == (1, 2)
    advance(state, 2)
    state.record.epoch = 2
    save(state, Writer(store, 2, "me"))
    again, damaged = newest(store)
    assert again and again.name == name(3, 2) and damaged == []


def test_when_all_checkpoints_are_damaged_one_line_says_how_to_start_over(tmp_path: Path) -> None:
    store = Disk(tmp_path)
    checkpoint(store, 2)
    for path in tmp_path.glob("0*"):
        flip(path / WEIGHTS, -1)
    with pytest.raises(DloptError) as caught:
        newest(store)
    assert str(caught.value) == (
        f"{tmp_path}: none of its 2 checkpoints is whole ({tmp_path / name(2, 2) / WEIGHTS}: damaged checkpoint, not used): "
        "run the job with --fresh"
    )


def test_places_of_checkpoints_and_their_names_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model" / "abc"
    assert store_of(out, Checkpointing()) == Disk(out / "checkpoints")
    assert store_of(out, Checkpointing(path=str(tmp_path / "safe"))) == Disk(tmp_path / "safe" / "abc")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert store_of(out, Checkpointing(path="s3://bucket/runs/")).where("x") == "s3://bucket/runs/abc/x"
    with pytest.raises(DloptError, match="ftp:// is not known"):
        store_of(out, Checkpointing(path="ftp://bucket/runs"))
    assert said(name(3, 2)) == "after epoch 2" and said(name(3, 2, 40)) == "after batch 40 of epoch 3"
    assert ends_epoch(name(3, 2)) and not ends_epoch(name(3, 2, 1))


@pytest.mark.parametrize("given", [{}, {"steps": 3, "epochs": 1}, {"steps": 0}, {"seconds": 0}])
def test_how_often_is_one_thing(given: dict[str, Any]) -> None:
    with pytest.raises(DloptError):
        Every.model_validate(given)
