"""Ranks that have built different things do not begin, in one line; nor does a run go on with other data or weights."""

import itertools
import random
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from runs import TINY, on_ranks, tiny
from torch import nn

from fedlora_mpi import agreement, build, inventory
from fedlora_mpi.algorithm import Algorithm, Vars
from fedlora_mpi.build import build as build_run
from fedlora_mpi.comm import Refused, Solo
from fedlora_mpi.data.datasets import Samples

TURN = itertools.count()  # of this process; a builder that looks at it gives each rank another network
ODD = threading.local()  # ``ODD.rank`` of the thread that plays a rank


def flat(classes, shape, hidden=8):
    """Two Linears."""
    side = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(side, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def unseeded(classes, shape):
    """Weights of a generator that the system seeds."""
    module = flat(classes, shape)
    own = np.random.default_rng()
    module[3].weight = nn.Parameter(torch.from_numpy(own.normal(size=module[3].weight.shape)).float())
    return module


def from_global(classes, shape):
    """Weights of the global generators of numpy and Python."""
    module = flat(classes, shape)
    module[3].weight = nn.Parameter(torch.from_numpy(np.random.randn(*module[3].weight.shape)).float())
    module[3].bias = nn.Parameter(torch.tensor([random.random() for _ in range(classes)]))
    return module


def wider(classes, shape):
    """Another width on each rank."""
    return flat(classes, shape, 8 + next(TURN))


def more(classes, shape):
    """Another number of leaves on each rank."""
    return nn.Sequential(flat(classes, shape), *(nn.Linear(classes, classes) for _ in range(next(TURN) % 2)))


class Named(nn.Module):
    """Linears side by side, registered in the order given."""

    def __init__(self, names, side, classes):
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(side, classes) for name in names})

    def forward(self, x):
        return sum(part(x.flatten(1)) for part in self.parts.values())


def of_a_set(classes, shape):
    """Modules in another order on each rank, as from a set of texts."""
    names = ["left", "right", "top"] if next(TURN) % 2 else ["top", "left", "right"]
    return Named(names, shape[0] * shape[1] * shape[2], classes)


def counted(classes, shape):
    """An integer buffer of another value on each rank."""
    module = flat(classes, shape)
    module.register_buffer("offset", torch.tensor([3 + next(TURN)]))
    return module


def doubled(classes, shape):
    """Another type of number on each rank."""
    module = flat(classes, shape)
    module.register_buffer("shift", torch.zeros(3, dtype=torch.int32 if next(TURN) % 2 else torch.int64))
    return module


@dataclass(frozen=True)
class Drawing(Algorithm):
    """Begins with numbers from the system."""

    def init(self, model, rng):
        own = torch.from_numpy(np.random.default_rng().normal(size=3)).float()
        return Vars(dict(model.initial), {"gate": own})


def refused(*overrides, ranks=3, **how):
    """The line with which a run on so many ranks is refused, the same on all; nothing but the set-up is tried."""
    said = []

    def main(comm):
        ODD.rank = comm.rank
        try:
            return build_run(tiny(*overrides), str(TINY), comm)
        except Refused as error:
            said.append(str(error))

    on_ranks(ranks, main)
    assert len(said) == ranks and len({*said}) == 1, said
    assert "\n" not in said[0]
    return said[0]


@pytest.mark.parametrize(
    "overrides, text",
    [
        (["model=test_agreement:unseeded"], "initial weights of 3.weight: not the same as on rank 0"),
        (["model=test_agreement:wider"], ", 64] float32 body, on rank 0 ["),
        (["model=test_agreement:more"], "is there, but not on rank 0"),
        (["model=test_agreement:of_a_set"], "registered in another order"),
        (["model=test_agreement:counted"], "constant offset: not the same as on rank 0"),
        (["model=test_agreement:doubled"], "shift is [3] int"),
        (["algorithm=test_agreement:Drawing"], "before round 1: personal gate: not the same as on rank 0"),
    ],
)
def test_ranks_that_have_built_different_networks_are_refused(overrides, text, monkeypatch):
    monkeypatch.setattr("test_agreement.TURN", itertools.count())
    line = refused(*overrides)
    assert text in line and "rank" in line and line.startswith(f"{TINY}: rank"), line
    assert "generator of its own" in line


def global_states():
    """Where the global generators are."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_weights_of_the_global_generators_are_those_of_the_seed_and_move_none():
    runs = []
    for _ in range(2):
        before = global_states()
        runs.append(build_run(tiny("model=test_agreement:from_global"), str(TINY), Solo()).run)
        assert global_states() == before
        random.random(), np.random.random()
    other = build_run(tiny("model=test_agreement:from_global", "seed=2"), str(TINY), Solo()).run
    of = lambda run, leaf: run.trainer.model.initial[leaf]
    for leaf in ("3.weight", "3.bias"):
        assert torch.equal(of(runs[0], leaf), of(runs[1], leaf)) and not torch.equal(of(runs[0], leaf), of(other, leaf))
    on_ranks(3, lambda comm: build_run(tiny("model=test_agreement:from_global"), str(TINY), comm))


def changed_on_rank_2(monkeypatch, change):
    """Rank 2 reads other data."""
    load = build.load

    def other(source):
        data = load(source)
        return change(data) if ODD.rank == 2 else data

    monkeypatch.setattr(build, "load", other)


def test_one_other_image_on_one_rank_is_refused_with_its_number(monkeypatch):
    def change(data):
        x = data.train.x.clone()
        x[37] = 255 - x[37]
        return data._replace(train=Samples(x, data.train.y))

    changed_on_rank_2(monkeypatch, change)
    line = refused()
    assert "rank 2 (host " in line and "training samples: not the same as on rank 0 (the first is number 37" in line
    assert "data.root = ~/data" in line


def test_another_label_and_a_missing_sample_are_told(monkeypatch):
    changed_on_rank_2(monkeypatch, lambda data: data._replace(test=Samples(data.test.x[:-1], data.test.y[:-1])))
    assert "test samples: not the same as on rank 0 (the first is number 119" in refused()


def test_another_version_on_one_rank_is_refused(monkeypatch):
    class Other(str):
        pass

    found = inventory.inventory
    monkeypatch.setattr(
        agreement,
        "inventory",
        lambda *given: found(*given) | ({"package": {"fedlora_mpi": "0.0.1"}} if ODD.rank else {}),
    )
    line = refused()
    assert "ranks 1, 2 (host" in line and "fedlora_mpi is 0.0.1, on rank 0" in line and "one version" in line


def test_another_file_of_the_users_own_on_one_rank_is_refused(monkeypatch):
    monkeypatch.setattr(inventory, "source", lambda home: b"x" * ODD.rank)
    line = refused("model=test_agreement:from_global", "algorithm=test_agreement:Drawing")
    assert line  # the draws differ as well
    line = refused("model=test_agreement:from_global")
    assert "module test_agreement: not the same as on rank 0; give all nodes the same file" in line


def on_other_machines(monkeypatch, ranks):
    """These ranks have another CPU level, and weights that are off in their last bits."""
    here = inventory.platform_here()
    monkeypatch.setattr(
        inventory, "platform_here", lambda: here | ({"CPU level": "DEFAULT"} if ODD.rank in ranks else {})
    )


def test_other_machines_are_told_of_and_take_the_first_weights_of_rank_0(monkeypatch, capsys):
    on_other_machines(monkeypatch, {1, 2})
    monkeypatch.setattr("test_agreement.TURN", itertools.count())

    def main(comm):
        ODD.rank = comm.rank
        return build_run(tiny("model=test_agreement:unseeded", "algorithm=fedlora"), str(TINY), comm).run

    runs = on_ranks(3, main)
    for run in runs[1:]:
        assert torch.equal(run.trainer.model.initial["3.weight"], runs[0].trainer.model.initial["3.weight"])
        for part in ("shared", "personal"):
            a, b = getattr(run.kinds[0].first, part), getattr(runs[0].kinds[0].first, part)
            assert list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "ranks 1, 2 (host" in lines[0] and "CPU level is DEFAULT, on rank 0" in lines[0]
    assert "bits may differ" in lines[0]


def test_a_rank_like_rank_0_is_not_excused_by_another_machine(monkeypatch, capsys):
    on_other_machines(monkeypatch, {1})
    assert "rank 2 (host" in refused("model=test_agreement:unseeded")


def test_equal_ranks_say_nothing(capsys):
    def main(comm):
        return build_run(tiny(), str(TINY), comm).inventory

    first, *rest = on_ranks(3, main)
    assert all(found == first for found in rest) and list(first) == list(inventory.KINDS)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(3.0),
        torch.zeros(0, 5),
        torch.ones(3, 5, dtype=torch.bool),
        torch.ones(3, 5, dtype=torch.bfloat16),
        torch.ones(3, 5, dtype=torch.complex64),
        torch.arange(15).view(3, 5).T,
    ],
)
def test_a_tensor_has_the_digest_of_its_numbers_whatever_its_strides(value):
    assert inventory.of_tensor(value) == inventory.of_tensor(value.contiguous().clone())
    assert inventory.of_tensor(value) != inventory.of_tensor(value.to(torch.complex128))


def test_a_digest_in_pieces_is_that_of_the_whole(monkeypatch):
    value = torch.arange(35.0).view(7, 5)
    whole = inventory.of_tensor(value)
    monkeypatch.setattr(inventory, "_AT_ONCE", 40)
    assert inventory.of_tensor(value) == whole != inventory.of_tensor(value.flip(0))
