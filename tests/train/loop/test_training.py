"""What a job can ask of training, each seen in what comes of it: averages, accumulated and sharp gradients, full batches, groups, norms,
a rate found by trying, roll-backs, the same bits twice, and going on after a kill with all of it."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from dlopt.artifact import once
from dlopt.data.prepared import Split
from dlopt.models import Mlp, Model
from dlopt.optim.averages import Ema, Swa
from dlopt.optim.constraints import MaxNorm
from dlopt.optim.groups import Group, Parameters
from dlopt.optim.optimizers import Adam, Lbfgs, Optimizer, Sgd
from dlopt.optim.optimizers_library import ScheduleFreeAdamW
from dlopt.optim.schedules import ScaleLr, Span
from dlopt.optim.wrappers import Lookahead
from dlopt.part import DloptError
from dlopt.train import training
from dlopt.train.checkpoint.stores import CHECKPOINTS, Disk
from dlopt.train.checkpoint.writer import Writer
from dlopt.train.cluster.stopping import STOP, Stopped
from dlopt.train.job import Fit, Resources
from dlopt.train.loop.gradients import Sharpness
from dlopt.train.measure import averaged
from dlopt.train.measure.evaluate import evaluate
from dlopt.train.parallel.agreement import Agreement
from dlopt.train.stage import FIT
from dlopt.train.start import load_network
from dlopt.train.training import Training
from dlopt.train.watch import metrics_log
from dlopt.train.watch.divergence import Divergence
from dlopt.train.watch.layers import Health
from dlopt.train.watch.metrics_log import HEALTH, LAYERS, RANGE
from dlopt.train.watch.watchdog import HUNG
from dlopt.train.worker import STARTS, Assignment, Worker
from tests import sets
from tests.cases import crossed, few
from tests.front.test_readme import kinds
from tests.processes import run, together
from tests.train.loop.test_worker import CPU, epochs, prepared, section, without_seconds, work


def weights(out: Path) -> dict[str, Tensor]:
    return load_tensors((out / "weights.safetensors").read_bytes())


def bits(out: Path) -> bytes:
    return (out / "weights.safetensors").read_bytes()


def rollbacks(out: Path) -> list[dict[str, Any]]:
    return [line for line in metrics_log.read(out / HEALTH) if "rollback" in line]


def numbers(value: Any) -> Iterator[float]:
    """Every number in something of JSON."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)


def assert_checkpoints_are_finite(out: Path) -> None:
    files = list(out.glob("checkpoints/*/*.safetensors"))
    assert len(files) >= 2  # two checkpoints are kept
    for path in files:
        for name, value in load_tensors(path.read_bytes()).items():
            assert not value.is_floating_point() or value.isfinite().all(), (path, name)


def assert_finite(out: Path) -> None:
    """No weight, no prediction and no number of a finished model is anything but finite; checkpoints neither."""
    for name, value in weights(out).items():
        assert value.isfinite().all(), name
    assert_checkpoints_are_finite(out)
    table = pq.read_table(out / "predictions.parquet")
    assert all(math.isfinite(value) for name in table.column_names for value in table[name].to_pylist())
    for name in (LAYERS, "signature.json", "statistics.json"):
        assert all(math.isfinite(value) for value in numbers(json.loads((out / name).read_text())))


@pytest.mark.parametrize(
    ("optimizer", "target"),
    crossed(
        [Adam(lr=1e-2 * 1000), Sgd(lr=0.1 * 1000, momentum=0.9)], [sets.THREE, sets.PAIR], ids=[["adam", "sgd"], ["classes", "numbers"]]
    ),
)
def test_a_rate_that_is_a_thousand_times_too_high_is_survived_or_stopped_in_one_line(optimizer: Any, target: Any, tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, sets.signature(sets.NUMBERS, sets.CATEGORIES, target=target), train=2000)
    out = tmp_path / "out"
    fit = section(epochs=6, optimizer=optimizer).model_copy(update={"model": Mlp(hidden=(32, 32), dropout=0.0)})
    try:
        info = work(fit, data, out)
    except DloptError as error:
        assert "lower train.optimizer.lr" in str(error) and "\n" not in str(error)
        assert not (out / "weights.safetensors").exists()
        return
    assert info["rollbacks"] == len(rollbacks(out)) > 0
    assert_finite(out)
    first, *_, last = [line["loss"] for line in metrics_log.read(out / metrics_log.NAME) if "loss" in line]
    assert last < first
    used = [line["rate"] for line in metrics_log.read(out / metrics_log.NAME) if "rate" in line]
    assert used[-1] == pytest.approx(fit.train.optimizer.lr * 0.1 ** info["rollbacks"])


def test_gradients_that_are_never_finite_end_in_one_line_that_names_the_rollbacks(tmp_path: Path) -> None:
    fit = section(optimizer=Sgd(lr=1e30), divergence=Divergence(most=2, factor=0.5))
    with pytest.raises(
        DloptError, match=r"^train: training diverges even after 2 roll-backs to a lower rate: epoch 1, step \d+: .*lower train"
    ):
        work(fit, prepared(tmp_path), tmp_path / "out")
    assert [line["rate"] for line in rollbacks(tmp_path / "out")] == [5e29, 2.5e29]
    assert not (tmp_path / "out" / "weights.safetensors").exists()
    assert_checkpoints_are_finite(tmp_path / "out")


def test_what_a_rollback_undoes_is_gone_from_the_curves_and_its_reason_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    work(section(optimizer=Sgd(lr=300.0), epochs=3), prepared(tmp_path), out)
    steps = [line["step"] for line in metrics_log.read(out / metrics_log.NAME) if "loss" in line]
    assert steps == list(range(1, 31))
    said = rollbacks(out)
    why = r"epoch 1, step \d+: (the last 5 losses .* \(training began with .*\) or more|the gradient was not finite .*); .*"
    assert said and all(re.fullmatch(why, line["rollback"]) for line in said)
    assert [line["rate"] for line in said] == pytest.approx([300 * 0.1**time for time in range(1, len(said) + 1)])


ALL = {
    "average": Ema(decay=0.9),
    "lookahead": Lookahead(steps=3),
    "sharpness": Sharpness(rho=0.01),
    "centralize_gradients": True,
    "max_norm": MaxNorm(limit=1.5),
    "micro_batch_size": 7,
    "l1": 1e-4,
}


def everything(**train: Any) -> Any:
    return section(epochs=4, optimizer=Adam(lr=1e-2, weight_decay=0.01), **(ALL | train))


class Killed(BaseException):
    """Stands for the end of a process."""


@pytest.mark.parametrize(
    ("every", "train"),
    crossed(
        [{"steps": 4}, {"epochs": 1}],
        [
            {},
            {"average": Swa(start=Span(share=0.4), every=Span(steps=3))},
            {"optimizer": ScheduleFreeAdamW(lr=1e-2), "lookahead": None},
            {"optimizer": Sgd(lr=30.0), "average": None, "lookahead": None, "max_norm": None},
        ],
        ids=[["steps", "epochs"], ["ema and all", "swa", "schedule-free", "with roll-backs"]],
    ),
)
def test_a_killed_run_with_all_of_it_goes_on_to_the_same_bits(
    every: dict[str, int], train: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, fit = prepared(tmp_path), everything().model_copy(update={"train": everything().train.model_copy(update=train)})
    whole = work(fit, data, tmp_path / "whole")
    assert whole["rollbacks"] == 0 or "optimizer" in train
    kill_at(monkeypatch, 25)
    with pytest.raises(Killed):
        work(fit, data, tmp_path / "out", checkpoint={"every": every})
    monkeypatch.undo()
    work(fit, data, tmp_path / "out", checkpoint={"every": every})
    starts = [json.loads(line)["step"] for line in (tmp_path / "out" / STARTS).read_text().splitlines()]
    assert starts == [0, 24 if "steps" in every else 20]
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")
    assert without_seconds(tmp_path / "out") == without_seconds(tmp_path / "whole")
    assert list(metrics_log.read(tmp_path / "out" / HEALTH)) == list(metrics_log.read(tmp_path / "whole" / HEALTH))


def kill_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """End training after a step that it comes to for the first time."""
    go_on, left = Training._between_steps, list(steps)

    def die(training: Training) -> None:
        if left and training.state.record.step == left[0]:
            del left[0]
            raise Killed
        go_on(training)

    monkeypatch.setattr(Training, "_between_steps", die)


@pytest.mark.parametrize("steps", few(2, [3, 50, 1, 7]))
def test_a_run_that_is_killed_again_and_again_goes_on_from_the_step_of_the_last_checkpoint(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, fit = prepared(tmp_path), section(average=Ema(decay=0.9), health=Health(every=5))
    work(fit, data, tmp_path / "whole")
    kills = (1, 4, 9, 10, 11, 19, 20, 21, 30, 39, 40)
    kill_at(monkeypatch, *kills)
    for _ in kills:
        with pytest.raises(Killed):
            work(fit, data, tmp_path / "out", checkpoint={"every": {"steps": steps}})
    work(fit, data, tmp_path / "out", checkpoint={"every": {"steps": steps}})
    starts = [json.loads(line)["step"] for line in (tmp_path / "out" / STARTS).read_text().splitlines()]
    whole_before = [max((step - 1) // steps * steps, (step - 1) // 10 * 10) for step in kills]  # an epoch has ten steps
    assert starts == [0, *whole_before]
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")
    assert without_seconds(tmp_path / "out") == without_seconds(tmp_path / "whole")
    assert list(metrics_log.read(tmp_path / "out" / HEALTH)) == list(metrics_log.read(tmp_path / "whole" / HEALTH))


def test_a_run_that_is_told_to_end_saves_first_and_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, fit, out = prepared(tmp_path), section(), tmp_path / "out"
    work(fit, data, tmp_path / "whole")
    monkeypatch.setattr(Agreement, "SECONDS", 0.0)
    go_on = Training._between_steps

    def ask(training: Training) -> None:
        if training.state.record.step == 27:
            (out / "stop").touch()
        go_on(training)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_between_steps", ask)
        assert work(fit, data, out) == {"stopped": "asked", "steps": 27}
    (out / "stop").unlink()
    work(fit, data, out)
    assert [json.loads(line)["step"] for line in (out / STARTS).read_text().splitlines()] == [0, 27]
    assert bits(out) == bits(tmp_path / "whole")
    assert without_seconds(out) == without_seconds(tmp_path / "whole")


def test_a_run_that_is_told_to_end_while_the_model_is_measured_ends_then_and_seals_nothing_that_it_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, fit = prepared(tmp_path), section()
    finish = Worker._finish

    def told(worker: Worker, *words: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return finish(worker, *words)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match=r"^stopped after the last step: "):
        patch.setattr(Worker, "_finish", told)
        once(FIT, fit, tmp_path, data, resources=Resources(workers=0))
    made = once(FIT, fit, tmp_path, data, resources=Resources(workers=0))
    assert made.info["restarts"] == 1 and made.info["steps"] == 40
    assert not (made.path / STOP).exists()


def test_checkpoints_by_the_clock_come_within_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Agreement, "SECONDS", 0.0)
    data, fit, seen = prepared(tmp_path), section(), list[int]()
    save = Training.save

    def note(training: Training, needed: bool = True) -> None:
        save(training, needed)
        seen.append(training.state.record.step)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "save", note)
        patch.setattr(Writer, "ready", lambda writer, seconds=0.0: writer.wait() is None)
        work(fit, data, tmp_path / "all", checkpoint={"every": {"seconds": 1e-9}})
        assert seen == list(range(1, 41))
        seen.clear()
        work(fit, data, tmp_path / "few", checkpoint={"every": {"seconds": 1e9}})
        assert seen == [10, 20, 30, 40]
    assert bits(tmp_path / "all") == bits(tmp_path / "few")


def test_the_same_job_gives_the_same_bits(tmp_path: Path) -> None:
    data, fit = prepared(tmp_path), everything()
    work(fit, data, tmp_path / "one")
    work(fit, data, tmp_path / "two")
    for name in ("weights.safetensors", HEALTH, LAYERS, "predictions.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def trajectory(fit: Any, data: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The weights after every step."""
    seen: list[dict[str, Tensor]] = []
    between = Training._between_steps

    def note(training: Training) -> None:
        seen.append({name: value.clone() for name, value in training.network.state_dict().items()})
        between(training)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_between_steps", note)
        work(fit, data, out)
    return seen


def test_the_average_is_what_is_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = prepared(tmp_path, validation=0), tmp_path / "out"
    fit = section(average=Ema(decay=0.9, warmup=False), precision="float64", epochs=2)
    start = load_network(fit, data).state_dict()
    seen = trajectory(fit, data, out, monkeypatch)
    for name, value in weights(out).items():
        mean = start[name]
        for state in seen:
            mean = 0.9 * mean + 0.1 * state[name]
        torch.testing.assert_close(value, mean)
    assert any(not torch.equal(value, seen[-1][name]) for name, value in weights(out).items())


def test_averaging_changes_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepared(tmp_path)
    one = trajectory(section(), data, tmp_path / "one", monkeypatch)
    two = trajectory(section(average=Swa(start=Span(share=0.0), every=Span(steps=1))), data, tmp_path / "two", monkeypatch)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(one, two, strict=True) for name in a)


def test_averaged_weights_get_statistics_of_batch_normalization_of_their_own(tmp_path: Path) -> None:
    data, out = sets.prepared(tmp_path, sets.signature(sets.NUMBERS, target=sets.THREE), train=1000), tmp_path / "out"
    model: Model = Mlp(hidden=(32,), norm="batch", dropout=0.0)
    fit = section(average=Swa(start=Span(share=0.5), every=Span(steps=5)), optimizer=Adam(lr=0.02)).model_copy(update={"model": model})
    info = work(fit, data, out)
    network = load_network(fit, data)
    network.load_state_dict(weights(out))
    assert evaluate(network, Split.open(data, "validation"), CPU) == info["metrics"]["validation"]
    hidden = {}
    layer = next(layer for name, layer in network.named_modules() if name.endswith("norm"))
    layer.register_forward_pre_hook(lambda _, args: hidden.update(x=args[0]))
    rows = Split.open(data, "train").read()
    network.eval()({"numbers": torch.from_numpy(rows["numbers"].copy())})
    torch.testing.assert_close(layer.running_mean, hidden["x"].mean(dim=0), rtol=1e-5, atol=1e-6)


def test_micro_batches_give_the_curve_of_whole_ones_and_a_full_batch_is_one_step_an_epoch(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    fits = {"whole": section(precision="float64"), "parts": section(precision="float64", micro_batch_size=5)}
    for name, fit in fits.items():
        work(fit, data, tmp_path / name)
    one, two = ([line["loss"] for line in metrics_log.read(tmp_path / name / metrics_log.NAME) if "loss" in line] for name in fits)
    assert one == pytest.approx(two, rel=1e-9)
    info = work(section(batch_size="full", optimizer=Sgd(lr=0.5), epochs=30), data, tmp_path / "full")
    assert info["steps"] == info["epochs"] == 30
    assert epochs(tmp_path / "full")[-1]["train"]["loss"] < 0.7 * epochs(tmp_path / "full")[0]["train"]["loss"]


def test_lbfgs_on_the_full_batch_is_there_in_a_few_steps(tmp_path: Path) -> None:
    info = work(
        section(batch_size="full", optimizer=Lbfgs(lr=1.0, line_search_fn="strong_wolfe"), epochs=5), prepared(tmp_path), tmp_path / "out"
    )
    assert info["metrics"]["train"]["accuracy"] > 0.97


def test_norms_of_units_are_held_and_frozen_parameters_stay(tmp_path: Path) -> None:
    data, out = prepared(tmp_path), tmp_path / "out"
    fit = section(
        max_norm=MaxNorm(limit=0.5),
        optimizer=Adam(lr=0.05),
        parameters=Parameters(groups=(Group(names="*.head.bias", freeze=True), Group(names="*.hidden1.*", lr_scale=0.5))),
    )
    work(fit, data, out)
    found, start = weights(out), load_network(fit, data).state_dict()
    for name, value in found.items():
        if value.dim() > 1:
            assert value.norm(dim=1).max() <= 0.5 + 1e-6
            assert not torch.equal(value, start[name])
        if name.endswith("head.bias"):
            assert torch.equal(value, start[name])


def test_a_rate_that_is_found_is_written_down_used_and_better_than_a_hundredth_of_it(tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, sets.signature(sets.NUMBERS, sets.CATEGORIES, target=sets.THREE), train=2000)
    found = work(section(optimizer=Adam(lr="auto")), data, tmp_path / "auto")
    seen = json.loads((tmp_path / "auto" / RANGE).read_text())
    assert found["rate"] == seen["suggested"] and len(seen["rates"]) == len(seen["losses"])
    used = [line["rate"] for line in metrics_log.read(tmp_path / "auto" / metrics_log.NAME) if "rate" in line]
    assert set(used) == {seen["suggested"]}
    slow = work(section(optimizer=Adam(lr=seen["suggested"] / 100)), data, tmp_path / "slow")
    assert found["metrics"]["test"]["accuracy"] > slow["metrics"]["test"]["accuracy"]
    given = work(section(optimizer=Adam(lr=seen["suggested"])), data, tmp_path / "given")
    assert bits(tmp_path / "auto") == bits(tmp_path / "given") and given["rate"] == found["rate"]


def test_a_rate_is_scaled_from_another_batch_size(tmp_path: Path) -> None:
    fit = section(optimizer=Sgd(lr=0.1), scale_lr=ScaleLr(rule="sqrt", base=8), batch_size=32)
    assert work(fit, prepared(tmp_path), tmp_path / "out")["rate"] == pytest.approx(0.2)


def test_layers_are_looked_at_before_the_first_step_and_in_training_and_neither_changes_it(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    work(section(health=Health(every=7)), data, tmp_path / "watched")
    work(section(health=Health(every=0)), data, tmp_path / "not")
    assert bits(tmp_path / "watched") == bits(tmp_path / "not")
    layers = json.loads((tmp_path / "watched" / LAYERS).read_text())
    assert len(layers) == 2 and all(layer["weights"]["std"] > 0 for layer in layers)
    looks = [line["step"] for line in metrics_log.read(tmp_path / "watched" / HEALTH) if "gradient" in line]
    assert looks == [1, 2, 5, 7, 10, 14, 20, 21, 28, 35]
    assert not list(metrics_log.read(tmp_path / "not" / HEALTH))


def test_deep_sigmoids_are_named_as_vanishing_within_fifty_steps_and_the_cure_is_silent(tmp_path: Path) -> None:
    data = sets.prepared(tmp_path, sets.signature(sets.IMAGE, target=sets.THREE), train=2000)
    deep = {"hidden": (64,) * 20, "dropout": 0.0}
    models = {
        "ill": Mlp(activation="sigmoid", init="xavier_uniform", **deep),
        "cured": Mlp(activation="relu", init="kaiming_normal", residual=True, **deep),
    }
    for name, model in models.items():
        work(section(epochs=1, optimizer=Adam()).model_copy(update={"model": model}), data, tmp_path / name)
    said = {name: [found for line in metrics_log.read(tmp_path / name / HEALTH) for found in line.get("findings", ())] for name in models}
    assert said["cured"] == []
    (found,) = [one for one in said["ill"] if one["kind"] == "vanishing"]
    assert found["step"] <= 50
    assert "body.encoder.hidden1.linear" in found["layers"] and "hidden20" not in str(found["layers"])
    assert "kaiming" in found["says"]


@pytest.mark.parametrize("kind", few(8, kinds(Optimizer)))
def test_every_optimizer_goes_through_a_whole_run_and_on_after_it_was_killed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepared(tmp_path)
    optimizer = TypeAdapter(Optimizer).validate_python({"kind": kind})
    full = kind in ("lbfgs", "rprop")  # which want the same loss at every step
    fit = section(epochs=6 if full else 3, optimizer=optimizer, batch_size="full" if full else 32)
    fit = fit.model_copy(update={"model": Mlp(hidden=(16,), dropout=0.0)})
    whole = work(fit, data, tmp_path / "whole")
    lines = epochs(tmp_path / "whole")
    assert lines[-1]["train"]["loss"] < lines[0]["train"]["loss"]
    assert whole["rollbacks"] == 0
    save = Training.save

    def die(training: Training, needed: bool = True) -> None:
        save(training, needed)
        if training.state.record.epoch == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Training, "save", die)
        work(fit, data, tmp_path / "out")
    work(fit, data, tmp_path / "out")
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")


class SlowDisk(Disk):
    """Takes its time for every checkpoint."""

    seconds = 0.4

    def write(self, name: str, files: Iterable[tuple[str, bytes]]) -> None:
        time.sleep(self.seconds)
        super().write(name, files)


def slowly(rank: int, world: int, folder: Path, data: Path, fit: Fit) -> None:
    """Train, with checkpoints that take longer than a worker may hang, of whom each is ended that does."""
    out, resources = folder / "out", Resources.model_validate({"hang_seconds": 0.3, "checkpoint": {"every": {"steps": 2}}})
    given = Assignment(fit=fit, data=data, out=out, feed="resident", resources=resources, threads=1)
    training.MOMENT = 0.1
    Worker(given, rank, world, CPU, SlowDisk(out / CHECKPOINTS)).run()


@pytest.mark.slow
def test_a_store_that_is_slower_than_a_hang_makes_checkpoints_rarer_and_nothing_else(tmp_path: Path) -> None:
    fit, out, data = section(epochs=3), tmp_path / "out", prepared(tmp_path)
    out.mkdir()
    assert run(slowly, 0, 1, tmp_path, data.path, fit) == 0  # where it hangs, it would end itself
    work(fit, data, tmp_path / "fast")
    assert bits(out) == bits(tmp_path / "fast") and without_seconds(out) == without_seconds(tmp_path / "fast")
    assert not (out / HUNG).exists()
    written = [int(name[:6]) for name in Disk(out / CHECKPOINTS).names()]
    assert written[-1] <= 5  # of 16 that were due: the first, one at each end of an epoch that was not overtaken, and what came between


@pytest.mark.slow
def test_two_workers_wait_for_a_store_that_is_slower_than_an_exchange_may_be(tmp_path: Path) -> None:
    fit, out, data = section(epochs=3, precision="float64"), tmp_path / "out", prepared(tmp_path)
    out.mkdir()
    together(2, slowly, tmp_path, data.path, fit)
    assert (out / "weights.safetensors").exists() and not (out / HUNG).exists()
    assert len(list(metrics_log.read(out / STARTS))) == 1


def test_training_that_diverges_goes_back_to_the_last_epoch_though_its_checkpoint_is_still_to_be_written(tmp_path: Path) -> None:
    """As with a store that is fast: which checkpoints there are is not to depend on it."""
    fit, data = section(optimizer=Sgd(lr=300.0), epochs=3), prepared(tmp_path)
    (tmp_path / "out").mkdir()
    assert run(slowly, 0, 1, tmp_path, data.path, fit) == 0
    work(fit, data, tmp_path / "fast")
    assert bits(tmp_path / "out") == bits(tmp_path / "fast")
    assert [line["step"] for line in rollbacks(tmp_path / "out")] == [line["step"] for line in rollbacks(tmp_path / "fast")]


def test_statistics_for_averaged_weights_are_made_as_training_makes_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set[tuple[int, bool]]()

    def noted(network: nn.Module, batches: Iterable[dict[str, Tensor]]) -> None:
        seen.update((len(batch["numbers"]), torch.is_autocast_enabled("cpu")) for batch in batches)

    monkeypatch.setattr(averaged, "reestimate", noted)
    fit = section(epochs=1, micro_batch_size=12, precision="bfloat16", average=Ema())
    work(fit.model_copy(update={"model": Mlp(hidden=(8,), norm="batch")}), prepared(tmp_path), tmp_path / "out")
    assert seen == {(12, True), (8, True)}  # of batches of 32, and the last one of 12
