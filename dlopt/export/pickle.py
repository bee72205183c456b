"""Python's own format of objects."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dlopt.export.pickled import Pickled

if TYPE_CHECKING:
    from dlopt.export.estimator import Estimator


class Pickle(Pickled):
    """An estimator with scikit-learn's predict, predict_proba and classes_, in a pickle that needs numpy and onnxruntime alone where it is
    loaded. Unpickling executes what a file says: load only what you trust, or by dlopt.load_estimator, which compares its digest before."""

    use: ClassVar[str] = (
        "import pickle  # executes what the file says: compare its digest first (sha256sum -c model.pickle.sha256)\n"
        'labels = pickle.load(open("model.pickle", "rb")).predict(frame)'
    )
    file: ClassVar[str] = "model.pickle"

    kind: Literal["pickle"] = "pickle"

    @classmethod
    def dump(cls, made: Estimator) -> bytes:
        return pickle.dumps(made, protocol=4)

    @classmethod
    def unpickle(cls, content: bytes) -> Any:
        return pickle.loads(content)
