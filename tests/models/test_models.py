"""Networks: sizes from the signature, the same weights for the same seed, and preprocessing as their first layers."""

from __future__ import annotations

import io
import warnings
from collections import Counter

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from dlopt.models import Cnn, Mlp, Model, Network, TextBag, TextCnn, build_network
from dlopt.models.layers import EMBEDDING_STD
from dlopt.models.noise import Dropout
from dlopt.models.rows import Bag, Convolutions, hashed
from dlopt.part import DloptError, Feature, Signature, Statistics, Target

TARGET = Target(name="label", labels=tuple(range(10)))


def image(height: int = 28, width: int = 28, channels: int = 1, name: str = "image") -> Feature:
    return Feature(name=name, kind="image", dtype="uint8", shape=(height, width, channels), columns=(name,))


def numbers(*columns: str, name: str = "numbers") -> Feature:
    return Feature(name=name, kind="number", dtype="float32", shape=(len(columns),), columns=columns)


def categories(*codes: int, name: str = "categories") -> Feature:
    """Columns with so many codes each, the unknown one included."""
    vocabularies = tuple(tuple(f"{index}" for index in range(size - 1)) for size in codes)
    columns = tuple(f"{name}{index}" for index in range(len(codes)))
    return Feature(name=name, kind="category", dtype="string", shape=(len(codes),), columns=columns, vocabularies=vocabularies)


def text(tokens: int = 50, length: int = 12, name: str = "text") -> Feature:
    return Feature(name=name, kind="text", dtype="int32", shape=(length,), columns=(name,), tokens=tokens)


def ids(*rows: list[int], length: int = 12) -> Tensor:
    """Token ids, filled up with 0."""
    return torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.int32)


def statistics(fill: list[float], shift: list[float], scale: list[float]) -> Statistics:
    zeros = (0.0,) * len(fill)
    return Statistics(
        count=1,
        missing=(0,) * len(fill),
        min=zeros,
        max=zeros,
        mean=zeros,
        std=zeros,
        fill=tuple(fill),
        shift=tuple(shift),
        scale=tuple(scale),
    )


def signature(*features: Feature) -> Signature:
    return Signature(inputs=features, target=TARGET)


def plain(found: Signature) -> dict[str, Statistics]:
    sizes = {feature.name: feature.shape[-1] for feature in found.inputs if feature.kind in ("image", "number")}
    return {name: statistics([0.0] * size, [0.0] * size, [1 / 255] * size) for name, size in sizes.items()}


def network(model: Model, *features: Feature, seed: int = 1, dtype: torch.dtype = torch.float32) -> Network:
    found = signature(*features)
    return build_network(model, found, plain(found), seed, dtype).eval()


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_default_mlp_on_mnist_is_the_tutorials_network() -> None:
    built = network(Mlp(), image())
    assert parameters(built) == 101_770
    layers = [*built.body.encoder.hidden1, built.body.head]
    assert [type(layer).__name__ for layer in layers] == ["Linear", "ReLU", "Dropout", "Linear"]
    assert layers[2].p == 0.2
    assert built({"image": torch.zeros(5, 28, 28, 1, dtype=torch.uint8)}).shape == (5, 10)


def test_an_mlp_takes_all_inputs_side_by_side_in_the_order_of_the_signature() -> None:
    built = network(Mlp(hidden=()), image(2, 3, 3), numbers("a", "b"))
    assert parameters(built) == (2 * 3 * 3 + 2) * 10 + 10
    values = {"numbers": torch.tensor([[255.0, 510.0]]), "image": torch.arange(18, dtype=torch.uint8).reshape(1, 2, 3, 3)}
    flat = torch.cat([values["image"].permute(0, 3, 1, 2).flatten(1).float(), values["numbers"]], dim=1) / 255
    expected = flat @ built.body.head.weight.T
    torch.testing.assert_close(built(values), expected)


def test_hidden_layers_are_as_many_and_as_wide_as_the_job_says() -> None:
    built = network(Mlp(hidden=(7, 5), activation="tanh", dropout=0.5), image(4, 4))
    sizes = [(layer.in_features, layer.out_features) for layer in built.body.modules() if isinstance(layer, torch.nn.Linear)]
    assert sizes == [(16, 7), (7, 5), (5, 10)]
    assert [layer.p for layer in built.body.modules() if isinstance(layer, Dropout)] == [0.5, 0.5]


MIXED = (image(2, 2, 3), numbers("a", "b"), categories(5, 3, 40), text(), text(tokens=9, length=4, name="title"))
TEXT_MODELS = [
    TextBag(),
    TextBag(ngrams=3, buckets=31, pooling="mean_max", hidden=(7,)),
    TextBag(ngrams=2, pooling="max"),
    TextCnn(channels=6),
    TextCnn(channels=5, sizes=(1, 7), hidden=(4,), activation="tanh"),
]
TAKE_ALL = [Mlp(), *TEXT_MODELS]


def mixed_rows(rows: int, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Random rows of MIXED; texts of every length from none to `length`."""
    draw = torch.manual_seed(seed)
    words, titles = (torch.randint(1, most, (rows, size), dtype=torch.int32, generator=draw) for most, size in ((50, length), (9, 4)))
    ends = torch.arange(rows) % (length + 1)
    return {
        "image": torch.randint(0, 256, (rows, 2, 2, 3), dtype=torch.uint8, generator=draw),
        "numbers": torch.randn(rows, 2, generator=draw),
        "categories": torch.stack([torch.randint(0, most, (rows,), dtype=torch.int32, generator=draw) for most in (5, 3, 40)], dim=1),
        "text": words * (torch.arange(length) < ends[:, None]),
        "title": titles * (torch.arange(4) < ends[:, None] % 5),
    }


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_an_mlp_takes_any_mix_of_inputs() -> None:
    built = network(Mlp(hidden=(), embedding=6), *MIXED)
    widths = [round(1.6 * size**0.56) for size in (5, 3, 40)]
    assert widths == [4, 3, 13]
    values = 12 + 2 + sum(widths) + 6 + 6
    tables = 5 * 4 + 3 * 3 + 40 * 13 + 50 * 6 + 9 * 6
    assert parameters(built) == values * 10 + 10 + tables
    rows = mixed_rows(30)
    layers = built.body.encoder.rows.layers
    by_hand = [
        rows["image"].permute(0, 3, 1, 2).flatten(1) / 255,
        rows["numbers"] / 255,
        *(table.weight[rows["categories"][:, index]] for index, table in enumerate(layers[2].tables)),
        *(
            torch.stack([table.weight[row[row != 0]].sum(0) / max(1, int((row != 0).sum())) for row in rows[name]])
            for name, table in (("text", layers[3].tokens), ("title", layers[4].tokens))
        ),
    ]
    same(built.body.encoder.rows(built.preprocess(rows)), torch.cat(by_hand, dim=1))
    assert built(rows).shape == (30, 10)


def test_the_embedding_of_a_category_grows_with_its_values_up_to_a_limit() -> None:
    built = network(Mlp(), categories(2, 3, 100, 10_000))
    assert [table.embedding_dim for table in built.body.encoder.rows.layers[0].tables] == [2, 3, 21, 64]


def test_hashed_categories_have_an_embedding_for_every_bucket() -> None:
    hashes = Feature(name="hashes", kind="category", dtype="int32", shape=(2,), columns=("a", "b"), buckets=7)
    tables = network(Mlp(), hashes).body.encoder.rows.layers[0].tables
    assert [tuple(table.weight.shape) for table in tables] == [(7, 5), (7, 5)]


@pytest.mark.parametrize("init", ["xavier_uniform", "normal", "kaiming_normal"])
def test_embeddings_start_small_whatever_rule_is_named_for_the_weights(init: str) -> None:
    for built in (network(Mlp(init=init), *MIXED), network(TextBag(init=init, ngrams=2), text(tokens=5000))):
        tables = [table.weight.detach() for table in built.modules() if isinstance(table, nn.Embedding)]
        drawn = torch.cat([table.flatten() for table in tables])
        assert len(tables) > 1 and abs(float(drawn.std()) - EMBEDDING_STD) < 0.05 * EMBEDDING_STD
        assert abs(float(drawn.mean())) < 0.05 * EMBEDDING_STD
    assert float(network(Mlp(init="normal"), *MIXED).body.encoder.hidden1.linear.weight.detach().std()) > 0.9


@pytest.mark.parametrize("model", TAKE_ALL)
def test_the_length_of_the_padding_changes_nothing(model: Model) -> None:
    built = network(model, text())
    texts = [[], [3], [4, 4], [7, 1, 9], [5, 6, 7, 8, 9, 10, 11]]
    whole = built({"text": ids(*texts)})
    same(built({"text": ids(*texts, length=7)}), whole)
    same(built({"text": ids(*texts, length=40)}), whole)
    for index, one in enumerate(texts):  # alone, without any padding
        same(built({"text": ids(one, length=len(one))}), whole[index : index + 1])
    assert (whole[1:] - whole[:1]).abs().max(dim=1).values.min() > 1e-3


@pytest.mark.parametrize("model", TAKE_ALL)
def test_no_embedding_of_padding_reaches_the_output(model: Model) -> None:
    built = network(model, text())
    texts = ids([], [3], [7, 1, 9])
    before = built({"text": texts})
    with torch.no_grad():
        for name, table in built.named_parameters():
            if name.endswith("tokens.weight"):
                table[0] = 1e3  # as the noise of private training would change it
    same(built({"text": texts}), before)


@pytest.mark.parametrize("model", TAKE_ALL)
def test_no_rows_at_all_give_no_outputs(model: Model) -> None:
    built = network(model, *MIXED)
    assert built({name: values[:0] for name, values in mixed_rows(3).items()}).shape == (0, 10)


def test_the_mean_forgets_the_order_of_words_and_bigrams_know_it() -> None:
    texts = {"text": ids([1, 2, 3], [3, 2, 1])}
    first, second = network(TextBag(), text())(texts)
    same(first, second)
    first, second = network(TextBag(ngrams=2), text())(texts)
    assert (first - second).abs().max() > 1e-3


def test_a_bag_is_the_mean_and_the_maximum_of_the_embeddings_of_tokens_and_of_their_hashed_ngrams() -> None:
    torch.manual_seed(0)
    bag = Bag(tokens=20, width=3, pooling="mean_max", ngrams=3, buckets=5).eval()

    def bucket(*gram: int) -> int:
        value = gram[0]
        for token in gram[1:]:
            value = (value * 1_000_003 + token) % (2**31 - 1)
        return value % 5

    found = bag(ids([4, 9, 2, 9], [8], []))
    words = [bag.tokens.weight[token] for token in (4, 9, 2, 9)]
    twos = [bag.ngrams[0].weight[bucket(*gram)] for gram in ((4, 9), (9, 2), (2, 9))]
    threes = [bag.ngrams[1].weight[bucket(*gram)] for gram in ((4, 9, 2), (9, 2, 9))]
    every = torch.stack([*words, *twos, *threes])
    same(found[0], torch.cat([every.mean(0), every.max(0).values]))
    same(found[1], bag.tokens.weight[8].repeat(2))
    same(found[2], torch.zeros(6))


def test_hashes_of_ngrams_stay_in_range_and_spread_evenly() -> None:
    """Of the largest ids: a product that left 64 bits would be another number in another runtime, and below zero."""
    largest = torch.full((1, 5), 2**31 - 1, dtype=torch.int32)
    value = 2**31 - 1
    for _ in range(2):
        value = (value * 1_000_003 + 2**31 - 1) % (2**31 - 1)
    assert int(hashed(largest, 3)[0, 0]) == value
    pairs = torch.cartesian_prod(torch.arange(1, 201), torch.arange(1, 201)).int()
    counts = Counter((hashed(pairs, 2)[:, 0] % 1024).tolist())
    assert len(counts) == 1024 and max(counts.values()) < 3 * 40_000 / 1024


def test_a_text_cnn_is_the_maximum_over_windows_that_begin_in_the_text() -> None:
    torch.manual_seed(0)
    layer = Convolutions(tokens=20, embedding=4, channels=3, sizes=(2, 3), activation=nn.Tanh(), dropout=0.0).eval()
    found = layer(ids([4, 9, 2], []))
    values = torch.cat([layer.tokens.weight[[4, 9, 2]], torch.zeros(2, 4)])
    by_hand = []
    for size, convolution in zip((2, 3), layer.convolutions, strict=True):
        windows = torch.stack([values[start : start + size].T for start in range(3)])
        by_hand.append((torch.einsum("nds,ods->no", windows, convolution.weight) + convolution.bias).max(0).values)
    same(found[0], torch.cat(by_hand).tanh())
    same(found[1], torch.zeros(6))
    assert layer.width == 6


@pytest.mark.parametrize("model", [TextBag(), TextCnn()])
def test_a_text_model_says_that_it_needs_a_text_and_takes_other_inputs_beside_it(model: Model) -> None:
    with pytest.raises(DloptError, match=rf"^model: {model.kind} takes at least one text: use kind: mlp for other inputs$"):
        model.build(signature(numbers("a"), categories(3)))
    rows = mixed_rows(20)
    built = network(model, *MIXED)
    before = built(rows)
    for name in ("numbers", "categories", "text", "title"):
        other = rows | {name: rows[name].flip(0)}
        assert (built(other) - before).abs().max() > 1e-4, name


@pytest.mark.parametrize("model", TAKE_ALL)
def test_a_step_of_training_reaches_every_weight_of_a_text_model(model: Model) -> None:
    built = network(model, text(tokens=13)).train()
    texts = torch.randint(1, 13, (64, 12), dtype=torch.int32, generator=torch.manual_seed(0))
    torch.manual_seed(1)
    nn.functional.cross_entropy(built({"text": texts}), torch.arange(64) % 10).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in built.parameters())


class Positional(nn.Module):
    """Tensors in the order of MIXED, as an exported graph takes them."""

    def __init__(self, built: Network) -> None:
        super().__init__()
        self.built = built

    def forward(self, *inputs: Tensor) -> Tensor:
        outputs: Tensor = self.built(dict(zip((feature.name for feature in MIXED), inputs, strict=True)))
        return outputs


def exported(built: Network) -> onnxruntime.InferenceSession:
    """The graph of a network on MIXED, with any number of rows and any length of texts."""
    file, names = io.BytesIO(), [feature.name for feature in MIXED]
    lengths = {name: {0: "rows"} | ({1: f"{name}_length"} if name in ("text", "title") else {}) for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Positional(built).eval(),
            tuple(mixed_rows(2).values()),
            file,
            input_names=names,
            output_names=["outputs"],
            dynamic_axes=lengths | {"outputs": {0: "rows"}},
            opset_version=18,
            dynamo=False,
        )
    return onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("model", TAKE_ALL)
def test_the_onnx_graph_equals_torch_at_any_number_of_rows_and_length_of_texts(model: Model) -> None:
    built = network(model, *MIXED)
    session = exported(built)
    for rows, length in ((1, 12), (37, 12), (5, 1), (3, 0), (50, 33)):
        inputs = mixed_rows(rows, length)
        (found,) = session.run(None, {name: values.numpy() for name, values in inputs.items()})
        same(torch.from_numpy(found), built(inputs).detach())


@pytest.mark.parametrize("model", TAKE_ALL)
def test_models_of_texts_compute_in_float64_too(model: Model) -> None:
    single, double = network(model, *MIXED), network(model, *MIXED, dtype=torch.float64)
    rows = mixed_rows(20)
    found = double(rows)
    assert found.dtype == torch.float64
    assert 0 < (found - single(rows)).abs().max() < 1e-4


@pytest.mark.parametrize("model", [Mlp(), Cnn()])
def test_a_seed_gives_the_same_weights_whatever_was_drawn_before_and_leaves_the_generator_alone(model: Mlp | Cnn) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = network(model, image())
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1000)
    second, other = network(model, image()), network(model, image(), seed=2)
    weights = [dict(built.named_parameters()) for built in (first, second, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in weights[0] if name.endswith("weight"))


@pytest.mark.parametrize("model", TAKE_ALL)
def test_a_seed_gives_the_same_embeddings_too(model: Model) -> None:
    first, second, other = (dict(network(model, *MIXED, seed=seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if name.endswith("weight"))


def test_float64_has_the_weights_of_float32_and_computes_in_its_own_precision() -> None:
    single, double = network(Mlp(), image()), network(Mlp(), image(), dtype=torch.float64)
    assert {value.dtype for value in double.state_dict().values()} == {torch.float64}
    for name, parameter in single.named_parameters():
        assert torch.equal(parameter.double(), double.get_parameter(name))
    inputs = {"image": torch.randint(0, 256, (8, 28, 28, 1), dtype=torch.uint8, generator=torch.manual_seed(0))}
    found = double(inputs)
    assert found.dtype == torch.float64
    assert 0 < (found - single(inputs)).abs().max() < 1e-4


def test_a_missing_number_is_filled_and_then_scaled_as_every_other() -> None:
    found = signature(numbers("a", "b"))
    fitted = {"numbers": statistics([3.0, -1.0], [2.0, 0.0], [10.0, 0.5])}
    scaled = build_network(Mlp(hidden=()), found, fitted, 0).preprocess({"numbers": torch.tensor([[np.nan, 4.0], [5.0, np.nan]])})
    torch.testing.assert_close(scaled["numbers"], torch.tensor([[(3 - 2) * 10.0, 4 * 0.5], [(5 - 2) * 10.0, -0.5]]))


def test_images_are_scaled_by_channel_and_become_channels_first() -> None:
    found = signature(image(2, 2, 3))
    fitted = {"image": statistics([0, 0, 0], [1.0, 2.0, 3.0], [1.0, 10.0, 100.0])}
    pixels = torch.randint(0, 256, (4, 2, 2, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    scaled = build_network(Mlp(), found, fitted, 0, torch.float64).preprocess({"image": pixels})["image"]
    assert scaled.shape == (4, 3, 2, 2)
    expected = (pixels.double() - torch.tensor([1.0, 2.0, 3.0])) * torch.tensor([1.0, 10.0, 100.0])
    torch.testing.assert_close(scaled, expected.permute(0, 3, 1, 2), check_dtype=False)


@pytest.mark.parametrize("name", ["petal.length", "items", "type", "a b", "ä", "training"])
def test_an_input_may_have_any_name(name: str) -> None:
    built = network(Mlp(), image(4, 4, name=name))
    assert built({name: torch.zeros(2, 4, 4, 1, dtype=torch.uint8)}).shape == (2, 10)


def test_the_state_has_preprocessing_too() -> None:
    names = set(network(Mlp(hidden=()), image(2, 2)).state_dict())
    assert names == {"preprocess.scale.0.shift", "preprocess.scale.0.factor", "body.head.weight", "body.head.bias"}


def test_a_cnn_halves_the_image_with_every_block() -> None:
    built = network(Cnn(channels=(4, 8), hidden=16), image(9, 13, 3))
    # the convolutions, then 2x3 pixels of 8 channels
    assert parameters(built) == (3 * 9 * 4 + 4) + (4 * 9 * 8 + 8) + (8 * 2 * 3 * 16 + 16) + (16 * 10 + 10)
    assert built({"image": torch.zeros(5, 9, 13, 3, dtype=torch.uint8)}).shape == (5, 10)
    assert built({"image": torch.zeros(0, 9, 13, 3, dtype=torch.uint8)}).shape == (0, 10)


def test_a_cnn_says_what_it_cannot_take() -> None:
    with pytest.raises(DloptError, match=r"^model: cnn takes exactly one input, an image: use kind: mlp or joint for other inputs$"):
        Cnn().build(signature(numbers("a")))
    with pytest.raises(DloptError, match="exactly one input"):
        Cnn().build(signature(image(), numbers("a")))
    with pytest.raises(DloptError, match=r"^model.channels: 3 blocks halve 7x28 to nothing: at most 2$"):
        Cnn(channels=(1, 1, 1)).build(signature(image(7, 28)))
    Cnn(channels=(1, 1)).build(signature(image(7, 28)))


@pytest.mark.parametrize("given", [{"hidden": [0]}, {"dropout": 1.0}, {"activation": "swish"}, {"init": "ones"}, {"hidden": "12"}])
def test_an_mlp_of_nonsense_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(DloptError):
        Mlp.model_validate(given)


@pytest.mark.parametrize("given", [{"channels": []}, {"channels": [16, 0]}, {"hidden": 0}])
def test_a_cnn_of_nonsense_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(DloptError):
        Cnn.model_validate(given)


@pytest.mark.parametrize("given", [{"ngrams": 0}, {"ngrams": 6}, {"buckets": 0}, {"pooling": "sum"}, {"embedding": 0}, {"dropout": 1.0}])
def test_a_text_bag_of_nonsense_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(DloptError):
        TextBag.model_validate(given)


@pytest.mark.parametrize("given", [{"sizes": []}, {"sizes": [0]}, {"channels": 0}, {"embedding": 0}, {"hidden": [0]}])
def test_a_text_cnn_of_nonsense_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(DloptError):
        TextCnn.model_validate(given)
