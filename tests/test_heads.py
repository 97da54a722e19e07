"""Methods that share a body: FedPer, FedRep, FedBN and FedRoD against FedAvg, Local, torch and
closed forms.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import small
import torch
import torch.nn.functional as F
from tiers import STACK_FIRST, thorough_param
from torch import nn

from fedlora_mpi.algorithm import Batch, LocalTraining, Phase, Step, Variables
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.fedbn import FedBN
from fedlora_mpi.algorithms.fedper import FedPer
from fedlora_mpi.algorithms.fedrep import FedRep
from fedlora_mpi.algorithms.fedrod import FedRoD
from fedlora_mpi.algorithms.local import Local
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.tree import numel
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.models.network import from_module

ALL = [
    FedPer(),
    FedRep(head_epochs=2),
    FedBN(),
    FedRoD(),
    FedRoD(personal_trains_body=True, head="zero"),
]
METHODS = pytest.mark.parametrize("algorithm", ALL, ids=lambda a: type(a).__name__)
HEAD = {"fc.weight", "fc.bias"}


@dataclass(frozen=True)
class Turns(FedAvg):
    """FedAvg whose head trains first, and then the body."""

    def local(self, model, train, round_):
        loss = self.loss(model)
        parts = (2, lambda leaf: leaf in HEAD), (train.epochs - 2, lambda leaf: leaf not in HEAD)
        return tuple(Phase(epochs, (Step(loss, trains),)) for epochs, trains in parts)


@cache
def outcome(algorithm, network="bn_net", rounds=2, **how):
    """(Run, State) after ``rounds`` rounds. Cached: change nothing in it, and play no further."""
    federation, state = small.make_experiment(algorithm, network, **how)
    return federation, small.run_rounds(federation, state, rounds)


def role(federation, tree, *roles):
    return {n: v for n, v in tree.items() if federation.clients.trainer.model.role(n) in roles}


def batch(made, client=0, width=5):
    return Batch(
        *(v if v is None else v[0] for v in made.feed.epoch([client], 0, 0).batch(1, 0, width))
    )


def gradients(made, v, data):
    """{leaf: gradient of the training loss} of one client in its first phase, and the loss."""
    leaves = {
        n: w.clone().requires_grad_()
        for n, w in (v.shared | v.personal).items()
        if made.model.role(n) != "stats"
    }
    now = Variables(
        *(
            {n: leaves.get(n, small.clone_tree(half)[n]) for n in half}
            for half in (v.shared, v.personal)
        )
    )
    loss = made.algorithm.local(made.model, made.settings, 0)[0].steps[0].loss(now, v, data)
    return derived(loss, leaves), loss.detach()


def derived(loss, leaves):
    """{leaf: gradient of ``loss``}, zeros where it does not depend on the leaf."""
    how = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return dict(zip(leaves, torch.autograd.grad(loss, leaves.values(), **how), strict=True))


# All of them


@METHODS
@pytest.mark.parametrize("network", ["cnn", thorough_param("bn_net")])
def test_loop_and_stack_train_alike(algorithm, network):
    (_, loop), (_, stack) = (
        outcome(algorithm, network, rounds=1, stacked=stacked) for stacked in (False, True)
    )
    small.assert_near(stack.shared, loop.shared)
    small.assert_near(stack.personal, loop.personal)


@METHODS
def test_absent_clients_keep_their_own_leaves(algorithm):
    federation, state = small.make_experiment(algorithm, "bn_net", participation=0.6, stacked=True)
    before, chosen = small.clone_tree(state.personal), federation.cohorts.sample(0).members
    state = small.run_rounds(federation, state, 1)
    assert len(chosen) == 3
    for name, value in state.personal.items():
        moved = {
            federation.placement.local_clients[row]
            for row in range(5)
            if not torch.equal(value[row], before[name][row])
        }
        assert moved == chosen, name


@METHODS
def test_own_leaves_differ_between_clients_and_the_method_from_fedavg(algorithm):
    _, state = outcome(algorithm)
    _, plain = outcome(FedAvg(weights=algorithm.weights))
    for name, value in state.personal.items():
        assert len({row.numpy().tobytes() for row in value}) == 5, name
    assert not any(torch.equal(value, plain.shared[name]) for name, value in state.shared.items())


@METHODS
def test_the_message_is_what_is_shared(algorithm):
    federation, state = small.make_experiment(algorithm, "bn_net")
    model = federation.clients.trainer.model
    own = {FedPer: ("head",), FedRep: ("head",), FedBN: ("norm", "stats"), FedRoD: ()}[
        type(algorithm)
    ]
    sent = {n: v for n, v in model.initial.items() if model.role(n) not in own}
    assert set(federation.aggregator.terms.flat.shapes) == set(state.shared) == set(sent)
    _, row, _ = run_round(federation, state, evaluate=False, stop=False)
    assert row["bytes_up"] == row["bytes_down"] == 5 * 4 * numel(sent)


@METHODS
def test_evaluation_is_of_the_shared_part_with_each_clients_own(algorithm):
    federation, state = small.make_experiment(algorithm, "bn_net")
    state, row, clients = run_round(federation, state, evaluate=True, stop=False)
    model = federation.clients.trainer.model.eval_mode()
    for at, client in enumerate(federation.placement.local_clients):
        own = {n: v[at] for n, v in state.personal.items()}
        tests = federation.clients.trainer.feed.test_batch(
            [client], 0, federation.clients.trainer.feed.test_size(client)
        )
        if isinstance(algorithm, FedRoD):
            z = model.features(state.shared, tests.x[0])
            own = {n.removeprefix(".own."): v for n, v in own.items()}
            logits = model.classify(state.shared, z) + model.classify(own, z)
        else:
            logits = model(state.shared | own, tests.x[0])
        assert clients["loss"][client] == pytest.approx(
            F.cross_entropy(logits, tests.y[0]).item(), rel=1e-5
        )
    assert row["loss"] == clients["loss"].mean()


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: FedRep(head_epochs=-1), "head_epochs = -1: must be an integer of at least 0"),
        (lambda: FedRoD(gamma=-0.5), "gamma = -0.5: must be a number of at least 0"),
    ],
)
def test_impossible_fields_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


# FedPer


@STACK_FIRST
@pytest.mark.parametrize("participation", [thorough_param(1.0), 0.6])
def test_fedper_that_keeps_nothing_is_fedavg(stacked, participation):
    how = {"stacked": stacked, "participation": participation}
    (_, state), (_, plain) = outcome(FedPer(personal=()), **how), outcome(FedAvg(), **how)
    assert small.trees_equal(state.shared, plain.shared) and not state.personal


@STACK_FIRST
@pytest.mark.parametrize("participation", [thorough_param(1.0), 0.6])
def test_fedper_that_keeps_everything_is_local(stacked, participation):
    how = {"stacked": stacked, "participation": participation}
    (federation, state), (_, plain) = (
        outcome(FedPer(personal=("*",)), **how),
        outcome(Local(), **how),
    )
    assert (
        small.trees_equal(state.personal, plain.personal)
        and not state.shared
        and federation.aggregator.terms.flat.size == 0
    )


@STACK_FIRST
def test_fedper_of_one_client_is_fedavg(stacked):
    how = {"sizes": (12,), "stacked": stacked}
    (_, state), (_, plain) = outcome(FedPer(), **how), outcome(FedAvg(), **how)
    assert set(state.personal) == HEAD
    whole = state.shared | {n: v[0] for n, v in state.personal.items()}
    assert small.trees_equal({n: whole[n] for n in plain.shared}, plain.shared)


def test_fedper_keeps_what_its_patterns_match():
    federation, state = small.make_experiment(FedPer(personal=("head", "layers.1.*")), "bn_net")
    expected = {
        n
        for n in federation.clients.trainer.model.initial
        if n in HEAD or n.startswith("layers.1.")
    }
    assert set(state.personal) == expected and len(expected) > 10
    for pattern in ("Head", "fc", "layer."):
        with pytest.raises(
            ValueError, match=f"personal = {pattern}: matches no leaf; there are head and co"
        ):
            FedPer(personal=("head", pattern)).check(
                federation.clients.trainer.model, LocalTraining()
            )


# FedRep


@STACK_FIRST
def test_fedrep_of_one_client_is_fedavg_with_both_phases(stacked):
    how = {"sizes": (12,), "stacked": stacked}
    (_, state), (_, plain) = outcome(FedRep(head_epochs=2), **how), outcome(Turns(), **how)
    whole = state.shared | {n: v[0] for n, v in state.personal.items()}
    assert small.trees_equal({n: whole[n] for n in plain.shared}, plain.shared)


@STACK_FIRST
def test_fedrep_trains_one_part_at_a_time(stacked):
    begin = small.make_model("bn_net").initial
    federation, state = outcome(FedRep(head_epochs=0), stacked=stacked)
    assert all((v == begin[n]).all() for n, v in state.personal.items())
    assert not any(torch.equal(v, begin[n]) for n, v in state.shared.items())
    federation, state = outcome(FedRep(head_epochs=3), stacked=stacked)
    assert not any((v == begin[n]).all() for n, v in state.personal.items())
    moved = {
        federation.clients.trainer.model.role(n)
        for n, v in state.shared.items()
        if not torch.equal(v, begin[n])
    }
    assert moved == {"stats"}


def test_fedrep_trains_the_head_first():
    made = small.make_trainer(FedRep(), "bn_net", train=LocalTraining())
    made.algorithm.check(made.model, made.settings)
    head, body = made.algorithm.local(made.model, made.settings, 0)
    assert (head.epochs, body.epochs) == (4, 1)
    names = set(made.model.initial)
    assert {n for n in names if head.steps[0].trains(n)} == HEAD
    assert {n for n in names if body.steps[0].trains(n)} == names - HEAD


def test_more_head_epochs_than_epochs_are_refused():
    FedRep(head_epochs=3).check(small.make_model(), LocalTraining(epochs=3))
    with pytest.raises(ValueError, match="head_epochs = 4: must be at most train.epochs = 3"):
        FedRep(head_epochs=4).check(small.make_model(), LocalTraining(epochs=3))


def test_fedrep_is_neither_fedper_nor_its_own_reverse():
    (_, state), (_, together) = outcome(FedRep(head_epochs=2)), outcome(FedPer())
    (_, other) = outcome(FedRep(head_epochs=1))
    assert not small.trees_equal(state.shared, together.shared) and not small.trees_equal(
        state.shared, other.shared
    )


# FedBN


@STACK_FIRST
@pytest.mark.parametrize("participation", [thorough_param(1.0), 0.6])
def test_fedbn_without_normalisation_is_fedavg(stacked, participation):
    how = {"network": "cnn", "stacked": stacked, "participation": participation}
    (_, state), (_, plain) = outcome(FedBN(), **how), outcome(FedAvg(weights="uniform"), **how)
    assert small.trees_equal(state.shared, plain.shared) and not state.personal


def test_fedbn_keeps_every_normalisation_layer_whatever_its_name():
    federation, state = small.make_experiment(FedBN(), "bn_net")
    assert len(state.personal) == 6 * 4
    assert {"bn1.running_var", "layers.1.downsample.1.weight"} <= set(state.personal)
    assert set(role(federation, federation.clients.trainer.model.initial, "norm", "stats")) == set(
        state.personal
    )
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.LayerNorm(60),
        nn.Linear(60, 6),
    )
    model = from_module(nn.Sequential(*layers), 6, small.SHAPE)
    assert set(FedBN().init(model, rng(1)).personal) == {"1.weight", "1.bias", "3.weight", "3.bias"}


@STACK_FIRST
def test_fedbn_moves_statistics_and_affine_parameters_at_home(stacked):
    federation, state = outcome(FedBN(), stacked=stacked)
    begin = federation.clients.trainer.model.initial
    for name, value in state.personal.items():
        assert all(not torch.equal(row, begin[name]) for row in value), name
    assert not any(torch.equal(v, begin[n]) for n, v in state.shared.items())


# FedRoD


@STACK_FIRST
@pytest.mark.parametrize("head", ["copy", "zero"])
@pytest.mark.parametrize(
    "network, participation",
    [thorough_param("bn_net", 1.0), ("bn_net", 0.6), thorough_param("noisy_net", 1.0)],
)
def test_the_generic_part_of_fedrod_without_gamma_is_fedavg(stacked, head, network, participation):
    how = {"network": network, "stacked": stacked, "participation": participation}
    (_, state), (_, plain) = outcome(FedRoD(gamma=0.0, head=head), **how), outcome(FedAvg(), **how)
    assert small.trees_equal(state.shared, plain.shared)


@STACK_FIRST
def test_equal_counts_make_the_generic_loss_plain(stacked):
    federation, state = small.make_experiment(FedRoD(), "bn_net", stacked=stacked, fine=True)
    federation.clients.trainer.feed._counts.fill_(7.0)
    _, plain = outcome(FedAvg(), rounds=1, stacked=stacked, fine=True)
    small.assert_near(small.run_rounds(federation, state, 1).shared, plain.shared, rtol=1e-6)


def test_a_personal_head_that_trains_the_body_ends_fedavg():
    (_, state), (_, plain) = (
        outcome(FedRoD(gamma=0.0, personal_trains_body=True)),
        outcome(FedAvg()),
    )
    assert not any(torch.equal(v, plain.shared[n]) for n, v in state.shared.items())


def heads(personal_trains_body=False, gamma=1.0, network="cnn"):
    """(Trainer, variables with a head of the client's own, batch) of one client."""
    algorithm = FedRoD(gamma=gamma, personal_trains_body=personal_trains_body)
    made = small.make_trainer(algorithm, network)
    v = small.initial_variables(made)
    own = {n: torch.randn(w.shape, generator=rng(1, n)) for n, w in v.personal.items()}
    return made, v._replace(personal=own), batch(made)


@pytest.mark.parametrize("personal_trains_body", [False, True])
def test_the_gradients_of_fedrod_are_those_of_its_two_losses(personal_trains_body):
    made, v, data = heads(personal_trains_body, gamma=0.7)
    data = data._replace(counts=torch.tensor([3.0, 1, 4, 1, 5, 9]))
    grads, loss = gradients(made, v, data)
    net = {n: w.clone().requires_grad_() for n, w in v.shared.items()}
    phi = {n.removeprefix(".own."): w.clone().requires_grad_() for n, w in v.personal.items()}
    z = made.model.features(net, data.x)
    g, p = made.model.classify(net, z), made.model.classify(phi, z)
    generic = F.cross_entropy(g + 0.7 * data.counts.log(), data.y)
    personal = F.cross_entropy(g.detach() + p, data.y)
    assert loss == pytest.approx((generic + personal).item())
    expected, leaked = derived(generic, net), derived(personal, net)
    if personal_trains_body:
        expected = {n: v + leaked[n] for n, v in expected.items()}
    expected |= {f".own.{n}": v for n, v in derived(personal, phi).items()}
    small.assert_near(grads, expected)
    body = [n for n in net if made.model.role(n) == "body"]
    assert all(leaked[n].any() for n in body) and not leaked["9.weight"].any()
    error = (g + p).softmax(1) - F.one_hot(data.y, small.CLASSES)  # the closed form for phi
    torch.testing.assert_close(grads[".own.9.weight"], (error.T @ z / len(z)).detach())


def test_a_class_that_a_client_lacks_gets_no_gradient_in_the_generic_head():
    made, v, data = heads()
    lacking = data.counts == 0
    counts = torch.where(torch.arange(6) == data.y[0], 5.0, 0.0)
    one_class = data._replace(y=data.y[:1].expand(5), counts=counts)
    for given, absent in ((data, lacking), (one_class, counts == 0)):
        grads, loss = gradients(made, v, given)
        assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in grads.values())
        assert not grads["9.weight"][absent].any() and not grads["9.bias"][absent].any()
        assert grads[".own.9.bias"].all()
    assert one_class.counts.count_nonzero() == 1


def test_padding_with_a_class_that_a_client_lacks_counts_for_nothing():
    made, v, data = heads()
    kept = data._replace(**{n: getattr(data, n)[:3] for n in ("x", "y")})
    kept = kept._replace(counts=torch.bincount(kept.y, minlength=6).float())
    padded = kept._replace(
        x=data.x,
        y=torch.cat([kept.y, (kept.counts == 0).nonzero()[0].expand(2)]),
        real=torch.arange(5) < 3,
    )
    (grads, loss), (expected, plain) = (gradients(made, v, given) for given in (padded, kept))
    assert loss == pytest.approx(plain.item()) and torch.isfinite(loss)
    small.assert_near(grads, expected)


@pytest.mark.parametrize("head, factor", [("copy", 2.0), ("zero", 1.0)])
def test_the_first_prediction_of_fedrod_is_the_generic_one_or_its_double(head, factor):
    made = small.make_trainer(FedRoD(head=head), "bn_net")
    v, x = small.initial_variables(made), batch(made).x
    model = made.model.eval_mode()
    torch.testing.assert_close(made.algorithm.logits(model, v, x), factor * model(v.shared, x))
    assert made.model.initial["fc.weight"].data_ptr() != v.personal[".own.fc.weight"].data_ptr()


def test_fedrod_refuses_a_network_that_does_not_end_in_a_linear():
    layers = nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = from_module(nn.Sequential(*layers), 6, small.SHAPE)
    FedRoD().check(small.make_model("bn_net"), LocalTraining())
    with pytest.raises(
        ValueError, match="name = fedrod: needs a network that ends in a Linear; 0 is none"
    ):
        FedRoD().check(model, LocalTraining())
