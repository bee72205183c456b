"""Five hundred job files that somebody has spoilt: each is a job all the same, or is refused in lines that a person understands."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlopt import spec
from dlopt.part import DloptError
from dlopt.spec import Job

ROOT = Path(__file__).parents[2]
RICH = """
name: rich
data:
  source: {kind: csv, path: rows.csv, missing: ["?"], types: {zip: string}, delimiter: ";"}
  test: {kind: parquet, path: [a.parquet, b.parquet]}
  clean: [{kind: range, columns: [a], min: 0}, {kind: drop_duplicates}, {kind: outliers, columns: [a], method: iqr}]
  inputs:
    - {kind: number, columns: [a, b], fill: {kind: group_median, by: c}, normalize: quantile}
    - {kind: category, columns: [c, zip], min_count: 2}
    - {kind: date, columns: [d], parts: [year, month]}
    - {kind: text, column: t, tokenizer: bpe}
  target: {kind: multi_label, columns: [x, y]}
  split: {kind: group, column: g, train: 0.8, validation: 0.2, test: 0}
model: {kind: joint, text: {kind: text_cnn}, hidden: [32, 16]}
train:
  batch_size: 64
  optimizer: {kind: adamw, lr: 3e-4, betas: [0.9, 0.99]}
  schedule: {kind: chain, parts: [{kind: linear, length: 2}, {kind: constant}]}
  parameters: {groups: [{names: "*.bias"}]}
  loss: {kind: focal, gamma: 2}
  clip: {kind: norm, limit: 1}
  average: {kind: ema}
  early_stopping: {patience: 2}
  class_weights: {x: 2}
resources: {workers: [1, 2], checkpoint: {every: {steps: 100}}, track: [{kind: prometheus, port: 9464}]}
serve: {replicas: {min: 1, max: 3}}
"""
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 10**30, 0.5, -1e308, float("nan"), float("inf")),
    *("", "x", "yes", "3e-4", "\x00", "\ud800", "ä" * 300, "{{ job }}", "../../etc", b"bytes"),
    *(
        [],
        {},
        [[]],
        [None],
        {"kind": None},
        {"kind": "adam"},
        {"kind": ["a"]},
        {"": 1},
        {1: 2},
        {None: 0},
        [{}] * 50,
        {"a": {"b": {"c": []}}},
    ),
)
INTERNAL = re.compile(
    r"Traceback|pydantic|NoneType|ctx|<class|function-|\b_[a-z]|union_tag|Input should|type=|object at 0x|tagged-union|typing\."
)


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values of a job."""
    yield here
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*here, key))


def spoilt(draw: random.Random, job: dict[str, Any]) -> dict[str, Any]:
    """One to four changes at random places."""
    job = copy.deepcopy(job)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        there = [path for path in places(job) if path]
        if not there:
            break
        *parents, last = draw.choice(there)
        inside: Any = job
        for key in parents:
            inside = inside[key]
        match draw.choice(["junk", "junk", "gone", "misspelt", "twin", "swapped"]):
            case "junk":
                inside[last] = copy.deepcopy(draw.choice(JUNK))
            case "gone":
                del inside[last]
            case "misspelt" if isinstance(inside, dict):
                name = str(last)
                inside[name[:-1] + draw.choice("abcxyz")] = inside.pop(last)
            case "twin" if isinstance(inside, list):
                inside.append(copy.deepcopy(inside[last]))
            case _:
                other = draw.choice(there)
                value: Any = job
                for key in other:
                    value = (
                        value[key]
                        if isinstance(value, (dict, list)) and (key in value if isinstance(value, dict) else key < len(value))
                        else None
                    )
                inside[last] = copy.deepcopy(value)
    return job


def understandable(said: str, where: str) -> None:
    """Every line names the file and a field, and none is in the words of a program."""
    for line in said.splitlines():
        assert line.startswith(where), line
        assert re.match(r"[\w.\- ]*: \S|\S", line.removeprefix(where)) and len(line) < 900
    outside = re.sub(r'"[^"]*"|\'[^\']*\'', "", said)  # what was given may be anything
    assert not INTERNAL.search(outside), said
    assert said.strip()


@pytest.mark.parametrize("part", range(5))
def test_a_hundred_spoilt_jobs_are_jobs_or_refused_in_plain_lines(part: int) -> None:
    jobs = [yaml.safe_load(text) for text in [RICH] * 4 + [path.read_text() for path in sorted((ROOT / "jobs").glob("*.yaml"))]]
    draw, refused = random.Random(part), 0
    for _ in range(100):
        job = spoilt(draw, draw.choice(jobs))
        try:
            assert isinstance(spec.validated(job, "job.yaml: "), Job)
        except DloptError as error:
            understandable(str(error), "job.yaml: ")
            refused += 1
    assert 40 < refused < 100


def test_the_job_that_is_spoilt_is_one() -> None:
    assert spec.validated(yaml.safe_load(RICH)).name == "rich"


def test_files_that_are_torn_are_refused_in_one_line(tmp_path: Path) -> None:
    draw, path = random.Random(9), tmp_path / "job.yaml"
    text = RICH.encode()
    for _ in range(100):
        place = draw.randrange(len(text))
        cut = draw.choice(
            [
                text[:place],
                text[:place] + bytes([draw.randrange(256)]) + text[place + 1 :],
                text[place:],
                text[:place] + b"\t" + text[place:],
            ]
        )
        path.write_bytes(cut)
        try:
            assert isinstance(spec.load(path), Job)
        except DloptError as error:
            understandable(str(error), str(path))


@pytest.mark.parametrize(
    "override", ["=", "a", "a=", ".=1", "train=3", "train.epochs={", "data.inputs.9.kind=x", "\x00=1", "train.optimizer.lr.x.y=1"]
)
def test_odd_overrides_are_refused_in_one_line(override: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(RICH)
    with pytest.raises(DloptError) as error:
        spec.load(tmp_path / "job.yaml", [override])
    assert len(str(error.value).splitlines()) == 1
