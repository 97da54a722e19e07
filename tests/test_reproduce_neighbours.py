"""``reproduce neighbours``: its runs, and its table beside FedAvg."""

from pathlib import Path

import numpy as np
import pytest

from fedlora_mpi import config as configs
from fedlora_mpi.cli import main
from fedlora_mpi.reproduce import neighbours_table as neighbours
from fedlora_mpi.reproduce.grid import make_job
from fedlora_mpi.reproduce.neighbours_table import LABELS, TABLE_NAME, SkewCase
from fedlora_mpi.reproduce.registry import table_entries
from fedlora_mpi.reproduce.request import Request
from fedlora_mpi.reproduce.results import Result
from fedlora_mpi.reproduce.sheet import Cell

CASE = SkewCase("cifar10", 0.05)


def jobs(scale="small", seed=1, keys=()):
    size = CASE.scale_sizes(scale)
    how = {"scale": size, "rounds": size.rounds, "root": "data", "folder": Path("/out")}
    entries = table_entries(TABLE_NAME, CASE, size, keys)
    return [make_job(entry, CASE, seed, **how) for entry in entries]


def test_the_cases_are_those_of_strong_skew_with_three_seeds():
    assert [case.alpha for case in Request(TABLE_NAME).cases] == [0.05, 0.1]
    assert Request(TABLE_NAME).run_seeds == (1, 2, 3)
    (case,) = Request(TABLE_NAME, data=("cifar100",), alpha=(1.0,)).cases
    assert case.name == "cifar100-alpha1"


@pytest.mark.parametrize("scale", ["small", "full"])
def test_every_method_has_a_valid_config_and_the_decentralised_ones_a_ring(scale, tmp_path):
    found = jobs(scale)
    assert [job.entry.key for job in found] == list(LABELS)
    for job in found:
        (tmp_path / "alone.yaml").write_text(configs.resolved_yaml(job.config))
        assert configs.read(tmp_path / "alone.yaml") == job.config
        is_on_ring = job.entry.key in ("dpsgd", "depositum_like")
        assert (job.config.topology is not None) == is_on_ring
        assert job.config.train.momentum == 0


@pytest.mark.parametrize(
    "asked, complaint",
    [
        (["--data", "ag_news"], "--data = ag_news: neighbours has cifar10, cifar100"),
        (["--seeds", "1000"], "--seeds = 1000: with it the learning rates are chosen"),
        (["--scale", "medium"], "--scale = medium: only table1 has it"),
        (["--clients", "10"], "--clients: neighbours has no such choice"),
    ],
)
def test_a_wrong_choice_is_refused(asked, complaint, tmp_path, capsys):
    assert main(["reproduce", TABLE_NAME, *asked, "-o", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_methods_stand_beside_fedavg_with_the_same_seed():
    found = {}
    for key, accuracy in (("fedavg", (0.5, 0.6)), ("fedlc", (0.6, 0.6))):
        for seed, value in enumerate(accuracy, 1):
            (job,) = jobs(seed=seed, keys=[key])
            found.setdefault(key, []).append(Result(job, {"accuracy": np.full(6, value)}, {}))
    cells = [Cell.from_results(runs[0].job.entry, runs) for runs in found.values()]
    sheet = neighbours.skew_sheet("Title", "", [], cells, 2, found)
    assert sheet.rows[0] == ("", "lr", "seeds", "late", "- FedAvg")
    assert sheet.rows[2][2:] == ("2/2", "60.00 ± 0.00", "+5.00 ± 7.07")
