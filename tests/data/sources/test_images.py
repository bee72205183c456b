"""Encoded images as people have them: turned, transparent, of many modes and frames, and such as a stranger sends to do harm.

Reference values are Pillow's own, or worked out by hand.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps, ImageSequence

from dlopt.data.kinds import ImageInput, encode_columns, encode_rows
from dlopt.data.kinds.pixels import MOST_SCANS, decode_image, image_shape
from dlopt.data.sources import infer_kind
from dlopt.part import DloptError, Signature, Target
from dlopt.serve import Serve
from dlopt.serve.front.application import Application, application_of
from dlopt.serve.models import model
from tests.served import IMAGE, PHOTOS, make_export

RANDOM = np.random.default_rng(7)
COLOUR = RANDOM.integers(0, 256, (6, 9, 3), dtype=np.uint8)
ALPHA = RANDOM.integers(0, 256, (6, 9), dtype=np.uint8)
PREDICT = "/v1/models/m:predict"


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def on(background: tuple[int, int, int], colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours (rows, columns, 3) over a background, by the formula."""
    share = alpha[..., None] / 255
    return colours * share + np.array(background) * (1 - share)


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_image_is_turned_as_its_exif_says(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(Image.fromarray(COLOUR), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    found = decode_image(data)
    assert (found == np.asarray(ImageOps.exif_transpose(opened(data)).convert("RGB"))).all()
    assert image_shape(data) == found.shape == ((9, 6, 3) if orientation > 4 else (6, 9, 3))
    if kind != "JPEG":
        by_hand = [COLOUR, COLOUR[:, ::-1], COLOUR[::-1, ::-1], COLOUR[::-1]]
        by_hand += [side.transpose(1, 0, 2) for side in (COLOUR, COLOUR[::-1], COLOUR[::-1, ::-1], COLOUR[:, ::-1])]
        assert (found == by_hand[orientation - 1]).all()


def test_the_size_that_is_wanted_is_that_of_the_turned_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_of(Image.fromarray(COLOUR), "JPEG", exif=exif)
    assert decode_image(data, 3, only=(9, 6)).shape == (9, 6, 3)
    with pytest.raises(DloptError, match="height 9 and width 6 where 6 and 9 are needed"):
        decode_image(data, 3, only=(6, 9))


def test_an_exif_that_cannot_be_read_leaves_the_image_as_it_is() -> None:
    data = file_of(Image.fromarray(COLOUR), exif=b"Exif\0\0MM nonsense, and no directory at all")
    assert (decode_image(data) == COLOUR).all()
    assert image_shape(data) == (6, 9, 3)


def test_an_orientation_behind_the_pixels_of_a_png_counts() -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    content = exif.tobytes()[6:]
    chunk = struct.pack(">I", len(content)) + b"eXIf" + content + struct.pack(">I", zlib.crc32(b"eXIf" + content))
    plain = file_of(Image.fromarray(COLOUR))
    end = plain.rindex(b"IEND") - 4
    data = plain[:end] + chunk + plain[end:]
    assert image_shape(data) == decode_image(data).shape == (9, 6, 3)
    assert (decode_image(data) == np.rot90(COLOUR)).all()


# Transparency


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (200, 30, 90)])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_what_is_transparent_lets_the_background_through(kind: str, background: tuple[int, int, int]) -> None:
    data = file_of(Image.fromarray(np.dstack([COLOUR, ALPHA])), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    found = decode_image(data, background=background)
    assert np.abs(found - on(background, COLOUR, ALPHA)).max() <= 1
    if background == (255, 255, 255):
        assert (found == decode_image(data)).all()


def test_grey_with_transparency_stays_grey_unless_the_background_is_coloured() -> None:
    data = file_of(Image.merge("LA", (Image.fromarray(COLOUR[..., 0]), Image.fromarray(ALPHA))))
    grey = COLOUR[..., [0, 0, 0]]
    assert np.abs(decode_image(data)[..., 0] - on((255, 255, 255), grey, ALPHA)[..., 0]).max() <= 1
    assert image_shape(data) == (6, 9, 1)
    red = decode_image(data, background=(255, 0, 0))
    assert np.abs(red - on((255, 0, 0), grey, ALPHA)).max() <= 1
    assert image_shape(data, (255, 0, 0)) == red.shape == (6, 9, 3)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palette_with_a_transparent_colour(kind: str) -> None:
    image = Image.fromarray(COLOUR).quantize(8)
    codes, colours = np.asarray(image), np.asarray(image.convert("RGB"))
    data = file_of(image, kind, transparency=3)
    clear = np.asarray(opened(data).convert("RGBA"))[..., 3] == 0
    assert (clear == (codes == 3)).all() and clear.any()
    assert (decode_image(data)[clear] == 255).all()
    assert (decode_image(data, background=(1, 2, 3))[clear] == (1, 2, 3)).all()
    assert (decode_image(data)[~clear] == colours[~clear]).all()


def test_a_palette_may_have_an_alpha_for_each_colour() -> None:
    image = Image.fromarray(COLOUR).quantize(4)
    data = file_of(image, transparency=bytes([0, 85, 170, 255]))
    alpha = np.array([0, 85, 170, 255], np.uint8)[np.asarray(image)]
    assert np.abs(decode_image(data) - on((255, 255, 255), np.asarray(image.convert("RGB")), alpha)).max() <= 1


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0)])
def test_the_transparent_value_of_16_bit_grey(background: tuple[int, int, int]) -> None:
    wide = np.array([[0, 257 * 100, 257 * 100 + 1, 65535]], np.uint16)
    plain = file_of(Image.fromarray(wide))
    content = struct.pack(">H", 257 * 100)
    chunk = struct.pack(">I", 2) + b"tRNS" + content + struct.pack(">I", zlib.crc32(b"tRNS" + content))
    place = plain.index(b"IDAT") - 4
    data = plain[:place] + chunk + plain[place:]
    assert decode_image(data, background=background)[0, :, 0].tolist() == [0, background[0], 100, 255]
    assert decode_image(data, 4)[0, :, 3].tolist() == [255, 0, 255, 255]


def test_four_channels_keep_transparency_as_it_is() -> None:
    pixels = np.dstack([COLOUR, ALPHA])
    assert (decode_image(file_of(Image.fromarray(pixels)), 4) == pixels).all()
    assert (decode_image(file_of(Image.fromarray(COLOUR)), 4)[..., 3] == 255).all()


# Modes and frames


@pytest.mark.parametrize(
    ("mode", "kind"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("L", "JPEG"), ("1", "TIFF"), ("P", "BMP")]
)
def test_modes_are_read_as_pillow_reads_them(mode: str, kind: str) -> None:
    data = file_of(Image.fromarray(COLOUR).convert(mode), kind)
    expected = opened(data)
    grey = expected.mode in ("1", "L")
    assert (decode_image(data, 3) == np.asarray(expected.convert("RGB"))).all()
    assert (decode_image(data, 1)[..., 0] == np.asarray(opened(data).convert("L"))).all()
    assert image_shape(data) == decode_image(data).shape == (6, 9, 1 if grey else 3)


def test_a_tiff_of_12_bits_is_scaled_by_its_own_greatest_value() -> None:
    content = bytes([0xFF, 0xF8, 0x00, 0x00, 0x00, 0x00])  # 4095, 2048, 0, 0
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 1, 279: len(content)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + content
    assert np.asarray(opened(data)).tolist() == [[4095, 2048, 0, 0]]
    assert decode_image(data)[..., 0].tolist() == [[255, 128, 0, 0]]


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_frame_of_many_is_the_image(kind: str) -> None:
    frames = [Image.fromarray(np.full((6, 9, 3), value, np.uint8)) for value in (10, 100, 200)]
    data = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
    assert len(list(ImageSequence.Iterator(opened(data)))) == 3
    assert (decode_image(data, 3) == 10).all()


# The channels and the size of a column


def column(*images: Any) -> pa.Table:
    return pa.table({"image": list(images)})


GREY_FILE, COLOUR_FILE = file_of(Image.fromarray(COLOUR[..., 0])), file_of(Image.fromarray(COLOUR))


def test_a_grey_image_in_front_does_not_turn_all_grey() -> None:
    table, part = column(GREY_FILE, COLOUR_FILE, b"broken", GREY_FILE), ImageInput()
    feature = part.feature(table)
    assert feature.shape == (6, 9, 3)
    assert part.decided(table) == "image: channels: 3, since 1 of the first 3 images have colour"
    columns, reasons = part.read(table, feature)
    pixels = part.finish(pa.table(columns), feature)
    assert list(reasons) == [2]
    assert (pixels[1] == COLOUR).all() and (pixels[0] == COLOUR[..., [0, 0, 0]]).all()


def test_all_grey_images_have_one_channel_and_it_is_said() -> None:
    assert ImageInput().feature(column(GREY_FILE, GREY_FILE)).shape == (6, 9, 1)
    assert ImageInput().decided(column(GREY_FILE, GREY_FILE)) == "image: channels: 1, since 2 of the first 2 images are grey"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_that_are_asked_for_decide(channels: Any) -> None:
    table, part = column(COLOUR_FILE, GREY_FILE), ImageInput(channels=channels)
    feature = part.feature(table)
    columns, reasons = part.read(table, feature)
    assert (feature.shape, reasons, part.decided(table)) == ((6, 9, channels), {}, "")
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    expected = np.asarray(Image.fromarray(COLOUR).convert(mode)).reshape(6, 9, channels)
    assert (part.finish(pa.table(columns), feature)[0] == expected).all()


def test_the_size_is_that_of_most_images_and_it_is_said() -> None:
    odd = file_of(Image.fromarray(COLOUR[:4]))
    table, part = column(odd, COLOUR_FILE, COLOUR_FILE), ImageInput()
    feature = part.feature(table)
    assert feature.shape == (6, 9, 3)
    assert part.decided(table).endswith("; images of another size than 6x9 are set aside (size: resizes them)")
    assert part.read(table, feature)[1] == {0: "image of 4x9x3 where 6x9x3 is needed (or set size)"}


def test_nested_numbers_are_never_given_other_channels() -> None:
    nested = COLOUR.tolist()
    assert ImageInput().decided(column(nested)) == ""
    with pytest.raises(DloptError, match="6x9x3: only encoded images get other channels"):
        ImageInput(channels=1).feature(column(nested))


@pytest.mark.parametrize(("background", "colour"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48)), ("tomato", (255, 99, 71))])
def test_the_background_is_the_same_in_training_and_in_serving(background: str, colour: tuple[int, int, int]) -> None:
    data = file_of(Image.fromarray(np.dstack([COLOUR, ALPHA])))
    table, part = column(data), ImageInput(background=background)
    feature = part.feature(table)
    columns, _ = part.read(table, feature)
    trained = part.finish(pa.table(columns), feature)
    signature = Signature.model_validate_json(Signature(inputs=(feature,), target=Target(name="y", labels=(0, 1))).model_dump_json())
    served = encode_rows(signature, [{"b64": base64.b64encode(data).decode()}])["image"]
    assert (trained == served).all() and np.abs(served[0] - on(colour, COLOUR, ALPHA)).max() <= 1


@pytest.mark.parametrize("background", ["whitish", "#12", "#00000080"])
def test_a_background_that_is_no_colour_is_refused(background: str) -> None:
    with pytest.raises(DloptError, match="is no colour"):
        ImageInput(background=background)


# What a stranger sends


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"
ENDLESS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n%%BeginBinary:-18\n%%EOF\n".ljust(96, b"\n")


@pytest.fixture
def ghost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mark that the `gs` in PATH leaves when it is started."""
    mark, program = tmp_path / "started", tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {mark}\nexit 0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return mark


def test_no_other_format_is_even_loaded() -> None:
    code = f"""if True:
        import sys
        from dlopt.data.kinds.pixels import decode_image
        from dlopt.part import DloptError
        try:
            decode_image({EPS!r})
        except DloptError:
            print("PIL.EpsImagePlugin" in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_pillow_alone_would_start_ghostscript(ghost: Path) -> None:
    with pytest.raises(OSError), Image.open(io.BytesIO(EPS)) as file:
        file.load()
    assert ghost.exists()


@pytest.mark.parametrize("data", [EPS, ENDLESS, file_of(Image.fromarray(COLOUR), "PPM"), file_of(Image.fromarray(COLOUR), "ICO")])
def test_other_formats_than_those_allowed_are_refused_and_start_nothing(data: bytes, ghost: Path) -> None:
    says = "not an image: its bytes are none of PNG, JPEG, WEBP, GIF, BMP, TIFF"
    for decode in (decode_image, image_shape):
        with pytest.raises(DloptError, match=f"^{says}$"):
            decode(data)
    part = ImageInput()
    assert part.read(column(COLOUR_FILE, data), part.feature(column(COLOUR_FILE, data)))[1] == {1: says}
    assert infer_kind(column(data), "image") != "image"
    assert not ghost.exists()


def huge(kind: str) -> bytes:
    """A small file whose header says that it is 60,000 pixels wide and high; WEBP has no room for more than 16,383."""
    data = bytearray(file_of(Image.new("RGB", (3, 5)), kind, **({"lossless": True} if kind == "WEBP" else {})))
    if kind == "PNG":
        data[16:24] = struct.pack(">II", 60_000, 60_000)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", 60_000, 60_000)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", 60_000, 60_000)
    elif kind == "JPEG":
        start = data.index(b"\xff\xc0")
        data[start + 5 : start + 9] = struct.pack(">HH", 60_000, 60_000)
    elif kind == "WEBP":
        data[21:25] = struct.pack("<I", 16_382 | 16_382 << 14)
    else:
        image = Image.new("RGB", (3, 5))
        data = bytearray(file_of(image, kind, tiffinfo={}))
        for tag, old in ((256, 3), (257, 5)):
            place = data.index(struct.pack("<HHI", tag, 4, 1) + struct.pack("<I", old))
            data[place + 8 : place + 12] = struct.pack("<I", 60_000)
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "JPEG", "WEBP", "TIFF"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_header_that_says_too_many_pixels_is_refused_undecoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    for decode in (decode_image, image_shape):
        with pytest.raises(DloptError, match="too large: it has more than 67,108,864 pixels"):
            decode(huge(kind))


def test_a_jpeg_of_too_many_scans_is_refused_undecoded() -> None:
    data = file_of(Image.new("L", (512, 512), 128), "JPEG", progressive=True)
    assert decode_image(data).shape == (512, 512, 1)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(DloptError, match=f"more than {MOST_SCANS} scans"):
        decode_image(data[:last] + data[last:-2] * MOST_SCANS + b"\xff\xd9")


def tiled(tile: int, pixels: np.ndarray) -> bytes:
    """A TIFF of one tile, larger than its image; pixels (tile, tile)."""
    content = zlib.compress(pixels.tobytes())
    tags = {256: 9, 257: 6, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 8 + 2 + 10 * 12 + 4, 325: len(content)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + content


def test_a_tiff_whose_tiles_are_far_larger_than_the_image_is_refused_undecoded() -> None:
    pixels = RANDOM.integers(0, 256, (16, 16), dtype=np.uint8)
    assert (decode_image(tiled(16, pixels))[..., 0] == pixels[:6, :9]).all()
    with pytest.raises(DloptError, match="image with tiles of 16384x16384 is too large"):
        decode_image(tiled(16_384, pixels))


# Serving


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def ask(app: Application, body: Any) -> httpx.Response:
    async def one() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post(PREDICT, content=body if isinstance(body, (bytes, str)) else json.dumps(body))

    return asyncio.run(one())


def application(home: Path, signature: Signature) -> Application:
    return application_of(make_export(home, signature), "m", Serve())


def photo(data: bytes) -> dict[str, Any]:
    return {"photo": {"b64": base64.b64encode(data).decode()}, "camera": "a", "taken": None, "printed": None}


def test_an_eps_from_a_client_is_a_400_and_starts_nothing(home: Path, ghost: Path) -> None:
    app = application(home, PHOTOS)
    for data in (EPS, ENDLESS):
        reply = ask(app, {"instances": [photo(data)]})
        assert reply.status_code == 400
        assert reply.json() == {"error": "row 0: photo: not an image: its bytes are none of PNG, JPEG, WEBP, GIF, BMP, TIFF"}
    assert not ghost.exists()


def test_images_that_may_take_long_are_decoded_beside_the_event_loop(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def noted(signature: Signature, columns: Any) -> dict[str, np.ndarray]:
        threads.append(threading.current_thread().name)
        return encode_columns(signature, columns)

    monkeypatch.setattr(model, "encode_columns", noted)
    digit = {"b64": base64.b64encode(file_of(Image.new("L", (28, 28)))).decode()}
    small, large = application(home, IMAGE), application(home, PHOTOS)
    hidden = json.dumps({"instances": [photo(COLOUR_FILE)]}).replace('"b64"', '"\\u0062\\u00364"')
    bodies = [(small, {"instances": [[[0] * 28] * 28]}), (small, {"instances": [digit] * 3}), (small, {"instances": [digit] * 60})]
    bodies += [(large, {"instances": [photo(COLOUR_FILE)]}), (large, hidden)]
    assert [ask(app, body).status_code for app, body in bodies] == [200] * 5
    assert [name.partition("_")[0] for name in threads] == ["MainThread", "MainThread", "decode", "decode", "decode"]


def test_other_requests_are_answered_while_large_images_are_decoded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them at a time, and neither holds up the event loop, whatever it takes."""
    app = application(home, PHOTOS)
    go, decoding = threading.Event(), threading.Semaphore(0)

    def slow(signature: Signature, columns: Any) -> dict[str, np.ndarray]:
        if columns["camera"] == ["slow"]:
            decoding.release()
            assert go.wait(60)
        return encode_columns(signature, columns)

    monkeypatch.setattr(model, "encode_columns", slow)

    async def both() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            waiting = asyncio.create_task(client.post(PREDICT, json={"instances": [photo(COLOUR_FILE) | {"camera": "slow"}]}))
            assert await asyncio.to_thread(decoding.acquire, timeout=60)
            plain = photo(COLOUR_FILE) | {"photo": np.zeros((4, 6, 3), int).tolist()}
            found = [await client.post(PREDICT, json={"instances": [row]}) for row in (plain, photo(COLOUR_FILE))]
            assert not waiting.done()
            go.set()
            return [reply.status_code for reply in (*found, await waiting)]

    assert asyncio.run(both()) == [200] * 3
