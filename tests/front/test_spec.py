"""Job files: what loads, and the one line that every mistake gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlopt import spec
from dlopt.docstrings import json_schema
from dlopt.models import Model
from dlopt.models.layers import ACTIVATIONS
from dlopt.optim.optimizers import Adam, Optimizer, Sgd
from dlopt.part import DloptError, Part, Signature, Statistics
from dlopt.spec import Job
from dlopt.train.job import EarlyStopping, Train
from tests.front.test_readme import kinds

JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))
JOB = """
name: digits
data:
  source: {kind: sample, name: mnist}
  clean: [{kind: drop_duplicates}]
  inputs:
    - {kind: image, column: image}
  target: {kind: category, column: label}
augment:
  - {kind: random_crop, padding: 1}
  - {kind: random_rotation, degrees: 8}
model: {kind: mlp, hidden: [32]}
train:
  epochs: 3
  batch_size: 32
  optimizer: {kind: adam, lr: 3e-4}
  schedule: {kind: cosine}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def mistake(path: Path, *overrides: str) -> str:
    """The line that a job gets, without the file's name in front."""
    with pytest.raises(DloptError) as caught:
        spec.load(path, overrides)
    line = str(caught.value)
    assert "\n" not in line and "pydantic" not in line and "Input" not in line
    return line.removeprefix(f"{path}: ")


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_every_job_that_we_ship_loads_and_is_the_same_when_it_is_written_out(job: Path, tmp_path: Path) -> None:
    found = spec.load(job)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(found.model_dump(mode="json"), sort_keys=False))
    assert spec.load(tmp_path / "again.yaml") == found


def test_a_job_is_what_its_file_says_and_the_rest_are_defaults(path: Path) -> None:
    job = spec.load(path)
    assert (job.name, job.seed, job.model.kind, job.train.epochs) == ("digits", 0, "mlp", 3)
    assert job.train.optimizer == Adam(lr=3e-4)  # which YAML reads as text
    assert job.resources.workers == "auto"
    assert [part.kind for part in job.export] == ["onnx"]
    assert job.fit.model_dump() == {
        "seed": 0,
        "model": job.model.model_dump(),
        "augment": tuple(part.model_dump() for part in job.augment),
        "train": job.train.model_dump(),
    }


def test_a_job_cannot_be_changed(path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        spec.load(path).train.epochs = 4  # type: ignore[misc]


def either(union: Any) -> str:
    """All kinds of a union, as a sentence has them."""
    *most, last = kinds(union)
    return f"{', '.join(most)} or {last}"


# Overrides


def test_overrides_set_values_at_dotted_paths(path: Path) -> None:
    job = spec.load(
        path,
        [
            "train.optimizer.lr=1e-2",
            "train.optimizer.betas=[0.8, 0.9]",
            "model.hidden.0=64",
            "augment.1.degrees=20",
            "resources.workers=2",
            "train.early_stopping.patience=5",
            "train.clip=null",
            "seed=9",
        ],
    )
    assert job.train.optimizer == Adam(lr=1e-2, betas=(0.8, 0.9))
    assert job.model.hidden == (64,)  # type: ignore[union-attr]
    assert [part.model_dump(exclude={"kind", "fill"}) for part in job.augment] == [{"padding": 1}, {"degrees": 20}]
    assert (job.resources.workers, job.train.early_stopping, job.seed) == (2, EarlyStopping(patience=5), 9)


def test_later_overrides_win_and_whole_sections_can_be_given(path: Path) -> None:
    job = spec.load(path, ["train.epochs=5", "train.epochs=7", "train.optimizer={kind: sgd, momentum: 0.9}", "augment=[]"])
    assert (job.train.epochs, job.train.optimizer, job.augment) == (7, Sgd(momentum=0.9), ())


def test_an_override_begins_a_section_that_is_empty_or_not_there(path: Path) -> None:
    path.write_text(JOB.partition("train:")[0] + "train:\nserve:\n")
    job = spec.load(path, ["train.epochs=2", "serve.replicas.max=3", "resources.feed=stream"])
    assert (job.train.epochs, job.serve.most_replicas, job.resources.feed) == (2, 3, "stream")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.epochs", "'train.epochs': an override is written a.b=value"),
        ("=3", "'=3': an override is written a.b=value"),
        ("train..epochs=3", "'train..epochs=3': an override is written a.b=value"),
        ("train.epochs.=3", "'train.epochs.=3': an override is written a.b=value"),
        ("train.epochs=[", "'train.epochs=[': '[' is not a YAML value"),
        ("train.epochs.x=3", "'train.epochs.x=3': epochs is a value, there is nothing below it"),
        ("augment.2.padding=3", "'augment.2.padding=3': 2 is not a place in a list of 2"),
        ("augment.first.padding=3", "'augment.first.padding=3': first is not a place in a list of 2"),
        ("model.hidden.5=3", "'model.hidden.5=3': 5 is not a place in a list of 1"),
    ],
)
def test_a_bad_override_is_one_line(path: Path, override: str, line: str) -> None:
    assert mistake(path, override) == line


# Mistakes


@pytest.mark.parametrize(
    ("override", "line"),
    [
        # keys
        ("trian.epochs=3", "trian: unknown key; did you mean 'train'?"),
        ("zzz=3", "zzz: unknown key; there are augment, compress, data, export, license, model, name, resources, seed, serve, train"),
        ("train.optimizer.lrr=3", "train.optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("train.optimizer.nesterov=true", "train.optimizer.nesterov: unknown key; there are amsgrad, betas, eps, kind, lr, weight_decay"),
        ("augment.0.paddin=3", "augment.0.paddin: unknown key; did you mean 'padding'?"),
        ("data.inputs.0.normalise=none", "data.inputs.0.normalise: unknown key; did you mean 'normalize'?"),
        ("data.source.nmae=mnist", "data.source.nmae: unknown key; did you mean 'name'?"),
        ("serve.replicas={mn: 1}", "serve.replicas.mn: unknown key; did you mean 'min'?"),
        ("train.early_stopping={patienec: 1}", "train.early_stopping.patienec: unknown key; did you mean 'patience'?"),
        ("data={source: {kind: sample}, inputs: [{kind: image}]}", "data.target: is missing"),
        ("1=2", "1: unknown key; there are augment, compress, data, export, license, model, name, resources, seed, serve, train"),
        # kinds
        ("model.kind=mpl", "model: no kind 'mpl'; did you mean 'mlp'?"),
        ("model={hidden: [3]}", "model: needs a kind: " + either(Model)),
        ("train.optimizer={lr: 1}", "train.optimizer: needs a kind: " + either(Optimizer)),
        ("train.optimizer=adam", 'train.optimizer: must be a mapping such as {kind: sgd}, not "adam"'),
        ("augment.0.kind=crop", "augment.0: no kind 'crop'; did you mean 'random_crop'?"),
        ("data.split={}", "data.split: needs a kind: random, stratified, group, time or given"),
        (
            "augment=[{kind: random_crop, fill: 9}, {kind: random_rotation}]",
            "augment: parts that move images are one resampling: give all the same fill, not 9 in random_crop, 0 in random_rotation",
        ),
        ("export.0.kind=onnx", "export: must be a list, not a mapping"),
        ("export=[{kind: onx}]", "export.0: no kind 'onx'; did you mean 'onnx'?"),
        # types
        ("train.epochs=many", 'train.epochs: must be a whole number, not "many"'),
        ("train.epochs=2.5", "train.epochs: must be a whole number, not 2.5"),
        ("train.epochs=yes", 'train.epochs: must be a whole number, not "true"'),
        ("train.optimizer.lr=on", 'train.optimizer.lr: must be a number or auto, not "true"'),
        ("train.optimizer.lr=null", "train.optimizer.lr: must be a number or auto, not null"),
        ("train.optimizer.lr={a: 1}", "train.optimizer.lr: must be a number or auto, not a mapping"),
        ("train.optimizer={kind: sgd, nesterov: 7}", "train.optimizer.nesterov: must be true or false, not 7"),
        ("train=fast", 'train: must be a mapping, not "fast"'),
        ("train=", "train: must be a mapping, not null"),
        ("augment={kind: random_crop}", "augment: must be a list, not a mapping"),
        ("model.hidden=128", "model.hidden: must be a list, not 128"),
        ("model.hidden=[32, x]", 'model.hidden.1: must be a whole number, not "x"'),
        ("name=5", "name: must be a text, not 5"),
        # values
        ("name=a/b", "name: must match pattern '^[A-Za-z0-9][A-Za-z0-9_.-]*$', not \"a/b\""),
        (
            "model.activation=rleu",
            f"model.activation: must be one of {len(ACTIVATIONS)} names, not \"rleu\"; did you mean 'relu'?",
        ),
        (
            "train.monitor=mae",
            "train.monitor: there is no mae for a target of kind category: use one of loss, accuracy, macro_f1, macro_precision, "
            "macro_recall, calibration_error, precision, recall, f1, roc_auc, average_precision, macro_roc_auc, macro_average_precision, "
            "top5_accuracy",
        ),
        (
            "train.loss.kind=huber",
            "train.loss: huber is for a target of kind number, and it is of kind category: use one of cross_entropy, focal, or take it out",
        ),
        ("train.loss=focal", 'train.loss: must be a mapping such as {kind: cross_entropy}, not "focal"'),
        ("train.threshold=1.5", "train.threshold: must be less than 1, not 1.5"),
        ("train.threshold=tuned", 'train.threshold: must be a number or a mapping such as {kind: tuned}, not "tuned"'),
        ("train.folds=1", "train: folds must be 2 or more, or 0 for none"),
        ("train.epochs=0", "train.epochs: must be greater than or equal to 1, not 0"),
        ("train.optimizer.lr=-1", "train.optimizer.lr: must be greater than 0, not -1"),
        ("train.optimizer.lr=.nan", "train.optimizer.lr: must be a finite number, not NaN"),
        ("train.optimizer.lr=.inf", "train.optimizer.lr: must be a finite number, not Infinity"),
        ("train.optimizer.betas=[0.9]", "train.optimizer.betas.1: is missing"),
        ("model.hidden=[0]", "model.hidden.0: must be greater than or equal to 1, not 0"),
        ("data.inputs=[]", "data.inputs: must have at least 1 item, not 0"),
        ("seed=-1", "seed: must be greater than or equal to 0, not -1"),
        ("seed=9223372036854775808", "seed: must be less than 9223372036854775808, not 9223372036854775808"),
        # unions
        ("resources.workers=-1", "resources: workers must be 0 to 64, or [min, max] with 1 <= min <= max <= 64, or auto"),
        ("resources.workers=[3, 1]", "resources: workers must be 0 to 64, or [min, max] with 1 <= min <= max <= 64, or auto"),
        ("resources.workers=[0, 1]", "resources: workers must be 0 to 64, or [min, max] with 1 <= min <= max <= 64, or auto"),
        ("resources.workers=65", "resources: workers must be 0 to 64, or [min, max] with 1 <= min <= max <= 64, or auto"),
        ("resources.workers=all", 'resources.workers: must be auto, a whole number or a list, not "all"'),
        ("resources.workers=1.5", "resources.workers: must be auto, a whole number or a list, not 1.5"),
        ("resources.workers=true", 'resources.workers: must be auto, a whole number or a list, not "true"'),
        ("resources.workers={min: 1}", "resources.workers: must be auto, a whole number or a list, not a mapping"),
        ("resources.workers=[1, 2, 3]", "resources.workers: must have at most 2 items, not 3"),
        ("resources.workers=[1, x]", 'resources.workers.1: must be a whole number, not "x"'),
        ("serve.replicas=few", 'serve.replicas: must be a whole number or a mapping, not "few"'),
        ("serve.replicas=0", "serve.replicas: must be greater than or equal to 1, not 0"),
        ("serve.replicas={min: 0}", "serve.replicas.min: must be greater than or equal to 1, not 0"),
        # what does not go together
        ("train.optimizer={kind: sgd, nesterov: true}", "train.optimizer: nesterov needs momentum above 0: set momentum, 0.9 say"),
        (
            "train.schedule.warmup=4",
            "train: schedule.warmup: 4 epochs are more than epochs 3: lower it or raise epochs",
        ),
        ("data.split={kind: random, train: 0.5}", "data.split: train, validation and test sum to 0.7: make them sum to 1"),
        (
            "data.test={kind: parquet, path: x}",
            "data: split.test is 0.1 but data.test names a source: set split.test to 0 and raise split.train",
        ),
        (
            "data.inputs.0.column=probabilities",
            "data.inputs: 'probabilities' is the name of the model's output: call the input something else",
        ),
        ("data.inputs=[{kind: number, columns: [a]}]", "augment.0: there is no image among data.inputs for random_crop"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(path: Path, override: str, line: str) -> None:
    assert mistake(path, override) == line


def test_mistakes_between_sections_say_what_to_do(path: Path) -> None:
    no_validation = "data.split={kind: random, train: 0.9, validation: 0}"
    expected = "train.early_stopping looks at the validation split: give data.split.validation a share"
    assert mistake(path, no_validation, "train.early_stopping={}") == expected
    expected = "train.schedule looks at the validation split: give data.split.validation a share"
    assert mistake(path, no_validation, "train.schedule={kind: plateau}") == expected
    expected = "train.batch_size 4 is less than 8 workers: lower workers or raise batch_size"
    assert mistake(path, "train.batch_size=4", "resources.workers=8") == expected
    assert mistake(path, "train.batch_size=4", "resources.workers=[1, 8]") == expected


def test_each_of_several_mistakes_has_its_line_the_misspelt_key_first_and_not_missing_as_well(path: Path) -> None:
    path.write_text(JOB.replace("model:", "modle:").replace("epochs: 3", "epochs: x"))
    with pytest.raises(DloptError) as error:
        spec.load(path)
    assert str(error.value).splitlines() == [
        f"{path}: modle: unknown key; did you mean 'model'?",
        f'{path}: train.epochs: must be a whole number, not "x"',
    ]


def test_a_copy_and_a_constructor_are_checked_as_a_file_is() -> None:
    """pydantic's own model_copy takes anything; a part that is made of keywords said what pydantic says."""
    train = Train(epochs=3)
    with pytest.raises(DloptError, match=r'^Train: epochs: must be a whole number, not "x"$'):
        train.model_copy(update={"epochs": "x"})
    with pytest.raises(DloptError, match=r"^Train: epoch: unknown key; did you mean 'epochs'\?$"):
        Train(epoch=3)
    copied = train.model_copy(update={"batch_size": 7})
    assert (copied.epochs, copied.batch_size) == (3, 7) and copied.model_dump(exclude_unset=True) == {"epochs": 3, "batch_size": 7}


def test_a_source_that_lies_beside_the_job_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "rows.csv").write_text("image,label\n")
    (tmp_path / "jobs" / "job.yaml").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DloptError) as error:
        spec.load(Path("jobs/job.yaml"), ["data.source={kind: csv, path: rows.csv}"])
    assert str(error.value) == (
        f"jobs/job.yaml: data.source.path: there is no rows.csv in {tmp_path}, from where relative paths go, but there is one beside "
        "the job: write jobs/rows.csv, or cd jobs first"
    )
    assert spec.load(Path("jobs/job.yaml"), ["data.source={kind: csv, path: jobs/rows.csv}"]).data.source.kind == "csv"


# Files


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: [a\ndata: 3\n", " line 2, column 5: not YAML: expected ',' or ']', but got ':'"),
        ("name: a\n  data: 3\n", " line 2, column 7: not YAML: mapping values are not allowed here"),
        ("name: a\n\tdata: 3\n", " line 2, column 1: not YAML: found character '\\t' that cannot start any token"),
        ("name: a\nseed: 1\nname: b\n", " line 3, column 1: not YAML: the key 'name' is given twice"),
        ("train:\n  epochs: 1\n  epochs: 2\n", " line 3, column 3: not YAML: the key 'epochs' is given twice"),
        ("? [a]\n: b\n", " line 1, column 3: not YAML: found unhashable key"),
        (
            "name: !!python/object:os.system x\n",
            " line 1, column 7: not YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system'",
        ),
        ("name: 2026-13-45\n", " not YAML: month must be in 1..12"),
        ("name: \0\n", ' not YAML: unacceptable character #x0000: special characters are not allowed in "JOB", position 6'),
        ("", " is not a job: it must be a mapping with name, data and model"),
        ("- name: a\n", " is not a job: it must be a mapping with name, data and model"),
        ("just words\n", " is not a job: it must be a mapping with name, data and model"),
    ],
)
def test_a_file_that_is_no_job_is_one_line_with_its_place(path: Path, text: str, line: str) -> None:
    path.write_text(text)
    with pytest.raises(DloptError) as caught:
        spec.load(path)
    assert str(caught.value) == f"{path}:{line}".replace("JOB", "<byte string>")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    assert mistake(tmp_path / "none.yaml") == "no such job file"
    assert mistake(tmp_path) == "cannot be read: Is a directory"
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\xfe\n")
    assert mistake(tmp_path / "bytes.yaml").startswith("not YAML: ")


def test_a_key_that_is_a_number_is_unknown_as_any_other(path: Path) -> None:
    path.write_text(JOB + "1: x\n")
    assert mistake(path).startswith("1: ")


# The schema


@pytest.mark.parametrize("part", [Job, Signature, Statistics], ids=lambda part: part.__name__)
def test_every_field_says_what_it_is_and_unknown_keys_are_refused(part: type[Part]) -> None:
    schema: dict[str, Any] = json_schema(part)
    known = {name: found for name, found in schema.get("$defs", {}).items() if found}  # settings of one's own model are any JSON
    for name, found in {**known, part.__name__: schema}.items():
        found = next((one for one in found.get("anyOf", ()) if "properties" in one), found)  # of a duration, which may be a number
        assert found["additionalProperties"] is False and found["description"], name
        silent = [field for field, about in found["properties"].items() if "description" not in about and "const" not in about]
        assert silent == [], name


def test_a_description_is_the_docstring_of_its_field() -> None:
    assert json_schema(Job)["$defs"]["AdamW"]["properties"]["lr"]["description"] == "Peak learning rate."


@pytest.mark.parametrize(
    "made", [lambda: Adam.model_validate({"lr": "x"}), lambda: Adam.model_validate_json('{"lr": "x"}'), lambda: Adam(lr="x")]
)
def test_a_part_from_a_program_is_refused_in_our_own_line(made: Callable[[], Part]) -> None:
    with pytest.raises(DloptError) as caught:
        made()
    assert str(caught.value) == 'Adam: lr: must be a number or auto, not "x"'
