"""The mix per client: one result for every route, number of ranks and placement,
and the right one."""

import itertools
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import small
import torch
from tiers import thorough_param

from fedlora_mpi.aggregation import client_mix as mixing
from fedlora_mpi.aggregation.client_mix import BLOCK, Mixing
from fedlora_mpi.aggregation.exact_sum import LIMIT
from fedlora_mpi.algorithm import Algorithm, Mix, Upload, Variables
from fedlora_mpi.algorithms.fedamp import FedAMP
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.fedcac import FedCAC
from fedlora_mpi.algorithms.fedpac import FedPAC
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.experiment.assembly import Assembly
from fedlora_mpi.experiment.checkpointing import initial_state
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.mpi.ending import Fault


class Thread(Solo):
    """A rank that is a thread of this process; messages are copies on a table that all see."""

    def __init__(self, rank, size, table, barrier):
        super().__init__()
        self.rank, self.size, self._table, self._barrier, self.bytes_sent = (
            rank,
            size,
            table,
            barrier,
            0,
        )

    def _all(self, mine):
        self._table[self.rank] = mine
        self._barrier.wait()
        everyone = list(self._table)
        self._barrier.wait()
        return everyone

    def sum(self, buffer):
        self.bytes_sent += buffer.nbytes
        buffer[...] = sum(self._all(buffer.copy()))

    def exchange(self, send, counts, arriving):
        assert send.dtype == np.float32 and send.ndim == 1 and len(send) == sum(counts)
        self.bytes_sent += send.nbytes
        parts = self._all(np.split(send.copy(), np.cumsum(counts)[:-1]))
        assert [len(part[self.rank]) for part in parts] == list(arriving)
        return np.concatenate([part[self.rank] for part in parts])


def on_ranks(works):
    """What each of ``works`` returns, called with its communicator, all at the same time."""
    size = len(works)
    table, barrier, results = [None] * size, threading.Barrier(size, timeout=60), [None] * size

    def run(rank):
        torch.set_num_threads(1)  # a setting of the thread
        try:
            results[rank] = works[rank](Thread(rank, size, table, barrier))
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for action in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            action(thread)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@dataclass(frozen=True)
class Plain(Algorithm):
    """Offers "u" [D], under the key "k" [K] and with the numbers "a" [3] where there are any."""

    centered: bool = False
    seen: tuple = ()  # lists that collect what the server sees
    weights_are: torch.Tensor | None = None

    def init(self, model, rng):
        return Variables({}, model)

    def local(self, model, train, round_):
        return ()

    def client_model(self, model, v):
        return v.personal

    def upload(self, start, end, round_):
        return Upload(mix=self.offered(end.personal))

    def offered(self, own):
        return Mix({"u": own["u"]}, own.get("k"), own.get("a"), self.centered)

    def mix(self, gram, extra, round_):
        for into in self.seen:
            into.append((gram, extra, round_))
        if self.weights_are is not None:
            return self.weights_are
        return torch.softmax(gram / gram.abs().max() + extra.sum(1) + round_, 1)


def vectors(clients, size, key=None, extra=None, scale=1.0):
    """{client: its variables}."""

    def draw(what, c, n):
        return scale * torch.randn(n, generator=rng(1, "test", what, c, n))

    parts = {"u": size, "k": key, "a": extra}
    return {
        c: Variables({}, {name: draw(name, c, n) for name, n in parts.items() if n is not None})
        for c in clients
    }


def mixed(
    algorithm, offered, chosen=None, ranks=1, route="root", server=False, rank_of=None, round_=2
):
    """{client: its mix}, and the bytes that all ranks moved."""
    clients, some = len(offered), next(iter(offered.values()))
    workers = range(1 if server else 0, ranks)
    if rank_of is None:  # anywhere
        at = torch.randint(
            len(workers), (clients,), generator=rng(1, "place", clients, ranks)
        ).tolist()
        rank_of = [workers[i] for i in at]
    how = Mixing.of(algorithm, some, rank_of, workers, route)
    chosen = set(offered if chosen is None else chosen)

    def work(comm):
        mine = [c for c in chosen if rank_of[c] == comm.rank]
        packed = {c: how.pack(algorithm.offered(offered[c].personal)) for c in mine}
        found = how.mix(comm, algorithm, packed, chosen, round_)
        assert set(found) == set(mine)
        return {c: rows["u"] for c, rows in found.items()}, getattr(comm, "bytes_sent", 0)

    if ranks == 1:
        return work(Solo())
    results = on_ranks([work] * ranks)
    found = {c: u for part, _ in results for c, u in part.items()}
    assert set(found) == chosen
    return found, sum(moved for _, moved in results)


SIZES = [1, BLOCK - 1, BLOCK, 2 * BLOCK + 13]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key, extra", [(None, None), (7, 3), (BLOCK + 1, None)])
def test_every_route_gives_the_same_bits_on_any_number_of_ranks(size, key, extra):
    offered = vectors(range(5), size, key, extra)
    algorithm = Plain(centered=key is None and size > 1)
    alone, _ = mixed(algorithm, offered)
    for ranks in (1, 2, 3):
        for route in ("root", "spread"):
            for server in (False, True)[: 1 + (ranks > 1)]:
                found, _ = mixed(algorithm, offered, ranks=ranks, route=route, server=server)
                assert all(torch.equal(found[c], u) for c, u in alone.items()), (
                    ranks,
                    route,
                    server,
                )
    assert not torch.equal(alone[0], alone[1]) and not torch.equal(
        alone[0], offered[0].personal["u"]
    )


@pytest.mark.parametrize(
    "rank_of", [[0, 0, 0, 0, 0], [2, 2, 2, 2, 2], [2, 1, 0, 2, 1], [1, 0, 1, 0, 1]]
)
@pytest.mark.parametrize("route", ["root", "spread"])
def test_the_bits_do_not_depend_on_where_clients_live(monkeypatch, rank_of, route):
    monkeypatch.setattr(mixing, "BLOCK", 7)
    offered = vectors(range(5), 3 * 7 + 2, 5, 3)
    alone, _ = mixed(Plain(), offered)
    found, _ = mixed(Plain(), offered, ranks=3, rank_of=rank_of, route=route)
    assert all(torch.equal(found[c], u) for c, u in alone.items())


def test_every_worker_gets_an_equal_part_by_the_spread_route(monkeypatch):
    monkeypatch.setattr(mixing, "BLOCK", 7)
    for size in (0, 3, 7, 8, 70, 71, 140):
        for ranks in (1, 2, 3, 5):
            how = Mixing.of(Plain(), vectors([0], size)[0], [1] * 3, range(1, ranks + 1), "spread")
            comm = Thread(0, ranks + 1, [], None)
            server, *workers = how._coordinate_ranges(comm, size)
            assert server == (0, 0) and workers[0][0] == 0 and workers[-1][1] == size
            assert all(a[1] == b[0] for a, b in itertools.pairwise(workers))
            assert all(first % 7 == 0 for first, last in workers if last > first)
            widths = [-(-(last - first) // 7) for first, last in workers]
            assert max(widths) - min(widths) <= 1


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("key", [None, 4 * 7 + 5])
def test_the_gram_matrix_is_the_direct_product_of_the_keys(monkeypatch, ranks, centered, key):
    monkeypatch.setattr(mixing, "BLOCK", 7)
    seen, offered = [], vectors(range(5), 2 * 7 + 3, key, 3)
    mixed(Plain(centered=centered, seen=(seen,)), offered, ranks=ranks, route="spread")
    assert len(seen) == ranks  # every rank works the weights out
    keys = torch.stack([v.personal["k" if key else "u"] for v in offered.values()]).double()
    keys = keys - keys.mean(0) if centered else keys
    for gram, extra, round_ in seen:
        assert gram.dtype == extra.dtype == torch.float64 and round_ == 2
        assert torch.equal(gram, seen[0][0])
        torch.testing.assert_close(
            gram, keys @ keys.T, rtol=0, atol=1e-14 * keys.square().sum().item()
        )
        assert torch.equal(extra, torch.stack([v.personal["a"] for v in offered.values()]).double())


def test_distances_of_close_models_survive_the_gram_matrix_when_centred():
    seen, size = {False: [], True: []}, BLOCK + 5
    base = 30 * torch.randn(size, generator=rng(1, "base"))
    offered = vectors(range(4), size, scale=1e-3)
    offered = {c: Variables({}, {"u": base + v.personal["u"]}) for c, v in offered.items()}
    rows = torch.stack([v.personal["u"] for v in offered.values()])
    direct = (rows[:, None].double() - rows.double()).square().sum(2)
    gap = {}
    for centered, into in seen.items():
        mixed(Plain(centered=centered, seen=(into,)), offered)
        gram = into[0][0]
        square = gram.diagonal()
        distance = square[:, None] + square - 2 * gram
        gap[centered] = (
            ((distance - direct).abs() / direct.clamp(min=1e-12)).fill_diagonal_(0).max()
        )
    assert gap[True] < 1e-12 < 1e-9 < gap[False]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_mix_is_the_product_of_weights_and_rows(ranks):
    offered = vectors(range(5), BLOCK + 9, 3)
    u = torch.stack([v.personal["u"] for v in offered.values()])
    order = [3, 0, 4, 1, 2]
    found, _ = mixed(Plain(weights_are=torch.eye(5).double()[order]), offered, ranks=ranks)
    # row i is what i receives
    assert all(torch.equal(found[c], u[other]) for c, other in enumerate(order))
    weights = torch.randn(5, 5, generator=rng(1, "weights"), dtype=torch.float64)
    found, _ = mixed(Plain(weights_are=weights), offered, ranks=ranks)
    expected = (weights @ u.double()).float()
    torch.testing.assert_close(
        torch.stack([found[c] for c in range(5)]), expected, rtol=2e-7, atol=1e-12
    )


def test_identical_clients_receive_what_they_sent():
    same = vectors([0], BLOCK + 1)[0]
    found, _ = mixed(
        Plain(weights_are=torch.full((7, 7), 1 / 7, dtype=torch.float64)),
        dict.fromkeys(range(7), same),
    )
    assert all(torch.equal(u, same.personal["u"]) for u in found.values())


@pytest.mark.parametrize("chosen", [[4], [1, 3], [4, 0, 2]])
def test_clients_outside_the_cohort_neither_count_nor_receive(chosen):
    offered = vectors(range(5), 23, 4, 3)
    for ranks in (1, 3):
        found, _ = mixed(Plain(), offered, chosen, ranks=ranks, route="spread")
        alone = {i: offered[c] for i, c in enumerate(sorted(chosen))}
        expected, _ = mixed(Plain(), alone)
        assert set(found) == set(chosen)
        assert all(torch.equal(found[c], expected[i]) for i, c in enumerate(sorted(chosen)))


def test_a_packed_offer_is_a_copy():
    for algorithm, size in ((Plain(), 1), (Plain(), 5)):
        v = vectors([0], size, 2, 3)[0]
        how = Mixing.of(algorithm, v, [0], [0], "root")
        packed = how.pack(algorithm.offered(v.personal))
        before = [part.clone() for part in packed]
        for leaf in v.personal.values():
            leaf.zero_()
        assert all(
            torch.equal(part, was) and was.any() for part, was in zip(packed, before, strict=True)
        )


@pytest.mark.parametrize("leaf", ["u", "k", "a"])
def test_an_offer_that_cannot_be_summed_does_not_fit(leaf):
    v = vectors([0], 5, 3, 2)[0]
    how = Mixing.of(Plain(), v, [0], [0], "root")

    def fits():
        return how.pack(Plain().offered(v.personal)).is_summable()

    assert fits()
    for bad in (float("nan"), float("inf")):
        v.personal[leaf][1] = bad
        assert not fits()
    v.personal[leaf][1] = 1.01 * LIMIT**0.5  # finite, but its square is not below the limit
    assert fits() == (leaf != "k")


def test_auto_takes_small_vectors_to_rank_0_and_spreads_large_ones(monkeypatch):
    some = vectors([0], 100)[0]

    def owners(route, clients):
        return Mixing.of(Plain(), some, [1] * clients, (1, 2), route).owners

    monkeypatch.setattr(mixing, "ROOT_BYTES", 4 * 100 * 5)
    assert owners("auto", 5) == owners("root", 6) == (0,)
    assert owners("auto", 6) == owners("spread", 1) == (1, 2)


def test_an_algorithm_without_an_offer_has_no_mixing():
    assert small.make_experiment(FedAvg(), sizes=(3,))[0].aggregator.mixing is None
    assert small.make_experiment(FedAMP(), sizes=(3,))[0].aggregator.mixing is not None


@pytest.mark.parametrize("route", ["root", "spread"])
@pytest.mark.parametrize("key, extra", [(None, None), (11, 3)])
def test_the_bytes_handed_to_mpi_are_those_that_are_reported(route, key, extra):
    offered = vectors(range(5), 2 * BLOCK + 3, key, extra)
    for chosen in ([0, 1, 2, 3, 4], [1, 4]):
        _, moved = mixed(Plain(), offered, chosen, ranks=3, route=route)
        how = Mixing.of(Plain(), offered[0], [0] * 5, range(3), route)
        assert moved == how.bytes_mpi({*chosen}, 3)


@dataclass(frozen=True)
class Counted(Plain):
    """A bool for a key, rows of which one is uploaded anyway."""

    def upload(self, start, end, round_):
        rows = {"x": end.personal["u"], "y": end.personal["a"]}
        mix = Mix(rows, end.personal["u"] > 0, end.personal["a"])
        return Upload(mean={"u": end.personal["u"]}, mix=mix)


def test_a_leaf_that_is_uploaded_anyway_costs_nothing_and_a_bool_costs_a_bit():
    how = Mixing.of(Counted(), vectors([0], 13, None, 3)[0], [0], [0], "root")
    assert how.bytes_up == 4 * 3 + 2 + 4 * 3 and how.bytes_down == 4 * (13 + 3)
    shared = torch.ones(13)  # two leaves that start as one tensor are still two
    how = Mixing.of(Plain(), Variables({}, {"u": shared, "k": shared}), [0], [0], "root")
    assert how.bytes_up == 4 * (13 + 13)


# Whole rounds


def rounds(algorithm, ranks, route, server, participation=1.0, count=2):
    """(shared, {client: personal}, rows of metrics) after ``count`` rounds, groups of two clients."""
    workers = range(1 if server else 0, ranks)

    def work(federation):
        groups = range(len(federation.placement.groups))
        hosts = [workers[-1 - i % len(workers)] for i in groups]

        def on(comm):
            own = federation.on_ranks(comm, hosts, workers, route)
            state, rows = initial_state(Assembly(None, own, None, None, small.SHAPE, "")), []
            for _ in range(count):
                before = getattr(comm, "bytes_sent", 0)
                state, row, clients = run_round(own, state, evaluate=True, stop=False)
                rows.append(
                    row
                    | {
                        "moved": getattr(comm, "bytes_sent", 0) - before,
                        "clients": clients["accuracy"],
                    }
                )
            personal = {
                c: {n: v[i] for n, v in state.personal.items()}
                for i, c in enumerate(own.placement.local_clients)
            }
            return state.shared, personal, rows

        return on

    works = [
        work(
            small.make_experiment(algorithm, "bn_net", group_size=2, participation=participation)[0]
        )
        for _ in range(ranks)  # one by one: building draws from a global generator
    ]
    results = on_ranks(works) if len(works) > 1 else [works[0](Solo())]
    return (
        results[0][0],
        {c: tree for part in results for c, tree in part[1].items()},
        [part[2] for part in results],
    )


@pytest.mark.parametrize(
    "algorithm",
    [thorough_param(FedAMP()), thorough_param(FedCAC()), FedPAC()],
    ids=lambda a: type(a).__name__,
)
@pytest.mark.parametrize("participation", [thorough_param(1.0), 0.6])
def test_whole_rounds_give_the_same_bits_on_any_number_of_ranks(algorithm, participation):
    shared, personal, (rows,) = rounds(algorithm, 1, "root", False, participation)
    for ranks, route, server in ((2, "root", True), (3, "spread", False), (3, "root", True)):
        again = rounds(algorithm, ranks, route, server, participation)
        assert small.trees_equal(again[0], shared)
        assert set(again[1]) == set(personal) == set(range(5))
        for client, tree in personal.items():
            assert small.trees_equal(again[1][client], tree), (ranks, route, client)
        for number, row in enumerate(rows):
            assert (again[2][0][number]["clients"] == row["clients"]).all()
            # the scores and the seconds of ranks, beside what the row reports
            evaluation = 8 * 6 * (5 + ranks) * ranks
            moved = sum(part[number]["moved"] for part in again[2])
            assert moved == again[2][0][number]["bytes_mpi"] + evaluation
            assert row["bytes_mpi"] == 0 and row["bytes_up"] == again[2][0][number]["bytes_up"] > 0


@dataclass(frozen=True)
class Overflowing(FedAMP):
    """Trains well, and then offers what no sum can hold."""

    def upload(self, start, end, round_):
        upload = super().upload(start, end, round_)
        return upload._replace(mix=upload.mix._replace(key=end.personal["9.bias"] * 1e30))


def test_a_client_whose_offer_cannot_be_summed_is_named():
    federation, state = small.make_experiment(Overflowing(), participation=0.6)
    ids = ", ".join(map(str, sorted(federation.cohorts.sample(0).members)))
    with pytest.raises(Fault, match=f"client {ids} is not finite"):
        small.run_rounds(federation, state, 1)
