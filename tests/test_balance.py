"""Groups move to where they take the slowest worker least, and no number moves with them."""

import numpy as np
import pytest
import torch
from runs import (
    MIXED,
    TINY,
    build_tiny,
    join_personal,
    run_on_ranks,
    run_rounds,
    snapshot,
    tiny_config,
)

from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.experiment.checkpointing import initial_state
from fedlora_mpi.experiment.engine_choice import worker_ranks
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.resilience.rebalancing import is_rebalancing_due, rebalance


def balanced_run(ranks: int, taken: list[float], *asked: str, samples: float = 1.0):
    """(the hosts before, the run, the last moment) of a run that moves after round 2, when kinds
    have taken so long.
    """
    config = tiny_config(*MIXED, *asked)

    def main(comm):
        parts = build(config, str(TINY), comm)
        federation, state, before = (
            parts.federation,
            initial_state(parts),
            parts.federation.placement.rank_of_group,
        )
        for round_ in range(config.rounds):
            state, row, clients = run_round(federation, state, evaluate=True, stop=False)
            if round_ == 1:
                assert (
                    federation.instruments.throughput >= 0
                ).all() and federation.instruments.throughput[1].sum() == sum(
                    federation.clients.sizes[c]
                    for c in federation.placement.local_clients
                    for r in (0, 1)
                    if c in federation.cohorts.sample(r).members
                )
                federation.instruments.throughput[:] = np.array([taken, [1.0, 1.0, samples]])
                federation, state = rebalance(
                    federation, state, worker_ranks(config, comm.size), config.mix
                )
        return (
            federation,
            before,
            snapshot(state, row, clients),
        )

    found = run_on_ranks(ranks, main)
    runs = [federation for federation, *_ in found]
    moment = found[0][2]._replace(personal=join_personal(runs, [m.personal for *_, m in found]))
    assert len({federation.placement.rank_of_group for federation in runs}) == 1
    return found[0][1], runs[0], moment


FURTHER = (("uplink=gather",), ("evaluate.clients=cohort",))


@pytest.mark.parametrize(
    "asked",
    [(), *(pytest.param(asked, marks=pytest.mark.thorough) for asked in FURTHER)],
    ids=["sum", "gather", "cohort"],
)
def test_clients_that_move_keep_their_numbers(asked):
    before, federation, moment = balanced_run(3, [9.0, 1.0, 1.0], *asked)
    assert federation.placement.rank_of_group != before
    whole = run_rounds(*MIXED, *asked)[0][-1]
    for a, b in ((moment.shared, whole.shared), (moment.personal, whole.personal)):
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    np.testing.assert_array_equal(moment.clients["accuracy"], whole.clients["accuracy"])


def test_groups_lie_as_the_seconds_say():
    _, federation, _ = balanced_run(3, [1000.0, 1.0, 1.0], "rounds=2")
    slow = [
        sum(
            federation.clients.sizes[c]
            for g, h in zip(
                federation.placement.groups, federation.placement.rank_of_group, strict=True
            )
            for c in g
            if h == w and federation.clients.type_of[c] == 0
        )
        for w in (1, 2)
    ]
    sizes = sorted(
        federation.clients.sizes[c] for c in range(7) if federation.clients.type_of[c] == 0
    )
    # the slow kind alone decides: three clients on two workers
    assert max(slow) == max(sizes[-1], sizes[0] + sizes[1])
    assert federation.placement.costs == tuple(
        1000.0 ** (federation.clients.type_of[g[0]] == 0)
        * sum(federation.clients.sizes[c] for c in g)
        for g in federation.placement.groups
    )


def test_nobody_moves_where_little_is_gained_or_a_kind_is_unknown():
    flops = [
        client_type.trainer.model.flops
        for client_type in build_tiny(*MIXED).federation.clients.types
    ]
    for taken, samples in (([float(f) for f in flops], 1.0), ([9.0, 1.0, 0.0], 0.0)):
        before, federation, _ = balanced_run(3, taken, "rounds=2", samples=samples)
        assert federation.placement.rank_of_group == before


def test_it_is_looked_at_after_rounds_2_4_8_of_several_kinds_on_several_workers():
    mixed, alone = (
        run_on_ranks(3, lambda comm: build(tiny_config(*MIXED), str(TINY), comm).federation)[0],
        build_tiny(*MIXED).federation,
    )
    assert [r for r in range(70) if is_rebalancing_due(mixed, r)] == [2, 4, 8, 16, 32, 64]
    assert not any(is_rebalancing_due(alone, r) for r in range(70))
    one_kind = run_on_ranks(3, lambda comm: build(tiny_config(), str(TINY), comm).federation)[0]
    assert not any(is_rebalancing_due(one_kind, r) for r in range(70))
