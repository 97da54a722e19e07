"""``reproduce``: the paper's numbers, the runs of each table, what is run and what not, and the
comparison.
"""

import csv
import io
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import wait_until
from small import SIZES, make_experiment

from fedlora_mpi import config as configs
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.fedlora import FedLoRA
from fedlora_mpi.algorithms.local import Local
from fedlora_mpi.cli import main
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.reproduce import carry, order, paper, picture, sheet, showing
from fedlora_mpi.reproduce.carrying_out import reproduce_grid
from fedlora_mpi.reproduce.fedlora_tables import (
    DATASETS,
    FULL_SCALE,
    SMALL_SCALE,
    TABLES,
    DirichletCase,
)
from fedlora_mpi.reproduce.grid import Entry, Job, make_job
from fedlora_mpi.reproduce.paper import Accuracy
from fedlora_mpi.reproduce.registry import table_entries
from fedlora_mpi.reproduce.request import Request
from fedlora_mpi.reproduce.results import Result, ResultStore, check_folder

# The paper.


@pytest.mark.parametrize(
    "found, printed",
    [
        (paper.TABLE1["fedlora"]["cifar10"][0], (85.47, 2.06)),
        (paper.TABLE1["pfedgate"]["cifar100"][2], (22.98, 0.03)),
        (paper.TABLE1["fedrod"]["tiny_imagenet"][0], (44.25, 0.40)),
        (paper.TABLE1["local"]["cifar10"][1], (60.15, 0.86)),
        # R_l 100 %, R_c 20 %: sensitive to R_l
        (paper.TABLE2["tiny_imagenet"][4][0], (33.90, 0.91)),
        (paper.TABLE3["simultaneous"]["tiny_imagenet"], (19.61, 0.58)),
        (paper.TABLE4["fedavg_lora"]["cifar100"], (35.91, 0.70)),
        (paper.TABLE5[0.5]["cifar10"], (85.36, 1.67)),
    ],
)
def test_a_published_number_is_the_printed_one(found, printed):
    assert found == Accuracy(*printed)


def test_every_table_is_complete():
    assert len(paper.TABLE1) == 11
    for table in (paper.TABLE1, paper.TABLE3, paper.TABLE5):
        assert all(tuple(row) == DATASETS for row in table.values())
    assert all(
        len(values) == len(paper.ALPHAS) for row in paper.TABLE1.values() for values in row.values()
    )
    assert all([len(row) for row in paper.TABLE2[data]] == [5] * 5 for data in DATASETS)
    assert all(tuple(row) == DATASETS[:2] for row in paper.TABLE4.values())


def test_the_tables_agree_where_they_print_the_same_experiment():
    for data, (r_l, r_c) in zip(DATASETS, ((60, 60), (40, 80), (40, 80)), strict=True):
        best = paper.TABLE2[data][paper.RATIOS.index(r_l)][paper.RATIOS.index(r_c)]
        assert best == max(v for row in paper.TABLE2[data] for v in row)
        assert (
            best
            == paper.TABLE1["fedlora"][data][0]
            == paper.TABLE3["alternating"][data]
            == paper.TABLE5[1.0][data]
        )
    for data in DATASETS[:2]:
        assert all(
            paper.TABLE4[name][data] == paper.TABLE1[name][data][0] for name in ("local", "fedavg")
        )


# The grid.

COUNT = {
    "table1": 11,
    "table2": 25,
    "table3": 2,
    "table4": 4,
    "table5": 4,
    "fig4": 6,
    "fig6": 2,
    "fig7": 3,
}
AT, SYNTHETIC = DirichletCase("cifar10", 0.1), DirichletCase("synthetic", 1.0)
HOW = {"scale": FULL_SCALE, "rounds": 300, "root": "data", "folder": Path("/out/table")}


def cell(table, key, data="cifar10", alpha=0.1):
    """One entry of a table at full scale."""
    return next(
        entry
        for entry in table_entries(table, DirichletCase(data, alpha), FULL_SCALE)
        if entry.key == key
    )


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("data", DATASETS)
def test_a_table_needs_the_runs_of_its_cells_each_with_a_valid_config(table, data, tmp_path):
    found = table_entries(table, DirichletCase(data, 0.1), FULL_SCALE)
    assert len({entry.key for entry in found}) == len(found) == COUNT[table]
    for entry in found:
        run = make_job(entry, DirichletCase(data, 0.1), 3, **HOW)
        (tmp_path / "alone.yaml").write_text(configs.resolved_yaml(run.config))
        assert configs.read(tmp_path / "alone.yaml") == run.config


@pytest.mark.parametrize("table", COUNT)
def test_every_cell_of_a_table_has_a_published_number_and_no_figure_has(table):
    for data in DATASETS[: 2 if table == "table4" else 3]:
        said = [
            entry.published is not None
            for entry in table_entries(table, DirichletCase(data, 0.1), FULL_SCALE)
        ]
        assert all(said) if table.startswith("table") else not any(said)
    assert not any(
        e.published for e in table_entries(table, DirichletCase("cifar10", 0.3), FULL_SCALE)
    )


def test_a_run_at_full_scale_is_the_papers_experiment():
    run = make_job(cell("table1", "fedlora"), DirichletCase("cifar10", 0.5), 2, **HOW).config
    assert (run.seed, run.data.partition.seed, run.rounds, run.participation) == (2, 2, 300, 1.0)
    split = run.data.partition
    assert (split.clients, split.train, split.test, split.alpha, split.overlap) == (
        40,
        500,
        100,
        0.5,
        True,
    )
    assert (run.train.epochs, run.train.batch_size, run.train.lr, run.train.momentum) == (
        5,
        100,
        0.1,
        0.9,
    )
    assert run.algorithm == FedLoRA(0.6, 4, "official", "official", lora_epochs=2)
    assert run.output == "/out/table/cifar10-alpha0.5/fedlora-seed2"


@pytest.mark.parametrize(
    "data, network, ranks",
    [*zip(DATASETS, ("resnet8", "resnet10", "resnet10"), (4, 40, 80), strict=True)],
)
def test_network_and_ranks_follow_the_data_set(data, network, ranks):
    run = make_job(cell("table1", "fedlora", data), DirichletCase(data, 0.1), 1, **HOW).config
    assert (run.model.mix[0].name, run.algorithm.linear_rank) == (network, ranks)


def test_the_settings_that_a_table_varies():
    def config(table, key):
        return make_job(cell(table, key), AT, 1, **HOW).config

    varied = config("table2", "Rl20-Rc100").algorithm
    assert (varied.rank_rule, varied.linear_rank, varied.conv_rank) == ("paper", 0.2, 1.0)
    assert config("table3", "simultaneous").algorithm.order == "simultaneous"
    assert config("table5", "participation70").participation == 0.7
    assert config("table5", "participation70").algorithm.absent == "stale"
    assert config("fig4", "lora_epochs5").algorithm.lora_epochs == 5


@pytest.mark.parametrize("scale", [FULL_SCALE, SMALL_SCALE])
def test_table_1_has_the_published_fedamp_and_the_fedrod_of_fedloras_authors(scale):
    blocks = {e.key: dict(e.algorithm) for e in table_entries("table1", AT, scale)}
    assert blocks["fedamp"].pop("decay_every") == (30 if scale is FULL_SCALE else 2)
    assert blocks["fedamp"] == {"name": "fedamp", "convex": False}
    assert blocks["fedrod"] == {"name": "fedrod", "personal_trains_body": True}


def test_schedules_in_rounds_shrink_with_the_scale():
    beta = {
        scale: next(e for e in table_entries("table1", AT, scale) if e.key == "fedcac")
        for scale in (FULL_SCALE, SMALL_SCALE)
    }
    ratio = beta[SMALL_SCALE].algorithm["beta"] / beta[FULL_SCALE].algorithm["beta"]
    assert ratio == pytest.approx(SMALL_SCALE.rounds / FULL_SCALE.rounds)


def test_methods_are_rows_and_for_table_1_any_algorithm():
    named = table_entries("table1", AT, FULL_SCALE, ["fedlora", "local_lora", "fedavg"])
    assert [(e.key, e.published is None) for e in named] == [
        ("fedavg", False),
        ("fedlora", False),
        ("local_lora", True),
    ]
    with pytest.raises(
        ValueError, match="--methods = alternate: table3 has .* Did you mean alternating?"
    ):
        table_entries("table3", AT, FULL_SCALE, ["alternate"])


# What is run. Tiny runs on synthetic data, in this process.


def tiny(folder, key="fedavg", seed=1, rounds=2, **more):
    """A run that takes a tenth of a second; its config is written beside it."""
    mapping = {
        "seed": seed,
        "rounds": rounds,
        "output": str(folder / "synthetic-alpha1" / f"{key}-seed{seed}"),
        "data": {
            "dataset": "synthetic",
            "synthetic": {"classes": 3, "train": 60, "test": 30, "size": 4},
            "partition": {"kind": "iid", "clients": 3, "train": 10, "test": 5, "seed": seed},
        },
        "model": {"name": "cnn", "width": 3, "hidden": 5},
        "algorithm": key,
        "train": {"epochs": 1, "batch_size": 5, "lr": 0.05},
        "checkpoint": {"every": 1},
    } | more
    made = Job(
        Entry(key, key, {"name": key}, Accuracy(50.0, 1.0)),
        SYNTHETIC,
        seed,
        configs.from_dict(mapping, "tiny.yaml"),
    )
    made.folder.parent.mkdir(parents=True, exist_ok=True)
    made.sibling_path(".yaml").write_text(configs.resolved_yaml(made.config))
    return made


def carried_out(made):
    """The run's task done in this process."""
    (task,) = carry.make_tasks([made], 1)
    assert main(list(task.command[3:])) == 0


def test_a_run_is_started_then_gone_on_with_then_skipped(tmp_path, capsys):
    made = tiny(tmp_path / "table1", rounds=2)
    assert ResultStore(tmp_path).find_finished(made) is None
    assert main(["run", str(made.sibling_path(".yaml")), "rounds=1"]) == 0  # as if interrupted
    assert ResultStore(tmp_path).find_finished(made) is None
    carried_out(made)
    assert f"resuming {made.folder} after round 1" in capsys.readouterr().err
    assert ResultStore(tmp_path).find_finished(made) == made.folder
    result = ResultStore(tmp_path).result(made)
    assert result.rounds["round"].tolist() == [1, 2]
    assert (
        result.best == 100 * result.rounds["accuracy"].max()
        and result.last == 100 * result.rounds["accuracy"][1]
    )


def test_more_rounds_go_on_with_a_finished_run_and_fewer_are_read_from_it(tmp_path, capsys):
    carried_out(tiny(tmp_path / "table1", rounds=2))
    assert ResultStore(tmp_path).result(tiny(tmp_path / "table1", rounds=1)).rounds[
        "round"
    ].tolist() == [1]
    more = tiny(tmp_path / "table1", rounds=3)
    assert ResultStore(tmp_path).find_finished(more) is None
    carried_out(more)
    assert f"resuming {more.folder} after round 2" in capsys.readouterr().err


def test_a_run_that_another_table_has_finished_is_not_run_again(tmp_path):
    done, same = tiny(tmp_path / "table1"), tiny(tmp_path / "table4")
    carried_out(done)
    assert ResultStore(tmp_path).find_finished(same) == done.folder
    assert ResultStore(tmp_path).find_finished(tiny(tmp_path / "table4", seed=2)) is None


def test_a_folder_with_other_settings_is_refused(tmp_path):
    made = tiny(tmp_path)
    carried_out(made)
    check_folder(made)
    check_folder(tiny(tmp_path, rounds=7))
    other = tiny(tmp_path, train={"epochs": 1, "batch_size": 5, "lr": 0.1})
    with pytest.raises(
        ValueError, match=r"holds a run with train.lr = 0.05 \(now 0.1\); choose another folder"
    ):
        check_folder(other)


def python(tmp_path, name, text):
    return carry.Task(name, [sys.executable, "-c", text], tmp_path / f"{name}.log")


def test_a_failure_stops_no_other_run_and_leaves_its_output(tmp_path):
    todo = [
        python(tmp_path, "bad", "print('too hot'); exit(3)"),
        python(tmp_path, "good", "print('fine')"),
    ]
    said = []
    assert carry.run_tasks(todo, 1, said.append) == {"bad": 3}
    assert (tmp_path / "bad.log").read_text() == "too hot\n" and (
        tmp_path / "good.log"
    ).read_text() == "fine\n"
    assert said[0].startswith("[1/2] bad: exit code 3, see ") and said[1].startswith(
        "[2/2] good: done"
    )


def test_runs_go_side_by_side_each_with_its_gpu(tmp_path):
    text = f"""
import os, pathlib, sys, time
pathlib.Path({str(tmp_path)!r}, sys.argv[1]).touch()
while not pathlib.Path({str(tmp_path)!r}, sys.argv[2]).exists():
    time.sleep(0.01)  # the other has to begin before this one ends
print(os.environ["CUDA_VISIBLE_DEVICES"])
"""
    todo = [python(tmp_path, name, text) for name in "ab"]
    todo = [
        task._replace(command=[*task.command, *names])
        for task, names in zip(todo, ("ab", "ba"), strict=True)
    ]
    assert carry.run_tasks(todo, 2, print, ["3", "5"]) == {}
    assert [(tmp_path / f"{name}.log").read_text().strip() for name in "ab"] == ["3", "5"]


def test_an_interruption_ends_the_runs(tmp_path):
    text = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"

    def interrupted(line):
        wait_until(lambda: (tmp_path / "long.log").read_text().endswith("\n"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry.run_tasks(
            [python(tmp_path, "long", text), python(tmp_path, "short", "")], 2, interrupted
        )
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "long.log").read_text()), 0)


def test_a_line_for_the_shell_starts_a_run_and_then_goes_on_with_it(tmp_path):
    made = tiny(tmp_path)
    (line,) = carry.shell_lines([made], 1)
    assert line.startswith("exec ") and line.endswith(f" run --resume {made.sibling_path('.yaml')}")
    script = carry.array_script("fedlora-table1", 7, 3, Path("/out/jobs.txt"), Path("/out"))
    assert (
        "#SBATCH --array=1-7\n" in script and " --ntasks=3 " in script and "/out/jobs.txt" in script
    )


# The whole command, up to the runs themselves.


def test_print_jobs_writes_configs_and_runs_nothing(tmp_path, capsys):
    asked = ["reproduce", "table3", "--print-jobs", "--seeds", "1", "2", "-o", str(tmp_path)]
    assert main(asked) == 0
    printed = capsys.readouterr().out
    home = tmp_path / "table3"
    assert printed.count("\nexec ") + printed.startswith("exec ") == 4 and "--array=1-4" in printed
    assert (home / "jobs.txt").read_text().count("\n") == 4 and (home / "array.sbatch").is_file()
    written = sorted(path.name for path in (home / "cifar10-alpha0.1").iterdir())
    assert written == [
        f"{order}-seed{seed}.yaml" for order in ("alternating", "simultaneous") for seed in (1, 2)
    ]


@pytest.mark.parametrize("table", TABLES)
def test_collect_prints_a_table_before_anything_is_done(table, tmp_path, capsys):
    assert main(["reproduce", table, "--collect", "-o", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "NOT the paper's experiment: clients 10 (paper 40)" in printed
    assert {path.suffix for path in (tmp_path / table).iterdir()} == {".txt", ".md", ".csv"}


def test_missing_data_is_one_message_before_any_run(tmp_path, capsys):
    assert main(["reproduce", "table3", "--root", str(tmp_path / "none"), "-o", str(tmp_path)]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert not list(tmp_path.glob("table3/*/*.log"))


def test_a_failed_run_is_reported_with_its_log_and_the_table_is_printed(tmp_path, capsys):
    hot = {"epochs": 1, "batch_size": 5, "lr": 1e30}
    runs = [tiny(tmp_path / "table1"), tiny(tmp_path / "table1", key="local", train=hot)]
    carried_out(runs[0])
    asked = Request("table1", output=tmp_path, jobs=2)
    assert reproduce_grid(asked, [(SYNTHETIC, runs)]) == 1
    out, err = capsys.readouterr()
    assert (
        "local-seed1: failed with exit code 1: " in err
        and "is not finite" in err
        and "local-seed1.log" in err
    )
    assert "fedavg    1/1" in out and "local     0/1" in out
    assert reproduce_grid(replace(asked, collect=True), [(SYNTHETIC, runs)]) == 0


# The comparison.


def result(
    key, seed, accuracies, clients=((90.0, 70.0, 80.0),), drift=(0.0,), published=None, **block
):
    """A finished run with the given percentages."""
    entry = Entry(key, key, {"name": "fedlora", **block}, published)
    columns = {
        "round": np.arange(1, len(accuracies) + 1),
        "accuracy": np.array(accuracies) / 100,
        "drift": np.array(drift),
    }
    return Result(Job(entry, AT, seed, None), columns, {"accuracy": np.array(clients) / 100})


def test_mean_deviation_and_difference_are_of_the_best_round_of_each_seed():
    runs = [
        result("a", seed, series, published=Accuracy(60.0, 1.0))
        for seed, series in enumerate(([50, 62, 58], [64, 60, 59], [66, 64, 60]))
    ]
    found = sheet.Cell.from_results(runs[0].job.entry, runs)
    assert found.best == pytest.approx((64.0, 2.0)) and found.last == pytest.approx((59.0, 1.0))
    made = sheet.comparison_sheet("Title", "", ["note"], [found], 3)
    assert made.rows[1] == ("a", "3/3", "64.00 ± 2.00", "59.00 ± 1.00", "60.00 ± 1.00", "+4.00")
    assert "a    3/3  64.00 ± 2.00  59.00 ± 1.00  60.00 ± 1.00       +4.00\n" in made.text()
    assert "| a | 3/3 | 64.00 ± 2.00 | 59.00 ± 1.00 | 60.00 ± 1.00 | +4.00 |\n" in made.markdown()
    (row,) = csv.DictReader(io.StringIO(made.csv()))
    assert float(row["best_std"]) == pytest.approx(2.0) and float(
        row["difference"]
    ) == pytest.approx(4.0)


def test_one_seed_has_no_deviation_and_a_missing_run_no_number():
    one, none = result("a", 1, [50.0]), result("b", 1, [0.0], published=Accuracy(60.0, 1.0))
    made = sheet.comparison_sheet(
        "Title",
        "Beware",
        [],
        [
            sheet.Cell.from_results(one.job.entry, [one]),
            sheet.Cell.from_results(none.job.entry, []),
        ],
        1,
    )
    assert made.rows[1:] == [
        ("a", "1/1", "50.00", "50.00", "-", "-"),
        ("b", "0/1", "-", "-", "60.00 ± 1.00", "-"),
    ]
    assert made.text().splitlines()[:2] == ["Title", "Beware"]
    assert [row["difference"] for row in csv.DictReader(io.StringIO(made.csv()))] == ["", ""]


@pytest.mark.parametrize(
    "ours, rho",
    [((1, 2, 3, 4, 5), "+1.00"), ((5, 4, 3, 2, 1), "-1.00"), ((2, 1, 3, 4, 5), "+0.90")],
)
def test_the_order_of_the_methods_is_compared_with_the_papers(ours, rho):
    runs = [
        result(f"m{n}", 1, [value], published=Accuracy(10.0 * n, 1.0))
        for n, value in enumerate(ours)
    ]
    made = sheet.comparison_sheet(
        "Title", "", [], [sheet.Cell.from_results(run.job.entry, [run]) for run in runs], 1
    )
    assert f"rank correlation {rho} (Spearman" in made.notes[-1]


def test_the_interval_of_the_order_is_wide_where_seeds_disagree():
    means, stds = np.arange(5.0) * 10, np.zeros(5)
    ours = np.stack([means, means + 1, means - 1], 1)
    assert order.bootstrap_interval(ours, means, stds) == pytest.approx((1.0, 1.0))
    turned = np.stack([means, -means, means], 1)
    assert order.bootstrap_interval(turned, means, stds) == pytest.approx((-1.0, 1.0))
    low, high = order.bootstrap_interval(ours, means, stds + 30)  # the paper's numbers are unsure
    assert low < 0.9 < high


def test_the_interval_of_the_order_is_that_of_seeds_that_all_entries_have():
    found = {}
    for n in range(4):
        for seed in (1, 2):
            run = result(f"m{n}", seed, [n + seed], published=Accuracy(10.0 * n, 0.0))
            found.setdefault(n, []).append(run)
    cells = [sheet.Cell.from_results(runs[0].job.entry, runs) for runs in found.values()]
    (note,) = order.order_notes(cells)
    assert "95 % interval +1.00 to +1.00 (bootstrap over our 2 seeds" in note
    found[0].pop()
    cells[0] = sheet.Cell.from_results(found[0][0].job.entry, found[0])
    (note,) = order.order_notes(cells)
    assert "interval" not in note


def test_the_medium_scale_is_table_1s_alone(capsys):
    assert Request("table1", scale="medium").run_seeds == (1, 2, 3)
    (case,) = Request("table1", scale="medium").cases
    assert case.scale_sizes("medium")[:2] == (20, 100)
    with pytest.raises(ValueError, match="--scale = medium: only table1 has it"):
        Request("table2", scale="medium")


def test_table_2_has_its_columns_for_the_convolutions_and_marks_the_best():
    runs = [
        result(
            f"{r_l}{r_c}",
            1,
            [80 + 10 * r_l + r_c],
            published=Accuracy(80.0, 1.0),
            linear_rank=r_l,
            conv_rank=r_c,
        )
        for r_l in (0.2, 0.6)
        for r_c in (0.4, 0.8, 1.0)
    ]
    cells = [sheet.Cell.from_results(run.job.entry, [run]) for run in runs]
    made = sheet.lora_rank_sheet("Title", "", [], cells, 1)
    assert made.rows[0] == ("R_l \\ R_c", "40%", "80%", "100%")
    assert made.rows[1] == ("20%", "82.40 (+2.40)", "82.80 (+2.80)", "83.00 (+3.00)")
    assert made.rows[2][3] == "87.00 (+7.00)*"
    assert picture.lora_rank_heatmap(cells, "Title").axes[0].images[0].get_array().shape == (2, 3)


def test_figure_6_says_in_how_many_rounds_alternating_is_below():
    results = {
        "simultaneous": [result("simultaneous", s, [1, 2, 3], drift=(4, 4, 4)) for s in (1, 2)],
        "alternating": [result("alternating", s, [1, 2, 3], drift=(s, s, 7)) for s in (1, 2)],
    }
    made = sheet.drift_sheet("Title", "", [], results)
    assert made.rows == [
        ("round", "simultaneous", "alternating"),
        ("1", "4", "1.5"),
        ("2", "4", "1.5"),
        ("3", "4", "7"),
    ]
    assert "alternating is below in 2 of 3 rounds" in made.notes[2]


def test_figure_7_counts_the_clients_that_are_served_at_least_as_well():
    clients = {"fedlora": (90, 70, 50), "fedavg": (90, 60, 60), "local": (80, 75, 40)}
    results = {key: [result(key, 4, [70.0], clients=[row])] for key, row in clients.items()}
    made = sheet.client_sheet("Title", "", [], results)
    assert made.rows[1] == ("4", "3", "2", "2", "1", "-10.00")
    assert len(list(csv.DictReader(io.StringIO(made.csv())))) == 3


@pytest.mark.parametrize("table", ["table2", "fig4", "fig6", "fig7"])
def test_a_picture_is_written(table, tmp_path):
    made = {
        e.key: [replace(result(e.key, 1, [50.0]), job=Job(e, AT, 1, None))]
        for e in table_entries(table, AT, SMALL_SCALE)
    }
    cells = [sheet.Cell.from_results(found[0].job.entry, found) for found in made.values()]
    (figure,) = showing._figure_makers(table, "Title", cells, made).values()
    assert showing._save_figure(figure, tmp_path / "figure.png", tmp_path) == str(
        tmp_path / "figure.png"
    )
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


# The drift that figure 6 shows.


@pytest.mark.parametrize(
    "algorithm", [FedLoRA(lora_epochs=1), FedAvg()], ids=lambda a: type(a).__name__
)
def test_drift_is_the_root_mean_square_distance_of_the_uploads_from_their_mean(algorithm):
    federation, state = make_experiment(algorithm, "bn_net")
    trained = list(
        federation.clients.trainer.train(
            federation.placement.local_clients, state.shared, state.personal, 0
        )
    )

    def numbers(done):
        return [v.double().flatten() for n, v in done.end.shared.items() if "running" not in n]

    uploads_N = torch.stack([torch.cat(numbers(done)) for done in trained])
    weights_N = torch.tensor(
        [federation.clients.weights[done.client] for done in trained]
    ).double()[:, None] / sum(federation.clients.weights)
    square_N = ((uploads_N - (weights_N * uploads_N).sum(0)) ** 2).sum(1)
    _, row, _ = run_round(federation, state, evaluate=False, stop=False)
    assert row["drift"] == pytest.approx((weights_N[:, 0] * square_N).sum().sqrt().item(), rel=1e-6)


def test_drift_is_zero_for_equal_clients_and_unknown_where_nothing_is_shared():
    federation, state = make_experiment(FedAvg(), sizes=(5, 5, 5), same_sample=True)
    _, row, _ = run_round(federation, state, evaluate=False, stop=False)
    assert row["drift"] < 1e-6
    federation, state = make_experiment(Local(), sizes=SIZES)
    _, row, _ = run_round(federation, state, evaluate=False, stop=False)
    assert np.isnan(row["drift"])
