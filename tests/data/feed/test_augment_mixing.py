"""Mixing of rows with partners: the shares, what becomes of each kind of input, and the distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dlopt.data.augment import Augmentation, CutMix, MixUp, RandomCrop, mix_rows
from dlopt.data.augment.draw import Draw
from dlopt.data.augment.mixing import beta_table
from dlopt.part import Feature

IMAGE = Feature(name="image", kind="image", dtype="uint8", shape=(12, 15, 3), columns=("image",))
NUMBERS = Feature(name="numbers", kind="number", dtype="float32", shape=(2,), columns=("a", "b"))
CODES = Feature(name="codes", kind="category", dtype="string", shape=(1,), columns=("c",), vocabularies=(("x", "y"),))


def inputs(rows: int, seed: int) -> dict[str, Tensor]:
    random = np.random.default_rng(seed)
    numbers = random.normal(size=(rows, 2)).astype(np.float32)
    numbers[random.random((rows, 2)) < 0.2] = np.nan
    return {
        "image": torch.from_numpy(random.integers(0, 256, (rows, 12, 15, 3), dtype=np.uint8)),
        "numbers": torch.from_numpy(numbers),
        "codes": torch.from_numpy(random.integers(0, 3, (rows, 1), dtype=np.int32)),
    }


def mixed(
    *parts: Augmentation, rows: int = 200, features: tuple[Feature, ...] = (IMAGE, NUMBERS, CODES)
) -> tuple[dict[str, Tensor], np.ndarray]:
    values, partners = ({feature.name: inputs(rows, seed)[feature.name] for feature in features} for seed in (1, 2))
    found, share = mix_rows(values, partners, features, np.arange(rows), 7, 3, parts)
    assert share.dtype == torch.float32 and share.shape == (rows,)
    return found, share.numpy()


def test_mixed_images_are_the_rounded_weighted_mean() -> None:
    found, share = mixed(MixUp(alpha=1))
    mine, other = inputs(200, 1)["image"].numpy(), inputs(200, 2)["image"].numpy()
    weight = share.astype(np.float64)[:, None, None, None]
    assert (found["image"].numpy() == np.floor(weight * mine + (1 - weight) * other + 0.5)).all()
    assert len(np.unique(share)) > 190


def test_mixed_numbers_are_the_weighted_mean_and_missing_as_the_larger_share_has_it() -> None:
    found, share = mixed(MixUp(alpha=1))
    mine, other = inputs(200, 1)["numbers"].numpy(), inputs(200, 2)["numbers"].numpy()
    weight = share[:, None].astype(np.float64)
    mean = weight * mine + (1 - weight) * other
    larger = np.where(weight >= 0.5, mine, other)
    expected = np.where(np.isnan(mean), larger, mean)
    assert np.allclose(found["numbers"].numpy(), expected, atol=1e-6, equal_nan=True)
    assert abs(np.isnan(expected).mean() - 0.2) < 0.06


def test_what_cannot_be_mixed_is_that_of_the_row_with_the_larger_share() -> None:
    for part, names in ((MixUp(alpha=1), ["codes"]), (CutMix(), ["codes", "numbers"])):
        found, share = mixed(part)
        for name in names:
            mine, other = inputs(200, 1)[name].numpy(), inputs(200, 2)[name].numpy()
            assert np.array_equal(found[name].numpy(), np.where(share[:, None] >= 0.5, mine, other), equal_nan=name == "numbers")


def test_a_cut_is_one_box_of_the_partner_and_the_share_is_that_of_its_pixels() -> None:
    found, share = mixed(CutMix(), rows=300)
    mine, other = inputs(300, 1)["image"].numpy(), inputs(300, 2)["image"].numpy()
    cut = (found["image"].numpy() != mine).any(axis=3)
    box = np.stack([_hull(one) for one in cut])  # a pixel may be the same in both
    assert (found["image"].numpy() == np.where(box[..., None], other, mine)).all()
    assert np.abs(share - (1 - box.mean(axis=(1, 2)))).max() < 0.01
    equal = box.sum(axis=(1, 2)) == np.rint((1 - share.astype(np.float64)) * 180)
    assert equal.mean() > 0.95  # the hull of what differs may miss a line where pixels are the same by chance


def _hull(cut: np.ndarray) -> np.ndarray:
    """The smallest box around what is cut."""
    box = np.zeros_like(cut)
    places = np.argwhere(cut)
    if len(places):
        (top, left), (bottom, right) = places.min(axis=0), places.max(axis=0)
        box[top : bottom + 1, left : right + 1] = True
    return box


def test_the_share_of_cuts_is_exact_whatever_the_pixels() -> None:
    values = {"image": torch.zeros((500, 12, 15, 3), dtype=torch.uint8)}
    partners = {"image": torch.full((500, 12, 15, 3), 255, dtype=torch.uint8)}
    found, share = mix_rows(values, partners, (IMAGE,), np.arange(500), 7, 3, (CutMix(),))
    kept = (found["image"] == 0).flatten(1).float().mean(dim=1).numpy()
    assert np.allclose(share.numpy(), kept, atol=1e-6)
    assert share.min() < 0.1 and share.max() > 0.95


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 4.0])
def test_shares_have_the_moments_of_the_beta_distribution(alpha: float) -> None:
    _, share = mixed(MixUp(alpha=alpha), rows=20000, features=(NUMBERS,))
    values = share.astype(np.float64)
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(values.var() - 1 / (4 * (2 * alpha + 1))) < 0.003
    fourth = 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3))  # central moment
    assert abs(((values - values.mean()) ** 4).mean() - fourth) < 0.001


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0, 2.0, 7.5, 100.0])
def test_the_table_of_the_beta_distribution_is_its_quantiles(alpha: float) -> None:
    table = beta_table(alpha)
    assert len(table) == 65536 and (np.diff(table) >= 0).all() and (table + table[::-1] == 65536).all()
    values = table / 65536
    assert abs(values.var() - 1 / (4 * (2 * alpha + 1))) < 2e-5
    if alpha == 0.5:  # the arcsine distribution
        assert np.abs(values - np.sin(math.pi / 2 * (np.arange(65536) + 0.5) / 65536) ** 2).max() < 2e-5
    if alpha == 1:
        assert np.abs(values - (np.arange(65536) + 0.5) / 65536).max() <= 1e-5
    if alpha == 2:
        assert np.abs(3 * values**2 - 2 * values**3 - (np.arange(65536) + 0.5) / 65536).max() < 2e-5


def test_rows_are_left_as_they_are_as_often_as_asked() -> None:
    for part in (MixUp(alpha=1, p=0.3), CutMix(p=0.3)):
        found, share = mixed(part, rows=3000)
        untouched = share == 1
        assert abs(untouched.mean() - 0.7) < 0.04
        for name, values in inputs(3000, 1).items():
            assert np.array_equal(found[name].numpy()[untouched], values.numpy()[untouched], equal_nan=name == "numbers")


def test_parts_one_after_the_other_mix_with_the_same_partner_and_their_shares_multiply() -> None:
    parts = (RandomCrop(), MixUp(alpha=1), CutMix())
    found, share = mixed(*parts, features=(IMAGE,))
    values, partners = ({"image": inputs(200, seed)["image"]} for seed in (1, 2))
    draw = Draw.of(np.arange(200), 7, 3)
    once, first = parts[1].mix(draw.part(1), [IMAGE], values, partners)
    twice, second = parts[2].mix(draw.part(2), [IMAGE], once, partners)
    assert torch.equal(found["image"], twice["image"]) and np.array_equal(share, (first * second).numpy())


def test_a_row_is_mixed_alike_in_every_batch() -> None:
    parts = (MixUp(alpha=0.4), CutMix(p=0.5))
    values, partners = inputs(100, 1), inputs(100, 2)
    features = (IMAGE, NUMBERS, CODES)
    whole, share = mix_rows(values, partners, features, np.arange(100), 7, 3, parts)
    for start in range(0, 100, 7):
        part = slice(start, start + 7)
        mine, theirs = ({name: found[part] for name, found in given.items()} for given in (values, partners))
        some, some_share = mix_rows(mine, theirs, features, np.arange(100)[part], 7, 3, parts)
        assert torch.equal(share[part], some_share)
        assert all(torch.equal(whole[name][part].nan_to_num(-9), some[name].nan_to_num(-9)) for name in whole)


def test_what_is_mixed_is_left_as_it_was() -> None:
    values, partners = inputs(50, 1), inputs(50, 2)
    mix_rows(values, partners, (IMAGE, NUMBERS, CODES), np.arange(50), 7, 3, (MixUp(alpha=1), CutMix()))
    for found, seed in ((values, 1), (partners, 2)):
        assert all(torch.equal(found[name].nan_to_num(-9), value.nan_to_num(-9)) for name, value in inputs(50, seed).items())
