"""A model that is served: one version of one export in onnxruntime, with its limits, its batches and its readiness. Imports neither torch
nor Ray: it starts fast and stays small."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnxruntime

from dlopt.artifact import Artifact
from dlopt.data.kinds import encode_columns
from dlopt.data.kinds.pixels import MOST_PIXELS
from dlopt.part import Feature, Signature
from dlopt.serve import Serve
from dlopt.serve.exchange import Answer, Refusal, Request, decisions
from dlopt.serve.models.batcher import Batcher, Tensors, rows_in
from dlopt.serve.watch.drift import Drift
from dlopt.serve.watch.metrics import Metrics, Registry

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
"""onnxruntime's words for what may compute."""
LARGE = 256 * 1024
"""Bodies from here on are decoded in a thread, so that other requests go on meanwhile."""
INLINE_PIXELS = 2**14
"""And so are bodies whose images may have more pixels than this together, about a millisecond's work."""
DECODERS = 2
"""Threads for this, or as many as the model has: one large image does not hold up all others, and few are in memory at a time."""
FLUSH_SECONDS = 0.1
FRESH_SECONDS, ANSWER_SECONDS = 1.0, 5.0
"""Whoever asks for readiness has the model asked, at most once in so many seconds; and how long the model may take to answer."""
WARM_UPS, WARM_UP_SECONDS = 3, 0.5
logger = logging.getLogger(__name__)
Kept = TypeVar("Kept")


class Predictor:
    """Tensors to outputs, `max_batch` rows at a time, so that a large request needs no more memory than a small one."""

    def __init__(self, content: bytes, signature: Signature, threads: int = 1, max_batch: int = 64, provider: str = "cpu") -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning threads starve the other replicas
        self.session = onnxruntime.InferenceSession(content, options, providers=_providers(provider))
        if self.session.get_providers()[0] != PROVIDERS[provider]:
            logger.warning("serve.provider: %s: this onnxruntime has none, or no device for it: the CPU computes", provider)
        self.signature, self.max_batch = signature, max_batch
        self.output = [signature.target.output]
        self.blank = {feature.name: _blank(feature) for feature in signature.inputs}
        """A row that every model takes, to see whether it answers."""

    @classmethod
    def load(cls, export: Artifact, section: Serve) -> Predictor:
        """From an export artifact, its files checked against their seal. Raises DloptError."""
        signature = Signature.model_validate_json(export.read("signature.json"))
        return cls(export.read("model.onnx"), signature, section.threads, section.max_batch, section.provider)

    def __call__(self, tensors: Tensors) -> np.ndarray:
        """Outputs (rows, target.size) of encoded rows: probabilities, or numbers."""
        rows = rows_in(tensors)
        if rows <= self.max_batch:
            return self.session.run(self.output, tensors)[0]
        starts = range(0, rows, self.max_batch)
        parts = ({name: values[start : start + self.max_batch] for name, values in tensors.items()} for start in starts)
        return np.concatenate([self.session.run(self.output, part)[0] for part in parts])

    def warm_up(self) -> float:
        """Run one row, and a batch unless that takes long, a few times: no client waits for memory; returns a row's seconds."""
        many = {name: np.repeat(values, self.max_batch, axis=0) for name, values in self.blank.items()}
        seconds = 0.0
        for _ in range(WARM_UPS):
            start = time.perf_counter()
            self(self.blank)
            seconds = time.perf_counter() - start
            if seconds * self.max_batch < WARM_UP_SECONDS:
                self(many)
        return seconds


class Model:
    """One version of a model: requests of columns to answers of columns."""

    def __init__(
        self, export: Artifact, name: str, section: Serve, registry: Registry, version: str = "1", profile: Path | None = None
    ) -> None:
        """profile: of the training rows, which drift is measured against. Raises DloptError."""
        self.predictor = Predictor.load(export, section)
        self.signature = self.predictor.signature
        self.name, self.version, self.digest, self.section = name, version, export.manifest.digest, section
        self.metrics = Metrics(registry, name, version, self.digest, self.signature.target)
        limits = section.max_batch, self.metrics.observe_run, section.latency_target, section.request_seconds
        self.batcher = Batcher(self._answered, *limits, self.predictor.warm_up())
        self.drift = _drift(self.signature, profile)
        self.most_pixels = sum(_most_pixels(feature) for feature in self.signature.inputs)
        self.decoders = ThreadPoolExecutor(max(DECODERS, section.threads), "decode")
        self.in_flight = 0
        self.answered = time.monotonic()
        self.flush: asyncio.TimerHandle | None = None
        self.headers = ((b"x-model-digest", self.digest.encode()),)

    async def predict(self, body: bytes, parse: Callable[[bytes, Signature], tuple[Request, Kept]], images: int) -> tuple[Answer, Kept]:
        """What the model says to a body.

        parse: makes of the body a request, and whatever the protocol needs for its reply. images: how many encoded ones the body may hold
        at most. Raises Refusal or DloptError.
        """
        if self.in_flight >= self.section.max_waiting:
            raise Refusal(429, "too many requests at once: try again in a moment", "overload")
        self.in_flight += 1
        if self.flush is None:
            self._flush_in_flight()
        try:
            if self._is_quick(body, images):
                tensors, kept = self._decode(body, parse)
            else:
                tensors, kept = await asyncio.get_running_loop().run_in_executor(self.decoders, self._decode, body, parse)
            answer = await self.batcher(tensors)
        finally:
            self.in_flight -= 1
        if not answer.whole:
            answer.check()
            self.metrics.count(answer.outputs, answer.decided)
        return answer, kept

    def _answered(self, tensors: Tensors) -> Answer:
        """One run. What is the same for all its requests is done once: rows are counted here, unless some are no answer."""
        outputs = self.predictor(tensors)
        answer = Answer(self.signature.target, outputs, decisions(self.signature.target, outputs))
        if answer.finite:
            self.metrics.count(outputs, answer.decided)
            if self.drift is not None:
                self.drift.note(tensors, outputs, answer.decided)
        return answer

    def tell_drift(self) -> None:
        """Write how far the last rows are from the training rows; called now and then."""
        if self.drift is not None and (found := self.drift.figures()) is not None:
            self.metrics.tell_drift(found, self.drift.rows)

    async def check_ready(self) -> None:
        """Ready means that the model answers now, not that it once did. Raises Refusal."""
        if time.monotonic() - self.answered > FRESH_SECONDS:
            try:
                await asyncio.wait_for(asyncio.to_thread(self.predictor, self.predictor.blank), ANSWER_SECONDS)
            except Exception as error:
                logger.warning("not ready", exc_info=True)
                raise Refusal(503, f"the model does not answer: {type(error).__name__}", "unready") from error
            self.answered = time.monotonic()

    def _decode(self, body: bytes, parse: Callable[[bytes, Signature], tuple[Request, Kept]]) -> tuple[Tensors, Kept]:
        request, kept = parse(body, self.signature)
        if request.rows > self.section.max_rows:
            raise Refusal(400, f"{request.rows} rows in one request, at most {self.section.max_rows} are taken (serve.max_rows)")
        return encode_columns(self.signature, request.columns), kept

    def _is_quick(self, body: bytes, images: int) -> bool:
        """Whether a body is decoded in less time than a thread would cost: it is small, and so are its images."""
        return len(body) < LARGE and images * self.most_pixels <= INLINE_PIXELS

    def _flush_in_flight(self) -> None:
        """Write the gauge while there are requests: ten times a second is enough, and costs them nothing."""
        self.metrics.in_flight.set(self.in_flight)
        loop = asyncio.get_running_loop()
        self.flush = loop.call_later(FLUSH_SECONDS, self._flush_in_flight) if self.in_flight else None

    def close(self) -> None:
        """When it is unloaded and its last request is answered: ends its threads."""
        self.metrics.gone()
        self.decoders.shutdown(wait=False)


def _providers(name: str) -> list[str]:
    """Those of them that this build of onnxruntime has, and the CPU."""
    there = onnxruntime.get_available_providers()
    return [found for found in dict.fromkeys((PROVIDERS[name], PROVIDERS["cpu"])) if found in there]


def _drift(signature: Signature, profile: Path | None) -> Drift | None:
    """A profile that cannot be read keeps no model from being served."""
    if profile is None:
        return None
    try:
        return Drift(signature, json.loads(profile.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        logger.warning("%s cannot be read: drift is not measured", profile, exc_info=True)
        return None


def _most_pixels(feature: Feature) -> int:
    """How many pixels an encoded image may have that is sent for an input."""
    if feature.holds != "pixels":
        return 0
    return MOST_PIXELS if feature.resize else feature.shape[0] * feature.shape[1]


def _blank(feature: Feature) -> np.ndarray:
    """One row of zeros, or of missing categories."""
    if feature.dtype == "string":
        return np.full((1, *feature.shape), "", dtype=object)
    return np.zeros((1, *feature.shape), feature.dtype)
