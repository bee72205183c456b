"""What a job says of its input and target columns. An input is a class in a file of its own here and its name in the union.

Each has five methods, which `prepare` calls in this order: `feature` (the tensor, from the first rows), `read` (raw columns to
columns on their way through prepare, with reasons for rows that cannot be read), `observe` (what some training rows say; two
of these merge), `fit` (the tensor and the statistics, from all training rows) and `finish` (the numbers that training reads).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dlopt.data.kinds.category import CategoryInput
from dlopt.data.kinds.date import DateInput
from dlopt.data.kinds.image import ImageInput
from dlopt.data.kinds.number import NumberInput
from dlopt.data.kinds.targets import AnyTarget, CategoryTarget, MultiLabelTarget, NumberTarget, ThresholdTarget
from dlopt.data.kinds.text import TextInput

Input = Annotated[ImageInput | NumberInput | CategoryInput | DateInput | TextInput, Field(discriminator="kind")]

__all__ = [
    "AnyTarget",
    "CategoryInput",
    "CategoryTarget",
    "DateInput",
    "ImageInput",
    "Input",
    "MultiLabelTarget",
    "NumberInput",
    "NumberTarget",
    "TextInput",
    "ThresholdTarget",
]
