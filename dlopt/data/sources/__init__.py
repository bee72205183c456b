"""Where raw data comes from. A source knows its files, shows a few rows without Ray, and reads all of them with Ray Data."""

from typing import Annotated

from pydantic import Field

from dlopt.data.sources.huggingface import HuggingFace
from dlopt.data.sources.images import Images, ImageTable, Texts
from dlopt.data.sources.kinds import infer_kind
from dlopt.data.sources.lines import Csv, JsonLines
from dlopt.data.sources.memory import from_data
from dlopt.data.sources.sample import Sample
from dlopt.data.sources.tables import Arrow, Parquet

Source = Annotated[Sample | Parquet | Arrow | Csv | JsonLines | Images | ImageTable | Texts | HuggingFace, Field(discriminator="kind")]

__all__ = [
    "Arrow",
    "Csv",
    "HuggingFace",
    "ImageTable",
    "Images",
    "JsonLines",
    "Parquet",
    "Sample",
    "Source",
    "Texts",
    "from_data",
    "infer_kind",
]
