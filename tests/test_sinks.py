"""What is written beside the log says what the log says, also after a resume that goes back some
rounds.
"""

import csv
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import TINY, assert_same_run, tiny_config

from fedlora_mpi import config as configs
from fedlora_mpi.cli import main
from fedlora_mpi.store.reader import RunFiles
from fedlora_mpi.store.sinks import CsvSink

BOTH = ("log.csv=true", "log.tensorboard=true")


def events(folder):
    """[(tag, round, value, when)] of all scalars, and the rounds from which on earlier files are to
    be forgotten.
    """
    event = pytest.importorskip("tensorboardX.proto.event_pb2")
    scalars, purges = [], []
    for file in sorted(folder.glob("events*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found, data = event.Event.FromString(data[12 : 12 + length]), data[16 + length :]
            if found.session_log.status == 1:  # as TensorBoard does
                scalars = [kept for kept in scalars if kept[1] < found.step]
                purges.append(found.step)
            scalars += [
                (v.tag, found.step, v.simple_value, found.wall_time)
                for v in found.summary.value
                if not v.HasField("histo")
            ]
    return scalars, purges


def assert_says_what_the_log_says(run):
    rounds = RunFiles(run).rounds()
    with open(run / "rounds.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(rounds) and len(rows) == len(rounds["round"])
    for name, column in rounds.items():
        np.testing.assert_array_equal(
            [float(row[name] or "nan") for row in rows], column.astype(float)
        )
    scalars, _ = events(run / "tensorboard")
    for name in set(rounds) - {"round"}:
        told = [(step, value) for tag, step, value, _ in scalars if tag == name]
        there = ~np.isnan(rounds[name])
        assert [step for step, _ in told] == rounds["round"][there].tolist(), name
        np.testing.assert_allclose([value for _, value in told], rounds[name][there], rtol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sinks") / "run"
    pytest.importorskip("tensorboardX")
    assert main(["run", str(TINY), f"output={folder}", "evaluate.every=2", *BOTH]) == 0
    return folder


def test_csv_and_tensorboard_say_what_the_log_says(run):
    assert_says_what_the_log_says(run)


def test_nothing_is_doubled_or_missing_after_a_resume_that_goes_back(run, tmp_path):
    again = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(again / "checkpoints" / "000004")  # rounds 3 and 4 are to be played again
    with open(again / "rounds.csv", "a") as file:
        file.write("5,0.1")  # and a kill has left half a row
    assert main(["resume", str(again), "rounds=6"]) == 0
    assert_says_what_the_log_says(again)
    scalars, purges = events(again / "tensorboard")
    assert purges == [0, 0], "whoever has read the earlier file forgets it"
    when = [at for tag, _, _, at in scalars if tag == "train_loss"]
    assert when == sorted(when)


def test_they_may_be_switched_on_by_a_resume_and_move_no_number(run, tmp_path):
    assert (
        main(["run", str(TINY), f"output={tmp_path / 'run'}", "evaluate.every=2", "rounds=2"]) == 0
    )
    assert not [*(tmp_path / "run").glob("rounds.csv"), *(tmp_path / "run").glob("tensorboard")]
    assert main(["resume", str(tmp_path / "run"), "rounds=4", *BOTH]) == 0
    assert_says_what_the_log_says(tmp_path / "run")
    assert_same_run(tmp_path / "run", run)


def test_rows_are_whole_after_each_round_and_a_tail_can_follow_them(tmp_path):
    path = tmp_path / "rounds.csv"
    path.write_text("of an earlier run\n")
    sink = CsvSink(path, {"round": np.zeros(0, int)}, {})
    assert path.read_text() == ""
    with open(path) as tail:
        sink.append(1, {"accuracy": np.nan, "clients": 3}, {}, {})
        assert tail.read() == "round,accuracy,clients\n1,,3\n"
        sink.append(2, {"accuracy": 0.1, "clients": 3}, {}, {})
        assert tail.read() == "2,0.1,3\n"
    sink.close()


def test_the_block_is_no_part_of_a_digest_and_is_left_out_at_its_defaults():
    plain, both = tiny_config(), tiny_config(*BOTH)
    assert "log" not in configs.resolved_dict(plain) and configs.digest(plain) == configs.digest(
        both
    )
    assert configs.resolved_dict(both)["log"] == {"csv": True, "tensorboard": True}
    assert configs.from_dict(configs.resolved_dict(both), "x") == both
    with pytest.raises(
        ValueError,
        match="log has no such field; it has csv, tensorboard. Did you mean tensorboard?",
    ):
        tiny_config("log.tensorbord=true")


def test_without_the_library_a_line_says_so_before_anything_is_written(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert main(["run", str(TINY), f"output={tmp_path / 'run'}", "log.tensorboard=true"]) == 2
    said = capsys.readouterr().err
    assert (
        f"{TINY}: log.tensorboard = true: tensorboardX is not installed; pip install "
        "'fedlora-mpi[tensorboard]'" in said
    )
    assert said.count("\n") == 1 and not Path(tmp_path / "run").exists()
