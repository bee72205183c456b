"""What a tracker is: it is told every line that training writes, once and in order, and passes on what it likes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

from dlopt.part import DloptError

Line = dict[str, Any]
"""An object of metrics.jsonl, speed.jsonl, health.jsonl or starts.jsonl. A number that was not finite is None."""
What = Literal["start", "step", "epoch", "speed", "health", "undone"]
"""Which of a tracker's methods a line is for."""


class Tracker:
    """One place that the numbers go to, while it is open. What a tracker does not override it does not take.

    Any method may raise: that costs the line, and the user is told once.
    """

    def start(self, line: Line) -> None:
        """A group of workers sets out: {epoch, batch, step, workers, hosts, damaged, time}."""

    def step(self, line: Line) -> None:
        """A logged step: {step, epoch, rows, loss, rate, gradient_norm}."""

    def epoch(self, line: Line) -> None:
        """The end of an epoch: {epoch, step, train, validation, seconds}, the middle two {metric: value}; validation may be None."""

    def speed(self, line: Line) -> None:
        """About once a second: {step, epoch, rows, time, rows_per_second, step_seconds, data_wait, checkpoint_seconds,
        skipped_checkpoints, longest_checkpoint, workers, slow}."""

    def health(self, line: Line) -> None:
        """A look at the layers, {step, layers, gradient, weights, update, ...}, lists in the order of layers; or a roll-back."""

    def undone(self, line: Line) -> None:
        """{step}: training has gone back and taken another way, so what was said of this step and of later ones no longer holds."""

    def flush(self) -> None:
        """Called about once a second when there was something: time to send what was gathered."""

    def close(self, finished: bool) -> None:
        """The end. finished: training is done; else it has failed or was stopped, and may go on later."""

    def tell(self, what: What, line: Line) -> None:
        """Give a line to the method that it is for."""
        match what:
            case "start":
                self.start(line)
            case "step":
                self.step(line)
            case "epoch":
                self.epoch(line)
            case "speed":
                self.speed(line)
            case "health":
                self.health(line)
            case "undone":
                self.undone(line)


STEP, SPEED, NORMS = ("loss", "rate", "gradient_norm"), ("rows_per_second", "step_seconds", "data_wait"), ("gradient", "weights", "update")
"""The numbers of a line of each kind that are curves over steps."""


def curves_of_step(line: Line) -> dict[str, float]:
    """{"step/loss": ...}; a number that is not there is left out, here and below."""
    return _there({f"step/{name}": line[name] for name in STEP})


def curves_of_epoch(line: Line) -> dict[str, float]:
    """{"train/accuracy": ..., "validation/loss": ...}."""
    return _there({f"{split}/{name}": value for split in ("train", "validation") for name, value in (line[split] or {}).items()})


def curves_of_speed(line: Line) -> dict[str, float]:
    """{"speed/rows_per_second": ...}."""
    return _there({f"speed/{name}": line[name] for name in SPEED})


def curves_of_health(line: Line) -> dict[str, float]:
    """{"layers/gradient/encoder.0": ...}; nothing of a roll-back."""
    layers = line.get("layers", ())
    return _there({f"layers/{norm}/{layer}": line[norm][index] for norm in NORMS for index, layer in enumerate(layers)})


def _there(values: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def refuse_missing(package: str, extra: str) -> None:
    """Raises DloptError when a tracker's package is not installed."""
    if find_spec(package) is None:
        raise DloptError(f"resources.track: {extra} is not installed: pip install 'dlopt[{extra}]'")
