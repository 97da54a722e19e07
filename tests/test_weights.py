"""``model.weights``: what a file gives a network, what is refused,
and what a run remembers of it."""

import os
import pickle
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from runs import TINY, build_tiny, run_outcome, tiny_config, trees_equal
from torch import nn
from user_parts import with_norm

from fedlora_mpi import config as configs
from fedlora_mpi.algorithm import Variables
from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.analysis.run_view import open_run
from fedlora_mpi.cli import main
from fedlora_mpi.core.tree import split
from fedlora_mpi.core.vision import import_torchvision
from fedlora_mpi.models import weights, zoo

SHAPE, OPTIONS = (1, 8, 8), {"width": 3, "hidden": 5}
SQUEEZE, IMAGE = "torchvision:squeezenet1_1", (3, 32, 32)


def cnn(seed, classes=4, given=None, **options):
    """The zoo's cnn, small: 0 and 3 are convolutions, 7 is hidden, 9 the head."""
    return zoo.build("cnn", OPTIONS | options, classes, SHAPE, seed, weights=given and str(given))


def saved(path: Path, tree: dict) -> Path:
    """A file of either format with these tensors."""
    if path.suffix == ".safetensors":
        path.write_bytes(weights.pack_safetensors(tree))
    else:
        torch.save(tree, path)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


# --- what a file gives


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.pth", "A.PT"])
def test_the_initial_weights_are_those_of_the_file(here, name):
    other = cnn(seed=2)
    saved(here / name, other.initial)
    model = cnn(seed=1, given=name)
    assert trees_equal(model.initial, other.initial) and not trees_equal(
        model.initial, cnn(seed=1).initial
    )
    assert model.leaves == other.leaves and list(model.initial) == list(other.initial)


def test_a_path_may_begin_at_home(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    (here / "nets").mkdir()
    saved(here / "nets/a.pt", cnn(seed=2).initial)
    assert trees_equal(cnn(seed=1, given="~/nets/a.pt").initial, cnn(seed=2).initial)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_training_checkpoint_may_hold_the_state_dict_inside(here, key):
    torch.save({"epoch": 3, key: cnn(seed=2).initial, "optimizer": {"lr": 0.1}}, here / "a.pt")
    assert trees_equal(cnn(seed=1, given="a.pt").initial, cnn(seed=2).initial)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(tmp_path, suffix, dtype):
    tree = {n: v.to(dtype) for n, v in cnn(seed=2).initial.items()}
    found = weights.read(saved(tmp_path / f"a{suffix}", tree))
    assert trees_equal(found, {n: v.float() for n, v in tree.items()})


def test_what_is_read_shares_no_memory_and_asks_for_no_gradient(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tree = {"a": nn.Parameter(whole[1:].t()), "b": whole}
    torch.save(tree, tmp_path / "a.pt")
    found = weights.read(tmp_path / "a.pt")
    assert trees_equal(found, {"a": whole[1:].t(), "b": whole})
    assert found["a"].is_contiguous() and not found["a"].requires_grad
    assert found["a"].untyped_storage().data_ptr() != found["b"].untyped_storage().data_ptr()


def test_views_and_other_memory_formats_are_written_as_their_numbers(tmp_path):
    flat = torch.arange(24.0)
    tree = {
        "a": flat[:12].view(3, 4).t(),
        "b": flat[12:].view(1, 3, 2, 2).to(memory_format=torch.channels_last),
    }
    assert trees_equal(weights.read(saved(tmp_path / "a.safetensors", tree)), tree)


def test_a_module_of_torch_comes_with_its_statistics_and_without_its_counts(here):
    module = with_norm(4, SHAPE)
    for _ in range(3):
        module(torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1)) + 2)
    assert module.state_dict()["norm.num_batches_tracked"] == 3
    torch.save(module.state_dict(), here / "a.pt")
    model = zoo.build("user_parts:with_norm", {}, 4, SHAPE, 1, weights="a.pt")
    for name, value in model.initial.items():
        assert torch.equal(value, module.state_dict()[name]), name
    assert (
        model.role("norm.running_mean") == "stats"
        and model.initial["norm.running_mean"].abs().max() > 0
    )


class Tied(nn.Module):
    """A layer under two names, and a table that its state dict leaves out."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.again = self.first
        self.register_buffer("table", torch.ones(64), persistent=False)
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        return self.head(self.again(self.first(x.flatten(1)) * self.table).relu())


def tied(classes, shape):
    return Tied()


def test_a_layer_of_two_names_and_a_table_that_is_not_saved_are_no_mistakes(here):
    module = Tied()
    assert "again.weight" in module.state_dict() and "table" not in module.state_dict()
    torch.save(module.state_dict(), here / "a.pt")
    model = zoo.build("test_weights:tied", {}, 4, SHAPE, 1, weights="a.pt")
    assert trees_equal(
        model.initial,
        {n: module.get_parameter(n) for n in model.initial if n != "table"}
        | {"table": torch.ones(64)},
    )


# --- the head


def test_a_head_for_other_classes_keeps_the_initial_weights_of_the_seed(here):
    saved(here / "a.pt", cnn(seed=2, classes=6).initial)
    model, own, other = (
        cnn(seed=1, given="a.pt"),
        cnn(seed=1).initial,
        cnn(seed=2, classes=6).initial,
    )
    head, body = split(model.initial, lambda n: model.role(n) == "head")
    assert sorted(head) == ["9.bias", "9.weight"]
    assert trees_equal(head, {n: own[n] for n in head}) and trees_equal(
        body, {n: other[n] for n in body}
    )


@pytest.mark.parametrize("absent", [["9.weight"], ["9.bias"], ["9.weight", "9.bias"]])
def test_a_head_that_is_not_there_as_a_whole_keeps_its_own(here, absent):
    saved(here / "a.pt", {n: v for n, v in cnn(seed=2).initial.items() if n not in absent})
    model = cnn(seed=1, given="a.pt")
    for name, value in model.initial.items():
        assert torch.equal(value, cnn(seed=1 if name.startswith("9.") else 2).initial[name]), name


def test_a_convolution_for_a_head_may_differ_too(here):
    saved(here / "a.pt", zoo.build(SQUEEZE, {}, 3, IMAGE, 2).initial)
    model, own = (zoo.build(SQUEEZE, {}, 4, IMAGE, 1, weights=given) for given in ("a.pt", None))
    assert torch.equal(model.initial["classifier.1.weight"], own.initial["classifier.1.weight"])
    assert not torch.equal(model.initial["features.0.weight"], own.initial["features.0.weight"])


# --- what is refused


def without(tree, name):
    return {n: v for n, v in tree.items() if n != name}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t | {"7.weight": torch.ones(5, 7)},
            "7.weight is [5, 7] in the file, [5, 24] in the network",
        ),
        (
            lambda t: t | {"0.bias": torch.ones(3, 1)},
            "0.bias is [3, 1] in the file, [3] in the network",
        ),
        (lambda t: without(t, "3.bias"), "3.bias is absent in the file, [6] in the network"),
        (
            lambda t: t | {"3.bias": torch.ones(6, dtype=torch.int64)},
            "3.bias is absent in the file, [6] in the network",
        ),
        (
            lambda t: t | {"8.more": torch.ones(2, 3)},
            "8.more is [2, 3] in the file, absent in the network",
        ),
        (
            lambda t: {f"module.{n}": v for n, v in t.items()},
            "0.weight is absent in the file, [3, 1, 3, 3] in the network",
        ),
        (
            lambda t: t | {"7.bias": torch.tensor([0, 1, torch.nan, 0, 0])},
            "7.bias has numbers that are not finite",
        ),
        (
            lambda t: t | {"7.bias": torch.full((5,), 1e300, dtype=torch.float64)},
            "7.bias has numbers that are not finite",
        ),
    ],
)
def test_the_first_leaf_that_does_not_fit_is_named(here, suffix, change, message):
    saved(here / f"a{suffix}", change(dict(cnn(seed=2).initial)))
    with pytest.raises(ValueError) as refused:
        cnn(seed=1, given=f"a{suffix}")
    assert str(refused.value).startswith(f"weights = a{suffix}: {message}") and "\n" not in str(
        refused.value
    )


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.pt", None, "there is no file {here}/a.pt"),
        ("a.safetensors", None, "there is no file {here}/a.safetensors"),
        ("a.bin", b"", "must be a file .safetensors, .pt, .pth"),
        ("IMAGENET1K_V1", None, "must be a file .safetensors, .pt, .pth"),
        ("", None, "must be a file .safetensors, .pt, .pth"),
        ("a.safetensors", b"", "a.safetensors is no safetensors file, or damaged"),
        ("a.safetensors", b"\0" * 300, "a.safetensors is no safetensors file, or damaged"),
        ("a.pt", b"", "a.pt is damaged, or holds more than tensors (EOFError)"),
        ("a.pt", b"PK" * 300, "a.pt is damaged, or holds more than tensors"),
        ("a.pt", [torch.ones(3)], "a.pt holds no state dict but list"),
        ("a.pt", {"0.weight": 3.0}, "0.weight is no dense tensor there"),
        ("a.pt", {"0.weight": torch.ones(3, 5).to_sparse()}, "0.weight is no dense tensor there"),
        (
            "a.pt",
            {"0.weight": torch.ones(3, 5, device="meta")},
            "0.weight is no dense tensor there",
        ),
    ],
    ids=str,
)
def test_what_is_no_file_of_weights_is_said_in_one_line(here, name, content, message):
    if isinstance(content, bytes):
        (here / name).write_bytes(content)
    elif content is not None:
        torch.save(content, here / name)
    with pytest.raises(ValueError) as refused:
        zoo.build("cnn", OPTIONS, 4, SHAPE, 1, weights=name)
    assert str(refused.value).startswith(f"weights = {name}: {message.format(here=here)}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_that_ends_too_early_is_refused(here, suffix):
    path = saved(here / f"a{suffix}", cnn(seed=2).initial)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        weights.read(path)


class Bomb:
    """Makes a folder when it is unpickled by a reader that trusts."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickle_that_would_execute_something_does_not(here):
    for protocol, path in ((2, "old.pt"), (None, "new.pt")):
        if protocol:
            Path(path).write_bytes(pickle.dumps({"0.weight": Bomb()}, protocol))
        else:
            torch.save({"0.weight": Bomb()}, path)
        with pytest.raises(
            ValueError, match=r"damaged, or holds more than tensors \(UnpicklingError\)"
        ):
            weights.read(Path(path))
    assert not (here / "exploded").exists()
    torch.load("new.pt", weights_only=False)
    assert (here / "exploded").exists()  # so the file was a bomb


def test_without_the_library_the_message_says_what_to_install(here, monkeypatch):
    saved(here / "a.safetensors", cnn(seed=2).initial)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(
        ValueError,
        match=r"^weights = a.safetensors: safetensors is not installed; pip install 'fedlora",
    ):
        cnn(seed=1, given="a.safetensors")


# --- torchvision's own, from torch's cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torch's cache with a file for squeezenet1_1 of 3 classes, whose name has the right digest.

    The true file is not to be had without a network; torchvision's table is made to name this one.
    """
    folder = tmp_path / "home/hub/checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    torch.save(zoo.build(SQUEEZE, {}, 3, IMAGE, 2).initial, folder / "new.pth")
    path = (folder / "new.pth").rename(
        folder / f"squeezenet1_1-{weights.file_digest(folder / 'new.pth')[:8]}.pth"
    )
    known = import_torchvision().models.get_model_weights("squeezenet1_1")["IMAGENET1K_V1"].value
    monkeypatch.setattr(known, "url", f"https://download.pytorch.org/models/{path.name}")
    return path


@pytest.mark.parametrize("given", ["IMAGENET1K_V1", "DEFAULT"])
def test_the_weights_of_torchvision_are_found_in_the_cache_of_torch(cache, given):
    model = zoo.build(SQUEEZE, {}, 3, IMAGE, 1, weights=given)
    assert trees_equal(model.initial, zoo.build(SQUEEZE, {}, 3, IMAGE, 2).initial)
    assert weights.find_file(SQUEEZE, given).path == cache


def test_a_file_in_the_cache_whose_digest_is_not_that_of_its_name_is_refused(cache):
    torch.save(zoo.build(SQUEEZE, {}, 3, IMAGE, 3).initial, cache)
    promised = cache.stem.removeprefix("squeezenet1_1-")
    with pytest.raises(ValueError) as refused:
        zoo.build(SQUEEZE, {}, 3, IMAGE, 1, weights="DEFAULT")
    assert str(refused.value) == (
        f"weights = DEFAULT: {cache} is damaged, its SHA-256 does not begin with {promised}; put "
        f"https://download.pytorch.org/models/{cache.name} there anew"
    )


def test_weights_that_are_not_in_the_cache_are_not_downloaded_but_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError) as refused:
        zoo.build(SQUEEZE, {}, 3, IMAGE, 1, weights="IMAGENET1K_V1")
    name = "squeezenet1_1-b8a52dc0.pth"
    for part in (
        f"there is no file {tmp_path}/hub/checkpoints/{name}; ",
        f"put https://download.pytorch.org/models/{name} there",
    ):
        assert part in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", ["IMAGENET1K_V2", "__members__", "default"])
def test_a_name_that_torchvision_does_not_know_is_refused_with_those_it_has(given):
    with pytest.raises(ValueError) as refused:
        zoo.build(SQUEEZE, {}, 3, IMAGE, 1, weights=given)
    assert str(refused.value).startswith(
        f"weights = {given}: must be a file .safetensors, .pt, .pth, or of {SQUEEZE} "
        "IMAGENET1K_V1, DEFAULT"
    )


def test_a_network_of_torchvision_takes_a_file_too(here):
    saved(here / "a.pt", zoo.build(SQUEEZE, {}, 3, IMAGE, 2).initial)
    model = zoo.build(SQUEEZE, {"dropout": 0.25}, 3, IMAGE, 1, weights="a.pt")
    assert trees_equal(model.initial, zoo.build(SQUEEZE, {}, 3, IMAGE, 2).initial)


# --- the config


def test_a_config_without_weights_has_the_digest_it_had_before_there_were_any():
    # of the last commit that knew no weights
    assert configs.digest(tiny_config()) == "d2c2be1703531baf519f776b692618ed"
    assert configs.digest(tiny_config("model.weights=null")) == configs.digest(tiny_config())
    assert "weights" not in configs.resolved_dict(tiny_config())["model"]
    assert configs.digest(tiny_config("model.weights=a.pt")) != configs.digest(
        tiny_config("model.weights=b.pt")
    )


@pytest.mark.parametrize("network", ["cnn", "torchvision:resnet18", "user_parts:wide"])
def test_every_network_takes_weights_beside_its_options_in_a_mix_too(network):
    config = tiny_config(f"model={{mix: [{network}, {{name: '{network}', weights: a.pt}}]}}")
    assert [n.weights for n in config.model.mix] == [None, "a.pt"]
    assert all("weights" not in n.options for n in config.model.mix)
    tree = configs.resolved_dict(config)
    assert [n.get("weights") for n in tree["model"]["mix"]] == [None, "a.pt"]
    assert configs.from_dict(tree, "again") == config


def test_weights_go_when_the_name_of_the_network_changes(here):
    (here / "x.yaml").write_text(
        TINY.read_text().replace("hidden: 8}", "hidden: 8, weights: a.pt}")
    )
    assert configs.read("x.yaml").model.mix[0].weights == "a.pt"
    assert configs.read("x.yaml", ["model.width=5"]).model.mix[0].weights == "a.pt"
    assert configs.read("x.yaml", ["model=resnet8"]).model.mix[0].weights is None


@pytest.mark.parametrize("value", ["3", "[a.pt]", "true"])
def test_weights_are_text(value):
    with pytest.raises(
        configs.ConfigError, match=r"^command line: model.weights = .*: must be text or null$"
    ):
        configs.read(TINY, [f"model={{name: cnn, weights: {value}}}"])


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_mistake_names_file_and_key(here, capsys, command):
    assert main([command, str(TINY), "model.weights=nowhere.pt"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == (
        "",
        f"fedlora-mpi: {TINY}: model.weights = nowhere.pt: there is no file {here}/nowhere.pt\n",
    )
    assert not list(here.iterdir())


# --- a run


def tiny_net(seed):
    """The network of tiny.yaml."""
    return zoo.build("cnn", {"width": 4, "hidden": 8}, 4, SHAPE, seed)


@pytest.fixture
def backbone(here):
    return saved(here / "net.safetensors", tiny_net(7).initial)


def test_every_client_of_the_network_starts_from_the_file(backbone):
    mix = f"model={{mix: [{{name: cnn, width: 4, hidden: 8, weights: {backbone}}}, {{name: cnn, width: 4, hidden: 8}}]}}"
    types = build_tiny(mix, "algorithm=local").federation.clients.types
    first, second = (client_type.initial for client_type in types)
    assert trees_equal(first.personal, tiny_net(7).initial)
    assert trees_equal(second.personal, tiny_net(1).initial)


def test_the_content_of_every_file_is_in_the_digest_of_the_run(backbone):
    def digest():
        return build_tiny.__wrapped__(f"model.weights={backbone}").run_digest

    before = digest()
    assert digest() == before and before.startswith(
        configs.digest(tiny_config(f"model.weights={backbone}")) + "-"
    )
    backbone.write_bytes(weights.pack_safetensors(tiny_net(8).initial))
    assert digest() != before and digest().rpartition("-")[0] == before.rpartition("-")[0]


def test_a_resume_goes_on_with_the_same_file_and_moves_no_bit(backbone, here):
    given = f"model.weights={backbone.name}"
    assert main(["run", str(TINY), given, "output=whole"]) == 0
    assert main(["run", str(TINY), given, "output=cut", "rounds=2"]) == 0
    assert main(["resume", "cut", "rounds=4"]) == 0
    whole, cut = run_outcome(here / "whole"), run_outcome(here / "cut")
    assert (whole["shared"], whole["personal"]) == (cut["shared"], cut["personal"])


def test_a_resume_with_another_content_or_none_is_refused(backbone, here, capsys):
    assert main(["run", str(TINY), f"model.weights={backbone.name}", "output=run", "rounds=2"]) == 0
    before = (here / "run/log.h5").read_bytes()
    backbone.write_bytes(weights.pack_safetensors(tiny_net(8).initial))
    capsys.readouterr()
    key = "fedlora-mpi: run/config.yaml: model.weights = net.safetensors: "
    assert main(["resume", "run", "rounds=4"]) == 2
    assert (
        capsys.readouterr().err
        == key + "has changed since the run began: put back what was, or start anew\n"
    )
    backbone.unlink()
    assert main(["resume", "run", "rounds=4"]) == 2
    assert capsys.readouterr().err == f"{key}there is no file {backbone}\n"
    assert (here / "run/log.h5").read_bytes() == before


def test_a_resume_on_another_file_is_another_config(backbone, here, capsys):
    assert main(["run", str(TINY), f"model.weights={backbone.name}", "output=run", "rounds=2"]) == 0
    shutil.copy(backbone, here / "same.safetensors")
    capsys.readouterr()
    assert main(["resume", "run", "rounds=4", "model.weights=same.safetensors"]) == 2
    told = "model.weights = same.safetensors: the run in run has net.safetensors"
    assert told in capsys.readouterr().err


def test_a_run_is_read_without_its_file_where_a_checkpoint_has_every_leaf(backbone):
    assert main(["run", str(TINY), f"model.weights={backbone.name}", "output=run", "rounds=2"]) == 0
    there = open_run("run").client(3)
    assert trees_equal(there.network.initial, tiny_net(7).initial)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    logits = there.model(x)
    backbone.unlink()
    gone = open_run("run").client(3)
    assert (
        all(v.is_meta for v in gone.network.initial.values())
        and gone.network.leaves == there.network.leaves
    )
    assert torch.equal(gone.model(x), logits)


@dataclass(frozen=True)
class HeadAlone(FedAvg):
    """Trains the head; the frozen rest is in the network alone."""

    def init(self, model, rng):
        return Variables(split(model.initial, lambda n: model.role(n) == "head")[0], {})

    def client_model(self, model, v):
        return model.initial | v.shared


def test_frozen_weights_are_read_from_the_file_or_missed_by_name(backbone):
    line = [
        "run",
        str(TINY),
        f"model.weights={backbone.name}",
        "output=run",
        "rounds=2",
        "algorithm=test_weights:HeadAlone",
    ]
    assert main(line) == 0
    found = open_run("run").client(3).weights
    for name, value in tiny_net(7).initial.items():
        assert torch.equal(torch.from_numpy(found[name]), value) == (not name.startswith("9.")), (
            name
        )
    backbone.unlink()
    message = (
        r"^run: 0.weight is in model.weights = .*net.safetensors alone, which is gone; put it back$"
    )
    with pytest.raises(ValueError, match=message):
        open_run("run").client(3).weights
