"""A few training images and what augmentation makes of them, for the report's grid."""

from __future__ import annotations

import numpy as np
import torch

from dlopt.artifact import Artifact
from dlopt.data.prepared import Split
from dlopt.data.share import Share
from dlopt.report import Samples
from dlopt.train.section import Fit

IMAGES, VERSIONS = 8, 4


def samples(data: Artifact, fit: Fit) -> Samples | None:
    """The first training images as they are and in the first epochs; None without augmentation."""
    split = Split.open(data, "train")
    share = Share.of(split, fit.seed, fit.train.batch_size, 0, 1, fit.augment)
    if not share.augmented_inputs:
        return None
    images = split.read(split.chunks[:1])[share.augmented_inputs[0]][:IMAGES]
    rows = np.arange(len(images))
    versions = [share.augmented(torch.from_numpy(images.copy()), rows, epoch).numpy() for epoch in range(1, VERSIONS + 1)]
    return Samples(original=images, augmented=np.stack(versions))
