"""``reproduce pfedlora``: what each run is, what reaching a target costs, and the command from end
to end.
"""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlora_mpi import config as configs
from fedlora_mpi.cli import main
from fedlora_mpi.data.partition import Shares
from fedlora_mpi.models.zoo import BUILDERS
from fedlora_mpi.reproduce import costs, picture, showing
from fedlora_mpi.reproduce.carrying_out import reproduce_grid
from fedlora_mpi.reproduce.costs import Cost, Curve
from fedlora_mpi.reproduce.fedlora_tables import DirichletCase
from fedlora_mpi.reproduce.grid import Entry, Job, make_job
from fedlora_mpi.reproduce.pfedlora_table import (
    LABELS,
    NUM_CLASSES,
    NUM_FEATURES,
    TABLE_NAME,
    ClientCounts,
    implied_by_claims,
)
from fedlora_mpi.reproduce.registry import TABLES as ALL
from fedlora_mpi.reproduce.registry import table_entries
from fedlora_mpi.reproduce.request import Request
from fedlora_mpi.reproduce.results import Result
from fedlora_mpi.reproduce.sheet import Cell

CASES = [(data, clients) for data in ("cifar10", "cifar100") for clients in (10, 50, 100)]


def run_of(case, key="local", scale="full", seed=1):
    """The config of one run."""
    size = case.scale_sizes(scale)
    (entry,) = table_entries(TABLE_NAME, case, size, [key])
    return make_job(
        entry, case, seed, scale=size, rounds=size.rounds, root="data", folder=Path("/out/pfedlora")
    ).config


# The grid.


def test_the_folders_of_the_fedlora_tables_keep_their_names():
    case = DirichletCase("cifar100", 0.5)
    (entry,) = table_entries("table1", case, case.scale_sizes("small"), ["fedavg"])
    made = make_job(
        entry,
        case,
        3,
        scale=case.scale_sizes("small"),
        rounds=20,
        root="data",
        folder=Path("/out/table1"),
    )
    assert made.config.output == "/out/table1/cifar100-alpha0.5/fedavg-seed3"


@pytest.mark.parametrize("data, clients", CASES)
@pytest.mark.parametrize("scale", ["small", "full"])
def test_every_method_of_a_cell_has_a_valid_config(data, clients, scale, tmp_path):
    case = ClientCounts(data, clients)
    found = table_entries(TABLE_NAME, case, case.scale_sizes(scale))
    assert [entry.key for entry in found] == [name for name in LABELS if name != "fedavg"]
    for entry in found:
        run = run_of(case, entry.key, scale)
        (tmp_path / "alone.yaml").write_text(configs.resolved_yaml(run))
        assert configs.read(tmp_path / "alone.yaml") == run


@pytest.mark.parametrize("clients, part", [(10, 1.0), (50, 0.2), (100, 0.1)])
def test_a_run_at_full_scale_is_the_authors_experiment(clients, part):
    run = run_of(ClientCounts("cifar100", clients), seed=2)
    split = run.data.partition
    assert (run.participation, run.rounds, run.seed, split.seed) == (part, 500, 2, 2)
    assert isinstance(split, Shares) and (split.train, split.test, split.validation) == (0, 0, 0.2)
    assert (split.clients, split.classes_per_client) == (clients, 10)
    assert run_of(ClientCounts("cifar10", clients)).data.partition.classes_per_client == 2
    assert (run.train.epochs, run.train.batch_size, run.train.lr) == (10, 512, 0.01)
    assert (run.train.momentum, run.train.weight_decay) == (0.9, 1e-3)
    assert run.output == f"/out/pfedlora/cifar100-clients{clients}/local-seed2"


def test_client_k_has_network_k_mod_5_or_all_have_the_first():
    mixed, same = (
        run_of(ClientCounts("cifar10", 50, homogeneous)) for homogeneous in (False, True)
    )
    assert [network.name for network in mixed.model.mix] == [f"cnn{n}" for n in range(1, 6)]
    assert mixed.model.network_of_clients(50)[:7] == (0, 1, 2, 3, 4, 0, 1)
    assert [network.name for network in same.model.mix] == ["cnn1"]
    assert same.output == "/out/pfedlora/cifar10-clients50-cnn1/local-seed1"


def test_fedavg_is_there_where_all_networks_are_equal():
    def keys(homogeneous):
        return [
            e.key
            for e in table_entries(
                TABLE_NAME,
                ClientCounts("cifar10", 10, homogeneous),
                ClientCounts("cifar10", 10).scale_sizes("small"),
            )
        ]

    assert set(keys(True)) - set(keys(False)) == {"fedavg"}
    assert run_of(ClientCounts("cifar10", 50, True), "fedavg").participation == 0.2


@pytest.mark.parametrize("scale", ["small", "full"])
def test_fedkds_schedule_is_as_long_as_the_run(scale):
    run = run_of(ClientCounts("cifar10", 10), "fedkd", scale)
    assert run.algorithm.energy_rounds == run.rounds


def test_a_further_method_takes_part_as_the_others_do():
    assert run_of(ClientCounts("cifar10", 100), "local_lora").participation == 0.1


def test_a_cell_with_few_samples_of_more_classes_has_a_name_of_its_own():
    few = ClientCounts("cifar10", 50, classes=4, samples=50)
    assert few.name == "cifar10-clients50-classes4-samples50"
    assert few.description.endswith("five CNNs, 4 classes a client, 50 samples a client")
    assert few.data_difference == "classes per client 4 (paper 2)"
    run = run_of(few, scale="small")
    split = run.data.partition
    assert (split.clients, split.classes_per_client, split.train) == (50, 4, 50)
    # 4 epochs of 5 batches: as many steps a round as the authors' 10 epochs of 800 samples
    assert (run.participation, run.train.batch_size, run.train.epochs) == (0.2, 10, 4)
    at_full_scale = run_of(few).train
    assert (at_full_scale.batch_size, at_full_scale.epochs) == (10, 10)
    assert ClientCounts("cifar10", 50, classes=2).name == "cifar10-clients50"


def test_each_place_and_rank_of_the_adapter_is_a_row_of_pfedlora():
    case = ClientCounts("cifar10", 10, False, None, None, ("matrix", "alone"), (8, 64))
    rows = table_entries(TABLE_NAME, case, case.scale_sizes("small"), [TABLE_NAME, "fd"])
    suffixes = ["", "-rank64", "-alone", "-alone-rank64"]
    assert [row.key for row in rows] == ["fd", *(TABLE_NAME + suffix for suffix in suffixes)]
    assert rows[-1].label == "pFedLoRA, adapter alone, rank 64"
    algorithm = run_of(case, rows[-1].key).algorithm
    assert (algorithm.adapter, algorithm.lora_rank) == ("alone", 64)
    # a table without the default row does not bring it back
    case = replace(case, adapter_places=("alone",), adapter_ranks=())
    rows = table_entries(TABLE_NAME, case, case.scale_sizes("small"), [TABLE_NAME])
    assert [row.key for row in rows] == ["pfedlora-alone"]


def test_the_row_of_the_default_adapter_keeps_its_run():
    case = ClientCounts("cifar10", 10)
    assert run_of(replace(case, adapter_ranks=(8,)), TABLE_NAME) == run_of(case, TABLE_NAME)


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"classes": 0}, "--classes = 0: must be from 1 to 10, the classes of cifar10"),
        ({"classes": 11}, "--classes = 11: must be from 1 to 10"),
        ({"classes": 4, "samples": 3}, "--samples = 3: must be at least 4, one for each class"),
        ({"samples": 0}, "--samples = 0: must be at least 2"),
        ({"adapter_ranks": (8, 0)}, "--adapter-rank = 0: must be at least 1"),
    ],
)
def test_a_cell_that_cannot_be_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        ClientCounts("cifar10", 50, **choices)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["table1", "--samples", "50"], "--samples: table1 has no such choice"),
        (["fedhl", "--classes", "4"], "--classes: fedhl has no such choice"),
        (["table3", "--adapter-rank", "64"], "--adapter-rank: table3 has no such choice"),
        (["table6", "--adapter", "alone"], "--adapter: table6 has no such choice"),
        (["table1", "--clients", "10"], "--clients: table1 has no such choice"),
        (["fig4", "--homogeneous"], "--homogeneous: fig4 has no such choice"),
        (["table2", "--target", "80"], "--target: table2 has no such choice"),
        (["pfedlora", "--alpha", "0.1"], "--alpha: pfedlora has no such choice"),
        (
            ["pfedlora", "--data", "tiny_imagenet"],
            "--data = tiny_imagenet: pfedlora has cifar10, cifar100",
        ),
    ],
)
def test_a_choice_of_the_other_paper_is_refused(arguments, message, tmp_path, capsys):
    assert main(["reproduce", *arguments, "--collect", "-o", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_cells_and_seeds_by_default():
    def cells(scale):
        return [
            (case.data, case.clients)
            for case in Request(TABLE_NAME, data=("cifar10", "cifar100"), scale=scale).cases
        ]

    assert cells("full") == CASES
    assert cells("small") == [("cifar10", 10), ("cifar100", 10)]


# The arithmetic.


def result(key, seed, accuracies, clients=((90.0, 70.0, 80.0),), up=3, down=1, flops=10):
    """A finished run: percentages, and what each round of 2 clients costs."""
    length = len(accuracies)
    each = {"bytes_up": up, "bytes_down": down, "flops": flops, "clients": 2}
    columns = {"round": np.arange(1, length + 1), "accuracy": np.array(accuracies) / 100}
    columns |= {name: np.full(length, value) for name, value in each.items()}
    name = key.partition("-")[0]
    entry = Entry(key, key.replace(name, LABELS[name]), {"name": name})
    best = np.repeat(np.array(clients) / 100, length, axis=0)
    return Result(Job(entry, ClientCounts("cifar10", 10), seed, None), columns, {"accuracy": best})


def shown(*results):
    """(cells, results by method) of runs."""
    by = {}
    for found in results:
        by.setdefault(found.job.entry.key, []).append(found)
    return [Cell.from_results(found[0].job.entry, found) for found in by.values()], by


@pytest.mark.parametrize(
    "target, spent",
    [
        (50.0, (1, 4, 10)),
        (50.5, (2, 8, 20)),
        (62.0, (2, 8, 20)),
        (63.0, (4, 16, 40)),
        (64.5, (np.nan,) * 3),
    ],
)
def test_a_target_costs_all_up_to_the_first_round_that_reaches_it(target, spent):
    curve = Curve.from_result(result("local", 1, [50.0, 62.0, 58.0, 64.0]))
    np.testing.assert_equal(curve.cost_until(target), Cost(*map(float, spent)))


def test_costs_that_change_from_round_to_round_are_added_up():
    run = result("local", 1, [10.0, 20.0, 30.0])
    run.rounds.update(
        bytes_up=np.array([1, 2, 4]), bytes_down=np.array([8, 16, 32]), flops=np.array([3, 5, 7])
    )
    assert Curve.from_result(run).cost_until(20.0) == (2, 27, 8) and Curve.from_result(
        run
    ).cost_until(30.0) == (3, 63, 15)


def test_the_cost_is_the_mean_over_seeds_and_unknown_when_one_never_gets_there():
    runs = [result("fd", 1, [50.0, 60.0, 70.0]), result("fd", 2, [50.0, 55.0, 60.0])]
    assert costs.mean_cost_until(runs, 60.0) == (2.5, 10, 25)
    assert (
        np.isnan(costs.mean_cost_until(runs, 65.0)).all()
        and np.isnan(costs.mean_cost_until([], 50.0)).all()
    )


def test_the_common_target_is_reached_by_all_but_those_that_fail():
    _, by = shown(
        result(TABLE_NAME, 1, [80.0, 84.567]),
        result(TABLE_NAME, 2, [79.0, 82.0]),
        result("fd", 1, [74.0, 75.678]),
        result("fml", 1, [30.0]),
    )
    percent, failed = costs.common_target(by)
    assert (percent, failed) == (75.67, ["fml"])
    for key in (TABLE_NAME, "fd"):
        assert costs.mean_cost_until(by[key], percent).rounds >= 1
    assert np.isnan(costs.common_target({"fd": []})[0])


def test_ratios_are_to_pfedlora_and_the_claims_are_beside_them():
    cells, by = shown(
        result("local", 1, [60.0, 70.0], up=0, down=0, flops=10),
        result("fedproto", 1, [40.0, 50.0, 60.0], up=10, down=20, flops=50),
        result(TABLE_NAME, 1, [50.0, 65.0], up=3, down=1, flops=20),
        result("fml", 1, [10.0]),
    )
    made = costs.target_sheet("Title", "", ["why"], cells, by, 60.0)
    assert made.rows[0] == (
        "",
        "rounds",
        "MB",
        "TFLOP",
        "rounds / pfedlora",
        "bytes / pfedlora",
        "flops / pfedlora",
    )
    ratios = {row[0]: row[4:] for row in made.rows[1:]}
    assert ratios["Standalone"] == ("0.5", "0", "0.25")
    # 3 * 30 / (2 * 4) bytes, 3 * 50 / (2 * 20) FLOPs
    assert ratios["FedProto"] == ("1.5", "11.2", "3.75")
    assert ratios["pFedLoRA"] == ("1", "1", "1") and ratios["FML"] == ("-", "-", "-")
    assert "the paper 11.81 and 7.41 times less" in made.notes[0]
    assert "Standalone takes 0.25 and 0 times, FedProto takes 3.75 and 11.2 times" in made.notes[0]
    record = next(row for row in made.records if row["entry"] == "fedproto")
    assert (record["rounds"], record["bytes"], record["flops"], record["bytes_ratio"]) == (
        3,
        90,
        150,
        11.25,
    )


def test_accuracy_is_compared_with_the_best_baseline_and_the_claim():
    cells, _ = shown(
        result("local", 1, [70.0, 69.0]),
        result("fd", 1, [72.0]),
        result(TABLE_NAME, 1, [73.5, 73.0]),
    )
    made = costs.accuracy_sheet("Title", "", [], cells, 1)
    assert made.rows[1:] == [
        ("Standalone", "1/1", "70.00", "69.00", "+3.50"),
        ("FD", "1/1", "72.00", "72.00", "+1.50"),
        ("pFedLoRA", "1/1", "73.50", "73.00", ""),
    ]
    assert made.notes[0].startswith("ahead of the best baseline: the paper +1.35, here +1.50 (FD)")


def test_the_claims_alone_tell_the_rounds_and_the_size_of_the_adapter():
    # until the target FedProto's T rounds cost 11.81 times the FLOPs and 7.41 times the numbers of
    # one round of pFedLoRA, whose FLOPs are c times FedProto's and whose numbers are n
    for data, held, known in (("cifar10", 2, 10), ("cifar100", 10, 100)):
        for c in (1.0, 1.5):
            n, flops_ratio, T = implied_by_claims(data, c)
            assert T * 1 / c == pytest.approx(11.81) and flops_ratio == c
            assert T * (held * 500 + known * 500) / (n + n) == pytest.approx(7.41)
    assert round(implied_by_claims("cifar10", 1.0).numel) == 4781
    assert round(implied_by_claims("cifar100", 1.0).numel) == 43829


def test_the_claims_count_the_classes_and_features_of_the_runs():
    for data in ("cifar10", "cifar100"):
        for network in run_of(ClientCounts(data, 10)).model.mix:
            head = BUILDERS[network.name](NUM_CLASSES[data], (3, 32, 32))[-1]
            assert (head.in_features, head.out_features) == (NUM_FEATURES, NUM_CLASSES[data])


def test_our_adapters_are_beside_what_the_claims_imply():
    cells, by = shown(
        result("fedproto", 1, [40.0, 50.0, 60.0], flops=50),
        result(TABLE_NAME, 1, [50.0, 65.0], up=8 * 4080, flops=60),
        result(TABLE_NAME + "-rank64", 1, [20.0, 30.0], up=8 * 32640, flops=75),
    )
    made = costs.claims_sheet("Title", "", "cifar10", cells, by, [60.0, 30.0])
    assert made.rows[0][3:] == (
        "rounds of FedProto / its, 60 %",
        "rounds of FedProto / its, 30 %",
    )
    assert made.rows[1:] == [
        ("the paper's claims", "4,781 to 6,375", "1 to 1.33", *["11.8 to 15.7"] * 2),
        ("pFedLoRA", "4,080", "1.2", "1.5", "1"),
        ("pFedLoRA-rank64", "32,640", "1.5", "-", "0.5"),
    ]
    record = made.records[-1]
    assert (record["target"], record["numel"], record["rounds_ratio"]) == (30, 32640, 0.5)


def test_rows_with_other_adapters_are_no_baselines_and_the_first_row_is_pfedlora():
    cells, by = shown(
        result("fd", 1, [70.0, 69.0], [(70, 70, 70)]),
        result(TABLE_NAME, 1, [71.0], [(71, 71, 71)]),
        result(TABLE_NAME + "-rank64", 1, [75.0], [(80, 75, 70)]),
    )
    made = costs.accuracy_sheet("Title", "", [], cells, 1)
    assert made.notes[0].endswith("here +1.00 (FD); pFedLoRA-rank64: +5.00")
    assert made.notes[-1] == "pfedlora: the row pFedLoRA"
    assert [row[-1] for row in made.rows[1:]] == ["+1.00", "", "-4.00"]
    assert costs.client_gains(cells, by)[1].tolist() == pytest.approx([1, 1, 1])
    # without the default adapter, its first row is compared
    del by[TABLE_NAME]
    gains = costs.client_gains([cell for cell in cells if cell.entry.key in by], by)
    assert gains[1].tolist() == pytest.approx([10, 5, 0])


def test_the_gain_of_each_client_is_over_the_best_baseline():
    cells, by = shown(
        result("local", 4, [80.0], [(100, 100, 40)]),
        result("fd", 4, [81.0], [(80, 90, 73)]),
        result(TABLE_NAME, 4, [82.0], [(90, 90, 66)]),
        result(TABLE_NAME, 5, [82.0], [(90, 90, 66)]),
    )
    assert costs.best_baseline(cells).entry.key == "fd"
    made = costs.client_gains_sheet("Title", "", [], cells, by)
    assert made.rows[1:] == [("4", "3", "1", "1", "1", "+1.00", "+10.00", "-7.00")]
    assert [round(row["difference"], 6) for row in made.records] == [10, 0, -7]


def test_the_overview_has_methods_down_and_cases_across():
    first, second = (
        shown(result("local", 1, [70.0]), result(TABLE_NAME, 1, [71.0])),
        shown(result(TABLE_NAME, 1, [60.0])),
    )
    made = costs.overview_sheet("Title", "", [], {"a": first[0], "b": second[0]}, 1)
    assert made.rows == [
        ("", "a", "b"),
        ("Standalone", "70.00", ""),
        ("pFedLoRA", "71.00", "60.00"),
    ]


# Pictures.


def test_a_curve_is_the_mean_over_seeds_and_what_costs_nothing_has_none():
    cells, by = shown(
        result("local", 1, [60.0, 70.0], up=0, down=0),
        result(TABLE_NAME, 1, [50.0, 60.0]),
        result(TABLE_NAME, 2, [60.0, 80.0]),
    )

    def labels(cost):
        return [
            line.get_label()
            for line in picture.accuracy_by_cost(cost, cells, by, "Title").axes[0].lines
        ]

    assert labels("rounds") == labels("flops") == ["Standalone", "pFedLoRA"] and labels(
        "bytes"
    ) == ["pFedLoRA"]
    (line,) = picture.accuracy_by_cost("bytes", cells, by, "Title").axes[0].lines
    assert line.get_xdata() == pytest.approx([4e-6, 8e-6]) and line.get_ydata() == pytest.approx(
        [55.0, 70.0]
    )


def test_a_bar_is_drawn_for_each_client_and_seed_from_the_largest_gain():
    cells, by = shown(
        *(
            result(key, s, [50.0 + s], [(s, 5, k)])
            for s in (1, 2)
            for k, key in enumerate(("local", TABLE_NAME))
        )
    )
    heights = [bar.get_height() for bar in picture.gains_figure(cells, by, "Title").axes[0].patches]
    assert heights == pytest.approx([1, 1, 0, 0, 0, 0])


# The whole command.


def test_print_jobs_lists_all_cells(tmp_path, capsys):
    asked = [
        "reproduce",
        TABLE_NAME,
        "--print-jobs",
        "--scale",
        "full",
        "--data",
        "cifar10",
        "cifar100",
        "-o",
        str(tmp_path),
    ]
    assert main([*asked, "--methods", "local", TABLE_NAME]) == 0
    assert "--array=1-36" in capsys.readouterr().out  # 2 methods, 6 cells, 3 seeds
    folders = {path.name for path in (tmp_path / TABLE_NAME).iterdir() if path.is_dir()}
    assert folders == {f"{data}-clients{clients}" for data, clients in CASES}


def tiny(folder, case, key):
    """A run of a tenth of a second that stands for one of the table."""
    mapping = {
        "seed": 1,
        "rounds": 2,
        "participation": case.participation,
        "output": str(folder / TABLE_NAME / case.name / f"{key}-seed1"),
        "data": {
            "dataset": "synthetic",
            "synthetic": {"classes": 4, "train": 60, "test": 40, "size": 4},
            "partition": {"kind": "iid", "clients": 5, "train": 10, "test": 5},
        },
        "model": {
            "mix": [
                {"name": "cnn", "width": 3, "hidden": 5},
                {"name": "cnn", "width": 4, "hidden": 5},
            ]
        },
        "algorithm": {"name": key},
        "train": {"epochs": 1, "batch_size": 5, "lr": 0.05},
        "checkpoint": {"every": 1},
    }
    made = Job(
        Entry(key, LABELS[key], {"name": key}), case, 1, configs.from_dict(mapping, "tiny.yaml")
    )
    made.folder.parent.mkdir(parents=True, exist_ok=True)
    return made


def test_from_runs_to_tables_and_pictures_and_nothing_is_run_twice(carried, tmp_path, capsys):
    grid = [
        (case, [tiny(tmp_path, case, key) for key in ("local", TABLE_NAME)])
        for case in (ClientCounts("cifar10", 10), ClientCounts("cifar10", 50))
    ]
    asked = Request(TABLE_NAME, output=tmp_path, jobs=2)
    assert reproduce_grid(asked, grid) == 0
    out, err = capsys.readouterr()
    assert "4 runs, 0 done" in err
    assert (
        "ahead of the best baseline: the paper +1.35, here " in out
        and "11.81 and 7.41 times less" in out
    )
    home = tmp_path / TABLE_NAME
    for case, _ in grid:
        tables = [f"{case.name}{end}" for end in ("", "-target", "-claims", "-gains")]
        pictures = [f"{case.name}{end}" for end in ("-rounds", "-bytes", "-flops", "-gains")]
        assert all(
            (home / f"{name}{suffix}").is_file()
            for name in tables
            for suffix in (".txt", ".md", ".csv")
        )
        assert all((home / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in pictures)
    rows = list(csv.DictReader((home / "cifar10-clients10-target.csv").open()))
    assert (
        float(rows[0]["bytes"]) == 0
        and float(rows[1]["bytes"]) > 0
        and float(rows[1]["flops_ratio"]) == 1
    )
    assert (home / "overview.csv").is_file()
    claims = list(csv.DictReader((home / "cifar10-clients10-claims.csv").open()))
    # rank 8 beside a head of 5 features and 4 classes
    assert (claims[-1]["entry"], float(claims[-1]["numel"])) == (TABLE_NAME, 8 * (5 + 4))

    assert reproduce_grid(replace(asked, target=(0.0, 99.9)), grid) == 0
    out, err = capsys.readouterr()
    # err may hold what matplotlib has to say
    assert "runs, " not in err and "cost of 99.9 %" in out
    assert (home / "cifar10-clients50-target0.csv").is_file()


def test_at_full_scale_the_papers_target_is_there_as_well():
    case, (_, by) = ClientCounts("cifar100", 10), shown(result(TABLE_NAME, 1, [55.0]))

    def targets(**more):
        return showing._choose_targets(Request(TABLE_NAME, **more), case, by)

    assert {end: percent for end, (percent, _) in targets(scale="full").items()} == {
        "-target": 55.0,
        "-target50": 50.0,
    }
    assert list(targets()) == ["-target"] and list(targets(target=(40.0, 62.5))) == [
        "-target40",
        "-target62.5",
    ]


def test_collect_prints_the_table_before_anything_is_done(tmp_path, capsys):
    assert main(["reproduce", TABLE_NAME, "--collect", "-o", str(tmp_path)]) == 0
    assert "NOT the paper's experiment: train 400 (paper all)" in capsys.readouterr().out
    few = ["--samples", "50", "--classes", "4", "--scale", "full", "--clients", "10"]
    assert main(["reproduce", TABLE_NAME, *few, "--collect", "-o", str(tmp_path)]) == 0
    sizes = "train 50 (paper all), batch_size 10 (paper 512), classes per client 4 (paper 2)"
    assert f"NOT the paper's experiment: {sizes}" in " ".join(capsys.readouterr().out.split())
    assert {path.suffix for path in (tmp_path / TABLE_NAME).iterdir()} == {".txt", ".md", ".csv"}
    assert TABLE_NAME in ALL
