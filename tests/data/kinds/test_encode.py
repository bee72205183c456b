"""Decoding: training and serving see the same numbers, to the bit, and what cannot be decoded says why."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from datetime import date, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dlopt.data.kinds import CategoryInput, CategoryTarget, DateInput, ImageInput, NumberInput, TextInput, encode_rows
from dlopt.data.kinds import pixels as decoding
from dlopt.data.kinds.pixels import decode_image, encode_png
from dlopt.data.types.columns import Columns
from dlopt.part import DloptError, Feature, Signature, Target

RANDOM = np.random.default_rng(5)
TARGET = Target(name="label", labels=(0, 1))
PIXELS = {channels: RANDOM.integers(0, 256, (9, 7, channels), dtype=np.uint8) for channels in (1, 3, 4)}


def file_of(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels[..., 0] if pixels.shape[-1:] == (1,) else pixels)
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def trained(values: list[Any], part: ImageInput = ImageInput()) -> tuple[Signature, np.ndarray, dict[int, str]]:  # noqa: B008
    """The signature, and the tensors and reasons that training would get, of a column of raw values."""
    table = pa.table({"image": values})
    feature = part.feature(table)
    columns, reasons = part.read(table, feature)
    return Signature(inputs=(feature,), target=TARGET), part.finish(pa.table(columns), feature), reasons


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"])
def test_an_encoded_image_is_served_as_it_was_trained_on(kind: str, channels: int) -> None:
    data = [file_of(PIXELS[channels], kind), file_of(255 - PIXELS[channels], kind)]
    signature, pixels, reasons = trained(data)
    served = encode_rows(signature, [{"image": {"b64": base64.b64encode(one).decode()}} for one in data])["image"]
    assert reasons == {}
    assert served.dtype == pixels.dtype == np.uint8
    assert (served == pixels).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_that_training_resized_are_resized_in_serving_too(kind: str) -> None:
    data = [file_of(PIXELS[3], kind), file_of(PIXELS[3][:4, :5], kind), file_of(PIXELS[1], kind)]
    signature, pixels, reasons = trained(data, ImageInput(size=(8, 6)))
    served = encode_rows(signature, [{"b64": base64.b64encode(one).decode()} for one in data])["image"]
    assert (reasons, served.shape) == ({}, (3, 8, 6, 3))
    assert (served == pixels).all()
    with pytest.raises(DloptError, match=r"nested numbers of shape \[8, 6, 3\]"):  # these are not resized, in training neither
        encode_rows(signature, [PIXELS[3].tolist()])


def test_lossless_images_keep_every_pixel() -> None:
    for channels, pixels in PIXELS.items():
        assert (decode_image(file_of(pixels), channels) == pixels).all()


@pytest.mark.parametrize("shape", [(28, 28), (5, 3, 3), (1, 1), (200, 300, 3)])
def test_a_plain_png_takes_the_short_way_to_the_same_pixels(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that is anything else, or damaged, the long one."""
    wavy = (np.add.outer(np.arange(shape[0]), np.arange(shape[1])) * 3 % 256).astype(np.uint8)
    noise = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    channels = 1 if len(shape) == 2 else 3
    for image in (noise, np.broadcast_to(wavy.reshape(*shape[:2], *[1] * (len(shape) - 2)), shape)):
        data = file_of(Image.fromarray(np.ascontiguousarray(image)))
        quick = decoding._plain_png(data, channels, shape[:2])
        assert quick is not None and (quick == image.reshape(*shape[:2], channels)).all()
    monkeypatch.setattr(decoding, "_opened", None)  # which would be the long way
    assert (decode_image(data, channels, only=shape[:2]) == quick).all()


def test_a_png_that_is_not_plain_takes_the_long_way() -> None:
    image = np.random.default_rng(1).integers(0, 256, (9, 7), dtype=np.uint8)
    data = file_of(Image.fromarray(image))
    middle = data.index(b"IDAT") + 20
    turned = Image.Exif()
    turned[0x0112] = 6
    others = [
        data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        data[:-12],
        data[:-30],
        data[:40],
        file_of(Image.fromarray(image), "PNG", exif=turned),
        file_of(Image.fromarray(image), "PNG", transparency=3),
        file_of(Image.fromarray(image).convert("P")),
        file_of(Image.fromarray(image.astype(np.uint16) * 257)),
        file_of(Image.fromarray(image).convert("RGBA")),
        file_of(Image.fromarray(image).convert("RGB")),
    ]
    assert [decoding._plain_png(one, 1, (9, 7)) for one in others] == [None] * len(others)
    assert decoding._plain_png(data, 1, (7, 9)) is None and decoding._plain_png(data, 3, (9, 7)) is None
    for damaged in others[2:4]:
        with pytest.raises(DloptError, match="not an image"):
            decode_image(damaged, 1, only=(9, 7))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_nested_numbers_are_served_as_they_were_trained_on(channels: int) -> None:
    rows = [PIXELS[channels].tolist(), (255 - PIXELS[channels]).tolist()]
    signature, pixels, _ = trained(rows)
    assert (encode_rows(signature, rows)["image"] == pixels).all()
    assert (pixels == np.stack([PIXELS[channels], 255 - PIXELS[channels]])).all()


def test_a_column_of_fixed_size_lists_is_taken_whole_with_its_offset() -> None:
    values = RANDOM.integers(0, 256, (10, 4, 5), dtype=np.uint8)
    column = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 5), 4)
    table = pa.table({"image": column}).slice(3, 4)
    part = ImageInput()
    feature = part.feature(table)
    columns, reasons = part.read(table, feature)
    pixels = part.finish(pa.table(columns), feature)
    assert reasons == {} and (pixels[..., 0] == values[3:7]).all()


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("CMYK", 3), ("I;16", 1)])
def test_channels_follow_from_the_mode(mode: str, channels: int) -> None:
    colour = Image.fromarray(PIXELS[3])
    image = Image.fromarray(PIXELS[1][..., 0].astype(np.uint16) * 257) if mode == "I;16" else colour.convert(mode)
    assert decode_image(file_of(image, "TIFF" if mode == "CMYK" else "PNG")).shape == (9, 7, channels)


def test_one_bit_images_are_black_and_white() -> None:
    bits = RANDOM.integers(0, 2, (9, 7), dtype=np.uint8).astype(bool)
    assert (decode_image(file_of(Image.fromarray(bits)))[..., 0] == bits * 255).all()


def test_a_palette_is_looked_up() -> None:
    image = Image.fromarray(PIXELS[3]).quantize(16)
    assert (decode_image(file_of(image)) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_does_not_saturate(kind: str) -> None:
    wide = np.array([[0, 128, 129, 257, 32767, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    found = decode_image(file_of(Image.fromarray(wide), kind))
    assert found[0, :, 0].tolist() == [0, 0, 1, 1, 127, 128, 254, 255, 255]
    assert (decode_image(file_of(Image.fromarray(wide), kind), 3) == found.repeat(3, axis=2)).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_images_are_refused_since_they_have_no_scale(dtype: type) -> None:
    with pytest.raises(DloptError, match="32-bit numbers"):
        decode_image(file_of(Image.fromarray(np.ones((4, 4), dtype)), "TIFF"))


def bomb(width: int, height: int) -> bytes:
    """A PNG of some bytes that says it is huge."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))


@pytest.mark.parametrize(("width", "height"), [(8193, 8192), (12_000, 12_000), (60_000, 60_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_undecoded(width: int, height: int) -> None:
    with pytest.raises(DloptError, match=r"too large|exceeds limit"):
        decode_image(bomb(width, height))


@pytest.mark.parametrize("data", [b"", b"nonsense", file_of(PIXELS[3])[:60], file_of(PIXELS[3], "JPEG")[:-200], file_of(PIXELS[1])[:-30]])
def test_broken_bytes_are_no_image_and_say_so_in_one_line(data: bytes) -> None:
    with pytest.raises(DloptError, match=r"^not an image: .+") as error:
        decode_image(data)
    assert "\n" not in str(error.value) and " at 0x" not in str(error.value)


def test_bad_images_of_a_column_have_reasons_and_the_rest_decodes() -> None:
    good = file_of(PIXELS[1])
    _, pixels, reasons = trained([b"", good, None, file_of(PIXELS[1][:5]), good[:40], good])
    assert sorted(reasons) == [0, 2, 3, 4]
    assert reasons[2] == "no image" and "5x7x1 where 9x7x1 is needed" in reasons[3]
    assert (pixels[[1, 5]] == PIXELS[1]).all() and not pixels[[0, 2, 3, 4]].any()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([[1.0, 2.5]], "whole numbers from 0 to 255"),
        ([[1.0, -1.0]], "whole numbers from 0 to 255"),
        ([[1.0, 256.0]], "whole numbers from 0 to 255"),
        ([[1.0, float("nan")]], "whole numbers from 0 to 255"),
        ([[1.0], [2.0, 3.0]], "uneven"),
        ([[1.0, None]], "no image"),
        ([], "no image"),
    ],
)
def test_nested_numbers_that_are_no_pixels_have_a_reason(value: list[Any], reason: str) -> None:
    _, _, reasons = trained([[[1.0, 2.0]], value])
    assert list(reasons) == [1] and reason in reasons[1]


def test_images_of_a_column_may_be_what_hugging_face_keeps() -> None:
    _, pixels, reasons = trained([{"bytes": file_of(PIXELS[3]), "path": "a.png"}])
    assert reasons == {} and (pixels[0] == PIXELS[3]).all()


def test_a_size_resizes_encoded_images() -> None:
    _, pixels, reasons = trained([file_of(PIXELS[3]), file_of(PIXELS[3][:4, :4])], ImageInput(size=(8, 6)))
    assert reasons == {} and pixels.shape == (2, 8, 6, 3)


def test_a_column_without_an_image_is_refused_with_the_reason() -> None:
    with pytest.raises(DloptError, match=r"data\.inputs: column 'image' holds no image in its first 2 rows: not an image"):
        trained([b"", b"nonsense"])


def numbers(columns: dict[str, Any]) -> tuple[np.ndarray, dict[int, str]]:
    part, table = NumberInput(columns=tuple(columns)), Columns().canonical(pa.table(columns))
    feature = part.feature(table)
    found, reasons = part.read(table, feature)
    return part.finish(pa.table(found), feature), reasons


def test_numbers_are_served_as_they_were_trained_on() -> None:
    raw = {"a": [0.1, None, 1e-40, 16777217.0], "b": [1, -(2**53), 3, None]}
    values, reasons = numbers(raw)
    part = NumberInput(columns=("a", "b"))
    signature = Signature(inputs=(part.feature(pa.table(raw)),), target=TARGET)
    served = encode_rows(signature, [{"a": a, "b": b} for a, b in zip(raw["a"], raw["b"], strict=True)])["numbers"]
    assert reasons == {} and values.dtype == served.dtype == np.float32
    assert np.array_equal(values, served, equal_nan=True)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([1, None, 3], [1, np.nan, 3]),
        ([True, False], [1, 0]),
        (["1.5", " 2 ", "1e3"], [1.5, 2, 1000]),
        (["1", "", "NA", "nan", None], [1, np.nan, np.nan, np.nan, np.nan]),
        (["true", "FALSE"], [1, 0]),
        (pa.array(["1", "2", "1"]).dictionary_encode(), [1, 2, 1]),
        (pa.array([2**53 + 1], pa.int64()), [2**53]),
        ([], []),
    ],
)
def test_numbers_in_any_spelling(column: Any, expected: list[float]) -> None:
    values, reasons = numbers({"a": column})
    assert reasons == {}
    assert np.array_equal(values[:, 0], np.array(expected, np.float32), equal_nan=True)


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (["1", "x"], "a: 'x' is not a number"),
        ([1.0, float("inf")], "a: a number is too large"),
        ([1.0, 1e39], "a: a number is too large"),  # more than a float32 holds
        (["1", "-1e400"], "a: a number is too large"),
    ],
)
def test_a_cell_that_is_no_number_sets_its_row_aside(column: list[Any], reason: str) -> None:
    values, reasons = numbers({"a": column})
    assert reasons == {1: reason} and values[0, 0] == 1


def labels_of(column: Any) -> tuple[list[Any], dict[int, str]]:
    table, target = pa.table({"label": column}), CategoryTarget()
    labels, reasons = target.read(table, target.whole(table))
    return labels.to_pylist(), reasons


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([3, 1, None], [3, 1, None]),
        ([1.0, float("nan"), 2.0], [1, None, 2]),
        ([True, False], [1, 0]),
        (["b", "", None, "1"], ["b", None, None, "1"]),
        (pa.array(["x", None, "y"]).dictionary_encode(), ["x", None, "y"]),
        (pa.array([2**63], pa.uint64()), [None]),
        (pa.array([], pa.int64()), []),
    ],
)
def test_labels_are_whole_numbers_or_strings(column: Any, expected: list[Any]) -> None:
    labels, reasons = labels_of(column)
    assert labels == expected
    assert sorted(reasons) == [row for row, label in enumerate(expected) if label is None]


def test_labels_read_as_text_become_the_whole_numbers_that_the_first_rows_showed() -> None:
    labels, reasons = CategoryTarget().read(pa.table({"label": ["7", "7.0", "true", "", "cat", "7.5", None, "nan"]}), whole=True)
    assert labels.to_pylist() == [7, 7, 1, None, None, None, None, None]
    assert reasons[3] == reasons[6] == "label: no label"
    assert reasons[4] == "label: 'cat' is not a whole number" and reasons[5] == "label: '7.5' is not a whole number"


def test_labels_of_another_type_are_refused() -> None:
    with pytest.raises(DloptError, match=r"data\.target\.column: 'label' is list<item: int64>; classes must be whole numbers or strings"):
        labels_of([[1], [2]])


# All kinds together

NAMES = ["", "UA", "ü", "New York", "7", "7.0", "NA", "true", " "]
WORDS = ["Free", "entry", "call", "ﬁne", "naïve", "2", "now!", "日本"]
PARTS: tuple[Any, ...] = ("year", "month", "week", "weekday", "hour", "second", "days")
INPUTS = (
    NumberInput(columns=("a", "b", "whole")),
    CategoryInput(columns=("name", "code", "flag", "level"), max_values=5),
    CategoryInput(columns=("tail",), name="tails", fill="most_frequent", min_count=2),
    CategoryInput(columns=("flight", "carrier"), name="hashed", hash_buckets=13),
    DateInput(columns=("day", "time"), parts=PARTS),
    DateInput(columns=("written",), name="written dates", form="%d.%m.%y %H:%M"),
    TextInput(columns=("title", "body"), max_length=7, min_frequency=1),
    TextInput(column="title", name="pieces", tokenizer="bpe", vocab_size=300, max_length=20),
    ImageInput(column="image"),
    ImageInput(column="photo", size=(4, 6)),
)


def or_none(random: np.random.Generator, values: list[Any]) -> list[Any]:
    return [None if gone else value for value, gone in zip(values, random.random(len(values)) < 0.15, strict=True)]


def random_table(seed: int, rows: int) -> pa.Table:
    """A column of every kind and several types, with missing values where there may be any."""
    random = np.random.default_rng(seed)
    moments = [datetime(1960, 1, 1) + timedelta(seconds=int(second)) for second in random.integers(0, 4 * 10**9, rows)]
    names = random.choice(NAMES, rows).tolist()
    titles = [" ".join(random.choice(WORDS, random.integers(0, 12))) for _ in range(rows)]
    pixels = random.integers(0, 256, (rows, 5, 3, 1), dtype=np.uint8)
    photos = [encode_png(random.integers(0, 256, (random.integers(3, 9), 6, 3), dtype=np.uint8)) for _ in range(rows)]
    wide = (random.normal(size=rows) * 10.0 ** random.integers(-30, 30, rows)).tolist()
    return pa.table(
        {
            "a": or_none(random, random.normal(size=rows).tolist()),
            "b": pa.array(or_none(random, wide)),
            "whole": pa.array(or_none(random, random.integers(-(2**53), 2**53, rows).tolist()), pa.int64()),
            "name": pa.array(or_none(random, names)).dictionary_encode(),
            "code": pa.array(or_none(random, random.integers(-3, 9, rows).tolist()), pa.int16()),
            "flag": or_none(random, (random.random(rows) < 0.5).tolist()),
            "level": or_none(random, (random.integers(0, 9, rows) / 2).tolist()),
            "tail": pa.array(or_none(random, names), pa.large_string()),
            "flight": pa.array(or_none(random, random.integers(0, 1000, rows).tolist()), pa.int32()),
            "carrier": or_none(random, names[::-1]),
            "day": pa.array(or_none(random, [moment.date() for moment in moments]), pa.date32()),
            "time": or_none(random, [moment.isoformat() + ("+05:30" if row % 3 else "") for row, moment in enumerate(moments)]),
            "written": or_none(random, [moment.strftime("%d.%m.%y %H:%M") for moment in moments]),
            "title": or_none(random, titles),
            "body": or_none(random, titles[::-1]),
            "image": pixels.reshape(rows, 5, 3).tolist(),
            "photo": photos,
        }
    )


def as_json(value: Any) -> Any:
    """A value of a raw row as a client writes it."""
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    return value.isoformat() if isinstance(value, date) else value


def fitted(table: pa.Table) -> tuple[Signature, dict[str, np.ndarray]]:
    """The signature that training rows make, and what training reads of these rows."""
    features: dict[str, Feature] = {}
    rows = {}
    for part in INPUTS:
        feature = part.feature(table)
        columns, reasons = part.read(table, feature)
        assert reasons == {}
        read = pa.table(columns)
        if isinstance(part, TextInput):
            feature = part.learn(iter([read]), feature)
        else:
            feature, _ = part.fit(part.observe(read, feature, {}), feature, features)  # type: ignore[arg-type]
        features[feature.name], rows[feature.name] = feature, part.finish(read, feature)
    return Signature(inputs=tuple(features.values()), target=TARGET), rows


def looked_up(feature: Feature, texts: np.ndarray) -> np.ndarray:
    """What the graph makes of categories: codes of the vocabulary, int32 (rows, columns)."""
    tables = [{value: code for code, value in enumerate(known, start=1)} for known in feature.vocabularies]
    tables = [table | ({"": missing} if missing else {}) for table, missing in zip(tables, feature.missing, strict=True)]
    return np.array([[table.get(value, 0) for table, value in zip(tables, row, strict=True)] for row in texts], np.int32)


def as_wide(feature: Feature, found: np.ndarray) -> np.ndarray:
    """Texts that were cut down to the longest of them, as wide as they lie on disk; other values as they are."""
    if feature.kind != "text":
        return found
    assert (found[:, -1] != 0).any() or found.shape[1] == 1  # no wider than the longest one
    return np.pad(found, ((0, 0), (0, feature.shape[0] - found.shape[1])))


@pytest.mark.parametrize("seed", range(8))
def test_rows_of_every_kind_are_served_as_they_were_trained_on(seed: int) -> None:
    table = random_table(seed, 60)
    signature, rows = fitted(table)
    served = encode_rows(signature, [{name: as_json(value) for name, value in row.items()} for row in table.to_pylist()])
    assert list(served) == list(rows) == [part.tensor for part in INPUTS]
    for feature in signature.inputs:
        found = as_wide(feature, served[feature.name])
        if feature.dtype == "string":
            assert found.dtype == object and found.shape == (60, len(feature.columns))
            found = looked_up(feature, found)
        assert found.dtype == rows[feature.name].dtype == feature.stored and found.shape == (60, *feature.shape)
        assert np.array_equal(found, rows[feature.name], equal_nan=feature.dtype == "float32"), feature.name


def test_rows_that_training_has_not_seen_are_encoded_by_what_it_has() -> None:
    signature, _ = fitted(random_table(0, 60))
    other = random_table(99, 40)
    served = encode_rows(signature, [{name: as_json(value) for name, value in row.items()} for row in other.to_pylist()])
    for part, feature in zip(INPUTS, signature.inputs, strict=True):
        expected = part.finish(pa.table(part.read(other, feature)[0]), feature)
        found = looked_up(feature, served[feature.name]) if feature.dtype == "string" else as_wide(feature, served[feature.name])
        assert np.array_equal(found, expected, equal_nan=feature.dtype == "float32"), feature.name


def test_a_text_must_be_one() -> None:
    part, table = TextInput(column="c", min_frequency=1), pa.table({"text": ["some words"]})
    signature = Signature(inputs=(part.learn(iter([table]), part.feature(table)),), target=TARGET)
    with pytest.raises(DloptError, match=r"row 1: c: \[7, 7\] is not a text"):
        encode_rows(signature, [{"c": None}, {"c": [7, 7]}])


def test_no_rows_are_empty_tensors() -> None:
    signature, _ = fitted(random_table(0, 60))
    for feature in signature.inputs:
        assert encode_rows(signature, [])[feature.name].shape == (0, *feature.shape)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("7", "7"),
        (7, "7"),
        (7.0, "7"),
        (0.5, "0.5"),
        (True, "true"),
        (False, "false"),
        (None, ""),
        ("", ""),
        (10**20, str(10**20)),
        (1e20, str(10**20)),
    ],
)
def test_a_category_may_be_any_plain_value(value: Any, text: str) -> None:
    part = CategoryInput(columns=("c",))
    signature = Signature(inputs=(part.feature(pa.table({"c": ["x"]})),), target=TARGET)
    assert encode_rows(signature, [{"c": value}])["categories"].tolist() == [[text]]
    assert encode_rows(signature, [[value]])["categories"].tolist() == [[text]]  # the one input's row may be bare


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        (CategoryInput(columns=("c",)), ["x", "y"], "row 1: c: give a string, a number, true, false or null"),
        (CategoryInput(columns=("c",)), {"a": 1}, "row 1: c: give a string"),
        (DateInput(columns=("c",)), "soon", "row 1: c: 'soon' is not a date such as 2026-11-24"),
        (DateInput(columns=("c",)), 2026, "row 1: c: 2026 is not a date"),
        (DateInput(columns=("c",), form="%d.%m.%Y"), "31.2.2026", "row 1: c: '31.2.2026' is not a date such as %d.%m.%Y"),
        (NumberInput(columns=("c",)), "seven", "row 1: c: 'seven' is not a number"),
        (NumberInput(columns=("c",)), [7, 8], "row 1: c: [7, 8] is not a number"),
    ],
)
def test_what_a_client_sends_wrongly_is_said_with_its_row_and_column(part: Any, value: Any, said: str) -> None:
    signature = Signature(inputs=(part.feature(pa.table({"c": ["x"]})),), target=TARGET)
    with pytest.raises(DloptError) as error:
        encode_rows(signature, [{"c": None}, {"c": value}])
    assert str(error.value).startswith(said)
    with pytest.raises(DloptError, match="row 1: has no column 'c'"):
        encode_rows(signature, [{"c": None}, {"d": value}])
