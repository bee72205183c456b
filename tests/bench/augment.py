"""Augmentation against Pillow: rows/s on one core of crop, flip, rotation and erasing, ours over a whole batch, Pillow's image by image.

    python -m tests.bench.augment --json

Both start from uint8 arrays and end in one, and draw the same numbers of the same distributions. They are measured in turn, A B A B;
figures are medians over the turns, and the ratio is the median over the pairs. `batch_128` and `batch_1024` are sizes of our batches.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from dlopt.data.augment import Augmentation, RandomCrop, RandomErasing, RandomHorizontalFlip, RandomRotation, augment

PADDING, DEGREES = 2, 10.0
PARTS: tuple[Augmentation, ...] = (
    RandomCrop(padding=PADDING),
    RandomHorizontalFlip(),
    RandomRotation(degrees=DEGREES),
    RandomErasing(p=0.5),
)
SHAPES = {"28x28x1": (28, 28, 1), "32x32x3": (32, 32, 3)}
ROWS, PAIRS = 4096, 7


def ours(images: np.ndarray, batch_size: int) -> None:
    tensor = torch.from_numpy(images)
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        augment(tensor[part], np.arange(start, start + len(images[part])), 7, 1, PARTS)


def pillow(images: np.ndarray) -> None:
    random = np.random.default_rng(7)
    np.stack([_pillow_row(image.squeeze(), random) for image in images])


def _pillow_row(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    left, top = int(random.random() * (2 * PADDING + 1)), int(random.random() * (2 * PADDING + 1))
    image = ImageOps.expand(image, PADDING).crop((left, top, left + width, top + height))
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate((2 * random.random() - 1) * DEGREES, Image.Resampling.BILINEAR)
    if random.random() < 0.5:
        _erase(image, random)
    return np.asarray(image)


def _erase(image: Image.Image, random: np.random.Generator) -> None:
    width, height = image.size
    for _ in range(10):
        area = width * height * (0.02 + 0.31 * random.random())
        ratio = math.exp(math.log(0.3) + random.random() * math.log(3.3 / 0.3))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 1 <= across <= width and 1 <= down <= height:
            left, top = int(random.random() * (width - across + 1)), int(random.random() * (height - down + 1))
            image.paste(0, (left, top, left + across, top + down))
            return


def measure(pairs: int = PAIRS) -> dict[str, Any]:
    """For each shape: rows/s of both and the ratio, on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {f"{name}_batch_{size}": _case(shape, size, pairs) for name, shape in SHAPES.items() for size in (128, 1024)}
    finally:
        torch.set_num_threads(threads)


def _case(shape: tuple[int, int, int], batch_size: int, pairs: int) -> dict[str, Any]:
    images = np.random.default_rng(1).integers(0, 256, (ROWS, *shape), dtype=np.uint8)
    ours(images, batch_size)
    found = [(_rate(lambda: ours(images, batch_size)), _rate(lambda: pillow(images))) for _ in range(pairs)]
    return {
        "rows_per_s": round(statistics.median(a for a, _ in found)),
        "pillow_rows_per_s": round(statistics.median(b for _, b in found)),
        "ratio": round(statistics.median(a / b for a, b in found), 2),
    }


def _rate(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return ROWS / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"turns of each (default: {PAIRS})")
    options = parser.parse_args()
    found = measure(options.pairs) | {"torch": torch.__version__}
    print(json.dumps(found) if options.json else "\n".join(f"{name:>20}  {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
