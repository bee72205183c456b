"""Where the numbers of training go while it runs: a real Prometheus scrapes them, TensorBoard's and MLflow's own readers find in what was
written what metrics.jsonl has, restarts and roll-backs among it, and a tracker that fails costs a warning and nothing else."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter, ValidationError

from dlopt.part import DloptError
from dlopt.train.job import Resources
from dlopt.train.progress.follow import ProgressReader, Status
from dlopt.train.progress.forecast import Forecast
from dlopt.train.progress.track import MLflow, Prometheus, TensorBoard, Track, courier
from dlopt.train.progress.track.courier import Courier, complaints, couriers
from dlopt.train.progress.track.mlflow import flattened
from dlopt.train.progress.track.tensorboard import FOLDER
from dlopt.train.progress.track.tracker import Line, Tracker, refuse_missing
from dlopt.train.watch import metrics_log
from dlopt.train.watch.metrics_log import NAME
from tests.conftest import missing, program
from tests.serve.test_serve import queried, until
from tests.served import free_port
from tests.train.watch.test_follow import BATCH, EPOCHS, ROWS, STEPS, Files
from tests.trained import fit, prepare_digits
from tests.trained import quick as quick_fit

SETTINGS = {
    "seed": 3,
    "train": {"epochs": 4, "clip": None, "optimizer": {"kind": "adam", "betas": [0.9, 0.999]}},
    "augment": [{"kind": "x"}],
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deliveries without waiting for more lines."""
    monkeypatch.setattr(courier, "EVERY", 0.01)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of a model."""
    folder = tmp_path / "model" / "0123456789ab"
    folder.mkdir(parents=True)
    return folder


@contextmanager
def followed(out: Path, *parts: Any) -> Iterator[tuple[Callable[[], None], list[Courier], list[str]]]:
    """A process of `dlopt run` without training: (read what is new in the files, the trackers, all that was said)."""
    said: list[str] = []
    with couriers(parts, out, SETTINGS) as trackers:
        words = Status(EPOCHS, STEPS, "accuracy", Forecast(ROWS, EPOCHS))
        follower = ProgressReader(out, words, lambda stage, share, text: said.append(text), trackers)
        yield lambda: follower.look(0.0), trackers, said


def an_epoch(files: Files, epoch: int, scale: float = 1.0) -> None:
    """Lines of ten steps, with numbers that float32 has to round, and of their end."""
    for step in range((epoch - 1) * STEPS + 1, epoch * STEPS + 1):
        files.step(step, loss=scale / (3 * step), rate=0.1 * scale, gradient_norm=None if step == 7 else step / 7)
        files.speed(step, 1e9 + 20 * step, rows_per_second=100.0 + step)
    files.epoch(epoch, accuracy=scale * epoch / 7)


def lines(out: Path) -> tuple[list[Line], list[Line]]:
    """(of steps, of epochs) as metrics.jsonl has them."""
    found = list(metrics_log.read(out / NAME))
    return [line for line in found if "train" not in line], [line for line in found if "train" in line]


def points(found: Sequence[Line], name: str, within: str | None = None) -> list[tuple[int, float]]:
    """(step, value) of each line that has a value."""
    values = [(line["step"], (line[within] or {}).get(name) if within else line[name]) for line in found]
    return [(step, value) for step, value in values if value is not None]


# Prometheus


def scraped(port: int, run: str | None = "0123456789ab") -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """{(name, labels without the run's): value} of what is served."""
    reply = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
    families = text_string_to_metric_families(reply.text)
    samples = [sample for family in families for sample in family.samples]
    assert run is None or {sample.labels["run"] for sample in samples} == {run}
    return {(one.name, tuple(sorted(set(one.labels.items()) - {("run", one.labels["run"])}))): one.value for one in samples}


CONFIG = """
global: {{scrape_interval: 300ms, scrape_timeout: 300ms}}
scrape_configs:
- job_name: training
  static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


def test_a_prometheus_has_the_loss_that_metrics_jsonl_has(out: Path, tmp_path: Path) -> None:
    binary, port, own = program("prometheus"), free_port(), free_port()
    (tmp_path / "prometheus.yml").write_text(CONFIG.format(port=port))
    options = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/db", f"--web.listen-address=127.0.0.1:{own}"]
    files = Files(out)
    files.start()
    an_epoch(files, 1)
    wanted = lines(out)[0][-1]
    with (
        followed(out, Prometheus(port=port)),
        (tmp_path / "log").open("w") as log,
        subprocess.Popen([binary, *options], stdout=log, stderr=log) as prometheus,
    ):
        try:
            for name, value in {"loss": wanted["loss"], "learning_rate": 0.1, "rows_total": wanted["rows"], "steps_total": 10}.items():
                query = f'dlopt_train_{name}{{job="training",run="0123456789ab"}}'
                assert until(lambda query=query: queried(own, query), [value]) == [value]
            assert queried(own, 'dlopt_train_metric{split="validation",metric="accuracy"}') == [1 / 7]
        finally:
            prometheus.terminate()


def test_all_that_is_served_is_the_newest_and_has_help_and_follows_the_conventions(out: Path) -> None:
    files, port = Files(out), free_port()
    with followed(out, Prometheus(port=port)) as (look, _, said):
        files.start(workers=3)
        an_epoch(files, 1)
        files.step(11, loss=None)
        files.speed(12, 1e9 + 500, data_wait=0.125, workers=3, checkpoint_seconds=0.75)
        norms = {"gradient": [0.5, None], "weights": [2.0, 3.0], "update": [0.1, 0.2]}
        files.health(11, layers=["a", "b"], **norms)
        look()
        wanted = {
            "rows_total": 1200.0,
            "steps_total": 12.0,
            "checkpoint_seconds_total": 0.75,
            "restarts_total": 0.0,
            "rollbacks_total": 0.0,
        }
        wanted |= {"learning_rate": 0.1, "gradient_norm": 2.0, "epoch": 2.0, "rows_per_second": 100.0, "data_wait_ratio": 0.125}
        wanted |= {"step_seconds": 1.0, "workers": 3.0, "last_step_timestamp_seconds": 1e9 + 500}
        assert until(lambda: scraped(port).get(("dlopt_train_rows_total", ())), 1200) == 1200
        found = scraped(port)
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    assert {
        name.removeprefix("dlopt_train_"): value for (name, labels), value in found.items() if not labels and "loss" not in name
    } == wanted
    assert np.isnan(found["dlopt_train_loss", ()])  # which JSON does not have
    assert found["dlopt_train_metric", (("metric", "accuracy"), ("split", "validation"))] == 1 / 7
    assert found["dlopt_train_metric", (("metric", "loss"), ("split", "train"))] == 0.25
    assert found["dlopt_train_layer_norm", (("layer", "b"), ("of", "weights"))] == 3.0
    assert np.isnan(found["dlopt_train_layer_norm", (("layer", "b"), ("of", "gradient"))])
    assert len([line for line in text.splitlines() if line.startswith("# HELP") and len(line.split()) > 5]) == 16
    assert not [line for line in said if "warning" in line]


def test_counters_only_go_up_and_count_what_is_done_again(out: Path) -> None:
    files, port = Files(out), free_port()
    with followed(out, Prometheus(port=port)) as (look, _, _):
        files.start()
        files.speed(20, 1.0, checkpoint_seconds=2.0)
        look()
        files.back(15)
        files.start(15)
        files.speed(25, 2.0, checkpoint_seconds=0.5)
        look()
        files.health(10, rollback="the loss is not finite", rate=0.05)
        files.step(12)
        files.speed(12, 3.0, checkpoint_seconds=0.5)
        look()
        wanted = {"steps": 20 + 10, "rows": (20 + 10) * BATCH, "checkpoint_seconds": 2.5, "restarts": 1, "rollbacks": 1}
        names = {name: (f"dlopt_train_{name}_total", ()) for name in wanted}
        assert until(lambda: scraped(port)[names["rollbacks"]], 1) == 1
        files.speed(14, 4.0, checkpoint_seconds=0.5)
        look()
        wanted |= {"steps": 30 + 4, "rows": 3400}
        found = until(lambda: {name: scraped(port)[key] for name, key in names.items()}, wanted)
    assert found == wanted


def test_a_port_that_is_taken_is_one_line_and_one_that_was_given_back_is_free(out: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = rf"^resources\.track: prometheus: cannot listen on port {port} \(Address already in use\): give another one$"
        with pytest.raises(DloptError, match=line), followed(out, Prometheus(port=port)):
            pass
    for _ in range(2):
        with followed(out, Prometheus(port=port)):
            assert scraped(port)
    with pytest.raises(httpx.ConnectError):
        scraped(port)


def test_nobody_but_this_machine_is_shown_anything(out: Path) -> None:
    port = free_port()
    with followed(out, Prometheus(port=port)):
        table = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    listening = [line.split()[1] for line in table.splitlines() if f":{port:04X} " in line.split()[1] + " " and line.split()[3] == "0A"]
    assert listening == [f"0100007F:{port:04X}"]


# TensorBoard


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{curve: [(step, value)]} as TensorBoard shows them."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        missing("tensorboard is not installed: pip install 'dlopt[tensorboard]'")
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def rounded(found: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """With values as float32 has them."""
    return [(step, float(np.float32(value))) for step, value in found]


def assert_events_are_the_lines(folder: Path, out: Path) -> None:
    found, (steps, epochs) = events(folder), lines(out)
    for name in ("loss", "rate", "gradient_norm"):
        assert found[f"step/{name}"] == rounded(points(steps, name))
    for split in ("train", "validation"):
        for name in ("loss", "accuracy"):
            assert found[f"{split}/{name}"] == rounded(points(epochs, name, split))
    assert len({step for step, _ in found["speed/data_wait"]}) == len(found["speed/data_wait"]) > 0


@pytest.fixture
def tensorboard() -> None:
    """Where it is installed."""
    try:
        TensorBoard().check()
    except DloptError as error:
        missing(str(error))


def test_tensorboard_shows_what_metrics_jsonl_has(out: Path, tensorboard: None) -> None:
    files = Files(out)
    with followed(out, TensorBoard()) as (look, _, said):
        files.start()
        an_epoch(files, 1)
        look()
        an_epoch(files, 2)
        files.health(11, layers=["a", "b"], gradient=[0.5, None], weights=[2.0, 3.0], update=[0.1, 0.2])
        look()
    assert_events_are_the_lines(out / FOLDER, out)
    found = events(out / FOLDER)
    assert len(found["step/loss"]) == 20 and len(found["step/gradient_norm"]) == 19
    assert found["layers/weights/b"] == [(11, 3.0)] and "layers/gradient/b" not in found
    assert not [line for line in said if "warning" in line]


def test_tensorboard_shows_each_step_once_after_restarts_of_workers_and_of_the_process(out: Path, tensorboard: None) -> None:
    files = Files(out)
    for _ in range(2):
        with followed(out, TensorBoard()) as (look, _, _):
            files.start()
            an_epoch(files, 1)
            look()
            files.back(4)  # a worker is lost
            files.start(4)
            look()
            for step in range(5, STEPS + 1):
                files.step(step, loss=1 / (3 * step), gradient_norm=None if step == 7 else step / 7)
                files.speed(step, 1e9 + 20 * step)
            files.epoch(1, accuracy=1 / 7)
            look()
        assert_events_are_the_lines(out / FOLDER, out)
        files.back(0)  # the process is killed before the first checkpoint


def test_tensorboard_shows_the_way_that_training_took_after_a_roll_back(out: Path, tensorboard: None) -> None:
    files = Files(out)
    with followed(out, TensorBoard()) as (look, _, _):
        files.start()
        for epoch in (1, 2):
            an_epoch(files, epoch)
        look()
        files.back(10)
        files.health(10, rollback="the loss is not finite", rate=0.05)
        an_epoch(files, 2, scale=0.5)
        look()
        an_epoch(files, 3, scale=0.5)
        look()
    assert_events_are_the_lines(out / FOLDER, out)
    assert dict(events(out / FOLDER)["step/rate"])[11] == float(np.float32(0.05))


def test_tensorboard_writes_where_it_is_told_to_each_run_in_a_folder_of_its_own(out: Path, tmp_path: Path, tensorboard: None) -> None:
    files = Files(out)
    an_epoch(files, 1)
    with followed(out, TensorBoard(folder=tmp_path / "all")):
        pass
    assert_events_are_the_lines(tmp_path / "all" / out.name, out)
    assert not (out / FOLDER).exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(DloptError, match=r"^resources\.track: tensorboard: cannot write to .*: Not a directory$"):
        TensorBoard(folder=tmp_path / "file").open(out, {})


# MLflow


@pytest.fixture
def store(tmp_path: Path) -> str:
    """The address of a database that is not there yet, where MLflow is installed."""
    try:
        MLflow().check()
    except DloptError as error:
        missing(str(error))
    return f"sqlite:///{tmp_path}/mlflow.db"


def runs(store: str, experiment: str = "dlopt") -> tuple[Any, list[Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    return client, client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def history(client: Any, run: Any, name: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))


@pytest.mark.slow
def test_mlflow_has_the_settings_and_the_numbers_of_a_run(out: Path, store: str) -> None:
    files = Files(out)
    with followed(out, MLflow(uri=store, experiment="digits")) as (look, _, said):
        files.start()
        for epoch in (1, 2):
            an_epoch(files, epoch)
            look()
        client, (run,) = runs(store, "digits")
        assert run.info.status == "RUNNING"
    client, (run,) = runs(store, "digits")
    steps, epochs = lines(out)
    for name in ("loss", "rate", "gradient_norm"):
        assert history(client, run, f"step/{name}") == points(steps, name)
    assert history(client, run, "validation/accuracy") == points(epochs, "accuracy", "validation")
    assert history(client, run, "speed/rows_per_second") == [(step, 100.0 + step) for step in range(1, 21)]
    assert run.data.params == {
        "seed": "3",
        "train.epochs": "4",
        "train.optimizer.kind": "adam",
        "train.optimizer.betas": "[0.9, 0.999]",
        "augment.0.kind": "x",
    }
    assert run.data.tags["dlopt.digest"] == run.info.run_name == out.name
    assert run.info.status == "FINISHED"
    assert not [line for line in said if "warning" in line]


def test_mlflow_goes_on_with_an_interrupted_run_and_has_each_step_once(out: Path, store: str) -> None:
    files = Files(out)
    with pytest.raises(KeyboardInterrupt), followed(out, MLflow(uri=store)) as (look, _, _):
        files.start()
        an_epoch(files, 1)
        files.step(11)
        look()
        raise KeyboardInterrupt
    _, (interrupted,) = runs(store)
    assert interrupted.info.status == "FAILED"
    files.back(8)
    with followed(out, MLflow(uri=store)) as (look, _, _):
        files.start(8)
        for step in (9, 10):
            files.step(step, loss=1 / (3 * step), gradient_norm=step / 7)
        files.epoch(1, accuracy=1 / 7)
        files.step(11)
        files.step(12)
        look()
    client, (run,) = runs(store)
    assert history(client, run, "step/loss") == points(lines(out)[0], "loss")
    assert history(client, run, "validation/accuracy") == [(10, 1 / 7)]
    assert (run.info.run_id, run.info.status) == (interrupted.info.run_id, "FINISHED")
    with followed(out, MLflow(uri=store)):
        pass
    assert len(runs(store)[1]) == 2  # what has finished is not touched again


def test_a_store_that_does_not_answer_is_one_line_in_seconds(out: Path, store: str) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(DloptError, match=rf"^resources\.track: mlflow: {uri} does not take the run: .*$") as caught:
        MLflow(uri=uri).open(out, {})
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_database_that_breaks_while_training_runs_is_one_warning(out: Path, store: str) -> None:
    files = Files(out)
    with followed(out, MLflow(uri=store)) as (look, trackers, said):
        files.start()
        an_epoch(files, 1)
        look()
        client, (run,) = runs(store)
        until(lambda: len(history(client, run, "step/loss")), STEPS)
        with sqlite3.connect(store.removeprefix("sqlite:///")) as database:
            database.execute("ALTER TABLE metrics RENAME TO gone")
        files.step(11)
        look()
        until(lambda: trackers[0].complaint is not None, True)
        files.step(12)
        look()
        with sqlite3.connect(store.removeprefix("sqlite:///")) as database:
            database.execute("ALTER TABLE gone RENAME TO metrics")
    assert [line for line in said if "warning" in line] == [f"warning: {trackers[0].complaint}"]
    assert str(trackers[0].complaint).startswith("mlflow does not get all numbers, training goes on: ")
    assert history(client, run, "step/loss") == points(lines(out)[0], "loss")  # what was not taken was given again


# Trackers that fail, and jobs


class Broken(Tracker):
    """Cannot write, as on a full disk; hangs at the end if it is told to."""

    def __init__(self, hangs: float = 0.0) -> None:
        self.hangs = hangs
        self.taken: list[int] = []

    def step(self, line: Line) -> None:
        self.taken.append(line["step"])
        if line["step"] % 2:
            raise OSError(28, "No space left on device")

    def close(self, finished: bool) -> None:
        time.sleep(self.hangs)


class Part:
    """What a tracker's part is to a courier."""

    def __init__(self, kind: str, tracker: Tracker) -> None:
        self.kind, self.tracker = kind, tracker

    def open(self, out: Path, settings: Any) -> Tracker:
        return self.tracker


def test_a_tracker_that_fails_is_one_warning_and_the_others_get_all_lines(out: Path) -> None:
    files, broken, port = Files(out), Broken(), free_port()
    with followed(out, Part("broken", broken), Prometheus(port=port)) as (look, trackers, said):
        an_epoch(files, 1)
        look()
        until(lambda: len(broken.taken), STEPS)
        look()
        look()
        assert until(lambda: scraped(port)["dlopt_train_steps_total", ()], STEPS) == STEPS
    assert broken.taken == list(range(1, STEPS + 1))
    assert [line for line in said if "warning" in line] == [
        "warning: broken does not get all numbers, training goes on: OSError: [Errno 28] No space left on device"
    ]
    assert list(complaints(trackers)) == []


def test_a_tracker_that_hangs_holds_up_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier, "PATIENCE", 0.2)
    with couriers([Part("slow", Broken(hangs=3600))], out, {}) as trackers:
        trackers[0].tell("step", {"step": 2})
    assert list(complaints(trackers)) == ["slow does not get all numbers, training goes on: has not taken its last lines within 0 s"]


def test_a_package_that_is_not_installed_is_one_line_with_the_cure() -> None:
    with pytest.raises(DloptError, match=r"^resources\.track: mlflow is not installed: pip install 'dlopt\[mlflow\]'$"):
        refuse_missing("no_such_package", "mlflow")


def test_trackers_are_written_in_a_job_by_their_kind() -> None:
    given = [{"kind": "prometheus", "port": 9000}, {"kind": "tensorboard"}, {"kind": "mlflow", "uri": "http://a:5000", "experiment": "x"}]
    found = Resources.model_validate({"track": given}).track
    assert found == (Prometheus(port=9000), TensorBoard(), MLflow(uri="http://a:5000", experiment="x"))
    assert Resources.model_validate_json(Resources(track=found).model_dump_json()).track == found
    for wrong in ({"kind": "wandb"}, {"kind": "prometheus", "port": 0}, {"kind": "mlflow", "url": "http://a"}):
        with pytest.raises(ValidationError):
            TypeAdapter(Track).validate_python(wrong)


def test_the_command_line_has_a_short_form_for_prometheus() -> None:
    from dlopt import cli, spec

    job = spec.load(Path(__file__).parents[3] / "jobs" / "mnist.yaml", ["resources.track=[{kind: tensorboard}]"])
    found = cli.run.shown_to_prometheus(job, 9000)
    assert found.resources.track == (TensorBoard(), Prometheus(port=9000))
    assert (found.fit, found.data) == (job.fit, job.data)
    assert cli.main(["run", "jobs/mnist.yaml", "--metrics-port", "70000"]) == 2


@pytest.mark.slow
def test_real_training_shows_itself_while_it_runs(tmp_path: Path, ray_cluster: None, mnist: None, tensorboard: None, store: str) -> None:
    port, data, seen = free_port(), prepare_digits(tmp_path, 500), []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            with contextlib.suppress(httpx.TransportError):
                seen.append({labels or name: value for (name, labels), value in scraped(port, None).items()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        model = fit(quick_fit(epochs=40), tmp_path, data, track=(Prometheus(port=port), TensorBoard(), MLflow(uri=store)))
    finally:
        done.set()
        watcher.join()
    steps, epochs = lines(model.path)
    losses = {found.get("dlopt_train_loss") for found in seen} - {None}
    assert losses and losses <= {line["loss"] for line in steps}
    assert max(found["dlopt_train_rows_total"] for found in seen) <= steps[-1]["rows"]
    assert_events_are_the_lines(model.path / FOLDER, model.path)
    client, (run,) = runs(store)
    assert history(client, run, "step/loss") == points(steps, "loss")
    assert history(client, run, "validation/accuracy") == points(epochs, "accuracy", "validation")
    assert run.data.params["model.kind"] == "mlp"
    (sealed,) = [name for name in model.manifest.files if name.startswith(FOLDER)]
    assert model.check(sealed).is_file()


def test_parameters_are_told_by_their_place() -> None:
    assert dict(flattened({"a": {"b": [1, 2], "c": None, "d": []}, "e": [{"f": True}, {"f": 2}]})) == {
        "a.b": "[1, 2]",
        "a.d": "[]",
        "e.0.f": "True",
        "e.1.f": "2",
    }
