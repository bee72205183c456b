"""What the raw columns of a source mean: which type each has, and which texts say that a value is missing.

Both are the same for a look at a source and for reading it, and those of `data.source` hold for `data.validation`, `data.test` and
requests as well. A type is stated in the job, or it is that of a typed column, or else decided from the first rows of the source's
files (see `type_of_texts`). What comes later and is not of that type stays as it is: it is set aside where a number or a date is
needed, and is a value of its own where texts are compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from pydantic import field_validator

from dlopt.data.types.arrow import pa, pc
from dlopt.data.types.canonical import MISSING, NUMBER, TRUTH, ColumnType, as_text, moment_of
from dlopt.data.types.values import is_text, plain
from dlopt.part import DloptError, Part

CANONICAL = r"^(0|-?[1-9][0-9]*|-?(0|[1-9][0-9]{0,5})\.[0-9]{0,8}[1-9])$"
SMALL = r"^-?0\.0000"
"""Numbers that are their own canonical text: of no more than 15 digits, but for small ones, which Python writes with an exponent."""
TYPE = b"type"
"""In the metadata of a field: its type."""


class Stated(Part):
    """What a job says of the columns of a source."""

    missing: tuple[str, ...] = MISSING
    """Texts that say that a value is missing, in any column and in requests; an empty one always does."""
    types: dict[str, ColumnType] = {}
    """Columns that are to be read as string, number, boolean or date, whatever their first rows look like: {zip: string}."""

    @field_validator("missing")
    @classmethod
    def nothing_is_missing(cls, missing: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(["", *missing]))


@dataclass(frozen=True)
class Columns:
    """Types of columns, "string" where a column has none, and the texts that say that a value is missing."""

    types: Mapping[str, ColumnType] = field(default_factory=dict)
    missing: tuple[str, ...] = MISSING

    def type_of(self, column: str) -> ColumnType:
        return self.types.get(column, "string")

    def canonical(self, table: pa.Table, compared: Collection[str] = ()) -> pa.Table:
        """Raw columns with null for what is missing. `compared`: those whose values are compared as texts, which become canonical
        where their own type does not see to it. The schema says the type of each column (see `column_type`)."""
        arrays, fields = [], []
        for name, column in zip(table.column_names, table.columns, strict=True):
            kind = self.type_of(name)
            column = missing_as_null(column, self.missing)
            column = spelled(column, kind) if name in compared else column
            arrays.append(column)
            fields.append(pa.field(name, column.type, metadata={TYPE: kind}))
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields))

    def typed(self, table: pa.Table) -> pa.Table:
        """The same for a look: texts of numbers and of booleans become these, if all of them are."""
        table = self.canonical(table, [name for name in table.column_names if self.type_of(name) in ("number", "boolean")])
        columns = [_typed(column, self.type_of(name)) for name, column in zip(table.column_names, table.columns, strict=True)]
        return pa.table(dict(zip(table.column_names, columns, strict=True)))


def column_type(table: pa.Table, column: str) -> ColumnType:
    """What `Columns.canonical` has noted; "string" for a table that did not pass it."""
    noted = table.schema.field(column).metadata or {}
    return noted.get(TYPE, b"string").decode()


def decided(looks: Iterable[pa.Table], stated: Mapping[str, ColumnType], missing: tuple[str, ...], untyped: bool = False) -> Columns:
    """From the first rows of the files of a source. untyped: all its values are texts, so numbers and booleans must be told from them.
    Raises DloptError for a stated column that is not there."""
    texts, kinds = dict[str, set[str]](), dict[str, set[ColumnType]]()
    for table in looks:
        for name, column in zip(table.column_names, table.columns, strict=True):
            there = kinds.setdefault(name, set())
            if is_text(plain(column).type):
                texts.setdefault(name, set()).update(pc.unique(missing_as_null(column, missing)).drop_null().to_pylist())
            elif not pa.types.is_null(column.type):
                there.add(type_of_values(column.type))
    for name in stated:
        if name not in kinds:
            raise DloptError(f"types: has no column {name!r}; its columns are {', '.join(kinds)}")
    found = {name: _one(some, texts.get(name, set()), untyped) for name, some in kinds.items()}
    return Columns(found | dict(stated), missing)


def _one(kinds: set[ColumnType], texts: set[str], untyped: bool) -> ColumnType:
    """What typed files and texts agree on."""
    if texts:
        kind = type_of_texts(texts)
        kinds = kinds | {kind if untyped or kind == "date" else "string"}
    return next(iter(kinds)) if len(kinds) == 1 else "string"


def type_of_values(kind: pa.DataType) -> ColumnType:
    """The type of a typed column."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    return "date" if pa.types.is_timestamp(kind) or pa.types.is_date(kind) else "string"


def type_of_texts(texts: Collection[str]) -> ColumnType:
    """What a column of texts is, by its different values, of which there is at least one.

    Numbers must be written as a program writes them: without zeros in front, which codes have, and with zeros at the end only where
    all have as many decimals, as prices do: 1.9, 1.10 and 1.11 are versions.
    """
    if all(text.strip().lower() in TRUTH for text in texts):
        return "boolean"
    if all(NUMBER.fullmatch(text.strip()) for text in texts):
        return "number" if _evenly_written([text.strip() for text in texts]) else "string"
    return "date" if all(moment_of(text) is not None for text in texts) else "string"


def _evenly_written(numbers: Collection[str]) -> bool:
    decimals = [text.partition(".")[2] for text in numbers if "e" not in text.lower()]
    padded = any(len(some) > 1 and some.endswith("0") for some in decimals)
    return not padded or len(set(map(len, decimals))) == 1


def missing_as_null(column: pa.ChunkedArray | pa.Array, missing: tuple[str, ...]) -> pa.ChunkedArray | pa.Array:
    """Texts with null for each that says that a value is missing; other columns as they are."""
    if pa.types.is_dictionary(column.type) and is_text(column.type.value_type):
        column = plain(column)
    if not is_text(column.type):
        return column
    return pc.if_else(pc.is_in(column, pa.array(missing, column.type)), None, column)


def spelled(column: pa.ChunkedArray | pa.Array, kind: ColumnType) -> pa.ChunkedArray | pa.Array:
    """Values of a column that is to be of a type in the texts of that type (see dlopt.data.types.canonical); null stays null."""
    own = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if kind == "string" or pa.types.is_nested(own) or (not is_text(own) and type_of_values(own) in (kind, "string")):
        return column
    codes = plain(column).dictionary_encode()  # so that each value is looked at once
    values = codes.dictionary
    if kind == "number" and is_text(own):
        odd = pc.or_(pc.invert(pc.match_substring_regex(values, CANONICAL)), pc.match_substring_regex(values, SMALL))
        if not pc.any(odd).as_py():
            return column
        texts = pc.replace_with_mask(values.cast(pa.string()), odd, _spelled(values.filter(odd), kind))
    else:
        texts = _spelled(values, kind)
    return texts.take(codes.indices)


def _spelled(values: pa.Array, kind: ColumnType) -> pa.Array:
    return pa.array([as_text(value, kind) for value in values.to_pylist()], pa.string())


def _typed(column: pa.ChunkedArray | pa.Array, kind: ColumnType) -> pa.ChunkedArray | pa.Array:
    wanted = {"number": (pa.int64(), pa.float64()), "boolean": (pa.bool_(),)}.get(kind, ())
    for target in wanted if is_text(column.type) else ():
        try:
            return column.cast(target)
        except pa.ArrowInvalid:
            continue
    return column
