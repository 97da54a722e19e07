"""FedLoRA against its paper, its official code and plain torch; the low-rank part by itself."""

from dataclasses import replace

import pytest
import small
import torch
import torch.nn.functional as F
from tiers import STACK_FIRST, thorough_param
from torch import nn
from torch.func import functional_call

from fedlora_mpi.algorithm import Batch, LocalTraining, Variables
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.fedavg_lora import FedAvgLoRA
from fedlora_mpi.algorithms.fedlora import FedLoRA
from fedlora_mpi.algorithms.local import Local
from fedlora_mpi.algorithms.local_lora import LocalLoRA
from fedlora_mpi.components.lowrank import LowRank, is_factor, is_not_factor, matrix_shape
from fedlora_mpi.core.seeds import isolate_rng, rng
from fedlora_mpi.core.tree import numel, split
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.models.network import from_module
from fedlora_mpi.models.zoo import build
from fedlora_mpi.mpi.ending import Fault

NETWORKS = pytest.mark.parametrize("network", [thorough_param("cnn"), "bn_net"])


def numbers(*shape, at=0):
    return torch.randn(*shape, generator=rng(1, "test", *shape, at))


def one_conv(outside, inside, kernel):
    """A model of one convolution [O, I, *kernel]."""
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    with isolate_rng(1, "test"):
        return from_module(
            nn.Sequential(nn.Conv2d(inside, outside, kernel), *pool), outside, (inside, 9, 7)
        )


def moving(made):
    """Variables whose low-rank part is not zero."""
    start = small.initial_variables(made)
    return start._replace(
        personal={n: v + 0.1 * numbers(*v.shape) for n, v in start.personal.items()}
    )


def batch(made, client=0, width=5):
    return Batch(
        *(v if v is None else v[0] for v in made.feed.epoch([client], 0, 0).batch(1, 0, width))
    )


def of_role(made, tree, *roles):
    return {n: v for n, v in tree.items() if made.model.role(n) in roles}


# Ranks, scales, layout


@pytest.mark.parametrize(
    "network, classes, conv, linear, official, paper",
    [
        ("resnet8", 10, 0.6, 4, 1_826_938, 1_348_281),
        ("resnet10", 100, 0.8, 40, 9_374_121, 7_168_517),
        thorough_param("resnet10", 200, 0.8, 80, 9_406_601, 7_200_997),
    ],
)
def test_factors_have_their_published_sizes(network, classes, conv, linear, official, paper):
    model = build(network, {}, classes, (3, 32, 32), 1)
    for how, expected in (
        (LowRank(conv_rank=conv, linear_rank=linear, rank_rule="official"), official),
        (LowRank(conv_rank=conv, linear_rank=0.4), paper),
    ):
        sizes = (r * sum(matrix_shape(model.leaves[name])) for name, r in how.ranks(model).items())
        assert sum(sizes) == expected
    assert numel(how.factors(model, rng(1))) == paper


@pytest.mark.parametrize(
    "shape, ratio, paper, official, scale",
    [
        ((64, 3, 7, 7), 0.6, 13, 266, 38),  # 0.6 * 3 * 7 = 12.6
        ((128, 64, 3, 3), 0.6, 115, 228, 76),
        ((5, 3, 3, 3), 0.5, 4, 6, 2),  # 4.5 rounds to even
        ((5, 3, 1, 1), 0.1, 1, 1, 1),  # never 0
    ],
)
def test_ranks_and_scales_of_a_convolution(shape, ratio, paper, official, scale):
    outside, inside, *kernel = shape
    model = one_conv(outside, inside, kernel)
    assert LowRank(conv_rank=ratio).ranks(model) == {"0.weight": paper}
    how = LowRank(conv_rank=ratio, linear_rank=1, rank_rule="official", scale="official")
    assert how.ranks(model) == {"0.weight": official}
    factors = {n: torch.ones_like(v) for n, v in how.factors(model, rng(1)).items()}
    # no factor K
    assert how.tau(model, factors)["0.weight"].unique() == pytest.approx(official / scale, rel=1e-5)
    plain = replace(how, scale="one")
    assert plain.tau(model, factors)["0.weight"].unique() == pytest.approx(official)


@pytest.mark.parametrize(
    "how, rank", [(LowRank(linear_rank=0.4), 2), (LowRank(linear_rank=4, rank_rule="official"), 4)]
)
def test_ranks_and_scales_of_a_linear(how, rank):
    model = from_module(nn.Sequential(nn.Flatten(), nn.Linear(105, 6)), 6, (3, 7, 5))
    assert how.ranks(model) == {"1.weight": rank}  # 0.4 * 6 = 2.4
    factors = {n: torch.ones_like(v) for n, v in how.factors(model, rng(1)).items()}
    assert {n: tuple(v.shape) for n, v in factors.items()} == {
        "1.weight..A": (rank, 105),
        "1.weight..B": (6, rank),
    }
    assert (how.tau(model, factors)["1.weight"] == rank).all()
    assert replace(how, scale="official").tau(model, factors)["1.weight"].unique() == pytest.approx(
        1, rel=1e-5
    )


@pytest.mark.parametrize(
    "outside, inside, kernel",
    [(5, 3, (3, 3)), (3, 5, (3, 3)), (7, 2, (5, 5)), (6, 4, (1, 1)), (5, 3, (2, 3))],
)
def test_a_convolution_is_cut_row_by_row(outside, inside, kernel):
    model, how = one_conv(outside, inside, kernel), LowRank()
    factors = {n: numbers(*v.shape, at=1) for n, v in how.factors(model, rng(1)).items()}
    matrix = factors["0.weight..B"] @ factors["0.weight..A"]
    tau = how.tau(model, factors)["0.weight"]
    high, wide = kernel
    assert matrix.shape == (outside * high, inside * wide) and tau.shape == (
        outside,
        inside,
        high,
        wide,
    )
    for o in range(outside):
        for i in range(inside):
            for a in range(high):
                for b in range(wide):
                    at = i * high * wide + a * wide + b
                    row, col = o * high + at // (inside * wide), at % (inside * wide)
                    assert tau[o, i, a, b] == matrix[row, col]


def test_tau_has_at_most_its_rank():
    made = small.make_trainer(FedLoRA(conv_rank=0.3, linear_rank=0.4), "bn_net")
    (done,) = made.train([0], *begun(made, 1), 0)
    tau, ranks = made.algorithm.tau(made.model, done.end.personal), made.algorithm.ranks(made.model)
    below = 0
    for name, value in tau.items():
        matrix = value.view(matrix_shape(made.model.leaves[name]))
        assert 0 < torch.linalg.matrix_rank(matrix) <= ranks[name]
        below += ranks[name] < min(matrix.shape)
    assert below == len(tau)


def begun(made, clients):
    """(shared, personal rows) before round 1."""
    start = small.initial_variables(made)
    return start.shared, small.repeat_rows(start.personal, clients)


def test_tau_starts_at_zero_and_a_is_kaiming_uniform():
    model = build("resnet8", {}, 10, (3, 32, 32), 1)
    how = LowRank()
    factors = how.factors(model, rng(1, "init"))
    assert not any(v.any() for v in how.tau(model, factors).values())
    for name in how.ranks(model):
        a, bound = factors[f"{name}..A"], matrix_shape(model.leaves[name])[1] ** -0.5
        assert a.abs().max() <= bound and not factors[f"{name}..B"].any()
        if a.numel() > 1000:
            assert a.abs().max() > 0.99 * bound and a.mean().abs() < 0.1 * bound
            assert a.std() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_all_clients_start_with_the_same_factors():
    _, state = small.make_experiment(FedLoRA())
    for name, value in state.personal.items():
        assert value.shape[0] == 5 and (value == value[0]).all(), name


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"lora_epochs": -1}, "lora_epochs = -1"),
        ({"conv_rank": 0.0}, "conv_rank = 0.0"),
        ({"conv_rank": 1.2}, "conv_rank = 1.2"),
        ({"linear_rank": 4}, "linear_rank = 4: must be a ratio"),
        ({"linear_rank": 0.6, "rank_rule": "official"}, "linear_rank = 0.6: must be an integer"),
        ({"linear_rank": 1.5, "rank_rule": "official"}, "linear_rank = 1.5: must be an integer"),
    ],
)
def test_impossible_ranks_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        FedLoRA(**fields)


def test_more_lora_epochs_than_epochs_are_refused():
    model = small.make_model()
    FedLoRA(lora_epochs=3).check(model, LocalTraining(epochs=3))
    with pytest.raises(ValueError, match="lora_epochs = 4: must be at most train.epochs = 3"):
        FedLoRA(lora_epochs=4).check(model, LocalTraining(epochs=3))
    FedLoRA(lora_epochs=4, order="simultaneous").check(model, LocalTraining(epochs=3))


def test_patterns_choose_the_decomposed_layers():
    model = small.make_model("bn_net")
    names = {n for n, leaf in model.leaves.items() if leaf.matrix}
    assert LowRank().ranks(model).keys() == names and len(names) == 7
    chosen = LowRank(layers=("fc.*", "layers.*.conv?.weight"))
    assert chosen.ranks(model).keys() == {n for n in names if n.startswith("fc") or ".conv" in n}
    assert {n[:-3] for n in chosen.factors(model, rng(1))} == chosen.ranks(model).keys()
    for pattern in ("bn1.weight", "Fc.*", "fc.bias"):
        with pytest.raises(
            ValueError, match=f"layers = {pattern.replace('*', '.')}.*there are conv1.weight"
        ):
            FedLoRA(layers=("fc.*", pattern)).check(model, LocalTraining())


def test_a_layer_outside_the_patterns_is_sigma_alone():
    made = small.make_trainer(FedLoRA(layers=("0.*",)))
    v = moving(made)
    theta = made.algorithm.client_model(made.model, v)
    changed = {n for n in theta if not torch.equal(theta[n], v.shared[n])}
    assert changed == {"0.weight"} and list(theta) == list(v.shared)


# Gradients


def test_tau_of_a_convolution_passes_gradcheck():
    model = one_conv(5, 3, (3, 3))
    how = LowRank(conv_rank=0.4, linear_rank=1, rank_rule="official", scale="official")
    x = numbers(2, 3, 9, 7).double()
    factors = [v.double() + 0.1 * numbers(*v.shape) for v in how.factors(model, rng(1)).values()]

    def loss(a, b):
        return (
            F.conv2d(x, how.tau(model, {"0.weight..A": a, "0.weight..B": b})["0.weight"])
            .square()
            .sum((2, 3))
        )

    assert torch.autograd.gradcheck(loss, [v.requires_grad_() for v in factors])


def test_the_first_gradient_of_a_is_zero_and_that_of_b_is_not():
    made = small.make_trainer(FedLoRA())
    v = small.initial_variables(made)
    for leaf in v.personal.values():
        leaf.requires_grad_()
    loss = made.algorithm.loss(made.model)(v, v, batch(made))
    grads = dict(zip(v.personal, torch.autograd.grad(loss, v.personal.values()), strict=True))
    for name, grad in grads.items():
        assert grad.any() == name.endswith(".B"), name


@NETWORKS
def test_a_tau_formed_once_gives_the_same_loss_and_gradient(network):
    made = small.make_trainer(FedLoRA(conv_rank=0.4), network)
    v, (lowrank, full) = moving(made), made.algorithm.local(made.model, made.settings, 0)
    assert lowrank.constant is None and (lowrank.epochs, full.epochs) == (2, 1)
    results = []
    for constant in ({}, full.constant(v)):
        sigma = {
            n: w.clone().requires_grad_(made.model.role(n) != "stats") for n, w in v.shared.items()
        }
        now = Variables(sigma, v.personal, constant)
        loss = full.steps[0].loss(now, v, batch(made))
        results.append(
            (loss, torch.autograd.grad(loss, [w for w in sigma.values() if w.requires_grad]))
        )
    (one, grads), (two, again) = results
    assert one == two and all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    plain = made.algorithm.logits(made.model.eval_mode(), Variables(v.shared, {}), batch(made).x)
    assert not torch.allclose(
        plain, made.algorithm.logits(made.model.eval_mode(), v, batch(made).x)
    )


# Degenerate cases


@STACK_FIRST
@NETWORKS
@pytest.mark.parametrize("participation", [thorough_param(1.0), 0.6])
def test_fedlora_without_lora_epochs_is_fedavg(network, stacked, participation):
    how = {"network": network, "stacked": stacked, "participation": participation}
    federation, state = small.make_experiment(FedLoRA(lora_epochs=0), **how)
    plain_federation, plain = small.make_experiment(
        FedAvg(weights="uniform", absent="stale"), **how
    )
    begin = small.clone_tree(state.personal)
    for _ in range(3):
        state, plain = (
            small.run_rounds(federation, state, 1),
            small.run_rounds(plain_federation, plain, 1),
        )
        assert small.trees_equal(state.shared, plain.shared)
    assert small.trees_equal(state.personal, begin)
    assert not any(v.any() for n, v in state.personal.items() if n.endswith(".B"))


@STACK_FIRST
@NETWORKS
def test_fedlora_with_lora_epochs_alone_is_isolation_when_statistics_stay_home(network, stacked):
    algorithm = FedLoRA(lora_epochs=3, bn_stats="local")
    federation, state = small.make_experiment(algorithm, network, stacked=stacked, group_size=1)
    alone_federation, alone = small.make_experiment(
        algorithm, network, sizes=small.SIZES[:1], stacked=stacked
    )
    begin = small.clone_tree(state.shared)
    state, alone = (
        small.run_rounds(federation, state, 2),
        small.run_rounds(alone_federation, alone, 2),
    )
    assert small.trees_equal(state.shared, begin) and small.trees_equal(alone.shared, begin)
    assert small.trees_equal({n: v[:1] for n, v in state.personal.items()}, alone.personal)
    assert state.personal["fc.weight..B" if network == "bn_net" else "9.weight..B"].any()


def test_averaged_statistics_end_the_isolation():
    federation, state = small.make_experiment(FedLoRA(lora_epochs=3), "bn_net")
    begin = small.clone_tree(state.shared)
    state = small.run_rounds(federation, state, 1)
    role = federation.clients.trainer.model.role
    moved = {role(n) for n, v in begin.items() if not torch.equal(v, state.shared[n])}
    assert moved == {"stats"}


def alternating(made, rounds, scale):
    """One client's alternating training in plain torch; (sigma,
    statistics and factors at the end)."""
    with isolate_rng(2, "other weights"):
        module = small.bn_net(small.CLASSES, small.SHAPE).train()
    start = small.initial_variables(made)
    module.load_state_dict(start.shared, strict=False)
    factors = {n: nn.Parameter(v.clone()) for n, v in start.personal.items()}
    sigma = dict(module.named_parameters())
    settings, lora_epochs = made.settings, made.algorithm.lora_epochs
    for round_ in range(rounds):
        for phase, epochs in (
            (factors, range(lora_epochs)),
            (sigma, range(lora_epochs, settings.epochs)),
        ):
            optimizer = torch.optim.SGD(
                phase.values(), settings.lr, settings.momentum, weight_decay=settings.weight_decay
            )
            for epoch in epochs:
                samples = made.feed.epoch([0], round_, epoch)
                for at in range(0, made.feed.train_size(0), settings.batch_size):
                    data = samples.batch(
                        1, at, min(settings.batch_size, made.feed.train_size(0) - at)
                    )
                    theta = dict(sigma)
                    for name in {n[:-3] for n in factors}:
                        product = factors[f"{name}..B"] @ factors[f"{name}..A"] * scale(sigma[name])
                        theta[name] = sigma[name] + product.reshape(sigma[name].shape)
                    optimizer.zero_grad()
                    F.cross_entropy(
                        functional_call(module, theta, (data.x[0],)), data.y[0]
                    ).backward()
                    optimizer.step()
    state = {n: v.detach() for n, v in module.state_dict().items() if v.is_floating_point()}
    return {n: state[n] for n in start.shared}, {n: v.detach() for n, v in factors.items()}


@STACK_FIRST
@pytest.mark.parametrize("rule", ["paper", "official"])
def test_one_client_trains_as_alternating_torch_optimizers(stacked, rule):
    if rule == "paper":
        algorithm, scale = FedLoRA(conv_rank=0.4), lambda w: 1
    else:
        algorithm = FedLoRA(conv_rank=0.4, linear_rank=3, rank_rule="official", scale="official")

        def scale(w):
            return 1 / int(0.4 * w.shape[0]) if w.dim() == 4 else 1 / 3

    settings = replace(small.TRAIN, weight_decay=0.01)
    federation, state = small.make_experiment(
        algorithm, "bn_net", sizes=(12,), train=settings, stacked=stacked
    )
    sigma, factors = alternating(federation.clients.trainer, 2, scale)
    state = small.run_rounds(federation, state, 2)
    small.assert_near(state.shared, sigma)
    small.assert_near({n: v[0] for n, v in state.personal.items()}, factors)


@STACK_FIRST
def test_identical_clients_keep_identical_parts_and_the_mean_is_theirs(stacked):
    how = {"same_sample": True, "stacked": stacked, "group_size": 1}
    federation, state = small.make_experiment(FedLoRA(), sizes=(6, 6, 6), **how)
    alone_federation, alone = small.make_experiment(FedLoRA(), sizes=(6,), **how)
    state, alone = (
        small.run_rounds(federation, state, 2),
        small.run_rounds(alone_federation, alone, 2),
    )
    assert small.trees_equal(state.shared, alone.shared)
    for name, value in state.personal.items():
        assert (value == alone.personal[name]).all() and value.any(), name


# What moves, what travels


@NETWORKS
@STACK_FIRST
def test_the_lowrank_phase_moves_factors_and_statistics_alone(network, stacked):
    made = small.make_trainer(FedLoRA(lora_epochs=3), network, stacked=stacked)
    shared, personal_C = begun(made, 5)
    for done in made.train(range(5), shared, personal_C, 0):
        frozen = of_role(made, done.end.shared, "body", "head", "norm")
        assert small.trees_equal(frozen, of_role(made, shared, "body", "head", "norm"))
        assert not any(
            torch.equal(v, shared[n]) for n, v in of_role(made, done.end.shared, "stats").items()
        )
        assert not any(torch.equal(v, done.start.personal[n]) for n, v in done.end.personal.items())
    assert len(of_role(made, shared, "stats")) == (0 if network == "cnn" else 12)


@NETWORKS
@STACK_FIRST
def test_the_sigma_phase_leaves_the_factors(network, stacked):
    made = small.make_trainer(FedLoRA(lora_epochs=0), network, stacked=stacked)
    v = moving(made)
    personal_C = small.repeat_rows(v.personal, 5)
    for done in made.train(range(5), v.shared, personal_C, 0):
        assert small.trees_equal(done.end.personal, v.personal)
        assert not any(torch.equal(w, v.shared[n]) for n, w in done.end.shared.items())


def test_simultaneous_training_moves_both_in_one_phase():
    made = small.make_trainer(FedLoRA(order="simultaneous", lora_epochs=9), "bn_net")
    (phase,) = made.algorithm.local(made.model, made.settings, 0)
    assert phase.epochs == 3 and phase.constant is None
    v = small.initial_variables(made)
    (done,) = made.train([0], v.shared, small.repeat_rows(v.personal, 1), 0)
    for now, start in ((done.end.shared, v.shared), (done.end.personal, v.personal)):
        assert not any(torch.equal(value, start[n]) for n, value in now.items())


@pytest.mark.parametrize(
    "fields", [{}, {"conv_rank": 0.2, "linear_rank": 1.0}, {"layers": ("fc.*",)}]
)
def test_the_upload_is_all_of_sigma_and_no_factor_whatever_the_ranks(fields):
    federation, state = small.make_experiment(FedLoRA(**fields), "bn_net")
    assert {n: tuple(s) for n, s in federation.aggregator.terms.flat.shapes.items()} == {
        n: leaf.shape for n, leaf in federation.clients.trainer.model.leaves.items()
    }
    assert all(map(is_not_factor, federation.aggregator.terms.flat.shapes)) and all(
        map(is_factor, state.personal)
    )
    _, row, _ = run_round(federation, state, evaluate=False, stop=False)
    assert (
        row["bytes_up"]
        == row["bytes_down"]
        == 5 * 4 * numel(federation.clients.trainer.model.initial)
    )


def test_statistics_kept_local_do_not_travel():
    federation, state = small.make_experiment(FedLoRA(bn_stats="local"), "bn_net")
    model = federation.clients.trainer.model
    assert {model.role(n) for n in federation.aggregator.terms.flat.shapes} == {
        "body",
        "head",
        "norm",
    }
    stats = {n for n in model.initial if model.role(n) == "stats"}
    assert {n for n in state.personal if not is_factor(n)} == stats and len(stats) == 12
    state = small.run_rounds(federation, state, 1)
    assert all((state.personal[n][0] != state.personal[n][1]).any() for n in stats)


def test_local_lora_shares_nothing_and_fedavg_lora_everything():
    federation, state = small.make_experiment(LocalLoRA())
    assert federation.aggregator.terms.flat.size == 0 and not state.shared
    _, row, _ = run_round(federation, state, evaluate=True, stop=False)
    assert row["bytes_up"] == row["bytes_down"] == 0
    federation, state = small.make_experiment(FedAvgLoRA())
    assert not state.personal and set(federation.aggregator.terms.flat.shapes) == set(state.shared)
    assert numel(state.shared) == numel(federation.clients.trainer.model.initial) + numel(
        LowRank().factors(federation.clients.trainer.model, rng(1))
    )
    after = small.run_rounds(federation, state, 2)
    assert not any(torch.equal(after.shared[n], v) for n, v in state.shared.items())


def test_of_one_client_both_controls_are_fedlora():
    states = [
        small.run_rounds(*small.make_experiment(a, sizes=(7,)), 1)
        for a in (FedLoRA(), LocalLoRA(), FedAvgLoRA())
    ]
    all_of = [s.shared | {n: v[0] for n, v in s.personal.items()} for s in states]
    assert small.trees_equal(all_of[0], all_of[1]) and small.trees_equal(all_of[0], all_of[2])


def test_local_lora_without_lora_epochs_is_local():
    federation, state = small.make_experiment(LocalLoRA(lora_epochs=0), "bn_net")
    plain_federation, plain = small.make_experiment(Local(), "bn_net")
    state, plain = (
        small.run_rounds(federation, state, 2),
        small.run_rounds(plain_federation, plain, 2),
    )
    assert small.trees_equal(split(state.personal, is_not_factor)[0], plain.personal)


# The server


@pytest.mark.parametrize("algorithm", [FedLoRA(), FedAvg(), FedAvg(weights="uniform")])
def test_the_next_sigma_is_the_exact_mean_of_the_uploads(algorithm):
    federation, state = small.make_experiment(algorithm, "bn_net")
    trained = list(
        federation.clients.trainer.train(
            federation.placement.groups[0], state.shared, small.clone_tree(state.personal), 0
        )
    )
    weights = [federation.clients.weights[done.client] for done in trained]
    assert weights == ([1] * 5 if algorithm.weights == "uniform" else list(small.SIZES))
    after = small.run_rounds(federation, state, 1)
    for name, value in after.shared.items():
        uploads = torch.stack(
            [done.end.shared[name].double() * w for done, w in zip(trained, weights, strict=True)]
        )
        assert torch.equal(value, (uploads.sum(0) / sum(weights)).float()), name


def test_stale_absence_is_a_damped_step_of_exclusion():
    outcomes = {}
    for absent in ("exclude", "stale"):
        federation, state = small.make_experiment(
            FedLoRA(absent=absent), "bn_net", participation=0.6
        )
        assert len(federation.cohorts.sample(0).members) == 3
        outcomes[absent] = small.run_rounds(federation, state, 1)
    damped = {n: w + 3 / 5 * (outcomes["exclude"].shared[n] - w) for n, w in state.shared.items()}
    small.assert_near(outcomes["stale"].shared, damped, rtol=1e-6)
    assert small.trees_equal(outcomes["stale"].personal, outcomes["exclude"].personal)
    assert not small.trees_equal(outcomes["stale"].shared, outcomes["exclude"].shared)


def test_fedlora_counts_absent_clients_by_default():
    assert FedLoRA().absent == FedAvgLoRA().absent == "stale" and FedLoRA().weights == "uniform"


@STACK_FIRST
@pytest.mark.parametrize("lora_epochs", [0, 2])
def test_personal_parts_move_for_participants_with_lora_epochs_alone(stacked, lora_epochs):
    federation, state = small.make_experiment(
        FedLoRA(lora_epochs=lora_epochs), participation=0.6, stacked=stacked, group_size=2
    )
    before, chosen = small.clone_tree(state.personal), federation.cohorts.sample(0).members
    state = small.run_rounds(federation, state, 1)
    moved = {
        client
        for row, client in enumerate(federation.placement.local_clients)
        if any((state.personal[n][row] != v[row]).any() for n, v in before.items())
    }
    assert 0 < len(chosen) < 5 and moved == (chosen if lora_epochs else set())


def test_evaluation_is_of_the_new_sigma_with_each_clients_own_part():
    federation, state = small.make_experiment(FedLoRA(), "bn_net")
    state, row, clients = run_round(federation, state, evaluate=True, stop=False)
    model = federation.clients.trainer.model.eval_mode()
    for row_, client in enumerate(federation.placement.local_clients):
        v = Variables(state.shared, {n: value[row_] for n, value in state.personal.items()})
        tests = federation.clients.trainer.feed.test_batch(
            [client], 0, federation.clients.trainer.feed.test_size(client)
        )
        logits = model(
            federation.algorithm.client_model(federation.clients.trainer.model, v), tests.x[0]
        )
        assert clients["accuracy"][client] == pytest.approx(
            (logits.argmax(1) == tests.y[0]).double().mean().item()
        )
        assert clients["loss"][client] == pytest.approx(
            F.cross_entropy(logits, tests.y[0]).item(), rel=1e-5
        )
    assert (
        row["accuracy"] == clients["accuracy"].mean()
        and row["accuracy_worst"] == clients["accuracy"].min()
    )
    assert row["loss"] == clients["loss"].mean()


def test_a_client_that_diverges_is_named():
    federation, state = small.make_experiment(
        FedLoRA(), participation=0.6, train=replace(small.TRAIN, lr=1e30)
    )
    ids = ", ".join(map(str, sorted(federation.cohorts.sample(0).members)))
    with pytest.raises(Fault, match=f"round 1: the loss or upload of client {ids} is not finite"):
        run_round(federation, state, evaluate=False, stop=False)
