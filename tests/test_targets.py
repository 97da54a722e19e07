"""Targets that are no classes, the loss that a config names, and further metrics."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from methods import FIELDS, overrides_for
from runs import TINY, build_tiny, run_rounds, snapshots_equal, tiny_config
from sklearn.metrics import roc_auc_score

from fedlora_mpi import algorithms, open_run
from fedlora_mpi import config as configs
from fedlora_mpi.algorithm import Algorithm
from fedlora_mpi.analysis import partition_table
from fedlora_mpi.core.batch import Batch, cross_entropy
from fedlora_mpi.core.losses import LOSSES, find_loss
from fedlora_mpi.data.own import OwnData
from fedlora_mpi.data.own_checks import check
from fedlora_mpi.engine.metrics import METRICS, compute_metrics
from fedlora_mpi.experiment.parts import load_data, split_data
from fedlora_mpi.mpi.ending import Refusal

SPLIT = "data.partition={kind: iid, clients: 3, train: 9, test: 7}"
SMALL = (SPLIT, "rounds=2", "participation=1", "train.epochs=1", "algorithm=fedavg")
NUMBERS = ("data.dataset=targets:numbers", "model.loss=mse", *SMALL)
LABELS = ("data.dataset=targets:labels", "model.loss=bce", *SMALL)
ONE_ROUND = ("rounds=1", "train.epochs=4")
METHODS = algorithms.algorithm_names()
OF_CLASSES = [n for n in METHODS if algorithms.find_algorithm(n).needs_class_labels]


def last_round(*overrides, ranks=1):
    return run_rounds(*overrides, ranks=ranks)[0][-1]


def batch_of(x, y, real=None):
    return Batch(x, y, real, torch.tensor(0), torch.ones(1))


# The losses.


@pytest.mark.parametrize("name", ["bce", "mse"])
def test_padding_changes_no_loss_and_no_gradient(name):
    outputs = torch.tensor([[0.5, -2.0], [1.0, 3.0], [0.0, 0.7]])
    y = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    padded = torch.cat([outputs, torch.full((2, 2), torch.inf)]).requires_grad_()
    real = torch.arange(5) < 3
    loss = LOSSES[name](padded, batch_of(padded, torch.cat([y, torch.zeros(2, 2)]), real))
    assert torch.allclose(loss, LOSSES[name](outputs, batch_of(outputs, y)))
    (gradient,) = torch.autograd.grad(loss, padded)
    assert gradient[:3].abs().min() > 0 and not gradient[3:].any()


def test_bce_and_mse_are_the_means_of_torch():
    outputs, y = torch.tensor([[0.5, -2.0], [1.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(outputs, y)
    assert torch.allclose(LOSSES["bce"](outputs, batch_of(outputs, y)), expected)
    expected = torch.nn.functional.mse_loss(outputs, y)
    assert torch.allclose(LOSSES["mse"](outputs, batch_of(outputs, y)), expected)


def test_cross_entropy_of_numbers_is_refused():
    y = torch.tensor([[1.0, 0.0]])
    with pytest.raises(ValueError, match=r"call model\.loss\(outputs, batch\)"):
        cross_entropy(y, batch_of(y, y))


def test_a_users_loss_gives_a_number_for_each_sample():
    find_loss("targets:huber").for_data("numbers", 2)
    with pytest.raises(
        ValueError, match=r"targets:one_number: gives \[\] for 3 samples, not \[3\]"
    ):
        find_loss("targets:one_number").for_data("numbers", 2)


def test_the_loss_is_in_the_config_only_if_it_is_given_and_stays_with_another_network():
    assert "loss" not in configs.resolved_dict(tiny_config())["model"]
    assert "metrics" not in configs.resolved_dict(tiny_config())["evaluate"]
    for mix in ((), ("model.mix=[cnn, {name: cnn, width: 3}]",)):
        config = tiny_config("model.loss=mse", "evaluate.metrics=[mse]", *mix)
        assert configs.from_dict(configs.resolved_dict(config), "x") == config
        assert config.model.loss == "mse"
    assert (
        configs.read(TINY, ["model={name: cnn, loss: bce}", "model.name=resnet8"]).model.loss
        == "bce"
    )


# The data.


def own_data(y_train, y_test, **more):
    x = np.zeros((len(y_train), 2), np.float32), np.zeros((len(y_test), 2), np.float32)
    return OwnData(x[0], y_train, x[1], y_test, **more)


@pytest.mark.parametrize(
    "y, wanted, targets, outputs",
    [
        ([0, 1, 0], "classes", "classes", 2),
        ([0.5, 1, 0], "numbers", "numbers", 1),
        (["0.5", "1", "-2"], "numbers", "numbers", 1),
        ([[0, 1], [1, 1], [0, 0]], "labels", "labels", 2),
        ([0, 1, 0], None, "classes", 2),
        ([0.0, 1.0, 0.0], None, "labels", 1),
        ([[0.5, 2.0]] * 3, None, "numbers", 2),
    ],
)
def test_y_holds_what_the_loss_wants(y, wanted, targets, outputs):
    checked = check(own_data(y, y[:2]), "dataset = a:b", wanted)
    assert (checked.targets, checked.classes) == (targets, outputs)
    expected = (3,) if targets == "classes" else (3, outputs)
    assert checked.train.y.shape == expected
    assert checked.train.y.dtype == (torch.int64 if targets == "classes" else torch.float32)


@pytest.mark.parametrize(
    "y_train, y_test, wanted, message",
    [
        ([0.5, 1], [1, 0], "classes", r"y_train \[2\] of float64: .*choose model\.loss"),
        ([0, 2], [1, 0], "labels", r"y_train\[1\] is 2\.0; each label is 0 or 1"),
        ([0, np.nan], [1, 0], "numbers", r"y_train\[1\] holds NaN"),
        (["a", "b"], ["a", "b"], "numbers", "holds what is no number"),
        ([[0, 1]] * 2, [0, 1], "numbers", "y_train has 2 values of each sample, y_test 1"),
        ([[[0.0]]] * 2, [0, 1], "numbers", r"must be \[samples\] or \[samples, k\]"),
    ],
)
def test_other_targets_are_refused(y_train, y_test, wanted, message):
    with pytest.raises(ValueError, match=message):
        check(own_data(y_train, y_test), "dataset = a:b", wanted)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["algorithm=fedproto"], "algorithm.name = fedproto: needs a class of each sample"),
        (["evaluate.metrics=[auc]"], "evaluate.metrics = auc: .*choose among mse, mae"),
        (["data.partition={kind: shares, clients: 3}"], "partition.kind = shares: needs a class"),
        (["data.tasks={classes: 1, rounds: 1}"], "tasks.classes = 1: needs a class"),
        (["data.shift=labels"], "shift = labels: needs a class"),
        (["data.dataset=synthetic"], "dataset = synthetic: has a class of each sample"),
        (["model.loss=targets:one_number"], "model.loss = targets:one_number: gives"),
    ],
)
def test_what_needs_classes_refuses_numbers_in_one_line(overrides, message):
    with pytest.raises(Refusal, match=message) as error:
        build_tiny(*NUMBERS, *overrides)
    assert "\n" not in str(error.value)


def test_five_of_five_classes_are_no_metric():
    with pytest.raises(Refusal, match="metrics = top5: is always 1 with 4 classes"):
        build_tiny("evaluate.metrics=[top5]")


# The metrics.


def test_auc_counts_only_classes_that_some_but_not_all_samples_have():
    y = np.array([0, 0, 2, 2])
    outputs = np.log([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.3, 0.3, 0.4], [0.1, 0.1, 0.8]])
    expected = np.mean([roc_auc_score(y == c, np.exp(outputs)[:, c]) for c in (0, 2)])
    assert METRICS["auc"].compute(outputs, y) == pytest.approx(expected)
    assert 0 < expected < 1


def test_a_client_of_one_class_or_with_an_infinite_output_has_no_auc():
    outputs = np.array([[1.0, 0.0], [0.0, 1.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(compute_metrics(["auc"], outputs, np.array([1, 1]))[0])
        outputs[0, 0] = np.inf
        assert np.isnan(compute_metrics(["auc", "top1"], outputs, np.array([0, 1]))).all()
        assert np.isnan(compute_metrics(["mse"], np.zeros((0, 1)), np.zeros((0, 1)))).all()


def test_macro_f1_leaves_out_labels_that_nobody_has_or_predicts():
    outputs, y = np.array([[1.0, -1, -1], [1.0, 2, -1]]), np.array([[1, 0, 0], [0, 1, 0]])
    assert METRICS["macro_f1"].compute(outputs, y) == pytest.approx((2 / 3 + 1) / 2)
    assert METRICS["macro_f1"].compute(outputs, np.array([0, 1])) == 1


def test_top5_is_the_share_of_samples_among_the_five_highest():
    outputs = np.tile(np.arange(7.0), (4, 1))
    assert METRICS["top5"].compute(outputs, np.array([0, 1, 2, 6])) == 0.5


# Runs.


def test_top1_is_the_accuracy_and_mse_the_loss_of_each_client():
    clients = last_round("evaluate.metrics=[top1]").clients
    assert np.allclose(clients["top1"], clients["accuracy"]) and clients["top1"].any()
    moment = last_round(*NUMBERS, "evaluate.metrics=[mse, mae]")
    assert np.allclose(moment.clients["mse"], moment.clients["loss"])
    assert moment.row["mae"] == pytest.approx(moment.clients["mae"].mean())
    assert np.isnan(moment.clients["accuracy"]).all() and np.isnan(moment.row["accuracy"])


@pytest.mark.parametrize("overrides", [NUMBERS, LABELS])
def test_training_lowers_the_test_loss(overrides):
    first, last = (m.row["loss"] for m in run_rounds(*overrides, "rounds=4")[0][1::3])
    assert last < first


def test_ranks_move_no_bit_of_metrics_and_variables():
    overrides = *LABELS, "evaluate.metrics=[auc, macro_f1]"
    moments = [last_round(*overrides, ranks=ranks) for ranks in (1, 3)]
    for moment in moments:
        assert list(moment.row.pop("undefined_metrics")) == ["auc", "macro_f1"]
    assert snapshots_equal(*moments)


def test_a_stack_scores_as_the_loop_does():
    overrides = *NUMBERS, "evaluate.metrics=[mae]"
    stack, loop = (
        last_round(*overrides, f"engine.path={path}").clients for path in ("stack", "loop")
    )
    assert np.allclose(stack["mae"], loop["mae"], atol=1e-5)
    assert np.allclose(stack["loss"], loop["loss"], atol=1e-5)


def test_the_scores_after_training_are_those_of_the_trained_model():
    """The accuracy is NaN, so it cannot tell who was trained."""
    overrides = *NUMBERS, "evaluate.metrics=[mse]"
    names = "targets:JudgedAfterTraining", "local", "fedavg"
    judged, local, fedavg = (
        run_rounds(*overrides, f"algorithm={name}")[0][1].clients["mse"] for name in names
    )
    assert np.allclose(judged, local, atol=1e-5) and not np.allclose(judged, fedavg, atol=1e-3)


def test_a_loss_without_a_rule_for_vmap_trains_one_by_one_with_a_hint(capsys):
    built = build_tiny(*NUMBERS, "model.loss=targets:huber_with_item", "engine.path=auto")
    assert built.config.engine.path == "loop"
    hints = [line for line in capsys.readouterr().err.splitlines() if "engine.path" in line]
    assert len(hints) == 1 and "cnn with model.loss = targets:huber_with_item" in hints[0]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in ("moon", "scaffold") else [pytest.mark.thorough])
        for n in METHODS
        if n not in OF_CLASSES
    ],
)
def test_a_method_that_needs_no_classes_trains_on_numbers(name):
    overrides = [o for o in overrides_for(name) if not o.startswith("train.")]
    row = last_round(*NUMBERS, *ONE_ROUND, *overrides, "train.momentum=0").row
    assert np.isfinite([row["train_loss"], row["loss"]]).all()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n == "fedrod" else [pytest.mark.thorough])
        for n in OF_CLASSES
        if n != "fed_talora"  # whose rows of the head belong to classes, whatever the loss
    ],
)
def test_a_method_that_says_so_does_need_classes(name, monkeypatch):
    monkeypatch.setattr(algorithms.find_algorithm(name), "needs_class_labels", False)
    small = ["algorithm.small=cnn"] if name in ("fml", "fedkd", "fedapen") else []
    fields = [f"algorithm.{key}={value}" for key, value in FIELDS.get(name, {}).items()]
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        run_rounds.__wrapped__(*NUMBERS, *ONE_ROUND, f"algorithm={name}", *small, *fields)


def test_fedavg_needs_no_classes():
    assert not Algorithm.needs_class_labels and {"fedproto", "fml", "fedrod"} <= {*OF_CLASSES}


def test_a_run_shows_its_metrics(call, monkeypatch):
    overrides = *NUMBERS, "evaluate.metrics=[mse]", "output=run"
    code, out, err = call("run", TINY, *overrides)
    assert code == 0 and "· test loss " in err and "· mse " in err
    code, out, _ = call("report", "run")
    header, row = out.splitlines()
    assert header.split()[3:9] == ["final", "best", "worst", "client", "loss", "mse"]
    assert row.split()[3:6] == ["-", "-", "-"] and row.split()[6] == row.split()[7]
    assert " · mse " in call("watch", "run", "--once")[1]
    code, _, err = call("export", "run", "--to", "run.h5")
    assert code == 2 and "has no accuracy, because its targets are no classes" in err


def test_clients_without_a_metric_are_named_once(call):
    split = (
        "data.partition={kind: pathological, clients: 3, train: 9, test: 5, classes_per_client: 1}"
    )
    code, _, err = call("run", TINY, "rounds=2", split, "participation=1", "evaluate.metrics=[auc]")
    assert code == 0
    assert err.count("evaluate.metrics = auc: has no value for client 0, 1, 2 (") == 1


@pytest.mark.parametrize("data", [NUMBERS, LABELS])
def test_a_clients_model_with_several_outputs_scores_as_the_log_says(data, call):
    assert call("run", TINY, *data, "algorithm=fedper", "output=run")[0] == 0
    run = open_run("run")
    x, y = run.client(2).test_data()
    with torch.no_grad():
        outputs = run.client(2).model(x)
    assert outputs.shape == y.shape == (7, 3)
    loss = find_loss(run.config["model"]["loss"]).each(outputs, y).mean()
    assert float(loss) == pytest.approx(run.array("clients/loss")[-1, 2], rel=1e-4)
    assert call("export", "run", "--client", "2", "--to", "m.pt")[0] == 0


def test_a_partition_of_numbers_names_no_classes(call):
    code, out, _ = call("partition", TINY, *NUMBERS)
    assert code == 0 and "class" not in out
    assert out.splitlines()[1].split() == ["client", "train", "test"]
    assert "3 clients, the targets are numbers: 27 training samples (9 per client), " in out


def test_a_partition_tells_the_names_of_labels():
    split = split_data(tiny_config(*LABELS), "x", load_data(tiny_config(*LABELS), "x"))
    text = partition_table.table(split, ("warm", "wet", "dark"), "labels")
    assert text.splitlines()[-1] == "labels: 0 warm, 1 wet, 2 dark"


def test_a_sweep_without_accuracy_is_reported_by_its_scores(call, in_process):
    numbers = [word for word in NUMBERS if not word.startswith("algorithm=")]
    ask = (*numbers, "rounds=1", "evaluate.metrics=[mae]", "algorithm=fedavg,local", "output=s")
    assert call("sweep", TINY, *ask, "--jobs", "1")[0] == 0
    code, out, _ = call("report", "s")
    assert code == 0 and out.endswith(
        "\n\nno paired comparison: the targets are no classes, so there is no accuracy; compare "
        "loss, mae (lower is better)\n"
    )
    assert call("report", "s", "-o", "page")[0] == 0
    page = Path("page/report.html").read_text(encoding="utf-8")
    assert "No round was evaluated yet" not in page and "There is no accuracy, because" in page
    header, row, _ = Path("page/tables/accuracy.csv").read_text(encoding="utf-8").splitlines()
    assert header == "run,seeds,rounds,loss_mean,loss_std,mae_mean,mae_std"
    loss = open_run("s/algorithm=fedavg").array("loss")[-1]
    assert float(row.split(",")[3]) == pytest.approx(loss)
