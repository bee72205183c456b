"""Models of mixes: an encoder for every image and text and one for the table, each of which is used and starts by its own rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dlopt import spec
from dlopt.models import Cnn, FtTransformer, Joint, Mlp, Resnet, TableResnet, TextBag, TextCnn, TextTransformer, Vit
from dlopt.models.table import Embeddings
from dlopt.part import DloptError, Feature
from tests.cases import crossed
from tests.graphs import beyond_rounding, built, graph, said, tensors, without_gradient
from tests.models.test_models import image, same
from tests.sets import CATEGORIES, DATES, EVERYTHING, HASHED, IMAGE, LABELS, NUMBER, NUMBERS, TEXT, THREE, inputs_of, signature

LARGE = image(16, 12, 3, name="large")
TITLE = TEXT.model_copy(update={"name": "body", "shape": (5,), "tokens": 11})
MIX = (NUMBERS, LARGE, CATEGORIES, TEXT, image(8, 8, name="small"), DATES, TITLE)
RESNET = Resnet(blocks=(1, 1), widths=(4, 8), zero_residual_ends=False)
MODELS = [
    Joint(),
    Joint(
        image=Resnet(blocks=(1, 1), widths=(4, 8), zero_residual_ends=False),
        text=TextTransformer(width=8),
        table=FtTransformer(width=8),
        hidden=(16, 8),
    ),
    Joint(image=Vit(width=8, depth=1), text=TextCnn(channels=4), table=TableResnet(width=8), norm="layer", activation="swiglu"),
    Joint(image=Mlp(hidden=(8,)), table=Mlp(hidden=(8,)), hidden=(), text=TextBag(hidden=(4,))),
]


@pytest.mark.parametrize(("model", "target"), crossed(MODELS, [THREE, LABELS, NUMBER]))
def test_the_graph_says_what_torch_says(model: Joint, target: Any) -> None:
    found = signature(*MIX, target=target)
    net = built(model, found)
    run = graph(net, found)
    for rows in (1, 0, 2, 200):
        some = inputs_of(found, rows, seed=rows)
        assert beyond_rounding(run(some), net, found, some) <= 0
    assert said(net, found, inputs_of(found, 200)).std(axis=0).max() > 0.01


@pytest.mark.parametrize("model", MODELS)
def test_every_input_of_the_mix_is_used(model: Joint) -> None:
    found = signature(*MIX)
    net, rows = built(model, found), tensors(inputs_of(found, 30))
    before = net(rows)
    for name in rows:
        assert (net(rows | {name: rows[name].flip(0)}) - before).abs().max() > 1e-5, name


@pytest.mark.parametrize("model", MODELS)
def test_a_step_reaches_every_weight(model: Joint) -> None:
    found = signature(*MIX)
    assert without_gradient(built(model, found), found) == []


@pytest.mark.parametrize(
    "inputs",
    [*((one,) for one in EVERYTHING), EVERYTHING, (IMAGE, TEXT), (TEXT, HASHED), (image(1, 1),), (image(3, 9),)],
    ids=lambda inputs: " ".join(feature.name for feature in inputs),
)
def test_joint_alone_will_do_for_any_inputs(inputs: tuple[Feature, ...]) -> None:
    found = signature(*inputs)
    net = built(Joint(), found)
    assert net(tensors(inputs_of(found, 5))).shape == (5, 2)
    assert without_gradient(net, found) == []


def test_images_and_texts_have_an_encoder_each_and_the_table_has_one() -> None:
    encoders = built(Joint(table=FtTransformer(width=8)), signature(*MIX)).body.encoder.rows
    assert encoders.names == [["numbers", "carrier, origin", "day"], ["large"], ["title"], ["small"], ["body"]]
    assert [encoder.width for encoder in encoders.encoders] == [8, 128, 64, 128, 64]
    columns = encoders.encoders[0].columns
    assert columns.scaled.num_embeddings == 3 + 2 and columns.table.num_embeddings == 4 + 6
    assert not set(map(id, encoders.encoders[2].parameters())) & set(map(id, encoders.encoders[4].parameters()))


def test_what_the_encoders_find_stands_side_by_side() -> None:
    found = signature(*MIX)
    net, rows = built(Joint(hidden=()), found), tensors(inputs_of(found, 4))
    given, beside = net.preprocess(rows), net.body.encoder.rows
    each = [encoder({name: given[name] for name in names}) for names, encoder in zip(beside.names, beside.encoders, strict=True)]
    same(net(rows), net.body.head(torch.cat(each, dim=1)))


def test_encoders_start_by_their_own_rules_and_what_joins_them_by_that_of_joint() -> None:
    net = built(Joint(image=Cnn(init="zeros"), text=TextCnn(init="normal"), hidden=(64,), init="small_normal"), signature(TEXT, LARGE))
    text, picture = net.body.encoder.rows.encoders
    assert all(weight.abs().max() == 0 for weight in picture.parameters())
    convolutions = [weight.detach() for weight in text.parameters() if weight.dim() == 3]
    assert [float(weight.std()) for weight in convolutions] == pytest.approx([1, 1, 1], rel=0.02)
    joined = net.body.encoder.hidden1.linear.weight.detach()
    assert abs(float(joined.std()) - 0.01) < 0.001


def test_a_seed_gives_the_same_weights_and_another_one_others() -> None:
    found = signature(*MIX)
    first, again, other = (dict(built(MODELS[1], found, seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(value, other[name]) for name, value in first.items() if value.dim() > 1)


@pytest.mark.parametrize(
    ("model", "inputs", "says"),
    [
        (Joint(image=Cnn()), (TEXT,), "model.image: there is no image among the inputs: leave it out"),
        (Joint(text=TextBag()), (NUMBERS,), "model.text: there is no text among the inputs: leave it out"),
        (Joint(table=Embeddings()), (TEXT, LARGE), "model.table: there is no table among the inputs: leave it out"),
        (Joint(image=Cnn(channels=(4, 8, 8, 8))), (TEXT, LARGE), "model.image.channels: 4 blocks halve 16x12 to nothing: at most 3"),
        (Joint(image=Vit(patch=5)), (TEXT, LARGE), "model.image.patch: patches of 5x5 do not fill 16x12: use one of 1, 2, 4"),
    ],
)
def test_a_mistake_names_the_field_of_its_encoder(model: Joint, inputs: tuple[Feature, ...], says: str) -> None:
    with pytest.raises(DloptError) as caught:
        model.build(signature(*inputs))
    assert str(caught.value) == says


def test_a_job_names_encoders_by_their_kinds_and_is_the_same_when_it_is_written_out(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("""
name: mix
data:
  source: {kind: parquet, path: rows.parquet}
  inputs: [{kind: image, column: picture}, {kind: text, column: title}, {kind: number, columns: [price]}]
  target: {kind: category, column: label}
model: {kind: joint, text: {kind: text_transformer, width: 32}, table: {kind: ft_transformer, width: 16}}
""")
    model = spec.load(job, ["model.image.kind=resnet", "model.text.depth=3"]).model
    assert isinstance(model, Joint)
    assert model.text == TextTransformer(width=32, depth=3) and model.image == Resnet() and model.hidden == (128,)
    assert Joint.model_validate_json(model.model_dump_json()) == model
    with pytest.raises(DloptError, match=r"job.yaml: model.text: no kind 'text_bog'; did you mean 'text_bag'\?$"):
        spec.load(job, ["model.text.kind=text_bog"])
    with pytest.raises(DloptError, match=r"job.yaml: model.table: no kind 'cnn'; there are embeddings, mlp, table_resnet, ft_transformer$"):
        spec.load(job, ["model.table={kind: cnn}"])
