"""The ``privacy`` block: clipped and noised updates, their epsilon, and masks that only a sum comes
out of.
"""

import json
import math
import sys
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from runs import (
    NORM,
    TESTS,
    TINY,
    assert_near,
    assert_same_run,
    build_tiny,
    mpirun_command,
    run_process,
    run_rounds,
    snapshots_equal,
    tiny_config,
    trees_equal,
)

from fedlora_mpi import config as configs
from fedlora_mpi.aggregation.exact_sum import ExactSum
from fedlora_mpi.algorithm import Transport
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.cli import main
from fedlora_mpi.config import ConfigError
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.experiment.checkpointing import initial_state
from fedlora_mpi.experiment.loop import resume, start
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.mpi.ending import Fault
from fedlora_mpi.privacy import accountant, masks
from fedlora_mpi.privacy.check import check_run
from fedlora_mpi.privacy.clipping import clip_update
from fedlora_mpi.privacy.settings import Privacy
from fedlora_mpi.store.reader import RunFiles

thorough = pytest.mark.thorough
SECURE = "privacy.secure_aggregation=true"
FEDAVG = ("algorithm=fedavg", "algorithm.weights=uniform")
METHODS = {
    "fedavg": (),  # by samples
    "fedlora": (NORM,),  # absent: stale; BatchNorm
    "scaffold": ("train.momentum=0", "train.lr=0.1"),  # two channels
    "fedit": ("algorithm.lora_ranks=[3, 2]",),  # uploads of two sizes
    "fd": (),  # sums
}
without_library = accountant.find_spec("dp_accounting") is None
counted = pytest.mark.skipif(
    without_library, reason="needs dp-accounting: pip install 'fedlora-mpi[privacy]'"
)


def how(name):
    return (f"algorithm={name}", *METHODS[name])


def flat(tree):
    return torch.cat([v.flatten().double() for v in tree.values()])


# --- secure aggregation


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("fedavg", "scaffold", "fd") else pytest.param(name, marks=thorough)
        for name in METHODS
    ],
)
def test_masks_leave_the_mean_to_the_bit(name):
    plain, secure = run_rounds(*how(name))[0], run_rounds(*how(name), SECURE)[0]
    assert all(snapshots_equal(a, b) for a, b in zip(plain, secure, strict=True))


@pytest.mark.parametrize(
    "name, ranks, more",
    [
        ("fedavg", 3, ()),
        ("fedlora", 3, ("privacy.neighbours=2",)),
        pytest.param("fedavg", 2, ("privacy.neighbours=2",), marks=thorough),
        pytest.param("scaffold", 2, (), marks=thorough),
    ],
)
def test_masks_cancel_over_ranks(name, ranks, more):
    plain, secure = run_rounds(*how(name))[0], run_rounds(*how(name), SECURE, *more, ranks=ranks)
    assert all(snapshots_equal(plain[-1], moments[-1]) for moments in secure)


@thorough
def test_masks_cancel_under_mpirun(tmp_path):
    runs = [
        ["run", str(TINY), "algorithm=fedavg", "rounds=2", f"output={name}", *more]
        for name, more in (("plain", ()), ("masked", (SECURE,)))
    ]
    line = [
        *mpirun_command(3),
        sys.executable,
        str(TESTS / "several.py"),
        "codes",
        json.dumps(runs),
    ]
    ended = run_process(line, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert_same_run(tmp_path / "plain", tmp_path / "masked")


@pytest.fixture
def handed(monkeypatch):
    """All that clients hand over while the test runs: (client, masked integers, what they stand
    for).
    """
    met, real = [], masks.add_masks

    def watched(buffer, client, *rest):
        met.append((client, real(buffer, client, *rest), buffer.copy()))
        return met[-1][1].copy()

    monkeypatch.setattr(masks, "add_masks", watched)
    return met


def uniform(integers):
    """Whether the bytes of int64 numbers look uniform: chi-square with 255 degrees of freedom, 5
    deviations.
    """
    counts = np.bincount(np.ascontiguousarray(integers).view(np.uint8).ravel(), minlength=256)
    chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return abs(chi - 255) < 5 * (2 * 255) ** 0.5


def test_a_rank_gets_nothing_of_a_client_but_uniform_numbers(handed):
    parts = build_tiny(*FEDAVG, SECURE)
    run_round(parts.federation, initial_state(parts), evaluate=False, stop=False)
    assert (
        sorted(client for client, *_ in handed)
        == sorted(parts.federation.cohorts.sample(0).members)
        and len(handed) == 4
    )
    for _, sent, own in handed:
        assert uniform(sent) and not uniform(own)
    assert (sum(sent for _, sent, _ in handed) == sum(own for *_, own in handed)).all()
    for some in combinations(handed, 3):  # without one client nothing can be read of the others
        assert uniform(sum(sent for _, sent, _ in some))


def test_every_message_goes_through_the_masks(monkeypatch):
    """A client's numbers reach the rank's buffer only as what ``masked`` gives: with zeros from it
    nothing arrives.
    """
    monkeypatch.setattr(masks, "add_masks", lambda buffer, *rest: np.zeros_like(buffer))
    message = ExactSum(9)
    with masks.masked_messages(Privacy(secure_aggregation=True), message, range(5), 1, 0)(2) as own:
        own.add(torch.ones(5), 3)
    assert not message.buffer.any() and own.buffer.any()


def test_messages_under_one_key_differ_by_their_uploads_alone():
    stream = np.random.default_rng(5)
    one, other = stream.integers(-(2**63), 2**63 - 1, (2, 2, 31))
    others = (0, 1, 4, 6)
    a, b = (masks.add_masks(buffer, 2, others, 1, 3) for buffer in (one, other))
    assert (a - b == one - other).all() and (a != one).all()
    assert (masks.add_masks(one, 2, others, 1, 4) != a).all()  # other masks in another round


@pytest.mark.parametrize("missing", [0, 4])
def test_without_one_partners_mask_nothing_can_be_read(missing):
    zeros = np.zeros((2, 5000), np.int64)
    sent = masks.add_masks(zeros, 2, (0, 1, 4), 1, 3)
    known = [masks.add_masks(zeros, 2, (other,), 1, 3) for other in (0, 1, 4) if other != missing]
    assert (
        uniform(sent - sum(known))
        and not (sent - sum(known) - masks.add_masks(zeros, 2, (missing,), 1, 3)).any()
    )


def test_one_mask_too_few_is_seen_in_the_mean(monkeypatch):
    real = masks.neighbours

    def torn(chosen, *rest):
        among = dict(real(chosen, *rest))
        first = min(chosen)
        return among | {first: among[first][1:]}

    plain = run_rounds(*FEDAVG)[0][1].shared
    monkeypatch.setattr(masks, "neighbours", torn)
    try:
        found = run_rounds(*FEDAVG, SECURE, "rounds=1", "checkpoint.keep=5")[0][1].shared
    except (Fault, ValueError, OverflowError):  # the numbers behind the upload are as wrong
        return
    assert not trees_equal(plain, found)


@pytest.mark.parametrize("clients, number", [(3, None), (7, 2), (8, 4), (5, 4), (4, 6), (40, 8)])
def test_neighbours_are_mutual_and_equally_many(clients, number):
    chosen = [3 * client + 1 for client in range(clients)]
    among = masks.neighbours(chosen, number, 1, 2)
    assert sorted(among) == chosen
    for client, others in among.items():
        assert len(others) == len(set(others) - {client}) == min(number or clients, clients - 1)
        assert all(client in among[other] for other in others)
    if number and number < clients - 2:
        assert among != masks.neighbours(chosen, number, 1, 3)


BREAKS = (
    "algorithm=user_parts:Breaks",
    "algorithm.weights=uniform",
    "participation=1.0",
    "rounds=2",
)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=thorough), 3])
def test_one_client_that_breaks_is_named_under_masks(ranks):
    with pytest.raises(Fault, match="round 1: the loss or upload of client 2 is not finite"):
        run_rounds(*BREAKS, SECURE, ranks=ranks)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=thorough), 3])
def test_one_client_that_is_skipped_leaves_no_mask(ranks):
    skip = "faults.non_finite=skip"
    plain, secure = run_rounds(*BREAKS, skip)[0], run_rounds(*BREAKS, skip, SECURE, ranks=ranks)[0]
    assert plain[-1].row["clients"] == 6 and all(
        snapshots_equal(a, b) for a, b in zip(plain, secure, strict=True)
    )


@counted
def test_one_client_that_is_skipped_leaves_its_noise_and_its_place():
    clients = (*DRAWS["clients"], "participation=1.0", "rounds=2", "faults.non_finite=skip")
    whole, broken = (
        run_rounds(f"algorithm={name}", "algorithm.weights=uniform", *clients)[0][1].shared
        for name in ("fedavg", "user_parts:Breaks")
    )
    # updates are clipped to nothing: what is left is the noise
    assert (flat(whole) - flat(broken)).norm() < 1e-6


@pytest.mark.parametrize("block", [SECURE, "privacy.clip=1"])
def test_uploads_do_not_travel_one_by_one(block):
    fedhl = ("algorithm=fedhl", "algorithm.lora_ranks=[1]", "model.hidden=64", "participation=0.5")
    assert build_tiny(*fedhl).federation.aggregator.gathers
    if block == SECURE:
        assert not build_tiny(*fedhl, block).federation.aggregator.gathers
    else:
        assert not build_tiny("algorithm=fedit", *fedhl[1:], block).federation.aggregator.gathers


# --- clipping


def vectors(*lengths):
    """Vectors of these norms around a common point, and the point; [31] each."""
    point = torch.randn(31, generator=rng(1, "point"))
    away = [
        torch.randn(31, generator=rng(1, "away", k), dtype=torch.float64)
        for k in range(len(lengths))
    ]
    return [(point + n * v / v.norm()).float() for n, v in zip(lengths, away, strict=True)], point


def test_longer_updates_get_the_norm_and_keep_their_direction():
    (upload, far), point = vectors(2.5, 1e6)
    for vector in (upload, far):
        update = clip_update(vector, point, 0.7)
        assert update.dtype == torch.float64 and update.norm().item() == pytest.approx(
            0.7, rel=1e-14
        )
        assert torch.allclose(
            update / 0.7, (vector.double() - point) / (vector.double() - point).norm(), rtol=1e-12
        )


def test_shorter_updates_are_untouched_to_the_bit():
    (upload, same_length), point = vectors(0.69, 0.0)
    assert torch.equal(clip_update(upload, point, 0.7), upload.double() - point)
    assert not clip_update(same_length, point, 0.7).any()


@pytest.mark.parametrize(
    "name, more",
    [
        ("fedavg", ("algorithm.weights=uniform",)),
        ("fedlora", ()),
        pytest.param("fedlora", ("algorithm.bn_stats=local", NORM), marks=thorough),
        pytest.param("scaffold", ("train.momentum=0", "train.lr=0.1"), marks=thorough),
    ],
)
def test_a_wide_clip_without_noise_is_the_method_with_equal_weights(name, more):
    settings = (f"algorithm={name}", *more)
    wide = run_rounds(*settings, "privacy.clip=1.0e+6", "privacy.sampling=fixed")[0]
    plain = run_rounds(*settings)[0]
    assert all(
        trees_equal(a.shared, b.shared) and trees_equal(a.personal, b.personal)
        for a, b in zip(plain, wide, strict=True)
    )


@pytest.mark.parametrize(
    "name",
    [
        "fedit",
        *(pytest.param(name, marks=thorough) for name in ("ffa_lora", "fedsa_lora", "rolora")),
    ],
)
def test_a_wide_clip_leaves_methods_of_factors_too(name):
    equal_sizes = "data.partition={kind: iid, clients: 7, train: 30, test: 15}"
    settings = (f"algorithm={name}", "algorithm.lora_ranks=[3]", "train.lr=0.02", equal_sizes)
    wide = run_rounds(*settings, "privacy.clip=1.0e+6", "privacy.sampling=fixed")[0]
    assert len(set(build_tiny(*settings).federation.clients.sizes)) == 1  # they weigh by samples
    assert_near(run_rounds(*settings)[0][-1].shared, wide[-1].shared)


@pytest.mark.parametrize("name", ["fedavg", "fedlora"])
def test_a_round_moves_the_model_by_the_clip_at_most(name):
    moments = run_rounds(
        f"algorithm={name}", "privacy.clip=0.01", "privacy.sampling=fixed", "participation=1.0"
    )[0]
    moved = [(flat(b.shared) - flat(a.shared)).norm().item() for a, b in pairwise(moments)]
    assert all(0.001 < length < 0.01 for length in moved)  # all were clipped, and do not agree


def test_clients_count_equally_whatever_the_method_says():
    by_samples = run_rounds("algorithm=fedavg", "privacy.clip=1.0", "privacy.sampling=fixed")[0]
    equally = run_rounds(*FEDAVG, "privacy.clip=1.0", "privacy.sampling=fixed")[0]
    assert snapshots_equal(by_samples[-1], equally[-1])


def test_control_variates_are_clipped_around_zero():
    """What SCAFFOLD sends of them is a change;
    measured from c it would not vanish with the clip."""
    settings = (
        "algorithm=scaffold",
        *METHODS["scaffold"],
        "privacy.clip=1.0e-9",
        "participation=1.0",
    )
    moments = run_rounds(*settings)[0]
    assert all((flat(moment.shared) - flat(moments[0].shared)).norm() < 1e-7 for moment in moments)
    # c moves in round 1 ...
    wide = run_rounds(*settings[:-2], "privacy.clip=1.0", "participation=1.0")[0][1].shared
    assert flat({n: v for n, v in wide.items() if n.startswith(".c.")}).norm() > 0.01


# --- noise: of updates that are clipped to nothing

NOISE = ("privacy.clip=1.0e-9", "privacy.noise_multiplier=1.0e+9")  # of deviation 1 on the sum
DRAWS = {
    "server": (*NOISE, "participation=1.0"),
    "fixed": (*NOISE, "privacy.sampling=fixed"),  # 4 of 7 clients
    "clients": (*NOISE, "privacy.sampling=fixed", "privacy.noise=clients", SECURE),
}


def noises(*settings, ranks=1):
    """The noise on the sum in each round, [T, D]."""
    moments = run_rounds(*FEDAVG, *settings, ranks=ranks)[0]
    total = 7 if "participation=1.0" in settings else 4
    return torch.stack([total * (flat(b.shared) - flat(a.shared)) for a, b in pairwise(moments)])


@counted
@pytest.mark.parametrize("of", DRAWS)
def test_the_noise_has_its_deviation_and_is_new_in_each_round(of):
    drawn = noises(*DRAWS[of])
    T, D = drawn.shape
    assert D > 500
    chi = drawn.square().sum(1)
    assert ((chi - D).abs() < 4.5 * (2 * D) ** 0.5).all() and (
        drawn.sum(1).abs() < 4.5 * D**0.5
    ).all()
    among = drawn @ drawn.T - torch.diag(chi)
    assert (among.abs() < 4.5 * D**0.5).all()  # uncorrelated over the rounds


@counted
@pytest.mark.parametrize(
    "of, ranks",
    [
        ("server", 3),
        ("clients", 3),
        *(pytest.param(of, 2, marks=thorough) for of in ("fixed", "clients")),
    ],
)
def test_the_noise_is_the_same_on_any_number_of_ranks(of, ranks):
    one, several = run_rounds(*FEDAVG, *DRAWS[of])[0], run_rounds(*FEDAVG, *DRAWS[of], ranks=ranks)
    assert all(snapshots_equal(one[-1], moments[-1]) for moments in several)


@counted
@pytest.mark.parametrize(
    "more", [pytest.param((), marks=thorough), ("privacy.sampling=fixed", "privacy.noise=clients")]
)
def test_a_resume_goes_on_with_noise_and_epsilon(tmp_path, more):
    settings = [*FEDAVG, "privacy.clip=1.0", "privacy.noise_multiplier=0.5", *more]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start(configs.read(TINY, [*settings, f"output={whole}"]), str(TINY), Solo())
    start(configs.read(TINY, [*settings, "rounds=2", f"output={parts}"]), str(TINY), Solo())
    resume(parts, ["rounds=4"], Solo())
    assert_same_run(whole, parts)
    spent = RunFiles(whole).rounds()["epsilon"]
    assert len(spent) == 4 and (np.diff(spent) > 0).all() and np.isfinite(spent).all()


# --- who takes part


def test_a_poisson_cohort_is_drawn_client_by_client():
    federation = build_tiny(*FEDAVG, "privacy.clip=1.0").federation
    cohorts = [federation.cohorts.sample(round_).members for round_ in range(2000)]
    held = np.array([[client in chosen for client in range(7)] for chosen in cohorts])
    assert abs(held.mean(0) - 0.6).max() < 4.5 * (0.24 / 2000) ** 0.5
    sizes = held.sum(1)
    assert sizes.min() <= 1 and sizes.max() == 7 and abs(sizes.var() - 7 * 0.24) < 0.3
    weights = [
        federation.cohorts.weight_of(members, federation.clients)
        for members in (cohorts[0], frozenset())
    ]
    assert weights[0] == weights[1] == federation.cohorts.sample(0).weight == pytest.approx(4.2)
    # without privacy, as ever
    assert (
        len(
            {
                len(build_tiny(*FEDAVG).federation.cohorts.sample(round_).members)
                for round_ in range(20)
            }
        )
        == 1
    )


@counted
@pytest.mark.parametrize(
    "name, noise", [("fedavg", "server"), ("fedavg", "clients"), ("fedlora", "server")]
)
def test_a_round_of_nobody_moves_by_noise_alone(name, noise):
    block = ("privacy.clip=1.0", "privacy.noise_multiplier=0.5", f"privacy.noise={noise}")
    moments = run_rounds(f"algorithm={name}", "participation=0.1", *block)[0]
    sizes = [int(moment.row["clients"]) for moment in moments[1:]]
    assert 0 in sizes
    D, total = len(flat(moments[0].shared)), {"fedavg": 0.7, "fedlora": 7}[name]  # stale: all count
    for before, after, size in zip(moments, moments[1:], sizes, strict=False):
        moved = total * (flat(after.shared) - flat(before.shared)) / 0.5
        bound = (D + 4.5 * (2 * D) ** 0.5) ** 0.5 + 2 * size
        assert (D - 4.5 * (2 * D) ** 0.5) ** 0.5 - 2 * size < moved.norm() < bound
        assert math.isnan(after.row["train_loss"]) == (not size)


@pytest.mark.parametrize("name, more", [("fedlora", ()), ("scaffold", METHODS["scaffold"])])
def test_the_mean_is_over_those_who_are_expected(name, more):
    """In a round that happens to have all of 7 clients where 6.3 are expected."""
    settings = (f"algorithm={name}", *more, "rounds=1")
    seed = next(
        s
        for s in range(100)
        if (torch.rand(7, generator=rng(s, "cohort", 0), dtype=torch.float64) < 0.9).all()
    )
    drawn = run_rounds(*settings, f"seed={seed}", "participation=0.9", "privacy.clip=1.0e+6")[0]
    plain = run_rounds(*settings, f"seed={seed}", "participation=1.0")[0]
    assert drawn[1].row["clients"] == 7
    # stale: absent or not, all 7 count
    start, ratio = plain[0].shared, {"fedlora": 1, "scaffold": 7 / 6.3}[name]
    for leaf, value in plain[1].shared.items():
        # c <- c + |S| / N times the mean: the sum over N
        own = 1 if leaf.startswith(".c.") else ratio
        torch.testing.assert_close(
            drawn[1].shared[leaf], start[leaf] + own * (value - start[leaf]), rtol=1e-4, atol=1e-5
        )


# --- epsilon


def private(noise_multiplier, sampling="poisson", delta=1e-5):
    return Privacy(clip=1.0, noise_multiplier=noise_multiplier, sampling=sampling, delta=delta)


@counted
@pytest.mark.parametrize(
    "noise, epochs, published", [(1.3, 15, 1.19), (1.1, 60, 3.01), (0.7, 45, 7.10)]
)
def test_epsilon_is_that_of_the_tutorial_of_dp_sgd(noise, epochs, published):
    """TensorFlow Privacy's MNIST tutorial: 60,000 samples, batches of 256, delta 1e-5, by Mironov's
    conversion.
    """
    q, steps = 256 / 60000, epochs * 60000 // 256
    orders, divergences = accountant._round_divergences(noise, (q,))
    classic = min(steps * divergences + math.log(1e5) / (orders - 1))
    assert classic == pytest.approx(published, abs=0.006)
    ours = accountant.epsilon(private(noise), q, 0, 0, steps)  # by a better conversion
    assert 0.75 * published < ours < published


@counted
def test_epsilon_of_everybody_is_that_of_the_gaussian_mechanism():
    def rdp(sensitivity):
        return min(
            25 * a * (sensitivity / 4) ** 2 / 2 + math.log1p(-1 / a) - math.log(1e-5 * a) / (a - 1)
            for a in [1 + x / 10 for x in range(1, 100)] + [*range(11, 64), 128, 256]
        )

    assert accountant.epsilon(private(4.0), 1.0, 7, 7, 25) == pytest.approx(rdp(1))
    # One in the place of another moves a sum of clipped updates by twice the clip.
    assert accountant.epsilon(private(4.0, "fixed"), 1.0, 7, 7, 25) == pytest.approx(rdp(2))


@counted
def test_epsilon_grows_with_rounds_and_share_and_falls_with_noise():
    def of(z=2.0, q=0.25, n=10, rounds=25, how="poisson"):
        return accountant.epsilon(private(z, how), q, n, 40, rounds)

    assert of(rounds=0) == 0 < of(rounds=1) < of(rounds=2) < of() < of(rounds=50)
    assert of(z=4.0) < of() < of(z=1.0) and of(q=0.1) < of() < of(q=1.0)
    assert of(n=4, how="fixed") < of(how="fixed") < of(n=40, how="fixed") and of() < of(how="fixed")
    # never above that of everybody
    assert of(z=0.4, n=20, how="fixed") == pytest.approx(of(z=0.4, n=40, how="fixed"))


def test_without_noise_epsilon_is_infinite_and_needs_no_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)  # an import would fail
    for name, more in (("clipped", ["privacy.clip=1.0"]), ("plain", []), ("masked", [SECURE])):
        start(
            configs.read(TINY, [*FEDAVG, "rounds=1", f"output={tmp_path / name}", *more]),
            str(TINY),
            Solo(),
        )
    assert RunFiles(tmp_path / "clipped").rounds()["epsilon"].tolist() == [math.inf]
    assert (
        "epsilon"
        not in RunFiles(tmp_path / "plain").rounds() | RunFiles(tmp_path / "masked").rounds()
    )


def test_a_missing_library_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(accountant, "find_spec", lambda name: None)
    assert (
        main(
            ["plan", str(TINY), "algorithm=fedavg", "privacy.clip=1", "privacy.noise_multiplier=1"]
        )
        == 2
    )
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "privacy.noise_multiplier = 1.0" in said[0]
    assert "pip install 'fedlora-mpi[privacy]'" in said[0]


@counted
def test_plan_tells_the_epsilon_of_all_rounds(capsys):
    asked = ["plan", str(TINY), "algorithm=fedavg", "privacy.clip=1"]
    assert main([*asked, "privacy.noise_multiplier=2", "rounds=9"]) == 0
    expected = accountant.epsilon(private(2.0), 0.6, 0, 0, 9)
    said = capsys.readouterr().out
    assert (
        f"epsilon {expected:.3g} at delta 1e-05 after 9 rounds, for one client more or less" in said
    )
    assert f"deviation {2 / 4.2:.2g}" in said
    assert main([*asked, "participation=0.01"]) == 0  # about nobody
    assert "epsilon inf" in capsys.readouterr().out


# --- the block


def test_the_block_is_not_there_at_its_defaults():
    plain, same_again = (
        tiny_config(),
        configs.read(TINY, ["privacy.delta=1.0e-5", "privacy.secure_aggregation=false"]),
    )
    assert plain == same_again and "privacy" not in configs.resolved_dict(plain)
    private_ = configs.read(TINY, ["privacy.clip=2", "privacy.sampling=fixed"])
    assert configs.digest(private_) != configs.digest(plain) == configs.digest(same_again)
    assert configs.from_dict(configs.resolved_dict(private_), "again") == private_


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["privacy.noise_multiplier=1"], "privacy.noise_multiplier = 1.0: needs a clip"),
        (["privacy.sampling=fixed"], "privacy.sampling = fixed: needs a clip"),
        (["privacy.clip=0"], "privacy.clip = 0.0: must be a number above 0, or null"),
        (["privacy.clip=1", "privacy.delta=0"], "privacy.delta = 0.0: must be"),
        (
            ["privacy.clip=1", "privacy.noise_multiplier=-1"],
            "privacy.noise_multiplier = -1.0: must be",
        ),
        (["privacy.clip=1e6", "privacy.noise_multiplier=1e6"], "times clip must be at most 1e9"),
        (["privacy.neighbours=4"], "privacy.neighbours = 4: needs secure_aggregation"),
        ([SECURE, "privacy.neighbours=3"], "privacy.neighbours = 3: must be an even number"),
        ([SECURE, "reduce=fast"], "reduce = fast: masks cancel in integers alone"),
        ([SECURE, "uplink=gather"], "uplink = gather: shows the server every upload"),
        (
            [SECURE, "privacy.clip=1"],
            "privacy.sampling = poisson: cohorts may be of one or two clients",
        ),
        (["privacy.clip=1", "uplink=gather"], "uplink = gather: shows the server every upload"),
        (
            ["privacy.clip=1", "data.tasks={classes: 2, rounds: 1}"],
            "privacy.clip = 1.0: does not go with data.tasks",
        ),
        (["privacy.clipp=1"], "Did you mean clip?"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(overrides, said):
    with pytest.raises(ConfigError) as refusal:
        configs.read(TINY, overrides)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "settings, said",
    [
        (
            ("algorithm=fedamp", "privacy.clip=1"),
            "privacy.clip = 1.0: fedamp makes a mix of its own for every client",
        ),
        (("algorithm=fedamp", SECURE), "privacy.secure_aggregation = true: fedamp makes a mix"),
        (
            ("algorithm=ota_ffl_like", SECURE),
            "privacy.secure_aggregation = true: clients of ota_ffl_like report numbers one by one",
        ),
        (
            ("algorithm=fedavg", "participation=0.3", SECURE),
            "privacy.secure_aggregation = true: a cohort has 2 clients",
        ),
        (
            ("algorithm=fedavg", "privacy.clip=1", NORM),
            "privacy.clip = 1.0: fedavg shares running statistics of BatchNorm",
        ),
        (("algorithm=local", "privacy.clip=1"), "privacy.clip = 1.0: local sends nothing"),
        (("algorithm=fd", "privacy.clip=1"), "privacy.clip = 1.0: fd sends sums"),
        (
            ("algorithm=fedproto", "privacy.clip=1"),
            "privacy.clip = 1.0: fedproto sends class.means",
        ),
        (
            ("algorithm=fedhl", "privacy.clip=1"),
            "privacy.clip = 1.0: fedhl has a server that makes",
        ),
        (("algorithm=hetlora", "privacy.clip=1"), "privacy.clip = 1.0: hetlora"),
        (
            ("algorithm=fedit", "algorithm.lora_ranks=[3, 2]", "privacy.clip=1"),
            "privacy.clip = 1.0: fedit has a server",
        ),
    ],
)
def test_methods_that_cannot_be_private_are_refused(settings, said):
    with pytest.raises(Exception) as refusal:
        build_tiny(*settings)
    assert said in str(refusal.value) and refusal.value.code == 2 and "\n" not in str(refusal.value)


@dataclass(frozen=True)
class Shifted(FedAvg):
    """Clients begin a round with other weights than each other."""

    shift: float = 0.0

    def transport(self, client, clients):
        return Transport(self, download=self.receive)

    def receive(self, shared):
        return {n: v + self.shift for n, v in shared.items()}


def test_clients_without_a_common_start_are_refused():
    clients = build_tiny(*FEDAVG).federation.clients
    first, trainer = clients.types[0].initial, clients.trainer
    model, train = trainer.model, trainer.settings

    def types(*shifts):
        transports = [Shifted(shift=shift).transport(0, 1) for shift in shifts]
        return [(transport, model, first) for transport in transports]

    check_run(Privacy(clip=1.0), "shifted", 4, False, types(0.5, 0.5), train)
    with pytest.raises(
        ValueError, match="clip = 1.0: clients of shifted would send other variables"
    ):
        check_run(Privacy(clip=1.0), "shifted", 4, False, types(0.5, 0.25), train)
