"""What clients speak: a file each, and its name here.

A protocol has a NAME, for the metrics; `route`, which says what answers a path, or None where it is none of its own; OPEN, the paths
that need no key; and `describe`, its part of the OpenAPI document. It makes a neutral request of columns of a body, asks a model, and
makes its reply of the answer's columns: see dlopt.serve.exchange.
"""

from __future__ import annotations

from typing import Protocol

from dlopt.serve.exchange import Handler, Json
from dlopt.serve.models.model import Model
from dlopt.serve.protocols import admin, pages, tensorflow
from dlopt.serve.protocols.inference import rest


class Dialect(Protocol):
    """What each of these modules has."""

    NAME: str
    OPEN: tuple[str, ...]

    def route(self, method: str, path: str) -> Handler | None:
        """What answers a request, or None. Raises Refusal when the path is the protocol's, but not so."""

    def describe(self, model: Model) -> Json:
        """The protocol's paths for a model, as OpenAPI 3.1 has them."""


DIALECTS: tuple[Dialect, ...] = (tensorflow, rest, admin, pages)
"""The list of what there is."""
