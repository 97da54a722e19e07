"""``reproduce table6``: the paper's numbers, what each run is, which texts it reads, and the
command from end to end.
"""

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlora_mpi import config as configs
from fedlora_mpi.cli import main
from fedlora_mpi.reproduce import agnews_row as agnews
from fedlora_mpi.reproduce import paper, showing
from fedlora_mpi.reproduce.agnews_row import DATA, LABELS, TABLE_NAME, AgNewsCase
from fedlora_mpi.reproduce.grid import make_job
from fedlora_mpi.reproduce.registry import TABLES, table_entries
from fedlora_mpi.reproduce.request import Request
from fedlora_mpi.reproduce.sheet import Cell, comparison_sheet

CONFIGS = Path(__file__).parents[1] / "configs"
SIZES = ("full", "small")


TEXTS = AgNewsCase(DATA)


def run_of(key, scale="full", case=TEXTS, seed=1):
    """The config of one run."""
    size = case.scale_sizes(scale)
    (entry,) = table_entries(TABLE_NAME, case, size, [key])
    return make_job(
        entry, case, seed, scale=size, rounds=size.rounds, root="~/data", folder=Path("/out/table6")
    ).config


# The paper.


def test_the_published_numbers_are_the_printed_ones():
    means = {
        data: [paper.TABLE6[name][data].mean for name in LABELS]
        for data in ("ag_news", "imagenet_subset")
    }
    assert means == {
        "ag_news": [89.36, 90.76, 91.38, 91.79],
        "imagenet_subset": [18.55, 29.37, 32.45, 35.67],
    }
    assert all(np.isnan(v.std) for row in paper.TABLE6.values() for v in row.values())
    assert list(paper.TABLE6) == list(LABELS)


def test_a_row_is_published_for_the_papers_alpha_alone():
    said = {
        e.label: e.published
        for e in table_entries(TABLE_NAME, AgNewsCase(DATA), agnews.SMALL_SCALE)
    }
    assert said == {label: paper.TABLE6[name][DATA] for name, label in LABELS.items()}
    assert not any(
        e.published for e in table_entries(TABLE_NAME, AgNewsCase(DATA, 0.1), agnews.SMALL_SCALE)
    )


def test_a_number_without_a_deviation_is_shown_without_one():
    cells = [
        Cell.from_results(entry, [])
        for entry in table_entries(TABLE_NAME, AgNewsCase(DATA), agnews.SMALL_SCALE)
    ]
    made = comparison_sheet("Title", "", [], cells, 1, TABLES[TABLE_NAME].std_note)
    assert made.rows[1] == ("FedAvg", "0/1", "-", "-", "89.36", "-")
    assert (
        made.notes[1]
        == "one seed, so no standard deviation; the paper's has none, and does not say over how "
        "many seeds"
    )


# The grid.


@pytest.mark.parametrize("scale", SIZES)
@pytest.mark.parametrize("key", LABELS)
def test_every_run_has_a_valid_config(key, scale, tmp_path):
    run = run_of(key, scale, AgNewsCase(DATA, train_file="part.csv"), seed=3)
    (tmp_path / "alone.yaml").write_text(configs.resolved_yaml(run))
    assert configs.read(tmp_path / "alone.yaml") == run
    assert (run.seed, run.data.partition.seed, run.data.source.text.train) == (3, 3, "part.csv")


@pytest.mark.parametrize("key", LABELS)
def test_a_run_at_full_scale_is_the_config_of_the_repository(key):
    more = [] if key == "fedlora" else [f"algorithm={key}"]
    there, here = configs.read(CONFIGS / "agnews.yaml", more), run_of(key)
    assert replace(here, output=there.output, checkpoint=there.checkpoint) == there


def test_the_small_scale_has_the_same_network_words_and_low_rank_parts():
    full, small = run_of("fedlora"), run_of("fedlora", "small")
    assert (small.model, small.data.source) == (full.model, full.data.source)
    assert replace(small.algorithm, lora_epochs=2) == full.algorithm
    assert (small.algorithm.lora_epochs, small.train.epochs, small.train.lr) == (
        1,
        3,
        full.train.lr,
    )


def test_sizes_that_the_paper_does_not_say_are_not_called_the_papers():
    said = showing._difference_note(Request(TABLE_NAME), AgNewsCase(DATA))
    assert "batch_size 20 (full scale 50)" in said and "(paper" not in said
    assert showing._difference_note(Request(TABLE_NAME, scale="full"), AgNewsCase(DATA)) == ""


def test_the_imagenet_row_is_a_config_with_the_papers_sizes():
    config = configs.read(CONFIGS / "imagenet_subset.yaml")
    split = config.data.partition
    assert (split.clients * split.train, split.train, split.alpha) == (80_000, 2000, 0.1)
    assert (config.model.mix[0].name, config.data.source.dataset) == ("resnet10", "folder")
    said = (CONFIGS / "imagenet_subset.yaml").read_text()
    assert all(
        f"{LABELS[name]} {row['imagenet_subset'].mean}" in said
        for name, row in paper.TABLE6.items()
    )


# What is asked.


def test_the_table_has_its_own_data_set_and_alpha():
    assert Request(TABLE_NAME).cases == [AgNewsCase("ag_news", 1.0, "train.csv")]
    assert Request(TABLE_NAME, alpha=(0.1, 1.0), text_train="part.csv").cases == [
        AgNewsCase(DATA, a, "part.csv") for a in (0.1, 1.0)
    ]
    assert (
        AgNewsCase(DATA).data_difference == ""
        and "part.csv" in AgNewsCase(DATA, train_file="part.csv").data_difference
    )


@pytest.mark.parametrize(
    "asked, complaint",
    [
        (
            [TABLE_NAME, "--data", "cifar10"],
            "--data = cifar10: table6 has ag_news; .* configs/imagenet_subset.yaml",
        ),
        (
            ["table1", "--data", "ag_news"],
            "--data = ag_news: table1 has cifar10, cifar100, tiny_imagenet",
        ),
        (["pfedlora", "--data", "ag_news"], "--data = ag_news: pfedlora has cifar10, cifar100"),
        (["table1", "--text-train", "part.csv"], "--text-train: table1 has no such choice"),
    ],
)
def test_a_data_set_of_another_table_is_refused(asked, complaint, capsys):
    assert main(["reproduce", *asked]) == 2
    assert re.search(complaint, capsys.readouterr().err)


# The command.


@pytest.fixture
def root(tmp_path):
    """AG_NEWS/part.csv and test.csv with 4 * 40 and 4 * 20 texts; there is no train.csv."""
    words = {1: "war peace", 2: "goal match", 3: "bank price", 4: "atom chip"}
    (tmp_path / "AG_NEWS").mkdir()
    for name, number in (("part.csv", 40), ("test.csv", 20)):
        with open(tmp_path / "AG_NEWS" / name, "w", newline="") as file:
            csv.writer(file).writerows(
                (c, f"Title {n}", words[c]) for n in range(number) for c in words
            )
    return tmp_path


def test_the_command_reads_the_training_texts_that_are_named(carried, root, monkeypatch, capsys):
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(
        agnews,
        "SMALL_SCALE",
        agnews.SMALL_SCALE._replace(clients=3, train=10, test=5, batch_size=5),
    )
    alone = [
        "--text-train",
        "part.csv",
        "--root",
        str(root),
        "-o",
        str(root / "out"),
        "--methods",
        "fedlora",
    ]
    assert main(["reproduce", TABLE_NAME, "--rounds", "1", *alone]) == 0
    assert "FedLoRA    1/1" in capsys.readouterr().out
    assert (
        "training texts of part.csv (paper all 120,000)."
        in (root / "out" / TABLE_NAME / "ag_news-alpha1.md").read_text()
    )
    (run,) = (root / "out" / TABLE_NAME / "ag_news-alpha1").glob("*.yaml")
    assert run.read_text().startswith(
        "# Table 6: a Transformer on AG_NEWS: FedLoRA, ag_news, alpha 1, seed 1.\n"
    )
    assert "91.79 % (best round, full scale)" in run.read_text()
    (row,) = csv.DictReader((root / "out" / TABLE_NAME / "ag_news-alpha1.csv").open())
    assert (row["label"], row["paper_mean"], row["paper_std"]) == ("FedLoRA", "91.79", "")
