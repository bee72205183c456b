"""What happens to raw values outside the model's graph: decoding, hashing, tokens, parts of dates. Both `prepare` and the server's
replica use it, so that training and serving see the same numbers. Imports neither torch nor Ray, and pyarrow only for dates."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin
from PIL.ImageFile import ImageFile

from dlopt.data.counter import string_words
from dlopt.data.tokenizer import join_texts, tokens_of
from dlopt.data.types.canonical import ColumnType, as_number, as_text
from dlopt.part import DloptError, Feature, Signature

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded. Pillow knows forty more formats, some hardly looked after, of which EPS starts Ghostscript on what a stranger sends."""
LOADED = (TiffImagePlugin, WebPImagePlugin)
"""Of these formats those that Pillow does not load by itself; for one that is not loaded it would load all forty."""
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's name for an image with so many channels."""
GREY = ("1", "L", "LA", "La")
GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
"""Grey of 16 bits a pixel, which Pillow would cut off at 255; it is scaled to 8 bits."""
ZONED = r"\d(Z|[+-]\d\d:?\d\d)$|:\d\d(\.\d+)?[+-]\d\d$"
"""A date and time in ISO 8601 that says its zone: Z, +05:30, +0530, +05."""
FINE = r"(:\d\d\.\d{6})\d+(Z|[+-][\d:]+)?$"
"""One of more than microseconds, which the rest is cut from."""
NO_BYTES = ("I", "F")
"""Numbers of 32 bits, with no scale that would make them bytes."""
LARGEST = float(np.finfo(np.float32).max)
MOST_PIXELS = 64 * 1024 * 1024
"""A larger image is refused before it is decoded, instead of filling the memory."""
MOST_SCANS = 100
"""A progressive JPEG has about ten scans; each takes as long as the image is large, and few bytes can say thousands."""
BITS, TILE_WIDTH, TILE_HEIGHT, MOST_TILE = 258, 322, 323, 2**20
"""TIFF's tags: bits of a value, size of a tile; and how many pixels a tile may have that is larger than its image: all are decoded."""
WHITE = (255, 255, 255)
PLAIN_NUMBERS = {int, float, type(None)}
DATA_URI = re.compile(r"data:[^,;]*(;[^,;]*)*;base64,", re.IGNORECASE)
"""What stands before the base64 of a file in a data URI."""
BLANKS = re.compile(r"\s+")
"""What base64 may have in between, as MIME breaks it into lines."""


def decode_image(
    data: bytes,
    channels: int | None = None,
    size: tuple[int, int] | None = None,
    only: tuple[int, int] | None = None,
    background: tuple[int, int, int] = WHITE,
) -> np.ndarray:
    """Pixels of an encoded image, one of FORMATS, as uint8 of shape (height, width, channels): the first frame, turned as its EXIF says.

    channels: 1 grey, 3 colour, 4 with transparency; None keeps grey as 1 and makes the rest 3.
    size: (height, width) to resize to, bilinear. only: the one (height, width) that is taken; another is refused undecoded.
    background: what is behind transparent pixels, unless channels is 4. Raises DloptError saying why the bytes are no image.
    """
    with _opened(data) as file:
        if only and only not in ((file.height, file.width), (file.width, file.height)):
            raise _wrong_size(file, only)
        file.load()
        with suppress(Exception):  # an orientation that cannot be read, of an image that can: browsers pass over it as well
            ImageOps.exif_transpose(file, in_place=True)
        if only and (file.height, file.width) != only:
            raise _wrong_size(file, only)
        image = _converted(file, channels or _channels(file, background), background)
        if size and (image.height, image.width) != tuple(size):
            image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def image_shape(data: bytes, background: tuple[int, int, int] = WHITE) -> tuple[int, int, int]:
    """The (height, width, channels) that decode_image would give, from the image's header alone. Raises DloptError as it does."""
    with _opened(data) as file:
        late = file.format == "PNG" and "exif" not in file.info and b"eXIf" not in data  # else Pillow decodes a PNG to look for it
        turned = False
        if not late and file.format != "TIFF":  # whose sizes are those of the turned image already
            with suppress(Exception):
                turned = file.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        height, width = (file.width, file.height) if turned else (file.height, file.width)
        return height, width, _channels(file, background)


@contextmanager
def _opened(data: bytes) -> Iterator[ImageFile]:
    """An image whose header is read and allowed, not yet decoded; whatever Pillow says of it within is one line."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            _refuse_large(file, data)
            if file.mode in NO_BYTES:
                raise DloptError(f"image of 32-bit numbers (mode {file.mode}): save it with 8 or 16 bits")
            yield file
    except DloptError:
        raise
    except UnidentifiedImageError:  # whose message holds an address in memory
        raise DloptError(f"not an image: its bytes are none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise DloptError(f"image is too large: it has more than {MOST_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise DloptError(f"not an image: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None


def _refuse_large(file: ImageFile, data: bytes) -> None:
    """Refuse by the header what would take much memory or time to decode."""
    if file.width * file.height > MOST_PIXELS:
        raise DloptError(f"image of {file.width}x{file.height} is too large: it has more than {MOST_PIXELS:,} pixels")
    tags = getattr(file, "tag_v2", {})
    if tags.get(TILE_WIDTH, 0) * tags.get(TILE_HEIGHT, 0) > min(MOST_PIXELS, max(MOST_TILE, 4 * file.width * file.height)):
        raise DloptError(f"image with tiles of {tags[TILE_WIDTH]}x{tags[TILE_HEIGHT]} is too large")
    if file.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MOST_SCANS:
        raise DloptError(f"image of more than {MOST_SCANS} scans: save it anew")


def _wrong_size(file: ImageFile, only: tuple[int, int]) -> DloptError:
    return DloptError(f"image of height {file.height} and width {file.width} where {only[0]} and {only[1]} are needed")


def _channels(file: ImageFile, background: tuple[int, int, int]) -> int:
    """1 of a grey image, 3 of one with colours, be it only behind it."""
    coloured = file.has_transparency_data and len(set(background)) > 1
    return 1 if file.mode in GREY + GREY_16 and not coloured else 3


def _converted(image: Image.Image, channels: int, background: tuple[int, int, int]) -> Image.Image:
    """In 8 bits a channel, on the background where the result has no transparency of its own."""
    transparent = image.has_transparency_data
    if image.mode in GREY_16:
        image = _in_bytes(image)
    if transparent and channels != 4:
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def encode_png(pixels: np.ndarray) -> bytes:
    """Pixels, uint8 (height, width, channels), as a PNG: the way back, without loss."""
    content = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(content, format="png")
    return content.getvalue()


def _in_bytes(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as grey of 8, with transparency if it has any: 65,535 becomes 255, and of a TIFF of 12 bits 4,095."""
    values, most = np.asarray(image), 2 ** getattr(image, "tag_v2", {}).get(BITS, (16,))[0] - 1
    grey = Image.fromarray(((values.astype(np.uint32) * 255 + most // 2) // most).astype(np.uint8))
    if (clear := image.info.get("transparency")) is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))


def hashed(values: pa.Array, buckets: int) -> np.ndarray:
    """The code of each text, int32 (rows,): its hash modulo `buckets`."""
    codes = values.dictionary_encode()
    words = string_words(codes.dictionary.to_pylist()) % np.uint64(buckets)
    return words.astype(np.int32)[codes.indices.to_numpy()]


def parse_dates(values: pa.Array, form: str) -> pa.Array:
    """Dates, timestamps or texts as timestamps of microseconds in UTC. Raises DloptError naming the first value that is none.

    form: how texts are written, as strptime has it; "" for ISO 8601, with or without a time and a zone.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = values.type
    if pa.types.is_null(kind):
        return values.cast(pa.timestamp("us"))
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return (
            values.cast(pa.timestamp("us", "UTC"), safe=False).cast(pa.timestamp("us"))
            if getattr(kind, "tz", None)
            else values.cast(pa.timestamp("us"), safe=False)
        )
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DloptError(f"{kind} is not a date")
    try:
        if form:
            return _of_form(values, form)
        zoned = pc.match_substring_regex(values, ZONED)
        if pc.any(pc.match_substring_regex(values, FINE)).as_py():
            values = pc.replace_substring_regex(values, FINE, r"\1\2")
        if not pc.any(zoned).as_py():
            return values.cast(pa.timestamp("us"))
        day = pc.equal(pc.utf8_length(values), len("2026-11-24"))  # which takes no zone without a time
        local = pc.if_else(zoned, values, pc.binary_join_element_wise(values, pc.if_else(day, "T00:00:00Z", "Z"), ""))
        return local.cast(pa.timestamp("us", "UTC")).cast(pa.timestamp("us"))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        first = next((value for value in values.to_pylist() if value is not None), "")
        like = f"such as {form}" if form else "such as 2026-11-24 or 2026-11-24T08:30:00Z"
        raise DloptError(f"{first!r:.40} is not a date {like}") from None


def _of_form(values: pa.Array, form: str) -> pa.Array:
    """Arrow takes 31.2. for 3.3., so whatever may be such a day is looked at again; some forms, such as %f, Python alone can read.
    Raises pyarrow.ArrowInvalid."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not _arrow_reads(form):
        codes = values.dictionary_encode()
        moments = [_strptime(text, form) for text in codes.dictionary.to_pylist()]
        return pa.array(moments, pa.timestamp("us")).take(codes.indices)
    found = pc.strptime(values, format=form, unit="us").cast(pa.timestamp("us"))
    for text in pc.unique(values if "%z" in form else values.filter(pc.less_equal(pc.day(found), 3))).drop_null().to_pylist():
        _strptime(text, form)
    return found


def _strptime(text: str, form: str) -> datetime:
    """A moment in UTC. Raises pyarrow.ArrowInvalid."""
    import pyarrow as pa

    try:
        found = datetime.strptime(text.strip(), form)
    except ValueError as error:
        raise pa.ArrowInvalid(str(error)) from None
    return found.astimezone(UTC).replace(tzinfo=None) if found.tzinfo else found


@cache
def _arrow_reads(form: str) -> bool:
    """Whether Arrow makes of a moment in this form what Python does."""
    import pyarrow as pa
    import pyarrow.compute as pc

    text = datetime(2026, 11, 24, 20, 31, 42, 250_000, UTC).strftime(form)
    try:
        found = pc.strptime(pa.array([text]), format=form, unit="us")[0].as_py()
    except pa.ArrowInvalid:
        return False
    return bool(found.replace(tzinfo=None) == _strptime(text, form))


def known_form(form: str) -> str:
    """The form, if it is one that dates can be written in and read again. Raises ValueError, as a pydantic validator does."""
    try:
        datetime.strptime(datetime(2026, 11, 24, 8, 30, tzinfo=UTC).strftime(form), form)
    except ValueError as error:
        raise ValueError(f"{form!r} is no form of dates: {error}") from None
    return form


def date_parts(values: pa.Array, parts: Sequence[str]) -> np.ndarray:
    """Parts of timestamps, float64 (rows, parts), NaN where missing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def part(name: str) -> pa.Array:
        match name:
            case "days":
                return pc.divide(values.cast(pa.int64()).cast(pa.float64()), 86_400e6)
            case "weekday":
                return pc.day_of_week(values)
            case "week":
                return pc.iso_week(values)
        return getattr(pc, name)(values)  # one of DatePart's names

    columns = [part(name).cast(pa.float64()).to_numpy(zero_copy_only=False) for name in parts]
    return np.stack(columns, axis=1)


def shifted(values: np.ndarray, offsets: Sequence[float]) -> np.ndarray:
    """Numbers (rows, columns) as the model gets them, float32: less their offsets, which are subtracted in float64. An exported graph
    does the same with what `encode_rows` gives it."""
    with np.errstate(over="ignore"):
        return (values - np.array(offsets) if offsets else values).astype(np.float32, copy=False)


Columns = Mapping[str, "Sequence[Any] | np.ndarray"]
"""Raw values by the name of their column; or, by the name of an input of several columns, these side by side: (rows, columns)."""


def encode_rows(signature: Signature, rows: Sequence[Any]) -> dict[str, np.ndarray]:
    """Raw rows as a client sends them, as the tensors that the model takes: {name: (rows, *shape)}.

    A row is an object of columns; when the model has one input tensor, its bare value is a row as well. An image is nested
    numbers 0-255 of shape (height, width) or (height, width, channels), or {"b64": base64 of an encoded image}. A number, a date
    (ISO 8601), a category (a string, a number, true or false) and a text may be null (missing). Strings come back as an array of
    objects. Raises DloptError naming the row and the column.
    """
    return encode_columns(signature, columns_of(signature, rows))


def columns_of(signature: Signature, rows: Sequence[Any]) -> Columns:
    """Rows as `encode_rows` takes them, by column. Raises DloptError."""
    alone, first = len(signature.inputs) == 1, signature.inputs[0]
    if alone and len(first.columns) > 1 and rows and not isinstance(rows[0], Mapping):
        return {first.name: rows}
    bare = alone and len(first.columns) == 1
    names = dict.fromkeys(name for feature in signature.inputs for name in feature.columns)
    return {name: [_value(row, name, index, bare) for index, row in enumerate(rows)] for name in names}


def encode_columns(signature: Signature, columns: Columns) -> dict[str, np.ndarray]:
    """Raw values by column, all of the same length, as the tensors that the model takes. Values are those of `encode_rows`, lists of one
    of them, or arrays of such; an image may be the bytes of a file. Raises DloptError naming the row and the column."""
    return {feature.name: _encode(feature, columns) for feature in signature.inputs}


def _encode(feature: Feature, columns: Columns) -> np.ndarray:
    side_by_side = columns.get(feature.name) if feature.name not in feature.columns else None
    if side_by_side is None and (lost := next((name for name in feature.columns if name not in columns), None)) is not None:
        raise DloptError(f"there is no column {lost!r}")
    if feature.kind == "image":
        return _images(feature, columns[feature.columns[0]] if side_by_side is None else side_by_side)
    if side_by_side is None:
        given = {name: _bare(columns[name]) for name in feature.columns}
    elif feature.kind == "number":
        return _numbers(feature, side_by_side)
    else:
        given = _side_by_side(feature, side_by_side)
    if feature.kind == "number":
        return _numbers(feature, _rows_of(list(given.values())))
    lists = {name: values.tolist() if isinstance(values, np.ndarray) else list(values) for name, values in given.items()}
    if feature.kind == "category":
        return _categories(feature, lists)
    if feature.kind == "text":
        return _no_wider(tokens_of(feature).encode(join_texts([_texts(feature, name, values) for name, values in lists.items()])))
    return np.concatenate([_dates(feature, name, values) for name, values in lists.items()], axis=1)


def _bare(values: Sequence[Any] | np.ndarray) -> Sequence[Any] | np.ndarray:
    """The values of one column, of which each may be in a list of its own."""
    if isinstance(values, np.ndarray):
        return values.reshape(len(values)) if values.ndim > 1 and values.size == len(values) else values
    return [value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value for value in values]


def _rows_of(columns: list[Sequence[Any] | np.ndarray]) -> Sequence[Any] | np.ndarray:
    """Columns side by side."""
    if all(isinstance(values, np.ndarray) and values.dtype.kind in "biuf" for values in columns):
        return np.stack(columns, axis=1)
    return list(zip(*(values.tolist() if isinstance(values, np.ndarray) else values for values in columns), strict=True))


def _side_by_side(feature: Feature, rows: Sequence[Any] | np.ndarray) -> dict[str, Sequence[Any] | np.ndarray]:
    _check_width(feature, rows)
    if isinstance(rows, np.ndarray):
        return {name: rows[:, place] for place, name in enumerate(feature.columns)}
    return {name: [row[place] for row in rows] for place, name in enumerate(feature.columns)}


def _check_width(feature: Feature, rows: Sequence[Any] | np.ndarray) -> None:
    wide = len(feature.columns)
    if isinstance(rows, np.ndarray):
        fits = rows.ndim == 2 and rows.shape[1] == wide
    else:
        fits = set(map(type, rows)) <= {list, tuple} and set(map(len, rows)) <= {wide}
    if not fits:
        raise DloptError(f"rows must be lists of {wide} values or objects with the columns {', '.join(feature.columns)}")


def _categories(feature: Feature, columns: dict[str, list[Any]]) -> np.ndarray:
    """Texts, object (rows, columns), or int32 codes where they are hashed."""
    found = []
    for name, values in columns.items():
        kind = feature.type_of(name)
        found.append([_category(name, index, value, kind, feature.markers) for index, value in enumerate(values)])
    if feature.buckets:
        return np.stack([(string_words(values) % np.uint64(feature.buckets)).astype(np.int32) for values in found], axis=1)
    return np.array(found, dtype=object).T.reshape(len(found[0]), len(found))


def _category(name: str, index: int, value: Any, kind: ColumnType, missing: tuple[str, ...]) -> str:
    if value is not None and not isinstance(value, (str, int, float, date)):
        raise DloptError(f"row {index}: {name}: give a string, a number, true, false or null")
    return as_text(value, kind, missing)


def _texts(feature: Feature, name: str, values: list[Any]) -> list[str]:
    """Texts as they were trained on, "" where missing."""
    for index, value in enumerate(values):
        if value is not None and not isinstance(value, (str, int, float, date)):
            raise DloptError(f"row {index}: {name}: {value!r:.40} is not a text")
    kind = feature.type_of(name) if feature.kind == "text" else "string"
    return [as_text(value, kind, feature.markers) for value in values]


def _no_wider(ids: np.ndarray) -> np.ndarray:
    """Token ids (rows, length) with no more padding than the longest text needs."""
    return ids[:, : max(1, int((ids != 0).sum(axis=1).max()))] if len(ids) else ids


def _dates(feature: Feature, name: str, values: list[Any]) -> np.ndarray:
    import pyarrow as pa

    if any(isinstance(value, date) for value in values):
        return _parts(feature, name, pa.array(values))
    for index, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            raise DloptError(f"row {index}: {name}: {value!r:.40} is not a date")
    return _parts(feature, name, pa.array([value or None for value in _texts(feature, name, values)], pa.string()))


def _parts(feature: Feature, name: str, written: pa.Array) -> np.ndarray:
    try:
        found = parse_dates(written, feature.form)
    except DloptError:
        for index in range(len(written)):
            try:
                parse_dates(written.slice(index, 1), feature.form)
            except DloptError as error:
                raise DloptError(f"row {index}: {name}: {error}") from None
        raise
    return date_parts(found, feature.parts).astype(feature.dtype)


def _value(row: Any, column: str, index: int, bare: bool) -> Any:
    if isinstance(row, Mapping) and not (bare and set(row) == {"b64"}):
        if column not in row:
            raise DloptError(f"row {index}: has no column {column!r}")
        return row[column]
    if not bare:
        raise DloptError(f"row {index}: must be an object of columns")
    return row


def _images(feature: Feature, values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Whole numbers in plain lists take one conversion for the whole batch; anything else is looked at row by row."""
    if not len(values):
        return _empty(feature)
    if isinstance(values, np.ndarray):
        if values.dtype.kind != "O":
            return _pixels(feature, values)
        values = values.reshape(len(values)).tolist()
    for shape in _shapes(feature):
        try:
            numbers = _flat(values, shape)
            pixels = bytes(numbers)  # takes whole numbers from 0 to 255, and true and false
        except (TypeError, ValueError):
            continue
        if bool in set(map(type, numbers)):
            continue
        return np.frombuffer(pixels, np.uint8).reshape(-1, *feature.shape)
    return np.stack([_image(feature, value, index) for index, value in enumerate(values)])


def _pixels(feature: Feature, values: np.ndarray) -> np.ndarray:
    if values.shape[1:] not in _shapes(feature):
        raise DloptError(f"{feature.name}: shape {list(values.shape)} where {[len(values), *feature.shape]} is needed")
    if values.dtype != np.uint8:
        with np.errstate(invalid="ignore"):
            pixels = values.astype(np.uint8)
        if values.dtype.kind == "b" or (wrong := np.flatnonzero((pixels != values).reshape(len(values), -1).any(axis=1))).size:
            row = 0 if values.dtype.kind == "b" else wrong[0]
            raise DloptError(f"row {row}: {feature.name}: pixels must be whole numbers from 0 to 255")
        values = pixels
    return values.reshape(-1, *feature.shape)


def _shapes(feature: Feature) -> list[tuple[int, ...]]:
    """How a row's numbers may be nested: a grey image needs no lists of one."""
    return [feature.shape[:2], feature.shape] if feature.shape[2] == 1 else [feature.shape]


def _flat(values: Sequence[Any], shape: tuple[int, ...]) -> Sequence[Any]:
    """The numbers of nested lists that have exactly this shape. Raises TypeError or ValueError.

    numpy would make an array of strings as long as the longest one: a request of some megabytes could ask for terabytes.
    """
    for size in shape:
        if not set(map(type, values)) <= {list, tuple} or set(map(len, values)) != {size}:
            raise ValueError(f"lists of {size} are needed")
        values = list(chain.from_iterable(values))
    return values


def _image(feature: Feature, value: Any, index: int) -> np.ndarray:
    where = f"row {index}: {feature.name}"
    if isinstance(value, bytes):
        return _from_file(value, where, feature)
    if isinstance(value, Mapping):
        return _from_base64(value, where, feature)
    for shape in reversed(_shapes(feature)):  # the deepest first: it does not fit lists of numbers
        try:
            return _whole(_flat([value], shape), where).reshape(feature.shape)
        except ValueError:
            continue
    raise DloptError(f'{where}: give nested numbers of shape {list(feature.shape)} or {{"b64": "..."}}')


def _from_base64(value: Mapping[str, Any], where: str, feature: Feature) -> np.ndarray:
    if set(value) != {"b64"} or not isinstance(value["b64"], str):
        raise DloptError(f'{where}: give nested numbers or {{"b64": "..."}}')
    text = DATA_URI.sub("", value["b64"]) if value["b64"][:5].lower() == "data:" else value["b64"]
    try:
        data = base64.b64decode(BLANKS.sub("", text), validate=True)
    except ValueError:  # binascii.Error is one
        raise DloptError(f"{where}: b64 is not base64") from None
    return _from_file(data, where, feature)


def _from_file(data: bytes, where: str, feature: Feature) -> np.ndarray:
    height, width, channels = feature.shape
    limits = {"size": (height, width)} if feature.resize else {"only": (height, width)}
    try:
        return decode_image(data, channels, **limits, background=feature.background)
    except DloptError as error:
        raise DloptError(f"{where}: {error}") from None


def _whole(numbers: Sequence[Any], where: str) -> np.ndarray:
    if any(type(number) not in (int, float) or not 0 <= number <= 255 or number != int(number) for number in numbers):
        raise DloptError(f"{where}: pixels must be whole numbers from 0 to 255")
    return np.array(numbers, dtype=np.uint8)


def _numbers(feature: Feature, values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Numbers of rows (rows, columns), NaN where missing."""
    _check_width(feature, values)
    if isinstance(values, np.ndarray) and values.dtype.kind not in "biuf":
        values = values.tolist()
    if isinstance(values, np.ndarray):
        return _finite(feature, values.astype(np.float64))
    if not len(values):
        return _empty(feature)
    if set(map(type, chain.from_iterable(values))) <= PLAIN_NUMBERS:
        numbers: Any = [[np.nan if value is None else value for value in row] for row in values]
    else:
        numbers = [[_number(feature, *one, index) for one in zip(feature.columns, row, strict=True)] for index, row in enumerate(values)]
    try:
        found = np.array(numbers, dtype=np.float64)
    except OverflowError:
        found = np.array([[as_number(value) for value in row] for row in numbers])
    return _finite(feature, found)


def _number(feature: Feature, column: str, value: Any, index: int) -> float:
    """One value as training reads it from a file: texts of numbers are numbers, true is 1, and what says so is missing."""
    if value is None or (isinstance(value, str) and (value == "" or value in feature.markers)):
        return np.nan
    try:
        return as_number(value)
    except ValueError:
        raise DloptError(f"row {index}: {column}: {value!r:.40} is not a number") from None


def _finite(feature: Feature, found: np.ndarray) -> np.ndarray:
    """Numbers as the model takes them, float64 or float32; of neither kind infinite ones."""
    with np.errstate(over="ignore"):
        single = found.astype(np.float32)
    if np.isinf(single).any():
        row, place = np.argwhere(np.isinf(single))[0]
        raise DloptError(f"row {row}: {feature.columns[place]}: a number is too large")
    return found if feature.dtype == "float64" else single


def _empty(feature: Feature) -> np.ndarray:
    return np.zeros((0, *feature.shape), dtype=feature.dtype if feature.dtype == "float64" else feature.stored)
