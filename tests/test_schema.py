"""What a file of a run folder claims is checked before anything of that size is made, and what is
wrong is one line.

The files are those of finished runs; each is changed in every place and in every way, as a hostile
or broken one may be.
"""

import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
from folders import reseal
from runs import TESTS, json_places

from fedlora_mpi.cli import main
from fedlora_mpi.store.manifest import Manifest, Shard
from fedlora_mpi.store.snapshot import checkpoint_folder

CONFIG = str(TESTS / "faulty.yaml")
OURS = ("fedlora-mpi: ", "round ", "hint: ", "resuming ", "skipped ")
DEEP = 100_000
GIGABYTE = 1 << 30


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A finished run with two checkpoints."""
    home = tmp_path_factory.mktemp("good")
    assert main(["run", CONFIG, f"output={home / 'run'}", "checkpoint.keep=2", "rounds=2"]) == 0
    return home / "run"


@pytest.fixture
def use(tmp_path, monkeypatch, capsys):
    """Commands that use ``run``: none hangs, asks for a gigabyte, or ends in anything but code 0 or
    one line.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*os.sys.path])
    monkeypatch.setattr("fedlora_mpi.store.reader.RETRY_DELAYS", (0,))
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTE, before[1]))

    def run(*arguments, about=""):
        capsys.readouterr()
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"{arguments} hangs: {about}"))
        signal.alarm(60)
        try:
            code = main([str(argument) for argument in arguments])
        finally:
            signal.alarm(0)
        lines = [
            line
            for line in capsys.readouterr().err.splitlines()
            if not line.startswith(("  warnings.warn", "    found ="))
        ]
        said = [line for line in lines if line.startswith("fedlora-mpi: ")]
        strange = [
            line
            for line in lines
            if not line.startswith(OURS) and "UserWarning: skipped" not in line
        ]
        assert code in (0, 1, 2) and not strange and len(said) == (code != 0), (
            arguments,
            about,
            code,
            lines,
        )
        return code, "".join(said)

    yield run
    resource.setrlimit(resource.RLIMIT_AS, before)


# --- changes of a JSON

VALUES = [
    None,
    [],
    {},
    True,
    "",
    "text",
    -1,
    0.5,
    float("nan"),
    10**30,
    3 * 10**8,
    2**63,
    ["a"],
    {"a": 1},
    "\x1b]0;x\x07",
]


def changed(tree, at, value):
    """The JSON with another value at a place; ``...``: without it."""
    tree = json.loads(json.dumps(tree))
    if not at:
        return value
    home = tree
    for key in at[:-1]:
        home = home[key]
    if value is ...:
        del home[at[-1]]
    else:
        home[at[-1]] = value
    return tree


def json_changes(tree):
    """(what, text) of a JSON that is not as it was."""
    for at in ((), *json_places(tree)):
        for value in VALUES:
            yield f"{at} = {value!r}", json.dumps(changed(tree, at, value))
        if at:
            yield f"no {at}", json.dumps(changed(tree, at, ...))
    text = json.dumps(tree)
    yield "deep list", "[" * DEEP + "]" * DEEP
    yield "deep block", '{"a":' * DEEP + "1" + "}" * DEEP
    yield "deep inside", text[:-1] + ', "x": ' + "[" * 900 + "]" * 900 + "}"
    yield "twice", text[:-1] + f", {text[1:-1].partition(',')[0]}}}"
    yield "digits", text.replace("2", "2" * 5000, 1)
    yield from ((f"cut at {part}", text[: len(text) * part // 4]) for part in range(4))
    yield "zeros", "\0" * 100
    yield "surrogate", '"\\ud800"'


# --- changes of an HDF5 file


def items_of(file: h5py.File):
    """Names of all groups and data sets."""
    found = []
    file.visit(found.append)
    return found


def replaced(make):
    def change(file, name):
        value = file[name]
        about = value.shape if isinstance(value, h5py.Dataset) else (2,)
        del file[name]
        make(file, name, about)

    return change


def reference(file, name, shape):
    file.create_dataset(name, shape, h5py.ref_dtype)


def vlen(file, name, shape):
    file.create_dataset(name, shape, h5py.vlen_dtype(np.float32))


def enum(file, name, shape):
    file.create_dataset(name, shape, h5py.enum_dtype({"a": 1, "b": 2}, "i4"))


HDF5 = {
    "no": lambda file, name: file.__delitem__(name),
    "vlen": replaced(vlen),
    "reference": replaced(reference),
    "enum": replaced(enum),
    "compound": replaced(lambda f, n, s: f.create_dataset(n, s, [("a", "f4"), ("b", "i4")])),
    "text": replaced(lambda f, n, s: f.create_dataset(n, s, h5py.string_dtype())),
    "bytes": replaced(lambda f, n, s: f.create_dataset(n, s, "S5")),
    "array": replaced(lambda f, n, s: f.create_dataset(n, s, np.dtype(("f4", (3,))))),
    "opaque": replaced(lambda f, n, s: f.create_dataset(n, s, "V7")),
    "complex": replaced(lambda f, n, s: f.create_dataset(n, s, "c16")),
    "big endian": replaced(lambda f, n, s: f.create_dataset(n, s, ">f4")),
    "type": replaced(lambda f, n, s: f.__setitem__(n, np.dtype("f4"))),
    "empty": replaced(lambda f, n, s: f.__setitem__(n, h5py.Empty("f4"))),
    "group": replaced(lambda f, n, s: f.create_group(n)),
    "huge": replaced(
        lambda f, n, s: f.create_dataset(
            n, (10**10, *s[1:]), "f4", chunks=(10, *(max(1, x) for x in s[1:]))
        )
    ),
    "wide": replaced(
        lambda f, n, s: f.create_dataset(n, (*s[:1], 10**10), "f4", chunks=(1, 1000)) if s else None
    ),
    "contiguous": replaced(lambda f, n, s: f.create_dataset(n, (10**10,), "f4")),
    "scalar": replaced(lambda f, n, s: f.create_dataset(n, (), "f4")),
    "axis": replaced(lambda f, n, s: f.create_dataset(n, (*s, 1), "f4", fillvalue=np.nan)),
    "rows": replaced(lambda f, n, s: f.create_dataset(n, (s[0] + 3, *s[1:]) if s else (3,), "i8")),
    "nan": replaced(lambda f, n, s: f.create_dataset(n, s, "f4", fillvalue=np.nan)),
    "negative": replaced(lambda f, n, s: f.create_dataset(n, s, "i8", fillvalue=-7)),
    "large": replaced(lambda f, n, s: f.create_dataset(n, s, "i8", fillvalue=2**62)),
    "link": replaced(lambda f, n, s: f.__setitem__(n, h5py.SoftLink("/"))),
}
ATTRIBUTES = {
    "no": ..., "list": ["a", "b"], "bytes": np.bytes_(b"abc"), "nan": float("nan"), "negative": -5, "large": 2**60,
    "text": "text", "deep": "[" * DEEP, "block": '{"seed": 1}', "array": np.zeros((3, 4)), "empty": h5py.Empty("f4"),
    "compound": np.zeros((), [("a", "f4")]), "number": "7", "no UTF-8": b"\xff\xfe",
    "escape": "\x1b]0;x\x07", "other version": 99, "bool": True,
}  # fmt: skip


def hdf5_changes(path: Path):
    """(what, change of the open file) for every group, data set and attribute."""
    with h5py.File(path) as file:
        names, homes = (
            items_of(file),
            [file, *(file[name] for name in items_of(file) if isinstance(file[name], h5py.Group))],
        )
        given = [(home.name, key) for home in homes for key in home.attrs]
    for name in names:
        for what, change in HDF5.items():
            yield f"{name}: {what}", lambda file, change=change, name=name: change(file, name)
    for home, key in given:
        for what, value in ATTRIBUTES.items():

            def change(file, home=home, key=key, value=value):
                del file[home].attrs[key]
                if isinstance(value, bytes) and not isinstance(value, np.bytes_):
                    file[home].attrs.create(key, value, dtype=h5py.string_dtype())
                elif value is not ...:
                    file[home].attrs[key] = value

            yield f"{home}@{key}: {what}", change


def recorded(folder: Path, **more) -> None:
    """Let the manifest say what the files are now."""
    old = Manifest.read(folder)
    shards = tuple(Shard.from_file(folder / shard.name) for shard in old.files)
    Manifest(
        more.get("round", old.round), old.run_digest, more.get("clients", old.clients), shards
    ).write(folder)


# --- all of them


def cases(run: Path):
    """(where, what, change of the run folder) of every file."""
    newest = checkpoint_folder(Path("run"), 2)
    manifest = json.loads((run / "checkpoints/000002/manifest.json").read_text())
    for what, text in json_changes(manifest):
        yield "manifest.json", what, lambda text=text: (newest / "manifest.json").write_text(text)
    with h5py.File(run / "log.h5") as file:
        config = json.loads(file.attrs["config_json"])

    def with_config(text):
        with h5py.File("run/log.h5", "r+") as file:
            file.attrs["config_json"] = text
        reseal(Path("run/log.h5"))

    for what, text in json_changes(config):
        yield "config_json", what, lambda text=text: with_config(text)
    for name in (
        "log.h5",
        "checkpoints/000002/server.h5",
        "checkpoints/000002/worker-0000.h5",
        "checkpoints/000002/log.h5",
    ):
        for what, change in hdf5_changes(run / name):

            def apply(name=name, change=change):
                with h5py.File(Path("run") / name, "r+") as file:
                    change(file)
                if name.endswith("log.h5"):
                    reseal(Path("run") / name)
                if name.startswith("checkpoints"):
                    recorded(newest)

            yield name, what, apply
    for file in sorted(
        path.relative_to(run) for path in run.rglob("*") if path.is_file() and path.name != ".lock"
    ):
        for part in range(4):

            def cut(file=file, part=part):
                content = (run / file).read_bytes()
                (Path("run") / file).write_bytes(content[: len(content) * part // 4])
                if file.suffix == ".h5" and "checkpoints" in file.parts:
                    recorded(Path("run") / file.parent)

            yield str(file), f"cut at {part}", cut


COMMANDS = {
    "report": ["report", "run"],
    "watch": ["watch", "run", "--once"],
    "digest": ["digest", "run"],
    "export": ["export", "run", "--client", "1", "--to", "out.pt"],
    "export .h5": ["export", "run", "--to", "out.h5"],
    "resume": ["resume", "run", "rounds=3"],
    "run --resume": ["run", "--resume", CONFIG, "output=run", "rounds=3", "checkpoint.keep=2"],
}


def try_out(use, good, chosen, commands):
    """Use a run that was changed in each of these ways; how many commands were refused."""
    refused = 0
    for where, what, change in chosen:
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(good, "run")
        change()
        for name in commands:
            code, line = use(*COMMANDS[name], about=(where, what))
            refused += code != 0
            for made in ("out.pt", "out.h5"):
                Path(made).unlink(missing_ok=True)
            if "resume" in name:
                shutil.rmtree("run")
                shutil.copytree(good, "run")
                change()
    return refused


def some(good, number, seed=1):
    """So many of the cases, of every file as many."""
    by_file = {}
    for case in cases(good):
        by_file.setdefault(case[0], []).append(case)
    dice = random.Random(seed)
    return [
        case for found in by_file.values() for case in dice.sample(found, min(len(found), number))
    ]


@pytest.mark.parametrize(
    "number, least", [(2, 6), pytest.param(16, 50, marks=pytest.mark.thorough)]
)
def test_a_changed_file_is_refused_in_one_line_by_whatever_reads_a_run(use, good, number, least):
    assert try_out(use, good, some(good, number), ["report", "watch", "digest", "export"]) > least


@pytest.mark.parametrize("number, least", [(1, 0), pytest.param(4, 3, marks=pytest.mark.thorough)])
def test_a_changed_file_is_refused_in_one_line_by_a_resume(use, good, number, least):
    assert try_out(use, good, some(good, number, seed=2), ["resume"]) > least


@pytest.mark.slow
def test_no_change_of_any_file_is_more_than_one_line(use, good):
    every = list(cases(good))
    assert (
        len(every) > 2000
        and try_out(use, good, every, [n for n in COMMANDS if "resume" not in n]) > 1000
    )


@pytest.mark.slow
def test_no_change_of_any_file_is_more_than_one_line_to_a_resume(use, good):
    assert try_out(use, good, some(good, 60, seed=3), ["resume", "run --resume"])
