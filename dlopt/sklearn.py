"""scikit-learn estimators: `fit` runs a job on Ray in a home of its own, `predict` asks its ONNX file. Tables of numbers, and DataFrames
with categories, dates and texts as well.

They pass scikit-learn's own checks (`check_estimator`). What they do not do: `sample_weight`, sparse matrices, several targets at once.
Outputs are those of float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np

from dlopt.part import DloptError

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
except ImportError as error:
    raise DloptError(f"dlopt.sklearn: needs scikit-learn 1.6 or newer: pip install 'dlopt[sklearn]' ({error})") from None

TARGET = "target of the fit"
STEPS, LEAST_EPOCHS, MOST_EPOCHS = 2000, 5, 100
"""About how many steps a fit has by default, and between how many epochs."""


class FitError(DloptError, ValueError):
    """What cannot be fitted, as scikit-learn expects it."""


class _Estimator(BaseEstimator):
    """What both have in common."""

    def __init__(
        self,
        *,
        model: Mapping[str, Any] | None = None,
        train: Mapping[str, Any] | None = None,
        random_state: int = 0,
        home: str | Path | None = None,
        verbose: bool = False,
    ) -> None:
        self.model, self.train, self.random_state, self.home, self.verbose = model, train, random_state, home, verbose

    def fit(self, X: Any, y: Any) -> Self:
        """Train on all rows. X: an array of numbers, NaN being missing, or a DataFrame. y: a value a row. Raises FitError, a ValueError."""
        table, inputs, goal = self._table(X, y, fitting=True)
        rows = len(goal)
        batch = next(size for size in (16, 32, 64, 128, 256) if size == 256 or rows < 64 * size)
        epochs = min(MOST_EPOCHS, max(LEAST_EPOCHS, STEPS * batch // max(rows, 1)))
        job = {
            "name": type(self).__name__.lower(),
            "seed": self.random_state,
            "data": {"inputs": inputs, "target": self._target(), "split": {"kind": "random", "train": 1, "validation": 0, "test": 0}},
            "model": dict(self.model) if self.model else {"kind": "joint"},
            "train": {"epochs": epochs, "batch_size": batch} | dict(self.train or {}),
        }
        self._run(job, table | {TARGET: goal})
        return self

    def _run(self, job: dict[str, Any], columns: dict[str, Any]) -> None:
        from dlopt.api.running import run
        from dlopt.runs import exported

        with ExitStack() as stack:
            home = self.home or stack.enter_context(tempfile.TemporaryDirectory(prefix="dlopt-"))
            try:
                done = run(job, data=columns, home=home, progress=None if self.verbose else False)
            except DloptError as error:
                raise FitError(str(error)) from None
            _, export = exported(done.folder)
            self.signature_ = export.read("signature.json").decode()
            self.onnx_ = export.read("model.onnx")
            self.run_ = str(done.folder) if self.home else None
        self._open()

    def _open(self) -> None:
        """A session of onnxruntime on the file's bytes."""
        from dlopt.api.predict import Model
        from dlopt.part import Signature

        self._model = Model(self.onnx_, Signature.model_validate_json(self.signature_))

    def _outputs(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "onnx_")
        table, _, _ = self._table(X, None, fitting=False)
        try:
            return self._model.outputs(table).astype(np.float64)
        except DloptError as error:
            raise FitError(str(error)) from None

    def _table(self, X: Any, y: Any, fitting: bool) -> tuple[dict[str, Any], list[dict[str, Any]], Any]:
        """Columns by name, the inputs that they make, and the checked target."""
        if hasattr(X, "dtypes") and hasattr(X, "columns") and any(not _is_number(kind) for kind in X.dtypes):
            found = validate_data(self, X, skip_check_array=True, reset=fitting)
            goal = self._goal(column_or_1d(y, warn=True)) if fitting else None
            columns = {str(name): found[name] for name in found.columns}
            return columns, self._inputs(columns, goal) if fitting else [], goal
        if fitting:
            array, y = validate_data(self, X, y, ensure_all_finite="allow-nan", y_numeric=self._y_numeric, dtype=np.float64)
            goal = self._goal(y)
        else:
            array, goal = validate_data(self, X, ensure_all_finite="allow-nan", dtype=np.float64, reset=False), None
        names = [f"x{place}" for place in range(array.shape[1])]
        return dict(zip(names, array.T, strict=True)), [{"kind": "number", "columns": names, "normalize": "standard"}], goal

    def _inputs(self, columns: dict[str, Any], goal: Any) -> list[dict[str, Any]]:
        """What the columns of a DataFrame seem to be."""
        from dlopt.api.begun import begin

        with tempfile.TemporaryDirectory(prefix="dlopt-") as home:
            try:
                job = begin({**columns, TARGET: goal}, TARGET, home=home).job
            except DloptError as error:
                raise FitError(str(error)) from None
        return [part.model_dump(mode="json", exclude_unset=True) | {"kind": part.kind} for part in job.data.inputs]

    def __getstate__(self) -> dict[str, Any]:
        """A session cannot be pickled, and is made anew from the file's bytes."""
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_model"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "onnx_" in state:
            self._open()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    _y_numeric = False

    def _target(self) -> dict[str, Any]:
        raise NotImplementedError

    def _goal(self, y: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class Classifier(ClassifierMixin, _Estimator):
    """A classifier of any number of classes.

    model: a job's `model`, as {"kind": "mlp", "hidden": [64]}; joint by default. train: values of its `train` section, as {"epochs": 20}.
    random_state: the job's seed. home: where runs are kept, with their reports; by default nothing is. verbose: show progress.
    """

    def _target(self) -> dict[str, Any]:
        return {"kind": "category", "column": TARGET}

    def _goal(self, y: np.ndarray) -> np.ndarray:
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise FitError(f"Classifier: y has one class only ({self.classes_[0]!r}): there is nothing to learn")
        return codes.astype(np.int64)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities, float64 (rows, classes), in the order of `classes_`."""
        return self._outputs(X)

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each row."""
        outputs = self._outputs(X)
        return np.asarray(self.classes_[outputs.argmax(axis=1)])


class Regressor(RegressorMixin, _Estimator):
    """A regressor of one number; its parameters are the classifier's."""

    _y_numeric = True

    def _target(self) -> dict[str, Any]:
        return {"kind": "number", "columns": [TARGET]}

    def _goal(self, y: np.ndarray) -> np.ndarray:
        return np.asarray(y, dtype=np.float64)

    def predict(self, X: Any) -> np.ndarray:
        """A number a row, float64."""
        return self._outputs(X)[:, 0]


def _is_number(kind: Any) -> bool:
    return getattr(kind, "kind", "O") in "biuf"
