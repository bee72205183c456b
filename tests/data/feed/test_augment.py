"""Augmentation against numpy, one row at a time; and that a row looks the same whatever batch it is in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from dlopt.data.augment import (
    Augmentation,
    Brightness,
    Contrast,
    CutMix,
    GaussianBlur,
    GaussianNoise,
    MixUp,
    RandAugment,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    RandomScale,
    RandomShear,
    RandomTranslation,
    RandomVerticalFlip,
    Saturation,
    augment,
    fill_of,
    mixes,
)
from dlopt.data.augment.draw import Draw, normal_table
from dlopt.data.augment.geometric import Geometric
from dlopt.data.augment.resample import STEPS, Affine, resample
from dlopt.docstrings import descriptions
from dlopt.part import DloptError

SEED, EPOCH = 7, 3
MOVES: Sequence[Augmentation] = (
    RandomCrop(padding=2),
    RandomHorizontalFlip(),
    RandomVerticalFlip(),
    RandomRotation(degrees=20),
    RandomScale(),
    RandomShear(horizontal=15, vertical=5),
    RandomTranslation(),
    RandomResizedCrop(scale=(0.5, 1)),
)
ALL: Sequence[Augmentation] = (
    RandAugment(num_ops=3, magnitude=0.6),
    *MOVES,
    Brightness(amount=0.4),
    Contrast(amount=0.4),
    Saturation(amount=0.8),
    GaussianNoise(),
    GaussianBlur(),
    RandomErasing(p=0.7),
)
"""Everything for images but what mixes them."""


def images(rows: int = 40, height: int = 12, width: int = 15, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (rows, height, width, channels), dtype=np.uint8)


def augmented(
    pixels: np.ndarray, *parts: Augmentation, picks: np.ndarray | None = None, seed: int = SEED, epoch: int = EPOCH
) -> np.ndarray:
    picks = np.arange(len(pixels)) if picks is None else picks
    return augment(torch.from_numpy(pixels.copy()), picks, seed, epoch, parts).numpy()


def draw(rows: int, part: int = 0) -> Draw:
    return Draw.of(np.arange(rows), SEED, EPOCH).part(part)


class Fixed(Draw):
    """The same number for every row and every use."""

    def __init__(self, rows: int, number: float) -> None:
        super().__init__(np.zeros(rows, dtype=np.uint64))
        self.number = number

    def uniform(self, number: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        return np.full(len(self), low + (high - low) * self.number)


def matrix(affine: Affine, row: int) -> np.ndarray:
    """One row's map, 3 x 3."""
    xx, xy, x, yx, yy, y = (values if isinstance(values, float) else values[row] for values in affine)
    return np.array([[xx, xy, x], [yx, yy, y], [0, 0, 1]])


def bilinear(image: np.ndarray, matrix: np.ndarray, fill: int = 0) -> np.ndarray:
    """The slow way in float64: each pixel of the result from the four around the place that it comes from."""
    height, width = image.shape[:2]
    result = np.zeros(image.shape, dtype=np.float64)
    for y in range(height):
        for x in range(width):
            from_x, from_y, _ = matrix @ [x - (width - 1) / 2, y - (height - 1) / 2, 1]
            from_x, from_y = from_x + (width - 1) / 2, from_y + (height - 1) / 2
            left, top = int(np.floor(from_x)), int(np.floor(from_y))
            for near_y, near_x in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                inside = 0 <= near_y < height and 0 <= near_x < width
                result[y, x] += (1 - abs(from_x - near_x)) * (1 - abs(from_y - near_y)) * (image[near_y, near_x] if inside else fill)
    return result


ROUNDING = 0.5 + 2 * 2 * 255 / (2 * STEPS)
"""Most that a place, rounded twice to 1/256 pixel in both directions, and the rounded grey level can be off."""


def test_every_part_can_be_written_in_a_job_and_says_what_it_is_for() -> None:
    read = TypeAdapter(Augmentation)
    kinds = get_args(get_args(Augmentation)[0])
    assert len(kinds) == 23
    for kind in kinds:
        part = read.validate_python({"kind": kind.model_fields["kind"].default})
        assert type(part) is kind and set(part.of) <= {"pixels", "numbers", "tokens"}
        assert set(descriptions(kind)) >= set(kind.model_fields) - {"kind"}, kind
    assert MixUp.of == ("pixels", "numbers") and CutMix.of == ("pixels",)
    assert mixes((RandomCrop(), MixUp())) and not mixes(ALL)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(12, 15), (28, 28), (7, 7), (32, 33), (1, 1)])
def test_nothing_changes_when_there_is_nothing_to_do(size: tuple[int, int], channels: int) -> None:
    pixels = images(20, *size, channels)
    parts = (RandomCrop(padding=0), RandomHorizontalFlip(p=0), RandomRotation(degrees=0), RandomResizedCrop(scale=(1, 1), ratio=(1, 1)))
    if size[0] == size[1]:
        assert (augmented(pixels, *parts) == pixels).all()
    calm = (Brightness(amount=0), Contrast(amount=0), Saturation(amount=0), GaussianNoise(std=0), GaussianBlur(p=0), RandomErasing(p=0))
    assert (augmented(pixels, *parts[:3], RandAugment(magnitude=0), *calm) == pixels).all()
    assert (augmented(pixels) == pixels).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(12, 15), (28, 28), (9, 8)])
def test_flipping_is_numpys_flip(size: tuple[int, int], channels: int) -> None:
    pixels = images(20, *size, channels)
    assert (augmented(pixels, RandomHorizontalFlip(p=1)) == pixels[:, :, ::-1]).all()
    assert (augmented(pixels, RandomVerticalFlip(p=1)) == pixels[:, ::-1]).all()


def test_a_flip_comes_as_often_as_asked_and_to_whole_images() -> None:
    pixels = images(4000, 4, 5)
    flipped = (augmented(pixels, RandomHorizontalFlip(p=0.3)) == pixels[:, :, ::-1]).all(axis=(1, 2, 3))
    kept = (augmented(pixels, RandomHorizontalFlip(p=0.3)) == pixels).all(axis=(1, 2, 3))
    assert (flipped ^ kept).all()
    assert abs(flipped.mean() - 0.3) < 0.03


@pytest.mark.parametrize("fill", [0, 77])
@pytest.mark.parametrize("size", [(12, 15), (28, 28), (64, 48)])
@pytest.mark.parametrize("padding", [1, 2, 5])
def test_cropping_is_padding_and_cutting_out(padding: int, size: tuple[int, int], fill: int) -> None:
    pixels = images(60, *size, 3)
    found = augmented(pixels, RandomCrop(padding=padding, fill=fill))
    padded = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=fill)
    left, top = (np.floor(draw(60).uniform(axis) * (2 * padding + 1)).astype(int) for axis in range(2))
    for row in range(60):
        cut = padded[row, top[row] : top[row] + size[0], left[row] : left[row] + size[1]]
        assert (found[row] == cut).all()


def test_shifts_are_uniform_and_both_directions_are_independent() -> None:
    pixels = np.zeros((9000, 9, 9, 1), np.uint8)
    pixels[:, 4, 4] = 255
    places = np.argwhere(augmented(pixels, RandomCrop(padding=1))[..., 0] == 255)
    assert len(places) == 9000
    counts = np.bincount((places[:, 1] - 3) * 3 + places[:, 2] - 3, minlength=9)
    assert ((counts - 1000) ** 2 / 1000).sum() < 27  # chi-squared, 8 degrees of freedom: one in a thousand


def test_angles_are_uniform_between_minus_and_plus_degrees() -> None:
    found = RandomRotation(degrees=30).matrix(draw(5000), 10, 10)
    angles = np.rad2deg(np.arctan2(found.yx, found.xx))
    assert -30 <= angles.min() < -29 and 29 < angles.max() <= 30
    assert abs(angles.mean()) < 1 and abs(angles.std() - 60 / np.sqrt(12)) < 0.5


@pytest.mark.parametrize("size", [8, 9, 28])
def test_a_quarter_turn_of_a_square_is_numpys(size: int) -> None:
    pixels = images(5, size, size, 3)
    for number, turns in ((0.0, 1), (1.0, -1)):  # minus and plus 90 degrees
        found = resample(torch.from_numpy(pixels), RandomRotation(degrees=90).matrix(Fixed(5, number), size, size)).numpy()
        assert (found == np.rot90(pixels, -turns, axes=(1, 2))).all()


def test_what_scale_shear_and_translation_do_to_a_place() -> None:
    def to(part: Geometric, x: float, y: float) -> list[float]:
        """Where the pixel at (x, y) from the centre goes, for the largest number drawn."""
        return (np.linalg.inv(matrix(part.matrix(Fixed(1, 1.0), 20, 40), 0)) @ [x, y, 1])[:2].round(9).tolist()

    assert to(RandomScale(scale=(0.5, 2)), 3, 4) == [6, 8]
    assert to(RandomShear(horizontal=45), 3, 4) == [-1, 4]
    assert to(RandomShear(horizontal=0, vertical=45), 3, 4) == [3, 1]
    assert to(RandomTranslation(horizontal=0.25, vertical=0.1), 3, 4) == [-7, 2]


@pytest.mark.parametrize(
    "parts", [[part] for part in MOVES] + [MOVES, MOVES[::-1], (RandomRotation(degrees=180), RandomRotation(degrees=45))]
)
@pytest.mark.parametrize("fill", [0, 200])
def test_composed_movements_are_one_bilinear_resampling(parts: Sequence[Geometric], fill: int) -> None:
    pixels = images(8, 10, 13, 2)
    parts = [part.model_copy(update={"fill": fill} if "fill" in type(part).model_fields else {}) for part in parts]
    fill = fill_of(parts)
    found = augmented(pixels, *parts)
    for row in range(8):
        total = np.eye(3)
        for index, part in enumerate(parts):
            total = total @ matrix(part.matrix(draw(8, index), 10, 13), row)
        assert np.abs(found[row] - bilinear(pixels[row], total, fill)).max() <= ROUNDING


def test_a_blend_is_exact_on_the_places_that_there_are() -> None:
    """Rounded places put in, the result is the float64 one, rounded half up, at every pixel: so it is on every device."""
    pixels = images(30, 33, 20, 3)
    part = RandomTranslation(horizontal=0.2, vertical=0.2)
    affine = part.matrix(draw(30), 33, 20)
    affine = affine._replace(x=np.rint(affine.x * STEPS) / STEPS, y=np.rint(affine.y * STEPS) / STEPS)
    found = resample(torch.from_numpy(pixels), affine, fill=9).numpy()
    for row in range(30):
        assert (found[row] == np.floor(bilinear(pixels[row], matrix(affine, row), 9) + 0.5)).all()


def torchvisions_box(random: np.random.Generator, height: int, width: int, part: RandomResizedCrop) -> tuple[int, int]:
    """Width and height as RandomResizedCrop.get_params draws them; here a box always fits within ten attempts."""
    while True:
        area = height * width * random.uniform(*part.scale)
        ratio = np.exp(random.uniform(*np.log(part.ratio)))
        across, down = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            return across, down


def test_resized_crops_are_boxes_of_the_shares_and_ratios_asked_for_inside_of_the_image() -> None:
    part = RandomResizedCrop(scale=(0.2, 0.6), ratio=(0.5, 2))
    height, width = 101, 201
    found = part.matrix(draw(5000), height, width)
    across, down = found.xx * (width - 1) + 1, found.yy * (height - 1) + 1
    left, top = found.x - (across - width) / 2, found.y - (down - height) / 2
    assert (np.abs(np.stack((across, down, left, top)) % 1 - 0.5) > 0.499).all()  # whole pixels
    assert min(left.min(), top.min()) > -1e-9 and (left + across).max() < width + 1e-9 and (top + down).max() < height + 1e-9
    area, ratio = across * down / (height * width), across / down
    assert abs(area.min() - 0.2) < 0.01 and abs(area.max() - 0.6) < 0.01 and abs(ratio.min() - 0.5) < 0.02 and abs(ratio.max() - 2) < 0.06
    expected = np.array([torchvisions_box(random, height, width, part) for random in [np.random.default_rng(2)] for _ in range(5000)])
    assert np.abs(np.log([across.mean(), down.mean()]) - np.log(expected.mean(axis=0))).max() < 0.02
    assert np.abs(np.log([across.std(), down.std()]) - np.log(expected.std(axis=0))).max() < 0.04


def test_a_box_that_never_fits_becomes_the_largest_with_the_ratio_in_the_middle() -> None:
    found = RandomResizedCrop(scale=(1, 1), ratio=(4, 4)).matrix(draw(3), 40, 40)
    assert np.allclose(found.xx, 1) and np.allclose(found.yy, 9 / 39) and np.allclose(found.x, 0) and np.allclose(found.y, 0)


def test_a_resized_crop_shows_the_corners_of_its_box_in_the_corners_of_the_image() -> None:
    pixels = images(40, 16, 16, 1)
    part = RandomResizedCrop(scale=(0.2, 0.9))
    affine = part.matrix(draw(40), 16, 16)
    found = augmented(pixels, part)
    for row in range(40):
        for y, x in ((0, 0), (0, 15), (15, 0), (15, 15)):
            from_x, from_y, _ = matrix(affine, row) @ [x - 7.5, y - 7.5, 1] + 7.5
            assert found[row, y, x] == pixels[row, round(from_y), round(from_x)]


def test_parts_act_in_the_order_of_the_job() -> None:
    pixels = images(200)
    crop, flip = RandomCrop(padding=3), RandomHorizontalFlip(p=1)
    once = augmented(pixels, crop, flip)
    cropped = augmented(pixels, crop)
    assert (once == cropped[:, :, ::-1]).all()


def test_movements_come_before_what_changes_pixels_wherever_they_stand() -> None:
    pixels = images(50)
    parts = (RandomErasing(p=1), RandomRotation(degrees=40))
    moved = resample(torch.from_numpy(pixels), parts[1].matrix(draw(50, 1), 12, 15))
    assert (augmented(pixels, *parts) == parts[0].pixels(draw(50, 0), moved).numpy()).all()


def test_parts_that_are_one_resampling_have_one_fill() -> None:
    assert fill_of((RandomRotation(fill=3), RandomHorizontalFlip(), RandomCrop(fill=3), RandomErasing(fill=9))) == 3
    with pytest.raises(DloptError, match=r"^augment: .*same fill, not 3 in random_rotation, 0 in random_crop, 3 in random_rotation$"):
        fill_of((RandomRotation(fill=3), RandomCrop(), RandomRotation(fill=3)))


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"kind": "random_scale", "scale": [2, 1]}, "the first must not be more than the second"),
        ({"kind": "random_resized_crop", "scale": [0.5, 1.5]}, "cannot be larger than the image"),
        ({"kind": "random_erasing", "ratio": [0, 1]}, "greater than 0"),
        ({"kind": "mixup", "alpha": 0}, "greater than 0"),
    ],
)
def test_what_cannot_be_is_refused(part: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TypeAdapter(Augmentation).validate_python(part)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_looks_the_same_in_every_batch_and_with_any_number_of_threads(threads: int, channels: int) -> None:
    pixels = images(130, 28, 28, channels)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = augmented(pixels, *ALL)
        torch.set_num_threads(threads)
        for size in (1, 3, 64, 130):
            for start in range(0, 130 if size > 3 else 30, size):
                rows = np.arange(start, min(start + size, 130))
                assert (augmented(pixels[rows], *ALL, picks=rows) == whole[rows]).all()
        order = np.random.default_rng(0).permutation(130)
        assert (augmented(pixels[order], *ALL, picks=order) == whole[order]).all()
    finally:
        torch.set_num_threads(before)


def test_a_set_of_many_blocks_is_augmented_as_a_small_one() -> None:
    pixels = images(3000, 28, 28)
    whole = augmented(pixels, *ALL)
    assert (whole[2900:] == augmented(pixels[2900:], *ALL, picks=np.arange(2900, 3000))).all()


def test_picks_epochs_seeds_and_repeated_parts_differ() -> None:
    same = np.repeat(images(1, 20, 20), 30, axis=0)
    found = augmented(same, RandomRotation(degrees=90))
    assert len(np.unique(found.reshape(30, -1), axis=0)) == 30
    for other in (
        augmented(same, RandomRotation(degrees=90), epoch=EPOCH + 1),
        augmented(same, RandomRotation(degrees=90), seed=SEED + 1),
        augmented(same, RandomRotation(degrees=90), picks=np.arange(30) + 2**36),
        augmented(same, RandomHorizontalFlip(p=0), RandomRotation(degrees=90)),
    ):
        assert (other != found).any(axis=(1, 2, 3)).all()


def test_the_input_is_left_as_it_was() -> None:
    for parts in (ALL, ALL[-6:], ALL[-1:]):
        pixels = images(channels=3)
        tensor = torch.from_numpy(pixels.copy())
        augment(tensor, np.arange(len(pixels)), SEED, EPOCH, parts)
        assert (tensor.numpy() == pixels).all()


def test_no_rows_are_no_rows() -> None:
    assert augmented(images(0), *ALL).shape == (0, 12, 15, 1)


def test_numbers_of_a_draw_are_uniform_normal_and_independent() -> None:
    one, two, other = draw(20000).uniform(0), draw(20000).uniform(1), draw(20000, part=1).uniform(0)
    for values in (one, two, other, draw(200).uniforms(3, 100).ravel()):
        counts = np.histogram(values, bins=50, range=(0, 1))[0]
        assert ((counts - 400) ** 2 / 400).sum() < 100  # chi-squared, 49 degrees of freedom: far out in the tail
    assert all(abs(np.corrcoef(a, b)[0, 1]) < 0.03 for a, b in ((one, two), (one, other), (two, other), (one[1:], one[:-1])))
    normal = draw(500).normals(0, 41)
    assert normal.shape == (500, 41) and abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert abs((np.abs(normal) < 1).mean() - 0.6827) < 0.01 and abs((np.abs(normal) > 2).mean() - 0.0455) < 0.005
    assert abs(np.corrcoef(normal[:, 0], normal[:, 1])[0, 1]) < 0.15


def test_the_table_of_the_normal_distribution_has_its_moments() -> None:
    table = normal_table().astype(np.float64)
    assert len(table) == 65536 and (np.diff(table) > 0).all() and abs(table.mean()) < 1e-12
    assert abs(table.std() - 1) < 1e-3 and abs((table**4).mean() - 3) < 1e-2 and abs(table[-1] - 4.32) < 0.01
