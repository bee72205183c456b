"""What changes pixels, against Pillow or the formula, one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from dlopt.data.augment.draw import Draw, normal_table
from dlopt.data.augment.pixels import (
    Brightness,
    Contrast,
    GaussianBlur,
    GaussianNoise,
    Pixels,
    RandomErasing,
    Saturation,
    blur,
    brighten,
    contrast,
    saturate,
)
from dlopt.data.augment.policy import OPERATIONS, STRONGEST, RandAugment

ENHANCERS = {"brightness": (brighten, ImageEnhance.Brightness), "contrast": (contrast, ImageEnhance.Contrast)}


def images(rows: int = 30, height: int = 12, width: int = 15, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (rows, height, width, channels), dtype=np.uint8)


def draw(rows: int) -> Draw:
    return Draw.of(np.arange(rows), 7, 3)


def changed(part: Pixels, pixels: np.ndarray) -> np.ndarray:
    return part.pixels(draw(len(pixels)), torch.from_numpy(pixels)).numpy()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["brightness", "contrast"])
def test_brightness_and_contrast_are_pillows(name: str, channels: int) -> None:
    pixels, factors = images(channels=channels), np.linspace(0, 2, 30)
    ours, theirs = ENHANCERS[name]
    found = ours(torch.from_numpy(pixels), factors).numpy()
    for row in range(30):
        expected = np.asarray(theirs(Image.fromarray(pixels[row].squeeze())).enhance(factors[row])).reshape(pixels[row].shape)
        assert np.abs(found[row].astype(int) - expected).max() <= 1  # Pillow cuts off where we round
    assert (found[15] != pixels[15]).any() and (ours(torch.from_numpy(pixels), np.ones(30)).numpy() == pixels).all()


def test_saturation_is_pillows_colour_and_leaves_grey_images_and_opacity_alone() -> None:
    pixels, factors = images(channels=4), np.linspace(0, 2, 30)
    found = saturate(torch.from_numpy(pixels), factors).numpy()
    assert (found[..., 3] == pixels[..., 3]).all()
    for row in range(30):
        expected = np.asarray(ImageEnhance.Color(Image.fromarray(pixels[row, ..., :3])).enhance(factors[row]))
        assert np.abs(found[row, ..., :3].astype(int) - expected).max() <= 1
    grey = images(channels=1)
    assert (saturate(torch.from_numpy(grey), factors).numpy() == grey).all()


@pytest.mark.parametrize("part", [Brightness(amount=0.5), Contrast(amount=0.5), Saturation(amount=0.5)])
def test_factors_are_uniform_around_one(part: Pixels) -> None:
    factor = draw(4000).uniform(0, 0.5, 1.5)
    assert 0.5 <= factor.min() < 0.51 and 1.49 < factor.max() <= 1.5
    pixels = images(40)
    change = {"brightness": brighten, "contrast": contrast, "saturation": saturate}[part.kind]
    assert (changed(part, pixels) == change(torch.from_numpy(pixels), factor[:40]).numpy()).all()


def test_noise_has_the_deviation_asked_for_and_is_cut_off_at_black_and_white() -> None:
    pixels = np.full((50, 20, 21, 3), 128, dtype=np.uint8)
    noise = changed(GaussianNoise(std=0.1), pixels).astype(float) - 128
    assert abs(noise.mean()) < 0.2 and abs(noise.std() - 25.5) < 0.3
    assert len(np.unique(noise.reshape(50, -1), axis=0)) == 50
    dark = changed(GaussianNoise(std=0.1), np.zeros_like(pixels))
    assert abs((dark == 0).mean() - 0.5) < 0.02 and dark.max() < 150


def test_noise_is_the_sum_rounded_for_a_row() -> None:
    pixels = images(3, 5, 7, 1)
    words = draw(3)._words(0, 9).view("<u2")[:, :35]
    expected = (normal_table()[words].reshape(pixels.shape).astype(np.float64) * (0.05 * 255) + pixels).clip(0, 255)
    assert np.abs(changed(GaussianNoise(std=0.05), pixels) - expected).max() <= 0.501


def convolved(image: np.ndarray, sigma: float) -> np.ndarray:
    """The Gaussian blur in float64, separable, the border repeated. image: (height, width)."""
    radius = 6
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in range(2):
        padded = np.pad(image, [(radius, radius) if axis == side else (0, 0) for side in range(2)], mode="edge")
        image = sum(weight * np.take(padded, np.arange(image.shape[axis]) + place, axis) for place, weight in enumerate(weights))
    return image


def test_blurring_is_a_gaussian_of_each_rows_own_width() -> None:
    pixels, sigma = images(20, 14, 9), np.linspace(0.1, 2, 20)
    found = blur(torch.from_numpy(pixels), sigma, 2.0).numpy()
    for row in range(20):
        for channel in range(3):
            assert np.abs(found[row, ..., channel] - convolved(pixels[row, ..., channel].astype(float), sigma[row])).max() < 0.52
    assert (found[0] == pixels[0]).all()
    white = np.full((4, 9, 9, 1), 255, dtype=np.uint8)
    assert (blur(torch.from_numpy(white), np.array([0.1, 0.5, 1.0, 2.0]), 2.0).numpy() == 255).all()


def test_blur_comes_as_often_as_asked() -> None:
    pixels = images(2000, 4, 4, 1)
    same = (changed(GaussianBlur(p=0.3, sigma=(1, 2)), pixels) == pixels).all(axis=(1, 2, 3))
    assert abs(same.mean() - 0.7) < 0.03


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fill", [0, 130])
def test_erasing_paints_one_box_of_the_size_asked_for_and_nothing_else(fill: int, channels: int) -> None:
    pixels = np.full((1000, 40, 30, channels), 255, dtype=np.uint8)
    found = changed(RandomErasing(p=0.6, scale=(0.1, 0.2), ratio=(0.5, 2), fill=fill), pixels)
    erased = (found == fill).all(axis=3)
    assert (erased | (found == 255).all(axis=3)).all()
    rows, columns = erased.any(axis=2), erased.any(axis=1)
    assert (erased == rows[:, :, None] & columns[:, None, :]).all()  # a product of lines ...
    for lines in (rows, columns):
        assert (np.abs(np.diff(lines.astype(int), axis=1, prepend=0, append=0)).sum(axis=1) <= 2).all()  # ... that lie together
    share = erased.mean(axis=(1, 2))[erased.any(axis=(1, 2))]
    assert abs(len(share) / 1000 - 0.6) < 0.05 and 0.085 < share.min() < 0.11 and 0.19 < share.max() < 0.215
    ratio = (columns.sum(axis=1) / rows.sum(axis=1).clip(1))[erased.any(axis=(1, 2))]
    assert 0.45 < ratio.min() < 0.6 and 1.8 < ratio.max() < 2.25


def test_erased_boxes_lie_anywhere() -> None:
    pixels = np.full((3000, 12, 10, 1), 255, dtype=np.uint8)
    often = (changed(RandomErasing(p=1, scale=(0.01, 0.01), ratio=(1, 1)), pixels) == 0)[..., 0].sum(axis=0)
    assert ((often - 25) ** 2 / 25).sum() < 180  # boxes of one pixel: chi-squared, 119 degrees of freedom


def test_a_box_that_fits_nowhere_erases_nothing() -> None:
    pixels = images(50, 10, 10)
    assert (changed(RandomErasing(p=1, scale=(0.9, 1), ratio=(3, 3)), pixels) == pixels).all()


def test_a_policy_chooses_each_operation_equally_often_with_either_sign() -> None:
    part = RandAugment(num_ops=2, magnitude=0.5)
    turns = [part._amounts(draw(9000), turn) for turn in range(2)]
    for amounts in turns:
        assert sum((amount != 0).astype(int) for amount in amounts.values()).max() == 1
        for name in OPERATIONS[1:]:
            amount = amounts[name]
            assert abs((amount != 0).mean() - 1 / 9) < 0.015
            assert set(np.unique(amount)) == {-0.5 * STRONGEST[name], 0, 0.5 * STRONGEST[name]}
            assert abs((amount[amount != 0] > 0).mean() - 0.5) < 0.07
    both = (turns[0]["rotate"] != 0) & (turns[1]["brightness"] != 0)
    assert abs(both.mean() - 1 / 81) < 0.006


def test_a_policy_is_its_operations_one_after_the_other() -> None:
    part, pixels = RandAugment(num_ops=3, magnitude=0.7), images(120)
    found = changed(part, pixels)
    change = {"brightness": brighten, "contrast": contrast, "saturation": saturate}
    amounts = [part._amounts(draw(120), turn) for turn in range(3)]
    for row in range(120):
        expected = torch.from_numpy(pixels[row : row + 1])
        for amount in amounts:
            for name, do in change.items():
                if amount[name][row]:
                    expected = do(expected, 1 + amount[name][row : row + 1])
        assert (found[row] == expected[0].numpy()).all()
    moved = part.matrix(draw(120), 12, 15)
    still = sum((amount["rotate"] != 0) | (amount["shear_x"] != 0) | (amount["shear_y"] != 0) for amount in amounts) == 0
    assert (moved.xx[still] == 1).all() and (np.abs(moved.xy[~still]) + np.abs(moved.yx[~still]) > 0).any()
    x = sum(amount["translate_x"] for amount in amounts) * 15
    assert np.allclose(moved.x[still], x[still])
