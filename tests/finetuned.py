"""What tests of fine-tuning by LoRA share: a round hook by hook, in float64, and real rounds of
clients' own ranks.
"""

from dataclasses import fields, replace

import small
import torch

from fedlora_mpi.algorithm import Cohort, Variables
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.tree import Tree, tmap

RANKS = (3, 1, 2)  # of clients 0, 1, 2
COUNTS = (5, 1, 8)  # their samples
MIXED = "algorithm.lora_ranks=[3,1,2]", "algorithm.alpha=3"


def gaussian_tensor(*shape: int, address: int | str = 0) -> torch.Tensor:
    """Gaussian numbers of an address, float64."""
    return torch.randn(*shape, generator=rng(1, "finetuned", *shape, address), dtype=torch.float64)


def client_methods(algorithm) -> list:
    """The method as each of three clients has it."""
    return [algorithm.for_client(client, 3) for client in range(3)]


def init_variables(algorithm, network: str = "cnn"):
    """(model, variables of a client before round 1, the shared ones in float64)."""
    model = small.make_model(network)
    initial = algorithm.init(model, rng(1, "init"))
    return model, initial._replace(shared=tmap(torch.Tensor.double, initial.shared))


def trained_variables(
    client, model, shared: Tree, round_: int, address: int
) -> tuple[Variables, Variables]:
    """(start, end) of a client's round: what the method says is trained has become any numbers."""
    personal = tmap(torch.Tensor.double, client.init(model, rng(1, "init")).personal)
    start = client.begin(model, Variables(client.download(shared), personal), None)
    is_trained = client.phases(model, small.TRAIN, round_)[0].steps[0].trains
    end_shared = {
        n: gaussian_tensor(*v.shape, address=f"{address} {n}") if is_trained(n) else v.clone()
        for n, v in start.shared.items()
    }
    return start, Variables(end_shared, start.personal)


def next_shared(algorithm, shared: Tree, client_rounds, counts=COUNTS) -> Tree:
    """The server's next shared variables after what (start, end) of each client say."""
    terms = [
        c.expand(c.upload(*start_and_end), shared, n)
        for c, start_and_end, n in zip(
            client_methods(algorithm), client_rounds, counts, strict=True
        )
    ]
    mean = {
        name: sum(n * term[name] for n, term in zip(counts, terms, strict=True)) / sum(counts)
        for name in terms[0]
    }
    return algorithm.server_update({}, shared, mean, Cohort(1.0, sum(counts)))[1]


def float64_trainer(algorithm, **how):
    """A trainer all of whose numbers are float64, those of the frozen network too."""
    new_trainer = small.make_trainer(algorithm, fine=True, **how)
    return replace(
        new_trainer,
        model=replace(
            new_trainer.model, initial=tmap(torch.Tensor.double, new_trainer.model.initial)
        ),
    )


def assert_trees_near(a: Tree, b: Tree, rtol: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}"
        )


def field_names(algorithm) -> set[str]:
    return {field.name for field in fields(algorithm)}
