"""What tests of fine-tuning by LoRA share: a round hook by hook, in float64, and real rounds of
clients' own ranks.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import takewhile

import small
import torch
from aggregates import svd

from fedlora_mpi.aggregation.term_layout import TermLayout
from fedlora_mpi.algorithm import Aggregate, Phase, Term, Transport, Variables, phases_of
from fedlora_mpi.core.seeds import rng
from fedlora_mpi.core.tree import Tree, tmap

RANKS = (3, 1, 2)  # of clients 0, 1, 2
COUNTS = (5, 1, 8)  # their samples
MIXED = "algorithm.lora_ranks=[3,1,2]", "algorithm.alpha=3"


def gaussian_tensor(*shape: int, address: int | str = 0) -> torch.Tensor:
    """Gaussian numbers of an address, float64."""
    return torch.randn(*shape, generator=rng(1, "finetuned", *shape, address), dtype=torch.float64)


def client_transports(algorithm) -> list[Transport]:
    """The transport of each of three clients."""
    return [algorithm.transport(client, 3) for client in range(3)]


def client_methods(algorithm) -> list:
    """The method as each of three clients has it."""
    return [transport.method for transport in client_transports(algorithm)]


def init_variables(algorithm, network: str = "cnn"):
    """(model, variables of a client before round 1, the shared ones in float64)."""
    model = small.make_model(network)
    initial = algorithm.init(model, rng(1, "init"))
    return model, initial._replace(shared=tmap(torch.Tensor.double, initial.shared))


def start_variables(method, model, received: Variables, round_: int = 0, data=None) -> Variables:
    """What a client's first phase starts from: the ``received`` variables after the visits."""
    v = received
    items = method.local(model, small.TRAIN, round_)
    for visit in takewhile(lambda item: not isinstance(item, Phase), items):
        v = visit.apply(v, v, data)
    return v


def trained_variables(
    transport: Transport, model, shared: Tree, round_: int, address: int
) -> tuple[Variables, Variables]:
    """(start, end) of a client's round: what the method says is trained has become any numbers."""
    client = transport.method
    personal = tmap(torch.Tensor.double, client.init(model, rng(1, "init")).personal)
    received = Variables(transport.download(shared), personal)
    start = start_variables(client, model, received, round_)
    is_trained = phases_of(client.local(model, small.TRAIN, round_))[0].steps[0].trains
    end_shared = {
        n: gaussian_tensor(*v.shape, address=f"{address} {n}") if is_trained(n) else v.clone()
        for n, v in start.shared.items()
    }
    return start, Variables(end_shared, start.personal)


def aggregate_terms(
    terms: Sequence[Term], counts: Sequence[int], shared: Tree, round_: int = 0
) -> Aggregate:
    """What the server receives of these clients' terms; ``counts``: their samples."""
    layout, total = TermLayout.of(terms[0]), sum(counts)
    totals = torch.zeros(layout.size, dtype=torch.float64)
    for term, count in zip(terms, counts, strict=True):
        vector = layout.pack(term, count).double()
        totals[: layout.weighted_size] += count * vector[: layout.weighted_size]
        totals[layout.weighted_size :] += vector[layout.weighted_size :]
    term = layout.unpack(totals, total, shared)
    return Aggregate(term.mean, term.sum, term.metrics, round_, len(terms), 1.0, total)


def next_shared(algorithm, shared: Tree, client_rounds, counts=COUNTS, round_: int = 0) -> Tree:
    """The server's next shared variables after what (start, end) of each client say."""
    terms = [
        c.expand(c.method.upload(*start_and_end, round_), shared, n)
        for c, start_and_end, n in zip(
            client_transports(algorithm), client_rounds, counts, strict=True
        )
    ]
    return algorithm.server_update(
        {}, shared, aggregate_terms(terms, counts, shared, round_), svd
    ).shared


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
