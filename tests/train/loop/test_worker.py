"""One worker from start to end, without Ray: what is kept, when it ends, how it goes on, and the drift check between two."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load as load_tensors
from torch import nn

from dlopt.artifact import Artifact, Stage, once
from dlopt.data.prepared import Split, as_table, write_part
from dlopt.models import Mlp
from dlopt.optim.constraints import ClipNorm
from dlopt.optim.optimizers import Adam, Sgd
from dlopt.optim.schedules import Cosine, Plateau
from dlopt.part import DloptError, Part, Signature, Target
from dlopt.train import worker
from dlopt.train.checkpoint.stores import CHECKPOINTS, RECORD
from dlopt.train.job import EarlyStopping, Fit, Resources, Train
from dlopt.train.measure.evaluate import evaluate
from dlopt.train.measure.metric import names
from dlopt.train.parallel.drift import refuse_drift
from dlopt.train.start import load_network
from dlopt.train.training import Training
from dlopt.train.watch import metrics_log
from dlopt.train.worker import Assignment, Worker
from tests import sets
from tests.models.test_models import numbers, statistics
from tests.processes import together

SIGNATURE = Signature(inputs=(numbers("a", "b", "c", "d"),), target=Target(name="label", labels=("no", "yes")))
CPU = torch.device("cpu")


class Rows(Part):
    """How many rows each split has, and how much the label has to do with them."""

    train: int = 300
    validation: int = 100
    test: int = 50
    signal: float = 1.0
    """0: labels are chance, and whoever learns them overfits."""


def write(section: Rows, out: Path) -> dict[str, Any]:
    generator = np.random.default_rng(5)
    for name in ("train", "validation", "test"):
        rows = getattr(section, name)
        values = generator.normal(size=(rows, 4)).astype(np.float32)
        score = section.signal * values.sum(axis=1) + (1 - section.signal) * generator.normal(size=rows)
        table = as_table(SIGNATURE, {"numbers": values, "label": (score > 0).astype(np.int64)})
        if rows:
            write_part(table, SIGNATURE, out / name / "part-00000.parquet")
    found = statistics([0.0] * 4, [0.0] * 4, [1.0] * 4)
    (out / "statistics.json").write_text(json.dumps({"numbers": found.model_dump()}))
    (out / "signature.json").write_text(SIGNATURE.model_dump_json())
    return {}


def prepared(home: Path, **rows: Any) -> Artifact:
    return once(Stage("data", write), Rows(**rows), home)


def section(**train: Any) -> Fit:
    settings: dict[str, Any] = {"epochs": 4, "batch_size": 32, "optimizer": Adam(lr=1e-2), "log_every": 1} | train
    return Fit(seed=1, model=Mlp(hidden=(16,), dropout=0.2), augment=(), train=Train(**settings))


def work(fit: Fit, data: Artifact, out: Path, **resources: Any) -> dict[str, Any]:
    """The info of the model that one worker makes in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    assignment = Assignment(fit=fit, resources=Resources(**resources), data=data.path, out=out, feed="resident")
    info = Worker(assignment, 0, 1, CPU).run()
    assert info is not None
    return info


def epochs(out: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_log.read(out / metrics_log.NAME) if "train" in line]


def without_seconds(out: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in metrics_log.read(out / metrics_log.NAME)]


def test_what_is_learned_is_measured_and_logged(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    info = work(section(), data, tmp_path / "out")
    assert info["metrics"]["test"]["accuracy"] > 0.9
    assert (info["epochs"], info["steps"], info["stopped"], info["restarts"]) == (4, 40, "finished", 0)
    lines = list(metrics_log.read(tmp_path / "out" / metrics_log.NAME))
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 41))
    assert [line["rows"] for line in steps[8:12]] == [288, 300, 332, 364]  # the last batch of an epoch is smaller
    assert sum(line["loss"] for line in steps[30:]) < 0.5 * sum(line["loss"] for line in steps[:10])


def test_the_epoch_line_weighs_every_row_alike(tmp_path: Path) -> None:
    """300 rows in batches of 299: the mean over steps would count the last row as much as all others."""
    work(section(epochs=1, batch_size=299, optimizer=Sgd(lr=1e-12)), prepared(tmp_path), tmp_path / "out")
    first, second = [line["loss"] for line in metrics_log.read(tmp_path / "out" / metrics_log.NAME) if "loss" in line]
    (line,) = epochs(tmp_path / "out")
    assert line["train"]["loss"] == pytest.approx((299 * first + second) / 300, rel=1e-6)


@pytest.mark.parametrize("monitor", ["loss", "accuracy", "roc_auc", "f1"])
def test_the_weights_of_the_best_epoch_are_kept(monitor: str, tmp_path: Path) -> None:
    data = prepared(tmp_path, signal=0.3, train=60)
    info = work(section(epochs=30, monitor=monitor, optimizer=Adam(lr=0.05)), data, tmp_path / "out")
    values = [line["validation"][monitor] for line in epochs(tmp_path / "out")]
    best = min(values) if monitor == "loss" else max(values)
    assert info["best_epoch"] == values.index(best) + 1  # the first of equals
    assert info["best_epoch"] < 30  # else the test shows nothing
    assert info["metrics"]["validation"][monitor] == pytest.approx(best, abs=1e-12)
    network = load_network(section(), data)
    network.load_state_dict(load_tensors((tmp_path / "out" / "weights.safetensors").read_bytes()))
    assert evaluate(network, Split.open(data, "validation"), CPU)[monitor] == pytest.approx(best, abs=1e-12)


TARGETS = [sets.TWO, sets.THREE, sets.LABELS, sets.NUMBER, sets.PAIR]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_kind_of_target_is_learned_from_every_kind_of_input_and_measured(target: Target, tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, sets.signature(sets.NUMBERS, sets.CATEGORIES, sets.HASHED, sets.TEXT, target=target), train=500)
    fit = section(epochs=20, precision="float64")
    info = work(fit.model_copy(update={"model": Mlp(hidden=(32,), dropout=0.0)}), data, tmp_path / "out")
    assert list(info["metrics"]) == ["train", "validation", "test"]
    assert all(set(found) == set(names(target.kind, target.size)) for found in info["metrics"].values())
    test = info["metrics"]["test"]
    assert test[names(target.kind)[1]] > {"category": 0.8, "multi_label": 0.8, "number": 0.7}[target.kind]
    assert pq.read_table(tmp_path / "out" / "predictions.parquet").num_rows == 80
    lines = epochs(tmp_path / "out")
    assert all(set(line["train"]) == ({"loss", "accuracy"} if target.kind == "category" else {"loss"}) for line in lines)
    assert all(set(line["validation"]) == set(test) for line in lines)
    assert lines[-1]["train"]["loss"] < 0.5 * lines[0]["train"]["loss"]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_the_train_loss_of_an_epoch_at_rest_is_that_of_the_split(target: Target, tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, sets.signature(sets.NUMBERS, sets.TEXT, target=target))
    fit = section(epochs=1, precision="float64", optimizer=Sgd(lr=1e-300), batch_size=77)
    info = work(fit.model_copy(update={"model": Mlp(dropout=0.0)}), data, tmp_path / "out")
    (line,) = epochs(tmp_path / "out")
    assert line["train"]["loss"] == pytest.approx(info["metrics"]["train"]["loss"], rel=1e-6)
    assert line["train"].get("accuracy", info["metrics"]["train"].get("accuracy")) == info["metrics"]["train"].get("accuracy")


@pytest.mark.parametrize(("monitor", "target"), [("mae", sets.NUMBER), ("r2", sets.NUMBER), ("macro_roc_auc", sets.LABELS)])
def test_what_decides_on_the_best_epoch_has_its_own_direction(monitor: str, target: Target, tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, sets.signature(sets.NUMBERS, target=target), noise=2.0, train=60)
    info = work(section(epochs=40, monitor=monitor, optimizer=Adam(lr=0.02)), data, tmp_path / "out")
    values = [line["validation"][monitor] for line in epochs(tmp_path / "out")]
    best = min(values) if monitor == "mae" else max(values)
    assert info["best_epoch"] == values.index(best) + 1
    assert 1 < info["best_epoch"] < 40
    assert info["metrics"]["validation"][monitor] == best


def test_a_validation_split_that_cannot_tell_what_decides_is_one_line(tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, sets.signature(sets.NUMBERS), rare=-100.0)
    assert data.info["labels"]["validation"] == {"no": 0, "yes": 100}
    with pytest.raises(DloptError, match=r"^train\.monitor: the validation split cannot tell roc_auc .*: use monitor: loss or give "):
        work(section(monitor="roc_auc"), data, tmp_path / "out")


def test_class_weights_raise_the_recall_of_a_rare_class_and_the_loss_stays_of_a_size(tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, sets.signature(sets.NUMBERS, sets.CATEGORIES), noise=1.0, rare=2.5, train=2000, test=2000)
    assert data.info["labels"]["train"]["yes"] < 300
    plain, weighted = work(section(), data, tmp_path / "plain"), work(section(class_weights="balanced"), data, tmp_path / "weighted")
    assert weighted["metrics"]["test"]["recall"] > plain["metrics"]["test"]["recall"] + 0.2
    by_hand = work(section(class_weights={"yes": 2000 / data.info["labels"]["train"]["yes"] - 1}), data, tmp_path / "by_hand")
    assert by_hand["metrics"]["test"] == pytest.approx(weighted["metrics"]["test"], rel=1e-9)
    first = [
        next(line["loss"] for line in metrics_log.read(tmp_path / name / metrics_log.NAME) if "loss" in line)
        for name in ("plain", "weighted")
    ]
    assert 0.3 < first[1] / first[0] < 3


def test_early_stopping_ends_training_after_so_many_epochs_without_improvement(tmp_path: Path) -> None:
    data = prepared(tmp_path, signal=0.0, train=60)
    info = work(section(epochs=200, early_stopping=EarlyStopping(patience=5), optimizer=Adam(lr=0.05)), data, tmp_path / "out")
    assert info["stopped"] == "early"
    assert info["epochs"] == info["best_epoch"] + 5 < 200


def test_the_best_epoch_is_kept_even_if_early_stopping_wants_more_than_that(tmp_path: Path) -> None:
    """A min_delta that nothing reaches: it stops after the patience, with the best weights of the epochs until then."""
    data = prepared(tmp_path)
    info = work(section(epochs=50, early_stopping=EarlyStopping(patience=3, min_delta=100)), data, tmp_path / "out")
    losses = [line["validation"]["loss"] for line in epochs(tmp_path / "out")]
    assert len(losses) == info["epochs"] == 4
    assert info["best_epoch"] == losses.index(min(losses)) + 1 > 1


def test_plateau_lowers_the_rate_when_the_validation_loss_stays(tmp_path: Path) -> None:
    data = prepared(tmp_path, signal=0.0, train=60)
    work(section(epochs=40, schedule=Plateau(decay=0.5, patience=1), optimizer=Adam(lr=0.05)), data, tmp_path / "out")
    losses = [line["validation"]["loss"] for line in epochs(tmp_path / "out")]
    used = {line["epoch"]: line["rate"] for line in metrics_log.read(tmp_path / "out" / metrics_log.NAME) if "rate" in line}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, threshold=1e-4, eps=0)
    for epoch, loss in enumerate(losses, start=1):
        assert used[epoch] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        reference.step(loss)
    assert used[40] < 0.05


def test_the_rate_follows_the_schedule_step_by_step(tmp_path: Path) -> None:
    work(section(optimizer=Adam(lr=2e-3), schedule=Cosine(warmup=1)), prepared(tmp_path), tmp_path / "out")
    used = [line["rate"] for line in metrics_log.read(tmp_path / "out" / metrics_log.NAME) if "rate" in line]
    warm = [2e-3 * step / 10 for step in range(10)]
    cosine = [1e-3 * (1 + math.cos(math.pi * step / 30)) for step in range(30)]
    assert used == pytest.approx(warm + cosine, abs=1e-15)


class Killed(BaseException):
    """Stands for the end of a process."""


@pytest.mark.parametrize("optimizer", [Adam(lr=1e-2), Sgd(lr=0.1, momentum=0.9, nesterov=True)])
def test_an_interrupted_worker_goes_on_as_if_nothing_had_happened(
    optimizer: Adam | Sgd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, fit = prepared(tmp_path), section(epochs=6, optimizer=optimizer, schedule=Plateau(patience=0))
    whole = work(fit, data, tmp_path / "whole")
    go_on = Training._between_steps

    def die(training: Training) -> None:
        if training.state.record.step == 35:  # within epoch 4
            assert training.diary
            training.diary.flush()
            raise Killed
        go_on(training)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Training, "_between_steps", die)
        work(fit, data, tmp_path / "out")
    assert max(line["step"] for line in metrics_log.read(tmp_path / "out" / metrics_log.NAME)) == 35
    again = work(fit, data, tmp_path / "out")
    assert (again["restarts"], whole["restarts"]) == (1, 0)
    assert without_seconds(tmp_path / "out") == without_seconds(tmp_path / "whole")
    assert (tmp_path / "out" / "weights.safetensors").read_bytes() == (tmp_path / "whole" / "weights.safetensors").read_bytes()
    assert again["metrics"] == whole["metrics"]


def test_a_damaged_checkpoint_is_passed_over_and_all_damaged_is_one_line(tmp_path: Path) -> None:
    data, out = prepared(tmp_path), tmp_path / "out"
    work(section(), data, out)
    kept = sorted(path.name for path in (out / CHECKPOINTS).iterdir() if path.is_dir())
    assert kept == ["000004-epoch-00003-batch-000000", "000005-epoch-00004-batch-000000"]
    weights = (out / "weights.safetensors").read_bytes()
    content = bytearray((out / CHECKPOINTS / kept[1] / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / CHECKPOINTS / kept[1] / "model.safetensors").write_bytes(content)
    work(section(), data, out)
    start = json.loads((out / "starts.jsonl").read_text().splitlines()[-1])
    assert start["epoch"] == 3
    assert f"{kept[1]}/model.safetensors" in start["damaged"][0]
    assert (out / "weights.safetensors").read_bytes() == weights
    for path in (out / CHECKPOINTS).iterdir():
        if path.is_dir():
            (path / RECORD).unlink()
    with pytest.raises(DloptError, match=r"none of its 2 checkpoints is whole .*/state\.json: .* --fresh"):
        work(section(), data, out)


def test_no_validation_split_keeps_the_last_epoch(tmp_path: Path) -> None:
    info = work(section(), prepared(tmp_path, validation=0), tmp_path / "out")
    assert info["best_epoch"] == 4
    assert set(info["metrics"]) == {"train", "test"}


def test_a_rate_that_makes_the_model_diverge_is_one_line_and_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DloptError, match=r"lower train\.optimizer\.lr"):
        work(section(optimizer=Sgd(lr=1e30)), prepared(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out" / "weights.safetensors").exists()


SHARED: list[tuple[str, Target, dict[str, Any]]] = [
    ("classes", sets.TWO, {"class_weights": "balanced", "monitor": "roc_auc", "l2": 0.01}),
    ("labels", sets.LABELS, {"class_weights": {"sea": 3.0}, "monitor": "macro_roc_auc"}),
    ("numbers", sets.PAIR, {"monitor": "mae", "clip": ClipNorm(limit=0.5)}),
]
"""Of what two workers train: an odd number of rows, which they cannot share out evenly."""


def _shared(home: Path, name: str, target: Target, train: dict[str, Any]) -> tuple[Fit, Artifact, Path]:
    data = sets.prepared(
        home, sets.signature(sets.NUMBERS, sets.CATEGORIES, sets.TEXT, target=target), rare=1.0, train=301, validation=1500
    )
    fit = section(epochs=3, precision="float64", **train)
    return fit, data, home / name


def _train(rank: int, world: int, home: Path) -> None:
    for name, target, train in SHARED:
        fit, data, out = _shared(Path(home), name, target, train)
        (out / "two").mkdir(parents=True, exist_ok=True)
        assignment = Assignment(fit=fit, resources=Resources(), data=data.path, out=out / "two", feed="resident", threads=1)
        info = Worker(assignment, rank, 2, CPU).run()
        if rank == 0:
            (out / "info.json").write_text(json.dumps(info))


@pytest.mark.slow
def test_two_workers_follow_the_curve_of_one_for_every_kind_of_target_with_class_weights(tmp_path: Path) -> None:
    alone = [work(fit, data, out / "one") for fit, data, out in (_shared(tmp_path, *given) for given in SHARED)]
    together(2, _train, tmp_path)
    for (name, _, _), info in zip(SHARED, alone, strict=True):
        one, two = (list(metrics_log.read(tmp_path / name / run / metrics_log.NAME)) for run in ("one", "two"))
        assert len(one) == len(two) == 33
        for line, other in zip(one, two, strict=True):
            for values, others in ((line, other), *((line[split], other[split]) for split in ("train", "validation") if split in line)):
                for key in values.keys() - {"seconds", "train", "validation"}:
                    assert others[key] == pytest.approx(values[key], rel=1e-9), (name, key, line)
        found = json.loads((tmp_path / name / "info.json").read_text())
        assert found["best_epoch"] == info["best_epoch"]
        assert found["metrics"]["test"] == pytest.approx(info["metrics"]["test"], rel=1e-9)


DRIFTS = {(0.0, False): "the same", (1e-7, False): "no longer identical", (0.0, True): "no longer identical"}
"""How much one number differs between two workers, whether numbers have changed places, and what is said of it."""


def _drift(rank: int, world: int, folder: Path) -> None:
    said = []
    for by, swapped in DRIFTS:
        network = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            network.weight.copy_(torch.arange(6.0).reshape(2, 3))
            network.weight[0, 1] += by * rank
            if swapped and rank:
                network.weight[0] = network.weight[0].flip(0)
        try:
            refuse_drift(network.state_dict())
            said.append("the same")
        except RuntimeError as error:
            said.append(str(error))
    Path(folder, f"said-{rank}").write_text("\n".join(said))


def test_workers_whose_parameters_differ_in_one_bit_or_in_place_are_stopped(tmp_path: Path) -> None:
    together(2, _drift, tmp_path)
    for rank in range(2):
        for line, said in zip((tmp_path / f"said-{rank}").read_text().splitlines(), DRIFTS.values(), strict=True):
            assert line.endswith(said)


def test_numbers_on_a_gpu_are_float32_and_the_same_each_time_unless_the_job_says_otherwise() -> None:
    backends = torch.backends
    before = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled()
    try:
        for tf32, deterministic in ((False, True), (True, False)):
            torch.use_deterministic_algorithms(False)
            worker._set_numerics(torch.device("cuda"), Resources(tf32=tf32, deterministic=deterministic))
            assert (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32) == (tf32, tf32)
            assert torch.are_deterministic_algorithms_enabled() == deterministic
    finally:
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = before[:2]
        torch.use_deterministic_algorithms(before[2])
