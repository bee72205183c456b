"""A client of a server of models: rows, DataFrames, arrays and images in, a DataFrame out.

    from dlopt.client import Client
    Client("http://127.0.0.1:8000", key="...").predict(frame)

Imports neither torch nor Ray, so that a program that only asks stays small.
"""

from __future__ import annotations

import http.client
import json
import random
import ssl
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import numpy as np

from dlopt.client.values import plain_row, plain_value
from dlopt.part import DloptError

AGAIN = (429, 502, 503, 504)
"""Statuses that say that the same request may go well in a moment; asking twice changes nothing on the server."""
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0
"""Seconds before the second try, and at most before any; each wait is twice the one before, by chance up to a half less."""
DTYPES = {"UINT8": np.uint8, "FP32": np.float32, "FP64": np.float64, "INT64": np.int64, "BOOL": np.bool_}


class ServerError(DloptError):
    """What the server said instead of an answer; `status` is the HTTP status, 0 where there was none."""

    status = 0

    @classmethod
    def of(cls, status: int, message: str) -> ServerError:
        """With a status."""
        error = cls(message)
        error.status = status
        return error


class Reply(NamedTuple):
    """One of the server."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Client:
    """Asks a server; may be used from several threads, of which each keeps a connection of its own."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        model: str | None = None,
        version: int | str | None = None,
        label: str | None = None,
        timeout: float = 30.0,
        retries: int = 4,
        rows: int = 1024,
        verify: bool | str = True,
    ) -> None:
        """url: http://HOST:PORT, as `dlopt serve` prints it. key: an API key. model: its name, where the server has several. version or
        label: of the model; without one the server chooses. timeout: seconds that a try may take. retries: how often a request is sent
        again that met a busy or a lost server. rows: of one request. verify: False trusts any certificate, a path one of its own.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DloptError(f"Client: url: {url!r} is no address of a server: give http://HOST:PORT")
        if version is not None and label is not None:
            raise DloptError("Client: give a version or a label, not both")
        self.parts, self.name, self.timeout, self.retries, self.rows = parts, model, timeout, retries, rows
        self.which = f"/versions/{version}" if version is not None else f"/labels/{quote(label)}" if label is not None else ""
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.verify, self.here = verify, threading.local()

    def predict(self, data: Any) -> Any:
        """What the model says of each row, a pandas DataFrame with the rows' index.

        data: a pandas DataFrame; a list of rows (dicts) or of images (arrays, Pillow images, encoded bytes, paths), or one image; an array
        (rows, ...) for a model with one input. Columns: `label`, `probability` and `probability.LABEL`; of several labels `labels`; of
        numbers one each. Raises ServerError with the server's own words, and DloptError.
        """
        pandas = _pandas()
        index = data.index if hasattr(data, "index") and hasattr(data, "columns") else None
        columns = self.columns(data)
        probabilities = columns.pop("probabilities", None)
        if probabilities is not None:
            chances = np.asarray(probabilities, np.float32).reshape(-1, len(self._labels))
            if "label" in columns:
                columns["probability"] = chances.max(axis=1) if self._likeliest else self._given(columns["label"], chances)
            columns |= {f"probability.{label}": chances[:, place] for place, label in enumerate(self._labels)}
        return pandas.DataFrame(columns, index=index)

    def columns(self, data: Any) -> dict[str, Any]:
        """The same as a list over the rows for each name of the server's reply: `label` and `probabilities`, `labels`, or numbers."""
        found: dict[str, list[Any]] = {}
        rows, at, step = self._rows(data), 0, min(self.rows, self._most_rows)
        if not len(rows):
            raise DloptError("predict: there is no row")
        while at < len(rows):
            some = rows[at : at + step]
            try:
                part = self._tensors(some) if isinstance(some, np.ndarray) else self._json(some)
            except ServerError as error:
                if error.status != 413 or len(some) < 2:
                    raise
                step = len(some) // 2  # rows are larger than most
                continue
            for name, values in part.items():
                found.setdefault(name, []).extend(values)
            at += len(some)
        return found

    def ready(self) -> bool:
        """Whether the server answers, and says that its models do."""
        try:
            return self._once("GET", "/readyz", b"", {}).status == 200
        except (OSError, http.client.HTTPException):
            return False

    def models(self) -> list[str]:
        """Names of the models that are served. Raises ServerError."""
        return list(self._asked("GET", "/v1/models")["models"])

    @cached_property
    def model(self) -> str:
        """The name of the model that is asked. Raises DloptError when the server has several and none was named."""
        if self.name:
            return self.name
        names = self.models()
        if len(names) != 1:
            raise DloptError(f"Client: the server has {', '.join(names) or 'no model'}: give model=")
        return names[0]

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What the model takes and gives (TensorFlow Serving's words, and `signature`). Raises ServerError."""
        return self._asked("GET", f"{self._path}/metadata")

    def send(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Reply:
        """One request, sent again while the server is busy or lost. Raises ServerError when it never was answered, or with an error."""
        wait, why = FIRST_WAIT, ""
        for attempt in range(self.retries + 1):
            try:
                reply = self._once(method, path, body, headers or {})
            except (OSError, http.client.HTTPException) as error:
                why, pause = f"no answer from {self.parts.netloc}: {error or type(error).__name__}", 0.0
                status = 0
            else:
                if reply.status < 400:
                    return reply
                status, why = reply.status, _error_of(reply)
                pause = _seconds(reply.headers.get("retry-after"))
                if status not in AGAIN:
                    break
            if attempt < self.retries:
                time.sleep(min(LONGEST_WAIT, max(pause, wait * random.uniform(0.5, 1))))
                wait *= 2
        raise ServerError.of(status, why)

    def close(self) -> None:
        """Close this thread's connection."""
        if (connection := getattr(self.here, "connection", None)) is not None:
            connection.close()
            self.here.connection = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _path(self) -> str:
        return f"/v1/models/{quote(self.model)}{self.which}"

    @cached_property
    def _target(self) -> dict[str, Any]:
        return dict(self.metadata["signature"]["target"])

    @property
    def _labels(self) -> list[Any]:
        return list(self._target["labels"])

    @property
    def _likeliest(self) -> bool:
        return not self._target["thresholds"]

    def _given(self, labels: Sequence[Any], chances: np.ndarray) -> np.ndarray:
        places = {label: place for place, label in enumerate(self._labels)}
        return chances[np.arange(len(labels)), [places[label] for label in labels]]

    @cached_property
    def _most_rows(self) -> int:
        return int(self._asked("GET", f"/v2/models/{quote(self.model)}/config")["max_batch_size"])

    @cached_property
    def _inputs(self) -> list[dict[str, Any]]:
        return list(self._asked("GET", f"/v2/models/{quote(self.model)}")["inputs"])

    def _rows(self, data: Any) -> Any:
        """What can be cut into requests: an array as it goes out in binary, or a list of rows."""
        if hasattr(data, "iloc") and hasattr(data, "columns"):
            names = [str(name) for name in data.columns]
            return [
                dict(zip(names, row, strict=True)) for row in zip(*(map(plain_value, data[name]) for name in data.columns), strict=True)
            ]
        if isinstance(data, np.ndarray):
            return self._binary(data) if self._is_tensor(data) else data.tolist()
        if isinstance(data, (bytes, Path)) or hasattr(data, "getbands"):
            return [plain_value(data)]
        if isinstance(data, (Mapping, str)) or not isinstance(data, Sequence):
            raise DloptError("predict: give a DataFrame, an array, or a list of rows, even for a single one: predict([row])")
        return [plain_row(row) for row in data]

    def _is_tensor(self, data: np.ndarray) -> bool:
        """Whether an array can go out as the model's only input; pixels and numbers can."""
        if len(self._inputs) != 1 or self.which.startswith("/labels") or self._inputs[0]["datatype"] not in DTYPES:
            return False
        shape = self._inputs[0]["shape"][1:]
        return list(data.shape[1:]) in (shape, shape[:-1] if shape[-1:] == [1] else shape)

    def _binary(self, data: np.ndarray) -> np.ndarray:
        dtype = np.dtype(DTYPES[self._inputs[0]["datatype"]])
        sent = data.astype(dtype)
        if dtype.kind in "ui" and not np.array_equal(sent, data):
            raise DloptError(f"predict: the model takes {dtype} values, and some of these are none")
        return np.ascontiguousarray(sent).reshape(len(data), *self._inputs[0]["shape"][1:])

    def _json(self, rows: Sequence[Any]) -> dict[str, list[Any]]:
        body = json.dumps({"instances": rows}).encode()
        reply = self._asked("POST", f"{self._path}:predict", body, {"Content-Type": "application/json"})["predictions"]
        if not isinstance(reply[0], dict):
            return {str(self._target["columns"][0]): reply}
        return {name: [row[name] for row in reply] for name in reply[0]}

    def _tensors(self, rows: np.ndarray) -> dict[str, list[Any]]:
        tensor = {"name": self._inputs[0]["name"], "shape": list(rows.shape), "datatype": self._inputs[0]["datatype"]}
        head = {"inputs": [tensor | {"parameters": {"binary_data_size": rows.nbytes}}], "parameters": {"binary_data_output": True}}
        text = json.dumps(head).encode()
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(text))}
        reply = self.send("POST", f"/v2/models/{quote(self.model)}{self.which}/infer", text + rows.tobytes(), headers)
        length = int(reply.headers["inference-header-content-length"])
        found, at = {}, length
        for output in json.loads(reply.body[:length])["outputs"]:
            size = output["parameters"]["binary_data_size"]
            found[output["name"]] = _values(output, reply.body[at : at + size])
            at += size
        if "labels" in found:
            names = self._labels
            found["labels"] = [[names[index] for index in np.flatnonzero(row)] for row in found["labels"]]
        return found

    def _asked(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        return dict(json.loads(self.send(method, path, body, headers).body))

    def _once(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        """On this thread's connection, or on a fresh one where the server has closed it meanwhile."""
        kept = getattr(self.here, "connection", None)
        connection = kept or self._connected()
        try:
            reply = self._exchange(connection, method, path, body, headers)
        except (http.client.RemoteDisconnected, ConnectionError, BrokenPipeError):
            connection.close()
            self.here.connection = None
            if kept is None:
                raise
            connection = self._connected()
            reply = self._exchange(connection, method, path, body, headers)
        except Exception:
            connection.close()
            self.here.connection = None
            raise
        self.here.connection = connection
        return reply

    def _connected(self) -> http.client.HTTPConnection:
        host, port = self.parts.hostname or "", self.parts.port
        if self.parts.scheme == "http":
            return http.client.HTTPConnection(host, port or 80, timeout=self.timeout)
        context = ssl.create_default_context(cafile=self.verify if isinstance(self.verify, str) else None)
        if self.verify is False:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return http.client.HTTPSConnection(host, port or 443, timeout=self.timeout, context=context)

    def _exchange(self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        connection.request(method, self.parts.path.rstrip("/") + path, body or None, {**self.headers, **headers})
        answer = connection.getresponse()
        content = answer.read()
        return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, content)


def _values(output: Mapping[str, Any], content: bytes) -> list[Any]:
    """A binary tensor of the Open Inference Protocol, by row."""
    if output["datatype"] != "BYTES":
        return list(np.frombuffer(content, DTYPES[output["datatype"]]).reshape(output["shape"]).tolist())
    found, at = [], 0
    while at < len(content):
        (size,) = struct.unpack_from("<I", content, at)
        found.append(content[at + 4 : at + 4 + size].decode())
        at += 4 + size
    return found


def _error_of(reply: Reply) -> str:
    try:
        return str(json.loads(reply.body)["error"])
    except (ValueError, KeyError, TypeError):
        return f"the server answers with status {reply.status}"


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:  # a date
        return 0.0


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise DloptError("predict: a DataFrame needs pandas: pip install 'dlopt[tables]'; Client.columns does without") from None
    return pandas
