"""``run --overwrite`` replaces a run folder, and nothing else."""

import os
import shutil

import pytest
from runs import TINY, assert_same_run

from fedlora_mpi.store import replacing
from fedlora_mpi.store.files import StoreError
from fedlora_mpi.store.lock import hold_lock
from fedlora_mpi.store.reader import RunFiles


def listing(folder):
    """Every path in a folder with its time and size, but the lock, which each run writes to."""
    return {
        path: (path.lstat().st_mtime_ns, path.lstat().st_size)
        for path in folder.rglob("*")
        if path.name != ".lock" and not path.is_dir()
    }


def refused(result, *parts):
    code, out, err = result
    assert (code, out) == (2, "") and err.count("\n") == 1, err
    for part in parts:
        assert part in err


def test_a_run_is_replaced_and_nothing_of_it_is_left(call, copied, trained, tmp_path):
    pytest.importorskip("tensorboardX")
    sides = ("log.csv=true", "log.tensorboard=true", "checkpoint.keep=3", "rounds=6")
    run = copied(*sides, to="run")
    shutil.copytree(run / "checkpoints/000006", run / "checkpoints/000006.aside")
    assert call("run", TINY, "--overwrite")[0] == 0
    assert_same_run(trained(), run)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["run"]
    assert {f.name for f in run.iterdir()} == {".lock", "checkpoints", "config.yaml", "log.h5"}
    assert call("run", TINY, "--overwrite", "rounds=1", "output=new")[0] == 0


def test_only_a_run_folder_without_other_files_is_replaced(call, copied, tmp_path):
    run = copied(to="run")
    (run / "checkpoints/000004/mine").touch()
    before = listing(tmp_path)
    refused(call("run", TINY, "--overwrite"), "checkpoints/000004/mine is not of a run")
    assert listing(tmp_path) == before
    (run / "checkpoints/000004/mine").unlink()
    (run / "figures").mkdir()
    refused(call("run", TINY, "--overwrite"), "run: figures is not of a run")
    (run / "figures").rmdir()
    (run / "log.h5").write_text("mine")
    refused(call("run", TINY, "--overwrite"), "log.h5")
    (run / "log.h5").unlink()
    refused(call("run", TINY, "--overwrite"), "run: not a run folder, it has no log.h5")
    assert (run / "config.yaml").is_file()


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/000004", "log.h5"])
def test_a_link_is_never_followed(place, call, copied, tmp_path):
    run = copied(to="run")
    target = tmp_path / "elsewhere"
    (run / place).rename(target)
    os.symlink(target, run / place)
    before = listing(target) if target.is_dir() else target.read_bytes()
    refused(call("run", TINY, "--overwrite"), "link")
    assert (listing(target) if target.is_dir() else target.read_bytes()) == before
    assert (run / place).is_symlink()


def test_a_run_in_use_stays(call, copied):
    run = copied(to="run")
    before = listing(run)
    with hold_lock(run):
        refused(call("run", TINY, "--overwrite"), ".lock: in use by host ")
    assert listing(run) == before


def test_a_start_that_fails_leaves_the_old_run_in_its_place(call, copied, tmp_path):
    run = copied(to="run")
    before = listing(tmp_path)
    for mistake in ("train.lr=-1", "data.partition.minimum=100"):
        refused(call("run", TINY, "--overwrite", mistake), mistake.split("=")[0][:5])
    with pytest.raises(KeyError), replacing.set_aside(run):
        assert not run.exists()
        raise KeyError
    assert listing(tmp_path) == before


def test_what_a_killed_start_has_set_aside_is_removed_by_the_next(call, copied, tmp_path):
    old = copied(to=".run.old")
    (old / "log.h5").unlink()  # half removed
    run = copied(to="run")
    with replacing.set_aside(run):
        run.mkdir()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["run"]
    copied(to=".run.old").joinpath("mine").touch()
    shutil.rmtree(run)
    with pytest.raises(StoreError, match="move it away"), replacing.set_aside(copied(to="run")):
        pass
    assert (tmp_path / ".run.old/mine").exists() and (tmp_path / "run/log.h5").exists()


def test_a_run_that_finished_no_round_is_not_in_the_way_of_the_next(call, tmp_path):
    code, _, err = call("run", TINY, "train.lr=1e30")
    assert (
        code == 1 and "not finite" in err and len(RunFiles(tmp_path / "run").rounds()["round"]) == 0
    )
    code, out, err = call("run", TINY, "rounds=1")
    assert (code, out) == (0, "run: done\n") and "run: replaces a run that has finished no" in err
    refused(call("run", TINY, "rounds=1"), "the folder exists", "--overwrite")
