"""What a compressor is: a part that makes a smaller network of one that is trained. Importing this imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from dlopt.part import Part

if TYPE_CHECKING:
    from dlopt.compress.model import Model


class Compressor(Part):
    """A way to make a model small. One is a subclass in a file of its own, and its name in the union of `dlopt.compress`."""

    keeps: ClassVar[bool] = False
    """Whether it decides how weights are kept, so that nothing may change them any more."""
    fills: ClassVar[bool] = False
    """Whether it decides only on weights that nothing before it has decided on."""

    if TYPE_CHECKING:
        kind: str

    leave: tuple[str, ...] = ()
    """Patterns of weights that stay as they are, as `*.head.weight`."""

    @property
    def last(self) -> bool:
        """Whether nothing can come after it."""
        return False

    def apply(self, model: Model) -> None:
        """Change the model. Raises DloptError for what cannot be done with it."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises DloptError where a package is missing."""

    def found(self) -> Any:
        """What the result depends on beside the fields (JSON). Raises DloptError."""


class Tuned(Compressor):
    """One after which, or within which, the weights are trained on."""

    epochs: int = Field(0, ge=0)
    """Passes over the training split, by the job's own loop, optimizer and augmentation; the best epoch of the validation split stays."""
    rate: float = Field(0.1, gt=0)
    """Share of the job's peak learning rate that training goes on with; it falls to 0 by a cosine."""
    teach: float = Field(0.0, ge=0, le=1)
    """Share of the loss that is how far outputs are from those of the model before it was compressed at all."""
