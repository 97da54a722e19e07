"""APFL, pFedMe and Per-FedAvg: a client's own model by mixture, by proximal point, by one more
step.
"""

from dataclasses import dataclass, replace

import pytest
import small
import torch
from tiers import STACK_FIRST, thorough_param

from fedlora_mpi.algorithm import Batch, LocalTraining, Phase, Step, Transport, Variables, phases_of
from fedlora_mpi.algorithms.apfl import APFL
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.local import Local
from fedlora_mpi.algorithms.perfedavg import PerFedAvg
from fedlora_mpi.algorithms.pfedme import PFedMe
from fedlora_mpi.core.batch import cross_entropy, split_batch
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.tree import numel

NETWORKS = pytest.mark.parametrize(
    "network", [thorough_param("cnn"), "bn_net", thorough_param("noisy_net")]
)
PLAIN = replace(small.TRAIN, momentum=0.0)
CLIENTS = range(5)


def numbers(*shape, at=0):
    return torch.randn(*shape, generator=rng(1, "test", *shape, at))


def doubles(tree, at):
    """``tree`` plus positive numbers that depend on ``at``, float64."""
    return {n: v.double() + 0.1 * numbers(*v.shape, at=at).double().abs() for n, v in tree.items()}


def batch(made, client=0, epoch=0, first=0, width=5, dtype=torch.float64):
    """A mini-batch of one client in round 0."""
    one = made.feed.epoch([client], 0, epoch).batch(1, first, width)
    return Batch(*(v if v is None else v[0] for v in one))._replace(x=one.x[0].to(dtype))


def slope(made, w, data):
    """{leaf: gradient of the cross-entropy} of a network without statistics, by plain autograd."""
    leaves = {n: v.detach().clone().requires_grad_() for n, v in w.items()}
    loss = cross_entropy(made.model(leaves, data.x), data)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def owned(tree):
    return {n.removeprefix(".own."): v for n, v in tree.items() if n.startswith(".own.")}


def gap(a, b):
    """The largest difference of any two numbers."""
    return max(float((a[n] - b[n]).abs().max()) for n in b)


def parameters(made, tree):
    return {n: v for n, v in tree.items() if made.model.role(n) not in ("stats", None)}


def moved_rows(made, scale=0.05):
    """(shared, personal rows) whose own models differ from the shared one and from each other."""
    v = small.initial_variables(made)
    rows = small.repeat_rows(v.personal, 5)
    return v.shared, {
        n: w + scale * numbers(*w.shape).abs() if n != ".mix.alpha" else w for n, w in rows.items()
    }


def ended(algorithm, network="cnn", rounds=3, **how):
    return small.final_state(algorithm, network, rounds, **how)


# APFL


@STACK_FIRST
@NETWORKS
@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])
def test_apfls_shared_model_is_fedavg(network, stacked, adaptive):
    how = {"stacked": stacked, "participation": 0.6}
    apfl, fedavg = (ended(a, network, **how) for a in (APFL(adaptive=adaptive), FedAvg()))
    assert small.trees_equal(apfl.shared, fedavg.shared)


@STACK_FIRST
@NETWORKS
def test_apfl_with_alpha_one_is_local(network, stacked):
    apfl = ended(APFL(alpha=1.0, adaptive=False), network, stacked=stacked)
    local = ended(Local(), network, stacked=stacked)
    assert small.trees_equal(owned(apfl.personal), local.personal)
    half = ended(APFL(adaptive=False), network, stacked=stacked)
    assert gap(owned(half.personal), local.personal) > 1e-3


@STACK_FIRST
@NETWORKS
def test_apfl_with_alpha_zero_predicts_by_the_shared_model_and_moves_no_parameter(network, stacked):
    federation, state = small.make_experiment(
        APFL(alpha=0.0, adaptive=False), network, stacked=stacked
    )
    begin = small.clone_tree(state.personal)
    state = small.run_rounds(federation, state, 2)
    for n, v in parameters(federation.clients.trainer, state.shared).items():
        assert torch.equal(state.personal[f".own.{n}"], begin[f".own.{n}"])
        mine = Variables(state.shared, {m: w[1] for m, w in state.personal.items()})
        assert torch.equal(
            federation.algorithm.client_model(federation.clients.trainer.model, mine)[n], v
        )


def test_the_gradients_of_alpha_and_v_are_those_of_the_paper():
    made = small.make_trainer(APFL(alpha=0.3))
    v = small.initial_variables(made)
    alpha = {".mix.alpha": torch.tensor(0.3).double()}
    now = Variables(
        doubles(v.shared, 1),
        doubles({n: w for n, w in v.personal.items() if n not in alpha}, 2) | alpha,
    )
    own, data = owned(now.personal), batch(made)
    vbar = {
        n: now.personal[".mix.alpha"] * own[n] + (1 - now.personal[".mix.alpha"]) * w
        for n, w in now.shared.items()
    }
    g = slope(made, vbar, data)
    mixing, training = made.algorithm.local(made.model, made.settings, 0)
    for step in (*mixing.steps, training.steps[0]):
        leaves = {n: w for n, w in now.personal.items() if step.trains(n)}
        for leaf in leaves.values():
            leaf.requires_grad_()
        found = dict(
            zip(
                leaves,
                torch.autograd.grad(step.loss(now, now, data), list(leaves.values())),
                strict=True,
            )
        )
        for leaf in leaves.values():
            leaf.requires_grad_(False)
        if ".mix.alpha" in found:
            expected = sum(((own[n] - now.shared[n]) * g[n]).sum() for n in g)
            assert list(found) == [".mix.alpha"] and abs(found[".mix.alpha"] - expected) < 1e-12
        else:
            assert (
                gap(owned(found), {n: now.personal[".mix.alpha"] * w for n, w in g.items()}) < 1e-12
            )


@STACK_FIRST
@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_alpha_moves_once_a_round_on_one_batch_of_its_own(stacked, decay):
    made = small.make_trainer(APFL(alpha=0.5, alpha_decay=decay), stacked=stacked)
    shared, rows = moved_rows(made)
    for done in made.train(CLIENTS, shared, rows, 0):
        own = owned({n: v[done.client] for n, v in rows.items()})
        data = batch(
            made,
            done.client,
            "alpha 0",
            width=min(5, small.SIZES[done.client]),
            dtype=torch.float32,
        )
        g = slope(made, {n: 0.5 * own[n] + 0.5 * shared[n] for n in own}, data)
        along = float(sum(((own[n] - shared[n]) * g[n]).sum() for n in g)) + decay * 0.5
        assert abs(0.05 * along) > 1e-5
        assert float(done.end.personal[".mix.alpha"]) == pytest.approx(0.5 - 0.05 * along, abs=1e-6)


@STACK_FIRST
def test_alpha_goes_to_the_better_model_and_stays_between_zero_and_one(stacked):
    """v_i is a step down the loss from w for even clients, and a step up for odd ones."""
    made = small.make_trainer(
        APFL(), train=LocalTraining(1, 5, lr=1e4, momentum=0.0), stacked=stacked
    )
    (mixing, _), v = (
        made.algorithm.local(made.model, made.settings, 0),
        small.initial_variables(made),
    )
    rows = small.repeat_rows(v.personal, 5)
    for client in CLIENTS:
        width = min(5, small.SIZES[client])
        for n, g in slope(
            made, v.shared, batch(made, client, "alpha 0", width=width, dtype=torch.float32)
        ).items():
            rows[f".own.{n}"][client] -= (-1) ** client * 0.05 * g

    @dataclass(frozen=True)
    class Mixing(APFL):
        def local(self, model, train, round_):
            return (mixing,)

    ends = replace(made, transport=Transport(Mixing())).train(CLIENTS, v.shared, rows, 0)
    assert [float(done.end.personal[".mix.alpha"]) for done in ends] == [1.0, 0.0, 1.0, 0.0, 1.0]


@STACK_FIRST
def test_the_step_on_alpha_moves_no_statistics(stacked):
    """In round 1 v_i = w, so alpha_i has no gradient, and all else must be as without the step."""
    one, other = (
        ended(APFL(adaptive=a), "bn_net", 1, stacked=stacked).personal for a in (True, False)
    )
    assert small.trees_equal(one, other)
    one, other = (
        ended(APFL(adaptive=a), "bn_net", 2, stacked=stacked).personal for a in (True, False)
    )
    assert len(set(one[".mix.alpha"].tolist())) == 5 and set(other[".mix.alpha"].tolist()) == {0.5}


def test_v_and_w_step_at_the_same_time():
    made = small.make_trainer(
        APFL(alpha=0.3, adaptive=False), train=LocalTraining(1, 12, lr=0.5, momentum=0.0)
    )
    shared, rows = moved_rows(made)
    (done,) = made.train([0], shared, {n: v[:1] for n, v in rows.items()}, 0)
    own, data = (
        owned({n: v[0] for n, v in rows.items()}),
        batch(made, width=11, dtype=torch.float32),
    )
    g = slope(made, {n: 0.3 * own[n] + 0.7 * shared[n] for n in own}, data)
    assert gap(owned(done.end.personal), {n: own[n] - 0.5 * 0.3 * g[n] for n in g}) < 1e-6
    late = {
        n: w - 0.5 * d
        for (n, w), d in zip(shared.items(), slope(made, shared, data).values(), strict=True)
    }
    g = slope(made, {n: 0.3 * own[n] + 0.7 * late[n] for n in own}, data)
    assert gap(owned(done.end.personal), {n: own[n] - 0.5 * 0.3 * g[n] for n in g}) > 1e-4


# pFedMe


def by_hand(made, w, steps, lam, inner, outer, data, decay=0.0):
    """(theta, w) after Algorithm 1's loop over the batches ``data``, theta from w; ``decay``: of
    theta's weights.
    """
    theta = small.clone_tree(w)
    for one in data:
        for _ in range(steps):
            g = slope(made, theta, one)
            theta = {n: t - inner * (g[n] + lam * (t - w[n]) + decay * t) for n, t in theta.items()}
        w = {n: v - outer * lam * (v - theta[n]) for n, v in w.items()}
    return theta, w


@STACK_FIRST
def test_pfedme_is_algorithm_1(stacked):
    """Two batches: theta goes on from batch to batch, and starts at the received model, not where
    it was.
    """
    settings = LocalTraining(1, 6, lr=0.04, momentum=0.0)
    samples = small.make_feed(sizes=(12,))
    made = small.make_trainer(
        PFedMe(lam=7.0, inner_steps=3, inner_lr=0.06),
        train=settings,
        stacked=stacked,
        samples=samples,
    )
    shared, rows = moved_rows(made, 0.3)
    (done,) = made.train([0], shared, {n: v[:1] for n, v in rows.items()}, 0)
    data = [batch(made, first=at, width=6, dtype=torch.float32) for at in (0, 6)]
    theta, w = by_hand(made, shared, 3, 7.0, 0.06, 0.04, data)
    assert gap(owned(done.end.personal), theta) < 1e-6 and gap(done.end.shared, w) < 1e-6
    again, _ = by_hand(made, w, 3, 7.0, 0.06, 0.04, data)
    assert gap(theta, w) > 1e-4 and gap(again, theta) > 1e-4


def test_the_weight_decay_of_pfedme_is_of_theta_alone():
    made = small.make_trainer(
        PFedMe(lam=7.0, inner_steps=2),
        train=LocalTraining(1, 12, lr=0.04, momentum=0.0, weight_decay=0.5),
    )
    v = small.initial_variables(made)
    (done,) = made.train([0], v.shared, small.repeat_rows(v.personal, 1), 0)
    theta, w = by_hand(
        made, v.shared, 2, 7.0, 0.09, 0.04, [batch(made, width=11, dtype=torch.float32)], 0.5
    )
    assert gap(owned(done.end.personal), theta) < 1e-6 and gap(done.end.shared, w) < 1e-6


def test_the_pull_of_pfedme_has_the_gradient_of_half_a_square():
    made, off = (small.make_trainer(PFedMe(lam=lam), "bn_net") for lam in (0.7, 0.0))
    v = small.initial_variables(made)
    found = []
    for m in (made, off):
        now = Variables(doubles(v.shared, 1), doubles(v.personal, 2))
        inner, outer = phases_of(m.algorithm.local(m.model, m.settings, 0))[0].steps
        rows = [
            {n: w.requires_grad_() for n, w in half.items() if step.trains(n)}
            for half, step in zip((now.personal, now.shared), (inner, outer), strict=True)
        ]
        values = [step.loss(now, now, batch(m)) for step in (inner, outer)]
        found.append(
            [
                torch.autograd.grad(value, list(half.values()))
                for value, half in zip(values, rows, strict=True)
            ]
        )
        names = list(rows[1])
    delta = {n: (now.personal[f".own.{n}"] - now.shared[n]).detach() for n in names}
    inner, outer = (
        [a - b for a, b in zip(*pair, strict=True)] for pair in zip(*found, strict=False)
    )
    assert gap(dict(zip(names, inner, strict=True)), {n: 0.7 * d for n, d in delta.items()}) < 1e-12
    assert (
        gap(dict(zip(names, outer, strict=True)), {n: -0.7 * d for n, d in delta.items()}) < 1e-12
    )
    assert set(names) == set(parameters(made, v.shared))


@STACK_FIRST
@NETWORKS
def test_pfedme_with_one_step_and_eta_lam_one_is_fedavg(network, stacked):
    """In float64: w - (w - theta) is theta only up to a unit in the last place of w."""
    how = {"stacked": stacked, "participation": 0.6, "fine": True}
    pfedme = ended(
        PFedMe(lam=1.0, inner_steps=1, inner_lr=0.05), network, train=replace(PLAIN, lr=1.0), **how
    )
    fedavg = ended(FedAvg(), network, train=PLAIN, **how)
    assert small.trees_equal(pfedme.shared, fedavg.shared)


@STACK_FIRST
def test_pfedme_without_beta_leaves_the_global_parameters_and_trains_theta(stacked):
    federation, state = small.make_experiment(
        PFedMe(beta=0.0), "bn_net", train=PLAIN, stacked=stacked
    )
    begin = small.clone_tree(state.shared)
    state = small.run_rounds(federation, state, 2)
    for n, v in begin.items():
        assert torch.equal(state.shared[n], v) == (
            federation.clients.trainer.model.role(n) != "stats"
        ), n
    assert (
        gap(
            owned({n: v[1] for n, v in state.personal.items()}),
            parameters(federation.clients.trainer, begin),
        )
        > 1e-3
    )


@STACK_FIRST
def test_pfedme_without_lam_leaves_w_where_it_was(stacked):
    federation, state = small.make_experiment(PFedMe(lam=0.0), train=PLAIN, stacked=stacked)
    begin = small.clone_tree(state.shared)
    assert small.trees_equal(small.run_rounds(federation, state, 2).shared, begin)


@STACK_FIRST
def test_beta_carries_parameters_beyond_the_mean_but_not_statistics(stacked):
    how = {"train": PLAIN, "stacked": stacked}
    federation, state = small.make_experiment(PFedMe(), "bn_net", **how)
    x = small.clone_tree(state.shared)
    one, two = (ended(PFedMe(beta=b), "bn_net", 1, **how).shared for b in (1.0, 2.0))
    w = parameters(federation.clients.trainer, x)
    assert gap(two, {n: 2 * one[n] - x[n] for n in w}) < 1e-6
    assert all(torch.equal(one[n], two[n]) for n in x if n not in w)


def test_pfedme_judges_theta_and_theta_is_not_w():
    federation, state = small.make_experiment(PFedMe(), "bn_net", train=PLAIN)
    (done,) = federation.clients.trainer.train(
        [0], state.shared, {n: v[:1] for n, v in state.personal.items()}, 0
    )
    judged = federation.algorithm.client_model(federation.clients.trainer.model, done.end)
    theta = owned(done.end.personal)
    assert (
        all(torch.equal(judged[n], v) for n, v in theta.items())
        and gap(theta, parameters(federation.clients.trainer, done.end.shared)) > 1e-4
    )
    assert federation.algorithm.evaluate_on == "after_training"


# Per-FedAvg


@dataclass(frozen=True)
class SecondHalves(FedAvg):
    """FedAvg on the second halves of its mini-batches."""

    def local(self, model, train, round_):
        own = self.loss(model)

        def loss(now, start, batch):
            second = split_batch(batch)[1]
            with model.training_context(second):
                return own(now, start, second)

        return (Phase(train.epochs, (Step(loss),)),)


@STACK_FIRST
@NETWORKS
def test_perfedavg_without_alpha_is_fedavg_on_the_second_halves(network, stacked):
    algorithms = PerFedAvg(alpha=0.0), PerFedAvg(alpha=0.0, variant="hf"), SecondHalves()
    fo, hf, fedavg = (ended(a, network, 2, stacked=stacked).shared for a in algorithms)
    assert small.trees_equal(fo, fedavg) and small.trees_equal(hf, fedavg)
    on = ended(PerFedAvg(alpha=0.1), network, 2, stacked=stacked).shared
    more = ended(PerFedAvg(alpha=0.1, variant="hf"), network, 2, stacked=stacked).shared
    assert gap(on, fedavg) > 1e-4 and gap(on, more) > 1e-4


def meta(made, w, data, alpha):
    """(gradient of f(w'; D') at w', D) by plain autograd."""
    D, D_ = split_batch(data)
    ahead = {
        n: v - alpha * g for (n, v), g in zip(w.items(), slope(made, w, D).values(), strict=True)
    }
    return slope(made, ahead, D_), D


def test_the_two_variants_have_the_gradients_of_the_paper():
    alpha, found = 0.3, {}
    for variant in ("fo", "hf"):
        made = small.make_trainer(PerFedAvg(alpha=alpha, variant=variant))
        w = doubles(small.initial_variables(made).shared, 1)
        leaves = {n: v.clone().requires_grad_() for n, v in w.items()}
        loss = made.algorithm.local(made.model, made.settings, 0)[0].steps[0].loss
        value = loss(Variables(leaves, {}), Variables(w, {}), batch(made))
        found[variant] = dict(
            zip(w, torch.autograd.grad(value, list(leaves.values())), strict=True)
        )
    g, D = meta(made, w, batch(made), alpha)
    assert gap(found["fo"], g) < 1e-12
    leaves = {n: v.clone().requires_grad_() for n, v in w.items()}
    first = torch.autograd.grad(
        cross_entropy(made.model(leaves, D.x), D), list(leaves.values()), create_graph=True
    )
    along = sum((a * b).sum() for a, b in zip(first, g.values(), strict=True))
    product = torch.autograd.grad(along, list(leaves.values()))  # H_i(w; D) grad f(w'; D')
    assert gap(found["hf"], {n: g[n] - alpha * h for n, h in zip(g, product, strict=True)}) < 1e-12
    assert max(float(h.abs().max()) for h in product) > 1e-3


@pytest.mark.parametrize(
    "width, real, first, second",
    [
        (5, None, [0, 2, 4], [1, 3]),
        (4, None, [0, 2], [1, 3]),
        (1, None, [0], [0]),
        (5, 3, [0, 2], [1]),
        (5, 2, [0], [1]),
        (5, 1, [0], [0]),
    ],
)
def test_halves_share_out_the_real_examples(width, real, first, second):
    x, mask = torch.arange(width).float(), None if real is None else torch.arange(width) < real
    parts = split_batch(Batch(x, x.long(), mask, torch.tensor(7), torch.ones(6)))
    for part, expected in zip(parts, (first, second), strict=True):
        kept = part.x if part.real is None else part.x[part.real]
        assert kept.tolist() == expected and torch.equal(part.x.long(), part.y)
    assert parts[0].key != parts[1].key


@STACK_FIRST
def test_perfedavg_is_judged_after_one_step_on_training_data(stacked):
    made = small.make_trainer(PerFedAvg(alpha=0.2), stacked=stacked)
    shared = small.initial_variables(made).shared
    found = made.evaluate(CLIENTS, shared, {}, 0)
    for client, tests in zip(CLIENTS, (4, 9, 2, 5, 7), strict=True):
        data = batch(made, client, "test 0", width=min(5, small.SIZES[client]), dtype=torch.float32)
        w = {
            n: v - 0.2 * g
            for (n, v), g in zip(shared.items(), slope(made, shared, data).values(), strict=True)
        }
        test = made.feed.test_batch([client], 0, tests)
        expected, before = (
            float(cross_entropy(made.model(v, test.x[0]), Batch(test.x[0], test.y[0], *[None] * 3)))
            for v in (w, shared)
        )
        assert float(found[client, 1]) == pytest.approx(expected, rel=1e-5)
        assert abs(expected - before) > 1e-3


@STACK_FIRST
def test_the_step_before_a_test_sees_training_samples_alone(stacked):
    """One batch holds all of a client's samples, so ``survey`` says what they are without
    ``epoch``.
    """
    made = small.make_trainer(
        PerFedAvg(alpha=0.2), train=replace(PLAIN, batch_size=12), stacked=stacked
    )
    shared = small.initial_variables(made).shared
    found = made.evaluate(CLIENTS, shared, {}, 0)
    for client, tests in enumerate((4, 9, 2, 5, 7)):
        samples = made.feed.unshuffled_batch([client], all_samples=True)
        assert samples.y.shape[1] == small.SIZES[client]
        data = Batch(samples.x[0], samples.y[0], *[None] * 3)
        w = {n: shared[n] - 0.2 * g for n, g in slope(made, shared, data).items()}
        test = made.feed.test_batch([client], 0, tests)
        expected = cross_entropy(made.model(w, test.x[0]), Batch(test.x[0], test.y[0], *[None] * 3))
        assert float(found[client, 1]) == pytest.approx(float(expected), rel=1e-5)


def test_the_step_before_a_test_changes_nothing_that_lasts():
    federation, state = small.make_experiment(PerFedAvg(), "bn_net")
    before = small.clone_tree(state.shared)
    federation.clients.trainer.evaluate(CLIENTS, state.shared, state.personal, 0)
    assert small.trees_equal(state.shared, before)


# All three


@pytest.mark.parametrize("network", ["cnn", thorough_param("bn_net"), thorough_param("noisy_net")])
@pytest.mark.parametrize(
    "algorithm",
    [APFL(), PFedMe(), PerFedAvg(alpha=0.1), PerFedAvg(alpha=0.1, variant="hf")],
    ids=["apfl", "pfedme", "fo", "hf"],
)
def test_the_three_agree_on_loop_and_stack(algorithm, network):
    ends = (ended(algorithm, network, 2, stacked=stacked, train=PLAIN) for stacked in (False, True))
    loop, stack = (
        end.shared | {f"personal {n}": v for n, v in end.personal.items()} for end in ends
    )
    small.assert_near(stack, loop)


def test_hf_agrees_on_loop_and_stack_where_batches_are_full():
    """So that torch's own BatchNorm runs, not the one that ignores padding."""
    algorithm, once = PerFedAvg(alpha=0.5, variant="hf"), replace(PLAIN, epochs=1)
    loop, stack = (
        ended(algorithm, "bn_net", 1, sizes=(5, 5), stacked=stacked, train=once, fine=True)
        for stacked in (False, True)
    )
    small.assert_near(stack.shared, loop.shared, rtol=1e-6)


@STACK_FIRST
@pytest.mark.parametrize("algorithm", [APFL(), PFedMe()], ids=["apfl", "pfedme"])
def test_a_client_outside_the_cohort_keeps_what_it_has(algorithm, stacked):
    federation, state = small.make_experiment(
        algorithm, participation=0.6, stacked=stacked, train=PLAIN
    )
    state, chosen = small.run_rounds(federation, state, 2), federation.cohorts.sample(2).members
    before = small.clone_tree(state.personal)
    state = small.run_rounds(federation, state, 1)
    for client in CLIENTS:
        moved = [
            not torch.equal(v[client], before[n][client])
            for n, v in state.personal.items()
            if n != ".mix.alpha"
        ]
        assert all(moved) if client in chosen else not any(moved)


@pytest.mark.parametrize(
    "algorithm", [APFL(), PFedMe(), PerFedAvg()], ids=["apfl", "pfedme", "perfedavg"]
)
def test_uploads_and_downloads_are_the_models_leaves(algorithm):
    federation, state = small.make_experiment(algorithm, "bn_net")
    assert (
        federation.aggregator.terms.flat.size
        == numel(state.shared)
        == numel(federation.clients.trainer.model.initial)
    )


@pytest.mark.parametrize(
    "wrong, text",
    [
        (lambda: APFL(alpha=1.1), "alpha = 1.1: must be"),
        (lambda: APFL(alpha_decay=-0.1), "alpha_decay = -0.1: must be"),
        (lambda: PFedMe(lam=-1.0), "lam = -1.0: must be"),
        (lambda: PFedMe(inner_steps=0), "inner_steps = 0: must be"),
        (lambda: PFedMe(inner_lr=0.0), "inner_lr = 0.0: must be"),
        (lambda: PFedMe(beta=-0.5), "beta = -0.5: must be"),
        (
            lambda: PFedMe().check(small.make_model(), LocalTraining()),
            "needs train.momentum = 0, not 0.9",
        ),
        (
            lambda: PFedMe(lam=30.0).check(small.make_model(), PLAIN),
            "lam = 30.0: must be below 2 / inner_lr",
        ),
        (
            lambda: PFedMe(inner_lr=0.01).check(small.make_model(), replace(PLAIN, lr=0.2)),
            "must be below 2 / train.lr = 10",
        ),
        (lambda: PerFedAvg(alpha=-0.1), "alpha = -0.1: must be"),
    ],
)
def test_impossible_settings_are_refused(wrong, text):
    with pytest.raises(ValueError, match=text):
        wrong()
