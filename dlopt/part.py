"""The nouns that everything shares: a Part of a job, the Signature of a model, and the one error that a user can mend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from dlopt.mistakes import lines_of

PROBABILITIES, VALUES = "probabilities", "values"
"""The names of a model's output, in the graph of every format and so in the server: of classes or labels, and of numbers."""


class DloptError(Exception):
    """Something that the user can mend, said in one line that names the field or file.

    Takes one string, so that it survives pickling on its way between Ray workers.
    """


class Part(BaseModel):
    """Anything that can be written in a job file: frozen, and strict about unknown keys and numbers that are none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    def __init__(self, **values: Any) -> None:
        """From a program: raises DloptError, with a line for each mistake, where pydantic would raise its own."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _said(error, type(self), f"{type(self).__name__}: ") from None

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # so that pydantic does not come by here with each inner part

    @classmethod
    def validated(cls, given: Any, where: str = "") -> Self:
        """From what a file or a request holds. Raises DloptError with a line for each mistake, which begins with `where`."""
        try:
            return super().model_validate(given)
        except ValidationError as error:
            raise _said(error, cls, where) from None

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """As pydantic's. Raises DloptError."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise _said(error, cls, f"{cls.__name__}: ") from None

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """As pydantic's. Raises DloptError."""
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise _said(error, cls, f"{cls.__name__}: ") from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """With other values, which are validated like all others. Raises DloptError."""
        copied = super().model_copy(deep=deep)
        return copied if update is None else type(self)(**{name: getattr(copied, name) for name in copied.model_fields_set} | dict(update))

    @model_validator(mode="before")
    @classmethod
    def yes_is_no_number(cls, given: Any) -> Any:
        """YAML reads `yes` and `on` as true, which pydantic would take for 1; the word it refuses, at the right field."""
        if not isinstance(given, dict):
            return given
        numbers = {name for name, field in cls.model_fields.items() if field.annotation not in (bool, str)}
        return {name: str(value).lower() if isinstance(value, bool) and name in numbers else value for name, value in given.items()}


def _said(error: ValidationError, part: type[Part], where: str) -> DloptError:
    return DloptError("\n".join(f"{where}{line}" for line in lines_of(error, part)))


class Feature(Part):
    """One input tensor of a model. In training every kind lies as numbers; in the graph categories are the strings themselves."""

    name: str
    """Name of the tensor in the model, in the ONNX graph and in requests."""
    kind: str
    """The kind of input that it comes from (see `dlopt.data.kinds`)."""
    dtype: Literal["uint8", "float32", "float64", "int32", "string"]
    """Their type in the ONNX graph: string for categories that the graph looks up itself, float64 for numbers with offsets."""
    shape: tuple[int, ...]
    """Shape of one row, without the batch dimension: (height, width, channels) of an image, (columns,) of numbers and
    categories, (columns x parts,) of dates, (most tokens,) of a text, which may be cut down to the longest of a batch."""
    columns: tuple[str, ...]
    """The columns of a raw row that the tensor is made of."""
    resize: bool = False
    """Whether an encoded image of another size is resized to this one; else it is refused."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Of an image: red, green and blue of what is behind transparent pixels."""
    indicators: bool = False
    """Of numbers: whether the model also sees, for each column, 1 where the value is missing, else 0."""
    vocabularies: tuple[tuple[str, ...], ...] = ()
    """Of categories, for each column: value i has the code i + 1, and 0 is for all that is unknown. Missing values are "" here."""
    missing: tuple[int, ...] = ()
    """Of categories, for each column: the code of a missing value."""
    types: tuple[Literal["string", "number", "boolean", "date"], ...] = ()
    """Of categories and texts, for each column: its type in the training source, by which its values have one text whatever way they
    come (see dlopt.data.types.canonical); () stands for strings."""
    markers: tuple[str, ...] = ()
    """Texts that say that a value is missing, beside null and an empty one."""
    buckets: int = 0
    """Of categories that are hashed: how many codes each column has; then there are no vocabularies."""
    offsets: tuple[float, ...] = ()
    """Of numbers and parts of dates that float32 would not tell apart: what is subtracted from each in float64 before it becomes
    float32, which the graph does itself; () where nothing is."""
    parts: tuple[str, ...] = ()
    """Of dates: what of each date the model sees."""
    form: str = ""
    """Of dates: how they are written, as strptime has it; ISO 8601 without it."""
    tokenizer: str = ""
    """Of a text: the tokenizer, as the JSON of the library `tokenizers`; id 0 is padding."""
    tokens: int = 0
    """Of a text: how many different ids there are."""

    @property
    def size(self) -> int:
        """How many numbers one row has."""
        return math.prod(self.shape)

    @property
    def holds(self) -> Literal["pixels", "numbers", "codes", "tokens"]:
        """What the numbers mean, which is all that a model has to know: pixels, measures of any kind with NaN where missing, codes of a
        vocabulary for each column, or ids of the tokens of one text."""
        if self.dtype == "uint8":
            return "pixels"
        if self.dtype in ("float32", "float64"):
            return "numbers"
        return "codes" if self.dtype == "string" or self.buckets else "tokens"

    @property
    def is_vector(self) -> bool:
        """Whether its numbers are components of one value, and not columns or parts of dates, of which each has a meaning of its own."""
        return self.holds == "numbers" and self.size > len(self.columns) * max(1, len(self.parts))

    @property
    def stored(self) -> Literal["uint8", "float32", "int32"]:
        """The type of the numbers on disk and in training."""
        return "int32" if self.dtype == "string" else "float32" if self.dtype == "float64" else self.dtype

    def type_of(self, column: str) -> Literal["string", "number", "boolean", "date"]:
        """The type of a column of categories or texts."""
        return self.types[self.columns.index(column)] if self.types else "string"

    @property
    def codes(self) -> tuple[int, ...]:
        """Of categories: how many codes each column has, the unknown one included."""
        return tuple(len(known) + 1 for known in self.vocabularies) if not self.buckets else (self.buckets,) * len(self.columns)


class Target(Part):
    """What the model predicts."""

    name: str
    """The column of the raw data; of several numbers, what they are called together."""
    kind: Literal["category", "multi_label", "number"] = "category"
    """One of several classes; any number of labels; numbers."""
    labels: tuple[int, ...] | tuple[str, ...] = ()
    """The classes or labels, sorted; label i is output i of the model. Of numbers there are none."""
    columns: tuple[str, ...] = ()
    """Of numbers: the column of each output."""
    offsets: tuple[float, ...] = ()
    """Of numbers that float32 would not tell apart: what is subtracted from each on disk and in training, and added in float64 to what
    comes out; () where nothing is."""
    positive: int | str | None = None
    """Of two classes: the one that precision, recall, F1 and ROC AUC are of."""
    thresholds: tuple[float, ...] = ()
    """The probability from which on a row is given the positive class, or each label; () is the likelier class, and one half."""

    @property
    def size(self) -> int:
        """How many outputs the model has."""
        return len(self.columns) if self.kind == "number" else len(self.labels)

    @property
    def names(self) -> tuple[str, ...]:
        """What it is called in the profile: by its columns where those are numbers."""
        return self.columns or (self.name,)

    @property
    def positive_index(self) -> int:
        """Of two classes: which one precision, recall, F1 and ROC AUC are of; the second one unless the job says otherwise."""
        return 1 if self.positive is None else [str(label) for label in self.labels].index(str(self.positive))

    @property
    def output(self) -> str:
        """The name of the model's output: probabilities of classes or labels, or values in the units of the data."""
        return VALUES if self.kind == "number" else PROBABILITIES

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row's target as it lies on disk: a class's index is one int64, labels are uint8 each, numbers float32 each."""
        return () if self.kind == "category" else (self.size,)

    @property
    def stored(self) -> Literal["int64", "uint8", "float32"]:
        """Its type on disk and in training."""
        return {"category": "int64", "multi_label": "uint8", "number": "float32"}[self.kind]  # type: ignore[return-value]


class Signature(Part):
    """The inputs and outputs of a model, found once in the data; nobody types a size twice."""

    inputs: tuple[Feature, ...]
    """In the order in which the model and the ONNX graph take them."""
    target: Target
    """What comes out."""

    @property
    def num_outputs(self) -> int:
        """How many outputs there are: classes, labels or numbers."""
        return self.target.size


class Statistics(Part):
    """What the training split says of one input tensor, per channel of an image or per column of numbers, in the data's units; and
    the preprocessing that follows from it, of numbers less the offsets of their feature, in this order: what lies outside of
    [lower, upper] is capped or missing, what is missing is filled, the logarithm is taken, then `(x - shift) * scale` or the place
    among the quantiles, then clipping."""

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
    fill: tuple[float, ...] = ()
    """What stands in for a missing value; of a target, nothing."""
    shift: tuple[float, ...]
    """What is subtracted."""
    scale: tuple[float, ...]
    """What the difference is multiplied by."""
    lower: tuple[float | None, ...] = ()
    """Below which values are outliers; () without any bounds, None for a column without one."""
    upper: tuple[float | None, ...] = ()
    """The other ends of these ranges."""
    outside: Literal["cap", "missing"] = "cap"
    """What becomes of a value outside of the bounds."""
    fill_by: str = ""
    """Of a fill by group: the column of a category input whose code chooses among `group_fill`."""
    group_fill: tuple[tuple[float, ...], ...] = ()
    """For each code of `fill_by`: what stands in for a missing value of each column."""
    log: bool = False
    """Whether sign(x) log(1 + |x|) is taken before shift and scale."""
    knots: tuple[tuple[float, ...], ...] = ()
    """For each column, quantiles at equal distances: the value becomes its place among them, in [0, 1]."""
    clip: float | None = None
    """Scaled values beyond this are cut off, on both sides."""
