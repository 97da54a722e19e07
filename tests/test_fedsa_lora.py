"""FedSA-LoRA: A is averaged, B stays on its client."""

import pytest
import torch
from aggregates import svd
from finetuned import (
    COUNTS,
    MIXED,
    RANKS,
    aggregate_terms,
    assert_trees_near,
    client_transports,
    gaussian_tensor,
    init_variables,
)
from methods import overrides_for
from runs import build_tiny, run_rounds, trees_equal

from fedlora_mpi.algorithm import Upload, Variables
from fedlora_mpi.algorithms.fedsa_lora import FedSALoRA
from fedlora_mpi.components.lowrank import as_weight
from fedlora_mpi.core.names import is_factor

TUNED = (*overrides_for("fedsa_lora"), "model.width=4")
# [out side, in side] of the decomposed weights
LAYERS = {"0.weight": (12, 3), "3.weight": (24, 12), "7.weight": (8, 32)}


def method(**settings):
    return FedSALoRA(**{"lora_ranks": RANKS, "alpha": 3.0} | settings)


def next_round(algorithm, clients=(0, 1, 2)):
    """(shared before, {client: its upload}, shared after) of a round of these clients, float64."""
    _, initial = init_variables(algorithm)
    uploads, terms = {}, []
    for client in clients:
        transport = client_transports(algorithm)[client]
        end = {
            n: gaussian_tensor(*v.shape, address=f"{client} {n}")
            for n, v in transport.download(initial.shared).items()
        }
        uploads[client] = transport.method.upload(initial, Variables(end, {}), 0).mean
        terms.append(transport.expand(Upload(uploads[client]), initial.shared, COUNTS[client]))
    counts = [COUNTS[client] for client in clients]
    aggregate = aggregate_terms(terms, counts, initial.shared)
    after = algorithm.server_update({}, initial.shared, aggregate, svd).shared
    return initial.shared, uploads, after


@pytest.mark.parametrize("clients", [(0, 1, 2), (1, 2), (1,)], ids=str)
def test_a_row_of_a_is_the_mean_over_the_clients_of_the_cohort_that_have_it(clients):
    before, uploads, after = next_round(method(), clients)
    assert before.keys() == after.keys() and all(is_factor(n, "A") for n in after)
    expected = {}
    for name, A in before.items():
        rows = []
        for at, row in enumerate(A):
            holders = [client for client in clients if RANKS[client] > at]
            total = sum(COUNTS[client] for client in holders)
            mean = sum(COUNTS[client] * uploads[client][name][at] for client in holders)
            rows.append(mean / total if holders else row)
        expected[name] = torch.stack(rows)
    assert_trees_near(after, expected)


def test_leaves_trained_in_full_are_averaged_by_samples_unless_they_are_personal():
    _, uploads, after = next_round(method(personal_full=False))
    mean = sum(COUNTS[client] * upload["9.bias"] for client, upload in uploads.items()) / 14
    torch.testing.assert_close(after["9.bias"], mean)
    personal = init_variables(method(personal_full=False))[1].personal
    assert all(is_factor(n, "B") for n in personal)
    assert {"9.bias", "9.weight"} < init_variables(method())[1].personal.keys()


def test_one_client_is_fedit_to_the_bit():
    single = ("data.partition.clients=1", "participation=1.0", "rounds=3")
    ours, fedit = (
        run_rounds(f"algorithm={name}", *TUNED[1:], *single)[0] for name in ("fedsa_lora", "fedit")
    )
    for a, b in zip(ours, fedit, strict=True):
        assert trees_equal(a.shared | {n: v[0] for n, v in a.personal.items()}, b.shared)


def test_the_first_mean_of_a_is_that_of_fedit_with_the_bits_of_one_rank():
    """All clients start from B = 0 and one head, so the first round trains the same."""
    ours, fedit = (
        run_rounds(f"algorithm={name}", *TUNED[1:], "rounds=1")[0][-1]
        for name in ("fedsa_lora", "fedit")
    )
    assert all(torch.equal(v, fedit.shared[n]) for n, v in ours.shared.items())


def test_a_client_sends_and_receives_its_rows_of_a_alone():
    federation = build_tiny(*TUNED, *MIXED).federation
    sides = sum(side for _, side in LAYERS.values())
    for round_, moment in enumerate(run_rounds(*TUNED, *MIXED)[0][1:]):
        ranks = [RANKS[client % 3] for client in federation.cohorts.sample(round_).members]
        assert moment.row["bytes_up"] == moment.row["bytes_down"] == 4 * sides * sum(ranks)


def test_absent_clients_keep_b_and_each_client_has_its_rank():
    moments = run_rounds(*TUNED, *MIXED, "rounds=1")[0]
    cohort = build_tiny(*TUNED, *MIXED).federation.cohorts.sample(0).members
    for kind, rank in enumerate(RANKS):
        clients = range(kind, 7, 3)
        for name, (out, in_side) in LAYERS.items():
            before, after = (m.personal[f"kind-{kind}/{name}..B"] for m in moments)
            assert after.shape == (len(clients), out, min(rank, in_side))
            assert not before.any()
            moved = {client for client, B in zip(clients, after, strict=True) if B.any()}
            assert moved == cohort & {*clients}


def test_the_model_of_a_client_has_its_own_b_and_the_servers_a():
    algorithm = method(lora_ranks=(2,), scale="root")
    model, v = init_variables(algorithm)
    v = v._replace(
        personal={n: gaussian_tensor(*w.shape, address=n) for n, w in v.personal.items()}
    )
    pairs, full = algorithm.adapter(model, v)
    weights = algorithm.client_model(model, v)
    assert full.keys() == {"9.weight", "9.bias"}
    for name, (A, B, s) in pairs.items():
        assert s == pytest.approx(3 / 2**0.5) and A is v.shared[f"{name}..A"]
        update = as_weight(s * B @ A, model.all_leaves[name])
        torch.testing.assert_close(weights[name], model.initial[name] + update)
    assert torch.equal(weights["9.bias"], v.personal["9.bias"])


def test_weight_decay_moves_a_and_b_but_no_frozen_weight():
    moments = run_rounds(*TUNED, "train.weight_decay=0.1", "rounds=1")[0]
    assert {
        n for n in moments[0].shared if torch.equal(moments[0].shared[n], moments[1].shared[n])
    } == set()


def test_personal_norm_layers_keep_their_statistics_on_the_client():
    algorithm = method(full=("head", "norm"), lora_ranks=(2,))
    model, v = init_variables(algorithm, "bn_net")
    stats = {n for n in v.personal if model.role(n) == "stats"}
    assert stats and not stats & v.shared.keys()
    assert all(is_factor(n, "A") for n in v.shared)


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


@pytest.mark.parametrize("key", ["judged=server", "diagnose=true"])
def test_the_server_has_no_model_to_judge_or_to_diagnose(key):
    with pytest.raises(ValueError, match="fedsa_lora has no such field") as error:
        build_tiny.__wrapped__(*TUNED, f"algorithm.{key}")
    assert "\n" not in str(error.value)
