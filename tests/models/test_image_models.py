"""Models of images, and what makes perceptrons deep: sizes by hand, the graph in ONNX, gradients, depth."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from dlopt.models import Cnn, Linear, Mlp, Model, Network, Resnet, Vit
from dlopt.models.depth import Residual, StochasticDepth, rising
from dlopt.models.norms import BatchNorm
from dlopt.models.resnet import StridedConv2d
from dlopt.part import DloptError, Feature, Signature, Target
from tests.models.test_models import MIXED, image, mixed_rows, network, numbers, parameters, signature

SMALL = image(17, 13, 3)
EVEN = image(12, 8, 3)
RESNETS = [
    Resnet(blocks=(1, 2), widths=(8, 12), stochastic_depth=0.3),
    Resnet(stem="large", blocks=(1, 1), widths=(8, 8), norm="group", activation="silu", dropout=0.3, dropout_kind="gaussian"),
    Resnet(block="bottleneck", blocks=(1, 2), widths=(16, 32), norm="layer", activation="gelu", residual_scale=0.2),
    Resnet(blocks=(2, 1), widths=(8, 8), norm="none", residual_scale=0.1, init="orthogonal"),
    Resnet(blocks=(1, 1), widths=(8, 16), norm="rms", activation="swiglu"),
]
VITS = [
    Vit(width=16, depth=2, stochastic_depth=0.2),
    Vit(patch=2, width=12, depth=2, heads=3, pooling="class_token", norm="rms", activation="geglu", dropout=0.1, dropout_kind="channel"),
    Vit(width=8, depth=1, heads=1, zero_residual_ends=True),
]
CNNS = [
    Cnn(channels=(4, 6), hidden=12, norm="batch", block_dropout=0.2, dropout_kind="channel"),
    Cnn(channels=(4,), hidden=12, norm="group", activation="glu"),
    Cnn(channels=(4, 6), hidden=8, norm="layer", activation="mish", dropout_kind="alpha"),
]
MLPS = [
    Mlp(hidden=(16, 16, 16), residual=True, norm="batch"),
    Mlp(hidden=(16, 16), residual=True, residual_scale=None, norm="layer", activation="swiglu"),
    Mlp(hidden=(16, 8), norm="rms", dropout_kind="alpha", activation="selu", init="lecun_normal"),
    Linear(),
    Linear(dropout=0.2, dropout_kind="gaussian"),
]
ALL: list[tuple[Model, Feature]] = [(model, SMALL) for model in (*RESNETS, *CNNS, *MLPS)] + [(model, EVEN) for model in VITS]
EVERY = pytest.mark.parametrize(("model", "feature"), ALL, ids=lambda value: getattr(value, "kind", ""))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pixels(feature: Feature, rows: int, seed: int = 0) -> dict[str, Tensor]:
    return {feature.name: torch.randint(0, 256, (rows, *feature.shape), dtype=torch.uint8, generator=torch.manual_seed(seed))}


def stirred(built: Network, feature: Feature) -> Network:
    """The network after three steps of training, so that nothing is as it started: running statistics, ends of branches."""
    built.train()
    torch.manual_seed(2)
    optimizer = torch.optim.Adam(built.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(built(pixels(feature, 20, step)), torch.arange(20) % 10).backward()
        optimizer.step()
    return built.eval()


def test_resnets_of_the_paper_have_as_many_weights_as_torchvision_says() -> None:
    """Its documentation: resnet18 11,689,512, resnet34 21,797,672, resnet50 25,557,032."""
    widths = (64, 128, 256, 512)
    wide = (256, 512, 1024, 2048)
    found = Signature(inputs=(image(224, 224, 3),), target=Target(name="label", labels=tuple(range(1000))))
    models = [
        Resnet(stem="large", blocks=(2, 2, 2, 2), widths=widths),
        Resnet(stem="large", blocks=(3, 4, 6, 3), widths=widths),
        Resnet(stem="large", block="bottleneck", blocks=(3, 4, 6, 3), widths=wide),
    ]
    with torch.device("meta"):
        assert [parameters(model.build(found)) for model in models] == [11_689_512, 21_797_672, 25_557_032]


def test_the_default_resnet_counts_as_by_hand() -> None:
    def convolution(before: int, after: int, size: int = 3) -> int:
        return before * after * size**2 + 2 * after  # and the norm's weight and bias

    first = convolution(3, 16) + 4 * convolution(16, 16)
    second = convolution(16, 32) + 3 * convolution(32, 32) + convolution(16, 32, 1)
    third = convolution(32, 64) + 3 * convolution(64, 64) + convolution(32, 64, 1)
    assert parameters(network(Resnet(), SMALL)) == first + second + third + 64 * 10 + 10


@pytest.mark.parametrize(("stem", "sizes"), [("small", [(39, 21), (20, 11), (10, 6)]), ("large", [(10, 6), (5, 3), (3, 2)])])
def test_a_resnet_halves_the_image_at_each_stage_but_the_first_and_a_large_stem_quarters_it(
    stem: str, sizes: list[tuple[int, int]]
) -> None:
    feature = image(39, 21, 3)
    built = network(Resnet(stem=stem, blocks=(1, 1, 1), widths=(4, 8, 12)), feature)
    values = built.body.encoder.stem(built.preprocess(pixels(feature, 2))["image"])
    for number, (size, width) in enumerate(zip(sizes, (4, 8, 12), strict=True), start=1):
        values = built.body.encoder.get_submodule(f"stage{number}")(values)
        assert values.shape == (2, width, *size)
    torch.testing.assert_close(built.body.head(values.mean((2, 3))), built(pixels(feature, 2)))


def test_a_basic_block_is_the_papers() -> None:
    """relu(x + norm(conv(relu(norm(conv(x)))))), and a convolution of 1x1 with its norm where x has another shape."""
    built = stirred(network(Resnet(blocks=(1, 1), widths=(4, 8)), SMALL), SMALL).double()
    same, halving = built.body.encoder.stage1[0], built.body.encoder.stage2[0]

    def part(layers: nn.Sequential, values: Tensor, stride: int = 1) -> Tensor:
        weight, by = layers.convolution.weight, layers.norm
        values = nn.functional.conv2d(values, weight, stride=stride, padding=weight.shape[-1] // 2)
        centred = (values - by.running_mean[:, None, None]) / (by.running_var + 1e-5).sqrt()[:, None, None]
        return centred * by.weight[:, None, None] + by.bias[:, None, None]

    values = torch.randn(3, 4, 6, 6, dtype=torch.float64, generator=torch.manual_seed(0))
    first, _, second = same.residual.branch
    expected = (values + part(second, part(first, values).relu())).relu()
    torch.testing.assert_close(same(values), expected)
    first, _, second = halving.residual.branch
    expected = (part(halving.residual.shortcut, values, 2) + part(second, part(first, values, 2).relu())).relu()
    torch.testing.assert_close(halving(values), expected)


@pytest.mark.parametrize("by", ["batch", "none", "layer", "rms"])
def test_branches_whose_ends_start_at_zero_add_nothing_at_first(by: str) -> None:
    model = Resnet(blocks=(2,), widths=(8,), norm=by)
    values = torch.rand(2, 8, 5, 5, generator=torch.manual_seed(0))
    stage = network(model, SMALL).body.encoder.stage1
    assert torch.equal(stage(values), values)
    without = network(model.model_copy(update={"zero_residual_ends": False}), SMALL).body.encoder.stage1
    assert (without(values) - values).abs().mean() > 0.1


@pytest.mark.parametrize(
    ("model", "smallest", "says"),
    [
        (Resnet(), 4, "3 stages after a small stem shrink 3x9 by 4 to less than a pixel: use fewer stages"),
        (Resnet(stem="large"), 16, "3 stages after a large stem shrink 15x45 by 16 to less than a pixel: use fewer stages or stem: small"),
    ],
)
def test_a_resnet_takes_images_of_any_size_that_leaves_a_pixel(model: Resnet, smallest: int, says: str) -> None:
    for size in (smallest, smallest + 1, 3 * smallest + 2):
        assert network(model, image(size, smallest))(pixels(image(size, smallest), 2)).shape == (2, 10)
    with pytest.raises(DloptError) as caught:
        model.build(signature(image(smallest - 1, 3 * (smallest - 1))))
    assert str(caught.value) == f"model.blocks: {says}"


@pytest.mark.parametrize("model", [Cnn(), Resnet(), Vit()], ids=lambda model: model.kind)
def test_models_of_images_say_that_they_take_one_image(model: Model) -> None:
    for features in ((numbers("a"),), (image(), numbers("a")), (image(), image(name="other"))):
        with pytest.raises(DloptError, match=rf"^model: {model.kind} takes exactly one input, an image: use kind: mlp or joint for other"):
            model.build(signature(*features))


def test_a_vit_says_which_patches_fill_the_image() -> None:
    with pytest.raises(DloptError, match=r"^model\.patch: patches of 5x5 do not fill 12x8: use one of 1, 2, 4$"):
        Vit(patch=5).build(signature(EVEN))


@pytest.mark.parametrize(
    "given",
    [{"blocks": [1, 2]}, {"blocks": []}, {"block": "bottleneck", "widths": [16, 32, 66]}, {"stem": "medium"}, {"stochastic_depth": 1.0}],
)
def test_a_resnet_of_nonsense_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(DloptError):
        Resnet.model_validate(given)


def test_a_vit_whose_heads_cannot_share_out_its_width_is_refused() -> None:
    with pytest.raises(DloptError, match="3 heads cannot share out a width of 64"):
        Vit(heads=3)


def test_a_vit_has_no_order_of_patches_but_that_of_their_positions() -> None:
    built = network(Vit(patch=4, width=16, depth=2), EVEN).double()
    given = pixels(EVEN, 3)
    moved = {"image": given["image"].roll(4, dims=1)}  # by a patch
    assert (built(given) - built(moved)).abs().max() > 1e-4
    with torch.no_grad():
        built.body.encoder.tokens.positions.zero_()
    torch.testing.assert_close(built(given), built(moved), rtol=0, atol=1e-12)
    inside = {"image": given["image"].roll(1, dims=1)}
    assert (built(given) - built(inside)).abs().max() > 1e-4


def test_the_patches_of_a_vit_are_squares_of_the_image() -> None:
    built = network(Vit(patch=4, width=16), EVEN)
    patches = built.body.encoder.patches
    values = built.preprocess(pixels(EVEN, 2))["image"]
    tokens = built.body.encoder.tokens(patches(values))
    assert tokens.shape == (2, 3 * 2, 16)
    square = values[:, :, 8:12, 4:8].flatten(1)  # the last one
    expected = square @ patches.weight.flatten(1).T + patches.bias + built.body.encoder.tokens.positions[-1]
    torch.testing.assert_close(tokens[:, -1], expected)


def test_a_class_token_sees_every_patch_and_is_a_token_more() -> None:
    built = network(Vit(patch=4, width=16, depth=1, pooling="class_token"), EVEN)
    mean = network(Vit(patch=4, width=16, depth=1), EVEN)
    assert parameters(built) == parameters(mean) + 16
    given = pixels(EVEN, 1)
    before = built(given)
    for down in range(0, 12, 4):
        for across in range(0, 8, 4):
            other = given["image"].clone()
            other[:, down : down + 4, across : across + 4] = 255 - other[:, down : down + 4, across : across + 4]
            assert (built({"image": other}) - before).abs().max() > 1e-5


def test_stochastic_depth_leaves_out_whole_rows_as_often_as_it_says_and_keeps_the_mean() -> None:
    layer, values = StochasticDepth(0.3), torch.ones(20_000, 2, 3)
    torch.manual_seed(0)
    found = layer(values)
    rows = found[:, 0, 0]
    assert torch.equal(found, rows[:, None, None].expand(-1, 2, 3))
    assert set(rows.tolist()) == {0.0, float(torch.tensor(1.0) / (1 - 0.3))}
    assert abs(float((rows == 0).float().mean()) - 0.3) < 0.01  # three deviations
    assert abs(float(rows.mean()) - 1) < 0.015
    assert layer.eval()(values) is values


def test_blocks_are_left_out_linearly_more_often_with_depth() -> None:
    assert rising(0.4, 4) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    for model in (Resnet(blocks=(1, 2), widths=(4, 8), stochastic_depth=0.6), Vit(depth=3, width=8, heads=2, stochastic_depth=0.6)):
        built = network(model, EVEN)
        found = [layer.p for layer in built.modules() if isinstance(layer, StochasticDepth)]
        assert found[:: len(found) // 3] == pytest.approx([0.2, 0.4, 0.6]), model.kind  # of a transformer's block, two branches


def test_a_row_whose_branch_is_left_out_is_what_the_shortcut_gives() -> None:
    layer, values = Residual(nn.Linear(3, 3), scale=0.5, leave_out=0.5), torch.randn(200, 3, generator=torch.manual_seed(0))
    torch.manual_seed(1)
    added = layer(values) - values
    kept = added.abs().amax(1) > 1e-6
    assert 60 < int(kept.sum()) < 140
    torch.testing.assert_close(added[kept], layer.branch(values[kept]) * 0.5 / 0.5)
    torch.testing.assert_close(layer.eval()(values), values + 0.5 * layer.branch(values))


def test_residual_layers_add_where_the_widths_agree() -> None:
    built = network(Mlp(hidden=(12, 12, 5, 5), residual=True, residual_scale=None, activation="tanh"), image(2, 2, 3))
    layers = built.body.encoder
    assert [isinstance(layers.get_submodule(f"hidden{number}"), Residual) for number in range(1, 5)] == [True, True, False, True]
    values = pixels(image(2, 2, 3), 4)
    found = values["image"].permute(0, 3, 1, 2).flatten(1) / 255
    for layer in (layers.hidden1.branch.linear, layers.hidden2.branch.linear):
        found = found + torch.tanh(layer(found))
    found = torch.tanh(layers.hidden3.linear(found))
    found = found + torch.tanh(layers.hidden4.branch.linear(found))
    torch.testing.assert_close(built(values), built.body.head(found))


def test_norms_come_between_the_weights_and_the_activation_and_stand_in_for_the_bias() -> None:
    hidden = network(Mlp(norm="batch"), SMALL).body.encoder.hidden1
    assert [type(layer).__name__ for layer in hidden] == ["Linear", "BatchNorm", "ReLU", "Dropout"]
    assert hidden.linear.bias is None
    assert network(Mlp(norm="rms"), SMALL).body.encoder.hidden1.linear.bias is not None  # it has none of its own
    block = network(Cnn(norm="batch", channels=(4,), block_dropout=0.3, dropout_kind="channel"), SMALL).body.encoder.block1
    assert [type(layer).__name__ for layer in block] == ["Conv2d", "MaxPool2d", "BatchNorm", "ReLU", "Dropout"] and block.dropout.channels
    assert block.convolution.bias is None


def deep(**settings: object) -> tuple[float, float]:
    """20 layers of 64 units on ten clouds of points: gradient of the first layer over that of the last, and the loss after 60 steps."""
    torch.manual_seed(0)
    centres = torch.randn(10, 20)
    wanted = torch.arange(200) % 10
    rows = {"numbers": (centres[wanted] + 0.3 * torch.randn(200, 20)) * 255}  # which the tests' preprocessing divides by
    built = network(Mlp(hidden=(64,) * 20, dropout=0.0, **settings), numbers(*(f"{index}" for index in range(20)))).train()
    weights = [parameter for parameter in built.body.encoder.parameters() if parameter.dim() > 1]
    optimizer = torch.optim.Adam(built.parameters(), lr=1e-3)
    ratio = 0.0
    for step in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(built(rows), wanted)
        loss.backward()
        ratio = ratio if step else float(weights[0].grad.norm() / weights[-1].grad.norm())
        optimizer.step()
    return ratio, loss.item()


def test_residual_layers_cure_the_vanishing_gradient_of_twenty_sigmoid_layers() -> None:
    ratio, loss = deep(activation="sigmoid")
    assert ratio < 1e-9 and loss > 2.2  # log(10) is 2.303
    ratio, loss = deep(activation="relu", init="kaiming_normal", residual=True)
    assert 0.1 < ratio < 10 and loss < 0.1


@EVERY
def test_the_onnx_graph_equals_torch_on_any_number_of_rows(model: Model, feature: Feature) -> None:
    built = stirred(network(model, feature), feature)
    session = exported(built, feature)
    for rows in (0, 1, 2, 37):
        given = pixels(feature, rows, seed=rows)
        (found,) = session.run(None, {"image": given["image"].numpy()})
        expected = built(given).softmax(1).detach().numpy()
        assert found.shape == (rows, 10)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert expected.std() > 1e-3  # there was something to tell apart


class Probabilities(nn.Module):
    def __init__(self, built: Network) -> None:
        super().__init__()
        self.built = built

    def forward(self, values: Tensor) -> Tensor:
        found: Tensor = self.built({"image": values}).softmax(1)
        return found


def exported(built: Network, feature: Feature) -> onnxruntime.InferenceSession:
    file, rows = io.BytesIO(), {0: "rows"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Probabilities(built).eval(),
            tuple(pixels(feature, 2).values()),
            file,
            input_names=["image"],
            output_names=["outputs"],
            dynamic_axes={"image": rows, "outputs": rows},
            opset_version=18,
            dynamo=False,
        )
    return onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])


@EVERY
def test_training_reaches_every_weight(model: Model, feature: Feature) -> None:
    """After a few steps, since behind a branch's end that is 0 there is nothing at first."""
    built = stirred(network(model, feature), feature).train()
    built.zero_grad()
    nn.functional.cross_entropy(built(pixels(feature, 64, 9)), torch.arange(64) % 10).backward()
    missed = [name for name, parameter in built.named_parameters() if parameter.grad is None or not parameter.grad.abs().max() > 1e-9]
    assert not missed


@EVERY
def test_a_seed_gives_the_same_weights_and_another_one_others(model: Model, feature: Feature) -> None:
    first, second, other = (network(model, feature, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), second.parameters(), strict=True))
    drawn = [(one, two) for one, two in zip(first.parameters(), other.parameters(), strict=True) if one.dim() > 1 and one.abs().max() > 0]
    assert drawn and not any(torch.equal(one, two) for one, two in drawn)


@EVERY
def test_an_encoder_gives_a_vector_of_its_width_which_the_head_takes(model: Model, feature: Feature) -> None:
    found = signature(feature)
    built, encoder = network(model, feature), model.encoder(found).eval()
    vectors = encoder(built.preprocess(pixels(feature, 3)))
    assert vectors.shape == (3, encoder.width) == (3, built.body.head.in_features)
    assert [value.shape for value in encoder.parameters()] == [value.shape for value in built.body.encoder.parameters()]


@EVERY
def test_models_compute_in_float64_too_and_take_no_rows(model: Model, feature: Feature) -> None:
    single, double = network(model, feature), network(model, feature, dtype=torch.float64)
    found = double(pixels(feature, 6))
    assert found.dtype == torch.float64
    assert 0 < (found - single(pixels(feature, 6))).abs().max() < 1e-4
    assert single(pixels(feature, 0)).shape == (0, 10)


@pytest.mark.parametrize("model", [*RESNETS, *CNNS], ids=lambda model: model.kind)
def test_channels_last_in_memory_changes_no_results(model: Model) -> None:
    plain, last = (network(model, SMALL, dtype=torch.float64).train() for _ in range(2))
    last.to(memory_format=torch.channels_last)
    for built in (plain, last):
        torch.manual_seed(0)  # dropped are other numbers, where memory is drawn in its own order
        for layer in built.modules():
            if hasattr(layer, "p"):
                layer.p = 0.0
        nn.functional.cross_entropy(built(pixels(SMALL, 8)), torch.arange(8)).backward()
    for (name, one), (_, two) in zip(plain.named_parameters(), last.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("model", [*RESNETS, *CNNS], ids=lambda model: model.kind)
@pytest.mark.parametrize("feature", [SMALL, image(20, 16)], ids=["colours", "grey"])
def test_convolutions_run_with_the_channels_last_in_memory(model: Model, feature: Feature) -> None:
    """As the pixels come: a third faster here than with the channels first, which one layer that asks for them would bring."""
    built, found = network(model, feature).train(), []
    for layer in built.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, given, out: found.append(out.is_contiguous(memory_format=torch.channels_last)))
    built(pixels(feature, 3))
    assert found and all(found)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_a_strided_convolution_of_few_channels_has_the_gradients_of_torchs(format: torch.memory_format) -> None:
    """torch's own, whose backward pass writes beyond its memory on channels that lie last, is asked in float64, which oneDNN has not."""
    ours, values = StridedConv2d(4, 8, 1, 2).double(), torch.randn(50, 4, 7, 6, dtype=torch.float64).contiguous(memory_format=format)
    theirs, weights = nn.Conv2d(4, 8, 1, 2).double(), torch.randn(50, 8, 4, 3, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    found: list[list[Tensor]] = []
    for layer in (ours, theirs):
        given = values.clone().requires_grad_()
        outputs = layer(given)
        (outputs * weights).sum().backward()
        found.append([outputs, given.grad, layer.weight.grad, layer.bias.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_cnn_with_batch_norm_learns_its_running_statistics() -> None:
    built = stirred(network(CNNS[0], SMALL), SMALL)
    norms = [layer for layer in built.modules() if isinstance(layer, BatchNorm)]
    assert len(norms) == 3
    assert all(layer.running_mean.abs().max() > 0 and (layer.running_var - 1).abs().max() > 0 for layer in norms)


GOLDEN = [
    (Mlp(), (image(),), "6a35cf88b9ad03cf", [0.0099744, -0.4607825, -0.4395793]),
    (
        Mlp(hidden=(32, 16, 16), activation="gelu", init="kaiming_uniform", dropout=0.5),
        MIXED,
        None,  # embeddings are normal numbers, whose last bits differ from processor to processor
        [0.1845236, -0.0512011, -0.0775501],
    ),
    (Cnn(), (image(),), "1bbbf7352614a034", [-1.4303541, -0.2460066, -2.9991398]),
    (
        Cnn(channels=(4, 8, 8), hidden=16, activation="silu", init="xavier_uniform", dropout=0.1),
        (image(17, 13, 3),),
        "a7cdca77153542a3",
        [-0.0111222, -0.0242086, 0.0088916],
    ),
]


@pytest.mark.parametrize(("model", "features", "digest", "outputs"), GOLDEN)
def test_models_start_as_they_always_have(model: Model, features: tuple[Feature, ...], digest: str | None, outputs: list[float]) -> None:
    """Recorded before there were norms, residual layers and encoders."""
    built = network(model, *features, seed=3)
    weights = b"".join(parameter.detach().numpy().tobytes() for parameter in built.parameters())
    assert digest is None or hashlib.sha256(weights).hexdigest()[:16] == digest
    rows = mixed_rows(3) if features is MIXED else pixels(features[0], 3)
    assert built(rows)[0, :3].tolist() == pytest.approx(outputs, abs=2e-6)
