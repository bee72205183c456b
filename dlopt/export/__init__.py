"""Formats that a trained model is exported to: a file each, and its name here. Importing this imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dlopt.export.joblib import Joblib
from dlopt.export.onnx import Onnx
from dlopt.export.pickle import Pickle
from dlopt.export.platforms.openvino import OpenVino
from dlopt.export.platforms.tensorrt import TensorRt
from dlopt.export.platforms.torchserve import TorchServe
from dlopt.export.platforms.triton import Triton
from dlopt.export.safetensors import Safetensors
from dlopt.export.torch_export import TorchExport
from dlopt.export.torchscript import TorchScript

Format = Annotated[
    Onnx | TorchExport | TorchScript | Safetensors | Pickle | Joblib | Triton | TorchServe | OpenVino | TensorRt,
    Field(discriminator="kind"),
]
"""The list of what there is."""

__all__ = [
    "Format",
    "Joblib",
    "Onnx",
    "OpenVino",
    "Pickle",
    "Safetensors",
    "TensorRt",
    "TorchExport",
    "TorchScript",
    "TorchServe",
    "Triton",
]
