"""One communication round: state in, state and metrics out, the same code on every rank."""

import time
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..aggregation.client_mix import Packed
from ..aggregation.exact_sum import LIMIT, SUMS, ExactSum, FastSum, settle
from ..aggregation.flat_layout import bytes_of, joint
from ..aggregation.gathered import gathered
from ..aggregation.svd import right_vectors
from ..algorithm import Algorithm, Cohort
from ..core.clock import STAGES
from ..core.tree import Tree
from ..engine.flops import UNCOUNTED
from ..mpi.ending import Fault
from ..privacy.clipping import contribution, of_server
from ..privacy.masks import letters
from .federation import Run, State

# travel behind the upload, in the same buffer
_METRICS = ("loss", "clients", "spread", "broken", "stop", "sent")
_SCORES = ("accuracy", "loss", "accuracy_aggregated", "accuracy_trained")  # of each client


class Learned(NamedTuple):
    """What this rank's part of the cohort brings, beside what it has put into the message."""

    broken: list[int]  # clients whose loss or upload is not finite, or too large to be summed
    sent: list[int]  # numbers that each client has sent, by its own account
    offers: dict[int, Packed]
    # [3] of each client's own model after training, as ``Trainer.judge`` has them
    scores: dict[int, Tensor]
    uploads: dict[int, Tensor]  # as they travel where the run ``gathers``


def play(run: Run, state: State, evaluate: bool, stop: bool) -> tuple[State, dict, dict]:
    """Train the cohort, take the mean, evaluate. Every rank calls it with its own state.

    Returns the next state, the row of the round (numbers) and the rows of the clients ([N] each),
    complete on every rank. ``stop``: this rank was asked to stop; the row says whether any was.
    ``drift`` of the row: how far the clients have trained the shared parameters apart, see
    ``_drift``. A client whose loss or upload is not finite raises Fault on all ranks, or, where the
    run ``skips``, is left out: its personal leaves stay, the mean and the mixes are those of the
    others; ``skipped`` of the row holds such ids. ``nan_clients`` of the row: those with test
    samples whose logits are no numbers. ``seconds_ranks`` of an evaluated round: {stage: [R]
    seconds since the last such round} (see ``Stopwatch``; what came after its message counts to
    this one), of another round {}.
    """
    clock = [time.perf_counter()]
    run.clock.lap("other", run.comm.pulse.waited)
    whole, run = run, run.of_round(state.round)
    chosen = drawn = run.chosen(state.round)
    run.comm.pulse.at("the training", round_=state.round + 1)
    total, size = run.total(chosen), run.upload.size
    message = SUMS[run.reduce](size + len(_METRICS), run.upload.dtype)
    here = _packed(run, state.shared)
    learned = _train(run, state, chosen, here, message, LIMIT / max(total, len(chosen)), evaluate)
    clock.append(time.perf_counter())
    run.clock.lap("train", run.comm.pulse.waited)

    own = [0.0, 0.0, 0.0, len(learned.broken), stop, sum(learned.sent)]
    message.add(torch.tensor(own, dtype=torch.float64), 1, at=size)
    travelled = _add_up(run, message)
    loss, clients, spread, broken, stops, sent = message.total(at=size).tolist()
    away = sum(run.weight_N) - total
    if broken:
        chosen = drawn - _broken(run, state.round, learned.broken)
        total = run.total(chosen)
    if run.gathers:
        _add_others(run, state, chosen, learned.uploads, message)
    if run.privacy.differential:  # what came were updates
        message.add(run.untrained(state.shared), total)
        message.add(of_server(run.privacy, size, len(drawn), run.seed, state.round), 1)
    sums = message.total(device=here.device)
    if type(run.algorithm).sent is Algorithm.sent:
        # exact, also where float32 has added up
        sent = sum(run.layouts[run.kind_of[c]].size for c in chosen)
    traffic = _bytes(run, state.shared, chosen, round(sent), travelled)
    drift, train_loss = float("nan"), loss / clients if clients else float("nan")
    if chosen or run.privacy.differential:  # of nobody there still is the noise
        if not run.privacy.differential:
            drift = _drift(run, here, sums[:size] / total, spread / total)
        mean = _mean(run, state.shared, sums[:size], total, away)
        _mix(run, state, learned.offers, chosen)
        state = _served(
            run,
            state,
            mean,
            Cohort((total if run.privacy.draws else len(chosen)) / len(run.weight_N), total),
        )
    state = state._replace(round=state.round + 1)
    clock.append(time.perf_counter())
    run.clock.lap("exchange", run.comm.pulse.waited)

    row = {"train_loss": train_loss, "clients": int(clients), "stop": stops > 0, "drift": drift}
    row |= (
        traffic
        | {"flops": _flops(whole, drawn, state.round - 1)}
        | run.algorithm.told(state.shared, len(chosen))
    )
    row |= {"skipped": sorted(drawn - chosen)} if run.skips else {}
    unknown = np.full(len(run.weight_N), np.nan)
    judged = drawn if run.judges_cohort else range(len(run.weight_N))
    scores_N, nan_N, seconds = dict.fromkeys(_SCORES, unknown), unknown, {}
    run.clock.lap("other", run.comm.pulse.waited)  # FLOPs are counted once
    if evaluate:
        scores_N, nan_N, seconds = _evaluate(run, state, judged, learned.scores)
    run.rows.release()
    clock.append(time.perf_counter())
    row |= {"accuracy_worst": np.fmin.reduce(scores_N["accuracy"])}
    row |= {name: _nanmean(column) for name, column in scores_N.items()}
    row |= {"nan_predictions": _nanmean(nan_N), "nan_clients": np.flatnonzero(nan_N > 0).tolist()}
    row |= {
        f"seconds_{name}": t
        for name, t in zip(("train", "exchange", "evaluate"), np.diff(clock), strict=True)
    }
    row |= {"seconds_ranks": seconds}
    return state, row, scores_N


def _train(
    run: Run,
    state: State,
    chosen: frozenset[int],
    here: Tensor,
    message: ExactSum | FastSum,
    bound: float,
    evaluate: bool,
) -> Learned:
    """Train this rank's part of the cohort into ``message`` and the personal rows.

    ``here``: the shared variables as ``_packed`` gives them; ``bound``: magnitude up to which an
    upload can be summed.
    """
    learned = Learned([], [], {}, {}, {})
    letter = letters(run.privacy, message, chosen, run.seed, state.round)
    untrained = run.untrained(state.shared) if run.privacy.differential else here
    adds = partial(contribution, run.privacy, untrained, len(chosen), run.seed, state.round)
    for members in (
        members for group in run.here() for members in run.stacks(c for c in group if c in chosen)
    ):
        trainer = run.kinds[run.kind_of[members[0]]].trainer
        rows_C = _rows(run, state.personal, members)
        run.comm.pulse.at("the training", members)
        began = time.perf_counter()
        for done in trainer.train(members, state.shared, rows_C, state.round, evaluate):
            if run.journal:
                run.journal.poke()
            if not torch.isfinite(done.loss).all():  # what follows need not cope with such numbers
                learned.broken.append(done.client)
                continue
            upload = trainer.algorithm.upload(done.start, done.end)
            if run.gathers:  # other ranks have it as it travels, and so must this one
                upload = run.layouts[run.kind_of[done.client]].cast(upload)
            vector = run.upload.pack(
                trainer.algorithm.expand(upload, state.shared, run.weight_N[done.client])
            )
            offer = run.mixing and run.mixing.pack(trainer.algorithm.offer(done.start, done.end))
            # nor is it where one is not finite
            fits = all(v.abs().sum() < bound for v in (done.loss, vector))
            if not fits or (offer and not offer.fits()):
                learned.broken.append(done.client)
                continue
            learned.sent.append(int(trainer.algorithm.sent(done.start, done.end)))
            if run.gathers:
                learned.uploads[done.client] = run.layouts[run.kind_of[done.client]].pack(upload)
            # A diverging client must not overflow the sum; it is then beyond any meaning anyway.
            weight, moved = run.weight_N[done.client], _moved(run, vector, here).clamp(max=bound)
            about = [done.loss.item(), 1.0, moved.item() * weight]
            with letter(done.client) as own:
                own.add(adds(vector, done.client), weight)
                own.add(torch.tensor(about, dtype=torch.float64), 1, at=run.upload.size)
            if offer:
                learned.offers[done.client] = offer
            if done.score is not None:
                learned.scores[done.client] = torch.cat([done.score, done.nan_predictions[None]])
            _keep(run, state.personal, done.client, done.kept)
        seconds = time.perf_counter() - began
        run.pace.add(run.kind_of[members[0]], seconds, sum(run.sizes[c] for c in members))
    for client in learned.broken:  # no update, but masks and noise, which those of the others need
        with letter(client) as own:
            own.add(adds(untrained, client), 1 if run.privacy.differential else 0)
    return learned


def _add_up(run: Run, message: ExactSum | FastSum) -> int:
    """Make ``message`` that of all ranks, but for its upload where the run ``gathers``; bytes that
    have travelled.
    """
    travels = message.buffer[..., run.upload.size :].copy() if run.gathers else message.buffer
    run.comm.pulse.at("the exchange")
    if run.journal:
        run.journal.settle()
    # masks wrap around
    run.comm.sum(travels.view(np.uint64) if run.privacy.secure_aggregation else travels)
    if run.journal:
        run.journal.settled()
    message.buffer[..., -travels.shape[-1] :] = travels
    return travels.nbytes


def _add_others(
    run: Run,
    state: State,
    chosen: frozenset[int],
    uploads: dict[int, Tensor],
    message: ExactSum | FastSum,
) -> None:
    """Add to ``message`` what the uploads of other ranks' clients stand for; in the sum all clients
    then have the same bits as if each worker had added its own.
    """
    layouts = {client: run.layouts[run.kind_of[client]] for client in sorted(chosen)}
    for client, upload in gathered(run.comm, uploads, layouts, run.rank_of).items():
        term = run.kinds[run.kind_of[client]].algorithm.expand(
            upload, state.shared, run.weight_N[client]
        )
        message.add(run.upload.pack(term), run.weight_N[client])


def _mix(run: Run, state: State, offers: dict[int, Packed], chosen: frozenset[int]) -> None:
    """Give every client of the cohort its own mix, in place."""
    if run.mixing is None:
        return
    for client, rows in run.mixing.mix(
        run.comm, run.algorithm, offers, chosen, state.round
    ).items():
        _keep(run, state.personal, client, rows)


def _rows(run: Run, personal: Tree, clients: Sequence[int]) -> Tree:
    """The personal leaves [C, ...] of clients of one kind: views where the rows lie together, which
    they do at full participation.
    """
    kind, rows = run.kinds[run.kind_of[clients[0]]], [run.row_of[c] for c in clients]
    together = rows == list(range(rows[0], rows[0] + len(rows)))
    at = slice(rows[0], rows[0] + len(rows)) if together else rows
    return {n: personal[kind.prefix + n][at] for n in kind.first.personal}


def _keep(run: Run, personal: Tree, client: int, leaves: Tree) -> None:
    """Write personal leaves of a client into its row."""
    if run.journal:
        run.journal.note(client)
    prefix, row = run.kinds[run.kind_of[client]].prefix, run.row_of[client]
    for name, value in leaves.items():
        personal[prefix + name][row] = value


def _moved(run: Run, vector: Tensor, here: Tensor) -> Tensor:
    """Squared distance of an upload [D] from the shared variables [D] of the round, [] float64,
    over the parameters of the network (where it shares none, over all that uploads and shared
    variables hold).
    """
    gap = vector.double() - here
    return sum(
        (gap[at] @ gap[at] for at in run.compared),
        torch.zeros((), dtype=torch.float64, device=gap.device),
    )


def _drift(run: Run, here: Tensor, mean: Tensor, spread: float) -> float:
    """Root mean square distance of the cohort's uploads u_i from their mean, weighted as the mean
    is.

    With s the shared variables before the round, mean_i ||u_i - mean||^2 = mean_i ||u_i - s||^2
    - ||mean - s||^2: two numbers of the one message, where distances from the mean would need a
    second. mean: float64 [D]; spread: the first term. NaN where uploads hold no shared parameter.
    FedLoRA's eq. (9) is the mean of the distances, which is at most this.
    """
    if not run.compared:
        return float("nan")
    return max(0.0, spread - _moved(run, mean, here).item()) ** 0.5


def _packed(run: Run, shared: Tree) -> Tensor:
    """The shared variables at the places of an upload [D], float64; zero where it holds something
    else.
    """
    both, device = run.upload.common(shared), run.trainer.device

    def there(n, shape):
        return shared[n] if n in both else torch.zeros(shape, device=device)

    return run.upload.pack({n: there(n, shape) for n, shape in run.upload.shapes.items()}).double()


def _mean(run: Run, shared: Tree, sums: Tensor, total: float, away: float) -> Tree:
    """The weighted mean of the uploads, which weigh ``total``. ``absent: stale``: clients outside
    the cohort, which weigh ``away``, count with the shared variables they last received. Where the
    method ``sums``, the sum in its place.
    """
    if run.algorithm.sums:
        assert run.algorithm.absent == "exclude"
        total = 1
    if run.algorithm.absent == "stale" and away > 0:
        sums, total = sums + away * run.upload.pack(shared).double(), total + away
    like = next(iter(shared.values()), sums)
    mean = run.upload.unpack((sums / total).to(like.device))
    return {n: settle(v, shared.get(n)) for n, v in mean.items()}


def _served(run: Run, state: State, mean: Tree, cohort: Cohort) -> State:
    """The state after the server's rule."""
    server, shared = run.algorithm.serve(state.server, state.shared, mean, cohort)
    if matrices := run.algorithm.decomposed(shared):
        shared = run.algorithm.handed_out(shared, right_vectors(run.comm, matrices))
    return state._replace(server=server, shared=shared)


def _evaluate(
    run: Run, state: State, clients: Collection[int], trained: dict[int, Tensor]
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    """Columns [N] of ``_SCORES`` on every rank: the own model of each of ``clients`` on its own
    test data, NaN for the others; the fraction [N] of these whose logits are no numbers; and the
    seconds of each rank [R] by stage, which travel in the same message.

    ``accuracy``, ``loss`` and that fraction are those of the method's moment. A client outside the
    cohort was not trained: NaN after training, and its model after aggregation counts at either
    moment. One without a test sample of the classes so far: NaN at both.
    """
    everyone = len(run.weight_N)
    # scores of the clients at two moments, then seconds of the ranks
    table = np.zeros((everyone + run.comm.size, 6))
    for group in ([c for c in group if c in clients] for group in run.here()):
        if not group:
            continue
        trainer = run.kinds[run.kind_of[group[0]]].trainer
        for members in run.stacks(group, trainer.judged_at_once(group, state.round)):
            run.comm.pulse.at("the evaluation", members)
            rows_C = _rows(run, state.personal, members)
            table[members, :3] = trainer.judge(members, state.shared, rows_C, state.round).numpy()
            table[members, 3:] = [
                trained[c].tolist() if c in trained else [np.nan] * 3 for c in members
            ]
    run.clock.lap("evaluate", run.comm.pulse.waited)
    table[everyone + run.comm.rank, : len(STAGES)] = run.clock.taken()
    run.comm.sum(table)  # each row is set by one rank, so no rounding
    others = np.arange(len(table)) < everyone
    others[list(clients)] = False
    table[others] = np.nan
    received, after = table[:everyone, :3], table[:everyone, 3:]
    judged = received
    if run.algorithm.evaluates == "after_training":
        # by the accuracy: a loss may be nan
        judged = np.where(np.isnan(after[:, :1]), received, after)
    accuracy, loss, nan = judged.T
    scores_N = dict(zip(_SCORES, (accuracy, loss, received[:, 0], after[:, 0]), strict=True))
    return scores_N, nan, dict(zip(STAGES, table[everyone:].T, strict=False))


def _nanmean(column: np.ndarray) -> float:
    """Mean over the clients that have a number."""
    there = column[~np.isnan(column)]
    return float(there.mean()) if len(there) else float("nan")


def _bytes(
    run: Run, shared: Tree, chosen: frozenset[int], sent: int, message: int
) -> dict[str, int]:
    """Bytes of the round: what a real federation would send, each number in its leaf's dtype, and
    what MPI was handed.

    sent: numbers of all uploads together.
    """
    layouts, received = (
        [run.layouts[run.kind_of[c]] for c in chosen],
        [kind.received(shared) for kind in run.kinds],
    )
    up, down = bytes_of(sent, layouts), sum(received[run.kind_of[c]] for c in chosen)
    moved = message * run.comm.size
    if run.gathers:
        moved += joint([layout.dtype for layout in layouts]).itemsize * sum(
            layout.size for layout in layouts
        )
    if run.mixing:
        up, down = (
            up + run.mixing.bytes_up * len(chosen),
            down + run.mixing.bytes_down * len(chosen),
        )
        moved += run.mixing.bytes_mpi(len(chosen), run.comm.size)
    return {"bytes_up": up, "bytes_down": down, "bytes_mpi": moved if run.comm.size > 1 else 0}


def _flops(run: Run, chosen: frozenset[int], round_: int) -> int:
    """Floating-point operations of the cohort's local training, or UNCOUNTED. ``run``: the whole
    one, whose counts last.
    """
    sizes = run.of_round(round_).sizes
    alike = Counter((run.kind_of[c], sizes[c]) for c in chosen)
    each = {of: run.flops[of[0]].of_round(of[1], round_) for of in alike}
    if UNCOUNTED in each.values():
        return UNCOUNTED
    return sum(count * each[of] for of, count in alike.items())


def _broken(run: Run, round_: int, broken: list[int]) -> frozenset[int]:
    """The broken clients of all ranks. Raises Fault with their ids unless the run ``skips`` them."""
    table = np.zeros(len(run.weight_N), np.int64)
    table[broken] = 1
    run.comm.sum(table)
    found = np.flatnonzero(table).tolist()
    if run.skips:
        return frozenset(found)
    ids = ", ".join(map(str, found))
    raise Fault(
        f"round {round_ + 1}: the loss or upload of client {ids} is not finite (or beyond what a "
        "mean can hold); nothing of this round was kept. Lower train.lr, or resume from the last "
        "checkpoint; a run begun with faults.non_finite=skip leaves such clients out"
    )
