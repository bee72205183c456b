"""Engines of TensorRT-RTX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from dlopt.artifact import write_atomically
from dlopt.export.base import Compute, ExportFormat
from dlopt.part import DloptError

if TYPE_CHECKING:
    from dlopt.export.trained import Trained


def as_float(content: bytes) -> bytes:
    """An ONNX file whose inputs of bytes become float32 at once: TensorRT does nothing else with bytes."""
    import onnx

    model = onnx.load_from_string(content)
    casts = []
    for value in model.graph.input:
        if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8:
            casts.append(onnx.helper.make_node("Cast", [value.name], [f"{value.name} float"], to=onnx.TensorProto.FLOAT))
            for node in model.graph.node:
                node.input[:] = [f"{value.name} float" if name == value.name else name for name in node.input]
    nodes = list(model.graph.node)
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend([*casts, *nodes])
    return bytes(model.SerializeToString())


class TensorRt(ExportFormat):
    """An engine of TensorRT-RTX for NVIDIA's GPUs, built without one, and the ONNX file that it was built of: tensors by the names of
    signature.json, categories as their codes. An engine cannot be run without a GPU, so the proof is of its ONNX file."""

    package: ClassVar[str] = "tensorrt_rtx"
    extra: ClassVar[str] = "tensorrt"
    strings: ClassVar[bool] = False
    use: ClassVar[str] = (
        "import tensorrt_rtx\n"
        "runtime = tensorrt_rtx.Runtime(tensorrt_rtx.Logger())\n"
        'engine = runtime.deserialize_cuda_engine(open("model.engine", "rb").read())  # needs a GPU of these compute capabilities'
    )
    file: ClassVar[str] = "model.engine"

    kind: Literal["tensorrt"] = "tensorrt"
    capabilities: tuple[Literal["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"], ...] = Field(("SM80", "SM86", "SM89"), min_length=1)
    """The GPUs that it runs on, by their compute capabilities."""
    rows: int = Field(64, ge=1)
    """The most rows that it takes at once."""

    def write(self, trained: Trained, out: Path) -> dict[str, Any]:
        from dlopt.export.graph import written

        content = as_float(written(trained, strings=False))
        write_atomically(out / "model.onnx", content)
        write_atomically(out / self.file, self._engine(content, trained))
        return {"not_run": "an engine needs a GPU; its ONNX file was compared", "capabilities": list(self.capabilities)}

    def _engine(self, content: bytes, trained: Trained) -> bytes:
        import tensorrt_rtx

        builder = tensorrt_rtx.Builder(tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR))
        network = builder.create_network()
        parser = tensorrt_rtx.OnnxParser(network, builder.logger)
        if not parser.parse(content):
            raise DloptError(
                f"export: the model cannot be written as a TensorRT engine: {' '.join(parser.get_error(0).desc().split())[:200]}"
            )
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        for feature in trained.signature.inputs:
            sizes = ((1, 1), (self.rows, 1), (self.rows, feature.shape[0])) if feature.holds == "tokens" else None
            least, usual, most = sizes or [(rows, *feature.shape) for rows in (1, self.rows, self.rows)]
            profile.set_shape(feature.name, least, usual, most)
        config.add_optimization_profile(profile)
        config.num_compute_capabilities = len(self.capabilities)
        for place, name in enumerate(self.capabilities):
            config.set_compute_capability(getattr(tensorrt_rtx.ComputeCapability, name), place)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise DloptError(f"export: tensorrt: no engine can be built for {', '.join(self.capabilities)}: try other capabilities")
        return bytes(engine)

    def load(self, out: Path, trained: Trained) -> Compute:
        """Its ONNX file."""
        from dlopt.export.graph import session_of

        return session_of((out / "model.onnx").read_bytes(), trained.signature)
