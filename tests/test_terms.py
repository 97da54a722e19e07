"""The channels of an upload: what the server gets of each, in one buffer."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import small
import torch

from fedlora_mpi.aggregation.term_layout import TermLayout
from fedlora_mpi.algorithm import Term, Transport, Update, Upload, Visit
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.federation.round import run_round

W = torch.tensor


def term(a, b, weight=None, metric=0.0, count=0.0):
    weights = {} if weight is None else {"b": W(weight)}
    return Term({"a": W([a, a]), "b": W([b])}, {"n": W(count)}, weights, {"m": W(metric)})


def mean_of(terms, weights):
    layout = TermLayout.of(terms[0])
    vectors = [layout.pack(t, w).double() for t, w in zip(terms, weights, strict=True)]
    at = layout.weighted_size
    totals = sum(torch.cat([v[:at] * w, v[at:]]) for v, w in zip(vectors, weights, strict=True))
    return layout.unpack(totals, sum(weights), {})


def test_the_mean_is_weighted_and_the_sum_is_not():
    result = mean_of([term(1.0, 2.0, count=3.0), term(5.0, 6.0, count=4.0)], [1, 3])
    assert result.mean["a"].tolist() == [4.0, 4.0] and result.mean["b"].tolist() == [5.0]
    assert result.sum["n"].item() == 7.0


def test_a_leaf_with_a_weight_of_its_own_ignores_the_clients_weight():
    result = mean_of([term(1.0, 2.0, weight=9.0), term(5.0, 6.0, weight=1.0)], [1, 3])
    torch.testing.assert_close(result.mean["b"], W([(9 * 2 + 6) / 10]))
    assert result.mean["a"].tolist() == [4.0, 4.0]
    assert list(result.mean) == ["a", "b"], "the weights are no leaves of the mean"


def test_metrics_are_means_beside_the_leaves():
    result = mean_of([term(1.0, 2.0, metric=1.0), term(5.0, 6.0, metric=2.0)], [1, 3])
    assert result.metrics["m"].item() == 1.75 and "m" not in result.mean


def test_a_leaf_in_two_channels_is_our_mistake():
    with pytest.raises(AssertionError, match="in common"):
        TermLayout.of(Term({"a": W(1.0)}, {"a": W(1.0)}))
    with pytest.raises(AssertionError, match="weight"):
        TermLayout.of(Term({"a": W(1.0)}, weights={"b": W(1.0)}))


class Channels(FedAvg):
    """FedAvg that also sums one number and averages a metric for the log."""

    metrics = ("seen", "round")

    def upload(self, start, end, round_):
        return Upload(mean=end.shared, sum={".count.": torch.ones(1)})

    def server_update(self, server, shared, aggregate, svd):
        aggregates.append(aggregate)
        seen = float(aggregate.sum[".count."])
        return Update(aggregate.mean, metrics={"seen": seen, "round": aggregate.round})


aggregates = []


@pytest.mark.parametrize("participation", [1.0, 0.6])
def test_the_server_sees_the_sum_the_cohort_and_the_round(participation):
    federation, state = small.make_experiment(Channels(), participation=participation)
    plain, plain_state = small.make_experiment(FedAvg(), participation=participation)
    for round_ in range(2):
        aggregates.clear()
        members = federation.cohorts.sample(round_).members
        state, row, _ = run_round(federation, state, evaluate=False, stop=False)
        plain_state, plain_row, _ = run_round(plain, plain_state, evaluate=False, stop=False)
        assert row["seen"] == len(members) == row["clients"] and row["round"] == round_
        (aggregate,) = aggregates
        assert aggregate.clients == len(members)
        assert aggregate.share == len(members) / len(small.SIZES)
        assert aggregate.weight == sum(small.SIZES[c] for c in members)
        assert small.trees_equal(state.shared, plain_state.shared)
        assert row["drift"] == plain_row["drift"]


class Broken(Channels):
    def upload(self, start, end, round_):
        return Upload({n: v * torch.nan for n, v in end.shared.items()}, {".count.": torch.ones(1)})


def test_a_round_in_which_nobody_is_left_has_no_number_of_the_method():
    federation, state = small.make_experiment(Broken())
    aggregator = replace(federation.aggregator, skip_nonfinite=True)
    federation = replace(federation, aggregator=aggregator)
    after, row, _ = run_round(federation, state, evaluate=False, stop=False)
    assert np.isnan(row["seen"]) and row["skipped"] == [0, 1, 2, 3, 4]
    assert small.trees_equal(after.shared, state.shared) and after.round == 1


def totals_of(layout, terms, weights):
    at = layout.weighted_size
    vectors = [layout.pack(t, w).double() for t, w in zip(terms, weights, strict=True)]
    return sum(torch.cat([v[:at] * w, v[at:]]) for v, w in zip(vectors, weights, strict=True))


def test_absent_clients_count_in_the_mean_and_in_its_own_weights_but_not_in_metrics_or_sums():
    shared = {"a": W([8.0, 8.0]), "b": W([8.0])}
    terms = [term(1.0, 2.0, weight=1.0, metric=1.0, count=3.0)]
    layout = TermLayout.of(terms[0])
    result = layout.unpack(totals_of(layout, terms, [1]), 1, shared, absent=3)
    assert result.mean["a"].tolist() == [(1 + 3 * 8) / 4] * 2
    assert result.mean["b"].tolist() == [(2 + 3 * 8) / 4], "as if the client had no own weight"
    assert result.metrics["m"].item() == 1.0 and result.sum["n"].item() == 3.0


def test_a_leaf_that_nobody_gives_a_weight_stays():
    terms = [term(1.0, 2.0, weight=0.0), term(5.0, 6.0, weight=0.0)]
    layout = TermLayout.of(terms[0])
    result = layout.unpack(totals_of(layout, terms, [1, 3]), 4, {"b": W([7.0])})
    assert result.mean["b"].tolist() == [7.0] and result.mean["a"].tolist() == [4.0, 4.0]


def test_bools_are_summed_as_numbers():
    terms = [Term(sum={"seen": W([True, False, True])}), Term(sum={"seen": W([True, True, False])})]
    layout = TermLayout.of(terms[0])
    result = layout.unpack(totals_of(layout, terms, [1, 1]), 2, {})
    assert result.sum["seen"].tolist() == [2.0, 1.0, 1.0]


class Expanding(FedAvg):
    """A method whose terms would depend on the rank if they could see more than what travels."""

    def upload(self, start, end, round_):
        return Upload(mean=end.shared, numel=1)

    def transport(self, client, clients):
        return Transport(self, expand=self.expand_upload)

    def expand_upload(self, upload, shared, weight):
        assert upload.numel is None and upload.mix is None
        return Term({n: v * 1.0 for n, v in upload.mean.items()})


def test_the_expansion_sees_only_what_travels():
    federation, state = small.make_experiment(Expanding())
    plain, plain_state = small.make_experiment(FedAvg())
    state, row, _ = run_round(federation, state, evaluate=False, stop=False)
    plain_state, _, _ = run_round(plain, plain_state, evaluate=False, stop=False)
    assert small.trees_equal(state.shared, plain_state.shared)
    assert row["bytes_up"] == 4 * len(small.SIZES)


def test_stale_clients_need_shared_leaves():
    with pytest.raises(ValueError, match="absent = stale: absent clients have no own.x, which"):
        small.make_experiment(Foreign(absent="stale"))
    small.make_experiment(Foreign(absent="exclude"))


@dataclass(frozen=True)
class Foreign(FedAvg):
    def upload(self, start, end, round_):
        return Upload(mean=end.shared | {".own.x": torch.ones(1)})

    def server_update(self, server, shared, aggregate, svd):
        return Update({n: v for n, v in aggregate.mean.items() if n in shared})


class VisitsOnly(FedAvg):
    def local(self, model, train, round_):
        def move(start, now, data):
            return now._replace(shared={n: v + 1 for n, v in now.shared.items()})

        return Visit(move), Visit(move)

    def upload(self, start, end, round_):
        return Upload(mean={n: end.shared[n] - v for n, v in start.shared.items()})


@pytest.mark.parametrize("stacked", [False, True])
def test_without_a_phase_the_start_is_what_has_arrived(stacked):
    federation, state = small.make_experiment(VisitsOnly(), stacked=stacked)
    state, _, _ = run_round(federation, state, evaluate=False, stop=False)
    for value in state.shared.values():
        torch.testing.assert_close(value, torch.full_like(value, 2.0))
