"""A run folder, data or weights from a stranger: nothing in them is executed, nothing leads out of
a folder.
"""

import ast
import json
import pickle
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from folders import CLIENTS, create_log, flip_bit, save_checkpoint
from runs import TINY

from fedlora_mpi import store
from fedlora_mpi.cli import main
from fedlora_mpi.config import ConfigError, checksummed_yaml, read, read_recorded
from fedlora_mpi.core.disk_errors import WriteError
from fedlora_mpi.models import huggingface
from fedlora_mpi.store import checkpoint, hdf5
from fedlora_mpi.store.files import StoreError, write_atomic
from fedlora_mpi.store.lock import hold_lock
from fedlora_mpi.store.log import Log
from fedlora_mpi.store.manifest import Manifest, Shard
from fedlora_mpi.store.reader import RunFiles

PACKAGE = Path(store.__file__).parents[1]
UNPICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def trusting(tree: ast.AST):
    """What would execute or unpickle what a file holds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
            yield from (name for name in names if name.split(".")[0] in UNPICKLES)
        if not isinstance(node, ast.Call):
            continue
        called, options = (
            ast.unparse(node.func),
            {o.arg: ast.unparse(o.value) for o in node.keywords},
        )
        if called in ("eval", "exec", "pickle.load", "pickle.loads") or called.endswith(
            ("read_pickle", "yaml.load", "yaml.full_load", "unsafe_load")
        ):
            yield called
        if (
            called in ("torch.load", "torch.hub.load_state_dict_from_url")
            and options.get("weights_only") != "True"
        ):
            yield called
        if (
            options.get("allow_pickle", "False") != "False"
            or options.get("trust_remote_code", "False") != "False"
        ):
            yield called


def test_nothing_in_the_package_unpickles_or_executes_a_file():
    files = sorted(PACKAGE.rglob("*.py"))
    found = {str(path): list(trusting(ast.parse(path.read_text()))) for path in files}
    # where the user allows it; its unpickler makes arrays and dicts
    limited = found.pop(str(PACKAGE / "data/pfllib.py"))
    assert (
        limited == ["pickle"]
        and len(files) > 100
        and not {path: calls for path, calls in found.items() if calls}
    )


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import load", "pickle.load(file)", "torch.load(p)", "torch.load(p, weights_only=False)", "eval(text)",
        "np.load(p, allow_pickle=True)", "yaml.load(text)", "AutoConfig.from_pretrained(p, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_a_trusting_call_is_seen(source):
    assert list(trusting(ast.parse(source)))


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """The one line of a command that is refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def line(*arguments) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith("fedlora-mpi: ") and err.count("\n") == 1, err
        return err

    return line


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
def test_a_batch_of_cifar_that_would_execute_something_is_refused(told, tmp_path, name):
    folder, goal = tmp_path / "data/cifar-10-batches-py", tmp_path / "owned"
    folder.mkdir(parents=True)
    batch = {
        "data": np.zeros((3, 3072), np.uint8),
        "labels": [0, 1, 2],
        "label_names": [],
        "x": Bomb(goal),
    }
    for each in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"):
        (folder / each).write_bytes(pickle.dumps(batch if each == name else {}))
    pickle.loads(pickle.dumps(Bomb(tmp_path / "works")))
    assert (tmp_path / "works").exists()
    assert "cifar10 is missing or damaged" in told(
        "run", TINY, "data.dataset=cifar10", "data.root=data"
    )
    assert not goal.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
def test_weights_that_would_execute_something_are_refused(told, tmp_path, suffix):
    (tmp_path / f"net.{suffix}").write_bytes(pickle.dumps({"0.weight": Bomb(tmp_path / "owned")}))
    assert f"net.{suffix}" in told("run", TINY, f"model.weights=net.{suffix}")
    assert not (tmp_path / "owned").exists()


def test_a_picture_that_is_none_is_named(told, tmp_path):
    for name in ("train/a/1.png", "val/a/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    assert "train/a/1.png is no image, or damaged" in told(
        "run", TINY, "data.dataset=folder", f"data.root={tmp_path}"
    )


# --- ways out of a folder


@pytest.fixture
def outside(tmp_path):
    """A file that is nobody's business."""
    path = tmp_path / "outside.h5"
    with h5py.File(path, "w") as file:
        file.attrs["format_version"] = 1
        file["x"] = np.zeros((CLIENTS, 1))
    return path


def lead_out(path: Path, name: str, outside: Path, way: str) -> None:
    """Put something in the place of the data set ``name`` that is in another file."""
    with h5py.File(path, "r+") as file:
        shape, dtype = file[name].shape, file[name].dtype
        del file[name]
        if way == "link":
            file[name] = h5py.ExternalLink(str(outside), "/x")
        elif way == "soft":
            file[name] = h5py.SoftLink("/client_id")
        elif way == "storage":
            file.create_dataset(
                name, shape, dtype, external=[(str(outside), 0, h5py.h5f.UNLIMITED)]
            )
        else:
            layout = h5py.VirtualLayout(shape, dtype)
            layout[...] = h5py.VirtualSource(str(outside), "x", shape, dtype)
            file.create_virtual_dataset(name, layout)


WAYS = ["link", "soft", "storage", "virtual"]


@pytest.mark.parametrize("way", WAYS)
def test_a_shard_that_leads_out_of_its_folder_is_skipped(tmp_path, outside, way):
    run = tmp_path / "run"
    run.mkdir()
    create_log(run).close()
    save_checkpoint(run, 2)
    folder = save_checkpoint(run, 3)
    path, before = folder / "worker-0000.h5", outside.read_bytes()
    lead_out(path, "personal/steps", outside, way)
    manifest = Manifest.read(folder)
    shards = tuple(Shard.from_file(folder / shard.name) for shard in manifest.files)
    Manifest(3, "mine", CLIENTS, shards).write(folder)
    found, skipped = checkpoint.newest_valid(run, run_digest="mine")
    assert found.round == 2 and len(skipped) == 1
    assert str(path) in skipped[0] and "may not point elsewhere" in skipped[0]
    assert outside.read_bytes() == before


@pytest.mark.parametrize("way", WAYS)
def test_a_log_that_leads_out_of_its_folder_is_refused(tmp_path, outside, way):
    create_log(tmp_path).close()
    before = outside.read_bytes()
    lead_out(tmp_path / "log.h5", "partition/train_counts", outside, way)
    with pytest.raises(StoreError, match="log.h5: .* may not point elsewhere"):
        RunFiles(tmp_path)
    with pytest.raises(StoreError, match="log.h5: .* may not point elsewhere"):
        Log.reopen(tmp_path / "log.h5")
    assert outside.read_bytes() == before


def test_a_file_that_holds_itself_or_claims_too_much_is_refused(tmp_path):
    path = tmp_path / "a.h5"
    with hdf5.create_file(path) as file:
        file.create_group("a")["a"] = file["/"]
        file.create_dataset("big", (10**12,), "f4", chunks=(10,), fletcher32=True)
    with pytest.raises(StoreError, match="deeper than any file"):
        hdf5.open_file(path)
    with (
        h5py.File(path) as file,
        pytest.raises(StoreError, match="big claims .*more than the file holds"),
    ):
        hdf5.read(file["big"])


def test_links_in_a_run_folder_are_not_written_through(tmp_path):
    (tmp_path / "mine").write_text("years of work")
    run = tmp_path / "run"
    run.mkdir()
    for name in (".lock", ".a.tmp", "b"):
        (run / name).symlink_to(tmp_path / "mine")
    for name, path in (("a", ".a.tmp"), ("b", "b")):
        with pytest.raises(
            WriteError,
            match=f"run/{path} is a link where a file of ours would be; it is left as it is",
        ):
            write_atomic(run / name, b"new")
    with pytest.raises(WriteError, match="run/.lock is a link"), hold_lock(run):
        pass
    assert (tmp_path / "mine").read_text() == "years of work" and {
        path.is_symlink() for path in run.iterdir()
    } == {True}


def test_a_manifest_that_counts_other_clients_or_leaves_a_file_out_is_skipped(tmp_path):
    create_log(tmp_path).close()
    save_checkpoint(tmp_path, 2)
    folder = save_checkpoint(tmp_path, 3)
    for change, reason in (
        (lambda m: m | {"clients": 6}, "6 clients, its files hold 7"),
        (lambda m: m | {"files": m["files"][:-1]}, "does not list personal.h5"),
    ):
        whole = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(
            json.dumps(change(json.loads(whole)) | {"checksum": None})
        )
        found, (skipped,) = checkpoint.newest_valid(tmp_path)
        assert found.round == 2 and f"{folder}/manifest.json: {reason}" in skipped
        (folder / "manifest.json").write_text(whole)


def test_who_reads_a_run_is_told_of_a_checkpoint_that_is_passed_over(tmp_path):
    create_log(tmp_path).close()
    save_checkpoint(tmp_path, 2)
    flip_bit(save_checkpoint(tmp_path, 3))
    with pytest.warns(UserWarning, match="skipped .*000003/worker-0000.h5: checksum differs"):
        assert RunFiles(tmp_path).checkpoint().round == 2


def test_an_index_of_weights_names_files_of_its_folder_only(tmp_path):
    index = tmp_path / "bert/model.safetensors.index.json"
    index.parent.mkdir()
    for name in ("../secret.safetensors", "/secret.safetensors", "a/b.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match="folder = .*bert: .*names no files of weights"):
            huggingface.required_files(str(index.parent))


def test_a_change_of_the_log_that_hdf5_does_not_see_is_seen(tmp_path):
    """A name, an attribute, a type, a row that another program has rewritten with all its
    checksums.
    """
    log = create_log(tmp_path)
    log.append(1, {"train_loss": 0.5}, {"accuracy": np.ones(CLIENTS)})
    log.close()
    whole = (tmp_path / "log.h5").read_bytes()
    RunFiles(tmp_path).rounds()

    def retype(file):
        value = file["rounds/train_loss"][()]
        del file["rounds/train_loss"]
        file["rounds/train_loss"] = value.view(np.int64)

    changes = {
        "row 0": lambda file: file["rounds/train_loss"].__setitem__(0, 0.75),
        "row 0 ": retype,
        "row 0  ": lambda file: file["rounds"].move("train_loss", "train_lost"),
        "its checksum": lambda file: file.attrs.__setitem__("config_json", "{}"),
        "its checksum ": lambda file: file["partition"].attrs.__setitem__("digest", "beef"),
        "its checksum  ": lambda file: file["partition/train_counts"].__setitem__((0, 0), 7),
    }
    for said, change in changes.items():
        with h5py.File(tmp_path / "log.h5", "r+") as file:
            change(file)
        with pytest.raises(
            StoreError, match=f"log.h5: unreadable .*{said.strip()}.* differs.*resume repairs it"
        ):
            RunFiles(tmp_path).rounds()
        (tmp_path / "log.h5").write_bytes(whole)


def test_a_config_of_a_run_that_was_damaged_or_edited_is_named(tmp_path):
    path, config = tmp_path / "config.yaml", read(TINY)
    text = checksummed_yaml(config)
    path.write_text(text)
    assert read_recorded(path) == config
    for damaged in (
        text.replace("rounds: 4", "rounds: 5"),
        text[:-30],
        text[:100],
        text.replace("0.05", "0.04"),
    ):
        path.write_text(damaged)
        with pytest.raises(
            ConfigError, match="config.yaml: checksum differs, .* remove its first line"
        ):
            read_recorded(path)
    path.write_text(text.replace("rounds: 4", "rounds: 5").partition("\n")[2])
    assert read_recorded(path).rounds == 5


def test_a_text_file_of_a_run_that_has_changed_is_named(tmp_path):
    Log.create(
        tmp_path / "log.h5",
        config_yaml="",
        config_json="{}",
        versions={},
        clients=1,
        partition={},
        file_texts={"vocabulary.json": "{}"},
    ).close()
    (tmp_path / "vocabulary.json").write_text("{}")
    assert RunFiles(tmp_path).read_text("vocabulary.json") == "{}"
    for content in (b"{ }", b"\xff", b""):
        (tmp_path / "vocabulary.json").write_bytes(content)
        with pytest.raises(
            StoreError, match="vocabulary.json: .*damaged.*remove it, a resume writes it anew"
        ):
            RunFiles(tmp_path).read_text("vocabulary.json")
