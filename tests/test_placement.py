"""Groups follow from the clients, hosts from the groups, cohorts from a permutation."""

import itertools

import pytest
import small
import torch
from runs import assert_near, build_tiny, run_rounds, snapshots_equal

from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.core.scheduling import assign_groups
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.federation.cohorts import group_clients, take_cohort


def sizes(count):
    return torch.randint(1, 9, (count,), generator=rng(1, "test", count)).tolist()


@pytest.mark.parametrize("count, group_size", [(1, 1), (7, 1), (7, 3), (31, 10), (5, 8)])
def test_groups_hold_every_client_once_larger_ones_first(count, group_size):
    held = sizes(count)
    made = group_clients(held, group_size)
    order = list(itertools.chain(*made))
    assert sorted(order) == list(range(count))
    assert [len(group) for group in made[:-1]] == [group_size] * (len(made) - 1) and 0 < len(
        made[-1]
    ) <= group_size
    keys = [(-held[client], client) for client in order]
    assert keys == sorted(keys)  # ties in the order of their ids


def test_ties_are_broken_by_id():
    assert group_clients([5, 7, 5, 7, 3], 2) == ((1, 3), (0, 2), (4,))


@pytest.mark.parametrize("workers", [[0], [0, 1], [1, 2, 3], range(1, 8)])
def test_the_longest_group_goes_to_the_least_loaded_worker(workers):
    costs = sizes(31)
    host = assign_groups(costs, workers)
    assert len(host) == 31 and set(host) <= set(workers)
    load = {w: sum(c for c, h in zip(costs, host, strict=True) if h == w) for w in workers}
    optimum = max(max(costs), sum(costs) / len(workers))
    assert max(load.values()) <= (4 / 3 - 1 / (3 * len(workers))) * optimum + 1e-9  # Graham (1969)
    for worker in workers:  # its last and shortest group came when nobody had less
        last = min(c for c, h in zip(costs, host, strict=True) if h == worker)
        assert load[worker] - last <= min(load.values())


def test_grahams_example_is_placed_longest_first():
    assert assign_groups([3, 3, 2, 2, 2], [4, 6]) == (4, 6, 4, 6, 4)
    # 5 | 4 3, then 2 to the 5, a tie to the lower rank
    assert assign_groups([1, 2, 3, 4, 5], [0, 1]) == (0, 0, 1, 1, 0)


def test_equal_groups_are_dealt_evenly():
    host = assign_groups([2.5] * 31, [1, 2, 3, 4])
    assert sorted(host.count(w) for w in (1, 2, 3, 4)) == [7, 8, 8, 8]


def test_more_workers_than_groups_leave_some_idle():
    assert set(assign_groups([3, 1, 2], range(5))) == {0, 1, 2} and assign_groups([], [0]) == ()


@pytest.mark.parametrize(
    "clients, fraction, count",
    [
        (40, 1.0, 40),
        (40, 0.5, 20),
        (7, 0.5, 3),
        (7, 0.1, 1),
        (1, 0.3, 1),
        (31, 0.9, 27),
        (100, 0.29, 29),
    ],
)
def test_a_cohort_is_the_head_of_the_permutation(clients, fraction, count):
    draw = torch.randperm(clients, generator=rng(1, clients)).tolist()
    chosen = take_cohort(clients, fraction, draw)
    assert chosen == set(draw[:count]) and len(chosen) == count


def test_cohorts_follow_seed_and_round_alone():
    federation, _ = small.make_experiment(FedAvg(), participation=0.6)
    draws = [federation.cohorts.sample(round_).members for round_ in range(30)]
    torch.rand(3)
    assert [federation.cohorts.sample(round_).members for round_ in reversed(range(30))] == draws[
        ::-1
    ]
    again, _ = small.make_experiment(FedAvg(), participation=0.6, network="bn_net", group_size=2)
    assert [again.cohorts.sample(round_).members for round_ in range(30)] == draws
    assert len(set(draws)) > 5 and set().union(*draws) == set(range(5))


# Small cohorts of many clients: those of a group that take part compute together.

FEW = (
    "participation=0.3",
    "data.partition.clients=14",
    "data.partition.minimum=2",
    "algorithm=fedavg",
)


def test_a_groups_part_of_the_cohort_is_cut_into_equal_stacks_largest_first():
    federation = build_tiny(*FEW, "participation=1.0").federation
    for count, lengths in ((0, []), (1, [1]), (2, [2]), (3, [1, 2]), (5, [1, 2, 2]), (14, [2] * 7)):
        stacks = federation.placement.split_into_stacks(range(count), federation.clients)
        assert [len(stack) for stack in stacks] == lengths
        flat = [client for stack in stacks for client in stack]
        assert sorted(flat) == list(range(count))
        sizes = [federation.clients.sizes[client] for client in flat]
        assert sizes == sorted(sizes, reverse=True)


def test_a_group_holds_so_many_clients_that_a_stack_of_them_takes_part():
    assert [len(group) for group in build_tiny(*FEW).federation.placement.groups] == [6, 6, 2]
    assert [
        len(group) for group in build_tiny(*FEW, "participation=1.0").federation.placement.groups
    ] == [2] * 7
    # nothing to gain
    assert [
        len(group) for group in build_tiny(*FEW, "engine.path=loop").federation.placement.groups
    ] == [2] * 7
    wide = build_tiny(
        *FEW,
        "participation=0.1",
        "engine.group_size=auto",
        "data.partition.clients=30",
        "data.synthetic.train=600",
    )
    # of a cohort of 3
    assert [len(group) for group in wide.federation.placement.groups] == [
        20,
        10,
    ] and wide.config.engine.group_size == 2


def test_small_cohorts_have_the_same_bits_on_any_ranks_and_the_numbers_of_the_loop():
    one = run_rounds(*FEW, "rounds=3")[0]
    for ranks in (2, 3):
        assert all(
            snapshots_equal(a, b)
            for moments in run_rounds(*FEW, "rounds=3", ranks=ranks)
            for a, b in zip(one, moments, strict=True)
        )
    loop = run_rounds(*FEW, "rounds=3", "engine.path=loop")[0]
    assert_near(one[-1].shared, loop[-1].shared)
    assert not snapshots_equal(one[0], one[-1])
