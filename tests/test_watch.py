"""The view of a run is what its log says, and ends when the run does."""

import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
from folders import write_run
from runs import command_line, process_environment

from fedlora_mpi.analysis import watch
from fedlora_mpi.cli import main
from fedlora_mpi.store.files import StoreError
from fedlora_mpi.store.lock import hold_lock, is_held
from fedlora_mpi.store.log import Log


def seen(tmp_path, rounds=10, quiet=0.0, ranks=3, **columns):
    """What a log with these columns says."""
    several = len(next(iter(columns.values()))) if columns else 0
    config = {
        "rounds": rounds,
        "algorithm": {"name": "fedlora"},
        "data": {"dataset": "digits", "partition": {"clients": 7}},
    }
    row = {
        "round": np.arange(1, several + 1),
        "train_loss": np.full(several, 0.5),
        "seconds_train": np.full(several, 3.0),
    }
    row |= {"seconds_exchange": np.full(several, 1.0)}
    stages = {"train": np.arange(ranks) + 1.0, "waiting": np.zeros(ranks)}
    return watch.RunStatus(
        tmp_path, config, row | columns, watch.RankLoad(stages, 0.5) if ranks else None, quiet
    )


def text(view, width=80, height=24):
    lines = watch.plain_text(watch.render_frame(view, width, height)).split("\n")
    assert len(lines) <= height and max(map(len, lines)) <= width
    return lines


def test_a_curve_joins_its_points_from_the_lowest_to_the_highest():
    assert watch.braille_curve(np.array([0, 7]), np.array([0.0, 7.0]), (0, 7), 4, 2) == [
        "⠀⠀⡠⠊",
        "⡠⠊⠀⠀",
    ]
    assert watch.braille_curve(np.array([0, 3]), np.array([5.0, 5.0]), (0, 7), 4, 1) == ["⠉⠉⠀⠀"], (
        "as far as there are rounds"
    )
    assert watch.braille_curve(np.array([7]), np.array([1.0]), (0, 7), 4, 1) == ["⠀⠀⠀⠈"], (
        "a lone point is seen"
    )
    steep = watch.braille_curve(np.array([0, 1]), np.array([0.0, 1.0]), (0, 1), 1, 2)
    assert steep == ["⢸", "⡸"], "no gap between neighbours"


def test_a_frame_tells_round_accuracy_time_left_and_load(tmp_path):
    view = seen(
        tmp_path, accuracy=np.array([0.25, np.nan]), accuracy_worst=np.array([0.125, np.nan])
    )
    lines = text(view)
    assert lines[0] == f"{tmp_path}  fedlora on digits, 7 clients"[:80].rstrip()
    assert lines[1] == "round 2/10 · accuracy 25.00% (worst client 12.50%) after round 1"
    assert lines[2] == "train loss 0.5000 · 4 s a round · 32 s left"
    assert lines[3].startswith(" 25.00% │") and "└ accuracy by round, 0 to 10" in watch.plain_text(
        watch.render_frame(view, 80, 24)
    )
    assert lines[-4].startswith("seconds a round, workers 50% balanced: █ train")
    assert [line.count("█") for line in lines[-3:]] == [20, 40, 60] and lines[-1].endswith("3 s")


def test_a_frame_fits_small_terminals_many_ranks_and_runs_without_accuracy(tmp_path):
    many = seen(tmp_path, ranks=64, accuracy=np.linspace(0.1, 0.9, 8), accuracy_worst=np.zeros(8))
    lines = text(many, 60, 40)
    assert [int(line.split()[0]) for line in lines[-12:]] == [*range(6), *range(58, 64)]
    assert "of 64 ranks" in watch.plain_text(watch.render_frame(many, 200, 40))
    small = text(many, 40, 8)
    assert small[-1].endswith("accuracy by round, 0 to 10") and not any(
        "█" in line for line in small
    )
    assert text(seen(tmp_path, ranks=0))[1:] == ["round 0/10", "no round yet"]
    unknown = text(seen(tmp_path, accuracy=np.full(3, np.nan), accuracy_worst=np.full(3, np.nan)))
    assert unknown[1] == "round 3/10" and unknown[3].startswith("    0.5 │")


def test_a_silent_run_is_told_and_a_finished_one_never_is(tmp_path):
    columns = {"accuracy": np.full(3, 0.5), "accuracy_worst": np.full(3, 0.5)}
    assert "no row" not in text(seen(tmp_path, quiet=59, **columns))[2]
    assert text(seen(tmp_path, quiet=61, **columns))[2].endswith(
        "28 s left · no row for 61 s: stopped?"
    )
    assert text(seen(tmp_path, rounds=3, quiet=1e5, **columns))[2].endswith(
        "a round · done in 12 s"
    )


def test_a_run_whose_lock_nobody_holds_has_stopped(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "run", [0.5, 0.25, 0.75], rounds=2)
    assert watch.RunStatus.read(folder).is_running is None and is_held(folder) is None
    with hold_lock(folder):
        assert is_held(folder) and watch.RunStatus.read(folder).is_running
        assert "stopped" not in watch.plain_text(
            watch.render_frame(watch.RunStatus.read(folder), 80, 24)
        )
    assert is_held(folder) is False
    assert main(["watch", str(folder), "--once"]) == 0
    assert capsys.readouterr().out.splitlines()[2].endswith("s left · stopped")
    with pytest.raises(StoreError, match="in use by"), hold_lock(folder), hold_lock(folder):
        pass

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    assert main(["watch", str(folder)]) == 0  # and waits for a resume until Ctrl-C
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("round 1/2 ") and line.endswith(" left · stopped")


def test_a_folder_that_is_not_there_yet_is_waited_for(tmp_path, monkeypatch, capsys):
    folder, looks = tmp_path / "runs/a", []

    def wait(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            write_run(folder, [0.5, 0.25, 0.75], rounds=1)

    monkeypatch.setattr(watch.time, "sleep", wait)
    assert main(["watch", str(folder), "--every", "7"]) == 0
    out, err = capsys.readouterr()
    assert looks == [7, 7, 7] and out.startswith("round 1/1 ")
    assert err == (f"fedlora-mpi: waiting for {folder}, which is not there yet; Ctrl-C ends this\n")
    assert main(["watch", str(tmp_path / "none"), "--once"]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_lines_follow_a_run_to_its_end_and_once_is_one_frame(tmp_path, capsys):
    folder = write_run(tmp_path / "run", [0.5, 0.25, 0.75], [1.0, 0.5, 0.75], rounds=2)
    assert main(["watch", str(folder), "--every", "0.1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "round 2/2 · accuracy 75.00% · train loss 0.5000 · 2 s a round · done in 4 s"
    )
    assert main(["watch", str(folder), "--once"]) == 0
    assert "└ accuracy by round, 0 to 2" in capsys.readouterr().out


def test_what_cannot_be_watched_is_refused_in_one_line(tmp_path, capsys):
    for arguments, why in (
        ([tmp_path], "not a run folder"),
        ([tmp_path, "--every", "0"], "--every = 0: must be"),
    ):
        assert main(["watch", *map(str, arguments)]) == 2
        assert why in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_a_run_is_followed_while_another_process_writes_it(tmp_path):
    folder = write_run(tmp_path / "run", [0.5, 0.25, 0.75], rounds=30)
    process = subprocess.Popen(
        command_line("watch", folder, "--every", "0.1"),
        env=process_environment(),
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert process.stdout.readline().startswith("round 1/30")
    log = Log.reopen(folder / "log.h5")
    first = dict.fromkeys(
        ("accuracy", "train_loss", "drift", "seconds_train", "seconds_exchange", "flops"), 0.5
    )
    for round_ in range(2, 31):
        row = first | dict.fromkeys(("clients", "bytes_up", "bytes_down"), 3)
        log.append(round_, row, {"accuracy": np.full(3, 0.5), "loss": np.full(3, 0.5)})
        time.sleep(0.02)
    log.close()
    lines = process.communicate(timeout=120)[0].splitlines()
    assert process.returncode == 0 and lines[-1].startswith("round 30/30 · accuracy 50.00%")
    rounds = [int(line.split()[1].split("/")[0]) for line in lines]
    assert rounds == sorted(set(rounds)), "a line for each new row that was seen"


def on_terminal(folder, stop):
    """(exit code, what a terminal got) of ``watch``, after Ctrl-C where it is to ``stop``."""
    server, terminal = pty.openpty()
    line = command_line("watch", folder, "--every", "0.1")

    # who runs tests in the background may ignore Ctrl-C
    def heard():
        return signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        line,
        env=process_environment(TERM="xterm"),
        stdout=terminal,
        stderr=terminal,
        preexec_fn=heard,
    )
    os.close(terminal)
    got = b""
    with suppress(OSError):  # the end of a terminal
        while part := os.read(server, 1 << 16):
            got += part
            if stop and b"round 1/2" in got:
                process.send_signal(signal.SIGINT)
                stop = False
    os.close(server)
    return process.wait(120), got.decode(errors="ignore")


@pytest.mark.parametrize(
    "rows, stop", [pytest.param(2, False, marks=pytest.mark.thorough), (1, True)]
)
def test_on_a_terminal_the_last_view_stays_at_the_end_and_after_ctrl_c(tmp_path, rows, stop):
    pytest.importorskip("rich")
    folder = write_run(tmp_path / "run", *[[0.5, 0.25, 0.75]] * rows, rounds=2)
    code, got = on_terminal(folder, stop)
    assert code == 0 and "Traceback" not in got
    last = got.rpartition("\x1b[?1049l")[2]  # back from the alternate screen
    assert f"round {rows}/2" in last and "└ accuracy by round, 0 to 2" in last


def test_without_rich_a_terminal_is_told_what_to_install(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "run", [0.5, 0.25, 0.75], rounds=2)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "rich.live", None)
    assert main(["watch", str(folder)]) == 2
    assert "pip install 'fedlora-mpi[analysis]', or use --once" in capsys.readouterr().err


def test_a_log_that_a_resume_replaces_is_waited_for(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", [0.5, 0.25, 0.75], rounds=1)
    begun = watch.RunStatus.read(folder)
    begun = watch.RunStatus(folder, begun.config | {"rounds": 2}, begun.rounds, None, 0.0)
    hidden, shown = (folder / "log.h5").rename(folder / "hidden.h5"), []
    with pytest.raises(ValueError, match="not a run folder"):
        watch._follow_run(begun, 0.001, lambda now: shown.append(now.round))
    looks = iter((lambda: None, lambda: None, lambda: hidden.rename(folder / "log.h5")))
    monkeypatch.setattr(watch.time, "sleep", lambda _: next(looks)())
    watch._follow_run(begun, 0.05, lambda now: shown.append(now.round), show_always=True)
    assert shown == [1, 1, 1]
