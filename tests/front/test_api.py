"""`import dlopt`: a DataFrame in, a run with its report out, predictions that are the run's own; and what can be passed wrongly."""

from __future__ import annotations

import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import dlopt
from dlopt.api.notebook import shown
from dlopt.api.predict import rows_of
from dlopt.part import Feature, Signature, Target
from dlopt.progress import WARNING
from dlopt.train.job import Train
from tests.packages import package

ROWS = 300


def columns(rows: int = ROWS) -> dict[str, Any]:
    random = np.random.default_rng(3)
    number = np.arange(rows) + 0.5
    town = random.choice(["Rome", "Oslo", ""], rows)
    return {"number": number, "town": town, "late": np.where((number % 7 > 3) | (town == "Oslo"), "yes", "no")}


JOB: dict[str, Any] = {
    "name": "late",
    "data": {
        "inputs": [{"kind": "number", "columns": ["number"]}, {"kind": "category", "columns": ["town"]}],
        "target": {"kind": "category", "column": "late"},
    },
    "model": {"kind": "mlp", "hidden": [8]},
    "train": {"epochs": 2, "batch_size": 32},
}


@pytest.fixture(scope="module")
def run(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dlopt.Run:
    return dlopt.run(JOB, data=columns(), home=tmp_path_factory.mktemp("api"), train__epochs=3)


def test_a_name_that_is_not_used_costs_nothing() -> None:
    code = "import sys, dlopt; print(dir(dlopt)); print([n for n in ('torch', 'ray', 'pydantic', 'numpy') if n in sys.modules])"
    names, heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert heavy == "[]" and all(f"'{name}'" in names for name in dlopt.__all__)
    assert (Path(dlopt.__file__).parent / "py.typed").is_file()
    for name in dlopt.__all__:
        assert getattr(dlopt, name).__doc__


def test_a_run_is_loaded_and_asked_without_torch_and_ray(run: dlopt.Run) -> None:
    code = f"""
import sys, dlopt
run = dlopt.load({str(run.folder)!r})
print(run.predict([{{"number": 3.5, "town": "Oslo"}}])[0]["label"], [n for n in ("torch", "ray", "matplotlib") if n in sys.modules])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split(None, 1)[1] == "[]\n"


def test_predictions_are_those_of_the_run(run: dlopt.Run) -> None:
    """Of the test split, whose rows are found by their number, to the last digits of float32; onnxruntime against torch."""
    from dlopt.data.prepared import Split

    split = Split.open(run._artifact("data"), "test")
    numbers = np.concatenate([split.read([chunk])["numbers"][:, 0] for chunk in split.chunks])
    rows = [int(np.argmin(abs(columns()["number"] - number))) for number in numbers]
    table = pa.table({name: values[rows] for name, values in columns().items()})
    said, stored = run.predict(table), run.predictions
    labels = run.signature.target.labels
    assert said["label"].to_pylist() == [labels[code] for code in stored["predicted"].to_pylist()]
    np.testing.assert_allclose(said["probability"].to_numpy(), stored["probability"].to_numpy(), rtol=1e-5)
    assert run.metrics["test"]["accuracy"] == pytest.approx(np.mean(said["label"].to_numpy() == table["late"].to_numpy()))


def test_every_way_to_give_rows_says_the_same(run: dlopt.Run, tmp_path: Path) -> None:
    pandas = package("pandas", "sklearn")
    given = columns(5)
    chances = run.predict_proba(given)
    assert chances.shape == (5, 2) and chances.dtype == np.float32
    rows = [{name: given[name][row] for name in ("number", "town")} for row in range(5)]  # numpy's values
    said = run.predict(rows)
    assert [row["probabilities"] for row in said] == chances.tolist()
    frame = pandas.DataFrame(given, index=[9, 8, 7, 6, 5])
    found = run.predict(frame)
    assert list(found.index) == [9, 8, 7, 6, 5] and list(found.columns) == ["label", "probability", "probability.no", "probability.yes"]
    assert found["label"].tolist() == [row["label"] for row in said]
    assert run.predict([]) == [] and len(run.predict(frame.head(0))) == 0
    missing = frame.assign(number=[np.nan] * 5, town=None)
    assert len(set(run.predict(missing)["probability"])) == 1


def test_a_run_shows_itself_and_gives_away_its_model(run: dlopt.Run, tmp_path: Path) -> None:
    assert "<th>accuracy</th>" in run._repr_html_() and run.report._repr_html_().startswith("<iframe")
    again = dlopt.load("late", home=run.folder.parent)
    assert again.folder == run.folder.resolve() and again.metrics == run.metrics and again.made == ()
    assert dlopt.run(again.job, home=run.folder.parent).folder == run.folder
    assert run.export(tmp_path / "late.onnx").read_bytes() == (run.folder / "model.onnx").read_bytes()
    assert run.export(tmp_path) == tmp_path / "model.onnx" and (tmp_path / "signature.json").is_file()
    assert {path.name for path in run.folder.iterdir()} >= {"model.onnx", "predictions.parquet", "metrics.jsonl", "weights.safetensors"}
    assert not run.model.training and sum(weights.numel() for weights in run.model.parameters()) > 20
    other = dlopt.run(JOB, data=columns(), home=run.folder.parent, train__epochs=2)
    assert "<html" in dlopt.compare([run, other], tmp_path / "two.html").path.read_text()
    pickle.loads(pickle.dumps(run))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"job": 3}, "run: job: must be a path, a dict or a Job, not int"),
        ({"job": "nowhere.yaml"}, "nowhere.yaml: no such job file"),
        ({"job": {}}, "run: name: is missing"),
        ({"job": None}, "run: give a job, or data and target to begin one"),
        ({"job": JOB, "target": "late"}, "run: target: the job names its target: leave out target, or the job"),
        ({"job": JOB, "data": columns(), "train__epoch": 3}, "run: train.epoch: unknown key; did you mean 'epochs'?"),
        ({"job": JOB, "data": columns(), "train__epochs__x": 3}, "'train.epochs.x=3': epochs is a value, there is nothing below it"),
        ({"job": JOB, "data": columns(), "home": 3}, "home: must be a path, not int"),
        ({"job": JOB, "data": 7}, "from_data: a int is no table: give a Table, a DataFrame, a dict of arrays or a list of dicts"),
        ({"data": columns(), "target": "lat"}, "--target: there is no column 'lat'; the columns are number, town, late"),
        ({"data": columns(), "target": ()}, "--target: name the column to predict; the columns are number, town, late"),
        (
            {"data": {"a": [1] * 20, "b": ["x", "y"] * 10}, "target": "b"},
            "--target: nothing is left to predict 'b' from: a: it is the same in every row",
        ),
        ({"data": columns(8), "target": "late"}, "--target: 'late' has 8 rows with a value: there is nothing to learn from so few"),
    ],
)
def test_what_is_passed_wrongly_is_one_line(arguments: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(dlopt.DloptError) as error:
        dlopt.run(**({"home": tmp_path} | arguments))
    assert str(error.value).splitlines()[0] == says


def test_what_else_is_passed_wrongly(run: dlopt.Run, tmp_path: Path) -> None:
    wrong: list[tuple[Any, str]] = [
        (lambda: run.predict({"number": 1, "town": "Rome"}), "predict: give a list of rows, even for a single one: predict([row])"),
        (lambda: run.predict("rows.csv"), "predict: give a list of rows, even for a single one: predict([row])"),
        (lambda: run.predict([{"number": 1}]), "predict: row 0: has no column 'town'"),
        (
            lambda: run.predict([{"number": 1, "town": ""}] * 3000 + [{"number": "x", "town": ""}]),
            "predict: row 3000: number: 'x' is not a number",
        ),
        (lambda: run.predict(pa.table({"number": [1.0]})), "predict: there is no column 'town'; the model takes number, town"),
        (lambda: run.predict(pa.table({"number": ["1", "x"], "town": ["", ""]})), "predict: row 1: number: 'x' is not a number"),
        (lambda: run.export(tmp_path / "no" / "model.onnx"), f"export: there is no folder {tmp_path / 'no'}"),
        (
            lambda: run.export(tmp_path, "coreml"),
            "export: no kind 'coreml'; there are onnx, torch_export, torchscript, safetensors, pickle, joblib, triton, torchserve, "
            "openvino, tensorrt",
        ),
        (lambda: run.serve(port=99999), "serve: port: 99999 is no port: give a number from 1 to 65535, or 0 for a free one"),
        (lambda: dlopt.load(3), "load: run: must be a run's folder or a job's name, not int"),
        (lambda: dlopt.compare("one"), "compare: runs: give a list of 2 to 6 runs, not 'one'"),
        (
            lambda: dlopt.profile(tmp_path / "no.csv"),
            f"{tmp_path / 'no.csv'}: no such file; workers read it, so give a path that every node can see",
        ),
        (lambda: Train(epochs=0), "Train: epochs: must be greater than or equal to 1, not 0"),
        (lambda: run.job.model_copy(update={"seed": -1}), "Job: seed: must be greater than or equal to 0, not -1"),
    ]
    for call, says in wrong:
        with pytest.raises(dlopt.DloptError) as error:
            call()
        assert str(error.value) == says


def test_images_of_every_kind_are_rows(tmp_path: Path) -> None:
    feature = Feature(name="image", kind="image", dtype="uint8", shape=(2, 3, 3), columns=("image",))
    signature = Signature(inputs=(feature,), target=Target(name="label", labels=("a", "b")))
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    from dlopt.data.kinds import encode_rows

    for data in (pixels[None], [pixels], [Image.fromarray(pixels)], [tmp_path / "a.png"], [(tmp_path / "a.png").read_bytes()]):
        np.testing.assert_array_equal(encode_rows(signature, rows_of(data, signature))["image"][0], pixels)


def test_progress_in_a_notebook_is_one_output_that_is_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of IPython only what it gives a cell is stood in for: a shell with a kernel, and a display that can be updated."""
    drawn: list[str] = []
    handle = types.SimpleNamespace(update=lambda shown: drawn.append(shown._repr_html_()))
    module = types.ModuleType("IPython")
    module.get_ipython = lambda: types.SimpleNamespace(kernel=1)  # type: ignore[attr-defined]
    display = types.ModuleType("IPython.display")
    display.display = lambda shown, display_id: handle  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    with shown("late", None) as progress:
        progress("prepare", None, "reading <rows>")
        progress("prepare", 0.5, "half")  # too soon after the first to be drawn
        progress("fit", 0.25, "epoch 1/4")
        progress("fit", None, f"{WARNING}slow")
        progress("fit", 1.0, "done")
    assert len(drawn) == 4
    assert "<progress></progress></td><td>reading &lt;rows&gt;</td>" in drawn[0]
    assert 'value="1.000"></progress></td><td>half' in drawn[1] and 'value="0.250"></progress></td><td>epoch 1/4' in drawn[1]
    assert "warning: slow" in drawn[2] and 'value="1.000"></progress></td><td>done' in drawn[3]
