"""The table of methods for clients of unequal ranks whose learning rates are tuned. Its first note
says whether FedHL's claim (``paper.FEDHL``) can show.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ..components.lora import FineTuning
from ..store.reader import RunFiles
from . import paper
from .fedhl_table import LOGGED_COLUMNS, lora_entries
from .grid import Tuning
from .results import Result
from .sheet import Cell, Sheet, spread_note
from .tuned_sheet import late_note, rate_note, tuned_sheet

LEAST_SHARE = 0.05  # of ||D||^2 beyond the smallest rank, below which the claim cannot show


def rank_sheet(
    title: str,
    caution: str,
    notes: Sequence[str],
    cells: Sequence[Cell],
    seeds: int,
    results: Mapping[str, Sequence[Result]],
    tuning: Tuning,
) -> Sheet:
    """The table of a case, beside FlexLoRA."""
    (base,) = lora_entries(("flexlora",), ())
    explanations = [
        _share_note(results.get("fedhl-samples", ())),
        late_note(base, "the server's model", tuning.score)
        + "; the other columns: means over the rounds, as `diagnose` explains them",
        rate_note(tuning, cells),
        f"the paper: ahead of the best other method by {paper.FEDHL}",
        spread_note(seeds, "the paper's could not be had"),
        *notes,
    ]
    return tuned_sheet(
        title, caution, explanations, cells, seeds, results, base, tuning.score, LOGGED_COLUMNS
    )


def _share_note(results: Sequence[Result]) -> str:
    """Whether the claim can show: how much of the server's update the smallest rank cannot hold."""
    shares = [share for r in results if (share := tail_share(r)) is not None]
    if not shares:
        return "share of ||D||^2 beyond the smallest rank: unknown until `fedhl-samples` is done"
    share = float(np.mean(shares))
    verdict = (
        f"; under {LEAST_SHARE:.0%}, so the claim cannot show here" if share < LEAST_SHARE else ""
    )
    return (
        f"share of the server's update ||D||^2 beyond the smallest rank, with weights n_k after "
        f"the last round: {share:.1%}{verdict}"
    )


def tail_share(result: Result) -> float | None:
    """sum_{j > r_min} s_j^2 / sum_j s_j^2 of the server's update after the last round of a run of
    FedHL; s_j are singular values, of all weights. None if the run has no checkpoint of that round.
    """
    files, last = RunFiles(result.folder) if result.folder else None, result.job.config.rounds
    if files is None or last not in files.checkpoints():
        return None
    assert isinstance(algorithm := result.job.config.algorithm, FineTuning)
    shared, smallest = files.checkpoint(last).shared(), min(algorithm.lora_ranks)
    tails = [leaf for name, leaf in shared.items() if name.startswith("tail.")]  # each [R + 1]
    beyond = sum(float(tail[min(smallest, len(tail) - 1)]) for tail in tails)
    return beyond / max(sum(float(tail[0]) for tail in tails), 1e-30)
