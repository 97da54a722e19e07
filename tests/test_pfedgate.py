"""pFedGate: the gate, the blocks that it scales, the knapsack, and what is left without it."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from tiers import STACK_FIRST, thorough_param
from torch import nn

from fedlora_mpi.algorithm import Batch, LocalTraining, Variables
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.pfedgate import PFedGate
from fedlora_mpi.components.gating import cut_tensors, gate_values, greedy_knapsack, select_runs
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.tree import numel
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.models.network import from_module
from fedlora_mpi.models.zoo import build

NETWORKS = pytest.mark.parametrize("network", [thorough_param("cnn"), "bn_net"])
ROOMY = (10, 9, 8, 8, 4)  # no batch of two: BatchNorm of two close numbers magnifies the last digit


def numbers(*shape, at=0):
    return torch.randn(*shape, generator=rng(1, "test", *shape, at))


def moving(made):
    """Variables whose gate is not as it began."""
    start = small.initial_variables(made)
    moved = {n: v + 0.1 * numbers(*v.shape, at=n).abs() for n, v in start.personal.items()}
    return start._replace(personal=moved)


def batch_of(made, client=0, width=5):
    return Batch(
        *(v if v is None else v[0] for v in made.feed.epoch([client], 0, 0).batch(1, 0, width))
    )


def everything(made, client):
    return Batch(
        *(v if v is None else v[0] for v in made.feed.unshuffled_batch([client], all_samples=True))
    )


@dataclass(frozen=True)
class Open(PFedGate):
    """A gate that multiplies by one."""

    def multipliers(self, model, personal, batch):
        return torch.ones_like(personal[".seen.M"])


@NETWORKS
@STACK_FIRST
def test_an_open_gate_is_fedavg(network, stacked):
    ends = []
    for algorithm in (Open(absent="exclude"), FedAvg()):
        federation, state = small.make_experiment(
            algorithm, network, stacked=stacked, participation=0.8
        )
        ends.append(
            run_round(federation, small.run_rounds(federation, state, 2), evaluate=True, stop=False)
        )
    assert small.trees_equal(ends[0][0].shared, ends[1][0].shared)
    assert all(
        np.array_equal(ends[0][2][n], ends[1][2][n], equal_nan=True) for n in ("accuracy_trained",)
    )


@STACK_FIRST
@pytest.mark.parametrize("sparsity", [1.0, 0.5])
def test_a_gate_that_learns_is_not_fedavg_and_differs_between_clients(stacked, sparsity):
    ends = []
    for algorithm in (PFedGate(sparsity=sparsity, absent="exclude"), FedAvg()):
        federation, state = small.make_experiment(algorithm, "bn_net", stacked=stacked)
        ends.append(small.run_rounds(federation, state, 2))
    assert min((v - ends[0].shared[n]).abs().max() for n, v in ends[1].shared.items()) > 1e-4
    for name in (".gate.weight", ".gate.out.bias", ".seen.M", ".seen.in.mean", ".seen.out.var"):
        gaps = [
            (ends[0].personal[name][a] - ends[0].personal[name][b]).abs().max()
            for a in range(5)
            for b in range(a)
        ]
        assert min(gaps) > 1e-6, name


@pytest.mark.parametrize("network", ["cnn", thorough_param("bn_net")])
@pytest.mark.parametrize("sparsity", [1.0, 0.5])
def test_loop_and_stack_play_alike(network, sparsity):
    outcomes = []
    for stacked in (False, True):
        federation, state = small.make_experiment(
            PFedGate(sparsity=sparsity), network, sizes=ROOMY, stacked=stacked
        )
        outcomes.append(small.run_rounds(federation, state, 2))
    small.assert_near(outcomes[1].shared, outcomes[0].shared)
    small.assert_near(outcomes[1].personal, outcomes[0].personal)


@STACK_FIRST
def test_nothing_of_an_absent_client_changes_and_theta_is_damped(stacked):
    how = {"participation": 0.6, "stacked": stacked, "group_size": 2}
    states = {}
    for absent in ("stale", "exclude"):
        federation, state = small.make_experiment(PFedGate(absent=absent), "bn_net", **how)
        states[absent] = (
            state,
            small.run_rounds(
                federation, state._replace(personal=small.clone_tree(state.personal)), 1
            ),
        )
    before, after = states["stale"]
    chosen = federation.cohorts.sample(0).members
    for client, at in federation.placement.row_of_client.items():
        same = [torch.equal(v[at], before.personal[n][at]) for n, v in after.personal.items()]
        assert all(same) == (client not in chosen)
    present = sum(federation.clients.weights[c] for c in chosen) / sum(federation.clients.weights)
    damped = {
        n: w + present * (states["exclude"][1].shared[n] - w) for n, w in before.shared.items()
    }
    small.assert_near(after.shared, damped, rtol=1e-6)


# Blocks


def test_tensors_are_cut_into_at_most_five_runs_of_equal_length():
    model = small.make_model("bn_net")
    found = cut_tensors(model, 5)
    assert list(found) == [n for n, leaf in model.leaves.items() if leaf.role != "stats"]
    place = 0
    for name, cut in found.items():
        size = model.initial[name].numel()
        length = -(-size // min(5, size))
        assert cut.first == place and cut.length == length and sum(cut.sizes) == size
        assert cut.count == len(cut.sizes) == -(-size // length) <= 5
        assert set(cut.sizes[:-1]) <= {length} and 0 < cut.sizes[-1] <= length
        place += cut.count
        assert cut.is_linear == (name in ("fc.weight", "fc.bias"))


@pytest.mark.parametrize(
    "size, sizes", [(25, (5,) * 5), (3, (1, 1, 1)), (11, (3, 3, 3, 2)), (6, (2, 2, 2)), (1, (1,))]
)
def test_runs_of_odd_sizes(size, sizes):
    model = from_module(nn.Sequential(nn.Flatten(), nn.Linear(105, 6), nn.Tanh()), 6, (3, 7, 5))
    leaf = model.leaves["1.bias"]._replace(shape=(size,))
    # as the official code
    assert cut_tensors(replace(model, leaves={"1.bias": leaf}), 5)["1.bias"].sizes == sizes


def test_every_run_is_multiplied_by_its_number_and_statistics_by_none():
    model, algorithm = small.make_model("bn_net"), PFedGate()
    found = cut_tensors(model, 5)
    M = torch.arange(1.0, 1 + sum(c.count for c in found.values()))
    ones = {n: torch.ones_like(v) for n, v in model.initial.items()}
    adapted = algorithm.gated_weights(model, ones, M)
    assert list(adapted) == list(model.initial)
    for name, value in adapted.items():
        if name in found:
            at, cut = 0, found[name]
            for i, size in enumerate(cut.sizes):
                assert (value.flatten()[at : at + size] == M[cut.first + i]).all()
                at += size
        else:
            assert (value == 1).all()


def test_the_runs_of_the_published_networks_are_counted():
    model = build("resnet8", {}, 10, (3, 32, 32), 1)
    assert sum(c.count for c in cut_tensors(model, 5).values()) == 5 * len(cut_tensors(model, 5))
    assert sum(sum(c.sizes) for c in cut_tensors(model, 5).values()) == 1_235_274


# The gate


class Reference(nn.Module):
    """The official code's gate in torch's own layers, SwitchNorm2d written out."""

    def __init__(self, channels, width, runs):
        super().__init__()
        self.weight, self.means, self.vars = (nn.Parameter(torch.ones(n)) for n in (channels, 3, 3))
        self.linear, self.norm = nn.Linear(width, runs), nn.BatchNorm1d(runs)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.zeros(channels))

    def forward(self, x):
        dims = {"instance": (2, 3), "layer": (1, 2, 3), "batch": (0, 2, 3)}
        inner = x.flatten(2)
        mean = {n: x.mean(d, keepdim=True) for n, d in dims.items()}
        var_in = inner.var(2)[:, :, None, None]  # unbiased, as the code has it
        power = var_in + mean["instance"] ** 2
        var = {
            "instance": var_in,
            "layer": power.mean(1, keepdim=True) - mean["layer"] ** 2,
            "batch": power.mean(0, keepdim=True) - mean["batch"] ** 2,
        }
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * mean["batch"].flatten())
                self.var.mul_(0.9).add_(0.1 * var["batch"].flatten())
        else:
            mean["batch"], var["batch"] = self.mean.view(1, -1, 1, 1), self.var.view(1, -1, 1, 1)

        def blend(of, by):
            return sum(w * v for w, v in zip(by.softmax(0), of.values(), strict=True))

        x = (
            (x - blend(mean, self.means))
            / (blend(var, self.vars) + 1e-5).sqrt()
            * self.weight.view(1, -1, 1, 1)
        )
        return self.norm(self.linear(x.flatten(1))).sigmoid().mean(0)


def reference(v):
    gate = Reference(3, 105, len(v.personal[".seen.M"]))
    p = v.personal
    with torch.no_grad():
        gate.weight.copy_(p[".gate.in.weight"]), gate.means.copy_(p[".gate.in.means"])
        gate.vars.copy_(p[".gate.in.vars"]), gate.linear.weight.copy_(p[".gate.weight"])
        gate.norm.weight.copy_(p[".gate.out.weight"]), gate.norm.bias.copy_(p[".gate.out.bias"])
        gate.mean.copy_(p[".seen.in.mean"]), gate.var.copy_(p[".seen.in.var"])
        (
            gate.norm.running_mean.copy_(p[".seen.out.mean"]),
            gate.norm.running_var.copy_(p[".seen.out.var"]),
        )
    return gate  # its linear.bias is not ours: it must change nothing in training


def test_the_gate_is_the_official_one_in_training_with_its_gradients_and_statistics():
    made = small.make_trainer(PFedGate())
    v, x = moving(made), 1 + 2 * numbers(6, *small.SHAPE)
    gate, ours = (
        reference(v),
        {n: w.clone().requires_grad_(n.startswith(".gate.")) for n, w in v.personal.items()},
    )
    M, expected = gate_values(ours, x, None, True), gate.train()(x)
    torch.testing.assert_close(M, expected, rtol=1e-4, atol=1e-6)
    weights = numbers(len(M), at=3)
    learnt = [n for n in ours if n.startswith(".gate.")]
    grads = dict(
        zip(
            learnt, torch.autograd.grad((weights * M).sum(), [ours[n] for n in learnt]), strict=True
        )
    )
    (weights * expected).sum().backward()
    pairs = {
        ".gate.weight": gate.linear.weight, ".gate.in.weight": gate.weight, ".gate.in.means": gate.means,
        ".gate.in.vars": gate.vars, ".gate.out.weight": gate.norm.weight, ".gate.out.bias": gate.norm.bias,
    }  # fmt: skip
    assert set(pairs) == set(learnt)
    for name, value in pairs.items():
        torch.testing.assert_close(
            grads[name], value.grad, rtol=1e-3, atol=1e-4 * value.grad.abs().max().item()
        )
    moved = {
        ".seen.in.mean": gate.mean,
        ".seen.in.var": gate.var,
        ".seen.out.var": gate.norm.running_var,
    }
    moved[".seen.out.mean"] = gate.norm.running_mean - 0.1 * gate.linear.bias
    for name, value in moved.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)
    assert gate.linear.bias.grad.abs().max() < 1e-6  # why there is none here


def test_the_gate_is_the_official_one_in_evaluation_and_leaves_no_trace():
    v, x = moving(small.make_trainer(PFedGate())), 1 + 2 * numbers(6, *small.SHAPE)
    gate = reference(v).eval()
    nn.init.zeros_(gate.linear.bias)
    before = small.clone_tree(v.personal)
    M = gate_values(v.personal, x, None, False)
    torch.testing.assert_close(M, gate(x), rtol=1e-5, atol=1e-6)
    assert small.trees_equal(v.personal, before)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("real", [1, 3, 6])
def test_padding_neither_opens_nor_moves_the_gate(training, real):
    v, x = moving(small.make_trainer(PFedGate())), numbers(6, *small.SHAPE)
    cut, padded = small.clone_tree(v.personal), small.clone_tree(v.personal)
    expected = gate_values(cut, x[:real], None, training)
    x[real:] = 1e3
    found = gate_values(padded, x, torch.arange(6) < real, training)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for name, value in cut.items():
        torch.testing.assert_close(padded[name], value, rtol=1e-5, atol=1e-5)
    if training:
        assert torch.equal(padded[".seen.out.var"], v.personal[".seen.out.var"]) == (real == 1)
        if real == 1:
            torch.testing.assert_close(found, v.personal[".gate.out.bias"].sigmoid())


@STACK_FIRST
def test_the_gate_learns_at_its_own_rate(stacked):
    train = replace(small.TRAIN, momentum=0.9, batch_size=20, epochs=2)
    moves = {}
    for gate_lr in (0.05, 0.1):
        made = small.make_trainer(
            PFedGate(gate_lr=gate_lr), "bn_net", train=replace(train, epochs=1), stacked=stacked
        )
        start = small.initial_variables(made)
        (done,) = made.train([0], start.shared, small.repeat_rows(start.personal, 1), 0)
        moves[gate_lr] = (
            {n: v - done.start.personal[n] for n, v in done.end.personal.items()},
            done.end.shared,
        )
    for name in (
        ".gate.weight",
        ".gate.in.weight",
        ".gate.in.means",
        ".gate.out.weight",
        ".gate.out.bias",
    ):
        torch.testing.assert_close(
            moves[0.1][0][name], 2 * moves[0.05][0][name], rtol=1e-3, atol=1e-6
        )
        assert moves[0.1][0][name].any()
    assert small.trees_equal(moves[0.1][1], moves[0.05][1])  # theta's first step is of its own rate


@STACK_FIRST
def test_the_gate_decays_at_the_rate_of_theta(stacked):
    ends = {}
    for weight_decay in (0.0, 0.5):
        train = replace(small.TRAIN, batch_size=20, epochs=1, weight_decay=weight_decay)
        made = small.make_trainer(PFedGate(gate_lr=0.4), "bn_net", train=train, stacked=stacked)
        v = moving(made)
        (done,) = made.train([0], v.shared, small.repeat_rows(v.personal, 1), 0)
        ends[weight_decay] = small.clone_tree(done.end.personal)
    for name in (".gate.weight", ".gate.in.means", ".gate.out.weight"):
        decay = ends[0.0][name] - ends[0.5][name]
        expected = small.TRAIN.lr * 0.5 * v.personal[name]
        torch.testing.assert_close(decay, expected, rtol=1e-3, atol=1e-6)


@STACK_FIRST
def test_theta_is_averaged_without_the_multipliers(stacked):
    federation, state = small.make_experiment(PFedGate(), "bn_net", sizes=(7, 7), stacked=stacked)
    (group,) = federation.placement.groups
    trained = federation.clients.trainer.train(group, state.shared, state.personal, 0)
    ends = [done.end for done in trained]
    mean = {n: sum(end.shared[n] for end in ends) / 2 for n in state.shared}
    gated = {
        n: sum(
            federation.algorithm.client_model(federation.clients.trainer.model, e)[n] for e in ends
        )
        for n in mean
    }
    assert (gated["fc.weight"] / 2 - mean["fc.weight"]).abs().max() > 0.01
    small.assert_near(small.run_rounds(federation, state, 1).shared, mean)


@STACK_FIRST
def test_what_the_gate_keeps_of_the_data_does_not_decay(stacked):
    kept = []
    for weight_decay in (0.0, 0.5):
        train = replace(small.TRAIN, batch_size=20, epochs=1, weight_decay=weight_decay)
        made = small.make_trainer(PFedGate(), "bn_net", train=train, stacked=stacked)
        v = moving(made)
        (done,) = made.train([0], v.shared, small.repeat_rows(v.personal, 1), 0)
        kept.append(
            {
                n: w.clone()
                for n, w in done.end.personal.items()
                if n.startswith(".seen.") and n != ".seen.M"
            }
        )
        assert not any(torch.equal(w, v.personal[n]) for n, w in kept[-1].items())
    assert small.trees_equal(*kept) and len(kept[0]) == 4


@STACK_FIRST
def test_one_client_trains_as_with_two_torch_optimizers(stacked):
    algorithm, settings = PFedGate(gate_lr=0.2), replace(small.TRAIN, epochs=2)
    federation, state = small.make_experiment(
        algorithm, "bn_net", sizes=(10,), train=settings, stacked=stacked
    )
    made = small.make_trainer(algorithm, "bn_net", train=settings, samples=small.make_feed((10,)))
    v = small.initial_variables(made)
    theta = {
        n: w.clone().requires_grad_(made.model.role(n) != "stats") for n, w in v.shared.items()
    }
    own = {n: w.clone().requires_grad_(n.startswith(".gate.")) for n, w in v.personal.items()}
    parts = [[w for w in tree.values() if w.requires_grad] for tree in (theta, own)]
    optimizers = [
        torch.optim.SGD(part, lr, momentum=0.9)
        for part, lr in zip(parts, (settings.lr, 0.2), strict=True)
    ]
    for epoch in range(2):
        for first in (0, 5):
            batch = Batch(
                *(
                    p if p is None else p[0]
                    for p in made.feed.epoch([0], 0, epoch).batch(1, first, 5)
                )
            )
            M = gate_values(own, batch.x, None, True)
            loss = F.cross_entropy(
                made.model(algorithm.gated_weights(made.model, theta, M), batch.x), batch.y
            )
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    state = small.run_rounds(federation, state, 1)
    small.assert_near(state.shared, {n: w.detach() for n, w in theta.items()})
    found = {n: w[0] for n, w in state.personal.items() if n != ".seen.M"}
    small.assert_near(found, {n: own[n].detach() for n in found})


@STACK_FIRST
@pytest.mark.parametrize("sparsity", [1.0, 0.5])
def test_a_client_predicts_with_the_multipliers_of_its_training_samples(stacked, sparsity):
    algorithm = PFedGate(sparsity=sparsity)
    federation, state = small.make_experiment(algorithm, "bn_net", stacked=stacked)
    state, metrics, clients = run_round(federation, state, evaluate=True, stop=False)
    model = federation.clients.trainer.model.eval_mode()
    for client, at in federation.placement.row_of_client.items():
        own = {n: v[at] for n, v in state.personal.items()}
        M = algorithm.multipliers(model, own, everything(federation.clients.trainer, client))
        torch.testing.assert_close(own[".seen.M"], M, rtol=1e-5, atol=1e-6)
        v = Variables(state.shared, own)
        tests = federation.clients.trainer.feed.test_batch(
            [client], 0, federation.clients.trainer.feed.test_size(client)
        )
        both = algorithm.logits(model, v, tests.x[0])
        alone = torch.cat([algorithm.logits(model, v, x[None]) for x in tests.x[0]])
        torch.testing.assert_close(alone, both, rtol=1e-4, atol=1e-5)  # no neighbour matters
    assert (
        metrics["accuracy"] == metrics["accuracy_trained"]
        and algorithm.evaluate_on == "after_training"
    )
    assert np.array_equal(clients["accuracy"], clients["accuracy_trained"])


# The knapsack


def authors_greedy(worth, sizes, capacity):
    """The official code's loop, over a stable order."""
    kept, total = [], 0
    for at in np.argsort(-np.asarray(worth), kind="stable"):
        if total + sizes[at] <= capacity:
            total += sizes[at]
            kept.append(int(at))
    return kept


@pytest.mark.parametrize("capacity", [0, 1, 7, 20, 41, 1000])
def test_the_knapsack_is_filled_greedily(capacity):
    for draw in range(5):
        worth = torch.randint(0, 11, (17,), generator=rng(1, "worth", draw)).double()
        sizes = torch.randint(1, 9, (17,), generator=rng(1, "sizes", draw))
        found = greedy_knapsack(worth, sizes, capacity)
        kept = found.nonzero().flatten().tolist()
        assert kept == sorted(authors_greedy(worth.tolist(), sizes.tolist(), capacity))
        assert sizes[found].sum() <= capacity
        assert all(sizes[found].sum() + sizes[i] > capacity for i in (~found).nonzero().flatten())


def test_a_large_run_that_does_not_fit_makes_room_for_smaller_ones_and_ties_go_by_position():
    found = greedy_knapsack(torch.tensor([9.0, 8.0, 8.0, 1.0]), torch.tensor([3, 6, 2, 1]), 6)
    assert found.tolist() == [True, False, True, True]
    assert greedy_knapsack(torch.tensor([5.0, 5.0, 5.0]), torch.tensor([2, 2, 2]), 4).tolist() == [
        True,
        True,
        False,
    ]


@NETWORKS
@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.3, 0.5, 0.9, 1.0])
def test_first_runs_stay_and_the_others_fit_into_the_budget(network, sparsity):
    model = small.make_model(network)
    found, least = cut_tensors(model, 5), min(0.2, sparsity)
    sizes = torch.tensor([size for cut in found.values() for size in cut.sizes])
    for draw in range(3):
        M = torch.rand(len(sizes), generator=rng(1, "M", draw))
        stays = select_runs(found, M.clamp(min=least), sparsity - least)
        for cut in found.values():
            assert stays[cut.first]
        for linear in (False, True):
            at = [
                c.first + i
                for c in found.values()
                if c.is_linear == linear
                for i in range(1, c.count)
            ]
            capacity = round(sizes[at].sum().item() * (sparsity - least))
            worth = np.around(10 * M.clamp(min=least)[at].double().numpy())
            expected = {at[i] for i in authors_greedy(worth, sizes[at].tolist(), capacity)}
            assert {i for i in at if stays[i]} == expected
            assert sizes[at][stays[at]].sum() <= capacity
        share = sizes[stays].sum() / sizes.sum()
        first = sum(c.sizes[0] for c in found.values()) / sizes.sum()
        assert share <= first + sparsity - least + 0.01
    if sparsity <= 0.2:
        assert stays.sum() == len(found)


@pytest.mark.parametrize("straight_through", [False, True])
def test_dropped_runs_are_zero_and_the_others_as_without_a_budget(straight_through):
    algorithm = PFedGate(sparsity=0.5, straight_through=straight_through)
    made = small.make_trainer(algorithm, "bn_net")
    v, batch = moving(made), batch_of(made)
    spread = {".gate.out.bias": 2 * numbers(len(v.personal[".seen.M"])) - 1}
    own = {
        n: w.clone().requires_grad_(n.startswith(".gate."))
        for n, w in (v.personal | spread).items()
    }
    sparse = algorithm.multipliers(made.model, own, batch)
    whole = PFedGate().multipliers(made.model, own, batch)
    stays = select_runs(cut_tensors(made.model, 5), whole.detach().clamp(min=0.2), 0.3)
    # first runs stay whatever their M
    assert 0 < stays.sum() < len(stays) and (whole[stays] < 0.2).any()
    assert torch.equal(sparse, whole * stays)
    (grad,) = torch.autograd.grad(sparse.sum(), own[".gate.out.bias"])
    (plain,) = torch.autograd.grad(whole.sum(), own[".gate.out.bias"])
    passes = 1 + whole * (whole > 0.2) if straight_through else torch.ones_like(whole)
    torch.testing.assert_close(grad, (plain * passes * stays).detach(), rtol=1e-5, atol=1e-7)


def test_a_sparse_client_multiplies_a_third_to_a_half_of_its_weights_by_zero():
    federation, state = small.make_experiment(PFedGate(sparsity=0.5), "bn_net")
    state = small.run_rounds(federation, state, 2)
    model = federation.clients.trainer.model
    for at in range(5):
        own = {n: v[at] for n, v in state.personal.items()}
        adapted = federation.algorithm.client_model(model, Variables(state.shared, own))
        used = {n: w for n, w in adapted.items() if model.role(n) in ("body", "head")}
        share = sum((w != 0).sum().item() for w in used.values()) / numel(used)
        assert 0.3 < share < 0.55


# What travels, what is refused


@pytest.mark.parametrize("sparsity", [1.0, 0.3])
def test_the_gate_does_not_travel(sparsity):
    federation, state = small.make_experiment(PFedGate(sparsity=sparsity), "bn_net")
    initial = federation.clients.trainer.model.initial
    assert (
        set(federation.aggregator.terms.flat.shapes) == set(initial) == set(state.shared)
        and federation.aggregator.mixing is None
    )
    assert all(n.startswith((".gate.", ".seen.")) for n in state.personal)
    runs = len(state.personal[".seen.M"][0])
    assert numel({n: v[0] for n, v in state.personal.items()}) == runs * 105 + 5 * runs + 3 * 3 + 6
    _, metrics, _ = run_round(federation, state, evaluate=False, stop=False)
    assert metrics["bytes_up"] == metrics["bytes_down"] == 5 * 4 * numel(initial)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PFedGate(sparsity=0), "sparsity = 0: must be a number above 0 and at most 1"),
        (lambda: PFedGate(sparsity=1.1), "sparsity = 1.1: must be a number"),
        (lambda: PFedGate(gate_lr=0), "gate_lr = 0: must be a number above 0"),
        (lambda: PFedGate(blocks=0), "blocks = 0: must be an integer of at least 1"),
    ],
)
def test_fields_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_gate_needs_images():
    model = from_module(nn.Linear(7, 6), 6, (7,))
    with pytest.raises(ValueError, match=r"needs images, not inputs of shape \[7\]"):
        PFedGate().check(model, LocalTraining())
