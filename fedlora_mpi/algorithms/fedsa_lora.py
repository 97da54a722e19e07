"""LoRA whose factors A are averaged and whose factors B stay on their clients.

Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning" (FedSA-LoRA), ICLR
2025, https://arxiv.org/abs/2410.01463. The weights of client k are W_0 + s B_k A, B_k = 0 at the
start:

    A_k, B_k  <-  local training of A, B_k      A  <-  sum_k p_k A_k,  p_k = n_k / n

``scale: root`` is the paper's FedSA-rsLoRA. With one client the method is FedIT.

Ranks per client: client k has the first r_k rows of A. Each row of A is the mean over the clients
of the cohort that have it, weighted by n_k. Without such a client the row stays.

BatchNorm: uses its initial running statistics unchanged, unless ``full`` includes norm. Bytes per
client and round: 4 r_k d_in for each decomposed weight up and down; with ``personal_full: false``
also the leaves trained in full. Deviations: the paper's clients have one rank; the means of rows
are ours. The authors' dropout of 0.05 before A is left out, and so is their variant on VeRA.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from ..algorithm import Aggregate, Svd, Term, Transport, Update, Upload, Variables
from ..components.lora import Adapter, FineTuning
from ..core.names import is_factor, method_leaf_name
from ..core.tree import Tree, add_prefix, select_prefix, split
from ..models.network import Model

_HOLDERS = method_leaf_name("holders")


@dataclass(frozen=True)
class FedSALoRA(FineTuning):
    """Personal leaves: "<weight>.B", and those trained in full, unless they are shared.

    If ranks differ, a term has "holders.<weight>.A" [R], 1 for the rows of A that the client has.
    """

    # not settings: the server has no B, so it has no model and no update
    judged: ClassVar = "client"  # type: ignore[misc]
    diagnose: ClassVar = False  # type: ignore[misc]
    # whether leaves trained in full stay on their client, or are averaged by n_k; default: the
    # authors' code for GLUE, where the classifier stays
    personal_full: bool = True

    def init(self, model: Model, rng: Generator) -> Variables:
        def is_shared(leaf):
            return is_factor(leaf, "A") or not (self.personal_full or is_factor(leaf))

        return Variables(*split(super().init(model, rng).shared, is_shared))

    def transport(self, client: int, clients: int) -> Transport:
        transport = super().transport(client, clients)
        if len(self.client_ranks) == 1:
            return transport
        return transport._replace(expand=self.make_row_term)

    def make_row_term(self, upload: Upload, shared: Tree, weight: int) -> Term:
        """What a client's upload adds where clients have different ranks."""
        term = self.make_term(upload, shared, weight)
        holders = {
            n: (torch.arange(len(term.mean[n]), device=A.device) < len(A)).to(A)
            for n, A in upload.mean.items()
            if is_factor(n)
        }
        return term._replace(mean=term.mean | add_prefix(holders, _HOLDERS))

    def server_update(self, server: Tree, shared: Tree, aggregate: Aggregate, svd: Svd) -> Update:
        A = {
            n: torch.where(p[:, None] > 0, aggregate.mean[n] / p[:, None], shared[n])
            for n, p in select_prefix(aggregate.mean, _HOLDERS).items()
        }
        return super().server_update(
            server, shared, aggregate._replace(mean=aggregate.mean | A), svd
        )

    def client_model(self, model: Model, v: Variables) -> Tree:
        return super().client_model(model, _as_shared(v))

    def adapter(self, model: Model, v: Variables) -> Adapter:
        return super().adapter(model, _as_shared(v))


def _as_shared(v: Variables) -> Variables:
    """All leaves of a client in the place where ``FineTuning`` looks for them."""
    return Variables(v.shared | v.personal, {})
