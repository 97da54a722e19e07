"""FedAMP, FedCAC and FedPAC: the methods that mix a model, a part or a head for every client."""

import math
from dataclasses import dataclass, replace

import pytest
import small
import torch
import torch.nn.functional as F
from tiers import STACK_FIRST, thorough_param
from torch import nn

from fedlora_mpi.algorithm import (
    Algorithm,
    Batch,
    LocalTraining,
    Phase,
    Step,
    Transport,
    Variables,
    phases_of,
)
from fedlora_mpi.algorithms.fedamp import FedAMP
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.fedcac import FedCAC, critical_mask
from fedlora_mpi.algorithms.fedpac import FedPAC
from fedlora_mpi.algorithms.local import Local
from fedlora_mpi.components.prototypes import class_means, feature_statistics, prototype_loss
from fedlora_mpi.components.similarity import attention, cosines, squared_distances
from fedlora_mpi.components.simplex import best_weights, project_to_simplex
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.tree import add_prefix, numel, select_prefix, split, sq_dist
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.models.network import from_module
from fedlora_mpi.models.zoo import build

NETWORKS = pytest.mark.parametrize("network", [thorough_param("cnn"), "bn_net"])
ALL = pytest.mark.parametrize(
    "algorithm", [FedAMP(alpha=0.5), FedCAC(), FedPAC()], ids=lambda a: type(a).__name__
)


def numbers(*shape, at=0, dtype=torch.float32):
    return torch.randn(*shape, generator=rng(1, "test", *shape, at), dtype=dtype)


def gram_of(rows):
    return rows.double() @ rows.double().T


def row(tree, client):
    return {n: v[client] for n, v in tree.items()}


def plain(tree):
    """Masks as numbers, so that trees can be compared by their largest gap."""
    return {n: v.float() for n, v in tree.items()}


def parameters(made):
    return {n: v for n, v in made.model.initial.items() if made.model.role(n) != "stats"}


def flat(tree):
    return torch.cat([v.flatten() for v in tree.values()])


def trained(federation, state):
    """What the clients bring in this round, by client; the state is left as it is."""
    personal = {
        n: v[[federation.placement.row_of_client[c] for c in federation.placement.groups[0]]]
        for n, v in state.personal.items()
    }
    return {
        d.client: d
        for d in federation.clients.trainer.train(
            federation.placement.groups[0], state.shared, personal, state.round
        )
    }


def batch_of(made, client=0, width=5):
    return Batch(
        *(v if v is None else v[0] for v in made.feed.epoch([client], 0, 0).batch(1, 0, width))
    )


def gradient(made, phase, now, batch, start=None):
    """Gradient of the phase's loss by every leaf; ``start`` is ``now`` unless told."""
    trains = phase.steps[0].trains

    def moves(n):
        return trains(n) and made.model.role(n) != "stats"

    leaves = [{n: v.clone().requires_grad_(moves(n)) for n, v in half.items()} for half in now[:2]]
    wanted = [v for half in leaves for v in half.values() if v.requires_grad]
    names = [n for half in leaves for n, v in half.items() if v.requires_grad]
    value = phase.steps[0].loss(Variables(*leaves), start or now, batch)
    grads = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
    return dict(zip(names, grads, strict=True)), value


# All three


@ALL
@pytest.mark.parametrize("network", ["cnn", thorough_param("bn_net")])
def test_loop_and_stack_play_alike(algorithm, network):
    outcomes = []
    for stacked in (False, True):
        federation, state = small.make_experiment(
            algorithm, network, stacked=stacked, participation=0.8
        )
        outcomes.append(small.run_rounds(federation, state, 3))
    small.assert_near(outcomes[1].shared, outcomes[0].shared)
    small.assert_near(plain(outcomes[1].personal), plain(outcomes[0].personal))


@ALL
@STACK_FIRST
def test_nothing_of_an_absent_client_changes(algorithm, stacked):
    federation, state = small.make_experiment(
        algorithm, "bn_net", participation=0.6, stacked=stacked, group_size=2
    )
    state = small.run_rounds(federation, state, 1)
    before, chosen = small.clone_tree(state.personal), federation.cohorts.sample(1).members
    state = small.run_rounds(federation, state, 1)
    for client, at in federation.placement.row_of_client.items():
        same = {n for n, v in state.personal.items() if torch.equal(v[at], before[n][at])}
        assert (same == set(before)) == (client not in chosen)
    assert 0 < len(chosen) < 5


@ALL
def test_one_client_alone_trains_as_without_a_mix(algorithm):
    plain_one = Local() if isinstance(algorithm, FedAMP) else FedAvg()
    if isinstance(algorithm, FedPAC):
        algorithm, plain_one = FedPAC(lam=0), Alternating()
    if isinstance(algorithm, FedAMP):
        algorithm = FedAMP(lam=0)
    ends = []
    for one in (algorithm, plain_one):
        federation, state = small.make_experiment(one, "bn_net", sizes=(11,))
        state = small.run_rounds(federation, state, 3)
        ends.append(
            one.client_model(
                federation.clients.trainer.model, Variables(state.shared, row(state.personal, 0))
            )
        )
    assert {n: torch.equal(v, ends[1][n]) for n, v in ends[0].items()} == dict.fromkeys(
        ends[1], True
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FedAMP(lam=-1), "lam = -1: must be a number of at least 0"),
        (lambda: FedAMP(alpha=0), "alpha = 0: must be a number above 0"),
        (lambda: FedAMP(decay=2), "decay = 2: must be a number above 0 and at most 1"),
        (lambda: FedAMP(decay_every=0), "decay_every = 0: must be an integer of at least 1"),
        (lambda: FedAMP(alpha_min=-1), "alpha_min = -1: must be a number of at least 0"),
        (lambda: FedAMP(sigma=0), "sigma = 0: must be a number above 0"),
        (lambda: FedAMP(self_weight=2), "self_weight = 2: must be a number from 0 to 1"),
        (lambda: FedCAC(tau=1.5), "tau = 1.5: must be a number from 0 to 1"),
        (lambda: FedCAC(beta=0), "beta = 0: must be a number above 0"),
        (lambda: FedPAC(lam=-1), "lam = -1: must be a number of at least 0"),
        (lambda: FedPAC(head_epochs=-1), "head_epochs = -1: must be an integer of at least 0"),
        (lambda: FedPAC(head_lr=0), "head_lr = 0: must be a number above 0"),
    ],
)
def test_fields_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# What they are made of


def test_likeness_is_that_of_the_keys_themselves():
    keys = numbers(3, 5, dtype=torch.float64)
    rows = keys[:, None], keys[None]
    torch.testing.assert_close(squared_distances(gram_of(keys)), torch.cdist(keys, keys).square())
    torch.testing.assert_close(cosines(gram_of(keys)), F.cosine_similarity(*rows, dim=2))
    assert (squared_distances(gram_of(keys[:1].expand(3, 5))) >= 0).all()
    keys[1] = 0
    assert torch.equal(cosines(gram_of(keys))[1], torch.zeros(3, dtype=torch.float64))
    masks = keys > 0.2
    assert torch.equal(squared_distances(gram_of(masks)), (masks[:, None] != masks).sum(2).double())


def test_leaves_under_a_prefix_are_those_that_were_put_there():
    w = {"a": numbers(3), ".own.a": numbers(5)}  # a network may have a layer of that name
    assert small.trees_equal(select_prefix({"b": w["a"]} | add_prefix(w, ".own."), ".own."), w)


# FedAMP


@NETWORKS
@STACK_FIRST
def test_fedamp_without_penalty_is_local(network, stacked):
    ends = []
    for algorithm in (FedAMP(lam=0), Local()):
        federation, state = small.make_experiment(algorithm, network, stacked=stacked)
        ends.append(small.run_rounds(federation, state, 3).personal)
    assert all(torch.equal(v, ends[0][n]) for n, v in ends[1].items())


@STACK_FIRST
@pytest.mark.parametrize("how", [{}, {"heuristic": True, "sigma": 25.0}])
def test_fedamp_is_not_local(stacked, how):
    ends = []
    for algorithm in (FedAMP(alpha=1.0, **how), Local()):
        federation, state = small.make_experiment(algorithm, "bn_net", stacked=stacked)
        ends.append(small.run_rounds(federation, state, 2).personal)
    gaps = {n: (v - ends[0][n]).abs().max() for n, v in ends[1].items()}
    assert min(gaps.values()) > 1e-4


@pytest.mark.parametrize("convex", [True, False])
def test_the_penalty_of_fedamp_has_gradient_lam_over_alpha_times_the_gap(convex):
    algorithm, round_ = FedAMP(lam=0.7, alpha=3.0, decay=0.5, decay_every=2, alpha_min=0.1), 5
    algorithm = replace(algorithm, convex=convex)
    made, alpha = small.make_trainer(algorithm, "bn_net"), 3 * 0.25
    cloud = parameters(made)
    w_i, w = ({n: v + numbers(*v.shape, at=a + n) for n, v in cloud.items()} for a in "iw")
    first = small.initial_variables(made).personal
    start, now = Variables({}, first | w_i), Variables({}, first | w)
    scale = 1.0 if convex else alpha  # clients of the paper's form receive u_i for alpha = 1
    u = {n: w_i[n] + scale * (v - w_i[n]) for n, v in cloud.items()}

    def of(a):
        (phase,) = phases_of(a.local(made.model, made.settings, round_))
        return gradient(made, phase, now, batch_of(made), start)

    (full, value), (fit, plain_value) = of(algorithm), of(replace(algorithm, lam=0))
    for name in cloud:
        pull = 0.7 / alpha * (w[name] - u[name])
        torch.testing.assert_close(full[name] - fit[name], pull, rtol=1e-4, atol=1e-5)
    expected = 0.7 / (2 * alpha) * (sq_dist(w, u) - sq_dist(w_i, u))  # counts from the start
    assert (value - plain_value).item() == pytest.approx(float(expected), rel=1e-3)


@STACK_FIRST
@pytest.mark.parametrize("cloud_alpha, alpha", [("current", 3.0), ("previous", 30.0)])
def test_a_decay_of_alpha_reaches_u_in_the_same_round(stacked, cloud_alpha, alpha):
    algorithm = FedAMP(alpha=30, decay_every=2, sigma=20, cloud_alpha=cloud_alpha, start="cloud")
    federation, state = small.make_experiment(algorithm, "bn_net", stacked=stacked)
    state = small.run_rounds(federation, state, 2)  # round 2 is the first with alpha = 3
    names, rows = list(parameters(federation.clients.trainer)), federation.placement.row_of_client
    w = [flat({n: state.personal[n][rows[client]] for n in names}) for client in range(5)]
    done = trained(federation, state)
    u = [flat({n: done[client].start.personal[n] for n in names}) for client in range(5)]
    w, u = torch.stack(w).double(), torch.stack(u).double()
    torch.testing.assert_close(u, direct_xi(w, algorithm, alpha) @ w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("round_, alpha", [(0, 30.0), (3, 30 / 8)])
def test_u_has_the_alpha_of_its_round_however_old_the_mix_is(round_, alpha):
    algorithm = FedAMP(alpha=30, decay=0.5, decay_every=1, start="cloud")
    made = small.make_trainer(algorithm, "bn_net")
    w = small.initial_variables(made).personal
    mixed = {n: v + numbers(*v.shape, at=n) for n, v in select_prefix(w, ".cloud.").items()}
    now = Variables({}, w | add_prefix(mixed, ".cloud."))
    visit = algorithm.local(made.model, made.settings, round_)[0]
    moved = visit.apply(now, now, None).personal
    expected = {n: w[n] + alpha * (v - w[n]) for n, v in mixed.items()}
    small.assert_near({n: moved[n] for n in mixed}, expected)
    small.assert_near(select_prefix(moved, ".cloud."), expected)  # so nothing pulls at u_i


@pytest.mark.parametrize("alpha", [1e4, 1.0])
def test_the_pull_of_fedamp_does_not_depend_on_alpha_and_is_bounded(alpha):
    n, sigma = 7, 100.0
    rows, worst = numbers(n, 5, dtype=torch.float64), (sigma / 2) ** 0.5
    for scale in (1e-3, 0.1, 1.0, 3.0, worst, 30.0, 1e3):
        w = scale * rows
        gaps = w[:, None] - w
        A = torch.exp(-gaps.square().sum(2) / sigma) / sigma
        pull = (w - attention(gram_of(w), alpha, sigma, False) @ w) / alpha
        torch.testing.assert_close(pull, (A[..., None] * gaps).sum(1), rtol=1e-7, atol=1e-9)
        assert pull.norm(dim=1).max() <= (n - 1) / (2 * math.e * sigma) ** 0.5
    pair = torch.tensor([[0.0], [worst]], dtype=torch.float64)  # the distance of the strongest pull
    pull = (pair - attention(gram_of(pair), 1.0, sigma, False) @ pair).abs().max()
    assert pull == pytest.approx(1 / (2 * math.e * sigma) ** 0.5)


def clients_without_data(algorithm, rounds, clients=40, steps=25, lr=0.1, momentum=0.9):
    """The largest distance from the mean after each round of SGD on the penalty alone, with the
    numbers of FedLoRA's Table 1.
    """
    w, distances = numbers(clients, 9, dtype=torch.float64), []
    for round_ in range(rounds):
        xi, alpha = algorithm.mix(gram_of(w - w.mean(0)), w[:, :0], round_ - 1), 0.0
        alpha = algorithm.alpha_of(round_)
        u, velocity = torch.lerp(w, xi @ w, alpha), torch.zeros_like(w)
        for _ in range(steps):
            velocity = momentum * velocity + algorithm.lam / alpha * (w - u)
            w = w - lr * velocity
        distances.append(float((w - w.mean(0)).norm(dim=1).max()))
    return distances


def test_fedamp_stays_bounded_over_the_300_rounds_of_table_1():
    distances = clients_without_data(FedAMP(), 300)
    assert max(distances) < 20 and distances[-1] < distances[0]
    unbounded = clients_without_data(FedAMP(alpha_min=0), 300)
    assert not unbounded[-1] < 1e6  # alpha = 0.01 from round 180 on


@STACK_FIRST
def test_fedamp_brings_clients_together_and_a_convex_row_leaves_them_local(stacked):
    spread = {}
    for name, algorithm in (
        ("local", Local()),
        ("published", FedAMP(sigma=10.0)),
        ("convex", FedAMP(sigma=10.0, convex=True)),
    ):
        federation, state = small.make_experiment(algorithm, "bn_net", stacked=stacked)
        state = small.run_rounds(federation, state, 3)
        w = [state.personal[n].flatten(1) for n in parameters(federation.clients.trainer)]
        w = torch.cat(w, 1).double()
        spread[name] = float((w - w.mean(0)).norm(dim=1).mean())
    assert spread["published"] < 0.9 * spread["local"]
    assert spread["convex"] == pytest.approx(spread["local"], rel=0.01)


def test_alpha_decays_in_steps_down_to_its_bound():
    found = [FedAMP().alpha_of(t) for t in (0, 29, 30, 59, 60, 149, 150, 179, 180, 299)]
    assert found == pytest.approx([1e4, 1e4, 1e3, 1e3, 1e2, 1.0, 0.1, 0.1, 0.05, 0.05])
    assert FedAMP(alpha_min=0).alpha_of(299) == pytest.approx(1e-5)


def test_an_alpha_min_at_which_sgd_diverges_is_refused():
    model, train = small.make_model(), LocalTraining(lr=0.1, momentum=0.9)
    FedAMP(alpha_min=0.027).check(model, train)
    FedAMP(alpha_min=0).check(model, train)
    with pytest.raises(ValueError, match=r"alpha_min = 0.026: must be above .* = 0.0263"):
        FedAMP(alpha_min=0.026).check(model, train)
    for strength, grows in ((39.0, True), (37.0, False)):  # lr strength < 2 (1 + momentum) = 3.8
        w, v = 1.0, 0.0
        for _ in range(300):
            v = 0.9 * v + strength * w
            w -= 0.1 * v
        assert (abs(w) > 1e3) == grows


def direct_xi(rows, algorithm, alpha):
    """The weights of FedAMP from the models themselves, by the formulas one by one."""
    n, sigma = len(rows), algorithm.sigma
    xi = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            if i == j:
                continue
            if algorithm.heuristic:

                def cosine(h, i=i):
                    return F.cosine_similarity(rows[i].double(), rows[h].double(), dim=0)

                total = sum(torch.exp(sigma * cosine(h)) for h in range(n) if h != i)
                own = algorithm.self_weight or 1 / n
                xi[i, j] = (1 - own) * torch.exp(sigma * cosine(j)) / total
            else:
                x = (rows[i].double() - rows[j].double()).square().sum()
                xi[i, j] = alpha * torch.exp(-x / sigma) / sigma
        if algorithm.convex and xi[i].sum() > 1:
            xi[i] /= xi[i].sum()
        xi[i, i] = 1 - xi[i].sum()
    return xi


FEDAMPS = [
    FedAMP(alpha=50, sigma=30, decay_every=3, convex=True),
    FedAMP(alpha=50, sigma=30, decay_every=3, convex=True, cloud_alpha="previous"),
    FedAMP(alpha=50, sigma=30, decay_every=3, cloud_alpha="previous"),
    FedAMP(),
    FedAMP(convex=True),
    FedAMP(heuristic=True, sigma=25),
    FedAMP(heuristic=True, sigma=3, self_weight=0.4),
]


@pytest.mark.parametrize("algorithm", FEDAMPS)
@pytest.mark.parametrize("round_", [0, 2])  # alpha decays between rounds 2 and 3 (from 0)
def test_the_weights_of_fedamp_are_those_of_the_formulas(algorithm, round_):
    rows = numbers(5, 37) + torch.arange(5)[:, None] * 0.3
    keys = rows.double() - rows.double().mean(0) if not algorithm.heuristic else rows
    xi = algorithm.mix(gram_of(keys), torch.zeros(5, 0), round_)
    former = algorithm.cloud_alpha == "previous"
    alpha = algorithm.alpha_of(round_ if former else round_ + 1)
    scales_u = not (former or algorithm.convex or algorithm.heuristic)  # clients then go alpha far
    expected = direct_xi(rows, algorithm, 1.0 if scales_u else alpha)
    torch.testing.assert_close(xi, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(xi.sum(1), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-12)
    if algorithm.convex:
        assert (xi >= -1e-15).all()
    order = [3, 0, 4, 2, 1]
    again = algorithm.mix(gram_of(keys)[order][:, order], torch.zeros(5, 0), round_)
    torch.testing.assert_close(again, xi[order][:, order], rtol=1e-14, atol=1e-15)


def test_fedamp_with_a_tiny_sigma_mixes_nothing():
    gram = gram_of(numbers(5, 37))
    assert torch.equal(FedAMP(sigma=1e-3).mix(gram, gram[:, :0], 0), torch.eye(5).double())


def test_the_key_of_fedamp_is_centred_for_distances_alone():
    v = FedAMP().init(small.make_model(), None)
    assert FedAMP().upload(v, v, 0).mix.centered
    assert not FedAMP(heuristic=True).upload(v, v, 0).mix.centered


@STACK_FIRST
@pytest.mark.parametrize("how", [{}, {"convex": True}, {"heuristic": True, "sigma": 2.0}])
def test_the_cloud_models_are_the_mix_of_the_trained_parameters(stacked, how):
    algorithm = FedAMP(**{"alpha": 30, "sigma": 20, **how})
    federation, state = small.make_experiment(algorithm, "bn_net", stacked=stacked)
    state = small.run_rounds(federation, state, 1)
    done = trained(federation, state)
    after = small.run_rounds(federation, state, 1)
    rows = torch.stack(
        [
            flat({n: done[c].end.personal[n] for n in parameters(federation.clients.trainer)})
            for c in range(5)
        ]
    )
    xi = direct_xi(rows, algorithm, 30 if algorithm.convex else 1.0)
    assert (xi - torch.eye(5)).abs().max() > 0.02
    for client, at in federation.placement.row_of_client.items():
        cloud = {
            n.removeprefix(".cloud."): v[at]
            for n, v in after.personal.items()
            if n.startswith(".cloud.")
        }
        assert list(cloud) == list(parameters(federation.clients.trainer))  # no statistics
        torch.testing.assert_close(
            flat(cloud), (xi[client] @ rows.double()).float(), rtol=1e-6, atol=1e-8
        )
        own = {n: v[at] for n, v in after.personal.items() if not n.startswith(".cloud.")}
        # own start: w stays
        assert small.trees_equal(own, {n: done[client].end.personal[n] for n in own})


@STACK_FIRST
def test_the_cloud_model_stays_where_it_is_while_its_client_trains(stacked):
    federation, state = small.make_experiment(FedAMP(alpha=0.5), "bn_net", stacked=stacked)
    for done in trained(federation, small.run_rounds(federation, state, 1)).values():
        for name in parameters(federation.clients.trainer):
            assert torch.equal(
                done.end.personal[f".cloud.{name}"], done.start.personal[f".cloud.{name}"]
            )
            assert not torch.equal(done.end.personal[name], done.start.personal[name])


@pytest.mark.parametrize("how", [{}, {"convex": True}, {"heuristic": True, "sigma": 25.0}])
def test_identical_clients_of_fedamp_are_their_own_cloud(how):
    federation, state = small.make_experiment(
        FedAMP(**how), sizes=(6, 6, 6), same_sample=True, group_size=1
    )
    state = small.run_rounds(federation, state, 2)
    for name, value in parameters(federation.clients.trainer).items():
        assert torch.equal(state.personal[f".cloud.{name}"], state.personal[name])
        assert not torch.equal(state.personal[name][0], value)


@STACK_FIRST
def test_training_starts_at_the_own_model_or_at_the_cloud(stacked):
    for start in ("own", "cloud"):
        federation, state = small.make_experiment(
            FedAMP(start=start, heuristic=True, sigma=1.0), "bn_net", stacked=stacked
        )
        state = small.run_rounds(federation, state, 1)
        before = small.clone_tree(state.personal)
        for client, done in trained(federation, state).items():
            at = federation.placement.row_of_client[client]
            for name in federation.clients.trainer.model.initial:
                there = (
                    f".cloud.{name}" if start == "cloud" and f".cloud.{name}" in before else name
                )
                assert torch.equal(done.start.personal[name], before[there][at])
        assert any(
            (before[f".cloud.{n}"] != before[n]).any()
            for n in parameters(federation.clients.trainer)
        )


def test_fedamp_sends_its_parameters_up_and_receives_as_many():
    federation, state = small.make_experiment(FedAMP(), "bn_net", participation=0.6)
    _, metrics, _ = run_round(federation, state, evaluate=True, stop=False)
    assert (
        metrics["bytes_up"]
        == metrics["bytes_down"]
        == 3 * 4 * numel(parameters(federation.clients.trainer))
    )
    assert metrics["accuracy"] == metrics["accuracy_aggregated"]  # the mix moves no w


# FedCAC


@STACK_FIRST
@pytest.mark.parametrize("weights", ["samples", thorough_param("uniform")])
def test_fedcac_without_critical_entries_is_fedavg(stacked, weights):
    ends = []
    for algorithm in (FedCAC(tau=0, bn_stats="mean", weights=weights), FedAvg(weights=weights)):
        federation, state = small.make_experiment(
            algorithm, "bn_net", stacked=stacked, participation=0.8
        )
        ends.append(
            run_round(federation, small.run_rounds(federation, state, 2), evaluate=True, stop=False)
        )
    assert small.trees_equal(ends[0][0].shared, ends[1][0].shared)
    assert (ends[0][2]["accuracy"] == ends[1][2]["accuracy"]).all()


@STACK_FIRST
def test_fedcac_is_not_fedavg(stacked):
    ends = []
    for algorithm in (FedCAC(bn_stats="mean"), FedAvg()):
        federation, state = small.make_experiment(algorithm, stacked=stacked)
        ends.append(small.run_rounds(federation, state, 2).shared)
    assert min((v - ends[0][n]).abs().max() for n, v in ends[1].items()) > 1e-4


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.29, 0.4, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 3, 100, 257])
def test_the_critical_share_is_tau(tau, size):
    start, end = numbers(size), numbers(size, at=1)
    mask = critical_mask(start, end, tau)
    count = {(0.29, 100): 29}.get((tau, size), int(tau * size))
    assert mask.dtype == torch.bool and mask.sum() == count
    score = ((end - start) * end).abs()
    assert set(mask.nonzero().flatten().tolist()) == set(
        score.argsort(descending=True)[:count].tolist()
    )


def test_where_too_few_entries_moved_all_that_moved_are_critical():
    start, end = numbers(4, 5), numbers(4, 5)
    end.view(-1)[[3, 7, 11]] += 1  # 3 of 20 moved; tau asks for 10
    assert critical_mask(start, end, 0.5).flatten().nonzero().flatten().tolist() == [3, 7, 11]
    assert critical_mask(start, end, 0.1).sum() == 2
    assert not critical_mask(start, start, 0.5).any()  # nothing moved
    dead = torch.zeros(20)
    assert not critical_mask(
        numbers(20), dead, 0.5
    ).any()  # the score of a weight that is zero is zero


def direct_weights(masks, round_, beta):
    """FedCAC's collaborators from the masks themselves."""
    n = len(masks)

    def overlap(i, j):
        return 1 - (masks[i] != masks[j]).sum().item() / (2 * masks[i].sum().item())

    pairs = [overlap(i, j) for i in range(n) for j in range(n) if i != j]
    mean = sum(pairs) / len(pairs)
    threshold = mean + (round_ + 1) / beta * (max(pairs) - mean)
    weights = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        friends = [j for j in range(n) if j == i or overlap(i, j) >= threshold]
        weights[i, friends] = 1 / len(friends)
    return weights, pairs


@pytest.mark.parametrize("beta", [7, 1e9])
@pytest.mark.parametrize("round_", [0, 3, 5, 7])
def test_collaborators_overlap_by_at_least_the_threshold(beta, round_):
    masks = torch.rand(6, 113, generator=rng(1, "masks")) < torch.linspace(0.3, 0.6, 6)[:, None]
    gram = gram_of(masks)
    expected, pairs = direct_weights(masks, round_, beta)
    found = FedCAC(beta=beta).mix(gram, gram[:, :0], round_)
    assert torch.equal(found, expected)
    others = (found > 0).sum() - 6
    assert (others == 0) == (round_ + 1 > beta)
    if beta == 1e9:  # the threshold stays at the mean
        assert others == sum(p >= sum(pairs) / len(pairs) for p in pairs)
    order = [5, 2, 0, 4, 1, 3]
    again = FedCAC(beta=beta).mix(gram[order][:, order], gram[:, :0], round_)
    assert torch.equal(again, found[order][:, order])


def test_at_round_beta_the_best_pair_is_left_and_then_nobody():
    masks = torch.rand(5, 113, generator=rng(1, "pair")) < 0.5
    masks[3] = masks[1]
    masks[3, :4] = ~masks[1, :4]
    gram = gram_of(masks)

    def off(t):
        return FedCAC(beta=10).mix(gram, gram[:, :0], t).fill_diagonal_(0).nonzero().tolist()

    _, pairs = direct_weights(masks, 0, 10)
    assert off(9) in ([[1, 3]], [[3, 1]], [[1, 3], [3, 1]]) and max(pairs) < 1
    assert off(10) == []


@pytest.mark.parametrize("clients", [2, 3, 7, 13, 40])
def test_equal_overlaps_are_no_prey_of_rounding(clients):
    # all pairs overlap alike: 1 - 14/14 = 0
    masks = torch.eye(clients).repeat_interleave(7, 1).bool()
    masks = torch.cat([masks, torch.ones(clients, 11, dtype=torch.bool)], 1)
    gram = gram_of(masks)
    for round_ in (0, 5, 200):
        together = FedCAC().mix(gram, gram[:, :0], round_)
        assert torch.equal(together, torch.full_like(gram, 1 / clients))


def test_with_all_entries_critical_the_mix_is_the_uniform_mean():
    federation, state = small.make_experiment(FedCAC(tau=1.0), "bn_net", sizes=(11, 7, 6, 5, 3))
    done = trained(federation, state)
    after = small.run_rounds(federation, state, 1)
    for name, value in after.shared.items():
        w = torch.stack([done[c].end.shared[name] for c in range(5)]).double()
        uniform = w.mean(0).float()
        torch.testing.assert_close(
            after.personal[f".own.{name}"], uniform.expand_as(w), rtol=1e-6, atol=1e-8
        )
        p = torch.tensor([11, 7, 6, 5, 3]).double().view(5, *[1] * (w.dim() - 1)) / 32
        torch.testing.assert_close(value, (p * w).sum(0).float(), rtol=1e-6, atol=1e-8)
        assert after.personal[f".critical.{name}"].all()


@STACK_FIRST
def test_the_next_start_is_the_mix_where_critical_and_the_mean_elsewhere(stacked):
    algorithm = FedCAC(tau=0.3, beta=20)
    federation, state = small.make_experiment(algorithm, "bn_net", stacked=stacked)
    state = small.run_rounds(federation, state, 1)
    done = trained(federation, state)
    after = small.run_rounds(federation, state, 1)
    begun, names = trained(federation, after), list(parameters(federation.clients.trainer))
    masks = {
        c: {n: critical_mask(done[c].start.shared[n], done[c].end.shared[n], 0.3) for n in names}
        for c in range(5)
    }
    weights, _ = direct_weights(torch.stack([flat(masks[c]) for c in range(5)]), 1, 20)
    assert not torch.equal(weights, torch.eye(5)) and (weights == 0).any()
    for name in names:
        w = torch.stack([done[c].end.shared[name] for c in range(5)]).double()
        mixes = torch.einsum("ij,j...->i...", weights, w).float()
        for c in range(5):
            expected = torch.where(masks[c][name], mixes[c], after.shared[name])
            torch.testing.assert_close(begun[c].start.shared[name], expected, rtol=1e-6, atol=1e-8)
            assert masks[c][name].sum() == int(0.3 * masks[c][name].numel())
    model = federation.clients.trainer.model  # what is evaluated is what the next round starts from
    for c in range(5):
        v = Variables(after.shared, row(after.personal, federation.placement.row_of_client[c]))
        seen = algorithm.client_model(model, v)
        assert set(seen) == set(model.initial)
        assert all(torch.equal(seen[n], begun[c].start.shared[n]) for n in names)
        ended = algorithm.client_model(model, done[c].end)  # after training: what was trained
        assert all(torch.equal(ended[n], done[c].end.shared[n]) for n in names)


@STACK_FIRST
@pytest.mark.parametrize("bn_stats", ["local", "mean"])
def test_fedcac_trains_all_entries_as_fedavg_does_from_the_same_start(stacked, bn_stats):
    federation, state = small.make_experiment(FedCAC(bn_stats=bn_stats), "bn_net", stacked=stacked)
    state = small.run_rounds(federation, state, 1)
    plain_trainer = small.make_trainer(FedAvg(), "bn_net", stacked=False)
    for client, done in trained(federation, state).items():
        start = small.clone_tree(
            {
                n: (done.start.shared | done.start.personal)[n]
                for n in federation.clients.trainer.model.initial
            }
        )
        (reference,) = plain_trainer.train([client], start, {}, state.round)
        small.assert_near(
            {n: (done.end.shared | done.end.personal)[n] for n in start}, reference.end.shared
        )


def test_beyond_beta_critical_entries_are_the_clients_own():
    federation, state = small.make_experiment(FedCAC(beta=1), "bn_net")
    state = small.run_rounds(federation, state, 1)
    done = trained(federation, state)
    after = small.run_rounds(federation, state, 1)
    begun = trained(federation, after)
    for c in range(5):
        for name in parameters(federation.clients.trainer):
            mask = after.personal[f".critical.{name}"][federation.placement.row_of_client[c]]
            start = begun[c].start.shared[name]
            assert torch.equal(start[mask], done[c].end.shared[name][mask])
            assert torch.equal(start[~mask], after.shared[name][~mask])


def test_identical_clients_of_fedcac_are_fedavg():
    ends = []
    for algorithm in (FedCAC(bn_stats="mean"), FedAvg()):
        federation, state = small.make_experiment(
            algorithm, "bn_net", sizes=(6, 6, 6), same_sample=True, group_size=1
        )
        ends.append(small.run_rounds(federation, state, 3).shared)
    assert small.trees_equal(*ends)


def test_statistics_of_fedcac_stay_or_are_averaged():
    for bn_stats in ("local", "mean"):
        federation, state = small.make_experiment(FedCAC(bn_stats=bn_stats), "bn_net")
        stats = {
            n
            for n in federation.clients.trainer.model.initial
            if federation.clients.trainer.model.role(n) == "stats"
        }
        state = small.run_rounds(federation, state, 1)
        assert (
            stats <= set(state.shared if bn_stats == "mean" else state.personal)
            and len(stats) == 12
        )
        assert (stats & set(federation.aggregator.terms.flat.shapes)) == (
            stats if bn_stats == "mean" else set()
        )
        assert not any(
            f".{prefix}.{n}" in state.personal for n in stats for prefix in ("own", "critical")
        )
        if bn_stats == "local":
            assert all((state.personal[n][0] != state.personal[n][1]).any() for n in stats)


def test_fedcac_sends_its_leaves_once_and_a_bit_for_each():
    federation, state = small.make_experiment(FedCAC(), "bn_net")
    size = numel(parameters(federation.clients.trainer))
    _, metrics, _ = run_round(federation, state, evaluate=False, stop=False)
    assert metrics["bytes_up"] == 5 * (4 * size + -(-size // 8))
    assert metrics["bytes_down"] == 5 * 2 * 4 * size


# FedPAC


@dataclass(frozen=True)
class Alternating(Algorithm):
    """FedRep with FedPAC's phases: an own head, one epoch of it and then the body."""

    def init(self, model, rng):
        head, body = split(model.initial, lambda leaf: model.role(leaf) == "head")
        return Variables(body, head)

    def local(self, model, train, round_):
        loss, head = self.loss(model), lambda leaf: model.role(leaf) == "head"
        return (
            Phase(1, (Step(loss, head, sgd=lambda s: s._replace(lr=0.1)),)),
            Phase(train.epochs, (Step(loss, lambda leaf: not head(leaf)),)),
        )

    def client_model(self, model, v):
        return v.shared | v.personal


@dataclass(frozen=True)
class OwnHeads(FedPAC):
    """FedPAC whose heads are not mixed."""

    def mix(self, gram, aux, round_):
        return torch.eye(len(gram), dtype=torch.float64)


@NETWORKS
@STACK_FIRST
def test_fedpac_without_pull_and_mix_is_alternating_training(network, stacked):
    ends = []
    for algorithm in (OwnHeads(lam=0), Alternating()):
        federation, state = small.make_experiment(algorithm, network, stacked=stacked)
        ends.append(small.run_rounds(federation, state, 3))
    for part in ("shared", "personal"):
        found, expected = (getattr(end, part) for end in ends)
        assert all(torch.equal(found[n], v) for n, v in expected.items())


@STACK_FIRST
def test_the_pull_begins_in_round_2(stacked):
    ends = {}
    for lam in (0.0, 1.0):
        federation, state = small.make_experiment(OwnHeads(lam=lam), "bn_net", stacked=stacked)
        ends[lam] = [small.run_rounds(federation, state, 1)]
        ends[lam].append(
            small.run_rounds(
                federation,
                ends[lam][0]._replace(personal=small.clone_tree(ends[lam][0].personal)),
                1,
            )
        )
    assert small.trees_equal(ends[0.0][0].shared, ends[1.0][0].shared)
    body = [
        n
        for n in federation.clients.trainer.model.initial
        if federation.clients.trainer.model.role(n) == "body"
    ]
    assert min((ends[0.0][1].shared[n] - ends[1.0][1].shared[n]).abs().max() for n in body) > 1e-4


def test_the_heads_of_fedpac_are_mixed():
    ends = []
    for kind in (OwnHeads, FedPAC):
        federation, state = small.make_experiment(kind(lam=0), "bn_net")
        ends.append(small.run_rounds(federation, state, 1))
    heads = [
        n
        for n in federation.clients.trainer.model.initial
        if federation.clients.trainer.model.role(n) == "head"
    ]
    assert small.trees_equal(ends[0].shared, ends[1].shared) and len(heads) == 2
    assert all((ends[0].personal[n] - ends[1].personal[n]).abs().max() > 1e-3 for n in heads)


@pytest.mark.parametrize("padded", [False, True])
def test_the_pull_has_gradient_two_times_the_gap_over_its_numbers(padded):
    z, means = numbers(5, 7).requires_grad_(), numbers(6, 7, at=1)
    real = torch.tensor([True, True, True, False, False]) if padded else None
    batch = Batch(None, torch.tensor([0, 5, 5, 2, 0]), real, None, None)
    value = prototype_loss(z, means, batch)
    (grad,) = torch.autograd.grad(value, z)
    gap = (z - means[batch.y]).detach()
    count = 3 if padded else 5
    gap[count:] = 0
    torch.testing.assert_close(grad, 2 * gap / (count * 7))
    assert value.item() == pytest.approx(gap.square().sum().item() / (count * 7), rel=1e-6)
    if not padded:
        # the authors'
        assert value.item() == pytest.approx(F.mse_loss(z, means[batch.y]).item(), rel=1e-6)


def test_the_pull_reaches_the_body_and_not_the_head():
    made = small.make_trainer(FedPAC(lam=2.0), "bn_net")
    start = small.initial_variables(made)
    means, shares = numbers(*start.personal[".own.means"].shape), torch.full((small.CLASSES,), 0.1)
    now = Variables(start.shared | {".class.means": means, ".class.shares": shares}, start.personal)
    grads, values = {}, {}
    for lam in (0.0, 2.0):
        _, phase = phases_of(FedPAC(lam=lam).local(made.model, made.settings, 1))
        grads[lam], values[lam] = gradient(made, phase, now, batch_of(made))
    batch = batch_of(made)
    body = {
        n: v.clone().requires_grad_()
        for n, v in made.model.initial.items()
        if made.model.role(n) == "body"
    }
    term = 2.0 * F.mse_loss(
        made.model.features(made.model.initial | body, batch.x), (means / 0.1)[batch.y]
    )
    expected = torch.autograd.grad(term, list(body.values()))
    for name, grad in zip(body, expected, strict=True):
        torch.testing.assert_close(grads[2.0][name] - grads[0.0][name], grad, rtol=1e-3, atol=1e-5)
    assert (values[2.0] - values[0.0]).item() == pytest.approx(term.item(), rel=1e-4)
    assert {made.model.role(n) for n in grads[2.0]} == {"body", "norm"}  # what that phase trains


def direct_statistics(model, weights, x, y, classes):
    """h and V by the paper's formulas, class by class."""
    z, n = model.features(weights, x).double(), len(y)
    h, v = torch.zeros(classes, z.shape[1], dtype=torch.float64), 0.0
    for k in y.unique().tolist():
        of = z[y == k]
        pi, mu = len(of) / n, of.mean(0)
        h[k] = pi * mu
        v += pi * torch.trace(of.T @ of / len(of)) - pi**2 * mu.square().sum()
    return h, v / n


@NETWORKS
@STACK_FIRST
def test_h_and_v_are_those_of_the_paper(network, stacked):
    federation, state = small.make_experiment(FedPAC(), network, stacked=stacked)
    state = small.run_rounds(federation, state, 1)
    model = federation.clients.trainer.model.eval_mode()
    for client, done in trained(federation, state).items():
        data = federation.clients.trainer.feed.unshuffled_batch([client], all_samples=True)
        v = Variables(state.shared, row(state.personal, federation.placement.row_of_client[client]))
        h, variance = direct_statistics(
            model, federation.algorithm.client_model(model, v), data.x[0], data.y[0], 6
        )
        found = done.start.personal
        torch.testing.assert_close(found[".own.means"].double(), h, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            found[".own.variance"][0].double(), variance, rtol=1e-4, atol=1e-7
        )
        # before training, not after
        assert torch.equal(done.end.personal[".own.means"], found[".own.means"])
        assert variance > 0


def test_features_in_pieces_are_the_features(monkeypatch):
    made = small.make_trainer(FedPAC(), "bn_net")
    data = Batch(
        *(v if v is None else v[0] for v in made.feed.unshuffled_batch([0], all_samples=True))
    )
    whole = feature_statistics(made.model.eval_mode(), made.model.initial, data)
    monkeypatch.setattr("fedlora_mpi.components.prototypes.CHUNK", 4)
    pieces = feature_statistics(made.model.eval_mode(), made.model.initial, data)
    for a, b in zip(pieces, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("participation", [1.0, 0.6])
def test_the_class_means_are_those_of_all_samples_of_the_cohort(participation):
    federation, state = small.make_experiment(FedPAC(), "bn_net", participation=participation)
    done, chosen = trained(federation, state), federation.cohorts.sample(0).members
    after = small.run_rounds(federation, state, 1)
    model, features, labels = federation.clients.trainer.model.eval_mode(), [], []
    for client in chosen:
        data = federation.clients.trainer.feed.unshuffled_batch([client], all_samples=True)
        end = federation.algorithm.client_model(model, done[client].end)
        features.append(model.features(end, data.x[0]))
        labels.append(data.y[0])
    z, y = torch.cat(features), torch.cat(labels)
    batch = Batch(None, None, None, None, torch.tensor([0, 3, 0, 5, 2, 1.0]))
    own = numbers(*after.shared[".class.means"].shape, at=5)
    found = class_means(Variables(after.shared, {".own.means": own}), batch)
    for k in range(6):
        if (y == k).any():
            torch.testing.assert_close(found[k], z[y == k].mean(0), rtol=1e-5, atol=1e-6)
        elif batch.counts[k]:
            torch.testing.assert_close(found[k], own[k] * 11 / batch.counts[k])
    nobody = class_means(
        Variables({n: torch.zeros_like(v) for n, v in after.shared.items()}, {".own.means": own}),
        batch,
    )
    torch.testing.assert_close(nobody[3], own[3] * 11 / 5)
    assert torch.isfinite(nobody).all() and len(y.unique()) >= 4


@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_the_projection_is_the_nearest_point_of_the_simplex(n):
    rows = 2 * numbers(9, n, dtype=torch.float64)
    found = project_to_simplex(rows)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(9, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(project_to_simplex(found), found, rtol=0, atol=1e-14)
    gap = rows - found  # optimal: the gap is the same where positive, and smaller elsewhere
    top = gap.masked_fill(found == 0, -torch.inf).amax(1, keepdim=True)
    assert (((gap - top).abs() < 1e-12) | ((found == 0) & (gap <= top + 1e-12))).all()


def paper_q(h, variance, i):
    """Q of client i, from the h themselves."""
    n = len(h)
    q = torch.diag(variance.double())
    for a in range(n):
        for b in range(n):
            q[a, b] += ((h[i] - h[a]) * (h[i] - h[b])).sum()
    return q


@pytest.mark.parametrize("scale, spread", [(1.0, 1.0), (0.1, 1.0), (1.0, 0.05)])
def test_the_weights_of_heads_are_at_least_as_good_as_the_best_of_a_grid(scale, spread):
    h, variance = (
        scale * numbers(3, 4, dtype=torch.float64),
        spread * (0.2 + numbers(3, dtype=torch.float64).abs()),
    )
    centred = h - h.mean(0)
    alpha = best_weights(centred @ centred.T, variance)
    ticks = torch.linspace(0, 1, 201, dtype=torch.float64)
    grid = torch.stack(
        [torch.stack([a, b, 1 - a - b]) for a in ticks for b in ticks if a + b <= 1 + 1e-12]
    )
    for i in range(3):
        q = paper_q(h, variance, i)
        best = ((grid @ q) * grid).sum(1)
        mine = alpha[i] @ q @ alpha[i]
        assert mine <= best.min() + 1e-12
        near = grid[best.argmin()]
        assert (alpha[i] - near).abs().max() < 0.01


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_the_weights_of_heads_meet_the_conditions_of_the_optimum(n):
    h, variance = numbers(n, 5, dtype=torch.float64), 0.01 + numbers(n, dtype=torch.float64).abs()
    alpha = best_weights(gram_of(h - h.mean(0)), variance)
    assert (alpha >= 0).all() and (alpha.sum(1) - 1).abs().max() < 1e-13
    for i in range(n):
        q = paper_q(h, variance, i)
        slope = q @ alpha[i]
        assert slope[alpha[i] > 1e-5].max() - slope.min() < 1e-5 * torch.linalg.matrix_norm(q, 2)


def test_equal_distributions_share_heads_by_the_inverse_of_their_variances():
    variance = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    alpha = best_weights(torch.zeros(4, 4, dtype=torch.float64), variance)
    expected = (1 / variance) / (1 / variance).sum()
    torch.testing.assert_close(alpha, expected.expand(4, 4), rtol=1e-5, atol=0)


def test_far_apart_distributions_keep_their_heads():
    h = 100 * torch.eye(5, dtype=torch.float64)
    found = FedPAC().mix(h @ h.T, torch.ones(5, 1, dtype=torch.float64) * 0.01, 0)
    assert torch.equal(found, torch.eye(5).double())


def test_small_weights_of_heads_become_zero_but_never_all():
    variance = torch.tensor([1.0, 1.0, 5000.0], dtype=torch.float64)
    found = FedPAC().mix(torch.zeros(3, 3).double(), variance[:, None], 0)
    torch.testing.assert_close(
        found, torch.tensor([[0.5, 0.5, 0]]).double().expand(3, 3), rtol=1e-6, atol=1e-12
    )
    many = FedPAC().mix(torch.zeros(1200, 1200).double(), torch.ones(1200, 1).double(), 0)
    torch.testing.assert_close(many, torch.full_like(many, 1 / 1200), rtol=1e-9, atol=0)


def test_identical_clients_share_heads_evenly():
    federation, state = small.make_experiment(
        FedPAC(), "bn_net", sizes=(6, 6, 6), same_sample=True, group_size=1
    )
    state = small.run_rounds(federation, state, 2)
    assert all(torch.equal(v[0], v[1]) and torch.equal(v[0], v[2]) for v in state.personal.values())
    h, variance = state.personal[".own.means"].flatten(1), state.personal[".own.variance"]
    weights = FedPAC().mix(gram_of(h - h.mean(0)), variance.double(), 0)
    torch.testing.assert_close(weights, torch.full((3, 3), 1 / 3).double(), rtol=1e-6, atol=0)


@STACK_FIRST
def test_each_phase_of_fedpac_moves_its_part_alone(stacked):
    roles = {"head": ("head", "stats"), "body": ("body", "norm", "stats")}
    for phase, parts in roles.items():
        epochs = {"head": {"head_epochs": 2}, "body": {"head_epochs": 0}}[phase]
        made = small.make_trainer(FedPAC(**epochs), "bn_net", stacked=stacked)
        if phase == "head":
            only = type(
                "Only", (FedPAC,), {"local": lambda s, m, t, r: FedPAC.local(s, m, t, r)[:2]}
            )
            made = replace(made, transport=Transport(only(head_epochs=2)))
        start = small.initial_variables(made)
        for done in made.train(range(5), start.shared, small.repeat_rows(start.personal, 5), 1):
            before, after = (v.shared | v.personal for v in (done.start, done.end))
            for name in made.model.initial:
                assert torch.equal(before[name], after[name]) == (
                    made.model.role(name) not in parts
                ), name


def test_the_head_takes_its_own_learning_rate():
    train = replace(small.TRAIN, lr=1e-30)
    for head_lr in (0.1, 0.2):
        made = small.make_trainer(
            FedPAC(head_lr=head_lr), train=replace(train, momentum=0.0, batch_size=20)
        )
        start = small.initial_variables(made)
        (done,) = made.train([0], start.shared, small.repeat_rows(start.personal, 1), 0)
        data = made.feed.unshuffled_batch([0], all_samples=True)
        leaves = {n: v.clone().requires_grad_() for n, v in made.model.initial.items()}
        grads = torch.autograd.grad(
            F.cross_entropy(made.model(leaves, data.x[0]), data.y[0]), list(leaves.values())
        )
        for (name, value), grad in zip(made.model.initial.items(), grads, strict=True):
            if made.model.role(name) == "head":
                torch.testing.assert_close(
                    done.end.personal[name], value - head_lr * grad, rtol=1e-4, atol=1e-6
                )


def test_fedpac_sends_body_head_and_statistics():
    federation, state = small.make_experiment(FedPAC(), "bn_net")
    model = federation.clients.trainer.model
    classes, d = model.leaves[f"{model.head}.weight"].shape
    _, metrics, _ = run_round(federation, state, evaluate=False, stop=False)
    whole = numel(model.initial)
    assert metrics["bytes_up"] == 5 * 4 * (whole + classes * (2 * d + 1) + 1)
    assert metrics["bytes_down"] == 5 * 4 * (whole + classes * (d + 1))
    heads = {n for n in model.initial if model.role(n) == "head"}
    assert (
        not heads & set(federation.aggregator.terms.flat.shapes)
        and set(federation.aggregator.mixing.row_layout.shapes) == heads
    )


def test_fedpac_needs_a_linear_classifier():
    FedPAC().check(build("resnet8", {}, 10, (3, 32, 32), 1), LocalTraining())
    for module, classes in (
        (nn.Sequential(nn.Conv2d(3, 6, (7, 5)), nn.Flatten()), 6),
        (nn.Flatten(), 105),
    ):
        with pytest.raises(ValueError, match="needs a network with a body and a Linear classifier"):
            FedPAC().check(from_module(module, classes, small.SHAPE), LocalTraining())
