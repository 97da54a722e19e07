"""raFLoRA: each component is averaged over the clients that have it, so the update keeps its rank."""

from itertools import pairwise

import pytest
import torch
from aggregates import svd
from finetuned import (
    COUNTS,
    MIXED,
    RANKS,
    aggregate_terms,
    assert_trees_near,
    gaussian_tensor,
    init_variables,
)
from methods import overrides_for
from runs import build_tiny, run_rounds, snapshots_equal

from fedlora_mpi.algorithm import Update, Upload
from fedlora_mpi.algorithms.flexlora import FlexLoRA
from fedlora_mpi.algorithms.raflora import RaFLoRA
from fedlora_mpi.components.lora import dense_updates
from fedlora_mpi.components.lora.factors import factor_pairs

TUNED = (*overrides_for("raflora"), "model.width=4")
ALL = (0, 1, 2)


def method(cls=RaFLoRA, **settings):
    return cls(**{"lora_ranks": RANKS, "alpha": 3.0} | settings)


def uploads_of(algorithm, shared, clients=ALL, far=1.0):
    """{client: what it makes of what it receives}; far: how far its training leads."""
    uploads = {}
    for client in clients:
        received = algorithm.transport(client, 3).download(shared)
        uploads[client] = {
            n: v + far * gaussian_tensor(*v.shape, address=f"{client} {n}")
            for n, v in received.items()
        }
    return uploads


def next_update(algorithm, shared, uploads) -> Update:
    """What the server makes of the uploads of these clients."""
    counts = [COUNTS[client] for client in uploads]
    terms = [
        algorithm.transport(client, 3).expand(Upload(upload), shared, COUNTS[client])
        for client, upload in uploads.items()
    ]
    return algorithm.server_update({}, shared, aggregate_terms(terms, counts, shared), svd)


def trained_shared(algorithm, rounds=2):
    """The server's variables after some rounds of all clients."""
    shared = init_variables(algorithm)[1].shared
    for _ in range(rounds):
        shared = next_update(algorithm, shared, uploads_of(algorithm, shared)).shared
    return shared


def mean_of_components(algorithm, uploads):
    """{weight: sum over its components of their mean over the clients that have them}."""
    pairs = {client: factor_pairs(upload) for client, upload in uploads.items()}
    means = {}
    for name in next(iter(pairs.values())):
        means[name] = 0.0
        for at in range(max(len(pairs[client][name][0]) for client in pairs)):
            holders = [client for client in pairs if len(pairs[client][name][0]) > at]
            for client in holders:
                A, B = pairs[client][name]
                p = COUNTS[client] / sum(COUNTS[holder] for holder in holders)
                s = algorithm.transport(client, 3).method.s
                means[name] += p * s * torch.outer(B[:, at], A[at])
    return means


@pytest.mark.parametrize("clients", [ALL, (1, 2), (1,), (0,)], ids=str)
@pytest.mark.parametrize("ranks", [RANKS, (99, 50, 2), (2, 2, 1)], ids=str)
@pytest.mark.parametrize("scale", ["rank", "common"])
def test_a_component_is_the_mean_over_the_clients_of_the_cohort_that_have_it(clients, ranks, scale):
    algorithm = method(lora_ranks=ranks, scale=scale)
    shared = trained_shared(algorithm, 1)
    uploads = uploads_of(algorithm, shared, clients)
    new = next_update(algorithm, shared, uploads).shared
    assert_trees_near(dense_updates(new), mean_of_components(algorithm, uploads))


def test_the_next_factors_are_the_best_approximation_and_the_head_is_averaged():
    algorithm = method()
    shared = trained_shared(algorithm, 1)
    uploads = uploads_of(algorithm, shared)
    new = next_update(algorithm, shared, uploads).shared
    for name, (A, B) in factor_pairs(new).items():
        U, S, V = torch.linalg.svd(new[f"{name}..W"], full_matrices=False)
        torch.testing.assert_close(B @ A, U[:, : len(A)] * S[: len(A)] @ V[: len(A)])
    head = sum(COUNTS[client] * upload["9.bias"] for client, upload in uploads.items()) / 14
    torch.testing.assert_close(new["9.bias"], head)


def test_clients_of_one_rank_are_flexlora_to_the_bit():
    ours, flex = (
        run_rounds(
            f"algorithm={name}", *TUNED[1:], "algorithm.lora_ranks=[2,2]", "algorithm.alpha=2"
        )[0]
        for name in ("raflora", "flexlora")
    )
    assert all(snapshots_equal(a, b) for a, b in zip(ours, flex, strict=True))


def singular_values(shared):
    return {n: torch.linalg.svdvals(W)[: max(RANKS)] for n, W in dense_updates(shared).items()}


def test_without_training_flexlora_loses_the_higher_components_at_a_geometric_rate_and_raflora_none():
    """A component that a share c of the cohort has is multiplied by c in each round of FlexLoRA."""
    rounds, share = 6, torch.tensor([14, 13, 5], dtype=torch.float64) / 14
    ours, flex = method(), method(FlexLoRA)
    ours_shared = flex_shared = trained_shared(ours)
    first = singular_values(ours_shared)
    for _ in range(rounds):
        ours_shared, flex_shared = (
            next_update(it, shared, uploads_of(it, shared, far=0.0)).shared
            for it, shared in ((ours, ours_shared), (flex, flex_shared))
        )
    assert_trees_near(singular_values(ours_shared), first, 1e-10)
    expected = {n: share[: len(S)] ** rounds * S for n, S in first.items()}
    assert_trees_near(singular_values(flex_shared), expected, 1e-10)


def energy_beyond_the_smallest_rank(algorithm, target, rounds=40, lr=0.2):
    """That share of ||W||^2 after gradient descent of all clients on ||s B A - target||^2 / 2."""
    shared = trained_shared(algorithm, 1)
    for _ in range(rounds):
        uploads = {}
        for client in ALL:
            transport = algorithm.transport(client, 3)
            upload, s = dict(transport.download(shared)), transport.method.s
            for name, (A, B) in factor_pairs(upload).items():
                gap = s * B @ A - target[name]
                upload[f"{name}..A"] = A - lr * s * B.T @ gap / (s * B).square().sum().clamp(min=1)
                upload[f"{name}..B"] = B - lr / s * gap @ A.T
            uploads[client] = upload
        shared = next_update(algorithm, shared, uploads).shared
    values = torch.stack(list(singular_values(shared).values())).square().sum(0)
    return float(values[min(RANKS) :].sum() / values.sum())


def test_training_towards_an_update_of_rank_three_keeps_more_energy_beyond_rank_one_than_flexlora():
    ours, flex = method(), method(FlexLoRA)
    target = {
        n: gaussian_tensor(len(W), 3, address=f"left {n}")
        @ gaussian_tensor(3, W.shape[1], address=f"right {n}")
        / W.shape[1] ** 0.5
        for n, W in dense_updates(init_variables(ours)[1].shared).items()
    }
    kept, lost = (energy_beyond_the_smallest_rank(it, target) for it in (ours, flex))
    assert kept > 2 * lost


def test_the_partitions_end_at_the_different_ranks_of_the_clients():
    assert method(lora_ranks=(8, 2, 8, 4)).client_ranks == (2, 4, 8)
    by_capacity = method(lora_ranks=(10,), capacities=(2.0, 1.0, 0.1, 1.0))
    assert by_capacity.client_ranks == (1, 5, 10)
    by_share = method(lora_ranks=(8, 4, 1), rank_shares=(0.2, 0.3, 0.5))
    assert by_share.client_ranks == (1, 4, 8)


def test_a_term_has_a_product_for_each_partition_that_a_weight_has():
    algorithm = method(lora_ranks=(99, 50, 2))
    shared = init_variables(algorithm)[1].shared
    names = [n for n in terms_of(algorithm, shared)[1].weights if "3.weight" in n]
    assert names == [".part2.3.weight..W", ".part50.3.weight..W"]  # its shorter side is below 50


def terms_of(algorithm, shared):
    return [
        algorithm.transport(client, 3).expand(Upload(upload), shared, COUNTS[client])
        for client, upload in uploads_of(algorithm, shared).items()
    ]


def test_what_travels_is_what_flexlora_sends():
    ours, flex = (
        run_rounds(f"algorithm={name}", *TUNED[1:], *MIXED, "rounds=2")[0][-1]
        for name in ("raflora", "flexlora")
    )
    for channel in ("bytes_up", "bytes_down"):
        assert ours.row[channel] == flex.row[channel] > 0


def test_the_effective_clients_are_the_mean_over_the_partitions():
    algorithm = method(diagnose=True)
    shared = trained_shared(algorithm, 1)
    update = next_update(algorithm, shared, uploads_of(algorithm, shared))
    effective = [14**2 / (25 + 1 + 64), 13**2 / (25 + 64), 1]
    assert update.metrics["effective_clients"] == pytest.approx(sum(effective) / 3)
    without = next_update(algorithm, shared, uploads_of(algorithm, shared, (1, 2)))
    assert without.metrics["effective_clients"] == pytest.approx((9**2 / (1 + 64) + 1) / 2)


@pytest.mark.parametrize("uplink", ["sum", "gather"])
def test_clients_of_different_ranks_give_the_same_bits_on_several_mpi_ranks(uplink):
    overrides = (*TUNED, *MIXED, "rounds=2")
    alone = run_rounds(*overrides)[0]
    for moments in run_rounds(*overrides, f"uplink={uplink}", ranks=3):
        assert all(
            torch.equal(v, b.shared[n])
            for a, b in zip(alone, moments, strict=True)
            for n, v in a.shared.items()
        )


def test_the_update_of_a_run_holds_all_ranks_of_its_clients():
    moments = run_rounds(*TUNED, *MIXED)[0]
    federation = build_tiny(*TUNED, *MIXED).federation
    for round_, (before, after) in enumerate(pairwise(moments)):
        assert not torch.equal(before.shared["3.weight..W"], after.shared["3.weight..W"])
        cohort = federation.cohorts.sample(round_).members
        if any(client % 3 == 0 for client in cohort):
            assert torch.linalg.matrix_rank(after.shared["3.weight..W"]) >= max(RANKS)
