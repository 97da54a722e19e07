"""FedBABU and elastic heads: what they are in their degenerate cases, and what they leave alone."""

import pytest
import small
import torch

from fedlora_mpi.algorithms.elastic_head import ElasticHead
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.fedbabu import FedBABU
from fedlora_mpi.algorithms.fedper import FedPer
from fedlora_mpi.algorithms.fedrep import FedRep
from fedlora_mpi.core.tree import select_prefix
from fedlora_mpi.federation.round import run_round


def final(algorithm, **how):
    return small.final_state(algorithm, "bn_net", **how)


@pytest.mark.parametrize("stacked", [False, True])
def test_the_body_of_fedbabu_is_that_of_fedrep_without_head_epochs(stacked):
    babu, rep = final(FedBABU(), stacked=stacked), final(FedRep(head_epochs=0), stacked=stacked)
    assert small.trees_equal(babu.shared, rep.shared)
    assert small.trees_equal(babu.personal, rep.personal)


def test_fedbabu_never_moves_a_head_but_on_a_copy_for_the_evaluation():
    scores = []
    for epochs in (0, 3):
        federation, state = small.make_experiment(FedBABU(ft_epochs=epochs), "bn_net")
        before = small.clone_tree(state.personal)
        state, _, columns = run_round(federation, state, evaluate=True, stop=False)
        assert small.trees_equal(state.personal, before), "the head that is kept is the first one"
        scores.append(columns["loss"])
    assert (scores[0] != scores[1]).all(), "a tuned head scores otherwise"


def test_fedbabu_tunes_the_head_alone():
    made = small.make_trainer(FedBABU(), "bn_net")
    (phase,) = made.algorithm.personalize(made.model, made.settings, 0)
    trained = {n for n in made.model.leaves if phase.steps[0].trains(n)}
    assert trained == {n for n in made.model.leaves if made.model.role(n) == "head"}
    (local,) = made.algorithm.local(made.model, made.settings, 0)
    assert not any(map(local.steps[0].trains, trained))


@pytest.mark.parametrize("stacked", [False, True])
def test_elastic_heads_that_do_not_pull_are_fedper(stacked):
    elastic, per = final(ElasticHead(rho=0.0), stacked=stacked), final(FedPer(), stacked=stacked)
    assert small.trees_equal({n: elastic.shared[n] for n in per.shared}, per.shared)
    assert small.trees_equal(elastic.personal, per.personal)


@pytest.mark.parametrize("stacked", [False, True])
def test_heads_that_are_pulled_all_the_way_are_fedavg(stacked):
    elastic, plain = final(ElasticHead(rho=1.0), stacked=stacked), final(FedAvg(), stacked=stacked)
    whole = elastic.shared | select_prefix(elastic.shared, ".mean.")
    assert small.trees_equal({n: whole[n] for n in plain.shared}, plain.shared)


def test_a_head_goes_the_part_rho_of_the_way_to_the_mean():
    federation, state = small.make_experiment(ElasticHead(rho=0.25), "bn_net")
    state, _, _ = run_round(federation, state, evaluate=False, stop=False)
    for client in range(len(small.SIZES)):
        rows = {n: v[client : client + 1] for n, v in state.personal.items()}
        (result,) = federation.clients.trainer.train([client], state.shared, rows, 1)
        for name, h in state.personal.items():
            expected = h[client] - 0.25 * (h[client] - state.shared[".mean." + name])
            torch.testing.assert_close(result.start.personal[name], expected)


def test_the_mean_head_is_the_mean_of_the_own_heads():
    federation, state = small.make_experiment(ElasticHead(rho=0.25), "bn_net")
    state, _, _ = run_round(federation, state, evaluate=False, stop=False)
    weights = torch.tensor(small.SIZES, dtype=torch.float64)
    for name, h in state.personal.items():
        mean = torch.tensordot(weights / weights.sum(), h.double(), 1)
        found = state.shared[".mean." + name].double()
        torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-6)
