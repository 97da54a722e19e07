"""Clients with different networks: the same bits wherever they are, each its own leaves, one line
for each mistake.
"""

import re
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256

import h5py
import numpy as np
import pytest
import small
import torch
from runs import (
    TINY,
    assert_same_run,
    build_tiny,
    command_line,
    join_personal,
    mpirun_command,
    run_on_ranks,
    run_outcome,
    run_process,
    run_rounds,
    snapshots_equal,
    tiny_config,
    trees_equal,
)
from torch.utils.flop_counter import FlopCounterMode

from fedlora_mpi import open_run
from fedlora_mpi.algorithm import Phase, Step
from fedlora_mpi.algorithms.fedala import FedALA
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.algorithms.fedlora import FedLoRA
from fedlora_mpi.algorithms.fedpac import FedPAC
from fedlora_mpi.algorithms.perfedavg import PerFedAvg
from fedlora_mpi.algorithms.pfedlora import PFedLoRA
from fedlora_mpi.algorithms.pfedme import PFedMe
from fedlora_mpi.cli import main
from fedlora_mpi.config import (
    ModelBlock,
    Network,
    digest,
    from_dict,
    read,
    resolved_dict,
    resolved_yaml,
)
from fedlora_mpi.core.scheduling import assign_groups
from fedlora_mpi.data.feed import Feed
from fedlora_mpi.engine.flops import Flops
from fedlora_mpi.experiment.assembly import build
from fedlora_mpi.experiment.checkpointing import load_state, save_checkpoint
from fedlora_mpi.experiment.parts import load_data
from fedlora_mpi.federation.cohorts import group_clients
from fedlora_mpi.federation.round import run_round
from fedlora_mpi.models import zoo
from fedlora_mpi.plan import plan
from fedlora_mpi.store.reader import RunFiles
from fedlora_mpi.store.snapshot import Checkpoint, checkpoint_folder

CNN = "{name: cnn, width: 4, hidden: 8}"
NETWORKS = "user_parts:wide", CNN, "user_parts:normed"  # 8 features each; the last has BatchNorm
MIX = f"model={{mix: [{', '.join(NETWORKS)}]}}"
PFEDLORA = "algorithm=pfedlora", MIX
KIND_OF = tuple(client % 3 for client in range(7))
thorough = pytest.mark.thorough


# --- the same bits


@pytest.mark.parametrize(
    "how",
    [
        (),
        *(
            pytest.param((more,), marks=thorough)
            for more in ("engine.path=loop", "algorithm.adapter=side")
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=thorough), 3])
def test_a_mixed_federation_has_the_same_bits_on_any_number_of_ranks(how, ranks):
    alone = run_rounds(*PFEDLORA, *how)[0]
    for moments in run_rounds(*PFEDLORA, *how, ranks=ranks):
        assert len(moments) == 5 and all(
            snapshots_equal(a, b) for a, b in zip(alone, moments, strict=True)
        )
    assert alone[-1].personal["kind-0/4.weight"].shape == (3, 12, 64)  # clients 0, 3, 6
    assert alone[-1].personal["kind-2/1.running_mean"].shape == (2, 4)  # clients 2, 5
    assert not trees_equal(alone[0].shared, alone[-1].shared)


@pytest.fixture(scope="module")
def mixed(trained):
    """A finished run of four rounds with checkpoints of 2 and 4, made in this process."""
    return trained(*PFEDLORA)


@pytest.mark.parametrize(
    "ranks", [pytest.param(1, marks=thorough), 2, pytest.param(3, marks=thorough)]
)
def test_a_mixed_run_goes_on_from_a_checkpoint_on_another_number_of_ranks(mixed, ranks):
    def go_on(comm):
        parts = build(tiny_config(*PFEDLORA), str(TINY), comm)
        state = load_state(Checkpoint.read(checkpoint_folder(mixed, 2)), parts)
        for _ in range(2):
            state, _, _ = run_round(parts.federation, state, evaluate=True, stop=False)
        return parts.federation, state

    found = run_on_ranks(ranks, go_on)
    whole = run_rounds(*PFEDLORA)[0][-1]
    assert trees_equal(found[0][1].shared, whole.shared)
    assert trees_equal(
        join_personal(*zip(*((f, state.personal) for f, state in found), strict=True)),
        whole.personal,
    )


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=thorough), 3])
def test_a_checkpoint_of_a_mixed_run_has_one_digest_and_one_joined_file_on_any_number_of_ranks(
    mixed, ranks, tmp_path
):
    (tmp_path / "log.h5").write_bytes((mixed / "log.h5").read_bytes())

    def write(comm):
        parts = build(tiny_config(*PFEDLORA), str(TINY), comm)
        save_checkpoint(
            parts, tmp_path, load_state(Checkpoint.read(checkpoint_folder(mixed, 4)), parts)
        )

    run_on_ranks(ranks, write)
    one, other = (Checkpoint.read(checkpoint_folder(run, 4)) for run in (mixed, tmp_path))
    other.verify(build_tiny(*PFEDLORA).run_digest)
    assert one.digest() == other.digest()
    assert joined(one.path) == joined(other.path)


def joined(folder):
    """{name in personal.h5: bytes}."""
    found = {}
    with h5py.File(folder / "personal.h5", locking=False) as file:

        def keep(name, item):
            return isinstance(item, h5py.Dataset) and found.update({name: item[()].tobytes()})

        file.visititems(lambda name, item: keep(name, item) and None)
    return found


@thorough
def test_under_mpirun_and_after_a_resume_in_one_process_there_are_the_bits_of_one_process(
    mixed, tmp_path
):
    line = command_line("run", TINY, *PFEDLORA, "rounds=2", "output=run")
    ended = run_process([*mpirun_command(3), *line], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert main(["resume", str(tmp_path / "run"), "rounds=4"]) == 0
    assert_same_run(mixed, tmp_path / "run")


# --- checkpoints


def test_every_worker_has_a_file_for_every_kind_of_network_that_it_hosts(mixed):
    folder = checkpoint_folder(mixed, 4)
    assert sorted(f.name for f in folder.glob("worker-*")) == [
        "worker-0000-1.h5",
        "worker-0000-2.h5",
        "worker-0000.h5",
    ]
    with h5py.File(folder / "worker-0000-1.h5", locking=False) as file:
        assert file["client_id"][()].tolist() == [1, 4] and file["personal/9.weight"].shape == (
            2,
            4,
            8,
        )


def test_the_joined_file_has_a_group_for_every_kind_with_the_clients_of_its_rows(mixed):
    with h5py.File(checkpoint_folder(mixed, 4) / "personal.h5", locking=False) as file:
        assert sorted(file) == ["kind-0", "kind-1", "kind-2"]
        for kind in range(3):
            group = file[f"kind-{kind}"]
            clients = group["client_id"][()].tolist()
            assert clients == [client for client in range(7) if KIND_OF[client] == kind]
            for row, client in enumerate(clients):
                mine = open_run(mixed).client(client).personal
                assert set(mine) == set(group["personal"])
                assert all(np.array_equal(mine[n], group["personal"][n][row]) for n in mine)


def test_every_client_of_a_mixed_run_has_its_own_network_and_the_accuracy_that_was_logged(mixed):
    run = open_run(mixed)
    config = from_dict(run.config, "log")
    data, device = load_data(config, "log"), torch.device("cpu")
    feed = Feed(data, run.partition, seed=config.seed, shift="none", device=device, augment=False)
    logged = run.array("clients/accuracy")[-1]
    assert run.network_of == KIND_OF
    for client in range(7):
        view, first = (
            run.client(client),
            build_tiny(*PFEDLORA).federation.clients[client].initial,
        )
        assert {n: v.shape for n, v in view.personal.items()} == {
            n: v.shape for n, v in first.personal.items()
        }
        assert {n: v.shape for n, v in view.weights.items()} == {
            n: v.shape for n, v in view.network.initial.items()
        }
        batch = feed.test_batch([client], 0, feed.test_size(client))
        with torch.no_grad():
            right = view.model(batch.x[0]).argmax(1) == batch.y[0]
        assert np.float32(right.double().mean()) == logged[client]


def test_leaves_of_several_kinds_are_read_together_where_all_have_them(mixed):
    found = open_run(mixed).checkpoint
    assert found.leaf_names([0, 3]) == list(open_run(mixed).client(3).personal)
    assert found.leaf_names() == ["0.weight", "0.bias"]  # three first convolutions of one shape
    assert found.leaf_names([1, 2]) == ["0.weight", "0.bias"]
    rows = found.personal([5, 0, 1])["0.weight"]
    assert all(
        np.array_equal(row, open_run(mixed).client(c).personal["0.weight"])
        for row, c in zip(rows, (5, 0, 1), strict=True)
    )
    with pytest.raises(ValueError, match=r"holds no client or leaf '4\.weight'"):
        found.personal([0, 1], ["4.weight"])


@pytest.mark.parametrize("more", [(), ("algorithm=fedavg",), ("algorithm=local",)], ids=str)
def test_the_digest_of_a_run_with_one_network_is_that_of_its_leaves_by_name_over_all_clients(
    more, trained
):
    run = trained(*more)
    folder, hashes = checkpoint_folder(run, 4), {"shared": sha256(), "personal": sha256()}
    for name, file in (("shared", "server.h5"), ("personal", "personal.h5")):
        with h5py.File(folder / file, locking=False) as opened:
            for leaf, dataset in sorted(opened[name].items()):
                value = dataset[()]
                hashes[name].update(
                    f"{leaf}\0{value.dtype.str}\0{value.shape}\0".encode() + value.tobytes()
                )
    assert open_run(run).digest() == {name: h.hexdigest() for name, h in hashes.items()}
    assert run_outcome(run)["round"] == 4


# --- configs


@pytest.fixture
def refusal(tmp_path):
    """The one line about tiny.yaml with another model block and these overrides."""

    def of(block: str, *overrides: str) -> str:
        lines = [
            f"model: {block}" if line.startswith("model:") else line
            for line in TINY.read_text().splitlines()
        ]
        (tmp_path / "x.yaml").write_text("\n".join(lines))
        with pytest.raises(ValueError) as error:
            read(tmp_path / "x.yaml", overrides)
        text = str(error.value)
        assert "\n" not in text
        return text.replace(str(tmp_path), "")

    return of


TWO = "[cnn, user_parts:wide]"


@pytest.mark.parametrize(
    "block, said",
    [
        ("{mix: []}", "/x.yaml: model.mix = []: must name at least one network"),
        (
            "{mix: cnn}",
            "/x.yaml: model.mix = cnn: must be a list of networks, each a name or a block with a "
            "name",
        ),
        (
            f"{{mix: {TWO}, clients: [3, 5]}}",
            "/x.yaml: model.clients = [3, 5]: is for 8 clients, data.partition.clients is 7; make "
            "the two agree",
        ),
        (
            f"{{mix: {TWO}, each: [0, 1, 0]}}",
            "/x.yaml: model.each = [0, 1, 0]: is for 3 clients, data.partition.clients is 7; make "
            "the two agree",
        ),
        (
            f"{{mix: {TWO}, each: []}}",
            "/x.yaml: model.each = []: is for 0 clients, data.partition.clients is 7; make the "
            "two agree",
        ),
        (
            f"{{mix: {TWO}, clients: [7]}}",
            "/x.yaml: model.clients = [7]: must be 2 integers of at least 1",
        ),
        (
            f"{{mix: {TWO}, clients: [7, 0]}}",
            "/x.yaml: model.clients = [7, 0]: must be 2 integers of at least 1",
        ),
        (
            f"{{mix: {TWO}, clients: 7}}",
            "/x.yaml: model.clients = 7: must be a list, each item an integer or null",
        ),
        (
            f"{{mix: {TWO}, each: [0, 1, 2, 0, 1, 0, 1]}}",
            "/x.yaml: model.each = [0, 1, 2, 0, 1, 0, 1]: each item must be from 0 to 1",
        ),
        (
            f"{{mix: {TWO}, each: [0, 1, -1, 0, 1, 0, 1]}}",
            "/x.yaml: model.each = [0, 1, -1, 0, 1, 0, 1]: each item must be from 0 to 1",
        ),
        (
            f"{{mix: {TWO}, clients: [3, 4], each: [0, 0, 0, 1, 1, 1, 1]}}",
            "/x.yaml: model.each = [0, 0, 0, 1, 1, 1, 1]: give either clients or each",
        ),
        ("{mix: [cnn, cnn6]}", "/x.yaml: model.mix[1] = cnn6: must be resnet8,"),
        ("{mix: [cnn, {name: cnn6}]}", "/x.yaml: model.mix[1].name = cnn6: must be resnet8,"),
        ("{mix: [cnn, {width: 3}]}", "/x.yaml: model.mix[1].name: must be given: resnet8,"),
        (
            "{mix: [cnn, {name: cnn, widht: 3}]}",
            "/x.yaml: model.mix[1].widht = 3: cnn has no such field; it has width",
        ),
        ("{mix: [cnn, 3]}", "/x.yaml: model.mix[1] = 3: must be resnet8,"),
        (
            "{mix: [cnn], name: cnn}",
            "/x.yaml: model.name = cnn: a mix of networks has no such field; it has mix,",
        ),
        (
            "{mix: [cnn], width: 3}",
            "/x.yaml: model.width = 3: a mix of networks has no such field; it has mix,",
        ),
        (
            "{name: cnn, clients: [7]}",
            "/x.yaml: model.clients = [7]: cnn has no such field; it has width, hidden",
        ),
    ],
)
def test_a_mistake_in_a_mix_is_one_line_with_file_key_value_and_way_out(refusal, block, said):
    assert refusal(block).startswith(said)


def test_a_mistake_on_the_command_line_is_said_to_be_there(refusal):
    assert refusal(f"{{mix: {TWO}}}", "model.clients=[1, 1]").startswith(
        "command line: model.clients = [1, 1]: is for 2"
    )
    assert refusal("cnn", "model={mix: [cnn, cnm]}").startswith(
        "command line: model.mix[1] = cnm: must be"
    )


def test_a_network_on_the_command_line_replaces_a_mix_and_a_mix_a_network(tmp_path):
    text = TINY.read_text().replace(
        "{name: cnn, width: 4, hidden: 8}", f"{{mix: {TWO}, clients: [3, 4]}}"
    )
    (tmp_path / "x.yaml").write_text(text)

    def model(*overrides):
        return read(tmp_path / "x.yaml", overrides).model

    one = ModelBlock((Network("cnn", {"width": 16, "hidden": 64}),))
    assert model().clients == (3, 4) and model().network_of_clients(7) == (0, 0, 0, 1, 1, 1, 1)
    assert model("model=cnn") == model("model.name=cnn") == one
    assert model("model.width=5", "model.name=cnn").mix[0].options == {"width": 5, "hidden": 64}
    assert model("model.mix=[cnn]") == one  # and the counts, which were for two networks, are gone
    assert model("model.clients=[4, 3]").network_of_clients(7) == (0, 0, 0, 0, 1, 1, 1)
    mix = f"model={{mix: {TWO}}}"
    assert (
        tiny_config(mix).model.network_of_clients(5) == (0, 1, 0, 1, 0)
        and len(tiny_config(mix).model.mix) == 2
    )
    assert tiny_config(f"model.mix={TWO}") == tiny_config(mix)
    assert tiny_config(
        f"model.mix={TWO}", "model.each=[1, 1, 0, 0, 0, 0, 0]"
    ).model.network_of_clients(7) == (
        1,
        1,
        0,
        0,
        0,
        0,
        0,
    )


@pytest.mark.parametrize(
    "model",
    [
        MIX,
        f"model={{mix: {TWO}, clients: [3, 4]}}",
        f"model={{mix: {TWO}, each: [0, 1, 1, 0, 1, 1, 1]}}",
        "model={mix: [cnn]}",
        "model={mix: [cnn], clients: [7]}",
        "model={mix: [cnn], each: [0, 0, 0, 0, 0, 0, 0]}",
    ],
)
def test_a_mix_that_is_written_out_reads_equal(model, tmp_path):
    config = tiny_config(model)
    path = tmp_path / "tiny.yaml"
    path.write_text(resolved_yaml(config))
    assert read(path) == from_dict(resolved_dict(config), "x") == config
    assert digest(read(path)) == digest(config) != digest(tiny_config())


# --- which methods, and equal networks


@pytest.mark.parametrize(
    "algorithm, said",
    [
        ("fedavg",
            "name = fedavg: shares 0.weight, which networks cnn and user_parts:wide have in "
            "different shapes ([3, 1, 3, 3] and [4, 1, 3, 3]); for a mix"),
        ("fedamp",
            "name = fedamp: mixes cloud.0.weight, which networks cnn and user_parts:wide have in "
            "different shapes"),
        ("pfedlora",
            "name = pfedlora: shares adapter.A, which networks cnn and user_parts:wide have in "
            "different shapes ([8, 5] and [8, 8])"),
    ],
)  # fmt: skip
def test_what_networks_do_not_have_in_common_cannot_be_shared_or_mixed(
    algorithm, said, tmp_path, capsys
):
    mix = "model={mix: [{name: cnn, width: 3, hidden: 5}, user_parts:wide]}"
    assert (
        main(["run", str(TINY), f"algorithm={algorithm}", mix, f"output={tmp_path / 'run'}"]) == 2
    )
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and not (tmp_path / "run").exists()
    assert f"{TINY}: algorithm." in err and said in err


def test_networks_that_differ_in_names_alone_are_named(capsys):
    assert (
        main(
            ["plan", str(TINY), "algorithm=fedavg", f"model={{mix: [{CNN}, user_parts:with_norm]}}"]
        )
        == 2
    )
    assert (
        "shares 0.weight, which networks cnn and user_parts:with_norm have in different shapes "
        "([4, 1, 3, 3] and none)" in (capsys.readouterr().err)
    )


@pytest.mark.parametrize(
    "algorithm",
    [
        "fedlora",
        "fedamp",
        *(pytest.param(name, marks=thorough) for name in ("fedavg", "pfedlora", "local")),
    ],
)
def test_equal_networks_in_a_mix_are_one_network(algorithm):
    how = f"algorithm={algorithm}", "engine.path=loop"
    plain, mix = run_rounds(*how)[0], run_rounds(*how, f"model={{mix: [{CNN}, {CNN}]}}", ranks=2)[0]
    for a, b in zip(plain, mix, strict=True):
        assert trees_equal(a.shared, b.shared)
        for name, rows in a.personal.items():
            assert torch.equal(rows[0::2], b.personal[f"kind-0/{name}"])
            assert torch.equal(rows[1::2], b.personal[f"kind-1/{name}"])
        assert {
            n: v for n, v in a.row.items() if n[:7] not in ("seconds", "bytes_m", "nan_cli")
        } == pytest.approx(
            {n: v for n, v in b.row.items() if n[:7] not in ("seconds", "bytes_m", "nan_cli")},
            nan_ok=True,
        )
        assert all(np.array_equal(a.clients[n], b.clients[n], equal_nan=True) for n in a.clients)


def test_a_network_of_the_mix_that_no_client_has_changes_nothing():
    each = f"model={{mix: [{CNN}, user_parts:normed], each: [0, 0, 0, 0, 0, 0, 0]}}"
    plain, mix = (
        run_rounds("algorithm=pfedlora")[0],
        run_rounds("algorithm=pfedlora", each, ranks=2)[0],
    )
    assert trees_equal(plain[-1].shared, mix[-1].shared)
    assert trees_equal(plain[-1].personal, mix[-1].personal)
    assert "7 clients" in plan(
        tiny_config("algorithm=pfedlora", each, "train.epochs=1"), str(TINY), 2
    )


# --- placement


def test_groups_never_mix_networks_and_hold_every_client_once():
    sizes, kind_of = [5, 9, 2, 7, 7, 3, 8, 1], [1, 0, 1, 0, 1, 1, 0, 2]
    made = group_clients(sizes, 2, kind_of)
    assert made == ((1, 6), (3,), (4, 0), (5, 2), (7,))
    assert sorted(c for group in made for c in group) == list(range(8))
    assert group_clients(sizes, 3, [0] * 8) == group_clients(sizes, 3)


def test_groups_are_placed_by_the_flops_of_their_networks():
    federation = build_tiny(*PFEDLORA).federation
    flops = [t.trainer.model.flops for t in federation.clients.types]
    assert len(set(flops)) == 3
    for group, cost in zip(federation.placement.groups, federation.placement.costs, strict=True):
        assert len({KIND_OF[c] for c in group}) == 1
        assert cost == sum(federation.clients.sizes[c] * flops[KIND_OF[c]] for c in group)
    hosts = assign_groups(federation.placement.costs, [1, 2])
    load = Counter(
        {
            w: sum(c for c, h in zip(federation.placement.costs, hosts, strict=True) if h == w)
            for w in (1, 2)
        }
    )
    most, least = (load[w] for w in sorted(load, key=load.get, reverse=True))
    assert most - least <= max(federation.placement.costs)


# --- FLOPs


def counted(made, client, round_):
    """FLOPs of a client's local training, as torch's counter sees them happen."""
    start = small.initial_variables(made)
    rows = small.repeat_rows(start.personal, 1)
    with FlopCounterMode(display=False) as counter:
        list(made.train([client], start.shared, rows, round_))
    return counter.get_total_flops()


METHODS = [
    FedAvg(),
    FedLoRA(lora_epochs=2),
    PFedLoRA(adapter_epochs=2),
    PFedLoRA(adapter="conv", lora_rank=2),
    PFedLoRA(adapter="side", lora_rank=3),
    FedALA(p=2, start_epochs=4),
    PerFedAvg(),
    PerFedAvg(variant="hf"),
    PFedMe(lam=3.0, inner_steps=2),
    FedPAC(),
]
NAMES = [f"{method.__class__.__name__}-{number}" for number, method in enumerate(METHODS)]


@pytest.mark.parametrize(
    "network, sizes", [("cnn", (11, 2)), pytest.param("bn_net", small.SIZES, marks=thorough)]
)
@pytest.mark.parametrize("algorithm", METHODS, ids=NAMES)
def test_flops_are_those_that_happen(algorithm, network, sizes):
    made = small.make_trainer(algorithm, network)
    flops = Flops(made, small.initial_variables(made))
    # in batches of 5
    for client, size in ((c, s) for c, s in enumerate(small.SIZES) if s in sizes):
        for round_ in (0, 1):
            assert flops.round_flops(size, round_) == counted(made, client, round_), (
                f"{size} samples, round {round_}"
            )


def test_every_count_of_flops_is_a_sign_of_life():
    made, beats = small.make_trainer(FedAvg()), []
    flops = Flops(made, small.initial_variables(made), lambda: beats.append(1))
    flops.round_flops(7, 0)
    assert len(beats) == len(flops._counts) > 2
    flops.round_flops(7, 1)
    assert len(beats) == len(flops._counts)


@dataclass(frozen=True)
class Changes(FedAvg):
    """Trains the head alone in round 1, then everything."""

    def local(self, model, train, round_):
        loss = self.loss(model)
        return (
            Phase(train.epochs, (Step(loss, lambda n: round_ > 0 or model.role(n) == "head"),)),
        )


def test_flops_of_a_phase_that_changes_with_the_round():
    made = small.make_trainer(Changes())
    flops = Flops(made, small.initial_variables(made))
    found = [flops.round_flops(7, round_) for round_ in (0, 1, 2, 0)]
    assert (
        found == [counted(made, 1, round_) for round_ in (0, 1, 2, 0)]
        and found[0] < found[1] == found[2]
    )


def test_a_row_has_the_flops_of_the_cohort_whatever_the_ranks():
    federation = build_tiny(*PFEDLORA).federation
    flops = [Flops(t.trainer, t.local_initial) for t in federation.clients.types]
    rows = [m.row for m in run_rounds(*PFEDLORA)[0][1:]]
    for round_, row in enumerate(rows):
        each = [
            flops[KIND_OF[c]].round_flops(federation.clients.sizes[c], round_)
            for c in federation.cohorts.sample(round_).members
        ]
        assert row["flops"] == sum(each) > 0
    assert [m.row["flops"] for m in run_rounds(*PFEDLORA, ranks=3)[2][1:]] == [
        row["flops"] for row in rows
    ]


def test_the_flops_of_a_run_are_in_its_log(mixed):
    assert RunFiles(mixed).rounds()["flops"].tolist() == [
        m.row["flops"] for m in run_rounds(*PFEDLORA)[0][1:]
    ]


# Yi et al.: parameters for 10 and for 100 classes, million multiply-adds of a forward pass
TABLE = {
    "cnn1": (2_621_558, 2_666_648, 4.826),
    "cnn2": (1_815_142, 1_860_232, 3.386),
    "cnn3": (1_320_558, 1_365_648, 3.526),
    "cnn4": (1_060_358, 1_105_448, 3.266),
    "cnn5": (670_058, 715_148, 2.876),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_five_networks_have_the_published_sizes(name):
    ten, hundred, mmac = TABLE[name]
    for classes, parameters in ((10, ten), (100, hundred)):
        model = zoo.build(name, {}, classes, (3, 32, 32), 1)
        assert sum(v.numel() for v in model.initial.values()) == parameters
        assert model.leaves[f"{model.head}.weight"].shape == (classes, 500)
        if classes == 10:
            assert round(model.flops / 2e6, 3) == mmac
    assert f"{ten:,}" in zoo.BUILDERS[name].__doc__


def test_the_five_networks_say_which_images_are_too_small():
    with pytest.raises(
        ValueError, match="name = cnn1: cannot be built: .* at least 16 x 16 pixels"
    ):
        zoo.build("cnn1", {}, 10, (1, 8, 8), 1)
    assert zoo.build("cnn5", {}, 10, (1, 16, 17), 1).shape == (1, 16, 17)


def test_plan_has_a_line_for_every_network(capsys):
    assert main(["plan", str(TINY), *PFEDLORA, "train.epochs=1", "--ranks", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    models = [line for line in lines if line.startswith("  model ")]
    assert [
        re.sub(r", [\d.]+ MFLOP forward per sample", "", line.split(None, 1)[1]) for line in models
    ] == [
        "user_parts:wide: 960 parameters, 0 running statistics; 3 clients",
        "cnn: 636 parameters, 0 running statistics; 2 clients",
        "user_parts:normed: 604 parameters, 8 running statistics; 2 clients",
    ]
    text = "\n".join(lines)
    assert "96 numbers; " in text  # 8 (8 + 4) of the adapter
    assert "612 to 960 numbers per client" in text
