"""Three rounds of the most used methods, in float64, against plain PyTorch written from the papers.

Half of the clients take part in a round, and they have different numbers of samples. Every leaf of
the server and of every client is compared after each round (``references.py`` has the equations).
"""

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any, NamedTuple

import pytest
import references
import small
import torch

from fedlora_mpi.algorithm import LocalTraining, Variables
from fedlora_mpi.algorithms.apfl import APFL
from fedlora_mpi.algorithms.ditto import Ditto
from fedlora_mpi.algorithms.fedamp import FedAMP
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.fedbc import FedBC
from fedlora_mpi.algorithms.fedbn import FedBN
from fedlora_mpi.algorithms.fedga import FedGA
from fedlora_mpi.algorithms.fedhl import FedHL
from fedlora_mpi.algorithms.fedit import FedIT
from fedlora_mpi.algorithms.fedlc import FedLC
from fedlora_mpi.algorithms.fedlora import FedLoRA
from fedlora_mpi.algorithms.fedper import FedPer
from fedlora_mpi.algorithms.fedproto import FedProto
from fedlora_mpi.algorithms.fedprox import FedProx
from fedlora_mpi.algorithms.fedrep import FedRep
from fedlora_mpi.algorithms.fedrod import FedRoD
from fedlora_mpi.algorithms.fedsa_lora import FedSALoRA
from fedlora_mpi.algorithms.flexlora import FlexLoRA
from fedlora_mpi.algorithms.flora import FLoRA
from fedlora_mpi.algorithms.moon import MOON
from fedlora_mpi.algorithms.perfedavg import PerFedAvg
from fedlora_mpi.algorithms.pfedlora import PFedLoRA
from fedlora_mpi.algorithms.pfedme import PFedMe
from fedlora_mpi.algorithms.raflora import RaFLoRA
from fedlora_mpi.algorithms.scaffold import Scaffold
from fedlora_mpi.components.prototypes import MEANS, SHARES
from fedlora_mpi.core.names import factor_name, factors_by_weight
from fedlora_mpi.core.tree import Tree, tmap
from fedlora_mpi.federation.round import run_round

pytestmark = pytest.mark.thorough

ROUNDS, TOLERANCE = 3, 1e-10
SIZES, TEST_SIZES = (11, 8, 7, 6, 3, 2), (4, 9, 2, 5, 7, 3)


def all_leaves(shared: Tree) -> Tree:
    return shared


def known_prototypes(shared: Tree) -> Tree:
    """The prototypes of the classes that have one."""
    return {
        f"P{c}": mean / share
        for c, (mean, share) in enumerate(zip(shared[MEANS], shared[SHARES], strict=True))
        if share > 0
    }


def without_draw(shared: Tree) -> Tree:
    """All leaves but the number from which the next factors are drawn."""
    return {n: v for n, v in shared.items() if n != ".fresh."}


def products(shared: Tree) -> Tree:
    """All leaves, but B A in place of the factors, whose signs are free."""
    B = factors_by_weight(shared, "B")
    kept = {n: v for n, v in shared.items() if n.startswith("head.") or n.endswith("..W")}
    return kept | {factor_name(n, "BA"): b @ shared[factor_name(n, "A")] for n, b in B.items()}


class Case(NamedTuple):
    """A method and the equations of its paper.

    constants: numbers that both have. choices: all other settings of the method.
    """

    method: type
    reference: Callable[..., references.Rounds]
    constants: dict[str, Any] = {}
    choices: dict[str, Any] = {}
    view: Callable[[Tree], Tree] = all_leaves  # what is compared of the shared variables
    momenta: tuple[float, ...] = (0.0, 0.9)


MEAN = {"weights": "samples", "absent": "exclude"}
LOW_RANK = {
    "conv_rank": 0.6, "linear_rank": 0.6, "rank_rule": "paper", "scale": "one", "layers": ("*",),
    "order": "alternating", "bn_stats": "shared",
}  # fmt: skip
RANKS = {"lora_ranks": (3, 1, 2), "alpha": 3.0}
TUNING = {
    "rank_shares": (), "capacities": (), "layers": ("*",), "full": ("head",), "merge": True,
    "diagnose": False,
}  # fmt: skip
JUDGED = {"judged": "client", **TUNING}
AMP = {
    "decay_every": 1, "alpha_min": 0.0, "convex": False, "cloud_alpha": "current", "start": "own",
}  # fmt: skip

CASES = {
    "fedavg": Case(FedAvg, references.fedavg, {}, MEAN),
    "fedprox": Case(FedProx, references.fedprox, {"mu": 0.6}, MEAN),
    "fedlc": Case(FedLC, references.fedlc, {"tau": 0.7}, {"denominator": "all", **MEAN}),
    "fedga": Case(
        FedGA, references.fedga, {}, {"variant": "code", "weights": "uniform", "absent": "exclude"}
    ),
    "fedbc": Case(
        FedBC,
        references.fedbc,
        {"lam": 0.25, "gamma": 0.0625, "alpha": 0.5},
        {"learn_gamma": True},
    ),
    "scaffold": Case(Scaffold, references.scaffold, {"server_lr": 0.8}, {}, momenta=(0.0,)),
    "ditto": Case(Ditto, references.ditto, {"lam": 0.7}, MEAN),
    "fedrep": Case(FedRep, references.fedrep, {"head_epochs": 2}, MEAN),
    "fedper": Case(FedPer, references.fedper, {}, {"personal": ("head",), **MEAN}),
    "fedbn": Case(FedBN, references.fedbn, {}, {"weights": "uniform", "absent": "exclude"}),
    "pfedme": Case(
        PFedMe,
        references.pfedme,
        {"lam": 5.0, "inner_steps": 3, "inner_lr": 0.06, "beta": 0.8},
        MEAN,
        momenta=(0.0,),
    ),
    "fedamp": Case(
        FedAMP,
        references.fedamp,
        {"lam": 0.4, "alpha": 0.8, "decay": 0.6, "sigma": 1.3, "self_weight": 0.0, "heuristic": False},
        AMP,
    ),
    "heurfedamp": Case(
        FedAMP,
        references.fedamp,
        {"lam": 0.4, "alpha": 0.8, "decay": 0.6, "sigma": 3.0, "self_weight": 0.4, "heuristic": True},
        AMP,
    ),
    "moon": Case(MOON, references.moon, {"mu": 1.5, "tau": 0.5}, MEAN),
    "perfedavg-fo": Case(
        PerFedAvg, references.perfedavg, {"alpha": 0.2, "variant": "fo"}, MEAN
    ),
    "perfedavg-hf": Case(
        PerFedAvg, references.perfedavg, {"alpha": 0.2, "variant": "hf"}, MEAN
    ),
    "fedproto": Case(
        FedProto,
        references.fedproto,
        {"lam": 0.8},
        {"inference": "classifier", "among": "own", "weights": "uniform", "absent": "exclude"},
        known_prototypes,
    ),
    "fedrod": Case(
        FedRoD,
        references.fedrod,
        {"gamma": 0.9},
        {"head": "copy", "personal_trains_body": False, **MEAN},
    ),
    "apfl": Case(
        APFL, references.apfl, {"alpha": 0.625, "alpha_decay": 0.1}, {"adaptive": True, **MEAN}
    ),
    "fedlora": Case(FedLoRA, references.fedlora, {"lora_epochs": 2, "absent": "exclude"}, LOW_RANK),
    "fedlora-stale": Case(
        FedLoRA, references.fedlora, {"lora_epochs": 2, "absent": "stale"}, LOW_RANK
    ),
    "pfedlora": Case(
        PFedLoRA,
        references.pfedlora,
        {"mu": 0.4, "adapter_epochs": 2, "scale": 1.2},
        {
            "mu_on": "combined", "mu_schedule": "constant", "mu_rounds": 500,
            "inference": "model", "adapter": "matrix", "lora_rank": 3, "absent": "exclude",
        },
    ),
    "fedit": Case(FedIT, references.fedit, RANKS, {"scale": "common", **JUDGED}),
    "flora": Case(FLoRA, references.flora, RANKS, {"scale": "common", **TUNING}, without_draw),
    "flexlora": Case(FlexLoRA, references.flexlora, RANKS, {"scale": "rank", **JUDGED}, products),
    "raflora": Case(RaFLoRA, references.raflora, RANKS, {"scale": "rank", **JUDGED}, products),
    "fedsa_lora": Case(
        FedSALoRA,
        references.fedsa_lora,
        RANKS,
        {
            "scale": "common", "rank_shares": (), "capacities": (), "layers": ("*",),
            "full": ("head",), "merge": True, "personal_full": True,
        },
    ),
    "fedhl": Case(
        FedHL,
        references.fedhl,
        {"eps": 0.01, **RANKS},
        {
            "weight_mode": "fedhera", "tau": 0.3, "eps_relative": 0.0, "per_layer": False,
            "scale": "rank", **JUDGED,
        },
        products,
    ),
}  # fmt: skip


def in_float64(algorithm):
    """The method with variables that are all float64 from the start."""

    class Float64(type(algorithm)):
        def init(self, model, rng):
            return Variables(*(tmap(torch.Tensor.double, v) for v in super().init(model, rng)[:2]))

    settings = {field.name: getattr(algorithm, field.name) for field in fields(algorithm)}
    return Float64(**settings)


class Rounds(NamedTuple):
    """What the package computed: the shared and each client's personal leaves, [rounds + 1]."""

    shared: list[Tree]
    personal: list[list[Tree]]
    federation: Any


@cache
def run_package(name: str, momentum: float, stacked: bool) -> Rounds:
    case = CASES[name]
    settings = case.constants | case.choices
    assert settings.keys() == {field.name for field in fields(case.method)}, "state all settings"
    samples = small.make_feed(SIZES, TEST_SIZES)
    samples._counts = samples._counts.double()
    federation, state = small.make_experiment(
        in_float64(case.method(**settings)),
        "references:Network",
        SIZES,
        participation=0.5,
        group_size=4,
        samples=samples,
        stacked=stacked,
        train=LocalTraining(3, 4, 0.05, momentum, 0.02),
    )
    rounds = Rounds([], [], federation)
    for t in range(ROUNDS + 1):
        if t:
            state = run_round(federation, state, evaluate=False, stop=False)[0]
        rounds.shared.append(small.clone_tree(state.shared))
        rounds.personal.append([personal_leaves(federation, state, k) for k in range(len(SIZES))])
    return rounds


def personal_leaves(federation, state, client: int) -> Tree:
    rows = federation.store.read(state.personal, [client])
    return {n: v[0].clone() for n, v in rows.items()}


def initial_factors(rounds: Rounds, t: int) -> references.Factors:
    """The factors that client 0, which has the largest rank, trains from in round t."""
    first = rounds.federation.clients[0]
    tree = first.transport.download(rounds.shared[t]) | first.initial.personal
    return {n[:-3]: (A, tree[n[:-1] + "B"]) for n, A in tree.items() if n.endswith("..A")}


def reference_federation(rounds: Rounds) -> references.Federation:
    """The clients of a run, their samples and the order of their batches."""
    federation = rounds.federation
    trainer = federation.clients.trainer
    train, feed = trainer.settings, trainer.feed

    def batches(client: int, round_: int, epoch: int | str) -> references.Batches:
        x, y = feed.epoch([client], round_, epoch).batch(1, 0, SIZES[client])[:2]
        return list(zip(x[0].split(train.batch_size), y[0].split(train.batch_size), strict=True))

    network = references.Network(small.CLASSES, small.SHAPE)
    network.load_state_dict(trainer.model.initial, strict=False)
    return references.Federation(
        network,
        [sorted(federation.cohorts.sample(t).members) for t in range(ROUNDS)],
        batches,
        [tuple(v[0] for v in feed.unshuffled_batch([k], True)[:2]) for k in range(len(SIZES))],
        lambda t: initial_factors(rounds, t),
        train.epochs,
        train.batch_size,
        train.lr,
        train.momentum,
        train.weight_decay,
    )


@cache
def run_reference(name: str, momentum: float) -> list[tuple[Tree, list[Tree]]]:
    case, federation = CASES[name], reference_federation(run_package(name, momentum, True))
    return list(case.reference(federation, **case.constants))


def gap(a: Tree, b: Tree) -> float:
    """The largest difference of two trees of the same names and shapes."""
    assert a.keys() == b.keys()
    assert all(a[n].shape == b[n].shape and a[n].dtype == torch.float64 for n in a)
    return max((float((a[n] - b[n]).abs().max()) for n in a), default=0.0)


@pytest.mark.parametrize("stacked", [False, True], ids=["loop", "stack"])
@pytest.mark.parametrize(
    "name, momentum",
    [
        pytest.param(name, momentum, id=f"{name}-momentum-{momentum:g}")
        for name, case in CASES.items()
        for momentum in case.momenta
    ],
)
def test_three_rounds_are_those_of_the_paper(name, momentum, stacked):
    expected, found = run_reference(name, momentum), run_package(name, momentum, stacked)
    for t, (shared, personal) in enumerate(expected, 1):
        assert gap(CASES[name].view(found.shared[t]), shared) < TOLERANCE, f"round {t}: shared"
        for k, tree in enumerate(personal):
            assert gap(found.personal[t][k], tree) < TOLERANCE, f"round {t}: client {k}"


@pytest.mark.parametrize(
    "name, constant",
    [
        pytest.param(name, constant, id=f"{name}-{constant}")
        for name, case in CASES.items()
        for constant, value in case.constants.items()
        if isinstance(value, float) and value
    ],
)
def test_one_per_cent_of_a_constant_is_more_than_the_tolerance(name, constant):
    case, momentum = CASES[name], CASES[name].momenta[-1]
    federation = reference_federation(run_package(name, momentum, True))
    constants = case.constants | {constant: 1.01 * case.constants[constant]}
    gaps = [
        gap(a, b)
        for expected, found in zip(
            run_reference(name, momentum), case.reference(federation, **constants), strict=True
        )
        for a, b in zip([expected[0], *expected[1]], [found[0], *found[1]], strict=True)
    ]
    assert max(gaps) > 1e4 * TOLERANCE
