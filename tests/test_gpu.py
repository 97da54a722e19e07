"""What a GPU is asked to do, without one: by a device that is none (see ``far.py``), and by
stand-ins on the CPU.
"""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import far
import pytest
import small
import torch
import torch.nn.functional as F
from methods import FIELDS, SETTINGS
from runs import (
    NORM,
    assert_same_run,
    create_run,
    run_rounds,
    snapshots_equal,
    tiny_config,
)
from tiers import thorough_param
from torch.utils._python_dispatch import TorchDispatchMode

from fedlora_mpi import algorithms
from fedlora_mpi import config as configs
from fedlora_mpi.aggregation.exact_sum import ExactSum, FastSum
from fedlora_mpi.aggregation.topology import Ring
from fedlora_mpi.algorithm import Phase, Step
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.core.batch import cross_entropy
from fedlora_mpi.data.feed import Feed
from fedlora_mpi.engine import graphs as recording
from fedlora_mpi.engine.client_streams import ClientStreams
from fedlora_mpi.engine.device import choose_path
from fedlora_mpi.engine.graphs import CudaGraph, GraphCache
from fedlora_mpi.engine.half import bfloat16_forward
from fedlora_mpi.engine.memory import MemoryBudget, is_memory_error, stack_capacity
from fedlora_mpi.engine.products import ConvolutionsAsProducts
from fedlora_mpi.engine.settings import Engine
from fedlora_mpi.engine.train import Trainer
from fedlora_mpi.engine.walk import PhaseRunner
from fedlora_mpi.federation.client_store import MemoryRows

ROOT = Path(__file__).parent.parent
METHODS = ("fedavg", "fedlora", "scaffold", "fedamp", "moon", "pfedgate")
STEPS = [
    ("fedlora", False),
    ("fedlora", True),
    *(thorough_param(name, True) for name in METHODS if name != "fedlora"),
]
OTHERS = [
    thorough_param(name, True) for name in algorithms.algorithm_names() if name not in METHODS
]


@pytest.fixture
def machine():
    with far.FarMachine() as machine:
        yield machine


def made(name, stacked=True, network="bn_net", device=small.CPU, sizes=small.SIZES):
    """(Federation, State before round 1) of ragged clients on ``device``."""
    plain = ("scaffold", "pfedme", "fedglomo", "depositum_like")
    train = replace(small.TRAIN, lr=0.02, **({"momentum": 0.0} if name in plain else {}))
    topology = Ring() if name in ("dpsgd", "depositum_like") else None
    federation, state = small.make_experiment(
        algorithms.find_algorithm(name)(**FIELDS.get(name, {})),
        network,
        sizes,
        stacked=stacked,
        train=train,
        topology=topology,
    )
    if device == small.CPU:
        return federation, state
    model = federation.clients.trainer.model.to(device)
    feed = Feed(*FEED, seed=1, shift="none", device=device, augment=False)
    federation = small.with_trainers(federation, model=model, feed=feed, device=device)

    def there(tree):
        return {n: v.to(device) for n, v in tree.items()}

    state = state._replace(shared=there(state.shared), server=there(state.server))
    return federation, state


FEED = []


@pytest.fixture(autouse=True)
def remembered(monkeypatch):
    """The arguments of the feeds that ``small`` makes."""
    whole = Feed.__init__

    def init(self, data, split, **how):
        FEED[:] = data, split
        whole(self, data, split, **how)

    monkeypatch.setattr(Feed, "__init__", init)


def recorded(federation, graph=None):
    """``federation`` whose epochs are recorded."""
    graphs = GraphCache(federation.clients.trainer.device, graph)
    return small.with_trainers(federation, graphs=graphs)


def ends(federation, state, rounds=3):
    """All variables after some rounds, on the host."""
    state = small.run_rounds(federation, state, rounds)
    return [
        {n: v.cpu() for n, v in tree.items()}
        for tree in (state.shared, state.personal, state.server)
    ]


def equal(a, b):
    return all(small.trees_equal(x, y) for x, y in zip(a, b, strict=True))


# On a device that is not the host


@pytest.mark.parametrize("name, stacked", [*STEPS, *OTHERS])
def test_a_round_on_a_device_has_the_bits_of_one_on_the_host_and_waits_not_inside_local_training(
    name, stacked, machine, monkeypatch
):
    if name in ("fedapen", "fedkd", "fml"):
        pytest.skip("needs a second network of the settings")
    federation, state = made(name, stacked, device=far.DEVICE)
    whole, passes = Trainer._run_items, []

    def strict(self, *given):
        machine.raises_on_wait = name in METHODS
        try:
            return whole(self, *given)
        finally:
            machine.raises_on_wait = False
            passes.append(1)

    monkeypatch.setattr(Trainer, "_run_items", strict)
    there = ends(federation, state, 1)
    assert len(passes) == (1 if stacked else len(small.SIZES))
    assert machine.wait_names
    assert equal(there, ends(*made(name, stacked), 1))


def test_a_stack_waits_once_for_its_clients_and_once_for_each_upload(machine):
    federation, state = made("fedlora", device=far.DEVICE)
    (rows, start), trainer = (
        (small.repeat_rows(federation.clients.types[0].initial.personal, 5), state.shared),
        federation.clients.trainer,
    )
    machine.wait_names.clear()
    done = list(trainer.train(range(5), start, rows, 0, evaluate=True))
    # and the losses, and the scores; on CUDA one wait for all
    leaves = len(done[0].end.personal) + 2
    assert machine.wait_names == ["aten._to_copy.default"] * leaves
    assert all(
        small.trees_equal(d.personal, {n: v.cpu() for n, v in d.end.personal.items()}) for d in done
    )
    assert all(not isinstance(v, far.FarTensor) for d in done for v in (d.loss, d.score))


@pytest.mark.parametrize(
    "name, stacked",
    [("fedlora", True), ("fedlora", False), thorough_param("fedamp", True), ("fedcac", False)],
)
def test_personal_rows_that_stay_on_the_device_cross_no_bus(name, stacked, machine):
    federation, state = made(name, stacked, device=far.DEVICE)
    machine.wait_names.clear()
    small.run_rounds(federation, state, 1)
    copies = machine.wait_names.count("aten._to_copy.default")
    federation, state = made(name, stacked, device=far.DEVICE)
    state = state._replace(personal={n: v.to(far.DEVICE) for n, v in state.personal.items()})
    machine.wait_names.clear()
    new = small.run_rounds(federation, state, 1)
    assert all(isinstance(v, far.FarTensor) for v in new.personal.values())
    leaves = len(federation.clients.types[0].initial.personal)
    saved = leaves * (1 if stacked else len(small.SIZES))
    assert machine.wait_names.count("aten._to_copy.default") == copies - saved
    on_host = [{n: v.cpu() for n, v in tree.items()} for tree in (new.shared, new.personal)]
    assert equal(on_host, ends(*made(name, stacked), 1)[:2])


def test_rows_are_made_where_the_setting_says(machine):
    like = torch.zeros(3, dtype=torch.bfloat16)
    rows = MemoryRows(far.DEVICE).allocate(4, like)
    assert isinstance(rows, far.FarTensor) and rows.shape == (4, 3) and rows.dtype == like.dtype
    assert MemoryRows().allocate(4, like).device == small.CPU


def test_a_gpu_without_room_for_the_rows_says_so(monkeypatch):
    def empty(*shape, **how):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(ValueError, match=r"engine\.personal = device: cuda:0 has no room for 8 kB"):
        MemoryRows(torch.device("cuda:0")).allocate(2, torch.zeros(1000))


@pytest.mark.parametrize("cls", [ExactSum, FastSum])
def test_a_sum_of_vectors_here_and_there_is_that_of_all(cls, machine):
    vectors = [torch.randn(7, generator=small.rng(1, "v", n)) for n in range(4)]
    here, mixed = cls(9), cls(9)
    for number, v in enumerate(vectors):
        here.add(v, number + 1, offset=number % 3)
        mixed.add(v.to(far.DEVICE) if number % 2 else v, number + 1, offset=number % 3)
    machine.wait_names.clear()
    assert (here.buffer == mixed.buffer).all()
    assert len(machine.wait_names) == (cls is ExactSum)
    mixed.buffer[..., -2:] += here.buffer[..., -2:]
    here.buffer[..., -2:] += here.buffer[..., -2:]
    assert torch.equal(mixed.total(3, far.DEVICE).cpu(), here.total()[3:])


# Recordings


@pytest.mark.parametrize(
    "name",
    ["fedlora", "moon", *(thorough_param(n) for n in METHODS if n not in ("fedlora", "moon"))],
)
def test_epochs_that_are_played_again_have_the_bits_of_the_steps(name, monkeypatch):
    made, whole = [], recording._RecordedEpoch.replay
    monkeypatch.setattr(
        recording._RecordedEpoch, "replay", lambda self, epoch: made.append(1) or whole(self, epoch)
    )
    how = (
        f"algorithm={name}",
        NORM,
        "rounds=3",
        "participation=1.0",
        "engine.path=stack",
        *SETTINGS.get(name, ()),
    )
    again, plain = run_rounds(*how, "engine.graphs=true")[0], run_rounds(*how)[0]
    assert all(snapshots_equal(a, b) for a, b in zip(plain, again, strict=True))
    assert made


RECORDED = [
    ("fedlora", False, "cnn"),
    ("fedavg", True, "bn_net"),
    ("fedcac", True, "cnn"),  # a leaf of truth values
    thorough_param("fedlora", False, "bn_net"),
    thorough_param("fedlora", True, "bn_net"),
]
RECORDED += [thorough_param(name, True, "bn_net") for name in algorithms.algorithm_names()]


@pytest.mark.parametrize("name, stacked, network", RECORDED)
def test_a_recording_of_a_gpu_has_the_bits_of_the_steps(
    name, stacked, network, machine, monkeypatch, capsys
):
    if name in ("fedapen", "fedkd", "fml"):
        pytest.skip("needs a second network of the settings")
    far.patch_cuda(machine, monkeypatch)
    plain = ends(*made(name, stacked, network))
    federation, state = made(name, stacked, network, far.DEVICE)
    federation = recorded(federation, CudaGraph)
    assert equal(ends(federation, state), plain)
    assert federation.clients.trainer.graphs.recorded_epochs() >= (1 if stacked else 4)
    assert not capsys.readouterr().err


@dataclass(frozen=True)
class Asking(FedAvg):
    """FedAvg whose loss asks the device for a number."""

    def loss(self, model):
        def loss(now, start, batch):
            float(batch.x.detach().sum())
            return cross_entropy(model(now.shared, batch.x), batch)

        return loss


def test_what_waits_is_not_recorded_and_trains_all_the_same(machine, monkeypatch, capsys):
    far.patch_cuda(machine, monkeypatch)
    monkeypatch.setattr(algorithms, "find_algorithm", lambda name: Asking)
    plain = ends(*made("asking", False, "cnn"))
    federation, state = made("asking", False, "cnn", far.DEVICE)
    assert equal(ends(recorded(federation, CudaGraph), state), plain)
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith("hint: engine.graphs: a synchronizing operation")
        and not machine.raises_on_wait
    )


@dataclass(frozen=True)
class Unrecordable(FedAvg):
    """FedAvg whose loss raises an error while it is recorded."""

    def loss(self, model):
        def loss(now, start, batch):
            if Unrecordable.machine.tape is not None:
                raise RuntimeError("this operation cannot be recorded")
            return cross_entropy(model(now.shared, batch.x), batch)

        return loss


def test_the_hint_names_the_first_error_and_the_allocator_learns_that_the_recording_is_over(
    machine, monkeypatch, capsys
):
    far.patch_cuda(machine, monkeypatch)
    monkeypatch.setattr(Unrecordable, "machine", machine, raising=False)
    left = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *what: left.append(what))
    monkeypatch.setattr(algorithms, "find_algorithm", lambda name: Unrecordable)
    federation, state = made("unrecordable", False, "cnn", far.DEVICE)
    plain = ends(*made("unrecordable", False, "cnn"))
    federation = recorded(federation, CudaGraph)
    assert equal(ends(federation, state), plain)
    (line,) = capsys.readouterr().err.splitlines()
    assert "this operation cannot be recorded; the steps are played one by one" in line
    assert left == [(0, None)]


def test_more_sizes_than_are_recorded_run_step_by_step_with_a_hint(monkeypatch, capsys):
    monkeypatch.setattr(recording, "_MAX_EPOCHS", 1)
    held = recorded(made("fedavg", False, "cnn")[0])
    plain = ends(*made("fedavg", False, "cnn"))
    assert equal(ends(held, made("fedavg", False, "cnn")[1]), plain)
    assert held.clients.trainer.graphs.recorded_epochs() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hint: engine.graphs: clients have more than 1 different numbers of")


def test_epochs_that_never_come_again_are_told(monkeypatch, capsys):
    monkeypatch.setattr(recording, "_MAX_SEEN", 2)
    federation, state = made("fedavg", False, "cnn", sizes=(9, 8, 7))
    settings = replace(federation.clients.trainer.settings, epochs=1)
    ends(recorded(small.with_trainers(federation, settings=settings)), state, 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hint: engine.graphs: of 2 epochs no two had clients")


def test_a_recording_that_goes_wrong_is_not_used(machine, monkeypatch, capsys):
    far.patch_cuda(machine, monkeypatch)
    whole = machine.replay_tape
    monkeypatch.setattr(machine, "replay_tape", lambda tape: whole(tape[: len(tape) // 2]))
    plain = ends(*made("fedavg", True, "cnn"))
    federation, state = made("fedavg", True, "cnn", far.DEVICE)
    assert equal(ends(recorded(federation, CudaGraph), state), plain)
    assert "gave other numbers than its steps" in capsys.readouterr().err


def test_long_epochs_are_several_recordings_and_the_oldest_give_way(monkeypatch):
    monkeypatch.setattr(recording, "_BATCHES_PER_GRAPH", 2)
    federation, state = made("fedlora", True, "cnn")
    held = recorded(federation)
    assert equal(ends(held, state), ends(*made("fedlora", True, "cnn")))
    ((walk, _), *_) = runners_of(held).values()
    assert [len(place._graphs) for place in walk.recorded.values()] == [2]  # three batches
    for most in ("_MAX_RUNNERS", "_MAX_EPOCHS"):
        monkeypatch.setattr(recording, most, 1)
    held = recorded(federation)
    assert equal(ends(held, made("fedlora", True, "cnn")[1]), ends(*made("fedlora", True, "cnn")))
    assert len(runners_of(held)) == 1
    held.clients.trainer.graphs.clear()
    assert not held.clients.trainer.graphs._runners


def test_what_a_loss_holds_decides_whether_a_recording_serves(monkeypatch):
    @dataclass(frozen=True)
    class Weighted(FedAvg):
        def local(self, model, train, round_):
            def loss(now, start, batch):
                return (1 + round_) * cross_entropy(model(now.shared, batch.x), batch)

            return (Phase(3, (Step(loss),)),)

    monkeypatch.setattr(algorithms, "find_algorithm", lambda name: Weighted)
    federation, state = made("weighted")
    held = recorded(federation)
    assert equal(ends(held, state), ends(*made("weighted")))
    assert len(runners_of(held)) == 3
    monkeypatch.undo()
    held = recorded(made("moon")[0])
    ends(held, made("moon")[1], 4)
    assert len(runners_of(held)) == 1  # its teacher is made anew in every round


def runners_of(federation):
    """The recorded phases of the one stream."""
    (runners,) = federation.clients.trainer.graphs._runners.values()
    return runners


# Several clients at once, each on a stream


@pytest.mark.parametrize(
    "name, network", [("fedlora", "bn_net"), ("fedavg", "cnn"), thorough_param("fedcac", "cnn")]
)
def test_clients_on_streams_have_the_bits_of_the_loop(name, network, machine, monkeypatch, capsys):
    far.patch_cuda(machine, monkeypatch)
    sizes = (7, 7, 7, 7, 3)  # equal ones, so that each stream meets an epoch again
    plain = ends(*made(name, False, network, sizes=sizes))
    federation, state = made(name, False, network, far.DEVICE, sizes)
    graphs = GraphCache(far.DEVICE, CudaGraph)
    streams = ClientStreams(far.DEVICE, 2)
    federation = small.with_trainers(federation, graphs=graphs, streams=streams)
    assert equal(ends(federation, state), plain)
    # of both streams: a replay elsewhere would have failed
    recorded = [sum(len(r.recorded) for r, _ in kind.values()) for kind in graphs._runners.values()]
    assert len(recorded) == 2 and all(recorded)
    assert not capsys.readouterr().err


def test_the_host_waits_when_all_streams_have_their_work(machine, monkeypatch):
    far.patch_cuda(machine, monkeypatch)
    federation, state = made("fedavg", False, "cnn", far.DEVICE)
    federation = small.with_trainers(federation, streams=ClientStreams(far.DEVICE, 2))
    trainer, main = federation.clients.trainer, machine.stream
    machine.stream_calls.clear()
    results = list(trainer.train(range(5), state.shared, {}, 0))
    assert [result.client for result in results] == list(range(5))
    one, two = trainer.streams._streams
    both = [
        (one, "waits for", main),
        (one, "computes"),
        (two, "waits for", main),
        (two, "computes"),
    ]
    joined = [(main, "waits for", one), (main, "waits for", two)]
    wait = [("aten._to_copy.default",)]
    alone = [both[0], both[1], joined[0], *wait]
    assert machine.stream_calls == [*both, *joined, *2 * wait, *both, *joined, *2 * wait, *alone]


def test_streams_without_memory_for_all_train_fewer_clients_at_once(monkeypatch, capsys):
    plain = ends(*made("fedlora", False, "cnn"))
    federation, state = made("fedlora", False, "cnn")
    streams, whole = ClientStreams(small.CPU, 4), ClientStreams.compute

    def compute(self, tasks):
        if len(tasks) > 2:
            raise torch.OutOfMemoryError("no memory")
        return whole(self, tasks)

    monkeypatch.setattr(ClientStreams, "compute", compute)
    monkeypatch.setattr(ClientStreams, "at_once", 4)
    budget = MemoryBudget(changes_bits=False)
    federation = small.with_trainers(federation, streams=streams, memory_budget=budget)
    assert equal(ends(federation, state), plain)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("from here on at most 2 do; engine.group_size=2 says so from the start")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_with_streams_has_the_bits_of_the_loop_and_without_a_gpu_too(ranks):
    how = "participation=1.0", "rounds=2", "engine.group_size=auto"
    loop = run_rounds("engine.path=loop", *how)[0]
    streams = run_rounds("engine.path=streams", *how, ranks=ranks)[0]
    assert all(snapshots_equal(a, b) for a, b in zip(loop, streams, strict=True))


@pytest.mark.parametrize("cohort, size", [(100, 8), (6, 3), (1, 1)])
def test_eight_clients_train_at_once_but_at_most_half_of_a_cohort(cohort, size):
    engine = Engine(path="streams")
    model = small.make_model("cnn")
    assert choose_path(engine, "cuda", model, 5, cohort) == ("streams", size)
    assert choose_path(engine, "cuda", model, 5, cohort, memory=1) == ("streams", 1)
    assert choose_path(replace(engine, group_size=5), "cuda", model, 5, cohort)[1] == 5


def test_the_setting_stays_out_of_a_config_that_does_not_name_it():
    plain, asked = (tiny_config(*more) for more in ((), ("engine.graphs=true",)))
    assert "graphs" not in configs.resolved_dict(plain)["engine"]
    assert configs.resolved_dict(asked)["engine"]["graphs"] is True
    assert configs.digest(plain) == configs.digest(asked)  # the numbers are the same
    assert configs.digest(tiny_config("engine.precision=bf16")) != configs.digest(plain)


# Precision


@pytest.mark.parametrize("name, stacked", STEPS)
def test_bfloat16_is_near_float32_and_leaves_weights_in_float32(name, stacked):
    runs = [made(name, stacked) for _ in range(2)]
    coarse = small.with_trainers(runs[0][0], precision="bf16")
    results = [
        ends(federation, state, 1)
        for federation, (_, state) in zip((coarse, runs[1][0]), runs, strict=True)
    ]
    assert all(v.dtype == torch.float32 for tree in results[0] for v in tree.values())
    assert not equal(*results)
    start = runs[1][1].shared
    apart = moved = torch.zeros(())
    for leaf, value in results[0][0].items():
        fine = results[1][0][leaf]
        gap, step = value - fine, fine - start[leaf]
        # a leaf of a few numbers, such as a control variate of a bias, may be off by a third
        assert gap.abs().max() <= 0.5 * step.abs().max() + 1e-3, leaf
        if not leaf.endswith(("running_mean", "running_var")):
            apart, moved = apart + gap.square().sum(), moved + step.square().sum()
    assert apart.sqrt() <= 0.2 * moved.sqrt() + 1e-3


BF16_NETWORKS = [("bn_net", True), ("bn_net", False), thorough_param("cnn", False)]


@pytest.mark.parametrize("network, padded", BF16_NETWORKS)
def test_bfloat16_is_the_same_in_a_stack_and_out_of_it(network, padded):
    sizes = small.SIZES if padded else (8, 8, 8)
    found = []
    for stacked in (False, True):
        federation, state = made("fedavg", stacked, network, sizes=sizes)
        seen = DtypesOfConvolutions()
        with seen:
            found.append(ends(small.with_trainers(federation, precision="bf16"), state, 1)[0])
        assert torch.bfloat16 in seen.dtypes
    start = made("fedavg", True, network, sizes=sizes)[1].shared
    for leaf, value in found[0].items():
        moved = (value - start[leaf]).abs().max()
        assert (found[1][leaf] - value).abs().max() <= 0.15 * moved + 1e-3, leaf


def test_bfloat16_has_the_same_bits_on_any_number_of_ranks(tmp_path):
    runs = [create_run(n, tmp_path / str(n), "engine.precision=bf16", "rounds=2") for n in (1, 3)]
    assert_same_run(*runs)


# Convolutions as products

CONVOLUTIONS = [
    (3, 1, 1, True),
    (3, 2, 1, False),
    (7, 2, 3, False),
    (1, 2, 0, True),
    ((1, 3), (2, 1), (0, 1), True),
]


@pytest.mark.parametrize("size, stride, padding, has_bias", CONVOLUTIONS)
def test_a_product_of_patches_is_the_convolution_with_its_gradients(
    size, stride, padding, has_bias
):
    layer = torch.nn.Conv2d(3, 4, size, stride, padding, bias=has_bias).double()
    x = torch.randn(2, 5, 3, 8, 7, generator=small.rng(1, "x"), dtype=torch.float64)
    weight = torch.randn(2, *layer.weight.shape, generator=small.rng(1, "w"), dtype=torch.float64)
    bias = layer.bias

    def pulled(x, weight):
        def loss(x, weight):
            y = F.conv2d(x, weight, bias, stride, padding)
            return (y * y.detach().cos()).square().sum(), y

        gradients, y = torch.func.grad(loss, (0, 1), has_aux=True)(x, weight)
        return y, *gradients

    plain = torch.vmap(pulled)(x, weight)
    with ConvolutionsAsProducts():
        products = torch.vmap(pulled)(x, weight)
    for a, b in zip(products, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_stacks_train_alike_by_products(precision):
    calls = []
    federation, state = made("fedlora", True, "cnn")
    how = {"precision": precision}
    plain = ends(small.with_trainers(federation, **how), state, 1)

    class Counted(ConvolutionsAsProducts):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func is F.conv2d)
            return super().__torch_function__(func, types, args, kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedlora_mpi.engine.train.ConvolutionsAsProducts", Counted)
        federation, state = made("fedlora", True, "cnn")
        found = ends(small.with_trainers(federation, convolutions="products", **how), state, 1)
    assert any(calls)
    for leaf, value in plain[0].items():
        apart = (found[0][leaf] - value).abs().max()
        assert apart <= (1e-5 if precision == "float32" else 0.02), leaf


def test_products_are_part_of_the_digest_and_out_of_other_configs():
    plain, asked = (tiny_config(*more) for more in ((), ("engine.convolutions=products",)))
    assert "convolutions" not in configs.resolved_dict(plain)["engine"]
    assert configs.digest(plain) != configs.digest(asked)


class DtypesOfConvolutions(TorchDispatchMode):
    """The types in which convolutions compute."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in str(func):
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


# kernel, stride and dilation on inputs of one pixel: oneDNN's gradients are wrong, or end Python
@pytest.mark.parametrize("kernel, stride, dilation", [(3, 2, 1), (5, 3, 1), (3, 2, 2)])
def test_kernels_larger_than_their_input_have_right_gradients_in_bfloat16(kernel, stride, dilation):
    reach = dilation * (kernel - 1)
    x = torch.randn(4, 8, 1, 4, generator=small.rng(1, "x"))
    w = torch.randn(8, 8, kernel, kernel, generator=small.rng(1, "w"))

    def gradients(context):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        with context:
            y = F.conv2d(*leaves, None, stride, reach, dilation)
        garbage = [torch.full((w.numel(),), 1e30, dtype=torch.bfloat16) for _ in range(20)]
        del garbage  # what is never written would show it
        return torch.autograd.grad(y.float().square().sum(), leaves)

    coarse = gradients(bfloat16_forward(small.CPU, stacked=False))
    for a, b in zip(coarse, gradients(nullcontext()), strict=True):
        assert (a - b).abs().max() <= 0.03 * b.abs().max()


def test_batch_norm_of_a_stack_takes_bfloat16_beside_float32():
    x = torch.randn(3, 4, 5, 2, generator=small.rng(1, "x")).bfloat16()
    stats = torch.zeros(3, 5), torch.ones(3, 5)

    def norm(x, mean, var, weight):
        return F.batch_norm(x, mean, var, weight, weight, True)

    given = x, *stats, torch.ones(3, 5)
    with pytest.raises(RuntimeError, match="expected scalar type"):  # the fault of torch itself
        torch.vmap(norm)(*given)
    with bfloat16_forward(small.CPU, stacked=True):
        y = torch.vmap(norm)(*given)
    assert y.dtype == torch.bfloat16 and all(v.dtype == torch.float32 for v in stats)
    torch.testing.assert_close(stats[0], 0.1 * x.float().mean((1, 3)))


# Memory


def test_what_libraries_say_of_short_memory_is_known():
    says = RuntimeError("GET was unable to find an engine to execute this computation")
    assert is_memory_error(says) and is_memory_error(torch.OutOfMemoryError("out"))
    assert is_memory_error(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not is_memory_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


class Small:
    """Steps for which memory is short where more than ``most`` clients are in a stack."""

    def __init__(self, monkeypatch, most):
        self.tried, whole = [], PhaseRunner.run_batch

        def play(walk, batch_C, count):
            self.tried.append(walk._clients)
            if walk._clients > most and len(self.tried) % 3 == 0:  # late, when much is written
                raise RuntimeError("unable to find an engine to execute this computation")
            return whole(walk, batch_C, count)

        monkeypatch.setattr(PhaseRunner, "run_batch", play)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_stack_that_does_not_fit_is_split_and_computed_anew(graphs, monkeypatch, capsys):
    four = {"sizes": small.SIZES[:4], "network": "cnn"}
    federation, state = made("fedlora", **four)
    placement = replace(federation.placement, group_size=2)
    halves = ends(replace(federation, placement=placement), state)
    short = Small(monkeypatch, 2)
    federation, state = made("fedlora", **four)
    assert equal(ends(recorded(federation) if graphs else federation, state), halves)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hint: 4 clients at once do not fit") and "engine.group_size=2" in line
    assert short.tried.count(4) == 3  # remembered


def test_a_client_that_does_not_fit_alone_ends_the_run(monkeypatch):
    Small(monkeypatch, 0)
    with pytest.raises(RuntimeError, match="unable to find an engine"):
        ends(*made("fedavg"))


def test_evaluation_is_split_too(monkeypatch):
    federation, state = made("fedlora")
    rows, whole, trainer = (
        small.repeat_rows(federation.clients.types[0].initial.personal, 5),
        federation.clients.trainer.feed.test_batch,
        federation.clients.trainer,
    )
    expected = trainer.evaluate(range(5), state.shared, rows)

    def test(clients, first, width):
        if len(clients) > 2:
            raise torch.OutOfMemoryError
        return whole(clients, first, width)

    monkeypatch.setattr(trainer.feed, "test_batch", test, raising=False)
    torch.testing.assert_close(trainer.evaluate(range(5), state.shared, rows), expected)
    assert trainer.memory_budget.max_clients == 2


def test_parts_are_equal_and_in_order():
    room, sizes = MemoryBudget(), []
    room.max_clients = 4

    def compute(part):
        sizes.append(len(part))
        return sum(part)

    parts = list(room.compute_in_parts(range(10), compute, None))
    assert sizes == [3, 3, 4] and [c for part, _ in parts for c in part] == list(range(10))
    assert [total for _, total in parts] == [sum(part) for part, _ in parts]


def test_a_stack_is_as_large_as_memory_and_half_a_cohort_allow():
    model = small.make_model("bn_net")
    twenty = 20 * 10**9 // stack_capacity(model, 10, 10**9) + 10**4  # bytes
    assert [stack_capacity(model, 10, m) for m in (0, twenty, 2 * twenty)] == [1, 20, 40]
    assert stack_capacity(model, 20, twenty) < 15
    assert [
        choose_path(Engine(), "cuda", model, 10, cohort, twenty)[1] for cohort in (6, 30, 200)
    ] == [
        3,
        15,
        20,
    ]
    assert (
        choose_path(Engine(), "cuda", model, 10, 200)
        == ("stack", 25)
        == choose_path(Engine(), "cpu", model, 10, 200)
    )
    assert (
        choose_path(Engine(), "cuda", small.make_model("resnet8"), 100, 1000, 140 * 10**9)[1] > 50
    )


@pytest.mark.slow
def test_the_benchmark_checks_and_measures_on_a_cpu(tmp_path):
    line = [
        sys.executable,
        "benchmarks/gpu.py",
        "--device",
        "cpu",
        "--quick",
        "--json",
        str(tmp_path / "gpu.json"),
    ]
    done = subprocess.run(
        line, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert len(found["checks"]) == 18 and all(row["passed"] for row in found["checks"])
    rows = {(row["method"], row["way"]): row for row in found["rows"]}
    assert all(
        rows[method, "stack of 2, graphs"]["seconds"] > 0 for method in ("fedavg", "fedlora")
    )
    assert rows["fedavg", "plain"]["seconds"] > 0 and "| method | way |" in done.stdout
