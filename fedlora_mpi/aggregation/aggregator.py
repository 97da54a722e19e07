"""From the uploads of a cohort to what its server receives, with one sum over all ranks.

If weights depend on what all clients of the cohort report, a small sum of the reports comes before.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import isclose
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..algorithm import Aggregate, Algorithm, Reports, Term, Transport, Upload
from ..core.transfer import to_host
from ..core.tree import Tree
from ..engine.train import ClientResult
from ..mpi.comm import Comm
from ..mpi.ending import Fault
from .client_mix import Mixing, PackedMix
from .compact_sum import MIN_SIZE, bytes_per_number, sum_limbs
from .exact_sum import LIMIT, SUM_TYPES
from .flat_layout import Layout
from .gathered import gather_remote_uploads
from .neighbour_mix import NeighbourMixing
from .protection import Message, MessageOfClient, Protection
from .reports import gather_reports, message_nbytes
from .term_layout import TermLayout

# figures of the round behind the term, in the same buffer
_FIGURES = ("loss", "clients", "spread", "broken", "stop", "sent")


class Member(Protocol):
    """What an aggregator needs to know of a client."""

    @property
    def transport(self) -> Transport: ...

    @property
    def upload_layout(self) -> Layout: ...


class Members(Protocol):
    """All clients, and the weight of each one's upload."""

    @property
    def weights(self) -> Sequence[int]: ...

    def __getitem__(self, client: int) -> Member: ...

    def __len__(self) -> int: ...


class Cohort(Protocol):
    """What it needs to know of a cohort, see ``federation.cohorts.Cohort``."""

    @property
    def round(self) -> int: ...

    @property
    def members(self) -> frozenset[int]: ...

    @property
    def clients(self) -> Members: ...

    @property
    def weight(self) -> float: ...

    @property
    def expected_size(self) -> float | None: ...


class Received(NamedTuple):
    """What all ranks know of a cohort's uploads."""

    aggregate: Aggregate | None  # None: nobody is left, so nothing changes
    active: frozenset[int]  # the clients that are in it
    mixed_rows: dict[int, Tree]  # of this rank's clients, which write them into their personal rows
    train_loss: float  # mean over the clients that have trained; NaN without any
    trained: int  # how many these are
    drift: float  # see ``Aggregator._drift``
    numbers_sent: int  # in uploads of a real federation
    message_bytes: int  # of the sum and of the reports, given to MPI by each rank
    stop: bool  # whether any rank was asked to stop


class HeldTerm(NamedTuple):
    """A client's term that waits for the reports of the cohort, on the host."""

    vector: Tensor  # [D]
    loss: float
    spread: float  # see ``Aggregator._add_term``
    report: Tensor  # [k]


class Uploads(NamedTuple):
    """This rank's part of a cohort's uploads; ``Aggregator.add`` fills it."""

    cohort: Cohort
    shared: Tree  # the server's variables of the round
    shared_flat: Tensor  # these in the layout of a term [D], float64
    message: Message  # the weighted sum of the terms, then the figures
    message_of: MessageOfClient
    contribution: Callable[[Tensor, int], Tensor]  # (term [D], client) -> what enters the sum
    reference: Tensor  # [D] what updates are measured from
    broken: list[int]  # clients whose loss or upload is not finite, or too large to be summed
    numels: list[int]  # see ``Upload.sent_numel``
    offers: dict[int, PackedMix]  # for the mixes
    gathered: dict[int, Tensor]  # flat uploads that travel as they are
    held: dict[int, HeldTerm]  # terms whose weights depend on the reports of the cohort


@dataclass(frozen=True)
class Aggregator:
    """Makes one aggregate of all uploads, the same on every rank."""

    comm: Comm
    algorithm: Algorithm
    terms: TermLayout
    untrained_term: Callable[[Tree], Term]  # of any client, given the server's shared variables
    drift_leaves: tuple[str, ...]  # whose drift is measured
    reduce: str  # see ``SUM_TYPES``
    rank_of_client: Mapping[int, int]
    untrained_upload: Upload  # of any client; it shows the channels of all uploads
    counts_numbers: bool  # whether clients of some type say how many numbers they send
    protection: Protection = Protection()
    # whether uploads travel as they are, for every rank to expand them all
    gathers: bool = False
    # whether a client whose numbers are not finite is left out of its round; else it ends the run
    skip_nonfinite: bool = False
    # how per-client mixes are exchanged; None: the method has none
    mixing: Mixing | NeighbourMixing | None = None
    # the sum over all ranks that the first message of a round needs; None: that of ``comm``
    all_reduce: Callable[[np.ndarray], None] | None = None

    @cached_property
    def drift_slices(self) -> tuple[slice, ...]:
        """Where a term holds the leaves whose drift is measured."""
        return self.terms.flat.leaf_slices(self.drift_leaves)

    @property
    def report_size(self) -> int:
        """The numbers that a client reports; see ``Upload``."""
        report = self.untrained_upload.report
        return 0 if report is None else report.numel()

    @property
    def number_bytes(self) -> float:
        """Bytes of each number of the message that is summed; where it is compact, if all of it
        fits.
        """
        if self.is_compact:
            return bytes_per_number()
        return {"exact": 16, "fast": self.terms.flat.dtype.itemsize}[self.reduce]

    @property
    def is_compact(self) -> bool:
        """Whether the exact sum travels in fewer bytes: between nodes, where bytes cost more time
        than computing with them.
        """
        return (
            self.reduce == "exact"
            and not self.gathers
            and not self.protection.is_differential
            and not self.protection.sums_modulo
            and self.comm.size > self.comm.local_size
            and self.terms.size >= MIN_SIZE
        )

    def collect(self, cohort: Cohort, shared: Tree, device: torch.device) -> Uploads:
        """An empty collection for this rank's part of the cohort."""
        terms, protection, members = self.terms, self.protection, cohort.members
        message = SUM_TYPES[self.reduce](terms.size + len(_FIGURES), terms.flat.dtype)
        shared_flat = reference = terms.pack_shared(shared, device)
        if protection.is_differential:
            reference = terms.pack(self.untrained_term(shared), 1)
        return Uploads(
            cohort,
            shared,
            shared_flat,
            message,
            protection.messages(message, members, cohort.round),
            partial(protection.contribution, reference, members, cohort.round),
            reference,
            broken=[],
            numels=[],
            offers={},
            gathered={},
            held={},
        )

    def add(self, uploads: Uploads, result: ClientResult) -> bool:
        """Add what a client of this rank sends; False, and nothing added, if its loss or upload is
        not finite or too large to be summed.
        """
        client, cohort = result.client, uploads.cohort
        member, weight = cohort.clients[client], cohort.clients.weights[client]
        bound = LIMIT / max(cohort.weight, len(cohort.members))
        # what follows need not cope with such numbers
        if not torch.isfinite(result.loss).all():
            uploads.broken.append(client)
            return False
        upload = member.transport.method.upload(result.start, result.end, cohort.round)
        if self.gathers:  # every rank must use the upload as it travels
            travelled = self._split_channels(member.upload_layout.cast(upload.message))
            upload = upload._replace(mean=travelled.mean, sum=travelled.sum)
        vector = self._term_vector(upload, uploads.shared, client, cohort)
        offer = None
        if self.mixing:
            assert upload.mix is not None
            offer = self.mixing.pack(upload.mix)
        report = upload.report
        # False, too, where a number is not finite
        summands = (result.loss, vector) if report is None else (result.loss, vector, report)
        is_summable = all(v.abs().sum() < bound for v in summands)
        if not is_summable or (offer and not offer.is_summable()):
            uploads.broken.append(client)
            return False
        if offer:
            uploads.offers[client] = offer
        if self.gathers:
            uploads.gathered[client] = member.upload_layout.pack(upload.message)
        uploads.numels.append(upload.sent_numel)
        own_weight = self._drift_weight(vector, 1.0)
        distance = self._squared_distance(vector, uploads.shared_flat, own_weight)
        distance = distance / own_weight if own_weight else torch.zeros_like(distance)
        # A diverging client must not overflow the sum; its distance has no meaning anyway.
        loss, spread = result.loss.item(), distance.clamp(max=bound).item() * weight
        if report is None:
            self._add_term(uploads, client, vector, loss, spread)
        else:
            held_vector, held_report = to_host([vector, report])
            uploads.held[client] = HeldTerm(held_vector, loss, spread, held_report)
        return True

    def aggregate(self, uploads: Uploads, stop: bool) -> Received:
        """Sum the ``uploads`` of all ranks; every rank calls it. ``stop``: this rank was asked to.

        A broken client raises Fault on all ranks. If ``skip_nonfinite``, the mean and the mixes are
        those of the other clients instead.
        """
        cohort, protection = uploads.cohort, self.protection
        reports, factors = self._weigh(uploads)
        for client, term in uploads.held.items():
            self._add_term(uploads, client, *term[:3], factor=factors[client])
        self._add_broken(uploads)
        message_bytes, figures = self._sum(uploads, stop)
        if self.report_size:
            message_bytes += message_nbytes(len(cohort.members), self.report_size)
        loss, trained, spread, broken, stop_requests, sent = figures
        active, weight = cohort.members, cohort.weight
        if broken:
            active = active - self._broken_clients(uploads)
            if not protection.is_differential:
                weight = sum(cohort.clients.weights[client] for client in active)
        if self.gathers:
            self._add_remote_uploads(uploads, active, factors)
        if protection.is_differential:  # the message holds updates
            uploads.message.add(uploads.reference, weight)
            uploads.message.add(protection.noise(self.terms.size, cohort.members, cohort.round), 1)
        if not self.counts_numbers:  # exact, unlike a sum in float32
            sent = sum(cohort.clients[c].upload_layout.size for c in active)
        received = Received(
            aggregate=None,
            active=active,
            mixed_rows={},
            train_loss=loss / trained if trained else float("nan"),
            trained=int(trained),
            drift=float("nan"),
            numbers_sent=round(sent),
            message_bytes=message_bytes,
            stop=stop_requests > 0,
        )
        if not active and not protection.is_differential:  # noise comes without clients, too
            return received
        totals = uploads.message.total(device=uploads.shared_flat.device)[: self.terms.size]
        if not protection.is_differential:
            total = self._drift_weight(totals, weight)
            drift = (
                self._drift(uploads.shared_flat, totals / total, spread / total) if total else 0.0
            )
            received = received._replace(drift=drift)
        aggregate = self._mean(uploads, totals, active, weight)._replace(reports=reports)
        rows = self.mixing and self.mixing.mix(
            self.comm, self.algorithm, uploads.offers, active, cohort.round
        )
        return received._replace(aggregate=aggregate, mixed_rows=rows or {})

    def _term_vector(self, upload: Upload, shared: Tree, client: int, cohort: Cohort) -> Tensor:
        """The term [D] of a client's upload."""
        weight = cohort.clients.weights[client]
        received = Upload(upload.mean, upload.sum)  # no more than other ranks would have of it
        term = cohort.clients[client].transport.expand(received, shared, weight)
        return self.terms.pack(term, weight)

    def _add_term(
        self,
        uploads: Uploads,
        client: int,
        vector: Tensor,
        loss: float,
        spread: float,
        factor: float = 1.0,
    ) -> None:
        """Add a client's term [D] and its figures, with ``factor`` times the client's weight.

        spread: the squared distance of its parameters from the shared ones, times its weight.
        """
        weight = uploads.cohort.clients.weights[client]
        figures = torch.tensor([loss, 1.0, spread * factor], dtype=torch.float64)
        with uploads.message_of(client) as message:
            self._add_vector(message, uploads.contribution(vector, client), weight * factor)
            message.add(figures, 1, offset=self.terms.size)

    def _weigh(self, uploads: Uploads) -> tuple[Reports | None, Mapping[int, float]]:
        """The reports of a cohort, and the factor of each reporting client's weight; one message if
        the method has reports.
        """
        cohort = uploads.cohort
        if not self.report_size:
            return None, {}
        local_reports = {client: term.report for client, term in uploads.held.items()}
        reports = gather_reports(self._sum_ranks, local_reports, cohort.members, self.report_size)
        if not reports.clients:
            return None, {}
        factors = self.algorithm.mean_factors(reports, cohort.round).tolist()
        weights = [cohort.clients.weights[client] for client in reports.clients]
        total = sum(a * weight for a, weight in zip(factors, weights, strict=True))
        assert min(factors) >= 0 and isclose(total, sum(weights)), (
            f"mean_factors gave {factors} for the weights {weights}; their mean must be 1"
        )
        return reports, dict(zip(reports.clients, factors, strict=True))

    def _sum_ranks(self, buffer: np.ndarray) -> None:
        """Sum ``buffer`` over all ranks, in place."""
        self.comm.heartbeat.enter_stage("the exchange")
        (self.all_reduce or self.comm.sum)(buffer)

    def _add_vector(self, message: Message, vector: Tensor, weight: float) -> None:
        """Add a term [D] to ``message``; its sum channel counts once."""
        weighted_size = self.terms.weighted_size
        message.add(vector[:weighted_size], weight)
        if weighted_size < len(vector):
            message.add(vector[weighted_size:], 1, offset=weighted_size)

    def _split_channels(self, message: Tree) -> Upload:
        """The leaves of an upload that has travelled, by channel."""
        sums = {n: v for n, v in message.items() if n in self.untrained_upload.sum}
        return Upload({n: v for n, v in message.items() if n not in sums}, sums)

    def _add_broken(self, uploads: Uploads) -> None:
        """No update of the broken clients, but masks and noise: those of the others need them."""
        is_differential = self.protection.is_differential
        for client in uploads.broken:
            with uploads.message_of(client) as message:
                if is_differential:
                    message.add(uploads.contribution(uploads.reference, client), 1)

    def _sum(self, uploads: Uploads, stop: bool) -> tuple[int, list[float]]:
        """Sum the message over all ranks, without its term if uploads are gathered; the bytes that
        have travelled, and the figures.
        """
        message, size = uploads.message, self.terms.size
        last_figures = [len(uploads.broken), stop, sum(uploads.numels)]
        message.add(
            torch.tensor([0.0, 0.0, 0.0, *last_figures], dtype=torch.float64), 1, offset=size
        )
        travelling = message.buffer[..., size:].copy() if self.gathers else message.buffer
        if self.is_compact:
            sent = sum_limbs(message.buffer, self.comm.size, self._sum_ranks, self.comm.sum)
            return sent, message.total(offset=size).tolist()
        self._sum_ranks(self.protection.as_summed(travelling))
        message.buffer[..., -travelling.shape[-1] :] = travelling
        return travelling.nbytes, message.total(offset=size).tolist()

    def _broken_clients(self, uploads: Uploads) -> frozenset[int]:
        """Broken clients of all ranks; raises Fault with their ids unless they are skipped."""
        table = np.zeros(len(uploads.cohort.clients), np.int64)
        table[uploads.broken] = 1
        self.comm.sum(table)
        broken_clients = np.flatnonzero(table).tolist()
        if self.skip_nonfinite:
            return frozenset(broken_clients)
        ids = ", ".join(map(str, broken_clients))
        raise Fault(
            f"round {uploads.cohort.round + 1}: the loss or upload of client {ids} is not finite "
            "(or beyond what a mean can hold); nothing of this round was kept. Lower train.lr, or "
            "resume from the last checkpoint; a run begun with faults.non_finite=skip leaves such "
            "clients out"
        )

    def _add_remote_uploads(
        self, uploads: Uploads, active: frozenset[int], factors: Mapping[int, float]
    ) -> None:
        """Add the terms of other ranks' uploads to the message; ``factors``: see ``_weigh``.

        The sum then has the same bits as if each worker had added the terms of its own clients.
        """
        cohort = uploads.cohort
        layouts = {client: cohort.clients[client].upload_layout for client in sorted(active)}
        for client, message in gather_remote_uploads(
            self.comm, uploads.gathered, layouts, self.rank_of_client
        ).items():
            upload = self._split_channels(message)
            vector = self._term_vector(upload, uploads.shared, client, cohort)
            weight = cohort.clients.weights[client] * factors.get(client, 1.0)
            self._add_vector(uploads.message, vector, weight)

    def _mean(
        self, uploads: Uploads, totals: Tensor, active: frozenset[int], weight: float
    ) -> Aggregate:
        """The aggregate of the ``active`` clients, whose weights add up to ``weight``.

        ``absent: stale``: clients outside the cohort count with the shared variables they last
        received.
        """
        cohort = uploads.cohort
        absent = sum(cohort.clients.weights) - cohort.weight
        counts_absent = self.algorithm.absent == "stale" and absent > 0
        term = self.terms.unpack(totals, weight, uploads.shared, absent if counts_absent else 0)
        size = len(active) if cohort.expected_size is None else cohort.expected_size
        return Aggregate(
            mean=term.mean,
            sum=term.sum,
            metrics=term.metrics,
            round=cohort.round,
            clients=len(active),
            share=size / len(cohort.clients),
            weight=weight,
        )

    def _squared_distance(
        self, vector: Tensor, shared_flat: Tensor, own_weight: float = 1.0
    ) -> Tensor:
        """Squared distance of a term [D] from ``own_weight`` times the shared variables [D] of the
        round, [] float64.

        It counts the parameters of the network, or, where none is shared, all common leaves. The
        term has these times ``own_weight``, too.
        """
        gap = torch.sub(vector.double(), shared_flat, alpha=own_weight)
        return sum(
            (gap[at] @ gap[at] for at in self.drift_slices),
            torch.zeros((), dtype=torch.float64, device=gap.device),
        )

    def _drift_weight(self, vector: Tensor, default: float) -> float:
        """The weight of the drift's leaves that is in a vector [D]; ``default`` if they have none
        of their own.
        """
        weight = self.terms.own_weight(vector, self.drift_leaves[0]) if self.drift_leaves else None
        return default if weight is None else weight

    def _drift(self, shared_flat: Tensor, mean: Tensor, spread: float) -> float:
        """Root mean square distance of the cohort's uploads u_i from their mean, with its weights.

        With s the shared variables before the round,

            mean_i ||u_i - mean||^2  =  mean_i ||u_i - s||^2  -  ||mean - s||^2

        needs one message; distances from the mean would need a second. mean: float64 [D]; spread:
        the first term. NaN if uploads hold no shared parameter.
        FedLoRA's eq. (9) is the mean of the distances, which is at most this.
        """
        if not self.drift_slices:
            return float("nan")
        return max(0.0, spread - self._squared_distance(mean, shared_flat).item()) ** 0.5
