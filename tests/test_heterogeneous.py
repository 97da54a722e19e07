"""LG-FedAvg, FD and FedProto: methods for clients with networks of their own."""

import shutil
from dataclasses import replace

import pytest
import small
import torch
import torch.nn.functional as F
from runs import TINY, assert_same_run, run_rounds, tiny_config, trees_equal
from tiers import STACK_FIRST, thorough_param
from torch import nn

from fedlora_mpi.algorithm import Batch, LocalTraining, Transport, Variables, phases_of
from fedlora_mpi.algorithms.fd import FD, distill
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.fedper import FedPer
from fedlora_mpi.algorithms.fedproto import FedProto
from fedlora_mpi.algorithms.lg_fedavg import LGFedAvg
from fedlora_mpi.algorithms.local import Local
from fedlora_mpi.components.prototypes import client_class_means, prototype_loss, prototypes
from fedlora_mpi.config import read
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.experiment.loop import resume, start
from fedlora_mpi.federation.cohorts import Cohorts
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.models.network import from_module
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.mpi.ending import Refusal
from fedlora_mpi.plan import plan

PATHS = pytest.mark.parametrize("stacked", [False, True], ids=["loop", "stack"])
MIXED = ("cnn", "bn_net", "wide_cnn")  # three networks with five features each
NETWORKS = pytest.mark.parametrize(
    "network", [thorough_param("cnn"), thorough_param("bn_net"), pytest.param(MIXED, id="mixed")]
)
ALL = [
    LGFedAvg(),
    FD(),
    thorough_param(FD(outputs="logits")),
    thorough_param(FedProto()),
    FedProto(weights="samples"),
]
METHODS = pytest.mark.parametrize("algorithm", ALL, ids=str)
TERMS = pytest.mark.parametrize(
    "algorithm",
    [FD(), FD(outputs="logits"), FedProto(), FedProto(weights="samples", absent="stale")],
    ids=str,
)
FEW_TERMS = pytest.mark.parametrize(
    "algorithm",
    [
        FD(),
        thorough_param(FD(outputs="logits")),
        thorough_param(FedProto()),
        FedProto(weights="samples", absent="stale"),
    ],
    ids=str,
)


def numbers(*shape, at=0, dtype=torch.float32):
    return torch.randn(*shape, generator=rng(1, "test", *shape, at), dtype=dtype)


def off(algorithm):
    """The same method without its term."""
    return replace(algorithm, **{"gamma" if isinstance(algorithm, FD) else "lam": 0.0})


def trained(federation, state):
    """What each client of the cohort brings in this round, by client;
    the state is left as it is."""
    found, chosen = {}, federation.cohorts.sample(state.round).members
    for client in sorted(chosen):
        client_type = federation.clients[client]
        row = {
            n: state.personal[client_type.prefix + n][[federation.placement.row_of_client[client]]]
            for n in client_type.initial.personal
        }
        (found[client],) = client_type.trainer.train([client], state.shared, row, state.round)
    return found


def survey(federation, client):
    """(evaluating model, all training samples, their labels) of a client."""
    trainer = federation.clients[client].trainer
    data = trainer.feed.unshuffled_batch([client], all_samples=True)
    return trainer.model.eval_mode(), data.x[0], data.y[0]


def held(federation, client):
    """The classes of which a client has training samples."""
    return set(survey(federation, client)[2].tolist())


def class_mean(federation, done, label, of):
    """The mean of ``of(model, weights, x)`` over a client's samples of one class, float64."""
    model, x, y = survey(federation, done.client)
    weights = {n: v for n, v in done.end.personal.items() if n in model.leaves}
    with torch.no_grad():
        return of(model, weights, x[y == label]).double().mean(0)


def features(model, weights, x):
    return model.features(weights, x)


def probabilities(model, weights, x):
    return model(weights, x).softmax(1)


def logits_of(model, weights, x):
    return model(weights, x)


def batch_of(made, client=0, width=5, fine=False):
    batch = Batch(
        *(v if v is None else v[0] for v in made.feed.epoch([client], 0, 0).batch(1, 0, width))
    )
    return batch._replace(x=batch.x.double()) if fine else batch


def double(tree):
    return {n: v.double() for n, v in tree.items()}


def taught(algorithm, network="bn_net", lacking=(2,)):
    """(Trainer, variables of a client in round 2), float64; there is something to learn for all
    classes but ``lacking``.
    """
    made = small.make_trainer(algorithm, network)
    v = small.initial_variables(made)
    shared = {
        n: numbers(*w.shape, at=7, dtype=torch.float64).abs() + 0.1 for n, w in v.shared.items()
    }
    count = ".class.shares" if isinstance(algorithm, FedProto) else ".class.holders"
    shared[count] = torch.full((small.CLASSES,), 2.0, dtype=torch.float64)
    shared[count][list(lacking)] = 0
    return made, Variables(shared, double(v.personal))


def gradients(made, v, batch, round_=1):
    """({leaf: gradient of the training loss}, the loss)."""
    leaves = {
        n: w.clone().requires_grad_(made.model.role(n) not in (None, "stats"))
        for n, w in v.personal.items()
    }
    loss = phases_of(made.local(round_))[0].steps[0].loss(Variables(v.shared, leaves), v, batch)
    wanted = {n: w for n, w in leaves.items() if w.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(loss, wanted.values()), strict=True)), loss.detach()


# All three


@METHODS
@pytest.mark.parametrize("network", [thorough_param("cnn"), pytest.param(MIXED, id="mixed")])
def test_loop_and_stack_train_alike(algorithm, network):
    loop, stack = (
        small.final_state(algorithm, network, stacked=stacked) for stacked in (False, True)
    )
    small.assert_near(stack.shared, loop.shared)
    small.assert_near(stack.personal, loop.personal)


@METHODS
@NETWORKS
def test_absent_clients_keep_their_own_leaves_and_the_others_networks_train(algorithm, network):
    federation, state = small.make_experiment(algorithm, network, participation=0.6, stacked=True)
    before, chosen = small.clone_tree(state.personal), federation.cohorts.sample(0).members
    state = small.run_rounds(federation, state, 1)
    assert len(chosen) == 3
    for client in range(5):
        client_type, row = federation.clients[client], federation.placement.row_of_client[client]
        for name in client_type.initial.personal:
            a, b = (tree[client_type.prefix + name][row] for tree in (state.personal, before))
            assert torch.equal(a, b) == (client not in chosen), (client, name)


@METHODS
@PATHS
def test_training_writes_to_nothing_that_was_given_and_no_client_to_anothers(algorithm, stacked):
    federation, state = small.make_experiment(algorithm, "bn_net", stacked=stacked)
    state = small.run_rounds(federation, state, 1)
    before, initial = (
        (small.clone_tree(state.shared), small.clone_tree(state.personal)),
        small.clone_tree(federation.clients.trainer.model.initial),
    )
    ends, copies = [], []
    rows = {
        n: v[[federation.placement.row_of_client[c] for c in federation.placement.groups[0]]]
        for n, v in state.personal.items()
    }
    for done in federation.clients.trainer.train(
        federation.placement.groups[0], state.shared, rows, 1
    ):
        upload = federation.algorithm.upload(done.start, done.end, 1)
        ends.append((upload.message, done.end.personal))
        copies.append(tuple(map(small.clone_tree, ends[-1])))
    assert small.trees_equal(state.shared, before[0]) and small.trees_equal(
        state.personal, before[1]
    )
    assert small.trees_equal(federation.clients.trainer.model.initial, initial)
    assert all(
        small.trees_equal(a, b)
        for end, copy in zip(ends, copies, strict=True)
        for a, b in zip(end, copy, strict=False)
    )


MIX = (
    "model={mix: [{name: cnn, width: 4, hidden: 8}, {name: 'user_parts:normed'}, "
    "{name: cnn, width: 2, hidden: 8}]}"
)
PROTOTYPES = "fedproto", "algorithm.inference=prototypes"
NAMES = pytest.mark.parametrize(
    "name",
    [thorough_param(("lg_fedavg",)), thorough_param(("fd",)), pytest.param(PROTOTYPES)],
    ids=lambda n: n[0],
)


def of(name):
    return MIX, f"algorithm={name[0]}", *name[1:]


@NAMES
def test_mixed_networks_on_one_and_three_ranks_are_equal_to_the_bit(name):
    alone = run_rounds(*of(name))[0]
    assert len({n.partition("/")[0] for n in alone[0].personal}) == 3
    for moments in run_rounds(*of(name), ranks=3):
        for a, b in zip(alone, moments, strict=True):
            assert trees_equal(a.shared, b.shared) and trees_equal(a.personal, b.personal)
            assert all(
                (x == b.clients[n]).all() for n, x in a.clients.items() if n in ("accuracy", "loss")
            )
            assert all(
                a.row[n] == b.row[n] for n in ("train_loss", "bytes_up", "bytes_down") if a.row
            )


@pytest.mark.thorough
@NAMES
def test_a_resume_of_mixed_networks_moves_no_bit(name, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(read(TINY, [*of(name), f"output={whole}"]), str(TINY), Solo()) == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints/000004")
    assert resume(cut, [], Solo()) == 0
    assert_same_run(whole, cut)


@pytest.mark.parametrize(
    "name, leaf", [("lg_fedavg", "head.weight"), ("fedproto", "class.means"), ("fd", None)]
)
def test_features_of_two_widths_are_refused_where_they_matter(name, leaf):
    config = tiny_config(
        "model={mix: [{name: cnn, hidden: 8}, {name: cnn, hidden: 6}]}", f"algorithm={name}"
    )
    if leaf is None:
        assert len(build(config, str(TINY), Solo()).federation.clients.types) == 2
        return
    with pytest.raises(
        Refusal, match=rf"name = {name}: shares {leaf}, .* \(\[4, 8\] and \[4, 6\]\)"
    ):
        build(config, str(TINY), Solo())


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: FD(gamma=-1.0), "gamma = -1.0: must be a number of at least 0"),
        (lambda: FedProto(lam=-0.5), "lam = -0.5: must be a number of at least 0"),
    ],
)
def test_impossible_fields_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_networks_without_what_is_shared_are_refused():
    by_convolution = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    alone = nn.Linear(5, 6)
    model = from_module(by_convolution, 6, small.SHAPE)
    LGFedAvg().check(model, LocalTraining())
    with pytest.raises(
        ValueError, match="name = fedproto: needs a network with a body and a Linear classifier"
    ):
        FedProto().check(model, LocalTraining())
    with pytest.raises(
        ValueError, match="name = lg_fedavg: needs a network with a body and a head"
    ):
        LGFedAvg().check(from_module(alone, 6, (5,)), LocalTraining())


# LG-FedAvg


@STACK_FIRST
@pytest.mark.parametrize("participation", [thorough_param(1.0), 0.6])
@pytest.mark.parametrize("absent", ["exclude", "stale"])
def test_lg_fedavg_with_one_network_is_fedper_that_keeps_the_body(stacked, participation, absent):
    body = tuple(n for n in small.make_model("bn_net").initial if not n.startswith("fc."))
    how = {"network": "bn_net", "stacked": stacked, "participation": participation}
    for weights in ("samples", "uniform"):
        fields = {"weights": weights, "absent": absent}
        mine = small.final_state(LGFedAvg(**fields), **how)
        other = small.final_state(FedPer(personal=body, **fields), **how)
        assert small.trees_equal(mine.personal, other.personal)
        assert small.trees_equal(
            {n.replace(".head.", "fc."): v for n, v in mine.shared.items()}, other.shared
        )


@STACK_FIRST
def test_lg_fedavg_of_one_client_is_fedavg(stacked):
    how = {"network": "bn_net", "sizes": (12,), "stacked": stacked}
    mine, plain = (small.final_state(a, **how) for a in (LGFedAvg(), FedAvg()))
    whole = {n: v[0] for n, v in mine.personal.items()} | {
        n.replace(".head.", "fc."): v for n, v in mine.shared.items()
    }
    assert small.trees_equal({n: whole[n] for n in plain.shared}, plain.shared)


@pytest.mark.parametrize("weights", ["samples", "uniform"])
def test_the_heads_of_different_networks_are_averaged_and_their_bodies_are_not(weights):
    federation, state = small.make_experiment(LGFedAvg(weights=weights), MIXED, participation=0.8)
    begin, done = state.shared, trained(federation, state)
    after = small.run_rounds(federation, state, 1)
    assert list(after.shared) == [".head.weight", ".head.bias"] and len(done) == 4
    share = {
        c: federation.clients.weights[c] / sum(federation.clients.weights[k] for k in done)
        for c in done
    }
    assert len(set(share.values())) == (1 if weights == "uniform" else 3)
    for name, value in after.shared.items():
        mean = sum(share[c] * d.end.shared[name].double() for c, d in done.items())
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-8)
        assert len({d.end.shared[name].numpy().tobytes() for d in done.values()}) == 4
        assert not torch.equal(value, begin[name])
    for client, d in done.items():
        model = federation.clients[client].trainer.model
        assert set(d.end.personal) == {n for n in model.leaves if model.role(n) != "head"}
        w = federation.algorithm.client_model(model, Variables(after.shared, d.end.personal))
        assert list(w) == list(model.initial) or set(w) == set(model.initial)
        assert torch.equal(w[f"{model.head}.weight"], after.shared[".head.weight"])


def test_all_networks_begin_with_the_head_of_the_first():
    federation, state = small.make_experiment(LGFedAvg(), MIXED)
    assert torch.equal(state.shared[".head.weight"], small.make_model("cnn").initial["9.weight"])
    done = trained(federation, state)
    assert all(
        torch.equal(d.start.shared[".head.weight"], state.shared[".head.weight"])
        for d in done.values()
    )


def test_lg_fedavg_sends_the_head_up_and_down():
    federation, state = small.make_experiment(LGFedAvg(), MIXED, participation=0.6)
    _, row, clients = run_round(federation, state, evaluate=True, stop=False)
    assert row["bytes_up"] == row["bytes_down"] == 3 * 4 * (5 * 6 + 6)
    assert (clients["accuracy"] == clients["accuracy_aggregated"]).all()
    assert row["drift"] > 0


# The terms of FD and FedProto


@FEW_TERMS
@NETWORKS
@STACK_FIRST
def test_without_its_term_a_method_is_local_to_the_bit(algorithm, network, stacked):
    how = {"network": network, "stacked": stacked, "participation": 0.6}
    mine, plain = (small.final_state(a, rounds=3, **how) for a in (off(algorithm), Local()))
    assert small.trees_equal({n: mine.personal[n] for n in plain.personal}, plain.personal)
    assert any(v.any() for v in mine.shared.values())


@FEW_TERMS
def test_with_its_term_a_method_is_local_in_round_1_and_not_in_round_2(algorithm):
    once, twice = (small.final_state(algorithm, MIXED, rounds) for rounds in (1, 2))
    (first, second) = (small.final_state(Local(), MIXED, rounds) for rounds in (1, 2))
    assert small.trees_equal({n: once.personal[n] for n in first.personal}, first.personal)
    model = small.make_model("bn_net")
    moved = [n for n in second.personal if "fc.bias" in n or "9.bias" in n]
    assert len(moved) == 3 and model.head == "fc"
    for name in moved:
        assert all(
            not torch.equal(a, b)
            for a, b in zip(twice.personal[name], second.personal[name], strict=True)
        ), name


@TERMS
@pytest.mark.parametrize("network", ["cnn", "bn_net"])
def test_the_gradient_of_the_loss_is_its_finite_difference(algorithm, network):
    made, v = taught(algorithm, network)
    batch = batch_of(made, fine=True)
    # a class that is unknown, and others
    assert set(batch.y.tolist()) & {2} and set(batch.y.tolist()) - {2}
    grads, _ = gradients(made, v, batch)
    ways = {n: numbers(*g.shape, at=3, dtype=torch.float64) for n, g in grads.items()}

    def moved(h):
        return v._replace(personal=v.personal | {n: v.personal[n] + h * w for n, w in ways.items()})

    slope = (
        gradients(made, moved(1e-6), batch)[1] - gradients(made, moved(-1e-6), batch)[1]
    ) / 2e-6
    torch.testing.assert_close(
        sum((grads[n] * ways[n]).sum() for n in grads), slope, rtol=1e-5, atol=1e-7
    )


def term_alone(algorithm, network, batch_to=lambda batch: batch, **fields):
    """(Trainer, v, batch, gradients of the term alone, its value): on minus off."""
    made, v = taught(replace(algorithm, **fields), network)
    batch = batch_to(batch_of(made, fine=True))
    grads, loss = gradients(made, v, batch)
    bare, fit = gradients(replace(made, transport=Transport(off(made.algorithm))), v, batch)
    return made, v, batch, {n: grads[n] - bare[n] for n in grads}, loss - fit


@pytest.mark.parametrize("network", ["cnn", "bn_net"])
@pytest.mark.parametrize("lam", [1.0, 0.3])
def test_the_pull_of_fedproto_has_the_gradient_of_its_closed_form(network, lam):
    made, v, batch, grads, value = term_alone(FedProto(), network, lam=lam)
    leaves = {n: v.personal[n].clone().requires_grad_(n in grads) for n in made.model.initial}
    z = made.model.features(leaves, batch.x)
    P = v.shared[".class.means"] / 2  # the shares are 2
    gap = torch.stack([(z[b] - P[y]) * (y != 2) for b, y in enumerate(batch.y.tolist())]).detach()
    assert value == pytest.approx(lam * gap.square().sum().item() / (5 * 5))
    how = {"allow_unused": True, "materialize_grads": True}  # the head has no part in it
    wanted = torch.autograd.grad(z, [leaves[n] for n in grads], 2 * lam * gap / (5 * 5), **how)
    for (name, found), right in zip(grads.items(), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12, msg=name)
        assert found.any() != (made.model.role(name) == "head")


@pytest.mark.parametrize("network", ["cnn", "bn_net"])
@pytest.mark.parametrize("fields", [{"gamma": 0.4}, {"gamma": 2.0, "outputs": "logits"}], ids=str)
def test_the_distillation_of_fd_has_the_gradient_of_its_closed_form(network, fields):
    made, v, batch, grads, value = term_alone(FD(), network, **fields)
    leaves = {n: v.personal[n].clone().requires_grad_(n in grads) for n in made.model.initial}
    o = made.model(leaves, batch.x)
    zhat = v.shared[".class.outputs"] / 2  # two other holders
    zhat = zhat.softmax(1) if "outputs" in fields else zhat
    q = torch.stack([zhat[y] * (y != 2) for y in batch.y.tolist()])
    assert value == pytest.approx(-fields["gamma"] * (q * o.log_softmax(1)).sum().item() / 5)
    error = fields["gamma"] * (q.sum(1, keepdim=True) * o.softmax(1) - q).detach() / 5
    wanted = torch.autograd.grad(o, [leaves[n] for n in grads], error)
    for (name, found), right in zip(grads.items(), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12, msg=name)
        assert found.any()


@TERMS
def test_padding_counts_for_nothing(algorithm):
    made, v = taught(algorithm, "cnn", lacking=())
    batch = batch_of(made, fine=True)
    kept = batch._replace(x=batch.x[:3], y=batch.y[:3])
    padded = batch._replace(real=torch.arange(5) < 3)
    (a, loss), (b, right) = (gradients(made, v, given) for given in (padded, kept))
    assert loss == pytest.approx(right.item(), rel=1e-12)
    small.assert_near(a, b, rtol=1e-12)


@TERMS
def test_nothing_known_is_nothing_learned(algorithm):
    made, v = taught(algorithm, "cnn", lacking=range(small.CLASSES))
    batch = batch_of(made, fine=True)
    (a, loss), (b, fit) = (
        gradients(m, v, batch) for m in (made, replace(made, transport=Transport(off(algorithm))))
    )
    assert loss == fit and small.trees_equal(a, b)


# What FedProto shares


@pytest.mark.parametrize("weights", ["uniform", "samples"])
@pytest.mark.parametrize("participation", [thorough_param(1.0), 0.6])
@STACK_FIRST
def test_a_prototype_is_the_mean_over_the_clients_that_hold_the_class(
    weights, participation, stacked
):
    federation, state = small.make_experiment(
        FedProto(weights=weights), MIXED, participation=participation, stacked=stacked
    )
    unequal = False
    for _ in range(2):
        done, state = trained(federation, state), small.run_rounds(federation, state, 1)
        P, known = prototypes(state.shared)
        for label in range(small.CLASSES):
            holders = [c for c in done if label in held(federation, c)]
            assert known[label] == bool(holders)
            if holders:
                each = torch.stack(
                    [class_mean(federation, done[c], label, features) for c in holders]
                )
                many = torch.tensor(
                    [int((survey(federation, c)[2] == label).sum()) for c in holders]
                )
                unequal |= len(set(many.tolist())) > 1
                share = (many if weights == "samples" else torch.ones(len(holders))).double()[
                    :, None
                ]
                torch.testing.assert_close(
                    P[label].double(), (share * each).sum(0) / share.sum(), rtol=1e-5, atol=1e-6
                )
            else:
                assert not P[label].any()
    assert unequal  # so that the two weights differ


@pytest.mark.parametrize("weights", ["uniform", "samples"])
def test_a_class_that_one_client_holds_has_its_own_prototype(weights):
    federation, state = small.make_experiment(
        FedProto(weights=weights), ("bn_net", "cnn"), sizes=(11, 3)
    )
    only = held(federation, 0) - held(federation, 1)
    done, state = trained(federation, state), small.run_rounds(federation, state, 1)
    P, _ = prototypes(state.shared)
    own, _ = prototypes(done[0].end.shared)
    assert len(only) == 4 and held(federation, 1) < held(federation, 0)
    for label in range(6):
        assert torch.allclose(P[label], own[label], rtol=1e-6, atol=1e-8) == (label in only), label


def test_clients_alike_share_the_prototype_of_each():
    federation, state = small.make_experiment(FedProto(), "cnn", sizes=(6, 6, 6), same_sample=True)
    done, state = trained(federation, state), small.run_rounds(federation, state, 1)
    P, known = prototypes(state.shared)
    assert known.sum() == 1
    torch.testing.assert_close(P, prototypes(done[1].end.shared)[0])


@pytest.mark.parametrize("absent, remembered", [("exclude", False), ("stale", True)])
def test_a_class_that_no_client_of_the_round_holds_is_forgotten_or_stale(
    absent, remembered, monkeypatch
):
    # client 0, then client 1
    monkeypatch.setattr(Cohorts, "_sample_members", lambda self, round_, sizes: frozenset({round_}))
    federation, state = small.make_experiment(
        FedProto(absent=absent), MIXED, sizes=(11, 2), participation=0.5
    )
    lost = sorted(held(federation, 0) - held(federation, 1))
    before = small.run_rounds(federation, state, 1)
    after = small.run_rounds(federation, before, 1)
    (P, known), (Q, later) = prototypes(before.shared), prototypes(after.shared)
    assert known.all() and len(lost) == 4
    assert all(later[label] == (remembered or label not in lost) for label in range(6))
    torch.testing.assert_close(Q[lost], P[lost] if remembered else torch.zeros(4, 5))
    assert not torch.equal(Q, P)


@pytest.mark.parametrize("participation", [1.0, 0.6])
def test_fedproto_sends_what_is_held_and_receives_what_is_known(participation):
    federation, state = small.make_experiment(FedProto(), MIXED, participation=participation)
    known = set()
    for round_ in range(3):
        chosen = federation.cohorts.sample(round_).members
        state, row, _ = run_round(federation, state, evaluate=False, stop=False)
        assert row["bytes_up"] == 4 * 5 * sum(len(held(federation, c)) for c in chosen)
        assert row["bytes_down"] == 4 * 5 * len(known) * len(chosen)
        known = set().union(*(held(federation, c) for c in chosen))
    assert len(known) > 0


# How FedProto predicts


def judged(among, own, known=(1, 1, 1, 0, 1, 0)):
    """(logits by prototypes, - mean_d (z - P)^2 [B, classes]) of some inputs."""
    algorithm = FedProto(inference="prototypes", among=among)
    made = small.make_trainer(algorithm, "bn_net")
    v, shares = small.initial_variables(made), torch.tensor(known).float() / 3
    model, x = made.model.eval_mode(), numbers(40, *small.SHAPE)
    z = model.features(model.initial, x)
    P = z[:6] * torch.tensor(known)[:, None]
    shared = {".class.means": P * shares[:, None], ".class.shares": shares}
    v = Variables(shared, v.personal | {".own.classes": torch.tensor(own).float()})
    return algorithm.logits(model, v, x), -(z[:, None] - P).square().mean(2)


@pytest.mark.parametrize(
    "among, own, meant",
    [
        ("known", (1, 1, 0, 1, 0, 0), [0, 1, 2, 4]),
        ("own", (1, 1, 0, 1, 0, 0), [0, 1]),
        ("own", (0, 0, 0, 0, 0, 0), [0, 1, 2, 4]),  # has not trained
        ("own", (0, 0, 0, 1, 0, 1), [0, 1, 2, 4]),  # holds what nobody has shown
    ],
)
def test_the_prediction_is_the_nearest_prototype_of_those_that_are_meant(among, own, meant):
    logits, near = judged(among, own)
    rest = [label for label in range(6) if label not in meant]
    assert torch.equal(logits.argmax(1), torch.tensor(meant)[near[:, meant].argmax(1)])
    assert len(logits.argmax(1).unique()) > 1
    torch.testing.assert_close(
        logits[:, meant].log_softmax(1), near[:, meant].log_softmax(1), rtol=1e-4, atol=1e-5
    )
    assert (logits[:, rest].amax(1) <= logits[:, meant].amin(1) - 99).all()
    loss = F.cross_entropy(near[:, meant], torch.zeros(40, dtype=torch.int64)).item()
    assert F.cross_entropy(logits, torch.full((40,), meant[0])).item() == pytest.approx(
        loss, rel=1e-4
    )


@pytest.mark.parametrize("network", ["cnn", MIXED], ids=["cnn", "mixed"])
def test_a_round_judges_by_the_new_prototypes_and_right_after_training_by_the_clients_own(network):
    federation, state = small.make_experiment(FedProto(inference="prototypes"), network)
    done = trained(federation, state)
    state, _, scores = run_round(federation, state, evaluate=True, stop=False)
    for client, d in done.items():
        trainer = federation.clients[client].trainer
        model, tests = (
            trainer.model.eval_mode(),
            trainer.feed.test_batch([client], 0, trainer.feed.test_size(client)),
        )
        z = model.features(
            {n: w for n, w in d.end.personal.items() if n in model.leaves}, tests.x[0]
        )
        mine = sorted(held(federation, client))
        assert torch.equal(d.end.personal[".own.classes"].nonzero().flatten(), torch.tensor(mine))
        for shared, column in (
            (state.shared, "accuracy_aggregated"),
            (d.end.shared, "accuracy_trained"),
        ):
            P, _ = prototypes(shared)
            right = torch.tensor(mine)[torch.cdist(z, P[mine]).argmin(1)] == tests.y[0]
            assert scores[column][client] == pytest.approx(right.double().mean().item())
    assert (scores["accuracy"] == scores["accuracy_aggregated"]).all()


def test_the_classifier_is_judged_the_same_before_and_after_aggregation():
    for algorithm in (FedProto(), FD()):
        federation, state = small.make_experiment(algorithm, MIXED)
        _, _, scores = run_round(federation, state, evaluate=True, stop=False)
        assert (scores["accuracy_trained"] == scores["accuracy_aggregated"]).all()


# What FD shares


@pytest.mark.parametrize("outputs, what", [("probabilities", probabilities), ("logits", logits_of)])
@pytest.mark.parametrize("participation", [thorough_param(1.0), 0.6])
@STACK_FIRST
def test_a_client_learns_from_the_mean_output_of_the_others(outputs, what, participation, stacked):
    federation, state = small.make_experiment(
        FD(outputs=outputs), MIXED, participation=participation, stacked=stacked
    )
    sat_out = came_back = 0
    for round_ in range(1, 5):
        done, state = trained(federation, state), small.run_rounds(federation, state, 1)
        for client in range(5):
            client_type, row = (
                federation.clients[client],
                federation.placement.row_of_client[client],
            )
            own = {
                n: state.personal[client_type.prefix + n][row] for n in client_type.initial.personal
            }
            counts = client_type.trainer.feed.unshuffled_batch([client], all_samples=True).counts[0]
            zhat, holders = federation.algorithm.teacher_outputs(
                Variables(state.shared, own), counts, round_
            )
            sat_out += client not in done
            came_back += client not in done and bool(own[".own.round"])
            for label in range(6):
                others = [c for c in done if c != client and label in held(federation, c)]
                assert holders[label] == len(others)
                if others:
                    right = torch.stack(
                        [class_mean(federation, done[c], label, what) for c in others]
                    ).mean(0)
                    right = right if outputs == "probabilities" else right.softmax(0)
                    torch.testing.assert_close(zhat[label].double(), right, rtol=1e-4, atol=1e-5)
    assert participation == 1.0 or (sat_out and came_back)


@pytest.mark.parametrize("outputs", ["probabilities", "logits"])
def test_a_class_that_no_other_client_holds_is_not_distilled(outputs):
    federation, state = small.make_experiment(FD(outputs=outputs), ("bn_net", "cnn"), sizes=(11, 3))
    only = held(federation, 0) - held(federation, 1)
    state = small.run_rounds(federation, state, 1)
    own = {
        n: state.personal[f"kind-0/{n}"][0] for n in federation.clients.types[0].initial.personal
    }
    counts = federation.clients.trainer.feed.unshuffled_batch([0], all_samples=True).counts[0]
    _, holders = federation.algorithm.teacher_outputs(Variables(state.shared, own), counts, 1)
    assert {label for label in range(6) if holders[label] == 0} == only and len(only) == 4
    y = torch.arange(6)
    logits = numbers(6, 6).requires_grad_()
    zhat, _ = federation.algorithm.teacher_outputs(Variables(state.shared, own), counts, 1)
    distill(logits, zhat, holders, Batch(None, y, None, None, counts)).backward()
    assert {label for label in range(6) if not logits.grad[label].any()} == only


@STACK_FIRST
def test_fd_of_one_client_is_local(stacked):
    how = {"sizes": (12,), "stacked": stacked, "network": "bn_net"}
    mine, plain = (small.final_state(a, rounds=3, **how) for a in (FD(), Local()))
    assert small.trees_equal({n: mine.personal[n] for n in plain.personal}, plain.personal)


def test_the_outputs_of_alike_clients_are_those_of_each():
    federation, state = small.make_experiment(FD(), "cnn", sizes=(6, 6, 6), same_sample=True)
    done, state = trained(federation, state), small.run_rounds(federation, state, 1)
    total = 3 * done[0].end.shared[".class.outputs"]
    torch.testing.assert_close(state.shared[".class.outputs"], total)
    rows = state.shared[".class.outputs"].sum(1)
    torch.testing.assert_close(rows, state.shared[".class.holders"])  # probabilities add up to one
    assert state.shared[".class.holders"].sum() == 3


@pytest.mark.parametrize("participation", [1.0, 0.6])
def test_fd_sends_what_is_held_and_receives_what_is_known(participation):
    federation, state = small.make_experiment(FD(), MIXED, participation=participation)
    known = set()
    for round_ in range(3):
        chosen = federation.cohorts.sample(round_).members
        state, row, _ = run_round(federation, state, evaluate=False, stop=False)
        assert row["bytes_up"] == 4 * 6 * sum(len(held(federation, c)) for c in chosen)
        assert row["bytes_down"] == 4 * 6 * len(known) * len(chosen)
        known = set().union(*(held(federation, c) for c in chosen))


@pytest.mark.parametrize(
    "name, numbers_", [("fd", 4 * 4), ("fedproto", 4 * 8), ("lg_fedavg", 4 * 8 + 4)]
)
def test_a_plan_tells_the_most_that_is_sent(name, numbers_, unmeasured):
    text = plan(tiny_config(*of((name,))), str(TINY), 1)
    assert f" {4 * numbers_} B up, {4 * numbers_} B down per client and round" in text


# Class means


def test_class_means_are_zero_where_there_is_no_sample_and_skip_padding(monkeypatch):
    x, y = numbers(7, 3), torch.tensor([0, 2, 2, 0, 2, 1, 1])
    batch = Batch(x, y, torch.arange(7) < 5, None, torch.tensor([2.0, 0, 3, 0]))
    right = torch.stack([x[[0, 3]].mean(0), torch.zeros(3), x[[1, 2, 4]].mean(0), torch.zeros(3)])
    torch.testing.assert_close(client_class_means(lambda x: x, batch), right)
    monkeypatch.setattr("fedlora_mpi.components.prototypes.CHUNK", 2)
    torch.testing.assert_close(client_class_means(lambda x: x, batch), right)


def test_a_pull_where_all_is_known_is_the_plain_one():
    z, c, batch = (
        numbers(5, 4),
        numbers(3, 4),
        Batch(None, torch.tensor([0, 1, 2, 0, 0]), None, None, None),
    )
    assert torch.equal(
        prototype_loss(z, c, batch), prototype_loss(z, c, batch, torch.ones(3, dtype=torch.bool))
    )
    lacking = prototype_loss(z, c, batch, torch.tensor([True, False, True]))
    assert lacking.item() == pytest.approx(
        (z - c[batch.y]).square()[[0, 2, 3, 4]].sum().item() / (5 * 4)
    )
