"""OTA-FFL-like: weights that favour high losses, a fading channel, a receiver's noise; and reports,
on which weights depend.
"""

from dataclasses import replace

import numpy as np
import pytest
import small
import torch
from aggregates import aggregate_of, svd
from runs import NORM, run_rounds, snapshots_equal
from scipy.optimize import linprog
from tiers import STACK_FIRST, thorough_param

from fedlora_mpi.algorithm import Reports, Variables
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.ota_ffl_like import OtaFflLike
from fedlora_mpi.components import radio
from fedlora_mpi.components.simplex import favour_largest
from fedlora_mpi.core.losses import LOSSES
from fedlora_mpi.engine.train import ClientResult
from fedlora_mpi.federation.round import run_round

LOSS, MOMENTS, SEED = ".own.loss", ".own.moments", ".seed."
UNIFORM = FedAvg(weights="uniform")


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def without_seeds(shared):
    return radio.split_seeds(shared)[1]


def trained_variables(federation, state):
    """The variables of each client after training in the round of ``state``."""
    (group,) = federation.placement.groups
    personal = small.clone_tree(state.personal)
    results = federation.clients.trainer.train(group, state.shared, personal, state.round)
    return [r.end for r in sorted(results, key=lambda r: r.client)]


# The weights


def test_the_example_of_four_clients():
    lam = favour_largest(double(0.3, 1.2, 0.7, 0.1), 0.1) / 4
    assert torch.allclose(lam, double(0.15, 0.35, 0.35, 0.15), rtol=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.03, 0.11, 0.2, 0.7, 1.0, 5.0])
def test_the_weights_solve_the_linear_problem(epsilon):
    losses = np.random.default_rng(1).random(7)
    lam = favour_largest(torch.from_numpy(losses), epsilon).numpy() / 7
    bounds = (max(0, 1 / 7 - epsilon), 1 / 7 + epsilon)
    best = linprog(-losses, A_eq=np.ones((1, 7)), b_eq=[1], bounds=bounds)
    assert lam.sum() == pytest.approx(1) and lam @ losses == pytest.approx(-best.fun)
    assert lam.min() >= bounds[0] - 1e-12 and lam.max() <= bounds[1] + 1e-12
    assert (np.diff(lam[losses.argsort()]) >= 0).all()


def test_without_a_box_all_count_equally_and_with_the_largest_one_alone_does():
    losses = torch.rand(49, dtype=torch.float64)
    assert (favour_largest(losses, 0.0) == 1).all()
    alone = favour_largest(losses, 1.0)
    assert alone[losses.argmax()] == 49 and alone.count_nonzero() == 1


def test_between_equal_losses_the_first_client_comes_first():
    assert favour_largest(double(0.5, 2, 2, 2), 0.25).tolist() == [0, 2, 2, 0]
    assert favour_largest(double(1.0), 0.02).tolist() == pytest.approx([1])


# A round without noise


@STACK_FIRST
def test_without_a_box_and_noise_it_is_uniform_fedavg(stacked):
    ota, fedavg = (
        small.final_state(algorithm, "bn_net", stacked=stacked, participation=0.6)
        for algorithm in (OtaFflLike(epsilon=0.0, sigma=0.0), UNIFORM)
    )
    assert small.trees_equal(without_seeds(ota.shared), fedavg.shared)


def test_with_the_largest_box_the_model_is_that_of_the_worst_client():
    federation, state = small.make_experiment(OtaFflLike(epsilon=1.0, sigma=0.0), "bn_net")
    state = small.run_rounds(federation, state, 1)  # equal models have the loss of chance
    ends = trained_variables(federation, state)
    worst = max(ends, key=lambda end: end.personal[LOSS])
    assert worst is not ends[0]
    after = small.run_rounds(federation, state, 1).shared
    assert small.trees_equal(without_seeds(after), worst.shared)


@STACK_FIRST
def test_the_mean_and_its_drift_have_the_weights_of_the_losses_of_the_same_round(stacked):
    federation, state = small.make_experiment(
        OtaFflLike(epsilon=0.12, sigma=0.0), "bn_net", stacked=stacked
    )
    ends = trained_variables(federation, state)
    lam = favour_largest(torch.stack([end.personal[LOSS] for end in ends]), 0.12) / len(ends)
    assert lam.max() / lam.min() > 3
    state, row, _ = run_round(federation, state, evaluate=False, stop=False)
    mean = {
        n: sum(a * end.shared[n].double() for a, end in zip(lam, ends, strict=True))
        for n in ends[0].shared
    }
    small.assert_near(without_seeds(state.shared), mean)
    model = federation.clients.trainer.model
    parameters = [n for n in model.leaves if model.role(n) != "stats"]
    square = sum(
        a * sum((end.shared[n] - mean[n]).square().sum() for n in parameters)
        for a, end in zip(lam, ends, strict=True)
    )
    assert row["drift"] == pytest.approx(float(square) ** 0.5, rel=1e-4)


@STACK_FIRST
def test_clients_report_their_loss_before_training_and_the_moments_of_their_update(stacked):
    federation, state = small.make_experiment(OtaFflLike(), "bn_net", stacked=stacked)
    state = small.run_rounds(federation, state, 1)
    trainer, start = federation.clients.trainer, state.shared
    model = trainer.model
    for client, end in enumerate(trained_variables(federation, state)):
        data = trainer.feed.unshuffled_batch([client], all_samples=True)
        w = {n: start[n] for n in model.leaves}
        logits = model.eval_mode()(w, data.x[0])
        expected = LOSSES["cross_entropy"].each(logits, data.y[0]).mean()
        assert float(end.personal[LOSS]) == pytest.approx(float(expected), rel=1e-5)
        parameters = [n for n in model.leaves if model.role(n) != "stats"]
        D = np.concatenate([(end.shared[n] - start[n]).flatten().numpy() for n in parameters])
        moments = [D.mean(dtype=np.float64), D.std(dtype=np.float64)]
        assert end.personal[MOMENTS].tolist() == pytest.approx(moments, rel=1e-5)


# The channel


def channel_round(round_, clients=(0, 2, 5), moments=(0.2, 0.4, 0.1), sigma=0.3, **fields):
    """(the noise of 20,000 numbers, the metrics) of a round in which nobody has moved the mean."""
    algorithm, w = OtaFflLike(sigma=sigma, **fields), torch.linspace(-1, 1, 20_000)
    shared = {"w": w, "stats": torch.ones(3)}
    seeds = {SEED: torch.tensor(11.0), SEED + "w": torch.tensor(12.0)}
    numbers = torch.stack([double(1.0, 0.0, moment) for moment in moments])
    aggregate = aggregate_of({"w": w + 0.01, "stats": torch.zeros(3)}, round_=round_)
    aggregate = aggregate._replace(reports=Reports(clients, numbers))
    update = algorithm.server_update({}, shared | seeds, aggregate, svd)
    assert not update.shared["stats"].any() and update.shared.keys() == (shared | seeds).keys()
    return update.shared["w"] - aggregate.mean["w"], update.metrics


def test_the_noise_has_the_variance_of_the_scaled_receiver_anew_in_every_round():
    rounds = [channel_round(round_) for round_ in range(3)]
    for e, metrics in rounds:
        variance = 0.3**2 / (2 * metrics["c_star"])
        assert float(e.double().var()) == pytest.approx(variance, rel=0.04)
        assert abs(float(e.mean())) < 4 * (variance / 20_000) ** 0.5
        assert metrics["effective_snr"] == pytest.approx(0.01**2 / variance, rel=1e-3)
    unit = torch.stack([e / e.std() for e, _ in rounds])
    assert (torch.corrcoef(unit) - torch.eye(3)).abs().max() < 0.03
    again, _ = channel_round(1)
    assert torch.equal(again, rounds[1][0])


def test_the_scale_is_the_largest_at_which_no_client_exceeds_its_power():
    _, metrics = channel_round(4, epsilon=0.1)
    seeds, clients, moments = {SEED: torch.tensor(11.0)}, (0, 2, 5), double(0.2, 0.4, 0.1)
    gains = radio.fading_powers(seeds, clients, 4)
    lam = favour_largest(double(1, 1, 1), 0.1) / 3
    powers = (lam * moments).square() * metrics["c_star"] / gains  # |b_k|^2
    assert float(powers.max()) == pytest.approx(1) and (powers <= 1 + 1e-12).all()


def test_without_noise_or_without_a_move_nothing_is_added():
    e, metrics = channel_round(0, sigma=0.0)
    assert not e.any() and np.isnan(metrics["effective_snr"]) and metrics["c_star"] > 0
    e, metrics = channel_round(0, moments=(0.0, 0.0, 0.0))
    assert not e.any() and np.isnan(metrics["effective_snr"]) and np.isnan(metrics["c_star"])


def test_the_noise_vanishes_with_the_signal_to_noise_ratio():
    (loud, low), (quiet, high) = (channel_round(2, sigma=sigma) for sigma in (1.0, 1e-3))
    assert quiet.abs().max() < 2e-3 * loud.abs().max()
    assert high["effective_snr"] == pytest.approx(1e6 * low["effective_snr"])
    assert high["c_star"] == low["c_star"]


def test_fading_is_exponential_and_a_clients_own_in_each_round():
    seeds, clients = {SEED: torch.tensor(3.0)}, range(1500)
    gains = radio.fading_powers(seeds, clients, 0)
    assert float(gains.mean()) == pytest.approx(1, abs=0.1)
    for quantile in (0.1, 0.5, 0.9):
        share = (gains < -np.log(1 - quantile)).double().mean()
        assert float(share) == pytest.approx(quantile, abs=0.04)
    assert torch.equal(radio.fading_powers(seeds, (7, 3), 0), gains[[7, 3]])
    other = radio.fading_powers(seeds, clients, 1)
    assert abs(float(torch.corrcoef(torch.stack([gains, other]))[0, 1])) < 0.1


def test_parameters_have_noise_of_their_own():
    model = small.make_model("bn_net")
    seeds = radio.draw_seeds(model, torch.Generator().manual_seed(1))
    like = {n: torch.zeros(4) for n in model.leaves}
    noise = radio.receiver_noise(seeds, like, 2.0, 0)
    assert set(noise) == {n for n in model.leaves if model.role(n) != "stats"}
    assert len({v.sum().item() for v in noise.values()}) == len(noise)


# Reports


RUN = "algorithm=ota_ffl_like", NORM, "rounds=2"


@pytest.mark.parametrize(
    "ranks, uplink",
    [(2, "sum"), (3, "gather"), thorough_param(3, "sum"), thorough_param(1, "gather")],
)
def test_the_bits_do_not_depend_on_ranks_or_on_how_uploads_travel(ranks, uplink):
    for moments in run_rounds(*RUN, f"uplink={uplink}", ranks=ranks):
        for a, b in zip(run_rounds(*RUN)[0], moments, strict=True):
            assert snapshots_equal(a, b)
            for key in {"drift", "c_star", "effective_snr"} & a.row.keys():
                assert a.row[key] == b.row[key]


def test_the_fast_sum_has_the_same_weights():
    exact, fast = run_rounds(*RUN)[0][-1], run_rounds(*RUN, "reduce=fast", ranks=3)[0][-1]
    small.assert_near(fast.shared, exact.shared)
    assert exact.row["bytes_up"] == fast.row["bytes_up"]


def test_the_log_has_the_scale_and_the_effective_ratio_of_every_round():
    for moment in run_rounds(*RUN)[0][1:]:
        assert moment.row["c_star"] > 0 and moment.row["effective_snr"] > 0


def offered(losses, **fields):
    """(federation, uploads) of five clients whose models are their numbers plus 1."""
    federation, state = small.make_experiment(OtaFflLike(epsilon=0.1, sigma=0.0), "cnn")
    federation = replace(federation, aggregator=replace(federation.aggregator, **fields))
    cohort = federation.cohorts.sample(0)
    uploads = federation.aggregator.collect(cohort, state.shared, torch.device("cpu"))
    for client, loss in enumerate(losses):
        model = {n: torch.full_like(v, client + 1) for n, v in without_seeds(state.shared).items()}
        v = Variables(model, {LOSS: torch.tensor(loss), MOMENTS: torch.ones(2)})
        result = ClientResult(client, v, v, torch.tensor(1.0), None, v.personal)
        assert federation.aggregator.add(uploads, result) == np.isfinite(loss)
    return federation, uploads


def test_a_client_whose_report_is_not_finite_is_left_out_and_the_others_share_its_weight():
    federation, uploads = offered((0.1, 0.9, float("nan"), 0.5, 0.3), skip_nonfinite=True)
    received = federation.aggregator.aggregate(uploads, stop=False)
    assert received.active == {0, 1, 3, 4} and received.trained == 4
    assert received.aggregate.reports.clients == (0, 1, 3, 4)
    expected = 0.15 * 1 + 0.35 * 2 + 0.35 * 4 + 0.15 * 5
    for v in received.aggregate.mean.values():
        assert torch.allclose(v, torch.full_like(v, expected))


def test_nobody_left_changes_nothing():
    federation, uploads = offered((float("nan"),) * 5, skip_nonfinite=True)
    received = federation.aggregator.aggregate(uploads, stop=False)
    assert received.aggregate is None and not received.active


def test_reports_travel_in_the_first_message_of_a_round():
    sizes = []
    federation, uploads = offered(
        (0.1, 0.9, 0.2, 0.5, 0.3), all_reduce=lambda b: sizes.append(b.nbytes)
    )
    received = federation.aggregator.aggregate(uploads, stop=False)
    assert sizes[0] == 5 * 4 * 8 and len(sizes) == 2 and received.message_bytes == sum(sizes)
    assert received.numbers_sent == 5 * (federation.clients.types[0].upload_layout.size + 3)


def test_settings_out_of_bounds_are_refused():
    for key in ("epsilon", "sigma"):
        with pytest.raises(ValueError, match=f"{key} = -1: must be a number of at least 0"):
            OtaFflLike(**{key: -1})
