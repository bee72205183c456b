"""Faults T3 and T4: death at any moment of a checkpoint's write, and every way in which a written one can be damaged. Without Ray."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from dlopt.artifact import Artifact
from dlopt.part import DloptError
from dlopt.train.checkpoint.stores import CHECKPOINTS, RECORD
from tests.faults import Call, Calls, left_over, lines_of, starts_of
from tests.processes import run
from tests.train.loop.test_worker import prepared, section, work

pytestmark = pytest.mark.chaos

FIT, EVERY = section(epochs=3), {"steps": 4}
"""30 steps in epochs of 10, so that checkpoints within an epoch and at its end come in turn."""


def go(data: Artifact, out: Path, notes: Path, at: Call | None, every: dict[str, int]) -> None:
    """Train, and die before the call."""
    Calls(out / CHECKPOINTS, notes, at)
    work(FIT, data, out, checkpoint={"every": every})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return prepared(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def oracle(data: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("oracle")
    work(FIT, data, out, checkpoint={"every": EVERY})
    return out


def assert_as_if_nothing_had_happened(out: Path, oracle: Path) -> None:
    assert (out / "weights.safetensors").read_bytes() == (oracle / "weights.safetensors").read_bytes()
    assert lines_of(out) == lines_of(oracle)
    assert left_over(out) == []


@pytest.fixture(scope="module")
def calls(data: Artifact, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """All calls of a whole run that change something under its checkpoints."""
    folder = tmp_path_factory.mktemp("calls")
    assert run(go, data, folder / "out", folder / "notes", None, EVERY) == 0
    return [json.loads(line) for line in (folder / "notes").read_text().splitlines()]


def window(calls: list[list[str]], serial: int) -> range:
    """The numbers, from 1, of the calls that write one checkpoint and drop what it replaces, the one after the last included."""
    first, after = (
        next(place for place, call in enumerate(calls, 1) if f"{number:06d}-" in "".join(call)) for number in (serial, serial + 1)
    )
    return range(first, after + 1)


def points(calls: list[list[str]], numbers: range) -> list[Call]:
    """Before each call; and before each flush of a file, with what is not yet flushed lost in part."""
    found = [Call(number) for number in numbers]
    return found + [
        Call(number, torn=True) for number in numbers if calls[number - 1][0] == "fsync" and "." in Path(calls[number - 1][1]).name[1:]
    ]


@pytest.mark.slow
def test_a_kill_at_any_call_of_a_checkpoints_write_costs_no_bit_and_leaves_no_file(
    calls: list[list[str]], data: Artifact, oracle: Path, tmp_path: Path, chance: random.Random, repeat: int
) -> None:
    """Every call of one checkpoint, whichever it is, and as many times `--repeat` calls anywhere in the run."""
    one = window(calls, chance.randrange(4, 10))
    everywhere = points(calls, range(1, len(calls) + 1))
    assert len(one) > 8
    torn = [point for point in points(calls, one) if point.torn]
    assert len(torn) >= 3  # files that are flushed before they count
    for point in points(calls, one) + chance.sample(everywhere, min(repeat, len(everywhere))):
        out = tmp_path / f"{point.number}-{point.torn}"
        where = (data, out, tmp_path / f"{out.name}.notes")
        assert run(go, *where, point, EVERY) == -9, point
        saved = max((step for path in kept(out) if (step := steps_of(path)) is not None), default=0)
        assert run(go, *where, None, EVERY) == 0, point
        start = starts_of(out)[-1]
        assert start["damaged"] == [], (point, calls[point.number - 1])
        assert start["step"] >= saved, point
        assert_as_if_nothing_had_happened(out, oracle)
        shutil.rmtree(out)


# Damage


def flip(path: Path, chance: random.Random, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, chance: random.Random, other: Path) -> None:
    os.truncate(path, chance.randrange(1, path.stat().st_size))


def empty(path: Path, chance: random.Random, other: Path) -> None:
    path.write_bytes(b"")


def swap(path: Path, chance: random.Random, other: Path) -> None:
    """For the same file of another checkpoint; if that has the same content, for another file of its own."""
    files = [other, *sorted(path.parent.iterdir())]
    path.write_bytes(next(content for file in files if (content := file.read_bytes()) != path.read_bytes()))


def lose(path: Path, chance: random.Random, other: Path) -> None:
    path.unlink()


def forge(path: Path, chance: random.Random, other: Path) -> None:
    """The file is whole, and what is said of it is not."""
    seal = json.loads((path.parent / RECORD).read_text())
    entry = seal if path.name == RECORD else seal["files"][path.name]
    entry["sha256"] = entry["sha256"][::-1]
    (path.parent / RECORD).write_text(json.dumps(seal))


def culprit(kind: Any, name: str) -> str:
    """The file that is told of: that which another record or a forged one no longer vouches for."""
    if kind is swap and name == RECORD:
        return ""
    return RECORD if kind is forge else name


KINDS = (flip, truncate, empty, swap, lose, forge)


@pytest.fixture(scope="module")
def interrupted(calls: list[list[str]], data: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed between two epochs' ends, with the checkpoints it has."""
    folder = tmp_path_factory.mktemp("interrupted")
    assert run(go, data, folder / "out", folder / "notes", Call(window(calls, 8)[-1]), EVERY) == -9
    assert len(kept(folder / "out")) >= 2
    return folder / "out"


def kept(out: Path) -> list[Path]:
    return sorted((out / CHECKPOINTS).glob("[0-9]*"))


def steps_of(checkpoint: Path) -> int | None:
    """How many steps a checkpoint has, by its record; None where that is not there."""
    record = checkpoint / RECORD
    return int(json.loads(record.read_text())["record"]["step"]) if record.is_file() else None


def copied(interrupted: Path, out: Path) -> Path:
    return Path(shutil.copytree(interrupted, out))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_damage_to_any_file_of_the_newest_checkpoint_is_seen_named_and_costs_no_bit(
    kind: Any, interrupted: Path, data: Artifact, oracle: Path, tmp_path: Path, chance: random.Random, repeat: int
) -> None:
    newest, before = kept(interrupted)[-1], kept(interrupted)[-2]
    names = sorted(path.name for path in newest.iterdir())
    assert len(names) >= 3 and RECORD in names
    for name in names * (repeat if kind in (flip, truncate) else 1):
        out = copied(interrupted, tmp_path / "out")
        damaged = out / CHECKPOINTS / newest.name
        kind(damaged / name, chance, out / CHECKPOINTS / before.name / name)
        work(FIT, data, out, checkpoint={"every": EVERY})
        start = starts_of(out)[-1]
        assert start["step"] == steps_of(before), (kind, name)
        (line,) = start["damaged"]
        assert f"{damaged}/{culprit(kind, name)}" in line, (kind, name)
        assert_as_if_nothing_had_happened(out, oracle)
        shutil.rmtree(out)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_when_every_checkpoint_is_damaged_training_does_not_start_and_the_line_names_a_file(
    kind: Any, interrupted: Path, data: Artifact, tmp_path: Path, chance: random.Random
) -> None:
    for name in sorted(path.name for path in kept(interrupted)[-1].iterdir()):
        out = copied(interrupted, tmp_path / name)
        for folder, other in zip(kept(out), kept(interrupted)[::-1], strict=True):
            kind(folder / name, chance, other / name)
        before = sorted(out.rglob("*"))
        with pytest.raises(DloptError) as said:
            work(FIT, data, out, checkpoint={"every": EVERY})
        assert f"/{culprit(kind, name)}" in str(said.value) and "\n" not in str(said.value), (kind, name)
        assert "--fresh" in str(said.value)
        assert [path for path in sorted(out.rglob("*")) if path not in before and path.name != "owner"] == []
        assert not (out / "weights.safetensors").exists()
