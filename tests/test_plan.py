"""What a plan predicts, as arithmetic: from made-up unit costs, not from a clock."""

import contextlib
import math
import os
import re
import sys
import time

import pytest
import torch
from runs import MIXED, TINY, build_tiny
from tiers import thorough_param
from torch.nn import functional as F

from fedlora_mpi.cli import main
from fedlora_mpi.config import read
from fedlora_mpi.core.scheduling import assign_groups
from fedlora_mpi.core.tree import nbytes
from fedlora_mpi.engine.flops import Flops
from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.plan import estimate
from fedlora_mpi.plan.counted import GpuSeconds, _count, count_gpu_costs, gpu_capacity
from fedlora_mpi.plan.devices import CONTEXT_BYTES, GPUS, Device, find_device
from fedlora_mpi.plan.forecast import Costs, Machine, UnitCosts, allgather, allreduce, forecast
from fedlora_mpi.plan.line import CostLine, sample_limits
from fedlora_mpi.plan.scaling import scaling_text
from fedlora_mpi.plan.unit_costs import _run_beside, measure_costs

HERE = Machine(math.inf, 1e9, 1e-5)
UNIT = UnitCosts(CostLine(0.5, 0.25, 0.125), CostLine(0, 0, 0), CostLine(0, 0, 0.0625), 2.0)
FREE = Costs({0: UNIT}, 0.0, 0.0, 0.0, (0.0, 0.0), 0.0, 0.0, 0.0, 0.0, 0.0, 0)


def built(*overrides: str):
    return build(read(TINY, ["participation=1", *overrides]), str(TINY), Solo())


def seconds(costs: Costs, ranks: int, *overrides: str, machine: Machine = HERE):
    made = built(*overrides)
    return forecast(made, costs, range(1, ranks) if ranks > 1 else [0], ranks, machine)


@pytest.mark.parametrize(
    "samples, batch_size", [(60, 10), (17, 10), (25, 10), (10, 10), (7, 10), (1, 1), (2, 1), (9, 4)]
)
def test_a_line_is_found_again_from_what_it_measures(samples, batch_size):
    line = CostLine(3.0, 2.0, 0.5)
    found = CostLine.through(
        lambda limit: line.cost([limit] * 3, batch_size), 3, samples, batch_size
    )
    for size in {*sample_limits(samples, batch_size), samples}:
        assert found.cost([size] * 3, batch_size) == pytest.approx(
            line.cost([size] * 3, batch_size)
        )
    if min(samples, batch_size) > 1 and samples > batch_size:
        assert found == pytest.approx(line)


@pytest.mark.parametrize("samples", [60, 17, 25, 10, 7])
def test_what_a_client_costs_in_every_batch_is_found_from_half_of_a_stack(samples):
    line = CostLine(3.0, 2.0, 0.5, 0.25)

    def cost(clients):
        return lambda limit: line.cost([limit] * clients, 10)

    found = CostLine.through(cost(4), 4, samples, 10).with_client_cost(cost(2), 2, 4, samples, 10)
    for clients in (4, 2) if samples > 10 else (4,):
        assert cost(clients)(samples) == pytest.approx(found.cost([samples] * clients, 10))
    if samples > 10:
        assert found == pytest.approx(line) and found.cost([25, 10, 3], 10) == pytest.approx(
            3 + 2 * 3 + 0.25 * 5 + 0.5 * 38
        )
    noisy = CostLine(3.0, 2.0, 0.5).with_client_cost(lambda limit: -9.0 * limit, 2, 4, samples, 10)
    assert min(noisy) >= 0 and noisy.cost([samples] * 4, 10) == pytest.approx(
        CostLine(3.0, 2.0, 0.5).cost([samples] * 4, 10)
    )


def test_a_line_through_noise_has_nothing_negative():
    for few, full, many in ((5.0, 4.0, 3.0), (1.0, 9.0, 10.0), (4.0, 4.0, 30.0)):
        found = CostLine.through(
            dict(zip(sample_limits(60, 10), (few, full, many), strict=True)).get, 2, 60, 10
        )
        assert min(found) >= 0


def test_one_worker_trains_the_sum_of_its_stacks():
    federation = built().federation
    sizes = [
        [federation.clients.sizes[c] for c in stack]
        for group in federation.placement.groups
        for stack in federation.placement.split_into_stacks(group, federation.clients)
    ]
    tests = sum(map(len, built().split.test))
    found = seconds(FREE, 1)
    assert found.train == pytest.approx(
        sum(0.5 + 0.25 * math.ceil(max(n) / 8) + 0.125 * sum(n) for n in sizes) + tests / 16
    )
    assert (
        found.evaluate == pytest.approx(tests / 16)
        and found.exchange == 0
        and found.busy_fraction == 1
    )


def test_twice_the_unit_cost_is_twice_the_time():
    double = UNIT._replace(train=CostLine(1.0, 0.5, 0.25), score=CostLine(0, 0, 0.125))
    for ranks in (1, 3, 4):
        once, twice = seconds(FREE, ranks), seconds(FREE._replace(units={0: double}), ranks)
        assert twice.train == pytest.approx(2 * once.train) and twice.evaluate == pytest.approx(
            2 * once.evaluate
        )


def test_more_workers_are_never_slower_to_train_and_one_a_group_is_the_end():
    for stage in ("train", "evaluate"):
        took = [getattr(seconds(FREE, ranks), stage) for ranks in (1, 3, 4, 5, 6, 64)]
        assert took == sorted(took, reverse=True) and took[0] > took[1] > took[3] == took[-1]
    assert seconds(FREE, 64).busy_fraction < seconds(FREE, 3).busy_fraction


def test_a_loop_pays_for_every_client_apart():
    assert seconds(FREE, 1, "engine.path=loop").train == pytest.approx(
        seconds(FREE, 1, "engine.group_size=1").train
    )


def test_a_small_cohort_costs_what_its_clients_cost_and_is_judged_whole():
    tree = ["participation=0.3", "rounds=16"]
    federation, costs = (
        built(*tree).federation,
        FREE._replace(
            units={0: UNIT._replace(train=CostLine(1.0, 0, 0), score=CostLine(0, 0, 1.0))}
        ),
    )
    stacks = [
        sum(
            len(federation.placement.split_into_stacks(m, federation.clients))
            for g in federation.placement.groups
            if (m := [c for c in g if c in federation.cohorts.sample(t).members])
        )
        for t in range(16)
    ]
    tests = [
        sum(len(built().split.test[c]) for c in federation.cohorts.sample(t).members)
        for t in range(16)
    ]
    found = seconds(costs, 1, *tree)
    assert found.train == pytest.approx((sum(stacks) + sum(tests)) / 16)
    assert found.evaluate == pytest.approx(sum(map(len, built().split.test)))


def test_a_cohort_judged_alone_costs_what_its_tests_cost():
    tree = ["participation=0.3", "rounds=16", "evaluate.clients=cohort"]
    made = built(*tree)
    tests = [
        sum(len(made.split.test[c]) for c in made.federation.cohorts.sample(t).members)
        for t in range(16)
    ]
    assert seconds(FREE, 1, *tree).evaluate == pytest.approx(sum(tests) / 16 / 16)


def test_workers_beyond_the_cores_share_them():
    crowded, free = (seconds(FREE, 5, machine=HERE._replace(cores=n)) for n in (2, 4))
    assert crowded.train == pytest.approx(2 * free.train) and crowded.evaluate == pytest.approx(
        2 * free.evaluate
    )


def test_workers_without_clients_take_no_core_from_the_others():
    crowd, few = (seconds(FREE, n, machine=HERE._replace(cores=4)) for n in (64, 5))
    groups = len(built().federation.placement.groups)
    assert groups <= 4 and crowd.train == few.train


def scaling(costs, ranks, machine, *overrides):
    return scaling_text(built(*overrides), costs, ranks, machine)


def test_a_plan_says_from_which_ranks_on_it_is_no_faster_and_why():
    free, net = HERE._replace(cores=math.inf), HERE._replace(cores=math.inf, bandwidth=1e2)
    assert scaling(FREE, 2, free) == ""
    assert re.fullmatch(r"\d\.\d times as fast as one rank", scaling(FREE, 3, free))
    assert "2 cores are busy" in scaling(FREE, 1024, free._replace(cores=2))
    equal = ["data.partition.kind=iid", "data.partition.train=20", "data.partition.test=5"]
    text = scaling(FREE, 1024, free, *equal)
    assert "5 ranks are as fast; more are not worth it: there are 4 groups of clients" in text
    cheap = FREE._replace(units={0: UNIT._replace(train=CostLine(0.0, 0, 1e-6))})
    text = scaling(cheap, 1024, net, "engine.group_size=1")
    assert "; 1 rank: 1.0 times; more are not worth it: the exchange takes" in text
    assert "3 ranks are as fast; more are not worth it: one worker trains" in scaling(
        FREE, 1024, free
    )


def test_evaluating_and_checkpointing_less_often_costs_less():
    costs = FREE._replace(
        units={0: UNIT._replace(train=CostLine(0, 0, 0))}, log=1.0, checkpoint=6.0, file=2.0
    )
    often, seldom = (
        seconds(costs, 1, "evaluate.every=1", "checkpoint.every=1"),
        seconds(costs, 1, "evaluate.every=4", "checkpoint.every=4"),
    )
    assert seldom.evaluate == pytest.approx(often.evaluate / 4) and seldom.train == pytest.approx(
        often.train / 4
    )
    assert seldom.files - 1 == pytest.approx((often.files - 1) / 4) and often.files == 1 + 6 + 2


def test_every_worker_writes_a_file_for_each_kind_of_clients():
    made, costs = (
        built(*MIXED, "checkpoint.every=1"),
        FREE._replace(units=dict.fromkeys(range(3), UNIT), file=2.0),
    )
    for ranks in (1, 3):
        workers = range(1, ranks) if ranks > 1 else [0]
        there = {
            (rank, made.federation.clients.type_of[c])
            for g, rank in zip(
                made.federation.placement.groups,
                assign_groups(made.federation.placement.costs, workers),
                strict=True,
            )
            for c in g
        }
        assert forecast(made, costs, workers, ranks, HERE).files == 2 * len(there) >= 6


def test_messages_cost_by_the_textbook():
    assert allreduce(1e9, 1, HERE) == allgather(1e9, 1, HERE) == 0
    assert allreduce(1e9, 4, HERE) == pytest.approx(1.5 + 4e-5 + 1e-3) and allgather(
        1e9, 4, HERE
    ) == pytest.approx(0.75 + 2e-5 + 1e-3)
    assert allreduce(1e9, 4, HERE._replace(bandwidth=2e9)) == pytest.approx(0.75 + 4e-5 + 1e-3)


def test_what_others_send_is_added_up_by_everybody_where_uploads_are_gathered():
    ours = ("algorithm={name: flexlora, lora_ranks: [2]}", "uplink=gather")
    gathers, sums = seconds(FREE, 3, *ours), seconds(FREE, 3, *ours[:1], "uplink=sum")
    assert gathers.exchange == pytest.approx(7 * 2.0, abs=0.01) and sums.exchange < 0.01
    assert seconds(FREE, 1, *ours).exchange == 0


def test_a_pair_of_mixed_clients_costs_by_the_square():
    costs = FREE._replace(mix=(1.0, 10.0))
    assert seconds(costs, 1, "algorithm=fedamp").exchange == pytest.approx(7 * 1.0 + 49 * 10.0)


def test_a_gpu_takes_the_longer_of_starting_and_computing():
    quick = GpuSeconds(CostLine(1.0, 2.0, 0.0), CostLine(0.0, 0.0, 0.01))
    assert quick.cost([20, 20], 10) == 1.0 + 2 * 2.0 and quick.cost([2000], 1000) == pytest.approx(
        20.0
    )


def test_operations_are_counted_as_they_are_done():
    x, w = torch.ones(4, 3), torch.ones(5, 3, requires_grad=True)

    def step():
        return F.relu(F.linear(x, w)).sum().backward()

    counted = _count(step)
    # forward, and backward for w alone
    assert counted.flops == 2 * 2 * 4 * 3 * 5 and counted.operations >= 5
    twice = _count(lambda: (step(), step()))
    assert twice.flops == 2 * counted.flops
    assert _count(lambda: torch.add(x, x)).bytes == 4 * 12 * 2  # one tensor read, one written


def test_the_memory_is_that_of_tensors_that_live_at_the_same_time():
    x = torch.ones(10)

    def one_by_one():
        for _ in range(5):
            (x + x) * x

    def together():
        return [x + x for _ in range(5)]

    assert _count(one_by_one).peak == 2 * x.nbytes
    assert _count(together).peak == 5 * x.nbytes
    assert _count(lambda: [x.view(2, 5), x[3:]]).peak == 0
    assert _count(lambda: torch.ones(10).mul_(2).add_(3)).peak == x.nbytes


_VIT = "model={name: vit, patch: 2, width: 32, heads: 2, layers: 4, feedforward: 64}"


@pytest.mark.parametrize(
    "more",
    [
        ("algorithm.merge=false",),
        thorough_param(()),
        thorough_param(("algorithm.merge=false", "engine.gradient_checkpointing=true")),
        thorough_param(("algorithm=fedavg",)),
    ],
)
def test_the_memory_of_a_batch_follows_from_a_smaller_one(more):
    """A step is counted with batches of 4. The peak of a step of 24 samples is within 15 %."""
    settings = ("algorithm=fedit", *more, _VIT, "engine.path=loop", "engine.group_size=1")
    federation = build_tiny(*settings, "train.batch_size=24", "train.epochs=1").federation
    (kind,) = federation.clients.types
    client = max(range(7), key=kind.trainer.feed.train_size)
    found = count_gpu_costs(kind, client, 24, GPUS["h200"], "float32").client_bytes
    rows = {n: v[None] for n, v in kind.initial.personal.items()}
    peak = _count(lambda: list(kind.trainer.train([client], kind.initial.shared, rows, 0))).peak
    expected = peak + nbytes(kind.initial.shared) + nbytes(kind.initial.personal)
    assert kind.trainer.feed.train_size(client) > 24
    assert 0.85 * expected < found < 1.15 * expected


def test_a_gpu_holds_so_many_workers():
    gpu = Device(1.0, 1.0, 1.0, memory=10e9)
    assert gpu_capacity(gpu, common_bytes=10**9, client_bytes=4e8, group_size=1) == (
        CONTEXT_BYTES + 1.4e9,
        5,
        21,
    )


def test_a_named_gpu_and_its_bandwidth_change_what_is_predicted(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(GPUS, "snail", Device(1e6, 1e6, 1e12, 10e9))
    config = read(TINY, ["participation=1", "engine.path=auto"])
    slow, fast = (
        estimate(config, str(TINY), 3, name, bandwidth)
        for name, bandwidth in (("snail", 1e3), ("h200", 1e9))
    )
    federation = slow.assembly.federation
    client_type, placement = federation.clients.types[0], federation.placement
    count = Flops(client_type.trainer, client_type.local_initial)
    flops = max(
        sum(
            count.round_flops(federation.clients.sizes[c], 0)
            for g, h in zip(placement.groups, (1, 2, 2, 1), strict=True)
            if h == r
            for c in g
        )
        for r in (1, 2)
    )
    assert (
        slow.seconds.train == pytest.approx(flops / (0.35 * 1e6), rel=0.25)
        and fast.seconds.train < slow.seconds.train / 10
    )
    assert (
        slow.seconds.exchange > fast.seconds.exchange + 10
        and slow.assembly.config.engine.path == "stack"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given, said",
    [
        (
            ["--gpus=h300"],
            "--gpus = h300: not known; known are v100, t4, a10, a100-40, a100, l40s, rtx4090, "
            "h100, h200, or none",
        ),
        (["--bandwidth=0"], "--bandwidth = 0: must be positive"),
        (["--bandwidth=inf"], "--bandwidth = inf: must be positive"),
        (["--latency=-1"], "--latency = -1: must be positive"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(given, said, capsys):
    assert main(["plan", str(TINY), *given]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"fedlora-mpi: {said}") and err.count("\n") == 1


def test_a_plan_says_what_was_measured_and_what_assumed(capsys):
    assert main(["plan", str(TINY), "--ranks=8", "--gpus=a100", "--latency=1e-6"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert (
        "35% of the a100's FLOP/s" in lines["assumed"]
        and "12.5 GB/s between ranks" in lines["assumed"]
    )
    assert (
        "latency 1e-06" in lines["given"]
        and "counted" in lines["measured"]
        and "of 80 GB" in lines["gpu"]
    )
    assert find_device("none") is None


def test_a_message_has_its_price_also_where_next_to_nothing_is_uploaded():
    made = built("algorithm=fedamp")
    # a core adds up gigabytes a second
    assert (
        made.federation.aggregator.terms.flat.size < 100 and measure_costs(made)[0].add_byte < 1e-8
    )


@pytest.mark.skipif(sys.platform != "linux", reason="a fork is not safe")
def test_others_compute_meanwhile_and_are_gone_after(tmp_path):
    def work():
        with open(tmp_path / str(os.getpid()), "a") as file:
            file.write(".")
        time.sleep(1e-3)

    with _run_beside(2, work):
        until = time.monotonic() + 30
        while (
            sum(len(file.read_text()) > 2 for file in tmp_path.iterdir()) < 2
            and time.monotonic() < until
        ):
            time.sleep(1e-2)
    found = {int(file.name): len(file.read_text()) for file in tmp_path.iterdir()}
    # again and again
    assert len(found) == 2 and os.getpid() not in found and min(found.values()) > 2
    for child in found:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


@pytest.mark.parametrize(
    "ranks, gpus, cores, others",
    [(1, None, 8, 0), (3, None, 8, 1), (9, None, 4, 3), (9, "a100", 8, 0)],
)
def test_a_trial_is_made_beside_as_many_as_will_work_here(ranks, gpus, cores, others, monkeypatch):
    given = []
    # each size is tried twice, no more
    monkeypatch.setattr("fedlora_mpi.plan.unit_costs._SECONDS", 0.0)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr(
        "fedlora_mpi.plan.unit_costs._run_beside",
        lambda n, work: given.append(n) or contextlib.nullcontext(),
    )
    estimate(read(TINY, []), str(TINY), ranks, gpus)
    assert given == [others]
