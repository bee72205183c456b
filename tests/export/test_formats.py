"""Every format says what torch says, computed by its own runtime, and loads without dlopt."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from dlopt.api.exporting import copied, format_of
from dlopt.api.verifying import differing
from dlopt.artifact import Artifact, Stage, once
from dlopt.data.kinds import encode_rows
from dlopt.export import Joblib, Onnx, Pickle, Safetensors, TorchExport, TorchScript, TorchServe, Triton
from dlopt.export.estimator import ENCODERS, Classifier, Regressor
from dlopt.export.pickled import load_estimator, source
from dlopt.export.stage import EXPORT
from dlopt.models import Cnn, Mlp, Resnet, TextBag
from dlopt.models.custom import custom
from dlopt.part import DloptError, Feature, Signature
from dlopt.train.job import Fit, Train
from dlopt.train.start import trained_network
from tests import sets
from tests.export.test_export import Unwritable, strings, torchs
from tests.models.test_models import image
from tests.packages import package
from tests.sets import CATEGORIES, DATES, EVERYTHING, HASHED, LABELS, NUMBER, NUMBERS, ONE, PAIR, TEXT, THREE, TWO, inputs_of

IMAGES = Signature(inputs=(image(12, 10, 3),), target=THREE)
TABLE = Signature(inputs=(NUMBERS, CATEGORIES, ONE), target=TWO)
CASES = [
    pytest.param(Signature(inputs=EVERYTHING, target=PAIR), Mlp(hidden=(8,)), id="everything"),
    pytest.param(IMAGES, Cnn(channels=(4, 8), hidden=16, norm="batch"), id="cnn", marks=pytest.mark.slow),
    pytest.param(IMAGES, Mlp(hidden=(32,)), id="mlp", marks=pytest.mark.slow),
    pytest.param(TABLE, Mlp(hidden=(16,)), id="table", marks=pytest.mark.slow),
    pytest.param(Signature(inputs=(TEXT,), target=TWO), TextBag(embedding=8), id="text", marks=pytest.mark.slow),
]
FORMATS = [TorchExport(), TorchScript(), Safetensors(), Pickle(), Joblib()]
PLATFORMS = [*FORMATS, Triton(), Triton(backend="python"), TorchServe()]
"""All that need no other package."""


@pytest.mark.parametrize("part", FORMATS, ids=lambda part: part.kind)
@pytest.mark.parametrize(("found", "model"), CASES)
def test_a_format_says_what_torch_says_of_other_rows_than_the_proof_had(tmp_path: Path, found: Signature, model: Any, part: Any) -> None:
    data = sets.prepared(tmp_path, found)
    weights = sets.trained(tmp_path, data, model)
    export = once(EXPORT, part, tmp_path, weights, data)
    assert export.info["largest_difference"] <= 1e-5 and export.info["rows"] == sets.SPLITS["test"]
    assert export.info["bytes"] >= export.manifest.files[part.file].size > 500
    rows = inputs_of(found, 50, seed=99)
    expected = torchs(trained_network(weights, data), rows, found.target)
    scale = 30.0 if found.target.kind == "number" else 1.0
    np.testing.assert_allclose(asked(part, export.path, found, rows) / scale, expected / scale, atol=1e-5)


def asked(part: Any, folder: Path, found: Signature, rows: dict[str, np.ndarray]) -> np.ndarray:
    """The file as somebody loads it who has no dlopt."""
    tensors = tuple(torch.from_numpy(rows[feature.name]) for feature in found.inputs)
    if isinstance(part, TorchExport):
        with torch.no_grad():
            return torch.export.load(str(folder / part.file)).module()(*tensors).numpy()
    if isinstance(part, TorchScript):
        with torch.no_grad():
            return torch.jit.load(str(folder / part.file))(*tensors).numpy()
    if isinstance(part, Safetensors):
        config, named = json.loads((folder / "config.json").read_bytes()), load_file(folder / part.file)
        assert config["model_type"] == "dlopt" and list(config["id2label"].values()) == [str(label) for label in found.target.labels]
        assert {"body.head.weight", "body.head.bias"} <= set(named)
        from dlopt.export.trained import built_of

        network = built_of(config)
        network.load_state_dict(named)
        return torchs(network, rows, found.target)
    loaded = (
        pickle.loads((folder / part.file).read_bytes())
        if isinstance(part, Pickle)
        else package("joblib", "sklearn").load(folder / part.file)
    )
    return loaded.compute(strings(found, rows))


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_of_the_bits_cost_next_to_nothing_or_are_refused(tmp_path: Path, precision: Any) -> None:
    data = sets.prepared(tmp_path, IMAGES)
    weights = sets.trained(tmp_path, data, Resnet(blocks=(1, 1), widths=(16, 32)))
    whole, half = (once(EXPORT, part, tmp_path, weights, data) for part in (Onnx(), Onnx(precision=precision)))
    assert half.info["bytes"] < 0.75 * whole.info["bytes"]
    assert 1e-6 < half.info["largest_difference"] < 0.05 and half.info["agreement"] > 0.95
    assert half.info["metric"]["name"] == "accuracy"


def _write_large(section: Fit, out: Path, data: Artifact) -> dict[str, Any]:
    info = sets._write_model(section, out, data)
    weights = load_file(out / "weights.safetensors")
    (out / "weights.safetensors").write_bytes(save(weights | {"body.head.bias": weights["body.head.bias"] + 1e6}))
    return info


def test_what_float16_has_no_room_for_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, IMAGES)
    model = once(Stage("model", _write_large), Fit(seed=3, model=Mlp(), augment=(), train=Train()), tmp_path, data)
    assert once(EXPORT, Onnx(precision="bfloat16", drop=1), tmp_path, model, data).info["agreement"] is not None
    with pytest.raises(RuntimeError, match=r"^export refused: on the test split the onnx.float16 file has accuracy .* allows 0.005$"):
        once(EXPORT, Onnx(precision="float16"), tmp_path, model, data)
    assert sum(1 for _ in tmp_path.glob("export/*/manifest.json")) == sum(1 for _ in tmp_path.glob("export/*/model.onnx")) == 1


BARE = """
import importlib.abc, pickle, sys
ALLOWED = {"numpy", "onnxruntime", "joblib", "flatbuffers", "coloredlogs", "humanfriendly", "packaging", "google", "sympy", "mpmath"}
class Refusing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root in ("dlopt", "torch", "ray", "pydantic", "pyarrow", "pandas", "sklearn", "onnx", "PIL", "yaml"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Refusing())
import numpy as np
file = sys.argv[1]
if file.endswith("joblib"):
    import joblib
    model = joblib.load(file)
else:
    model = pickle.load(open(file, "rb"))
again = pickle.loads(pickle.dumps(model))
rows = [{"a": 1.5, "b": None, "c": "7", "carrier": "UA", "origin": None, "tail": "x"},
        {"a": 40, "b": 2, "c": 3, "carrier": "??", "origin": "JFK", "tail": None}]
print(repr(model.predict_proba(rows).tolist()), model.predict(rows).tolist(), model.classes_.tolist(), list(model.feature_names_in_))
assert (again.predict_proba(rows) == model.predict_proba(rows)).all()
assert "dlopt" not in sys.modules and "torch" not in sys.modules
"""


@pytest.mark.parametrize("part", [Pickle(), Joblib()], ids=lambda part: part.kind)
def test_an_estimator_loads_with_numpy_and_onnxruntime_alone(tmp_path: Path, part: Any) -> None:
    package("joblib", "sklearn")
    data = sets.prepared(tmp_path, TABLE)
    weights = sets.trained(tmp_path, data, Mlp(hidden=(8,)))
    export = once(EXPORT, part, tmp_path, weights, data)
    done = subprocess.run([sys.executable, "-c", BARE, str(export.path / part.file)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [
        {"a": 1.5, "b": None, "c": "7", "carrier": "UA", "origin": None, "tail": "x"},
        {"a": 40, "b": 2, "c": 3, "carrier": "??", "origin": "JFK", "tail": None},
    ]
    from dlopt.api.predict import Model

    expected = Model(once(EXPORT, Onnx(), tmp_path, weights, data).read(Onnx.file), TABLE).outputs(rows)
    printed, _, rest = done.stdout.partition("]] ")
    np.testing.assert_allclose(json.loads(f"{printed}]]"), expected, atol=1e-6)
    named = [["no", "yes"][place] for place in expected.argmax(axis=1)]
    assert rest.strip() == f"{named} ['no', 'yes'] ['a', 'b', 'c', 'carrier', 'origin', 'tail']"


class Touching:
    """What it would do when it is unpickled can be seen."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize("part", [Pickle(), Joblib()], ids=lambda part: part.kind)
def test_a_file_that_was_tampered_with_is_refused_before_anything_is_executed(tmp_path: Path, part: Any) -> None:
    package("joblib", "sklearn")
    data = sets.prepared(tmp_path, TABLE)
    export = once(EXPORT, part, tmp_path, sets.trained(tmp_path, data, Mlp(hidden=(8,))), data)
    copied(export, part, tmp_path / f"mine{Path(part.file).suffix}")
    file, touched = tmp_path / f"mine{Path(part.file).suffix}", tmp_path / "touched"
    assert load_estimator(file).predict_proba([dict.fromkeys("abc", 1.0) | dict.fromkeys(("carrier", "origin", "tail"), "x")]).shape == (
        1,
        2,
    )
    assert load_estimator(file, sha256=export.info["sha256"])
    file.write_bytes(part.dump(Touching(str(touched))))
    for given in ({}, {"sha256": export.info["sha256"]}):
        with pytest.raises(DloptError, match=r"its content is not what .* says, so nothing of it was executed: get the file anew$"):
            load_estimator(file, **given)
    assert not touched.exists()
    part.unpickle(file.read_bytes())
    assert touched.exists()  # it would have been
    file.with_name(f"{file.name}.sha256").unlink()
    with pytest.raises(DloptError, match=r"cannot be checked: .*: give its sha256, or put mine\.\w+\.sha256 beside it$"):
        load_estimator(file)


def test_estimators_make_the_tensors_that_the_server_makes() -> None:
    package("tokenizers", "text")
    from dlopt.data.kinds import TextInput
    from dlopt.data.kinds.tokenizer import train_tokenizer, vocabulary_size

    written = train_tokenizer(["the cat sat", "a cat", "the Dog sat ünder"] * 3, TextInput(column="title"))
    text = TEXT.model_copy(update={"tokenizer": written, "tokens": vocabulary_size(written)})
    numbers = NUMBERS.model_copy(update={"markers": ("?",)})
    dates = DATES.model_copy(
        update={
            "parts": ("year", "quarter", "month", "week", "day", "day_of_year", "weekday", "hour", "minute", "second", "days"),
            "shape": (11,),
        }
    )
    typed = CATEGORIES.model_copy(update={"types": ("string", "number")})
    vector = Feature(name="v", kind="vector", dtype="float32", shape=(3,), columns=("v",))
    rows = [
        {"a": 1, "b": None, "c": "2.5", "carrier": "UA", "origin": 7.0, "tail": True, "flight": "AA1", "day": "2024-02-29T13:05:09Z",
         "title": "The cat  unknown", "image": np.arange(60).reshape(4, 5, 3).tolist(), "v": [1, 2, 3.5]},
        {"a": -1e3, "b": "?", "c": True, "carrier": None, "origin": "7", "tail": "x", "flight": None, "day": None,
         "title": None, "image": np.full((4, 5, 3), 255).tolist(), "v": None},
        {"a": "3", "b": 0, "c": 1e-3, "carrier": "", "origin": "JFK", "tail": 3, "flight": 12, "day": "1969-12-31",
         "title": "dog cat " * 20, "image": np.zeros((4, 5, 3), int).tolist(), "v": [0.5, -1, 2]},
    ]  # fmt: skip
    found = Signature(inputs=(numbers, typed, ONE, HASHED, dates, text, *EVERYTHING[6:], vector), target=NUMBER)
    expected = encode_rows(found, rows)
    made = Regressor(b"", found.model_dump_json())
    columns = made._columns(rows)
    for feature in made.inputs_:
        tensor = ENCODERS[feature["kind"]](feature, columns)
        assert tensor.dtype == expected[feature["name"]].dtype, feature["name"]
        np.testing.assert_array_equal(tensor, expected[feature["name"]], err_msg=feature["name"])


def test_estimators_take_frames_arrays_and_dicts_of_columns(tmp_path: Path) -> None:
    pandas, polars = package("pandas", "tables"), package("polars", "bench")
    data = sets.prepared(tmp_path, Signature(inputs=(NUMBERS,), target=LABELS))
    made = load_estimator(once(EXPORT, Pickle(), tmp_path, sets.trained(tmp_path, data, Mlp(hidden=(8,))), data).path / Pickle.file)
    values = np.array([[1.0, np.nan, 3.0], [40.0, 50.0, 60.0]])
    columns = dict(zip("abc", values.T, strict=True))
    expected = made.predict_proba(values)
    assert expected.shape == (2, 4) and made.predict(values).tolist() == (expected > 0.5).astype(int).tolist()
    for given in (
        pandas.DataFrame(columns),
        polars.DataFrame(columns),
        columns,
        values.tolist(),
        pandas.DataFrame(columns)[["c", "b", "a"]],
    ):
        np.testing.assert_array_equal(made.predict_proba(given), expected)
    for given, said in [
        ({"a": [1], "b": [2]}, "there is no column 'c': the model takes a, b, c"),
        (np.zeros((2, 2)), "an array of shape (2, 2), where (rows, 3) is needed: a, b, c"),
        ([{"a": 1, "b": 2, "c": "x"}], "row 0: c: 'x' is not a number"),
        ([{"a": 1, "b": 2}], "row 0: has no column 'c'"),
        ([{"a": 1, "b": 2, "c": 1e39}], "row 0: c: a number is too large"),
    ]:
        with pytest.raises(ValueError) as error:
            made.predict(given)
        assert str(error.value) == said


def test_scores_and_thresholds_are_as_scikit_learn_has_them(tmp_path: Path) -> None:
    from sklearn.metrics import accuracy_score, r2_score

    for target, kind in ((TWO.model_copy(update={"thresholds": (0.45,)}), Classifier), (PAIR, Regressor)):
        found = Signature(inputs=(NUMBERS,), target=target)
        data = sets.prepared(tmp_path, found)
        made = load_estimator(once(EXPORT, Pickle(), tmp_path, sets.trained(tmp_path, data, Mlp(hidden=(8,))), data).path / Pickle.file)
        assert type(made).__name__ == kind.__name__
        values = inputs_of(found, 40, seed=5)["numbers"]
        if kind is Regressor:
            real = np.random.default_rng(0).normal(1000, 30, (40, 2))
            assert made.score(values, real) == pytest.approx(r2_score(real, made.predict(values)))
            continue
        wanted = np.where(made.predict_proba(values)[:, 1] >= np.float32(0.45), "yes", "no")
        assert made.predict(values).tolist() == wanted.tolist()
        assert made.score(values, ["no"] * 40) == accuracy_score(["no"] * 40, wanted)


def test_the_source_of_an_estimator_is_whole_and_names_no_dlopt() -> None:
    space: dict[str, Any] = {"__name__": "estimator", "SOURCE": ""}
    exec(compile(source(), "estimator", "exec"), space)
    assert {"Classifier", "Regressor", "as_text"} <= set(space)
    assert "import dlopt" not in source() and "from dlopt" not in source()


@pytest.mark.parametrize(("part", "form"), [(TorchScript(), "TorchScript"), (Onnx(), "ONNX")])
def test_what_a_format_cannot_say_names_operator_and_layer(tmp_path: Path, part: Any, form: str) -> None:
    data = sets.prepared(tmp_path, sets.signature(sets.NUMBERS))
    model = sets.trained(tmp_path, data, custom(Unwritable))
    if form == "TorchScript":  # which has words for all of torch's
        assert once(EXPORT, part, tmp_path, model, data).info["largest_difference"] <= 1e-5
        return
    with pytest.raises(DloptError, match=rf"^export: the model cannot be written as {form}: \w+: .*i1e.* \(layer body") as error:
        once(EXPORT, part, tmp_path, model, data)
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    data = sets.prepared(tmp_path, IMAGES)
    model = sets.trained(tmp_path, data, Mlp(hidden=(8,)))
    real = Safetensors.write

    def full(self: Any, trained: Any, out: Path) -> Any:
        real(self, trained, out)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Safetensors, "write", full)
    with pytest.raises(OSError, match="No space left"):
        once(EXPORT, Safetensors(), tmp_path, model, data)
    assert list((tmp_path / "export").glob("*/*")) == []


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("onx", {}, "export: no kind 'onx'; did you mean 'onnx'?"),
        ("onnx", {"precison": "float16"}, "export.precison: unknown key; did you mean 'precision'?"),
        ("onnx", {"precision": "int8"}, 'export.precision: must be float32, float16 or bfloat16, not "int8"'),
    ],
)
def test_a_format_that_is_none_is_one_line(kind: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(DloptError) as error:
        format_of(kind, fields)
    assert str(error.value) == said


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(DloptError, match=r"^export: joblib: needs the package joblib: pip install 'dlopt\[sklearn\]'$"):
        Joblib().check()


def test_files_are_copied_whole_under_the_name_that_was_asked_for(tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, IMAGES)
    model = sets.trained(tmp_path, data, Mlp(hidden=(8,)))
    one, many = (once(EXPORT, part, tmp_path, model, data) for part in (Pickle(), Safetensors()))
    (tmp_path / "hub").mkdir()
    assert copied(many, Safetensors(), tmp_path / "hub") == tmp_path / "hub" / "model.safetensors"
    assert sorted(file.name for file in (tmp_path / "hub").iterdir()) == ["config.json", "model.safetensors", "signature.json"]
    assert copied(one, Pickle(), tmp_path / "digits.pkl").read_bytes() == one.read(Pickle.file)
    assert (tmp_path / "digits.pkl.sha256").is_file()
    with pytest.raises(DloptError, match=r"safetensors is several files \(model.safetensors, config.json\): give a folder that is there$"):
        copied(many, Safetensors(), tmp_path / "weights.safetensors")


def test_metrics_that_are_others_are_named() -> None:
    assert list(differing({"loss": 0.5, "accuracy": 0.9}, {"loss": 0.5 + 1e-8, "accuracy": 0.9})) == []
    assert list(differing({"loss": 0.5, "roc_auc": None}, {"loss": 0.6, "roc_auc": 1.0})) == [
        "loss is 0.6, and was 0.5",
        "roc_auc is 1.0, and was None",
    ]
