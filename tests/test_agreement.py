"""Ranks that have built different things do not begin, in one line; nor does a run go on with other
data or weights.
"""

import itertools
import json
import os
import random
import sys
import threading
from dataclasses import dataclass

import h5py
import numpy as np
import pytest
import torch
from runs import (
    TESTS,
    TINY,
    command_line,
    mpirun_command,
    package_lines,
    run_on_ranks,
    run_process,
    tiny_config,
)
from torch import nn

from fedlora_mpi.algorithm import Algorithm, Variables
from fedlora_mpi.cli import main
from fedlora_mpi.data.samples import Samples
from fedlora_mpi.experiment import agreement, parts
from fedlora_mpi.experiment import fingerprint as inventory
from fedlora_mpi.experiment import output as folder
from fedlora_mpi.experiment.assembly import build as build_run
from fedlora_mpi.mpi.comm import Solo
from fedlora_mpi.mpi.ending import Refusal, collectively
from fedlora_mpi.store import seal, sight
from fedlora_mpi.store.log import read_inventory

# of this process; a builder that looks at it gives each rank another network
TURN = itertools.count()
ODD = threading.local()  # ``ODD.rank`` of the thread that plays a rank


def flat(classes, shape, hidden=8):
    """Two Linears."""
    side = shape[0] * shape[1] * shape[2]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(side, hidden), nn.ReLU(), nn.Linear(hidden, classes)
    )


def unseeded(classes, shape):
    """Weights of a generator that the system seeds."""
    module = flat(classes, shape)
    own = np.random.default_rng()
    module[3].weight = nn.Parameter(
        torch.from_numpy(own.normal(size=module[3].weight.shape)).float()
    )
    return module


def unseeded_body(classes, shape):
    """The same, with a second Linear, the head."""
    return nn.Sequential(unseeded(5, shape), nn.ReLU(), nn.Linear(5, classes))


def unseeded_and_frozen(classes, shape):
    module = unseeded_body(classes, shape)
    module[0][3].weight.requires_grad_(False)
    return module


def from_global(classes, shape):
    """Weights of the global generators of numpy and Python."""
    module = flat(classes, shape)
    module[3].weight = nn.Parameter(
        torch.from_numpy(np.random.randn(*module[3].weight.shape)).float()
    )
    module[3].bias = nn.Parameter(torch.tensor([random.random() for _ in range(classes)]))
    return module


def wider(classes, shape):
    """Another width on each rank."""
    return flat(classes, shape, 8 + next(TURN))


def more(classes, shape):
    """Another number of leaves on each rank."""
    return nn.Sequential(
        flat(classes, shape), *(nn.Linear(classes, classes) for _ in range(next(TURN) % 2))
    )


class Named(nn.Module):
    """Linears side by side, registered in the order given."""

    def __init__(self, names, side, classes):
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(side, classes) for name in names})

    def forward(self, x):
        return sum(part(x.flatten(1)) for part in self.parts.values())


def of_a_set(classes, shape):
    """Modules in another order on each rank, as from a set of texts."""
    names = ["left", "right", "top"] if next(TURN) % 2 else ["top", "left", "right"]
    return Named(names, shape[0] * shape[1] * shape[2], classes)


def counted(classes, shape):
    """An integer buffer of another value on each rank."""
    module = flat(classes, shape)
    module.register_buffer("offset", torch.tensor([3 + next(TURN)]))
    return module


def doubled(classes, shape):
    """Another type of number on each rank."""
    module = flat(classes, shape)
    module.register_buffer(
        "shift", torch.zeros(3, dtype=torch.int32 if next(TURN) % 2 else torch.int64)
    )
    return module


@dataclass(frozen=True)
class Drawing(Algorithm):
    """Begins with numbers from the system."""

    def init(self, model, rng):
        own = torch.from_numpy(np.random.default_rng().normal(size=3)).float()
        return Variables(dict(model.initial), {"gate": own})


def refused(*overrides, ranks=3):
    """The line with which a run on so many ranks is refused, the same on all; nothing but the
    set-up is tried.
    """
    lines = []

    def play(comm):
        ODD.rank = comm.rank
        try:
            build_run(tiny_config(*overrides), str(TINY), comm)
        except Refusal as error:
            lines.append(str(error))

    run_on_ranks(ranks, play)
    assert len(lines) == ranks and len({*lines}) == 1, lines
    assert "\n" not in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    "overrides, text",
    [
        (
            ["model=test_agreement:unseeded"],
            "initial weights of 3.weight: not the same as on rank 0",
        ),
        (["model=test_agreement:wider"], ", 64] float32 body, on rank 0 ["),
        (["model=test_agreement:more"], "there, but "),
        (["model=test_agreement:of_a_set"], "registered in another order"),
        (["model=test_agreement:counted"], "constant offset: not the same as on rank 0"),
        (["model=test_agreement:doubled"], "shift is [3] int"),
        (
            ["algorithm=test_agreement:Drawing"],
            "before round 1: personal gate: not the same as on rank 0",
        ),
    ],
)
def test_ranks_that_have_built_different_networks_are_refused(overrides, text, monkeypatch):
    monkeypatch.setattr("test_agreement.TURN", itertools.count())
    line = refused(*overrides)
    assert text in line and "rank" in line and line.startswith(f"{TINY}: rank"), line
    assert "generator of its own" in line


def global_states():
    """Where the global generators are."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_weights_of_the_global_generators_are_those_of_the_seed_and_move_none():
    federations = []
    for _ in range(2):
        before = global_states()
        federations.append(
            build_run(tiny_config("model=test_agreement:from_global"), str(TINY), Solo()).federation
        )
        assert global_states() == before
        random.random(), np.random.random()
    other = build_run(
        tiny_config("model=test_agreement:from_global", "seed=2"), str(TINY), Solo()
    ).federation
    one, two, three = (f.clients.trainer.model.initial for f in (*federations, other))
    for leaf in ("3.weight", "3.bias"):
        assert torch.equal(one[leaf], two[leaf]) and not torch.equal(one[leaf], three[leaf])
    run_on_ranks(
        3, lambda comm: build_run(tiny_config("model=test_agreement:from_global"), str(TINY), comm)
    )


def changed_on_rank_2(monkeypatch, change):
    """Rank 2 reads other data."""
    load = parts.load

    def other(*arguments):
        data = load(*arguments)
        return change(data) if ODD.rank == 2 else data

    monkeypatch.setattr(parts, "load", other)


def test_one_other_image_on_one_rank_is_refused_with_its_number(monkeypatch):
    def change(data):
        x = data.train.x.clone()
        x[37] = 255 - x[37]
        return data._replace(train=Samples(x, data.train.y))

    changed_on_rank_2(monkeypatch, change)
    line = refused()
    assert (
        "rank 2 (host " in line
        and "training samples: not the same as on rank 0 (the first is number 37" in line
    )
    assert "data.root = ~/data" in line


def test_another_label_and_a_missing_sample_are_told(monkeypatch):
    changed_on_rank_2(
        monkeypatch, lambda data: data._replace(test=Samples(data.test.x[:-1], data.test.y[:-1]))
    )
    assert "test samples: not the same as on rank 0 (the first is number 119" in refused()


def test_another_version_on_one_rank_is_refused(monkeypatch):
    found = inventory.build_inventory
    monkeypatch.setattr(
        agreement,
        "build_inventory",
        lambda *given: found(*given) | ({"package": {"fedlora_mpi": "0.0.1"}} if ODD.rank else {}),
    )
    line = refused()
    assert (
        "ranks 1, 2 (host" in line
        and "fedlora_mpi is 0.0.1, on rank 0" in line
        and "one version" in line
    )


def test_another_file_of_the_users_own_on_one_rank_is_refused(monkeypatch):
    monkeypatch.setattr(inventory, "module_source", lambda home: b"x" * ODD.rank)
    line = refused("model=test_agreement:from_global", "algorithm=test_agreement:Drawing")
    assert line  # the draws differ as well
    line = refused("model=test_agreement:from_global")
    assert "module test_agreement: not the same as on rank 0; give all nodes the same file" in line


def on_other_machines(monkeypatch, ranks):
    """These ranks have another CPU level, and weights that are off in their last bits."""
    here = inventory.local_platform()
    monkeypatch.setattr(
        inventory,
        "local_platform",
        lambda: here | ({"CPU level": "DEFAULT"} if ODD.rank in ranks else {}),
    )


def test_other_machines_are_told_of_and_take_the_first_weights_of_rank_0(monkeypatch, capsys):
    on_other_machines(monkeypatch, {1, 2})

    def play(comm):
        ODD.rank = comm.rank
        return build_run(
            tiny_config("model=test_agreement:unseeded", "algorithm=fedlora"), str(TINY), comm
        ).federation

    federations = run_on_ranks(3, play)
    for federation in federations[1:]:
        assert torch.equal(
            federation.clients.trainer.model.initial["3.weight"],
            federations[0].clients.trainer.model.initial["3.weight"],
        )
        for part in ("shared", "personal"):
            a, b = (getattr(f.clients.types[0].initial, part) for f in (federation, federations[0]))
            assert list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)
    level = torch.backends.cpu.get_cpu_capability()
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 1
        and "ranks 1, 2 (host" in lines[0]
        and "CPU level is DEFAULT (AVX512 on rank 0)".replace("AVX512", level) in lines[0]
    )
    assert "bits may differ" in lines[0]


@pytest.mark.parametrize(
    "network",
    [
        "test_agreement:unseeded_and_frozen",
        "{name: test_agreement:unseeded_body, quantization: nf4}",
    ],
)
def test_other_machines_take_the_frozen_weights_of_rank_0(network, monkeypatch):
    if "quantization" in network:
        pytest.importorskip("bitsandbytes")
    overrides = (f"model={network}", "algorithm=fedit")
    assert "0.3.weight: not the same as on rank 0" in refused(*overrides)
    on_other_machines(monkeypatch, {1, 2})

    def play(comm):
        ODD.rank = comm.rank
        return build_run(tiny_config(*overrides), str(TINY), comm).federation

    weights = [f.clients.trainer.model.constants["0.3.weight"] for f in run_on_ranks(3, play)]
    assert len({inventory.tensor_digest(w) for w in weights}) == 1
    assert len({type(w) for w in weights}) == 1


def test_a_rank_like_rank_0_is_not_excused_by_another_machine(monkeypatch, capsys):
    on_other_machines(monkeypatch, {1})
    assert "rank 2 (host" in refused("model=test_agreement:unseeded")


def test_of_several_ranks_that_refuse_the_lowest_speaks():
    def stage(rank):
        if rank:
            raise ValueError(f"said by rank {rank}")

    with pytest.raises(Refusal, match="said by rank 1"):
        run_on_ranks(3, lambda comm: collectively(comm, lambda: stage(comm.rank)))


def test_another_machine_excuses_no_other_sample(monkeypatch, capsys):
    on_other_machines(monkeypatch, {2})
    # as of data that are read from files
    monkeypatch.setattr(
        agreement, "platform_dependent_kinds", lambda config: inventory.PLATFORM_DEPENDENT
    )
    changed_on_rank_2(
        monkeypatch, lambda data: data._replace(train=Samples(data.train.x, data.train.y.flip(0)))
    )
    assert (
        "rank 2 (host" in (line := refused())
        and "training labels: not the same as on rank 0" in line
    )


def test_equal_ranks_say_nothing(capsys):
    first, *rest = run_on_ranks(3, lambda comm: build_run(tiny_config(), str(TINY), comm).inventory)
    assert all(found == first for found in rest) and list(first) == list(inventory.KINDS)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(3.0),
        torch.zeros(0, 5),
        torch.ones(3, 5, dtype=torch.bool),
        torch.ones(3, 5, dtype=torch.bfloat16),
        torch.ones(3, 5, dtype=torch.complex64),
        torch.arange(15).view(3, 5).T,
    ],
)
def test_a_tensor_has_the_digest_of_its_numbers_whatever_its_strides(value):
    assert inventory.tensor_digest(value) == inventory.tensor_digest(value.contiguous().clone())
    assert inventory.tensor_digest(value) != inventory.tensor_digest(value.to(torch.complex128))


def test_a_digest_in_pieces_is_that_of_the_whole(monkeypatch):
    value = torch.arange(35.0).view(7, 5)
    whole = inventory.tensor_digest(value)
    monkeypatch.setattr(inventory, "_BLOCK_BYTES", 40)
    assert inventory.tensor_digest(value) == whole != inventory.tensor_digest(value.flip(0))


# On a resume.


def picture_folder(home, other=None):
    """Images of two classes, 6 and 3 each; ``other``: the file that has another pixel."""
    from PIL import Image

    for side, number in (("train", 6), ("test", 3)):
        for label in ("cat", "dog"):
            (home / side / label).mkdir(parents=True, exist_ok=True)
            for n in range(number):
                pixels = np.random.RandomState(n + 10 * (label == "cat")).randint(
                    0, 256, (8, 8, 3), np.uint8
                )
                name = f"{side}/{label}/{n}.png"
                pixels[0, 0] += name == other
                Image.fromarray(pixels).save(home / name)
    return home


PICTURES = [
    "data.dataset=folder",
    "data.partition={kind: dirichlet_class, alpha: 100, clients: 2, minimum: 1}",
    "algorithm=fedavg",
    "rounds=1",
]


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A finished run on an image folder, and the folder; the working folder holds both."""
    monkeypatch.chdir(tmp_path)
    picture_folder(tmp_path / "data")
    assert main(["run", str(TINY), *PICTURES, "data.root=data", "output=out"]) == 0
    return tmp_path / "out"


@pytest.mark.parametrize("command", [["resume", "out", "rounds=2"], ["run", str(TINY), *PICTURES, "data.root=data", "rounds=2", "output=out", "--resume"]])  # fmt: skip
def test_images_replaced_between_run_and_resume_are_refused(pictures, command, capsys):
    picture_folder(pictures.parent / "data", "train/dog/3.png")
    before = sorted(pictures.rglob("*"))
    assert main(command) == 2
    (line,) = package_lines(capsys.readouterr().err)
    assert line.startswith(
        "fedlora-mpi: out: training samples: not the same as when the run began (log.h5); put back what was"
    )
    assert sorted(pictures.rglob("*")) == before
    picture_folder(pictures.parent / "data")
    assert main(command) == 0


def test_a_moved_but_equal_data_folder_goes_on(pictures):
    (pictures.parent / "data").rename(pictures.parent / "elsewhere")
    assert main(["resume", "out", "rounds=2", "data.root=elsewhere"]) == 0


def test_other_data_are_seen_where_the_log_is_lost(pictures, capsys):
    (pictures / "log.h5").unlink()
    picture_folder(pictures.parent / "data", "test/cat/0.png")
    assert main(["resume", "out", "rounds=2"]) == 2
    assert "test samples: not the same" in capsys.readouterr().err
    picture_folder(pictures.parent / "data")
    assert main(["resume", "out", "rounds=2"]) == 0


def test_shuffled_texts_with_the_same_labels_and_words_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("tokenizers")
    texts = [f"word{n % 3} word{n % 5} word{n % 7}" for n in range(24)]

    def write(order):
        (tmp_path / "csv").mkdir(exist_ok=True)
        rows = [f'{n % 2 + 1},"{texts[at]}"' for n, at in enumerate(order)]
        for name in ("train.csv", "test.csv"):
            (tmp_path / "csv" / name).write_text("\n".join(["label,text", *rows]) + "\n")

    write(range(24))
    options = [
        "data.dataset=csv",
        "data.root=csv",
        "data.partition={kind: dirichlet_class, alpha: 100, clients: 2, minimum: 1}",
        "rounds=1",
    ]
    options += [
        "model={name: transformer, width: 4, heads: 1, layers: 1, feedforward: 4}",
        "algorithm=fedavg",
    ]
    assert main(["run", str(TINY), *options, "output=out"]) == 0, capsys.readouterr().err
    write([*range(2, 24), 0, 1])
    assert main(["resume", "out", "rounds=2"]) == 2
    assert (
        "training samples: not the same as when the run began (log.h5)" in capsys.readouterr().err
    )


def test_a_network_of_other_first_weights_or_of_another_kind_is_refused_on_a_resume(
    tmp_path, monkeypatch, capsys
):
    for model, text in (("unseeded", "initial weights of 3.weight: not"), ("counted", "constant offset: not"),
                        ("wider", "1.weight is ["), ("of_a_set", "registered in another order")):  # fmt: skip
        monkeypatch.setattr("test_agreement.TURN", itertools.count())
        assert (
            main(
                [
                    "run",
                    str(TINY),
                    f"model=test_agreement:{model}",
                    "rounds=1",
                    f"output={tmp_path / model}",
                ]
            )
            == 0
        )
        capsys.readouterr()
        assert main(["resume", str(tmp_path / model), "rounds=2"]) == 2
        (line,) = package_lines(capsys.readouterr().err)
        assert text in line and "start anew with another output" in line


def without_inventory(log):
    """Make a log one of before there were inventories."""
    with h5py.File(log, "r+") as file:
        del file.attrs["inventory"]
        file.attrs[seal.HEAD_SEAL] = seal.head_checksum(file)


@pytest.mark.parametrize(
    "inventory_", [None, "no JSON", "[3]", '{"data": 3}', '{"data": {"x": 3}}', "[" * 100_000]
)
def test_a_folder_without_a_usable_inventory_goes_on(copied, inventory_):
    out = copied()
    without_inventory(out / "log.h5")
    for log in out.glob("checkpoints/*/log.h5"):
        log.unlink()
    if inventory_ is not None:
        with h5py.File(out / "log.h5", "r+") as file:
            file.attrs["inventory"] = inventory_
    assert read_inventory(out / "log.h5") == {}
    assert folder._recorded_inventory(out) == {}


def test_a_run_of_before_there_were_inventories_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "recorded_inventory", lambda found: {})
    assert main(["run", str(TINY), "rounds=1", f"output={tmp_path / 'out'}"]) == 0
    monkeypatch.undo()
    assert main(["resume", str(tmp_path / "out"), "rounds=2"]) == 0


def test_a_resume_on_another_machine_warns_in_one_line(copied, monkeypatch, capsys):
    out, here = copied(to="out"), inventory.local_platform()
    monkeypatch.setattr(inventory, "local_platform", lambda: here | {"CPU level": "OTHER"})
    assert main(["resume", str(out), "rounds=5"]) == 0
    (line,) = package_lines(capsys.readouterr().err)
    assert (
        f"out: CPU level is OTHER ({here['CPU level']} when the run began): from here on bits may "
        "differ" in line
    )


@pytest.mark.thorough
def test_a_resume_on_another_cpu_level_warns_in_one_line(tmp_path):
    assert main(["run", str(TINY), "rounds=1", f"output={tmp_path / 'out'}"]) == 0
    level = torch.backends.cpu.get_cpu_capability()
    if level == "DEFAULT":
        pytest.skip("this CPU has no other level")
    ended = run_process(
        command_line("resume", "out", "rounds=2"), tmp_path, ATEN_CPU_CAPABILITY="default"
    )
    assert ended.returncode == 0, ended.stderr
    (line,) = package_lines(ended.stderr)
    assert (
        f"out: CPU level is DEFAULT ({level} when the run began): from here on bits may differ"
        in line
    )


# A run folder that ranks do not share.


def test_a_folder_that_a_rank_does_not_see_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(sight, "VISIBILITY_TIMEOUT", 0.1)
    lines = []

    def play(comm):
        ODD.home = tmp_path / ("other" if comm.rank in (1, 2) else "home")
        try:
            folder.check_shared_folder(tmp_path / "home/runs/a", comm)
        except Refusal as error:
            lines.append(str(error))

    monkeypatch.setattr(
        folder,
        "wait_for_file",
        lambda path: sight.wait_for_file(ODD.home / path.relative_to(tmp_path / "home")),
    )
    (tmp_path / "home").mkdir()
    run_on_ranks(3, play)
    assert len({*lines}) == 1 and len(lines) == 3
    assert (
        "ranks 1, 2 (host" in lines[0]
        and f"does not see {tmp_path / 'home/runs'}" in lines[0]
        and "share" in lines[0]
    )
    assert [*tmp_path.rglob("*")] == [tmp_path / "home"]


def test_a_shared_folder_is_as_it_was_after_the_check(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/file").touch()
    run_on_ranks(3, lambda comm: folder.check_shared_folder(tmp_path / "run", comm))
    run_on_ranks(3, lambda comm: folder.check_shared_folder(tmp_path / "new", comm))
    assert {*tmp_path.rglob("*")} == {tmp_path / "run", tmp_path / "run/file"}


def test_a_file_that_shows_late_is_waited_for(tmp_path):
    threading.Timer(0.2, (tmp_path / "token").touch).start()
    assert sight.wait_for_file(tmp_path / "token")


def test_a_parent_that_cannot_be_made_is_one_line_on_all_ranks(tmp_path):
    (tmp_path / "file").touch()
    lines = []

    def play(comm):
        with pytest.raises(Refusal, match="cannot be created: .*; choose another") as error:
            folder.check_shared_folder(tmp_path / "file/run", comm)
        lines.append(str(error.value))

    run_on_ranks(2, play)
    assert len({*lines}) == 1


# Real ranks.


@pytest.mark.thorough
def test_real_ranks_that_differ_end_in_a_line_each_and_leave_no_folder(tmp_path):
    models = ("unseeded", "of_a_text_set", "wide_on_rank_1")
    runs = [["run", str(TINY), f"model=test_agreement:{name}", f"output={name}"] for name in models]
    line = [
        *mpirun_command(3),
        sys.executable,
        str(TESTS / "several.py"),
        "codes",
        json.dumps(runs),
    ]
    ended = run_process(line, tmp_path, OMPI_MCA_mpi_show_mca_params="")
    assert ended.returncode == 2, ended.stderr
    assert [json.loads((tmp_path / f"codes-{rank}").read_text()) for rank in range(3)] == [
        [2, 2, 2]
    ] * 3
    lines = package_lines(ended.stderr)
    assert len(lines) == 3 and "Traceback" not in ended.stderr
    assert "ranks 1, 2 (host" in lines[0] and "initial weights of 3.weight" in lines[0]
    assert "rank" in lines[1] and "generator of its own or goes through a set" in lines[1]
    assert (
        "rank 1 (host" in lines[2]
        and "1.weight is [16, 64] float32 body, on rank 0 [8, 64]" in lines[2]
    )
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"codes-{rank}" for rank in range(3)]


def of_a_text_set(classes, shape):
    """Modules in the order of a set of texts, which is another one in each process."""
    names = {f"part{n}" for n in range(20)}
    return Named(names, shape[0] * shape[1] * shape[2], classes)


def wide_on_rank_1(classes, shape):
    """A wider network on rank 1."""
    return flat(classes, shape, 16 if os.environ.get("OMPI_COMM_WORLD_RANK") == "1" else 8)


@pytest.mark.thorough
def test_real_ranks_in_other_folders_and_of_another_cpu_level(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    first, *options = mpirun_command(2)
    more = ["env", "ATEN_CPU_CAPABILITY=default"]
    run = command_line("run", TINY, "output=runs/out", "rounds=1")
    ended = run_process(
        [
            first,
            *options,
            "--wdir",
            str(here),
            *run,
            ":",
            "-n",
            "1",
            "--wdir",
            str(there),
            *more,
            *run,
        ],
        tmp_path,
    )
    assert ended.returncode == 2, ended.stderr
    *warned, line = package_lines(ended.stderr)
    assert "output = runs/out: rank 2 (host" in line and "does not see" in line
    assert not [*here.iterdir()] and not [*there.iterdir()]
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert (
            len(warned) == 1 and "rank 2 (host" in warned[0] and "CPU level is DEFAULT" in warned[0]
        )
