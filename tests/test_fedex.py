"""Exact means of LoRA: FedEx-LoRA, FLoRA and Fed-TaLoRA. Their identities in float64, by the hooks
themselves.
"""

from itertools import pairwise

import pytest
import torch
from aggregates import svd
from finetuned import aggregate_terms, start_variables
from runs import NORM, TINY, build_tiny, run_rounds, tiny_config, trees_equal
from small import CLASSES, make_model
from tiers import thorough_param

from fedlora_mpi.algorithm import Update, Variables
from fedlora_mpi.algorithms.fed_talora import FedTaLoRA
from fedlora_mpi.algorithms.fedex_lora import FedExLoRA
from fedlora_mpi.algorithms.fedit import FedIT
from fedlora_mpi.algorithms.flora import FLoRA
from fedlora_mpi.components.lora import dense_updates
from fedlora_mpi.core.batch import Batch
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.tree import numel
from fedlora_mpi.core.units import format_bytes
from fedlora_mpi.plan import plan

# convolutions of 12 x 9 and 24 x 12, a Linear of 5 x 8, a head of 6 x 5
NET = make_model("wide_cnn")
HEAD = tuple(n for n in NET.leaves if NET.role(n) == "head")
COUNTS = (7, 1, 3)
EQUAL, MIXED = (2,), (1, 3, 2)
TRAINED = ("train.lr=0.02", "algorithm.alpha=4")  # what all of them train well with
NAMES = pytest.mark.parametrize(
    "name", ["fedex_lora", thorough_param("fed_talora"), thorough_param("flora")]
)
EXACT = pytest.mark.parametrize("cls", [FedExLoRA, FedTaLoRA, FLoRA])
CALIBRATED = pytest.mark.parametrize("cls", [FedExLoRA, FedTaLoRA])
RANKS = pytest.mark.parametrize("ranks", [EQUAL, MIXED])


def numbers(shape, *at):
    """Normal numbers, float64."""
    return torch.randn(shape, generator=rng(1, "fedex", *at), dtype=torch.float64)


def beginning(algorithm):
    """The server's shared variables before round 1, float64."""
    return {n: v.double() for n, v in algorithm.init(NET, rng(1, "init")).shared.items()}


def everything(classes=CLASSES):
    """A client's data: as far as a visit reads them, with samples of the first ``classes``."""
    counts = (torch.arange(CLASSES) < classes).double()
    return Batch(torch.zeros(1), torch.zeros(1), None, torch.tensor(0), counts)


def trained(algorithm, shared, client, counts=COUNTS, data=None):
    """(transport, start, end) of a client whose training has added ``numbers`` to everything that
    it trains.
    """
    transport = algorithm.transport(client, len(counts))
    received = Variables(transport.download(shared), {})
    start = start_variables(transport.method, NET, received, data=data or everything())
    moves = transport.method.trained_leaves(NET)
    end = {n: v + numbers(v.shape, n, client) if moves(n) else v for n, v in start.shared.items()}
    return transport, start, Variables(end, {})


def update_of(
    algorithm, shared, counts=COUNTS, clients=None, change=None, held=None
) -> tuple[list, Update]:
    """(the clients' shared variables after training, the server's update).

    change: a client's end -> its end; held: client k has the first ``held[k]`` classes.
    """
    ends, terms = [], []
    clients = range(len(counts)) if clients is None else clients
    for client in clients:
        data = everything(held[client]) if held else None
        transport, start, end = trained(algorithm, shared, client, counts, data)
        end = change(client, end) if change else end
        upload = transport.method.upload(start, end, 0)
        terms.append(transport.expand(upload, shared, counts[client]))
        ends.append(end.shared)
    aggregate = aggregate_terms(terms, [counts[client] for client in clients], shared)
    return ends, algorithm.server_update({}, shared, aggregate, svd)


def round_of(algorithm, shared, **how):
    """(the clients' shared variables after training, the server's next ones), see ``update_of``."""
    ends, update = update_of(algorithm, shared, **how)
    return ends, update.shared


def client_method(algorithm, client):
    """The method as one of three clients has it."""
    return algorithm.transport(client, 3).method


def averaged(trees, counts=COUNTS):
    return {
        n: sum(k * tree[n] for k, tree in zip(counts, trees, strict=True)) / sum(counts)
        for n in trees[0]
    }


def assert_near(a, b, atol=1e-12):
    assert a.keys() == b.keys() and a
    for name, value in a.items():
        torch.testing.assert_close(
            value, b[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def minus(a, b):
    return {n: a[n] - b[n] for n in a}


# What all three have in common: the update is the mean of what was trained


@EXACT
@RANKS
def test_the_next_update_is_the_mean_of_what_was_trained(cls, ranks):
    algorithm = cls(lora_ranks=ranks)
    shared = beginning(algorithm)
    for _ in range(3):  # W is not zero after the first
        before, (ends, shared) = shared, round_of(algorithm, shared)
        W = dense_updates(before)
        products = averaged(
            [client_method(algorithm, k).factor_products(end) for k, end in enumerate(ends)]
        )
        assert_near(algorithm.delta(shared), {n: W[n] + p for n, p in products.items()})
        assert_near(algorithm.delta(shared), averaged([algorithm.delta(end) for end in ends]))
        # so a transposed one would not fit
        assert all(shared[f"{n}..W"].shape[0] != shared[f"{n}..W"].shape[1] for n in W)


def test_the_mean_of_fedit_is_another_one():
    algorithm = FedIT(lora_ranks=EQUAL)
    _, shared = round_of(algorithm, beginning(algorithm))
    ends, shared = round_of(algorithm, shared)
    apart = minus(algorithm.delta(shared), averaged([algorithm.delta(end) for end in ends]))
    assert all(v.norm() > 1 for v in apart.values())


@EXACT
def test_what_is_trained_in_full_is_averaged_by_samples(cls):
    algorithm = cls(lora_ranks=MIXED)
    ends, shared = round_of(algorithm, beginning(algorithm))
    heads = [{n: v for n, v in end.items() if NET.role(n) == "head"} for end in ends]
    assert_near({n: shared[n] for n in heads[0]}, averaged(heads))


@EXACT
@RANKS
def test_the_order_of_the_clients_changes_nothing(cls, ranks):
    algorithm = cls(lora_ranks=ranks)
    one, other = (
        round_of(algorithm, beginning(algorithm), clients=order)[1]
        for order in ((0, 1, 2), (2, 0, 1))
    )
    assert_near(one, other)


@EXACT
def test_a_client_trains_factors_and_head_on_a_frozen_W(cls):
    algorithm = cls(lora_ranks=EQUAL)
    _, shared = round_of(algorithm, beginning(algorithm))
    transport, start, end = trained(algorithm, shared, 0)
    own = transport.method
    factors = {f"{n}..{letter}" for n in dense_updates(shared) for letter in "AB"}
    assert set(filter(own.trained_leaves(NET), start.shared)) == factors.union(HEAD)
    weights = own.client_model(NET, end)
    for name, W in dense_updates(shared).items():
        update = W + own.s * end.shared[f"{name}..B"] @ end.shared[f"{name}..A"]
        torch.testing.assert_close(
            weights[name], NET.initial[name] + update.view(NET.leaves[name].shape)
        )
    assert not any(n.endswith(".W") for n in own.upload(start, end, 0).message)


@NAMES
def test_a_diagnosis_finds_no_bias_where_fedit_has_one(name):
    def told(name):
        moments = run_rounds(f"algorithm={name}", NORM, "algorithm.diagnose=true", "rounds=3")[0][
            1:
        ]
        return [m.row[number] for m in moments for number in ("lora_bias", "lora_update_bias")]

    assert max(told(name)) < 1e-5 and min(told("fedit")) > 1e-2


@NAMES
def test_uploads_that_travel_as_they_are_give_the_same_bits(name):
    common = (f"algorithm={name}", *TRAINED, "algorithm.lora_ranks=[1,3,2]", "rounds=3")
    one = run_rounds(*common, "uplink=sum")[0]
    for ranks in (1, 3):
        other = run_rounds(*common, "uplink=gather", ranks=ranks)[0]
        assert all(trees_equal(a.shared, b.shared) for a, b in zip(one, other, strict=True))


# FedEx-LoRA


def residual(algorithm, shared, **how):
    """{weight: R} of a round, and the clients' ends."""
    ends, after = round_of(algorithm, shared, **how)
    return minus(dense_updates(after), dense_updates(shared)), ends


@CALIBRATED
@RANKS
def test_the_residual_is_the_covariance_of_the_factors(cls, ranks):
    algorithm = cls(lora_ranks=ranks)
    _, shared = round_of(algorithm, beginning(algorithm))
    R, ends = residual(algorithm, shared)
    for name, found in R.items():
        wide = {n: v for n, v in shared.items() if n.startswith(name)}
        padded = [
            FedIT(lora_ranks=ranks).mean_terms({n: end[n] for n in wide if n[-1] in "AB"}, shared)
            for end in ends
        ]
        mean = averaged(padded)
        A, B = mean[f"{name}..A"], mean[f"{name}..B"]
        terms = [(p[f"{name}..B"] - B) @ (p[f"{name}..A"] - A) for p in padded]
        expected = (
            sum(k * term for k, term in zip(COUNTS, terms, strict=True)) / sum(COUNTS) * algorithm.s
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@CALIBRATED
def test_the_factors_are_those_of_fedit(cls):
    algorithm, plain = cls(lora_ranks=MIXED), FedIT(lora_ranks=MIXED)
    _, shared = round_of(algorithm, beginning(algorithm))
    _, other = round_of(plain, beginning(plain))
    assert_near({n: shared[n] for n in other}, other)


def all_as_the_first(part):
    """Every client ends with those leaves of client 0 whose names end in ``part``."""

    def change(client, end):
        leaves = {
            n: v + numbers(v.shape, n, 0) - numbers(v.shape, n, client)
            for n, v in end.shared.items()
            if n.endswith(part)
        }
        return Variables(end.shared | leaves, {})

    return change


@CALIBRATED
@pytest.mark.parametrize(
    "how",
    [{"clients": (1,)}, *({"change": all_as_the_first(part)} for part in ("A", "B", ("A", "B")))],
    ids=["one client", "equal A", "equal B", "identical clients"],
)
def test_there_is_no_residual_of(cls, how):
    algorithm = cls(lora_ranks=EQUAL)
    _, shared = round_of(algorithm, beginning(algorithm))
    R, _ = residual(algorithm, shared, **how)
    assert all(v.abs().max() < 1e-12 for v in R.values())


@CALIBRATED
@pytest.mark.parametrize("ranks", [(1,), (2,), MIXED])
def test_the_residual_of_k_clients_has_at_most_rank_k_minus_1_times_r(cls, ranks):
    algorithm = cls(lora_ranks=ranks)
    R, _ = residual(algorithm, round_of(algorithm, beginning(algorithm))[1])
    most = (len(COUNTS) - 1) * max(ranks)
    found = {n: torch.linalg.matrix_rank(v).item() for n, v in R.items()}
    assert all(rank <= most for rank in found.values())
    if len(ranks) == 1:
        assert max(found.values()) == most  # and it has it


@CALIBRATED
def test_a_client_of_a_lower_rank_gets_the_first_components_and_all_of_W(cls):
    algorithm = cls(lora_ranks=MIXED)
    _, shared = round_of(algorithm, beginning(algorithm))
    for client, rank in enumerate(MIXED):
        got = algorithm.transport(client, 3).download(shared)
        for name, W in dense_updates(shared).items():
            assert torch.equal(got[f"{name}..A"], shared[f"{name}..A"][:rank])
            assert torch.equal(got[f"{name}..B"], shared[f"{name}..B"][:, :rank])
            assert torch.equal(got[f"{name}..W"], W)


def test_with_one_client_a_round_fedex_is_fedit():
    common = ("participation=0.15", *TRAINED)  # int(0.15 * 7) = 1
    fedex, fedit = (run_rounds(f"algorithm={name}", *common)[0] for name in ("fedex_lora", "fedit"))
    assert fedit[-1].row["clients"] == 1
    for a, b in zip(fedex[1:], fedit[1:], strict=True):
        assert_near({n: a.shared[n] for n in b.shared}, b.shared, atol=1e-5)
        assert all(W.abs().max() < 1e-6 for W in dense_updates(a.shared).values())


@pytest.mark.parametrize("network", [NORM, thorough_param("model.width=4")], ids=["norm", "cnn"])
@pytest.mark.parametrize("downlink", ["dense", "factored"])
@pytest.mark.parametrize("participation, cohort", [("0.6", 4), thorough_param("0.15", 1)])
def test_fedex_counts_factors_head_and_the_last_residual(network, downlink, participation, cohort):
    common = (network, *TRAINED, f"algorithm.downlink={downlink}", f"participation={participation}")
    common = (
        "algorithm=fedex_lora",
        *common,
        "algorithm.lora_ranks=[1,2]",
        "algorithm.full=[head,norm]",
    )
    federation = build_tiny(*common).federation
    first = federation.clients.types[0]
    shared, net = first.initial.shared, first.trainer.model
    full = sum(
        numel({n: v}) for n, v in net.initial.items() if net.role(n) in ("head", "norm", "stats")
    )
    sides = [W.shape for W in dense_updates(shared).values()]
    R = {
        "dense": sum(a * b for a, b in sides),
        "factored": (cohort - 1) * 2 * sum(a + b for a, b in sides),
    }[downlink]
    for round_, moment in enumerate(run_rounds(*common)[0][1:]):
        ranks = [1 + client % 2 for client in federation.cohorts.sample(round_).members]
        assert moment.row["clients"] == len(ranks) == cohort
        up = sum(full + sum(min(r, a, b) * (a + b) for a, b in sides) for r in ranks)
        assert moment.row["bytes_up"] == 4 * up
        assert moment.row["bytes_down"] == 4 * (up + (cohort * R if round_ else 0))


@pytest.mark.parametrize(
    "line",
    [
        "fedex_lora",
        thorough_param("fedex_lora downlink=factored"),
        "flora",
        thorough_param("fed_talora"),
    ],
)
def test_what_a_plan_says_of_a_cohort_is_what_its_rounds_count(line, unmeasured):
    name, *more = line.split()
    common = (
        f"algorithm={name}",
        *TRAINED,
        *(f"algorithm.{setting}" for setting in more),
        "participation=1.0",
    )
    row = run_rounds(*common)[0][-1].row
    assert (
        f"7 of 7 clients: {format_bytes(4 * 7 * most_up(common))} up, {format_bytes(row['bytes_down'])} down"
        in plan(tiny_config(*common), str(TINY), 1)
    )


def most_up(common):
    """Numbers that a client sends that has all classes."""
    upload = build_tiny(*common).federation.clients.types[0].untrained_upload
    return numel({n: v for n, v in upload.message.items() if not n.startswith(".own.")})


# FLoRA


def stacks(ends, name, p_on_A, p_on_B):
    """B A of the clients' stacked factors, each with its p_k where it is said to be."""
    p = [k / sum(COUNTS) for k in COUNTS]
    A = torch.cat([p[k] ** p_on_A * end[f"{name}..A"] for k, end in enumerate(ends)])
    B = torch.cat([p[k] ** p_on_B * end[f"{name}..B"] for k, end in enumerate(ends)], 1)
    return B @ A


@RANKS
def test_flora_adds_the_product_of_the_stacks_with_p_on_one_of_them(ranks):
    algorithm = FLoRA(lora_ranks=ranks, alpha=5.0)
    shared = beginning(algorithm)
    for _ in range(2):
        before, (ends, shared) = shared, round_of(algorithm, shared)
        for name, W in dense_updates(shared).items():
            added = W - before[f"{name}..W"]
            torch.testing.assert_close(
                added, 5 / max(ranks) * stacks(ends, name, 1, 0), rtol=0, atol=1e-12
            )
            torch.testing.assert_close(
                added, 5 / max(ranks) * stacks(ends, name, 0, 1), rtol=0, atol=1e-12
            )
            # p^2
            assert (added - 5 / max(ranks) * stacks(ends, name, 1, 1)).norm() > 0.1 * added.norm()


@RANKS
def test_flora_merges_what_a_client_alone_has_trained(ranks):
    algorithm = FLoRA(lora_ranks=ranks)
    (end,), shared = round_of(algorithm, beginning(algorithm), clients=(1,))
    assert_near(dense_updates(shared), client_method(algorithm, 1).factor_products(end))


def test_flora_has_one_scale_for_all_ranks():
    algorithm = FLoRA(lora_ranks=MIXED)
    assert {client_method(algorithm, k).s for k in range(3)} == {algorithm.s} == {16 / 3}


def test_every_round_of_flora_begins_with_new_factors():
    moments = run_rounds("algorithm=flora", *TRAINED, "algorithm.lora_ranks=[1,3]", "rounds=3")[0]
    federation = build_tiny("algorithm=flora", *TRAINED, "algorithm.lora_ranks=[1,3]").federation
    types = federation.clients.types
    drawn = [[t.transport.download(m.shared) for t in types] for m in moments]
    names = list(dense_updates(moments[0].shared))
    for low, high in drawn:
        for name in names:
            assert not low[f"{name}..B"].any() and not high[f"{name}..B"].any()
            # the first of the same draw
            assert torch.equal(low[f"{name}..A"], high[f"{name}..A"][:1])
            assert len(high[f"{name}..A"]) == 3
    for before, after in pairwise(drawn):
        assert not any((before[1][f"{n}..A"] == after[1][f"{n}..A"]).any() for n in names)
    heads = [
        drawn[0][1][f"{n}..A"].flatten()[:3] * drawn[0][1][f"{n}..A"].shape[1] ** 0.5 for n in names
    ]
    assert not any(torch.isclose(a, b).any() for a, b in pairwise(heads))  # of each weight another


def test_the_new_factors_of_flora_are_kaiming_uniform():
    algorithm = FLoRA(lora_ranks=(24,))
    shared = algorithm.init(NET, rng(1, "init")).shared
    download = algorithm.transport(0, 1).download
    draws = [download(shared | {".fresh.": torch.tensor(float(at))}) for at in range(300)]
    for name in dense_updates(shared):
        unit = torch.stack([draw[f"{name}..A"] for draw in draws])
        unit = unit * unit.shape[-1] ** 0.5
        assert unit.abs().max() <= 1 and abs(unit.mean()) < 0.02
        assert abs(unit.square().mean() - 1 / 3) < 0.02


def test_other_seeds_draw_other_factors_for_flora():
    algorithm, download = FLoRA(), FLoRA().transport(0, 1).download
    first = [download(algorithm.init(NET, rng(seed, "init")).shared) for seed in (1, 1, 2)]
    factors = [{n: v for n, v in tree.items() if n.endswith(".A")} for tree in first]
    assert trees_equal(factors[0], factors[1]) and not any(
        torch.equal(v, factors[2][n]) for n, v in factors[0].items()
    )


def test_the_model_of_a_flora_client_that_has_not_trained_is_the_servers():
    algorithm = FLoRA(lora_ranks=MIXED)
    _, shared = round_of(algorithm, beginning(algorithm))
    weights = algorithm.client_model(NET, Variables(shared, {}))
    for client in range(3):
        transport = algorithm.transport(client, 3)
        received = Variables(transport.download(shared), {})
        assert_near(transport.method.client_model(NET, received), weights)


@pytest.mark.parametrize("network", [thorough_param(NORM), "model.width=4"], ids=["norm", "cnn"])
@pytest.mark.parametrize("ranks", [thorough_param("[2]"), "[1,2]", "[8]"])
def test_flora_counts_its_factors_up_and_the_stack_of_the_last_round_down(network, ranks):
    common = ("algorithm=flora", network, *TRAINED, f"algorithm.lora_ranks={ranks}")
    federation = build_tiny(*common).federation
    clients = federation.clients
    net = clients.trainer.model
    sides = [W.shape for W in dense_updates(clients.types[0].initial.shared).values()]
    full = sum(numel({n: v}) for n, v in net.initial.items() if net.role(n) == "head")
    last = 0
    for round_, moment in enumerate(run_rounds(*common)[0][1:]):
        chosen = federation.cohorts.sample(round_).members

        def rank(client):
            return max(clients[client].algorithm.lora_ranks)

        stack = sum(sum(min(rank(c), a, b) for c in chosen) * (a + b) for a, b in sides)
        assert moment.row["bytes_up"] == 4 * (stack + full * len(chosen))
        assert moment.row["bytes_down"] == 4 * len(chosen) * (last + full)
        last = stack


# Fed-TaLoRA


def test_where_all_clients_have_all_classes_fed_talora_is_fedex():
    common = ("data.partition={kind: iid, clients: 7, train: 30, test: 15}", *TRAINED)
    assert (build_tiny("algorithm=fedit", *common).split.train_counts > 0).all()
    one, other = (
        run_rounds(f"algorithm={name}", *common)[0] for name in ("fedex_lora", "fed_talora")
    )
    for a, b in zip(one[1:], other[1:], strict=True):
        assert_near({n: b.shared[n] for n in a.shared}, a.shared, atol=1e-6)
        assert a.row["train_loss"] == pytest.approx(b.row["train_loss"], rel=1e-5)
        assert (a.clients["accuracy"] == b.clients["accuracy"]).all()


def by_classes(algorithm, shared, held):
    """As ``round_of``, of clients that have the first ``held[k]`` classes."""
    return round_of(algorithm, shared, held=held)


def test_a_row_of_the_classifier_is_the_mean_of_those_who_have_the_class():
    algorithm = FedTaLoRA(lora_ranks=EQUAL)
    _, shared = round_of(algorithm, beginning(algorithm))
    ends, after = by_classes(algorithm, shared, (2, 5, 3))
    owners = [(0, 1, 2), (0, 1, 2), (1, 2), (1,), (1,), ()]
    for n in HEAD:
        for c, who in enumerate(owners):
            rows = (
                sum(COUNTS[k] * ends[k][n][c] for k in who) / sum(COUNTS[k] for k in who)
                if who
                else shared[n][c]
            )
            torch.testing.assert_close(after[n][c], rows, rtol=0, atol=1e-12)
        assert torch.equal(after[n][5], shared[n][5])  # to the bit


def test_classes_become_seen_and_stay_so():
    algorithm = FedTaLoRA(lora_ranks=EQUAL)
    shared = beginning(algorithm)
    for held, seen in (((1, 2, 2), 2), ((1, 1, 1), 2), ((0, 4, 1), 4)):
        ends, shared = by_classes(algorithm, shared, held)
        for n in HEAD:
            assert shared[f".seen.{n}"].tolist() == [1.0] * seen + [0.0] * (CLASSES - seen)


def test_the_residual_of_fed_talora_does_not_depend_on_who_has_which_class():
    algorithm = FedTaLoRA(lora_ranks=MIXED)
    _, one = by_classes(algorithm, beginning(algorithm), (6, 6, 6))
    _, other = by_classes(algorithm, beginning(algorithm), (1, 4, 2))
    assert all(torch.equal(one[n], v) for n, v in other.items() if n.endswith((".A", ".B", ".W")))


def test_a_client_trains_with_the_classes_seen_and_its_own():
    algorithm = FedTaLoRA(lora_ranks=EQUAL)
    shared = {n: v.float() for n, v in beginning(algorithm).items()}
    seen = torch.tensor([0, 0, 0, 0, 1.0, 0])
    shared |= {f".seen.{n}": seen for n in HEAD}
    own = everything(2)._replace(counts=torch.tensor([2.0, 1, 0, 0, 0, 0]))
    received = Variables(algorithm.transport(0, 1).download(shared), {})
    start = start_variables(algorithm, NET, received, data=own)
    now = Variables({n: v.clone().requires_grad_(n in HEAD) for n, v in start.shared.items()}, {})
    x = torch.randn(9, 3, 7, 5, generator=rng(1, "x"))
    batch = own._replace(x=x, y=torch.arange(9) % 2)
    loss = algorithm.loss(NET)(now, start, batch)
    plain = FedExLoRA(lora_ranks=EQUAL).logits(NET, start, x)[:, [0, 1, 4]]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(plain, batch.y))
    for n in HEAD:
        (grad,) = torch.autograd.grad(loss, now.shared[n], retain_graph=True)
        assert grad.isfinite().all() and [row.any().item() for row in grad] == [
            True,
            True,
            False,
            False,
            True,
            False,
        ]


def test_no_class_is_predicted_that_was_not_seen_once_there_are_any():
    algorithm = FedTaLoRA(lora_ranks=EQUAL)
    shared = {n: v.float() for n, v in beginning(algorithm).items()}
    x = torch.randn(40, 3, 7, 5, generator=rng(1, "x"))
    plain = FedExLoRA(lora_ranks=EQUAL).logits(NET, Variables(shared, {}), x)
    assert torch.equal(algorithm.logits(NET, Variables(shared, {}), x), plain)
    shared |= {f".seen.{n}": torch.tensor([1.0, 0, 0, 1, 0, 0]) for n in HEAD}
    masked = algorithm.logits(NET, Variables(shared, {}), x)
    assert set(masked.argmax(1).tolist()) <= {0, 3} < set(plain.argmax(1).tolist()) | {0, 3}
    assert torch.equal(masked[:, [0, 3]], plain[:, [0, 3]])
    assert masked.isfinite().all() and masked.softmax(1)[:, [1, 2, 4, 5]].max() < 1e-30


def test_the_variables_of_fed_talora_do_not_grow_and_the_rows_that_travel_are_those_of_classes():
    algorithm = FedTaLoRA(lora_ranks=EQUAL, downlink="factored")
    shared = beginning(algorithm)
    server = algorithm.server(NET, shared)
    row = sum(shape[1] if len(shape := NET.leaves[n].shape) > 1 else 1 for n in HEAD)
    factors = sum(2 * sum(W.shape) for W in dense_updates(shared).values())
    before = numel(shared), numel(server)
    for held, seen in (((1, 2, 2), 0), ((1, 1, 1), 2), ((0, 4, 1), 2), ((6, 0, 0), 4)):
        R = 2 * factors if seen else 0  # (k - 1) r (d_out + d_in), k = 3
        for client, classes in enumerate(held):
            transport, start, end = trained(algorithm, shared, client, data=everything(classes))
            received = transport.download_numel(server, shared, 0)
            assert int(received) == factors + seen * row + R
            upload = transport.method.upload(start, end, 0)
            assert int(upload.numel) == factors + classes * row
        shared, server, _ = update_of(algorithm, shared, held=held)[1]
        assert (numel(shared), numel(server)) == before


def test_rounds_of_fed_talora_count_the_rows_of_own_and_of_seen_classes():
    common = ("algorithm=fed_talora", *TRAINED, "algorithm.lora_ranks=[2]", "rounds=3")
    common = (
        *common,
        "data.partition={kind: pathological, clients: 7, train: 20, test: 10, classes_per_client: 2}",
    )
    parts = build_tiny(*common)
    federation, counts = parts.federation, torch.from_numpy(parts.split.train_counts)
    initial = federation.clients.types[0].initial
    sides = [W.shape for W in dense_updates(initial.shared).values()]
    factors, row, seen = (
        sum(2 * sum(side) for side in sides),
        8 + 1,
        torch.zeros(4, dtype=torch.bool),
    )
    for round_, moment in enumerate(run_rounds(*common)[0][1:]):
        chosen = sorted(federation.cohorts.sample(round_).members)
        held = counts[chosen] > 0
        assert moment.row["bytes_up"] == 4 * (len(chosen) * factors + held.sum() * row)
        R = sum(a * b for a, b in sides) if round_ else 0
        assert moment.row["bytes_down"] == 4 * len(chosen) * (factors + seen.sum() * row + R)
        seen |= held.any(0)
        assert all(
            (moment.shared[n] > 0).equal(seen) for n in moment.shared if n.startswith(".seen.")
        )


def test_without_a_head_that_is_trained_in_full_fed_talora_is_fedex():
    common = (*TRAINED, "algorithm.full=[]", "rounds=2")
    one, other = (
        run_rounds(f"algorithm={name}", *common)[0] for name in ("fedex_lora", "fed_talora")
    )
    assert all(trees_equal(a.shared, b.shared) for a, b in zip(one, other, strict=True))
