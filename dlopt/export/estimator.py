"""A model as an estimator in scikit-learn's manner, whose whole code goes into a pickle with it: who loads one needs numpy and onnxruntime.

A pickle holds the text of this file and of `dlopt.data.types.canonical` before it (`source`), which unpickling executes: so this imports
nothing else of dlopt, and no name of it is one of the other's. Texts need the package tokenizers beside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from typing import Any

import numpy as np

from dlopt.data.types.canonical import as_number, as_text

SOURCE = ""
"""The text that made this module, where it came out of a pickle."""
UNPICKLED = "lambda source, name, *given: [exec(source, space := {'__name__': 'estimator', 'SOURCE': source}), space[name](*given)][1]"
"""An expression, since a pickle can call `eval` wherever it is loaded."""


class Unpickler:
    """In a pickle, the function that makes an estimator of a source."""

    def __call__(self, source: str, name: str, *given: Any) -> Any:
        return eval(UNPICKLED)(source, name, *given)

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (UNPICKLED,)


class Estimator:
    """A trained model: `predict` of raw rows as they were trained on.

    Rows are a DataFrame, a dict of columns, a list of dicts, or an array whose columns are `feature_names_in_` (of one image or text: the
    images, or the texts). What is missing is NaN or None.
    """

    def __init__(self, content: bytes, signature: str, source: str = "") -> None:
        self.onnx_, self.signature_, self.source_ = content, signature, source or SOURCE
        known = json.loads(signature)
        self.inputs_, self.target_ = known["inputs"], known["target"]
        names = list(dict.fromkeys(name for feature in self.inputs_ for name in feature["columns"]))
        self.feature_names_in_, self.n_features_in_ = np.array(names, dtype=object), len(names)
        self.session_: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Unpickler(), (self.source_, type(self).__name__, self.onnx_, self.signature_)

    def outputs(self, X: Any) -> np.ndarray:
        """Probabilities or numbers, (rows, outputs). Raises ValueError naming the row and the column."""
        columns = self._columns(X)
        return self.compute({feature["name"]: ENCODERS[feature["kind"]](feature, columns) for feature in self.inputs_})

    def compute(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """The same of the tensors that the graph takes."""
        if self.session_ is None:
            import onnxruntime

            self.session_ = onnxruntime.InferenceSession(self.onnx_, providers=["CPUExecutionProvider"])
        return np.asarray(self.session_.run(None, dict(tensors))[0])

    def _columns(self, X: Any) -> dict[str, list[Any] | np.ndarray]:
        """What the model takes of some rows, by column."""
        names = [str(name) for name in self.feature_names_in_]
        if hasattr(X, "column_names"):  # pyarrow
            X = {name: X[name].to_pylist() for name in names if name in X.column_names}
        elif hasattr(X, "columns"):
            X = {name: X[name] for name in names if name in list(X.columns)}
        elif isinstance(X, (list, tuple)) and X and isinstance(X[0], Mapping):
            absent = next(((place, name) for place, row in enumerate(X) for name in names if name not in row), None)
            if absent:
                raise ValueError(f"row {absent[0]}: has no column {absent[1]!r}")
            X = {name: [row[name] for row in X] for name in names}
        if isinstance(X, Mapping):
            absent_name = next((name for name in names if name not in X), None)
            if absent_name:
                raise ValueError(f"there is no column {absent_name!r}: the model takes {', '.join(names)}")
            return {name: column_values(X[name]) for name in names}
        if len(names) == 1 and (self.inputs_[0]["kind"] in ("image", "vector") or np.ndim(X) == 1):
            return {names[0]: column_values(X)}
        rows = np.asarray(X, dtype=None if hasattr(X, "dtype") else object)
        if rows.ndim != 2 or rows.shape[1] != len(names):
            raise ValueError(f"an array of shape {rows.shape}, where (rows, {len(names)}) is needed: {', '.join(names)}")
        return {name: column_values(rows[:, place]) for place, name in enumerate(names)}


class Classifier(Estimator):
    """Of classes, or of any number of labels a row, which come as a matrix of 0 and 1."""

    _estimator_type = "classifier"

    def __init__(self, content: bytes, signature: str, source: str = "") -> None:
        super().__init__(content, signature, source)
        self.classes_ = np.array(self.target_["labels"])

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities in the order of `classes_`, float32 (rows, classes)."""
        return self.outputs(X)

    def predict(self, X: Any) -> np.ndarray:
        """The class of each row, or of labels a matrix of 0 and 1, (rows, labels)."""
        return self.decided(self.outputs(X))

    def decided(self, found: np.ndarray) -> np.ndarray:
        """The same of probabilities, (rows, classes)."""
        least = np.array(self.target_["thresholds"], dtype=np.float32)
        if self.target_["kind"] == "multi_label":
            return (found >= least if least.size else found > 0.5).astype(np.int64)
        if not least.size:
            return np.asarray(self.classes_[found.argmax(axis=1)])
        labels, given = [str(label) for label in self.target_["labels"]], self.target_["positive"]
        positive = 1 if given is None else labels.index(str(given))
        return np.asarray(self.classes_[np.where(found[:, positive] >= least[0], positive, 1 - positive)])

    def score(self, X: Any, y: Any) -> float:
        """The share of rows that are right."""
        right = self.predict(X) == np.asarray(y)
        return float(right.reshape(len(right), -1).all(axis=1).mean())


class Regressor(Estimator):
    """Of numbers, in the units of the data."""

    _estimator_type = "regressor"

    def predict(self, X: Any) -> np.ndarray:
        """A number a row, (rows,), or (rows, numbers) of several."""
        found = self.outputs(X)
        return found[:, 0] if found.shape[1] == 1 else found

    def score(self, X: Any, y: Any) -> float:
        """R2, the mean of those of several numbers."""
        found, real = self.outputs(X).astype(np.float64), np.asarray(y, dtype=np.float64).reshape(-1, len(self.target_["columns"]))
        return float((1 - ((found - real) ** 2).sum(axis=0) / ((real - real.mean(axis=0)) ** 2).sum(axis=0)).mean())


def column_values(values: Any) -> list[Any] | np.ndarray:
    """A column as an array of numbers, or as a list of plain values, None where missing."""
    if hasattr(values, "to_numpy"):
        values = values.to_numpy()
    if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
        return values
    if isinstance(values, np.ndarray) and values.dtype.kind == "M":
        return list(values.astype("datetime64[us]").tolist())
    return [one_value(value) for value in values]


def one_value(value: Any) -> Any:
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    return value.item() if isinstance(value, np.generic) else value


def encoded_numbers(feature: Mapping[str, Any], columns: Mapping[str, Any]) -> np.ndarray:
    found = [
        values.astype(np.float64) if isinstance(values, np.ndarray) else np.array(each_number(feature, name, values))
        for name, values in ((name, columns[name]) for name in feature["columns"])
    ]
    return fitting(feature, np.stack(found, axis=1), feature["columns"])


def each_number(feature: Mapping[str, Any], name: str, values: list[Any]) -> list[float]:
    numbers = []
    for row, value in enumerate(values):
        if value is None or (isinstance(value, str) and value in ("", *feature["markers"])):
            numbers.append(np.nan)
            continue
        try:
            numbers.append(as_number(value))
        except ValueError:
            raise ValueError(f"row {row}: {name}: {value!r:.40} is not a number") from None
    return numbers


def fitting(feature: Mapping[str, Any], values: np.ndarray, names: list[str]) -> np.ndarray:
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    if np.isinf(single).any():
        row, place = np.argwhere(np.isinf(single))[0]
        raise ValueError(f"row {row}: {names[min(place, len(names) - 1)]}: a number is too large")
    return values if feature["dtype"] == "float64" else single


def encoded_vectors(feature: Mapping[str, Any], columns: Mapping[str, Any]) -> np.ndarray:
    (name,), (size,) = feature["columns"], feature["shape"]
    values = columns[name]
    if not isinstance(values, np.ndarray):
        rows = [[np.nan] * size if value is None else each_number(feature, name, list(value)) for value in values]
        wrong = next((row for row, value in enumerate(rows) if len(value) != size), None)
        if wrong is not None:
            raise ValueError(f"row {wrong}: {name}: a list of {len(rows[wrong])} where {size} numbers are needed")
        values = np.array(rows).reshape(len(rows), size)
    return fitting(feature, values, [name])


def encoded_categories(feature: Mapping[str, Any], columns: Mapping[str, Any]) -> np.ndarray:
    types = feature["types"] or ["string"] * len(feature["columns"])
    found = [
        [as_text(value, kind, feature["markers"]) for value in (values.tolist() if isinstance(values, np.ndarray) else values)]
        for kind, values in zip(types, (columns[name] for name in feature["columns"]), strict=True)
    ]
    if not feature["buckets"]:
        return np.array(found, dtype=object).T.reshape(len(found[0]), len(found))
    hashed = [[hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts] for texts in found]
    return np.array([[int.from_bytes(word, "little") % feature["buckets"] for word in words] for words in hashed], dtype=np.int32).T


DATE_PARTS: dict[str, Callable[[datetime], float]] = {
    "year": lambda moment: moment.year,
    "quarter": lambda moment: (moment.month + 2) // 3,
    "month": lambda moment: moment.month,
    "week": lambda moment: moment.isocalendar().week,
    "day": lambda moment: moment.day,
    "day_of_year": lambda moment: moment.timetuple().tm_yday,
    "weekday": lambda moment: moment.weekday(),
    "hour": lambda moment: moment.hour,
    "minute": lambda moment: moment.minute,
    "second": lambda moment: moment.second,
    "days": lambda moment: (moment - datetime(1970, 1, 1)).total_seconds() / 86_400,
}


def encoded_dates(feature: Mapping[str, Any], columns: Mapping[str, Any]) -> np.ndarray:
    rows = zip(*([one_moment(feature, name, *one) for one in enumerate(columns[name])] for name in feature["columns"]), strict=True)
    found = [
        [np.nan if moment is None else DATE_PARTS[part](moment) for moment in row for part in feature["parts"]]
        for row in rows
    ]  # fmt: skip
    return np.array(found, dtype=feature["dtype"]).reshape(len(found), *feature["shape"])


def one_moment(feature: Mapping[str, Any], name: str, row: int, value: Any) -> datetime | None:
    """In UTC."""
    if value is None or value != value or (isinstance(value, str) and value in ("", *feature["markers"])):
        return None
    try:
        if isinstance(value, str):
            value = datetime.strptime(value.strip(), feature["form"]) if feature["form"] else datetime.fromisoformat(value.strip())
        if not isinstance(value, datetime):
            value = datetime(value.year, value.month, value.day) if isinstance(value, date) else None
    except ValueError:
        value = None
    if value is None:
        raise ValueError(f"row {row}: {name}: is not a date")
    return value.astimezone(UTC).replace(tzinfo=None) if value.tzinfo else value


def encoded_texts(feature: Mapping[str, Any], columns: Mapping[str, Any]) -> np.ndarray:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError(f"{', '.join(feature['columns'])}: texts need the package tokenizers: pip install tokenizers") from None
    types = feature["types"] or ["string"] * len(feature["columns"])
    texts = [
        [as_text(value, kind, feature["markers"]) for value in columns[name]]
        for name, kind in zip(feature["columns"], types, strict=True)
    ]  # fmt: skip
    tokenizer, (most,) = Tokenizer.from_str(feature["tokenizer"]), feature["shape"]
    cut = json.loads(feature["tokenizer"])["truncation"]["direction"].lower()
    tokenizer.enable_truncation(most, direction=cut)
    whole = [" ".join(row).encode("utf-8", "replace").decode() for row in zip(*texts, strict=True)]
    found = [row.ids for row in tokenizer.encode_batch(whole)]
    values = np.zeros((len(found), max(1, *map(len, found))) if found else (0, 1), dtype=np.int32)
    for row, ids in enumerate(found):
        values[row, : len(ids)] = ids
    return values


def encoded_images(feature: Mapping[str, Any], columns: Mapping[str, Any]) -> np.ndarray:
    (name,), shape = feature["columns"], tuple(feature["shape"])
    try:
        values = np.asarray(columns[name])
        size = int(np.prod(shape))
        if values.dtype.kind not in "biuf" or values.size != len(values) * size:
            raise ValueError
    except ValueError:
        raise ValueError(f"{name}: images must be numbers from 0 to 255, (rows, {', '.join(map(str, shape))})") from None
    pixels = values.astype(np.uint8)
    if (pixels != values).any():
        raise ValueError(f"{name}: pixels must be whole numbers from 0 to 255")
    return pixels.reshape(len(values), *shape)


ENCODERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], np.ndarray]] = {
    "number": encoded_numbers,
    "vector": encoded_vectors,
    "category": encoded_categories,
    "date": encoded_dates,
    "text": encoded_texts,
    "image": encoded_images,
}
"""Kind of an input to what makes its tensor of columns, as `encode_rows` of `dlopt.data.kinds` does."""
