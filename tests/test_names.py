"""Whatever the parts of a user's network are called, no method mistakes a leaf of it for one of its
own.
"""

import ast
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import TINY, run_rounds, snapshots_equal, tiny_config
from torch import nn

from fedlora_mpi import algorithms, open_run
from fedlora_mpi.algorithm import Variables
from fedlora_mpi.algorithms import fed_rac_lora
from fedlora_mpi.cli import main
from fedlora_mpi.components.lora import FineTuning
from fedlora_mpi.core.names import (
    display_name,
    factor_name,
    is_factor,
    is_method_leaf,
    method_leaf_name,
    stored_names,
    weight_of,
)
from fedlora_mpi.core.seeds import derive_key, rng
from fedlora_mpi.federation.instruments import Instruments
from fedlora_mpi.models import zoo

CLASSES, SHAPE = 4, (1, 8, 8)  # those of tiny.yaml
CORE = "core"  # a layer that the names of methods are put in front of
SMALL = (
    "rounds=2",
    "train.epochs=1",
    "train.lr=0.01",
    "data.synthetic.train=24",
    "data.synthetic.test=8",
    "data.partition.clients=2",
    "data.partition.minimum=2",
    "participation=1",
    "train.batch_size=12",
)
SETTINGS = {
    **dict.fromkeys(("fml", "fedkd", "fedapen"), ("algorithm.small=user_parts:wide",)),
    **dict.fromkeys(("scaffold", "pfedme", "fedglomo"), ("train.momentum=0",)),
    "dpsgd": ("topology=ring",),
    "depositum_like": ("topology=ring", "train.momentum=0", "train.weight_decay=0"),
    "fedhpl_like": ("algorithm.prompts=0",),  # these networks have no tokens
    "fedrep": ("algorithm.head_epochs=0",),
    **dict.fromkeys(("fedlora", "local_lora", "fedavg_lora"), ("algorithm.order=simultaneous",)),
    "fedala": ("algorithm.start_epochs=1",),
    "pfedgate": ("algorithm.sparsity=0.5",),
    "moon": ("algorithm.mu=0.1",),
}


def settings(name):
    """Overrides of tiny.yaml for a method."""
    more = (*SETTINGS.get(name, ()), *SMALL)
    if issubclass(algorithms.find_algorithm(name), FineTuning):
        more += (
            "algorithm.personal_full=false" if name == "fedsa_lora" else "algorithm.diagnose=true",
            "algorithm.lora_ranks=[2,1]" if name != "fed_rac_lora" else "algorithm.factor=both",
        )
    return (f"algorithm={name}", *more)


def own_leaves(name):
    """The names of what a method adds to a network: on clients, in messages and on the server.

    The variables of the server alone are a tree of their own, in which no network has a leaf.
    """
    algorithm = tiny_config(*settings(name)).algorithm
    net = zoo.build("cnn", {"width": 4, "hidden": 8}, CLASSES, SHAPE, 1)
    shared, personal = algorithm.init(net, rng(1, "init"))[:2]
    transport = algorithm.transport(0, 3)
    v = Variables(transport.download(shared), personal)
    upload = transport.method.upload(v, v, 0)
    term = transport.expand(upload, shared, 1)
    trees = (shared, personal, v.shared, upload.message, term.mean | term.sum)
    added = {leaf for tree in trees for leaf in tree if leaf not in net.leaves}
    return added | {*filter(is_method_leaf, algorithm.server(net, shared))}


@cache
def plain_names(of):
    """What a method adds ("": what all methods add), as it would be called without dots of its own:
    ({words in front of a layer}, {others}).
    """
    net = zoo.build("cnn", {"width": 4, "hidden": 8}, CLASSES, SHAPE, 1)
    words, others = {}, {}
    for leaf in (
        leaf
        for name in ([of] if of else algorithms.algorithm_names())
        for leaf in sorted(own_leaves(name))
    ):
        plain = display_name(leaf)
        layer = next((n for n in net.leaves if n in plain), None)
        if layer:
            words |= dict.fromkeys(word for word in plain.replace(layer, ".").split(".") if word)
        else:
            others[plain] = None
    return (*words,), (*others,)


def tops(of):
    """Words with which names of a method ("": of all methods) begin, and those that factors end
    with.
    """
    words, others = plain_names(of)
    return (
        *dict.fromkeys(
            (CORE, "A", "B", *words, *(name.partition(".")[0] for name in others if "." in name))
        ),
    )


class Net(nn.Module):
    """Layers of 4 features one after the other, some inside others, each with further parameters.

    called: what a part is called that has some name of a method; of: the method, "" for all of
    them.
    """

    def __init__(self, classes, shape, head, of, called):
        super().__init__()
        self._called, self._layers, self._factors = called, [], []
        conv, norm, *others = [word for word in tops(of) if word != head]
        self._ends = called(conv), called(norm), called(head)
        self.add_module(called(conv), nn.Conv2d(shape[0], 4, 3, 2))
        self.add_module(called(norm), nn.BatchNorm2d(4))
        for word in others:
            self._add(f"{word}.weight"), self._add(f"{word}.{CORE}.weight")
        for letter in "ABW":
            self._add(f"{CORE}.{letter}")
        for leaf in plain_names(of)[1]:
            if leaf.partition(".")[0] not in (conv, norm, head):
                self._add(leaf)
        self.add_module(called(head), nn.Linear(4, classes))

    def _add(self, leaf):
        """A parameter of this name, in layers that have weights, too."""
        *home, name = leaf.split(".")
        inside, path = self, ""
        for word in map(self._called, home):
            path = f"{path}.{word}".strip(".")
            if word not in inside._modules:
                inside.add_module(word, nn.Linear(4, 4))
                self._layers.append(path)
            inside = inside._modules[word]
        name = name if name in ("weight", "bias") and home else self._called(name)
        if name not in inside._parameters and name not in inside._modules:
            inside.register_parameter(name, nn.Parameter(torch.randn(4, 4) / 10))
            self._factors.append((path, name))

    def forward(self, x):
        conv, norm, head = (self._modules[name] for name in self._ends)
        x = norm(conv(x)).amax((2, 3))
        for path in self._layers:
            x = x + 0.1 * self.get_submodule(path)(x)
        for path, name in self._factors:
            x = x + 0.1 * x @ self.get_submodule(path)._parameters[name]
        return head(x)


def hostile(classes, shape, head, of=""):
    return Net(classes, shape, head, of, str)


def neutral(classes, shape, head, of=""):
    words = sorted(
        {
            word
            for name in (*tops(of), *plain_names(of)[1], "A", "B", "W")
            for word in name.split(".")
        }
    )
    return Net(classes, shape, head, of, lambda word: f"layer{words.index(word)}")


def head_of(name, of=""):
    """The word that the classifier is called by in the test of a method: another for each."""
    words = tops(of)[2:]  # the first ones are other layers
    return words[algorithms.algorithm_names().index(name) % len(words)]


def same_results(name, of, monkeypatch):
    if name == "fed_rac_lora":  # sketches follow from the names of weights
        monkeypatch.setattr(fed_rac_lora, "derive_key", lambda *address: derive_key(*address[:-1]))
    # counting them takes most of the time
    monkeypatch.setattr(Instruments, "flops", lambda *_: 0)
    ours, plain = (
        run_rounds.__wrapped__(
            *settings(name),
            f"model={{name: 'test_names:{net}', head: {head_of(name, of)}, of: '{of}'}}",
        )[0]
        for net in ("hostile", "neutral")
    )
    for a, b in zip(ours, plain, strict=True):
        for mine, other in ((a.shared, b.shared), (a.personal, b.personal), (a.server, b.server)):
            for (leaf, u), v in zip(mine.items(), other.values(), strict=True):
                assert torch.equal(u, v), leaf
        assert snapshots_equal(
            a._replace(shared={}, personal={}, server={}),
            b._replace(shared={}, personal={}, server={}),
        )
    return ours


# Factors of the weights and of the head, leaves of clients and of the server, other networks,
# mixes.
TELLING = (
    "fedlora",
    "fedit",
    "fedhl",
    "fed_rac_lora",
    "fedala",
    "pfedgate",
    "ditto",
    "apfl",
    "scaffold",
    "fedadam",
    "fedkd",
    "fedamp",
)


@pytest.mark.parametrize("name", TELLING)
def test_layers_called_as_what_a_method_adds_do_not_change_what_it_does(name, monkeypatch):
    same_results(name, name, monkeypatch)


@pytest.mark.thorough
@pytest.mark.parametrize("name", algorithms.algorithm_names())
def test_names_of_layers_do_not_change_what_a_method_does(name, monkeypatch):
    same_results(name, "", monkeypatch)


@pytest.mark.parametrize("name", algorithms.algorithm_names())
def test_what_a_method_adds_has_a_name_that_no_network_can_have(name):
    assert all(is_method_leaf(leaf) for leaf in own_leaves(name))


def test_torch_refuses_the_names_that_methods_use():
    module = nn.Module()
    for name in ("", ".own", "a..b", "a.", "."):
        with pytest.raises(KeyError):
            module.register_parameter(name, nn.Parameter(torch.zeros(1)))
        with pytest.raises(KeyError):
            module.add_module(name, nn.Identity())


def test_names_tell_words_from_factors_and_weights():
    names = [
        method_leaf_name("last", "A"),
        factor_name("last", "A"),
        "last.A",
        method_leaf_name("own", factor_name("w", "B")),
        method_leaf_name("fresh"),
    ]
    assert len(set(names)) == 5 and [is_method_leaf(n) for n in names] == [
        True,
        True,
        False,
        True,
        True,
    ]
    assert [is_factor(n) for n in names] == [False, True, False, False, False]
    assert weight_of(factor_name("last.A", "W")) == "last.A" and is_factor(
        factor_name("w", "W"), "W"
    )
    assert [display_name(n) for n in names] == ["last.A", "last.A", "last.A", "own.w.B", "fresh"]


def test_in_a_file_names_are_plain_unless_two_leaves_would_share_one():
    assert stored_names(
        [factor_name("w", "A"), method_leaf_name("c", "w"), method_leaf_name("fresh"), "w"]
    ) == {
        "w..A": "w.A",
        ".c.w": "c.w",
        ".fresh.": "fresh",
        "w": "w",
    }
    names = [
        "last.A",
        method_leaf_name("last", "A"),
        factor_name("last", "A"),
        factor_name("a/b.%", "B"),
    ]
    assert list(stored_names(names).values()) == ["last.A", ".last.A", "last..A", "a/b.%.B"]


def test_no_method_tells_leaves_apart_by_a_literal():
    """Only by ``names.py``, or by a prefix that comes from it."""
    root = Path(algorithms.__file__).parent
    asked = {"startswith", "endswith", "removeprefix", "removesuffix"}
    for path in (
        *root.glob("[!_]*.py"),
        *(root.parent / "components/lora").glob("*.py"),
        root.parent / "components/lowrank.py",
    ):
        for call in (
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
        ):
            if isinstance(call.func, ast.Attribute) and call.func.attr in asked:
                said = [
                    n
                    for argument in call.args
                    for n in ast.walk(argument)
                    if isinstance(n, ast.Constant)
                ]
                assert not said, f"{path.name}:{call.lineno}"


@pytest.mark.parametrize("name, of_all", [
    ("fedala", False), ("fedlora", False),
    *(pytest.param(name, True, marks=pytest.mark.thorough) for name in ("fedhl", "fedala", "pfedgate", "fedlora")),
])  # fmt: skip
def test_a_run_of_such_a_network_resumes_in_the_same_bits_and_is_read(
    name, of_all, tmp_path, monkeypatch
):
    monkeypatch.setattr(Instruments, "flops", lambda *_: 0)
    of = "" if of_all else name
    model = f"model={{name: 'test_names:hostile', head: {head_of(name, of)}, of: '{of}'}}"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    how = [str(TINY), *settings(name), model, "checkpoint.every=1"]
    assert main(["run", *how, f"output={whole}"]) == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints/000002")
    assert main(["resume", str(cut)]) == 0
    run = open_run(cut)
    assert run.digest() == open_run(whole).digest()
    moment = run_rounds.__wrapped__(*settings(name), model)[0][-1]
    assert len(run.shared) == len(moment.shared) and len(run.client(1).personal) == len(
        moment.personal
    )
    for leaf, value in run.by_leaf(run.shared).items():
        assert np.array_equal(value, moment.shared[leaf].numpy())
    view = run.client(1)
    assert set(view.weights) == set(view.network.leaves)
    assert all(
        np.array_equal(view.weights[n], v.numpy())
        for n, v in view.model.state_dict().items()
        if n in view.weights
    )
