"""What a larger network knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from dlopt.compress.base import Compressor

if TYPE_CHECKING:
    from dlopt.artifact import Artifact
    from dlopt.compress.model import Model


class Distil(Compressor):
    """The job's network is trained to say what another one says (Hinton et al. 2015): a run on the same data, such as a larger network."""

    kind: Literal["distil"] = "distil"
    teacher: str
    """The folder of a run."""
    epochs: int | None = Field(None, ge=1)
    """Passes over the training split; as many as the job has without it."""
    alpha: float = Field(0.9, ge=0, le=1)
    """Share of the loss that is how far outputs are from the teacher's; the rest is the job's own."""
    temperature: float = Field(4.0, gt=0)
    """What logits are divided by before they are compared: the higher, the more the unlikely classes tell."""
    features: float = Field(0.0, ge=0)
    """How much is added to the loss of how differently both networks see which rows of a batch are alike, by what their last layers are
    given (Tung and Mori 2019), be the one wider than the other or not."""
    fresh: bool = True
    """Whether the network begins with its first weights, and not with those that it has been trained to."""

    def found(self) -> Any:
        """Which model the run has."""
        return self._artifact("model").manifest.digest

    def apply(self, model: Model) -> None:
        from dlopt.train.tuning import Teacher

        given = {name: self._artifact(name).path for name in ("model", "data")}
        model.learn(self, Teacher(**given, alpha=self.alpha, temperature=self.temperature, features=self.features))

    def _artifact(self, name: str) -> Artifact:
        from pathlib import Path

        from dlopt.runs import artifact, read

        return artifact(Path(self.teacher), read(Path(self.teacher)), name)
