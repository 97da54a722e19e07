"""Paths as users give them: names that YAML reads as something else, users that are not there,
names no system takes.
"""

import os
import shutil

import pytest
from runs import TINY

from fedlora_mpi.cli import main
from fedlora_mpi.config import ConfigError, read
from fedlora_mpi.store.reader import RunFiles

TRAPS = (
    "1", "1e5", "0o7", "1:30", ".5", "true", "null", "x ~", "a: b", "x:", ":", "@x", "`x", "%TAG", "!t", "&a", "*a", "|", ">",
    "?", "-", "- a", "[1]", "{foo}", "{seed}", "#h", "d #1", "it's", '"', "a b", " x", "a=b", "=", "2020-01-01", "a\\b",
)  # fmt: skip
# a number, a word, YAML's signs, an option, a placeholder, a comment
TELLING = ("1", "true", "a: b", "-", "{seed}", "#h", " x")
LONG = ("x" * 300, "x/" * 3000)
COMMANDS = (
    ("run",), ("plan",), ("partition",), ("pretrain", "--to", "x.safetensors"), ("submit", "--dry-run"), ("resume",),
    ("report",), ("digest",), ("watch", "--once"), ("export", "--to", "x.pt"),
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of one round, to be copied."""
    folder = tmp_path_factory.mktemp("paths") / "run"
    assert main(["run", str(TINY), "rounds=1", "engine.personal=disk", f"output={folder}"]) == 0
    return folder


@pytest.mark.parametrize("name", [name for name in TRAPS if name[0] not in "'\"{"])
def test_a_path_on_the_command_line_is_taken_letter_by_letter(name):
    config = read(TINY, [f"output={name}", f"data.root={name}"])
    assert config.output == config.data.source.root == name


@pytest.mark.parametrize(
    "name", [n if n in TELLING else pytest.param(n, marks=pytest.mark.thorough) for n in TRAPS]
)
def test_a_run_folder_goes_on_under_any_name(name, run, call, tmp_path):
    shutil.copytree(run, tmp_path / name)
    if name != "-":
        arguments = ("resume", name) if name[0] != "-" else ("resume", f"./{name}")
        code, out, err = call(*arguments, "rounds=2")
        assert (code, out) == (0, f"{name}: done\n"), err
        assert RunFiles(tmp_path / name).checkpoints()[-1] == 2
        # its config.yaml, now with this name, opens again
        code, out, err = call(*arguments, "rounds=2")
        assert (code, out) == (0, f"{name}: done\n"), err
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_run_with_resume_goes_on_in_a_folder_whose_name_is_a_number(call, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(TINY.read_text().replace("output: run", 'output: "{seed}"'))
    assert call("run", config, "rounds=1")[0] == 0
    assert call("run", config, "rounds=2", "--resume")[:2] == (0, "1: done\n")
    assert call("resume", "1", "rounds=3")[:2] == (0, "1: done\n")


@pytest.mark.parametrize(
    "override",
    ["algorithm=fedavg #1", "seed=1 # one", "algorithm={name: fedavg} # x", "model=cnn\n# y"],
)
def test_an_override_that_would_lose_a_comment_is_refused(override):
    with pytest.raises(ConfigError, match="would be a comment"):
        read(TINY, [override])


def test_signs_of_comments_within_texts_are_kept():
    assert read(TINY, ["output='a #1'"]).output == "a #1" == read(TINY, ["output=a #1"]).output


@pytest.mark.parametrize("path", [*LONG, "~nobody-at-all/x", os.fsdecode(b"\xff"), "x.yaml/y"])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_path_that_cannot_be_is_one_line(command, path, call, tmp_path):
    code, out, err = call(command[0], path, *command[1:])
    assert code == 2 and out == "" and "Traceback" not in err
    assert err.startswith("fedlora-mpi: ") and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [*LONG, "~nobody-at-all/x", os.fsdecode(b"\xff")])
@pytest.mark.parametrize("key", ["output", "data.root", "model.weights", "model.adapter"])
def test_a_setting_that_cannot_be_a_path_is_one_line(key, path, call, tmp_path):
    more = ("data.dataset=folder", "data.synthetic=null") if key == "data.root" else ()
    more = ("algorithm=fedit",) if key == "model.adapter" else more
    path = f"{path}.pt" if key == "model.weights" else path
    code, out, err = call("run", TINY, f"{key}={path}", *more[:1])
    assert code == 2 and out == "" and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())
