"""What other programs wrote is read as it is or refused, and what is written for them they can
read.
"""

import json

import h5py
import numpy as np
import pytest
import torch
from runs import TINY, assert_same_run, create_run

from fedlora_mpi import config as configs
from fedlora_mpi import open_run
from fedlora_mpi.cli import main
from fedlora_mpi.experiment.parts import load_data, split_data

CLIENTS = 3


def theirs(folder, clients=CLIENTS, pixels=None, **about):
    """A folder as PFLlib writes it: gray images under Normalize(0.5, 0.5). The bytes of each side
    and client.
    """
    rng = np.random.default_rng(5)
    made = {}
    for side, more in (("train", 6), ("test", 3)):
        (folder / side).mkdir(parents=True)
        for client in range(clients):
            images = rng.integers(0, 256, (more + client, 1, 5, 7), dtype=np.uint8)
            x = (
                ((images / 255 - 0.5) / 0.5).astype(np.float32)
                if pixels is None
                else pixels(images)
            )
            y = np.arange(len(x)) % 4
            with open(folder / side / f"{client}.npz", "wb") as file:
                np.savez_compressed(file, data={"x": x, "y": y})
            made[side, client] = images, y
    (folder / "config.json").write_text(
        json.dumps({"num_clients": clients, "num_classes": 4} | about)
    )
    return made


def settings(folder, *overrides, allow=True):
    """The config of tiny.yaml on such a folder."""
    data = (
        "data.dataset=pfllib",
        f"data.root={folder}",
        "data.partition.kind=given",
        f"data.partition.clients={CLIENTS}",
    )
    return configs.read(TINY, [*data, *(["data.allow_pickle=true"] if allow else []), *overrides])


def held(config):
    """(data, split) of a config."""
    data = load_data(config, "x")
    return data, split_data(config, "x", data)


# --- from PFLlib


def test_clients_hold_what_their_files_hold(tmp_path):
    made = theirs(tmp_path / "theirs")
    data, split = held(settings(tmp_path / "theirs"))
    assert (data.classes, data.shape, data.mean, data.std) == (4, (1, 5, 7), (0.5,), (0.5,))
    for side, samples, rows in (
        ("train", data.train, split.train),
        ("test", data.test, split.test),
    ):
        for client in range(CLIENTS):
            images, y = made[side, client]
            assert np.array_equal(samples.x[rows[client]].numpy(), images)
            assert np.array_equal(samples.y[rows[client]].numpy(), y)
    _, fewer = held(settings(tmp_path / "theirs", "data.partition.train=2"))
    assert [rows.tolist() for rows in fewer.train] == [rows[:2].tolist() for rows in split.train]
    anew = ["data.dataset=pfllib", f"data.root={tmp_path / 'theirs'}", "data.allow_pickle=true"]
    _, drawn = held(
        configs.read(TINY, [*anew, "data.partition={kind: iid, clients: 5, train: 3, test: 1}"])
    )
    assert [len(rows) for rows in drawn.train] == [3] * 5, "all samples may be dealt anew"


def test_a_run_trains_on_it(tmp_path):
    theirs(tmp_path / "theirs")
    config = tmp_path / "a.yaml"
    config.write_text(
        configs.resolved_yaml(
            settings(tmp_path / "theirs", "rounds=2", f"output={tmp_path / 'run'}")
        )
    )
    assert main(["run", str(config)]) == 0
    assert open_run(tmp_path / "run").array("clients/accuracy").shape == (2, CLIENTS)


def test_a_pickle_is_not_opened_unless_it_is_allowed(tmp_path):
    theirs(tmp_path / "theirs")
    with pytest.raises(
        ValueError,
        match=r"x: data.allow_pickle = false: .*0.npz is a pickle, .*; set allow_pickle to true",
    ):
        load_data(settings(tmp_path / "theirs", allow=False), "x")
    with pytest.raises(ValueError, match="only the files of dataset = pfllib are pickles"):
        configs.read(TINY, ["data.allow_pickle=true"])
    assert (
        "allow_pickle"
        not in configs.resolved_dict(settings(tmp_path / "theirs", allow=False))["data"]
    )


class Evil:
    """Runs a command where a pickle is trusted."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("where", ["instead", "inside"])
def test_an_evil_pickle_is_refused_even_where_pickles_are_allowed(tmp_path, where):
    theirs(tmp_path / "theirs")
    mark = tmp_path / "mark"
    evil = (
        Evil(mark)
        if where == "instead"
        else {"x": np.zeros((1, 1, 5, 7)), "y": np.array([0]), "more": [Evil(mark)]}
    )
    array = np.empty((), object)
    array[()] = evil
    np.savez(tmp_path / "theirs" / "train" / "1.npz", data=array)
    with pytest.raises(
        ValueError,
        match=r"1.npz holds no x and y .*it names .*io.open; only numpy arrays and dicts",
    ):
        load_data(settings(tmp_path / "theirs"), "x")
    assert not mark.exists()
    np.load(tmp_path / "theirs" / "train" / "1.npz", allow_pickle=True)["data"]
    assert mark.exists(), "the file is evil"


def test_plain_arrays_need_no_pickle(tmp_path):
    made = theirs(tmp_path / "theirs")
    for (side, client), (images, y) in made.items():
        np.savez(tmp_path / "theirs" / side / f"{client}.npz", x=images, y=y.astype(np.int32))
    data, split = held(settings(tmp_path / "theirs", allow=False))
    assert np.array_equal(data.train.x[split.train[2]].numpy(), made["train", 2][0])


def truncated(folder):
    file = folder / "test" / "2.npz"
    file.write_bytes(file.read_bytes()[:200])


def other(folder, **arrays):
    np.savez(folder / "train" / "1.npz", **arrays)


X = np.ones((2, 1, 5, 7))  # white
BROKEN = [
    (
        lambda f: (f / "test" / "1.npz").unlink(),
        "there is no .*test/1.npz; give a folder dataset/NAME of PFLlib",
    ),
    (truncated, "2.npz holds no x and y that can be read"),
    (lambda f: other(f, z=X), "1.npz holds no x and y .*it has z.npy, not data.npy"),
    (lambda f: other(f, data={"x": X}), "1.npz holds no x and y .*'y'"),
    (
        lambda f: other(f, x=X, y=np.zeros(3, int)),
        r"1.npz has x \[2, 1, 5, 7\] of float64, y \[3\] of int64; only images",
    ),
    (
        lambda f: other(f, x=X[:, :, :4], y=np.zeros(2, int)),
        r"images of \(1, 4, 7\) and \(1, 5, 7\); they must be alike",
    ),
    (lambda f: other(f, x=X, y=np.array([-1, 0])), "a class is -1"),
    (
        lambda f: other(f, x=X + 0.001, y=np.zeros(2, int)),
        "1.npz are no bytes normalised with mean 0.5 and standard deviation 0.5",
    ),
    (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
]


@pytest.mark.parametrize("spoil, why", BROKEN)
def test_a_folder_that_is_not_as_pfllib_writes_it_is_refused_in_one_line(tmp_path, spoil, why):
    theirs(tmp_path / "theirs")
    spoil(tmp_path / "theirs")
    with pytest.raises(ValueError, match=f"x: data.root = .*{why}") as refused:
        load_data(settings(tmp_path / "theirs"), "x")
    assert "\n" not in str(refused.value)


def test_a_given_split_must_be_there_and_of_so_many_clients(tmp_path):
    theirs(tmp_path / "theirs")
    with pytest.raises(
        ValueError, match="data.partition.clients = 4: the given split has 3 clients; say so"
    ):
        held(settings(tmp_path / "theirs", "data.partition.clients=4"))
    with pytest.raises(ValueError, match="data.partition.kind = given: this data set has no split"):
        held(configs.read(TINY, ["data.partition={kind: given, clients: 7}"]))
    with pytest.raises(ValueError, match="overlap = true: a given split is taken as it is"):
        settings(tmp_path / "theirs", "data.partition.overlap=true")


# --- to PFLlib


def pfllib_reads(folder, side, client):
    """(x, y) as PFLlib's own reader gets them."""
    with open(folder / side / f"{client}.npz", "rb") as file:
        found = np.load(file, allow_pickle=True)["data"].tolist()
    return torch.Tensor(found["x"]).type(torch.float32), torch.Tensor(found["y"]).type(torch.int64)


def test_a_split_comes_back_from_pfllibs_folder(tmp_path, capsys):
    out = tmp_path / "ours"
    assert main(["partition", str(TINY), "--to", "pfllib", str(out)]) == 0
    assert "7 clients for PFLlib" in capsys.readouterr().out
    data, split = held(configs.read(TINY, []))
    x, y = pfllib_reads(out, "train", 4)
    seen = (data.train.x[split.train[4]] / 255 - data.mean[0]) / data.std[0]
    torch.testing.assert_close(x, seen.float(), rtol=0, atol=1e-6)
    assert torch.equal(y, data.train.y[split.train[4]])
    about = json.loads((out / "config.json").read_text())
    counted = [
        sum(n for _, n in client) for client in about["Size of samples for labels in clients"]
    ]
    assert (about["num_clients"], about["num_classes"]) == (7, 4)
    assert counted == (split.train_counts + split.test_counts).sum(axis=1).tolist()

    again, same = held(settings(out, "data.partition.clients=7"))
    assert (again.mean, again.std, again.classes) == (data.mean, data.std, data.classes)
    for samples, rows, before, held_before in (
        (again.train, same.train, data.train, split.train), (again.test, same.test, data.test, split.test),
    ):  # fmt: skip
        for mine, theirs_ in zip(rows, held_before, strict=True):
            assert torch.equal(samples.x[mine], before.x[theirs_]) and torch.equal(
                samples.y[mine], before.y[theirs_]
            )
    file = tmp_path / "back.yaml"
    file.write_text(configs.resolved_yaml(settings(out, "data.partition.clients=7")))
    assert main(["partition", str(file), "--to", "pfllib", str(tmp_path / "twice")]) == 0
    _, twice = held(settings(tmp_path / "twice", "data.partition.clients=7"))
    assert twice.digest() == same.digest()


def test_a_run_on_the_folder_is_the_run_on_the_data_set_it_was_made_of(tmp_path):
    out, plain = tmp_path / "ours", ["rounds=2", "data.partition.minimum=5"]
    assert main(["partition", str(TINY), "--to", "pfllib", str(out)]) == 0
    assert main(["run", str(TINY), *plain, f"output={tmp_path / 'a'}"]) == 0
    file = tmp_path / "back.yaml"
    file.write_text(
        configs.resolved_yaml(
            settings(out, "data.partition.clients=7", "rounds=2", f"output={tmp_path / 'b'}")
        )
    )
    assert main(["run", str(file)]) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("shift", ["rotate", "labels"])
def test_a_shift_between_clients_is_written(tmp_path, shift):
    out, plain = tmp_path / "ours", tmp_path / "plain"
    assert main(["partition", str(TINY), "--to", "pfllib", str(plain)]) == 0
    assert main(["partition", str(TINY), f"data.shift={shift}", "--to", "pfllib", str(out)]) == 0
    counts = [
        dict(client)
        for client in json.loads((out / "config.json").read_text())[
            "Size of samples for labels in clients"
        ]
    ]
    for client in range(7):
        for side in ("train", "test"):
            x, y = pfllib_reads(plain, side, client)
            if shift == "rotate":
                x = x.rot90(client % 4, (2, 3))
            else:
                y = (y + client % 4) % 4
            found = pfllib_reads(out, side, client)
            torch.testing.assert_close(found[0], x, rtol=0, atol=1e-5)
            assert torch.equal(found[1], y)
        both = torch.cat([pfllib_reads(out, side, client)[1] for side in ("train", "test")])
        assert counts[client] == {int(label): int((both == label).sum()) for label in both.unique()}


@pytest.mark.parametrize(
    "overrides, to, why",
    [
        ([], ["pfllib", "full"], "there is something already; give a new folder"),
        ([], ["leaf", "new"], "--to leaf: is no format; there is pfllib"),
    ],
)
def test_a_split_that_cannot_be_written_is_refused(
    tmp_path, monkeypatch, capsys, overrides, to, why
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert main(["partition", str(TINY), *overrides, "--to", *to]) == 2
    said = capsys.readouterr()
    assert why in said.err and said.err.count("\n") == 1 and not (tmp_path / "new").exists()


# --- models and results


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exchange") / "run"
    assert main(["run", str(TINY), f"output={folder}", "evaluate.every=2", "algorithm=fedper"]) == 0
    return folder


def read(file):
    if file.suffix == ".pt":
        return torch.load(file, weights_only=True)
    return pytest.importorskip("safetensors.torch").load_file(file)


@pytest.mark.parametrize("kind", [".pt", ".safetensors"])
def test_a_clients_model_loads_into_its_network(run, tmp_path, kind):
    file = tmp_path / f"model{kind}"
    assert main(["export", str(run), "--client", "5", "--to", str(file)]) == 0
    mine, another = (open_run(run).client(k).model for k in (5, 2))
    images = torch.linspace(-1, 1, 3 * 64).reshape(3, 1, 8, 8)
    with torch.no_grad():
        assert not torch.equal(another(images), mine(images))
        another.load_state_dict(read(file))
        assert torch.equal(another(images), mine(images))


def test_without_a_client_the_shared_part_is_written(run, tmp_path, capsys):
    assert main(["export", str(run), "--to", str(tmp_path / "shared.pt")]) == 0
    shared, found = open_run(run).shared, read(tmp_path / "shared.pt")
    assert found.keys() == shared.keys() and all(
        np.array_equal(found[n], shared[n]) for n in shared
    )
    assert "of the network not, each client has its own" in capsys.readouterr().out


def test_leaves_that_nobody_trains_are_told_apart_from_personal_ones(tmp_path, capsys):
    run = create_run(1, tmp_path / "run", "algorithm=fedit", "rounds=1")
    assert main(["export", str(run), "--to", str(tmp_path / "shared.pt")]) == 0
    out = capsys.readouterr().out
    assert "of the network not, nobody trains them" in out and "each client has its own" not in out


def test_results_are_those_that_pfllib_would_have_of_these_accuracies(run, tmp_path):
    assert main(["export", str(run), "--to", str(tmp_path / "r.h5")]) == 0
    view = open_run(run)
    sizes = [len(view.client(k).test_indices) for k in range(7)]
    right = (view.array("clients/accuracy")[[1, 3]] * sizes).round().sum(axis=1)
    with h5py.File(tmp_path / "r.h5") as file:
        np.testing.assert_allclose(np.array(file.get("rs_test_acc")), right / sum(sizes), rtol=1e-6)
        assert file["rs_train_loss"][()].tolist() == view.array("train_loss")[[1, 3]].tolist()
        assert "rs_test_auc" not in file


WRONG = [
    (
        ["--client", "1", "--to", "r.h5"],
        "--to r.h5: holds results of all clients; leave out --client",
    ),
    (
        ["--to", "folder"],
        "--to folder: a folder is for peft's adapter of one client; give --client, or name a file "
        ".pt",
    ),
    (["--client", "99", "--to", "m.pt"], "there is no client 99"),
    (["--client", "1", "--to", "there.pt"], "--to there.pt: is there already; choose another"),
    (["--client", "1", "--to", "no/where.pt"], "--to no/where.pt: cannot be written: No such file"),
]


@pytest.mark.parametrize("arguments, why", WRONG)
def test_what_makes_no_sense_is_one_line_and_code_2(
    run, tmp_path, monkeypatch, capsys, arguments, why
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.pt").touch()
    assert main(["export", str(run), *arguments]) == 2
    said = capsys.readouterr()
    assert why in said.err and said.err.count("\n") == 1 and said.out == ""
    assert [file.name for file in tmp_path.iterdir()] == ["there.pt"] and not (
        tmp_path / "there.pt"
    ).stat().st_size


def test_a_method_that_shares_nothing_has_no_shared_model(tmp_path, capsys):
    assert (
        main(["run", str(TINY), f"output={tmp_path / 'run'}", "algorithm=local", "rounds=1"]) == 0
    )
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "m.pt")]) == 2
    assert (
        "local shares nothing, so there is no shared model; give --client"
        in capsys.readouterr().err
    )
