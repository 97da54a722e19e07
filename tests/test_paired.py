"""The paired comparison of a sweep's report: its numbers, and when it names a winner."""

import numpy as np
import pytest
from folders import read_groups, table_rows, write_run

from fedlora_mpi import open_runs
from fedlora_mpi.analysis import paired
from fedlora_mpi.analysis.page import tables
from fedlora_mpi.store.sweep_folder import STUDY_FILE, add_runs


def groups_of(tmp_path, accuracies, **settings):
    """Groups by learning rate. accuracies: {lr: {seed: accuracies of the three clients}}."""
    return read_groups(
        *(
            write_run(tmp_path / f"{lr}-{seed}", row, seed=seed, lr=lr, **settings)
            for lr, rows in accuracies.items()
            for seed, row in rows.items()
        )
    ).groups


def test_a_lead_of_every_client_and_seed_is_a_winner(tmp_path):
    worse = {seed: [0.25, 0.35, 0.55] for seed in (1, 2)}
    better = {1: [0.5, 0.7, 0.8], 2: [0.45, 0.6, 0.85]}
    (found,) = paired.compare_leaders(groups_of(tmp_path, {0.1: worse, 0.2: better}))
    assert found.leader.settings["train.lr"] == 0.2
    assert (found.seeds, found.clients, found.pairs) == (2, 3, 6)
    assert 0.2 < found.interval[0] < found.difference < found.interval[1] < 0.35
    (line,) = paired.winner_lines([found])
    assert line == f"winner: {found.leader.label}; every interval excludes zero"


def test_a_constant_lead_has_an_interval_without_width_and_is_no_winner(tmp_path):
    better, worse = ({seed: [a, a + 0.1, a + 0.3] for seed in (1, 2)} for a in (0.5, 0.25))
    (found,) = paired.compare_leaders(groups_of(tmp_path, {0.1: worse, 0.2: better}))
    assert (found.difference, *found.interval) == pytest.approx((0.25, 0.25, 0.25))
    (line,) = paired.winner_lines([found])
    assert line.startswith("no winner: ")
    assert line.endswith("(all differences are equal, so the interval has no width)")


def test_fewer_than_six_pairs_are_no_winner(tmp_path):
    better, worse = {1: [0.9, 0.8, 0.7]}, {1: [0.1, 0.2, 0.3]}
    (found,) = paired.compare_leaders(groups_of(tmp_path, {0.1: worse, 0.2: better}))
    assert found.interval[0] > 0
    (line,) = paired.winner_lines([found])
    assert "no winner" in line and "(only 3 pairs of seed and client; at least 6 are" in line


def test_a_winner_by_one_seed_says_nothing_about_other_seeds(tmp_path):
    groups = groups_of(tmp_path, {0.1: {1: [0.1, 0.2, 0.3]}, 0.2: {1: [0.9, 0.8, 0.7]}})
    found = paired.Comparison(*groups, 1, 9, 0.5, (0.4, 0.6), 0.01, 9)
    (line,) = paired.winner_lines([found])
    assert line.startswith("winner: ")
    assert line.endswith("; with one seed this says nothing about other seeds")


def test_a_leader_with_more_seeds_than_a_rival_is_told(tmp_path):
    better = {seed: [0.9, 0.8, 0.7] for seed in (1, 2, 3)}
    groups = groups_of(tmp_path, {0.1: {1: [0.1, 0.2, 0.3]}, 0.2: better})
    (line,) = paired.winner_lines(paired.compare_leaders(groups))
    assert line.endswith(f"; {groups[0].label} has 1 of its 3 seeds")


def test_a_lead_that_only_some_clients_have_is_no_winner(tmp_path):
    better, worse = {1: [0.9, 0.2, 0.4]}, {1: [0.3, 0.4, 0.6]}
    (found,) = paired.compare_leaders(groups_of(tmp_path, {0.1: worse, 0.2: better}))
    assert found.difference == pytest.approx(0.2 / 3) and found.interval[0] < 0 < found.interval[1]
    (line,) = paired.winner_lines([found])
    assert line.startswith("no winner: ") and "(the interval includes zero)" in line


def test_runs_of_other_seeds_or_splits_are_no_pairs(tmp_path):
    a, b = {1: [0.9, 0.8, 0.7]}, {2: [0.1, 0.2, 0.3]}
    (found,) = paired.compare_leaders(groups_of(tmp_path, {0.1: a, 0.2: b}))
    assert (found.seeds, found.clients) == (0, 0)
    assert [*paired.winner_lines([found])][0].endswith("(no pair of runs)")


def test_a_setting_that_is_not_done_takes_no_part(tmp_path):
    done, begun = (
        write_run(tmp_path / f"{lr}", [0.9, 0.8, 0.7], lr=lr, rounds=rounds)
        for lr, rounds in ((0.1, 1), (0.2, 5))
    )
    assert paired.compare_leaders(read_groups(done, begun).groups) == []


def test_the_spread_of_resampled_means_is_that_of_a_mean_of_clients():
    row = np.random.default_rng(1).normal(0.3, 1, 400)
    low, high = paired.bootstrap_interval([row], has_one_split=True)
    expected = 1.96 * row.std() / 20
    assert (row.mean() - low, high - row.mean()) == pytest.approx((expected, expected), rel=0.1)


def test_seeds_that_disagree_widen_the_interval():
    rows = [np.full(50, value) for value in (0.1, 0.3, 0.5)]
    low, high = paired.bootstrap_interval(rows, has_one_split=False)
    assert low == pytest.approx(0.1, abs=0.07) and high == pytest.approx(0.5, abs=0.07)


def test_one_split_draws_a_client_together_in_all_seeds():
    row = np.random.default_rng(1).normal(0, 1, 100)
    together, apart = (paired.bootstrap_interval([row, row], one) for one in (True, False))
    assert apart[1] - apart[0] < 0.9 * (together[1] - together[0])


def test_the_p_value_is_that_of_scipy_and_1_without_any_difference():
    stats = pytest.importorskip("scipy.stats")
    row = np.array([0.1, -0.2, 0.3, 0.5, 0.45])
    assert paired.wilcoxon_p(row) == stats.wilcoxon(row).pvalue
    assert paired.wilcoxon_p(np.zeros(5)) == 1.0


def test_the_page_has_the_same_numbers(tmp_path):
    better, worse = ({1: [a, a + 0.1, a + 0.3]} for a in (0.5, 0.25))
    comparisons = paired.compare_leaders(groups_of(tmp_path, {0.1: worse, 0.2: better}))
    (row,) = table_rows(tables.comparison_table(comparisons))
    assert float(row["difference"]) == pytest.approx(0.25) and row["seeds"] == "1"
    assert tables.comparison_table([]) is None
    assert paired.comparison_rows(comparisons)[1][2:4] == ("+25.00", "+25.00 to +25.00")


@pytest.fixture
def sweep(tmp_path):
    """The folder of a sweep with two runs that have begun and one that has not."""
    for lr in (0.1, 0.2):
        write_run(tmp_path / f"s/lr={lr}", [lr, lr, lr + 0.1], lr=lr, extra_column="accuracy_worst")
    add_runs(
        tmp_path / "s", "x.yaml", {f"lr={lr}": {"train.lr": str(lr)} for lr in (0.1, 0.2, 0.3)}
    )
    return tmp_path / "s"


def test_the_folder_of_a_sweep_stands_for_its_runs(sweep, call):
    code, out, _ = call("report", sweep)
    assert code == 0 and f"{sweep}/lr=0.1\n" in out
    assert f"{sweep}: 2 of 3 runs done; missing: lr=0.3\n" in out
    assert "no winner: FedAvg, lr 0.2 is highest so far, but runs are missing" in out
    assert [*open_runs(sweep)] == [f"{sweep}/lr=0.1", f"{sweep}/lr=0.2"]
    assert [*open_runs(f"{sweep.parent}/**")] == [*open_runs([sweep])]
    assert "winner" not in call("report", sweep / "lr=0.1", sweep / "lr=0.2")[1]


def test_a_run_that_has_stopped_before_its_last_round_is_missing(sweep, call):
    write_run(sweep / "lr=0.3", [0.1, 0.2, 0.3], lr=0.3, rounds=5, extra_column="accuracy_worst")
    assert "2 of 3 runs done; missing: lr=0.3\n" in call("report", sweep)[1]
    (sweep / STUDY_FILE).touch()  # a search gives up runs
    assert "missing" not in call("report", sweep)[1]


def test_a_sweep_without_a_run_is_refused(tmp_path, call):
    add_runs(tmp_path / "s", "x.yaml", {"lr=1": {"train.lr": "1"}})
    code, _, err = call("report", tmp_path / "s")
    assert code == 2 and "s: none of its 1 runs has begun" in err


def test_the_page_of_a_sweep_names_missing_runs_and_no_winner(sweep, call):
    assert call("report", sweep, "-o", "page")[0] == 0
    page = (sweep.parent / "page/report.html").read_text()
    assert "2 of 3 runs done; missing: lr=0.3." in page and "No winner: " in page
    assert (sweep.parent / "page/tables/paired.csv").is_file()
