"""What a format is: a part that writes files, and says how its own runtime computes with them. Importing this imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from dlopt.part import DloptError, Part

if TYPE_CHECKING:
    import numpy as np

    from dlopt.export.trained import Trained

Compute = Callable[["dict[str, np.ndarray]"], "np.ndarray"]
"""Tensors of some rows, by the names of the signature's inputs, to probabilities or numbers, (rows, outputs)."""


class ExportFormat(Part):
    """A format of the trained model. One is a subclass in a file of its own, and its name in the union of `dlopt.export`."""

    package: ClassVar[str] = ""
    """What must be installed beside dlopt's own packages, as it is imported."""
    extra: ClassVar[str] = ""
    """The extra of dlopt that has it."""
    of_onnx: ClassVar[bool] = True
    """Whether it holds an ONNX graph, and so one that was changed since it was traced."""
    strings: ClassVar[bool] = True
    """Whether it looks categories up itself; else it takes their codes, as the vocabularies of signature.json have them."""
    use: ClassVar[str]
    """How to run it, in Python."""
    file: ClassVar[str]
    """The name of what it writes: the file to take away, if there is one alone."""

    if TYPE_CHECKING:
        kind: str

    tolerance: float = Field(1e-5, gt=0)
    """The export is refused when an output differs by more than this from torch's on any row of the test split: a probability, or a
    number in standard deviations of the training rows (beyond what the rounding of float32 is)."""

    drop: float = Field(0.005, ge=0)
    """Of a lower precision, and of weights that are whole numbers, which runtimes multiply with what they round as well: how much of
    accuracy (or micro F1, or relatively of RMSE) on the test split it may cost beside torch."""

    @property
    def name(self) -> str:
        """Tells it from other exports of a run."""
        return self.kind

    @property
    def rounds(self) -> bool:
        """Whether its numbers are coarser than float32, so that what counts is what becomes of the metric."""
        return False

    def check(self) -> None:
        """Raises DloptError where a package is missing."""
        try:
            if self.package:
                importlib.import_module(self.package)
        except ImportError:
            raise DloptError(f"export: {self.kind}: needs the package {self.package}: pip install 'dlopt[{self.extra}]'") from None

    def write(self, trained: Trained, out: Path) -> dict[str, Any]:
        """Write the files into a folder; returns what the manifest is to say of them. Raises DloptError for what cannot be said in it."""
        raise NotImplementedError

    def load(self, out: Path, trained: Trained) -> Compute:
        """The files as the format's own runtime computes with them."""
        raise NotImplementedError
