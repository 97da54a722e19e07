"""HetLoRA: ranks that clients lower by themselves, and a mean weighted by the norms of products."""

import itertools
from dataclasses import replace

import pytest
import small
import torch
from finetuned import (
    COUNTS,
    MIXED,
    RANKS,
    assert_trees_near,
    client_transports,
    float64_trainer,
    gaussian_tensor,
    init_variables,
    next_shared,
    trained_variables,
)
from runs import NORM, assert_near, build_tiny, run_rounds, snapshots_equal, trees_equal
from tiers import thorough_param
from torch.func import grad, vmap

from fedlora_mpi.algorithm import Batch, Variables
from fedlora_mpi.algorithms.fedit import FedIT
from fedlora_mpi.algorithms.hetlora import HetLoRA
from fedlora_mpi.components.lora.factors import norm_of_products, select_components
from fedlora_mpi.components.lowrank import is_factor
from fedlora_mpi.core.tree import tmap

HOW = {"lora_ranks": RANKS, "alpha": 6.0}
CNN = "model.width=4"
MODEL = small.make_model("cnn")
PRUNES = (
    "algorithm=hetlora",
    CNN,
    *MIXED,
    "algorithm.lora_ranks=[8,1,4]",
    "algorithm.lam=1.0",
    "train.weight_decay=0.01",
)
# [out side, in side] of CNN
LAYERS = {"0.weight": (12, 3), "3.weight": (24, 12), "7.weight": (8, 32)}


def ranks_of(moment):
    """r_k of all clients, in the order of their ids."""
    # of each type: client k is of type k mod 3
    rows = [iter(v.tolist()) for v in moment.personal.values()]
    return [int(next(rows[client % len(rows)])) for client in range(7)]


def pair(*rank_and_sides, at=0):
    """{leaf: float64} of one layer: A [r, d_in], B [d_out, r]."""
    r, d_out, d_in = rank_and_sides
    return {
        "w..A": gaussian_tensor(r, d_in, address=f"A{at}"),
        "w..B": gaussian_tensor(d_out, r, address=f"B{at}"),
    }


def of_rank(r, tree):
    return Variables(tree, {".lora_rank.": torch.tensor(float(r), dtype=torch.float64)})


def last_visit(algorithm):
    """What follows the training of a client."""
    return algorithm.local(MODEL, small.TRAIN, 0)[-1].apply


# The mean


def test_the_norm_of_products_is_that_of_all_layers_together():
    _, first = init_variables(HetLoRA(lora_ranks=(4,)), "bn_net")
    factors = {
        n: gaussian_tensor(*v.shape, address=n) for n, v in first.shared.items() if is_factor(n)
    }
    assert {v.shape for n, v in factors.items() if n.endswith(".A")} >= {(4, 9), (3, 3), (4, 15)}
    products = [factors[n[:-1] + "B"] @ A for n, A in factors.items() if n.endswith(".A")]
    direct = torch.cat([p.flatten() for p in products]).norm()
    torch.testing.assert_close(norm_of_products(factors), direct, rtol=1e-12, atol=0)
    assert norm_of_products(tmap(torch.zeros_like, factors)) == 0


def one_round(algorithm, ends_of=lambda ends: ends, counts=COUNTS):
    """(shared before, (start, end) of the clients, shared after), float64."""
    model, first = init_variables(algorithm)
    ends = ends_of(
        [
            trained_variables(c, model, first.shared, 0, address=k)
            for k, c in enumerate(client_transports(algorithm))
        ]
    )
    return first.shared, ends, next_shared(algorithm, first.shared, ends, counts)


def test_factors_are_weighted_by_the_norm_and_the_head_by_samples():
    before, ends, after = one_round(HetLoRA(**HOW))
    products = [
        [e.shared[n[:-1] + "B"] @ A for n, A in e.shared.items() if n.endswith(".A")]
        for _, e in ends
    ]
    norms = torch.stack([torch.cat([p.flatten() for p in client]).norm() for client in products])
    shares = norms / norms.sum()
    assert max(shares) > 1.5 * min(shares)
    for name, value in after.items():
        if is_factor(name):
            mean = torch.zeros_like(value)
            for share, (_, end) in zip(shares, ends, strict=True):
                rows, columns = end.shared[name].shape
                # the others have zeros there, which count
                mean[:rows, :columns] += share * end.shared[name]
        else:
            mean = sum(
                n * end.shared[name] for n, (_, end) in zip(COUNTS, ends, strict=True)
            ) / sum(COUNTS)
        torch.testing.assert_close(value, mean, rtol=1e-12, atol=1e-12, msg=name)


def test_clients_of_equal_ranks_and_norms_and_samples_are_those_of_fedit():
    def alike(ends):
        def scaled(tree):
            return tree | {
                n: v / norm_of_products(tree) for n, v in tree.items() if n.endswith(".B")
            }

        return [(start, end._replace(shared=scaled(end.shared))) for start, end in ends]

    how = {"lora_ranks": (3,), "alpha": 6.0}
    before, ends, after = one_round(HetLoRA(**how), alike, counts=(4, 4, 4))
    assert_trees_near(after, next_shared(FedIT(**how), before, ends, counts=(4, 4, 4)))
    _, ends, other = one_round(HetLoRA(**how), counts=(4, 4, 4))
    assert (
        other["7.weight..A"]
        - next_shared(FedIT(**how), before, ends, counts=(4, 4, 4))["7.weight..A"]
    ).norm() > 1e-3


def test_clients_without_any_product_count_alike():
    def still(ends):
        def zero(tree):
            return tree | {n: 0 * v for n, v in tree.items() if n.endswith(".B")}

        return [(start, end._replace(shared=zero(end.shared))) for start, end in ends]

    _, ends, after = one_round(HetLoRA(lora_ranks=(3,)), still)
    for name in (n for n in after if n.endswith(".A")):
        torch.testing.assert_close(
            after[name], sum(end.shared[name] for _, end in ends) / 3, rtol=1e-9, atol=1e-9
        )
    assert all((v == 0).all() for n, v in after.items() if n.endswith(".B"))


def test_a_client_without_a_product_counts_for_nothing_beside_others():
    def first_still(ends):
        (start, end), *others = ends
        return [
            (
                start,
                end._replace(
                    shared=end.shared
                    | {n: 0 * v for n, v in end.shared.items() if n.endswith(".B")}
                ),
            ),
            *others,
        ]

    _, ends, after = one_round(HetLoRA(**HOW), first_still)
    # it alone has the third
    assert (after["7.weight..A"][2].norm() / ends[0][1].shared["7.weight..A"][2].norm()) < 1e-6


def test_the_first_components_of_padded_factors_are_the_factors():
    algorithm = HetLoRA(**HOW)
    before, ends, _ = one_round(algorithm)
    for client, (start, end) in zip(client_transports(algorithm), ends, strict=True):
        sent = client.expand(client.method.upload(start, end, 0), before, 1).mean
        term = {n: v for n, v in sent.items() if is_factor(n)}
        assert {n: v.shape for n, v in term.items()} == {
            n: v.shape for n, v in before.items() if is_factor(n)
        }
        assert trees_equal(client.method.truncate_rank(term), {n: end.shared[n] for n in term})


# The penalty


def test_the_penalty_has_the_gradient_of_its_formula():
    made = float64_trainer(HetLoRA(lora_ranks=(6,), gamma=0.5, lam=0.7))
    model, (_, first) = made.model, init_variables(made.algorithm)
    shared = {
        n: gaussian_tensor(*v.shape, address=n) if is_factor(n) else v
        for n, v in first.shared.items()
    }
    r, low = 5, 2  # floor(0.5 * 5)
    v = of_rank(r, select_components(shared, 0, r))
    data = made.feed.unshuffled_batch([0], all_samples=True)
    batch = Batch(data.x[0], data.y[0], None, data.key, data.counts[0])
    leaves = {n: w.clone().requires_grad_() for n, w in v.shared.items()}
    plain, whole = (
        dict(
            zip(
                leaves,
                torch.autograd.grad(
                    loss(v._replace(shared=leaves), v, batch), list(leaves.values())
                ),
                strict=True,
            )
        )
        for loss in (super(HetLoRA, made.algorithm).loss(model), made.algorithm.loss(model))
    )
    for name in (n for n in shared if n.endswith(".A")):
        A, B = v.shared[name][low:r], v.shared[f"{name[:-1]}B"][:, low:r]
        of_a, of_b = torch.zeros_like(shared[name]), torch.zeros_like(shared[f"{name[:-1]}B"])
        of_a[low:r], of_b[:, low:r] = B.norm() * A / A.norm(), A.norm() * B / B.norm()
        for leaf, expected in ((name, of_a), (f"{name[:-1]}B", of_b)):
            torch.testing.assert_close(
                whole[leaf] - plain[leaf], 0.7 * expected, rtol=1e-9, atol=1e-10, msg=leaf
            )
    for name in ("9.weight", "9.bias"):
        assert torch.equal(whole[name], plain[name])


@pytest.mark.parametrize("zero", ["A", "B", "AB"])
@pytest.mark.parametrize("stacked", [False, True], ids=["loop", "stack"])
def test_where_a_norm_is_zero_the_gradient_is_finite(zero, stacked):
    algorithm = HetLoRA(gamma=0.5)
    tree = {n: 0 * v if n[-1] in zero else v for n, v in pair(4, 3, 5).items()}
    gradient = grad(lambda t, r: algorithm.tail_norm(Variables(t, {".lora_rank.": r})))
    rank = torch.tensor(4.0)
    found = gradient(tree, rank)
    if stacked:
        found = {
            n: v[0] for n, v in vmap(gradient)(tmap(lambda v: v[None], tree), rank[None]).items()
        }
    assert all(torch.isfinite(v).all() for v in found.values())
    other = {"A": "w..B", "B": "w..A"}.get(zero)
    assert all((v == 0).all() for n, v in found.items() if n == other or zero == "AB")


# The ranks


@pytest.mark.parametrize(
    "gamma, least, ranks",
    [
        (0.99, 1, {1: 1, 2: 1, 5: 4, 50: 49, 100: 99, 200: 198}),
        (0.5, 2, {1: 1, 2: 2, 3: 2, 5: 2, 6: 3}),  # never up to the minimum
        (0.29, 1, {100: 29}),  # 0.29 * 100 is a little less
        (1.0, 1, {1: 1, 7: 7}),
    ],
)
def test_the_next_rank_is_that_share_rounded_down_within_its_bounds(gamma, least, ranks):
    lower = HetLoRA(gamma=gamma, lora_rank_min=least).pruned_rank
    for dtype in (torch.float32, torch.float64):
        given = torch.tensor([float(r) for r in ranks], dtype=dtype)
        assert lower(given).tolist() == list(ranks.values()) and lower(given).dtype == dtype


def test_a_client_prunes_when_its_tail_has_become_smaller_and_then_alone():
    algorithm = HetLoRA(gamma=0.5)
    start = pair(4, 3, 5)
    for factor, kept in ((0.9, 2), (1.0, 4), (1.1, 4)):
        end = {n: v.clone() for n, v in start.items()}
        end["w..A"][2:4] *= factor
        end["w..A"][:2] /= factor  # what is not the tail has no say
        done = last_visit(algorithm)(of_rank(4, start), of_rank(4, end), None)
        assert done.personal[".lora_rank."] == kept
        assert trees_equal(done.shared, select_components(end, 0, kept))
    assert (select_components(start, 0, 2)["w..A"][2:] == 0).all() and (
        select_components(start, 0, 2)["w..B"][:, 2:] == 0
    ).all()
    assert torch.equal(select_components(start, 0, 2)["w..A"][:2], start["w..A"][:2])
    assert torch.equal(select_components(start, 0, 2)["w..B"][:, :2], start["w..B"][:, :2])


def test_clients_of_a_stack_prune_each_for_itself():
    algorithm, starts = HetLoRA(gamma=0.5), [pair(4, 3, 5, at=k) for k in range(3)]
    ends = [
        tmap(lambda v, f=f: f * v, tree) for f, tree in zip((0.9, 1.1, 0.9), starts, strict=True)
    ]

    def stack(trees):
        return {n: torch.stack([t[n] for t in trees]) for n in trees[0]}

    ranks = torch.tensor([4.0, 4.0, 3.0], dtype=torch.float64)

    def finish(s, e, r):
        variables = (Variables(tree, {".lora_rank.": r}) for tree in (s, e))
        return last_visit(algorithm)(*variables, None)[:2]

    shared, personal = vmap(finish)(stack(starts), stack(ends), ranks)
    assert personal[".lora_rank."].tolist() == [2, 4, 1]
    for row, (end, r) in enumerate(zip(ends, (2, 4, 1), strict=True)):
        assert trees_equal({n: v[row] for n, v in shared.items()}, select_components(end, 0, r))


@pytest.mark.parametrize("path", ["stack", thorough_param("loop")])
def test_ranks_never_rise_nor_fall_below_the_minimum_and_pruned_components_stay_zero(path):
    how = (*PRUNES, "algorithm.lora_rank_min=2", "rounds=6", f"engine.path={path}")
    parts, moments = build_tiny(*how), run_rounds(*how)[0]
    series = [ranks_of(moment) for moment in moments]
    assert series[0] == [8, 1, 4, 8, 1, 4, 8]
    for before, after in itertools.pairwise(series):
        assert all(0 < a <= b for a, b in zip(after, before, strict=True))
    least = [min(ranks[client] for ranks in series) for client in range(7)]
    assert least[1] == least[4] == 1 and min(least[0], least[2], least[3], least[5], least[6]) >= 2
    assert sum(a < b for a, b in zip(series[-1], series[0], strict=True)) >= 3
    for number, client_type in enumerate(parts.federation.clients.types):
        members = parts.federation.placement.local_clients_by_type[number]
        names, trainer = client_type.initial.personal, client_type.trainer
        rows = {n: moments[-1].personal[client_type.prefix + n] for n in names}
        for row, done in enumerate(trainer.train(members, moments[-1].shared, rows, 6)):
            r = int(rows[".lora_rank."][row])  # before the round
            for v in (done.start, done.end):
                assert trees_equal(v.shared, select_components(v.shared, 0, r))
            trained = select_components(done.end.shared, 0, int(done.end.personal[".lora_rank."]))
            assert trees_equal(done.end.shared, trained)
            assert all((v != 0).any() for n, v in trained.items() if is_factor(n))


def test_a_pruned_client_sends_its_components_its_norm_and_the_head():
    parts, moments = build_tiny(*PRUNES, "rounds=6"), run_rounds(*PRUNES, "rounds=6")[0]

    def size(r):
        return sum(min(r, *sides) * sum(sides) for sides in LAYERS.values()) + 4 * 8 + 4

    for round_ in range(6):
        cohort = parts.federation.cohorts.sample(round_).members
        ranks = ranks_of(moments[round_ + 1])
        row = moments[round_ + 1].row
        assert row["bytes_up"] == 4 * sum(size(ranks[k]) + 1 for k in cohort)
        assert row["bytes_down"] == 4 * sum(size((8, 1, 4)[k % 3]) for k in cohort)
    assert any(ranks[k] < (8, 1, 4)[k % 3] for k in cohort)


def test_without_a_tail_there_is_no_penalty_and_ranks_stay():
    common = "algorithm=hetlora", NORM, *MIXED, "algorithm.gamma=1.0"
    one, other = (run_rounds(*common, f"algorithm.lam={lam}")[0] for lam in (0.0, 1.0))
    assert all(snapshots_equal(a, b) for a, b in zip(one, other, strict=True))
    assert ranks_of(one[-1]) == ranks_of(one[0]) == [RANKS[k % 3] for k in range(7)]


def test_a_penalty_lowers_more_ranks_than_none():
    with_it, without = (
        ranks_of(run_rounds(*PRUNES, f"algorithm.lam={lam}", "rounds=6")[0][-1])
        for lam in (1.0, 0.0)
    )
    assert sum(with_it) < sum(without)


def test_a_stack_with_pruned_clients_equals_the_loop():
    stack, loop = (run_rounds(*PRUNES, f"engine.path={path}")[0][-1] for path in ("stack", "loop"))
    assert ranks_of(stack) == ranks_of(loop) != [(8, 1, 4)[k % 3] for k in range(7)]
    assert_near(stack.shared, loop.shared, atol=1e-4)


def test_a_rank_is_at_most_the_components_of_the_largest_layer():
    model, first = init_variables(HetLoRA(lora_ranks=(50,)))
    assert (
        first.personal[".lora_rank."]
        == 9
        == max(len(v) for n, v in first.shared.items() if n.endswith(".A"))
    )


# The client's own model


def test_the_own_model_has_the_present_components_and_the_servers_all():
    algorithm = HetLoRA(lora_ranks=(3,), alpha=6.0)
    model, first = init_variables(algorithm)
    shared = {
        n: gaussian_tensor(*v.shape, address=n) if is_factor(n) else v
        for n, v in first.shared.items()
    }
    v = of_rank(1, shared)
    one = FedIT(lora_ranks=(1,), alpha=2.0).truncate_rank(shared)  # the same s
    assert_trees_near(
        algorithm.client_model(model, v),
        FedIT(lora_ranks=(1,), alpha=2.0).client_model(model, Variables(one, {})),
    )
    server = replace(algorithm, judged="server")
    assert trees_equal(
        server.client_model(model, v),
        FedIT(lora_ranks=(3,), alpha=6.0).client_model(model, Variables(shared, {})),
    )
    factors, full = algorithm.adapter(model, v)
    assert all(
        (A[1:] == 0).all() and (B[:, 1:] == 0).all() and s == 2.0 for A, B, s in factors.values()
    )
    assert full.keys() == {"9.weight", "9.bias"}


# On ranks


@pytest.mark.parametrize("ranks", [thorough_param(2), 3])
def test_gathered_uploads_give_the_bits_of_the_sum(ranks):
    summed, gathered = (
        run_rounds(*PRUNES, f"uplink={how}", ranks=ranks) for how in ("sum", "gather")
    )
    for a, b in zip(summed, gathered, strict=True):
        assert all(snapshots_equal(x, y) for x, y in zip(a, b, strict=True))
