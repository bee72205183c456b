"""Encoded images as pixels, and back. Files and requests are decoded here alone, so that both see the same numbers."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin
from PIL.ImageFile import ImageFile

from dlopt.part import DloptError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded. Pillow knows forty more formats, some hardly looked after, of which EPS starts Ghostscript on what a stranger sends."""
LOADED = (TiffImagePlugin, WebPImagePlugin)
"""Of these formats those that Pillow does not load by itself; for one that is not loaded it would load all forty."""
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's name for an image with so many channels."""
GREY = ("1", "L", "LA", "La")
GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
"""Grey of 16 bits a pixel, which Pillow would cut off at 255; it is scaled to 8 bits."""
NO_BYTES = ("I", "F")
"""Numbers of 32 bits, with no scale that would make them bytes."""
MOST_PIXELS = 64 * 1024 * 1024
"""A larger image is refused before it is decoded, instead of filling the memory."""
MOST_SCANS = 100
"""A progressive JPEG has about ten scans; each takes as long as the image is large, and few bytes can say thousands."""
BITS, TILE_WIDTH, TILE_HEIGHT, MOST_TILE = 258, 322, 323, 2**20
"""TIFF's tags: bits of a value, size of a tile; and how many pixels a tile may have that is larger than its image: all are decoded."""
WHITE = (255, 255, 255)
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
PNG_HEAD = {b"\x08\0\0\0\0": "L", b"\x08\x02\0\0\0": "RGB"}
"""What follows the size in a PNG of 8 bits, grey or in colour, that is not interlaced; and Pillow's name for it."""
PNG_ASIDE = (b"pHYs", b"tIME", b"gAMA", b"sRGB", b"cHRM", b"bKGD", b"sBIT")
"""Chunks of a PNG that change no pixel."""


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
    if (quick := _plain_png(data, channels, size or only)) is not None:
        return quick
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


def _plain_png(data: bytes, channels: int | None, wanted: tuple[int, int] | None) -> np.ndarray | None:
    """Pixels of a PNG as most programs write it, whole, of the size and the channels that are wanted: by Pillow's decoder without its
    look at all else that a PNG may hold, which takes four times as long. None for anything else; then Pillow has its say."""
    if data[:16] != PNG or len(data) < 57 or (mode := PNG_HEAD.get(data[24:29])) is None:
        return None
    width, height = struct.unpack_from(">II", data, 16)
    if (height, width) != wanted or MODES.get(channels or len(mode)) != mode or not 0 < width * height <= MOST_PIXELS:
        return None
    at, parts, kind = 8, list[bytes](), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at) if at + 12 <= len(data) else (0, b"")
        end = at + 8 + length
        if data[end : end + 4] != struct.pack(">I", zlib.crc32(data[at + 4 : end])):
            return None
        if kind == b"IDAT":
            parts.append(data[at + 8 : end])
        elif kind not in (b"IHDR", b"IEND") and kind not in PNG_ASIDE:
            return None
        at = end + 4
    pixels = Image.core.new(mode, (width, height))
    decoder = Image.core.zip_decoder(mode, mode)
    decoder.setimage(pixels, (0, 0, width, height))
    consumed, error = decoder.decode(b"".join(parts))
    if consumed >= 0 or error:  # there are too few, or they are damaged
        return None
    encoder = Image.core.raw_encoder(mode, mode)
    encoder.setimage(pixels, (0, 0, width, height))
    return np.frombuffer(encoder.encode(width * height * len(mode) + 1)[2], np.uint8).reshape(height, width, len(mode))


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
