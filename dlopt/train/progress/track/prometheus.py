"""Training metrics for Prometheus, which asks for them while training runs.

They are served by the driver, the process of `dlopt run`, on its loopback address alone. When the driver is far, as in a job that was
submitted to a cluster, a Prometheus on that machine scrapes them, or `ssh -L 9464:127.0.0.1:9464 HOST` brings them here. They end with
training, so scrape every few seconds what trains for minutes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import Field

from dlopt.part import DloptError, Part
from dlopt.train.progress.track.tracker import NORMS, Line, Tracker

LAYERS = 100
"""The most layers whose norms are served, the first ones of the network: each of them is three series."""


class Prometheus(Part):
    """Serve training metrics to Prometheus while training runs, at http://127.0.0.1:PORT/metrics on the machine of `dlopt run`."""

    kind: Literal["prometheus"] = "prometheus"
    port: int = Field(9464, ge=1, le=65535)
    """Port to listen on, of 127.0.0.1 alone."""

    def check(self) -> None:
        """All that it needs comes with dlopt."""

    def open(self, out: Path, settings: Mapping[str, Any]) -> Tracker:
        """Raises DloptError when the port is taken."""
        return Served(self.port, out.name)


GAUGES = {
    "loss": "Loss of the newest logged step, over its whole batch",
    "learning_rate": "Learning rate of the newest logged step",
    "gradient_norm": "Norm of the gradient of the newest logged step, before clipping",
    "epoch": "The epoch under way, from 1",
    "rows_per_second": "Training rows per second, over all workers",
    "step_seconds": "Seconds of a step",
    "data_wait_ratio": "Share of the time that worker 0 waited for data, 0 to 1",
    "workers": "Workers that train",
    "last_step_timestamp_seconds": "When worker 0 last said that it trains, in seconds since 1970",
}
COUNTERS = {
    "steps": "Steps taken, those taken again after a restart among them",
    "rows": "Rows trained on, those trained on again after a restart among them",
    "checkpoint_seconds": "Seconds that training stood still for checkpoints",
    "restarts": "Times that a group of workers set out again",
    "rollbacks": "Times that training diverged and went back to a checkpoint",
}
PREFIX = "dlopt_train_"


class Served(Tracker):
    """The newest of each number, and the server that shows them. It is a collector of prometheus_client, made anew at every scrape."""

    def __init__(self, port: int, run: str) -> None:
        self.run = run
        self.gauges: dict[str, float] = {}
        self.counters = dict.fromkeys(COUNTERS, 0.0)
        self.last = dict.fromkeys(COUNTERS, 0.0)
        self.started = False
        self.metrics: dict[tuple[str, ...], float] = {}
        self.norms: dict[tuple[str, ...], float] = {}
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self.server, self.thread = start_http_server(port, "127.0.0.1", registry)
        except OSError as error:
            raise DloptError(f"resources.track: prometheus: cannot listen on port {port} ({error.strerror}): give another one") from None

    def start(self, line: Line) -> None:
        self._set(workers=line["workers"])
        self.counters["restarts"] += self.started
        self.started = True
        self._back(line["step"])
        self.last["checkpoint_seconds"] = 0.0

    def step(self, line: Line) -> None:
        self._set(loss=line["loss"], learning_rate=line["rate"], gradient_norm=line["gradient_norm"], epoch=line["epoch"])
        self._count("steps", line["step"])
        self._count("rows", line["rows"])

    def epoch(self, line: Line) -> None:
        for split in ("train", "validation"):
            self.metrics |= {(split, name): _number(value) for name, value in (line[split] or {}).items()}

    def speed(self, line: Line) -> None:
        self._set(epoch=line["epoch"], rows_per_second=line["rows_per_second"], step_seconds=line["step_seconds"])
        self._set(data_wait_ratio=line["data_wait"], workers=line["workers"], last_step_timestamp_seconds=line["time"])
        self._count("steps", line["step"])
        self._count("rows", line["rows"])
        self._count("checkpoint_seconds", line["checkpoint_seconds"])

    def health(self, line: Line) -> None:
        if "rollback" in line:
            self.counters["rollbacks"] += 1
            self._back(line["step"])
        for index, layer in enumerate(line.get("layers", ())[:LAYERS]):
            self.norms |= {(layer, norm): _number(line[norm][index]) for norm in NORMS}

    def close(self, finished: bool) -> None:
        self.server.shutdown()
        self.server.server_close()

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks for it, on a thread of its server."""
        for name, value in dict(self.gauges).items():
            yield self._family(GaugeMetricFamily, name, GAUGES[name], {(): value})
        for name, value in dict(self.counters).items():
            yield self._family(CounterMetricFamily, name, COUNTERS[name], {(): value})
        yield self._family(GaugeMetricFamily, "metric", "Metrics of the last whole epoch", dict(self.metrics), "split", "metric")
        yield self._family(GaugeMetricFamily, "layer_norm", "2-norm over a layer's weights", dict(self.norms), "layer", "of")

    def _family(self, kind: Any, name: str, text: str, values: Mapping[tuple[str, ...], float], *labels: str) -> Metric:
        family = kind(PREFIX + name, text, labels=("run", *labels))
        for given, value in values.items():
            family.add_metric((self.run, *given), value)
        return family

    def _set(self, **values: float | None) -> None:
        self.gauges |= {name: _number(value) for name, value in values.items()}

    def _count(self, name: str, value: float) -> None:
        """value: since the first step. Lines of different files need not come in the order of steps."""
        self.counters[name] += max(0.0, value - self.last[name])
        self.last[name] = max(value, self.last[name])

    def _back(self, step: int) -> None:
        """Training goes on from here: what it does again counts again, and counters do not go down. Rows are counted by their share."""
        share = min(1.0, step / max(self.last["steps"], 1))
        self.last |= {name: share * self.last[name] for name in ("steps", "rows")}


def _number(value: float | None) -> float:
    return math.nan if value is None else value
