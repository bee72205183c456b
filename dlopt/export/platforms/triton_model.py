"""A model of Triton's backend python that runs the ONNX file beside it. It is written into repositories, and imports nothing of dlopt."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime


class TritonPythonModel:
    """What the backend makes, once an instance."""

    session: Any

    def initialize(self, args: Mapping[str, str]) -> None:
        self.load(os.path.join(args["model_repository"], args["model_version"]))  # noqa: PTH118

    def load(self, folder: str) -> None:
        self.session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])

    def compute(self, tensors: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs by their places; the server gives strings as bytes."""
        given = {
            name: np.array([one.decode() if isinstance(one, bytes) else one for one in values.flat], dtype=object).reshape(values.shape)
            if values.dtype == object
            else values
            for name, values in tensors.items()
        }
        return list(self.session.run(None, given))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers in the order of the requests, each of any number of rows; those of one shape are computed together."""
        import triton_python_backend_utils as triton

        names = [one.name for one in self.session.get_inputs()]
        outputs = [one.name for one in self.session.get_outputs()]
        asked = [{name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in names} for request in requests]
        groups: dict[Any, list[int]] = {}
        for place, tensors in enumerate(asked):
            groups.setdefault(tuple(tensors[name].shape[1:] for name in names), []).append(place)
        answers: list[Any] = [None] * len(requests)
        for places in groups.values():
            try:
                found = self.compute({name: np.concatenate([asked[place][name] for place in places]) for name in names})
            except Exception as error:
                for place in places:
                    answers[place] = triton.InferenceResponse(error=triton.TritonError(str(error)))
                continue
            ends = np.cumsum([len(asked[place][names[0]]) for place in places])
            parts = [np.split(values, ends[:-1]) for values in found]
            for order, place in enumerate(places):
                given = [triton.Tensor(name, part[order]) for name, part in zip(outputs, parts, strict=True)]
                answers[place] = triton.InferenceResponse(output_tensors=given)
        return answers
