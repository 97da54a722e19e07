"""One communication round: state in, state and metrics out, the same code on every rank."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .algorithm import Algorithm, Vars
from .comm import Comm, Fault
from .engine.train import Trainer
from .layout import Layout
from .placement import Group, cohort
from .seeds import rng
from .sums import LIMIT, SUMS
from .tree import Tree, nbytes

_METRICS = ("loss", "clients", "broken", "stop")  # travel behind the upload, in the same buffer


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
    hosted: tuple[int, ...] = field(init=False)  # clients of this rank: rows of the personal state

    def __post_init__(self) -> None:
        object.__setattr__(self, "hosted", tuple(c for group in self.here() for c in group))

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
    shared: Tree  # equal on all ranks
    personal: Tree  # [hosted clients, ...], rows as in ``Run.hosted``; owned, training writes to it


def play(run: Run, state: State, evaluate: bool, stop: bool) -> tuple[State, dict, dict]:
    """Train the cohort, take the mean, evaluate. Every rank calls it with its own state.

    Returns the next state, the row of the round (numbers) and the rows of the clients ([N] each),
    complete on every rank. ``stop``: this rank was asked to stop; the row says whether any was.
    Raises Fault on all ranks when a client's loss or upload is not finite.
    """
    clock = [time.perf_counter()]
    chosen = run.chosen(state.round)
    total = sum(run.weight_N[c] for c in chosen)
    size = run.upload.size
    message = SUMS[run.reduce](size + len(_METRICS))
    broken = _train(run, state, chosen, message, LIMIT / total)
    clock.append(time.perf_counter())

    message.add(torch.tensor([0.0, 0.0, len(broken), float(stop)]), 1, at=size)
    run.comm.sum(message.buffer)
    sums = message.total()
    loss, clients, failed, stops = sums[size:].tolist()
    if failed:
        _report(run, state.round, broken)
    shared = run.algorithm.serve(state.shared, _mean(run, state.shared, sums[:size], chosen, total))
    state = State(state.round + 1, shared, state.personal)
    clock.append(time.perf_counter())

    row = {"train_loss": loss / clients, "clients": int(clients), "stop": stops > 0}
    row |= _bytes(run, state.shared, len(chosen), message.buffer.nbytes)
    table = _evaluate(run, state) if evaluate else np.full((len(run.weight_N), 2), np.nan)
    clock.append(time.perf_counter())
    row |= {"accuracy": table[:, 0].mean(), "accuracy_worst": table[:, 0].min(), "loss": table[:, 1].mean()}
    row |= {f"seconds_{name}": t for name, t in zip(("train", "exchange", "evaluate"), np.diff(clock))}
    return state, row, {"accuracy": table[:, 0], "loss": table[:, 1]}


def _train(run: Run, state: State, chosen: frozenset[int], message, bound: float) -> list[int]:
    """Train this rank's part of the cohort into ``message`` and the personal rows.

    Returns the clients whose loss or upload is not finite, or too large to be summed (``bound``).
    """
    row_of = {client: row for row, client in enumerate(run.hosted)}
    broken = []
    for group in run.here():
        members = [c for c in group if c in chosen]
        if not members:
            continue
        rows_C = _rows(state.personal, [row_of[c] for c in members])
        for done in run.trainer.train(members, state.shared, rows_C, state.round):
            vector = run.upload.pack(run.algorithm.upload(done.start, done.end))
            top = vector.abs().max() if len(vector) else torch.tensor(0.0)
            if not (torch.isfinite(done.loss) and top < bound):
                broken.append(done.client)
                continue
            message.add(vector, run.weight_N[done.client])
            message.add(torch.stack([done.loss, torch.tensor(1.0)]), 1, at=run.upload.size)
            for name, value in done.end.personal.items():
                state.personal[name][row_of[done.client]] = value
    return broken


def _rows(personal: Tree, rows: list[int]) -> Tree:
    """Rows of the personal state: views where they lie together, which they do at full participation."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return {n: v[rows[0] : rows[0] + len(rows)] for n, v in personal.items()}
    return {n: v[rows] for n, v in personal.items()}


def _mean(run: Run, shared: Tree, sums: Tensor, chosen: frozenset[int], total: float) -> Tree:
    """The weighted mean of the uploads. ``absent: stale``: clients outside the cohort count with
    the shared variables they last received."""
    if run.algorithm.absent == "stale" and len(chosen) < len(run.weight_N):
        away = sum(run.weight_N) - total
        sums, total = sums + away * run.upload.pack(shared).double().cpu(), total + away
    mean = (sums / total).float()
    like = next(iter(shared.values()), mean)
    return run.upload.unpack(mean.to(like.device))


def _evaluate(run: Run, state: State) -> np.ndarray:
    """[N, 2]: test accuracy and loss of every client's own model, on every rank."""
    table = np.zeros((len(run.weight_N), 2))
    first = 0
    for group in run.here():
        rows_C = _rows(state.personal, list(range(first, first + len(group))))
        table[list(group)] = run.trainer.evaluate(group, state.shared, rows_C).numpy()
        first += len(group)
    run.comm.sum(table)  # each row is set by one rank, so no rounding
    return table


def _bytes(run: Run, shared: Tree, chosen: int, message: int) -> dict[str, int]:
    """Bytes of the round: what a real federation would send (float32), and what MPI was handed."""
    moved = message * run.comm.size if run.comm.size > 1 else 0
    return {"bytes_up": 4 * run.upload.size * chosen, "bytes_down": nbytes(shared) * chosen, "bytes_mpi": moved}


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
