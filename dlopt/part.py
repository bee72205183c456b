"""The nouns that everything shares: a Part of a job, the Signature of a model, and the one error that a user can mend."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DloptError(Exception):
    """Something that the user can mend, said in one line that names the field or file.

    Takes one string, so that it survives pickling on its way between Ray workers.
    """


class Part(BaseModel):
    """Anything that can be written in a job file: frozen, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class Feature(Part):
    """One input tensor of a model."""

    name: str
    """Name of the tensor in the model, in the ONNX graph and in requests."""
    kind: Literal["image", "number"]
    dtype: Literal["uint8", "float32"]
    shape: tuple[int, ...]
    """Shape of one row, without the batch dimension: (height, width, channels) of an image, (columns,) of numbers."""
    columns: tuple[str, ...]
    """The columns of a raw row that the tensor is made of."""

    @property
    def size(self) -> int:
        """How many numbers one row has."""
        return math.prod(self.shape)


class Target(Part):
    """What the model predicts."""

    name: str
    """The column of the raw data."""
    kind: Literal["category"] = "category"
    labels: tuple[int, ...] | tuple[str, ...] = Field(min_length=2)
    """The classes, sorted; class i is output i of the model."""


class Signature(Part):
    """The inputs and outputs of a model, found once in the data; nobody types a size twice."""

    inputs: tuple[Feature, ...]
    target: Target

    @property
    def num_inputs(self) -> int:
        """How many numbers one row has over all the inputs."""
        return sum(feature.size for feature in self.inputs)

    @property
    def num_outputs(self) -> int:
        """How many classes there are."""
        return len(self.target.labels)


class Statistics(Part):
    """What the training split says of one input tensor, per channel of an image or per column of numbers, and the
    preprocessing that follows from it: `(where(isnan(x), fill, x) - shift) * scale`."""

    count: int
    """Values per channel or column, missing ones included."""
    missing: tuple[int, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Population standard deviation (ddof 0), as scikit-learn's StandardScaler."""
    fill: tuple[float, ...]
    shift: tuple[float, ...]
    scale: tuple[float, ...]
