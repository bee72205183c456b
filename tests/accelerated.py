"""Training on a pretend accelerator, whose tensors must not be mixed with those of the CPU: fresh, and on from a checkpoint. Run by
`tests/test_accelerator.py` as a program, since the pretence changes torch: python -m tests.accelerated TOOLS FOLDER."""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from dlopt.artifact import Artifact
from dlopt.models import Cnn, FtTransformer, Mlp
from dlopt.optim.averages import Ema, Swa
from dlopt.optim.constraints import ClipAdaptive, ClipNorm, MaxNorm
from dlopt.optim.optimizers import Adam, AdamW, Sgd
from dlopt.optim.wrappers import Lookahead
from dlopt.part import Feature
from dlopt.train import worker
from dlopt.train.job import Fit, Resources, Train
from dlopt.train.loop.gradients import Sharpness
from dlopt.train.watch import metrics_log
from dlopt.train.watch.layers import Health
from tests import sets

TABLE, PIXELS = (sets.NUMBERS, sets.CATEGORIES), (sets.image(8, 8, 1),)
JOBS: dict[str, tuple[Any, tuple[Feature, ...], dict[str, Any]]] = {
    "mlp": (
        Mlp(hidden=(8, 8), dropout=0.2, norm="batch", residual=True),
        TABLE,
        {"optimizer": AdamW(lr=1e-2), "clip": ClipNorm(limit=0.5), "average": Ema(decay=0.9), "lookahead": Lookahead(steps=3)},
    ),
    "cnn": (
        Cnn(channels=(4,), hidden=8, dropout=0.2, block_dropout=0.1, dropout_kind="channel", norm="group"),
        PIXELS,
        {"optimizer": Sgd(momentum=0.9), "clip": ClipAdaptive(limit=0.1), "micro_batch_size": 7, "average": Swa()},
    ),
    "transformer": (
        FtTransformer(width=8, depth=1, heads=2, attention_dropout=0.2, dropout=0.1, dropout_kind="gaussian"),
        TABLE,
        {"optimizer": Adam(lr=1e-2), "sharpness": Sharpness(), "max_norm": MaxNorm(limit=2.0)},
    ),
}


def train(name: str, data: Artifact, out: Path, device: torch.device, mode: AbstractContextManager[Any]) -> list[float]:
    """The losses of all steps, of which the second half comes after a restart from a checkpoint."""
    model, _, settings = JOBS[name]
    every = Resources.model_validate({"checkpoint": {"every": {"steps": 4}}})
    for epochs in (1, 2):
        given = Train(epochs=epochs, batch_size=20, log_every=1, precision="float64", health=Health(every=2), **settings)
        fit = Fit(seed=1, model=model, augment=(), train=given)
        out.mkdir(parents=True, exist_ok=True)
        with mode:
            worker.Worker(worker.Assignment(fit=fit, resources=every, data=data.path, out=out, feed="resident"), 0, 1, device).run()
    assert len(list(metrics_log.read(out / "starts.jsonl"))) == 2
    return [line["loss"] for line in metrics_log.read(out / metrics_log.NAME) if "loss" in line]


def main(tools: str, home: Path) -> None:
    sys.path.insert(0, tools)
    import pretend_accelerator as pretence  # type: ignore[import-not-found]  # before torch goes backward for the first time

    torch.set_num_threads(1)
    found, data = {}, dict[str, Artifact]()
    for name, (_, inputs, _) in JOBS.items():
        data[name] = sets.prepared(home / name, sets.signature(*inputs, target=sets.THREE), train=80, validation=40, test=20)
        found[name] = {"cpu": train(name, data[name], home / name / "cpu", torch.device("cpu"), nullcontext())}
    for name in JOBS:
        found[name]["accelerator"] = train(name, data[name], home / name / "acc", pretence.ACC, pretence.Mode())
    (home / "losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
