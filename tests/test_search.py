"""A search with Optuna: its trials, seeds and values, what it gives up, and how it goes on."""

import json

import numpy as np
import pytest
from folders import write_run
from runs import TINY

from fedlora_mpi import open_run
from fedlora_mpi.sweeps import grid
from fedlora_mpi.sweeps.axes import Axis, Interval
from fedlora_mpi.sweeps.metric import COLUMNS, metric_direction
from fedlora_mpi.sweeps.search import (
    Search,
    SearchSettings,
    corner_values,
    split_space,
)

optuna = pytest.importorskip("optuna")
PLACE = grid.Place(grid.Path("s"), names_runs=False)
LR = Interval("train.lr", 0.01, 1.0, is_log=True)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def searching(*axes, trials=4, plain=("rounds=1",), **settings):
    space = split_space(axes or [LR])
    return Search(SearchSettings("random", trials, **settings), space, str(TINY), plain, PLACE)


def study_states(search):
    return [trial.state.name for trial in search.study.trials]


def written(job, *accuracies, rounds=1):
    """The log of a run of the search, made by hand."""
    write_run(job.folder, *([a, a, a] for a in accuracies), rounds=rounds)


# --- what is searched


def test_seeds_are_repeated_and_the_rest_is_searched():
    space = split_space([LR, Axis("seed", ("1", "2")), Axis("data.partition.seed", ("3", "4"))])
    assert space.axes == (LR,)
    assert space.seeds[1] == {"seed": "1", "data.partition.seed": "4"} and len(space.seeds) == 4


def test_ends_and_choices_are_checked_one_axis_at_a_time():
    space = split_space([LR, Axis("algorithm", ("fedavg", "local", "fedper"))])
    assert [[*values.values()] for values in corner_values(space)] == [
        ["0.01", "fedavg"], ["1", "fedavg"], ["0.01", "local"], ["0.01", "fedper"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "metric, direction",
    [
        ("accuracy_worst", "maximize"),
        ("train_loss", "minimize"),
        *((name, "maximize") for name in ("top1", "top5", "auc", "macro_f1")),
        *((name, "minimize") for name in ("loss", "mse", "mae")),
    ],
)
def test_the_direction_follows_from_the_metric(metric, direction):
    assert metric_direction(metric) == direction


@pytest.mark.parametrize(
    "overrides, reason",
    [
        (
            ["model.loss=mse", "evaluate.metrics=[mse]"],
            "--metric = accuracy: is NaN with model.loss = mse, which has no classes; choose "
            "--metric loss or mse",
        ),
        (
            ["--metric", "rmse", "--direction", "minimize"],
            "--metric = rmse: the log will have no such column; there are train_loss, accuracy, ",
        ),
        (
            ["--metric", "auc", "evaluate.metrics=[top1]"],
            "--metric = auc: the log will have no such column; add it to evaluate.metrics: [top1, "
            "auc]",
        ),
    ],
)
def test_a_metric_that_no_log_will_have_is_refused_before_a_run(call, tmp_path, overrides, reason):
    search = ("train.lr=interval(0.01,0.1)", "--sampler", "tpe", "--trials", "2")
    code, out, err = call("sweep", TINY, *search, *overrides)
    assert (code, out) == (2, "") and err.count("\n") == 1 and reason in err
    assert not [*tmp_path.iterdir()]


def test_an_accuracy_that_is_nan_ends_the_search():
    search = searching()
    job = search.next_job()
    write_run(job.folder, [np.nan] * 3, extra_column="loss")
    with pytest.raises(ValueError, match="--metric = accuracy: is NaN in s/.*; choose --metric lo"):
        search.end(job, 0)


def test_the_columns_of_every_log_are_known(call):
    assert call("run", TINY, "rounds=1", "output=run", "algorithm=fedavg")[0] == 0
    assert {*open_run("run").rounds.columns} - {"round"} == {*COLUMNS}


def test_drawn_values_lie_in_their_axes():
    axes = [LR, Interval("train.epochs", 1, 3), Axis("seed.x", ("0.1", "0.3"), is_range=True)]
    search = searching(*axes[:2])
    for _ in range(4):
        values = search.next_job().values
        assert 0.01 <= float(values["train.lr"]) <= 1 and values["train.epochs"] in "123"


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--trials", "3"], "--trials: is for a search; add --sampler tpe"),
        (["--sampler", "tpe"], "--sampler: needs the number of trials; add --trials N"),
        (["--sampler", "tpe", "--trials", "0"], "--trials = 0: must be an integer of at least 1"),
        (["--sampler", "tpe", "--trials", "3", "--print-jobs"], "start it without --print-jobs"),
        (["--sampler", "tpe", "--trials", "3", "--slurm"], "start it without --slurm"),
        (
            ["--sampler", "tpe", "--trials", "3", "--metric", "best"],
            "--metric = best: give --direction maximize or minimize",
        ),
        (["--sampler", "tpe", "--trials", "3", "seed=interval(1,3)"], "a seed is not searched"),
        (
            ["--sampler", "tpe", "--trials", "3", "train.lr=interval(-1,1)"],
            "lr=-1: command line: train.lr = -1.0: must be a number above 0",
        ),
    ],
)
def test_a_mistake_is_one_line(call, tmp_path, arguments, reason):
    arguments = arguments if "interval" in arguments[-1] else [*arguments, "train.lr=interval(1,2)"]
    code, out, err = call("sweep", TINY, *arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1 and reason in err
    assert not [*tmp_path.iterdir()]


def test_seeds_alone_are_no_search(call):
    code, _, err = call("sweep", TINY, "seed=1,2", "--sampler", "tpe", "--trials", "3")
    assert code == 2 and "a search needs a key beside the seeds" in err


# --- trials


def test_the_value_of_a_trial_is_the_mean_over_its_seeds():
    search = searching(LR, Axis("seed", ("1", "2")), trials=1)
    for accuracy, state in ((0.2, "RUNNING"), (0.6, "COMPLETE")):
        job = search.next_job()
        written(job, accuracy)
        assert search.end(job, 0) == "done" and study_states(search) == [state]
    assert search.study.best_value == pytest.approx(0.4)
    assert search.next_job() is None and search.is_done and search.num_runs == 2
    assert search.best_line().startswith("best accuracy 0.4 of trial 1: lr=")


def test_a_run_below_the_median_is_given_up_between_rounds():
    search = searching(plain=["rounds=5"])
    for _ in range(5):
        search.study.add_trial(
            optuna.trial.create_trial(
                value=0.9,
                params={"train.lr": 0.1},
                distributions={"train.lr": optuna.distributions.FloatDistribution(0.01, 1, True)},
                intermediate_values={1: 0.9, 2: 0.9},
            )
        )
    good, bad = search.next_job(), search.next_job()
    written(good, 0.95, rounds=5)
    written(bad, 0.3, rounds=5)
    assert search.jobs_to_stop([good, bad]) == [bad]
    assert search.jobs_to_stop([good, bad]) == []  # looks again a second later
    assert search.end(bad, 75) == "pruned" and search.end(good, 75) == "stopped"
    assert study_states(search)[5:] == ["RUNNING", "PRUNED"]


def test_without_a_pruner_no_run_is_given_up():
    search = searching(plain=["rounds=5"], pruner="none")
    assert isinstance(search.study.pruner, optuna.pruners.NopPruner)


def test_a_trial_that_was_cut_short_is_asked_for_again_with_its_values():
    stopped = searching()
    first, second = stopped.next_job(), stopped.next_job()
    written(first, 0.5)
    stopped.end(first, 0)
    stopped.end(second, 75)
    again = searching()
    assert again.next_job().values == second.values
    names = {again.next_job().name for _ in range(2)}
    assert again.next_job() is None  # four trials in all
    assert not names & {first.name, second.name}
    assert again.earlier_states == {first.name: "done"} and again.num_runs == 4


def test_equal_values_are_trained_once_and_count_for_each_trial():
    search = searching(Axis("algorithm", ("fedavg",)), trials=3)
    job = search.next_job()
    assert search.next_job() is None
    written(job, 0.5)
    search.end(job, 0)
    assert study_states(search) == ["COMPLETE"] * 3 and search.is_done


def test_a_run_that_fails_is_no_finished_trial():
    search = searching(trials=1)
    assert search.end(search.next_job(), 1) == "failed"
    assert study_states(search) == ["FAIL"] and not search.is_done and not search.best_line()


def test_a_metric_that_the_log_does_not_have_is_named():
    search = searching(metric="accurcy", direction="maximize")
    job = search.next_job()
    written(job, 0.5)
    with pytest.raises(ValueError, match="accurcy: the log has no such column; it has accuracy, "):
        search.end(job, 0)


def test_a_folder_with_another_search_is_refused():
    searching()
    with pytest.raises(ValueError, match="study.log: is a search to maximize accuracy; choose"):
        searching(metric="loss")


def test_a_search_trains_its_trials_and_then_more_of_them(call, in_process):
    ask = ("sweep", TINY, "train.lr=tag(log, interval(0.01,0.1))", "rounds=1", "output=s")
    ask += ("--sampler", "tpe", "--jobs", "1")
    code, out, _ = call(*ask, "--trials", "1")
    assert code == 0 and out.startswith("s: 1 done\ns: best accuracy 0.")
    code, out, err = call(*ask, "--trials", "2")
    assert code == 0 and out.startswith("s: 2 done\n") and "s: 1 done, 1 waiting" in err
    assert len(in_process) == 2
    assert len(json.loads(grid.Path("s/sweep.json").read_text())["runs"]) == 2
    assert call("report", "s")[0] == 0
