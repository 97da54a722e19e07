"""``fedlora_mpi.run`` and ``fedlora_mpi.resume``: what the commands do, from a script or a
notebook, without a trace in the process.
"""

import doctest
import importlib
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
import zipfile
from dataclasses import fields
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import TESTS, TINY, assert_same_run, mpirun_command, process_environment, run_process

import fedlora_mpi
from fedlora_mpi import config as configs
from fedlora_mpi.config.experiment import Config
from fedlora_mpi.core.packaged import packaged_configs
from fedlora_mpi.core.seeds import global_states
from fedlora_mpi.mpi import local_ranks


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def message_of(call) -> str:
    """The message of the ValueError that ``call()`` raises: one line, and few frames."""
    with pytest.raises(ValueError) as info:
        call()
    assert "\n" not in str(info.value) and info.value.__cause__ is None
    assert len(traceback.extract_tb(info.tb)) <= 6
    return str(info.value)


# --- the same run as by the command


def test_run_is_the_command_and_gives_the_run(trained, capsys):
    run = fedlora_mpi.run(TINY, rounds=2, train={"lr": 0.1})
    out, err = capsys.readouterr()
    assert_same_run(run.path, trained("rounds=2", "train.lr=0.1"))
    assert out == "run: done\n" and "round 2/2" in err
    assert (run.config["train"]["lr"], run.config["train"]["epochs"]) == (0.1, 3)


def test_resume_is_the_command_and_quiet_prints_no_round(trained, capsys):
    fedlora_mpi.run(str(TINY), quiet=True, **{"rounds": 2})
    run = fedlora_mpi.resume("run", quiet=True, rounds=4)
    out, err = capsys.readouterr()
    assert out == "" and "round 1/" not in err
    assert_same_run(run.path, trained())


def test_a_dict_and_a_text_are_configs(trained, folder):
    text = TINY.read_text()
    tree = configs.parse_tree(text)
    before = repr(tree)
    assert configs.read(tree) == configs.read({"base": str(TINY)}) == configs.read(TINY)
    run = fedlora_mpi.run(tree, quiet=True, rounds=2, output="runs/{name}")
    assert_same_run(run.path, trained("rounds=2"))
    assert repr(tree) == before and run.path == Path("runs/config")
    (folder / "sub.yaml").write_text(text)
    (folder / "file.yaml").write_text(configs.tree_yaml({"base": "sub.yaml", "seed": 3}))
    os.chdir("/")  # the base of the file is absolute
    assert configs.read(folder / "file.yaml") == configs.read(TINY, ["seed=3"])


def test_overwrite_and_resume_say_what_happens_to_a_folder_that_is_there():
    fedlora_mpi.run(TINY, quiet=True, rounds=1)
    said = message_of(lambda: fedlora_mpi.run(TINY, quiet=True, rounds=1))
    assert "output = run: the folder exists" in said
    assert len(fedlora_mpi.run(TINY, quiet=True, rounds=2, resume=True).array("accuracy")) == 2
    assert len(fedlora_mpi.run(TINY, quiet=True, rounds=1, overwrite=True).array("accuracy")) == 1
    said = message_of(lambda: fedlora_mpi.run(TINY, resume=True, overwrite=True))
    assert said.startswith("resume = True: ")


@pytest.mark.parametrize(
    "value, text",
    [
        (0.05, "a=0.05"),
        (1e-7, "a=1.0e-07"),
        ("0.05", "a='0.05'"),
        ("a #b: c", "a='a #b: c'"),
        (True, "a=true"),
        (None, "a=null"),
        (float("inf"), "a=.inf"),
        (np.float64(0.5), "a=0.5"),
        (np.int64(3), "a=3"),
        (TINY, f"a={TINY}"),
        ({"kind": "iid", "list": (1, 2)}, "a={kind: iid, list: [1, 2]}"),
        ("x" * 300 + " y", f"a={'x' * 300} y"),
    ],
)
def test_a_value_of_python_is_an_override(value, text):
    assert configs.override_text("a", value) == text


def test_an_override_has_the_value_of_python():
    overrides = {"output": "it's {seed}", "train.lr": np.float32(0.5), "engine.group_size": "auto"}
    texts = [configs.override_text(key, value) for key, value in overrides.items()]
    config = configs.read(TINY, texts)
    assert (config.output, config.train.lr) == ("it's 1", 0.5)
    assert config.engine.group_size == "auto"


def test_no_keyword_of_run_is_a_key_of_a_config():
    keys = {field.name for field in fields(Config)}
    for function in (fedlora_mpi.run, fedlora_mpi.resume):
        assert not keys & set(signature(function).parameters)


@pytest.mark.thorough  # the quick start
def test_the_examples_hold():
    results = doctest.testmod(importlib.import_module(fedlora_mpi.run.__module__))
    assert results == (0, 7)


def test_a_run_may_be_read_from_another_working_folder(folder):
    run = fedlora_mpi.run(TINY, quiet=True, rounds=1)
    accuracy = run.array("accuracy")
    (folder / "other").mkdir()
    os.chdir(folder / "other")
    assert np.array_equal(run.array("accuracy"), accuracy) and run.path == Path("run")
    assert run.client(0).weights


def test_a_file_in_the_place_of_the_run_folder_is_told(folder):
    (folder / "run").touch()
    said = message_of(lambda: fedlora_mpi.run(TINY, quiet=True))
    assert said.endswith("output = run: is no folder; choose another with output=...")


EDITED = """from dataclasses import dataclass
from fedlora_mpi import Algorithm, Upload
from edited_factor import FACTOR

@dataclass(frozen=True)
class A(Algorithm):
    def upload(self, start, end, round_):
        return Upload(mean={n: w * FACTOR for n, w in end.shared.items()})
"""


def test_an_edited_method_is_loaded_anew(folder, monkeypatch):
    monkeypatch.delitem(sys.modules, "edited", raising=False)
    monkeypatch.delitem(sys.modules, "edited_factor", raising=False)

    def digest(method: str, factor: str) -> dict:
        (folder / "edited.py").write_text(method)
        (folder / "edited_factor.py").write_text(f"FACTOR = {factor}\n")
        importlib.invalidate_caches()
        options = {"algorithm": "edited:A", "rounds": 1, "overwrite": True, "quiet": True}
        return fedlora_mpi.run(TINY, **options).digest()

    plain = digest(EDITED, "1.0")
    first = sys.modules["edited"].A
    assert digest(EDITED, "1.0") == plain and sys.modules["edited"].A is first  # nothing changed
    halved = digest(EDITED.replace("FACTOR for", "0.5 * FACTOR for"), "1.0")
    assert halved != plain
    assert digest(EDITED, "0.500") == halved  # the module that it imports has changed
    assert "mistake" in message_of(lambda: digest("mistake\n", "1.0"))
    assert digest(EDITED, "1.0") == plain
    other = EDITED.replace("class A", "class Other")
    assert "has no attribute 'A'" in message_of(lambda: digest(other, "1.0"))


# --- mistakes and ends


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: fedlora_mpi.run([1]), "config = [1]: must be a YAML file, the name of a config"),
        (lambda: fedlora_mpi.run(None), "config = None: must be a YAML file"),
        (lambda: fedlora_mpi.run({1: 2}), "config: the key 1 must be a text"),
        (lambda: fedlora_mpi.run(TINY, ranks="3"), "ranks = '3': must be an integer of at least 1"),
        (lambda: fedlora_mpi.run(TINY, **{"train.lrr": 1}), "train.lrr = 1: train has no such"),
        (lambda: fedlora_mpi.run(TINY, rounds=object()), "rounds = <object"),
        (lambda: fedlora_mpi.run("nothing"), "nothing: cannot be read: No such file or directory;"),
        (lambda: fedlora_mpi.run("a: 3\nb: ["), "config: line 2, column 5: "),
        (lambda: fedlora_mpi.run({"rounds": 3}), "config: data: must be given"),
        (lambda: fedlora_mpi.run(TINY, ranks=0), "ranks = 0: must be an integer of at least 1"),
        (lambda: fedlora_mpi.resume("nothing"), "nothing: not a run folder"),
        (lambda: fedlora_mpi.resume(None), "None: is no path; give a text or a pathlib.Path"),
        (lambda: fedlora_mpi.open_run(3), "3: is no path; give a text or a pathlib.Path"),
        (
            lambda: fedlora_mpi.run(TINY, **{"data.dataset": "npz", "data.path": "none.npz"}),
            f"{TINY}: data.path = none.npz: cannot be read",
        ),
    ],
)
def test_a_mistake_is_a_value_error_of_one_line(call, said, capsys, folder):
    assert message_of(call).startswith(said)
    assert capsys.readouterr().out == "" and not (folder / "run").exists()


def test_what_cannot_be_trained_is_a_runtime_error():
    with pytest.raises(RuntimeError, match="not finite"):
        fedlora_mpi.run(TINY, quiet=True, rounds=2, **{"train.lr": 1e30})


def test_a_signal_stops_the_run_with_a_checkpoint_and_raises_keyboard_interrupt(interruptible):
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt, match="run: stopped; continue with fedlora_mpi.resume"):
        fedlora_mpi.run(TINY, quiet=True, rounds=100_000, **{"checkpoint.every": 100_000})
    assert len(fedlora_mpi.open_run("run").checkpoints) == 1


# --- the process is as before


def test_a_run_leaves_no_trace_in_the_process():
    def state():
        handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)]
        return global_states(), torch.get_num_threads(), handlers, sys.path, dict(os.environ)

    former = torch.get_num_threads()
    torch.set_num_threads(2)  # the run has one
    try:
        before = state()
        sys.path = [*sys.path]
        fedlora_mpi.run(TINY, quiet=True, rounds=1)
        assert state() == before
    finally:
        torch.set_num_threads(former)


def test_a_module_of_the_working_folder_is_found_as_by_the_command(folder):
    (folder / "my_network.py").write_text(
        "from torch import nn\n\n\ndef net(classes, shape):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    run = fedlora_mpi.run(
        TINY, quiet=True, rounds=1, algorithm="fedavg", model={"name": "my_network:net"}
    )
    assert sorted(run.shared) == ["1.bias", "1.weight"]


# --- ranks


def launch(monkeypatch, code: str) -> None:
    """A launcher that runs ``code`` in place of the ranks."""
    line = [sys.executable, "-c", code]
    monkeypatch.setattr(local_ranks, "launch_command", lambda ranks, is_tolerant: line)


def test_ranks_are_started_with_the_same_settings_and_their_lines_shown(monkeypatch, capsys):
    code = "import sys; print(sys.argv[1:]); text = open(sys.argv[-2]).read(); print(text)"
    launch(monkeypatch, f"{code}; sys.exit(75)")
    with pytest.raises(KeyboardInterrupt):
        fedlora_mpi.run({"base": str(TINY)}, ranks=3, quiet=True, overwrite=True, rounds=2)
    err = capsys.readouterr().err
    assert "['run', '--overwrite', '--quiet', '--ranks', '3', '--', " in err
    assert "config.yaml', 'rounds=2']" in err and f"base: {TINY}" in err


@pytest.mark.parametrize("code, error", [(2, ValueError), (1, RuntimeError)])
def test_the_line_of_ranks_that_fail_is_the_message(monkeypatch, code, error):
    line = "fedlora-mpi: x.yaml: seed = 3: is wrong"
    launch(monkeypatch, f"import sys; print('a'); sys.exit(sys.stderr.write({line!r}) and {code})")
    with pytest.raises(error, match="^x.yaml: seed = 3: is wrong$"):
        fedlora_mpi.run(TINY, ranks=3)


@pytest.mark.thorough  # three ranks
def test_three_ranks_give_the_same_bits(trained):
    assert_same_run(fedlora_mpi.run(TINY, ranks=3, rounds=2).path, trained("rounds=2"))


@pytest.mark.thorough  # two ranks
def test_a_script_under_mpirun_trains_on_its_ranks(folder, trained):
    (folder / "script.py").write_text(
        f"import fedlora_mpi\nrun = fedlora_mpi.run({str(TINY)!r}, rounds=2)\n"
        "print(len(run.array('accuracy')), 'rounds')\n"
        f"try:\n    fedlora_mpi.run({str(TINY)!r})\nexcept ValueError:\n    print('refused')\n"
    )
    done = run_process([*mpirun_command(2), sys.executable, "script.py"], folder)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.count("2 rounds"), done.stdout.count("refused")) == (2, 2)
    assert_same_run(folder / "run", trained("rounds=2"))


# --- names


def test_dir_lists_the_names_with_docstrings_and_stays_lazy():
    code = (
        "import sys, fedlora_mpi; names = dir(fedlora_mpi); "
        "assert {'run', 'resume', 'open_run', 'open_runs', 'Algorithm', 'OwnData'} <= {*names}; "
        "assert not {'torch', 'numpy', 'yaml'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], env=process_environment(), check=True)
    for name in dir(fedlora_mpi):
        assert getattr(fedlora_mpi, name).__doc__, name


def test_the_reference_has_every_name():
    page = (TESTS.parent / "docs/api.md").read_text(encoding="utf-8")
    for name in fedlora_mpi.__all__:
        assert f"fedlora_mpi.{name}" in page, f"docs/api.md has no fedlora_mpi.{name}"
    for name in re.findall(r"^\.\. auto\w+:: (\S+)$", page, re.MULTILINE):
        assert pkgutil.resolve_name(name).__doc__, name


def test_a_name_without_a_suffix_is_a_config_of_the_package(folder):
    names = [path.stem for path in (TESTS.parent / "configs").glob("*.yaml")]
    assert sorted(packaged_configs()) == sorted(names)
    config = configs.read("quickstart", ["rounds=3"])
    assert config == configs.read(TESTS.parent / "configs/quickstart.yaml", ["rounds=3"])
    (folder / "quickstart").write_text(TINY.read_text())
    assert configs.read("quickstart") == configs.read(TINY)  # a file comes first


# --- installed, and beside a clone


@pytest.mark.thorough  # a wheel is built
def test_a_wheel_has_the_configs_and_an_editable_install_wins_over_the_clones_folder(tmp_path):
    pytest.importorskip("setuptools")
    clone = tmp_path / "work/fedlora_mpi"  # beside the script, without __init__.py
    names = ("fedlora_mpi", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
    for name in names:
        source = TESTS.parent / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, clone / name)
    code = "from setuptools import build_meta as b; b.build_wheel('w'); b.build_editable('e')"
    (clone / "w").mkdir(), (clone / "e").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=clone, check=True, capture_output=True)
    for kind in ("w", "e"):
        zipfile.ZipFile(next(clone.glob(f"{kind}/*.whl"))).extractall(tmp_path / kind)
    found = {path.name for path in (tmp_path / "w/fedlora_mpi/configs").iterdir()}
    assert found == {path.name for path in (TESTS.parent / "configs").iterdir()}
    line = [sys.executable, "-m", "fedlora_mpi", "config", "quickstart"]
    env = process_environment(PYTHONPATH=str(tmp_path / "w"))
    shown = subprocess.run(line, cwd=tmp_path, env=env, text=True, capture_output=True)
    assert f"# {tmp_path}/w/fedlora_mpi/configs/quickstart.yaml:" in shown.stdout, shown.stderr
    (tmp_path / "work/script.py").write_text(
        f"import site; site.addsitedir({str(tmp_path / 'e')!r})\n"
        "import fedlora_mpi; print(fedlora_mpi.__file__)\n"
    )
    env = process_environment()
    env.pop("PYTHONPATH", None)
    # without the packages of this Python, where a clone may be installed the same way
    line = [sys.executable, "-S", tmp_path / "work/script.py"]
    shown = subprocess.run(line, env=env, text=True, capture_output=True, check=True)
    assert shown.stdout == f"{clone}/fedlora_mpi/__init__.py\n"


@pytest.mark.parametrize(
    "typed, words",
    [("fedlora-mpi res", {"resume"}), ("fedlora-mpi run quick", {"quickstart"})],
)
def test_a_shell_completes_commands_and_configs(typed, words, folder):
    pytest.importorskip("argcomplete")
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": typed, "COMP_POINT": str(len(typed))}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": "words", "_ARGCOMPLETE_IFS": "\n"}
    code = "from fedlora_mpi.cli import main; main()"
    env = process_environment(**asked)
    subprocess.run([sys.executable, "-c", code], env=env, cwd=folder, check=True, timeout=60)
    assert {word.strip() for word in (folder / "words").read_text().split("\n")} == words


def test_help_needs_no_library_for_completion():
    code = (
        "import sys\nfrom fedlora_mpi.cli import main\ntry:\n    main(['--help'])\n"
        "except SystemExit:\n    assert not {'argcomplete', 'torch', 'yaml'} & {*sys.modules}\n"
    )
    subprocess.run([sys.executable, "-c", code], env=process_environment(), check=True)
