"""What changes texts: int32 token ids (n, width), padded with 0 at the end. Padding stays where it is, and no text gets empty.

To add one: a class with `edit`, and its name in the union. The operations are those of Wei and Zou 2019 (arXiv 1901.11196), with
any token of the vocabulary where the paper has synonyms.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dlopt.data.augment.draw import Draw
from dlopt.part import Part


class Edit(Part):
    """An augmentation of texts."""

    of: ClassVar[tuple[str, ...]] = ("tokens",)

    def edit(self, draw: Draw, texts: Tensor, tokens: int) -> Tensor:
        """int32 (n, width) token ids, changed. tokens: how many different ids there are, 0 among them."""
        raise NotImplementedError


class RandomReplacement(Edit):
    """Replace tokens by any others of the vocabulary."""

    kind: Literal["random_replacement"] = "random_replacement"
    p: float = Field(0.1, ge=0, le=1)
    """Probability, of each token."""

    def edit(self, draw: Draw, texts: Tensor, tokens: int) -> Tensor:
        return torch.where(_chosen(draw, texts, self.p), _any_token(draw, texts, tokens), texts)


class RandomDeletion(Edit):
    """Leave tokens out; of a text of which none would be left, one stays."""

    kind: Literal["random_deletion"] = "random_deletion"
    p: float = Field(0.1, ge=0, le=1)
    """Probability, of each token."""

    def edit(self, draw: Draw, texts: Tensor, tokens: int) -> Tensor:
        there, fate = texts != 0, _uniforms(draw, texts)
        luckiest = torch.where(there, fate, -1.0).argmax(dim=1, keepdim=True)
        kept = (there & (fate >= self.p)).scatter(1, luckiest, True)
        order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)
        return torch.where(kept, texts, 0).gather(1, order)


class RandomInsertion(Edit):
    """Insert any tokens of the vocabulary before others; what no longer fits into the width is cut off at the end."""

    kind: Literal["random_insertion"] = "random_insertion"
    p: float = Field(0.1, ge=0, le=1)
    """Probability, before each token."""

    def edit(self, draw: Draw, texts: Tensor, tokens: int) -> Tensor:
        width, inserted = texts.shape[1], _chosen(draw, texts, self.p)
        place = torch.arange(width, device=texts.device) + inserted.cumsum(dim=1)
        wider = texts.new_zeros((len(texts), 2 * width))
        wider.scatter_(1, (place - 1).clamp_(min=0), torch.where(inserted, _any_token(draw, texts, tokens), 0))
        return wider.scatter_add_(1, place, texts)[:, :width].contiguous()


class RandomSwap(Edit):
    """Choose some tokens and let them change places among themselves."""

    kind: Literal["random_swap"] = "random_swap"
    p: float = Field(0.1, ge=0, le=1)
    """Probability to be chosen, of each token."""

    def edit(self, draw: Draw, texts: Tensor, tokens: int) -> Tensor:
        chosen = _chosen(draw, texts, self.p)
        places = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)
        shuffled = torch.where(chosen, _uniforms(draw, texts, 1), 1.0).argsort(dim=1, stable=True)
        return texts.scatter(1, places, texts.gather(1, shuffled))


def _uniforms(draw: Draw, texts: Tensor, number: int = 0) -> Tensor:
    """A number in [0, 1) for each place, float64 (n, width)."""
    return torch.from_numpy(draw.uniforms(number, texts.shape[1])).to(texts.device)


def _chosen(draw: Draw, texts: Tensor, p: float) -> Tensor:
    """Which tokens, each with probability p, bool (n, width)."""
    return (texts != 0) & (_uniforms(draw, texts) < p)


def _any_token(draw: Draw, texts: Tensor, tokens: int) -> Tensor:
    """A token for each place, any but padding, int32 (n, width)."""
    ids = np.floor(draw.uniforms(1, texts.shape[1]) * (tokens - 1)).astype(np.int32) + 1
    return torch.from_numpy(ids).to(texts.device)
