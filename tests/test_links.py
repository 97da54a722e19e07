"""A link, or whatever else is no file of ours, in the place of any path that a command writes: what
it leads to stays.

The paths are those of a finished run, and those that each command makes; none is listed here by
hand.
"""

import os
import shutil
import signal
import socket
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import pytest
from runs import TESTS

from fedlora_mpi.cli import main
from fedlora_mpi.store import checkpoint, nolinks
from fedlora_mpi.store.files import StoreError

CONFIG = str(TESTS / "faulty.yaml")
SIDES = ("log.csv=true", "log.tensorboard=true", "checkpoint.keep=2")
OURS = ("fedlora-mpi: ", "round ", "hint: ", "resuming ", "skipped ")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A finished run with all that a run folder may have."""
    pytest.importorskip("tensorboardX")
    home = tmp_path_factory.mktemp("good")
    assert main(["run", CONFIG, f"output={home / 'run'}", *SIDES]) == 0
    return home / "run"


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """A command in ``tmp_path`` that neither hangs nor ends in a traceback: its code, and what it
    says in its one line.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*os.sys.path])

    def run(*arguments):
        capsys.readouterr()
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"{arguments} hangs"))
        signal.alarm(60)
        try:
            code = main([str(argument) for argument in arguments])
        finally:
            signal.alarm(0)
        lines = capsys.readouterr().err.splitlines()
        assert not [line for line in lines if not line.startswith(OURS)], lines
        said = [line for line in lines if line.startswith("fedlora-mpi: ")]
        assert len(said) == (code != 0), said
        return code, "".join(said)

    return run


def content(folder: Path) -> dict:
    """{path: bytes, or where a link leads} of all below a folder."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.is_file() and path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def paths_of(folder: Path) -> list[Path]:
    """All that is in a folder, relative to it,
    and the temporary names of files that are renamed."""
    found = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    renamed = [
        path
        for path in found
        if (folder / path).is_file() and not path.name.startswith((".", "events"))
    ]
    return found + [path.with_name(f".{path.name}.tmp") for path in renamed]


def lead_away(path: Path, outside: Path) -> None:
    """Move what is at ``path`` away, with something precious beside it, and leave a link in its
    place.
    """
    outside.mkdir()
    goal = outside / path.name
    if path.exists():
        path.rename(goal)
    else:
        goal.write_text("years of work")
    if goal.is_dir():
        (goal / "000000").mkdir(exist_ok=True)
        (goal / "000000/precious.txt").write_text("years of work")
        (goal / "precious.txt").write_text("years of work")
    path.symlink_to(goal)


WRITES = {
    "resume": ["resume", "run", "rounds=3"],
    "run --resume": ["run", "--resume", CONFIG, "output=run", "rounds=3", *SIDES],
}
READS = {
    "report": ["report", "run"],
    "watch": ["watch", "run", "--once"],
    "digest": ["digest", "run"],
    "export": ["export", "run", "--to", "out.pt"],
    "report -o": ["report", "run", "-o", "page"],
}


# of the paths, one in so many
some_or_all = pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.thorough)])


@some_or_all
def test_a_link_in_the_place_of_any_path_of_a_run_is_refused_and_what_it_leads_to_stays(
    good, tmp_path, told, every
):
    paths = paths_of(good)[::every]
    for number, path in enumerate(paths + [Path("log.h5"), Path("checkpoints")] * (every > 1)):
        home = tmp_path / str(number)
        shutil.copytree(good, home / "run")
        lead_away(home / "run" / path, home / "outside")
        os.chdir(home)
        before = content(home)
        for name, command in WRITES.items():
            code, line = told(*command)
            assert code == 2 and f"run/{path} is a link" in line and "move it away" in line, (
                name,
                path,
                line,
            )
            assert content(home) == before, (name, path)
        needed = {
            "log.h5": {"report", "watch", "digest", "export"},
            "checkpoints": {"digest", "export"},
        }
        for name in needed.get(str(path), ()):
            code, line = told(*READS[name])
            assert code == 2 and f"run/{path} is a link" in line, (name, path, line)
        assert content(home) == before, path
        shutil.rmtree(home)


@pytest.mark.slow
def test_no_command_writes_where_a_link_in_a_run_leads(good, tmp_path, told):
    for number, path in enumerate(paths_of(good)):
        home = tmp_path / str(number)
        for name, command in READS.items():
            shutil.copytree(good, home / "run")
            lead_away(home / "run" / path, home / "outside")
            os.chdir(home)
            before = content(home)
            told(*command)
            made = {p for p in content(home) if p.split("/")[0] in ("out.pt", "page")}
            assert {p: v for p, v in content(home).items() if p not in made} == before, (name, path)
            shutil.rmtree(home)


@contextmanager
def strange(path: Path, kind: str):
    """A FIFO, a socket or a folder in the place of a file."""
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
        (path / "precious.txt").write_text("years of work")
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = os.getcwd()
            os.chdir(path.parent)  # a socket's path is short
            server.bind(path.name)
            os.chdir(here)
            yield
        return
    yield


@some_or_all
def test_what_is_no_file_in_the_place_of_one_is_refused_without_waiting(
    good, tmp_path, told, every
):
    files = [path for path in paths_of(good) if not (good / path).is_dir()][::every]
    for number, (path, kind) in enumerate(
        zip(files, cycle(["a FIFO", "a folder", "a socket", "a FIFO"]))
    ):
        home = tmp_path / str(number)
        shutil.copytree(good, home / "run")
        (home / "run" / path).unlink(missing_ok=True)
        os.chdir(home)
        with strange(home / "run" / path, kind):
            code, line = told(*WRITES["resume"])
            assert code == 2 and (f"run/{path} is {kind}" in line or "not a run folder" in line), (
                path,
                line,
            )
            code, line = told(*READS["digest" if "checkpoints" in path.parts else "report"])
            assert code in (0, 2), path
        os.chdir(tmp_path)
        shutil.rmtree(home)


OUTPUTS = {  # what they make is called out
    "run": ["run", CONFIG, "output=out", *SIDES],
    "report -o": ["report", "run", "-o", "out"],
    "export .pt": ["export", "run", "--client", "1", "--to", "out.pt"],
    "export .safetensors": ["export", "run", "--to", "out.safetensors"],
    "export .h5": ["export", "run", "--to", "out.h5"],
    "partition -o": ["partition", CONFIG, "-o", "out.png"],
    "partition --to": ["partition", CONFIG, "--to", "pfllib", "out"],
    "pretrain": ["pretrain", CONFIG, "--to", "out.safetensors"],
}


TELLING = ("run", "export .pt", "partition --to")  # a folder with a draft, a file, a plain folder


@pytest.mark.parametrize(
    "name", [n if n in TELLING else pytest.param(n, marks=pytest.mark.thorough) for n in OUTPUTS]
)
def test_a_link_in_the_place_of_any_path_that_a_command_makes_is_refused(
    good, tmp_path, told, name
):
    whole = tmp_path / "whole"
    whole.mkdir()
    os.chdir(whole)
    os.symlink(good, "run")
    assert told(*OUTPUTS[name])[0] == 0
    os.unlink("run")
    made = paths_of(whole)
    drafts = [
        path.with_name(f".{path.name}.new")
        for path in made
        if not path.parent.name and name == "run"
    ]
    kept = [
        path for path in made if (whole / path).is_dir() or len(path.parts) == 1 or "report" in name
    ]
    kept = kept if name != "run" else kept[:1]
    for number, path in enumerate([*drafts, *kept]):
        home = tmp_path / str(number)
        again = "report" in name and path.parts != ("out",)
        shutil.copytree(whole, home) if again else (home / path).parent.mkdir(parents=True)
        if path in drafts:
            (home / "outside").mkdir()
            (home / "outside/precious.txt").write_text("years of work")
            (home / path).symlink_to(home / "outside")
        elif again:
            lead_away(home / path, home / "outside")
        else:
            shutil.copytree(whole / path.parent, home / "outside")
            (home / "outside/precious.txt").write_text("years of work")
            (home / path).symlink_to(
                home / "outside" if (whole / path).is_dir() else home / "outside/precious.txt"
            )
        before = content(home)
        os.chdir(home)
        os.symlink(good, "run")
        code, line = told(*OUTPUTS[name])
        assert code == 2 and path.parts[0] in line, (path, line)
        os.unlink("run")
        assert content(home) == before, path
        os.chdir(tmp_path)
        shutil.rmtree(home)


def test_a_link_that_leads_nowhere_is_no_free_name(good, tmp_path, told):
    for name, command in OUTPUTS.items():
        os.symlink(good, "run")
        Path(
            command[-1] if name not in ("run", "report -o", "partition --to") else "out"
        ).symlink_to(tmp_path / "gone")
        assert told(*command)[0] == 2 and not (tmp_path / "gone").exists(), name
        for link in tmp_path.iterdir():
            link.unlink()


def test_a_draft_with_files_of_somebody_else_is_left_alone(tmp_path, told):
    (tmp_path / ".out.new").mkdir()
    (tmp_path / ".out.new/thesis.tex").write_text("years of work")
    (tmp_path / ".out.new/config.yaml").write_text("what a killed start has left")
    code, line = told(*OUTPUTS["run"])
    assert code == 2 and ".out.new/thesis.tex: is not of a run" in line
    assert len(content(tmp_path)) == 3
    (tmp_path / ".out.new/thesis.tex").unlink()
    assert told(*OUTPUTS["run"])[0] == 0


def test_folders_that_the_user_named_may_be_links(good, tmp_path, told):
    shutil.copytree(good, tmp_path / "far/there")
    (tmp_path / "runs").symlink_to(tmp_path / "far")
    (tmp_path / "mine").symlink_to(tmp_path / "far/there")
    assert told("resume", "runs/there", "rounds=3") == (0, "") and told(
        "resume", "mine", "rounds=4"
    ) == (0, "")
    assert (
        told("run", CONFIG, "output=runs/new") == (0, "")
        and (tmp_path / "far/new/log.h5").is_file()
    )


def test_files_of_the_users_own_in_a_run_folder_stay(good, tmp_path, told):
    """A link among them too; a checkpoint's folder with such a file loses ours only."""
    run = shutil.copytree(good, tmp_path / "run")
    (tmp_path / "notes").write_text("years of work")
    (run / "notes").symlink_to(tmp_path / "notes")
    (run / "checkpoints/000001/notes.txt").write_text("years of work")
    (run / "checkpoints/000000").mkdir()
    (run / "checkpoints/000000/precious.txt").write_text("years of work")
    assert told("resume", "run", "rounds=4", "checkpoint.keep=1") == (0, "")
    assert (
        (run / "notes").read_text()
        == (run / "checkpoints/000000/precious.txt").read_text()
        == "years of work"
    )
    assert [path.name for path in (run / "checkpoints/000001").iterdir()] == ["notes.txt"]
    assert checkpoint.committed_rounds(run) == [4]


def test_a_leftover_with_files_of_the_users_own_is_set_aside(good, tmp_path):
    run = shutil.copytree(good, tmp_path / "run")
    for _ in range(2):
        folder = checkpoint.begin(run, 3)
        (folder / "notes.txt").write_text("years of work")
        (folder / ".server.h5.tmp").write_text("half")
    assert list(checkpoint.begin(run, 3).iterdir()) == []
    asides = sorted(path for path in (run / "checkpoints").iterdir() if "aside" in path.name)
    assert [path.name for path in asides] == ["000003.aside", "000003.aside-2"]
    assert [[file.name for file in path.iterdir()] for path in asides] == [["notes.txt"]] * 2


def test_a_handle_is_never_of_what_a_link_leads_to(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("years of work")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/folder").symlink_to(tmp_path / "out")
    (tmp_path / "in/file").symlink_to(tmp_path / "out/file")
    for make in (False, True):
        with (
            pytest.raises(nolinks.WrongFileType),
            nolinks.open_folder(tmp_path / "in/folder/x", tmp_path / "in", make),
        ):
            pass
    for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_TRUNC):
        with pytest.raises(nolinks.WrongFileType):
            nolinks.open_handle(tmp_path / "in/file", flags)
    with pytest.raises(nolinks.WrongFileType):
        nolinks.remove(tmp_path / "in/file")
    with pytest.raises(StoreError, match="is a link"):
        checkpoint.copy_log(tmp_path / "in/checkpoints/000001", tmp_path / "in/file")
    assert (tmp_path / "out/file").read_text() == "years of work" and len(
        list((tmp_path / "out").iterdir())
    ) == 1
