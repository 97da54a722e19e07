"""What every algorithm owes, checked for each file of the folder ``algorithms/``: nobody registers
a test.
"""

import dataclasses
import inspect
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from methods import CAUSAL_METHODS, GPT, LORA_METHODS, overrides_for
from runs import (
    NORM,
    TINY,
    RoundSnapshot,
    assert_near,
    assert_same_run,
    build_tiny,
    clone_tree,
    run_rounds,
    snapshots_equal,
    tiny_config,
)
from tiers import tiered_param

from fedlora_mpi import algorithms
from fedlora_mpi.algorithm import Algorithm, Variables
from fedlora_mpi.config import read
from fedlora_mpi.core.losses import IGNORED
from fedlora_mpi.core.names import display_name, is_factor
from fedlora_mpi.data.partition import PARTITIONS, DirichletClass
from fedlora_mpi.experiment.checkpointing import initial_state
from fedlora_mpi.experiment.loop import resume, start
from fedlora_mpi.experiment.parts import load_data
from fedlora_mpi.mpi.comm import Solo

NAMES = algorithms.algorithm_names()
every_algorithm = pytest.mark.parametrize("name", NAMES)

# `make test` checks every algorithm on the network that has leaves of every role; `make test-all`
# on a deeper one without BatchNorm too, the cnn of tiny.yaml, and LoRA on a language model.
MODELS = {"norm": (NORM,), "cnn": ("model.width=4",), "gpt": GPT}
CASES = [(name, of) for name in NAMES for of in MODELS if of != "gpt" or name in CAUSAL_METHODS]

all_models = pytest.mark.parametrize(
    "name, model",
    [
        tiered_param(name, MODELS[of], id=f"{name}-{of}", thorough=of != "norm")
        for name, of in CASES
    ],
)

ONE_STACK = "engine.group_size=7"  # half as long, where a test does not ask how clients are grouped

# Methods whose messages differ from each other's.
MESSAGES = ("fedavg", "fedlora", "fedpac", "fedkd", "hetlora", "local")

# Methods that remember different things from round to round, on clients and on the server.
REMEMBERING = (
    *MESSAGES,
    "apfl",
    "fd",
    "fed_rac_lora",
    "fed_talora",
    "fedadam",
    "fedcac",
    "moon",
    "pfedgate",
    "scaffold",
)

# Singular vectors of small singular values move more than what they are of.
NEAR = {"fedhl": 1e-4, "flexlora": 1e-4, "raflora": 1e-4}

# A field that is no Literal is tried with half its default (an integer: one more). Here is what
# needs another value, or other settings in both runs: {field or method.field: (settings, value)}.
ALTERNATIVES = {
    "conv_rank": ((), "0.3"),
    "linear_rank": ((), "0.25"),
    # a ratio for one rule, a rank for the other
    "rank_rule": (("algorithm.linear_rank=1",), "official"),
    "layers": ((), "[head.*]"),
    # of a convolution the sum is formed in every case
    "merge": (("model={name: mlp, hidden: 8}",), None),
    "lora_epochs": ((), "1"),
    "small": ((), "cnn"),
    "apfl.alpha_decay": ((), "0.5"),
    "depositum_like.lam": (("algorithm.penalty=l1",), "0.01"),
    "depositum_like.theta": (("algorithm.penalty=mcp", "algorithm.lam=0.02"), None),
    "fedadagrad.beta1": ((), "0.5"),
    "fedamp.decay": (("algorithm.decay_every=1",), "0.01"),
    "fedamp.decay_every": ((), "1"),
    "fedamp.alpha_min": (("algorithm.decay_every=1", "algorithm.decay=1.0e-6"), "1.0"),
    "fedamp.self_weight": (("algorithm.heuristic=true",), "0.5"),
    "fedbc.gamma": ((), "0.01"),
    "fedbc.lam": ((), "0.1"),
    "fedcac.beta": ((), "1"),
    "fedhpl_like.prompts": (("model={name: vit, width: 4, heads: 1, layers: 1}",), "2"),
    "fedimpro.split": ((), "conv"),
    "fedimpro.growth_rounds": ((), "4"),
    "fedper.personal": ((), "[head, norm.*]"),
    "fedproto.among": (("algorithm.inference=prototypes",), None),
    "pfedlora.mu_on": (("algorithm.mu=0.2",), None),
    "pfedlora.mu_rounds": (("algorithm.mu_schedule=linear",), "4"),
    "pfedgate.straight_through": (("algorithm.sparsity=0.5",), "false"),
    "fedrep.head_epochs": ((), "2"),
    "fedavg_ft.ft_epochs": ((), "2"),
    "fedkd.energy_end": (("algorithm.energy_rounds=2",), "0.5"),
    "fedkd.energy_rounds": ((), "2"),
}


def run(name: str, *overrides: str, ranks: int = 1):
    """The moments of rank 0."""
    return run_rounds(*overrides_for(name), *overrides, ranks=ranks)[0]


def together(name: str, model: tuple[str, ...]):
    """The moments of rounds in which all clients take part."""
    settings = {
        "pfedgate": ("rounds=20",),  # its gates start half closed
        # gradients of 8 samples are too noisy to be tracked with the cnn
        "depositum_like": ("train.batch_size=40", "train.lr=0.2", "train.epochs=6"),
        # a head learns little from the features of a random cnn
        "fedhpl_like": ("train.lr=1", "algorithm.gamma=0.02"),
    }
    return run(name, *model, "participation=1.0", "rounds=6", ONE_STACK, *settings.get(name, ()))


def determined_rounds(name: str, model: tuple[str, ...]) -> int:
    """How many rounds two orders of the same sums agree: clients train from the factors that
    ``determined`` leaves out, so in a language model not after the first decomposition.
    """
    return 1 if name in NEAR and model == GPT else 2


def determined(name: str, model: tuple[str, ...], *moments: RoundSnapshot) -> list[dict]:
    """The shared leaves of each moment. In a language model many singular values are so small that
    rounding turns their vectors: the factors made of them are left out, W is not.
    """
    turns = name in NEAR and model == GPT
    return [{n: v for n, v in m.shared.items() if not (turns and is_factor(n))} for m in moments]


def test_the_tiny_experiment_is_ragged_and_four_of_seven_clients_take_part():
    sizes = [len(rows) for rows in build_tiny().split.train]
    assert min(sizes) * 4 < max(sizes) and len({-(-size // 8) for size in sizes}) >= 4
    federation = build_tiny().federation
    assert [len(group) for group in federation.placement.groups] == [2, 2, 2, 1]
    cohorts = [federation.cohorts.sample(round_).members for round_ in range(4)]
    assert {len(cohort) for cohort in cohorts} == {4} and len(set(cohorts)) == 4


@every_algorithm
def test_the_file_says_what_it_computes(name):
    text = inspect.getmodule(algorithms.find_algorithm(name)).__doc__
    first, text = text.splitlines()[0], " ".join(text.split())
    assert first[0].isupper() and first.endswith("."), f"not a sentence: {first}"
    assert "BatchNorm: " in text and "Bytes per client and round: " in text


# The sources' formulas: sum_k (n_k / n) in all files but those that write (1/N) sum_k, or a sum;
# absent clients do not count, and accuracy is that of the next round's start, where the file says
# nothing else.
COUNT_ALIKE = (
    "aggregation_broadcast bound_weight_like depositum_like ditto dpsgd fd fedapen fedavg_lora fedbc "
    "fedbn fedga fedglomo fedhpl_like fedkd fedlora fedproto fml ota_ffl_like pfedsd scaffold"
)
ABSENT_COUNT = "fedavg_lora fedlora pfedgate"
JUDGED_TRAINED = "fedamp fedpac pfedgate pfedlora pfedme pfedsd"


def test_defaults_of_the_mean_and_of_the_judged_model_are_those_of_the_sources():
    made = {name: algorithms.find_algorithm(name)() for name in NAMES}
    assert " ".join(name for name, it in made.items() if it.weights == "uniform") == COUNT_ALIKE
    assert " ".join(name for name, it in made.items() if it.absent == "stale") == ABSENT_COUNT
    assert (
        " ".join(name for name, it in made.items() if it.evaluate_on == "after_training")
        == JUDGED_TRAINED
    )


@all_models
def test_training_lowers_the_loss(name, model):
    _, first, *_, last = together(name, model)
    share = 0.9 if model == GPT else 0.8  # a tiny model of texts learns slowly
    assert last.row["train_loss"] < share * first.row["train_loss"]
    assert last.row["loss"] < first.row["loss"] and last.row["accuracy"] > first.row["accuracy"]
    assert all(torch.isfinite(v).all() for v in (last.shared | last.personal).values())


@all_models
@pytest.mark.parametrize(
    "ranks, rounds",
    [
        tiered_param(4, 1, id="4", thorough=False),
        *(tiered_param(n, 2, id=f"{n}-twice", thorough=True) for n in (2, 4, 6)),
    ],
)
def test_the_spread_over_ranks_moves_no_bit(name, model, ranks, rounds):
    """Of four ranks three are workers, which host 2 + 1, 2 and 2 clients."""
    alone = run(name, *model)
    for moments in run_rounds(*overrides_for(name), *model, f"rounds={rounds}", ranks=ranks):
        assert all(
            snapshots_equal(a, b) for a, b in zip(alone[1 : rounds + 1], moments[1:], strict=True)
        )


@pytest.mark.parametrize(
    "name", [tiered_param(name, id=name, thorough=name not in MESSAGES) for name in NAMES]
)
def test_a_server_that_hosts_clients_moves_no_bit(name):
    alone, moments = (
        run(name, NORM),
        run(name, NORM, "rounds=2", "server_hosts_clients=true", ranks=3),
    )
    assert all(snapshots_equal(a, b) for a, b in zip(alone[1:3], moments[1:], strict=True))


@pytest.mark.parametrize(
    "model, name",
    [
        tiered_param(
            MODELS[of], name, id=f"{name}-{of}", thorough=of != "norm" or name not in REMEMBERING
        )
        for name, of in CASES
    ],
)
def test_a_resume_moves_no_bit(name, model, tmp_path):
    whole, cut, rounds = tmp_path / "whole", tmp_path / "cut", 2 if NORM in model else 3
    config = read(
        TINY,
        [*overrides_for(name), *model, f"rounds={rounds}", "checkpoint.every=1", f"output={whole}"],
    )
    assert start(config, str(TINY), Solo()) == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / f"checkpoints/00000{rounds}")  # as if killed just before it was committed
    assert resume(cut, [], Solo()) == 0
    assert_same_run(whole, cut)


@all_models
def test_a_stack_equals_the_loop(name, model):
    assert tiny_config(*model).engine.path == "stack"
    rounds = determined_rounds(name, model)
    stack = run(name, *model)[rounds]
    loop = run(name, *model, "engine.path=loop", f"rounds={rounds}")[-1]
    assert_near(*determined(name, model, stack, loop), NEAR.get(name, 1e-5))
    assert_near(stack.personal, loop.personal)
    assert stack.row["train_loss"] == pytest.approx(loop.row["train_loss"], rel=1e-5)
    assert np.array_equal(stack.clients["accuracy"], loop.clients["accuracy"])


ORDER = (3, 0, 6, 5, 1, 4, 2)


@dataclass(frozen=True)
class Renumbered(DirichletClass):
    """Client i of this split is client ``order[i]`` of the plain one; ``alike``: it holds one
    sample, many times.
    """

    order: tuple[int, ...] = tuple(range(len(ORDER)))
    alike: bool = False

    def split(self, train_y, test_y, classes):
        s, order = super().split(train_y, test_y, classes), list(self.order)
        train, test = (tuple(rows[k] for k in order) for rows in (s.train, s.test))
        counts = s.train_counts[order]
        if self.alike:
            train = tuple(np.full_like(rows, rows[0]) for rows in train)
            counts = np.stack([np.bincount(train_y[rows], minlength=classes) for rows in train])
        return type(s)(train, test, counts, s.test_counts[order])


# What else leaves nothing that a client's own order of samples could choose.
WHOLE = {
    "depositum_like": ("topology=complete",),  # as dpsgd
    "dpsgd": ("topology=complete",),  # on a ring the numbers say who is whose neighbour
    "fedala": ("algorithm.s=100",),  # weights are learned on all samples
    "fedapen": ("data.partition.alike=true",),  # which samples are held out
    "fedimpro": ("algorithm.weight=0",),  # features are drawn for each client
    "ota_ffl_like": ("algorithm.sigma=0",),  # fading is drawn for each client
    "perfedavg": ("data.partition.alike=true",),  # D and D' are the halves of a batch, whichever
}


@all_models
def test_renumbering_the_clients_renumbers_the_results(name, model, monkeypatch):
    # One batch an epoch and the whole cohort: nothing is left that randomness, keyed by client,
    # could choose.
    monkeypatch.setitem(PARTITIONS, "renumbered", Renumbered)
    common = (*model, "participation=1.0", "train.batch_size=200", ONE_STACK)
    common = (
        *common,
        f"rounds={determined_rounds(name, model)}",
        "data.partition.kind=renumbered",
        *KEPT,
        *WHOLE.get(name, ()),
    )
    plain = run(name, *common)[-1]
    other = run(name, *common, f"data.partition.order={list(ORDER)}")[-1]
    assert_near(*determined(name, model, plain, other), NEAR.get(name, 1e-5))
    assert_near({n: v[list(ORDER)] for n, v in plain.personal.items()}, other.personal)
    assert np.array_equal(plain.clients["accuracy"][list(ORDER)], other.clients["accuracy"])
    assert plain.row["train_loss"] == pytest.approx(other.row["train_loss"], rel=1e-5)


# Another kind starts the partition's block afresh.
KEPT = [
    f"data.partition.{n}={getattr(tiny_config().data.partition, n)}"
    for n in ("alpha", "clients", "minimum")
]


def alternatives(name: str, field: str) -> tuple[tuple[str, ...], list[str]]:
    """(overrides of both runs, the values beside the default)."""
    cls = algorithms.find_algorithm(name)
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
        pytest.fail(
            f"{name}.{field}: {hint} = {default} has no other value here; add one to ALTERNATIVES"
        )
    return common, [value]


def fields() -> list:
    """Each hyper-parameter of each method; one that several have by inheritance or by convention is
    quick once.
    """
    seen, cases = {"weights", "absent"}, []
    for name in NAMES:
        cls = algorithms.find_algorithm(name)
        for field in dataclasses.fields(cls):
            home = next(
                base
                for base in reversed(cls.__mro__)
                if field.name in inspect.get_annotations(base)
            )
            known = {field.name, (home, field.name)} & seen and name != "fedavg"
            seen.add((home, field.name))
            cases.append(
                tiered_param(name, field.name, id=f"{name}-{field.name}", thorough=bool(known))
            )
    return cases


@pytest.mark.parametrize("name, field", fields())
def test_every_hyper_parameter_has_an_effect(name, field):
    common, others = alternatives(name, field)
    before = run(name, NORM, "rounds=2", ONE_STACK, *common)[-1]
    assert others, f"{name}.{field} has one value only"
    for other in others:
        after = run(name, NORM, "rounds=2", ONE_STACK, *common, f"algorithm.{field}={other}")[-1]
        assert not snapshots_equal(before, after), f"{name}.{field}={other} changes nothing"


def after_round_1(round_: int, cohort: set[int], known: set[int]) -> set[int]:
    return cohort if round_ else set()


# Fine-tuning methods have common settings: clients of different ranks, and the one weight that is
# not the head.
SMALL = ("algorithm.alpha=2",)  # the default is for ranks of 8
RANKS = ("algorithm.lora_ranks=[1,2]", *SMALL)
for _name in LORA_METHODS:
    ALTERNATIVES |= {
        f"{_name}.lora_ranks": (SMALL, "[1,2]"),
        f"{_name}.rank_shares": (RANKS, "[0.7,0.3]"),
        f"{_name}.capacities": (("algorithm.lora_ranks=[2]", *SMALL), "[1,0.5]"),
        f"{_name}.scale": (RANKS, None),
        f"{_name}.layers": (("algorithm.full=[]", *SMALL), "[conv.*]"),
        f"{_name}.full": ((), "[head,norm]"),
        f"{_name}.judged": (RANKS, None),
    }
ALTERNATIVES |= {
    "fedhl.weight_mode": (RANKS, None),
    "fedhl.tau": (RANKS, "0.1"),
    "fedhl.eps": ((*RANKS, "algorithm.weight_mode=fedhera"), "1.0"),
    "fedhl.eps_relative": ((*RANKS, "algorithm.weight_mode=inverse"), "1.0"),
    "fedhl.per_layer": ((*RANKS, "algorithm.full=[]"), None),
    "hetlora.lora_rank_min": ((), "3"),  # all that the weight has: there is no tail
}


# A round moves every personal leaf of each client of its cohort, and nothing else. The leaves of
# which other clients move: {method.leaf: (who, given the round (from 0), its cohort and those who
# took part before; None: any of the cohort; why)}.
MOVERS = {
    "apfl.mix.alpha": (after_round_1, "no gradient while v_i = w"),
    "fedala.A.*": (after_round_1, "no gradient while o_i = g"),
    "fedproto.own.classes": (
        lambda _, cohort, known: cohort - known,
        "classes that the first participation sets",
    ),
    "fedapen.mix.w": (after_round_1, "learned before the training from round 2 on"),
    "fedcac.critical.*.bias": (None, "a mask of few entries may come out as it was"),
    "fedcac.critical.norm.weight": (None, "a mask of four entries may come out as it was"),
    "fedhpl_like.own.correct": (None, "numbers of samples, which may come out as they were"),
    "pfedgate.gate.in.weight": (
        None,
        "the scale of the one channel, which BatchNorm takes off again",
    ),
    "pfedsd.taught": (
        lambda _, cohort, known: cohort - known,
        "a flag that the first participation sets",
    ),
    "hetlora.lora_rank": (None, "a rank that falls now and then"),
    "fedbabu.*": (lambda *_: set(), "the head, which trains on copies alone"),
}

# After two rounds of the whole cohort, seven clients of different data hold seven different rows of
# every personal leaf. The leaves of which they need not: {method.leaf: why}.
ALIKE = {
    "fedcac.own.*": "clients with one and the same C_i hold its mean, each under a mask of its own",
    "fedcac.critical.*.bias": "four entries have six masks of two",
    "fedcac.critical.norm.weight": "four entries have six masks of two",
    "fd.own.round": "the round in which they all took part last",
    "fedhpl_like.own.round": "the round in which they all took part last",
    "fedhpl_like.own.correct": "a few numbers of samples, of which some clients have none right",
    "fedbabu.*": "the head that all clients draw",
    "fedproto.own.classes": "four classes, of which many hold all",
    "pfedgate.gate.in.weight": "the scale of the one channel, which BatchNorm takes off again",
    "pfedsd.taught": "a flag that the first participation sets",
    "hetlora.lora_rank": "a rank, at first the same for all",
}

# After two rounds of the whole cohort every leaf of the server has moved. Those that need not:
# {method.leaf: why}.
STILL = {
    "ffa_lora.*.A": "the factor that never trains",
    "fed_rac_lora.*.B": "zero again, since it was merged",
    "fed_rac_lora.turn.seed": "all sketches follow from it",
    "ota_ffl_like.seed*": "all fading and noise follow from them",
}

# Variables that no seed changes: {method.leaf: why}.
UNSEEDED = {
    "fedkd.svd.numbers": "a number of numbers",
    "fed_talora.last.clients": "counts the last cohort",
    "fedex_lora.last.clients": "counts the last cohort",
    "flora.last.*": "counts the components of the last cohort",
    "fed_talora.seen.*": "four classes, which every cohort has seen after two rounds",
    "fed_rac_lora.*.B": "zero between rounds",
    "hetlora.lora_rank": "a rank, at first the same for all",
}


def listed(table: dict, name: str, leaf: str):
    """The entry of an exception, None where there is none."""
    return next(
        (
            entry
            for pattern, entry in table.items()
            if fnmatchcase(f"{name}.{display_name(leaf)}", pattern)
        ),
        None,
    )


@all_models
def test_absent_clients_keep_their_variables_and_the_others_train(name, model):
    known = set()
    for round_, (before, after) in enumerate(pairwise(run(name, *model))):
        cohorts, anything = build_tiny(*overrides_for(name), *model).federation.cohorts, set()
        cohort = cohorts.sample(round_).members
        for leaf, rows in after.personal.items():
            moved = set(
                (rows != before.personal[leaf]).reshape(7, -1).any(1).nonzero().flatten().tolist()
            )
            who, _ = listed(MOVERS, name, leaf) or (lambda round_, cohort, known: cohort, "")
            movers = who(round_, cohort, known) if who else moved & cohort
            assert moved == movers, f"{leaf} in round {round_ + 1}"
            anything |= moved
        if any(not listed(MOVERS, name, leaf) for leaf in after.personal):
            assert anything == cohort
        known |= cohort


@all_models
def test_personal_leaves_differ_and_shared_ones_move(name, model):
    begin, _, end, *_ = together(name, model)
    for leaf, rows in end.personal.items():
        if not listed(ALIKE, name, leaf):
            assert distinct(rows) == 7, leaf
    if any(not listed(ALIKE, name, leaf) for leaf in end.personal):
        assert distinct(*end.personal.values()) == 7
    before, after = begin.shared | begin.server, end.shared | end.server
    for leaf, value in after.items():
        assert listed(STILL, name, leaf) or not torch.equal(value, before[leaf]), leaf


def distinct(*leaves: torch.Tensor) -> int:
    """How many different clients there are by their rows of the leaves [N, ...]."""
    return len(torch.unique(torch.cat([rows.reshape(len(rows), -1) for rows in leaves], 1), dim=0))


@pytest.mark.parametrize(
    "table", [MOVERS, ALIKE, STILL, UNSEEDED], ids=["movers", "alike", "still", "unseeded"]
)
def test_an_exception_is_of_a_leaf_that_there_is(table):
    for pattern in table:
        name = pattern.partition(".")[0]
        begin = initial_state(build_tiny(*overrides_for(name), NORM))
        leaves = [*begin.personal, *(begin.shared if table in (STILL, UNSEEDED) else ())]
        leaves += begin.server if table is UNSEEDED else ()
        assert any(fnmatchcase(f"{name}.{display_name(leaf)}", pattern) for leaf in leaves), pattern


@all_models
def test_bytes_are_those_of_the_upload_and_of_the_shared_leaves(name, model):
    federation = build_tiny(*overrides_for(name), *model).federation
    client_type = federation.clients.types[0]
    transport, first = client_type.transport, client_type.local_initial
    first = Variables(clone_tree(first.shared), clone_tree(first.personal))
    upload = transport.method.upload(first, first, 0)
    up = size((*upload.message.values(), upload.report))
    down = size(first.shared.values())
    if mix := upload.mix:  # mixed rows come back to their clients
        sent = {id(v) for v in upload.message.values()}  # a row of the message is not sent again
        up += size(v for v in (*mix.rows.values(), mix.key, mix.extra) if id(v) not in sent)
        down += size(mix.rows.values())
    for round_, moment in enumerate(run(name, *model)[1:]):
        assert moment.row["clients"] == 4
        if federation.matrix:  # the rows go to each neighbour in the cohort, and come from each
            members = federation.cohorts.sample(round_).members
            pairs = sum((a + 1) % 7 in members for a in members)  # of a ring
            assert moment.row["bytes_up"] == moment.row["bytes_down"] == 2 * pairs * up
            continue
        if upload.numel is None:
            assert moment.row["bytes_up"] == 4 * up
        else:  # by what a client holds: its own tests have the formula
            assert 0 < moment.row["bytes_up"] <= 4 * up
        if transport.download_numel is None:
            assert moment.row["bytes_down"] == 4 * down
        else:  # by what has been before: likewise
            assert moment.row["bytes_down"] >= 0


def size(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes: four for a number, and an eighth for a bool, in whole bytes."""
    there = [v for v in tensors if v is not None]
    return sum(-(-v.numel() // 8) if v.dtype == torch.bool else 4 * v.numel() for v in there)


@every_algorithm
def test_the_seed_decides_the_bits(name):
    how = NORM, "rounds=2", ONE_STACK
    once, other = run(name, *how), run(name, *how, "seed=6")
    again = run_rounds.__wrapped__(*overrides_for(name), *how, "rounds=1")[0]  # not the cached one
    assert snapshots_equal(once[1], again[1])
    for a, b in ((once[0], other[0]), (once[-1], other[-1])):
        others = b.shared | b.personal | b.server
        for leaf, value in (a.shared | a.personal | a.server).items():
            # for instance B of a low-rank part
            constant = a is once[0] and value.unique().numel() == 1
            constant = constant or listed(UNSEEDED, name, leaf)
            assert constant or not torch.equal(value, others[leaf]), leaf


@all_models
def test_accuracy_is_that_of_each_clients_own_model_on_its_own_data(name, model):
    if algorithms.find_algorithm(name).personalize is not Algorithm.personalize:
        pytest.skip("judged after training on a copy: its own tests have it")
    parts, last = build_tiny(*overrides_for(name), *model), run(name, *model)[-1]
    data = load_data(parts.config, str(TINY))
    inputs = data.test.x.long()
    if not data.tokens:
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.mean, data.std))
        inputs = (data.test.x / 255 - mean) / std
    client_type = parts.federation.clients.types[0]
    network, transport = client_type.trainer.model, client_type.transport
    for client, rows in enumerate(parts.split.test):
        own = Variables(
            transport.download(last.shared), {n: v[client] for n, v in last.personal.items()}
        )
        module = network.to_module(client_type.algorithm.client_model(network, own))
        y = data.test.y[rows]
        right = (module(inputs[rows]).argmax(-1) == y)[y != IGNORED]
        assert last.clients["accuracy_aggregated"][client] == pytest.approx(
            right.double().mean().item()
        )
    assert last.row["accuracy"] == pytest.approx(last.clients["accuracy"].mean())
    assert last.row["accuracy_worst"] == last.clients["accuracy"].min()
    assert last.row["loss"] == pytest.approx(last.clients["loss"].mean())
