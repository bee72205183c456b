"""Training metrics as TensorBoard's event files: `tensorboard --logdir` of their folder shows them while training runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dlopt.part import DloptError, Part
from dlopt.train.progress.track.tracker import (
    Line,
    Tracker,
    curves_of_epoch,
    curves_of_health,
    curves_of_speed,
    curves_of_step,
    refuse_missing,
)

FOLDER, EVENTS = "tensorboard", "events.out.tfevents.*"


class TensorBoard(Part):
    """Write training metrics for TensorBoard, as scalars over steps. Needs `pip install 'dlopt[tensorboard]'`."""

    kind: Literal["tensorboard"] = "tensorboard"
    folder: Path | None = None
    """Folder in which each run gets a folder, named by its model's digest; without it, `tensorboard` within the folder of the model."""

    def check(self) -> None:
        """Raises DloptError when the package is not there."""
        refuse_missing("tensorboard", "tensorboard")

    def open(self, out: Path, settings: Mapping[str, Any]) -> Tracker:
        """Raises DloptError when the folder cannot be written to."""
        self.check()
        folder = self.folder / out.name if self.folder else out / FOLDER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return Events(folder)
        except OSError as error:
            raise DloptError(f"resources.track: tensorboard: cannot write to {folder}: {error.strerror}") from None


class Events(Tracker):
    """The event files of one run. What an earlier process has left is written anew, since all lines are told from the first one on."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        for left in folder.glob(EVENTS):
            left.unlink()
        self.writer = SummaryWriter(str(folder))
        self.sped = -1

    def step(self, line: Line) -> None:
        self._add(curves_of_step(line), line)

    def epoch(self, line: Line) -> None:
        self._add(curves_of_epoch(line), line)

    def speed(self, line: Line) -> None:
        if line["step"] > self.sped:  # a restart takes steps again, at another speed
            self.sped = line["step"]
            self._add(curves_of_speed(line), line)

    def health(self, line: Line) -> None:
        self._add(curves_of_health(line), line)

    def undone(self, line: Line) -> None:
        """A file that begins with a purge makes TensorBoard drop what other files have of these steps."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer.close()
        self.writer = SummaryWriter(str(self.folder), purge_step=line["step"])
        self.sped = min(self.sped, line["step"] - 1)

    def flush(self) -> None:
        self.writer.flush()

    def close(self, finished: bool) -> None:
        self.writer.close()

    def _add(self, values: Mapping[str, float], line: Line) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, line["step"], walltime=line.get("time"))
