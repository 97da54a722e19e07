"""Networks as functions of a tree: their counts, the roles of their leaves, and the stand-ins for
layers.
"""

import pytest
import small
import torch
import torch.nn.functional as F
from tiers import thorough_param
from torch import nn
from torch.func import functional_call, grad, vmap

from fedlora_mpi.core.seeds import isolate_rng, rng
from fedlora_mpi.core.tree import numel
from fedlora_mpi.core.vision import import_torchvision
from fedlora_mpi.models.network import from_module
from fedlora_mpi.models.second_order import SecondOrder
from fedlora_mpi.models.substitutes import Substitutes
from fedlora_mpi.models.zoo import build


def numbers(*shape, at=0, dtype=torch.float32):
    return torch.randn(*shape, generator=rng(1, "test", *shape, at), dtype=dtype)


def of_role(model, *roles):
    return {n: v for n, v in model.initial.items() if model.role(n) in roles}


def made(*layers, classes=6, shape=(3, 7, 5)):
    with isolate_rng(1, "test"):
        return from_module(nn.Sequential(*(layer() for layer in layers)), classes, shape)


# Counts


@pytest.mark.parametrize(
    "name, classes, parameters, statistics",
    [
        ("resnet8", 10, 1_235_274, 2_688),
        thorough_param("resnet8", 100, 1_235_274 + 90 * 257, 2_688),
        thorough_param("resnet8", 200, 1_235_274 + 190 * 257, 2_688),
        thorough_param("resnet10", 10, 4_957_092 - 90 * 513, 5_760),
        ("resnet10", 100, 4_957_092, 5_760),
        thorough_param("resnet10", 200, 5_008_392, 5_760),
        ("cifar_resnet8", 10, 78_042, 672),  # 2 (3 * 16 + 3 * 32 + 3 * 64) with those of two skips
    ],
)
def test_the_papers_networks_have_their_published_sizes(name, classes, parameters, statistics):
    model = build(name, {}, classes, (3, 32, 32), 1)
    assert numel(of_role(model, "body", "head", "norm")) == parameters
    assert numel(of_role(model, "stats")) == statistics
    assert numel(model.initial) == parameters + statistics and not model.constants
    assert model.batch_statistics and not model.noisy


def test_resnet8_splits_into_the_published_parts():
    model = build("resnet8", {}, 10, (3, 32, 32), 1)
    assert numel(of_role(model, "body")) == 1_230_016
    assert numel(of_role(model, "norm")) == 2_688
    assert of_role(model, "head").keys() == {"fc.weight", "fc.bias"}
    assert numel(of_role(model, "head")) == 2_570
    assert 4 * numel(model.initial) == 4_951_848  # bytes of an upload


@pytest.mark.parametrize(
    "name, side, classes, mmac",
    [
        ("resnet8", 32, 10, 14.47),
        ("resnet10", 32, 100, 18.19),
        thorough_param("resnet10", 64, 200, 72.65),
    ],
)
def test_a_forward_pass_costs_the_published_multiply_adds(name, side, classes, mmac):
    assert build(name, {}, classes, (3, side, side), 1).flops / 2e6 == pytest.approx(
        mmac, abs=0.005
    )


def test_flops_of_one_layer_are_two_per_multiply_add():
    assert made(nn.Flatten, lambda: nn.Linear(105, 6)).flops == 2 * 105 * 6


# Roles


class Misnamed(nn.Module):
    """Every name lies about its layer."""

    def __init__(self):
        super().__init__()
        self.bn = nn.Conv2d(3, 5, 3)
        self.fc = nn.BatchNorm2d(5)
        self.head = nn.Linear(75, 7)
        self.running_mean = nn.LayerNorm(7)
        self.norm = nn.Linear(7, 6)
        self.classifier = nn.GroupNorm(3, 6)
        self.weight = nn.Parameter(torch.ones(6))
        self.register_buffer("linear", torch.zeros(6))
        self.register_buffer("step", torch.tensor([2, 3]))

    def forward(self, x):
        y = self.running_mean(self.head(F.relu(self.fc(self.bn(x))).flatten(1)))
        return self.classifier(self.norm(y)) * self.weight + self.linear + self.step.sum()


def test_roles_follow_types_and_not_names():
    model = from_module(Misnamed(), 6, (3, 7, 5))
    assert {n: leaf.role for n, leaf in model.leaves.items()} == {
        "weight": "body",
        "bn.weight": "body",
        "bn.bias": "body",
        "fc.weight": "norm",
        "fc.bias": "norm",
        "head.weight": "body",
        "head.bias": "body",
        "running_mean.weight": "norm",
        "running_mean.bias": "norm",
        "norm.weight": "head",
        "norm.bias": "head",
        "classifier.weight": "norm",
        "classifier.bias": "norm",
        "linear": "stats",
        "fc.running_mean": "stats",
        "fc.running_var": "stats",
    }
    matrices = {n: leaf.matrix for n, leaf in model.leaves.items() if leaf.matrix}
    assert matrices == {"bn.weight": "conv", "head.weight": "linear", "norm.weight": "linear"}
    assert model.role("norm.weight.A") is None


def test_integer_buffers_are_constants_and_no_leaves():
    model = from_module(Misnamed(), 6, (3, 7, 5))
    assert model.constants.keys() == {"step"} and model.constants["step"].tolist() == [2, 3]
    assert all(v.is_floating_point() for v in model.initial.values())


def test_the_last_convolution_is_the_head_where_there_is_no_linear():
    def pool():
        return nn.AdaptiveAvgPool2d(1)

    model = made(lambda: nn.Conv2d(3, 5, 3), nn.ReLU, lambda: nn.Conv2d(5, 6, 1), pool, nn.Flatten)
    assert of_role(model, "head").keys() == {"2.weight", "2.bias"}
    assert model.leaves["2.weight"].matrix == "conv"


class Attentive(nn.Module):
    """A Transformer layer over the rows of an image."""

    def __init__(self, classes=6, shape=(3, 7, 6), dropout=0.3):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 5, dropout=dropout, batch_first=True)
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        return self.head(self.layer(x.flatten(1, 2)).mean(1))


def test_attention_weights_count_as_linear_matrices():
    with isolate_rng(1, "test"):
        model = from_module(Attentive(), 6, (3, 7, 6))
    leaf = model.leaves["layer.self_attn.in_proj_weight"]
    assert leaf == ((18, 6), "body", "linear")
    assert model.leaves["layer.self_attn.out_proj.weight"].matrix == "linear"
    assert model.leaves["layer.self_attn.in_proj_bias"].matrix == ""
    assert model.noisy and not model.batch_statistics


# Building


@pytest.mark.parametrize(
    "name", [thorough_param("squeezenet1_0"), "mobilenet_v3_small", thorough_param("resnet18")]
)
def test_torchvision_models_train_under_substitutes(name):
    model = build(f"torchvision:{name}", {}, 6, (3, 64, 64), 1)
    assert model.noisy == (name != "resnet18") and model.batch_statistics == (
        name != "squeezenet1_0"
    )
    assert {leaf.role for leaf in model.leaves.values()} >= {"body", "head"}
    tree = small.clone_tree(model.initial)
    with torch.no_grad(), Substitutes(None, torch.tensor(3)):
        assert model(tree, numbers(1, 3, 64, 64)).shape == (1, 6)


def test_a_users_callable_gets_classes_and_shape():
    model = build("small:bn_net", {}, 6, (3, 7, 5), 1)
    assert model.leaves["conv1.weight"].shape == (3, 3, 3, 3) and model.leaves[
        "fc.weight"
    ].shape == (6, 5)
    assert build("test_models:with_option", {"width": 3}, 6, (3, 7, 5), 1).leaves[
        "1.weight"
    ].shape == (
        3,
        105,
    )


def with_option(classes, shape, width=5):
    return nn.Sequential(nn.Flatten(), nn.Linear(105, width), nn.Linear(width, classes))


def wrong_classes(classes, shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(105, classes + 1))


def cumulative(classes, shape):
    return nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.Flatten(), nn.Linear(105, classes))


def demanding(classes, shape):
    class Demanding(nn.Module):
        def forward(self, x):
            assert x.shape[2:] == (224, 224), "Wrong image height!"

    return Demanding()


def two_outputs(classes, shape):
    class Twins(nn.Linear):
        def forward(self, x):
            y = super().forward(x.flatten(1))
            return (y, y) if self.training else y

    return Twins(105, classes)


@pytest.mark.parametrize(
    "name, options, text",
    [
        ("test_models:wrong_classes", {}, r"gives \[2, 7\] for 2 samples, not \[2, 6\]"),
        ("test_models:two_outputs", {}, r"gives tuple with 0 \[2, 6\], 1 \[2, 6\]"),
        ("test_models:cumulative", {}, "layer 0 has momentum None"),
        (
            "test_models:demanding",
            {},
            r"refuses inputs of shape \[3, 7, 5\]: Wrong image height.*; set model.image_size = 5$",
        ),
        ("test_models:numbers", {}, "cannot be built"),
        ("test_models:with_option", {"depth": 3}, "cannot be built: .*depth"),
        ("test_models:nowhere", {}, "cannot be built: .*nowhere"),
        ("no_such_module:f", {}, "cannot be built: No module named 'no_such_module'"),
        ("resnet9", {}, "cannot be built"),
        ("builtins:dict", {}, "returned dict, not a torch.nn.Module"),
        ("torchvision:no_such_model", {}, "cannot be built: Unknown model"),
        ("torchvision:squeezenet1_0", {}, r"refuses inputs of shape \[3, 7, 5\]"),
    ],
)
def test_what_cannot_be_a_model_is_refused(name, options, text):
    with pytest.raises(ValueError, match=f"^name.*{text}"):
        build(name, options, 6, (3, 7, 5), 1)


def test_initial_weights_follow_the_seed_alone():
    before = torch.get_rng_state()
    one = build("small:bn_net", {}, 6, (3, 7, 5), 1).initial
    torch.rand(3)
    two = build("small:bn_net", {}, 6, (3, 7, 5), 1).initial
    torch.set_rng_state(before)
    assert small.trees_equal(one, two)
    other = build("small:bn_net", {}, 6, (3, 7, 5), 2).initial
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


def test_building_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    build("small:noisy_net", {}, 6, (3, 7, 5), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_measuring_a_model_leaves_its_statistics_initial():
    initial = build("small:bn_net", {}, 6, (3, 7, 5), 1).initial
    assert not initial["bn1.running_mean"].any() and (initial["bn1.running_var"] == 1).all()


# As a function


@pytest.mark.parametrize("training", [False, True])
def test_the_function_is_the_module(training):
    model = build("small:bn_net", {}, 6, (3, 7, 5), 1)
    tree = {n: v + 0.1 * numbers(*v.shape).abs() for n, v in model.initial.items()}
    with isolate_rng(2, "other weights"):
        module = small.bn_net(6, (3, 7, 5)).train(training)
    assert not module.load_state_dict(tree, strict=False).unexpected_keys
    function = model if training else model.eval_mode()
    start = small.clone_tree(tree)
    for step in range(3):
        x = numbers(5, 3, 7, 5, at=step)
        assert torch.equal(function(tree, x), module(x))
    assert small.trees_equal(tree, {n: module.state_dict()[n] for n in tree})
    moved = {model.role(n) for n in tree if not torch.equal(tree[n], start[n])}
    assert moved == ({"stats"} if training else set())


def test_the_function_has_no_memory():
    model = build("small:bn_net", {}, 6, (3, 7, 5), 1)
    x, tree = numbers(5, 3, 7, 5), small.clone_tree(model.initial)
    model(tree, x)
    assert torch.equal(
        model(small.clone_tree(model.initial), x), model(small.clone_tree(model.initial), x)
    )
    assert all(v.is_meta for module in model.modules for v in module.state_dict().values())


def test_a_model_can_be_taken_out_as_an_ordinary_module():
    model = build("small:bn_net", {}, 6, (3, 7, 5), 1)
    tree = {n: v + 0.1 * numbers(*v.shape).abs() for n, v in model.initial.items()}
    module, x = model.to_module(tree), numbers(5, 3, 7, 5)
    assert torch.equal(module(x), model.eval_mode()(tree, x))
    module.fc.bias.data.zero_()
    assert tree["fc.bias"].any()


# BatchNorm of a padded batch

REAL = torch.tensor([True, False, True, True, False, True, True])


@pytest.mark.parametrize(
    "layer, shape", [(nn.BatchNorm1d, ()), (nn.BatchNorm1d, (5,)), (nn.BatchNorm2d, (2, 5))]
)
@pytest.mark.parametrize("affine, tracks", [(True, True), (False, True), (True, False)])
def test_batchnorm_skips_padding(layer, shape, affine, tracks):
    padded, plain = (
        layer(3, affine=affine, track_running_stats=tracks, momentum=0.3) for _ in range(2)
    )
    for norm in (padded, plain) if affine else ():
        norm.weight.data, norm.bias.data = (
            torch.tensor([0.5, 2.0, -1.0]),
            torch.tensor([0.1, 0.2, 0.3]),
        )
    x = numbers(7, 3, *shape)
    x[~REAL] = 1e3  # garbage
    x.requires_grad_()
    small_x = x.detach()[REAL].requires_grad_()
    for at in range(2):
        pull = numbers(7, 3, *shape, at=1 + at)
        with Substitutes(REAL, torch.tensor(0)):
            y = padded(x)
        expected = plain(small_x)
        torch.testing.assert_close(y[REAL], expected, rtol=1e-5, atol=1e-5)
        (y * pull)[REAL].sum().backward()
        (expected * pull[REAL]).sum().backward()
    torch.testing.assert_close(x.grad[REAL], small_x.grad, rtol=1e-4, atol=1e-5)
    assert not x.grad[~REAL].any()
    for name, value in plain.named_parameters():
        torch.testing.assert_close(
            padded.get_parameter(name).grad, value.grad, rtol=1e-5, atol=1e-5
        )
    for name, value in plain.named_buffers():
        if value.is_floating_point():
            torch.testing.assert_close(padded.get_buffer(name), value, rtol=1e-5, atol=1e-6)


def test_batchnorm_without_padding_is_the_plain_one():
    one, two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    x = numbers(5, 3, 2, 7)
    with Substitutes(None, torch.tensor(0)) as watch:
        y = one(x)
    torch.testing.assert_close(y, two(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.running_var, two.running_var)
    assert watch.met_batch_norm and not watch.met_noise


def test_the_running_statistics_of_float64_are_as_exact_as_those_of_torch():
    one, two = (nn.BatchNorm2d(3).double() for _ in range(2))
    x = numbers(5, 3, 2, 7).double()
    with Substitutes(None, torch.tensor(0)):
        one(x)
    two(x)
    torch.testing.assert_close(one.running_mean, two.running_mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(one.running_var, two.running_var, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.InstanceNorm2d(3, affine=True),
        nn.LayerNorm(5),
    ],
    ids=["batch", "instance", "layer"],
)
def test_a_stack_has_the_second_derivatives_of_each_client(norm):
    shapes = norm.weight.shape, norm.bias.shape, (4, 3, 2, 5)
    leaves = [
        numbers(2, *shape, at=at, dtype=torch.float64).requires_grad_()
        for at, shape in enumerate(shapes)
    ]

    def cube(weight, bias, x):
        with SecondOrder():
            return functional_call(norm, {"weight": weight, "bias": bias}, (x,)).pow(3).mean()

    def loss(weight, bias, x):
        return sum(g.square().sum() for g in grad(cube, (0, 1, 2))(weight, bias, x))

    stacked = torch.autograd.grad(vmap(loss)(*leaves).sum(), leaves)
    looped = torch.autograd.grad(sum(map(loss, *leaves)), leaves)
    for a, b in zip(stacked, looped, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert b.abs().max() > 1e-3


@pytest.mark.parametrize("real", [None, torch.tensor([True]), torch.tensor([False, True, False])])
def test_one_value_per_channel_is_normalised_to_zero_and_spares_the_variance(real):
    norm = nn.BatchNorm2d(3)
    norm.bias.data = torch.tensor([0.1, 0.2, 0.3])
    x = numbers(1 if real is None else len(real), 3, 1, 1).requires_grad_()
    with Substitutes(real, torch.tensor(0)):
        y = norm(x)
    only = slice(None) if real is None else real
    assert torch.equal(y[only].flatten(), norm.bias)
    y[only].sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (norm.running_var == 1).all()
    torch.testing.assert_close(norm.running_mean, 0.1 * x.detach()[only].flatten())


def test_batchnorm_in_evaluation_takes_its_running_statistics():
    norm = nn.BatchNorm2d(3).eval()
    norm.running_mean += 2
    x = numbers(7, 3, 2, 5)
    with Substitutes(REAL, torch.tensor(0)) as watch:
        y = norm(x)
    assert torch.equal(y, norm(x)) and not watch.met_batch_norm
    assert (norm.running_mean == 2).all()


def test_stacked_batchnorm_is_that_of_each_client():
    x, real = numbers(3, 7, 5, 2), torch.rand(3, 7, generator=rng(1)) < 0.6
    assert (real.sum(1) > 1).all() and len(set(real.sum(1).tolist())) > 1

    def one(x, real, mean, var):
        with Substitutes(real, torch.tensor(0)):
            return F.batch_norm(x, mean, var, training=True)

    state = torch.zeros(3, 5), torch.ones(3, 5)
    alone = torch.zeros(3, 5), torch.ones(3, 5)
    stacked = vmap(one)(x, real, *state)
    looped = torch.stack([one(*client) for client in zip(x, real, *alone, strict=True)])
    torch.testing.assert_close(stacked, looped)
    torch.testing.assert_close(state, alone)
    assert alone[0].any()


# Noise


def keyed(draw, key):
    with Substitutes(None, torch.tensor(key)):
        return draw()


ONES = torch.ones(30, 50, 7)
NOISES = {
    "dropout": lambda: F.dropout(ONES, 0.3),
    "dropout1d": lambda: F.dropout1d(ONES, 0.3),
    "dropout2d": lambda: F.dropout2d(ONES[..., None], 0.3),
    "dropout3d": lambda: F.dropout3d(ONES[..., None, None], 0.3),
    "bernoulli_": lambda: torch.empty(30, 50).bernoulli_(0.7),
    "stochastic_depth": lambda: import_torchvision().ops.stochastic_depth(
        torch.ones(900, 3), 0.3, "row"
    ),
    "attention": lambda: F.scaled_dot_product_attention(
        torch.zeros(30, 50, 3), torch.zeros(30, 5, 3), torch.ones(30, 5, 7), dropout_p=0.3
    ),
}


@pytest.mark.parametrize("draw", NOISES.values(), ids=NOISES)
def test_noise_is_a_function_of_its_key(draw):
    before = torch.get_rng_state()
    assert torch.equal(keyed(draw, 8), keyed(draw, 8))
    assert not torch.equal(keyed(draw, 8), keyed(draw, 9))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("draw", NOISES.values(), ids=NOISES)
def test_every_draw_of_a_pass_is_another(draw):
    draws = keyed(lambda: [draw() for _ in range(5)], 8)
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


@pytest.mark.parametrize(
    "name", ["dropout", "dropout1d", "dropout2d", "dropout3d", "stochastic_depth"]
)
def test_what_dropout_keeps_it_scales_up(name):
    kept = keyed(NOISES[name], 8)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert kept.mean() == pytest.approx(1, abs=0.1)  # 900 draws or more: three standard errors
    if name[-1] == "d":
        assert (kept.flatten(2).amin(2) == kept.flatten(2).amax(2)).all()  # whole channels
    if name == "dropout":
        assert (kept.amin(2) != kept.amax(2)).any()


@pytest.mark.parametrize("training, p", [(False, 0.3), (True, 0.0)])
def test_dropout_that_is_off_draws_nothing(training, p):
    with Substitutes(None, torch.tensor(8)) as watch:
        assert F.dropout(ONES, p, training) is ONES
    assert not watch.met_noise


def test_stacked_noise_is_that_of_each_client():
    x, keys = numbers(3, 5, 7), torch.tensor([8, 2**61, 3])

    def one(x, key):
        with Substitutes(None, key):
            return F.dropout(F.dropout1d(x[None], 0.4), 0.5)

    stacked, looped = (
        vmap(one)(x, keys),
        torch.stack([one(*client) for client in zip(x, keys, strict=True)]),
    )
    assert torch.equal(stacked, looped) and (looped == 0).any() and (looped != 0).any()


@pytest.mark.parametrize("mask", [None, "causal", "bool", "float"])
def test_keyed_attention_without_its_noise_is_torchs(mask):
    q, k, v = numbers(3, 5, 7), numbers(3, 5, 7, at=1), numbers(3, 5, 2)
    kept = numbers(5, 5, at=2) > -1
    kept.fill_diagonal_(True)
    how = {
        "causal": {"is_causal": True},
        "bool": {"attn_mask": kept},
        "float": {"attn_mask": numbers(5, 5)},
    }
    options = how.get(mask, {"scale": 0.3})
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    for p in (0.0, 1e-9):
        with Substitutes(None, torch.tensor(8)):
            found = F.scaled_dot_product_attention(q, k, v, dropout_p=p, **options)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("weights", [True, False])
def test_noise_inside_multihead_attention_is_keyed(weights):
    with isolate_rng(1, "test"):
        layer = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True).train()
    x = numbers(3, 5, 6)

    def attend():
        return layer(x, x, x, need_weights=weights)[0]

    before = torch.get_rng_state()
    assert torch.equal(keyed(attend, 8), keyed(attend, 8))
    assert not torch.equal(keyed(attend, 8), keyed(attend, 9))
    assert torch.equal(torch.get_rng_state(), before)
    layer.dropout = 0.0
    torch.testing.assert_close(keyed(attend, 8), attend())


def test_a_stacked_transformer_is_that_of_each_client():
    with isolate_rng(1, "test"):
        model = from_module(Attentive(), 6, (3, 7, 6))
    tree_C = {n: v + 0.1 * numbers(3, *v.shape) for n, v in model.initial.items()}
    x, keys = numbers(3, 5, 3, 7, 6), torch.tensor([8, 9, 3])

    def one(tree, x, key):
        with Substitutes(None, key):
            return model(tree, x)

    looped = torch.stack(
        [one({n: v[c] for n, v in tree_C.items()}, x[c], keys[c]) for c in range(3)]
    )
    torch.testing.assert_close(vmap(one)(tree_C, x, keys), looped, rtol=1e-5, atol=1e-5)


def test_features_and_classify_make_the_model():
    model = small.make_model("bn_net")
    x = torch.randn(7, *small.SHAPE, generator=rng(1, "x"))
    body = {n: v for n, v in model.initial.items() if model.role(n) != "head"}
    head = {n: v for n, v in model.initial.items() if model.role(n) == "head"}
    quiet = model.eval_mode()
    z = quiet.features(body, x)
    assert z.shape == (7, 5) and torch.equal(quiet.classify(head, z), quiet(model.initial, x))


def test_a_frozen_tree_leaves_no_trace():
    model = small.make_model("bn_net")
    tree = {n: v.clone().requires_grad_(model.role(n) != "stats") for n, v in model.initial.items()}
    before = small.clone_tree(model.initial)
    out = model(model.detach_tree(tree), torch.randn(7, *small.SHAPE, generator=rng(1, "x")))
    assert not out.requires_grad
    assert small.trees_equal({n: v.detach() for n, v in tree.items()}, before)


def test_noise_that_cannot_be_keyed_is_refused():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)

        def forward(self, x):
            return self.fc(x + torch.rand(x.shape))

    with pytest.raises(ValueError, match="global generator"):
        from_module(Noisy(), 3, (5,))


def test_dropout_of_everything_gives_zeros():
    with Substitutes(None, torch.tensor(3)):
        assert torch.equal(nn.Dropout(1.0)(torch.ones(3, 5)), torch.zeros(3, 5))
