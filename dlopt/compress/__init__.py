"""Making a trained model small: parts that follow each other, a file each, and their names here. Importing this imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dlopt.compress.base import Compressor
from dlopt.compress.budget import Budget
from dlopt.compress.distil import Distil
from dlopt.compress.float16 import Float16
from dlopt.compress.low_rank import LowRank
from dlopt.compress.prune import Prune
from dlopt.compress.quantize import Quantize
from dlopt.compress.share import Share
from dlopt.compress.structured import Structured

Compression = Annotated[Prune | Structured | LowRank | Share | Quantize | Float16 | Distil | Budget, Field(discriminator="kind")]
"""The list of what there is."""

__all__ = ["Budget", "Compression", "Compressor", "Distil", "Float16", "LowRank", "Prune", "Quantize", "Share", "Structured"]
