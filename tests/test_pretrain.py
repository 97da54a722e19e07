"""``fedlora-mpi pretrain``: what it trains on, what it writes, and that a run takes it."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    TINY,
    command_line,
    mpirun_command,
    package_lines,
    run_process,
    tiny_config,
    trees_equal,
)

from fedlora_mpi.data.feed import Feed
from fedlora_mpi.experiment.parts import load_data
from fedlora_mpi.experiment.pretrain import parse_classes, pool_samples
from fedlora_mpi.models import weights, zoo
from fedlora_mpi.mpi import comm
from fedlora_mpi.store.reader import RunFiles

LINE = re.compile(r"epoch (\d+)/(\d+) · test accuracy ([\d.]+)% · train loss ([\d.]+) · ")


def pretrained(call, *arguments, to="net.safetensors"):
    """(leaves of the file, accuracies, losses) of a pretraining of tiny.yaml."""
    code, out, err = call("pretrain", TINY, *arguments, "--to", to)
    said = [line for line in err.splitlines() if " resets " not in line]
    assert (code, said) == (0, []), err
    lines = [LINE.match(line) for line in out.splitlines()[:-1]]
    assert [int(line[1]) for line in lines] == list(range(1, int(lines[0][2]) + 1)) and len(
        lines
    ) == int(lines[0][2])
    return (
        weights.read(Path(to)),
        [float(line[3]) for line in lines],
        [float(line[4]) for line in lines],
    )


def accuracy(call, *arguments):
    """After one round of tiny.yaml."""
    assert call("run", TINY, "rounds=1", "algorithm=fedavg", *arguments)[0] == 0
    (output,) = (a.removeprefix("output=") for a in arguments if a.startswith("output="))
    return RunFiles(Path(output)).rounds()["accuracy"][0]


# --- what it does


def test_a_run_from_a_pretrained_network_begins_far_better(call):
    _, accuracies, losses = pretrained(call, "--epochs", 4)
    assert losses[-1] < losses[0] / 2 and accuracies[-1] > 85
    fresh = accuracy(call, "output=fresh")
    assert accuracy(call, "output=warm", "model.weights=net.safetensors") > fresh + 0.2


def test_the_default_is_the_epochs_of_the_config(call):
    assert len(pretrained(call)[1]) == tiny_config().train.epochs == 3
    assert len(pretrained(call, "train.epochs=2", to="b.safetensors")[1]) == 2


def test_an_epoch_in_one_batch_is_one_step_of_gradient_descent_on_all_samples(call):
    found, _, losses = pretrained(
        call, "train.batch_size=240", "train.lr=0.5", "train.weight_decay=0.01", "--epochs", 2
    )
    config = tiny_config()
    data = load_data(config, "")
    x = ((data.train.x / 255 - data.mean[0]) / data.std[0]).float()
    network = config.model.mix[0]
    model = zoo.build(network.name, network.options, data.classes, data.shape, config.seed)
    w = {n: v.clone().requires_grad_() for n, v in model.initial.items()}
    for told in losses:  # momentum 0.9 starts fresh in every epoch, so one step knows none
        loss = torch.nn.functional.cross_entropy(model(w, x), data.train.y)
        assert abs(loss.item() - told) < 1e-3
        steps = torch.autograd.grad(loss, list(w.values()))
        w = {
            n: (v - 0.5 * (g + 0.01 * v)).detach().requires_grad_()
            for (n, v), g in zip(w.items(), steps, strict=True)
        }
    for name, value in w.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-4, atol=1e-5)


def test_the_file_is_a_pure_function_of_the_seed(call):
    def written(to, *arguments):
        return (
            pretrained(call, *arguments, "--epochs", 1, to=to),
            Path(to).read_bytes(),
        )[1]

    one = written("1.safetensors")
    assert written("2.safetensors") == one
    assert written("3.safetensors", "seed=2") != one
    for number, ignored in enumerate(
        (
            "data.partition.seed=2",
            "data.partition.clients=3",
            "algorithm=local",
            "data.shift=rotate",
            "engine.path=loop",
        )
    ):
        assert written(f"same{number}.safetensors", ignored) == one, ignored
    assert written("4.safetensors", "data.augment=[flip]") != one


def test_every_epoch_has_an_order_of_its_own(call, monkeypatch):
    orders, ordered = [], Feed.epoch

    def watched(feed, clients, round_, epoch, *more):
        orders.append((round_, epoch))
        return ordered(feed, clients, round_, epoch, *more)

    monkeypatch.setattr(Feed, "epoch", watched)
    pretrained(call, "--epochs", 3)
    assert len(orders) == len(set(orders)) == 3


def test_the_partition_need_not_be_possible(call):
    pretrained(call, "data.partition.minimum=100", "algorithm.lora_epochs=3", "--epochs", 1)


def test_the_file_has_every_leaf_with_the_statistics(call):
    found, *_ = pretrained(call, "model=user_parts:with_norm", "--epochs", 1)
    fresh = zoo.build("user_parts:with_norm", {}, 4, (1, 8, 8), 1)
    assert list(found) and found.keys() == fresh.leaves.keys()
    assert all(
        not torch.equal(found[n], fresh.initial[n])
        for n in ("norm.running_mean", "norm.weight", "head.weight")
    )
    model = zoo.build("user_parts:with_norm", {}, 4, (1, 8, 8), 2, weights="net.safetensors")
    assert trees_equal(model.initial, {n: found[n] for n in model.initial})


def test_it_goes_on_from_weights_that_the_config_names(call):
    first, *_ = pretrained(call, "--epochs", 1)
    again, *_ = pretrained(
        call, "model.weights=net.safetensors", "train.lr=1e-30", "--epochs", 1, to="b.safetensors"
    )
    assert trees_equal(first, again)


def test_of_a_mix_one_network_is_trained(call):
    mix = "model={mix: [{name: cnn, width: 4, hidden: 8}, {name: 'user_parts:wide', hidden: 7}], clients: [3, 4]}"
    first, *_ = pretrained(call, mix, "--epochs", 1)
    second, *_ = pretrained(call, mix, "--epochs", 1, "--network", 1, to="b.safetensors")
    assert first["7.weight"].shape[0] == 8 and second["4.weight"].shape[0] == 7
    alone, *_ = pretrained(
        call, "model={name: 'user_parts:wide', hidden: 7}", "--epochs", 1, to="c.safetensors"
    )
    assert trees_equal(second, alone)


def test_it_learns_texts_under_the_vocabulary_of_the_data(call, tmp_path):
    words = [
        ("a", "boat sails"),
        ("b", "goat eats"),
        ("a", "boat floats"),
        ("b", "goat sleeps"),
    ] * 6
    for side in ("train", "test"):
        (tmp_path / f"{side}.csv").write_text(
            "label,text\n" + "".join(f"{y},{x}\n" for y, x in words)
        )
    these = [
        "data={dataset: csv, root: ., text: {length: 4}, partition: {kind: iid, clients: 3, train: 8, test: 4}}",
        "model={name: transformer, width: 4, heads: 2, layers: 1, feedforward: 5}",
    ]
    found, accuracies, _ = pretrained(call, *these, "--epochs", 5)
    assert found["words.weight"].shape == (8, 4) and accuracies[-1] == 100
    assert (
        call(
            "run",
            TINY,
            *these,
            "model.weights=net.safetensors",
            "algorithm=fedavg",
            "rounds=1",
            "output=run",
        )[0]
        == 0
    )
    assert RunFiles(tmp_path / "run").rounds()["accuracy"][0] == 1


# --- some classes


def test_some_classes_are_all_their_samples_and_no_other():
    data = load_data(tiny_config(), "")
    split = pool_samples(data, [1, 3])
    for rows, counts, y in (
        (split.train, split.train_counts, data.train.y),
        (split.test, split.test_counts, data.test.y),
    ):
        assert np.array_equal(rows[0], np.flatnonzero((y == 1) | (y == 3))) and len(rows) == 1
        assert counts.tolist() == [[0, (y == 1).sum(), 0, (y == 3).sum()]]


def test_trained_on_some_classes_a_network_tells_these_apart_and_names_no_other(call):
    found, accuracies, _ = pretrained(call, "--epochs", 4, "--classes", "0,2")
    assert accuracies[-1] > 90  # of the test samples of these
    data, model = (
        load_data(tiny_config(), ""),
        zoo.build("cnn", {"width": 4, "hidden": 8}, 4, (1, 8, 8), 1),
    )
    x = ((data.test.x / 255 - data.mean[0]) / data.std[0]).float()
    named = model.eval_mode()(found, x).argmax(1)
    assert set(named.tolist()) == {0, 2} and found["9.bias"].shape == (4,)
    right = (named == data.test.y)[(data.test.y == 0) | (data.test.y == 2)]
    assert f"{right.double().mean().item():.2%}" == f"{accuracies[-1]:.2f}%"


@pytest.mark.parametrize(
    "text, classes",
    [
        (None, [0, 1, 2, 3]),
        ("0-3", [0, 1, 2, 3]),
        ("2", [2]),
        ("3,0", [0, 3]),
        ("1-2,2,0", [0, 1, 2]),
    ],
)
def test_classes_are_ranges_and_numbers(text, classes):
    assert parse_classes(text, 4) == classes


@pytest.mark.parametrize(
    "text", ["", "4", "0-4", "3-1", "-1", "1-", "a", "0;2", "0,,2", "1-2-3", "1.5"]
)
def test_classes_that_are_not_there_are_refused(call, tmp_path, text):
    assert call("pretrain", TINY, "--to", "net.safetensors", f"--classes={text}") == (
        2,
        "",
        f"fedlora-mpi: --classes = {text}: must be such as 0-4 or 0,2,5, from 0 to 3\n",
    )
    assert not list(tmp_path.iterdir())


def test_classes_without_a_sample_are_refused(call):
    refused = call(
        "pretrain", TINY, "data.synthetic.test=3", "--to", "net.safetensors", "--classes=3"
    )
    assert refused == (2, "", "fedlora-mpi: --classes = 3: there is no test sample of these\n")


# --- what is refused


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--to", "net.pt"], "--to = net.pt: must be a file .safetensors"),
        (
            ["--to", "here.safetensors"],
            "--to = here.safetensors: the file exists; remove it or choose another",
        ),
        (
            ["--to", "here.safetensors/a.safetensors"],
            "--to = here.safetensors/a.safetensors: here.safetensors cannot be created",
        ),
        (
            ["--to", "a.safetensors", "--epochs", "0"],
            "--epochs = 0: must be an integer of at least 1",
        ),
        (
            ["--to", "a.safetensors", "--network", "1"],
            "--network = 1: must be from 0 to 0, as in model.mix",
        ),
        (
            ["--to", "a.safetensors", "--network", "-1"],
            "--network = -1: must be from 0 to 0, as in model.mix",
        ),
        (["train.lr=-1", "--to", "a.safetensors"], "command line: train.lr = -1"),
        (
            ["model=transformer", "--to", "sub/a.safetensors"],
            f"{TINY}: model.name = transformer: cannot be built",
        ),
        (
            ["model.weights=b.pt", "--to", "a.safetensors"],
            f"{TINY}: model.weights = b.pt: there is no file",
        ),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_trained_or_written(
    call, tmp_path, arguments, message
):
    (tmp_path / "here.safetensors").write_text("mine")
    code, out, err = call("pretrain", TINY, *arguments)
    assert (
        (code, out) == (2, "")
        and err.startswith(f"fedlora-mpi: {message}")
        and err.count("\n") == 1
    ), err
    assert [f.name for f in tmp_path.iterdir()] == ["here.safetensors"]
    assert (tmp_path / "here.safetensors").read_text() == "mine"


def test_without_the_library_nothing_is_trained(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    message = "fedlora-mpi: safetensors is not installed; pip install 'fedlora-mpi[weights]'\n"
    assert call("pretrain", TINY, "--to", "net.safetensors") == (2, "", message)


def test_a_training_that_diverges_writes_nothing(call, tmp_path):
    code, _, err = call("pretrain", TINY, "train.lr=1e30", "--to", "net.safetensors")
    assert (code, err) == (
        1,
        "fedlora-mpi: epoch 1: the loss or a weight is not finite; nothing was written. Lower "
        "train.lr\n",
    )
    assert not list(tmp_path.iterdir())


def test_the_folder_is_made(call, tmp_path):
    pretrained(call, "--epochs", 1, to="nets/small/net.safetensors")
    assert [f.name for f in (tmp_path / "nets/small").iterdir()] == ["net.safetensors"]


def test_several_ranks_are_refused_in_one_line(monkeypatch, call, tmp_path):
    class Two(comm.Solo):
        size = 2

    monkeypatch.setattr(comm, "Solo", Two)
    refused = call("pretrain", TINY, "--to", "net.safetensors")
    assert refused == (
        2,
        "",
        "fedlora-mpi: 2 ranks: pretrain takes one; start it without mpirun (engine.threads gives "
        "it cores)\n",
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_several_real_ranks_are_refused_in_one_line(tmp_path):
    ended = run_process(
        [*mpirun_command(2), *command_line("pretrain", TINY, "--to", "net.safetensors")], tmp_path
    )
    assert ended.returncode == 2
    assert package_lines(ended.stderr) == [
        "fedlora-mpi: 2 ranks: pretrain takes one; start it without mpirun (engine.threads gives "
        "it cores)"
    ]
    assert not list(tmp_path.iterdir())
