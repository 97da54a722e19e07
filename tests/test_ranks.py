"""Where the seconds of each rank went: measured apart from waiting, carried to the log, told as a
load.
"""

import h5py
import numpy as np
import pytest
from folders import CLIENTS, append_round, create_log, read_groups, table_rows, write_run
from runs import (
    TINY,
    assert_same_run,
    command_line,
    create_run,
    mpirun_command,
    run_on_ranks,
    run_process,
    tiny_config,
)

from fedlora_mpi import open_run
from fedlora_mpi.analysis import load as loads
from fedlora_mpi.analysis.groups import RunLog
from fedlora_mpi.analysis.page import ranks as page
from fedlora_mpi.analysis.page import tables
from fedlora_mpi.analysis.page.crowd import assign_looks
from fedlora_mpi.analysis.page.style import plot_style
from fedlora_mpi.core import clock
from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.experiment.checkpointing import initial_state
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.store.log import Log
from fedlora_mpi.store.reader import RunFiles

ROW = {"train_loss": 1.0, "seconds_train": 2.0, "bytes_up": 12, "accuracy": 0.5}
SCORES = {"accuracy": np.zeros(CLIENTS), "loss": np.nan}
nan = np.nan


def test_a_stopwatch_counts_waiting_apart_and_loses_no_second(monkeypatch):
    now = iter([10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    watch = clock.Stopwatch()
    watch.lap("train", waited=100.0)  # only starts it: what was before is not the run's
    watch.lap("train", waited=101.0)
    watch.lap("exchange", waited=105.5)
    assert dict(zip(clock.STAGES, watch.take_seconds(), strict=True)) == {
        "train": 2.0, "exchange": 2.5, "evaluate": 0.0, "other": 0.0, "waiting": 5.5,
    }  # fmt: skip
    watch.lap("train", waited=105.5)
    assert watch.take_seconds().tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_the_log_holds_ranks_that_come_late_grow_and_shrink(tmp_path):
    log = create_log(tmp_path)
    append_round(log, 1)
    log.append(2, ROW, SCORES, {"train": np.array([1.0, 2.0]), "waiting": np.array([3.0, 0.0])})
    log.close()
    log = Log.reopen(tmp_path / "log.h5")
    log.append(3, ROW, SCORES, {})
    log.append(4, ROW, SCORES, {"train": np.array([1.0, 2.0, 5.0]), "waiting": np.zeros(3)})
    log.append(5, ROW, SCORES, {"train": np.array([7.0]), "waiting": np.zeros(1)})
    log.close()
    found = RunFiles(tmp_path).ranks()
    assert found["ranks"].tolist() == [0, 2, 0, 3, 1]
    rows = [[nan, nan, nan], [1, 2, nan], [nan, nan, nan], [1, 2, 5], [7, nan, nan]]
    np.testing.assert_equal(found["seconds_train"].tolist(), rows)
    with h5py.File(tmp_path / "log.h5") as file:
        column = file["ranks/seconds_waiting"]
        assert [axis.label for axis in column.dims] == ["round", "rank"] and column.attrs[
            "unit"
        ] == "seconds"
        assert [axis.label for axis in file["ranks/ranks"].dims] == ["round"] and column.fletcher32


def test_a_log_of_before_ranks_were_measured_goes_on(tmp_path):
    log = create_log(tmp_path)
    append_round(log, 1)
    log.close()
    with h5py.File(tmp_path / "log.h5", "r+") as file:
        del file["ranks"]
    assert RunFiles(tmp_path).ranks() == {} and open_run(tmp_path).ranks.empty
    log = Log.reopen(tmp_path / "log.h5")
    log.append(2, ROW, SCORES, {"train": np.array([4.0])})
    log.close()
    assert open_run(tmp_path).ranks.to_dict("list") == {
        "round": [2],
        "rank": [0],
        "seconds_train": [4.0],
    }


SELDOM = "evaluate.every=2"


@pytest.fixture(
    scope="module", params=["simulated", pytest.param("mpirun", marks=pytest.mark.thorough)]
)
def on_three(request, tmp_path_factory):
    """A run on 3 ranks, evaluated every second round."""
    home = tmp_path_factory.mktemp("ranks")
    if request.param == "simulated":
        return create_run(3, home / "run", SELDOM)
    done = run_process([*mpirun_command(3), *command_line("run", TINY, "output=run", SELDOM)], home)
    assert done.returncode == 0, done.stderr
    return home / "run"


def test_all_ranks_stop_where_one_is_asked_to():
    def main(comm):
        parts = build(tiny_config("rounds=1"), str(TINY), comm)
        state = initial_state(parts)
        return run_round(parts.federation, state, evaluate=False, stop=comm.rank == 2)[1]["stop"]

    assert run_on_ranks(3, main) == [True] * 3


def test_what_ranks_tell_of_their_seconds_moves_no_number(on_three, trained):
    assert_same_run(on_three, trained(SELDOM))


def test_every_rank_tells_all_its_seconds_by_stage(on_three):
    run = open_run(on_three)
    table = run.ranks.set_index(["round", "rank"])
    assert list(table.index) == [(t, rank) for t in (2, 4) for rank in range(3)]
    assert list(table.columns) == [f"seconds_{stage}" for stage in clock.STAGES]
    assert (table >= 0).all(axis=None)
    server, workers = table.xs(0, level="rank"), table.drop(index=0, level="rank")
    assert (workers["seconds_train"] > 5 * server["seconds_train"].max()).all(), (
        "the server hosts nobody"
    )
    assert (server["seconds_waiting"] > server["seconds_train"]).all()
    # they meet in every round, so they have passed the same time
    told = table.sum(axis=1).unstack("rank").loc[4]
    assert told.max() - told.min() < 0.5 * told.max()
    passed = run.rounds[["seconds_train", "seconds_exchange", "seconds_evaluate"]].sum(axis=1)
    assert told[0] > 0.9 * passed.loc[[3, 4]].sum() - passed.loc[4] * 0.5
    assert run.array("ranks/seconds_train").shape == (4, 3) and run.array(
        "ranks/ranks"
    ).tolist() == [0, 3, 0, 3]


def test_scores_that_travel_with_the_seconds_are_whole_numbers_of_samples(on_three):
    run = open_run(on_three)
    sizes = np.array([len(rows) for rows in run.partition.test])
    for score in ("accuracy", "accuracy_aggregated", "accuracy_trained"):
        right = run.array(f"clients/{score}")[[1, 3]] * sizes
        assert np.isfinite(right).any() and np.nanmax(np.abs(right - right.round())) < 1e-4, score


def test_one_process_never_waits(trained):
    table = open_run(trained(SELDOM)).ranks
    assert table["rank"].tolist() == [0, 0] and (table["seconds_waiting"] == 0).all()
    assert (table["seconds_train"] > 0).all()


# --- as a load

EVERY = {"evaluate": {"every": 2}}
TWO = {
    "ranks": np.array([0, 3, 3, 2]),  # rounds 2 and 3 and, on fewer ranks, 4 were measured
    "seconds_train": np.array([[nan] * 3, [0, 4, 8], [0, 3, 1], [0, 5, nan]]),
    "seconds_evaluate": np.array([[nan] * 3, [0, 2, 0], [0, 1, 0], [0, 5, nan]]),
    "seconds_waiting": np.array([[nan] * 3, [8, 2, 0], [4, 0, 3], [10, 0, nan]]),
}


def test_a_load_is_seconds_per_round_and_the_share_of_time_that_workers_are_busy():
    found = loads.measure_load(TWO, EVERY)
    # the third rank was there for 3 rounds
    assert found.seconds["train"].tolist() == [0, 12 / 4, 9 / 3]
    assert found.seconds["waiting"].tolist() == [22 / 4, 2 / 4, 3 / 3]
    assert found.balance == (7 + 2.5) / (8 + 4)  # of the rounds with two workers: mean by longest
    assert loads.measure_load(TWO, EVERY | {"server_hosts_clients": True}).balance == pytest.approx(
        (14 / 3 + 5 / 3 + 5) / 22
    )
    last = loads.measure_load(TWO, EVERY, slice(-1, None))
    assert last.seconds["train"].tolist() == [0, 5] and np.isnan(last.balance)
    assert (
        loads.measure_load({}, EVERY) is None
        and loads.measure_load(TWO, EVERY, slice(0, 1)) is None
    )


def test_the_page_has_a_bar_for_each_rank_and_stage(tmp_path):
    folder = write_run(tmp_path / "a", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    alone = read_groups(folder).groups
    assert (
        page.seconds_by_rank(alone, assign_looks(alone)) is None
        and "balance" not in tables.time_table(alone).csv()
    )
    measured = {name: column[1:3] for name, column in TWO.items()}
    (group,) = alone
    run = RunLog(
        folder,
        group.runs[0].config | EVERY,
        group.runs[0].rounds,
        group.runs[0].clients,
        {},
        measured,
    )
    groups = [type(group)(group.label, {}, (run,))]
    with plot_style():
        drawn = page.seconds_by_rank(groups, assign_looks(groups))
    bars = [bar.get_height() for bar in drawn.figure.axes[0].patches]
    # train, evaluate and waiting of three ranks over two rounds
    assert bars == [0, 3.5, 4.5, 0, 1.5, 0, 6, 1, 1.5]
    assert drawn.figure.axes[0].get_title("left") == "FedAvg, 79% balanced"
    median, slowest = table_rows(tables.time_table(groups))
    assert (median["of"], slowest["of"]) == ("median of 2 workers", "slowest worker")
    # not of rank 0, which waits 6 seconds: of the mean of two workers, and of the busier one
    stages = ("seconds_train", "seconds_evaluate", "seconds_waiting")
    assert [float(median[stage]) for stage in stages] == [4, 0.75, 1.25]
    assert [float(slowest[stage]) for stage in stages] == [3.5, 1.5, 1]
    assert float(median["balance"]) == 9.5 / 12
    with plot_style():
        axes = page.seconds_by_stage(groups, assign_looks(groups)).figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [4, 0.75, 1.25, 3.5, 1.5, 1]
    assert [text.get_text() for text in axes.texts] == [
        "median of 2 workers: 4.75 s busy",
        "slowest: 5 s busy",
    ]


@pytest.mark.parametrize(
    "hosts, seconds, workers, median, slowest",
    [
        (0, [9, 1, 5, 2], 4, 3.5, 9),  # the server hosts clients too: all ranks are workers
        (1, [9, 1, 5, 2], 3, 2, 5),
        (1, [9, 4], 1, 4, 4),
    ],
)
def test_the_median_worker_is_in_the_middle(hosts, seconds, workers, median, slowest):
    load = loads.RankLoad(
        {"train": np.array(seconds), "evaluate": np.zeros(len(seconds))}, nan, hosts
    )
    found = load.worker_seconds()
    assert (found.workers, found.median["train"], found.slowest["train"]) == (
        workers,
        median,
        slowest,
    )


def test_the_only_process_is_its_own_worker():
    one = {
        "ranks": np.array([1]),
        "seconds_train": np.array([[3.0]]),
        "seconds_evaluate": np.array([[1.0]]),
    }
    assert loads.measure_load(one, {}).worker_seconds() == (
        1,
        {"train": 3, "evaluate": 1},
        {"train": 3, "evaluate": 1},
    )
