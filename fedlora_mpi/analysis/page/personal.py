"""Figures of low-rank and personal parts, of the first seed of a group."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..groups import Group
from ..parts import Alike, LowRank, agreement, alike, factored, held, low_rank, size
from ..run_view import RunView
from .style import WIDTH, Drawn, figure

GROUPS = 4  # at most so many are drawn
BYTES = 500_000_000  # of checkpoints read for one page
_NAMED = 40  # up to so many layers or clients, each has its name


class Shown(NamedTuple):
    """``tables``: the low-rank parts by label of the group; ``left_out``: groups that are not
    drawn, each with why.
    """

    drawn: list[Drawn]
    tables: dict[str, LowRank]
    left_out: list[str]


def personal(groups: Sequence[Group]) -> Shown:
    """The figures of the first groups with low-rank or personal parts; those without a checkpoint
    are passed over. Groups whose clients have low-rank factors of their own come before others.
    """
    shown, budget, number = Shown([], {}, []), BYTES, 0
    views = [(group, RunView(group.runs[0].path)) for group in groups]
    for group, run in sorted(views, key=lambda view: not factored(view[1])):
        if not run.checkpoints:
            continue
        if number == GROUPS:
            shown.left_out.append(f"those of settings after the first {GROUPS} that have any")
            break
        if size(run) > budget:
            shown.left_out.append(f"{group.label} (its checkpoint is too large for a page)")
            continue
        try:
            parts = held(run, budget)
            found, similar = low_rank(run, parts), alike(run, parts)
        except ValueError as error:
            # such as a network of the user's own that cannot be imported here
            shown.left_out.append(f"{group.label} ({error})")
            continue
        if found and not np.nanmax(found.norm) > 0:
            shown.left_out.append(
                f"{group.label} (its factors are zero: what they have learned is in the dense weights)"
            )
            found = None
        if found is None and similar is None:
            continue
        number, budget = number + 1, budget - size(run)
        about = (
            f"{group.label}, seed {group.runs[0].seeds[0]}, after round {parts.checkpoint.round}"
        )
        if found:
            shown.tables[group.label] = found
            shown.drawn.append(ranks(found, f"lowrank-{number}", group.label, about))
        if similar:
            shown.drawn.append(similarity(similar, f"similarity-{number}", group.label, about))
    return shown


def ranks(found: LowRank, name: str, label: str, about: str) -> Drawn:
    """Effective rank and norm, layers down, clients across."""
    layers = len(found.layers)
    drawn = figure(WIDTH, 1.3 + max(0.16 * layers, 0.8))
    for axes, values, title in zip(
        drawn.subplots(1, 2, sharey=True),
        (found.effective_rank, found.norm),
        ("effective rank", "norm (Frobenius)"),
        strict=True,
    ):
        picture = axes.imshow(
            values, cmap="cividis", aspect="auto", interpolation="nearest", vmin=0
        )
        drawn.colorbar(picture, location="top", label=title, shrink=0.9).outline.set_visible(False)
        _plain(axes, found.clients)
    left = drawn.axes[0]
    if layers <= _NAMED:
        given = [_span(row) for row in found.given_rank]
        names = [
            f"{layer.removesuffix('.weight')} ({r})"
            for layer, r in zip(found.layers, given, strict=True)
        ]
        left.set_yticks(range(layers), names, fontsize="small")
    else:
        left.set_ylabel("layer, from the input to the output")
    said = (
        f"{about}: the low-rank part s B A of each layer (down; in brackets its number of components r) and client "
        "(across). The effective rank is (Σσ²)² / Σσ⁴ of its singular values σ: n where n are equal and the rest "
        "zero."
    )
    return Drawn(name, f"What the low-rank part has learned: {label}", said, drawn)


def similarity(found: Alike, name: str, label: str, about: str) -> Drawn:
    """The similarity of personal parts beside that of the label mixes, in one order."""
    drawn = figure(WIDTH, 3.9)
    tables = (("personal parts", found.personal), ("label mixes", found.labels))
    for axes, (title, values) in zip(drawn.subplots(1, 2, sharey=True), tables, strict=True):
        pairs = np.where(np.eye(len(values), dtype=bool), np.nan, values)
        picture = axes.imshow(pairs, cmap="cividis", interpolation="nearest")
        drawn.colorbar(
            picture, ax=axes, location="top", label=f"cosine of {title}", shrink=0.9
        ).outline.set_visible(False)
        _plain(axes, found.clients)
    drawn.axes[0].set_ylabel("client")
    if len(found.clients) <= _NAMED:
        drawn.axes[0].set_yticks(
            range(len(found.clients)), map(str, found.clients), fontsize="x-small"
        )
    what = (
        "all personal numbers less their mean over the clients"
        if found.centred
        else "the low-rank parts s B A of all layers"
    )
    rho = agreement(found)
    said = (
        f"{about}: cosine of two clients' personal parts (left; {what}) and of their training samples by class "
        "(right). Both in the order of an average-linkage clustering of the left, so that alike clients are "
        "neighbours; the diagonal, 1, is left white."
    )
    said += (
        ""
        if np.isnan(rho)
        else f" Over the pairs of clients the two have a rank correlation of {rho:+.2f} (Spearman)."
    )
    return Drawn(name, f"Which clients are alike: {label}", said, drawn)


def _plain(axes, clients: Sequence[int]) -> None:
    """Clients across, without a frame."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel("client")
    step = -(-len(clients) // 20)
    axes.set_xticks(range(0, len(clients), step), map(str, clients[::step]), fontsize="x-small")


def _span(numbers: np.ndarray) -> str:
    """4, or 4 to 16."""
    there = numbers[~np.isnan(numbers)]
    return " to ".join(f"{n:g}" for n in sorted({there.min(), there.max()}))
