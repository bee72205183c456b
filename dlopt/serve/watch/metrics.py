"""Prometheus metrics of served models, exact over all replicas.

Each replica counts in memory-mapped files of one directory (prometheus_client's multiprocess mode, chosen by
PROMETHEUS_MULTIPROC_DIR when the library is imported), and whichever replica is asked adds up all of them. Counts of replicas
that were scaled away stay; their gauges go. Replicas on other hosts have a directory of their own: each host tells the board what it has
counted, twice a second and whenever it is asked, and the sum is what the board knows of all of them; so whoever is asked next never says
less. Without the variable, as in the embedded server, the counts are this process's.

| name | what |
|---|---|
| dlopt_requests_total {model, version, protocol, code} | requests to predict, by HTTP status; model is "" where there is none of the name |
| dlopt_request_seconds {model, version, protocol} | from its headers to its reply |
| dlopt_queue_seconds, dlopt_inference_seconds {model, version} | the wait of a request for the model; one run of the model |
| dlopt_batch_rows {model, version} | rows of one run |
| dlopt_rows_total, dlopt_in_flight {model, version} | rows predicted; requests in work |
| dlopt_predictions_total {model, version, label} | rows predicted, by the label they got |
| dlopt_predicted_numbers_total {model, version, column, sign} | of numbers: the sum of the positive ones, and of the negative ones without
their sign: the mean is the difference of the two rates over that of rows |
| dlopt_rejected_total {reason} | calls that were refused: key, role, rate, overload, size, slow, timeout, request, model, ... |
| dlopt_model_info {model, version, digest} | 1 for what is served |
| dlopt_drift {model, version, what, column} | population stability index of an input or a prediction over the last ten minutes against
the training rows, of the replica where it is largest; 0 for fewer than 200 rows |
| dlopt_drift_rows {model, version} | rows that it is of |
| dlopt_canary_share {model, version} | per cent of the requests that a canary gets |
| dlopt_trial_total {model, version, kind, outcome} | what came of a canary's requests (answered, failed), and of comparing what it or a
shadow said (agreed, disagreed, dropped) |
| dlopt_rollbacks_total {model, version, why} | canaries that were taken back by themselves |
"""

from __future__ import annotations

import operator
import os
import secrets
import struct
import time
from collections import Counter as Counts
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector

from dlopt.part import Target

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
RUN_SECONDS = (0.00005, 0.0001, 0.00025, *SECONDS)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
ONE, PROTOCOL = ("model", "version"), ("model", "version", "protocol")
MOST_SERIES = 1000
SILENT_SECONDS = 10.0
"""A host that has told nothing for so long is taken for lost: its counts stay, and its gauges go."""
LARGEST = frozenset(("dlopt_canary_share", "dlopt_drift", "dlopt_model_info"))
"""Gauges of which the largest counts, and not the sum."""
Family = tuple[str, str, str, list[tuple[str, tuple[tuple[str, str], ...], float]]]
"""Of a metric its name, its text, its type, and the name, labels and value of each of its samples."""
Told = dict[str, tuple[float, bool, list[Family]]]
"""By host: when, by its own clock; whether it was heard lately; and what it has counted."""
READS = 3
"""How often a replica's files are read anew that begin or end meanwhile."""


class Registry:
    """What this process counts: one for each app, made when the first model is."""

    def __init__(self) -> None:
        if directory := os.environ.get(DIRECTORY):
            Path(directory).mkdir(parents=True, exist_ok=True)
            _ask_for_the_process_once()
        disable_created_metrics()  # a series more for each, which nobody asks for
        self.registry = CollectorRegistry()
        self.requests = self._counter("dlopt_requests", "Requests to predict, by HTTP status", (*PROTOCOL, "code"))
        self.seconds = self._histogram("dlopt_request_seconds", "Time of a request, from its headers to its reply", SECONDS, PROTOCOL)
        self.queue_seconds = self._histogram("dlopt_queue_seconds", "Time that a request waited for the model", RUN_SECONDS)
        self.inference_seconds = self._histogram("dlopt_inference_seconds", "Time of one run of the model", RUN_SECONDS)
        self.batch_rows = self._histogram("dlopt_batch_rows", "Rows of one run of the model", ROWS)
        self.rows = self._counter("dlopt_rows", "Rows predicted", ONE)
        self.predictions = self._counter("dlopt_predictions", "Rows predicted, by the label they got", (*ONE, "label"))
        self.numbers = self._counter("dlopt_predicted_numbers", "Sums of numbers predicted, by their sign", (*ONE, "column", "sign"))
        self.rejected = self._counter("dlopt_rejected", "Calls that were refused", ("reason",))
        self.in_flight = self._gauge("dlopt_in_flight", "Requests in work", ONE, "livesum")
        self.trials = self._counter("dlopt_trial", "What came of a canary's requests, or of a shadow's", (*ONE, "kind", "outcome"))
        self.rollbacks = self._counter("dlopt_rollbacks", "Canaries that were taken back by themselves", (*ONE, "why"))
        self.canary_share = self._gauge("dlopt_canary_share", "Per cent of the requests that a canary gets", ONE, "livemax")
        self.drift = self._gauge(
            "dlopt_drift", "How far the last rows are from the training rows (PSI)", (*ONE, "what", "column"), "livemax"
        )
        self.drift_rows = self._gauge("dlopt_drift_rows", "Rows that the drift is of", ONE, "livesum")
        self.info = self._gauge("dlopt_model_info", "1 for a model that is served", (*ONE, "digest"), "livemax")
        self.host = _host(Path(directory)) if directory else secrets.token_hex(8)
        self.request = lru_cache(MOST_SERIES)(self._request)  # labels() costs more than inc()

    def _request(self, model: str, version: str, protocol: str, code: int) -> tuple[Counter, Histogram]:
        return self.requests.labels(model, version, protocol, str(code)), self.seconds.labels(model, version, protocol)

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        directory = os.environ.get(DIRECTORY)
        return generate_latest(_collected(directory) if directory else self.registry)

    def told(self) -> tuple[str, float, list[Family]]:
        """What this host has counted, for the board: its name, when, and the metrics."""
        moment, directory = time.monotonic(), os.environ.get(DIRECTORY)
        found = (_collected(directory) if directory else self.registry).collect()
        samples = ((one, [(some.name, tuple(some.labels.items()), some.value) for some in one.samples]) for one in found)
        return self.host, moment, [(one.name, one.documentation, one.type, some) for one, some in samples]

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str], mode: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry, multiprocess_mode=mode)  # type: ignore[arg-type]

    def _histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ONE) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)


class Metrics:
    """The metrics of one model in this process."""

    def __init__(self, registry: Registry, model: str, version: str, digest: str, target: Target) -> None:
        one = (model, version)
        self.rows = registry.rows.labels(*one)
        self.queue_seconds, self.inference_seconds = registry.queue_seconds.labels(*one), registry.inference_seconds.labels(*one)
        self.batch_rows, self.in_flight = registry.batch_rows.labels(*one), registry.in_flight.labels(*one)
        self.info = registry.info.labels(*one, digest)
        self.info.set(1)
        self.predicted = [registry.predictions.labels(*one, str(label)) for label in target.labels]
        self.registry, self.one = registry, one
        self.numbers = [[registry.numbers.labels(*one, column, sign) for sign in ("positive", "negative")] for column in target.columns]

    def count(self, outputs: np.ndarray, decided: Sequence[Sequence[int]]) -> None:
        """Note rows that were predicted: outputs (rows, target.size), and the indices of the labels that each row got."""
        self.rows.inc(len(outputs))
        if len(decided) == 1:
            for index in decided[0]:
                self.predicted[index].inc()
        else:
            for index, rows in Counts(chain.from_iterable(decided)).items():
                self.predicted[index].inc(rows)
        for column, (positive, negative) in enumerate(self.numbers):
            numbers = outputs[:, column]
            positive.inc(float(numbers[numbers > 0].sum(dtype=np.float64)))
            negative.inc(float(-numbers[numbers < 0].sum(dtype=np.float64)))

    def observe_run(self, rows: int, seconds: float, waits: Sequence[float]) -> None:
        """Note one run of the model, and how long each of its requests has waited for it."""
        self.batch_rows.observe(rows)
        self.inference_seconds.observe(seconds)
        for wait in waits:
            self.queue_seconds.observe(wait)

    def tell_drift(self, found: Mapping[tuple[str, str], float], rows: int) -> None:
        """Note the drift of each column, by what it is and its name."""
        for (what, column), value in found.items():
            self.registry.drift.labels(*self.one, what, column).set(value)
        self.registry.drift_rows.labels(*self.one).set(rows)

    def gone(self) -> None:
        """The model is served no longer."""
        self.info.set(0)


def summed(told: Told) -> bytes:
    """The text that Prometheus reads of what all hosts have counted."""
    families = dict[str, Metric]()
    values = dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]]()
    for _, heard, found in told.values():
        for name, text, kind, samples in found:
            families.setdefault(name, Metric(name, text, kind))
            there = values.setdefault(name, {})
            for sample, labels, value in samples if heard or kind != "gauge" else ():
                before = there.get((sample, labels))
                add = max if name in LARGEST else operator.add
                there[sample, labels] = value if before is None else add(before, value)
    for name, there in values.items():
        for (sample, labels), value in there.items():
            families[name].add_sample(sample, dict(labels), value)
    return generate_latest(Collected(families.values()))


class Collected(CollectorRegistry):
    """Metrics as they were."""

    def __init__(self, found: Iterable[Metric]) -> None:
        super().__init__()
        self.found = list(found)

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        return iter(self.found)


def _collected(directory: str) -> Collected:
    """What all replicas of this host have counted."""
    _forget_the_dead(Path(directory))
    for _ in range(READS - 1):
        with suppress(FileNotFoundError, struct.error, ValueError):  # a replica has just begun its files, or ended
            return Collected(MultiProcessCollector(None, directory).collect())
        time.sleep(0.001)
    return Collected(MultiProcessCollector(None, directory).collect())


def _host(directory: Path) -> str:
    """What this host is called among the others: all of its replicas see the same."""
    path = directory / "host"
    with suppress(FileExistsError), path.open("x") as file:
        file.write(secrets.token_hex(8))
    while not (found := path.read_text()):  # another replica has just made it
        time.sleep(0.001)
    return found


def in_flight(directory: Path) -> float:
    """Requests in work in all replicas that count in a directory."""
    _forget_the_dead(directory)
    with suppress(FileNotFoundError, struct.error, ValueError):
        samples = chain.from_iterable(one.samples for one in Collected(MultiProcessCollector(None, str(directory)).collect()).found)
        return sum(sample.value for sample in samples if sample.name == "dlopt_in_flight")
    return 0.0


@cache
def _ask_for_the_process_once() -> None:
    """prometheus_client asks the system for the process's id at every count, in case that it has forked: a replica never does, and
    the asking costs a tenth of its throughput."""
    own = os.getpid()
    values.ValueClass = values.MultiProcessValue(lambda: own)


def _forget_the_dead(directory: Path) -> None:
    """Drop the gauges of replicas that ended, however they ended; another replica may be doing the same."""
    for path in directory.glob("gauge_live*_*.db"):
        pid = path.stem.rpartition("_")[2]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            path.unlink(missing_ok=True)
