"""One communication round: state in, state and metrics out, the same code on every rank."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .algorithm import Algorithm
from .comm import Comm, Fault
from .engine.train import Trainer
from .layout import Layout
from .mixing import Mixing, Packed
from .placement import Group, cohort
from .seeds import rng
from .sums import LIMIT, SUMS, ExactSum, FastSum
from .tree import Tree, nbytes, sq_dist

_METRICS = ("loss", "clients", "broken", "stop", "spread")  # travel behind the upload, in the same buffer
_SCORES = ("accuracy", "loss", "accuracy_aggregated", "accuracy_trained")  # of each client


@dataclass(frozen=True)
class Run:
    """Everything that does not change from round to round."""

    algorithm: Algorithm
    trainer: Trainer
    comm: Comm
    groups: tuple[Group, ...]
    host: tuple[int, ...]  # rank of each group
    weight_N: tuple[int, ...]  # what a client's upload counts in the mean
    seed: int
    participation: float
    reduce: str
    upload: Layout
    mixing: Mixing | None = None  # how per-client mixes are exchanged; None: the method has none

    @cached_property
    def hosted(self) -> tuple[int, ...]:
        """The clients of this rank, in the order of the rows of the personal state."""
        return tuple(c for group in self.here() for c in group)

    @cached_property
    def row_of(self) -> dict[int, int]:
        """The row of each of them."""
        return {client: row for row, client in enumerate(self.hosted)}

    def here(self) -> Iterator[Group]:
        """The groups that this rank hosts."""
        return (group for group, rank in zip(self.groups, self.host) if rank == self.comm.rank)

    def chosen(self, round_: int) -> frozenset[int]:
        """The cohort of a round: a pure function of the seed, so no rank has to be told."""
        draw = torch.randperm(len(self.weight_N), generator=rng(self.seed, "cohort", round_))
        return cohort(len(self.weight_N), self.participation, draw.tolist())


class State(NamedTuple):
    """Everything that does change, and so all that a checkpoint holds."""

    round: int  # rounds done
    server: Tree  # the server's own, equal on all ranks
    shared: Tree  # equal on all ranks
    personal: Tree  # [hosted clients, ...], rows as in ``Run.hosted``; owned, training writes to it


class Learned(NamedTuple):
    """What this rank's part of the cohort brings, beside what it has put into the message."""

    broken: list[int]  # clients whose loss or upload is not finite, or too large to be summed
    offers: dict[int, Packed]
    scores: dict[int, Tensor]  # [2] of each client's own model after training


def play(run: Run, state: State, evaluate: bool, stop: bool) -> tuple[State, dict, dict]:
    """Train the cohort, take the mean, evaluate. Every rank calls it with its own state.

    Returns the next state, the row of the round (numbers) and the rows of the clients ([N] each),
    complete on every rank. ``stop``: this rank was asked to stop; the row says whether any was.
    ``drift`` of the row: how far the clients have trained the shared parameters apart, see ``_drift``.
    Raises Fault on all ranks when a client's loss or upload is not finite.
    """
    clock = [time.perf_counter()]
    chosen = run.chosen(state.round)
    total, size = sum(run.weight_N[c] for c in chosen), run.upload.size
    message = SUMS[run.reduce](size + len(_METRICS))
    learned = _train(run, state, chosen, message, LIMIT / total, evaluate)
    clock.append(time.perf_counter())

    message.add(torch.tensor([0.0, 0.0, len(learned.broken), float(stop), 0.0]), 1, at=size)
    run.comm.sum(message.buffer)
    sums = message.total()
    loss, clients, broken, stops, spread = sums[size:].tolist()
    if broken:
        _report(run, state.round, learned.broken)
    drift = _drift(run, state.shared, sums[:size] / total, spread / total)
    mean = _mean(run, state.shared, sums[:size], chosen, total)
    _mix(run, state, learned.offers, chosen)
    served = run.algorithm.serve(state.server, state.shared, mean, len(chosen) / len(run.weight_N))
    state = State(state.round + 1, *served, state.personal)
    clock.append(time.perf_counter())

    row = {"train_loss": loss / clients, "clients": int(clients), "stop": stops > 0, "drift": drift}
    row |= _bytes(run, state.shared, len(chosen), message.buffer.nbytes)
    scores_N = _evaluate(run, state, learned.scores) if evaluate else dict.fromkeys(_SCORES, np.full(len(run.weight_N), np.nan))
    clock.append(time.perf_counter())
    row |= {"accuracy_worst": scores_N["accuracy"].min()}
    row |= {name: _nanmean(column) for name, column in scores_N.items()}
    row |= {f"seconds_{name}": t for name, t in zip(("train", "exchange", "evaluate"), np.diff(clock))}
    return state, row, scores_N


def _train(
    run: Run, state: State, chosen: frozenset[int], message: ExactSum | FastSum, bound: float, evaluate: bool
) -> Learned:
    """Train this rank's part of the cohort into ``message`` and the personal rows.

    ``bound``: magnitude up to which an upload can be summed.
    """
    learned, leaves = Learned([], {}, {}), _compared(run, state.shared)
    for group in run.here():
        members = [c for c in group if c in chosen]
        if not members:
            continue
        rows_C = _rows(state.personal, [run.row_of[c] for c in members])
        for done in run.trainer.train(members, state.shared, rows_C, state.round, evaluate):
            upload = run.algorithm.upload(done.start, done.end)
            vector = run.upload.pack(upload)
            offer = run.mixing and run.mixing.pack(run.algorithm.offer(done.start, done.end))
            fits = all(torch.isfinite(v).all() and v.abs().sum() < bound for v in (done.loss, vector))
            if not fits or (offer and not offer.fits()):
                learned.broken.append(done.client)
                continue
            message.add(vector, run.weight_N[done.client])
            message.add(torch.stack([done.loss, torch.tensor(1.0)]), 1, at=run.upload.size)
            # A diverging client must not overflow the sum; it is then beyond any meaning anyway.
            moved = _moved(upload, state.shared, leaves).clamp(max=bound)
            message.add(moved[None], run.weight_N[done.client], at=run.upload.size + _METRICS.index("spread"))
            if offer:
                learned.offers[done.client] = offer
            if done.score is not None:
                learned.scores[done.client] = done.score
            for name, value in done.end.personal.items():
                state.personal[name][run.row_of[done.client]] = value
    return learned


def _mix(run: Run, state: State, offers: dict[int, Packed], chosen: frozenset[int]) -> None:
    """Give every client of the cohort its own mix, in place."""
    if run.mixing is None:
        return
    for client, rows in run.mixing.mix(run.comm, run.algorithm, offers, chosen, state.round).items():
        for name, value in rows.items():
            state.personal[name][run.row_of[client]] = value


def _rows(personal: Tree, rows: list[int]) -> Tree:
    """Rows of the personal state: views where they lie together, which they do at full participation."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return {n: v[rows[0] : rows[0] + len(rows)] for n, v in personal.items()}
    return {n: v[rows] for n, v in personal.items()}


def _compared(run: Run, shared: Tree) -> list[str]:
    """The parameters that uploads and shared variables both hold; running statistics are none."""
    return [n for n in run.upload.shapes if n in shared and run.trainer.model.role(n) != "stats"]


def _moved(upload: Tree, shared: Tree, leaves: list[str]) -> Tensor:
    """Squared distance of an upload from the shared variables of the round, [] float64."""
    gap = sq_dist(*({n: tree[n].double() for n in leaves} for tree in (upload, shared)))
    return torch.as_tensor(gap, dtype=torch.float64)


def _drift(run: Run, shared: Tree, mean: Tensor, spread: float) -> float:
    """Root mean square distance of the cohort's uploads u_i from their mean, weighted as the mean is.

    With s the shared variables before the round, mean_i ||u_i - mean||^2 = mean_i ||u_i - s||^2
    - ||mean - s||^2: two numbers of the one message, where distances from the mean would need a
    second. mean: float64 [D]; spread: the first term. NaN where uploads hold no shared parameter.
    FedLoRA's eq. (9) is the mean of the distances, which is at most this.
    """
    leaves = _compared(run, shared)
    if not leaves:
        return float("nan")
    here = {n: shared[n].cpu() for n in leaves}
    return max(0.0, spread - _moved(run.upload.unpack(mean), here, leaves).item()) ** 0.5


def _mean(run: Run, shared: Tree, sums: Tensor, chosen: frozenset[int], total: float) -> Tree:
    """The weighted mean of the uploads. ``absent: stale``: clients outside the cohort count with
    the shared variables they last received."""
    if run.algorithm.absent == "stale" and len(chosen) < len(run.weight_N):
        away = sum(run.weight_N) - total
        sums, total = sums + away * run.upload.pack(shared).double().cpu(), total + away
    mean = (sums / total).float()
    like = next(iter(shared.values()), mean)
    return run.upload.unpack(mean.to(like.device))


def _evaluate(run: Run, state: State, trained: dict[int, Tensor]) -> dict[str, np.ndarray]:
    """Columns [N] of ``_SCORES`` on every rank: each client's own model on its own test data.

    ``accuracy`` and ``loss`` are those of the method's moment. A client outside the cohort was not
    trained: NaN after training, and its model after aggregation counts at either moment.
    """
    table = np.zeros((len(run.weight_N), 4))
    first = 0
    for group in run.here():
        rows_C = _rows(state.personal, list(range(first, first + len(group))))
        table[list(group), :2] = run.trainer.evaluate(group, state.shared, rows_C, state.round).numpy()
        table[list(group), 2:] = [trained[c].tolist() if c in trained else (np.nan, np.nan) for c in group]
        first += len(group)
    run.comm.sum(table)  # each row is set by one rank, so no rounding
    received, after = table[:, :2], table[:, 2:]
    judged = received
    if run.algorithm.evaluates == "after_training":
        judged = np.where(np.isnan(after), received, after)
    return dict(zip(_SCORES, (*judged.T, received[:, 0], after[:, 0])))


def _nanmean(column: np.ndarray) -> float:
    """Mean over the clients that have a number."""
    there = column[~np.isnan(column)]
    return float(there.mean()) if len(there) else float("nan")


def _bytes(run: Run, shared: Tree, chosen: int, message: int) -> dict[str, int]:
    """Bytes of the round: what a real federation would send (float32), and what MPI was handed."""
    up, down, moved = 4 * run.upload.size, nbytes(shared), message * run.comm.size
    if run.mixing:
        up, down = up + run.mixing.bytes_up, down + run.mixing.bytes_down
        moved += run.mixing.bytes_mpi(chosen, run.comm.size)
    return {"bytes_up": up * chosen, "bytes_down": down * chosen, "bytes_mpi": moved if run.comm.size > 1 else 0}


def _report(run: Run, round_: int, broken: list[int]) -> None:
    """Raise Fault with the ids of the broken clients of all ranks."""
    table = np.zeros(len(run.weight_N), np.int64)
    table[broken] = 1
    run.comm.sum(table)
    ids = ", ".join(map(str, np.flatnonzero(table)))
    raise Fault(
        f"round {round_ + 1}: the loss or upload of client {ids} is not finite (or beyond what a mean can "
        "hold); nothing of this round was kept. Lower train.lr, or resume from the last checkpoint"
    )
