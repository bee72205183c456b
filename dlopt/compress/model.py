"""A model while it is made small: its network, how its weights are kept, and the loop that trains it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from dlopt.artifact import Artifact, write_atomically
from dlopt.compress.base import Tuned
from dlopt.compress.distil import Distil
from dlopt.data.prepared import Split
from dlopt.export.coding import Code
from dlopt.export.graph import onnx_file
from dlopt.models import Network
from dlopt.optim.schedules import Cosine
from dlopt.part import Signature
from dlopt.progress import Progress, silent
from dlopt.train.checkpoint.stores import CHECKPOINTS
from dlopt.train.cluster import stopping
from dlopt.train.cluster.stopping import STOP, Stopped
from dlopt.train.job import Fit, Resources
from dlopt.train.progress.follow import followed
from dlopt.train.stage import told_by_sigterm
from dlopt.train.start import network_with, trained_network
from dlopt.train.tuning import Hold, Masked, Sparse, Teacher, Tuning, refuse_other, weights_of
from dlopt.train.watch.mistakes import mistake_of
from dlopt.train.worker import PREDICTIONS, Assignment, Worker

WEIGHTS, BEGINNING = "weights.safetensors", ".begin.safetensors"


@dataclass
class Model:
    """What compressors change."""

    network: Network
    """In float32, on the CPU, ready to predict."""
    fit: Fit
    """The section that it was fitted by."""
    data: Artifact
    original: Artifact
    """The model before it was compressed at all."""
    out: Path
    resources: Resources = field(default_factory=Resources)
    progress: Progress = silent
    coding: dict[str, Code] = field(default_factory=dict)
    """How weights are kept, by name; others are as they are."""
    graph: bytes | None = None
    """The ONNX file, where the network alone does not say what is computed."""
    tried: list[dict[str, Any]] = field(default_factory=list)
    """What was tried and not taken, for the report."""

    @property
    def signature(self) -> Signature:
        return Signature.model_validate_json(self.original.read("signature.json"))

    def onnx(self) -> bytes:
        """As an ONNX file, which keeps weights as `coding` says."""
        return self.graph or onnx_file(self.network, self.signature, self.original.manifest.digest, coding=self.coding)

    def keep(self, make: Callable[[np.ndarray], Code], leave: tuple[str, ...], matrices: bool = False) -> None:
        """Keep weights that are not kept in another way yet. matrices: those alone that layers multiply with."""
        for name, weight in weights_of(self.network, leave).items():
            layer = self.network.get_submodule(name.rpartition(".")[0])
            if name not in self.coding and not (matrices and isinstance(layer, nn.Embedding | nn.EmbeddingBag)):
                self.coding[name] = make(weight.detach().numpy())

    @torch.no_grad()
    def settle(self) -> None:
        """The network has the very numbers that are kept."""
        named = dict(self.network.named_parameters())
        for name, code in self.coding.items():
            named[name].copy_(torch.from_numpy(np.ascontiguousarray(code.values())).view_as(named[name]))

    def scratch(self, name: str) -> Path:
        """A folder for training of which nothing is to stay."""
        folder = self.out / CHECKPOINTS / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def tune(self, part: Tuned, hold: Hold | None) -> None:
        """Train on, from the weights as they are. Raises DloptError, and Stopped when told to end: the same command goes on from there."""
        beginning = self.out / BEGINNING
        write_atomically(beginning, save_tensors({name: value.contiguous() for name, value in self.network.state_dict().items()}))
        teacher = Teacher(model=self.original.path, data=self.data.path, alpha=part.teach) if part.teach else None
        if isinstance(hold, Sparse) and hold.scope == "movement":
            hold = hold.model_copy(update={"start": beginning.resolve()})
        self._train(part.epochs, part.rate, Tuning(model=beginning, hold=hold, teacher=teacher))
        beginning.unlink(missing_ok=True)

    def again(self, since: float, leave: tuple[str, ...]) -> None:
        """Train from the first weights, as the job says, and from this share of the steps on without those that are 0 now."""
        found = self.out / BEGINNING
        write_atomically(found, save_tensors({name: value.contiguous() for name, value in weights_of(self.network, leave).items()}))
        self._train(self.fit.train.epochs, None, Tuning(hold=Masked(file=found.resolve(), since=since, leave=leave)))
        found.unlink(missing_ok=True)

    def learn(self, part: Distil, teacher: Teacher) -> None:
        """Train by another network. Raises DloptError, among it where that is of another signature."""
        refuse_other(Signature.model_validate_json(Artifact.open(teacher.model).read("signature.json")), self.signature)
        if part.fresh:
            self._train(part.epochs or self.fit.train.epochs, None, Tuning(teacher=teacher))
            return
        beginning = self.out / BEGINNING
        write_atomically(beginning, save_tensors(dict(self.network.state_dict())))
        self._train(part.epochs or self.fit.train.epochs, 1.0, Tuning(model=beginning, teacher=teacher))
        beginning.unlink(missing_ok=True)

    def _train(self, epochs: int, rate: float | None, tuning: Tuning) -> None:
        """rate: share of the job's peak, which falls by a cosine; None for the job's own schedule."""
        train = self.fit.train
        changed: dict[str, Any] = dict.fromkeys(("early_stopping", "synchronization", "compression")) | {"epochs": epochs, "folds": 0}
        if rate is not None:
            peak = float(self.original.info.get("rate") or train.optimizer.lr)
            changed |= {"optimizer": train.optimizer.model_copy(update={"lr": peak * rate}), "schedule": Cosine(), "scale_lr": None}
            changed |= {"average": None, "lookahead": None}
        section = self.fit.model_copy(update={"train": train.model_copy(update=changed)})
        resources = Resources(checkpoint=self.resources.checkpoint.model_copy(update={"path": None}))
        assignment = Assignment(
            fit=section, data=self.data.path.resolve(), out=self.out.resolve(), feed="resident", resources=resources, tuning=tuning
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        stopping.take_back(self.out, STOP)
        split = Split.open(self.data, "train")
        with followed(self.out, section, split, resources, self._said), told_by_sigterm(self.out), stopping.training():
            try:
                info = Worker(assignment, 0, 1, device).run()
            except Exception as error:
                if mistake := mistake_of(error):
                    raise mistake from error
                raise
        assert info is not None
        if info["stopped"] == "asked":
            raise Stopped(f"stopped at step {info['steps']}: the same command goes on from there")
        self.network = network_with(self.fit, self.data, self.trained()).float().cpu()
        (self.out / PREDICTIONS).unlink(missing_ok=True)

    def trained(self) -> dict[str, Tensor]:
        """What the loop has left."""
        return load_file(self.out / WEIGHTS)

    def _said(self, stage: str, share: float | None, text: str) -> None:
        self.progress("compress", share, text)

    @classmethod
    def of(cls, before: Artifact, data: Artifact, original: Artifact, out: Path, resources: Resources, progress: Progress) -> Model:
        """Of an artifact that may be compressed already."""
        from dlopt.export.coding import FILE, read
        from dlopt.train.start import fit_of

        network = trained_network(before, data).float()
        coding = read(before.read(FILE)) if FILE in before.manifest.files else {}
        return cls(network, fit_of(before), data, original, out, resources, progress, coding)
