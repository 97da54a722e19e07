"""Class-incremental learning: what clients train on, who takes part, what is judged, and what it
leaves alone.

``EACH`` gives the tiny experiment a task for each of its four classes; some of its clients lack
some classes.
"""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    NORM,
    TINY,
    assert_near,
    assert_same_run,
    build_tiny,
    run_rounds,
    snapshots_equal,
    tiny_config,
)

from fedlora_mpi.algorithm import Phase, Variables, used_samples
from fedlora_mpi.config import digest, flatten, from_dict, read, resolved_dict, resolved_yaml
from fedlora_mpi.config.blocks import ConfigError
from fedlora_mpi.data.feed import Epoch
from fedlora_mpi.data.tasks import Tasks
from fedlora_mpi.engine.flops import Flops
from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.experiment.checkpointing import initial_state
from fedlora_mpi.experiment.loop import resume
from fedlora_mpi.experiment.parts import load_data
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.mpi.ending import Refusal
from fedlora_mpi.plan import plan

EACH = ("data.tasks.classes=1", "data.tasks.rounds=1")
PAIRS = ("data.tasks.classes=2", "data.tasks.rounds=2")
MIX = (
    "algorithm=pfedlora",
    "model.mix=[{name: cnn, width: 4, hidden: 8}, {name: cnn, width: 6, hidden: 8}]",
)
# A mean with the absent, a mix per client, server state, surveys, tuning, this on held-out samples,
# two networks.
METHODS = {
    "fedlora": ("algorithm=fedlora",),
    "fedamp": ("algorithm=fedamp",),
    "scaffold": ("algorithm=scaffold", "train.momentum=0"),
    "fedpac": ("algorithm=fedpac", NORM),
    "fedavg_ft": ("algorithm=fedavg_ft", "algorithm.ft_epochs=1", NORM),
    "fedapen": ("algorithm=fedapen", "algorithm.small=user_parts:with_norm", NORM),
    "pfedlora": MIX,
}
thorough = pytest.mark.thorough


def each_method(*telling):
    """A test of every method; in ``make test`` of these alone."""
    given = [
        pytest.param(more, id=name, marks=() if name in telling else thorough)
        for name, more in METHODS.items()
    ]
    return pytest.mark.parametrize("method", given)


methods = each_method("fedlora", "fedapen")


def counts(side="train"):
    """[N, classes] of the tiny experiment without tasks."""
    return getattr(build_tiny().split, f"{side}_counts")


# What a task is


def test_some_clients_of_the_tiny_experiment_lack_a_class_and_their_order_by_size_changes():
    assert (counts() == 0).any() and (counts("test")[:, 0] == 0).any()
    orders = [
        np.argsort(-column, kind="stable").tolist() for column in (counts().sum(1), *counts().T)
    ]
    assert all(order != orders[0] for order in orders[1:])


@pytest.mark.parametrize(
    "size, tasks", [(1, [[0], [1], [2], [3]]), (3, [[0, 1, 2], [3]]), (4, [[0, 1, 2, 3]])]
)
def test_a_task_has_its_training_samples_and_all_test_samples_so_far(size, tasks):
    whole, data = build_tiny().split, load_data(tiny_config(), str(TINY))
    train_y, test_y = data.train.y.numpy(), data.test.y.numpy()
    parts = Tasks(size, 1).split_by_task(whole, train_y, test_y)
    assert len(parts) == len(tasks)
    for part, present in zip(parts, tasks, strict=True):
        for client in range(7):
            expected = [row for row in whole.train[client] if train_y[row] in present]
            assert part.train[client].tolist() == expected
            expected = [row for row in whole.test[client] if test_y[row] <= present[-1]]
            assert part.test[client].tolist() == expected
        absent = [c for c in range(4) if c not in present]
        assert np.array_equal(part.train_counts[:, present], whole.train_counts[:, present])
        assert (
            not part.train_counts[:, absent].any()
            and not part.test_counts[:, present[-1] + 1 :].any()
        )
        assert np.array_equal(
            part.test_counts[:, : present[-1] + 1], whole.test_counts[:, : present[-1] + 1]
        )


def test_a_task_lasts_its_rounds_and_the_last_one_stays():
    federation = build_tiny("data.tasks.classes=3", "data.tasks.rounds=2").federation
    first, last = federation.cohorts.tasks
    assert [federation.cohorts.clients(round_) is first for round_ in range(6)] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    assert all(federation.cohorts.clients(round_) is last for round_ in (2, 3, 4, 100))
    plain = build_tiny().federation
    assert plain.cohorts.clients(100) is plain.clients


def test_sizes_and_weights_are_those_of_the_task():
    for algorithm, weights in (("fedavg", counts().T), ("fedlora", counts().T > 0)):
        federation = build_tiny(f"algorithm={algorithm}", *EACH).federation
        for round_ in range(4):
            assert federation.cohorts.clients(round_).sizes == tuple(counts()[:, round_])
            assert federation.cohorts.clients(round_).weights == tuple(weights[round_])


# What clients see


@pytest.fixture
def seen(monkeypatch):
    """What clients are given: (the store it is from, labels, counts [C, classes]) of each batch of
    a stack.
    """
    batches, read_batch = [], Epoch._batch

    def watched(epoch, *given):
        batch = read_batch(epoch, *given)
        real = torch.ones_like(batch.y, dtype=torch.bool) if batch.real is None else batch.real
        batches.append((epoch.store, batch.y[real].tolist(), batch.counts))
        return batch

    monkeypatch.setattr(Epoch, "_batch", watched)
    return batches


@methods
def test_a_round_sees_samples_of_its_task_and_is_judged_on_all_classes_so_far(method, seen):
    parts = build_tiny(*method, *EACH)
    state, feed = initial_state(parts), parts.federation.clients.trainer.feed
    for round_ in range(4):
        seen.clear()
        state, _, _ = run_round(parts.federation, state, evaluate=True, stop=False)
        trained = [(set(y), held) for store, y, held in seen if store is feed._train]
        judged = [c for store, y, _ in seen for c in y if store is feed._test]
        assert trained and set.union(*(y for y, _ in trained)) == {round_}
        assert set(judged) == set(range(round_ + 1))
        rows = {tuple(row) for _, held in trained for row in held.tolist()}
        assert rows <= {tuple(row) for row in counts() * (np.arange(4) == round_)}


def test_every_sample_of_the_task_is_used_once_an_epoch(seen):
    parts = build_tiny("algorithm=fedavg", *PAIRS, "participation=1.0")
    state = initial_state(parts)
    for round_ in range(4):
        seen.clear()
        state, row, _ = run_round(parts.federation, state, evaluate=False, stop=False)
        present = [0, 1] if round_ < 2 else [2, 3]
        assert row["clients"] == np.count_nonzero(counts()[:, present].sum(1))
        found = Counter(c for _, y, _ in seen for c in y)
        assert found == {c: 3 * counts()[:, c].sum() for c in present}


def test_the_inputs_are_not_copied():
    federation = build_tiny(*EACH).federation
    for part in federation.cohorts.tasks:
        assert part.trainer.feed is not federation.clients.trainer.feed
        assert part.trainer.feed._train is federation.clients.trainer.feed._train
        assert part.trainer.feed._test is federation.clients.trainer.feed._test


# Who takes part


@pytest.mark.parametrize("participation", [0.3, 0.6, 1.0])
def test_the_cohort_is_drawn_among_those_who_hold_the_task(participation):
    federation = build_tiny(f"participation={participation}", *EACH).federation
    for round_ in range(8):
        able = set(np.flatnonzero(counts()[:, min(round_, 3)]).tolist())
        chosen = federation.cohorts.sample(round_).members
        assert chosen <= able and len(chosen) == max(1, int(participation * len(able) + 1e-9))
        cohort = federation.cohorts.sample(round_)
        assert cohort.clients is federation.cohorts.clients(round_) and cohort.round == round_
    assert len({federation.cohorts.sample(round_).members for round_ in range(3, 20)}) > (
        participation < 1
    )


@methods
def test_clients_without_data_of_the_task_keep_their_variables(method):
    federation, moments = (
        build_tiny(*method, "participation=1.0", *EACH).federation,
        run_rounds(*method, "participation=1.0", *EACH)[0],
    )
    for round_ in range(4):
        without = np.flatnonzero(counts()[:, round_] == 0).tolist()
        assert moments[round_ + 1].row["clients"] == 7 - len(without)
        assert np.isnan(moments[round_ + 1].clients["accuracy_trained"][without]).all()
        for number, client_type in enumerate(federation.clients.types):
            ids = [client for client in range(7) if federation.clients.type_of[client] == number]
            still = [row for row, client in enumerate(ids) if client in without]
            for leaf in (client_type.prefix + name for name in client_type.initial.personal):
                before, after = (moments[at].personal[leaf][still] for at in (round_, round_ + 1))
                assert torch.equal(before, after), leaf


def test_the_mean_weighs_clients_by_their_samples_of_the_task():
    settings = ("algorithm=fedavg", "participation=1.0", *EACH)
    before, after = run_rounds(*settings)[0][2:4]
    federation, total = build_tiny(*settings).federation, {n: 0.0 for n in before.shared}
    clients = federation.cohorts.clients(2)
    for members in (
        stack
        for group in federation.placement.groups_of(0)
        for stack in federation.placement.split_into_stacks(
            (c for c in group if counts()[c, 2]), clients
        )
    ):
        for done in clients.trainer.train(members, before.shared, {}, 2) if members else ():
            share = counts()[done.client, 2] / counts()[:, 2].sum()
            total = {n: v + share * done.end.shared[n].double() for n, v in total.items()}
    assert_near({n: v.float() for n, v in total.items()}, after.shared)


def test_clients_without_data_of_the_task_do_not_count_as_absent_ones():
    uniform = ("algorithm=fedavg", "algorithm.weights=uniform", "participation=1.0", *EACH)
    stale, exclude = (
        run_rounds(*uniform, f"algorithm.absent={how}")[0] for how in ("stale", "exclude")
    )
    for a, b in zip(stale[1:], exclude[1:], strict=True):
        assert_near(a.shared, b.shared)


# What is judged


def test_accuracy_is_that_on_the_test_samples_of_the_classes_so_far():
    settings = ("algorithm=fedlora", *EACH)
    parts, moments = build_tiny(*settings), run_rounds(*settings)[0]
    data = load_data(parts.config, str(TINY))
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.mean, data.std))
    images, network = (data.test.x / 255 - mean) / std, parts.federation.clients.trainer.model
    for round_, moment in enumerate(moments[1:]):
        column, expected = moment.clients["accuracy_aggregated"], np.full(7, np.nan)
        for client, rows in enumerate(parts.split.test):
            rows = [row for row in rows if data.test.y[row] <= round_]
            if rows:
                own = Variables(moment.shared, {n: v[client] for n, v in moment.personal.items()})
                module = network.to_module(parts.config.algorithm.client_model(network, own))
                expected[client] = (
                    (module(images[rows]).argmax(1) == data.test.y[rows]).double().mean()
                )
        assert np.allclose(column, expected, rtol=1e-12, equal_nan=True)
        assert np.array_equal(np.isnan(moment.clients["loss"]), np.isnan(expected))
        judged = moment.clients["accuracy"][~np.isnan(expected)]
        assert moment.row["accuracy"] == pytest.approx(judged.mean())
        assert moment.row["accuracy_worst"] == judged.min()
    assert (
        np.isnan(moments[1].clients["accuracy"]).any()
        and not np.isnan(moments[-1].clients["accuracy"]).any()
    )


def test_what_is_tuned_before_an_evaluation_is_the_model_of_those_who_hold_the_task():
    tuned, plain = (
        run_rounds(f"algorithm={name}", *more, "participation=1.0", *EACH)[0]
        for name, more in (("fedavg_ft", ("algorithm.ft_epochs=3",)), ("fedavg", ()))
    )
    for round_ in range(4):
        a, b = tuned[round_ + 1].clients["loss"], plain[round_ + 1].clients["loss"]
        there, holds = ~np.isnan(b), counts()[:, round_] > 0
        np.testing.assert_allclose(a[there & ~holds], b[there & ~holds], rtol=1e-6)
        assert (np.abs(a - b)[there & holds] > 1e-4).all()


def test_who_holds_no_sample_holds_none_out_and_uses_none():
    algorithm = build_tiny(*METHODS["fedapen"]).config.algorithm
    assert algorithm.held_out > 0
    assert [used_samples(algorithm, Phase(1, (), held_out=held), 0) for held in (True, False)] == [
        0,
        0,
    ]


# What it leaves alone


@each_method("fedlora")
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=thorough), 3])
def test_the_spread_over_ranks_moves_no_bit(method, ranks):
    alone = run_rounds(*method, *EACH)[0]
    for moments in run_rounds(*method, *EACH, ranks=ranks):
        assert all(snapshots_equal(a, b) for a, b in zip(alone[1:], moments[1:], strict=True))


@pytest.mark.parametrize("done", [1, 2, pytest.param(3, marks=thorough)])
def test_a_resume_within_a_task_or_at_its_end_moves_no_bit(trained, copied, done):
    settings = (*METHODS["fedlora"], *PAIRS, "checkpoint.every=1", "checkpoint.keep=9")
    cut = copied(*settings)
    for later in range(done + 1, 5):
        shutil.rmtree(cut / f"checkpoints/{later:06d}")
    assert resume(cut, [], Solo()) == 0
    assert_same_run(trained(*settings), cut)


@methods
def test_a_stack_equals_the_loop(method):
    stack, loop = (
        run_rounds(*method, *EACH, "rounds=3", f"engine.path={path}")[0]
        for path in ("stack", "loop")
    )
    for a, b in zip(stack[1:], loop[1:], strict=True):
        assert_near(a.shared, b.shared, atol=1e-4)
        assert_near(a.personal, b.personal, atol=1e-4)
        assert a.row["train_loss"] == pytest.approx(b.row["train_loss"], rel=1e-4)
        np.testing.assert_allclose(a.clients["loss"], b.clients["loss"], rtol=1e-3)


@each_method("fedlora")
def test_one_task_of_all_classes_is_none(method):
    plain, one = (
        run_rounds(*method, *more)[0]
        for more in ((), ("data.tasks.classes=4", "data.tasks.rounds=1"))
    )
    assert all(snapshots_equal(a, b) for a, b in zip(plain, one, strict=True))


def test_the_split_of_a_run_is_that_of_all_classes():
    assert build_tiny(*EACH).split.digest() == build_tiny().split.digest()
    assert (
        build_tiny(*EACH).federation.placement.groups == build_tiny().federation.placement.groups
        and build_tiny(*EACH).federation.placement.rank_of_group
        == build_tiny().federation.placement.rank_of_group
    )


def test_tasks_do_with_rotated_images_and_augmentation():
    settings = (
        "algorithm=fedavg_ft",
        "algorithm.ft_epochs=1",
        "data.shift=rotate",
        "data.augment=[crop, erase]",
    )
    stack, loop = (
        run_rounds(*settings, *EACH, f"engine.path={path}")[0] for path in ("stack", "loop")
    )
    for a, b in zip(stack[1:], loop[1:], strict=True):
        np.testing.assert_allclose(a.clients["loss"], b.clients["loss"], rtol=1e-3)


def test_flops_are_those_of_the_samples_of_the_task():
    federation, moments = (
        build_tiny("algorithm=fedlora", *EACH).federation,
        run_rounds("algorithm=fedlora", *EACH)[0],
    )
    flops = Flops(federation.clients.trainer, federation.clients.types[0].initial)
    for round_ in range(4):
        each = [
            flops.round_flops(int(counts()[c, round_]), round_)
            for c in federation.cohorts.sample(round_).members
        ]
        assert moments[round_ + 1].row["flops"] == sum(each) > 0


# The config


def test_a_config_without_tasks_is_what_it_was():
    assert "tasks" not in resolved_dict(tiny_config())["data"] and tiny_config().data.tasks is None
    assert tiny_config("data.tasks=null") == tiny_config()
    assert digest(tiny_config()) == "d2c2be1703531baf519f776b692618ed"


def test_tasks_are_read_back_and_count_in_the_digest(tmp_path):
    config = tiny_config(*PAIRS)
    assert config.data.tasks == Tasks(2, 2)
    assert (flatten(config)["data.tasks.classes"], flatten(config)["data.tasks.rounds"]) == (2, 2)
    (tmp_path / "tiny.yaml").write_text(resolved_yaml(config))
    assert read(tmp_path / "tiny.yaml") == from_dict(resolved_dict(config), str(TINY)) == config
    assert len({digest(tiny_config(*tasks)) for tasks in ((), EACH, PAIRS)}) == 3


@pytest.mark.parametrize(
    "overrides, text",
    [
        (["data.tasks.classes=2"], "data.tasks.rounds: must be given"),
        (
            [*PAIRS, "data.tasks.classes=0"],
            "data.tasks.classes = 0: must be an integer of at least 1",
        ),
        (
            [*PAIRS, "data.tasks.rounds=0"],
            "data.tasks.rounds = 0: must be an integer of at least 1",
        ),
        (["data.tasks=2"], "data.tasks = 2: must be a block with classes, rounds or null"),
        (
            [*PAIRS, "data.tasks.round=3"],
            "data.tasks.round = 3: data.tasks has no such field; it has classes, rounds. Did you "
            "mean rounds?",
        ),
        (
            [*PAIRS, "data.shift=labels"],
            "data.shift = labels: would make a task other classes for every client; choose none "
            "or rotate",
        ),
    ],
)
def test_impossible_tasks_are_refused(overrides, text):
    with pytest.raises(ConfigError) as error:
        read(TINY, overrides)
    assert str(error.value) == f"command line: {text}"


ALONE = "data.partition={kind: pathological, clients: 1, train: 20, test: 10"


@pytest.mark.parametrize(
    "overrides, text",
    [
        (["data.tasks.classes=5"], "data.tasks.classes = 5: the data set has 4 classes"),
        (
            ["data.tasks.classes=3", f"{ALONE}, seed: 7}}"],  # classes 1 and 2
            "data.tasks.classes = 3: no client holds a training sample of task 1 (class 3); "
            "choose more classes or another partition",
        ),
        (
            ["data.tasks.classes=2", f"{ALONE}, seed: 4}}"],  # classes 0 and 1
            "data.tasks.classes = 2: no client holds a training sample of task 1 (classes 2 to "
            "3); choose more classes or another partition",
        ),
    ],
)
def test_tasks_that_do_not_fit_the_data_are_refused(overrides, text):
    config = read(TINY, [*overrides, "data.tasks.rounds=1"])
    with pytest.raises(Refusal) as error:
        build(config, str(TINY), Solo())
    assert str(error.value) == f"{TINY}: {text}"


def test_a_plan_is_for_the_first_task():
    lines = {
        line.split()[0]: line for line in plan(tiny_config(*EACH), Path(TINY).name, 2).splitlines()
    }
    assert (
        f"{len(build_tiny(*EACH).federation.cohorts.sample(0).members)} of 7 clients"
        in lines["round"]
        and "for 4 rounds" in lines["time"]
    )
