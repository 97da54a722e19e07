"""LoRA with one rank per client: each partition of the components is averaged over its clients.

Wu et al., "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity"
(raFLoRA), 2026, https://arxiv.org/abs/2602.13486. The partitions l+1..h end at the different ranks
of all clients. With s_k = alpha / r_k:

    C_h  =   {k in the cohort: r_k >= h}       N_h  =  sum_{k in C_h} n_k
    W_h  <-  sum_{k in C_h} n_k / N_h s_k B_k[:, l+1..h] A_k[l+1..h]
    W    <-  sum_h W_h  =  U S V'              client k gets U_r S_r V_r', r = r_k

FlexLoRA divides by the samples of the whole cohort instead of N_h. There a component that only a
share c of the cohort has is multiplied by c in every round, so W collapses to the smallest rank.
Here components that nobody changes stay, unless all clients that have them are absent: then C_h is
empty and W_h = 0. If all clients have one rank, the method is FlexLoRA.

BatchNorm: uses its initial running statistics unchanged, unless ``full`` includes norm. Bytes per
client and round: 4 (r_k (d_out + d_in) for each decomposed weight, plus the leaves trained in full)
up and down. In the simulation, every upload becomes d_out d_in numbers for each partition.
Deviations: only the abstract and third-party code of Algorithm 1 and eq. (8) could be read. s_k is
FlexLoRA's, and all singular values are on B; that code has no s_k, and the root of S on each
factor. The head is trained in full and averaged by n_k, as there.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import cast

from ..algorithm import Aggregate, Svd, Term, Transport, Update, Upload
from ..components.lora.factors import factor_pairs
from ..components.lora.redistributed import RedistributedTuning
from ..core.names import factor_name, method_leaf_name
from ..core.tree import Tree, add_prefix, select_prefix


@dataclass(frozen=True)
class RaFLoRA(RedistributedTuning):
    """A term has a leaf "part<h>.<weight>.W" for each partition that the weight has."""

    def transport(self, client: int, clients: int) -> Transport:
        transport, ends = super().transport(client, clients), self.client_ranks
        if len(ends) == 1:
            return transport
        method = cast(RaFLoRA, transport.method)
        return transport._replace(expand=partial(method.make_partitioned_term, ends))

    def make_partitioned_term(
        self, ends: tuple[int, ...], upload: Upload, shared: Tree, weight: int
    ) -> Term:
        """What this client's upload adds: a product for each partition, which counts with the
        client's samples if it has these components, else not.
        """
        products: Tree = {}
        weights: Tree = {}
        for start, end in pairwise((0, *ends)):
            part: Tree = {}
            prefix = method_leaf_name(f"part{end}")
            for name, (A, B) in factor_pairs(upload.mean).items():
                if start < len(shared[factor_name(name, "A")]):
                    part[factor_name(name, "A")] = A[start:end]
                    part[factor_name(name, "B")] = B[:, start:end]
                    weights[prefix + name] = A.new_full((), weight if start < len(A) else 0)
            products |= add_prefix(self.products_as_updates(part), prefix)
        return self.build_term(upload, shared, weight, products, weights)

    def server_update(self, server: Tree, shared: Tree, aggregate: Aggregate, svd: Svd) -> Update:
        W: Tree = {}
        for end in self.client_ranks:
            for name, part in select_prefix(aggregate.mean, method_leaf_name(f"part{end}")).items():
                W[name] = W[name] + part if name in W else part
        return super().server_update(
            server, shared, aggregate._replace(mean=aggregate.mean | W), svd
        )
