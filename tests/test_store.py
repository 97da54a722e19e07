"""What a run folder promises: exact round trips, and after any crash or damage a state to resume
from.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from folders import (
    CLIENTS,
    ODD_WORKERS,
    ONE_WORKER,
    SHARED,
    all_personal_leaves,
    append_round,
    create_log,
    flip_bit,
    save_checkpoint,
)

from fedlora_mpi.store import checkpoint, files, hdf5, manifest
from fedlora_mpi.store.lock import hold_lock
from fedlora_mpi.store.log import Log
from fedlora_mpi.store.reader import RunFiles

ROOT = Path(files.__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """A run folder with a log of the rounds 1 to 3."""
    log = create_log(tmp_path)
    for round_ in (1, 2, 3):
        append_round(log, round_)
    log.close()
    return tmp_path


def equal(a, b):
    """Whether two trees agree in names, order, dtypes, shapes and numbers."""
    same = [
        x.dtype == y.dtype and np.array_equal(x, y)
        for x, y in zip(a.values(), b.values(), strict=True)
    ]
    return list(a) == list(b) and all(same)


# --- checkpoints: round trips


@pytest.mark.parametrize("workers", [ONE_WORKER, ODD_WORKERS, [[6, 5, 4, 3], [2, 1, 0]]])
def test_clients_come_back_by_id_however_they_were_spread(run, workers):
    save_checkpoint(run, 3, workers)
    found, skipped = checkpoint.newest_valid(run)
    assert (found.round, skipped, found.client_ids()) == (3, [], list(range(CLIENTS)))
    truth = all_personal_leaves(3)
    for ids in ([0, 1, 2, 3, 4, 5, 6], [4], [6, 0, 3, 1], [2, 2], []):
        assert equal(found.personal(ids), {name: leaf[ids] for name, leaf in truth.items()})
    assert equal(found.personal([5], ["steps"]), {"steps": truth["steps"][[5]]})


def test_shared_leaves_and_attributes_come_back_exactly(run):
    save_checkpoint(run, 3)
    found, _ = checkpoint.newest_valid(run)
    assert equal(found.shared(), SHARED) and found.server() == {}
    assert found.attrs() == {"format_version": 1, "round": 3, "note": "x"}


@pytest.mark.parametrize("leaf", ["a/b", "100%", "~1", "~01", "/~2%"])
def test_every_name_of_a_leaf_comes_back(leaf):
    assert hdf5.unescape(found := hdf5.escape(leaf)) == leaf and not set(found) & set("/%")


def test_the_virtual_file_joins_the_shards_from_any_directory(run, monkeypatch, tmp_path_factory):
    moved = tmp_path_factory.mktemp("elsewhere") / "000003"
    shutil.move(save_checkpoint(run, 3), moved)
    monkeypatch.chdir("/")
    with h5py.File(moved / "personal.h5") as file:
        joined = {hdf5.unescape(name): dataset[()] for name, dataset in file["personal"].items()}
        assert file["personal/steps"].dims[0].label == "client"
    assert equal(joined, all_personal_leaves(3))


def datasets_in(path):
    """The data sets of an HDF5 file of ours, by name, with whether they are checksummed and hold
    anything.
    """
    found = {}
    with h5py.File(path) as file:
        assert file.attrs["format_version"] == 1
        file.visititems(
            lambda name, item: (
                found.update({name: item}) if isinstance(item, h5py.Dataset) else None
            )
        )
        return {name: item.fletcher32 for name, item in found.items() if item.shape and item.size}


def test_every_stored_number_is_checksummed_and_every_file_versioned(run):
    folder = save_checkpoint(run, 3)
    assert datasets_in(folder / "worker-0001.h5") == {}, "a worker without clients"
    for path in (folder / "worker-0000.h5", folder / "server.h5", run / "log.h5"):
        found = datasets_in(path)
        assert found and all(found.values()), found


def test_kinds_are_joined_in_the_order_of_their_first_clients_whichever_worker_has_them(run):
    def leaf(ids, width):
        return {"w": np.outer(ids, np.ones(width, np.float32))}

    owned = [(2, 0, [0, 4], 3), (0, 1, [1, 3], 5), (1, 0, [2, 6], 3), (1, 1, [5], 5)]
    folder = checkpoint.begin(run, 3)
    shards = [
        checkpoint.write_clients(folder, worker, ids, leaf(ids, n), kind)
        for worker, kind, ids, n in owned
    ]
    checkpoint.commit(
        folder, sorted(shards, key=lambda s: s.name), run_digest="mine", clients=CLIENTS
    )
    with h5py.File(folder / "personal.h5") as file:
        assert [file[f"kind-{n}/client_id"][()].tolist() for n in (0, 1)] == [
            [0, 2, 4, 6],
            [1, 3, 5],
        ]
        assert file["kind-0/personal/w"][()].tolist() == [[c] * 3 for c in (0, 2, 4, 6)]
        assert file["kind-1/personal/w"][()].tolist() == [[c] * 5 for c in (1, 3, 5)]


def test_without_personal_or_shared_leaves_there_is_still_a_checkpoint(run):
    save_checkpoint(run, 3, personal={}, shared={})
    found, _ = checkpoint.newest_valid(run)
    assert found.leaf_names() == [] and found.personal([3, 1]) == {} and found.shared() == {}
    assert set(found.digest()) == {"shared", "personal"}


def test_rows_longer_than_a_block_and_chunks_of_many_rows_come_back(run, monkeypatch):
    monkeypatch.setattr(hdf5, "BLOCK_BYTES", 256)
    monkeypatch.setattr(hdf5, "CHUNK_BYTES", 100)
    big = {
        "a": np.random.default_rng(0).standard_normal((CLIENTS, 300)),
        "b": np.arange(3 * CLIENTS).reshape(-1, 3),
    }
    save_checkpoint(run, 3, ODD_WORKERS, big)
    assert equal(
        checkpoint.newest_valid(run)[0].personal([3, 4, 5, 0, 1]),
        {n: v[[3, 4, 5, 0, 1]] for n, v in big.items()},
    )


def test_a_foreign_client_is_refused(run):
    save_checkpoint(run, 3)
    with pytest.raises(ValueError, match="holds no client or leaf 7"):
        checkpoint.newest_valid(run)[0].personal([7])


def test_a_commit_without_some_client_is_a_mistake_of_ours(run):
    with pytest.raises(AssertionError, match="not each of 7 clients once"):
        save_checkpoint(run, 3, [[0, 1], [2, 3]])


def test_a_shard_record_survives_a_buffer(run):
    shard = manifest.Shard.from_file(run / "log.h5")
    assert manifest.Shard.from_numbers(
        "log.h5", shard.to_numbers()
    ) == shard and shard.to_numbers().shape == (3,)


# --- checkpoints: damage


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    fields = json.loads(path.read_text()) | {"checksum": None}  # as in earlier versions
    path.write_text(json.dumps(fields | changes))


def replace_text(path, old, new):
    path.write_text(path.read_text().replace(old, new))


DAMAGE = {
    "size differs": lambda folder: os.truncate(folder / "worker-0000.h5", 1000),
    "checksum differs": flip_bit,
    "missing file": lambda folder: (folder / "worker-0003.h5").unlink(),
    "of another config": lambda folder: edit_manifest(folder, run_digest="theirs"),
    "format 2": lambda folder: edit_manifest(folder, format_version=2),
    "may not point outside": lambda folder: edit_manifest(
        folder, files=[{"name": "../x", "size": 1, "digest": ""}]
    ),
    "missing or damaged": lambda folder: os.truncate(folder / "manifest.json", 30),
    "manifest.json: checksum differs": lambda folder: replace_text(
        folder / "manifest.json", "mine", "mime"
    ),
    "folder of another": lambda folder: edit_manifest(folder, round=5),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_checkpoint_that_cannot_be_used_is_skipped_and_named(run, reason):
    save_checkpoint(run, 2)
    damaged = save_checkpoint(run, 3)
    DAMAGE[reason](damaged)
    found, skipped = checkpoint.newest_valid(run, run_digest="mine")
    assert found.round == 2
    assert (
        len(skipped) == 1
        and reason in skipped[0]
        and str(damaged) in skipped[0]
        and "\n" not in skipped[0]
    )


def test_with_no_valid_checkpoint_there_is_one_line_with_every_reason(run):
    with pytest.raises(ValueError, match="none was committed"):
        checkpoint.newest_valid(run)
    save_checkpoint(run, 2, run_digest="theirs")
    flip_bit(save_checkpoint(run, 3))
    with pytest.raises(
        ValueError, match="checksum differs.*of another config.*start anew"
    ) as caught:
        checkpoint.newest_valid(run, run_digest="mine")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/passwd", "a/b", "../a", "a\\b", "C:x"])
def test_only_plain_names_are_files_of_a_checkpoint(name):
    with pytest.raises(ValueError, match="plain file name"):
        files.check_plain_name(name)


# --- checkpoints: begin, prune, crashes


def test_uncommitted_folders_are_invisible_and_begun_again_empty(run):
    save_checkpoint(run, 2)
    folder = checkpoint.begin(run, 3)
    (folder / "half").write_text("x")
    assert checkpoint.committed_rounds(run) == [2] and checkpoint.newest_valid(run)[0].round == 2
    assert list(checkpoint.begin(run, 3).iterdir()) == []


def test_a_committed_round_is_not_begun_again_unless_damaged(run):
    folder = save_checkpoint(run, 3)
    with pytest.raises(ValueError, match="committed already"):
        checkpoint.begin(run, 3)
    flip_bit(folder)
    save_checkpoint(run, 3)
    assert checkpoint.newest_valid(run)[1] == []


def test_after_a_resume_pruning_does_not_keep_the_damaged_one(run):
    save_checkpoint(run, 2)
    flip_bit(save_checkpoint(run, 9))
    save_checkpoint(run, 3)
    checkpoint.prune(run, 1)
    assert checkpoint.committed_rounds(run) == [3] and checkpoint.newest_valid(run)[0].round == 3
    assert (run / "checkpoints" / "000009.aside").is_dir()


def test_pruning_keeps_the_newest_and_removes_older_leftovers(run):
    for round_ in (2, 4, 6):
        save_checkpoint(run, round_)
    for leftover in (1, 5, 7):
        shutil.copytree(run / "checkpoints/000002", run / f"checkpoints/{leftover:06d}")
        (run / f"checkpoints/{leftover:06d}/manifest.json").unlink()
    checkpoint.prune(run, 2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "000004",
        "000006",
        "000007",
    ]


def in_child(action):
    """Run ``action`` in a forked process; its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dying_at(step, action):
    """``action``, in a process that dies without goodbye before or after its n-th fsync, rename or
    unlink.
    """
    left = [step]

    def fragile(call):
        def wrapper(*args, **kwargs):
            for part in (lambda: None, lambda: call(*args, **kwargs)):
                part()
                left[0] -= 1
                if left[0] < 0:
                    os._exit(17)

        return wrapper

    for name in ("fsync", "replace", "rename", "unlink"):
        setattr(os, name, fragile(getattr(os, name)))
    action()


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_crash_at_any_moment_leaves_a_valid_checkpoint(run, stride):
    save_checkpoint(run, 2)
    before = {path.name: path.read_bytes() for path in (run / "checkpoints/000002").iterdir()}

    def write_next():
        save_checkpoint(run, 3)
        checkpoint.prune(run, 1)

    rounds, step = [], 0
    while in_child(lambda: dying_at(step, write_next)) == 17:  # noqa: B023
        found, skipped = checkpoint.newest_valid(run, run_digest="mine")
        rounds.append(found.round)
        assert skipped == [] and equal(
            found.personal(range(CLIENTS)), all_personal_leaves(found.round)
        )
        assert all(RunFiles(run).checkpoint(round_) for round_ in checkpoint.committed_rounds(run))
        shutil.rmtree(run / "checkpoints")
        (run / "checkpoints/000002").mkdir(parents=True)
        for name, content in before.items():
            (run / "checkpoints/000002" / name).write_bytes(content)
        step += stride
    assert rounds == sorted(rounds) and set(rounds) == {2, 3} and step > 40
    assert checkpoint.committed_rounds(run) == [3]


def test_a_file_is_on_disk_before_its_name_and_the_name_before_anything_else(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os,
            name,
            lambda *args, name=name, real=real, **at: (calls.append(name), real(*args, **at)),
        )
    files.write_atomic(tmp_path / "x", b"new")
    assert calls == ["fsync", "replace", "fsync"] and (tmp_path / "x").read_bytes() == b"new"


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(KeyError), files.replace_file(tmp_path / "x") as temporary:
        temporary.write(b"ne")
        raise KeyError
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"old")]


def python(code, *args, **options):
    """A Python process that runs ``code`` with the package at hand."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


WRITE_BIG = """
import resource, sys
from pathlib import Path
import numpy as np
from fedlora_mpi.store import checkpoint
leaf = np.ones((40, 5, 250_000), np.float32).transpose(0, 2, 1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
checkpoint.write_clients(Path(sys.argv[1]), 0, range(39, -1, -1), {"strided": leaf})
print(peak() - before)
"""


def test_writing_200_mb_of_strided_rows_takes_little_memory(tmp_path):
    assert float(python(WRITE_BIG, tmp_path).communicate()[0]) < 0.3 * 200  # MiB


# --- digests


def test_the_digest_does_not_see_the_shards_and_sees_every_float(run, tmp_path_factory):
    def digest_of(workers, personal):
        other = tmp_path_factory.mktemp("run")
        shutil.copy(run / "log.h5", other)
        save_checkpoint(other, 3, workers, personal)
        return RunFiles(other).digest()

    truth = digest_of(ONE_WORKER, all_personal_leaves())
    assert truth == digest_of(ODD_WORKERS, all_personal_leaves())
    assert truth == digest_of(ODD_WORKERS, dict(reversed(all_personal_leaves().items())))
    changed = all_personal_leaves()
    changed["layer2.0.conv1.weight.A"][4, 2, 1] = np.nextafter(
        changed["layer2.0.conv1.weight.A"][4, 2, 1], np.inf
    )
    other = digest_of(ODD_WORKERS, changed)
    assert other["shared"] == truth["shared"] and other["personal"] != truth["personal"]


# --- the log


def test_the_log_gives_back_config_partition_and_rows(run):
    files_ = RunFiles(run)
    assert files_.config == {"seed": 1} and files_.config_yaml == "seed: 1\n"
    assert files_.versions == {"numpy": np.__version__}
    rounds, clients, partition = files_.rounds(), files_.clients(), files_.partition()
    assert list(rounds) == ["round", "train_loss", "seconds_train", "bytes_up", "accuracy"]
    assert rounds["round"].tolist() == [1, 2, 3] and rounds["train_loss"].tolist() == [
        1 / 2,
        1 / 3,
        1 / 4,
    ]
    assert rounds["bytes_up"].dtype == np.int64
    assert clients["accuracy"].shape == (3, CLIENTS) and clients["accuracy"].dtype == np.float32
    assert np.isnan(clients["loss"]).all()
    assert [ids.tolist() for ids in partition["train"][:4]] == [[], [1], [2, 3], [3, 4, 5]]
    assert partition["digest"] == "cafe" and partition["train_counts"].shape == (CLIENTS, 3)
    with h5py.File(run / "log.h5") as file:
        units = {name: column.attrs["unit"] for name, column in file["rounds"].items()}
        assert [dimension.label for dimension in file["clients/accuracy"].dims] == [
            "round",
            "client",
        ]
    assert (
        units["seconds_train"] == "seconds"
        and units["bytes_up"] == "bytes"
        and units["accuracy"] == "fraction"
    )


def test_a_resume_puts_the_log_back_and_goes_on(run):
    save_checkpoint(run, 3)
    log = Log.reopen(run / "log.h5")
    append_round(log, 4)
    log.close()
    checkpoint.newest_valid(run)[0].restore_log(run / "log.h5")
    log = Log.reopen(run / "log.h5")
    with pytest.raises(AssertionError, match="round 3 after round 3"):
        append_round(log, 3)
    append_round(log, 4)
    log.close()
    assert RunFiles(run).rounds()["round"].tolist() == [1, 2, 3, 4]


def test_a_row_with_other_columns_or_kinds_is_a_mistake_of_ours(run):
    log = Log.reopen(run / "log.h5")
    row = {"train_loss": 1.0, "seconds_train": 1.0, "bytes_up": 1, "accuracy": 1.0}
    clients = {"accuracy": np.nan, "loss": np.nan}
    with pytest.raises(AssertionError, match="not in every row: .*train_loss"):
        log.append(4, {"bytes_up": 1}, clients)
    with pytest.raises(AssertionError, match="bytes_up: float64 into int64"):
        log.append(4, row | {"bytes_up": 0.5}, clients)
    log.append(4, row | {"train_loss": 1}, clients | {"loss": 1e200})  # float32 holds it as inf
    log.close()
    assert RunFiles(run).rounds()["round"].tolist() == [1, 2, 3, 4]


def test_a_second_log_in_a_folder_is_refused(run):
    with pytest.raises(ValueError, match="resume its run, or choose another output"):
        create_log(run)


def test_columns_that_a_kill_left_ragged_are_cut_to_whole_rows(run):
    with h5py.File(run / "log.h5", "r+") as file:
        file["rounds/train_loss"].resize(4, axis=0)
    assert {len(column) for column in RunFiles(run).rounds().values()} == {3}
    log = Log.reopen(run / "log.h5")
    append_round(log, 4)
    log.close()
    assert RunFiles(run).rounds()["train_loss"].tolist() == [1 / 2, 1 / 3, 1 / 4, 1 / 5]


APPEND_FOR_EVER = """
import itertools, sys, time
import numpy as np
from fedlora_mpi.store.log import Log
log = Log.reopen(sys.argv[1])
for round_ in itertools.count(4):
    log.append(
        round_,
        {"train_loss": 0.5, "seconds_train": 2.0, "bytes_up": 12, "accuracy": 0.5},
        {"accuracy": np.full(7, round_, np.float32), "loss": np.nan},
    )
    print(round_, flush=True)
    if round_ == int(sys.argv[2]):
        time.sleep(60)
"""


def test_a_kill_leaves_every_row_that_was_appended(run):
    writer = python(APPEND_FOR_EVER, run / "log.h5", 40)
    while int(writer.stdout.readline()) < 40:
        pass
    assert RunFiles(run).rounds()["round"].tolist() == list(range(1, 41)), (
        "while the writer has it open"
    )
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    assert RunFiles(run).clients()["accuracy"][:, 6].tolist() == list(range(1, 41))
    log = Log.reopen(run / "log.h5")
    append_round(log, 41)
    log.close()
    assert RunFiles(run).rounds()["round"].tolist() == list(range(1, 42))


def test_a_reader_sees_only_whole_rows_while_the_run_writes(run):
    writer = python(APPEND_FOR_EVER, run / "log.h5", 200)
    try:
        while (rounds := RunFiles(run).rounds()["round"])[-1] < 200:
            assert rounds.tolist() == list(range(1, rounds[-1] + 1))
    finally:
        writer.kill()
        writer.wait()


# --- the run folder


def test_a_folder_without_a_log_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="not a run folder"):
        RunFiles(tmp_path)


def test_a_run_without_rows_or_checkpoints_can_be_read(tmp_path):
    create_log(tmp_path).close()
    files_ = RunFiles(tmp_path)
    assert (
        files_.rounds()["round"].tolist() == []
        and files_.clients() == {}
        and files_.checkpoints() == []
    )


def test_a_reader_finds_a_checkpoint_by_round_or_says_which_there_are(run):
    save_checkpoint(run, 2)
    save_checkpoint(run, 3)
    assert RunFiles(run).checkpoints() == [2, 3]
    assert RunFiles(run).checkpoint().round == 3 and RunFiles(run).checkpoint(2).round == 2
    with pytest.raises(ValueError, match=r"no checkpoint of round 5; there are \[2, 3\]"):
        RunFiles(run).checkpoint(5)


def test_a_newer_log_is_refused_at_once(run):
    with h5py.File(run / "log.h5", "r+") as file:
        file.attrs["format_version"] = 2
    with pytest.raises(ValueError, match="format 2, this fedlora_mpi reads 1"):
        RunFiles(run)


def test_a_second_run_in_a_folder_is_refused_by_host_and_pid(tmp_path):
    refusal = pytest.raises(ValueError, match=f"in use by host .*, pid {os.getpid()}")
    with hold_lock(tmp_path), refusal, hold_lock(tmp_path):
        pass
    with hold_lock(tmp_path):
        pass


def test_a_killed_run_leaves_no_lock(tmp_path):
    holder = python(
        "import sys, time; from fedlora_mpi.store.lock import hold_lock\n"
        "with hold_lock(sys.argv[1]): print('held', flush=True); time.sleep(60)",
        tmp_path,
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"pid {holder.pid}"), hold_lock(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with hold_lock(tmp_path):
        pass


def test_the_store_needs_neither_torch_nor_mpi():
    code = (
        "import sys, fedlora_mpi.store.reader; print({'torch', 'mpi4py', 'yaml'} & "
        "set(sys.modules))"
    )
    assert python(code).communicate()[0] == "set()\n"
