"""FedProx, SCAFFOLD and Ditto: FedAvg with a term in the loss."""

from dataclasses import dataclass, replace

import pytest
import small
import torch
from tiers import STACK_FIRST, thorough_param

from fedlora_mpi.algorithm import Batch, LocalTraining, Variables, phases_of
from fedlora_mpi.algorithms.ditto import Ditto
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.fedprox import FedProx
from fedlora_mpi.algorithms.local import Local
from fedlora_mpi.algorithms.scaffold import Scaffold
from fedlora_mpi.core.batch import cross_entropy
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.tree import numel, split

NETWORKS = pytest.mark.parametrize(
    "network", [thorough_param("cnn"), "bn_net", thorough_param("noisy_net")]
)
PLAIN = replace(small.TRAIN, momentum=0.0, weight_decay=0.01)


def numbers(*shape, at=0):
    return torch.randn(*shape, generator=rng(1, "test", *shape, at))


def doubles(tree, at):
    """``tree`` plus positive numbers that depend on ``at``, float64."""
    return {n: v.double() + 0.1 * numbers(*v.shape, at=at).double().abs() for n, v in tree.items()}


def apart(made):
    """(now, start) of one client, float64; every leaf differs in both and from every other."""
    v = small.initial_variables(made)
    return tuple(Variables(doubles(v.shared, at), doubles(v.personal, at + 2)) for at in (0, 1))


def batch(made, client=0, width=5):
    """The first mini-batch of a client's first epoch, float64."""
    one = made.feed.epoch([client], 0, 0).batch(1, 0, width)
    return Batch(*(v if v is None else v[0] for v in one))._replace(x=one.x[0].double())


def slopes(made, loss, now, start):
    """(value, {leaf: gradient, zero where there is none}) in every leaf that is no statistic."""
    halves = [small.clone_tree(half) for half in now[:2]]
    leaves = {n: v for half in halves for n, v in half.items() if not statistic(made, n)}
    for leaf in leaves.values():
        leaf.requires_grad_()
    value = loss(Variables(*halves), start, batch(made))
    how = {"allow_unused": True, "materialize_grads": True}
    return value.detach(), dict(
        zip(leaves, torch.autograd.grad(value, list(leaves.values()), **how), strict=True)
    )


def statistic(made, leaf):
    return made.model.role(leaf.removeprefix(".own.")) == "stats"


def parameters(made, tree):
    return {n: v for n, v in tree.items() if made.model.role(n) not in ("stats", None)}


def owned(tree):
    return {n.removeprefix(".own."): v for n, v in tree.items()}


def gap(a, b):
    """The largest difference of any two numbers."""
    return max(float((a[n] - b[n]).abs().max()) for n in b)


def loop_and_stack(algorithm, network, **how):
    """State of both paths after two rounds of a ragged cohort, as one tree each."""
    for stacked in (False, True):
        end = small.final_state(algorithm, network, stacked=stacked, **how)
        yield end.shared | {f"personal {n}": v for n, v in end.personal.items()}


# FedProx


@STACK_FIRST
@NETWORKS
def test_fedprox_without_mu_is_fedavg(network, stacked):
    ends = [
        small.final_state(algorithm, network, 3, stacked=stacked, participation=0.6)
        for algorithm in (FedProx(mu=0.0), FedAvg())
    ]
    assert small.trees_equal(ends[0].shared, ends[1].shared)


@pytest.mark.parametrize(
    "algorithm", [FedProx(mu=0.7), Ditto(lam=0.7)], ids=lambda a: type(a).__name__
)
def test_a_penalty_has_the_gradient_of_half_a_square(algorithm):
    made, off = (
        small.make_trainer(algorithm, "bn_net"),
        small.make_trainer(type(algorithm)(0.0), "bn_net"),
    )
    now, start = apart(made)
    (value, grads), (without, grads_without) = (
        slopes(m, m.algorithm.local(m.model, m.settings, 0)[0].steps[0].loss, now, start)
        for m in (made, off)
    )
    w = now.shared if isinstance(algorithm, FedProx) else owned(now.personal)
    delta = {n: w[n] - start.shared[n] for n in parameters(made, start.shared)}
    assert float(value - without) == pytest.approx(
        0.35 * sum(float((d**2).sum()) for d in delta.values()), rel=1e-12
    )
    prefix = "" if isinstance(algorithm, FedProx) else ".own."
    pull = {n: grads[n] - grads_without[n] for n in grads}
    assert (
        gap({n: pull.pop(prefix + n) for n in delta}, {n: 0.7 * d for n, d in delta.items()})
        < 1e-12
    )
    assert not any(v.any() for v in pull.values())


@STACK_FIRST
@pytest.mark.parametrize(
    "algorithm", [FedProx(mu=20.0), Ditto(lam=20.0)], ids=lambda a: type(a).__name__
)
def test_with_lr_times_mu_one_every_step_starts_over_from_the_received_model(algorithm, stacked):
    settings = LocalTraining(2, 12, lr=0.05, momentum=0.0)
    made = small.make_trainer(
        algorithm, train=settings, stacked=stacked, samples=small.make_feed(sizes=(12,))
    )
    v = small.initial_variables(made)
    rows = {n: w + 0.01 * numbers(*w.shape) for n, w in small.repeat_rows(v.personal, 1).items()}
    (done,) = made.train([0], v.shared, rows, 0)

    def slope(w, epoch):
        data = made.feed.epoch([0], 0, epoch).batch(1, 0, 12)
        leaves = {n: x.clone().requires_grad_() for n, x in w.items()}
        loss = cross_entropy(
            made.model(leaves, data.x[0]), Batch(data.x[0], data.y[0], *[None] * 3)
        )
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    begin = (
        v.shared if isinstance(algorithm, FedProx) else owned({n: x[0] for n, x in rows.items()})
    )
    first = {n: v.shared[n] - 0.05 * g for n, g in slope(begin, 0).items()}
    second = {n: v.shared[n] - 0.05 * g for n, g in slope(first, 1).items()}
    end = done.end.shared if isinstance(algorithm, FedProx) else owned(done.end.personal)
    assert gap(end, second) < 1e-6
    assert gap(end, first) > 1e-4


@NETWORKS
def test_fedprox_with_mu_stays_nearer_to_where_it_started(network):
    federation, state = small.make_experiment(FedProx(mu=1.0), network)
    (_, prox), (_, avg) = (
        small.final_state(algorithm, network, 1)[1:3] for algorithm in (FedProx(mu=1.0), FedAvg())
    )
    way = [
        sum(
            float(((end[n] - v) ** 2).sum())
            for n, v in parameters(federation.clients.trainer, state.shared).items()
        )
        for end in (prox, avg)
    ]
    assert way[0] < 0.9 * way[1]


@pytest.mark.parametrize("network", ["cnn", thorough_param("bn_net"), thorough_param("noisy_net")])
@pytest.mark.parametrize(
    "algorithm", [FedProx(mu=0.5), Ditto(lam=0.5)], ids=lambda a: type(a).__name__
)
def test_fedprox_and_ditto_agree_on_loop_and_stack(algorithm, network):
    loop, stack = loop_and_stack(algorithm, network)
    small.assert_near(stack, loop)


# SCAFFOLD


@STACK_FIRST
@NETWORKS
def test_scaffolds_first_round_is_fedavg_and_its_second_is_not(network, stacked):
    how = {"network": network, "stacked": stacked, "train": PLAIN}
    federation, state = small.make_experiment(Scaffold(), **how)
    plain_federation, plain = small.make_experiment(FedAvg(weights="uniform"), **how)
    state, plain = (
        small.run_rounds(federation, state, 1),
        small.run_rounds(plain_federation, plain, 1),
    )
    assert small.trees_equal({n: state.shared[n] for n in plain.shared}, plain.shared)
    state, plain = (
        small.run_rounds(federation, state, 1),
        small.run_rounds(plain_federation, plain, 1),
    )
    assert gap(state.shared, parameters(federation.clients.trainer, plain.shared)) > 1e-4


def test_the_correction_has_the_gradient_c_minus_c_i():
    made = small.make_trainer(Scaffold(), "bn_net", train=PLAIN)
    now, start = apart(made)
    plain = small.make_trainer(FedAvg(), "bn_net")
    (value, grads), (without, expected) = (
        slopes(m, m.algorithm.local(m.model, m.settings, 0)[0].steps[0].loss, v, start)
        for m, v in (
            (made, now),
            (plain, Variables({n: now.shared[n] for n in made.model.leaves}, {})),
        )
    )
    difference = {
        n: start.shared[f".c.{n}"] - start.personal[f".c_i.{n}"]
        for n in parameters(made, now.shared)
    }
    assert gap({n: grads[n] - expected[n] for n in difference}, difference) < 1e-12
    assert abs(value - without) > 1e-3
    assert not any(grads[n].any() for n in grads if n.startswith((".c.", ".c_i.")))


@STACK_FIRST
def test_a_control_variate_is_the_mean_gradient_of_the_clients_steps(stacked):
    """Under option II, eqs. (3) and (4) give c_i+ = (1/K) sum_k grad f_i(y_k), whatever c and c_i
    were.
    """
    made = small.make_trainer(Scaffold(), train=replace(PLAIN, epochs=2), stacked=stacked)
    v = small.initial_variables(made)
    shared = v.shared | {
        n: 0.1 * numbers(*w.shape) for n, w in v.shared.items() if n.startswith(".c.")
    }
    rows = {n: 0.1 * numbers(*w.shape, at=1) for n, w in small.repeat_rows(v.personal, 5).items()}
    for done in made.train(range(5), shared, rows, 0):
        y, total, steps = {n: w.clone() for n, w in parameters(made, shared).items()}, {}, 0
        for epoch in range(2):
            order = made.feed.epoch([done.client], 0, epoch)
            for at in range(0, small.SIZES[done.client], 5):
                data = order.batch(1, at, min(5, small.SIZES[done.client] - at))
                leaves = {n: w.clone().requires_grad_() for n, w in y.items()}
                loss = cross_entropy(
                    made.model(leaves, data.x[0]), Batch(data.x[0], data.y[0], *[None] * 3)
                )
                for n, g in zip(
                    leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True
                ):
                    g = g + 0.01 * y[n]  # weight decay is part of f_i
                    total[n] = total.get(n, 0) + g
                    y[n] = y[n] - 0.05 * (g - rows[f".c_i.{n}"][done.client] + shared[f".c.{n}"])
                steps += 1
        small.assert_near(
            {n: done.end.personal[f".c_i.{n}"] for n in total},
            {n: t / steps for n, t in total.items()},
            rtol=1e-4,
        )


@STACK_FIRST
@pytest.mark.parametrize("participation", [thorough_param(1.0), 0.4])
def test_c_is_the_mean_of_all_c_i_at_any_participation(stacked, participation):
    how = {"stacked": stacked, "participation": participation, "train": PLAIN}
    federation, state = small.make_experiment(Scaffold(), "bn_net", **how)
    for _ in range(3):
        before = small.clone_tree(state.personal)
        chosen = federation.cohorts.sample(state.round).members
        state = small.run_rounds(federation, state, 1)
        mean = {n.replace(".c_i.", ".c."): v.mean(0) for n, v in state.personal.items()}
        assert max(float(v.abs().max()) for v in mean.values()) > 1e-2
        assert gap(state.shared, mean) < 1e-6
        for client in range(5):
            moved = [
                not torch.equal(v[client], before[n][client]) for n, v in state.personal.items()
            ]
            assert all(moved) if client in chosen else not any(moved)


@STACK_FIRST
def test_scaffold_on_identical_clients_is_fedavg(stacked):
    how = {
        "network": "bn_net",
        "sizes": (7, 7, 7),
        "same_sample": True,
        "stacked": stacked,
        "train": PLAIN,
    }
    scaffold, fedavg = (
        small.final_state(a, rounds=3, **how).shared for a in (Scaffold(), FedAvg())
    )
    small.assert_near({n: scaffold[n] for n in fedavg}, fedavg, rtol=2e-5)


@STACK_FIRST
def test_the_server_goes_its_own_way_with_parameters_and_takes_the_mean_of_statistics(stacked):
    how = {"network": "bn_net", "stacked": stacked, "train": PLAIN}
    federation, state = small.make_experiment(Scaffold(), **how)
    x = small.clone_tree(state.shared)
    one, far = (
        small.final_state(Scaffold(server_lr=lr), rounds=1, **how).shared for lr in (1.0, 1.7)
    )
    expected = {n: x[n] + 1.7 * (one[n] - x[n]) for n in parameters(federation.clients.trainer, x)}
    assert gap(far, expected) < 1e-6
    others = [n for n in x if n not in expected]
    assert len(others) > len(expected) and all(torch.equal(far[n], one[n]) for n in others)


@dataclass(frozen=True)
class Flat:
    """An algorithm whose clients minimise a_i / 2 (w - b_i)^2 instead; every client has its own
    a_i, b_i.
    """

    def logits(self, model, v, x):
        return x.new_zeros(len(x), small.CLASSES)  # a constant cross-entropy

    def local(self, model, train, round_):
        items = super().local(model, train, round_)
        (phase,) = phases_of(items)
        (step,) = phase.steps

        def loss(now, start, batch):
            a, b = quadratic(batch.counts.sum())
            bowls = sum(
                a / 2 * ((w - b) ** 2).sum() for n, w in now.shared.items() if model.role(n)
            )
            return step.loss(now, start, batch) + bowls

        flat = phase._replace(steps=(step._replace(loss=loss),))
        return tuple(flat if item is phase else item for item in items)


def quadratic(samples):
    """(a, b) of a client by its number of samples."""
    return 1 + samples % 4, samples / 3


@dataclass(frozen=True)
class FlatScaffold(Flat, Scaffold):
    pass


@dataclass(frozen=True)
class FlatFedAvg(Flat, FedAvg):
    pass


@pytest.mark.parametrize("participation", [thorough_param(1.0), 0.6])
def test_scaffold_reaches_the_optimum_of_heterogeneous_quadratics_where_fedavg_stalls(
    participation,
):
    sizes = (11, 9, 6, 3, 2)  # 9, 6, 6, 3 and 3 local steps
    a, b = quadratic(torch.tensor(sizes, dtype=torch.float64))
    optimum = float((a * b).sum() / a.sum())
    how = {"sizes": sizes, "train": LocalTraining(3, 5, lr=0.05, momentum=0.0), "stacked": True}

    def worst(algorithm, rounds, last):
        """The largest distance from the optimum at the end of any of the ``last`` of the rounds."""
        federation, state = small.make_experiment(algorithm, participation=participation, **how)
        state, gaps = small.run_rounds(federation, state, rounds - last), []
        for _ in range(last):
            state = small.run_rounds(federation, state, 1)
            w = [state.shared[n] for n in federation.clients.trainer.model.leaves]
            gaps.append(max(float((v - optimum).abs().max()) for v in w))
        return max(gaps)

    assert worst(FlatScaffold(), 40, last=1) < 2e-6  # 2.4e-7, a unit in the last place
    # its cohorts pass near the optimum by chance
    assert worst(FlatFedAvg(weights="uniform"), 15, last=5) > 6e-2


@pytest.mark.parametrize("network", ["cnn", thorough_param("bn_net"), thorough_param("noisy_net")])
def test_scaffold_agrees_on_loop_and_stack(network):
    """c and c_i are differences of parameters over K lr >= 0.15, which magnifies rounding: in
    float64.
    """

    def variate(leaf):
        return leaf.startswith((".c.", "personal"))

    loop, stack = loop_and_stack(Scaffold(server_lr=1.3), network, train=PLAIN)
    small.assert_near(split(stack, variate)[1], split(loop, variate)[1])
    loop, stack = loop_and_stack(Scaffold(server_lr=1.3), network, train=PLAIN, fine=True)
    small.assert_near(stack, loop, rtol=1e-6)


def test_scaffold_refuses_momentum():
    Scaffold().check(small.make_model(), LocalTraining(momentum=0.0))
    with pytest.raises(ValueError, match="name = scaffold: needs train.momentum = 0, not 0.9"):
        Scaffold().check(small.make_model(), LocalTraining())


# Ditto


@STACK_FIRST
@NETWORKS
@pytest.mark.parametrize("lam", [thorough_param(0.0), 0.7])
def test_dittos_shared_model_is_fedavg_whatever_lam(network, stacked, lam):
    how = {"network": network, "stacked": stacked, "participation": 0.6}
    for weights in ("samples", "uniform"):
        ditto, fedavg = (
            small.final_state(a, rounds=3, **how)
            for a in (Ditto(lam=lam, weights=weights), FedAvg(weights=weights))
        )
        assert small.trees_equal(ditto.shared, fedavg.shared)


@STACK_FIRST
@pytest.mark.parametrize("weights, shares", [("uniform", (0.5, 0.5)), ("samples", (0.25, 0.75))])
def test_dittos_server_averages_uniformly_by_default(stacked, weights, shares):
    algorithm = Ditto() if weights == "uniform" else Ditto(weights=weights)
    federation, state = small.make_experiment(algorithm, sizes=(1, 3), stacked=stacked)
    (group,) = federation.placement.groups
    trained = federation.clients.trainer.train(group, state.shared, state.personal, 0)
    ends = {done.client: done.end.shared for done in trained}
    mean = {n: shares[0] * ends[0][n] + shares[1] * ends[1][n] for n in state.shared}
    small.assert_near(small.run_rounds(federation, state, 1).shared, mean)


@STACK_FIRST
@NETWORKS
def test_ditto_without_lam_is_local_and_with_it_is_not(network, stacked):
    local, off, on = (
        small.final_state(a, network, 3, stacked=stacked).personal
        for a in (Local(), Ditto(lam=0.0), Ditto(lam=0.7))
    )
    assert small.trees_equal(owned(off), local)
    assert all(gap({"": on[f".own.{n}"]}, {"": v}) > 1e-5 for n, v in local.items() if v.dim() > 2)


def test_ditto_far_from_everyone_is_drawn_to_the_received_model():
    settings = LocalTraining(3, 5, lr=1e-4, momentum=0.0)
    made = small.make_trainer(Ditto(lam=1e4), "bn_net", train=settings)
    v = small.initial_variables(made)
    rows = {n: w + numbers(*w.shape).abs() for n, w in small.repeat_rows(v.personal, 5).items()}
    for done in made.train(range(5), v.shared, rows, 0):
        end, start = owned(done.end.personal), owned(done.start.personal)
        assert gap(end, parameters(made, v.shared)) < 2e-3
        assert gap(start, parameters(made, v.shared)) > 1


@STACK_FIRST
def test_ditto_judges_and_keeps_what_is_the_clients_own(stacked):
    federation, state = small.make_experiment(Ditto(), "bn_net", participation=0.6, stacked=stacked)
    state, chosen = small.run_rounds(federation, state, 1), federation.cohorts.sample(1).members
    before = small.clone_tree(state.personal)
    state = small.run_rounds(federation, state, 1)
    for client in range(5):
        moved = [not torch.equal(v[client], before[n][client]) for n, v in state.personal.items()]
        assert all(moved) if client in chosen else not any(moved)
        v = Variables(state.shared, {n: w[client] for n, w in state.personal.items()})
        assert small.trees_equal(
            federation.algorithm.client_model(federation.clients.trainer.model, v),
            owned(v.personal),
        )


# All three


@pytest.mark.parametrize(
    "algorithm, parameters_too",
    [(FedProx(), 0), (Scaffold(), 1), (Ditto(), 0)],
    ids=["fedprox", "scaffold", "ditto"],
)
def test_uploads_and_downloads_have_the_stated_size(algorithm, parameters_too):
    federation, state = small.make_experiment(algorithm, "bn_net")
    initial = federation.clients.trainer.model.initial
    size = numel(initial) + parameters_too * numel(parameters(federation.clients.trainer, initial))
    assert federation.aggregator.terms.flat.size == numel(state.shared) == size


@pytest.mark.parametrize(
    "wrong, text",
    [
        (lambda: FedProx(mu=-0.1), "mu = -0.1: must be"),
        (lambda: Scaffold(server_lr=0.0), "server_lr = 0.0: must be"),
        (lambda: Ditto(lam=-1.0), "lam = -1.0: must be"),
    ],
)
def test_impossible_corrections_are_refused(wrong, text):
    with pytest.raises(ValueError, match=text):
        wrong()
