"""``reproduce fedhl_text``: its tokenizer, its sub-topics, its rates and table, the command."""

import csv
import re
from dataclasses import replace
from math import nan
from pathlib import Path

import numpy as np
import pytest

from fedlora_mpi import config as configs
from fedlora_mpi.cli import main
from fedlora_mpi.data.texts import Text, Vocabulary, train_byte_pairs
from fedlora_mpi.models import weights
from fedlora_mpi.reproduce import fedhl_text_table as table
from fedlora_mpi.reproduce.fedhl_text_table import KEYS, RANKS, TABLE_NAME, TUNING, TextCase
from fedlora_mpi.reproduce.grid import PERPLEXITY, Tuning, make_job
from fedlora_mpi.reproduce.rank_sheet import rank_sheet
from fedlora_mpi.reproduce.registry import TABLES, table_entries
from fedlora_mpi.reproduce.request import Request
from fedlora_mpi.reproduce.results import Result
from fedlora_mpi.reproduce.sheet import Cell
from fedlora_mpi.reproduce.subtopics import assign_equally, find_subtopics
from fedlora_mpi.reproduce.tuned_sheet import rate_note
from fedlora_mpi.reproduce.tuning import choose_rates, trial_entries
from fedlora_mpi.store.reader import RunFiles

OUT = Path("/out/fedhl_text")
CASE = TextCase("ag_news", "subtopics", OUT, "part.csv")
WORDS = {1: "war peace", 2: "goal match", 3: "bank price", 4: "atom chip"}


def entries_of(*keys):
    return table_entries(TABLE_NAME, CASE, CASE.scale_sizes("small"), keys)


def jobs_of(entries, seed=1):
    size = CASE.scale_sizes("small")
    how = {"scale": size, "rounds": size.rounds, "root": "data", "folder": OUT}
    return [make_job(entry, CASE, seed, **how) for entry in entries]


# The grid.


def test_both_splits_are_made_unless_one_is_named():
    assert [c.name for c in Request(TABLE_NAME).cases] == ["ag_news-iid", "ag_news-subtopics"]
    (case,) = Request(TABLE_NAME, split=("iid",), text_train="part.csv").cases
    assert case.split == {"kind": "iid"} and "part.csv" in case.data_difference
    assert case.weights.name == "ag_news-part-gpt.safetensors"
    assert Request(TABLE_NAME).run_seeds == (1, 2, 3)


def test_every_method_has_a_valid_config_and_lora_is_in_the_blocks_alone(tmp_path):
    found = jobs_of(entries_of())
    assert [job.entry.key for job in found] == ["fedbabu", "local_lora", *KEYS]
    for job in found:
        (tmp_path / "alone.yaml").write_text(configs.resolved_yaml(job.config))
        assert configs.read(tmp_path / "alone.yaml") == job.config
        assert job.config.evaluate.metrics == ("perplexity",)
        assert job.config.model.loss == "next_token"
    for job in found[2:]:
        algorithm = job.config.algorithm
        assert (algorithm.full, algorithm.layers) == ((), ("blocks.*",))
        clients = [algorithm.transport(client, 10).method for client in range(10)]
        assert tuple(max(client.lora_ranks) for client in clients) == RANKS
        assert {client.s for client in clients} == {1.0}


@pytest.mark.parametrize(
    "asked, complaint",
    [
        (["fedhl_text", "--data", "cifar10"], "--data = cifar10: fedhl_text has ag_news"),
        (["fedhl_text", "--alpha", "0.5"], "--alpha: fedhl_text has no such choice"),
        (["fedhl_text", "--lora-ranks", "low"], "--lora-ranks: fedhl_text has no such choice"),
        (["fedhl", "--split", "iid"], "--split: fedhl has no such choice"),
        (["fedhl_text", "--seeds", "1000"], "--seeds = 1000: with it the learning rates"),
        (["fedhl_text", "--root", "/nowhere"], "text.train = train.csv: cannot be read"),
    ],
)
def test_a_wrong_choice_is_refused(asked, complaint, tmp_path, capsys):
    assert main(["reproduce", *asked, "-o", str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if complaint in line]
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


# The files.


def test_byte_pairs_write_every_text_without_an_unknown_word(tmp_path):
    pytest.importorskip("tokenizers")
    texts = ["The sea, the boat", "the ﬁrst wave"] * 3
    assert train_byte_pairs(texts, 270) == train_byte_pairs(texts, 270)
    (tmp_path / "tokenizer.json").write_text(train_byte_pairs(texts, 270))
    settings = Text(tokenizer=str(tmp_path), length=40)
    vocabulary = Vocabulary.from_tokenizer(settings)
    assert (vocabulary.size, vocabulary.padding) == (270, 0)
    (ids,) = vocabulary.encode(["ﬁve Ökosysteme, 中 €"])  # ﬁ is one character
    assert vocabulary.tokenizer.decode(ids.tolist()).strip() == "five ökosysteme, 中 €"
    assert (vocabulary.encode(["the"])[0] != 0).sum() == 1  # its pairs are merged


def test_parts_are_equally_large_and_the_nearest_pairs_come_first():
    distances = np.array([[1.0, 2.0], [0.5, 9.0], [0.2, 0.3], [8.0, 9.0], [7.0, 9.0]])
    assert assign_equally(distances).tolist() == [0, 0, 0, 1, 1]
    assert assign_equally(distances[:4]).tolist() == [1, 0, 0, 1]


def test_a_subtopic_has_the_texts_of_equal_words():
    subjects = ["moon rocket orbit", "phone wireless handset", "virus worm patch"]
    train = [f"{subjects[n % 3]} the {n}" for n in range(30)]
    test = [f"a {subjects[n % 3].upper()}" for n in range(6)]
    first, second = find_subtopics(train, test, 3)
    names = first[:3]
    assert sorted(names) == [0, 1, 2]
    assert first.tolist() == [*names] * 10 and second.tolist() == [*names] * 2
    np.testing.assert_array_equal(first, find_subtopics(train, test, 3)[0])


# The rates and the table.


class Store:
    """Results by the name of the run."""

    def __init__(self, perplexity):
        self.perplexity = perplexity

    def result(self, job):
        return Result(
            job, {"perplexity": np.array([1.0, *[self.perplexity[job.entry.lr]] * 5])}, {}
        )


@pytest.mark.parametrize(
    "perplexity, best",
    [
        ({0.1: 90.0, 0.2: 80.0, 0.4: 85.0}, 0.2),
        ({0.1: 90.0, 0.2: 90.0, 0.4: nan}, 0.1),
        ({0.1: nan, 0.2: 9e9, 0.4: nan}, 0.2),
    ],
)
def test_the_rate_with_the_lowest_perplexity_is_chosen_and_nan_is_the_worst(perplexity, best):
    tuning = Tuning(tuple(perplexity), 7, PERPLEXITY)
    trials = jobs_of(trial_entries(entries_of("fedit"), tuning), seed=7)
    assert choose_rates(trials, Store(perplexity), tuning.score) == {(CASE, "fedit"): best}


def test_a_method_without_a_column_of_the_log_has_a_dash_and_lower_is_said_to_be_better():
    columns = {"accuracy": [0.1] * 6, "perplexity": [99.0, *[50.0] * 5]}
    results = {}
    for key, offset in (("fedbabu", -4.0), ("flexlora", 0.0)):
        (job,) = jobs_of(entries_of(key))
        found = {name: np.array(column) + offset for name, column in columns.items()}
        if key == "flexlora":
            found |= {name: np.full(6, 0.25) for name in ("effective_clients", "lora_bias")}
        results[key] = [Result(job, found, {})]
    cells = [Cell.from_results(entries_of(key)[0], found) for key, found in results.items()]
    sheet = rank_sheet("Title", "", [], cells, 1, results, TUNING)
    rows = {row[0]: row for row in sheet.rows}
    assert rows["dense, all but the head"][3:] == ("46.00", "-4.00", "-", "-", "-", "-")
    assert rows["FlexLoRA"][3:] == ("50.00", "+0.00", "0.25", "-", "0.25", "-")
    assert "unknown until" in sheet.notes[0]
    assert "perplexity of the server's model" in sheet.notes[1]
    assert "lower is better" in sheet.notes[1]


def test_a_rate_at_an_end_of_the_list_is_named():
    rates = {"fedit": 0.2, "flexlora": 0.4, "fedhl": 0.8, "flora": None}
    cells = [
        Cell.from_results(replace(entry, lr=lr), [])
        for key, lr in rates.items()
        for entry in entries_of(key)
    ]
    tuning = Tuning((0.2, 0.4, 0.8), 7)
    assert rate_note(tuning, cells).endswith("a rate beyond it may be better: FedIT, FedHL, drift")
    assert rate_note(tuning, cells[1:2]).endswith("in the last rounds with seed 7")


# The command.


def test_runs_tune_the_topic_alone_and_leave_the_head_as_it_is(
    in_process, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    (tmp_path / "AG_NEWS").mkdir()
    for name, number in (("part.csv", 12), ("test.csv", 8)):
        with open(tmp_path / "AG_NEWS" / name, "w", newline="") as file:
            csv.writer(file).writerows(
                (c, f"Title{n}", words) for n in range(number) for c, words in WORDS.items()
            )
    sizes = {"clients": 4, "train": 3, "test": 2, "batch_size": 2}
    for scale in ("SMALL_SCALE", "FULL_SCALE"):
        monkeypatch.setattr(table, scale, getattr(table, scale)._replace(**sizes))
    monkeypatch.setattr(table, "GPT", table.GPT | {"width": 8, "layers": 1, "feedforward": 8})
    monkeypatch.setattr(table, "TOKENS", 280)
    small = replace(TABLES[TABLE_NAME], tuning=Tuning((0.3,), 1000, PERPLEXITY))
    monkeypatch.setitem(TABLES, TABLE_NAME, small)
    asked = ["reproduce", TABLE_NAME, "--text-train", "part.csv", "--root", str(tmp_path)]
    asked += ["--split", "subtopics", "--rounds", "1", "--seeds", "1", "-o", str(tmp_path / "out")]
    asked += ["--methods", "fedbabu", "local_lora", "fedhl-samples"]
    assert main(asked) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^FedHL, weights n_k \(all equal\) +0\.3 +1/1 +2\d\d\.", out, re.MULTILINE)
    assert re.search(r"smallest rank, with weights n_k after the last\s+round: \d", out)
    assert "epochs on classes 0-2 of ag_news" in err

    folder = tmp_path / "out" / TABLE_NAME
    with open(folder / "ag_news-part-topic-train.csv") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    assert len(texts) == 12 and all(WORDS[4] in text for text in texts)
    tokenizer = Vocabulary.from_tokenizer(
        Text(tokenizer=str(folder / "ag_news-part-tokenizer.json"))
    )
    counts = [(tokenizer.encode([f" {word}"])[0] != 0).sum() for word in ("peace", "atom")]
    assert counts[0] < counts[1]  # it is made of the other topics

    backbone = weights.read(folder / "ag_news-part-gpt.safetensors")
    runs = {key: folder / CASE.name / f"{key}-seed1" for key in ("fedbabu", "local_lora")}
    dense = RunFiles(runs["fedbabu"]).checkpoint(1).shared()
    assert {*backbone} - {*dense} == {"head.weight"}
    assert not np.array_equal(dense["words.weight"], backbone["words.weight"])
    local = RunFiles(runs["local_lora"]).checkpoint(1).personal(range(4))
    for name, rows in local.items():
        if name.endswith((".A", ".B")):
            assert name.startswith("blocks.") and rows.any()
        else:
            assert all(np.array_equal(row, backbone[name]) for row in rows), name
    partition = RunFiles(runs["fedbabu"]).partition()
    assert (partition["train_counts"] > 0).sum(1).tolist() == [1] * 4
