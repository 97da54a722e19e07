"""What is read from a run folder is what the run did: its metrics, its leaves, and each client's
model.
"""

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from fedlora_mpi import config as configs
from fedlora_mpi import open_run
from fedlora_mpi.analysis import partition_table as partition
from fedlora_mpi.analysis import report
from fedlora_mpi.analysis import run_view as one
from fedlora_mpi.cli import main
from fedlora_mpi.data.datasets import load
from fedlora_mpi.data.feed import Feed
from fedlora_mpi.data.partition import DirichletClient, Pathological, Split
from fedlora_mpi.store.log import Log

ROOT = Path(__file__).parents[1]
CLIENTS, CLASSES, ROUNDS = 5, 3, 3
CONFIG = f"""\
rounds: {ROUNDS}
data:
  dataset: synthetic
  shift: rotate
  synthetic: {{classes: {CLASSES}, train: 300, test: 120, channels: 2}}
  partition: {{kind: dirichlet_client, alpha: 1.0, clients: {CLIENTS}, train: 20, test: 13}}
model: {{name: cnn, width: 3, hidden: 7}}
algorithm: fedlora
train: {{epochs: 2, batch_size: 8}}
evaluate: {{every: 2}}
"""

SCORES = ("accuracy", "loss", "accuracy_aggregated", "accuracy_trained")  # of each client


def play(folder, *overrides):
    """The view of a tiny run with these overrides."""
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(CONFIG)
    assert main(["run", str(folder / "tiny.yaml"), f"output={folder / 'run'}", *overrides]) == 0
    return open_run(folder / "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return play(tmp_path_factory.mktemp("fedlora"))


ANY = ["algorithm=fedavg", "algorithm=local", "algorithm=fedlora", "model=cifar_resnet8"]


@pytest.fixture(scope="module", params=ANY)
def any_run(request, tmp_path_factory):
    return play(tmp_path_factory.mktemp("any"), request.param)


def test_a_clients_model_scores_exactly_what_the_run_logged(any_run):
    config = configs.from_dict(any_run.config, "log")
    shift = config.data.source.shift
    data, device = load(config.data.source), torch.device("cpu")
    feed = Feed(
        data, any_run.partition, seed=config.seed, shift=shift, device=device, augment=False
    )
    logged = any_run.array("clients/accuracy")[-1]
    for client in range(CLIENTS):
        batch = feed.test_batch([client], 0, feed.test_size(client))
        view = any_run.client(client)
        x, y = view.test_data()
        assert torch.equal(x, batch.x[0]) and torch.equal(y, batch.y[0])
        with torch.no_grad():
            right = view.model(x).argmax(1) == y
        assert np.float32(right.double().mean()) == logged[client]
        assert len(right) == len(view.test_indices)
        for name, value in view.model.state_dict().items():
            assert np.array_equal(view.weights[name], value)


def test_training_data_are_normalised_and_have_the_counts_of_the_split(run):
    for client in range(CLIENTS):
        view = run.client(client)
        x, y = view.train_data()
        assert x.shape == (len(view.train_indices), 2, 8, 8) and x.dtype == torch.float32
        assert y.bincount(minlength=CLASSES).tolist() == view.counts.tolist()
        assert abs(float(x.mean())) < 0.2 and 0.8 < float(x.std()) < 1.2


def test_with_tasks_the_data_are_those_of_the_round_of_the_checkpoint(tmp_path):
    run = play(
        tmp_path, "algorithm=fedavg", "data.shift=none", "data.tasks={classes: 1, rounds: 2}"
    )
    view, logged = run.client(1), run.array("clients/accuracy")[-1]
    assert view.train_data().y.unique().tolist() == [1]  # round 3 is of task 1
    x, y = view.test_data()
    assert y.unique().tolist() == [0, 1] and len(y) < len(view.test_indices)
    with torch.no_grad():
        assert np.float32((view.model(x).argmax(1) == y).double().mean()) == logged[1]


def test_the_examples_of_open_run_hold(run, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny-1").symlink_to(run.path)
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(one) == (0, 15)
    with pytest.raises(ValueError, match="no column 'rounds/acc'"):
        run.axes("acc")


def test_personal_and_shared_leaves_are_those_of_the_checkpoint(any_run):
    folder = any_run.path / "checkpoints" / f"{ROUNDS:06d}"

    def read(name):
        return h5py.File(folder / name, locking=False)

    with read("personal.h5") as personal, read("server.h5") as server:
        for client in range(CLIENTS):
            mine = any_run.client(client).personal
            assert set(mine) == set(personal["personal"])
            for leaf, value in mine.items():
                assert np.array_equal(value, personal["personal"][leaf][client])
        assert set(any_run.shared) == set(server["shared"])
        for leaf, value in any_run.shared.items():
            assert np.array_equal(value, server["shared"][leaf][()])


def test_fedavg_has_no_personal_leaves_and_local_no_shared_ones(any_run):
    name = any_run.config["algorithm"]["name"]
    assert (len(any_run.client(0).personal) == 0) == (name == "fedavg")
    assert (len(any_run.shared) == 0) == (name == "local")


def test_rounds_and_clients_tell_the_same_accuracy(run):
    assert list(run.rounds.index) == [1, 2, 3] and run.rounds.index.name == "round"
    assert run.rounds["train_loss"].notna().all()
    assert list(run.clients.columns) == ["round", "client", *SCORES]
    for score in SCORES:
        mean = run.clients.groupby("round")[score].mean()
        assert np.allclose(mean, run.rounds[score].dropna())
    assert list(run.clients["client"]) == 2 * list(range(CLIENTS))


def test_clients_leave_out_the_rounds_that_were_not_evaluated(run):
    assert set(run.clients["round"]) == {2, 3}
    assert np.isnan(run.array("clients/accuracy")[0]).all()


def test_an_array_is_a_column_with_its_axes(run):
    assert run.array("accuracy").shape == (ROUNDS,)
    assert run.array("clients/accuracy").shape == (ROUNDS, CLIENTS)
    assert np.array_equal(run.array("train_loss"), run.rounds["train_loss"])


def test_a_clients_data_are_those_of_the_partition(run):
    config = configs.from_dict(run.config, "log")
    data = load(config.data.source)
    split = config.data.partition.split(data.train.y.numpy(), data.test.y.numpy(), data.classes)
    assert run.partition.digest() == split.digest()
    for client in range(CLIENTS):
        view = run.client(client)
        assert np.array_equal(view.train_indices, split.train[client])
        assert np.array_equal(view.test_indices, split.test[client])
        assert np.array_equal(
            view.counts, np.bincount(data.train.y[view.train_indices], minlength=CLASSES)
        )


def test_what_is_not_there_is_refused_with_what_is(run):
    with pytest.raises(
        ValueError, match="no column 'acc'; there are round, .*accuracy, .*clients/accuracy"
    ):
        run.array("acc")
    for wrong in (-1, CLIENTS):
        with pytest.raises(ValueError, match=f"no client {wrong}; there are 0 to {CLIENTS - 1}"):
            run.client(wrong)
    with pytest.raises(KeyError, match="head: no personal leaf; there are 0.weight.A, 0.weight.B"):
        run.client(0).personal["head"]
    with pytest.raises(ValueError, match="not a run folder"):
        open_run(run.path.parent)


def test_metrics_and_leaves_are_read_without_torch(run):
    code = f"""
import sys, fedlora_mpi
run = fedlora_mpi.open_run({str(run.path)!r})
run.rounds, run.clients, run.array("accuracy"), run.shared, run.digest(), run.config, run.checkpoints
client = run.client(2)
client.personal["0.weight.A"], client.counts, client.train_indices
from fedlora_mpi.analysis import partition_table as partition, report
partition.table(run.partition), report.table([run.path])
assert "torch" not in sys.modules
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)


def new_log(folder, seed=1, rounds=3, **config):
    """The log of a run of 2 clients without rounds, as a run makes it."""
    folder.mkdir()
    config = {
        "seed": seed,
        "rounds": rounds,
        "output": str(folder),
        "data": {"root": "x", "download": False, "partition": {"seed": 1}},
        "algorithm": {"name": "fedavg"},
        **config,
    }
    about = {"config_yaml": "", "config_json": json.dumps(config), "versions": {}, "partition": {}}
    return Log.create(folder / "log.h5", clients=2, **about)


def append(log, round_, accuracies):
    row = {"clients": 2, "bytes_up": 6000, "seconds_train": 1.5, "seconds_evaluate": 0.5}
    accuracies = np.array(accuracies)
    row |= {"accuracy": accuracies.mean(), "accuracy_worst": accuracies.min()}
    log.append(round_, row, {"accuracy": accuracies, "loss": accuracies})


def logged(folder, *rows, **config):
    """A run folder whose clients had these accuracies, round by round."""
    log = new_log(folder, **config)
    for round_, accuracies in enumerate(rows, 1):
        append(log, round_, accuracies)
    log.close()
    return folder


def test_a_view_follows_a_log_that_is_still_written(tmp_path):
    log = new_log(tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert len(run.rounds) == len(run.clients) == 0
    append(log, 1, [0.25, 0.75])
    assert run.array("accuracy").tolist() == [0.5]
    append(log, 2, [0.5, 1.0])
    assert run.rounds["accuracy"].tolist() == [0.5, 0.75]
    assert run.clients[["round", "client"]].values.tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert run.clients["accuracy"].tolist() == [0.25, 0.75, 0.5, 1.0]
    with pytest.raises(ValueError, match="no valid checkpoint .none was committed"):
        run.digest()
    log.close()


def test_a_new_checkpoint_is_seen_by_new_views_of_a_client_and_not_by_old_ones(tmp_path):
    run = play(tmp_path)
    leaf = "0.weight.A"
    old = run.client(1)
    before = old.personal[leaf]
    assert main(["resume", str(run.path), f"rounds={ROUNDS + 1}"]) == 0
    assert np.array_equal(old.personal[leaf], before)
    assert not np.array_equal(run.client(1).personal[leaf], before)
    assert run.checkpoints == [ROUNDS, ROUNDS + 1]


def cells(text):
    return [re.split(r"  +", line.strip()) for line in text.splitlines()]


def test_a_report_holds_the_last_the_best_and_the_worst(tmp_path):
    path = logged(tmp_path / "a", [0.25, 0.75], [0.5, 1.0], [np.nan, np.nan], rounds=9)
    row = dict(zip(*cells(report.table([path])), strict=True))
    assert row.pop("run") == str(path) and row.pop("method") == "FedAvg"
    assert row.pop("rounds") == "3/9" and row.pop("seed") == "1"
    assert row.pop("up/client") == "3 kB" and row.pop("s/round") == "2"
    assert row == {"final": "75.00%", "best": "75.00% @2", "worst client": "50.00%"}


def test_a_report_keeps_the_order_of_runs_and_aligns_columns(tmp_path):
    paths = [
        logged(tmp_path / name, [0.5, 1.0], algorithm={"name": name})
        for name in ("zeta_long", "alpha")
    ]
    lines = report.table(paths).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == list(map(str, paths))
    assert (
        len({line.index(end) for line, end in zip(lines, ("run", *map(str, paths)), strict=True)})
        == 1
    )


def test_runs_that_differ_in_their_seed_only_get_a_mean(tmp_path):
    paths = [
        logged(tmp_path / f"{seed}", [0.1 * seed, 0.2 * seed], seed=seed) for seed in (1, 2, 3)
    ]
    paths += [logged(tmp_path / "other", [0.5, 0.5], seed=4, algorithm={"name": "local"})]
    paths += [logged(tmp_path / "longer", [0.5, 0.5], [0.5, 0.5], seed=5)]
    rows = cells(report.table(paths))
    assert len(rows) == 1 + 5 + 1
    # of 0.15, 0.30, 0.45; of 0.1, 0.2, 0.3
    spread = ["30.00% ±15.00", "30.00% ±15.00", "20.00% ±10.00"]
    assert rows[-1] == ["FedAvg", "1", "3 seeds", *spread, "3 kB", "2", "mean ± std of 3 runs"]


def test_the_same_seed_twice_gets_no_mean(tmp_path):
    paths = [logged(tmp_path / name, [0.5, 1.0]) for name in "ab"]
    assert len(report.table(paths).splitlines()) == 3


def test_a_report_of_a_run_without_rounds_has_dashes(tmp_path):
    assert cells(report.table([logged(tmp_path / "a")]))[1][1:8] == [
        "0/3",
        "1",
        "-",
        "-",
        "-",
        "-",
        "-",
    ]


def split_of(counts):
    """A split with these training samples [N, classes], and one test sample for each client."""
    counts = np.array(counts)
    train = tuple(np.arange(n) for n in counts.sum(1))
    return Split(train, tuple(np.zeros((len(counts), 1), int)), counts, np.zeros_like(counts))


def test_the_table_of_a_partition_shows_every_count():
    samples = "122 training samples (15 to 107 per client), 2 test samples (1 per client)"
    everyone = f"2 clients, 3 classes: {samples}, 2 classes per client"
    assert partition.table(split_of([[12, 0, 3], [0, 100, 7]])).splitlines() == [
        "training samples of each class; samples in all",
        "client   0    1  2  train  test",
        "     0  12    ·  3     15     1",
        "     1   ·  100  7    107     1",
        everyone,
    ]


def test_the_table_of_many_classes_shows_how_many_each_client_holds():
    counts = np.zeros((3, 21), int)
    counts[:, 4], counts[1:, 20] = 3, [9, 1]
    rows = cells(partition.table(split_of(counts)))[1:5]
    assert rows[0] == ["client", "classes", "largest", "share", "train", "test"]
    assert rows[2:] == [["1", "2", "20", "75%", "12", "1"], ["2", "2", "4", "75%", "4", "1"]]


def test_the_table_of_many_clients_ends_after_forty():
    lines = partition.table(split_of(np.ones((43, 3), int))).splitlines()
    assert len(lines) == 2 + 40 + 2
    assert lines[-2] == "... and 3 more clients"
    assert lines[-1].startswith("43 clients, 3 classes: 129 training samples")


@pytest.mark.parametrize("clients, classes", [(1, 2), (40, 10), (40, 100), (300, 3)])
def test_the_area_of_a_dot_is_the_number_of_samples(clients, classes):
    labels = np.arange(3000) % classes
    split = DirichletClient(clients=clients, train=100, alpha=0.5).split(labels, labels, classes)
    axes = partition.figure(split).axes[0]
    dots = axes.collections[0]
    client, label = dots.get_offsets().astype(int).T
    counts = split.train_counts[client, label]
    assert len(counts) == np.count_nonzero(split.train_counts)
    assert np.allclose(dots.get_sizes() / dots.get_sizes()[0], counts / counts[0])
    assert axes.get_xlabel() == "client" and axes.get_ylabel() == "class"
    assert axes.get_legend().get_texts()[-1].get_text() == str(counts.max())


def test_a_picture_is_a_png_and_leaves_nothing_beside(tmp_path):
    labels = np.arange(300) % 5
    partition.save_figure(
        Pathological(clients=3, train=20, test=10).split(labels, labels, 5), tmp_path / "x.png"
    )
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_a_picture_that_cannot_be_made_is_refused_with_the_way_out(tmp_path, monkeypatch):
    split = split_of([[1, 2], [3, 4]])
    with pytest.raises(
        ValueError, match="No such file or directory, .* GB free .*; choose another"
    ):
        partition.save_figure(split, tmp_path / "nowhere" / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'fedlora-mpi\[analysis\]'"):
        partition.save_figure(split, tmp_path / "x.png")


def test_without_pandas_tables_are_refused_and_arrays_are_not(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    for table in ("rounds", "clients"):
        with pytest.raises(ValueError, match=r"pip install 'fedlora-mpi\[analysis\]'"):
            getattr(run, table)
    assert len(run.array("accuracy")) == ROUNDS
