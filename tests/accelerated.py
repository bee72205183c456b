"""Training on a pretend accelerator, whose tensors must not be mixed with those of the CPU: fresh, and on from a checkpoint; and what tries
steps out before. Run by `tests/train/parallel/test_accelerator.py` in processes of their own, since the pretence changes torch."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dlopt.artifact import Artifact
from dlopt.data.augment.tables import FeatureDropout, FeatureNoise
from dlopt.data.augment.texts import RandomInsertion, RandomSwap
from dlopt.data.feed.batches import Batch
from dlopt.models import (
    Cnn,
    FtTransformer,
    Joint,
    Linear,
    Mlp,
    Resnet,
    TableResnet,
    TextBag,
    TextCnn,
    TextTransformer,
    Vit,
    noise,
)
from dlopt.optim.averages import Ema, Swa
from dlopt.optim.constraints import ClipAdaptive, ClipNorm, ClipValue, MaxNorm
from dlopt.optim.optimizers import Adam, AdamW, Sgd
from dlopt.optim.wrappers import Lookahead
from dlopt.part import Feature, Target
from dlopt.spec import load
from dlopt.train import start, training, worker
from dlopt.train.checkpoint import checkpoints
from dlopt.train.checkpoint.stores import CHECKPOINTS, Disk
from dlopt.train.job import Fit, Resources, Train
from dlopt.train.loop.gradients import Sharpness
from dlopt.train.loop.largest_batch import MIB, largest_batch
from dlopt.train.loop.objectives import Losses, Objective
from dlopt.train.measure.thresholds import Tuned
from dlopt.train.start import load_network, swept
from dlopt.train.training import Training
from dlopt.train.watch import metrics_log
from dlopt.train.watch.layers import Health
from tests import sets
from tests.commands import ROOT
from tests.driven import KINDS


class Event:
    """What an accelerator notes, of one whose work is done when it is begun."""

    def __init__(self, device: torch.device, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


def pretending(tools: str) -> Any:
    """The pretence, which changes torch: before it goes backward for the first time."""
    sys.path.insert(0, tools)
    torch.set_num_threads(1)
    torch.Event = Event  # type: ignore[misc, assignment]
    return importlib.import_module("pretend_accelerator")


TABLE, PIXELS, WORDS = (sets.NUMBERS, sets.CATEGORIES), (sets.image(8, 8, 1),), (sets.TEXT,)
BEYOND = ("asgd", "prodigy")
"""Optimizers that the pretence itself cannot do."""
ASKING = ("lbfgs", "adafactor")
"""Of torch's, that wait for numbers in each step: for losses on their way, and for the norm of each weight."""


class Case(NamedTuple):
    """A job on a small set."""

    model: Any
    inputs: tuple[Feature, ...]
    train: dict[str, Any] = {}
    target: Target = sets.THREE
    augment: tuple[Any, ...] = ()


def job(path: Path) -> Case:
    """Of jobs/: its model, augmentation and training, on rows that look like its own."""
    given = load(path)
    kinds = {part.kind for part in given.data.inputs}
    inputs = (sets.image(28, 28, 1),) if "image" in kinds else WORDS if "text" in kinds else TABLE
    return Case(given.model, inputs, dict(given.train.model_copy(update={"monitor": "loss"})), augment=given.augment)


MIXED = {
    "mlp": Case(
        Mlp(hidden=(8, 8), dropout=0.2, norm="batch", residual=True),
        TABLE,
        {"optimizer": AdamW(lr=1e-2), "clip": ClipNorm(limit=0.5), "average": Ema(decay=0.9), "lookahead": Lookahead(steps=3)},
    ),
    "cnn": Case(
        Cnn(channels=(4,), hidden=8, dropout=0.2, block_dropout=0.1, dropout_kind="channel", norm="group"),
        PIXELS,
        {"optimizer": Sgd(momentum=0.9), "clip": ClipAdaptive(limit=0.1), "micro_batch_size": 7, "average": Swa()},
    ),
    "transformer": Case(
        FtTransformer(width=8, depth=1, heads=2, attention_dropout=0.2, dropout=0.1, dropout_kind="gaussian"),
        TABLE,
        {"optimizer": Adam(lr=1e-2), "sharpness": Sharpness(), "max_norm": MaxNorm(limit=2.0)},
    ),
    "labels": Case(Linear(), TABLE, {"clip": ClipValue(limit=0.1), "threshold": Tuned(), "class_weights": "balanced"}, sets.LABELS),
    "numbers": Case(
        Mlp(hidden=(4,)),
        TABLE,
        {"centralize_gradients": True, "l1": 1e-3, "l2": 1e-3},
        sets.PAIR,
        augment=(FeatureNoise(), FeatureDropout()),
    ),
    "texts": Case(TextBag(), WORDS, augment=(RandomInsertion(), RandomSwap())),
    "found": Case(Mlp(hidden=(4,)), TABLE, {"optimizer": Sgd(lr="auto"), "micro_batch_size": 8}),
}
MODELS = {
    "linear": Case(Linear(), TABLE),
    "resnet": Case(Resnet(blocks=(1, 1), widths=(4, 8)), PIXELS),
    "vit": Case(Vit(patch=4, width=8, depth=1, heads=2), PIXELS),
    "text_bag": Case(TextBag(ngrams=2, pooling="mean_max"), WORDS),
    "text_cnn": Case(TextCnn(channels=4), WORDS),
    "text_transformer": Case(TextTransformer(width=8, depth=1, heads=2), WORDS),
    "table_resnet": Case(TableResnet(width=8, depth=1), TABLE),
    "joint": Case(Joint(), (*TABLE, *WORDS, *PIXELS)),
}
OPTIMIZERS = {kind: Case(Mlp(hidden=(6,)), TABLE, {"optimizer": part()}) for kind, part in KINDS.items() if kind not in BEYOND}
JOBS = {path.stem: job(path) for path in sorted((ROOT / "jobs").glob("*.yaml"))}
GROUPS = {"mixed": MIXED, "models": MODELS, "optimizers": OPTIMIZERS, "jobs": JOBS}


def fit_of(case: Case, epochs: int) -> Fit:
    fixed = {"epochs": epochs, "batch_size": 20, "log_every": 1, "precision": "float64", "health": Health(every=2)}
    return Fit(seed=1, model=case.model, augment=case.augment, train=Train.model_validate(case.train | fixed))


def train(case: Case, data: Artifact, out: Path, device: torch.device, mode: AbstractContextManager[Any]) -> list[float]:
    """The losses of all steps, of which the second half comes after a restart from a checkpoint."""
    every = Resources.model_validate({"checkpoint": {"every": {"steps": 4}}})
    for epochs in (1, 2):
        out.mkdir(parents=True, exist_ok=True)
        given = worker.Assignment(fit=fit_of(case, epochs), resources=every, data=data.path, out=out, feed="resident")
        with mode:
            worker.Worker(given, 0, 1, device).run()
    assert len(list(metrics_log.read(out / "starts.jsonl"))) == 2
    return [line["loss"] for line in metrics_log.read(out / metrics_log.NAME) if "loss" in line]


def group(tools: str, home: Path, name: str, only: str | None = None) -> None:
    """Train the cases of a group, or one of them, on both devices; losses.json has {case: {device: losses}}."""
    pretence = pretending(tools)
    found: dict[str, dict[str, list[float] | str]] = {}
    for case_name, case in GROUPS[name].items():
        if only in (None, case_name):
            data = sets.prepared(home / case_name, sets.signature(*case.inputs, target=case.target), train=80, validation=40, test=20)
            out, acc = data.path.parent, pretence.ACC
            found[case_name] = {
                "cpu": _tried(partial(train, case, data, out / "cpu", torch.device("cpu"), nullcontext())),
                "accelerator": _tried(partial(train, case, data, out / "acc", acc, pretence.Mode())),
            }
    (home / "losses.json").write_text(json.dumps(found))


def waited(tools: str, home: Path, name: str, only: str | None = None) -> None:
    """Train the cases of a group there, logged as usual; waits.json has {case: waits for the device in steps 22 to 39}."""
    pretence = pretending(tools)
    found: dict[str, int | str] = {}
    between = Training._between_steps
    for case_name, case in GROUPS[name].items():
        if only not in (None, case_name) or case_name in ASKING:
            continue
        seen: list[int] = []

        def note(training: Training, seen: list[int] = seen) -> None:
            between(training)
            seen.append(pretence.SYNC[0] + pretence.D2H[0])

        Training._between_steps = note  # type: ignore[method-assign]
        data = sets.prepared(home / case_name, sets.signature(*case.inputs, target=case.target), train=80, validation=40, test=20)
        settings = case.train | {"epochs": 2, "batch_size": 4, "precision": "float64"}
        given = Fit(seed=1, model=case.model, augment=case.augment, train=Train.model_validate(settings))
        assignment = worker.Assignment(fit=given, data=data.path, out=data.path.parent / "acc", feed="resident")
        assignment.out.mkdir()
        try:
            with pretence.Mode():
                worker.Worker(assignment, 0, 1, pretence.ACC).run()
            found[case_name] = seen[38] - seen[20]
        except Exception as error:
            found[case_name] = f"{type(error).__name__}: {error}"
    Training._between_steps = between  # type: ignore[method-assign]
    (home / "waits.json").write_text(json.dumps(found))


def poisoned(tools: str, home: Path) -> None:
    """Train with gradients that are not finite in steps 14 and 15, on both devices; poisoned.json has the losses of each."""
    pretence = pretending(tools)

    def objective_of(*given: Any) -> Objective:
        objective = start.objective_of(*given)

        def infinite(model: Any, batch: Batch) -> Losses:
            losses = objective(model, batch)
            ill = noise.now.step is not None and noise.now.step[1] in (13, 14)
            return losses._replace(loss=losses.loss * torch.inf) if ill else losses

        return infinite

    training.objective_of = objective_of  # type: ignore[assignment]
    case = MIXED["mlp"]
    found: dict[str, Any] = {}
    data = sets.prepared(home, sets.signature(*case.inputs, target=case.target), train=80, validation=40, test=20)
    devices: list[tuple[str, torch.device, AbstractContextManager[Any]]] = [("cpu", torch.device("cpu"), nullcontext())]
    for name, device, mode in [*devices, ("accelerator", pretence.ACC, pretence.Mode())]:
        out = home / name
        out.mkdir()
        settings = case.train | {"epochs": 2, "batch_size": 4, "precision": "float64"}
        given = Fit(seed=1, model=case.model, augment=(), train=Train.model_validate(settings))
        every = Resources.model_validate({"checkpoint": {"every": {"steps": 4}}})
        with mode:
            worker.Worker(worker.Assignment(fit=given, resources=every, data=data.path, out=out, feed="resident"), 0, 1, device).run()
        found[name] = [line.get("loss") or line["train"]["loss"] for line in metrics_log.read(out / metrics_log.NAME)]
        found[f"{name} careful"] = checkpoints.glance(Disk(out / CHECKPOINTS))[1].careful  # type: ignore[index]
    (home / "poisoned.json").write_text(json.dumps(found))


def _tried(work: Callable[[], list[float]]) -> list[float] | str:
    """Or why there are none."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def tried(tools: str, home: Path) -> None:
    """The range test, and the search for the largest batch: tried.json has what both find, by device."""
    pretence = pretending(tools)
    data = sets.prepared(home, sets.signature(*TABLE, target=sets.THREE), train=80, validation=40, test=20)
    fit, found = fit_of(MIXED["mlp"], 1), {}
    devices: list[tuple[str, torch.device, AbstractContextManager[Any]]] = [("cpu", torch.device("cpu"), nullcontext())]
    for name, device, mode in [*devices, ("accelerator", pretence.ACC, pretence.Mode())]:
        with mode:
            sweep = swept(fit, load_network(fit, data).to(device), data, device)
            found[name] = [sweep.suggested, largest_batch(fit, data, device, 256 * MIB).rows]
    (home / "tried.json").write_text(json.dumps(found))
