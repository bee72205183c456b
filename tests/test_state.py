"""Checkpoints: what is loaded goes on as if nothing had happened, and what is damaged is told and not used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dlopt.models import Mlp
from dlopt.optim.optimizers import Adam, AdamW, Sgd
from dlopt.part import DloptError
from dlopt.train.state import KEEP, RECORD, TENSORS, Record, State, load, newest, save
from tests.test_models import image, network

PARTS = [
    Sgd(lr=0.1),
    Sgd(lr=0.1, momentum=0.9),
    Sgd(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    Adam(weight_decay=0.01),
    AdamW(),
]


def fresh(part: Sgd | Adam | AdamW = PARTS[3], dtype: torch.dtype = torch.float32, seed: int = 1) -> State:
    model = network(Mlp(hidden=(5,)), image(4, 4), dtype=dtype, seed=seed)
    return State(model, part.build(list(model.parameters())), {}, Record())


def advance(state: State, steps: int, rate: float = 0.01) -> None:
    """Steps on gradients that follow from the number of the step."""
    for _ in range(steps):
        state.record.step += 1
        generator = torch.Generator().manual_seed(state.record.step)
        for parameter in state.model.parameters():
            parameter.grad = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.step()


def checkpoint(folder: Path, epochs: int, part: Sgd | Adam | AdamW = PARTS[3]) -> State:
    """One for each epoch."""
    state = fresh(part)
    for epoch in range(1, epochs + 1):
        advance(state, 2)
        state.record.epoch = epoch
        state.keep_best()
        save(state, folder)
    return state


def weights(state: State) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def assert_same(one: State, other: State) -> None:
    (tensors, rest), (theirs, their_rest) = one.packed(), other.packed()
    assert_equal(tensors, theirs)
    assert rest == their_rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_training_goes_on_from_a_checkpoint_to_the_bit(tmp_path: Path, part: Sgd | Adam | AdamW, before: int, dtype: torch.dtype) -> None:
    state = fresh(part, dtype)
    advance(state, before)
    state.keep_best()
    state.record.epoch, state.record.history, state.record.best_value = 7, [0.1 + 0.2, float("inf")], 1 / 3
    advance(state, before)
    save(state, tmp_path)
    other = fresh(part, dtype, seed=99)
    advance(other, 2)  # what it was before must not matter
    path, damaged = newest(tmp_path)
    assert path is not None and not damaged
    load(other, path)
    assert other.record == state.record
    assert_equal(other.best, state.best)
    assert_same(other, state)
    advance(state, 5, rate=0.02)
    advance(other, 5, rate=0.02)
    assert_equal(weights(other), weights(state))
    assert_same(other, state)


def test_the_best_weights_stay_as_they_were_while_training_goes_on(tmp_path: Path) -> None:
    state = fresh()
    state.keep_best()
    best = weights(state)
    advance(state, 3)
    assert_equal(state.best, best)
    assert any(not torch.equal(value, best[name]) for name, value in weights(state).items())


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") == (None, [])
    assert newest(tmp_path) == (None, [])


def test_the_newest_and_one_to_fall_back_on_are_kept(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    assert KEEP == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-00003", "epoch-00004"]
    assert newest(tmp_path)[0] == tmp_path / "epoch-00004"


def test_the_newest_is_the_last_epoch_also_with_six_digits(tmp_path: Path) -> None:
    state = fresh()
    for epoch in (99_998, 99_999, 100_000):
        state.record.epoch = epoch
        save(state, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-100000", "epoch-99999"]
    assert newest(tmp_path)[0] == tmp_path / "epoch-100000"


def test_a_checkpoint_that_was_never_finished_is_not_looked_at_and_gives_way_to_the_next_try(tmp_path: Path) -> None:
    state = checkpoint(tmp_path, 1)
    half = tmp_path / ".epoch-00002"
    half.mkdir()
    (half / TENSORS).write_bytes(b"half")
    assert newest(tmp_path) == (tmp_path / "epoch-00001", [])
    state.record.epoch = 2
    save(state, tmp_path)
    assert newest(tmp_path) == (tmp_path / "epoch-00002", [])
    assert not half.exists()


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def flip_number(path: Path) -> None:
    """Another epoch, in JSON that is as good as before."""
    content = path.read_bytes()
    changed = content.replace(b'"step": 4', b'"step": 5')
    assert changed != content
    path.write_bytes(changed)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of the weights": lambda path: flip(path / TENSORS, -5),
    "a bit of the header": lambda path: flip(path / TENSORS, 20),
    "weights cut short": lambda path: os.truncate(path / TENSORS, 100),
    "no weights": lambda path: (path / TENSORS).unlink(),
    "weights of nothing": lambda path: os.truncate(path / TENSORS, 0),
    "a number of the record": lambda path: flip_number(path / RECORD),
    "record cut short": lambda path: os.truncate(path / RECORD, 50),
    "no record": lambda path: (path / RECORD).unlink(),
    "a record that is none": lambda path: (path / RECORD).write_text("[]"),
    "a record of another version": lambda path: (path / RECORD).write_text(json.dumps({"record": {"x": 1}, "sha256": ""})),
    "bytes that are no text": lambda path: (path / RECORD).write_bytes(b"\xff\xfe"),
    "an empty folder": lambda path: (shutil.rmtree(path), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_told_and_the_older_one_is_used(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    checkpoint(tmp_path, 2)
    damage(tmp_path / "epoch-00002")
    path, damaged = newest(tmp_path)
    assert path == tmp_path / "epoch-00001"
    assert damaged == [f"{tmp_path / 'epoch-00002'}: damaged checkpoint, not used"]
    state = fresh(seed=5)
    load(state, path)
    assert (state.record.epoch, state.record.step) == (1, 2)
    advance(state, 2)
    state.record.epoch = 2
    save(state, tmp_path)  # the epoch is trained again, and its checkpoint takes the damaged one's place
    assert newest(tmp_path) == (tmp_path / "epoch-00002", [])


def test_when_all_checkpoints_are_damaged_one_line_says_how_to_start_over(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoint(folder, 2)
    for path in folder.iterdir():
        flip(path / TENSORS, -1)
    with pytest.raises(DloptError) as caught:
        newest(folder)
    assert str(caught.value) == f"{folder}: none of its 2 checkpoints is whole: delete the folder {tmp_path} to start over"
