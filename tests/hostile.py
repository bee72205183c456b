"""Files as nobody wants them, made by a seed: types, encodings, names, nulls, nesting, sizes and damage of CSV, JSON, parquet and Arrow.

Each comes with what it holds as somebody else reads it: pandas of CSV, Python's json of JSON, pyarrow of parquet and Arrow.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import random
import string
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dlopt.data.sources import Arrow, Csv, JsonLines, Parquet

LABEL = "y"
"""A column that all tables have, of two labels."""
NAMES = (
    *(
        "a",
        "b c",
        "a.b",
        "a/b",
        "__high",
        "__target",
        "reason",
        "path",
        "label",
        "Ünïcode",
        "日本",
        "😀",
        "A",
        "1",
        "true",
        "NA",
        "x" * 300,
    ),
    *("a,b", 'q"uote', "'", " padded ", "tab\tbed", "two\nlines", "#x", "\\", "%s", "{0}", "signup.month", "index", "\u200b", "e\u0301"),
)
TEXTS = (
    *("", " ", "a", "  two", "Ünï", "日本語", "😀", "a,b", 'q"uo"te', '"', "line\nbreak", "tab\tx", "NA", "nan", "null", "None", "-", "?"),
    *("true", "False", "TRUE", "1", "01", "1.0", "1e5", "-0", "+5", "1_000", "0x1F", "1,5", "1.234,56", "$5", "Infinity", "-inf", "1e400"),
    *("2026-01-02", "2026-13-45", "12:30", "#comment", "\\", "a\\nb", "a\u2028b", "x" * 3000, "'", "\u200b", "e\u0301", "[1, 2]", "{}"),
)
NUMBERS = (
    "0",
    "-1",
    "3",
    "7.5",
    "-0.001",
    "1e-7",
    "12345678901234567",
    "9007199254740993",
    "123456789012345678901",
    "1E+3",
    "5.",
    ".5",
    "0.1",
)
SMALL = ("0", "1", "2", "-3", "12", "400")
DATES = ("2026-01-02", "1969-12-31", "2024-02-29", "2026-01-02T03:04:05", "2026-01-02 03:04:05.123456", "2026-01-02T03:04:05Z")
ENCODINGS = {
    "utf-8": "Ünï日😀",
    "utf-8-sig": "ß日",
    "latin-1": "Ünïß",
    "cp1252": "€ß",
    "utf-16": "Ü日😀",
    "gb18030": "日本",
    "shift_jis": "日本",
}
"""Encodings, and letters that each has."""
SIZES = (1, 2, 3, 17, 60, 1100)


@dataclass(frozen=True)
class Hostile:
    """One file or several of a kind, and what it holds."""

    source: Any
    columns: Callable[[], dict[str, list[Any]]]
    """What the reference reads."""
    fault: str = ""
    """What is wrong with it, if it may be refused; anything else must be read."""


def csv_file(seed: int, folder: Path) -> Hostile:
    rng = random.Random(f"csv {seed}")
    delimiter, quoting = rng.choice(",;\t|"), rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    encoding, end = rng.choice([*ENCODINGS, "utf-8", "utf-8"]), rng.choice(["\n", "\r\n"])
    escape = "\\" if rng.random() < 0.15 else None
    rows, fault = rng.choice(SIZES), rng.choice(["", "", "", "", *CSV_FAULTS])
    pools = [TEXTS, NUMBERS, SMALL, DATES, ("true", "false"), ("", "NA", "5"), ("",), (*SMALL, "1.25", "word", ""), (ENCODINGS[encoding],)]
    columns = {name: rng.choice(pools) for name in _names(rng, rng.choice([1, 2, 5, 40 if rows < 100 else 6]))} | {LABEL: ("u", "v")}
    if encoding not in ("utf-8", "utf-8-sig", "utf-16", "gb18030"):
        columns = {_known(name, encoding): tuple(_known(text, encoding) for text in pool) for name, pool in columns.items()}
    sink = io.StringIO()
    style = {"escapechar": escape, "doublequote": escape is None}
    writer = csv.writer(sink, delimiter=delimiter, quoting=quoting, lineterminator=end, **style)
    writer.writerow(columns)
    for _ in range(rows):
        writer.writerow([rng.choice(pool) for pool in columns.values()])
        if rng.random() < 0.02:
            sink.write(end)
    text = CSV_FAULTS[fault](sink.getvalue(), delimiter, end, rng) if fault else sink.getvalue()
    text = text.removesuffix(end) if rng.random() < 0.3 else text
    content = text.encode(encoding)
    if fault == "bytes of no letter":
        content += b"\xff\xff\x81" if encoding in ("utf-8", "utf-8-sig", "utf-16") else b""
    path, content = _packed(rng, folder / f"{seed} {rng.choice(['x', 'Ü 日', 'a,b', 'x.csv'])}.csv", content, fault)
    path.write_bytes(content)
    said = {} if encoding in ("utf-8", "utf-8-sig") else {"encoding": encoding}

    def expected(**more: Any) -> dict[str, list[Any]]:
        import pandas

        style = {"sep": delimiter, "encoding": encoding, "escapechar": escape, "doublequote": escape is None}
        read = pandas.read_csv(path, dtype=str, keep_default_na=False, **style, **more)
        return {str(name): [None if value != value else value for value in read[name]] for name in read.columns}

    return Hostile(Csv(path=str(path), delimiter=delimiter, escape=escape, **said), expected, fault)


CSV_FAULTS: dict[str, Callable[[str, str, str, random.Random], str]] = {
    "a short row": lambda text, delimiter, end, rng: f"{text}u{end}",
    "a long row": lambda text, delimiter, end, rng: f"{text}{delimiter * 60}{end}",
    "an open quote": lambda text, delimiter, end, rng: f'{text}"u{delimiter}v{end}',
    "a name twice": lambda text, delimiter, end, rng: f"z{delimiter}z{delimiter}{LABEL}{end}1{delimiter}2{delimiter}u{end}",
    "nothing": lambda text, delimiter, end, rng: rng.choice(["", end, end * 3]),
    "no rows": lambda text, delimiter, end, rng: f"z{delimiter}{LABEL}{end}",
    "bytes of no letter": lambda text, delimiter, end, rng: text,
    "broken off": lambda text, delimiter, end, rng: text,
}


def json_file(seed: int, folder: Path) -> Hostile:
    rng = random.Random(f"json {seed}")
    rows, fault = rng.choice(SIZES), rng.choice(["", "", "", "", *JSON_FAULTS])
    lists = [[1, 2], [], [None], [3.5]], [["a"], ["b", None]], [[[1]], [[2, 3], []]], [{"q": 1}, {"q": None, "r": "x"}, {}]
    pools: list[Sequence[Any]] = [TEXTS, (1, 2, None), (1.5, 2, 1e-9, 1e300), (True, False, None), (None,), (2**62, 2**70, -1), *lists]
    pools += [
        (1, "1", 1.0, True, None),
        ("x", [1], {"q": 2}),
        (float("nan"), 1.0, float("inf")),
        DATES,
        ([1], {"q": 1}),
        ("\ud800x", "\ude00"),
    ]
    columns = {name: rng.choice(pools) for name in [*_names(rng, rng.choice([1, 3, 8])), *([""] if rng.random() < 0.1 else [])]}
    objects = []
    for _ in range(rows):
        row = {name: rng.choice(pool) for name, pool in columns.items() if rng.random() < 0.9} | {LABEL: rng.choice("uv")}
        objects.append(dict(rng.sample(list(row.items()), len(row))))
    said = [json.dumps(row) if rng.random() < 0.5 else _unescaped(row) for row in objects]
    array = rng.random() < 0.4
    text = "[" + rng.choice([",", ",\n", " ,\r\n"]).join(said) + "]" if array else rng.choice(["\n", "\r\n", "\n\n"]).join(said) + "\n"
    text = JSON_FAULTS[fault](text) if fault else text
    content = text.encode("utf-8-sig" if rng.random() < 0.2 else "utf-8")
    path, content = _packed(rng, folder / f"{seed}{rng.choice(['.jsonl', '.json', '.ndjson'])}", content, fault)
    path.write_bytes(content)
    objects = [] if fault == "nothing" else objects
    named = dict.fromkeys(key for row in objects for key in row)
    return Hostile(JsonLines(path=str(path)), lambda: {name: [row.get(name) for row in objects] for name in named}, fault)


JSON_FAULTS: dict[str, Callable[[str], str]] = {
    "nothing": lambda text: "",
    "no object": lambda text: text[:-1] + ", 5]" if text[0] == "[" else text + "5\n",
    "no JSON": lambda text: text.replace('"u"', "u").replace('"v"', "v"),
    "broken off": lambda text: text[:-3],
    "no comma": lambda text: text[:-1] + "{}]" if text[0] == "[" else text.replace('", "', '" "').replace(', "', ' "'),
}


def _unescaped(row: dict[str, Any]) -> str:
    """Letters as such, unless there are halves of some, which UTF-8 has not."""
    text = json.dumps(row, ensure_ascii=False)
    return json.dumps(row) if any("\ud800" <= letter <= "\udfff" for letter in text) else text


def parquet_file(seed: int, folder: Path) -> Hostile:
    rng = random.Random(f"parquet {seed}")
    table, fault = _table(rng, _TYPES), rng.choice(["", "", "", "", *TYPED_FAULTS])
    path = folder / f"{seed}.parquet"
    group = rng.choice([1 if len(table) < 100 else 50, 7, 100, 10_000])
    codec = rng.choice(["none", "snappy", "zstd", "gzip", "brotli", "lz4"])
    version, page = rng.choice(["1.0", "2.4", "2.6"]), rng.choice(["1.0", "2.0"])
    pq.write_table(
        table, path, row_group_size=group, compression=codec, version=version, data_page_version=page, store_schema=rng.random() < 0.7
    )
    _damage(path, fault, rng)
    return Hostile(Parquet(path=str(path)), lambda: _values(pq.read_table(path)), fault)


def arrow_file(seed: int, folder: Path) -> Hostile:
    rng = random.Random(f"arrow {seed}")
    table, fault = _table(rng, _TYPES | _ARROW_TYPES), rng.choice(["", "", "", "", *TYPED_FAULTS])
    path, stream = folder / f"{seed}{rng.choice(['.arrow', '.feather', '.arrows'])}", rng.random() < 0.4
    options = pa.ipc.IpcWriteOptions(compression=rng.choice([None, "lz4", "zstd"]))
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(path, table.schema, options=options) as sink:
        for start in range(0, len(table), step := rng.choice([1 if len(table) < 100 else 25, 50, 5000])):
            sink.write_table(table.slice(start, step).combine_chunks())
    _damage(path, fault, rng)

    def expected() -> dict[str, list[Any]]:
        with pa.memory_map(str(path)) as opened:
            return _values((pa.ipc.open_stream if stream else pa.ipc.open_file)(opened).read_all())

    return Hostile(Arrow(path=str(path)), expected, fault)


TYPED_FAULTS = ("nothing", "broken off", "turned bits", "another kind")


def _damage(path: Path, fault: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if fault == "turned bits":
        for _ in range(20):
            content[rng.randrange(8, len(content))] ^= 1 << rng.randrange(8)
    cut = {"nothing": 0, "broken off": rng.randrange(1, len(content))}.get(fault, len(content))
    path.write_bytes(b"a,b\n1,2\n" * 20 if fault == "another kind" else content[:cut])


def _whole(bits: int, signed: bool = True) -> list[int]:
    return [0, 1, 2 ** (bits - signed) - 1, *([-(2 ** (bits - 1)), -1] if signed else [])]


_MOMENTS = [datetime(2026, 1, 2, 3, 4, 5), datetime(1960, 5, 6), datetime(2262, 1, 1)]
_TYPES: dict[pa.DataType, list[Any]] = {
    pa.bool_(): [True, False],
    **{getattr(pa, f"int{bits}")(): _whole(bits) for bits in (8, 16, 32, 64)},
    **{getattr(pa, f"uint{bits}")(): _whole(bits, False) for bits in (8, 16, 32, 64)},
    pa.float16(): [np.float16(0.1), np.float16(2), np.float16("nan")],
    pa.float32(): [0.1, -0.0, 3.4e38, float("nan"), float("inf"), 1e-40],
    pa.float64(): [0.1, -0.0, 1e308, float("nan"), float("-inf"), 5e-324, 9007199254740993.0],
    pa.decimal128(38, 10): [Decimal("1.5"), Decimal("-12345678901234567890.0123456789"), Decimal(0)],
    pa.decimal256(50, 2): [Decimal("1.50"), Decimal("-1234567890123456789012345678901234567890.25")],
    pa.string(): list(TEXTS),
    pa.large_string(): ["a", "Ü", "nul\0"],
    pa.binary(): [b"", b"\x00\xff", b"abc"],
    pa.large_binary(): [b"x", b"y" * 3000],
    pa.binary(3): [b"abc", b"\x00\x01\x02"],
    pa.date32(): [date(2026, 1, 2), date(1, 1, 1), date(9999, 12, 31)],
    pa.date64(): [date(2026, 1, 2), date(1969, 12, 31)],
    pa.timestamp("s"): _MOMENTS,
    pa.timestamp("ms", "UTC"): [moment.replace(tzinfo=UTC) for moment in _MOMENTS],
    pa.timestamp("us", "+05:30"): [moment.replace(tzinfo=UTC) for moment in _MOMENTS],
    pa.timestamp("ns"): [datetime(2026, 1, 2, 3, 4, 5, 678900)],
    pa.time32("s"): [time(1, 2, 3), time(0)],
    pa.time64("us"): [time(23, 59, 59, 999999)],
    pa.duration("us"): [timedelta(days=1), timedelta(microseconds=-5)],
    pa.null(): [None],
    pa.list_(pa.int32()): [[1, 2], [], [None]],
    pa.list_(pa.string()): [["a", "b"], ["c"], []],
    pa.large_list(pa.float64()): [[1.5], [], [float("nan"), None]],
    pa.list_(pa.float32(), 3): [[1.0, 2.0, 3.0], [0.5, None, 0.25]],
    pa.list_(pa.list_(pa.uint8())): [[[1, 2], [3, 4]], [[], [5]]],
    pa.struct([("q", pa.int64()), ("r", pa.string())]): [{"q": 1, "r": "x"}, {"q": None, "r": None}],
    pa.list_(pa.struct([("when", pa.timestamp("us"))])): [[{"when": _MOMENTS[0]}], []],
    pa.map_(pa.string(), pa.int32()): [[("k", 1), ("l", None)], []],
    pa.dictionary(pa.int8(), pa.string()): ["red", "green", "NA"],
    pa.dictionary(pa.int32(), pa.int64()): [5, 6],
}
_ARROW_TYPES: dict[pa.DataType, list[Any]] = {
    pa.string_view(): ["short", "x" * 50, "", "NA"],
    pa.binary_view(): [b"short", b"x" * 50],
    pa.list_view(pa.int64()): [[1], [], [2, 3]],
    pa.dictionary(pa.int16(), pa.large_string()): ["u", "v"],
    pa.list_(pa.string_view()): [["x" * 20], []],
    pa.month_day_nano_interval(): [pa.MonthDayNano([1, 2, 3])],
    pa.large_list_view(pa.string()): [["a"], None, []],
    pa.run_end_encoded(pa.int32(), pa.int64()): [1, 2],
    pa.bool8(): [1, 0],
    pa.uuid(): [b"0123456789abcdef"],
}


def _table(rng: random.Random, types: dict[pa.DataType, list[Any]]) -> pa.Table:
    rows = rng.choice([0, *SIZES])
    columns: dict[str, pa.Array] = {}
    for name in _names(rng, rng.choice([1, 4, 12])):
        kind = rng.choice(list(types))
        nulls = rng.choice([0, 0.2, 1])
        columns[name] = _array([None if rng.random() < nulls else rng.choice(types[kind]) for _ in range(rows)], kind)
    return pa.table(columns | {LABEL: pa.array([rng.choice("uv") for _ in range(rows)], pa.string())})


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_run_end_encoded(kind):
        import pyarrow.compute as pc

        return pc.run_end_encode(pa.array(values, kind.value_type), run_end_type=kind.run_end_type)
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
    return pa.array(values, kind)


def _values(table: pa.Table) -> dict[str, list[Any]]:
    return {name: column.to_pylist() for name, column in zip(table.column_names, table.columns, strict=True)}


def _names(rng: random.Random, count: int) -> list[str]:
    names = rng.sample(NAMES, min(count, len(NAMES)))
    return [*names, *(f"{rng.choice(string.ascii_letters)}{number}" for number in range(count - len(names)))]


def _known(text: str, encoding: str) -> str:
    return text.encode(encoding, "ignore").decode(encoding) or "k"


def _packed(rng: random.Random, path: Path, content: bytes, fault: str) -> tuple[Path, bytes]:
    """The same, compressed or not, and broken off if that is the fault."""
    how = rng.choice([*PACKED, "", "", "", ""]) if fault != "broken off" else rng.choice(list(PACKED))
    content = PACKED[how](content) if how else content
    return path.with_name(path.name + how), content[: len(content) // 2] if fault == "broken off" else content


def _zipped(content: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside", content)
    return sink.getvalue()


PACKED: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".zip": _zipped}
