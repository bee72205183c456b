"""Models of tables: tokens and blocks against their formulas, unknown values, and graphs that look categories up themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dlopt.models import FtTransformer, Mlp, Model, TableResnet
from dlopt.models.layers import EMBEDDING_STD
from dlopt.models.table import Columns, Embeddings
from dlopt.part import DloptError, Feature
from tests.cases import crossed, few
from tests.graphs import beyond_rounding, built, fitted, graph, said, tensors, without_gradient
from tests.models.test_models import categories, numbers, same, text
from tests.sets import CATEGORIES, DATES, HASHED, IMAGE, LABELS, NUMBER, NUMBERS, ONE, TEXT, TWO, inputs_of, signature

INDICATED = NUMBERS.model_copy(update={"name": "indicated", "indicators": True})
COLUMNS = (CATEGORIES, NUMBERS, INDICATED, ONE, DATES, HASHED)
MODELS = [
    TableResnet(width=16),
    TableResnet(width=8, depth=3, norm="layer", activation="swiglu", residual_dropout=0.1, ratio=0.5),
    TableResnet(width=6, depth=1, norm="none", activation="selu", dropout_kind="alpha"),
    FtTransformer(width=16),
    FtTransformer(width=6, heads=2, depth=1, activation="gelu", norm="rms", dropout_kind="channel", residual_dropout=0.1),
]


@pytest.mark.parametrize(("model", "inputs", "target"), crossed(MODELS, [COLUMNS, (NUMBERS,), (HASHED,)], [LABELS, TWO, NUMBER]))
def test_the_graph_says_what_torch_says(model: Model, inputs: tuple[Feature, ...], target: Any) -> None:
    """Of missing numbers, unknown strings and any number of rows."""
    found = signature(*inputs, target=target)
    net = built(model, found)
    run = graph(net, found)
    for rows in (1, 0, 2, 300):
        some = inputs_of(found, rows, seed=rows)
        assert beyond_rounding(run(some), net, found, some) <= 0
    assert said(net, found, inputs_of(found, 300)).std(axis=0).max() > 0.01


@pytest.mark.parametrize("model", MODELS)
def test_every_column_is_used(model: Model) -> None:
    found = signature(*COLUMNS)
    net, rows = built(model, found), tensors(inputs_of(found, 300))
    before = net(rows)
    for name, values in rows.items():
        for column in range(values.shape[1]):
            other = values.clone()
            other[:, column] = values[:, column].flip(0)
            assert (net(rows | {name: other}) - before).abs().max() > 1e-4, (name, column)


@pytest.mark.parametrize("model", MODELS)
def test_unknown_and_missing_values_are_values_of_their_own(model: Model) -> None:
    found = signature(CATEGORIES, INDICATED)
    net = built(model, found)
    codes = torch.cartesian_prod(torch.arange(4), torch.arange(6)).int()
    usual = net({CATEGORIES.name: codes, "indicated": torch.full((24, 3), 50.0)})
    missing = net({CATEGORIES.name: codes, "indicated": torch.full((24, 3), torch.nan)})
    every = torch.cat([usual, missing])
    assert torch.isfinite(every).all()
    assert (torch.cdist(every, every) + torch.eye(48)).min() > 1e-5


@pytest.mark.parametrize("model", MODELS)
def test_a_step_reaches_every_weight(model: Model) -> None:
    found = signature(*COLUMNS)
    assert without_gradient(built(model, found), found) == []


@pytest.mark.parametrize("model", MODELS)
def test_a_row_is_trained_on_alone_too(model: Model) -> None:
    found = signature(*COLUMNS)
    assert torch.isfinite(built(model, found).train()(tensors(inputs_of(found, 1)))).all()


@pytest.mark.parametrize("model", MODELS)
def test_a_seed_gives_the_same_weights_and_another_one_others(model: Model) -> None:
    found = signature(*COLUMNS)
    first, again, other = (dict(built(model, found, seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(value, other[name]) for name, value in first.items() if value.dim() > 1)


@pytest.mark.parametrize("model", MODELS)
def test_float64_is_the_same_network_in_its_own_precision(model: Model) -> None:
    found = signature(*COLUMNS)
    rows = tensors(inputs_of(found, 50))
    single, double = built(model, found)(rows), built(model, found, dtype=torch.float64)(rows)
    assert double.dtype == torch.float64
    assert 0 < (double - single).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("model", MODELS)
def test_the_vocabulary_may_be_unknown_when_a_job_is_checked(model: Model) -> None:
    unread = CATEGORIES.model_copy(update={"vocabularies": ()})
    model.build(signature(unread, NUMBERS))
    model.build(signature(unread))


@pytest.mark.parametrize("kind", [TableResnet, FtTransformer])
def test_a_table_model_says_what_it_is_not_for(kind: type[TableResnet | FtTransformer]) -> None:
    name = kind().kind
    with pytest.raises(
        DloptError, match=rf"^model: {name} takes numbers, dates and categories, and there are none: use kind: mlp or joint"
    ):
        kind().build(signature(TEXT, IMAGE))
    with pytest.raises(DloptError, match=rf"^model: {name} takes numbers, dates and categories, and 'title' is a text: use kind: joint$"):
        kind().build(signature(NUMBERS, TEXT))


def test_a_token_is_a_scaled_and_shifted_number_or_a_code_of_its_own_column() -> None:
    torch.manual_seed(0)
    columns = Columns(signature(categories(3, 4), numbers("a", "b"), categories(2, name="more")), width=5)
    rows = {"numbers": torch.tensor([[2.0, -1.0]]), "categories": torch.tensor([[2, 0]]).int(), "more": torch.tensor([[1]]).int()}
    scaled, table, added = columns.scaled.weight, columns.table.weight, columns.added.weight  # type: ignore[union-attr]
    assert table.shape == (3 + 4 + 2, 5)
    each = [added[0], 2 * scaled[0] + added[1], -scaled[1] + added[2], table[2] + added[3], table[3] + added[4], table[8] + added[5]]
    same(columns(rows), torch.stack(each)[None])


def test_a_resnet_of_a_table_is_its_formula() -> None:
    found = signature(numbers("a", "b", "c"))
    net = built(TableResnet(width=4, depth=2, norm="layer"), found)
    rows = torch.tensor([[60.0, 30.0, 50.0], [10.0, 0.0, 99.0]])
    layers = dict(net.body.encoder.named_children())
    assert list(layers) == ["rows", "widen", "block0", "block1", "norm", "activation"]
    values = layers["widen"]((rows - 50) / 20)
    for name in ("block0", "block1"):
        before, widen, _, _, end, _ = layers[name].branch
        values = values + end(torch.relu(widen(before(values))))
    same(net({"numbers": rows}), net.body.head(torch.relu(layers["norm"](values))))


def test_the_paper_leaves_out_the_norm_before_the_first_attention() -> None:
    net = built(FtTransformer(width=8, depth=3), signature(NUMBERS))
    assert [type(block.before_attention).__name__ for block in net.body.encoder.blocks] == ["Identity", "LayerNorm", "LayerNorm"]


def test_the_default_sizes_make_the_papers_number_of_weights_at_its_width() -> None:
    """By hand for 3 numbers, of which each has a weight and a bias, at width 192, 3 blocks, 4/3 of reglu."""
    net = built(FtTransformer(width=192), signature(NUMBERS))
    attention = 4 * 192 * 192 + 3 * 192
    hidden = (192 * 2 * 256 + 2 * 256) + (256 * 192 + 192)
    norms = (3 + 2 + 1) * 2 * 192
    tokens = 3 * 2 * 192 + 192
    assert sum(parameter.numel() for parameter in net.parameters()) == 3 * (attention + hidden) + norms + tokens + 192 * 2 + 2


def test_tokens_and_embeddings_start_small_whatever_the_rule() -> None:
    columns = built(FtTransformer(init="normal"), signature(numbers(*map(str, range(100))), categories(500))).body.encoder.columns
    drawn = [columns.scaled.weight, columns.table.weight, columns.added.weight]
    assert all(abs(float(weight.detach().std()) / EMBEDDING_STD - 1) < 0.05 for weight in drawn)


def test_residual_ends_of_zero_make_blocks_pass_on_what_they_get() -> None:
    found = signature(numbers("a", "b", "c"))
    net = built(TableResnet(width=4, zero_residual_ends=True), found)
    values = torch.randn(5, 4)
    layers = dict(net.body.encoder.named_children())
    assert torch.equal(layers["block1"](layers["block0"](values)), values)
    assert not torch.equal(dict(built(TableResnet(width=4), found).body.encoder.named_children())["block0"](values), values)


@pytest.mark.parametrize("model", few(1, [FtTransformer(width=16, heads=4, attention_dropout=0.0), TableResnet(width=16, dropout=0.0)]))
def test_a_table_model_learns_what_a_sum_over_columns_cannot_say(model: Model) -> None:
    """Whether a number is above or below its mean, turned around by a category."""
    generator = np.random.default_rng(0)
    values, codes = generator.normal(50, 20, (400, 2)).astype(np.float32), generator.integers(0, 3, (400, 1), dtype=np.int32)
    labels = torch.from_numpy(((values[:, 0] > 50) ^ (codes[:, 0] == 1)).astype(np.int64))
    found = signature(numbers("a", "b"), categories(3))
    rows = {"numbers": torch.from_numpy(values), "categories": torch.from_numpy(codes)}
    assert fitted(built(model, found), rows, labels, steps=150) > 0.97
    assert fitted(built(Mlp(hidden=()), found), rows, labels, steps=150) < 0.75


@pytest.mark.parametrize("part", [TableResnet(width=10), FtTransformer(width=24), Embeddings()])
def test_an_encoder_gives_a_vector_of_its_width_to_each_row(part: Any) -> None:
    found = signature(numbers("a", "b"), categories(3, 40))
    encoder = part.encoder(found).eval()
    rows = {"numbers": torch.zeros(7, 2), "categories": torch.zeros(7, 2, dtype=torch.int32)}
    assert encoder.width == {"table_resnet": 10, "ft_transformer": 24, "embeddings": 2 + 3 + 13}[part.kind]
    assert encoder(rows).shape == (7, encoder.width)


@pytest.mark.parametrize(
    ("kind", "given", "says"),
    [
        (FtTransformer, {"width": 60}, "heads: 8 heads cannot share out a width of 60: make width a multiple of heads"),
        (FtTransformer, {"norm": "batch"}, "norm"),
        (FtTransformer, {"depth": 0}, "depth"),
        (TableResnet, {"width": 9, "activation": "glu"}, "width: glu halves a width, and 9 is odd: make it even"),
        (TableResnet, {"ratio": 0}, "ratio"),
        (TableResnet, {"dropout": 1}, "dropout"),
    ],
)
def test_a_table_model_of_nonsense_is_refused(kind: Any, given: dict[str, object], says: str) -> None:
    with pytest.raises(DloptError, match=says):
        kind.model_validate(given)


def test_embeddings_alone_take_no_text() -> None:
    with pytest.raises(DloptError, match=r"^model: 'text' is a text, which is no column of a table: use kind: joint$"):
        Embeddings().encoder(signature(text()))
