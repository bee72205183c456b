"""Any mix of images, texts and columns of a table in one model: an encoder for each, and hidden layers over what they find."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dlopt.models.cnn import Cnn
from dlopt.models.encoder import Encoder, Headed
from dlopt.models.layers import Activation, Dropout, Init, initialize
from dlopt.models.mlp import Mlp, tower
from dlopt.models.norms import Norm
from dlopt.models.resnet import Resnet
from dlopt.models.table import TABLE, Embeddings, FtTransformer, TableResnet
from dlopt.models.text import TextBag, TextCnn
from dlopt.models.transformer import TextTransformer
from dlopt.models.vit import Vit
from dlopt.part import DloptError, Feature, Part, Signature

ImageEncoder = Annotated[Cnn | Resnet | Vit | Mlp, Field(discriminator="kind")]
TextEncoder = Annotated[TextBag | TextCnn | TextTransformer, Field(discriminator="kind")]
TableEncoder = Annotated[Embeddings | Mlp | TableResnet | FtTransformer, Field(discriminator="kind")]
SMALLEST = 4
"""The image that the default cnn, which halves it twice, leaves a pixel of."""


class Joint(Part):
    """An encoder for each image, one for each text, and one for all columns of the table; what they find, side by side, goes through
    hidden layers. `{kind: joint}` alone will do for any inputs."""

    kind: Literal["joint"] = "joint"
    image: ImageEncoder | None = None
    """What encodes each image; cnn when left out, or for tiny ones mlp."""
    text: TextEncoder | None = None
    """What encodes each text; text_bag when left out."""
    table: TableEncoder | None = None
    """What encodes numbers, dates and categories together; embeddings when left out."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (128,)
    """Units of each hidden layer over what the encoders find; none joins them in the output alone."""
    activation: Activation = "relu"
    """What follows each hidden layer."""
    norm: Norm = "none"
    """What normalises each hidden layer's outputs, before the activation."""
    init: Init = "kaiming_uniform"
    """How the weights of hidden layers and the output start; encoders start as they say themselves."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Share of each hidden layer's units that is dropped in training."""
    dropout_kind: Dropout = "standard"
    """How they are dropped."""

    def build(self, signature: Signature) -> nn.Module:
        encoders = Beside(list(self._encoders(signature)))
        hidden = tower(encoders, self.hidden, self.activation, self.dropout, dropout_kind=self.dropout_kind, norm=self.norm)
        network = Headed(hidden, signature.num_outputs)
        for name, layer in [*hidden.named_children(), ("head", network.head)]:
            if name != "rows":
                initialize(layer, self.init)
        return network

    def _encoders(self, signature: Signature) -> Iterator[tuple[list[str], Encoder]]:
        """Names of inputs, and what encodes them, in the order of the signature; the table where its first column is."""
        table = tuple(feature for feature in signature.inputs if feature.holds in TABLE)
        _refuse_missing("image", self.image, [feature for feature in signature.inputs if feature.holds == "pixels"])
        _refuse_missing("text", self.text, [feature for feature in signature.inputs if feature.holds == "tokens"])
        _refuse_missing("table", self.table, table)
        for feature in signature.inputs:
            if feature.holds == "pixels":
                yield _encoder("image", self.image or _for(feature), signature, (feature,))
            elif feature.holds == "tokens":
                yield _encoder("text", self.text or TextBag(), signature, (feature,))
            elif feature == table[0]:
                yield _encoder("table", self.table or Embeddings(), signature, table)


class Beside(Encoder):
    """What several encoders, each with the names of its inputs, find in a row, side by side."""

    def __init__(self, encoders: Sequence[tuple[list[str], Encoder]]) -> None:
        super().__init__()
        self.names = [names for names, _ in encoders]
        self.encoders = nn.ModuleList(encoder for _, encoder in encoders)
        self.width = sum(encoder.width for _, encoder in encoders)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        each = zip(self.names, self.encoders, strict=True)
        return torch.cat([encoder({name: inputs[name] for name in names}) for names, encoder in each], dim=1)


def _refuse_missing(field: str, part: Part | None, features: Sequence[Feature]) -> None:
    if part is not None and not features:
        raise DloptError(f"model.{field}: there is no {field} among the inputs: leave it out")


def _for(image: Feature) -> Cnn | Mlp:
    return Cnn() if min(image.shape[:2]) >= SMALLEST else Mlp()


def _encoder(
    field: str, part: ImageEncoder | TextEncoder | TableEncoder, signature: Signature, features: tuple[Feature, ...]
) -> tuple[list[str], Encoder]:
    """The encoder of some of the inputs; what it has to say of them names its own field."""
    try:
        encoder = part.encoder(Signature(inputs=features, target=signature.target))
    except DloptError as error:
        raise DloptError(f"model.{field}{str(error).removeprefix('model')}") from None
    return [feature.name for feature in features], encoder
