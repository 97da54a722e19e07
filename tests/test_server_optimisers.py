"""FedAvgM, FedAdagrad, FedAdam and FedYogi against FedAvg, torch.optim, and their equations."""

import math
from dataclasses import replace

import h5py
import numpy as np
import pytest
import small
import torch
from aggregates import aggregate_of, svd
from tiers import STACK_FIRST, thorough_param

from fedlora_mpi import open_run
from fedlora_mpi.algorithm import Algorithm
from fedlora_mpi.algorithms.fedadagrad import FedAdagrad
from fedlora_mpi.algorithms.fedadam import FedAdam
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.fedavgm import FedAvgM
from fedlora_mpi.algorithms.fedyogi import FedYogi
from fedlora_mpi.cli import main
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.tree import numel
from fedlora_mpi.federation.round import run_round

NETWORKS = pytest.mark.parametrize("network", [thorough_param("cnn"), "bn_net"])
NAME = {"ids": lambda a: type(a).__name__ if isinstance(a, Algorithm) else None}
ALL = pytest.mark.parametrize("algorithm", [FedAvgM(), FedAdagrad(), FedAdam(), FedYogi()], **NAME)
BETA2 = 0.99


def numbers(*shape, at=0):
    return torch.randn(*shape, generator=rng(1, "test", *shape, at))


def served(algorithm, deltas, start):
    """x after each round in which the mean is x + delta; the server's own at the end."""
    model = small.make_model()
    shared = {n: torch.full_like(v, start) for n, v in model.initial.items()}
    server, path = algorithm.server(model, shared), []
    for delta in deltas:
        mean = {n: v + delta for n, v in shared.items()}
        update = algorithm.server_update(server, shared, aggregate_of(mean), svd)
        server, shared = update.server, update.shared
        path.append({n: v.unique().item() for n, v in shared.items()})
    assert all(len(set(values.values())) == 1 for values in path)  # every leaf alike
    return [next(iter(values.values())) for values in path], server


# Degenerate cases


@STACK_FIRST
@NETWORKS
@pytest.mark.parametrize("participation", [thorough_param(1.0), 0.6])
@pytest.mark.parametrize("weights", ["samples", thorough_param("uniform")])
def test_a_whole_step_without_momentum_is_fedavg(network, stacked, participation, weights):
    how = {"network": network, "stacked": stacked, "participation": participation}
    federation, state = small.make_experiment(FedAvgM(eta=1.0, beta=0.0, weights=weights), **how)
    plain_federation, plain = small.make_experiment(FedAvg(weights=weights), **how)
    for _ in range(3):
        state, plain = (
            small.run_rounds(federation, state, 1),
            small.run_rounds(plain_federation, plain, 1),
        )
        assert small.trees_equal(state.shared, plain.shared)


TAU = 1e4  # so large that no change moves v off tau^2


@NETWORKS
@pytest.mark.parametrize(
    "algorithm, rounds",
    [
        (FedAdagrad(eta=2 * TAU, tau=TAU), 3),
        (FedYogi(eta=2 * TAU, tau=TAU, beta1=0.0), 3),
        (FedAdam(eta=TAU * (1 + math.sqrt(BETA2)), tau=TAU, beta1=0.0, beta2=BETA2), 1),  # v decays
    ],
    **NAME,
)
def test_without_adaptation_or_momentum_is_fedavg(network, algorithm, rounds):
    federation, state = small.make_experiment(algorithm, network)
    state, plain = (
        small.run_rounds(federation, state, rounds),
        small.final_state(FedAvg(), network, rounds),
    )
    small.assert_near(state.shared, plain.shared, rtol=1e-6)


@NETWORKS
@ALL
def test_the_first_round_differs_from_fedavg_in_all_but_the_statistics(network, algorithm):
    algorithm = replace(algorithm, eta=0.5) if isinstance(algorithm, FedAvgM) else algorithm
    federation, state = small.make_experiment(algorithm, network)
    state, plain = small.run_rounds(federation, state, 1), small.final_state(FedAvg(), network, 1)
    role = federation.clients.trainer.model.role
    same = {n: torch.equal(v, plain.shared[n]) for n, v in state.shared.items()}
    assert same == {n: role(n) == "stats" for n in same}
    assert sum(same.values()) == (0 if network == "cnn" else 12)


@ALL
def test_a_mean_that_stays_moves_nothing(algorithm):
    path, server = served(algorithm, [0.0, 0.0], 0.25)
    assert path == [0.25, 0.25]
    assert not any(v.any() for n, v in server.items() if n.startswith("m."))


# The equations


def optimised(optimizer, deltas, start):
    """The path of one number under a torch optimizer whose gradient is -delta."""
    x = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer, path = optimizer([x]), []
    for delta in deltas:
        x.grad = torch.tensor(-delta, dtype=torch.float64)
        optimizer.step()
        path.append(x.item())
    return path


DELTAS = [0.5, -0.25, 0.125, 0.0, 2.0]  # exact in float32, so that the mean is exactly x + delta


@pytest.mark.parametrize("eta, beta", [(1.0, 0.9), (0.25, 0.5)])
def test_fedavgm_is_torch_sgd_with_momentum(eta, beta):
    path, _ = served(FedAvgM(eta=eta, beta=beta), DELTAS, 0.0)

    def sgd(leaves):
        return torch.optim.SGD(leaves, lr=eta, momentum=beta)

    assert path == pytest.approx(optimised(sgd, DELTAS, 0.0), rel=1e-5)


def test_fedadagrad_is_torch_adagrad():
    path, _ = served(FedAdagrad(eta=0.1, tau=0.05), DELTAS, 0.0)

    def adagrad(leaves):
        return torch.optim.Adagrad(leaves, lr=0.1, eps=0.05, initial_accumulator_value=0.05**2)

    assert path == pytest.approx(optimised(adagrad, DELTAS, 0.0), rel=1e-5)


def adam(v, square):
    return 0.75 * v + 0.25 * square


def yogi(v, square):
    return v - 0.25 * square * math.copysign(1, v - square)


@pytest.mark.parametrize(
    "algorithm, second",
    [(FedAdam(0.1, 0.5, 0.25, beta2=0.75), adam), (FedYogi(0.1, 0.5, 0.25, beta2=0.75), yogi)],
    **NAME,
)
def test_fedadam_and_fedyogi_are_their_equations(algorithm, second):
    x, m, v, expected, above = 0.0, 0.0, 0.25**2, [], set()
    for delta in DELTAS:
        m = 0.5 * m + 0.5 * delta
        above.add(v > delta**2)
        v = second(v, delta**2)
        x += 0.1 * m / (math.sqrt(v) + 0.25)
        expected.append(x)
    path, server = served(algorithm, DELTAS, 0.0)
    assert path == pytest.approx(expected, rel=1e-5) and above == {False, True}
    for name, value in server.items():
        assert value.unique().item() == pytest.approx(m if name.startswith("m.") else v, rel=1e-5)


def test_adagrad_never_forgets_adam_does_and_yogi_slowly():
    last = {}
    for algorithm in (FedAdagrad(), FedAdam(), FedYogi()):
        _, server = served(algorithm, [1.0] + [0.0] * 100, 0.0)
        last[type(algorithm)] = (
            next(v for n, v in server.items() if n.startswith("v.")).unique().item()
        )
    tau = 1e-3
    assert last[FedAdagrad] == pytest.approx(tau**2 + 1)
    assert last[FedAdam] == pytest.approx((0.99 * tau**2 + 0.01) * 0.99**100, rel=1e-4)
    # nothing is subtracted without a change
    assert last[FedYogi] == pytest.approx(tau**2 + 0.01, rel=1e-4)


# What the server keeps, what travels


@NETWORKS
@pytest.mark.parametrize(
    "algorithm, begin",
    [
        (FedAvgM(), {"v": 0.0}),
        (FedAdagrad(), {"m": 0.0, "v": 1e-6}),
        (FedYogi(tau=0.5), {"m": 0.0, "v": 0.25}),
    ],
    **NAME,
)
def test_moments_are_of_the_trained_leaves_alone(network, algorithm, begin):
    model = small.make_model(network)
    server = algorithm.server(model, model.initial)
    trained = [n for n, leaf in model.leaves.items() if leaf.role != "stats"]
    assert list(server) == [f"{moment}.{leaf}" for moment in begin for leaf in trained]
    for name, value in server.items():
        moment, _, leaf = name.partition(".")
        assert torch.equal(value, torch.full(model.leaves[leaf].shape, begin[moment]))


@ALL
def test_a_step_writes_to_nothing_that_it_is_given(algorithm):
    model = small.make_model("bn_net")
    server = algorithm.server(model, model.initial)
    mean = {n: v + 0.1 * numbers(*v.shape) for n, v in model.initial.items()}
    given = [server, model.initial, mean]
    before = [small.clone_tree(tree) for tree in given]
    update = algorithm.server_update(server, model.initial, aggregate_of(mean), svd)
    after, shared = update.server, update.shared
    assert all(small.trees_equal(a, b) for a, b in zip(given, before, strict=True))
    assert list(after) == list(server) and list(shared) == list(model.initial)
    assert all(v.dtype == torch.float32 for v in (*after.values(), *shared.values()))
    assert not any(torch.equal(after[n], v) for n, v in server.items())


@ALL
def test_only_the_model_travels(algorithm):
    federation, state = small.make_experiment(algorithm, "bn_net", participation=0.6)
    assert (
        list(federation.aggregator.terms.flat.shapes)
        == list(federation.clients.trainer.model.leaves)
        == list(state.shared)
    )
    assert state.personal == {} and state.server
    _, row, _ = run_round(federation, state, evaluate=False, stop=False)
    assert (
        row["bytes_up"]
        == row["bytes_down"]
        == 3 * 4 * numel(federation.clients.trainer.model.initial)
    )


@pytest.mark.parametrize("network", ["cnn", thorough_param("bn_net")])
@ALL
def test_loop_and_stack_agree(algorithm, network):
    states = []
    for stacked in (False, True):
        federation, state = small.make_experiment(algorithm, network, stacked=stacked)
        states.append(small.run_rounds(federation, state, 2))
    loop, stack = states
    small.assert_near(stack.shared, loop.shared)


@pytest.mark.parametrize("kind", ["fedavgm", "fedyogi"])
def test_a_resumed_run_goes_on_with_the_moments(kind, tmp_path):
    (tmp_path / "tiny.yaml").write_text(
        "data:\n  dataset: synthetic\n  synthetic: "
        "{classes: 3, train: 60, test: 30, channels: 2}\n  partition: "
        "{kind: dirichlet_client, alpha: 1.0, clients: 3, train: 10, test: 5}\nmodel: "
        "{name: cnn, width: 3, hidden: 5}\ntrain: {epochs: 1, batch_size: 5}\nevaluate: "
        "{every: 4}\n"
    )

    def run(name, rounds):
        args = [f"algorithm={kind}", f"rounds={rounds}", f"output={tmp_path / name}"]
        assert main(["run", str(tmp_path / "tiny.yaml"), *args]) == 0

    run("whole", 4)
    run("halves", 2)
    assert main(["resume", str(tmp_path / "halves"), "rounds=4"]) == 0
    whole, halves = (open_run(tmp_path / name).shared for name in ("whole", "halves"))
    assert list(whole) and all(np.array_equal(halves[n], v) for n, v in whole.items())
    moments = []
    for name in ("whole", "halves"):
        newest = max(
            (tmp_path / name).rglob("server.h5"), key=lambda path: h5py.File(path).attrs["round"]
        )
        with h5py.File(newest) as file:
            moments.append({n: v[()] for n, v in file["server"].items()})
    assert len(moments[0]) and all(
        np.array_equal(moments[1][n], v) and v.any() for n, v in moments[0].items()
    )


@pytest.mark.parametrize(
    "kind, fields",
    [
        (FedAvgM, {"eta": 0.0}),
        (FedAvgM, {"beta": 1.0}),
        (FedAvgM, {"beta": -0.1}),
        (FedAdagrad, {"eta": -1.0}),
        (FedAdagrad, {"tau": 0.0}),
        (FedAdam, {"beta1": 1.0}),
        (FedAdam, {"beta2": 1.0}),
        (FedYogi, {"beta2": -0.1}),
        (FedYogi, {"tau": math.nan}),
    ],
)
def test_impossible_fields_are_refused(kind, fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=f"{name} = {value}: must be a number"):
        kind(**fields)
