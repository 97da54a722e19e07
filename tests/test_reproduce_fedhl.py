"""``reproduce fedhl``: what each run and its backbone is, the numbers of its table, and the command
from end to end.
"""

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlora_mpi import config as configs
from fedlora_mpi.cli import main
from fedlora_mpi.models import zoo
from fedlora_mpi.reproduce import backbones
from fedlora_mpi.reproduce import fedhl_table as fedhl
from fedlora_mpi.reproduce.fedhl_table import (
    BACKBONES,
    LOGGED_COLUMNS,
    RANKS,
    TABLE_NAME,
    WIDTHS,
    FineTuningCase,
)
from fedlora_mpi.reproduce.grid import make_job
from fedlora_mpi.reproduce.registry import table_entries
from fedlora_mpi.reproduce.request import Request
from fedlora_mpi.reproduce.results import Result
from fedlora_mpi.reproduce.sheet import Cell

OUT = Path("/out/fedhl")
CASES = [(data, width) for data in BACKBONES for width in WIDTHS]
NETWORKS = [(data, network) for data, networks in BACKBONES.items() for network in networks]
METHODS = {
    "fedit",
    "flexlora",
    "fedhl",
    "fedex_lora",
    "flora",
    "hetlora",
    "ffa_lora",
    "rolora",
    "fed_rac_lora",
    "fed_talora",
}


def run_of(case, key, scale="small", seed=1):
    """A run."""
    size = case.scale_sizes(scale)
    (entry,) = table_entries(TABLE_NAME, case, size, [key])
    return make_job(entry, case, seed, scale=size, rounds=size.rounds, root="data", folder=OUT)


# The grid.


def test_all_cases_are_made_unless_some_are_named():
    names = {case.name for case in Request(TABLE_NAME).cases}
    assert names == {f"{d}-{w}-part{p}-alpha0.5" for d, w in CASES for p in ("1", "0.4")}
    (case,) = Request(
        TABLE_NAME,
        data=("ag_news",),
        width=("wide",),
        participation=(0.4,),
        alpha=(0.1,),
        text_train="x.csv",
    ).cases
    assert case == FineTuningCase(
        "ag_news", "wide", 0.4, Request(TABLE_NAME).table_folder, 0.1, "x.csv"
    )


def test_a_vit_is_asked_for_by_its_model():
    def names(**options):
        return {case.name for case in Request(TABLE_NAME, participation=(1.0,), **options).cases}

    vit = "cifar10-vit-part1-alpha0.5"
    assert names(model=("vit",)) == names(model=("vit",), data=("cifar10",)) == {vit}
    assert names(model=("cnn",)) == names() == {f"{d}-{w}-part1-alpha0.5" for d, w in CASES}
    assert names(model=("cnn", "vit")) == names() | {vit}
    both = names(model=("vit", "cnn"), width=("wide",), data=("cifar10",))
    assert both == {vit, "cifar10-wide-part1-alpha0.5"}


def test_clients_of_a_vit_adapt_q_and_v_of_every_block():
    case = FineTuningCase("cifar10", "vit", 1.0, OUT)
    network = run_of(case, "fedit").config.model.mix[0]
    model = zoo.build(network.name, network.options, 10, (3, 32, 32), 1)
    for entry in table_entries(TABLE_NAME, case, case.scale_sizes("small")):
        config = run_of(case, entry.key).config
        assert list(config.algorithm.adapted_shapes(model)) == [
            f"blocks.{k}.attention.in_proj_weight:{m}" for k in range(6) for m in "qv"
        ]
        assert max(RANKS) < 96  # no client's rank holds a whole slice


@pytest.mark.parametrize("data, width", NETWORKS)
@pytest.mark.parametrize("scale", ["small", "full"])
def test_every_method_has_a_valid_config(data, width, scale, tmp_path):
    case = FineTuningCase(data, width, 0.4, OUT)
    found = table_entries(TABLE_NAME, case, case.scale_sizes(scale))
    assert {entry.algorithm["name"] for entry in found} == METHODS
    for entry in found:
        run = run_of(case, entry.key, scale, seed=3).config
        (tmp_path / "alone.yaml").write_text(configs.resolved_yaml(run))
        assert configs.read(tmp_path / "alone.yaml") == run
        assert (run.participation, run.seed, run.data.partition.seed) == (0.4, 3, 3)
        assert run.model.mix[0].weights == str(OUT / f"{data}-{width}.safetensors")


def test_all_methods_have_the_same_ranks_and_scale_and_are_judged_by_the_servers_model():
    case = FineTuningCase("cifar10", "narrow", 1.0, OUT)
    for entry in table_entries(TABLE_NAME, case, case.scale_sizes("small")):
        algorithm = run_of(case, entry.key).config.algorithm
        clients = [algorithm.transport(client, 10).method for client in range(10)]
        assert tuple(max(client.lora_ranks) for client in clients) == RANKS
        assert {client.s for client in clients} == {algorithm.s} == {1.0}
        # whose clients all have the server's model
        assert algorithm.evaluate_on == "server" or entry.key == "fed_rac_lora"
        assert algorithm.diagnose


@pytest.mark.parametrize("data, width", NETWORKS)
def test_a_backbone_has_the_network_and_the_words_of_its_runs(data, width, monkeypatch):
    case = FineTuningCase(data, width, 1.0, OUT, train_file="part.csv")
    asked = []
    monkeypatch.setattr(backbones, "pretrain", lambda *a, **how: asked.append((a[0], how)))
    case.prepare("data", False, print)
    ((before, how),) = asked
    run = run_of(case, "fedit").config
    assert replace(run.model.mix[0], weights=None) == before.model.mix[0]
    assert before.data.source == run.data.source
    assert how == {"to": case.weights, "classes": case.backbone.classes}


@pytest.mark.parametrize(
    "asked, complaint",
    [
        (["fedhl", "--data", "cifar100"], "--data = cifar100: fedhl has cifar10, ag_news"),
        (["fedhl", "--participation", "0"], "--participation = 0: must be above 0 and at most 1"),
        (["fedhl", "--clients", "10"], "--clients: fedhl has no such choice"),
        (["table1", "--width", "wide"], "--width: table1 has no such choice"),
        (["table1", "--model", "vit"], "--model: table1 has no such choice; leave it out"),
        (["fedhl_shift", "--model", "cnn"], "--model: fedhl_shift has no such choice"),
        (
            ["fedhl", "--model", "vit", "--data", "ag_news"],
            "--model = vit: is for images; leave it out for ag_news",
        ),
        (
            ["fedhl", "--model", "vit", "--width", "wide"],
            "--width = wide: vit has one width; leave it out",
        ),
        (["pfedlora", "--participation", "1"], "--participation: pfedlora has no such choice"),
        (["fedhl", "--methods", "fedavg"], "--methods = fedavg: fedhl has fedit, flexlora"),
    ],
)
def test_a_wrong_choice_is_refused(asked, complaint, tmp_path, capsys):
    assert main(["reproduce", *asked, "-o", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# The table.


def result(key, seed=1, accuracy=(0.5, 0.7, 0.6), up=(3e6, 1e6, 1e6), told=(4.0, 2.0, 3.0)):
    """A finished run of three rounds."""
    columns = {"accuracy": accuracy, "bytes_up": up, "bytes_down": (0.0, 5e5, 5e5)} | dict.fromkeys(
        LOGGED_COLUMNS, told
    )
    return Result(
        run_of(FineTuningCase("cifar10", "narrow", 1.0, OUT), key, seed=seed),
        {n: np.array(v) for n, v in columns.items()},
        {},
    )


def shown(*results):
    """The sheet of these runs."""
    found = {r.job.entry.key: [] for r in results}
    for r in results:
        found[r.job.entry.key].append(r)
    cells = [Cell.from_results(there[0].job.entry, there) for there in found.values()]
    return fedhl.fedhl_sheet("Title", "", [], cells, 2, found)


def test_a_row_has_accuracy_bytes_and_what_explains_it():
    made = shown(result("flexlora"))
    assert made.rows[1] == ("FlexLoRA", "1/2", "70.00", "60.00", "5", "1", "3", "3", "3", "3")
    (row,) = made.records
    assert (row["megabytes_up"], row["megabytes_down"], row["lora_bias"]) == (5.0, 1.0, 3.0)


def test_numbers_are_means_over_seeds():
    made = shown(
        result("fedit"),
        result("fedit", 2, (0.5, 0.5, 0.9), up=(1e6, 1e6, 1e6), told=(1.0, 1.0, 1.0)),
    )
    assert made.rows[1] == (
        "FedIT",
        "2/2",
        "80.00 ± 14.14",
        "75.00 ± 21.21",
        "4",
        "1",
        "2",
        "2",
        "2",
        "2",
    )


def test_fedhl_leads_or_not_over_the_methods_of_others():
    def lead(*keys):
        return [note for note in shown(*keys).notes if note.startswith("ahead")]

    ours, variant, other = (
        result("fedhl", accuracy=(0.7, 0.7, 0.7)),
        result("fedhl-samples", accuracy=(1.0,)),
        result("flora"),
    )
    assert lead(ours, variant, other) == [
        "ahead of the best other method: the paper 1 to 3, here +0.00 (FLoRA)"
    ]
    assert lead(ours, variant)[0].endswith("here -") and lead(other)[0].endswith("here -")


# The command.


@pytest.fixture
def root(tmp_path):
    """AG_NEWS/part.csv and test.csv with 4 * 40 and 4 * 20 texts."""
    words = {1: "war peace", 2: "goal match", 3: "bank price", 4: "atom chip"}
    (tmp_path / "AG_NEWS").mkdir()
    for name, number in (("part.csv", 40), ("test.csv", 20)):
        with open(tmp_path / "AG_NEWS" / name, "w", newline="") as file:
            csv.writer(file).writerows(
                (c, f"Title {n}", words[c]) for n in range(number) for c in words
            )
    return tmp_path


def test_a_backbone_is_made_once_and_every_method_begins_with_it(
    carried, root, monkeypatch, capsys
):
    pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    monkeypatch.setattr(
        fedhl, "SMALL_SCALE", fedhl.SMALL_SCALE._replace(clients=3, train=10, test=5, batch_size=5)
    )
    model = {"name": "transformer", "width": 8, "heads": 2, "layers": 1, "feedforward": 8}
    small = BACKBONES["ag_news"]["narrow"]._replace(model=model, epochs=1)
    monkeypatch.setitem(BACKBONES["ag_news"], "narrow", small)
    asked = [
        "reproduce",
        TABLE_NAME,
        "--data",
        "ag_news",
        "--width",
        "narrow",
        "--participation",
        "1",
        "--text-train",
        "part.csv",
    ]
    asked += [
        "--root",
        str(root),
        "-o",
        str(root / "out"),
        "--rounds",
        "1",
        "--methods",
        "fedhl",
        "flora",
    ]
    assert main(asked) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^FedHL +1/1 ", out, re.MULTILINE) and re.search(
        r"^FLoRA +1/1 ", out, re.MULTILINE
    )
    assert (
        err.count("1 epochs on classes 0-1 of ag_news") == 1
        and "epoch 1/1" in err
        and "epoch 1/1" not in out
    )
    file = root / "out" / TABLE_NAME / "ag_news-narrow-part.safetensors"
    made = file.read_bytes()
    rows = list(
        csv.DictReader((root / "out" / TABLE_NAME / "ag_news-narrow-part1-alpha0.5.csv").open())
    )
    assert [row["entry"] for row in rows] == ["fedhl", "flora"]
    assert all(
        float(row["megabytes_up"]) > 0 and float(row["effective_clients"]) > 0 for row in rows
    )
    assert main([*asked, "rolora"]) == 0
    assert file.read_bytes() == made and "epochs on classes" not in capsys.readouterr().err
