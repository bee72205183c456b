"""A few training images and what augmentation makes of them, for the report's grid."""

from __future__ import annotations

import numpy as np
import torch

from dlopt.artifact import Artifact
from dlopt.data.feed.sampler import Sampler
from dlopt.data.prepared import Split
from dlopt.report import Samples
from dlopt.train.job import Fit

IMAGES, VERSIONS = 8, 4


def samples(data: Artifact, fit: Fit) -> Samples | None:
    """The first training images as they are and in the first epochs, mixed, if they are, with the next of them; None where
    augmentation leaves images as they are."""
    split = Split.open(data, "train")
    sampler = Sampler.of(split, fit.seed, fit.train.rows_of_batch(len(split)), 0, 1, fit.augment)
    names = [feature.name for feature in split.signature.inputs if feature.holds == "pixels"]
    if not names or not any("pixels" in part.of for part in fit.augment):
        return None
    images = split.read(split.chunks[:1])[names[0]][:IMAGES]
    versions = [_version(sampler, names[0], images, epoch) for epoch in range(1, VERSIONS + 1)]
    return Samples(original=images, augmented=np.stack(versions))


def _version(sampler: Sampler, name: str, images: np.ndarray, epoch: int) -> np.ndarray:
    """The images as they look in an epoch."""
    picks = np.arange(len(images))
    found = sampler.augmented({name: torch.from_numpy(images.copy())}, picks, epoch)
    if sampler.mixes:
        partners = {name: found[name].roll(-1, dims=0)}
        found, _ = sampler.mixed(found, partners, picks, epoch)
    return found[name].numpy()
