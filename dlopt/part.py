"""The nouns that everything shares: a Part of a job, the Signature of a model, and the one error that a user can mend."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

OUTPUT = "probabilities"
"""The name of the model's output, in the graph of every format and so in the server."""


class DloptError(Exception):
    """Something that the user can mend, said in one line that names the field or file.

    Takes one string, so that it survives pickling on its way between Ray workers.
    """


class Part(BaseModel):
    """Anything that can be written in a job file: frozen, and strict about unknown keys and numbers that are none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def yes_is_no_number(cls, given: Any) -> Any:
        """YAML reads `yes` and `on` as true, which pydantic would take for 1; the word it refuses, at the right field."""
        if not isinstance(given, dict):
            return given
        numbers = {name for name, field in cls.model_fields.items() if field.annotation not in (bool, str)}
        return {name: str(value).lower() if isinstance(value, bool) and name in numbers else value for name, value in given.items()}


class Feature(Part):
    """One input tensor of a model."""

    name: str
    """Name of the tensor in the model, in the ONNX graph and in requests."""
    kind: Literal["image", "number"]
    """What the numbers mean: pixels, or a column each."""
    dtype: Literal["uint8", "float32"]
    """Their type in the ONNX graph and on disk."""
    shape: tuple[int, ...]
    """Shape of one row, without the batch dimension: (height, width, channels) of an image, (columns,) of numbers."""
    columns: tuple[str, ...]
    """The columns of a raw row that the tensor is made of."""
    resize: bool = False
    """Whether an encoded image of another size is resized to this one; else it is refused."""

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
    """In the order in which the model and the ONNX graph take them."""
    target: Target
    """What comes out."""

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
    """How many of them are missing; the rest of the numbers is of those that are there, and 0 where none is."""
    min: tuple[float, ...]
    """Least value."""
    max: tuple[float, ...]
    """Greatest value."""
    mean: tuple[float, ...]
    """Arithmetic mean."""
    std: tuple[float, ...]
    """Population standard deviation (ddof 0), as scikit-learn's StandardScaler."""
    fill: tuple[float, ...]
    """What stands in for a missing value."""
    shift: tuple[float, ...]
    """What is subtracted."""
    scale: tuple[float, ...]
    """What the difference is multiplied by."""
