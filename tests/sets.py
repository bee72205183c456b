"""For the tests of training and export: small prepared sets of every kind of input and target, made by hand, and models of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save

from dlopt.artifact import Artifact, Stage, once
from dlopt.data.prepared import Rows, as_table, write_part
from dlopt.models import Model, build_network
from dlopt.part import Feature, Part, Signature, Statistics, Target
from dlopt.train.job import Fit, Train
from dlopt.train.start import DTYPES, read_statistics
from tests.models.test_models import image, numbers, statistics

CARRIERS, ORIGINS = ("AA", "UA", "Ü"), ("", "EWR", "JFK", "LGA", "?")
CATEGORIES = Feature(
    name="carrier, origin",
    kind="category",
    dtype="string",
    shape=(2,),
    columns=("carrier", "origin"),
    vocabularies=(CARRIERS, ORIGINS),
    missing=(2, 1),  # filled with UA; a value of its own
)
ONE = Feature(name="tail", kind="category", dtype="string", shape=(1,), columns=("tail",), vocabularies=(("x", "y"),), missing=(0,))
HASHED = Feature(name="flight", kind="category", dtype="int32", shape=(1,), columns=("flight",), buckets=7)
DATES = Feature(name="day", kind="date", dtype="float32", shape=(2,), columns=("day",), parts=("month", "weekday"))
TEXT = Feature(name="title", kind="text", dtype="int32", shape=(9,), columns=("title",), tokens=20, tokenizer="{}")
IMAGE, NUMBERS = image(4, 5, 3), numbers("a", "b", "c")

TWO = Target(name="late", labels=("no", "yes"), positive="yes")
THREE = Target(name="label", labels=("cat", "dog", "owl"))
LABELS = Target(name="topics", kind="multi_label", labels=("art", "law", "sea", "war"))
NUMBER = Target(name="price", kind="number", columns=("price",))
PAIR = Target(name="place", kind="number", columns=("x", "y.z"))
SPLITS = {"train": 300, "validation": 100, "test": 80}


def signature(*inputs: Feature, target: Target = TWO) -> Signature:
    return Signature(inputs=inputs, target=target)


EVERYTHING = (NUMBERS, CATEGORIES, ONE, HASHED, DATES, TEXT, IMAGE)


class Made(Part):
    """What is to be made: so many random rows of each split, the target a function of the inputs and some noise."""

    signature: Signature
    rows: dict[str, int]
    noise: float = 0.1
    rare: float = 0.0
    """Added to the score of the first class or label: the greater, the rarer the others."""


def prepared(home: Path, found: Signature, noise: float = 0.1, rare: float = 0.0, **rows: int) -> Artifact:
    return once(Stage("data", _write_data), Made(signature=found, rows=SPLITS | rows, noise=noise, rare=rare), home)


def trained(home: Path, data: Artifact, model: Model, precision: Any = "float32") -> Artifact:
    """A model with its first weights, which for most tests are as good as any."""
    return once(Stage("model", _write_model), Fit(seed=3, model=model, augment=(), train=Train(precision=precision)), home, data)


def inputs_of(found: Signature, rows: int, seed: int = 0) -> Rows:
    """Random rows; a fifth of all numbers is missing."""
    generator = np.random.default_rng(seed)
    return {feature.name: _values(feature, rows, generator) for feature in found.inputs}


def _values(feature: Feature, rows: int, generator: np.random.Generator) -> np.ndarray:
    if feature.kind == "image":
        return generator.integers(0, 256, (rows, *feature.shape), dtype=np.uint8)
    if feature.kind == "category":
        return np.stack([generator.integers(0, codes, rows, dtype=np.int32) for codes in feature.codes], axis=1)
    if feature.kind == "text":
        ids = generator.integers(1, feature.tokens, (rows, *feature.shape), dtype=np.int32)
        return ids * (np.arange(feature.size) < generator.integers(0, feature.size, (rows, 1)))
    values = generator.normal(50, 20, (rows, *feature.shape)).astype(np.float32)
    values[generator.random(values.shape) < 0.2] = np.nan
    return values


def _score(feature: Feature, values: np.ndarray, outputs: int) -> np.ndarray:
    """(rows, outputs), normal more or less, of what the rows hold."""
    generator = np.random.default_rng(7)
    if feature.kind in ("category", "text"):
        table = generator.normal(size=(max(feature.codes, default=feature.tokens), outputs))
        return table[values].mean(axis=1) * np.sqrt(values.shape[1])
    middle, std = (127.5, 74) if feature.kind == "image" else (50, 20)
    flat = np.nan_to_num((values.reshape(len(values), feature.size) - middle) / std)
    return flat @ generator.normal(size=(flat.shape[1], outputs)) / np.sqrt(flat.shape[1])


def target_of(section: Made, rows: Rows, seed: int = 0) -> np.ndarray:
    target = section.signature.target
    count = len(next(iter(rows.values())))
    score = section.noise * np.random.default_rng(seed).normal(size=(count, target.size))
    for feature in section.signature.inputs:
        score = score + _score(feature, rows[feature.name], target.size)
    score[:, 0] += section.rare
    if target.kind == "category":
        return score.argmax(axis=1).astype(np.int64)
    return (score > 0).astype(np.uint8) if target.kind == "multi_label" else (1000 + 30 * score).astype(np.float32)


def fitted(feature: Feature) -> Statistics:
    columns = feature.shape[-1]
    if feature.kind == "image":
        return statistics([128.0] * columns, [128.0] * columns, [1 / 74.0] * columns)
    return statistics([51.0 + column for column in range(columns)], [50.0] * columns, [0.05] * columns)


def spread(values: np.ndarray) -> Statistics:
    """The statistics of a target's numbers."""
    mean, std = values.mean(axis=0, dtype=np.float64), values.std(axis=0, dtype=np.float64)
    empty = statistics([0.0] * values.shape[1], mean.tolist(), (1 / std).tolist())
    return empty.model_copy(update={"mean": tuple(mean.tolist()), "std": tuple(std.tolist()), "fill": ()})


def _write_data(section: Made, out: Path) -> dict[str, Any]:
    found, target = section.signature, section.signature.target
    (out / "signature.json").write_text(found.model_dump_json())
    known = {feature.name: fitted(feature) for feature in found.inputs if feature.kind in ("image", "number", "date")}
    labels: dict[str, dict[str, int]] = {}
    for seed, (name, count) in enumerate(section.rows.items()):
        rows = inputs_of(found, count, seed)
        rows[target.name] = target_of(section, rows, seed)
        if target.kind == "number" and name == "train":
            known[target.name] = spread(rows[target.name])
        if target.labels:
            has = rows[target.name] if target.kind == "multi_label" else np.eye(target.size, dtype=int)[rows[target.name]]
            labels[name] = dict(zip(map(str, target.labels), has.sum(axis=0).tolist(), strict=True))
        table = as_table(found, rows)
        for part, start in enumerate(range(0, count, 1024)):
            write_part(table.slice(start, 1024), found, out / name / f"{part:05d}.parquet")
    (out / "statistics.json").write_text(json.dumps({name: value.model_dump() for name, value in known.items()}))
    return {"counts": section.rows, "labels": labels}


def _write_model(section: Fit, out: Path, data: Artifact) -> dict[str, Any]:
    found = Signature.model_validate_json(data.read("signature.json"))
    network = build_network(section.model, found, read_statistics(data), section.seed, DTYPES[section.train.precision])
    (out / "weights.safetensors").write_bytes(save(network.state_dict()))
    for name in ("signature.json", "statistics.json"):
        (out / name).write_bytes(data.read(name))
    return {"metrics": {}}
