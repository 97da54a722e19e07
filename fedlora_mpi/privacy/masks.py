"""Secure aggregation: each client's message is masked, and the masks of a cohort cancel in its sum.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017,
Section 4, without the recovery of clients that drop out. Each pair i < j of neighbours has a stream
m_ij of uint64. Client i adds m_ij to the integers of its message (see ``ExactSum``) and client j
subtracts it, all modulo 2^64. The sum over the cohort is unchanged to the bit, while every single
message is uniform. The neighbours of a client are the whole cohort, or the k nearest on a ring that
is shuffled every round (Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic
Overhead", CCS 2020, Section 3.2).

A client without a finite upload sends zeros, masked, so that all masks still cancel. The streams
follow from the run's seed and come from a fast generator (SFC64). So this shows what a server would
see, but it keeps nothing secret.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

from ..aggregation.exact_sum import ExactSum
from ..aggregation.protection import Message, MessageOfClient
from ..core.seeds import derive_key, rng
from .settings import Privacy

MIN_COHORT = 3  # in a cohort of two, each client can compute the other's upload from the sum


def masked_messages(
    privacy: Privacy, message: Message, chosen: Collection[int], seed: int, round_: int
) -> MessageOfClient:
    """A function client -> context of the message that this client writes into.

    Without secure aggregation this is the rank's ``message`` itself. With it, each client has a
    message of its own, whose masked integers are added to ``message`` when the client has written
    it.
    """
    if not privacy.secure_aggregation:
        return lambda client: nullcontext(message)
    neighbours_of = neighbours(chosen, privacy.neighbours, seed, round_)

    @contextmanager
    def client_message(client: int) -> Iterator[ExactSum]:
        client_sum = ExactSum(message.buffer.shape[1])
        yield client_sum
        message.buffer += add_masks(client_sum.buffer, client, neighbours_of[client], seed, round_)

    return client_message


def add_masks(
    buffer: np.ndarray, client: int, partners: Sequence[int], seed: int, round_: int
) -> np.ndarray:
    """The masked integers [2, size] that ``client`` sends, int64 modulo 2^64.

    The client shares a mask with each of its ``partners``.
    """
    masked_buffer = buffer.view(np.uint64).copy()
    for partner in partners:
        pair = sorted((client, partner))
        stream = np.random.Generator(np.random.SFC64(derive_key(seed, "mask", round_, *pair)))
        mask = stream.integers(0, 2**64, masked_buffer.shape, np.uint64)
        (np.add if client == pair[0] else np.subtract)(masked_buffer, mask, out=masked_buffer)
    return masked_buffer.view(np.int64)


def neighbours(
    chosen: Collection[int], count: int | None, seed: int, round_: int
) -> Mapping[int, Sequence[int]]:
    """{client: the clients of the cohort with which it shares a mask}.

    These are the ``count`` (even) nearest on the round's ring; None: the whole cohort.
    """
    clients = sorted(chosen)
    if count is None or count >= len(clients) - 1:
        return {client: [other for other in clients if other != client] for client in clients}
    order = torch.randperm(len(clients), generator=rng(seed, "ring", round_)).tolist()
    ring, steps = (
        [clients[at] for at in order],
        [s for s in range(-count // 2, count // 2 + 1) if s],
    )
    return {
        client: [ring[(at + step) % len(ring)] for step in steps] for at, client in enumerate(ring)
    }
