"""FedALA and FedAvg with fine-tuning against FedAvg, a personal head,
and their equations by hand."""

from dataclasses import dataclass, replace

import pytest
import small
import torch
from tiers import STACK_FIRST, thorough_param

from fedlora_mpi.algorithm import Batch, LocalTraining, Transport, Variables
from fedlora_mpi.algorithms.fedala import FedALA
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.fedavg_ft import FedAvgFT
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.tree import numel, split
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.models.substitutes import Substitutes

NETWORKS = pytest.mark.parametrize("network", [thorough_param("cnn"), "bn_net"])
TOP = {
    "cnn": ["9.weight", "9.bias"],
    "bn_net": ["fc.weight", "fc.bias"],
    "noisy_net": ["5.weight", "5.bias"],
}


def numbers(*shape, at=0):
    return torch.randn(*shape, generator=rng(1, "test", *shape, at))


def batch(made, client=0):
    return Batch(
        *(v if v is None else v[0] for v in made.feed.epoch([client], 0, 0).batch(1, 0, 5))
    )


def met(made, at=0):
    """Variables whose own top is apart from the global one, and whose weights lie within (0, 1)."""
    v = small.initial_variables(made)

    def change(n, w):
        return w.clone().fill_(0.5) + 0.1 * numbers(*w.shape, at=at).clamp(-4, 4)

    apart = {
        n: change(n, w) if n.startswith(".A.") else w + 0.3 * numbers(*w.shape)
        for n, w in v.personal.items()
    }
    return v._replace(personal=apart)


# Degenerate cases


@STACK_FIRST
@pytest.mark.parametrize("network", [thorough_param("cnn"), "bn_net", thorough_param("noisy_net")])
@pytest.mark.parametrize("participation", [thorough_param(1.0), 0.6])
def test_weights_that_do_not_learn_are_fedavg(network, stacked, participation):
    how = {"network": network, "stacked": stacked, "participation": participation}
    how |= {"train": replace(small.TRAIN, weight_decay=0.01)}
    federation, state = small.make_experiment(FedALA(eta=0.0, start_epochs=2, p=2), **how)
    plain_federation, plain = small.make_experiment(FedAvg(), **how)
    for _ in range(3):
        state, plain = (
            small.run_rounds(federation, state, 1),
            small.run_rounds(plain_federation, plain, 1),
        )
        assert small.trees_equal(state.shared, plain.shared)
    assert all((v == 1).all() for n, v in state.personal.items() if n.startswith(".A."))


@NETWORKS
def test_round_1_is_fedavg_and_round_2_is_not(network):
    federation, state = small.make_experiment(FedALA(), network)
    plain_federation, plain = small.make_experiment(FedAvg(), network)
    state, plain = (
        small.run_rounds(federation, state, 1),
        small.run_rounds(plain_federation, plain, 1),
    )
    assert small.trees_equal(state.shared, plain.shared)
    weights, _ = split(state.personal, lambda n: n.startswith(".A."))
    assert all((v == 1).all() for v in weights.values())
    state, plain = (
        small.run_rounds(federation, state, 1),
        small.run_rounds(plain_federation, plain, 1),
    )
    assert not any(torch.equal(v, plain.shared[n]) for n, v in state.shared.items())
    assert all((v < 1).any() for v in weights.values())


@dataclass(frozen=True)
class PersonalHead(FedAvg):
    """FedPer: the last layer never leaves."""

    def init(self, model, rng):
        head, rest = split(model.initial, lambda n: model.role(n) == "head")
        return Variables(rest, head)

    def client_model(self, model, v):
        return v.shared | v.personal


@STACK_FIRST
@NETWORKS
@pytest.mark.parametrize("participation", [thorough_param(1.0), 0.6])
def test_weights_of_zero_keep_the_head_personal(network, stacked, participation):
    how = {"network": network, "stacked": stacked, "participation": participation}
    federation, state = small.make_experiment(FedALA(eta=0.0), **how)
    plain_federation, plain = small.make_experiment(PersonalHead(), **how)
    for name in TOP[network]:
        state.personal[f".A.{name}"].zero_()
    state, plain = (
        small.run_rounds(federation, state, 3),
        small.run_rounds(plain_federation, plain, 3),
    )
    for name in TOP[network]:
        assert torch.equal(state.personal[f".own.{name}"], plain.personal[name])
    assert small.trees_equal({n: state.shared[n] for n in plain.shared}, plain.shared)


# The weights


@NETWORKS
def test_the_gradient_of_a_weight_is_the_gap_times_the_gradient_of_the_mix(network):
    made = small.make_trainer(FedALA(), network)
    v, model, (step,) = (
        met(made),
        made.model,
        made.algorithm.local(made.model, made.settings, 1)[0].steps,
    )
    v = v._replace(
        personal={n: w.requires_grad_(n.startswith(".A.")) for n, w in v.personal.items()}
    )
    names = TOP[network]
    grads = torch.autograd.grad(
        step.loss(v, v, batch(made)), [v.personal[f".A.{n}"] for n in names]
    )
    own, weight = ({n: v.personal[f".{kind}.{n}"].detach() for n in names} for kind in ("own", "A"))
    mix = {n: (own[n] + (v.shared[n] - own[n]) * weight[n]).requires_grad_() for n in names}
    plain = FedAvg().loss(model)(Variables(model.detach_tree(v.shared) | mix, {}), v, batch(made))
    for name, grad, outer in zip(
        names, grads, torch.autograd.grad(plain, mix.values()), strict=True
    ):
        expected = (v.shared[name] - own[name]) * outer
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)
        assert grad.any()


def aggregated(made, v, client, round_, used):
    """(A, mix) of one client after plain clipped steps of 30 on its first ``used`` samples."""
    own, weight = (
        {n: v.personal[f".{kind}.{n}"] for n in made.algorithm.mixed_leaves(made.model)}
        for kind in ("own", "A")
    )

    def mixed(weight):
        return {n: o + (v.shared[n] - o) * weight[n] for n, o in own.items()}

    epoch, width = made.feed.epoch([client], round_, "aggregation 0"), made.settings.batch_size
    for first in range(0, used, width):
        data = epoch.batch(1, first, min(width, used - first))
        data = Batch(*(value if value is None else value[0] for value in data))
        leaves = {n: w.requires_grad_() for n, w in mixed(weight).items()}
        with Substitutes(None, data.key):  # BatchNorm of one sample
            model = Variables(made.model.detach_tree(v.shared) | leaves, {})
            loss = FedAvg().loss(made.model)(model, v, data)
        grads = dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))
        weight = {
            n: (w - 30.0 * grads[n] * (v.shared[n] - own[n])).clamp(0, 1) for n, w in weight.items()
        }
    return weight, mixed(weight)


@STACK_FIRST
@NETWORKS
def test_weights_take_plain_clipped_steps_on_their_share_of_the_data(network, stacked):
    # of training, not of the weights
    settings = replace(small.TRAIN, momentum=0.9, weight_decay=0.1)
    made = small.make_trainer(Started(eta=30.0, s=60.0), network, train=settings, stacked=stacked)
    v = met(made)
    ends = {
        done.client: done.end
        for done in made.train(range(5), v.shared, small.repeat_rows(v.personal, 5), 7)
    }
    for client, used in enumerate((6, 4, 4, 1, 1)):  # 60 % of 11, 7, 7, 3 and 2, and never none
        weight, mix = aggregated(made, v, client, 7, used)
        found = {n: ends[client].personal[f".A.{n}"] for n in weight}
        small.assert_near(found, weight)
        assert {0.0, 1.0} < set(torch.cat([w.flatten() for w in found.values()]).tolist())
        top, below = split(ends[client].shared, mix.__contains__)
        small.assert_near(top, mix)
        assert small.trees_equal(below, {n: v.shared[n] for n in below})  # the statistics too


@dataclass(frozen=True)
class Started(FedALA):
    """Stops where local training would start."""

    def local(self, model, train, round_):
        return super().local(model, train, round_)[:2]


@STACK_FIRST
@NETWORKS
@pytest.mark.parametrize("rounds", [1, 2])
def test_evaluation_is_of_the_model_with_which_the_next_round_starts(network, stacked, rounds):
    federation, state = small.make_experiment(FedALA(start_epochs=2), network, stacked=stacked)
    state = small.run_rounds(federation, state, rounds)
    shared, rows = small.clone_tree(state.shared), small.clone_tree(state.personal)
    scores = federation.clients.trainer.evaluate(
        federation.placement.groups[0], state.shared, state.personal, rounds
    )
    assert small.trees_equal(state.shared, shared) and small.trees_equal(state.personal, rows)
    started = replace(federation.clients.trainer, transport=Transport(Started(start_epochs=2)))
    results = list(
        started.train(federation.placement.groups[0], shared, rows, rounds, evaluate=True)
    )
    assert torch.equal(scores, torch.stack([done.score[:2] for done in results]))
    plain = replace(federation.clients.trainer, transport=Transport(FedAvg()))
    assert (
        scores[:, 1] - plain.evaluate(federation.placement.groups[0], shared, {}, rounds)[:, 1]
    ).abs().min() > 1e-7


def test_evaluating_does_not_change_what_is_trained():
    states = []
    for evaluate in (True, False):
        federation, state = small.make_experiment(FedALA(start_epochs=2), "bn_net")
        for _ in range(3):
            state, _, _ = run_round(federation, state, evaluate=evaluate, stop=False)
        states.append(state)
    one, other = states
    assert small.trees_equal(one.shared, other.shared) and small.trees_equal(
        one.personal, other.personal
    )


def test_the_start_takes_longer_in_round_2_alone():
    algorithm, model = FedALA(), small.make_model()
    epochs = [algorithm.local(model, small.TRAIN, round_)[0].epochs for round_ in range(4)]
    assert epochs == [1, 11, 1, 1]


@pytest.mark.parametrize(
    "s, used", [(80.0, [400, 8, 5, 1, 1]), (100.0, [500, 11, 7, 2, 1]), (1.0, [5, 1, 1, 1, 1])]
)
def test_the_share_of_the_data_is_rounded_down_and_never_nothing(s, used):
    limit = FedALA(s=s).local(small.make_model(), small.TRAIN, 1)[0].limit
    assert [limit(size) for size in (500, 11, 7, 2, 1)] == used


@pytest.mark.parametrize(
    "p, tops",
    [(1, ["fc"]), (2, ["layers.1.downsample.1", "fc"]), (99, None)],
    ids=["head", "two", "too many"],
)
def test_p_counts_layers_from_the_end(p, tops):
    model = small.make_model("bn_net")
    if tops is None:
        with pytest.raises(ValueError, match="p = 99: must be at most 13, the layers of the model"):
            FedALA(p=p).check(model, LocalTraining())
        return
    FedALA(p=p).check(model, LocalTraining())
    assert FedALA(p=p).mixed_leaves(model) == [
        f"{layer}.{leaf}" for layer in tops for leaf in ("weight", "bias")
    ]


# What is kept, what travels


@STACK_FIRST
@NETWORKS
def test_participants_keep_their_trained_top_and_others_what_they_had(network, stacked):
    how = {"network": network, "participation": 0.6, "stacked": stacked, "group_size": 2}
    federation, state = small.make_experiment(FedALA(start_epochs=1), **how)
    state = small.run_rounds(federation, state, 1)
    before, chosen = small.clone_tree(state.personal), federation.cohorts.sample(1).members
    rows = [federation.placement.row_of_client[c] for c in chosen]
    trained = {}
    for group in federation.placement.groups:
        members = [c for c in group if c in chosen]
        if members:
            rows_C = {
                n: v[[federation.placement.row_of_client[c] for c in members]]
                for n, v in before.items()
            }
            trained |= {
                d.client: d.end
                for d in federation.clients.trainer.train(members, state.shared, rows_C, 1)
            }
    state = small.run_rounds(federation, state, 1)
    assert 0 < len(chosen) < 5 and set(trained) == chosen
    for row, client in enumerate(federation.placement.local_clients):
        for name in TOP[network]:
            now = state.personal[f".own.{name}"][row]
            kept = before[f".own.{name}"][row] if row not in rows else trained[client].shared[name]
            assert torch.equal(now, kept)
            same = torch.equal(state.personal[f".A.{name}"][row], before[f".A.{name}"][row])
            assert row in rows or same


@NETWORKS
def test_weights_and_own_tops_never_travel(network):
    federation, state = small.make_experiment(FedALA(), network)
    assert (
        list(federation.aggregator.terms.flat.shapes)
        == list(state.shared)
        == list(federation.clients.trainer.model.leaves)
    )
    assert list(state.personal) == [f".{kind}.{n}" for kind in ("own", "A") for n in TOP[network]]
    _, row, _ = run_round(federation, state, evaluate=False, stop=False)
    assert (
        row["bytes_up"]
        == row["bytes_down"]
        == 5 * 4 * numel(federation.clients.trainer.model.initial)
    )


@NETWORKS
def test_loop_and_stack_agree(network):
    states = []
    for stacked in (False, True):
        federation, state = small.make_experiment(FedALA(start_epochs=2), network, stacked=stacked)
        states.append(small.run_rounds(federation, state, 2))
    loop, stack = states
    small.assert_near(stack.shared, loop.shared)
    small.assert_near(stack.personal, loop.personal)


@pytest.mark.parametrize(
    "kind, fields",
    [
        (FedALA, {"eta": -0.1}),
        (FedALA, {"s": 0.0}),
        (FedALA, {"s": 100.5}),
        (FedALA, {"p": 0}),
        (FedALA, {"start_epochs": 0}),
        (FedAvgFT, {"ft_epochs": -1}),
    ],
)
def test_impossible_fields_are_refused(kind, fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=f"{name} = {value}: must be"):
        kind(**fields)


# FedAvg with fine-tuning


@STACK_FIRST
@NETWORKS
def test_fine_tuning_leaves_no_trace_in_the_state(network, stacked):
    how = {"network": network, "stacked": stacked, "participation": 0.6}
    federation, state = small.make_experiment(FedAvgFT(ft_epochs=2), **how)
    plain_federation, plain = small.make_experiment(FedAvg(), **how)
    for _ in range(2):
        state, row, tuned = run_round(federation, state, evaluate=True, stop=False)
        plain, other, scores = run_round(plain_federation, plain, evaluate=True, stop=False)
        assert (
            small.trees_equal(state.shared, plain.shared) and state.personal == plain.personal == {}
        )
        assert not (tuned["loss"] == scores["loss"]).any()
    assert (
        row["bytes_up"]
        == other["bytes_up"]
        == row["bytes_down"]
        == 3 * 4 * numel(federation.clients.trainer.model.initial)
    )


@STACK_FIRST
@NETWORKS
def test_fine_tuning_as_long_as_training_is_the_next_rounds_training(network, stacked):
    federation, state = small.make_experiment(
        FedAvgFT(ft_epochs=small.TRAIN.epochs), network, stacked=stacked
    )
    state = small.run_rounds(federation, state, 1)
    tuned = federation.clients.trainer.evaluate(
        federation.placement.groups[0], state.shared, {}, state.round
    )
    trained = federation.clients.trainer.train(
        federation.placement.groups[0], state.shared, {}, state.round, evaluate=True
    )
    assert torch.equal(tuned, torch.stack([done.score[:2] for done in trained]))


def test_no_fine_tuning_is_fedavg():
    federation, state = small.make_experiment(FedAvgFT(ft_epochs=0), "bn_net")
    plain = replace(federation.clients.trainer, transport=Transport(FedAvg()))
    assert torch.equal(
        *(
            t.evaluate(federation.placement.groups[0], state.shared, {}, 0)
            for t in (federation.clients.trainer, plain)
        )
    )


def test_one_epoch_of_fine_tuning_is_a_pass_of_sgd():
    # one batch, so one step
    settings = LocalTraining(epochs=3, batch_size=12, lr=0.3, momentum=0.9)
    made = small.make_trainer(FedAvgFT(ft_epochs=1), train=settings)
    v = small.initial_variables(made)
    leaves = {n: w.clone().requires_grad_() for n, w in v.shared.items()}
    data = made.feed.epoch([0], 4, 0).batch(1, 0, 11)
    loss = torch.nn.functional.cross_entropy(made.model(leaves, data.x[0]), data.y[0])
    grads = torch.autograd.grad(loss, leaves.values())
    moved = {n: w.detach() - 0.3 * g for (n, w), g in zip(leaves.items(), grads, strict=True)}
    (found,) = made.evaluate([0], v.shared, {}, 4)
    (expected,) = replace(made, transport=Transport(FedAvg())).evaluate([0], moved, {}, 4)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
