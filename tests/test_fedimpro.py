"""FedImpro: features drawn above a cut of the network, and the moments that clients share."""

import pytest
import small
import torch
import torch.nn.functional as F
from aggregates import aggregate_of, svd
from tiers import thorough_param

from fedlora_mpi.algorithm import Batch, Upload, Variables
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.fedimpro import FedImpro
from fedlora_mpi.components.feature_moments import (
    LARGEST_DEVIATION,
    MEANS,
    SPREADS,
    draw_features,
    feature_shape,
    follow_features,
)
from fedlora_mpi.core.names import is_method_leaf
from fedlora_mpi.core.seeds import normal, rng
from fedlora_mpi.core.tree import numel
from fedlora_mpi.models.substitutes import Substitutes

STACKED = pytest.mark.parametrize("stacked", [True, thorough_param(False)], ids=["stack", "loop"])
KEY = torch.tensor(5)
COUNTS = torch.ones(small.CLASSES)


def numbers(*shape, at=0):
    return torch.randn(*shape, generator=rng(1, "fedimpro", *shape, at))


def batch_of(x, y, real=None):
    return Batch(x, torch.tensor(y), None if real is None else torch.tensor(real), KEY, COUNTS)


def near(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# The cut.


@pytest.mark.parametrize(
    "network, place", [("cnn", "3"), ("cnn", ""), ("bn_net", "layers.0"), ("linear_net", "0")]
)
def test_a_pass_whose_features_stay_is_the_pass(network, place):
    model, x = small.make_model(network).eval_mode(), numbers(4, *small.SHAPE)
    plain = model(model.initial, x)
    assert torch.equal(model.replace_output(model.initial, x, place, lambda h: h), plain)
    double = model.replace_output(
        model.initial, x, place, lambda h: torch.stack([h, 0 * h], 1).flatten(0, 1)
    )
    near(double[::2], plain)
    assert torch.equal(model(model.initial, x), plain)  # nothing stays replaced
    if place:
        same = double[1].expand(4, -1)
        near(double[1::2], same)  # what follows zeros


def test_what_replaces_features_has_no_gradient_below_the_cut():
    model = small.make_model("bn_net")
    tree = {n: v.clone().requires_grad_(model.role(n) != "stats") for n, v in model.initial.items()}
    logits = model.replace_output(
        tree, numbers(4, *small.SHAPE), "layers.0", lambda h: numbers(*h.shape)
    )
    parameters = {n: v for n, v in tree.items() if v.requires_grad}
    grads = torch.autograd.grad(logits.square().sum(), [*parameters.values()], allow_unused=True)
    reached = {n for n, g in zip(parameters, grads, strict=True) if g is not None and g.any()}
    assert reached and not any(n.startswith(("conv1", "bn1", "layers.0.")) for n in reached)
    assert {"fc.weight", "layers.1.conv1.weight"} <= reached


def test_the_cut_is_a_module_that_sees_the_batch():
    model = small.make_model("bn_net")
    assert feature_shape(model, "layers.0") == (3, 7, 5) and feature_shape(model, "") == (5,)
    with pytest.raises(ValueError, match=r"split = layers.7: is no module of the network; there"):
        FedImpro(split="layers.7").check(model, small.TRAIN)


def test_batchnorm_counts_all_rows_of_an_example_or_none():
    x, real = numbers(4, 3, 2), torch.tensor([True, True, True, False])
    double = torch.stack([x, numbers(4, 3, 2, at=1)], 1).flatten(0, 1)
    with Substitutes(real, KEY):
        ours = F.batch_norm(double, None, None, training=True)
    near(ours[:6], F.batch_norm(double[:6], None, None, training=True), atol=1e-5)


# Draws.


def test_normal_numbers_are_addressed_and_the_first_rows_do_not_depend_on_how_many_follow():
    many = normal(KEY, (4000, 5))
    assert torch.equal(many[:3], normal(KEY, (3, 5)))
    assert not torch.equal(many, normal(KEY + 1, (4000, 5)))
    assert abs(float(many.mean())) < 0.02 and abs(float(many.var()) - 1) < 0.02


@pytest.mark.parametrize("spread, deviation", [("variance", 3.0), ("deviation", 9.0)])
def test_draws_have_the_moments_of_their_class(spread, deviation):
    shared = {MEANS: torch.tensor([[1.0], [5.0]]), SPREADS: torch.tensor([[0.0], [9.0]])}
    y = torch.arange(4000) % 2
    h = draw_features(shared, y, KEY, spread)
    assert (h[y == 0] == 1).all()
    assert float(h[y == 1].mean()) == pytest.approx(5, abs=deviation / 20)
    assert float(h[y == 1].std()) == pytest.approx(deviation, rel=0.05)


# A client.


@STACKED
@pytest.mark.parametrize("network", [thorough_param("bn_net"), "noisy_net"])
def test_without_drawn_features_it_is_fedavg_to_the_bit(network, stacked):
    how = {"network": network, "stacked": stacked, "participation": 0.6}
    ours = small.final_state(FedImpro(weight=0.0), **how).shared
    fedavg = small.final_state(FedAvg(), **how).shared
    assert small.trees_equal({n: v for n, v in ours.items() if not is_method_leaf(n)}, fedavg)


def loss_of(algorithm, shared, batch, round_=0, **moved):
    """The loss of one step, and the client's shared variables after it; ``moved``: leaves that have
    moved since they arrived.
    """
    model = small.make_model("linear_net")
    now = {n: v.clone() for n, v in (shared | moved).items()}
    loss = algorithm.local(model, small.TRAIN, round_)[0].steps[0].loss
    return float(loss(Variables(now, {}), Variables(shared, {}), batch)), now


def shared_of(algorithm, network="linear_net"):
    return algorithm.init(small.make_model(network), rng(1, "init")).shared


def test_the_loss_on_draws_without_spread_is_that_of_the_class_means():
    """The cut is at the input of a linear network, so that drawn features are images."""
    algorithm = FedImpro(split="0", weight=0.7)
    shared = shared_of(algorithm)
    shared[SPREADS] = torch.zeros_like(shared[SPREADS])
    y = [0, 2, 2, 5]
    batch = batch_of(numbers(4, *small.SHAPE), y)
    model = small.make_model("linear_net")
    images = shared[MEANS][batch.y].view(4, *small.SHAPE)
    value, _ = loss_of(algorithm, shared, batch)
    fits = [float(model.loss(model(shared, x), batch)) for x in (batch.x, images)]
    assert value == pytest.approx(fits[0] + 0.7 * fits[1])


@pytest.mark.parametrize("round_, weight", [(0, 0.0), (3, 1.5)])
def test_the_code_draws_classes_in_turn_with_a_growing_weight(round_, weight):
    algorithm = FedImpro(split="0", variant="code", growth_rounds=2)
    shared = shared_of(algorithm)
    assert (shared[SPREADS] == 0.1).all() and 0 <= shared[MEANS].min() < shared[MEANS].max() < 1
    shared[SPREADS] = torch.zeros_like(shared[SPREADS])
    batch = batch_of(numbers(8, *small.SHAPE), [4] * 8)
    model, in_turn = small.make_model("linear_net"), torch.arange(8) % small.CLASSES
    images = shared[MEANS][in_turn].view(8, *small.SHAPE)
    value, _ = loss_of(algorithm, shared, batch, round_)
    drawn = float(model.loss(model(shared, images), batch._replace(y=in_turn)))
    assert value == pytest.approx(float(model.loss(model(shared, batch.x), batch)) + weight * drawn)


def test_draws_are_of_the_moments_that_arrived_and_the_client_follows_its_own():
    algorithm = FedImpro(split="0", beta_m=0.25)
    shared = shared_of(algorithm)
    batch = batch_of(numbers(3, *small.SHAPE), [1, 1, 4])
    first, now = loss_of(algorithm, shared, batch)
    for c, rows in ((1, batch.x[:2]), (4, batch.x[2:])):
        h = rows.flatten(1)
        near(now[MEANS][c], 0.25 * shared[MEANS][c] + 0.75 * h.mean(0))
        near(now[SPREADS][c], 0.25 * shared[SPREADS][c] + 0.75 * h.var(0, correction=0))
    for c in (0, 2, 3, 5):
        assert torch.equal(now[MEANS][c], shared[MEANS][c])
    moved = {leaf: shared[leaf] + 1 for leaf in (MEANS, SPREADS)}
    assert first == pytest.approx(loss_of(algorithm, shared, batch, **moved)[0])


def test_the_code_keeps_the_moments_of_the_last_batch_with_two_samples_of_a_class():
    moments = {MEANS: torch.full((3, 2), 9.0), SPREADS: torch.full((3, 2), 0.05)}
    h = torch.tensor([[1.0, 2.0], [1.1, 2.0], [7.0, 7.0]])
    follow_features(moments, h, batch_of(h, [0, 0, 2]), 0.0, "deviation")
    near(moments[MEANS], torch.tensor([[1.05, 2.0], [9.0, 9.0], [7.0, 7.0]]))
    near(moments[SPREADS][0], torch.tensor([0.1 / 2**0.5, 0.0]))  # unbiased
    near(moments[SPREADS][1:], torch.full((2, 2), 0.05))  # a single sample has no deviation
    follow_features(moments, 10 * h, batch_of(h, [0, 0, 2]), 0.0, "deviation")
    assert float(moments[SPREADS][0, 0]) == pytest.approx(LARGEST_DEVIATION)


def test_padding_does_not_move_the_moments():
    moments = [{MEANS: torch.zeros(2, 2), SPREADS: torch.ones(2, 2)} for _ in range(2)]
    h = numbers(4, 2)
    padded = torch.cat([h, torch.full((2, 2), torch.nan)])
    follow_features(moments[0], h, batch_of(h, [0, 1, 1, 1]), 0.5, "variance")
    real = [True] * 4 + [False] * 2
    follow_features(moments[1], padded, batch_of(h, [0, 1, 1, 1, 0, 0], real), 0.5, "variance")
    near(moments[0][MEANS], moments[1][MEANS])
    near(moments[0][SPREADS], moments[1][SPREADS])


# The server.


@pytest.mark.parametrize("variant, beta", [("paper", 0.25), ("code", 0.0)])
def test_the_server_moves_to_the_mean_of_the_moments(variant, beta):
    shared, mean = (
        {"w": numbers(2, at=at), MEANS: numbers(3, 2, at=at), SPREADS: numbers(3, 2, at=at).abs()}
        for at in (0, 1)
    )
    algorithm = FedImpro(variant=variant, beta_g=0.25)
    new = algorithm.server_update({}, shared, aggregate_of(mean), svd).shared
    assert torch.equal(new["w"], mean["w"])
    for leaf in (MEANS, SPREADS):
        near(new[leaf], beta * shared[leaf] + (1 - beta) * mean[leaf])


def test_clients_count_equally_in_the_moments_and_by_samples_in_the_weights():
    expand = FedImpro().transport(0, 2).expand
    upload = {"w": numbers(2), MEANS: numbers(3, 2), SPREADS: numbers(3, 2)}
    term = expand(Upload(upload), {}, 17)
    assert term.mean == upload and {n: float(v) for n, v in term.weights.items()} == {
        MEANS: 1.0,
        SPREADS: 1.0,
    }


@STACKED
def test_a_class_that_nobody_holds_keeps_its_moments(stacked):
    how = {"network": "cnn", "stacked": stacked, "same_sample": True, "sizes": (5, 3), "rounds": 1}
    algorithm = FedImpro()
    before, after = shared_of(algorithm, "cnn"), small.final_state(algorithm, **how).shared
    moved = [bool((before[MEANS][c] - after[MEANS][c]).abs().max() > 1e-6) for c in range(6)]
    assert sum(moved) == 1


def test_messages_have_all_leaves_and_two_moments_of_each_class():
    federation, state = small.make_experiment(FedImpro(split="layers.0"), "bn_net")
    model = federation.clients.trainer.model
    D = 3 * 7 * 5
    assert numel(state.shared) == numel(model.initial) + 2 * small.CLASSES * D
