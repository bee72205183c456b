"""joblib's files of objects."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dlopt.export.pickled import Pickled

if TYPE_CHECKING:
    from dlopt.export.estimator import Estimator


class Joblib(Pickled):
    """The estimator of `pickle` as a file of joblib, compressed: it needs numpy, onnxruntime and joblib where it is loaded. Loading
    executes what a file says: load only what you trust, or by dlopt.load_estimator, which compares its digest before."""

    package: ClassVar[str] = "joblib"
    extra: ClassVar[str] = "sklearn"
    use: ClassVar[str] = (
        "import joblib  # executes what the file says: compare its digest first (sha256sum -c model.joblib.sha256)\n"
        'labels = joblib.load("model.joblib").predict(frame)'
    )
    file: ClassVar[str] = "model.joblib"

    kind: Literal["joblib"] = "joblib"

    @classmethod
    def dump(cls, made: Estimator) -> bytes:
        import joblib

        content = io.BytesIO()
        joblib.dump(made, content, compress=("zlib", 3))
        return content.getvalue()

    @classmethod
    def unpickle(cls, content: bytes) -> Any:
        import joblib

        return joblib.load(io.BytesIO(content))
