"""Draw the low-rank and personal parts of a group's first run."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..groups import Group
from ..parts import (
    ClientSimilarity,
    LowRank,
    checkpoint_bytes,
    client_similarity,
    has_own_factors,
    low_rank,
    rank_correlation,
    read_leaves,
)
from ..run_view import RunView
from .style import WIDTH, PageFigure, new_figure

MAX_GROUPS = 4  # largest number of groups that are drawn
MAX_CHECKPOINT_BYTES = 500_000_000  # largest size of all checkpoints read for one page
_MAX_NAMED = 40  # up to so many layers or clients, each has a label


class PersonalFigures(NamedTuple):
    """The figures and tables of personal parts.

    tables: {label of the group: its low-rank parts}.
    left_out: the groups that are not drawn, each with the reason.
    """

    figures: list[PageFigure]
    tables: dict[str, LowRank]
    left_out: list[str]


def personal_figures(groups: Sequence[Group]) -> PersonalFigures:
    """Draw the first groups that have low-rank or personal parts.

    Groups whose clients have personal low-rank factors come first. Groups without a checkpoint are
    skipped.
    """
    result, budget, number = PersonalFigures([], {}, []), MAX_CHECKPOINT_BYTES, 0
    views = [(group, RunView(group.runs[0].path)) for group in groups]
    for group, run in sorted(views, key=lambda view: not has_own_factors(view[1])):
        if not run.checkpoints:
            continue
        if number == MAX_GROUPS:
            result.left_out.append(f"those of settings after the first {MAX_GROUPS} that have any")
            break
        if checkpoint_bytes(run) > budget:
            result.left_out.append(f"{group.label} (its checkpoint is too large for a page)")
            continue
        try:
            leaves = read_leaves(run, budget)
            assert leaves is not None  # there is a checkpoint, within the budget
            factors, similar = low_rank(run, leaves), client_similarity(run, leaves)
        except ValueError as error:
            # for instance a user's network that cannot be imported here
            result.left_out.append(f"{group.label} ({error})")
            continue
        if factors and not np.nanmax(factors.norm) > 0:
            result.left_out.append(
                f"{group.label} (its factors are zero: what they have learned is in the dense "
                "weights)"
            )
            factors = None
        if factors is None and similar is None:
            continue
        number, budget = number + 1, budget - checkpoint_bytes(run)
        description = (
            f"{group.label}, seed {group.runs[0].seeds[0]}, after round {leaves.checkpoint.round}"
        )
        if factors:
            result.tables[group.label] = factors
            result.figures.append(
                effective_rank_figure(factors, f"lowrank-{number}", group.label, description)
            )
        if similar:
            result.figures.append(
                similarity_figure(similar, f"similarity-{number}", group.label, description)
            )
    return result


def effective_rank_figure(factors: LowRank, name: str, label: str, description: str) -> PageFigure:
    """Draw effective rank and norm; rows are layers, columns are clients.

    A layer's norms are divided by its largest one, because norms grow with the size of a layer.
    """
    layers = len(factors.layers)
    largest = np.nanmax(factors.norm, axis=1, keepdims=True)
    relative_norm = np.divide(factors.norm, largest, where=largest > 0, out=0 * factors.norm)
    fig = new_figure(WIDTH, 1.3 + max(0.18 * layers, 0.8))
    for axes, values, title in zip(
        fig.subplots(1, 2, sharey=True),
        (factors.effective_rank, relative_norm),
        ("effective rank", "norm / largest norm of the layer"),
        strict=True,
    ):
        image = axes.imshow(values, cmap="cividis", aspect="auto", interpolation="nearest", vmin=0)
        fig.colorbar(image, location="top", label=title, shrink=0.9).outline.set_visible(False)
        _label_clients(axes, factors.clients)
    left_axes = fig.axes[0]
    if layers <= _MAX_NAMED:
        component_counts = [_format_range(row) for row in factors.num_components]
        names = [
            f"{layer}, r = {r}" for layer, r in zip(factors.layers, component_counts, strict=True)
        ]
        left_axes.set_yticks(range(layers), names, fontsize="small")
    else:
        left_axes.set_ylabel("layer, from the input to the output")
    caption = (
        f"{description}: the low-rank part s B A of each layer (down; with its number of "
        "components r) and client (across). The effective rank is (Σσ²)² / Σσ⁴ of its singular "
        "values σ: n where n are equal and the rest zero. Norms (Frobenius) are divided by the "
        "largest of their layer; the table of low-rank parts has the norms themselves."
    )
    return PageFigure(name, f"What the low-rank part has learned: {label}", caption, fig)


def similarity_figure(
    client_similarity: ClientSimilarity, name: str, label: str, description: str
) -> PageFigure:
    """Draw the similarity of personal parts beside that of label counts, in the same order.

    Both panels have the same colours, from -1 over white at 0 to 1.
    """
    fig = new_figure(WIDTH, 3.6)
    clients = client_similarity.clients
    tables = (
        ("personal parts", client_similarity.personal),
        ("training samples by class", client_similarity.labels),
    )
    all_axes = fig.subplots(1, 2, sharey=True)
    for axes, (title, values) in zip(all_axes, tables, strict=True):
        pairs = np.where(np.eye(len(values), dtype=bool), np.nan, values)
        image = axes.imshow(pairs, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_facecolor("#AAAAAA")  # of the diagonal
        axes.set_title(title)
        _label_clients(axes, clients)
    fig.colorbar(image, ax=all_axes, label="cosine", shrink=0.8).outline.set_visible(False)
    all_axes[0].set_ylabel("client")
    if len(clients) <= _MAX_NAMED:
        all_axes[0].set_yticks(range(len(clients)), map(str, clients), fontsize="small")
    what = (
        "all personal numbers less their mean over the clients"
        if client_similarity.is_centered
        else "the low-rank parts s B A of all layers"
    )
    rho = rank_correlation(client_similarity)
    caption = (
        f"{description}: cosine of two clients' personal parts (left; {what}) and of their numbers "
        "of training samples by class (right), in the same colours. Both in the order of an "
        "average-linkage clustering of the left, so that alike clients are neighbours; the "
        "diagonal, 1, is grey."
    )
    if not np.isnan(rho):
        caption += (
            f" Over all pairs of clients the two have a rank correlation (Spearman) of {rho:+.2f}."
        )
    return PageFigure(name, f"Which clients are alike: {label}", caption, fig)


def _label_clients(axes, clients: Sequence[int]) -> None:
    """Label the columns with client numbers and remove the frame."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel("client")
    step = -(-len(clients) // 20)
    axes.set_xticks(range(0, len(clients), step), map(str, clients[::step]), fontsize="small")


def _format_range(numbers: np.ndarray) -> str:
    """Return the range of the numbers, such as "4" or "4 to 16"."""
    known = numbers[~np.isnan(numbers)]
    return " to ".join(f"{n:g}" for n in sorted({known.min(), known.max()}))
