"""The first pass of `prepare`, on a block of raw rows: rules for single rows, decoding, and a key for every row.

Good rows go to piece files, Arrow tables in the order of the rows' keys, so that later passes can read any range of keys from
all of them without holding more than that range. Rows that are set aside go to quarantine as they were read, with their reason.
The key of a row is a 128-bit hash of its inputs and target: of numbers as the source has them, of others as the model sees them.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dlopt import remote
from dlopt.data.clean import DropDuplicates, ExactDuplicates, NearDuplicateImages, NearDuplicates, NearDuplicateTexts, RowRule
from dlopt.data.counter import mix, row_keys
from dlopt.data.kinds import kinds
from dlopt.data.kinds.base import words_of_texts
from dlopt.data.section import Data
from dlopt.data.table.split import RandomSplit, StratifiedSplit
from dlopt.data.types.columns import Columns
from dlopt.data.types.exact import keys_of_rest, lost_in_single, raw_values, with_rest
from dlopt.data.types.tensors import array_of, column_of
from dlopt.data.types.values import Reasons, is_text
from dlopt.part import DloptError, Feature

PIECE_BYTES = 32 * 2**20
"""About how many bytes of decoded rows a piece has."""
TARGET, SIDE, HIGH, LOW, TIE = "__target", "__side", "__high", "__low", "__tie"
"""Columns of a piece beside those of the inputs: the target, what the split goes by, the two words of the key, and a hash of what
tells rows of one key apart."""
DIGITS = "__digits"
"""What columns begin with that tell apart numbers of more digits than float64 has; they go into the key alone."""
REASON = "reason"
MOST_REASONS, KEPT_REASONS, OTHERS = 1000, 100, "other reasons"
"""When there are more different reasons, so many of them are told apart, and what the rest is called."""


@dataclass(frozen=True)
class PieceReport:
    """What the first pass says of some rows of a source."""

    path: str
    """Where the good ones are."""
    rows: int
    """How many those are."""
    read: int
    """How many rows there were."""
    reasons: Counter[str]
    """Why rows could not be read."""
    dropped: Counter[int]
    """How many rows each part of `clean`, by its place, has dropped."""
    digits: Counter[str]
    """How many numbers of each column have more digits than float64 holds."""
    labels: Counter[Any]
    """Classes or labels of the good rows."""
    quarantine: str
    """Where rows that were set aside are, as they were read; "" when there were none."""
    text_bytes: int = 0
    """Of the texts, categories and labels of the good rows."""


@dataclass
class Read:
    """What the first pass says of all rows of a source, piece after piece: see `PieceReport`."""

    pieces: list[str] = field(default_factory=list)
    quarantine: list[str] = field(default_factory=list)
    rows: int = 0
    read: int = 0
    text_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    dropped: Counter[int] = field(default_factory=Counter)
    digits: Counter[str] = field(default_factory=Counter)
    labels: Counter[Any] = field(default_factory=Counter)

    @classmethod
    def of(cls, pieces: Iterable[PieceReport]) -> Read:
        read = cls()
        for piece in pieces:
            read.add(piece)
        return read

    def add(self, piece: PieceReport) -> None:
        self.pieces += [piece.path] if piece.rows else []
        self.quarantine += [piece.quarantine] if piece.quarantine else []
        for name in ("rows", "read", "text_bytes"):
            setattr(self, name, getattr(self, name) + getattr(piece, name))
        for name in ("reasons", "dropped", "digits", "labels"):
            getattr(self, name).update(getattr(piece, name))
        self.reasons = fewer(self.reasons)

    def as_json(self) -> dict[str, Any]:
        """Without where the pieces were."""
        counts = {name: list(getattr(self, name).items()) for name in ("reasons", "dropped", "digits", "labels")}
        return counts | {name: getattr(self, name) for name in ("rows", "read", "text_bytes")}

    @classmethod
    def from_json(cls, known: dict[str, Any]) -> Read:
        counts = {name: Counter(dict(known[name])) for name in ("reasons", "dropped", "digits", "labels")}
        return cls(**(known | counts))


def fewer(reasons: Counter[str]) -> Counter[str]:
    """The same, or the most frequent ones and how many others there are: each bad value makes a reason of its own, and each row has its
    own in quarantine."""
    if len(reasons) <= MOST_REASONS:
        return reasons
    others = reasons.pop(OTHERS, 0)
    kept = Counter(dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))[:KEPT_REASONS]))
    kept[OTHERS] = others + reasons.total() - kept.total()
    return kept


def identity_column(place: int) -> str:
    """Where the numbers lie that a part of `clean` compares rows by."""
    return f"__identity{place}"


def order_column(place: int) -> str:
    """Where the numbers lie that say which of several rows stays."""
    return f"__order{place}"


def is_local(part: Any) -> bool:
    """Whether rows that the part compares always are in one range of keys."""
    return isinstance(part, DropDuplicates) and not part.columns and part.order_by is None


class Spill:
    """A function for Ray Data's map_batches: blocks of raw rows to one line for each piece, a pickled PieceReport."""

    def __init__(
        self,
        section: Data,
        features: tuple[Feature, ...],
        whole: bool,
        folder: str,
        meaning: Columns = Columns(),  # noqa: B008
    ) -> None:
        self.section, self.features, self.whole, self.folder, self.meaning = section, features, whole, Path(folder), meaning
        row_bytes = sum(feature.size * np.dtype(feature.stored).itemsize for feature in features) + 64
        self.step = max(1, PIECE_BYTES // row_bytes)

    def __call__(self, table: pa.Table) -> Iterator[dict[str, list[Any]]]:
        there = set(table.column_names)
        for column in self.section.columns:
            if column not in there:
                raise DloptError(f"one of the files has no column {column!r}; its columns are {', '.join(table.column_names)}")
        step = min(self.step, max(1, 2 * PIECE_BYTES * len(table) // max(table.nbytes, 1)))  # of few rows may be much text
        for start in range(0, len(table), step):
            yield {"piece": [as_json(self.piece(table.slice(start, step)))]}

    def piece(self, raw: pa.Table) -> PieceReport:
        """Judge, decode and key rows, and write them."""
        said = self.meaning.canonical(raw, self.section.compared)
        ruled, by_rule = self._judged(said)
        columns, reasons = self._decoded(said)
        digits = self._digits(raw, columns)
        bad = {row: " ".join(why.split("\n")) for row, why in reasons.items() if row not in ruled}
        quarantine = self._set_aside(raw, ruled | bad)
        good = pa.table(columns)
        if ruled or bad:
            good = good.filter(pa.array(_mask(len(raw), ruled.keys() | bad.keys(), False)))
        labels = self.section.target.count(good[TARGET].combine_chunks())
        path = write_rows(self._keyed(good), self.folder) if len(good) else ""
        text_bytes = sum(pc.sum(pc.binary_length(column)).as_py() or 0 for column in good.columns if is_text(column.type))
        return PieceReport(path, len(good), len(raw), fewer(Counter(bad.values())), by_rule, digits, labels, quarantine, text_bytes)

    def _judged(self, raw: pa.Table) -> tuple[Reasons, Counter[int]]:
        """Rows that break a rule, and how many each rule has dropped first."""
        reasons: Reasons = {}
        counts: Counter[int] = Counter()
        for place, part in enumerate(self.section.clean):
            if isinstance(part, RowRule):
                found = part.judge(raw)
                broken = [row for row in np.flatnonzero(found.is_valid().to_numpy(zero_copy_only=False)).tolist() if row not in reasons]
                reasons |= dict(zip(broken, found.take(pa.array(broken, pa.int64())).to_pylist(), strict=True))
                counts[place] = len(broken)
        return reasons, counts

    def _decoded(self, raw: pa.Table) -> tuple[dict[str, pa.Array], Reasons]:
        """Columns of the inputs, the target and the split, what duplicates are compared by, and reasons for bad rows."""
        columns: dict[str, pa.Array] = {}
        reasons: Reasons = {}
        for part, feature in zip(self.section.inputs, self.features, strict=True):
            found, wrong = part.read(raw, feature)
            columns |= found
            reasons = wrong | reasons
        columns[TARGET], wrong = self.section.target.read(raw, self.whole)
        reasons = wrong | reasons
        split = self.section.split
        if not isinstance(split, (RandomSplit, StratifiedSplit)):
            columns[SIDE], wrong = split.side(raw)
            reasons = wrong | reasons
        for place, clean in enumerate(self.section.clean):
            if not is_local(clean):
                columns |= self._compared(place, clean, raw, columns)
        return columns, reasons

    def _digits(self, raw: pa.Table, columns: dict[str, pa.Array]) -> Counter[str]:
        """Note keys of what float64 does not hold of inputs and targets, so in hardly any table; and count such numbers of each column."""
        counts: Counter[str] = Counter()
        for part, name in [*((part, part.tensor) for part in self.section.inputs), (self.section.target, TARGET)]:
            lost = part.lost(raw, columns[name]) if name in columns else []
            if any(rest is not None for rest in lost):
                rest = np.stack([np.zeros(len(raw)) if rest is None else rest for rest in lost], axis=1)
                columns[f"{DIGITS}{name}"] = column_of(keys_of_rest(rest))
                counts.update(dict(zip(part.columns, np.count_nonzero(rest, axis=0).tolist(), strict=True)))
        return counts

    def _compared(self, place: int, part: Any, raw: pa.Table, columns: dict[str, pa.Array]) -> dict[str, pa.Array]:
        if isinstance(part, NearDuplicates):
            return {identity_column(place): column_of(_matrix(self._sketch(part, raw, columns)))}
        if not isinstance(part, ExactDuplicates):
            return {}
        found = {}
        if part.columns:
            found[identity_column(place)] = column_of(part.identity(raw))
        if (order := part.order(raw)) is not None:
            found[order_column(place)] = pa.array(order)
        return found

    def _sketch(self, part: Any, raw: pa.Table, columns: dict[str, pa.Array]) -> np.ndarray:
        if isinstance(part, NearDuplicateImages):
            feature = next((feature for feature in self.features if feature.holds == "pixels" and part.column in feature.columns), None)
            if feature is None:
                raise DloptError(f"data.clean: {part.kind}: column {part.column!r} is no image among data.inputs")
            return part.sketch(array_of(pa.chunked_array([columns[feature.name]]), "uint8", feature.shape))
        assert isinstance(part, NearDuplicateTexts)
        return part.sketch(part.texts(raw))

    def _keyed(self, good: pa.Table) -> pa.Table:
        """With the key of every row, and in the order of these. What float32 holds of a row's numbers makes its key; what it does not hold
        changes the key of the rows that have such digits."""
        target = self.section.target
        words = [kinds[feature.kind].words(feature, good) for feature in self.features]
        goal = _target_words(good[TARGET].combine_chunks(), len(target.columns))
        keys = row_keys([*(word for group in words for word in group), goal])
        numbers = [(feature.name, feature.size) for feature in self.features if feature.holds == "numbers"]
        for name, width in [*numbers, *([(TARGET, len(target.columns))] if target.trained_as == "number" else [])]:
            keys = with_rest(keys, lost_in_single(raw_values(good[name], width)))
        for name in [name for name in good.column_names if name.startswith(DIGITS)]:
            keys = with_rest(keys, array_of(good[name], "uint64", (2,)))
            good = good.drop_columns([name])
        table = good.append_column(HIGH, pa.array(keys[:, 0])).append_column(LOW, pa.array(keys[:, 1]))
        if sides := [name for name in table.column_names if name == SIDE or name.startswith(("__identity", "__order"))]:
            table = table.append_column(TIE, pa.array(_tie(table, sides)))
        return table.take(pa.array(np.argsort(keys[:, 0], kind="stable")))

    def _set_aside(self, raw: pa.Table, reasons: Reasons) -> str:
        """Write rows as they were read, with their reason."""
        if not reasons:
            return ""
        path = self.folder / f"{uuid.uuid4().hex}.parquet"
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = sorted(reasons)
        table = raw.take(pa.array(rows))
        pq.write_table(
            table.append_column(free_name(REASON, table.column_names), pa.array([reasons[row] for row in rows], pa.string())), path
        )
        remote.give_spread(path)
        return str(path)


def open_rows(path: str) -> pa.Table:
    """A file of rows, mapped into memory: only what is looked at is read."""
    remote.take(Path(path))
    with pa.memory_map(path) as source:
        return pa.ipc.open_file(source).read_all()


def write_rows(table: pa.Table, folder: Path) -> str:
    """Write rows to a file of their own: a task that is tried again writes another one."""
    path = folder / f"{uuid.uuid4().hex}.arrow"
    folder.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    remote.give_spread(path)
    return str(path)


def as_json(piece: PieceReport) -> str:
    """A piece as it travels to the driver."""
    pairs = {name: list(getattr(piece, name).items()) for name in ("reasons", "dropped", "digits", "labels")}
    plain = {name: getattr(piece, name) for name in ("path", "rows", "read", "quarantine", "text_bytes")}
    return json.dumps(plain | pairs)


def from_json(text: str) -> PieceReport:
    found = json.loads(text)
    for name in ("reasons", "dropped", "digits", "labels"):
        found[name] = Counter(dict(found[name]))
    return PieceReport(**found)


def free_name(name: str, taken: Collection[str]) -> str:
    """The name, or a longer one when the rows have such a column of their own."""
    while name in taken:
        name += "_"
    return name


def _mask(rows: int, chosen: Any, value: bool) -> np.ndarray:
    mask = np.full(rows, not value)
    mask[list(chosen)] = value
    return mask


def _matrix(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)


def _target_words(values: pa.Array, width: int) -> np.ndarray:
    """Words of the target's values, uint64 or float32 (rows, ...). width: how many numbers each is."""
    if pa.types.is_fixed_size_binary(values.type):
        return raw_values(values, width).astype(np.float32, copy=False)
    if pa.types.is_integer(values.type):
        return values.cast(pa.int64()).to_numpy(zero_copy_only=False).reshape(-1, 1)
    if pa.types.is_list(values.type):
        values = pa.array(["\0".join(labels) for labels in values.to_pylist()], pa.string())
    return words_of_texts(values)


def _tie(table: pa.Table, columns: list[str]) -> np.ndarray:
    """A hash of some columns of plain numbers or of bytes, uint64 (rows,)."""
    total = np.zeros(len(table), dtype=np.uint64)
    for name in columns:
        column = table[name].combine_chunks()
        if pa.types.is_fixed_size_binary(column.type):
            words = array_of(pa.chunked_array([column]), "uint8", (column.type.byte_width,))
        else:
            words = column.to_numpy(zero_copy_only=False).reshape(-1, 1)
        total = mix(total ^ row_keys([words])[:, 0])
    return total
