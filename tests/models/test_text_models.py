"""Models of texts: attention against torch's own, padding that nothing sees, and graphs that say the same at any length."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dlopt.models import Model, TextBag, TextCnn, TextTransformer
from dlopt.models.layers import EMBEDDING_STD
from dlopt.models.transformer import Attention, Block, Sinusoidal
from dlopt.part import DloptError
from tests.cases import crossed
from tests.graphs import beyond_rounding, built, fitted, graph, said, without_gradient
from tests.models.test_models import MIXED, categories, ids, mixed_rows, network, numbers, same, signature, text
from tests.sets import EVERYTHING, LABELS, NUMBER, TEXT, THREE, inputs_of
from tests.sets import signature as signature_of

TRANSFORMERS = [
    TextTransformer(),
    TextTransformer(pooling="first"),
    TextTransformer(width=6, heads=2, depth=1, positions="sinusoidal", norm="rms", activation="swiglu", hidden=(5,)),
    TextTransformer(width=5, heads=1, depth=3, positions="sinusoidal", pooling="first", activation="relu", attention_dropout=0.2),
    TextTransformer(width=8, depth=1, norm="rms", pooling="first", dropout_kind="channel"),
]
OTHERS = [
    TextCnn(channels=6, activation="swiglu"),
    TextBag(dropout_kind="channel", hidden=(7,)),
    TextCnn(channels=3, dropout_kind="channel"),
]
MODELS = [*TRANSFORMERS, *OTHERS]
TEXTS = [[], [3], [4, 4], [7, 1, 9], [5, 6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize("model", MODELS)
def test_the_same_text_has_the_same_outputs_beside_any_other(model: Model) -> None:
    net = network(model, text())
    whole = net({"text": ids(*TEXTS)})
    same(net({"text": ids(*TEXTS, length=7)}), whole)
    same(net({"text": ids(*TEXTS, length=40)}), whole)
    for index, one in enumerate(TEXTS):  # alone, without any padding; the first one without any token
        same(net({"text": ids(one, length=len(one))}), whole[index : index + 1])
    assert torch.isfinite(whole).all()
    assert (whole[1:] - whole[:1]).abs().max(dim=1).values.min() > 1e-4


@pytest.mark.parametrize("model", MODELS)
def test_no_embedding_of_padding_reaches_the_outputs_nor_has_a_gradient(model: Model) -> None:
    net = network(model, text())
    before = net({"text": ids(*TEXTS)})
    before.square().sum().backward()
    (table,) = (value for name, value in net.named_parameters() if name.endswith("tokens.weight"))
    assert table.grad is not None and table.grad[3].abs().max() > 0 and torch.equal(table.grad[0], torch.zeros_like(table[0]))
    with torch.no_grad():
        table[0] = 1e3
    same(net({"text": ids(*TEXTS)}), before)


@pytest.mark.parametrize(("model", "target"), crossed(MODELS, [THREE, LABELS, NUMBER]))
def test_the_graph_says_what_torch_says_of_any_rows_and_lengths(model: Model, target: Any) -> None:
    found = signature_of(*EVERYTHING, target=target)
    net = built(model, found)
    run = graph(net, found)
    for rows in (1, 0, 2, 300):
        some = inputs_of(found, rows, seed=rows)
        assert beyond_rounding(run(some), net, found, some) <= 0
    empty = inputs_of(found, 5) | {TEXT.name: np.zeros((5, 9), dtype=np.int32)}
    longer = inputs_of(found, 5) | {TEXT.name: np.random.default_rng(0).integers(1, 20, (5, 33), dtype=np.int32)}
    for some in (empty, longer):
        assert beyond_rounding(run(some), net, found, some) <= 0
    assert said(net, found, inputs_of(found, 300)).std(axis=0).max() > 0.01  # there was something to tell apart


@pytest.mark.parametrize("model", MODELS)
def test_every_input_of_a_mix_is_used(model: Model) -> None:
    rows, net = mixed_rows(20), network(model, *MIXED)
    before = net(rows)
    for name in rows:
        assert (net(rows | {name: rows[name].flip(0)}) - before).abs().max() > 1e-4, name


@pytest.mark.parametrize("model", MODELS)
def test_a_step_reaches_every_weight(model: Model) -> None:
    found = signature_of(*EVERYTHING, target=THREE)
    assert without_gradient(built(model, found), found) == []


@pytest.mark.parametrize("model", MODELS)
def test_a_seed_gives_the_same_weights_and_another_one_others(model: Model) -> None:
    first, again, other = (dict(network(model, *MIXED, seed=seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(value, other[name]) for name, value in first.items() if value.dim() > 1)


@pytest.mark.parametrize("model", MODELS)
def test_float64_is_the_same_network_in_its_own_precision(model: Model) -> None:
    single, double = network(model, *MIXED), network(model, *MIXED, dtype=torch.float64)
    rows = mixed_rows(20)
    found = double(rows)
    assert found.dtype == torch.float64
    assert 0 < (found - single(rows)).abs().max() < 1e-4


@pytest.mark.parametrize("model", [TextTransformer(), TextBag(), TextCnn()])
def test_a_text_model_without_a_text_says_what_to_use(model: Model) -> None:
    with pytest.raises(DloptError, match=rf"^model: {model.kind} takes at least one text: use kind: mlp for other inputs$"):
        model.build(signature(numbers("a"), categories(3)))


@pytest.mark.parametrize(
    ("model", "width"),
    [
        (TextTransformer(width=12), 12),
        (TextTransformer(hidden=(9, 5)), 5),
        (TextBag(embedding=7, pooling="mean_max"), 14),
        (TextCnn(channels=6, sizes=(2, 3)), 12),
        (TextCnn(channels=6, sizes=(2, 3), activation="geglu"), 12),
    ],
)
def test_an_encoder_gives_a_vector_of_its_width_to_each_row(model: Any, width: int) -> None:
    encoder = model.encoder(signature(text())).eval()
    assert encoder.width == width
    assert encoder({"text": ids(*TEXTS)}).shape == (5, width)


def test_attention_is_that_of_torch_and_looks_at_nothing_that_is_not_seen() -> None:
    torch.manual_seed(0)
    ours, values = Attention(12, 3).eval(), torch.randn(4, 7, 12)
    reference = nn.MultiheadAttention(12, 3, batch_first=True).eval()
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        reference.in_proj_bias.copy_(torch.cat([ours.query.bias, torch.zeros(12), ours.value.bias]))
        reference.out_proj.load_state_dict(ours.end.state_dict())
        seen = torch.arange(7) < torch.tensor([7, 1, 4, 6])[:, None]
        expected = reference(values, values, values, key_padding_mask=~seen, need_weights=False)[0]
        same(ours(values, values, seen), expected)
        same(ours(values[:, :1], values, seen), expected[:, :1])
        same(ours(values, values), reference(values, values, values, need_weights=False)[0])


def test_a_block_adds_attention_and_then_a_feed_forward_layer_each_after_a_norm() -> None:
    torch.manual_seed(0)
    block = Block(8, 2, 5, "geglu", "layer", 0.0, nn.Dropout(0.3), nn.Dropout(0.3)).eval()
    values = torch.randn(3, 4, 8)
    normed = block.before_attention(values)
    middle = values + block.attention(normed, normed)
    passed, gate = block.hidden(nn.functional.layer_norm(middle, (8,))).chunk(2, dim=-1)
    expected = middle + block.end(passed * nn.functional.gelu(gate))
    same(block(values), expected)
    same(block(values, first=True), expected[:, :1])


def test_sinusoids_of_places_are_those_of_the_paper() -> None:
    width, values = 6, torch.randn(2, 50, 6, dtype=torch.float64)
    found = Sinusoidal(width)(values) - values * math.sqrt(width)
    for place in (0, 1, 7, 49):
        angles = [place / 10_000 ** (2 * pair / width) for pair in range(3)]
        expected = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)
        torch.testing.assert_close(found[1, place], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("model", TRANSFORMERS[:4])
def test_a_transformer_knows_the_order_of_words(model: Model) -> None:
    first, second = network(model, text())({"text": ids([1, 2, 3, 4], [4, 2, 3, 1])})
    assert (first - second).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [TextTransformer(width=16, depth=1), TextTransformer(width=16, depth=1, pooling="first")],
)
def test_a_transformer_learns_what_a_bag_of_words_cannot_know(model: Model) -> None:
    """Which of two words comes first, among others, in texts of many lengths."""
    generator = np.random.default_rng(0)
    texts = [generator.permutation([1, 2, *generator.integers(3, 20, generator.integers(0, 7))]).tolist() for _ in range(400)]
    labels = torch.tensor([one.index(1) < one.index(2) for one in texts]).long()
    rows = {"text": ids(*texts)}
    assert fitted(network(model, text()), rows, labels, steps=150) > 0.97
    assert fitted(network(TextBag(embedding=16), text()), rows, labels, steps=150) < 0.7


def test_residual_ends_of_zero_make_blocks_pass_on_what_they_get() -> None:
    def weights(zero: bool) -> dict[str, torch.Tensor]:
        return dict(network(TextTransformer(zero_residual_ends=zero), text()).named_parameters())

    usual, zero = weights(False), weights(True)
    ends = [name for name in usual if name.endswith("end.weight")]
    assert len(ends) == 4
    assert all(zero[name].abs().max() == 0 and usual[name].abs().max() > 0 for name in ends)
    assert all(torch.equal(usual[name], zero[name]) for name in usual if name not in ends)


def test_embeddings_of_tokens_and_places_start_small() -> None:
    net = network(TextTransformer(init="normal"), text(tokens=3000, length=500))
    tables = [layer.weight for layer in net.modules() if isinstance(layer, nn.Embedding)]
    assert [len(table) for table in tables] == [3000, 500]
    assert all(abs(float(table.detach().std()) / EMBEDDING_STD - 1) < 0.05 for table in tables)


def test_channel_dropout_takes_the_same_numbers_out_of_all_tokens() -> None:
    torch.manual_seed(0)
    bag = TextBag(embedding=40, dropout=0.5, dropout_kind="channel", pooling="max").encoder(signature(text())).train()
    with torch.no_grad():
        next(bag.parameters()).fill_(1.0)
        found = bag({"text": ids([1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2])})
    assert set(found.flatten().tolist()) == {0.0, 2.0}  # with ordinary dropout some token would have kept nearly every number
    assert 5 < (found[0] == 0).sum() < 35 and not torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"width": 10}, "heads: 4 heads cannot share out a width of 10: make width a multiple of heads"),
        ({"heads": 0}, "heads"),
        ({"depth": 0}, "depth"),
        ({"norm": "batch"}, "norm"),
        ({"pooling": "max"}, "pooling"),
        ({"positions": "none"}, "positions"),
    ],
)
def test_a_transformer_of_nonsense_is_refused(given: dict[str, object], says: str) -> None:
    with pytest.raises(DloptError, match=says):
        TextTransformer.model_validate(given)
