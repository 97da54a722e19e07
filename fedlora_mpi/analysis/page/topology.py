"""Show over which graphs the clients exchange, and how far they are from agreeing."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..groups import Group, RunLog, count_seeds
from .crowd import caption_note, named_groups
from .curves import BAND_NOTE, Looks, line_figure
from .style import PageFigure, panels
from .table import Column, Table, format_number

_MAX_PANELS = 12
_MAX_CLIENTS = 200  # of a graph that can be read


def graph_figure(groups: Sequence[Group], looks: Looks) -> PageFigure | None:
    """Draw the graph of each group, of its first run, with the clients on a circle."""
    plotted = [
        group
        for group in named_groups(groups, looks)
        if 0 < len(group.runs[0].neighbours) <= _MAX_CLIENTS
    ][:_MAX_PANELS]
    if not plotted:
        return None
    titles = [(_label_with_gap(group), looks[group.label]) for group in plotted]
    fig, all_axes = panels(titles, (2.15, 2.15), "", "")
    for axes, group in zip(all_axes, plotted, strict=True):
        neighbours = group.runs[0].neighbours
        angles = 2 * np.pi * np.arange(len(neighbours)) / len(neighbours)
        x, y = np.sin(angles), np.cos(angles)
        pairs = [(a, b) for a, others in enumerate(neighbours) for b in others if a < b]
        ends = np.array(pairs).T  # [2, edges]
        axes.plot(x[ends], y[ends], color=looks[group.label].color, linewidth=0.6, zorder=1)
        axes.scatter(x, y, s=min(30, 600 / len(neighbours)), color=looks[group.label].ink)
        axes.set(aspect="equal", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
        axes.set_axis_off()
    caption = (
        "Who exchanges with whom: a dot is a client, numbered clockwise from the top, a line a "
        "pair of neighbours. The gap is 1 minus the second largest modulus of the eigenvalues of "
        "the mixing matrix; the larger it is, the sooner clients agree."
    )
    return PageFigure("topology", "Topology", caption + caption_note(looks, "are left out"), fig)


def consensus_curves(groups: Sequence[Group], looks: Looks) -> PageFigure | None:
    """Draw the consensus distance over the rounds of each group over a topology, with its gap."""
    caption = (
        "How far the clients are from agreeing after the exchange of a round: squared distance "
        "(L2) of the exchanged parameters of a client from their mean, mean over clients and over "
        f"{count_seeds(groups)}; {BAND_NOTE}. Gap: the spectral gap of the mixing matrix."
    )
    look_of, labelled = {}, []
    for group in (group for group in groups if group.runs[0].neighbours):
        labelled.append(replace(group, label=_label_with_gap(group)))
        look_of[labelled[-1].label] = looks[group.label]
    return line_figure(
        "consensus",
        "Consensus distance",
        caption,
        labelled,
        look_of,
        lambda g: g.curves("consensus_distance"),
        "consensus distance (squared L2)",
    )


def topology_table(groups: Sequence[Group]) -> Table | None:
    """Return the graph of each group, of its first run; None without a topology."""
    over_topology = [group for group in groups if group.runs[0].neighbours]
    if not over_topology:
        return None
    columns = [
        Column("run", "method"),
        Column("topology", "topology"),
        Column("edges", "edges"),
        Column("degrees", "neighbours of a client"),
        Column("gap", "spectral gap", format_number),
        Column("consensus", "final consensus distance", format_number),
    ]
    rows = [
        {
            "run": group.label,
            "topology": group.runs[0].topology,
            "edges": sum(map(len, group.runs[0].neighbours)) // 2,
            "degrees": _format_degrees(group.runs[0]),
            "gap": group.runs[0].spectral_gap,
            "consensus": group.seed_stat(final_consensus),
        }
        for group in over_topology
    ]
    note = (
        "The graph of the first seed. Consensus distance: squared distance of a client's exchanged "
        "parameters from their mean, mean over clients, in the last evaluated round."
    )
    return Table("topology", "Topologies", note, columns, rows)


def final_consensus(run: RunLog) -> float:
    """The consensus distance in the last evaluated round; NaN without one."""
    known = run.column("consensus_distance")[run.evaluated_rows]
    return float(known[-1]) if len(known) else np.nan


def _label_with_gap(group: Group) -> str:
    gap = group.runs[0].spectral_gap
    return group.label if gap is None else f"{group.label}: gap {format_number(gap)}"


def _format_degrees(run: RunLog) -> str:
    degrees = sorted({len(others) for others in run.neighbours})
    return f"{degrees[0]}" if len(degrees) == 1 else f"{degrees[0]} to {degrees[-1]}"
