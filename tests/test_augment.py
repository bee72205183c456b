"""Augmentation against numpy, one row at a time; and that a row looks the same whatever batch it is in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from dlopt.data.augment import PURPOSE, Augmentation, RandomCrop, RandomHorizontalFlip, RandomRotation, _resample, augment
from dlopt.data.counter import uniform

SEED, EPOCH = 7, 3
ALL: Sequence[Augmentation] = (RandomCrop(padding=2), RandomHorizontalFlip(), RandomRotation(degrees=20))


def images(rows: int = 40, height: int = 12, width: int = 15, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (rows, height, width, channels), dtype=np.uint8)


def augmented(pixels: np.ndarray, *parts: Augmentation, rows: np.ndarray | None = None, seed: int = SEED, epoch: int = EPOCH) -> np.ndarray:
    rows = np.arange(len(pixels)) if rows is None else rows
    return augment(torch.from_numpy(pixels.copy()), rows, seed, epoch, parts).numpy()


def draws(rows: int, part: int, number: int) -> np.ndarray:
    return uniform(np.arange(rows), SEED, EPOCH, PURPOSE, part, number)


def bilinear(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The slow way in float64: each pixel of the result from the four around the place that it comes from, black outside."""
    height, width = image.shape[:2]
    result = np.zeros(image.shape, dtype=np.float64)
    for y in range(height):
        for x in range(width):
            from_x, from_y, _ = matrix @ [x - (width - 1) / 2, y - (height - 1) / 2, 1]
            from_x, from_y = from_x + (width - 1) / 2, from_y + (height - 1) / 2
            left, top = int(np.floor(from_x)), int(np.floor(from_y))
            for near_y, near_x in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                if 0 <= near_y < height and 0 <= near_x < width:
                    result[y, x] += (1 - abs(from_x - near_x)) * (1 - abs(from_y - near_y)) * image[near_y, near_x]
    return result


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(12, 15), (28, 28), (7, 7), (32, 33)])
def test_nothing_changes_when_there_is_nothing_to_do(size: tuple[int, int], channels: int) -> None:
    pixels = images(20, *size, channels)
    assert (augmented(pixels, RandomCrop(padding=0), RandomHorizontalFlip(p=0), RandomRotation(degrees=0)) == pixels).all()
    assert (augmented(pixels) == pixels).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(12, 15), (28, 28), (9, 8)])
def test_flipping_is_numpys_flip(size: tuple[int, int], channels: int) -> None:
    pixels = images(20, *size, channels)
    assert (augmented(pixels, RandomHorizontalFlip(p=1)) == pixels[:, :, ::-1]).all()


def test_a_flip_comes_as_often_as_asked_and_to_whole_images() -> None:
    pixels = images(4000, 4, 5)
    flipped = (augmented(pixels, RandomHorizontalFlip(p=0.3)) == pixels[:, :, ::-1]).all(axis=(1, 2, 3))
    kept = (augmented(pixels, RandomHorizontalFlip(p=0.3)) == pixels).all(axis=(1, 2, 3))
    assert (flipped ^ kept).all()
    assert abs(flipped.mean() - 0.3) < 0.03


@pytest.mark.parametrize("size", [(12, 15), (28, 28), (64, 48)])
@pytest.mark.parametrize("padding", [1, 2, 5])
def test_cropping_is_padding_with_black_and_cutting_out(padding: int, size: tuple[int, int]) -> None:
    pixels = images(60, *size, 3)
    found = augmented(pixels, RandomCrop(padding=padding))
    padded = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    left, top = (np.floor(draws(60, 0, axis) * (2 * padding + 1)).astype(int) for axis in range(2))
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
    part = RandomRotation(degrees=30)
    matrices = part.matrix(lambda number: draws(5000, 0, number), 10, 10)
    angles = np.rad2deg(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert -30 <= angles.min() < -29 and 29 < angles.max() <= 30
    assert abs(angles.mean()) < 1 and abs(angles.std() - 60 / np.sqrt(12)) < 0.5


@pytest.mark.parametrize("size", [8, 9, 28])
def test_a_quarter_turn_of_a_square_is_numpys(size: int) -> None:
    pixels = images(5, size, size, 3)
    for number, turns in ((0.0, 1), (1.0, -1)):  # minus and plus 90 degrees
        matrix = RandomRotation(degrees=90).matrix(lambda _, number=number: np.full(5, number), size, size)
        assert np.allclose(matrix[:, :2, :2] @ matrix[:, :2, :2], -np.eye(2))
        found = _resample(torch.from_numpy(pixels), matrix).numpy()
        assert (found == np.rot90(pixels, -turns, axes=(1, 2))).all()


@pytest.mark.parametrize("parts", [ALL, ALL[::-1], ALL[2:], (RandomRotation(degrees=180), RandomRotation(degrees=45))])
def test_composed_augmentations_are_one_bilinear_resampling(parts: Sequence[Augmentation]) -> None:
    pixels = images(12, 10, 13, 2)
    found = augmented(pixels, *parts)
    for row in range(12):
        matrix = np.eye(3)
        for index, part in enumerate(parts):
            matrix = matrix @ part.matrix(lambda number, index=index: draws(12, index, number), 10, 13)[row]
        assert np.abs(found[row] - bilinear(pixels[row], matrix)).max() <= 1


def test_parts_act_in_the_order_of_the_job() -> None:
    pixels = images(200)
    crop, flip = RandomCrop(padding=3), RandomHorizontalFlip(p=1)
    once = augmented(pixels, crop, flip)
    cropped = augmented(pixels, crop)
    assert (once == cropped[:, :, ::-1]).all()


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
            for start in range(0, 130, size):
                rows = np.arange(start, min(start + size, 130))
                assert (augmented(pixels[rows], *ALL, rows=rows) == whole[rows]).all()
        order = np.random.default_rng(0).permutation(130)
        assert (augmented(pixels[order], *ALL, rows=order) == whole[order]).all()
    finally:
        torch.set_num_threads(before)


def test_rows_epochs_seeds_and_repeated_parts_differ() -> None:
    same = np.repeat(images(1, 20, 20), 30, axis=0)
    found = augmented(same, RandomRotation(degrees=90))
    assert len(np.unique(found.reshape(30, -1), axis=0)) == 30
    for other in (augmented(same, RandomRotation(degrees=90), epoch=EPOCH + 1), augmented(same, RandomRotation(degrees=90), seed=SEED + 1)):
        assert (other != found).any(axis=(1, 2, 3)).all()
    crop = RandomCrop(padding=2)
    first, second = (crop.matrix(lambda number, part=part: draws(30, part, number), 20, 20) for part in range(2))
    assert (first != second).any()


def test_the_input_is_left_as_it_was() -> None:
    pixels = images()
    tensor = torch.from_numpy(pixels.copy())
    augment(tensor, np.arange(len(pixels)), SEED, EPOCH, ALL)
    assert (tensor.numpy() == pixels).all()


def test_no_rows_are_no_rows() -> None:
    assert augmented(images(0), *ALL).shape == (0, 12, 15, 1)
