"""Text files cut at the ends of records, so that several cores can read one file and every record still knows its line.

Finding the ends takes a look at line ends and quotes only; making values of the text is what takes the time.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dlopt.part import DloptError

READ_BYTES = 2**18
"""How much of a file is read at once."""
MOST_BYTES = 256 * 2**20
"""A record that is longer is taken for one whose quotes do not close."""
NEWLINE, RETURN = 10, 13
CHUNK = [("name", pa.string()), ("line", pa.int64()), ("content", pa.large_binary()), ("columns", pa.list_(pa.string()))]


@dataclass(frozen=True)
class Chunk:
    """Whole records of a file, as UTF-8."""

    name: str
    """The file."""
    line: int
    """The line that its first record starts on, counted from 1."""
    content: bytes
    columns: tuple[str, ...] = ()
    """Names of the columns."""

    def as_table(self) -> pa.Table:
        return pa.Table.from_pylist([asdict(self)], pa.schema(CHUNK))

    @classmethod
    def of_table(cls, table: pa.Table) -> list[Chunk]:
        return [cls(**row | {"columns": tuple(row["columns"])}) for row in table.to_pylist()]


def utf8(stream: Any, name: str, encoding: str) -> Iterator[bytes]:
    """What a stream of bytes holds, as UTF-8 and without a byte order mark; raises DloptError for bytes that are no text."""
    decoder = None if codecs.lookup(encoding).name == "utf-8" else codecs.getincrementaldecoder(encoding)()
    lines, first = 1, True
    while data := stream.read(READ_BYTES):
        if decoder:
            try:
                data = decoder.decode(data).encode()
            except UnicodeDecodeError as error:
                raise DloptError(f"{name}: cannot be read as {encoding}: {error.reason} near line {lines}") from None
        if first:
            data = data.removeprefix(codecs.BOM_UTF8)
        first = first and not data
        lines += data.count(b"\n")
        yield data
    if decoder and decoder.getstate()[0]:
        raise DloptError(f"{name}: cannot be read as {encoding}: it ends within a letter")


def chunks(
    parts: Iterable[bytes], name: str, size: int, delimiter: str = "", quote: str | None = None, escape: str | None = None
) -> Iterator[Chunk]:
    """Text in chunks of whole records, of about `size` bytes; the first one is smaller, for a quick look. Raises DloptError for
    a quote that stays open, which would swallow the rest of the file."""
    line, rest, size_of_rest, enough = 1, list[bytes](), 0, min(size, READ_BYTES)
    for part in parts:
        rest.append(part)
        size_of_rest += len(part)
        if size_of_rest < enough:
            continue
        text = b"".join(rest)
        end = last_end(text, delimiter, quote, escape)
        if not end and len(text) > MOST_BYTES:
            raise _endless(name, line)
        if end:
            yield Chunk(name, line, text[:end])
        line += text.count(b"\n", 0, end)
        rest, size_of_rest = [text[end:]], len(text) - end
        enough = size if end else 2 * len(text)
    text = b"".join(rest)
    if quote is not None and len(_real_quotes(np.frombuffer(_masked(text, escape), np.uint8), ord(delimiter), ord(quote))) % 2:
        raise _endless(name, line + text.count(b"\n", 0, last_end(text, delimiter, quote, escape)))
    if text:
        yield Chunk(name, line, text)


def _endless(name: str, line: int) -> DloptError:
    return DloptError(f"{name}: the record on line {line} does not end: is a quote left open? quote: null takes quotes as letters")


def last_end(text: bytes, delimiter: str = "", quote: str | None = None, escape: str | None = None) -> int:
    """Where the last whole record of a text ends, which starts with a record; 0 when none does."""
    if escape is None and (quote is None or quote.encode() not in text):
        return text.rfind(b"\n") + 1
    found = ends(text, delimiter, quote, escape)
    return int(found[-1]) if len(found) else 0


def ends(text: bytes, delimiter: str = "", quote: str | None = None, escape: str | None = None) -> np.ndarray:
    """Where each record of a text ends, behind its line end: the line ends that are not within quotes or escaped."""
    letters = np.frombuffer(_masked(text, escape), np.uint8)
    found = np.flatnonzero(letters == NEWLINE)
    if quote is not None:
        found = found[np.searchsorted(_real_quotes(letters, ord(delimiter), ord(quote)), found) % 2 == 0]
    return found + 1


def _masked(text: bytes, escape: str | None) -> bytes:
    """A text that is as long, without what is escaped."""
    return text if escape is None else re.sub(re.escape(escape.encode()) + rb"(?s:.)", b"xx", text)


def _real_quotes(letters: np.ndarray, delimiter: int, quote: int) -> np.ndarray:
    """Where quotes open and close, by turns. A quote opens at the beginning of a value only; elsewhere it is a letter."""
    quotes = np.flatnonzero(letters == quote)
    before = letters[quotes[::2] - 1]  # of quotes that open, if all of them open and close by turns; a doubled one does both
    opens = (before == delimiter) | (before == NEWLINE) | (before == RETURN) | (before == quote) | (quotes[::2] == 0)
    return quotes if opens.all() else np.array(_opened_and_closed(letters.tobytes(), quotes.tolist(), delimiter, quote), np.int64)


def _opened_and_closed(text: bytes, quotes: list[int], delimiter: int, quote: int) -> list[int]:
    """The same, one quote after the other, where some of them are letters."""
    real: list[int] = []
    starts = (delimiter, NEWLINE, RETURN)
    for place in quotes:
        is_open = len(real) % 2 == 1
        doubled = not is_open and bool(real) and real[-1] == place - 1
        if is_open or doubled or place == 0 or text[place - 1] in starts:
            real.append(place)
    return real
