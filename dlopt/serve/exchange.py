"""What passes between protocols and models: a request and an answer of columns, in nobody's dialect, and what passes between the web
and protocols: a call and its reply."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dlopt.data.kinds import RawColumns, kinds
from dlopt.part import Signature, Target

if TYPE_CHECKING:
    from dlopt.serve.models.model import Model
    from dlopt.serve.models.registry import Models
    from dlopt.serve.watch.metrics import Registry

THRESHOLD = 0.5
"""A row gets every label of a multi_label target without thresholds that is more probable, in the metrics as in the replies."""
Json = dict[str, Any]
HeaderList = tuple[tuple[bytes, bytes], ...]


class Refusal(Exception):
    """A request that gets an error as its reply, and why in one word, for the metrics."""

    def __init__(self, status: int, message: str, reason: str = "request") -> None:
        super().__init__(message)
        self.status, self.message, self.reason = status, message, reason


class Request(NamedTuple):
    """What a model is asked: raw values by column, as `dlopt.data.kinds.encode_columns` takes them."""

    columns: RawColumns
    rows: int


class Answer:
    """What a model says: outputs (rows, target.size), and the indices of the labels that each row got. A slice has some of its rows."""

    __slots__ = ("decided", "finite", "outputs", "target", "whole")

    def __init__(self, target: Target, outputs: np.ndarray, decided: list[list[int]], whole: bool = False) -> None:
        """whole: whether it is part of a finite answer."""
        self.target, self.outputs, self.decided = target, outputs, decided
        self.finite = whole or bool(np.isfinite(outputs).all())
        self.whole = self.finite
        """Whether the run that it came from had none but finite outputs."""

    def __len__(self) -> int:
        return len(self.outputs)

    def __getitem__(self, rows: slice) -> Answer:
        part = Answer(self.target, self.outputs[rows], self.decided[rows], self.whole)
        part.whole = self.whole
        return part

    def columns(self) -> dict[str, list[Any]]:
        """A list over the rows for each name. Raises Refusal when outputs are not finite, which no protocol can say alike.

        | target | columns |
        |---|---|
        | category | label, probabilities |
        | multi_label | labels (any number of them for a row), probabilities |
        | number | one for each number |
        """
        self.check()
        labels = self.target.labels
        if self.target.kind == "category":
            return {"label": [labels[best] for (best,) in self.decided], "probabilities": self.outputs.tolist()}
        if self.target.kind == "multi_label":
            return {"labels": [[labels[index] for index in row] for row in self.decided], "probabilities": self.outputs.tolist()}
        shortest = self.outputs.T.astype(str).astype(np.float64)  # 3.2 and not 3.200000047683716, which is the same float32
        return dict(zip(self.target.columns, shortest.tolist(), strict=True))

    def check(self) -> None:
        """Raises Refusal when an output is not finite."""
        if not self.finite:
            raise Refusal(500, "the model's output is not finite for this input", "output")


def decisions(target: Target, outputs: np.ndarray) -> list[list[int]]:
    """The labels that each row of outputs gets, by their indices: one of classes, any number of labels, and of numbers none.

    A row gets the likeliest class, and the labels with more than THRESHOLD; or, where the signature has thresholds, the positive class
    or the labels that reach theirs.
    """
    if target.kind == "category" and target.thresholds:
        positive = target.positive_index
        least = np.float32(target.thresholds[0])
        return [[positive] if reached else [1 - positive] for reached in (outputs[:, positive] >= least).tolist()]
    if target.kind == "category":
        return [[best] for best in outputs.argmax(axis=1).tolist()]
    if target.kind == "multi_label":
        given = outputs >= np.array(target.thresholds, np.float32) if target.thresholds else outputs > THRESHOLD
        return [np.flatnonzero(row).tolist() for row in given]
    return [[]] * len(outputs)


class Column(NamedTuple):
    """What a client may send for one name, or finds in a reply: for protocols whose clients ask for it before they ask anything else."""

    name: str
    kind: str
    """That of an input; of a reply label, labels, probabilities or number."""
    dtype: str
    """uint8, float32, float64, int64, bool or string."""
    shape: tuple[int, ...]
    """Of one row; -1 is any size."""

    @property
    def is_image(self) -> bool:
        """Whether a value may be an encoded image."""
        return self.kind in kinds and kinds[self.kind].holds == "pixels"


def inputs_of(signature: Signature) -> list[Column]:
    """The columns that a request must have, in the order of the model's inputs; one that several inputs are made of stands once."""
    found: dict[str, Column] = {}
    for feature in signature.inputs:
        for name in feature.columns:
            found.setdefault(name, Column(name, feature.kind, *kinds[feature.kind].sent(feature)))
    return list(found.values())


def form_of(signature: Signature) -> list[Json]:
    """The fields of the page to try the model (see `dlopt.data.kinds.base.Field`)."""
    return [field for feature in signature.inputs for field in kinds[feature.kind].widgets(feature)]


def outputs_of(target: Target) -> list[Column]:
    """The columns of an answer."""
    if target.kind == "number":
        return [Column(column, "number", "float64" if target.offsets else "float32", ()) for column in target.columns]
    kind = "string" if isinstance(target.labels[0], str) else "int64"
    label = Column("label", "label", kind, ()) if target.kind == "category" else Column("labels", "labels", kind, (-1,))
    return [label, Column("probabilities", "probabilities", "float32", (target.size,))]


def thresholds_of(target: Target) -> list[float]:
    """From where on a label is given: for each of multi_label, for the positive class of two; none where the likeliest is given."""
    return list(target.thresholds) or [THRESHOLD] * (target.size if target.kind == "multi_label" else 0)


class Reply(NamedTuple):
    """What goes back to the client."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: HeaderList = ()


def json_reply(value: Any, status: int = 200, headers: HeaderList = ()) -> Reply:
    """A value as JSON."""
    return Reply(status, json.dumps(value).encode(), headers=headers)


@dataclass
class Call:
    """One request of a client, of which a protocol makes a reply."""

    method: str
    path: str
    query: bytes
    headers: Mapping[bytes, bytes]
    models: Models
    counts: Registry
    body: Callable[[Call], Awaitable[bytes]]
    check_ready: Callable[[], Awaitable[None]]
    """Raises Refusal unless the whole app is ready."""
    model: Model | None = None
    """The one that the call turned out to be about; for headers and metrics."""
    counted: bool = False
    """Whether it is a request to predict."""
    role: str = "admin"
    """What the client's key allows."""
    who: str = ""
    """The client's key by its name, or by the beginning of its digest; "" where none is asked for."""
    id: bytes = b""
    """What the request is called in its reply and in the log."""
    cookie: str = ""
    """What lets a browser in whose user has given the key in the address."""

    @property
    def content_type(self) -> str:
        """Without its parameters, in small letters."""
        return self.headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()

    async def read(self) -> bytes:
        """The body, decompressed, within the limits. Raises Refusal."""
        return await self.body(self)

    def find(self, name: str, version: str | None = None, label: str | None = None) -> Model:
        """The model that is asked for, noted. Raises Refusal."""
        self.model = self.models.find(name, version, label, self.counted)
        return self.model

    def needs_admin(self) -> None:
        """Raises Refusal for a key that may only predict."""
        if self.role != "admin":
            raise Refusal(403, "this key may only predict", "role")


Handler = Callable[[Call], Awaitable[Reply]]
"""What answers a call."""


@cache
def product_version() -> str:
    """Of dlopt, as it is installed."""
    try:
        return version("dlopt")
    except PackageNotFoundError:
        return "0"
