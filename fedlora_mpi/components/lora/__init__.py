"""Federated LoRA fine-tuning of a frozen network; each client can have its own LoRA rank.

Every decomposed weight is W_0 + W + s_k B_k A_k.

  W_0   the initial value of the network's weight; it is never changed nor sent
  W     a dense update that some methods keep, on the server alone or on all clients
  A_k   a factor [r_k, in side] that client k trains
  B_k   a factor [out side, r_k] that client k trains
  s_k   a scale

The server's factors have the largest rank R; client k receives the first r_k components. Initially
A ~ U(-1, 1) / sqrt(in side) and B = 0. No weight has more components than its shorter side. Where
the network has an adapter, the first components are the adapter's, with B scaled so that s B A is
the adapter's product; all clients have the adapter's file, as they have W_0.

Leaves whose role is in ``full`` are trained in full, without factors, and averaged. Parameters that
the network's builder has frozen are not trained themselves; they have factors if their role is not
in ``full``.

A method defines what enters the mean for an upload (``mean_terms``), its weight in the mean
(``term_weights``), and what the server makes of the mean (``merge_terms``). ``FineTuning`` does the
rest.
"""

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Generator, Tensor

from ...algorithm import (
    Aggregate,
    Algorithm,
    EvaluatedModel,
    LocalTraining,
    Phase,
    Step,
    Svd,
    Term,
    Transport,
    Update,
    Upload,
    Variables,
    Visit,
)
from ...core.bounds import bounded
from ...core.names import factor_name, factors_by_weight, is_factor, weight_of
from ...core.tree import Tree, numel
from ...models.network import Model
from ...models.unmerged import UnmergedWeight
from ..lowrank import as_updates, kaiming_uniform, match_weights, matrix_shape
from . import diagnosis

Role = Literal["head", "norm"]
Adapter = tuple[dict[str, tuple[Tensor, Tensor, float]], Tree]  # see ``FineTuning.adapter``


@dataclass(frozen=True)
class FineTuning(Algorithm):
    """The common settings, and FedIT: the server averages the factors, padded with zeros to rank R.

    ``diagnose`` adds four numbers to the log, each over all decomposed weights. D is the server's
    update (low-rank and dense), D_k the update that client k received, D'_k the update after its
    training, and D' the server's next update.

      effective_clients  1 / sum p_k^2 of the aggregation weights p_k
      lora_truncation    the mean over the cohort of ||D - D_k||^2
      lora_bias          ||D' - sum_k n_k / n D'_k||, the error against the exact mean
                         of the trained updates
      lora_update_bias   ||(D' - D) - sum_k n_k / n (D'_k - D_k)||, the same for the changes

    It costs two dense matrices per decomposed weight in the message.
    """

    # [components] ranks of the clients; client k has the entry k mod n of a list of n; default: our
    # choice, one rank for all (it is also that of FFA-LoRA's experiments)
    lora_ranks: tuple[int, ...] = (8,)
    # [share of the clients] the first share of the clients has the first of lora_ranks, the next
    # share the second, and so on; []: ranks by turns; default: our choice, as one rank needs none
    rank_shares: tuple[float, ...] = ()
    # [capacity in any unit] client k has the share capacities[k mod n] / max(capacities) of the
    # single rank in lora_ranks, rounded down, but at least 1; []: all of it; default: our choice,
    # as one rank needs none
    capacities: tuple[float, ...] = ()
    # [1] numerator of s; default: our choice, twice the rank as in FLoRA's code
    alpha: float = 16.0
    # s is alpha / R (common) or alpha / sqrt(R) (root; Kalajdzievski 2023, rsLoRA), the same for
    # all clients, or the mean of the factors would have no meaning; default: LoRA
    scale: Literal["common", "root"] = "common"
    # patterns of the names of decomposed weights, or of slices such as in_proj_weight:q; those of
    # the roles in ``full`` never are; default: our choice, for networks that are no language models
    layers: tuple[str, ...] = ("*",)
    # roles of leaves that are trained in full, without factors; without norm BatchNorm normalises
    # by its stored statistics and does not update them; default: FedEx-LoRA's code
    full: tuple[Role, ...] = ("head",)
    # whose model is evaluated on a client's test data; default: our choice, as other methods
    judged: Literal["client", "server"] = "client"
    # whether a layer forms W_0 + W + s B A and multiplies by it, or adds W_0 x, W x and s B (A x),
    # which needs no gradient of the size of W_0: less memory for each client of a large Linear,
    # more time for small ones, other last bits; default: our choice, for networks of one GPU's size
    merge: bool = True
    # whether the log has four more numbers, at the cost of two dense matrices of each decomposed
    # weight in a message; default: our choice, for the cost
    diagnose: bool = False

    def __post_init__(self) -> None:
        bounded(self, alpha="(0, inf)", lora_ranks="[1, inf)")
        bounded(self, rank_shares="(0, 1]", capacities="(0, inf)")
        if not self.lora_ranks:
            raise ValueError("lora_ranks = []: must be integers of at least 1")
        if self.rank_shares and self.capacities:
            raise ValueError(
                f"capacities = {list(self.capacities)}: give either rank_shares or capacities"
            )
        shares = self.rank_shares
        if shares and (len(shares) != len(self.lora_ranks) or abs(sum(shares) - 1) > 1e-6):
            raise ValueError(
                f"rank_shares = {list(shares)}: must be a share above 0 for each of lora_ranks, "
                "together 1"
            )
        if self.capacities and len(self.lora_ranks) > 1:
            raise ValueError(
                f"capacities = {list(self.capacities)}: need one number in lora_ranks, the rank of "
                "the largest capacity"
            )

    @property
    def evaluate_on(self) -> EvaluatedModel:  # type: ignore[override]  # read only, like every field
        return "server" if self.judged == "server" else "after_aggregation"

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        return diagnosis.FIGURES if self.diagnose else ()

    def check(self, model: Model, train: LocalTraining) -> None:
        shapes, max_rank = self.adapted_shapes(model), max(self.lora_ranks)
        for name, (A, _, _) in model.adapter.factors.items():
            if name not in shapes:
                raise ValueError(
                    f"layers = {list(self.layers)}: model.adapter has a low-rank part of {name}, "
                    "and this method none; let layers match it, and full leave out its role"
                )
            if len(A) > max_rank:
                raise ValueError(
                    f"lora_ranks = {list(self.lora_ranks)}: model.adapter has rank {len(A)} at "
                    f"{name}; the largest of lora_ranks must be at least that"
                )

    def transport(self, client: int, clients: int) -> Transport:
        client_rank = self.client_rank(client, clients)
        # with this alpha the client's s equals ``scale_of(client_rank)``
        alpha = self.scale_of(client_rank) * self._scale_divisor(client_rank)
        method = replace(
            self, lora_ranks=(client_rank,), rank_shares=(), capacities=(), alpha=alpha
        )
        return Transport(method, method.receive, method.make_term, method.received_numel)

    def client_rank(self, client: int, clients: int) -> int:
        """Return the rank of number ``client`` of so many."""
        ranks, max_rank = self.lora_ranks, max(self.lora_ranks)
        if self.rank_shares:
            ends = [share * clients for share in accumulate(self.rank_shares)]
            return next(
                (r for r, end in zip(ranks, ends, strict=True) if client + 0.5 < end), ranks[-1]
            )
        if self.capacities:
            capacity = self.capacities[client % len(self.capacities)]
            return max(1, int(max_rank * capacity / max(self.capacities) + 1e-9))
        return ranks[client % len(ranks)]

    @property
    def client_ranks(self) -> tuple[int, ...]:
        """The different ranks of all clients, in increasing order."""
        capacities = range(len(self.capacities))
        ranks = {self.client_rank(client, len(capacities)) for client in capacities}
        return tuple(sorted(ranks or {*self.lora_ranks}))

    @property
    def s(self) -> float:
        """The factor before B A: the client's on the method of its transport, else the server's."""
        return self.alpha / self._scale_divisor(max(self.lora_ranks))

    def scale_of(self, lora_rank: int) -> float:
        """Return s of a client of this rank."""
        return self.s

    def _scale_divisor(self, lora_rank: int) -> float:
        return lora_rank**0.5 if self.scale == "root" else lora_rank

    def adapted_shapes(self, model: Model) -> dict[str, tuple[int, int]]:
        """Return {weight: (out side, in side)} of the decomposed weights and slices of weights.

        Raises ValueError when ``layers`` matches no weight that can be decomposed.
        """
        matches = match_weights(model, self.layers, frozen=True)
        weights = {n: leaf for n, leaf in matches.items() if leaf.role not in self.full}
        if not weights:
            raise ValueError(
                f"layers = {list(self.layers)}: match only what is trained in full = "
                f"{list(self.full)}"
            )
        return {n: matrix_shape(leaf) for n, leaf in weights.items()}

    # The client.

    def init(self, model: Model, rng: Generator) -> Variables:
        factors, r = {}, max(self.lora_ranks)
        for name, (out_side, in_side) in self.adapted_shapes(model).items():
            rows = min(r, out_side, in_side)
            A, B = kaiming_uniform(rows, in_side, rng), torch.zeros(out_side, rows)
            if name in model.adapter.factors:
                A_0, B_0, s_0 = model.adapter.factors[name]
                # with random rows of A and zeros of B no further component is dead
                A = torch.cat([A_0, A[len(A_0) :]])[:rows]
                B = torch.cat([B_0 * (s_0 / self.s), B[:, len(A_0) :]], 1)[:, :rows]
            factors[factor_name(name, "A")], factors[factor_name(name, "B")] = A, B
        full = {n: v for n, v in model.initial.items() if self.is_fully_trained(model, n)}
        return Variables(full | factors, {})

    def zero_updates(self, model: Model) -> Tree:
        """Return the dense updates W = 0 of all decomposed weights."""
        shapes = self.adapted_shapes(model)
        return {factor_name(n, "W"): torch.zeros(*shape) for n, shape in shapes.items()}

    def start_updates(self, model: Model) -> Tree:
        """Return the dense updates W before round 1: the adapter's products, elsewhere 0."""
        pairs = model.adapter.factors.items()
        return self.zero_updates(model) | {factor_name(n, "W"): s * B @ A for n, (A, B, s) in pairs}

    def is_fully_trained(self, model: Model, leaf: str) -> bool:
        """Return whether a leaf is trained in full, without factors.

        Running statistics follow the parameters of their normalisation layers.
        """
        role = model.role(leaf)
        return ("norm" if role == "stats" else role) in self.full

    def receive(self, shared: Tree) -> Tree:
        """Return the part of the server's variables that this client receives."""
        return self.truncate_rank(shared)

    def received_numel(self, server: Tree, shared: Tree, round_: int) -> Tensor | int:
        """Return how many numbers a real server would send to this client."""
        return numel(self.receive(shared))

    def truncate_rank(self, tree: Tree) -> Tree:
        """Return ``tree`` with its factors cut to this client's rank."""
        r = max(self.lora_ranks)

        def truncate(n, v):
            return v[:r] if is_factor(n, "A") else v[:, :r] if is_factor(n, "B") else v

        return {n: truncate(n, v) for n, v in tree.items()}

    def local(self, model: Model, train: LocalTraining, round_: int) -> tuple[Phase | Visit, ...]:
        return (Phase(train.epochs, (Step(self.loss(model), self.trained_leaves(model)),)),)

    def trained_leaves(self, model: Model):
        """Return the predicate that is true for the names of trained leaves."""
        return lambda leaf: is_factor(leaf) or self.is_fully_trained(model, leaf)

    def upload(self, start: Variables, end: Variables, round_: int) -> Upload:
        return Upload(mean={n: v for n, v in end.shared.items() if not is_factor(n, "W")})

    def client_model(self, model: Model, v: Variables) -> Tree:
        full, tree = {n: w for n, w in v.shared.items() if n in model.leaves}, model.all_values
        unmerged = {} if self.merge else self._unmerged_weights(model, v.shared)
        merged = {
            n: u
            for n, u in v.shared.items()
            if not (is_factor(n, "ABW") and weight_of(n) in unmerged)
        }
        updates = as_updates(self.delta(merged), model)
        rounded_updates = {
            n: d.to(tree[n].dtype) for n, d in updates.items() if tree[n].dtype.itemsize < 4
        }
        weights = {n: tree[n] + d for n, d in (updates | rounded_updates).items()}
        return tree | full | weights | unmerged

    def _unmerged_weights(self, model: Model, shared: Tree) -> Tree:
        """Return {weight: W_0 + W + s B A, not formed} of the weights of Linears and the like.

        A weight of which only slices have factors is none of them: torch's attention forms it.
        """
        tree, leaves, (factors, W) = model.all_values, model.all_leaves, self.update_parts(shared)

        def combine(n, B):
            input_first = leaves[n].matrix == "transposed"
            A = factors[factor_name(n, "A")]
            return UnmergedWeight(tree[n], W.get(n), A, B, self.s, input_first)

        return {
            n: combine(n, B)
            for n, B in factors_by_weight(factors, "B").items()
            if n in leaves and leaves[n].is_linear and tree[n].dim() == 2
        }

    def logits(self, model: Model, v: Variables, x: Tensor) -> Tensor:
        network = model if "norm" in self.full or not model.training else model.fixed_norm_model
        return network(self.client_model(model, v), x)

    def adapter(self, model: Model, v: Variables) -> Adapter:
        """Return ({weight: (A, B, s)}, leaves trained in full) of the client's own model.

        Both apply on top of the initial weights. Raises ValueError when the model also holds a
        dense update.
        """
        if dense_updates(v.shared):
            raise ValueError(
                "the model holds a dense update of the frozen weights beside the factors"
            )
        factors = {
            n: (v.shared[factor_name(n, "A")], B, self.s)
            for n, B in factors_by_weight(v.shared, "B").items()
        }
        return factors, {n: w for n, w in v.shared.items() if n in model.leaves}

    def factor_products(self, tree: Tree) -> Tree:
        """Return {weight: s B A} of all factors in ``tree``, each [out side, in side]."""
        return {
            n: self.s * B @ tree[factor_name(n, "A")]
            for n, B in factors_by_weight(tree, "B").items()
        }

    def update_parts(self, shared: Tree) -> tuple[Tree, Tree]:
        """Return the variables of which the factors count, and {weight: W}: the parts of an update.

        shared: the shared variables of a client or of the server.
        """
        return shared, dense_updates(shared)

    def delta(self, shared: Tree) -> Tree:
        """Return {weight: its update W + s B A}, each [out side, in side].

        shared: as in ``update_parts``.
        """
        factors, W = self.update_parts(shared)
        return W | {n: W[n] + p if n in W else p for n, p in self.factor_products(factors).items()}

    # The server.

    def make_term(self, upload: Upload, shared: Tree, weight: int) -> Term:
        """Return what this client's upload adds: the leaves trained in full, and ``mean_terms``.

        shared: the server's variables of the round; weight: the client's samples n_k.
        """
        terms = self.mean_terms(upload.mean, shared)
        weights = self.term_weights(upload.mean, shared, weight)
        return self.build_term(upload, shared, weight, terms, weights)

    def build_term(
        self, upload: Upload, shared: Tree, weight: int, terms: Tree, weights: Tree
    ) -> Term:
        """Return the leaves trained in full and these ``terms``, with these ``weights``."""
        full = {n: v for n, v in upload.mean.items() if not is_factor(n)}
        weight_of_term = {n: weights[weight_of(n)] for n in terms} if weights else {}
        metrics = self._client_metrics(upload, shared, weight, weights) if self.diagnose else {}
        return Term(full | terms, weights=weight_of_term, metrics=metrics)

    def mean_terms(self, upload: Tree, shared: Tree) -> Tree:
        """Return what enters the mean instead of the factors.

        By default these are the factors themselves, padded with zeros to the server's rank.
        """

        def pad_rows(n, v):
            return torch.cat([v, v.new_zeros(shared[n].shape[0] - len(v), v.shape[1])])

        def pad_columns(n, v):
            return torch.cat([v, v.new_zeros(len(v), shared[n].shape[1] - v.shape[1])], 1)

        return {
            n: (pad_rows if is_factor(n, "A") else pad_columns)(n, v)
            for n, v in upload.items()
            if is_factor(n)
        }

    def term_weights(self, upload: Tree, shared: Tree, count: int) -> Tree:
        """Return {weight: []}, the aggregation weights of this client's terms.

        {} means that every weight is ``count``, the client's number of samples n_k.
        """
        return {}

    def server_update(self, server: Tree, shared: Tree, aggregate: Aggregate, svd: Svd) -> Update:
        terms = {n: v for n, v in aggregate.mean.items() if is_factor(n, "ABW")}
        full = {n: v for n, v in aggregate.mean.items() if n in shared and n not in terms}
        new = shared | full | self.merge_terms(shared, terms, aggregate.round)
        if not self.diagnose:
            return Update(new, server)
        figures = diagnosis.figures(self.delta(shared), self.delta(new), aggregate)
        return Update(new, server, figures)

    def merge_terms(self, shared: Tree, terms: Tree, round_: int) -> Tree:
        """Return the factors and dense updates that change.

        shared: the present variables; terms: the weighted mean of ``mean_terms``.
        """
        return terms

    def _client_metrics(self, upload: Upload, shared: Tree, count: int, weights: Tree) -> Tree:
        """Return what the numbers of ``diagnose`` need of this client."""
        n_k = next(iter(upload.mean.values())).new_full((), count)
        received = self.receive(shared)
        return diagnosis.client_metrics(
            self.delta(shared),
            self.delta(received),
            self.delta(received | upload.mean),
            weights or {"all": n_k},
            n_k,
        )


def dense_updates(tree: Tree) -> Tree:
    """Return {weight: its W} of all dense updates in ``tree``."""
    return factors_by_weight(tree, "W")
