"""Kinds of inputs: vectors, rows of every kind that are served as they were trained on, and a kind that is one file and one name."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dlopt.artifact import Artifact, Stage, once
from dlopt.data.kinds import CategoryInput, DateInput, ImageInput, NumberInput, TextInput, VectorInput, encode_columns, encode_rows, kinds
from dlopt.data.prepare import arrange
from dlopt.data.prepared import Split
from dlopt.data.rows import SPILL, sort_pieces
from dlopt.data.section import Data
from dlopt.data.sources import Csv, ImageTable, JsonLines, Parquet, Source, infer_kind
from dlopt.data.stats.begin import job_of
from dlopt.data.stats.pairwise import merged
from dlopt.data.stats.summary import summarise
from dlopt.data.table.spill import Read, Spill, from_json
from dlopt.data.table.split import RandomSplit
from dlopt.docs import PAGES
from dlopt.export.graph import onnx_file
from dlopt.export.proof import fed
from dlopt.models import build_network
from dlopt.models.mlp import Mlp
from dlopt.models.table import FtTransformer
from dlopt.part import DloptError, Signature, Target
from dlopt.report.rows import cells, columns
from dlopt.serve.exchange import form_of
from dlopt.train.measure.evaluate import predict
from tests.arranged import anywhere, arranged, feature_of, quarantine_of, rows_of, section_of, signature_of, statistics_of
from tests.commands import ROOT
from tests.graphs import compared

VECTORS = np.random.default_rng(5).normal(3, [1, 5, 0.1], size=(300, 3)).round(3)
LABEL = np.array(["a", "b"])[np.arange(300) % 2]

# Vectors


def nulls_at(values: list[Any], rows: tuple[int, ...]) -> list[Any]:
    return [None if row in rows else value for row, value in enumerate(values)]


@pytest.mark.parametrize(
    "column",
    [
        pa.FixedSizeListArray.from_arrays(VECTORS.reshape(-1), 3),
        pa.FixedSizeListArray.from_arrays(VECTORS.astype(np.float32).reshape(-1), 3).slice(0, 300),
        pa.array(VECTORS.tolist(), pa.list_(pa.float64())),
        pa.array(VECTORS.tolist(), pa.large_list(pa.float64())),
        pa.array([[str(x) for x in row] for row in VECTORS.tolist()]),
        pa.array(map(json.dumps, VECTORS.tolist())),
    ],
    ids=["fixed", "float32", "list", "large list", "lists of texts", "texts"],
)
def test_lists_of_numbers_are_vectors_whatever_way_they_come(column: pa.Array, tmp_path: Path) -> None:
    data = arranged(section_of(VectorInput(column="v")), pa.table({"v": column, "label": LABEL}), tmp_path)
    assert feature_of(data, "v").model_dump(include={"kind", "dtype", "shape", "columns"}) == {
        "kind": "vector",
        "dtype": "float32",
        "shape": (3,),
        "columns": ("v",),
    }
    rows = np.concatenate([rows_of(data, name)["v"] for name in ("train", "validation", "test")])
    assert np.array_equal(np.sort(rows, axis=0), np.sort(VECTORS.astype(np.float32), axis=0))
    statistics, train = statistics_of(data, "v"), rows_of(data, "train")["v"].astype(np.float64)
    assert np.allclose(statistics.shift, train.mean(0)) and np.allclose(1 / np.array(statistics.scale), train.std(0))


def test_a_missing_vector_becomes_the_mean_and_a_wrong_one_is_set_aside_with_its_reason(tmp_path: Path) -> None:
    wrong = {
        7: ([1.0, 2.0], "v: a list of 2 where 3 numbers are needed"),
        30: ([1.0, None, 2.0], "v: None in place 1 is not a number"),
        61: ([1.0, float("nan"), 2.0], "v: nan in place 1 is not a number"),
        92: ([1.0, 2.0, 1e39], "v: a number is too large in place 2"),
    }
    values = nulls_at(VECTORS.tolist(), (3, 5))
    for row, (value, _) in wrong.items():
        values[row] = value
    section = section_of(VectorInput(column="v"), most_bad=0.1, split=RandomSplit(train=1, validation=0, test=0))
    data = arranged(section, pa.table({"v": values, "label": LABEL}), tmp_path)
    assert sorted(row["reason"] for row in quarantine_of(data)) == sorted(why for _, why in wrong.values())
    found, statistics = rows_of(data, "train")["v"], statistics_of(data, "v")
    assert np.isnan(found).all(axis=1).sum() == 2 and np.isnan(found).sum() == 6 and statistics.missing == (2, 2, 2)
    expected = np.delete(VECTORS, [3, 5, *wrong], axis=0).astype(np.float32).astype(np.float64)
    assert np.allclose(statistics.fill, expected.mean(0)) and np.allclose(statistics.std, expected.std(0))


def test_a_column_without_lists_is_no_vector(tmp_path: Path) -> None:
    with pytest.raises(DloptError, match=r"^data.inputs: column 'v' holds no list of numbers in its first 300 rows$"):
        arranged(section_of(VectorInput(column="v")), pa.table({"v": VECTORS[:, 0], "label": LABEL}), tmp_path)


@pytest.mark.parametrize("model", [Mlp(hidden=(8,)), FtTransformer(width=16, depth=1, heads=2)], ids=["mlp", "ft_transformer"])
def test_vectors_are_served_as_they_were_trained_on(model: Any, tmp_path: Path) -> None:
    table = pa.table({"v": nulls_at(VECTORS.tolist(), (3, 5)), "n": VECTORS[:, 0], "label": LABEL})
    data = arranged(section_of(VectorInput(column="v"), NumberInput(columns=("n",))), table, tmp_path)
    signature, network = signature_of(data), network_of(data, model)
    split = Split.open(data, "test")
    content = onnx_file(network, signature, "digest")
    assert compared(content, signature, split, predict(network, split, torch.device("cpu"))[0].numpy()) == (pytest.approx(0, abs=1e-6), 0)
    served = encode_rows(signature, table.to_pylist())["v"]
    assert np.array_equal(served, np.where(np.isin(np.arange(300), (3, 5))[:, None], np.nan, VECTORS).astype(np.float32), equal_nan=True)
    assert np.array_equal(encode_columns(signature, {"v": VECTORS, "n": VECTORS[:, 0]})["v"], VECTORS.astype(np.float32))
    if model.kind == "ft_transformer":  # a vector is one token, beside the row's and the number's
        body = network.body.encoder if hasattr(network.body, "encoder") else network.body
        assert next(part for part in body.modules() if type(part).__name__ == "Columns").added.weight.shape == (3, 16)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([1, 2], r"a list of 2 where 3 numbers are needed"),
        ([1, None, 2], r"None in place 1 is not a number"),
        ([1, "x", 2], r"'x' in place 1 is not a number"),
        ([1, [2], 2], r"\[2\] in place 1 is not a number"),
        ([1, 2, 10**400], r"a number is too large in place 2"),
        (7, r"7 is not a list of 3 numbers"),
        ("1, 2, 3", r"'1, 2, 3' is not a list of 3 numbers"),
        ("[" * 99_999, r"'\[+ is not a list of 3 numbers"),
        ({"x": 1}, r"\{'x': 1\} is not a list of 3 numbers"),
    ],
)
def test_a_request_with_another_value_than_a_vector_is_named(value: Any, why: str) -> None:
    part = VectorInput(column="v")
    signature = Signature(inputs=(part.feature(pa.table({"v": VECTORS.tolist()})),), target=Target(name="y", labels=(0, 1)))
    with pytest.raises(DloptError, match=rf"^row 1: v: {why}$"):
        encode_rows(signature, [{"v": [1, 2, 3]}, {"v": value}])
    assert encode_rows(signature, [[1, 2, 3], "[4, 5, 6]", None])["v"].tolist()[:2] == [
        [1, 2, 3],
        [4, 5, 6],
    ]  # a lone input's rows are bare


def test_a_profile_and_a_page_know_vectors(tmp_path: Path) -> None:
    table = pa.table({"v": nulls_at(VECTORS.tolist(), (3,)), "other": pa.array([[1], *[[1, 2]] * 299]), "label": LABEL})
    assert infer_kind(table, "v") == "vector" and infer_kind(table, "other") == "category"
    whole = summarise(table, {"v": "vector", "label": "category"}, ("label",))
    lengths = np.linalg.norm(np.delete(VECTORS, 3, axis=0), axis=1)
    two = merged(summarise(part, {"v": "vector", "label": "category"}, ("label",)) for part in (table.slice(0, 100), table.slice(100)))
    assert two is not None
    for column in (whole.columns["v"], two.columns["v"]):
        assert (column.rows, column.missing, column.unreadable, column.counts) == (300, 1, 0, {"3 numbers": 299})
        assert (column.low, column.high, column.mean) == pytest.approx((lengths.min(), lengths.max(), lengths.mean()))
    pq.write_table(table, tmp_path / "t.parquet")
    begun = job_of(Parquet(path=str(tmp_path / "t.parquet")), whole, ["label"], []).text
    assert "- {kind: vector, column: v}" in begun
    data = arranged(section_of(VectorInput(column="v")), table, tmp_path / "home")
    signature = signature_of(data)
    assert form_of(signature) == [{"column": "v", "widget": "list", "size": 3}]
    assert [column.name for column in columns(signature)] == ["v"]
    shown = cells(signature, {"v": np.array([[1, 2.5, 3], [np.nan] * 3], np.float32)})
    assert shown == [["1, 2.5, 3"], ["missing"]]


def test_a_kind_of_another_version_is_named() -> None:
    with pytest.raises(DloptError, match=r"this dlopt knows no input of kind 'sound', only number, category, date, text, image, vector"):
        kinds["sound"]


# Rows of every kind, whatever way they come

EVERY = 1000
DAY = datetime(2026, 1, 2, tzinfo=UTC)


def network_of(data: Artifact, model: Any) -> Any:
    statistics = {name: statistics_of(data, name) for name in json.loads(data.read("statistics.json"))}
    return build_network(model, signature_of(data), statistics, seed=1).eval()


def every_kind() -> list[dict[str, Any]]:
    """Rows as Python has them."""
    random = np.random.default_rng(11)
    words = ["free", "money", "call", "007", "caf\u00e9", "1.50", "now", "NA"]
    rows = []
    for number in range(EVERY):
        gone = random.random(6) < 0.06
        rows.append(
            {
                "id": 10**9 + number,
                "amount": None if gone[0] else round(float(random.normal(3, 9)), 4),
                "seconds": 1_764_500_000 + int(random.integers(0, 600)),
                "flag": None if gone[1] else bool(random.random() < 0.5),
                "grade": float(random.integers(1, 5)),
                "zip": ["01234", "1234", "99", "7.0"][random.integers(0, 4)],
                "city": None if gone[2] else ["Ulm", "K\u00f6ln", "New York, NY", 'the "Hague"'][random.integers(0, 4)],
                "when": None if gone[3] else DAY + timedelta(hours=int(random.integers(0, 9000))),
                "words": " ".join(random.choice(words, random.integers(1, 6))),
                "vector": None if gone[4] else random.normal(size=3).round(3).tolist(),
                "image": random.integers(0, 256, (4, 5)).astype(np.uint8),
                "label": "yes" if random.random() < 0.4 else "no",
            }
        )
    return rows


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="png")
    return content.getvalue()


def as_csv(rows: list[dict[str, Any]], folder: Path) -> tuple[Source, list[dict[str, Any]]]:
    """A source, and each row as a program that reads the file would send it: texts, and images as the files that are named."""
    written = []
    for number, row in enumerate(rows):
        (folder / f"{number}.png").write_bytes(png(row["image"]))
        vector = "" if row["vector"] is None else json.dumps(row["vector"])
        texts = {name: "" if value is None else str(value) for name, value in row.items()}
        written.append(texts | {"vector": vector, "image": f"{number}.png", "when": row["when"].isoformat() if row["when"] else "NA"})
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(written)
    source = ImageTable(table=Csv(path=str(folder / "rows.csv"), types={"zip": "string"}), folder=str(folder))
    with (folder / "rows.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    return source, [row | {"image": {"b64": base64.b64encode((folder / row["image"]).read_bytes()).decode()}} for row in read]


def as_json(rows: list[dict[str, Any]], folder: Path) -> tuple[Source, list[dict[str, Any]]]:
    grades = [{"grade": int(row["grade"]) if number % 2 else row["grade"]} for number, row in enumerate(rows)]
    written = [
        row | grade | {"image": row["image"].tolist(), "when": row["when"] and row["when"].isoformat().replace("+00:00", "Z")}
        for row, grade in zip(rows, grades, strict=True)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    lines = (folder / "rows.jsonl").read_text().splitlines()
    return JsonLines(path=str(folder / "rows.jsonl"), types={"zip": "string"}), [json.loads(line) for line in lines]


def as_parquet(rows: list[dict[str, Any]], folder: Path) -> tuple[Source, list[dict[str, Any]]]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    images = [png(row["image"]) for row in rows]
    table = pa.table(columns | {"image": images, "grade": pa.array(columns["grade"], pa.float32())})
    pq.write_table(table, folder / "rows.parquet")
    read = pq.read_table(folder / "rows.parquet").to_pylist()
    sent = [
        row | {"image": {"b64": base64.b64encode(row["image"]).decode()}, "when": row["when"] and row["when"].isoformat()} for row in read
    ]
    return Parquet(path=str(folder / "rows.parquet")), json.loads(json.dumps(sent))


FORMATS: dict[str, Callable[[list[dict[str, Any]], Path], tuple[Source, list[dict[str, Any]]]]] = {
    "csv": as_csv,
    "json": as_json,
    "parquet": as_parquet,
}


def prepared(source: Source, home: Path) -> Artifact:
    """What prepare makes of a source, read in this process."""
    inputs = [
        NumberInput(columns=("id", "amount", "seconds"), fill="median"),
        CategoryInput(columns=("flag", "grade", "zip", "city")),
        DateInput(columns=("when",), parts=("month", "weekday", "hour", "days")),
        TextInput(column="words", min_frequency=1),
        VectorInput(column="vector"),
        ImageInput(),
    ]
    section = section_of(*inputs, source=source, split=RandomSplit(train=1, validation=0, test=0))
    first, meaning = source.peek(64), source.meaning()
    features = tuple(part.meant(part.feature(first), meaning) for part in section.inputs)

    def make(section: Data, out: Path) -> dict[str, Any]:
        spill = Spill(section, features, section.target.whole(first), str(out / SPILL), meaning)
        read = {"source": Read.of(from_json(text) for piece in spill(pa.concat_tables(source.tables())) for text in piece["piece"])}
        try:
            return arrange(sort_pieces(section, features, read, out, anywhere), read, out, run=anywhere)
        finally:
            shutil.rmtree(out / SPILL)

    return once(Stage("data", make), section, home)


def test_rows_are_served_as_they_were_trained_on_whatever_way_they_came(tmp_path: Path) -> None:
    rows = every_kind()
    data, sent = {}, {}
    for name, write in FORMATS.items():
        (tmp_path / name).mkdir()
        source, sent[name] = write(rows, tmp_path / name)
        data[name] = prepared(source, tmp_path / "home" / name)
        assert data[name].info["counts"]["train"] == EVERY
    signature, network = signature_of(data["parquet"]), network_of(data["parquet"], Mlp(hidden=(16,)))
    assert {feature.kind for feature in signature.inputs} == set(kinds)
    split = Split.open(data["parquet"], "train")
    trained = split.read()
    for name in FORMATS:  # trained on any of them, rows and what is learned of them are the same
        assert signature_of(data[name]) == signature, name
        assert data[name].read("statistics.json") == data["parquet"].read("statistics.json"), name
        for tensor, values in rows_of(data[name], "train").items():
            assert np.array_equal(values, trained[tensor], equal_nan=values.dtype.kind == "f"), (name, tensor)
    content = onnx_file(network, signature, "digest")
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, fed(signature, trained))
    assert np.allclose(expected, predict(network, split, torch.device("cpu"))[0].numpy(), atol=1e-6) and expected.std() > 1e-3
    ids = trained["numbers"][:, 0].astype(np.float64) + np.array(signature.inputs[0].offsets)[0]
    order = np.argsort(ids)
    assert ids[order].tolist() == [row["id"] for row in rows]
    for name in FORMATS:  # and sent in any way, a row gets what it got in training
        (served,) = session.run(None, encode_rows(signature, sent[name]))
        assert np.array_equal(served, expected[order]), name


# A kind is one file and one name


def test_a_kind_of_input_is_one_file_and_one_name(tmp_path: Path) -> None:
    """That of the documentation: beside its file only the union changes, and it is prepared, trained on, exported, profiled and served."""
    (example,) = [
        text for text in re.findall(r"^```python sketch\n(.*?)^```", (PAGES / "how.md").read_text(), re.M | re.S) if "AngleInput(" in text
    ]
    code, _, union = example.partition("\nInput = ")
    shutil.copytree(ROOT / "dlopt", tmp_path / "dlopt", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "dlopt/data/kinds/angle.py").write_text(code)
    names = tmp_path / "dlopt/data/kinds/__init__.py"
    text = names.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("Input = ")]
    assert line.replace(" | VectorInput", " | VectorInput | AngleInput") == "Input = " + union.strip()
    names.write_text(text.replace(line, "from dlopt.data.kinds.angle import AngleInput  # noqa: E402\n\nInput = " + union.strip()))
    done = subprocess.run([sys.executable, "-c", ANGLES], capture_output=True, text=True, cwd=tmp_path, env=paths(tmp_path), check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["where"].startswith(str(tmp_path)) and said["rows"] == 300 and said["difference"] < 1e-6
    assert np.allclose(said["served"], [[np.sin(np.radians(359)), np.cos(np.radians(359))], [np.nan] * 2], atol=1e-7, equal_nan=True)
    assert said["form"] == [{"column": "a", "widget": "number"}] and said["profile"] == ["a sine", "a cosine"]


def paths(folder: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}


ANGLES = """
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

import dlopt
from dlopt.data.kinds import encode_rows, kinds
from dlopt.data.prepared import Split
from dlopt.export.graph import onnx_file
from tests.graphs import compared
from dlopt.models import build_network
from dlopt.models.mlp import Mlp
from dlopt.serve.exchange import form_of
from dlopt.train.measure.evaluate import predict
from tests.arranged import SPLITS, arranged, section_of, signature_of, statistics_of

angles = np.random.default_rng(1).uniform(0, 360, 300)
table = pa.table({"a": angles, "label": np.where(np.cos(np.radians(angles)) > 0, "n", "s")})
data = arranged(section_of(kinds["angle"](columns=("a",))), table, Path("home"))
signature, split = signature_of(data), Split.open(data, "test")
network = build_network(Mlp(hidden=(4,)), signature, {"angles": statistics_of(data, "angles")}, seed=1).eval()
expected = predict(network, split, torch.device("cpu"))[0].numpy()
profile = json.loads(data.read("profile.json"))["columns"]
print(json.dumps({
    "where": dlopt.__file__,
    "rows": sum(len(Split.open(data, name)) for name in SPLITS),
    "difference": compared(onnx_file(network, signature, "digest"), signature, split, expected)[0],
    "served": encode_rows(signature, [{"a": 359}, {"a": None}])["angles"].tolist(),
    "form": form_of(signature),
    "profile": [name for name in profile if name != "label"],
}))
"""
