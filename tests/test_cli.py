"""The commands: what each prints, writes and returns, and what it refuses without touching
anything.
"""

import hashlib
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import TESTS, TINY, assert_same_run, command_line, run_outcome, run_process

from fedlora_mpi import __version__
from fedlora_mpi.cli import main
from fedlora_mpi.config import read
from fedlora_mpi.store.lock import hold_lock
from fedlora_mpi.store.reader import RunFiles

COMMANDS = (
    "run",
    "resume",
    "config",
    "plan",
    "partition",
    "report",
    "pretrain",
    "submit",
    "doctor",
    "export",
    "watch",
    "digest",
    "status",
    "sweep",
)


@pytest.fixture(scope="module")
def six(trained):
    """A finished run of six rounds with checkpoints of 2, 4 and 6. Only to be copied or read."""
    return trained("rounds=6", "checkpoint.keep=3")


@pytest.fixture
def copy(six, tmp_path):
    """A copy of ``six`` to be damaged."""
    return shutil.copytree(six, tmp_path / "copy")


def content(folder: Path) -> dict[str, str]:
    """A checksum of every file, but the lock, which holds no result."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != ".lock"]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def assert_refused(result: tuple[int, str, str], *parts: str) -> None:
    """Code 2 and one line that holds the parts."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("fedlora-mpi: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err


def damage(file: Path) -> None:
    """Turn over one bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


# --- help


def test_help_lists_every_command_with_an_example(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for name in COMMANDS:
        assert re.search(rf"^    {name}\s+\S", text, re.MULTILINE), name
        if name != "resume":
            assert f"\n  fedlora-mpi {name} " in text
    assert "mpirun -n 5 fedlora-mpi resume" in text and "exit codes: 0 done" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_own_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.startswith(f"usage: fedlora-mpi {name} ")
    examples = re.findall(r"^  (?:mpirun .*)?fedlora-mpi (\w+) ", text, re.MULTILINE)
    assert examples and set(examples) == {name} and "exit codes: 0 done" in text


def test_the_examples_name_configs_that_are_there(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    named = set(re.findall(r"configs/\S+\.yaml", capsys.readouterr().out))
    assert named and all((TESTS.parent / config).is_file() for config in named), named


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"fedlora-mpi {__version__}\n")


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["run"]])
def test_an_incomplete_command_line_shows_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and capsys.readouterr().err.startswith("usage: fedlora-mpi")


def test_what_may_be_left_out_is_not_called_required(capsys):
    for name in ("run", "config", "plan", "submit"):
        with pytest.raises(SystemExit):
            main([name])
        assert "are required: config\n" in capsys.readouterr().err


@pytest.mark.thorough  # four processes
def test_the_module_and_the_entry_point_are_the_same_command(tmp_path):
    module, function = re.search(
        r'"fedlora-mpi = ([\w.]+):(\w+)"', (TESTS.parent / "setup.py").read_text()
    ).groups()
    # what pip makes of it
    script = f"import sys; from {module} import {function}; sys.exit({function}())"
    for arguments, code in ((["--help"], 0), (["run", "missing.yaml"], 2)):
        one = run_process(command_line(*arguments), tmp_path)
        other = run_process([sys.executable, "-c", script, *arguments], tmp_path)
        assert one.returncode == other.returncode == code
        assert (one.stdout, one.stderr) == (other.stdout, other.stderr)


# --- run


def test_a_run_tells_its_progress_and_leaves_a_folder_that_can_be_read(call, tmp_path):
    code, out, err = call(
        "run", TINY, "output=runs/{name}-{algorithm}-{seed}", "algorithm=fedavg", "seed=3"
    )
    folder = tmp_path / "runs/tiny-fedavg-3"
    assert (code, out) == (0, "runs/tiny-fedavg-3: done\n")
    first, *_, last = (line for line in err.splitlines() if not line.startswith("hint: "))
    assert re.match(
        r"round 1/4 · accuracy \d+\.\d\d% \(worst client .*\) · train loss .* clients/s · ", first
    )
    assert last.startswith("round 4/4 · ")
    run = RunFiles(folder)
    assert run.checkpoints() == [2, 4] and run.rounds()["round"].tolist() == [1, 2, 3, 4]
    assert read(folder / "config.yaml", []).algorithm == read(TINY, ["algorithm=fedavg"]).algorithm
    assert run.config_yaml == (folder / "config.yaml").read_text()
    assert {f.name for f in folder.iterdir()} == {".lock", "checkpoints", "config.yaml", "log.h5"}


def test_an_existing_folder_is_refused_and_left_as_it_is(call, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    refused = call("run", TINY, "output=mine")
    assert_refused(
        refused,
        str(TINY),
        "output = mine: the folder exists",
        "fedlora-mpi resume mine",
        "output=...",
    )
    assert content(tmp_path) == {"mine/thesis.txt": hashlib.sha256(b"years of work").hexdigest()}


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["missing.yaml"], ["missing.yaml: cannot be read: No such file"]),
        (
            [TINY, "train.momentm=0.5"],
            ["command line: train.momentm", "no such field", "Did you mean momentum?"],
        ),
        ([TINY, "algorithm=fedloar"], ["algorithm = fedloar", "Did you mean fedlora?"]),
        ([TINY, "train.lr"], ["train.lr: must be key=value"]),
        ([TINY, "train.lr=fast"], ["train.lr = fast"]),
        ([TINY, "model=user_parts:nothing"], ["model.name = user_parts:nothing: cannot be built"]),
        (
            [TINY, "algorithm={name: fedlora, layers: [head]}"],
            ["algorithm.layers = head: matches no weight"],
        ),
        (
            [TINY, "algorithm.lora_epochs=4"],
            ["algorithm.lora_epochs = 4: must be at most train.epochs = 3"],
        ),
        ([TINY, "data.partition.minimum=100"], [str(TINY), "data.partition.clients = 7"]),
        (
            [TINY, "data.root=nowhere", "data.dataset=mnist"],
            ["data.root = nowhere: mnist is missing"],
        ),
        (
            [TINY, "output=runs/{size}"],
            ["output = runs/{size}: {size} is unknown; there are {name}, {algorithm}, {seed}"],
        ),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_leaves_no_folder(call, tmp_path, arguments, parts):
    assert_refused(call("run", *arguments), *parts)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_ends_a_run_with_round_and_clients(call, tmp_path):
    code, out, err = call("run", TINY, "train.lr=1e30", "output=run")
    (line,) = [line for line in err.splitlines() if line.startswith("fedlora-mpi: ")]
    assert (code, out) == (1, "") and "Traceback" not in err
    assert re.search(r"round 1: the loss or upload of client \d(, \d)* is not finite", line)
    run = RunFiles(tmp_path / "run")
    assert not run.checkpoints() and not len(run.rounds()["round"])


def test_a_folder_that_cannot_be_made_is_refused(call, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(
        call("run", TINY, "output=file/run"),
        "output = file/run: cannot be created",
        "choose another",
    )


def test_rounds_that_are_not_evaluated_are_rows_of_nan_and_the_last_is_evaluated(call, tmp_path):
    assert call("run", TINY, "rounds=3", "evaluate.every=2", "output=run")[0] == 0
    rounds, clients = RunFiles(tmp_path / "run").rounds(), RunFiles(tmp_path / "run").clients()
    for column in (rounds["accuracy"], rounds["accuracy_worst"], rounds["loss"]):
        assert np.isnan(column).tolist() == [True, False, False]
    for table in (clients["accuracy"], clients["loss"]):
        assert (
            np.isnan(table).all(axis=1).tolist() == [True, False, False]
            and not np.isnan(table[1:]).any()
        )
    assert np.isfinite(rounds["train_loss"]).all()


def test_the_newest_checkpoints_are_kept(call, tmp_path):
    assert call("run", TINY, "checkpoint={every: 1, keep: 3}", "output=run")[0] == 0
    assert sorted(f.name for f in (tmp_path / "run/checkpoints").iterdir()) == [
        "000002",
        "000003",
        "000004",
    ]
    assert call("resume", "run", "checkpoint.keep=1", "rounds=5")[0] == 0
    assert sorted(f.name for f in (tmp_path / "run/checkpoints").iterdir()) == ["000005"]


# --- status


def test_status_says_whether_a_run_is_done(call, copy, tmp_path):
    assert call("status", copy) == (0, f"{copy}: done\n", "")
    assert call("status", copy, "rounds=9") == (75, f"{copy}: 6 of 9 rounds\n", "")
    assert call("status", TINY, f"output={copy}", "rounds=6") == (0, f"{copy}: done\n", "")
    assert call("status", TINY, "output=none") == (75, "none: 0 of 4 rounds\n", "")
    damage(copy / "checkpoints/000006/server.h5")
    assert call("status", copy) == (75, f"{copy}: 4 of 6 rounds\n", "")
    shutil.rmtree(copy / "checkpoints/000006")
    assert call("status", copy) == (75, f"{copy}: 4 of 6 rounds\n", "")
    assert_refused(call("status", tmp_path), "config.yaml")


# --- resume


def test_a_folder_without_a_run_is_refused(call, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        assert_refused(call("resume", folder), f"{folder}: not a run folder", "no config.yaml")
    assert not content(tmp_path)


def test_resuming_a_finished_run_is_fine_and_changes_nothing(call, copy, six):
    config, before = (copy / "config.yaml").read_text(), run_outcome(copy)
    code, out, err = call("resume", copy)
    assert (code, out) == (0, f"{copy}: done\n")
    assert [line for line in err.splitlines() if not line.startswith("hint: ")] == [
        f"resuming {copy} after round 6"
    ]
    np.testing.assert_equal(run_outcome(copy), before)
    assert RunFiles(copy).checkpoints() == [2, 4, 6]

    def settings(text):
        return text.partition("\n")[2]  # below the checksum

    again = settings((copy / "config.yaml").read_text())
    assert again.replace(str(copy), str(six)) == settings(config)  # it was moved


def test_a_run_can_be_made_longer_and_ends_as_if_it_had_been_started_so(call, six, tmp_path):
    assert call("run", TINY, "rounds=3", "output=run")[0] == 0
    assert call("resume", "run", "rounds=6")[0] == 0
    assert_same_run(six, tmp_path / "run")
    assert "\nrounds: 6\n" in (tmp_path / "run/config.yaml").read_text()
    assert RunFiles(tmp_path / "run").config["rounds"] == 6  # what a report calls asked for


def test_what_changes_the_numbers_is_refused_on_a_resume(call, copy):
    before = content(copy)
    for override, key, old in (
        ("train.lr=0.5", "train.lr = 0.5", "0.05"),
        ("seed=2", "seed = 2", "1"),
        ("algorithm=fedavg", "algorithm.name = fedavg", "fedlora"),
        ("engine.group_size=3", "engine.group_size = 3", "2"),
        ("participation=1.0", "participation = 1.0", "0.6"),
    ):
        result = call("resume", copy, "rounds=9", override)
        assert_refused(
            result, f"command line: {key}: the run in {copy} has {old}, and a resume may"
        )
        assert f"'fedlora-mpi run {copy}/config.yaml rounds=9 {override} output=...'" in result[2]
    assert content(copy) == before


def test_fewer_rounds_than_are_done_are_told_and_change_nothing(call, copy):
    before = content(copy)
    code, out, err = call("resume", copy, "rounds=3")
    assert (code, out) == (0, "")
    line = f"fedlora-mpi: rounds = 3: {copy} has 6 rounds already; nothing is changed"
    assert err.splitlines() == [f"resuming {copy} after round 6", line]
    assert content(copy) == before


def test_a_run_killed_before_its_first_checkpoint_begins_again(call, copy, six):
    shutil.rmtree(copy / "checkpoints")
    assert call("resume", copy)[0] == 0
    assert_same_run(six, copy)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(call, copy, six):
    damage(copy / "checkpoints/000006/worker-0000.h5")
    code, _, err = call("resume", copy)
    assert code == 0
    first, second = err.splitlines()[:2]
    assert (
        first == f"skipped {copy}/checkpoints/000006/worker-0000.h5: checksum differs, the file is "
        "damaged"
    )
    assert second == f"resuming {copy} after round 4"
    assert_same_run(six, copy)


def test_when_all_checkpoints_are_damaged_the_files_are_named(call, copy):
    damaged = [
        copy / f"checkpoints/00000{r}/{name}.h5"
        for r, name in ((2, "server"), (4, "log"), (6, "worker-0000"))
    ]
    for file in damaged:
        damage(file)
    before = content(copy)
    assert_refused(call("resume", copy), "no valid checkpoint", "start anew", *map(str, damaged))
    assert content(copy) == before


def test_a_folder_in_use_is_refused_and_left_as_it_is(call, copy):
    shutil.rmtree(copy / "checkpoints/000006")
    before = content(copy)
    with hold_lock(copy):
        assert_refused(
            call("resume", copy), f"{copy}/.lock: in use by host ", "choose another output"
        )
    assert content(copy) == before
    assert call("resume", copy)[0] == 0


# --- the commands that train nothing


def test_a_plan_tells_the_bytes_that_the_run_then_moves(call, six, tmp_path):
    code, out, err = call("plan", TINY, "rounds=6", "--ranks", 3)
    assert (code, err) == (0, "") and not list(tmp_path.iterdir())
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert {"model", "shared", "personal", "round", "engine", "memory", "time"} <= lines.keys()
    rounds = RunFiles(six).rounds()
    assert f"{rounds['bytes_up'][0] // 4 // 4:,} numbers; " in lines["shared"]
    assert "4 of 7 clients: " in lines["round"]
    assert "3 ranks" in out and "2 workers" in lines["engine"] and "for 6 rounds" in lines["time"]
    personal = RunFiles(six).checkpoint().personal([0])
    assert (
        f"{sum(leaf[0].size for leaf in personal.values()):,} numbers per client"
        in lines["personal"]
    )


@pytest.mark.parametrize("ranks", ["0", "-1"])
def test_a_plan_for_no_rank_is_refused(call, ranks):
    assert_refused(
        call("plan", TINY, f"--ranks={ranks}"),
        f"--ranks = {ranks}: must be an integer of at least 1",
    )


@pytest.mark.parametrize("name", ["plan", "partition"])
def test_a_mistake_in_the_config_is_one_line_here_too(call, name, tmp_path):
    assert_refused(call(name, TINY, "train.lr=-1"), "command line: train.lr = -1")
    assert_refused(call(name, TINY, "data.partition.minimum=100"), "data.partition.clients = 7")
    assert not list(tmp_path.iterdir())


def test_a_partition_is_the_one_that_the_run_uses(call, six, tmp_path):
    code, out, err = call("partition", TINY)
    assert (code, err) == (0, "") and out.endswith("picture: partition-tiny.png\n")
    split = RunFiles(six).partition()
    for client, counts in enumerate(split["train_counts"]):
        row = [str(n) if n else "·" for n in counts]
        assert [str(client), *row, str(sum(counts)), str(len(split["test"][client]))] in [
            line.split() for line in out.splitlines()
        ]
    assert (tmp_path / "partition-tiny.png").read_bytes().startswith(b"\x89PNG")
    assert call("partition", TINY, "-o", "other.png")[0] == 0
    assert {f.name for f in tmp_path.iterdir()} == {"partition-tiny.png", "other.png"}


def test_a_report_has_a_row_for_each_run(call, six):
    code, out, err = call("report", six, six)
    assert (code, err) == (0, "")
    header, *rows = out.splitlines()
    assert header.split()[:3] == ["method", "rounds", "seed"] and len(rows) == 2
    for row in rows:
        assert row.split()[:4] == [
            "FedLoRA",
            "6",
            "1",
            f"{RunFiles(six).rounds()['accuracy'][-1]:.2%}",
        ]
        assert row.endswith(str(six))


def test_a_digest_is_equal_for_equal_runs_and_only_for_those(call, six, copy, tmp_path):
    assert call("run", TINY, "rounds=2", "output=two")[0] == 0
    code, out, err = call("digest", six, copy, tmp_path / "two")
    assert (code, err) == (0, "")
    pattern = r"(\S+) round (\d) shared ([0-9a-f]{64}) personal ([0-9a-f]{64})"
    found = [re.fullmatch(pattern, line).groups() for line in out.splitlines()]
    assert [each[:2] for each in found] == [
        (str(six), "6"),
        (str(copy), "6"),
        (str(tmp_path / "two"), "2"),
    ]
    assert found[0][2:] == found[1][2:] and len({*found[0][2:], *found[2][2:]}) == 4


@pytest.mark.parametrize("name", ["report", "digest"])
def test_reading_what_is_no_run_is_refused(call, name, tmp_path):
    assert_refused(call(name, tmp_path), f"{tmp_path}: not a run folder, it has no log.h5")


@pytest.mark.parametrize(
    "words",
    [["config"], ["plan"], ["partition"], ["submit", "--dry-run"],
     ["pretrain", "--epochs=1", "--to", "net.safetensors"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_every_command_tells_what_an_override_resets(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command, *options = words
    iid = "data.partition={kind: iid, train: 20, test: 5}"
    assert main([command, str(TINY), iid, *options]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "resets" in line]
    assert len(told) == 1 and "data.partition.alpha = 0.7" in told[0]
