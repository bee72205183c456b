"""Formats that a trained model is exported to; a file each, and its name here. Importing this imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dlopt.part import Part


class Onnx(Part):
    """One self-contained ONNX file: lookup of categories, preprocessing, model and probabilities in one graph, any number of rows."""

    kind: Literal["onnx"] = "onnx"
    tolerance: float = Field(1e-5, gt=0)
    """The export is refused when an output differs by more than this from torch's on any row of the test split: a probability, or a
    number in standard deviations of the training rows (beyond what the rounding of float32 is)."""


Format = Onnx
"""The list of what there is; becomes a union by `kind` with the second one."""
