"""Clients that exchange over a graph without a server: mixing matrices, D-PSGD, methods whose mean
becomes an exchange with neighbours, and what the log, `plan` and `report` say of it.
"""

import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import read_groups, table_rows
from runs import (
    NORM,
    TINY,
    assert_near,
    assert_same_run,
    build_tiny,
    create_run,
    run_on_ranks,
    run_rounds,
    snapshots_equal,
    tiny_config,
    trees_equal,
)
from tiers import thorough_param

from fedlora_mpi import open_run
from fedlora_mpi.aggregation.client_mix import PackedMix
from fedlora_mpi.aggregation.neighbour_mix import NeighbourMixing
from fedlora_mpi.aggregation.topology import (
    Complete,
    File,
    MixingMatrix,
    Random,
    Ring,
    Torus,
    metropolis_weights,
    mixing_matrix,
)
from fedlora_mpi.algorithm import Algorithm, Mix
from fedlora_mpi.algorithms.depositum_like import DepositumLike
from fedlora_mpi.analysis.page import topology
from fedlora_mpi.analysis.page.crowd import assign_looks
from fedlora_mpi.analysis.page.style import plot_style
from fedlora_mpi.cli import main
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.experiment import parts
from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.experiment.loop import _continue_run, config_to_resume
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.mpi.ending import Refusal
from fedlora_mpi.store.reader import RunFiles
from fedlora_mpi.sweeps.metric import _log_columns, metric_direction

DPSGD = "algorithm=dpsgd"
RING, COMPLETE, ALL = "topology=ring", "topology=complete", "participation=1.0"
ON_RING = DPSGD, RING, "evaluate.every=3"


# Mixing matrices


@pytest.mark.parametrize(
    "graph, clients",
    [
        (Ring(), 2),
        (Ring(), 3),
        (Ring(), 7),
        (Torus(), 4),
        (Torus(), 12),
        (Complete(), 5),
        (Random(0.5), 9),
    ],
)
def test_a_mixing_matrix_is_symmetric_and_doubly_stochastic_and_reaches_the_mean(graph, clients):
    W = mixing_matrix(graph, clients).weights
    assert W.shape == (clients, clients) and (W >= 0).all() and np.array_equal(W, W.T)
    np.testing.assert_allclose(W.sum(0), 1, atol=1e-15)
    np.testing.assert_allclose(np.linalg.matrix_power(W, 2000), 1 / clients, atol=1e-9)


def test_the_spectral_gaps_of_a_ring_and_of_a_torus_are_those_of_their_closed_forms():
    for n in (3, 4, 5, 8, 30):
        gap = 1 - (1 + 2 * np.cos(2 * np.pi / n)) / 3
        assert mixing_matrix(Ring(), n).spectral_gap == pytest.approx(gap, abs=1e-12)
    gap = 1 - (1 + 2 * np.cos(2 * np.pi / 5) + 2) / 5  # of a torus of 4 x 5: the longer side
    assert mixing_matrix(Torus(), 20).spectral_gap == pytest.approx(gap, abs=1e-12)
    assert mixing_matrix(Complete(), 6).spectral_gap == pytest.approx(1, abs=1e-12)
    negative = MixingMatrix(np.array([[0.1, 0.9], [0.9, 0.1]]))  # eigenvalues 1 and -0.8
    assert negative.spectral_gap == pytest.approx(0.2, abs=1e-12)


def test_metropolis_weights_go_by_the_larger_degree():
    star = np.array([[0, 1], [0, 2], [0, 3], [1, 0]])  # an edge may be there twice
    W = metropolis_weights(star, 4)
    assert W[0].tolist() == [0.25] * 4 and W[1].tolist() == [0.25, 0.75, 0, 0]


def test_neighbours_are_those_of_the_graph():
    assert mixing_matrix(Ring(), 5).neighbours[0] == {1, 4}
    torus = mixing_matrix(Torus(), 12).neighbours  # three rows of four
    assert torus[0] == {1, 3, 4, 8} and all(len(others) == 4 for others in torus)
    drawn = [mixing_matrix(Random(0.5, seed), 9).neighbours for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sum(map(len, mixing_matrix(Random(1.0), 9).neighbours)) == 9 * 8


@pytest.mark.parametrize("members", [{0, 1, 2, 3, 4}, {0, 2, 3}, {1}, {0, 2}])
def test_the_weights_of_a_cohort_are_doubly_stochastic_and_absent_weights_stay_at_home(members):
    matrix = mixing_matrix(Ring(), 5)
    rows = {client: matrix.row(client, members) for client in members}
    for client, row in rows.items():
        assert [*row] == sorted(row) and row.keys() <= members
        assert sum(row.values()) == pytest.approx(1)
        assert row[client] == pytest.approx(1 - (len(row) - 1) / 3)
        assert all(rows[other][client] == weight for other, weight in row.items())


@pytest.mark.parametrize(
    "graph, clients, message",
    [
        (Torus(), 7, "name = torus: 7 clients form no grid"),
        (Ring(), 1, "name = ring: needs at least 2 clients"),
        (Random(0.01), 9, "probability = 0.01: the graph of the 9 clients is not connected"),
    ],
)
def test_a_topology_that_does_not_fit_is_refused(graph, clients, message):
    with pytest.raises(ValueError, match=message):
        mixing_matrix(graph, clients)


# Files


SWAP = "0 1 0\n1 0 0\n0 0 1\n"


def write(folder: Path, text: str) -> File:
    (folder / "graph.txt").write_text(text, encoding="utf-8")
    return File(str(folder / "graph.txt"))


def test_a_file_has_edges_or_the_matrix_itself(tmp_path):
    edges = write(tmp_path, "# a path\n0 1\n1,2\n")
    W = mixing_matrix(edges, 3).weights
    np.testing.assert_allclose(W, [[2 / 3, 1 / 3, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1 / 3, 2 / 3]])
    given = mixing_matrix(write(tmp_path, "0.5 0.3 0.2\n.3 .4 .3\n.2 .3 .5000001\n"), 3).weights
    assert given[0, 1] == 0.3 and given.sum(1).tolist() == pytest.approx([1] * 3, abs=1e-15)
    assert mixing_matrix(write(tmp_path, ".6 .4\n.4 .6\n"), 2).weights[0, 0] == pytest.approx(0.6)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must have equally many numbers on every line"),
        ("0 1\n1\n", "must have equally many numbers on every line"),
        ("a b\n", "must have equally many numbers on every line"),
        ("0 nan\n", "must have equally many numbers on every line"),
        ("0 1 2\n", "has 1 lines of 3 numbers; it must have two clients a line, or 3 lines of 3"),
        ("0 3\n", "an edge must be two of the clients 0 to 2"),
        ("0 0.5\n", "an edge must be two of the clients 0 to 2"),
        ("0 1\n2 2\n", "client 2 is its own neighbour"),
        ("0 1\n", "the graph of the 3 clients is not connected"),
        (".5 .5 0\n.4 .6 0\n0 0 1\n", "is not symmetric: line 1 gives client 1 the weight 0.5, "),
        (".5 .4 0\n.4 .6 0\n0 0 1\n", "is not doubly stochastic: the weights of line 1 sum to 0.9"),
        ("1.5 -.5 0\n-.5 1.5 0\n0 0 1\n", "line 1 has a negative weight"),
        (SWAP, "the graph of the 3 clients is not connected"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError) as error:
        mixing_matrix(write(tmp_path, text), 3)
    assert f"path = {tmp_path / 'graph.txt'}: {message}" in str(error.value)


def test_clients_that_only_swap_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the spectral gap 0"):
        mixing_matrix(write(tmp_path, "0 1\n1 0\n"), 2)


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "topology=rnig",
            "command line: topology = rnig: must be ring, torus, complete, random or",
        ),
        ("topology={name: ring, seed: 2}", "topology.seed = 2: ring has no such field"),
        ("topology={name: random}", "topology.probability: must be given"),
        ("topology={name: random, probability: 0}", "topology.probability = 0.0: must be a number"),
        (
            "topology={name: file, path: nowhere}",
            "topology.path = nowhere: cannot be read: No such",
        ),
        ("topology=torus", "topology.name = torus: 7 clients form no grid"),
        ("topology=null", "algorithm.name = dpsgd: clients mix with their neighbours; say who"),
    ],
)
def test_a_mistake_in_the_block_is_one_line(call, override, message):
    code, _, err = call("run", TINY, DPSGD, override, "output=run")
    lines = err.splitlines()
    assert code == 2 and len(lines) == 1 and message in lines[0]
    assert not Path("run").exists()


def test_clients_without_samples_may_not_cut_the_graph(call):
    # of four tasks, one class each: some clients have no sample of the first
    tasks = "data.tasks={classes: 1, rounds: 2}"
    code, _, err = call("run", TINY, DPSGD, RING, tasks, "data.partition.alpha=0.1", "output=run")
    assert code == 2 and "never takes part, without training samples" in err


# What is exchanged


@dataclass(frozen=True)
class Rows:
    """Rows of five numbers for each client."""

    clients: int

    @property
    def u(self) -> torch.Tensor:
        return torch.randn(self.clients, 5, generator=rng(1, "rows", self.clients))

    def mixed(self, matrix, members, ranks, rank_of):
        """{client: its mix} over ranks, and how many rows each rank received."""
        offer = Mix({"u": torch.zeros(5)}, over_topology=True)
        how = NeighbourMixing.of(offer, matrix, rank_of, range(ranks))
        received = []

        def work(comm):
            exchange = comm.exchange

            def counted(send, counts, arriving):
                received.append(sum(arriving) // 5)
                return exchange(send, counts, arriving)

            comm.exchange = counted
            offers = {
                c: PackedMix(self.u[c], self.u[c], torch.zeros(0))
                for c in members
                if rank_of[c] == comm.rank
            }
            return how.mix(comm, None, offers, members, 0)

        parts = run_on_ranks(ranks, work)
        assert sum(received) * 4 * 5 == how.bytes_mpi(members, ranks)
        return {c: tree["u"] for part in parts for c, tree in part.items()}, received


@pytest.mark.parametrize("graph", [Ring(), Complete(), Random(0.5)])
@pytest.mark.parametrize("members", [frozenset(range(7)), frozenset({0, 1, 3, 6})])
def test_a_mix_is_the_product_of_W_and_the_rows_to_the_bit_on_any_ranks(graph, members):
    rows, matrix = Rows(7), mixing_matrix(graph, 7)
    alone, _ = rows.mixed(matrix, members, 1, [0] * 7)
    for client, mixed in alone.items():
        row = matrix.row(client, members)
        expected = sum(weight * rows.u[sender].double() for sender, weight in row.items())
        torch.testing.assert_close(mixed, expected.float(), rtol=1e-6, atol=1e-7)
    for ranks, rank_of in ((2, [0, 1] * 4), (3, [2, 1, 1, 0, 2, 0, 1]), (4, [3] * 7)):
        found, _ = rows.mixed(matrix, members, ranks, rank_of)
        assert trees_equal(found, alone)


def test_a_rank_receives_each_row_that_it_needs_once():
    rows, matrix = Rows(6), mixing_matrix(Ring(), 6)
    _, received = rows.mixed(matrix, frozenset(range(6)), 2, [0, 0, 0, 1, 1, 1])
    assert received == [2, 2]
    _, received = rows.mixed(mixing_matrix(Complete(), 6), frozenset(range(6)), 2, [0] * 5 + [1])
    assert sorted(received) == [1, 5]


def test_no_gram_matrix_is_computed_or_sent(monkeypatch):
    def refuse(*_):
        raise AssertionError("D-PSGD has constant weights")

    monkeypatch.setattr(Algorithm, "mix", refuse)
    moments = run_rounds.__wrapped__(DPSGD, RING, ALL, "rounds=1", ranks=3)[0]
    # of the seven clients' rows each worker needs those of two neighbours on the other, or more
    federation = build_tiny(DPSGD, RING).federation
    row_bytes = federation.aggregator.mixing.row_layout.nbytes
    figures = 3 * 16 * 6  # the sum's two limbs of each figure, of every rank
    rows = (moments[1].row["bytes_mpi"] - figures) / row_bytes
    assert rows == int(rows) and 4 <= rows <= 7


# Whole runs


@pytest.mark.parametrize(
    "settings",
    [
        (DPSGD, RING),
        thorough_param(
            ("algorithm=fedlora", "topology={name: random, probability: 0.5}"), id="fedlora"
        ),
        thorough_param((DPSGD, COMPLETE), id="complete"),
        thorough_param(("algorithm=fedper", RING, NORM), id="fedper"),
    ],
    ids=" ".join,
)
def test_the_number_of_ranks_moves_no_bit(settings):
    alone = run_rounds(*settings, "rounds=2")[0]
    for ranks in (2, 3, 4):  # the server of these hosts nobody
        for moments in run_rounds(*settings, "rounds=2", ranks=ranks):
            assert all(snapshots_equal(a, b) for a, b in zip(alone, moments, strict=True))


@pytest.mark.parametrize("model", [thorough_param("model.width=4"), NORM])
def test_dpsgd_on_a_complete_graph_is_fedavg_to_the_bit(model):
    common = ALL, model, "rounds=2"
    server = run_rounds("algorithm={name: fedavg, weights: uniform}", *common)[0]
    graph = run_rounds(DPSGD, COMPLETE, *common)[0]
    for a, b in zip(server, graph, strict=True):
        for leaf, value in a.shared.items():
            assert all(torch.equal(row, value) for row in b.personal[leaf])
    for a, b in zip(server[1:], graph[1:], strict=True):
        assert np.array_equal(a.clients["accuracy"], b.clients["accuracy"])
        assert b.row["consensus_distance"] == 0


def test_fedavg_over_a_topology_is_dpsgd():
    for a, b in zip(
        *(run_rounds(f"algorithm={name}", RING)[0] for name in ("fedavg", "dpsgd")), strict=True
    ):
        assert snapshots_equal(a, b)


@pytest.mark.parametrize("name", ["fedlora", thorough_param("fedrep"), "ditto", "fedbn"])
def test_a_method_on_a_complete_graph_is_itself_with_a_server(name):
    common = f"algorithm={name}", ALL, NORM, "rounds=2"
    if name == "fedrep":
        common = (*common, "algorithm.weights=uniform", "algorithm.head_epochs=1")
    server, graph = run_rounds(*common)[0], run_rounds(*common, COMPLETE)[0]
    for a, b in zip(server, graph, strict=True):
        assert {*b.personal} == {*a.shared} | {*a.personal} and not b.shared
        assert trees_equal(a.personal, {n: b.personal[n] for n in a.personal})
        for leaf, value in a.shared.items():
            assert all(torch.equal(row, value) for row in b.personal[leaf]), leaf
    for score in ("accuracy", "accuracy_trained", "loss"):
        assert np.array_equal(server[-1].clients[score], graph[-1].clients[score])


def test_absent_clients_keep_their_model_and_the_mean_of_all_moves_by_training_alone():
    cohorts = build_tiny(DPSGD, RING).federation.cohorts
    _, *moments = run_rounds(DPSGD, RING)[0]
    for round_, (before, after) in enumerate(pairwise(moments), 1):
        members = cohorts.sample(round_).members
        for leaf, rows in after.personal.items():
            moved = {c for c in range(7) if not torch.equal(rows[c], before.personal[leaf][c])}
            assert moved == members
    # an exchange leaves the mean: with training that moves nothing, it is that of the start
    still = run_rounds(DPSGD, RING, "train.lr=1.0e-30")[0]
    for leaf, rows in still[-1].personal.items():
        torch.testing.assert_close(rows.mean(0), still[0].personal[leaf].mean(0))


def test_one_exchange_shrinks_the_distance_from_consensus_by_the_spectral_gap_at_least():
    rows, matrix = Rows(7), mixing_matrix(Ring(), 7)
    mixed, _ = rows.mixed(matrix, frozenset(range(7)), 1, [0] * 7)
    before, after = (u - u.mean(0) for u in (rows.u, torch.stack([mixed[c] for c in range(7)])))
    assert after.norm() <= (1 - matrix.spectral_gap) * before.norm() * (1 + 1e-6)


@pytest.mark.parametrize(
    "settings, is_parameter",
    [
        ((DPSGD, RING, NORM), lambda leaf: "running" not in leaf),
        (
            ("algorithm=fedper", RING, NORM),
            lambda leaf: "running" not in leaf and "head" not in leaf,
        ),
    ],
    ids=["dpsgd", "fedper"],
)
def test_the_consensus_distance_is_that_of_the_exchanged_parameters(settings, is_parameter):
    moment = run_rounds(*settings)[0][-1]
    x = torch.cat(
        [rows.flatten(1) for leaf, rows in moment.personal.items() if is_parameter(leaf)], 1
    ).double()
    expected = (x - x.mean(0)).square().sum(1).numpy()
    np.testing.assert_allclose(moment.clients["consensus_distance"], expected, rtol=1e-9)
    assert moment.row["consensus_distance"] == pytest.approx(expected.mean()) and expected.all()


@pytest.mark.parametrize(
    "name, settings, reason",
    [
        ("fedamp", (), "has a server that decides the weights of its mixes"),
        ("ota_ffl_like", (), "has a server that decides the weights of its mean"),
        ("local", (), "shares nothing, so its clients have nothing to exchange"),
        ("scaffold", ("train.momentum=0",), "makes something else of uploads than their mean"),
        ("fedavgm", (), "makes something else of uploads than their mean"),
        ("fd", (), "makes something else of uploads than their mean"),
    ],
)
def test_a_method_that_needs_its_server_is_refused(call, name, settings, reason):
    code, _, err = call("run", TINY, f"algorithm={name}", RING, *settings, "output=run")
    assert code == 2 and f"algorithm.name = {name}: " in err and reason in err
    assert err.count("\n") == 1 and not Path("run").exists()


def test_a_resume_on_other_ranks_has_the_same_bits(tmp_path):
    settings = DPSGD, RING, "checkpoint.every=1"
    whole = create_run(1, tmp_path / "whole", *settings, "rounds=2")
    cut = create_run(3, tmp_path / "cut", *settings, "rounds=1")
    config = config_to_resume(cut, ["rounds=2"])
    codes = run_on_ranks(2, lambda comm: _continue_run(cut, config, comm, [], quiet=True))
    assert codes == [0, 0]
    assert_same_run(whole, cut)


def test_a_resume_finds_another_graph(call, tmp_path):
    graph = write(tmp_path, "0 1\n1 2\n2 3\n3 4\n4 5\n5 6\n").path
    block = f"topology={{name: file, path: {graph}}}"
    assert call("run", TINY, DPSGD, block, "rounds=1", "output=run")[0] == 0
    copy = shutil.copy(graph, tmp_path / "copy.txt")
    write(tmp_path, "0 1\n1 2\n2 3\n3 4\n4 5\n5 6\n6 0\n")
    code, _, err = call("resume", "run", "rounds=2")
    assert code == 2 and "who exchanges with whom: not the same as when the run began" in err
    assert "put back what was in topology.path" in err
    assert call("resume", "run", "rounds=2", f"topology.path={copy}")[0] == 0
    code, _, err = call("resume", "run", "rounds=3", RING)
    assert code == 2 and "topology.name = ring: the run in run has file" in err


def test_ranks_with_other_graphs_do_not_begin(tmp_path, monkeypatch):
    drawn = iter([Ring(), Complete()])
    monkeypatch.setattr(
        parts, "mixing_matrix", lambda _, clients: mixing_matrix(next(drawn), clients)
    )
    with pytest.raises(Refusal, match="who exchanges with whom: not the same as on rank 0; give"):
        run_on_ranks(2, lambda comm: build(tiny_config(DPSGD, RING), str(TINY), comm))


# DEPOSITUM


ONE_STEP = "train={epochs: 1, batch_size: 200, lr: 0.1, momentum: 0}"
PLAIN = "algorithm={name: depositum_like, gamma: 0}"


def parts_of(personal: dict, prefix: str) -> torch.Tensor:
    """The leaves [N, D] of this prefix, or of the network."""
    leaves = [rows for n, rows in personal.items() if n.startswith(prefix)]
    return torch.cat([rows.flatten(1) for rows in leaves], 1).double()


def test_tracking_on_a_complete_graph_without_momentum_is_gradient_descent():
    """With one step of the whole batch a round."""
    graph = run_rounds(PLAIN, COMPLETE, ALL, ONE_STEP)[0]
    server = run_rounds("algorithm={name: fedavg, weights: uniform}", ALL, ONE_STEP)[0]
    for a, b in zip(graph, server, strict=True):
        assert_near({n: a.personal[n][2] for n in b.shared}, b.shared)
    assert graph[-1].row["train_loss"] == pytest.approx(server[-1].row["train_loss"], rel=1e-5)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_tracked_gradients_sum_to_those_of_the_clients(beta):
    how = f"algorithm={{name: depositum_like, beta: {beta}, momentum: nesterov}}", RING, "rounds=3"
    for moment in run_rounds(*how, "train.momentum=0", "train.lr=0.1")[0][1:]:
        y, g = (parts_of(moment.personal, prefix) for prefix in (".tracked.", ".gradient."))
        torch.testing.assert_close(y.sum(0), beta * g.sum(0), rtol=1e-4, atol=1e-5)
        assert g.abs().max() > 0.01 and not torch.allclose(y, beta * g, atol=1e-3)


def test_the_momenta_of_depositum_are_those_of_the_formulas():
    """After one batch nu = (1 - gamma) g and x = x_0 - lr d, mixed with W."""
    for momentum, factor in (("heavy_ball", 0.25), ("nesterov", 0.75 * 0.25 + 0.25)):
        block = f"algorithm={{name: depositum_like, gamma: 0.75, momentum: {momentum}}}"
        begin, end = run_rounds(block, RING, ALL, ONE_STEP, "rounds=1")[0]
        g = parts_of(end.personal, ".gradient.")
        torch.testing.assert_close(parts_of(end.personal, ".momentum."), 0.25 * g)
        names = [n for n in end.personal if not n.startswith(".")]
        before, after = (
            torch.cat([moment.personal[n].flatten(1) for n in names], 1).double()
            for moment in (begin, end)
        )
        W = torch.from_numpy(mixing_matrix(Ring(), 7).weights)
        torch.testing.assert_close(after, W @ (before - 0.1 * factor * g), rtol=0, atol=1e-6)


def test_the_proximal_maps_are_those_of_their_penalties():
    v = torch.tensor([-3.0, -0.5, -0.05, 0.0, 0.05, 0.5, 3.0])
    l1 = DepositumLike(penalty="l1", lam=1.0).prox(v, 0.1)
    torch.testing.assert_close(l1, torch.tensor([-2.9, -0.4, 0.0, 0.0, 0.0, 0.4, 2.9]))
    mcp = DepositumLike(penalty="mcp", lam=1.0, theta=2.0).prox(v, 0.1)
    expected = torch.tensor([-3.0, -0.4 / 0.95, 0.0, 0.0, 0.0, 0.4 / 0.95, 3.0])
    torch.testing.assert_close(mcp, expected)
    assert torch.equal(DepositumLike().prox(v, 0.1), v)
    # each minimises |u - v|^2 / 2 + alpha h(u)
    u = torch.linspace(-4, 4, 80001, dtype=torch.float64)
    h = torch.where(u.abs() <= 2, u.abs() - u**2 / 4, torch.ones_like(u))
    for number, reached in zip(v.double(), mcp.double(), strict=True):
        best = u[((u - number) ** 2 / 2 + 0.1 * h).argmin()]
        assert float(best) == pytest.approx(float(reached), abs=2e-4)


def test_a_large_penalty_makes_every_parameter_zero():
    how = "algorithm={name: depositum_like, penalty: l1, lam: 100}", RING, ALL, "rounds=1"
    end = run_rounds(*how, "train.momentum=0", "train.lr=0.1")[0][-1]
    assert all(not rows.any() for n, rows in end.personal.items() if not n.startswith("."))


# The log, plan and report


def test_the_log_has_the_graph_its_gap_and_the_consensus_distance_of_evaluated_rounds(trained):
    files = RunFiles(trained(*ON_RING))
    assert files.spectral_gap == mixing_matrix(Ring(), 7).spectral_gap
    assert [others.tolist() for others in files.partition()["neighbours"]][:2] == [[1, 6], [0, 2]]
    distances = files.rounds()["consensus_distance"]
    assert np.isnan(distances).tolist() == [True, True, False, False]
    assert files.clients()["consensus_distance"].shape == (4, 7)
    without = RunFiles(trained())
    assert without.spectral_gap is None and "neighbours" not in without.partition()
    assert "consensus_distance" not in without.rounds()


def test_plan_counts_the_bytes_of_each_neighbour(call, unmeasured):
    def lines(*overrides):
        code, out, _ = call("plan", TINY, DPSGD, ALL, *overrides)
        assert code == 0
        return dict(line.split(maxsplit=1) for line in out.splitlines()[1:])

    number_bytes = 4 * 636
    ring = lines(RING)
    assert (
        f"{2 * number_bytes / 1e3:.3g} kB up, {2 * number_bytes / 1e3:.3g} kB down"
        in (ring["shared"])
    )
    assert f"7 of 7 clients: {14 * number_bytes / 1e3:.3g} kB up" in ring["round"]
    assert ring["topology"] == "ring: 7 edges, 2 neighbours per client, spectral gap 0.251"
    assert f"{6 * number_bytes / 1e3:.3g} kB up" in lines(COMPLETE)["shared"]
    moments = run_rounds(DPSGD, RING, ALL, "rounds=2")[0]
    assert moments[1].row["bytes_up"] == moments[1].row["bytes_down"] == 14 * number_bytes


def test_a_report_draws_the_graphs_and_names_their_gaps(call, trained):
    runs = trained(*ON_RING), trained(DPSGD, COMPLETE, "rounds=1"), trained()
    code, out, _ = call("report", *runs)
    assert code == 0 and out.count("spectral gap") == 2
    assert f"{runs[0]}: topology ring, spectral gap 0.251, final consensus distance " in out
    found = read_groups(*runs).groups
    with plot_style():
        looks = assign_looks(found)
        drawn = topology.graph_figure(found, looks)
        assert [len(axes.lines) for axes in drawn.figure.axes] == [7, 21]  # a line for each edge
        assert ": gap 0.251" in drawn.figure.axes[0].get_title(loc="left").replace("\n", " ")
        lines = topology.consensus_curves(found, looks).figure.axes[0].lines
        assert len([line for line in lines if len(line.get_xdata()) == 2]) == 1  # of two rounds
        assert topology.graph_figure(found[2:], looks) is None
    rows = table_rows(topology.topology_table(found))
    assert [(row["topology"], row["edges"], row["degrees"]) for row in rows] == [
        ("ring", "7", "2"),
        ("complete", "21", "6"),
    ]
    assert topology.topology_table(found[2:]) is None


def test_the_own_model_of_a_client_can_be_opened(trained):
    run = open_run(trained("algorithm=fedlora", RING, "rounds=1"))
    client = run.client(3)
    x, y = client.test_data()
    with torch.no_grad():
        accuracy = (client.model(x).argmax(1) == y).double().mean()
    assert float(accuracy) == pytest.approx(float(run.array("clients/accuracy")[-1, 3]), abs=1e-6)


def test_the_rows_of_one_process_pass_no_message():
    moved = []
    comm = Solo()
    comm.exchange = lambda send, *_: moved.append(send.size) or send
    how = build_tiny(DPSGD, RING).federation.aggregator.mixing
    offers = {
        c: how.pack(Mix({n: torch.ones(s) for n, s in how.row_layout.shapes.items()}))
        for c in range(7)
    }
    how.mix(comm, None, offers, range(7), 0)
    assert moved == [0] and how.bytes_mpi({*range(7)}, 1) == 0


def test_a_search_may_minimise_the_consensus_distance_over_a_topology_alone():
    assert metric_direction("consensus_distance") == "minimize"
    for config, has_it in ((tiny_config(DPSGD, RING), True), (tiny_config(), False)):
        assert ("consensus_distance" in _log_columns(config)) == has_it


def test_the_command_line_overrides_a_topology(call):
    code, out, _ = call("config", TINY, "topology={name: random, probability: 0.5, seed: 3}", RING)
    assert code == 0 and "name: ring" in out and "probability" not in out
    assert main(["config", str(TINY), RING, "topology=null"]) == 0
