"""Several runs are grouped by what differs; a report has the numbers of their logs, its page needs
nothing else.
"""

import doctest
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from folders import read_groups, table_rows, write_run
from matplotlib.colors import to_rgb
from runs import TINY, process_environment, tiny_config

from fedlora_mpi import config as configs
from fedlora_mpi import open_run, open_runs
from fedlora_mpi.analysis import groups, parts
from fedlora_mpi.analysis import runs as several
from fedlora_mpi.analysis.groups import (
    RunLog,
    Stat,
    differing_keys,
    group_labels,
    group_runs,
    run_labels,
)
from fedlora_mpi.analysis.page import clients, curves, personal, ranks, sweeps, tables, write
from fedlora_mpi.analysis.page.crowd import PALE, assign_looks, best_and_worst
from fedlora_mpi.analysis.page.style import (
    COLORS,
    distinct_looks,
    place_apart,
    plot_style,
    render_files,
    wrap_label,
)
from fedlora_mpi.analysis.page.table import Column, Table, format_percent
from fedlora_mpi.analysis.run_view import RunView
from fedlora_mpi.cli import main

CLIENTS = 7  # of tiny.yaml


def test_runs_that_differ_in_seeds_and_folders_only_are_one_group(tmp_path):
    found = read_groups(
        *(write_run(tmp_path / f"{seed}", [0.1, 0.2, 0.3], seed=seed) for seed in (1, 2, 3))
    )
    assert [group.label for group in found.groups] == ["FedAvg"] and found.keys == ()
    assert [run.seeds for run in found.groups[0].runs] == [(1, 1), (2, 2), (3, 3)]


def test_the_same_seed_twice_counts_once_and_the_longer_run_stays(tmp_path):
    short = write_run(tmp_path / "short", [0.1, 0.2, 0.3], rounds=2)
    long = write_run(tmp_path / "long", [0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    found = read_groups(short, long)
    assert [[run.path for run in group.runs] for group in found.groups] == [[long]]
    assert [(gone.path, kept.path) for gone, kept in found.left_out] == [(short, long)]


FEDLORA = {"algorithm.name": "fedlora", "train.lr": 0.1}
CASES = [
    ([{"algorithm.name": "fedavg"}], ["FedAvg"]),
    ([{"algorithm.name": "my.module:FedPer"}, {"algorithm.name": "local"}], ["FedPer", "Local"]),
    (  # a class of the user may have the name of a method of the package
        [{"algorithm.name": n} for n in ("my.module:FedAvg", "fedavg", "fedavg_ft")],
        ["my.module:FedAvg", "fedavg", "FedAvg+FT"],
    ),
    # fields of other methods' own set nothing apart; a learning rate of the method's own is said
    (
        [FEDLORA | {"algorithm.lora_epochs": 2}, {"algorithm.name": "fedprox", "algorithm.mu": 1.0, "train.lr": 0.3}],
        ["FedLoRA, lr 0.1", "FedProx, lr 0.3"],
    ),
    (  # only a method that has the field says it
        [FEDLORA | {"algorithm.lora_epochs": n} for n in (1, 2)] + [{"algorithm.name": "local", "train.lr": 0.1}],
        ["FedLoRA, lora_epochs 1", "FedLoRA, lora_epochs 2", "Local"],
    ),
    (
        [FEDLORA | {"data.partition.kind": "dirichlet_class", "data.partition.alpha": alpha} for alpha in (0.1, 1.0)]
        + [FEDLORA | {"data.partition.kind": "iid"}],
        ["FedLoRA, dirichlet_class, alpha 0.1", "FedLoRA, dirichlet_class, alpha 1", "FedLoRA, iid"],
    ),
    (  # the data are said first, and what differs on the same data
        [{"algorithm.name": n, "lr": lr, "data.dataset": d} for n, lr, d in ("a1x", "a1y", "b1x", "b2x")],
        ["a, x, lr 1", "a, y", "b, x, lr 1", "b, x, lr 2"],
    ),
    (  # one word for two keys
        [FEDLORA | {"algorithm.alpha": a, "data.partition.alpha": b} for a, b in ((1, 0.1), (1, 0.5), (2, 0.1))],
        [f"FedLoRA, partition.alpha {of}" for of in
         ("0.1, algorithm.alpha 1", "0.5, algorithm.alpha 1", "0.1, algorithm.alpha 2")],
    ),
    (
        [FEDLORA | {"model.name": "cnn"}, FEDLORA | {"model.mix": [{"name": "cnn1"}, {"name": "cnn2"}]}],
        ["FedLoRA, cnn", "FedLoRA, mix"],
    ),
    (  # networks of a mix that differ in an option alone
        [FEDLORA | {"model.mix": [{"name": "cnn", "width": w}]} for w in (1, 2)],
        ["FedLoRA, mix [cnn] (1)", "FedLoRA, mix [cnn] (2)"],
    ),
    ([FEDLORA | {"train.lr": lr} for lr in (0.1, 0.10000001)], ["FedLoRA, lr 0.1", "FedLoRA, lr 0.10000001"]),
    ([FEDLORA | {"rounds": n} for n in (5, 8)] + [{"algorithm.name": "local", "rounds": 8, "train.lr": 0.1}],
     ["FedLoRA, rounds 5", "FedLoRA, rounds 8", "Local, rounds 8"]),
    ([FEDLORA | {"diagnose": on, "full": full} for on, full in ((True, ["head"]), (False, ["head"]), (False, None))],
     ["FedLoRA, diagnose yes, full [head]", "FedLoRA, diagnose no, full [head]", "FedLoRA, diagnose no, full none"]),
]  # fmt: skip


@pytest.mark.parametrize("settings, wanted", CASES)
def test_a_label_is_what_sets_a_group_apart(settings, wanted):
    assert group_labels(settings) == wanted
    assert len(set(wanted)) == len(wanted)


def test_a_setting_of_another_data_set_changes_nothing(tmp_path):
    run = RunLog.read(write_run(tmp_path / "a", [0.1] * 3))
    run.config["data"] |= {name: {"seed": 1} for name in ("synthetic", "text", "table")}
    assert "data.synthetic.seed" not in run.settings
    other = RunLog.read(write_run(tmp_path / "b", [0.1] * 3, dataset="synthetic", seed=2))
    other.config["data"] |= {name: {"seed": 1} for name in ("synthetic", "text", "table")}
    assert [key for key in other.settings if key.endswith(".seed")] == ["data.synthetic.seed"]


def test_keys_of_a_block_are_compared_where_its_selector_is_the_same():
    one, other = (
        {"algorithm.name": "fedlora", "algorithm.s": 1},
        {"algorithm.name": "fedprox", "algorithm.s": 2},
    )
    assert differing_keys([one, other]) == ("algorithm.name",)
    assert differing_keys([one, {**one, "algorithm.s": 2}]) == ("algorithm.s",)
    # absent is a value too
    assert differing_keys([one, {**one, "data.tasks.rounds": 2}]) == ("data.tasks.rounds",)


def test_a_stat_has_the_sample_deviation_and_leaves_out_what_is_unknown():
    assert Stat.from_values([1.0, 3.0, np.nan]) == (2.0, 2**0.5)
    one, none = Stat.from_values([0.25]), Stat.from_values([])
    assert one.mean == 0.25 and np.isnan([one.std, *none]).all()


def test_the_numbers_of_the_accuracy_table(tmp_path):
    nan = [np.nan] * 3
    runs = [
        write_run(
            tmp_path / f"{s}", [0.2 * s, 0.2 * s, 0.2 * s], [0.1 * s, 0.2 * s, 0.3 * s], nan, seed=s
        )
        for s in (1, 3)
    ]
    runs += [write_run(tmp_path / "other", [0.5, 0.5, 0.8], [0.4, 0.4, 0.4], algorithm="local")]
    table = tables.accuracy_table(read_groups(*runs).groups)
    fedavg, local = table_rows(table)

    def number(row, key):
        return pytest.approx(float(row[key]))

    assert (fedavg["run"], fedavg["seeds"], fedavg["rounds"]) == ("FedAvg, rounds 3", "2", "3")
    assert 0.4 == number(fedavg, "final_mean") == number(fedavg, "best_mean")
    assert number(fedavg, "final_std") == 0.4 / 2**0.5  # of 0.2 and 0.6
    # of 0.1 and 0.3, twice
    assert number(fedavg, "worst_mean") == 0.2 and number(fedavg, "clients_std_mean") == 0.2
    assert (
        number(local, "final_mean") == 0.4
        and number(local, "best_mean") == 0.6
        and local["final_std"] == ""
    )
    assert (
        "| Local, rounds 2 | 1 | 2 | **40.00** | **60.00** | **40.00** | 0.00 |" in table.markdown()
    )
    # equal as shown: both bold
    assert "| FedAvg, rounds 3 | 2 | 3 | **40.00 ± 28.28** | 40.00 ± 28.28 |" in table.markdown()


def test_what_was_run_on_other_data_is_not_compared(tmp_path):
    made = [write_run(tmp_path / f"{n}-{d}", [a] * 3, algorithm=n, dataset=d) for n, d, a in
            (("fedper", "x", 0.25), ("local", "x", 0.5), ("fedper", "y", 0.75), ("local", "y", 0.125))]  # fmt: skip
    groups_ = read_groups(*made).groups
    assert [group.task for group in groups_] == ["x", "x", "y", "y"]
    assert write.summarize(groups_) == (
        "Highest final accuracy (x), mean over clients: Local, x with 50.00 % (one seed), "
        "25.00 points above FedPer, x (25.00 %). "
        "Highest final accuracy (y), mean over clients: FedPer, y with 75.00 % (one seed), "
        "62.50 points above Local, y (12.50 %)."
    )
    bold = [
        line.split(" |")[3].startswith(" **")
        for line in tables.accuracy_table(groups_).markdown().splitlines()[4:8]
    ]
    assert bold == [False, True, True, False]


def test_the_numbers_of_the_other_tables(tmp_path):
    paths = [
        write_run(tmp_path / f"a{s}", [0.1, 0.5, 0.9], [0.2, 0.6, 0.8], seed=s, digest=f"{s}")
        for s in (1, 2)
    ]
    paths += [
        write_run(
            tmp_path / f"b{s}",
            [0, 0, 0],
            [0.2, 0.7, 0.4],
            seed=s,
            digest=f"{s}",
            algorithm="fedper",
        )
        for s in (1, 2)
    ]
    found = read_groups(*paths)
    cost = table_rows(tables.cost_table(found.groups))[0]
    assert [float(cost[k]) for k in ("bytes_up", "bytes_down", "bytes", "tflop")] == [
        1000,
        2000,
        18000,
        4,
    ]
    assert (
        "| FedAvg | 1 kB | 2 kB | 18 kB | 4 TFLOP |" in tables.cost_table(found.groups).markdown()
    )
    time = table_rows(tables.time_table(found.groups))[0]
    assert [float(time[k]) for k in ("seconds_train", "seconds_exchange", "seconds")] == [
        1.5,
        0.5,
        4,
    ]
    runs = table_rows(tables.run_table(found.groups))
    assert [(row["path"], row["seed"], row["partition_seed"]) for row in runs] == [
        (str(p), p.name[1], p.name[1]) for p in paths
    ]
    assert runs[2]["best_round"] == "2" and float(runs[2]["final"]) == pytest.approx(1.3 / 3)
    (pair,) = clients.rival_pairs(found.groups)
    assert (pair.group.label, pair.rival.label, pair.seeds, clients.num_as_good(pair)) == (
        "FedPer",
        "FedAvg",
        2,
        4,
    )
    against = table_rows(tables.rival_table([pair]))[0]
    assert [float(against[k]) for k in ("gain", "worst")] == pytest.approx([-0.1, -0.4])
    assert tables.settings_table(found) is None  # nothing but the method, which names the rows


def test_a_method_is_compared_on_the_same_clients_alone(tmp_path):
    def make(name, **more):
        return write_run(tmp_path / name, [0.1, 0.5, 0.9], algorithm=name.split("-")[0], **more)

    ours, other = make("fedper"), make("fedavg", digest="y")
    longer, near, far = make("local-9", rounds=9), make("local-1"), make("local-2", lr=0.7)
    assert clients.rival_pairs(read_groups(ours, other, longer).groups) == []
    (pair,) = clients.rival_pairs(read_groups(far, near, ours).groups)
    assert pair.rival.runs[0].path == near


def test_curves_are_of_the_rounds_that_all_seeds_have(tmp_path):
    long = write_run(
        tmp_path / "1", [0.1, 0.1, 0.1], [np.nan] * 3, [0.3, 0.3, 0.3], [0.4, 0.4, 0.4], rounds=4
    )
    short = write_run(
        tmp_path / "2", [0.3, 0.3, 0.3], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], seed=2, rounds=4
    )
    (group,) = read_groups(long, short).groups
    rounds, values = group.curves("accuracy")
    assert rounds.tolist() == [1, 3] and np.allclose(values, [[0.1, 0.3], [0.3, 0.5]])
    assert np.allclose([part[:, 0] for part in group.client_curves("accuracy")[1]], values)
    assert group.curves("nothing")[1].size == 0
    figure = curves.learning_curves([group], {"FedAvg": distinct_looks(1)[0]}).figure
    (line,) = figure.axes[0].lines
    assert np.allclose(line.get_xydata(), [[1, 20], [3, 40]])


def test_a_cost_is_the_sum_so_far_in_its_unit(tmp_path):
    (group,) = read_groups(write_run(tmp_path / "a", [0.1] * 3, [np.nan] * 3, [0.4] * 3)).groups
    look = {"FedAvg": distinct_looks(1)[0]}
    (line,) = curves.accuracy_by_bytes([group], look).figure.axes[0].lines
    assert np.allclose(line.get_xydata(), [[9, 10], [27, 40]])
    (line,) = curves.accuracy_by_flops([group], look).figure.axes[0].lines
    assert np.allclose(line.get_xydata(), [[2, 10], [6, 40]])


def test_a_dot_is_a_client_and_a_bar_the_seconds_of_a_stage(tmp_path):
    found = [
        write_run(tmp_path / f"{s}", [0.1, 0.1, 0.1], [0.1 * s, 0.2, np.nan], seed=s)
        for s in (1, 2)
    ]
    (group,) = read_groups(*found).groups
    look = {"FedAvg": distinct_looks(1)[0]}
    axes = clients.client_distribution([group], look).figure.axes[0]
    assert np.allclose(axes.collections[0].get_offsets()[:, 0], [10, 20, 20, 20])
    assert np.allclose(axes.lines[0].get_xdata(), 17.5)
    axes = ranks.seconds_by_stage([group], look).figure.axes[0]
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 1.5), (1.5, 0.5)]
    assert [text.get_text() for text in axes.texts] == ["2 s"]


def test_the_numbers_of_a_comparison_are_those_of_the_clients(tmp_path):
    made = [
        write_run(tmp_path / n, a, algorithm=n)
        for n, a in (("fedper", [0.5, 0.75, 1]), ("local", [0.25, 0.75, 0.5]))
    ]
    groups_ = read_groups(*made).groups
    with plot_style():
        drawn = clients.rival_scatter(
            clients.rival_pairs(groups_),
            dict(zip(("FedPer", "Local"), distinct_looks(2), strict=True)),
        )
    axes = drawn.figure.axes[0]
    assert axes.collections[0].get_offsets().tolist() == [[25, 50], [75, 75], [50, 100]]
    assert axes.texts[0].get_text() == "● Local: 3 of 3" and axes.get_title("left") == "FedPer"


def test_metrics_are_reported_without_torch(tmp_path):
    run = write_run(tmp_path / "a", [0.5] * 3)
    code = f"""
import sys; from pathlib import Path
from fedlora_mpi.analysis.page.write import write_report
write_report([Path({str(run)!r})], Path({str(tmp_path / "page")!r}))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=process_environment(), timeout=100)


def test_what_diagnose_has_logged_is_drawn_and_nothing_else(tmp_path):
    (group,) = read_groups(
        write_run(tmp_path / "a", [0.1] * 3, [0.2] * 3, extra_column="lora_bias")
    ).groups
    (drawn,) = curves.diagnosis_curves([group], {"FedAvg": distinct_looks(1)[0]})
    assert drawn.name == "lora_bias" and drawn.figure.axes[0].lines[0].get_ydata().tolist() == [
        7,
        14,
    ]


def test_a_setting_that_differs_is_swept_and_two_are_a_grid(tmp_path):
    def make(e, r, s=1):
        return write_run(
            tmp_path / f"{e}-{r}-{s}",
            [e / 100 + r / 10] * 3,
            seed=s,
            algorithm={"name": "fedlora", "epochs": e, "rank": r},
        )

    found = read_groups(*(make(e, 0.5, s) for e in (5, 1, 3) for s in (1, 2)))
    looks = assign_looks(found.groups)
    (drawn,) = sweeps.sweep_figures(found.groups, found.keys, set(), looks)
    line = drawn.figure.axes[0].lines[0]
    assert (
        np.allclose(line.get_xydata(), [[1, 6], [3, 8], [5, 10]])
        and drawn.figure.axes[0].get_xlabel() == "epochs"
    )
    assert sweeps.grid_figures(found.groups, found.keys) == ([], set())

    found = read_groups(*(make(e, r, 9) for e in (2, 1) for r in (0.4, 0.3, 0.2)))
    (drawn,), used = sweeps.grid_figures(found.groups, found.keys)
    assert used == {"algorithm.epochs", "algorithm.rank"}
    values = drawn.figure.axes[0].images[0].get_array()
    assert np.allclose(
        values, [[3, 4], [4, 5], [5, 6]] if values.shape == (3, 2) else [[3, 4, 5], [4, 5, 6]]
    )
    assert sweeps.sweep_figures(found.groups, found.keys, used, {}) == []


def test_a_method_has_one_colour_and_its_settings_have_dashes(tmp_path):
    runs = [
        write_run(tmp_path / f"{name}-{lr}", [lr] * 3, algorithm=name, lr=lr)
        for name in ("fedavg", "fedlora") for lr in (0.1, 0.2)
    ]  # fmt: skip
    found = read_groups(*runs)
    looks = assign_looks(found.groups)
    assert [looks[f"FedAvg, lr {lr}"].color for lr in ("0.1", "0.2")] == [COLORS[0]] * 2
    assert [looks[f"FedLoRA, lr {lr}"].color for lr in ("0.1", "0.2")] == [COLORS[1]] * 2
    assert len(set(looks.values())) == 4
    (drawn,) = sweeps.sweep_figures(found.groups, found.keys, set(), looks)
    axes = drawn.figure.axes[0]
    colors = {t.get_text(): t.arrow_patch.get_edgecolor()[:3] for t in axes.texts}
    assert colors == {"FedAvg": to_rgb(COLORS[0]), "FedLoRA": to_rgb(COLORS[1])}
    (scatter,) = (
        clients.rival_scatter(clients.rival_pairs(found.groups), looks).figure.axes[0].collections
    )
    assert tuple(scatter.get_facecolor()[0][:3]) == pytest.approx(to_rgb(COLORS[0]))  # of FedAvg


def test_a_logarithmic_axis_has_plain_numbers(tmp_path):
    runs = [
        write_run(
            tmp_path / f"{epochs}", [0.5] * 3, algorithm={"name": "fedlora", "epochs": epochs}
        )
        for epochs in (1, 2, 3, 4, 5, 6, 7, 8, 9, 100)
    ]
    found = read_groups(*runs)
    with plot_style():
        (drawn,) = sweeps.sweep_figures(found.groups, found.keys, set(), assign_looks(found.groups))
        axis = drawn.figure.axes[0].xaxis
        assert axis.get_major_formatter()(10) == "10" and axis.get_minor_formatter()(20) == ""


def test_no_table_is_wider_than_the_page(tmp_path):
    """A line of the page holds about 105 digits; words of a title may be on lines of their own."""
    runs = [
        write_run(tmp_path / f"{name}", [0.5] * 3, [0.25] * 3, algorithm=name) for name in ("fedavg_ft", "local")
    ]  # fmt: skip
    found = read_groups(*runs)
    made = [
        table(found.groups)
        for table in (tables.accuracy_table, tables.cost_table, tables.time_table)
    ]
    for table in [*made, tables.run_table(found.groups)]:
        header, _, *rows = (line.split("|")[1:-1] for line in table.markdown().splitlines()[2:-2])
        columns = zip(header, *rows, strict=True)
        widths = [
            max(len(word) for word in (*title.split(), *cells)) + 2 for title, *cells in columns
        ]
        widths[-1] = min(widths[-1], 20)  # a path is broken where it has a sign
        assert sum(widths) < 105, table.name


def test_a_label_is_broken_at_its_commas():
    assert wrap_label("FedLoRA, lora_epochs 2, lr 0.01", 26) == "FedLoRA, lora_epochs 2,\nlr 0.01"


def test_more_settings_than_fit_as_columns_are_rows(tmp_path):
    runs = [
        write_run(tmp_path / f"{n}", [0.5] * 3, **{f"key{k}": k + 10 * n for k in range(8)})
        for n in (1, 2)
    ]
    found = read_groups(*runs)
    rows = table_rows(tables.settings_table(found))
    assert len(rows) == 8 and list(rows[0].values()) == ["key0", "10", "20"]
    few = read_groups(
        write_run(tmp_path / "a", [0.5] * 3), write_run(tmp_path / "b", [0.5] * 3, lr=2)
    )
    assert [row["lr"] for row in table_rows(tables.settings_table(few))] == ["0.1", "2"]


def test_labels_are_as_near_to_their_curves_as_they_go_without_overlap():
    ones = np.ones(3)
    assert place_apart(np.array([2.0, 5.0, 9.0]), ones, 20).tolist() == [2, 5, 9]
    assert place_apart(np.array([7.0, 7.0, 7.0]), ones, 20).tolist() == [6, 7, 8]
    assert np.allclose(
        place_apart(np.array([5.0, 5.5, 9.0]), np.array([1.0, 3.0, 1.0]), 20), [4.25, 6.25, 9]
    )
    # none beyond the rim
    assert place_apart(np.array([0.0, 0.0, 9.0]), ones, 9).tolist() == [0.5, 1.5, 8.5]
    # too many for the room
    assert place_apart(np.array([0.0, 0.0, 1.0]), ones, 2).tolist() == [0.5, 1.5, 2.5]


# --- low-rank and personal parts


def test_norm_and_effective_rank_are_those_of_the_product():
    rng = np.random.default_rng(1)
    B, A = rng.standard_normal((5, 3)), rng.standard_normal((3, 7))
    s = np.linalg.svd(B @ A, compute_uv=False)
    assert np.allclose(
        parts.norm_and_effective_rank(B, A), ((s**2).sum() ** 0.5, (s**2).sum() ** 2 / (s**4).sum())
    )
    assert np.allclose(
        parts.norm_and_effective_rank(np.eye(5)[:, :3], 2 * np.eye(7)[:3]), (12**0.5, 3)
    )
    assert parts.norm_and_effective_rank(0 * B, A) == (0, 0)


def test_alike_clients_become_neighbours():
    kind = np.array([0, 1, 2, 0, 1, 2, 0])
    similar = 0.1 + 0.8 * (kind[:, None] == kind) + 0.1 * np.eye(7)
    order = parts.leaf_order(similar)
    assert sorted(order) == list(range(7))
    assert np.count_nonzero(np.diff(kind[order])) == 2


def test_agreement_is_a_rank_correlation():
    table = np.array([[1, 0.1, 0.2], [0.1, 1, 0.9], [0.2, 0.9, 1]])
    same = parts.ClientSimilarity((0, 1, 2), table, table**3, False)
    assert parts.rank_correlation(same) == pytest.approx(1)
    assert np.isnan(parts.rank_correlation(same._replace(labels=np.ones((3, 3)))))


# --- runs that have trained


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A folder with runs/a-1, a-2 (FedAvg), b-1 (Local), c-1, c-2 (FedLoRA), d-1 (FedIT) of 2
    rounds.
    """
    folder = tmp_path_factory.mktemp("four")
    names = {"a": "fedavg", "b": "local", "c": "fedlora", "d": "fedit"}
    for run in ("a-1", "a-2", "b-1", "c-1", "c-2", "d-1"):
        kind, seed = run.split("-")
        asked = [
            f"algorithm={names[kind]}",
            f"seed={seed}",
            f"data.partition.seed={seed}",
            "participation=1.0",
            "rounds=2",
        ]
        asked += (
            ["algorithm.scale=official", "algorithm.rank_rule=official", "algorithm.linear_rank=2"]
            if kind == "c"
            else []
        )
        asked += (
            ["algorithm.lora_ranks=[2, 1]", "algorithm.diagnose=true", "train.lr=0.005"]
            if kind == "d"
            else []
        )
        assert main(["run", str(TINY), f"output={folder / 'runs' / run}", *asked]) == 0
    return folder


def test_low_rank_factors_are_shown_before_other_personal_parts(four, monkeypatch):
    monkeypatch.setattr(personal, "MAX_GROUPS", 1)
    with plot_style():
        shown = personal.personal_figures(
            group_runs([RunLog.read(four / "runs" / run) for run in ("b-1", "c-1")]).groups
        )
    assert [*shown.tables] == ["FedLoRA"] and [figure.name for figure in shown.figures] == [
        "lowrank-1",
        "similarity-1",
    ]
    assert shown.left_out == ["those of settings after the first 1 that have any"]
    assert not parts.has_own_factors(RunView(four / "runs/b-1"))


def test_low_rank_parts_are_those_of_the_clients_models(four):
    run = open_run(four / "runs/c-1")
    found = parts.low_rank(run, parts.read_leaves(run, 10**9))
    assert found.clients == tuple(range(CLIENTS))
    for at in (0, 4):
        view = run.client(at)
        tau = view.algorithm.tau(view.network, view.variables.personal)
        assert tuple(tau) == ("0.weight", "3.weight", "7.weight", "9.weight")
        assert found.layers == ("conv 1", "conv 2", "linear 3", "linear 4")
        norms = [float(value.norm()) for value in tau.values()]
        assert np.allclose(found.norm[:, at], norms, rtol=1e-4) and min(norms) > 0
        assert (found.effective_rank[:, at] <= found.num_components[:, at] + 1e-6).all()


def test_shared_factors_are_measured_as_each_client_gets_them(four):
    run = open_run(four / "runs/d-1")
    held = parts.read_leaves(run, 10**9)
    found = parts.low_rank(run, held)
    assert found.num_components[:, :4].tolist() == [[2, 1, 2, 1]] * len(found.layers)
    for at in (0, 1):
        products = run.client(at).algorithm.factor_products(run.client(at).variables.shared)
        assert np.allclose(
            found.norm[:, at], [float(value.norm()) for value in products.values()], rtol=1e-4
        )
    assert parts.client_similarity(run, held) is None  # nothing is the clients' own


def test_similarity_is_the_cosine_of_the_personal_parts(four):
    for name, centred in (("c-1", False), ("b-1", True)):
        run = open_run(four / "runs" / name)
        found = parts.client_similarity(run, parts.read_leaves(run, 10**9))
        views = [run.client(client) for client in found.clients]
        if centred:
            rows = np.stack(
                [
                    np.concatenate([leaf.ravel() for leaf in view.personal.values()])
                    for view in views
                ]
            )
            rows = rows - rows.mean(0)
        else:
            tau = [view.algorithm.tau(view.network, view.variables.personal) for view in views]
            rows = np.stack(
                [np.concatenate([value.numpy().ravel() for value in of.values()]) for of in tau]
            )
        rows /= np.linalg.norm(rows, axis=1)[:, None]
        assert found.is_centered == centred and np.allclose(
            found.personal, rows @ rows.T, atol=1e-4
        )
        mixes = np.stack([view.counts for view in views]).astype(float)
        mixes /= np.linalg.norm(mixes, axis=1)[:, None]
        assert np.allclose(found.labels, mixes @ mixes.T)


def test_cosines_have_one_diverging_scale_and_norms_one_scale_per_layer():
    alike = parts.ClientSimilarity(
        (0, 1, 2), np.array([[1, 0.1, -0.2], [0.1, 1, 0], [-0.2, 0, 1]]), np.eye(3), False
    )
    factors = parts.LowRank(
        ("conv 1", "head"),
        (0, 1),
        norm=np.array([[1.0, 2.0], [100.0, np.nan]]),
        effective_rank=np.ones((2, 2)),
        num_components=np.ones((2, 2)),
    )
    with plot_style():
        cosines = personal.similarity_figure(alike, "s", "a", "b").figure
        norms = personal.effective_rank_figure(factors, "l", "a", "b").figure
    left, right = (axes.images[0] for axes in cosines.axes[:2])
    assert left.get_clim() == right.get_clim() == (-1, 1)
    assert left.get_cmap().name == right.get_cmap().name == "RdBu_r"
    assert np.allclose(left.get_cmap()(0.5)[:3], 1, atol=0.05)  # white at 0
    shown = norms.axes[1].images[0].get_array().filled(np.nan)
    assert np.array_equal(shown, [[0.5, 1], [1, np.nan]], equal_nan=True)


def test_a_layer_is_named_by_its_path_or_if_that_is_a_number_by_its_kind():
    dims = {"0.weight": 4, "2.1.weight": 2, "layer1.0.conv1.weight": 4, "5.weight": 7}
    assert parts.layer_names(tuple(dims), dims) == (
        "conv 1",
        "linear 2",
        "layer1.0.conv1",
        "layer 4",
    )


def test_a_checkpoint_over_the_limit_is_not_read(four):
    run = open_run(four / "runs/c-1")
    assert parts.read_leaves(run, parts.checkpoint_bytes(run) - 1) is None


def test_the_example_of_open_runs_is_true(four, tmp_path, monkeypatch):
    for name in ("a-1", "a-2", "b-1"):
        shutil.copytree(four / "runs" / name, tmp_path / "runs" / name)
    (tmp_path / "runs/notes").mkdir()
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(several) == (0, 7)


def test_tables_of_runs_hold_each_run_whole(four):
    runs = open_runs(str(four / "runs/**"))
    rounds, clients_ = runs.rounds, runs.clients  # read anew at every access
    assert list(runs) == [
        str(four / "runs" / name) for name in ("a-1", "a-2", "b-1", "c-1", "c-2", "d-1")
    ]
    for path, run in runs.items():
        mine = rounds[rounds["path"] == path]
        assert mine["accuracy"].tolist() == run.rounds["accuracy"].tolist() and mine[
            "round"
        ].tolist() == [1, 2]
        mine = clients_[clients_["path"] == path]
        assert mine["accuracy"].tolist() == run.clients["accuracy"].tolist()
    assert runs.settings["run"].tolist() == [
        "FedAvg, lr 0.05",
        "FedAvg, lr 0.05",
        "Local, lr 0.05",
        "FedLoRA, lr 0.05",
        "FedLoRA, lr 0.05",
        "FedIT, lr 0.005",
    ]
    assert runs.settings["seed"].tolist() == [1, 2, 1, 1, 2, 1]


def test_a_pattern_without_runs_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"\*: matches no run folder, one with a log.h5; give the `output` of runs"
    ):
        open_runs(tmp_path / "*")
    with pytest.raises(ValueError, match="not a run folder"):
        open_runs([tmp_path])


# --- many settings


def test_of_many_settings_the_best_and_worst_are_named_and_the_others_pale(tmp_path):
    finals = np.random.default_rng(0).permutation(30) / 30
    folders = [
        write_run(tmp_path / f"{at:02}", [top] * 3, [top] * 3, lr=at + 1)
        for at, top in enumerate(finals)
    ]
    found = read_groups(*folders).groups
    look = assign_looks(found)
    order = [found[at].label for at in np.argsort(-finals)]
    assert {label for label, of in look.items() if of.is_named} == {*order[:8], *order[-4:]}
    assert len({look[label] for label in (*order[:8], *order[-4:])}) == 12
    with plot_style():
        drawn = curves.learning_curves(found, look)
        spread, bars, dots = (
            of(found, look)
            for of in (curves.client_spread, ranks.seconds_by_stage, clients.client_distribution)
        )
    axes = drawn.figure.axes[0]
    assert len(axes.lines) == 30 and sum(line.get_color() == PALE for line in axes.lines) == 18
    assert {text.get_text() for text in axes.texts} == {label for label in order[:8] + order[-4:]}
    assert drawn.figure.get_size_inches()[1] < 4
    assert [len(figure.figure.axes) for figure in (spread, bars, dots)] == [12, 1, 1]
    assert (
        len(bars.figure.axes[0].get_yticklabels())
        == len(dots.figure.axes[0].get_yticklabels())
        == 12
    )
    for figure in (drawn, spread, bars, dots):
        assert "Of 30 settings the 8 best and 4 worst in final accuracy are named" in figure.caption
    few = assign_looks(found[:24])
    assert all(of.is_named for of in few.values()) and len(set(few.values())) == 24
    assert "settings the 8" not in curves.learning_curves(found[:24], few).caption


def test_of_several_tasks_each_has_its_best_among_the_named(tmp_path):
    folders = [
        write_run(tmp_path / f"a{at:02}", [0.9] * 3, lr=at + 1, dataset="mnist") for at in range(13)
    ]
    folders += [
        write_run(tmp_path / f"b{at:02}", [0.1 + at / 100] * 3, lr=at + 1, dataset="cifar10")
        for at in range(13)
    ]
    named = [
        group.settings["data.dataset"] for group in best_and_worst(read_groups(*folders).groups)
    ]
    assert named.count("mnist") == named.count("cifar10") == 6
    blank = [write_run(tmp_path / f"c{at:02}", [np.nan] * 3, lr=at + 1) for at in range(25)]
    assert sum(look.is_named for look in assign_looks(read_groups(*blank).groups).values()) == 12


# --- the page


class Page(HTMLParser):
    """What a page names, and its pictures."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.sources, self.open = set(), set(), [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.ids.add(attrs.get("id"))
        self.links += [
            attrs[name] for name in ("href", "action", "data", "srcset") if name in attrs
        ]
        self.sources += [attrs["src"]] if "src" in attrs else []
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def small_page(four):
    """The report of one run alone."""
    assert main(["report", str(four / "runs/b-1"), "-o", str(four / "small")]) == 0
    return four / "small"


@pytest.fixture(scope="module")
def page(four):
    out = four / "page"
    assert main(["report", *sorted(map(str, (four / "runs").iterdir())), "-o", str(out)]) == 0
    return out


FIGURES = {
    "learning", "spread", "clients", "against", "bytes", "flops", "seconds", "loss", "drift", *curves.DIAGNOSIS,
    "lowrank-1", "lowrank-3", "similarity-1", "similarity-2", "partition-1", "partition-2",
}  # fmt: skip


def test_a_page_names_nothing_outside_of_itself(page):
    text = (page / "report.html").read_text()
    read = Page(text)
    assert not read.open and not read.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert read.links and all(link.startswith("#") and link[1:] in read.ids for link in read.links)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in read.sources)
    assert not re.search(r"url\(|@import|https?:", text)
    for source in read.sources:
        picture = b64decode(source.partition(",")[2]).decode()
        outside = re.findall(r'(?:href|src)="(?!#|data:image/png;base64)[^"]*"', picture)
        assert outside == []


def test_no_figure_is_empty(page):
    from matplotlib.image import imread

    files = {path.name for path in (page / "figures").iterdir()}
    assert files == {f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf")}
    for name in FIGURES:
        pixels = imread(page / "figures" / f"{name}.png")[..., :3]
        assert (pixels.min(-1) < 0.9).mean() > 0.005, name
        assert (page / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    sources = Page((page / "report.html").read_text()).sources
    assert len(sources) == len(FIGURES)
    for source in sources:
        picture = ET.fromstring(b64decode(source.partition(",")[2]))
        drawn = [
            element for element in picture.iter() if element.tag.endswith(("path", "use", "image"))
        ]
        assert len(drawn) > 20


def test_every_table_is_there_in_every_form(page):
    names = ("accuracy", "settings", "against", "costs", "seconds", "lowrank", "runs")
    files = {path.name for path in (page / "tables").iterdir()}
    assert files == {f"{name}.{kind}" for name in names for kind in ("csv", "md", "tex")} | {
        "rounds.csv",
        "clients.csv",
    }
    assert len((page / "tables/rounds.csv").read_text().splitlines()) == 1 + 6 * 2
    assert len((page / "tables/clients.csv").read_text().splitlines()) == 1 + 6 * CLIENTS


# figures of b-1
ALONE = {"learning", "spread", "clients", "flops", "seconds", "loss", "similarity-1", "partition"}


def files(folder, but=()):
    """{path in the folder: bytes} of all files."""
    every = (path for path in folder.rglob("*") if path.is_file() and path.name not in but)
    return {path.relative_to(folder): path.read_bytes() for path in every}


def test_a_report_again_leaves_nothing_of_the_one_before_and_has_the_users_settings_of_matplotlib_nowhere(
    page, small_page, four, tmp_path, capsys
):
    import matplotlib

    out = tmp_path / "again"
    shutil.copytree(page, out)
    (out / "figures/mine.txt").write_text("kept")
    with matplotlib.rc_context({"font.size": 30}):
        assert main(["report", str(four / "runs/b-1"), "-o", str(out)]) == 0
        assert matplotlib.rcParams["font.size"] == 30
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{out / 'report.html'}: {len(ALONE)} figures and 4 tables of 1 run, ")
    assert {path.stem for path in (out / "figures").iterdir()} == ALONE | {"mine"}
    assert files(out, but=["mine.txt"]) == files(small_page)


@pytest.mark.thorough
def test_a_large_report_again_is_the_same(page, small_page, four, tmp_path, capsys):
    out = tmp_path / "again"
    shutil.copytree(small_page, out)
    assert main(["report", *sorted(map(str, (four / "runs").iterdir())), "-o", str(out)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        f"{out / 'report.html'}: {len(FIGURES)} figures and 7 tables of 6 runs, "
    )
    assert files(out) == files(page)


def test_figures_are_the_same_drawn_on_one_core_and_on_three(tmp_path, monkeypatch):
    drawn = []
    for cores in (1, 3):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        with plot_style():
            figures = write.collect_content(
                write.read_logs([write_run(tmp_path / str(cores) / "a", [0.2] * 3, [0.5] * 3)])
            ).figures
            drawn.append(render_files(figures[:4]))
    assert len(drawn[0]) == 4 and drawn[0] == drawn[1]


def test_a_page_says_what_a_reader_must_know(tmp_path):
    runs = [
        write_run(tmp_path / "a", [0.5] * 3, rounds=9),
        write_run(tmp_path / "b", [0.2] * 3, [0.4] * 3, rounds=9, seed=2),
    ]
    runs += [
        write_run(tmp_path / "twin", [0.5] * 3, rounds=9),
        write_run(tmp_path / "c", [0.75] * 3, algorithm="my:<Own>"),
    ]
    with plot_style():
        content = write.collect_content(write.read_logs(runs))
    said = " ".join(content.notes)
    assert "FedAvg, rounds 9: its seeds are at different rounds (1, 2)" in said
    assert f"Not done yet: {runs[0]} (1 of 9), {runs[1]} (2 of 9)." in said
    assert f"{runs[2]} is left out: the same settings and seeds as {runs[0]}." in said
    top = (
        "Highest final accuracy, mean over clients: <Own>, rounds 1 with 75.00 % (one seed), "
        "30.00 points above FedAvg, rounds 9 ("
    )
    text = write.render_page(content, {drawn.name: b"" for drawn in content.figures}, [])
    assert write.summarize(content.run_groups.groups).startswith(top)
    assert "&lt;Own&gt;" in text and "<Own>" not in text
    assert "3 clients, 1 to 2 seeds per setting, 1 to 2 rounds." in text
    assert "mean over 3 clients and 1 to 2 seeds" in content.figures[0].caption
    # the rule in its own words, not its name in a config
    assert "Every client draws the same number of samples" in content.figures[-1].caption


def test_runs_of_which_no_round_was_evaluated_have_a_page(tmp_path, capsys):
    assert (
        main(["report", str(write_run(tmp_path / "a", [np.nan] * 3)), "-o", str(tmp_path / "page")])
        == 0
    )
    text = (tmp_path / "page/report.html").read_text()
    assert (
        "No round was evaluated yet." in text
        and "Training loss" in text
        and "Learning curves" not in text
    )


def refused(capsys, *line):
    assert main(["report", *map(str, line)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    run, out = write_run(tmp_path / "a", [0.5] * 3), tmp_path / "out"
    assert "/b: has no round yet; leave it out" in refused(
        capsys, run, write_run(tmp_path / "b"), "-o", out
    )
    assert "not a run folder" in refused(capsys, run, tmp_path, "-o", out)
    assert "has other files and no report of ours; give a new folder" in refused(
        capsys, run, "-o", run
    )
    out.mkdir()
    assert "no run is left to report on" in refused(capsys, out, "-o", out)
    out.rmdir()
    assert "is a file; give a folder" in refused(capsys, run, "-o", run / "log.h5")
    assert not out.exists()
    (tmp_path / "forged").mkdir()
    forged = '<meta name="fedlora-mpi" content="../a/log.h5 figures/../../a/log.h5 tables/x.csv">'
    (tmp_path / "forged/report.html").write_text(forged)
    with pytest.raises(ValueError, match="is not a plain file name"):
        write._earlier_files(tmp_path / "forged")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'fedlora-mpi[analysis]'" in refused(capsys, run, "-o", out)


def test_a_table_is_safe_in_every_form():
    columns = [Column("a", "a_b / %"), Column("n", "n", format_percent, marks_best=True)]
    rows = [
        {"a": "x_1|<b>&", "n": Stat(0.5, 0.25)},
        {"a": "y", "n": None},
        {"a": "z", "n": Stat(0.125, np.nan)},
    ]
    table = Table("t", "T & co", "50 % <of> it.", columns, rows)
    assert table.csv() == "a,n_mean,n_std\nx_1|<b>&,0.5,0.25\ny,,\nz,0.125,\n"
    assert "| y | - |\n| z | 12.50 |" in table.markdown()
    assert "| x_1\\|<b>& | **50.00 ± 25.00** |" in table.markdown()
    assert (
        r"x\_1|<b>\& & \textbf{50.00 $\pm$ 25.00} \\" in table.latex()
        and r"a\_b / \%" in table.latex()
    )
    assert "x_1|&lt;b&gt;&amp;" in table.html() and "<of>" not in table.html()


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_opens_a_page_without_a_complaint(page, tmp_path):
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--enable-logging=stderr",
    ]
    line = [
        BROWSER,
        *flags,
        "--virtual-time-budget=2000",
        "--dump-dom",
        Path(page / "report.html").as_uri(),
    ]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and ended.stdout.count("<figure") == len(FIGURES)
    assert not [said for said in ended.stderr.splitlines() if "CONSOLE" in said]


def test_groups_know_the_selectors_of_the_config():
    from fedlora_mpi import config

    said = {f"{block}.{name}" for block, name in groups.SELECTORS.items()}
    assert said == {f"{block}.{choice.selectors[0]}" for block, choice in config.CHOICES.items()}


def test_settings_that_change_no_number_make_no_other_label():
    faster = "engine.graphs=true", "engine.personal=disk", "engine.path=streams"
    settings = [configs.resolved_dict(tiny_config(*more)) for more in ((), faster, ("seed=2",))]
    assert len(set(run_labels(settings))) == 1
