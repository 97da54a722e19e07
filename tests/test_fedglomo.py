"""FedGLOMO: what it is in degenerate cases, and its recursions against plain loops."""

from dataclasses import replace

import pytest
import small
import torch
from aggregates import aggregate_of, svd
from tiers import thorough_param

from fedlora_mpi.algorithm import Batch, LocalTraining, Variables
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.fedglomo import FedGLOMO
from fedlora_mpi.core.names import is_method_leaf
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.tree import numel, select_prefix, split

PREVIOUS = ".previous."
PLAIN = replace(small.TRAIN, momentum=0.0, weight_decay=0.01)
FULL_BATCH = LocalTraining(epochs=4, batch_size=20, lr=0.05, momentum=0.0, weight_decay=0.01)
NETWORKS = pytest.mark.parametrize(
    "network", [thorough_param("bn_net"), thorough_param("cnn"), "noisy_net"]
)
DEEP = pytest.mark.parametrize("network", [thorough_param("bn_net"), "cnn"])
FEW = (7, 5, 2)  # clients of fewer samples, for the tests that train both trajectories
STACKED = pytest.mark.parametrize("stacked", [True, thorough_param(False)], ids=["stack", "loop"])


def own(shared):
    """The leaves of the network."""
    return {n: v for n, v in shared.items() if not is_method_leaf(n)}


def gap(a, b):
    return max(float((a[n] - b[n]).abs().max()) for n in a)


@STACKED
@NETWORKS
def test_without_any_momentum_it_is_fedavg_to_the_bit(network, stacked):
    how = {"network": network, "stacked": stacked, "train": PLAIN, "participation": 0.6}
    for weights in ("uniform", "samples"):
        ours = small.final_state(FedGLOMO(beta=1.0, a=0.0, weights=weights), **how)
        fedavg = small.final_state(FedAvg(weights=weights), **how)
        assert small.trees_equal(own(ours.shared), fedavg.shared)


@STACKED
@NETWORKS
@pytest.mark.parametrize("a", [0.0, 0.8])
def test_both_starts_are_equal_in_the_first_round_and_so_are_both_ends(network, stacked, a):
    algorithm = FedGLOMO(a=a)
    made = small.make_trainer(algorithm, network, PLAIN, stacked)
    shared = small.initial_variables(made).shared
    for result in made.train([0, 1, 2], shared, {}, 0):
        upload = algorithm.upload(result.start, result.end, 0).mean
        differences = select_prefix(upload, PREVIOUS)
        assert differences and not any(v.any() for v in differences.values())
        assert gap(own(shared), own(upload)) > 1e-3


@STACKED
@DEEP
@pytest.mark.parametrize("beta", [0.3, thorough_param(0.9)])
@pytest.mark.parametrize("a", [0.0, 0.8])
def test_with_deterministic_gradients_beta_does_not_matter(stacked, network, beta, a):
    """The run from w_{k-1} repeats that of the last round, so u_k is the mean D_i."""
    how = {"network": network, "stacked": stacked, "train": FULL_BATCH, "sizes": FEW, "rounds": 3}
    ours, plain = (small.final_state(FedGLOMO(beta=b, a=a), **how) for b in (beta, 1.0))
    small.assert_near(own(ours.shared), own(plain.shared), rtol=2e-5)
    small.assert_near(ours.server, plain.server, rtol=1e-3)
    assert all(v.any() for v in ours.server.values())


@STACKED
@DEEP
def test_batches_that_are_no_whole_epoch_make_beta_matter(stacked, network):
    how = {"network": network, "stacked": stacked, "train": PLAIN, "sizes": FEW}
    ends = [small.final_state(FedGLOMO(beta=beta), **how).shared for beta in (0.3, 1.0)]
    assert gap(*map(own, ends)) > 1e-3


@STACKED
@DEEP
def test_local_momentum_of_full_gradients_is_plain_sgd(stacked, network):
    how = {"network": network, "stacked": stacked, "train": FULL_BATCH, "sizes": FEW}
    recursive, plain = (small.final_state(FedGLOMO(a=a), **how).shared for a in (1.0, 0.0))
    small.assert_near(own(recursive), own(plain), rtol=2e-5)


def test_the_gradients_of_both_points_have_the_same_noise():
    """At w' = w, where v' is zero, v = g(w; B) - g(w'; B) with a = 1."""
    algorithm = FedGLOMO(a=1.0)
    made = small.make_trainer(algorithm, "noisy_net")
    model, received = made.model, algorithm.receive(small.initial_variables(made).shared)
    batch = Batch(
        torch.randn(4, *small.SHAPE, generator=rng(1, "images")),
        torch.arange(4),
        None,
        torch.tensor(7),
        torch.ones(6),
    )
    for begun in (0.0, 1.0):
        shared = {n: torch.tensor(begun) if ".begun." in n else v for n, v in received.items()}
        shared = {n: v.clone().requires_grad_() for n, v in shared.items()}
        for step in algorithm.local(model, small.TRAIN, 0)[0].steps:
            with model.training_context(batch):
                value = step.loss(Variables(shared, {}), Variables(shared, {}), batch)
            leaves = [v for n, v in shared.items() if step.trains(n) and "bias" in n]
            grads = torch.autograd.grad(value, leaves)
            assert any(g.any() for g in grads) == (begun == 0)


def plain_recursion(model, w, batches, a, train):
    """w after the steps of the recursion, by a plain loop."""

    def gradient(w, x, y):
        leaves = {n: v.clone().requires_grad_() for n, v in w.items()}
        loss = torch.nn.functional.cross_entropy(model(leaves, x), y)
        decay = sum((v**2).sum() for v in leaves.values()) * train.weight_decay / 2
        grads = torch.autograd.grad(loss + decay, list(leaves.values()))
        return dict(zip(leaves, grads, strict=True))

    last = v = None
    for x, y in batches:
        g = gradient(w, x, y)
        if last is not None:
            g_last = gradient(last, x, y)
            g = {n: g[n] + a * (v[n] - g_last[n]) for n in g}
        last, v = w, g
        w = {n: w[n] - train.lr * v[n] for n in w}
    return w


@STACKED
@pytest.mark.parametrize("a", [0.0, 0.8])
def test_both_trajectories_follow_the_recursion_on_the_same_batches(stacked, a):
    train = replace(PLAIN, weight_decay=0.1)
    made = small.make_trainer(FedGLOMO(a=a), "cnn", train, stacked, fine=True)
    shared = {n: v.double() for n, v in small.initial_variables(made).shared.items()}
    for n in select_prefix(shared, PREVIOUS):
        noise = torch.randn(shared[n].shape, generator=rng(1, "previous", n), dtype=torch.float64)
        shared[PREVIOUS + n] = shared[n] + 0.1 * noise
    (result,) = made.train([0], shared, {}, 3)
    batches = []
    for epoch in range(train.epochs):
        x, y = made.feed.epoch([0], 3, epoch).batch(1, 0, small.SIZES[0])[:2]
        parts = zip(x[0].split(train.batch_size), y[0].split(train.batch_size), strict=True)
        batches += [(x.double(), y) for x, y in parts]
    for start, end in (
        (own(shared), own(result.end.shared)),
        (select_prefix(shared, PREVIOUS), select_prefix(result.end.shared, PREVIOUS)),
    ):
        small.assert_near(end, plain_recursion(made.model, start, batches, a, train), rtol=1e-9)


# The server.


def served(beta, round_, difference):
    """(u_k, w_k - w_{k+1}, mean D_i, u_{k-1}) of one leaf."""
    numbers = torch.randn(4, 3, 5, generator=rng(1, "served"))
    w, previous, mean, u = numbers
    update = FedGLOMO(beta=beta).server_update(
        {".u.w": u},
        {"w": w, ".previous.w": previous},
        aggregate_of({"w": mean, ".previous.w": difference}, round_=round_),
        svd,
    )
    assert torch.equal(update.shared[".previous.w"], w)
    return update.server[".u.w"], w - update.shared["w"], w - mean, u


def near(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_server_steps_along_the_recursion():
    difference = torch.randn(3, 5, generator=rng(1, "difference"))
    u, step, D, u_last = served(0.3, 2, difference)
    near(u, 0.3 * D + 0.7 * u_last + 0.7 * difference)
    near(step, u)


def test_equal_starts_leave_plain_momentum():
    u, _, D, u_last = served(0.3, 2, torch.zeros(3, 5))
    near(u, 0.3 * D + 0.7 * u_last)


@pytest.mark.parametrize("beta, round_", [(0.3, 0), (1.0, 2)])
def test_the_first_round_and_beta_one_step_to_the_mean(beta, round_):
    u, step, D, _ = served(beta, round_, torch.ones(3, 5))
    near(u, D)
    near(step, D)


@pytest.mark.parametrize("a", [0.0, 0.8])
def test_messages_have_all_leaves_and_all_parameters_once_more(a):
    algorithm = FedGLOMO(a=a)
    federation, state = small.make_experiment(algorithm, "bn_net", train=PLAIN)
    model = federation.clients.trainer.model
    size = numel(model.initial) + numel(split(model.initial, lambda n: model.role(n) != "stats")[0])
    transport = algorithm.transport(0, 1)
    assert federation.aggregator.terms.flat.size == numel(state.shared) == size
    assert transport.download_numel(state.server, state.shared, 0) == size
    received = transport.download(state.shared)
    assert (numel(received) == size) == (a == 0)
    assert not state.personal


def test_fedglomo_refuses_momentum():
    FedGLOMO().check(small.make_model(), LocalTraining(momentum=0.0))
    with pytest.raises(ValueError, match="name = fedglomo: needs train.momentum = 0, not 0.9"):
        FedGLOMO().check(small.make_model(), LocalTraining())
