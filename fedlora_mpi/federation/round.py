"""One communication round: state in, state and metrics out, the same code on every rank."""

import time
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..aggregation.client_mix import PackedMix
from ..aggregation.exact_sum import LIMIT, SUM_TYPES, ExactSum, FastSum, absorb_rounding
from ..aggregation.flat_layout import estimate_nbytes, joint_dtype
from ..aggregation.gathered import gather_remote_uploads
from ..aggregation.svd import right_vectors
from ..algorithm import Algorithm, Cohort
from ..core.clock import STAGES
from ..core.tree import Tree
from ..engine.flops import UNCOUNTED
from ..mpi.ending import Fault
from ..privacy.clipping import contribution, server_noise
from ..privacy.masks import masked_messages
from .federation import Run, State

# metrics behind the upload, in the same buffer
_METRICS = ("loss", "clients", "spread", "broken", "stop", "sent")
_SCORES = ("accuracy", "loss", "accuracy_aggregated", "accuracy_trained")  # of each client


class LocalResult(NamedTuple):
    """Result of this rank's part of the cohort, beside its part of the message."""

    broken: list[int]  # clients whose loss or upload is not finite, or too large to be summed
    upload_numels: list[int]  # ``Algorithm.upload_numel`` of each client
    offers: dict[int, PackedMix]
    # [3] of each client's own model after training, as ``Trainer.score_clients`` has them
    scores: dict[int, Tensor]
    uploads: dict[int, Tensor]  # as they travel if ``Run.gather_uploads``, else empty


def run_round(run: Run, state: State, evaluate: bool, stop: bool) -> tuple[State, dict, dict]:
    """Train the cohort, take the mean, evaluate. Every rank calls it with its own state.

    Returns the next state, the row of the round (numbers) and the columns of the clients ([N]
    each), complete on every rank. ``stop``: this rank was asked to stop; the row says whether any
    rank was.

    A client whose loss or upload is not finite raises Fault on all ranks. If
    ``run.skip_nonfinite``, it is left out instead: its personal leaves stay, and the mean and the
    mixes are those of the other clients. ``skipped`` of the row holds the ids of such clients.

    ``drift`` of the row: see ``_drift``. ``nan_clients``: clients that have a test sample with a
    NaN logit. ``seconds_ranks`` of an evaluated round: {stage: [R] seconds since the last such
    round} (see ``Stopwatch``; time after its message counts to the next); of another round {}.
    """
    timestamps = [time.perf_counter()]
    run.clock.lap("other", run.comm.heartbeat.waited_seconds)
    full_run, run = run, run.for_round(state.round)
    active = sampled = run.sample_cohort(state.round)
    run.comm.heartbeat.enter_stage("the training", round_=state.round + 1)
    total, size = run.cohort_weight(active), run.upload_layout.size
    message = SUM_TYPES[run.reduce](size + len(_METRICS), run.upload_layout.dtype)
    shared_flat = _pack_shared(run, state.shared)
    local_result = _train(
        run, state, active, shared_flat, message, LIMIT / max(total, len(active)), evaluate
    )
    timestamps.append(time.perf_counter())
    run.clock.lap("train", run.comm.heartbeat.waited_seconds)

    metrics = [0.0, 0.0, 0.0, len(local_result.broken), stop, sum(local_result.upload_numels)]
    message.add(torch.tensor(metrics, dtype=torch.float64), 1, offset=size)
    message_bytes = _sum_message(run, message)
    loss, clients, spread, broken, stop_requests, numbers_sent = message.total(offset=size).tolist()
    absent_weight = sum(run.weight_N) - total
    if broken:
        active = sampled - _all_broken(run, state.round, local_result.broken)
        total = run.cohort_weight(active)
    if run.gather_uploads:
        _add_remote_uploads(run, state, active, local_result.uploads, message)
    if run.privacy.is_differential:  # the message holds updates
        message.add(run.untrained_contribution(state.shared), total)
        message.add(server_noise(run.privacy, size, len(sampled), run.seed, state.round), 1)
    sums = message.total(device=shared_flat.device)
    if type(run.algorithm).upload_numel is Algorithm.upload_numel:
        # exact, unlike a sum in float32
        numbers_sent = sum(run.layouts[run.kind_of[c]].size for c in active)
    traffic = _traffic_bytes(run, state.shared, active, round(numbers_sent), message_bytes)
    drift, train_loss = float("nan"), loss / clients if clients else float("nan")
    if active or run.privacy.is_differential:  # an empty cohort still has the noise
        if not run.privacy.is_differential:
            drift = _drift(run, shared_flat, sums[:size] / total, spread / total)
        mean = _mean(run, state.shared, sums[:size], total, absent_weight)
        _apply_mixes(run, state, local_result.offers, active)
        state = _apply_server(
            run,
            state,
            mean,
            Cohort(
                (total if run.privacy.samples_poisson else len(active)) / len(run.weight_N), total
            ),
        )
    state = state._replace(round=state.round + 1)
    timestamps.append(time.perf_counter())
    run.clock.lap("exchange", run.comm.heartbeat.waited_seconds)

    row = {
        "train_loss": train_loss,
        "clients": int(clients),
        "stop": stop_requests > 0,
        "drift": drift,
    }
    row |= (
        traffic
        | {"flops": _cohort_flops(full_run, sampled, state.round - 1)}
        | run.algorithm.server_metrics(state.shared, len(active))
    )
    row |= {"skipped": sorted(sampled - active)} if run.skip_nonfinite else {}
    unknown = np.full(len(run.weight_N), np.nan)
    evaluated = sampled if run.evaluate_cohort_only else range(len(run.weight_N))
    scores_N, nan_N = dict.fromkeys(_SCORES, unknown), unknown
    seconds: dict[str, np.ndarray] = {}
    run.clock.lap("other", run.comm.heartbeat.waited_seconds)  # FLOPs are counted once
    if evaluate:
        scores_N, nan_N, seconds = _evaluate(run, state, evaluated, local_result.scores)
    run.personal_rows.release()
    timestamps.append(time.perf_counter())
    row |= {"accuracy_worst": np.fmin.reduce(scores_N["accuracy"])}
    row |= {name: _nanmean(column) for name, column in scores_N.items()}
    row |= {"nan_predictions": _nanmean(nan_N), "nan_clients": np.flatnonzero(nan_N > 0).tolist()}
    row |= {
        f"seconds_{name}": t
        for name, t in zip(("train", "exchange", "evaluate"), np.diff(timestamps), strict=True)
    }
    row |= {"seconds_ranks": seconds}
    return state, row, scores_N


def _train(
    run: Run,
    state: State,
    active: frozenset[int],
    shared_flat: Tensor,
    message: ExactSum | FastSum,
    bound: float,
    evaluate: bool,
) -> LocalResult:
    """Train this rank's part of the cohort into ``message`` and the personal rows.

    shared_flat: see ``_pack_shared``; bound: magnitude up to which an upload can be summed.
    """
    local_result = LocalResult([], [], {}, {}, {})
    message_of = masked_messages(run.privacy, message, active, run.seed, state.round)
    reference = (
        run.untrained_contribution(state.shared) if run.privacy.is_differential else shared_flat
    )
    contribute = partial(contribution, run.privacy, reference, len(active), run.seed, state.round)
    for members in (
        members
        for group in run.local_groups()
        for members in run.split_into_stacks(c for c in group if c in active)
    ):
        trainer = run.kinds[run.kind_of[members[0]]].trainer
        rows_C = _personal_rows(run, state.personal, members)
        run.comm.heartbeat.enter_stage("the training", members)
        started = time.perf_counter()
        for client_result in trainer.train(members, state.shared, rows_C, state.round, evaluate):
            if run.journal:
                run.journal.progress()
            # what follows need not cope with such numbers
            if not torch.isfinite(client_result.loss).all():
                local_result.broken.append(client_result.client)
                continue
            upload = trainer.algorithm.upload(client_result.start, client_result.end)
            if run.gather_uploads:  # every rank must use the upload as it travels
                upload = run.layouts[run.kind_of[client_result.client]].cast(upload)
            vector = run.upload_layout.pack(
                trainer.algorithm.expand(upload, state.shared, run.weight_N[client_result.client])
            )
            offer = None
            if run.mixing:
                mix = trainer.algorithm.offer(client_result.start, client_result.end)
                assert mix is not None
                offer = run.mixing.pack(mix)
            # False, too, where a number is not finite
            is_summable = all(v.abs().sum() < bound for v in (client_result.loss, vector))
            if not is_summable or (offer and not offer.is_summable()):
                local_result.broken.append(client_result.client)
                continue
            local_result.upload_numels.append(
                int(trainer.algorithm.upload_numel(client_result.start, client_result.end))
            )
            if run.gather_uploads:
                local_result.uploads[client_result.client] = run.layouts[
                    run.kind_of[client_result.client]
                ].pack(upload)
            # A diverging client must not overflow the sum; its distance has no meaning anyway.
            weight, distance = (
                run.weight_N[client_result.client],
                _squared_distance(run, vector, shared_flat).clamp(max=bound),
            )
            metrics = [client_result.loss.item(), 1.0, distance.item() * weight]
            with message_of(client_result.client) as client_message:
                client_message.add(contribute(vector, client_result.client), weight)
                client_message.add(
                    torch.tensor(metrics, dtype=torch.float64), 1, offset=run.upload_layout.size
                )
            if offer:
                local_result.offers[client_result.client] = offer
            if client_result.score is not None:
                assert client_result.nan_predictions is not None
                local_result.scores[client_result.client] = torch.cat(
                    [client_result.score, client_result.nan_predictions[None]]
                )
            _write_row(run, state.personal, client_result.client, client_result.host_personal)
        seconds = time.perf_counter() - started
        run.throughput.add(run.kind_of[members[0]], seconds, sum(run.sizes[c] for c in members))
    # no update, but masks and noise: those of the other clients need them
    for client in local_result.broken:
        with message_of(client) as client_message:
            client_message.add(
                contribute(reference, client), 1 if run.privacy.is_differential else 0
            )
    return local_result


def _sum_message(run: Run, message: ExactSum | FastSum) -> int:
    """Sum ``message`` over all ranks, without its upload if ``run.gather_uploads``; the bytes that
    have travelled.
    """
    travelling = (
        message.buffer[..., run.upload_layout.size :].copy()
        if run.gather_uploads
        else message.buffer
    )
    run.comm.heartbeat.enter_stage("the exchange")
    if run.journal:
        run.journal.wait()
    # unsigned: masks wrap around
    run.comm.sum(travelling.view(np.uint64) if run.privacy.secure_aggregation else travelling)
    if run.journal:
        run.journal.commit()
    message.buffer[..., -travelling.shape[-1] :] = travelling
    return travelling.nbytes


def _add_remote_uploads(
    run: Run,
    state: State,
    active: frozenset[int],
    uploads: dict[int, Tensor],
    message: ExactSum | FastSum,
) -> None:
    """Add the terms of other ranks' uploads to ``message``.

    The sum then has the same bits as if each worker had added the terms of its own clients.
    """
    layouts = {client: run.layouts[run.kind_of[client]] for client in sorted(active)}
    for client, upload in gather_remote_uploads(
        run.comm, uploads, layouts, run.rank_of_client
    ).items():
        term = run.kinds[run.kind_of[client]].algorithm.expand(
            upload, state.shared, run.weight_N[client]
        )
        message.add(run.upload_layout.pack(term), run.weight_N[client])


def _apply_mixes(
    run: Run, state: State, offers: dict[int, PackedMix], active: frozenset[int]
) -> None:
    """Give every client of the cohort its own mix, in place."""
    if run.mixing is None:
        return
    for client, rows in run.mixing.mix(
        run.comm, run.algorithm, offers, active, state.round
    ).items():
        _write_row(run, state.personal, client, rows)


def _personal_rows(run: Run, personal: Tree, clients: Sequence[int]) -> Tree:
    """The personal leaves [C, ...] of clients of one kind.

    They are views if the rows are adjacent, as at full participation.
    """
    kind, rows = run.kinds[run.kind_of[clients[0]]], [run.row_of_client[c] for c in clients]
    is_contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
    selection = slice(rows[0], rows[0] + len(rows)) if is_contiguous else rows
    return {n: personal[kind.prefix + n][selection] for n in kind.initial.personal}


def _write_row(run: Run, personal: Tree, client: int, leaves: Tree) -> None:
    """Write personal leaves of a client into its row."""
    if run.journal:
        run.journal.save_undo(client)
    prefix, row = run.kinds[run.kind_of[client]].prefix, run.row_of_client[client]
    for name, value in leaves.items():
        personal[prefix + name][row] = value


def _squared_distance(run: Run, vector: Tensor, shared_flat: Tensor) -> Tensor:
    """Squared distance of an upload [D] from the shared variables [D] of the round, [] float64.

    It counts the parameters of the network, or, where none is shared, all common leaves.
    """
    gap = vector.double() - shared_flat
    return sum(
        (gap[at] @ gap[at] for at in run.drift_slices),
        torch.zeros((), dtype=torch.float64, device=gap.device),
    )


def _drift(run: Run, shared_flat: Tensor, mean: Tensor, spread: float) -> float:
    """Root mean square distance of the cohort's uploads u_i from their mean, with its weights.

    With s the shared variables before the round,

        mean_i ||u_i - mean||^2  =  mean_i ||u_i - s||^2  -  ||mean - s||^2

    needs one message; distances from the mean would need a second. mean: float64 [D]; spread: the
    first term. NaN if uploads hold no shared parameter.
    FedLoRA's eq. (9) is the mean of the distances, which is at most this.
    """
    if not run.drift_slices:
        return float("nan")
    return max(0.0, spread - _squared_distance(run, mean, shared_flat).item()) ** 0.5


def _pack_shared(run: Run, shared: Tree) -> Tensor:
    """The shared variables in the layout of an upload [D], float64; zero for its other leaves."""
    common_leaves, device = run.upload_layout.common_leaves(shared), run.trainer.device

    def leaf_or_zeros(n, shape):
        return shared[n] if n in common_leaves else torch.zeros(shape, device=device)

    return run.upload_layout.pack(
        {n: leaf_or_zeros(n, shape) for n, shape in run.upload_layout.shapes.items()}
    ).double()


def _mean(run: Run, shared: Tree, sums: Tensor, total: float, absent_weight: float) -> Tree:
    """The weighted mean of the uploads, whose weights add up to ``total``, or their sum if
    ``Algorithm.sums``.

    ``absent: stale``: clients outside the cohort, with ``absent_weight`` together, count with the
    shared variables they last received.
    """
    if run.algorithm.sums:
        assert run.algorithm.absent == "exclude"
        total = 1
    if run.algorithm.absent == "stale" and absent_weight > 0:
        sums, total = (
            sums + absent_weight * run.upload_layout.pack(shared).double(),
            total + absent_weight,
        )
    any_leaf = next(iter(shared.values()), sums)
    mean = run.upload_layout.unpack((sums / total).to(any_leaf.device))
    return {n: absorb_rounding(v, shared.get(n)) for n, v in mean.items()}


def _apply_server(run: Run, state: State, mean: Tree, cohort: Cohort) -> State:
    """The state after the server's rule."""
    server, shared = run.algorithm.server_update(state.server, state.shared, mean, cohort)
    if matrices := run.algorithm.decomposed(shared):
        shared = run.algorithm.handed_out(shared, right_vectors(run.comm, matrices))
    return state._replace(server=server, shared=shared)


def _evaluate(
    run: Run, state: State, clients: Collection[int], trained: dict[int, Tensor]
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    """Scores of ``clients`` on every rank, each with its own model on its own test data.

    Returns the columns [N] of ``_SCORES``, NaN for other clients; the fraction [N] of test samples
    with a NaN logit; and the seconds of each rank [R] by stage, which travel in the same message.

    ``accuracy``, ``loss`` and that fraction belong to ``Algorithm.evaluate_on``. A client outside
    the cohort was not trained, so it has NaN after training, and its model after aggregation
    counts. A client without a test sample of the classes so far has NaN in both.
    """
    everyone = len(run.weight_N)
    # scores of the clients at two moments, then seconds of the ranks
    table = np.zeros((everyone + run.comm.size, 6))
    for group in ([c for c in group if c in clients] for group in run.local_groups()):
        if not group:
            continue
        trainer = run.kinds[run.kind_of[group[0]]].trainer
        for members in run.split_into_stacks(
            group, trainer.evaluation_stack_size(group, state.round)
        ):
            run.comm.heartbeat.enter_stage("the evaluation", members)
            rows_C = _personal_rows(run, state.personal, members)
            table[members, :3] = trainer.score_clients(
                members, state.shared, rows_C, state.round
            ).numpy()
            table[members, 3:] = [
                trained[c].tolist() if c in trained else [np.nan] * 3 for c in members
            ]
    run.clock.lap("evaluate", run.comm.heartbeat.waited_seconds)
    table[everyone + run.comm.rank, : len(STAGES)] = run.clock.take_seconds()
    run.comm.sum(table)  # each row is set by one rank, so no rounding
    unevaluated = np.arange(len(table)) < everyone
    unevaluated[list(clients)] = False
    table[unevaluated] = np.nan
    after_aggregation, after_training = table[:everyone, :3], table[:everyone, 3:]
    judged = after_aggregation
    if run.algorithm.evaluate_on == "after_training":
        # by the accuracy: a loss may be nan
        judged = np.where(np.isnan(after_training[:, :1]), after_aggregation, after_training)
    accuracy, loss, nan = judged.T
    scores_N = dict(
        zip(_SCORES, (accuracy, loss, after_aggregation[:, 0], after_training[:, 0]), strict=True)
    )
    return scores_N, nan, dict(zip(STAGES, table[everyone:].T, strict=False))


def _nanmean(column: np.ndarray) -> float:
    """Mean over the clients that have a number."""
    known = column[~np.isnan(column)]
    return float(known.mean()) if len(known) else float("nan")


def _traffic_bytes(
    run: Run, shared: Tree, active: frozenset[int], numbers_sent: int, message_bytes: int
) -> dict[str, int]:
    """Bytes of the round: those of a real federation, each number in its leaf's dtype, and those
    given to MPI.

    numbers_sent: numbers of all uploads together.
    """
    layouts, download_bytes = (
        [run.layouts[run.kind_of[c]] for c in active],
        [kind.download_nbytes(shared) for kind in run.kinds],
    )
    up, down = (
        estimate_nbytes(numbers_sent, layouts),
        sum(download_bytes[run.kind_of[c]] for c in active),
    )
    mpi_bytes = message_bytes * run.comm.size
    if run.gather_uploads:
        mpi_bytes += joint_dtype([layout.dtype for layout in layouts]).itemsize * sum(
            layout.size for layout in layouts
        )
    if run.mixing:
        up, down = (
            up + run.mixing.bytes_up * len(active),
            down + run.mixing.bytes_down * len(active),
        )
        mpi_bytes += run.mixing.bytes_mpi(len(active), run.comm.size)
    return {"bytes_up": up, "bytes_down": down, "bytes_mpi": mpi_bytes if run.comm.size > 1 else 0}


def _cohort_flops(run: Run, active: frozenset[int], round_: int) -> int:
    """Floating-point operations of the cohort's local training, or UNCOUNTED.

    ``run``: the whole run, which keeps the counts.
    """
    sizes = run.for_round(round_).sizes
    client_counts = Counter((run.kind_of[c], sizes[c]) for c in active)
    flops_of = {
        kind_and_size: run.flops[kind_and_size[0]].round_flops(kind_and_size[1], round_)
        for kind_and_size in client_counts
    }
    if UNCOUNTED in flops_of.values():
        return UNCOUNTED
    return sum(count * flops_of[of] for of, count in client_counts.items())


def _all_broken(run: Run, round_: int, broken: list[int]) -> frozenset[int]:
    """Broken clients of all ranks; raises Fault with their ids unless ``run.skip_nonfinite``."""
    table = np.zeros(len(run.weight_N), np.int64)
    table[broken] = 1
    run.comm.sum(table)
    broken_clients = np.flatnonzero(table).tolist()
    if run.skip_nonfinite:
        return frozenset(broken_clients)
    ids = ", ".join(map(str, broken_clients))
    raise Fault(
        f"round {round_ + 1}: the loss or upload of client {ids} is not finite (or beyond what a "
        "mean can hold); nothing of this round was kept. Lower train.lr, or resume from the last "
        "checkpoint; a run begun with faults.non_finite=skip leaves such clients out"
    )
