"""Sum-product and product-sum aggregation of LoRA factors, and what their conditions bound.

Identities in float64, by the hooks themselves; the logged conditions on whole runs.
"""

from dataclasses import replace
from math import isnan, nan

import pytest
import torch
from finetuned import gaussian_tensor, init_variables, next_shared, trained_variables
from methods import overrides_for
from runs import NORM, build_tiny, run_rounds, snapshots_equal, trees_equal

from fedlora_mpi.algorithm import Variables
from fedlora_mpi.algorithms.aggregation_broadcast import AggregationBroadcast
from fedlora_mpi.components.lora import conditions
from fedlora_mpi.core.names import factors_by_weight, is_factor

OPERATORS = pytest.mark.parametrize("operator", ["product_sum", "sum_product"])
NAME = "aggregation_broadcast"
TUNED = (*overrides_for(NAME), NORM, "algorithm.lora_ranks=[2]", "algorithm.alpha=2")


def method(operator, **settings):
    return AggregationBroadcast(operator=operator, **{"lora_ranks": (2,), "alpha": 3.0} | settings)


def round_of(algorithm, counts=(1, 1, 1), same=""):
    """(s B_i A_i of each client, s P Q, the new shared variables, those of each client) of a round.

    same: the letter of a factor that all clients share.
    """
    model, initial = init_variables(algorithm)
    rounds = []
    for client in range(len(counts)):
        transport = algorithm.transport(client, len(counts))
        start, end = trained_variables(transport, model, initial.shared, 0, client)
        shared = {
            n: gaussian_tensor(*v.shape, address=n) if is_factor(n, same or "-") else v
            for n, v in end.shared.items()
        }
        rounds.append((start, end._replace(shared=shared)))
    new = next_shared(algorithm, initial.shared, rounds, counts)
    trained = [algorithm.factor_products(end.shared) for _, end in rounds]
    return trained, algorithm.factor_products(new), new, [end.shared for _, end in rounds]


def mean_of(trees):
    return {n: sum(tree[n] for tree in trees) / len(trees) for n in trees[0]}


def square(a, b):
    """||a - b||^2 over all weights."""
    return float(sum((a[n] - b[n]).square().sum() for n in a))


def weak_squares(trained, broadcast):
    """(1/m) sum_i ||P Q - X_i||^2."""
    return sum(square(broadcast, tree) for tree in trained) / len(trained)


def test_sum_product_misses_the_tail_of_the_singular_values_and_nothing_else():
    trained, broadcast, *_ = round_of(method("sum_product"))
    X = mean_of(trained)
    tail = sum(float(torch.linalg.svdvals(x)[2:].square().sum()) for x in X.values())
    assert tail > 0.1
    assert weak_squares(trained, broadcast) - weak_squares(trained, X) == pytest.approx(tail)
    assert square(broadcast, X) == pytest.approx(tail)


def test_product_sum_misses_the_covariance_of_the_factors():
    algorithm = method("product_sum")
    trained, broadcast, new, ends = round_of(algorithm)
    X, A, B = mean_of(trained), factors_by_weight(new, "A"), factors_by_weight(new, "B")
    for n, product in broadcast.items():
        covariance = mean_of([{n: (e[f"{n}..B"] - B[n]) @ (e[f"{n}..A"] - A[n])} for e in ends])[n]
        torch.testing.assert_close(product - X[n], -algorithm.s * covariance)


def test_sum_product_is_never_further_from_the_products_than_product_sum():
    (trained, best, *_), (_, other, *_) = (
        round_of(method(operator)) for operator in ("sum_product", "product_sum")
    )
    assert weak_squares(trained, best) < weak_squares(trained, other)


@OPERATORS
def test_the_product_of_one_client_stays(operator):
    trained, broadcast, *_ = round_of(method(operator), counts=(1, 0, 0))
    assert square(broadcast, trained[0]) < 1e-20


@OPERATORS
@pytest.mark.parametrize("letter", "AB")
def test_both_operators_are_exact_if_one_factor_is_the_same_for_all(operator, letter):
    trained, broadcast, *_ = round_of(method(operator), same=letter)
    assert square(broadcast, mean_of(trained)) < 1e-20


def test_sum_product_of_full_rank_is_exact():
    trained, broadcast, *_ = round_of(method("sum_product", lora_ranks=(99,)))
    assert square(broadcast, mean_of(trained)) < 1e-20


def test_the_largest_entry_of_each_column_of_p_is_positive():
    new = round_of(method("sum_product"))[2]
    for B in factors_by_weight(new, "B").values():
        assert (B.gather(0, B.abs().argmax(0, keepdim=True)) > 0).all()
    for A in factors_by_weight(new, "A").values():
        torch.testing.assert_close(A @ A.T, torch.eye(len(A), dtype=A.dtype))


def test_nothing_is_dead_where_the_mean_of_the_products_is_zero():
    algorithm = method("sum_product")
    model, initial = init_variables(algorithm)
    v = initial._replace(shared={n: w.clone() for n, w in initial.shared.items()})
    new = next_shared(algorithm, initial.shared, [(v, v)] * 3)
    assert all(A.norm(dim=1).min() > 0.9 for A in factors_by_weight(new, "A").values())
    assert not any(B.any() for B in factors_by_weight(new, "B").values())


def test_product_sum_by_samples_is_fedit():
    ours = run_rounds(*TUNED, "algorithm.weights=samples", "rounds=2")[0]
    fedit = run_rounds("algorithm=fedit", *TUNED[1:], "rounds=2")[0]
    assert all(trees_equal(a.shared, b.shared) for a, b in zip(ours, fedit, strict=True))


# The conditions.


def expected_conditions(moments, round_, cohort, s):
    """The sums of unsquared norms over these clients, from what they kept and what arrived."""
    arrived, kept = moments[round_].shared, moments[round_].personal
    products, factors = {}, {n: v for n, v in arrived.items() if is_factor(n)}
    sums = [0.0, 0.0, 0.0]
    for client in cohort:
        own = {n: kept[f".last.{n}"][client] for n in factors}
        products = [
            {n: s * B @ tree[f"{n}..A"] for n, B in factors_by_weight(tree, "B").items()}
            for tree in (factors, own)
        ]
        sums[0] += square(*products) ** 0.5
        for at, letter in ((1, "B"), (2, "A")):
            sums[at] += (
                sum(
                    float((v - own[n]).square().sum())
                    for n, v in factors.items()
                    if is_factor(n, letter)
                )
                ** 0.5
            )
    return sums


@OPERATORS
def test_the_log_has_the_sums_of_unsquared_norms_of_the_round_before(operator):
    overrides = (*TUNED, "algorithm.diagnose=true", f"algorithm.operator={operator}", "rounds=3")
    moments = run_rounds(*overrides)[0]
    cohorts = build_tiny(*overrides).federation.cohorts
    assert isnan(moments[1].row["weak_condition"]) and not moments[1].row["condition_clients"]
    for round_ in (1, 2):
        both = cohorts.sample(round_).members & cohorts.sample(round_ - 1).members
        row = moments[round_ + 1].row
        assert row["condition_clients"] == len(both) > 0
        expected = expected_conditions(moments, round_, both, s=1.0)
        assert [row[n] for n in conditions.FIGURES[1:]] == pytest.approx(expected, rel=1e-5)
        assert min(expected) > 1e-3


def test_the_diagnosis_is_of_the_broadcast_and_changes_no_training():
    common = (*TUNED, "algorithm.operator=sum_product", "rounds=2")
    plain, told = (run_rounds(*common, f"algorithm.diagnose={on}")[0] for on in ("false", "true"))
    assert trees_equal(plain[-1].shared, told[-1].shared)
    assert told[-1].row["bytes_up"] == plain[-1].row["bytes_up"] + 4 * 4 * told[-1].row["clients"]
    assert told[-1].row["lora_bias"] > 1e-4  # s P Q is not X


def test_the_strong_condition_needs_equal_ranks():
    different = run_rounds(
        *TUNED, "algorithm.lora_ranks=[1,2]", "algorithm.diagnose=true", "rounds=2"
    )[0][-1]
    assert different.row["weak_condition"] > 0 and different.row["condition_clients"] > 0
    assert isnan(different.row["strong_condition_A"]) and isnan(different.row["strong_condition_B"])


def test_figures_without_clients_are_not_a_number():
    sums = conditions.distances(
        Variables(
            {"w..A": torch.ones(1, 2), "w..B": torch.ones(3, 1)},
            conditions.no_factors({"w..A": torch.ones(1, 2), "w..B": torch.ones(3, 1)}),
        ),
        lambda tree: {"w": tree["w..B"] @ tree["w..A"]},
        0,
    )
    expected = dict.fromkeys(conditions.FIGURES, nan) | {"condition_clients": 0.0}
    assert conditions.figures(sums, True) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("ranks", [3])
def test_the_conditions_are_the_same_on_several_ranks(ranks):
    overrides = (*TUNED, "algorithm.diagnose=true", "algorithm.operator=sum_product", "rounds=2")
    alone = run_rounds(*overrides)[0]
    for moments in run_rounds(*overrides, ranks=ranks):
        assert all(snapshots_equal(a, b) for a, b in zip(alone, moments, strict=True))


def test_a_client_has_its_own_rank_and_the_scale_of_all():
    client = replace(method("sum_product"), lora_ranks=(4, 2)).transport(1, 2).method
    assert client.lora_ranks == (2,) and client.s == 3.0 / 4
