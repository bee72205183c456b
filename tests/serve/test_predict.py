"""`dlopt predict`: files to predictions that are onnxruntime's own, whatever ends it on its way."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, r2_score, root_mean_squared_error

from dlopt.api import scoring
from dlopt.api.compared import compare, merged, metrics
from dlopt.api.parts import Parts, lines_of
from dlopt.api.scoring import score
from dlopt.cli import main
from dlopt.data.kinds import MultiLabelTarget, encode_rows
from dlopt.part import DloptError, Signature, Target
from tests.processes import run as run_in_process
from tests.served import FLIGHTS, IMAGE, NUMBERS, make_export

ROWS = 5000
FLIGHT_INPUTS = [
    {"kind": "number", "columns": ["delay", "distance"]},
    {"kind": "category", "columns": ["carrier", "airport"]},
    {"kind": "date", "columns": ["day"], "parts": ["month", "weekday"]},
]
LATE_INPUTS = [{"kind": "number", "columns": ["month", "day", "distance"]}]


def made(home: Path, name: str, signature: Signature, inputs: list[dict[str, Any]], target: dict[str, Any]) -> None:
    """A run of a model with random weights."""
    export, folder = make_export(home, signature), home / name
    folder.mkdir()
    record = {"name": name, "created": "2026", "artifacts": {"export.onnx": os.path.relpath(export.path, folder)}}
    (folder / "run.json").write_text(json.dumps(record))
    job = {"data": {"source": {"kind": "csv", "path": "x.csv"}, "inputs": inputs, "target": target}}
    (folder / "job.yaml").write_text(json.dumps(job))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    made(home, "flights", FLIGHTS, FLIGHT_INPUTS, {"kind": "number", "columns": ["minutes"]})
    made(home, "late", NUMBERS, LATE_INPUTS, {"kind": "category", "column": "late"})
    made(home, "digits", IMAGE, [{"kind": "image"}], {"kind": "category"})
    return home


def flights(rows: int = ROWS) -> pd.DataFrame:
    random = np.random.default_rng(4)
    days = pd.Timestamp("2013-01-01") + pd.to_timedelta(random.integers(0, 365, rows), unit="D")
    return pd.DataFrame(
        {
            "id": np.arange(rows),
            "delay": np.where(random.random(rows) < 0.1, np.nan, random.normal(0, 3, rows).round(2)),
            "distance": random.normal(0, 2, rows).round(3),
            "carrier": random.choice(["AA", "UA", "?", None], rows),
            "airport": [f"A{number:03d}" for number in random.integers(0, 310, rows)],
            "day": days.strftime("%Y-%m-%d"),
            "minutes": random.normal(5, 2, rows).round(1),
        }
    )


def expected(home: Path, frame: pd.DataFrame, signature: Signature = FLIGHTS) -> np.ndarray:
    """By the rows that a request would have."""
    rows = json.loads(frame.to_json(orient="records"))
    session = onnxruntime.InferenceSession(make_export(home, signature).path / "model.onnx")
    (outputs,) = session.run([signature.target.output], encode_rows(signature, rows))
    return np.asarray(outputs)


@pytest.mark.parametrize(("given", "out"), [("csv", "out.parquet"), ("parquet", "out.csv"), ("jsonl", "out.jsonl"), ("csv", "parts")])
def test_every_row_is_predicted_in_its_order(home: Path, tmp_path: Path, given: str, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    frame, path = flights(), tmp_path / f"in.{given}"
    if given == "csv":
        frame.to_csv(path, index=False)
    elif given == "parquet":
        frame.to_parquet(path, row_group_size=700, index=False)
    else:
        frame.to_json(path, orient="records", lines=True)
    target = tmp_path / out
    assert main(["predict", "flights", str(path), "-o", str(target), "--home", str(home), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    read = {"parquet": pd.read_parquet, "csv": pd.read_csv, "jsonl": lambda path: pd.read_json(path, lines=True)}
    found = pd.concat(map(pd.read_parquet, sorted(target.glob("*.parquet")))) if out == "parts" else read[out.partition(".")[2]](target)
    outputs = expected(home, frame)[:, 0]
    assert found["id"].astype(int).tolist() == frame["id"].tolist()
    np.testing.assert_allclose(found["predicted"].astype(float), outputs, rtol=1e-5, atol=1e-6)
    assert found["error"].isna().all() and (said["rows"], said["failed"], said["compared"]) == (ROWS, 0, ROWS)
    true = frame["minutes"].to_numpy()
    wanted = {"mae": mean_absolute_error(true, outputs), "rmse": root_mean_squared_error(true, outputs), "r2": r2_score(true, outputs)}
    assert said["metrics"] == pytest.approx(wanted, rel=1e-6)
    assert (tmp_path / "out.parquet.parts").exists() is False


def test_a_folder_of_images_is_predicted_file_by_file(home: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(6).integers(0, 256, (70, 28, 28), dtype=np.uint8)
    (tmp_path / "pictures").mkdir()
    for place, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{place:03}.png")
    (tmp_path / "pictures" / "100.png").write_bytes(b"none")
    (outputs,) = onnxruntime.InferenceSession(make_export(home).path / "model.onnx").run(None, {"image": images[..., None]})
    for given in ("pictures", "pictures/*.png"):
        out = tmp_path / f"{len(given)}.parquet"
        found = score("digits", str(tmp_path / given), out, home=home)
        table = pd.read_parquet(out)
        assert (found.rows, found.failed, found.compared) == (71, 1, 0)
        assert [Path(path).stem for path in table["path"]] == [f"{place:03}" for place in [*range(70), 100]]
        assert table["predicted"][:70].tolist() == outputs.argmax(axis=1).tolist() and table["error"][70].startswith("not an image")
    with pytest.raises(DloptError, match="no such file"):
        score("digits", str(tmp_path / "none"), tmp_path / "x.csv", home=home)


def killed(home: Path, data: Path, out: Path, after: int) -> None:
    """In a process that ends, as by kill -9, when so many parts are there."""
    whole, seen = scoring.Work.write, []

    def write(work: scoring.Work, raw: pa.Table, path: Path) -> None:
        whole(work, raw, path)
        seen.append(path)
        if len(seen) == after:
            os._exit(9)

    scoring.Work.write = write  # type: ignore[method-assign]
    score("flights", str(data), out, home=home)


def test_what_was_killed_in_the_middle_loses_and_doubles_no_row(home: Path, tmp_path: Path) -> None:
    frame, data, out = flights(), tmp_path / "in", tmp_path / "out.parquet"
    data.mkdir()
    for place in range(8):
        frame[place * ROWS // 8 : (place + 1) * ROWS // 8].to_parquet(data / f"{place}.parquet", index=False)
    undisturbed = tmp_path / "undisturbed.parquet"
    score("flights", str(data), undisturbed, home=home)
    for after in (1, 3):
        assert run_in_process(killed, home, data, out, after) == 9
        assert not out.exists()
    parts = sum(note["rows"] for note in Parts(tmp_path / "out.parquet.parts", stay=False).notes())
    assert 3 * ROWS // 8 <= parts < ROWS  # a part without rows tells the columns
    found = score("flights", str(data), out, home=home)
    assert (found.rows, found.kept) == (ROWS, parts)
    assert pq.read_table(out).equals(pq.read_table(undisturbed))


def test_parts_of_another_model_or_input_are_not_mixed(home: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "in.csv", tmp_path / "parts"
    flights(50).to_csv(data, index=False)
    score("flights", str(data), out, home=home)
    again = score("flights", str(data), out, home=home)
    assert (again.rows, again.kept) == (50, 50)
    flights(60).to_csv(data, index=False)
    with pytest.raises(DloptError, match=r"parts holds predictions of another files: remove it"):
        score("flights", str(data), out, home=home)
    (tmp_path / "there.csv").touch()
    with pytest.raises(DloptError, match=r"there.csv is there already"):
        score("flights", str(data), tmp_path / "there.csv", home=home)


def test_lines_of_json_are_those_of_python() -> None:
    table = pa.table(
        {
            'a "name"': pa.chunked_array([[1, None], [-3]]),
            "f": pa.array([0.1, None, 1e-9]),
            "odd": pa.array([float("inf"), float("nan"), 1.5]),
            "said": pa.array(['ü\n"x"', None, ""], pa.large_string()),
            "bool": [True, False, None],
            "list": pa.array([["a"], None, []]),
            "day": pa.array([0, None, 1], pa.date32()),
        }
    )
    for some in (table, table.slice(1), table.slice(1, 1), table[:0]):
        wanted = "".join(json.dumps(row, default=str) + "\n" for row in some.to_pylist())
        found = lines_of(some).decode()
        assert repr([json.loads(line) for line in found.splitlines()]) == repr([json.loads(line) for line in wanted.splitlines()])
        assert found.count("\n") == len(some)


def test_a_row_that_cannot_be_read_keeps_its_place_and_says_why(home: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "in.csv", tmp_path / "out.csv"
    data.write_text("month,day,distance,late\n1,2,3,yes\n1,x,3,no\n,2,1e60,yes\n5,,7,maybe\n")
    found = score("late", str(data), out, home=home, columns=["late"])
    assert (found.rows, found.failed, found.compared) == (4, 2, 2)
    table = pyarrow.csv.read_csv(out).to_pydict()
    assert table["error"] == ["", "day: 'x' is not a number", "distance: a number is too large", ""]
    assert list(table) == ["late", "predicted", "probability", "probability.no", "probability.yes", "error"]
    rows = [{"month": 1, "day": 2, "distance": 3}, {"month": 5, "day": None, "distance": 7}]
    outputs = expected(home, pd.DataFrame(rows), NUMBERS)
    np.testing.assert_allclose([table["probability.yes"][row] for row in (0, 3)], outputs[:, 1], atol=1e-6)
    assert table["predicted"][0] == ("no", "yes")[outputs[0].argmax()] and table["predicted"][1] == ""
    assert found.metrics["accuracy"] == float(table["predicted"][0] == "yes") / 2  # "maybe" is wrong whatever is said


@pytest.mark.parametrize(
    ("text", "columns", "says"),
    [
        ("month,day\n1,2\n", None, "has no column 'distance', which the model takes; its columns are month, day"),
        ("month,day,distance,predicted\n1,2,3,4\n", None, "--columns: the input has a column 'predicted'"),
        ("month,day,distance\n1,2,3\n", ["x"], "--columns: .* has no column 'x'; its columns are month, day, distance"),
    ],
)
def test_a_mistake_is_one_line(home: Path, tmp_path: Path, text: str, columns: list[str] | None, says: str) -> None:
    (tmp_path / "in.csv").write_text(text)
    with pytest.raises(DloptError, match=says):
        score("late", str(tmp_path / "in.csv"), tmp_path / "out.csv", home=home, columns=columns)


def test_sums_of_parts_come_to_scikit_learns_metrics() -> None:
    random = np.random.default_rng(8)
    target, part = Target(name="t", kind="multi_label", labels=("a", "b", "c")), MultiLabelTarget(column="t")
    true, said = random.random((90, 3)) > 0.5, random.random((90, 3)) > 0.4
    names = np.array(["a", "b", "c"])
    table = pa.table({"t": [names[row].tolist() for row in true]})
    sums = [
        compare(
            part,
            target,
            table.slice(start, 30),
            np.zeros((30, 3)),
            [np.flatnonzero(row).tolist() for row in said[start : start + 30]],
            np.ones(30, bool),
        )
        for start in (0, 30, 60)
    ]
    wanted = {
        "subset_accuracy": accuracy_score(true, said),
        "macro_f1": f1_score(true, said, average="macro"),
        "micro_f1": f1_score(true, said, average="micro"),
    }
    assert metrics(merged(json.loads(json.dumps(sums))), target) == pytest.approx(wanted)
    odd = compare(part, target, pa.table({"t": [["a", "x"]]}), np.zeros((1, 3)), [[0]], np.ones(1, bool))
    assert (odd["right"], odd["both"]) == (0, [1, 0, 0])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_says_the_same(home: Path, tmp_path: Path) -> None:
    frame, data = flights(), tmp_path / "in.parquet"
    frame.to_parquet(data, row_group_size=2500, index=False)
    here, there = tmp_path / "here.parquet", tmp_path / "there.parquet"
    score("flights", str(data), here, home=home)
    found = score("flights", str(data), there, home=home, address="auto")
    assert found.rows == ROWS and pq.read_table(there).equals(pq.read_table(here))
