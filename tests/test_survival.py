"""Runs that lose workers, hang, or meet numbers that are not finite: real ranks under mpirun
--with-ft ulfm, killed by SIGKILL, end with the bits of a run to which nothing has happened.

Every launch costs seconds of each core, so the tests of every day have one, and ranks in this
process that die; the moments one by one, and random ones, are slow.
"""

import json
import os
import random
import re
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mortal import run_on_mortal_ranks
from runs import (
    MIXED,
    SLOW,
    TESTS,
    TINY,
    assert_same_run,
    build_tiny,
    clone_tree,
    join_personal,
    last_checkpoint,
    launch,
    mpirun_command,
    package_lines,
    rank_pids,
    run_on_ranks,
    run_process,
    tiny_config,
    trees_equal,
    wait_until,
)
from tiers import thorough_param, tiered_param

from fedlora_mpi import config as configs
from fedlora_mpi.cli import main
from fedlora_mpi.config.experiment import Faults
from fedlora_mpi.core.scheduling import assign_groups
from fedlora_mpi.data.inputs import Images
from fedlora_mpi.experiment import loop as run_module
from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.experiment.checkpointing import initial_state
from fedlora_mpi.experiment.loop import start
from fedlora_mpi.federation.cohorts import Cohorts
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.mpi import watchdog
from fedlora_mpi.mpi.comm import Mpi, Solo
from fedlora_mpi.mpi.ending import Fault, Refusal
from fedlora_mpi.mpi.pending import RankLost
from fedlora_mpi.resilience.recovery import run_tolerant
from fedlora_mpi.store.reader import RunFiles

METHODS = {
    # the mean by an allreduce, low-rank parts that stay; absent clients count as they were
    "fedlora": [],
    "fedamp": ["algorithm=fedamp", "mix=spread"],  # a mix for every client, over the workers
    "dpsgd": ["algorithm=dpsgd", "topology=ring"],  # rows from neighbour to neighbour
    # uploads by a gather, three kinds
    "fedhl": ["algorithm={name: fedhl, lora_ranks: [3, 2, 1]}", "uplink=gather", "train.lr=0.005"],
    "ota_ffl_like": ["algorithm=ota_ffl_like"],  # two sums: of what clients report, then the mean
}
SIX = ["rounds=6", "checkpoint.every=3"]
ALL = "participation=1.0"
thorough = pytest.mark.thorough


def line(plan, *overrides, ranks=4, output="run"):
    """The command line of a run on ranks that outlive others."""
    more = ["faults.tolerate=true", f"output={output}", *overrides]
    faults = json.dumps([[*fault, "dies"][:4] for fault in plan])
    return [
        *mpirun_command(ranks),
        "--with-ft",
        "ulfm",
        sys.executable,
        str(TESTS / "dying.py"),
        faults,
        "run",
        str(TINY),
        *more,
    ]


def lost(text):
    """[(ranks that were lost, ranks that go on,
    round that begins again)] of the lines on stderr."""
    found = re.findall(
        r"^fedlora-mpi: lost rank ([\d, ]+): (\d+) ranks go on with round (\d+)( after)?",
        text,
        re.M,
    )
    return [
        ([*map(int, ids.split(", "))], int(left), int(round_))
        for ids, left, round_, after in found
        if after
    ]


def rounds_begun(text):
    return [int(round_) for _, _, round_ in lost(text)]


# Workers that die.


def test_a_worker_dies_and_the_bits_are_those_of_an_undisturbed_run(trained, tmp_path):
    ended = run_process(line([(2, "training", 3)], ranks=3), tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("dies: rank") == 1
    assert [(ids, left) for ids, left, _ in lost(ended.stderr)] == [([2], 2)]
    assert_same_run(trained(), tmp_path / "run")
    assert [text.split(":")[0] for text in RunFiles(tmp_path / "run").rank_failures] == [
        "lost rank 2"
    ]


@thorough
def test_two_workers_die_in_different_rounds_and_the_bits_are_those_of_an_undisturbed_run(
    trained, tmp_path
):
    plan = [(2, "training", 2), (3, "client", 5)]  # 3 keeps the copies of 2, and then dies too
    ended = run_process(line(plan, *SIX), tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("dies: rank") == 2
    assert [ids for ids, _, _ in lost(ended.stderr)] == [[2], [3]] and [
        left for _, left, _ in lost(ended.stderr)
    ] == [3, 2]
    assert_same_run(trained(*SIX), tmp_path / "run")
    assert [text.split(":")[0] for text in RunFiles(tmp_path / "run").rank_failures] == [
        "lost rank 2",
        "lost rank 3",
    ]


class Unsaid(Exception):
    """What Open MPI's Iallreduce may say when a rank dies between two of its rounds."""

    def Get_error_class(self):
        return 16  # ERR_OTHER


@pytest.mark.parametrize(
    "tolerant, dead, revoked, lost", [(1, 1, 0, 1), (1, 0, 1, 1), (0, 1, 0, 0)]
)
def test_an_error_without_a_name_is_a_death_when_a_rank_is_dead(tolerant, dead, revoked, lost):
    calls = []
    comm = Mpi.__new__(Mpi)
    comm.is_tolerant = bool(tolerant)
    comm._mpi = SimpleNamespace(
        Exception=Unsaid, ERR_PROC_FAILED=75, ERR_PROC_FAILED_PENDING=76, ERR_REVOKED=77
    )
    comm._world = SimpleNamespace(
        Is_revoked=lambda: bool(revoked),
        Get_failed=lambda: SimpleNamespace(size=dead),
        Revoke=lambda: calls.append(1),
    )
    with pytest.raises(RankLost if lost else Unsaid), comm._raise_rank_lost():
        raise Unsaid
    assert len(calls) == lost


@pytest.mark.slow
def test_the_server_goes_on_alone_without_its_only_worker(trained, tmp_path):
    ended = run_process(line([(1, "training", 3)], *SIX, ranks=2), tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert [(ids, left) for ids, left, _ in lost(ended.stderr)] == [([1], 1)] and rounds_begun(
        ended.stderr
    )[0] in (2, 3)
    assert_same_run(trained(*SIX), tmp_path / "run")


@thorough
def test_the_death_of_rank_zero_ends_the_run_with_the_command_that_goes_on(trained, tmp_path):
    ended = run_process(line([(0, "training", 5)], *SIX, ranks=3), tmp_path)
    assert ended.returncode not in (0, 2, 75)
    assert package_lines(ended.stderr) == [
        "fedlora-mpi: rank 0, which has the log, has died; continue with 'mpirun --with-ft ulfm "
        "-n 3 fedlora-mpi resume run'"
    ]
    assert "Traceback" not in ended.stderr and last_checkpoint(tmp_path / "run") == 3
    assert main(["resume", str(tmp_path / "run"), "faults.tolerate=false"]) == 0
    assert_same_run(trained(*SIX), tmp_path / "run")


def on_threads(home, settings, deaths, seed, ranks=4):
    """The Fate of a whole run on ranks in this process, with its folder ``home``."""
    config = configs.read(
        TINY, [*settings, "faults.tolerate=true", "faults.timeout=0", f"output={home}"]
    )
    codes, fate = run_on_mortal_ranks(
        ranks, lambda comm: start(config, str(TINY), comm), deaths, seed
    )
    assert {*codes} <= {0, None} and codes[0] == 0
    return fate


@pytest.mark.parametrize("seeds", [[0], pytest.param([1], marks=thorough)], ids=["one", "another"])
@pytest.mark.parametrize(
    "method", [tiered_param(name, id=name, thorough=name == "ota_ffl_like") for name in METHODS]
)
def test_workers_that_die_at_any_moment_leave_the_bits(
    trained, tmp_path, monkeypatch, capsys, method, seeds
):
    die_everywhere(trained, tmp_path, monkeypatch, capsys, METHODS[method], seeds)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("method", METHODS)
def test_workers_that_die_at_many_moments_leave_the_bits(
    trained, tmp_path, monkeypatch, capsys, method, part
):
    die_everywhere(
        trained,
        tmp_path,
        monkeypatch,
        capsys,
        METHODS[method],
        range(100 + 10 * part, 110 + 10 * part),
    )


def die_everywhere(trained, home, monkeypatch, capsys, settings, seeds):
    """One to three of three workers die in each run, each at one of the moments of an undisturbed
    one.
    """
    # a thread may not handle signals
    monkeypatch.setattr(run_module, "collect_stop_signals", list)
    moments = on_threads(home / "none", settings, {}, 0).moments_of
    assert_same_run(trained(*settings), home / "none")
    for seed in seeds:
        draw = random.Random(seed)
        victims = draw.sample([1, 2, 3], draw.choice([1, 1, 2, 3]))
        deaths = {victim: draw.randint(1, moments[victim]) for victim in victims}
        capsys.readouterr()
        on_threads(home / str(seed), settings, deaths, seed)
        text = capsys.readouterr().err
        assert_same_run(trained(*settings), home / str(seed))
        if len(victims) == 1:
            again = re.findall("finished rounds played again: (\\d+)", text)
            assert not re.search(r"^round \d+/.*from what was on disk", text, re.M | re.S), (
                f"memory did not suffice: {text}"
            )
            assert {*again} <= {"0", "1"} and len(again) + text.count(
                "from what was on disk"
            ) <= 1, text


MOMENTS = {  # of one rank or two; rounds of which each may begin again
    "before round 1, while data are loaded": ([(2, "build", 1)], None),
    "in training, round 1": ([(2, "training", 1)], (1,)),
    "in training, between two clients": ([(2, "client", 3)], None),
    "in training, round 4": ([(3, "training", 4)], (3, 4)),
    "in the allreduce": ([(2, "message", 20)], None),
    "in the next message": ([(2, "message", 21)], None),
    "before the allreduce": ([(2, "sum", 18)], None),
    "in the evaluation": ([(1, "evaluation", 3)], (3,)),
    "before the checkpoint": ([(2, "checkpoint", 1)], (3, 4)),
    "in the checkpoint": ([(3, "shard", 1)], (3, 4)),
    "before the last checkpoint": ([(1, "checkpoint", 2)], (6, 7)),
    "while the copies travel": ([(2, "copy", 4)], (3, 4)),
    "while the first copies travel": ([(2, "copy", 1)], None),
    "at the very end": ([(2, "agree", 2)], (6, 7)),
    "two in one round, not partners": ([(1, "training", 3), (3, "training", 3)], None),
    "two in one round, partners": ([(2, "training", 5), (3, "training", 5)], None),
    "two in different rounds, partners": ([(2, "training", 2), (3, "training", 4)], None),
    "two in different rounds, the other way": ([(3, "training", 2), (2, "training", 4)], None),
    "one in the recovery from another": ([(2, "training", 3), (3, "shrink", 1)], None),
    "one in the recovery's messages": ([(2, "training", 3), (1, "exchange", 1)], None),
    "one at the recovery's end": ([(2, "training", 3), (1, "agree", 3)], None),
    "three of three, one after another": (
        [(1, "training", 2), (2, "training", 3), (3, "training", 5)],
        None,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_whenever_workers_die_the_bits_are_those_of_an_undisturbed_run(
    trained, tmp_path, moment, method
):
    plan, begun = MOMENTS[moment]
    settings = (*METHODS[method], *SIX)
    began = time.monotonic()
    ended = run_process(line(plan, *settings), tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("dies: rank") >= 1
    assert "Traceback" not in ended.stderr
    seconds = re.findall(r"after ([\d.]+) s", ended.stderr)
    print(
        f"\n| {method} | {moment} | {rounds_begun(ended.stderr) or 'from disk'} | "
        f"{', '.join(seconds)} | {time.monotonic() - began:.1f} |"
    )
    if begun:
        assert rounds_begun(ended.stderr)[0] in begun
    assert_same_run(trained(*settings), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["engine.personal=disk"]], ids=["memory", "disk"])
@pytest.mark.parametrize("moment", ["balance", "move", "moved"])
def test_workers_that_die_while_clients_move_leave_the_bits(trained, tmp_path, moment, more):
    settings = (*MIXED, *SIX, ALL)
    ended = run_process(
        line([(2, moment, 1), (1, moment, 2)], *settings, *more), tmp_path, TEST_WORTH="1000"
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("dies: rank") >= 1 and "Traceback" not in ended.stderr
    assert_same_run(trained(*settings), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_rows_on_disk_outlive_their_worker(trained, tmp_path, method):
    settings = (*METHODS[method], *SIX)
    ended = run_process(
        line([(2, "training", 2), (3, "client", 5)], *settings, "engine.personal=disk"), tmp_path
    )
    assert ended.returncode == 0 and ended.stderr.count("dies: rank") == 2, ended.stderr
    assert_same_run(trained(*settings), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(30))
def test_workers_killed_at_random_moments_leave_the_bits(trained, tmp_path, number):
    draw = random.Random(number)
    method = list(METHODS)[number % 3]
    settings = (*METHODS[method], *SIX, SLOW)
    with launch(line([], *settings), tmp_path, TEST_PAUSE="0.01") as job:
        wait_until(lambda: (tmp_path / "run/log.h5").exists(), process=job)
        victims = draw.sample([1, 2, 3], draw.choice([1, 1, 2]))
        for victim in victims:
            time.sleep(draw.uniform(0, 2.5))
            with suppress(OSError, KeyError):  # it has ended
                os.kill(rank_pids(job.pid)[victim], signal.SIGKILL)
        _, text = job.communicate(timeout=120)
    assert job.returncode == 0, text
    print(f"\n| {method} | {victims} | {lost(text) or 'from disk or nothing'} |")
    assert_same_run(trained(*settings), tmp_path / "run")


def test_a_launch_that_cannot_outlive_a_rank_is_refused(tmp_path):
    def begin(comm):
        return pytest.fail("it began")

    with pytest.raises(
        Refusal, match="x.yaml: faults.tolerate = true: .* 'mpirun --with-ft ulfm ...', or set"
    ):
        run_on_ranks(
            2,
            lambda comm: run_tolerant(
                Faults(tolerate=True), "x.yaml", tmp_path, comm, begin, begin
            ),
        )


def test_groups_that_have_a_home_stay_there_and_the_others_go_where_least_is_to_be_done():
    assert assign_groups([5, 4, 3, 2], (1, 2), [1, None, 2, None]) == (1, 2, 2, 1)
    assert (
        assign_groups([5, 4, 3, 2], (1, 2), [None] * 4)
        == assign_groups([5, 4, 3, 2], (1, 2))
        == (1, 2, 2, 1)
    )


# Hangs.


def in_training(text):
    """Whether the stacks in ``text`` show the training of a round."""
    return re.search(r'federation/round\.py", line \d+ in train$', text, re.M)


HANGS = r"no progress for 8 s \(faults.timeout\) in round \d, the training of client \d(, \d)*; continue with "


def test_a_hang_ends_the_process_with_round_stage_and_stacks(tmp_path):
    faults = json.dumps([(0, "client", 3, "hangs")])
    run = [
        sys.executable,
        str(TESTS / "dying.py"),
        faults,
        "run",
        str(TINY),
        "faults.timeout=8",
        "output=run",
    ]
    ended = run_process(run, tmp_path)
    assert ended.returncode == 1
    (told,) = package_lines(ended.stderr)
    assert re.fullmatch(rf"fedlora-mpi: (rank 0 of 1: )?{HANGS}'fedlora-mpi resume run'", told)
    assert in_training(ended.stderr) and 'dying.py", line' in ended.stderr


@thorough
def test_a_hang_ends_all_ranks_with_rank_round_stage_and_stacks(tmp_path):
    ended = run_process(line([(2, "client", 3, "hangs")], "faults.timeout=8", ranks=3), tmp_path)
    assert ended.returncode not in (0, 2, 75)
    (told,) = package_lines(ended.stderr)
    assert re.fullmatch(
        rf"fedlora-mpi: rank 2 of 3: {HANGS}'mpirun --with-ft ulfm -n 3 fedlora-mpi resume run'",
        told,
    )
    assert in_training(ended.stderr) and 'dying.py", line' in ended.stderr


@pytest.mark.slow
def test_a_rank_that_is_stopped_as_a_whole_is_missed_by_the_others(tmp_path):
    faults = line([(2, "client", 3, "stops")], "faults.timeout=4", ranks=3)
    ended = run_process(faults, tmp_path, timeout=60)
    assert ended.returncode not in (0, 2, 75)
    (told,) = package_lines(ended.stderr)
    assert told.startswith("fedlora-mpi: rank 2 of 3: no sign of life for 4 s (faults.timeout) in ")


@pytest.mark.slow
def test_a_hang_that_keeps_pythons_lock_ends_with_the_stacks(tmp_path):
    faults = json.dumps([(0, "client", 3, "locks")])
    run = [
        sys.executable,
        str(TESTS / "dying.py"),
        faults,
        "run",
        str(TINY),
        "faults.timeout=2",
        "output=run",
    ]
    ended = run_process(run, tmp_path, timeout=60)
    assert (
        ended.returncode == 1 and "Timeout (0:00:02.5" in ended.stderr and in_training(ended.stderr)
    )


@pytest.mark.slow
def test_a_rank_that_waits_for_one_that_computes_does_not_hang(tmp_path):
    """Every batch takes less than half of the timeout, a round more than all of it."""
    more = [
        "faults.timeout=5",
        "rounds=1",
        SLOW,
        ALL,
        "algorithm=fedavg",
        "train.epochs=1",
        "train.batch_size=32",
    ]
    ended = run_process(line([], *more, ranks=3), tmp_path, TEST_PAUSE="2")
    assert ended.returncode == 0, ended.stderr
    row = RunFiles(tmp_path / "run").rounds()
    # the server waits for the others
    assert row["seconds_train"][0] + row["seconds_exchange"][0] > 5


class Waiting(Solo):
    """A rank of three, of which only the pulse counts."""

    size, members = 3, (0, 1, 2)

    def __init__(self, rank):
        super().__init__()
        self.rank, self.heartbeat.members = rank, self.members
        self.heartbeat.enter_stage("the exchange", round_=4)
        self.heartbeat.is_waiting = True


@pytest.mark.parametrize("who", ["all wait", "one works", "one moves"])
def test_ranks_that_all_wait_for_each_other_end(who, tmp_path, monkeypatch):
    ranks, now = [Waiting(rank) for rank in range(3)], 0.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    signs = [watchdog.LifeSigns(comm, tmp_path / ".pulse", 20.0) for comm in ranks]
    ranks[1].heartbeat.is_waiting = who != "one works"
    stuck = []
    while now < 60 and not stuck:
        now += 2.5
        if who == "one moves" and now % 15 == 0:
            ranks[2].heartbeat.beat()
        assert not [sign.silent_ranks() for sign in signs if sign.silent_ranks()]
        stuck = [text for sign in signs if (text := sign.deadlock_stage())]
    assert (stuck == ["round 4, the exchange"] * 3) == (who == "all wait") and bool(stuck) == (
        who == "all wait"
    )
    assert now == 60 or 20 < now < 40


def test_a_rank_that_waits_for_mpi_to_start_ends_with_a_line_though_it_holds_pythons_lock(tmp_path):
    lock = "import ctypes; from fedlora_mpi.mpi.launch import limit_startup"
    for seconds, code in ((0.3, 1), (60, 0), (0, 0)):
        ended = run_process(
            [
                sys.executable,
                "-c",
                f"{lock}\nwith limit_startup({seconds}): ctypes.PyDLL(None).sleep(2)",
            ],
            tmp_path,
        )
        assert ended.returncode == code
        told = (
            "rank ?: MPI has not started within 0.3 s (faults.timeout): a rank has died or is out "
            "of reach; start again"
        )
        assert ended.stderr == (f"fedlora-mpi: {told}\n" if code else "")


@pytest.mark.parametrize(
    "name, code, seconds", [("mpirun", -signal.SIGTERM, 30), ("somebody", 7, 1)]
)
def test_an_mpirun_that_does_not_end_by_itself_is_ended_and_nobody_else(
    name, code, seconds, tmp_path
):
    (tmp_path / name).symlink_to("/bin/bash")
    rank = "from fedlora_mpi.mpi.launch import end_launcher; end_launcher(0.2)"
    ended = run_process(
        [
            str(tmp_path / name),
            "-c",
            f'{sys.executable} -c "{rank}"; sleep {seconds} >&- 2>&-; exit 7',
        ],
        tmp_path,
    )
    assert ended.returncode == code


# Numbers that are not finite.


def poisoned(feed, client, split):
    """``feed`` with NaN in the place of a client's training images."""
    mine = torch.from_numpy(split.train[client])
    mine = mine[mine != 0]  # which fills up the shorter clients of a stack

    class Poisoned(Images):
        def read(self, rows, warps):
            x, y = super().read(rows, warps)
            x[torch.isin(rows, mine)] = torch.nan
            return x, y

    feed._train = Poisoned(*feed._train)


def skipping(ranks, settings, bad):
    """[(shared, personal, row)] of three rounds in which one client's numbers (None: nobody's) are
    NaN.
    """
    config = tiny_config("faults.non_finite=skip", *settings)

    def play_all(comm):
        parts = build(config, str(TINY), comm)
        if bad is not None and parts.federation.clients.trainer.feed:
            poisoned(parts.federation.clients.trainer.feed, bad, parts.split)
        state, moments = initial_state(parts), []
        for _ in range(3):
            state, row, _ = run_round(parts.federation, state, evaluate=True, stop=False)
            moments.append((clone_tree(state.shared), clone_tree(state.personal), row))
        return parts.federation, moments

    found = run_on_ranks(ranks, play_all)
    federations = [federation for federation, _ in found]
    joined = [
        join_personal(federations, [moments[at][1] for _, moments in found]) for at in range(3)
    ]
    return [(shared, joined[at], row) for at, (shared, _, row) in enumerate(found[0][1])]


@pytest.mark.parametrize(
    "settings",
    [
        [],
        *(
            pytest.param(
                [*more, ALL], marks=thorough if name in ("fedlora", "ota_ffl_like") else ()
            )
            for name, more in METHODS.items()
        ),
    ],
    ids=["stale", *METHODS],
)
@pytest.mark.parametrize("ranks", [3, pytest.param(2, marks=thorough)])
def test_a_skipped_client_is_the_same_on_any_number_of_ranks(settings, ranks):
    bad = min(build_tiny(*settings).federation.cohorts.sample(0).members)
    alone, other = (skipping(number, settings, bad) for number in (1, ranks))
    assert alone[0][2]["skipped"] == [bad] and np.isfinite(alone[0][2]["train_loss"])
    assert all(
        torch.isfinite(v).all()
        for shared, personal, _ in alone
        for v in (*shared.values(), *personal.values())
    )
    assert [row["skipped"] for _, _, row in other] == [row["skipped"] for _, _, row in alone]
    assert all(
        trees_equal(a[0], b[0]) and trees_equal(a[1], b[1])
        for a, b in zip(alone, other, strict=True)
    )


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["algorithm=fedavg"], id="fedavg"),
        *(pytest.param(METHODS[name], id=name) for name in ("fedamp", "fedhl")),
        thorough_param(METHODS["ota_ffl_like"], id="ota_ffl_like"),
    ],
)
def test_a_skipped_client_is_as_if_it_were_not_in_the_cohort(settings, monkeypatch):
    settings = [*settings, "engine.path=loop"]  # in a stack bits depend on who else is in it
    bad = min(build_tiny(*settings).federation.cohorts.sample(0).members)
    skipped = skipping(1, settings, bad)
    sample = Cohorts._sample_members
    monkeypatch.setattr(Cohorts, "_sample_members", lambda *given: sample(*given) - {bad})
    absent = skipping(1, settings, None)
    for was, would in zip(skipped, absent, strict=True):
        assert trees_equal(was[0], would[0]) and trees_equal(was[1], would[1])
        assert (
            was[2]["train_loss"] == would[2]["train_loss"]
            and was[2]["bytes_up"] == would[2]["bytes_up"]
        )


def test_a_skipped_client_weighs_nothing_where_absent_ones_count_as_they_were(monkeypatch):
    parts = build_tiny()
    assert parts.federation.algorithm.absent == "stale" and len(
        parts.federation.cohorts.sample(0).members
    ) < len(parts.federation.clients.weights)
    bad = min(parts.federation.cohorts.sample(0).members)
    skipped = skipping(1, [], bad)[0]
    made = build(tiny_config("faults.non_finite=skip"), str(TINY), parts.federation.comm)
    federation, clients = made.federation, made.federation.clients
    clients = replace(
        clients, weights=tuple(0 if c == bad else w for c, w in enumerate(clients.weights))
    )
    weightless = replace(
        federation, clients=clients, cohorts=replace(federation.cohorts, tasks=(clients,))
    )
    state, _, _ = run_round(weightless, initial_state(made), evaluate=False, stop=False)
    assert trees_equal(skipped[0], state.shared)
    first = initial_state(made).personal
    assert all(
        torch.equal(skipped[1][n][bad], first[n][federation.placement.row_of_client[bad]])
        for n in first
    )


def test_by_default_such_a_client_ends_the_run():
    parts = build(tiny_config(), str(TINY), build_tiny().federation.comm)
    bad = min(parts.federation.cohorts.sample(0).members)
    poisoned(parts.federation.clients.trainer.feed, bad, parts.split)
    with pytest.raises(Fault, match=f"round 1: the loss or upload of client {bad} is not finite"):
        run_round(parts.federation, initial_state(parts), evaluate=False, stop=False)


def test_when_nobody_is_left_the_shared_state_stays_and_a_line_says_it(tmp_path, capsys):
    run = tmp_path / "run"
    more = ["train.lr=1e30", "faults.non_finite=skip", "rounds=2", "checkpoint.every=1", ALL]
    assert main(["run", str(TINY), *more, f"output={run}"]) == 0
    lines = package_lines(capsys.readouterr().err)
    assert lines == [
        f"fedlora-mpi: round {t}: skipped client 0, 1, 2, 3, 4, 5, 6: loss or upload is not "
        "finite; nobody is left, the shared state stays"
        for t in (1, 2)
    ]
    log = RunFiles(run).rounds()
    assert (
        log["skipped"].tolist() == [7, 7]
        and log["clients"].tolist() == [0, 0]
        and np.isnan(log["train_loss"]).all()
    )
    first = initial_state(build_tiny(ALL)).shared
    assert all(np.array_equal(v, first[n]) for n, v in RunFiles(run).checkpoint().shared().items())


def test_what_does_not_change_numbers_is_free_on_a_resume_and_the_default_leaves_no_trace():
    assert "faults" not in configs.resolved_dict(tiny_config())
    same = [
        configs.digest(tiny_config(*more))
        for more in ([], ["faults.tolerate=true"], ["faults.timeout=9"], ["faults={}"])
    ]
    assert len(set(same)) == 1 and configs.digest(tiny_config("faults.non_finite=skip")) != same[0]
    config = tiny_config("faults.timeout=9", "faults.non_finite=skip")
    assert configs.resolved_dict(config)["faults"] == {"timeout": 9.0, "non_finite": "skip"}
    assert configs.from_dict(configs.resolved_dict(config), "there") == config
