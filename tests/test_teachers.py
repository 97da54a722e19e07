"""Methods with a model of the past as a teacher:
pFedSD and MOON against FedAvg and closed forms."""

from dataclasses import replace
from functools import cache

import pytest
import small
import torch
import torch.nn.functional as F
from tiers import STACK_FIRST, thorough_param
from torch import nn

from fedlora_mpi.algorithm import Batch, LocalTraining, Transport, Variables, phases_of
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.moon import MOON
from fedlora_mpi.algorithms.pfedsd import PFedSD
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.tree import numel
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.models.network import from_module

METHODS = pytest.mark.parametrize(
    "algorithm",
    [PFedSD(), thorough_param(PFedSD(teacher_bn="running")), MOON()],
    ids=["pFedSD", "pFedSD running", "MOON"],
)
OFF = pytest.mark.parametrize(
    "algorithm",
    [PFedSD(lam=0.0), thorough_param(PFedSD(lam=0.0, teacher_bn="running")), MOON(mu=0.0)],
    ids=str,
)


def numbers(*shape, at=0):
    return torch.randn(*shape, generator=rng(1, "test", *shape, at))


@cache
def outcome(algorithm, network="bn_net", rounds=2, **how):
    """(Run, State) after ``rounds`` rounds. Cached: change nothing in it, and play no further."""
    federation, state = small.make_experiment(algorithm, network, **how)
    return federation, small.run_rounds(federation, state, rounds)


def plain(algorithm, **how):
    """FedAvg with the weights of ``algorithm``."""
    return outcome(FedAvg(weights=algorithm.weights), **how)[1]


def batch(made, client=0, width=5):
    return Batch(
        *(v if v is None else v[0] for v in made.feed.epoch([client], 0, 0).batch(1, 0, width))
    )


def taught(made):
    """Variables of a client whose teacher is another network than the one it received."""
    v = small.initial_variables(made)
    own = {n: w + 0.1 * numbers(*w.shape).abs() for n, w in v.personal.items() if n != ".taught."}
    return v._replace(
        personal=own | {n: torch.ones_like(w) for n, w in v.personal.items() if n == ".taught."}
    )


def gradients(made, v, data, start=None):
    """{leaf: gradient of the training loss} of one client at ``v.shared``, and the loss."""
    leaves = {
        n: w.clone().requires_grad_(made.model.role(n) != "stats") for n, w in v.shared.items()
    }
    (phase,) = phases_of(made.algorithm.local(made.model, made.settings, 0))
    loss = phase.steps[0].loss(Variables(leaves, v.personal), start or v, data)
    trained = {n: w for n, w in leaves.items() if w.requires_grad}
    return dict(
        zip(trained, torch.autograd.grad(loss, trained.values()), strict=True)
    ), loss.detach()


def last(state, row):
    """The last model of the client in ``row``, under the network's names."""
    return {n.removeprefix(".own."): v[row] for n, v in state.personal.items() if n != ".taught."}


# Both


@OFF
@STACK_FIRST
@pytest.mark.parametrize(
    "network, participation",
    [thorough_param("bn_net", 1.0), ("bn_net", 0.6), thorough_param("noisy_net", 1.0)],
)
def test_without_its_term_the_method_is_fedavg(algorithm, stacked, network, participation):
    how = {"network": network, "stacked": stacked, "participation": participation, "rounds": 3}
    assert small.trees_equal(outcome(algorithm, **how)[1].shared, plain(algorithm, **how).shared)


@METHODS
@STACK_FIRST
def test_the_term_acts_from_round_2_on(algorithm, stacked):
    how = {"rounds": 1, "stacked": stacked, "fine": True}
    small.assert_near(
        outcome(algorithm, **how)[1].shared, plain(algorithm, **how).shared, rtol=1e-6
    )
    _, two = outcome(algorithm, rounds=2, stacked=stacked)
    other = plain(algorithm, rounds=2, stacked=stacked).shared
    assert not any(torch.equal(v, other[n]) for n, v in two.shared.items())


@METHODS
@pytest.mark.parametrize("network", ["cnn", thorough_param("bn_net"), thorough_param("noisy_net")])
def test_loop_and_stack_train_alike(algorithm, network):
    v = taught(small.make_trainer(algorithm, network))
    ends = []
    for stacked in (False, True):
        made = small.make_trainer(algorithm, network, stacked=stacked)
        done = made.train(range(5), v.shared, small.repeat_rows(v.personal, 5), 1)
        ends.append(
            [small.clone_tree(d.end.shared | d.end.personal) | {"loss": d.loss} for d in done]
        )
    for loop, stack in zip(*ends, strict=True):
        small.assert_near(stack, loop)


@METHODS
@STACK_FIRST
def test_the_teacher_is_what_a_participant_trained_last(algorithm, stacked):
    federation, state = small.make_experiment(
        algorithm, "bn_net", participation=0.6, stacked=stacked
    )
    before, chosen, ends = (
        small.clone_tree(state.personal),
        federation.cohorts.sample(0).members,
        {},
    )
    for group in federation.placement.groups:
        members = [c for c in group if c in chosen]
        rows = {n: v[: len(members)] for n, v in before.items()}  # all start equal
        ends |= {
            d.client: small.clone_tree(d.end.shared)
            for d in federation.clients.trainer.train(members, state.shared, rows, 0)
        }
    state = small.run_rounds(federation, state, 1)
    assert set(ends) == chosen and len(chosen) == 3
    for row, client in enumerate(federation.placement.local_clients):
        if client in chosen:
            teacher = last(state, row)
            assert small.trees_equal(teacher, {n: ends[client][n] for n in teacher}), client
        else:
            assert all(torch.equal(v[row], before[n][row]) for n, v in state.personal.items()), (
                client
            )
        if ".taught." in state.personal:
            assert state.personal[".taught."][row] == (client in chosen)


@METHODS
@STACK_FIRST
def test_a_teacher_leaves_no_trace(algorithm, stacked):
    made = small.make_trainer(algorithm, "bn_net", stacked=stacked)
    v = taught(made)
    rows, shared = small.repeat_rows(v.personal, 5), small.clone_tree(v.shared)
    given = small.clone_tree(rows)
    for done in made.train(range(5), shared, rows, 1):
        assert small.trees_equal(done.start.personal, v.personal) and small.trees_equal(
            done.start.shared, v.shared
        )
    assert small.trees_equal(rows, given) and small.trees_equal(shared, v.shared)


@METHODS
def test_the_network_alone_trains(algorithm):
    made = small.make_trainer(algorithm, "bn_net")
    ((step,),) = (phase.steps for phase in phases_of(algorithm.local(made.model, made.settings, 0)))
    v = small.initial_variables(made)
    assert all(map(step.trains, v.shared)) and not any(map(step.trains, v.personal))


@METHODS
def test_the_message_is_the_model(algorithm):
    federation, state = small.make_experiment(algorithm, "bn_net")
    assert (
        set(federation.aggregator.terms.flat.shapes)
        == set(state.shared)
        == set(federation.clients.trainer.model.initial)
    )
    _, row, _ = run_round(federation, state, evaluate=False, stop=False)
    assert (
        row["bytes_up"]
        == row["bytes_down"]
        == 5 * 4 * numel(federation.clients.trainer.model.initial)
    )


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: PFedSD(lam=-1.0), "lam = -1.0: must be a number of at least 0"),
        (lambda: PFedSD(temperature=0.0), "temperature = 0.0: must be a number above 0"),
        (lambda: MOON(mu=-1.0), "mu = -1.0: must be a number of at least 0"),
        (lambda: MOON(tau=0.0), "tau = 0.0: must be a number above 0"),
    ],
)
def test_impossible_fields_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


# pFedSD


@STACK_FIRST
@pytest.mark.parametrize("network", ["bn_net", "noisy_net"])
def test_the_first_participation_in_pfedsd_is_fedavg_in_any_round(stacked, network):
    algorithm, ends = PFedSD(), {}
    v = taught(small.make_trainer(algorithm, network))
    for flag in (0.0, 1.0):
        made = small.make_trainer(algorithm, network, stacked=stacked)
        personal = v.personal | {".taught.": torch.tensor(flag)}
        done = list(made.train(range(5), v.shared, small.repeat_rows(personal, 5), 4))
        ends[flag] = [small.clone_tree(d.end.shared) for d in done]
    made = small.make_trainer(FedAvg(), network, stacked=stacked)
    for client, done in enumerate(made.train(range(5), v.shared, {}, 4)):
        assert small.trees_equal(ends[0.0][client], done.end.shared)
        assert not small.trees_equal(ends[1.0][client], done.end.shared)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_divergence_of_pfedsd_is_torchs_and_has_its_closed_gradient(temperature):
    algorithm = PFedSD(temperature=temperature)
    teacher, student = numbers(5, 6, at=1), numbers(5, 6).requires_grad_()
    data = batch(small.make_trainer(algorithm))
    p, q = ((o / temperature).log_softmax(1) for o in (student, teacher))
    value = algorithm.distillation_loss(teacher, student, data)
    expected = temperature**2 * F.kl_div(p, q.exp(), reduction="batchmean")
    torch.testing.assert_close(value, expected)
    (grad,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(grad, (temperature * (p.exp() - q.exp()) / 5).detach())
    padded = data._replace(real=torch.tensor([True, True, False, True, False]))
    three = algorithm.distillation_loss(teacher, student, padded)
    torch.testing.assert_close(
        three, algorithm.distillation_loss(teacher[[0, 1, 3]], student[[0, 1, 3]], data)
    )
    assert algorithm.distillation_loss(student, student, data).abs() < 1e-6


@pytest.mark.parametrize("teacher_bn", ["batch", "running"])
def test_the_gradient_of_pfedsd_is_that_of_both_terms(teacher_bn):
    made = small.make_trainer(PFedSD(lam=0.7, temperature=2.0, teacher_bn=teacher_bn), "bn_net")
    v, data = taught(made), batch(made)
    grads, loss = gradients(made, v, data)
    net = {n: w.clone().requires_grad_(n in grads) for n, w in v.shared.items()}
    own = {n.removeprefix(".own."): w.clone() for n, w in v.personal.items() if n != ".taught."}
    mode = made.model if teacher_bn == "batch" else made.model.eval_mode()
    q, o = (mode(own, data.x) / 2).softmax(1), made.model(net, data.x)
    term = 0.7 * 4 * F.kl_div((o / 2).log_softmax(1), q, reduction="batchmean")
    total = F.cross_entropy(o, data.y) + term
    assert loss == pytest.approx(total.item()) and term > 0.01
    trained = {n: net[n] for n in grads}
    small.assert_near(
        grads, dict(zip(trained, torch.autograd.grad(total, trained.values()), strict=True))
    )


def test_the_two_teachers_of_pfedsd_differ():
    (_, one), (_, two) = outcome(PFedSD()), outcome(PFedSD(teacher_bn="running"))
    assert not any(torch.equal(v, two.shared[n]) for n, v in one.shared.items())


def test_pfedsd_is_judged_before_the_mean():
    federation, state = small.make_experiment(PFedSD(), "bn_net", participation=0.6)
    state, row, clients = run_round(federation, state, evaluate=True, stop=False)
    model, chosen = (
        federation.clients.trainer.model.eval_mode(),
        federation.cohorts.sample(0).members,
    )
    assert len(chosen) == 3
    for at, client in enumerate(federation.placement.local_clients):
        tests = federation.clients.trainer.feed.test_batch(
            [client], 0, federation.clients.trainer.feed.test_size(client)
        )
        tree = last(state, at) if client in chosen else state.shared
        loss = F.cross_entropy(model(tree, tests.x[0]), tests.y[0]).item()
        assert clients["loss"][client] == pytest.approx(loss, rel=1e-5)
    assert row["loss"] == clients["loss"].mean()


# MOON


def test_the_contrast_of_moon_has_its_closed_form_and_gradient():
    tau = 0.4
    algorithm = MOON(tau=tau)
    z, near, far = numbers(5, 7).requires_grad_(), numbers(5, 7, at=1), numbers(5, 7, at=2)
    data = batch(small.make_trainer(algorithm))
    value = algorithm.contrastive_loss(z, near, far, data)

    def unit(v):
        return v / v.norm(dim=1, keepdim=True)

    a, b = ((unit(z) * unit(o)).sum(1) for o in (near, far))
    good, bad = (a / tau).exp(), (b / tau).exp()
    torch.testing.assert_close(value, -(good / (good + bad)).log().mean())
    (grad,) = torch.autograd.grad(value, z)

    # of cos by z
    def slope(o, cos):
        return (unit(o) - cos[:, None] * unit(z)) / z.norm(dim=1, keepdim=True)

    wrong = (bad / (good + bad) / tau / 5)[:, None]
    torch.testing.assert_close(grad, (wrong * (slope(far, b) - slope(near, a))).detach())
    closer = F.cosine_similarity(z - grad, near) - F.cosine_similarity(z - grad, far)
    assert (closer > a - b).all()
    padded = data._replace(real=torch.tensor([True, False, True, True, False]))
    three = algorithm.contrastive_loss(
        *(v[[0, 2, 3]] for v in (z, near, far)), data._replace(y=data.y[:3])
    )
    torch.testing.assert_close(algorithm.contrastive_loss(z, near, far, padded), three)


def test_the_contrast_of_moon_survives_a_small_tau():
    z, near, far = numbers(5, 7).requires_grad_(), numbers(5, 7, at=1), numbers(5, 7, at=2)
    value = MOON(tau=1e-3).contrastive_loss(z, near, far, batch(small.make_trainer(MOON())))
    assert torch.isfinite(value) and torch.isfinite(torch.autograd.grad(value, z)[0]).all()


def test_the_gradient_of_moon_is_that_of_both_terms():
    made = small.make_trainer(MOON(mu=3.0, tau=0.5), "bn_net")
    v, data = taught(made), batch(made)
    moved = v._replace(
        shared={n: w + 0.1 * numbers(*w.shape, at=3).abs() for n, w in v.shared.items()}
    )
    grads, loss = gradients(made, moved, data, start=v)
    net = {n: w.clone().requires_grad_(n in grads) for n, w in moved.shared.items()}
    own = {n.removeprefix(".own."): w for n, w in v.personal.items()}
    judge = made.model.eval_mode()
    z = made.model.features(net, data.x)
    likeness = [
        F.cosine_similarity(z, judge.features(tree, data.x)) / 0.5 for tree in (v.shared, own)
    ]
    term = 3.0 * F.softplus(likeness[1] - likeness[0]).mean()
    fit = F.cross_entropy(made.model.classify(net, z), data.y)
    assert loss == pytest.approx((fit + term).item())
    trained = {n: net[n] for n in grads}
    small.assert_near(
        grads,
        dict(
            zip(
                trained,
                torch.autograd.grad(fit + term, trained.values(), retain_graph=True),
                strict=True,
            )
        ),
    )
    assert torch.autograd.grad(term, net["conv1.weight"])[0].abs().max() > 1e-3


def test_moon_without_a_difference_between_its_teachers_is_fedavg():
    made = small.make_trainer(MOON(), "bn_net")
    v, data = small.initial_variables(made), batch(made)
    grads, loss = gradients(made, v, data)
    other = replace(made, transport=Transport(MOON(mu=0.0)))
    expected, ce = gradients(other, v, data)
    small.assert_near(grads, expected)
    assert loss - ce == pytest.approx(5.0 * torch.tensor(2.0).log().item(), rel=1e-5)


@STACK_FIRST
def test_the_first_negative_of_a_late_client_is_the_initial_model_not_the_received_one(stacked):
    federation, state = small.make_experiment(MOON(), "bn_net", participation=0.6, stacked=stacked)
    initial = federation.clients.trainer.model.initial
    state = small.run_rounds(federation, state, 1)
    late = next(c for c in range(5) if c not in federation.cohorts.sample(0).members)
    row = federation.placement.row_of_client[late]
    personal = {n: v[[row]] for n, v in state.personal.items()}
    (done,) = federation.clients.trainer.train([late], state.shared, personal, 1)
    for name, value in done.start.personal.items():
        name = name.removeprefix(".own.")
        assert torch.equal(value, initial[name])
        assert not torch.equal(done.start.shared[name], initial[name])


def test_moon_refuses_a_network_that_does_not_end_in_a_linear():
    layers = nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = from_module(nn.Sequential(*layers), 6, small.SHAPE)
    MOON().check(small.make_model("bn_net"), LocalTraining())
    with pytest.raises(
        ValueError, match="name = moon: needs a network that ends in a Linear; 0 is none"
    ):
        MOON().check(model, LocalTraining())
