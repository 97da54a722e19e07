"""Sweeps: the axes of Hydra's syntax, the runs that they make, and a sweep that goes on where it was."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from folders import write_run
from runs import TINY, command_line, process_environment, wait_until

import fedlora_mpi
from fedlora_mpi.config import ConfigError
from fedlora_mpi.experiment.processes import plan_slots
from fedlora_mpi.store.lock import hold_lock
from fedlora_mpi.store.sweep_folder import add_runs, read_description
from fedlora_mpi.sweeps import grid
from fedlora_mpi.sweeps.axes import Axis, Interval, parse_axis, split_items, split_overrides
from fedlora_mpi.sweeps.carry_out import Grid, end_state
from fedlora_mpi.sweeps.sweep import SweepError
from fedlora_mpi.sweeps.view import LiveView, View

# --- axes


@pytest.mark.parametrize(
    "text, values",
    [
        ("0.1,0.2", ["0.1", "0.2"]),
        ("choice(a, b)", ["a", "b"]),
        ("choice(a)", ["a"]),
        ("range(1,5)", ["1", "2", "3", "4"]),
        ("range(3)", ["0", "1", "2"]),
        ("range(start=1,stop=6,step=2)", ["1", "3", "5"]),
        ("range(10,1,-4)", ["10", "6", "2"]),
        ("range(0,1,0.25)", ["0.0", "0.25", "0.5", "0.75"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("[1,2],[3,4]", ["[1,2]", "[3,4]"]),
        ("{name: a, k: 1},b", ["{name: a, k: 1}", "b"]),
        ("it's,fine", ["it's", "fine"]),
        ("'it''s, a',b", ["'it''s, a'", "b"]),
    ],
)
def test_an_axis_has_the_values_that_hydra_gives_it(text, values):
    assert list(parse_axis("k", text).values) == values


def test_a_range_of_decimals_has_no_rounding_error():
    assert parse_axis("k", "range(0,1,0.1)").values == tuple(f"0.{digit}" for digit in range(10))


@pytest.mark.parametrize("text", ["0.1", "'a,b'", "[1,2]", "{a: 1, b: 2}", "[1,2", "f(x)"])
def test_one_value_is_no_axis(text):
    assert parse_axis("k", text) is None and split_items(text) == [text]


def test_an_interval_is_of_integers_where_both_ends_are():
    assert parse_axis("k", "interval(1,8)") == Interval("k", 1, 8)
    assert isinstance(parse_axis("k", "interval(1.0,8)").low, float)
    assert parse_axis("k", "tag(log, interval(1e-5,1e-1))") == Interval("k", 1e-5, 0.1, True)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("range(1,1)", "gives no value: the numbers end before stop = 1"),
        ("range(0,1,0)", "must be range(stop) or range(start,stop,step)"),
        ("range(x)", "must be range(stop)"),
        ("range(0,1e9)", "gives 1000000000 values"),
        ("range(1,2,3,4)", "takes start, stop, step"),
        ("a,,b", "value 2 is empty"),
        ("a,b,a", "a is there twice"),
        ("0.1,0.10", "0.1 and 0.10 are the same value"),
        ("choice(1,2,1.0)", "1 and 1.0 are the same value"),
        ("a,choice(b,c)", "must stand alone"),
        ("interval(1)", "must be a number"),
        ("interval(2,1)", "a below b"),
        ("tag(log,interval(0,1))", "must begin above 0"),
        ("tag(log,range(3))", "must be tag(log, interval(a,b))"),
    ],
)
def test_a_wrong_axis_is_one_line(text, reason):
    with pytest.raises(ConfigError) as refused:
        parse_axis("train.lr", text)
    assert str(refused.value).startswith(f"command line: train.lr={text}: ")
    assert reason in str(refused.value)


@pytest.mark.parametrize("text", ["1,true", "'1',1", "[1,2],[1,3]", "null,''"])
def test_values_that_only_look_alike_are_two(text):
    assert len(parse_axis("k", text).values) == 2


@pytest.mark.parametrize("one, two", [("0.1,0.2", "0.3"), ("0.3", "0.1,0.2"), ("1,2", "3,4")])
def test_a_key_with_several_values_is_there_once(one, two):
    with pytest.raises(ConfigError) as refused:
        split_overrides([f"train.lr={one}", "seed=1,2", f"train.lr={two}"])
    reason = f"train.lr is there twice, as {one} and {two}; give all its values once"
    assert str(refused.value) == f"command line: {reason}"


def test_the_later_of_two_single_values_counts_and_output_is_no_axis():
    plain, axes = split_overrides(["seed=1", "output=a,b", "train.lr=1", "seed=3", "rounds=1,2"])
    assert plain == ["output=a,b", "train.lr=1", "seed=3"]
    assert axes == [Axis("rounds", ("1", "2"))]


# --- the runs of a grid


def jobs_of(*overrides):
    plain, axes = split_overrides(overrides)
    place = grid.sweep_place(str(TINY), plain)
    return grid.make_jobs(str(TINY), plain, list(grid.combinations(axes)), place)


def folders(*overrides):
    return [str(job.folder) for job in jobs_of(*overrides)]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_folder_is_named_by_what_varies_and_the_last_axis_varies_fastest():
    assert folders("train.lr=0.1,0.2", "seed=1,2", "rounds=3", "output=s") == [
        "s/lr=0.1,seed=1", "s/lr=0.1,seed=2", "s/lr=0.2,seed=1", "s/lr=0.2,seed=2",
    ]  # fmt: skip


def test_an_output_with_placeholders_names_each_run_by_any_key():
    pattern = "output=s/{train.lr}/{faults.tolerate}-{algorithm}-{seed}"
    assert folders("train.lr=0.1,0.2", "algorithm=local", pattern) == [
        "s/0.1/false-local-1", "s/0.2/false-local-1",
    ]  # fmt: skip
    assert grid.sweep_place(str(TINY), [pattern, "train.lr=0.1"]) == (grid.Path("s"), True)


def test_an_override_may_name_the_value_of_an_axis():
    jobs = jobs_of("seed=1,2", "data.partition.seed={seed}", "output=s")
    assert [job.config.data.partition.seed for job in jobs] == [1, 2]
    assert jobs[1].overrides == ("data.partition.seed=2", "seed=2", "output=s/seed=2")


def test_without_output_a_sweep_lies_beside_the_runs_of_its_config(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(TINY.read_text().replace("output: run", "output: a/b/{name}-{seed}"))
    assert grid.sweep_place(str(config), []).folder == grid.Path("a/b/c-sweep")


def test_a_name_that_no_folder_can_have_keeps_a_checksum():
    one, two = (grid.folder_name({"k": value}) for value in ("[1,2]", "[1/2]"))
    assert one.startswith("k=-1-2--") and two.startswith("k=-1-2--") and one != two
    assert len(grid.folder_name({"k": "x" * 90, "l": "y" * 90, "m": "z" * 90})) < 220
    assert grid.folder_name({"a.lr": "1", "b.lr": "2"}) == "a.lr=1,b.lr=2"


def test_two_runs_in_one_folder_are_refused():
    with pytest.raises(
        grid.WrongJobs, match="is also that of lr=0.1; put what differs into output"
    ):
        jobs_of("train.lr=0.1,0.2", "output=s/{seed}")


def test_every_wrong_combination_is_told_before_any_run_starts(call, tmp_path):
    code, out, err = call("sweep", TINY, "algorithm=locall,local,fedavg", "rounds=1,0", "seed=1,2")
    assert (code, out) == (2, "") and err.count("\n") == 2
    second, first = err.splitlines()
    assert first.startswith("fedlora-mpi: algorithm=local, rounds=0, seed=1 and 3 more: ")
    assert "rounds = 0: must be an integer of at least 1" in first
    assert second.startswith("fedlora-mpi: algorithm=locall, rounds=1, seed=1 and 3 more: ")
    assert not [*tmp_path.iterdir()]


def test_a_method_that_needs_classes_is_refused_before_any_run(call, tmp_path):
    code, out, err = call("sweep", TINY, "model.loss=mse", "algorithm=fedavg,fedproto")
    assert (code, out) == (2, "") and err.count("\n") == 1 and not [*tmp_path.iterdir()]
    assert err.startswith("fedlora-mpi: algorithm=fedproto: ")
    assert "algorithm.name = fedproto: needs a class of each sample, and model.loss = mse" in err


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["seed=1"], "several values, such as train.lr=0.01,0.1; seed=1 has none"),
        (["seed=1", "train.lr="], "command line: train.lr=: has no value"),
        (["seed=1..3"], "command line: seed=1..3: is one text; write seed='range(1,4)'"),
        (["seed=[1,2]"], "command line: seed=[1,2]: is one value, a list; write seed=1,2"),
        (["train.lr=choice(0.1,0.2"], "train.lr=choice(0.1,0.2: its parenthesis is not closed"),
        (["train.lr=interval(0,1)"], "train.lr: interval is for a search; add --sampler"),
        (["seed=range(200)", "rounds=range(1,101)"], "20000 runs; a sweep has at most 10000"),
        (["seed=1,2", "--jobs", "0"], "--jobs = 0: must be an integer of at least 1"),
        (["seed=1,2", "--ranks", "0"], "--ranks = 0: must be an integer of at least 1"),
    ],
)
def test_a_mistake_is_one_line(call, tmp_path, arguments, reason):
    code, out, err = call("sweep", TINY, *arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1 and reason in err
    assert not [*tmp_path.iterdir()]


# --- a sweep


def test_a_sweep_trains_what_is_left_and_can_grow(call, in_process):
    ask = ("sweep", TINY, "algorithm=fedavg,local", "rounds=1", "output=s", "--jobs", "1")
    code, out, err = call(*ask, "seed=1")
    assert (code, out) == (0, "s: 2 done\n")
    assert err.splitlines()[0] == "s: 2 waiting, 1 at a time"
    assert "[2/2] algorithm=local: done after " in err and ", round 1/1, accuracy " in err
    call(*ask, "seed=1")
    assert len(in_process) == 2
    assert call(*ask, "seed=choice(2)")[:2] == (0, "s: 2 done\n")
    assert len(in_process) == 4
    runs = read_description(grid.Path("s"))["runs"]
    assert runs["algorithm=local"] == {"algorithm": "local"}
    assert runs["algorithm=local,seed=2"] == {"algorithm": "local", "seed": "2"}


def test_more_rounds_go_on_and_other_settings_are_refused(call, in_process):
    ask = ("sweep", TINY, "seed=1,2", "output=s")
    call(*ask, "rounds=1")
    assert call(*ask, "rounds=2")[:2] == (0, "s: 2 done\n")
    assert "resuming s/seed=1 after round 1" in grid.Path("s/seed=1.log").read_text()
    code, _, err = call(*ask, "rounds=2", "train.lr=0.1")
    assert code == 2 and err.count("\n") == 2
    assert "seed=1: " in err and "train.lr = 0.1: the run in s/seed=1 has 0.05" in err


def test_a_failed_run_stops_no_other_and_its_last_line_is_told(call, in_process):
    code, out, err = call("sweep", TINY, "algorithm.lora_epochs=4,1", "rounds=1", "output=s")
    assert (code, out) == (1, "s: 1 failed, 1 done\n")
    told = err.splitlines()[-1]
    assert told.startswith("fedlora-mpi: lora_epochs=4: exit code 2: ")
    assert "must be at most train.epochs = 3" in told and told.endswith("(s/lora_epochs=4.log)")


def test_the_lines_of_a_sweep_are_those_of_the_runs_that_are_left(call, in_process, tmp_path):
    ask = ("sweep", TINY, "rounds=1", "output=s")
    call(*ask, "seed=choice(1)")
    code, out, _ = call(*ask, "seed=1,2", "--print-jobs", "--ranks", "3")
    line = f"fedlora-mpi run --resume --ranks 3 {TINY} rounds=1 seed=2 output=s/seed=2\n"
    assert (code, out) == (0, line) and len(in_process) == 1


def test_the_function_returns_the_runs_and_raises_for_one_that_fails(in_process):
    runs = fedlora_mpi.sweep(TINY, "algorithm=fedavg,local", "rounds=1", "output=s")
    assert list(runs) == ["s/algorithm=fedavg", "s/algorithm=local"]
    assert list(runs.settings["algorithm"]) == ["fedavg", "local"]
    with pytest.raises(SweepError, match="lora_epochs=9: exit code 2: "):
        fedlora_mpi.sweep(TINY, "algorithm.lora_epochs=9,1", "rounds=1", "output=t")
    with pytest.raises(ValueError, match="needs a key with several values"):
        fedlora_mpi.sweep(TINY, "rounds=1")


@pytest.mark.parametrize("config", [{"rounds": 1}, "rounds: 1\nseed: 1\n"])
def test_the_function_takes_a_file_alone(config):
    with pytest.raises(ValueError, match=r"^config: a sweep needs the name of a YAML file, which"):
        fedlora_mpi.sweep(config, "seed=1,2")


def test_the_function_takes_settings_as_texts_alone():
    with pytest.raises(ValueError, match=r"^train: sweep has no such argument; give settings as"):
        fedlora_mpi.sweep(TINY, train={"lr": [0.1, 0.2]})


@pytest.mark.parametrize("output", ["a", "a/b", "a/{seed}"])
def test_a_sweep_in_a_run_folder_is_refused(call, tmp_path, output):
    write_run(tmp_path / "a", [0.5, 0.5, 0.5])
    code, out, err = call("sweep", TINY, "seed=1,2", f"output={output}", "--print-jobs")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert f"output = {output}: a is a run folder; choose a folder outside of it" in err


def test_jobs_are_printed_only_where_the_sweep_could_run(call, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/sweep.json").write_text("{}")
    code, out, err = call("sweep", TINY, "seed=1,2", "output=s", "--print-jobs")
    assert (code, out) == (2, "") and "s/sweep.json: is no description of a sweep" in err


@pytest.mark.parametrize("command", [("watch", "--once"), ("status",), ("resume",)])
def test_a_command_for_one_run_says_that_a_folder_is_a_sweep(call, tmp_path, command):
    add_runs(tmp_path / "s", "x.yaml", {"seed=1": {"seed": "1"}})
    code, out, err = call(command[0], "s", *command[1:])
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "s: is the folder of a sweep, not of a run; give one of the run folders in it" in err


def test_fewer_rounds_than_done_are_a_hint_and_a_stop_after_the_last_round_is_none(
    call, in_process
):
    ask = ("sweep", TINY, "seed=choice(1)", "output=s")
    call(*ask, "rounds=2")
    code, out, err = call(*ask, "rounds=1")
    assert (code, out) == (0, "s: 1 done\n")
    assert "hint: rounds = 1: s/seed=1 has 2 rounds; it stays as it is\n" in err
    (two,), (three,) = (jobs_of(*ask[2:], f"rounds={rounds}") for rounds in (2, 3))
    assert [Grid([]).end(two, code) for code in (75, -10, 1)] == ["done", "done", "failed"]
    assert Grid([]).end(three, 75) == "stopped"


def test_a_description_that_leads_out_of_its_folder_is_refused(tmp_path):
    (tmp_path / "sweep.json").write_text(
        json.dumps({"format_version": 1, "runs": {"../x": {"seed": "1"}}})
    )
    with pytest.raises(ValueError, match="names a run outside its folder"):
        read_description(tmp_path)


# --- Slurm


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A Slurm that keeps the script in ``asked`` and gives the job the number 42."""
    (tmp_path / "bin").mkdir()
    for name, text in {"sbatch": "cat > asked; echo 42", "python": 'echo "$@" >> ran'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "asked"


def test_a_sweep_is_queued_as_one_array_whose_tasks_are_its_runs(call, sbatch, tmp_path):
    ask = ("sweep", TINY, "algorithm=fedavg,local", "seed=1,2", "output=s", "--slurm")
    code, out, _ = call(*ask, "--jobs", "3", "--mem", "8G", "rounds=1")
    assert (code, out) == (
        0,
        "job 42: 4 runs, 1 ranks on 1 node(s) each, output in s/slurm-42_*.log\n",
    )
    script = sbatch.read_text()
    assert "#SBATCH --array=1-4%3\n" in script and "#SBATCH --mem=8G\n" in script
    # task 2, with a python that writes down what it is asked
    text = script.replace(f'export PATH="{grid.Path(sys.executable).parent}:$PATH"', "")
    subprocess.run(["bash", "-c", text], env=os.environ | {"SLURM_ARRAY_TASK_ID": "2"}, check=True)
    run = f"{TINY} rounds=1 algorithm=fedavg seed=2 output=s/algorithm=fedavg,seed=2"
    assert (tmp_path / "ran").read_text().splitlines() == [
        f"-m fedlora_mpi run --resume {run}",
        f"-m fedlora_mpi status {run}",
    ]
    assert len(read_description(tmp_path / "s")["runs"]) == 4


def test_a_dry_run_of_an_array_writes_nothing(call, tmp_path):
    code, out, _ = call("sweep", TINY, "seed=1,2", "output=s", "--slurm", "--dry-run")
    assert code == 0 and "#SBATCH --array=1-2\n" in out and not [*tmp_path.iterdir()]


def test_an_option_for_slurm_alone_is_refused(call):
    assert "--gpus: is for Slurm; add --slurm" in call("sweep", TINY, "seed=1,2", "--gpus", "2")[2]


def test_an_array_without_slurm_is_refused_before_anything_is_written(call, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = call("sweep", TINY, "seed=1,2", "output=s", "--slurm")
    assert code == 2 and "no sbatch on PATH" in err and not [*tmp_path.iterdir()]


@pytest.mark.thorough
def test_ctrl_c_ends_the_runs_after_their_round_and_the_same_command_goes_on(
    tmp_path, interruptible
):
    command = command_line("sweep", TINY, "seed=1,2", "rounds=400", "output=s", "--jobs", "1")
    env = process_environment()
    sweep = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (tmp_path / "s/seed=1/log.h5").is_file())
    time.sleep(1)
    sweep.send_signal(signal.SIGINT)
    err = sweep.communicate(timeout=120)[1]
    assert sweep.returncode == 75 and "not done; to go on, give the same command again" in err
    assert "stopped after round" in (tmp_path / "s/seed=1.log").read_text()
    assert not (tmp_path / "s/seed=2").exists()
    assert os.listdir(tmp_path / "s/seed=1/checkpoints")


# --- what is shown


def job_at(folder, seed):
    values = {"seed": str(seed)}
    place = grid.Place(folder, names_runs=False)
    return grid.make_job(str(TINY), [], values, place)


def test_the_table_shows_what_runs_and_what_has_failed_before_the_rest(tmp_path, capsys):
    pytest.importorskip("rich")
    jobs = [job_at(tmp_path / "s", seed) for seed in range(40)]
    write_run(jobs[38].folder, [0.5, 0.5, 0.5], rounds=4)
    with LiveView("s", {job.name: "waiting" for job in jobs}, lambda: 40) as view:
        view.begin(jobs[38])
        view.refresh([jobs[38]])
        view.end(jobs[39], "failed", 1.0)
    out = capsys.readouterr().out
    assert "s: 38 waiting, 1 running, 1 failed" in out
    assert re.search(r"seed=38 +running +1/4 +50.00% +2 s", out)
    assert re.search(r"seed=39 +failed", out) and "seed=0" in out and "seed=37" not in out


def test_a_view_counts_the_runs_of_a_search_that_are_not_known_yet(tmp_path, capsys):
    view = View("s", {}, lambda: 5)
    view.begin(job := job_at(tmp_path / "s", 1))
    view.end(job, "pruned", 2.0)
    assert view.counts() == "1 pruned, 4 waiting"
    assert capsys.readouterr().err == "[1/5] seed=1: pruned after 2 s, round 0/4\n"


@pytest.mark.parametrize(
    "code, state", [(0, "done"), (75, "stopped"), (-10, "stopped"), (138, "stopped"), (1, "failed")]
)
def test_the_exit_code_of_a_run_says_how_it_ended(code, state):
    assert end_state(code) == state


def test_a_run_that_another_process_trains_is_left_to_it(call, in_process, tmp_path):
    ask = ("sweep", TINY, "seed=1,2", "output=s")
    call(*ask, "rounds=1")
    with hold_lock(tmp_path / "s/seed=1"):
        code, out, err = call(*ask, "rounds=2")
    assert (code, out) == (75, "s: 1 elsewhere, 1 done\n") and len(in_process) == 3
    assert "s: not done; to go on, give the same command again" in err


def test_as_many_runs_at_a_time_as_the_cores_have_room_for(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert plan_slots(None, ranks=3, threads=2).number == 2
    assert plan_slots(5, ranks=3, threads=2).number == 5
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert plan_slots(None, ranks=1, threads=2) == (2, ["0", "1"])
