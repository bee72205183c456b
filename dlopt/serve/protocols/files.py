"""Whole files as bodies, told apart by their Content-Type: an image is one row, a CSV file or an Arrow stream is a table of rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

from dlopt.data.kinds.pixels import FORMATS
from dlopt.part import Signature
from dlopt.serve.exchange import Refusal, Request, inputs_of

IMAGES = tuple(f"image/{name.lower()}" for name in FORMATS)
ARROW = "application/vnd.apache.arrow.stream"
MANY = 10**6
"""As many images as a table may hold: it is always decoded in a thread when the model takes images."""
Parser = Callable[[bytes, Signature], tuple[Request, None]]


def parser_of(content_type: str) -> Parser | None:
    """What reads a body of this type; None where it is no file's."""
    if content_type.startswith("image/"):
        return parse_image
    return {"text/csv": parse_csv, ARROW: parse_arrow}.get(content_type)


def most_images(content_type: str) -> int:
    """How many images a body of this type may hold."""
    return 1 if content_type.startswith("image/") else MANY


def types_of(signature: Signature) -> tuple[str, ...]:
    """The types that a model takes."""
    columns = inputs_of(signature)
    if len(columns) == 1 and columns[0].is_image:
        return IMAGES
    return ("text/csv", ARROW) if not any(column.is_image for column in columns) else (ARROW,)


def parse_image(body: bytes, signature: Signature) -> tuple[Request, None]:
    """An image file as one row. Raises Refusal."""
    columns = inputs_of(signature)
    if len(columns) != 1 or not columns[0].is_image:
        raise Refusal(415, "Content-Type: an image is no row of this model: send JSON")
    return Request({columns[0].name: [body]}, 1), None


def parse_csv(body: bytes, signature: Signature) -> tuple[Request, None]:
    """Rows below a header line; an empty field is missing. Raises Refusal."""
    wanted = inputs_of(signature)
    if any(column.is_image for column in wanted):
        raise Refusal(415, "Content-Type: text/csv: images do not fit into CSV: send JSON")
    try:
        lines = csv.reader(io.StringIO(body.decode("utf-8-sig"), newline=""), strict=True)
        header, *rows = [line for line in lines if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise Refusal(400, f"CSV: {str(error)[:200]}") from None
    except ValueError:
        raise Refusal(400, "CSV: must have a header line") from None
    if not rows:
        raise Refusal(400, "CSV: must have at least one row below its header")
    for index, row in enumerate(rows):
        if len(row) != len(header):
            raise Refusal(400, f"CSV: row {index}: {len(row)} fields where the header has {len(header)}")
    at = {name: header.index(name) for name in (column.name for column in wanted) if name in header}
    found = {name: [row[place] or None for row in rows] for name, place in at.items()}
    return Request(found, len(rows)), None


def parse_arrow(body: bytes, signature: Signature) -> tuple[Request, None]:
    """Columns of a stream in Arrow's IPC format. Raises Refusal."""
    import pyarrow as pa

    wanted = [column.name for column in inputs_of(signature)]
    try:
        table = pa.ipc.open_stream(body).read_all()
        table.validate(full=True)
        found = {name: table[name].to_pylist() for name in wanted if name in table.column_names}
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        raise Refusal(400, f"Arrow: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}") from None
    if not table.num_rows:
        raise Refusal(400, "Arrow: must have at least one row")
    return Request(found, table.num_rows), None
