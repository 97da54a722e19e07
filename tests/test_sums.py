"""The exact sum of client vectors, its quick sister, and the flat buffer they add up."""

import math

import numpy as np
import pytest
import torch
from runs import ThreadRank, assert_same_run, create_run, run_on_ranks

from fedlora_mpi.aggregation import exact_sum as sums
from fedlora_mpi.aggregation.compact_sum import bytes_per_number, sum_limbs
from fedlora_mpi.aggregation.exact_sum import LIMIT, SUM_TYPES, ExactSum, FastSum
from fedlora_mpi.aggregation.flat_layout import Layout
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.store.reader import RunFiles


def vectors(count, size, low=-12, high=3):
    """[count, size] float32 of both signs, magnitudes from 10^low to 10^high."""
    stream = rng(1, "test", count, size)
    exponent = low + (high - low) * torch.rand(count, size, generator=stream, dtype=torch.float64)
    sign = torch.randint(0, 2, (count, size), generator=stream) * 2 - 1
    return (sign * 10**exponent).float()


def summed(kind, rows, weights):
    message = SUM_TYPES[kind](rows.shape[1])
    for row, weight in zip(rows, weights, strict=True):
        message.add(row, weight)
    return message


def test_the_exact_sum_knows_no_order():
    rows, weights = vectors(31, 7), [3 * k + 1 for k in range(31)]
    expected = summed("exact", rows, weights).buffer
    for draw in range(20):
        order = torch.randperm(31, generator=rng(1, draw)).tolist()
        assert (summed("exact", rows[order], [weights[k] for k in order]).buffer == expected).all()
    floats = [rows.double()[order].sum(0) for order in (list(range(31)), list(range(30, -1, -1)))]
    assert not torch.equal(*floats)  # or the test would see nothing


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_exact_sum_knows_no_ranks(ranks):
    rows, weights = vectors(31, 7), [3 * k + 1 for k in range(31)]
    host = torch.randint(0, ranks, (31,), generator=rng(1, ranks)).numpy()
    parts = [
        summed("exact", rows[host == r], np.array(weights)[host == r].tolist())
        for r in range(ranks)
    ]
    message = ExactSum(7)
    message.buffer += sum(part.buffer for part in parts)
    assert torch.equal(message.total(), summed("exact", rows, weights).total())
    assert message.buffer.dtype == np.int64 and message.buffer.shape == (2, 7)


@pytest.mark.parametrize("part", [1, 3, 52, 53])
def test_a_vector_is_added_in_parts_to_the_same_bits(part, monkeypatch):
    rows, weights = vectors(9, 53), range(1, 10)
    whole = summed("exact", rows, weights).buffer
    monkeypatch.setattr(sums, "_CHUNK_SIZE", part)
    message = ExactSum(60)
    for row, weight in zip(rows, weights, strict=True):
        message.add(row, weight, offset=4)
    assert (
        (message.buffer[:, 4:57] == whole).all()
        and not message.buffer[:, :4].any()
        and not message.buffer[:, 57:].any()
    )
    message.add(torch.zeros(0), 1)  # nothing


@pytest.mark.parametrize("low, high", [(-12, 3), (-12, -12), (-9, -6), (5, 6)])
def test_the_exact_sum_is_that_of_fsum(low, high):
    rows, weights = vectors(40, 53, low, high), [500 - 7 * k for k in range(40)]
    total = summed("exact", rows, weights).total()
    assert total.dtype == torch.float64
    for column, found in enumerate(total.tolist()):
        expected = math.fsum(float(v) * w for v, w in zip(rows[:, column], weights, strict=True))
        # half of the last digit, each
        assert found == pytest.approx(expected, rel=1e-15, abs=40 * 2.0**-67)


def test_what_cancels_leaves_the_small_numbers_whole():
    rows = torch.tensor([[2.0**20], [1e-12], [-(2.0**20)], [2.0**-60]])
    assert summed("exact", rows, [3, 1, 3, 1]).total().item() == rows[1].double().item() + 2.0**-60


@pytest.mark.parametrize("clients", [1, 3, 40])
@pytest.mark.parametrize("weight", [1, 499])
def test_the_mean_of_equal_clients_is_theirs(clients, weight):
    row = vectors(1, 101)
    total = summed("exact", row.expand(clients, -1), [weight] * clients).total()
    assert torch.equal((total / (clients * weight)).float(), row[0])


def test_one_client_gets_back_its_bits():
    row = torch.cat((vectors(1, 101)[0], torch.tensor([0.0, 1e-12, -1e-12, 3e10, 2.0**-66])))
    assert torch.equal(summed("exact", row[None], [1]).total().float(), row)


def test_sums_up_to_the_limit_are_exact():
    top = LIMIT - 2.0**14  # the float32 below it
    rows = torch.tensor([[top / 2, -top / 2], [top / 2, -top / 2]])
    assert summed("exact", rows, [1, 1]).total().tolist() == [top, -top]
    step = 2.0**-28  # a weight may be any integer; digits far apart stay
    assert summed("exact", torch.tensor([[2.0**37], [step]]), [1, 1]).buffer.tolist() == [
        [2**61],
        [2**38],
    ]


def test_digits_beyond_the_last_are_rounded_once_per_client():
    rows = torch.tensor([0.75, -0.75, 0.25, 2.5]) * 2.0**-66  # half goes to even
    assert (summed("exact", rows[None], [1]).total() * 2.0**66).tolist() == [1, -1, 0, 2]
    assert (summed("exact", rows[None], [3]).total() * 2.0**66).tolist() == [2, -2, 1, 8]


def test_an_empty_upload_has_an_empty_sum():
    message = ExactSum(3)
    message.add(torch.zeros(0), 5)
    assert message.total().tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", SUM_TYPES)
def test_numbers_are_added_where_they_belong(kind):
    message = SUM_TYPES[kind](7)
    message.add(torch.tensor([1.0, 2.0, 3.0]), 2)
    message.add(torch.tensor([0.5, 0.25]), 1, offset=5)
    message.add(torch.tensor([1.0]), 3, offset=2)
    assert message.total().tolist() == [2, 4, 9, 0, 0, 0.5, 0.25]


@pytest.mark.parametrize("kind", SUM_TYPES)
def test_adding_leaves_the_vector(kind):
    row = vectors(1, 7)[0]
    before = row.clone()
    SUM_TYPES[kind](7).add(row, 3)
    assert torch.equal(row, before)
    wide = row.double()
    SUM_TYPES[kind](7).add(wide, 3)
    assert torch.equal(wide, before.double())


def test_the_fast_sum_is_close_and_a_quarter_as_long():
    rows, weights = vectors(31, 7, -3, 0), [3 * k + 1 for k in range(31)]
    fast, exact = (summed(kind, rows, weights) for kind in ("fast", "exact"))
    assert 4 * fast.buffer.nbytes == exact.buffer.nbytes and isinstance(fast, FastSum)
    bound = 31 * 2.0**-24 * (rows.abs().double().T @ torch.tensor(weights).double())
    assert ((fast.total() - exact.total()).abs() <= bound).all()


# The flat buffer


def tree():
    return {
        "b": torch.arange(15.0).view(3, 5),
        "a": torch.tensor(99.0),
        "c": torch.arange(16.0, 18.0),
        "d": torch.zeros(0),
    }


def test_a_layout_keeps_the_trees_order():
    layout = Layout.of(tree())
    assert layout.size == 18 and list(layout.shapes) == ["b", "a", "c", "d"]
    vector = layout.pack({n: tree()[n] for n in ("d", "c", "b", "a")})
    assert vector.tolist() == [*range(15), 99, 16, 17]
    back = layout.unpack(vector)
    assert list(back) == list(tree()) and all(torch.equal(back[n], v) for n, v in tree().items())


def test_unpacking_gives_views_and_packing_copies():
    layout, values = Layout.of(tree()), tree()
    vector = layout.pack(values)
    layout.unpack(vector)["b"][0, 0] = 7
    assert vector[0] == 7 and values["b"][0, 0] == 0
    alone = Layout.of({"b": values["b"]})
    alone.pack({"b": values["b"]})[0] = 7
    assert values["b"][0, 0] == 0


def test_a_weight_in_another_memory_format_packs_alike():
    value = torch.arange(60.0).view(2, 3, 5, 2)
    layout = Layout.of({"w": value})
    assert torch.equal(
        layout.pack({"w": value.to(memory_format=torch.channels_last)}), torch.arange(60.0)
    )


def test_no_leaves_make_no_buffer():
    layout = Layout.of({})
    assert (
        layout.size == 0 and layout.pack({}).shape == (0,) and layout.unpack(torch.zeros(0)) == {}
    )


def test_layouts_differ_in_names_shapes_and_order():
    one = {"a": torch.zeros(3, 5), "b": torch.zeros(2)}
    others = [
        {"a": one["a"], "c": one["b"]},
        {"a": torch.zeros(5, 3), "b": one["b"]},
        {"b": one["b"], "a": one["a"]},
        {},
    ]
    digests = {Layout.of(t).digest() for t in (one, *others)}
    assert len(digests) == 5 and Layout.of({n: v + 1 for n, v in one.items()}).digest() in digests


# In fewer bytes, between nodes


def normal(size, scale, *address):
    return scale * torch.randn(size, generator=rng(1, *address))


def of_parameters(size, number):
    """Numbers as networks have them, with blocks of zeros and with tiny ones."""
    v = normal(size, 0.05, "v", number)
    v[:300] = 0
    v[600:700] *= 1e-3
    return v


COMPACT = [
    pytest.param(of_parameters, (487, 1), 1.0, id="parameters"),
    pytest.param(lambda n, k: normal(n, 1e-4, "u", k), (20000,), 1.0, id="updates"),
    pytest.param(lambda n, k: torch.zeros(n), (3, 4), 1.0, id="zeros"),
    pytest.param(lambda n, k: torch.full((n,), float(2**37)), (1,), 0.0, id="large"),
    # 53 bits, of which the last are in units of 2^-66: these travel as they are
    pytest.param(lambda n, k: normal(n, 1.0, "w", k).double() / 3, (1000,), 0.0, id="float64"),
    pytest.param(
        lambda n, k: vectors(k + 1, n)[k], (999,), 0.0, id="magnitudes of 15 powers of ten"
    ),
]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("draw, weights, share", COMPACT)
def test_a_compact_sum_has_the_bits_of_the_exact_one(draw, weights, share, ranks):
    size = 256 * 8 + 5

    def part(rank):
        message = ExactSum(size)
        for number, weight in enumerate(weights):
            v = draw(size, len(weights) * rank + number)
            message.add(v if rank % 2 else -v, weight)  # sums that cancel out, too
        return message

    whole = ExactSum(size)
    whole.buffer += sum(part(rank).buffer for rank in range(ranks))

    def summed_by(comm):
        message = part(comm.rank)
        sent = sum_limbs(message.buffer, comm.size, comm.sum, comm.sum)
        return message.total(), sent

    for total, sent in run_on_ranks(ranks, summed_by):
        assert torch.equal(total, whole.total())
        fewest = 256 * 8 * bytes_per_number() + 16 * 5
        assert sent == fewest if share else fewest < sent <= 16 * size + 24 * 8


def test_a_number_beside_many_of_its_block_makes_only_that_block_long():
    message = ExactSum(256 * 3)
    message.add(torch.full((256 * 3,), 2.0**20), 1)
    message.add(torch.tensor([2.0**-66]), 1, offset=300)
    before = message.total()
    sent = sum_limbs(message.buffer, 1, lambda facts: None, lambda numbers: None)
    assert sent == 8 * 256 * 2 + 16 * 256 + 3 * 24 and torch.equal(message.total(), before)


def test_runs_over_several_nodes_send_half_and_have_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("fedlora_mpi.aggregation.aggregator.MIN_SIZE", 1)
    plain = create_run(3, tmp_path / "one", "rounds=2")
    whole = ThreadRank.__init__

    def init(self, *how):
        whole(self, *how)
        self.local_size = 1  # each rank is a node

    monkeypatch.setattr(ThreadRank, "__init__", init)
    several = create_run(3, tmp_path / "several", "rounds=2")
    assert_same_run(plain, several)
    sent = [RunFiles(run).rounds()["bytes_mpi"][-1] for run in (plain, several)]
    assert sent[1] < 0.75 * sent[0]  # some blocks of so small a network are beside zeros
