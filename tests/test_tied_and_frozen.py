"""Parameters in several places, and parameters that the builder has frozen."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from runs import TINY, assert_near, build_tiny, run_rounds, snapshots_equal
from torch import nn
from torch.nn.functional import linear

from fedlora_mpi.algorithms.fedavg import FedAvg
from fedlora_mpi.analysis.run_view import open_run
from fedlora_mpi.cli import main
from fedlora_mpi.core.names import factor_name, is_factor
from fedlora_mpi.core.seeds import isolate_rng
from fedlora_mpi.models import zoo
from fedlora_mpi.models.network import from_module

SHAPE, CLASSES, WIDE = (1, 8, 8), 4, 64
thorough = pytest.mark.thorough


class Linears(nn.Module):
    """Two square layers with one weight, a head, a buffer under two names."""

    def __init__(self):
        super().__init__()
        self.b, self.c = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)
        self.c.weight = self.b.weight
        self.register_buffer("shift", torch.full((1,), 0.1))
        self.c.register_buffer("again", self.shift)
        self.head = nn.Linear(WIDE, CLASSES)

    def forward(self, x):
        return self.head(self.c(self.b(x.flatten(1) - self.shift).relu() + self.c.again).relu())


class Twice(nn.Module):
    """A parameter under two names of one module, in a layer that is in two places."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDE, WIDE) / WIDE)
        self.same = self.w
        self.first = nn.Linear(WIDE, WIDE)
        self.layers = nn.ModuleList([self.first, nn.ReLU(), self.first])
        self.head = self.out = nn.Linear(WIDE, CLASSES)

    def forward(self, x):
        x = linear(linear(x.flatten(1), self.w), self.same)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


class Embedding(nn.Module):
    """A head whose weight is the first layer's, too."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(WIDE, CLASSES, bias=False)
        self.middle, self.head = nn.Linear(CLASSES, WIDE), nn.Linear(WIDE, CLASSES)
        self.head.weight = self.inside.weight

    def forward(self, x):
        return self.head(self.middle(self.inside(x.flatten(1)).relu()))


class AsBuffer(nn.Module):
    """A parameter that is a buffer of another layer."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(WIDE, WIDE, bias=False)
        self.b = nn.Module()
        self.b.register_buffer("w", self.a.weight)
        self.head = nn.Linear(WIDE, CLASSES)

    def forward(self, x):
        return self.head(linear(self.a(x.flatten(1)), self.b.w))


TIED = {"linears": Linears, "twice": Twice, "head": Embedding, "buffer": AsBuffer}


def linears(classes, shape):
    return Linears()


def two_names(classes, shape):
    return Twice()


def embedding(classes, shape):
    return Embedding()


def made(build):
    with isolate_rng(1, "test"):
        module = build()
        return from_module(module, CLASSES, SHAPE), module


def inputs(number=5):
    return torch.randn(number, *SHAPE, generator=torch.Generator().manual_seed(1))


def moved(tree):
    """Other numbers, so that nothing can be left from the start."""
    return {
        n: v + 0.1 * torch.randn(v.shape, generator=torch.Generator().manual_seed(2))
        for n, v in tree.items()
    }


# --- ties


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("training", [True, False])
def test_a_tied_network_computes_what_it_does_in_torch(kind, training):
    model, module = made(TIED[kind])
    model = model if training else model.eval_mode()
    tree, x = moved(model.initial), inputs()
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            value.copy_(tree[name]) if name in tree else None
    leaves = {n: v.clone().requires_grad_(model.role(n) != "stats") for n, v in tree.items()}
    found, expected = model(leaves, x), module.train(training)(x)
    assert torch.equal(found, expected) and torch.equal(found, model(leaves, x))
    assert torch.equal(model.classify(leaves, model.features(leaves, x)), found)
    found.square().sum().backward()
    expected.square().sum().backward()
    for name, value in module.named_parameters():
        assert torch.equal(leaves[name].grad, value.grad), name


@pytest.mark.parametrize("kind", TIED)
def test_no_value_stays_in_the_network_after_a_pass(kind):
    """torch's functional_call left those of a module with two names behind."""
    model, _ = made(TIED[kind])
    for same in (model, model.eval_mode()):
        same.classify(model.initial, same.features(model.initial, inputs()))
        same(model.initial, inputs())
    for module in (*model.modules, *model.bodies):
        assert all(v.is_meta for v in (*module.parameters(), *module.buffers()))
        assert all(isinstance(v, nn.Parameter) for v in module.parameters())


def test_low_rank_parts_of_a_layer_with_two_names_train_in_a_stack():
    settings = ("model=test_tied_and_frozen:two_names", "algorithm=fedit", "rounds=1")
    (stack,), (loop,) = (run_rounds(*settings, f"engine.path={p}") for p in ("stack", "loop"))
    assert_near(stack[-1].shared, loop[-1].shared, 1e-5)


def test_a_leaf_in_two_places_is_one_leaf_with_the_first_name():
    model, _ = made(Linears)
    assert list(model.leaves) == [
        "b.weight",
        "b.bias",
        "c.bias",
        "head.weight",
        "head.bias",
        "shift",
    ]
    assert model.ties == {"c.weight": "b.weight", "c.again": "shift"}


def test_what_head_and_body_share_is_body():
    model, _ = made(Embedding)
    assert model.head == "head" and model.leaves["inside.weight"].role == "body"
    assert (
        model.leaves["inside.weight"].matrix == "linear"
        and model.leaves["head.bias"].role == "head"
    )


def test_where_the_head_is_registered_first_its_shared_weight_is_body_too():
    class First(Embedding):
        def __init__(self):
            nn.Module.__init__(self)
            self.w = nn.Parameter(torch.randn(CLASSES, WIDE) / WIDE**0.5)
            self.middle, self.head = nn.Linear(CLASSES, WIDE), nn.Linear(WIDE, CLASSES)
            self.head.weight = self.w

        def forward(self, x):
            return self.head(self.middle(linear(x.flatten(1), self.w).relu()))

    model, _ = made(First)
    assert model.leaves["w"].role == "body" and model.leaves["w"].matrix == "linear"
    z = model.features({n: v for n, v in model.initial.items() if n != "head.bias"}, inputs())
    assert torch.equal(model.classify(model.initial, z), model(model.initial, inputs()))


@pytest.mark.parametrize("kind", TIED)
def test_a_module_that_is_taken_out_is_tied(kind):
    model, module = made(TIED[kind])
    tree = moved(model.initial)
    out = model.to_module(tree)
    assert list(out.state_dict()) == list(module.state_dict())
    assert dict(out.named_parameters()).keys() == dict(module.named_parameters()).keys()
    for name, first in model.ties.items():
        assert out.state_dict()[name].data_ptr() == out.state_dict()[first].data_ptr()
    assert torch.equal(out(inputs()), model.eval_mode()(tree, inputs()))


def test_stacked_clients_of_a_tied_network_are_each_of_them():
    model, _ = made(Linears)
    trees = [{n: v * (client + 1) for n, v in model.initial.items()} for client in range(3)]
    stack = {n: torch.stack([tree[n] for tree in trees]) for n in model.initial}
    x = inputs()
    found = torch.func.vmap(lambda tree: model(tree, x))(stack)
    for client, tree in enumerate(trees):
        torch.testing.assert_close(found[client], model(tree, inputs()), rtol=1e-4, atol=1e-3)


def test_two_parameters_in_one_memory_are_refused():
    class Shares(Linears):
        def __init__(self):
            super().__init__()
            self.c.weight = nn.Parameter(self.b.weight.data)

    with pytest.raises(
        ValueError,
        match=r"name: b.weight and c.weight of the network are two tensors in one memory",
    ):
        made(Shares)


@pytest.mark.parametrize("way", ["a list", "a function"])
def test_a_parameter_that_is_read_past_its_module_is_refused(way):
    class Reads(Linears):
        def __init__(self):
            super().__init__()
            self.past = [self.head.weight] if way == "a list" else lambda: self.head.weight

        def forward(self, x):
            z = super().forward(x)
            return z + linear(x.flatten(1), self.past[0] if way == "a list" else self.past())

    with pytest.raises(
        ValueError, match="clients' weights; (use nn.ParameterList|read them as self.NAME)"
    ):
        made(Reads)


def test_two_buffers_in_one_memory_are_none_of_our_business():
    class Means(Linears):
        def __init__(self):
            super().__init__()
            mean = torch.ones(1)
            self.b.register_buffer("mean", mean[:])
            self.c.register_buffer("mean", mean[:])

    assert {"b.mean", "c.mean"} <= made(Means)[0].leaves.keys()


@pytest.mark.parametrize("call", ["model", "features", "classify"])
def test_a_leaf_that_is_missing_is_named_and_never_computed_with(call):
    model, _ = made(Linears)
    tree, x = {n: v for n, v in model.initial.items() if n not in ("c.bias", "head.bias")}, inputs()
    run = {"model": lambda: model(tree, x), "features": lambda: model.features(tree, x)}
    run["classify"] = lambda: model.classify(tree, x.flatten(1))
    missing = "head.bias" if call == "classify" else "c.bias"
    with pytest.raises(
        ValueError,
        match=f"^{missing} of the network has no value: what a method's client_model returns",
    ):
        run[call]()


def test_the_head_alone_computes_where_the_network_is_one():
    model, module = made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(WIDE, CLASSES)))
    assert torch.equal(model.classify(model.initial, inputs().flatten(1)), module(inputs()))


@dataclass(frozen=True)
class Forgets(FedAvg):
    """FedAvg whose clients' models lack a leaf."""

    def client_model(self, model, v):
        return {n: w for n, w in v.shared.items() if n != "b.bias"}


def test_a_method_that_forgets_a_leaf_is_told_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network = "model=test_tied_and_frozen:linears"
    assert (
        main(["run", str(TINY), "algorithm=test_tied_and_frozen:Forgets", network, "rounds=1"]) != 0
    )
    assert "client_model lacks 1 of 6 leaves of the network (b.bias)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "method",
    ["fedlora", *(pytest.param(n, marks=thorough) for n in ("fedavg", "fedper", "fedamp"))],
)
def test_a_run_of_a_tied_network_has_one_leaf_on_any_ranks(method):
    overrides = (
        f"algorithm={method}",
        "model=test_tied_and_frozen:linears",
        "rounds=2",
        "train.lr=0.01",
    )
    alone, together = run_rounds(*overrides)[0], run_rounds(*overrides, ranks=2)[0]
    assert all(map(snapshots_equal, alone, together))
    names = alone[-1].shared.keys() | alone[-1].personal.keys()
    assert "b.weight" in names and not names & {"c.weight", "c.again"}
    assert alone[-1].row["accuracy"] > 0.5


def test_checkpoint_and_export_of_a_tied_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = [
        "algorithm=fedlora",
        "model=test_tied_and_frozen:embedding",
        "train.lr=0.01",
        "checkpoint.every=1",
    ]
    assert main(["run", str(TINY), *line, "rounds=1", "output=a"]) == 0
    assert main(["resume", "a", "rounds=2"]) == 0
    assert main(["export", "a", "--client", "0", "--to", "a.pt"]) == 0
    saved, module = torch.load("a.pt", weights_only=True), open_run("a").client(0).model
    assert (
        torch.equal(saved["head.weight"], saved["inside.weight"])
        and module.head.weight is module.inside.weight
    )
    embedding(CLASSES, SHAPE).load_state_dict(saved)


def test_weights_of_a_tied_network_may_have_either_name(tmp_path):
    model, _ = made(Linears)
    tree = moved(model.initial)
    other = {**{n: v for n, v in tree.items() if n != "b.weight"}, "c.weight": tree["b.weight"]}
    torch.save(other, tmp_path / "a.pt")

    def build(name):
        return zoo.build(
            "test_tied_and_frozen:linears", {}, CLASSES, SHAPE, 1, weights=str(tmp_path / name)
        )

    assert all(torch.equal(v, tree[n]) for n, v in build("a.pt").initial.items())
    torch.save(other | {"b.weight": tree["b.weight"] + 1}, tmp_path / "b.pt")
    with pytest.raises(
        ValueError, match="b.weight and c.weight differ in the file, and are one and the same"
    ):
        build("b.pt")


# --- frozen


class Backbone(nn.Module):
    """A frozen convolution with BatchNorm whose factors are frozen,
    two Linears that are trained."""

    def __init__(self, every: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1).requires_grad_(False)
        self.norm = nn.BatchNorm2d(4).requires_grad_(False)
        self.middle, self.head = nn.Linear(64, 8), nn.Linear(8, CLASSES)
        self.requires_grad_(False) if every else None

    def forward(self, x):
        return self.head(self.middle(self.norm(self.conv(x)).relu().flatten(1)).relu())


FROZEN = {"conv.weight", "conv.bias", "norm.weight", "norm.bias"}


def backbone(classes, shape):
    return Backbone()


def ice(classes, shape):
    return Backbone(every=True)


def of(method, network="backbone", *more):
    plain = ("train.momentum=0",) if method in ("scaffold", "pfedme") else ()
    return (
        f"algorithm={method}",
        f"model=test_tied_and_frozen:{network}",
        "rounds=2",
        "train.weight_decay=0.1",
        *plain,
        *more,
    )


@pytest.mark.parametrize(
    "method",
    (
        *("fedavg", "fedlora", "scaffold", "fedit"),
        *(
            pytest.param(n, marks=thorough)
            for n in (
                "fedprox",
                "fedadam",
                "ditto",
                "fedamp",
                "fedbn",
                "pfedlora",
                "fedala",
                "moon",
            )
        ),
    ),
)
def test_frozen_parameters_are_nobodys_variables(method):
    federation, end = build_tiny(*of(method)).federation, run_rounds(*of(method))[0][-1]
    model, tree = federation.clients.trainer.model, end.shared | end.personal
    assert model.frozen_leaves.keys() == FROZEN and not FROZEN & model.leaves.keys()
    assert not [n for n in tree if n.endswith(tuple(FROZEN))]
    start = run_rounds(*of(method))[0][0]
    assert any(not torch.equal(v, (start.shared | start.personal)[n]) for n, v in tree.items())
    assert all(method == "fedit" or factor_name(n, "A") not in tree for n in FROZEN)


def test_frozen_parameters_are_not_sent():
    row = run_rounds(*of("fedavg"))[0][-1].row
    assert row["bytes_up"] == row["bytes_down"] == 4 * 4 * (8 + 64 * 8 + 8 + 8 * CLASSES + CLASSES)


@pytest.mark.parametrize("method", ["fedavg", pytest.param("fedlora", marks=thorough), "fedit"])
def test_frozen_parameters_end_as_they_began_and_are_in_every_file(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(TINY), *of(method), "output=a"]) == 0
    view = open_run("a").client(1)
    network, module = view.network, view.model
    for name in FROZEN - ({"conv.weight"} if method == "fedit" else set()):
        assert torch.equal(module.get_parameter(name), network.constants[name])
    assert torch.equal(module.conv.weight, network.constants["conv.weight"]) == (method != "fedit")
    assert not module.conv.weight.requires_grad and module.head.weight.requires_grad
    assert view.weights.keys() >= FROZEN
    assert torch.equal(module.norm.running_mean, torch.zeros(4)) == (method == "fedit")
    assert main(["export", "a", "--client", "1", "--to", "a.pt"]) == 0
    backbone(CLASSES, SHAPE).load_state_dict(
        torch.load("a.pt", weights_only=True) | {"norm.num_batches_tracked": torch.tensor(0)}
    )
    if method == "fedavg":
        assert main(["export", "a", "--to", "b.pt"]) == 0
        assert torch.load("b.pt", weights_only=True).keys() >= FROZEN


def test_frozen_parameters_come_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = zoo.build("test_tied_and_frozen:backbone", {}, CLASSES, SHAPE, 1)
    torch.save(moved(model.all_values), "a.pt")
    loaded = zoo.build("test_tied_and_frozen:backbone", {}, CLASSES, SHAPE, 2, weights="a.pt")
    assert all(torch.equal(v, moved(model.all_values)[n]) for n, v in loaded.all_values.items())
    assert (
        main(
            [
                "run",
                str(TINY),
                *of("fedavg"),
                "model={name: 'test_tied_and_frozen:backbone', weights: a.pt}",
                "output=a",
            ]
        )
        == 0
    )
    Path("a.pt").unlink()
    with pytest.raises(
        ValueError, match="conv.weight is in model.weights = a.pt alone, which is gone"
    ):
        open_run("a").client(0).model


def test_pretraining_keeps_and_writes_what_is_frozen(tmp_path, monkeypatch, capsys):
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    assert (
        main(["pretrain", str(TINY), *of("fedavg"), "--to", "a.safetensors", "--epochs", "1"]) == 0
    )
    plain = zoo.build("test_tied_and_frozen:backbone", {}, CLASSES, SHAPE, 1)
    found = zoo.build(
        "test_tied_and_frozen:backbone", {}, CLASSES, SHAPE, 2, weights="a.safetensors"
    )
    assert all(torch.equal(found.constants[n], plain.constants[n]) for n in FROZEN)
    assert main(["pretrain", str(TINY), *of("fedavg", "ice"), "--to", "b.safetensors"]) == 2
    assert "all its parameters are frozen" in capsys.readouterr().err


def test_where_all_is_frozen_only_low_rank_parts_train(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for method in ("fedavg", "scaffold", "ditto", "fedlora"):
        assert main(["run", str(TINY), *of(method, "ice")]) == 2
        assert (
            "frozen" in (said := capsys.readouterr().err)
            and "fedit" in said
            and said.count("\n") == 1
        )
    start, *_, end = run_rounds(*of("fedit", "ice"))[0]
    assert all(map(is_factor, end.shared)) and factor_name("middle.weight", "A") in end.shared
    assert any(not torch.equal(v, start.shared[n]) for n, v in end.shared.items())


def test_a_complex_parameter_is_refused_and_a_frozen_one_is_a_constant():
    class Waves(nn.Module):
        def __init__(self, trained=True):
            super().__init__()
            self.wave = nn.Parameter(torch.ones(WIDE, dtype=torch.complex64), requires_grad=trained)
            self.head = nn.Linear(WIDE, CLASSES)

        def forward(self, x):
            return self.head((x.flatten(1) * self.wave).real)

    with pytest.raises(
        ValueError,
        match=r"name: parameter wave of the network is torch.complex64, which no method trains",
    ):
        made(Waves)
    model, _ = made(lambda: Waves(trained=False))
    assert (
        "wave" in model.constants
        and "wave" not in model.leaves
        and model.to_module(model.initial).wave.is_complex()
    )


def test_a_plan_counts_what_is_frozen(capsys):
    assert main(["plan", str(TINY), *of("fedavg")]) == 0
    assert "556 parameters, 48 frozen ones, 8 running statistics" in capsys.readouterr().out
