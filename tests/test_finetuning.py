"""Federated LoRA of clients' own ranks: FedIT, FlexLoRA and FedHL, and what they are built from."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from aggregates import svd
from finetuned import aggregate_terms
from runs import NORM, TINY, build_tiny, run_on_ranks, run_rounds, snapshots_equal
from tiers import thorough_param

from fedlora_mpi import config as configs
from fedlora_mpi.aggregation.svd import right_vectors
from fedlora_mpi.algorithm import Aggregate, Update, Upload
from fedlora_mpi.algorithms.fedhl import FedHL
from fedlora_mpi.algorithms.fedit import FedIT
from fedlora_mpi.algorithms.flexlora import FlexLoRA
from fedlora_mpi.components.lora import diagnosis
from fedlora_mpi.components.lora.rank_weights import WeightMode, rank_weight
from fedlora_mpi.components.lowrank import right_singular_vectors

RANKS = (1, 2, 4)
SIDES = {"u": (3, 5), "v": (7, 6)}  # out side, in side
COUNTS = (10, 20, 70)


def matrix(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shared_of(algorithm, server=True, rank=None):
    """The server's variables after some rounds: W of full rank, and what belongs to it."""
    tree = {"head": matrix(1, 2)}
    for number, (name, (out, inside)) in enumerate(SIDES.items()):
        rows = min(max(algorithm.lora_ranks), out, inside)
        if isinstance(algorithm, FedIT):
            tree |= {
                f"{name}..A": matrix(10 + number, rows, inside),
                f"{name}..B": matrix(20 + number, out, rows),
            }
            continue
        W = matrix(2 + number, out, inside)
        if rank is not None:
            W = matrix(30, out, rank) @ matrix(31, rank, inside)
        tree |= {
            f"{name}..A": W.new_zeros(rows, inside),
            f"{name}..B": W.new_zeros(out, rows),
            f"{name}..W": W,
        }
    if isinstance(algorithm, FedIT):
        return tree
    return algorithm.redistribute(tree, svd)


def trained(download, seed, far=0.1):
    """What a client makes of what it got."""
    return {n: v + far * matrix(seed + i, *v.shape) for i, (n, v) in enumerate(download.items())}


def next_update(algorithm, shared, far=0.1, counts=COUNTS) -> tuple[Update, dict]:
    """(the server's update, {client: its uploads}) of a round of three clients of the ranks of
    ``algorithm``.
    """
    uploads, terms = {}, []
    for client, count in enumerate(counts):
        transport = algorithm.transport(client, len(counts))
        uploads[client] = trained(transport.download(shared), 100 * client, far)
        terms.append(transport.expand(Upload(uploads[client]), shared, count))
    return algorithm.server_update({}, shared, aggregate_terms(terms, counts, shared), svd), uploads


def next_round(algorithm, shared, far=0.1, counts=COUNTS):
    """(shared after that round, {client: its uploads})."""
    update, uploads = next_update(algorithm, shared, far, counts)
    return update.shared, uploads


def client_method(algorithm, client, clients=3):
    """The method as one of so many clients has it."""
    return algorithm.transport(client, clients).method


def products(algorithm, uploads):
    """{client: {weight: s B A}}"""
    return {
        c: client_method(algorithm, c, len(uploads)).factor_products(upload)
        for c, upload in uploads.items()
    }


def near(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# Ranks.


def test_a_list_of_ranks_goes_round():
    assert [client_method(FedIT(lora_ranks=RANKS), k, 5).lora_ranks for k in range(5)] == [
        (1,),
        (2,),
        (4,),
        (1,),
        (2,),
    ]


def test_shares_of_ranks_are_those_of_the_clients():
    method = FedIT(lora_ranks=(8, 4, 1), rank_shares=(0.2, 0.3, 0.5))
    ranks = [client_method(method, k, 10).lora_ranks[0] for k in range(10)]
    assert ranks == [8] * 2 + [4] * 3 + [1] * 5


def test_a_rank_follows_the_capacity_but_is_at_least_1():
    method = FedIT(lora_ranks=(10,), capacities=(2.0, 1.0, 0.1))
    assert [client_method(method, k, 4).lora_ranks[0] for k in range(4)] == [10, 5, 1, 10]


@pytest.mark.parametrize("method", [FedIT, FlexLoRA, FedHL])
@pytest.mark.parametrize("scale", ["common", "root"])
def test_the_scale_is_alpha_by_the_rank(method, scale):
    clients = [client_method(method(lora_ranks=RANKS, alpha=8.0, scale=scale), k) for k in range(3)]
    over = {"common": [4.0] * 3, "root": [2.0] * 3 if method is FedIT else [1.0, 2**0.5, 2.0]}[
        scale
    ]
    assert [client.s for client in clients] == pytest.approx([8 / r for r in over])


def test_by_default_products_are_scaled_by_each_rank():
    assert [client_method(FedHL(lora_ranks=RANKS, alpha=8.0), k).s for k in range(3)] == [8, 4, 2]


@pytest.mark.parametrize(
    "override, message",
    [
        ("lora_ranks=[]", "lora_ranks = []: must be integers of at least 1"),
        ("lora_ranks=[0]", "lora_ranks = [0]: must be integers of at least 1"),
        (
            "rank_shares=[0.5]",
            "rank_shares = [0.5]: must be a share above 0 for each of lora_ranks, together 1",
        ),
        ("capacities=[0.0]", "capacities = [0.0]: must be numbers above 0"),
        ("layers=['nothing']", "layers = nothing: matches no weight"),
        ("layers=['head.*']", "layers = ['head.*']: match only what is trained in full"),
    ],
)
def test_a_wrong_setting_gets_one_line(override, message):
    with pytest.raises(Exception, match="algorithm") as error:
        build_tiny.__wrapped__("algorithm=fedhl", NORM, f"algorithm.{override}")
    assert message in str(error.value) and "\n" not in str(error.value)


# The decomposition.


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (8, 30)])
def test_the_best_approximation_is_that_of_the_svd(shape):
    W = matrix(0, *shape)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    for rows in range(1, min(shape) + 1):
        A = right_singular_vectors(W, rows)
        near(A @ A.T, torch.eye(rows, dtype=W.dtype))
        near(W @ A.T @ A, U[:, :rows] * S[:rows] @ V[:rows], atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_matrix_of_lower_rank_leaves_no_dead_factor(shape, rank):
    W = matrix(0, shape[0], rank) @ matrix(1, rank, shape[1])
    A = right_singular_vectors(W, 3)
    near(A @ A.T, torch.eye(3, dtype=W.dtype))
    near(W @ A.T @ A, W, atol=1e-10)
    B = W @ A.T
    dead = (B.norm(dim=0) < 1e-9) & (A.norm(dim=1) < 1e-9)
    assert not dead.any()


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_rounding_does_not_choose_the_signs(shape):
    W = matrix(0, *shape)
    A = right_singular_vectors(W, 3)
    assert (A.gather(1, A.abs().argmax(1, keepdim=True)) > 0).all()
    for same in (-W, W.flip(0)):
        near(right_singular_vectors(same, 3), A)


def test_a_stack_of_matrices_is_decomposed_one_by_one():
    stack = torch.stack([matrix(seed, 5, 3) for seed in range(4)])
    near(
        right_singular_vectors(stack, 2), torch.stack([right_singular_vectors(W, 2) for W in stack])
    )


def test_ranks_share_large_decompositions_and_move_no_bit():
    matrices = {
        f"w{k}": (torch.randn(300 + 40 * k, 300, generator=torch.Generator().manual_seed(k)), 5)
        for k in range(5)
    }
    matrices["last"] = torch.randn(3, 7, generator=torch.Generator().manual_seed(9)), 2
    (alone,) = run_on_ranks(1, lambda comm: right_vectors(comm, matrices))
    for found in run_on_ranks(3, lambda comm: right_vectors(comm, matrices)):
        assert list(found) == list(alone) and all(torch.equal(found[n], alone[n]) for n in alone)


# FedIT.


def test_fedit_pads_with_zeros_and_averages():
    method = FedIT(lora_ranks=RANKS)
    shared = shared_of(method)
    new, uploads = next_round(method, shared)
    for name in SIDES:
        expected = torch.zeros_like(shared[f"{name}..A"])
        for client, count in enumerate(COUNTS):
            A = uploads[client][f"{name}..A"]
            expected[: len(A)] += count / 100 * A
        near(new[f"{name}..A"], expected)
    near(new["head"], sum(count / 100 * uploads[k]["head"] for k, count in enumerate(COUNTS)))


def test_the_mean_of_products_is_not_the_product_of_means():
    """sum p B A - (sum p B)(sum p A) = sum p (B_k - B)(A_k - A), what ``lora_bias`` measures."""
    method = FedIT(lora_ranks=(2,), alpha=2.0, diagnose=True)
    shared = shared_of(method)
    update, uploads = next_update(method, shared)
    new, figures, square = update.shared, update.metrics, 0.0
    for name in SIDES:
        A, B = new[f"{name}..A"], new[f"{name}..B"]
        p = [count / 100 for count in COUNTS]
        gap = sum(
            w * (u[f"{name}..B"] - B) @ (u[f"{name}..A"] - A)
            for w, u in zip(p, uploads.values(), strict=True)
        )
        square += gap.square().sum()
    assert figures["lora_bias"] == pytest.approx(float(square.sqrt()), rel=0, abs=1e-10)
    assert figures["lora_update_bias"] == pytest.approx(float(square.sqrt()), rel=0, abs=1e-10)
    assert figures["lora_truncation"] == 0
    assert figures["effective_clients"] == pytest.approx(
        1 / sum((count / 100) ** 2 for count in COUNTS)
    )


# FlexLoRA.


def test_flexlora_keeps_the_mean_of_the_products():
    method = FlexLoRA(lora_ranks=RANKS)
    new, uploads = next_round(method, shared_of(method))
    made = products(method, uploads)
    for name in SIDES:
        near(new[f"{name}..W"], sum(count / 100 * made[k][name] for k, count in enumerate(COUNTS)))


def test_a_client_gets_the_best_approximation_of_its_rank():
    method = FlexLoRA(lora_ranks=RANKS)
    shared = shared_of(method)
    for client, r in enumerate(RANKS):
        transport = method.transport(client, 3)
        own, arrived = transport.method, transport.download(shared)
        assert not any(n.endswith(".W") for n in arrived)
        for name, product in own.factor_products(arrived).items():
            U, S, V = torch.linalg.svd(shared[f"{name}..W"], full_matrices=False)
            near(product, U[:, :r] * S[:r] @ V[:r], atol=1e-10)
            assert (
                arrived[f"{name}..A"].shape[0]
                == arrived[f"{name}..B"].shape[1]
                == min(r, *SIDES[name])
            )


def test_without_training_flexlora_shrinks():
    method = FlexLoRA(lora_ranks=RANKS)
    shared = shared_of(method)
    new, _ = next_round(method, shared, far=0.0)
    assert all(new[f"{n}..W"].norm() < 0.99 * shared[f"{n}..W"].norm() for n in SIDES)


# FedHL (spec 4.5).


MODES = pytest.mark.parametrize("mode", get_args(WeightMode))


@MODES
def test_without_training_fedhl_stays_where_it_is(mode):
    method = FedHL(lora_ranks=RANKS, weight_mode=mode)
    shared = shared_of(method)
    new, _ = next_round(method, shared, far=0.0)
    assert all(torch.equal(new[f"{n}..W"], shared[f"{n}..W"]) for n in SIDES)


def test_with_equal_ranks_that_hold_all_of_W_fedhl_is_flexlora_with_uniform_weights():
    flex, hl = FlexLoRA(lora_ranks=(9,)), FedHL(lora_ranks=(9,), weight_mode="uniform")
    ends = [next_round(method, shared_of(method), counts=(5, 5, 5))[0] for method in (flex, hl)]
    for name in SIDES:
        near(ends[0][f"{name}..W"], ends[1][f"{name}..W"], atol=1e-10)


@MODES
def test_fedhl_is_its_mean_of_products_plus_what_truncation_took(mode):
    method = FedHL(lora_ranks=RANKS, weight_mode=mode, eps=0.1)
    shared = shared_of(method)
    new, uploads = next_round(method, shared)
    p = weights(method, shared, uploads)
    made = products(method, uploads)
    for name in SIDES:
        W, got = (
            shared[f"{name}..W"],
            [
                client_method(method, k).delta(method.transport(k, 3).download(shared))[name]
                for k in range(3)
            ],
        )
        near(
            new[f"{name}..W"],
            sum(w * (made[k][name] + W - got[k]) for k, w in enumerate(p)),
            atol=1e-10,
        )


def weights(method, shared, uploads, counts=COUNTS):
    """p_k of the first layer."""
    found = [
        method.transport(k, 3).expand(Upload(uploads[k]), shared, count).weights["u..W"]
        for k, count in enumerate(counts)
    ]
    return [float(w / sum(found)) for w in found]


def lost(shared, r):
    """t_k from its definition: ||W - W^r||^2 over the layers."""
    total = 0.0
    for name in SIDES:
        S = torch.linalg.svdvals(shared[f"{name}..W"])
        total += float(S[r:].square().sum())
    return total


def whole(shared):
    """||W||^2 over the layers."""
    return sum(float(shared[f"{n}..W"].square().sum()) for n in SIDES)


def test_the_weights_of_each_mode_are_those_of_its_formula():
    method = FedHL(lora_ranks=RANKS, eps=0.5)
    shared = shared_of(method)
    _, uploads = next_round(method, shared)
    total, clients = whole(shared), [*zip([lost(shared, r) for r in RANKS], COUNTS, strict=True)]
    for fields, expected in (
        ({}, [n / (t / total + 0.3) for t, n in clients]),
        ({"tau": 0.01}, [n / (t / total + 0.01) for t, n in clients]),
        ({"weight_mode": "samples"}, COUNTS),
        ({"weight_mode": "uniform"}, [1, 1, 1]),
        ({"weight_mode": "inverse"}, [1 / (t + 0.5) for t, _ in clients]),
        ({"weight_mode": "fedhera"}, [1 / (t**2 + 0.5) for t, _ in clients]),
        ({"weight_mode": "fedhera_samples"}, [n / (t**2 + 0.5) for t, n in clients]),
    ):
        p = weights(replace(method, **fields), shared, uploads)
        assert p == pytest.approx([w / sum(expected) for w in expected], rel=1e-9), fields
    for mode, power in (("inverse", 1), ("fedhera", 2)):
        eased = [1 / (t**power + 0.5 + 0.2 * total**power) for t, _ in clients]
        p = weights(replace(method, weight_mode=mode, eps_relative=0.2), shared, uploads)
        assert p == pytest.approx([w / sum(eased) for w in eased], rel=1e-9)


def test_a_layer_may_have_weights_of_its_own():
    method = FedHL(lora_ranks=RANKS, per_layer=True)
    shared = shared_of(method)
    _, uploads = next_round(method, shared)
    squares = torch.linalg.svdvals(shared["u..W"]).square()
    raw = [
        n / (float(squares[r:].sum() / squares.sum()) + 0.3)
        for r, n in zip(RANKS, COUNTS, strict=True)
    ]
    assert weights(method, shared, uploads) == pytest.approx([w / sum(raw) for w in raw])


@pytest.mark.parametrize("mode", ["drift", "samples", "uniform", "inverse", "fedhera"])
def test_equal_ranks_get_n_k_or_equal_weights(mode):
    method = FedHL(lora_ranks=(2,), weight_mode=mode)
    shared = shared_of(method)
    p = weights(method, shared, next_round(method, shared)[1])
    expected = [n / 100 for n in COUNTS] if mode in ("drift", "samples") else [1 / 3] * 3
    assert p == pytest.approx(expected)


@pytest.mark.parametrize("tau", [0.3, 0.01])
def test_drift_bounds_the_weight_of_a_client_whose_rank_holds_all_of_w(tau):
    method = FedHL(lora_ranks=(9, 1, 2), tau=tau)
    shared = shared_of(method)
    p = weights(method, shared, next_round(method, shared)[1])
    for k, r in ((1, 1), (2, 2)):
        ratio = (p[0] / COUNTS[0]) / (p[k] / COUNTS[k])
        assert ratio == pytest.approx((lost(shared, r) / whole(shared) + tau) / tau)
        assert 1 < ratio <= (1 + tau) / tau
    steep = weights(replace(method, weight_mode="fedhera"), shared, next_round(method, shared)[1])
    assert steep[0] > 0.999


def drift_weights(t, counts, tau):
    """p_k of the mode drift for clients of these t_k / ||W||^2."""
    parts = torch.stack([t, torch.zeros_like(t), torch.ones_like(t)], 1)
    raw = [
        n * rank_weight("drift", part, tau, 1.0, 0.0) for n, part in zip(counts, parts, strict=True)
    ]
    return torch.stack(raw) / sum(raw)


@pytest.mark.parametrize("equal", [True, False])
def test_drift_is_the_least_of_the_terms_of_the_descent_lemma(equal):
    n, L, s, zeta = 6, 1.7, 0.4, 0.9
    draws = torch.Generator().manual_seed(5)
    t = torch.rand(n, dtype=torch.float64, generator=draws)
    counts = torch.ones(n) if equal else torch.tensor([1.0, 3, 2, 7, 4, 5])
    q = counts.double() / counts.sum()

    def by_q(p):
        """The terms of the docstring."""
        noise_and_drift = (p**2 / q * (L**2 * t + s)).sum(-1)
        return noise_and_drift + zeta**2 * ((p - q) ** 2 / q).sum(-1)

    def by_n(p):
        """Those with the factor N of Cauchy and Schwarz instead of 1 / q_k."""
        truncation = n * L**2 * (p**2 * t).sum(-1) + s * (p**2).sum(-1)
        return truncation + zeta**2 * ((p - q) ** 2 / q).sum(-1)

    p = drift_weights(t, counts, tau=(zeta**2 + s) / L**2)
    other = q / (zeta**2 + q * (n * L**2 * t + s))
    cases = [(by_q, p), (by_n, other / other.sum())]
    if equal:  # then both are of one form, s counts 1 / N
        same = drift_weights(t, counts, tau=(zeta**2 + s / n) / L**2)
        torch.testing.assert_close(same, cases[1][1], rtol=1e-12, atol=0)
    for terms, best in cases:
        moves = torch.randn(20_000, n, dtype=torch.float64, generator=draws)
        moves = moves - moves.mean(1, keepdim=True)  # the sum of p stays 1
        for size in (1e-3, 0.1):
            assert (terms(best + size * moves) > terms(best)).all()


def test_what_truncation_takes_falls_with_the_rank_and_is_that_of_the_matrices():
    shared = shared_of(FedHL(lora_ranks=(5,)))
    for name, (out, inside) in SIDES.items():
        tail, W = shared[f".tail.{name}"], shared[f"{name}..W"]
        assert len(tail) == min(5, out, inside) + 1 and bool((tail.diff() <= 0).all())
        for r in range(len(tail)):
            A = right_singular_vectors(W, max(r, 1))[:r]
            near(tail[r], (W - W @ A.T @ A).square().sum(), atol=1e-10)


def test_the_diagnosis_of_fedhl_is_what_it_says():
    method = FedHL(lora_ranks=RANKS, diagnose=True, weight_mode="samples")
    shared = shared_of(method)
    update, uploads = next_update(method, shared)
    new, figures = update.shared, update.metrics
    assert figures["lora_truncation"] == pytest.approx(sum(lost(shared, r) for r in RANKS) / 3)
    # its update is the mean of theirs
    assert figures["lora_update_bias"] == pytest.approx(0, abs=1e-10)
    made, square = products(method, uploads), 0.0
    for name in SIDES:
        square += (
            (new[f"{name}..W"] - sum(n / 100 * made[k][name] for k, n in enumerate(COUNTS)))
            .square()
            .sum()
        )
    assert figures["lora_bias"] == pytest.approx(float(square.sqrt()), rel=0, abs=1e-10)
    uniform = next_update(replace(method, weight_mode="uniform"), shared)[0].metrics
    assert uniform["effective_clients"] == pytest.approx(3)


def test_weights_too_small_to_be_squared_leave_the_effective_clients_unknown():
    """The update of a client that diverges is so large that FedHL gives it hardly any weight."""
    tiny, one = torch.tensor(1e-30), torch.ones(())
    update = {"a": one}
    metrics = diagnosis.client_metrics(update, update, update, {"a": tiny}, one)
    aggregate = Aggregate({}, {}, metrics, round=0, clients=3, share=1.0, weight=3.0)
    figures = diagnosis.figures(update, update, aggregate)
    assert np.isnan(figures.pop("effective_clients")) and set(figures.values()) == {0.0}


@pytest.mark.parametrize("mode", ["drift", "inverse", "fedhera"])
def test_the_weights_of_round_1_ignore_ranks_and_every_b_has_a_gradient(mode):
    moments = run_rounds(
        "algorithm=fedhl",
        f"algorithm.weight_mode={mode}",
        NORM,
        "algorithm.lora_ranks=[1,2,4]",
        "algorithm.alpha=2",
        "algorithm.diagnose=true",
    )[0]
    federation = build_tiny("algorithm=fedhl").federation
    weights, cohort = federation.clients.weights, federation.cohorts.sample(0).members
    n = np.array([weights[client] for client in cohort], float)
    effective = n.sum() ** 2 / (n**2).sum() if mode == "drift" else 4
    assert moments[1].row["effective_clients"] == pytest.approx(effective)
    begin = moments[0].shared
    assert not begin["conv.weight..B"].any() and begin["conv.weight..A"].norm(dim=1).min() > 0
    assert moments[1].shared["conv.weight..W"].norm() > 0


# Whole runs.


@pytest.mark.parametrize("name", [thorough_param("fedit"), "flexlora", thorough_param("fedhl")])
@pytest.mark.parametrize("ranks", [thorough_param(1), thorough_param(2), 3])
def test_gathered_uploads_give_the_bits_of_summed_ones(name, ranks):
    common = (
        f"algorithm={name}",
        NORM,
        "algorithm.lora_ranks=[1,2,4]",
        "algorithm.alpha=2",
        "rounds=2",
    )
    by_sum = run_rounds(*common, "uplink=sum")[0][1:]
    for moments in run_rounds(*common, "uplink=gather", ranks=ranks):
        assert all(
            torch.equal(v, b.shared[n])
            for a, b in zip(moments[1:], by_sum, strict=True)
            for n, v in a.shared.items()
        )
        assert all(
            np.array_equal(a.clients["accuracy"], b.clients["accuracy"])
            for a, b in zip(moments[1:], by_sum, strict=True)
        )


def test_the_uplink_is_what_moves_fewer_bytes():
    few = build_tiny("algorithm=fedhl", NORM, "algorithm.lora_ranks=[1]", "algorithm.full=[]")
    many = build_tiny("algorithm=fedhl", NORM, "algorithm.lora_ranks=[4]", "reduce=fast")
    assert few.federation.aggregator.gathers and not many.federation.aggregator.gathers
    assert not build_tiny("algorithm=fedavg", NORM).federation.aggregator.gathers


def test_a_client_pays_for_its_own_rank():
    parts = build_tiny("algorithm=fedhl", NORM, "algorithm.lora_ranks=[1,2,4]", "algorithm.alpha=2")
    moments = run_rounds(
        "algorithm=fedhl", NORM, "algorithm.lora_ranks=[1,2,4]", "algorithm.alpha=2"
    )[0]
    conv, head = (4 * 3) + (1 * 3), 4 * 16 * 4 + 4  # sides of conv.weight [4, 1, 3, 3]; the head
    for round_, moment in enumerate(moments[1:]):
        numbers = sum(
            min((1, 2, 4)[c % 3], 3) * conv + head
            for c in parts.federation.cohorts.sample(round_).members
        )
        assert moment.row["bytes_up"] == moment.row["bytes_down"] == 4 * numbers


def test_a_frozen_network_keeps_its_statistics():
    moments = run_rounds("algorithm=fedit", NORM)[0]
    assert "norm.running_mean" not in moments[-1].shared
    moved = run_rounds("algorithm=fedit", NORM, "algorithm.full=[head,norm]", "rounds=2")[0]
    assert not snapshots_equal(moved[0], moved[-1]) and moved[-1].shared["norm.running_mean"].any()


def test_the_server_s_model_may_be_judged():
    common = (
        "algorithm=fedhl",
        NORM,
        "algorithm.lora_ranks=[1,2]",
        "algorithm.alpha=2",
        "rounds=2",
    )
    client, server = (
        run_rounds(*common)[0][-1],
        run_rounds(*common, "algorithm.judged=server")[0][-1],
    )
    assert all(torch.equal(client.shared[n], v) for n, v in server.shared.items())
    assert not np.array_equal(client.clients["loss"], server.clients["loss"])


def test_a_rank_is_part_of_the_config_that_a_resume_must_have():
    digests = {
        configs.digest(configs.read(TINY, ["algorithm=fedhl", f"algorithm.lora_ranks={r}"]))
        for r in ("[4]", "[4,2]")
    }
    assert len(digests) == 2


# Backbones of torchvision.

COLOURS = ("data.synthetic.channels=3", "train.epochs=1", "rounds=2")


@pytest.mark.parametrize("name", ["fedit", thorough_param("fedhl")])
def test_a_vision_transformer_is_tuned_in_its_attention_alike_in_loop_and_stack(name):
    how = (
        f"algorithm={{name: {name}, lora_ranks: [6, 2], layers: ['*.self_attention.*', '*.mlp.*']}}",
        *COLOURS,
    )
    stack, loop = (
        run_rounds(*how, "model=user_parts:small_vit", f"engine.path={p}")[0]
        for p in ("stack", "loop")
    )
    block = "encoder.layers.encoder_layer_0"
    sides = {n: v.shape for n, v in stack[-1].shared.items() if n.endswith((".A", ".B"))}
    assert sides[f"{block}.self_attention.in_proj_weight..A"] == (6, 12)
    assert sides[f"{block}.self_attention.in_proj_weight..B"] == (36, 6)
    assert {n.removeprefix(f"{block}.") for n in sides if n.endswith(".A")} == {
        f"{layer}..A"
        for layer in (
            "self_attention.in_proj_weight",
            "self_attention.out_proj.weight",
            "mlp.0.weight",
            "mlp.3.weight",
        )
    }
    for leaf, value in stack[-1].shared.items():
        torch.testing.assert_close(
            value, loop[-1].shared[leaf], rtol=0, atol=1e-4, msg=lambda m, n=leaf: f"{n}: {m}"
        )
    assert not snapshots_equal(stack[0], stack[-1])


@pytest.mark.thorough
def test_a_resnet_of_torchvision_is_tuned_with_the_statistics_it_came_with():
    how = (
        "algorithm={name: flexlora, lora_ranks: [3, 1], layers: ['layer1.*', '*.downsample.0.weight']}",
        *COLOURS,
    )
    begin, *_, end = run_rounds(*how, "model=user_parts:small_resnet", "rounds=1")[0]
    moved = {n for n, v in end.shared.items() if not torch.equal(v, begin.shared[n])}
    assert "layer2.0.downsample.0.weight..W" in moved and "layer1.0.conv1.weight..W" in moved
    assert not any("running" in n or ".bn" in n for n in end.shared)
