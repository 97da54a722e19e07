"""FFA-LoRA, RoLoRA and Fed-RAC-LoRA: one factor trains, and the mean is exact."""

from dataclasses import dataclass, replace

import pytest
import small
import torch
from aggregates import svd
from finetuned import (
    COUNTS,
    MIXED,
    RANKS,
    aggregate_terms,
    assert_trees_near,
    client_methods,
    client_transports,
    field_names,
    float64_trainer,
    gaussian_tensor,
    init_variables,
    next_shared,
    trained_variables,
)
from runs import NORM, build_tiny, run_rounds, snapshots_equal, trees_equal
from tiers import thorough_param
from torch.func import functional_call

from fedlora_mpi.algorithm import LocalTraining, Phase, Step
from fedlora_mpi.algorithms.fed_rac_lora import FedRACLoRA
from fedlora_mpi.algorithms.fedit import FedIT
from fedlora_mpi.algorithms.ffa_lora import FFALoRA
from fedlora_mpi.algorithms.rolora import RoLoRA
from fedlora_mpi.components.lowrank import is_factor

HOW = {"lora_ranks": RANKS, "alpha": 6.0}
ALL = [FFALoRA(**HOW), RoLoRA(**HOW), *(FedRACLoRA(factor=f, **HOW) for f in ("A", "B", "both"))]
METHODS = pytest.mark.parametrize(
    "algorithm", ALL, ids=["ffa", "rolora", "rac-A", "rac-B", "rac-both"]
)
SKETCHED = pytest.mark.parametrize("factor", ["A", "B"])
# what trains in rounds 1, 2, ...
WHO = {"ffa_lora": "BBBB", "rolora": "BABA", "fed_rac_lora": "BBBB"}
NAMES = pytest.mark.parametrize("name", WHO)
CNN = "model.width=4"


def rounds_of(algorithm, network="cnn", rounds=3):
    """[(shared before, (start, end) of the clients, shared after)] of some rounds, float64."""
    model, first = init_variables(algorithm, network)
    shared, found = first.shared, []
    for round_ in range(rounds):
        ends = [
            trained_variables(c, model, shared, round_, address=10 * round_ + k)
            for k, c in enumerate(client_transports(algorithm))
        ]
        after = next_shared(algorithm, shared, ends, round_=round_)
        found.append((shared, ends, after))
        shared = after
    return found


# All three


@METHODS
@pytest.mark.parametrize("network", ["cnn", thorough_param("bn_net")])
def test_the_mean_is_exact_among_clients_of_different_ranks(algorithm, network):
    for _, ends, after in rounds_of(algorithm, network):
        deltas = [
            client.delta(end.shared)
            for client, (_, end) in zip(client_methods(algorithm), ends, strict=True)
        ]
        mean = {
            n: sum(w * d[n] for w, d in zip(COUNTS, deltas, strict=True)) / sum(COUNTS)
            for n in deltas[0]
        }
        assert_trees_near(algorithm.delta(after), mean)
        head = [n for n in after if n.startswith(("9.", "fc."))]
        assert_trees_near(
            {n: after[n] for n in head},
            {
                n: sum(w * e.shared[n] for w, (_, e) in zip(COUNTS, ends, strict=True)) / 14
                for n in head
            },
        )


@METHODS
def test_uploads_have_one_layout_in_all_rounds_and_only_what_ever_trains(algorithm):
    ever = {
        name
        for _, ends, _ in rounds_of(algorithm)
        for start, end in ends[:1]
        for name in end.shared
        if not torch.equal(start.shared[name], end.shared[name])
    }
    for client in client_methods(algorithm):
        layouts = [
            {n: v.shape for n, v in client.upload(*ends[0], round_).message.items()}
            for round_, (_, ends, _) in enumerate(rounds_of(client))
        ]
        assert layouts[0] == layouts[1] == layouts[2] and layouts[0].keys() == ever


@NAMES
@pytest.mark.parametrize("path", ["stack", thorough_param("loop")])
def test_the_factor_that_does_not_train_keeps_its_bits_on_server_and_clients(name, path):
    decays = ("train.weight_decay=0.1", f"engine.path={path}")
    parts = build_tiny(f"algorithm={name}", CNN, *MIXED, *decays)
    moments = run_rounds(f"algorithm={name}", CNN, *MIXED, *decays)[0]
    for round_, letter in enumerate(WHO[name]):
        before, after = moments[round_].shared, moments[round_ + 1].shared
        still = {n for n in before if n[-2:] in {".A", ".B"} - {f".{letter}"}}
        assert len(still) == 3
        types = parts.federation.clients.types
        members_by_type = parts.federation.placement.local_clients_by_type
        for client_type, members in zip(types, members_by_type, strict=True):
            arrived = client_type.transport.download(before)
            for done in client_type.trainer.train(members, before, {}, round_):
                assert all(torch.equal(done.end.shared[n], arrived[n]) for n in still)
                assert not any(
                    torch.equal(v, arrived[n])
                    for n, v in done.end.shared.items()
                    if n.endswith(f".{letter}")
                )
        if name != "fed_rac_lora":
            assert all(torch.equal(before[n], after[n]) for n in still)
            assert not any(
                torch.equal(before[n], after[n]) for n in before if n.endswith(f".{letter}")
            )


@NAMES
def test_what_a_client_sends_and_receives_is_the_active_factor_and_the_head(name):
    parts, moments = (
        build_tiny(f"algorithm={name}", CNN, *MIXED),
        run_rounds(f"algorithm={name}", CNN, *MIXED)[0],
    )
    # [out side, in side]
    weights = {"0.weight": (12, 3), "3.weight": (24, 12), "7.weight": (8, 32)}
    assert parts.config.algorithm.adapted_shapes(parts.federation.clients.trainer.model) == weights
    side, head = {"B": 12 + 24 + 8, "A": 3 + 12 + 32}, 4 * 8 + 4
    for round_, letter in enumerate(WHO[name]):
        ranks = [RANKS[client % 3] for client in parts.federation.cohorts.sample(round_).members]
        row = moments[round_ + 1].row
        assert row["bytes_up"] == 4 * sum(head + r * side[letter] for r in ranks)
        last = side[WHO[name][round_ - 1]] if round_ else 0
        down = [3 * last + 1 if name == "fed_rac_lora" else r * last for r in ranks]
        assert row["bytes_down"] == 4 * sum(head + n for n in down)


@NAMES
def test_a_layer_of_fewer_sides_than_the_rank_is_counted_by_its_components(name):
    many = "algorithm.lora_ranks=[20]", "algorithm.alpha=20", "rounds=1"
    parts, row = (
        build_tiny(f"algorithm={name}", CNN, *many),
        run_rounds(f"algorithm={name}", CNN, *many)[0][1].row,
    )
    assert row["bytes_up"] == 4 * 4 * (36 + 3 * 12 + 12 * 24 + 8 * 8)
    first = parts.federation.clients.types[0].initial.shared
    assert [tuple(first[f"{n}..A"].shape) for n in ("0.weight", "3.weight", "7.weight")] == [
        (3, 3),
        (12, 12),
        (8, 32),
    ]


@pytest.mark.parametrize(
    "name", [thorough_param("ffa_lora"), thorough_param("rolora"), "fed_rac_lora"]
)
@pytest.mark.parametrize("ranks", [thorough_param(2), 3])
def test_gathered_uploads_give_the_bits_of_the_sum(name, ranks):
    how = (f"algorithm={name}", NORM, *MIXED)
    summed, gathered = (
        run_rounds(*how, "uplink=sum", ranks=ranks),
        run_rounds(*how, "uplink=gather", ranks=ranks),
    )
    for a, b in zip(summed, gathered, strict=True):
        assert all(snapshots_equal(x, y) for x, y in zip(a, b, strict=True))


@NAMES
def test_the_log_has_no_bias(name):
    told = "algorithm.diagnose=true", "rounds=2"
    for moment in run_rounds(f"algorithm={name}", CNN, *MIXED, *told)[0][1:]:
        assert moment.row["lora_bias"] < 1e-5
    assert run_rounds("algorithm=fedit", CNN, *MIXED, *told)[0][2].row["lora_bias"] > 1e-3


# FFA-LoRA


@dataclass(frozen=True)
class OnlyB(FedIT):
    """FedIT with A held still."""

    def local(self, model, train, round_):
        return (
            Phase(
                train.epochs,
                (
                    Step(
                        self.loss(model),
                        lambda n: n.endswith(".B") or self.is_fully_trained(model, n),
                    ),
                ),
            ),
        )


@pytest.mark.parametrize("model", [NORM, thorough_param(CNN)], ids=["norm", "cnn"])
def test_ffa_is_fedit_with_a_held_still_among_clients_of_one_rank(model):
    common = model, "algorithm.lora_ranks=[3]", "algorithm.alpha=3", "train.weight_decay=0.01"
    ffa, fedit = (
        run_rounds(f"algorithm={n}", *common)[0] for n in ("ffa_lora", "test_frozen_factors:OnlyB")
    )
    for a, b in zip(ffa, fedit, strict=True):
        assert trees_equal(a.shared, b.shared)
    # zeros enter its mean of A
    mixed = run_rounds("algorithm=test_frozen_factors:OnlyB", model, *MIXED)[0]
    assert not any(
        torch.equal(v, mixed[0].shared[n]) for n, v in mixed[1].shared.items() if n.endswith(".A")
    )


def test_the_mean_of_bs_alone_is_that_of_the_products_only_under_one_a():
    algorithm = FFALoRA(**HOW)
    (before, ends, after), *_ = rounds_of(algorithm)
    ends[0][1].shared["7.weight..A"] += 1.0  # a client whose seed was another
    deltas = [
        c.delta(end.shared)["7.weight"]
        for c, (_, end) in zip(client_methods(algorithm), ends, strict=True)
    ]
    mean = sum(w * d for w, d in zip(COUNTS, deltas, strict=True)) / sum(COUNTS)
    assert (algorithm.delta(next_shared(algorithm, before, ends))["7.weight"] - mean).norm() > 0.1


# RoLoRA


@pytest.mark.parametrize("model", [thorough_param(NORM), CNN], ids=["norm", "cnn"])
def test_rolora_that_always_trains_b_is_ffa(model):
    always, ffa = (
        run_rounds(*n, model, *MIXED)[0]
        for n in (["algorithm=rolora", "algorithm.schedule=B"], ["algorithm=ffa_lora"])
    )
    assert all(snapshots_equal(a, b) for a, b in zip(always, ffa, strict=True))


def test_rolora_is_ffa_in_round_1_and_not_in_round_2():
    rolora, ffa = (run_rounds(f"algorithm={n}", CNN, *MIXED)[0] for n in ("rolora", "ffa_lora"))
    assert trees_equal(rolora[1].shared, ffa[1].shared) and not trees_equal(
        rolora[2].shared, ffa[2].shared
    )


# Fed-RAC-LoRA


def test_all_clients_have_the_first_components_of_one_sketch_which_changes_with_round_layer_and_seed():
    for algorithm, letter in ((FedRACLoRA(**HOW), ".A"), (FedRACLoRA(factor="B", **HOW), ".B")):
        sketches = []
        for shared, ends, _ in rounds_of(algorithm):
            for client, (start, _) in zip(client_methods(algorithm), ends, strict=True):
                r = client.lora_ranks[0]
                for name in (n for n in shared if n.endswith(letter)):
                    whole = shared[name]
                    assert torch.equal(
                        start.shared[name], whole[:r] if letter == ".A" else whole[:, :r]
                    )
            assert all(
                (v == 0).all() for n, v in shared.items() if is_factor(n) and not n.endswith(letter)
            )
            sketches.append({n: v for n, v in shared.items() if n.endswith(letter)})
        for a, b in ((0, 1), (1, 2), (0, 2)):
            assert not any(torch.isin(v, sketches[b][n]).any() for n, v in sketches[a].items())
        layers = list(sketches[0].values())
        assert not torch.isin(layers[1].flatten()[:20], layers[2]).any()
        shared, _, _ = rounds_of(algorithm)[0]
        again, other = (
            algorithm.start_factors(shared | {".turn.seed": shared[".turn.seed"] + k}, 0)
            for k in (0, 1)
        )
        assert trees_equal(again, {n: shared[n] for n in again}) and not any(
            torch.equal(other[n], shared[n]) for n in sketches[0]
        )


def test_both_sketches_come_in_turn():
    algorithm = FedRACLoRA(factor="both", **HOW)
    for round_, (shared, ends, _) in enumerate(rounds_of(algorithm)):
        zero, drawn = (".B", ".A") if round_ % 2 == 0 else (".A", ".B")
        assert all((v == 0).all() == n.endswith(zero) for n, v in shared.items() if is_factor(n))
        assert all(
            torch.equal(end.shared[n], start.shared[n])
            for start, end in ends
            for n in end.shared
            if n.endswith(drawn)
        )


@pytest.mark.parametrize("sketch, kurtosis", [("uniform", 1.8), ("gaussian", 3.0)])
@pytest.mark.parametrize("shape", [(200, 500), (500, 200)])
def test_the_entries_of_a_sketch_have_the_moments_of_their_distribution(sketch, kurtosis, shape):
    v = FedRACLoRA(sketch=sketch).draw_sketch(7, shape).double() * (3 * 500) ** 0.5
    assert (
        v.shape == shape and v.mean().abs() < 0.02 and v.var().item() == pytest.approx(1, abs=0.03)
    )
    assert v.pow(4).mean().item() == pytest.approx(kurtosis, abs=0.1)
    assert torch.isfinite(v).all() and (v[0] @ v[1]).abs() / v.shape[1] < 0.3


@SKETCHED
def test_one_round_is_that_of_ffa_with_the_same_sketch(factor):
    chain, state = small.make_experiment(FedRACLoRA(lora_ranks=(2,), alpha=4.0, factor=factor))
    plain, other = small.make_experiment(
        FFALoRA(lora_ranks=(2,), alpha=4.0) if factor == "A" else OnlyA(lora_ranks=(2,), alpha=4.0)
    )
    same_start = {n: state.shared[n] for n in other.shared}
    state, other = (
        small.run_rounds(chain, state, 1),
        small.run_rounds(plain, other._replace(shared=same_start), 1),
    )
    small.assert_near(chain.algorithm.delta(state.shared), plain.algorithm.delta(other.shared))
    assert all(torch.equal(state.shared[n], other.shared[n]) for n in ("9.weight", "9.bias"))


@dataclass(frozen=True)
class OnlyA(FFALoRA):
    """FFA-LoRA with the letters exchanged."""

    @property
    def factor_schedule(self):
        return ("A",)


@pytest.mark.parametrize("factor", ["A", "B", "both"])
def test_the_rank_of_the_sum_grows_by_that_of_the_sketch(factor):
    algorithm = FedRACLoRA(lora_ranks=(1, 2, 2), alpha=2.0, factor=factor)
    for done, (_, _, after) in enumerate(rounds_of(algorithm), start=1):
        rank = {
            n: int(torch.linalg.matrix_rank(after[f"{n}..W"])) for n in ("3.weight", "7.weight")
        }
        # [18, 9] and [5, 6]
        assert rank == {"3.weight": min(9, 2 * done), "7.weight": min(5, 2 * done)}
    ffa = FFALoRA(lora_ranks=(1, 2, 2), alpha=2.0)
    *_, (_, _, after) = rounds_of(ffa)
    assert int(torch.linalg.matrix_rank(ffa.delta(after)["3.weight"])) == 2


LR = 0.3
FULL_BATCH = LocalTraining(epochs=1, batch_size=100, lr=LR, momentum=0.0)


def full_gradient(made, algorithm, shared, client):
    """The gradient of a client's loss on all its samples for each decomposed weight as a matrix."""
    weights = algorithm.client_model(
        made.model, small.initial_variables(made)._replace(shared=shared)
    )
    weights = {n: v.clone().requires_grad_() for n, v in weights.items()}
    data = made.feed.unshuffled_batch([client], all_samples=True)
    logits = functional_call(made.model.modules[True], weights, (data.x[0],))
    loss = torch.nn.functional.cross_entropy(logits, data.y[0])
    names = list(algorithm.adapted_shapes(made.model))
    found = torch.autograd.grad(loss, [weights[n] for n in names])
    return {n: g.reshape(shared[f"{n}..W"].shape) for n, g in zip(names, found, strict=True)}


@SKETCHED
@pytest.mark.parametrize("orthogonal", [True, False])
def test_a_step_on_the_whole_batch_is_one_of_the_full_gradient_in_the_space_of_the_sketch(
    factor, orthogonal
):
    # 7.weight is [5, 6]: a left sketch [5, 5], or a right one of rank 5 of 6; 0.weight is [9, 9].
    algorithm = FedRACLoRA(
        lora_ranks=(9,), alpha=9.0 * 2, factor=factor, full=(), layers=("0.weight", "7.weight")
    )
    made = float64_trainer(algorithm, train=FULL_BATCH)
    shared = {n: v.double() for n, v in small.initial_variables(made).shared.items()}
    if orthogonal:
        for name in (n for n in shared if n.endswith(f".{factor}")):
            wide = shared[name].shape[1] > shared[name].shape[0]
            shared[name] = (
                torch.linalg.qr(shared[name].T)[0].T if wide else torch.linalg.qr(shared[name])[0]
            )
    shared |= {
        f"{n}..W": 0.1 * gaussian_tensor(*shared[f"{n}..W"].shape)
        for n in algorithm.adapted_shapes(made.model)
    }
    (done,) = made.train([0], shared, {}, 0)
    term = algorithm.transport(0, 1).expand(algorithm.upload(done.start, done.end, 0), shared, 11)
    aggregate = aggregate_terms([term], [11], shared)
    after = algorithm.server_update({}, shared, aggregate, svd).shared
    for name, gradient in full_gradient(made, algorithm, shared, 0).items():
        S = shared[f"{name}..{factor}"]
        projected = S @ S.T @ gradient if factor == "B" else gradient @ S.T @ S
        torch.testing.assert_close(
            after[f"{name}..W"],
            shared[f"{name}..W"] - LR * 2**2 * projected,
            rtol=1e-10,
            atol=1e-10,
        )
        if orthogonal and (factor == "B" or name == "0.weight"):  # r = n
            torch.testing.assert_close(projected, gradient, rtol=1e-10, atol=1e-10)


def test_the_dense_update_does_not_train_nor_decay_nor_travel():
    parts = build_tiny("algorithm=fed_rac_lora", CNN, *MIXED, "train.weight_decay=0.1")
    before = run_rounds("algorithm=fed_rac_lora", CNN, *MIXED, "train.weight_decay=0.1")[0][
        2
    ].shared
    assert all(v.abs().max() > 0.01 for n, v in before.items() if n.endswith(".W"))
    first = parts.federation.clients.types[0]
    members = parts.federation.placement.local_clients_by_type[0]
    for done in first.trainer.train(members, before, {}, 2):
        assert all(
            torch.equal(done.end.shared[n], v) for n, v in before.items() if n.endswith(".W")
        )
        assert not any(
            n.endswith(".W") or n.startswith(".turn.")
            for n in first.algorithm.upload(done.start, done.end, 2).message
        )


def test_between_rounds_all_clients_have_the_servers_model():
    algorithm = FedRACLoRA(**HOW)
    model, first = init_variables(algorithm)
    *_, (_, _, after) = rounds_of(algorithm)
    own = [
        c.method.client_model(model, first._replace(shared=c.download(after)))
        for c in client_transports(algorithm)
    ]
    server = algorithm.client_model(model, first._replace(shared=after))
    assert all(trees_equal(weights, server) for weights in own)
    assert "judged" not in field_names(algorithm) and "judged" in field_names(FFALoRA())
    assert replace(algorithm, sketch="gaussian").evaluate_on == "after_aggregation"
