"""Text files of records: csv and JSON lines. A large file is cut at the ends of records, and several workers make values of the text."""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
from pydantic import Field, field_validator, model_validator

from dlopt.data.sources import records
from dlopt.data.sources.partitions import values_of
from dlopt.data.sources.places import COMPRESSED, Place, reading, say_left_out
from dlopt.data.sources.reading import Files, Named, Piece, block_bytes, conform, dataset_of, first_rows, no_column, wanted
from dlopt.data.sources.records import Chunk
from dlopt.data.types.canonical import as_text
from dlopt.data.types.columns import Columns, decided, missing_as_null, spelled
from dlopt.data.types.tensors import SEPARATOR
from dlopt.part import DloptError

if TYPE_CHECKING:
    from ray.data import Dataset

Refuse = Callable[[pa.csv.InvalidRow], str]
PEEK_ROWS = 1000
"""How many rows are looked at for the names of columns that not every row has."""
LONE = re.compile("[\ud800-\udfff]")
"""Halves of surrogate pairs, which Python's JSON has put together where both are there."""
BLANK = "[ \t\r\n]*"
OPENING, MARK = re.compile(rf"{BLANK}(\[{BLANK}\]|\[(?!{BLANK}$)){BLANK}"), re.compile(rf"{BLANK}([,\]]){BLANK}")
"""What stands before the first value of an array, which may have none, and what before the others or behind the last one."""
LOOK_FILES = 16
"""How many files are looked at for what their columns mean: the first, the last, and others between them."""
LOOK_BYTES = 32 * 2**20
"""Of files of about so many bytes all rows are looked at for a value of a column that the first rows do not have."""
EXACT = 2.0**63
"""From here on Arrow's reader of JSON takes whole numbers for fractions."""
EXPANSION = 5
"""About how much larger a compressed text is than its file."""


class Lines(Files):
    """What csv and JSON lines have in common."""

    compressed: ClassVar[bool] = True

    encoding: str = "utf-8"
    """How letters are written in the files: utf-8, latin-1, cp1252, utf-16, ..."""

    @field_validator("encoding")
    @classmethod
    def encoding_is_known(cls, encoding: str) -> str:
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise ValueError(f"{encoding!r} is not known: utf-8, latin-1, cp1252, utf-16, ...") from None
        return encoding

    def pieces(self) -> tuple[Place, list[Piece]]:
        place, pieces = super().pieces()
        larger = [EXPANSION if piece.name.lower().endswith(COMPRESSED) else 1 for piece in pieces]
        return place, [replace(piece, bytes=piece.bytes * more) for piece, more in zip(pieces, larger, strict=True)]

    def left_out(self) -> str:
        listing = self.listed()
        folders = sorted({file.folder for file in listing.files if values_of(file.folder)})
        says = (
            f"folders such as {folders[0]} make no columns of text files: write parquet, or put the values into the files"
            if folders
            else ""
        )
        return "; ".join(filter(None, (say_left_out(listing.left_out), says)))

    def load(self, place: Place | None, pieces: Sequence[Piece], columns: Sequence[str] | None = None) -> Iterator[Named]:
        for chunk in self._chunks(place, pieces, block_bytes(pieces)):
            yield chunk.name, self.parse(chunk)

    def shaped(self, place: Place | None, pieces: Sequence[Piece], schema: pa.Schema) -> Iterator[pa.Table]:
        for chunk in self._chunks(place, pieces, block_bytes(pieces)):
            yield conform(chunk.name, self.parse(chunk, schema), schema)

    def looks(self) -> Iterator[pa.Table]:
        place, pieces = self.pieces()
        places = sorted({round(number * (len(pieces) - 1) / (LOOK_FILES - 1)) for number in range(LOOK_FILES)})
        for piece in (pieces[index] for index in places):
            yield first_rows(self.load(place, [piece]), PEEK_ROWS)

    def read(self, columns: Sequence[str] | None = None) -> Dataset:
        place, pieces = self.pieces()
        block, schema = block_bytes(pieces), wanted(self.layout(columns), columns)

        def parsed(chunks: Iterable[Chunk]) -> Iterator[Named]:
            return ((chunk.name, self.parse(chunk, schema)) for chunk in chunks)

        large = [piece for piece in pieces if piece.bytes > 2 * block]
        small = [piece for piece in pieces if piece.bytes <= 2 * block]
        found = []
        if small:
            found.append(dataset_of(lambda some: parsed(self._chunks(place, some, block)), small, schema))
        if large:
            texts = dataset_of(lambda some: ((c.name, c.as_table()) for c in self._chunks(place, some, block)), large, None)
            texts.context.target_max_block_size = block
            found.append(
                texts.map_batches(
                    lambda table: (conform(name, rows, schema) for name, rows in parsed(Chunk.of_table(table))),
                    batch_size=None,
                    batch_format="pyarrow",
                )
            )
        return found[0] if len(found) == 1 else found[0].union(found[1])

    def parse(self, chunk: Chunk, schema: pa.Schema | None = None) -> pa.Table:
        """The rows of a chunk, those columns alone that a schema has. Raises DloptError that names the line."""
        raise NotImplementedError

    def chunks_of(self, texts: Iterator[bytes], name: str, size: int) -> Iterator[Chunk]:
        """The chunks of one file, at least one."""
        raise NotImplementedError

    def _chunks(self, place: Place | None, pieces: Sequence[Piece], size: int) -> Iterator[Chunk]:
        assert place is not None
        for piece in pieces:
            with reading(piece.name), place.stream(piece.path) as stream:
                yield from self.chunks_of(records.utf8(stream, piece.name, self.encoding), piece.name, size)


class Csv(Lines):
    """Comma-separated files. All values are read as text and made numbers where a job asks for them, since a file's first rows
    do not tell what comes later."""

    endings: ClassVar[tuple[str, ...]] = (".csv", ".tsv")

    kind: Literal["csv"] = "csv"
    delimiter: str = Field(",", min_length=1, max_length=1)
    """What stands between two values: one letter; "\\t" is a tab."""
    quote: str | None = Field('"', min_length=1, max_length=1)
    """What stands around values that hold delimiters or line ends, doubled where it is meant itself; null: quotes are letters as others."""
    header: bool = True
    """Whether the first line of each file names the columns."""
    columns: tuple[str, ...] = ()
    """Names of the columns of files without a header line."""
    escape: str | None = Field(None, min_length=1, max_length=1)
    """What stands before a letter that is to be taken as it is, a quote or a delimiter: "\\"."""
    comment: str | None = Field(None, min_length=1, max_length=1)
    """Lines that begin with this letter are left out."""
    trim: bool = False
    """Whether blanks around names and values are left out."""
    decimal: str = Field(".", min_length=1, max_length=1)
    """What stands before the decimals of numbers; "," in many countries. It holds for columns that are numbers throughout."""
    thousands: str | None = Field(None, min_length=1, max_length=1)
    """What parts the thousands of numbers: "." or ","."""

    @field_validator("delimiter", "quote", "escape", "comment", "decimal", "thousands")
    @classmethod
    def is_one_byte(cls, letter: str | None) -> str | None:
        if letter is not None and (not letter.isascii() or letter in "\r\n"):
            raise ValueError(f"{letter!r} cannot be used: take an ASCII letter that ends no line")
        return letter

    @model_validator(mode="after")
    def columns_have_one_name(self) -> Self:
        if self.header and self.columns:
            raise ValueError("columns: the header line names them already: set header: false, or take columns out")
        if not self.header and not self.columns:
            raise ValueError("columns: name the columns of files without a header line")
        if len(set(self.columns)) < len(self.columns):
            raise ValueError("columns: two of them have the same name")
        return self

    @model_validator(mode="after")
    def letters_have_one_meaning(self) -> Self:
        letters = {name: getattr(self, name) for name in ("delimiter", "quote", "escape", "comment") if getattr(self, name)}
        for name, letter in letters.items():
            if list(letters.values()).count(letter) > 1:
                raise ValueError(f"{name}: {letter!r} means something else as well")
        if self.decimal == self.thousands:
            raise ValueError(f"thousands: {self.thousands!r} stands before the decimals: set decimal")
        return self

    def chunks_of(self, texts: Iterator[bytes], name: str, size: int) -> Iterator[Chunk]:
        columns: tuple[str, ...] = self.columns
        for chunk in records.chunks(texts, name, size, self.delimiter, self.quote, self.escape):
            chunk = chunk if self.comment is None else self._without_comments(chunk)
            if not columns:
                chunk, columns = self._without_header(chunk)
            yield Chunk(chunk.name, chunk.line, chunk.content, columns)
        if not columns:
            raise DloptError(f"{name}: cannot be read: it is empty, and has no header line")
        if self.columns == columns:
            yield Chunk(name, 1, b"", columns)

    def meaning(self) -> Columns:
        return decided(self.looks(), *self.stated(), untyped=True)

    def looks(self) -> Iterator[pa.Table]:
        tables = list(super().looks())
        local = self._local(tables)
        yield from (self._plain_numbers(table, local) for table in tables)

    def layout(self, columns: Sequence[str] | None = None) -> pa.Schema:
        """All columns are texts; those of numbers that are to be written plainly are large_string, to tell them from the others."""
        tables = list(super().looks())
        local = self._local(tables)
        return pa.schema([(name, pa.large_string() if name in local else pa.string()) for name in tables[0].column_names])

    def first(self, rows: int) -> pa.Table:
        place, pieces = self.pieces()
        layout = self.layout()
        chunks = self._chunks(place, pieces, block_bytes(pieces))
        return first_rows(((chunk.name, self.parse(chunk, layout)) for chunk in chunks), rows)

    def _local(self, tables: Sequence[pa.Table]) -> set[str]:
        """The columns of numbers as `decimal` and `thousands` have them. Raises DloptError for thousands that the job does not name."""
        if self.decimal == "." and self.thousands is None:
            return set()
        found, other = set(tables[0].column_names), "." if self.decimal == "," else ","
        for name in tables[0].column_names:
            texts = [missing_as_null(table[name], self.missing) for table in tables if name in table.column_names]
            if not self._all_match(texts, self.thousands):
                found.discard(name)
                if self.thousands is None and self._all_match(texts, other):
                    raise DloptError(f"{tables and self.files()[0]}: column {name!r} parts thousands by {other!r}: set thousands to it")
        return found

    def _all_match(self, texts: Sequence[pa.ChunkedArray], thousands: str | None) -> bool:
        return all(pc.all(pc.match_substring_regex(some, self._number(thousands))).as_py() is not False for some in texts)

    def _number(self, thousands: str | None) -> str:
        """What a number looks like."""
        parted = f"[0-9]{{1,3}}(?:{re.escape(thousands)}[0-9]{{3}})+|" if thousands else ""
        return rf"^\s*-?(?:{parted}[0-9]+)(?:{re.escape(self.decimal)}[0-9]+)?(?:[eE][+-]?[0-9]+)?\s*$"

    def _plain_numbers(self, table: pa.Table, local: Collection[str]) -> pa.Table:
        """Numbers of these columns as programs write them."""
        for place, name in enumerate(table.column_names):
            if name in local:
                texts = table[name]
                plain = pc.replace_substring(pc.replace_substring(texts, self.thousands or "\0", ""), self.decimal, ".")
                found = pc.if_else(pc.match_substring_regex(texts, self._number(self.thousands)), plain, texts)
                table = table.set_column(place, name, found)
        return table

    def _without_comments(self, chunk: Chunk) -> Chunk:
        """With an empty line for each comment, so that lines keep their numbers."""
        mark = (self.comment or "").encode()
        if not chunk.content.startswith(mark) and b"\n" + mark not in chunk.content:
            return chunk
        ends = [*records.ends(chunk.content, self.delimiter, self.quote, self.escape).tolist(), len(chunk.content)]
        parts = [chunk.content[start:end] for start, end in itertools.pairwise([0, *ends])]
        kept = [b"\n" * part.count(b"\n") if part.startswith(mark) else part for part in parts]
        return Chunk(chunk.name, chunk.line, b"".join(kept), chunk.columns)

    def parse(self, chunk: Chunk, schema: pa.Schema | None = None) -> pa.Table:
        named = [name for name in chunk.columns if name]
        asked = named if schema is None else schema.names
        for name in asked:
            if name not in named:
                raise no_column(chunk.name, name, named)
        types = pa.schema([(name, pa.string()) for name in named if name in set(asked)])
        if not chunk.content.strip(b"\r\n"):
            return types.empty_table()
        why, local = "", {field.name for field in schema or () if field.type == pa.large_string()}
        columns = [name or f"{SEPARATOR}{number}" for number, name in enumerate(chunk.columns)]
        last = max((number for number, name in enumerate(chunk.columns, 1) if name), default=0)
        for some in [columns, columns[:last]] if last < len(columns) else [columns]:
            try:
                return self._plain_numbers(self._values(chunk, some, types), local)
            except pa.ArrowInvalid as error:
                why = why or f"{chunk.name}: cannot be read: {self._why(chunk, some, types, error)}"
        raise DloptError(why)

    def _values(self, chunk: Chunk, columns: list[str], types: pa.Schema, refuse: Refuse | None = None) -> pa.Table:
        """The texts of some of the columns. refuse: is told of a row with too few or too many. Raises pyarrow.ArrowInvalid."""
        found = pa.csv.read_csv(
            pa.BufferReader(chunk.content),
            pa.csv.ReadOptions(use_threads=False, column_names=columns, block_size=len(chunk.content) + 1),
            pa.csv.ParseOptions(
                delimiter=self.delimiter,
                quote_char=self.quote or False,
                escape_char=self.escape or False,
                newlines_in_values=self.quote is not None,
                invalid_row_handler=refuse,
            ),
            pa.csv.ConvertOptions(column_types=types, include_columns=types.names),
        )
        return pa.table({name: pc.utf8_trim_whitespace(found[name]) for name in found.column_names}) if self.trim else found

    def _without_header(self, chunk: Chunk) -> tuple[Chunk, tuple[str, ...]]:
        """The rest of a file's first chunk, and the names in its first line; "" stands for a column without a name, which is left out, as
        is the one that a delimiter at the end of the line makes, whether the other lines end in one or not."""
        blank = len(chunk.content) - len(chunk.content.lstrip(b"\r\n"))
        content = chunk.content[blank:]
        found = records.ends(content, self.delimiter, self.quote, self.escape)
        end = int(found[0]) if len(found) else len(content)
        with _text(chunk):
            header = content[:end].decode().rstrip("\r\n")
        style = {"quoting": csv.QUOTE_NONE} if self.quote is None else {"quotechar": self.quote}
        try:
            columns = tuple(next(csv.reader([header], delimiter=self.delimiter, escapechar=self.escape, **style), ()))
        except csv.Error as error:
            raise DloptError(f"{chunk.name}: cannot be read: its first line names no columns: {error}") from None
        columns = tuple((name.strip() if self.trim else name) if name.strip() else "" for name in columns)
        if not any(columns):
            raise DloptError(f"{chunk.name}: cannot be read: its first line names no columns")
        _refuse_twice([name for name in columns if name], chunk.name)
        return Chunk(chunk.name, 1 + chunk.content.count(b"\n", 0, blank + end), content[end:]), columns

    def _why(self, chunk: Chunk, columns: list[str], types: pa.Schema, error: pa.ArrowInvalid) -> str:
        """What is wrong with a chunk, with its line."""
        with _text(chunk):
            chunk.content.decode()
        wrong: list[pa.csv.InvalidRow] = []

        def refuse(row: pa.csv.InvalidRow) -> str:
            wrong.append(row)
            return "error"

        with suppress(pa.ArrowInvalid):
            self._values(chunk, columns, types, refuse)
        if wrong:
            line = self._line(chunk, wrong[0].number)
            return f"line {line} has {wrong[0].actual_columns} values where {wrong[0].expected_columns} are expected"
        return f"{str(error).splitlines()[0]}, after line {chunk.line}"

    def _line(self, chunk: Chunk, number: int) -> int:
        """The line of a chunk's record, counted from 1 as pyarrow does, which passes over empty lines."""
        start, seen = 0, 0
        for end in [*records.ends(chunk.content, self.delimiter, self.quote, self.escape).tolist(), len(chunk.content)]:
            seen += bool(chunk.content[start:end].strip(b"\r\n"))
            if seen == number:
                break
            start = end
        return chunk.line + chunk.content.count(b"\n", 0, start)


class JsonLines(Lines):
    """JSON lines: one object a line, whose keys are the columns; a file that holds one array of objects is read as well. Numbers
    are made of their text where a job asks for them, as with csv, so a value of another type than the rest stops nobody."""

    endings: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson", ".json")

    kind: Literal["json"] = "json"

    def first(self, rows: int) -> pa.Table:
        place, pieces = self.pieces()
        layout = self.layout()
        if not layout.names:
            raise DloptError(f"{pieces[0].name}: cannot be read: it holds no row")
        chunks = self._chunks(place, pieces, block_bytes(pieces))
        return first_rows(((chunk.name, conform(chunk.name, self.parse(chunk, layout), layout)) for chunk in chunks), rows)

    def layout(self, columns: Sequence[str] | None = None) -> pa.Schema:
        """The columns of the first rows of the files. Single values are text; lists and objects have a type that holds those of all
        files; a column of both is JSON's text, a large_string, to tell it from a column where no list may come."""
        found = dict[str, pa.DataType]()
        for table in self.looks():
            for field in table.schema:
                kind = pa.large_string() if field.name in self.types else field.type
                found[field.name] = _together(found.get(field.name, pa.null()), kind)
        self._look_on(found)
        return pa.schema([(name, kind if _may_be_nested(kind) else pa.string()) for name, kind in found.items()])

    def _look_on(self, found: dict[str, pa.DataType]) -> None:
        """Where the first rows of all files are null: what the first value is, within LOOK_BYTES of the files."""
        place, pieces = self.pieces()
        empty = {name for name, kind in found.items() if pa.types.is_null(kind)}
        ends = itertools.accumulate(piece.bytes for piece in pieces)
        some = [piece for piece, end in zip(pieces, ends, strict=True) if end - piece.bytes < LOOK_BYTES]
        for _, table in self.load(place, some) if empty else ():
            kinds = {field.name: field.type for field in table.schema if field.name in empty and not pa.types.is_null(field.type)}
            found |= kinds
            empty -= kinds.keys()
            if not empty:
                break

    def chunks_of(self, texts: Iterator[bytes], name: str, size: int) -> Iterator[Chunk]:
        first = next(texts, b"")
        texts = itertools.chain([first], texts)
        if first.lstrip()[:1] == b"[":
            yield from records.chunks(_of_array(texts, name), name, size)
        else:
            yield from records.chunks(texts, name, size)
            if not first:
                yield Chunk(name, 1, b"")

    def parse(self, chunk: Chunk, schema: pa.Schema | None = None) -> pa.Table:
        try:
            table = _parse_fast(chunk.content) if chunk.content.strip() else pa.table({})
        except (pa.ArrowException, ValueError, AttributeError):
            table = _parse_lines(chunk)
        if schema is None:
            return table
        return pa.table({field.name: self._read(chunk, table, field) for field in schema})

    def _read(self, chunk: Chunk, table: pa.Table, field: pa.Field) -> pa.ChunkedArray | pa.Array:
        """A column as the layout has it. Raises DloptError for a list or an object where the first rows of the files have none."""
        if field.name not in table.column_names:
            return pa.nulls(len(table), field.type)
        column = table[field.name]
        if pa.types.is_null(column.type):
            return pa.nulls(len(table), field.type)
        if pa.types.is_nested(field.type):
            return column
        if field.type == pa.string() and _may_be_nested(column.type):
            raise DloptError(
                f"{chunk.name}: after line {chunk.line}, column {field.name!r} holds a list or an object, and none in the first rows of "
                f"the files: types: {{{field.name}: string}} reads it as JSON's text"
            )
        return _as_json(column.to_pylist()) if pa.types.is_nested(column.type) else _as_texts(column)


def _may_be_nested(kind: pa.DataType) -> bool:
    return pa.types.is_nested(kind) or pa.types.is_large_string(kind)


def _together(mine: pa.DataType, yours: pa.DataType) -> pa.DataType:
    """A type for the values of both: of lists and objects the one that holds both, else text."""
    if pa.types.is_null(mine) or pa.types.is_null(yours):
        return yours if pa.types.is_null(mine) else mine
    if pa.types.is_nested(mine) and pa.types.is_nested(yours):
        try:
            return pa.unify_schemas([pa.schema([("", mine)]), pa.schema([("", yours)])], promote_options="permissive").field(0).type
        except pa.ArrowException:
            return pa.large_string()
    return pa.large_string() if _may_be_nested(mine) or _may_be_nested(yours) else pa.string()


def _as_texts(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """Single values as their canonical texts."""
    if not pa.types.is_floating(column.type):
        return column.cast(pa.string())
    there = pc.if_else(pc.is_nan(column), None, column)
    return spelled(there.cast(pa.string()), "number")


def _parse_fast(content: bytes) -> pa.Table:
    """Strings stay strings, also where they look like times."""
    first = json.loads(content.lstrip().split(b"\n", 1)[0])
    strings = [key for key, value in first.items() if isinstance(value, str)]
    table = _parse_as(content, strings)
    table = table.select(sorted(table.column_names, key=lambda name: (name not in first, list(first).index(name) if name in first else 0)))
    for name, column in zip(table.column_names, table.columns, strict=True):
        if name not in strings and pa.types.is_floating(column.type) and (pc.max(pc.abs(column)).as_py() or 0) >= EXACT:
            raise ValueError(f"{name}: whole numbers of more than 64 bits, which are exact in Python alone")
    times = [field.name for field in table.schema if pa.types.is_temporal(field.type)]
    return _parse_as(content, [*strings, *times]) if times else table


def _parse_as(content: bytes, strings: Sequence[str]) -> pa.Table:
    return pa.json.read_json(
        pa.BufferReader(content),
        pa.json.ReadOptions(use_threads=False, block_size=len(content) + 1),
        pa.json.ParseOptions(explicit_schema=pa.schema([(name, pa.string()) for name in strings]), newlines_in_values=False),
    )


def _parse_lines(chunk: Chunk) -> pa.Table:
    """The same line by line, for values of several types, and to find the line that is wrong."""
    rows = []
    for number, line in enumerate(chunk.content.split(b"\n"), chunk.line):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except UnicodeDecodeError:
            raise DloptError(f"{chunk.name}: line {number} is not UTF-8: set encoding, for example to latin-1") from None
        except ValueError as error:
            raise DloptError(f"{chunk.name}: line {number} is not JSON: {error}") from None
        if not isinstance(rows[-1], dict):
            raise DloptError(f"{chunk.name}: line {number} is not a JSON object, {{column: value, ...}}")
    return of_rows(rows)


def of_rows(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """A table of dictionaries, with nulls where a row has no such key; values of several types become text. Half of a surrogate pair,
    which is no letter, becomes U+FFFD, as in browsers."""
    try:
        return _of_rows(rows)
    except UnicodeEncodeError:
        return _of_rows([_well_formed(row) for row in rows])


def _well_formed(value: Any) -> Any:
    """With U+FFFD for each lone surrogate in the texts of a JSON value."""
    if isinstance(value, str):
        return LONE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_well_formed(key): _well_formed(inner) for key, inner in value.items()}
    return [_well_formed(inner) for inner in value] if isinstance(value, list) else value


def _of_rows(rows: Sequence[dict[str, Any]]) -> pa.Table:
    return pa.table({name: _column([row.get(name) for row in rows]) for name in dict.fromkeys(key for row in rows for key in row)})


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        nested = any(isinstance(value, (list, dict)) for value in values)
        return _as_json(values).cast(pa.large_string() if nested else pa.string())


def _as_json(values: list[Any]) -> pa.Array:
    """Texts: single values as such, lists and objects as JSON writes them."""
    return pa.array([json.dumps(v, default=str) if isinstance(v, (list, dict)) else as_text(v) or None for v in values], pa.string())


def _of_array(parts: Iterator[bytes], name: str) -> Iterator[bytes]:
    """The objects of an array, a line each, as the text comes: no more of it is held than a part of the file and the object at hand."""
    decoder, scan = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder().raw_decode
    text, enough, rows, ended = "", 0, 0, False
    try:
        for part in itertools.chain(parts, [b""]):  # the last one is empty
            text += decoder.decode(part, final=not part)
            if part and len(text) < enough:
                continue
            place = 0
            while not ended and (mark := (MARK if rows else OPENING).match(text, place)):
                if "]" in mark[1]:
                    ended, place = True, mark.end()
                    break
                try:
                    row, end = scan(text, mark.end())
                except ValueError:
                    if not part:
                        raise
                    break
                if part and end == len(text):  # of a number there may be more
                    break
                yield json.dumps(row).encode() + b"\n"
                place, rows = end, rows + 1
            enough = 0 if place else 2 * len(text)
            text = text[place:]
            if ended and text.strip():
                raise ValueError(f"{text.strip()[:20]!r} stands behind its end")
        if not ended:
            raise ValueError(
                f"{text.strip()[:20]!r} where a comma or the end of the array is expected" if text.strip() else "it does not end"
            )
    except ValueError as error:
        raise DloptError(f"{name}: is not JSON: {error}, after {rows:,} rows") from None


def _refuse_twice(columns: Sequence[str], where: str) -> None:
    twice = [column for column in columns if columns.count(column) > 1]
    if twice:
        raise DloptError(f"{where}: names the column {twice[0]!r} twice")


@contextmanager
def _text(chunk: Chunk) -> Iterator[None]:
    """Says which line of a chunk is not UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        line = chunk.line + chunk.content.count(b"\n", 0, error.start)
        raise DloptError(f"{chunk.name}: line {line} is not UTF-8: set encoding, for example to latin-1") from None
