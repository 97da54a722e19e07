"""``reproduce fedhl_shift``: its features, its trials of learning rates, its table, the command."""

import csv
import re
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora_mpi import config as configs
from fedlora_mpi.cli import main
from fedlora_mpi.data.datasets import Data
from fedlora_mpi.data.samples import Samples
from fedlora_mpi.data.source import Source
from fedlora_mpi.reproduce import features, rank_sheet
from fedlora_mpi.reproduce import fedhl_shift_table as shift
from fedlora_mpi.reproduce.fedhl_shift_table import KEYS, RANKS, RATES, TABLE_NAME, ShiftCase
from fedlora_mpi.reproduce.grid import ACCURACY, Tuning, make_job
from fedlora_mpi.reproduce.paper import Accuracy
from fedlora_mpi.reproduce.registry import TABLES, table_entries
from fedlora_mpi.reproduce.request import Request
from fedlora_mpi.reproduce.results import Result
from fedlora_mpi.reproduce.sheet import Cell
from fedlora_mpi.reproduce.tuned_sheet import format_gain
from fedlora_mpi.reproduce.tuning import choose_rates, trial_entries

OUT = Path("/out/fedhl_shift")
CASE = ShiftCase("cifar10", "low", inf, OUT)


def jobs_of(entries, case=CASE, seed=1):
    size = case.scale_sizes("small")
    how = {"scale": size, "rounds": size.rounds, "root": "data", "folder": OUT}
    return [make_job(entry, case, seed, **how) for entry in entries]


def entries_of(*keys, case=CASE):
    return table_entries(TABLE_NAME, case, case.scale_sizes("small"), keys)


# The grid.


def test_all_cases_are_made_unless_some_are_named():
    names = [case.name for case in Request(TABLE_NAME).cases]
    assert len(names) == 8 and names[:2] == ["cifar10-high-iid", "cifar10-high-alpha0.5"]
    (case,) = Request(TABLE_NAME, data=("cifar10",), lora_ranks=("low",), alpha=(0.1,)).cases
    assert (case.name, case.split["alpha"]) == ("cifar10-low-alpha0.1", 0.1)
    assert Request(TABLE_NAME).run_seeds == (1, 2, 3)


@pytest.mark.parametrize("ranks", RANKS)
def test_every_method_has_a_valid_config_and_trains_the_first_weight_alone(ranks, tmp_path):
    case = ShiftCase("ag_news", ranks, 0.5, OUT)
    found = jobs_of(entries_of(case=case), case)
    assert [job.entry.key for job in found] == list(KEYS)
    for job in found:
        (tmp_path / "alone.yaml").write_text(configs.resolved_yaml(job.config))
        assert configs.read(tmp_path / "alone.yaml") == job.config
        algorithm = job.config.algorithm
        assert (algorithm.full, algorithm.layers) == ((), ("1.weight",))
        clients = [algorithm.transport(client, 10).method for client in range(10)]
        assert tuple(max(client.lora_ranks) for client in clients) == RANKS[ranks]
        assert {client.s for client in clients} == {1.0}
        assert job.config.data.source.shift == "rotate_inputs"


@pytest.mark.parametrize(
    "asked, complaint",
    [
        (["fedhl_shift", "--data", "cifar100"], "--data = cifar100: fedhl_shift has cifar10, ag_"),
        (["fedhl_shift", "--width", "wide"], "--width: fedhl_shift has no such choice"),
        (["fedhl", "--lora-ranks", "low"], "--lora-ranks: fedhl has no such choice"),
        (["fedhl_shift", "--seeds", "1", "1000"], "--seeds = 1000: with it the learning rates"),
    ],
)
def test_a_wrong_choice_is_refused(asked, complaint, tmp_path, capsys):
    assert main(["reproduce", *asked, "-o", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# The features.


def data_of(x_train, x_test, **how):
    def samples(x):
        return Samples(x, torch.arange(len(x)) % 2)

    return Data(samples(x_train), samples(x_test), 2, **how)


def written(data, monkeypatch, tmp_path, width):
    monkeypatch.setattr(features, "WIDTH", width)
    monkeypatch.setattr(features, "load", lambda source: data)
    features.write_features(Source("any"), tmp_path / "out" / "f.npz", tmp_path)
    return np.load(tmp_path / "out" / "f.npz")


def test_the_features_of_images_are_their_principal_components(monkeypatch, tmp_path):
    images = torch.randint(0, 256, (40, 3, 4, 4), generator=torch.Generator().manual_seed(1))
    data = data_of(images[:30].byte(), images[30:].byte())
    found = written(data, monkeypatch, tmp_path, 5)
    x = images.flatten(1).numpy() / 255
    centred = x - x[:30].mean(0)
    _, _, directions = np.linalg.svd(centred[:30], full_matrices=False)
    expected = centred @ directions[:5].T
    scale = expected[:30].std()
    both = np.concatenate([found["x_train"], found["x_test"]])
    np.testing.assert_allclose(abs(both), abs(expected) / scale, rtol=1e-4, atol=1e-4)
    assert found["y_test"].tolist() == [0, 1] * 5 and found["x_train"].dtype == np.float32


def test_the_features_of_texts_are_those_of_their_weighted_word_counts(monkeypatch, tmp_path):
    words = torch.tensor([[3, 3, 1, 0], [2, 1, 0, 0], [3, 2, 0, 0], [1, 0, 0, 0], [3, 3, 1, 0]])
    data = data_of(words, words[:1], token_settings=(4, 0))
    found = written(data, monkeypatch, tmp_path, 2)
    counts = np.stack([(words == w).sum(1).numpy() for w in (1, 2, 3)], 1).astype(float)
    idf = np.log(6 / (1 + (counts > 0).sum(0))) + 1
    weighted = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * idf
    weighted /= np.linalg.norm(weighted, axis=1, keepdims=True)
    _, _, directions = np.linalg.svd(weighted, full_matrices=False)
    expected = weighted @ directions[:2].T
    expected -= expected.mean(0)
    expected /= expected.std()
    np.testing.assert_allclose(abs(found["x_train"]), abs(expected), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found["x_test"][0], found["x_train"][0])


# The trials.


class Store:
    """Results by the name of the run."""

    def __init__(self, accuracy, skipped=()):
        self.accuracy, self.skipped = accuracy, dict(skipped)

    def result(self, job):
        if (value := self.accuracy.get(job.entry.key)) is None:
            return None
        columns = {"accuracy": np.array([0.9, *value])}
        if job.entry.key in self.skipped:
            columns["skipped"] = np.array(self.skipped[job.entry.key])
        return Result(job, columns, {})


def test_the_rate_with_the_best_last_rounds_is_chosen():
    trials = jobs_of(trial_entries(entries_of("flexlora", "fedhl"), Tuning((0.1, 0.2), 7)), seed=7)
    assert [t.entry.key for t in trials] == [
        f"{key}-lr{lr}" for key in ("flexlora", "fedhl") for lr in (0.1, 0.2)
    ]
    assert {t.config.faults.non_finite for t in trials} == {"skip"}
    assert [t.config.train.lr for t in trials] == [0.1, 0.2] * 2
    high, low = [0.5] * 5, [0.8, 0.4, 0.4, 0.4, 0.4, 0.4]
    store = Store({"flexlora-lr0.1": low, "flexlora-lr0.2": high, "fedhl-lr0.2": low})
    assert choose_rates(trials, store, ACCURACY) == {(CASE, "flexlora"): 0.2, (CASE, "fedhl"): 0.2}
    assert choose_rates(trials[:2], Store({t.entry.key: high for t in trials}), ACCURACY) == {
        (CASE, "flexlora"): 0.1
    }


def test_a_rate_that_diverges_is_not_chosen_for_the_model_that_it_left_behind():
    trials = jobs_of(trial_entries(entries_of("flexlora"), Tuning((0.1, 0.2), 7)), seed=7)
    accuracy = {"flexlora-lr0.1": [0.5] * 5, "flexlora-lr0.2": [0.8] * 5}
    for skipped, best in (([0] * 6, 0.2), ([0, 0, 0, 2, 0, 0], 0.1)):
        store = Store(accuracy, {"flexlora-lr0.2": skipped})
        assert choose_rates(trials, store, ACCURACY) == {(CASE, "flexlora"): best}


# The table.


def shown(accuracy, share=None, monkeypatch=None):
    """The sheet of runs; accuracy: {key: last accuracy of seeds 1, 2}."""
    if monkeypatch:
        monkeypatch.setattr(rank_sheet, "tail_share", lambda result: share)
    results = {key: [] for key in accuracy}
    for key, values in accuracy.items():
        for seed, value in enumerate(values, 1):
            (job,) = jobs_of(entries_of(key), seed=seed)
            columns = {"accuracy": [value] * 6} | dict.fromkeys(
                ("effective_clients", "lora_truncation", "lora_bias", "lora_update_bias"), [2.0]
            )
            found = {name: np.array(column) for name, column in columns.items()}
            results[key].append(Result(job, found, {}))
    cells = [Cell.from_results(entries_of(key)[0], found) for key, found in results.items()]
    return rank_sheet.rank_sheet("Title", "", [], cells, 2, results, shift.TUNING)


def test_gains_over_flexlora_are_of_equal_seeds():
    sheet = shown({"flexlora": (0.5, 0.7), "fedhl": (0.6, 0.7), "flora": ()})
    rows = {row[0]: row for row in sheet.rows}
    assert rows["FedHL, drift"][2:5] == ("2/2", "65.00 ± 7.07", "+5.00 ± 7.07")
    assert rows["FLoRA"][2:5] == ("0/2", "-", "-")
    assert sheet.records[1]["gain_mean"] == pytest.approx(5)
    assert "unknown until" in sheet.notes[0]


@pytest.mark.parametrize("share, can_show", [(0.049, False), (0.051, True)])
def test_it_says_first_whether_the_claim_can_show(share, can_show, monkeypatch):
    note = shown({"fedhl-samples": (0.5,)}, share, monkeypatch).notes[0]
    assert f"{share:.1%}" in note and ("cannot show" in note) != can_show


# The command.


def test_trials_choose_a_rate_and_its_runs_follow(in_process, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    words = {1: "war peace", 2: "goal match", 3: "bank price", 4: "atom chip"}
    (tmp_path / "AG_NEWS").mkdir()
    for name, number in (("part.csv", 40), ("test.csv", 20)):
        with open(tmp_path / "AG_NEWS" / name, "w", newline="") as file:
            csv.writer(file).writerows(
                (c, f"Title {n}", words[c]) for n in range(number) for c in words
            )
    sizes = {"clients": 3, "train": 10, "test": 5, "batch_size": 5}
    monkeypatch.setattr(shift, "SMALL_SCALE", shift.SMALL_SCALE._replace(**sizes))
    monkeypatch.setattr(features, "WIDTH", 6)
    table = replace(shift.TABLES[TABLE_NAME], tuning=Tuning(RATES[:2], 1000))
    monkeypatch.setitem(TABLES, TABLE_NAME, table)
    asked = ["reproduce", TABLE_NAME, "--data", "ag_news", "--text-train", "part.csv"]
    asked += ["--lora-ranks", "low", "--alpha", "inf", "--root", str(tmp_path), "--rounds", "1"]
    asked += ["--methods", "fedhl-samples", "--seeds", "1", "2", "-o", str(tmp_path / "out")]
    assert main([*asked, "--print-jobs"]) == 0
    lines, err = capsys.readouterr()
    assert lines.count("exec ") == 2 and "asks for the runs of the table" in lines
    assert "features of each sample of ag_news" in err and "epochs of npz" in err
    assert main([*asked, "--collect"]) == 0
    assert re.search(r"^FedHL, weights n_k +- +0/2 ", capsys.readouterr().out, re.MULTILINE)
    assert main(asked) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^FedHL, weights n_k +0\.00\d +2/2 ", out, re.MULTILINE)
    assert re.search(r"smallest rank, with weights n_k after the last\s+round: \d", out)
    assert "features of each sample" not in err  # they are made once
    (row,) = csv.DictReader((tmp_path / "out" / TABLE_NAME / "ag_news-low-iid.csv").open())
    assert float(row["lr"]) in RATES and row["seeds"] == "2"
    assert main([*asked, "--print-jobs"]) == 0
    assert "every run is done" in capsys.readouterr().out


def test_an_unknown_number_is_a_dash():
    assert format_gain(Accuracy(nan, nan)) == "-"
