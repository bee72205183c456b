"""Prometheus metrics of a served model, exact over all replicas of one host.

Each replica counts in memory-mapped files of one directory (prometheus_client's multiprocess mode, chosen by
PROMETHEUS_MULTIPROC_DIR when the library is imported), and whichever replica is asked adds up all of them. Counts of replicas
that were scaled away stay; their gauges go. Replicas on other hosts have a directory of their own: there each host must be
asked. Without the variable, as in tests, the counts are this process's.
"""

from __future__ import annotations

import os
from collections import Counter as Counts
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from dlopt.part import Target

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """The metrics of one model in this process."""

    def __init__(self, model: str, digest: str, target: Target) -> None:
        if directory := os.environ.get(DIRECTORY):
            Path(directory).mkdir(parents=True, exist_ok=True)
            _ask_for_the_process_once()
        self.registry = CollectorRegistry()
        self.model = model
        requests = self._counter("dlopt_requests", "Requests to predict, by HTTP status", ("model", "code"))
        self.rows = self._counter("dlopt_rows", "Rows predicted").labels(model)
        self.seconds = self._histogram("dlopt_request_seconds", "Time of a request in the replica, from its headers to its reply", SECONDS)
        self.batch_seconds = self._histogram("dlopt_batch_seconds", "Time of one run of the model; rows / runs is the mean batch", SECONDS)
        self.in_flight = self._gauge("dlopt_in_flight", "Requests in work", ("model",), "livesum").labels(model)
        self._gauge("dlopt_model_info", "Digest of the model that is served", ("model", "digest"), "livemax").labels(model, digest).set(1)
        self.request = cache(lambda code: requests.labels(model, str(code)))  # labels() costs more than inc()
        self.predicted: list[Counter] = []
        self.values: list[Summary] = []
        if target.kind == "number":
            numbers = Summary("dlopt_values", "Numbers predicted; sum / count is their mean", ("model", "column"), registry=self.registry)
            self.values = [numbers.labels(model, column) for column in target.columns]
        else:
            predictions = self._counter("dlopt_predictions", "Rows predicted, by the label they got", ("model", "label"))
            self.predicted = [predictions.labels(model, str(label)) for label in target.labels]

    def count(self, outputs: np.ndarray, decided: Sequence[Sequence[int]]) -> None:
        """Note rows that were predicted: outputs (rows, target.size), and the indices of the labels that each row got."""
        self.rows.inc(len(outputs))
        for index, rows in Counts(chain.from_iterable(decided)).items():
            self.predicted[index].inc(rows)
        for column, summary in enumerate(self.values):
            for value in outputs[:, column].tolist():
                summary.observe(value)

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        directory = os.environ.get(DIRECTORY)
        if not directory:
            return generate_latest(self.registry)
        _forget_the_dead(Path(directory))
        registry = CollectorRegistry()
        MultiProcessCollector(registry, directory)
        return generate_latest(registry)

    def _counter(self, name: str, text: str, labels: Sequence[str] = ("model",)) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str], mode: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry, multiprocess_mode=mode)  # type: ignore[arg-type]

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, ("model",), buckets=buckets, registry=self.registry).labels(self.model)


@cache
def _ask_for_the_process_once() -> None:
    """prometheus_client asks the system for the process's id at every count, in case that it has forked: a replica never does, and
    the asking costs a tenth of its throughput."""
    own = os.getpid()
    values.ValueClass = values.MultiProcessValue(lambda: own)


def _forget_the_dead(directory: Path) -> None:
    """Drop the gauges of replicas that ended, however they ended."""
    for pid in {path.stem.rpartition("_")[2] for path in directory.glob("gauge_live*_*.db")}:
        if pid.isdecimal() and not Path("/proc", pid).exists():
            mark_process_dead(int(pid), str(directory))
