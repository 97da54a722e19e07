"""FedBC and weights by a generalisation bound: each client brings its own weight in the mean."""

import pytest
import small
import torch
from tiers import STACK_FIRST

from fedlora_mpi.algorithm import Batch, Variables
from fedlora_mpi.algorithms.bound_weight_like import BoundWeightLike, shift_bounds
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.fedbc import FedBC
from fedlora_mpi.algorithms.fedprox import FedProx
from fedlora_mpi.core.tree import sq_dist
from fedlora_mpi.engine.train import ClientResult
from fedlora_mpi.federation.round import run_round

LAM, GAMMA, GAP = ".own.lam", ".own.gamma", ".own.gap"
LAMS = (0.5, 0.02, 0.0, 3.0, 0.1)


def distance(federation, a, b):
    """The squared distance of the parameters of two trees."""
    model = federation.clients.trainer.model
    return float(sq_dist(a, b, [n for n in model.leaves if model.role(n) != "stats"]))


def weighted_mean(trees, weights):
    return {
        n: sum(a / sum(weights) * t[n].double() for a, t in zip(weights, trees, strict=True))
        for n in trees[0]
    }


def trained_variables(federation, state):
    """The variables of each client after training in the round of ``state``."""
    (group,) = federation.placement.groups
    personal = small.clone_tree(state.personal)
    results = federation.clients.trainer.train(group, state.shared, personal, state.round)
    return [r.end for r in sorted(results, key=lambda r: r.client)]


def with_multipliers(federation_and_state, lams=LAMS, **leaves):
    """An experiment whose clients have these lam_i before round 1."""
    federation, state = federation_and_state
    return federation, state._replace(personal=state.personal | {LAM: torch.tensor(lams)} | leaves)


# A mean of own weights


def received_of(weights):
    """(federation, models of five clients, what the server receives of them)."""
    federation, state = small.make_experiment(FedBC(), "bn_net")
    models = [{n: v + torch.rand(v.shape) for n, v in state.shared.items()} for _ in weights]
    uploads = federation.aggregator.collect(
        federation.cohorts.sample(0), state.shared, torch.device("cpu")
    )
    for client, (model, weight) in enumerate(zip(models, weights, strict=True)):
        v = Variables(model, {LAM: torch.tensor(weight)})
        assert federation.aggregator.add(
            uploads, ClientResult(client, v, v, torch.tensor(1.0), None, v.personal)
        )
    return federation, models, federation.aggregator.aggregate(uploads, stop=False)


@pytest.mark.parametrize(
    "weights",
    [
        (1.0, 1e-8, 1e-3, 1e-5, 1e-8),
        (1e-8, 3e-8, 2e-8, 1e-8, 5e-8),
        (3e5, 1.0, 2e4, 7e5, 1e-6),
        (0.25, 0.0, 0.5, 0.0, 0.125),
    ],
    ids=str,
)
def test_a_mean_and_its_drift_have_the_clients_own_weights_however_they_differ(weights):
    federation, models, received = received_of(weights)
    mean = weighted_mean(models, weights)
    small.assert_near(received.aggregate.mean, mean, rtol=1e-6)
    square = sum(a * distance(federation, w, mean) for a, w in zip(weights, models, strict=True))
    assert received.drift == pytest.approx((square / sum(weights)) ** 0.5, rel=1e-4)


def test_clients_count_equally_if_all_weights_are_zero():
    federation, models, received = received_of([0.0] * 5)
    mean = weighted_mean(models, [1] * 5)
    small.assert_near(received.aggregate.mean, mean, rtol=1e-6)
    square = sum(distance(federation, w, mean) for w in models) / 5
    assert received.drift == pytest.approx(square**0.5, rel=1e-4)


def test_the_log_has_the_mean_weight():
    federation, _, received = received_of((3.0, 3.0, 0.0, 1.0, 0.5))
    update = federation.algorithm.server_update({}, {}, received.aggregate, None)
    assert update.metrics == {"mean_weight": pytest.approx(1.5)}


# FedBC


@STACK_FIRST
def test_fedbc_with_constant_multipliers_is_uniform_fedprox_with_mu_twice_as_large(stacked):
    fedbc, fedprox = (
        small.final_state(algorithm, "bn_net", stacked=stacked, participation=0.6)
        for algorithm in (FedBC(lam=0.25, alpha=0.0), FedProx(mu=0.5, weights="uniform"))
    )
    assert small.trees_equal(fedbc.shared, fedprox.shared)
    assert (fedbc.personal[LAM] == 0.25).all()


def test_fedbc_without_multipliers_is_uniform_fedavg():
    fedbc, fedavg = (
        small.final_state(algorithm, "bn_net", 1).shared
        for algorithm in (FedBC(alpha=0.0), FedAvg(weights="uniform"))
    )
    small.assert_near(fedbc, fedavg, rtol=1e-5)


@STACK_FIRST
@pytest.mark.parametrize("learns", [False, True], ids=["fixed", "learned"])
def test_multipliers_climb_by_how_far_a_client_is_beyond_its_radius(stacked, learns):
    algorithm = FedBC(gamma=0.3, alpha=0.5, learn_gamma=learns)
    gammas = torch.tensor((0.0, 0.2, 9.0, 0.1, 50.0)) if learns else torch.full((5,), 0.3)
    federation, state = with_multipliers(
        small.make_experiment(algorithm, "bn_net", stacked=stacked),
        **({GAMMA: gammas.clone()} if learns else {}),
    )
    before, ends = small.clone_tree(state.shared), trained_variables(federation, state)
    state, _, _ = run_round(federation, state, evaluate=False, stop=False)
    expected = [
        max(0.0, lam + 0.5 * (distance(federation, end.shared, before) - float(gamma)))
        for lam, gamma, end in zip(LAMS, gammas, ends, strict=True)
    ]
    assert state.personal[LAM].tolist() == pytest.approx(expected, rel=1e-5)
    assert 0.0 in expected or not learns
    if learns:
        assert torch.allclose(state.personal[GAMMA], gammas + 0.5 * torch.tensor(LAMS))
    small.assert_near(
        state.shared, weighted_mean([end.shared for end in ends], expected), rtol=1e-5
    )


def test_multipliers_never_fall_without_a_radius_and_stay_zero_in_a_wide_one():
    federation, state = small.make_experiment(FedBC(), "cnn", participation=0.6)
    for _ in range(3):
        before, cohort = state.personal[LAM].clone(), federation.cohorts.sample(state.round).members
        state = small.run_rounds(federation, state, 1)
        grown = (state.personal[LAM] > before).nonzero().flatten().tolist()
        assert {*grown} == cohort and (state.personal[LAM] >= before).all()
    assert not small.final_state(FedBC(gamma=1e6), "cnn").personal[LAM].any()


def test_fedbc_of_one_client_is_that_client():
    federation, state = small.make_experiment(FedBC(), "bn_net", sizes=(7,))
    (end,) = trained_variables(federation, state)
    small.assert_near(small.run_rounds(federation, state, 1).shared, end.shared, rtol=1e-6)


def test_loop_and_stack_agree():
    loop, stack = (
        small.final_state(FedBC(alpha=0.05), "bn_net", 2, stacked=stacked)
        for stacked in (False, True)
    )
    small.assert_near(stack.shared, loop.shared)
    small.assert_near(stack.personal, loop.personal)


def test_fedbc_refuses_negative_settings():
    for key in ("lam", "gamma", "alpha"):
        with pytest.raises(ValueError, match=f"{key} = -1: must be a number of at least 0"):
            FedBC(**{key: -1})


# Weights by a generalisation bound


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def gap_of(m, v, rho):
    lower, upper = shift_bounds(m, v, rho)
    return upper - lower


def test_of_two_values_the_bounds_are_the_largest_rotation_of_their_probabilities():
    """With P(X = 1) = sin^2 t the square roots of the probabilities are a point on a circle, and a
    shift by a Hellinger distance rho turns it by the angle of cosine 1 - rho^2.
    """
    t, rho = double(0.3, 0.8, 1.3), 0.4
    m = t.sin() ** 2
    turn = torch.acos(double(1 - rho**2))
    lower, upper = shift_bounds(m, m * (1 - m), rho)
    half_circle = torch.pi / 2
    assert torch.allclose(upper, (t + turn).clamp(max=half_circle).sin() ** 2, rtol=1e-12)
    assert torch.allclose(lower, (t - turn).clamp(min=0).sin() ** 2, rtol=1e-12, atol=1e-15)


def test_no_shift_within_the_distance_leaves_the_bounds():
    x, p = torch.rand(6, 4, dtype=torch.float64), torch.rand(6, 4, dtype=torch.float64)
    p = p / p.sum(1, keepdim=True)
    q = torch.rand(2000, 6, 4, dtype=torch.float64) ** 4
    q = q / q.sum(2, keepdim=True)
    m = (p * x).sum(1)
    v = (p * x**2).sum(1) - m**2
    for rho in (0.1, 0.3, 0.6):
        lower, upper = shift_bounds(m, v, rho)
        # on the way from p to q, as far as the distance allows
        share = torch.linspace(0, 1, 50, dtype=torch.float64)[:, None, None, None]
        mixed = (1 - share) * p + share * q[:100]
        near = 1 - (mixed * p).sqrt().sum(3) <= rho**2
        means = (mixed * x).sum(3)
        assert near.any() and not near.all()
        assert ((lower - 1e-12 <= means) & (means <= upper + 1e-12))[near].all()


def test_bounds_are_around_the_mean_and_widen_with_the_distance():
    m, v = double(0.0, 0.2, 0.5, 1.0, 0.7), double(0.0, 0.16, 0.01, 0.0, 0.0)
    previous = gap_of(m, v, 0.0)
    assert not previous.any()
    for rho in (0.05, 0.2, 0.5, 0.9, 1.0):
        lower, upper = shift_bounds(m, v, rho)
        assert ((lower >= 0) & (lower <= m) & (m <= upper) & (upper <= 1)).all()
        assert (upper - lower >= previous).all() and torch.isfinite(upper - lower).all()
        previous = upper - lower
    assert torch.allclose(previous, double(1, 1, 1, 1, 1))


@pytest.mark.parametrize("score", ["jensen_shannon", "error"])
def test_moments_are_those_of_the_squared_losses_of_all_samples_in_any_order(score):
    method, counts = BoundWeightLike(score=score), torch.tensor([3.0, 0.0, 2.0, 1.0])
    z, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 0, 0, 2, 2, 3])
    label = torch.nn.functional.one_hot(y, 4).double()
    q = z.softmax(1)
    middle = (q + label) / 2

    def divergence(a):
        return torch.where(a > 0, a * (a / middle).log2(), 0).sum(1)

    losses = (divergence(q) + divergence(label)) / 2
    if score == "error":
        losses = (q.argmax(1) != y).double()
    X = losses**2
    expected = torch.stack([X.mean(), X.var(correction=0)])
    for order in (range(6), (5, 2, 4, 0, 3, 1)):
        data = Batch(z[[*order]], y[[*order]], None, torch.tensor(0), counts)
        m, v = method.moments(lambda x: x, data)
        assert torch.allclose(torch.stack([m, v]), expected, rtol=1e-10)


def test_a_weight_is_the_gap_of_the_bounds_or_its_inverse():
    rows = [Variables({}, {GAP: torch.tensor(gap)}) for gap in (0.4, 0.1, 0.0)]
    direct, inverse = (
        [float(BoundWeightLike(direction=direction).own_weight(v)) for v in rows]
        for direction in ("proportional", "inverse")
    )
    assert direct == pytest.approx([0.4, 0.1, 0.0])
    assert [w / inverse[0] for w in inverse] == pytest.approx([1, 4, 4e5])


@STACK_FIRST
@pytest.mark.parametrize("direction", ["proportional", "inverse"])
def test_the_mean_has_the_weights_of_the_gaps_after_training(stacked, direction):
    algorithm = BoundWeightLike(direction=direction)
    federation, state = small.make_experiment(algorithm, "bn_net", stacked=stacked)
    ends = trained_variables(federation, state)
    gaps = [float(end.personal[GAP]) for end in ends]
    assert min(gaps) > 0 and len(set(gaps)) == len(gaps)
    weights = gaps if direction == "proportional" else [1 / gap for gap in gaps]
    state = small.run_rounds(federation, state, 1)
    small.assert_near(state.shared, weighted_mean([end.shared for end in ends], weights))


@pytest.mark.parametrize(
    "algorithm, how",
    [
        (BoundWeightLike(), {"sizes": (7, 7, 7), "same_sample": True}),
        (BoundWeightLike(rho=0.0), {}),
        (BoundWeightLike(rho=0.0, direction="inverse"), {}),
        (BoundWeightLike(rho=1.0), {}),
    ],
    ids=["identical clients", "no shift", "no shift inverse", "any shift"],
)
def test_equal_bounds_give_the_uniform_mean(algorithm, how):
    bound, fedavg = (
        small.final_state(a, "bn_net", 1, **how).shared
        for a in (algorithm, FedAvg(weights="uniform"))
    )
    small.assert_near(bound, fedavg)
