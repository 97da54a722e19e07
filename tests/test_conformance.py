"""What every algorithm owes, checked for each file of the folder ``algorithms/``: nobody registers a test."""

import dataclasses
import inspect
import shutil
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from runs import NORM, TINY, assert_near, assert_same_run, built, equal, played, tiny

from fedlora_mpi import algorithms
from fedlora_mpi.algorithm import Algorithm, Vars
from fedlora_mpi.build import load_data
from fedlora_mpi.comm import Solo
from fedlora_mpi.config import read
from fedlora_mpi.data.partition import KINDS, DirichletClass
from fedlora_mpi.run import resume, start
from fedlora_mpi.tree import numel

# `make test` checks those of the foundation, `make test-slow` all others.
QUICK = ("fedavg", "fedlora", "local", "local_lora", "fedavg_lora")
NAMES = algorithms.names()
FIELDS = [(name, field.name) for name in NAMES for field in dataclasses.fields(algorithms.find(name))]


def marked(name: str, *more: str):
    """The parameters of one case, slow unless the algorithm is one of the quick ones."""
    return pytest.param(name, *more, marks=[] if name in QUICK else [pytest.mark.slow])


every_algorithm = pytest.mark.parametrize("name", [marked(name) for name in NAMES])
WIDTH = "model.width=4"  # as in tiny.yaml
both_models = pytest.mark.parametrize("model", [WIDTH, NORM], ids=["cnn", "norm"])

# Settings that the tiny experiment needs for a method: its default does not fit three epochs with momentum.
SETTINGS = {
    "fedavg_ft": ("algorithm.ft_epochs=1",),
    "fedrep": ("algorithm.head_epochs=1",),
    "moon": ("algorithm.mu=0.1",),
    "pfedme": ("train.momentum=0", "train.lr=0.1"),
    "scaffold": ("train.momentum=0", "train.lr=0.1"),
}

# A field that is no Literal is tried with half its default (an integer: one more). Here is what needs
# another value, or other settings in both runs: {field or method.field: (settings, value)}.
ALTERNATIVES = {
    "conv_rank": ((), "0.3"),
    "linear_rank": ((), "0.25"),
    "rank_rule": (("algorithm.linear_rank=1",), "official"),  # a ratio for one rule, a rank for the other
    "layers": ((), "[head.*]"),
    "lora_epochs": ((), "1"),
    "apfl.alpha_decay": ((), "0.5"),
    "fedadagrad.beta1": ((), "0.5"),
    "fedamp.decay": (("algorithm.decay_every=1",), "0.01"),
    "fedamp.decay_every": ((), "1"),
    "fedamp.alpha_min": (("algorithm.decay_every=1", "algorithm.decay=1.0e-6"), "1.0"),
    "fedamp.self_weight": (("algorithm.heuristic=true",), "0.5"),
    "fedcac.beta": ((), "1"),
    "fedper.personal": ((), "[head, norm]"),
    "pfedgate.straight_through": (("algorithm.sparsity=0.5",), "false"),
    "fedrep.head_epochs": ((), "2"),
    "fedavg_ft.ft_epochs": ((), "2"),
}


def run(name: str, *overrides: str, ranks: int = 1):
    """The moments of rank 0."""
    return played(*of(name), *overrides, ranks=ranks)[0]


def of(name: str) -> tuple[str, ...]:
    """The overrides that choose an algorithm."""
    return f"algorithm={name}", *SETTINGS.get(name, ())


def same(a, b) -> bool:
    """Whether two moments agree to the bit in variables and clients' results, and in all rounds' numbers but
    times and MPI's bytes."""
    counted = lambda row: {n: v for n, v in row.items() if not n.startswith(("seconds_", "bytes_mpi"))}
    alike = lambda x, y: x.keys() == y.keys() and all(np.array_equal(x[n], y[n], equal_nan=True) for n in x)
    return (
        equal(a.shared, b.shared)
        and equal(a.personal, b.personal)
        and alike(counted(a.row), counted(b.row))
        and alike(a.clients, b.clients)
    )


def test_the_tiny_experiment_is_ragged_and_four_of_seven_clients_take_part():
    sizes = [len(rows) for rows in built().split.train]
    assert min(sizes) * 4 < max(sizes) and len({-(-size // 8) for size in sizes}) >= 4
    assert [len(group) for group in built().run.groups] == [2, 2, 2, 1]
    cohorts = [built().run.chosen(round_) for round_ in range(4)]
    assert {len(cohort) for cohort in cohorts} == {4} and len(set(cohorts)) == 4


@every_algorithm
def test_the_file_says_what_it_computes(name):
    text = inspect.getmodule(algorithms.find(name)).__doc__
    first, text = text.splitlines()[0], " ".join(text.split())
    assert first[0].isupper() and first.endswith("."), f"not a sentence: {first}"
    assert "BatchNorm: " in text and "Bytes per client and round: " in text


@every_algorithm
@both_models
def test_training_lowers_the_loss(name, model):
    rounds = 20 if name == "pfedgate" else 6  # its gates start half closed
    _, first, *_, last = run(name, model, "participation=1.0", f"rounds={rounds}")
    assert last.row["train_loss"] < 0.8 * first.row["train_loss"]
    assert last.row["loss"] < first.row["loss"] and last.row["accuracy"] > first.row["accuracy"]
    assert all(torch.isfinite(v).all() for v in (last.shared | last.personal).values())


@every_algorithm
@both_models
@pytest.mark.parametrize("ranks", [2, 4, 6])
def test_the_spread_over_ranks_moves_no_bit(name, model, ranks):
    alone = run(name, model)
    for moments in played(*of(name), model, "rounds=2", ranks=ranks):
        assert all(same(a, b) for a, b in zip(alone[1:3], moments[1:], strict=True))


@every_algorithm
def test_a_server_that_hosts_clients_moves_no_bit(name):
    alone, moments = run(name, WIDTH), run(name, WIDTH, "rounds=2", "server_hosts_clients=true", ranks=3)
    assert all(same(a, b) for a, b in zip(alone[1:3], moments[1:], strict=True))


@every_algorithm
@both_models
def test_a_resume_moves_no_bit(name, model, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    config = read(TINY, [*of(name), model, f"output={whole}"])
    assert start(config, str(TINY), Solo()) == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints/000004")  # as if killed just before it was committed
    assert resume(cut, [], Solo()) == 0
    assert_same_run(whole, cut)


@every_algorithm
@both_models
def test_a_stack_equals_the_loop(name, model):
    stack, loop = (run(name, model, f"engine.path={path}", "rounds=2")[-1] for path in ("stack", "loop"))
    assert_near(stack.shared, loop.shared)
    assert_near(stack.personal, loop.personal)
    assert stack.row["train_loss"] == pytest.approx(loop.row["train_loss"], rel=1e-5)
    assert np.array_equal(stack.clients["accuracy"], loop.clients["accuracy"])


ORDER = np.array([3, 0, 6, 5, 1, 4, 2])


@dataclass(frozen=True)
class Renumbered(DirichletClass):
    """Client i of this split is client ORDER[i] of the plain one."""

    def split(self, train_y, test_y, classes):
        s = super().split(train_y, test_y, classes)
        train, test = (tuple(rows[k] for k in ORDER) for rows in (s.train, s.test))
        return type(s)(train, test, s.train_counts[ORDER], s.test_counts[ORDER])


@every_algorithm
@both_models
def test_renumbering_the_clients_renumbers_the_results(name, model, monkeypatch):
    if name in ("fedala", "perfedavg"):
        pytest.skip("uses a part of the batch, chosen by an order that is keyed by client")
    # One batch an epoch and the whole cohort: nothing is left that randomness, keyed by client, could choose.
    monkeypatch.setitem(KINDS, "renumbered", Renumbered)
    common = (model, "participation=1.0", "train.batch_size=200", "rounds=2")
    plain = run(name, *common)[-1]
    other = run(name, *common, "data.partition.kind=renumbered", *KEPT)[-1]
    assert_near(plain.shared, other.shared)
    assert_near({n: v[ORDER] for n, v in plain.personal.items()}, other.personal)
    assert np.array_equal(plain.clients["accuracy"][ORDER], other.clients["accuracy"])
    assert plain.row["train_loss"] == pytest.approx(other.row["train_loss"], rel=1e-5)


# Another kind starts the partition's block afresh.
KEPT = [f"data.partition.{n}={getattr(tiny().data.partition, n)}" for n in ("alpha", "clients", "minimum")]


def alternatives(name: str, field: str) -> tuple[tuple[str, ...], list[str]]:
    """(overrides of both runs, the values beside the default)."""
    cls = algorithms.find(name)
    hint = get_type_hints(cls)[field]
    default = next(f.default for f in dataclasses.fields(cls) if f.name == field)
    common, value = ALTERNATIVES.get(f"{name}.{field}", ALTERNATIVES.get(field, ((), None)))
    if get_origin(hint) is Literal:
        return common, [str(v) for v in get_args(hint) if v != default]
    if hint is bool:
        return common, [value or str(not default).lower()]
    if value is None and default and hint in (int, float):
        value = str(default + 1 if hint is int else default / 2)
    if value is None:
        pytest.fail(f"{name}.{field}: {hint} = {default} has no other value here; add one to ALTERNATIVES")
    return common, [value]


@pytest.mark.parametrize("name, field", [marked(*case) for case in FIELDS])
def test_every_hyper_parameter_has_an_effect(name, field):
    common, others = alternatives(name, field)
    before = run(name, NORM, "rounds=2", *common)[-1]
    assert others, f"{name}.{field} has one value only"
    for other in others:
        after = run(name, NORM, "rounds=2", *common, f"algorithm.{field}={other}")[-1]
        assert not same(before, after), f"{name}.{field}={other} changes nothing"


@every_algorithm
@both_models
def test_absent_clients_keep_their_variables_and_the_others_train(name, model):
    moments = run(name, model)
    for round_, (before, after) in enumerate(pairwise(moments)):
        cohort, all_moved = built(*of(name), model).run.chosen(round_), set()
        for leaf, rows in after.personal.items():
            moved = (rows != before.personal[leaf]).flatten(1).any(1).nonzero().flatten().tolist()
            assert set(moved) <= cohort, f"{leaf} in round {round_ + 1}"
            all_moved.update(moved)
        assert all_moved == (cohort if after.personal else set())


@every_algorithm
def test_personal_leaves_differ_and_shared_ones_move(name):
    moments = run(name, "participation=1.0", "rounds=2")
    if personal := moments[-1].personal:
        assert len(torch.unique(torch.cat([rows.flatten(1) for rows in personal.values()], 1), dim=0)) == 7
    for leaf, value in moments[-1].shared.items():
        assert not torch.equal(value, moments[0].shared[leaf]), leaf


@every_algorithm
@both_models
def test_bytes_are_those_of_the_upload_and_of_the_shared_leaves(name, model):
    parts = built(*of(name), model)
    algorithm, first = parts.config.algorithm, parts.first
    up, down = numel(algorithm.upload(first, first)), numel(first.shared)
    if offer := algorithm.offer(first, first):  # mixed rows come back to their clients
        up += numel(offer.rows) + sum(v.numel() for v in (offer.key, offer.aux) if v is not None)
        down += numel(offer.rows)
    for moment in run(name, model)[1:]:
        assert moment.row["clients"] == 4
        assert moment.row["bytes_up"] == 4 * 4 * up  # four clients, four bytes a number
        assert moment.row["bytes_down"] == 4 * 4 * down


@every_algorithm
def test_the_seed_decides_the_bits(name):
    once, other = (run(name, f"seed={seed}", "rounds=2") for seed in (5, 6))
    again = played.__wrapped__(*of(name), "seed=5", "rounds=2")[0]  # not the cached one
    assert all(same(a, b) for a, b in zip(once[1:], again[1:], strict=True))
    for a, b in ((once[0], other[0]), (once[-1], other[-1])):
        for leaf, value in (a.shared | a.personal).items():
            constant = a is once[0] and value.unique().numel() == 1  # for instance B of a low-rank part
            assert constant or not torch.equal(value, (b.shared | b.personal)[leaf]), leaf


@every_algorithm
@both_models
def test_accuracy_is_that_of_each_clients_own_model_on_its_own_data(name, model):
    if algorithms.find(name).tune is not Algorithm.tune:
        pytest.skip("judged after training on a copy: its own tests have it")
    parts, last = built(*of(name), model), run(name, model)[-1]
    data = load_data(parts.config, str(TINY))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.mean, data.std))
    images = (data.test.x / 255 - mean) / std
    network = parts.run.trainer.model
    for client, rows in enumerate(parts.split.test):
        own = Vars(last.shared, {n: v[client] for n, v in last.personal.items()})
        module = network.module(parts.config.algorithm.weights_of(network, own))
        right = module(images[rows]).argmax(1) == data.test.y[rows]
        assert last.clients["accuracy_aggregated"][client] == pytest.approx(right.double().mean().item())
    assert last.row["accuracy"] == pytest.approx(last.clients["accuracy"].mean())
    assert last.row["accuracy_worst"] == last.clients["accuracy"].min()
    assert last.row["loss"] == pytest.approx(last.clients["loss"].mean())
