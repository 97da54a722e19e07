"""Low-rank parts of weights: their factors, the matrix they form, and the best factors of a matrix.

The low-rank part of leaf ``w`` has the factors ``w.A`` [r, in side] and ``w.B`` [out side, r]. A
Linear, attention, or recurrent weight [O, I] is its own matrix. A convolution [O, I, K1, K2] is the
matrix [O K1, I K2]; the matrix is reshaped row by row (``view``) into the weight's shape, as in the
official FedDecomp code.

Other weights are read as follows:

  Conv1d [O, I, K]              [O, I K], like a Conv2d [O, I, 1, K] of images of height one
  Conv3d                        [O K1, I K2 K3]
  grouped convolution           I counts the inputs of one group, so the depthwise
                                [O, 1, 3, 3] is the matrix [3 O, 3]
  transposed convolution        its weight is [I, O, K1, ...]; it is read like a convolution
                                of this shape and transposed: [O K2 ..., I K1]
  Conv1D of transformers        its weight is [I, O]; it is read as the Linear [O, I]
  other product, more sides     [d1, d2, d3, ...] is [d1, d2 d3 ...]

At full rank every weight can be any matrix: Conv1d [8, 3, 5] is [8, 15], rank 8; Conv3d [4, 2, 3,
3, 3] is [12, 18], rank 12; ConvTranspose2d [6, 4, 2, 2] is [8, 12], rank 8; an LSTM of 5 inputs and
7 states has [28, 5], rank 5, and [28, 7], rank 7.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Generator, Tensor

from ..algorithm import LocalTraining, Loss, Phase, Step, Variables
from ..core.bounds import bounded
from ..core.names import factor_name, factors_by_weight, is_factor, sliced_weight
from ..core.tree import Tree, split
from ..models.network import Leaf, Model


def is_not_factor(leaf: str) -> bool:
    """Return whether a leaf belongs to sigma."""
    return not is_factor(leaf)


@dataclass(frozen=True)
class LowRank:
    """The low-rank part tau of a model: tau = s B A for each decomposed weight.

    FedLoRA (Wu et al.), eqs. (3)-(5), and the rule of its official code where it differs:

    ========  ==============================  ===========================
    field     paper                           official
    ========  ==============================  ===========================
    rank of   conv_rank min(I, O) K, rounded  int(conv_rank O) K
    a conv    (at most the smaller side)
    rank of   linear_rank min(I, O), rounded  linear_rank, an integer
    a Linear
    scale s   one: 1                          official: 1 / int(conv_rank O), without the
                                              factor K, and 1 / linear_rank
    ========  ==============================  ===========================

    K is the first side of a kernel, or 1 if the kernel has one side. The paper only has square
    kernels, for which min(I, O) K is the smaller side of the matrix. Under ``rank_rule: paper``
    every convolution other than a Conv2d has the rank conv_rank times that smaller side. Every
    other matrix counts as a Linear.

    A ~ U(-1, 1) / sqrt(in side) (Kaiming with a = sqrt 5, as in the official code; the paper says
    Gaussian and gives no variance). B = 0, so that tau starts at zero.

    With ``order: alternating`` tau trains first, and then sigma.
    """

    # [share of min(I, O) K] rank of tau in a convolution [O, I, K, K]; with ``rank_rule: official``
    # the rank is int(conv_rank O) K; default: the paper's best for CIFAR-10, Table 2
    conv_rank: float = 0.6
    # [share of min(I, O)] rank of tau in a Linear [O, I], at most 1; with ``rank_rule: official``
    # the rank itself, an integer; default: the paper's best for CIFAR-10, Table 2
    linear_rank: float | int = 0.6
    # whose formula gives the ranks; default: the paper, eqs. (3)-(5)
    rank_rule: Literal["paper", "official"] = "paper"
    # s: 1, or in the official code 1 / int(conv_rank O) and 1 / linear_rank; default: the paper,
    # which has no scale
    scale: Literal["one", "official"] = "one"
    # patterns of the names of decomposed weights; default: the paper, each layer
    layers: tuple[str, ...] = ("*",)
    # [epochs] training of tau, before the other ``train.epochs`` train sigma; default: the official
    # code (the paper's Fig. 4 has 0 to 5)
    lora_epochs: int = 2
    # whether tau and sigma train one after the other or, in all epochs, together; default: the
    # paper's Algorithm 1, better in Table 3
    order: Literal["alternating", "simultaneous"] = "alternating"

    def __post_init__(self) -> None:
        bounded(self, lora_epochs="[0, inf)", conv_rank="(0, 1]", linear_rank="(0, inf)")
        if self.rank_rule == "paper" and self.linear_rank > 1:
            raise ValueError(
                f"linear_rank = {self.linear_rank}: must be a ratio above 0 and at most 1 under "
                "rank_rule paper (an absolute rank needs rank_rule official)"
            )
        if self.rank_rule == "official" and (
            self.linear_rank < 1 or self.linear_rank != int(self.linear_rank)
        ):
            raise ValueError(
                f"linear_rank = {self.linear_rank}: must be an integer of at least 1 under "
                "rank_rule official (for CIFAR-10 the authors use 4, for CIFAR-100 40)"
            )

    def check(self, model: Model, train: LocalTraining) -> None:
        self.ranks(model)
        if self.order == "alternating" and self.lora_epochs > train.epochs:
            raise ValueError(
                f"lora_epochs = {self.lora_epochs}: must be at most train.epochs = {train.epochs}, "
                "of which it is a part"
            )

    def training_phases(self, model: Model, train: LocalTraining, loss: Loss) -> tuple[Phase, ...]:
        """Return the phases that train both parts, eqs. (6) and (7)."""
        if self.order == "simultaneous":
            return (Phase(train.epochs, (Step(loss),)),)

        def tau(v):
            return self.tau(model, v.shared | v.personal)  # constant while sigma trains

        return (
            Phase(self.lora_epochs, (Step(loss, is_factor),)),
            Phase(train.epochs - self.lora_epochs, (Step(loss, is_not_factor),), constant=tau),
        )

    def theta(self, model: Model, v: Variables) -> Tree:
        """Return theta = sigma + tau, eq. (2); each of the two may be shared or personal."""
        factors, sigma = split(v.shared | v.personal, is_factor)
        tau = v.constant or self.tau(model, factors)
        return {n: w + tau[n].to(w.dtype) if n in tau else w for n, w in sigma.items()}

    def ranks(self, model: Model) -> dict[str, int]:
        """Return the rank r of every decomposed weight.

        Raises ValueError when ``layers`` matches none.
        """
        return {n: self._rank(leaf) for n, leaf in match_weights(model, self.layers).items()}

    def scales(self, model: Model) -> dict[str, float]:
        """Return s of every decomposed weight."""
        return {n: self._scale(leaf) for n, leaf in match_weights(model, self.layers).items()}

    def factors(self, model: Model, rng: Generator) -> Tree:
        """Return the initial A and B of every decomposed weight."""
        tree = {}
        for name, leaf in match_weights(model, self.layers).items():
            (out_side, in_side), r = matrix_shape(leaf), self._rank(leaf)
            tree[factor_name(name, "A")] = kaiming_uniform(r, in_side, rng)
            tree[factor_name(name, "B")] = torch.zeros(out_side, r)
        return tree

    def tau(self, model: Model, factors: Tree) -> Tree:
        """Return {weight: s B A in the weight's shape}, at a matrix product per weight."""
        products = {}
        for name, B in factors_by_weight(factors, "B").items():
            s = self._scale(model.leaf(name))
            products[name] = (B * s) @ factors[factor_name(name, "A")]
        return as_updates(products, model)

    def _rank(self, leaf: Leaf) -> int:
        full = min(matrix_shape(leaf))
        if leaf.is_linear:
            return (
                int(self.linear_rank)
                if self.rank_rule == "official"
                else max(1, round(self.linear_rank * full))
            )
        out_channels, in_channels = _channels(leaf)
        if self.rank_rule == "official":
            return max(1, int(self.conv_rank * out_channels) * _kernel_height(leaf))
        if len(leaf.shape) == 4 and leaf.matrix == "conv":
            return max(
                1, min(full, round(self.conv_rank * min(in_channels, out_channels) * leaf.shape[2]))
            )
        return max(1, round(self.conv_rank * full))

    def _scale(self, leaf: Leaf) -> float:
        if self.scale == "one":
            return 1.0
        if leaf.is_linear:
            return 1 / self._rank(leaf)
        return 1 / max(1, int(self.conv_rank * _channels(leaf)[0]))


def matrix_shape(leaf: Leaf) -> tuple[int, int]:
    """Return (out side, in side) of the matrix that a weight is read as."""
    first, second, *kernel = leaf.shape
    if leaf.matrix == "linear":
        return first, second * math.prod(kernel)
    rows, columns = first * _kernel_height(leaf), second * math.prod(kernel) // _kernel_height(leaf)
    return (columns, rows) if leaf.matrix == "transposed" else (rows, columns)


def as_weight(matrix: Tensor, leaf: Leaf) -> Tensor:
    """Return ``matrix`` [out side, in side] in the shape of its weight."""
    return matrix.mT.reshape(leaf.shape) if leaf.matrix == "transposed" else matrix.view(leaf.shape)


def as_updates(matrices: Tree, model: Model) -> Tree:
    """Return {weight: its update, in its shape}.

    matrices: {weight or slice: its update [out side, in side]}. Where some slices of a weight have
    an update, that of the others is zero.
    """
    leaves = model.all_leaves
    updates = {n: as_weight(d, leaves[n]) for n, d in matrices.items() if n in leaves}
    for weight, fused in model.fused.items():
        slices = model.slices(weight)
        given = {n: as_weight(matrices[n], leaf) for n, leaf in slices.items() if n in matrices}
        if given:
            zero = torch.zeros_like(next(iter(given.values())))
            updates[weight] = torch.cat([given.get(n, zero) for n in slices], fused.axis)
    return updates


def _channels(leaf: Leaf) -> tuple[int, int]:
    """Return (out, in) channels of a convolution's weight; of grouped ones, one group's."""
    first, second = leaf.shape[:2]
    return (second, first) if leaf.matrix == "transposed" else (first, second)


def _kernel_height(leaf: Leaf) -> int:
    """Return the first side of a convolution's kernel; 1 if the kernel has one side."""
    return leaf.shape[2] if len(leaf.shape) > 3 else 1


def match_weights(model: Model, patterns: Sequence[str], frozen: bool = False) -> dict[str, Leaf]:
    """Return the weights that match a pattern and can have a low-rank part.

    A pattern with a colon also matches slices of weights: ``*.in_proj_weight:q``. With ``frozen``
    the result includes weights that the network's builder has frozen. Raises ValueError when a
    pattern matches none, or when a weight matches as well as a slice of it.
    """
    leaves = model.all_leaves if frozen else model.leaves
    matrices = {n: leaf for n, leaf in leaves.items() if leaf.matrix}
    slices = {n: leaf for weight in matrices for n, leaf in model.slices(weight).items()}

    def is_match(name, pattern):
        return fnmatchcase(name, pattern) and (":" in pattern or name not in slices)

    candidates = matrices | slices
    for pattern in patterns:
        if not any(is_match(n, pattern) for n in candidates):
            names = list(slices) if ":" in pattern else list(matrices)
            raise ValueError(f"layers = {pattern}: {_explain_no_match(model, pattern, names)}")
    matches = {n: v for n, v in candidates.items() if any(is_match(n, p) for p in patterns)}
    for name in slices:
        if name in matches and sliced_weight(name) in matches:
            raise ValueError(
                f"layers = {list(patterns)}: match {sliced_weight(name)} and its slice {name}; "
                "name one of them"
            )
    return matches


def _explain_no_match(model: Model, pattern: str, names: Sequence[str]) -> str:
    """Return why a pattern matches no weight; names: those that it could match."""
    if frozen_names := [
        n for n, leaf in model.frozen_leaves.items() if leaf.matrix and fnmatchcase(n, pattern)
    ]:
        return (
            f"matches only weights that are frozen, such as {frozen_names[0]}, which this method "
            "leaves as they are; fedit and its kin train low-rank parts beside such weights"
        )
    if ":" in pattern:
        return f"matches no slice of a weight; there are {join_first(names) or 'none'}"
    rejections = [
        f"{n}: {model.why_no_matrix(n)}" for n in model.all_leaves if fnmatchcase(n, pattern)
    ] + [f"{n}: tied, name {first}" for n, first in model.ties.items() if fnmatchcase(n, pattern)]
    explanation = f" that can be decomposed ({join_first(rejections)})" if rejections else ""
    word = pattern.strip("*.")  # of a layer, as peft's target_modules have them
    ends = [path[path.index(word) :] for n in names if word in (path := n.split("."))]
    way_out = f". Did you mean *.{'.'.join(ends[0])}?" if ends and len(ends[0]) < 3 else ""
    return f"matches no weight{explanation}; there are {join_first(names) or 'none'}{way_out}"


def skipped_weights(
    model: Model, low_rank: Mapping[str, int], full: Collection[str] = ()
) -> dict[str, str]:
    """Return {weight: why it has no low-rank part} of all weights with two or more dimensions.

    low_rank: {weight: rank} of those that have one; full: roles that are trained in full.
    """
    reasons = {}
    for name, leaf in model.all_leaves.items():
        decomposed = {name, *model.slices(name)} & low_rank.keys()
        if len(leaf.shape) < 2 or leaf.role == "stats" or decomposed:
            continue
        reason = (
            "trained in full"
            if leaf.role in full
            else "frozen"
            if name in model.frozen_leaves
            else ""
        )
        reasons[name] = reason or model.why_no_matrix(name) or "not in layers"
    return reasons


def join_first(words: Sequence[str], limit: int = 5) -> str:
    """Return the first ``limit`` words, and how many more there are."""
    rest = f" and {len(words) - limit} more" if len(words) > limit else ""
    return ", ".join(words[:limit]) + rest


def kaiming_uniform(rows: int, in_side: int, rng: Generator) -> Tensor:
    """Return an initial factor A [rows, in side]: U(-1, 1) / sqrt(in side)."""
    return (torch.rand(rows, in_side, generator=rng) * 2 - 1) / in_side**0.5


def right_singular_vectors(matrix: Tensor, rows: int) -> Tensor:
    """Return V' [..., rows, d2] of ``matrix`` [..., d1, d2] = U S V'; rows <= min(d1, d2).

    The rows are orthonormal and belong to the largest singular values, in falling order. ``matrix``
    V V' is the best approximation of ``matrix`` of this rank. If the rank of ``matrix`` is lower,
    orthonormal directions outside its row space complete V'. So A = V' and B = ``matrix`` V have no
    dead component: where B is zero, A is not. The largest entry of a row is positive;
    otherwise rounding would choose the sign.

    The vectors come from an eigendecomposition of the smaller Gram matrix in float64, which is
    several times as fast as an SVD. Singular values below 1e-8 of the largest are lost, as they are
    in float32 numbers anyway.
    """
    W = matrix.double()
    tall_matrix, basis = W, None
    if W.shape[-1] > W.shape[-2]:
        basis, triangle = torch.linalg.qr(W.mT)  # W = triangle' basis'
        tall_matrix = triangle.mT
    _, V = torch.linalg.eigh(tall_matrix.mT @ tall_matrix)  # in ascending order
    V = V[..., -rows:].flip(-1)
    V = V if basis is None else basis @ V
    largest = V.gather(-2, V.abs().argmax(-2, keepdim=True))
    return (V * largest.sign()).mT.to(matrix.dtype)
