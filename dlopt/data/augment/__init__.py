"""Augmentation in training: of images, texts and tables, a row's random numbers from (seed, epoch, row) alone.

A file for each family; the union below is the list of what there is. In an image what moves pixels comes first, all of it in one
resampling, then what changes them; in each family the order is the job's. What mixes rows comes last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dlopt.data.augment.draw import Draw
from dlopt.data.augment.geometric import (
    Filled,
    Geometric,
    RandomCrop,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    RandomScale,
    RandomShear,
    RandomTranslation,
    RandomVerticalFlip,
)
from dlopt.data.augment.mixing import CutMix, Mixing, MixUp, mix_with
from dlopt.data.augment.pixels import Brightness, Contrast, GaussianBlur, GaussianNoise, Pixels, RandomErasing, Saturation
from dlopt.data.augment.policy import RandAugment
from dlopt.data.augment.resample import Affine, resample
from dlopt.data.augment.tables import Change, FeatureDropout, FeatureNoise
from dlopt.data.augment.texts import Edit, RandomDeletion, RandomInsertion, RandomReplacement, RandomSwap
from dlopt.part import DloptError, Feature, Statistics

Augmentation = Annotated[
    RandomCrop
    | RandomResizedCrop
    | RandomHorizontalFlip
    | RandomVerticalFlip
    | RandomRotation
    | RandomScale
    | RandomShear
    | RandomTranslation
    | RandomErasing
    | Brightness
    | Contrast
    | Saturation
    | GaussianNoise
    | GaussianBlur
    | RandAugment
    | MixUp
    | CutMix
    | RandomReplacement
    | RandomInsertion
    | RandomDeletion
    | RandomSwap
    | FeatureNoise
    | FeatureDropout,
    Field(discriminator="kind"),
]
"""Each says in `of` what an input that it is for holds (see `Feature.holds`)."""

BLOCK = 2**20
"""How many values are worked on at a time, so that what is in between stays in the processor's cache."""


def augment_rows(
    inputs: Mapping[str, Tensor],
    features: Sequence[Feature],
    picks: np.ndarray,
    seed: int,
    epoch: int,
    parts: Sequence[Augmentation],
    statistics: Mapping[str, Statistics],
) -> dict[str, Tensor]:
    """Inputs as they look in this epoch, but for mixing; the same to the bit however rows are put into batches.

    inputs: feature name to values (n, *shape); picks: int64 (n,). Images of one row all move together; other inputs draw
    numbers of their own. statistics: of the inputs whose numbers get noise.
    """
    found = dict(inputs)
    for place, feature in enumerate(features):
        mine = [(index, part) for index, part in enumerate(parts) if feature.holds in part.of]
        if not mine or not len(picks):
            continue
        values = inputs[feature.name]
        if feature.holds == "pixels":
            found[feature.name] = augment(values, picks, seed, epoch, parts)
            continue
        draw = Draw.of(picks, seed, epoch)
        for index, part in mine:
            if isinstance(part, Edit):
                values = part.edit(draw.part(index).part(place), values, feature.tokens)
            elif isinstance(part, Change):
                values = part.change(draw.part(index).part(place), values, _deviations(statistics[feature.name], values))
        found[feature.name] = values
    return found


def augment(images: Tensor, picks: np.ndarray, seed: int, epoch: int, parts: Sequence[Augmentation]) -> Tensor:
    """Images as they look in this epoch, but for mixing. images: uint8 (n, height, width, channels); picks: int64 (n,)."""
    if not len(images) or not any(isinstance(part, Geometric | Pixels) for part in parts):
        return images
    step = max(1, BLOCK // images[0].numel()) if images.device.type == "cpu" else len(images)
    blocks = [slice(start, start + step) for start in range(0, len(images), step)]
    found = [_augment_block(images[block], Draw.of(picks[block], seed, epoch), parts) for block in blocks]
    return found[0] if len(found) == 1 else torch.cat(found)


def mix_rows(
    inputs: Mapping[str, Tensor],
    partners: Mapping[str, Tensor],
    features: Sequence[Feature],
    picks: np.ndarray,
    seed: int,
    epoch: int,
    parts: Sequence[Augmentation],
) -> tuple[dict[str, Tensor], Tensor]:
    """Augmented inputs mixed with their partners' augmented inputs, and the share of the row itself, float32 (n,)."""
    draw = Draw.of(picks, seed, epoch)
    mixing = [(part, draw.part(index)) for index, part in enumerate(parts) if isinstance(part, Mixing)]
    return mix_with(dict(partners), dict(inputs), features, mixing)


def mixes(parts: Sequence[Augmentation]) -> bool:
    """Whether rows are mixed with partners."""
    return any(isinstance(part, Mixing) for part in parts)


def fill_of(parts: Sequence[Augmentation]) -> int:
    """What stands outside of images that are moved. Raises DloptError where parts that are one resampling disagree."""
    filled = [part for part in parts if isinstance(part, Filled)]
    if len({part.fill for part in filled}) > 1:
        said = ", ".join(f"{part.fill} in {part.kind}" for part in filled)
        raise DloptError(f"augment: parts that move images are one resampling: give all the same fill, not {said}")
    return filled[0].fill if filled else 0


def _augment_block(images: Tensor, draw: Draw, parts: Sequence[Augmentation]) -> Tensor:
    height, width = images.shape[1:3]
    affine = Affine()
    for index, part in enumerate(parts):
        if isinstance(part, Geometric):
            affine = affine @ part.matrix(draw.part(index), height, width)
    if any(isinstance(part, Geometric) for part in parts):
        images = resample(images, affine, fill_of(parts))
    else:  # in memory the channels lie apart from here on, as after resampling
        images = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for index, part in enumerate(parts):
        if isinstance(part, Pixels):
            images = part.pixels(draw.part(index), images)
    return images


def _deviations(statistics: Statistics, values: Tensor) -> Tensor:
    """Standard deviations of the columns, float32 (columns,)."""
    return torch.tensor(statistics.std, dtype=torch.float32).to(values.device)
